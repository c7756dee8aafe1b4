"""The CUDA C++ extension without a GPU: it builds without warnings or spills, loads, refuses clearly, and its kernels
compute the right numbers on an emulated device (cuda_emulator.h).

Where there is a GPU and the extension is built, the tests of its three ops also run it.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import (
    backends,
    cuda,
    dispatch,
    logits_logp_entropy,
    policy,
    policy_loss,
    sample_logp_entropy,
    sampler,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402

# float32 sums of up to 40000 terms, merged in a tree.
TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def extension():
    nvcc, reason = build.find_nvcc()
    if nvcc is None:
        pytest.skip(reason)
    path = build.build()  # kept as long as its sources do not change
    cuda.load.cache_clear()
    return path


@pytest.mark.slow
def test_builds_and_loads_without_a_gpu(extension):
    assert cuda.load() is None
    state = backends()["cuda"]
    assert state.available == torch.cuda.is_available()
    if not state.available:
        assert "built and loads" in state.reason
    assert {"80", "90a"} <= set(cuda.architectures())
    schemas = {name: str(getattr(torch.ops.autotool_kernels_cuda, name).default._schema) for name in (
        "logits_forward", "logits_backward", "sample", "policy_loss",
    )}  # fmt: skip
    assert all(s.endswith("-> ()") for s in schemas.values())
    assert "Tensor(a!) out" in schemas["logits_backward"]
    assert "Tensor(d!) grad_logp, Tensor(e!) grad_entropy" in schemas["policy_loss"]
    assert cuda.SAMPLE_WORKSPACE * 4 == 8 * 20  # kMaxParts partials of five words


@pytest.mark.slow
def test_kernels_neither_spill_nor_exceed_a_block(extension):
    """Read from the library: registers per thread, stack and local memory of every kernel and architecture."""
    knobs = pytest.importorskip("triton").knobs.nvidia
    tool = Path(knobs.cuobjdump.path)
    env = {**os.environ, "PATH": f"{Path(knobs.nvdisasm.path).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    text = subprocess.run(
        [tool, "--dump-resource-usage", extension], capture_output=True, text=True, env=env, check=True
    ).stdout
    kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    wanted = ("stream_forward", "ring_forward", "backward", "sample", "sample_merge", "policy_loss")
    for name in wanted:
        assert sum(name in found[0] for found in kernels) >= len(cuda.architectures()), name
    threads = {"policy_loss": 768, "backward": 256, "sample_merge": 128}
    for name, registers, stack, _, local in kernels:
        assert int(stack) == int(local) == 0, f"{name} spills"
        block = next((n for part, n in threads.items() if part in name), 512)
        assert int(registers) * block <= 65536, name


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cpu_tensors_are_refused(extension):
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cannot serve logits_logp_entropy: .*no CUDA device"):
        logits_logp_entropy(x, y, backend="cuda")
    with pytest.raises(ValueError, match=r"cannot serve sample_logp_entropy: .*no CUDA device"):
        sample_logp_entropy(x, seed=y, offset=y, backend="cuda")
    with pytest.raises(NotImplementedError, match="CPU"):
        cuda.logits_forward(x, y, 1.0, None, -100)


def test_a_device_it_was_not_built_for_is_named(monkeypatch):
    assert cuda.serves((8, 6), ("80", "90a"))
    assert cuda.serves((9, 0), ("80", "90a"))
    assert not cuda.serves((10, 0), ("80", "90a"))
    assert not cuda.serves((7, 5), ("80", "90a"))
    monkeypatch.setattr(cuda, "load", lambda: None)
    monkeypatch.setattr(cuda, "architectures", lambda: ("80", "90a"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, available in (((9, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        state = dispatch._cuda()
        assert state.available == available
        assert "sm_80, sm_90a" in state.reason


def test_missing_compiler_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--force"]
    env = {**os.environ, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "nvcc was not found" in done.stderr


def test_a_changed_source_makes_another_library(monkeypatch, tmp_path):
    before = cuda.library_path()
    for source in cuda._SOURCES.iterdir():
        if source.is_file():
            (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(cuda, "_SOURCES", tmp_path)
    assert cuda.library_path() == before
    with (tmp_path / "common.cuh").open("a") as f:
        f.write("// changed\n")
    assert cuda.library_path() != before


@pytest.fixture(scope="session")
def emulated(request):
    """The kernels as a CPU library, kept by the hash of its sources."""
    nvcc, reason = build.find_nvcc()
    if nvcc is None:
        pytest.skip(reason)
    sources = sorted((*(ROOT / "csrc").glob("*.cuh"), *(ROOT / "tests").glob("cuda_emulat*")))
    digest = hashlib.sha256(b"\0".join(f.read_bytes() for f in sources)).hexdigest()[:16]
    path = request.config.cache.mkdir("cuda_emulated") / f"{digest}.so"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        flags = ["-x", "c++", "-std=c++17", "-O1", "-Xcompiler", "-fPIC,-Wall,-Wno-unknown-pragmas", "--shared"]
        folders = ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests")]
        subprocess.run(
            [nvcc, *flags, "-Werror", "all-warnings", *folders, "-o", part, ROOT / "tests" / "cuda_emulated.cpp"],
            check=True,
        )
        part.replace(path)
    return Emulated(ctypes.CDLL(str(path)))


class Emulated:
    """Calls functions of the library; a misaligned access, or a group in which nobody can go on, is an error."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.emulate_failure.restype = ctypes.c_char_p
        library.emulate_policy_workspace.restype = ctypes.c_int64

    def __getattr__(self, name: str):
        function = getattr(self.library, name)

        def call(*args):
            result = function(*args)
            failure = self.library.emulate_failure()
            assert failure is None, failure.decode()
            return result

        return call


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(x) for x in values]


