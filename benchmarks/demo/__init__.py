"""The main job of `raco_optim` on real text: one language model, two conflicting objectives.

    papers -> preference pairs -> tokenizer, pretrained model -> alignments -> table, JSON, figure
              data.py             model.py                       align.py      results.py, figure.py

Run it with ``python -m benchmarks.demo``.
"""
