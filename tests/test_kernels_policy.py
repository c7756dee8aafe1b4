"""policy_loss: every backend against the docstring's formula, written as a loop in float64."""

from __future__ import annotations

import kernels_oracle as oracle
import pytest
import torch
from autotool_kernels import policy_loss
from kernels_oracle import DEVICE, QUIET
from kernels_oracle import LOGITS_BACKENDS as BACKENDS  # the CUDA C++ extension has this op too
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings(QUIET)
# float32 ratios and weights; sums in float64. A few roundings of values of order 1.
TOLERANCE = 2e-6
OPTIONS = {"target_short": 0.21, "target_long": 0.19, "beta_short": 0.03, "beta_long": 0.05}


def batch(dtype=torch.float32, seed=0, longest=1100):
    """Nine sequences; one is empty, one untrained, one malformed, one has advantage 0, one is long."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 0, 40, longest, 3, 17, 2, 9, 11])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
    total = int(cu_seqlens[-1])
    logp = -torch.rand(total, generator=g) * 2
    old_logp = logp + torch.randn(total, generator=g) * 0.3
    entropy = torch.rand(total, generator=g) * 0.4
    mask = torch.rand(total, generator=g) > 0.2
    mask[cu_seqlens[4] : cu_seqlens[5]] = False
    advantages = torch.randn(9, generator=g)
    advantages[7] = 0
    is_short = torch.tensor([1, 0, 0, 1, 0, -1, 1, 0, 0], dtype=torch.int8)
    tensors = (
        logp.to(dtype),
        old_logp.to(dtype),
        entropy.to(dtype),
        advantages.to(dtype),
        cu_seqlens,
        mask,
        is_short,
    )
    return [t.to(DEVICE) for t in tensors]


def run(args, loss=policy_loss, **options):
    logp, entropy = args[0].clone().requires_grad_(), args[2].clone().requires_grad_()
    out = loss(logp, args[1], entropy, *args[3:], **options)
    return out, torch.autograd.grad(out[0], (logp, entropy))


def expected(args, **options):
    double = [t.double() if t.is_floating_point() else t for t in args]
    return run(double, oracle.policy_loss, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["tokens", "sequences", 7.0])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_matches_the_formula(backend, normalize, as_tensors):
    args = batch()
    options = dict(OPTIONS, normalize=normalize, clip_low=0.15, clip_high=0.3)
    given = {k: torch.tensor(v, device=DEVICE) if as_tensors and k in OPTIONS else v for k, v in options.items()}
    out, grads = run(args, backend=backend, **given)
    (loss, means), wanted = expected(args, **options)
    assert abs(out.loss.item() - loss.item()) <= TOLERANCE * max(1, abs(loss.item()))
    assert (out.sequence_entropy - means).abs().max() <= TOLERANCE
    for a, w in zip(grads, wanted, strict=True):
        assert (a - w).abs().max() <= TOLERANCE * max(1.0, w.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_tensor_divides_as_the_number_does(backend, dtype):
    args = batch()
    divisor = torch.tensor(7, dtype=dtype, device=DEVICE)
    out, grads = run(args, backend=backend, normalize=divisor, **OPTIONS)
    wanted, wanted_grads = run(args, backend=backend, normalize=7.0, **OPTIONS)
    found, expect = (*out.metrics.values(), out.loss, *grads), (*wanted.metrics.values(), wanted.loss, *wanted_grads)
    for a, w in zip(found, expect, strict=True):
        torch.testing.assert_close(a, w, rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_of_low_precision_log_probs_are_not_rounded(backend):
    """0.2001 and 0.2 are the same number in bfloat16."""
    args = one_sequence(0.2001)
    args[:2] = [t.bfloat16() for t in args[:2]]
    for target, gate in ((0.2, 0), (0.2002, 1)):
        for given in (target, torch.tensor(target, device=DEVICE)):
            out = policy_loss(*args, target_long=given, backend=backend)
            assert out.metrics["gate_long"] == gate


def test_the_factor_of_a_low_precision_gradient_is_not_rounded():
    args = batch(torch.bfloat16)
    logp, entropy = (args[i].clone().requires_grad_() for i in (0, 2))
    loss = policy_loss(logp, args[1], entropy, *args[3:], **OPTIONS).loss
    once = torch.autograd.grad(loss, (logp, entropy), retain_graph=True)
    scaled = torch.autograd.grad(loss * (1 + 2.0**-8), (logp, entropy))  # the factor is 1 in bfloat16
    for a, w in zip(scaled, once, strict=True):
        assert torch.equal(a, (w.float() * (1 + 2.0**-8)).bfloat16())
        assert not torch.equal(a, w)


@pytest.mark.parametrize("normalize", ["tokens", "sequences", 7.0])
def test_float64_inputs_are_served_in_float64(normalize):
    # Some 60 terms of order 1, rounded in another order: far below the 1e-9 that one float32 coefficient would cost.
    args = batch(torch.float64, longest=20)
    out, grads = run(args, normalize=normalize, **OPTIONS)
    (loss, means), wanted = expected(args, normalize=normalize, **OPTIONS)
    for ours, theirs in zip((out.loss, out.sequence_entropy, *grads), (loss, means, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def test_gradcheck_in_float64():
    logp, old_logp, entropy, *rest = batch(torch.float64, longest=20)
    logp.requires_grad_(), entropy.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, e: policy_loss(a, old_logp, e, *rest, **OPTIONS).loss, (logp, entropy))


def one_sequence(entropy, kind=0, length=1000):
    """A sequence whose entropies are all equal."""
    ones = torch.ones(length, device=DEVICE)
    return [
        -ones, -ones, ones * entropy, torch.ones(1, device=DEVICE),
        torch.tensor([0, length], device=DEVICE), ones.bool(), torch.tensor([kind], device=DEVICE),
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [0.2, 0.1, 1 / 3])
def test_gate_is_inclusive(backend, target):
    above = torch.nextafter(torch.tensor(target), torch.tensor(1.0)).item()
    for as_tensor in (False, True):
        limit = torch.tensor(target, device=DEVICE) if as_tensor else target
        for kind, name in ((0, "long"), (1, "short")):
            options = {f"target_{name}": limit, f"beta_{name}": 0.5, "backend": backend}
            out, (_, open_gradient) = run(one_sequence(target, kind), **options)
            assert out.metrics[f"gate_{name}"] == 1
            assert (open_gradient != 0).all()
            out, (_, shut_gradient) = run(one_sequence(above, kind), **options)
            assert out.metrics[f"gate_{name}"] == 0
            assert shut_gradient.count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_bonus_reaches_every_trained_token(backend):
    args = batch()
    _, (_, gradient) = run(args, backend=backend, target_long=9.0, beta_long=0.05, normalize=1.0)
    cu, mask, kind = args[4].tolist(), args[5], args[6].tolist()
    for i, k in enumerate(kind):
        span = slice(cu[i], cu[i + 1])
        wanted = torch.where(mask[span], -0.05 if k == 0 else 0.0, 0.0)
        assert torch.equal(gradient[span], wanted.to(gradient))


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_ratio_is_masked_before_exp(backend):
    args = batch()
    mask = args[5]
    wild = torch.full_like(args[0], 300.0)  # exp overflows
    for column in (1, 2):
        for value in (-wild, torch.full_like(wild, float("nan"))):
            poisoned = list(args)
            poisoned[column] = torch.where(mask, args[column], value)
            out, grads = run(poisoned, backend=backend, **OPTIONS)
            clean, clean_grads = run(args, backend=backend, **OPTIONS)
            assert out.loss == clean.loss
            assert all(torch.equal(a, b) for a, b in zip(grads, clean_grads, strict=True))
            assert all(m.isfinite() for m in out.metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["tokens", "sequences", 3])
def test_nothing_trained_is_a_differentiable_zero(backend, normalize):
    args = batch()
    args[5] = torch.zeros_like(args[5])
    out, grads = run(args, backend=backend, normalize=normalize, beta_long=1.0)
    assert out.loss == 0
    assert all(g.count_nonzero() == 0 for g in grads)
    assert out.sequence_entropy.count_nonzero() == 0
    assert all(m == 0 for m in out.metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences(backend):
    empty = torch.zeros(0, device=DEVICE)
    args = [empty, empty, empty, empty, torch.zeros(1, dtype=torch.int32, device=DEVICE), empty, empty]
    out, _ = run(args, backend=backend)
    assert out.loss == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipped_tokens_have_no_gradient_and_are_counted(backend):
    ratios = torch.tensor([0.7, 0.9, 1.1, 1.3], device=DEVICE)
    for sign, clipped, low, high in ((1.0, [3], 0.0, 0.25), (-1.0, [0], 0.25, 0.0)):
        args = one_sequence(0.5, length=4)
        args[0] = args[1] + ratios.log()
        args[3] = args[3] * sign
        out, (gradient, _) = run(args, backend=backend)
        assert (gradient == 0).nonzero()[:, 0].tolist() == clipped
        assert out.metrics["clip_fraction_low"] == low
        assert out.metrics["clip_fraction_high"] == high


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics(backend):
    args = batch()
    out, _ = run(args, backend=backend, **OPTIONS)
    logp, old, _, _, cu, mask, kind = args
    ratio = (logp - old)[mask].double().exp()
    _, means = oracle.policy_loss(*args, **OPTIONS)
    trained = torch.stack([mask[cu[i] : cu[i + 1]].any() for i in range(9)])
    long, short = trained & (kind == 0), trained & (kind == 1)
    bonus = out.metrics["entropy_bonus"]
    wanted = {
        "approx_kl": (ratio - 1 - ratio.log()).mean(), "ratio_mean": ratio.mean(), "ratio_max": ratio.max(),
        "n_tokens": mask.sum(), "n_long": long.sum(), "n_short": short.sum(),
        "entropy_long": means[long].mean(), "entropy_short": means[short].mean(),
        "gate_long": (means[long] <= 0.19).double().mean(),
        "gate_short": (means[short] <= 0.21).double().mean(),
        "policy_loss": out.loss + bonus,
    }  # fmt: skip
    for name, value in wanted.items():
        assert abs(out.metrics[name].item() - value.item()) <= 1e-5 * max(1, abs(value.item())), name
        assert out.metrics[name].ndim == 0
    assert bonus > 0
    assert not any(m.requires_grad for m in (out.sequence_entropy, *out.metrics.values()))


def random_batch(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total, n = int(cu_seqlens[-1]), len(lengths)
    logp, entropy = -torch.rand(total, generator=g), torch.rand(total, generator=g) * 0.4
    tensors = (
        logp, logp + torch.randn(total, generator=g) * 0.3, entropy, torch.randn(n, generator=g), cu_seqlens,
        torch.rand(total, generator=g) > 0.2, torch.randint(-1, 2, (n,), generator=g),
    )  # fmt: skip
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "lengths",
    [
        [1] * 600,  # more sequences than a block has tokens
        [2600],  # one sequence over many blocks
        [511, 1, 512, 0, 0, 513, 1023],  # bounds beside those of blocks
        [0, 0, 3, 0],  # nothing at both ends
    ],
    ids=["ones", "long", "bounds", "empty"],
)
def test_any_number_and_length_of_sequences(backend, lengths):
    args = random_batch(lengths)
    out, grads = run(args, backend=backend, **OPTIONS)
    (loss, means), wanted = expected(args, **OPTIONS)
    assert abs(out.loss.item() - loss.item()) <= TOLERANCE
    assert (out.sequence_entropy - means).abs().max() <= TOLERANCE
    for a, w in zip(grads, wanted, strict=True):
        assert (a - w).abs().max() <= TOLERANCE
    again, repeated = run(args, backend=backend, **OPTIONS)
    assert torch.equal(out.loss, again.loss)
    assert torch.equal(out.sequence_entropy, again.sequence_entropy)
    assert all(torch.equal(a, b) for a, b in zip(grads, repeated, strict=True))
    assert all(torch.equal(out.metrics[name], again.metrics[name]) for name in out.metrics)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_entropy_stays_in_its_sequence(backend):
    args = random_batch([4, 5, 6])
    args[5][:] = True
    args[2][6] = float("nan")
    out, _ = run(args, backend=backend, **OPTIONS)
    assert out.sequence_entropy.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wild_ratio_at_advantage_zero_stays_out_of_the_loss(backend):
    args = random_batch([4, 5, 6])
    args[3][1] = 0.0
    args[1][4:9] = -1e4  # exp of the log-ratio is inf
    args[5][:] = True
    out, grads = run(args, backend=backend, **OPTIONS)
    assert out.loss.isfinite()
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][4:9].count_nonzero() == 0
    assert out.metrics["ratio_max"] == float("inf")


triton_policy = pytest.importorskip("autotool_kernels.triton_policy")


def test_triton_blocks_change_only_rounding(monkeypatch):
    args = random_batch([40, 0, 1, 1, 1, 200, 7])
    first, gradients = run(args, backend="triton", **OPTIONS)
    monkeypatch.setattr(triton_policy, "BLOCK", 64)
    monkeypatch.setattr(triton_policy, "BLOCK_B", 2)
    second, others = run(args, backend="triton", **OPTIONS)
    # Sums in float64: another order shows only where it moves the one rounding to float32.
    pairs = zip(
        (first.loss, first.sequence_entropy, *gradients), (second.loss, second.sequence_entropy, *others), strict=True
    )
    for a, b in pairs:
        assert (a - b).abs().max() <= 2.0**-23 * a.abs().max()


def test_triton_gives_zeros_to_tokens_of_no_sequence():
    """Only a CPU can refuse such bounds through the public function."""
    args = random_batch([9])
    args[4] = torch.tensor([2, 6], device=DEVICE)
    args[5][:] = True
    parts = triton_policy.policy_forward(*args, [9.0, 9.0, 1.0, 1.0], None, 0.2, 0.2, 0, 1.0)
    args[5][:2] = args[5][6:] = False
    args[4] = torch.tensor([0, 9], device=DEVICE)
    wanted = triton_policy.policy_forward(*args, [9.0, 9.0, 1.0, 1.0], None, 0.2, 0.2, 0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(parts, wanted, strict=True))


class Operations(TorchDispatchMode):
    """Names of the torch operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate", [None, torch.tensor([0.1, 0.2, 0.0, 0.01])])
