"""Several folders as one dataset: numbers of rows, weights, plan and loader, and folders that do not fit each other."""

import pickle
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile
import torch

from d2v2ds.batch import Batch
from d2v2ds.config.load import load_config
from d2v2ds.data.folders import JoinedShards, sizes_of
from d2v2ds.data.loader import DataStream, LoaderConfig, build_loader
from d2v2ds.data.mixture import DATASET_BITS
from d2v2ds.data.order import BatchPlan, MicroBatch, SamplerState
from d2v2ds.data.reader import Reader
from d2v2ds.errors import ShardError
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.audio.reader import AudioDataConfig, AudioReader
from d2v2ds.modalities.image.reader import ImageDataConfig
from d2v2ds.modalities.known import open_reader, open_shards
from d2v2ds.modalities.text.reader import TextDataConfig
from d2v2ds.shapes import PAD_ID
from preprocessing.pack_audio import main as pack_audio
from preprocessing.pack_images import main as pack_images
from tests.modalities.text.test_reader import Network as TextNetwork
from tests.preprocessing.pictures import encoded, picture
from tests.preprocessing.tiny_text import pack_tiny, tokens_of

SECOND = 1 << DATASET_BITS
MASK = MaskConfig(masked_fraction=0.5, num_masks=2, kind="random")
TEXT = TextDataConfig(shards=Path("text"), global_batch_tokens=256, micro_batch_tokens=128)
AUDIO = AudioDataConfig(
    shards=Path("audio"), global_batch_seconds=4.0, micro_batch_seconds=2.0, min_seconds=0.2, max_seconds=1.0
)
LENGTHS = [[64, 40, 64, 30, 64, 64], [64, 64, 50, 16, 64, 64, 64, 20]]


class AudioNetwork:
    def num_tokens(self, size: int) -> int:
        return size // 320


