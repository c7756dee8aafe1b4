"""Sampled transcripts for the report: which ones to show, and their tokens as coloured stretches.

A sampled token keeps its own stretch with its entropy; neighbouring prompt or tool tokens are merged. Text
here is model output: it is never marked as safe, the template escapes it.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from autotool_fast.report.charts import bins, plain
from autotool_fast.report.load import STAGE_NAMES, Row, number

ENTROPY_EDGES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Lower edges in nats of the shades 1 .. 6; below the first a token is not shaded."""
MAX_SHOWN = 24
MAX_STEPS = 4
MAX_TOTAL_TOKENS = 6000
MAX_TOKENS = 800
LONG_PROMPT = 500
GLIMPSE = 72

_TAGGED_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)", re.DOTALL)
_BARE_CALL = re.compile(r"(?:<\|python_tag\|>\s*)?\{\s*\"name\"\s*:.*\}", re.DOTALL)
_FRAME = re.compile(r"</?tool_(?:call|response)>|<\|[a-z_]+\|>(?:user|tool|assistant|ipython)?")
_USER_TURN = re.compile(r"<\|im_start\|>user|<\|start_header_id\|>user")

_PROMPT, _SAMPLED, _TOOL = 0, 1, 2


@dataclass(frozen=True)
class Piece:
    """A stretch of text: kind is prompt, sampled, call, tool or cut.

    `fold` is the summary if it is folded and `glimpse` how the text begins; a call has its tokens `inside`.
    """

    kind: str
    text: str
    shade: int = 0
    tip: str = ""
    fold: str = ""
    glimpse: str = ""
    inside: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """What the template needs of one transcript; an unknown figure is an empty string."""

    title: str
    mode: str
    correct: bool | None
    reward: str
    stop_reason: str
    n_sampled: int
    entropy: str
    pieces: tuple[Piece, ...]


def entropy_shade(entropy: float) -> int:
    """Shade 0 .. 6 of an entropy in nats."""
    return bisect_right(ENTROPY_EDGES, entropy)


def legend() -> list[tuple[int, str]]:
    """(shade, range in nats) entries."""
    edges = [plain(e) for e in ENTROPY_EDGES]
    inner = [(i + 1, f"{a}–{b}") for i, (a, b) in enumerate(pairwise(edges))]
    return [(0, f"< {edges[0]}"), *inner, (len(edges), f"≥ {edges[-1]}")]


