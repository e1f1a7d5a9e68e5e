"""`sequential`: the same as a loop over the layers written by hand, better than without, and when it is not done."""

import copy
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import nn

import hwpq_fx
from hwpq_fx import CalibrationError, ConfigError, Float8Sparse24Tensor, HWPQConfig, convert, lockstep, prepare, report
from hwpq_fx.calibration import Calibration
from hwpq_fx.compress import compress
from hwpq_fx.curvature import GramMatrix
from hwpq_fx.passes import Use
from hwpq_fx.passes.dynamo import compile_settings, unwrap
from hwpq_fx.reconstruction import reconstruct
from hwpq_fx.statistics import InputStatistics
from models import MODELS, Net, call, gpt2, llama, tokens
from weights import same

IN_ORDER, ONE_BY_ONE = HWPQConfig(sequential=True), HWPQConfig(sequential=False)
ORDERED, PLAIN = "cg, in order, X^T X", "cg, X^T X"


def packed(model):
    parameters = unwrap(model).named_parameters()
    return {name: value for name, value in parameters if isinstance(value, Float8Sparse24Tensor)}


def assert_same_bits(one, other):
    one, other = packed(one), packed(other)
    assert one and one.keys() == other.keys()
    for name in one:
        same(one[name], other[name])


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hwpq_fx"]


def compensations(model):
    return {line.compensation for line in report(model).converted}


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.a, self.b, self.o = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h):
        x = F.rms_norm(h, h.shape[-1:])
        h = h + self.o(torch.tanh(self.a(x)) * self.b(x).mean(-2, keepdim=True))
        return h + self.down(F.silu(self.up(F.rms_norm(h, h.shape[-1:]))))


class Toy(nn.Sequential):
    """Two blocks, whose inputs are correlated."""

    def __init__(self):
        super().__init__(Block(), Block())
        self.eval()

    @staticmethod
    def batches(count=4):
        mix = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)) / 4
        return [torch.randn(4, 16, 32) @ mix for _ in range(count)]


def kept_of(one, other, gram, config):
    """How much of a drift is no chance, from those of two halves of the rows."""
    nothing, kept = torch.zeros_like(one), torch.zeros_like(one, dtype=torch.bool)
    kept[:, ::2] = True
    fits = [reconstruct(nothing, kept, gram, config.cg_steps, drift=half) for half in (one, other)]
    (a, b), (c, d) = ([float((fit.double() * half.double()).sum()) for half in (one, other)] for fit in fits)
    alike = max(0.0, (b + c) / 2 / (a * d) ** 0.5)
    return 2 * alike / (1 + alike)


@torch.no_grad()
def by_hand(model, batches, config, residuals=True):
    """The toy's packed weights, layer after layer. Rounding decides on masks, and so on all that comes after: sums are
    taken batch by batch, as calibration does."""
    made = {}

    def converted(name, linear, inputs, residual=None):
        """inputs, residual: (dense, converted) by batch."""
        weight = linear.weight.detach()
        statistics = InputStatistics(weight.shape[1], weight.device, GramMatrix(weight.shape[1], weight.device))
        cross = torch.zeros(weight.shape[1], weight.shape[1])
        pull = torch.zeros_like(weight)
        halves = torch.zeros(2, 2, *weight.shape)
        for at, (dense, x) in enumerate(inputs):
            statistics.update(x)
            rows, off = x.flatten(0, -2), (dense - x).flatten(0, -2)
            cross.addmm_(off.T, rows)
            errors = [off @ weight.T]
            if residual and residuals:
                errors.append((residual[at][0] - residual[at][1]).flatten(0, -2))
                pull.addmm_(errors[1].T, rows)
            half = len(rows) // 2
            parts = [(0, slice(half)), (1, slice(half, None))] if at == 0 else [(at % 2, slice(None))]
            for kind, error in enumerate(errors):
                for which, part in parts:
                    halves[kind, which].addmm_(error[part].T, rows[part])
        halves = halves.sum(0)
        use, gram = Use(False, 0, weight.shape[0]), statistics.curvature.matrix
        share = kept_of(*halves, gram, config) if halves[0].any() else 0.0
        new, _ = compress(name, weight, {use: [statistics]}, config, drift=share * (weight @ cross + pull))
        made[f"{name}.weight"] = new
        return [(F.linear(d, weight, linear.bias), F.linear(x, new.expand(), linear.bias)) for d, x in inputs]

    def both(function, *streams):
        return [tuple(function(*values) for values in zip(*batch, strict=True)) for batch in zip(*streams, strict=True)]

    h = [(x, x) for x in batches]
    for number, block in enumerate(model):
        x = both(lambda h: F.rms_norm(h, h.shape[-1:]), h)
        a, b = converted(f"{number}.a", block.a, x), converted(f"{number}.b", block.b, x)
        x = both(lambda a, b: torch.tanh(a) * b.mean(-2, keepdim=True), a, b)
        h = both(torch.add, h, converted(f"{number}.o", block.o, x, h))
        x = both(lambda h: F.rms_norm(h, h.shape[-1:]), h)
        x = both(F.silu, converted(f"{number}.up", block.up, x))
        h = both(torch.add, h, converted(f"{number}.down", block.down, x, h))
    return made


