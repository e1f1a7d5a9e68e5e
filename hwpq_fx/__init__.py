"""2:4 sparse FP8 for models that use `torch.compile`.

model = hwpq_fx.convert(torch.compile(model), calib)
"""

# ruff: noqa: E402  (torchao first, quietly)
from ._torchao import import_torchao

import_torchao()

from .config import HWPQConfig
from .conversion import convert, prepare
from .errors import CalibrationError, ConfigError, HWPQError, ModelError
from .explain import Explanation, explain
from .kernels import Float8Sparse24Tensor
from .report import LayerReport, Report, report

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "ConfigError",
    "Explanation",
    "Float8Sparse24Tensor",
    "HWPQConfig",
    "HWPQError",
    "LayerReport",
    "ModelError",
    "Report",
    "convert",
    "explain",
    "prepare",
    "report",
]
