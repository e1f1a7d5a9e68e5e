import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from hwpq_fx.kernels import select24
from hwpq_fx.kernels.ewma import SCAN_BLOCK, ewma
from hwpq_fx.kernels.saliency import SALIENCIES, score, terms_of
from hwpq_fx.kernels.select24 import DEFAULT_LAMBDA, KERNEL_DTYPES, SELECTIONS, choose24, select24_reference

LARGEST = float(torch.tensor(1e30))
VALUES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, 1e-38, 1e-45, 1e30]), st.floats(0, LARGEST, width=32))


@st.composite
def adversarial(draw):
    """Scores [N, 4G] full of ties, zeros, subnormals and huge ratios."""
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    pool = draw(st.lists(VALUES, min_size=1, max_size=6))
    picks = draw(st.lists(st.sampled_from(pool), min_size=rows * groups * 4, max_size=rows * groups * 4))
    return torch.tensor(picks).view(rows, groups * 4)


def gaussian(seed, rows=256, columns=256):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).square()


def best_two(scores):
    """Reference: Python's stable sort of every four."""
    mask = []
    for group in scores.reshape(-1, 4).tolist():
        kept = sorted(range(4), key=lambda i: -group[i])[:2]
        mask += [i in kept for i in range(4)]
    return torch.tensor(mask).view_as(scores)


def stream(scores, mean, dev, lam):
    """Reference: one element after another. Returns the mask and the number of unforced groups."""
    rows, columns = scores.shape
    mask = torch.ones(rows, columns, dtype=torch.bool)
    unforced = 0
    for r in range(rows):
        for start in range(0, columns, 4):
            pruned, forced = 0, False
            for i in range(4):
                c = start + i
                below = bool(scores[r, c] < mean[r, c] + lam * dev[r, c])
                if pruned == 2:
                    forced |= below
                    continue
                must = 4 - i == 2 - pruned
                forced |= must and not below
                if below or must:
                    mask[r, c] = False
                    pruned += 1
            unforced += not forced
    return mask, unforced


def naive_ewma(scores):
    """RFC 6298 in float64, state before each entry."""
    x = scores.double()
    mean, dev = x[:, 0], x[:, 0] / 2
    means, devs = [mean], [dev]
    for t in range(1, x.shape[1]):
        means.append(mean)
        devs.append(dev)
        dev = 0.75 * dev + 0.25 * (x[:, t] - mean).abs()
        mean = 0.875 * mean + 0.125 * x[:, t]
    return torch.stack(means, 1), torch.stack(devs, 1)


@pytest.mark.parametrize("name", SELECTIONS)
@settings(deadline=None, max_examples=80)
@given(scores=adversarial(), lam=st.sampled_from([DEFAULT_LAMBDA, -2.0, 0.0, 1.0]))
def test_exactly_two_of_every_four(name, scores, lam):
    mask, settled = choose24(scores, name, lam=lam)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert bool((mask.view(-1, 4).sum(1) == 2).all())
    assert (settled.dtype, settled.shape) == (torch.int64, ())
    assert 0 <= settled <= scores.numel() // 4


@settings(deadline=None, max_examples=150)
@given(scores=adversarial())
def test_exact_is_the_stable_sort(scores):
    mask, settled = choose24(scores, "exact")
    assert torch.equal(mask, best_two(scores))
    assert settled == 0


@settings(deadline=None, max_examples=150)
@given(
    scores=adversarial(),
    lam=st.sampled_from([DEFAULT_LAMBDA, -2.0, 0.0, 1.0]),
    rates=st.sampled_from([(1 / 8, 1 / 4), (1.0, 1.0), (0.01, 0.9)]),
)
def test_ewma_is_exact(scores, lam, rates):
    assert torch.equal(choose24(scores, "ewma", *rates, lam)[0], best_two(scores))


@pytest.mark.parametrize("seed", range(5))
def test_ewma_is_exact_on_ordinary_scores(seed):
    scores = gaussian(seed)
    assert torch.equal(choose24(scores)[0], best_two(scores))


