import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx.kernels import FORMAT_K, pack24, unpack24
from hwpq_fx.kernels.pack24 import PATTERNS, unpack_indices

E4M3 = torch.float8_e4m3fn
# from the docstring of the format: nibble -> indices of the two kept values
NIBBLES = {0x4: (0, 1), 0x8: (0, 2), 0xC: (0, 3), 0x9: (1, 2), 0xD: (1, 3), 0xE: (2, 3)}


def e4m3(rows):
    return torch.tensor(rows, dtype=torch.uint8).view(E4M3)


def mask_of(pairs):
    """Bool [N, K] from the kept indices of every group."""
    return torch.tensor([[i in pair for pair in row for i in range(4)] for row in pairs])


@st.composite
def packable(draw):
    """(bytes [N, K], kept indices of every group)."""
    rows, groups = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 5))
    data = draw(st.binary(min_size=rows * groups * 4, max_size=rows * groups * 4))
    picks = draw(st.lists(st.sampled_from(list(NIBBLES.values())), min_size=rows * groups, max_size=rows * groups))
    values = torch.tensor(list(data), dtype=torch.uint8).view(rows, -1)
    return values, [picks[r * groups : (r + 1) * groups] for r in range(rows)]


def test_patterns_are_the_six_nibbles():
    assert tuple(NIBBLES) == PATTERNS
    assert FORMAT_K == 8


@pytest.mark.parametrize(
    ("kept", "qdata", "metadata"),
    [
        ([(0, 1), (0, 1)], [0x30, 0x31, 0x34, 0x35], 0x44),
        ([(0, 3), (1, 2)], [0x30, 0x33, 0x35, 0x36], 0x9C),
        ([(1, 2), (0, 3)], [0x31, 0x32, 0x34, 0x37], 0xC9),
        ([(0, 2), (1, 3)], [0x30, 0x32, 0x35, 0x37], 0xD8),
        ([(2, 3), (0, 1)], [0x32, 0x33, 0x34, 0x35], 0x4E),
    ],
)
def test_layout_by_hand(kept, qdata, metadata):
    values = e4m3([[0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37]])
    packed, sparse_metadata = pack24(values, mask_of([kept]))
    assert packed.view(torch.uint8).tolist() == [qdata]
    assert sparse_metadata.tolist() == [[metadata]]


def test_groups_lie_in_order_along_k():
    values = e4m3([list(range(16)), list(range(16, 32))])
    kept = [[(0, 1), (2, 3), (1, 2), (0, 3)], [(1, 3), (0, 2), (0, 1), (2, 3)]]
    qdata, sparse_metadata = pack24(values, mask_of(kept))
    assert qdata.view(torch.uint8).tolist() == [[0, 1, 6, 7, 9, 10, 12, 15], [17, 19, 20, 22, 24, 25, 30, 31]]
    assert sparse_metadata.tolist() == [[0xE4, 0xC9], [0x8D, 0xE4]]


@pytest.mark.parametrize("earlier", NIBBLES)
@pytest.mark.parametrize("later", NIBBLES)
def test_every_pair_of_patterns(earlier, later):
    values = torch.randint(1, 256, (3, 8), dtype=torch.uint8).view(E4M3)
    mask = mask_of([[NIBBLES[earlier], NIBBLES[later]]] * 3)
    qdata, sparse_metadata = pack24(values, mask)
    assert sparse_metadata.tolist() == [[later << 4 | earlier]] * 3
    assert unpack24(qdata, sparse_metadata).view(torch.uint8).equal(values.view(torch.uint8) * mask)


@pytest.mark.parametrize("pair", NIBBLES.values())
def test_every_byte_comes_back(pair):
    """All 256, NaNs, subnormals and both zeros among them, in every place of the pattern."""
    values = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16).contiguous()
    mask = mask_of([[pair] * 4] * 256)
    dense = unpack24(*pack24(values.view(E4M3), mask))
    assert dense.dtype is E4M3
    assert dense.view(torch.uint8).equal(values * mask)


@settings(deadline=None, max_examples=150)
@given(packable())
def test_unpack_undoes_pack(case):
    values, kept = case
    mask = mask_of(kept)
    qdata, sparse_metadata = pack24(values.view(E4M3), mask)
    rows, cols = values.shape
    assert (qdata.dtype, qdata.shape) == (E4M3, (rows, cols // 2))
    assert (sparse_metadata.dtype, sparse_metadata.shape) == (torch.uint8, (rows, cols // 8))
    assert unpack24(qdata, sparse_metadata).view(torch.uint8).equal(values * mask)
    assert unpack_indices(sparse_metadata).tolist() == [[list(pair) for pair in row] for row in kept]
    nibbles = torch.cat((sparse_metadata & 0xF, sparse_metadata >> 4)).unique().tolist()
    assert set(nibbles) <= set(NIBBLES)


@settings(deadline=None, max_examples=50)
@given(packable())
def test_any_strides(case):
    """A weight kept as [K, N] packs to the same rows, and they are contiguous."""
    values, kept = case
    mask = mask_of(kept)
    qdata, sparse_metadata = pack24(values.view(E4M3), mask)
    turned = pack24(values.t().contiguous().t().view(E4M3), mask.t().contiguous().t())
    for ours, theirs in zip(turned, (qdata, sparse_metadata), strict=True):
        assert ours.is_contiguous()
        assert ours.view(torch.uint8).equal(theirs.view(torch.uint8))


def test_no_rows_and_rows_of_zeros():
    qdata, sparse_metadata = pack24(e4m3([]).view(0, 16), torch.zeros(0, 16, dtype=torch.bool))
    assert qdata.shape == (0, 8)
    assert sparse_metadata.shape == (0, 2)
    assert unpack24(qdata, sparse_metadata).shape == (0, 16)
    qdata, sparse_metadata = pack24(e4m3([[0] * 8]), mask_of([[(1, 3), (0, 2)]]))
    assert sparse_metadata.tolist() == [[0x8D]]
    assert unpack24(qdata, sparse_metadata).view(torch.uint8).tolist() == [[0] * 8]


@pytest.mark.parametrize("cols", [4, 12, 20, 7])
def test_k_must_be_a_multiple_of_eight(cols):
    with pytest.raises(ValueError, match=f"K = {cols} is not a multiple of 8"):
        pack24(torch.zeros(2, cols).to(E4M3), torch.ones(2, cols, dtype=torch.bool))


@pytest.mark.parametrize("bits", [b for b in itertools.product((0, 1), repeat=4) if sum(b) != 2])
def test_mask_must_be_two_of_four(bits):
    mask = mask_of([[(0, 1)] * 4] * 3)
    mask[1, 8:12] = torch.tensor(bits, dtype=torch.bool)
    with pytest.raises(ValueError, match="exactly two of every four"):
        pack24(torch.ones(3, 16).to(E4M3), mask)


def test_mask_must_fit():
    with pytest.raises(ValueError, match=r"mask is \(2, 8\), the weight \(2, 16\)"):
        pack24(torch.ones(2, 16).to(E4M3), mask_of([[(0, 1)] * 2] * 2))
