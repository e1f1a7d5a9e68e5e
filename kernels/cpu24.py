"""What a CPU runs natively: `cpu24.cpp`, compiled for this CPU at first use and kept in the user's cache folder.

- `select24` and `prune_pack24` for float32, bfloat16 and float16, bit-equal to their references, on any CPU.
- "expand": y = x W^T + b straight from the packed weight, each 64 weights expanded in registers (AVX-512 VBMI2 puts
  the kept bytes into place, two byte lookups make them bfloat16), accumulated in float32. Few rows of x are bound by
  memory, where 5 bits per weight are a third of bfloat16's 16.

Compiling takes a few seconds and the C++ compiler that torch.compile needs on a CPU as well. Where there is none, the
references and the dense path run, and one warning says so.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from math import prod
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .ewma import DEV_RATE, MEAN_RATE, decays, tree_size
from .linear24 import DENSE, check, dense_form, linear24, linear24_reference, no_view, unpacked
from .prune_pack24 import check_prune_pack24, prune_pack24, prune_pack24_reference
from .saliency import DEFAULT_SALIENCY, Terms, terms_of
from .select24 import DEFAULT_LAMBDA, DEFAULT_SELECTION, KERNEL_DTYPES, check_select24, select24, select24_reference

logger = logging.getLogger("hwpq_fx")

SOURCE = Path(__file__).with_suffix(".cpp")
# numbered as in cpu24.cpp
SALIENCIES = ("contribution", "rank_one", "relative", "magnitude")
# the oldest torch whose stable ABI is enough: what is compiled asks for nothing newer
TARGET_VERSION = "0x020b000000000000ULL"
EXPAND_NEEDS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_vbmi", "avx512_vbmi2", "avx512_bf16")

# Rows of x up to which the packed weight is read as it is. Measured on Zen 5 against bfloat16 products, one thread:
# 3.4 times as fast at 1 row, 1.8 at 4, 0.9 to 1.9 at 8, slower from 16 on.
EXPAND_ROWS = 4

# What compiled graphs call is known before the library is loaded: a graph from Inductor's cache does not ask for that.
torch.library.define(
    "hwpq_fx::expand24",
    "(Tensor x, Tensor? x_scale, Tensor qdata, Tensor sparse_metadata, Tensor scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
)
torch.library.define(
    "hwpq_fx::cpu_unpack24", "(Tensor qdata, Tensor sparse_metadata, Tensor? scale, ScalarType dtype) -> Tensor"
)


@cache
def why_not_native() -> str:
    """Empty once the native ops are loaded, compiled first if need be; else why there are none, which is warned of."""
    try:
        torch.ops.load_library(build(user_cache_path("hwpq_fx")))
    except (OSError, RuntimeError) as error:
        reason = str(error)
        logger.warning("no native CPU kernels: %s; converting is slower, and decoding reads a dense weight", reason)
        return reason
    return ""


def build(folder: Path) -> Path:
    """The library for this source, torch and CPU in `folder`, compiled if it is not there. Raises RuntimeError where it
    cannot be, OSError where the folder cannot be written."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or os.name != "posix":
        raise RuntimeError("no C++ compiler (CXX, g++ or clang++) was found")
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    cpu = torch.cpu.get_capabilities()
    if cpu["architecture"] == "x86_64":
        flags.append("-march=native")
    if cpu.get("avx512_bf16"):
        flags.append("-mprefer-vector-width=512")  # these CPUs do not slow down for it
    if platform.system() == "Darwin":
        flags.append("-Wl,-undefined,dynamic_lookup")
    key = [SOURCE.read_text(), torch.__version__, compiler, flags, sorted((name, str(cpu[name])) for name in cpu)]
    library = folder / f"cpu24-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}")
        home = Path(torch.__file__).parent
        files = [f"-I{home / 'include'}", str(SOURCE), "-o", str(temporary), f"-L{home / 'lib'}", "-ltorch_cpu"]
        done = subprocess.run([compiler, *flags, *files], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[:500]}")
        temporary.replace(library)  # whole, whoever else compiles it
    return library


