"""`python -m kashin_jax.cli` is `kashin`."""

import sys

from kashin_jax.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
