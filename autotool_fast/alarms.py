"""Alarms of the RL stage: what a look at the curves would show, said in words when it begins and when it ends.

Pure functions over metrics rows (`docs/metrics.md` lists the alarms and what to do about each): means over the newest
steps are compared with fixed limits, with the first steps, or with the steps of the best accuracy. An alarm never
changes the training. While it is on, its rows hold `alarm/<name>`, from which `spells` reads the history of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autotool_fast.config import AlarmsConfig
from autotool_fast.metrics import plain

Means = dict[str, float]
"""Metric -> mean over the steps of a window that have it."""

PREFIX = "alarm/"
NAMES = {
    "entropy_explosion": "entropy explosion",
    "entropy_collapse": "entropy collapse",
    "reward_hacking": "reward without answers",
    "format_loss": "loss of format",
    "truncation": "truncated responses",
    "mismatch": "sampler and trainer disagree",
}
ADVICE = {
    "entropy_explosion": "the entropy bonus outweighs the reward, or the rate is too high; "
    "lower rl.beta_max, rl.target_long or rl.lr",
    "entropy_collapse": "samples of a prompt become the same, usual for --arm none; "
    "take --arm decoupled or raise rl.target_long, unless everything is solved",
    "reward_hacking": "the reward pays for something else than solving; "
    "look at think_rate and the transcripts, raise rl.correct_long or lower rl.wrong_short",
    "format_loss": "the rate is too high, the warm-up too short, or replies are cut off; "
    "lower rl.lr or raise warmup.steps",
    "truncation": "budgets cut replies off, which then count as wrong; raise rollout.max_new_tokens, "
    "rollout.max_turn_tokens or rollout.deadline_s, look for loops in the transcripts",
    "mismatch": "rollouts have other weights, precision or kernels than the update; "
    "check the server and model.dtype, or set rl.old_logp to trainer",
}
"""Why an alarm usually begins, and what to do."""
WATCHED = ("entropy/all", "acc/all", "reward/mean", "malformed", "truncated", "mismatch/mean")


@dataclass(frozen=True)
class Watch:
    """What the alarms remember between two steps.

    Attributes:
        rows: the watched metrics of the newest steps, at most a window.
        start: means over the first window; None before it is full.
        best: means over the window with the highest accuracy so far.
        on: alarms that are on -> steps since their condition last held.
    """

    rows: tuple[Means, ...] = ()
    start: Means | None = None
    best: Means | None = None
    on: Mapping[str, int] = field(default_factory=dict)


def advance(watch: Watch, metrics: Mapping[str, Any], config: AlarmsConfig) -> tuple[Watch, dict[str, str], list[str]]:
    """Take one step's metrics in.

    Returns:
        What to remember; the alarms that begin -> what was seen; the names of those that end. An alarm ends when its
        condition has not held for a window of steps.
    """
    known = {name: metrics.get(name) for name in WATCHED}
    row = {name: plain(value) for name, value in known.items() if value is not None}
    row = {name: value for name, value in row.items() if value is not None}
    rows = (*watch.rows, row)[-config.window :]
    watch = replace(watch, rows=rows)
    if len(rows) < config.window:
        return watch, {}, []
    now = _means(rows)
    start, best = watch.start or now, watch.best or now
    if now.get("acc/all", 0.0) > best.get("acc/all", 0.0):
        best = now
    seen = conditions(now, start, best, config)
    begun = {name: text for name, text in seen.items() if name not in watch.on}
    quiet = {name: 0 if name in seen else steps + 1 for name, steps in watch.on.items()}
    ended = [name for name, steps in quiet.items() if steps >= config.window]
    on = {name: steps for name, steps in quiet.items() if name not in ended} | dict.fromkeys(begun, 0)
    return replace(watch, start=start, best=best, on=on), begun, ended


def conditions(now: Means, start: Means, best: Means, config: AlarmsConfig) -> dict[str, str]:
    """The alarms whose condition holds -> what was seen, in words. Entropies and mismatches are in nats."""
    found = {}

    entropy, first = now.get("entropy/all"), start.get("entropy/all")
    if entropy is not None and first is not None:
        change = f"mean entropy {entropy:.3g} nats, {first:.3g} at the start"
        if entropy >= config.entropy_high and entropy >= config.entropy_rise * first:
            found["entropy_explosion"] = f"{change}: replies turn into noise"
        if entropy <= config.entropy_low or entropy <= config.entropy_fall * first:
            found["entropy_collapse"] = f"{change}: the policy no longer explores"

    accuracy, malformed, reward = now.get("acc/all"), now.get("malformed"), now.get("reward/mean")
    if None not in (accuracy, malformed, reward) and "acc/all" in best:
        lost = best["acc/all"] - accuracy
        shaped = best.get("malformed", 0.0) - malformed
        pays = reward >= best.get("reward/mean", reward)
        if lost >= config.accuracy_drop and (pays or shaped >= config.format_change):
            gain = "reward as high as then" if pays else f"{shaped:.0%} more replies well formed"
            found["reward_hacking"] = f"{accuracy:.0%} solved, {best['acc/all']:.0%} at best, with {gain}"
    if malformed is not None and malformed >= start.get("malformed", 0.0) + config.format_change:
        before = start.get("malformed", 0.0)
        found["format_loss"] = f"{malformed:.0%} of the responses malformed or cut, {before:.0%} at the start"

    if now.get("truncated", 0.0) >= config.truncated:
        found["truncation"] = f"{now['truncated']:.0%} of the responses ran out of a budget"
    if now.get("mismatch/mean", 0.0) >= config.mismatch:
        distance = now["mismatch/mean"]
        found["mismatch"] = f"log-probs of sampled tokens differ by {distance:.3g} nats on average"
    return found


class Monitor:
    """The alarms of a running stage.

    Args:
        say: prints a line.
        rows: those of the steps before, which are taken in silently.
    """

    def __init__(
        self, config: AlarmsConfig, say: Callable[[str], None], rows: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self._config, self._say, self._watch = config, say, Watch()
        for row in rows:
            self._watch, _, _ = advance(self._watch, row, config)

    def see(self, step: int, metrics: Mapping[str, Any]) -> dict[str, int]:
        """Take a step in and say what begins and ends; returns what its row gets."""
        if not self._config.enabled:
            return {}
        self._watch, begun, ended = advance(self._watch, metrics, self._config)
        for name, text in begun.items():
            seen = f"alarm: {NAMES[name]} at step {step}: {text} (last {self._config.window} steps)"
            self._say(f"{seen}; {ADVICE[name]}")
        for name in ended:
            self._say(f"alarm over: {NAMES[name]}, at step {step}")
        return {PREFIX + name: 1 for name in self._watch.on}


def spells(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each stretch of steps with an alarm, in the order in which they began."""
    found: list[tuple[str, int, int]] = []
    running: dict[str, int] = {}  # alarm -> its place in `found`
    for row in rows:
        names = [key.removeprefix(PREFIX) for key in row if key.startswith(PREFIX)]
        running = {name: place for name, place in running.items() if name in names}
        for name in names:
            place = running.setdefault(name, len(found))
            begin = found[place][1] if place < len(found) else row["step"]
            found[place : place + 1] = [(name, begin, row["step"])]
    return [f"{NAMES.get(name, name)}, steps {first} to {last}" for name, first, last in found]


def _means(rows: Iterable[Means]) -> Means:
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: sum(some) / len(some) for name, some in values.items()}
