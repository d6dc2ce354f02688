"""Pretrain: the entry point of a run.

    deepspeed --num_gpus 2 --module d2v2ds.pretrain --config audio_large data.shards=DIR run.dir=DIR key=value...

The same module runs under `torchrun`, under `srun`, and as one process (`python -m d2v2ds.pretrain ...`). A run
whose folder holds a checkpoint goes on from it. Everything that can be wrong with the configuration is reported
at once, before any process group starts.

Exit codes: 0 done, 2 configuration or data, 3 collapse (only if health.stop_on_collapse), 4 too many steps that
were not finite, 5 no usable checkpoint, 6 too many rows that could not be read, 7 two checkpoints in a row could not
be written, 8 a fault of the machine (no descriptors or memory, a file system that failed, data that do not arrive),
75 stopped by a signal (TERM, USR1, USR2, HUP or INT to any rank) with everything saved: start again.
"""

import sys

from d2v2ds.run.command import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    return run_command("python -m d2v2ds.pretrain", __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
