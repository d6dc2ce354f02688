"""The dimension glossary of the project and the length arithmetic of the front ends. Pure functions.

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
"""Token id of padding, in every vocabulary of this project (spec section 3.3)."""

AUDIO_CONV_LAYERS: tuple[ConvLayer, ...] = (
    (512, 10, 5),
    (512, 3, 2),
    (512, 3, 2),
    (512, 3, 2),
    (512, 3, 2),
    (512, 2, 2),
    (512, 2, 2),
)
"""The published speech front end: total stride 320, receptive field 400 (spec section 3.1)."""

AUDIO_NORM_EPS = 1e-5
"""Added to the variance of a recording before its root divides the samples (spec section 14)."""


def resized_side(side: int) -> int:
    """Pixels of the shorter side of an image before the square of `side` pixels in its middle is taken.

    From 224 pixels on 256/224 of the square, as published results are measured; smaller ones just hold the square.
    """
    return round(side * 256 / 224) if side >= 224 else side


def conv_output_length(num_samples: int, layers: Sequence[ConvLayer]) -> int:
    """Tokens that an unpadded stack of strided convolutions makes of a waveform.

    The floor is taken layer by layer, which one division by the total stride does not reproduce.

    Args:
        num_samples: length of the waveform, in samples.
        layers: (channels, kernel, stride) of each layer, in order.

    Returns:
        The number of tokens T; 0 if the waveform is shorter than the receptive field.
    """
    length = num_samples
    for _, kernel, stride in layers:
        length = (length - kernel) // stride + 1 if length >= kernel else 0
    return length


def shortest_input(num_tokens: int, layers: Sequence[ConvLayer]) -> int:
    """Samples that so many neighbouring tokens of an unpadded stack see; of one token: its receptive field.

    Args:
        num_tokens: 1 or more.
        layers: (channels, kernel, stride) of each layer, in order.
    """
    length = num_tokens
    for _, kernel, stride in reversed(layers):
        length = (length - 1) * stride + kernel
    return length
