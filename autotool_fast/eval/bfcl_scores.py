"""BFCL's overall scores, and result files that its own scorer reads.

Both aggregates are formed as the leaderboard forms them: a part that was not run counts 0 with its full weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autotool_fast import files
from autotool_fast.chat import ParsedReply
from autotool_fast.eval.records import mean, weighted

V4_WEIGHTS = {"non_live": 0.1, "live": 0.1, "irrelevance": 0.1, "multi_turn": 0.3, "agentic": 0.4}
V3_WEIGHTS = {"non_live": 1 / 3, "live": 1 / 3, "multi_turn": 1 / 3}
_SIMPLE = ("simple_python", "simple_java", "simple_javascript")
_OTHERS = ("multiple", "parallel", "parallel_multiple")
_LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
_MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")


def _by_count(names: Iterable[str], accuracy: Mapping[str, float], counts: Mapping[str, int]) -> float | None:
    names = list(names)
    if any(name not in accuracy for name in names):
        return None
    return sum(accuracy[name] * counts[name] for name in names) / sum(counts[name] for name in names)


def aggregates(accuracy: Mapping[str, float], counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The v3-style and the v4-style overall score out of accuracies (0..1) and numbers of entries by category."""
    simple = mean(accuracy.get(name) for name in _SIMPLE)
    asked = [simple, *(accuracy.get(name) for name in _OTHERS)]
    multi_turn = mean(accuracy.get(name) for name in _MULTI_TURN)
    v4 = {
        "non_live": mean(asked),
        "live": _by_count(_LIVE, accuracy, counts),
        "irrelevance": mean([accuracy.get("irrelevance"), accuracy.get("live_irrelevance")]),
        "multi_turn": multi_turn,
        "agentic": None,
    }
    v3 = {
        "non_live": mean([*asked, accuracy.get("irrelevance")]),
        "live": _by_count((*_LIVE, "live_irrelevance", "live_relevance"), accuracy, counts),
        "multi_turn": multi_turn,
    }
    return [weighted("v3 overall", v3, V3_WEIGHTS), weighted("v4 overall", v4, V4_WEIGHTS)]


def result_text(reply: ParsedReply | None) -> str:
    """A reply as the leaderboard's Qwen function-calling handler reads it; calls, or else the text."""
    if reply is None:
        return ""
    if not reply.calls:
        return reply.text
    return "\n".join(f"<tool_call>\n{call.to_json()}\n</tool_call>" for call in reply.calls)


def group_of(category: str) -> str:
    """The folder of a category's result file."""
    if category.startswith("multi_turn"):
        return "multi_turn"
    return "live" if category.startswith("live") else "non_live"


def export(rows: Iterable[Mapping[str, Any]], folder: Path, model: str) -> list[Path]:
    """Write `result/<model>/<group>/BFCL_v4_<category>_result.json` for `bfcl evaluate`.

    Args:
        rows: result rows of one mode.
        folder: what BFCL_PROJECT_ROOT will point at.
        model: a name out of BFCL's registry whose handler reads Qwen tool calls.

    Returns:
        The files written.
    """
    by_category: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        entry = {
            "id": row["id"],
            "result": row["record"]["result"],
            "input_token_count": row["prompt_tokens"] or 0,
            "output_token_count": row["output_tokens"] or 0,
            "latency": row["seconds"],
        }
        by_category.setdefault(row["category"], []).append(entry)
    written = []
    for category, entries in by_category.items():
        path = folder / "result" / model.replace("/", "_") / group_of(category) / f"BFCL_v4_{category}_result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
        written.append(path)
    return written
