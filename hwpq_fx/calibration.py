"""Running a model over calibration batches while its inputs are observed."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, TypeVar

import torch
from rich.progress import Progress
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from hwpq_fx.passes import observe, stages
from hwpq_fx.passes.dynamo import Observation, mark_varying, unwrap
from hwpq_fx.passes.undo import undone_on_failure

from .effects import CallSample
from .errors import CalibrationError, ModelError, first_line
from .layers import layers_of
from .recording import Recording
from .statistics import CalibrationRecorder, Wanted

T = TypeVar("T")


class Calibration:
    """While it stands, every call of the model is observed. `remove()` ends it and restores the model.

    sequential: record the graphs that run, and gather no curvature meanwhile; the names of the layers that may be
    converted, by the ids of their parameters. wanted: as `CalibrationRecorder` has it. asked: as `Recording` has it.
    sample: of the calls, to be run again. Raises ModelError where Dynamo is off.
    """

    def __init__(
        self,
        model: Any,
        curvature_bytes: int | None = 0,
        sequential: Mapping[int, str] | None = None,
        wanted: Wanted | None = None,
        asked: bool = True,
        sample: CallSample | None = None,
    ):
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise ModelError("TORCHDYNAMO_DISABLE is set, so that nothing can be traced: unset it to calibrate")
        self.model, self.sample = model, sample
        self.recorder = CalibrationRecorder(curvature_bytes if sequential is None else 0, wanted)
        self.recording = None if sequential is None else Recording(self.recorder, curvature_bytes, sequential, asked)
        module = unwrap(model)
        self._signature = inspect.signature(module.forward)
        owners = {layer.owner: None for layer in layers_of(module) if layer.static_use}
        self._framed = [owner for owner in owners if owner is not module and "forward" not in vars(owner)]
        self._observation: Observation | None = None
        with undone_on_failure(self.remove):
            for owner in self._framed:
                owner.forward = MethodType(_forward, owner)
            self._observation = Observation(model, self._backend, self._before_call)

    def remove(self) -> None:
        if self._observation is not None:
            self._observation.remove()
        for owner in self._framed:
            vars(owner).pop("forward", None)

    def _backend(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        observed = observe(gm, self.recorder)
        recording = self.recording
        staged = stages(observed) if recording and not recording.ended else None
        forward = observed.gm.forward  # a GraphModule that is called itself prints what goes wrong in it

        def run(*args: Any) -> Any:
            for place, reason in observed.blocked.items():
                self.recorder.block(args[place], reason)
            with recording.of(staged, args) if recording and staged else nullcontext():
                return forward(*args)

        # eagerly: compiling for a handful of batches costs more than it saves
        return run

    def _before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            bound = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError:  # the model itself will say what is wrong with the arguments
            bound = {}
        given = bound | kwargs
        masks = [given.get("attention_mask")]
        if "decoder_input_ids" in self._signature.parameters:  # the other mask is the encoder's
            tokens = (given.get(name) for name in ("decoder_input_ids", "labels"))
            ones = next((torch.ones_like(one) for one in tokens if isinstance(one, torch.Tensor)), None)
            mask = given.get("decoder_attention_mask")
            masks.append(ones if mask is None else mask)
        self.recorder.begin_call(*masks)
        if self.sample:
            self.sample.offer(args, kwargs, self.recorder.call.masks)

    @torch.no_grad()
    def run(self, calib: Iterable[Any] | Callable[[nn.Module], Any], progress: bool = False) -> None:
        """Feed the model. Raises CalibrationError where there is no batch or the model refuses one, TypeError where
        `calib` is not of the kinds that `convert` takes."""
        if callable(calib) and not isinstance(calib, Iterable):
            calib(self.model)
        elif isinstance(calib, (torch.Tensor, Mapping, str)) or not isinstance(calib, Iterable):
            raise TypeError(
                f"calib is {type(calib).__name__}, one batch or none; pass an iterable of batches: [batch], a list or "
                "a DataLoader"
            )
        else:
            with tracked(calib, "observe", progress) as batches:
                self._run_batches(batches)
        if self.recorder.calls == 0:
            raise CalibrationError("calibration ran no batch: calib is empty, or never called the model")

    def _run_batches(self, calib: Iterable[Any]) -> None:
        for number, batch in enumerate(calib):
            args, kwargs = as_call(batch, f"calib batch {number}")
            args = tuple(_marked(value) for value in args)
            kwargs = {name: _marked(value) for name, value in kwargs.items()}
            try:
                self.model(*args, **kwargs)
            except BackendCompilerFailed:  # our fault, not the batch's
                raise
            except Exception as error:
                cause = _cause(error)
                raise CalibrationError(
                    f"the model refused calibration batch {number}: {type(cause).__name__}: {first_line(cause)}"
                ) from error


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What linear layers run while they are observed. Dynamo passes over frames inside torch.nn: without a frame of
    ours, a layer called by code that Dynamo gave up on (a graph break inside a loop) would not be seen."""
    return type(self).forward(self, *args, **kwargs)


def as_call(batch: Any, what: str = "batch") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of a call: a tensor, a tuple or list of arguments, or a mapping of named ones."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise TypeError(f"{what} is {type(batch).__name__}: a tensor, a tuple of arguments or a mapping is wanted")


@contextmanager
def tracked(items: Iterable[T], what: str, progress: bool) -> Iterator[Iterable[T]]:
    """`items`, with a bar where `progress` is wanted. The bar ends with the block, an exception included."""
    if not progress:
        yield items
        return
    with Progress() as bars:
        yield bars.track(items, description=what)


def _cause(error: BaseException) -> BaseException:
    """What the model itself raised, where Dynamo met it while tracing."""
    while isinstance(error, TorchDynamoException) and (below := error.__cause__ or error.__context__):
        error = below
    return error


def _marked(value: Any) -> Any:
    return mark_varying(value) if isinstance(value, torch.Tensor) else value
