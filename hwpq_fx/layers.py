"""The layers of a model: every parameter that a product may use, under the name a user gives it."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torchao.utils import TorchAOBaseTensor

from hwpq_fx.passes import Use
from hwpq_fx.passes.dynamo import unwrap

from .config import DEFAULT_IGNORE, HWPQConfig
from .errors import ModelError
from .targets import check_all_match, matches

OBSERVER = "_hwpq_observer"
"""Where `quantize_` with step="prepare" keeps what it observes of a module."""
STACKED = "3-D, a matrix per expert or head: only 2-D weights are converted"
"""Why what `stacked_of` finds stays dense."""
ROUTER = "chooses among experts: little to gain, much to lose; name it in targets to convert it"


@dataclass
class Layer:
    """A 2-D floating point parameter, its owner, and all names it goes by."""

    names: list[str]
    """As in `targets`: the module's name, or the parameter's where it is not called "weight"."""
    owner: nn.Module
    attribute: str
    parameter: nn.Parameter
    tied: list[str]
    """Those of the names that belong to other places that hold the same parameter."""
    routes: bool = False
    """Whether its outputs choose among experts."""

    @property
    def name(self) -> str:
        """As in the report: the first one."""
        return self.names[0]

    @property
    def static_use(self) -> Use | None:
        """How the owner's own forward multiplies by it, where its class tells; None for other owners."""
        rows, cols = self.parameter.shape
        if isinstance(self.owner, nn.Linear) and self.attribute == "weight":
            return Use(False, 0, rows)
        if isinstance(self.owner, nn.MultiheadAttention) and self.attribute.endswith("proj_weight"):
            return Use(False, 0, rows)
        # transformers' GPT-2 style layer keeps [in, out]; told by name, so that transformers need not be imported
        if type(self.owner).__name__ == "Conv1D" and type(self.owner).__module__ == "transformers.pytorch_utils":
            return Use(True, 0, cols)
        return None

    @property
    def unsure(self) -> str:
        """Why `static_use` may not be the whole story where no trace has seen it, or ""."""
        known = next((kind for kind in (nn.Linear, nn.MultiheadAttention) if isinstance(self.owner, kind)), None)
        if known is None or type(self.owner).forward is known.forward:
            return ""
        name = type(self.owner).__name__
        return f"{name} has a forward of its own: hwpq_fx.convert with calibration sees what that does with the weight"


def module_of(model: Any) -> nn.Module:
    """The module, which `torch.compile` may have wrapped. Raises TypeError for anything else, a function say."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: an nn.Module or torch.compile(module) is wanted")
    return unwrap(model)


def check_patterns(layers: Iterable[Layer], config: HWPQConfig) -> None:
    """Raise ConfigError for a pattern of the user's that matches no layer."""
    names = [name for layer in layers for name in layer.names]
    check_all_match("targets", config.targets or (), names)
    check_all_match("ignore", [pattern for pattern in config.ignore if pattern not in DEFAULT_IGNORE], names)


def is_target(layer: Layer, config: HWPQConfig) -> bool:
    """Whether the user names it as one to convert."""
    return config.targets is not None and _any_match(layer, config.targets)


def left_out(layer: Layer, config: HWPQConfig) -> str:
    """Why a layer stays dense whatever it is and whatever calibration sees, or ""."""
    if layer.tied:  # said even of what is ignored as well: taking it off that list would not help
        return f"shared with {', '.join(layer.tied)}"
    if _any_match(layer, config.ignore):
        return "ignored"
    if config.targets is None:
        return ROUTER if layer.routes else ""
    return "" if is_target(layer, config) else "not in targets"


def _any_match(layer: Layer, patterns: Iterable[str]) -> bool:
    return any(matches(name, pattern) for name in layer.names for pattern in patterns)


def layers_of(model: nn.Module) -> list[Layer]:
    """Every 2-D floating point parameter of the model once, tied ones under their first name."""
    found: dict[int, Layer] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = _as_written(path)
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = prefix if attribute == "weight" and prefix else f"{prefix}.{attribute}".lstrip(".")
            known = found.get(id(parameter))
            if known is not None:
                known.names.append(name)
                if known.owner is not module or known.attribute != attribute:
                    known.tied.append(name)
            elif not is_lazy(parameter) and parameter.dim() == 2 and parameter.is_floating_point():
                found[id(parameter)] = Layer([name], module, attribute, parameter, [])
    experts = [(name.split("."), parameter.shape) for name, parameter in stacked_of(model)]
    for layer in found.values():
        layer.routes = any(_routes(layer, name, shape) for name, shape in experts)
    return list(found.values())


def _routes(layer: Layer, experts: list[str], shape: torch.Size) -> bool:
    """Whether a layer stands beside experts [E, ., .], the parts of their name given, and makes a number for each of
    them from what they take: "mlp.gate" or "mlp.router.layer" beside "mlp.experts.down_proj"."""
    block, (count, channels), name = experts[:-2], layer.parameter.shape, layer.name.split(".")
    beside = name[: len(block)] == block and name[: len(block) + 1] != experts[:-1] and len(name) <= len(block) + 2
    return beside and count == shape[0] and channels in shape[1:]


def _as_written(path: str) -> str:
    """A module's name without what `torch.compile` adds for parts that were compiled one by one."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def stacked_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Weights that hold a matrix for each expert, [experts, ., .]: not converted, but often most of the model."""
    return [
        (f"{_as_written(path)}.{attribute}".lstrip("."), parameter)
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")  # convolutions
        for attribute, parameter in module.named_parameters(recurse=False)
        if not is_lazy(parameter) and parameter.dim() == 3 and min(parameter.shape) > 1
    ]


def check_convertible(model: nn.Module) -> None:
    """Raise ModelError for a model in training mode, without weights yet, in TorchScript, prepared by
    `quantize_`, sharded, or converted already."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module cannot be traced by Dynamo: convert the nn.Module it was made from")
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if module.training:
            raise ModelError(f"{where} is in training mode: call model.eval() before converting")
        if OBSERVER in vars(module):
            raise ModelError(f'{name or "it"} was prepared by quantize_: finish with quantize_ and step="convert"')
        if _sharded(module):
            raise ModelError(f"{where} is sharded by FSDP: convert before it is sharded (or wrapped) for training")
    for name, parameter in model.named_parameters():
        if _distributed(parameter):
            raise ModelError(f"{name} is a DTensor: convert before the model is cut for several devices")
        if isinstance(parameter, TorchAOBaseTensor):
            raise ModelError(
                f"{name} is a {type(parameter).__name__}: this model has been converted or quantized already; load the "
                "dense one again"
            )
        if is_lazy(parameter):
            raise ModelError(f"{name} has no shape yet: run the model once before converting")
        if parameter.is_meta:
            raise ModelError(f"{name} is on the meta device and holds no weights: load the model before converting")


def _sharded(module: nn.Module) -> bool:
    """Whether FSDP, 1 or 2, manages its parameters: what is put in their place it takes away again."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def _distributed(parameter: nn.Parameter) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(parameter, tensor.DTensor)


def put(layer: Layer, weight: torch.Tensor) -> None:
    """Put `weight` in the parameter's place; a parameter goes there itself."""
    parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    layer.owner.register_parameter(layer.attribute, parameter)


def without_nested_tensors(model: nn.Module) -> None:
    """Keep encoders from making nested tensors of padded inputs, which packed weights do not take: torch asks the first
    layer alone."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            packed = any(isinstance(weight, TorchAOBaseTensor) for weight in encoder.parameters())
            encoder.use_nested_tensor = encoder.use_nested_tensor and not packed
