"""What we rely on in `torch.compile`: settings are read and kept, and observing leaves no trace."""

import contextlib
import functools
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import convert_frame
from torch._dynamo.testing import CompileCounterWithBackend

import hwpq_fx
from hwpq_fx.passes import HwpqBackend
from hwpq_fx.passes.dynamo import Observation, compile_settings, mark_varying, unwrap
from hwpq_fx.passes.values import op_name, value_of
from models import Net, llama, tokens

K = 16
NEW = {"recompile_limit", "isolate_recompiles"} - signature(torch.compile).parameters.keys()


def both_ways(build, **settings):
    """`torch.compile(model, ...)` and `model.compile(...)`."""

    def fresh():
        # torch takes guard_filter_fn out of the options it is given
        return {name: dict(value) if isinstance(value, dict) else value for name, value in settings.items()}

    (inside := build().eval()).compile(**fresh())
    return [torch.compile(build().eval(), **fresh()), inside]


def inner_most(settings):
    """The user's own backend, below ours."""
    backend = settings.backend
    while True:
        if isinstance(backend, HwpqBackend):
            backend = backend.inner
        elif type(backend).__name__ == "_TorchCompileWrapper":
            backend = backend.compiler_fn
        else:
            return backend


def a_filter(entries):
    return [True for _ in entries]


SETTINGS = {
    "nothing": ({}, {"fullgraph": False, "dynamic": None}),
    "fullgraph": ({"fullgraph": True}, {"fullgraph": True}),
    "dynamic": ({"dynamic": True}, {"dynamic": True}),
    "static": ({"dynamic": False}, {"dynamic": False}),
    "recompile_limit": ({"recompile_limit": 3}, {"recompile_limit": 3}),
    "isolate_recompiles": ({"isolate_recompiles": True}, {"isolate_recompiles": True}),
    "guard_filter_fn": ({"options": {"guard_filter_fn": a_filter}}, {"options": {"guard_filter_fn": a_filter}}),
    "mode": ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True, "coordinate_descent_tuning": True}),
    "options": ({"options": {"max_autotune": True}}, {"max_autotune": True}),
}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in NEW])
def test_settings_are_read_and_survive_conversion(name):
    given, expected = SETTINGS[name]
    for model in both_ways(Net, **given):
        for converted in (False, True):
            if converted:
                model = hwpq_fx.convert(model, [torch.randn(4, K)])
            read = compile_settings(model)
            found = read.arguments | getattr(inner_most(read), "config", {})
            assert found == found | expected
            assert isinstance(getattr(read.backend, "compiler_fn", None), HwpqBackend) == converted


def test_settings_hold_after_conversion():
    x = torch.randn(4, K)

    class Broken(Net):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    model = hwpq_fx.convert(torch.compile(Broken().eval(), backend="eager", fullgraph=True), [x])
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(x)

    counter = CompileCounterWithBackend("eager")
    model = hwpq_fx.convert(torch.compile(Net().eval(), backend=counter, dynamic=True), [x])
    model(x), model(torch.randn(7, K))
    assert counter.frame_count == 1


def test_a_backend_of_ones_own_is_found():
    def own(gm, inputs):
        return gm

    for model in both_ways(Net, backend=own):
        assert inner_most(compile_settings(model)) is own


def test_models_that_are_not_compiled():
    assert compile_settings(Net()) is None
    disabled = torch.compiler.disable(Net().eval())
    assert compile_settings(disabled) is None
    x = torch.randn(4, K)
    with torch.no_grad():
        before = disabled(x)
        converted = hwpq_fx.convert(disabled, [x])
        assert converted is disabled and (converted(x) - before).abs().max() > 1e-3
    assert unwrap(disabled)._compiled_call_impl is None


def test_a_compile_context_that_cannot_be_read():
    model = Net()
    model._compiled_call_impl = lambda *args: None
    with pytest.raises(RuntimeError, match="cannot read the torch"):
        compile_settings(model)


@contextlib.contextmanager
def observing(model):
    """(the graphs that were observed, the calls that were announced)."""
    graphs, calls = [], []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm

    observation = Observation(model, backend, lambda *call: calls.append(call))
    try:
        yield graphs, calls
    finally:
        observation.remove()


