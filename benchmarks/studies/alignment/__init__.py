"""Multi-objective preference alignment on real text, on a small model and on SmolLM2-135M.

    pairs.py -> trials.py -> training.py -> study.py -> summary.py
    papers      a model,     one run        the grid    measures, claims, table, picture
                its pairs

``python -m benchmarks.studies.alignment`` does all of it and goes on where it was stopped.
"""
