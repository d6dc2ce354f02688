"""Options of `d2v2ds.probe` on the command line."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import get_args

from d2v2ds.config.schema import ProbeKind
from d2v2ds.run.probe import Options
from d2v2ds.run.probe_task import Question


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options but the run."""
    add = parser.add_argument
    add("--shards", type=Path, required=True, help="labelled rows, packed without joining or blocks")
    add("--test-shards", type=Path, help="fit on --shards and test on these")
    add("--kind", choices=get_args(ProbeKind), default="one",
        help="what is predicted: one class, several classes (mean average precision), a number (R2), or a transcript "
        "(letter error rate of one linear layer trained by CTC)")  # fmt: skip
    add("--label", help="annotation to predict; default: label, for ctc text")
    add("--divider", default=",", help="character between the classes of a row (--kind several)")
    add("--leave-out", default="speaker", help="annotation whose values are left out in turn")
    add("--block", type=int, help="block of the verdict; the middle one of speech, else the last one")
    add("--all-blocks", action="store_true", help="score every block")
    add("--layers", action="store_true", help="score a learned sum of all layers, too")
    add("--attention", action="store_true", help="score frames of the block pooled by learned attention, too")
    add("--baseline", action="store_true", help="score what needs no model, too (images and text)")
    add("--c", type=float, help="inverse strength of the L2 of logistic regression")
    add("--neighbours", type=int, help="of the kNN probe")
    add("--checkpoint", dest="tag", help="tag of a checkpoint; the newest if not given")
    add("--threads", type=int, default=1, help="threads of the fits")
    add("--memory-gib", type=float, default=2.0, help="most memory for frames (--attention, --kind ctc)")
    add("--append", action="store_true", help="append to RUN/probes.jsonl and TensorBoard; probe.json stays")
    add("--until-input-ends", action="store_true", help="end when standard input ends; for probes that a run starts")


def question_of(given: argparse.Namespace) -> Question:
    """Return what is asked."""
    folders = (given.shards,) if given.test_shards is None else (given.shards, given.test_shards)
    return Question(
        folders=folders,
        kind=given.kind,
        label=given.label,
        leave_out=given.leave_out,
        divider=given.divider,
    )


def options_of(given: argparse.Namespace) -> Options:
    """Return the other options."""
    return Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
