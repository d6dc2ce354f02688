"""The benchmarks of text run; their numbers are for people, not for tests."""

import pytest

from tests.benchmarks import packing_text, reading_text


@pytest.mark.parametrize(
    ("benchmark", "arguments", "rows"),
    [
        (
            packing_text,
            ["--megabytes", "0.1", "--rounds", "1"],
            ("sentencepiece  paragraphs", "bpe            JSON lines"),
        ),
        (reading_text, ["--rows", "64", "--rounds", "1"], ("np.copyto, cached", "TextReader.read")),
    ],
)
def test_benchmarks_of_text_print_their_tables(
    benchmark: object, arguments: list[str], rows: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(arguments)  # type: ignore[attr-defined]
    table = capsys.readouterr().out
    for row in rows:
        assert row in table
