import ast
import inspect
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_select24 import adversarial, gaussian, naive_ewma

from hwpq_fx import compensation, selection
from hwpq_fx.kernels import ewma, saliency
from hwpq_fx.selection import select_ratio

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


def test_dtypes():
    scores = gaussian(4, 64, 512)
    for other in (scores.bfloat16(), scores.double()):
        assert torch.equal(select_ratio(other, 0.5).mask, select_ratio(other.float(), 0.5).mask)


def test_select_ratio_errors():
    for ratio in (0.0, 1.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="ratio must be in"):
            select_ratio(torch.rand(4, 4), ratio)
    for bad, message in ((torch.nan, "NaN"), (torch.inf, "infinity")):
        with pytest.raises(ValueError, match=message):
            select_ratio(torch.tensor([[1.0, bad]]), 0.5)
    with pytest.raises(ValueError, match="not empty"):
        select_ratio(torch.rand(4, 0), 0.5)


MODULES = [saliency, ewma, sys.modules["hwpq_fx.kernels.select24"], selection, compensation]


@pytest.mark.parametrize("module", MODULES)
def test_the_method_never_sorts(module):
    sorters = {"sort", "sorted", "msort", "argsort", "topk", "kthvalue", "median", "nanmedian", "quantile"}
    tree = ast.walk(ast.parse(inspect.getsource(module)))
    assert not sorters & {getattr(node, "attr", getattr(node, "id", None)) for node in tree}
