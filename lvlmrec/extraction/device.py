"""The device of a model: its name, and what an exception says of it: memory ran out, or it is lost to this process.

Told by type and message, without torch, which processes that decode do not import.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator

# cuBLAS makes its workspace with its handle: where memory is short it says that it is not initialised.
_OUT_OF_MEMORY = re.compile(
    r"(CUDA|HIP)( error:)? out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|"
    r"_STATUS_(\w+_)?ALLOC(ATION)?_FAILED|BLAS_STATUS_NOT_INITIALIZED"
)
# After these every call of the process fails: "To continue using CUDA, the process must be terminated and relaunched",
# https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html; HIP says the same in the same words.
_LOST = re.compile(
    r"(CUDA|HIP) error: (an illegal (memory access|instruction)|device-side assert|unspecified launch failure|"
    r"uncorrectable (ECC|NVLink) error|misaligned address|invalid program counter|hardware stack error|"
    r"operation not supported on global/shared address space|the launch timed out|context is destroyed|"
    r"unknown error)|"
    r"(BLAS|BLASLT|DNN|SOLVER|SPARSE)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)|"
    r"miopenStatus(Internal|Unknown)Error"
)


def name(device: str) -> str:
    """The device `cpu`, `cuda`, `cuda:1`, ... as its maker calls it; of a CPU what it can."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device == "cpu" else device


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed: the device's memory ran out, or the host's."""
    return any(
        isinstance(one, MemoryError)
        or any(kind.__name__ == "OutOfMemoryError" for kind in type(one).__mro__)
        or (isinstance(one, RuntimeError) and _OUT_OF_MEMORY.search(str(one)) is not None)
        for one in _chain(error)
    )


def is_lost(error: BaseException) -> bool:
    """Whether the device answers this process no more, so that only a new process can go on.

    Errors of NCCL are not among them: they tell of another process.
    """
    return not ran_out_of_memory(error) and any(
        isinstance(one, RuntimeError) and "NCCL" not in str(one) and _LOST.search(str(one)) is not None
        for one in _chain(error)
    )


def free_memory() -> None:
    """Give back what the allocator keeps. Whoever calls must have left the `except` block: it holds tensors alive."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from or while handling."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
