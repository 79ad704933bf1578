"""The main job of `raco_optim` on real text: one language model, two conflicting objectives.

    papers -> preference pairs -> tokenizer, pretrained model -> alignments -> table, JSON, figure
              data.py             model.py                       align.py      results.py, figure.py

Run it with ``python -m benchmarks.demo``.
"""

import os

# All three are read once, by the first import of torch or transformers, hence up here.
# Everything is trained here, so a look-up on a model hub could only be a mistake: make it fail.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Threads that wait for work sleep. By default they spin, which on cores that are shared with
# other processes made the demo several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
