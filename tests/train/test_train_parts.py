"""Schedules, optimizer, health statistics, guard and metrics, each by itself."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2v2ds.errors import CollapseError, DamagedDataError, NonFiniteError
from d2v2ds.objectives.data2vec2_metrics import RUN_UNITS, UNITS, health_limits
from d2v2ds.objectives.ema import EmaConfig, ema_decay
from d2v2ds.train.figures import alibi_figure, mask_figure, save_curves
from d2v2ds.train.guard import Guard, HealthConfig
from d2v2ds.train.health import Sample, effective_rank, exact_position_share, position_share
from d2v2ds.train.metrics import MetricNames, Metrics, _drop_lines_after, gradient_metric, read_metrics
from d2v2ds.train.optim import EarlyEpsilonAdam, OptimConfig
from d2v2ds.train.schedule import LearningRateConfig, learning_rate

OFFICIAL = Path(__file__).parents[1] / "golden" / "official"


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    "step, rate",
    [(0, 0.0), (1, 9.375e-8), (4000, 3.75e-4), (8000, 7.5e-4), (8001, 7.499999999879571e-4), (200_000, 3.870193416e-4)],
)
def test_learning_rate_has_the_official_values_of_base_audio(step: int, rate: float) -> None:
    config = LearningRateConfig(peak=7.5e-4, warmup_steps=8000)
    assert learning_rate(step, config, 400_000) == pytest.approx(rate, rel=1e-9)


def test_schedules_match_every_recorded_point() -> None:
    recorded = json.loads((OFFICIAL / "schedules.json").read_text())
    checked = 0
    for name, entry in recorded.items():
        for step, value in entry["points"] if isinstance(entry, dict) else []:
            if name.startswith("cosine/"):
                config = LearningRateConfig(peak=entry["lr"], warmup_steps=entry["warmup"], minimum=entry["min_lr"])
                found = learning_rate(step, config, entry["max_update"])
            elif name.startswith("ema/"):
                end = entry["anneal_end_step"]
                ema = EmaConfig(start_decay=entry["start"], end_decay=entry["end"], anneal_steps=end)
                found = ema_decay(step, ema)
            else:
                continue
            assert found == pytest.approx(value, rel=1e-6, abs=1e-15), (name, step)
            checked += 1
    assert checked > 100


def test_large_audio_freezes_its_teacher_at_the_end_of_the_anneal() -> None:
    ema = EmaConfig(start_decay=0.9997, end_decay=1.0, anneal_steps=300_000)
    assert ema_decay(299_999, ema) < 1.0
    assert ema_decay(300_000, ema) == ema_decay(600_000, ema) == 1.0


# ------------------------------------------------------------------ optimizer


def slow_adam(p: torch.Tensor, grads: list[torch.Tensor], config: OptimConfig, lr: float) -> torch.Tensor:
    """The reference's formula, one line each."""
    p, m, v = p.double().clone(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    for t, grad in enumerate(grads, 1):
        g = grad.double()
        m = config.betas[0] * m + (1 - config.betas[0]) * g
        v = config.betas[1] * v + (1 - config.betas[1]) * g * g
        p = p - lr * config.weight_decay * p
        step = lr * math.sqrt(1 - config.betas[1] ** t) / (1 - config.betas[0] ** t)
        p = p - step * m / (v.sqrt() + config.eps)
    return p


def test_adam_adds_epsilon_before_bias_correction() -> None:
    torch.manual_seed(0)
    config = OptimConfig(betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1)
    start = torch.randn(50)
    grads = [torch.randn(50) * 10.0**-t for t in range(1, 6)]
    p = torch.nn.Parameter(start.clone())
    optimizer = EarlyEpsilonAdam([p], lr=0.01, config=config)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), slow_adam(start, grads, config, 0.01), rtol=1e-5, atol=1e-7)
    plain = torch.nn.Parameter(start.clone())
    torch_adam = torch.optim.AdamW([plain], lr=0.01, betas=config.betas, eps=config.eps, weight_decay=0.1)
    for grad in grads:
        plain.grad = grad.clone()
        torch_adam.step()
    assert (plain - p).abs().max() > 1e-4, "torch's own place for epsilon must differ here"