def test_of_equal_scores_the_lower_index_stays():
    scores = torch.tensor([[5.0, 5, 5, 5, 1, 2, 2, 2, 0, 9, 0, 0, 3, 3, 4, 3]])
    expected = [1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0]
    for name in ("exact", "ewma"):
        assert choose24(scores, name)[0].int().tolist() == [expected]


def test_the_threshold_settles_what_it_should():
    assert choose24(torch.tensor([[1.0, 0, 1, 0] * 20]))[1] == 20
    assert choose24(torch.ones(2, 80))[1] == 0
    # Equal to the threshold (mean 1, lam 0) is not above it.
    assert choose24(torch.tensor([[3.0, 1, 0, 0]]), lam=0.0)[1] == 0
    # The first group seeds the state and is settled by it; a jump by 100 is above in all four.
    assert choose24(torch.tensor([[1.0, 0, 1, 0, 100, 200, 300, 400]]))[1] == 1


@pytest.mark.parametrize("lam", [-1.0, DEFAULT_LAMBDA, 0.0])
def test_settled_counts_what_the_threshold_settles(lam):
    scores = gaussian(7, 64, 1024)
    mean, dev = naive_ewma(scores.view(64, 256, 4).mean(-1))
    above = scores.view(64, 256, 4) > (mean + lam * dev).unsqueeze(-1)
    expected = int((above.sum(-1) == 2).sum())
    assert int(choose24(scores, "ewma", lam=lam)[1]) == pytest.approx(expected, abs=0.001 * 64 * 256)


def test_the_default_lambda_settles_about_what_a_threshold_can():
    scores = gaussian(1, 256, 2048)
    for name in ("ewma", "ewma_streaming"):
        grid = [int(choose24(scores, name, lam=-1.5 + 0.125 * i)[1]) / 256 / 512 for i in range(21)]
        default = int(choose24(scores, name)[1]) / 256 / 512
        assert default > 0.3
        assert default > 0.9 * max(grid)


@pytest.mark.parametrize("power", [0.5, 1, 4])
def test_no_threshold_settles_more_than_six_of_sixteen_groups(power):
    """A score drawn alike is above it with some chance p; 6 p^2 (1 - p)^2 is 0.375 at most."""
    scores = gaussian(2, 256, 2048) ** power
    for lam in (-1.0, -0.75, DEFAULT_LAMBDA, -0.25, 0.0):
        for rates in ((1 / 8, 1 / 4), (1 / 64, 1 / 64)):
            assert int(choose24(scores, "ewma", *rates, lam)[1]) / 256 / 512 < 0.375 + 0.005


@settings(deadline=None, max_examples=80)
@given(scores=adversarial(), lam=st.sampled_from([DEFAULT_LAMBDA, 0.0, 0.7]))
def test_streaming_is_the_loop_on_adversarial_scores(scores, lam):
    got = choose24(scores, "ewma_streaming", lam=lam)
    mask, settled = stream(scores, *ewma(scores), lam)
    assert torch.equal(got[0], mask)
    assert got[1] == settled


@pytest.mark.parametrize("seed", range(6))
def test_streaming_is_the_loop_on_ordinary_scores(seed):
    scores = gaussian(seed, 4, 200)
    got = choose24(scores, "ewma_streaming")
    mask, settled = stream(scores, *naive_ewma(scores), DEFAULT_LAMBDA)
    assert torch.equal(got[0], mask)
    assert got[1] == settled


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), t=st.integers(1, 63))
def test_streaming_does_not_look_ahead(seed, t):
    scores = gaussian(seed, 2, 64)
    other = scores.clone()
    other[:, t:] = gaussian(seed + 1, 2, 64)[:, t:]
    first, second = (choose24(s, "ewma_streaming")[0] for s in (scores, other))
    assert torch.equal(first[:, :t], second[:, :t])


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("scores", [gaussian(3, 33, 512), torch.full((33, 512), 0.3)], ids=["random", "equal"])
def test_rows_do_not_depend_on_their_company(name, scores):
    whole, _ = choose24(scores, name)
    for start, stop in [(0, 1), (32, 33), (4, 9), (1, 32)]:
        assert torch.equal(choose24(scores[start:stop], name)[0], whole[start:stop])


