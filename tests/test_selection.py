import ast
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx import compensation, ewma, saliency, selection
from hwpq_fx.ewma import ewma as moving_average
from hwpq_fx.selection import DEFAULT_LAMBDA, SELECTIONS, select24, select_ratio

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
    """Reference: one element after another. Returns the mask and the share of unforced groups."""
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
    return mask, unforced / (rows * columns // 4)


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


# 2:4


@pytest.mark.parametrize("name", SELECTIONS)
@settings(deadline=None, max_examples=80)
@given(scores=adversarial(), lam=st.sampled_from([DEFAULT_LAMBDA, -2.0, 0.0, 1.0]))
def test_exactly_two_of_every_four(name, scores, lam):
    mask, settled = select24(scores, name, lam=lam)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert bool((mask.view(-1, 4).sum(1) == 2).all())
    assert 0 <= settled <= 1


@settings(deadline=None, max_examples=150)
@given(scores=adversarial())
def test_exact_is_the_stable_sort(scores):
    mask, settled = select24(scores, "exact")
    assert torch.equal(mask, best_two(scores))
    assert settled == 0.0


@settings(deadline=None, max_examples=150)
@given(
    scores=adversarial(),
    lam=st.sampled_from([DEFAULT_LAMBDA, -2.0, 0.0, 1.0]),
    rates=st.sampled_from([(1 / 8, 1 / 4), (1.0, 1.0), (0.01, 0.9)]),
)
def test_ewma_is_exact(scores, lam, rates):
    assert torch.equal(select24(scores, "ewma", *rates, lam).mask, best_two(scores))


@pytest.mark.parametrize("seed", range(5))
def test_ewma_is_exact_on_ordinary_scores(seed):
    scores = gaussian(seed)
    assert torch.equal(select24(scores).mask, best_two(scores))


def test_of_equal_scores_the_lower_index_stays():
    scores = torch.tensor([[5.0, 5, 5, 5, 1, 2, 2, 2, 0, 9, 0, 0, 3, 3, 4, 3]])
    expected = [1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0]
    for name in ("exact", "ewma"):
        assert select24(scores, name).mask.int().tolist() == [expected]


def test_the_threshold_settles_what_it_should():
    assert select24(torch.tensor([[1.0, 0, 1, 0] * 20])).settled == 1.0
    assert select24(torch.ones(2, 80)).settled == 0.0
    # Equal to the threshold (mean 1, lam 0) is not above it.
    assert select24(torch.tensor([[3.0, 1, 0, 0]]), lam=0.0).settled == 0.0
    # The first group seeds the state and is settled by it; a jump by 100 is above in all four.
    assert select24(torch.tensor([[1.0, 0, 1, 0, 100, 200, 300, 400]])).settled == 0.5


@pytest.mark.parametrize("lam", [-1.0, DEFAULT_LAMBDA, 0.0])
def test_settled_is_the_share_the_threshold_settles(lam):
    scores = gaussian(7, 64, 1024)
    mean, dev = naive_ewma(scores.view(64, 256, 4).mean(-1))
    above = scores.view(64, 256, 4) > (mean + lam * dev).unsqueeze(-1)
    expected = (above.sum(-1) == 2).double().mean()
    assert select24(scores, "ewma", lam=lam).settled == pytest.approx(float(expected), abs=1e-3)


def test_the_default_lambda_settles_about_what_a_threshold_can():
    scores = gaussian(1, 256, 2048)
    for name in ("ewma", "ewma_streaming"):
        grid = [select24(scores, name, lam=-1.5 + 0.125 * i).settled for i in range(21)]
        default = select24(scores, name).settled
        assert default > 0.3
        assert default > 0.9 * max(grid)


@settings(deadline=None, max_examples=80)
@given(scores=adversarial(), lam=st.sampled_from([DEFAULT_LAMBDA, 0.0, 0.7]))
def test_streaming_is_the_loop_on_adversarial_scores(scores, lam):
    got = select24(scores, "ewma_streaming", lam=lam)
    mask, settled = stream(scores, *moving_average(scores), lam)
    assert torch.equal(got.mask, mask)
    assert got.settled == settled


@pytest.mark.parametrize("seed", range(6))
def test_streaming_is_the_loop_on_ordinary_scores(seed):
    scores = gaussian(seed, 4, 200)
    got = select24(scores, "ewma_streaming")
    mask, settled = stream(scores, *naive_ewma(scores), DEFAULT_LAMBDA)
    assert torch.equal(got.mask, mask)
    assert got.settled == settled


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), t=st.integers(1, 63))
def test_streaming_does_not_look_ahead(seed, t):
    scores = gaussian(seed, 2, 64)
    other = scores.clone()
    other[:, t:] = gaussian(seed + 1, 2, 64)[:, t:]
    first, second = (select24(s, "ewma_streaming").mask for s in (scores, other))
    assert torch.equal(first[:, :t], second[:, :t])


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("scores", [gaussian(3, 33, 512), torch.full((33, 512), 0.3)], ids=["random", "equal"])
def test_rows_do_not_depend_on_their_company(name, scores):
    whole = select24(scores, name).mask
    for start, stop in [(0, 1), (32, 33), (4, 9), (1, 32)]:
        assert torch.equal(select24(scores[start:stop], name).mask, whole[start:stop])


