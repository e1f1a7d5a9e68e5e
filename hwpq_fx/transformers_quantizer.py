"""Converted models in transformers: `save_pretrained` and `from_pretrained` know the method "hwpq_fx".

While a checkpoint loads, the skeleton holds the stored parts of each packed weight as parameters of their own, under
the names they have in the files. So transformers' loader does with them what it does with any parameter (shards,
devices, threads), and knows nothing of tensor subclasses; afterwards the parts are put together. Of transformers this
uses what it offers to quantizers, how it renames what a part of a model reads of the whole (`PrefixChange`), and one
private flag (`_is_hf_initialized`). Tried on transformers 5.17 and 5.23.

Imported when `transformers.quantizers.auto` is (`on_import`), which is when somebody loads a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchao.utils import TorchAOBaseTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hwpq_fx.kernels import Float8Sparse24Tensor

from .checkpoint import (
    DTYPES,
    FORMAT_VERSION,
    PARTS,
    Stored,
    check_headers,
    check_version,
    component,
    join,
    split,
    table_from_json,
    table_to_json,
)
from .config import HWPQConfig
from .conversion import convert
from .errors import CheckpointError, ConfigError
from .report import ATTRIBUTE, Report, attach_report
from .report import REPORT_METADATA as REPORT

if TYPE_CHECKING:  # this module is imported in the middle of theirs
    from transformers import PreTrainedConfig, PreTrainedModel

METHOD = "hwpq_fx"
LOADED = "_is_hf_initialized"  # transformers sets it on every parameter that a checkpoint had


@register_quantization_config(METHOD)
class HWPQTransformersConfig(QuantizationConfigMixin):
    """For `from_pretrained(..., quantization_config=...)`: convert the model, without calibration, once it is loaded.

    Takes a `HWPQConfig` or its fields by name. Also what config.json of a converted model holds; the other arguments
    are for that. Raises ConfigError or CheckpointError.
    """

    def __init__(
        self,
        config: HWPQConfig | None = None,
        *,
        layers: dict[str, Stored] | None = None,
        **fields: Any,
    ):
        if config is not None and fields:
            raise ConfigError("give a HWPQConfig or its fields, not both")
        self.quant_method: Any = METHOD  # they have an enum, of their own methods
        self.config = config or HWPQConfig(**fields)
        self.layers = layers or {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Of config.json's "quantization_config". Raises CheckpointError."""
        check_version(config_dict.get("format_version"))
        try:
            config = HWPQConfig(**config_dict["config"])
            made = cls(config, layers=table_from_json(config_dict["layers"]))
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"quantization_config: {type(error).__name__}: {error}") from error
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "format_version": FORMAT_VERSION,
            "config": asdict(self.config),
            "layers": table_to_json(self.layers),
        }


