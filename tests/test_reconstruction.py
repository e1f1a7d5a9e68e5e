from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx.gram import MatrixFree, Rounded
from hwpq_fx.kernels import select24
from hwpq_fx.reconstruction import lead, rechoose, reconstruct, reconstruction_loss, refine

torch.set_num_threads(2)

ROUNDING = {"rtol": 1e-2, "atol": 2e-3}  # of a product, after twenty steps have carried it on
PATTERNS = torch.tensor([[i in pair for i in range(4)] for pair in combinations(range(4), 2)])


def problem(seed, rows=6, channels=32, samples=128, shared=2):
    """W, its 2:4 mask by contribution, X with `shared` directions common to all channels, and X^T X."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels, generator=generator)
    x += torch.randn(samples, shared, generator=generator) @ torch.randn(shared, channels, generator=generator)
    x *= torch.exp(torch.randn(channels, generator=generator))
    weight = torch.randn(rows, channels, generator=generator)
    gram = x.T @ x
    return weight, select24(weight, gram.diagonal())[0], x, gram


def solved(weight, mask, gram, damping):
    """Reference: the normal equations of every row in float64."""
    gram = gram.double()
    gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
    out = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(mask):
        w = weight[row].double()
        change = torch.linalg.solve(gram[kept][:, kept], gram[kept][:, ~kept] @ w[~kept])
        out[row, kept] = w[kept] + change
    return out


def exact_loss(weight, new, x):
    return ((new.double() - weight.double()) @ x.double().T).square().sum(1)


def assert_gains(weight, mask, new, gram):
    """No row is worse than its masked self, every row that can be better is, and only the mask is filled."""
    before, after = reconstruction_loss(weight, weight * mask, gram), reconstruction_loss(weight, new, gram)
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.95 * float(before.sum())
    assert not bool(new[~mask].any())


SIZES = {
    "channels": st.sampled_from([4, 8, 20, 64]),
    "samples": st.sampled_from([2, 7, 30, 200]),
    "shared": st.integers(1, 4),
}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31), steps=st.integers(1, 60), damping=st.sampled_from([0.0, 1e-3, 1e-2, 0.1, 10.0]), **SIZES
)
def test_no_row_gets_worse_and_nothing_grows_outside_the_mask(seed, steps, damping, channels, samples, shared):
    weight, mask, _, gram = problem(seed, 5, channels, samples, shared)
    new = reconstruct(weight, mask, gram, steps, damping)
    assert new.dtype == torch.float32
    before, after = reconstruction_loss(weight, weight * mask, gram), reconstruction_loss(weight, new, gram)
    assert bool((after <= before).all())
    assert float(after.sum()) < float(before.sum())
    assert not bool(new[~mask].any())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), damping=st.sampled_from([1e-3, 1e-2, 0.1, 1.0]), channels=SIZES["channels"])
def test_enough_steps_solve_the_normal_equations(seed, damping, channels):
    weight, mask, _, gram = problem(seed, channels=channels, samples=4 * channels)
    new = reconstruct(weight, mask, gram, 3 * channels, damping)
    expected = solved(weight, mask, gram, damping)
    assert not torch.equal(new, weight * mask)
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-3)


def test_without_damping_too_and_for_any_pattern():
    weight, _, _, gram = problem(3, samples=400)
    mask = torch.rand(weight.shape) < 0.7
    mask[0], mask[1] = True, False
    new = reconstruct(weight, mask, gram, 100, damping=0)
    assert torch.equal(new[0], weight[0]) and not bool(new[1].any())
    torch.testing.assert_close(new.double(), solved(weight, mask, gram, 0.0), rtol=1e-3, atol=1e-3)


def test_a_row_that_would_end_worse_is_left_masked():
    weight, mask, _, gram = problem(24)
    # e (I + S) e^T = e e^T: whatever the slope says, only standing still is not worse
    skew = torch.randn(32, 32)
    skew = torch.eye(32) + skew - skew.T
    assert torch.equal(reconstruct(weight, mask, skew), weight * mask)
    assert torch.equal(refine(weight, mask, skew)[0].abs() > 0, refine(weight, mask, skew)[1])
    assert not torch.equal(reconstruct(weight, mask, gram), weight * mask)


def test_damping_pulls_towards_the_weight_as_it_was():
    weight, mask, _, gram = problem(4)
    moved = [
        (reconstruct(weight, mask, gram, 100, damping) - weight * mask).norm().item() for damping in (0, 0.1, 1, 1e4)
    ]
    assert moved[0] > moved[1] > moved[2] > moved[3] > 0
    assert moved[3] < 1e-3 * moved[0]


def test_more_steps_lower_the_loss():
    weight, mask, _, gram = problem(5, 16, 64)
    totals = [float(reconstruction_loss(weight, reconstruct(weight, mask, gram, n), gram).sum()) for n in (0, 1, 3, 20)]
    assert totals[0] > 1.2 * totals[1] and totals[1] > totals[2] > totals[3]
    assert torch.equal(reconstruct(weight, mask, gram, 0), weight * mask)


def test_a_row_does_not_change_with_the_others_bit_for_bit():
    weight, mask, _, gram = problem(6, 8, 64)
    new = reconstruct(weight, mask, gram)
    others, masks = torch.randn(8, 64) * 100, torch.rand(8, 64) < 0.5
    others[3], masks[3] = weight[3], mask[3]
    others[4:6] = 0  # these stall at once
    assert torch.equal(reconstruct(others, masks, gram)[3], new[3])
    assert not torch.equal(new[3], (weight * mask)[3])


def test_rows_may_come_in_parts_to_the_rounding_of_the_product():
    weight, mask, _, gram = problem(7, 9, 64)
    whole = reconstruct(weight, mask, gram)
    parts = [reconstruct(w, m, gram) for w, m in zip(weight.split(4), mask.split(4), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, **ROUNDING)
    assert_gains(weight, mask, torch.cat(parts), gram)


def test_the_order_of_the_calibration_rows_does_not_matter_to_rounding():
    weight, mask, x, gram = problem(8)
    shuffled = x[torch.randperm(len(x))]
    for one, other, kwargs in (
        (gram, shuffled.T @ shuffled, {}),
        (MatrixFree(x), MatrixFree(shuffled), {"diagonal": gram.diagonal()}),
    ):
        a, b = reconstruct(weight, mask, one, **kwargs), reconstruct(weight, mask, other, **kwargs)
        torch.testing.assert_close(a, b, **ROUNDING)
        assert_gains(weight, mask, a, gram)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), max_bytes=st.sampled_from([1, 4 * 64 * 3, 2**26]), **SIZES)
def test_gram_and_matrix_free_agree(seed, max_bytes, channels, samples, shared):
    weight, mask, x, gram = problem(seed, 5, channels, samples, shared)
    free = MatrixFree(x, max_bytes)
    torch.testing.assert_close(free(weight), weight @ gram, rtol=1e-4, atol=1e-4 * float(gram.abs().max()))
    torch.testing.assert_close(free.diagonal, gram.diagonal(), rtol=1e-4, atol=0)
    by_gram, by_sample = reconstruct(weight, mask, gram), reconstruct(weight, mask, free, diagonal=free.diagonal)
    before = float(reconstruction_loss(weight, weight * mask, gram).sum())
    a, b = (float(reconstruction_loss(weight, new, gram).sum()) for new in (by_gram, by_sample))
    assert a < before and abs(a - b) < 1e-3 * before
    a, b = reconstruction_loss(weight, by_gram, gram), reconstruction_loss(weight, by_gram, free)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * before)


def test_matrix_free_bounds_its_temporaries_and_takes_half_precision():
    x = torch.randn(1000, 32).bfloat16()
    free, widths = MatrixFree(x, max_bytes=4 * 32 * 10), []
    for part in free._parts(32):
        widths.append(part.numel() * 4)
        assert part.dtype == torch.float32
    assert max(widths) == 4 * 32 * 10 and len(widths) == 100
    gram = x.double().T @ x.double()
    rows = torch.randn(3, 32)
    torch.testing.assert_close(free(rows).double(), rows.double() @ gram, rtol=1e-4, atol=1e-2)
    blocks = torch.stack([gram[i : i + 4, i : i + 4] for i in range(0, 32, 4)])
    torch.testing.assert_close(free.blocks.double(), blocks, rtol=1e-4, atol=1e-2)


def test_the_loss_is_the_squared_error_of_the_outputs():
    weight, mask, x, gram = problem(9)
    expected = exact_loss(weight, weight * mask, x)
    got = reconstruction_loss(weight, weight * mask, gram)
    assert got.dtype == torch.float64 and got.shape == (6,)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    assert reconstruction_loss(weight, weight, gram).tolist() == [0.0] * 6
    # against the outputs themselves: the compensated ones are closer
    assert bool((exact_loss(weight, reconstruct(weight, mask, gram), x) < 0.9 * expected).all())


def test_dead_channels_keep_their_weights():
    weight, mask, x, _ = problem(10)
    x[:, [0, 5, 6, 31]] = 0
    mask[:, [0, 5]], mask[:, [6, 31]] = True, False
    gram = x.T @ x
    for damping in (0.0, 1e-2):
        new = reconstruct(weight, mask, gram, damping=damping)
        assert torch.equal(new[:, [0, 5]], weight[:, [0, 5]])
        assert_gains(weight, mask, new, gram)


def test_nothing_alive_nothing_changed():
    weight, mask, _, gram = problem(11)
    assert torch.equal(reconstruct(weight, mask, torch.zeros_like(gram), damping=0), weight * mask)
    assert not torch.equal(reconstruct(weight, mask, gram, damping=0), weight * mask)


def test_all_zero_rows_stay_zero():
    weight, mask, _, gram = problem(12)
    weight[2] = 0
    new = reconstruct(weight, mask, gram)
    assert not bool(new[2].any()) and bool(new.isfinite().all())
    assert_gains(weight, mask, new, gram)


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_a_kept_duplicate_takes_over(damping):
    weight, _, x, _ = problem(13)
    x[:, 1::2] = x[:, ::2]
    mask = torch.arange(32).remainder(2).eq(0).expand(6, 32)
    new = reconstruct(weight, mask, x.T @ x, 60, damping)
    if damping == 0:
        torch.testing.assert_close(new[:, ::2], weight[:, ::2] + weight[:, 1::2], rtol=0, atol=1e-3)
    assert_gains(weight, mask, new, x.T @ x)
    both = torch.ones_like(mask)
    both[:, 28:] = False  # duplicates that both stay: a singular system
    new = reconstruct(weight, both, x.T @ x, 60, damping)
    assert float(new.abs().max()) < 100
    assert_gains(weight, both, new, x.T @ x)


def test_fewer_rows_than_channels_do_not_blow_the_weights_up():
    weight, mask, x, gram = problem(14, channels=64, samples=9)
    new = reconstruct(weight, mask, gram, 200, damping=0)
    # 32 kept weights answer for 9 inputs: exactly, and so that rounding finds nothing left to chase
    before, after = exact_loss(weight, weight * mask, x), exact_loss(weight, new, x)
    assert bool((after < 1e-5 * before).all())
    assert float(new.abs().max()) < 20 * float(weight.abs().max())


def test_one_group_is_solved_in_two_steps():
    weight, mask, _, gram = problem(15, channels=4)
    new = reconstruct(weight, mask, gram, 2, damping=0)
    torch.testing.assert_close(new.double(), solved(weight, mask, gram, 0.0), rtol=1e-4, atol=1e-4)
    assert_gains(weight, mask, new, gram)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), rows=st.integers(-60, 60), inputs=st.integers(-60, 60))
def test_a_power_of_two_changes_no_bit(seed, rows, inputs):
    weight, mask, x, gram = problem(seed)
    row = 2.0 ** torch.randint(-5, 5, (6, 1)) * 2.0**rows
    new = reconstruct(weight, mask, gram)
    assert_gains(weight, mask, new, gram)
    assert torch.equal(reconstruct(weight * row, mask, gram * 2.0**inputs), new * row)
    free, scaled = MatrixFree(x), MatrixFree(x * 2.0 ** (inputs // 2))
    new = reconstruct(weight, mask, free, diagonal=free.diagonal)
    assert torch.equal(reconstruct(weight * row, mask, scaled, diagonal=scaled.diagonal), new * row)
    assert torch.equal(rechoose(weight * row, new * row, gram * 2.0**inputs), rechoose(weight, new, gram))


@pytest.mark.parametrize("of_weight", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("of_gram", [1e-20, 1.0, 1e20])
def test_extreme_scales(of_weight, of_gram):
    weight, mask, _, gram = problem(16)
    new = reconstruct(weight, mask, gram)
    scaled = reconstruct(weight * of_weight, mask, gram * of_gram)
    torch.testing.assert_close(scaled / of_weight, new, **ROUNDING)
    assert_gains(weight * of_weight, mask, scaled, gram * of_gram)
    loss = reconstruction_loss(weight * of_weight, scaled, gram * of_gram) / of_weight**2 / of_gram
    torch.testing.assert_close(loss, reconstruction_loss(weight, new, gram), rtol=1e-3, atol=0)
    again = rechoose(weight * of_weight, new * of_weight, gram * of_gram)
    assert float((again != rechoose(weight, new, gram)).float().mean()) < 0.02
    assert not torch.equal(again, mask)


def test_half_precision_and_gradients():
    weight, mask, _, gram = problem(17)
    half = weight.bfloat16().requires_grad_()
    new = reconstruct(half, mask, gram)
    assert torch.equal(new, reconstruct(half.detach().float(), mask, gram)) and not new.requires_grad
    assert_gains(half.detach().float(), mask, new, gram)


def test_inputs_stay_as_they_were():
    weight, mask, _, gram = problem(18)
    copies = weight.clone(), mask.clone(), gram.clone()
    new = reconstruct(weight, mask, gram)
    rechoose(weight, new, gram)
    # a function may return its argument
    assert_gains(weight, mask, new, gram)
    reconstruct(weight, mask, lambda rows: rows, diagonal=torch.ones(32))
    assert all(torch.equal(a, b) for a, b in zip(copies, (weight, mask, gram), strict=True))


def best_pairs(weight, new, gram):
    """Reference: every pair of every group solved by itself, the rest as in new."""
    weight, new, gram = weight.double(), new.double(), gram.double()
    out = torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], 4):
            losses = []
            for pattern in PATTERNS:
                kept = pattern.nonzero().flatten() + start
                error = new[row].clone()
                error[start : start + 4] = 0
                error -= weight[row]
                error[kept] -= torch.linalg.solve(gram[kept][:, kept], (error @ gram)[kept])
                losses.append(float(error @ gram @ error))
            out[row, start : start + 4] = PATTERNS[losses.index(min(losses))]
    return out


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), channels=st.sampled_from([4, 8, 20]))
def test_rechoosing_takes_the_best_pair_of_every_group(seed, channels):
    weight, mask, _, gram = problem(seed, 4, channels)
    new = reconstruct(weight, mask, gram)
    chosen, expected = rechoose(weight, new, gram), best_pairs(weight, new, gram)
    # rounding decides between pairs that are worth the same
    assert float((chosen != expected).float().mean()) < 0.02


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), **SIZES)
def test_rechoosing_keeps_exactly_two_of_four(seed, channels, samples, shared):
    weight, mask, x, gram = problem(seed, 5, channels, samples, shared)
    x[:, 0] = 0
    x[:, 3] = x[:, 2]
    gram = x.T @ x
    for new in (weight * mask, weight * 0, reconstruct(weight, mask, gram, damping=0)):
        chosen = rechoose(weight, new, gram)
        assert chosen.dtype == torch.bool and bool((chosen.view(5, -1, 4).sum(-1) == 2).all())


def test_rechoosing_from_a_sample_is_the_same():
    weight, mask, x, gram = problem(19)
    free = MatrixFree(x)
    new = reconstruct(weight, mask, gram)
    chosen = rechoose(weight, new, gram)
    assert torch.equal(chosen, rechoose(weight, new, free, free.blocks))
    assert not torch.equal(chosen, mask)


def test_of_equal_pairs_the_lower_indices_stay():
    ones = torch.ones(2, 8)
    assert rechoose(ones, 0 * ones, torch.eye(8)).tolist() == [[True, True, False, False] * 2] * 2
    weight = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 1.0]])
    expected = [[False, True, True, False, True, False, False, True]]
    assert rechoose(weight, 0 * weight, torch.eye(8)).tolist() == expected


def test_uncorrelated_inputs_make_it_the_order_of_contributions():
    weight, _, _, gram = problem(20)
    gram = torch.diag(gram.diagonal())
    expected = select24(weight, gram.diagonal(), selection="exact")[0]
    assert torch.equal(rechoose(weight, torch.zeros_like(weight), gram), expected)


def test_dead_channels_are_worth_nothing():
    weight, mask, x, _ = problem(22)
    x[:, ::4] = 0
    gram = x.T @ x
    weight[:, ::4] = 100
    assert not bool(rechoose(weight, weight * mask, gram)[:, ::4].any())


@pytest.mark.parametrize(("samples", "shared", "at_most"), [(40, 1, 0.8), (1000, 1, 0.95), (1000, 20, 0.99)])
def test_rechoosing_lowers_the_loss_on_average(samples, shared, at_most):
    before = after = worse = 0.0
    for seed in range(4):
        weight, mask, _, gram = problem(seed, 64, 128, samples, shared)
        new = reconstruct(weight, mask, gram)
        again = reconstruct(weight, rechoose(weight, new, gram), gram)
        a, b = reconstruction_loss(weight, new, gram), reconstruction_loss(weight, again, gram)
        before, after, worse = before + float(a.sum()), after + float(b.sum()), worse + float((b > a).sum()) / 256
    assert after < at_most * before
    assert worse < 0.12


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), rounds=st.integers(1, 4), **SIZES)
def test_refining_makes_no_row_worse(seed, rounds, channels, samples, shared):
    weight, mask, _, gram = problem(seed, 8, channels, samples, shared)
    new, chosen = refine(weight, mask, gram, rounds)
    assert new.dtype == torch.float32 and not bool(new[~chosen].any())
    assert bool((chosen.view(8, -1, 4).sum(-1) == 2).all())
    masked, after = (reconstruction_loss(weight, one, gram) for one in (weight * mask, new))
    assert bool((after <= masked).all())
    # a row leaves its mask only for one with which it ends below where it stood when it left, as far as float32 tells
    once = reconstruction_loss(weight, reconstruct(weight, mask, gram, 3), gram)
    changed = (chosen != mask).any(1)
    assert bool((after[changed] < (once * (1 + 1e-3) + 1e-5 * masked)[changed]).all())


def test_refining_pays_and_zero_rounds_are_one_reconstruction():
    weight, mask, x, gram = problem(23, 64, 128, 200, 2)
    new, chosen = refine(weight, mask, gram, rounds=0)
    assert torch.equal(new, reconstruct(weight, mask, gram, 5)) and torch.equal(chosen, mask)
    totals = [float(reconstruction_loss(weight, refine(weight, mask, gram, n)[0], gram).sum()) for n in range(4)]
    assert totals[0] > 1.05 * totals[1] and totals[1] > totals[2] > totals[3]
    # as many steps with the mask as it was do not come near
    assert totals[1] < 0.97 * float(reconstruction_loss(weight, reconstruct(weight, mask, gram, 15), gram).sum())
    free = MatrixFree(x)
    by_sample, _ = refine(weight, mask, free, rounds=3, blocks=free.blocks)
    assert abs(float(reconstruction_loss(weight, by_sample, gram).sum()) - totals[3]) < 1e-2 * totals[3]
    assert float(exact_loss(weight, new, x).sum()) > 1.05 * float(exact_loss(weight, by_sample, x).sum())


def test_rechoosing_sees_the_drift():
    weight, _, _, gram = problem(27)
    # all inputs of the weight were zero: nothing is worth anything
    nothing = rechoose(weight, 0 * weight, gram, drift=-(weight @ gram))
    assert torch.equal(nothing, torch.tensor([True, True, False, False]).repeat(6, 8))


def aimed_loss(weight, new, dense, x):
    return (dense.double() @ weight.double().T - x.double() @ new.double().T).square().sum(0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), channels=SIZES["channels"], scale=st.sampled_from([1e-15, 1.0, 1e15]))
def test_drift_aims_at_the_outputs_of_other_inputs(seed, channels, scale):
    weight, mask, x, _ = problem(seed, channels=channels, samples=4 * channels)
    weight, x = weight * scale, x / scale
    dense = x + 0.3 / scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    gram, drift = x.T @ x, weight @ ((dense - x).T @ x)
    new = reconstruct(weight, mask, gram, 5 * channels, damping=0, drift=drift)
    for row, kept in enumerate(mask):
        expected = torch.linalg.lstsq(x[:, kept].double(), dense.double() @ weight[row].double()).solution
        torch.testing.assert_close(new[row, kept].double() / scale, expected / scale, rtol=1e-2, atol=1e-2)
    without = aimed_loss(weight, reconstruct(weight, mask, gram), dense, x)
    with_drift = aimed_loss(weight, reconstruct(weight, mask, gram, drift=drift), dense, x)
    refined = aimed_loss(weight, refine(weight, mask, gram, drift=drift, steps=20)[0], dense, x)
    assert with_drift.sum() < without.sum()
    masked = aimed_loss(weight, weight * mask, dense, x)
    assert bool((refined <= masked * (1 + 1e-5)).all()) and refined.sum() < 1.01 * with_drift.sum()
    choice = rechoose(weight, new, gram, drift=drift)
    assert bool((choice.view(6, -1, 4).sum(-1) == 2).all())
    assert torch.equal(rechoose(weight, new, gram, drift=0 * drift), rechoose(weight, new, gram))


@pytest.mark.parametrize("damping", [1e-2, 0.3])
def test_refined_rows_solve_the_normal_equations_of_their_masks(damping):
    weight, mask, _, gram = problem(25)
    new, chosen = refine(weight, mask, gram, rounds=1, steps=100, damping=damping)
    assert bool((chosen != mask).any(1).sum() >= 4)
    torch.testing.assert_close(new.double(), solved(weight, chosen, gram, damping), rtol=2e-3, atol=2e-3)


def test_no_more_products_than_promised_and_none_when_all_rows_have_stalled():
    weight, mask, _, gram = problem(26, samples=1000)
    calls = []

    def product(rows):
        calls.append(rows)
        return rows @ gram

    led_by = lead(gram)
    reconstruct(weight, mask, product, 7, diagonal=gram.diagonal(), led_by=led_by)
    assert len(calls) == 9
    blocks = torch.stack([gram[i : i + 4, i : i + 4] for i in range(0, 32, 4)])
    calls.clear()
    refine(weight, mask, product, 2, 3, blocks=blocks, led_by=led_by)
    assert len(calls) == 2 + 2 * (2 + 1) + 3
    calls.clear()
    reconstruct(weight, mask, product, 1000, diagonal=gram.diagonal(), led_by=led_by)
    assert 9 < len(calls) < 40


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), free=st.booleans(), **SIZES)
def test_bfloat16_products_inside_end_near_float32_and_make_no_row_worse(seed, free, channels, samples, shared):
    weight, mask, x, gram = problem(seed, 8, channels, samples, shared)
    given = MatrixFree(x) if free else gram
    blocks = given.blocks if free else None
    new, chosen = refine(weight, mask, given, blocks=blocks, fast=Rounded(given))
    exact = refine(weight, mask, given, blocks=blocks)[0]
    start, after, best = (float(reconstruction_loss(weight, one, gram).sum()) for one in (weight * mask, new, exact))
    assert bool(
        (reconstruction_loss(weight, new, gram) <= reconstruction_loss(weight, weight * mask, gram) * (1 + 1e-5)).all()
    )
    # with two samples nothing need be left, and what rounding leaves is all there is
    assert after - best < (0.5 if samples == 2 else 0.05) * (start - best)
    assert not bool(new[~chosen].any())


def test_all_products_are_the_fast_ones_but_the_two_that_judge():
    weight, mask, _, gram = problem(28)
    exact, fast = [], []

    def product(rows):
        exact.append(rows)
        return rows @ gram

    class Counted(Rounded):
        def __call__(self, rows):
            fast.append(rows)
            return super().__call__(rows)

    reconstruct(weight, mask, product, 4, diagonal=gram.diagonal(), fast=Counted(gram), led_by=lead(gram))
    assert (len(exact), len(fast)) == (2, 4)


def test_errors():
    weight, mask, x, gram = problem(21)
    free = MatrixFree(x)
    bad = weight.clone()
    bad[0, 0] = torch.inf
    for call, match in (
        (lambda: reconstruct(weight, mask[:, 1:], gram), "mask, new"),
        (lambda: reconstruct(weight, mask.float(), gram), "mask must be bool"),
        (lambda: reconstruct(weight[0], mask[0], gram), "weight must be floating point"),
        (lambda: reconstruct(weight.int(), mask, gram), "weight must be floating point"),
        (lambda: reconstruct(weight, mask, gram[1:]), r"gram must be \[32, 32\]"),
        (lambda: reconstruct(weight, mask, gram, damping=-1.0), "damping"),
        (lambda: reconstruct(weight, mask, gram, damping=torch.nan), "damping"),
        (lambda: reconstruct(weight, mask, free), "needs its diagonal"),
        (lambda: reconstruct(weight, mask, free, diagonal=free.diagonal[1:]), "needs its diagonal"),
        (lambda: reconstruct(weight, mask, -gram), "diagonal of X"),
        (lambda: reconstruct(weight, mask, gram * torch.nan), "diagonal of X"),
        (lambda: reconstruct(bad, mask, gram), "finite"),
        (lambda: reconstruction_loss(weight, weight[1:], gram), "mask, new"),
        (lambda: reconstruction_loss(weight, weight, gram[1:]), "gram must be"),
        (lambda: rechoose(weight, weight, free), "needs its blocks"),
        (lambda: reconstruct(weight, mask, gram, drift=weight[1:]), "mask, new"),
        (lambda: refine(weight, mask, free), "needs its blocks"),
        (lambda: refine(weight, mask[1:], gram), "mask, new"),
        (lambda: rechoose(weight[:, :30], weight[:, :30], gram), "multiple of 4"),
        (lambda: lead(free), "needs its diagonal"),
        (lambda: MatrixFree(x[0]), "sample must be"),
        (lambda: MatrixFree(x.int()), "sample must be"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
