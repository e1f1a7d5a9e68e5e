"""`hwpq-fx compress`, `plan`, `eval`, `export`, on a tiny LLaMA."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from commands import CALIB, dense_folder, run
from hwpq_fx import CalibrationError, HWPQConfig, Plan
from hwpq_fx.evaluate import evaluate
from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.sizes import dry_run
from hwpq_fx.texts import sequences, texts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return dense_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def compressed(folder):
    out = run("compress", folder / "dense", "--calib", folder / "text.txt", "--out", folder / "sparse", *CALIB)
    return folder / "sparse", out


def test_compress_writes_what_from_pretrained_reads(folder, compressed):
    out, told = compressed
    assert "14 of 15 layers converted" in told and f"written to {out}" in told
    model = AutoModelForCausalLM.from_pretrained(out)
    packed = [name for name, p in model.named_parameters() if isinstance(p, Float8Sparse24Tensor)]
    assert len(packed) == 14
    assert len(json.loads((out / "hwpq_report.json").read_text())["layers"]) == 15
    assert (out / "tokenizer.json").exists()


def test_compress_with_a_config_and_a_plan(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"compensation": "cg", "max_loss": 1.0}))
    made = json.loads(
        run("plan", folder / "dense", "--calib", folder / "text.txt", "--config", tmp_path / "config.json", "--out",
            tmp_path / "plan.json", "--json", *CALIB)
    )  # fmt: skip
    plan = Plan.load(tmp_path / "plan.json")
    assert made == json.loads(json.dumps(plan.to_dict())) and plan.error <= 1.0
    sparse = sum(layer.status == "sparse24_fp8" for layer in plan.layers)
    assert 0 < sparse < 14
    found = json.loads(
        run("compress", folder / "dense", "--calib", folder / "text.txt", "--plan", tmp_path / "plan.json", "--out",
            tmp_path / "out", "--json", *CALIB)
    )  # fmt: skip
    assert sum(line["status"] == "sparse24_fp8" for line in found["layers"]) == sparse


def test_dry_run_agrees_with_what_happens(folder, compressed, tmp_path):
    told = json.loads(run("compress", folder / "dense", "--dry-run", "--json"))
    happened = json.loads((compressed[0] / "hwpq_report.json").read_text())
    status = {line["name"]: (line["status"], line["packed_bytes"]) for line in happened["layers"]}
    for line in told["layers"]:
        became, size = status[line["name"]]
        assert line["status"] == became
        assert became == "dense" or line["bytes"] == size
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    assert told["model_bytes"] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    text = run("compress", folder / "dense", "--dry-run")
    assert "ignored" in text and "sparse24_fp8" in text
    sums = dry_run(str(folder / "dense"), HWPQConfig(compensation="energy"))
    gathered = sum(4 * layer.shape[1] ** 2 for layer in sums.layers[:-1])
    assert told["statistics_bytes"] - sums.statistics_bytes == gathered > 0
    quantized = run("compress", compressed[0], "--dry-run", code=1)
    assert "is quantized already" in quantized


def test_eval(folder, compressed):
    args = ("--text", folder / "text.txt", *CALIB, "--json")
    alone = json.loads(run("eval", folder / "dense", *args))
    assert alone["perplexity"] == pytest.approx(math.exp(alone["loss"]))
    assert alone["tokens"] == 8 * 31 and alone["kl"] is None
    paired = json.loads(run("eval", compressed[0], "--against", folder / "dense", *args))
    assert paired["dense_perplexity"] == pytest.approx(alone["perplexity"])
    assert paired["difference"] == pytest.approx(paired["loss"] - alone["loss"])
    assert paired["kl"] > 0 and 0 < paired["difference_error"] < paired["loss_error"] * 3
    itself = json.loads(run("eval", folder / "dense", "--against", folder / "dense", *args))
    assert itself["kl"] == pytest.approx(0, abs=1e-6) and itself["difference"] == 0
    assert "paired" in run("eval", compressed[0], "--against", folder / "dense", *args[:-1])


def test_evaluation_against_the_models_own_loss(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    tokens = torch.randint(300, (6, 16))
    with torch.no_grad():
        theirs = model(input_ids=tokens, labels=tokens).loss
    assert evaluate(model, tokens, batch=4).loss == pytest.approx(theirs.item(), rel=1e-5)


def test_export(folder, compressed, tmp_path):
    run("export", compressed[0], "--out", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    weight = plain.model.layers[0].mlp.up_proj.weight
    assert type(weight) is torch.nn.Parameter
    assert (weight == 0).float().mean() >= 0.5
    assert (tmp_path / "plain" / "tokenizer.json").exists()


def test_texts(tmp_path):
    class Letters:
        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(letter) for letter in text]}

    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n\n{"text": "de"}\n')
    assert texts_of(str(tmp_path / "a.jsonl")) == ["abc", "de"]
    cut = sequences(Letters(), ["abc", "de"], 3, 10)
    assert cut.tolist() == [[97, 98, 99], [0, 100, 101]]
    (tmp_path / "b.JSONL").write_text('\ufeff{"text": "a\\ud800b"}', encoding="utf-8")
    assert texts_of(str(tmp_path / "b.JSONL")) == ["a?b"]
    with pytest.raises(CalibrationError, match=r"there is no file 'nowhere\.jsonl'"):
        texts_of("nowhere.jsonl")
    assert sequences(Letters(), ["abcdefghi"], 2, 2).tolist() == [[97, 98], [105, 0]]  # spread over the text


WRONG = {
    "no model": (["eval", "nowhere/at-all", "--text", "{text}"], "nowhere/at-all"),
    "no text": (["compress", "{dense}", "--calib", "missing.txt", "--out", "{out}", *CALIB], "missing.txt"),
    "empty text": (["compress", "{dense}", "--calib", "{empty}", "--out", "{out}", *CALIB], "holds no text"),
    "too short": (["compress", "{dense}", "--calib", "{short}", "--out", "{out}"], "too few"),
    "bad config": (["compress", "{dense}", "--config", "{bad}", "--out", "{out}"], "saliency 'x'"),
    "config of unknown fields": (["compress", "{dense}", "--config", "{odd}", "--out", "{out}"], "unknown_field"),
    "bad plan": (["compress", "{dense}", "--plan", "{bad}", "--out", "{out}"], "no plan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_told_and_write_nothing(folder, tmp_path, case):
    args, message = WRONG[case]
    names = {"dense": folder / "dense", "text": folder / "text.txt", "out": tmp_path / "out"}
    files = {"empty": " ", "short": "hello", "bad": '{"saliency": "x"}', "odd": '{"unknown_field": 1}'}
    for name, content in files.items():
        names[name] = tmp_path / name
        names[name].write_text(content)
    out = run(*(arg.format(**names) for arg in args), code=1)
    assert message in out and "Traceback" not in out
    assert not (tmp_path / "out").exists()


def test_out_is_needed(folder):
    assert "--out says where" in run("compress", folder / "dense", code=2)


def test_in_place_is_refused(folder, compressed):
    told = run("compress", folder / "dense", "--out", folder / "dense", code=2)
    assert "is the model itself" in told
    assert "is the model itself" in run("export", compressed[0], "--out", compressed[0], code=2)


def test_one_sequence_has_no_standard_error(folder):
    args = ("--text", folder / "text.txt", "--samples", "1", "--length", "8", "--device", "cpu")
    assert json.loads(run("eval", folder / "dense", *args, "--json"))["loss_error"] is None
    assert "± ?" in run("eval", folder / "dense", *args)


@pytest.mark.parametrize(
    "extra", [("--samples", "0"), ("--length", "1"), ("--device", "nonsense")], ids=lambda extra: extra[0]
)
def test_numbers_that_cannot_be(folder, extra):
    told = run("eval", folder / "dense", "--text", folder / "text.txt", *extra, code=2)
    assert extra[0] in told and "Traceback" not in told


REFUSED = [
    ({"step": "prepare"}, (), "quantize_"),
    ({"max_loss": 1.0}, ("--offload",), "min_speedup weigh all layers"),
    ({"packing_format": "sparse_2d_data_2d_metadata"}, ("--device", "cpu"), "packing_format"),
]


@pytest.mark.parametrize(("fields", "extra", "message"), REFUSED)
def test_a_dry_run_refuses_what_the_run_would(folder, tmp_path, fields, extra, message):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    told = run("compress", folder / "dense", "--dry-run", "--config", tmp_path / "config.json", *extra, code=1)
    assert message in told and "Traceback" not in told


@pytest.mark.parametrize("name", ["plot.nonsense", "plot"])
def test_pictures_that_nobody_draws_are_refused_first(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr("hwpq_fx.model_commands.load", None)
    assert "matplotlib draws no such picture" in run("plan", folder / "dense", "--plot", tmp_path / name, code=2)


def test_a_config_is_json_or_a_file_of_it(folder, tmp_path):
    args = ("compress", folder / "dense", "--dry-run", "--json", "--config")
    expected = run(*args, '{"targets": ["up_proj"]}')
    assert [layer["status"] for layer in json.loads(expected)["layers"]].count("sparse24_fp8") == 2
    (tmp_path / "config.json").write_text('{"targets": ["up_proj"]}')
    assert run(*args, tmp_path / "config.json") == expected
    assert "is neither a JSON object nor a file" in run(*args, tmp_path / "nowhere.json", code=2)
    assert "--config: saliency 'x'" in run(*args, '{"saliency": "x"}', code=1)
    assert "Traceback" not in run(*args, '{"saliency"', code=1)


def test_dry_run_says_what_it_cannot_know(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"max_loss": 0.01}')
    assert "see hwpq-fx plan" in run("compress", folder / "dense", "--dry-run", "--config", tmp_path / "config.json")


def test_block_by_block_is_the_same(folder, compressed, tmp_path):
    args = ("compress", folder / "dense", "--calib", folder / "text.txt", "--out", tmp_path / "out", *CALIB)
    assert "14 of 15 layers converted" in run(*args, "--offload")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(compressed[0]).state_dict()
    for name, weight in theirs.items():
        if isinstance(weight, Float8Sparse24Tensor):
            assert torch.equal(weight.qdata.view(torch.uint8), ours[name].qdata.view(torch.uint8)), name
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "--resume goes with --offload" in run(*args, "--resume", code=2)
