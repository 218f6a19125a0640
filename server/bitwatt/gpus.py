"""Whether there is a GPU, asked of the driver: the API process has no torch to ask."""

import ctypes

__all__ = ["why_no_gpu"]


def why_no_gpu(device: str) -> str | None:
    """Return why `cuda` or `cuda:N` is no GPU of this process; None where it is, or for a CPU.

    The driver's library counts the GPUs, those that CUDA_VISIBLE_DEVICES leaves. It makes no
    context on any.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1) on this machine"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return "the driver shows this process no NVIDIA GPU"
    if int(index or 0) >= count.value:
        noun = "GPU" if count.value == 1 else "GPUs"
        return f"the driver shows this process {count.value} NVIDIA {noun}, numbered from 0"
    return None