def state(model):
    """Everything that observing touches."""
    return (
        dict(model.__dict__),
        dict(unwrap(model).__dict__),
        torch.backends.mha.get_fastpath_enabled(),
        torch._dynamo.config.get_config_copy(),
        len(convert_frame._bytecode_hooks),
    )


KINDS = {
    "plain": lambda: Net().eval(),
    "compiled": lambda: torch.compile(Net().eval(), backend="eager"),
    "compiled in place": lambda: both_ways(Net, backend="eager")[1],
    "from torch.nn": lambda: torch.compile(nn.Sequential(nn.Linear(K, K)).eval(), backend="eager"),
    "plain from torch.nn": lambda: nn.Linear(K, K).eval(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fast_path", [False, True])
def test_observing_restores_everything(kind, fails, fast_path, monkeypatch):
    model, x = KINDS[kind](), torch.randn(4, K)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        before, expected = state(model), model(x)
        refused = pytest.raises(Exception, match="fake tensor call") if fails else contextlib.nullcontext()
        with observing(model) as (graphs, calls), refused:
            torch.testing.assert_close(model(x), expected)
            assert len(graphs) == 1 and calls == [((x,), {})]
            torch.testing.assert_close(unwrap(model)(x), expected)
            if fails:
                model(torch.randn(4, 3))
        assert state(model) == before
        # and nothing is observed any more
        seen = len(graphs), len(calls)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(torch.randn(9, K)).shape, (9, *expected.shape[1:]))
        assert (len(graphs), len(calls)) == seen and len(calls) >= 2
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_attention_fast_path_is_off_while_observing_only():
    model = nn.TransformerEncoderLayer(K, 4, 32, batch_first=True).eval()
    seen = []
    model.norm1.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mha.get_fastpath_enabled()))
    with torch.no_grad(), observing(model) as (graphs, _):
        model(x := torch.randn(2, 5, K))
    with torch.no_grad():
        model(x)
    assert seen == [False, True]
    assert "_transformer_encoder_layer_fwd" not in str(graphs[0].graph)


@pytest.mark.parametrize(
    "setting",
    [
        *(("error_on_recompile", True), ("disable", True), ("recompile_limit", 1), ("accumulated_recompile_limit", 1)),
        *(("prepare_freezing", True), ("install_free_tensors", True), ("caching_precompile", True)),
    ],
    ids=str,
)
def test_observing_does_not_depend_on_dynamos_settings(setting):
    model = Net().eval()
    with torch._dynamo.config.patch(*setting), observing(model) as (graphs, _):
        for rows in (1, 4, 5, 6):
            model(torch.randn(rows, K))
        model(torch.randn(2, 3, K))
    assert len(graphs) >= 3
    with torch._dynamo.config.patch(*setting):
        assert len(hwpq_fx.report(hwpq_fx.convert(model, [torch.randn(4, K)])).converted) == 2


def test_observing_does_not_depend_on_freezing():
    with torch._inductor.config.patch(freezing=True):
        model = hwpq_fx.convert(Net().eval(), [torch.randn(4, K)])
    assert len(hwpq_fx.report(model).converted) == 2


def test_what_goes_wrong_while_observing_is_heard():
    """Where Dynamo may suppress errors it would run the model unobserved."""

    def fails(gm, inputs):
        raise ValueError("not this time")

    model, x = Net().eval(), torch.randn(4, K)
    observation = Observation(model, fails, lambda *_: None)
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(Exception, match="not this time"):
        model(x)
    observation.remove()
    assert model(x).shape == (4, K)


def test_observing_does_not_depend_on_the_stance():
    model, x = Net().eval(), torch.randn(4, K)
    with torch.compiler.set_stance("force_eager"), observing(model) as (graphs, _):
        model(x)
    assert len(graphs) == 1


def test_a_model_compiled_while_it_is_observed():
    model, x = Net().eval(), torch.randn(4, K)
    expected = model(x)
    with observing(model) as (graphs, calls):
        outer = torch.compile(model, backend="eager")
        torch.testing.assert_close(outer(x), expected)
    assert len(graphs) == len(calls) == 1


