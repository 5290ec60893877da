"""A classifier in closed form: moments of features, added up over clients and solved for a head."""

from fleet.closed_form.moments import Moments, moments_of, step_exponent, total
from fleet.closed_form.ridge import Ridge, fit_ridge, solve
from fleet.closed_form.wire import decode_moments, encode_moments

__all__ = [
    "Moments",
    "Ridge",
    "decode_moments",
    "encode_moments",
    "fit_ridge",
    "moments_of",
    "solve",
    "step_exponent",
    "total",
]
