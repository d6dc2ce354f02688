"""The mask samplers written as the slowest obvious loops, one row at a time, from given random numbers."""

from d2v2ds.masking import MaskConfig


def mask_row(config: MaskConfig, num_tokens: int, numbers: list[float]) -> list[bool]:
    """One mask. `numbers` holds one random number per block centre, then one per token."""
    if config.kind == "random":
        kept = set(
            sorted(range(num_tokens), key=lambda i: numbers[i])[: int(num_tokens * (1 - config.masked_fraction))]
        )
        return [i not in kept for i in range(num_tokens)]

    fraction = 1 - config.masked_fraction if config.inverse else config.masked_fraction
    area = config.block_length if config.kind == "block_1d" else config.block_length**2
    num_centres = int(num_tokens * (fraction + config.adjust) / area)
    target = int(num_tokens * fraction)

    chosen = blocks_row(config, num_tokens, numbers[:num_centres])
    order = sorted(range(num_tokens), key=lambda i: numbers[num_centres + i])
    if sum(chosen) > target:
        survivors = set([i for i in order if chosen[i]][:target])
        chosen = [i in survivors for i in range(num_tokens)]
    for i in order:
        if sum(chosen) < target and not chosen[i]:
            chosen[i] = True
    return [not c for c in chosen] if config.inverse else chosen


def blocks_row(config: MaskConfig, num_tokens: int, numbers: list[float]) -> list[bool]:
    """The union of the blocks of one row, before the count is adjusted."""
    chosen = [False] * num_tokens
    length = config.block_length
    for number in numbers:
        centre = int(number * num_tokens)
        if config.kind == "block_1d":
            for i in range(length):
                chosen[clamp(centre + i - length // 2, num_tokens)] = True
        else:
            width = config.columns or round(num_tokens**0.5)
            for i in range(length):
                for j in range(length):
                    row = clamp(centre // width + i - length // 2, num_tokens // width)
                    column = clamp(centre % width + j - length // 2, width)
                    chosen[row * width + column] = True
    return chosen


def clamp(position: int, size: int) -> int:
    return min(max(position, 0), size - 1)
