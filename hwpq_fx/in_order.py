"""A decoder block's layers converted in order, while one batch is in memory at a time.

What `lockstep` does for a whole model is done for one block: the graph is the one that Dynamo has of it, and the inputs
are the hidden states that the dense blocks before it have made, and those of the converted ones. No run is kept where
it has come to: for each stage every batch runs from the block's start again.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from hwpq_fx.passes import Staged

from .blocks import Became, Block
from .calibration import Calibration
from .compress import check_weight, not_reached
from .config import HWPQConfig
from .errors import ModelError, first_line
from .layers import Layer
from .lockstep import Lane, Timed, compress_stages
from .plan import SPARSE
from .recording import Recording, Run
from .statistics import CalibrationRecorder


class NotInOrder(Exception):
    """Why a block's layers cannot be converted in order. blocked: those that have to stay dense, with the reasons, as
    far as Dynamo saw their weights used."""

    def __init__(self, reason: str, blocked: Mapping[str, str] | None = None):
        super().__init__(reason)
        self.blocked = dict(blocked or {})


def compress_block_in_order(block: Block, config: HWPQConfig, timed: Timed) -> Became:
    """What becomes of the layers, of which there is one at least. The block's dense hidden states go to disk. Raises
    NotInOrder, and CalibrationError and ModelError as `convert` does."""
    with block.filled():
        layers = [replace(layer, parameter=getattr(layer.owner, layer.attribute)) for layer in block.layers]
        return _compress_filled(block, layers, config, timed)


def _compress_filled(block: Block, layers: list[Layer], config: HWPQConfig, timed: Timed) -> Became:
    """layers: with their weights."""
    for layer in layers:
        check_weight(layer)
    try:
        traced = _Traced(block, {id(layer.parameter): layer.name for layer in layers})
    except ModelError as error:
        raise NotInOrder(str(error)) from error
    with closing(traced):
        with timed("observe"):
            traced.observe()
        blocked, became = traced.blocked(), Became()
        for layer in layers:
            seen = traced.recorder.uses.get(id(layer.parameter), {})
            reason = blocked.get(layer.name, "")
            if not reason and set(seen) != {layer.static_use}:
                kind = type(layer.owner).__name__
                raise NotInOrder(f"what Dynamo sees of {layer.name} is not what a {kind} does with its weight", blocked)
            became[layer.name] = reason or not_reached(seen)
        wanted = {id(layer.parameter): (layer, SPARSE) for layer in layers if not became[layer.name]}
        weights = traced.rehearsal.runs[0].weights()
        return became | compress_stages(weights, _Afresh(traced), wanted, config, timed, progress=False)


class _Captured(Exception):
    """A run that was about to begin."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run


class _Rehearsal(Recording):
    """Runs are checked as if they were recorded, but only their weights are kept. While `capturing`, one is not run,
    but raised: `_Captured`."""

    def __init__(self, recorder: CalibrationRecorder, names: dict[int, str]):
        super().__init__(recorder, 0, names, asked=False)
        self.capturing = False

    @contextmanager
    def of(self, staged: Staged, args: tuple[Any, ...]) -> Iterator[None]:
        run = Run(staged, args, self._recorder.call)
        if self.capturing:
            raise _Captured(run._replace(args=run.fresh()))
        self.ended = self.ended or self._why_not(run)
        yield
        parameters = (one if isinstance(one, nn.Parameter) else None for one in args)
        self.runs.append(run._replace(args=tuple(parameters)))


class _Traced(Calibration):
    """Of one filled block."""

    def __init__(self, block: Block, names: dict[int, str]):
        super().__init__(block.module)
        self.block, self._names = block, names
        self.recording = self.rehearsal = _Rehearsal(self.recorder, names)

    def close(self) -> None:
        self.remove()
        self.rehearsal.runs.clear()

    def blocked(self) -> dict[str, str]:
        """The layers that have to stay dense, as far as is known by now, and why."""
        return {name: self.recorder.blocked[one] for one, name in self._names.items() if one in self.recorder.blocked}

    def _before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Who runs the block has said already which call it is: a mask that the block is given need not be padding."""

    def observe(self) -> None:
        """Run the dense block on all batches. Raises NotInOrder."""
        for batch, told in enumerate(self.block.told):
            self.recorder.call = told
            try:
                self.block.pass_on(batch)
            except BackendCompilerFailed:  # our fault, not the block's
                raise
            except TorchDynamoException as error:
                raise NotInOrder(f"Dynamo cannot trace it: {first_line(error)}", self.blocked()) from error
            if self.rehearsal.ended:
                raise NotInOrder(self.rehearsal.ended, self.blocked())

    def captured(self, batch: int, converted: bool) -> Run:
        """What the block's graph is given for a batch."""
        self.recorder.call, self.rehearsal.capturing = self.block.told[batch], True
        try:
            self.block.run(batch, converted)
        except _Captured as captured:
            return captured.run
        finally:
            self.rehearsal.capturing = False
        raise AssertionError("every batch ran through a graph before")


class _Afresh:
    """A block's runs from its start, one at a time."""

    def __init__(self, traced: _Traced):
        self.traced = traced
        self.made: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Parameters and the new weights."""

    def __iter__(self) -> Iterator[Lane]:
        for batch in range(len(self.traced.block.calls)):
            yield self._lane(batch)

    def _lane(self, batch: int) -> Lane:
        dense, other = (self.traced.captured(batch, converted) for converted in (False, True))
        assert dense.staged is other.staged, "what a graph is chosen by is the same in both"
        lane = Lane.of(dense, other.args)
        for parameter, weight in self.made:
            lane.put(parameter, weight)
        return lane

    def put(self, parameter: torch.Tensor, weight: torch.Tensor) -> None:
        self.made.append((parameter, weight))
