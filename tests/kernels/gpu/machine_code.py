"""Compile a Triton kernel for a GPU that isn't here, and read what the machine would run."""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["SHARED_MEMORY_BYTES", "MachineCode", "compile_for", "source_of"]

# Triton 3.6.0's own doesn't know sm_103; a later version's does.
NVDISASM = os.environ.get("BITWATT_TEST_NVDISASM") or (
    Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
)

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

_POINTERS = {"int8": "*i8", "uint8": "*u8", "int32": "*i32", "int64": "*i64", "float32": "*fp32"}
_POINTERS |= {"bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64"}


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel: its instructions in order, as (address, text)."""

    instructions: list[tuple[int, str]]
    shared_bytes: int

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


@cache
def _disassemble(cubin: bytes) -> list[tuple[int, str]]:
    """Return a kernel's instructions; branches name an address.

    cuobjdump takes half as long again, for an analysis of the flow of data that nothing here reads.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [NVDISASM, "--print-code", "--no-dataflow", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    addresses: dict[str, str] = {}  # by label
    instructions = []
    labels: list[str] = []  # of the next instruction
    for label, address, text in re.findall(
        r"^(?:(\.L_\w+):|\s+/\*([0-9a-f]{4,5})\*/\s+([^;]+);)", listing, re.MULTILINE
    ):
        if label:
            labels.append(label)
        else:
            addresses |= dict.fromkeys(labels, f"0x{address.lstrip('0')}")
            labels.clear()
            instructions.append((int(address, 16), text.strip()))
    return [
        (address, re.sub(r"`\((\.L_\w+)\)", lambda found: addresses[found[1]], text))
        for address, text in instructions
    ]


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
    compiled = triton.compile(
        source_of(kernel, arguments, constants, unaligned),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "maxnreg": max_registers,
            "enable_fp_fusion": False,
        },
    )
    return MachineCode(_disassemble(compiled.asm["cubin"]), compiled.metadata.shared)


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