def test_adam_with_late_epsilon_is_that_of_torch() -> None:
    torch.manual_seed(0)
    config = OptimConfig(betas=(0.9, 0.95), eps=1e-3, early_eps=False, weight_decay=0.1)
    start, grads = torch.randn(50), [torch.randn(50) * 10.0**-t for t in range(1, 6)]
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = EarlyEpsilonAdam([ours], lr=0.01, config=config)
    of_torch = torch.optim.AdamW([plain], lr=0.01, betas=config.betas, eps=config.eps, weight_decay=0.1)
    for grad in grads:
        ours.grad, plain.grad = grad.clone(), grad.clone()
        optimizer.step()
        of_torch.step()
    torch.testing.assert_close(ours.detach(), plain.detach(), rtol=1e-6, atol=1e-7)


def test_adam_matches_the_official_updates() -> None:
    tensors = load_file(OFFICIAL / "adam_steps.safetensors")
    cases = {key.split("/")[0] for key in tensors}
    for case in cases:
        beta1, beta2, eps, decay, lr = (float(x) for x in tensors[f"{case}/hyper_b1_b2_eps_wd_lr"])
        p = torch.nn.Parameter(tensors[f"{case}/p0"].clone())
        optimizer = EarlyEpsilonAdam([p], lr=lr, config=OptimConfig(betas=(beta1, beta2), eps=eps, weight_decay=decay))
        steps = sorted(int(key.rsplit("grad", 1)[1]) for key in tensors if key.startswith(f"{case}/grad"))
        assert steps
        for t in steps:
            p.grad = tensors[f"{case}/grad{t}"].clone()
            optimizer.step()
            after = tensors.get(f"{case}/p{t}", tensors.get(f"{case}/p{t + 1}"))
            torch.testing.assert_close(p.detach(), after, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------ health


def test_effective_rank_of_known_spectra() -> None:
    torch.manual_seed(0)
    isotropic = torch.randn(20_000, 16)
    assert effective_rank(isotropic) == pytest.approx(16, rel=0.01)
    line = torch.randn(1000, 1) @ torch.randn(1, 16)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-6)
    assert effective_rank(torch.ones(10, 4)) == 1.0
    wide = torch.randn(5, 64)
    assert effective_rank(wide) < 4.01, "five vectors span four directions around their mean"


def test_position_share_of_a_position_code_and_of_noise() -> None:
    torch.manual_seed(0)
    places = torch.arange(4000) / 4000
    code = torch.stack((places, places**2, 1 - places), 1)
    assert position_share(code, places) == pytest.approx(1.0, abs=1e-6)
    assert position_share(torch.randn(4000, 8), places) < 0.01
    assert position_share(torch.zeros(10, 3), places[:10]) == 0.0


def test_exact_position_share_sees_what_no_polynomial_shows() -> None:
    torch.manual_seed(0)
    positions = torch.arange(64).repeat(60)
    codes = torch.randn(64, 8)[positions]
    assert exact_position_share(codes, positions) == pytest.approx(1.0, abs=1e-3)
    assert position_share(codes, positions / 64) < 0.3
    noise = torch.randn(len(positions), 8)
    assert exact_position_share(noise, positions) < 0.01, "chance is taken off"
    assert exact_position_share(codes + noise, positions) == pytest.approx(0.5, abs=0.05)
    assert exact_position_share(noise[:64], positions[:64]) == 0.0, "one vector each says nothing"


def test_samples_reach_every_position() -> None:
    sample = Sample()
    for _ in range(8):
        sample.add(torch.randn(64 * 196, 4), torch.arange(196).repeat(64), 196)
    assert len(torch.cat(sample._positions).unique()) == 196


def test_sample_joins_micro_batches() -> None:
    sample = Sample()
    torch.manual_seed(0)
    for _ in range(4):
        sample.add(torch.randn(300, 8).bfloat16(), torch.arange(300), 300)
    found = sample.richness()
    assert found.std == pytest.approx(1.0, rel=0.1)
    assert found.effective_rank > 7.5


