"""Read and write official data2vec 2.0 checkpoints. fairseq is not needed.

    python -m d2v2ds.interop.fairseq import FILE.pt --out FOLDER [--outputs dict.ltr.txt] [--tokenizer FILE]
    python -m d2v2ds.interop.fairseq export FOLDER --out FILE.pt [--modality audio]

`import` takes pretraining checkpoints (student and, under `_ema`, teacher) and fine-tuned ones, whose outputs
--outputs names; nothing in the file is run. `export` writes the official layout back. Tensors keep type and bits.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.interop.fairseq.files import ImportOptions, export_file, findings, import_file


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m d2v2ds.interop.fairseq", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="official file -> our folder")
    importing.add_argument("source", type=Path, metavar="FILE.pt", help="official checkpoint")
    importing.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write")
    importing.add_argument("--drop-unknown", action="store_true", help="leave out tensors that our network lacks")
    importing.add_argument(
        "--only-model", action="store_true", help="leave out all but `model`, `cfg` and `args`, whatever it asks for"
    )
    importing.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="of text: RoBERTa's tokenizer.json or a sentencepiece .model"
    )
    importing.add_argument("--outputs", type=Path, metavar="FILE", help="letters or classes of a fine-tuned model")
    importing.add_argument("--sentences", type=int, choices=(1, 2), help="of an input of a fine-tuned text model")
    importing.add_argument("--encoder-only", action="store_true", help="leave out the head of a fine-tuned model")
    exporting = commands.add_parser("export", help="our folder -> official file")
    exporting.add_argument("source", type=Path, metavar="FOLDER", help="an export of this project")
    exporting.add_argument("--out", type=Path, required=True, metavar="FILE.pt", help="to write")
    exporting.add_argument("--modality", help="which, of a network of several")
    options = parser.parse_args(arguments)
    try:
        if options.command == "import":
            wanted = {field.name: getattr(options, field.name) for field in fields(ImportOptions)}
            found = import_file(options.source, options.out, ImportOptions(**wanted))
            print(f"{options.source}: {findings(found)}\nwritten: {options.out}")
        else:
            export_file(options.source, options.out, options.modality)
            print(f"written: {options.out}")
    except (D2V2Error, OSError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, MachineError) else D2V2Error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
