"""How many images go through a block at a time."""

from collections.abc import Iterator

import torch
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


def room(like: Tensor, length: int) -> Tensor:
    """Room for a batch of what `like` holds a few of, in the same memory format."""
    channels_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (length, *like.shape[1:]),
        dtype=like.dtype,
        device=like.device,
        memory_format=memory_format,
    )
