"""Three minutes of pretraining on this machine: the whole path from raw data to a verdict, as `make demo` runs it.

    python -m d2v2ds.demo --runs DIR [--modality audio|image|text|joint] [--data FOLDER] [section.field=value ...]

Without --data a small corpus is made that needs no network: voices spoken by espeak-ng, digits of scikit-learn laid
over its photographs, the documentation of Python's standard library; with it, your own recordings, pictures or texts
are used.
Then: pack, pretrain a tiny configuration under the deepspeed launcher with ZeRO-3, draw the curves, probe what was
learned where labels exist, and fine-tune it beside random weights for a word error rate or an accuracy. Every step is
the command a user would type, and is printed before it runs.
"""

import argparse
import sys
from pathlib import Path

from d2v2ds.modalities.demo import StepFailedError
from d2v2ds.modalities.known import SHIPPED
from d2v2ds.run.demo import demo


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--modality", choices=[*(one.name for one in SHIPPED), "joint"], default="audio")
    parser.add_argument("--data", type=Path, help="your own data, as the packer takes it; a sample if not given")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--fine-tuning-steps", type=int, default=160, metavar="N", help="0 leaves it out (160)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for d2v2ds.pretrain")
    options = parser.parse_args(arguments)
    if options.modality == "joint" and options.data is not None:
        parser.error("--data is of one modality; for a joint run on your own data pack each and start d2v2ds.pretrain")
    try:
        demo(options.runs, options.modality, options.data, options.ranks, options.overrides, options.fine_tuning_steps)
    except StepFailedError as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
