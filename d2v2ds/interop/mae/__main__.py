"""Read and write MAE checkpoints of the official repository and of transformers; neither is needed.

    python -m d2v2ds.interop.mae import FILE.pth|FOLDER --out FOLDER [--heads 12] [--decoder-heads 16] [--raw-pixels]
    python -m d2v2ds.interop.mae export FOLDER --out FILE.pth
    python -m d2v2ds.interop.mae export FOLDER --out FOLDER --transformers

`import` takes whole files, those of the encoder alone, and fine-tuned ones, whose classes --outputs names. Nothing in a
file is run. Tensors keep type and bits.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.interop.mae.files import export_mae, findings, import_mae
from d2v2ds.interop.mae.read import ReadOptions


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.interop.mae", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="official file, or ViTMAE folder of transformers -> our folder")
    importing.add_argument("source", type=Path, metavar="FILE.pth|FOLDER", help="checkpoint")
    importing.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write")
    importing.add_argument("--heads", type=int, help="of the encoder; by default those of the published model")
    importing.add_argument("--decoder-heads", type=int, help="likewise of the decoder")
    importing.add_argument("--outputs", type=Path, metavar="FILE", help="classes of a fine-tuned model")
    importing.add_argument("--raw-pixels", action="store_true", help="it predicts pixels as they are")
    exporting = commands.add_parser("export", help="our folder -> official file or ViTMAE folder")
    exporting.add_argument("source", type=Path, metavar="FOLDER", help="an export of this project")
    exporting.add_argument("--out", type=Path, required=True, metavar="FILE.pth|FOLDER", help="to write")
    exporting.add_argument("--transformers", action="store_true", help="write a folder for ViTMAEForPreTraining")
    options = parser.parse_args(arguments)
    try:
        if options.command == "import":
            wanted = ReadOptions(**{field.name: getattr(options, field.name) for field in fields(ReadOptions)})
            print(f"{options.source}: {findings(import_mae(options.source, options.out, wanted))}")
        else:
            export_mae(options.source, options.out, as_transformers=options.transformers)
        print(f"written: {options.out}")
    except (D2V2Error, OSError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, MachineError) else D2V2Error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