@register_quantizer(METHOD)
class HWPQQuantizer(HfQuantizer):
    """Loads and saves models whose linears hold packed weights."""

    quantization_config: HWPQTransformersConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        self.metadata = check_headers(checkpoint_files or (), self.quantization_config.layers)
        self.holes: dict[str, tuple[nn.Module, str]] = {}
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        prefix = f"{model.base_model_prefix}."
        changes = [one for one in get_model_conversion_mapping(model) if isinstance(one, PrefixChange)]
        for saved, stored in self.quantization_config.layers.items():
            # the model that was saved may have been this one with a head or without, or one that it is a part of
            part = reduce(lambda name, change: change.rename_source_key(name)[0], changes, saved)
            possible = (saved, prefix + saved, saved.removeprefix(prefix), part)
            name = next((name for name in possible if name in names), None)
            if name is not None:
                self.holes[saved] = _take_apart(model, name, stored)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError("packed weights are not offloaded: choose a device_map without disk, or cpu beside a GPU")
        if not self.pre_quantized:
            convert(model, None, self.quantization_config.config)
            return
        for saved, hole in self.holes.items():
            _put_together(saved, self.quantization_config.layers[saved], *hole, self.quantization_config.config.layout)
        if REPORT in self.metadata:
            attach_report(model, _report_of(model, self.metadata[REPORT]))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes; brings the config, which it writes next, up to date."""
        flat, self.quantization_config.layers = split(model.state_dict(), model.dtype)
        for config in _configs_in(model.config):  # a part that was saved alone shares it, or has one of its own in it
            config.quantization_config = self.quantization_config
        made = model.__dict__.get(ATTRIBUTE)
        return flat, {} if made is None else {REPORT: json.dumps(made.to_dict())}

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """`model.dequantize()`: dense weights with the zeros in place, in their own dtype or `dtype`, and an ordinary
        model again."""
        for owner in model.modules():
            for name, weight in owner.named_parameters(recurse=False):
                if isinstance(weight, TorchAOBaseTensor):
                    owner.register_parameter(name, nn.Parameter(weight.dequantize().to(dtype or weight.dtype)))
        model.__dict__.pop(ATTRIBUTE, None)
        self.remove_quantization_config(model)
        forget_quantization(model.config)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks this of a model without adapters, to evaluate it as well. What is not packed can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: nn.Module, config: HWPQConfig) -> None:
    """Tell transformers how to save the models found in `model`, which has just been converted: itself, or the ones
    that it wraps."""
    for found in _models_in(model):
        _attach(found, config)


def attach_missing(model: nn.Module) -> None:
    """The same for models whose weights were packed by `quantize_`, or as a part of another model, or whose parts
    were."""
    for found in _models_in(model):
        packed = any(isinstance(weight, Float8Sparse24Tensor) for weight in found.parameters())
        if packed and getattr(found, "hf_quantizer", None) is None:
            known = getattr(found.config, "quantization_config", None)  # parts share it
            _attach(found, known.config if isinstance(known, HWPQTransformersConfig) else HWPQConfig())


def forget_quantization(config: PreTrainedConfig) -> None:
    """Make it that of a dense model."""
    for part in _configs_in(config):
        vars(part).pop("quantization_config", None)  # none after quantize_


def _configs_in(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A model's config and those of its parts: CLIPTextModel reads a CLIPModel's checkpoint, and that part's config."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _configs_in(part)


def _models_in(model: nn.Module) -> Iterator[PreTrainedModel]:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _models_in(child)


def _attach(model: PreTrainedModel, config: HWPQConfig) -> None:
    saved = HWPQTransformersConfig(config)
    model.config.quantization_config = saved
    # what from_pretrained sets
    told: Any = model
    told.hf_quantizer = HWPQQuantizer(saved, pre_quantized=True)
    told.is_quantized, told.quantization_method = True, METHOD


def _take_apart(model: PreTrainedModel, name: str, stored: Stored) -> tuple[nn.Module, str]:
    """Put empty parts in the place of a parameter of the skeleton; its owner and its name there."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    parameter = owner.get_parameter(attribute)
    try:
        parts = stored.parts(parameter.shape)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    owner.register_parameter(attribute, None)  # keeps its place among the parameters
    # models' own initializers reach for it: no parameter, and marked as loaded, it is left alone
    placeholder = parameter.detach()
    setattr(placeholder, LOADED, True)
    vars(owner)[attribute] = placeholder
    for part, (shape, dtype) in parts.items():
        empty = torch.empty(shape, dtype=dtype, device="meta")
        owner.register_parameter(component(attribute, part), nn.Parameter(empty, requires_grad=False))
    return owner, attribute


def _put_together(saved: str, stored: Stored, owner: nn.Module, attribute: str, layout: str) -> None:
    parts = {}
    for part in PARTS[stored.format]:
        parameter = owner.get_parameter(component(attribute, part))
        if not getattr(parameter, LOADED, False):
            raise CheckpointError(
                f"{component(saved, part)} is missing from the checkpoint, or has another shape there"
            )
        # transformers casts to float32 where a model wants a module in that
        parts[part] = parameter.detach().to(DTYPES[part])
    placeholder = vars(owner).pop(attribute)
    weight = join(saved, parts, stored, placeholder.shape, placeholder.dtype)
    if isinstance(weight, Float8Sparse24Tensor) and layout == "fastest":
        weight = weight.expand()
    for part in parts:
        delattr(owner, component(attribute, part))
    owner.register_parameter(attribute, nn.Parameter(weight, requires_grad=False))


def _report_of(model: PreTrainedModel, text: str) -> Report:
    """The report of the conversion, with what is different on this machine. Raises CheckpointError."""
    try:
        made = Report.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the report in the checkpoint cannot be read: {error}") from error
    weights = {name.removesuffix(".weight"): weight for name, weight in model.named_parameters()}
    for line in made.converted:
        weight = weights.get(line.name)
        if isinstance(weight, Float8Sparse24Tensor):
            line.layout_bytes, line.paths = weight.layout_nbytes(), weight.paths()
    return made
