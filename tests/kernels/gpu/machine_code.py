"""Compile a Triton kernel for a GPU that isn't here, and read what the machine would run."""

import re
import struct
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

__all__ = ["SHARED_MEMORY_BYTES", "MachineCode", "compile_for", "source_of"]

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"

# Most a thread block can have: CUDA C++ Programming Guide, technical specifications.
SHARED_MEMORY_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
}

_INSTRUCTION_BYTES = 16
# By generation, as the disassembler names them: what it reads for SM86 has sm_80's and sm_89's too.
_ENCODINGS = {8: "SM86", 9: "SM90", 10: "SM100", 12: "SM120"}
_POINTERS = {"int8": "*i8", "uint8": "*u8", "int32": "*i32", "int64": "*i64", "float32": "*fp32"}
_POINTERS |= {"bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64"}


class MachineCode:
    """A compiled kernel, disassembled once it is looked at, with all others that wait for it."""

    def __init__(self, cubin: bytes, capability: int, shared_bytes: int) -> None:
        self.shared_bytes = shared_bytes
        self._code = b"".join(_code_of(cubin))
        self._encoding = _ENCODINGS[capability // 10]
        self._instructions: list[tuple[int, str]] | None = None
        _WAITING[self._encoding].append(self)

    @property
    def instructions(self) -> list[tuple[int, str]]:
        """The instructions in order, as (address, text); branches name an address."""
        if self._instructions is None:
            _disassemble(self._encoding)
        assert self._instructions
        return self._instructions

    def count(self, pattern: str) -> int:
        """Return how many instructions match a regular expression."""
        return sum(bool(re.search(pattern, text)) for _, text in self.instructions)

    def main_loop(self, pattern: str) -> list[str]:
        """Return the innermost loop with the most instructions that match pattern."""
        loops = [self._texts(loop) for loop in self._loops()]
        return max(loops, key=lambda loop: (_matches(pattern, loop), -len(loop)))

    def innermost_loops(self, pattern: str) -> list[list[str]]:
        """Return the loops with instructions that match pattern, but for loops around others."""
        loops = [loop for loop in self._loops() if _matches(pattern, self._texts(loop))]
        return [
            self._texts((first, last))
            for first, last in loops
            if not any((first, last) != (a, b) and first <= a and b <= last for a, b in loops)
        ]

    def _loops(self) -> list[tuple[int, int]]:
        """Return the first and the last address of each loop."""
        loops = []
        for address, text in self.instructions:
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                loops.append((int(target[1], 16), address))
        return loops

    def _texts(self, loop: tuple[int, int]) -> list[str]:
        return [text for address, text in self.instructions if loop[0] <= address <= loop[1]]

    @property
    def spills(self) -> int:
        """Instructions that move registers to and from local memory."""
        return self.count(r"\b(STL|LDL)\b")


_WAITING: dict[str, list[MachineCode]] = defaultdict(list)
"""What isn't disassembled yet, by its encoding."""


_COMPILED: dict[str, MachineCode] = {}
_PTX: dict[str, tuple[str, int]] = {}
"""The PTX of a kernel for cards of 8.x, and its bytes of shared memory."""


def _code_of(cubin: bytes) -> Iterator[bytes]:
    """Yield the sections of an ELF file that are instructions."""
    [table] = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, num_entries = struct.unpack_from("<HH", cubin, 0x3A)
    for i in range(num_entries):
        _, kind, flags, _, begin, size = struct.unpack_from(
            "<IIQQQQ", cubin, table + i * entry_bytes
        )
        if kind == 1 and flags & 4:  # bits of the program, executed
            yield cubin[begin : begin + size]


def _disassemble(encoding: str) -> None:
    """Give all code of an encoding that waits its instructions, as if it lay in one piece.

    The disassembler takes 0.3 s to begin, and less than 0.1 s a kernel.
    """
    waiting = _WAITING.pop(encoding)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.writelines(code._code for code in waiting)
        file.flush()
        listing = subprocess.run(
            [NVDISASM, "--binary", encoding, file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+);", listing, re.MULTILINE)
    instructions = [(int(line[1], 16), line[2].strip()) for line in found]
    begin = 0
    for code in waiting:
        end = begin + len(code._code) // _INSTRUCTION_BYTES
        code._instructions = instructions[begin:end]
        begin = end
    assert begin == len(instructions)


def _matches(pattern: str, texts: list[str]) -> int:
    return sum(bool(re.search(pattern, text)) for text in texts)


def compile_for(
    capability: int,
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int = 1,
    max_registers: int | None = None,
    unaligned: frozenset[str] = frozenset(),
) -> MachineCode:
    """Return kernel's machine code for a compute capability such as 90.

    arguments      "int8" and so on for pointers, "i32" or "fp32" for scalars, by name
    max_registers  of a thread; None leaves it to the assembler
    unaligned      arguments that are not multiples of 16, or of 16 bytes
    """
    source = source_of(kernel, arguments, constants, unaligned)
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "maxnreg": max_registers,
        "enable_fp_fusion": False,
    }
    key = f"{capability} {options} {source.hash()}"
    if key not in _COMPILED:
        cubin, shared_bytes = _cubin_of(capability, source, options)
        _COMPILED[key] = MachineCode(cubin, capability, shared_bytes)
    return _COMPILED[key]


def _cubin_of(capability: int, source: ASTSource, options: dict[str, Any]) -> tuple[bytes, int]:
    """Return the cubin and its bytes of shared memory.

    Cards of 8.x have one PTX, as test_ptx.py shows: from the second on only the assembler runs.
    """
    target = GPUTarget("cuda", capability, 32)
    key = f"{capability // 10} {options} {source.hash()}"
    if key in _PTX:
        ptx, shared_bytes = _PTX[key]
        ptx = re.sub(r"\.target sm_\d+", f".target sm_{capability}", ptx)
        backend = make_backend(target)
        cubin = backend.make_cubin(ptx, {}, backend.parse_options(options), capability)
        return cubin, shared_bytes
    compiled = triton.compile(source, target=target, options=options)
    shared_bytes = compiled.metadata.shared
    if capability // 10 == 8:
        _PTX[key] = compiled.asm["ptx"], shared_bytes
    return compiled.asm["cubin"], shared_bytes


def source_of(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    unaligned: frozenset[str],
) -> ASTSource:
    """Return what Triton compiles of a kernel; see compile_for."""
    signature = {
        name: "constexpr" if name in constants else _POINTERS.get(arguments[name], arguments[name])
        for name in kernel.arg_names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants and name not in unaligned and signature[name] != "fp32"
    }
    return ASTSource(kernel, signature, dict(constants), attributes)
