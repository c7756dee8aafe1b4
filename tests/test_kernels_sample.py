"""sample_logp_entropy: random bits, distribution, independence of the batch, and the reported numbers."""

from __future__ import annotations

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import philox, race, sample_logp_entropy, sampler
from kernels_oracle import DEVICE, LOGITS_BACKENDS, QUIET

pytestmark = pytest.mark.filterwarnings(QUIET)


def rows(n, v, seed=0):
    logits = torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * 2
    return logits.to(DEVICE), torch.arange(n, device=DEVICE) + 11, torch.arange(n, device=DEVICE) * 3


def philox_block(counter, key):
    """Four words of one block, in Python's integers."""
    (x0, x1, x2, x3), (k0, k1), mask = counter, key, 2**32 - 1
    for _ in range(philox.ROUNDS):
        p0, p1 = x0 * philox.MULTIPLIERS[0], x2 * philox.MULTIPLIERS[1]
        x0, x1, x2, x3 = p1 >> 32 ^ x1 ^ k0, p1 & mask, p0 >> 32 ^ x3 ^ k1, p0 & mask
        k0, k1 = (k0 + philox.WEYL[0]) & mask, (k1 + philox.WEYL[1]) & mask
    return [x0, x1, x2, x3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers published with the Random123 library for philox4x32, 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert philox_block(counter, key) == words


@pytest.mark.parametrize("tile", [1, 3, 1 << 14])
def test_bits_are_philox_of_block_offset_and_seed(monkeypatch, tile):
    monkeypatch.setattr(philox, "TILE_BLOCKS", tile)
    pairs = [(0, 0), (-(2**40), 2**33 + 5), (2**62 + 1, -1), (2**63 - 1, -(2**63)), (5, 0xDEADBEEF)]
    seed, offset = torch.tensor(pairs, device=DEVICE).t()
    bits = philox.random_bits(seed, offset, 9)
    assert bits.shape == (5, 12)
    for row, (s, o) in zip(bits.tolist(), pairs, strict=True):
        key, high = (s & philox.MASK, s >> 32 & philox.MASK), (o & philox.MASK, o >> 32 & philox.MASK)
        wanted = [word for block in range(3) for word in philox_block((block, 0, *high), key)]
        assert [word & philox.MASK for word in row] == wanted


def test_uniforms_use_the_whole_seed_and_offset():
    base = philox.uniforms(torch.tensor([5]), torch.tensor([9]), 8)
    for seed, offset in ((6, 9), (5 + 2**32, 9), (-5, 9), (5, 10), (5, 9 + 2**32), (5, -9)):
        other = philox.uniforms(torch.tensor([seed]), torch.tensor([offset]), 8)
        assert (base != other).all()
    assert torch.equal(base[:, :5], philox.uniforms(torch.tensor([5]), torch.tensor([9]), 5))


def test_uniforms_stay_inside_the_unit_interval():
    extremes = torch.tensor([0, 1, 2**32 - 1]).float().add(0.5).mul(2.0**-32).clamp(max=philox.LARGEST_U)
    assert (extremes > 0).all()
    assert (extremes < 1).all()
    u = philox.uniforms(torch.arange(50), torch.zeros(50, dtype=torch.int64), 2000)
    # Mean of 1e5 uniforms: standard error 9e-4, so five of them.
    assert abs(u.mean().item() - 0.5) < 4.6e-3


def test_frequencies_follow_softmax():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, float("-inf"), 0.5]], device=DEVICE)
    n = 20000
    seed, offset = torch.full((n,), 3, device=DEVICE), torch.arange(n, device=DEVICE)
    for temperature in (1.0, 0.5):
        token = sample_logp_entropy(
            logits.expand(n, -1), temperature=temperature, seed=seed, offset=offset, backend="torch"
        ).token
        p = (logits[0].double() / temperature).softmax(0)
        counts = torch.bincount(token, minlength=6)
        assert counts[4] == 0
        live = p > 0
        chi2 = ((counts - n * p)[live] ** 2 / (n * p[live])).sum()
        assert chi2 < 20.5  # 99.9 % point of chi-square with 4 degrees of freedom is 18.5; fixed seeds


