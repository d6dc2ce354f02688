"""data2vec 1.0: published sizes, contradictions, what student and teacher read, and the course of the teacher."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.config.load import load_config
from d2v2ds.objectives.data2vec1 import Data2Vec1, Data2Vec1Config, WholeModalityConfig, WholeOutput
from d2v2ds.objectives.data2vec1_modules import MaskVector
from d2v2ds.objectives.ema import ema_decay
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.protocol import Totals
from d2v2ds.objectives.targets import TargetConfig
from d2v2ds.shapes import PAD_ID
from d2v2ds.whole_masks import SpanWholeMask
from tests.objectives.tiny_whole import EMA, MASK_ID, SPEECH, TEXT, whole_batch, whole_objective, whole_trunk

LARGE_TEXT = ["model.block.width=1024", "model.block.num_heads=16", "model.shared_depth=24"]


@pytest.mark.parametrize(
    ("name", "overrides", "student", "head", "teacher"),
    [
        ("audio_base", [], 93_754_880, 590_592, 88_561_920),
        ("audio_audioset", [], 93_754_880, 590_592, 88_561_920),
        ("audio_large", [], 314_326_016, 1_049_600, 308_542_464),
        ("text_base", [], 126_415_872, 2_361_600, 124_054_272),
        ("text_base", LARGE_TEXT, 358_506_496, 4_197_376, 354_309_120),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, overrides: list[str], student: int, head: int, teacher: int
) -> None:
    config = load_config(f"data2vec1/{name}", overrides)
    objective = config.objective.build(config.model, seed=1)
    assert isinstance(objective, Data2Vec1)
    with torch.device("meta"):
        network = objective.build_network(activation_checkpointing=False)
        averaged = objective.build_teacher_network()
    assert sum(p.numel() for p in network.parameters()) == student
    assert sum(p.numel() for p in network.heads.parameters()) == head
    assert sum(p.numel() for p in averaged.parameters()) == teacher
    assert set(dict(averaged.named_parameters())) < set(dict(network.named_parameters()))


@pytest.mark.parametrize(
    ("modality", "own", "message"),
    [
        ("audio", {}, None),
        ("text", {}, None),
        ("text", {"mask_token": 4}, None),
        ("text", {"mask_token": None, "share_local_encoder": True}, None),
        ("audio", {"target": TargetConfig(num_layers=3, layer_norms=())}, "num_layers"),
        ("audio", {"loss": LossConfig(cls_weight=0.1)}, "data2vec 1.0 has no CLS loss"),
        ("audio", {"teacher_input": "masked_tokens"}, "teacher_input 'masked_tokens' needs mask_token"),
        ("audio", {"mask_token": 4}, "inputs are no token ids"),
        ("text", {"share_local_encoder": True}, "mask_token needs share_local_encoder=false"),
        ("text", {"mask_token": 40}, "mask_token is 40, expected an id below vocab_size 40"),
        ("text", {"mask_token": None, "teacher_input": "masked_tokens"}, "needs mask_token"),
        ("audio", {"copied": ("positions", "pos_conv")}, "'pos_conv' begins the name of no parameter of the encoder"),
        ("text", {"copied": ("local", "prenet")}, "'prenet' begins the name of no parameter"),
        ("audio", {"copied": ("positions.layers.0",)}, None),
    ],
)
def test_contradictions_are_named(modality: str, own: dict[str, Any], message: str | None) -> None:
    objective = whole_objective(modality, **own)
    problems = objective.config.check(objective.trunk)
    if message is None:
        assert problems == []
    else:
        assert any(f"modalities.{modality}: " in one and message in one for one in problems), problems


class _Teacher:
    """Targets that are the same everywhere; records what it is asked for."""

    def __init__(self, like: tuple[int, int, int]) -> None:
        self.batches: list[Batch] = []
        self.local: list[Tensor] = []
        self.like = like

    def __call__(self, batch: Batch, local: Tensor) -> Tensor:
        self.batches.append(batch)
        self.local.append(local)
        return torch.ones(self.like)


def _forward(
    objective: Data2Vec1, batch: Batch, kept: list[bool] | None = None
) -> tuple[nn.Module, _Teacher, WholeOutput]:
    torch.manual_seed(0)
    network = objective.build_network(activation_checkpointing=False)
    objective.initialise(network, seed=0)
    assert batch.span_masks is not None
    assert batch.span_masks.time is not None
    teacher = _Teacher((*batch.span_masks.time.shape, objective.trunk.block.width))
    return network, teacher, network(batch, teacher, kept)


def _inputs(network: nn.Module, name: str, batch: Batch) -> Tensor:
    """First argument of a module in one forward."""
    found: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda _, given, __: found.append(given[0].detach()))
    masked = batch.span_masks.time  # type: ignore[union-attr]
    network(batch, _Teacher((*masked.shape, network.trunk.config.block.width)))  # type: ignore[union-attr, arg-type]
    handle.remove()
    return found[0]


def test_student_of_text_reads_mask_tokens_and_its_teacher_all_tokens() -> None:
    batch = whole_batch("text")
    network, teacher, _ = _forward(whole_objective("text"), batch)
    masked = batch.span_masks.time  # type: ignore[union-attr]
    read = _inputs(network, "trunk.encoders.text.local", batch)
    assert (read[masked] == MASK_ID).all()
    assert torch.equal(read[~masked], batch.source[~masked])
    assert torch.equal(teacher.batches[0].source, batch.source)
    assert not dict(network.named_parameters()).keys() & {"mask_vectors.text.vector"}


def test_teacher_of_text_may_read_the_masked_tokens_alone() -> None:
    batch = whole_batch("text")
    _, teacher, _ = _forward(whole_objective("text", teacher_input="masked_tokens"), batch)
    masked = batch.span_masks.time  # type: ignore[union-attr]
    read = teacher.batches[0]
    assert torch.equal(read.source[masked], batch.source[masked])
    assert (read.source[~masked] == PAD_ID).all()
    assert torch.equal(read.padding, ~masked)


def test_masked_features_of_speech_are_one_vector_and_the_teacher_reads_the_unmasked_ones() -> None:
    batch = whole_batch("audio")
    network, teacher, out = _forward(whole_objective("audio"), batch)
    masked = batch.span_masks.time  # type: ignore[union-attr]
    read = _inputs(network, "trunk.encoders.audio.positions", batch)
    vector = network.get_submodule("mask_vectors.audio").vector
    torch.testing.assert_close(read[masked], vector.detach().expand(int(masked.sum()), -1))
    torch.testing.assert_close(read[~masked], out["local"][~masked])
    assert torch.equal(teacher.local[0], out["local"])
    assert not torch.equal(out["local"][masked], read[masked])


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_padded_tokens_are_zero_in_front_of_positions_and_do_not_reach_others(modality: str) -> None:
    batch = whole_batch(modality, padded=True)
    network, _, out = _forward(whole_objective(modality), batch)
    first = "positions" if modality == "audio" else "prenet"
    read = _inputs(network, f"trunk.encoders.{modality}.{first}", batch)
    padding = network.trunk.encoder(modality).token_padding(batch.padding, read.shape[1])  # type: ignore[union-attr]
    assert padding[1].any()
    assert (read[padding] == 0).all()
    assert (read[~padding] != 0).any(-1).all()
    other = batch.source.clone()
    other[batch.padding] = 5 if modality == "text" else 5.0
    if modality == "audio":  # of text, padding is known by its id too
        changed = network(replace(batch, source=other), _Teacher((*padding.shape, 16)))
        torch.testing.assert_close(changed["context"][~padding], out["context"][~padding])


def test_teacher_clears_padding_too() -> None:
    objective = whole_objective("audio")
    teacher = objective.build_teacher_network().eval()
    batch = whole_batch("audio", padded=True)
    local = torch.randn(2, 39, 16)
    padding = teacher.trunk.encoder("audio").token_padding(batch.padding, local.shape[1])
    assert padding is not None
    with torch.no_grad():
        plain, loud = (teacher(batch, local.masked_fill(padding[..., None], value)) for value in (0.0, 9.0))
    torch.testing.assert_close(plain, loud)


def test_mask_vector_is_drawn_from_the_unit_interval() -> None:
    torch.manual_seed(0)
    vector = MaskVector(4000).vector
    assert 0 <= vector.min() < 0.01
    assert 0.99 < vector.max() < 1
    assert vector.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("layers", "widths"), [(0, []), (1, [(16, 16)]), (2, [(16, 32), (32, 16)]), (3, None)])
def test_head_has_hidden_layers_of_twice_the_width(layers: int, widths: list[tuple[int, int]] | None) -> None:
    network = whole_objective("text", head_layers=layers).build_network(activation_checkpointing=False)
    linears = [one for one in network.heads["text"].modules() if isinstance(one, nn.Linear)]
    expected = [(16, 32), (32, 32), (32, 16)] if widths is None else widths
    assert [(one.in_features, one.out_features) for one in linears] == expected
    assert sum(isinstance(one, nn.GELU) for one in network.heads["text"].modules()) == max(layers - 1, 0)


def test_without_a_head_the_prediction_is_the_context() -> None:
    batch = whole_batch("text")
    _, _, out = _forward(whole_objective("text", head_layers=0), batch)
    assert torch.equal(out["pred"], out["context"][batch.span_masks.time])  # type: ignore[union-attr]


def test_first_weights_of_heads_are_those_of_the_official_code() -> None:
    speech = whole_objective("audio").build_network(activation_checkpointing=False)
    whole_objective("audio").initialise(speech, seed=0)
    assert speech.heads["audio"][0].bias.abs().max() > 0
    assert speech.heads["audio"][0].weight.abs().max() > 0.2 * 16**-0.5
    text = whole_objective("text").build_network(activation_checkpointing=False)
    whole_objective("text").initialise(text, seed=0)
    assert all((text.heads["text"][i].bias == 0).all() for i in (0, 2))
    assert text.heads["text"][0].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_loss_is_a_sum_over_channels_and_masked_tokens() -> None:
    batch = whole_batch("audio")
    _, _, out = _forward(whole_objective("audio"), batch)
    assert len(out["pred"]) == batch.num_masked
    expected = (out["pred"] - 1).square().sum() / 16**0.5
    torch.testing.assert_close(out["losses"]["regression"].detach(), expected)


def test_a_batch_without_masked_tokens_has_loss_zero_and_gradients() -> None:
    """A short text may get no mask; all ranks must still meet in the backward pass."""
    batch = whole_batch("text")
    none = torch.zeros_like(batch.span_masks.time)  # type: ignore[union-attr, arg-type]
    empty = replace(batch, span_masks=replace(batch.span_masks, time=none), num_masked=0)  # type: ignore[type-var]
    network, _, out = _forward(whole_objective("text"), empty)
    out["losses"]["regression"].backward()
    assert out["losses"]["regression"] == 0
    assert all(p.grad is not None for p in network.heads.parameters())  # type: ignore[union-attr]


def test_layer_drop_skips_the_block_of_the_student() -> None:
    network, _, out = _forward(whole_objective("audio"), whole_batch("audio"), [True, False])
    out["losses"]["regression"].backward()
    blocks = network.trunk.blocks  # type: ignore[union-attr]
    assert all(p.grad is None for p in blocks[1].parameters())  # type: ignore[index, union-attr]
    assert all(p.grad is not None for p in blocks[0].parameters())  # type: ignore[index, union-attr]


def test_layer_drop_is_drawn_for_a_step_and_not_in_validation() -> None:
    objective = whole_objective("audio", layer_drop=0.5)
    objective.follow(_Followed(nn.Linear(1, 1)))
    batch, asked = whole_batch("audio"), []

    def network(batch: Batch, teacher: Any, kept: list[bool] | None) -> WholeOutput:
        asked.append(kept)
        return _forward(objective, batch)[2]

    for step in (None, *range(8)):
        objective.losses(network, batch, step)
    assert asked[0] is None
    assert len({tuple(kept) for kept in asked[1:]}) > 1
    objective.losses(network, batch, 0)
    assert asked[-1] == asked[1]


def test_masks_of_another_length_are_refused_by_name() -> None:
    batch = whole_batch("audio")
    longer = replace(batch, source=torch.cat((batch.source, batch.source), 1))
    with pytest.raises(ValueError, match="masks are drawn for"):
        _forward(whole_objective("audio"), longer)
    with pytest.raises(ValueError, match="expected masks of whole inputs, found none"):
        whole_objective("audio").build_network(activation_checkpointing=False)(
            replace(batch, span_masks=None), _Teacher((1, 1, 1))
        )


class _Followed:
    """Average of a module, as `distributed.teacher` keeps it, written out."""

    def __init__(self, student: nn.Module) -> None:
        self.student, self.calls = student, []
        self.average = {name: p.detach().clone() for name, p in student.named_parameters()}

    def __call__(self, *args: Any) -> Tensor:
        return torch.zeros(())

    def update(self, decay: float, *, again: bool = False) -> None:
        self.calls.append((decay, again))
        for name, p in self.student.named_parameters():
            self.average[name].lerp_(p.detach(), 1 - decay)

    def student_distance(self) -> float:
        return 0.25


def _run(per_micro_batch: bool, micro_batches: int) -> Iterator[tuple[nn.Linear, _Followed]]:
    """Steps of a loop with accumulation: losses of every micro-batch, validation, a new student, `after_step`."""
    objective = whole_objective("audio", per_micro_batch=per_micro_batch)
    torch.manual_seed(1)
    student = nn.Linear(3, 3)
    followed, batch = _Followed(student), whole_batch("audio")
    objective.follow(followed)
    out = _forward(objective, batch)[2]
    for step in range(5):
        for _ in range(micro_batches):
            objective.losses(lambda *args: out, batch, step)
        objective.losses(lambda *args: out, batch, None)
        yield student, followed
        nn.init.normal_(student.weight)
        objective.after_step(step + 1)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_teacher_updated_before_every_micro_batch_follows_the_official_course(micro_batches: int) -> None:
    """Official: before each micro-batch, with n finished updates, one average with decay(n); n = 0 copies."""
    average: Tensor | None = None
    for step, (student, followed) in enumerate(_run(True, micro_batches)):
        for _ in range(micro_batches):
            weight = student.weight.detach()
            average = weight.clone() if average is None else average.lerp(weight, 1 - ema_decay(step, EMA))
        torch.testing.assert_close(followed.average["weight"], average)


def test_teacher_is_updated_once_a_step_unless_asked() -> None:
    (*_, (_, followed)) = _run(False, 4)
    assert followed.calls == [(ema_decay(step, EMA), False) for step in range(1, 6)]
    (*_, (_, followed)) = _run(True, 4)
    assert sum(again for _, again in followed.calls) == 4 * 3


def test_a_skipped_step_is_followed_by_an_update_as_in_the_official_code_and_a_resumed_run_by_none() -> None:
    """Official: before each micro-batch, also of a step behind one that was skipped; a checkpoint has the update."""
    objective = whole_objective("audio", per_micro_batch=True)
    followed, batch = _Followed(nn.Linear(1, 1)), whole_batch("audio")
    objective.follow(followed)
    out = _forward(objective, batch)[2]
    found = []
    for step, is_applied in enumerate([True, False, False, True, True], start=7):
        for _ in range(2):
            objective.losses(lambda *args: out, batch, step)
        if is_applied:
            objective.after_step(step + 1)
        found.append([again for _, again in followed.calls])
        followed.calls.clear()
    once, twice = [True], [True, True]
    assert found == [[*once, False], once, twice, [*twice, False], [*once, False]]


def test_copied_parts_are_those_that_settings_name() -> None:
    objective = whole_objective("audio")
    copied = {name for name in objective.build_teacher_network().state_dict() if objective.is_copied(name)}
    assert copied
    assert all(name.startswith("trunk.encoders.audio.positions.") for name in copied)
    text = whole_objective("text")
    names = set(text.build_teacher_network().state_dict())
    assert {name for name in names if text.is_copied(name)} == {n for n in names if ".local." in n}
    assert not any(map(whole_objective("audio", copied=()).is_copied, names))


def test_counts_and_metrics_are_those_of_masked_tokens() -> None:
    objective, batch = whole_objective("audio"), whole_batch("audio")
    objective.follow(_Followed(nn.Linear(1, 1)))
    out = _forward(objective, batch)[2]
    losses = objective.losses(lambda *args: out, batch, 0)
    assert losses.count == objective.count(batch) == batch.num_masked
    tokens = batch.span_masks.time.numel()  # type: ignore[union-attr]
    totals = Totals(sums={"regression": float(losses.sums["regression"].detach())}, count=float(losses.count),
                    statistics=losses.statistics)  # fmt: skip
    found = objective.metrics("audio", totals)
    assert found["mask/fraction"] == pytest.approx(batch.num_masked / tokens)
    assert found["pred/std"] == pytest.approx((out["pred"].var(0) + 1e-6).sqrt().mean().item(), rel=1e-4)
    assert found["target/std"] == pytest.approx(1e-3, rel=1e-3)
    assert set(found) | {"loss/regression"} <= set(objective.units)
    assert objective.run_metrics() == {"ema/student_distance": 0.25}
    assert objective.schedules(5) == {"ema/decay": ema_decay(5, EMA)}
    vectors = {one.name: one for one in objective.health_vectors(batch, losses)}
    assert {name: len(one.vectors) for name, one in vectors.items()} == {
        "local": tokens, "context": tokens, "target": tokens, "pred": batch.num_masked,
    }  # fmt: skip


def test_operations_are_those_counted_by_hand() -> None:
    """One second of speech of the published base model: 49 frames, student and teacher of 12 blocks each."""
    config = load_config("data2vec1/audio_base")
    objective = config.objective.build(config.model, seed=1)
    tokens, width = 49, 768
    block = tokens * (2 * 12 * width**2 + 4 * tokens * width)
    positions = 5 * tokens * 2 * width * width * 19 / 16
    front = 2 * (3199 * 512 * 10 + (1599 + 799 + 399 + 199) * 512**2 * 3 + (99 + 49) * 512**2 * 2 + 49 * 512 * width)
    head = 2 * width**2 * round(objective.mask("audio").expected(tokens))
    expected = 3 * (front + positions + 12 * block + head) + positions + 12 * block
    assert objective.flops("audio", 1, 16000) == pytest.approx(expected, rel=1e-6)
    assert objective.flops("audio", 4, 16000) > 3.9 * expected


def test_description_says_how_many_tokens_are_masked_or_why_none_can_be() -> None:
    assert whole_objective("audio").describe("audio", 100) == "about 42 of them masked, all in the sequence"
    with pytest.raises(ValueError, match="3 tokens cannot hold a span of 3"):
        whole_objective("audio").describe("audio", 3)


def test_a_larger_batch_scales_the_schedule_of_the_teacher() -> None:
    scaled = Data2Vec1Config(ema=EMA, modalities={"audio": SPEECH, "text": TEXT}).scaled(2.0)
    assert scaled == {"ema.start_decay": 0.25, "ema.end_decay": pytest.approx(0.81), "ema.anneal_steps": 5}
    with pytest.raises(RuntimeError, match="call follow"):
        _ = whole_objective("audio").teacher


def test_modalities_beside_those_of_the_trunk_are_left_to_the_run() -> None:
    speech = WholeModalityConfig(
        share_local_encoder=True,
        mask=SpanWholeMask(fraction=0.5, length=3),
        target=TargetConfig(num_layers=99, layer_norms=()),
    )
    assert Data2Vec1Config(ema=EMA, modalities={"other": speech}).check(whole_trunk("audio")) == []
