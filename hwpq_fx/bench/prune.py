"""Pruning, quantizing and packing the linears of a decoder layer, beside a copy of as many bytes and beside Wanda."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch

from hwpq_fx.kernels import pack24, quantize_weight_rows, unpack24
from hwpq_fx.kernels.prune_pack24 import prune_pack24, prune_pack24_reference
from hwpq_fx.kernels.roofline import packed_bytes

from .contenders import DTYPE
from .measure import Clock, Outputs, errors_between, measured, normal
from .shapes import Decoder

Weight = tuple[torch.Tensor, torch.Tensor]  # W [N, K] bf16, sums of squares [K] float32
Line = dict[str, Any]

# a tie in float32 may fall otherwise than in w^2 s: the weights left must be the same to this
SAME_WEIGHTS = 1e-2


def wanda_quantized(weight: torch.Tensor, sum_sq: torch.Tensor) -> Outputs:
    """Wanda (arXiv 2306.11695), vectorised: the two of every four that are largest in |w| ||x||, as e4m3 [N, K] with
    a scale per row, and their mask."""
    groups = (weight.abs() * sum_sq.sqrt()).unflatten(1, (-1, 4))
    best = groups.topk(2, dim=-1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).flatten(1)
    values, scale = quantize_weight_rows(weight.masked_fill(~mask, 0))
    return values, scale, mask


def _wanda(choose: Callable[..., Outputs], weight: torch.Tensor, sum_sq: torch.Tensor) -> Outputs:
    values, scale, mask = choose(weight, sum_sq)
    return *pack24(values, mask), scale


def _wanda_cutlass(weight: torch.Tensor, sum_sq: torch.Tensor) -> Outputs:
    from torchao.ops import to_sparse_semi_structured_cutlass_sm9x_f8

    values, scale, _ = wanda_quantized(weight, sum_sq)
    return *to_sparse_semi_structured_cutlass_sm9x_f8(values), scale


def _ours(weight: torch.Tensor, sum_sq: torch.Tensor) -> Outputs:
    return prune_pack24(weight, sum_sq)


def _whole_layer(make: Callable[..., Outputs], weights: Sequence[Weight]) -> Outputs:
    return tuple(part for weight in weights for part in make(*weight))


def _references(weights: Sequence[Weight]) -> list[Outputs]:
    return [prune_pack24_reference(*one, None, *_defaults()) for one in weights]


def _defaults() -> list[Any]:
    schema = torch.ops.hwpq_fx.prune_pack24.default._schema
    return [argument.default_value for argument in schema.arguments[3:]]


def _triples(outputs: Outputs) -> list[Outputs]:
    return [outputs[at : at + 3] for at in range(0, len(outputs), 3)]


def _other_bits(wanted: Sequence[Outputs], outputs: Outputs) -> str:
    for at, (made, good) in enumerate(zip(_triples(outputs), wanted, strict=True)):
        for name, one, other in zip(("qdata", "sparse_metadata", "scale"), made, good, strict=True):
            wrong = (one.view(torch.uint8) != other.view(torch.uint8)).sum().item()
            if wrong:
                return f"linear {at}: {wrong} bytes of {name} are not the reference's"
    return ""


def _dense(packed: Outputs) -> torch.Tensor:
    qdata, sparse_metadata, scale = packed
    return unpack24(qdata, sparse_metadata).float() * scale


def _other_weights(wanted: Sequence[Outputs], outputs: Outputs) -> str:
    for at, (made, good) in enumerate(zip(_triples(outputs), wanted, strict=True)):
        error = errors_between(_dense(made), _dense(good)).whole
        if not error <= SAME_WEIGHTS:
            return f"linear {at}: the packed weight is {error:.1e} from the reference's"
    return ""


def _other_energy(wanted: Sequence[Outputs], outputs: Outputs) -> str:
    # CUTLASS packs values in an order of its own
    for at, (made, good) in enumerate(zip(_triples(outputs), wanted, strict=True)):
        ratio = (made[0].double().square().sum() / good[0].double().square().sum()).item()
        if not abs(ratio - 1) <= SAME_WEIGHTS:
            return f"linear {at}: its values have {ratio:.4f} of the reference's energy"
    return ""


def pruning(
    clock: Clock, decoder: Decoder, seconds: float, known: Callable[[Line], bool] = lambda line: False
) -> Iterator[Line]:
    """Every way to make the linears of one layer 2:4 FP8, in turn, and a copy of the bytes they cannot help moving.

    known: of a line without its figures, whether it need not be measured.
    """
    sets = [_random_layer(clock, decoder) for _ in range(2)]
    wanted = cache(partial(_references, sets[0]))
    compiled = torch.compile(wanda_quantized, fullgraph=True, dynamic=False)
    ways: list[tuple[str, Callable[..., Outputs], Callable[[Sequence[Outputs], Outputs], str]]] = [
        ("prune_pack24", _ours, _other_bits),
        ("wanda, quantize, pack24", partial(_wanda, wanda_quantized), _other_weights),
        ("wanda, quantize compiled, pack24", partial(_wanda, compiled), _other_weights),
        ("wanda, quantize, torchao's CUTLASS compress", _wanda_cutlass, _other_energy),
    ]
    bytes_moved = sum(2 * one.n * one.k + 4 * one.k + packed_bytes(one.n, one.k) for one in decoder.separate)
    weights = sum(one.n * one.k for one in decoder.separate)
    moved = {"weights": weights, "bytes": bytes_moved}
    if not known({"contender": "copy"}):
        yield moved | _copy(clock, bytes_moved, seconds)
    for name, make, why_wrong in ways:
        if known({"contender": name}):
            continue
        calls = [partial(_whole_layer, make, one) for one in sets]

        def refused(outputs: Outputs, why_wrong: Callable[..., str] = why_wrong) -> str:
            return why_wrong(wanted(), outputs)

        yield moved | {"contender": name, **measured(clock, calls, 2, refused, seconds)}


def _random_layer(clock: Clock, decoder: Decoder) -> list[Weight]:
    return [
        (
            normal(one.shape, DTYPE, clock.device),
            normal((one.k,), torch.float32, clock.device).square() + 0.01,
        )
        for one in decoder.separate
    ]


def _copy(clock: Clock, bytes_moved: int, seconds: float) -> Line:
    """Half of the bytes are read, half are written."""
    source = normal((2, bytes_moved // 4), torch.bfloat16, clock.device)
    calls = [partial(torch.clone, one) for one in source]

    def why_wrong(outputs: Outputs) -> str:
        return "" if torch.equal(outputs[0], source[0]) else "it is not a copy"

    return {"contender": "copy", **measured(clock, calls, 2, why_wrong, seconds)}