# ------------------------------------------------------------------ guard


def test_guard_counts_skipped_steps_goes_back_and_ends_a_hopeless_run() -> None:
    guard = Guard(HealthConfig(max_nonfinite_steps=3, max_rollbacks=1), [])
    for applied in (False, False, True, False, False):
        assert not guard.after_step(1, applied)
    assert guard.nonfinite_total == 4
    again = Guard(guard.config, [])
    again.load_state_dict(guard.state_dict())
    assert again.after_step(2, False), "three in a row"
    again.after_rollback(2, rollbacks=1)
    assert (again.nonfinite_in_a_row, again.nonfinite_total) == (0, 5)
    assert [again.after_step(step, False) for step in (2, 3, 4)] == [False, False, True]
    with pytest.raises(NonFiniteError, match="3 steps in a row .* after 1 returns to one checkpoint, which is intact"):
        again.after_rollback(4, rollbacks=2)


def test_guard_allows_some_damaged_rows() -> None:
    guard = Guard(HealthConfig(max_damaged_rows=3), [])
    guard.after_reading(2)
    guard.after_reading(1)
    with pytest.raises(DamagedDataError, match="4 rows could not be read .* allows 3"):
        guard.after_reading(1)


def collapse_guard(*, stop_on_collapse: bool = False) -> Guard:
    """With the limits of data2vec 2.0."""
    config = HealthConfig(stop_on_collapse=stop_on_collapse)
    return Guard(config, health_limits(config))


def test_collapse_of_one_modality_is_named_with_it() -> None:
    values = {f"{name}/target/{what}": 0.5 for name in ("audio", "text") for what in ("std", "effective_rank")}
    values["audio/target/effective_rank"] = 50.0
    (alarm,) = collapse_guard().check_health(500, values)
    assert alarm.startswith("text/target/effective_rank is 0.5, floor 8")


def test_collapse_is_named_with_value_floor_and_cause() -> None:
    values = {"target/effective_rank": 3.0, "target/position_share": 0.6, "target/std": 0.8, "pred/std": 0.001}
    guard = collapse_guard()
    assert guard.check_health(10, values) == [], "not before the warm-up has ended"
    alarms = guard.check_health(500, values)
    assert [alarm.split(" is ")[0] for alarm in alarms] == [
        "target/effective_rank",
        "pred/std",
        "target/position_share",
    ]
    assert "3, floor 8" in alarms[0]
    with pytest.raises(CollapseError, match="effective_rank"):
        collapse_guard(stop_on_collapse=True).check_health(500, values)


# ------------------------------------------------------------------ metrics


NAMES = MetricNames(RUN_UNITS, UNITS)
"""Of a run of data2vec 2.0."""


