"""Reading text: what a document is, in any form and compression, read in pieces; and every kind of bad input."""

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from d2v2ds.errors import ConfigError, ShardError
from preprocessing.text import divide, json_lines, read, stream
from preprocessing.text.divide import can_be_divided, document_boundaries
from preprocessing.text.documents import DocumentBatch, DocumentKind, DocumentOptions, TextFile, TextSpan
from preprocessing.text.find import find_text_files
from preprocessing.text.read import read_documents
from tests.preprocessing.texts import story

LINES = DocumentOptions(document="line")
PARAGRAPHS = DocumentOptions()
LABELS = DocumentOptions(label_field="label")


def text_file(path: Path, options: DocumentOptions = PARAGRAPHS) -> TextFile:
    (found,) = find_text_files([path], options)
    return found


def whole(batches: Iterator[DocumentBatch]) -> list[str]:
    """Documents, put together again where they came in pieces."""
    found: list[str] = []
    open_end = False
    for batch in batches:
        assert batch.begins_inside == open_end
        texts = list(batch.texts)
        if batch.begins_inside:
            found[-1] += texts.pop(0)
        found.extend(texts)
        open_end = batch.ends_inside
    assert not open_end
    return found


def documents_of(path: Path, options: DocumentOptions = PARAGRAPHS) -> list[str]:
    return whole(read_documents(TextSpan(file=text_file(path, options)), options))


def write(path: Path, data: bytes) -> Path:
    """Compressed as the suffix says."""
    if path.suffix == ".gz":
        half = len(data) // 2
        data = gzip.compress(data[:half]) + gzip.compress(data[half:])  # as `cat a.gz b.gz` makes them
    elif path.suffix in (".zst", ".zstd"):
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path


# --- what a document is -----------------------------------------------------------------------------------------------

PLAIN = "\ufeff  One\nof two lines.\r\n \t\r\nTwo.\n\n\n\nThree,\u3000\n  and more \n"


def test_lines_paragraphs_and_files_are_documents_without_white_space_around_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", PLAIN.encode())
    assert documents_of(path, LINES) == ["One", "of two lines.", "Two.", "Three,", "and more"]
    assert documents_of(path) == ["One\nof two lines.", "Two.", "Three,\u3000\n  and more"]
    assert documents_of(path, DocumentOptions(document="file")) == [PLAIN.strip("\ufeff").strip()]
    for blank in ("", "\n", " \n\n\t\n"):
        assert documents_of(write(tmp_path / "b.txt", blank.encode())) == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 512 << 10])
def test_forms_and_compressions_give_the_same_documents_however_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    texts = [story(seed, 12) for seed in range(8)]
    rows = [{"n": 1, "text": text, "label": f"l{at % 3}"} for at, text in enumerate(texts)]
    plain = write(tmp_path / f"a.txt{suffix}", "\n\n".join(texts).encode())
    lines = write(tmp_path / f"a.jsonl{suffix}", "\n".join(json.dumps(row) for row in rows).encode())
    table = ["label\tn\ttext", *(f"{row['label']}\t1\t{' '.join(str(row['text']).split())}" for row in rows)]
    tsv = write(tmp_path / f"a.tsv{suffix}", ("\r\n".join(table) + "\r\n").encode())
    assert documents_of(plain) == documents_of(lines) == texts
    assert documents_of(tsv) == [" ".join(text.split()) for text in texts]
    for path in (lines, tsv):
        batches = list(read_documents(TextSpan(file=text_file(path, LABELS)), LABELS))
        assert [label for batch in batches for label in batch.labels] == [row["label"] for row in rows]
        assert [line for batch in batches for line in batch.lines] == list(range(path is tsv, 8 + (path is tsv)))


