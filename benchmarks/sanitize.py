"""Run every way to multiply and every Triton kernel of ours once, on small ragged shapes, and check what comes out:

    python benchmarks/sanitize.py                                                     the check alone
    compute-sanitizer --tool memcheck python benchmarks/sanitize.py --quick --own     with every memory access checked

Prints a line for each; exits with 1 where one is wrong, raises, or was never launched.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from importlib import import_module

import torch

from hwpq_fx.bench.contenders import fp8_of
from hwpq_fx.bench.measure import FP8_BOUND, errors_between, errors_of, one_line
from hwpq_fx.kernels import Float8Sparse24Tensor, quantize_rows
from hwpq_fx.kernels.cusparselt24 import rescaled
from hwpq_fx.kernels.paths import PATHS, Path, target_of
from hwpq_fx.kernels.prune_pack24 import prune_pack24, prune_pack24_reference
from hwpq_fx.kernels.select24 import select24, select24_reference
from hwpq_fx.kernels.survey import kernel_modules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((136, 272), (64, 512), (256, 128))  # N, K
ROWS = (1, 3, 17, 64, 130)
OWN = ("gemv", "tiles", "tiles_fp8")  # the others are libraries'
SALIENCIES = ("contribution", "rank_one", "relative", "magnitude")
SELECTIONS = ("ewma", "exact", "ewma_streaming")
# bfloat16 rounds to 2^-9; float32 may be multiplied as tf32
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 3e-3}

Check = tuple[str, Callable[[], str]]


def products(quick: bool, own: bool) -> Iterator[Check]:
    """Every path that serves, or ours alone, at every shape, number of rows and dtype."""
    target = target_of(torch.device(DEVICE))
    arch = target.arch if target else 90
    for path in (PATHS[name] for name in (OWN if own else PATHS)):
        for dtype in (torch.bfloat16,) if quick else BOUNDS:
            for n, k in SHAPES[:2] if quick else SHAPES:
                if why := path.why_not(arch, dtype, n, k):
                    print(f"not  {path.name} {dtype} {n}x{k}: {why}")
                    continue
                for m in ROWS:
                    yield f"{path.name} {dtype} {m} x {n}x{k}", lambda args=(path, dtype, m, n, k): _product(*args)


def _product(path: Path, dtype: torch.dtype, m: int, n: int, k: int) -> str:
    packed = Float8Sparse24Tensor.from_hp(torch.randn(n, k, dtype=dtype, device=DEVICE))
    parts = (packed.qdata, packed.sparse_metadata)
    layout = path.make_layout(*parts) if path.make_layout else None
    x, bias = torch.randn(m, k, dtype=dtype, device=DEVICE), torch.randn(n, dtype=dtype, device=DEVICE)
    values, x_scale = quantize_rows(x) if path.fp8 else (x, None)
    torch.full((m, n), math.nan, dtype=dtype, device=DEVICE)  # what the output's memory may hold before
    y = path.product(values, x_scale, *parts, packed.scale, bias, layout, dtype)
    # the reference on the CPU: a sanitizer would follow the library's float64 product as well
    y, x, bias, dense = (one.cpu() for one in (y, x, bias, packed.dequantize(torch.float32)))
    given, bound = (fp8_of(x), FP8_BOUND) if path.fp8 else (x, BOUNDS[dtype])
    return errors_of(y.double() - bias.double(), given, dense).why_refused(bound)


def rescalings() -> Iterator[Check]:
    """What follows cuSPARSELt's products."""
    for raw, out in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.float32)):
        for biased in (False, True):
            yield f"rescale {raw} to {out} bias {biased}", lambda args=(raw, out, biased): _rescaled(*args)


