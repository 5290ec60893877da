"""MobileTL: fine-tune the top blocks of a mobile CNN and keep little for backward.

Source: Chiang et al., MobileTL: On-Device Transfer Learning with Inverted
Residual Blocks, AAAI 2023, arXiv:2212.03246.

- `functional`: the operations, each of which says what it keeps for backward;
- `blocks`: inverted residuals and tails made of them;
- `prefix`: the frozen part, which keeps nothing;
- `model`: a backbone run as an update plan says.
"""

from fleet.mobiletl.model import TransferModel

__all__ = ["TransferModel"]
