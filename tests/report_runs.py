"""Made-up run folders for the report's tests: the trainer's file formats, with a dip and a recovery in RL."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

from autotool_fast.cli import load_preset
from autotool_fast.config import to_dict

FAMILIES = {"set": (0,), "hop": range(1, 7), "reg": range(1, 7), "cups": range(1, 7), "irrelevant": (0, 1)}


def band(k: float) -> str:
    return "easy" if k < 1 else "medium" if k <= 3 else "hard"


def think_rate(step: int, k: int, arm: str = "decoupled") -> float:
    """A dip over all difficulties, then a recovery of the hard ones; without constraints the dip stays."""
    start = 0.5 * math.exp(-step / 20)
    if arm == "none":
        return start
    back = 1 / (1 + math.exp(-(step - 120 - 6 * (6 - k)) / 9)) if k >= 2 else 0.0
    return min(1.0, start + 0.97 * back)


def rl_row(step: int, rng: random.Random, arm: str = "decoupled") -> dict:
    noise = lambda size: rng.gauss(0, size)  # noqa: E731
    clip = lambda v: min(1.0, max(0.0, v))  # noqa: E731
    row: dict = {"stage": "rl", "step": step, "seconds": 0.62 * (step + 1)}
    for k in range(7):
        rate = clip(think_rate(step, k, arm) + noise(0.04))
        direct = (1.0, 0.55, 0.17, 0.13, 0.12, 0.12, 0.11)[k]
        row[f"think_rate/k{k}"] = rate
        row[f"tokens/k{k}"] = 9 + rate * (8 + 2 * k)
        row[f"acc/k{k}"] = clip(rate * 0.97 + (1 - rate) * direct + noise(0.03))
    for metric in ("think_rate", "acc"):
        for name, ks in (("easy", (0,)), ("medium", (1, 2, 3)), ("hard", (4, 5, 6))):
            row[f"{metric}/{name}"] = sum(row[f"{metric}/k{k}"] for k in ks) / len(ks)
    row["acc/all"] = 0.6 * row["acc/easy"] + 0.2 * row["acc/medium"] + 0.2 * row["acc/hard"]
    think = 0.2 * row["think_rate/medium"] + 0.2 * row["think_rate/hard"] + 0.6 * row["think_rate/easy"]
    row |= {
        "reward/mean": 2 * row["acc/all"] - 1 - 0.4 * think + noise(0.03),
        "tokens/response": 10 + 16 * think + noise(0.4),
        "tokens/long": 24 + noise(0.5),
        "tokens/short": 9 + noise(0.1),
        "entropy/long": 0.06 + 0.05 * math.exp(-step / 40) + abs(noise(0.01)),
        "entropy/short": 0.04 * math.exp(-step / 60) + abs(noise(0.004)),
        "entropy/mode": 0.65 * math.exp(-((step - 125) ** 2) / 1800) + 0.5 * math.exp(-step / 15) + 0.03,
        "target/long": 0.15,
        "target/short": 0.1,
        "beta/long": 0.0 if arm == "none" else 0.05 + 0.15 * math.exp(-((step - 110) ** 2) / 2500),
        "beta/short": 0.0,
        "loss/policy": noise(0.05),
        "grad_norm": abs(0.6 + noise(0.2)),
        "mismatch/max": 10 ** (-6 + noise(0.2)),
        "groups/constant": clip(0.4 + noise(0.08)),
        "time/rollout": 310 + noise(20),
        "time/logprob": 60 + noise(4),
        "time/update": 205 + noise(12),
    }
    return row


def metric_rows(rl_steps: int, seed: int = 0, arm: str = "decoupled") -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for stage, steps, floor in (("base", 1400, 0.08), ("warmup", 150, 0.05), ("distill", 150, 0.04)):
        for step in range(0, steps, 5):
            loss = floor + (4.5 if stage == "base" else 0.9) * math.exp(-step / (steps / 8))
            loss *= 1 + rng.gauss(0, 0.05)
            timing = {"time/step": 118 + rng.gauss(0, 5)}
            rows.append(
                {"stage": stage, "step": step, "seconds": 0.12 * (step + 1), "loss/sft": loss} | timing
            )
    rows += [rl_row(step, rng, arm) for step in range(rl_steps)]
    for row in rows[-rl_steps::20] if rl_steps else ():
        row["eval/accuracy"], row["eval/tokens"] = row["acc/all"], row["tokens/response"]
        row |= {f"eval/{key}": v for key, v in row.items() if key.startswith(("acc/", "think_rate/"))}
    return rows


def summaries() -> dict[str, dict]:
    """What the stages record when they finish."""
    table = []
    for k, share in enumerate((1.0, 0.57, 0.15, 0.13, 0.13, 0.12, 0.11)):
        short = round(170 * share)
        row = {"difficulty": k, "prompts": 170, "short": short, "long": max(0, 165 - short), "drop": 5}
        row |= {"no_think_accuracy": share, "think_accuracy": 0.97, "no_think_pass": 1.0, "think_pass": 1.0}
        table.append(row)
    table.append({**table[0], "difficulty": None, "prompts": 1190})
    counts = {"pool": 90, "kept": 45, "dropped_too_easy": 20, "dropped_too_hard": 5, "dropped_variance": 20}
    counts["kept_constant"] = 3
    refine = {**counts, "pool": 630, "by_difficulty": {str(k): counts for k in range(7)}}
    label = {"rule": "threshold", "k": 8, "table": table}
    return {"base": {}, "label": label, "warmup": {}, "distill": {}, "refine": refine, "rl": {}, "eval": {}}


def result_cells(accuracy, think: bool | None, rate=None) -> dict:
    """One model in one mode: accuracy(k) with think None meaning auto with thinking rate(k)."""
    cells = []
    for family, ks in FAMILIES.items():
        for k in ks:
            share = rate(k) if think is None else float(think)
            length = 9 + k * 0.2 + share * (8 + 2 * k)
            acc = accuracy(k, share)
            cells.append(
                {
                    "family": family,
                    "difficulty": k,
                    "n": 100,
                    "accuracy": acc,
                    "think_rate": share,
                    "tokens": length,
                }
                | {"think_tokens": share * 2 * k, "prompt_tokens": 20.0, "malformed": 0.0}
                | {"acu": 100 * acc / (0.1036 * length)}
            )

    def pool(part: list[dict]) -> dict:
        cell = {
            key: sum(c[key] for c in part) / len(part)
            for key in part[0]
            if key not in ("family", "difficulty")
        }
        return cell | {"n": 100 * len(part), "acu": 100 * cell["accuracy"] / (0.1036 * cell["tokens"])}

    bands = {b: pool([c for c in cells if band(c["difficulty"]) == b]) for b in ("easy", "medium", "hard")}
    return {"overall": pool(cells), "bands": bands, "cells": cells}


def results(seed: int = 0, arm: str = "decoupled") -> dict:
    routed = 0.05 if arm == "none" else 0.93 - 0.01 * seed

    def skill(direct: float, thought: float):
        def accuracy(k: int, share: float) -> float:
            guess = 1.0 if k == 0 else 0.5 if k == 1 else 0.12
            return share * thought * (1 - 0.02 * k) + (1 - share) * direct * guess

        return accuracy

    models = {}
    for name, direct, thought, rate in (
        ("base", 1.0, 0.95, lambda k: 0.5),
        ("distilled", 0.6, 0.98, lambda k: 1.0),
        ("warmup", 1.0, 0.96, lambda k: 0.05 + 0.05 * k),
        ("rl", 1.0, 0.98, lambda k: 0.01 if k <= 1 else routed),
    ):
        accuracy = skill(direct, thought)
        models[name] = {
            "auto": result_cells(accuracy, None, rate),
            "think": result_cells(accuracy, True),
            "no_think": result_cells(accuracy, False),
        }
    return {
        "models": models,
        "easy_share": 0.6,
        "acu_unit": "accuracy % per million parameters and response token",
    }


def transcript_rows(n: int = 40) -> list[dict]:
    rng = random.Random(1)
    rows = []
    for i in range(n):
        k = i % 7
        mode = "think" if k >= 2 else "no_think"

        def token(text: str, source: int) -> dict:
            entropy = rng.choice([0.001, 0.02, 0.07, 0.15, 0.3, 0.7, 1.3]) if source == 1 else 0.0
            return {"text": text, "source": source, "logp": -entropy / 2, "entropy": entropy}

        prompt = "<|im_start|>user\n[tools] goto set\nmap a d c f b e ; from a hop 3<|im_end|>\n"
        prompt += "<|im_start|>assistant\n"
        tokens = [token(word, 0) for word in re.findall(r"\S+\s*", prompt)]
        reply = f"[{mode}]\n" + (
            "<think>\nneed goto not set . a d b g\n</think>\n" if mode == "think" else ""
        )
        reply += '<tool_call>\n{"name": "goto", "arguments": {"place": "c"}}\n</tool_call>'
        tokens += [token(word, 1) for word in re.findall(r"\S+\s*", reply)]
        tokens += [token("\n<|im_start|>tool\n", 2), token('{"ok": true}', 2), token("<|im_end|>\n", 2)]
        tokens += [token("[no_think]\n", 1), token("done", 1), token("<|im_end|>", 1)]
        rows.append(
            {
                "stage": "rl",
                "step": 20 * (i // 4),
                "task_id": f"hop-{i:04d}",
                "family": "hop",
                "difficulty": k,
            }
            | {
                "mode": mode,
                "correct": i % 3 > 0,
                "reward": 0.5 if i % 3 else -0.5,
                "stop_reason": "finished",
            }
            | {"tokens": tokens}
        )
    return rows


def write_run(
    path: Path,
    rl_steps: int = 200,
    evaluated: bool = True,
    with_transcripts: bool = True,
    seed: int = 0,
    arm: str = "decoupled",
) -> Path:
    """A run folder like the trainer's, complete unless told otherwise."""
    path.mkdir(parents=True)
    config = to_dict(load_preset("mini")) | {"seed": seed, "arm": arm, "out": str(path)}
    (path / "config.json").write_text(json.dumps({"config": config, "versions": {"torch": "2.13.0"}}))
    (path / "stages").mkdir()
    for stage, summary in summaries().items():
        if evaluated or stage not in ("rl", "eval"):
            (path / "stages" / f"{stage}.json").write_text(json.dumps(summary))
    rows = metric_rows(rl_steps, seed, arm)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluated:
        (path / "results.json").write_text(json.dumps(results(seed, arm)))
    if with_transcripts:
        (path / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in transcript_rows()))
    return path
