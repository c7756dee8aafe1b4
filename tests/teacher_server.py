"""A teacher behind HTTP for tests: it thinks, and plays the solutions of tasks that it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from autotool_fast.chat import parse_reply
from autotool_fast.tasks.record import Task
from autotool_fast.tasks.rendering import solution


class Server(ThreadingHTTPServer):
    """Thinks and plays the solution of the task that the first user message asks; says no to `wrong` families.

    `silent` does not think. `fails(task, number)` gives the HTTP status of the request with that number (from 0) if it
    is to fail. `finish` is the reason that every reply gives for its end.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        wrong: frozenset[str] | set[str] = frozenset(),
        *,
        silent: bool = False,
        fails: Callable[[Task, int], int | None] = lambda task, number: None,
        finish: str = "stop",
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tasks = {task.messages[0]["content"]: task for task in tasks}
        self.wrong, self.silent, self.fails, self.finish = wrong, silent, fails, finish
        self.asked: list[dict] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def replies_to(self, body: dict) -> tuple[int, dict]:
        """Status and answer."""
        self.asked.append(body)
        task = self.tasks[next(m["content"] for m in body["messages"] if m["role"] == "user")]
        if status := self.fails(task, len(self.asked) - 1):
            return status, {"error": {"message": "at most 9 tokens"}}
        turn = sum(m["role"] == "assistant" for m in body["messages"])
        reply = parse_reply(solution(task, think=True)[turn])
        message = {"role": "assistant", "content": "No." if task.family in self.wrong else reply.text}
        if not self.silent:
            message["reasoning_content"] = f"turn {turn}"
        if task.family not in self.wrong:
            message["tool_calls"] = [
                {"id": str(i), "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
                for i, c in enumerate(reply.calls)
            ]
        return 200, {"choices": [{"message": message, "finish_reason": self.finish}], "usage": {}}


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = self.server.replies_to(body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass
