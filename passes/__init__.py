"""FX passes over Dynamo's graphs, and the Dynamo backend "hwpq" that runs them and hands over to Inductor."""

from .backend import PASSES, HwpqBackend, hwpq
from .inline import inline_attention
from .lower import lower
from .observe import Observed, Recorder, Use, observe

__all__ = [
    "PASSES",
    "HwpqBackend",
    "Observed",
    "Recorder",
    "Use",
    "hwpq",
    "inline_attention",
    "lower",
    "observe",
]