@pytest.mark.parametrize("name", SELECTIONS)
def test_dtypes_and_strides(name):
    scores = gaussian(4, 64, 512)
    strided = scores.T.contiguous().T
    assert torch.equal(select24(strided, name).mask, select24(scores, name).mask)
    half = scores.bfloat16()
    got, expected = select24(half, name), select24(half.float(), name)
    assert torch.equal(got.mask, expected.mask)
    assert got.settled == expected.settled
    for other in (half, scores.double()):
        assert torch.equal(select_ratio(other, 0.5).mask, select_ratio(other.float(), 0.5).mask)


def test_select24_errors():
    with pytest.raises(ValueError, match=r"'topk'.*ewma, ewma_streaming, exact"):
        select24(torch.rand(2, 8), "topk")
    with pytest.raises(ValueError, match="multiple of 4 columns, got 6"):
        select24(torch.rand(2, 6))
    for name in SELECTIONS:
        with pytest.raises(ValueError, match="NaN"):
            select24(torch.tensor([[1.0, 2.0, torch.nan, 0.0]]), name)
        with pytest.raises(ValueError, match="not empty"):
            select24(torch.rand(0, 8), name)
        with pytest.raises(ValueError, match=r"\[N, K\]"):
            select24(torch.rand(8), name)


# unstructured

SHAPED = {
    "gaussian": lambda: gaussian(0),
    "constant": lambda: torch.full((256, 256), 0.3),
    "zero": lambda: torch.zeros(256, 256),
    "heavy tails": lambda: torch.exp(4 * torch.randn(256, 300, generator=torch.Generator().manual_seed(0))),
    "many zeros": lambda: gaussian(1) * (gaussian(2) > 0.8),
    "few values": lambda: (gaussian(3) * 2).floor(),
    "rows apart": lambda: gaussian(4) * torch.exp2(torch.arange(-60.0, 68, 0.5).floor())[:, None],
}


@pytest.mark.parametrize("shape", SHAPED)
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 0.77, 0.99])
def test_the_ratio_is_reached_exactly(shape, ratio):
    scores = SHAPED[shape]()
    mask, settled = select_ratio(scores, ratio)
    assert mask.shape == scores.shape
    assert int((~mask).sum()) == round(ratio * scores.numel())
    assert 0 <= settled <= 1


@settings(deadline=None, max_examples=80)
@given(scores=adversarial(), ratio=st.floats(0.001, 0.999))
def test_the_ratio_is_reached_on_adversarial_scores(scores, ratio):
    mask, settled = select_ratio(scores, ratio)
    assert int((~mask).sum()) == round(ratio * scores.numel())
    assert 0 <= settled <= 1


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_one_lambda_separates_kept_from_pruned(ratio):
    scores = gaussian(5, 256, 400)
    mean, dev = naive_ewma(scores)
    lambdas = (scores - mean) / dev
    mask, settled = select_ratio(scores, ratio)
    assert float(lambdas[~mask].max()) < float(lambdas[mask].min()) + 1e-4
    assert settled > 0.999
    assert scores[mask].mean() > 3 * scores[~mask].mean()


@pytest.mark.parametrize("dev_rate", [1 / 4, 1.0])  # at 1.0 the deviation is exactly zero
@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 1e-30, 1e30])
def test_equal_scores_are_dealt_by_index(value, dev_rate):
    mask, settled = select_ratio(torch.full((64, 100), value), 0.25, dev_rate=dev_rate)
    assert mask.flatten().tolist() == [True] * 4800 + [False] * 1600
    assert settled == 0.0


def test_zero_scores_go_first():
    scores = SHAPED["many zeros"]()
    zeros = float((scores == 0).float().mean())
    assert not select_ratio(scores, zeros - 0.05).mask[scores > 0].logical_not().any()
    assert not select_ratio(scores, zeros + 0.05).mask[scores == 0].any()


def test_every_row_has_its_own_threshold():
    scores = gaussian(6)
    scaled = scores * torch.exp2(torch.randint(-40, 40, (256, 1)).float())
    assert torch.equal(select_ratio(scores, 0.5).mask, select_ratio(scaled, 0.5).mask)


@pytest.mark.parametrize("lam", [-1e9, -1.0, 0.3, 1e9])
def test_lambda_is_only_the_start(lam):
    for shape in ("gaussian", "few values"):
        scores = SHAPED[shape]()
        got, expected = select_ratio(scores, 0.4, lam=lam), select_ratio(scores, 0.4)
        assert torch.equal(got.mask, expected.mask)
        assert got.settled == expected.settled


def test_select_ratio_uses_its_rates():
    scores = gaussian(8)
    default = select_ratio(scores, 0.5).mask
    assert not torch.equal(select_ratio(scores, 0.5, mean_rate=0.5).mask, default)
    assert not torch.equal(select_ratio(scores, 0.5, dev_rate=0.9).mask, default)


def test_select_ratio_errors():
    for ratio in (0.0, 1.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="ratio must be in"):
            select_ratio(torch.rand(4, 4), ratio)
    for bad, message in ((torch.nan, "NaN"), (torch.inf, "infinity")):
        with pytest.raises(ValueError, match=message):
            select_ratio(torch.tensor([[1.0, bad]]), 0.5)
    with pytest.raises(ValueError, match="not empty"):
        select_ratio(torch.rand(4, 0), 0.5)


@pytest.mark.parametrize("module", [saliency, ewma, selection, compensation])
def test_the_method_never_sorts(module):
    sorters = {"sort", "sorted", "msort", "argsort", "topk", "kthvalue", "median", "nanmedian", "quantile"}
    tree = ast.walk(ast.parse(inspect.getsource(module)))
    assert not sorters & {getattr(node, "attr", getattr(node, "id", None)) for node in tree}
