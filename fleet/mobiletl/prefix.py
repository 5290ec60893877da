"""The frozen part below the first block that trains: no autograd, a few images at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fleet.mobiletl.chunks import room
from fleet.mobiletl.frozen import Part, run_frozen

# Its widest feature maps would set the peak of a whole training step; two
# images at a time take as long as the whole batch.
MICRO_BATCH = 2


def run_prefix(parts: Sequence[Part], x: Tensor, micro_batch: int = MICRO_BATCH) -> Tensor:
    """Run frozen parts over a batch, their norms folded into their convs.

    Args:
        parts: from the image on; none returns x itself.
        x: (N, 3, S, S).
        micro_batch: images at a time.

    Returns:
        (N, …), an ordinary tensor that a trained layer may keep.
    """
    if not parts:
        return x
    out = None
    for start in range(0, len(x), micro_batch):
        with torch.inference_mode():
            y = run_frozen(parts, x[start : start + micro_batch])
        if out is None:
            out = room(y, len(x))
        # Autograd refuses to keep inference tensors, so the values are copied out.
        with torch.no_grad():
            out[start : start + micro_batch].copy_(y)
    return out
