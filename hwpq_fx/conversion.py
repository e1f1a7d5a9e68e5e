"""`prepare` and `convert`: the one call, and the same in two steps."""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from rich.progress import track
from torch import nn

from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.passes import HwpqBackend
from hwpq_fx.passes.dynamo import compile_in_place, compile_settings, unwrap

from .calibration import Calibration
from .compress import Compressed, Statistics, cannot_compress, compress
from .config import DEFAULT_IGNORE, HWPQConfig
from .errors import CalibrationError, ModelError
from .layers import Layer, check_convertible, layers_of, replace
from .report import LayerReport, Report, attach_report
from .targets import check_all_match, matches

M = TypeVar("M", bound=nn.Module)
PREPARED = "_hwpq_prepared"


@dataclass
class _Prepared:
    config: HWPQConfig
    calibration: Calibration | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def prepare(model: M, config: HWPQConfig | None = None) -> M:
    """Put observers on `model`, in place: run your calibration through it, then `convert(model)`.

    Every call of the model (`model(...)`, `model.generate(...)`) is observed until then, eagerly. Raises ConfigError
    or ModelError and changes nothing where the model or the config does not fit.
    """
    config = _checked(model, config)
    module = unwrap(model)
    if PREPARED in module.__dict__:
        raise ModelError("the model is prepared already: run batches through it, then call convert(model)")
    module.__dict__[PREPARED] = _Prepared(config, Calibration(model))
    return model


def convert(
    model: M,
    calib: Iterable[Any] | Callable[[nn.Module], Any] | None = None,
    config: HWPQConfig | None = None,
    *,
    progress: bool = False,
) -> M:
    """Make the linear layers of `model` 2:4 sparse FP8, in place, and return it.

    model: an nn.Module in eval mode, or what `torch.compile` made of one. A compiled model stays compiled, with its
    own settings, for `model(...)` and `model.generate(...)`; a plain one stays plain.
    calib: an iterable of batches, each a tensor, a tuple of arguments or a mapping of named ones; or a callable that
    is given the model and runs it; or None, for a model that `prepare` made (its observations are used) or else for
    a data-free conversion. Where a batch has a 2-D `attention_mask`, rows where it is 0 do not count.
    progress: show bars.

    Raises ConfigError, CalibrationError, ModelError or TypeError; whatever is raised, Ctrl-C included, the model is
    then as it was before, without observers. `hwpq_fx.report(model)` tells what was done to each layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: an nn.Module or torch.compile(module) is wanted")
    module = unwrap(model)
    prepared = module.__dict__.pop(PREPARED, None)
    if prepared is None:
        config = _checked(model, config)
        prepared = _Prepared(config, None if calib is None else Calibration(model))
    else:
        if config is not None:
            _end(prepared)
            raise ModelError("a prepared model has its config already: give it to prepare(), not to convert()")
        _checked(model, prepared.config)
    try:
        if prepared.calibration is not None:
            _calibrate(prepared, calib, progress)
        chosen, report = _compress_all(module, prepared, progress)
    finally:
        _end(prepared)

    # from here on nothing is expected to fail
    for layer, compressed in chosen:
        replace(layer, compressed.weight)
    with prepared.timed("lay out"):
        for layer, compressed in chosen:
            _expand(layer, compressed.line)
    report.seconds = prepared.seconds
    attach_report(module, report)
    if (settings := compile_settings(model)) is not None:
        compile_in_place(model, HwpqBackend(settings.backend), settings)
    return model


def _checked(model: nn.Module, config: HWPQConfig | None) -> HWPQConfig:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: an nn.Module or torch.compile(module) is wanted")
    if config is None:
        config = HWPQConfig()
    elif not isinstance(config, HWPQConfig):
        raise TypeError(f"config is {type(config).__name__}, not HWPQConfig")
    module = unwrap(model)
    check_convertible(module)
    names = [layer.name for layer in layers_of(module)]
    if not names:
        raise ModelError("the model has no 2-D floating point parameter: there is nothing to convert")
    check_all_match("targets", config.targets or (), names)
    check_all_match("ignore", [p for p in config.ignore if p not in DEFAULT_IGNORE], names)
    return config


def _end(prepared: _Prepared) -> None:
    if prepared.calibration is not None:
        prepared.calibration.remove()


def _calibrate(prepared: _Prepared, calib: Any, progress: bool) -> None:
    calibration = prepared.calibration
    assert calibration is not None
    if calib is None:
        if calibration.recorder.calls == 0:
            raise CalibrationError("no batch has been run through the prepared model")
        return
    if progress and isinstance(calib, Iterable):
        calib = track(calib, "observe", total=len(calib) if isinstance(calib, Sized) else None)
    with prepared.timed("observe"):
        calibration.run(calib)


@torch.no_grad()
def _compress_all(
    module: nn.Module, prepared: _Prepared, progress: bool
) -> tuple[list[tuple[Layer, Compressed]], Report]:
    """Choose and pack every layer without touching the model."""
    report, chosen = Report(), []
    layers = layers_of(module)
    with prepared.timed("choose and pack"):
        for layer in track(layers, "choose and pack") if progress else layers:
            statistics, reason = _statistics(layer, prepared)
            if not statistics and not reason:
                continue  # no product: an embedding, a table of positions
            uses = list(statistics)
            rows, cols = layer.parameter.shape
            shape = (cols, rows) if uses and uses[0].transposed else (rows, cols)
            reason = reason or _not_wanted(layer.name, prepared.config)
            reason = reason or cannot_compress(shape, uses, prepared.config)
            if reason:
                seen = sum(one.rows for many in statistics.values() for one in many)
                report.layers.append(
                    LayerReport(layer.name, shape, "dense", reason, rows=seen, dense_bytes=layer.parameter.nbytes)
                )
                continue
            compressed = compress(layer.name, layer.parameter, statistics, prepared.config)
            chosen.append((layer, compressed))
            report.layers.append(compressed.line)
    if not chosen:
        why = "; ".join(f"{line.name}: {line.reason}" for line in report.layers[:5])
        raise ModelError(f"nothing is left to convert ({why or 'no product with a parameter was found'})")
    return chosen, report


def _statistics(layer: Layer, prepared: _Prepared) -> tuple[Statistics, str]:
    """What is known of a layer's inputs, and why it must stay dense as far as its uses tell."""
    static = layer.static_use
    if prepared.calibration is None:
        statistics: Statistics = {static: []} if static else {}
        reason = ""
    else:
        recorder, key = prepared.calibration.recorder, id(layer.parameter)
        statistics = recorder.uses.get(key, {})
        reason = recorder.blocked.get(key, "") if statistics or static else ""
        if static and not statistics and not reason:
            reason = "not reached"
    if statistics and layer.aliases:
        reason = f"shared with {', '.join(layer.aliases)}"
    return statistics, reason


def _not_wanted(name: str, config: HWPQConfig) -> str:
    if any(matches(name, pattern) for pattern in config.ignore):
        return "ignored"
    if config.targets is not None and not any(matches(name, pattern) for pattern in config.targets):
        return "not in targets"
    return ""


def _expand(layer: Layer, line: LayerReport) -> None:
    weight = getattr(layer.owner, layer.attribute)
    if isinstance(weight, Float8Sparse24Tensor):
        expanded = weight.expand()
        line.layout_bytes = expanded.layout_nbytes()
        replace(layer, expanded)
