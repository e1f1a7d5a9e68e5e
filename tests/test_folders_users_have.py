"""Checkpoint folders as they come: of other models, incomplete, damaged, at odds with themselves; and where they go."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

import hwpq_fx
from commands import CALIB, dense_folder, run
from hwpq_fx import CheckpointError, ModelError, convert
from hwpq_fx.folder import whole_folder
from hwpq_fx.offload import compress_checkpoint
from hwpq_fx.shards import Shards
from hwpq_fx.sizes import dry_run
from models import llama

SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return dense_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def dense(folder, tmp_path):
    """A copy of the dense model's folder, to be spoilt."""
    return shutil.copytree(folder / "dense", tmp_path / "dense")


def change(where, **fields):
    content = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**content, **fields}))


# where to


@pytest.mark.parametrize("name", ["", ".", "..", "inside/.."])
def test_the_current_folder_is_not_replaced(name, dense, tmp_path, monkeypatch):
    (tmp_path / "work" / "inside").mkdir(parents=True)
    (tmp_path / "work" / "kept").write_text("kept")
    monkeypatch.chdir(tmp_path / "work")
    before = os.stat(".").st_ino
    said = run("compress", dense, "--out", name, *CALIB, code=1)
    assert "current folder" in said
    assert os.stat(tmp_path / "work").st_ino == before and (tmp_path / "work" / "kept").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "work"}


def test_a_link_is_followed_and_links_inside_stay_links(tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    for one in (target, elsewhere):
        one.mkdir()
    (elsewhere / "data").write_text("data")
    (target / "folder").symlink_to(elsewhere)
    (target / "file").symlink_to("../elsewhere/data")
    (tmp_path / "link").symlink_to(target)
    with whole_folder(tmp_path / "link") as partial:
        (partial / "new").write_text("new")
    assert (tmp_path / "link").is_symlink() and (target / "new").read_text() == "new"
    assert (target / "folder").is_symlink() and (target / "file").is_symlink()
    assert (target / "file").read_text() == "data" and (elsewhere / "data").read_text() == "data"


def test_a_place_to_write_to_is_asked_for_first(dense, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("hwpq_fx.model_commands.load", lambda *_: pytest.fail("it is loaded already"))
    assert "file" in run("compress", dense, "--out", tmp_path / "file" / "x", *CALIB, code=1)
    assert "there is no folder" in run("plan", dense, "--out", tmp_path / "none" / "x.json", *CALIB, code=2)


# what from


def test_another_kind_of_model_is_refused(dense, tmp_path):
    config = LlamaConfig.from_pretrained(dense, num_labels=3)
    LlamaForSequenceClassification(config).save_pretrained(dense)
    for command in (("compress", dense, "--out", tmp_path / "out", *CALIB), ("plan", dense, *CALIB)):
        said = run(*command, code=1)
        assert "lm_head.weight is not in the checkpoint" in said and "LlamaForSequenceClassification" in said
    assert not (tmp_path / "out").exists()


def test_weights_that_are_missing_are_not_made_up(dense, tmp_path):
    tensors = load_file(dense / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    said = run("compress", dense, "--out", tmp_path / "out", *CALIB, code=1)
    assert "model.layers.1.mlp.up_proj.weight is not in the checkpoint, nor are 1 others" in said


@pytest.mark.parametrize("fields", [{"vocab_size": 200}, {"intermediate_size": 64}, {"intermediate_size": 256}])
def test_sizes_that_contradict_config_json(fields, dense, tmp_path):
    change(dense, **fields)
    with pytest.raises(ModelError, match=r"\[\d+, \d+\], and config.json makes it"):
        compress_checkpoint(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "Error" in run("compress", dense, "--out", tmp_path / "out", *CALIB, code=1)


@pytest.mark.parametrize("fields", [{"hidden_size": "wide"}, {"num_attention_heads": 7}])
def test_configs_that_transformers_refuses(fields, dense, tmp_path):
    change(dense, **fields)
    for more in (("--out", tmp_path / "out"), ("--out", tmp_path / "out", "--offload"), ("--dry-run",)):
        said = run("compress", dense, *more, "--device", "cpu", code=1)
        assert said.startswith("Error: ") and str(dense) in said


@pytest.mark.parametrize("more", [(), ("--offload",)])
def test_damaged_files_are_named(more, dense, tmp_path):
    whole = (dense / SINGLE).read_bytes()
    (dense / SINGLE).write_bytes(whole[: len(whole) // 2])
    said = run("compress", dense, "--out", tmp_path / "out", "--device", "cpu", *more, code=1)
    assert said.startswith("Error: ") and str(dense) in said


def test_the_single_file_is_the_one_that_is_read(dense, tmp_path):
    """As transformers does where there are an index and shards as well."""
    llama().save_pretrained(tmp_path / "other", max_shard_size="60KB")
    for path in (tmp_path / "other").glob("*.safetensors*"):
        shutil.copy(path, dense)
    assert set(Shards(dense).where.values()) == {SINGLE}


def test_a_dtype_that_config_json_does_not_tell(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(dense)
    change(dense, dtype=None)
    compress_checkpoint(dense, tmp_path / "blocks")
    convert(model.eval()).save_pretrained(tmp_path / "whole")
    kinds = [
        {
            name: value.dtype
            for path in (tmp_path / out).glob("*.safetensors")
            for name, value in load_file(path).items()
        }
        for out in ("blocks", "whole")
    ]
    assert kinds[0] == kinds[1] and kinds[0]["model.norm.weight"] == torch.bfloat16
    sizes = {layer.name: layer.dense_bytes for layer in dry_run(str(dense), hwpq_fx.HWPQConfig()).layers}
    assert sizes["model.layers.0.self_attn.q_proj"] == 2 * 64 * 64


def test_packed_weights_that_config_json_does_not_tell_of(tmp_path):
    convert(llama()).save_pretrained(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    table = content["quantization_config"]["layers"]
    gone = sorted(table)[0]
    del table[gone]
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    said = run("inspect", tmp_path / "out", code=1)
    assert gone.removesuffix(".weight") in said


# what is asked


def test_a_dry_run_reads_no_plan(dense, tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    assert "--plan" in run("compress", dense, "--dry-run", "--plan", tmp_path / "plan.json", code=2)


def test_a_config_that_is_no_object(dense, tmp_path):
    (tmp_path / "config.json").write_text("[]")
    said = run("compress", dense, "--dry-run", "--config", tmp_path / "config.json", code=1)
    assert "holds no JSON object" in said


@pytest.mark.parametrize(("value", "found"), [(float("nan"), None), (1e9, None)])
def test_numbers_that_json_does_not_have(value, found, folder, dense):
    tensors = load_file(dense / SINGLE)
    tensors["lm_head.weight"][3] = value
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    said = run("eval", dense, "--text", folder / "text.txt", "--length", "32", "--samples", "4", "--json")
    assert json.loads(said, parse_constant=pytest.fail)["perplexity"] is found
