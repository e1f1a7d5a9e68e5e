"""One layer: score, select, compensate and pack. Pure: reads a dense weight, returns its compressed form."""

from dataclasses import replace
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.quantization import Float8Tensor

from hwpq_fx.kernels import FORMAT_K, Float8Sparse24Tensor, select24
from hwpq_fx.kernels.linear24 import cpu_product_dtype
from hwpq_fx.kernels.saliency import score
from hwpq_fx.passes import Use

from .compensation import compensate
from .config import PLAIN, SPARSE_2D, HWPQConfig
from .curvature import Combined, combined
from .errors import CalibrationError, ConfigError, ModelError
from .float8 import dense_float8, mm_compatible
from .gram import MatrixFree, Rounded
from .layers import STACKED, Layer, stacked_of
from .preconditioner import Preconditioner
from .reconstruction import lead, reconstruct, reconstruction_loss, refine
from .report import LayerReport
from .selection import Selection, select_ratio
from .statistics import InputStatistics
from .torchao_tensor import to_torchao, why_not, why_not_on

Statistics = dict[Use, list[InputStatistics]]


class Compressed(NamedTuple):
    """The new weight, in the parameter's own orientation, and its line in the report."""

    weight: torch.Tensor
    line: LayerReport


# A weight is worked on in parts of its rows, a sixteenth each or so many weights: what conjugate gradients take besides
# is up to sixteen times as much as a part in float32.
PARTS, LEAST_PART = 16, 2**22


class Span(NamedTuple):
    """Output rows start..stop of a weight that see the same input; sum_sq float32 [K] and sums float64 [K], None where
    unknown."""

    start: int
    stop: int
    sum_sq: torch.Tensor | None
    sums: torch.Tensor | None
    rows: int
    curvature: Combined | None


def cannot_compress(layer: Layer, uses: list[Use], config: HWPQConfig) -> str:
    """Why a layer with these uses has to stay dense, or ""."""
    if len({use.transposed for use in uses}) > 1:
        return "multiplied along both of its sides"
    rows, cols = shape_of(layer.parameter, uses)
    if rows * cols == 0:
        return "holds no weights"
    if config.sparsity == "2:4":
        if cols % FORMAT_K:
            return f"in_features {cols} is not a multiple of {FORMAT_K}"
        return _why_not_torchao(layer, uses, rows, cols) if config.packing_format == SPARSE_2D else ""
    # torchao's Float8Tensor knows linear, not addmm nor what nn.MultiheadAttention does with its weights
    if not _plain_linear(layer):
        return f"held by {type(layer.owner).__name__}: torchao's Float8Tensor is for nn.Linear"
    if config.activation == "dynamic" and not mm_compatible(rows, cols):
        return f"{rows}x{cols}: FP8 products want multiples of 16"
    return ""


def _plain_linear(layer: Layer) -> bool:
    return isinstance(layer.owner, nn.Linear) and not isinstance(layer.owner, NonDynamicallyQuantizableLinear)


def _why_not_torchao(layer: Layer, uses: list[Use], rows: int, cols: int) -> str:
    if not _plain_linear(layer):
        return f"held by {type(layer.owner).__name__}: torchao's sparse FP8 tensor is for nn.Linear"
    reason = why_not(layer.parameter.dtype, rows, cols, transposed=any(use.transposed for use in uses))
    return f"torchao's sparse FP8 tensor cannot hold it: {reason}" if reason else ""


def check_packing_format(config: HWPQConfig, device: torch.device) -> None:
    """Raise ConfigError where weights on `device` cannot become of `config.packing_format`."""
    if config.packing_format == PLAIN:
        return
    if (config.sparsity, config.activation) != ("2:4", "dynamic"):
        raise ConfigError(f'packing_format {config.packing_format!r} is for sparsity "2:4" and activation "dynamic"')
    if reason := why_not_on(device):
        raise ConfigError(
            f'packing_format {config.packing_format!r}: {reason}; convert with "plain", and where the model is to run '
            "let hwpq_fx.to_torchao make torchao's tensor of each weight"
        )


def shape_of(parameter: torch.Tensor, uses: list[Use]) -> tuple[int, int]:
    """[out_features, in_features], however the parameter is kept."""
    rows, cols = parameter.shape
    return (cols, rows) if uses and uses[0].transposed else (rows, cols)


