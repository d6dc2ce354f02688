"""What each corpus consists of: archives, where they lie, where their checksums come from, and its licence.

In: names of parts, a published list of checksums, or a user's list of URLs. Out: `Source`s to fetch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from d2v2ds.errors import ConfigError
from preprocessing.download.fetch import DIGEST_CHARACTERS, Checksum, Source
from preprocessing.driver.input_files import listed


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus that is published as one archive for each part."""

    base_url: str
    suffix: str
    """Of the archives, behind the part's name."""
    parts: tuple[str, ...]
    licence: str
    md5_list: str | None = None
    """File beside the archives with their MD5 sums, as ``md5sum`` writes it."""
    md5: Mapping[str, str] = field(default_factory=dict)
    """By part, where the publisher gives the sums elsewhere."""


LIBRISPEECH = Corpus(
    base_url="https://www.openslr.org/resources/12",
    suffix=".tar.gz",
    parts=(
        "dev-clean",
        "dev-other",
        "test-clean",
        "test-other",
        "train-clean-100",
        "train-clean-360",
        "train-other-500",
        "intro-disclaimers",
        "original-mp3",
        "original-books",
        "raw-metadata",
    ),
    licence="LibriSpeech: CC BY 4.0, Panayotov, Chen, Povey and Khudanpur, ICASSP 2015",
    md5_list="md5sum.txt",
)

LIBRILIGHT = Corpus(
    base_url="https://dl.fbaipublicfiles.com/librilight/data",
    suffix=".tar",
    parts=("small", "medium", "large"),
    licence="Libri-light: LibriVox recordings, in the public domain in the USA; Kahn et al., ICASSP 2020",
    # From data_preparation/README.md of facebookresearch/libri-light, where the authors publish the archives.
    md5={
        "small": "c49207eb86a8e8ac895561c37232041e",
        "medium": "c75e7ac62471bfbf2db77528d62a9b74",
        "large": "4dfbac018f50b99797ece101fc9f0c30",
    },
)

IMAGENET = """\
ImageNet is not fetched by programs: its terms ask every user to register and to agree in person.

1. Make an account at https://image-net.org and ask for access to ILSVRC 2012 (non-commercial research and education).
2. Download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there, and check them against the sums beside the links.
3. Unpack the outer archive of the training set, then each of the 1000 inner ones into a folder of its class:

       mkdir train && tar -xf ILSVRC2012_img_train.tar -C train
       cd train && for one in *.tar; do mkdir "${one%.tar}" && tar -xf "$one" -C "${one%.tar}" && rm "$one"; done

4. Pack it: python -m preprocessing.pack_images --input train --output SHARDS --shorter-side 256"""


def archives_of(corpus: Corpus, parts: Sequence[str], base_url: str | None) -> list[Source]:
    """The archives of the parts, with the checksums that are known without a list.

    Args:
        corpus: the table above.
        parts: each one once.
        base_url: of a mirror; None for the publisher.

    Raises:
        ConfigError: if a part is unknown or given twice, or the mirror's address cannot be used.
    """
    if unknown := [part for part in parts if part not in corpus.parts]:
        raise ConfigError(f"--parts: expected some of {', '.join(corpus.parts)}; found {', '.join(map(repr, unknown))}")
    if len(set(parts)) < len(parts):
        raise ConfigError(f"--parts: expected each part once, found {', '.join(parts)}")
    md5 = {part: Checksum("md5", value) for part, value in corpus.md5.items()}
    return [beside(corpus, base_url, f"{part}{corpus.suffix}", md5.get(part)) for part in parts]


def beside(corpus: Corpus, base_url: str | None, name: str, checksum: Checksum | None = None) -> Source:
    """A file where the archives lie; raises a `ConfigError` if the address cannot be used."""
    source = Source(url=f"{(base_url or corpus.base_url).rstrip('/')}/{name}", name=name, checksum=checksum)
    source.check("--base-url")
    return source


def read_md5_list(path: Path) -> dict[str, Checksum]:
    """File names and sums of a list that ``md5sum`` wrote; other lines are not looked at."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-fA-F]{32})\s+\*?(?:\./)?(\S+)\s*", line) for line in lines]
    return {match[2]: Checksum("md5", match[1].lower()) for match in matches if match}


def read_url_list(path: Path) -> list[Source]:
    """The files of a list: a line holds a URL, and behind tabs perhaps a checksum and a file name.

    A checksum is hexadecimal, SHA-256 or MD5 by its length. The name is the last part of the URL's path unless given.
    Empty lines and lines that begin with ``#`` say nothing.

    Raises:
        ConfigError: if the list cannot be read, a line is malformed, or two lines have one file name.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--list {path}: expected UTF-8 text with a URL a line: {error}") from error
    sources: dict[str, Source] = {}
    first: dict[str, int] = {}
    doubled = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        source = _source_of(line, f"{path} line {number}")
        if source.name in sources:
            doubled.append(f"{source.name!r}: lines {first[source.name]} and {number}")
        first.setdefault(source.name, number)
        sources[source.name] = source
    if doubled:
        raise ConfigError(
            f"{path}: {len(doubled)} file names occur more than once; give names in the third column:\n"
            f"{listed(doubled, len(doubled))}"
        )
    if not sources:
        raise ConfigError(f"--list {path}: expected a URL a line, found none")
    return list(sources.values())


def _source_of(line: str, place: str) -> Source:
    fields = [one.strip() for one in line.split("\t")]
    if len(fields) > 3:
        raise ConfigError(f"{place}: expected a URL, a checksum and a name between tabs, found {len(fields)} fields")
    url, checksum, name = (*fields, "", "")[:3]
    source = Source(url=url, name=name or _last_part(url), checksum=_checksum_of(checksum, place) if checksum else None)
    source.check(place)
    return source


def _last_part(url: str) -> str:
    """The file name that a URL suggests; whether it can be used is checked later."""
    return unquote(url.split("#")[0].split("?")[0].rpartition("/")[2])


def _checksum_of(text: str, place: str) -> Checksum:
    for algorithm, characters in DIGEST_CHARACTERS.items():
        if re.fullmatch(rf"[0-9a-fA-F]{{{characters}}}", text):
            return Checksum(algorithm, text.lower())
    raise ConfigError(f"{place}: expected 64 (SHA-256) or 32 (MD5) hexadecimal characters, found {text!r}")
