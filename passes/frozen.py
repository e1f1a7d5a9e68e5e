"""The frozen pass: gradients go through torchao's dense FP8 products, to what comes before them.

before   %y = linear(%x, %weight, %bias)            with %weight a Float8Tensor, and a gradient wanted
after    %y = frozen_linear(%x, %weight, %bias)

`aten._scaled_mm` has no derivative. Eager, a backward pass says so; compiled, the forward alone fails, since
AOTAutograd traces both whenever anything in the model could be trained.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torchao.quantization import Float8Tensor

from .products import Product, products
from .values import copy_of, rewritten, value_of


class FrozenLinear(torch.autograd.Function):
    """x W^T + bias; the gradient of x goes through the dequantized weight, straight through the rounding of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Float8Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (weight,), (wants_x, _, wants_bias) = grads, ctx.saved_tensors, ctx.needs_input_grad
        of_x = grad @ weight.dequantize().to(grad.dtype) if wants_x else None
        return of_x, None, grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None


def frozen_linear(x: torch.Tensor, weight: Float8Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, with a gradient for x and bias and none for the weight."""
    return FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]


def freeze(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite these products in a copy of `gm`; `gm` itself where there is none."""
    if not any(map(_wants_gradient, products(gm.graph))):
        return gm
    graph = copy_of(gm)
    for node, x, weight, bias, *_ in list(filter(_wants_gradient, products(graph))):
        node.target, node.args, node.kwargs = frozen_linear, (x, weight, bias), {}
    return rewritten(gm, graph)


def _wants_gradient(product: Product) -> bool:
    return (
        product.linear
        and isinstance(value_of(product.weight), Float8Tensor)
        and not value_of(product.weight).requires_grad
        and value_of(product.node).requires_grad
    )
