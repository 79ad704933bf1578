"""Trainers of other libraries that use `raco_optim`; each module needs its library installed."""
