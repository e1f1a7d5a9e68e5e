"""The layers of a model: every parameter that a product may use, under the name a user gives it."""

from dataclasses import dataclass

import torch
from torch import nn

from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.passes import Use

from .errors import ModelError


@dataclass
class Layer:
    """A 2-D floating point parameter, its owner, and all names it goes by."""

    name: str
    """As in `targets` and the report: the module's name, or the parameter's where it is not called "weight"."""
    owner: nn.Module
    attribute: str
    parameter: nn.Parameter
    aliases: list[str]
    """Names of other places that hold the same parameter (tied weights)."""

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


def layers_of(model: nn.Module) -> list[Layer]:
    """Every 2-D floating point parameter of the model once, tied ones under their first name."""
    found: dict[int, Layer] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = prefix if attribute == "weight" and prefix else f"{prefix}.{attribute}".lstrip(".")
            known = found.get(id(parameter))
            if known is None and parameter.dim() == 2 and parameter.is_floating_point():
                found[id(parameter)] = Layer(name, module, attribute, parameter, [])
            elif known is not None and (known.owner is not module or known.attribute != attribute):
                known.aliases.append(name)
    return list(found.values())


def check_convertible(model: nn.Module) -> None:
    """Raise ModelError for a model in training mode, on the meta device, or converted already."""
    for name, module in model.named_modules():
        if module.training:
            where = f"module {name!r}" if name else "the model"
            raise ModelError(f"{where} is in training mode: call model.eval() before converting")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Float8Sparse24Tensor):
            raise ModelError(f"{name} is packed already: this model has been converted; load the dense one again")
        if parameter.is_meta:
            raise ModelError(f"{name} is on the meta device and holds no weights: load the model before converting")


def replace(layer: Layer, weight: torch.Tensor) -> None:
    """Put `weight` in the parameter's place."""
    layer.owner.register_parameter(layer.attribute, nn.Parameter(weight, requires_grad=False))
