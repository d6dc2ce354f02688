"""Configurations: everything wrong is said at once, nothing unknown is dropped in silence."""

import re
from pathlib import Path

import pytest
import yaml

from d2v2ds.config.__main__ import main
from d2v2ds.config.load import CONFIG_FOLDER, load_config, read_config, to_yaml
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
            [
                "modle.block.width=3",
                "run.total_stps=5",
                "lr.peak=fast",
                "model.block.wdith=7",
                "nonsense",
                "objective.modalities.audio.mask=3",
            ],
        )
    text = str(caught.value)
    for part in (
        "run.total_stps: unknown key; did you mean run.total_steps?",
        "modle: unknown key; did you mean model?",
        "model.block.wdith: unknown key; did you mean model.block.width?",
        "lr.peak: Input should be a valid number",
        "'nonsense': expected section.field=value",
        "objective.modalities.audio.mask: ",
    ):
        assert part in text


def test_a_second_validation_set_is_a_folder_of_each_modality() -> None:
    given = ["data.shards=a", "valid.text=b", "objective.select=[accuracy,mismatched/accuracy]"]
    config = load_config("finetune/glue_mnli", [*given, "valid.more.mismatched.text=2024"])
    assert config.valid.sets == {"": {"text": Path("b")}, "mismatched": {"text": Path("2024")}}
    assert load_config("finetune/glue_mnli", given[:2]).valid.sets == {"": {"text": Path("b")}}, "null is left out"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["valid.more.other.text=c"], "valid.more.other.text is given and valid.text is not"),
        (["valid.text=b", "valid.more.other.audio=c"], "valid.more.other.audio is given and valid.audio is not"),
        (["valid.text=b", "valid.more.Other/2.text=c"], "valid.more.Other/2: expected a name of small letters"),
        (
            ["valid.text=b", "objective.select=[other/accuracy]"],
            "objective.select names the validation set other, found none; give valid.more.other.MODALITY=FOLDER",
        ),
    ],
)
def test_validation_sets_that_cannot_be_are_named(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config("finetune/glue_mnli", ["data.shards=a", *given])


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("finetune/glue_rte", ["valid.text=b", "valid.decoder=d.json"], "valid.decoder: expected a run of ctc"),
        (
            "finetune/ctc_tiny",
            ["valid.decoder=d.json"],
            "valid.decoder: expected a run of ctc with a validation folder",
        ),
        ("finetune/ctc_tiny", ["valid.audio=b", "objective.select=[lm_wer]"], "lm_wer, and valid.decoder is not given"),
        (
            "finetune/ctc_tiny",
            ["valid.audio=b", "valid.decoder=d.json", "valid.decoder_seconds=2000"],
            "valid.decoder_seconds is 2000, expected at most 900",
        ),
    ],
)
def test_validation_that_cannot_have_a_decoder_is_named(name: str, given: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(name, ["data.shards=a", *given])


def test_contradictions_name_both_values() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            "audio_base",
            [
                "model.block.num_heads=7",
                "objective.modalities.audio.target.num_layers=13",
                "data.audio.micro_batch_seconds=10",
                "objective.modalities.audio.mask.adjust=-0.6",
                "lr.warmup_steps=500000",
                "objective.modalities.audio.decoder.groups=7",
            ],
        )
    text = str(caught.value)
    for part in (
        "width 768 is not divisible by num_heads 7",
        "num_layers is 13, expected 1 to shared_depth (12)",
        "data.audio.micro_batch_seconds 10 cannot hold one row of 20 seconds",
        "objective: modalities.audio: adjust -0.6 makes the ",
        "negative (0.5 + adjust)",
        "lr.warmup_steps 500000 is more than the 400000 steps of the run",
        "modalities.audio: decoder: width 384 is not divisible by groups 7",
    ):
        assert part in text


