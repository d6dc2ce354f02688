"""The plan: what is packed together, decided before decoding."""

import pytest

from d2v2ds.errors import ConfigError
from preprocessing.audio.clips import Clip, Header
from preprocessing.audio.shard_plan import AudioSettings, AudioUnit, join_units, make_plan
from preprocessing.driver.shard_plan import cut_shards

RATE = 16000


def units_of(lengths: list[float], speakers: list[str]) -> list[AudioUnit]:
    return [
        AudioUnit(
            clips=(Clip(id=f"{number}", path="", source="", place="", speaker=speaker),),
            order=number,
            size=round(seconds * RATE),
        )
        for number, (seconds, speaker) in enumerate(zip(lengths, speakers, strict=True))
    ]


def test_joined_strings_hold_every_clip_once_and_keep_their_bounds() -> None:
    lengths = [0.3 + 0.01 * (number % 37) for number in range(400)]
    units = units_of(lengths, [f"speaker{number % 3}" for number in range(400)])
    joined = join_units(units, (3.0, 6.0), seed=0)
    assert sorted(clip.id for unit in joined for clip in unit.clips) == sorted(unit.clips[0].id for unit in units)
    assert all(len({clip.speaker for clip in unit.clips}) == 1 for unit in joined)
    assert max(unit.size for unit in joined) <= 6 * RATE
    short = [unit for unit in joined if unit.size < 3 * RATE]
    assert len(short) <= 3, "only the rest of each speaker may be short"
    spread = [unit.size / RATE for unit in joined if unit not in short]
    assert min(spread) < 3.5 and max(spread) > 5.5


def test_clips_that_are_long_enough_stay_alone() -> None:
    joined = join_units(units_of([0.5, 4.0, 9.0, 0.5], ["a"] * 4), (3.0, 6.0), seed=0)
    assert sorted(len(unit.clips) for unit in joined) == [1, 1, 2]


def test_strings_do_not_depend_on_other_speakers_and_follow_the_seed() -> None:
    def strings(lengths: list[float], speakers: list[str], seed: int) -> list[list[str]]:
        units = join_units(units_of(lengths, speakers), (3.0, 6.0), seed)
        return [[clip.id for clip in unit.clips] for unit in units if unit.clips[0].speaker == "a"]

    alone = strings([0.5] * 60, ["a"] * 60, 0)
    assert strings([0.5] * 90, ["a"] * 60 + ["b"] * 30, 0) == alone
    assert strings([0.5] * 60, ["a"] * 60, 1) != alone


def test_shards_are_even_and_keep_the_order() -> None:
    units = units_of([1.0] * 100, ["a"] * 100)
    shards = cut_shards(units, 15 * RATE * 2, 2.0)
    assert [unit for shard in shards for unit in shard] == units
    assert len(shards) == 7
    assert {len(shard) for shard in shards} <= {14, 15}


def test_a_recording_larger_than_a_shard_leaves_no_empty_shard() -> None:
    shards = cut_shards(units_of([1.0, 100.0, 1.0], ["a"] * 3), RATE * 2 * 10, 2.0)
    assert all(shards) and sum(map(len, shards)) == 3


def test_joining_without_speakers_names_the_files() -> None:
    clip = Clip(id="x", path="x", source="x", place="some/file.wav")
    header = Header(bytes=1, num_frames=RATE, sample_rate_hz=RATE, channels=1)
    with pytest.raises(ConfigError, match=r"(?s)speaker.*some/file\.wav"):
        make_plan([clip], [header], AudioSettings(join_seconds=(3.0, 6.0)))


def test_every_impossible_setting_is_named_at_once() -> None:
    settings = AudioSettings(min_seconds=-1, max_seconds=5, shard_bytes=0, join_seconds=(3.0, 5.5))
    with pytest.raises(ConfigError, match=r"(?s)--min-seconds.*--shard-bytes.*twice the shortest.*--max-seconds"):
        settings.check()
