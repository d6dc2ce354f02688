"""Packing images without re-encoding against decoding the same files, and against copying them, in the same run.

    python -m tests.benchmarks.packing_images [--data FOLDER] [--images 8000] [--rounds 5]

Without ``--data`` it writes JPEGs of its own, 50 to 150 kB each. A small folder is copied several times over, until
there are `--images`. Packing decodes every image once, so most of its time is that of the decoder: the second piece of
work reads and decodes each file and does nothing else. The copy opens each file, reads it and appends it to one file,
which it syncs to the disk at the end; packing syncs too, and everything a user waits for is in it: listing, plan,
decoding, checksums, index. The best time of each counts. Processor time stands beside it for machines that are shared
with other work.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from d2v2ds.data.codecs.pixels import simplejpeg
from preprocessing.pack_images import main as pack
from tests.benchmarks.packing import best_of

GOAL = 0.75
"""Share of packing's time that decoding alone takes."""
_ORIGINALS = 400


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of about 500 x 400 pixels whose spectrum falls as that of photos does."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = int(rng.integers(460, 640)), int(rng.integers(360, 480))
        rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
        falling = 1 / np.maximum(np.hypot(rows, columns), 1 / width) ** 1.1
        spectrum = rng.normal(size=(3, height, len(columns), 2)) @ [1, 1j] * falling
        values = np.fft.irfft2(spectrum, s=(height, width))
        values = 128 + 50 * values / values.std()
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(folder / f"{number:05d}.jpg", quality=int(rng.integers(84, 94)))


def multiply(source: Path, folder: Path, count: int) -> list[Path]:
    """Copy the JPEGs of `source` into class folders of `folder` until there are `count`.

    Copies, not links: each file is then read from its own place, as in a real corpus.
    """
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    paths = [folder / f"class{number // 500:04d}" / f"{number:07d}{files[number % len(files)].suffix}" for number in
             range(max(count, len(files)))]  # fmt: skip
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(files[number % len(files)], path)
    return paths


def decode(paths: list[Path]) -> None:
    """Read and decode all files; JPEGs by simplejpeg where it is installed."""
    memory = bytearray(1 << 24)
    for path in paths:
        data = path.read_bytes()
        if simplejpeg is not None and path.suffix == ".jpg":
            simplejpeg.decode_jpeg(data, "RGB", buffer=memory)
        else:
            Image.open(io.BytesIO(data)).load()


def copy(paths: list[Path], output: Path) -> None:
    """All files into one, on the disk when it returns."""
    with output.open("wb") as sink:
        for path in paths:
            sink.write(path.read_bytes())
        sink.flush()
        os.fsync(sink.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with images")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        source = options.data
        if source is None:
            source = scratch / "own"
            source.mkdir()
            write_photos(source, min(_ORIGINALS, options.images))
        (scratch / "input").mkdir()
        paths = multiply(source, scratch / "input", options.images)
        size = sum(path.stat().st_size for path in paths)
        output = scratch / "output"

        def packing(workers: int) -> None:
            command = ["--input", str(scratch / "input"), "--output", str(output), "--workers", str(workers)]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                assert pack([*command, "--shard-bytes", "64M"]) == 0

        work = {
            "copy into one file": lambda: copy(paths, scratch / "copy"),
            "read and decode": lambda: decode(paths),
            "packing, 1 worker": lambda: packing(1),
            "packing, 2 workers": lambda: packing(2),
        }

        def clear() -> None:
            shutil.rmtree(output, ignore_errors=True)
            (scratch / "copy").unlink(missing_ok=True)

        best = best_of(options.rounds, work, clear)
        load = os.getloadavg()[0]
        mean = size / len(paths) / 1000
        print(
            f"{len(paths):,} files, {mean:.0f} kB each, {size / 1e6:,.0f} MB, best of {options.rounds}, load {load:.1f}"
        )
        print(f"{'':<24}{'wall s':>10}{'MB/s':>10}{'processor s':>14}")
        for label, (wall, processor) in best.items():
            print(f"{label:<24}{wall:>10.2f}{size / wall / 1e6:>10,.0f}{processor:>14.2f}")
        (copied, _), (decoded, decoder), (one, packer), (two, _) = best.values()
        print(f"{'':<24}{'ratio':>10}{'goal':>10}")
        print(f"{'decode / 1 worker':<24}{decoded / one:>10.3f}{GOAL:>10}")
        print(f"{'the same, processor':<24}{decoder / packer:>10.3f}{GOAL:>10}")
        print(f"{'decode / 2 workers':<24}{decoded / two:>10.3f}")
        print(f"{'copy / 1 worker':<24}{copied / one:>10.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