def choose(rows: Sequence[Row]) -> list[Row]:
    """At most `MAX_SHOWN` rows of `MAX_STEPS` moments, the last first, each over all difficulties."""
    usable = [row for row in rows if isinstance(row.get("tokens"), list) and row["tokens"]]
    moments = list(dict.fromkeys((str(row.get("stage")), number(row.get("step")) or 0.0) for row in usable))
    if len(moments) > MAX_STEPS:
        moments = [moments[round(i * (len(moments) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]
    chosen: list[Row] = []
    budget = MAX_TOTAL_TOKENS
    for moment in reversed(moments):
        here = [r for r in usable if (str(r.get("stage")), number(r.get("step")) or 0.0) == moment]
        for row in _vary(here)[: MAX_SHOWN // len(moments)]:
            size = min(len(row["tokens"]), MAX_TOKENS)
            if size <= budget or not chosen:
                budget -= size
                chosen.append(row)
    return chosen


def _vary(rows: Sequence[Row]) -> list[Row]:
    """Round robin over difficulty, easiest first, so that a cut keeps every difficulty it can."""
    by_difficulty: dict[float, list[Row]] = {}
    for row in rows:
        by_difficulty.setdefault(number(row.get("difficulty")) or 0.0, []).append(row)
    lanes = [by_difficulty[k] for k in sorted(by_difficulty)]
    if len(lanes) > MAX_SHOWN // MAX_STEPS:
        lanes = [lanes[part[-1]] for part in bins(len(lanes), MAX_SHOWN // MAX_STEPS)]
    longest = max((len(lane) for lane in lanes), default=0)
    return [lane[i] for i in range(longest) for lane in lanes if i < len(lane)]


def transcript(row: Row) -> Transcript:
    """Lay out one row of transcripts.jsonl; tokens that are not as described are left out."""
    tokens = [t for t in row["tokens"] if isinstance(t, dict) and isinstance(t.get("text"), str)]
    entropies = [
        e for t in tokens if t.get("source") == _SAMPLED and (e := number(t.get("entropy"))) is not None
    ]
    sampled = sum(t.get("source") == _SAMPLED for t in tokens)
    reward, step, k = (number(row.get(key)) for key in ("reward", "step", "difficulty"))
    names = [
        STAGE_NAMES.get(str(row.get("stage")), str(row.get("stage", "")))
        + (f" step {plain(step)}" if step is not None else ""),
        str(row.get("family", "")) + (f" k={plain(k)}" if k is not None else ""),
        str(row.get("task_id", "")),
    ]
    correct = row.get("correct")
    return Transcript(
        title=" · ".join(name for name in names if name.strip()),
        mode=str(row.get("mode") or "malformed"),
        correct=correct if isinstance(correct, bool) else None,
        reward="" if reward is None else f"{reward:+g}",
        stop_reason=str(row.get("stop_reason") or ""),
        n_sampled=sampled,
        entropy=f"{sum(entropies) / len(entropies):.3f}" if entropies else "",
        pieces=tuple(_pieces(tokens)),
    )


def _pieces(tokens: list[Row]) -> list[Piece]:
    skipped = len(tokens) - MAX_TOKENS
    if skipped > 0:
        head, tail = tokens[: MAX_TOKENS // 2], tokens[-(MAX_TOKENS // 2) :]
        return [*_stretches(head), Piece("cut", f"… {skipped} tokens left out …"), *_stretches(tail)]
    return _stretches(tokens)


def _stretches(tokens: list[Row]) -> list[Piece]:
    pieces: list[Piece] = []
    for source, group in groupby(tokens, key=lambda t: t.get("source")):
        part = list(group)
        text = "".join(t["text"] for t in part)
        if source == _SAMPLED:
            pieces += _reply(part, text)
        elif source == _TOOL:
            name = "next user turn" if _USER_TURN.search(text) and "<tool_response>" not in text else "tool result"
            pieces.append(Piece("tool", text, fold=f"{name}, {_count(part)}", glimpse=_glimpse(_FRAME.sub(" ", text))))
        else:
            fold = f"prompt, {_count(part)}" if len(text) > LONG_PROMPT else ""
            pieces.append(Piece("prompt", text, fold=fold, glimpse=_glimpse(text) if fold else ""))
    return pieces


def _reply(tokens: list[Row], text: str) -> list[Piece]:
    """Sampled tokens one by one; those in a call are folded under the shade of the least certain one."""
    calls = list(_TAGGED_CALL.finditer(text)) or list(_BARE_CALL.finditer(text))
    pieces: list[Piece] = []
    inside: dict[int, list[Piece]] = {}
    start = 0
    for token in tokens:
        end = start + len(token["text"])
        call = next((i for i, c in enumerate(calls) if start < c.end() and end > c.start()), None)
        if call is None:
            pieces.append(_sampled(token))
        else:
            if call not in inside:
                inside[call] = []
                pieces.append(Piece("call", str(call)))
            inside[call].append(_sampled(token))
        start = end
    return [_call(calls[int(p.text)].group(), inside[int(p.text)]) if p.kind == "call" else p for p in pieces]


def _call(text: str, inside: list[Piece]) -> Piece:
    shade = max(piece.shade for piece in inside)
    glimpse = _glimpse(_FRAME.sub(" ", text))
    return Piece("call", "", shade, fold=f"tool call, {_count(inside)}", glimpse=glimpse, inside=tuple(inside))


def _count(items: Sequence[object]) -> str:
    return f"{len(items)} token{'s' if len(items) != 1 else ''}"


def _glimpse(text: str) -> str:
    """The beginning of a folded text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= GLIMPSE else line[: GLIMPSE - 1] + "…"


def _sampled(token: Row) -> Piece:
    entropy, logp = number(token.get("entropy")), number(token.get("logp"))
    facts = []
    if logp is not None:
        facts.append(f"p = {math.exp(min(logp, 0.0)):.3g}")
    if entropy is not None:
        facts.append(f"H = {entropy:.3f} nats")
    return Piece("sampled", token["text"], entropy_shade(entropy or 0.0), ", ".join(facts))
