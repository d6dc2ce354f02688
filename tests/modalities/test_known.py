"""Which modalities there are: the shipped ones and those of installed packages; and what a modality need not answer."""

from pathlib import Path
from typing import Any

import pytest

from d2v2ds.errors import ConfigError
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.known import SHIPPED, known_modalities, modality_of, open_reader
from d2v2ds.modalities.modality import Modality, ProbeDefaults
from tests.installed_package import install, run_beside

SENSORS = """
from d2v2ds.modalities.audio.modality import Audio


class Sensors(Audio):
    name = {name!r}


SENSORS = Sensors()
"""
ENTRY_POINTS = "[d2v2ds.modalities]\nsensors = sensors:SENSORS\n"


def test_the_shipped_modalities_are_known_in_their_order() -> None:
    assert list(known_modalities().values()) == list(SHIPPED)
    assert list(known_modalities()) == ["audio", "image", "text", "spectrogram"]


def test_a_modality_of_an_installed_package_takes_part_in_a_configuration(tmp_path: Path) -> None:
    """Its settings stand in the YAML of a run like those of the shipped ones."""
    install(tmp_path / "site", {"sensors": SENSORS.format(name="sensors")}, ENTRY_POINTS)
    moves = [f"{section}.audio=null" for section in ("data", "model.modalities", "objective.modalities")]
    program = f"""
import yaml
from pathlib import Path
from d2v2ds.config.load import CONFIG_FOLDER, load_config
from d2v2ds.modalities.known import known_modalities

values = yaml.safe_load((CONFIG_FOLDER / "audio_tiny.yaml").read_text())
for section in (values["data"], values["model"]["modalities"], values["objective"]["modalities"]):
    section["sensors"] = dict(section["audio"])
Path("run.yaml").write_text(yaml.safe_dump(values))
config = load_config("run.yaml", ["data.sensors.shards=x", *{moves!r}])
print(*known_modalities(), "|", *config.data.modalities, type(config.model.modalities["sensors"]).__name__)
"""
    done = run_beside(tmp_path / "site", "-c", f"import os; os.chdir({str(tmp_path)!r})\n{program}")
    assert (done.stdout, done.returncode) == ("audio image text spectrogram sensors | sensors AudioNetwork\n", 0), (
        done.stderr
    )


def test_a_modality_whose_name_is_taken_is_refused(tmp_path: Path) -> None:
    install(tmp_path / "site", {"sensors": SENSORS.format(name="text")}, ENTRY_POINTS)
    done = run_beside(tmp_path / "site", "-m", "d2v2ds.config", "audio_tiny", "data.shards=x")
    assert done.returncode == 2 and done.stdout == ""
    message = "entry point sensors:SENSORS of d2v2ds.modalities: modality 'text' exists already; rename it"
    assert message in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_modality_is_named_with_the_place_that_names_it() -> None:
    known = "audio, image, text, spectrogram"
    message = f"data.smell: modality 'smell' is not known here, expected one of {known}; install the package"
    with pytest.raises(ConfigError, match=message):
        open_reader("smell", None, None, MaskConfig(masked_fraction=0.5, num_masks=1))
    with pytest.raises(ConfigError, match="run/config.yaml: modality 'smell'"):
        modality_of("smell", "run/config.yaml")


class Smell(Modality):
    """Answers nothing but its name."""

    name = "smell"


def test_what_a_modality_does_not_answer_has_a_default(tmp_path: Path) -> None:
    smell, network = Smell(), object()
    assert smell.run_length(object()) is None
    assert smell.describe_preprocessing(network, None, None) == {}
    assert smell.files_beside({}) == ()
    assert smell.packed_faults(tmp_path, {}, tmp_path) == []
    assert (smell.must_be_equal, smell.baseline, smell.hub, smell.graph) == ((), None, None, None)
    assert smell.probe == ProbeDefaults()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda smell, path: smell.prepare_demo(path, None), "smell: there is no demonstration"),
        (
            lambda smell, path: smell.inference(object(), {}, path),
            "smell: raw inputs cannot be read; pack them and use d2v2ds.extract",
        ),
        (lambda smell, path: smell.whole_inputs(path, {}), "smell: packed folders cannot be read for evaluation"),
    ],
    ids=["demo", "inference", "evaluation"],
)
def test_what_a_modality_cannot_do_is_an_error(call: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        call(Smell(), tmp_path)
