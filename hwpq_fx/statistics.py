"""What calibration gathers: per channel, the sum of the inputs of every product and that of their squares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hwpq_fx.passes import Use

from .curvature import Curvature, CurvatureBudget


class InputStatistics:
    """Of one observed input: per channel the sum of squares (`total`) and the sum, the number of rows, and curvature
    where it was granted.

    Each call adds float32 sums; between calls they are kept in float64, so that it does not matter how rows were cut
    into batches.
    """

    def __init__(self, channels: int, device: torch.device, curvature: Curvature | None = None):
        # normal tensors, which updates inside and outside of inference mode may change
        with torch.inference_mode(False):
            self.total = torch.zeros(channels, dtype=torch.float64, device=device)
            self.sums = torch.zeros_like(self.total)
            self.bad_call = torch.full((), -1, dtype=torch.int64, device=device)
        self.rows = 0
        self.curvature = curvature

    @property
    def sum_sq(self) -> torch.Tensor:
        """float32 [K]."""
        return self.total.float()

    def update(self, x: torch.Tensor, keep: torch.Tensor | None = None, call: int = 0) -> None:
        """Add the rows of `x` [..., K], any floating dtype; `keep` bool [rows] leaves out the others.

        `bad_call` is the first `call` whose rows hold NaN or Inf, or values whose squares overflow; else -1.
        """
        rows = kept_rows(x, keep)
        # one pass without a temporary, converting on the way
        norm = torch.linalg.vector_norm(rows, dim=0, dtype=torch.promote_types(rows.dtype, torch.float32))
        self.total += norm.double().square()
        self.sums += rows.sum(0, dtype=norm.dtype)
        # noted on the device: asking would wait for it
        self.bad_call.copy_(torch.where(norm.isfinite().all() | (self.bad_call >= 0), self.bad_call, call))
        self.rows += rows.shape[0]
        if self.curvature is not None:
            self.curvature.update(rows)


def kept_rows(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """`x` [..., K] as [R, K]; `keep` bool [rows] leaves out the others."""
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if keep is None else rows[keep]


class Call(NamedTuple):
    """A call of the model: which one, and where it came with padding, which tokens are none: bool, by the shape of the
    tokens."""

    number: int = -1
    masks: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, number: int, *masks: Any) -> "Call":
        """Rows where a 2-D mask is 0 are padding and do not count; where two masks are of one shape, nothing tells
        whose rows an input has, and only those count as padding that are it in both."""
        kept: dict[torch.Size, torch.Tensor] = {}
        for mask in masks:
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                keep = mask.detach() != 0
                kept[mask.shape] = keep | kept[mask.shape].to(keep.device) if mask.shape in kept else keep
        return cls(number, tuple(keep for keep in kept.values() if not bool(keep.all())))

    def rows_to_keep(self, x: torch.Tensor, sequence_first: bool = False) -> torch.Tensor | None:
        """Of an input [..., K]: bool [rows], or None where all of them count. sequence_first: of tokens [B, L] it has
        the rows in the order of [L, B]; or of [B, L] where that is its shape: tokens may have come as [L, B]."""
        for mask in self.masks:
            for keep in (mask.t(), mask) if sequence_first else (mask,):
                if x.shape[:-1] == keep.shape or (x.dim() == 2 and x.shape[0] == keep.numel()):
                    return keep.flatten().to(x.device)
        return None


Wanted = Callable[[torch.Tensor, Use], bool]


class CalibrationRecorder:
    """Receives what the observer nodes see (`passes.Recorder`), by parameter. Up to `curvature_bytes` go into what
    conjugate gradients need besides, for inputs of weights that are `wanted` (all, where it is None)."""

    def __init__(self, curvature_bytes: int | None = 0, wanted: Wanted | None = None) -> None:
        self._budget, self._wanted = CurvatureBudget(curvature_bytes), wanted
        self.calls = 0
        self.uses: dict[int, dict[Use, list[InputStatistics]]] = {}
        self.blocked: dict[int, str] = {}
        self._inputs: dict[Any, InputStatistics] = {}
        self.call = Call()

    def begin_call(self, *masks: Any) -> None:
        """A new call of the model, with masks as `Call.of` has them."""
        self.calls += 1
        self.call = Call.of(self.calls - 1, *masks)

    def observe(
        self,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, ...],
        uses: tuple[Use, ...],
        sequence_first: bool = False,
    ) -> None:
        """Add an input that all these weights multiply; the order of its rows as in `Call.rows_to_keep`."""
        key = tuple((id(weight), use) for weight, use in zip(weights, uses, strict=True))
        statistics = self._inputs.get(key)
        if statistics is None:
            wanted = self._wanted is None or any(map(self._wanted, weights, uses))
            with torch.inference_mode(False):
                curvature = self._budget.grant(x.shape[-1], x.device) if wanted else None
            statistics = self._inputs[key] = InputStatistics(x.shape[-1], x.device, curvature)
            for weight, use in zip(weights, uses, strict=True):
                self.uses.setdefault(id(weight), {}).setdefault(use, []).append(statistics)
        statistics.update(x, self.call.rows_to_keep(x, sequence_first), self.call.number)

    def restart(self, curvature_bytes: int | None) -> None:
        """Forget all inputs, for the same calls to be observed once more."""
        self._budget = CurvatureBudget(curvature_bytes)
        self.uses.clear()
        self._inputs.clear()

    def drop_curvature(self) -> None:
        """Free what conjugate gradients would need."""
        for statistics in self._inputs.values():
            statistics.curvature = None

    def siblings(self) -> set[int]:
        """Ids of the parameters that share an input with another one: the merge pass runs these as one product."""
        groups = [{weight for weight, _ in key} for key in self._inputs]
        return {weight for group in groups if len(group) > 1 for weight in group}

    def block(self, weight: torch.Tensor, reason: str) -> None:
        """No observer can speak for this parameter."""
        self.blocked[id(weight)] = reason
