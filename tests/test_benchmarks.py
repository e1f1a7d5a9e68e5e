"""The CPU benchmarks at small sizes: their baselines choose what ours does, and their files have the promised shape."""

import importlib
import json
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import hwpq_fx
from hwpq_fx.kernels import cpu24, select24

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a script as `python benchmarks/NAME.py` would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def untied(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and sums of squares whose metrics differ by more than any rounding, within every group."""
    order = torch.rand(rows, cols // 4, 4).argsort(-1).view(rows, cols)
    sum_sq = torch.rand(cols) * 100 + 1
    weight = (order + 1 + 0.5 * torch.rand(rows, cols)) / sum_sq.sqrt()
    return weight * torch.where(torch.rand(rows, cols) < 0.5, -1, 1), sum_sq


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wandas_loop_its_topk_and_our_exact_choice_agree(load, dtype):
    wanda = load("wanda")
    for rows, cols in ((33, 64), (1, 4), (7, 252)):
        weight, sum_sq = untied(rows, cols)
        weight = weight.to(dtype)
        kept, _ = select24(weight, sum_sq, "contribution", "exact")
        assert torch.equal(wanda.published_loop(weight, sum_sq), ~kept)
        assert torch.equal(wanda.vectorised(weight, sum_sq), ~kept)
        assert (~kept).view(rows, -1, 4).sum(-1).eq(2).all()


def test_wandas_metric_is_weight_times_input_norm(load):
    weight, sum_sq = torch.tensor([[1.0, -2.0, 0.0, 3.0]]), torch.tensor([4.0, 9.0, 1.0, 0.0])
    assert load("wanda").metric(weight, sum_sq).tolist() == [[2.0, 6.0, 0.0, 0.0]]


def test_rounds_pair_contenders_turn_by_turn(load):
    rounds, log = load("rounds"), []
    times = rounds.rounds({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, runs=3, warmup=1)
    assert log == ["a", "b"] * 4 and all(len(mine) == 3 for mine in times.values())
    made = rounds.summary({"slow": [4.0, 2.0, 30.0], "fast": [1.0, 1.0, 10.0]}, ["slow"])
    assert made["slow"] == {"ms": 4000.0}
    assert made["fast"]["ms"] == 1000.0 and made["fast"]["slow / this"]["median"] == 3.0
    assert made["fast"]["slow / this"]["p20"] < 3 < made["fast"]["slow / this"]["p80"]


def _is_measured(line: dict, baselines: list[str]) -> bool:
    ratios = [line[f"{baseline} / this"] for baseline in baselines]
    return line["ms"] > 0 and all(0 < one["p20"] <= one["median"] <= one["p80"] for one in ratios)


@pytest.mark.skipif(bool(cpu24.why_not_native()), reason="needs a C++ compiler")
def test_choose_writes_every_contender(load, tmp_path):
    script, out = load("choose"), tmp_path / "choose.json"
    arguments = ["--rows", "32", "--cols", "64", "--runs", "3", "--threads", "1", "--out", str(out)]
    done = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    _check_choose(script, json.loads(out.read_text()), "32x64")


def _check_choose(script, content: dict, size: str) -> None:
    baselines = [script.LOOP, script.TOPK, script.TOPK_COMPILED]
    assert {"cpu", "threads", "torch"} <= content["machine"].keys()
    assert content["seconds to compile the native ops, once per machine"] > 0
    for dtype in ("float32", "bfloat16"):
        lines = content[f"{size} {dtype}"]
        assert set(baselines) < lines.keys()
        ours = [name for name in lines if name.startswith("ours")]
        assert len(ours) == 5 and all(_is_measured(lines[name], baselines) for name in ours)


def test_decode_checks_and_writes_every_contender(load, tmp_path):
    script, out = load("decode"), tmp_path / "decode.json"
    arguments = ["--hidden", "128", "--layers", "1", "--vocabulary", "64", "--runs", "3", "--threads", "1"]
    done = CliRunner().invoke(script.main, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    _check_decode(script, json.loads(out.read_text()))


def _check_decode(script, content: dict) -> None:
    converted = [name for name in content if name.startswith("converted")]
    assert len(converted) == 2
    assert all(_is_measured(content[name], [script.DENSE, script.FROZEN]) for name in converted)
    assert 0 < content["of these converted"] < content["parameters"]
    assert all(0 < error < 0.25 for error in content["relative error of logits against float64"].values())


def test_decode_reports_no_speed_for_a_model_that_is_wrong(load):
    script = load("decode")
    base = script.llama(128, 1, 64)
    model = hwpq_fx.convert(torch.compile(script.llama(128, 1, 64), backend="eager"), [torch.arange(8)[None]])
    with torch.no_grad():
        base.lm_head.weight.neg_()
    with pytest.raises(click.ClickException, match="no speed is reported"):
        script.check(model, base, script.LIMITS["dynamic"])


def test_the_files_that_readme_quotes(load):
    """As the scripts write them, at the sizes that the README speaks of."""
    results = BENCHMARKS / "results"
    _check_choose(load("choose"), json.loads((results / "choose.json").read_text()), "4096x4096")
    content = json.loads((results / "decode.json").read_text())
    _check_decode(load("decode"), content)
    assert content["parameters"] > 100e6
