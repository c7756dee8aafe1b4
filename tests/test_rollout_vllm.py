"""Rollouts on a server: a stand-in over real HTTP, a small random model, the driver's own turn loop."""

from __future__ import annotations

import copy
import sys
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from lamp_environment import small_model
from vllm_stand_in import VllmStandIn, dropped, saying, slow, status

from autotool_fast import adapters
from autotool_fast.chat import SOURCE_SAMPLED
from autotool_fast.chat.reply import parse_reply
from autotool_fast.config import LoraConfig
from autotool_fast.errors import UserError
from autotool_fast.loop import Optimizers
from autotool_fast.packing import pack
from autotool_fast.policy import packed_logp_entropy
from autotool_fast.rollout import server as server_module
from autotool_fast.rollout import vllm
from autotool_fast.rollout.driver import RolloutLimits, rollout
from autotool_fast.rollout.engine import SlotEngine
from autotool_fast.rollout.records import StopReason
from autotool_fast.rollout.server import FolderTransfer, NcclTransfer, VllmServer
from autotool_fast.rollout.vllm import VllmEngine
from autotool_fast.tasks.record import Task

torch.set_num_threads(1)
VOCABULARY, MAX_LEN, NAME = 24, 96, "tiny"
STOPS = frozenset(range(6))
LIMITS = RolloutLimits(max_turns=3, max_new_tokens=30, max_turn_tokens=12)


class Letters:
    """A chat format of letters; none of its replies is well-formed."""

    stop_ids = STOPS

    def encode_prompt(self, messages, tools):
        return [2 + ord(c) % 20 for c in messages[0]["content"]]

    def encode_mode(self, mode):
        return [23]

    def encode_continuation(self, messages):
        return [22, 21, 22]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def parse(self, text):
        return parse_reply(text)


@dataclass
class Patient:
    """An episode that asks again after every reply."""

    seconds: float = 0.0

    def malformed(self, reply):
        time.sleep(self.seconds)
        return [{"role": "user", "content": "again"}]

    step = malformed

    def score(self):
        return False


def make_task(prompt: str, seconds: float = 0.0) -> Task:
    messages = ({"role": "user", "content": prompt},)
    return Task(prompt, "letters", 0, (), messages, {}, "train", lambda task: Patient(seconds))


TASKS = [make_task("lamp"), make_task("a longer request"), make_task("no")]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(server_module, "BACKOFF_S", 0.01)
    monkeypatch.setattr(server_module, "PROBE_S", 1.0)
    monkeypatch.setattr(vllm, "POLL_S", 0.05)


def lively_model(seed: int):
    """Random weights large enough that what it says next depends on what went before."""
    model = small_model(VOCABULARY, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10.0)
    return model


@pytest.fixture
def model():
    return lively_model(seed=3)


@pytest.fixture
def stand_in():
    return VllmStandIn(lively_model(seed=9), NAME)


@pytest.fixture
def address(stand_in):
    with stand_in.running() as url:
        yield url


def make_engine(model, url, folder: Path, *, slots=8, timeout_s=5.0, max_len=MAX_LEN) -> VllmEngine:
    server = VllmServer(url, timeout_s=timeout_s)
    transfer = FolderTransfer(server, folder / "weights")
    return VllmEngine(model, server, transfer, served_model=NAME, slots=slots, max_len=max_len)


def play(engine, tasks=TASKS, *, group_size=2, temperature=1.0, limits=LIMITS, **options):
    return rollout(
        engine, tasks, chat=Letters(), group_size=group_size, seed=5, step=0, temperature=temperature, limits=limits,
        malformed_ends=False, **options,
    )  # fmt: skip


