"""Multi-objective preference alignment on real text, on a small model and on SmolLM2-135M.

    pairs.py -> trials.py -> training.py -> study.py -> summary.py
    papers      a model,     one run        the grid    measures, claims, table, picture
                its pairs

``python -m benchmarks.studies.alignment`` does all of it and goes on where it was stopped.
"""

import os

# Read once, by the first import of torch or transformers. Models come from the package index, so
# a look-up on a model hub could only be a mistake: make it fail.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Threads that wait for work sleep instead of spinning on cores that other processes need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
