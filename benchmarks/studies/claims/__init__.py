"""Claims about clipping and c that need no language model, on toys and on overlaid digits.

``python -m benchmarks.studies.claims`` runs what is left and writes `results/claims.json`. "25 %
faster with clipping" is a claim of a third party's summary; the paper itself claims nothing about
the number of steps.
"""
