"""Files of each corpus: archives, their addresses, checksums and licences.

In: names of parts, a published list of checksums, or a user's list of URLs. Out: `Source`s to fetch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote

from d2v2ds.errors import ConfigError
from d2v2ds.io.read import read_bytes, read_text
from preprocessing.download.fetch import ALGORITHMS, DownloadError, Source

_LIST_BYTES = 64 << 20
"""Largest list of checksums or URLs."""
_LONGEST_NAME_BYTES = 200
"""File systems allow 255, suffixes of unfinished files included."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus that is published as one archive for each part."""

    base_url: str
    suffix: str
    """Suffix of the archives, after the part's name."""
    parts: tuple[str, ...]
    licence: str
    md5_list: str | None = None
    """File beside the archives with their MD5 sums, as ``md5sum`` writes it."""
    md5: Mapping[str, str] = field(default_factory=dict)
    """MD5 sums by part, where the publisher gives them elsewhere."""


CORPORA = {
    "librispeech": Corpus(
        base_url="https://www.openslr.org/resources/12",
        suffix=".tar.gz",
        parts=(
            *("dev-clean", "dev-other", "test-clean", "test-other"),
            *("train-clean-100", "train-clean-360", "train-other-500"),
            *("intro-disclaimers", "original-mp3", "original-books", "raw-metadata"),
        ),
        licence="LibriSpeech: CC BY 4.0, Panayotov, Chen, Povey and Khudanpur, ICASSP 2015",
        md5_list="md5sum.txt",
    ),
    "librilight": Corpus(
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
    ),
}

IMAGENET = """\
ImageNet is not fetched by programs: its terms ask every user to register and to agree in person.

1. Make an account at https://image-net.org and ask for access to ILSVRC 2012 (non-commercial research and education).
2. Download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there, and check them against the sums beside the links.
3. Unpack the outer archive of the training set, then each of the 1000 inner ones into a folder of its class:

       mkdir train && tar -xf ILSVRC2012_img_train.tar -C train
       cd train && for one in *.tar; do mkdir "${one%.tar}" && tar -xf "$one" -C "${one%.tar}" && rm "$one"; done

4. Pack it: python -m preprocessing.pack_images --input train --output SHARDS --shorter-side 256"""


def archives_of(corpus: Corpus, parts: Sequence[str], base_url: str | None) -> list[Source]:
    """Return the archives of the parts; `base_url` is the address of a mirror, None for the publisher.

    Raises:
        ConfigError: if a part is unknown, or the mirror's address cannot be used.
    """
    if unknown := set(parts) - set(corpus.parts):
        raise ConfigError(f"--parts: expected some of {', '.join(corpus.parts)}; found {', '.join(sorted(unknown))}")
    return [beside(corpus, base_url, f"{part}{corpus.suffix}", corpus.md5.get(part, "")) for part in parts]


def beside(corpus: Corpus, base_url: str | None, name: str, checksum: str = "") -> Source:
    """Return a file of the folder that holds the archives."""
    url = f"{(base_url or corpus.base_url).rstrip('/')}/{name}"
    return _checked(Source(url=url, name=name, checksum=checksum), "--base-url")


def with_published_md5(sources: Sequence[Source], md5_list: Path) -> list[Source]:
    """Return the sources with their checksums from a list that ``md5sum`` wrote.

    Raises:
        DownloadError: if the list lacks one.
    """
    text = read_bytes(md5_list, DownloadError, _LIST_BYTES).decode("utf-8", "replace")
    md5 = {name: value.lower() for value, name in re.findall(r"(?m)^([0-9a-fA-F]{32})\s+\*?(?:\./)?(\S+)\s*$", text)}
    if missing := [source.name for source in sources if source.name not in md5]:
        raise DownloadError(
            f"{md5_list}: expected an MD5 sum of {', '.join(missing)}, found those of {', '.join(md5) or 'no file'}; "
            "remove it to fetch it again, or take another --base-url"
        )
    return [replace(source, checksum=md5[source.name]) for source in sources]


def read_url_list(path: Path) -> list[Source]:
    """Return the files of a list: a line holds a URL and, after tabs, optionally a checksum and a file name.

    The default name is the last part of the URL's path. Empty lines and lines that begin with ``#`` are skipped.

    Raises:
        ConfigError: if the list cannot be read, or a line is malformed.
    """
    lines = read_text(path, ConfigError, _LIST_BYTES).removeprefix("\ufeff").splitlines()
    sources = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        place = f"{path} line {number}"
        fields = [one.strip() for one in line.split("\t")]
        if len(fields) > 3:
            raise ConfigError(
                f"{place}: expected a URL, a checksum and a name between tabs, found {len(fields)} fields"
            )
        url, checksum, name = (*fields, "", "")[:3]
        name = name or unquote(re.split("[?#]", url)[0].rpartition("/")[2])
        sources.append(_checked(Source(url=url, name=name, checksum=checksum.lower()), place))
    if not sources:
        raise ConfigError(f"--list {path}: expected one URL a line, found none")
    return sources


def _checked(source: Source, place: str) -> Source:
    """Return the source; raise a `ConfigError` that begins with `place` if one of its fields cannot be used."""
    if not re.fullmatch(r"https?://[^/\s]+/[!-~]*", source.url):
        raise ConfigError(f"{place}: expected an http or https URL, percent-encoded, found {source.url!r}")
    if source.checksum and not (len(source.checksum) in ALGORITHMS and re.fullmatch("[0-9a-f]+", source.checksum)):
        kinds = ", ".join(f"{length} ({algorithm})" for length, algorithm in ALGORITHMS.items())
        raise ConfigError(f"{place}: expected a checksum of {kinds} hexadecimal characters, found {source.checksum!r}")
    name = source.name
    if not re.fullmatch(r"[^./\\][^/\\]*", name) or not name.isprintable() or len(name.encode()) > _LONGEST_NAME_BYTES:
        limits = f"at most {_LONGEST_NAME_BYTES} bytes, no folders, no leading dot"
        raise ConfigError(f"{place}: expected a file name ({limits}), found {name!r}")
    return source
