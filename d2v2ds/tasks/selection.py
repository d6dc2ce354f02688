"""Scores by which the best checkpoint is chosen: `wer` of the first validation set, `NAME/wer` of `valid.more.NAME`."""

from collections.abc import Mapping, Sequence

LOSS = "loss"


def set_of(name: str) -> str:
    """Return the validation set of a score; empty for the first one."""
    return name.rpartition("/")[0]


def score_of(name: str) -> str:
    """Return a score without its validation set."""
    return name.rpartition("/")[2]


def select_faults(select: Sequence[str] | None, known: Sequence[str], why: str) -> list[str]:
    """Return a message if scores cannot be averaged.

    Args:
        select: names of scores; None for the default.
        known: scores that may be averaged, the loss not among them.
        why: what decides which ones are known.
    """
    if select is None:
        return []
    scores = {score_of(name) for name in select}
    if select and len(set(select)) == len(select) and (scores <= set(known) or scores == {LOSS}):
        return []
    return [
        f"select: expected some of {', '.join(known)}, each once, or {LOSS} alone ({why}), of valid.more.NAME as "
        f"NAME/{known[0]}; found {', '.join(select) or 'none'}"
    ]


def selected_mean(select: Sequence[str], group: str, values: Mapping[str, float]) -> float | None:
    """Return the mean of selected scores of a record; None if it lacks one.

    Args:
        select: names of scores.
        group: of the task's metrics, such as `score` in `valid/score/accuracy`.
        values: metrics of a record.
    """
    found = []
    for name in select:
        where, _, score = name.rpartition("/")
        metric = f"{LOSS}/total" if score == LOSS else f"{group}/{score}"
        found.append(values.get("/".join(part for part in ("valid", where, metric) if part)))
    scores = [score for score in found if score is not None]
    return sum(scores) / len(scores) if scores and len(scores) == len(found) else None
