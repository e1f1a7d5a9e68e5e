"""What a measurement depends on: the GPU, the driver, the versions, the code."""

import hashlib
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "torchao", "transformers", "hwpq_fx")


def no_gpu() -> str:
    """Why nothing can be measured here, or ""."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "" if torch.cuda.is_available() else "no NVIDIA GPU, or no driver for it, is here"


def describe_machine() -> dict[str, Any]:
    """Of the current CUDA device; what cannot be found out is None."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "arch": 10 * properties.major + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "sources": sources(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def commit() -> str | None:
    """Of the checkout this package runs from, with "+" behind it where files differ from it."""
    root = ["git", "-C", str(Path(__file__).parent)]
    if not (head := _said([*root, "rev-parse", "HEAD"])):
        return None
    changed = _said([*root, "status", "--porcelain", "--untracked-files=no"])
    return head + ("+" if changed else "")


def sources() -> str:
    """Hash of the package's own Python files: which code this was, where there is no git."""
    import hwpq_fx.kernels
    import hwpq_fx.passes

    digest, here = hashlib.sha256(), Path(__file__).parent
    for folder in (here.parent, here, *(Path(p.__path__[0]) for p in (hwpq_fx.passes, hwpq_fx.kernels))):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def slug(device: str) -> str:
    """A GPU's name as a file's: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _said(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
