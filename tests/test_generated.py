"""Inductor's code around our kernels, compiled for a GPU that is not there."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

OURS = {"gemv": {"sparse_mma_kernel_0"}, "tiles": {"_tiles24_0", "_add_parts_1"}}
OURS["tiles_fp8"] = OURS["tiles"]


@pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is not None, reason="the rehearsal wants a torch without CUDA"
)
def test_kernels_that_inductor_embeds_compile(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment.pop("HWPQ_FX_REHEARSE", None)
    command = [sys.executable, "-m", "rehearsal.generated", "90"]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = defaultdict(set)
    for path, rows, kernel in (line.split() for line in done.stdout.splitlines() if line.count(" ") == 2):
        kernels[path, rows].add(kernel)
    assert set(kernels) == {(path, rows) for path in OURS for rows in ("1", "33")}
    for (path, _), names in kernels.items():
        assert OURS[path] <= names
        # what comes before, quantization included, is one kernel, and what follows another
        (before,) = (name for name in names - OURS[path] if name.endswith("_0"))
        assert ("abs_amax" in before) == (path == "tiles_fp8")
        assert sum("gelu" in name for name in names) == 1 and len(names) == len(OURS[path]) + 2