def refusal(engine, **options) -> str:
    with pytest.raises(UserError) as caught:
        play(engine, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("mode", ["auto", "think"])
def test_greedy_episodes_are_those_of_the_slot_engine(model, address, tmp_path, mode):
    own = play(SlotEngine(model, slots=4, max_len=MAX_LEN), group_size=1, temperature=0.0, mode=mode)
    theirs = play(make_engine(model, address, tmp_path), group_size=1, temperature=0.0, mode=mode)
    assert max(len(t.turn_spans) for t in own) > 1
    for one, other in zip(own, theirs, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.source.tolist() == other.source.tolist()
        assert (one.stop_reason, one.turn_spans) == (other.stop_reason, other.turn_spans)
        np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)  # float32, one forward against another


def test_sampled_tokens_carry_the_log_prob_of_the_model_and_minus_it_as_entropy(model, address, tmp_path, stand_in):
    stand_in.logprobs_mode = "processed_logprobs"
    episodes = play(make_engine(model, address, tmp_path), group_size=4, temperature=0.7)
    sampled = [t.source == SOURCE_SAMPLED for t in episodes]
    with torch.no_grad():
        batch = pack([t.ids for t in episodes])
        expected, _ = packed_logp_entropy(model, batch, torch.from_numpy(np.concatenate(sampled)), temperature=0.7)
    logp = np.concatenate([t.logp[s] for t, s in zip(episodes, sampled, strict=True)])
    np.testing.assert_allclose(logp, expected.numpy(), atol=1e-5)
    for t, s in zip(episodes, sampled, strict=True):
        assert not t.logp[~s].any()
        np.testing.assert_array_equal(t.entropy, -t.logp)
    assert len({tuple(t.ids.tolist()) for t in episodes}) > len(TASKS)  # samples of a group differ


def test_a_seed_and_a_prefix_fix_a_request_whatever_the_number_of_slots(model, address, tmp_path, stand_in):
    wide = play(make_engine(model, address, tmp_path, slots=6))
    assert 1 < stand_in.most_under_way <= 6
    stand_in.most_under_way = 0
    narrow = play(make_engine(model, address, tmp_path, slots=1))
    assert stand_in.most_under_way == 1
    assert [t.ids.tolist() for t in wide] == [t.ids.tolist() for t in narrow]
    seeds = [(request["seed"], tuple(request["prompt"])) for request in stand_in.requests]
    assert len(set(seeds)) == len(seeds) // 2
    assert len({seed for seed, _ in seeds}) == len(set(seeds))  # a row's turns draw from different streams


def test_a_request_leaves_nothing_to_the_model_folder(model, address, tmp_path, stand_in):
    play(make_engine(model, address, tmp_path), temperature=0.0)
    for request in stand_in.requests:
        assert request["ignore_eos"] is True
        assert request["stop_token_ids"] == sorted(STOPS)
        assert (request["top_p"], request["top_k"], request["min_p"]) == (1.0, 0, 0.0)
        assert (request["repetition_penalty"], request["presence_penalty"], request["frequency_penalty"]) == (1, 0, 0)


def test_connections_are_kept(model, address, tmp_path, stand_in):
    play(make_engine(model, address, tmp_path, slots=2))
    assert len(stand_in.requests) > 8
    assert stand_in.connections <= 8  # two for the slots, one for each order that must not be sent twice


def test_a_connection_that_the_server_closed_meanwhile_is_opened_anew(address, stand_in, monkeypatch):
    monkeypatch.setattr(server_module, "BACKOFF_S", 60.0)  # longer than the deadline: a pause would be a failure
    server = VllmServer(address, timeout_s=5.0)
    for count in (1, 2, 3):
        # Announced by no header, so the client keeps a connection that is no more.
        stand_in.faults["/weight_info"] = [lambda handler, body: setattr(handler, "close_connection", True)]
        assert server.ask("GET", "/weight_info") == {"weight_version": "default"}
        assert stand_in.connections == count
        time.sleep(0.05)


def test_weights_are_sent_once_per_change_and_the_cache_is_emptied_after_them(model, address, tmp_path, stand_in):
    engine = make_engine(model, address, tmp_path)
    order = ["pause", "collective_rpc", "update_weight_version", "reset_prefix_cache", "resume", "weight_info"]
    seen = []
    for step in range(3):
        stand_in.log.clear()
        first = play(engine)
        orders = [path for path in stand_in.log if not path.startswith("v1/")]
        assert orders == [*order, "weight_info"]
        assert stand_in.log.index("resume") < stand_in.log.index("v1/completions")
        for mine, its in zip(model.parameters(), stand_in.model.parameters(), strict=True):
            assert torch.equal(mine, its)
        stand_in.log.clear()
        play(engine, temperature=0.0)
        assert [path for path in stand_in.log if not path.startswith("v1/")] == ["weight_info", "weight_info"]
        seen.append([t.ids.tolist() for t in first])
        model(torch.tensor([[2, 3, 4]])).logits.logsumexp(-1).sum().backward()
        Optimizers(model, lr=0.1 * (step + 1), weight_decay=0.0).step(1.0)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_step_is_noticed(model, address, tmp_path, stand_in, matrix, dtype):
    model = model.to(dtype)
    engine = make_engine(model, address, tmp_path)
    optimizers = Optimizers(model, lr=0.01, weight_decay=0.0, matrix=matrix)
    for count in (1, 2, 3):
        play(engine, TASKS[:1], group_size=1)
        assert stand_in.log.count("collective_rpc") == count
        model(torch.tensor([[2, 3, 4]])).logits.float().logsumexp(-1).sum().backward()
        optimizers.step(1.0)


def test_an_adapter_arrives_merged(model, address, tmp_path, stand_in):
    adapters.add(model, LoraConfig(rank=2), seed=0)
    for _ in range(2):
        model(torch.tensor([[2, 3, 4]])).logits.logsumexp(-1).sum().backward()
        Optimizers(model, lr=0.1, weight_decay=0.0).step(1.0)
    play(make_engine(model, address, tmp_path), TASKS[:1])
    merged = copy.deepcopy(model)
    adapters.merge(merged)
    for (name, mine), its in zip(merged.named_parameters(), stand_in.model.parameters(), strict=True):
        assert torch.equal(mine, its), name


def test_a_failure_that_passes_is_tried_again(model, address, tmp_path, stand_in):
    expected = [t.ids.tolist() for t in play(make_engine(model, address, tmp_path))]
    faults = [status(503), dropped, status(500), dropped]
    stand_in.faults["/v1/completions"] = list(faults)
    assert [t.ids.tolist() for t in play(make_engine(model, address, tmp_path))] == expected
    assert not stand_in.faults["/v1/completions"]


def test_a_cache_that_cannot_be_emptied_yet_is_asked_again(model, address, tmp_path, stand_in):
    stand_in.faults["/reset_prefix_cache"] = [saying({"success": False})] * 2
    play(make_engine(model, address, tmp_path))
    stand_in.faults["/reset_prefix_cache"] = [saying({"success": False})] * 99
    assert "cannot empty its prefix cache" in refusal(make_engine(model, address, tmp_path))


def test_a_server_that_stops_in_the_middle_is_one_line(model, stand_in, tmp_path):
    with stand_in.running() as url:

        def leave(handler, body):
            stand_in.faults["/v1/completions"] = [dropped] * 99
            threading.Thread(target=stand_in.stop).start()
            return dropped(handler, body)

        stand_in.faults["/v1/completions"] = [lambda h, b: False, lambda h, b: False, leave]
        text = refusal(make_engine(model, url, tmp_path))
    assert text.startswith(f"rollout.server ({url}): cannot be reached")
    assert "--resume" in text


def test_a_server_that_hangs_is_given_up_at_the_deadline(model, address, tmp_path, stand_in):
    stand_in.faults["/v1/completions"] = [slow(3.0)]
    began = time.monotonic()
    text = refusal(make_engine(model, address, tmp_path, timeout_s=0.5))
    assert "did not answer /v1/completions within 0.5 s" in text
    assert time.monotonic() - began < 2.5


def test_an_engine_can_be_used_again_after_a_failure(model, address, tmp_path, stand_in):
    engine = make_engine(model, address, tmp_path)
    stand_in.faults["/v1/completions"] = [status(422)]
    assert "with 422 (out of order)" in refusal(engine)
    assert not engine.busy
    assert len(play(engine)) == 6


def test_a_failed_transfer_is_repeated_by_the_next_session(model, address, tmp_path, stand_in):
    engine = make_engine(model, address, tmp_path)
    stand_in.faults["/collective_rpc"] = [status(500, "no such folder")]
    assert "answered /collective_rpc with 500 (no such folder)" in refusal(engine)
    assert stand_in.paused  # what it has now must not be sampled from
    play(engine)
    assert stand_in.log.count("collective_rpc") == 2


@pytest.mark.parametrize("when", ["between", "during"])
def test_a_server_that_was_restarted_is_noticed(model, address, tmp_path, stand_in, when):
    engine = make_engine(model, address, tmp_path)

    def restart(handler, body):
        stand_in.version = "default"
        return False

    if when == "between":
        play(engine)
        stand_in.version = "default"
    else:
        stand_in.faults["/v1/completions"] = [lambda h, b: False, restart]
    assert "was restarted, or another run uses it" in refusal(engine)


def test_two_runs_on_one_server_are_noticed(model, address, tmp_path):
    first, second = (make_engine(model, address, tmp_path) for _ in range(2))
    play(first)
    play(second)
    assert "another run uses it" in refusal(first)


GOOD = {
    "token_ids": [0],
    "logprobs": {"token_logprobs": [-0.5]},
    "finish_reason": "stop",
    "prompt_token_ids": Letters().encode_prompt(TASKS[0].messages, []),
}


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": None},
        {"token_ids": []},
        {"token_ids": [0, 0]},
        {"token_ids": ["a"]},
        {"logprobs": None},
        {"logprobs": {"token_logprobs": [None]}},
        {"logprobs": {"token_logprobs": [float("-inf")]}},
        {"prompt_token_ids": [2, 2]},
        {"prompt_token_ids": None},
    ],
    ids=str,
)
def test_an_answer_without_ids_and_log_probs_is_refused(model, address, tmp_path, stand_in, change):
    stand_in.faults["/v1/completions"] = [saying({"choices": [GOOD | change]})]
    text = refusal(make_engine(model, address, tmp_path), tasks=TASKS[:1], group_size=1)
    assert "answered without token ids and their log-probs; it must be vllm>=" in text