def distance(one, other):
    """Relative, over all weights."""
    assert one.keys() == other.keys()
    one, other = (torch.cat([weights[name].dequantize().flatten() for name in one]) for weights in (one, other))
    return float((one - other).norm() / other.norm())


def output_error(model, dense, batches):
    """Relative, over the batches."""
    pairs = [(call(model, batch), call(dense, batch)) for batch in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


SHAPES = [(4, 16), (3, 9), (1, 12), (4, 5)]


@pytest.mark.parametrize("activation", ["dynamic", "none"])
@pytest.mark.parametrize("shapes", [SHAPES[:1] * 4, SHAPES], ids=["one shape", "several shapes"])
def test_layer_after_layer_by_hand(activation, shapes):
    model, config = Toy(), HWPQConfig(sequential=True, activation=activation)
    batches = [batch[:count, :length] for batch, (count, length) in zip(Toy.batches(), shapes, strict=True)]
    expected, without = (by_hand(model, batches, config, residuals) for residuals in (True, False))
    made = convert(copy.deepcopy(model), batches, config)
    assert len(expected) == len(report(made).converted) == 10 and compensations(made) == {ORDERED}
    assert {line.rows for line in report(made).converted} == {sum(count * length for count, length in shapes)}
    assert distance(packed(made), expected) < 1e-3
    assert distance(packed(made), without) > 0.05, "the residual stream makes no difference"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt_neox", "encoder"])
def test_the_output_is_nearer_to_the_dense_one(name):
    make, batch, layers = MODELS[name]
    dense, batches, held_out = make(), [batch(24, 24) for _ in range(4)], [batch(16, 24) for _ in range(2)]
    made = [convert(copy.deepcopy(dense), batches, HWPQConfig(sequential=sequential)) for sequential in (False, True)]
    assert len(report(made[1]).converted) == layers and compensations(made[1]) == {ORDERED}
    plain, ordered = (output_error(one, dense, held_out) for one in made)
    assert ordered < 0.85 * plain


def test_what_comes_before_any_converted_layer_is_as_without():
    model, batches = Toy(), Toy.batches()
    made = [convert(copy.deepcopy(model), batches, HWPQConfig(sequential=sequential)) for sequential in (False, True)]
    plain, ordered = map(packed, made)
    for name in plain:
        alike = torch.equal(plain[name].dequantize(), ordered[name].dequantize())
        assert alike == (name in ("0.a.weight", "0.b.weight")), name


def test_graphs_of_several_shapes_of_a_language_model(caplog):
    dense, batches = llama(), [tokens(*shape) for shape in 3 * [(8, 12), (12, 9), (1, 5), (16, 12)]]
    held_out = [tokens(16, 12) for _ in range(2)]
    made = convert(copy.deepcopy(dense), batches, IN_ORDER)
    assert compensations(made) == {ORDERED} and not warnings(caplog)
    rows = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert {line.rows for line in report(made).converted} == {rows}
    assert output_error(made, dense, held_out) < 0.9 * output_error(
        convert(copy.deepcopy(dense), batches, ONE_BY_ONE), dense, held_out
    )


def test_padding_does_not_count():
    model, batches = llama(), [tokens(3, 12) for _ in range(3)]
    other = copy.deepcopy(batches)
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    assert not torch.equal(other[0]["input_ids"], batches[0]["input_ids"])
    assert_same_bits(convert(copy.deepcopy(model), batches, IN_ORDER), convert(copy.deepcopy(model), other, IN_ORDER))


@pytest.mark.parametrize("way", ["generator", "callable", "prepared", "inference", "compiled"])
def test_every_way_in_gives_the_same_bits(way):
    dense, batches = llama(), [tokens() for _ in range(2)]
    expected = convert(copy.deepcopy(dense), batches, IN_ORDER)
    model = torch.compile(dense) if way == "compiled" else dense
    if way in ("prepared", "inference"):
        prepare(model, IN_ORDER)
        with torch.inference_mode(way == "inference"):
            for batch in batches:
                model(**batch)
        convert(model)
    elif way == "callable":
        convert(model, lambda model: [model(**batch) for batch in batches], IN_ORDER)
    else:
        convert(model, (batch for batch in batches), IN_ORDER)
    assert_same_bits(model, expected)
    assert compensations(dense) == {ORDERED}
    assert (compile_settings(model) is not None) == (way == "compiled")
    torch.testing.assert_close(call(model, batches[0]), call(expected, batches[0]), atol=1e-4, rtol=1e-4)


class Broken(Toy):
    def forward(self, h, attention_mask=None):
        h = self[0](h)
        torch._dynamo.graph_break()
        return self[1](h)


class Reused(Toy):
    def forward(self, h, attention_mask=None):
        return self[0](self[1](self[0](h)))


class Turning(Toy):
    """The order of its layers hangs on the input's length."""

    def forward(self, h, attention_mask=None):
        first, second = self if h.shape[-2] > 10 else reversed(self)
        return second(first(h))


class Cast(Toy):
    def forward(self, h, attention_mask=None):
        with torch.autocast("cpu", torch.bfloat16):
            h = self[0](h)
        return self[1](h.float())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Broken, "ran several graphs"),
        (Reused, "0.a multiplies several inputs"),
        (Turning, "ran through different layers"),
        (Cast, "autocast"),
    ],
)
def test_what_cannot_run_in_lockstep_is_converted_as_without(kind, says, caplog):
    model, batches = kind(), [{"h": h} for h in (*Toy.batches(3), torch.randn(3, 6, 32))]
    for batch in batches[1:]:
        batch["attention_mask"] = torch.randint(2, batch["h"].shape[:2])
    plain = convert(copy.deepcopy(model), batches, ONE_BY_ONE)
    unasked = convert(copy.deepcopy(model), batches)
    assert not warnings(caplog)
    made = convert(copy.deepcopy(model), batches, IN_ORDER)
    (warning,) = warnings(caplog)
    assert says in warning
    assert report(made).one_by_one == report(unasked).one_by_one and says in report(made).one_by_one
    assert says in str(report(unasked)) and report(plain).one_by_one == ""
    assert_same_bits(made, plain)
    assert_same_bits(unasked, plain)
    assert compensations(made) == compensations(plain) == {PLAIN}
    for a, b in zip(report(made).layers, report(plain).layers, strict=True):
        assert a == b


