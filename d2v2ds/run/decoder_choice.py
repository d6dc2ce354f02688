"""Choice of a decoder: language model, lexicon and weights, from options or a file of `d2v2ds.tune_decoder`."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v2ds.decoding.beam import BeamConfig, BeamDecoder
from d2v2ds.decoding.lexicon import read_lexicon
from d2v2ds.errors import ConfigError, MissingExtraError
from d2v2ds.io import durable
from d2v2ds.io.read import crc32_of, open_regular, read_json, validate
from d2v2ds.tasks.ctc import Ctc
from d2v2ds.tasks.search import TimedSearch
from d2v2ds.tasks.vocabulary import Vocabulary

FORMAT = "d2v2ds-decoder"
UNITS = "emissions: natural logarithms; language model: log10, as in the official decoder"
_WEIGHTS = ("beam", "lm_weight", "word_score", "boundary_score")


@dataclass(frozen=True, kw_only=True)
class DecoderChoice:
    """Language model, lexicon and settings of a beam search; without a language model decoding is greedy."""

    lm: Path | None = None
    """n-gram model, ARPA or KenLM's binary form."""
    lexicon: Path | None = None
    """Spellings of the words; None: the words of the ARPA file, by their own letters."""
    beam: BeamConfig = field(default_factory=BeamConfig)
    file: Path | None = None
    """File with these choices; None if they were given one by one."""

    def build(self, vocabulary: Vocabulary) -> BeamDecoder | None:
        """Build the search; None for greedy decoding.

        Raises:
            ConfigError, MissingExtraError: as `BeamDecoder` and `read_lexicon`.
        """
        if self.lm is None:
            return None
        lexicon = None if self.lexicon is None else read_lexicon(self.lexicon)
        return BeamDecoder(vocabulary, self.lm, lexicon, self.beam)

    def identity(self) -> dict[str, Any]:
        """Return plain values that differ if two choices may decode differently: contents of the files, and settings.

        Raises:
            ConfigError: a file cannot be read.
        """
        if self.lm is None:
            return {}
        files = {name: asdict(_contents(path)) for name, path in self._files().items()}
        return {"files": files, "settings": asdict(self.beam)}

    def _files(self) -> dict[str, Path]:
        """Language model and lexicon, by option."""
        named = {"lm": self.lm, "lexicon": self.lexicon}
        return {name: path for name, path in named.items() if path is not None}

    def describe(self) -> dict[str, Any]:
        """Return plain values for a result: names of the files, settings, and their units."""
        files = self._files() | ({} if self.file is None else {"decoder": self.file})
        return {
            **{key: path.name for key, path in files.items()},
            "settings": asdict(self.beam),
            "units": UNITS,
        }


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """Size and checksum of a file."""

    bytes: int
    crc32: int


