"""`convert`, `prepare` and `report`: every way in, what stays compiled and how, what is left alone and why."""

import copy
import gc
import io
import json
import weakref
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchao.quantization import Float8Tensor
from transformers import BatchEncoding

import hwpq_fx
from hwpq_fx import Float8Sparse24Tensor, HWPQConfig, ModelError, convert, prepare, report
from hwpq_fx.calibration import Calibration
from hwpq_fx.curvature import GramMatrix
from hwpq_fx.float8 import rowwise_on_cpu
from hwpq_fx.passes.dynamo import unwrap
from models import CrossAttention, call, encoder, gpt2, llama, mlp, qwen3, tokens, vectors

BATCHES = [torch.randn(length, 64, generator=torch.Generator().manual_seed(length)) for length in (5, 3, 8)]


class Named(nn.Module):
    """Two layers behind keyword arguments."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 64)
        self.eval()

    def forward(self, x, scale=1.0, flag=False):
        return self.second(F.relu(self.first(x * scale)))


def shallow(model):
    """The same transformer with one layer only: what is asked of it here does not need two."""
    inner = getattr(model, "model", None) or model.transformer
    name = "layers" if hasattr(inner, "layers") else "h"
    setattr(inner, name, getattr(inner, name)[:1])
    return model.eval()


def packed(model):
    """The bits of every packed weight."""
    return {
        name: (value.qdata.view(torch.uint8), value.sparse_metadata, value.scale)
        for name, value in unwrap(model).named_parameters()
        if isinstance(value, Float8Sparse24Tensor)
    }


def assert_same_bits(one, other):
    one, other = packed(one), packed(other)
    assert one and one.keys() == other.keys()
    for name in one:
        assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True)), name


def lines(model):
    return {line.name: line for line in report(model).layers}


class Stream(IterableDataset):
    """Its DataLoader has a `__len__` that raises."""

    def __iter__(self):
        yield from (row for batch in BATCHES for row in batch)


class TestCalib:
    SUMS = HWPQConfig(compensation="energy")  # float64, whatever the cuts

    def dense(self):
        torch.manual_seed(1)
        return Named()

    def expected(self):
        return convert(self.dense(), BATCHES, self.SUMS)

    @pytest.mark.parametrize(
        "calib",
        [
            lambda: BATCHES,
            lambda: tuple(BATCHES),
            lambda: (batch for batch in BATCHES),
            lambda: [(batch,) for batch in BATCHES],
            lambda: [[batch, 1.0, False] for batch in BATCHES],
            lambda: [{"x": batch, "flag": True} for batch in BATCHES],
            lambda: [BatchEncoding({"x": batch}) for batch in BATCHES],
            lambda: [UserDict(x=batch) for batch in BATCHES],
            lambda: [(batch / 2, 2.0) for batch in BATCHES],
            lambda: DataLoader(TensorDataset(torch.cat(BATCHES)), batch_size=4),
            lambda: DataLoader(torch.cat(BATCHES), batch_size=16),
            lambda: DataLoader(Stream(), batch_size=7),
            lambda: [batch.view(-1, 1, 64) for batch in BATCHES],
            lambda: [batch.clone().requires_grad_() for batch in BATCHES],
            lambda: lambda model: [model(x=batch) for batch in BATCHES],
        ],
        ids=[
            *("list", "tuple", "generator", "tuples", "lists", "mappings", "BatchEncoding", "UserDict", "numbers"),
            *("TensorDataset", "DataLoader", "IterableDataset", "3-D", "requires_grad", "callable"),
        ],
    )
    def test_every_kind_gives_the_same_weights(self, calib, request, capsys):
        model = self.dense()
        progress = "Set" in request.node.callspec.id or "generator" in request.node.callspec.id
        assert convert(model, calib(), self.SUMS, progress=progress) is model
        for name, (values, mask, scale) in packed(self.expected()).items():
            got = packed(model)[name]
            assert torch.equal(got[0], values) and torch.equal(got[1], mask)
            torch.testing.assert_close(got[2], scale, rtol=1e-6, atol=0)  # sums round by how batches were cut
        assert {line.rows for line in report(model).layers} == {16}
        shown = capsys.readouterr().out
        assert ("observe" in shown) is ("choose and pack" in shown) is progress

    def test_statistics_matter(self):
        other = convert(self.dense(), [batch * torch.linspace(0.1, 10, 64) for batch in BATCHES])
        masks = [packed(model)["first.weight"][1] for model in (other, self.expected())]
        assert not torch.equal(*masks)

    def test_data_free(self):
        model = convert(self.dense(), config=HWPQConfig(saliency="contribution"))
        assert [line.rows for line in report(model).layers] == [0, 0]
        by_magnitude = convert(self.dense(), BATCHES, HWPQConfig(saliency="magnitude", compensation="none"))
        assert torch.equal(packed(model)["first.weight"][1], packed(by_magnitude)["first.weight"][1])
        assert "observe" not in report(model).seconds

    def test_data_free_knows_linear_attention_and_conv1d_by_their_class(self):
        model = convert(gpt2())
        assert sum(line.status != "dense" for line in report(model).layers) == 8
        assert lines(model)["transformer.h.0.attn.c_attn"].shape == (192, 64)
        assert call(model, tokens()).isfinite().all()
        assert len(report(convert(CrossAttention().eval())).converted) == 2

    @pytest.mark.parametrize("how", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
    def test_two_steps_give_the_same_bits(self, how):
        model = how(self.dense())
        before = model(BATCHES[0])
        assert prepare(model, self.SUMS) is model
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                batch = BATCHES[(torch.no_grad, torch.enable_grad, torch.inference_mode).index(mode)]
                y = model(batch)
        assert torch.equal(y, self.dense()(BATCHES[2]))  # observed, not changed
        assert convert(model) is model
        assert_same_bits(model, self.expected())
        assert not torch.equal(model(BATCHES[0]), before)

    def test_two_steps_with_a_config_and_more_batches(self):
        config = HWPQConfig(targets=["first"], selection="exact")
        model = prepare(self.dense(), config)
        config.targets = ["second"]  # too late: it was copied
        model(BATCHES[0])
        convert(model, BATCHES[1:])
        assert lines(model)["second"].reason == "not in targets"
        one = convert(self.dense(), BATCHES, HWPQConfig(targets=["first"], selection="exact"))
        assert_same_bits(model, one)

    def test_prepared_first_and_compiled_later(self):
        model = prepare(self.dense(), self.SUMS)
        for batch in BATCHES:
            model(batch)
        backend = Counting()
        compiled = convert(torch.compile(model, backend=backend))
        assert_same_bits(compiled, self.expected())
        compiled(BATCHES[0])
        assert backend.count(LINEAR24) == 2

    def test_generate_is_observed(self):
        """The padding of the prompt (left, in the second row) does not count, every generated token does."""
        prompt = {"input_ids": torch.randint(2, 256, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
        prompt["attention_mask"][1, :2] = 0
        ask = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        model = convert(torch.compile(shallow(llama()), backend="eager"), lambda one: one.generate(**prompt, **ask))
        assert {line.rows for line in report(model).converted} == {10 + 2 * 3}
        assert lines(model)["lm_head"].rows == 2 * 4


class Counting:
    """A backend that counts how often its graphs run, and what is in them."""

    def __init__(self):
        self.graphs, self.runs = [], 0

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)

        def run(*args):
            self.runs += 1
            return gm.forward(*args)

        return run

    def count(self, op):
        return sum(node.target is op for gm in self.graphs for node in gm.graph.nodes)


LINEAR24 = torch.ops.hwpq_fx.linear24.default


class TestCompiled:
    def test_plain_stays_plain(self):
        model = mlp()
        with torch.no_grad():
            before = set(vars(model))
            convert(model, BATCHES)
            assert model._compiled_call_impl is None and "forward" not in vars(model[0])
            assert set(vars(model)) == before | {"_hwpq_report"}
            # and compiles when its owner compiles it
            backend = Counting()
            compiled = torch.compile(model, backend=backend, fullgraph=True)
            torch.testing.assert_close(compiled(BATCHES[0]), model(BATCHES[0]), rtol=1e-4, atol=1e-5)
            assert backend.runs == 1

    @pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
    def test_the_inner_backend_runs_our_graphs(self, how):
        backend, model = Counting(), Named()  # an nn.Sequential that is compiled in place is passed over by Dynamo
        if how == "torch.compile":
            given = torch.compile(model, backend=backend)
        else:
            model.compile(backend=backend)
            given = model
        with torch.no_grad():
            given(BATCHES[0])
            assert (backend.runs, backend.count(LINEAR24)) == (1, 0)
            assert convert(given, BATCHES) is given
            assert (backend.runs, len(backend.graphs)) == (1, 1), "calibration is not the user's backend's to see"
            eager = copy.deepcopy(model)  # torch drops compiled calls from copies
            assert eager._compiled_call_impl is None
            for batch in BATCHES:
                torch.testing.assert_close(given(batch), eager(batch), rtol=1e-5, atol=1e-6)
        assert backend.runs == 4
        assert backend.count(LINEAR24) >= 2
        assert backend.count(F.linear) == backend.count(torch._C._nn.linear) == 2, "those of before"

    @pytest.mark.parametrize("backend", ["eager", "aot_eager", "hwpq"])
    def test_backends_by_name(self, backend):
        model = torch.compile(mlp(), backend=backend)
        convert(model, BATCHES)
        with torch.no_grad():
            y, expected = model(BATCHES[0]), copy.deepcopy(unwrap(model))(BATCHES[0])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)

    def test_dynamic_and_fullgraph_are_kept(self):
        class Breaks(Named):
            def forward(self, x):
                torch._dynamo.graph_break()
                return super().forward(x)

        backend = Counting()
        model = convert(torch.compile(mlp(), backend=backend, dynamic=True), BATCHES)
        for batch in BATCHES:
            model(batch)
        assert len(backend.graphs) == 1, "one graph for every size"
        torch._dynamo.reset()
        backend = Counting()
        model = convert(torch.compile(mlp(), backend=backend, dynamic=False), BATCHES)
        for batch in BATCHES:
            model(batch)
        assert len(backend.graphs) == 3, "a graph for each size"

        model = convert(torch.compile(Breaks(), backend="eager", fullgraph=True), BATCHES)
        assert len(report(model).converted) == 2, "calibration itself may break"
        with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
            model(BATCHES[0])
        model = convert(torch.compile(Breaks(), backend="eager"), BATCHES)
        assert model(BATCHES[0]).shape == (5, 64)

    @pytest.mark.parametrize(
        "settings",
        [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue_fusion": False, "max_autotune": True}}],
        ids=["mode", "options"],
    )
    def test_inductor_gets_the_mode_and_options(self, settings, monkeypatch):
        seen = []

        def compile_fx(gm, inputs, config_patches=None, **_):
            seen.append(config_patches)
            return gm.forward

        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
        model = torch.compile(mlp(), **settings)
        model(BATCHES[0])
        convert(model, BATCHES)
        model(BATCHES[0])
        before, after = seen
        assert before == after
        assert before["max_autotune"] is True

    def test_inductor_itself(self):
        model = torch.compile(mlp())
        convert(model, BATCHES)
        with torch.no_grad():
            expected = copy.deepcopy(unwrap(model))(BATCHES[0])
            torch.testing.assert_close(model(BATCHES[0]), expected, rtol=1e-2, atol=1e-3)

    @pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
    def test_generate_runs_compiled_and_gives_the_same_tokens(self, how):
        backend, model = Counting(), shallow(llama())
        if how == "torch.compile":
            given = torch.compile(model, backend=backend)
        else:
            model.compile(backend=backend)
            given = model
        # a wide margin between tokens, so that rounding does not decide
        with torch.no_grad():
            model.lm_head.weight.mul_(50)
        convert(given, [tokens()])
        prompt = {"input_ids": torch.randint(2, 256, (1, 6)), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
        ask = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        eager = copy.deepcopy(model)
        assert eager._compiled_call_impl is None
        expected = eager.generate(**prompt, **ask)
        assert backend.runs == 0
        got = given.generate(**prompt, **ask)
        assert got.shape == (1, 9)
        assert torch.equal(got, expected)
        assert backend.runs >= 3, "a run for every token"
        assert backend.count(LINEAR24) >= 7

    @pytest.mark.parametrize("wrap", [False, True])
    def test_parts_that_are_compiled(self, wrap):
        """As regional compilation does."""
        backend, model = Counting(), encoder()
        for number, layer in enumerate(model.layers):
            if wrap:
                model.layers[number] = torch.compile(layer, backend=backend)
            else:
                layer.compile(backend=backend)
        convert(model, [vectors()])
        assert len(report(model).converted) == 8 and backend.runs == 0
        eager = copy.deepcopy(model)
        if wrap:
            eager.layers = nn.ModuleList(unwrap(layer) for layer in eager.layers)
        batch = vectors()
        expected = call(eager, batch)
        assert backend.runs == 0
        torch.testing.assert_close(call(model, batch), expected, rtol=1e-4, atol=1e-4)
        assert backend.runs >= 2 and backend.count(LINEAR24) >= 4


class TestLeftAlone:
    def test_tied_embeddings(self):
        model = shallow(qwen3())
        embedding = model.model.embed_tokens.weight
        before = embedding.clone()
        convert(model, [tokens()], HWPQConfig(ignore=[]))
        line = lines(model)["model.embed_tokens"]
        assert (line.status, line.reason) == ("dense", "shared with lm_head")
        assert model.lm_head.weight is model.model.embed_tokens.weight is embedding
        assert torch.equal(embedding, before)
        assert len(report(model).converted) == 7

    def test_untied_head_is_converted_when_not_ignored(self):
        model = shallow(llama())
        before = model.model.embed_tokens.weight.clone()
        convert(model, [tokens()], HWPQConfig(ignore=[]))
        assert lines(model)["lm_head"].status == "sparse24_fp8"
        assert torch.equal(model.model.embed_tokens.weight, before)
        assert type(model.model.embed_tokens.weight) is nn.Parameter

    @pytest.mark.parametrize("breaks", [False, True])
    @pytest.mark.parametrize("other", ["embedding", "sum", "norm"])
    def test_a_parameter_that_something_else_uses_too(self, breaks, other):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.plain = nn.Linear(64, 64), nn.Linear(64, 64)

            def forward(self, x):
                if other == "embedding":
                    y = F.embedding(torch.arange(len(x)), self.linear.weight)
                else:
                    y = getattr(self.linear.weight, other)()
                if breaks:
                    torch._dynamo.graph_break()
                return self.linear(self.plain(x)) + y

        model = convert(Both().eval(), BATCHES)
        line = lines(model)["linear"]
        assert line.status == "dense"
        assert line.reason.startswith(f"also used by {other}, which is not a product")
        assert type(model.linear.weight) is nn.Parameter
        assert lines(model)["plain"].status == "sparse24_fp8"
        model(BATCHES[0])

    def test_not_reached(self):
        class Optional(nn.Module):
            def __init__(self):
                super().__init__()
                self.always, self.sometimes = nn.Linear(64, 64), nn.Linear(64, 64)

            def forward(self, x, flag=False):
                return self.sometimes(x) if flag else self.always(x)

        model = convert(Optional().eval(), BATCHES)
        assert (lines(model)["sometimes"].status, lines(model)["sometimes"].reason) == ("dense", "not reached")
        torch.testing.assert_close(model(BATCHES[0], True), F.linear(BATCHES[0], *model.sometimes.parameters()))
        model = convert(Optional().eval(), [*BATCHES, (BATCHES[0], True)])
        assert {line.reason for line in report(model).layers} == {""}

    @pytest.mark.parametrize("width", [4, 12, 66])
    def test_channels_that_do_not_fit_the_format(self, width):
        model = nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64)).eval()
        convert(model, BATCHES)
        assert lines(model)["0"].status == "sparse24_fp8"
        assert lines(model)["1"].reason == f"in_features {width} is not a multiple of 8"
        assert lines(model)["1"].shape == (64, width) and lines(model)["1"].rows == 16
        assert model(BATCHES[0]).shape == (5, 64)

    @pytest.mark.filterwarnings("ignore:Initializing zero-element")
    def test_no_weights_at_all(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 0)).eval()
        assert lines(convert(model, BATCHES))["1"].reason == "holds no weights"

    def test_both_sides(self):
        class Sides(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.randn(64, 64))
                self.plain = nn.Linear(64, 64)

            def forward(self, x):
                return F.linear(x @ self.w, self.w) + self.plain(x)

        assert lines(convert(Sides().eval(), BATCHES))["w"].reason == "multiplied along both of its sides"

    def test_ignored_and_not_in_targets_come_before_other_reasons(self):
        model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 16), nn.Linear(16, 16)).eval()
        convert(model, [torch.randn(4, 12)], HWPQConfig(targets=["0", "1", "4"], ignore=["1"]))
        reasons = {name: line.reason for name, line in lines(model).items()}
        fits = "in_features 12 is not a multiple of 8"
        assert reasons == {"0": fits, "1": "ignored", "2": "not in targets", "3": "not in targets", "4": ""}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["linear", "matmul", "mm", "addmm", "linear of t"])
def test_bare_parameters(how, dtype):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn((32, 64) if how == "linear" else (64, 32)))
            self.b = nn.Parameter(torch.randn(32))

        def forward(self, x):
            if how == "linear":
                return F.linear(x, self.w, self.b)
            if how == "linear of t":
                return F.linear(x, self.w.t(), self.b)
            if how == "addmm":
                return torch.addmm(self.b, x, self.w)
            return (x @ self.w if how == "matmul" else torch.mm(x, self.w)) + self.b

    model = Functional().eval().to(dtype)
    x = BATCHES[2].to(dtype)
    dense = model.w.detach().clone()
    convert(model, [x], HWPQConfig(activation="none"))
    assert list(lines(model)) == ["w"] and lines(model)["w"].shape == (32, 64)
    assert isinstance(model.w, Float8Sparse24Tensor)
    assert model.w.shape == dense.shape and model.w.dtype is dtype
    weight = model.w.dequantize(torch.float64)
    groups = (weight if how == "linear" else weight.t()).reshape(32, 16, 4)
    assert ((groups != 0).sum(-1) == 2).all()
    wide = weight.t() if how == "linear" else weight
    expected = x.double() @ wide + model.b.double()
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_bfloat16_models_stay_bfloat16():
    model = mlp().bfloat16()
    dense = copy.deepcopy(model)
    x = BATCHES[2].bfloat16()
    convert(model, [x])
    assert model(x).dtype is model[0].weight.dtype is torch.bfloat16
    error = (model(x) - dense(x)).float().norm() / dense(x).float().norm()
    assert 0.01 < error < 0.6
    assert [line.dense_bytes for line in report(model).layers] == [128 * 64 * 2, 64 * 128 * 2]


class TestMemory:
    def alive(self):
        for _ in range(3):  # what a finalizer lets go of is garbage of the next round
            gc.collect()
        return [one for one in gc.get_objects() if type(one) in (Calibration, GramMatrix)]

    @pytest.mark.parametrize("sequential", [False, True])
    @pytest.mark.parametrize("backend", [None, "eager"])
    def test_nothing_of_calibration_stays(self, backend, sequential):
        before = self.alive()  # of other tests, which pytest may hold on to
        model = llama()
        dense = [weakref.ref(parameter) for name, parameter in model.named_parameters() if "proj" in name]
        module = weakref.ref(model)
        model = torch.compile(model, backend=backend) if backend else model
        convert(model, [tokens(), tokens()], HWPQConfig(sequential=sequential))
        model(**tokens())
        after = self.alive()
        assert len(dense) == 14 and not any(one() is not None for one in dense)
        assert {id(one) for one in after} <= {id(one) for one in before}
        del model
        torch._dynamo.reset()  # of what was compiled since
        gc.collect()
        assert module() is None


@pytest.mark.parametrize("backend", ["inductor", "hwpq"])
def test_a_model_that_ran_compiled_can_be_moved(backend):
    batch = tokens()
    # of a second model of its class, torch leaves more to the garbage collector
    for _ in range(2):
        model = shallow(llama())
        if backend == "hwpq":
            model = torch.compile(convert(model, [batch]), backend=backend)
        else:
            model = convert(torch.compile(model), [batch])
        with torch.no_grad():
            before = model(**batch).logits
            for dtype in (torch.bfloat16, torch.float32):
                after = model.to(dtype)(**batch).logits
                assert after.dtype is dtype and after.float().isfinite().all()
            assert (after - before).norm() < 0.1 * before.norm()
        model.to("meta")


class TestUnstructured:
    @pytest.mark.parametrize("share", [0.5, 0.7])
    def test_share_and_kind(self, share):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
        dense = copy.deepcopy(model)
        x = torch.randn(16, 256)
        convert(model, [x], HWPQConfig(sparsity=share, saliency="contribution", compensation="none"))
        for number, line in zip((0, 2), report(model).layers, strict=True):
            weight = model[number].weight
            assert isinstance(weight, Float8Tensor) and line.status == "fp8"
            zeros = (weight.dequantize() == 0).float().mean().item()
            assert abs(line.pruned - share) < 0.005 and abs(zeros - share) < 0.01
            assert line.dense_bytes == 256 * 256 * 4
            assert line.packed_bytes == 256 * 256 + 256 * 4 and line.layout_bytes == 0
            # of weights that are spread evenly, the smallest carry this much
            assert line.error == pytest.approx(share**1.5, rel=0.15)
        with torch.no_grad():
            error = (model(x) - dense(x)).norm() / dense(x).norm()
        assert share**1.5 < error < 2 * share**1.5
        assert f"fp8 -{share:.0%}" in str(report(model))

    @pytest.mark.parametrize("activation", ["dynamic", "none"])
    def test_activation(self, activation):
        model = convert(mlp(), BATCHES, HWPQConfig(sparsity=0.5, activation=activation))
        dynamic = activation == "dynamic" and rowwise_on_cpu()
        assert (model[0].weight.act_quant_kwargs is not None) is dynamic
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(BATCHES[0]), model(BATCHES[0]), rtol=1e-2, atol=1e-2)

    def test_where_the_product_of_fp8_inputs_is_missing_they_stay_as_they_are(self, monkeypatch):
        """On the CPU before torch 2.12 it fails inside torch, after the conversion."""
        assert rowwise_on_cpu() is (torch.__version__ >= "2.12")
        monkeypatch.setattr(hwpq_fx.float8, "rowwise_on_cpu", lambda: False)
        model = convert(mlp(), BATCHES, HWPQConfig(sparsity=0.5))
        plain = [layer.weight.dequantize() if hasattr(layer, "weight") else None for layer in model]
        with torch.no_grad():
            y = F.linear(F.gelu(F.linear(BATCHES[0], plain[0], model[0].bias)), plain[2], model[2].bias)
            torch.testing.assert_close(model(BATCHES[0]), y)

    def test_what_torchao_does_not_serve_stays_dense(self):
        model = convert(encoder(), [vectors()], HWPQConfig(sparsity=0.5))
        found = lines(model)
        assert found["layers.0.linear1"].status == "fp8"
        assert found["layers.0.self_attn.in_proj_weight"].reason.startswith("held by MultiheadAttention")
        assert found["layers.0.self_attn.out_proj"].reason.startswith("held by NonDynamicallyQuantizableLinear")
        assert call(model, vectors()).isfinite().all()
        with pytest.raises(ModelError, match=r"c_attn: held by Conv1D: torchao's Float8Tensor is for nn.Linear"):
            convert(shallow(gpt2()), [tokens()], HWPQConfig(sparsity=0.5))

    def test_sizes_that_fp8_products_do_not_take(self):
        model = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 64)).eval()
        with pytest.raises(ModelError, match="0: 24x64: FP8 products want multiples of 16; 1: 64x24"):
            convert(model, BATCHES, HWPQConfig(sparsity=0.5))
        convert(model, BATCHES, HWPQConfig(sparsity=0.5, activation="none"))
        assert model(BATCHES[0]).shape == (5, 64)


class TestOptionsMatter:
    """Each option changes what is kept or how it is scaled, and nothing that it should not."""

    SKEWED = [BATCHES[2] * torch.logspace(-1, 1, 64)]  # noqa: RUF012

    def converted(self, **options):
        torch.manual_seed(3)
        return convert(nn.Sequential(nn.Linear(64, 64)).eval(), self.SKEWED, HWPQConfig(**options))

    def parts(self, **options):
        return packed(self.converted(**options))["0.weight"]

    def test_saliency(self):
        masks = [self.parts(saliency=name)[1] for name in ("contribution", "relative", "magnitude")]
        assert not any(torch.equal(a, b) for a, b in [masks[:2], masks[1:], masks[::2]])
        rank_one = self.converted(saliency="rank_one")
        assert torch.equal(packed(rank_one)["0.weight"][1], masks[2]) is False, "close to magnitude, but not the same"

    def test_selection(self):
        exact, ewma, streaming = (self.converted(selection=name) for name in ("exact", "ewma", "ewma_streaming"))
        assert_same_bits(exact, ewma)
        assert not torch.equal(packed(streaming)["0.weight"][1], packed(exact)["0.weight"][1])
        settled = [report(model).layers[0].settled for model in (exact, ewma, streaming)]
        assert settled[0] == 0 and 0.1 < settled[1] < 0.6 and 0.1 < settled[2] < 0.6
        errors = [report(model).layers[0].error for model in (exact, streaming)]
        assert errors[0] < errors[1]

    @pytest.mark.parametrize("option", [{"mean_rate": 0.5}, {"dev_rate": 0.9}, {"lam": 1.0}])
    def test_ewma_constants(self, option):
        streaming = [self.parts(selection="ewma_streaming", **more)[1] for more in ({}, option)]
        assert not torch.equal(*streaming)
        settled = [report(self.converted(**more)).layers[0].settled for more in ({}, option)]
        assert settled[0] != settled[1]

    def test_compensation(self):
        (values, mask, scale), (same_values, same_mask, plain) = (
            self.parts(compensation=name) for name in ("energy", "none")
        )
        assert torch.equal(mask, same_mask) and not torch.equal(values, same_values)
        # inputs without a mean: a factor for every row is all
        self.SKEWED = [torch.cat([x, -x]) for x in self.SKEWED]
        values, _, scale = self.parts(compensation="energy")
        assert torch.equal(values, same_values)
        assert (scale > plain).all() and (scale < 1.5 * plain).all()

    def test_activation(self):
        dynamic, plain = (self.converted(activation=name) for name in ("dynamic", "none"))
        assert_same_bits(dynamic, plain)
        (x,) = self.SKEWED
        with torch.no_grad():
            expected = F.linear(x, plain[0].weight.dequantize(), plain[0].bias)
            torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
            error = (dynamic(x) - expected).norm() / expected.norm()
        assert 1e-3 < error < 0.1

    def test_error_in_the_report(self):
        """||X (W - W')|| / ||X W|| with uncorrelated channels: checked with inputs that are exactly so."""
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 64, bias=False)).eval()
        x = torch.diag(torch.logspace(-1, 1, 64))
        dense = model[0].weight.detach().clone()
        convert(model, [x])
        lost = x @ (dense - model[0].weight.dequantize()).t()
        assert report(model).layers[0].error == pytest.approx((lost.norm() / (x @ dense.t()).norm()).item(), rel=1e-4)

    def test_cross_attention_weighs_queries_and_keys_by_their_own_inputs(self):
        torch.manual_seed(5)
        model = CrossAttention().eval()
        dense = copy.deepcopy(model)
        x = vectors() * torch.logspace(-1, 1, 64)
        config = HWPQConfig(saliency="contribution", compensation="energy")  # every row by itself
        convert(model, [x], config)
        alone = {}
        for name, seen in (("q", x), ("kv", 2 * x.flip(1) + 1)):
            layer = nn.Sequential(nn.Linear(64, 192, bias=False)).eval()
            layer[0].weight.data.copy_(dense.attention.in_proj_weight)
            alone[name] = convert(layer, [seen], config)[0].weight
        both = model.attention.in_proj_weight
        assert torch.equal(both.sparse_metadata[:64], alone["q"].sparse_metadata[:64])
        assert torch.equal(both.sparse_metadata[64:], alone["kv"].sparse_metadata[64:])
        assert not torch.equal(alone["q"].sparse_metadata[64:], alone["kv"].sparse_metadata[64:])


