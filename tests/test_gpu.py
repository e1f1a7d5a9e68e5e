"""What needs a GPU: `pytest -m gpu`. No GPU has run it yet."""

import math
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

import hwpq_fx
import rehearsal
from clocks import fill, is_one
from hwpq_fx.bench import contenders, linears, models
from hwpq_fx.bench.contenders import fp8_of
from hwpq_fx.bench.measure import BOUNDS, FP8_BOUND, CudaClock, errors_of, measured
from hwpq_fx.bench.tune import run_tune
from hwpq_fx.kernels import Float8Sparse24Tensor, paths, quantize_rows
from hwpq_fx.kernels.paths import EITHER, PATHS, chosen, target_of
from hwpq_fx.kernels.prune_pack24 import prune_pack24
from hwpq_fx.kernels.select24 import select24
from hwpq_fx.kernels.table import Table, load_table
from hwpq_fx.passes import HwpqBackend
from models import MODELS, call, dequantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
ROOT = Path(__file__).parents[1]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
N, K = (128, 512) if rehearsal.ON else (512, 1024)
SHAPES = ((N, K), (32, 1024) if rehearsal.ON else (256, 2048), (136, 272))
# float32 too is multiplied on tensor cores, as tf32
ALLOWED = BOUNDS | {torch.float32: 3e-3}


def on_gpu(batch):
    if isinstance(batch, dict):
        return {name: value.to(DEVICE) for name, value in batch.items()}
    return batch.to(DEVICE)


def target():
    return target_of(torch.device(DEVICE))


def packed_weight(n, k, dtype=torch.bfloat16, activation="dynamic"):
    weight = torch.randn(n, k, dtype=dtype, device=DEVICE)
    return Float8Sparse24Tensor.from_hp(weight, activation=activation)


def with_layout(packed, path):
    """The weight with what `path` reads."""
    if path.make_layout is None:
        return packed
    layout = path.make_layout(packed.qdata, packed.sparse_metadata)
    return packed.replaced(prepacked=layout, prepacked_for=path.name)


def serving(name, dtype, n, k):
    """The path, or skip."""
    path = PATHS[name]
    if why := path.why_not(target().arch, dtype, n, k):
        pytest.skip(why)
    return path


@pytest.fixture
def only(monkeypatch):
    """Make the dispatcher take one path wherever it serves."""

    def take(name):
        monkeypatch.setattr(paths, "table_of", lambda device: Table({(1, 1): {1: {name: 1.0}}}))

    return take


def assert_right(y, x, packed, fp8, bias=None):
    y, x = y.flatten(0, -2).double(), x.flatten(0, -2)
    y = y if bias is None else y - bias.double()
    bound = FP8_BOUND if fp8 else ALLOWED[x.dtype]
    assert errors_of(y, fp8_of(x) if fp8 else x, packed.dequantize(torch.float32)).why_refused(bound) == ""


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_path_against_float64(name, dtype, n, k):
    path, packed = serving(name, dtype, n, k), packed_weight(n, k, dtype)
    weight = with_layout(packed, path)
    parts = (weight.qdata, weight.sparse_metadata, weight.scale)
    for m in (1, 9, 65) if rehearsal.ON else (1, 2, 3, 8, 9, 16, 17, 64, 65, 200, 1000):
        for bias in (None, torch.randn(n, dtype=dtype, device=DEVICE)):
            x = torch.randn(m, k, dtype=dtype, device=DEVICE)
            values, x_scale = quantize_rows(x) if path.fp8 else (x, None)
            # freed at once: the output's memory may then be this, and what is not written shows
            torch.full((m, n), math.nan, dtype=dtype, device=DEVICE)
            y = path.product(values, x_scale, *parts, bias, weight.prepacked, dtype)
            assert y.shape == (m, n) and y.dtype is dtype
            assert_right(y, x, packed, path.fp8, bias)


