"""What accuracy.py and minilm.py measure, and that their files hold it."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import hwpq_fx
from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.minilm import MiniLM, embed, sentences
from hwpq_fx.reconstruction import reconstruction_loss
from models import VOCABULARY, llama

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a script as `python benchmarks/NAME.py` would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def methods(load):
    return load("methods")


def layer(rows=32, columns=64):
    x = torch.randn(256, 24) @ torch.randn(24, columns) + 0.1 * torch.randn(256, columns)
    return torch.randn(rows, columns), x


def seen(methods, x):
    return methods.Inputs(x.T @ x, x.sum(0, dtype=torch.float64), len(x))


def test_every_method_keeps_two_of_four_and_the_better_ones_lose_less(methods):
    weight, x = layer()
    inputs, losses = seen(methods, x), {}
    for name, method in methods.METHODS.items():
        made = method(weight, inputs)
        assert made.mask.dtype == torch.bool and (made.mask.view(32, 16, 4).sum(-1) == 2).all(), name
        new = made.weight * made.mask * (1 if made.factor is None else made.factor[:, None])
        losses[name] = float(reconstruction_loss(weight, new, inputs.gram).sum())
    assert losses["contribution"] == losses["Wanda"]
    assert losses["ALPS"] < losses["SparseGPT"] < losses["Wanda"] < losses["magnitude"]
    assert losses["ours, cg"] < losses["ours, cg without choosing again"] < losses["Wanda"]


def relative(made, expected):
    return float((made - expected).norm() / expected.norm())


@torch.no_grad()
def test_pruned_computes_what_the_packed_weight_does(methods):
    """Up to the bfloat16 that a CPU's products of FP8 may come in, which is far below FP8."""
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(40, 64)
    weight, bias, inputs = model[0].weight.detach().clone(), model[0].bias, {"0": seen(methods, torch.eye(64))}
    made, seconds = methods.pruned(model, inputs, methods.METHODS["ours, energy"])
    assert seconds > 0 and torch.equal(model[0].weight, weight)
    packed = Float8Sparse24Tensor.from_hp(*methods.energy(weight, inputs["0"])[:2], "dynamic")
    assert relative(made(x), F.linear(x, packed, bias)) > 0.05, "the factor is lost"
    new = methods.energy(weight, inputs["0"])
    packed = Float8Sparse24Tensor.from_hp(new.weight, new.mask, "dynamic", new.factor)
    assert relative(made(x), F.linear(x, packed, bias)) < 0.004
    assert relative(made(x), F.linear(x, packed.dequantize(), bias)) > 0.01, "activations are not rounded"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@torch.no_grad()
def test_every_method_on_a_gpu(methods):
    """As far from the dense layer as on the CPU: masks may differ by what rounding decides."""
    weight, rows = layer(64, 128)
    model, x = nn.Sequential(nn.Linear(128, 64)), torch.randn(256, 128)
    model[0].weight.data = weight
    for method in methods.METHODS.values():
        far = []
        for device in ("cpu", "cuda"):
            made, seconds = methods.pruned(model.to(device), {"0": seen(methods, rows.to(device))}, method)
            assert seconds > 0
            far.append(relative(made(x.to(device)), model(x.to(device))))
        assert far[1] == pytest.approx(far[0], rel=0.05)


def test_pruned_times_the_method_on_every_layer(methods):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)), nn.Linear(32, 64))
    inputs = {name: seen(methods, torch.eye(32)) for name in methods.linears(model)}
    shapes = []

    def method(weight, inputs):
        shapes.append(tuple(weight.shape))
        return methods.wanda(weight, inputs)

    methods.pruned(model, inputs, method)
    assert shapes == [(32, 32), (64, 32), *[(32, 32)] * 3, (64, 32)]


def test_the_head_stays(methods):
    model = llama()
    names = methods.linears(model)
    assert len(names) == 14 and "lm_head" not in names
    made = methods.dense_fp8(model)
    assert torch.equal(made.lm_head.weight, model.lm_head.weight)
    batch = torch.randint(VOCABULARY, (2, 16))
    with torch.no_grad():
        logits, rounded = model(batch).logits, made(batch).logits
    assert 1e-3 < relative(rounded, logits) < 0.1


def test_padding_does_not_count(methods):
    minilm, texts = MiniLM(), sentences("calibration")[:3]
    alone = [dict(minilm.tokenizer(text, return_tensors="pt")) for text in texts]
    expected, made = methods.inputs_of(minilm.model, alone), methods.inputs_of(minilm.model, minilm.batches(texts))
    assert len(made) == 37
    for name, (gram, sums, rows) in made.items():
        wanted, size = expected[name], float(expected[name].gram.diagonal().mean())
        assert gram.dtype == torch.float32 and rows == wanted.rows
        torch.testing.assert_close(gram, wanted.gram, rtol=1e-3, atol=1e-3 * size)
        torch.testing.assert_close(sums, wanted.sums, rtol=1e-3, atol=1e-3 * (size * rows) ** 0.5)


