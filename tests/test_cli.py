"""The command line: options over preset over defaults, one clear line for every mistake, no torch."""

import importlib
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from autotool_fast.cli import PRESETS, load_preset, preset_settings
from autotool_fast.config import STAGES, parse_args
from autotool_fast.errors import UserError
from autotool_fast.train import main

LIGHT = """
import sys, atexit
from autotool_fast.errors import UserError
heavy = {"torch", "transformers", "numpy", "triton"}
atexit.register(lambda: print("HEAVY", sorted(heavy & set(sys.modules))))
from autotool_fast.config import parse_args
from autotool_fast.plan import describe
try:
    print(describe(parse_args(sys.argv[1:])))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def run(*argv: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-c", LIGHT, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def error_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_override_the_preset_and_the_preset_the_defaults(tmp_path):
    preset = tmp_path / "own.toml"
    preset.write_text("seed = 5\n[rl]\nlr = 0.5\nsteps = 7\n")
    config = parse_args(["--preset", str(preset), "--rl.lr", "0.25"])
    assert (config.rl.lr, config.rl.steps, config.seed, config.rl.group_size) == (0.25, 7, 5, 8)
    assert config.preset == str(preset)
    assert config.out == "runs/own"


@pytest.mark.parametrize("name", sorted(p.stem for p in PRESETS.glob("*.toml")))
def test_shipped_presets_are_valid(name):
    needs_data = name == "qwen2.5-7b-bfcl"
    config = load_preset(name, {"data": {"path": "d"}} if needs_data else None)
    assert config.preset == name
    assert parse_args(["--preset", name, *(["--data", "d"] if needs_data else [])]) == config


def test_a_preset_that_needs_data_says_so():
    with pytest.raises(UserError, match="add --data"):
        parse_args(["--preset", "qwen2.5-7b-bfcl"])


def test_no_options_mean_the_mini_preset():
    assert parse_args([]) == load_preset("mini")


@pytest.mark.parametrize(
    "argv",
    [
        ["--stages", "base,label"],
        ["--stages", "base", "label"],
        ["--stages=label,base"],
        ["--stages", "base,", "label"],
    ],
)
def test_lists_may_be_separated_by_commas_or_blanks(argv):
    assert parse_args([*argv, "--seed", "1"]).stages == ("base", "label")



def test_what_a_preset_sets_is_that_of_the_presets_it_extends_and_its_own(tmp_path):
    (tmp_path / "one.toml").write_text("arm = 'none'\n[rl]\nsteps = 5\nlr = 1e-3\n")
    path = tmp_path / "two.toml"
    path.write_text(f"extends = {str(tmp_path / 'one.toml')!r}\n[rl]\nsteps = 7\n")
    assert preset_settings(str(path)) == {"arm": "none", "rl": {"steps": 7, "lr": 1e-3}}


def test_dashes_and_underscores_are_the_same():
    assert parse_args(["--rl.grad_clip", "2", "--dry-run"]) == parse_args(
        ["--rl.grad-clip", "2", "--dry_run"]
    )


def test_switches_literals_and_unions():
    line = "--refine.no-enabled --arm none --start cold --rl.normalize 64 --resume"
    config = parse_args(line.split())
    assert not config.refine.enabled
    assert config.resume
    assert (config.arm, config.start, config.rl.normalize) == ("none", "cold", 64.0)
    assert parse_args(["--rl.normalize", "tokens"]).rl.normalize == "tokens"
    assert parse_args(["--rl.malformed", "-2"]).rl.malformed == -2.0


@pytest.mark.parametrize(
    ("option", "guess"),
    [
        ("--rl.lrr", "--rl.lr"),
        ("--lr", "--rl.lr"),
        ("--r1.group-size", "--rl.group-size"),
        ("--stage", "--stages"),
        ("--dryrun", "--dry-run"),
        ("--overwite", "--overwrite"),
    ],
)
def test_an_unknown_option_names_the_nearest(option, guess):
    assert f"did you mean {guess}?" in error_of(option, "1")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--rl.lr abc", ("--rl.lr", "a number", "'abc'")),
        ("--rl.lr -1", ("rl.lr", "greater than 0")),
        ("--rl.lr nan", ("--rl.lr",)),
        ("--rl.lr", ("--rl.lr", "needs a value")),
        ("--rl.lr 1 2", ("'2'", "one value")),
        ("--rl.normalize mean", ("--rl.normalize", "sequences", "a number")),
        ("--seed 1.5", ("--seed", "whole number")),
        ("--arm decopled", ("--arm", "'decoupled'")),
        ("--stages base,rll", ("--stages", "'rl'")),
        ("--stages --seed 1", ("--stages", "needs a value")),
        ("--resume yes", ("'yes'", "switch")),
        ("base", ("'base'", "--")),
        ("-x", ("-x",)),
        ("--preset smok", ("--preset", "'smoke'")),
        ("--preset missing/file.toml", ("missing/file.toml", "No such file")),
    ],
)
def test_a_mistake_is_one_line_that_says_what_and_where(argv, parts):
    message = error_of(*argv.split())
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[rl]\nlrr = 1\n", ("rl.lrr", "'rl.lr'")),
        ("[rl\n", ("not valid TOML", "line 1")),
        ("a = " + "9" * 5000, ("not valid TOML", "digits")),
        ("a = " + "[" * 5000, ("not valid TOML", "nested too deeply")),
        ("[rl]\nlr = -1\n", ("rl.lr", "greater than 0")),
        ("rl = 3\n", ("rl", "table")),
        ('preset = "mini"\n', ("preset",)),
    ],
)
def test_a_mistake_in_a_preset_names_the_file(tmp_path, text, parts):
    preset = tmp_path / "p.toml"
    preset.write_text(text)
    message = error_of("--preset", str(preset))
    for part in (str(preset), *parts):
        assert part in message


def test_help_is_complete_quick_and_light():
    # Processor time: other work on the machine must not decide.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert "HEAVY []" in result.stdout
    for word in ("--rl.beta-long", "--arm", "--stages", "nats", "(default: 0.01)", "runs/mini"):
        assert word in result.stdout


def test_help_shows_the_preset_in_force():
    assert "runs/smoke" in run("--preset", "smoke", "--help").stdout


def test_the_installed_commands_exist():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    commands = dict(re.findall(r'^(autotool-\w+) = "([\w.:]+)"$', text, re.MULTILINE))
    assert set(commands) == {f"autotool-{name}" for name in ("train", "eval", "chat", "data")}
    for place in commands.values():
        module, _, name = place.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_checking_an_environment_loads_nothing_heavy(tmp_path):
    program = LIGHT.replace("import describe", "import check").replace("print(describe(", "print(check(")
    argv = ["--model", "m", "--environment", "bfcl", "--start", "cold", "--stages", "rl"]
    command = [sys.executable, "-c", program, *argv, "--environment.path", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, "HEAVY []" in result.stdout) == (2, True)
    assert "holds no folder bfcl_eval" in result.stderr


def test_plan_and_errors_load_nothing_heavy():
    plan = run("--dry-run", "--preset", "smoke")
    assert plan.returncode == 0
    assert "HEAVY []" in plan.stdout
    assert all(f"stage {stage}" in plan.stdout for stage in STAGES)
    wrong = run("--rl.lrr", "1")
    assert wrong.returncode == 2
    assert "HEAVY []" in wrong.stdout
    assert wrong.stderr == "unknown option --rl.lrr; did you mean --rl.lr?\n"


def test_a_preset_may_extend_another_section_by_section(tmp_path):
    (tmp_path / "base.toml").write_text('arm = "fixed"\n[rl]\nlr = 1e-5\nsteps = 7\n')
    (tmp_path / "mine.toml").write_text(f'extends = "{tmp_path / "base.toml"}"\n[rl]\nsteps = 9\n')
    config = load_preset(str(tmp_path / "mine.toml"))
    assert (config.arm, config.rl.lr, config.rl.steps) == ("fixed", 1e-5, 9)
    assert config.out == "runs/mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "mini-ful"', "extends: no preset 'mini-ful'; did you mean 'mini-full'?"),
        ("extends = 3", "extends: must be the name of a preset"),
        ('extends = "{self}"', "extends: goes round in circles"),
        ('preset = "mini"', "a preset cannot name itself"),
    ],
)
def test_a_preset_that_extends_nothing_usable_is_one_line(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("{self}", str(path)))
    with pytest.raises(UserError) as error:
        load_preset(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-7b-bfcl", "qwen2.5-1.5b", "qwen3-0.6b"])
def test_the_presets_of_real_models_name_the_source_of_every_value(name):
    for line in (PRESETS / f"{name}.toml").read_text().splitlines():
        if "=" in line and not line.startswith(("#", "extends")):
            assert "  # " in line, line


def test_the_papers_settings_are_in_its_preset():
    config = load_preset("qwen2.5-7b")
    rl = config.rl
    assert (rl.target_short, rl.target_long, rl.beta_short, rl.beta_long) == (0.1, 0.2, 0.0, 0.01)
    assert (rl.correct_short, rl.correct_long, rl.wrong_long, rl.wrong_short) == (1.0, 0.5, -0.5, -1.0)
    assert (config.label.k, config.label_rule, config.label.teacher_model) == (8, "any", "Qwen/Qwen3-32B")
    assert (config.arm, rl.normalize, rl.entropy_scope) == ("decoupled", "sequences", "reply")
    assert config.refine.prompts == 21000
    for smaller in ("qwen2.5-1.5b", "qwen3-0.6b"):
        assert load_preset(smaller).rl == rl


def test_a_preset_may_leave_the_model_to_the_command_line(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[lora]\nrank = 4\n[data]\npath = 'somewhere'\n")
    config = parse_args(["--preset", str(path), "--model", "m"])
    assert (config.model.path, config.lora.rank, config.data.path) == ("m", 4, "somewhere")
    with pytest.raises(UserError, match="needs a pretrained model"):
        parse_args(["--preset", str(path), "--arm", "none"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nonexist"], "model.path (/nonexist): is no folder and no hub name"),
        (["--model", "{tmp}"], "holds no config.json; give the folder of a whole Hugging Face model"),
        (["--model", "m", "--data", "{tmp}"], "holds no sft.jsonl; write the folder with"),
        (["--model", "m", "--data", "{tmp}/untested"], "test.jsonl is empty; write the folder with"),
        (["--preset", "qwen2.5-7b", "--model.max-positions", "40000"], "is beyond the 32768 positions of the model"),
    ],
)
def test_a_model_or_data_that_cannot_be_loaded_leaves_the_old_run_alone(tmp_path, capsys, options, message):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    untested = tmp_path / "untested"
    untested.mkdir()
    for part in ("sft", "rl", "test"):
        (untested / f"{part}.jsonl").write_text("" if part == "test" else "{}\n")
    arguments = [option.replace("{tmp}", str(tmp_path)) for option in options]
    assert main([*arguments, "--out", str(out), "--overwrite", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (out / "config.json").exists()
