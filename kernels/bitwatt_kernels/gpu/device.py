"""The GPU that kernels are launched on: what it can do, and the scratch they share."""

import os
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl

from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.gpu.configs import TunedConfigs, load
from bitwatt_kernels.gpu.interpreter import INTERPRETED

__all__ = ["MAX_SPLIT_TILES", "Gpu"]

MIN_CAPABILITY = (8, 0)  # int8 and bfloat16 tensor cores, and copies that bypass registers
PDL_CAPABILITY = (9, 0)
AMD_ARCHITECTURES = ("gfx942",)  # MI300: those that the machine code has been checked for
_AMD_STAGES = 2  # with more of a tile in flight its 64 KiB of shared memory don't hold it
MAX_SPLIT_TILES = 16384
_LARGEST_TILE = (
    128 * 128
)  # of a linear whose sum is split, which has a tile a multiprocessor at most


@triton.jit
def _zero_kernel(counters_ptr):
    tl.store(counters_ptr, 0)


class Gpu:
    """One device with its launch configurations. Use it from one CUDA stream at a time.

    Between launches all of these are zero: the last program to need them sets them back.

    counters  [MAX_SPLIT_TILES] int32, programs of a split tile that have arrived
    sums      int32, what they have summed
    queue     [2] int32, see row_queue
    """

    def __init__(self, device: torch.device, configs: TunedConfigs | None = None) -> None:
        """Makes the device torch's current one, on which Triton launches.

        Raises  BackendError if Triton's kernels can't run on device
        """
        if INTERPRETED:
            if device.type != "cpu":
                raise BackendError(f"Triton's interpreter runs on cpu, not on {device}")
            self.name, self.num_multiprocessors, self.capability = "interpreter", 4, MIN_CAPABILITY
        else:
            if device.type != "cuda":
                raise BackendError(
                    f"Triton kernels need a GPU, not {device} "
                    "(TRITON_INTERPRET=1 runs them slowly on cpu, to check them)"
                )
            if not torch.cuda.is_available():
                raise BackendError("torch sees no GPU")
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
            properties = torch.cuda.get_device_properties(device)
            self.name = properties.name
            self.num_multiprocessors = properties.multi_processor_count
            self.capability = (properties.major, properties.minor)
            if self.is_amd:
                architecture = properties.gcnArchName.partition(":")[0]
                if architecture not in AMD_ARCHITECTURES:
                    raise BackendError(
                        f"{self.name} is {architecture}; of AMD's GPUs these kernels are for "
                        f"{', '.join(AMD_ARCHITECTURES)}"
                    )
                self.capability = MIN_CAPABILITY  # whose tiles it takes
            elif self.capability < MIN_CAPABILITY:
                raise BackendError(
                    f"{self.name} has compute capability {properties.major}.{properties.minor}; "
                    "these kernels need 8.0 (Ampere) or later"
                )
        self.device = device
        self.configs = load(self.name, self.capability) if configs is None else configs
        self.add_scratch()
        self._launch_something()

    def add_scratch(self) -> None:
        """Allocate what kernels share, once: a captured graph keeps the addresses."""
        num_sums = self.num_multiprocessors * _LARGEST_TILE
        self.counters, self.sums, self.queue = (
            torch.zeros(size, dtype=torch.int32, device=self.device)
            for size in (MAX_SPLIT_TILES, num_sums, 2)
        )

    def _launch_something(self) -> None:
        """Show that a kernel compiles and runs; else raise BackendError, which says what may lack.

        A first kernel takes a C compiler, the driver's library and a folder to write to.
        """
        if not INTERPRETED:
            _choose_cache_folder()
        try:
            _zero_kernel[(1,)](self.counters)
        except Exception as error:  # Triton raises whatever its compilers and its cache raise
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise BackendError(
                f"Triton can't run a kernel on {self.name}: {type(error).__name__}: {reason}. It "
                "needs a C compiler (CC), the driver's library (libcuda.so.1, libamdhip64.so), and "
                "a cache folder it can write and load libraries from (TRITON_CACHE_DIR)"
            ) from error

    @property
    def is_amd(self) -> bool:
        """Whether torch and Triton are those of ROCm."""
        return torch.version.hip is not None

    @property
    def inline_asm(self) -> bool:
        """Whether kernels may have lines of PTX in them."""
        return not (INTERPRETED or self.is_amd)

    def dot_precision(self, dtype: torch.dtype) -> str:
        """Return Triton's input_precision of a product of such values."""
        return "ieee" if dtype == torch.float32 or self.is_amd else "tf32"

    @property
    def pdl(self) -> bool:
        """Whether kernels are launched with programmatic dependent launch."""
        return self.configs.pdl and self.capability >= PDL_CAPABILITY and not INTERPRETED

    def launch_options(
        self, num_warps: int, num_stages: int = 1, max_registers: int | None = None
    ) -> dict[str, object]:
        """Return Triton's launch options. No fused multiply-adds: results round as written.

        max_registers  of a thread, on NVIDIA's GPUs; None leaves it to the assembler
        """
        options: dict[str, object] = {
            "num_warps": num_warps,
            "num_stages": min(num_stages, _AMD_STAGES) if self.is_amd else num_stages,
            "enable_fp_fusion": False,
        }
        if max_registers is not None and not self.is_amd:
            options["maxnreg"] = max_registers
        if self.pdl:
            options["launch_pdl"] = True
        return options


def _choose_cache_folder() -> None:
    """Have Triton keep its kernels in a temporary folder where it can't write to its own."""
    folder = Path(triton.knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        triton.knobs.cache.dir = tempfile.mkdtemp(prefix="bitwatt-triton-")
