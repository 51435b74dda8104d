"""Wrong and odd use that a scientist may try: each is refused alike on every rank, or right."""

from . import models, parting, placing, shapes, values
from .table import CASES, guarded, outcome, whole

__all__ = [
    "CASES",
    "guarded",
    "models",
    "outcome",
    "parting",
    "placing",
    "shapes",
    "values",
    "whole",
]
