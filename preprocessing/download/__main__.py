"""`python -m preprocessing.download`."""

import sys

from preprocessing.download.command import main

if __name__ == "__main__":
    sys.exit(main())
