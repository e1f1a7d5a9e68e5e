"""The ways to make a layer 2:4 that accuracy.py and minilm.py compare, and what both need around them."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from alps import alps24
from rounds import machine
from sparsegpt import sparsegpt24
from torch import nn

from hwpq_fx import HWPQConfig
from hwpq_fx.bench.machine import describe_machine
from hwpq_fx.compensation import compensate
from hwpq_fx.compress import rounded
from hwpq_fx.kernels import Float8Sparse24Tensor, best_two, quantize_rows, quantize_weight_rows
from hwpq_fx.kernels.saliency import score
from hwpq_fx.reconstruction import refine

OURS = HWPQConfig()  # its defaults


class Pruned(NamedTuple):
    """A layer after a method: weight [N, K], mask bool [N, K], and a factor for every row or None."""

    weight: torch.Tensor
    mask: torch.Tensor
    factor: torch.Tensor | None = None


Method = Callable[[torch.Tensor, torch.Tensor], Pruned]
"""Of a weight [N, K] and its inputs' X^T X [K, K]."""


def by_score(saliency: str) -> Method:
    """The best two of every four by one of our saliencies, nothing compensated."""

    def method(weight: torch.Tensor, gram: torch.Tensor) -> Pruned:
        scores = score(weight, gram.diagonal(), saliency)
        return Pruned(weight, best_two(scores.unflatten(1, (-1, 4))).flatten(1))

    return method


def wanda(weight: torch.Tensor, gram: torch.Tensor) -> Pruned:
    """Wanda (arXiv 2306.11695): |w| times the norm of its input, the smallest two of every four go by top-k."""
    metric = (weight.abs() * gram.diagonal().sqrt()).unflatten(1, (-1, 4))
    gone = metric.topk(2, dim=-1, largest=False).indices
    return Pruned(weight, torch.ones_like(metric, dtype=torch.bool).scatter_(-1, gone, False).flatten(1))


def energy(weight: torch.Tensor, gram: torch.Tensor) -> Pruned:
    """compensation="energy"."""
    mask = by_score(OURS.saliency)(weight, gram).mask
    return Pruned(weight, mask, compensate(weight, mask, gram.diagonal(), "energy"))


def cg(rounds: int, steps: int) -> Method:
    """compensation="cg"."""

    def method(weight: torch.Tensor, gram: torch.Tensor) -> Pruned:
        mask = by_score(OURS.saliency)(weight, gram).mask
        return Pruned(*refine(weight, mask, gram, rounds, steps, fast=rounded(gram)))

    return method


METHODS: dict[str, Method] = {
    "magnitude": by_score("magnitude"),
    "rank-one form": by_score("rank_one"),
    "contribution": by_score("contribution"),
    "RIA": by_score("relative"),
    "Wanda": wanda,
    "SparseGPT": lambda weight, gram: Pruned(*sparsegpt24(weight, gram)),
    "ALPS": lambda weight, gram: Pruned(*alps24(weight, gram)),
    "ours, energy": energy,
    "ours, cg without choosing again": cg(0, 20),
    "ours, cg": cg(OURS.cg_rounds, OURS.cg_steps),
}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the head."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


@torch.no_grad()
def grams(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """X^T X of every linear layer's input, float32 [K, K]; rows of padding (attention_mask 0) do not count."""
    found: dict[str, torch.Tensor] = {}
    real: torch.Tensor | None = None

    def hook(name: str) -> Callable[..., None]:
        def gather(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # a pooler sees one row of each sequence, and no padding
            rows = args[0] if args[0].dim() == 2 else args[0].flatten(0, 1) if real is None else args[0][real]
            found[name] = found.get(name, 0) + rows.float().T @ rows.float()

        return gather

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears(model).items()]
    for batch in batches:
        real = batch["attention_mask"].bool() if "attention_mask" in batch else None
        model(**batch)
    for one in hooks:
        one.remove()
    return found


def pruned(model: nn.Module, inputs: Mapping[str, torch.Tensor], method: Method) -> tuple[nn.Module, float]:
    """A copy of the model with every layer as it is once pruned and packed, FP8 activations included, and the seconds
    that the method took.

    The products are plain ones of what packed weights and rounded activations stand for: how a packed weight computes
    them depends on machine and shape, rounding the result to bfloat16 or not, the activations on a GPU or not.
    """
    model, seconds = copy.deepcopy(model), 0.0
    layers = linears(model)
    for name, module in {module.weight.shape: (name, module) for name, module in layers.items()}.values():
        method(module.weight.detach(), inputs[name])  # not timed: kernels are compiled, libraries loaded
    for name, module in layers.items():
        weight = module.weight.detach()
        start = _now(weight.device)
        new = method(weight, inputs[name])
        seconds += _now(weight.device) - start
        packed = Float8Sparse24Tensor.from_hp(new.weight, new.mask, "dynamic", new.factor)
        _put(module, packed.dequantize(weight.dtype))
    return model, seconds


def plain(model: nn.Module) -> nn.Module:
    """A converted model, in place, with its packed weights computing as those of `pruned` do."""
    for module in linears(model).values():
        if isinstance(module.weight, Float8Sparse24Tensor):
            _put(module, module.weight.dequantize(torch.float32))
    return model


def dense_fp8(model: nn.Module) -> nn.Module:
    """A copy with weights and activations rounded to e4m3 with a scale per row, nothing pruned."""
    model = copy.deepcopy(model)
    for module in linears(model).values():
        values, scale = quantize_weight_rows(module.weight.detach())
        _put(module, (values.float() * scale).to(module.weight.dtype))
    return model


def where(device: torch.device) -> dict[str, Any]:
    """The machine that figures were measured on."""
    return describe_machine() if device.type == "cuda" else machine()


def _put(module: nn.Linear, weight: torch.Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.register_forward_pre_hook(_rounded)


def _rounded(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    values, scale = quantize_rows(args[0])
    return ((values.float() * scale).to(args[0].dtype),)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
