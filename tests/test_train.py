"""The trainer from the command line to the report: same seed, Ctrl-C, stages one at a time, bad input.

"Equal" is bit for bit: weights, metrics without clock readings, labels, prompts, results, transcripts.
"""

from __future__ import annotations

import errno
import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import FILES, MODELS, ctrl_c_at, tensors_of, write_preset
from transformers import AutoModelForCausalLM, AutoTokenizer

from autotool_fast import checkpoint
from autotool_fast.chat import ChatFormat
from autotool_fast.config import STAGES
from autotool_fast.metrics import MetricsWriter, read_rows, strip_timings
from autotool_fast.rollout.driver import RolloutLimits, rollout
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.tasks.world import World
from autotool_fast.train import main

torch.set_num_threads(1)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
METRICS_DOC = Path(__file__).parent.parent / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    return str(write_preset(tmp_path_factory.mktemp("preset")))


@pytest.fixture(scope="module")
def complete(preset, tmp_path_factory) -> Path:
    """A run of all stages without a stop."""
    out = tmp_path_factory.mktemp("complete") / "run"
    assert main(["--preset", preset, "--out", str(out)]) == 0
    return out


def metric_lines(run: Path) -> list[str]:
    return [json.dumps(strip_timings(row)) for row in read_rows(run / "metrics.jsonl")]


def assert_equal_runs(run: Path, reference: Path) -> None:
    assert metric_lines(run) == metric_lines(reference)
    for name in FILES:
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    for name in MODELS:
        assert tensors_of(run / "models" / name) == tensors_of(reference / "models" / name), name
    for stage in STAGES:
        marker = Path("stages") / f"{stage}.json"
        assert (run / marker).read_bytes() == (reference / marker).read_bytes(), stage


class _Page(html.parser.HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.loads += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith(("#", "data:"))
        ]


@pytest.mark.slow
def test_all_stages_leave_their_results(complete):
    rows = read_rows(complete / "metrics.jsonl")
    counts = {stage: sum(row["stage"] == stage for row in rows) for stage in STAGES}
    # refine: 9 prompts in batches of 4 are 3 steps, 2 rounds
    assert counts == {"base": 140, "label": 0, "warmup": 4, "distill": 4, "refine": 6, "rl": 5, "eval": 0}
    results = json.loads((complete / "results.json").read_text())
    assert set(results["models"]) == set(MODELS)
    assert all(set(modes) == {"auto", "think", "no_think"} for modes in results["models"].values())
    labels = [json.loads(line)["label"] for line in (complete / "labels.jsonl").read_text().splitlines()]
    assert len(labels) == 16
    assert {"short", "long"} & set(labels)
    page = (complete / "report.html").read_text()
    parser = _Page()
    parser.feed(page)
    assert not parser.loads
    assert "AutoTool" in page
    stages = {json.loads(line)["stage"] for line in (complete / "transcripts.jsonl").read_text().splitlines()}
    assert stages == {"rl", "eval"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_stages_run_on_a_gpu(tmp_path, preset):
    assert main(["--preset", preset, "--out", str(tmp_path / "run"), "--device", "cuda"]) == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "rl"]
    assert len(rows) == 5
    # Two float32 forward passes in different batch shapes, by cuBLAS (no TF32 by default).
    assert all(row["mismatch/max"] <= 1e-4 for row in rows)


@pytest.mark.slow
def test_the_rl_rows_hold_the_measurements_of_the_method(complete):
    rows = [row for row in read_rows(complete / "metrics.jsonl") if row["stage"] == "rl"]
    for row in rows:
        assert 0 <= row["mismatch/max"] <= 1e-5  # sampler and trainer, both float32
        assert row["beta/long"] >= 0.0
    assert rows[0]["beta/long"] == 0.01
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2, 4, 5]
    assert all(row["time/rollout"] > 0 for row in rows)


@pytest.mark.slow
def test_every_metric_of_a_run_is_documented(complete):
    documented = re.findall(r"^\| `([^`]+)` \|", METRICS_DOC.read_text(), flags=re.MULTILINE)
    patterns = [re.compile(re.sub(r"<\w+>", r"[\\w]+", name)) for name in documented]
    written = {name for row in read_rows(complete / "metrics.jsonl") for name in row}
    undocumented = [name for name in sorted(written) if not any(p.fullmatch(name) for p in patterns)]
    assert not undocumented
    stale = [p.pattern for p in patterns if not any(p.fullmatch(name) for name in written)]
    # Present only where a reply of the kind was sampled, or a checkpoint was written in time for a later row.
    sampled = {"entropy/long", "entropy/short", "gate/long", "gate/short", "tokens/long", "tokens/short"}
    # Two with a rollout server, one while something is wrong.
    assert set(stale) <= sampled | {"mismatch/kl", "mismatch/capped", "alarm/[\\w]+"}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["models/rl", "checkpoints/rl/step-00000004/model"])
