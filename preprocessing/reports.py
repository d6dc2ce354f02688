"""Report of each modality, for `verify` and `inspect`.

A report is imported only for a folder of its modality, so that text needs no audio library and vice versa.
"""

from collections.abc import Callable

from preprocessing.driver.protocol import FolderReport


def _audio() -> FolderReport:
    from preprocessing.audio import report as audio_report

    return audio_report


def _text() -> FolderReport:
    from preprocessing.text import report as text_report

    return text_report


def _image() -> FolderReport:
    from preprocessing.image import report as image_report

    return image_report


REPORTS: dict[str, Callable[[], FolderReport]] = {"audio": _audio, "image": _image, "text": _text}
