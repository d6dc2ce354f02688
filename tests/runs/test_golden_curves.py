"""The tiny configurations train as they did: a change of these numbers is a change of the method."""

import pytest

from tests.runs.golden_curves import NAMES, STEPS, differences, expected, train


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    return train(tmp_path_factory.mktemp("curves"))


@pytest.mark.run
@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_are_those_that_are_kept(name: str, curves: dict[str, list[dict[str, float]]]) -> None:
    assert list(differences(curves[name], expected(name))) == []


def test_a_difference_is_named() -> None:
    kept = expected("audio_tiny")
    assert len(kept) == STEPS
    other = [dict(record) for record in kept]
    other[3]["loss/regression"] *= 1.0002
    other[5]["optim/lr"] *= 1.00001
    del other[7]["pred/std"]
    said = list(differences(other[:-1], kept))
    assert said[0] == "expected 20 records, found 19"
    assert said[1].startswith("step 4: loss/regression expected")
    assert said[2].startswith("step 6: optim/lr expected")
    assert said[3] == "step 8: other metrics: pred/std"