def logits_problem(n, v, dtype=torch.float32, offset=0.0):
    g = torch.Generator().manual_seed(v)
    logits = ((torch.randn(n, v, generator=g) * 64).round() / 32 + offset).to(dtype)
    target = torch.randint(0, v, (n,), generator=g)
    return logits, target


def aligned(logits: torch.Tensor, wide: bool) -> torch.Tensor:
    """A view of the logits among NaN: rows 16 bytes apart from a multiple of 16, or one element beyond."""
    n, v = logits.shape
    padded = torch.full((n, -(-v // 8) * 8 + 8), float("nan"), dtype=logits.dtype)
    assert padded.data_ptr() % 16 == 0
    start = 0 if wide else 1
    padded[:, start : start + v] = logits
    return padded[:, start : start + v]


def emulate_forward(lib, logits, target, temperature=1.0, row_temperature=None, wide=True, cluster=0, clusters=1):
    out = torch.full((4, logits.shape[0]), float("nan"))
    lib.emulate_logits_forward(
        logits.element_size(), pointer(logits), *integers(*logits.shape, *logits.stride()), pointer(target),
        ctypes.c_int64(-100), ctypes.c_float(temperature), pointer(row_temperature), pointer(out),
        wide, cluster, clusters,
    )  # fmt: skip
    return out


def emulate_backward(lib, logits, target, stats, g, h, temperature=1.0, row_temperature=None, wide=True, out=None):
    if out is None:
        out = aligned(torch.full(logits.shape, float("nan"), dtype=logits.dtype), wide)
    lib.emulate_logits_backward(
        logits.element_size(), pointer(g), pointer(h), pointer(logits), *integers(*logits.shape, *logits.stride()),
        pointer(target), ctypes.c_int64(-100), ctypes.c_float(temperature), pointer(row_temperature),
        pointer(stats), pointer(out), ctypes.c_int64(out.stride(0)), wide,
    )  # fmt: skip
    return out


# Chunks of 16 KiB: 9004 float32 columns take two and a bit, 40000 in two blocks five each, so that seven rows go
# round the ring of 13 slots.
RINGS = [(7, 40000, 2, 1), (5, 9004, 1, 2), (3, 3000, 2, 1), (2, 4, 1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "v", "cluster", "clusters"), RINGS)
@pytest.mark.parametrize("offset", [0.0, -200.0, 1e4])
def test_ring_matches_dense_float64(emulated, n, v, cluster, clusters, offset):
    logits, target = logits_problem(n, v, offset=offset)
    target[1:2] = -100
    logits[1:2] = float("nan")
    if v > 5000:
        logits[-1, : v // 2] = float("-inf")  # all of the first block's columns
        target[-1] = v - 1
    found = emulate_forward(emulated, aligned(logits, True), target, 0.5, cluster=cluster, clusters=clusters)
    logp, entropy = oracle.logp_entropy(logits.double().nan_to_num(0.0, neginf=-1e6), target, 0.5)
    assert (found[0] - logp).abs().max() <= TOLERANCE * max(1, logp.abs().max().item())
    assert (found[1] - entropy).abs().max() <= TOLERANCE
    assert found[:, 1:2].count_nonzero() == 0
    if v > 5000:
        assert torch.equal(found[2, 2:], logits[2:].amax(1))


@pytest.mark.slow
def test_ring_does_not_depend_on_the_batch(emulated):
    logits, target = logits_problem(4, 9000, torch.bfloat16)
    whole = emulate_forward(emulated, aligned(logits, True), target, cluster=2, clusters=2)
    for n in (0, 3):
        alone = emulate_forward(emulated, aligned(logits[n : n + 1], True), target[n : n + 1], cluster=2)
        assert torch.equal(whole[:, n : n + 1], alone)


def as_launched(lib, logits, target):
    """The statistics by the kernel that the launcher takes where there are clusters, and whether that is the ring."""
    x = pointer(logits), *integers(logits.shape[1], *logits.stride())
    ring = bool(lib.emulate_fits_ring(logits.element_size(), *x))
    wide = logits.stride(1) == 1 and logits.data_ptr() % 16 == 0 and logits.stride(0) * logits.element_size() % 16 == 0
    return emulate_forward(lib, logits, target, wide=wide, cluster=int(ring)), ring


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("odd", "padding"), [(0, 0), (0, 1), (0, 8), (5, 0), (5, 3), (5, 4)])
def test_a_row_alone_takes_the_kernel_it_takes_in_a_batch(emulated, dtype, odd, padding):
    """Lengths around the ring's least one; rows one after the other, or apart by a whole vector or less."""
    v = (1 << 16) // dtype.itemsize + odd
    base, target = logits_problem(3, v + padding, dtype)
    batch, target = base[:, :v], target % v
    whole, ring = as_launched(emulated, batch, target)
    assert ring == (odd == 0 and padding in (0, 8))
    for n in range(3):
        row = batch[n : n + 1]  # begins on 16 bytes by chance where the others do not
        copies = [row.clone()] if odd or not padding else []
        for one in (row, *copies):
            found, same = as_launched(emulated, one, target[n : n + 1])
            assert same == ring
            assert torch.equal(found, whole[:, n : n + 1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "v"), [(3, 20003), (4, 700), (2, 1)])
def test_streamed_rows_and_their_gradients(emulated, dtype, n, v):
    """Wide and narrow loads give the same bits; both directions match float64; in place too."""
    logits, target = logits_problem(n, v, dtype)
    temperature = torch.linspace(0.7, 1.5, n)
    target[-1] = -100
    if v > 5:
        logits[0, 3:5] = float("-inf")
        target[0] = 2
    g, h = torch.randn((2, n), generator=torch.Generator().manual_seed(1))
    leaf = logits.double().requires_grad_()
    wanted = oracle.logp_entropy(leaf.masked_fill(leaf == float("-inf"), -1e6), target, temperature.double())
    (dz,) = oracle.gradients(wanted, (leaf,), (g, h))
    found = []
    for wide in (True, False):
        view = aligned(logits, wide)
        stats = emulate_forward(emulated, view, target, 1.0, temperature, wide)
        for a, w in zip(stats, wanted, strict=False):
            assert (a - w).abs().max() <= TOLERANCE * max(1, w.abs().max().item())
        new = emulate_backward(emulated, view, target, stats, g, h, 1.0, temperature, wide)
        # float32 rounding, or one bfloat16 rounding of at most 2^-8 relative.
        assert oracle.relative_error(new, dz) <= (4e-3 if dtype == torch.bfloat16 else 2e-6)
        assert new[-1].count_nonzero() == 0
        padding = view._base.clone()
        emulate_backward(emulated, view, target, stats, g, h, 1.0, temperature, wide, out=view)
        assert torch.equal(view, new)
        start = 0 if wide else 1
        padding[:, start : start + v] = new
        assert torch.equal(view._base.isnan(), padding.isnan())  # nothing beside the rows was written
        found.append((stats, new))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("v", "parts"), [(1, 1), (300, 1), (4097, 2), (40003, 8)])
def test_sampler_draws_the_tokens_of_the_reference(emulated, dtype, v, parts):
    logits, _ = logits_problem(5, v, dtype)
    temperature = torch.tensor([1.0, 0.3, 2.0, 0.0, 1.0])
    if v > 4096:
        logits[3, 7] = logits[3, v - 2] = 60.0  # equal in two blocks: the first wins
        logits[4, : v - 40] = float("-inf")
    if v > 1:
        logits[2, 1] = float("-inf")
    seed, offset = torch.arange(5) - 2**40, torch.arange(5) * 2**33 + 5
    wanted = sampler.sample_forward(logits, 1.0, temperature, seed, offset)
    results = []
    for cluster, wide in ((True, True), (False, False)):
        view = aligned(logits, wide)
        token, out = torch.full((5,), -1), torch.full((2, 5), float("nan"))
        assert parts == emulated.emulate_sample(
            view.element_size(), pointer(view), *integers(*view.shape, *view.stride()), ctypes.c_float(1.0),
            pointer(temperature), pointer(seed), pointer(offset), pointer(token), pointer(out), wide, cluster,
        )  # fmt: skip
        assert torch.equal(token, wanted[0])
        assert (out - torch.stack(wanted[1:])).abs().max() <= 5e-6
        results.append(out)
    assert torch.equal(*results)


def emulate_policy(lib, args, gate, on_device, normalize, constant, cluster):
    logp, old_logp, entropy, advantages, cu_seqlens, mask, is_short = args
    t, b, gate = len(logp), len(advantages), torch.tensor(gate)
    out = [torch.full((n,), float("nan")) for n in (1, b, len(policy.METRICS), t, t)]
    workspace = torch.full((4 * b + cuda.POLICY_WORKSPACE,), float("nan"), dtype=torch.float64)
    assert lib.emulate_policy_workspace(ctypes.c_int64(b)) <= len(workspace)
    lib.emulate_policy(
        *map(pointer, (logp, old_logp, entropy, advantages, cu_seqlens)), cu_seqlens.element_size(), pointer(mask),
        pointer(is_short), is_short.element_size(), t, b, pointer(gate), on_device,
        ctypes.c_float(0.2), ctypes.c_float(0.3), normalize, ctypes.c_double(constant), *map(pointer, out),
        pointer(workspace), cluster,
    )  # fmt: skip
    return out


def policy_batch(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64).cumsum(0)))
    t, b = int(cu_seqlens[-1]), len(lengths)
    logp = -torch.rand(t, generator=g) * 2
    old_logp = logp + torch.randn(t, generator=g) * 0.3
    entropy = torch.rand(t, generator=g) * 0.4
    mask = torch.rand(t, generator=g) > 0.2
    advantages = torch.randn(b, generator=g)
    is_short = torch.randint(-1, 2, (b,), generator=g, dtype=torch.int8)
    if b > 6:
        advantages[5] = 0.0
        old_logp[cu_seqlens[5] : cu_seqlens[6]] = -1e4  # a ratio of inf at advantage 0
        mask[cu_seqlens[2] : cu_seqlens[3]] = False
    return logp, old_logp, entropy, advantages, cu_seqlens, mask, is_short


