import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_select24 import DEVICE, RATES, VALUES, weights
from torch._subclasses import FakeTensorMode

import rehearsal
from hwpq_fx.kernels import Float8Sparse24Tensor, pack24, prune_pack24, quantize_weight_rows, select24, unpack24
from hwpq_fx.kernels.prune_pack24 import prune_pack24_reference
from hwpq_fx.kernels.quantize_rows import E4M3
from hwpq_fx.kernels.saliency import SALIENCIES, terms_of
from hwpq_fx.kernels.select24 import DEFAULT_LAMBDA, KERNEL_DTYPES, SELECTIONS

try:
    import triton
    import triton.language as tl
except ImportError:  # the package works without it
    triton = None
needs_triton = pytest.mark.skipif(triton is None, reason="needs Triton")

COMPARED = ("exact", *RATES, DEFAULT_LAMBDA)


def random_mask(seed, rows, columns):
    order = torch.rand(rows * columns // 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return (order < 2).view(rows, columns).to(DEVICE)


def by_kernel(weight, sum_sq, mask, saliency):
    """What the kernel writes over NaN values, no possible indices and NaN scales."""
    from hwpq_fx.kernels.prune_pack24_triton import launch

    rows, columns = weight.shape
    qdata = torch.full((rows, columns // 2), 0x7F, dtype=torch.uint8, device=DEVICE).view(E4M3)
    metadata = torch.full((rows, columns // 8), 0xFF, dtype=torch.uint8, device=DEVICE)
    scale = torch.full((rows, 1), torch.nan, device=DEVICE)
    terms = None if mask is not None else terms_of(weight, sum_sq, saliency)
    launch(weight, terms, mask, saliency, qdata, metadata, scale)
    return qdata, metadata, scale


def assert_same(got, expected):
    for name, a, b in zip(("qdata", "sparse_metadata", "scale"), got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def assert_kernel_is_the_reference(weight, sum_sq, mask, saliency):
    assert_same(
        by_kernel(weight, sum_sq, mask, saliency), prune_pack24_reference(weight, sum_sq, mask, saliency, *COMPARED)
    )


@needs_triton
@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_has_the_bits_of_the_reference(dtype, saliency):
    weight, sum_sq = weights(0, 3, 2 * 2048 + 40, dtype)
    assert_kernel_is_the_reference(weight, sum_sq, None, saliency)


@needs_triton
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_packs_a_given_mask(dtype):
    weight, _ = weights(1, 3, 2 * 2048 + 40, dtype)
    assert_kernel_is_the_reference(weight, None, random_mask(1, *weight.shape), "contribution")


@needs_triton
@pytest.mark.parametrize("columns", [8, 16, 24, 56, 64, 1016, 1024, 1032, 2056])
def test_kernel_at_ragged_lengths(columns):
    weight, sum_sq = weights(columns, 2, columns)
    assert_kernel_is_the_reference(weight, sum_sq, None, "contribution")
    assert_kernel_is_the_reference(weight, None, random_mask(2, 2, columns), "contribution")


@st.composite
def adversarial(draw):
    """Weights [N, 8 G] full of ties, zeros of both signs, subnormals and huge ratios."""
    rows, pairs = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    pool = draw(st.lists(st.tuples(VALUES, st.sampled_from([1, -1])), min_size=1, max_size=6))
    picks = draw(st.lists(st.sampled_from(pool), min_size=rows * pairs * 8, max_size=rows * pairs * 8))
    return torch.tensor([value * sign for value, sign in picks]).view(rows, pairs * 8)


@needs_triton
@settings(deadline=None, max_examples=40)
@given(
    weight=adversarial(),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(KERNEL_DTYPES),
    saliency=st.sampled_from([*SALIENCIES, "mask"]),
    free=st.booleans(),
)
def test_kernel_on_adversarial_weights(weight, seed, dtype, saliency, free):
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).to(DEVICE)
    if dtype is torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter gives its subnormals other values
        weight = weight.masked_fill(weight.abs() < torch.finfo(dtype).tiny, 0)
    mask = random_mask(seed, *weight.shape) if saliency == "mask" else None
    sum_sq = None if free else torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    assert_kernel_is_the_reference(weight, sum_sq, mask, "magnitude" if mask is not None else saliency)


@needs_triton
@pytest.mark.parametrize("peak", [2.0**-149, 2.0**-130, 2.0**-126, 1e-36, 1e-20, 1e20, 3.4e38])
def test_kernel_at_extreme_scales(peak):
    weight, sum_sq = weights(1, 4, 64)
    weight = (weight / weight.abs().amax(1, keepdim=True)).double().mul(peak).float()
    assert_kernel_is_the_reference(weight, sum_sq, None, "contribution")


@needs_triton
def test_kernel_marks_rows_whose_mask_is_not_24():
    weight, _ = weights(2, 5, 2056)
    mask = random_mask(3, 5, 2056)
    right = by_kernel(weight, None, mask, "contribution")
    mask[1, 2052:] = torch.tensor([True, True, True, False])
    mask[3, :4] = False
    wrong = by_kernel(weight, None, mask, "contribution")
    assert wrong[2].isnan().flatten().tolist() == [False, True, False, True, False]
    assert_same([part[[0, 2, 4]] for part in wrong], [part[[0, 2, 4]] for part in right])


if triton is not None:
    from hwpq_fx.kernels.prune_pack24_triton import e4m3

    @triton.jit
    def rounding(x_ptr, out_ptr, HARDWARE: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, e4m3(tl.load(x_ptr + at), HARDWARE))


@needs_triton
@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("kind", ["all bfloat16", "all float16", "float32", "ties"])
def test_rounding_to_e4m3_is_torchs(kind, hardware):
    if hardware and (DEVICE == "cpu" or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("no e4m3 in hardware")
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if kind == "float32":
        x = torch.randint(-(2**31), 2**31, (2**16,)).to(torch.int32).view(torch.float32)
    elif kind == "ties":  # half way between neighbours, and next to it
        values = torch.arange(0x7E, dtype=torch.uint8).view(E4M3).float()
        middle = (values[1:] + values[:-1]) / 2
        around = [middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(448.0)), values]
        x = torch.cat([sign * part for part in around for sign in (1, -1)])
    else:
        x = bits.to(torch.int16).view(torch.bfloat16 if kind == "all bfloat16" else torch.float16).float()
    beyond = torch.tensor([448.1, 500.0, 3e38, -449.0, -1e4])
    x = torch.cat([x[x.isfinite()], beyond])
    x = torch.nn.functional.pad(x, (0, -len(x) % 1024)).to(DEVICE)
    out = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    rounding[(len(x) // 1024,)](x, out, hardware, BLOCK=1024)
    expected = x.clamp(-448, 448).to(E4M3).view(torch.uint8)
    assert torch.equal(out, expected.masked_fill(expected == 0x80, 0))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("saliency", SALIENCIES)
def test_the_op_is_choosing_then_quantizing_then_packing(saliency, selection):
    weight, sum_sq = weights(4, 16, 96, torch.bfloat16)
    for sums in (sum_sq, None):
        how = (saliency, selection, 1 / 16, 1 / 3, -0.3)
        got = prune_pack24(weight, sums, None, *how)
        mask, _ = select24(weight, sums, *how)
        values, scale = quantize_weight_rows(weight.masked_fill(~mask, 0))
        assert_same(got, (*pack24(values, mask), scale))
        assert_same(prune_pack24(weight, None, mask), got)


def test_what_is_packed_is_the_weight():
    weight, sum_sq = weights(5, 16, 96)
    mask, _ = select24(weight, sum_sq)
    qdata, metadata, scale = prune_pack24(weight, sum_sq)
    restored = unpack24(qdata, metadata).float() * scale
    assert not restored[~mask].any()
    peak = weight.abs().amax(1, keepdim=True)
    assert bool(((restored - weight)[mask].abs() <= (weight.abs() / 16 + peak / 448 / 2**9)[mask] * 1.001).all())
    assert not (qdata.view(torch.uint8) == 0x80).any()


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64])
def test_from_hp_packs_by_it(dtype):
    weight, _ = weights(6, 8, 64, dtype)
    mask = random_mask(6, 8, 64)
    for chosen in (None, mask):
        packed = Float8Sparse24Tensor.from_hp(weight, chosen)
        got = (packed.qdata, packed.sparse_metadata, packed.scale)
        assert_same(got, prune_pack24(weight, None, chosen, "magnitude", "exact"))


def test_masks_that_are_not_24_are_refused():
    weight, _ = weights(7, 4, 32)
    mask = random_mask(7, 4, 32)
    mask[2, 4:8] = True
    with pytest.raises(ValueError, match="mask does not keep exactly two of every four"):
        prune_pack24(weight, None, mask)


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64])
def test_the_op_is_a_proper_one(dtype):
    weight, sum_sq = weights(8, 4, 32, dtype)
    for arguments in ((weight,), (weight, sum_sq, None, "relative", "exact"), (weight, None, random_mask(8, 4, 32))):
        torch.library.opcheck(torch.ops.hwpq_fx.prune_pack24.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": lambda w: w[0]}, r"weight must be \[N, K\]"),
        ({"weight": lambda w: w[:, :28]}, "K = 28 of weight is not a multiple of 8"),
        ({"sum_sq": lambda _: torch.ones(31)}, r"sum_sq must be \[32\], got \[31\]"),
        ({"mask": lambda _: torch.ones(3, 32, dtype=torch.bool)}, r"mask is \(3, 32\) torch.bool, not \(4, 32\)"),
        ({"mask": lambda _: torch.ones(4, 32)}, r"mask is \(4, 32\) torch.float32, not"),
        ({"saliency": lambda _: "wanda"}, "unknown saliency 'wanda'"),
        ({"selection": lambda _: "topk"}, "unknown selection 'topk'"),
        ({"mean_rate": lambda _: 2.0}, "rates .* mean_rate 2.0"),
    ],
)
def test_what_the_op_and_its_fake_reject(change, message):
    def arguments():
        given = {"weight": torch.ones(4, 32)}
        return given | {name: make(given.get(name)) for name, make in change.items()}

    with pytest.raises(ValueError, match=message):
        prune_pack24(**arguments())
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        prune_pack24(**arguments())


@pytest.mark.gpu
@pytest.mark.skipif(rehearsal.ON or not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_more_weights_than_32_bits_count():
    """The last rows lie beyond element 2^31: by kernel, as by reference."""
    weight = torch.zeros(2**17 + 8, 2**14, dtype=torch.bfloat16, device="cuda")
    weight[-8:] = torch.randn(8, 2**14, device="cuda").bfloat16()
    mask, _ = select24(weight)
    expected, _ = select24(weight[-8:].cpu())
    assert torch.equal(mask[-8:].cpu(), expected)
    for got in (prune_pack24(weight), prune_pack24(weight, None, mask)):
        assert_same([part[-8:].cpu() for part in got], prune_pack24(weight[-8:].cpu()))
