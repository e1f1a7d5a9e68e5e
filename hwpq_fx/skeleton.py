"""A causal language model on the meta device, whose modules are given their weights for as long as they run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import CalibrationError, ModelError, first_line
from .shards import Shards

ALONE = "its blocks cannot be run one by one, use hwpq_fx.convert"
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
        # to meta once more: DiffLlama draws its lambdas wherever that may be
        self.model = on_meta(shards.folder, lambda: shards.dtype).eval().requires_grad_(False).to("meta")
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

    def prefix(self, index: int) -> str:
        """What the names of all in block `index` begin with in the model."""
        return f"{self.name}.{index}."

    def tensors_in(self, index: int) -> list[tuple[str, torch.Tensor]]:
        """What block `index` is: names in the checkpoint, and what stands for them in the model."""
        tensors = self.blocks[index].state_dict(keep_vars=True)
        return [(self.stored[self.prefix(index) + name], tensor) for name, tensor in tensors.items()]

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """A tensor of the checkpoint, as the model would have it."""
        return self.shards.load(name, device, self.model.state_dict(keep_vars=True)[name].dtype)

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
    """The blocks that matter have been called."""


class _Apart:
    """Stands for what a block returns beside the hidden states: the next one cannot be given it."""


class _NoMeta(TorchDispatchMode):
    """Refuses ops on the meta device: where such a tensor meets one with values, torch may read what it never wrote."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if any(isinstance(one, torch.Tensor) and one.is_meta for one in pytree.tree_leaves((args, kwargs))):
            raise ModelError(f"outside of its blocks the model uses weights of theirs, or its head ({func}): {ALONE}")
        return func(*args, **kwargs)


class Front:
    """Runs what comes before the blocks, and takes down how the model calls each of them."""

    def __init__(self, skeleton: Skeleton):
        self.skeleton = skeleton
        self._returned: Callable[[torch.Tensor], Any] | None = None
        """What a block returns, with these hidden states in it."""

    def run(self, batch: dict[str, Any]) -> tuple[torch.Tensor, list[Call], list[torch.Tensor]]:
        """The hidden states that the first block is given, how each block is called, and the tensors in that. Raises
        CalibrationError where the model refuses the batch, ModelError where its blocks cannot be run one by one."""
        try:
            if self._returned is None:
                hidden, calls, tensors = self._run(batch, 1)
                block = self.skeleton.blocks[0]
                with self.skeleton.filled(f"{self.skeleton.name}.0.", block):
                    self._returned = _returning(run_block(block, calls[0], hidden, tensors))
            return self._run(batch, len(self.skeleton.blocks))
        except ModelError:
            raise
        except Exception as error:
            raise CalibrationError(f"the model refused a batch: {type(error).__name__}: {first_line(error)}") from error

    def _run(self, batch: dict[str, Any], count: int) -> tuple[torch.Tensor, list[Call], list[torch.Tensor]]:
        """As far as the call of block `count`."""
        calls: list[Call] = []
        tensors: list[torch.Tensor] = []
        first = passed = torch.empty(0)  # hidden states: the first block's, and those that the last one returned

        def called(index: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal first, passed
            if index != len(calls):
                raise ModelError(f"the model calls its blocks in another order than it lists them: {ALONE}")
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, torch.Tensor):
                raise ModelError(f"the model hands its blocks a {type(hidden).__name__} first: {ALONE}")
            if not calls:
                # NaN for those after: whatever else the model makes of them shows
                first, passed = hidden, torch.full_like(hidden, torch.nan)
            elif hidden is not passed or hidden._version:
                raise ModelError(f"the model changes the hidden states between its blocks: {ALONE}")
            leaves, spec = pytree.tree_flatten((args, kwargs))
            calls.append(Call([_noted(leaf, hidden, tensors) for leaf in leaves], spec))
            if len(calls) == count:
                raise _Enough
            passed = passed.detach()  # another tensor for each block
            return cast(Callable, self._returned)(passed)

        with ExitStack() as stack:
            for prefix, module in self._outside():
                stack.enter_context(self.skeleton.filled(prefix, module, recurse=False))
            stack.enter_context(_forwards(self.skeleton.blocks, called))
            try:
                with _NoMeta():
                    self.skeleton.model(**batch | {"use_cache": False})
            except _Enough:
                _check_values(first, tensors)
                return first, calls, tensors
        raise ModelError(f"the model called {len(calls)} of its {len(self.skeleton.blocks)} blocks")

    def _outside(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules outside of the blocks, with prefixes for `filled`, but for the head: it is large, and comes last.
        All at once: a parent may look at its child's weight before it calls that."""
        model = self.skeleton.model
        apart = set(chain.from_iterable(block.modules() for block in self.skeleton.blocks))
        apart.add(model.get_output_embeddings())
        for name, module in model.named_modules():
            if module not in apart:
                yield f"{name}." if name else "", module


def _check_values(hidden: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    if not hidden.isfinite().all():
        raise ModelError("the first block is given NaN or Inf: are the embeddings finite?")
    # masks hold -Inf
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in tensors):
        raise ModelError(f"the model hands its blocks what it makes of others' hidden states, or NaN: {ALONE}")


def _returning(made: Any) -> Callable[[torch.Tensor], Any]:
    """What returns hidden states in the way a block has returned `made`."""
    hidden_of(made)
    if isinstance(made, torch.Tensor):
        return lambda hidden: hidden
    others = [one if isinstance(one, CONSTANTS) else _Apart() for one in made[1:]]
    return lambda hidden: [hidden, *others] if isinstance(made, list) else (hidden, *others)


def _noted(leaf: Any, hidden: torch.Tensor, tensors: list[torch.Tensor]) -> Any:
    """A leaf of a block's arguments as a `Call` keeps it."""
    if leaf is hidden:
        return HIDDEN
    if isinstance(leaf, torch.Tensor):
        place = next((at for at, one in enumerate(tensors) if one is leaf), len(tensors))
        tensors.extend([leaf] if place == len(tensors) else [])
        return _Place(place)
    if isinstance(leaf, _Apart):
        raise ModelError(f"the model hands its blocks more of each other's results than the hidden states: {ALONE}")
    if not isinstance(leaf, CONSTANTS):
        raise ModelError(f"the model hands its blocks a {type(leaf).__name__}: {ALONE}")
    return leaf


@contextmanager
def _forwards(blocks: Iterable[nn.Module], forward: Callable) -> Iterator[None]:
    """Each block runs `forward`, which is given its index first."""
    for index, block in enumerate(blocks):
        vars(block)["forward"] = partial(forward, index)
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


def run_block(block: nn.Module, call: Call, hidden: torch.Tensor, tensors: list[torch.Tensor]) -> Any:
    """What the block returns for these hidden states."""
    leaves = [
        (hidden if leaf == HIDDEN else tensors[leaf]) if isinstance(leaf, _Place) else leaf for leaf in call.leaves
    ]
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    return block(*args, **kwargs)


def hidden_of(returned: Any) -> torch.Tensor:
    """The hidden states in what a block returns: that, or the first of it. Raises ModelError."""
    first = returned[0] if isinstance(returned, (tuple, list)) and returned else returned
    if not isinstance(first, torch.Tensor):
        raise ModelError(f"a block returns a {type(first).__name__}, not hidden states: {ALONE}")
    if first.is_meta:
        raise ModelError(f"a block needs values that no checkpoint holds: {ALONE}")
    return first
