"""What a kernel refuses, and why.

KernelError
├── ShapeError        a size no kernel takes
├── DtypeError        an element type no kernel takes
└── BackendError      a backend that cannot run on this machine
"""

__all__ = ["BackendError", "DtypeError", "KernelError", "ShapeError"]


class KernelError(Exception):
    """Any input or machine the kernels refuse."""


class ShapeError(KernelError, ValueError):
    """A tensor's size is not one the kernels take."""


class DtypeError(KernelError, TypeError):
    """A tensor's element type is not one the kernels take."""


class BackendError(KernelError, RuntimeError):
    """The backend cannot run here."""