@pytest.fixture
def tiny(load, monkeypatch):
    """accuracy.py with a model of random weights and one draw of calibration sequences."""
    script, tokens = load("accuracy"), torch.randint(VOCABULARY, (40, 16))
    small = load("small_llama").SmallLlama(llama(), tokens, tokens[:8])
    monkeypatch.setattr(script, "small_llama", lambda threads, device: small)
    monkeypatch.setattr(script, "SEEDS", (0,))
    monkeypatch.setattr(script, "ROWS", 32)
    monkeypatch.setattr(script, "TURNS", 1)
    return script


def run(script, *arguments):
    done = CliRunner().invoke(script.main, ["--threads", "1", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_accuracy_writes_every_method_and_plan(tiny, methods, tmp_path):
    out = tmp_path / "accuracy.json"
    run(tiny, "--out", out)
    content = json.loads(out.read_text())
    rows = content["methods"]
    assert {*methods.METHODS, "plan, 50% of the multiplications 2:4", "unstructured 50%, cg"} < rows.keys()
    for name, row in rows.items():
        assert row["gap"] == row["perplexity"]["mean"] - content["dense"]
        assert ("seconds" in row) == (name in (*methods.METHODS, tiny.IN_ORDER)) and row["KL"]["mean"] > 0
    assert rows["plan, 100% of the multiplications 2:4"]["KL"] == pytest.approx(rows[tiny.IN_ORDER]["KL"], rel=0.05)
    assert content["machine"]["threads"] == 1 and content["model"]["calibration tokens"] == 32 * 16
    assert out.with_suffix(".svg").exists() == (find_spec("matplotlib") is not None)


def test_times_alone_leave_the_rest(tiny, tmp_path):
    out = tmp_path / "accuracy.json"
    row = {"gap": 1.0, "seconds": {"median": -1.0}}
    names = (*tiny.METHODS, tiny.IN_ORDER)
    out.write_text(json.dumps({"dense": 5.0, "methods": dict.fromkeys((*names, "plan"), row)}))
    run(tiny, "--out", out, "--times")
    content = json.loads(out.read_text())
    assert content["dense"] == 5.0 and content["methods"]["plan"] == row
    for name in names:
        timed = content["methods"][name]
        ratio = timed["SparseGPT's seconds over these"]["median"]
        assert timed["gap"] == 1.0 and timed["seconds"]["median"] > 0
        assert ratio == content["methods"]["SparseGPT"]["seconds"]["median"] / timed["seconds"]["median"]


def test_accuracy_of_some_methods_writes_nothing(tiny, tmp_path):
    out = tmp_path / "accuracy.json"
    lines = run(tiny, "--out", out, "--method", "Wanda", "--method", "ours, cg").splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["seed 0  Wanda", "seed 0  ours, cg"]
    assert not out.exists()


def test_minilm_is_what_convert_makes(load, methods, monkeypatch, tmp_path):
    """By the library's own call, on some of the sentences: as far from the dense model."""
    script, out = load("minilm"), tmp_path / "minilm.json"
    some = {name: sentences(name)[:32] for name in ("calibration", "heldout")}
    monkeypatch.setattr(script, "sentences", some.get)
    monkeypatch.setattr(script, "METHODS", {name: methods.METHODS[name] for name in ("Wanda", "ours, energy")})
    monkeypatch.setattr(script, "ROUNDS", 1)
    run(script, "--out", out)
    content = json.loads(out.read_text())
    minilm, config = MiniLM(), hwpq_fx.HWPQConfig(compensation="energy")
    heldout = minilm.batches(some["heldout"])
    expected = embed(minilm.model, heldout)
    model = hwpq_fx.convert(minilm.model, minilm.batches(some["calibration"]), config)
    cosine = (embed(model, heldout) * expected).sum(1)
    ours = content["methods"]["ours, energy"]["agreement"]
    assert ours["mean"] == pytest.approx(float(cosine.mean()), abs=2e-3)
    assert ours["lowest"] == pytest.approx(float(cosine.min()), abs=2e-2)
    assert content["methods"]["Wanda"]["agreement"]["mean"] < ours["mean"] < content["dense FP8"]["agreement"]["mean"]


@torch.no_grad()
@pytest.mark.parametrize("compensation", ["cg", "energy"])
def test_ours_is_what_convert_makes_of_a_layer(methods, compensation):
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(256, 24) @ torch.randn(24, 64)
    made, _ = methods.pruned(model, {"0": seen(methods, x)}, methods.METHODS[f"ours, {compensation}"])
    converted = hwpq_fx.convert(model, [x], hwpq_fx.HWPQConfig(compensation=compensation))
    assert relative(made(x), converted(x)) < 0.01


def test_the_committed_file(methods):
    content = json.loads((BENCHMARKS / "results" / "minilm.json").read_text())
    assert content["methods"].keys() == {*methods.METHODS, "ours, cg, in order"}
    means = {name: row["agreement"]["mean"] for name, row in content["methods"].items()}
    assert means["magnitude"] < means["Wanda"] < means["ours, energy"] < means["SparseGPT"] < means["ours, cg"]
    assert all(-1 <= row["agreement"]["lowest"] < means[name] < 1 for name, row in content["methods"].items())
    assert all(row["seconds"] > 0 for row in content["methods"].values())
