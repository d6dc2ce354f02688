"""Pictures for the demonstration."""

from pathlib import Path

from d2v2ds.modalities.demo import FineTuning, Prepared, key_of, pack, python


def prepare(runs: Path, data: Path | None) -> Prepared:
    """Pictures: a folder with `train` and `valid` of class folders can be probed, any other only trained on."""
    if data is None:
        data = runs / "pictures"
        python("preprocessing.samples.images", "--output", str(data))
    if not (data / "train").is_dir() or not (data / "valid").is_dir():
        return Prepared(pack("images", data, runs / f"images-{key_of(data)}"))
    train, valid = (pack("images", data / part, runs / f"images-{part}-{key_of(data)}") for part in ("train", "valid"))
    task = FineTuning(
        "finetune/image_classify_tiny", train, valid, ("scores", "accuracy"), "accuracy (%) on held-out pictures"
    )
    return Prepared(train, (), ("--shards", str(train), "--test-shards", str(valid)), task)