@pytest.mark.parametrize("answer", [{}, {"choices": []}, [], None, {"choices": [GOOD, GOOD]}], ids=str)
def test_an_answer_of_another_shape_is_refused(model, address, tmp_path, stand_in, answer):
    stand_in.faults["/v1/completions"] = [saying(answer)]
    text = refusal(make_engine(model, address, tmp_path), tasks=TASKS[:1], group_size=1)
    assert "answered without token ids" in text


def test_an_answer_that_is_not_json_is_refused(model, address, tmp_path, stand_in):
    stand_in.faults["/v1/completions"] = [saying(b"<html>")]
    text = refusal(make_engine(model, address, tmp_path), tasks=TASKS[:1], group_size=1)
    assert "answered /v1/completions with something else than JSON" in text


@pytest.mark.parametrize("ids", [[7], [7, 0, 7, 0], [7] * 13], ids=str)
def test_a_reply_that_ends_anywhere_else_is_refused(model, address, tmp_path, stand_in, ids):
    choice = GOOD | {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * len(ids)}, "finish_reason": "abort"}
    stand_in.faults["/v1/completions"] = [saying({"choices": [choice]})]
    text = refusal(make_engine(model, address, tmp_path), tasks=TASKS[:1], group_size=1)
    assert f"ended a reply of {len(ids)} tokens (abort)" in text