def test_overrides_win_over_yaml_and_numbers_may_be_written_like_1e_4() -> None:
    config = load_config("audio_tiny", ["lr.peak=1e-4", "run.seed=7", "objective.modalities.audio.loss.scale=2"])
    assert (config.lr.peak, config.run.seed, config.objective.modalities["audio"].loss.scale) == (1e-4, 7, 2.0)


def test_missing_file_lists_the_shipped_names() -> None:
    with pytest.raises(ConfigError, match="audio_large"):
        load_config("audio_huge")


def test_command_prints_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audio_large"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["shared_depth"] == 16
    assert main(["audio_large", "x.y=1"]) == 2


PUBLISHED = {
    # width, heads, prenet, depth, norm_eps | M, p, A, length | top k, per layer, after averaging
    "audio_base": (768, 12, 0, 12, 1e-5, 8, 0.5, 0.05, 5, 8, ("instance",), ()),
    "audio_large": (1024, 16, 8, 16, 1e-5, 12, 0.55, 0.1, 5, 16, ("instance",), ()),
    "image_base": (768, 12, 2, 10, 1e-6, 16, 0.8, 0.07, 3, 10, ("instance",), ("layer",)),
    "image_large": (1024, 16, 0, 24, 1e-6, 16, 0.75, 0.1, 3, 18, ("instance",), ("layer",)),
    "image_huge14": (1280, 16, 0, 32, 1e-6, 16, 0.75, 0.1, 3, 24, ("instance",), ("layer",)),
    "image_huge16": (1280, 16, 0, 32, 1e-6, 16, 0.75, 0.1, 3, 24, ("instance",), ("layer",)),
    "text_base": (768, 12, 0, 12, 1e-5, 8, 0.48, 0.0, 1, 12, ("instance",), ()),
    "text_large": (1024, 16, 0, 24, 1e-5, 8, 0.5, 0.0, 1, 24, ("layer",), ("instance",)),
    "text_large_1m": (1024, 16, 0, 24, 1e-5, 8, 0.5, 0.0, 1, 24, ("layer",), ("instance",)),
}
RECIPES = {
    # updates, lr, warm-up, clip | betas, eps, decay | EMA start, end, anneal | layer drop, dropout | scale, beta, cls
    "audio_base": (400_000, 7.5e-4, 8000, 0, (0.9, 0.98), 1e-6, 0.01, 0.999, 0.99999, 75_000, 0.05, 0.1, None, 0, 0),
    "audio_large": (600_000, 4e-4, 10_000, 1, (0.9, 0.98), 1e-6, 0.01, 0.9997, 1.0, 300_000, 0, 0.1, None, 0, 0),
    "image_base": (375_300, 1e-3, 50_040, 4, (0.9, 0.95), 1e-8, 0.05, 0.9998, 0.99999, 100_000, 0, 0, None, 0, 0.01),
    "image_large": (375_300, 4e-4, 50_040, 4, (0.9, 0.95), 1e-8, 0.05, 0.9998, 0.99999, 150_000, 0, 0, None, 0, 0.01),
    "image_huge14": (500_000, 4e-4, 50_040, 4, (0.9, 0.95), 1e-8, 0.05, 0.9998, 1.0, 300_000, 0, 0, None, 0, 0.01),
    "image_huge16": (375_300, 4e-4, 50_040, 4, (0.9, 0.95), 1e-8, 0.05, 0.9998, 0.99995, 150_000, 0, 0, None, 0, 0.01),
    "text_base": (1_000_000, 2e-4, 4000, 1, (0.9, 0.98), 1e-6, 0.01, 0.9999, 0.99999, 100_000, 0, 0.1, 1, 0, 0),
    "text_large": (600_000, 1e-4, 4000, 1, (0.9, 0.98), 1e-6, 0.01, 0.9999, 0.99999, 100_000, 0, 0.1, 1, 0, 0),
    "text_large_1m": (1_000_000, 1e-4, 4000, 1, (0.9, 0.98), 1e-6, 0.01, 0.9999, 0.99999, 100_000, 0, 0.1, 1, 4, 0),
}
DECODERS = {
    # width, groups, kernel, layers, input dropout, residual, projection layers
    "audio_base": (384, 16, 7, 4, 0.1, True, 1),
    "audio_large": (768, 16, 7, 4, 0.1, True, 1),
    "image_base": (768, 16, 3, 6, 0.0, True, 1),
    "image_large": (1024, 16, 5, 3, 0.0, True, 1),
    "image_huge14": (1024, 16, 5, 3, 0.0, True, 1),
    "image_huge16": (1024, 16, 5, 3, 0.0, True, 1),
    "text_base": (768, 1, 9, 5, 0.1, False, 2),
    "text_large": (768, 1, 9, 5, 0.1, False, 2),
    "text_large_1m": (768, 1, 9, 5, 0.1, False, 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    """The table of the published configurations, once more and independent of the YAML."""
    config = load_config(name)
    modality = name.split("_")[0]
    block, model, own = config.model.block, config.model.modalities[modality], config.objective.modalities[modality]
    mask, decoder, loss, target = own.mask, own.decoder, own.loss, own.target
    optim, lr, ema = config.optim, config.lr, config.objective.ema
    assert PUBLISHED[name] == (
        block.width, block.num_heads, model.prenet_depth, config.model.shared_depth, block.norm_eps, mask.num_masks,
        mask.masked_fraction, mask.adjust, mask.block_length, target.num_layers, target.layer_norms, target.final_norms,
    )  # fmt: skip
    assert RECIPES[name] == (
        config.total_steps, lr.peak, lr.warmup_steps, optim.clip_norm, optim.betas, optim.eps, optim.weight_decay,
        ema.start_decay, ema.end_decay, ema.anneal_steps, config.model.layer_drop, block.attention_dropout, loss.scale,
        loss.beta, loss.cls_weight,
    )  # fmt: skip
    assert {block.attention_dropout} == {block.attention_output_dropout, block.mlp_dropout}
    assert DECODERS[name] == (
        decoder.width, decoder.groups, decoder.kernel, decoder.depth, decoder.input_dropout, decoder.residual,
        decoder.projection_layers,
    )  # fmt: skip
    assert (own.share_local_encoder, mask.inverse) == ((False, True) if modality == "image" else (True, False))


def test_steps_follow_from_the_length_and_the_global_batch() -> None:
    assert load_config("audio_base", ["data.audio.global_batch_seconds=250"]).total_steps == 800_000
    assert load_config("image_base", ["data.image.global_batch_images=512"]).total_steps == 187_650
    assert load_config("text_base", ["run.tokens=null", "run.total_steps=7000"]).total_steps == 7000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.total_steps=5"], "found total_steps, hours; set the others to null"),
        (["run.hours=null"], "exactly one of total_steps, hours, epochs, tokens, found none"),
        (
            ["run.hours=null", "run.tokens=5"],
            r"run.tokens: no modality of the run \(audio\) counts in it; give run.total_steps",
        ),
        (["run.hours=null", "run.epochs=5"], "run.epochs is given, and run.epoch_images is not; give both"),
        (["data.image.global_batch_images=4"], "data.image.shards: required, not given"),
        (
            ["model.modalities.audio=null"],
            "data.audio and objective.modalities.audio configured, model.modalities.audio not; give all of them",
        ),
        (
            ["objective.modalities.audio=null"],
            "data.audio and model.modalities.audio configured, objective.modalities.audio not; give all of them",
        ),
        (["model.modalities.sound.width=3"], "model.modalities.sound: unknown modality, expected one of audio, image"),
    ],
)
def test_length_and_modalities_must_fit(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("audio_base", overrides)


@pytest.mark.parametrize("setting", ["data.audio.global_batch_seconds", "run.hours", "lr.peak", "health.min_std"])
@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_numbers_must_be_finite(setting: str, number: str) -> None:
    """Those that break a bound too are reported for it."""
    name = re.escape(setting)
    message = rf"{name}( is inf, expected a finite number|: Input should be .*, found (nan|-inf))"
    with pytest.raises(ConfigError, match=rf"1 problem.*\n  - {message}$"):
        load_config("audio_base", [f"{setting}={number}"])


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_numbers_without_bounds_must_be_finite_too(number: str) -> None:
    setting = "objective.modalities.audio.mask.adjust"
    with pytest.raises(ConfigError, match=rf"1 problem.*\n  - {setting} is -?(nan|inf), expected a finite number$"):
        load_config("audio_base", [f"{setting}={number}"])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model=3", "model: Input should be a dictionary"),
        ("data=3", "data: Input should be a dictionary"),
        ("objective=null", "objective: Input should be a dictionary"),
        ("model.modalities.audio=3", "model.modalities.audio: expected settings of audio, found 3"),
        ("optim.betas=[0.9, 1]", "optim.betas.1: Input should be less than 1, found 1"),
        ("data.audio.min_seconds=-1", "data.audio.min_seconds: Input should be greater than 0, found -1"),
    ],
)
def test_the_rest_is_checked_beside_a_faulty_value(override: str, problem: str) -> None:
    """The fault does not hide others, and makes none up: the other overrides of its section are kept."""
    others = ["data.audio.shards=/speech", "lr.pek=1", "data.audio.micro_batch_seconds=10"]
    config, problems = read_config("audio_base", [*others, override])
    assert [line for line in problems if line.startswith(problem)]
    assert "lr.pek: unknown key; did you mean lr.peak?" in problems
    if override.startswith(("optim", "data.audio.m")):
        assert config is not None
        assert config.data.missing() == []
        assert any("data.audio.micro_batch_seconds 10 cannot hold" in line for line in problems)
        assert len(problems) == 3