def test_autocast_around_the_calls(caplog):
    made = []
    for sequential in (False, True):
        model = prepare(Toy(), HWPQConfig(sequential=sequential))
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            for batch in Toy.batches(2):
                model(batch)
        torch.manual_seed(0)
        made.append(convert(model))
    assert "autocast" in "".join(warnings(caplog))
    assert compensations(made[1]) == {PLAIN}


class Beside(Reused):
    """What is used twice need not be converted."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(32, 32)

    def forward(self, h, attention_mask=None):
        h = Toy.forward(self, self.twice(self.twice(h)))
        return h + self.twice.weight.topk(2)[0].sum() if self.blocked else h


@pytest.mark.parametrize(
    ("blocked", "fields"), [(False, {"ignore": ["twice"]}), (False, {"targets": ["re:0", "re:1"]}), (True, {})]
)
def test_what_stays_dense_may_multiply_several_inputs(blocked, fields, caplog):
    model = Beside().eval()
    model.blocked = blocked
    convert(model, Toy.batches(2), HWPQConfig(sequential=True, **fields))
    assert not warnings(caplog)
    assert {line.name: line.status for line in report(model).layers}["twice"] == "dense"
    assert compensations(model) == {ORDERED}


def test_nothing_is_kept_once_it_cannot_be():
    calibration = Calibration(Broken(), None, sequential={})
    calibration.run(Toy.batches())
    calibration.remove()
    assert calibration.recording.ended and not calibration.recording.runs


def test_layers_that_stay(caplog):
    model, batches, held_out = llama(), [tokens(36) for _ in range(4)], [tokens(16) for _ in range(2)]
    config = HWPQConfig(sequential=True, ignore=["re:.*layers.0.self_attn", "up_proj", "lm_head"])
    kept = {name: value.clone() for name, value in model.named_parameters()}
    dense = copy.deepcopy(model)
    convert(model, batches, config)
    reasons = {line.name: line.reason for line in report(model).layers if line.status == "dense"}
    assert set(reasons.values()) == {"ignored"} and len(reasons) == 4 + 2 + 1
    for name in reasons:
        weight = model.get_parameter(f"{name}.weight")
        assert type(weight) is nn.Parameter and torch.equal(weight, kept[f"{name}.weight"])
    assert len(report(model).converted) == 8 and compensations(model) == {ORDERED}
    one_by_one = HWPQConfig(sequential=False, ignore=config.ignore)
    assert output_error(model, dense, held_out) < 0.95 * output_error(
        convert(copy.deepcopy(dense), batches, one_by_one), dense, held_out
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_a_failure_on_the_way_leaves_the_model(error, wrap, monkeypatch):
    model = Toy()
    wrapped, parameters, batches = wrap(model), dict(model.named_parameters()), Toy.batches(2)
    before, bits = call(model, batches[0]), {name: value.clone() for name, value in parameters.items()}
    seen = []

    def failing(name, *args, **kwargs):
        seen.append(name)
        if len(seen) == 7:
            raise error("on purpose")
        return compress(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lockstep, "compress", failing)
        with pytest.raises(error, match="on purpose"):
            convert(wrapped, batches, IN_ORDER)
    assert len(seen) == 7
    now = dict(model.named_parameters())
    assert all(now[name] is parameters[name] and torch.equal(now[name], bits[name]) for name in parameters | now)
    assert torch.equal(call(model, batches[0]), before) and "forward" not in vars(model)
    convert(wrapped, batches, IN_ORDER)
    assert len(report(model).converted) == 10


def test_a_bad_batch_is_named():
    batches = Toy.batches(3)
    batches[1][0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"0\.a: its input held NaN or Inf.*batch 1, counted from 0"):
        convert(Toy(), batches, IN_ORDER)


class InPlace(Toy):
    """The toy's two blocks with sums in place, and a buffer that each call writes and then reads."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("cache", torch.zeros(4, 16, 32))

    def forward(self, h):
        for block in self:
            x = F.rms_norm(h, h.shape[-1:])
            if self.in_place:
                self.cache.mul_(0).add_(torch.tanh(block.a(x)))
                h = h.clone()
                h += block.o(self.cache * block.b(x))
                x = F.rms_norm(h, h.shape[-1:])
                h.add_(block.down(F.silu(block.up(x), inplace=True)))
                h *= 0.5
            else:
                h = h + block.o(torch.tanh(block.a(x)) * block.b(x))
                h = (h + block.down(F.silu(block.up(F.rms_norm(h, h.shape[-1:]))))) * 0.5
        return h