def test_saved_models_load_anywhere_and_generate_what_the_engine_samples(complete, part):
    model = AutoModelForCausalLM.from_pretrained(complete / part, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(complete / part)
    chat = ChatFormat(tokenizer)
    tasks = World(("set", "hop"), 4).grid(1, "test", "generate")
    engine = SlotEngine(model, slots=4, max_len=256)
    limits = RolloutLimits(max_turns=1, max_new_tokens=48, max_turn_tokens=48)
    trajectories = rollout(engine, tasks, chat=chat, group_size=1, seed=0, step=0, temperature=0.0, limits=limits)
    for task, trajectory in zip(tasks, trajectories, strict=True):
        text = tokenizer.apply_chat_template(
            list(task.messages), tools=list(task.tools), tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        prompt.pop("token_type_ids", None)
        ids = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0].tolist()
        assert ids == trajectory.ids.tolist(), task.id


@pytest.mark.slow
def test_ctrl_c_in_every_stage_and_resuming_equals_not_stopping(complete, preset, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["--preset", preset, "--out", str(out)]
    # The last steps of base and rl are in: there the finished stage is saved first.
    stops = [
        ("base", 17),
        ("base", 140),
        ("label", 5),
        ("warmup", 2),
        ("distill", 2),
        ("refine", 3),
        ("rl", 3),
        ("rl", 5),
        ("eval", 2),
    ]
    for number, (stage, step) in enumerate(stops):
        capsys.readouterr()
        with ctrl_c_at(stage, step):
            assert main([*command, *(["--resume"] if number else [])]) == 130, stage
        shown = capsys.readouterr().err.splitlines()
        assert shown[-1].startswith("interrupted")
        assert not any(line.startswith("label") for line in shown if stage == "base")  # nothing begins after a stop
        lines = [line for line in shown if "interrupted" in line]
        assert len(lines) == 1
        assert str(out) in lines[0]
        assert "--resume" in lines[0]
        assert (out / "report.html").exists()
        last = {"base": 140, "rl": 5}.get(stage) == step
        assert (out / "stages" / f"{stage}.json").exists() == last
    assert main([*command, "--resume"]) == 0
    assert_equal_runs(out, complete)


@pytest.mark.slow
def test_stages_one_at_a_time_equal_all_together(complete, preset, tmp_path):
    out = tmp_path / "run"
    for number, stage in enumerate(STAGES):
        resume = ["--resume"] if number else []
        assert main(["--preset", preset, "--out", str(out), "--stages", stage, *resume]) == 0
        done = [name for name in STAGES if (out / "stages" / f"{name}.json").exists()]
        assert done == list(STAGES[: number + 1])
    assert_equal_runs(out, complete)


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_and_resuming_in_another_process(complete, preset, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "autotool_fast.train", "--preset", preset, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    lines = [process.stderr.readline()]
    process.send_signal(signal.SIGINT)
    lines += process.stderr.read().splitlines()
    assert lines[0].startswith("base ")
    assert process.wait() == 130
    assert [line for line in lines if "--resume" in line] == [lines[-1]]
    assert not any("Traceback" in line for line in lines)
    assert len(read_rows(out / "metrics.jsonl")) < 140
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=ENVIRONMENT)
    assert resumed.returncode == 0, resumed.stderr
    assert "AutoTool RL" in resumed.stdout
    assert "report: " in resumed.stdout
    assert_equal_runs(out, complete)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_what_was_saved_resumes(preset, tmp_path, capsys):
    steps = ["--base.steps", "14", "--base.checkpoint-every", "4", "--stages", "base"]
    command = ["--preset", preset, "--out", str(tmp_path / "run"), *steps]
    with ctrl_c_at("base", 10, times=2):
        assert main(command) == 130
    assert "interrupted at once" in capsys.readouterr().err
    assert checkpoint.latest(tmp_path / "run" / "checkpoints" / "base").step == 8
    assert main([*command, "--resume"]) == 0
    assert main(["--preset", preset, "--out", str(tmp_path / "whole"), *steps]) == 0
    assert tensors_of(tmp_path / "run" / "models" / "base") == tensors_of(tmp_path / "whole" / "models" / "base")
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "whole")


@pytest.mark.parametrize(("flags", "hint"), [([], "with --resume to"), (["--overwrite"], "in place of --overwrite to")])
def test_the_way_to_continue_after_a_stop_at_once_is_a_command_that_works(tmp_path, capsys, monkeypatch, flags, hint):
    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("autotool_fast.train.RunFolder.create", stopped)
    assert main(["--out", str(tmp_path / "run"), *flags]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert hint in lines[0]


@pytest.fixture
def cold(complete, preset, tmp_path) -> list[str]:
    """Options of a short run that takes over the trained base model and goes straight to RL."""
    reuse = str(complete / "models" / "base")
    options = ["--stages", "base,rl", "--start", "cold", "--refine.no-enabled", "--base.reuse", reuse]
    return ["--preset", preset, "--out", str(tmp_path / "run"), *options]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_continues_afterwards(cold, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert main([*cold[:2], "--out", str(tmp_path / "whole"), *cold[4:]]) == 0
    write = MetricsWriter.write

    def full(self, stage, step, *args, **kwargs):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, stage, step, *args, **kwargs)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", full)
        assert main(cold) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "No space left on device" in line
    assert "--resume" in line
    assert main([*cold, "--resume"]) == 0
    assert tensors_of(run / "models" / "rl") == tensors_of(tmp_path / "whole" / "models" / "rl")
    assert metric_lines(run) == metric_lines(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["none", "fixed", "adaptive", "decoupled-fixed", "decoupled"])
def test_every_arm_runs_from_a_cold_start(cold, tmp_path, arm):
    options = ["--arm", arm, "--rl.steps", "2", "--rl.eval-every", "0", "--rl.target-mode", "relative"]
    assert main([*cold, *options]) == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "rl"]
    assert len(rows) == 2
    assert rows[0]["target/long"] not in (0.0, 0.2)  # measured
    moved = rows[1]["beta/long"] != rows[0]["beta/long"]
    assert moved == (arm == "decoupled") if arm != "adaptive" else moved
    assert not (tmp_path / "run" / "models" / "warmup").exists()


@pytest.mark.slow
def test_models_that_came_after_an_evaluation_are_evaluated_on_resuming(cold, tmp_path, capsys):
    def evaluated() -> list[str]:
        return list(json.loads((tmp_path / "run" / "results.json").read_text())["models"])

    cold += ["--rl.steps", "1"]
    assert main([*cold, "--stages", "base,eval"]) == 0
    assert evaluated() == ["base"]
    before = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    assert main([*cold, "--resume", "--stages", "base,eval"]) == 0
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns == before  # nothing new
    assert main([*cold, "--resume", "--stages", "base,rl,eval"]) == 0
    assert evaluated() == ["base", "rl"]
    said = capsys.readouterr().err
    assert said.count("eval: finished before") == 1


@pytest.mark.slow
def test_a_damaged_model_of_the_run_is_one_line(cold, tmp_path, capsys):
    assert main([*cold, "--stages", "base"]) == 0
    (tmp_path / "run" / "models" / "base" / "model.safetensors").write_bytes(b"cut short")
    line = error_line(capsys, *cold, "--resume", "--stages", "rl")
    assert str(tmp_path / "run" / "models" / "base") in line


@pytest.mark.slow
def test_non_finite_weights_end_the_run_with_one_line(cold, capsys, monkeypatch):
    import autotool_fast.pipeline as pipeline

    load = pipeline.load_model

    def broken(folder, dtype, **options):
        model = load(folder, dtype, **options)
        if folder.parent.parent.name == "run":
            model.get_input_embeddings().weight.data[:] = float("nan")
        return model

    monkeypatch.setattr(pipeline, "load_model", broken)
    assert main(cold) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "not finite" in line


def error_line(capsys, *argv: str) -> str:
    """The one line that a command which must be refused prints."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--rl.lrr", "1"], ["--rl.lrr", "did you mean --rl.lr?"]),
        (["--armm", "none"], ["--armm", "--arm"]),
        (["--arm", "decopled"], ["arm", "'decoupled'"]),
        (["--rl.lr", "fast"], ["rl.lr", "a number"]),
        (["--rl.lr", "-1"], ["rl.lr", "greater than 0"]),
        (["--rl.wrong-short", "2"], ["rl.correct_short", "rl.wrong_short"]),
        (["--preset", "smoek"], ["smoek", "'smoke'"]),
        (["--preset", "missing/own.toml"], ["missing/own.toml", "No such file"]),
        (["--stages", "rl"], ["stage rl", "needs stage warmup", "--resume"]),
        (["--stages", "base,rl", "--start", "cold"], ["stage rl", "needs stage refine"]),
        (["--stages", "eval"], ["no model to evaluate"]),
        (["--base.reuse", "nowhere"], ["base.reuse (nowhere)", "holds no model", "models/base"]),
        (["--world.families", "hop", "--world.max-difficulty", "0"], ["world.max_difficulty", "raise it"]),
        (["--resume"], ["holds no run to resume", "without --resume"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, argv, parts):
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, "--out", "run", *argv)
    for part in parts:
        assert part in line
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("argv", "stage", "text"),
    [
        ([], "distill", "9 steps"),  # 4 of the warm-up and 5 of RL
        (["--start", "cold"], "distill", "5 steps"),
        (["--distill.steps", "7"], "distill", "7 steps"),
        (["--start", "cold"], "warmup", "none"),
        (["--base.reuse", "mine"], "base", "none: the model in mine is taken over"),
        (["--refine.no-enabled"], "refine", "off: all 9 prompts"),
        (["--resume", "--stages", "rl"], "rl", "5 steps"),
    ],
)
def test_the_plan_says_what_the_stages_will_do(tmp_path, monkeypatch, capsys, preset, argv, stage, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert main(["--preset", preset, "--distill.steps", "0", *argv, "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"stage {stage} ")]
    assert len(lines) == 1
    assert text in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["below a file", "refused by the system"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys, kind):
    (tmp_path / "file").write_text("kept")
    out = str(tmp_path / "file" / "run") if kind == "below a file" else "/proc/run"
    assert out in error_line(capsys, "--out", out)
    assert (tmp_path / "file").read_text() == "kept"


def folder_with_a_run(capsys, out: Path) -> dict[str, bytes]:
    """A run folder with something in it, through the program's own door."""
    from autotool_fast.config import parse_args
    from autotool_fast.runs import RunFolder

    with RunFolder.create(parse_args(["--out", str(out)])) as run:
        (run.path / "models" / "base").mkdir(parents=True)
        (run.path / "models" / "base" / "config.json").write_text("{}")
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "--resume to continue it, --overwrite to replace it"),
        (["--resume", "--overwrite"], "cannot be combined"),
        (["--resume", "--seed", "7"], "was started with other settings: seed 0 -> 7"),
        (["--overwrite", "--stages", "rl"], "stage rl of a new run needs stage warmup"),
        (["--overwrite", "--base.reuse", "nowhere"], "holds no model"),
        (["--overwrite", "--base.reuse", "{out}/models/base"], "is inside the run that --overwrite removes"),
        (["--overwrite", "--world.families", "hop", "--world.max-difficulty", "0"], "world.max_difficulty"),
        pytest.param(
            ["--overwrite", "--device", "cuda"],
            "error: device: torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_refused_command_leaves_an_existing_run_as_it_is(tmp_path, capsys, argv, part):
    out = tmp_path / "run"
    before = folder_with_a_run(capsys, out)
    line = error_line(capsys, "--out", str(out), *(a.format(out=out) for a in argv))
    assert part in line
    assert contents(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", [s for s in STAGES if s not in ("base", "refine")])
def test_a_stage_whose_input_is_missing_names_the_stage_to_run(tmp_path, capsys, preset, stage):
    out = ["--preset", preset, "--out", str(tmp_path / "run")]
    folder = [*out, "--base.steps", "6"]
    from autotool_fast.config import parse_args
    from autotool_fast.runs import RunFolder

    RunFolder.create(parse_args(folder)).close()
    line = error_line(capsys, *folder, "--resume", "--stages", stage)
    first = {"label": "base", "warmup": "label", "distill": "label", "rl": "refine", "eval": "base"}[stage]
    assert f"run stage {first} first" in line


@pytest.mark.parametrize("damage", ["empty config", "no weights", "not JSON"])
def test_a_base_model_that_cannot_be_loaded_is_one_line(tmp_path, capsys, preset, damage):
    source = tmp_path / "source"
    source.mkdir()
    text = {"empty config": "{}", "no weights": '{"model_type": "qwen3"}', "not JSON": "{"}[damage]
    (source / "config.json").write_text(text)
    line = error_line(capsys, "--preset", preset, "--out", str(tmp_path / "run"), "--base.reuse", str(source))
    assert f"base.reuse ({source})" in line


LIGHT = """
import atexit, sys
heavy = {"torch", "transformers", "numpy", "triton"}
atexit.register(lambda: print("HEAVY", sorted(heavy & set(sys.modules))))
from autotool_fast.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--dry-run"], 0),
        (["--preset", "smoke", "--dry-run", "--stages", "base,eval"], 0),
        (["--rl.lrr", "1"], 2),
        (["--rl.lr", "-1"], 2),
        (["--stages", "rl"], 2),
        (["--base.reuse", "nowhere"], 2),
        (["--out", "/proc/run"], 2),
        (["--out", "."], 2),  # holds a file that is not a run
    ],
)
def test_answers_that_need_no_torch_come_at_once(tmp_path, argv, code):
    (tmp_path / "mine.txt").write_text("kept")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *argv], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    seconds = time.perf_counter() - begin
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (1 if code else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    # 0.3 s on a quiet machine; loading torch alone takes about 2 s there.
    assert seconds < 2.0
