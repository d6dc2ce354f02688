"""Compare what the header of a sound file says about its length with the bytes that are there. No torch.

libsndfile reads what is there of a file that was cut off, and stops where the header says although samples follow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from d2v2ds.modalities.audio.sound_bytes import BadAudioError, SoundBytes

MOST_CHUNKS = 4096
"""Chunks of a file that are looked at; a header of more is left to libsndfile."""
_STREAMED = ((0x7FFFF000, 0x80001000), (0xFFFFF000, 1 << 32), (1 << 62, 1 << 64))
"""Ranges of sizes in headers whose writer did not know the length."""
_BEHIND_SAMPLES = frozenset(
    {b"LIST", b"id3 ", b"ID3 ", b"cue ", b"smpl", b"fact", b"bext", b"iXML", b"PEAK", b"JUNK", b"PAD ", b"FLLR",
     b"_PMX", b"acid", b"inst", b"cart", b"axml", b"chna", b"DISP", b"afsp", b"labl", b"plst", b"umid", b"COMT",
     b"MARK", b"INST", b"APPL", b"NAME", b"AUTH", b"ANNO", b"(c) ", b"info", b"free", b"strg", b"mark"}
)  # fmt: skip
_W64 = bytes.fromhex("f3acd3118cd100c04f8edb8a")
"""End of the names of a W64 file's chunks, but its first."""
_OGG_PAGE = 27
_OGG_LARGEST_PAGE = _OGG_PAGE + 255 + 255 * 255
_END_OF_STREAM = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """A recording that can be used, but is not as it was or not as its header says."""

    kind: str
    """Event, in the same words for all such recordings."""
    detail: str
    lost: float
    """Share of the recording that is lost, 0 to 1."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How a kind of file is divided into chunks."""

    first: int
    """Offset of the first chunk."""
    name_bytes: int
    size_bytes: int
    order: Literal["little", "big"]
    samples: bytes
    """Beginning of the name of the chunk with the samples."""
    counts_header: bool = False
    """True if a chunk's size includes its name and size."""
    align: int = 2


@dataclass(frozen=True, slots=True)
class _Chunk:
    name: bytes
    size: int
    body: int
    """Offset of its content."""
    end: int
    """Offset of the next chunk."""


_RIFF = _Form(12, 4, 4, "little", b"data")
_FORMS = {
    b"RIFF": _RIFF,
    b"RF64": _RIFF,
    b"BW64": _RIFF,
    b"RIFX": _Form(12, 4, 4, "big", b"data"),
    b"FORM": _Form(12, 4, 4, "big", b"SSND"),
    b"caff": _Form(8, 4, 8, "big", b"data", align=1),
    b"riff": _Form(40, 16, 8, "little", b"data", counts_header=True, align=8),
}


