"""The rehearsed GPU refuses what a GPU refuses and keeps memory as one does: `HWPQ_FX_REHEARSE=90 pytest -m gpu`."""

import pytest
import torch

import rehearsal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not rehearsal.ON, reason="no rehearsal: see tests/rehearsal")]


def ones(*shape, **kwargs):
    return torch.ones(*shape, device="cuda", **kwargs)


@pytest.mark.parametrize(
    "mix",
    [
        lambda: ones(3) + torch.ones(3),
        lambda: torch.mm(ones(3, 3), torch.ones(3, 3)),
        lambda: torch.cat([ones(3), torch.ones(3)]),
        lambda: torch.where(torch.ones(3) > 0, ones(3), 0.0),
        lambda: torch.ones(3)[ones(1, dtype=torch.long)],
        lambda: torch.nn.functional.linear(ones(2, 3), torch.ones(4, 3)),
        lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    ],
)
def test_devices_do_not_mix(mix):
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        mix()


def test_what_may_be_mixed():
    assert (ones(3) * torch.tensor(2.0)).tolist() == [2.0] * 3
    assert ones(3)[torch.tensor([0, 2])].tolist() == [1.0] * 2
    assert torch.ones(3).copy_(ones(3)).device.type == "cpu"


def test_views_share_memory_and_outputs_grow():
    x = torch.zeros(4, 6, device="cuda")
    x.t()[1:3].view(2, 4).fill_(1)
    assert x.sum().item() == 8 and x.is_cuda and x.t()[1:].data_ptr() == x.data_ptr() + 4
    out = torch.empty(0, device="cuda")
    assert torch.add(x, 1, out=out) is out and out.shape == x.shape and out.sum().item() == 32
    x.set_(out.untyped_storage(), 0, (2, 2), (2, 1))
    assert x.sum().item() == out.view(-1)[:4].sum().item()
    assert torch.Generator("cuda").manual_seed(3).initial_seed() == 3


def test_gradients():
    x = ones(3, requires_grad=True)
    (x.square().sum() * 2).backward()
    assert x.grad.is_cuda and x.grad.tolist() == [4.0] * 3


def test_a_capture_replays_and_refuses_to_wait():
    x = ones(4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x * 2).sum() + 1
    x.fill_(3)
    graph.replay()
    assert y.item() == 25
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    assert not torch.cuda.is_current_stream_capturing()
