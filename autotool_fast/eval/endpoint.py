"""A policy behind an OpenAI-compatible server: chat completions with tools, over the standard library.

Replies may carry calls as `tool_calls` or, from a server without a tool parser, as `<tool_call>` text; thinking as
`reasoning_content` or a leading `<think>` block, with or without a mode tag. The API key comes from the environment and
is stored nowhere.

A reply that the server cut at `max_tokens` ends its episode, as in the local engine. A request that it refuses (a
prompt that is too long for it) costs the one episode; a server that refuses all of several and has not answered any is
set up wrong, which is an error.
"""

from __future__ import annotations

import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from typing import Any

from autotool_fast.chat import NO_THINK_TAG, THINK_TAG, ParsedReply, ToolCall, parse_reply, render_reply
from autotool_fast.errors import UserError
from autotool_fast.eval.policies import Stepwise
from autotool_fast.eval.records import REFUSED, Reply, Request

SWITCHES = ("none", "tag", "enable_thinking")
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
_NOT_THE_PROMPT = {401, 402, 403, 404, 405, 407}  # key, payment, address, model name: every request meets them
_SEVERAL = 4
_MAX_PAUSE_S = 30.0
_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_CUT = "max_turn_tokens"  # as `rollout.records.StopReason` has it, which would load numpy
_NOTHING = ParsedReply(None, None, (), "", ("empty_reply",))
_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class EndpointSettings:
    """How a server is asked.

    Attributes:
        url: base address, up to and including `/v1`.
        model: the name the server knows.
        mode_switch: how modes think and no_think are forced: "none" (only auto can be run), "tag" (the reply is
            continued from its mode tag, as vLLM does with `continue_final_message`), "enable_thinking" (the chat
            template's own switch, as Qwen3 has).
        max_tokens: of one reply.
        temperature, seed: of sampling.
        timeout_s: seconds for one request.
        retries: attempts after a failure that may pass, such as a server that is being restarted.
        pause_s: seconds before the first of them; pauses double, up to 30 s, so that the default waits for a minute.
        concurrency: requests under way at once.
        key_variable: environment variable with the API key.
        parameters: of the model, for ACU; 0 if unknown.
    """

    url: str
    model: str
    mode_switch: str = "none"
    max_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 120.0
    retries: int = 7
    pause_s: float = 0.5
    concurrency: int = 8
    key_variable: str = "OPENAI_API_KEY"
    parameters: int = 0


class _Refused(Exception):
    """The server will not take this request; the text is what it said."""


