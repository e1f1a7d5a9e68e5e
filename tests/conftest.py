"""What holds for every test: nothing is downloaded, the same seed, nothing compiled is left over."""

import os
from types import SimpleNamespace

import rehearsal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if rehearsal.ARCH:
    rehearsal.start(rehearsal.ARCH)

import pytest
import torch

# Triton reads it when a kernel is defined: on a machine without a GPU kernels run in its interpreter
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

pytest.register_assert_rewrite("graphs", "weights")


@pytest.fixture(autouse=True)
def _fresh():
    """Same seed for every test; no compiled code left over from the one before."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def assembly(monkeypatch):
    """Triton's interpreter has no inline assembly: here it has, where there is no GPU. What may be read of memory is to
    be put into the list: (first address, one past the last)."""
    readable = []
    if torch.cuda.is_available():
        return readable
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from rehearsal import ptx

    def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
        assert pack == 1
        results = ptx.inline(text, constraints, [value.data for value in values], readable)
        kinds = {"fp32": np.float32, "int32": np.int32, "uint32": np.uint32}
        handles = [
            TensorHandle(result.view(kinds[kind.scalar.name]), kind.scalar)
            for result, kind in zip(results, types, strict=True)
        ]
        return SimpleNamespace(get_result=handles.__getitem__)

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    return readable
