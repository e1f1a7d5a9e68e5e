"""The command line's main job, as a user runs it."""

import json

import pytest
import torch
from click.testing import CliRunner

from hwpq_fx import HWPQConfig
from hwpq_fx.cli import main
from hwpq_fx.demo import FLOORS, run_demo
from hwpq_fx.minilm import MiniLM, embed, sentences


@pytest.fixture(scope="module")
def result():
    return run_demo(progress=False)


def test_agreement_and_sizes(result):
    assert result.passed
    assert FLOORS["energy"] <= result.agreement_mean < 0.999, "2:4 must cost something: was anything converted?"
    assert result.sentences == len(sentences("heldout"))
    assert len(result.report.converted) == 37
    # 5 bits and a scale per row instead of 32 bits
    assert result.report.total("packed_bytes") < 0.17 * result.report.total("dense_bytes")
    saved = result.report.total("dense_bytes") - result.report.total("packed_bytes")
    assert result.dense.disk - result.converted.disk == pytest.approx(saved, rel=0.01)
    assert result.dense.memory - result.converted.memory == saved - result.report.total("layout_bytes")
    for phase in ("load", "observe", "choose and pack", "compile and first batch"):
        assert result.seconds[phase] > 0


def test_floor_fails_a_broken_conversion(monkeypatch):
    # the paper's one-pass masks ruin this model: the floor has to notice
    broken = run_demo(HWPQConfig(selection="ewma_streaming"), progress=False)
    assert not broken.passed
    monkeypatch.setattr("hwpq_fx.demo.run_demo", lambda *_, **__: broken)
    assert CliRunner().invoke(main, ["demo"]).exit_code == 1


def test_cg_gets_much_of_it_back(result):
    rescaled = run_demo(HWPQConfig(compensation="energy"), progress=False)
    assert rescaled.passed and result.floor == FLOORS["cg"] > rescaled.agreement_mean
    assert {line.compensation for line in result.report.layers} == {"cg, in order, X^T X"}


def test_command_prints_table_and_json(monkeypatch, result):
    monkeypatch.setattr("hwpq_fx.demo.run_demo", lambda *_, **__: result)
    shown = CliRunner().invoke(main, ["demo"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output
    for part in (
        "encoder.layer.5.output.dense",
        "37 of 37 layers",
        "MiB on disk",
        "passed",
        f"{result.agreement_mean:.4f}",
    ):
        assert part in shown.output
    printed = CliRunner().invoke(main, ["demo", "--json"])
    assert json.loads(printed.output)["agreement_mean"] == result.agreement_mean


def test_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answer = CliRunner().invoke(main, ["demo"])
    assert answer.exit_code == 2
    assert "hwpq_fx[demo]" in answer.output


def test_padding_does_not_change_embeddings():
    minilm = MiniLM()
    text = sentences("heldout")[:2]
    alone = minilm.tokenizer(text, padding=True, return_tensors="pt")
    torch.testing.assert_close(
        embed(minilm.model, [dict(alone)]), embed(minilm.model, minilm.batches(text)), atol=1e-5, rtol=0
    )


def test_shipped_sentences_are_clean():
    calibration, heldout = sentences("calibration"), sentences("heldout")
    assert len(calibration) >= 300 and len(heldout) >= 90
    assert len(set(calibration) | set(heldout)) == len(calibration) + len(heldout)
    assert all(line.strip() == line and line for line in calibration + heldout)
