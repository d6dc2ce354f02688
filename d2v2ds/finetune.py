"""Fine-tune: a head on a pretrained trunk, from labelled shards.

    deepspeed --num_gpus 2 --module d2v2ds.finetune --config finetune/ctc_tiny data.shards=DIR valid.audio=DIR \
        run.dir=DIR init.weights=EXPORT key=value...

The objective of the configuration is a task: ctc or classify. Launchers, resume and exit codes are those of
`d2v2ds.pretrain`, which runs a task too.
"""

import sys

from d2v2ds.run.command import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    return run_command("python -m d2v2ds.finetune", __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
