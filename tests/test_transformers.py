"""transformers: save, load, convert while loading, generate, pipeline, Trainer, PEFT."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

import hwpq_fx
from hwpq_fx import CheckpointError, ConfigError, Float8Sparse24Tensor, HWPQConfig, HWPQTransformersConfig, convert
from hwpq_fx.float8 import dense_float8
from models import MODELS, VOCABULARY, call, llama, qwen3, tokens

KEY = "model.layers.0.mlp.up_proj._weight_{}"


def bits(model):
    return {
        name: value.dequantize() if isinstance(value, hwpq_fx.kernels.packed.TorchAOBaseTensor) else value
        for name, value in model.state_dict().items()
    }


def same(one, other):
    one, other = bits(one), bits(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def stored(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A converted LLaMA, its folder, a batch."""
    torch.manual_seed(1)
    model = convert(llama())
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    model.save_pretrained(folder)
    return model, folder, tokens()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "opt", "gpt2", "bert"])
def test_a_model_comes_back_as_it_was(name, tmp_path):
    build, batch, count = MODELS[name]
    model = convert(build())
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    packed = [one for one in back.parameters() if isinstance(one, Float8Sparse24Tensor)]
    assert len(packed) == count and not any(one.requires_grad for one in packed)
    assert same(back, model) and not back.training
    batch = batch()
    assert torch.equal(call(back, batch), call(model, batch))
    # nothing is left of what was there only while loading
    assert [key for key, _ in back.named_parameters()] == [key for key, _ in model.named_parameters()]
    assert back.state_dict().keys() == model.state_dict().keys()
    back.save_pretrained(tmp_path / "again")
    first, again = stored(tmp_path), stored(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(
        torch.equal(first[key].view(torch.uint8), again[key].view(torch.uint8)) for key in first if first[key].dim()
    )


def test_five_bits_a_weight_and_a_scale_a_row(checkpoint):
    model, folder, _ = checkpoint
    tensors = stored(folder)
    for name, weight in model.named_parameters():
        if isinstance(weight, Float8Sparse24Tensor):
            owner = name.removesuffix("weight") + "_weight_"
            parts = {key: value for key, value in tensors.items() if key.startswith(owner)}
            assert parts.keys() == {owner + "qdata", owner + "sparse_metadata", owner + "scale"}
            assert 8 * sum(part.nbytes for part in parts.values()) == 5 * weight.numel() + 32 * len(weight)
            assert name not in tensors
    assert "lm_head.weight" in tensors
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"], len(config["layers"])) == ("hwpq_fx", 1, 14)
    assert HWPQConfig(**config["config"]) == HWPQConfig()


LOAD = """
import sys
import torch
import hwpq_fx
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
folder, batch, out, how = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, **eval(how, {"torch": torch}))
batch = torch.load(batch)
with torch.no_grad():
    logits = {"eager": model(**batch).logits}
    if how == "{}":
        logits["compiled"] = torch.compile(model, backend="hwpq")(**batch).logits
torch.save(logits, out)
"""


@pytest.mark.parametrize(
    "how",
    [
        "{}",
        "dict(device_map='cpu')",
        "dict(device_map='auto')",
        "dict(device_map={'': 'cpu'})",
        "dict(dtype=torch.bfloat16)",
    ],
)
def test_a_new_process_gives_the_same_logits(checkpoint, tmp_path, how):
    model, folder, batch = checkpoint
    if "device_map" in how:
        pytest.importorskip("accelerate")
        model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        folder = tmp_path / "shards"
        assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").exists()
    if "dtype" in how:
        # not model.to(), which casts the rotary embeddings too
        cast, model = model, type(model).from_pretrained(folder, dtype=torch.bfloat16)
        assert same(copy.deepcopy(cast).to(torch.bfloat16), model) and model.dtype is torch.bfloat16
    torch.save(batch, tmp_path / "batch")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "batch"), str(tmp_path / "logits"), how]
    subprocess.run(command, check=True, env=environment, timeout=500)
    logits = torch.load(tmp_path / "logits")
    assert torch.equal(logits["eager"], call(model, batch))
    if how == "{}":
        here = torch.compile(model, backend="hwpq")
        assert torch.equal(logits["compiled"], call(here, batch))


