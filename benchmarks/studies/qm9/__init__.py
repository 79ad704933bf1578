"""Eleven targets of QM9: does gradient surgery help against conflict, or against scale?

`python -m benchmarks.studies.qm9` runs what is missing; `protocol.py` says what is run.
"""
