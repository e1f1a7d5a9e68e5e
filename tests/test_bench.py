"""`hwpq-fx bench` without a GPU: who is refused a speed, what is summed, what is written where."""

import json

import pytest
import torch
from click.testing import CliRunner

import hwpq_fx
from clocks import LAYER, MACHINE, TINY, FakeClock, generated, layer_lines, result_of
from hwpq_fx.bench import command, contenders, linears, machine, models, report
from hwpq_fx.bench import prune as bench_prune
from hwpq_fx.bench import run as bench_run
from hwpq_fx.bench.command import bench, wrong_of_ours
from hwpq_fx.bench.machine import commit, slug, sources
from hwpq_fx.bench.measure import GpuLost
from hwpq_fx.bench.report import END, NOT_MEASURED, START
from hwpq_fx.bench.shapes import MERGED, SEPARATE, decoder
from hwpq_fx.errors import ConfigError
from hwpq_fx.kernels.paths import REFERENCE
from hwpq_fx.kernels.paths import Target as Gpu
from hwpq_fx.kernels.table import Table


@pytest.fixture
def on_cpu(monkeypatch):
    """The contenders of a GPU, on the CPU: paths in Triton's interpreter, the dispatcher's pick is the reference."""
    monkeypatch.setattr(contenders, "target_of", lambda device: Gpu(90, "H100"))
    monkeypatch.setattr(contenders, "chosen", lambda *arguments: REFERENCE[True])
    monkeypatch.setattr(contenders, "INLINED", ())  # Inductor writes no Triton for a CPU


def run_of(tmp_path, clock=None, again=False, **effort):
    effort = bench_run.QUICK._replace(copy_bytes=64, matrix=8, **effort)
    return bench_run.Bench(clock or FakeClock(), MACHINE, effort, tmp_path / "gpu.json", lambda text: None, again)


def tiny(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return str(tmp_path / "tiny.json")


def test_linears_of_the_models_and_of_a_config(tmp_path):
    llama = decoder("llama-3-8b")
    assert [one.shape for one in llama.form(MERGED)] == LAYER[MERGED]
    assert [one.shape for one in llama.form(SEPARATE)].count((1024, 4096)) == 2
    assert len(llama.shapes()) == 6 and len(llama.shapes([MERGED])) == 4
    assert [one.shape for one in decoder(tiny(tmp_path)).form(MERGED)] == [(128, 64), (64, 64), (256, 64), (64, 128)]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"hidden_size": 0}', json.dumps(TINY | {"hidden_size": -64})])
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="LLaMA family"):
        decoder(str(file))
    with pytest.raises(ConfigError, match="llama-3-8b"):
        decoder("llama-9")


def test_what_runs_here_is_right_and_timed(on_cpu):
    shape = linears.Shape(FakeClock(), (64, 128), contenders.contenders())
    lines = {one["contender"]: one for one in shape.lines(3, 0.1, shape.contenders)}
    assert set(lines) == {one.name for one in contenders.contenders()}, "nobody is dropped"
    for name in ("bf16", "fp8 weight-only", "hwpq", "gemv", "tiles", "quantize alone"):
        assert lines[name]["status"] == "ok" and lines[name]["median_us"] > 0, lines[name]
    assert lines["hwpq"]["path"] == "reference"
    # not on a CPU: listed, with the reason, without a time (where there is a GPU, torchao lets the first pass)
    for name in ("fp8 dynamic", "torchao 2:4", "torchao int4")[torch.cuda.is_available() :]:
        assert lines[name]["status"] == "failed" and lines[name]["error"] and "median_us" not in lines[name]


