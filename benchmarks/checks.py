"""What must hold on a device beyond the tests: accuracy at real shapes, bitwise repeats, batch invariance, graphs.

Every check gives one line and never stops the others. Accuracy is against float64 on the same rounded inputs, in
slices where the whole would not fit. On a CPU the same checks run on small shapes; those that need a GPU say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import autotool_kernels
import torch
from torch import Tensor

from benchmarks import linear_logp_entropy as linear
from benchmarks import logits_logp_entropy as logits
from benchmarks import policy_loss as policy
from benchmarks import sample_logp_entropy as sample
from benchmarks.measure import captured, one_line
from benchmarks.peers import Absent, Provider, own_backends
from benchmarks.problems import DATA, Problem, Reference, make_problem, max_error

REPEATS = 20
# Largest |dlogp|, |dentropy|, relative dX, relative dW. bfloat16: the project's targets, in which the rounding of the
# logits' gradient to bfloat16 is 1.8e-3. float32: rounding of sums of some hundred terms, with a margin of ten.
LIMITS = {
    torch.bfloat16: {"dlogp": 5e-4, "dentropy": 1e-4, "dx": 4e-3, "dw": 3.5e-3, "dz": 4e-3},
    torch.float32: {"dlogp": 1e-4, "dentropy": 1e-4, "dx": 1e-4, "dw": 1e-4, "dz": 1e-4},
}
POLICY_LIMIT = 1e-5  # float32 throughout: one rounding of each term and of few sums


class Check(NamedTuple):
    """One line; `passed` is None where the check could not be made."""

    name: str
    passed: bool | None
    detail: str


class Setting(NamedTuple):
    """Where the checks run and how large."""

    device: torch.device
    dtype: torch.dtype
    heads: tuple[tuple[int, int], ...]  # (H, V)
    tokens: int
    data: tuple[str, ...] = DATA


def setting(device: torch.device, full: bool) -> Setting:
    """Real heads on a GPU, a small one elsewhere."""
    if device.type != "cuda":
        return Setting(device, torch.float32, ((64, 1000),), 96)
    heads = linear.QWEN_7B, linear.QWEN_05B
    return Setting(device, torch.bfloat16, heads, *((8192, DATA) if full else (1024, ("peaked",))))


def run_checks(where: Setting) -> Iterator[Check]:
    """All checks, in order; an exception in one is its failure."""
    for name, check in _checks(where):
        try:
            yield check()
        except Exception as error:  # a crash of a kernel is what is looked for
            yield Check(name, False, one_line(error))


def _checks(where: Setting) -> Iterator[tuple[str, Callable[[], Check]]]:
    for op in _GRAPHS:
        yield f"{op}, chosen backend", lambda op=op: _chosen(op, where)
    for head, data in itertools.product(where.heads, where.data):
        problem = make_problem(where.tokens, *head, where.dtype, where.device, data, 0.55, 0.3)
        reference = Reference(problem)
        for provider in _own(problem):
            name = f"linear accuracy, {provider.name}, H={head[0]} V={head[1]} {data}"
            yield name, lambda n=name, p=problem, r=reference, v=provider: _linear_accuracy(n, p, r, v)
            if data == "peaked":
                name = f"linear {REPEATS} repeats bitwise, {provider.name}, H={head[0]}"
                yield name, lambda n=name, p=problem, v=provider: _linear_repeats(n, p, v)
        if data == "peaked":
            name = f"linear batch invariance, H={head[0]}"
            yield name, lambda n=name, p=problem: _linear_invariance(n, p)
    vocab, rows = where.heads[-1][1], min(512, where.tokens)
    for provider in logits.own_providers(where.device, where.dtype):
        if isinstance(provider, Absent):
            continue
        name = f"logits accuracy and repeats, {provider.name}, V={vocab}"
        yield name, lambda n=name, v=provider: _logits(n, where, rows, v)
    for op in ("policy_loss", "sample_logp_entropy"):
        for backend in own_backends(op, where.device, torch.float32)[0]:
            name = f"{op} accuracy and repeats, {backend}"
            run = _policy if op == "policy_loss" else _sample
            yield name, lambda n=name, b=backend, run=run: run(n, where, vocab, b)
    for name, capture in _GRAPHS.items():
        yield f"CUDA graph, {name}", lambda n=f"CUDA graph, {name}", c=capture: _graph(n, where, c)
    yield "torch.compile", lambda: _compiled("torch.compile", where)


def _chosen(op: str, where: Setting) -> Check:
    """A Triton that cannot serve would leave everything to the torch backend, whose results are right as well."""
    choice = autotool_kernels.choose(op, where.device.type, dtype=where.dtype)
    expected = choice.name == "triton" if where.device.type == "cuda" else None
    return Check(f"{op}, chosen backend", expected, f"{choice.name}: {choice.reason}")


def _own(problem: Problem) -> list[Provider]:
    return [p for p in linear.own_providers(problem) if isinstance(p, Provider)]


def _within(errors: dict[str, Any], dtype: torch.dtype) -> tuple[bool, str]:
    """Whether every error is below its limit, NaN failing, and all of them in words."""
    limits = LIMITS[dtype]
    text = ", ".join(f"{key} {value:.1e} (<= {limits[key]:.1e})" for key, value in errors.items())
    return all(value <= limits[key] for key, value in errors.items()), text


def _same(first: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _repeats(name: str, run: Callable[[], tuple[Tensor, ...]]) -> Check:
    first = run()
    different = sum(not _same(first, run()) for _ in range(REPEATS - 1))
    return Check(name, different == 0, f"{different} of {REPEATS - 1} repeats differ from the first")


def _linear_accuracy(name: str, problem: Problem, reference: Reference, provider: Provider) -> Check:
    return Check(name, *_within(linear.Contest(problem).errors(provider, True, reference), problem.hidden.dtype))


def _linear_repeats(name: str, problem: Problem, provider: Provider) -> Check:
    contest = linear.Contest(problem)

    def run() -> tuple[Tensor, ...]:
        out = contest.outputs(provider, True)
        results = [t.detach() for t in (out.logp, out.entropy) if t is not None]
        return (*results, *contest.gradients(provider, out, True))

    return _repeats(name, run)


def _linear_invariance(name: str, problem: Problem) -> Check:
    """Rows alone, in a slice and in another order give the bits they give in the batch."""
    choice = autotool_kernels.choose("linear_logp_entropy", problem.hidden.device.type, dtype=problem.hidden.dtype)
    if choice.name == "torch":
        return Check(name, None, "not promised by the torch backend: a library chooses the products' order by shape")
    live = problem.live
    count = len(live)
    picks = [live[:1], live[count // 2 : count // 2 + 33], live.flip(0)]
    with torch.no_grad():
        whole = autotool_kernels.linear_logp_entropy(problem.hidden, problem.weight, problem.target)
        for rows in picks:
            part = autotool_kernels.linear_logp_entropy(problem.hidden[rows], problem.weight, problem.target[rows])
            if not _same((whole.logp[rows], whole.entropy[rows]), tuple(part)):
                return Check(name, False, f"{len(rows)} rows by themselves differ from the same rows in the batch")
    return Check(name, True, f"1, 33 and {count} permuted rows equal those of a batch of {problem.shape[0]}")


def _logits(name: str, where: Setting, rows: int, provider: Provider) -> Check:
    batch = logits.Batch(rows, where.heads[-1][1], where.dtype, where.device, "peaked", 0.55)
    passed, text = _within(batch.errors(provider, True), where.dtype)

    def run() -> tuple[Tensor, ...]:
        z = batch.input(provider, 0)
        out = batch.outputs(provider, z, True)
        return out.logp.detach(), out.entropy.detach(), batch.gradients(provider, z, out, True)

    repeats = _repeats(name, run)
    return Check(name, passed and repeats.passed, f"{text}; {repeats.detail}")


def _policy(name: str, where: Setting, vocab: int, backend: str) -> Check:
    batch = policy.make_batch(64 * where.tokens, 64, where.device)
    truth = policy.plain_step(policy.plain_loss, batch, torch.float64)
    result = policy.own_step(batch, backend)
    errors = [max_error(a, b) / b.abs().max().item() for a, b in zip(result, truth, strict=True)]
    repeats = _repeats(name, lambda: tuple(t.detach() for t in policy.own_step(batch, backend)))
    text = f"largest error of loss and gradients {max(errors):.1e} of their maximum (<= {POLICY_LIMIT:.0e})"
    return Check(name, all(e <= POLICY_LIMIT for e in errors) and repeats.passed, f"{text}; {repeats.detail}")


def _sample(name: str, where: Setting, vocab: int, backend: str) -> Check:
    rows = 64
    problem = make_problem(rows, 128, vocab, torch.float32, where.device, "peaked")
    z = (problem.hidden @ problem.weight.t()).to(where.dtype)
    seed = torch.arange(rows, device=where.device)
    draw = sample.samplers(where.device, where.dtype)[0][f"autotool_{backend}"]
    out = draw(z, seed, seed)
    truth = z.double().log_softmax(-1)
    errors = {
        "dlogp": max_error(out.logp, truth.gather(1, out.token[:, None])[:, 0]),
        "dentropy": max_error(out.entropy, -(truth.exp() * truth).sum(-1)),
    }
    passed, text = _within(errors, where.dtype)
    repeats = _repeats(name, lambda: tuple(draw(z, seed, seed)))
    alone = draw(z[5:6], seed[5:6], seed[5:6])
    invariant = _same(tuple(t[5:6] for t in out), tuple(alone))
    detail = f"{text}; {repeats.detail}; a row alone {'equals' if invariant else 'differs from'} the row in the batch"
    return Check(name, passed and repeats.passed and invariant, detail)


def _graph_linear(where: Setting) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], None]]:
    problem = make_problem(min(1024, where.tokens), *where.heads[-1], where.dtype, where.device, "peaked", 0.55)
    contest = linear.Contest(problem)
    provider = _own(problem)[0]

    def run() -> tuple[Tensor, ...]:
        out = contest.outputs(provider, True)
        return (out.logp.detach(), out.entropy.detach(), *contest.gradients(provider, out, True))

    return run, lambda: contest.hidden.detach().mul_(0.5)


def _graph_logits(where: Setting) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], None]]:
    batch = logits.Batch(256, where.heads[-1][1], where.dtype, where.device, "peaked", 1.0)
    z = batch.copies[0]

    def run() -> tuple[Tensor, ...]:
        out = autotool_kernels.logits_logp_entropy(z, batch.target)
        grads = torch.autograd.grad([out.logp, out.entropy], z, [batch.grad_logp, batch.grad_entropy])
        return out.logp.detach(), out.entropy.detach(), *grads

    return run, lambda: z.detach().mul_(0.5)


def _graph_policy(where: Setting) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], None]]:
    batch = policy.make_batch(16384, 64, where.device)
    return lambda: tuple(t.detach() for t in policy.own_step(batch, "auto")), lambda: batch.logp.mul_(0.5)


def _graph_sample(where: Setting) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], None]]:
    z = torch.randn(64, where.heads[-1][1], device=where.device, dtype=where.dtype)
    seed = torch.arange(64, device=where.device)
    return lambda: tuple(autotool_kernels.sample_logp_entropy(z, seed=seed, offset=seed)), lambda: z.mul_(0.5)


_GRAPHS = {
    "linear_logp_entropy": _graph_linear,
    "logits_logp_entropy": _graph_logits,
    "policy_loss": _graph_policy,
    "sample_logp_entropy": _graph_sample,
}


def _graph(name: str, where: Setting, make: Callable[[Setting], tuple[Callable, Callable]]) -> Check:
    """Captured, then replayed on other inputs in the same memory: the bits of the plain call on those inputs."""
    if where.device.type != "cuda":
        return Check(name, None, "needs a GPU")
    run, change = make(where)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph, outputs = captured(run)
    change()
    graph.replay()
    torch.cuda.synchronize()
    same = _same(outputs, run())
    return Check(name, same, "captured; replay on changed inputs " + ("equals" if same else "differs from") + " a call")


def _compiled(name: str, where: Setting) -> Check:
    """Three ops in one compiled graph, their gradients outside it: the bits of the plain calls."""
    if where.device.type != "cuda":
        return Check(name, None, "needs a GPU; the tests compile the ops on a CPU")
    problem = make_problem(256, *where.heads[-1], where.dtype, where.device, "peaked", 0.55)
    leaves = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    logits = torch.randn(64, where.heads[-1][1], device=where.device, dtype=where.dtype)
    seed = torch.arange(64, device=where.device)

    def ops(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (
            *autotool_kernels.linear_logp_entropy(hidden, weight, problem.target),
            *autotool_kernels.logits_logp_entropy(logits, seed),
            *autotool_kernels.sample_logp_entropy(logits, seed=seed, offset=seed),
        )

    torch._dynamo.reset()
    results = []
    for run in (ops, torch.compile(ops, fullgraph=True)):
        out = run(*leaves)
        results.append((*out, *torch.autograd.grad(out[:2], leaves, list(problem.upstream(True, True)))))
    same = _same(*results)
    return Check(name, same, "compiled calls " + ("equal" if same else "differ from") + " plain ones")
