"""What observers gather: sums of squares and rows, against a float64 reference, however the model is built and fed."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hwpq_fx import HWPQConfig, convert, prepare, report
from hwpq_fx.calibration import Calibration
from hwpq_fx.passes import Use
from hwpq_fx.statistics import CalibrationRecorder, InputStatistics
from models import gpt2, llama, tokens

CPU = torch.device("cpu")


def reference(*xs):
    return sum(x.double().reshape(-1, x.shape[-1]).square().sum(0) for x in xs)


def assert_sums(statistics, *xs):
    torch.testing.assert_close(statistics.total, reference(*xs), rtol=2e-6, atol=0)
    assert statistics.sum_sq.dtype is torch.float32
    assert statistics.rows == sum(x.shape[:-1].numel() for x in xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(8,), (7, 8), (2, 3, 8), (2, 1, 3, 2, 8), (0, 8), (3, 0, 8)])
def test_sums_equal_a_float64_reference(dtype, shape):
    # 300^2 is beyond float16, 1e-4^2 below it
    x = torch.randn(shape).mul(torch.logspace(-4, 2.5, 8)).to(dtype)
    statistics = InputStatistics(8, CPU)
    statistics.update(x)
    statistics.update(2 * x)
    assert_sums(statistics, x, 2 * x)
    assert int(statistics.bad_call) == -1


def test_no_channels_and_inputs_that_are_not_contiguous():
    statistics = InputStatistics(0, CPU)
    statistics.update(torch.empty(3, 2, 0))
    assert statistics.rows == 6 and statistics.total.shape == (0,)
    x = torch.randn(8, 5, 3).permute(2, 1, 0)
    statistics = InputStatistics(8, CPU)
    statistics.update(x)
    assert_sums(statistics, x)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 300), max_size=8),
    channels=st.integers(1, 9),
    exponent=st.integers(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_sums_do_not_depend_on_how_batches_are_cut(rows, cuts, channels, exponent, dtype, seed):
    x = (torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent).to(dtype)
    whole, parts = InputStatistics(channels, CPU), InputStatistics(channels, CPU)
    whole.update(x)
    bounds = sorted({0, rows, *(cut % (rows + 1) for cut in cuts)})
    for start, stop in pairwise(bounds):
        parts.update(x[start:stop])
    assert_sums(whole, x)
    assert_sums(parts, x)


def test_many_small_batches_lose_nothing():
    """Added up in float32, ones stop counting at 2^24."""
    statistics = InputStatistics(1, CPU)
    statistics.total += 2.0**25
    for _ in range(100):
        statistics.update(torch.ones(1, 1))
    assert statistics.total.item() == 2**25 + 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_call_is_the_first_that_was_not_finite(bad):
    statistics = InputStatistics(2, CPU)
    for call, value in enumerate([1.0, bad, 1.0, bad, 1.0]):
        statistics.update(torch.tensor([[1.0, value]]), call=call)
    assert int(statistics.bad_call) == 1
    assert statistics.total[0] == 5 and not statistics.total[1].isfinite()


def test_updates_inside_and_outside_of_inference_mode():
    with torch.inference_mode():
        statistics = InputStatistics(4, CPU)
        statistics.update(torch.ones(3, 4))
    statistics.update(torch.ones(2, 4, requires_grad=True))
    assert_sums(statistics, torch.ones(5, 4))
    assert not statistics.total.requires_grad


class TestPadding:
    """Rows where attention_mask is 0 do not count, where the input has rows of that shape."""

    MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])

    def recorded(self, x, mask):
        recorder, weight = CalibrationRecorder(), torch.empty(5, x.shape[-1])
        use = Use(False, 0, 5)
        recorder.begin_call(mask)
        recorder.observe(x, (weight,), (use,))
        (statistics,) = recorder.uses[id(weight)][use]
        return statistics

    @pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("flat", [False, True], ids=["[B, S, K]", "[B*S, K]"])
    @pytest.mark.parametrize("padding", [1.0, 1e30, float("nan"), float("inf")])
    def test_padded_rows_are_left_out(self, kind, flat, padding):
        x = torch.randn(2, 3, 8)
        x[self.MASK == 0] = padding
        statistics = self.recorded(x.flatten(0, 1) if flat else x, self.MASK.to(kind))
        assert_sums(statistics, x[self.MASK == 1])
        assert int(statistics.bad_call) == -1

    @pytest.mark.parametrize("shape", [(3, 2, 8), (2, 4, 8), (2, 8), (3, 8), (2, 1, 3, 8), (2, 3, 2, 8), (8,), (5, 8)])
    def test_inputs_of_another_shape_count_whole(self, shape):
        x = torch.randn(shape)
        assert_sums(self.recorded(x, self.MASK), x)

    @pytest.mark.parametrize("mask", [None, torch.ones(2, 3), MASK[0], MASK[None, None], "mask", [[1, 0]]])
    def test_masks_that_mask_no_rows(self, mask):
        x = torch.randn(2, 3, 8)
        assert_sums(self.recorded(x, mask), x)

    def test_two_masks_go_by_their_shapes(self):
        recorder, weight, use = CalibrationRecorder(), torch.empty(5, 8), Use(False, 0, 5)
        other = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
        recorder.begin_call(self.MASK, other, None)
        x, y = torch.randn(2, 3, 8), torch.randn(8, 8)
        for one in (x, y):
            recorder.observe(one, (weight,), (use,))
        (statistics,) = recorder.uses[id(weight)][use]
        assert_sums(statistics, x[self.MASK == 1], y[other.flatten() == 1])

    def test_of_two_masks_of_one_shape_padding_is_what_both_say(self):
        recorder, weight, use = CalibrationRecorder(), torch.empty(5, 8), Use(False, 0, 5)
        x = torch.randn(2, 3, 8)
        recorder.begin_call(self.MASK, torch.tensor([[0, 1, 1], [0, 1, 0]]))
        recorder.observe(x, (weight,), (use,))
        (statistics,) = recorder.uses[id(weight)][use]
        assert_sums(statistics, x[torch.tensor([[1, 1, 1], [1, 1, 0]]) == 1])

    @pytest.mark.parametrize(("length", "told"), [(5, None), (12, None), (12, "labels"), (5, "mask"), (12, "mask")])
    def test_an_encoder_and_a_decoder(self, length, told):
        """Rows of the decoder are not told by the encoder's mask, also where both are as long."""
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
        mask, theirs = torch.ones(2, 12, dtype=torch.long), torch.ones(2, length, dtype=torch.long)
        mask[1, 6:], theirs[0, 3:] = 0, 0
        ids = torch.randint(3, 64, (2, length))
        batch = {"input_ids": torch.randint(3, 64, (2, 12)), "attention_mask": mask}
        batch |= {"labels" if told == "labels" else "decoder_input_ids": ids}
        if told == "mask":
            batch["decoder_attention_mask"] = theirs
        convert(model, [batch], HWPQConfig(compensation="energy"))
        rows = {line.name: line.rows for line in report(model).layers}
        real = 2 * length if told != "mask" else int(theirs.sum())
        both = 24 if told != "mask" or length == 5 else int((mask | theirs).sum())
        assert rows["decoder.block.0.layer.0.SelfAttention.q"] == (real if length == 5 else both)
        assert rows["encoder.block.0.layer.0.SelfAttention.q"] == (18 if length == 5 else both)

    def test_a_mask_holds_for_one_call(self):
        recorder, weight, use = CalibrationRecorder(), torch.empty(5, 8), Use(False, 0, 5)
        x = torch.randn(2, 3, 8)
        for mask in (self.MASK, None):
            recorder.begin_call(mask)
            recorder.observe(x, (weight,), (use,))
        (statistics,) = recorder.uses[id(weight)][use]
        assert_sums(statistics, x[self.MASK == 1], x)

    @pytest.mark.parametrize("build", [llama, gpt2])
    def test_in_models(self, build):
        """GPT-2 flattens [B, S, K] before its products; the padded tokens themselves must not matter."""
        model, batch = build(), tokens(3, 10)
        inner = model.model if build is llama else model.transformer
        name = "layers" if build is llama else "h"
        setattr(inner, name, getattr(inner, name)[:1])  # one is enough
        found = observed(model, [batch])
        changed = {name: value.clone() for name, value in batch.items()}
        changed["input_ids"][batch["attention_mask"] == 0] = 0
        again = observed(model, [changed])
        assert len(found) == (8 if build is llama else 5)
        for name, (sums, rows) in found.items():
            assert rows == batch["attention_mask"].sum() < 30, name
            torch.testing.assert_close(sums, again[name][0], msg=name)

    @pytest.mark.parametrize("positional", [False, True])
    def test_mask_given_by_name_or_position(self, positional):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x, other=None, attention_mask=None):
                return self.linear(x)

        x = torch.randn(2, 3, 8)
        batch = (x, None, self.MASK) if positional else {"x": x, "attention_mask": self.MASK}
        found = observed(Masked().eval(), [batch])
        assert found["linear"][1] == 4
        torch.testing.assert_close(found["linear"][0], reference(x[self.MASK == 1]))