class Part(nn.Module):
    """The first rows of a weight; what they give is added to a row of the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.weight = nn.Parameter(torch.randn(48, 32) / 6)
        self.eval()

    def forward(self, x):
        h = self.first(x)
        h = h[:1] + self.second(torch.relu(h))
        return h + F.linear(torch.relu(h), self.weight[:32])


@pytest.mark.parametrize(("counts", "pulled"), [([1, 1], {"second"}), ([1, 3], set())], ids=["alike", "not alike"])
def test_residuals_of_all_batches_or_none_and_of_whole_weights(counts, pulled, monkeypatch):
    inner, seen = lockstep._compress, {}

    def watching(job, one, config):
        seen.update((name, None) for name, (_, drift) in one.drifts.items() if drift.pull is not None)
        return inner(job, one, config)

    monkeypatch.setattr(lockstep, "_compress", watching)
    model = convert(Part(), [torch.randn(count, 40, 32) for count in counts], IN_ORDER)
    assert seen.keys() == pulled
    assert len(report(model).converted) == 3


def test_one_input_at_a_time(monkeypatch):
    """X^T X of all inputs, which a plan takes, is gone before the layers are converted."""
    begin, alive, held = GramMatrix.__init__, weakref.WeakSet(), []

    def beginning(self, *args):
        begin(self, *args)
        alive.add(self)

    def watching(*args, drift):
        held.append(len(alive))
        return compress(*args, drift=drift)

    monkeypatch.setattr(GramMatrix, "__init__", beginning)
    monkeypatch.setattr(lockstep, "compress", watching)
    convert(Toy(), Toy.batches(2), HWPQConfig(sequential=True, max_loss=1000.0))
    assert held == [1] * 10


@pytest.mark.parametrize("way", ["once", "replayed", "inference"])
def test_writes_in_place_stay_in_their_run(way):
    config = HWPQConfig(sequential=True, max_loss=1000.0 if way == "replayed" else None)
    batches = Toy.batches(3)
    given, made = [batch.clone() for batch in batches], []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = InPlace(in_place)
        model[0].a.bias.data += 1
        dense = copy.deepcopy(model)
        prepare(model, config)
        with torch.inference_mode(way == "inference"), torch.no_grad():
            for batch in batches:
                model(batch)
        made.append(convert(model))
        assert compensations(model) == {ORDERED}
        for batch in batches:
            call(dense, batch)
        assert torch.equal(model.cache, dense.cache), "the buffer holds what the dense model left there"
    assert_same_bits(*made)
    assert all(map(torch.equal, batches, given))


def test_weights_kept_as_in_by_out():
    """GPT-2's Conv1D: the drift is that of [N, K]."""
    dense, batches = gpt2(), [tokens(4, 16) for _ in range(2)]
    made = convert(copy.deepcopy(dense), batches, IN_ORDER)
    weight = made.transformer.h[0].mlp.c_proj.weight
    assert weight.transposed and weight.shape == dense.transformer.h[0].mlp.c_proj.weight.shape
    assert compensations(made) == {ORDERED}