def test_backends_draw_the_same_tokens():
    for v in (1, 3, 128, 5000):
        logits, seed, offset = rows(6, v)
        seed[1], offset[2] = -(2**40), 2**33 + 5
        temperature = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 0.7], device=DEVICE)
        first, *others = (
            sample_logp_entropy(logits, temperature=temperature, seed=seed, offset=offset, backend=name)
            for name in LOGITS_BACKENDS
        )
        for other in others:
            assert torch.equal(first.token, other.token)
            assert (first.logp - other.logp).abs().max() <= 3e-6
            assert (first.entropy - other.entropy).abs().max() <= 3e-6


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_a_row_does_not_depend_on_its_batch(backend):
    logits, seed, offset = rows(9, 130)
    whole = sample_logp_entropy(logits, seed=seed, offset=offset, backend=backend)
    order = torch.tensor([8, 0, 3, 3, 5], device=DEVICE)
    shuffled = sample_logp_entropy(logits[order], seed=seed[order], offset=offset[order], backend=backend)
    for a, b in zip(whole, shuffled, strict=True):
        assert torch.equal(a[order], b)
    padded = torch.cat((logits, logits), 1)[4:5, :130]
    alone = sample_logp_entropy(padded, seed=seed[4:5], offset=offset[4:5], backend=backend)
    assert torch.equal(alone.token, whole.token[4:5])


def test_chunks_of_rows_change_nothing(monkeypatch):
    logits, seed, offset = rows(9, 130)
    whole = sample_logp_entropy(logits, seed=seed, offset=offset, backend="torch")
    monkeypatch.setitem(sampler.TILE_ELEMENTS, DEVICE, 300)
    for a, b in zip(whole, sample_logp_entropy(logits, seed=seed, offset=offset, backend="torch"), strict=True):
        assert torch.equal(a, b)


RACED = {  # what a row may hold, and why the search for candidates could go wrong on it
    "flat": lambda x: x * 0.1,
    "equal": lambda x: x * 0.0,
    "peaked": lambda x: x * 6,  # the winner's u is large, where -log(1 - u) is not u
    "far from zero": lambda x: x + 3e6,  # scores are multiples of 1/4: many ties
    "one certain": lambda x: x.index_fill(1, torch.tensor([70]), 80.0),
    "masked": lambda x: x.index_fill(1, torch.arange(0, 200, 2), float("-inf")),
    "no candidate": lambda x: torch.full_like(x, float("-inf")),
    "infinite": lambda x: x.index_fill(1, torch.tensor([90, 100]), float("inf")),
    "not a number": lambda x: x.index_fill(1, torch.tensor([31, 150]), float("nan")),
    "low precision": lambda x: x.bfloat16(),
}


def full_race(logits, t, seed, offset):
    z = logits.float() if t is None else logits.float() / t
    token = (philox.gumbel_(philox.uniforms(seed, offset, z.shape[1])) + z).argmax(1, keepdim=True)
    return token, z.gather(1, token), sampler.reduce_(z.clone(), guard=True)


