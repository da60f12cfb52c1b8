"""Classifiers trained on a task: all of a dense one, or what decodes fixed codes."""
