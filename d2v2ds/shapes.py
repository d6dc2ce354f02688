"""Dimension letters of the project and the length arithmetic of the front ends. Pure functions.

    B samples   M masks per sample   R = B*M student rows   S raw samples or characters
    T tokens after the local encoder K visible tokens       U masked tokens
    D width     H heads              Dh head width          L layers   E extra tokens   V vocabulary
    Gh,Gw patch grid                 C,Y,X image channel, rows, columns

Student rows are sample-major: row ``b*M + m``. A mask is boolean and True means *masked*; padding is
boolean and True means *pad*.
"""

from collections.abc import Sequence

ConvLayer = tuple[int, int, int]
"""One layer of the waveform front end: (channels, kernel, stride)."""

PAD_ID = 1
"""Token id of padding in every vocabulary of this project, as in fairseq's dictionaries."""

AUDIO_CONV_LAYERS: tuple[ConvLayer, ...] = (
    (512, 10, 5),
    (512, 3, 2),
    (512, 3, 2),
    (512, 3, 2),
    (512, 3, 2),
    (512, 2, 2),
    (512, 2, 2),
)
"""Published speech front end (arXiv 2006.11477): total stride 320, receptive field 400."""

AUDIO_NORM_EPS = 1e-5
"""Epsilon of the normalisation of recordings to zero mean and unit variance."""


def resized_side(side: int) -> int:
    """Return the pixels of an image's shorter side before the middle square of `side` pixels is cropped.

    Up to 224 pixels, 8/7 of the square (256 for 224), above that, the square itself, as in published evaluations.
    """
    return int(side / 0.875) if side <= 224 else side


def conv_output_length(num_samples: int, layers: Sequence[ConvLayer]) -> int:
    """Return the number of tokens that an unpadded stack of strided convolutions makes of a waveform.

    Each layer rounds down, so one division by the total stride gives another number.

    Args:
        num_samples: length of the waveform, in samples.
        layers: (channels, kernel, stride) of each layer, in order.

    Returns:
        T; 0 if the waveform is shorter than the receptive field.
    """
    length = num_samples
    for _, kernel, stride in layers:
        length = (length - kernel) // stride + 1 if length >= kernel else 0
    return length


def shortest_input(num_tokens: int, layers: Sequence[ConvLayer]) -> int:
    """Return the samples that neighbouring tokens of an unpadded stack depend on; for one token, its receptive field.

    Args:
        num_tokens: 1 or more.
        layers: (channels, kernel, stride) of each layer, in order.
    """
    length = num_tokens
    for _, kernel, stride in reversed(layers):
        length = (length - 1) * stride + kernel
    return length
