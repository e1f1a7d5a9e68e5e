"""FX passes over Dynamo's graphs, and the Dynamo backend "hwpq" that runs them and hands over to Inductor."""

from .backend import PASSES, HwpqBackend, hwpq, rewrite
from .inline import inline_attention
from .lower import lower
from .merge import Siblings, merge, merged_of
from .observe import Observed, Recorder, Use, observe
from .stages import Stage, Staged, Steps, stages

__all__ = [
    "PASSES",
    "HwpqBackend",
    "Observed",
    "Recorder",
    "Siblings",
    "Stage",
    "Staged",
    "Steps",
    "Use",
    "hwpq",
    "inline_attention",
    "lower",
    "merge",
    "merged_of",
    "observe",
    "rewrite",
    "stages",
]
