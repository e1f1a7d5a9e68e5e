"""What transformers alone would not save: parts of models, models of which a part was converted, what `quantize_`
packed. And dense models again."""

import json

import pytest
import torch
import transformers
from torch import nn
from torchao.quantization import quantize_
from transformers import AutoModel, AutoModelForCausalLM

import hwpq_fx
from hwpq_fx import Float8Sparse24Tensor, HWPQConfig, convert
from models import call, llama, tokens


def quantized():
    model = llama()
    quantize_(model, HWPQConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    return model


def enclosing():
    model = llama()
    convert(model.model, [tokens()])
    return model


def around_a_plain_part():
    model = llama()
    convert(model.model.layers[0].mlp, [torch.randn(3, 64)])
    return model


def packed(model):
    return [name for name, weight in model.named_parameters() if isinstance(weight, Float8Sparse24Tensor)]


@pytest.mark.parametrize("build", [quantized, enclosing, around_a_plain_part])
def test_it_comes_back_as_it_was(build, tmp_path):
    model, batch = build(), tokens()
    hwpq_fx.save_pretrained(model, tmp_path / "saved")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert packed(back) == packed(model) != []
    assert torch.equal(call(back, batch), call(model, batch))
    # from now on transformers knows how
    model.save_pretrained(tmp_path / "again")
    assert packed(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) == packed(model)


def test_a_part_alone_and_then_the_whole(tmp_path):
    batch = tokens()
    model = convert(llama(), [batch])
    hwpq_fx.save_pretrained(model.model, tmp_path / "part")
    back = AutoModel.from_pretrained(tmp_path / "part")
    assert len(packed(back)) == 14
    assert torch.equal(call(back, batch), call(model.model, batch))
    # the two share a config
    model.save_pretrained(tmp_path / "whole")
    told = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert all(name.startswith("model.") for name in told["quantization_config"]["layers"])
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(call(back, batch), call(model, batch))


def test_the_config_of_the_conversion_is_kept(tmp_path):
    model = llama()
    convert(model.model, [tokens()], HWPQConfig(layout="packed", activation="none"))
    hwpq_fx.save_pretrained(model, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config"]
    assert (told["layout"], told["activation"]) == ("packed", "none")


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PARTS = {  # of a model, how many packed weights they have
    "CLIP": {"Model": 26, "TextModel": 12, "VisionModel": 12, "TextModelWithProjection": 13},
    "Siglip": {"Model": 29, "TextModel": 13, "VisionModel": 16},
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_reads_the_checkpoint_of_the_whole(kind, tmp_path):
    text = SIZES | {"vocab_size": 64, "max_position_embeddings": 16, "projection_dim": 16}
    vision = SIZES | {"image_size": 16, "patch_size": 8, "projection_dim": 16}
    projected = {"projection_dim": 16} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **projected)
    whole = convert(getattr(transformers, f"{kind}Model")(config).eval())
    whole.save_pretrained(tmp_path / "whole")
    weights = [weight.dequantize() for weight in whole.parameters() if isinstance(weight, Float8Sparse24Tensor)]
    for name, count in PARTS[kind].items():
        part, told = getattr(transformers, kind + name).from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not told["missing_keys"] and len(packed(part)) == count
        found = [weight.dequantize() for weight in part.parameters() if isinstance(weight, Float8Sparse24Tensor)]
        assert all(any(one.equal(other) for other in weights) for one in found)
        part.save_pretrained(tmp_path / name)
        assert packed(type(part).from_pretrained(tmp_path / name)) == packed(part)
    hwpq_fx.export(whole, tmp_path / "dense")
    whole.dequantize().save_pretrained(tmp_path / "again")
    for folder in ("dense", "again"):
        assert "quantization_config" not in (tmp_path / folder / "config.json").read_text()


def test_on_the_meta_device(tmp_path):
    convert(llama()).save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="meta")
    assert len(packed(back)) == 14 and all(weight.is_meta for weight in back.parameters())


def test_what_others_quantized_is_left_to_them(tmp_path):
    model = llama()
    model.hf_quantizer = other = object()
    convert(model.model.layers[0].mlp)
    from hwpq_fx.transformers_quantizer import attach_missing

    attach_missing(model)
    assert model.hf_quantizer is other


def test_a_dense_model_is_saved_as_ever(tmp_path):
    hwpq_fx.save_pretrained(llama(), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_export_after_quantize(tmp_path):
    model = quantized()
    hwpq_fx.export(model, tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(back.model.layers[0].mlp.up_proj.weight, weight.dequantize())


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_dense_again(sparsity, tmp_path):
    batch = tokens()
    model = convert(torch.compile(llama()), [batch], HWPQConfig(sparsity=sparsity, activation="none", layout="packed"))
    values = {name: weight.dequantize() for name, weight in model._orig_mod.named_parameters()
              if isinstance(weight, hwpq_fx.kernels.packed.TorchAOBaseTensor)}  # fmt: skip
    with torch.no_grad():
        before = model(**batch).logits
    dense = model._orig_mod.dequantize()
    assert len(values) == 14
    for name, weight in dense.named_parameters():
        assert type(weight) is nn.Parameter and (name not in values or torch.equal(weight, values[name]))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="not converted"):
        hwpq_fx.report(model)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    saved = dense.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in back.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_again_in_its_own_dtype(dtype):
    model = convert(llama().to(dtype))
    assert model.dequantize().model.layers[0].mlp.up_proj.weight.dtype == dtype
    model = convert(llama().to(dtype))
    model.dequantize(dtype=torch.float16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