def test_sets_are_copies_and_rotate(on_cpu):
    clock = FakeClock(l2_bytes=20_000)
    shape = linears.Shape(clock, (64, 128), contenders.contenders())
    (made,) = shape.lines(1, 0.1, [shape.contenders[0]])
    work = clock.regions[0].work
    weights = [call.args[1].data_ptr() for call in work]
    assert len(set(weights)) == -(-3 * 20_000 // (64 * 128 * 2 + 2 * 128 + 2 * 64)) and made["calls"] == len(weights)


@pytest.mark.parametrize("name", ["bf16", "gemv", "hwpq", "scaled_mm alone", "quantize alone"])
def test_a_wrong_result_has_no_speed(on_cpu, monkeypatch, name):
    (one,) = [one for one in contenders.contenders() if one.name == name]
    if name == "scaled_mm alone":
        monkeypatch.setattr(torch, "_scaled_mm", lambda x, w, *scales, **more: (x.float() @ w.float()).bfloat16())
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    built = one.build(weight)

    def wrong(*arguments):
        outputs = built.call(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = tuple(part.float().clone().to(part.dtype) for part in outputs)
        outputs[0][1] = 3.0
        return outputs

    x = torch.randn(4, 128, dtype=torch.bfloat16)
    made = linears.measure_built(FakeClock(), built._replace(call=wrong), x, 64, 1, 0.1)
    assert made["status"] == "wrong" and "error" in made and "median_us" not in made


def test_rows_beyond_a_contender_are_skipped_with_a_word(on_cpu):
    few = contenders.Contender("few", "peer", "", lambda weight: None, most_rows=2)
    (made,) = linears.Shape(FakeClock(), (64, 128), [few]).lines(3, 0.1, [few])
    assert made == {"n": 64, "k": 128, "m": 3, "contender": "few", "status": "skipped",
                    "error": "made for at most 2 rows"}  # fmt: skip


def test_a_path_that_does_not_serve_says_why(on_cpu, monkeypatch):
    path = contenders.PATHS["gemv"]._replace(why_not=lambda *arguments: "not here")
    one = contenders.Contender("gemv", "path", "", lambda weight: contenders._path(path, weight))
    (made,) = linears.Shape(FakeClock(), (64, 128), [one]).lines(1, 0.1, [one])
    assert (made["status"], made["error"]) == ("unserved", "not here")


def test_the_first_is_timed_again(on_cpu):
    only = contenders.contenders()[:1]
    (made,) = linears.linears(FakeClock(), [(64, 128)], [1], only, 0.1)
    assert [one["contender"] for one in made] == ["bf16", "bf16 again"]


def test_what_targets_need_is_measured_first_and_what_is_known_is_not(on_cpu):
    some = [one for one in contenders.contenders() if one.name in ("bf16", "quantize alone", "gemv")]
    made = list(linears.linears(FakeClock(), [(64, 128)], [1, 2], some, 0.1))
    first, *_ = needed = [(m, name) for m in (1, 2) for name in ("bf16", "quantize alone", "bf16 again")]
    assert [(one["m"], one["contender"]) for lines in made for one in lines] == [*needed, (1, "gemv"), (2, "gemv")]

    def known(line):
        return (line["m"], line["contender"]) in (first, (1, "gemv"), (2, "gemv"))

    made = list(linears.linears(FakeClock(), [(64, 128)], [1, 2], some, 0.1, known))
    assert [(one["m"], one["contender"]) for lines in made for one in lines] == needed[1:]
    # of those that all targets are about, none comes later
    names = [one.name for one in contenders.contenders() if one.kind in linears.NEEDED]
    assert {*names} == {"bf16", *report.DENSE_FP8, report.OURS, *report.FP8_PARTS}


def test_a_whole_run_is_on_disk_after_every_step(on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "contenders", lambda: contenders.contenders()[:1])
    run, model = run_of(tmp_path, rows=(1, 2)), tiny(tmp_path)
    seen = []
    monkeypatch.setattr(run, "say", lambda text: seen.append(len(json.loads(run.file.read_text())["linears"])))
    result = run.run([("linears", model)])
    assert seen == [0, 2, 4, 6, 8, 10, 12, 14] and result["complete"]
    assert json.loads(run.file.read_text()) == json.loads(json.dumps(result))
    assert result["machine"] == MACHINE and result["ceilings"]["copy_bytes_per_s"] > 0
    assert {"median_us", "p20_us", "p80_us", "floor_us", "status", "model"} <= set(result["linears"][0])
    assert [one["contender"] for one in result["sums"]].count("bf16") == 2


def test_budget_ends_a_run_early_and_says_so(on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "contenders", lambda: contenders.contenders()[:1])
    result = run_of(tmp_path, rows=(1, 2), budget=0.0).run([("linears", tiny(tmp_path)), ("prune", tiny(tmp_path))])
    assert len(result["linears"]) == 2 and not result["complete"] and "budget" in result["stopped"]


def test_a_later_run_of_the_same_code_adds_and_replaces(on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "contenders", lambda: contenders.contenders()[:1])
    model = tiny(tmp_path)
    run_of(tmp_path, rows=(1,)).run([("linears", model)])
    slow = FakeClock(took=(1.0,) * 5)
    second = run_of(tmp_path, slow, rows=(2, 1)).run([("linears", model)])
    assert sorted({one["m"] for one in second["linears"]}) == [1, 2] and len(second["linears"]) == 16
    # what was known was not measured again
    times = {(one["m"], round(one["median_us"], 3)) for one in second["linears"]}
    assert times == {(1, 3.0), (2, 1e6)}
    assert second["complete"]
    third = run_of(tmp_path, slow, True, rows=(1,)).run([("linears", model)])
    assert len(third["linears"]) == 16 and {one["median_us"] for one in third["linears"]} == {1e6}
    run = run_of(tmp_path, rows=(1,))
    assert bench_run.earlier(run.file, MACHINE | {"sources": "other"}, "default") == {}
    run.file.write_text("{")
    assert bench_run.earlier(run.file, MACHINE, "default") == {}


def test_what_failed_is_tried_again_and_ours_by_another_table_too(on_cpu, tmp_path, monkeypatch):
    run = run_of(tmp_path)
    prune = [{"contender": "prune_pack24", "status": "ok"}, {"contender": "x", "status": "failed"}]
    lines = {"prune": prune, "generate": [generated("hwpq", 1.0), generated("bf16", 1.0)]}
    lines = {group: [one | {"model": "tiny"} for one in made] for group, made in lines.items()}
    run.file.write_text(json.dumps(run.result | lines))
    run = run_of(tmp_path)
    assert run._knows("prune", "tiny")({"contender": "prune_pack24"})
    assert not run._knows("prune", "tiny")({"contender": "x"}) and not run._knows("prune", "other")({"contender": "x"})
    assert len(run.result["generate"]) == 2
    monkeypatch.setattr(bench_run, "described_table", lambda device: "measured 0123")
    assert [one["variant"] for one in run_of(tmp_path).result["generate"]] == ["bf16"]


def test_tables_are_told_apart(monkeypatch):
    made = set()
    for entries in ({}, {(8, 8): {1: {"gemv": 1.0}}}, {(8, 8): {1: {"gemv": 2.0}}}):
        monkeypatch.setattr(bench_run, "table_of", lambda device, entries=entries: Table(entries))
        made.add(bench_run.described_table("H100"))
    assert len(made) == 3 and "default" in made


def test_every_group_leaves_out_what_is_known(tmp_path, monkeypatch):
    def ok(*arguments):
        asked.append(arguments)
        return {"status": "ok", "ms_per_token": 1.0, "forward_ms": 1.0}

    for module, name in ((bench_prune, "measured"), (models, "_layer_line"), (models, "_generated")):
        monkeypatch.setattr(module, name, ok)
    for name in ("compiled", "_layer", "_model"):
        monkeypatch.setattr(models, name, lambda *arguments: None)
    plan = [("prune", tiny(tmp_path)), ("layers", "llama-3-8b"), ("generate", "llama-3-8b")]
    asked = []
    first = run_of(tmp_path).run(plan)
    assert len(asked) == sum(len(first[group]) for group, _ in plan) == 5 + 4 * (len(models.TOKENS) + len(models.WORKS))
    assert [one["variant"] for one in first["generate"]][:4] == ["bf16", "hwpq", "fp8 weight-only", "fp8 dynamic"]
    asked.clear()
    second = run_of(tmp_path).run(plan)
    assert (
        not asked and second["complete"] and [second[group] for group, _ in plan] == [first[group] for group, _ in plan]
    )


def test_a_lost_gpu_leaves_what_there_was(on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "contenders", lambda: contenders.contenders()[:1])

    def broken(*arguments):
        yield [{"model": "x", "contender": "copy", "status": "ok", "median_us": 1.0}]
        raise GpuLost("illegal address")

    monkeypatch.setattr(bench_run.Bench, "_prune", broken)
    run = run_of(tmp_path)
    with pytest.raises(GpuLost):
        run.run([("prune", "llama-3-8b"), ("linears", tiny(tmp_path))])
    kept = json.loads(run.file.read_text())
    assert "illegal address" in kept["stopped"] and len(kept["prune"]) == 1 and not kept["linears"]


def test_one_groups_trouble_is_not_anothers(on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "contenders", lambda: contenders.contenders()[:1])
    monkeypatch.setattr(bench_run, "layers", lambda *arguments: 1 / 0)
    model = tiny(tmp_path)
    result = run_of(tmp_path, rows=(1,)).run([("layers", model), ("linears", model)])
    assert "ZeroDivisionError" in result["failures"][0] and result["linears"] and not result["complete"]


def test_pruning_is_right_and_beside_its_peers(on_cpu, tmp_path):
    result = run_of(tmp_path).run([("prune", tiny(tmp_path))])
    by = {one["contender"]: one for one in result["prune"]}
    for name in ("copy", "prune_pack24", "wanda, quantize, pack24", "wanda, quantize compiled, pack24"):
        assert by[name]["status"] == "ok", by[name]
    assert by["wanda, quantize, torchao's CUTLASS compress"]["status"] == "failed"
    weights = sum(one.n * one.k for one in decoder(tiny(tmp_path)).separate)
    assert by["copy"]["weights"] == weights and by["copy"]["bytes"] > 2.6 * weights


def test_a_wrong_mask_has_no_speed(on_cpu, tmp_path, monkeypatch):
    def lower(weight, sum_sq):  # keeps the two smallest
        return bench_prune.prune_pack24(1 / (weight.float().abs() + 1e-3), sum_sq)

    monkeypatch.setattr(bench_prune, "_ours", lower)
    by = {one["contender"]: one for one in run_of(tmp_path).run([("prune", tiny(tmp_path))])["prune"]}
    assert by["prune_pack24"]["status"] == "wrong" and "bytes of" in by["prune_pack24"]["error"]
    assert by["wanda, quantize, pack24"]["status"] == "ok"
    assert wrong_of_ours(bench_run.fresh(MACHINE) | {"prune": list(by.values())}) == ["prune: contender prune_pack24"]


def small_config():
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=256, dtype=torch.bfloat16, initializer_range=0.2, **TINY)


@pytest.fixture
def small_models(monkeypatch):
    monkeypatch.setattr(models, "config_of", lambda model: small_config())
    monkeypatch.setattr(models, "VARIANTS", ("bf16", "hwpq"))
    monkeypatch.setattr(models, "TOKENS", ((1, 5),))
    monkeypatch.setattr(models, "WORKS", (models.Work("decode", 1, 1, 3),))


def test_decoder_layers(small_models, monkeypatch):
    with torch.no_grad():
        dense, ours = models.layers(FakeClock(), "tiny", 0.1)
        assert dense["status"] == ours["status"] == "ok" and ours["median_us"] > 0
        monkeypatch.setattr(models, "float64_weights",
                            lambda module: {name: 2 * one.double() for name, one in real(module).items()})  # fmt: skip
        dense, ours = models.layers(FakeClock(), "tiny", 0.1)
        assert dense["status"] == ours["status"] == "wrong" and "median_us" not in ours


real = models.float64_weights


def test_generate_runs_compiled_and_counts_its_tokens(small_models, monkeypatch):
    with torch.no_grad(), torch._dynamo.config.patch(contenders.COMPILING):
        dense, ours = models.generation(torch.device("cpu"), "tiny")
        assert dense["status"] == ours["status"] == "ok", (dense, ours)
        assert ours["variant"] == "hwpq" and ours["ms_per_token"] == pytest.approx(ours["ms"] / 3)
        assert ours["forward_ms"] > 0


def test_generate_with_other_logits_has_no_speed(small_models, monkeypatch):
    monkeypatch.setattr(models, "LOGITS_BOUND", -1.0)
    with torch.no_grad():
        made = list(models.generation(torch.device("cpu"), "tiny"))
    assert {one["status"] for one in made} == {"wrong"} and "ms" not in made[0]


def test_configs_are_those_of_the_models_measured():
    for name in ("llama-3-8b", "qwen2.5-7b", "llama-3.2-1b"):
        config = models.config_of(name)
        queries = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // 28)
        shapes = {one.name: one.shape for one in decoder(name).separate}
        assert shapes["q_proj"] == (queries, config.hidden_size)
        assert shapes["up_proj"] == (config.intermediate_size, config.hidden_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("arguments", [[], ["--quick"], ["--only", "prune"]])
def test_without_a_gpu_it_exits_with_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 2 and "nothing to measure" in done.output and not list(tmp_path.iterdir())


def test_table_needs_no_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{START}\n{END}\n")
    assert CliRunner().invoke(bench, ["--table"]).exit_code == 0
    assert NOT_MEASURED in (tmp_path / "README.md").read_text()
    (results / "cpu.json").write_text("{}")
    (results / "gpu.json").write_text(json.dumps(result_of(layer_lines({"bf16": 1.0}))))
    assert CliRunner().invoke(bench, ["--table"]).exit_code == 0
    assert "H100" in (tmp_path / "README.md").read_text()


def test_a_table_is_not_lost_by_a_slip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    before = f"{START}\r\nmeasured\r\n{END}\r\nmore\r\n".encode()
    (tmp_path / "README.md").write_bytes(before)
    (results / "list.json").write_text("5")
    for wrong, says in (
        (["--out", "reslts"], "reslts is not there"),
        (["--readme", "nowhere.md"], "nowhere.md is not there"),
        (["--quick"], "--table measures nothing"),
        (["--again"], "--table measures nothing"),
    ):
        done = CliRunner().invoke(bench, ["--table", *wrong])
        assert done.exit_code == 2 and says in done.output
    (results / "broken.json").write_text("{")
    done = CliRunner().invoke(bench, ["--table"])
    assert done.exit_code == 2 and "broken.json holds no JSON" in done.output
    (results / "broken.json").write_text(json.dumps({"machine": {"device": "x"}, "ceilings": {}}))
    done = CliRunner().invoke(bench, ["--table"])
    assert done.exit_code == 1 and "it has no 'driver'" in done.output
    assert (tmp_path / "README.md").read_bytes() == before
    (results / "broken.json").write_text(json.dumps(result_of(layer_lines({"bf16": 1.0}))))
    assert CliRunner().invoke(bench, ["--table"]).exit_code == 0
    after = (tmp_path / "README.md").read_bytes()
    assert after.endswith(b"\r\nmore\r\n") and after.count(b"\n") == after.count(b"\r\n") > 5


def test_a_readme_without_markers_is_left_alone(fake_gpu, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
    assert CliRunner().invoke(bench, ["--table"]).exit_code == 2
    done = CliRunner().invoke(bench, [])
    assert done.exit_code == 0 and "no table is written" in done.output
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.fixture
def fake_gpu(monkeypatch, on_cpu, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "no_gpu", lambda: "")
    monkeypatch.setattr(command, "describe_machine", lambda: MACHINE)
    monkeypatch.setattr(command, "CudaClock", FakeClock)
    monkeypatch.setattr(command, "PLAN", (("linears", tiny(tmp_path)),))
    monkeypatch.setattr(command, "FULL", bench_run.FULL._replace(copy_bytes=64, matrix=8, rows=(1,)))
    monkeypatch.setattr(bench_run, "contenders", lambda: [contenders.contenders()[0]])


def test_the_command_writes_json_and_readme(fake_gpu, tmp_path):
    (tmp_path / "README.md").write_text(f"{START}\n{END}\n")
    done = CliRunner().invoke(bench, [])
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "benchmarks/results/nvidia-h100-80gb-hbm3.json").read_text())
    assert made["complete"] and {one["status"] for one in made["linears"]} == {"ok"}
    assert "H100" in (tmp_path / "README.md").read_text() and "not measured" in done.output


def test_the_command_exits_with_1_where_ours_is_wrong(fake_gpu, tmp_path, monkeypatch):
    broken = contenders.contenders()[0]._replace(
        name="hwpq", build=lambda weight: contenders._bf16(weight)._replace(call=lambda x, w: x @ w.t() + 1)
    )
    monkeypatch.setattr(bench_run, "contenders", lambda: [broken])
    done = CliRunner().invoke(bench, [])
    assert done.exit_code == 1 and "wrong, so without a speed: linears" in done.output
    assert "median_us" not in (tmp_path / "benchmarks/results/nvidia-h100-80gb-hbm3.json").read_text()


def test_the_command_exits_with_1_where_the_gpu_is_lost(fake_gpu, monkeypatch):
    monkeypatch.setattr(command, "CudaClock", lambda: FakeClock(lost=GpuLost("gone")))
    monkeypatch.setattr(contenders, "_bf16", lambda weight: 1 / 0)
    monkeypatch.setattr(bench_run, "contenders", contenders.contenders)
    done = CliRunner().invoke(bench, [])
    assert done.exit_code == 1 and "gone" in done.output


@pytest.mark.parametrize("arguments", [["--only", "prune"], ["--model", "qwen2.5-7b"]])
def test_an_empty_plan_is_refused(fake_gpu, arguments):
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 2 and "plan" in done.output


def test_which_code_it_was(tmp_path, monkeypatch):
    assert len(sources()) == 16 and sources() == sources()
    assert commit() is None or len(commit().rstrip("+")) == 40
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "hwpq_fx" / "bench" / "machine.py"))
    for package in (hwpq_fx.passes, hwpq_fx.kernels):
        monkeypatch.setattr(package, "__path__", [str(tmp_path / package.__name__)])
    made = [sources()]
    for folder in ("hwpq_fx", "hwpq_fx/bench", "hwpq_fx.passes", "hwpq_fx.kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.py").touch()
        made.append(sources())
    assert len(set(made)) == 5, "one of the folders does not count"