def _serves(weight: Tensor) -> bool:
    return weight.dtype in KERNEL_DTYPES and weight.numel() > 0 and not why_not_native()


def _score_arguments(weight: Tensor, sum_sq: Tensor | None, saliency: str) -> tuple[int | Tensor | None, ...]:
    terms = terms_of(weight, sum_sq, saliency)
    return SALIENCIES.index(saliency), *(None if part is None else part.contiguous() for part in terms)


@select24.register_kernel("cpu")
def _select24(weight, sum_sq=None, saliency=DEFAULT_SALIENCY, selection=DEFAULT_SELECTION,
              mean_rate=MEAN_RATE, dev_rate=DEV_RATE, lam=DEFAULT_LAMBDA):  # fmt: skip
    check_select24(weight, sum_sq, saliency, selection, mean_rate, dev_rate)
    if selection == "ewma_streaming" or not _serves(weight):
        return select24_reference(weight, sum_sq, saliency, selection, mean_rate, dev_rate, lam)
    rates = None
    if selection == "ewma":
        rates = torch.tensor([decays(mean_rate), decays(dev_rate)], dtype=torch.float32, device="cpu")
    mask, settled = torch.ops.hwpq_fx.cpu_select24(
        weight.contiguous(),
        *_score_arguments(weight, sum_sq, saliency),
        rates,
        mean_rate,
        dev_rate,
        lam,
        tree_size(weight.shape[1] // 4),
    )
    return mask, settled.sum()


@prune_pack24.register_kernel("cpu")
def _prune_pack24(weight, sum_sq=None, mask=None, saliency=DEFAULT_SALIENCY, selection=DEFAULT_SELECTION,
                  mean_rate=MEAN_RATE, dev_rate=DEV_RATE, lam=DEFAULT_LAMBDA):  # fmt: skip
    check_prune_pack24(weight, sum_sq, mask, saliency, selection, mean_rate, dev_rate)
    if not _serves(weight):
        return prune_pack24_reference(weight, sum_sq, mask, saliency, selection, mean_rate, dev_rate, lam)
    if mask is None and selection == "ewma_streaming":
        mask, _ = select24_reference(weight, sum_sq, saliency, selection, mean_rate, dev_rate, lam)
    score = _score_arguments(weight, sum_sq, saliency) if mask is None else (0, *Terms())
    given = None if mask is None else mask.contiguous()
    packed = torch.ops.hwpq_fx.cpu_prune_pack24(weight.contiguous(), given, *score)
    if mask is not None and bool(packed[2].isnan().any()):
        raise ValueError("the mask does not keep exactly two of every four neighbours along K")
    return packed


def dense24(qdata: Tensor, sparse_metadata: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear24.unpacked`, in native code where that serves the dtype."""
    unpack = torch.ops.hwpq_fx.cpu_unpack24 if dtype in KERNEL_DTYPES else unpacked
    scale = None if scale is None else scale.contiguous()
    return unpack(qdata.contiguous(), sparse_metadata.contiguous(), scale, dtype)


def why_not(arch: int, dtype: torch.dtype, n: int, k: int) -> str:
    """Empty where "expand" serves a weight [n, k] of a model in `dtype` on this CPU, else why not; `arch` is unused."""
    cpu = torch.cpu.get_capabilities()
    missing = [name for name in EXPAND_NEEDS if not cpu.get(name)]
    if missing:
        return f"this CPU has no {', '.join(missing)}"
    if dtype not in KERNEL_DTYPES:
        return f"{dtype} is not served"
    return why_not_native()


def expands(rows: int, dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether x [rows, k] in `dtype` is multiplied with a weight [n, k] by "expand"; not where only the data tell the
    rows."""
    return guard_or_false(rows <= EXPAND_ROWS) and not why_not(0, dtype, n, k)


def product(
    x: Tensor,
    x_scale: Tensor | None,
    qdata: Tensor,
    sparse_metadata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, N] = (x . W values) * x_scale * scale + bias in `out_dtype`, summed in float32; `layout` is not used.

    x: [M, K], e4m3 with x_scale float32 [M, 1], or float32, bfloat16 or float16 without one.
    """
    bias = None if bias is None else bias.float().contiguous()
    # every other row of a weight is a weight too
    parts = [part.contiguous() for part in (qdata, sparse_metadata, scale)]
    return torch.ops.hwpq_fx.expand24(x, x_scale, *parts, bias, out_dtype)


@linear24.register_kernel("cpu")
def linear24_cpu(x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for):
    """`linear24` on a CPU, in ops that Inductor sees through: "expand" for few rows of x, else a dense product, with
    the weight unpacked on the spot where it brings no dense layout."""
    check(x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for)
    outputs, inputs = qdata.shape[0], x.shape[-1]
    # (torch.Size.numel would take symbolic sizes for the numbers they stand for)
    if expands(prod(x.shape[:-1]), out_dtype, outputs, inputs):
        row_scale = None if x_scale is None else x_scale.reshape(-1, 1).contiguous()
        rows = x.reshape(-1, inputs).contiguous()
        y = product(rows, row_scale, qdata, sparse_metadata, scale, bias, None, out_dtype)
        return no_view(y, (*x.shape[:-1], outputs))
    if prepacked is None:
        form = dense_form(scale, out_dtype, x_scale is not None)
        prepacked, prepacked_for = dense24(qdata, sparse_metadata, *form), DENSE
    return linear24_reference(
        x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for
    )


def _decompose(x, *rest):
    if x.device.type == "cpu":
        return linear24_cpu(x, *rest)
    _keep_whole()
    return NotImplemented


def _register_inductor_decomposition() -> None:
    """Inductor's table of decompositions has no public door. Tried on torch 2.11 and 2.13."""
    from torch._inductor.decomposition import decompositions

    decompositions[torch.ops.hwpq_fx.linear24.default] = _decompose


@cache
def _keep_whole() -> None:
    """Inductor refuses to call an op that is in that table, unless told to. Told while it compiles: the import takes
    half a second. Tried on torch 2.11 and 2.13."""
    from torch._inductor.lowering import get_layout_constraint_tag, make_fallback, tag_to_layout_constraint

    op = torch.ops.hwpq_fx.linear24.default
    make_fallback(op, tag_to_layout_constraint(get_layout_constraint_tag(op)), warn=False, override_decomp=True)


_register_inductor_decomposition()


@torch.library.register_fake("hwpq_fx::expand24")
def _fake(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype):
    torch._check(x.dim() == 2 and qdata.dim() == 2 and x.shape[1] == 2 * qdata.shape[1], lambda: "expand24: shapes")
    return x.new_empty((x.shape[0], qdata.shape[0]), dtype=out_dtype)


@torch.library.register_fake("hwpq_fx::cpu_unpack24")
def _fake_unpack(qdata, sparse_metadata, scale, dtype):
    torch._check(qdata.dim() == 2 and sparse_metadata.shape[1] * 4 == qdata.shape[1], lambda: "cpu_unpack24: shapes")
    return qdata.new_empty((qdata.shape[0], 2 * qdata.shape[1]), dtype=dtype)


# These run where no native kernel is registered for "CPU": until the library is loaded, and where there is none.


def _expand24(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype):
    if not why_not(0, out_dtype, *qdata.shape):
        return torch.ops.hwpq_fx.expand24(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype)
    return linear24_reference(x, x_scale, qdata, sparse_metadata, scale, bias, None, None, out_dtype, "")


def _unpack24(qdata, sparse_metadata, scale, dtype):
    if not why_not_native():
        return torch.ops.hwpq_fx.cpu_unpack24(qdata, sparse_metadata, scale, dtype)
    return unpacked(qdata, sparse_metadata, scale, dtype)


torch.library.impl("hwpq_fx::expand24", "CompositeExplicitAutograd", _expand24)
torch.library.impl("hwpq_fx::cpu_unpack24", "CompositeExplicitAutograd", _unpack24)
