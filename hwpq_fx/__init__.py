"""2:4 sparse FP8 for models that use `torch.compile`.

model = hwpq_fx.convert(torch.compile(model), calib)
"""

# ruff: noqa: E402  (torchao first, quietly)
from ._torchao import import_torchao

import_torchao()

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import quantize as _quantize  # noqa: F401  (registers with torchao.quantize_)
from .config import HWPQConfig
from .conversion import convert, plan, prepare
from .errors import CalibrationError, CheckpointError, ConfigError, HWPQError, ModelError
from .explain import Explanation, explain
from .export import export
from .folder import save_pretrained
from .kernels import Float8Sparse24Tensor
from .offload import compress_checkpoint
from .on_import import when_imported
from .plan import Plan, PlannedLayer
from .report import LayerReport, Report, report
from .torchao_tensor import from_torchao, to_torchao

if TYPE_CHECKING:
    from .transformers_quantizer import HWPQTransformersConfig

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "Explanation",
    "Float8Sparse24Tensor",
    "HWPQConfig",
    "HWPQError",
    "HWPQTransformersConfig",
    "LayerReport",
    "ModelError",
    "Plan",
    "PlannedLayer",
    "Report",
    "compress_checkpoint",
    "convert",
    "explain",
    "export",
    "from_torchao",
    "plan",
    "prepare",
    "report",
    "save_pretrained",
    "to_torchao",
]


def _register() -> Any:
    return import_module(f"{__name__}.transformers_quantizer")


# importing transformers here would take a second of everybody's time
when_imported("transformers.quantizers.auto", _register)


def __getattr__(name: str) -> Any:
    if name == "HWPQTransformersConfig":
        return _register().HWPQTransformersConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
