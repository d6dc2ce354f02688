"""Judge a run by what its features know: a probe on frozen, mean-pooled features beside the run's own random start.

    python -m d2v2ds.probe RUN --shards DIR --label digit --leave-out speaker [--block 2 | --all-blocks]

A block of the student is scored by logistic regression and by nearest neighbours, leaving out one speaker at a
time; the last line says in one sentence whether the model learned. Scores are also written to RUN/probe.json.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from d2v2ds.config import load_config
from d2v2ds.data.shards import ArrowShards
from d2v2ds.errors import ConfigError, D2V2Error
from d2v2ds.evals.features import annotation, pooled_features
from d2v2ds.evals.probes import Score, leave_one_out
from d2v2ds.export import load_student
from d2v2ds.model.data2vec2 import Data2Vec2
from d2v2ds.model.init import initialise
from d2v2ds.train.perf import use_all_cores

LEARNED_POINTS = 5.0
"""Percentage points over the random start that count as having learned; one standard error of the digit probe
with 2,000 clips is about one point."""


def random_start(run_dir: Path) -> Data2Vec2:
    """The very weights the run began with."""
    config = load_config(str(run_dir / "config.yaml"))
    torch.manual_seed(config.run.seed)
    model = Data2Vec2(config.model)
    initialise(model)
    return model.eval()


@dataclass(frozen=True)
class Task:
    """Clips with both annotations, and what is asked of them."""

    shards: ArrowShards
    rows: list[int]
    labels: list[str]
    groups: list[str]

    @staticmethod
    def read(shards: ArrowShards, label: str, leave_out: str) -> "Task":
        """All rows that have a label and a group."""
        pairs = zip(annotation(shards, label), annotation(shards, leave_out), strict=True)
        found = [(row, a, b) for row, (a, b) in enumerate(pairs) if a is not None and b is not None]
        if len({a for _, a, _ in found}) < 2 or len({b for _, _, b in found}) < 2:
            raise ConfigError(
                f"{shards.folder}: expected clips of two classes and two groups or more, found "
                f"{len(found)} clips that have both {label} and {leave_out}"
            )
        rows, labels, groups = (list(column) for column in zip(*found, strict=True))
        return Task(shards, rows, labels, groups)

    def score(self, model: Data2Vec2, blocks: Sequence[int], name: str) -> dict[int, Score]:
        """Scores of some blocks' outputs; block 0 is the input of the first one."""
        features = pooled_features(model, self.shards, self.rows, progress=name)
        return {block: leave_one_out(features[block], self.labels, self.groups) for block in blocks}


def verdict(trained: Score, start: Score, block: int) -> str:
    """One line."""
    gain = 100 * (trained.logistic - start.logistic)
    numbers = f"{100 * trained.logistic:.1f} % against {100 * start.logistic:.1f} % at random init ({gain:+.1f} points)"
    if gain >= LEARNED_POINTS:
        return f"the model learned: block {block} gives {numbers}"
    return f"no clear sign of learning: block {block} gives {numbers}"


def probe(
    run_dir: Path, shards_dir: Path, *, label: str, leave_out: str, block: int | None, all_blocks: bool, tag: str | None
) -> str:
    """Score, print a table, write RUN/probe.json and return the verdict.

    Raises:
        CheckpointError, ShardError, MissingExtraError: with what to do.
    """
    task = Task.read(ArrowShards(shards_dir), label, leave_out)
    student, step = load_student(run_dir, tag)
    depth = student.depth("audio")
    chosen = depth // 2 if block is None else block
    if not 0 <= chosen <= depth:
        raise ConfigError(f"--block {chosen}: the model has blocks 1 to {depth}; 0 is the input of the first")
    blocks = range(depth + 1) if all_blocks else [chosen]
    trained = task.score(student, blocks, f"student, step {step}")
    start = task.score(random_start(run_dir), blocks, "random init")
    folds = len(trained[chosen].folds)
    print(f"{label} of {len(task.rows)} clips, one {leave_out} left out in turn, mean over {folds}; accuracy in %")
    print(f"{'block':>5} {'logistic':>9} {'random':>7} {'kNN':>6} {'random':>7}")
    for i in blocks:
        columns = (trained[i].logistic, start[i].logistic, trained[i].knn, start[i].knn)
        print("{:5d} {:9.1f} {:7.1f} {:6.1f} {:7.1f}".format(i, *(100 * value for value in columns)))
    result = {
        "step": step,
        "label": label,
        "leave_out": leave_out,
        "block": chosen,
        "student": {i: asdict(score) for i, score in trained.items()},
        "random_init": {i: asdict(score) for i, score in start.items()},
    }
    (run_dir / "probe.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return verdict(trained[chosen], start[chosen], chosen)


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.probe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--shards", type=Path, required=True, help="labelled clips, packed without joining")
    parser.add_argument("--label", default="label", help="annotation to predict")
    parser.add_argument("--leave-out", default="speaker", help="annotation whose values are left out in turn")
    parser.add_argument("--block", type=int, help="block of the verdict; the middle one if not given")
    parser.add_argument("--all-blocks", action="store_true", help="score every block")
    parser.add_argument("--checkpoint", help="tag of a checkpoint; the newest if not given")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s")
    use_all_cores(1)
    try:
        print(
            probe(
                options.run,
                options.shards,
                label=options.label,
                leave_out=options.leave_out,
                block=options.block,
                all_blocks=options.all_blocks,
                tag=options.checkpoint,
            )
        )
    except D2V2Error as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
