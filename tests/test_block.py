"""benchmarks/block.py at a sixteenth of its size."""

import importlib
import json
import math
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from hwpq_fx.bench.shapes import SIBLINGS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LAYERS = [name for group in SIBLINGS for name in group]
SMALL = ["--scale", "64", "--rows", "1024", "--runs", "2"]


@pytest.fixture
def block(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("block")


def run(block, tmp_path, *arguments):
    out = tmp_path / "results" / "block.json"
    done = CliRunner().invoke(block.main, [*SMALL, "--out", str(out), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())


def check(content, methods, kinds):
    assert (content["rows"], content["scale"], content["runs"]) == (1024, 64, 2)
    gathering = content["seconds to gather"]
    assert list(gathering) == [" + ".join(group) for group in SIBLINGS] + ["total"]
    for kind in kinds:
        assert list(gathering["total"]) == kinds
        *each, total = (one[kind] for one in gathering.values())
        assert min(each) > 0 and total == pytest.approx(sum(each))
    made = content["choose, compensate, pack"]
    assert list(made) == methods
    for one in made.values():
        assert list(one["layers"]) == LAYERS
        assert all(layer["seconds"] > 0 and 0 < layer["error"] < 1 for layer in one["layers"].values())
        assert one["seconds"] >= max(layer["seconds"] for layer in one["layers"].values())
    for name in LAYERS:
        cg, energy = (made[method]["layers"][name]["error"] for method in ("cg", "energy"))
        assert cg < 0.8 * energy
    return made


def test_on_the_cpu(block, tmp_path):
    made = check(run(block, tmp_path, "--device", "cpu"), ["cg", "energy", "SparseGPT"], ["sums of squares", "X^T X"])
    assert made["SparseGPT"]["SparseGPT / this"] == 1 and made["cg"]["SparseGPT / this"] > 0
    assert all(made["SparseGPT"]["layers"][name]["error"] < made["energy"]["layers"][name]["error"] for name in LAYERS)
    made = run(block, tmp_path, "--device", "cpu", "--without-sparsegpt")["choose, compensate, pack"]
    assert list(made) == ["cg", "energy"] and "SparseGPT / this" not in made["cg"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(block, tmp_path):
    content = run(block, tmp_path, "--device", "cuda")
    made = check(content, ["cg", "energy", "SparseGPT"], ["sums of squares", "X^T X"])
    assert all(0 < one["held bytes"] <= one["peak bytes"] for one in made.values())
    assert content["machine"]["device"]


def test_what_a_gpu_is_asked_besides(block, tmp_path, monkeypatch):
    """Without one: the calls that only a GPU answers are stood in for."""

    class OnGpu(block.Clock):
        def __init__(self, device):
            self.device, self.on_gpu = device, True

    monkeypatch.setattr(block, "Clock", OnGpu)
    monkeypatch.setattr(block, "describe_machine", lambda: {"device": "stand-in"})
    idle = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: idle.append(device))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    content = run(block, tmp_path, "--device", "cpu", "--without-sparsegpt")
    made = check(content, ["cg", "energy"], ["sums of squares", "X^T X"])
    assert made["cg"]["held bytes"] == 5 and made["cg"]["peak bytes"] == 7
    assert content["machine"] == {"device": "stand-in"} and idle


def test_inputs_share_directions_and_gathering_sums_all_rows(block):
    x = block.random_input(9000, 64, torch.device("cpu"))
    assert x.dtype == torch.bfloat16 and x.isfinite().all()
    size = x.float().square().mean(0).sqrt()
    assert size.max() > 2 * size.min()
    alike = torch.corrcoef(x.float().T).fill_diagonal_(0).abs()
    assert alike.max() > 0.3
    found, _ = block.gather({"x": x}, 1, block.Clock(torch.device("cpu")))
    torch.testing.assert_close(found["x"].gram.matrix, x.float().T @ x.float(), rtol=1e-4, atol=1.0)
    torch.testing.assert_close(found["x"].sums.sum_sq, x.float().square().sum(0), rtol=1e-4, atol=0)
    assert found["x"].sums.rows == 9000


def test_no_time_of_a_method_that_is_wrong(block, tmp_path, monkeypatch):
    wrong = [torch.zeros, lambda *shape: torch.full(shape, math.nan)]
    found, _ = block.gather(
        {" + ".join(group): block.random_input(64, block.BLOCK[group[0]][1] // 64, torch.device("cpu"))
         for group in SIBLINGS}, 1, block.Clock(torch.device("cpu")),
    )  # fmt: skip
    layer = block.layers_of(64, found)[0]

    class Packed:
        def __init__(self, make):
            self.make = make

        def dequantize(self, dtype):
            return self.make(*layer.weight.shape)

    for make in wrong:
        with pytest.raises((click.ClickException, ValueError)):
            block.error_of(layer, Packed(make))


def test_sizes_that_the_format_cannot_hold_are_refused(block):
    done = CliRunner().invoke(block.main, ["--scale", "3"])
    assert done.exit_code == 2 and "multiples" in done.output
