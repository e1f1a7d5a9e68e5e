"""The ways to multiply by a weight that `bench` measures side by side, and how each is checked.

Peers run as their users run them: F.linear with torchao's tensors, compiled with the Inductor options that torchao's
own `quantize_` sets, so that the quantization of activations is fused and counted.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hwpq_fx.kernels import Float8Sparse24Tensor, best_two, quantize_rows
from hwpq_fx.kernels.paths import EITHER, PATHS, Path, Target, chosen, target_of
from hwpq_fx.passes import HwpqBackend

from .measure import BOUNDS, FP8_BOUND, Errors, Outputs, errors_between, errors_of

DTYPE = torch.bfloat16
# Batch sizes of decoding: a compiled model knows them, and our choice of path is fixed then. torchao's know one row and
# take 2 and more as any number: with its options each further number of rows costs tens of seconds of search, for
# kernels that are a small part of theirs there (the products are a library's).
STATIC_ROWS = 64
FEW_ROWS = 64  # beyond, a kernel without tensor cores is of no use
# quantize_rows against what it was given: e4m3 keeps four significant bits
QUANTIZATION_BOUND = 5e-2

# Paths for which x is written in an order of their own: by the kernel that quantizes it, where Inductor sees both.
# (`tiles` by itself has none before it. Its order is a kernel here, and in a model a part of what wrote x.)
INLINED = ("tiles", "tiles_fp8")

# kinds: what a contender counts as
DENSE, DENSE_FP8, PEER, PATH, OURS, PART = "dense", "dense fp8", "peer", "path", "ours", "part"

# what torchao's recommended_inductor_config_setter() sets (0.18)
TORCHAO_INDUCTOR = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
}

# every number of rows and every variant is a compilation of its own, and none may fall back to running eagerly
COMPILING = {
    "recompile_limit": 100_000,
    "accumulated_recompile_limit": 100_000,
    "fail_on_recompile_limit_hit": True,
    "automatic_dynamic_shapes": False,
}


class Built(NamedTuple):
    """A contender for one weight."""

    call: Callable[..., torch.Tensor | Outputs]
    """call(*feed(x), *parts)"""
    parts: tuple[torch.Tensor, ...]
    """What is read beside x: cloned, so that calls can rotate among copies."""
    nbytes: int
    """Bytes of the parts that a call reads; of a packed weight, also where a layout of about its size is read."""
    why_wrong: Callable[[torch.Tensor, Outputs], str]
    """why_wrong(x, outputs): "" where they are right."""
    feed: Callable[[torch.Tensor], Outputs] = lambda x: (x,)
    """Made of x before the clock starts."""
    picked: Callable[[torch.Tensor], str] = lambda x: ""
    """The path that our dispatcher takes."""


class Contender(NamedTuple):
    """Name, kind, what it is in words, and how it is built from a dense bf16 weight [N, K]."""

    name: str
    kind: str
    what: str
    build: Callable[[torch.Tensor], Built]
    most_rows: int = 1 << 30
    """Not measured beyond: made for few rows."""
    static_rows: int = 1
    """Up to so many rows, compiled for exactly that number."""


def dense_contenders() -> list[Contender]:
    """What nothing is pruned in, bf16 first; their names are `DENSE_NAMES`."""
    return [
        Contender("bf16", DENSE, "F.linear", _bf16),
        Contender("fp8 dynamic", DENSE_FP8, "torchao Float8DynamicActivationFloat8Weight, per row", _fp8_dynamic),
        Contender("fp8 weight-only", DENSE_FP8, "torchao Float8WeightOnly", _fp8_weight_only),
    ]


def contenders() -> list[Contender]:
    """All of them, the one that all are measured by first, then what is wanted most."""
    return [
        *dense_contenders(),
        Contender("hwpq", OURS, "F.linear with our packed weight, compiled", _hwpq, static_rows=STATIC_ROWS),
        # added up, one more dense FP8
        Contender("scaled_mm alone", DENSE_FP8, "torch._scaled_mm on quantized x", _scaled_mm),
        Contender("quantize alone", DENSE_FP8, "quantize_rows, compiled", _quantize),
        *path_contenders(FEW_ROWS),
        Contender("torchao 2:4", PEER, "torchao's CUTLASS 2:4 FP8 tensor", _torchao_24),
        Contender("torchao int4", PEER, "torchao Int4WeightOnly, groups of 128", _torchao_int4, 1024),
        *(
            Contender(f"{name} alone", PART, f"our path {name!r} on quantized x", partial(_path_alone, path))
            for name, path in PATHS.items()
            if path.fp8
        ),
    ]


def path_contenders(gemv_rows: int) -> list[Contender]:
    """Every path of ours by itself; the one for few rows up to so many."""
    return [
        Contender(
            name,
            PATH,
            f"our path {name!r}, quantization of x counted",
            partial(_path, path),
            gemv_rows if name == "gemv" else 1 << 30,
            STATIC_ROWS,
        )
        for name, path in PATHS.items()
    ]


class Unserved(Exception):
    """A path that does not serve this weight here; says why."""


def _compiled(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, **arguments)


@cache
def compiled_quantize() -> Callable[..., Outputs]:
    """`quantize_rows` as one Inductor kernel."""
    return _compiled(quantize_rows)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


# Twice, because Dynamo keeps what it compiled by code: what is compiled for any number of rows would serve few as well
def _few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _many_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def fp8_of(x: torch.Tensor) -> torch.Tensor:
    """x as FP8 with a scale per row would carry it, float32."""
    values, scale = quantize_rows(x)
    return values.float() * scale


def against(weight: Callable[[], torch.Tensor], fp8: bool) -> Callable[[torch.Tensor, Outputs], str]:
    """Checks y = x weight^T, with x in FP8 where `fp8`."""

    def why_wrong(x: torch.Tensor, outputs: Outputs) -> str:
        y = outputs[0]
        bound = FP8_BOUND if fp8 else BOUNDS[y.dtype]
        return errors_of(y, fp8_of(x) if fp8 else x, weight()).why_refused(bound)

    return why_wrong


def pruned(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of every four of [N, K], zeros elsewhere."""
    return weight.masked_fill(~best_two(weight.abs().unflatten(1, (-1, 4))).flatten(1), 0)


