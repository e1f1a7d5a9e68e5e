"""What `hwpq-fx bench` makes of its lines: sums, targets, and the table in README."""

import pytest

from clocks import LAYER, MACHINE, generated, layer_lines, line, result_of
from hwpq_fx.bench import report
from hwpq_fx.bench.linears import ROWS
from hwpq_fx.bench.report import END, NOT_MEASURED, START, Target, sums, targets, worst_ratio, write_readme
from hwpq_fx.bench.shapes import MERGED, decoder


def test_sums_go_over_a_whole_layer_and_take_the_best_dense_fp8_of_each():
    lines = layer_lines({"bf16": 10.0, "fp8 dynamic": 6.0, "fp8 weight-only": 5.0, "hwpq": 4.0})
    lines += [line(4096, 4096, 1, "quantize alone", 1.0), line(4096, 4096, 1, "scaled_mm alone", 3.0)]
    lines[-3]["status"] = "wrong"  # hwpq at 4096 x 14336
    made = {(one.form, one.contender): one.us for one in sums(lines, ["llama-3-8b"])}
    assert made == {(MERGED, "bf16"): 40.0, (MERGED, "fp8 dynamic"): 24.0, (MERGED, "fp8 weight-only"): 20.0,
                    (MERGED, "best dense fp8"): 19.0}  # fmt: skip


def test_the_worst_of_all_is_known_only_when_all_are():
    us = {"bf16": 10.0, "fp8 dynamic": 6.0, "fp8 weight-only": 5.0, "hwpq": 4.0}
    shapes = decoder("llama-3-8b").shapes()
    lines = [one for m in ROWS for one in layer_lines(us, m, shapes)]
    assert worst_ratio(lines, "llama-3-8b") == 1.25
    lines[-1]["median_us"] = 8.0
    assert worst_ratio(lines, "llama-3-8b") == 5 / 8
    assert worst_ratio(lines[:-4], "llama-3-8b") is None and worst_ratio(lines, "qwen2.5-7b") is None
    lines[-1]["status"] = "wrong"
    assert worst_ratio(lines, "llama-3-8b") is None


def test_what_is_to_be_known_beside_a_target_of_generate():
    def notes(*lines):
        return [one.note for one in targets(result_of(generate=lines))[-2:]]

    whole = [generated("bf16", 8.0), generated("fp8 weight-only", 5.0), generated("fp8 dynamic", 6.0)]
    assert notes(*whole, generated("hwpq", 4.0)) == [
        "3.00 of the model's calls alone",
        "1.50 of the model's calls alone",
    ]
    assert notes(*whole[:2], generated("fp8 dynamic", 0.0, status="failed"), generated("hwpq", 4.0, skips=2)) == [
        "3.00 of the model's calls alone; hwpq skipped CUDA graphs",
        "1.50 of the model's calls alone; without fp8 dynamic; hwpq skipped CUDA graphs",
    ]
    assert notes(*whole) == ["", ""] == notes()
    text = report.markdown([result_of(generate=[*whole, generated("hwpq", 4.0)])])
    assert "| 1.25 | met (1.50 of the model's calls alone) |" in text


def test_targets_of_a_result():
    lines = layer_lines({"bf16": 100.0, "fp8 dynamic": 60.0, "hwpq": 30.0})
    lines += layer_lines({"bf16": 100.0, "fp8 dynamic": 60.0, "hwpq": 45.0}, 4096)
    prune = [{"contender": "copy", "median_us": 10.0}, {"contender": "prune_pack24", "median_us": 50.0},
             {"contender": "wanda, slow", "median_us": 900.0}, {"contender": "wanda, fast", "median_us": 400.0},
             {"contender": "wanda, broken", "status": "failed"}]  # fmt: skip
    generate = [generated(*one) for one in (("bf16", 8.0), ("fp8 weight-only", 5.0), ("fp8 dynamic", 6.0))]
    generate += [generated("hwpq", 4.0), generated("hwpq", 1.0, work="prefill")]
    made = {one.what: (one.measured, one.verdict) for one in targets(result_of(lines, prune, generate))}
    moved = sum(n * k * 5 // 8 + 4 * n + 2 * n + 2 * k for n, k in LAYER[MERGED])
    assert made == {
        "M = 1, share of the measured copy bandwidth": (pytest.approx(moved / 120e-6 / 3e12), "missed"),
        "M = 1, times the best dense FP8": (2.0, "met"),
        "M = 1, times bf16": (pytest.approx(10 / 3), "met"),
        "M = 64, times dense FP8": (None, "not measured"),
        "M = 512, times dense FP8": (None, "not measured"),
        "M = 4096, times dense FP8": (pytest.approx(4 / 3), "missed"),
        "M = 16384, times dense FP8": (None, "not measured"),
        "M = 4096, times bf16": (pytest.approx(20 / 9), "missed"),
        "any shape and M, times the best dense FP8 (the worst)": (None, "not measured"),
        "prune_pack24, times the time to copy the same bytes": (5.0, "accepted"),
        "prune_pack24, times vectorised Wanda + quantize + compress": (8.0, "missed"),
        "generate, batch 1, times compiled bf16": (2.0, "accepted"),
        "generate, batch 1, times compiled dense FP8": (1.25, "met"),
    }


@pytest.mark.parametrize(
    ("measured", "least", "verdict"),
    [(3.0, True, "met"), (2.9, True, "accepted"), (1.9, True, "missed"), (None, True, "not measured"),
     (2.0, False, "met"), (2.5, False, "accepted"), (3.1, False, "missed")],
)  # fmt: skip
def test_verdicts(measured, least, verdict):
    aims = (3.0, 2.0) if least else (2.0, 3.0)
    assert Target("it", *aims, measured, least).verdict == verdict


def test_floor_is_the_roofline_model_of_what_ran():
    gpu = report.gpu_named(MACHINE["device"])
    assert gpu is not None and report.gpu_named("GeForce") is None

    def at(name, **more):
        return report.floor_us(line(4096, 4096, 1, name, 1.0, **more), gpu)

    assert at("bf16") == at("bf16 again") > at("gemv") == at("hwpq", path="gemv")
    assert at("cutlass") > at("cutlass alone") and at("quantize alone") < at("bf16")
    assert at("hwpq", path="reference") is None and report.floor_us(line(8, 8, 1, "bf16", 1.0), None) is None


def test_readme_is_written_between_its_markers_only(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nstale\n{END}\nafter\n")
    write_readme(readme, [])
    assert readme.read_text() == f"before\n{START}\n{NOT_MEASURED}\n{END}\nafter\n"
    write_readme(readme, [result_of(layer_lines({"bf16": 100.0, "hwpq": 30.0}))])
    text = readme.read_text()
    assert (
        "H100" in text
        and "takes 1.2 us" in text
        and "| 1 | 400.0 |" in text
        and "3.33 | met |" in text
        and "not measured" in text
    )
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text


@pytest.mark.parametrize("text", ["", START, END, f"{END}{START}", f"{START}{END}{START}{END}"])
def test_readme_without_one_pair_of_markers_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="bench:start"):
        write_readme(readme, [])
    assert readme.read_text() == text


def test_lines_that_were_refused_are_named_in_the_readme(tmp_path):
    lines = [
        line(8, 8, 1, "hwpq", 0.0, "wrong"),
        line(8, 8, 1, "bf16", 1.0),
        line(8, 8, 1, "torchao int4", 0, "failed"),
    ]
    text = report.markdown([result_of(lines)])
    assert "No speed is given for 2 of 3 lines: hwpq (wrong), torchao int4 (failed)." in text
