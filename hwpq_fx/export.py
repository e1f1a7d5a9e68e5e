"""Ordinary dense checkpoints of converted models, zeros in place, for engines that know nothing of 2:4."""

import copy
import os
from typing import Any

import torch
from torch import nn
from torchao.quantization import Float8Tensor
from torchao.utils import TorchAOBaseTensor

from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.kernels.pack24 import unpack24
from hwpq_fx.passes.dynamo import unwrap

from .errors import ConfigError, ModelError
from .folder import whole_folder

FORMATS = ("dense", "fp8")


def export(model: Any, directory: str | os.PathLike[str], format: str = "dense", **options: Any) -> None:
    """Write the converted transformers `model` to `directory` as an ordinary checkpoint.

    format: "dense" writes every weight in its own dtype, bfloat16 for a bfloat16 model; "fp8" writes the converted
    ones as FP8 with a scale per output row, in compressed-tensors' "float-quantized" form, bit for bit the packed
    values and scales. options are `save_pretrained`'s (max_shard_size, ...). The dense tensors are all in memory at
    once. A folder that exists is replaced as by `hwpq_fx.save_pretrained`.

    Raises ConfigError for another format, ModelError for a model that cannot be exported.
    """
    from transformers import PreTrainedModel

    from .transformers_quantizer import forget_quantization

    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not known; choose one of {', '.join(map(repr, FORMATS))}")
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"only transformers models are exported, not {type(model).__name__}")
    packed = {name: weight for name, weight in model.named_parameters() if isinstance(weight, TorchAOBaseTensor)}
    if not packed:
        raise ModelError("the model holds no converted weight")
    config = copy.deepcopy(model.config)
    forget_quantization(config)
    if format == "fp8":
        config.quantization_config = _compressed_tensors(model, packed)
    tensors = model.state_dict()
    for name, weight in tensors.items():
        if isinstance(weight, TorchAOBaseTensor):
            tensors[name] = _values(weight) if format == "fp8" else weight.dequantize()
    if format == "fp8":
        tensors |= {f"{name}_scale": weight.scale for name, weight in packed.items()}
    # a model of the same class that was never converted writes it, so that names, ties and configs are as usual
    with torch.device("meta"):
        plain: Any = type(model)(config)
        plain.to(model.dtype)
    plain.generation_config = getattr(model, "generation_config", None)
    plain._weight_conversions = getattr(model, "_weight_conversions", None)
    with whole_folder(directory) as partial:
        plain.save_pretrained(partial, state_dict=tensors, **options)


def _values(weight: torch.Tensor) -> torch.Tensor:
    """e4m3 [N, K]."""
    if isinstance(weight, Float8Sparse24Tensor):
        return unpack24(weight.qdata, weight.sparse_metadata)
    assert isinstance(weight, Float8Tensor)
    return weight.qdata


def _compressed_tensors(model: nn.Module, packed: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The quantization_config of compressed-tensors' "float-quantized" format: FP8 weights with a scale per row and,
    where the model quantizes its activations, FP8 activations with a scale per token. Raises ModelError."""
    activations: dict[str, bool] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, weight in packed.items():
        layer = name.removesuffix(".weight")
        if layer not in linears or not name.endswith(".weight"):
            raise ModelError(f"{name} is not the weight of an nn.Linear, which is all that fp8 is for: export it dense")
        if isinstance(weight, Float8Sparse24Tensor):
            activations[layer] = weight.activation == "dynamic"
        elif isinstance(weight, Float8Tensor) and weight.scale.shape == (len(weight), 1):
            activations[layer] = weight.act_quant_kwargs is not None
        else:
            raise ModelError(f"{name} is a {type(weight).__name__} without a scale per row: export it dense")
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    groups = {}
    for index, dynamic in enumerate(sorted(set(activations.values()), reverse=True)):
        names = [layer for layer, one in activations.items() if one == dynamic]
        groups[f"group_{index}"] = {
            # the class, as engines are used to, where all are alike
            "targets": ["Linear"] if len(names) == len(activations) else names,
            "weights": numbers | {"strategy": "channel", "dynamic": False},
            "input_activations": numbers | {"strategy": "token", "dynamic": True} if dynamic else None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in activations],
    }
