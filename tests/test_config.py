"""The settings: defaults, bounds, coercion, unknown keys, the plan."""

import dataclasses
import json

import pytest

from autotool_fast.config import STAGES, Family, ModelConfig, RLConfig, TrainConfig, from_dict, to_dict
from autotool_fast.errors import UserError
from autotool_fast.plan import describe, stage_tokens
from autotool_fast.schema import leaf_paths, nearest


def error_of(**values) -> UserError:
    with pytest.raises(UserError) as caught:
        from_dict(values)
    assert "\n" not in str(caught.value)
    return caught.value


def test_settings_survive_json():
    config = from_dict({"rl": {"lr": 0.25, "normalize": 64}, "stages": ["rl", "base"], "arm": "fixed"})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_setting_has_a_docstring():
    # tyro takes the help text from the source; a field without one would be a bare name in --help.
    import inspect

    def classes(cls):
        yield cls
        for field in dataclasses.fields(cls):
            if field.default_factory is not dataclasses.MISSING:
                yield from classes(field.default_factory)

    for cls in classes(TrainConfig):
        lines = inspect.getsource(cls).splitlines()
        for i, line in enumerate(lines):
            is_field = line.startswith("    ") and ":" in line.split("=")[0] and line[4].isalpha()
            if is_field and " = " in line and "ClassVar" not in line and "field(default_factory" not in line:
                assert lines[i + 1].strip().startswith('"""'), f"{cls.__name__}: {line.strip()}"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rl", "lr", 0.0),
        ("rl", "lr", float("nan")),
        ("rl", "lr", float("inf")),
        ("rl", "lr", "fast"),
        ("rl", "lr", True),
        ("rl", "clip_low", 1.0),
        ("rl", "group_size", 1),
        ("rl", "group_size", 8.0),
        ("rl", "steps", True),
        ("rl", "normalize", "mean"),
        ("rl", "normalize", 0),
        ("rl", "entropy_scope", "all"),
        ("rl", "beta_long", 0.6),
        ("label", "threshold", 1.5),
        ("world", "families", []),
        ("world", "families", ["set", "hops"]),
        ("world", "families", "set"),
        ("model", "head_dim", 15),
        ("refine", "enabled", 1),
        ("rollout", "max_turn_tokens", 1000),
        ("warmup", "warmup_steps", 150),
    ],
)
def test_a_bad_value_names_its_setting(section, key, value):
    assert error_of(**{section: {key: value}}).where == f"{section}.{key}"


def test_sections_that_share_fields_name_themselves():
    assert error_of(distill={"lr": -1}).where == "distill.lr"
    assert error_of(base={"lr": -1}).where == "base.lr"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rl": {"lrr": 1}}, "'rl.lr'"),
        ({"rl": {"beta_lon": 1}}, "'rl.beta_long'"),
        ({"r": {"lr": 1}}, "'rl'"),
        ({"sed": 1}, "'seed'"),
        ({"grup_size": 1}, "'rl.group_size'"),
    ],
)
def test_an_unknown_key_names_the_nearest(values, expected):
    error = error_of(**values)
    assert "unknown setting" in error.what
    assert expected in error.remedy


def test_nothing_close_suggests_nothing():
    assert nearest("zzzzzz", leaf_paths(TrainConfig)) is None


def test_whole_numbers_are_accepted_for_floats_and_lists_for_tuples():
    config = from_dict({"rl": {"lr": 1}, "world": {"families": ["set"]}})
    assert isinstance(config.rl.lr, float)
    assert config.world.families == ("set",)


def test_stages_run_in_order_of_the_method():
    assert from_dict({"stages": ["eval", "rl", "base", "rl"]}).stages == ("base", "rl", "eval")
    assert TrainConfig().stages == STAGES
    assert error_of(stages=[]).where == "stages"


def test_the_start_decides_the_label_rule_unless_one_is_given():
    assert from_dict({"start": "clean"}).label_rule == "threshold"
    assert from_dict({"start": "noisy"}).label_rule == "any"
    assert from_dict({"start": "noisy", "label": {"rule": "threshold"}}).label_rule == "threshold"


def test_resume_and_overwrite_exclude_each_other():
    assert error_of(resume=True, overwrite=True).where == "resume"


def test_run_folder_follows_the_preset():
    assert TrainConfig(preset="dir/own.toml").out == "runs/own"
    assert TrainConfig(preset="smoke", out="x").out == "x"


def test_family_names_are_those_of_the_world():
    from typing import get_args

    from autotool_fast.tasks.families import FAMILIES

    assert set(get_args(Family)) == set(FAMILIES)


def test_reward_defaults_are_those_of_the_reward_table():
    from autotool_fast.rewards import RewardTable

    table = RewardTable()
    for field in dataclasses.fields(table):
        assert getattr(RLConfig(), field.name) == getattr(table, field.name)


def test_parameter_estimate_is_the_model_size():
    import torch

    from autotool_fast.tasks.tiny import build_model, build_tokenizer

    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    for config in (ModelConfig(), ModelConfig(layers=1, hidden=32, heads=4, kv_heads=2, intermediate=40)):
        model = build_model(config, tokenizer, seed=0)
        assert config.parameters(len(tokenizer)) == sum(p.numel() for p in model.parameters())


def test_plan_names_what_will_happen():
    config = from_dict({"stages": ["label", "rl"], "arm": "none", "start": "noisy", "out": "somewhere"})
    text = describe(config)
    for part in ("somewhere", "none, noisy start", "stage label", "rule any", "stage rl", "parameters"):
        assert part in text
    assert "stage base" not in text


def test_token_budget_counts_every_sampled_token():
    rl = {"steps": 3, "prompts_per_step": 2, "group_size": 4}
    values = {
        "rl": rl,
        "rollout": {"max_new_tokens": 10, "max_turn_tokens": 10},
        "label": {"prompts": 5, "k": 2},
    }
    config = from_dict(values)
    assert stage_tokens(config, "rl") == 3 * 2 * 4 * 10
    assert stage_tokens(config, "label") == 5 * 2 * 2 * 10
    assert stage_tokens(config, "base") == 0
    off = from_dict({**values, "refine": {"enabled": False}})
    assert stage_tokens(off, "refine") == 0
