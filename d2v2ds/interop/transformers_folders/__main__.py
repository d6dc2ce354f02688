"""Read and write folders of transformers' own models: data2vec 1.0 for images. transformers is not needed.

    python -m d2v2ds.interop.transformers_folders import FOLDER --out MODEL
    python -m d2v2ds.interop.transformers_folders export MODEL --out FOLDER

`import` takes folders of `Data2VecVisionModel` and `Data2VecVisionForImageClassification`, such as those published
under facebook/data2vec-vision-*. `export` writes them from our exports. Tensors keep type and bits.
"""

import argparse
import sys
from pathlib import Path

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.interop.transformers_folders.files import export_folder, import_folder


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m d2v2ds.interop.transformers_folders", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source, out in (("import", "FOLDER", "MODEL"), ("export", "MODEL", "FOLDER")):
        command = commands.add_parser(name, help=f"{source} -> {out}")
        command.add_argument("source", type=Path, metavar=source, help="folder to read")
        command.add_argument("--out", type=Path, required=True, metavar=out, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        if options.command == "import":
            for warning in import_folder(options.source, options.out):
                print(f"WARNING: {warning}")
        else:
            export_folder(options.source, options.out)
    except (D2V2Error, OSError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, MachineError) else D2V2Error.exit_code
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