def check_extent(data: SoundBytes) -> list[Remark]:
    """Check the length of a recording against its header, as far as that needs no decoding.

    A header that says no samples before samples, as a recorder leaves that died, is patched.

    Raises:
        BadAudioError: the file ends before its header says.
    """
    magic = data.read_at(0, 12)
    if magic[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and magic[8:] != b"WAVE":
        return []
    if form := _FORMS.get(magic[:4]):
        return _check_chunks(data, form)
    if magic[:4] == b".snd" and len(magic) == 12:
        begin, size = int.from_bytes(magic[4:8], "big"), int.from_bytes(magic[8:], "big")
        return _check_size(data, begin, size, (8, 4, "big"), None)
    return _check_ogg(data) if magic[:5] == b"OggS\0" else []


def _check_chunks(data: SoundBytes, form: _Form) -> list[Remark]:
    """Check files of chunks; RF64 keeps the size of its samples in a chunk ``ds64``."""
    wide: int | None = None
    for chunk in _chunks(data, form, form.first):
        if chunk.name == b"ds64":
            wide = chunk.body + 8
        if chunk.name.startswith(form.samples):
            if wide is not None and chunk.size == 0xFFFFFFFF:
                size = int.from_bytes(data.read_at(wide, 8), "little")
                return _check_size(data, chunk.body, size, (wide, 8, "little"), form)
            at = chunk.body - form.size_bytes
            return _check_size(data, chunk.body, chunk.size, (at, form.size_bytes, form.order), form)
    return []


def _check_size(
    data: SoundBytes, begin: int, size: int, field: tuple[int, int, Literal["little", "big"]], form: _Form | None
) -> list[Remark]:
    """Compare the size of the samples with the bytes behind their beginning.

    Args:
        data: the file.
        begin: offset of the samples.
        size: of the samples, as the header says.
        field: (offset, bytes, byte order) of this number.
        form: how chunks behind the samples look; None if there are none.
    """
    found = max(0, data.size - begin)
    if found < size:
        if any(low <= size < high for low, high in _STREAMED):
            return [Remark(kind="streamed", detail="its header does not say how long it is", lost=0.0)]
        raise BadAudioError(f"cut off: its header says {size} bytes of samples, found {found}")
    behind = _foreign_bytes(data, begin + size, form)
    if not behind:
        return []
    if size:
        detail = f"{behind} bytes follow the {size} bytes of samples that its header says"
        return [Remark(kind="goes on", detail=detail, lost=behind / (behind + size))]
    offset, width, order = field
    data.patch(offset, min(found, 256**width - 1).to_bytes(width, order))
    return [Remark(kind="streamed", detail=f"its header says 0 bytes of samples, found {found}", lost=0.0)]


def _foreign_bytes(data: SoundBytes, start: int, form: _Form | None) -> int:
    """Return how many bytes from `start` on belong to no chunk; padding with zeros is none."""
    if start >= data.size:
        return 0
    end = start
    for at in (start, start + start % form.align) if form else ():  # some writers do not pad
        for chunk in _chunks(data, form or _RIFF, at):
            name, guid = chunk.name[:4], chunk.name[4:]
            fits = chunk.end <= data.size and name.isascii() and name.decode().isprintable() and guid in (b"", _W64)
            if name not in _BEHIND_SAMPLES and (not fits or name in _FORMS):
                break
            end = max(end, chunk.end)
    rest = max(0, data.size - end)
    return rest if data.read_at(end, min(rest, 1 << 20)).strip(b"\0") else 0


def _chunks(data: SoundBytes, form: _Form, offset: int) -> Iterator[_Chunk]:
    """Yield the chunks of a file from an offset on, at most `MOST_CHUNKS`."""
    header = form.name_bytes + form.size_bytes
    for _ in range(MOST_CHUNKS):
        head = data.read_at(offset, header)
        if len(head) < header:
            return
        size = max(0, int.from_bytes(head[form.name_bytes :], form.order) - (header if form.counts_header else 0))
        end = offset + header + size
        yield _Chunk(head[: form.name_bytes], size, offset + header, end + -end % form.align)
        offset = end + -end % form.align


def _check_ogg(data: SoundBytes) -> list[Remark]:
    """Check that the last page of an Ogg file is whole and marked as the last one."""
    start = max(0, data.size - 2 * _OGG_LARGEST_PAGE)
    tail = data.read_at(start, data.size - start)
    at = tail.rfind(b"OggS\0")
    page = tail[at:] if at >= 0 else b""
    lengths = page[_OGG_PAGE : _OGG_PAGE + page[26]] if len(page) >= _OGG_PAGE else b""
    size = _OGG_PAGE + len(lengths) + sum(lengths)
    if at < 0:
        return [Remark(kind="goes on", detail="what follows its last page is no Ogg", lost=len(tail) / data.size)]
    if len(page) < _OGG_PAGE or len(lengths) < page[26] or len(page) < size:
        raise BadAudioError(f"cut off: its last page has {size} bytes or more, found {len(page)}")
    remarks = []
    if not page[5] & _END_OF_STREAM:
        remarks.append(Remark(kind="streamed", detail="its last page is not marked as the end", lost=0.0))
    if behind := len(page[size:].strip(b"\0")):
        remarks.append(Remark(kind="goes on", detail=f"{behind} bytes follow its last page", lost=behind / data.size))
    return remarks
