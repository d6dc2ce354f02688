"""The benchmark of reading images runs; its numbers are for people, not for tests."""

from preprocessing.pack_images import main as pack_images
from tests.benchmarks.reading_images import main
from tests.data.fake_images import encode, photo


def test_reading_images_benchmark_prints_its_tables(capsys):
    assert main(["--images", "1", "--repeats", "1"]) == 0
    table = capsys.readouterr().out
    for row in ("500 x 375: 1 files", "1600 x 1200: 1 files", "  bare decode + crop ", "x as fast, goal 1.5: "):
        assert row in table


def test_reading_images_benchmark_takes_a_packed_folder(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(encode(photo(90, 80, number)))
    shards = tmp_path / "shards"
    assert pack_images(["--input", str(tmp_path / "photos"), "--output", str(shards), "--workers", "1"]) == 0
    assert main(["--shards", str(shards), "--images", "2", "--repeats", "1"]) == 0
    assert f"{shards}: 2 files" in capsys.readouterr().out