def _contents(path: Path) -> _Contents:
    with open_regular(path, ConfigError) as file:
        size = os.fstat(file.fileno()).st_size
    return _Contents(bytes=size, crc32=crc32_of(path, ConfigError))


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Content of a file of choices."""

    format: str
    lm: str
    lexicon: str | None
    contents: dict[str, _Contents]
    """Contents of language model and lexicon, by option: no other file of these names is used."""
    settings: BeamConfig
    units: str
    tuning: dict[str, Any] = field(default_factory=dict)


def write_choice(path: Path, choice: DecoderChoice, tuning: Mapping[str, Any]) -> None:
    """Write a decoder's file; language model and lexicon are named relative to it.

    Args:
        path: file to write.
        choice: with a language model.
        tuning: plain values, how the settings were found.
    """
    assert choice.lm is not None

    def relative(file: Path) -> str:
        return os.path.relpath(file.resolve(), path.resolve().parent)

    stored = _Stored(
        format=FORMAT,
        lm=relative(choice.lm),
        lexicon=None if choice.lexicon is None else relative(choice.lexicon),
        contents={name: _contents(file) for name, file in choice._files().items()},
        settings=choice.beam,
        units=UNITS,
        tuning=dict(tuning),
    )
    durable.replace_text(path, json.dumps(asdict(stored), indent=1, ensure_ascii=False) + "\n")


def read_choice(path: Path, *, lm: Path | None = None, lexicon: Path | None = None) -> DecoderChoice:
    """Read a decoder's file.

    It may come from a stranger and name any file of this machine. A file that it names is used only with the content
    that the decoder was tuned with.

    Args:
        path: of the file.
        lm: language model instead of the one that it names.
        lexicon: likewise.

    Raises:
        ConfigError: it is none, or damaged, or a file that it names is gone or another one.
    """
    stored = validate(_Stored, read_json(path, ConfigError), path, ConfigError)
    if stored.format != FORMAT or stored.units != UNITS:
        raise ConfigError(
            f"{path}: expected format {FORMAT!r} and units {UNITS!r}, found {stored.format!r:.40} and "
            f"{stored.units!r:.90}; tune it again with this version"
        )
    named = {"lm": stored.lm, "lexicon": stored.lexicon}
    files = {name: path.parent / file for name, file in named.items() if file is not None}
    given = {name: file for name, file in (("lm", lm), ("lexicon", lexicon)) if file is not None}
    for name in files.keys() - given.keys():
        _require_contents(files[name], stored.contents.get(name), f"{path}: {name}", name)
    return DecoderChoice(**(files | given), beam=stored.settings, file=path)


def _require_contents(file: Path, expected: _Contents | None, where: str, option: str) -> None:
    """Compare a file with what it was; one of another size is not read.

    Raises:
        ConfigError: it differs, or is none.
    """
    with open_regular(file, ConfigError) as opened:
        has_size = expected is not None and os.fstat(opened.fileno()).st_size == expected.bytes
    if not has_size or _contents(file) != expected:
        raise ConfigError(
            f"{where}: expected the file that the decoder was tuned with, found another one at {file}; tune it again, "
            f"or give the file with --{option}"
        )


def search_faults(objective: Any, path: Path, limit_s: float) -> list[str]:
    """Give a recogniser the search of a decoder's file for its validation; returns a message if that cannot be.

    Args:
        objective: of the run; others than recognisers are left alone.
        path: file of the decoder.
        limit_s: seconds for one validation set.
    """
    if not isinstance(objective, Ctc):
        return []  # `RunConfig.check` reports this
    try:
        decoder = read_choice(path).build(objective.vocabulary)
    except (ConfigError, MissingExtraError) as error:
        return [f"valid.decoder {path}: {error}"]
    assert decoder is not None

    def find(logits: Tensor) -> Sequence[str]:
        found = decoder(logits.log_softmax(-1))
        return found[0].words if found else ()

    objective.search = TimedSearch(find, limit_s)
    return []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a decoder to a command."""
    default = BeamConfig()
    parser.add_argument("--lm", type=Path, help="n-gram model, ARPA or KenLM's binary form; none: greedy decoding")
    parser.add_argument("--lexicon", type=Path, help="lines of WORD, a tab, and letters; else the words of the ARPA")
    parser.add_argument(
        "--decoder", type=Path, help="file of d2v2ds.tune_decoder with all of these; single options go before it"
    )
    parser.add_argument("--beam", type=int, help=f"hypotheses kept at each frame ({default.beam})")
    parser.add_argument("--lm-weight", type=float, help=f"factor of log10 p of the words ({default.lm_weight:g})")
    parser.add_argument("--word-score", type=float, help=f"added for every word ({default.word_score:g})")
    parser.add_argument("--boundary-score", type=float, help=f"added for every frame of | ({default.boundary_score:g})")


def choice_of(options: argparse.Namespace) -> DecoderChoice:
    """Read the options that `add_arguments` added.

    Raises:
        ConfigError: the decoder's file is wrong, or a setting is impossible.
    """
    named = {"lm": options.lm, "lexicon": options.lexicon}
    choice = DecoderChoice(**named) if options.decoder is None else read_choice(options.decoder, **named)
    given = {name: getattr(options, name) for name in _WEIGHTS if getattr(options, name) is not None}
    beam = validate(BeamConfig, asdict(replace(choice.beam, **given)), "decoder", ConfigError)
    chosen = replace(choice, beam=beam, file=None if given or options.lm or options.lexicon else choice.file)
    if chosen.lm is None and (given or chosen.lexicon):
        raise ConfigError("--beam, --lexicon, --lm-weight, --word-score, --boundary-score: they need --lm or --decoder")
    return chosen