@pytest.mark.parametrize(
    "build", [Net, lambda: nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))], ids=["own", "torch.nn"]
)
def test_calls_from_compiled_code_are_observed(build):
    model, x = build().eval(), torch.randn(4, K)
    expected = model(x)
    with observing(model) as (graphs, calls):
        wrapped = torch.compile(model, backend="eager")

        @torch.compile(backend="eager")
        def step(x):
            return model(x) + 1

        torch.testing.assert_close(wrapped(x), expected)
        torch.testing.assert_close(step(x), expected + 1)
    assert len(calls) == 2 and len(graphs) == 1
    assert "forward" not in vars(model)


def test_more_modules_of_a_class_than_dynamo_compiles():
    """Blocks that each need code of their own: none of them may run unobserved."""

    class Block(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.linear, self.number = nn.Linear(K, K), number

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.linear(x) * self.number

    blocks = nn.Sequential(*(Block(float(number)) for number in range(1, 13))).eval()
    assert len(blocks) > torch._dynamo.config.recompile_limit
    report = hwpq_fx.report(hwpq_fx.convert(blocks, [torch.randn(4, K)]))
    assert len(report.converted) == 12


def test_a_forward_that_is_not_a_method():
    """As accelerate and functools leave it."""
    x = torch.randn(4, K)
    for wrap in (functools.partial, lambda forward: lambda x: forward(x)):
        model = Net().eval()
        model.forward = wrap(model.forward)
        counter = CompileCounterWithBackend("eager")
        converted = hwpq_fx.convert(torch.compile(model, backend=counter), [x])
        with torch.no_grad():
            torch.testing.assert_close(converted(x), model.forward(x))
        assert counter.frame_count == 1 and hwpq_fx.explain(converted, x).rewritten == 2


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_a_forward_that_is_compiled_in_its_class(wrap):
    class Decorated(Net):
        @torch.compile(backend="eager")
        def forward(self, x):
            return super().forward(x)

    model, x = wrap(Decorated().eval()), torch.randn(4, K)
    before = dict(vars(unwrap(model)))
    with observing(model) as (graphs, _):
        model(x)
    assert len(graphs) == 1 and vars(unwrap(model)) == before
    hwpq_fx.convert(model, [x])
    assert len(hwpq_fx.report(model).converted) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(x), Net.forward(unwrap(model), x))
    assert hwpq_fx.explain(model, x).rewritten == 2


@pytest.mark.parametrize("build", [Net, lambda: nn.Sequential(nn.Linear(K, K))], ids=["class", "torch.nn"])
def test_calibration_with_several_shapes_does_not_make_the_compiled_model_dynamic(build):
    shapes = []

    def backend(gm, inputs):
        shapes.append(
            [node.meta["example_value"].shape for node in gm.graph.nodes if op_name(node) == "hwpq_fx.linear24"]
        )
        return gm

    def calib(model):
        for rows in (4, 5, 6):
            model(torch.randn(rows, K))

    model = hwpq_fx.convert(torch.compile(build().eval(), backend=backend), calib)
    with torch.no_grad():
        for rows in (7, 8):
            x = torch.randn(rows, K)
            torch.testing.assert_close(model(x), unwrap(model)._call_impl(x))
    # as for any model: static for the first shape, dynamic from the second on
    assert [isinstance(size, int) for many in shapes for size in many[-1]] == [True, True, False, True]


def test_a_dozen_models_of_a_class():
    """Each converted, run, and still right at the end; Dynamo never gives up."""
    x, models = torch.randn(4, K), []
    batches = [x, torch.randn(5, K), torch.randn(1, K)]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for _ in range(12):
            model = hwpq_fx.convert(torch.compile(Net().eval(), backend="eager"), batches)
            models.append((model, model(x)))
        assert len(models) > torch._dynamo.config.recompile_limit
        for model, y in models:
            torch.testing.assert_close(model(x), y)
            torch.testing.assert_close(unwrap(model)._call_impl(x), y)


