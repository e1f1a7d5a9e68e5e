"""The backend "hwpq": by name, around another backend, in copies of a model, and beside the caches."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import hwpq_fx
from hwpq_fx.explain import op_counts
from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.passes import HwpqBackend, backend, lower
from hwpq_fx.passes.dynamo import compile_settings
from models import Net, pack

K = 16


@pytest.fixture
def x():
    return torch.randn(4, K)


@pytest.fixture
def lowered(monkeypatch):
    """Counts of the rewritten ops, one number for each graph that the passes have seen."""
    counts = []

    def spy(gm):
        after = lower(gm)
        counts.append(op_counts(after)["hwpq_fx.linear24"])
        return after

    monkeypatch.setattr(backend, "PASSES", tuple(spy if one is lower else one for one in backend.PASSES))
    return counts


@pytest.fixture
def inductor(monkeypatch):
    """What Inductor is called with, in its stead: (graph, options)."""
    calls = []

    def instead(gm, inputs, options=None):
        calls.append((gm, options))
        return gm

    monkeypatch.setattr(torch._inductor, "compile", instead)
    return calls


def test_the_entry_point_lowers_and_compiles(x, lowered):
    model = pack(Net())
    with torch.no_grad():
        y = torch.compile(model, backend="hwpq")(x)
        torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)
    assert lowered == [2]
    assert "hwpq" in torch._dynamo.list_backends()


MODES = {
    "none": ({}, {}),
    "default": ({"mode": "default"}, {}),
    "reduce-overhead": ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
    "max-autotune-no-cudagraphs": (
        {"mode": "max-autotune-no-cudagraphs"},
        {"max_autotune": True, "coordinate_descent_tuning": True},
    ),
    "options": ({"options": {"max_autotune": False}}, {"max_autotune": False}),
}


@pytest.mark.parametrize("name", MODES)
def test_mode_and_options_reach_inductor(name, x, lowered, inductor):
    settings, expected = MODES[name]
    model = pack(Net())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="hwpq", **settings)(x), model(x))
    ((_, options),) = inductor
    assert lowered == [2] and options.items() >= expected.items()
    assert options.keys() <= expected.keys() | {"coordinate_descent_tuning"}


def test_a_mode_and_options_together(x, inductor):
    gm = torch.fx.symbolic_trace(Net())
    backend.hwpq(gm, [x], mode="max-autotune-no-cudagraphs", options={"max_autotune": False})
    assert inductor[0][1] == {"max_autotune": False, "coordinate_descent_tuning": True}


def test_an_unknown_mode_is_refused(x):
    with pytest.raises(Exception, match="Unrecognized mode"):
        torch.compile(pack(Net()), backend="hwpq", mode="fast")(x)


def test_max_autotune_runs(x, lowered):
    model = pack(Net())
    with torch.no_grad():
        y = torch.compile(model, backend="hwpq", mode="max-autotune-no-cudagraphs")(x)
        torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)
    assert lowered == [2]


def test_an_unconverted_model_passes_through_unchanged(x, lowered):
    given = []

    def inner(gm, inputs):
        given.append(gm)
        return gm

    model, graphs = Net().eval(), []
    hwpq = HwpqBackend(inner)

    def outer(gm, inputs):
        graphs.append(gm)
        return hwpq(gm, inputs)

    torch.testing.assert_close(torch.compile(model, backend=outer)(x), model(x))
    assert given[0] is graphs[0] and lowered == [0]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "callable"])
@pytest.mark.parametrize("converted", [False, True], ids=["around", "converted"])
def test_around_another_backend(inner, converted, x, lowered):
    ran = []

    def own(gm, inputs):
        ran.append(op_counts(gm)["hwpq_fx.linear24"])
        return gm

    inner = own if inner == "callable" else inner
    if converted:
        model = hwpq_fx.convert(torch.compile(Net().eval(), backend=inner), [x])
        reference = model._orig_mod._call_impl
    else:
        reference = pack(Net())
        model = torch.compile(reference, backend=HwpqBackend(inner))
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))
    assert lowered == [2] and ran == ([2] if inner is own else [])


def test_what_dynamo_asks_of_a_backend_is_answered_by_the_inner_one(x):
    class Inner:
        resets = 0

        def __call__(self, gm, inputs):
            return gm

        def reset(self):
            self.resets += 1

        def get_compiler_config(self):
            return {"answer": 42}

        def __deepcopy__(self, memo):
            return "a copy of the inner one"

    inner = Inner()
    hwpq = HwpqBackend(inner)
    assert hwpq.get_compiler_config() == {"answer": 42}
    torch.compile(pack(Net()), backend=hwpq)(x)
    torch._dynamo.reset()
    assert inner.resets == 1
    # and nothing else is
    assert not hasattr(HwpqBackend("eager"), "reset") and not hasattr(hwpq, "resets")
    assert isinstance(copy.deepcopy(hwpq), HwpqBackend)


def test_a_backend_is_copied_and_pickled():
    hwpq = HwpqBackend("eager")
    for twin in (copy.copy(hwpq), copy.deepcopy(hwpq), pickle.loads(pickle.dumps(hwpq))):
        assert isinstance(twin, HwpqBackend) and twin == hwpq and twin.__name__ == "hwpq"
    assert hwpq != HwpqBackend("aot_eager") and hwpq != hwpq.inner


def test_models_of_a_class_share_what_was_compiled(x, lowered):
    models = [hwpq_fx.convert(torch.compile(Net().eval(), backend="eager"), [x]) for _ in range(3)]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for model in models:
            torch.testing.assert_close(model(x), model._orig_mod._call_impl(x))
    assert lowered == [2]


def test_the_graph_cache_tells_activations_apart(x):
    """One model, compiled with either kind of activation, twice: the second time both come out of the cache."""
    dense = Net().eval()
    models = {activation: pack(copy.deepcopy(dense), activation) for activation in ("dynamic", "none")}
    results = {name: [] for name in models}
    counters.clear()
    with torch.no_grad(), torch._inductor.utils.fresh_inductor_cache():
        for _ in range(2):
            for name, model in models.items():
                torch._dynamo.reset()
                results[name].append(torch.compile(model, backend="hwpq")(x))
        expected = {name: model(x) for name, model in models.items()}
    hits = counters["aot_autograd"]["autograd_cache_hit"] or counters["inductor"]["fxgraph_cache_hit"]
    assert hits == 2, dict(counters["aot_autograd"])
    assert (expected["dynamic"] - expected["none"]).abs().max() > 1e-3
    for name, many in results.items():
        for y in many:
            torch.testing.assert_close(y, expected[name], rtol=1e-3, atol=1e-4)


def test_a_deep_copy_of_a_compiled_model_is_compiled_and_its_own(x, lowered):
    model = hwpq_fx.convert(torch.compile(Net().eval(), backend="eager"), [x])
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        assert lowered == [2, 2]
        twin.up.weight.scale.zero_()
        twin.up.weight = nn.Parameter(twin.up.weight.expand(), requires_grad=False)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        assert (twin(x) - expected).abs().max() > 1e-3
    assert compile_settings(twin) is not None


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapper", "module"])
def test_a_converted_model_is_saved_and_loaded_whole(wrapped, x, lowered):
    model = hwpq_fx.convert(torch.compile(Net().eval(), backend="eager"), [x])
    file = io.BytesIO()
    torch.save(model if wrapped else model._orig_mod, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(loaded(x), expected)
    # torch drops `_compiled_call_impl`; a wrapper compiles by itself
    assert lowered == ([2, 2] if wrapped else [2])
    assert isinstance(loaded.up.weight, Float8Sparse24Tensor)
