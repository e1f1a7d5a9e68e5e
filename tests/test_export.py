"""Dense checkpoints that other engines read: values, scales, names, ties."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hwpq_fx
from hwpq_fx import ConfigError, Float8Sparse24Tensor, HWPQConfig, ModelError, convert, export
from hwpq_fx.kernels.pack24 import unpack24
from models import MODELS, call, gpt2, llama, mlp, qwen3, tokens


def stored(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def packed(model):
    return {name: one for name, one in model.named_parameters() if isinstance(one, Float8Sparse24Tensor)}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_dense(name, tmp_path):
    dense = MODELS[name][0]().to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "before")
    model = convert(dense)
    config = json.dumps(model.config.to_dict(), default=str)
    export(model, tmp_path / "after")
    assert json.dumps(model.config.to_dict(), default=str) == config
    before, after = stored(tmp_path / "before"), stored(tmp_path / "after")
    # the same checkpoint but for the values of what was converted
    assert {key: (one.shape, one.dtype) for key, one in before.items()} == {
        key: (one.shape, one.dtype) for key, one in after.items()
    }
    assert (tmp_path / "before" / "config.json").read_text() == (tmp_path / "after" / "config.json").read_text()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == len(packed(model)) == MODELS[name][2]
    back = type(model).from_pretrained(tmp_path / "after")
    for key, weight in packed(model).items():
        assert torch.equal(back.get_parameter(key), weight.dequantize())
        along = back.get_parameter(key).t() if weight.transposed else back.get_parameter(key)
        assert bool((along.reshape(len(along), -1, 4).ne(0).sum(-1) <= 2).all())


@pytest.mark.parametrize("activation", ["dynamic", "none"])
def test_fp8_is_what_was_packed_bit_for_bit(tmp_path, activation):
    model = convert(llama().to(torch.bfloat16), config=HWPQConfig(activation=activation))
    export(model, tmp_path, "fp8", max_shard_size="60KB")
    tensors = stored(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for key, weight in packed(model).items():
        values = unpack24(weight.qdata, weight.sparse_metadata)
        assert tensors[key].dtype is torch.float8_e4m3fn
        assert torch.equal(tensors[key].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(tensors[key + "_scale"], weight.scale)
    assert len(packed(model)) == 14 and tensors["lm_head.weight"].dtype is torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors", "float-quantized", ["lm_head"],
    )  # fmt: skip
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["weights"]["strategy"] == "channel"
    assert (group["input_activations"] is None) == (activation == "none")


def test_compressed_tensors_reads_it(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy

    model = convert(qwen3())
    export(model, tmp_path, "fp8")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    del config["quant_method"]
    read = QuantizationConfig.model_validate(config)
    scheme = read.config_groups["group_0"]
    assert scheme.weights.strategy == QuantizationStrategy.CHANNEL and scheme.input_activations.dynamic
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    held = {name: value for name, value in back.state_dict().items() if value.dtype is torch.float8_e4m3fn}
    assert held.keys() == packed(model).keys()
    for key, weight in packed(model).items():
        values = unpack24(weight.qdata, weight.sparse_metadata)
        assert torch.equal(held[key].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(back.state_dict()[key + "_scale"], weight.scale)
    batch = tokens()
    logits = call(back, batch)  # which decompresses the weights
    for key, weight in packed(model).items():
        assert torch.equal(back.get_parameter(key), weight.dequantize())
    torch.testing.assert_close(logits, call(model, batch), rtol=0, atol=0.1)


def test_unstructured_zeros(tmp_path):
    model = convert(llama(), config=HWPQConfig(sparsity=0.5))
    export(model, tmp_path / "dense")
    export(model, tmp_path / "fp8", "fp8")
    key = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(key)
    assert torch.equal(stored(tmp_path / "dense")[key], weight.dequantize())
    fp8 = stored(tmp_path / "fp8")
    assert torch.equal(fp8[key].view(torch.uint8), weight.qdata.view(torch.uint8))
    assert torch.equal(fp8[key + "_scale"], weight.scale)


def test_layers_with_and_without_activations_are_two_groups(tmp_path):
    model = convert(llama())
    weight = model.model.layers[0].mlp.up_proj.weight
    other = torch.nn.Parameter(weight.replaced(activation="none"), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = other
    export(model, tmp_path, "fp8")
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups["group_0"]["targets"]) == 13 and groups["group_0"]["input_activations"]
    assert groups["group_1"]["targets"] == ["model.layers.0.mlp.up_proj"]
    assert groups["group_1"]["input_activations"] is None


def test_a_compiled_model_and_a_folder_that_exists(tmp_path):
    model = convert(torch.compile(llama(), backend="eager"))
    hwpq_fx.save_pretrained(model, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("kept")
    export(model, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(back.config, "quantization_config")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "kept"


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(ConfigError, match="'int8' is not known"):
        export(convert(llama()), tmp_path, "int8")
    with pytest.raises(ModelError, match="no converted weight"):
        export(llama(), tmp_path)
    with pytest.raises(ModelError, match="not Sequential"):
        export(convert(mlp()), tmp_path)
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn\.c_attn\.weight is not the weight of an nn\.Linear"):
        export(convert(gpt2()), tmp_path, "fp8")
    assert list(tmp_path.iterdir()) == []