def observed(model, batches):
    """{name: (sums of squares, rows)} of every parameter that was seen in a product."""
    calibration = Calibration(model)
    try:
        calibration.run(batches)
    finally:
        calibration.remove()
    names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    return {names[key]: totals(uses) for key, uses in calibration.recorder.uses.items()}


def totals(uses):
    every = [one for many in uses.values() for one in many]
    return sum(one.total for one in every), sum(one.rows for one in every)


def hooked(model, batches):
    """The same for every nn.Linear, by forward hooks on an eager copy, in float64."""
    model, found = copy.deepcopy(model), {}

    def hook(name):
        def add(_, args):
            sums, rows = found.get(name, (0, 0))
            found[name] = sums + reference(args[0]), rows + args[0].shape[:-1].numel()

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, (sums, rows) in expected.items():
        assert found[name][1] == rows, name
        torch.testing.assert_close(found[name][0], sums, rtol=1e-5, atol=0, msg=name)


class Block(nn.Module):
    """Three products on one input and one after them, with a graph break between where wanted."""

    def __init__(self, width, breaks=False):
        super().__init__()
        self.breaks = breaks
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        y = self.q(x) * self.k(x).sigmoid() + self.v(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.o(F.relu(y))


def stack(depth, breaks):
    return nn.Sequential(*(Block(8, breaks) for _ in range(depth))).eval()


def test_products_that_share_an_input_share_their_statistics():
    model = stack(1, False)
    calibration = Calibration(model)
    calibration.run([torch.randn(3, 8)])
    calibration.remove()
    uses = calibration.recorder.uses
    q, k, v, o = (uses[id(getattr(model[0], name).weight)][Use(False, 0, 8)] for name in "qkvo")
    assert len(q) == len(k) == len(v) == len(o) == 1
    assert q[0] is k[0] and k[0] is v[0] and v[0] is not o[0]


def test_instances_of_one_class_across_graph_breaks():
    """Dynamo runs one graph for all of them: each must still get its own statistics."""
    model, batches = stack(4, True), [torch.randn(5, 8), torch.randn(2, 8)]
    assert_same(observed(model, batches), hooked(model, batches))


class Loop(nn.Module):
    """Dynamo gives up on a frame with a graph break inside a loop, and passes over frames inside torch.nn."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(12))  # more than Dynamo's usual recompile limit
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tail = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.tail(x))


def test_a_frame_that_dynamo_gives_up_on():
    model, batches = Loop().eval(), [torch.randn(5, 3, 8), torch.randn(2, 4, 8)]
    found = observed(model, batches)
    assert found.pop("attention.in_proj_weight")[1] == found.pop("attention.out_proj")[1] == 23
    assert_same(found, hooked(model, batches))
    assert "forward" not in vars(model.head) and "forward" not in vars(model.attention)


@pytest.mark.parametrize("breaks", [False, True])
def test_a_module_called_twice_adds_up(breaks):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.other(x)
            if breaks:
                torch._dynamo.graph_break()
            return self.linear(y.relu()) + self.linear(x)

    model, batches = Twice().eval(), [torch.randn(3, 8), torch.randn(4, 8)]
    expected = hooked(model, batches)
    assert expected["linear"][1] == 14
    assert_same(observed(model, batches), expected)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("loop", ["calib", "own"])
def test_many_shapes_lose_no_rows(breaks, loop):
    model = stack(2, breaks)
    batches = [torch.randn(1 + length % 3, length, 8) for length in range(1, 21)] + [torch.randn(7, 8), torch.randn(8)]
    expected = hooked(model, batches)
    if loop == "calib":
        assert_same(observed(model, batches), expected)
    else:
        prepare(model)
        for batch in batches:
            model(batch)
        lines = report(convert(model)).layers
        assert {line.name: line.rows for line in lines} == {name: rows for name, (_, rows) in expected.items()}


def test_inputs_that_depend_on_data():
    """As experts do: their number of rows is known only when it runs."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 2)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            choice, y = self.router(x).argmax(-1), torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                (rows,) = torch.where(choice == number)
                y[rows] = expert(x[rows])
            return y

    model, batches = Experts().eval(), [torch.randn(9, 8), torch.randn(30, 8)]
    expected = hooked(model, batches)
    assert_same(observed(model, batches), expected)
    assert expected["experts.2"][1] == 0
    lines = {line.name: line for line in report(convert(model, batches)).layers}
    assert lines["experts.2"].reason.startswith("not reached by any row")
    assert lines["experts.0"].rows == expected["experts.0"][1] > 0


def test_a_sliced_parameter_is_observed_slice_by_slice():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 8))

        def forward(self, x, y):
            return F.linear(x, self.weight[:4]) + F.linear(y, self.weight[12:])

    model, x, y = Sliced().eval(), torch.randn(3, 8), torch.randn(5, 1, 8)
    calibration = Calibration(model)
    calibration.run([(x, y)])
    calibration.remove()
    uses = calibration.recorder.uses[id(model.weight)]
    assert_sums(uses[Use(False, 0, 4)][0], x)
    assert_sums(uses[Use(False, 12, 16)][0], y)


def test_an_input_that_is_always_zero_tells_nothing():
    """Scores would all be 0, and the first two of four would stay whatever they are."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).eval()
    data_free = convert(copy.deepcopy(model))
    convert(model, [torch.zeros(4, 16)], HWPQConfig())
    assert torch.equal(model[0].weight.dequantize(), data_free[0].weight.dequantize())
    assert report(model).layers[0].rows == 4
