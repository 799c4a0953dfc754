"""Parts of the training loop of `train/train.py`: recipes, what learns, the global-token gradient, guards, checkpoints, the log."""
