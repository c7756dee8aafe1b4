"""The endpoint policy against a server in this process."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from eval_stand_ins import STAND_INS

from autotool_fast.chat import ToolCall
from autotool_fast.errors import UserError
from autotool_fast.eval.bfcl import Bfcl
from autotool_fast.eval.endpoint import Endpoint, EndpointSettings, read_message, sent_messages, sent_names
from autotool_fast.eval.harness import run
from autotool_fast.eval.records import Request, call_message

BLOCK = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


class Server:
    """Answers chat completions with `reply(body)`: a message, with its `finish_reason` or not, or (status, text)."""

    def __init__(self, reply):
        self.bodies, self.headers = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append(dict(self.headers))
                status, text = 200, reply(body)
                if isinstance(text, tuple):
                    status, text = text
                elif isinstance(text, dict):
                    usage = {"prompt_tokens": 11, "completion_tokens": 7}
                    choice = {"finish_reason": text.pop("finish_reason", "stop"), "message": text}
                    text = json.dumps({"choices": [choice], "usage": usage})
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the client has given up

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for made in servers:
        made.server.shutdown()
        made.server.server_close()


def endpoint(server, **settings):
    return Endpoint(EndpointSettings(url=getattr(server, "url", server), model="m", **{"retries": 0, **settings}))


def ask(policy, mode="auto", tools=("f",)):
    schemas = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in tools]
    (reply,) = policy.act([Request([{"role": "user", "content": "hi"}], schemas, lambda: None)], mode)
    return reply


def call(name, arguments):
    return {"id": "x", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_benchmark_is_played_over_http(serve, tmp_path):
    def reply(body):
        if body["messages"][-1]["role"] == "tool":
            return {"content": "Done."}
        wanted = {"Light the hall.": ["hall"], "And the desk, then show me.": ["desk"]}
        lamps = wanted.get(body["messages"][-1]["content"], [])
        return {
            "content": None,
            "tool_calls": [call("switch", json.dumps({"lamp": lamp, "to": "on"})) for lamp in lamps],
        }

    server = serve(reply)
    benchmark = Bfcl(STAND_INS / "bfcl", ["multi_turn_base"])
    (row,) = run(benchmark, endpoint(server, parameters=1_000_000), tmp_path)
    benchmark.close()
    assert row["correct"]
    assert (row["prompt_tokens"], row["output_tokens"], row["think_tokens"]) == (11, 4 * 7, 0)
    last = server.bodies[-1]["messages"]
    assert [m["role"] for m in last] == ["user", "assistant", "tool", "assistant", "user", "assistant", "tool"]
    assert last[1]["tool_calls"][0]["id"] == last[2]["tool_call_id"] != last[6]["tool_call_id"]
    assert {tool["function"]["name"] for tool in server.bodies[0]["tools"]} >= {"switch", "look"}


@pytest.mark.parametrize(
    ("message", "mode", "calls", "text", "errors"),
    [
        ({"content": "", "tool_calls": [call("f", '{"a": 1}')]}, "no_think", [("f", {"a": 1})], "", ()),
        ({"content": None, "tool_calls": [call("f", ""), call("f", "{}")]}, "no_think", [("f", {})] * 2, "", ()),
        ({"content": "Sure.", "tool_calls": [call("f", "{}")]}, "no_think", [("f", {})], "Sure.", ()),
        ({"content": "x", "reasoning_content": "hm"}, "think", [], "x", ()),
        ({"content": "<think>\nhm\n</think>\n\nx"}, "think", [], "x", ()),
        ({"content": "<think>\n\n</think>\n\nx"}, "no_think", [], "x", ()),
        ({"content": f"[think]\n<think>\nhm\n</think>\n{BLOCK}"}, "think", [("f", {})], "", ()),
        ({"content": BLOCK}, "no_think", [("f", {})], "", ()),
        ({"content": "", "tool_calls": [call("f", '{"a": NaN}')]}, "no_think", [], "", ("non_finite_number",)),
        ({"content": "", "tool_calls": [call("f", '{"a": ')]}, "no_think", [], "", ("bad_json",)),
        ({"content": "", "tool_calls": [call("f", "[1]")]}, "no_think", [], "", ("bad_arguments",)),
        ({"content": "", "tool_calls": [call(None, "{}")]}, "no_think", [], "", ("bad_name",)),
        ({"content": ""}, "no_think", [], "", ("empty_reply",)),
        ({"content": "x", "reasoning_content": "a </think> b"}, "think", [], "x", ()),
    ],
)  # fmt: skip
def test_messages_are_read_as_strictly_as_text(message, mode, calls, text, errors):
    parsed = read_message(message, {}, {}).parsed
    assert (parsed.mode, [(c.name, c.arguments) for c in parsed.calls], parsed.text) == (mode, calls, text)
    assert parsed.errors == errors


def test_a_malformed_message_is_kept_as_it_was_written():
    message = {"content": "Well.", "tool_calls": [call("switch", '{"lamp": '), call("look", "{}")]}
    reply = read_message(message, {}, {})
    assert reply.parsed.errors
    assert reply.text == 'Well.\n<tool_call>\nswitch {"lamp": \n</tool_call>\n<tool_call>\nlook {}\n</tool_call>'


def test_names_are_sent_as_servers_accept_them_and_come_back(serve):
    names = sent_names(["a.b", "a_b", "ü", "x" * 80, "x" * 81])
    assert names["a.b"] == "a_b"
    assert names["a_b"] == "a_b_2"
    assert len(set(names.values())) == 5
    assert all(len(name) <= 64 and name.isascii() for name in names.values())
    server = serve(lambda body: {"content": "", "tool_calls": [call(body["tools"][0]["function"]["name"], "{}")]})
    assert ask(endpoint(server), tools=("Pool.open", "b")).parsed.calls == (ToolCall("Pool.open", {}),)


def test_tool_messages_name_the_calls_they_answer():
    history = [
        call_message("", [ToolCall("f", {"a": 1}), ToolCall("f", {"a": 2})]),
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        call_message("", [ToolCall("f", {})]),
        {"role": "tool", "content": "3"},
    ]
    sent = sent_messages(history, {"f": "f_sent"})
    made = [made["id"] for message in sent for made in message.get("tool_calls", ())]
    assert [message["tool_call_id"] for message in sent if message["role"] == "tool"] == made
    assert len(set(made)) == 3
    assert sent[0]["tool_calls"][0]["function"] == {"name": "f_sent", "arguments": '{"a": 1}'}


def test_modes_are_forced_by_tag_or_template_or_refused(serve):
    server = serve(lambda body: {"content": "<think>\n1\n</think>\nx"})
    reply = ask(endpoint(server, mode_switch="tag"), "think")
    assert reply.parsed.length_class == 0
    assert server.bodies[-1]["messages"][-1] == {"role": "assistant", "content": "[think]\n"}
    assert server.bodies[-1]["continue_final_message"]
    ask(endpoint(server, mode_switch="enable_thinking"), "no_think")
    assert server.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(UserError, match="cannot be made to reply in mode think"):
        ask(endpoint(server), "think")


def test_the_key_is_sent_and_kept_out_of_the_configuration(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    server = serve(lambda body: {"content": "x"})
    policy = endpoint(server, key_variable="MY_KEY")
    ask(policy)
    assert server.headers[-1]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in json.dumps(policy.config())


def test_failures_that_may_pass_are_tried_again(serve):
    answers = [(503, "busy"), (429, "slow down"), {"content": "x"}]
    server = serve(lambda body: answers.pop(0))
    assert ask(endpoint(server, retries=2, pause_s=0.01)).parsed.text == "x"
    assert len(server.bodies) == 3


def test_a_server_has_a_minute_to_come_back(serve):
    waited = []

    class Clock(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            return False

    server = serve(lambda body: (503, "loading"))
    with pytest.raises(UserError, match="answered 503"):
        Endpoint(EndpointSettings(url=server.url, model="m"))._post({}, Clock())
    assert len(server.bodies) == 8
    assert waited == sorted(waited)
    assert waited[0] <= 1
    assert 60 <= sum(waited) <= 90


def test_a_failure_wakes_the_requests_that_wait_to_be_repeated(serve):
    server = serve(lambda body: (404, "no such model") if body["messages"][0]["content"] == "1" else (503, "busy"))
    requests = [Request([{"role": "user", "content": str(i)}], [], lambda: None) for i in range(2)]
    began = time.perf_counter()
    with pytest.raises(UserError):
        endpoint(server, retries=3, pause_s=1.0).act(requests[::-1], "auto")
    assert time.perf_counter() - began < 2.5  # pauses of 1, 2 and 4 s are cut short


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((404, '{"error": {"message": "no model m\\nhere"}}'), "answered 404 (no model m here)"),
        ((500, "oops"), "answered 500 (oops)"),
        ((200, "<html>"), "did not answer with JSON"),
        ((200, '{"object": "list"}'), "answered without choices[0].message"),
        ((200, '{"choices": [{"message": null}]}'), "answered without choices[0].message"),
    ],
)
def test_a_failing_server_is_one_line(serve, reply, words):
    server = serve(lambda body: reply)
    with pytest.raises(UserError) as caught:
        ask(endpoint(server, retries=1 if reply[0] == 404 else 0))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.bodies) == 1


def test_a_silent_server_and_no_server_are_one_line(serve):
    def sleep(body):
        time.sleep(0.5)
        return {"content": "x"}

    server = serve(sleep)
    with pytest.raises(UserError, match=r"did not answer within 0.1 s"):
        ask(endpoint(server, timeout_s=0.1))
    with pytest.raises(UserError, match=r"^--endpoint .*cannot be reached .*refused.*does it serve --endpoint-model m"):
        ask(endpoint("http://127.0.0.1:9/v1"))


def numbered(count):
    return [Request([{"role": "user", "content": str(i)}], [], lambda: None) for i in range(count)]


def test_one_failure_of_many_requests_stops_the_batch(serve):
    server = serve(lambda body: (404, "bad") if body["messages"][0]["content"] == "3" else {"content": "x"})
    with pytest.raises(UserError, match="answered 404"):
        endpoint(server, concurrency=2).act(numbered(6), "auto")
    kept = [request for i, request in enumerate(numbered(6)) if i != 3]
    assert [reply.parsed.text for reply in endpoint(server).act(kept, "auto")] == ["x"] * 5


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_refused_request_of_many_costs_its_episode_only(serve, status):
    server = serve(lambda body: (status, "too long") if body["messages"][0]["content"] == "3" else {"content": "x"})
    policy = endpoint(server)
    replies = policy.act(numbered(6), "auto")
    assert [reply.stop for reply in replies] == [None] * 3 + ["refused"] + [None] * 2
    assert [reply.parsed.text for reply in replies if reply.stop is None] == ["x"] * 5
    assert policy.refusals == [f"answered {status} (too long)"]


def test_a_server_that_refuses_everything_is_an_error(serve):
    with pytest.raises(UserError, match=r"refuses every request: answered 400 \(needs a tool parser\)"):
        endpoint(serve(lambda body: (400, "needs a tool parser"))).act(numbered(6), "auto")


def test_dialogues_that_grow_too_long_together_are_counted(serve):
    server = serve(lambda body: {"content": "x"} if len(body["messages"]) == 1 else (400, "too long"))
    policy = endpoint(server)
    policy.act(numbered(5), "auto")
    longer = [Request([*request.messages, call_message("x", ())], [], lambda: None) for request in numbered(5)]
    assert [reply.stop for reply in policy.act(longer, "auto")] == ["refused"] * 5
    assert len(policy.refusals) == 5


def irrelevance(server, folder):
    benchmark = Bfcl(STAND_INS / "bfcl", ["irrelevance"])
    (row,) = run(benchmark, endpoint(server), folder)
    benchmark.close()
    return row


def test_a_reply_that_the_server_cut_is_wrong_even_where_silence_is_right(serve, tmp_path):
    said = {"content": "None of these functions can do th"}
    whole = irrelevance(serve(lambda body: {**said, "finish_reason": "stop"}), tmp_path / "whole")
    assert (whole["correct"], whole["stop"]) == (True, "finished")
    cut = irrelevance(serve(lambda body: {**said, "finish_reason": "length"}), tmp_path / "cut")
    assert (cut["correct"], cut["strict"]) == (False, False)
    assert (cut["stop"], cut["reason"]) == ("max_turn_tokens", "max_turn_tokens")
    assert cut["output_tokens"] == 7


def test_a_refused_episode_is_wrong_and_the_run_goes_on(serve, tmp_path):
    row = irrelevance(serve(lambda body: (400, "too long")), tmp_path)
    assert (row["correct"], row["strict"], row["reason"], row["replies"]) == (False, False, "refused", [])


def test_an_episode_refused_half_way_is_wrong(serve, tmp_path):
    server = serve(lambda body: {"content": "Hm."} if len(body["messages"]) == 1 else (400, "too long"))
    benchmark = Bfcl(STAND_INS / "bfcl", ["multi_turn_base"])
    (row,) = run(benchmark, endpoint(server), tmp_path)
    benchmark.close()
    assert (row["correct"], row["reason"], len(row["replies"])) == (False, "refused", 1)
