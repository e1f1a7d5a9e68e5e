"""`prepare` and `convert`: the one call, and the same in two steps."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from hwpq_fx.passes import HwpqBackend, Use
from hwpq_fx.passes.dynamo import compile_in_place, compile_settings, unwrap
from hwpq_fx.passes.observe import MULTIPLIED
from hwpq_fx.passes.undo import undone_after, undone_on_failure

from .calibration import Calibration, tracked
from .checkpoint import attach
from .compress import (
    Compressed,
    Statistics,
    cannot_be_fp8,
    cannot_compress,
    check_packing_format,
    check_weight,
    compress,
    compress_fp8,
    dense_line,
    fast,
    not_reached,
    shape_of,
    stacked_lines,
)
from .config import HWPQConfig, check_for_model
from .context import as_written
from .distributed import reduce_statistics
from .effects import CallSample, Change, effects_of
from .errors import CalibrationError, ConfigError, ModelError
from .float8 import dense_float8
from .layers import (
    Layer,
    check_convertible,
    check_patterns,
    is_target,
    layers_of,
    left_out,
    module_of,
    put,
    without_nested_tensors,
)
from .lockstep import compress_in_order, held_bytes
from .plan import (
    DEFAULT_GPU,
    DENSE,
    ERROR,
    FP8,
    SPARSE,
    Plan,
    PlannedLayer,
    check_gpu,
    check_sparsity,
    check_status,
    decide,
    mark_outliers,
    times_of,
)
from .recording import no_room
from .report import LayerReport, Report, attach_report

M = TypeVar("M")  # nn.Module, or the wrapper that torch.compile returns: for type checkers just a callable
PREPARED = "_hwpq_prepared"
SEVERAL = "several processes share the batches"
# prepared models whose conversion failed after their observers were gone
_spent: "WeakSet[nn.Module]" = WeakSet()


@dataclass
class _Prepared:
    config: HWPQConfig
    calibration: Calibration | None
    seconds: dict[str, float] = field(default_factory=dict)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "a prepared model is neither copied nor pickled, for its observers belong to this one: copy it before "
            "prepare, or convert it first"
        )

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
    module = module_of(model)
    config = _checked(module, config)
    if PREPARED in module.__dict__:
        raise ModelError("the model is prepared already: run batches through it, then call convert(model)")
    prepared = _Prepared(config, None)
    with undone_on_failure(partial(_end, module, prepared)):
        module.__dict__[PREPARED] = prepared  # first: pickle comes to it before the observed forward
        prepared.calibration = _calibration(model, config, config.bounded)
        _spent.discard(module)
        return model


def convert(
    model: M,
    calib: Iterable[Any] | Callable[[nn.Module], Any] | None = None,
    config: HWPQConfig | None = None,
    *,
    plan: Plan | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    progress: bool = False,
) -> M:
    """Make the linear layers of `model` 2:4 sparse FP8, in place, and return it.

    model: an nn.Module in eval mode, or what `torch.compile` made of one. A compiled model stays compiled, with its
    own settings, for `model(...)` and `model.generate(...)`; a plain one stays plain.
    calib: an iterable of batches, each a tensor, a tuple of arguments or a mapping of named ones; or a callable that
    is given the model and runs it; or None, for a model that `prepare` made (its observations are used) or else for
    a data-free conversion. Where a batch has a 2-D `attention_mask`, rows where it is 0 do not count.
    plan: what every layer is to become, from `hwpq_fx.plan`; layers it does not name stay dense.
    group: of processes that each call this with the same model and their share of the batches (`torchrun`;
    `torch.distributed.group.WORLD`): all end with the same weights, those of one process over all batches, converting
    layers one by one, up to the order of adding (see `hwpq_fx.distributed`).
    progress: show bars.

    Raises ConfigError, CalibrationError, ModelError or TypeError; whatever is raised, Ctrl-C included, the model is
    then as it was before, without observers (a prepared one stays prepared where the arguments were wrong).
    `hwpq_fx.report(model)` tells what was done to each layer.
    """
    module = module_of(model)
    prepared = module.__dict__.get(PREPARED)
    if prepared is not None and config is not None:
        raise ModelError("a prepared model has its config already: give it to prepare(), not to convert()")
    config = _checked(module, config if prepared is None else prepared.config)
    if plan is not None:
        _check_plan_for(module, plan, config)
    if group is not None and config.sequential:  # asked for in so many words
        raise ConfigError("sequential is for one process: the layers are converted where all batches are")
    if group is not None and plan is None and config.max_divergence is not None:
        raise ConfigError("max_divergence is for one process: give all of them the plan that hwpq_fx.plan makes in one")
    if prepared is None:
        if calib is None and module in _spent:
            _spent.discard(module)
            raise ModelError(
                "what had been observed went with the conversion that failed: prepare the model again, or give calib; "
                "once more without either converts without calibration"
            )
        prepared = _Prepared(config, None)
    elif calib is None and prepared.calibration.recorder.calls == 0:
        raise CalibrationError("no batch has been run through the prepared model")
    # from here on it is prepared no more, whatever happens
    with undone_after(partial(_end, module, prepared)):
        if prepared.calibration is not None:
            _spent.add(module)
        elif calib is not None:
            alone = config if group is None else replace(config, sequential=False)
            prepared.calibration = _calibration(model, alone, config.bounded and group is None and plan is None)
        if prepared.calibration is not None:
            _calibrate(prepared.calibration, prepared, calib, progress)
            if group is not None:
                recording = prepared.calibration.recording
                if recording and not recording.ended:
                    recording.end(SEVERAL)
                prepared.calibration.sample = None  # of this process alone
                with prepared.timed("reduce"):
                    reduce_statistics(module, prepared.calibration.recorder, group)
    # the model, or parts of it that were compiled one by one
    parts: list[Any] = [model, *(part for part in module.modules() if part is not module)]
    with undone_on_failure(_as_now([module, *parts])), as_written():
        made, report = _compress_all(module, prepared, progress, plan)
        if group is not None and config.in_order:
            report.one_by_one = SEVERAL
        compiled = [(part, settings) for part in parts if (settings := compile_settings(part))]
        for layer, weight in made:
            put(layer, weight)
        without_nested_tensors(module)
        for part, settings in compiled:
            compile_in_place(part, HwpqBackend(settings.backend), settings)
        attach(module, prepared.config)
        attach_report(module, report)
        _spent.discard(module)
        return model


def _end(module: nn.Module, prepared: _Prepared) -> None:
    """Be it prepared or observed no more."""
    if prepared.calibration is not None:
        prepared.calibration.remove()
    module.__dict__.pop(PREPARED, None)


def _as_now(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """What gives these modules, and the configs that transformers' have, the attributes and parameters again that they
    have now."""
    places = [place for module in modules for place in (vars(module), module._parameters)]
    configs = (vars(module).get("config") for module in modules)
    places += [vars(config) for config in configs if hasattr(config, "__dict__")]
    had = [(place, dict(place)) for place in places]

    def put_back() -> None:
        for place, before in had:
            for new in place.keys() - before.keys():
                del place[new]
            place.update(before)

    return put_back


def _calibration(model: Any, config: HWPQConfig, weigh: bool) -> Calibration:
    """weigh: layers against each other, by the effects that they have."""
    layers = {id(layer.parameter): layer for layer in layers_of(unwrap(model)) if not left_out(layer, config)}

    def wanted(weight: torch.Tensor, use: Use) -> bool:
        return id(weight) in layers and not cannot_compress(layers[id(weight)], [use], config)

    names = {at: layer.name for at, layer in layers.items()} if config.in_order else None
    sample = CallSample() if weigh and config.max_loss is None else None
    return Calibration(model, config.gathered_bytes, names, wanted, config.sequential is True, sample)


def _checked(module: nn.Module, config: HWPQConfig | None) -> HWPQConfig:
    """The config to use, a copy, once it and the model are found to fit."""
    config = check_for_model(config)
    check_convertible(module)
    layers = layers_of(module)
    if not layers:
        raise ModelError("the model has no 2-D floating point parameter: there is nothing to convert")
    for device in {layer.parameter.device for layer in layers}:
        check_packing_format(config, device)
    check_patterns(layers, config)
    return config


def _calibrate(calibration: Calibration, prepared: _Prepared, calib: Any, progress: bool) -> None:
    if calib is not None:
        with prepared.timed("observe"):
            calibration.run(calib, progress)


def plan(
    model: M,
    calib: Iterable[Any] | Callable[[nn.Module], Any] | None = None,
    config: HWPQConfig | None = None,
    *,
    gpu: str = DEFAULT_GPU,
    progress: bool = False,
) -> Plan:
    """What is to become of every layer that can be converted, without converting: to look at, to change by hand, and
    to give to `convert(..., plan=plan)`. Of the layers that stay dense whatever happens it says nothing.

    By the config's bounds each layer becomes 2:4, dense FP8 or stays as it is, least loss for time saved first. What it
    loses is what its error does to the model's output (`hwpq_fx.effects`, which takes gradients, of up to 16 sequences
    of the calibration); or, with `config.max_loss` and where that cannot be found out (the plan says why), its own
    relative error. Times are for `config.typical_rows` rows: by the roofline model of `gpu` (see
    `hwpq_fx.kernels.gpus`), or as measured where the model is on a GPU that `hwpq-fx tune` has measured. Layers whose
    loss is out of the ordinary stay dense. Raises as `convert` does, CalibrationError where `config.max_divergence`
    bounds what cannot be found out; the model is left as it was.
    """
    module = module_of(model)
    if PREPARED in module.__dict__:
        raise ModelError("the model is prepared for convert(): plan() runs its own batches, on a model that is not")
    config = _checked(module, config)
    check_sparsity(config.sparsity)
    check_gpu(gpu)
    prepared = _Prepared(replace(config, sequential=False), None)
    with undone_after(partial(_end, module, prepared)):
        if calib is not None:
            prepared.calibration = _calibration(model, prepared.config, weigh=True)
            _calibrate(prepared.calibration, prepared, calib, progress)
    with as_written():
        candidates, _ = _candidates(module, prepared)
        return _planned(module, candidates, prepared, gpu, progress)[0]


def _candidates(module: nn.Module, prepared: _Prepared) -> tuple[list[tuple[Layer, Statistics]], list[LayerReport]]:
    """The layers to compress with what is known of their inputs, and report lines for those that stay dense.

    Raises ModelError where a weight is bad or nothing is left to convert.
    """
    found = [(layer, *_plan(layer, prepared)) for layer in layers_of(module)]
    # before any layer is packed: a bad weight makes the inputs of later layers bad, and it is the one to name
    for layer, statistics, reason in found:
        if statistics and not reason:
            check_weight(layer)
    lines = [dense_line(layer, statistics, reason) for layer, statistics, reason in found if reason]
    lines += stacked_lines(module)
    candidates = [(layer, statistics) for layer, statistics, reason in found if statistics and not reason]
    if not candidates:
        why = "; ".join(f"{line.name}: {line.reason}" for line in lines[:5])
        raise ModelError(f"nothing is left to convert ({why or 'no product with a parameter was found'})")
    return candidates, lines


def _planned(
    module: nn.Module, candidates: list[tuple[Layer, Statistics]], prepared: _Prepared, gpu: str, progress: bool
) -> tuple[Plan, dict[str, Compressed]]:
    """A plan by the config's bounds, and every layer's 2:4 form, which its error was taken from."""
    config, layers, sparse = prepared.config, [], {}
    with tracked(candidates, "plan", progress) as steps:
        for layer, statistics in steps:
            made = sparse[layer.name] = compress(layer.name, layer.parameter, statistics, config)
            errors = {DENSE: 0.0, SPARSE: made.line.error}
            if not cannot_be_fp8(layer, list(statistics), config):
                errors[FP8] = compress_fp8(layer.name, layer.parameter, statistics, config).line.error
            layers.append(PlannedLayer(layer.name, made.line.shape, errors, {}))
    measure, by_error = _add_effects(module, layers, candidates, prepared, sparse)
    products = [(layer.shape, layer.errors) for layer in layers]
    device = candidates[0][0].parameter.device
    times, timing = times_of(products, config.typical_rows, gpu, device, config.activation)
    for planned, microseconds in zip(layers, times, strict=True):
        planned.microseconds = microseconds
    mark_outliers(layers)
    frontier = decide(layers, config.max_divergence if config.max_loss is None else config.max_loss, config.min_speedup)
    return Plan(layers, config.typical_rows, timing, frontier, measure, by_error), sparse


def _add_effects(
    module: nn.Module,
    layers: list[PlannedLayer],
    candidates: list[tuple[Layer, Statistics]],
    prepared: _Prepared,
    sparse: dict[str, Compressed],
) -> tuple[str, str]:
    """Note what each layer does to the output, where layers are weighed by that. By what they are weighed, and why by
    their errors where that was not wanted."""
    config, sample = prepared.config, prepared.calibration.sample if prepared.calibration else None
    if sample is None:
        if config.max_divergence is not None:
            raise CalibrationError("max_divergence takes calibration: give batches, or max_loss instead")
        return ERROR, ""
    changes = {
        layer.name: _change(layer, statistics, sparse[layer.name], FP8 in planned.errors, config)
        for planned, (layer, statistics) in zip(layers, candidates, strict=True)
    }
    try:
        effects, measure = effects_of(module, sample.calls, changes)
    except CalibrationError as error:
        if config.max_divergence is not None:
            raise CalibrationError(
                f"max_divergence: {error}; max_loss takes no more than the layers' errors"
            ) from error
        return ERROR, str(error)
    for planned in layers:
        planned.effects = {DENSE: 0.0, **effects[planned.name]}
    return measure, ""


def _change(layer: Layer, statistics: Statistics, sparse: Compressed, fp8: bool, config: HWPQConfig) -> Change:
    made: dict[str, Callable[[], torch.Tensor]] = {SPARSE: sparse.weight.dequantize}
    if fp8:
        made[FP8] = lambda: dense_float8(layer.parameter.detach(), config.activation).dequantize()
    return Change(layer.parameter, next(iter(statistics)).transposed, made)


def _compress_all(
    module: nn.Module, prepared: _Prepared, progress: bool, plan: Plan | None
) -> tuple[list[tuple[Layer, torch.Tensor]], Report]:
    """Choose and pack every layer without touching the model: the new weights, and what the report says."""
    config, calibration = prepared.config, prepared.calibration
    recording = calibration.recording if calibration else None
    sparse: dict[str, Compressed] = {}
    bounded = plan is None and config.bounded
    if recording and recording.runs:
        with prepared.timed("observe"):
            if config.sequential is None and (reason := no_room("activations take", held_bytes(recording.runs), {})):
                recording.end(reason)
            elif bounded:
                recording.replay()
    candidates, lines = _candidates(module, prepared)
    if bounded:
        with prepared.timed("plan"):
            plan, sparse = _planned(module, candidates, prepared, DEFAULT_GPU, progress)
    wanted = _wanted(plan, candidates)
    chosen = []
    for layer, statistics in candidates:
        status, reason = wanted.get(layer.name, (SPARSE, ""))
        if status == DENSE:
            lines.append(dense_line(layer, statistics, reason))
        else:
            chosen.append((layer, statistics, status))
    if not chosen:
        raise ModelError("the plan leaves every layer dense: there is nothing to convert")
    if calibration and recording and recording.runs:
        calibration.recorder.drop_curvature()
        statuses = {id(layer.parameter): (layer, status) for layer, _, status in chosen}
        made = compress_in_order(recording.runs, statuses, config, prepared.timed, progress)
    else:
        made = {}
        with prepared.timed("choose and pack"), tracked(chosen, "choose and pack", progress) as steps:
            for layer, statistics, status in steps:
                how = compress if status == SPARSE else compress_fp8
                new = sparse.get(layer.name) if status == SPARSE else None
                made[layer.name] = new or how(layer.name, layer.parameter, statistics, config)
    lines += [new.line for new in made.values()]
    order = {layer.name: place for place, layer in enumerate(layers_of(module))}
    lines.sort(key=lambda line: order.get(line.name, len(order)))
    report = Report(lines, prepared.seconds, recording.ended if recording else "")
    with prepared.timed("lay out"):
        siblings = calibration.recorder.siblings() if calibration else set()
        new_weights = [(one, fast(made[one.name], config, id(one.parameter) in siblings)) for one, _, _ in chosen]
    return new_weights, report


def _check_plan_for(module: nn.Module, plan: Plan, config: HWPQConfig) -> None:
    """Raise TypeError or ConfigError for what can be told before calibration, which takes long."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is {type(plan).__name__}, not what hwpq_fx.plan gives or Plan.load reads")
    check_sparsity(config.sparsity)
    _check_plan(plan, {layer.name: tuple(layer.parameter.shape) for layer in layers_of(module)}, turned=True)


