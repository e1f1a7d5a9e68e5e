"""Views of a packed weight: rows and columns cut, pieces joined, transposes; and all of it in inference mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hwpq_fx.kernels import Float8Sparse24Tensor
from weights import ACTIVATIONS, K, N, make, same


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_are_cut_without_copying(activation):
    weight, x = make(activation=activation), torch.randn(3, K)
    dense, y = weight.dequantize(), F.linear(x, weight)
    for rows in (slice(2, 9), slice(-5, None), slice(0, 0), slice(None), slice(1, None, 3)):
        part = weight[rows]
        assert isinstance(part, Float8Sparse24Tensor)
        assert part.dequantize().equal(dense[rows])
        assert part.prepacked.equal(weight.prepacked[rows])
        torch.testing.assert_close(F.linear(x, part), y[:, rows])
    assert weight[2:9].qdata.data_ptr() == weight.qdata[2].data_ptr()
    assert weight.narrow(0, 3, 4).dequantize().equal(dense[3:7])
    assert weight.t()[:, 2:9].dequantize().equal(dense.t()[:, 2:9])
    assert weight[:, :].dequantize().equal(weight[:, -K:].dequantize())


def test_cut_into_pieces():
    weight = make()
    dense = weight.dequantize()
    for pieces, expected in (
        (weight.chunk(3), dense.chunk(3)),
        (weight.chunk(5), dense.chunk(5)),
        (weight.split(7), dense.split(7)),
        (weight.split([8, 16]), dense.split([8, 16])),
        (weight.split(10, dim=-2), dense.split(10)),
        (weight.tensor_split(5), dense.tensor_split(5)),
        (weight.t().split([8, 16], 1), dense.t().split([8, 16], 1)),
        (weight.t().chunk(3, -1), dense.t().chunk(3, -1)),
    ):
        assert [p.shape for p in pieces] == [p.shape for p in expected]
        assert all(p.dequantize().equal(e) for p, e in zip(pieces, expected, strict=True))
    with pytest.raises(RuntimeError, match="do not add up to 24"):
        weight.split([8, 8])


@pytest.mark.parametrize(
    "cut",
    [
        lambda w: w[:, 4:],
        lambda w: w[:, :-6],
        lambda w: w[:, ::2],
        lambda w: w.narrow(1, 8, 12),
        lambda w: w.split(12, 1),
        lambda w: w.t()[1:],
    ],
)
def test_columns_that_are_packed_together_are_not_cut(cut):
    with pytest.raises(NotImplementedError, match="at multiples of 8 only"):
        cut(make())


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_columns_are_cut_without_copying(activation, expanded):
    weight = make(activation=activation)
    weight = weight.expand() if expanded else weight.bare()
    dense = weight.dequantize()
    for part, expected in (
        (weight[:, 8:], dense[:, 8:]),
        (weight[:, :-8], dense[:, :-8]),
        (weight[:, 16:8], dense[:, 16:8]),
        (weight.narrow(1, 8, 16), dense[:, 8:24]),
        (weight.split(16, 1)[-1], dense.split(16, 1)[-1]),
        (weight.chunk(2, dim=-1)[0], dense.chunk(2, dim=-1)[0]),
        (weight.t()[8:].t(), dense[:, 8:]),
        (weight[2:9, 8:16], dense[2:9, 8:16]),
    ):
        assert part.shape == expected.shape
        assert part.dequantize().equal(expected)
        assert (part.prepacked is not None) is expanded
        x = torch.randn(9, part.shape[1])
        if x.numel():
            y = F.linear(x, part)
            assert (y - x @ expected.t()).norm() < 0.05 * y.norm()
            assert y.equal(F.linear(x, copy.deepcopy(part)))
    assert weight[:, 8:].qdata.data_ptr() == weight.qdata[:, 4:].data_ptr()


def test_kernels_get_parts_without_gaps(monkeypatch):
    weight = make(expanded=False)
    for part in (weight[:, 8:24], weight[::2]):
        given = []
        monkeypatch.setattr("hwpq_fx.kernels.packed_products.linear24", lambda *args, given=given: given.append(args))
        F.linear(torch.randn(3, part.shape[1]), part)
        assert not part.qdata.is_contiguous()
        assert all(one.is_contiguous() for one in given[0][2:5])


@pytest.mark.parametrize("expanded", [False, True])
def test_pieces_are_joined(expanded):
    weight, other = (one.expand() if expanded else one.bare() for one in (make(), make()))
    for dim in (0, 1, -1):
        joined = torch.cat(weight.chunk(2, dim), dim)
        same(joined, weight)
        assert (joined.prepacked is not None) is expanded
        assert joined.scale.data_ptr() != weight.scale.data_ptr()
    same(torch.cat(weight.t().chunk(3, 1), 1), weight.t())
    assert torch.cat([weight, other]).dequantize().equal(torch.cat([weight.dequantize(), other.dequantize()]))
    with pytest.raises(NotImplementedError, match="only where they have the same scales"):
        torch.cat([weight, other], 1)
    for odd in (weight.t(), weight.bfloat16(), weight.dequantize(), make(activation="none")):
        with pytest.raises(NotImplementedError, match="of one activation, orientation and dtype"):
            torch.cat([weight, odd])


def test_transposes():
    weight = make()
    dense = weight.dequantize()
    for turned in (
        weight.t(), weight.T, weight.mT, weight.transpose(0, 1), weight.transpose(-1, 0), weight.permute(1, 0),
        weight.permute(-1, -2),
    ):  # fmt: skip
        assert turned.transposed
        assert turned.dequantize().equal(dense.t())
        assert turned.qdata.data_ptr() == weight.qdata.data_ptr()
    for unturned in (weight.t().t(), weight.permute(0, 1), weight.transpose(1, 1), weight.transpose(0, -2)):
        same(unturned, weight)
    for call in (lambda: weight.transpose(0, 2), lambda: weight.permute(-3, 0)):
        with pytest.raises(IndexError, match="2 dimensions"):
            call()


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference_mode(activation, made_inside):
    """There torch hands composite ops over whole, and views of normal tensors are normal tensors."""
    with torch.inference_mode(made_inside):
        weight = make(activation=activation)
    x, bias, dense = torch.randn(5, 3, K).transpose(0, 1), torch.randn(N), weight.dequantize()
    expected = F.linear(x, weight, bias)
    with torch.inference_mode():
        assert F.linear(x, weight, bias).equal(expected)
        torch.testing.assert_close(x @ weight.t() + bias, expected)
        torch.testing.assert_close(x @ weight.mT + bias, expected)
        assert torch.addmm(bias, x[0], weight.T).equal(F.linear(x[0], weight, bias))
        for piece, part in zip(weight.chunk(3), dense.chunk(3), strict=True):
            assert piece.dequantize().equal(part)
        assert weight.narrow(0, 2, 4).dequantize().equal(dense[2:6])
        assert weight.tensor_split(3)[1].dequantize().equal(dense[8:16])
        assert weight[3:5].t().is_inference() is made_inside
        with torch._C.DisableTorchFunctionSubclass():  # as inside attention
            assert F.linear(x, weight, bias).equal(expected)
        same(weight.detach(), weight)
        same(copy.deepcopy(weight), weight)
        same(nn.Parameter(weight, requires_grad=False).data, weight)
        assert weight.to(torch.bfloat16).dtype is weight.bfloat16().dtype is torch.bfloat16
        assert weight.to("cpu", copy=True).dequantize().equal(dense)
        assert weight.to("meta").is_meta
    same(weight.t().t(), weight)
