"""`python -m cudagraph_jax`: the same as the command `cudagraph-jax`."""

import sys

from cudagraph_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