def test_a_compiled_model_is_saved_as_the_plain_one(tmp_path):
    model = convert(torch.compile(llama(), backend="eager"))
    model.save_pretrained(tmp_path / "plain")
    hwpq_fx.save_pretrained(model, tmp_path / "whole")
    for folder in ("plain", "whole"):
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / folder), model._orig_mod)


class Dense(TorchDispatchMode):
    """Collects the floating point tensors of 16 bits and more, of given shapes, that are not on meta."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.seen = shapes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if (
                type(one) in (torch.Tensor, torch.nn.Parameter)
                and one.is_floating_point() and one.itemsize > 1 and not one.is_meta
                and (tuple(one.shape) in self.shapes or tuple(one.shape[::-1]) in self.shapes)
            ):  # fmt: skip
                self.seen.append((func, tuple(one.shape)))
        return out


def test_loading_never_builds_the_dense_weights(tmp_path, monkeypatch):
    # the mode sees this thread only
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    model = convert(llama(), config=HWPQConfig(layout="packed"))
    model.save_pretrained(tmp_path)
    shapes = {tuple(one.shape) for one in model.parameters() if isinstance(one, Float8Sparse24Tensor)}
    with Dense(shapes) as dense:
        back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dense.seen == [] and same(back, model)
    assert all(one.prepacked is None for one in back.parameters() if isinstance(one, Float8Sparse24Tensor))
    with Dense(shapes) as dense:  # the check itself
        back.get_submodule("model.layers.0.mlp.up_proj").weight.dequantize()
    assert dense.seen


def test_the_layout_is_made_again(checkpoint):
    _, folder, _ = checkpoint
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert back.get_submodule("model.layers.0.mlp.up_proj").weight.prepacked is not None


def test_the_report_comes_along(checkpoint):
    model, folder, _ = checkpoint
    back = hwpq_fx.report(AutoModelForCausalLM.from_pretrained(folder))
    assert back == hwpq_fx.report(model)


@pytest.mark.parametrize("given", [{"activation": "none", "ignore": ["o_proj", "lm_head"]}, {"sparsity": 0.5}])
def test_other_configs(tmp_path, given):
    model = convert(llama(), config=HWPQConfig(**given))
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.config.quantization_config.config == HWPQConfig(**given)
    batch = tokens()
    assert same(back, model) and torch.equal(call(back, batch), call(model, batch))
    kinds = {name: type(value) for name, value in model.named_parameters()}
    assert {name: type(value) for name, value in back.named_parameters()} == kinds
    assert back.get_submodule("model.layers.0.mlp.up_proj").weight.dtype is torch.float32


def test_sparse_and_dense_fp8_side_by_side(tmp_path):
    model = convert(llama(), config=HWPQConfig(ignore=["lm_head", "down_proj"]))
    for layer in model.model.layers:
        weight = dense_float8(layer.mlp.down_proj.weight.detach(), "dynamic")
        layer.mlp.down_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = {name: type(value) for name, value in model.named_parameters()}
    assert {name: type(value) for name, value in back.named_parameters()} == kinds and len(set(kinds.values())) == 3
    assert same(back, model)


def test_tied_embeddings_stay_one_tensor(tmp_path):
    model = convert(qwen3())
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.lm_head.weight is back.model.embed_tokens.weight


def test_the_model_without_its_head(checkpoint):
    model, folder, batch = checkpoint
    back = AutoModel.from_pretrained(folder)
    assert torch.equal(call(back, batch), call(model.model, batch))


def test_a_layer_in_another_dtype_than_the_model(tmp_path):
    """T5 keeps some layers in float32 when loaded in float16."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    model = convert(T5ForConditionalGeneration.from_pretrained(tmp_path / "dense", dtype=torch.float16))
    model.save_pretrained(tmp_path / "packed")
    back = T5ForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=torch.float16)
    layer = back.encoder.block[0].layer[1].DenseReluDense
    assert (layer.wi.weight.dtype, layer.wo.weight.dtype) == (torch.float16, torch.float32)
    assert {type(layer.wi.weight), type(layer.wo.weight)} == {Float8Sparse24Tensor}
    assert same(back, model)


# converting while loading


