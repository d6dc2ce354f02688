"""The fast way to plain FLAC files: the samples of libsndfile, or nothing."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v2ds.data.codecs import flac
from d2v2ds.data.codecs.flac import StreamInfo, decode_mono16, parse_streaminfo
from d2v2ds.errors import ShardError
from d2v2ds.modalities.audio.shards import AudioShards, decode_flac
from preprocessing.audio.waveform import Decoder
from preprocessing.pack_audio import main as pack
from tests.preprocessing.helpers import noise

RATE = 16000
KINDS = {
    "noise": noise(1.0, 0),
    "one sample": noise(1.0, 0)[:1],
    "one frame": noise(1.0, 1)[:4096],
    "constant": np.full(5000, 7, dtype=np.int16),
    "silence": np.zeros(5000, dtype=np.int16),
    "full scale": np.random.default_rng(2).integers(-32768, 32768, 9000).astype(np.int16),
    "low bits empty": noise(1.0, 3) // 64 * 64,
}


def encoded(samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="FLAC", subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize(("rate", "channels", "frames"), [(16000, 1, 12345), (8000, 2, 1), (48000, 6, 70000)])
@pytest.mark.parametrize(("subtype", "bits"), [("PCM_16", 16), ("PCM_24", 24), ("PCM_S8", 8)])
def test_header_says_what_libsndfile_says(rate: int, channels: int, frames: int, subtype: str, bits: int) -> None:
    data = encoded(np.zeros((frames, channels), dtype=np.int16), rate, subtype)
    info = soundfile.info(io.BytesIO(data))
    assert parse_streaminfo(data[:42]) == StreamInfo(info.frames, info.samplerate, info.channels, bits)
    assert (info.frames, info.samplerate, info.channels, info.subtype) == (frames, rate, channels, subtype)


def test_other_beginnings_are_left_to_libsndfile() -> None:
    start = encoded(np.zeros(100, dtype=np.int16))[:42]
    unknown_length = start[:21] + bytes([start[21] & 0xF0]) + bytes(4) + start[26:]
    for other in (b"", start[:30], b"RIFF" + start[4:], unknown_length):
        assert parse_streaminfo(other) is None
        assert decode_mono16(other, RATE) is None


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_that_were_written(kind: str) -> None:
    pytest.importorskip("miniaudio")
    found = decode_mono16(encoded(KINDS[kind]), RATE)
    assert found is not None
    np.testing.assert_array_equal(found, KINDS[kind])


@pytest.mark.parametrize(
    ("samples", "rate", "subtype"),
    [
        (noise(0.5, 0), 8000, "PCM_16"),
        (np.stack([noise(0.5, 0), noise(0.5, 1)], axis=1), RATE, "PCM_16"),
        (noise(0.5, 0), RATE, "PCM_24"),
        (noise(0.5, 0), RATE, "PCM_S8"),
    ],
)
def test_other_rates_channels_and_bits_are_left_to_libsndfile(samples: np.ndarray, rate: int, subtype: str) -> None:
    assert decode_mono16(encoded(samples, rate, subtype), RATE) is None


def test_silence_of_any_length_is_decoded() -> None:
    pytest.importorskip("miniaudio")
    silence = np.zeros(600_000, dtype=np.int16)  # 200 samples a byte
    found = decode_mono16(encoded(silence), RATE)
    assert found is not None and np.array_equal(found, silence)


def test_a_header_that_promises_far_too_much_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encoded(noise(0.5, 0)))
    data[22:26] = b"\xff" * 4  # of 36 bits: 4 G samples
    monkeypatch.setattr(flac, "miniaudio", None if flac.miniaudio is None else _Untouchable())
    assert decode_mono16(bytes(data), RATE) is None


class _Untouchable:
    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"miniaudio.{name} was reached")


def test_damaged_files_give_the_true_samples_or_nothing() -> None:
    """Flipped bits, ends cut off, stretches lost or replaced: what comes out whole was not touched by the damage."""
    pytest.importorskip("miniaudio")
    rng = np.random.default_rng(0)
    found: Counter[str] = Counter()
    for kind, original in KINDS.items():
        data = encoded(original)
        for _ in range(400):
            samples = decode_mono16(_damaged(data, rng), RATE)
            if samples is None:
                found["nothing"] += 1
                continue
            found["whole"] += 1  # of a length that the damaged header states
            np.testing.assert_array_equal(samples, original[: len(samples)], err_msg=kind)
    assert found["nothing"] > 1000
    assert found["whole"] > 100, "comments and the MD5 sum may be damaged"


def _damaged(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    first, last = sorted(int(place) for place in rng.integers(0, len(data), 2))
    match int(rng.integers(4)):
        case 0:
            changed[first] ^= 1 << int(rng.integers(8))
        case 1:
            del changed[last:]
        case 2:
            del changed[first:last]
        case 3:
            changed[first : first + 16] = rng.bytes(len(changed[first : first + 16]))
    return bytes(changed)


@pytest.mark.parametrize("suffix", ["flac", "FLAC"])
def test_the_decoder_takes_this_way(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("miniaudio")
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encoded(noise(1.0, 0)))
    with monkeypatch.context() as without_libsndfile:
        without_libsndfile.setattr(soundfile, "SoundFile", _Untouchable())
        np.testing.assert_array_equal(Decoder(RATE).decode(str(path)), noise(1.0, 0))


def test_large_files_are_not_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.flac").write_bytes(encoded(noise(1.0, 0)))
    monkeypatch.setattr("preprocessing.audio.waveform._WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr("preprocessing.audio.waveform.decode_mono16", _Untouchable())
    np.testing.assert_array_equal(Decoder(RATE).decode(str(tmp_path / "a.flac")), noise(1.0, 0))


@pytest.mark.parametrize("codec", ["pcm16", "flac"])
def test_shards_are_the_same_without_miniaudio(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("miniaudio")
    (tmp_path / "in").mkdir()
    for number, (kind, samples) in enumerate(KINDS.items()):
        (tmp_path / "in" / f"{number} {kind}.flac").write_bytes(encoded(samples))
    (tmp_path / "in" / "cut.flac").write_bytes(encoded(noise(1.0, 4))[:9000])
    arguments = ["--input", str(tmp_path / "in"), "--codec", codec, "--min-seconds", "0.1", "--max-skipped", "1"]
    arguments += ["--max-noted", "1"]
    assert pack([*arguments, "--output", str(tmp_path / "with")]) == 0
    monkeypatch.setattr(flac, "miniaudio", None)
    assert pack([*arguments, "--output", str(tmp_path / "without")]) == 0
    for name in ("audio-00000.arrow", "rows.npy", "skipped.tsv"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    assert "cut.flac" in (tmp_path / "with" / "skipped.tsv").read_text()


@pytest.mark.parametrize("decoder", ["miniaudio", "soundfile"])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 12_000), (3_999, 15_999), (5_000, 9_000), (16_000, 16_000)])
def test_shards_give_any_part(
    start: int, stop: int | None, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = noise(1.0, 0)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.flac").write_bytes(encoded(samples))
    assert pack(["--input", str(tmp_path / "in"), "--codec", "flac", "--output", str(tmp_path / "out")]) == 0
    if decoder == "soundfile":
        monkeypatch.setattr(flac, "miniaudio", None)
    elif stop is None or stop - start >= 12_000:  # of 16,000
        pytest.importorskip("miniaudio")
        monkeypatch.setattr(soundfile, "SoundFile", _Untouchable())
    np.testing.assert_array_equal(AudioShards(tmp_path / "out").read_audio(0, start, stop), samples[start:stop])


def test_a_row_of_more_samples_than_its_bytes_can_have_takes_no_memory() -> None:
    data = encoded(noise(0.1, 0))
    packed = int.from_bytes(data[18:26], "big") >> 36 << 36 | (1 << 36) - 1
    lying = np.frombuffer(data[:18] + packed.to_bytes(8, "big") + data[26:], dtype=np.uint8)
    with pytest.raises(ShardError, match="row 7: expected a FLAC stream of 68,719,476,000 samples"):
        decode_flac(lying, 0, 68_719_476_000, "row 7")
