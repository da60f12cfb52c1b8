"""Lets `python -m experiments.paper` run."""

import sys

from experiments.paper.program import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
