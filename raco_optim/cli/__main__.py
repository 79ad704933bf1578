"""Runs ``raco-optim`` as ``python -m raco_optim.cli``."""

import sys

from raco_optim.cli import main

if __name__ == "__main__":
    sys.exit(main())
