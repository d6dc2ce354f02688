"""Configurations: everything wrong is said at once, nothing unknown is dropped in silence."""

from pathlib import Path

import pytest
import yaml

from d2v2ds.config import CONFIG_FOLDER, load_config, main, to_yaml
from d2v2ds.errors import ConfigError

NAMES = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configuration_resolves_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            "audio_base",
            ["modle.block.width=3", "run.total_stps=5", "lr.peak=fast", "model.block.wdith=7", "nonsense", "mask=3"],
        )
    text = str(caught.value)
    for part in (
        "run.total_stps: unknown key; did you mean run.total_steps?",
        "modle: unknown key; did you mean model?",
        "model.block.wdith: unknown key; did you mean model.block.width?",
        "lr.peak: Input should be a valid number",
        "'nonsense': expected section.field=value",
        "mask: ",
    ):
        assert part in text


def test_contradictions_name_both_values() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            "audio_base",
            [
                "model.block.num_heads=7",
                "model.target.num_layers=13",
                "batch.micro_batch_seconds=10",
                "mask.masked_fraction=1.5",
                "lr.warmup_steps=500000",
                "ema.end_decay=1.2",
            ],
        )
    text = str(caught.value)
    for part in (
        "width 768 is not divisible by num_heads 7",
        "num_layers is 13, expected 1 to shared_depth (12)",
        "micro_batch_seconds 10.0 cannot hold one clip of max_seconds 20.0",
        "masked_fraction must lie strictly between 0 and 1, found 1.5",
        "lr.warmup_steps 500000 is more than run.total_steps 400000",
        "ema.end_decay is 1.2",
    ):
        assert part in text


def test_overrides_win_over_yaml_and_numbers_may_be_written_like_1e_4() -> None:
    config = load_config("audio_tiny", ["lr.peak=1e-4", "run.seed=7", "model.loss.scale=2"])
    assert (config.lr.peak, config.run.seed, config.model.loss.scale) == (1e-4, 7, 2.0)


def test_missing_file_lists_the_shipped_names() -> None:
    with pytest.raises(ConfigError, match="audio_large"):
        load_config("audio_huge")


def test_command_prints_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audio_large"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["shared_depth"] == 16
    assert main(["audio_large", "x.y=1"]) == 2


@pytest.mark.parametrize("name", ["audio_base", "audio_large"])
def test_published_values(name: str) -> None:
    """The table of the published configurations, once more and independent of the YAML."""
    config = load_config(name)
    block, audio = config.model.block, config.model.modalities.audio
    assert audio is not None
    found = (
        block.width, block.num_heads, audio.prenet_depth, config.model.shared_depth, config.mask.num_masks,
        config.mask.masked_fraction, config.mask.adjust, config.mask.block_length, config.model.target.num_layers,
        config.run.total_steps, config.lr.peak, config.lr.warmup_steps, config.optim.clip_norm,
        config.ema.start_decay, config.ema.end_decay, config.ema.anneal_steps, config.model.layer_drop,
        audio.decoder.width, audio.decoder.depth, audio.decoder.kernel, config.batch.global_batch_seconds,
    )  # fmt: skip
    expected = {
        "audio_base": (768, 12, 0, 12, 8, 0.5, 0.05, 5, 8, 400_000, 7.5e-4, 8000, 0, 0.999, 0.99999, 75_000, 0.05,
                       384, 4, 7, 500),
        "audio_large": (1024, 16, 8, 16, 12, 0.55, 0.1, 5, 16, 600_000, 4e-4, 10_000, 1, 0.9997, 1.0, 300_000, 0.0,
                        768, 4, 7, 960),
    }  # fmt: skip
    assert found == expected[name]
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.98), 1e-6, 0.01)
