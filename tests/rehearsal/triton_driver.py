"""Triton's driver for the rehearsed GPU: kernels are compiled for it, and their PTX runs on the CPU.

Tried on triton 3.6 and 3.9.
"""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from . import gpu, ptx

loading = []
"""Files of the kernel that is being loaded."""


@cache
def kernel(source):
    return ptx.read(source)


def extent(tensor):
    """First address of a tensor's elements, and one past the last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def flat(values, types):
    """Arguments that a kernel takes, in their order: constants are in its code."""
    for value, kind in zip(values, types, strict=True):
        if isinstance(kind, tuple):
            yield from flat(value, kind)
        elif kind != "constexpr":
            yield value


class Launcher:
    def __init__(self, source, metadata):
        self.types, self.metadata = tuple(source.signature.values()), metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        given = list(flat(arguments, self.types))
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given]
        ranges = [extent(value) for value in given if isinstance(value, torch.Tensor)]
        read = kernel(function)
        # pointers to scratch memory that Triton adds
        values += [0] * (len(read.parameters) - len(values))
        gpu.launch(ptx.launch, read, (x, y, z), self.metadata.shared, values, ranges)


class Utils:
    def load_binary(self, name, cubin, shared, device):
        (path,) = (path for name, path in loading.pop().items() if name.endswith(".ptx"))
        return object(), Path(path).read_text(), 32, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        properties = torch.cuda.get_device_properties(device)
        return {
            "max_shared_mem": properties.shared_memory_per_block_optin,
            "multiprocessor_count": properties.multi_processor_count,
            "warpSize": properties.warp_size,
        }


class Driver(DriverBase):
    launcher_cls = Launcher

    def __init__(self):
        self.utils = Utils()

    @staticmethod
    def is_active():
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return SimpleNamespace(Event=torch.cuda.Event, synchronize=torch.cuda.synchronize)

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed")


def install():
    triton.knobs.runtime.kernel_load_start_hook = lambda module, function, name, files, key: loading.append(files)
    triton.runtime.driver.set_active(Driver())
