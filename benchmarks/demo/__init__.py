"""The main job of `raco_optim` on real text: one language model, two conflicting objectives.

    papers -> preference pairs -> tokenizer, pretrained model -> alignments -> table, JSON, figure
              data.py             model.py                       align.py      results.py, figure.py

Run it with ``python -m benchmarks.demo``.
"""

import os

# Everything is trained here, so a look-up on a model hub could only be a mistake: make it an error.
# Set before the first import of transformers, which reads both only then.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
