"""Sound files of any length to text with times of words; see `d2v2ds.transcribe`.

A recording is normalised by mean and variance over all of it, as in training. It runs through the network in windows of
`window_seconds` that overlap; the middle of each overlap divides them. A recording of one window has the text that
`d2v2ds.evaluate` finds. Longer ones are searched in segments that end in pauses between words.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from d2v2ds.decoding.segments import Logits, Segmenter
from d2v2ds.decoding.timing import TimedWord, beam_words, greedy_words
from d2v2ds.errors import ConfigError
from d2v2ds.modalities.inference import InputOptions
from d2v2ds.run.decoder_choice import DecoderChoice
from d2v2ds.run.file_inputs import (
    InputFiles,
    WindowOutput,
    changed_since,
    file_inference,
    find_files,
    outputs_by_input,
    window_options,
    work_name,
)
from d2v2ds.run.record_file import Output, StandardOutput, open_records
from d2v2ds.run.subtitles import SUBTITLES, SubtitleFolder
from d2v2ds.run.task_model import device_of, load_task
from d2v2ds.tasks.ctc import Ctc

logger = logging.getLogger(__name__)

Format = Literal["tsv", "jsonl", "srt", "vtt"]
FORMATS: tuple[Format, ...] = ("tsv", "jsonl", "srt", "vtt")


@dataclass(frozen=True, kw_only=True)
class TranscriptionOptions:
    """Options of a transcription."""

    inputs: tuple[Path, ...]
    """Sound files and folders of them."""
    output: Path | None = None
    """File of JSON lines, or folder for subtitles; None: standard output."""
    format: Format = "jsonl"
    """Form of the output; `tsv` is a line of name, tab and text on standard output."""
    word_times: bool = False
    """True: records hold every word with its times."""
    decoder: DecoderChoice = field(default_factory=DecoderChoice)
    window_seconds: float = InputOptions.window_seconds
    """Longest stretch that the network reads at once (seconds)."""
    context_seconds: float = 5.0
    """Part of a window at its inner ends that is taken from the neighbour (seconds); two windows overlap by twice as
    much."""
    tag: str | None = None
    """Checkpoint of a run; None: the best one."""
    device: str | None = None


class Transcriber:
    """Decodes the windows of one recording after another."""

    def __init__(self, task: Ctc, decoder: DecoderChoice, token_seconds: float, window_seconds: float) -> None:
        """
        Args:
            task: with the vocabulary.
            decoder: greedy or beam search.
            token_seconds: time from one frame to the next.
            window_seconds: longest segment of a search.

        Raises:
            ConfigError, MissingExtraError: as `DecoderChoice.build`.
        """
        self._vocabulary, self._token_seconds = task.vocabulary, token_seconds
        self._most_frames = max(1, int(window_seconds / token_seconds))
        search = decoder.build(task.vocabulary)
        self._decode: Callable[[Logits], list[TimedWord]] = (
            (lambda logits: greedy_words(logits, task.vocabulary))
            if search is None
            else (lambda logits: beam_words(logits, search))
        )

    def __call__(self, windows: Iterator[WindowOutput]) -> dict[str, Any]:
        """Decode one recording: `seconds`, `text`, and `words` with `word`, `start` and `end` (seconds)."""
        segmenter, words = Segmenter(self._most_frames, self._vocabulary), []
        for _, logits in windows:
            for segment in segmenter.add(logits.numpy()):
                words += [self._word(one, segment.first) for one in self._decode(segment.logits)]
        for segment in segmenter.close():
            words += [self._word(one, segment.first) for one in self._decode(segment.logits)]
        return {
            "seconds": round(segmenter.frames * self._token_seconds, 3),
            "text": " ".join(one["word"] for one in words),
            "words": words,
        }

    def _word(self, one: TimedWord, first: int) -> dict[str, Any]:
        start, end = (round((first + frame) * self._token_seconds, 3) for frame in (one.first, one.last))
        return {"word": one.word, "start": start, "end": end}


def transcribe(source: Path, options: TranscriptionOptions) -> bool:
    """Transcribe recordings with a fine-tuned run or export.

    Returns:
        False if more than one in a hundred recordings could not be read; each is logged.

    Raises:
        CheckpointError, ConfigError, MachineError, MissingExtraError: with what to do.
    """
    model = load_task(source.resolve(), options.tag)
    if not isinstance(model.task, Ctc):
        raise ConfigError(f"{source}: expected a recogniser, found {model.task.config.name}; use d2v2ds.classify")
    inference = file_inference(model)
    if inference.token_seconds is None:
        raise ConfigError(f"{source}: its inputs have no duration, expected recordings")
    transcriber = Transcriber(model.task, options.decoder, inference.token_seconds, options.window_seconds)
    files = find_files(options.inputs, inference.suffixes)
    windows = window_options(options.window_seconds, options.context_seconds)
    has_words = options.word_times or options.format in SUBTITLES
    kept = ("seconds", "text", "words") if has_words else ("seconds", "text")

    def work() -> str:
        return work_name(model, {**options.decoder.identity(), **asdict(windows), "words": has_words})

    with ExitStack() as stack:
        output = stack.enter_context(_output(options, dict(files), work))
        inputs = InputFiles(inference, [file for file, _ in files], windows, output.done)
        bar = stack.enter_context(tqdm(total=len(files), unit="file", disable=None))
        seconds = 0.0
        for number, outputs in outputs_by_input(model, inputs, inference.fill, device_of(options.device)):
            found = transcriber(outputs)
            if (ended := inputs.end(number)) is not None:
                seconds += found["seconds"]
                output.write(ended.name, {key: found[key] for key in kept}, ended.stamp)
            bar.update(inputs.seen - bar.n)
            bar.set_postfix_str(f"{seconds / 3600:.2f} hours")
    logger.info(
        "%d recordings, %.2f hours; %d were there already, %d could not be read",
        inputs.finished, seconds / 3600, inputs.left_out, inputs.unread,
    )  # fmt: skip
    return not inputs.too_many_unread


@contextmanager
def _output(options: TranscriptionOptions, files: Mapping[Path, str], work: Callable[[], str]) -> Iterator[Output]:
    """Open the place for results.

    Args:
        options: form and place.
        files: names of the recordings.
        work: returns the name of this work, for files that are continued.

    Raises:
        ConfigError: form and place do not fit, or the file is of other work.
    """
    form, place = options.format, options.output
    if form in SUBTITLES:
        if place is None:
            raise ConfigError(f"--format {form}: expected --output FOLDER, for a file for each recording")
        with open_records(place / f"subtitles.{form}.jsonl", work(), "file", changed_since(files)) as records:
            yield SubtitleFolder(place, form, files, records)
    elif place is None:
        yield StandardOutput(lambda name, found: _line(options, name, found))
    elif form == "tsv":
        raise ConfigError("--format tsv is for standard output; leave it out, --output is a file of JSON lines")
    else:
        with open_records(place, work(), "file", changed_since(files)) as records:
            yield records


def _line(options: TranscriptionOptions, name: str, found: dict[str, Any]) -> str:
    if options.format == "tsv":
        return f"{name}\t{found['text']}"
    return json.dumps({"file": name, **found}, ensure_ascii=False)
