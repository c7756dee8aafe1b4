"""transcripts.jsonl: sampled episodes, token by token, for people to read (the report draws them)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from autotool_fast import files
from autotool_fast.chat import ChatFormat
from autotool_fast.rewards import RewardTable, reward
from autotool_fast.rollout.records import Trajectory


class Transcripts:
    """Appends trajectories to a JSON-lines file.

    One row per trajectory: stage, step, task_id, family, difficulty, mode, correct, reward, stop_reason, and tokens
    (text, source as in `chat`, log-prob and entropy in nats).
    """

    def __init__(self, path: Path, chat: ChatFormat) -> None:
        self.path, self.chat = path, chat

    def replace(self, stage: str, step: int, trajectories: Sequence[Trajectory], rewards: Sequence[float]) -> None:
        """Write the transcripts of one step, in place of those this stage wrote for it or a later one before."""
        kept = [row for row in self._rows() if row["stage"] != stage or row["step"] < step]
        kept += [self._row(stage, step, t, r) for t, r in zip(trajectories, rewards, strict=True)]
        files.write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def _rows(self) -> list[dict]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]

    def _row(self, stage: str, step: int, trajectory: Trajectory, value: float) -> dict:
        tokens = [
            {
                "text": self.chat.decode([token]),
                "source": int(source),
                "logp": round(float(logp), 5),
                "entropy": round(float(entropy), 5),
            }
            for token, source, logp, entropy in zip(
                trajectory.ids.tolist(), trajectory.source, trajectory.logp, trajectory.entropy, strict=True
            )
        ]
        return {
            "stage": stage,
            "step": step,
            "task_id": trajectory.task.id,
            "family": trajectory.task.family,
            "difficulty": trajectory.task.difficulty,
            "mode": trajectory.mode,
            "correct": trajectory.correct,
            "reward": value,
            "stop_reason": trajectory.stop_reason.value,
            "tokens": tokens,
        }


def one_per_cell(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The first trajectory of every family at its smallest and largest difficulty."""
    cells: dict[tuple[str, int], Trajectory] = {}
    for trajectory in trajectories:
        cells.setdefault((trajectory.task.family, trajectory.task.difficulty), trajectory)
    families = {family: sorted(k for f, k in cells if f == family) for family, _ in cells}
    return [cells[family, k] for family, levels in families.items() for k in dict.fromkeys((levels[0], levels[-1]))]


def rewards_of(trajectories: Sequence[Trajectory], table: RewardTable) -> list[float]:
    """The reward of each trajectory."""
    return [reward(t.length_class, t.correct, table) for t in trajectories]
