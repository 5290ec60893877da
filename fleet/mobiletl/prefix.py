"""The frozen part below the first block that trains: no autograd, a few images at a time."""

import torch
from torch import Tensor

from fleet.mobiletl.chunks import room
from fleet.structure import Step

# Its widest feature maps would set the peak of a whole training step; two
# images at a time take as long as the whole batch.
MICRO_BATCH = 2


def run_prefix(steps: tuple[Step, ...], x: Tensor, micro_batch: int = MICRO_BATCH) -> Tensor:
    """Run frozen steps over a batch.

    Args:
        steps: from the image on; none returns x itself.
        x: (N, 3, S, S).
        micro_batch: images at a time.

    Returns:
        (N, …), an ordinary tensor that a trained layer may keep.
    """
    if not steps:
        return x
    out = None
    for start in range(0, len(x), micro_batch):
        with torch.inference_mode():
            y = x[start : start + micro_batch]
            for step in steps:
                y = step.forward(y)
        if out is None:
            out = room(y, len(x))
        # Autograd refuses to keep inference tensors, so the values are copied out.
        with torch.no_grad():
            out[start : start + micro_batch].copy_(y)
    return out
