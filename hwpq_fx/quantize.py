"""`torchao.quantize_(model, HWPQConfig(...))`: the same conversion, module by module, as torchao drives it.

quantize_ shows one module at a time: there is no name, no padding mask and no graph. Layers are chosen by its
`filter_fn` or by torchao's FqnToConfig, rows of padding count, and weights that a graph would have found outside of
nn.Linear stay as they are. On batches without padding masks and bits are those of `hwpq_fx.convert` with
`sequential=False`.
"""

import logging
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

from hwpq_fx.kernels import FORMAT_K, Float8Sparse24Tensor
from hwpq_fx.kernels.transforms import outside_transforms
from hwpq_fx.passes import Use

from .compress import cannot_compress, check_packing_format, check_weight, compress, fast
from .config import DEFAULT_IGNORE, SPARSE_2D, HWPQConfig
from .context import as_written
from .curvature import CurvatureBudget
from .errors import CalibrationError, ConfigError, ModelError
from .layers import OBSERVER, Layer
from .statistics import InputStatistics
from .torchao_tensor import to_torchao

logger = logging.getLogger("hwpq_fx")
_observing: "WeakSet[ModuleObserver]" = WeakSet()


class ModuleObserver:
    """Gathers what calibration needs of one linear layer's input, as a forward pre-hook."""

    nbytes: int
    """Of its curvature."""

    def __init__(self, module: nn.Module, channels: int, device: torch.device, curvature_bytes: int | None):
        # quantize_ shows one module at a time, and the bound is for all of them
        taken = sum(other.nbytes for other in _observing)
        curvature = CurvatureBudget(curvature_bytes, taken).grant(channels, device)
        self.statistics = InputStatistics(channels, device, curvature)
        self.nbytes = curvature.nbytes if curvature is not None else 0
        _observing.add(self)
        self._hook = module.register_forward_pre_hook(self._observe, with_kwargs=True)
        self._calls = 0

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with outside_transforms(args[0] if args else kwargs["input"]) as x:
            self.statistics.update(x, call=self._calls)
        self._calls += 1

    def remove(self) -> None:
        self._hook.remove()
        _observing.discard(self)


@register_quantize_module_handler(HWPQConfig)
def quantize_module(module: nn.Module, config: HWPQConfig, *, parameter_name: str = "weight") -> nn.Module:
    """What `quantize_` calls for each module. A layer that the format cannot hold stays dense, with a warning.

    Raises ConfigError for a config that chooses layers by name, CalibrationError where no batch was seen between
    "prepare" and "convert", or one with NaN or Inf, ModelError for NaN or Inf in the weight.
    """
    parameter = getattr(module, parameter_name)
    what = f"{type(module).__name__} {'x'.join(map(str, parameter.shape))}"
    if config.targets is not None or config.ignore != list(DEFAULT_IGNORE):
        raise ConfigError("quantize_ shows no names: choose layers by its filter_fn or by FqnToConfig")
    if config.sequential:
        raise ConfigError("sequential needs the whole model's graph: use hwpq_fx.convert")
    if config.bounded:
        raise ConfigError(
            "max_loss, max_divergence and min_speedup weigh layers against each other: use hwpq_fx.convert"
        )
    check_packing_format(config, parameter.device)
    if isinstance(parameter, TorchAOBaseTensor):
        raise ModelError(f"{what} is a {type(parameter).__name__}: it has been converted or quantized already")
    layer = Layer([what], module, parameter_name, parameter, [])
    use = layer.static_use if parameter.dim() == 2 else None
    reason = cannot_compress(layer, [use], config) if use else "not a linear layer with a 2-D weight"
    if config.step != "prepare_for_loading":  # what is loaded was packed by someone who knew
        reason = layer.unsure or reason
    if reason:
        logger.warning("%s stays dense: %s", what, reason)
        return module
    assert use is not None
    if config.step == "prepare":
        _prepare(module, layer, use, config)
        return module
    if config.step == "prepare_for_loading":
        new: torch.Tensor = _empty(parameter, use, config)
    else:
        observers = [_observer(module, layer)] if config.step == "convert" else []
        check_weight(layer)
        with as_written():
            statistics = {use: [observer.statistics for observer in observers]}
            new = fast(compress(what, parameter, statistics, config), config)
        for observer in observers:
            observer.remove()
            delattr(module, OBSERVER)
    setattr(module, parameter_name, nn.Parameter(new, requires_grad=False))
    return module


def _prepare(module: nn.Module, layer: Layer, use: Use, config: HWPQConfig) -> None:
    if hasattr(module, OBSERVER):
        raise CalibrationError(f'{layer.name} is prepared already: run batches, then quantize_ with step="convert"')
    channels = layer.parameter.shape[0 if use.transposed else 1]
    observer = ModuleObserver(module, channels, layer.parameter.device, config.gathered_bytes)
    # not a buffer: it is neither saved nor moved
    object.__setattr__(module, OBSERVER, observer)


def _observer(module: nn.Module, layer: Layer) -> ModuleObserver:
    observer = module.__dict__.get(OBSERVER)
    if observer is None:
        raise CalibrationError(f'{layer.name} has no observer: quantize_ with step="prepare" and run batches first')
    if observer.statistics.rows == 0:
        raise CalibrationError(f"{layer.name} has seen no batch since it was prepared")
    return observer


def _empty(parameter: torch.Tensor, use: Use, config: HWPQConfig) -> torch.Tensor:
    """A packed weight that holds nothing yet: `load_state_dict` of a converted model fills it."""
    rows, cols = parameter.shape[::-1] if use.transposed else parameter.shape
    device = parameter.device
    weight = Float8Sparse24Tensor(
        torch.zeros(rows, cols // 2, dtype=torch.float8_e4m3fn, device=device),
        torch.full((rows, cols // FORMAT_K), 0x44, dtype=torch.uint8, device=device),
        torch.ones(rows, 1, dtype=torch.float32, device=device),
        config.activation,
        False,
        parameter.dtype,
    )
    if config.packing_format == SPARSE_2D:
        return to_torchao(weight)
    weight = weight.expand() if config.layout == "fastest" else weight
    return weight.t() if use.transposed else weight
