"""`hwpq-fx inspect`: what is said of a checkpoint, what is found wrong, and the page."""

import json
import math
import shutil
import subprocess
from dataclasses import asdict
from html import unescape
from html.parser import HTMLParser
from importlib.util import find_spec

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hwpq_fx import CheckpointError, HWPQConfig, convert, report
from hwpq_fx.inspect_checkpoint import NAMES, Checkpoint, inspect_checkpoint, pattern_shares, worst
from hwpq_fx.inspect_command import inspect
from hwpq_fx.inspect_page import kept_magnitudes, page
from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.kernels.ewma import ewma
from hwpq_fx.kernels.pack24 import unpack_indices
from hwpq_fx.report import LayerReport
from models import MODELS, llama, tokens

UP = "model.layers.0.mlp.up_proj"
plots = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A converted LLaMA and its folder."""
    torch.manual_seed(1)
    model = convert(llama(), [tokens()])
    folder = tmp_path_factory.mktemp("saved") / "llama"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "copy")


def change(folder, make):
    """Rewrite the safetensors file with other tensors."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    make(tensors)
    save_file(tensors, path, metadata=metadata)


def run(*args, code=0):
    result = CliRunner().invoke(inspect, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def test_every_layer_with_its_shape_size_patterns_and_error(saved):
    model, folder = saved
    found = inspect_checkpoint(folder)
    made = {line.name: line for line in report(model).layers}
    assert [layer.name for layer in found.layers] == list(made)  # the model's order, the dense head included
    assert found.valid and found.report_from == "the checkpoint" and found.config == HWPQConfig()
    weights = dict(model.named_parameters())
    for layer in found.layers:
        line = made[layer.name]
        assert (layer.shape, layer.status) == (line.shape, line.status)
        assert layer.dense_bytes == line.dense_bytes
        if layer.status == "dense":
            assert layer.reason == "ignored" and layer.error is None
            continue
        assert (layer.error, layer.settled, layer.rows) == (line.error, line.settled, line.rows)
        assert layer.packed_bytes == line.packed_bytes == weights[f"{layer.name}.weight"].packed_nbytes()
        weight = weights[f"{layer.name}.weight"]
        assert layer.zeros == (weight.dequantize() == 0).float().mean().item()
        pairs = unpack_indices(weight.sparse_metadata).flatten(0, 1)
        for name, share in layer.patterns.items():
            wanted = (pairs == torch.tensor([int(name[0]), int(name[1])])).all(-1).double().mean().item()
            assert share == pytest.approx(wanted)
    assert sum(found.patterns.values()) == pytest.approx(1)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        everything = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 (it is no dict)
    assert found.rest_bytes + found.total("packed_bytes") == everything


def test_patterns():
    every = torch.tensor([[0x84, 0x9C, 0xED]], dtype=torch.uint8)
    assert pattern_shares(every) == pytest.approx(dict.fromkeys(NAMES, 1 / 6))
    assert pattern_shares(torch.full((2, 3), 0x44, dtype=torch.uint8))["01"] == 1


def test_no_dense_weight_is_made(saved, monkeypatch):
    monkeypatch.setattr(Float8Sparse24Tensor, "dequantize", None)
    monkeypatch.setattr(Float8Sparse24Tensor, "expand", None)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    assert inspect_checkpoint(saved[1]).valid


def test_shards_and_other_architectures(tmp_path):
    model = convert(MODELS["gpt2"][0]())  # keeps its weights the other way round
    model.save_pretrained(tmp_path / "gpt2", max_shard_size="60KB")
    assert len(list((tmp_path / "gpt2").glob("*.safetensors"))) > 1
    found = inspect_checkpoint(tmp_path / "gpt2")
    shapes = {layer.name: layer.shape for layer in found.packed}
    assert found.valid and shapes == {line.name: line.shape for line in report(model).converted}
    next(iter((tmp_path / "gpt2").glob("*.safetensors"))).unlink()
    assert "Error" in run(tmp_path / "gpt2", code=1)


def test_dense_float8(tmp_path):
    model = convert(llama(), [tokens()], HWPQConfig(sparsity=0.3))
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found.valid and {layer.status for layer in found.packed} == {"fp8"} and found.patterns == {}
    assert all(layer.zeros == pytest.approx(0.3, abs=1e-3) for layer in found.packed)


@plots
def test_page_of_dense_float8(tmp_path):
    model = convert(llama(), [tokens()], HWPQConfig(sparsity=0.3))
    model.save_pretrained(tmp_path)
    text = page(inspect_checkpoint(tmp_path), Checkpoint(tmp_path))
    assert "Error per layer" in text and "Kept values" not in text


def test_without_a_report(copy):
    path = copy / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    found = inspect_checkpoint(copy)
    assert found.valid and found.report_from == "" and all(layer.error is None for layer in found.layers)
    assert worst(found.layers) == found.layers[0]
    assert "not known" in run(copy)
    line = asdict(LayerReport(UP, (128, 64), "sparse24_fp8", error=0.25))
    (copy / "hwpq_report.json").write_text(json.dumps({"layers": [line], "seconds": {}}))
    found = inspect_checkpoint(copy)
    assert found.report_from == "hwpq_report.json" and worst(found.layers).name == UP
    for bad in ({"name": 1}, line | {"error": "high"}, line | {"error": math.nan}, line | {"more": 1}):
        (copy / "hwpq_report.json").write_text(json.dumps({"layers": [bad]}))
        with pytest.raises(CheckpointError, match=r"report in hwpq_report\.json cannot be read"):
            inspect_checkpoint(copy)


def test_the_report_is_found_where_it_is_written():
    from hwpq_fx import inspect_checkpoint, model_commands, transformers_quantizer

    assert inspect_checkpoint.REPORT_FILE == model_commands.REPORT
    assert inspect_checkpoint.REPORT_METADATA == transformers_quantizer.REPORT


WRONG = {
    "_weight_sparse_metadata": (lambda t: t.index_fill_(0, torch.tensor([2]), 0x54), "repeated or out of order"),
    "_weight_scale": (lambda t: t.fill_(-1.0), "not a positive finite number"),
    "_weight_qdata": (lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype), "holds NaN"),
}


