"""A checkpoint's layers in order, block by block: as `convert` does it in one piece, and what is done where it cannot
be."""

import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_offload import assert_same, stored, whole
from test_skeleton import built
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import hwpq_fx
from hwpq_fx import CalibrationError, HWPQConfig, ModelError, compress_checkpoint
from hwpq_fx.blocks import Block
from hwpq_fx.in_order import _Traced
from hwpq_fx.lockstep import Lane
from hwpq_fx.resume import Run
from models import GROUPED, call, tokens

ORDERED, PLAIN = "cg, in order, X^T X", "cg, X^T X"
ASKED, ONE_BY_ONE = HWPQConfig(sequential=True), HWPQConfig(sequential=False)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Three blocks, for one between others."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("dense") / "llama"
    config = LlamaConfig(**GROUPED | {"num_hidden_layers": 3})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(2)
    return [tokens(4, 12), tokens(6, 10), tokens(8, 12)]  # one graph for all


@pytest.fixture(scope="module")
def expected(dense, batches, tmp_path_factory):
    """In order and one by one."""
    folder = tmp_path_factory.mktemp("expected")
    for name, config in (("ordered", None), ("plain", ONE_BY_ONE)):
        compress_checkpoint(dense, folder / name, batches, config)
    return folder / "ordered", folder / "plain"


def without_cache(batches):
    return [{**batch, "use_cache": False} for batch in batches]


def compensations(report):
    return {line.compensation for line in report.converted}


def of_block(folder, index):
    return {name: value for name, value in stored(folder).items() if name.startswith(f"model.layers.{index}.")}


def same_block(one, other, index):
    one, other = of_block(one, index), of_block(other, index)
    assert one.keys() == other.keys()
    return all(torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)) for name, value in one.items())


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hwpq_fx"]


def test_the_output_is_nearer_to_the_dense_one(dense, expected):
    model, *made = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, *expected))
    held_out = [tokens(4) for _ in range(8)]
    ordered, plain = (
        sum(float((call(one, batch) - call(model, batch)).square().sum()) for batch in held_out) ** 0.5 for one in made
    )
    assert ordered < plain
    assert [compensations(hwpq_fx.report(one)) for one in made] == [{ORDERED}, {PLAIN}]


@pytest.mark.parametrize("name", ["llama", "OpenAIGPT", "GptOss"])
def test_bits_are_those_of_convert_with_padding_and_several_shapes(name, dense, batches, tmp_path):
    if name != "llama":
        dense = tmp_path / "dense"
        built(name, dense)
    batches = [*batches, tokens(1, 5)]  # another graph
    report = compress_checkpoint(dense, tmp_path / "out", batches)
    model = whole(dense, tmp_path / "expected", without_cache(batches))
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert compensations(report) == {ORDERED} and report.one_by_one == ""
    theirs = {line.name: (line.rows, line.error) for line in hwpq_fx.report(model).converted}
    assert {line.name: (line.rows, line.error) for line in report.converted} == theirs
    assert list(report.seconds) == ["observe", "run in order", "choose and pack"]


CONFIGS = {
    "a block stays": HWPQConfig(ignore=["re:.*layers.1", "up_proj", "lm_head"]),
    "only the last block": HWPQConfig(targets=["re:.*layers.2.*down_proj"]),
    # X^T X and its drift for the 64 channels of all but one input, a sample for none
    "little memory": HWPQConfig(curvature_bytes=2 * 4 * 64 * 64),
    "less": HWPQConfig(curvature_bytes=4 * 64 * 64),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case, dense, batches, tmp_path, caplog):
    report = compress_checkpoint(dense, tmp_path / "out", batches, CONFIGS[case])
    assert not warnings(caplog) and report.one_by_one == ""
    model = whole(dense, tmp_path / "expected", without_cache(batches), CONFIGS[case])
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert compensations(report) == compensations(hwpq_fx.report(model)) >= {ORDERED}
    assert {line.name: line.reason for line in report.layers} == {
        line.name: line.reason for line in hwpq_fx.report(model).layers
    }


def test_padding_does_not_count(dense, expected, batches, tmp_path):
    other = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    compress_checkpoint(dense, tmp_path / "out", other)
    assert_same(tmp_path / "out", expected[0])
    with_it = [{"input_ids": batch["input_ids"]} for batch in batches]
    compress_checkpoint(dense, tmp_path / "with", with_it)
    assert not same_block(tmp_path / "with", expected[0], 0)


@pytest.mark.parametrize("padded", [True, False])
def test_one_graph_for_all_lengths(padded, dense, tmp_path, monkeypatch):
    lengths, graphs, real = [(2, 12), (3, 10), (4, 7)], [], _Traced._backend
    batches = [tokens(*size) if padded else {"input_ids": tokens(*size)["input_ids"]} for size in lengths]
    monkeypatch.setattr(_Traced, "_backend", lambda self, *args: graphs.append(self) or real(self, *args))
    compress_checkpoint(dense, tmp_path / "out", batches)
    assert len(graphs) == len({id(one) for one in graphs}) == 3


