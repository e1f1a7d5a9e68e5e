"""What the blocks of a checkpoint are given, one by one, is what they are given in the model; or it is refused."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from hwpq_fx import ModelError, compress_checkpoint
from hwpq_fx.shards import Shards
from hwpq_fx.skeleton import Front, Skeleton, hidden_of, run_block
from models import GROUPED, SMALL, VOCABULARY, tokens

GPT1 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
# each: what it does that others do not
FAMILIES = {
    "Llama4Text": GROUPED | EXPERTS | {"intermediate_size_mlp": 64},  # looks where its embedding's weight is
    "DiffLlama": GROUPED,  # draws parameters on the CPU whatever the default device
    "Bamba": GROUPED | MAMBA | {"attn_layer_indices": [1]},  # its blocks return pairs
    "OpenAIGPT": GPT1,  # its blocks return lists
    "GptOss": GROUPED | EXPERTS | {"sliding_window": 8},  # 2-D parameters that are not called weight
    "GPTNeo": SMALL | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
}


def built(name, folder):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_alone_are_the_model(name, tmp_path):
    model, skeleton = built(name, tmp_path), Skeleton(Shards(tmp_path), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    for key, buffer in skeleton.model.named_non_persistent_buffers():
        assert torch.equal(buffer, model.get_buffer(key)), key
    seen = []
    for block in model.get_submodule(skeleton.name):
        block.register_forward_hook(lambda _, args, kwargs, made: seen.append(hidden_of(made)), with_kwargs=True)
    front = Front(skeleton)
    for batch in (tokens(2, 12), tokens(3, 10), tokens(1, 5)):
        with torch.no_grad():
            model(**batch, use_cache=False)
            hidden, calls, tensors = front.run(batch)
            for index, (block, call) in enumerate(zip(skeleton.blocks, calls, strict=True)):
                with skeleton.filled(f"{skeleton.name}.{index}.", block):
                    hidden = hidden_of(run_block(block, call, hidden, tensors))
                assert torch.equal(hidden, seen.pop(0))


def test_parameters_that_are_not_called_weight_stay(tmp_path):
    model = built("GptOss", tmp_path / "dense")
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "out")
    assert len(report.converted) == 8
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_parameter(name)
    assert torch.equal(kept, model.get_parameter(name))


def test_a_model_that_changes_its_weights_is_refused(tmp_path):
    config = transformers.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64, intermediate_size=128
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match=r"weights of theirs, or its head \(aten\.div_.*use hwpq_fx\.convert"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", [tokens()])


class _Block(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def forward(self, hidden, other=None):
        return self.returned(hidden + 1)


class _Model(nn.Module):
    """Blocks that return what `returned` makes of their hidden states; `step` calls one with what the last returned."""

    def __init__(self, returned, step):
        super().__init__()
        self.blocks, self.step = nn.ModuleList([_Block(returned) for _ in range(3)]), step
        self.table = nn.Embedding(8, 4)

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache):
        self.embedded = made = self.table(input_ids)
        self.first = True
        for block in self.blocks:
            made = self.step(self, block, made)
            self.first = False


@torch.no_grad()
def _front(returned, step, ids):
    model = _Model(returned, step).requires_grad_(False)
    skeleton = SimpleNamespace(
        model=model, name="blocks", blocks=model.blocks, filled=lambda *_, **__: nullcontext(), device="cpu"
    )
    return model, Front(skeleton).run({"input_ids": ids})


def _unpack(count):
    def step(model, block, made):
        hidden, *_ = (made,) if model.first else made
        assert model.first or len(made) == count
        return block(hidden)

    return step


FINE = {
    "tensor": (lambda h: h, lambda model, block, made: block(made)),
    "list": (lambda h: [h], _unpack(1)),
    "pair": (lambda h: (h, None), _unpack(2)),
    "three": (lambda h: (h, h.sum(), (h, h)), _unpack(3)),
    "none handed on": (lambda h: (h, None), lambda m, b, made: b(made) if m.first else b(*made)),
    "first states too": (lambda h: h, lambda model, block, made: block(made, model.embedded)),
    "the same twice": (lambda h: h, lambda model, block, made: block(made, made)),
}


@pytest.mark.parametrize("case", FINE)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_what_blocks_return_is_told_from_the_batch(case, batch):
    model, (hidden, calls, tensors) = _front(*FINE[case], torch.randint(8, (batch, 5)))
    assert torch.equal(hidden, model.embedded) and len(calls) == 3
    for block, call in zip(model.blocks, calls, strict=True):
        hidden = hidden_of(run_block(block, call, hidden, tensors))
    torch.testing.assert_close(hidden, model.embedded + 3)


def _plain(change):
    return lambda h: h, lambda model, block, made: block(made) if model.first else change(model, block, made)


CHANGES = "changes the hidden states between"
REFUSED = {
    "halved": (*_plain(lambda model, block, made: block(made / 2)), CHANGES),
    "halved in place": (*_plain(lambda model, block, made: block(made.div_(2))), CHANGES),
    "others' results": (*_plain(lambda model, block, made: block(made, made.sum())), "makes of others' hidden states"),
    "earlier results": (
        lambda h: h,
        lambda model, block, made: block(made, vars(model).setdefault("kept", made) if not model.first else None),
        "makes of others' hidden states",
    ),
    "more results": (
        lambda h: (h, h.sum()), lambda m, b, made: b(made) if m.first else b(*made), "more of each other's results",
    ),
    "a dict": (lambda h: {"hidden": h}, lambda model, block, made: block(made), "returns a dict"),
    "meta": (lambda h: h.to("meta"), lambda model, block, made: block(made), "no checkpoint holds"),
    "weights": (*_plain(lambda m, b, made: b(made, m.table(torch.ones(1, dtype=int, device="meta")))), "weights of"),
    "order": (lambda h: h, lambda model, block, made: model.blocks[2](made), "another order"),
    "nan": (lambda h: h, lambda model, block, made: block(made / 0), "is given NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_blocks_that_depend_on_each_other_otherwise_are_refused(case):
    returned, step, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        _front(returned, step, torch.ones(2, 5, dtype=torch.long))