@pytest.mark.parametrize("build", [llama, qwen3])
def test_from_pretrained_converts(tmp_path, build):
    dense = build()
    dense.save_pretrained(tmp_path / "dense")
    config = HWPQTransformersConfig(ignore=["lm_head", "down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert same(model, convert(dense, config=HWPQConfig(ignore=["lm_head", "down_proj"])))
    assert len(hwpq_fx.report(model).converted) == 12
    model.save_pretrained(tmp_path / "packed")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)


def test_the_config_takes_a_config_or_its_fields():
    assert HWPQTransformersConfig(HWPQConfig(lam=1.0)).config == HWPQTransformersConfig(lam=1.0).config
    with pytest.raises(ConfigError, match="not both"):
        HWPQTransformersConfig(HWPQConfig(), lam=1.0)
    with pytest.raises(ConfigError, match="saliency"):
        HWPQTransformersConfig(saliency="wanda")
    with pytest.raises(TypeError, match="salience"):
        HWPQTransformersConfig(salience="magnitude")


# checkpoints that are refused


def broken(folder, tmp_path, change=None, edit=None):
    """A copy of the checkpoint, its tensors after `change`, its quantization_config after `edit`."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if change:
        change(tensors)
    if edit:
        edit(config["quantization_config"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def set_part(part, value):
    def change(tensors):
        tensor = tensors[KEY.format(part)]
        (tensor.view(torch.uint8) if part != "scale" else tensor)[3, 0] = value

    return change


def replace(part, tensor):
    return lambda tensors: tensors.__setitem__(KEY.format(part), tensor)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("sparse_metadata", set_part("sparse_metadata", 0x45)),
        ("qdata", set_part("qdata", 0xFF)),
        ("scale", set_part("scale", float("nan"))),
        ("scale", set_part("scale", 0.0)),
        ("sparse_metadata", replace("sparse_metadata", torch.full((128, 9), 0x44, dtype=torch.uint8))),
        ("scale", replace("scale", torch.ones(128, 1, dtype=torch.float16))),
        ("qdata", lambda tensors: tensors.pop(KEY.format("qdata"))),
        ("sparse_metadata", lambda tensors: tensors.pop(KEY.format("sparse_metadata"))),
        ("scale", lambda tensors: tensors.pop(KEY.format("scale"))),
    ],
)
def test_bad_parts_are_refused_by_name(checkpoint, tmp_path, part, change):
    with pytest.raises(CheckpointError, match=KEY.format(part)):
        AutoModelForCausalLM.from_pretrained(broken(checkpoint[1], tmp_path, change))


def drop(tensors):
    for part in ("qdata", "sparse_metadata", "scale"):
        del tensors[KEY.format(part)]


def shrink(tensors):
    for part in ("qdata", "sparse_metadata", "scale"):
        tensors[KEY.format(part)] = tensors[KEY.format(part)][:64].contiguous()


def test_a_layer_that_is_missing_or_of_another_size(checkpoint, tmp_path):
    folder = broken(checkpoint[1], tmp_path, drop)
    with pytest.raises(CheckpointError, match=r"up_proj\._weight_qdata is missing"):
        AutoModelForCausalLM.from_pretrained(folder)
    folder = broken(checkpoint[1], tmp_path, shrink)
    # transformers 5.23 looks at sizes itself, 5.17 does not for a quantized model
    with pytest.raises((RuntimeError, CheckpointError), match=r"(?i)size|\(64, 32\)"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"up_proj\._weight_qdata"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


NORM = {"format": "fp8", "activation": "none"}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c.update(format_version=2), "format_version 2"),
        (lambda c: c.pop("format_version"), "format_version None"),
        (lambda c: c.pop("layers"), "layers"),
        (lambda c: c["config"].update(salience=1), "salience"),
        (lambda c: c["config"].update(saliency="wanda"), "saliency"),
        (lambda c: c["layers"]["model.layers.0.mlp.up_proj.weight"].update(format="int4"), r"up_proj\.weight: .*int4"),
        (lambda c: c["layers"].update({"model.norm.weight": NORM}), r"model\.norm\.weight: it is 1-D"),
    ],
)
def test_bad_configs_are_refused(checkpoint, tmp_path, edit, says):
    with pytest.raises(CheckpointError, match=says):
        AutoModelForCausalLM.from_pretrained(broken(checkpoint[1], tmp_path, None, edit))


def test_pickles_are_not_read(checkpoint, tmp_path):
    _, folder, _ = checkpoint
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_the_old_checkpoint(checkpoint, tmp_path, monkeypatch):
    import transformers.modeling_utils

    model, _, _ = checkpoint
    folder = tmp_path / "out"
    hwpq_fx.save_pretrained(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save, calls = transformers.modeling_utils.safe_save_file, []

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(*args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", second_fails)
    with pytest.raises(KeyboardInterrupt):
        hwpq_fx.save_pretrained(model, folder, max_shard_size="40KB")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    monkeypatch.undo()
    hwpq_fx.save_pretrained(model, folder, max_shard_size="40KB")
    assert not (folder / "model.safetensors").exists()
    assert same(AutoModelForCausalLM.from_pretrained(folder), model)


def test_metadata_is_json(checkpoint):
    with safe_open(checkpoint[1] / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and len(json.loads(metadata["hwpq_fx.report"])["layers"]) == 15


# what one does with a loaded model


def test_generate_with_a_compiled_static_cache(checkpoint):
    from transformers import CompileConfig

    _, folder, _ = checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.randint(2, VOCABULARY, (1, 6))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(prompt, **settings)
    compiled = CompileConfig(backend="hwpq", fullgraph=False)
    compiled._compile_all_devices = True  # on the CPU too
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = model.generate(prompt, cache_implementation="static", compile_config=compiled, **settings)
    assert torch.equal(found, expected) and found.shape == (1, 11)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w1")


def test_pipeline(checkpoint, tmp_path):
    from transformers import pipeline

    model, _, _ = checkpoint
    hwpq_fx.save_pretrained(model, tmp_path)
    tokenizer().save_pretrained(tmp_path)
    hwpq_fx.save_pretrained(model, tmp_path)  # the tokenizer stays
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    (found,) = pipeline("text-generation", str(tmp_path), device="cpu")("w5 w6 w7", return_full_text=False, **settings)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), **settings)[0, 3:]
    assert found["generated_text"].split() == [f"w{token}" for token in tokens]


def test_trainer_evaluates(checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    _, folder, _ = checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, VOCABULARY, (4, 8))]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    batch = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        assert found == pytest.approx(model(input_ids=batch, labels=batch).loss.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
def test_lora_trains_and_the_packed_weights_stay(checkpoint, tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig, PeftModel, get_peft_model

    _, folder, batch = checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: value.clone() for name, value in bits(model).items()}
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj", "down_proj"]))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(trained) == 12 and all(bool(parameter.grad.any()) for parameter in trained)
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in bits(model).items() if "lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    tuned.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert torch.equal(call(again, batch), call(tuned, batch))


# registration


def test_transformers_is_imported_by_neither_side():
    script = textwrap.dedent(
        """
        import sys
        import hwpq_fx
        from hwpq_fx.checkpoint import attach
        import torch
        model = hwpq_fx.convert(torch.nn.Sequential(torch.nn.Linear(16, 16)).eval())
        assert not any(name.partition(".")[0] == "transformers" for name in sys.modules)
        import transformers.quantizers.auto as auto
        assert auto.__spec__.loader is auto.__loader__ and type(auto.__loader__).__module__ != "hwpq_fx.on_import"
        assert auto.AUTO_QUANTIZER_MAPPING["hwpq_fx"].__module__ == "hwpq_fx.transformers_quantizer"
        assert hwpq_fx.HWPQTransformersConfig is auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hwpq_fx"]
        """
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_transformers_may_come_first():
    script = (
        "import transformers.quantizers.auto as auto; import hwpq_fx; assert 'hwpq_fx' in auto.AUTO_QUANTIZER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_an_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'HWPQTransformerConfig'"):
        hwpq_fx.HWPQTransformerConfig  # noqa: B018


def test_models_inside_others_can_be_saved(tmp_path):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, **batch):
            return self.inner(**batch)

    model = convert(Wrapper().eval())
    model.inner.save_pretrained(tmp_path)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model.inner)
    assert Path(tmp_path / "config.json").exists()
