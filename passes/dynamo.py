"""Everything that depends on how Dynamo and `torch.compile` keep their state.

None of it is public in torch. Each function names what it relies on; tried on torch 2.11.0 and 2.13.0.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, MethodType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._C._dynamo import eval_frame
from torch._dynamo import convert_frame, pgo, trace_rules
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend, innermost_fn
from torch._dynamo.external_utils import wrap_inline
from torch._dynamo.types import FrameAction, FrameExecStrategy

from .undo import undone_on_failure

# Calibration meets every shape and every module of a class; it must never fall back to running unobserved.
OBSERVING = {
    "recompile_limit": 100_000,
    "accumulated_recompile_limit": 100_000,
    "error_on_recompile": False,
    "suppress_errors": False,
    "disable": False,
    # what makes constants of parameters, or looks for code that was compiled before
    "prepare_freezing": False,
    "install_free_tensors": False,
    "caching_precompile": False,
}


OBSERVED = "_hwpq_observed"  # on the forward of an observed module: the one it stands for


def unwrap(model: Any) -> nn.Module:
    """The module that `torch.compile` wrapped, or `model` itself."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


class CompileSettings(NamedTuple):
    """What the user gave to `torch.compile`: the backend (with its mode and options inside) and the arguments."""

    backend: Callable[..., Any]
    arguments: dict[str, Any]


def compile_settings(model: Any) -> CompileSettings | None:
    """Settings of `torch.compile(model, ...)` or `model.compile(...)`; None for a plain module.

    Relies on `OptimizedModule.dynamo_ctx` and, for an in-place compile, on the context in the closure of
    `Module._compiled_call_impl`.
    """
    if isinstance(model, OptimizedModule):
        context = model.dynamo_ctx
    elif (compiled := getattr(model, "_compiled_call_impl", None)) is not None:
        context = _context_of(compiled)
    else:
        return None
    if not context.callback:  # torch.compiler.disable
        return None
    arguments: dict[str, Any] = {"fullgraph": context.fullgraph, "dynamic": context._dynamic}
    if guard_filter := getattr(context._hooks, "guard_filter_fn", None):
        arguments["options"] = {"guard_filter_fn": guard_filter}
    if getattr(context, "_isolate_recompiles_id", -1) >= 0:
        arguments["isolate_recompiles"] = True
    if spec := getattr(context, "_shapes_spec", None):
        arguments["shapes_spec"] = spec
    callback: Any = context.callback
    if limit := _recompile_limit(callback):
        arguments["recompile_limit"] = limit
    return CompileSettings(innermost_backend(callback), arguments)


def _context_of(compiled: Callable[..., Any]) -> Any:
    for cell in compiled.__closure__ or ():
        if isinstance(cell.cell_contents, torch._dynamo.eval_frame._TorchDynamoContext):
            return cell.cell_contents
    raise RuntimeError("cannot read the torch.compile settings of this module; pass torch.compile(module) instead")


def _recompile_limit(callback: Any) -> int | None:
    while callback is not None:
        if limit := getattr(callback, "_recompile_limit", None):
            return limit
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return None


def compile_in_place(model: Any, backend: Callable[..., Any], settings: CompileSettings) -> None:
    """Make every call of the module (`model(...)`, and so `model.generate(...)`) run compiled by `backend`.

    A wrapper that `torch.compile` made keeps working: it then calls the module, which is compiled itself.
    """
    module = unwrap(model)
    module._compiled_call_impl = torch.compile(_entry(module), backend=backend, **settings.arguments)
    if isinstance(model, OptimizedModule):
        # read back by `compile_settings`, and by torch when the wrapper is copied or unpickled
        model.dynamo_ctx = _context_of(module._compiled_call_impl)
        model.forward = _Call(module)


def _entry(module: nn.Module) -> Callable[..., Any]:
    """What to give `torch.compile` for the calls of a module. Dynamo passes over frames inside torch.nn: a module
    whose own forward lives there needs a frame around it, as `OptimizedModule` does it."""
    return wrap_inline(module._call_impl) if _needs_frame(module.forward) else module._call_impl


def _needs_frame(forward: Callable[..., Any]) -> bool:
    return isinstance(forward, MethodType) and bool(trace_rules.check(forward))


