"""Regions written out: checkpoints and nested compile regions, the same numbers, every product inside in sight."""

import logging

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

import hwpq_fx
from graphs import Checked, written
from hwpq_fx.explain import op_counts
from hwpq_fx.passes.inline import inline_regions

K = 64
NESTED_PACKED = TorchVersion(torch.__version__) >= "2.13"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)


class Checkpoint(Block):
    """What is given back twice, what is given back as it came, and a region in a region."""

    def inner(self, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.relu(self.a(x)).float(), y, checkpoint(self.b, y, use_reentrant=False)

    def forward(self, x):
        a, y, b = checkpoint(self.inner, x, x + 1, use_reentrant=False)
        return a + y + b + checkpoint(self.a, x, use_reentrant=False)


class Region(Block):
    @torch.compiler.nested_compile_region
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + x[..., :1]


class Regions(nn.Module):
    """One body for two blocks."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Region(), Region()), nn.Linear(K, K)

    def forward(self, x):
        return self.head(self.blocks(x))


class WithABranch(Block):
    """Its body cannot be written out."""

    def inner(self, x):
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    def forward(self, x):
        return self.b(checkpoint(self.inner, self.a(x), use_reentrant=False))


@pytest.mark.parametrize("build", [Checkpoint, Regions])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_the_same_numbers_without_regions(build, grad):
    model, x, seen = build().eval(), torch.randn(2, 5, K), []

    def backend(gm, _):
        counts, before = op_counts(gm), written(gm.graph)
        # Dynamo itself writes out a body that is called once, as the two are where gradients are recorded
        assert counts["tag_activation_checkpoint"] + counts["invoke_subgraph"] == 2 or torch.is_grad_enabled()
        after = inline_regions(gm)
        assert written(gm.graph) == before
        after.graph.lint()
        seen.append(op_counts(after))
        return Checked(after)

    with grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    assert seen[0]["linear"] == (3 if build is Checkpoint else 5)
    assert seen[0]["tag_activation_checkpoint"] == seen[0]["invoke_subgraph"] == 0


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("build", [Checkpoint, Regions])
def test_layers_inside_are_converted(build, sequential, caplog):
    model, x = build().eval(), torch.randn(9, K)
    if build is Regions and not NESTED_PACKED:
        hwpq_fx.convert(torch.compile(model), [x])
        lines = hwpq_fx.report(model).layers
        assert [line.status for line in lines] == ["dense"] * 4 + ["sparse24_fp8"] and model(x).isfinite().all()
        return
    config = hwpq_fx.HWPQConfig(sequential=sequential and build is Regions, activation="none")
    with caplog.at_level(logging.WARNING, "hwpq_fx"):
        hwpq_fx.convert(torch.compile(model), [x], config)
    assert all(line.status == "sparse24_fp8" for line in hwpq_fx.report(model).layers) and not caplog.records
    expected = model.forward(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


def test_what_cannot_be_written_out_stays():
    model, x = WithABranch().eval(), torch.randn(9, K)
    hwpq_fx.convert(model, [x])
    assert len(hwpq_fx.report(model).converted) == 2
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="hwpq")(x), model(x), rtol=1e-2, atol=1e-2)


def test_regions_without_packed_weights_stay_when_compiling():
    model, x, seen = Regions().eval(), torch.randn(9, K), []

    def inner(gm, _):
        seen.append(op_counts(gm))
        return gm

    config = hwpq_fx.HWPQConfig(targets=["head"], activation="none")
    hwpq_fx.convert(model, [x], config)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=hwpq_fx.passes.HwpqBackend(inner))(x), model(x))
    assert seen[0]["invoke_subgraph"] == 2 and seen[0]["hwpq_fx.linear24"] == 1
