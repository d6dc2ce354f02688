"""Official files of every published size: read, compared with the specification, written back unchanged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v2ds.config.load import CONFIG_FOLDER, load_config
from d2v2ds.interop.fairseq.official_config import OfficialNetwork, network_of
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.official_section import official_section
from d2v2ds.interop.fairseq.read import OfficialCheckpoint, Tensors, read_official
from d2v2ds.interop.fairseq.torch_file import read_pickled
from d2v2ds.interop.fairseq.write import write_official
from d2v2ds.model.transformer_decoder import TransformerDecoderConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec2 import Data2Vec2Config
from tests.interop.official_files import PUBLISHED, content_of, layout_of, save

SPECIFIED = {
    # entries of `model` and of `_ema`; parameters of the same
    "audio_base": (192, 157, 93_783_308, 88_561_932),
    "audio_large": (336, 301, 315_184_144, 308_542_480),
    "image_base": (164, 150, 88_383_744, 85_797_888),
    "image_large": (302, 294, 309_268_480, 303_300_608),
    "image_huge14": (398, 390, 637_403_392, 630_763_520),
    "image_huge16": (398, 390, 637_556_992, 630_917_120),
    "text_base": (162, 144, 152_961_792, 85_054_464),
    "text_large": (306, 288, 385_379_584, 302_309_376),
    "text_large_1m": (306, 288, 385_379_584, 302_309_376),
}


def one_modality(trunk: TrunkConfig, objective: Data2Vec2Config, modality: str) -> OfficialNetwork:
    """What the official configuration can say of a network: one modality, without `cls_rows` and the attention path."""
    own = objective.modalities[modality]
    block = replace(trunk.block, attention_path="auto")
    return OfficialNetwork(
        trunk=replace(trunk, block=block, modalities={modality: trunk.modalities[modality]}),
        share_local_encoder=own.share_local_encoder,
        decoder=own.decoder,
        target=own.target,
        loss=replace(own.loss, cls_rows=None),
    )


def student_of(checkpoint: OfficialCheckpoint) -> Tensors:
    """Trunk and decoder."""
    return checkpoint.trunk | checkpoint.decoder


def write_back(path: Path, checkpoint: OfficialCheckpoint) -> dict[str, Any]:
    """Write what was read, and what is then in the file."""
    write_official(
        path,
        student_of(checkpoint),
        checkpoint.teacher,
        checkpoint.section,
        head=checkpoint.head,
        prefix=checkpoint.prefix,
    )
    return read_pickled(path)


def assert_same_tensors(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Key for key and bit for bit."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if isinstance(tensor, Tensor):
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert tensor.is_meta or torch.equal(found[name], tensor), name
        else:
            assert_same_tensors(found[name], tensor)


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_is_what_the_specification_counts_and_survives_import_and_export(name: str, tmp_path: Path) -> None:
    network = PUBLISHED[name]
    content = content_of(network, device="meta")
    checkpoint = read_official(save(tmp_path / "official.pt", content))
    assert checkpoint.teacher is not None
    parts = (student_of(checkpoint), checkpoint.teacher)
    counts = [len(tensors) for tensors in parts] + [sum(t.numel() for t in tensors.values()) for tensors in parts]
    assert tuple(counts) == SPECIFIED[name]
    assert checkpoint.modality == network.modality
    config = load_config(name)
    assert checkpoint.network == one_modality(config.model, config.objective, network.modality)
    assert not checkpoint.warnings
    assert_same_tensors(write_back(tmp_path / "back.pt", checkpoint)["model"], content["model"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_import_then_export_is_the_identity_bit_for_bit(name: str, tmp_path: Path) -> None:
    prenet = min(PUBLISHED[name].prenet, 1)
    shallow = {"average_top_k_layers": 1}
    network = replace(PUBLISHED[name], prenet=prenet, depth=1, vocabulary=300, model=PUBLISHED[name].model | shallow)
    content = content_of(network)
    checkpoint = read_official(save(tmp_path / "official.pt", content))
    back = write_back(tmp_path / "back.pt", checkpoint)
    assert_same_tensors(back["model"], content["model"])
    again = read_official(tmp_path / "back.pt")
    assert (again.network, again.section, again.ignored) == (checkpoint.network, checkpoint.section, [])
    for path in tmp_path.iterdir():
        path.unlink()  # pytest keeps the folders of the last runs


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
def test_official_section_of_our_configurations_gives_them_back(name: str) -> None:
    config = load_config(name)
    for modality, own in config.model.modalities.items():
        objective = config.objective.modalities[modality]
        if isinstance(objective.decoder, TransformerDecoderConfig):  # of BAT, whose files have a layout of their own
            with pytest.raises(UnsupportedOptionError, match=r"decoder\.kind='transformer'"):
                official_section(config.model, objective, modality)
            continue
        section = official_section(config.model, objective, modality)
        found = network_of(section, modality, getattr(own, "vocab_size", None))
        assert found == one_modality(config.model, config.objective, modality)


def test_a_network_that_has_no_official_form_is_refused_by_field() -> None:
    config = load_config("audio_tiny")
    own = config.objective.modalities["audio"]
    other = replace(own, target=replace(own.target, layer_norms=("layer", "instance")))
    with pytest.raises(UnsupportedOptionError, match=r"target\.layer_norms=\('layer', 'instance'\)"):
        official_section(config.model, other, "audio")
    with pytest.raises(UnsupportedOptionError, match="modality=text: the model has audio"):
        official_section(config.model, own, "text")


def test_patches_of_another_width_keep_their_official_names(tmp_path: Path) -> None:
    base = PUBLISHED["image_base"]
    network = replace(
        base, width=64, heads=4, own=base.own | {"embed_dim": 32}, decoder=base.decoder | {"decoder_dim": 16}
    )
    assert "modality_encoders.IMAGE.local_encoder.0.proj.weight" in layout_of(network)[0]
    content = content_of(network)
    checkpoint = read_official(save(tmp_path / "official.pt", content))
    assert "encoders.image.local.widen.weight" in checkpoint.trunk
    assert_same_tensors(write_back(tmp_path / "back.pt", checkpoint)["model"], content["model"])


def test_a_part_of_a_larger_tensor_is_written_without_the_rest(tmp_path: Path) -> None:
    stacked = torch.zeros(1000, 8, 4)
    write_official(tmp_path / "x.pt", {"blocks.0.mlp.fc1.weight": stacked[3]}, None, {})
    assert (tmp_path / "x.pt").stat().st_size < 4000
