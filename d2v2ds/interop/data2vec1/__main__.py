"""Read and write data2vec 1.0 checkpoints of fairseq and of transformers, speech and text; neither is needed.

    python -m d2v2ds.interop.data2vec1 import FILE.pt|FOLDER --out FOLDER [--tokenizer FILE]
    python -m d2v2ds.interop.data2vec1 export FOLDER --out FILE.pt
    python -m d2v2ds.interop.data2vec1 export FOLDER --out FOLDER --transformers

`import` takes checkpoints of pretraining, and the encoder of a folder of a task. Nothing in a file is run. Tensors keep
type and bits.
"""

import argparse
import sys
from pathlib import Path

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.interop.data2vec1.files import export_first, findings, import_first


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m d2v2ds.interop.data2vec1", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="file of fairseq, or folder of transformers -> our folder")
    importing.add_argument("source", type=Path, metavar="FILE.pt|FOLDER", help="checkpoint")
    importing.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write")
    importing.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="of text: RoBERTa's tokenizer.json or a sentencepiece .model"
    )
    exporting = commands.add_parser("export", help="our folder -> file of fairseq, or folder of transformers")
    exporting.add_argument("source", type=Path, metavar="FOLDER", help="an export of this project")
    exporting.add_argument("--out", type=Path, required=True, metavar="FILE.pt|FOLDER", help="to write")
    exporting.add_argument("--transformers", action="store_true", help="for Data2VecAudioModel or Data2VecTextModel")
    options = parser.parse_args(arguments)
    try:
        if options.command == "import":
            print(f"{options.source}: {findings(import_first(options.source, options.out, options.tokenizer))}")
        elif left_out := export_first(options.source, options.out, as_transformers=options.transformers):
            print(f"transformers has no place for {', '.join(left_out)}")
        print(f"written: {options.out}")
    except (D2V2Error, OSError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, MachineError) else D2V2Error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
