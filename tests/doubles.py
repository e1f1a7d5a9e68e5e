"""Doubles of compiled libraries that run on no CPU: what they check, where they read and what they compute."""

import torch

from hwpq_fx.kernels import cusparselt24, cutlass24
from hwpq_fx.kernels.pack24 import PATTERNS, pack24
from hwpq_fx.kernels.quantize_rows import E4M3

OUT = (torch.bfloat16, torch.float16, torch.float32)


def refuse(condition, message):
    if condition:
        raise RuntimeError(message)


def torchao_op(x, x_scale, weight, meta, scale, bias=None, out_dtype=None):
    """As torchao 0.18 csrc/cuda/rowwise_scaled_linear_sparse_cutlass/rowwise_scaled_linear_sparse_cutlass.cuh:
    check_inputs (lines 400-537), the dtypes of dispatch_on_* (313-398), then the kernel's arithmetic (76-263)."""

    def refuse_op(condition, message):
        refuse(condition, f"rowwise_scaled_linear_sparse_cutlass : {message}")

    refuse_op(x.dtype != E4M3 or weight.dtype != E4M3, "The input datatypes combination is not supported")
    refuse_op(meta.dtype != torch.uint8, "Expected Wq meta argument to be of torch.uint8 datatype")
    refuse_op(x.dim() < 2, "Expected Xq argument to be 2D or higher-dimensional tensor")
    refuse_op(x_scale.dim() != x.dim() - 1, f"Expected Xq scale argument to be {x.dim() - 1}D tensor")
    refuse_op(weight.dim() != 2 or meta.dim() != 2, "Expected Wq and Wq meta arguments to be 2D tensors")
    refuse_op(scale.dim() not in (1, 2), "Expected Wq scale argument to be 1D or 2D tensor")
    refuse_op(bias is not None and bias.dim() != 1, "Expected bias argument to be 1D tensor")
    k, (n, half) = x.shape[-1], weight.shape
    refuse_op(k % 32, f"Xq argument must have number of columns divisible by 32, got {k}")
    refuse_op(n % 8, f"Wq argument to have number of rows divisible by 8, but got {n}")
    refuse_op(k != 2 * half, f"Expected Xq argument to have {2 * half} columns, but got {k}")
    refuse_op(x_scale.shape != x.shape[:-1], "Expected Xq scale argument size")
    refuse_op(half % 8, "Expected Wq argument to have number of columns divisible by 8")
    refuse_op(meta.shape[0] != max(n, 64), f"Expected Wq meta argument to have {max(n, 64)} rows, got {meta.shape[0]}")
    columns = max((half // 4 + 15) // 16 * 16, 16)
    refuse_op(meta.shape[1] != columns, f"Wq meta argument to hold {columns} bytes per row, got {meta.shape[1]}")
    refuse_op(scale.numel() != n, f"Expected Wq scale argument to have {n} elements")
    refuse_op(bias is not None and bias.numel() != n, f"Expected bias argument to have {n} elements")
    refuse_op(x.stride(-1) != 1, "Expected Xq argument in row-major layout")
    refuse_op(not x_scale.is_contiguous(), "Expected Xq scale argument to be contiguous")
    refuse_op(weight.stride(0) < 1 or weight.stride(1) != 1, "Expected Wq argument in row-major layout")
    refuse_op(meta.stride(0) < 1 or meta.stride(1) != 1, "Expected Wq meta argument in row-major layout")
    refuse_op(not scale.is_contiguous(), "Expected Wq scale argument to be contiguous")
    refuse_op(bias is not None and bias.stride(0) != 1, "Expected bias argument to be contiguous")
    out_dtype = out_dtype or x_scale.dtype
    refuse_op(
        out_dtype not in (torch.bfloat16, torch.float16), f"Operator not supported for output data type {out_dtype}"
    )
    refuse_op(bias is not None and bias.dtype != out_dtype, f"Operator not supported for bias datatype {bias}")
    refuse_op((x_scale.dtype, scale.dtype) != (torch.float32,) * 2, "Operator not supported for scale data types")
    refuse_op(x.numel() == 0, "Got CUTLASS error: Error Internal")  # a tensor map of no rows
    refuse_op(any(part.data_ptr() % 16 for part in (x, weight, meta)), "Got CUTLASS error: Error Misaligned Operand")

    # From here on only addresses count, as in CUTLASS: packed strides, and the layouts of sm90_sparse_config.inl
    values = torch.as_strided(weight, (n, half), (half, 1))
    rows = torch.as_strided(x, x.shape, (k, 1))
    padded = (n + 63) // 64 * 64
    # fill_layoutE, lines 257-264, in bytes: ((64, blocks), ((16, 1) of 8 columns, blocks))
    layout = torch.as_strided(meta, (padded // 64, 64, columns // 16, 16), (64 * 16, 16, padded * 16, 1))
    nibbles = torch.stack((layout & 0xF, layout >> 4), -1).view(padded, columns * 2)
    assert set(nibbles.unique().tolist()) <= set(PATTERNS), "undefined behaviour in PTX: index pairs out of order"
    nibbles = nibbles[:n, : half // 2].long()
    index = torch.stack((nibbles & 3, nibbles >> 2), -1)
    dense = torch.zeros(n, half // 2, 4, dtype=torch.float64)
    dense = dense.scatter(-1, index, values.double().view(n, half // 2, 2)).view(n, k)
    accumulator = (rows.double() @ dense.t()).float()
    y = accumulator * scale.view(-1) * x_scale[:, None] + (0 if bias is None else bias.float())
    return y.to(out_dtype)


def torchao_compressor(weight):
    """`to_sparse_semi_structured_cutlass_sm9x_f8` of an e4m3 weight [N, K] that is 2:4: (values [N, K/2], metadata)."""
    nonzero = (weight.float() != 0).view(*weight.shape[:-1], -1, 4)
    refuse(bool((nonzero.sum(-1) > 2).any()), "not 2:4")
    # where a group has fewer nonzeros, the first zeros beside them
    kept = torch.argsort((~nonzero).byte(), dim=-1, stable=True)[..., :2]
    mask = torch.zeros_like(nonzero).scatter(-1, kept, True)
    qdata, sparse_metadata = pack24(weight, mask.view(weight.shape))
    shape = cutlass24.blocks(*sparse_metadata.shape)
    return qdata, cutlass24.make_layout(qdata, sparse_metadata).view(shape)


class CuSparseLt:
    """As aten/src/ATen/native/sparse/cuda/cuSPARSELtOps.cpp at torch 2.11 to 2.13 (`_cslt_compress`,
    `_cslt_sparse_mm_impl`), torch/csrc/cuda/shared/cusparselt.cpp (`mm_search`), and what cuSPARSELt 0.8's error
    messages and sm_90 kernel names ("e4m3bf16_e4m3f32_f32_tn_n") say of FP8."""

    def __init__(self, version=800):
        self.version = version
        self.known = {}  # compressed bytes to the dense weight
        self.searched = []  # rows, dtype
        self.used = []
        self.capturing = False
        self.library = cusparselt24.Library(
            version, self.compress, self.sparse_mm, self.search, lambda: self.capturing, lambda device: "Test GPU"
        )

    def compress(self, dense):
        refuse(dense.dtype != E4M3, "Unsupported dtype for cuSPARSELt/hipSparseLt compressed matrix")
        refuse(dense.dim() != 2 or not dense.is_contiguous(), "the descriptor takes rows of K, densely")
        n, k = dense.shape
        refuse(n % 32 or k % 32, "the number of rows must be at least multiple of 32")
        nonzeros = (dense.float().view(n, k // 4, 4) != 0).sum(-1)
        refuse(bool((nonzeros > 2).any()), "not 2:4")
        size = n * k * 5 // 8 + 100  # not a multiple of N: the last columns are filled up
        out = torch.randint(0, 256, (n, -(-size // n)), dtype=torch.uint8)
        self.known[self._bytes(out)] = dense.clone()
        return out.view(E4M3)

    @staticmethod
    def _bytes(t):
        return bytes(t.contiguous().view(torch.uint8).view(-1).tolist())

    def _operands(self, compressed, dense_b, bias, alpha, out_dtype):
        refuse(compressed.dtype != E4M3, "Unsupported dtype for cuSPARSELt compressed matrix multiplication.")
        refuse(compressed.dim() != 2, "INTERNAL ASSERT FAILED: compressed_A.dim() == 2")
        refuse(dense_b.dtype != E4M3 or dense_b.dim() != 2, "matA and matB with different value types")
        refuse(
            out_dtype not in (E4M3, *OUT),
            "Unsupported out_dtype passed, must be one of {fp16, bf16, float32} for fp8 inputs",
        )
        refuse(
            alpha is not None and alpha.numel() != 1,
            "Alpha/beta vector scaling is only supported in INT8 input, INT32 compute kernels",
        )
        refuse(bias is not None, "a bias would come before the scales")
        # is_contiguous() alone decides between op(B) = B and B^T, and FP8 has only the latter ("tn" kernels)
        refuse(dense_b.is_contiguous(), "only opA/B=NT is supported with orderA/B=(ROW,ROW)")
        refuse(not dense_b.t().is_contiguous(), "the descriptor takes rows of K, densely")
        refuse(dense_b.shape[0] % 32 or dense_b.shape[1] % 16, "rows or columns are no multiple of 16 bytes")
        refuse(compressed.data_ptr() % 16 or dense_b.data_ptr() % 16, "only multiples of 16 are supported")
        weight = self.known[self._bytes(compressed)]  # every byte as `compress` gave it
        refuse(weight.shape[1] != dense_b.shape[0], "dimension mismatch, matA and matB")
        return weight

    def sparse_mm(
        self, compressed, dense_b, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0, split_k=1,
        split_k_mode=-1,
    ):  # fmt: skip
        weight = self._operands(compressed, dense_b, bias, alpha, out_dtype)
        refuse(not 0 <= alg_id < 40, "CUSPARSELT_MATMUL_ALG_CONFIG_ID data is out of the range")
        refuse(split_k not in (1, -1), "On SM90 the splitK value must be either 1 or -1")
        self.used.append((alg_id, split_k, split_k_mode))
        result = (weight.double() @ dense_b.double()).float().to(out_dtype)
        return result.t().contiguous() if transpose_result else result

    def search(self, compressed, dense_b, bias, alpha, out_dtype, transpose_result):
        refuse(self.capturing, "operation not permitted when stream is capturing")
        self._operands(compressed, dense_b, bias, alpha, out_dtype)
        self.searched.append((dense_b.shape[1], out_dtype))
        return min(len(self.searched), 39), -1, 3, 40