MIXED = [5, 0, 40, 700, 0, 3, 17, 9]
# One token, none; a mix with empty ones; one sequence over several of the 192 ranges of tokens; all of one token. Ways
# to normalise: tokens, sequences, a constant.
BATCHES = [([1], 1), ([], 0), (MIXED, 0), (MIXED, 1), (MIXED, 2), ([7000], 0), ([1] * 34, 1), ([0, 0], 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "normalize"), BATCHES)
def test_policy_loss_in_one_launch(emulated, lengths, normalize):
    args = policy_batch(lengths, seed=len(lengths))
    gate = [0.21, 0.19, 0.03, 0.05]
    wanted = policy.policy_forward(*args, gate, None, 0.2, 0.3, normalize, 7.0)
    results = []
    for cluster, on_device, cu_dtype in ((True, True, torch.int64), (False, False, torch.int32)):
        given = (*args[:4], args[4].to(cu_dtype), *args[5:])
        found = emulate_policy(emulated, given, gate, on_device, normalize, 7.0, cluster)
        for a, w in zip(found, wanted, strict=True):
            finite = w.isfinite()
            assert torch.equal(a.isfinite(), finite.reshape(a.shape))
            # float32 ratios and weights, float64 sums rounded once.
            error = (a - w.reshape(a.shape))[finite.reshape(a.shape)].abs()
            assert error.numel() == 0 or error.max() <= 2e-6 * max(1, w[finite].abs().max().item())
        results.append(found)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [[3, 9, 20], [0, 4, 9], [0, 50, 12], [-5, 6, 10**12]])
