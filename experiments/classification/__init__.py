"""Sentence classification: the GLUE tasks, their data, labels, metrics and batches."""
