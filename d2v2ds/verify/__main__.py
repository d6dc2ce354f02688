"""Compare our model with golden vectors of the official implementation.

    python -m d2v2ds.verify FOLDER [--modality audio] [--tolerance 1e-4]

Every case NAME of pretraining (NAME.json, NAME.safetensors, NAME.grads.safetensors, optionally NAME.traj.*) is
loaded under its official key names and run through our student, teacher network, losses, gradients, EMA step
and, where recorded, six whole optimizer steps. Each quantity is printed with its worst relative error, that is
the largest absolute difference over the largest absolute expected value. Exit code 0 only if every case passes;
a case with an option that this project lacks is `unsupported` and counts as failed.

Cases of MAE (`_name` mae in NAME.json) have no teacher: masks, every layer, predictions, targets, loss and gradients.

Cases of fine-tuning (a `task` in NAME.json) go through our tasks in the same way; `schedules.json`, `metrics.json`,
`finetune_mask_stats.json`, `v1_mask_stats.*`, `eval_transform.*` and `decode/` are compared too, if the folder has
them.
"""

import argparse
import sys
from pathlib import Path

from d2v2ds.verify.case import case_names
from d2v2ds.verify.check import verify_case
from d2v2ds.verify.tables import tables


def main(arguments: list[str] | None = None) -> int:
    """Print a table per case and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="golden vectors, e.g. tests/golden/micro")
    parser.add_argument("--modality", help="only the cases of this modality, e.g. audio")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="worst relative error that passes (1e-4)")
    options = parser.parse_args(arguments)
    names = case_names(options.folder, options.modality)
    names += tables(options.folder) if options.modality is None else []
    if not names:
        print(f"{options.folder}: no golden cases (NAME.json with NAME.safetensors) found", file=sys.stderr)
        return 2
    passed = [_print_case(options.folder, name, options.tolerance) for name in names]
    print(f"{sum(passed)} of {len(names)} cases pass at tolerance {options.tolerance:g}")
    return 0 if all(passed) else 1


def _print_case(folder: Path, name: str, tolerance: float) -> bool:
    """Print all quantities of a case; return True if it passes."""
    report, problem = verify_case(folder, name, tolerance)
    for quantity, error in report.errors.items():
        mark = "" if error <= tolerance else "   <-- FAIL"
        print(f"  {quantity:32s} {error:9.2e}{mark}")
    passed = report.passed and not problem
    print(f"{'pass' if passed else 'FAIL'} {name}{': ' + problem if problem else ''}")
    return passed


if __name__ == "__main__":
    sys.exit(main())
