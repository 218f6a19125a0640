"""Packed-ternary kernels: the layout, the backends and the one function that chooses a backend."""

from bitwatt_kernels.errors import BackendError, DtypeError, KernelError, ShapeError

__all__ = ["BackendError", "DtypeError", "KernelError", "ShapeError"]