class Multiplied(nn.Module):
    """x @ W.t(), with the views taken long before the products or where they are."""

    def __init__(self, early):
        super().__init__()
        self.early = early
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(32, 32) / 5) for _ in range(3)])
        self.eval()

    def forward(self, x):
        views = [weight.t() for weight in self.weights if self.early]
        for place, weight in enumerate(self.weights):
            x = x + torch.tanh(x @ (views[place] if self.early else weight.t()))
        return x


def test_views_taken_before_the_weight_was_converted():
    batches, made = Toy.batches(), []
    for early in (False, True):
        torch.manual_seed(0)
        made.append(convert(Multiplied(early), batches, IN_ORDER))
    assert len(packed(made[0])) == 3 and compensations(made[0]) == {ORDERED}
    assert_same_bits(*made)


class TestPlans:
    def test_bounds_choose_as_without(self):
        dense, batches = Toy(), Toy.batches()
        config = HWPQConfig(sequential=True, max_loss=1.5)
        chosen = hwpq_fx.plan(copy.deepcopy(dense), batches, config)
        assert chosen.to_dict() == hwpq_fx.plan(copy.deepcopy(dense), batches, HWPQConfig(max_loss=1.5)).to_dict()
        statuses = {one.name: one.status for one in chosen.layers}
        assert len(set(statuses.values())) > 1
        made = convert(copy.deepcopy(dense), batches, config)
        assert {line.name: line.status for line in report(made).layers} == statuses
        assert {line.compensation for line in report(made).converted if line.status == "sparse24_fp8"} == {ORDERED}
        assert_same_bits(made, convert(copy.deepcopy(dense), batches, IN_ORDER, plan=chosen))

    def test_a_plan_with_every_status(self):
        dense, batches = Toy(), Toy.batches()
        chosen = hwpq_fx.plan(copy.deepcopy(dense), batches)
        for one in chosen.layers:
            one.status = {"a": "fp8", "up": "dense"}.get(one.name[-1:] if one.name != "0.up" else "up", "sparse24_fp8")
        made = convert(dense, batches, IN_ORDER, plan=chosen)
        for line in report(made).layers:
            assert line.status == chosen.statuses()[line.name].status
            assert line.compensation == {"fp8": "none", "dense": "", "sparse24_fp8": ORDERED}[line.status]
        assert {line.status for line in report(made).layers} == {"fp8", "dense", "sparse24_fp8"}

    def test_all_dense(self):
        chosen = hwpq_fx.plan(Toy(), Toy.batches(1))
        for one in chosen.layers:
            one.status = "dense"
        with pytest.raises(hwpq_fx.ModelError, match="every layer dense"):
            convert(Toy(), Toy.batches(1), IN_ORDER, plan=chosen)


def test_unstructured():
    dense, batches = Toy(), Toy.batches()
    plain, ordered = (
        convert(copy.deepcopy(dense), batches, HWPQConfig(sparsity=0.5, sequential=sequential))
        for sequential in (False, True)
    )
    assert compensations(ordered) == {ORDERED}
    assert output_error(ordered, dense, batches) < 0.9 * output_error(plain, dense, batches)


