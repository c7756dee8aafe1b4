"""AdamW with 8-bit moments: memory, learning, and checkpoints, in one process and in two."""

from __future__ import annotations

import pytest
import ranks
import torch
from test_distributed import ROOT, torchrun
from transformers import Qwen3Config, Qwen3ForCausalLM

from autotool_fast import checkpoint, memory
from autotool_fast.config import from_dict
from autotool_fast.errors import UserError
from autotool_fast.loop import Optimizers
from autotool_fast.tasks.tiny import build_tokenizer

pytest.importorskip("torchao", reason="needs the extra `memory`")
torch.set_num_threads(1)


def model(dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    settings = Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(settings).to(dtype)


def optimizers(trained: Qwen3ForCausalLM, kind: str = "adamw-8bit") -> Optimizers:
    return Optimizers(trained, lr=3e-3, weight_decay=0.01, kind=kind)


def train(trained: Qwen3ForCausalLM, with_: Optimizers, steps: int) -> list[float]:
    ids = torch.arange(4 * 12).view(4, 12) % 96
    losses = []
    for _ in range(steps):
        loss = trained(ids, labels=ids).loss
        loss.backward()
        with_.step(1.0)
        losses.append(float(loss.detach()))
    return losses


def moments(found: Optimizers) -> int:
    """Bytes of AdamW's moments in a checkpoint."""
    return sum(t.numel() * t.element_size() for name, t in found.pack()[0].items() if "exp_avg" in name)


def test_moments_take_a_quarter_of_the_memory_and_the_estimate_says_so(tmp_path):
    found = {}
    for kind in ("adamw", "adamw-8bit"):
        trained = model()
        found[kind] = optimizers(trained, kind)
        train(trained, found[kind], 1)
    # 8 of 32 bits, a scale per 256 numbers, and the norms in float32
    assert moments(found["adamw-8bit"]) <= 0.27 * moments(found["adamw"])
    model().save_pretrained(tmp_path)
    config = from_dict({"model": {"path": str(tmp_path)}, "optim": {"kind": "adamw-8bit"}})
    estimate = memory.estimate(memory.shape_of(str(tmp_path)), config)["Adam"]
    assert estimate == pytest.approx(moments(found["adamw-8bit"]), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_as_float32_moments_do(dtype):
    losses = {}
    for kind in ("adamw", "adamw-8bit"):
        trained = model(dtype)
        losses[kind] = train(trained, optimizers(trained, kind), 12)
    fell = losses["adamw"][0] - losses["adamw"][-1]
    assert fell > 1.0
    assert losses["adamw-8bit"][-1] == pytest.approx(losses["adamw"][-1], abs=0.05 * fell)


def test_the_rate_of_a_step_is_followed():
    trained = model()
    found = optimizers(trained)
    before = trained.model.norm.weight.detach().clone()
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    found.step(1e9, 0.5)
    # AdamW's first step is the rate in every coordinate, after a decay of rate x 0.01 of a weight of 1
    assert torch.allclose(before - trained.model.norm.weight, torch.tensor(0.5 * 3e-3 * 1.01), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_continued_run_is_bitwise_the_one_that_went_on(tmp_path, dtype):
    trained = model(dtype)
    found = optimizers(trained)
    train(trained, found, 3)
    tensors, rest = found.pack()
    state, tokenizer = {"optimizers": rest}, build_tokenizer()
    saved = checkpoint.save(tmp_path, 3, model=trained, tokenizer=tokenizer, tensors=tensors, state=state)
    assert checkpoint.damage(saved.path) is None
    again = model(dtype)
    resumed = optimizers(again)
    saved.load_weights(again)
    resumed.unpack(saved.tensors(), saved.state()["optimizers"])
    assert train(again, resumed, 3) == train(trained, found, 3)
    assert all(map(torch.equal, again.parameters(), trained.parameters()))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of two processes' checkpoint, and what each of them found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(2, ROOT / "tests" / "ranks.py", folder, "low_bit")
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"low_bit-{rank}-of-2.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_processes_share_8_bit_state_out_and_continue_it(shared, tmp_path):
    one = ranks.perform("low_bit", tmp_path)
    for found in (one, *shared[1]):
        assert found["kinds"] == ["OptimState8bit", "Tensor"]
        assert found["same losses"]
        assert found["same weights"]
    assert shared[1][0] == shared[1][1]
    # Blocks begin elsewhere in a share of a tensor, so its moments are rounded otherwise.
    assert shared[1][0]["losses"] == pytest.approx(one["losses"], rel=1e-2)
    assert one["losses"][-1] < one["losses"][0] - 1.0


@pytest.mark.slow
def test_another_number_of_processes_is_refused(shared):
    saved = checkpoint.latest(shared[0] / "low-bit-2")
    with pytest.raises(UserError, match="8-bit state of 2 processes cannot be taken up by 1"):
        optimizers(model()).unpack(saved.tensors(), saved.state()["optimizers"])
