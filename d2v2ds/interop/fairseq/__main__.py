"""`python -m d2v2ds.interop.fairseq`."""

import sys

from d2v2ds.interop.fairseq.files import main

if __name__ == "__main__":
    sys.exit(main())
