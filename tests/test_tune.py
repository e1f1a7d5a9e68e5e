"""`hwpq-fx tune` without a GPU: who gets a place in the table, and what becomes of the table that was there."""

import json

import pytest
import torch
from click.testing import CliRunner

import hwpq_fx.bench.tune as tune_module
from clocks import TINY, FakeClock, FakeRegion
from hwpq_fx.bench import contenders
from hwpq_fx.bench.tune import earlier, run_tune, summary, tune, tune_shapes
from hwpq_fx.kernels.paths import PATHS
from hwpq_fx.kernels.paths import Target as Gpu
from hwpq_fx.kernels.table import DENSE_NAMES, Table, load_table, save_table, versions

DEVICE = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def paths(monkeypatch):
    """Two 16-bit paths and one with FP8 activations, in plain torch, and the seconds that each "takes" per row."""
    monkeypatch.setattr(contenders, "target_of", lambda device: Gpu(90, "H100"))

    def product(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype):
        dense = contenders.Float8Sparse24Tensor(qdata, sparse_metadata, scale, "none", False, torch.float32)
        y = x.float() @ dense.dequantize().t()
        return (y if x_scale is None else y * x_scale).to(out_dtype)

    def serves(arch, dtype, n, k):
        return ""

    fast = PATHS["gemv"]._replace(why_not=serves, product=product, inline=product)
    made = {"gemv": fast, "tiles": fast._replace(name="tiles"), "tiles_fp8": fast._replace(name="tiles_fp8", fp8=True)}
    monkeypatch.setattr(contenders, "PATHS", made)
    monkeypatch.setattr(tune_module, "PATHS", made)
    monkeypatch.setattr(contenders, "compiled_quantize", lambda: contenders.quantize_rows)
    monkeypatch.setattr(contenders, "_compiled", lambda function: function)
    monkeypatch.setattr(contenders, "INLINED", ())
    return made


class SlowClock(FakeClock):
    """Seconds by the path that a call belongs to and its rows."""

    def __init__(self, took):
        super().__init__()
        self.by_path = took

    def region(self, calls, length):
        # calls are partial(call of a path, x, *parts), and the path is in that function's closure
        path = next(cell.cell_contents for cell in calls[0].func.__closure__ if hasattr(cell.cell_contents, "product"))
        return FakeRegion(calls, length, [self.by_path(path.name, len(calls[0].args[0]))] * 5)


def seconds(name, m):
    return {"gemv": 1e-6 * m, "tiles": 4e-6, "tiles_fp8": 8e-6}[name]


def test_every_path_is_timed_until_it_is_hopeless(paths):
    (tuned,) = tune_shapes(SlowClock(seconds), [(16, 32)], [32, 1, 8, 64], 0.1)
    assert (tuned.n, tuned.k, tuned.refused) == (16, 32, [])
    assert tuned.us == {
        1: {"gemv": 1.0, "tiles": 4.0, "tiles_fp8": 8.0},
        8: {"gemv": 8.0, "tiles": 4.0, "tiles_fp8": 8.0},
        32: {"gemv": 32.0, "tiles": 4.0, "tiles_fp8": 8.0},
        64: {"tiles": 4.0, "tiles_fp8": 8.0},
    }


def test_dense_products_stand_beside_for_plans(paths):
    peer = contenders.dense_contenders()[0]
    assert [one.name for one in contenders.dense_contenders()] == list(DENSE_NAMES)

    class Clock(SlowClock):
        def region(self, calls, length):
            ours = any(hasattr(cell.cell_contents, "product") for cell in calls[0].func.__closure__ or ())
            return super().region(calls, length) if ours else FakeRegion(calls, length, [9e-3] * 5)

    (tuned,) = tune_shapes(Clock(seconds), [(16, 32)], [1, 2], 0.1, [peer])
    assert [times["bf16"] for times in tuned.us.values()] == [9000.0, 9000.0]  # slow as it is, it is not left out
    assert "bf16" not in summary(tuned.us) and "gemv 1-2" in summary(tuned.us)


def test_the_fastest_of_its_kind_stays_however_slow(paths):
    (tuned,) = tune_shapes(SlowClock(lambda name, m: 1e-6 if paths[name].fp8 else 1.0), [(16, 32)], [1, 2], 0.1)
    assert set(tuned.us[2]) == {"gemv", "tiles", "tiles_fp8"}


def test_a_wrong_path_gets_no_place(paths):
    good = paths["tiles"].product
    paths["tiles"] = paths["tiles"]._replace(product=lambda *arguments: good(*arguments) + 1)
    paths["tiles_fp8"] = paths["tiles_fp8"]._replace(product=lambda *arguments: 1 / 0)
    (tuned,) = tune_shapes(SlowClock(seconds), [(16, 32)], [1, 2], 0.1)
    assert tuned.us == {1: {"gemv": 1.0}, 2: {"gemv": 2.0}}
    assert [one.split(",")[0] for one in tuned.refused] == ["tiles at M = 1: wrong", "tiles_fp8 at M = 1: failed"]


def test_few_rows_run_as_a_graph_has_them(paths, monkeypatch):
    monkeypatch.setattr(contenders, "INLINED", ("tiles", "tiles_fp8"))
    paths["tiles_fp8"] = paths["tiles_fp8"]._replace(product=lambda *arguments: 1 / 0)
    paths["tiles"] = paths["tiles"]._replace(inline=lambda *arguments: 1 / 0)
    (tuned,) = tune_shapes(SlowClock(seconds), [(16, 32)], [1, 64, 65], 0.1)
    assert "tiles_fp8" in tuned.us[64] and "tiles" not in tuned.us[1]
    assert [one.split(",")[0] for one in tuned.refused] == ["tiles at M = 1: failed", "tiles_fp8 at M = 65: failed"]