def _rescaled(raw_dtype: torch.dtype, out_dtype: torch.dtype, biased: bool) -> str:
    from hwpq_fx.kernels.rescale_triton import rescale

    m, n = 17, 520
    raw = torch.randn(m, n, device=DEVICE).to(raw_dtype)
    x_scale, scale = torch.rand(m, 1, device=DEVICE), torch.rand(n, 1, device=DEVICE)
    bias = torch.randn(n, device=DEVICE).to(out_dtype) if biased else None
    y = torch.full_like(raw, math.nan, dtype=out_dtype)
    rescale(raw, x_scale, scale, bias, y)
    return errors_between(y, rescaled(raw, x_scale, scale, bias, torch.float32)).why_refused(BOUNDS[out_dtype])


def choices(quick: bool) -> Iterator[Check]:
    """`select24` and `prune_pack24` with every saliency and selection, against their references, bit by bit."""
    for saliency in SALIENCIES[:1] if quick else SALIENCIES:
        for selection in SELECTIONS:
            for dtype in (torch.bfloat16,) if quick else BOUNDS:
                args = (saliency, selection, dtype)
                yield f"select24 {saliency} {selection} {dtype}", lambda args=args: _selected(*args)
                yield f"prune_pack24 {saliency} {selection} {dtype}", lambda args=args: _packed(*args)
    yield "prune_pack24 with a mask", _masked


def _weight(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(37, 1032, dtype=dtype, device=DEVICE), torch.rand(1032, device=DEVICE)


def _rates() -> tuple[float, float, float]:
    arguments = torch.ops.hwpq_fx.select24.default._schema.arguments
    return tuple(one.default_value for one in arguments if one.name in ("mean_rate", "dev_rate", "lam"))


def _selected(saliency: str, selection: str, dtype: torch.dtype) -> str:
    weight, sum_sq = _weight(dtype)
    made = select24(weight, sum_sq, saliency, selection, *_rates())
    return _same(made, select24_reference(weight, sum_sq, saliency, selection, *_rates()))


def _packed(saliency: str, selection: str, dtype: torch.dtype) -> str:
    weight, sum_sq = _weight(dtype)
    made = prune_pack24(weight, sum_sq, None, saliency, selection, *_rates())
    return _same(made, prune_pack24_reference(weight, sum_sq, None, saliency, selection, *_rates()))


def _masked() -> str:
    weight, _ = _weight(torch.bfloat16)
    mask = torch.rand(weight.shape, device=DEVICE).unflatten(1, (-1, 4)).argsort(-1).flatten(1) < 2
    made = prune_pack24(weight, None, mask)
    return _same(made, prune_pack24_reference(weight, None, mask, "magnitude", "exact", *_rates()))


def _same(made, wanted) -> str:
    """Of tensors, or of what holds them, bit by bit."""
    for at, (one, other) in enumerate(zip(made, wanted, strict=True)):
        if isinstance(one, torch.Tensor) and (wrong := (_bits(one) != _bits(other)).sum().item()):
            return f"{wrong} bytes of output {at} differ from the reference's"
    return ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def never_launched() -> list[str]:
    """Kernels that `specimens` lists for this GPU and that nothing here launched."""
    arch = target_of(torch.device(DEVICE)).arch
    listed = {(name, one.kernel) for name in kernel_modules() for one in import_module(name).specimens(arch)}
    return [
        f"{name}: {kernel.__name__}" for name, kernel in listed if not any(c[0] for c in kernel.device_caches.values())
    ]


def main(quick: bool, own: bool) -> int:
    torch.manual_seed(0)
    failed = 0
    with torch.no_grad():
        for name, check in (*products(quick, own), *rescalings(), *choices(quick)):
            try:
                why = check()
            except Exception as error:
                why = one_line(error)
            failed += bool(why)
            if why:
                print(f"BAD  {name}: {why}", flush=True)
            else:
                print(f"ok   {name}")
    if DEVICE == "cuda":
        for name in never_launched():
            print(f"not launched: {name}")
    print(f"{failed} bad")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bfloat16 and two shapes only")
    parser.add_argument("--own", action="store_true", help="our Triton kernels only, no library's")
    given = parser.parse_args()
    if DEVICE == "cpu":
        parser.exit(2, "no GPU: there is nothing to check\n")
    sys.exit(main(given.quick, given.own))
