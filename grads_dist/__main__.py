"""`python -m grads_dist`, the form that launchers take."""

import sys

from grads_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
