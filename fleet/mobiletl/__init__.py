"""MobileTL: fine-tune the top blocks of a mobile CNN and keep little for backward.

Source: Chiang et al., MobileTL: On-Device Transfer Learning with Inverted
Residual Blocks, AAAI 2023, arXiv:2212.03246.

- `functional`: the method's operations, each of which says what it keeps for backward;
- `blocks`: inverted residuals and tails made of them, as published;
- `inverted_residual`: the same block as one function, a few images at a time,
  which keeps what `stash` says; `convolution` is what it is made of;
- `frozen`, `prefix`: what does not train, and keeps nothing;
- `model`: a backbone run as an update plan says.
"""

from fleet.mobiletl.model import TransferModel, first_trained_step

__all__ = ["TransferModel", "first_trained_step"]