class _Call:
    """Calls a module. Unlike its bound `__call__`, it is copied and pickled with the module."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        # torch.export reads the names of the arguments off it
        return type(self.module).forward.__code__


class Observation:
    """While it stands, calls of the module run through `observe`, a Dynamo backend, and nothing else.

    `before_call(args, kwargs)` runs first at each call of the module. `remove()` puts everything back, compiled
    code included.
    """

    def __init__(
        self,
        model: Any,
        observe: Callable[..., Any],
        before_call: Callable[[tuple[Any, ...], dict[str, Any]], None],
    ):
        self.model, self.module, self.observe = model, unwrap(model), observe
        self.codes: list[CodeType] = []
        self.had = {name: self.module.__dict__.get(name) for name in ("_compiled_call_impl", "forward")}
        self.had_wrapper_forward = model.__dict__.get("forward")
        # under another observation, its own forward: what is explained while prepared is not calibration
        forward = _undecorated(getattr(self.module.forward, OBSERVED, self.module.forward))
        # Dynamo keeps every backend it has met, and what was gathered must not outlive this
        this = weakref.ref(self)

        def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            standing = this()
            assert standing is not None, "its code went when it was removed"
            return standing.observe(gm, example_inputs)

        with _settings():
            compiled = torch.compile(wrap_inline(forward) if _needs_frame(forward) else forward, backend=backend)

        # Dynamo passes over `_compiled_call_impl` where it inlines a module, but never over its forward: so a model
        # that is compiled once more, or called inside a compiled function, is observed too.
        @functools.wraps(forward)
        @torch.compiler.disable
        def call(*args: Any, **kwargs: Any) -> Any:
            before_call(args, kwargs)
            with self._dynamo_as_needed():
                return compiled(*args, **kwargs)

        setattr(call, OBSERVED, forward)
        with undone_on_failure(self.remove):
            _give_another_chance()
            self.module.__dict__ |= {"_compiled_call_impl": None, "forward": call}
            if isinstance(model, OptimizedModule):
                model.forward = _Call(self.module)

    @contextlib.contextmanager
    def _dynamo_as_needed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            # the fast path hands the weights to one fused kernel, where no product can be seen
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(convert_frame.register_bytecode_hook(lambda code, _: self.codes.append(code)).remove)
            stack.enter_context(_settings())
            stack.enter_context(torch.compiler.set_stance("default"))
            yield

    def remove(self) -> None:
        """Restore the module's calls, and drop the observed code from Dynamo's caches, where it would count
        towards the recompile limit and teach later compiles that shapes vary. Once more changes nothing."""
        for name, value in self.had.items():
            if value is None:
                self.module.__dict__.pop(name, None)
            else:
                self.module.__dict__[name] = value
        if isinstance(self.model, OptimizedModule) and self.had_wrapper_forward is not None:
            self.model.forward = self.had_wrapper_forward
        for code in self.codes:
            torch._dynamo.reset_code(code)
            _forget_shapes(code)
        self.codes.clear()
        _give_another_chance()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    # Dynamo asks for Inductor's too
    with torch._dynamo.config.patch(OBSERVING), torch._inductor.config.patch(freezing=False):
        yield


def _undecorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The method itself where `@torch.compile` decorates it in its class: torch finds it behind functions, but not
    behind methods."""
    if not isinstance(forward, MethodType):
        return forward
    return MethodType(innermost_fn(forward.__func__), forward.__self__)


def _give_another_chance() -> None:
    """Let Dynamo trace functions again that it gave up on, whoever compiled them: those that met their limit of
    recompilations, and those that raised while they were traced. It does so for good and for whole functions, which may
    be every model's (transformers wraps all forwards by one). What it has compiled of them stays.

    Relies on `convert_frame.input_codes` and on the strategy that each code object carries.
    """
    for known in convert_frame.input_codes.seen:
        if (code := known()) is not None:
            eval_frame.set_code_exec_strategy(code, FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT))


def _forget_shapes(code: CodeType) -> None:
    """Drop what Dynamo remembers of the shapes that a function has met, whatever closure it was called with."""

    def place(code_id: pgo.CodeId) -> tuple[str, int, str]:
        return code_id.file_hash, code_id.firstlineno, code_id.name

    state, this = pgo.get_code_state(), place(pgo.CodeId.make(code))
    for code_id in [one for one in state if place(one) == this]:
        del state[code_id]


def mark_varying(tensor: torch.Tensor) -> torch.Tensor:
    """An alias of a batch's tensor whose batch and sequence sizes Dynamo takes as varying from the start."""
    alias = tensor.detach()
    mask = alias.dim() == 4 and alias.dtype == torch.bool  # which tokens attend to which, [B, 1, L, L]
    # not channels, nor the height and width of images: symbolic, they have made tracing sixty times slower
    leading = 4 if mask else 1 if alias.dim() > 3 else 2
    for dim in range(alias.dim() - alias.is_floating_point())[:leading]:
        torch._dynamo.maybe_mark_dynamic(alias, dim)
    return alias
