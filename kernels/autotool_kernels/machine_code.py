"""Machine code of the Triton kernels without a GPU: what the launchers launch, compiled and measured.

Inside `recording` the ordinary host code runs on tensors of device "meta", and each launch is noted with the
signature, the specialisation and the options that Triton's own launch path derives: there is no second description
of a kernel that could drift. A launcher that would stop the host (`.item()`) fails here too. `figures` compiles a
launch to a cubin and reads it with the disassembler of the Triton wheel; `shortcomings` says what is wrong with it.
How fast a kernel runs is not visible here.

Kernels must not be imported under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .configs import SHARED_BYTES

# Largest shared memory of one block in bytes, by capability (10 * major + minor).
SHARED_LIMIT = {int(name.removeprefix("sm_")): size for name, size in SHARED_BYTES.items()}
# Multiprocessors of a card of that capability (A100, A10, L4, H200, B200, RTX 5090): sizes of persistent grids.
MULTIPROCESSORS = {80: 108, 86: 72, 89: 58, 90: 132, 100: 148, 120: 170}
REGISTERS = 64 << 10  # of a multiprocessor
TENSOR_MEMORY_COLUMNS = 512
# Tensor-core instructions in SASS: warp-level mma, warpgroup wgmma, tcgen05.mma.
MATRIX = {"mma": re.compile(r"[HQI]MMA|OMMA"), "wgmma": re.compile(r"[HQI]GMMA"), "tcgen05": re.compile(r"UTC\w*MMA")}
LOCAL = re.compile(r"STL|LDL")
TMA = re.compile(r"UTMA(LDG|STG|REDG)")
# Shown beside the figures: what feeds the tensor cores and how.
NOTED = re.compile(r"[HQIO]MMA|[HQI]GMMA|UTC\w*MMA|UTMA\w+|LDGSTS|USETMAXREG|STL|LDL|LDG|STG|MUFU|BAR|RED|ATOM\w*|FFMA")
_OWN_SOURCE = Path(__file__).read_text()  # figures read by other rules are other figures
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Launch(NamedTuple):
    """One kernel launch, as Triton specialises it."""

    kernel: JITFunction
    capability: int  # 10 * major + minor
    signature: dict[str, Any]  # argument name -> "*bf16", "i32", "constexpr", "tensordesc<...>"
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        """module.function of the kernel."""
        return kernel_name(self.kernel)

    @property
    def configuration(self) -> str:
        """Block sizes, flags that are set, warps and stages, for a reader."""
        names, parts = list(self.signature), []
        for path, value in self.constants.items():
            name = names[path[0]]
            # Lower-case names are arguments that specialisation made constant (an integer 1), not settings.
            if len(path) == 1 and name.isupper() and value is not False and value is not None:
                parts.append(name if value is True else f"{name}={value}")
        types = self.element_types
        if any(str(kind).startswith("tensordesc") for kind in self.signature.values()):
            types = types | {"tma"}
        return " ".join([*sorted(types), *parts, f"warps={self.options.num_warps} stages={self.options.num_stages}"])

    @property
    def programs(self) -> int:
        """Programs per multiprocessor that a persistent kernel launches, and 1 for any other."""
        constants = {list(self.signature)[path[0]]: value for path, value in self.constants.items()}
        return max(1, constants.get("PROGRAMS", 1) // MULTIPROCESSORS.get(self.capability, MULTIPROCESSORS[90]))

    @property
    def element_types(self) -> set[str]:
        """Floating-point element types behind the pointers and descriptors: "bf16", "fp16", "fp32"."""
        return {t for kind in self.signature.values() for t in re.findall(r"^(?:\*k?|tensordesc<)([bf]\w+)", str(kind))}

    @property
    def key(self) -> str:
        """Hash of all that decides the machine code: source with callees, types, constants, options, Triton."""
        options = {k: str(v) for k, v in vars(self.options).items() if k != "extern_libs"}
        parts = (
            _OWN_SOURCE, triton.__version__, self.kernel.cache_key, self.capability, self.signature,
            [(k, getattr(v, "cache_key", v)) for k, v in self.constants.items()], self.attributes, options,
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Figures:
    """What the machine code of one launch needs and holds."""

    registers: int  # per thread, at launch
    local_bytes: int  # per thread: spills and indexed local arrays
    shared: int  # bytes per block
    threads: int  # per block
    tensor_memory: int  # columns, sm_100
    tensor_cores: bool  # the source multiplies matrices, and its inputs (16-bit) or its precision (tf32) allow them
    descriptors: bool  # the source reads or writes through tensor descriptors
    instructions: dict[str, int] = field(default_factory=dict)

    def count(self, pattern: re.Pattern) -> int:
        """Number of instructions whose opcode begins with `pattern`."""
        return sum(n for opcode, n in self.instructions.items() if pattern.match(opcode))

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return asdict(self)


@contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """Collects the launches made inside the block, as on a card of `capability`, instead of running them.

    Pass tensors of device "meta"; their data pointers are their offsets, so specialisation sees the alignment that
    real allocations (at least 512 bytes) give. Raises ValueError for a capability without known limits.
    """
    if capability not in SHARED_LIMIT:
        raise ValueError(f"capability must be one of {sorted(SHARED_LIMIT)}: got {capability}")
    launches: list[Launch] = []

    def note(kernel, key, signature, device, constants, options, attributes, warmup):
        launches.append(Launch(kernel, capability, dict(signature), dict(constants), dict(attributes), options))

    processors = MULTIPROCESSORS.get(capability, MULTIPROCESSORS[90])
    properties = SimpleNamespace(
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=processors,
        shared_memory_per_block_optin=SHARED_LIMIT[capability],
        name=f"sm_{capability}",
        total_memory=80 << 30,
    )
    target = GPUTarget("cuda", capability, 32)
    device = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,  # Triton keeps one argument binder per device
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(JITFunction, "_do_compile", note),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(capability, 10)),
    ):
        yield launches


def compile_launch(launch: Launch):
    """Triton's compiled kernel of a launch; compiler errors pass through."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", launch.capability, 32)
    return triton.compile(source, target=target, options=dict(vars(launch.options)))


