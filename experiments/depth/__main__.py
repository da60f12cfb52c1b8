"""Lets `python -m experiments.depth` run."""

import sys

from experiments.depth.program import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
