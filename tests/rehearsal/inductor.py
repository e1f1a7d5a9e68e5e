"""Inductor on the rehearsed GPU: all of it up to Triton's source, and in place of that the graph it was made from."""

from types import SimpleNamespace

import torch
import torch._inductor.compile_fx
import torch._inductor.graph
import torch._inductor.runtime.triton_helpers
import torch.utils._triton
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    """Says which GPU; can launch nothing."""

    def __init__(self):
        pass

    @staticmethod
    def is_active():
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_benchmarker(self):
        raise NotImplementedError("nothing is launched")


def compile_to_module(lowering):
    """`GraphLowering.compile_to_module`: the code is written and parsed, the graph runs."""
    source, _ = lowering.codegen()
    compile(source.value, "<Inductor>", "exec")

    def call(args):
        given = list(args)
        args.clear()  # as Inductor's own code: what it was given it may free
        return tuple(lowering.orig_gm(*given))

    lowering.cache_key, lowering.cache_path, lowering.cache_linemap = "rehearsed", __file__, []
    # recording is done by private calls of CUDA's allocator: the parts that would be recorded run as they are
    runner = SimpleNamespace(call=call, partitions=[], recursively_apply_fns=lambda functions: None)
    return SimpleNamespace(call=call, runner=runner, __file__=__file__)


def install() -> None:
    triton.runtime.driver.set_active(Driver())
    torch.utils._triton.triton_hash_with_backend = lambda: "rehearsed"
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    torch._inductor.config.force_disable_caches = True
    torch._inductor.graph.GraphLowering.compile_to_module = compile_to_module
    torch._inductor.compile_fx.cudagraphify = lambda model, *args, **kwargs: model
