"""Transcribe sound files of any length with a fine-tuned recogniser, with times of words.

    python -m d2v2ds.transcribe RUN_OR_EXPORT FILES_OR_FOLDERS... [--output FILE.jsonl] [--word-times] [--lm ARPA]

Without --output lines of name and text are printed. Killed and started again, finished recordings are kept. Exit code
3: more than one in a hundred recordings could not be read.
"""

import argparse
import sys
from pathlib import Path

from d2v2ds.run.decoder_choice import add_arguments, choice_of
from d2v2ds.run.file_inputs import EXIT_UNREAD
from d2v2ds.run.reporting import reported
from d2v2ds.run.transcription import FORMATS, TranscriptionOptions, transcribe


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.transcribe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a fine-tuned run, or an export of one")
    parser.add_argument("inputs", type=Path, nargs="+", help="sound files, and folders that are searched for them")
    parser.add_argument("--output", type=Path, help="file of JSON lines; with --format srt or vtt a folder")
    parser.add_argument("--format", choices=FORMATS, help="jsonl with --output, else tsv")
    parser.add_argument("--word-times", action="store_true", help="start and end of every word (seconds)")
    parser.add_argument("--window-seconds", type=float, default=40.0, help="longest stretch read at once (40)")
    parser.add_argument("--context-seconds", type=float, default=5.0, help="inner ends of it that are left out (5)")
    parser.add_argument("--checkpoint", metavar="TAG", help="of a run; the best one by default")
    parser.add_argument("--device", help="such as cuda:0 or cpu")
    add_arguments(parser)
    given = parser.parse_args(arguments)

    def work() -> int:
        options = TranscriptionOptions(
            inputs=tuple(given.inputs), output=given.output, word_times=given.word_times, decoder=choice_of(given),
            format=given.format or ("tsv" if given.output is None else "jsonl"), tag=given.checkpoint,
            window_seconds=given.window_seconds, context_seconds=given.context_seconds, device=given.device,
        )  # fmt: skip
        return 0 if transcribe(given.model, options) else EXIT_UNREAD

    return reported(work, "with --output the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