@pytest.mark.parametrize("part", WRONG)
def test_what_is_wrong_is_said_of_its_layer(copy, part):
    make, message = WRONG[part]
    key = UP.replace("up_proj", f"up_proj.{part}")
    change(copy, lambda tensors: tensors.update({key: make(tensors[key])}))
    found = inspect_checkpoint(copy)
    bad = {layer.name: layer.problem for layer in found.layers if layer.problem}
    assert not found.valid and list(bad) == [UP] and message in bad[UP] and key in bad[UP]
    told = json.loads(run(copy, "--json", code=1))
    assert told["valid"] is False
    assert "BAD" in run(copy, code=1)


@plots
def test_page_without_a_report_and_of_what_is_wrong(copy):
    change(copy, lambda tensors: tensors[f"{UP}._weight_scale"].fill_(-1.0))
    path = copy / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    html = page(inspect_checkpoint(copy), Checkpoint(copy))
    assert "Not valid: 1 found wrong" in html and "not a positive finite number" in html
    assert "Error per layer" not in html


def test_a_part_that_is_missing_or_of_another_shape_or_dtype(copy):
    key = f"{UP}._weight_scale"
    for make, message in (
        (lambda tensors: tensors.pop(key), "is missing"),
        (lambda tensors: tensors.update({key: torch.ones(3, 1)}), "not (128, 1)"),
        (lambda tensors: tensors.update({key: torch.ones(128, 1, dtype=torch.float64)}), "float64"),
    ):
        change(copy, make)
        bad = {layer.name: layer.problem for layer in inspect_checkpoint(copy).layers if layer.problem}
        assert list(bad) == [UP] and message in bad[UP] and key in bad[UP]