def test_policy_loss_stays_inside_its_tensors_whatever_the_bounds(emulated, bounds):
    """Only a CPU can refuse such bounds. Tokens of no sequence get zero gradients; the rest is not specified."""
    args = list(policy_batch([20, 0]))
    args[4] = torch.tensor(bounds)
    *_, grad_logp, grad_entropy = emulate_policy(emulated, args, [0.2, 0.2, 0.1, 0.1], False, 0, 1.0, True)
    assert grad_logp.isfinite().all()
    assert grad_entropy.isfinite().all()
    known = torch.zeros(20, dtype=torch.bool)
    for start, stop in itertools.pairwise(bounds):
        known[max(start, 0) : max(stop, 0)] = True
    assert grad_logp[~known].count_nonzero() == grad_entropy[~known].count_nonzero() == 0


# Real sizes, on a device: what neither the interpreter nor the emulator reaches.
DEVICE_BACKENDS = ("triton", *(name for name in oracle.LOGITS_BACKENDS if name == "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", DEVICE_BACKENDS)
@pytest.mark.parametrize(
    ("v", "dtype"),
    [(152064, torch.bfloat16), (151936, torch.float32), (151669, torch.float16), (600064, torch.bfloat16)],
)
def test_long_rows_on_a_device(backend, v, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    logits = (torch.randn(300, v, device="cuda", generator=g) * 3).to(dtype)
    target = torch.randint(0, v, (300,), device="cuda", generator=g)
    target[7] = -100
    logits[7] = float("nan")
    logits.requires_grad_()
    out = logits_logp_entropy(logits, target, temperature=0.8, backend=backend)
    upstream = torch.randn((2, 300), device="cuda", generator=g)
    (dz,) = oracle.gradients(out, (logits,), upstream)
    rows = torch.tensor([0, 6, 7, 8, 299], device="cuda")
    leaf = logits.detach()[rows].double().nan_to_num(0.0).requires_grad_()
    wanted = oracle.logp_entropy(leaf, target[rows], 0.8)
    for a, w in zip(out, wanted, strict=True):
        assert (a[rows] - w).abs().max() <= 2e-5
    (expected,) = oracle.gradients(wanted, (leaf,), upstream[:, rows])
    # One rounding to the logits' type: 2^-9 for bfloat16.
    assert oracle.relative_error(dz[rows], expected) <= {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}.get(dtype, 1e-5)
    for _ in range(20):
        again = logits_logp_entropy(logits.detach(), target, temperature=0.8, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    for part in (rows, rows[:1], rows[3:4]):  # one row: its stride no longer says how rows lie
        alone = logits_logp_entropy(logits.detach()[part], target[part], temperature=0.8, backend=backend)
        assert all(torch.equal(a[part], b) for a, b in zip(out, alone, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", DEVICE_BACKENDS)
def test_offsets_beyond_31_bits_on_a_device(backend):
    n, v = 14200, 152064
    logits = torch.zeros((n, v), dtype=torch.bfloat16, device="cuda")
    target = torch.full((n,), -100, device="cuda")
    logits[-1, 5:] = -20.0
    target[-1] = 3
    logits.requires_grad_()
    out = logits_logp_entropy(logits, target, backend=backend)
    (dz,) = torch.autograd.grad(out.logp.sum(), logits)
    assert abs(out.logp[-1].item() + torch.tensor(5.0 + (v - 5) * 2.718281828459045**-20).log().item()) <= 1e-5
    assert abs(dz[-1, 3].item() - 0.8) <= 4e-3
    assert dz[:-1].count_nonzero() == 0
    zeros = torch.zeros(n, dtype=torch.int64, device="cuda")
    sampled = sample_logp_entropy(logits.detach(), temperature=0, seed=zeros, offset=zeros, backend=backend)
    assert sampled.token.count_nonzero() == 0
    assert torch.equal(sampled.logp[-1], out.logp[-1]) or abs(sampled.logp[-1] - out.logp[-1]) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("backend", DEVICE_BACKENDS)
@pytest.mark.parametrize("rows", [1, 32, 256])
def test_sampled_tokens_on_a_device(backend, rows):
    """The tokens of the PyTorch backend, save where two candidates tie to rounding."""
    g = torch.Generator("cuda").manual_seed(rows)
    logits = (torch.randn(rows, 152064, device="cuda", generator=g) * 3).bfloat16()
    seed = torch.arange(rows, device="cuda") + 5
    arguments = {"temperature": 0.7, "seed": seed, "offset": seed * 2**33}
    out = sample_logp_entropy(logits, **arguments, backend=backend)
    wanted = sample_logp_entropy(logits, **arguments, backend="torch")
    assert (out.token != wanted.token).sum() <= 1
    same = out.token == wanted.token
    assert (out.logp - wanted.logp)[same].abs().max() <= 2e-5
    assert (out.entropy - wanted.entropy).abs().max() <= 2e-5
    alone = sample_logp_entropy(
        logits[-1:], temperature=0.7, seed=seed[-1:], offset=arguments["offset"][-1:], backend=backend
    )
    assert all(torch.equal(a[-1:], b) for a, b in zip(out, alone, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", DEVICE_BACKENDS)
def test_ops_replay_in_a_graph(backend):
    args = [t.cuda() for t in policy_batch([128] * 512)]
    logits, target = (t.cuda() for t in logits_problem(40, 152064, torch.bfloat16))
    seed = torch.arange(40, device="cuda")

    def everything():
        return (
            *policy_loss(*args, backend=backend)[:2],
            *logits_logp_entropy(logits, target, backend=backend),
            *sample_logp_entropy(logits, seed=seed, offset=seed, backend=backend),
        )

    everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for change in range(3):
        logits.mul_(0.9)
        args[0].sub_(0.01 * change)
        seed.add_(1)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, everything(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", DEVICE_BACKENDS)
@pytest.mark.parametrize("lengths", [[128] * 512, [100000], [1] * 50000], ids=["usual", "long", "ones"])
def test_policy_loss_at_size_on_a_device(backend, lengths):
    args = [t.cuda() for t in policy_batch(lengths)]
    gate = [0.21, 0.19, 0.03, 0.05]
    run = dispatch.implementation("policy_loss", "cuda", torch.float32, backend)
    wanted = policy.policy_forward(*args, gate, None, 0.2, 0.3, 0, 1.0)
    first = run(*args, gate, None, 0.2, 0.3, 0, 1.0)
    for a, w in zip(first, wanted, strict=True):
        finite = w.isfinite()
        assert (a - w)[finite].abs().max() <= 3e-6 * max(1, w[finite].abs().max().item())
    for _ in range(20):
        again = run(*args, gate, None, 0.2, 0.3, 0, 1.0)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, again, strict=True))
