"""Which layers become 2:4, dense FP8 or stay: the trade alone, then on models."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hwpq_fx
from hwpq_fx import ConfigError, HWPQConfig, ModelError, Plan, PlannedLayer, convert, report
from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.kernels.table import Table
from hwpq_fx.plan import DENSE, FP8, SPARSE, decide, mark_outliers, times_of

errors = st.floats(0.001, 2)
times = st.floats(0.1, 100)


@st.composite
def planned_layers(draw):
    layers = []
    for number in range(draw(st.integers(1, 8))):
        layer = PlannedLayer(
            f"{number}", (8, 8), {DENSE: 0.0, SPARSE: draw(errors)}, {DENSE: draw(times), SPARSE: draw(times)}
        )
        if draw(st.booleans()):
            layer.errors[FP8], layer.microseconds[FP8] = draw(errors), draw(times)
        layers.append(layer)
    return layers


@given(planned_layers(), st.floats(0, 4))
@settings(max_examples=200, deadline=None)
def test_bound_is_never_exceeded(layers, bound):
    decide(layers, bound, None)
    assert sum(layer.error for layer in layers) <= bound + 1e-9
    assert all(layer.microseconds[layer.status] <= layer.microseconds[DENSE] for layer in layers)


def statuses(layers):
    return [layer.status for layer in layers]


@given(planned_layers(), st.floats(0, 4))
@settings(max_examples=200, deadline=None)
def test_what_fits_the_bound_is_not_left_dense(layers, bound):
    decide(layers, bound, None)
    total = sum(layer.error for layer in layers)
    for layer in layers:
        if layer.status == DENSE:
            faster = [status for status, time in layer.microseconds.items() if time < layer.microseconds[DENSE]]
            assert all(total + layer.errors[status] > bound - 1e-9 for status in faster)


@given(planned_layers(), st.floats(0, 4) | st.none(), st.floats(1, 3))
@settings(max_examples=200, deadline=None)
def test_no_more_than_the_speedup_takes(layers, bound, wanted):
    decide(layers, bound, None)
    most = Plan(layers, 1, "").speedup
    decide(layers, bound, wanted)
    plan = Plan(layers, 1, "")
    assert plan.speedup >= wanted or bound is not None or plan.speedup == most
    assert bound is None or plan.error <= bound
    if plan.speedup < wanted:
        return
    for layer in layers:  # less error in any of them would fall short
        had = layer.status
        for status in layer.errors:
            layer.status = status
            assert layer.errors[status] >= layer.errors[had] or plan.speedup < wanted
        layer.status = had


@given(planned_layers(), st.floats(0, 4), st.floats(1, 3))
@settings(max_examples=200, deadline=None)
def test_the_error_of_a_plan_as_its_bound(layers, bound, wanted):
    for bounds in ((bound, None), (None, wanted)):
        decide(layers, *bounds)
        before = statuses(layers)
        decide(layers, *bounds)
        assert statuses(layers) == before
        decide(layers, Plan(layers, 1, "").loss, bounds[1])
        assert statuses(layers) == before


@given(planned_layers())
@settings(max_examples=100, deadline=None)
def test_frontier_goes_up_and_gets_dearer(layers):
    frontier = decide(layers, None, None)
    assert frontier[0] == (1.0, 0.0, 0.0)
    assert all(a.speedup < b.speedup for a, b in pairwise(frontier))
    plan = Plan(layers, 1, "")
    assert frontier[-1].speedup == pytest.approx(plan.speedup)
    assert frontier[-1].loss == pytest.approx(plan.loss)
    assert frontier[-1].sparse == pytest.approx(plan.sparse_share)


def test_cheapest_error_for_time_first():
    def layer(name, error, time, **more):
        return PlannedLayer(name, (8, 8), {DENSE: 0.0, SPARSE: error}, {DENSE: 10.0, SPARSE: time}, **more)

    good, bad = layer("good", 0.1, 2.0), layer("bad", 0.5, 2.0)
    small, slower = layer("small", 0.1, 9.0), layer("slower", 0.01, 11.0)
    odd = layer("odd", 0.01, 1.0, reason="outlier")
    layers = [bad, slower, small, good, odd]
    decide(layers, None, None)
    assert [one.status for one in layers] == [SPARSE, DENSE, SPARSE, SPARSE, DENSE]
    decide(layers, 0.15, None)
    assert [one.status for one in layers] == [DENSE, DENSE, DENSE, SPARSE, DENSE]
    decide(layers, 0.25, None)  # `bad` is next, and too dear; `small` still fits
    assert [one.status for one in layers] == [DENSE, DENSE, SPARSE, SPARSE, DENSE]
    decide(layers, None, 1.19)
    assert [one.status for one in layers] == [DENSE, DENSE, DENSE, SPARSE, DENSE]


def test_fp8_comes_between():
    layer = PlannedLayer("x", (8, 8), {DENSE: 0, FP8: 0.02, SPARSE: 0.3}, {DENSE: 16, FP8: 8, SPARSE: 5})
    for bound, status in ((0.01, DENSE), (0.1, FP8), (0.3, SPARSE), (None, SPARSE)):
        decide([layer], bound, None)
        assert layer.status == status
    assert [point.loss for point in decide([layer], None, None)] == pytest.approx([0, 0.02, 0.3])
    layer.errors[FP8] = 0.29  # not worth a stop
    assert [point.loss for point in decide([layer], None, None)] == pytest.approx([0, 0.3])


def test_steps_that_a_later_one_made_needless_are_taken_back():
    a = PlannedLayer("a", (8, 8), {DENSE: 0.0, SPARSE: 0.1}, {DENSE: 10.0, SPARSE: 9.0})
    b = PlannedLayer("b", (8, 8), {DENSE: 0.0, SPARSE: 1.2}, {DENSE: 100.0, SPARSE: 90.0})
    for bound in (None, 1.2):  # `a` and `b` at once would be above it
        decide([a, b], bound, 1.09)
        assert (a.status, b.status) == (DENSE, SPARSE)
    decide([a, b], None, 1.11)
    assert (a.status, b.status) == (SPARSE, SPARSE)
    # where less of a step will do
    b.errors[FP8], b.microseconds[FP8] = 1.15, 91.0
    decide([a, b], None, 1.08)
    assert (a.status, b.status) == (DENSE, FP8)


def test_where_one_step_does_not_fit_a_smaller_one_may():
    layer = PlannedLayer("x", (8, 8), {DENSE: 0.0, FP8: 0.03, SPARSE: 0.2}, {DENSE: 10.0, FP8: 9.0, SPARSE: 3.0})
    for bound, status in ((0.02, DENSE), (0.1, FP8), (0.2, SPARSE), (None, SPARSE)):
        frontier = decide([layer], bound, None)
        assert layer.status == status
        assert [point.loss for point in frontier] == pytest.approx([0, 0.2])


def test_outliers_are_told_among_their_like():
    def layers_of(*values):
        return [
            PlannedLayer(f"layers.{i}.{kind}", (8, 8), {DENSE: 0, SPARSE: value * scale}, {DENSE: 2, SPARSE: 1})
            for i, value in enumerate(values)
            for kind, scale in (("q_proj", 1), ("down_proj", 0.1))
        ]

    layers = layers_of(0.30, 0.31, 0.29, 0.9, 0.30)
    mark_outliers(layers)
    assert [layer.name for layer in layers if layer.reason] == ["layers.3.q_proj", "layers.3.down_proj"]
    for ordinary in ((0.30, 0.31, 0.29, 0.32, 0.30), (0.0, 0.31, 0.29, 0.32, 0.30), (0.02, 0.31, 0.29, 0.32, 0.30)):
        layers = layers_of(*ordinary)
        mark_outliers(layers)
        assert not any(layer.reason for layer in layers)
    layers = layers_of(1.5, 0.31, 0.29, 0.32, 0.30)
    mark_outliers(layers)
    assert [layer.name for layer in layers if layer.reason] == ["layers.0.q_proj", "layers.0.down_proj"]
    mark_outliers([PlannedLayer("x", (8, 8), {DENSE: 0}, {DENSE: 1})])


def outliers(*values):
    layers = [PlannedLayer(f"{i}.up", (8, 8), {DENSE: 0, SPARSE: value}, {}) for i, value in enumerate(values)]
    mark_outliers(layers)
    return [i for i, layer in enumerate(layers) if layer.reason]


def test_an_outlier_hides_no_other():
    assert outliers(*[0.1] * 2, 1.0, 1.0, *[0.1] * 8) == [2, 3]
    assert outliers(*[0.1] * 2, 0.5, 0.5, 0.5, *[0.1] * 7) == [2, 3, 4]
    assert outliers(1.0, 1.0, *[0.1] * 10) == [0, 1]
    assert outliers(*[0.1] * 20, *[0.5] * 6, *[0.1] * 6) == [*range(20, 26)]


def test_what_is_no_outlier():
    assert outliers(*[0.2] * 16, *[0.21] * 16) == []
    assert outliers(*[0.2] * 16, *[0.27] * 16) == []
    assert outliers(*[0.2] * 20, 0.2004, *[0.2] * 11) == []
    assert outliers(*(0.1 + 0.01 * i for i in range(24))) == []
    assert outliers(*[0.0] * 8) == []
    # where errors are higher from some block on, the mean gets there
    assert outliers(*[0.2] * 16, *[0.3] * 16) == [16]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)
        self.narrow = nn.Linear(64, 12)  # no FP8 product: 12 is no multiple of 16

    def forward(self, x):
        return self.narrow(self.down(self.up(x) * self.gate(x).relu()))


@pytest.fixture
def model():
    return Mlp().eval()


BATCHES = [torch.randn(8, 64) for _ in range(3)]


def kinds(model):
    return {name: type(module.weight).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}


def test_plan_leaves_the_model_and_convert_follows_it(model):
    before = copy.deepcopy(model.state_dict())
    made = hwpq_fx.plan(model, BATCHES, HWPQConfig(max_loss=0.5, compensation="energy"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {layer.name for layer in made.layers} == {"up", "gate", "down", "narrow"}
    assert made.error <= 0.5
    by_name = made.statuses()
    assert FP8 in by_name["up"].errors and FP8 not in by_name["narrow"].errors
    assert 0 < by_name["up"].errors[FP8] < 0.1 < by_name["up"].errors[SPARSE]
    assert by_name["up"].microseconds[SPARSE] < by_name["up"].microseconds[DENSE]
    by_name["up"].status, by_name["gate"].status = SPARSE, FP8
    by_name["down"].status = by_name["narrow"].status = DENSE
    convert(model, BATCHES, HWPQConfig(compensation="energy"), plan=made)
    assert kinds(model) == {
        "up": "Float8Sparse24Tensor", "gate": "Float8Tensor", "down": "Parameter", "narrow": "Parameter",
    }  # fmt: skip
    lines = {line.name: line for line in report(model).layers}
    assert lines["up"].error == pytest.approx(by_name["up"].errors[SPARSE])
    assert lines["gate"].error == pytest.approx(by_name["gate"].errors[FP8])
    assert (lines["down"].status, lines["down"].reason) == (DENSE, "the plan")
    assert [line.name for line in report(model).layers] == ["up", "gate", "down", "narrow"]
    assert model(BATCHES[0]).isfinite().all()


@pytest.mark.parametrize(("compensation", "bound"), [("energy", 0.8), ("cg", 0.1)])
def test_config_bounds_are_the_same_as_a_plan(model, compensation, bound):
    config = HWPQConfig(max_loss=bound, compensation=compensation, sequential=False)
    made = hwpq_fx.plan(model, BATCHES, config)
    other = copy.deepcopy(model)
    convert(model, BATCHES, config)
    convert(other, BATCHES, HWPQConfig(compensation=compensation, sequential=False), plan=made)
    assert kinds(model) == kinds(other)
    assert 0 < sum(kind == "Float8Sparse24Tensor" for kind in kinds(model).values()) < 4
    assert sum(line.error for line in report(model).converted) <= bound
    torch.testing.assert_close(model(BATCHES[0]), other(BATCHES[0]), rtol=0, atol=0)


def test_data_free(model):
    made = hwpq_fx.plan(model)
    assert [layer.status for layer in made.layers] == [SPARSE] * 4
    convert(model, plan=made)
    assert isinstance(model.up.weight, Float8Sparse24Tensor)


def test_json_round_trip(model, tmp_path):
    made = hwpq_fx.plan(model, BATCHES)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == 2
    text = str(made)
    assert "the roofline model of H100" in text and "4 sparse24_fp8, 0 fp8, 0 dense" in text


def test_times(monkeypatch):
    def times(shape, rows=1, gpu="h100", statuses=(DENSE, FP8, SPARSE), activation="dynamic"):
        found, where = times_of([(shape, statuses)], rows, gpu, torch.device("cpu"), activation)
        return found[0], where

    modelled, where = times((4096, 4096))
    assert where == "the roofline model of H100 SXM"
    assert modelled[DENSE] / modelled[SPARSE] == pytest.approx(3.2, rel=0.02)
    assert modelled[DENSE] / modelled[FP8] == pytest.approx(2, rel=0.02)
    slower, _ = times((4096, 4096), gpu="l40s")
    assert slower[DENSE] > 3 * modelled[DENSE]
    with pytest.raises(ConfigError, match="gpu 'v100' is not known"):
        times((64, 64), gpu="v100")
    # what multiplies 16-bit activations has no FP8 tensor cores
    many, _ = times((4096, 4096), 4096, activation="none")
    assert many[SPARSE] >= many[DENSE] and many[FP8] >= many[DENSE]
    assert times((4096, 4096), 4096)[0][SPARSE] < many[SPARSE] / 2
    measured = Table({(64, 64): {8: {"bf16": 9.0, "fp8 dynamic": 7.0, "fp8 weight-only": 8.0}}})
    measured.entries[64, 64][8] |= {"gemv": 5.0, "tiles": 4.0, "cusparselt": 1.0}
    planning = __import__("sys").modules["hwpq_fx.plan"]
    monkeypatch.setattr(planning, "target_of", lambda device: hwpq_fx.kernels.paths.Target(90, "G"))
    monkeypatch.setattr(planning, "table_of", lambda name: measured)
    assert times((64, 64), 3) == ({DENSE: 9.0, FP8: 7.0, SPARSE: 1.0}, "measurement on G")
    assert times((64, 64), 3, activation="none") == ({DENSE: 9.0, FP8: 8.0, SPARSE: 4.0}, "measurement on G")
    # all measured or none
    both, where = times_of([((64, 64), (DENSE,)), ((64, 128), (DENSE,))], 3, "h100", torch.device("cpu"), "none")
    assert where.startswith("the roofline") and both[0][DENSE] < 1


def test_plot(model, tmp_path):
    pytest.importorskip("matplotlib")
    hwpq_fx.plan(model, BATCHES).plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def change(plan, layer, **changes):
    vars(plan.statuses()[layer]).update(changes)
    return plan


WRONG = {
    "a status that is none": (lambda p: change(p, "up", status="fp4"), "makes up 'fp4'"),
    "a status that it cannot have": (lambda p: change(p, "narrow", status=FP8), "narrow 'fp8'; it can be"),
    "a layer that is not there": (lambda p: change(p, "up", name="sideways"), "the model has no such layer"),
    "another shape": (lambda p: change(p, "up", shape=(8, 8)), "has up as"),
}


@pytest.mark.parametrize("case", WRONG)
def test_plan_that_does_not_fit(model, case):
    changed, message = WRONG[case]
    made = changed(hwpq_fx.plan(model, BATCHES))
    ran = []
    with pytest.raises(ConfigError, match=message):
        convert(model, ran.append, HWPQConfig(compensation="energy"), plan=made)
    assert set(kinds(model).values()) == {"Parameter"} and not ran, "found out before calibration"


def test_nothing_left(model):
    made = hwpq_fx.plan(model, BATCHES, HWPQConfig(max_loss=0))
    assert made.speedup == 1
    with pytest.raises(ModelError, match="leaves every layer dense"):
        convert(model, BATCHES, HWPQConfig(compensation="energy"), plan=made)
    hwpq_fx.prepare(model)
    with pytest.raises(ModelError, match="prepared"):
        hwpq_fx.plan(model, BATCHES)


def layer_of(**changes):
    """A plan's JSON of one layer, or two."""
    layer = {"name": "x", "shape": [8, 8], "errors": {"dense": 0, "int4": 0.1}, "microseconds": {"dense": 2, "int4": 1}}
    twice = changes.pop("twice", False)
    layers = [layer | {"status": "dense"} | changes] * (1 + twice)
    return json.dumps(
        {"format": 2, "rows": 1, "timing": "", "frontier": [], "measure": "", "by_error": "", "layers": layers}
    )