def check_weight(layer: Layer) -> None:
    """Raise ModelError for NaN or Inf in the weight, and for what float32 cannot hold of a float64 one."""
    weight = layer.parameter.float() if layer.parameter.dtype == torch.float64 else layer.parameter
    if not bool(weight.isfinite().all()):
        what = "NaN or Inf" if weight is layer.parameter else "NaN, Inf or values too large for float32"
        raise ModelError(f"{layer.name}: the weight holds {what}; mend the checkpoint or add the layer to ignore")


def compress(
    name: str,
    parameter: torch.Tensor,
    statistics: Statistics,
    config: HWPQConfig,
    drift: torch.Tensor | None = None,
) -> Compressed:
    """Compress one finite parameter, [N, K] or its transpose as its uses say.

    drift: float32 [N, K], where "cg" is to aim at other outputs than those of the weight on these inputs (see
    `reconstruct`). Raises CalibrationError for NaN or Inf in its inputs.
    """
    transposed = next(iter(statistics)).transposed
    weight = parameter.detach()
    weight = weight.t().contiguous() if transposed else weight
    spans = spans_of(name, weight, statistics)

    made, errors, settled, kept_weights = [], [], 0.0, 0
    for span in spans:
        part = weight[span.start : span.stop]
        mask, share = _select(part, span.sum_sq, config)
        settled += share * (span.stop - span.start) / weight.shape[0]
        kept_weights += int(mask.count_nonzero())  # a sum would be made in int64
        solver = _Solver.of(span.curvature.fit, config) if span.curvature else None
        aims = repeat(None) if drift is None else _parts(drift[span.start : span.stop])
        for rows, kept, aim in zip(_parts(part), _parts(mask), aims, strict=False):
            new = _packed(*_compensate(rows, kept, span, config, aim, solver), config)
            errors.append(_squared_errors(rows, new, span))
            made.append(new)

    new = _joined(made)
    status, size = ("sparse24_fp8" if config.sparsity == "2:4" else "fp8"), _nbytes(new)
    whole = new.t() if transposed else new
    line = LayerReport(
        name,
        tuple(weight.shape),
        status,
        rows=max(span.rows for span in spans),
        pruned=1 - kept_weights / weight.numel(),
        settled=settled,
        compensation=" and ".join(sorted({_compensation_of(span, config) for span in spans})),
        error=_relative_error(errors),
        dense_bytes=parameter.nbytes,
        packed_bytes=size,
    )
    return Compressed(whole, line)