def test_observing_a_dozen_models_does_not_use_up_dynamos_patience():
    models, x = [Net().eval() for _ in range(12)], torch.randn(4, K)
    for model in models:
        with observing(model) as (graphs, _):
            model(x)
        assert len(graphs) == 1
    counter = CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        torch.compile(models[0], backend=counter)(x)
    assert counter.frame_count == 1


def test_other_compiled_models_go_on_working():
    """One of the same class, one of another, and a function: right and compiled before, while and after."""
    x = torch.randn(4, K)
    counters = [CompileCounterWithBackend("eager") for _ in range(3)]
    table = torch.randn(K, K)
    others = [
        torch.compile(Net().eval(), backend=counters[0]),
        torch.compile(nn.Sequential(nn.Linear(K, K)).eval(), backend=counters[1]),
        torch.compile(lambda x: F.linear(x, table).relu(), backend=counters[2]),
    ]
    with torch.no_grad():
        expected = [other(x) for other in others]

        def calib(model):
            model(x)
            torch.testing.assert_close([other(x) for other in others], expected)

        model = hwpq_fx.convert(torch.compile(Net().eval(), backend="eager"), calib)
        y = model(x)
        for other, value in zip(others, expected, strict=True):
            torch.testing.assert_close(other(x), value)
        torch.testing.assert_close(model(x), y)
    assert all(counter.frame_count >= 1 for counter in counters) and counters[2].frame_count == 1


VARYING = {
    "token ids": (torch.ones(4, 8, dtype=torch.long), [True, True]),
    "one sentence": (torch.ones(1, 8, dtype=torch.long), [False, True]),
    "rows": (torch.randn(4, K), [True, False]),
    "hidden states": (torch.randn(4, 8, K), [True, True, False]),
    "which token attends to which": (torch.ones(2, 1, 8, 8, dtype=torch.bool), [True, False, True, True]),
    "images": (torch.randn(4, 3, 8, 8), [True, False, False, False]),
    "a number": (torch.tensor(1.0), []),
    "nothing": (torch.randn(0, K), [False, False]),
}


@pytest.mark.parametrize("kind", VARYING)
def test_mark_varying_takes_batch_and_sequence_as_varying(kind):
    tensor, varying = VARYING[kind]
    seen = []

    def backend(gm, inputs):
        (value,) = [value_of(node) for node in gm.graph.nodes if op_name(node) == "mul"]
        seen.append([not isinstance(size, int) for size in value.shape])
        return gm

    torch.testing.assert_close(torch.compile(lambda x: x * 2, backend=backend)(mark_varying(tensor)), tensor * 2)
    assert seen == [varying]


def test_mark_varying_leaves_the_callers_tensor_alone():
    x = torch.randn(4, K)
    before = dict(x.__dict__)
    alias = mark_varying(x)
    assert x.__dict__ == before and alias.data_ptr() == x.data_ptr()
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(lambda x: x * 2, backend=counter)
    for rows in (4, 5, 6):
        run(mark_varying(torch.randn(rows, K)))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    counter.clear()
    for rows in (4, 5):
        mark_varying(x := torch.randn(rows, K))
        run(x)
    assert counter.frame_count == 2


def test_calibration_marks_nothing():
    x = torch.randn(4, K)
    before = dict(x.__dict__)
    hwpq_fx.convert(Net().eval(), [x, (x,), {"x": x}])
    assert x.__dict__ == before


def test_a_function_at_its_limit_is_traced_again():
    """transformers wraps every model's forward by one function: other models' limits are everybody's."""
    compiled = torch.compile(llama(), dynamic=False, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in range(4, 9):
            compiled(torch.ones(1, length, dtype=torch.long))
        for _ in range(2):
            model = hwpq_fx.convert(llama(), [tokens()])
            assert len(hwpq_fx.report(model).converted) == 14


def test_a_call_that_failed_leaves_nothing_untraced():
    with pytest.raises(hwpq_fx.CalibrationError, match="refused calibration batch 0"):
        hwpq_fx.convert(llama(), [{"nonsense": 1}])
    batch = tokens()
    assert len(hwpq_fx.explain(hwpq_fx.convert(llama()), batch).graphs) == 1
