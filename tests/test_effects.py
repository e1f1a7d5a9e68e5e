"""What a layer's error does to the output: against the output itself, and what of calibration is kept for it."""

import copy

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import hwpq_fx
from hwpq_fx import CalibrationError, ConfigError, HWPQConfig, convert, prepare, report
from hwpq_fx.effects import KL, SQUARED, Call, CallSample, Change, effects_of
from hwpq_fx.plan import DENSE, ERROR, FP8, SPARSE
from models import gpt2, llama, tokens


class Deep(nn.Module):
    """Three layers, of which the last but one hardly matters."""

    def __init__(self, logits=False, matters=0.05):
        super().__init__()
        self.logits, self.matters = logits, matters
        self.first, self.side, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 48)
        self.eval()

    def forward(self, x, attention_mask=None):
        h = torch.tanh(2 * self.first(x))
        out = self.last(h + self.matters * self.side(h))
        return CausalLMOutput(logits=3 * out) if self.logits else out


def calls_of(batches):
    return [Call((batch,), {}, []) for batch in batches]


def loss_of(model, dense, batches):
    """Of the output, measured."""
    pairs = [(model(batch), dense(batch)) for batch in batches]
    if model.logits:
        pairs = [(new.logits.log_softmax(-1), old.logits.log_softmax(-1)) for new, old in pairs]
        return torch.cat([(q.exp() * (q - p)).sum(-1).flatten() for p, q in pairs]).mean().item()
    lost, kept = (
        sum(parts) for parts in zip(*(((a - b).square().sum(), b.square().sum()) for a, b in pairs), strict=True)
    )
    return (lost / kept).item()


@pytest.mark.parametrize("logits", [True, False])
@torch.no_grad()
def test_what_is_measured_at_the_output(logits):
    dense, batches = Deep(logits), [torch.randn(4, 64, 32) for _ in range(16)]
    changed = {name: layer.weight + 0.02 * torch.randn_like(layer.weight) for name, layer in dense.named_children()}
    changes = {
        name: Change(
            dense.get_submodule(name).weight, False, {SPARSE: lambda new=new: new, DENSE: lambda new=new: 0 * new}
        )
        for name, new in changed.items()
    }
    found, kind = effects_of(dense, calls_of(batches), changes)
    assert kind == (KL if logits else SQUARED)
    for name, new in changed.items():
        model = copy.deepcopy(dense)
        model.get_submodule(name).weight = nn.Parameter(new)
        assert found[name][SPARSE] == pytest.approx(loss_of(model, dense, batches), rel=0.2), name
    assert found["side"][SPARSE] < 0.1 * found["first"][SPARSE] < found["first"][DENSE]


@pytest.mark.parametrize("mode", ["grad", "no grad", "inference", "frozen"])
def test_the_model_is_left_as_it_was(mode):
    model, batches = Deep(), [torch.randn(4, 32)]
    model.first.weight.requires_grad_(mode != "frozen")
    model.side.weight.grad = grad = torch.ones(64, 64)
    change = Change(model.first.weight, False, {SPARSE: lambda: torch.zeros(64, 32)})
    before = copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(mode == "grad"), torch.inference_mode(mode == "inference"):
        found, _ = effects_of(model, calls_of(batches), {"first": change})
    assert found["first"][SPARSE] > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.first.weight.requires_grad == (mode != "frozen") and model.last.weight.requires_grad
    assert model.side.weight.grad is grad and torch.equal(grad, torch.ones(64, 64))
    assert model.first.weight.grad is None and model.last.weight.grad is None
    assert not model.first.weight._post_accumulate_grad_hooks


def test_padding_does_not_count():
    model, x = Deep(logits=True), torch.randn(8, 16, 32)
    keep = torch.ones(8, 16, dtype=torch.bool)
    keep[:, 10:] = False
    other = x.clone()
    other[:, 10:] *= 100
    found = []
    for given, masks in ((x[:, :10], []), (other, [keep])):
        change = Change(model.last.weight, False, {SPARSE: lambda: torch.zeros(48, 64)})
        found.append(effects_of(model, [Call((given,), {}, masks)] * 400, {"last": change})[0]["last"][SPARSE])
    assert found[1] == pytest.approx(found[0], rel=0.1)