def test_nothing_but_padding(dense, batches, tmp_path):
    empty = [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in batches]
    with pytest.raises(ModelError, match=r"q_proj: not reached by any row \(padding does not count\)"):
        compress_checkpoint(dense, tmp_path / "out", empty)


def test_a_bad_batch_is_named(dense, batches, tmp_path, monkeypatch):
    real = Run.hidden

    def hidden(self, index, batch, converted=False):
        found = real(self, index, batch, converted)
        return found.index_fill(0, torch.tensor([0]), torch.nan) if (index, batch) == (1, 2) else found

    monkeypatch.setattr(Run, "hidden", hidden)
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn\.q_proj: its input.*batch 2, counted from 0"):
        compress_checkpoint(dense, tmp_path / "out", batches)


def test_a_bad_weight_is_named_first(dense, batches, tmp_path):
    shutil.copytree(dense, tmp_path / "bad")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.inf
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj: the weight holds NaN or Inf"):
        compress_checkpoint(tmp_path / "bad", tmp_path / "out", batches)


def test_one_batch_at_a_time(dense, batches, tmp_path, monkeypatch):
    given, alive, real = weakref.WeakSet(), [], Lane.of

    def of(run, converted):
        alive.append(len(given))
        given.update(one for one in (*run.args, *converted) if type(one) is torch.Tensor)
        return real(run, converted)

    monkeypatch.setattr(Lane, "of", of)
    compress_checkpoint(dense, tmp_path / "out", batches)
    assert alive == [0] * (3 * 4 * len(batches))


@pytest.mark.parametrize("config", [ONE_BY_ONE, HWPQConfig(compensation="energy")])
def test_no_more_than_it_takes_without(config, dense, batches, tmp_path, monkeypatch):
    ran, real = [], Block.run
    monkeypatch.setattr(Block, "run", lambda block, *args: ran.append(args) or real(block, *args))
    monkeypatch.setattr("hwpq_fx.in_order.Calibration.__init__", None)
    report = compress_checkpoint(dense, tmp_path / "out", batches, config)
    assert ran == [(batch, False) for batch in range(len(batches))] * 3
    assert list(report.seconds) == ["observe", "choose and pack"] and report.one_by_one == ""


# where a block cannot be


def broken(self, hidden):
    torch._dynamo.graph_break()
    return hidden


def refused(self, hidden):
    with torch._dynamo.error_on_graph_break(True):
        torch._dynamo.graph_break()
    return hidden


def reused(self, hidden):
    return hidden + 0 * self.q_proj(2 * hidden)


def in_part(self, hidden):
    self.kept = F.linear(hidden, self.q_proj.weight[:32])
    return hidden


def turning(self, hidden):
    return hidden if hidden.shape[1] > 10 else hidden + 0 * self.o_proj(self.q_proj(hidden) * 0)


UNFIT = {
    broken: "ran several graphs",
    refused: "Dynamo cannot trace it",
    reused: "q_proj multiplies several inputs",
    in_part: "what Dynamo sees of model.layers.1.self_attn.q_proj is not what a Linear does",
    turning: "multiplies several inputs",
}


