"""Speech from the espeak-ng library of the `espeakng-loader` wheel, through ctypes. Offline, nothing is installed.

The library keeps its state in globals: one `Espeak` at a time, in one thread, and no voice without `say`'s settings.
"""

import ctypes
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from d2v2ds.errors import MissingExtraError

_SYNCHRONOUS_OUTPUT = 2
_UTF8 = 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The synthesiser, as a context manager.

    Raises:
        MissingExtraError: if the wheel is not installed.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise MissingExtraError("synthetic voices need espeakng-loader", "demo") from error
        self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        self._data_path = espeakng_loader.get_data_path()
        self._parts: list[NDArray[np.int16]] = []
        self._callback = _CALLBACK(self._receive)  # kept: the library calls it as long as it runs
        self.sample_rate_hz = 0

    def __enter__(self) -> Self:
        path = self._data_path.encode()
        self.sample_rate_hz = self._library.espeak_Initialize(_SYNCHRONOUS_OUTPUT, 0, path, 0)
        if self.sample_rate_hz <= 0:
            raise RuntimeError(f"espeak-ng could not read its data in {self._data_path}; reinstall espeakng-loader")
        self._library.espeak_SetSynthCallback(self._callback)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.espeak_Terminate()

    def say(
        self, text: str, voice: str, *, seed: int, rate: int = 175, pitch: int = 50, pitch_range: int = 50
    ) -> NDArray[np.int16]:
        """(S,) int16 samples at `sample_rate_hz`.

        Args:
            text: what to say.
            voice: language and variant, such as ``en-us+f3``.
            seed: of the breath noise of some voices, which is otherwise seeded by the clock.
            rate: words per minute.
            pitch: 0 to 100.
            pitch_range: 0 (monotone) to 100.

        Raises:
            ValueError: if the library does not know the voice.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._parts = []
        encoded = text.encode() + b"\0"
        status = self._library.espeak_Synth(encoded, len(encoded), 0, 0, 0, _UTF8, None, None)
        if status != 0 or self._library.espeak_Synchronize() != 0:
            raise RuntimeError(f"espeak-ng could not say {text!r} (status {status})")
        return np.concatenate(self._parts) if self._parts else np.empty(0, dtype=np.int16)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0