@pytest.mark.parametrize("kind", RACED)
def test_the_race_of_candidates_is_the_race_of_all(monkeypatch, kind):
    monkeypatch.setattr(race, "TILE_ELEMENTS", 1000)
    n, v = 150, 201
    make = torch.Generator().manual_seed(1)
    logits = RACED[kind](torch.randn(n, v, generator=make))
    seed, offset = torch.arange(n) + 11, torch.arange(n) * 3
    for t in (None, 0.7, torch.linspace(0.3, 2.0, n)[:, None]):
        token, chosen, stats = race.draw(logits, t, seed, offset)
        wanted = full_race(logits, t, seed, offset)
        assert torch.equal(token, wanted[0])
        for a, b in zip((chosen, *stats), (wanted[1], *wanted[2]), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
            assert torch.equal(a.isnan(), b.isnan())


def test_the_least_ratio_alone_does_not_decide():
    """Rows in which another column than that of the least u / e wins: the bound has to let it through."""
    n, v = 4000, 130
    logits = torch.tensor([0.0, -1.0, -1.5, -2.0]).repeat(33)[:v] + torch.arange(v).gt(3) * -30.0
    logits, seed, offset = logits.expand(n, v), torch.arange(n), torch.arange(n) * 5
    wanted = full_race(logits, None, seed, offset)[0]
    least = (philox.uniforms(seed, offset, v) / (logits - logits.amax(1, keepdim=True)).exp()).argmin(1, keepdim=True)
    assert (least != wanted).any()
    assert torch.equal(race.draw(logits, None, seed, offset)[0], wanted)


def test_few_columns_need_a_logarithm(monkeypatch):
    counts = []
    gumbel = philox.gumbel_
    monkeypatch.setattr(philox, "gumbel_", lambda u: counts.append(u.numel()) or gumbel(u))
    n, v = 40, 10000
    logits = torch.randn(n, v, generator=torch.Generator().manual_seed(2))
    sample_logp_entropy(logits, seed=torch.arange(n), offset=torch.arange(n), backend="torch")
    assert n * race.DEPTH <= sum(counts) <= 2 * n * race.DEPTH  # one set a row, seldom more


def test_a_large_vocabulary_with_a_greedy_row():
    logits, seed, offset = rows(3, sampler.RACE_COLUMNS)
    temperature = torch.tensor([1.0, 0.0, 0.5], device=DEVICE)
    out = sample_logp_entropy(logits, temperature=temperature, seed=seed, offset=offset, backend="torch")
    assert out.token[1] == logits[1].argmax()
    alone = sample_logp_entropy(
        logits[2:], temperature=temperature[2:], seed=seed[2:], offset=offset[2:], backend="torch"
    )
    assert all(torch.equal(a[2:], b) for a, b in zip(out, alone, strict=True))


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_reported_numbers_belong_to_the_sampled_token(backend):
    logits, seed, offset = rows(7, 300)
    temperature = torch.linspace(0.5, 2, 7, device=DEVICE)
    out = sample_logp_entropy(logits, temperature=temperature, seed=seed, offset=offset, backend=backend)
    logp, entropy = oracle.logp_entropy(logits.double(), out.token, temperature.double())
    assert (out.logp - logp).abs().max() <= 3e-6
    assert (out.entropy - entropy).abs().max() <= 3e-6


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_temperature_zero_is_greedy_at_temperature_one(backend):
    logits, seed, offset = rows(4, 9)
    logits[1] = 0.0
    logits[2, 3] = logits[2, 7] = 50.0
    for temperature in (0, torch.zeros(4, device=DEVICE)):
        out = sample_logp_entropy(logits, temperature=temperature, seed=seed, offset=offset, backend=backend)
        assert out.token[1:3].tolist() == [0, 3]  # the first of equal logits
        assert torch.equal(out.token, logits.argmax(1))
        logp, _ = oracle.logp_entropy(logits.double(), out.token)
        assert (out.logp - logp).abs().max() <= 3e-6


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_no_rows(backend):
    out = sample_logp_entropy(*rows(0, 9)[:1], seed=rows(0, 9)[1], offset=rows(0, 9)[2], backend=backend)
    assert [t.shape for t in out] == [(0,)] * 3
    assert out.token.dtype == torch.int64


def test_low_precision_logits_and_no_gradient():
    logits, seed, offset = rows(5, 40)
    out = sample_logp_entropy(logits.bfloat16().requires_grad_(), seed=seed, offset=offset)
    assert out.logp.dtype == torch.float32
    assert not out.logp.requires_grad
    assert torch.equal(out.token, sample_logp_entropy(logits.bfloat16().float(), seed=seed, offset=offset).token)


triton_sample = pytest.importorskip("autotool_kernels.triton_sample")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def _words(seed, offset, out, BLOCK: tl.constexpr):
    k0, k1 = triton_sample.low_high(tl.load(seed + tl.arange(0, 1)))
    c2, c3 = triton_sample.low_high(tl.load(offset + tl.arange(0, 1)))
    block, zero = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.uint32)
    words = triton_sample.philox(block.to(tl.uint32), zero, c2 + zero, c3 + zero, k0, k1)
    for w in tl.static_range(4):
        tl.store(out + block * 4 + w, words[w].to(tl.int64))


def test_triton_draws_the_same_bits():
    for seed, offset in ((0, 0), (-7, 5), (2**40 + 3, 2**33 + 1), (2**63 - 1, -1)):
        s, o = torch.tensor([seed]), torch.tensor([offset])
        out = torch.zeros(64, dtype=torch.int64, device=DEVICE)
        _words[(1,)](s.to(DEVICE), o.to(DEVICE), out, BLOCK=16)
        u = ((out.cpu() & philox.MASK).float() + 0.5) * 2.0**-32
        assert torch.equal(u.clamp(max=philox.LARGEST_U), philox.uniforms(s, o, 64)[0])


