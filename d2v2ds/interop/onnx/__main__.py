"""`python -m d2v2ds.interop.onnx`."""

import sys

from d2v2ds.interop.onnx.graph import main

if __name__ == "__main__":
    sys.exit(main())