def test_another_model_is_refused(model, address, tmp_path, stand_in):
    stand_in.name = "giant"
    text = refusal(make_engine(model, address, tmp_path))
    assert "serves giant, not tiny; name one with --rollout.served-model" in text
    assert "v1/completions" not in stand_in.log


def test_too_short_a_context_is_refused(model, address, tmp_path, stand_in):
    stand_in.max_model_len = MAX_LEN - 1
    text = refusal(make_engine(model, address, tmp_path))
    assert f"takes 95 tokens, fewer than model.max_positions ({MAX_LEN})" in text
    assert f"start it with --max-model-len {MAX_LEN}" in text


def test_a_server_without_the_developer_routes_is_refused(model, address, tmp_path, stand_in):
    stand_in.faults["/pause"] = [status(404, "Not Found")]
    assert "start it with VLLM_SERVER_DEV_MODE=1" in refusal(make_engine(model, address, tmp_path))


def test_log_probs_without_the_temperature_are_refused_where_it_matters(model, address, tmp_path):
    engine = make_engine(model, address, tmp_path)
    text = refusal(engine, temperature=0.7)
    assert "start it with --logprobs-mode processed_logprobs" in text
    play(engine, temperature=1.0)
    play(engine, temperature=0.0)
    assert "--logprobs-mode" in refusal(engine, temperature=0.7)


def test_the_key_comes_from_the_environment(model, address, tmp_path, stand_in, monkeypatch):
    stand_in.key = "secret"
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    text = refusal(make_engine(model, address, tmp_path))
    assert "with 401 (Unauthorized)" in text
    assert "VLLM_API_KEY" in text
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    play(make_engine(model, address, tmp_path))