@triton.jit
def _noise(u, out, BLOCK: tl.constexpr, FAST: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, triton_sample.gumbel(tl.load(u + i), FAST))


def test_triton_gumbel_noise_keeps_the_digits_of_small_uniforms():
    """Small u decide the race: relative error of E = -log(1 - u), checked through g = -log E."""

    u = torch.cat((torch.logspace(-9.9, -0.001, 62), torch.tensor([2.0**-33, philox.LARGEST_U]))).to(DEVICE)
    out = torch.empty(64, device=DEVICE)
    _noise[(1,)](u, out, BLOCK=64, FAST=DEVICE == "cuda")
    wanted = -(-(-u.double()).log1p()).log()
    # float32 results of up to 23, and 2^-25 of 1 - u where E >= 0.13; the fast logarithm is good to 2^-22 of 33.
    assert (out - wanted).abs().max() <= (8e-6 if DEVICE == "cuda" else 2.5e-6)


def test_splits_of_a_row_change_no_token(monkeypatch):
    logits, seed, offset = rows(5, 900)
    logits[1, 300:] = float("-inf")  # whole splits without a candidate
    temperature = torch.tensor([1.0, 2.0, 0.0, 0.3, 1.0], device=DEVICE)
    logits[2, 255] = logits[2, 256] = 50.0  # greedy, equal at both sides of a split
    arguments = {"temperature": temperature, "seed": seed, "offset": offset}
    wanted = sample_logp_entropy(logits, **arguments, backend="torch")
    assert wanted.token[2] == 255
    for split in (4096, 256):
        monkeypatch.setattr(triton_sample, "SPLIT", split)
        out = sample_logp_entropy(logits, **arguments, backend="triton")
        assert torch.equal(out.token, wanted.token)
        for a, w in zip(out[1:], wanted[1:], strict=True):
            assert (a - w).abs().max() <= 3e-6
        alone = sample_logp_entropy(
            logits[3:4], temperature=temperature[3:4], seed=seed[3:4], offset=offset[3:4], backend="triton"
        )
        assert all(torch.equal(a[3:4], b) for a, b in zip(out, alone, strict=True))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_rows_without_a_candidate(backend):
    logits, seed, offset = rows(3, 200)
    logits[1] = float("nan")
    out = sample_logp_entropy(logits, seed=seed, offset=offset, backend=backend)
    assert 0 <= out.token[1] < 200
    assert out.logp.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", LOGITS_BACKENDS)
def test_strided_logits_seeds_and_offsets(backend):
    logits, seed, offset = rows(4, 130)
    wanted = sample_logp_entropy(logits, seed=seed, offset=offset, backend=backend)
    padded = torch.full((4, 300), float("nan"), device=DEVICE)
    padded[:, 1:261:2] = logits
    strided = [torch.stack((t, t + 1), 1)[:, 0] for t in (seed, offset)]
    out = sample_logp_entropy(padded[:, 1:261:2], seed=strided[0], offset=strided[1], backend=backend)
    assert torch.equal(out.token, wanted.token)
    assert (out.logp - wanted.logp).abs().max() <= 3e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, "logits must be floating-point"),
        ({"logits": torch.zeros(3, 0)}, "logits must be floating-point"),
        ({"logits": torch.zeros(3, 5).to_sparse()}, "logits must be a dense tensor"),
        ({"logits": [[1.0]]}, "logits must be a tensor: got list"),
        ({"seed": 1}, "seed must be a tensor: got int"),
        ({"temperature": "cold"}, "temperature must be a number or a tensor"),
        ({"backend": None}, "backend must be one of"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be int64"),
        ({"offset": torch.zeros(3, dtype=torch.int32)}, "offset must be int64"),
        ({"temperature": -1.0}, "temperature must be positive or 0"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, "temperature must not be negative"),
    ],
)
def test_bad_arguments_are_named(change, message):
    zeros = torch.zeros(3, dtype=torch.int64)
    args = {"logits": torch.zeros(3, 4), "seed": zeros, "offset": zeros, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        sample_logp_entropy(args.pop("logits"), **args)
