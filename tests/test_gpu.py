"""What needs a GPU: `pytest -m gpu`. No GPU has run it yet."""

import pytest
import torch

import hwpq_fx
from hwpq_fx.kernels import Float8Sparse24Tensor
from models import MODELS, call
from test_models import dequantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def on_gpu(batch):
    return {name: value.cuda() for name, value in batch.items()} if isinstance(batch, dict) else batch.cuda()


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_model_matches_dequantized_weights(name, mode):
    build, batch_of, expected = MODELS[name]
    model = build().cuda()
    batches = [on_gpu(batch_of(2, 12)), on_gpu(batch_of(3, 9))]
    converted = hwpq_fx.convert(torch.compile(model, mode=mode), batches, hwpq_fx.HWPQConfig(activation="none"))
    assert len(hwpq_fx.report(converted).converted) == expected
    reference = call(dequantized(model), batches[0])
    for _ in range(3):  # replays, where the mode records
        torch.testing.assert_close(call(converted, batches[0]), reference, rtol=1e-3, atol=1e-3)


def test_masks_and_bits_are_those_of_the_cpu():
    weight = torch.randn(64, 128)
    here, there = Float8Sparse24Tensor.from_hp(weight), Float8Sparse24Tensor.from_hp(weight.cuda())
    for part in ("qdata", "sparse_metadata"):
        assert torch.equal(getattr(here, part).view(torch.uint8), getattr(there, part).view(torch.uint8).cpu())


def test_layout_is_dropped_on_the_gpu_and_back_on_the_cpu():
    weight = Float8Sparse24Tensor.from_hp(torch.randn(64, 128)).expand()
    assert weight.cuda().dense is None
    assert weight.cuda().cpu().dense is not None
