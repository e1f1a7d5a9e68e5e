"""What holds for every test: nothing is downloaded, the same seed, nothing compiled is left over."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