def figures(launch: Launch) -> Figures:
    """Compiles a launch and reads its machine code."""
    compiled = compile_launch(launch)
    ttir, metadata = compiled.asm["ttir"], compiled.metadata
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        registers, stack, _, local = map(int, _RESOURCES.search(_cuobjdump("--dump-resource-usage", cubin)).groups())
        opcodes = Counter(_INSTRUCTION.findall(_cuobjdump("-sass", cubin)))
    if not opcodes:
        raise RuntimeError(f"{launch.name}: the disassembler printed no instructions")
    return Figures(
        registers=registers,
        local_bytes=max(stack, local),
        shared=metadata.shared,
        threads=metadata.num_warps * 32,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        tensor_cores="tt.dot" in ttir and ("inputPrecision = tf32" in ttir or bool(launch.element_types - {"fp32"})),
        descriptors="tt.descriptor_" in ttir,
        instructions={k: n for k, n in sorted(opcodes.items()) if NOTED.match(k)},
    )


def shortcomings(figures: Figures, capability: int, programs: int = 1) -> list[str]:
    """What must not ship, in words with numbers; empty if nothing. `programs` must fit on a multiprocessor."""
    wrong = []
    accesses = figures.count(LOCAL)
    if figures.local_bytes or accesses:
        wrong.append(f"spills: {figures.local_bytes} bytes per thread in local memory, {accesses} STL/LDL")
    if figures.shared > SHARED_LIMIT[capability]:
        wrong.append(f"shared memory: {figures.shared} bytes of {SHARED_LIMIT[capability]}")
    elif (together := resident(figures, capability)) < programs:
        needs = f"{figures.threads} threads of {figures.registers} registers and {figures.shared} bytes"
        wrong.append(f"registers and shared memory: {together} of {programs} programs with {needs} fit")
    if figures.tensor_memory > TENSOR_MEMORY_COLUMNS:
        wrong.append(f"tensor memory: {figures.tensor_memory} columns of {TENSOR_MEMORY_COLUMNS}")
    if figures.tensor_cores:
        kind = matrix_kind(capability)
        if not figures.count(MATRIX[kind]):
            found = [k for k, pattern in MATRIX.items() if figures.count(pattern)]
            wrong.append(f"matrix products: no {kind} instruction, but {', '.join(found) or 'none of any kind'}")
    if figures.descriptors and capability >= 90 and not figures.count(TMA):
        wrong.append("tensor descriptors: no TMA instruction")
    return wrong


def resident(figures: Figures, capability: int) -> int:
    """Blocks that a multiprocessor holds at once, by registers (given to warps in units of 256) and shared memory."""
    registers = -(-figures.registers * 32 // 256) * 256 * (figures.threads // 32)
    # A multiprocessor has 1 KiB more than one block may have, and keeps 1 KiB of it for each.
    shared = (SHARED_LIMIT[capability] + 1024) // (figures.shared + 1024)
    return min(REGISTERS // registers, shared, 2048 // figures.threads)


def matrix_kind(capability: int) -> str:
    """The tensor-core instruction a product must use: "mma", "wgmma" or "tcgen05"."""
    return {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma")


def kernel_name(kernel: JITFunction) -> str:
    """module.function of a kernel, the module without its package."""
    return f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.knobs.nvidia.cuobjdump.path)
    folders = f"{Path(triton.knobs.nvidia.nvdisasm.path).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run([tool, flag, cubin], capture_output=True, text=True, env={**os.environ, "PATH": folders})
    if done.returncode:
        raise RuntimeError(f"cuobjdump {flag}: {done.stderr.strip()}")
    return done.stdout