def _nbytes(tensors: Outputs) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _bf16(weight: torch.Tensor) -> Built:
    return Built(_linear, (weight,), weight.nbytes, against(lambda: weight, False))


def torchao_weight(weight: torch.Tensor, config: Any) -> Any:
    """`weight` as torchao's `quantize_` makes it. Raises ValueError where torchao leaves it as it is."""
    from torchao.quantization import quantize_

    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, config)
    if type(holder.weight.data) is torch.Tensor:
        raise ValueError(f"torchao leaves a weight {tuple(weight.shape)} as it is")
    return holder.weight.detach()


def _torchao(
    weight: torch.Tensor, config: Any, stands_for: Callable[[], torch.Tensor] | None = None, fp8: bool = False
) -> Built:
    made = torchao_weight(weight, config)
    names, _ = made.__tensor_flatten__()
    data = tuple(getattr(made, name) for name in names)
    run = _compiled(_linear, options=TORCHAO_INDUCTOR)
    dense = stands_for or (lambda: made.dequantize(torch.float32))
    return Built(run, (made,), _nbytes(data), against(dense, fp8))


def fp8_dynamic_config() -> Any:
    """torchao's dense FP8 with a scale per row of x and W; Inductor's options are given where it is compiled."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)


def fp8_weight_only_config() -> Any:
    """torchao's dense FP8 weights with a scale per row, bf16 products."""
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig(set_inductor_config=False)


def _fp8_dynamic(weight: torch.Tensor) -> Built:
    return _torchao(weight, fp8_dynamic_config(), fp8=True)


def _fp8_weight_only(weight: torch.Tensor) -> Built:
    return _torchao(weight, fp8_weight_only_config())


def _torchao_24(weight: torch.Tensor) -> Built:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_packing_format import Float8PackingFormat

    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        packing_format=Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA,
        set_inductor_config=False,
    )
    sparse = pruned(weight)
    same = torchao_weight(sparse, fp8_dynamic_config())  # the same values and scales, and it can be read back
    return _torchao(sparse, config, lambda: same.dequantize(torch.float32), fp8=True)


def _torchao_int4(weight: torch.Tensor) -> Built:
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows.int4.int4_packing_format import Int4PackingFormat

    config = Int4WeightOnlyConfig(
        group_size=128, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D, set_inductor_config=False
    )
    made = torchao_weight(weight, config)
    # it has no way back but a product with the identity, so what that gives must be near the weight
    stands_for = F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), made).t()
    if refused := Errors(errors_between(stands_for, weight).whole, 0.0, 0.0).why_refused(0.2):
        raise ValueError(f"the int4 weight is not the weight: {refused}")
    return _torchao(weight, config, lambda: stands_for)