@pytest.mark.parametrize("name", PATHS)
def test_no_rows_at_all(name):
    path, packed = serving(name, torch.bfloat16, N, K), packed_weight(N, K)
    weight = with_layout(packed, path)
    x = torch.empty(0, K, dtype=torch.bfloat16, device=DEVICE)
    values, x_scale = quantize_rows(x) if path.fp8 else (x, None)
    parts = (weight.qdata, weight.sparse_metadata, weight.scale)
    y = path.product(values, x_scale, *parts, None, weight.prepacked, torch.bfloat16)
    assert y.shape == (0, N)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 1, 40)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_linear_of_any_rank_by_every_path(only, name, lead, compiled):
    path = serving(name, torch.bfloat16, N, K)
    only(name)
    weight = with_layout(packed_weight(N, K), path)
    bias = torch.randn(N, dtype=torch.bfloat16, device=DEVICE)
    # rows with a stride, as a slice of a fused projection has them
    x = torch.randn(*lead, 2 * K, dtype=torch.bfloat16, device=DEVICE)[..., K:]
    linear = torch.compile(F.linear, backend=HwpqBackend("inductor")) if compiled else F.linear
    assert chosen(target(), x, N, x.dtype, EITHER, weight.prepacked_for).name == name
    y = linear(x, weight, bias)
    assert y.shape == (*lead, N)
    assert_right(y, x.contiguous(), weight, path.fp8, bias)


class Counting(HwpqBackend):
    """Counts graphs."""

    def __init__(self):
        super().__init__("inductor")
        self.graphs = 0

    def __call__(self, gm, example_inputs):
        self.graphs += 1
        return super().__call__(gm, example_inputs)


ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 127, 129, 256, 511, 1000, 1024, 2049, 4096, 8191, 16384)


