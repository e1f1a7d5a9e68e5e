"""A causal language model on the meta device, whose modules are given their weights for as long as they run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import CalibrationError, ModelError, first_line
from .shards import Shards

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def on_meta(source: str | Path, stored_dtype: Callable[[], torch.dtype]) -> Any:
    """The dense causal language model of a folder or a hub id, on the meta device. stored_dtype: asked for where
    config.json has none. Raises ModelError where there is no such model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # transformers raises whatever its parts do
        raise ModelError(f"{source}: {first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{source} is quantized already")
    dtype = config.dtype or stored_dtype()
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            kind = " or ".join(config.architectures or [type(config).__name__])
            raise ModelError(f"{source}: a {kind} is no causal language model: use hwpq_fx.convert") from error


class Skeleton:
    """The model of a checkpoint without its weights.

    Raises ModelError for a folder that is no such model, is converted or quantized already, or lacks a tensor under
    the name that the model has for it.
    """

    def __init__(self, shards: Shards, device: torch.device):
        self.shards, self.device = shards, device
        self.model = on_meta(shards.folder, lambda: shards.dtype).eval().requires_grad_(False)
        self._compute_buffers()
        self.name, self.blocks = blocks_of(self.model)
        self.stored = self._stored_names()
        """Name in the checkpoint by the name in the model, each tensor once."""

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def _compute_buffers(self) -> None:
        """Those that no checkpoint holds (rotary frequencies), by the model's own initializer: all else is on meta,
        where it does nothing."""
        owners = {}
        for name, buffer in self.model.named_non_persistent_buffers():
            path, _, attribute = name.rpartition(".")
            owner = owners[path] = self.model.get_submodule(path)
            empty = torch.empty_like(buffer, device=self.device)
            owner._buffers[attribute] = empty.fill_(torch.nan) if empty.is_floating_point() else empty.fill_(-1)
        for path, owner in owners.items():
            self.model._init_weights(owner)
            unknown = [name for name in owner._non_persistent_buffers_set if _is_unset(owner._buffers[name])]
            if unknown:
                raise ModelError(f"{path}.{unknown[0]}: the model does not say how to compute it without its weights")

    def _stored_names(self) -> dict[str, str]:
        names: dict[int, list[str]] = {}
        model, tensors = self.model.state_dict(keep_vars=True), self.shards.tensors()
        for name, tensor in model.items():
            names.setdefault(id(tensor), []).append(name)
        stored: dict[str, str] = {}
        for same in names.values():
            found = next((name for name in same if name in self.shards), None)
            if found is None:
                raise ModelError(
                    f"{self.shards.folder} holds no {same[0]}: the checkpoint keeps its tensors under other names than "
                    f"{type(self.model).__name__} does; load it with transformers and use hwpq_fx.convert"
                )
            if found in tensors and tensors[found][0] != tuple(model[same[0]].shape):
                raise ModelError(
                    f"{self.shards.folder}: {found} is {list(tensors[found][0])}, and config.json makes it "
                    f"{list(model[same[0]].shape)}"
                )
            stored |= dict.fromkeys(same, found)
        return stored

    @contextmanager
    def filled(self, prefix: str, module: nn.Module, recurse: bool = True) -> Iterator[None]:
        """`module`, called `prefix` ("model.layers.0.") in the model, has its weights inside of this."""
        with torch.no_grad():
            taken = []
            for path, part in module.named_modules() if recurse else [("", module)]:
                owner = f"{prefix}{path}{'.' if path else ''}"
                kinds: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
                for kind in kinds:
                    for attribute, tensor in kind.items():
                        if tensor is not None and tensor.is_meta:
                            taken.append((kind, attribute, tensor))
                            real = self.shards.load(self.stored[owner + attribute], self.device, tensor.dtype)
                            kind[attribute] = nn.Parameter(real, False) if kind is part._parameters else real
        try:
            yield
        finally:
            for kind, attribute, tensor in taken:
                kind[attribute] = tensor


def _is_unset(tensor: torch.Tensor) -> bool:
    return bool(tensor.isnan().any() if tensor.is_floating_point() else (tensor == -1).all())


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the longest list of modules of one class, the outermost of those. Raises ModelError."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(one) for one in module}) == 1
    ]
    if not found:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks")
    return max(found, key=lambda one: (len(one[1]), -one[0].count(".")))