class Endpoint(Stepwise):
    """See the module.

    Args:
        settings: how the server is asked.
        where: the setting that holds its address, for errors.
        model_option: the setting that holds its model's name.

    Attributes:
        refusals: what the server said to each request that it refused.
    """

    name = "endpoint"

    def __init__(
        self, settings: EndpointSettings, *, where: str = "--endpoint", model_option: str = "--endpoint-model"
    ) -> None:
        self._where, self._model_option = f"{where} ({settings.url})", model_option
        if not settings.url.startswith(("http://", "https://")):
            raise UserError("must start with http:// or https://", where=self._where)
        self.settings = settings
        self.parameters = settings.parameters or None
        self.refusals: list[str] = []
        self._answered = False

    def probe(self) -> None:
        """Raise UserError when nothing answers at the address within five seconds."""
        try:
            urllib.request.urlopen(f"{self.settings.url.rstrip('/')}/models", timeout=5.0).close()
        except urllib.error.HTTPError:
            pass  # a server answered; whether it wants a key is seen when it is asked
        except (OSError, HTTPException) as error:
            problem = f"cannot be reached ({getattr(error, 'reason', None) or error})"
            remedy = "start the server, or check the address"
            raise UserError(problem, where=self._where, remedy=remedy) from None

    def config(self) -> dict[str, Any]:
        """What the replies depend on."""
        kept = asdict(self.settings)
        for name in ("timeout_s", "retries", "pause_s", "concurrency", "key_variable", "parameters"):
            del kept[name]
        return {"policy": self.name, **kept}

    def act(self, requests: Sequence[Request], mode: str) -> list[Reply]:
        """Ask for all requests, `concurrency` at a time.

        Raises:
            UserError: the server cannot be reached, fails, or begins with refusing every one of several requests.
        """
        if mode != "auto" and self.settings.mode_switch == "none":
            remedy = "use --mode-switch tag or enable_thinking, or only auto"
            raise UserError(f"the endpoint cannot be made to reply in mode {mode}", where="--modes", remedy=remedy)
        given_up = threading.Event()
        if len(requests) == 1:
            replies = [self._reply(requests[0], mode, given_up)]
        else:
            with ThreadPoolExecutor(min(self.settings.concurrency, len(requests))) as pool:
                futures = [pool.submit(self._reply, request, mode, given_up) for request in requests]
                try:
                    replies = [future.result() for future in futures]
                except BaseException:
                    given_up.set()  # or the pool would wait for requests that are to be repeated
                    for future in futures:
                        future.cancel()
                    raise
        refused = [reply.text for reply in replies if reply.stop == REFUSED]
        # Later on it may be right: the dialogues that last longest grow too long together.
        self._answered = self._answered or len(refused) < len(requests)
        if not self._answered and len(requests) >= _SEVERAL:
            remedy = "check how the server was started; what it said is the reason"
            raise UserError(f"refuses every request: {refused[0]}", where=self._where, remedy=remedy)
        self.refusals += refused
        return replies

    def _reply(self, request: Request, mode: str, given_up: threading.Event) -> Reply:
        try:
            return self._ask(request, mode, given_up)
        except _Refused as refused:
            return Reply(_NOTHING, str(refused), stop=REFUSED)

    def _ask(self, request: Request, mode: str, given_up: threading.Event) -> Reply:
        names = sent_names([tool["function"]["name"] for tool in request.tools])
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": sent_messages(request.messages, names),
            "temperature": self.settings.temperature,
            "seed": self.settings.seed,
            "max_tokens": self.settings.max_tokens,
        }
        if request.tools:
            body["tools"] = [sent_tool(tool, names) for tool in request.tools]
        prefix = ""
        if mode != "auto" and self.settings.mode_switch == "tag":
            prefix = f"{THINK_TAG if mode == 'think' else NO_THINK_TAG}\n"
            body["messages"].append({"role": "assistant", "content": prefix})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        elif mode != "auto":
            body["chat_template_kwargs"] = {"enable_thinking": mode == "think"}
        answer = self._post(body, given_up)
        try:
            choice = answer["choices"][0]
            own_names = {sent: own for own, sent in names.items()}
            reply = read_message(choice["message"], answer.get("usage") or {}, own_names, prefix)
        except (KeyError, IndexError, TypeError, AttributeError):
            problem = "answered without choices[0].message"
            raise UserError(problem, where=self._where, remedy="is it an OpenAI-compatible server?") from None
        return replace(reply, stop=_CUT) if choice.get("finish_reason") == "length" else reply

    def _post(self, body: Mapping[str, Any], given_up: threading.Event) -> Any:
        settings = self.settings
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(settings.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{settings.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        problem = ""
        for attempt in range(settings.retries + 1):
            if attempt and given_up.wait(min(settings.pause_s * 2.0 ** (attempt - 1), _MAX_PAUSE_S)):
                break
            try:
                with urllib.request.urlopen(request, timeout=settings.timeout_s) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                problem = f"answered {error.code} ({_server_words(error)})"
                if error.code not in _RETRIED:
                    if 400 <= error.code < 500 and error.code not in _NOT_THE_PROMPT:
                        raise _Refused(problem) from None
                    break
            except TimeoutError:
                problem = f"did not answer within {settings.timeout_s:g} s"
            except (urllib.error.URLError, HTTPException, OSError) as error:
                problem = f"cannot be reached ({getattr(error, 'reason', None) or error})"
            except ValueError:
                problem = "did not answer with JSON"
        remedy = f"is the server running, and does it serve {self._model_option} {settings.model}?"
        raise UserError(problem, where=self._where, remedy=remedy)


def _server_words(error: urllib.error.HTTPError) -> str:
    """What the server says about an error, in at most 200 characters."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except OSError:
        return str(error.reason)
    try:
        said = json.loads(text)
        said = said.get("error", said)
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:200] or str(error.reason)


def sent_names(names: Sequence[str]) -> dict[str, str]:
    """Names as servers accept them (letters, digits, `_`, `-`; 64 at most), distinct: own name -> sent name."""
    result: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        base = candidate = _NAME.sub("_", name)[:64] or "_"
        number = 2
        while candidate in taken:
            tail = f"_{number}"
            candidate, number = base[: 64 - len(tail)] + tail, number + 1
        taken.add(candidate)
        result.setdefault(name, candidate)
    return result


def sent_tool(tool: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tool under its sent name."""
    return {"type": "function", "function": {**tool["function"], "name": names[tool["function"]["name"]]}}


def sent_messages(messages: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The conversation as the API wants it: calls with ids, tool messages that name the call they answer."""
    result: list[dict[str, Any]] = []
    waiting: list[str] = []
    count = 0
    for message in messages:
        sent: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if message.get("tool_calls"):
            sent["tool_calls"], waiting = [], []
            for call in message["tool_calls"]:
                own, arguments = call["function"]["name"], call["function"]["arguments"]
                function = {"name": names.get(own, own), "arguments": json.dumps(arguments)}
                sent["tool_calls"].append({"id": f"call_{count}", "type": "function", "function": function})
                waiting.append(f"call_{count}")
                count += 1
        elif message["role"] == "tool" and waiting:
            sent["tool_call_id"] = waiting.pop(0)
        result.append(sent)
    return result


def read_message(
    message: Mapping[str, Any], usage: Mapping[str, Any], own_names: Mapping[str, str], prefix: str = ""
) -> Reply:
    """A server's message as a reply. `own_names`: sent name -> own name; `prefix`: a mode tag it continued."""
    content = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning") or None
    tagged = content.lstrip().startswith((THINK_TAG, NO_THINK_TAG))
    parsed = _read_content(content if tagged or thought else prefix + content, thought)
    structured, errors = _read_tool_calls(message.get("tool_calls") or [])
    calls = tuple(replace(call, name=own_names.get(call.name, call.name)) for call in (*parsed.calls, *structured))
    kept = [error for error in parsed.errors if not (error == "empty_reply" and message.get("tool_calls"))]
    if not calls and not parsed.text and not errors and not kept:
        kept = ["empty_reply"]
    parsed = replace(parsed, calls=calls, errors=(*kept, *errors))
    details = usage.get("completion_tokens_details") or {}
    return Reply(
        parsed=parsed,
        text=_as_written(message) if parsed.errors else render_reply(parsed.think, calls, parsed.text),
        prompt_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        think_tokens=details.get("reasoning_tokens", None if parsed.think else 0),
    )


def _as_written(message: Mapping[str, Any]) -> str:
    """A malformed message as the text a model would have written: content, then its calls as they came."""
    functions = [call.get("function") or {} for call in message.get("tool_calls") or []]
    calls = [f"<tool_call>\n{f.get('name')} {f.get('arguments')}\n</tool_call>" for f in functions]
    return "\n".join(filter(None, [message.get("content"), *calls]))


def _read_content(content: str, thought: str | None) -> ParsedReply:
    """Parse the text of a reply. One without a mode tag gets the tag that its thinking implies."""
    if content.lstrip().startswith((THINK_TAG, NO_THINK_TAG)):
        return parse_reply(content)
    block = _THINK.match(content)
    if block is not None:
        thought, content = (thought or "") + block[1], content[block.end() :]
    if thought and thought.strip():
        # Thinking is free text; a closing tag inside it would end the block early.
        opening = f"{THINK_TAG}\n<think>\n{thought.strip().replace('</think>', '')}\n</think>\n"
        return parse_reply(opening + content)
    return parse_reply(f"{NO_THINK_TAG}\n{content}")


def _read_tool_calls(calls: Sequence[Mapping[str, Any]]) -> tuple[list[ToolCall], list[str]]:
    """The structured calls, read as strictly as calls in text."""
    found: list[ToolCall] = []
    errors: list[str] = []
    for call in calls:
        function = call.get("function") or {}
        name, arguments = function.get("name"), function.get("arguments")
        arguments = json.dumps(arguments) if isinstance(arguments, dict) else arguments or "{}"
        block = f'{NO_THINK_TAG}\n<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
        parsed = parse_reply(block)
        found += parsed.calls
        errors += parsed.errors
    return found, errors