@pytest.mark.parametrize("layout", [False, True], ids=["bare", "expanded"])
@pytest.mark.parametrize("activation", ["dynamic", "none"])
def test_any_number_of_rows_takes_its_path_in_few_graphs(layout, activation):
    packed = packed_weight(N, K, activation=activation)
    weight = packed.expand() if layout else packed
    backend = Counting()
    linear = torch.compile(lambda x, w: F.linear(x, w), backend=backend)
    rows = (1, 2, 9, 33, 130, 700) if rehearsal.ON else ROWS
    for m in (*rows, *rows[::-1]):
        x = torch.randn(m, K, dtype=torch.bfloat16, device=DEVICE)
        way = chosen(target(), x, N, x.dtype, EITHER if activation == "dynamic" else paths.HP, weight.prepacked_for)
        assert way.name != "reference"
        assert_right(linear(x, weight), x, packed, way.fp8)
    # one row, the next number seen, and any number
    assert backend.graphs <= 3


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("m", [1, 16, 300])
def test_a_cuda_graph_replays_every_path(name, m):
    path, packed = serving(name, torch.bfloat16, N, K), packed_weight(N, K)
    weight = with_layout(packed, path)
    parts = (weight.qdata, weight.sparse_metadata, weight.scale)
    x = torch.randn(m, K, dtype=torch.bfloat16, device=DEVICE)

    def run():
        values, x_scale = quantize_rows(x) if path.fp8 else (x, None)
        return path.product(values, x_scale, *parts, None, weight.prepacked, torch.bfloat16)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(3):
        x.normal_()
        y.fill_(math.nan)
        graph.replay()
        assert_right(y, x, packed, path.fp8)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_torch_compile_replay_with_new_inputs(mode):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.GELU(), torch.nn.Linear(N, N // 2))
    model = model.to(DEVICE, torch.bfloat16).eval()
    converted = hwpq_fx.convert(torch.compile(model, mode=mode))
    plain = dequantized(model)
    for m in (1, 1, 1, 32, 32, 32, 500, 500, 1):
        x = torch.randn(m, K, dtype=torch.bfloat16, device=DEVICE)
        wanted = call(plain, x).double()
        error = (call(converted, x).double() - wanted).norm() / wanted.norm()
        assert error < 0.08, (m, error)  # FP8 activations, twice


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_model_matches_dequantized_weights(name, mode):
    build, batch_of, expected = MODELS[name]
    model = build().to(DEVICE)
    batches = [on_gpu(batch_of(2, 12)), on_gpu(batch_of(3, 9))]
    converted = hwpq_fx.convert(torch.compile(model, mode=mode), batches, hwpq_fx.HWPQConfig(activation="none"))
    assert len(hwpq_fx.report(converted).converted) == expected
    reference = call(dequantized(model), batches[0])
    for _ in range(3):  # replays, where the mode records
        torch.testing.assert_close(call(converted, batches[0]), reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_whole_models_in_half_precision(name, dtype):
    build, batch_of, expected = MODELS[name]
    model = build().to(DEVICE, dtype)
    batches = [on_gpu(batch_of(2, 12)), on_gpu(batch_of(3, 9))]
    if not isinstance(batches[0], dict):
        batches = [batch.to(dtype) for batch in batches]
    converted = hwpq_fx.convert(torch.compile(model), batches)
    assert len(hwpq_fx.report(converted).converted) == expected
    wanted = call(dequantized(model), batches[0]).double()
    for batch in (batches[0], batches[1], batches[0]):
        made = call(converted, batch)
        assert bool(made.isfinite().all())
    error = (made.double() - wanted).norm() / wanted.norm()
    assert error < 0.1, error


def test_masks_and_bits_are_those_of_the_cpu():
    weight = torch.randn(64, 128)
    here, there = Float8Sparse24Tensor.from_hp(weight), Float8Sparse24Tensor.from_hp(weight.to(DEVICE))
    for part in ("qdata", "sparse_metadata", "scale"):
        assert same_bits(getattr(here, part), getattr(there, part))


def same_bits(one, other):
    return torch.equal(one.cpu().reshape(-1).view(torch.uint8), other.cpu().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("saliency", ["contribution", "rank_one", "relative", "magnitude"])
@pytest.mark.parametrize("selection", ["ewma", "exact", "ewma_streaming"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_choosing_and_packing_give_the_bits_of_the_cpu(saliency, selection, dtype):
    for n, k in ((37, 1032), (5, 8), (16, 4096)):
        weight, sum_sq = torch.randn(n, k).to(dtype), torch.rand(k)
        arguments = {"saliency": saliency, "selection": selection}
        (mask, settled), (mask_gpu, settled_gpu) = (
            select24(weight.to(device), sum_sq.to(device), **arguments) for device in ("cpu", DEVICE)
        )
        assert same_bits(mask, mask_gpu) and float(settled) == pytest.approx(float(settled_gpu), abs=1e-6)
        here, there = (prune_pack24(weight.to(device), sum_sq.to(device), **arguments) for device in ("cpu", DEVICE))
        assert all(same_bits(one, other) for one, other in zip(here, there, strict=True))


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("path", ["gemv", "tiles", "tiles_fp8"])
def test_what_inductor_writes_around_a_product(only, path, rows):
    serving(path, torch.bfloat16, N, K)
    only(path)
    packed, bias = packed_weight(N, K), torch.randn(N, dtype=torch.bfloat16, device=DEVICE)
    x = torch.randn(rows, K, dtype=torch.bfloat16, device=DEVICE)
    model = torch.compile(lambda x: F.gelu(F.linear(x * 2, packed, bias)), backend=HwpqBackend("inductor"))
    with torch.no_grad():
        y, (code,) = run_and_get_code(model, x)
    wanted = F.gelu(F.linear(x * 2, packed.dequantize(), bias)).double()
    assert (y.double() - wanted).norm() < 0.05 * wanted.norm()
    kernels = re.findall(r"^(\w+) = async_compile\.triton\(", code, re.MULTILINE)
    ours = {"gemv": ["sparse_mma_kernel_0"]}.get(path, ["_tiles24_0", "_add_parts_1"])
    assert set(kernels) >= {ours[0]} and "linear24" not in code
    # what comes before, quantization included, is one kernel, and what follows another
    before, *after = (name for name in kernels if name not in ours)
    assert ("abs_amax" in before) == (path == "tiles_fp8")
    assert len(after) == 1 and "gelu" in after[0]


def test_layout_is_dropped_on_the_gpu_and_back_on_the_cpu():
    weight = Float8Sparse24Tensor.from_hp(torch.randn(64, 128)).expand()
    assert weight.prepacked_for == weight.cpu().prepacked_for == weight.to(DEVICE).cpu().prepacked_for == "dense"
    assert weight.to(DEVICE).prepacked_for != "dense"


def test_the_clock_replays_and_sees_what_is_not_written():
    clock, out = CudaClock(), torch.empty(1024, device=DEVICE)
    line = measured(clock, [partial(fill, out, 1)], 8, is_one, 0.01)
    assert line["status"] == "ok" and line["not_replayed"] == "" and 0 < line["p20_us"] <= line["median_us"] < 1e4
    line = measured(clock, [partial(fill, out, 1, 1000)], 8, is_one, 0.01)
    assert line == {"status": "wrong", "error": "not one"}


def test_the_clock_says_where_it_cannot_replay():
    def waits():
        return torch.ones(1024, device=DEVICE) * torch.ones((), device=DEVICE).item()

    line = measured(CudaClock(), [waits], 4, is_one, 0.01)
    assert line["status"] == "ok" and line["not_replayed"] and line["median_us"] > 0
    # and the next one can
    assert measured(CudaClock(), [lambda: torch.ones(8, device=DEVICE)], 4, is_one, 0.01)["not_replayed"] == ""


@pytest.mark.parametrize(("path", "m"), [("gemv", 1), ("tiles", 17)])
def test_cuts_are_measured(monkeypatch, path, m):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cuts = import_module("cuts")
    monkeypatch.setattr(cuts, "rotation", lambda *sizes: (2, 2))
    some = cuts.OPS[path].candidates
    monkeypatch.setattr(cuts.OPS[path], "candidates", lambda *problem: some(*problem)[:2])
    made = list(cuts.lines(CudaClock(), path, m, N, K, 0.001))
    assert [line["status"] for line in made] == ["ok"] * 2 and made[0]["config"] != made[1]["config"], made


def test_longer_work_takes_longer():
    clock = CudaClock()
    short, long = (
        measured(clock, [partial(torch.mm, x, x)], 4, lambda outputs: "", 0.05)["median_us"]
        for x in (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for size in (1024, 4096))
    )
    assert long > 4 * short


def test_every_contender_is_right_or_says_why_not():
    shape = linears.Shape(CudaClock(), (N, K), contenders.contenders())
    with torch.no_grad(), torch._dynamo.config.patch(contenders.COMPILING):
        for m in (1, 16, 300):
            lines = {one["contender"]: one for one in shape.lines(m, 0.01, shape.contenders)}
            assert not [one for one in lines.values() if one["status"] == "wrong"]
            assert {lines[name]["status"] for name in ("bf16", "hwpq", "quantize alone")} == {"ok"}, lines
            assert all(one.get("error") for one in lines.values() if one["status"] != "ok")


def test_tune_measures_every_path_that_serves(tmp_path):
    device, file = torch.cuda.get_device_name(), tmp_path / "table.json"
    assert run_tune(CudaClock(), device, file, [(N, K)], [1, 64], 0.005, print) == []
    serve = {name for name, path in PATHS.items() if not path.why_not(target().arch, torch.bfloat16, N, K)}
    assert set(load_table(file, device).entries[N, K][1]) == serve


@pytest.mark.parametrize("work", [("decode", 1, 1, 8), ("prefill", 1, 33, 1)], ids=lambda work: work[0])
def test_generate_end_to_end(work, monkeypatch):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=512, hidden_size=K // 4, intermediate_size=K // 2, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, dtype=torch.bfloat16,
    )  # fmt: skip
    monkeypatch.setattr(models, "VARIANTS", ("bf16", "hwpq"))
    with torch.no_grad(), torch._dynamo.config.patch(contenders.COMPILING):
        lines = list(models.generation_of(config, torch.device(DEVICE), (models.Work(*work),)))
    assert [one["status"] for one in lines] == ["ok", "ok"], lines


def test_what_runs_under_a_sanitizer_is_ours_and_right(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sanitize = import_module("sanitize")
    monkeypatch.setattr(sanitize, "ROWS", (17,))
    assert sanitize.main(quick=True, own=True) == 0
    kinds = {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith(("ok ", "not "))}
    assert kinds == {"gemv", "tiles", "tiles_fp8", "rescale", "select24", "prune_pack24"}


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_are_clean_under_compute_sanitizer(tool):
    command = ["compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no", "--tool", tool]
    script = [sys.executable, str(ROOT / "benchmarks" / "sanitize.py"), "--quick", "--own"]
    done = subprocess.run([*command, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
