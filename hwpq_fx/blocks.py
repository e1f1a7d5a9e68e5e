"""A decoder block on what is on disk for it, and its layers converted one by one."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from hwpq_fx.passes import Use
from hwpq_fx.passes.dynamo import mark_varying
from hwpq_fx.passes.observe import USED, VIEWS

from .compress import Compressed, Statistics, check_weight, compress, not_reached
from .config import HWPQConfig
from .errors import CalibrationError
from .layers import Layer, put
from .lockstep import Timed, runnable
from .resume import Run
from .skeleton import Call, Skeleton, hidden_of, run_block
from .statistics import CalibrationRecorder
from .statistics import Call as Told

ANSWERED = VIEWS | {"linear"}  # by a packed weight as by a dense one
Became = dict[str, Compressed | str]
"""By the names of layers: what each became, or why it stays dense."""


@dataclass
class Block:
    """A block of the skeleton, and what there is to run it on."""

    skeleton: Skeleton
    index: int
    layers: list[Layer]
    """Those that are converted unless calibration says otherwise."""
    calls: Sequence[Call]
    """By batch, how the model calls it. None without calibration."""
    told: Sequence[Told]
    """By batch, which call of the model that is, and its padding."""
    files: Run

    @property
    def module(self) -> nn.Module:
        return self.skeleton.blocks[self.index]

    @property
    def last(self) -> bool:
        return self.index + 1 == len(self.skeleton.blocks)

    def filled(self) -> AbstractContextManager[None]:
        """It has its dense weights inside of this."""
        return self.skeleton.filled(self.skeleton.prefix(self.index), self.module)

    def run(self, batch: int, converted: bool) -> Any:
        """What it returns for the hidden states that the dense blocks before it have made, or the converted ones."""
        device = self.skeleton.device
        hidden = mark_varying(self.files.hidden(self.index, batch, converted).to(device))
        tensors = [mark_varying(tensor.to(device)) for tensor in self.files.arguments(batch)]
        return run_block(self.module, self.calls[batch], hidden, tensors)

    def pass_on(self, batch: int, converted: bool = False) -> None:
        """Run it; the hidden states go to disk, for the next block."""
        made = hidden_of(self.run(batch, converted))
        if not self.last:
            self.files.write_hidden(self.index + 1, batch, made, converted)

    def pass_on_converted(self, became: Became) -> None:
        """The same of all batches with the new weights."""
        with self.filled():
            for layer in self.layers:
                if isinstance(one := became[layer.name], Compressed):
                    put(layer, runnable(one.weight))
            for batch in range(len(self.calls)):
                self.pass_on(batch, converted=True)


def compress_one_by_one(block: Block, config: HWPQConfig, timed: Timed) -> Became:
    """What becomes of the layers, each on the dense model's inputs, where there are batches. The block's dense hidden
    states go to disk. Raises CalibrationError and ModelError as `convert` does."""
    seen, became = None, Became()
    if block.calls:
        with timed("observe"):
            seen = _observe(block, config)
    stored = {id(tensor): name for name, tensor in block.skeleton.tensors_in(block.index)}
    with timed("choose and pack"):
        for layer in block.layers:
            statistics: Statistics = {cast(Use, layer.static_use): []}
            if seen is not None:
                statistics = seen.uses.pop(id(layer.parameter), {})
                if reason := seen.blocked.get(id(layer.parameter)) or not_reached(statistics):
                    became[layer.name] = reason
                    continue
            weight = block.skeleton.read(stored[id(layer.parameter)], block.skeleton.device)
            check_weight(replace(layer, parameter=cast(nn.Parameter, weight)))
            became[layer.name] = compress(layer.name, weight, statistics, config)
    return became


def _observe(block: Block, config: HWPQConfig) -> CalibrationRecorder:
    """What the layers of the dense block see in all batches, and whose weights are used otherwise, by id of the
    parameter."""
    recorder = CalibrationRecorder(config.gathered_bytes)
    with block.filled(), _observed(block.layers, recorder), _Uses(block.layers, recorder):
        for batch, told in enumerate(block.told):
            recorder.call = told
            block.pass_on(batch)
    return recorder


class _Uses(TorchFunctionMode):
    """Blocks layers of whose weights something besides their own calls makes what a packed weight would not."""

    def __init__(self, layers: list[Layer], recorder: CalibrationRecorder):
        super().__init__()
        self._layers = {id(getattr(layer.owner, layer.attribute)): layer for layer in layers}
        self._recorder = recorder
        self._called: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "_Uses":
        self._hooks += [
            hook
            for layer in self._layers.values()
            for hook in (
                layer.owner.register_forward_pre_hook(self._begin),
                layer.owner.register_forward_hook(self._end),
            )
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _begin(self, owner: nn.Module, _: Any) -> None:
        self._called.append(owner)

    def _end(self, *_: Any) -> None:
        self._called.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # a property's getter is told from others by what it is of
        name = getattr(func.__self__ if func.__name__ == "__get__" else func, "__name__", "")
        name = name.removeprefix("__").removesuffix("__")
        if name not in ANSWERED and any(isinstance(one, torch.Tensor) for one in tree_leaves(made)):
            for one in tree_leaves((args, kwargs)):
                layer = self._layers.get(id(one))
                if layer is not None and layer.owner not in self._called:
                    self._recorder.block(layer.parameter, f"{USED}{name}, which is not the layer's own call")
        return made


@contextmanager
def _observed(layers: list[Layer], recorder: CalibrationRecorder) -> Iterator[None]:
    """Calls of the layers are seen by `recorder`. Layers that are given the same tensor share what is gathered, as in
    `convert`."""
    leaders: dict[int, Layer] = {}
    last: tuple[Layer, torch.Tensor, int] | None = None

    def seen(layer: Layer, x: torch.Tensor) -> None:
        nonlocal last
        key, use = id(layer.parameter), layer.static_use
        assert use is not None
        same = last is not None and x is last[1] and x._version == last[2]
        leader = last[0] if last is not None and same else layer
        if leaders.setdefault(key, leader) is not leader:
            raise CalibrationError(f"{layer.name} shares its input with another layer in some batches, not in others")
        if leader is layer:
            recorder.observe(x, (layer.parameter,), (use,))
            last = layer, x, x._version
        else:
            recorder.uses[key] = {use: next(iter(recorder.uses[id(leader.parameter)].values()))}

    hooks = [
        layer.owner.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: seen(layer, args[0] if args else kwargs["input"]), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
