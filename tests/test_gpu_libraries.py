"""The libraries' sparse tensor cores on a real GPU: `pytest -m gpu tests/test_gpu_libraries.py`. No GPU has run it yet.

On the sums of FP8 products: Hopper's tensor cores keep about 14 bits of a partial sum and neither library promotes it
(CUTLASS's "FP8FastAccum"), so the bound has a term in sum |x| |w|. A wrong layout is off by 1/10 of that or more.
"""

import pytest
import torch

import rehearsal
from hwpq_fx.kernels import cusparselt24, cutlass24
from hwpq_fx.kernels.pack24 import pack24, unpack24
from hwpq_fx.kernels.quantize_rows import E4M3, quantize_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PATHS = {"cutlass": cutlass24, "cusparselt": cusparselt24}
ROWS = (1, 2, 7, 16, 17, 63, 64, 65, 128, 129, 300, *(() if rehearsal.ON else (512, 1000, 2048, 4096)))
ACCUMULATION = 2.0**-10


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@pytest.fixture(autouse=True)
def _no_algorithms(monkeypatch):
    monkeypatch.setattr(cusparselt24, "_found", {})


def skip_unless_served(path, dtype, n, k):
    major, minor = torch.cuda.get_device_capability()
    reason = path.why_not(10 * major + minor, dtype, n, k)
    if reason:
        pytest.skip(reason)


def packed(path, n, k, kept=0.5, negative_zeros=False):
    values = torch.randn(n, k)
    values[torch.rand(n, k) > 2 * kept] = 0.0
    if negative_zeros:
        values[torch.rand(n, k) > 0.9] = -0.0
    mask = torch.rand(n, k // 4, 4).argsort(-1) < 2
    parts = [part.cuda() for part in pack24(values.to(E4M3), mask.view(n, k))]
    return (*parts, torch.rand(n, 1, device="cuda") + 0.1, path.make_layout(*parts))


def activation(m, k):
    # rows of very different sizes: a scale that goes to the wrong row shows
    return quantize_rows(torch.randn(m, k, device="cuda") * torch.logspace(-2, 2, m, device="cuda")[:, None])


def exact(x, x_scale, qdata, sparse_metadata, scale, bias=None):
    """y in float64, and the largest error that rounding and the tensor cores' accumulation explain, per out dtype."""
    dense, scales = unpack24(qdata, sparse_metadata).double(), x_scale.double() * scale.double().view(-1)
    sums = x.double() @ dense.t() * scales
    most = x.double().abs() @ dense.abs().t() * scales
    y = sums if bias is None else sums + bias.double()
    return y, lambda dtype: torch.finfo(dtype).eps * (sums.abs() + y.abs()) + ACCUMULATION * most + 1e-6


def assert_close(got, wanted, bound, what):
    """Say where it is wrong and how: a row, a column, a block of rows or of K, or just too coarse."""
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    excess = (got.double() - wanted).abs() / bound
    excess = excess.nan_to_num(torch.inf)
    bad = excess > 1
    if not bad.any():
        return
    rows, columns = bad.any(1).nonzero().view(-1), bad.any(0).nonzero().view(-1)
    worst = divmod(int(excess.argmax()), got.shape[1])
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {bad.numel()} elements beyond bounds, at most {float(excess.max()):.3g} times, "
        f"at {worst} {float(got[worst]):.6g} for {float(wanted[worst]):.6g} +- {float(bound[worst]):.3g}; "
        f"{len(rows)} rows {rows[:8].tolist()}.., {len(columns)} columns {columns[:8].tolist()}.., "
        f"{int(got.isnan().sum())} NaN; {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"cuSPARSELt {torch.backends.cusparselt.version()}, {cusparselt24.export_algorithms()}"
    )


def product(path, x, x_scale, weight, bias, out_dtype):
    qdata, sparse_metadata, scale, layout = weight
    return path.product(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(512, 1024), (4096, 512), (160, 96), (64, 4096), (96, 32)])
def test_every_number_of_rows(path, n, k, out_dtype):
    skip_unless_served(path, out_dtype, n, k)
    weight = packed(path, n, k)
    for bias in (None, torch.randn(n, device="cuda", dtype=out_dtype)):
        for m in ROWS:
            x, x_scale = activation(m, k)
            y, bound = exact(x, x_scale, *weight[:3], bias)
            got = product(path, x, x_scale, weight, bias, out_dtype)
            assert got.dtype is out_dtype
            assert_close(
                got, y, bound(out_dtype), f"{path.__name__} {m}x{n}x{k} to {out_dtype}, bias {bias is not None}"
            )


def test_rows_that_no_tile_divides(path):
    """N at the smallest multiple each path serves, where tiles and blocks of metadata hang over."""
    for n in (8, 24, 72, 200, 1000) if path is cutlass24 else (32, 96, 224, 1056):
        skip_unless_served(path, torch.bfloat16, n, 160)
        weight = packed(path, n, 160)
        x, x_scale = activation(33, 160)
        y, bound = exact(x, x_scale, *weight[:3])
        assert_close(product(path, x, x_scale, weight, None, torch.bfloat16), y, bound(torch.bfloat16), f"N = {n}")


def test_no_rows(path):
    skip_unless_served(path, torch.bfloat16, 64, 128)
    x, x_scale = activation(0, 128)
    assert product(path, x, x_scale, packed(path, 64, 128), None, torch.bfloat16).shape == (0, 64)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("negative_zeros", [False, True])
