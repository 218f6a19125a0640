"""The backends by name, and the one place that chooses one."""

from dataclasses import dataclass
from importlib import import_module
from typing import cast

import torch

from bitwatt_kernels.backend import Backend
from bitwatt_kernels.cpu.threads import available_threads, count_threads
from bitwatt_kernels.errors import BackendError

__all__ = ["BACKENDS", "BackendChoice", "choose_backend"]

# A backend's module and class; the class is called with (device, batch_invariant=...) and raises
# BackendError with the reason where it cannot run.
BACKENDS = {
    "reference": ("bitwatt_kernels.reference.reference_backend", "ReferenceBackend"),
    "native": ("bitwatt_kernels.cpu.native_backend", "NativeBackend"),
    "torch": ("bitwatt_kernels.cpu.torch_backend", "TorchBackend"),
    "triton": ("bitwatt_kernels.gpu.triton_backend", "TritonBackend"),
}

# Compiled here, with threads of their own: these classes take num_threads and instruction_set too.
_COMPILED = {"native"}

# This one takes persistent_step too.
_PERSISTENT = "triton"

# By device type, the fastest first. The reference is chosen by name only.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "torch"),
    "cuda": ("triton",),
}


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The backend that runs, and why each faster one was passed over."""

    backend: Backend
    passed_over: dict[str, str]


def choose_backend(
    device: torch.device,
    name: str | None = None,
    *,
    batch_invariant: bool = True,
    num_threads: int | None = None,
    instruction_set: str | None = None,
    persistent_step: bool = False,
) -> BackendChoice:
    """Return the named backend, or the fastest one that runs on device.

    batch_invariant  a token's 16-bit matmuls and attention must not depend on its batch either;
                     False lets the 16-bit baseline use the fastest kernels its library has
    num_threads      CPU threads of the backend and, in this process, of torch; None for all
    instruction_set  of the native backend, which then is the only candidate; None for the fastest
                     that runs
    persistent_step  run all ternary layers of a step that decodes a few tokens in one kernel, which
                     the triton backend does; then it is the only candidate
    Raises  BackendError if no candidate can run, with the reason of each
    """
    if name is not None and name not in BACKENDS:
        raise BackendError(f"backend {name!r} is unknown; there are {', '.join(BACKENDS)}")
    candidates = (name,) if name else _PREFERENCE.get(device.type, ())
    passed_over: dict[str, str] = {}
    if instruction_set is not None:
        candidates = tuple(c for c in candidates if c in _COMPILED)
        if not candidates:
            raise BackendError(
                f"instruction set {instruction_set!r} is for the native backend on a CPU, "
                f"not for {name or device} (--cpu-isa)"
            )
    if persistent_step:
        candidates = tuple(c for c in candidates if c == _PERSISTENT)
        if not candidates:
            raise BackendError(
                f"a persistent step is for the triton backend on a GPU, not for {name or device} "
                "(--persistent-step)"
            )
    if num_threads is None:  # torch takes every core, whatever a control group grants
        torch.set_num_threads(min(torch.get_num_threads(), available_threads()))
    else:
        torch.set_num_threads(count_threads(num_threads))
    for candidate in candidates:
        module, class_name = BACKENDS[candidate]
        own: dict[str, object] = {}
        if candidate in _COMPILED:
            own = {"num_threads": num_threads, "instruction_set": instruction_set}
        elif candidate == _PERSISTENT:
            own = {"persistent_step": persistent_step}
        try:
            factory = getattr(import_module(module), class_name)
            backend = cast(Backend, factory(device, batch_invariant=batch_invariant, **own))
        except (BackendError, ImportError) as error:  # Triton is on Linux only
            passed_over[candidate] = str(error)
            continue
        return BackendChoice(backend, passed_over)
    reasons = "; ".join(f"{k}: {v}" for k, v in passed_over.items()) or "none is written for it"
    raise BackendError(f"no backend runs on {device}: {reasons}")
