"""Headless Chromium over its DevTools pipe: render a local page, look at it, print it.

Guarantees: no network service and no port (the protocol runs over two pipes), a throw-away profile, and no process left
behind. What the page asks of the network and what it writes to the console is recorded. Leaves to others: what a page
should look like.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE_S = 60.0


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab of a headless browser; use it as a context manager.

    Attributes:
        requests: addresses that the page asked for since `open`, the page itself first.
        complaints: console errors and warnings, uncaught exceptions and refused resources since `open`.

    Raises:
        FileNotFoundError: no Chromium on the PATH.
        TimeoutError: no answer within `DEADLINE_S` seconds.
    """

    def __init__(self) -> None:
        program = find_chromium()
        if program is None:
            raise FileNotFoundError(f"none of {', '.join(NAMES)} is on the PATH")
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._profile = tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4; as root it refuses to run with a sandbox
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars"
        pipes = f"--remote-debugging-pipe about:blank 3<&{to_browser} 4>&{from_browser}"
        command = f'exec "$0" {flags} --user-data-dir="$1" {pipes}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, self._profile.name],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._last, self._events, self._session = b"", 0, [], ""
        tabs = self._call("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in tabs if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def open(
        self, page: Path, width: int = 1280, *, scale: float = 1.0, dark: bool = False, paper: bool = False
    ) -> None:
        """Load a file and wait until it is laid out.

        Args:
            width: of the viewport, in CSS pixels; below 600 the browser behaves as on a phone.
            scale: device pixels per CSS pixel.
            dark: ask for the dark colour scheme.
            paper: lay out as for print, in this viewport.
        """
        self.requests.clear()
        self.complaints.clear()
        phone = width < 600
        metrics = {"width": width, "height": 900, "deviceScaleFactor": scale, "mobile": phone}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme, media="print" if paper else "")
        self._events.clear()
        self._call("Page.navigate", url=page.resolve().as_uri())
        self._wait("Page.loadEventFired")
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited.

        Raises:
            RuntimeError: the expression threw.
        """
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "exception"))
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, named as in KeyboardEvent.key; Enter and Space type what they stand for."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        event = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0), "text": text}
        self._call("Input.dispatchKeyEvent", type="keyDown", **event)
        self._call("Input.dispatchKeyEvent", type="keyUp", **event)

    def picture(self, top: float = 0, height: float | None = None) -> bytes:
        """PNG of the page from `top` on, `height` CSS pixels of it (default: all), in the viewport's width."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"] - top, "scale": 1}
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(answer["data"])

    def pdf(self) -> bytes:
        """The page as printed on A4."""
        margins = dict.fromkeys(("marginTop", "marginBottom", "marginLeft", "marginRight"), 0.45)
        answer = self._call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True, **margins)
        return base64.b64decode(answer["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        deadline = time.monotonic() + DEADLINE_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _wait(self, event: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while event not in self._events:
            self._receive(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; events are also noted."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._read, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError("the browser does not answer" if not ready else "the browser has gone")
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self._note(message["method"], message["params"])
        return message

    def _note(self, event: str, details: dict[str, Any]) -> None:
        self._events.append(event)
        if event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.complaints.append(details["entry"]["text"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(details["exceptionDetails"]["text"])
        elif event == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning"):
            self.complaints.append(" ".join(str(a.get("value", "")) for a in details["args"]))
