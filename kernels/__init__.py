"""What the hardware runs: the packed weight, its bit layout, and one module per op."""

# transformers looks for a package called `kernels`, and finds this folder where the repository is the working
# directory. Nothing may run then: ops registered a second time leave the first registration dangling.
if __name__ == "hwpq_fx.kernels":
    from . import packed_products, packed_views  # noqa: F401 (ops of the packed weight)
    from .linear24 import linear24
    from .pack24 import FORMAT_K, pack24, unpack24
    from .packed import Float8Sparse24Tensor
    from .prune_pack24 import prune_pack24
    from .quantize_rows import quantize_rows, quantize_weight_rows
    from .select24 import best_two, select24

__all__ = [
    "FORMAT_K",
    "Float8Sparse24Tensor",
    "best_two",
    "linear24",
    "pack24",
    "prune_pack24",
    "quantize_rows",
    "quantize_weight_rows",
    "select24",
    "unpack24",
]
