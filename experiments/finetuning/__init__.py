"""Parts of `experiments.finetune_glue`: flags, batches, model and loss, dev metrics."""
