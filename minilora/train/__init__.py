"""Training: optimizers, the one training loop, and threads."""
