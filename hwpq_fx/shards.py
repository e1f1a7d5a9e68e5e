"""A checkpoint folder of safetensors shards, read a tensor at a time, and shards that are there whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import ModelError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards:
    """The tensors of a transformers checkpoint by name: of the single file where there is one, as transformers reads
    it. Raises ModelError where the folder holds no safetensors, or damaged ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / SINGLE).is_file():
            self.where: dict[str, str] = _names_in(folder / SINGLE)
        elif (folder / INDEX).is_file():
            try:
                self.where = dict(json.loads((folder / INDEX).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{folder / INDEX} is no index of shards: {error}") from error
        else:
            raise ModelError(f"{folder} holds neither {SINGLE} nor {INDEX}")

    @classmethod
    def of(cls, file: Path) -> "Shards":
        """One file alone."""
        made = cls.__new__(cls)
        made.folder, made.where = file.parent, _names_in(file)
        return made

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self.where.values()))]

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype ("BF16") of every tensor, in the order of the files."""
        found = {}
        for path in self.files:
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    entry = file.get_slice(name)
                    found[name] = tuple(entry.get_shape()), entry.get_dtype()
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor that is floating point: what transformers loads in where config.json has no dtype."""
        kinds = (FLOATS[kind] for _, kind in self.tensors().values() if kind in FLOATS)
        return next(kinds, torch.float32)

    def load(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own, on `device` and in `dtype`: nothing of the file stays mapped."""
        # read, not mapped: pages of the file would count as this process's memory beside the tensor
        with opened(self.folder / self.where[name], backend="pread") as file:
            return file.get_tensor(name).to(device, dtype)

    def nbytes(self, names: list[str]) -> int:
        """What these tensors take in the files."""
        total = 0
        for shard in sorted({self.where[name] for name in names}):
            with opened(self.folder / shard) as file:
                for name in names:
                    if self.where[name] == shard:
                        entry = file.get_slice(name)
                        total += torch.Size(entry.get_shape()).numel() * _itemsize(entry.get_dtype())
        return total


@contextmanager
def opened(file: Path, **options: Any) -> Iterator[Any]:
    """A safetensors file. Raises ModelError, with its name, where it is damaged."""
    try:
        with safe_open(file, framework="pt", **options) as found:
            yield found
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged: {error}") from error


def _names_in(file: Path) -> dict[str, str]:
    with opened(file) as found:
        return dict.fromkeys(found.keys(), file.name)


def _itemsize(dtype: str) -> int:
    """Bytes of safetensors' "BF16", "F8_E4M3", "I64", "BOOL"."""
    return 1 if dtype == "BOOL" else int("".join(filter(str.isdigit, dtype.split("_")[0]))) // 8


def metadata_of(file: Path) -> dict[str, str]:
    with opened(file) as found:
        return found.metadata() or {}


def write(tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write one shard, of CPU tensors, under a temporary name first."""
    with written(file) as partial:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt", **metadata}
        )


@contextmanager
def written(file: Path) -> Iterator[Path]:
    """A name to write to; what is there in the end, on the disk itself, takes the place of `file` in one step."""
    partial = file.with_name(f".{file.name}.partial")
    yield partial
    with open(partial, "rb+") as file_again:
        os.fsync(file_again.fileno())
    partial.replace(file)
