"""The figures of arXiv 2404.09737, from real weights: `python -m experiments.paper`."""