def test_a_path_that_does_not_serve_is_no_news(paths):
    paths["tiles"] = paths["tiles"]._replace(why_not=lambda *arguments: "no")
    (tuned,) = tune_shapes(SlowClock(seconds), [(16, 32)], [1], 0.1)
    assert set(tuned.us[1]) == {"gemv", "tiles_fp8"} and not tuned.refused


def test_without_peers_theirs_stay_where_they_are_known(paths, tmp_path):
    file, shapes = tmp_path / "table.json", [(16, 32)]
    save_table(Table({(16, 32): {1: {"gemv": 50.0, "cutlass": 1.0, "bf16": 9.0}, 2: {"bf16": 8.0}}}), DEVICE, file)
    run_tune(SlowClock(seconds), DEVICE, file, shapes, [1, 64], 0.1, lambda text: None)
    times = load_table(file, DEVICE).entries[16, 32]
    assert times[1] == {"gemv": 1.0, "tiles": 4.0, "tiles_fp8": 8.0, "bf16": 9.0} and "bf16" not in times[64]


def test_the_table_is_one_the_dispatcher_reads_and_grows(paths, tmp_path):
    file, said = tmp_path / "table.json", []
    assert run_tune(SlowClock(seconds), DEVICE, file, [(16, 32), (32, 32)], [1, 64], 0.1, said.append) == []
    table = load_table(file, DEVICE)
    assert set(table.entries) == {(16, 32), (32, 32)} and table.source == "measured"
    assert table.ranking(1, 16, 32)[0] == "gemv" and table.ranking(64, 16, 32)[0] == "tiles"
    assert said == ["1 of 2: 16 x 32  gemv 1, tiles 64", "2 of 2: 32 x 32  gemv 1, tiles 64"]
    run_tune(SlowClock(lambda name, m: 1e-6), DEVICE, file, [(32, 32), (64, 32)], [1], 0.1, said.append)
    table = load_table(file, DEVICE)
    assert set(table.entries) == {(16, 32), (32, 32), (64, 32)} and set(table.entries[32, 32]) == {1}


@pytest.mark.parametrize("content", ["{", json.dumps({"format": 1, "device": "NVIDIA A100", **versions(), "entries": [],
                                                      "algorithms": {}})])  # fmt: skip
def test_a_table_that_does_not_fit_is_made_anew_with_a_warning(paths, tmp_path, content):
    file, warned = tmp_path / "table.json", []
    file.write_text(content)
    assert not earlier(file, DEVICE, warned.append).entries and "anew" in warned[0]
    run_tune(SlowClock(seconds), DEVICE, file, [(16, 32)], [1], 0.1, lambda text: None)
    assert set(load_table(file, DEVICE).entries) == {(16, 32)}


def test_summary_names_spans():
    us = {1: {"a": 1.0, "b": 2.0}, 2: {"a": 1.0}, 4: {"a": 2.0, "b": 1.0}}
    assert summary(us) == "a 1-2, b 4" and summary({}) == ""


@pytest.fixture
def fake_gpu(monkeypatch, paths, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(tune_module, "no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: DEVICE)
    monkeypatch.setattr(tune_module, "CudaClock", lambda: SlowClock(seconds))
    monkeypatch.setattr(tune_module, "user_table_file", lambda device: tmp_path / "table.json")
    monkeypatch.setattr(tune_module, "QUICK_ROWS", (1, 64))
    return ["--model", str(tmp_path / "config.json"), "--quick"]


def test_the_command(fake_gpu, tmp_path):
    done = CliRunner().invoke(tune, fake_gpu)
    assert done.exit_code == 0 and "table.json" in done.output and "gemv 1, tiles 64" in done.output
    # q, k and v as one come first
    assert done.output.startswith("1 of 5: 128 x 64") and "5 of 5: 32 x 64" in done.output
    done = CliRunner().invoke(tune, [*fake_gpu, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["source"] == "measured"


def test_the_command_without_peers(fake_gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(tune_module, "run_tune", lambda *arguments: asked.append(arguments[-1]) or [])
    for more in ([], ["--no-peers"]):
        CliRunner().invoke(tune, [*fake_gpu, *more])
    assert [len(peers) for peers in asked] == [3, 0]


def test_the_command_exits_with_1_where_a_path_is_wrong(fake_gpu, paths):
    paths["gemv"] = paths["gemv"]._replace(product=lambda *arguments: torch.zeros(1, 1))
    done = CliRunner().invoke(tune, fake_gpu)
    assert done.exit_code == 1 and "gemv at M = 1" in done.output


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_no_kernel_that_is_right_makes_no_table(fake_gpu, paths, tmp_path, extra):
    for name in paths:
        paths[name] = paths[name]._replace(product=lambda *arguments: torch.zeros(1, 1))
    done = CliRunner().invoke(tune, [*fake_gpu, *extra])
    assert done.exit_code == 1 and "there is no table" in done.output and "written to" not in done.output
    assert not (tmp_path / "table.json").exists()


def test_a_model_nobody_knows_is_refused():
    done = CliRunner().invoke(tune, ["--model", "llama-9"])
    assert done.exit_code == 2 and "llama-3-8b" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_exits_with_2():
    done = CliRunner().invoke(tune, [])
    assert done.exit_code == 2 and "nothing to tune" in done.output