class TestReport:
    def test_totals_and_dict(self):
        phases = {"observe", "run in order", "choose and pack", "lay out"}
        model = convert(shallow(llama()), [tokens()])
        made = report(model)
        assert made is report(torch.compile(model, backend="eager"))
        assert [line.name for line in made.layers if line.status == "dense"] == ["lm_head"]
        found = json.loads(json.dumps(made.to_dict()))
        assert len(found["layers"]) == 8 and set(found["seconds"]) == phases
        assert found["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
        assert found["layers"][0]["shape"] == [64, 64]
        weights = [value for value in model.parameters() if isinstance(value, Float8Sparse24Tensor)]
        assert made.total("dense_bytes") == sum(4 * value.numel() for value in weights)
        assert made.total("packed_bytes") == sum(value.packed_nbytes() for value in weights)
        assert made.total("layout_bytes") == sum(value.layout_nbytes() for value in weights) > 0
        assert made.total("packed_bytes") == sum(value.numel() * 5 // 8 + value.shape[0] * 4 for value in weights)
        for line in made.converted:
            assert line.pruned == 0.5 and 0 < line.settled < 1 and 0.01 < line.error < 0.6 and line.rows == 18
        assert all(seconds >= 0 for seconds in made.seconds.values())

    def test_text(self, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        model = nn.Sequential(nn.Linear(64, 12), nn.Linear(12, 64)).eval()
        made = report(convert(model, BATCHES))
        made.layers[1].reason = "kept as [in, out] for [/some] reason"
        text = str(made)
        assert "1 of 2 layers converted" in text
        for part in ("12x64", "2:4 fp8", "16", "dense: kept as [in, out] for [/some] reason", "observe"):
            assert part in text, part
        assert "\x1b" not in text


class TestAfterwards:
    """A converted model is a model like any other."""

    @pytest.fixture
    def model(self):
        return convert(Named(), BATCHES)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_deepcopy(self, model, compiled):
        given = torch.compile(model, backend="eager") if compiled else model
        twin = copy.deepcopy(given)
        assert_same_bits(twin, model)
        x = BATCHES[0]
        assert torch.equal(twin(x), model(x))
        assert report(twin).to_dict() == report(model).to_dict()
        with torch.no_grad():
            unwrap(twin).first.weight.scale.mul_(2)
        assert torch.equal(packed(twin)["first.weight"][2], 2 * packed(model)["first.weight"][2])

    def test_state_dict_into_another_converted_model(self, model):
        torch.manual_seed(9)
        other = convert(Named(), BATCHES[:1])
        assert not torch.equal(other(BATCHES[0]), model(BATCHES[0]))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert_same_bits(other, model)
        assert torch.equal(other(BATCHES[0]), model(BATCHES[0]))

    @pytest.mark.parametrize("compiled", [False, True])
    def test_every_grad_mode(self, model, compiled):
        given = torch.compile(model, backend="aot_eager") if compiled else model
        x = BATCHES[0]
        with torch.no_grad():
            expected = given(x)
        with torch.inference_mode():
            torch.testing.assert_close(given(x), expected)
        x = x.clone().requires_grad_()
        y = given(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().max() > 0
        assert model.first.bias.grad is not None and not model.first.weight.requires_grad

    def test_converted_inside_inference_mode(self):
        with torch.inference_mode():
            model = convert(Named(), BATCHES)
        x = BATCHES[0].clone().requires_grad_()
        model(x).sum().backward()
        assert x.grad.abs().max() > 0
        assert torch.equal(copy.deepcopy(model)(x), model(x))

    def test_a_bare_linear_layer(self):
        model = convert(nn.Linear(64, 64).eval(), BATCHES)
        assert list(lines(model)) == ["weight"]
        assert model(BATCHES[0]).shape == (5, 64)

    def test_hooks_of_the_user_stay_and_run_once(self):
        model, seen = Named(), []
        model.register_forward_hook(lambda *_: seen.append("model"))
        model.first.register_forward_pre_hook(lambda *_: seen.append("first"))
        convert(model, BATCHES[:2])
        assert sorted(seen) == ["first", "first", "model", "model"]
        model(BATCHES[0])
        assert sorted(seen) == ["first"] * 3 + ["model"] * 3
        assert len(model._forward_hooks) == len(model.first._forward_pre_hooks) == 1

    def test_buffers_biases_and_attributes_stay(self):
        model = Named()
        model.register_buffer("table", torch.arange(3.0))
        model.note = object()
        kept = {"note": model.note, "bias": model.first.bias, "table": model.table}
        convert(model, BATCHES)
        assert model.note is kept["note"] and model.first.bias is kept["bias"] and model.table is kept["table"]
        assert model.first.bias.requires_grad
        assert list(model.state_dict()) == ["table", "first.weight", "first.bias", "second.weight", "second.bias"]


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_parts_compiled_one_by_one_run_our_passes(how):
    seen = []

    def spy(gm, example_inputs):
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Sequential(nn.Linear(64, 64))).eval()
    if how == "in place":
        model[2].compile(backend=spy)
    else:
        model[2] = torch.compile(model[2], backend=spy)
    x = torch.randn(4, 64)
    convert(model, [x])
    assert len(report(model).converted) == 2
    seen.clear()
    with torch.no_grad():
        model(x)
    assert seen.count("hwpq_fx.linear24.default") == 1
