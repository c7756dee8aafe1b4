"""Tile settings: derived defaults that fit, tuned files that are checked, and rows whose bits no entry may change."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from autotool_kernels import configs
from autotool_kernels.configs import KERNELS, LinearConfig, Tile

TILE = Tile(rows=128, cols=256, depth=64, warps=8, stages=3, tma=True)
SHAPES = [(3584, 152064), (896, 151936), (64, 300), (33, 1)]
ARCHITECTURES = [*configs.SHARED_BYTES, "sm_75", "sm_110"]  # the last two are not in the table


def entry(kernel="forward", tokens=8192, config=TILE, **changes):
    settings = dataclasses.asdict(config) if isinstance(config, Tile) else config
    line = {
        "hidden": 3584, "vocab": 152064, "dtype": "bfloat16", "tokens": tokens, "kernel": kernel,
        "config": settings, "source": "compiled", "measured": None,
    }  # fmt: skip
    return {**line, **changes}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes sm_90.json into a folder of its own."""
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    configs._select.cache_clear()

    def write(*entries, **changes):
        configs._select.cache_clear()
        data = {"architecture": "sm_90", "entries": list(entries), **changes}
        (tmp_path / "sm_90.json").write_text(json.dumps(data))

    yield write
    configs._select.cache_clear()


def select(tokens=8192, shape=(3584, 152064), dtype=torch.bfloat16):
    return configs.select("sm_90", *shape, tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_fit_into_shared_memory(architecture, dtype):
    limit = configs.SHARED_BYTES.get(architecture, min(configs.SHARED_BYTES.values()))
    for h, v in SHAPES:
        for tokens in (1, 64, 65, 8192, 1 << 20):
            config = configs.defaults(architecture, h, v, tokens, dtype)
            for kernel in KERNELS:
                tile = getattr(config, kernel)
                for each in (tile, getattr(configs.unaligned(config), kernel)):
                    assert each.shared_bytes(dtype.itemsize) * each.programs <= limit


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, configs.INTERPRETER])
def test_number_of_tokens_never_changes_the_bits_of_a_row(architecture):
    for h, v in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            choices = [configs.select(architecture, h, v, n, dtype) for n in (1, 16, 64, 65, 1000, 65536)]
            for version in (lambda c: c, configs.unaligned):
                tiles = [version(c).forward for c in choices]
                column_work = [[configs.for_column_work(architecture, t, m) for t in tiles] for m in (False, True)]
                for same in (tiles, *column_work):
                    assert len({configs.bits_key(architecture, t) for t in same}) == 1


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_work_per_column_leaves_registers_and_keeps_tuned_bits_together(architecture, missing):
    """At most 64 products per thread, whatever was tuned; tiles that could share a file still give the same bits."""
    shapes = [(r, c, w) for r in (64, 128, 256) for c in (128, 256) for w in (4, 8)]
    tiles = [dataclasses.replace(TILE, rows=r, cols=c, warps=w, specialize=w == 4, programs=2) for r, c, w in shapes]
    groups: dict = {}
    for tile in tiles:
        work = configs.for_column_work(architecture, tile, missing)
        assert work.rows * work.cols <= 64 * 32 * work.warps
        assert work.programs == 1
        assert not work.specialize
        groups.setdefault(configs.bits_key(architecture, tile), set()).add(configs.bits_key(architecture, work))
    assert all(len(keys) == 1 for keys in groups.values())


def test_few_tokens_take_a_lower_tile_on_sm_90():
    few, many = select(48), select(8192)
    assert few.forward.rows < many.forward.rows
    assert few.forward != many.forward


def test_tuned_entries_replace_defaults_by_bucket(tuned):
    low = dataclasses.replace(TILE, rows=64, warps=4)
    tuned(entry(tokens=1024, config=low), entry(tokens=8192), entry("grad_hidden", config=low))
    assert select(1000).forward == select(1024).forward == low
    assert select(1025).forward == select(8192).forward == TILE
    assert select(1 << 20).forward == TILE  # beyond the largest: the largest
    assert select().grad_hidden == low
    assert select().dlogits == configs.defaults("sm_90", 3584, 152064, 8192, torch.bfloat16).dlogits
    for other in (select(shape=(3584, 152063)), select(dtype=torch.float16)):
        assert other.grad_hidden != low