def test_a_weight_under_another_name_is_read_all_the_same(copy):
    def rename(tensors):
        for key in [key for key in tensors if key.startswith(UP)]:
            tensors[key.replace("up_proj", "other")] = tensors.pop(key)

    change(copy, rename)
    found = inspect_checkpoint(copy)
    names = [layer.name for layer in found.packed]
    assert found.valid and len(names) == 14 and UP not in names and UP.replace("up_proj", "other") in names
    change(copy, lambda tensors: [tensors.pop(key) for key in list(tensors) if "other" in key])
    assert {layer.name for layer in inspect_checkpoint(copy).layers if layer.problem} == {UP}


def test_an_index_that_names_what_is_not_there(tmp_path):
    convert(llama()).save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["model.gone.weight"] = next(iter(told["weight_map"].values()))
    index.write_text(json.dumps(told))
    found = inspect_checkpoint(tmp_path)
    assert not found.valid and "model.gone.weight is not in" in found.problems[0]
    told["weight_map"]["model.gone.weight"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="files beside it"):
        inspect_checkpoint(tmp_path)


def test_what_is_no_checkpoint_of_ours(copy, tmp_path):
    assert "config.json" in run(tmp_path, code=1)
    config = json.loads((copy / "config.json").read_text())
    for quantization, message in (
        (None, "is no checkpoint of hwpq_fx"),
        ({"quant_method": "gptq"}, "is no checkpoint of hwpq_fx"),
        (config["quantization_config"] | {"format_version": 99}, "upgrade it"),
        (config["quantization_config"] | {"layers": {UP: {"format": "x", "activation": "none"}}}, UP),
        (config["quantization_config"] | {"config": {"unknown": 1}}, "unknown"),
    ):
        (copy / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        assert message in run(copy, code=1)
    (copy / "config.json").write_text(json.dumps(config))
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    assert str(path) in run(copy, code=1)


def test_command(saved):
    text = run(saved[1])
    assert UP in text and "2:4 fp8" in text and "dense: ignored" in text and text.endswith("valid\n")
    told = json.loads(run(saved[1], "--json"))
    assert len(told["layers"]) == 15 and told["valid"] and told["ratio"] == pytest.approx(0.17, abs=0.01)


@plots
def test_command_writes_the_page(saved, tmp_path):
    assert json.loads(run(saved[1], "--json", "--html", tmp_path / "page.html"))["valid"]
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert "written to" in run(saved[1], "--html", tmp_path / "page.html", "--layer", UP)
    assert f"Kept values of {UP}" in (tmp_path / "page.html").read_text()
    assert "no valid 2:4 layer" in run(saved[1], "--html", tmp_path / "none.html", "--layer", "lm_head", code=2)
    assert not (tmp_path / "none.html").exists()


def test_without_matplotlib(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "hwpq_fx[plot]" in run(saved[1], "--html", tmp_path / "page.html", code=1)
    assert run(saved[1]).endswith("valid\n")


VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.rows = [], [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)
        if "td" in self.open and "svg" not in self.open:
            self.rows[-1][-1] += data


@plots
def test_page(saved):
    model, folder = saved
    found = inspect_checkpoint(folder)
    text = page(found, Checkpoint(folder))
    made = Page(text)
    # one file, and nothing that a browser would fetch
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert not {"link", "img", "iframe", "object", "base"} & set(made.tags)
    for tag, name, value in made.attributes:
        assert name not in ("src", "srcset", "action", "data"), (tag, name, value)
        assert name != "href" or value.startswith("#")
        assert not name.startswith("on")
    assert all(part.startswith("#") for part in (piece.split(")")[0] for piece in text.split("url(")[1:]))
    ids = [value for _, name, value in made.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert all(value[1:] in ids for _, name, value in made.attributes if name == "href")
    # a row for every layer, in order, with its numbers
    rows = [row for row in made.rows if row]
    assert [row[1] for row in rows] == [line.name for line in report(model).layers]
    for row, line in zip(rows, report(model).layers, strict=True):
        assert row[2] == f"{line.shape[0]}x{line.shape[1]}"
        assert row[4] == (f"{line.error:.3f}" if line.status != "dense" else "")
    # four plots, and a small one for each 2:4 layer, all with text in their place
    assert made.tags.count("figure") == made.tags.count("figcaption") == 4
    assert (
        made.tags.count("svg") == 4 + 14 == sum(name == "role" and value == "img" for _, name, value in made.attributes)
    )
    assert made.tags.count("title") == 1 + 4 + 14
    plotted = " ".join(made.text["text"])
    for words in ("q_proj", "down_proj", "relative output error", "indices", "everything else", "moving mean"):
        assert words in plotted
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    # no colour of matplotlib's own is left to be wrong in the dark
    styles = " ".join(value for _, name, value in made.attributes if name == "style" and value)
    assert "#" not in styles.replace("url(#", "") and "var(--ink)" in styles and "var(--s0)" in styles
    assert page(found, Checkpoint(folder)) == text


@plots
def test_page_shows_the_values_and_the_threshold(saved):
    model, folder = saved
    found, checkpoint = inspect_checkpoint(folder), Checkpoint(folder)
    weight = model.get_parameter(f"{UP}.weight").dequantize(torch.float32)
    kept = kept_magnitudes(checkpoint, UP)
    assert torch.equal(kept.sort(1).values, weight.abs().sort(1).values[:, 32:])
    mean, dev = ewma(kept[:1])
    under = (kept[:1] < mean - 0.5 * dev).float().mean().item()
    assert f"{under:.1%} of the row are under the threshold" in page(found, checkpoint, UP)
    assert found.config.lam == -0.5 and "threshold, mean -0.5 dev" in page(found, checkpoint, UP)


@plots
def test_page_of_names_that_are_markup(saved):
    found, checkpoint = inspect_checkpoint(saved[1]), Checkpoint(saved[1])
    evil = "<script>alert(1)</script>.$x_{$ & _\"'"
    found.layers[1].name, found.layers[0].problem, found.layers[-1].reason = evil, evil, evil
    made = Page(page(found, checkpoint, UP))
    assert made.tags.count("script") == 1
    assert [row for row in made.rows if row][1][1] == evil


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
TRY = """<script>
const told = { rows: [], faults: [] }, order = () => [...table.tBodies[0].rows].map(row => row.cells[1].textContent);
addEventListener("error", event => told.faults.push(event.message));
addEventListener("securitypolicyviolation", event => told.faults.push(event.violatedDirective));
const heads = [...table.querySelectorAll("th")], error = heads.find(head => head.textContent === "error");
for (const click of [1, 2]) { error.firstElementChild.click(); told.rows.push([error.ariaSort, order()]); }
const plots = [...document.querySelectorAll("figure svg")].map(one => one.getBoundingClientRect());
told.plots = plots.filter(box => box.width > 200 && box.height > 100).length;
told.ink = getComputedStyle(document.querySelector("figure text")).fill;
told.overflow = document.documentElement.scrollWidth - innerWidth;
document.body.textContent = "told" + JSON.stringify(told) + "told";
</script>"""


@plots
def test_page_in_a_browser(saved, tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    found = inspect_checkpoint(saved[1])
    path = tmp_path / "page.html"
    path.write_text(page(found, Checkpoint(saved[1])).replace("</body>", f"{TRY}</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    made = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    told = json.loads(unescape(made.stdout.split("told", 2)[1]))
    by_error = [layer.name for layer in sorted(found.packed, key=lambda layer: layer.error)]
    assert told["faults"] == []
    assert told["rows"] == [["ascending", [*by_error, "lm_head"]], ["descending", [*by_error[::-1], "lm_head"]]]
    assert told["plots"] == 4 and told["overflow"] <= 0
    assert told["ink"] == "rgb(27, 31, 36)"