BAD = [{"errors": None}, {"microseconds": None}, {"status": ["fp8"]}, {"microseconds": {"fp8": 1}}, {"shape": [8]}]
BAD += [{"errors": {"dense": "0"}}, {"name": 3}, {"status": "int4"}, {"twice": True}]
BAD += [{"effects": {"dense": 0}}, {"effects": {"dense": 0, "int4": "x"}}]


def test_a_file_of_this_kind_is_read(tmp_path):
    (tmp_path / "plan.json").write_text("\ufeff" + layer_of(), encoding="utf-8")
    assert Plan.load(tmp_path / "plan.json").layers[0].name == "x"


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"format": 9}', '{"format": 2, "layers": [{}]}', *(layer_of(**bad) for bad in BAD)]
)
def test_files_that_hold_no_plan(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ConfigError):
        Plan.load(tmp_path / "plan.json")


def test_its_own_error_is_a_bound_that_holds_all_of_it(model):
    for seed in range(5):
        torch.manual_seed(seed)
        model = Mlp().eval()
        made = hwpq_fx.plan(model, BATCHES)
        for bound in ({"max_loss": made.error}, {"max_divergence": made.loss}):
            assert statuses(hwpq_fx.plan(model, BATCHES, HWPQConfig(**bound)).layers) == statuses(made.layers)


def test_nothing_is_done_for_a_speed_that_is_there(model):
    assert hwpq_fx.plan(model, BATCHES, HWPQConfig(min_speedup=1.0)).speedup == 1


def test_unstructured_has_no_plan(model):
    with pytest.raises(ConfigError, match=r'a plan is for sparsity "2:4", not 0\.5'):
        hwpq_fx.plan(model, BATCHES, HWPQConfig(sparsity=0.5))
    with pytest.raises(ConfigError, match="max_loss, max_divergence and min_speedup are for sparsity"):
        convert(model, BATCHES, HWPQConfig(sparsity=0.5, max_loss=1.0))
