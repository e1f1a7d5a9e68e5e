"""Conjugate gradients from observed inputs, inside `convert`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwpq_fx import ConfigError, HWPQConfig, convert, report
from hwpq_fx.curvature import CurvatureBudget, GramMatrix, RowSample, combined
from hwpq_fx.gram import MatrixFree
from hwpq_fx.statistics import InputStatistics

CPU = torch.device("cpu")


def correlated(rows: int, channels: int = 64) -> torch.Tensor:
    """Inputs with a decaying spectrum, where the other channels can do a pruned one's work."""
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(7)))[0]
    return (torch.randn(rows, channels) * torch.arange(1, channels + 1) ** -0.7) @ basis


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_gram_is_the_same_however_rows_are_cut(cuts):
    torch.manual_seed(0)
    parts = [torch.randn(rows, 8) for rows in cuts]
    gram = GramMatrix(8, CPU)
    for part in parts:
        gram.update(part)
    whole = torch.cat(parts).double()
    torch.testing.assert_close(gram.matrix.double(), whole.T @ whole, rtol=1e-5, atol=1e-5)


def test_sample_keeps_every_row_with_the_same_chance_and_any_cut():
    rows = torch.arange(1000.0).unsqueeze(1).expand(1000, 2)
    cut, whole = RowSample(2, CPU, 100), RowSample(2, CPU, 100)
    for part in rows.split(37):
        cut.update(part)
    whole.update(rows)
    kept = cut.rows[:, 0].sort().values
    assert torch.equal(kept, whole.rows[:, 0].sort().values)
    assert len(kept.unique()) == 100
    assert 350 < kept.mean() < 650, "early and late rows alike"


def test_budget_grants_gram_then_sample_then_nothing():
    budget = CurvatureBudget(4 * 512 * 512 + 4 * 512 * 300)
    first, second, third = (budget.grant(512, CPU) for _ in range(3))
    assert isinstance(first, GramMatrix)
    assert isinstance(second, RowSample) and second.capacity == 300
    assert third is None


def observed(curvature, *inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs[0].shape[1], CPU, curvature)
    for x in inputs:
        statistics.update(x)
    return statistics


def test_combining():
    ones = torch.ones(3, 4)
    gram, sample = (observed(one, ones) for one in (GramMatrix(4, CPU), RowSample(4, CPU, 300)))
    both = combined([gram, gram], CPU)
    assert torch.equal(both.fit, torch.full((4, 4), 6.0)) and both.measure is both.fit and "X^T X" in both.name
    free = combined([sample, sample], CPU)
    assert isinstance(free.fit, MatrixFree) and "6 rows" in free.name
    for known in (free.fit, free.measure):  # no row is missing
        torch.testing.assert_close(known(torch.eye(4)), torch.full((4, 4), 6.0))
    unknown = observed(None, ones)
    assert (
        combined([gram, sample], CPU) is None and combined([gram, unknown], CPU) is None and combined([], CPU) is None
    )


def loss_of(config: HWPQConfig) -> tuple[float, str]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).eval()
    calib, test = correlated(2000), correlated(500)
    expected = model(test)
    convert(model, calib.split(256), replace(config, sequential=False))
    return ((model(test) - expected).norm() / expected.norm()).item(), report(model).layers[0].compensation


def test_cg_beats_energy_and_none_on_held_out_inputs():
    plain = {"activation": "none"}
    none, _ = loss_of(HWPQConfig(compensation="none", **plain))
    energy, _ = loss_of(HWPQConfig(compensation="energy", **plain))
    cg, name = loss_of(HWPQConfig(compensation="cg", **plain))
    assert name == "cg, X^T X"
    assert cg < 0.8 * min(none, energy)


def test_sampled_rows_serve_where_the_matrix_does_not_fit():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 64, bias=False)).eval()
    convert(model, [correlated(600, 1024)], HWPQConfig(sequential=False, curvature_bytes=4 * 1024 * 300))
    assert report(model).layers[0].compensation == "cg, 300 rows"


def test_the_bound_is_for_layers_that_may_be_converted():
    one = 4 * 64 * 64
    for kwargs, expected in (
        ({"ignore": ["0"], "sequential": False}, ["dense", "cg, X^T X", "energy"]),
        ({"targets": ["2"], "sequential": False}, ["dense", "dense", "cg, X^T X"]),
        ({"targets": ["2"], "max_loss": 9.0}, ["dense", "dense", "cg, in order, X^T X"]),
    ):
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3))).eval()
        convert(model, [correlated(100)], HWPQConfig(curvature_bytes=one, **kwargs))
        assert [line.compensation or line.status for line in report(model).layers] == expected
    odd = torch.nn.Sequential(torch.nn.Linear(60, 64), torch.nn.Linear(64, 64)).eval()
    convert(odd, [torch.randn(100, 60)], HWPQConfig(curvature_bytes=one, sequential=False))
    assert [line.compensation or line.status for line in report(odd).layers] == ["dense", "cg, X^T X"]


def test_report_error_is_the_measured_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).eval()
    calib = correlated(1000)
    expected = model(calib)
    convert(model, [calib], HWPQConfig(compensation="cg", activation="none"))
    measured = (model(calib) - expected).norm() / expected.norm()
    assert report(model).layers[0].error == pytest.approx(measured.item(), rel=1e-3)


def test_unstructured_weights_are_fitted_too():
    plain = {"activation": "none", "sparsity": 0.5}
    energy, _ = loss_of(HWPQConfig(compensation="energy", **plain))
    cg, _ = loss_of(HWPQConfig(compensation="cg", **plain))
    assert cg < 0.8 * energy


def test_data_free_falls_back_and_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(64, 96)).eval()
    convert(model, None, HWPQConfig(compensation="cg"))
    assert report(model).layers[0].compensation == "energy"


@pytest.mark.parametrize(("name", "value"), [("cg_steps", 0), ("cg_rounds", -1), ("curvature_bytes", 1.5)])
def test_config_names_the_field(name, value):
    with pytest.raises(ConfigError, match=name):
        HWPQConfig(**{name: value})


def test_the_bound_is_for_each_device_and_counts_what_others_hold():
    budget = CurvatureBudget(4 * 512 * 512)
    assert budget.grant(512, CPU) is not None and budget.grant(512, CPU) is None
    assert isinstance(budget.grant(512, torch.device("meta")), GramMatrix)
    assert CurvatureBudget(4 * 512 * 512, taken=4).grant(512, CPU).nbytes < 4 * 512 * 512
    assert isinstance(CurvatureBudget(None).grant(512, CPU), GramMatrix)
    assert CurvatureBudget(None, taken=4 * 2**30).grant(512, CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_on_a_gpu(dtype):
    rows = torch.randn(1000, 64, device="cuda").to(dtype)
    gram = CurvatureBudget(None).grant(64, rows.device)
    for part in rows.split(300):
        gram.update(part)
    torch.testing.assert_close(gram.matrix.double(), rows.double().T @ rows.double(), rtol=1e-4, atol=1e-2)
