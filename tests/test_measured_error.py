"""The error that the report tells is that of the outputs over the calibration rows: where only a sample of them is
known, where parts of a weight see different inputs, and at the ends of the range."""

import pytest
import torch
from torch import nn

from hwpq_fx import HWPQConfig, ModelError, convert, plan, report
from hwpq_fx.curvature import RowSample, combined
from hwpq_fx.gram import Rounded
from hwpq_fx.statistics import InputStatistics

CPU = torch.device("cpu")


def mixed(rows: int, channels: int, seed: int, loud: float = 0.0) -> torch.Tensor:
    """Inputs with little that is common to the channels, and some that is common to all."""
    mix = torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)) / channels**0.5
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator) @ (0.7 * mix + 0.5 * torch.eye(channels))
    return x + loud * torch.randn(rows, 1, generator=generator)


def converted(x: torch.Tensor, config: HWPQConfig, rows: int = 48) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(x.shape[1], rows, bias=False)
    weight = layer.weight.detach().clone()
    return convert(nn.Sequential(layer).eval(), x.split(500), config), weight


def true_error(model: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> float:
    made = model[0].weight.dequantize(torch.float32)
    return float(((made - weight) @ x.T).norm() / (weight @ x.T).norm())


@pytest.mark.parametrize("loud", [0.0, 1.0])
@pytest.mark.parametrize("sampled", [256, 480])
def test_a_sample_does_not_flatter_itself_and_is_no_worse_than_nothing(sampled, loud):
    x, channels = mixed(3000, 512, seed=1, loud=loud), 512
    config = HWPQConfig(curvature_bytes=4 * channels * sampled, activation="none", sequential=False)
    model, weight = converted(x, config)
    line = report(model).layers[0]
    assert line.compensation == f"cg, {sampled} rows"
    true = true_error(model, weight, x)
    assert line.error == pytest.approx(true, rel=0.15)
    without = true_error(*converted(x, HWPQConfig(compensation="none", activation="none")), x)
    assert true < (1.0 if loud == 0 else 0.9) * without
    planned = plan(nn.Sequential(nn.Linear(channels, 48)).eval(), x.split(500), config).layers[0]
    assert planned.errors["sparse24_fp8"] == pytest.approx(true, rel=0.2)


def test_of_a_sample_the_energies_are_those_of_all_rows():
    x = mixed(2000, 64, seed=4).clone()
    x[3] *= 1000  # in the sample or not
    x[:, 5] = 0
    x[7, 5] = 1e4
    parts = []
    for many in (x, 10 * mixed(600, 64, seed=5)):
        parts.append(InputStatistics(64, CPU, RowSample(64, CPU, 300)))
        parts[-1].update(many)
    for seen in (parts[:1], parts):
        known, total = combined(seen, CPU), sum(part.total for part in seen).float()
        torch.testing.assert_close(known.fit.diagonal, total, rtol=1e-4, atol=0)
        torch.testing.assert_close(known.measure.diagonal, total, rtol=1e-4, atol=0)
        matrix = known.fit(torch.eye(64))
        torch.testing.assert_close(matrix.diagonal(), total, rtol=1e-4, atol=0)
        blocks = torch.stack([matrix[i : i + 4, i : i + 4] for i in range(0, 64, 4)])
        torch.testing.assert_close(known.fit.blocks, blocks, rtol=1e-4, atol=1e-4 * float(total.max()))
        rounded = Rounded(known.fit)
        torch.testing.assert_close(
            rounded(torch.eye(64)) * rounded.size, matrix, rtol=1e-2, atol=1e-2 * float(total.max())
        )


def test_a_sample_of_all_rows_is_exact():
    x = mixed(300, 512, seed=1)
    model, weight = converted(x, HWPQConfig(curvature_bytes=4 * 512 * 400, activation="none"))
    line = report(model).layers[0]
    assert line.compensation == "cg, in order, 300 rows"
    assert line.error == pytest.approx(true_error(model, weight, x), rel=1e-3)


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, q, kv):
        return self.attention(q, kv, kv, need_weights=False)[0]