def test_nothing_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document and a file of 2 MB pass through reads of 4 KB and pieces of 2,000 characters."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(read, "PIECE_CHARS", 2000)
    text = "\n".join([story(seed, 99) for seed in range(225)] * 20)
    assert len(text) > 2_000_000
    wrote = {"a.txt": text, "a.jsonl": "".join(json.dumps({"text": line}) + "\n" for line in text.split("\n"))}
    for name, content in wrote.items():
        path = write(tmp_path / f"{name}.gz", content.encode())
        options = DocumentOptions(document="file")
        longest, found = 0, []
        for batch in read_documents(TextSpan(file=text_file(path)), options):
            longest = max(longest, sum(map(len, batch.texts)))
            found.append(batch)
        assert longest <= 4096 + 2000
        assert " ".join(whole(iter(found))).split() == text.split()
        assert len(whole(iter(found))) == (1 if name == "a.txt" else text.count("\n") + 1)


def test_a_document_without_white_space_comes_in_pieces_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "PIECE_CHARS", 10)
    assert documents_of(write(tmp_path / "a.txt", b"x" * 95 + b"\n\n" + b"y" * 5)) == ["x" * 95, "y" * 5]
    assert documents_of(write(tmp_path / "a.txt", b"abc" + b" " * 50 + b"def" + b"\n" * 40)) == [
        "abc" + " " * 50 + "def"
    ]
    assert documents_of(write(tmp_path / "a.txt", b" " * 50 + b"\n" * 40)) == []


# --- dividing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", ["line", "paragraph"])
@pytest.mark.parametrize("step", [1, 13, 100, 5000])
def test_spans_hold_every_document_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: DocumentKind, step: int
) -> None:
    monkeypatch.setattr(divide, "_SCAN_BYTES", 5)
    rng = random.Random(step)
    blanks = ["\n", "\n\n", "\r\n\r\n", "\n \t\n", "\n\n\n\n", "\n   "]
    text = "".join(story(seed, rng.randint(1, 9)) + rng.choice(blanks) for seed in range(60))
    options = DocumentOptions(document=document)
    file = text_file(write(tmp_path / "a.txt", text.encode()))
    assert can_be_divided(file, options)
    wanted = range(step, file.bytes, step)
    bounds = [0, *document_boundaries(file, wanted, options), file.bytes]
    assert all(bound >= offset for offset, bound in zip(wanted, bounds[1:], strict=False))
    found = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        found += whole(read_documents(TextSpan(file=file, start=start, stop=stop), options))
    assert found == documents_of(tmp_path / "a.txt", options) and len(found) > 10


def test_compressed_files_and_documents_that_are_files_stay_whole(tmp_path: Path) -> None:
    plain, packed = (text_file(write(tmp_path / name, b"a\n\nb")) for name in ("a.txt", "a.txt.gz"))
    assert not can_be_divided(plain, DocumentOptions(document="file"))
    assert not can_be_divided(packed, PARAGRAPHS)


def test_white_space_of_any_length_between_paragraphs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divide, "_SCAN_BYTES", 64)
    longest = [0]

    class Watched:
        """The pattern of a blank line; notes the longest text that it is given."""

        def search(self, data: bytes) -> re.Match[bytes] | None:
            longest[0] = max(longest[0], len(data))
            return re.search(rb"\n[ \t\r\f\v]*\n", data)

    monkeypatch.setitem(divide._BOUNDARIES, "paragraph", Watched())
    text = b"one\n" + b" " * 10_000 + b"\ntwo\n\n"
    file = text_file(write(tmp_path / "a.txt", text))
    assert document_boundaries(file, [1, 20, 10_006], PARAGRAPHS) == [10_005, 10_005, len(text)]
    assert longest[0] <= 65


def test_a_stretch_without_boundary_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = text_file(write(tmp_path / "a.txt", b"x" * 1000 + b"\n\nend"))
    scan, scanned = divide._next_boundary, []
    monkeypatch.setattr(divide, "_next_boundary", lambda *given: scanned.append(given[1]) or scan(*given))
    assert document_boundaries(file, range(10, 1000, 10), PARAGRAPHS) == [1002] * 99
    assert scanned == [10]
    assert document_boundaries(file, [1001, 1003], PARAGRAPHS) == [1005, 1005]


@pytest.mark.parametrize("scan_bytes", range(1, 9))
def test_a_boundary_is_found_wherever_a_read_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan_bytes: int
) -> None:
    monkeypatch.setattr(divide, "_SCAN_BYTES", scan_bytes)
    file = text_file(write(tmp_path / "a.txt", b"one\ntwo\n \t \r\nthree\n\nfour"))
    assert document_boundaries(file, [1], PARAGRAPHS) == [13]
    assert document_boundaries(file, [1], LINES) == [4]