@pytest.mark.parametrize("made_for", [1, 700, 1000, 1024])
def test_an_entry_serves_the_numbers_of_tokens_up_to_its_power_of_two(tuned, made_for):
    ours, larger = (dataclasses.replace(TILE, group=g) for g in (3, 5))
    tuned(entry("dlogits", tokens=made_for, config=ours), entry("dlogits", tokens=8192, config=larger))
    most = max(64, 1 << (made_for - 1).bit_length())
    for tokens in {made_for, most}:
        assert select(tokens).dlogits == ours
    assert select(most + 1).dlogits == larger


def test_two_entries_for_the_same_numbers_of_tokens_are_refused(tuned):
    tuned(entry(tokens=1000), entry(tokens=1024))
    with pytest.raises(ValueError, match="entries 0 and 1 both serve forward up to 1024 tokens"):
        select()


def test_shipped_files_load():
    for path in configs.TUNED.glob("*.json"):
        assert configs.load(path.stem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {**dataclasses.asdict(TILE), "block": 3}}, "entry 1: .*block"),
        ({"config": {**dataclasses.asdict(TILE), "rows": 100}}, "entry 1: rows must be a power of two"),
        ({"config": {**dataclasses.asdict(TILE), "depth": 8}}, "entry 1: depth must be in 16..256"),
        ({"config": {**dataclasses.asdict(TILE), "stages": 0}}, "entry 1: stages must be a positive integer"),
        ({"config": {**dataclasses.asdict(TILE), "specialize": True}}, "entry 1: specialize needs warps = 4"),
        ({"tokens": 0}, "entry 1: tokens must be a positive integer"),
        ({"tokens": "many"}, "entry 1: tokens must be a positive integer"),
        ({"kernel": "backward"}, "entry 1: kernel must be one of"),
        ({"source": "guessed"}, "entry 1: source must be"),
        ({"source": "measured"}, "entry 1: measured must hold"),
        ({"extra": 1}, "entry 1: .*extra"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_bad_entries_are_named(tuned, change, message):
    tuned(entry(tokens=1024), entry(**change))
    with pytest.raises(ValueError, match=message) as caught:
        select()
    assert "sm_90.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"cols": 128}, {"depth": 32}, {"rows": 64}], ids=str)
def test_entries_that_would_change_a_row_with_the_number_of_tokens_are_refused(tuned, change):
    """64 rows in 8 warps split each row over two warps, which 128 rows do not."""
    tuned(entry(tokens=1024, config=dataclasses.replace(TILE, **change)), entry(tokens=8192))
    with pytest.raises(ValueError, match="entries 0 and 1 differ in settings that change a row's bits"):
        select()


def test_settings_that_do_not_fit_together_name_the_entry(tuned):
    tuned(entry("grad_weight", config=dataclasses.replace(TILE, depth=256, cols=64)))
    with pytest.raises(ValueError, match=r"sm_90.json: grad_weight for 3584 x 152064.*multiple of grad_weight.depth"):
        select()


def test_a_file_that_is_not_a_table_of_settings_is_named(tuned):
    tuned(architecture="sm_80")
    with pytest.raises(ValueError, match=r"sm_90.json: .*architecture must be 'sm_90'"):
        select()


def test_configurations_are_checked_when_built():
    with pytest.raises(ValueError, match="matmul must be one of"):
        LinearConfig(TILE, TILE, TILE, TILE, matmul="blas")
    with pytest.raises(ValueError, match=r"forward.cols must be 128 or 256"):
        LinearConfig(dataclasses.replace(TILE, cols=64), TILE, TILE, TILE)


LAYOUTS = """
import re, torch
from autotool_kernels import machine_code, triton_linear
from autotool_kernels.reference import Head
for h, v in ((3584, 152064), (896, 151936)):
    for n in (48, 8192):
        new = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
        with machine_code.recording(90) as launches:
            triton_linear.linear_forward(new(n, h), new(v, h), new(n, dtype=torch.int64), Head())
        launch = next(l for l in launches if "forward_kernel" in l.name)
        print(re.findall(r"warpsPerCTA = \\[(\\d+, \\d+)\\], instrShape = \\[(.*?)\\]",
                         machine_code.compile_launch(launch).asm["ttgir"]))
"""


@pytest.mark.slow
def test_a_warp_holds_whole_rows_on_sm_90():
    """What `bits_key` says of sm_90, read from the compiler: all warps along the rows, the same instruction."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", LAYOUTS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many, *shallow = done.stdout.splitlines()
    assert few == "[('4, 1', '16, 256, 16')]"
    assert many == "[('8, 1', '16, 256, 16')]"
    assert shallow == ["[('4, 1', '16, 128, 16')]"] * 2
