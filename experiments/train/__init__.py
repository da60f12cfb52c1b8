"""Training of any model on any batches, and what `experiments.train_opt` adds to it.

Shared: `step`, `optimizer`, `loop`, `checkpoints`, `runlog`, `signals`. Of language
models only: the other modules.
"""
