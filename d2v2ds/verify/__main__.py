"""`python -m d2v2ds.verify`."""

import sys

from d2v2ds.verify.golden import main

if __name__ == "__main__":
    sys.exit(main())
