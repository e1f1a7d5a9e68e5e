"""Packed weights in a checkpoint: plain tensors beside each other, and a table that says what they are.

A weight `a.b.weight` is stored as `a.b._weight_qdata`, `a.b._weight_sparse_metadata` and `a.b._weight_scale` (torchao's
way to name the parts of a tensor subclass); the derived layouts are not. Everything here is data: shapes, dtypes, JSON.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from safetensors import safe_open
from torchao.quantization import Float8Tensor

from hwpq_fx.kernels import FORMAT_K, Float8Sparse24Tensor
from hwpq_fx.kernels.packed import ACTIVATIONS
from hwpq_fx.kernels.quantize_rows import E4M3
from hwpq_fx.passes.dynamo import unwrap

from .config import HWPQConfig
from .errors import CheckpointError
from .float8 import dense_float8

FORMAT_VERSION = 1
SPARSE24, FP8 = "sparse24_fp8", "fp8"
PARTS = {SPARSE24: ("qdata", "sparse_metadata", "scale"), FP8: ("qdata", "scale")}
DTYPES = {"qdata": E4M3, "sparse_metadata": torch.uint8, "scale": torch.float32}
SAFETENSORS_DTYPES = {"qdata": "F8_E4M3", "sparse_metadata": "U8", "scale": "F32"}
COMPONENT = re.compile(r"(?P<owner>(?:.*\.)?)_(?P<attribute>\w+)_(?P<part>qdata|sparse_metadata|scale)")


@dataclass(frozen=True)
class Stored:
    """What the parts of one weight are."""

    format: str
    """"sparse24_fp8" (2:4) or "fp8" (dense FP8 with a scale per row)."""
    activation: str
    """"dynamic" or "none"."""
    transposed: bool = False
    """Whether the parameter shows [in_features, out_features]."""
    dtype: str = ""
    """That of the weight, "float32", where it is not the model's."""

    def __post_init__(self) -> None:
        if self.format not in PARTS or self.activation not in ACTIVATIONS or not isinstance(self.transposed, bool):
            raise CheckpointError(f"{asdict(self)} describes no weight that this version knows")
        if self.dtype:
            dtype_named(self.dtype)
        if self.format == FP8 and self.transposed:
            raise CheckpointError("a dense FP8 weight is never transposed")

    def parts(self, shape: Iterable[int]) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of every part of a parameter that shows `shape`. Raises CheckpointError for a shape that
        has none."""
        sizes = tuple(shape)
        if len(sizes) != 2:
            raise CheckpointError(f"it is {len(sizes)}-D in this model, packed weights are 2-D")
        rows, cols = sizes[::-1] if self.transposed else sizes
        if self.format == FP8:
            return {"qdata": ((rows, cols), E4M3), "scale": ((rows, 1), torch.float32)}
        if cols % FORMAT_K:
            raise CheckpointError(f"it has {cols} inputs in this model, packed weights a multiple of {FORMAT_K}")
        shapes = {"qdata": (rows, cols // 2), "sparse_metadata": (rows, cols // FORMAT_K), "scale": (rows, 1)}
        return {part: (shapes[part], DTYPES[part]) for part in PARTS[SPARSE24]}


def dtype_named(name: str) -> torch.dtype:
    """torch.bfloat16 of "bfloat16". Raises CheckpointError."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{name!r} is not a floating point dtype")
    return dtype


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def component(name: str, part: str) -> str:
    """Where a part of the parameter `name` is stored: "a.weight", "scale" -> "a._weight_scale"."""
    owner, dot, attribute = name.rpartition(".")
    return f"{owner}{dot}_{attribute}_{part}"


def split(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, Stored]]:
    """A state dict without packed weights: their parts in their place, and what those are, by parameter.

    dtype: that of the model. Raises CheckpointError for a tensor subclass that this format does not know.
    """
    flat: dict[str, torch.Tensor] = {}
    table = {}
    for name, tensor in tensors.items():
        stored = _stored(name, tensor, dtype)
        if stored is None:
            flat[name] = tensor
            continue
        table[name] = stored
        flat |= {component(name, part): getattr(tensor, part) for part in PARTS[stored.format]}
    return flat, table


