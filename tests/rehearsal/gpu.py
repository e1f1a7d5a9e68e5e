"""What `torch.cuda` answers for the rehearsed GPU."""

import contextlib
import time
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

NAME = "Rehearsed GPU"
GIB = 1 << 30


class Stream:
    """All work is done when the call returns."""

    device, device_index, device_type = torch.device("cuda", 0), 0, 1
    stream_id = cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class Event:
    def __init__(self, enable_timing=False):
        self.enable_timing = enable_timing

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        if not (self.enable_timing and later.enable_timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        return (later.at - self.at) * 1e3


captures: "list[Capture]" = []


class Capture(TorchDispatchMode):
    """Keeps the operators that run, and refuses what waits for the GPU."""

    def __init__(self):
        super().__init__()
        self.calls, self.inside = [], False

    @classmethod
    def is_infra_mode(cls):
        return True  # Dynamo runs what it has compiled under no other mode

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.inside = True
        out = op(*args, **kwargs)
        self.inside = False
        devices = {one.device.type for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)}
        waits = op.name() in ("aten::_local_scalar_dense", "aten::nonzero") and "cuda" in devices
        if waits or (op.name() in ("aten::_to_copy", "aten::copy_") and len(devices) > 1):
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
        self.calls.append((op, args, kwargs, out))
        return out


class CUDAGraph:
    def __init__(self, keep_graph=False):
        self.capture = Capture()

    def capture_begin(self, pool=None, capture_error_mode="global"):
        captures.append(self.capture)
        self.capture.__enter__()

    def capture_end(self):
        self.capture.__exit__(None, None, None)
        captures.pop()

    def replay(self):
        """The same operators again, their results to where the captured ones lie; to what asks, a capture still."""
        captures.append(self.capture)
        self.capture.inside = True
        try:
            self._again()
        finally:
            self.capture.inside = False
            captures.pop()

    def _again(self):
        for op, args, kwargs, out in self.capture.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self):
        self.capture.calls.clear()


def launch(run, *args):
    """A Triton kernel is no operator: kept beside them, and not looked into."""
    if captures and not captures[-1].inside:
        captures[-1].calls.append((run, args, {}, None))
    with _disable_current_modes():
        run(*args)


@contextlib.contextmanager
def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    cuda_graph.capture_begin()
    try:
        yield
    finally:
        cuda_graph.capture_end()


def install(arch: int) -> None:
    """Give `torch.cuda` one GPU, sm_`arch`."""
    capability = divmod(arch, 10)
    # of an H100, but for a cache that a benchmark soon has gone round
    properties = SimpleNamespace(
        name=NAME, major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=80 * GIB,
        L2_cache_size=1 << 12, warp_size=32, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        regs_per_multiprocessor=65536, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
    )  # fmt: skip

    def answer(value):  # anew for each name: Dynamo has rules by function
        return lambda *args, **kwargs: value

    generators = (torch.Generator("cuda"),)
    stand_ins = {
        "CUDAGraph": CUDAGraph,
        "Event": Event,
        "Stream": Stream,
        "_exchange_device": answer(0),
        "_lazy_init": answer(None),
        "_maybe_exchange_device": answer(0),
        "_sleep": answer(None),
        "current_device": answer(0),
        "current_stream": answer(Stream()),
        "default_generators": generators,
        "device_count": answer(1),
        "empty_cache": answer(None),
        "get_device_capability": answer(capability),
        "get_device_name": answer(NAME),
        "get_device_properties": answer(properties),
        "get_rng_state": lambda device=None: generators[0].get_state(),
        "graph": graph,
        "is_available": answer(True),
        "is_bf16_supported": answer(True),
        "is_current_stream_capturing": lambda: bool(captures),
        "is_initialized": answer(True),
        "manual_seed_all": lambda seed: generators[0].manual_seed(seed),
        "max_memory_allocated": answer(GIB),
        "mem_get_info": answer((8 * GIB, 80 * GIB)),
        "memory_allocated": answer(GIB),
        "reset_peak_memory_stats": answer(None),
        "set_device": answer(None),
        "set_rng_state": lambda state, device=None: generators[0].set_state(state),
        "set_sync_debug_mode": answer(None),
        "stream": answer(contextlib.nullcontext()),
        "synchronize": answer(None),
    }
    for name, stand_in in stand_ins.items():
        if not hasattr(torch.cuda, name):
            raise AttributeError(f"torch.cuda.{name} is not there any more")
        setattr(torch.cuda, name, stand_in)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.version.cuda = "13.0"
    # a build without CUDA has none of these
    for name in ("getDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{name}", answer(0))
    for name in ("setDevice", "synchronize"):
        setattr(torch._C, f"_cuda_{name}", answer(None))
    torch._C._cuda_getDeviceCount = answer(1)
    torch._C._cuda_cudaCachingAllocator_is_enabled = answer(True)
    torch._C._cuda_isCurrentStreamCapturing = torch.cuda.is_current_stream_capturing
    torch.UntypedStorage.__new__ = new_storage


def new_storage(cls, *args, device=None):
    """`torch.UntypedStorage(size, device=...)`, which asks for the device by a list of its own."""
    if device is None or torch.device(device).type != "cuda":
        return torch._C.StorageBase.__new__(cls, *args, device=device)
    return torch.empty(*args, dtype=torch.uint8, device=device).untyped_storage()