def by_moments(x: torch.Tensor) -> torch.Tensor:
    """X^T X of channels with these means and variances, uncorrelated otherwise."""
    sums = x.sum(0)
    of_means = torch.outer(sums, sums) / len(x)
    return of_means + torch.diag(x.square().sum(0) - of_means.diagonal())


def test_energy_keeps_means_and_its_error_counts_them():
    """Inputs as a norm's weight makes them: channels with a mean, here the most of their energy."""
    x = mixed(2000, 512, seed=1) + torch.randn(512, generator=torch.Generator().manual_seed(2))
    config = HWPQConfig(compensation="energy", activation="none")
    model, weight = converted(x, config)
    made = model[0].weight.dequantize(torch.float64) - weight.double()
    gram = by_moments(x.double())
    by_definition = ((made @ gram) * made).sum() / ((weight.double() @ gram) * weight).sum()
    error = report(model).layers[0].error
    assert error == pytest.approx(float(by_definition.sqrt()), rel=1e-4)
    assert error == pytest.approx(true_error(model, weight, x), rel=0.1)
    without = true_error(*converted(x, HWPQConfig(compensation="none", activation="none")), x)
    centred = true_error(*converted(x - x.mean(0), config), x)  # sees no mean, and so only rescales
    assert error < 0.85 * min(without, centred)


@pytest.mark.parametrize("loud", [1.0, 100.0])
@pytest.mark.parametrize("config", [HWPQConfig(compensation="energy"), HWPQConfig()])
def test_spans_with_inputs_of_their_own_weigh_by_their_outputs(config, loud):
    torch.manual_seed(0)
    model = CrossAttention().eval()
    model.attention.in_proj_weight.data[:64] *= torch.arange(64) % 2  # two of four: nothing is lost there
    weight = model.attention.in_proj_weight.detach().clone().double()
    q, kv = loud * torch.randn(20, 30, 64), torch.randn(20, 30, 64)
    convert(model, [(q, kv)], config)
    made = model.attention.in_proj_weight.dequantize(torch.float64)
    lost = kept = 0.0
    for x, span in ((q, slice(0, 64)), (kv, slice(64, 192))):
        x = x.reshape(-1, 64).double()
        gram = x.T @ x if config.compensation == "cg" else by_moments(x)
        for total in ("lost", "kept"):
            part = (made - weight if total == "lost" else weight)[span]
            value = float(((part @ gram) * part).sum())
            lost, kept = (lost + value, kept) if total == "lost" else (lost, kept + value)
    line = next(line for line in report(model).layers if line.name == "attention.in_proj_weight")
    assert line.error == pytest.approx((lost / kept) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("scale", [1e16, 2.5e17])
@pytest.mark.parametrize("curvature_bytes", [None, 4 * 512 * 400])
def test_loud_inputs_tell_the_same_error(scale, curvature_bytes):
    x = mixed(400, 512, seed=2, loud=3.0)
    config = HWPQConfig(curvature_bytes=curvature_bytes, activation="none")
    expected, _ = converted(x, config)
    model, _ = converted(x * scale, config)
    assert report(model).layers[0].error == pytest.approx(report(expected).layers[0].error, rel=0.02)


@pytest.mark.parametrize(
    "config", [HWPQConfig(), HWPQConfig(sparsity=0.5), HWPQConfig(compensation="energy", sparsity=0.5)]
)
def test_float16_weights_that_grow_beyond_float16_are_its_largest(config):
    x = mixed(300, 64, seed=3, loud=3.0).half()
    layer = nn.Linear(64, 32, bias=False).half()
    layer.weight.data = (layer.weight / layer.weight.abs().max() * 65000).half()
    model = convert(nn.Sequential(layer).eval(), [x * 1e-3], config)
    weight = model[0].weight
    weight = weight.dequantize(torch.float32) if config.sparsity == "2:4" else weight.dequantize().float()
    assert bool(weight.isfinite().all()) and report(model).layers[0].error < 1


def test_float64_weights_beyond_float32_are_refused_by_name():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)).double().eval()
    model[1].weight.data[0, 0] = 1e39
    with pytest.raises(ModelError, match=r"^1: the weight holds .*too large for float32; mend the checkpoint"):
        convert(model, [torch.randn(10, 64).double()])