class ImageNetwork:
    image_size = 16

    def num_tokens(self, size: int) -> int:
        return (size // 4) ** 2


def pack_texts(folder: Path) -> tuple[Path, ...]:
    """Two folders; the row numbers of `tokens_of` begin at 0 in both."""
    folders = folder / "a", folder / "b"
    for path, lengths in zip(folders, LENGTHS, strict=True):
        pack_tiny(path, lengths, shard_bytes=400)
    return folders


def pack_recordings(folder: Path, *options: str, rate: int = 16000, seed: int = 0, count: int = 5) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        samples = rng.normal(20, 900, 4000 + 997 * number).astype(np.int16)
        soundfile.write(folder / f"{number}.wav", samples, rate)
    assert pack_audio(["--input", str(folder), "--output", str(folder / "out"), "--workers", "1", *options]) == 0
    return folder / "out"


def batches(reader: Reader, steps: int, num_workers: int = 0) -> list[Batch]:
    plan = BatchPlan(reader.datasets, config=reader.plan_config(), seed=3)
    loader = build_loader(
        {reader.modality: DataStream(reader, plan)},
        state={reader.modality: SamplerState()},
        rank=0,
        world=1,
        config=LoaderConfig(num_workers=num_workers),
    )
    with closing(loader):
        return [batch for step in islice(loader, steps) for batch in step.micro]


@dataclass(frozen=True)
class Part:
    """As much of opened shards as joining asks for."""

    rows: int
    index: ClassVar[Any] = SimpleNamespace(modality="any", files_beside=())

    def __len__(self) -> int:
        return self.rows


PARTS = Part(5), Part(6), Part(7)


def test_rows_are_located_by_folder_and_number() -> None:
    joined = JoinedShards(PARTS)
    assert len(joined) == 5 + 6 + 7 and joined.first is PARTS[0]
    located = [joined.locate(index) for index in (0, 4, SECOND, 2 * SECOND + 3)]
    assert located == [(PARTS[0], 0), (PARTS[0], 4), (PARTS[1], 0), (PARTS[2], 3)]
    assert joined.name(SECOND + 7) == "rows in memory row 7"
    for index, dataset in ((3 * SECOND, 3), (-1, -1)):
        with pytest.raises(IndexError, match=f"row {index} lies in dataset {dataset} of 3"):
            joined.locate(index)


@pytest.mark.parametrize("rows", [[], [4], [SECOND + 1, SECOND], [2 * SECOND, 3, SECOND + 5, 0, 2 * SECOND + 1, 3]])
def test_rows_are_divided_by_folder_and_can_be_put_back(rows: list[int]) -> None:
    """Every row is in one division, where `locate` finds it; divisions come in the order of the folders."""
    joined = JoinedShards(PARTS)
    found: dict[int, tuple[Part, int]] = {}
    order = []
    for part, local, places in joined.split(np.array(rows, dtype=np.int64)):
        order.append(part)
        taken = np.arange(len(rows))[places].tolist()
        assert len(local) == len(taken) > 0 and not found.keys() & set(taken)
        found |= {place: (part, row) for place, row in zip(taken, local.tolist(), strict=True)}
    assert [found[place] for place in range(len(rows))] == [joined.locate(row) for row in rows]
    assert order == [part for part in PARTS if part in {part for part, _ in found.values()}]


def test_rows_of_a_single_folder_are_passed_on_as_they_are() -> None:
    rows = np.array([3, 1, 1])
    ((part, local, places),) = JoinedShards(PARTS[:1]).split(rows)
    assert part is PARTS[0] and local is rows and places == slice(None)


def test_texts_of_two_folders_are_read_under_their_numbers(tmp_path: Path) -> None:
    reader = open_reader("text", replace(TEXT, shards=pack_texts(tmp_path)), TextNetwork(), MASK)
    assert len(reader) == 14 and [len(dataset.sizes) for dataset in reader.datasets] == [6, 8]
    rows = np.array([SECOND + 3, 0, SECOND + 6, 1])
    np.testing.assert_array_equal(sizes_of(reader.datasets, rows), [16, 64, 64, 40])
    source = reader.read(MicroBatch(0, rows, 64), seed=0).source
    for line, (row, length) in enumerate([(3, 16), (0, 64), (6, 64), (1, 40)]):
        expected = [*tokens_of(row, length, 1000).tolist(), *[PAD_ID] * (64 - length)]
        assert source[line].tolist() == expected
    assert reader.read_whole(SECOND + 2).tolist() == tokens_of(2, 50, 1000).tolist()
    with pytest.raises(ValueError, match="expected one dataset, found 2"):
        _ = reader.sizes


def test_recordings_are_cropped_by_their_number_and_codecs_may_differ(tmp_path: Path) -> None:
    folders = pack_recordings(tmp_path / "a"), pack_recordings(tmp_path / "b", "--codec", "flac", seed=1)
    reader = open_reader("audio", replace(AUDIO, shards=folders), AudioNetwork(), MASK)
    alone = open_reader("audio", replace(AUDIO, shards=folders[1]), AudioNetwork(), MASK)
    assert torch.equal(reader.read_whole(SECOND + 2), alone.read_whole(2))
    joined = reader.read(MicroBatch(0, np.array([2, SECOND + 2]), 3200), seed=0).source
    whole = [reader.read_whole(row) for row in (2, SECOND + 2)]
    starts = [int(np.flatnonzero([torch.equal(w[s : s + 3200], crop) for s in range(len(w) - 3199)])[0])
              for w, crop in zip(whole, joined, strict=True)]  # fmt: skip
    assert starts[0] != starts[1], "rows of one number in two folders are cropped on their own"


def test_images_of_two_folders(tmp_path: Path) -> None:
    folders = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            image = picture(30 + number, 24, seed=number + len(folders) * 10)
            (tmp_path / name / f"{number}.png").write_bytes(encoded(image, "PNG"))
        folders.append(tmp_path / f"{name}-out")
        assert pack_images(["--input", str(tmp_path / name), "--output", str(folders[-1]), "--workers", "1"]) == 0
    config = ImageDataConfig(shards=tuple(folders), global_batch_images=4, micro_batch_images=2)
    reader = open_reader("image", config, ImageNetwork(), MASK)
    alone = open_reader("image", replace(config, shards=folders[1]), ImageNetwork(), MASK)
    assert torch.equal(reader.read_whole(SECOND + 1), alone.read_whole(1))
    assert [dataset.sizes.tolist() for dataset in reader.datasets] == [[16] * 3] * 2
    assert {row >> DATASET_BITS for batch in batches(reader, 3) for row in batch.ids.tolist()} == {0, 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_weights_say_how_often_rows_are_seen(num_workers: int, tmp_path: Path) -> None:
    config = replace(TEXT, shards=pack_texts(tmp_path), weights=(0.5, 1.0))
    reader = open_reader("text", config, TextNetwork(), MASK)
    plan = BatchPlan(reader.datasets, config=reader.plan_config(), seed=3)
    assert plan.mixture.num_rows(0) == 3 + 8
    seen = batches(reader, 40, num_workers)
    for batch in seen:
        for row, source in zip(batch.ids.tolist(), batch.source, strict=True):
            dataset, local = row >> DATASET_BITS, row % SECOND
            length = LENGTHS[dataset][local]
            assert source[:length].tolist() == tokens_of(local, length, 1000).tolist()
    counts = Counter(row >> DATASET_BITS for batch in seen for row in batch.ids.tolist())
    assert counts[0] / counts[1] == pytest.approx(0.5 * 6 / 8, rel=0.1)


def test_identities_are_those_of_the_folders_and_of_their_first_shards(tmp_path: Path) -> None:
    folders = pack_texts(tmp_path)
    reader = open_reader("text", replace(TEXT, shards=folders), TextNetwork(), MASK)
    pack_tiny(tmp_path / "grown", [*LENGTHS[0], *LENGTHS[0]], shard_bytes=400)
    pack_tiny(tmp_path / "other", [64, 40, 64, 31, 64, 64], shard_bytes=400)
    one, two = (dataset.identity for dataset in reader.datasets)
    grown, other = (open_shards(tmp_path / name).index for name in ("grown", "other"))
    assert one is not None and two is not None and one.num_shards > 1
    full = one.num_shards
    while grown.shards[full - 1] != one.shards[full - 1]:  # the last one may have had room left
        full -= 1
    assert full >= 1 and grown.digest(full) == one.digest(full)
    assert one.digest(full) != two.digest(full)
    assert other.digest(other.num_shards) != one.digest(one.num_shards)
    restored = BatchPlan(reader.datasets, config=reader.plan_config(), seed=3)
    state = restored.state_dict(SamplerState(epoch=2))
    assert restored.load_state_dict(state) == SamplerState(epoch=2)


def test_a_single_folder_is_read_as_before(tmp_path: Path) -> None:
    folder = pack_texts(tmp_path)[0]
    readers = [open_reader("text", replace(TEXT, shards=shards), TextNetwork(), MASK) for shards in (folder, (folder,))]
    before = BatchPlan(readers[0].sizes, config=readers[0].plan_config(), seed=3)
    for reader in readers:
        assert len(reader.datasets) == 1 and reader.datasets[0].weight == 1.0
        plan = BatchPlan(reader.datasets, config=reader.plan_config(), seed=3)
        for one, other in zip(plan.window(0, 0), before.window(0, 0), strict=True):
            np.testing.assert_array_equal(one.rows, other.rows)
    weighted = open_reader("text", replace(TEXT, shards=folder, weights=(1.0, 2.0)), TextNetwork(), MASK)
    assert weighted.datasets[0].weight == 1.0, "validation reads a folder of its own with the settings of training"


def test_a_damaged_row_of_the_second_folder_is_left_out(tmp_path: Path) -> None:
    folders = pack_texts(tmp_path)
    for path in folders[1].glob("*.arrow"):
        path.unlink()
    reader = pickle.loads(pickle.dumps(open_reader("text", replace(TEXT, shards=folders), TextNetwork(), MASK)))  # noqa: S301
    seen = batches(reader, 6, num_workers=1)
    assert {row >> DATASET_BITS for batch in seen for row in batch.ids.tolist()} == {0}
    assert all(str(folders[1]) in fault for batch in seen for fault in batch.faults)
    assert any(batch.faults for batch in seen)


def test_folders_that_do_not_fit_each_other_are_named_with_their_values(tmp_path: Path) -> None:
    first = pack_texts(tmp_path)[0]
    pack_tiny(tmp_path / "large", [64], vocab_size=2000)
    message = rf"{first} and {tmp_path / 'large'} cannot be read as one dataset: vocab_size is 1000 .*, 2000 in"
    with pytest.raises(ShardError, match=message):
        open_reader("text", replace(TEXT, shards=(first, tmp_path / "large")), TextNetwork(), MASK)
    other = open_shards(tmp_path / "b")
    entry = other.index.files_beside[0]
    changed = replace(other.index, files_beside=(replace(entry, crc32="00000000"),))
    other.index = changed
    with pytest.raises(ShardError, match=r"such as the tokenizer, is \{'tokenizer.txt': '\w{8}'\} .*'00000000'"):
        JoinedShards([open_shards(first), other])  # type: ignore[list-item]
    sound = pack_recordings(tmp_path / "sound")
    with pytest.raises(ShardError, match=f"{sound}: expected text, found a folder of audio"):
        open_reader("text", replace(TEXT, shards=(first, sound)), TextNetwork(), MASK)
    with pytest.raises(ShardError, match="modality is 'text' in the first, 'audio' in the second"):
        JoinedShards([open_shards(first), open_shards(sound)])  # type: ignore[list-item]


def test_every_folder_is_looked_at_for_faults(tmp_path: Path) -> None:
    long, short = pack_recordings(tmp_path / "long"), pack_recordings(tmp_path / "short", count=2)
    reader = open_reader("audio", replace(AUDIO, shards=(long, short), min_seconds=0.4), AudioNetwork(), MASK)
    assert isinstance(reader, AudioReader)
    (fault,) = reader.faults()
    assert fault.startswith(f"data.audio.shards: the longest clip of {short} has 0.31 s")
    assert open_reader("audio", replace(AUDIO, shards=(long, short)), AudioNetwork(), MASK).faults() == []


@pytest.mark.parametrize(
    ("shards", "weights", "words"),
    [
        (("a", "b"), (1.0,), "weights has 1 numbers for 2 folders"),
        (("a",), (1.0, 2.0), "weights has 2 numbers for 1 folders"),
        (("a", "b"), (1.0, 0.0), r"weights is \[1.0, 0.0\], expected numbers above 0"),
        (("a", "b"), (1.0, float("nan")), "expected numbers above 0"),
        ((), None, "names no folder"),
        (("a", "b", "a"), None, "names a more than once"),
    ],
)
@pytest.mark.parametrize("config", [TEXT, AUDIO], ids=["text", "audio"])
def test_weights_and_folders_are_checked(config: Any, shards: Sequence[str], weights: Any, words: str) -> None:
    (fault,) = replace(config, shards=tuple(map(Path, shards)), weights=weights).check()
    assert re.search(words, fault)
    assert replace(config, shards=(Path("a"), Path("b")), weights=(1.0, 2.0)).check() == []


def test_a_configuration_names_one_folder_or_several() -> None:
    one, two = (
        load_config("audio_tiny", overrides).data.modalities["audio"]
        for overrides in (["data.audio.shards=a"], ["data.audio.shards=[a, b]", "data.audio.weights=[1, 0.5]"])
    )
    assert (one.shards, one.weights) == (Path("a"), None)
    assert (two.shards, two.weights) == ((Path("a"), Path("b")), (1.0, 0.5))