def _parts(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[N, K] in parts that are small beside it, unless it is small itself."""
    size = max(1, -(-max(LEAST_PART, rows.numel() // PARTS) // rows.shape[1]))
    # matrix products on a GPU come in tiles of 128 rows
    return rows.split(size if size < 128 else round(size / 128) * 128)


def _packed(kept: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor, config: HWPQConfig) -> Any:
    if config.sparsity == "2:4":
        return Float8Sparse24Tensor.from_hp(kept, mask, config.activation, factor)
    return dense_float8(_within(kept.masked_fill(~mask, 0) * factor[:, None], kept.dtype), config.activation)


def _within(new: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In `dtype`, its largest value where it has none as large."""
    largest = min(torch.finfo(dtype).max, torch.finfo(new.dtype).max)
    return new.clamp(-largest, largest).to(dtype)


def _joined(parts: list[Any]) -> Any:
    """The rows of all parts in one weight."""
    first, names = parts[0], parts[0].tensor_data_names
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    if isinstance(first, Float8Sparse24Tensor):
        return Float8Sparse24Tensor(**joined, activation=first.activation, transposed=False, dtype=first.dtype)
    kinds = (first.mm_config, first.act_quant_kwargs, first.kernel_preference, first.dtype)
    return Float8Tensor(joined["qdata"], joined["scale"], first.block_size, *kinds)


def _nbytes(weight: Any) -> int:
    return sum(getattr(weight, name).nbytes for name in weight.tensor_data_names)


def compress_fp8(name: str, parameter: torch.Tensor, statistics: Statistics, config: HWPQConfig) -> Compressed:
    """One finite parameter [N, K] of an nn.Linear as dense FP8, nothing pruned. Raises as `compress` does."""
    weight = parameter.detach()
    spans = spans_of(name, weight, statistics)
    made, errors = [], []
    for span in spans:
        for rows in _parts(weight[span.start : span.stop]):
            made.append(dense_float8(rows, config.activation))
            errors.append(_squared_errors(rows, made[-1], span))
    dense = _joined(made)
    line = LayerReport(
        name,
        tuple(weight.shape),
        "fp8",
        rows=max(span.rows for span in spans),
        error=_relative_error(errors),
        compensation="none",
        dense_bytes=parameter.nbytes,
        packed_bytes=_nbytes(dense),
    )
    return Compressed(dense, line)


def fast(compressed: Compressed, config: HWPQConfig, sibling: bool = False) -> torch.Tensor:
    """The weight as the model will hold it, with what it needs to be fast; the report's line learns of it.

    sibling: whether it shares its input with others. Merged, they have one library layout between them, which the
    merge pass makes; their own would be a second copy.
    """
    weight, line = compressed
    if not isinstance(weight, Float8Sparse24Tensor):
        return weight
    if config.packing_format == SPARSE_2D:
        theirs = to_torchao(weight)
        line.packed_bytes = _nbytes(theirs)
        line.paths = "cutlass, in torchao's sparse_2d_data_2d_metadata"
        return theirs
    if config.layout == "fastest" and not (sibling and weight.is_cuda):
        weight = weight.expand()
    line.layout_bytes = weight.layout_nbytes()
    line.paths = weight.paths()
    return weight


def cannot_be_fp8(layer: Layer, uses: list[Use], config: HWPQConfig) -> str:
    """Why a layer with these uses cannot become dense FP8, or ""."""
    return cannot_compress(layer, uses, replace(config, sparsity=0.5))


def dense_line(layer: Layer, statistics: Statistics, reason: str) -> LayerReport:
    """Its line in the report, for a layer that stays dense."""
    uses = list(statistics) or [use for use in [layer.static_use] if use]
    rows = sum(one.rows for many in statistics.values() for one in many)
    shape = shape_of(layer.parameter, uses)
    return LayerReport(layer.name, shape, "dense", reason, rows=rows, dense_bytes=layer.parameter.nbytes)


def stacked_lines(model: nn.Module) -> list[LayerReport]:
    """The same for every 3-D parameter."""
    return [
        LayerReport(name, tuple(parameter.shape), "dense", STACKED, dense_bytes=parameter.nbytes)
        for name, parameter in stacked_of(model)
    ]


def not_reached(statistics: Statistics) -> str:
    """Why calibration tells nothing of a layer, or ""."""
    if any(one.rows for many in statistics.values() for one in many):
        return ""
    return "not reached by any row (padding does not count)" if statistics else "not reached"


def spans_of(name: str, weight: torch.Tensor, statistics: Statistics) -> list[Span]:
    """Cut the output rows of `weight` [N, K] where their inputs change (packed q/k/v of cross attention)."""
    cuts = sorted({0, weight.shape[0], *(use.start for use in statistics), *(use.stop for use in statistics)})
    spans = []
    for start, stop in pairwise(cuts):
        seen = [one for use, many in statistics.items() if use.start <= start and stop <= use.stop for one in many]
        sum_sq = torch.stack([one.total.to(weight.device) for one in seen]).sum(0).float() if seen else None
        if sum_sq is not None and not bool(sum_sq.isfinite().all()):
            call = min((call for one in seen if (call := int(one.bad_call)) >= 0), default=-1)
            where = f"call {call} of the model (batch {call}, counted from 0)" if call >= 0 else "calibration"
            raise CalibrationError(
                f"{name}: its input held NaN or Inf, or values too large for float32, in {where}; leave that batch out "
                "or add the layer to ignore"
            )
        # an input that was always zero tells nothing of its channels
        known = sum_sq is not None and bool(sum_sq.any())
        sums = torch.stack([one.sums.to(weight.device) for one in seen]).sum(0) if known else None
        curvature = combined(seen, weight.device) if known else None
        spans.append(Span(start, stop, sum_sq if known else None, sums, sum(one.rows for one in seen), curvature))
    return spans


def _select(weight: torch.Tensor, sum_sq: torch.Tensor | None, config: HWPQConfig) -> Selection:
    if isinstance(config.sparsity, str):
        how = (config.selection, config.mean_rate, config.dev_rate, config.lam)
        # "relative" scores tie the rows together, the others do not
        parts = (weight,) if config.saliency == "relative" else _parts(weight)
        masks, settled = zip(*(select24(part, sum_sq, config.saliency, *how) for part in parts), strict=True)
        return Selection(torch.cat(masks), sum(map(int, settled)) * 4 / weight.numel())
    scores = score(weight, sum_sq, config.saliency)
    return select_ratio(scores, config.sparsity, config.mean_rate, config.dev_rate, config.lam)


def _compensation_of(span: Span, config: HWPQConfig) -> str:
    if span.curvature is not None:  # gathered for "cg" alone
        return span.curvature.name
    return "energy" if config.compensation == "cg" else config.compensation


class _Solver(NamedTuple):
    """What conjugate gradients need of a span's inputs, made once for all parts of its weight. diagonal, blocks: of a
    sample, the latter for 2:4."""

    gram: torch.Tensor | MatrixFree
    damping: float
    diagonal: torch.Tensor | None
    blocks: torch.Tensor | None
    fast: Rounded | None
    led_by: Preconditioner

    @classmethod
    def of(cls, gram: torch.Tensor | MatrixFree, config: HWPQConfig) -> "_Solver":
        damping, diagonal, blocks = 0.01, None, None
        if isinstance(gram, MatrixFree):
            # a sample says less than all rows do: hold on to the original weight more
            damping, diagonal = 0.1, gram.diagonal
            blocks = gram.blocks if config.sparsity == "2:4" else None
        return cls(gram, damping, diagonal, blocks, rounded(gram), lead(gram, damping, diagonal))


def _compensate(
    weight: torch.Tensor,
    mask: torch.Tensor,
    span: Span,
    config: HWPQConfig,
    drift: torch.Tensor | None,
    solver: _Solver | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight to store, the mask it ends with, and a factor per row."""
    if solver is None:
        new, factor = compensate(weight, mask, span.sum_sq, _compensation_of(span, config), span.sums, span.rows)
        return _within(new, weight.dtype), mask, factor
    gram, damping, diagonal, blocks, fast, led_by = solver
    dense = weight.float()
    if config.sparsity == "2:4":
        new, mask = refine(dense, mask, gram, config.cg_rounds, config.cg_steps, damping, blocks, drift, fast, led_by)
    else:
        steps = config.cg_steps * (config.cg_rounds + 1)
        new = reconstruct(dense, mask, gram, steps, damping, diagonal, drift, fast, led_by)
    return _within(new, weight.dtype), mask, torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)


def rounded(gram: torch.Tensor | MatrixFree) -> Rounded | None:
    """What conjugate gradients multiply with: bfloat16 where its device multiplies that faster than float32."""
    device = gram.device if isinstance(gram, torch.Tensor) else gram.sample.device
    if device.type == "cuda":
        return Rounded(gram) if torch.cuda.get_device_capability(device) >= (8, 0) else None
    return Rounded(gram) if device.type == "cpu" and cpu_product_dtype(torch.float32) == torch.bfloat16 else None


def _squared_errors(weight: torch.Tensor, made: Any, span: Span) -> tuple[float, float]:
    """||X(W - W')||^2 and ||XW||^2 over rows of the span's weight; without curvature, as if channels were correlated by
    their means alone."""
    weight = weight.float()
    packed = isinstance(made, Float8Sparse24Tensor)
    restored = made.dequantize(torch.float32) if packed else made.dequantize().float()
    if span.curvature is not None:
        gram = span.curvature.measure
        lost = reconstruction_loss(weight, restored, gram).sum().item()
        return lost, reconstruction_loss(weight, torch.zeros_like(weight), gram).sum().item()
    sum_sq = span.sum_sq
    if sum_sq is None:
        sum_sq = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    sums = torch.zeros_like(sum_sq, dtype=torch.float64) if span.sums is None else span.sums
    of_means = sums.square() / max(1, span.rows)
    spread = (sum_sq - of_means).clamp_min_(0)

    def energy(rows: torch.Tensor) -> float:
        rows = rows.double()
        return float((rows.square() @ spread).sum() + (rows @ sums).square().sum() / max(1, span.rows))

    return energy(weight - restored), energy(weight)


def _relative_error(errors: list[tuple[float, float]]) -> float:
    lost, kept = (sum(parts) for parts in zip(*errors, strict=True))
    return (lost / kept) ** 0.5 if kept else 0.0
