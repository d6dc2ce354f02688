"""Read and write data2vec 1.0 checkpoints of images; neither fairseq nor transformers is needed.

    python -m d2v2ds.interop.data2vec1.images import FILE.pt|FOLDER --out MODEL
    python -m d2v2ds.interop.data2vec1.images export MODEL --out FILE.pt|FOLDER

`import` takes official files, of fairseq and of the fork of BEiT that made the published models, and folders of
transformers' `Data2VecVisionModel` and `Data2VecVisionForImageClassification`. `export` writes a file if the name ends
with .pt or .pth, else a folder of transformers. Nothing in a file is run. Tensors keep type and bits.
"""

import argparse
import sys
from pathlib import Path

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.interop.data2vec1.images.official import export_official, import_official
from d2v2ds.interop.data2vec1.images.transformers_folder import export_folder, import_folder


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m d2v2ds.interop.data2vec1.images", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source, out in (("import", "FILE.pt|FOLDER", "MODEL"), ("export", "MODEL", "FILE.pt|FOLDER")):
        command = commands.add_parser(name, help=f"{source} -> {out}")
        command.add_argument("source", type=Path, metavar=source, help="to read")
        command.add_argument("--out", type=Path, required=True, metavar=out, help="to write")
    options = parser.parse_args(arguments)
    try:
        if options.command == "import":
            reads = import_folder if options.source.is_dir() else import_official
            warnings = reads(options.source, options.out)
        else:
            writes = export_official if options.out.suffix in (".pt", ".pth") else export_folder
            warnings = writes(options.source, options.out)
    except (D2V2Error, OSError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, MachineError) else D2V2Error.exit_code
    print(*(f"WARNING: {warning}" for warning in warnings), f"written: {options.out}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