def test_a_section_of_which_fields_are_missing_is_no_reason_for_other_messages() -> None:
    config, problems = read_config("audio_base", ["data.text.global_batch_tokens=4"])
    assert config is None
    assert problems == ["data.text.shards: required, not given", "data.text.micro_batch_tokens: required, not given"]


def test_a_micro_batch_that_divides_the_global_one_only_in_print_is_taken() -> None:
    config = load_config("audio_base", ["data.audio.micro_batch_seconds=33.3333333"])
    assert config.data.modalities["audio"].num_micro == 15


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("image_base", ["model.modalities.image.patch_size=15"], "image_size 224 is not divisible by patch_size 15"),
        ("image_base", ["model.modalities.image.num_extra_tokens=0"], "there are no extra tokens to predict from"),
        (
            "image_base",
            ["data.image.micro_batch_images=300"],
            "global_batch_images 256 is less than micro_batch_images",
        ),
        ("audio_base", ["model.modalities.audio.conv_layers=[]"], "conv_layers: expected one or more of"),
    ],
)
def test_settings_of_one_modality_that_do_not_fit_each_other_are_named(
    name: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(name, overrides)


def test_summary_says_what_a_run_amounts_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image_large", "--world", "16"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert "student 309,268,480 (trained 309,067,776), of these decoder or head 5,967,872" in said[0]
    assert "memory of one of 16 rank(s) with zero3_bf16 (stage 3): 536.1 MiB" in said[1]
    assert "375,300 optimizer steps" in said[2]
    assert "196 tokens a sample, 16 masks of 147 masked and 49 visible tokens" in said[3]
    assert "TFLOP per step" in said[4]


def test_overrides_may_stand_behind_options_and_bad_arguments_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image_tiny", "--world", "4", "engine.deepspeed=zero3_bf16_offload"]) == 0
    said = capsys.readouterr().out
    assert "of gradients and the activations come on top" in said
    assert "of it master, optimizer, gradients and teacher_average" in said and "in the memory of the host" in said
    assert main(["image_tiny", "objective.modalities.image.mask.masked_fraction=0.9999"]) == 2
    assert "leaves nothing visible" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["image_tiny", "--world", "0"])
    assert "--world 0: expected 1 rank or more" in capsys.readouterr().err
