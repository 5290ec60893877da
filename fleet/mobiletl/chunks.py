"""How many images go through a block at a time."""

from collections.abc import Iterator

from torch import Tensor

# Two images of 14×14 or eight of 7×7. More take more memory; fewer take longer.
CHUNK_PIXELS = 392


def images_in_chunk(x: Tensor) -> int:
    """As many as have `CHUNK_PIXELS` of a map x (N, C, H, W), and at least one; (N, C) has one."""
    return max(1, CHUNK_PIXELS // x.shape[2:].numel())


def chunks(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, end to end."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
