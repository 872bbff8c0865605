"""Plain PyTorch models; nothing here imports anything distributed."""
