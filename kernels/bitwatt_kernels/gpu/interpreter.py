"""Whether kernels run in Triton's interpreter, and arithmetic that is there as on a GPU."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl

__all__ = ["INTERPRETED"]

# Read when the kernels are defined: that is when @triton.jit chooses its form.
INTERPRETED: bool = triton.knobs.runtime.interpret


def _bfloat16_to_float32(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bfloat16(values: Any) -> Any:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _teach_arithmetic() -> None:
    """Give the interpreter bfloat16 casts that round half to even, and dots by row and in floats.

    Triton 3.6 and 3.7 keep bfloat16 as uint16, truncate on the way down and multiply the bit
    patterns in tl.dot.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast = InterpreterBuilder.cast_impl
    plain_fp_to_fp = InterpreterBuilder.create_fp_to_fp
    plain_dot = InterpreterBuilder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return plain_cast(self, src, dst_type)
        if source == tl.bfloat16:
            wide = TensorHandle(_bfloat16_to_float32(src.data), tl.float32)
            return wide if target == tl.float32 else plain_cast(self, wide, dst_type)
        wide = src if source == tl.float32 else plain_cast(self, src, tl.float32)
        values = np.ascontiguousarray(wide.data, dtype=np.float32)
        return TensorHandle(_float32_to_bfloat16(values), tl.bfloat16)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return plain_fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if not a.dtype.scalar.is_floating():
            return plain_dot(self, a, b, d, *precision)
        a, b = (
            cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        # Rounded once from float64: in float32 a row's bits would depend on the other rows, by
        # how the machine's BLAS cuts a matrix of that shape into tiles.
        products = np.matmul(a.data, b.data, dtype=np.float64)
        return TensorHandle(products.astype(d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot


def _prepare_once() -> None:
    """Have the interpreter replace Triton's builtins once a launch, and keep its table of dtypes.

    Triton 3.6 and 3.7 look through the whole language at each call of a device function, and make
    the table at each operation: a third of what a kernel takes.
    """
    from triton.runtime import interpreter

    plain_patch = interpreter._patch_lang
    plain_numpy_dtype = interpreter._get_np_dtype
    numpy_dtype_of_scalar = cache(plain_numpy_dtype)
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_lang(_: Any) -> Any:
        """Replace all that any device function may name, not only what the kernel itself does."""
        return plain_patch(language)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    def numpy_dtype(dtype: Any) -> Any:
        return (numpy_dtype_of_scalar if type(dtype) is tl.dtype else plain_numpy_dtype)(dtype)

    interpreter._patch_lang = patch_lang
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = numpy_dtype


def _share_shapes() -> None:
    """Have types and tensors of one shape share its description.

    Triton 3.6 and 3.7 describe each operation's result anew, twice, with a constant and that
    constant's type for every size: almost half of what an operation takes.
    """
    plain_block_type = tl.block_type.__init__
    plain_tensor = tl.tensor.__init__
    plain_unwrap = tl.core._unwrap_if_constexpr
    sequences = (list, tuple, tl.tuple)

    def unwrap(value: Any) -> Any:
        if type(value) is tl.constexpr:
            return value.value
        return plain_unwrap(value) if isinstance(value, sequences) else value

    @cache
    def of_type(*sizes: int) -> tuple[Any, int, str]:
        made = object.__new__(tl.block_type)
        plain_block_type(made, tl.int1, list(sizes))
        return made.shape, made.numel, str(made.shape)

    @cache
    def of_tensor(*sizes: int) -> tuple[Any, Any]:
        made = object.__new__(tl.tensor)
        plain_tensor(made, None, tl.block_type(tl.int1, list(sizes)) if sizes else tl.int1)
        return made.shape, made.numel

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.shape, self.numel, name = of_type(
            *[size.value if type(size) is tl.constexpr else size for size in shape]
        )
        self.name = f"<{name}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        self.shape, self.numel = of_tensor(*(type.shape.values if type.is_block() else ()))

    tl.core._unwrap_if_constexpr = unwrap
    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor


if INTERPRETED:
    _teach_arithmetic()
    _prepare_once()
    _share_shapes()