def test_triton_launches_twice_and_torch_only_allocates(monkeypatch, gate):
    launched = []

    def recorder(name):
        class Kernel:
            def __getitem__(self, grid):
                return lambda *args, **options: launched.append(name)

        return Kernel()

    for name in ("_pieces", "_gradients"):
        monkeypatch.setattr(triton_policy, name, recorder(name))
    args = random_batch([3, 4])
    with Operations() as operations:
        triton_policy.policy_forward(*args, [0.1, 0.2, 0.0, 0.01], gate, 0.2, 0.2, 0, 1.0)
    assert launched == ["_pieces", "_gradients"]
    assert set(operations.names) <= {"empty", "empty_like"}


def test_only_logp_and_entropy_get_gradients():
    args = [t.requires_grad_() if t.is_floating_point() else t for t in batch()]
    policy_loss(*args).loss.backward()
    assert [t.grad is not None for t in args] == [True, False, True, False, False, False, False]


def test_coefficients_are_detached():
    beta = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    out = policy_loss(*one_sequence(0.1), beta_long=beta)
    assert not out.loss.requires_grad


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 2), "logp must be"),
        (0, torch.zeros(4).long(), "logp must be floating point"),
        (1, torch.zeros(4).long(), "old_logp must be floating point"),
        (2, torch.zeros(4).long(), "entropy must be floating point"),
        (4, None, "cu_seqlens must be a tensor: got NoneType"),
        (4, torch.zeros(2, dtype=torch.int64, device="meta"), "cu_seqlens must be on cpu"),
        (5, None, "mask must be a tensor: got NoneType"),
        (5, torch.ones(4).to_sparse(), "mask must be a dense tensor"),
        (6, torch.tensor([0.5]), "is_short must hold 1, 0 or -1: got 0.5"),
        (6, torch.tensor([2]), "is_short must hold 1, 0 or -1: got 2"),
        (1, torch.zeros(3), "old_logp must have the shape of logp"),
        (2, torch.zeros(3), "entropy must have the shape of logp"),
        (3, torch.zeros(1, 1), "advantages must be a vector"),
        (4, torch.tensor([0, 2, 4]), "cu_seqlens must be int32 or int64"),
        (4, torch.tensor([0.0, 4.0]), "cu_seqlens must be int32 or int64"),
        (4, torch.tensor([0, 3]), "cu_seqlens must rise from 0"),
        (4, torch.tensor([1, 4]), "cu_seqlens must rise from 0"),
        (5, torch.ones(3), "mask must have the shape of logp"),
        (6, torch.zeros(2), "is_short must have the shape of advantages"),
    ],
)
def test_bad_tensors_are_named(position, value, message):
    zeros = torch.zeros(4)
    args = [zeros, zeros, zeros, torch.zeros(1), torch.tensor([0, 4]), torch.ones(4), torch.zeros(1)]
    args[position] = value
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        policy_loss(*args, backend="torch")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"normalize": "batch"}, "normalize must be"),
        ({"normalize": 0}, "normalize must be"),
        ({"normalize": float("inf")}, "normalize must be"),
        ({"normalize": True}, "normalize must be"),
        ({"normalize": torch.ones(1)}, "normalize must be a number or a 0-d tensor"),
        ({"target_long": torch.tensor([0.2])}, "target_long must be a number or a 0-d tensor"),
        ({"target_long": torch.tensor(0.2, device="meta")}, "target_long must be on"),
        ({"target_long": float("nan")}, "target_long must not be nan"),
        ({"target_short": "a"}, "target_short must be a number or a 0-d tensor: got str"),
        ({"beta_long": float("inf")}, "beta_long must not be inf"),
        ({"beta_short": None}, "beta_short must be a number or a 0-d tensor"),
        ({"backend": None}, "backend must be one of"),
        ({"clip_low": "a"}, "clip_low must be a number: got str"),
        ({"clip_high": torch.tensor(0.2)}, "clip_high must be a number: got Tensor"),
        ({"clip_low": -0.1}, "clip_low must not be negative"),
        ({"clip_high": float("nan")}, "clip_high must not be negative"),
    ],
)
def test_bad_options_are_named(option, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        policy_loss(*one_sequence(0.1), **option)
    assert "\n" not in str(caught.value)


def test_thousands_of_wrong_bounds_are_not_printed():
    tokens, sequences = torch.zeros(5000), torch.zeros(4999)
    with pytest.raises(ValueError, match="cu_seqlens must rise") as caught:
        policy_loss(tokens, tokens, tokens, sequences, torch.arange(5000), tokens, sequences, backend="torch")
    assert len(str(caught.value)) < 120