def _check_plan(plan: Plan, shapes: Mapping[str, tuple[int, ...]], turned: bool = False) -> None:
    """Raise ConfigError where a plan does not fit layers of these shapes, [N, K] or, where `turned`, [K, N] as well."""
    for name, one in plan.statuses().items():
        check_status(one)
        if one.status == DENSE:
            continue
        if name not in shapes:
            raise ConfigError(f"the plan makes {name} {one.status}: the model has no such layer to convert")
        shape = shapes[name]
        if tuple(one.shape) not in ((shape, shape[::-1]) if turned else (shape,)):
            raise ConfigError(f"the plan has {name} as {one.shape}, the model as {shape}")


def _wanted(plan: Plan | None, candidates: list[tuple[Layer, Statistics]]) -> dict[str, tuple[str, str]]:
    """Status and reason by layer, as the plan says; nothing without one. Raises ConfigError where it does not fit."""
    if plan is None:
        return {}
    planned, shapes = plan.statuses(), {layer.name: shape_of(layer.parameter, list(uses)) for layer, uses in candidates}
    _check_plan(plan, shapes)
    missing = PlannedLayer("", (0, 0), {}, {}, DENSE, "not in the plan")
    found = {name: planned.get(name, missing) for name in shapes}
    return {name: (one.status, one.reason or "the plan") for name, one in found.items()}


def _plan(layer: Layer, prepared: _Prepared) -> tuple[Statistics, str]:
    """What is known of a layer's inputs, and why it stays dense, or "". Neither for what multiplies nothing: an
    embedding, a table of positions."""
    config, static = prepared.config, layer.static_use
    if prepared.calibration is None:
        statistics: Statistics = {static: []} if static else {}
        reason = layer.unsure
    else:
        recorder, key = prepared.calibration.recorder, id(layer.parameter)
        statistics = recorder.uses.get(key, {})
        reason = recorder.blocked.get(key, "") or not_reached(statistics)
    if not statistics and not static and not reason.startswith(MULTIPLIED):
        return {}, "no product with it was seen" if is_target(layer, config) else ""
    return statistics, left_out(layer, config) or reason or cannot_compress(layer, list(statistics), config)
