"""Training of any model on any batches, resumable to the bit, and text for it."""
