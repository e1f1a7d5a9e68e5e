"""torchao's own checks for tensor subclasses (torchao/testing/utils.py), run on the packed weight."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._tensor import DTensor, Replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode

from hwpq_fx import Float8Sparse24Tensor, HWPQConfig

pytest.importorskip("expecttest", reason="torchao.testing needs expecttest")
from torchao.testing import utils

CUDA = torch.cuda.is_available()


def pruned(weight):
    return Float8Sparse24Tensor.from_hp(weight)


def laid_out(weight):
    return Float8Sparse24Tensor.from_hp(weight).expand()


class Basic(utils.TorchAOBasicTestCase):
    TENSOR_SUBCLASS = Float8Sparse24Tensor
    FACTORY_FN = staticmethod(pruned)
    kwargs = {}  # noqa: RUF012 (theirs)
    # against the dense weight: half of all normally distributed weights go, and with them a tenth of the energy
    LINEAR_MIN_SQNR = 7

    if not CUDA:
        test_device1_to_device2_device1_cpu_device2_cpu = pytest.mark.skip(reason="calls .cuda()")(
            utils.TorchAOBasicTestCase.test_device1_to_device2_device1_cpu_device2_cpu
        )


class BasicLaidOut(Basic):
    FACTORY_FN = staticmethod(laid_out)


class Compile(utils.TorchAOCompileTestCase):
    TENSOR_SUBCLASS = Float8Sparse24Tensor
    FACTORY_FN = staticmethod(pruned)
    kwargs = {}  # noqa: RUF012 (theirs)
    LINEAR_MIN_SQNR = 7


class CompileLaidOut(Compile):
    FACTORY_FN = staticmethod(laid_out)


class OnThisMachine(TorchFunctionMode):
    """What is made on "cuda" is made on the CPU where there is no other."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not CUDA and kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture
def integration(monkeypatch):
    """torchao's integration checks, which ask for an accelerator without using one."""
    if not CUDA:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(utils, "get_current_accelerator_device", lambda: torch.device("cpu"))
    with OnThisMachine():
        yield utils.TorchAOIntegrationTestCase()


@pytest.mark.parametrize("layout", ["packed", "fastest"])
def test_slice_and_copy_as_in_vllm(integration, layout):
    integration._test_slice_and_copy_similar_to_vllm(HWPQConfig(layout=layout))


def test_narrow_as_in_vllm(integration):
    integration._test_narrow_similar_to_vllm(HWPQConfig())


def test_a_3d_parameter_as_in_vllm(integration, caplog):
    integration._test_quantize_3d_param_similar_to_vllm(HWPQConfig())
    assert "stays dense: not a linear layer with a 2-D weight" in caplog.text


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("make", [pruned, laid_out])
def test_chunk_as_in_vllm(integration, make, dim):
    integration._test_chunk_similar_to_vllm_llama4(make(torch.randn(64, 96)), dim)


# `_test_moe_weight_reshape_ops` is for weights of experts, [experts, ...], which the packed weight does not hold


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(*weight.shape[::-1], bias=False)
        self.linear.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture
def mesh(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.NamedTemporaryFile() as meet:
        dist.init_process_group("gloo", f"file://{meet.name}", rank=0, world_size=1)
        try:
            yield init_device_mesh("cpu", (1,))
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_tensor_parallel(mesh, compiled):
    """The steps of `TorchAOTensorParallelTestCase.test_tp`, which is for GPUs, on one CPU: their ways to shard."""
    case = utils.TorchAOTensorParallelTestCase
    up, down = Linear(laid_out(torch.randn(64, 32))), Linear(laid_out(torch.randn(32, 64)))
    x = torch.randn(8, 32)
    with torch.no_grad():
        expected = down(up(x))
        up, down = case.colwise_shard(up, mesh), case.rowwise_shard(down, mesh)
        assert isinstance(up.linear.weight.to_local(), Float8Sparse24Tensor)
        given = DTensor.from_local(x, mesh, [Replicate()])
        both = [torch.compile(one) if compiled else one for one in (up, down)]
        y = both[1](both[0](given))
    torch.testing.assert_close(y.full_tensor(), expected)
