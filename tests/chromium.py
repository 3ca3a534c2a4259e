"""A headless Chromium over its DevTools pipe: opens one page, answers questions about it, takes screenshots.

    with Chromium(tmp_path) as browser:
        browser.open(page, width=390, height=844, dark=True)
        browser.evaluate("document.images.length")

Messages are JSON objects that end with a zero byte, on the browser's descriptors 3 (to it) and 4 (from it).
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_TIMEOUT_S = 120.0


class Chromium:
    """One browser with one tab. `requests` are the addresses that the tab asked for, `complaints` its console."""

    def __init__(self, profile: Path):
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        read_end, self._to_browser = os.pipe()
        self._from_browser, write_end = os.pipe()
        options = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        # The shell puts the pipes where Chromium looks for them; moving them away first avoids a clash.
        script = f'exec 8<&{read_end} 9>&{write_end}; exec 3<&8 4>&9 8<&- 9>&-; exec "{CHROMIUM}" {options} about:blank'
        self._process = subprocess.Popen(
            ["bash", "-c", script], pass_fds=(read_end, write_end), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_end)
        os.close(write_end)

    def __enter__(self) -> Chromium:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *details: object) -> None:
        os.close(self._to_browser)  # at which Chromium ends
        os.close(self._from_browser)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def open(self, page: Path | str, *, width: int, height: int, dark: bool) -> None:
        """Show a file or an address in a window of this size in CSS pixels, and wait until it is loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.requests.clear()
        self.complaints.clear()
        self._loaded = False
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while not self._loaded:
            self._note(self._receive())
        shown = "[...document.images].filter(image => image.src)"
        self.evaluate(f"Promise.all({shown}.map(image => image.decode())).then(() => true)")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, limit_s: float = 60.0) -> None:
        """Return when the JavaScript expression is true. Raises TimeoutError."""
        deadline = time.monotonic() + limit_s
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true after {limit_s} s: {expression}")
            time.sleep(0.05)

    def choose_file(self, selector: str, file: Path) -> None:
        """Give a file to an <input type=file>, as its dialog would."""
        element = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=element["result"]["objectId"])

    def cut_off(self, is_off: bool) -> None:
        """Take the network away, or give it back."""
        limits = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", offline=is_off, **limits)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key. code: its Windows virtual key code; text: what it types."""
        stroke = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **stroke)
        self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)

    def screenshot(self, to: Path) -> None:
        """The whole page as a PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        to.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command; events that arrive meanwhile are noted."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, details = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(details["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(details))

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from_browser], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._from_browser, 1 << 20) if ready else b""
            if not piece:
                raise RuntimeError(f"{CHROMIUM} closed its pipe" if ready else f"{CHROMIUM} silent for {_TIMEOUT_S} s")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
