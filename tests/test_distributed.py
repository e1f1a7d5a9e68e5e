"""Two processes over gloo: calibration on shares, tensor-parallel models."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hwpq_fx
from hwpq_fx import CalibrationError, Float8Sparse24Tensor, HWPQConfig, convert
from hwpq_fx.calibration import Calibration
from hwpq_fx.compress import compress
from hwpq_fx.distributed import reduce_statistics
from hwpq_fx.layers import layers_of
from models import call, llama, tokens, vectors


def calibrated(model, batches, config):
    calibration = Calibration(model, config.gathered_bytes)
    if batches:
        calibration.run(batches)
    calibration.remove()
    return calibration.recorder


def packed_of(model, recorder, config):
    """Every observed layer, compressed with what was seen."""
    made = {}
    for layer in layers_of(model):
        if uses := recorder.uses.get(id(layer.parameter)):
            weight, line = compress(layer.name, layer.parameter, uses, config)
            made[layer.name] = (weight.sparse_metadata, weight.qdata.view(torch.uint8), weight.scale, line.rows)
    return made


def llama_and(count):
    torch.manual_seed(0)
    return llama(), [tokens() for _ in range(count)]


def share(rank, config):
    model, batches = llama_and(5)
    recorder = calibrated(model, batches[:2] if rank == 0 else batches[2:], config)
    reduce_statistics(model, recorder, dist.group.WORLD)
    assert recorder.calls == 5
    return packed_of(model, recorder, config)


@pytest.mark.parametrize("compensation", ["energy", "cg"])
def test_two_shares_give_the_masks_of_the_whole(compensation):
    config = HWPQConfig(compensation=compensation)
    first, second = on_ranks(share, config)
    model, batches = llama_and(5)
    whole = packed_of(model, calibrated(model, batches, config), config)
    assert first.keys() == second.keys() == whole.keys() and len(whole) == 15
    for name, (masks, values, scale, rows) in whole.items():
        assert torch.equal(first[name][0], masks) and first[name][3] == rows
        # X^T X is float32, sums of squares float64
        torch.testing.assert_close(first[name][2], scale, rtol=0.05 if compensation == "cg" else 1e-6, atol=0)
        assert (first[name][1] != values).float().mean() < (0.03 if compensation == "cg" else 1e-4)
        # among themselves, the same bits
        assert all(torch.equal(one, other) for one, other in zip(first[name][:3], second[name][:3], strict=True))


class Either(nn.Module):
    """One of two layers, by the sign of the input: a router's experts."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return (self.up if bool(x.sum() > 0) else self.down)(x)


def one_side(rank):
    torch.manual_seed(0)
    model, x = Either().eval(), torch.rand(7, 64) + 0.1
    recorder = calibrated(model, [x if rank == 0 else -x], HWPQConfig(compensation="cg"))
    reduce_statistics(model, recorder, dist.group.WORLD)
    return {
        layer.name: (one.sum_sq, one.rows, one.curvature.matrix)
        for layer in layers_of(model)
        for many in recorder.uses[id(layer.parameter)].values()
        for one in many
    }


def test_a_layer_that_one_process_alone_reached():
    first, second = on_ranks(one_side)
    torch.manual_seed(0)
    Either()
    x = torch.rand(7, 64) + 0.1
    for seen in (first, second):
        assert seen.keys() == {"up", "down"}
        for sum_sq, rows, gram in seen.values():
            assert rows == 7
            torch.testing.assert_close(sum_sq, x.square().sum(0))
            torch.testing.assert_close(gram, x.T @ x)


def sampled(rank):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(512, 64)).eval()
    # room for 256 rows, not for X^T X
    config = HWPQConfig(compensation="cg", curvature_bytes=4 * 512 * 256)
    recorder = calibrated(model, [torch.full((3, 200, 512), 2.0) if rank else torch.ones(200, 512)], config)
    reduce_statistics(model, recorder, dist.group.WORLD)
    ((one,),) = recorder.uses[id(model[0].weight)].values()
    return one.curvature.rows[:, 0].tolist(), one.rows


def test_samples_of_rows_are_shared_in_proportion():
    first, second = on_ranks(sampled)
    assert first == second == ([1.0] * 64 + [2.0] * 192, 800)


def other_models(rank):
    model = nn.Sequential(nn.Linear(64, 64 + 8 * rank)).eval()
    recorder = calibrated(model, [vectors()], HWPQConfig())
    with pytest.raises(CalibrationError, match="same layers"):
        reduce_statistics(model, recorder, dist.group.WORLD)


def test_models_have_to_be_alike():
    on_ranks(other_models)


def converted_on_a_share(rank):
    model, batches = llama_and(4)
    convert(torch.compile(model), batches[rank::2], HWPQConfig(compensation="energy"), group=dist.group.WORLD)
    return {name: one.dequantize() for name, one in model.named_parameters() if isinstance(one, Float8Sparse24Tensor)}


def test_convert_with_a_group_is_convert_on_all_batches():
    first, second = on_ranks(converted_on_a_share)
    model, batches = llama_and(4)
    convert(model, batches, HWPQConfig(compensation="energy"))
    report = hwpq_fx.report(model)
    assert len(first) == len(report.converted) == 14
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert torch.equal(weight, model.get_parameter(name).dequantize())


COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def converted(activation, layout):
    torch.manual_seed(0)
    # one by one: in order, rounded activations would go into the masks too
    return convert(llama(), [tokens()], HWPQConfig(activation=activation, layout=layout, sequential=False))


@torch.no_grad()
def tensor_parallel(rank, activation, layout, batch):
    model = converted(activation, layout)
    whole = model.model.layers[0].mlp.down_proj.weight.dequantize()
    mesh = init_device_mesh("cpu", (2,))
    plan = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan, src_data_rank=None)
        for name in (*COLUMNS, *ROWS):
            weight = layer.get_submodule(name).weight
            local = weight.to_local()
            assert isinstance(weight, DTensor) and isinstance(local, Float8Sparse24Tensor)
            assert 2 * local.numel() == weight.numel()
            assert (local.prepacked is None) == (layout == "packed")
    down = model.model.layers[0].mlp.down_proj.weight.to_local()
    assert torch.equal(down.dequantize(), whole.chunk(2, 1)[rank]) and down.qdata.is_contiguous()
    logits = [call(model, batch)]
    if layout == "fastest":
        logits.append(call(torch.compile(model, backend="hwpq"), batch))
    return logits


@pytest.mark.parametrize("layout", ["fastest", "packed"])
def test_tensor_parallel_logits(layout):
    torch.manual_seed(1)
    batch = tokens()
    for rank in on_ranks(tensor_parallel, "none", layout, batch):
        for logits in rank:
            torch.testing.assert_close(logits, call(converted("none", layout), batch), rtol=0, atol=2e-6)


def test_tensor_parallel_logits_of_fp8_activations():
    """Cut along its channels a row of activations has a scale on each process: another rounding, not a worse one."""
    torch.manual_seed(1)
    batch = tokens()
    exact, single = call(converted("none", "fastest"), batch), call(converted("dynamic", "fastest"), batch)
    rounding = (single - exact).norm()
    for rank in on_ranks(tensor_parallel, "dynamic", "fastest", batch):
        for logits in rank:
            assert (logits - exact).norm() < 1.1 * rounding < 0.05 * exact.norm()
            assert (logits - single).norm() < 1.5 * rounding
