"""A checkpoint folder of safetensors shards, read a tensor at a time, and shards that are there whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards:
    """The tensors of a transformers checkpoint by name. Raises ModelError where the folder holds no safetensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX).is_file():
            try:
                self.where: dict[str, str] = dict(json.loads((folder / INDEX).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{folder / INDEX} is no index of shards: {error}") from error
        elif (folder / SINGLE).is_file():
            self.where = _names_in(folder / SINGLE)
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

    def load(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own, on `device` and in `dtype`: nothing of the file stays mapped."""
        # read, not mapped: pages of the file would count as this process's memory beside the tensor
        with safe_open(self.folder / self.where[name], framework="pt", backend="pread") as file:
            return file.get_tensor(name).to(device, dtype)

    def nbytes(self, names: list[str]) -> int:
        """What these tensors take in the files."""
        total = 0
        for shard in sorted({self.where[name] for name in names}):
            with safe_open(self.folder / shard, framework="pt") as file:
                for name in names:
                    if self.where[name] == shard:
                        entry = file.get_slice(name)
                        total += torch.Size(entry.get_shape()).numel() * _itemsize(entry.get_dtype())
        return total


def _names_in(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), file.name)


def _itemsize(dtype: str) -> int:
    """Bytes of safetensors' "BF16", "F8_E4M3", "I64", "BOOL"."""
    return 1 if dtype == "BOOL" else int("".join(filter(str.isdigit, dtype.split("_")[0]))) // 8


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


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
    with open(partial, "rb+") as opened:
        os.fsync(opened.fileno())
    partial.replace(file)