# --- finding ----------------------------------------------------------------------------------------------------------


def test_folders_are_searched_for_text_in_sorted_order(tmp_path: Path) -> None:
    names = ["b/2.txt", "b/1.jsonl.zst", "a.text", "c.json.gz", "d.TXT.GZ", "notes.md", "e.tar.gz", "m.tsv", ".h.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"")
    ignored: Counter[str] = Counter()
    found = find_text_files([tmp_path], PARAGRAPHS, ignored)
    assert ignored == {".md": 1, ".tar.gz": 1, ".tsv": 1}
    assert [(file.source, file.form, file.compression) for file in found] == [
        ("a.text", "text", None),
        ("c.json.gz", "json", "gzip"),
        ("d.TXT.GZ", "text", "gzip"),
        ("b/1.jsonl.zst", "json", "zstd"),
        ("b/2.txt", "text", None),
    ]
    assert text_file(tmp_path / "notes.md").form == "text", "a file that is named is read whatever its suffix"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: expected text \(.*\.jsonl.*\), found none"):
        find_text_files([tmp_path / "empty"], PARAGRAPHS)
    with pytest.raises(ConfigError, match="gone: expected a folder or a file, found nothing there"):
        find_text_files([tmp_path / "gone"], PARAGRAPHS)


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").symlink_to("gone.txt")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/b/a.txt: a link to gone.txt, where nothing is"):
        find_text_files([tmp_path], PARAGRAPHS)


def test_a_manifest_stands_for_its_files_and_labels_them(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"a")
    write(tmp_path / "m.tsv", b"path\tauthor\na.txt\tausten\n")
    (file,) = find_text_files([tmp_path / "m.tsv"], DocumentOptions(label_field="author"))
    assert (file.source, file.label) == ("a.txt", "austen")
    write(tmp_path / "m.tsv", b"path\tauthor\ngone.txt\tausten\n")
    with pytest.raises(ConfigError, match=r"m.tsv line 2: gone.txt"):
        find_text_files([tmp_path / "m.tsv"], PARAGRAPHS)
    write(tmp_path / "m.tsv", b"words\nfew\n")
    with pytest.raises(ConfigError, match=r"m.tsv line 1: expected tab-separated column names with 'text'"):
        find_text_files([tmp_path / "m.tsv"], PARAGRAPHS)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [3, 512 << 10])
@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"caf\xe9 au lait", "invalid continuation byte at byte 3 (e9 20 61 75)"),
        (b"fine\n\n\xff\xfeh\x00", "invalid start byte at byte 6 (ff fe 68 00)"),
        ("cut naï".encode()[:-1], "unexpected end of data at byte 6 (c3)"),
        (b"\xed\xa0\x80", "invalid continuation byte at byte 0 (ed a0 80)"),
    ],
)
def test_invalid_utf8_names_file_and_byte_or_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, data: bytes, place: str
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    path = write(tmp_path / "a.txt", data)
    byte = re.escape(place.split(" (")[0])
    with pytest.raises(ConfigError, match=rf"a.txt: expected UTF-8 text, found {byte} .*--errors replace"):
        documents_of(path)
    (replaced, *_) = [text for text in documents_of(path, DocumentOptions(errors="replace")) if "\ufffd" in text]
    assert replaced in data.decode(errors="replace")
    with pytest.raises(ConfigError, match=rf"found {byte} of the decompressed text"):
        documents_of(write(tmp_path / "a.txt.gz", data))


def test_a_byte_is_counted_from_the_beginning_of_the_file_in_any_span(tmp_path: Path) -> None:
    file = text_file(write(tmp_path / "a.txt", b"one\n\ntwo\n\nthr\xee\n"))
    with pytest.raises(ConfigError, match="at byte 13"):
        whole(read_documents(TextSpan(file=file, start=5, stop=file.bytes), PARAGRAPHS))


