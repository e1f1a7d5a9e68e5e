import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx.kernels.ewma import SCAN_BLOCK, decays, ewma, tree_size


def naive(scores, mean_rate=1 / 8, dev_rate=1 / 4):
    """RFC 6298 entry by entry, in float64."""
    means, devs = [], []
    for row in scores.double().tolist():
        mean, dev = row[0], row[0] / 2
        row_means, row_devs = [mean], [dev]
        for x in row[1:]:
            row_means.append(mean)
            row_devs.append(dev)
            dev = (1 - dev_rate) * dev + dev_rate * abs(x - mean)
            mean = (1 - mean_rate) * mean + mean_rate * x
        # row_means[t] is the state before entry t; the loop above put the seed at 0 and 1.
        means.append(row_means)
        devs.append(row_devs)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(devs, dtype=torch.float64)


def assert_close_to_naive(scores, mean_rate=1 / 8, dev_rate=1 / 4):
    for got, expected in zip(ewma(scores, mean_rate, dev_rate), naive(scores, mean_rate, dev_rate), strict=True):
        assert got.dtype == torch.float32
        assert got.shape == scores.shape
        # |x - mean| of nearly equal numbers keeps the rounding of the larger past.
        slack = 1e-5 * expected.abs() + 1e-6 * scores.double().cummax(1).values + 1e-40
        assert bool(((got.double() - expected).abs() <= slack).all())


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 64, 65, 100, 1023, 1024, 1057, 2200])
def test_equals_naive_at_ragged_lengths(length):
    assert_close_to_naive(torch.rand(3, length, generator=torch.Generator().manual_seed(length)))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    length=st.integers(1, 150),
    spread=st.sampled_from([0.0, 1.0, 10.0]),
    mean_rate=st.sampled_from([1 / 8, 1 / 16, 0.01, 0.3, 0.9, 1.0]),
    dev_rate=st.sampled_from([1 / 4, 1 / 8, 0.01, 0.9, 1.0]),
)
def test_equals_naive(seed, rows, length, spread, mean_rate, dev_rate):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.exp(spread * torch.randn(rows, length, generator=generator))
    assert_close_to_naive(scores, mean_rate, dev_rate)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(st.sampled_from([0.0, 1.0, 1e30, 1e-38]), st.floats(0, float(torch.tensor(1e30)), width=32)),
        min_size=1,
        max_size=100,
    )
)
def test_equals_naive_on_adversarial_rows(row):
    assert_close_to_naive(torch.tensor([row]))


def test_by_hand():
    mean, dev = ewma(torch.tensor([[8.0, 16.0, 0.0, 0.0]]))
    assert mean.tolist() == [[8.0, 8.0, 9.0, 7.875]]
    assert dev.tolist() == [[4.0, 4.0, 5.0, 6.0]]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), t=st.integers(1, 199))
def test_never_looks_at_its_own_entry_or_later(seed, t):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 200, generator=generator)
    other = scores.clone()
    other[:, t:] = 1000
    for a, b in zip(ewma(scores), ewma(other), strict=True):
        assert torch.equal(a[:, : t + 1], b[:, : t + 1])
        if t < 199:
            assert not torch.equal(a[:, t + 1], b[:, t + 1])


def test_rows_do_not_depend_on_their_company():
    scores = torch.rand(37, 517, generator=torch.Generator().manual_seed(0))
    whole = ewma(scores)
    for start, stop in [(0, 1), (36, 37), (5, 12), (3, 36)]:
        for part, full in zip(ewma(scores[start:stop]), whole, strict=True):
            assert torch.equal(part, full[start:stop])


@pytest.mark.parametrize("length", [1, 3, 16, 100, 1000, SCAN_BLOCK, SCAN_BLOCK + 1, 2 * SCAN_BLOCK + 5])
def test_later_entries_do_not_change_a_bit(length):
    """A shorter row has smaller trees, or fewer: each is the left branch of a larger one."""
    scores = torch.rand(2, 2 * SCAN_BLOCK + 40, generator=torch.Generator().manual_seed(length))
    for whole, part in zip(ewma(scores), ewma(scores[:, :length]), strict=True):
        assert torch.equal(whole[:, :length], part)


def test_order_of_operations():
    """Two levels of the tree and one carry by hand, in float32: the bits a kernel has to reproduce."""
    u = torch.rand(1, SCAN_BLOCK + 4, generator=torch.Generator().manual_seed(1))
    decay = [torch.tensor(power) for power in decays(1 / 8)]
    mean, _ = ewma(u)
    steps = (u * (1 / 8))[0]
    pair = u[0, 0] * decay[0] + steps[1]
    assert mean[0, 2] == pair
    assert mean[0, 3] == pair * decay[0] + steps[2]
    carry = mean[0, SCAN_BLOCK]
    assert mean[0, SCAN_BLOCK + 1] == carry * decay[0] + steps[SCAN_BLOCK]
    assert mean[0, SCAN_BLOCK + 2] == carry * decay[1] + (steps[SCAN_BLOCK] * decay[0] + steps[SCAN_BLOCK + 1])


def test_decays_are_powers_that_float32_holds():
    assert decays(1 / 8)[:3] == (0.875, 0.875**2, 0.875**4)
    assert len(decays(1 / 8)) == SCAN_BLOCK.bit_length()
    for rate in (1 / 4, 0.9, 1.0, 0.01):
        assert all(power == 0 or power >= 2.0**-126 for power in decays(rate))
    assert [tree_size(length) for length in (1, 2, 3, 128, 129)] == [1, 2, 4, 128, 128]


def test_zeros_stay_zero_and_the_input_is_left_alone():
    for state in ewma(torch.zeros(2, 77)):
        assert not state.any()
    scores = torch.rand(2, 77)
    kept = scores.clone()
    ewma(scores)
    assert torch.equal(scores, kept)


def test_half_precision_is_computed_in_float32():
    scores = torch.rand(2, 77).bfloat16()
    for got, expected in zip(ewma(scores), ewma(scores.float()), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


def test_errors():
    with pytest.raises(ValueError, match=r"\[N, T\]"):
        ewma(torch.rand(4))
    with pytest.raises(ValueError, match="not empty"):
        ewma(torch.rand(4, 0))
    for rates in [(0.0, 0.25), (0.125, 0.0), (1.5, 0.25), (0.125, -1.0)]:
        with pytest.raises(ValueError, match="rates"):
            ewma(torch.rand(2, 4), *rates)