class TestSample:
    def test_sequences_of_all_calls_alike(self):
        sample = CallSample(100)
        for start in range(0, 1000, 20):
            sample.offer((torch.arange(start, start + 20)[:, None].expand(20, 3),), {"use_cache": False}, [])
        kept = [int(call.args[0][0, 0]) for call in sample.calls]
        assert len(kept) == len(set(kept)) == 100 and kept == sorted(kept)
        assert 400 < sum(kept) / 100 < 600
        assert all(call.args[0].shape == (1, 3) and call.kwargs == {"use_cache": False} for call in sample.calls)

    def test_few_calls_are_kept_whole(self):
        sample, x = CallSample(4), torch.randn(10, 3)
        sample.offer((), {"x": x, "y": x[:, 0]}, [x > 0])
        assert torch.equal(torch.cat([call.kwargs["x"] for call in sample.calls]), x)
        assert torch.equal(torch.cat([call.kwargs["y"] for call in sample.calls]), x[:, 0])
        assert torch.equal(torch.cat([call.masks[0] for call in sample.calls]), x > 0)

    def test_what_cannot_be_cut_is_kept_as_it_is(self):
        sample = CallSample(4)
        sample.offer((torch.zeros(10, 3), torch.zeros(1, 3)), {}, [torch.ones(10, 3)])
        sample.offer((torch.tensor(1.0),), {}, [])
        assert [call.args[0].shape for call in sample.calls] == [(10, 3), ()]
        assert sample.calls[0].masks[0].shape == (10, 3)

    def test_copies_outside_of_inference_mode(self):
        sample = CallSample(4)
        with torch.inference_mode():
            x = torch.zeros(2, 3)
            sample.offer((x,), {}, [])
            x += 1
        assert not any(call.args[0].is_inference() or call.args[0].any() for call in sample.calls)

    def test_what_cannot_be_run_again_is_left_out(self):
        sample = CallSample(4)
        sample.offer((torch.zeros(2, 3),), {"past_key_values": object()}, [])
        assert sample.calls == []


BATCHES = [torch.randn(8, 32) for _ in range(4)]


def test_layers_are_weighed_by_what_they_do():
    """Cut off, the side costs the output nothing, however far it is off."""
    model = Deep(matters=0.0)
    made = hwpq_fx.plan(model, BATCHES)
    assert made.measure == SQUARED and made.by_error == "" and SQUARED in str(made)
    by_name = made.statuses()
    assert by_name["side"].effects[SPARSE] == 0 < by_name["first"].effects[FP8] < by_name["first"].effects[SPARSE]
    assert made.loss == pytest.approx(sum(layer.effects[SPARSE] for layer in made.layers))
    made = hwpq_fx.plan(model, BATCHES, HWPQConfig(max_divergence=by_name["first"].effects[FP8]))
    assert made.statuses()["side"].status == SPARSE and made.statuses()["first"].status != SPARSE
    assert 0 <= made.loss <= by_name["first"].effects[FP8]
    by_error = hwpq_fx.plan(model, BATCHES, HWPQConfig(max_loss=0.05))
    assert by_error.measure == ERROR and by_error.statuses()["side"].status != SPARSE
    assert not any(layer.effects for layer in by_error.layers)


@pytest.mark.parametrize("way", ["batches", "callable", "prepared", "compiled"])
def test_bounds_of_the_config_are_the_same_as_a_plan(way):
    dense = llama()
    batches = [tokens(4) | {"use_cache": False} for _ in range(3)]
    loss = hwpq_fx.plan(copy.deepcopy(dense), batches).loss
    config = HWPQConfig(max_divergence=loss / 3)
    plan = hwpq_fx.plan(copy.deepcopy(dense), batches, config)
    assert plan.measure == KL and 0 < plan.loss <= loss / 3 and 0 < plan.sparse_share < 1
    expected = convert(copy.deepcopy(dense), batches, plan=plan)
    model = torch.compile(dense) if way == "compiled" else dense
    if way == "prepared":
        prepare(model, config)
        for batch in batches:
            model(**batch)
        convert(model)
    elif way == "callable":
        convert(model, lambda model: [model(**batch) for batch in batches], config)
    else:
        convert(model, batches, config)
    statuses = [line.status for line in report(expected).layers]
    assert [line.status for line in report(model).layers] == statuses and len(set(statuses)) > 1


def test_weights_kept_as_in_by_out():
    made = hwpq_fx.plan(gpt2(), [tokens(4) for _ in range(2)])
    assert made.measure == KL and all(layer.effects[SPARSE] > 0 for layer in made.layers)


class Cut(Deep):
    def forward(self, x):
        return super().forward(x.detach() if x.dim() > 2 else x).detach()


class Partly(Deep):
    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.first(x))
        return self.last(self.side(h))


@pytest.mark.parametrize(
    ("kind", "says"), [(Cut, "no tensor that has gradients"), (Partly, "no gradient comes back to first")]
)
def test_where_there_are_no_gradients(kind, says):
    made = hwpq_fx.plan(kind(), BATCHES)
    assert made.measure == ERROR and says in made.by_error and says in str(made)
    assert made.frontier[-1].loss == pytest.approx(sum(layer.errors[SPARSE] for layer in made.layers))
    model = kind()
    with pytest.raises(CalibrationError, match=f"max_divergence: .*{says}.*max_loss"):
        convert(model, BATCHES, HWPQConfig(max_divergence=0.1))
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def test_one_bound_at_a_time():
    with pytest.raises(ConfigError, match="give one of them"):
        HWPQConfig(max_loss=1.0, max_divergence=0.1)


def test_it_takes_calibration_by_one_process():
    with pytest.raises(CalibrationError, match="max_divergence takes calibration"):
        convert(Deep(), None, HWPQConfig(max_divergence=0.1))
    with pytest.raises(ConfigError, match="max_divergence is for one process"):
        convert(Deep(), BATCHES, HWPQConfig(max_divergence=0.1), group=object())
    assert hwpq_fx.plan(Deep()).measure == ERROR
