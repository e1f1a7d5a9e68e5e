"""Running a model over calibration batches while its inputs are observed."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hwpq_fx.passes import observe
from hwpq_fx.passes.dynamo import Observation, mark_varying, unwrap

from .errors import CalibrationError
from .statistics import CalibrationRecorder


class Calibration:
    """While it stands, every call of the model is observed. `remove()` ends it and restores the model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.recorder = CalibrationRecorder()
        self._signature = inspect.signature(unwrap(model).forward)
        self._observation = Observation(model, self._backend, self._before_call)

    def remove(self) -> None:
        self._observation.remove()

    def _backend(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        observed = observe(gm, self.recorder)

        def run(*args: Any) -> Any:
            for place, reason in observed.blocked.items():
                self.recorder.block(args[place], reason)
            return observed.gm(*args)

        # eagerly: compiling for a handful of batches costs more than it saves
        return run

    def _before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            bound = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError:  # the model itself will say what is wrong with the arguments
            bound = {}
        mask = kwargs.get("attention_mask", bound.get("attention_mask"))
        self.recorder.begin_call(mask)

    @torch.no_grad()
    def run(self, calib: Iterable[Any] | Callable[[nn.Module], Any]) -> None:
        """Feed the model. Raises CalibrationError where there is no batch or the model refuses one, TypeError where
        `calib` is not of the kinds that `convert` takes."""
        if callable(calib) and not isinstance(calib, Iterable):
            calib(self.model)
        else:
            self._run_batches(calib)
        if self.recorder.calls == 0:
            raise CalibrationError("calibration ran no batch: calib is empty, or never called the model")

    def _run_batches(self, calib: Iterable[Any]) -> None:
        if isinstance(calib, (torch.Tensor, Mapping, str)) or not isinstance(calib, Iterable):
            raise TypeError(
                f"calib is {type(calib).__name__}, one batch or none; pass an iterable of batches: [batch], a list or "
                "a DataLoader"
            )
        for number, batch in enumerate(calib):
            args, kwargs = as_call(batch, f"calib batch {number}")
            args = tuple(_marked(value) for value in args)
            kwargs = {name: _marked(value) for name, value in kwargs.items()}
            try:
                self.model(*args, **kwargs)
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                raise CalibrationError(
                    f"the model refused calibration batch {number}: {type(error).__name__}: {first}"
                ) from error


def as_call(batch: Any, what: str = "batch") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of a call: a tensor, a tuple or list of arguments, or a mapping of named ones."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise TypeError(f"{what} is {type(batch).__name__}: a tensor, a tuple of arguments or a mapping is wanted")


def _marked(value: Any) -> Any:
    return mark_varying(value) if isinstance(value, torch.Tensor) else value
