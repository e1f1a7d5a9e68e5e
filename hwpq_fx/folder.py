"""Checkpoint folders that are there whole or not at all."""

import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hwpq_fx.passes.dynamo import unwrap

from .checkpoint import attach

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h and linux/fs.h
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def save_pretrained(model: Any, directory: str | os.PathLike[str], **options: Any) -> None:
    """`model.save_pretrained(directory, **options)`, but what was in `directory` stays whole until the new
    checkpoint is complete, and is then replaced. It also saves what transformers cannot: a model that `quantize_`
    packed, a part of a converted model, and a model of which a part was converted.

    Other files there (a tokenizer, a README) are kept, as hard links where the file system has them. Raises what
    `save_pretrained` raises, and then nothing has changed.
    """
    module: Any = unwrap(model)
    attach(module)
    with whole_folder(directory) as partial:
        module.save_pretrained(partial, **options)


@contextmanager
def whole_folder(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to write a checkpoint into, which takes the place of `directory` in the end, unless an exception
    comes; only a killed process leaves it behind, as `.NAME.*` beside `directory`.

    On Linux the two change places in one step; elsewhere, and on file systems that cannot, in two. A link is followed.
    Raises NotADirectoryError for a file, OSError for the current folder or one that it lies in: that cannot change
    places with another while someone stands in it.
    """
    final = Path(directory).resolve()
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(f"{final} is a file: a checkpoint is a folder")
    if Path.cwd().is_relative_to(final):
        raise OSError(f"{str(directory)!r} is the current folder, or above it: name one for the checkpoint alone")
    final.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        partial = holder / final.name
        partial.mkdir()
        yield partial
        if final.exists():
            _keep_others(final, partial)
            _exchange(partial, final, holder / "old")
        else:
            partial.rename(final)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _keep_others(old: Path, new: Path) -> None:
    """Link what `old` holds besides a model's weights into `new`."""
    for path in old.iterdir():
        target = new / path.name
        if WEIGHTS.fullmatch(path.name) or target.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=_link)
        else:
            _link(path, target)


def _link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # not on this file system
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(new: Path, final: Path, old: Path) -> None:
    """Put `new` in the place of `final`."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(final), RENAME_EXCHANGE) == 0:
            return
    final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        old.rename(final)
        raise
