"""Parts of `experiments.train_opt`: text, tokens, optimizer, step, checkpoints, log."""