@pytest.mark.parametrize("name", SELECTIONS)
def test_dtypes_and_strides(name):
    scores = gaussian(4, 64, 512)
    strided = scores.T.contiguous().T
    assert torch.equal(choose24(strided, name)[0], choose24(scores, name)[0])
    half = scores.bfloat16()
    for got, expected in zip(choose24(half, name), choose24(half.float(), name), strict=True):
        assert torch.equal(got, expected)


# the op and its kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATES = (1 / 8, 1 / 4)


def weights(seed, rows, columns, dtype=torch.float32):
    """Rows of very different sizes, some of them and some columns zero, and sums of squares."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.exp2(torch.randint(-12, 12, (rows, 1), generator=generator))
    weight[:, torch.rand(columns, generator=generator) < 0.1] = 0
    sum_sq = torch.exp(2 * torch.randn(columns, generator=generator))
    return weight.to(dtype).to(DEVICE), sum_sq.to(DEVICE)


def by_kernel(weight, sum_sq, saliency, selection, mean_rate=RATES[0], dev_rate=RATES[1], lam=DEFAULT_LAMBDA):
    """What the kernel writes over bytes and counts that are neither."""
    launch = pytest.importorskip("hwpq_fx.kernels.select24_triton").launch
    mask = torch.full(weight.shape, 0x55, dtype=torch.uint8, device=DEVICE)
    settled = torch.full(weight.shape[:1], -1, dtype=torch.int32, device=DEVICE)
    vectors = terms_of(weight, sum_sq, saliency)
    launch(weight, vectors, saliency, selection, mean_rate, dev_rate, lam, mask.view(torch.bool), settled)
    return mask, settled


def assert_same_as_reference(weight, sum_sq, saliency, selection, *constants):
    mask, settled = by_kernel(weight, sum_sq, saliency, selection, *constants)
    constants = constants or (*RATES, DEFAULT_LAMBDA)
    expected, count = select24_reference(weight, sum_sq, saliency, selection, *constants)
    assert torch.equal(mask, expected.view(torch.uint8))
    assert bool((settled >= 0).all())
    assert int(settled.sum()) == int(count)
    return int(count)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_has_the_bits_of_the_reference(dtype, saliency, selection):
    # more than one tree of groups, and a ragged last one
    weight, sum_sq = weights(0, 3, 4 * SCAN_BLOCK + 36, dtype)
    count = assert_same_as_reference(weight, sum_sq, saliency, selection)
    assert (count > 0) == (selection != "exact")


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("columns", [4, 8, 12, 60, 64, 124, 128, 132, 508, 512, 516, 2052])
def test_kernel_at_ragged_lengths(columns, selection):
    weight, sum_sq = weights(columns, 2, columns)
    assert_same_as_reference(weight, sum_sq, "contribution", selection)


@settings(deadline=None, max_examples=40)
@given(
    weight=adversarial(),
    signs=st.integers(0, 2**31),
    free=st.booleans(),
    dtype=st.sampled_from(KERNEL_DTYPES),
    saliency=st.sampled_from(list(SALIENCIES)),
    selection=st.sampled_from(list(SELECTIONS)),
    lam=st.sampled_from([DEFAULT_LAMBDA, 0.0, 0.7]),
    rates=st.sampled_from([RATES, (1.0, 1.0), (0.01, 0.9), (1e-40, 1e-300)]),
)
def test_kernel_on_adversarial_weights(weight, signs, free, dtype, saliency, selection, lam, rates):
    generator = torch.Generator().manual_seed(signs)
    weight = weight * (1 - 2 * torch.randint(2, weight.shape, generator=generator))
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).to(DEVICE)
    if dtype is torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter gives its subnormals other values
        weight = weight.masked_fill(weight.abs() < torch.finfo(dtype).tiny, 0)
    sum_sq = None if free else torch.rand(weight.shape[1], generator=generator).to(DEVICE)
    assert_same_as_reference(weight, sum_sq, saliency, selection, *rates, lam)


@pytest.mark.parametrize("peak", [2.0**-149, 3e-45, 2.0**-127, 2.0**-126, 1e-20, 1e20, 3.4e38])
@pytest.mark.parametrize("saliency", SALIENCIES)
def test_kernel_at_extreme_scales(saliency, peak):
    weight, sum_sq = weights(1, 2, 64)
    weight = (weight / weight.abs().amax(1, keepdim=True)).double().mul(peak).float()
    assert_same_as_reference(weight, sum_sq, saliency, "ewma_streaming")
    assert_same_as_reference(weight, sum_sq * 1e-38, saliency, "exact")


def test_kernel_of_zeros_keeps_the_first_two():
    mask, _ = by_kernel(torch.zeros(2, 20, device=DEVICE), None, "contribution", "ewma")
    assert mask.tolist() == [[1, 1, 0, 0] * 5] * 2


def test_kernel_takes_any_strides():
    weight, sum_sq = weights(2, 8, 8)
    assert_same_as_reference(weight.t(), sum_sq, "contribution", "ewma")


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("saliency", SALIENCIES)
def test_the_op_chooses_by_its_score(saliency, selection):
    weight, sum_sq = weights(3, 16, 96, torch.bfloat16)
    for sums in (sum_sq, None):
        got = select24(weight, sums, saliency, selection, 1 / 16, 1 / 3, -0.3)
        expected = choose24(score(weight, sums, saliency), selection, 1 / 16, 1 / 3, -0.3)
        assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True, True]


def test_other_float_dtypes_take_the_reference():
    weight, sum_sq = weights(4, 8, 32, torch.float64)
    assert torch.equal(select24(weight, sum_sq)[0], select24(weight.float(), sum_sq)[0])


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64])
def test_the_op_is_a_proper_one(dtype):
    weight, sum_sq = weights(5, 4, 32, dtype)
    for arguments in ((weight,), (weight, sum_sq, "relative", "ewma_streaming", 0.5, 0.5, 1.0)):
        torch.library.opcheck(torch.ops.hwpq_fx.select24.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": lambda w: w[0]}, r"weight must be \[N, K\]"),
        ({"weight": lambda w: w[:0]}, "weight must be .* not empty"),
        ({"weight": lambda w: w.int()}, "weight must be .* floating point"),
        ({"weight": lambda w: w[:, :30], "sum_sq": lambda s: s[:30]}, r"multiple of 4 columns, got weight \[4, 30\]"),
        ({"sum_sq": lambda s: s[1:]}, r"sum_sq must be \[32\], got \[31\]"),
        ({"sum_sq": lambda s: s.double()}, "sum_sq must be float32 .* got torch.float64"),
        ({"saliency": lambda _: "wanda"}, "unknown saliency 'wanda'.*contribution, rank_one, relative, magnitude"),
        ({"selection": lambda _: "topk"}, "unknown selection 'topk'.*ewma, ewma_streaming, exact"),
        ({"mean_rate": lambda _: 0.0}, "rates .* mean_rate 0.0"),
        ({"dev_rate": lambda _: 1.5}, "rates .* dev_rate 1.5"),
    ],
)
def test_what_the_op_and_its_fake_reject(change, message):
    def arguments():
        weight, sum_sq = torch.ones(4, 32), torch.ones(32)
        given = {"weight": weight, "sum_sq": sum_sq, "saliency": "", "selection": "", "mean_rate": 0, "dev_rate": 0}
        plain = {"saliency": "contribution", "selection": "ewma", "mean_rate": 1 / 8, "dev_rate": 1 / 4}
        return given | plain | {name: make(given[name]) for name, make in change.items()}

    with pytest.raises(ValueError, match=message):
        select24(**arguments())
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        select24(**arguments())


def test_a_choice_from_scores_checks_them():
    with pytest.raises(ValueError, match="unknown selection 'topk'; known: ewma, ewma_streaming, exact"):
        choose24(torch.rand(2, 8), "topk")
    with pytest.raises(ValueError, match=r"multiple of 4 columns, got scores \[2, 6\]"):
        choose24(torch.rand(2, 6))
    for name in SELECTIONS:
        with pytest.raises(ValueError, match="not empty"):
            choose24(torch.rand(0, 8), name)
        with pytest.raises(ValueError, match=r"\[N, K\]"):
            choose24(torch.rand(8), name)