def test_kept_zeros(path, kept, negative_zeros):
    """Groups with one nonzero or none, and -0.0 among the kept."""
    skip_unless_served(path, torch.bfloat16, 256, 512)
    weight = packed(path, 256, 512, kept, negative_zeros)
    x, x_scale = activation(200, 512)
    y, bound = exact(x, x_scale, *weight[:3])
    got = product(path, x, x_scale, weight, None, torch.bfloat16)
    assert_close(got, y, bound(torch.bfloat16), f"{path.__name__} kept {kept}, negative zeros {negative_zeros}")


def test_one_weight_at_a_time_comes_out_at_its_place(path):
    """x = identity shows the weight itself: which index or block is misplaced can be read off."""
    skip_unless_served(path, torch.bfloat16, 128, 256)
    qdata, sparse_metadata, _, layout = packed(path, 128, 256)
    x, ones = torch.eye(256, device="cuda").to(E4M3), torch.ones(256, 1, device="cuda")
    args = qdata, sparse_metadata, ones[:128], None, layout, torch.bfloat16
    got = path.product(x, ones, *args).t()
    wanted = unpack24(qdata, sparse_metadata).bfloat16()
    wrong = (got != wanted).nonzero()
    assert not len(wrong), f"{len(wrong)} weights misplaced, first (row, column) {wrong[:16].tolist()}"


def test_cutlass_metadata_is_what_torchaos_compressor_writes():
    skip_unless_served(cutlass24, torch.bfloat16, 192, 384)
    qdata, sparse_metadata, _, layout = packed(cutlass24, 192, 384)
    full = torch.where(qdata.float() == 0, torch.ones_like(qdata.float()), qdata.float()).to(E4M3)  # no kept zeros
    values, metadata = torch.ops.torchao.to_sparse_semi_structured_cutlass_sm9x_f8(unpack24(full, sparse_metadata))
    assert torch.equal(values.view(torch.uint8), full.view(torch.uint8)), "the compressed values are not our qdata"
    differ = (metadata.view(-1) != layout).nonzero().view(-1)
    assert not len(differ), f"{len(differ)} of {layout.numel()} bytes of metadata differ, first {differ[:16].tolist()}"


@pytest.mark.parametrize("m", [1, 64, 100, 512])
def test_cuda_graph(path, m):
    skip_unless_served(path, torch.bfloat16, 512, 1024)
    weight = packed(path, 512, 1024)
    bias = torch.randn(512, device="cuda", dtype=torch.bfloat16)
    x, x_scale = activation(m, 1024)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            product(path, x, x_scale, weight, bias, torch.bfloat16)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = product(path, x, x_scale, weight, bias, torch.bfloat16)
    for turn in range(3):
        fresh, fresh_scale = activation(m, 1024)
        x.copy_(fresh)
        x_scale.copy_(fresh_scale)
        got.fill_(torch.nan)
        graph.replay()
        y, bound = exact(x, x_scale, *weight[:3], bias)
        assert_close(got, y, bound(torch.bfloat16), f"{path.__name__} replay {turn} at M = {m}")


def test_capture_of_rows_never_seen_does_not_search():
    skip_unless_served(cusparselt24, torch.bfloat16, 512, 1024)
    weight = packed(cusparselt24, 512, 1024)
    x, x_scale = activation(64, 1024)
    product(cusparselt24, x, x_scale, weight, None, torch.bfloat16)  # the library starts; 64 rows are searched
    x, x_scale = activation(500, 1024)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = product(cusparselt24, x, x_scale, weight, None, torch.bfloat16)
    graph.replay()
    y, bound = exact(x, x_scale, *weight[:3])
    assert_close(got, y, bound(torch.bfloat16), "captured with the algorithm of 64 rows")
    assert [key.split("/")[3] for key in cusparselt24.export_algorithms()] == ["64"]


def test_the_algorithm_of_a_bucket_serves_all_of_it():
    """What the search finds at the top must be valid, and right, for every smaller M; and so must the default."""
    skip_unless_served(cusparselt24, torch.bfloat16, 256, 2048)
    weight = packed(cusparselt24, 256, 2048)
    for m in range(1, 513, 13):
        x, x_scale = activation(m, 2048)
        y, bound = exact(x, x_scale, *weight[:3])
        got = product(cusparselt24, x, x_scale, weight, None, torch.bfloat16)
        assert_close(got, y, bound(torch.bfloat16), f"M = {m}")
    found = cusparselt24.export_algorithms()
    assert sorted(int(key.split("/")[3]) for key in found) == [16, 32, 64, 128, 256, 512]
    cusparselt24.import_algorithms(dict.fromkeys(found, cusparselt24.DEFAULT))
    got = product(cusparselt24, x, x_scale, weight, None, torch.bfloat16)
    assert_close(got, y, bound(torch.bfloat16), "the default algorithm")


def test_on_another_stream(path):
    skip_unless_served(path, torch.bfloat16, 512, 1024)
    weight = packed(path, 512, 1024)
    x, x_scale = activation(256, 1024)
    y, bound = exact(x, x_scale, *weight[:3])
    product(path, x, x_scale, weight, None, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what does not follow the stream runs ahead of this
        late = torch.zeros_like(x.view(torch.uint8)).view(E4M3)
        late.copy_(x)
        got = product(path, late, x_scale, weight, None, torch.bfloat16)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(got, y, bound(torch.bfloat16), path.__name__)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current_one(path):
    skip_unless_served(path, torch.bfloat16, 256, 512)
    weight = packed(path, 256, 512)
    x, x_scale = activation(64, 512)
    y, bound = exact(x, x_scale, *weight[:3])
    there = [part.to("cuda:1") for part in (x, x_scale, *weight)]
    got = product(path, there[0], there[1], there[2:], None, torch.bfloat16)
    assert_close(got.to("cuda:0"), y, bound(torch.bfloat16), path.__name__)
