"""The roofline model: units, limits and what it must never do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx.kernels.gpus import GPUS, LIMITS
from hwpq_fx.kernels.pack24 import FORMAT_K
from hwpq_fx.kernels.roofline import (
    DENSE_FP8,
    MODELS,
    OPS,
    OURS,
    ROWS,
    best,
    floor,
    layer,
    packed_bytes,
    ratios,
    steps,
)

gpus = st.sampled_from(list(GPUS.values()))
rows = st.integers(1, 20000)
sizes = st.integers(1, 4000).map(lambda size: size * FORMAT_K)
quick = settings(deadline=None, max_examples=60)


@quick
@given(gpus, st.sampled_from(list(OPS)), rows, sizes, sizes, st.integers(0, 2), st.integers(1, 50))
def test_more_work_never_takes_less(gpu, op, m, n, k, which, more):
    bigger = [m, n, k]
    bigger[which] += more * FORMAT_K
    small, big = floor(op, m, n, k, gpu), floor(op, *bigger, gpu)
    assert small.seconds > 0 and small.bytes > 0
    assert all(one <= two for one, two in zip(small[:6], big[:6], strict=True))


@quick
@given(gpus, st.sampled_from(list(OPS)), rows, sizes, sizes)
def test_a_step_takes_as_long_as_what_it_waits_for(gpu, op, m, n, k):
    parts = steps(op, m, n, k, gpu)
    for part in parts.values():
        waits = {"memory": part.memory_s, "math": part.math_s, "issue": part.issue_s}
        assert part.seconds == max(waits.values()) == waits[part.bound]
        assert part.memory_s == pytest.approx(part.bytes / gpu.bandwidth)
    assert floor(op, m, n, k, gpu).seconds == pytest.approx(sum(part.seconds for part in parts.values()))


@quick
@given(sizes, sizes)
def test_packed_is_five_sixteenths_of_bf16(n, k):
    assert packed_bytes(n, k) - 4 * n == 0.3125 * 2 * n * k


def test_units():
    h100 = GPUS["h100"]
    one = floor("bf16", 1, 4096, 4096, h100)
    assert one.bytes == 2 * (4096 * 4096 + 4096 + 4096) and one.flops == 2 * 4096 * 4096
    assert one.bound == "memory" and one.seconds == pytest.approx(10.02e-6, rel=1e-3)
    many = floor("bf16", 16384, 4096, 4096, h100)
    assert many.bound == "math" and many.seconds == pytest.approx(2 * 16384 * 4096**2 / 989.5e12)
    parts = steps("fp8_dynamic", 1024, 4096, 4096, h100)
    assert parts["quantize_rows"].bytes == 1024 * (4096 * 3 + 4) and parts["quantize_rows"].flops == 0
    assert parts["product"].bytes == 1024 * (4096 * 3 + 4) + 4096 * 4096 + 4 * 4096
    # about 3e13 instructions a second, more than two for each packed weight its memory delivers
    assert h100.instructions == pytest.approx(3.3e13, rel=0.02)
    assert [floor("gemv", m, 4096, 4096, h100).bound for m in (1, 16, 64)] == ["memory", "memory", "issue"]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_ceilings_of_a_single_row(gpu):
    big = 1 << 20
    ours = floor("gemv", 1, big, big, gpu).seconds
    assert floor("bf16", 1, big, big, gpu).seconds / ours == pytest.approx(3.2, rel=1e-4)
    assert floor("fp8_weight_only", 1, big, big, gpu).seconds / ours == pytest.approx(1.6, rel=1e-4)
    for model in MODELS:
        vs_bf16, vs_fp8 = ratios(1, model, gpu)
        assert 3.1 < vs_bf16 < 3.2 and 1.55 < vs_fp8 < 1.6


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("model", MODELS)
def test_many_rows_wait_for_tensor_cores(gpu, model):
    for op in ("bf16", "fp8_dynamic", "fp8_weight_only", "int4_weight_only", "tiles", "tiles_fp8"):
        assert layer(op, 16384, model, gpu).bound == "math", op
    n, k = 14336, 4096
    dense, sparse = (steps(op, 16384, n, k, gpu)["product"] for op in ("fp8_dynamic", "sparse_fp8"))
    assert dense.math_s == pytest.approx(2 * sparse.math_s)
    # what both pay for quantizing keeps the ratio under that of the tensor cores
    for m in ROWS:
        assert 1 < ratios(m, model, gpu)[1] < 2


@quick
@given(gpus, st.sampled_from(list(MODELS)), rows)
def test_best_is_no_slower_than_any(gpu, model, m):
    for ops in (OURS, DENSE_FP8):
        assert best(ops, m, model, gpu).seconds <= min(layer(op, m, model, gpu).seconds for op in ops) * (1 + 1e-9)


# Parameters as the Hugging Face hub counts them, decoder layers, embeddings (two where the head has its own), width of
# the norms, biases of a layer
@pytest.mark.parametrize(
    ("model", "parameters", "layers", "embeddings", "width", "biases"),
    [
        ("llama-3-8b", 8_030_261_248, 32, 2 * 128256, 4096, 0),
        ("qwen2.5-7b", 7_615_616_512, 28, 2 * 152064, 3584, 3584 + 2 * 512),
        ("llama-3.2-1b", 1_235_814_400, 16, 128256, 2048, 0),
    ],
)
def test_models(model, parameters, layers, embeddings, width, biases):
    linears = sum(n * k for n, k in MODELS[model].values())
    assert layers * (linears + biases + 2 * width) + width + embeddings * width == parameters


def test_gpus():
    for gpu in GPUS.values():
        assert gpu.arch in LIMITS
        assert gpu.sparse_fp8 == 2 * gpu.fp8 and gpu.fp8 == pytest.approx(2 * gpu.bf16, rel=0.02)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 8), (1, 0, 8), (1, 8, 0), (1, 8, 12)])
def test_shapes_that_cannot_be(m, n, k):
    with pytest.raises(ValueError, match="no such product"):
        floor("bf16", m, n, k, GPUS["h100"])
    with pytest.raises(KeyError):
        floor("fp4", 1, 8, 8, GPUS["h100"])
