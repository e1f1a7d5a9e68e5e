"""What holds for every test: nothing is downloaded, the same seed, nothing compiled is left over."""

import os
from importlib import import_module

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


@pytest.fixture(autouse=rehearsal.ON)
def _chosen_by_reference(request, monkeypatch):
    """The kernels that choose and pack are rehearsed in the test of theirs; elsewhere they would take most of the time,
    and their references give the same bits."""
    if not request.node.name.startswith("test_choosing_and_packing"):
        for name in ("select24", "prune_pack24"):
            monkeypatch.setattr(import_module(f"hwpq_fx.kernels.{name}"), "has_kernel", lambda weight: False)
