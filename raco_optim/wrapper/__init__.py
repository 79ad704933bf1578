"""The contract of `torch.optim.Optimizer`, kept around one or several inner optimizers."""
