"""`python -m d2v2ds.config`."""

import sys

from d2v2ds.config.load import main

if __name__ == "__main__":
    sys.exit(main())