def unfit(monkeypatch, change, indices=(1,)):
    """Have the attention of these blocks do something first that changes nothing."""
    real = LlamaAttention.forward

    def forward(self, hidden_states, *args, **kwargs):
        if self.layer_idx in indices:
            hidden_states = change(self, hidden_states)
        return real(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", forward)


@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_a_block_that_cannot_be(change, dense, batches, expected, tmp_path, monkeypatch, caplog):
    ordered, _ = expected
    unfit(monkeypatch, change)
    compress_checkpoint(dense, tmp_path / "plain", batches, ONE_BY_ONE)
    report = compress_checkpoint(dense, tmp_path / "out", batches)
    assert not warnings(caplog)
    assert report.one_by_one == hwpq_fx.report(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).one_by_one
    assert "model.layers.1: " in report.one_by_one and UNFIT[change] in report.one_by_one
    assert same_block(tmp_path / "out", ordered, 0) and same_block(tmp_path / "out", tmp_path / "plain", 1)
    assert not same_block(tmp_path / "plain", ordered, 1)
    found = {line.name.split(".")[2]: line.compensation for line in report.converted}
    assert found == {"0": ORDERED, "1": PLAIN, "2": ORDERED}


def test_who_asks_for_it_is_warned(dense, batches, tmp_path, monkeypatch, caplog):
    unfit(monkeypatch, broken)
    for name, config in (("out", None), ("asked", ASKED)):
        report = compress_checkpoint(dense, tmp_path / name, batches, config)
    (warning,) = warnings(caplog)
    for said in (report.one_by_one, warning):
        assert "model.layers.1: " in said and UNFIT[broken] in said
    assert_same(tmp_path / "asked", tmp_path / "out")


@pytest.mark.parametrize("change", [None, broken])
def test_the_next_block_is_given_what_the_converted_ones_make(change, dense, batches, tmp_path, monkeypatch):
    if change:
        unfit(monkeypatch, change)
    seen, real = {}, Run.write_hidden

    def watching(self, index, batch, hidden, converted=False):
        seen[index, batch, converted] = hidden
        real(self, index, batch, hidden, converted)

    monkeypatch.setattr(Run, "write_hidden", watching)
    compress_checkpoint(dense, tmp_path / "out", batches)
    assert len(seen) == 5 * len(batches)
    for folder, converted in ((dense, False), (tmp_path / "out", True)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for number, batch in enumerate(batches):
            with torch.no_grad():
                hidden = model(**batch, output_hidden_states=True).hidden_states
            for index in (1, 2):
                torch.testing.assert_close(seen[index, number, converted], hidden[index], atol=1e-4, rtol=1e-4)
                assert not torch.allclose(seen[index, number, not converted], hidden[index], atol=1e-2, rtol=1e-2)


def summed(self, hidden):
    return hidden + 0 * self.q_proj.weight.sum()


@pytest.mark.parametrize("change", [summed, lambda self, hidden: summed(self, broken(self, hidden))])
def test_a_weight_that_is_used_otherwise_stays(change, dense, batches, tmp_path, monkeypatch):
    """In a block that is converted one by one for another reason as well."""
    unfit(monkeypatch, change)
    report = compress_checkpoint(dense, tmp_path / "out", batches)
    (line,) = (line for line in report.layers if line.status == "dense" and line.name != "lm_head")
    assert line.name == "model.layers.1.self_attn.q_proj" and "used by sum" in line.reason
    if change is summed:
        whole(dense, tmp_path / "expected", without_cache(batches))
        assert_same(tmp_path / "out", tmp_path / "expected")
        assert compensations(report) == {ORDERED} and report.one_by_one == ""
    else:
        assert compensations(report) == {ORDERED, PLAIN} and "model.layers.1: " in report.one_by_one


def turned(self, hidden):
    """What a packed weight answers to, and what asks for no tensor."""
    return hidden.to(self.q_proj.weight.dtype) + 0 * F.linear(hidden, self.q_proj.weight.contiguous())[..., :1]


@pytest.mark.parametrize("change", [summed, turned])
def test_one_by_one_too(change, dense, batches, tmp_path, monkeypatch):
    unfit(monkeypatch, change)
    report = compress_checkpoint(dense, tmp_path / "out", batches, ONE_BY_ONE)
    reasons = {line.name: line.reason for line in report.layers if line.status == "dense" and line.name != "lm_head"}
    if change is summed:
        assert list(reasons) == ["model.layers.1.self_attn.q_proj"] and "also used by sum" in str(reasons)
    else:
        assert not reasons
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert call(model, batches[0]).isfinite().all()


def test_dynamo_is_off(dense, batches, expected, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    report = compress_checkpoint(dense, tmp_path / "out", batches)
    assert_same(tmp_path / "out", expected[1])
    assert "model.layers.0: TORCHDYNAMO_DISABLE is set" in report.one_by_one and not warnings(caplog)


def test_our_own_mistakes_are_no_reason(dense, batches, tmp_path, monkeypatch):
    def mistaken(*args):
        raise ValueError("on purpose")

    monkeypatch.setattr("hwpq_fx.calibration.stages", mistaken)
    with pytest.raises(Exception, match="on purpose"):
        compress_checkpoint(dense, tmp_path / "out", batches)


@pytest.mark.parametrize(("block", "change"), [(0, None), (1, None), (2, None), (1, broken)])
def test_a_killed_run_goes_on_to_the_same_bits(block, change, dense, batches, expected, tmp_path, monkeypatch):
    """Killed between two stages of a block, or before the converted block is run."""
    if change:
        unfit(monkeypatch, change, indices=(0,))
        compress_checkpoint(dense, tmp_path / "expected", batches)
    real, count = Block.run, 0

    def deadly(self, *args):
        nonlocal count
        count += self.index == block
        if count > 2 * len(batches) - (change is not None):
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "run", deadly)
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(dense, tmp_path / "out", batches)
    report = compress_checkpoint(dense, tmp_path / "out", batches, resume=True)
    assert_same(tmp_path / "out", tmp_path / "expected" if change else expected[0])
    assert ("model.layers.0: a call" in report.one_by_one) == (change is not None)
    assert compensations(report) == ({ORDERED, PLAIN} if change else {ORDERED})
