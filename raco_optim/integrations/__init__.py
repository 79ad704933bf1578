"""Trainers of other libraries, driven by `raco_optim`; each module needs its library installed."""