BAD_JSON = {
    '{"text": "x"': "expected one JSON object, found Expecting ',' delimiter",
    "[1]": "expected one JSON object, found '[1]'",
    '{"text": "x"}{"text": "y"}': "expected one JSON object, found",
    '{"words": "x"}': "expected text in field 'text', found the fields ['words']; name the field by --text-field",
    '{"text": ["x"]}': "expected text in field 'text', found it is ['x']",
    '{"text": "x", "more": ' + "[" * 100_000: "expected one JSON object, found values nested too deeply",
    '{"text": ' + "9" * 5000 + "}": "expected one JSON object, found Exceeds the limit",
    '{"text": "x \\ud83d"}': "expected whole characters, found half of one, \\ud83d; --errors replace",
}


@pytest.mark.parametrize("line", BAD_JSON)
@pytest.mark.parametrize("start", [0, 1])
def test_bad_json_lines_are_named(tmp_path: Path, line: str, start: int) -> None:
    good = '{"text": "g"}\n'
    file = text_file(write(tmp_path / "a.jsonl", (good * 3 + line + "\n" + good).encode()))
    span = TextSpan(file=file, start=start * len(good), stop=file.bytes)
    with pytest.raises(ConfigError) as error:
        whole(read_documents(span, PARAGRAPHS))
    assert str(error.value).startswith(f"a.jsonl line 4: {BAD_JSON[line]}")


@pytest.mark.parametrize("odd", ["", " ", "[1]"], ids=["decoded at once", "one by one", "with an odd field"])
@pytest.mark.parametrize("options", [PARAGRAPHS, LABELS])
def test_a_null_text_is_no_document_and_is_counted(tmp_path: Path, odd: str, options: DocumentOptions) -> None:
    lines = ['{"text": "a", "label": "x"}', '{"text": null, "label": "y"}', '{"text": "b"}', '{"text": null}']
    lines[0] = lines[0].replace("}", f', "more": {odd}}}') if odd.strip() else lines[0]
    text = ("\n".join(lines) + ("\n" + odd) * (odd == " ")).encode()
    batches = list(read_documents(TextSpan(file=text_file(write(tmp_path / "a.jsonl", text))), options))
    assert [text for batch in batches for text in batch.texts] == ["a", "b"]
    assert [line for batch in batches for line in batch.lines] == [0, 2]
    assert sum(batch.nulls for batch in batches) == 2
    assert [label for batch in batches for label in batch.labels] == (["x", None] if options is LABELS else [])


def test_half_characters_are_replaced_on_demand_and_whole_ones_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rb'{"text": "\ud83d\ude00 \udc00 \u00e9"}')
    assert documents_of(path, DocumentOptions(errors="replace")) == ["😀 \ufffd é"]


def test_bad_labels_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a", "label": 3}\n{"text": ""}\n{"text": "b", "label": [1]}\n')
    with pytest.raises(ConfigError, match=r"line 3: expected text or a number as label 'label', found \[1\]"):
        documents_of(path, LABELS)
    batches = list(read_documents(TextSpan(file=text_file(path), stop=path.read_bytes().rfind(b"{")), LABELS))
    assert [(batch.texts, batch.labels) for batch in batches] == [(["a", ""], ["3", None])], "a labelled row stays"


