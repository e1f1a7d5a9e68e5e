"""Inductor on the rehearsed GPU: what it writes is compiled, and runs as any kernel does."""

import torch
import torch._inductor.compile_fx
import torch._inductor.config
import torch._inductor.runtime.triton_helpers
import torch.utils._triton


def empty_strided(size, stride, dtype):
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def install() -> None:
    torch.utils._triton.triton_hash_with_backend = lambda: "rehearsed"
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1  # other processes have no such GPU
    # both are of a build with CUDA
    torch._inductor.config.use_static_triton_launcher = False
    torch._C._dynamo.guards._empty_strided_cuda = empty_strided
    # recording is done by private calls of CUDA's allocator: what would be recorded runs as it is
    torch._inductor.compile_fx.cudagraphify = lambda model, *args, **kwargs: model
