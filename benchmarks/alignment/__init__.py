"""Multi-objective preference alignment on real text: the study that re-measures the paper's claims.

    data.py -> small.py, smollm2.py -> training.py -> study.py -> tables.py, figures.py
    papers     a model, its pairs      one run        the grid    what came of it
               models.py, prefix.py

``python -m benchmarks.alignment`` runs the study, ``python -m benchmarks.alignment.data`` writes
the preference data for ``raco-optim align``, ``python -m benchmarks.alignment.cost`` times a
training step.
"""

import os

# Read once, by the first import of torch or transformers. Models come from the package index, so
# a look-up on a model hub could only be a mistake: make it fail.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Threads that wait for work sleep instead of spinning on cores that other processes need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
