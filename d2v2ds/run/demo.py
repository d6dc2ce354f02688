"""The demonstration: pack, pretrain a tiny configuration under the deepspeed launcher, draw the curves, probe."""

import json
import shutil
import sys
from pathlib import Path

from d2v2ds.config.load import load_config
from d2v2ds.distributed.comm import free_port
from d2v2ds.modalities.demo import FineTuning, python, run
from d2v2ds.modalities.known import known_modalities
from d2v2ds.train.figures import save_curves
from d2v2ds.train.metrics import read_metrics

JOINT_STEPS = 200
"""Steps of the joint demonstration: each sees all three modalities, so fewer take as long."""


def demo(
    runs: Path, modality: str, data: Path | None, ranks: int, overrides: list[str], fine_tuning_steps: int
) -> None:
    """Run all steps. A finished packing of the same data is kept, the runs begin anew.

    Args:
        runs: folder for everything that is written.
        modality: name of a shipped one, or `joint`.
        data: the user's own; None for a sample.
        ranks: processes of each run.
        overrides: settings of pretraining.
        fine_tuning_steps: steps of each of two fine-tunings; 0 for none.
    """
    is_joint = modality == "joint"
    names = list(load_config("multimodal_tiny").data.modalities) if is_joint else [modality]
    prepared = {name: known_modalities()[name].prepare_demo(runs, data) for name in names}
    config, folder = "multimodal_tiny" if is_joint else f"{modality}_tiny", runs / "run"
    arguments = [f"data.{name}.shards={found.train}" for name, found in prepared.items()]
    arguments += [override for found in prepared.values() for override in found.overrides]
    if is_joint:
        arguments += [
            f"run.total_steps={JOINT_STEPS}",
            f"objective.ema.anneal_steps={JOINT_STEPS}",
            "lr.warmup_steps=20",
        ]
    launch("d2v2ds.pretrain", config, folder, ranks, [*arguments, *overrides])
    draw(folder, config, names)
    for name, found in prepared.items():
        if found.probe is None:
            print(f'\nno probe of {name}: no labels to ask for (README, "Ten minutes on a CPU")')
        else:
            python("d2v2ds.probe", str(folder), "--label", "label", *found.probe)
    for name, found in prepared.items():
        if found.fine_tuning is not None and not is_joint and fine_tuning_steps:
            fine_tune(name, folder, runs, found.fine_tuning, ranks, fine_tuning_steps)
    tensorboard = Path(sys.executable).with_name("tensorboard")
    print(f"\nrun          {folder}\ncurves       {folder / 'curves.png'}")
    print(f"checkpoint   {folder / 'checkpoints' / (folder / 'checkpoints' / 'latest').read_text().strip()}")
    print(f"TensorBoard  {tensorboard} --logdir {folder / 'tensorboard'}")
    print(f"export       {sys.executable} -m d2v2ds.export {folder} --to model")


def launch(module: str, config: str, folder: Path, ranks: int, overrides: list[str]) -> None:
    """Begin a run anew under the deepspeed launcher."""
    shutil.rmtree(folder, ignore_errors=True)
    run(
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--module", module, "--config", config, *overrides, f"run.dir={folder}",
    )  # fmt: skip


def fine_tune(modality: str, pretrained: Path, runs: Path, task: FineTuning, ranks: int, steps: int) -> None:
    """Train a head and the network, once from the pretrained weights and once from random ones, and score both."""
    model, scores = runs / "model", {}
    shutil.rmtree(model, ignore_errors=True)
    python("d2v2ds.export", str(pretrained), "--to", str(model))
    start = {"pretrained": [f"init.weights={model}"], "random": []}
    for name, weights in start.items():
        folder = runs / f"finetune-{name}"
        lengths = [
            f"run.total_steps={steps}", f"run.save_every_steps={steps}", f"valid.every_steps={steps}",
            f"lr.warmup_steps={steps // 10}",
        ]  # fmt: skip
        shards = [f"data.shards={task.train}", f"valid.{modality}={task.valid}"]
        launch("d2v2ds.finetune", task.config, folder, ranks, [*shards, *weights, *lengths, *task.overrides])
        python("d2v2ds.evaluate", str(folder), "--shards", str(task.valid))
        found = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
        group, measure = task.score
        scores[name] = found[group][measure]
    said = [
        f"{one['value']:.1f} (95 %: {one['interval'][0]:.1f} to {one['interval'][1]:.1f}) {name}"
        for name, one in scores.items()
    ]
    print(f"\n{task.says}: {', '.join(said)}, after {steps} steps each")


def draw(folder: Path, config: str, modalities: list[str]) -> None:
    """The curves of a finished run, into `curves.png`."""
    records = list(read_metrics(folder / "metrics.jsonl"))
    last = records[-1]
    prefixes = [f"{name}/" for name in modalities] if len(modalities) > 1 else [""]
    wanted = ("loss/regression", "target/effective_rank") if len(modalities) > 1 else (
        "loss/regression", "target/effective_rank", "pred/std"
    )  # fmt: skip
    amounts = [modality.unit.total_metric for modality in known_modalities().values()]
    seen = ", ".join(f"{last[name]:,.4g} {name.split('/')[1]}" for name in amounts if name in last)
    save_curves(
        records,
        [prefix + name for name in wanted for prefix in prefixes] + ["ema/decay"],
        folder / "curves.png",
        f"{config}, {int(last['step'])} steps, {seen}",
    )
