"""The ways to make a layer 2:4 that accuracy.py, smollm.py and minilm.py compare, and what they need around them."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from operator import add
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
from hwpq_fx.kernels import Float8Sparse24Tensor, best_two, quantize_rows, quantize_weight_rows, select24
from hwpq_fx.kernels.saliency import score
from hwpq_fx.reconstruction import refine

OURS = HWPQConfig()  # its defaults


class Pruned(NamedTuple):
    """A layer after a method: weight [N, K], mask bool [N, K], and a factor for every row or None."""

    weight: torch.Tensor
    mask: torch.Tensor
    factor: torch.Tensor | None = None


class Inputs(NamedTuple):
    """Of a layer's inputs X [R, K]: X^T X float32 [K, K], their sums float64 [K], and R."""

    gram: torch.Tensor
    sums: torch.Tensor
    rows: int


Method = Callable[[torch.Tensor, Inputs], Pruned]
"""Of a weight [N, K] and its inputs."""


def by_score(saliency: str) -> Method:
    """The best two of every four by one of our saliencies, nothing compensated."""

    def method(weight: torch.Tensor, inputs: Inputs) -> Pruned:
        scores = score(weight, inputs.gram.diagonal(), saliency)
        return Pruned(weight, best_two(scores.unflatten(1, (-1, 4))).flatten(1))

    return method


def wanda(weight: torch.Tensor, inputs: Inputs) -> Pruned:
    """Wanda (arXiv 2306.11695): |w| times the norm of its input, the smallest two of every four go by top-k."""
    metric = (weight.abs() * inputs.gram.diagonal().sqrt()).unflatten(1, (-1, 4))
    gone = metric.topk(2, dim=-1, largest=False).indices
    return Pruned(weight, torch.ones_like(metric, dtype=torch.bool).scatter_(-1, gone, False).flatten(1))


def our_mask(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """As the library chooses it."""
    how = (OURS.saliency, OURS.selection, OURS.mean_rate, OURS.dev_rate, OURS.lam)
    return select24(weight, inputs.gram.diagonal(), *how)[0]


def energy(weight: torch.Tensor, inputs: Inputs) -> Pruned:
    """compensation="energy"."""
    mask = our_mask(weight, inputs)
    new, factor = compensate(weight, mask, inputs.gram.diagonal(), "energy", inputs.sums, inputs.rows)
    return Pruned(new, mask, factor)


def cg(rounds: int, steps: int) -> Method:
    """compensation="cg"."""

    def method(weight: torch.Tensor, inputs: Inputs) -> Pruned:
        mask = our_mask(weight, inputs)
        return Pruned(*refine(weight, mask, inputs.gram, rounds, steps, fast=rounded(inputs.gram)))

    return method


METHODS: dict[str, Method] = {
    "magnitude": by_score("magnitude"),
    "rank-one form": by_score("rank_one"),
    "contribution": by_score("contribution"),
    "RIA": by_score("relative"),
    "Wanda": wanda,
    "SparseGPT": lambda weight, inputs: Pruned(*sparsegpt24(weight, inputs.gram)),
    "ALPS": lambda weight, inputs: Pruned(*alps24(weight, inputs.gram)),
    "ours, energy": energy,
    "ours, cg without choosing again": cg(0, 10),
    "ours, cg": cg(OURS.cg_rounds, OURS.cg_steps),
}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the head."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


@torch.no_grad()
def inputs_of(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Inputs]:
    """What is to be known of every linear layer's input; rows of padding (attention_mask 0) do not count."""
    found: dict[str, Inputs] = {}
    real: torch.Tensor | None = None

    def hook(name: str) -> Callable[..., None]:
        def gather(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # a pooler sees one row of each sequence, and no padding
            rows = args[0] if args[0].dim() == 2 else args[0].flatten(0, 1) if real is None else args[0][real]
            rows = rows.float()
            new = Inputs(rows.T @ rows, rows.sum(0, dtype=torch.float64), len(rows))
            found[name] = Inputs(*map(add, found[name], new)) if name in found else new

        return gather

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears(model).items()]
    for batch in batches:
        real = batch["attention_mask"].bool() if "attention_mask" in batch else None
        model(**batch)
    for one in hooks:
        one.remove()
    return found


def pruned(model: nn.Module, inputs: Mapping[str, Inputs], method: Method) -> tuple[nn.Module, float]:
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
