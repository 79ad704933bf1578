"""Wraps one or several inner optimizers with the interface of `torch.optim.Optimizer`."""
