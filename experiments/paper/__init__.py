"""The figures and Table 1 of arXiv 2404.09737: `python -m experiments.paper`."""