@pytest.mark.parametrize(
    ("room", "says", "aimed"),
    [
        (2 * 4 * 64 * 64, {ORDERED}, 10),
        (2 * 4 * 64 * 64 - 1, {ORDERED}, 8),  # X^T X without the drift for the two with 64 channels
        (4 * 64 * 64 - 1, {ORDERED, "energy"}, 8),
        (0, {"energy"}, 0),
    ],
)
def test_memory(room, says, aimed, monkeypatch):
    drifts = []

    def watching(*args, drift):
        drifts.append(drift)
        return compress(*args, drift=drift)

    monkeypatch.setattr(lockstep, "compress", watching)
    model = convert(Toy(), Toy.batches(2), HWPQConfig(sequential=True, curvature_bytes=room))
    assert compensations(model) == says
    assert len(drifts) == 10 and sum(drift is not None for drift in drifts) == aimed


def test_a_sample_of_rows_where_the_inputs_do_not_fit():
    model = nn.Sequential(nn.Linear(32, 288), nn.ReLU(), nn.Linear(288, 32)).eval()
    convert(model, Toy.batches(5), HWPQConfig(sequential=True, curvature_bytes=4 * 288 * 288 - 1))
    assert compensations(model) == {ORDERED, "cg, in order, 287 rows"}


def test_phases_and_progress(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("hwpq_fx.calibration.Progress", lambda: Progress(console=Console(file=shown)))
    model = convert(Toy(), Toy.batches(2), IN_ORDER, progress=True)
    assert list(report(model).seconds) == ["observe", "run in order", "choose and pack", "lay out"]
    assert "choose and pack" in shown.getvalue() and "100%" in shown.getvalue()


@pytest.mark.parametrize("way", ["convert", "prepare", "bounds"])
def test_in_order_unless_told_otherwise(way, caplog):
    dense, batches, bounds = Toy(), Toy.batches(), {"max_loss": 1000.0} if way == "bounds" else {}
    expected = convert(copy.deepcopy(dense), batches, HWPQConfig(sequential=True, **bounds))
    if way == "prepare":
        made = prepare(copy.deepcopy(dense))
        for batch in batches:
            made(batch)
        convert(made)
    else:
        made = convert(copy.deepcopy(dense), batches, HWPQConfig(**bounds))
    assert compensations(made) == {ORDERED} and report(made).one_by_one == "" and not warnings(caplog)
    assert_same_bits(made, expected)


def given_bytes(batches):
    return sum(batch.nbytes for batch in batches)


@pytest.mark.parametrize("what", ["calls", "activations"])
def test_no_more_memory_than_there_is_room_for(what, monkeypatch, caplog):
    dense, batches = Toy(), [batch[: 1 + at % 4] for at, batch in enumerate(Toy.batches(7))]
    # of the toy most is alive between up and down: 64 channels beside the 32 of the residual stream; twice
    most = given_bytes(batches) if what == "calls" else 2 * 3 * given_bytes(batches)
    plain, expected = (convert(copy.deepcopy(dense), batches, config) for config in (ONE_BY_ONE, IN_ORDER))

    def within(room):
        monkeypatch.setattr("hwpq_fx.recording.room", lambda device, taken=0: room)
        return convert(copy.deepcopy(dense), batches)

    made = within(most - 1)
    assert_same_bits(made, plain)
    (says,) = {report(made).one_by_one}
    assert what in says and "GiB on cpu" in says and "sequential=True" in says and compensations(made) == {PLAIN}
    if what == "activations":
        assert_same_bits(within(most), expected)
    within(0)
    assert_same_bits(convert(copy.deepcopy(dense), batches, IN_ORDER), expected)  # asked for in so many words
    assert not warnings(caplog)


def test_for_one_process():
    model = prepare(Toy(), IN_ORDER)
    model(Toy.batches(1)[0])
    with pytest.raises(ConfigError, match="sequential is for one process"):
        convert(model, group=object())
    assert report(convert(model)).converted
    with pytest.raises(ConfigError, match="sequential is for one process"):
        convert(Toy(), Toy.batches(1), IN_ORDER, group=object())


def test_without_calibration():
    made = [
        convert(copy.deepcopy(net), None, HWPQConfig(sequential=s)) for net in [Net().eval()] for s in (False, True)
    ]
    assert_same_bits(*made)
