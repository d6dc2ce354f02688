"""Turn planned recordings into rows: decode, cut or join, encode, annotate."""

import io
from collections.abc import Iterator

import numpy as np
import soundfile

from d2v2ds.modalities.audio.shards import SAMPLE_DTYPE
from preprocessing.audio.clips import Clip, reason
from preprocessing.audio.shard_plan import SAMPLE_RATE_HZ, AudioSettings, AudioUnit
from preprocessing.audio.waveform import BadAudioError, Decoder, Samples, cut_points, mean_and_variance
from preprocessing.driver.protocol import Buffer, Notes, Row
from preprocessing.driver.shard_plan import Skipped


def rows_of(unit: AudioUnit, decoder: Decoder, settings: AudioSettings, notes: Notes) -> Iterator[Row]:
    """The rows of one unit; files that turn out bad are noted in `notes`."""
    if len(unit.clips) > 1:
        yield from _joined_row(unit, decoder, settings, notes)
        return
    clip = unit.clips[0]
    samples = _decoded(clip, unit.order, decoder, notes)
    if samples is None:
        return
    bounds = [0, len(samples)]
    if settings.max_seconds:
        longest, shortest = (round(s * SAMPLE_RATE_HZ) for s in (settings.max_seconds, settings.min_seconds))
        bounds = cut_points(samples, longest, shortest, SAMPLE_RATE_HZ)
    pieces, silent = len(bounds) - 1, 0
    for piece, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        row = _row(
            settings,
            samples[start:stop],
            id=clip.id if pieces == 1 else f"{clip.id}#{piece:04d}",
            text=clip.text if pieces == 1 else None,  # which words fall into which piece is not known
            label=clip.label,
            speaker=clip.speaker,
            source=clip.source,
            start_sample=start,
        )
        silent += 0 if row.values["var"] else stop - start
        yield row
    if silent:
        detail = f"{silent} of {len(samples)} samples lie in rows of variance 0"
        notes.note("silent", detail, order=unit.order, source=clip.source, lost=silent / len(samples))


def _joined_row(unit: AudioUnit, decoder: Decoder, settings: AudioSettings, notes: Notes) -> Iterator[Row]:
    """One row of several clips of one speaker, without those that do not decode."""
    parts, clips = [], []
    for clip in unit.clips:
        samples = _decoded(clip, unit.order, decoder, notes)
        if samples is None:
            continue
        if samples.min() == samples.max():
            notes.note("silent", "its variance is 0", order=unit.order, source=clip.source)
        parts.append(samples.copy())
        clips.append(clip)
    if not clips:
        return
    texts = [clip.text for clip in clips]
    labels = {clip.label for clip in clips}
    yield _row(
        settings,
        np.concatenate(parts),
        id=f"{unit.clips[0].id}+{len(unit.clips) - 1}",
        text=" ".join(text for text in texts if text) if all(texts) else None,
        label=labels.pop() if len(labels) == 1 else None,
        speaker=clips[0].speaker,
        source="\n".join(clip.source for clip in clips),
        start_sample=0,
    )


def _decoded(clip: Clip, order: int, decoder: Decoder, notes: Notes) -> Samples | None:
    """Decode a recording and note what it lost; None if it is bad, which is noted too."""
    try:
        samples = decoder.decode(clip.path)
    except BadAudioError as error:
        notes.skipped.append(Skipped(order=order, source=clip.source, reason=reason(clip.path, error)))
        return None
    for one in decoder.remarks:
        notes.note(one.kind, one.detail, order=order, source=clip.source, lost=one.lost)
    return samples


def _row(settings: AudioSettings, samples: Samples, **values: object) -> Row:
    """One row of (S,) int16 samples and its annotations."""
    mean, var = mean_and_variance(samples)
    payload: Buffer = encode_flac(samples) if settings.codec == "flac" else samples.astype(SAMPLE_DTYPE, copy=False)
    return Row(payload, {**values, "num_samples": len(samples), "mean": mean, "var": var})


def encode_flac(samples: Samples) -> Buffer:
    """One FLAC stream of (S,) int16 samples, as bytes."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return stream.getbuffer()
