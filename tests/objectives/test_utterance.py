"""Utterance loss of waveform models: tokens in front of the frames, and what predicts the mean target."""

import pytest
import torch
import torch.nn.functional as F

from d2v2ds.config.load import load_config
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.model.alibi import DistanceBias, dense_bias
from d2v2ds.model.attention import attend
from d2v2ds.model.block import BlockConfig
from d2v2ds.objectives.loss import LossConfig, utterance_prediction
from tests.config.test_published import batch_of, shallow


def test_tokens_without_position_have_rows_and_columns_of_zeros() -> None:
    """The official bias is that of the frames, padded with zeros in front."""
    positions, penalty = torch.tensor([[4, 7, 8], [0, 1, 9]]), torch.tensor([0.5, 0.1])
    padding = torch.tensor([[False, False, True], [False, False, False]])
    frames = dense_bias(positions, penalty, None)
    assert frames is not None
    expected = F.pad(frames, (2, 0, 2, 0)).masked_fill(F.pad(padding, (2, 0))[:, None, None], float("-inf"))
    found = dense_bias(F.pad(positions, (2, 0)), penalty, F.pad(padding, (2, 0)), None, 2)
    assert found is not None and torch.equal(found, expected)


@pytest.mark.parametrize("path", ["auto", "rowwise", "sdpa"])
def test_every_path_but_flex_knows_them(path: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4).unbind(0)
    penalty = torch.tensor([0.5, 0.1], requires_grad=True)
    positions = F.pad(torch.tensor([[4, 7, 8], [0, 1, 9]]), (2, 0))
    bias = DistanceBias(positions=positions, penalty=penalty, padding=None, num_free=2, dense=None)
    dense = bias.to_dense()
    assert dense is not None
    expected = (q @ k.transpose(2, 3) / 2 + dense).softmax(-1) @ v
    found = attend(q, k, v, bias, path=path)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.square().sum(), penalty, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("kind", "wanted"), [("last", slice(2, 3)), ("mean", slice(0, 3)), ("frames", slice(3, None))])
def test_the_prediction_is_a_token_their_mean_or_the_mean_of_the_frames(kind: str, wanted: slice) -> None:
    encoded = torch.randn(4, 8, 6)
    found = utterance_prediction(encoded, 3, LossConfig(utterance=kind))  # type: ignore[arg-type]
    torch.testing.assert_close(found, encoded[:, wanted].mean(1))


def test_what_does_not_fit_is_named() -> None:
    assert LossConfig(cls_weight=1.0, utterance="frames").check(0) == []
    assert "no extra tokens" in LossConfig(cls_weight=1.0, utterance="mean").check(0)[0]
    network = AudioNetwork(prenet_depth=0, num_extra_tokens=10)
    block = BlockConfig(width=32, num_heads=4, attention_dropout=0.0, attention_path="flex")
    assert "num_extra_tokens needs another" in network.check(block, 2)[0]


@pytest.mark.parametrize(("tokens", "kind"), [(10, "mean"), (1, "last"), (0, "frames")])
def test_a_speech_model_learns_from_the_utterance_loss(tokens: int, kind: str) -> None:
    own = "objective.modalities.audio"
    changes = [f"model.modalities.audio.num_extra_tokens={tokens}", f"{own}.loss.utterance={kind}"]
    config = load_config("audio_tiny", [*changes, f"{own}.loss.cls_weight=1", f"{own}.loss.cls_rows=1"])
    objective = shallow(config)
    student, teacher = objective.build_network(activation_checkpointing=False), objective.build_teacher_network().eval()
    objective.initialise(student, seed=1)
    teacher.load_state_dict({key: student.state_dict()[key] for key in teacher.state_dict()})
    out = student(batch_of(config, "audio"), torch.no_grad()(teacher.__call__))
    assert out["cls"].shape == (2, 192) and out["context"].shape[1] + tokens > 0
    out["losses"]["cls"].backward()
    assert student.trunk.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    if tokens:
        assert student.trunk.encoder("audio").extra.tokens.grad.abs().sum() > 0