def _scaled_mm(weight: torch.Tensor) -> Built:
    values, scale = quantize_rows(weight)
    stands_for = partial(fp8_of, weight)

    def call(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(x, w.t(), x_scale, w_scale.t(), out_dtype=weight.dtype, use_fast_accum=True)

    parts = (values, scale)
    return Built(call, parts, _nbytes(parts), against(stands_for, True), quantize_rows)


def _quantize(weight: torch.Tensor) -> Built:
    def why_wrong(x: torch.Tensor, outputs: Outputs) -> str:
        values, scale = outputs
        return errors_between(values.float() * scale, x).why_refused(QUANTIZATION_BOUND)

    return Built(compiled_quantize(), (), 0, why_wrong)


def _gpu_of(weight: torch.Tensor) -> Target:
    if (target := target_of(weight.device)) is None:
        raise Unserved(f"{weight.device} is no GPU of NVIDIA's")
    return target


def packed_parts(weight: torch.Tensor, path: Path) -> tuple[Float8Sparse24Tensor, Outputs]:
    """The packed weight and what `path` reads of it. Raises Unserved where the path does not serve it here."""
    if why := path.why_not(_gpu_of(weight).arch, weight.dtype, *weight.shape):
        raise Unserved(why)
    packed = Float8Sparse24Tensor.from_hp(weight)
    parts = (packed.qdata, packed.sparse_metadata, packed.scale)
    layout = () if path.make_layout is None else (path.make_layout(*parts[:2]),)
    return packed, (*parts, *layout)


def run_path(
    path: Path, dtype: torch.dtype, x: torch.Tensor, x_scale: torch.Tensor | None, *parts: torch.Tensor
) -> torch.Tensor:
    """y = x W^T by `path`, of the parts that `packed_parts` gives."""
    qdata, sparse_metadata, scale, *layout = parts
    return path.product(x, x_scale, qdata, sparse_metadata, scale, None, layout[0] if layout else None, dtype)


def _path(path: Path, weight: torch.Tensor) -> Built:
    packed, parts = packed_parts(weight, path)
    dtype, fp8, inline = weight.dtype, path.fp8, path.inline
    assert inline is not None or path.name not in INLINED

    # a graph that knows its rows has the path's own ops in it, one that does not an op that calls `product`
    @_compiled
    def few(x: torch.Tensor, qdata: torch.Tensor, sparse_metadata: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        values, x_scale = quantize_rows(x) if fp8 else (x, None)
        return inline(values, x_scale, qdata, sparse_metadata, scale, None, None, dtype)  # type: ignore[misc]

    def call(x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        if path.name in INLINED and len(x) <= STATIC_ROWS:
            return few(x, *parts)
        values, x_scale = compiled_quantize()(x) if fp8 else (x, None)
        return run_path(path, dtype, values, x_scale, *parts)

    stands_for = partial(packed.dequantize, torch.float32)
    return Built(call, parts, packed.packed_nbytes(), against(stands_for, path.fp8))


def _path_alone(path: Path, weight: torch.Tensor) -> Built:
    packed, parts = packed_parts(weight, path)
    stands_for = partial(packed.dequantize, torch.float32)
    run = partial(run_path, path, weight.dtype)
    return Built(run, parts, packed.packed_nbytes(), against(stands_for, True), quantize_rows)


def _hwpq(weight: torch.Tensor) -> Built:
    target = _gpu_of(weight)
    packed = Float8Sparse24Tensor.from_hp(weight).expand()
    few, many = (_compiled(function, backend=HwpqBackend("inductor")) for function in (_few_rows, _many_rows))

    def call(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor | Outputs:
        return (few if len(x) <= STATIC_ROWS else many)(x, packed)

    def path_of(x: torch.Tensor) -> Path:
        return chosen(target, x, weight.shape[0], weight.dtype, EITHER, packed.prepacked_for)

    def why_wrong(x: torch.Tensor, outputs: Outputs) -> str:
        return against(partial(packed.dequantize, torch.float32), path_of(x).fp8)(x, outputs)

    return Built(call, (packed,), packed.packed_nbytes(), why_wrong, picked=lambda x: path_of(x).name)