def test_nobody_at_the_address_is_one_line(model, tmp_path):
    text = refusal(make_engine(model, "http://127.0.0.1:9", tmp_path))
    assert text.startswith("rollout.server (http://127.0.0.1:9): cannot be reached")
    assert "docs/training.md" in text


def test_a_deadline_cuts_an_episode_between_turns_and_gives_its_request_up(model, address, tmp_path, stand_in):
    served = threading.Event()

    def late(handler, body):
        served.wait(5.0)
        return False

    engine = make_engine(model, address, tmp_path)
    stand_in.faults["/v1/completions"] = [lambda h, b: False, late]
    limits = RolloutLimits(max_turns=3, max_new_tokens=30, max_turn_tokens=12, deadline_s=0.3)
    try:
        (episode,) = play(engine, TASKS[:1], group_size=1, limits=limits)
    finally:
        served.set()
    assert episode.stop_reason is StopReason.DEADLINE
    assert len(episode.turn_spans) == 1
    assert len(episode.ids) == len(episode.source) == len(episode.logp)
    (episode,) = play(engine, TASKS[:1], group_size=1)  # what was given up does not come back
    assert episode.stop_reason is not StopReason.DEADLINE


def test_a_first_turn_is_waited_for_beyond_the_deadline(model, address, tmp_path, stand_in):
    stand_in.faults["/v1/completions"] = [slow(0.4)]
    limits = RolloutLimits(max_turns=3, max_new_tokens=30, max_turn_tokens=12, deadline_s=0.1)
    (episode,) = play(make_engine(model, address, tmp_path), TASKS[:1], group_size=1, limits=limits)
    assert (episode.stop_reason, len(episode.turn_spans)) == (StopReason.DEADLINE, 1)


def test_time_in_one_episodes_tools_is_not_charged_to_the_others(model, address, tmp_path):
    limits = RolloutLimits(max_turns=3, max_new_tokens=30, max_turn_tokens=12, deadline_s=1.0)
    tasks = [make_task("lamp"), make_task("slow one", seconds=1.2)]
    quick, late = play(make_engine(model, address, tmp_path), tasks, group_size=1, limits=limits)
    assert quick.stop_reason is not StopReason.DEADLINE
    assert late.stop_reason is StopReason.DEADLINE


class Broadcast:
    """What vLLM's trainer-side engine does with its client, without a GPU."""

    started: ClassVar[list] = []

    def __init__(self, client, source):
        self.client, self.source = client, source

    @classmethod
    def trainer_init(cls, info, *, client, source):
        cls.started.append(info)
        client.init_weight_transfer_engine({"master_port": info.master_port, "world_size": info.world_size})
        return cls(client, source)

    def send_weights(self):
        self.sent = dict(self.source.module.named_parameters())
        self.client.start_weight_update()
        self.client.update_weights({"names": list(self.sent)})
        self.client.finish_weight_update()


@pytest.fixture
def trainer_side(monkeypatch):
    """The two modules of vLLM that the trainer imports."""

    @dataclass(kw_only=True)
    class Info:
        rank: int
        master_address: str
        master_port: int
        world_size: int

    base, nccl = types.ModuleType("base"), types.ModuleType("nccl_engine")
    base.ModuleSource = lambda module: types.SimpleNamespace(module=module)
    nccl.NCCLTrainerInitInfo, nccl.NCCLTrainerWeightTransferEngine = Info, Broadcast
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.base", base)
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.nccl_engine", nccl)
    monkeypatch.setattr(Broadcast, "started", [])


def test_over_nccl_the_group_is_opened_once_and_every_update_names_its_version(model, address, stand_in, trainer_side):
    server = VllmServer(address, timeout_s=5.0)
    transfer = NcclTransfer(server)
    for _ in range(2):
        engine = VllmEngine(model, server, transfer, served_model=NAME, slots=4, max_len=MAX_LEN)
        play(engine, TASKS[:1])
        assert stand_in.version.endswith("-1")
    (info,) = Broadcast.started
    assert (info.rank, info.master_address, info.world_size) == (0, "127.0.0.1", 3)
    order = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache", "resume"]
    told = [path for path in stand_in.log if path in order]
    assert told == order * 2


def test_nccl_without_vllm_installed_says_so(model, address, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = VllmEngine(
        model, VllmServer(address), NcclTransfer(VllmServer(address)), served_model=NAME, slots=4, max_len=MAX_LEN
    )
    assert "nccl needs vLLM" in refusal(engine)