class Call(NamedTuple):
    """How the model calls a block: the arguments, flat, with places in the list of the batch's tensors for tensors, and
    `HIDDEN` for the hidden states."""

    leaves: list[Any]
    spec: pytree.TreeSpec


class _Place(int):
    """Where a tensor is in its batch's list; -1 for the hidden states."""


HIDDEN = _Place(-1)


class _Enough(Exception):
    """All blocks have been called."""


class Front:
    """Runs what comes before the blocks, and takes down how the model calls each of them."""

    def __init__(self, skeleton: Skeleton):
        self.skeleton = skeleton
        self._tuples = False

    def run(self, batch: dict[str, Any]) -> tuple[torch.Tensor, list[Call], list[torch.Tensor]]:
        """The hidden states that the first block is given, how each block is called, and the tensors in that."""
        try:
            return self._run(batch)
        except Exception as error:
            # models whose blocks return a tuple cannot go on with the tensor that passes through
            try:
                self._tuples = not self._tuples
                return self._run(batch)
            except Exception:
                first = (str(error).strip().splitlines() or [""])[0]
                raise CalibrationError(f"the model refused a batch: {type(error).__name__}: {first}") from error

    def _run(self, batch: dict[str, Any]) -> tuple[torch.Tensor, list[Call], list[torch.Tensor]]:
        hidden: list[torch.Tensor] = []
        calls: list[Call] = []
        tensors: list[torch.Tensor] = []

        def called(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            hidden.append(given) if not hidden else None
            rest = (HIDDEN, *args[1:]), kwargs
            if not args:
                rest = (), kwargs | {"hidden_states": HIDDEN}
            leaves, spec = pytree.tree_flatten(rest)
            calls.append(Call([_noted(leaf, tensors) for leaf in leaves], spec))
            if len(calls) == len(self.skeleton.blocks):
                raise _Enough
            return (given,) if self._tuples else given

        with self._weights_on_demand(), _forwards(self.skeleton.blocks, called):
            try:
                self.skeleton.model(**batch | {"use_cache": False})
            except _Enough:
                return hidden[0], calls, tensors
        raise ModelError(f"the model called {len(calls)} of its {len(self.skeleton.blocks)} blocks")

    @contextmanager
    def _weights_on_demand(self) -> Iterator[None]:
        """A module outside of the blocks has its own weights while it runs, and only then."""
        within = set(chain.from_iterable(block.modules() for block in self.skeleton.blocks))
        held: dict[nn.Module, Any] = {}
        hooks = []

        def before(name: str, module: nn.Module) -> None:
            held[module] = self.skeleton.filled(f"{name}." if name else "", module, recurse=False)
            held[module].__enter__()

        def after(module: nn.Module) -> None:
            held.pop(module).__exit__(None, None, None)

        for name, module in self.skeleton.model.named_modules():
            if module not in within:
                hooks.append(module.register_forward_pre_hook(lambda module, _, name=name: before(name, module)))
                hooks.append(module.register_forward_hook(lambda module, _, __: after(module), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in list(held):
                after(module)


def _noted(leaf: Any, tensors: list[torch.Tensor]) -> Any:
    """A leaf of a block's arguments as a `Call` keeps it."""
    if isinstance(leaf, torch.Tensor):
        place = next((at for at, one in enumerate(tensors) if one is leaf), len(tensors))
        tensors.extend([leaf] if place == len(tensors) else [])
        return _Place(place)
    if not isinstance(leaf, (*CONSTANTS, _Place)):
        raise ModelError(f"the model hands its blocks a {type(leaf).__name__}: they cannot be run one by one")
    return leaf


@contextmanager
def _forwards(blocks: Iterable[nn.Module], forward: Any) -> Iterator[None]:
    for block in blocks:
        vars(block)["forward"] = forward
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


def run_block(block: nn.Module, call: Call, hidden: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
    """What the block makes of these hidden states."""
    leaves = [
        (hidden if leaf == HIDDEN else tensors[leaf]) if isinstance(leaf, _Place) else leaf for leaf in call.leaves
    ]
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    made = block(*args, **kwargs)
    return cast(torch.Tensor, made[0] if isinstance(made, tuple) else made)