def test_metrics_reach_both_files_and_resume_drops_later_lines(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, NAMES, resume_step=0)
    for step in (10, 20, 30):
        metrics.write(step, {"loss/regression": 1.0 / step, "ema/decay": 0.9})
    metrics.figure("masks", mask_figure(torch.eye(3, dtype=torch.bool)), 10)
    metrics.figure("alibi", alibi_figure(torch.ones(1, 1), slopes=[0.5, 0.25, 0.125, 0.0625]), 10)
    metrics.close()
    resumed = Metrics(tmp_path, NAMES, resume_step=20)
    resumed.write(30, {"loss/regression": 5.0})
    resumed.close()
    records = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [(r["step"], r["loss/regression"]) for r in records] == [(10, 0.1), (20, 0.05), (30, 5.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert {"loss/regression", "ema/decay"} <= set(events.Tags()["scalars"])
    assert events.Scalars("loss/regression")[-1].value == 5.0
    assert {"masks", "alibi"} <= set(events.Tags()["images"])
    save_curves(records, ["loss/regression", "ema/decay"], tmp_path / "curves.png", "test")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_metric_without_a_unit_is_refused(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, NAMES, resume_step=0)
    with pytest.raises(KeyError, match="loss/regresion"):
        metrics.write(1, {"loss/regresion": 1.0})
    with pytest.raises(KeyError, match="audio/ema/decay"):
        metrics.write(1, {"audio/ema/decay": 1.0})
    metrics.close()
    assert all((NAMES.run | NAMES.modality).values())


def test_part_of_a_gradient_is_named_by_the_place_of_the_parameter() -> None:
    metric = partial(gradient_metric, modalities=["audio", "image", "text"], units=NAMES.modality)
    assert metric("trunk.blocks.3.norm1.weight") == (None, "optim/grad_norm/blocks")
    assert metric("decoders.text.proj.0.bias") == ("text", "optim/grad_norm/decoder")
    assert metric("trunk.encoders.audio.alibi.scale") == ("audio", "optim/grad_norm/alibi")
    assert metric("trunk.encoders.image.extra") == ("image", "optim/grad_norm/other")
    assert metric("trunk.encoders.image.new_idea.weight") == ("image", "optim/grad_norm/other")
    assert metric("new_idea") == (None, "optim/grad_norm/other")
    assert metric("heads.image.weight") == ("image", "optim/grad_norm/other")
    assert metric("head.weight") == (None, "optim/grad_norm/other"), "one for all modalities"
    with_head = partial(metric, units=[*NAMES.modality, "optim/grad_norm/head"])
    assert with_head("heads.image.weight") == ("image", "optim/grad_norm/head")
    assert with_head("head.weight") == (None, "optim/grad_norm/head")
    assert all(NAMES.is_known(f"{prefix}optim/grad_norm/other") for prefix in ("", "audio/"))


@pytest.mark.parametrize("before", ["", "valid/", "valid/mismatched/", "audio/", "audio/valid/", "audio/valid/other/"])
def test_metrics_of_every_modality_and_validation_set_have_units(before: str) -> None:
    assert NAMES.is_known(f"{before}loss/regression") and not NAMES.is_known(f"{before}loss/unheard")
    assert NAMES.is_known("valid/mismatched/loss/total") and not NAMES.is_known("valid/a/b/loss/regression")


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss/regression": 2.0}\n{"step": 2, "loss/reg')
    assert [record["step"] for record in read_metrics(path)] == [1]
    Metrics(tmp_path, NAMES, resume_step=1).close()
    assert path.read_text() == '{"step": 1, "loss/regression": 2.0}\n'


def test_metrics_survive_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, however many records are lost; then the next record is a whole line again."""
    metrics = Metrics(tmp_path, NAMES, resume_step=0)
    metrics.write(1, {"ema/decay": 0.9})
    kept = metrics.path.rename(tmp_path / "kept")
    metrics.path.symlink_to("/dev/full")
    for step in (2, 3):
        metrics.write(step, {"ema/decay": 0.9})
    metrics.path.unlink()
    kept.rename(metrics.path)
    with metrics.path.open("a") as file:
        file.write('{"step": 3, "ema')  # what a full disk leaves
    metrics.write(4, {"ema/decay": 0.9})
    metrics.close()
    assert sum("metrics.jsonl cannot be written" in message for message in caplog.messages) == 1
    assert sum("metrics.jsonl can be written again" in message for message in caplog.messages) == 1
    assert [record["step"] for record in read_metrics(metrics.path)] == [1, 4]


def test_records_are_dropped_from_the_end_as_a_whole_reading_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of any size; torn, empty and damaged lines at the end go too, records of before a rollback stay."""
    lines = [b'{"step": 1, "x": "' + b"y" * 50 + b'"}', b'{"step": 5}', b'{"step": 3}', b"\xff", b'{"step": 4}', b"[1]"]
    path = tmp_path / "metrics.jsonl"
    for block in (1, 3, 7, 64, 1 << 20):
        monkeypatch.setattr("d2v2ds.train.metrics._TAIL_BYTES", block)
        for step, kept in ((0, 0), (2, 1), (3, 3), (4, 5), (9, 5)):
            for end in (b"\n", b"", b"\n\n"):
                path.write_bytes(b"\n".join(lines) + end)
                _drop_lines_after(path, step)
                assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:kept])