def _stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> Stored | None:
    own = "" if tensor.dtype == dtype else name_of(tensor.dtype)
    if isinstance(tensor, Float8Sparse24Tensor):
        return Stored(SPARSE24, tensor.activation, tensor.transposed, own)
    if isinstance(tensor, Float8Tensor):
        stored = Stored(FP8, "none" if tensor.act_quant_kwargs is None else "dynamic", dtype=own)
        if _same_kind(tensor, stored):
            return stored
    elif type(tensor) in (torch.Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return None
    raise CheckpointError(f"{name}: a {type(tensor).__name__} like this one cannot be saved in this format")


def _same_kind(tensor: Float8Tensor, stored: Stored) -> bool:
    """Whether the weight is one that `dense_float8` makes."""
    like = _float8(tensor.qdata, tensor.scale, stored, tensor.dtype)
    names = ("block_size", "mm_config", "act_quant_kwargs")
    return tensor.scale.shape == (len(tensor), 1) and all(getattr(like, one) == getattr(tensor, one) for one in names)


def _float8(qdata: torch.Tensor, scale: torch.Tensor, stored: Stored, dtype: torch.dtype) -> Float8Tensor:
    like = dense_float8(torch.zeros(16, 16, dtype=dtype, device=qdata.device), stored.activation)
    kinds = (like.mm_config, like.act_quant_kwargs, like.kernel_preference)
    return Float8Tensor(qdata, scale, [1, qdata.shape[1]], *kinds, dtype)


def join(
    name: str, parts: Mapping[str, torch.Tensor], stored: Stored, shape: Iterable[int], dtype: torch.dtype
) -> torch.Tensor:
    """The weight `name` of its parts, checked, without a layout (`expand`). It has to show `shape`; `dtype` is the
    model's.

    Raises CheckpointError, with the part's name, for a shape, dtype or value that it cannot have.
    """
    for part, (size, kind) in stored.parts(shape).items():
        found = parts[part]
        if found.shape != size or found.dtype != kind:
            raise CheckpointError(f"{component(name, part)} is {tuple(found.shape)} {found.dtype}, not {size} {kind}")
    qdata, scale = parts["qdata"], parts["scale"]
    dtype = dtype_named(stored.dtype) if stored.dtype else dtype
    if not qdata.is_meta:  # there are no values then
        _check_values(name, parts)
    if stored.format == FP8:
        return _float8(qdata, scale, stored, dtype)
    return Float8Sparse24Tensor(qdata, parts["sparse_metadata"], scale, stored.activation, stored.transposed, dtype)


def _check_values(name: str, parts: Mapping[str, torch.Tensor]) -> None:
    qdata, scale = parts["qdata"], parts["scale"]
    if bool(((qdata.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise CheckpointError(f"{component(name, 'qdata')} holds NaN")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(f"{component(name, 'scale')} holds a scale that is not a positive finite number")
    if "sparse_metadata" in parts and (where := bad_pattern(parts["sparse_metadata"])) is not None:
        raise CheckpointError(
            f"{component(name, 'sparse_metadata')} at {where}: the two indices of a group of four are repeated or out "
            "of order"
        )


def bad_pattern(sparse_metadata: torch.Tensor) -> tuple[int, int] | None:
    """Where a nibble of the metadata is none of the six patterns (`kernels.pack24`), the first such byte."""
    low, high = sparse_metadata & 0xF, sparse_metadata >> 4
    bad = ((low & 3) >= (low >> 2)) | ((high & 3) >= (high >> 2))
    if not bool(bad.any()):
        return None
    row, col = bad.nonzero()[0].tolist()
    return row, col


def check_headers(files: Iterable[str], table: Mapping[str, Stored]) -> dict[str, str]:
    """Check dtypes and shapes of stored parts against each other, from the headers of safetensors files alone, and
    return the files' metadata. Raises CheckpointError, with the part's name.

    What a file calls a weight need not be what the model calls it (transformers renames while loading), so a weight
    that is missing altogether is not seen here.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    metadata: dict[str, str] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise CheckpointError(f"{path} is not a safetensors file: nothing else is read, and nothing unpickled")
        with safe_open(path, framework="pt") as file:
            metadata |= file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                if (match := COMPONENT.fullmatch(key)) is None:
                    continue
                part, entry = match["part"], file.get_slice(key)
                if part == "scale" and match["owner"] + match["attribute"] not in table:
                    continue  # some models have scales of their own
                if entry.get_dtype() != SAFETENSORS_DTYPES[part]:
                    raise CheckpointError(f"{key} is {entry.get_dtype()}, not {SAFETENSORS_DTYPES[part]}")
                found.setdefault(match["owner"] + match["attribute"], {})[part] = tuple(entry.get_shape())
    if len(found) > len(table):
        unknown = next(name for name in found if name not in table)
        raise CheckpointError(
            f"{unknown}: the files hold {len(found)} packed weights, config.json tells of {len(table)}; it is another "
            "conversion's, or was changed"
        )
    for name, parts in found.items():
        stored = table.get(name, Stored(SPARSE24 if "sparse_metadata" in parts else FP8, "none"))
        for part in PARTS[stored.format]:
            if part not in parts and name in table:
                raise CheckpointError(f"{component(name, part)} is missing from the checkpoint")
        if len(parts.get("qdata", ())) != 2:
            raise CheckpointError(f"{component(name, 'qdata')} is missing from the checkpoint, or not 2-D")
        rows, cols = parts["qdata"]
        shown = (rows, cols * 2) if stored.format == SPARSE24 else (rows, cols)
        for part, (shape, _) in stored.parts(shown[::-1] if stored.transposed else shown).items():
            if parts.get(part, shape) != shape:
                raise CheckpointError(
                    f"{component(name, part)} is {list(parts[part])}: it should be {list(shape)}, as "
                    f"{component(name, 'qdata')} is {[rows, cols]}"
                )
    return metadata


def table_to_json(table: Mapping[str, Stored]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in asdict(stored).items() if v or k == "transposed"} for name, stored in table.items()}


def table_from_json(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Stored]:
    """Raises CheckpointError, with the weight's name."""
    table = {}
    for name, entry in data.items():
        try:
            table[name] = Stored(**entry)
        except (TypeError, CheckpointError) as error:
            raise CheckpointError(f"{name}: {error}") from error
    return table


def check_version(version: object) -> None:
    """Raise CheckpointError for a format that is newer than this package, or no version at all."""
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"format_version {version!r} is not a version of this format")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format_version {version}, this hwpq_fx reads up to {FORMAT_VERSION}: upgrade it"
        )


def attach(model: Any, config: HWPQConfig | None = None) -> None:
    """Let transformers' `save_pretrained` save the converted `model`, if transformers is there at all; without a
    config, a model that nobody has attached before and that holds packed weights."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    quantizer = import_module("hwpq_fx.transformers_quantizer")
    if config is None:
        quantizer.attach_missing(unwrap(model))
    else:
        quantizer.attach(unwrap(model), config)