@pytest.mark.parametrize(
    ("lines", "named", "what"),
    [
        (['{"text": "a"}{"text": "b"}', " ", '{"text": "c"}'], 1, "expected one JSON object"),
        (["\r", '{"text": "a"}{"text": "b"}'], 2, "expected one JSON object"),
        (["", '{"text": "a"}{"text": "b"}'], 2, "expected one JSON object"),
        (['{"text": "a"}', '{"text":', '"b"}', '{"text": "c"}{"text": "d"}'], 2, "expected one JSON object"),
        (['{"text": "a"}', '{"text": "b", "more": {"x": 1}', ', "y": 2}'], 2, "expected one JSON object"),
    ],
    ids=[
        "two on a line and none on another",
        "none and two",
        "an empty line and two",
        "one on two lines and two on a line",
        "one on two lines",
    ],
)
def test_every_line_is_one_object_although_the_objects_are_as_many_as_the_lines(
    tmp_path: Path, lines: list[str], named: int, what: str
) -> None:
    good = '{"text": "z"}'  # the last line has no end and is read alone
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, good]).encode())
    with pytest.raises(ConfigError, match=f"a.jsonl line {named}: {what}"):
        documents_of(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_good_lines_are_not_decoded_one_by_one(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_decode_line", lambda *_: pytest.fail("decoded one by one"))
    rows = [{"text": text, "label": label} for text, label in (("a", "x"), ("", None), ("é", 3))]
    path = write(tmp_path / "a.jsonl", end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert documents_of(path) == ["a", "é"]
    batches = list(read_documents(TextSpan(file=text_file(path)), DocumentOptions(label_field="label")))
    found = [row for batch in batches for row in zip(batch.lines, batch.texts, batch.labels, strict=True)]
    assert found == [(0, "a", "x"), (1, "", None), (2, "é", "3")]


@pytest.mark.parametrize("blank", ["", "\r", " \t"])
def test_blank_lines_are_left_out_wherever_they_are(tmp_path: Path, blank: str) -> None:
    lines = ['{"text": "a"}', '{"text": "b"}']
    for at in range(3):
        path = write(tmp_path / f"{at}.jsonl", "\n".join([*lines[:at], blank, *lines[at:]]).encode())
        assert documents_of(path) == ["a", "b"]


def test_a_field_that_is_not_wanted_has_to_be_utf8_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b", "name": "\xff"}\n')
    with pytest.raises(ConfigError, match="a.jsonl: expected UTF-8 text, found invalid start byte at byte 37"):
        documents_of(path)


def test_bad_tsv_lines_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"text\tlabel\nfine\t1\nshort\n")
    with pytest.raises(ConfigError, match="a.tsv line 3: expected 2 tab-separated fields, found 1"):
        documents_of(path)
    path = write(tmp_path / "a.tsv.gz", b"text\nfine\n")
    with pytest.raises(ConfigError, match="a.tsv.gz line 1: expected tab-separated column names with 'label'"):
        documents_of(path, LABELS)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compression_is_named(tmp_path: Path, suffix: str) -> None:
    data = "\n".join(story(seed, 50) for seed in range(500)).encode()
    path = write(tmp_path / f"a.txt{suffix}", data)
    packed = bytearray(path.read_bytes())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ConfigError, match=rf"a.txt{suffix}: expected (gzip|zstd) data, found it damaged behind"):
        documents_of(path)
    path.write_bytes(b"this is plain text, whatever its name says")
    with pytest.raises(
        ConfigError, match=rf"a.txt{suffix}: expected (gzip|zstd) data, found it damaged behind 0 bytes"
    ):
        documents_of(path)


@pytest.mark.parametrize("padding", [1, 7, 10_240])
@pytest.mark.parametrize("chunk_bytes", [3, 512 << 10])
def test_zeros_behind_a_gzip_file_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding: int, chunk_bytes: int
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    path = write(tmp_path / "a.txt.gz", b"one\n\ntwo")
    path.write_bytes(path.read_bytes() + bytes(padding))
    assert documents_of(path) == ["one", "two"]
    path.write_bytes(path.read_bytes() + b"\x1f\x8bmore")
    with pytest.raises(ConfigError, match=r"a.txt.gz: expected gzip data, found it damaged behind \d bytes"):
        documents_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_beginning_of_a_table_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.tsv{suffix}"
    for data in (b"this is plain text, whatever its name says", write(path, b"text\nfine\n" * 99).read_bytes()[:-20]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=rf"a.tsv{suffix}: expected (gzip|zstd) data, found it damaged behind"):
            documents_of(path)


def test_a_line_that_never_ends_and_a_file_that_shrank_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 100)
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 3000)
    with pytest.raises(ConfigError, match="a.jsonl line 2: expected a line, found more than 1000 bytes"):
        documents_of(path)
    file = text_file(write(tmp_path / "a.txt", b"x" * 50))
    write(tmp_path / "a.txt", b"x" * 40)
    with pytest.raises(ShardError, match="expected 50 bytes, found an end at byte 40; the file changed"):
        whole(read_documents(TextSpan(file=file, stop=50), PARAGRAPHS))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match="a.txt: cannot be read: No such file"):
        whole(read_documents(TextSpan(file=file, stop=50), PARAGRAPHS))
