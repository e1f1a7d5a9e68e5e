"""What ran during calibration, kept so that it can be run again: with `sequential`."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from hwpq_fx.passes import Staged, Use

from .memory import room
from .statistics import CalibrationRecorder, Call

logger = logging.getLogger("hwpq_fx")


class Run(NamedTuple):
    """One run of a graph; its arguments as they were before it."""

    staged: Staged
    args: tuple[Any, ...]
    call: Call

    def nbytes(self) -> int:
        """Of the arguments, without parameters."""
        return sum(one.nbytes for one in values_in(self.args))

    def fresh(self) -> tuple[Any, ...]:
        """The arguments for one more run, which may write to them."""
        return _copied(self.args)

    def weights(self) -> list[list[tuple[int, Use]]]:
        """By stage, the ids of the parameters and their uses."""
        return [
            [(id(self.args[place]), use) for place, uses in stage.uses.items() for use in uses]
            for stage in self.staged.stages
        ]


class Recording:
    """The graph runs of calibration, as long as all of them could be run in lockstep: one for each call of the model,
    through the same stages, and what they are given within the `room` there is. Once one cannot, it ends. names: of the
    layers that may be converted, by the ids of their parameters; how others are used does not matter. asked: for
    `sequential` in so many words: in whatever room, and with a warning where it ends."""

    def __init__(
        self, recorder: CalibrationRecorder, curvature_bytes: int | None, names: Mapping[int, str], asked: bool
    ):
        self.runs: list[Run] = []
        self.ended = ""
        """Why it ended, or ""."""
        self._names, self._asked = names, asked
        self._recorder, self._curvature_bytes = recorder, curvature_bytes
        self._held: Counter[torch.device] = Counter()

    @contextmanager
    def of(self, staged: Staged, args: tuple[Any, ...]) -> Iterator[None]:
        """Around a run of the graph, which is recorded once it is through."""
        if self.ended:
            yield
            return
        reason = self._no_room(args)
        run = None if reason else Run(staged, _copied(args), self._recorder.call)
        if run:
            reason = self._why_not(run)
        if reason:
            self.end(reason)
        yield
        if run and not self.ended:
            self.runs.append(run)

    def end(self, reason: str) -> None:
        """Observe what ran again, for what is gathered without `sequential`, and record nothing from now on."""
        if self._asked:
            logger.warning("sequential: %s; the layers are converted one by one instead", reason)
        self.ended = reason
        self.replay()
        self.runs.clear()

    def replay(self) -> None:
        """Observe all runs once more, for curvature as well."""
        call = self._recorder.call
        self._recorder.restart(self._curvature_bytes)
        with torch.inference_mode(False), torch.no_grad():
            for run in self.runs:
                self._recorder.call = run.call
                run.staged.gm.forward(*run.fresh())
        self._recorder.call = call

    def _no_room(self, args: tuple[Any, ...]) -> str:
        if self._asked:
            return ""
        for one in values_in(args):
            self._held[one.device] += one.nbytes
        return no_room("what the calls of the model were given takes", self._held, self._held)

    def _why_not(self, run: Run) -> str:
        weights = run.weights()
        stages = Counter(weight for stage in weights for weight in {weight for weight, _ in stage})
        several = [
            self._names[weight]
            for weight, count in stages.items()
            if count > 1 and weight in self._names and weight not in self._recorder.blocked
        ]
        devices = {value.device.type for value in run.args if isinstance(value, torch.Tensor)}
        if self.runs and self.runs[-1].call.number == run.call.number:
            return "a call of the model ran several graphs (hwpq_fx.explain shows where it breaks)"
        if several:
            return f"{several[0]} multiplies several inputs, which one order does not fit (config.ignore leaves it out)"
        if any(stage.autocast for stage in run.staged.stages) or any(map(torch.is_autocast_enabled, devices)):
            return "the model ran under autocast"
        if self.runs and self.runs[0].weights() != weights:
            return "the calls of the model ran through different layers"
        return ""


def values_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among them that are no parameters, nor of a kind that has no memory of its own."""
    return (one for one in values if type(one) is torch.Tensor)


def no_room(what: str, wanted: Mapping[torch.device, int], taken: Mapping[torch.device, int]) -> str:
    """Why so many bytes on each device, `taken` of them already, are too many, or ""."""
    for device, size in wanted.items():
        if size > (most := room(device, taken.get(device, 0))):
            gib = f"{size / 2**30:.1f} GiB on {device}, and {most / 2**30:.1f} GiB are granted"
            return f"{what} {gib} (sequential=True takes them)"
    return ""


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors that a graph may write to, copied, as tensors that may be written to anywhere; parameters themselves."""
    with torch.inference_mode(False):
        return tuple(
            one.detach().clone() if isinstance(one, torch.Tensor) and not isinstance(one, nn.Parameter) else one
            for one in args
        )
