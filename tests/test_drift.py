"""How much of what a layer is to make up for is more than chance."""

import pytest
import torch

from hwpq_fx.drift import Drift, halves_of
from hwpq_fx.reconstruction import reconstruct

ROWS, K, N, STEPS = 1024, 64, 48, 20


def gathered(weight, runs, pulled=True):
    """runs: D, X and what residuals are off by, run by run."""
    drift, gram, cross = Drift(weight, pulled), torch.zeros(K, K), torch.zeros(K, K)
    for number, (dense, x, off) in enumerate(runs):
        gram += x.T @ x
        cross += (dense - x).T @ x
        drift.add(dense - x, [] if off is None else [off], x, halves_of(number, len(x)))
    return drift, gram, cross


def runs_of(true, noise, count=4):
    """Residuals that are off by x @ true^T and noise."""
    inputs = [torch.randn(ROWS // count, K) for _ in range(count)]
    return [(x, x, x @ true.T + noise * torch.randn(len(x), N)) for x in inputs]


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0, 1e3])
def test_the_share_that_is_no_chance(noise):
    true = torch.randn(N, K) / 8
    drift, gram, cross = gathered(torch.randn(N, K), runs_of(true, noise))
    # a fit to R rows finds true + noise * G^-1 X^T n: of its size, what is true
    expected = true.square().sum() / (true.square().sum() + noise**2 * N * K / ROWS)
    assert drift.share(gram, STEPS) == pytest.approx(float(expected), abs=0.1)
    whole = drift.pull + drift.weight @ cross
    torch.testing.assert_close(drift.total(cross, gram, STEPS), drift.share(gram, STEPS) * whole)


def test_fresh_rows_lose_less_by_the_share_than_by_all_or_none():
    true = torch.randn(N, K) / 16
    drift, gram, cross = gathered(torch.zeros(N, K), runs_of(true, 2.0))
    fits = [
        reconstruct(torch.zeros(N, K), torch.ones(N, K, dtype=torch.bool), gram, STEPS, drift=one)
        for one in (drift.total(cross, gram, STEPS), drift.pull)
    ]
    share, everything, nothing = ((fit - true).square().sum() for fit in (*fits, torch.zeros(N, K)))
    assert share < 0.8 * min(everything, nothing)


def test_inputs_and_residuals_together():
    """What one adds and the other takes off again is nothing."""
    weight = torch.randn(N, K)
    runs = [(x + torch.randn_like(x), x, None) for x in torch.randn(4, ROWS // 4, K)]
    cancelled = [(dense, x, -(dense - x) @ weight.T + x @ weight.T) for dense, x, _ in runs]
    drift, gram, cross = gathered(weight, cancelled)
    share = drift.share(gram, STEPS)
    assert share > 0.9
    torch.testing.assert_close(drift.total(cross, gram, STEPS) / share, weight @ gram, rtol=1e-3, atol=1.0)
    assert gathered(weight, runs, pulled=False)[0].share(gram, STEPS) < 0.5


def test_residuals_of_all_runs_or_none():
    runs = runs_of(torch.randn(N, K), 0.0)
    dense, x, _ = runs[-1]
    drift, gram, cross = gathered(torch.randn(N, K), [*runs[:-1], (dense, x, None)])
    assert drift.pull is None and drift.share(gram, STEPS) == 0 and not drift.total(cross, gram, STEPS).any()


def test_of_one_run_one_half_each():
    assert [(half, list(range(10))[part]) for half, part in halves_of(0, 10)] == [
        (0, [*range(5)]),
        (1, [*range(5, 10)]),
    ]
    for run in (1, 2, 3):
        ((half, part),) = halves_of(run, 10)
        assert half == run % 2 and len(range(10)[part]) == 10
    drift, gram, _ = gathered(torch.randn(N, K), runs_of(torch.randn(N, K), 0.0, count=1))
    assert drift.share(gram, STEPS) > 0.9


@pytest.mark.parametrize(("rows", "channels", "at_most"), [(1000, 64, 256), (1000, 2048, 32), (20, 2048, 20)])
def test_some_rows_tell_for_all(rows, channels, at_most):
    weight = torch.randn(rows, channels)
    drift = Drift(weight, pulled=True)
    assert at_most / 2 < len(drift._probe) <= at_most and drift.pull.shape == weight.shape
