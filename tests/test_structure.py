"""The measures of `tests/structure.py` find what they look for, in a small tree with every fault planted once."""

from pathlib import Path

import pytest

from tests import structure

TREE = {
    "d2v2ds/model/trunk.py": "from d2v2ds.data import batches\n",
    "d2v2ds/data/batches.py": "def read():\n    from d2v2ds.model import block\n    return block\n",
    "d2v2ds/model/block.py": "import d2v2ds.model.alibi\n",
    "d2v2ds/model/alibi.py": "from d2v2ds.model.block import Block\n",
    "d2v2ds/export.py": "def long():\n" + "    pass\n" * 70 + "x = 1\n" * 400,
    "d2v2ds/train/step.py": "def step(batch):\n    return batch == 'audio' or batch in ('text', 'any') or go()\n",
    "d2v2ds/modalities/audio/reader.py": "def read(name):\n    return name == 'audio'\n",
    "preprocessing/driver/reports.py": "from preprocessing.audio import report\n",
    "preprocessing/audio/report.py": "from preprocessing.driver import lines\n",
    "preprocessing/driver/lines.py": "def line(text):\n    return text == 'any'\n",
}


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, structure.Measure]:
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(structure, "READ", [("d2v2ds/data/batches.py", "read"), ("d2v2ds/model/gone.py", "block")])
    monkeypatch.setattr(structure, "LOSS", [("d2v2ds/train/step.py", "step"), ("d2v2ds/export.py", "long", "go")])
    return {one.name: one for one in structure.measure(tmp_path)}


def test_pairs_of_rooms_and_circles_of_modules_are_found(found: dict[str, structure.Measure]) -> None:
    assert found["rooms: two-way pairs"].worst == ["data <-> model", "preprocessing.audio <-> preprocessing.driver"]
    assert found["modules: circles of imports"].worst == ["d2v2ds.model.alibi d2v2ds.model.block"]


def test_long_functions_modules_and_commands_are_found(found: dict[str, structure.Measure]) -> None:
    assert found["functions: most lines"].worst == ["d2v2ds/export.py long 71"]
    assert found["modules: most lines"].worst == ["d2v2ds/export.py 471"]
    assert found["commands of 60 lines or more"].worst == ["d2v2ds/export.py 471"]
    assert found["functions: 90th percentile of lines"].found == 71
    assert found["modules: 90th percentile of lines"].found == 3


def test_comparisons_with_names_of_modalities_are_found_outside_their_rooms(
    found: dict[str, structure.Measure],
) -> None:
    lines = [line.split(" ", 1)[0] for line in found["comparisons with a modality's name"].worst]
    assert lines == ["d2v2ds/train/step.py:2"] * 2


def test_a_chain_that_is_broken_is_found(found: dict[str, structure.Measure]) -> None:
    assert found["from disk to loss: breaks of the chain"].worst == [
        "d2v2ds/model/gone.py: no block",
        "read does not call block",
    ]
    assert found["from disk to loss: functions"].found == found["from disk to loss: files"].found == 4


def test_a_broken_limit_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for found, code in ((4, 0), (5, 1)):
        monkeypatch.setattr(structure, "measure", lambda found=found: [structure.Measure("frames", 4, found, ["a"])])
        assert structure.main() == code
        assert ("TOO MANY" in capsys.readouterr().out) == bool(code)
