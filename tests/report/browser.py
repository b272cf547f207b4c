"""A real Chromium without a screen, spoken to over its DevTools pipe: what a page logs, asks for and looks like.

    python tests/report/browser.py PAGE.html OUT [WIDTH …]     # screenshots, light and dark

Chromium reads commands from file descriptor 3 and answers on 4, JSON messages that end in a zero byte
(--remote-debugging-pipe; https://chromedevtools.github.io/devtools-protocol/).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--hide-scrollbars", "--remote-debugging-pipe",
]  # fmt: skip
LIMIT = 60.0  # seconds for a whole page; a loaded machine takes ten


class Browser:
    """A context manager: one browser with an empty profile, one page at a time."""

    def __enter__(self) -> Browser:
        assert BROWSER is not None
        self._profile = tempfile.mkdtemp(prefix="profile")
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def place_pipes() -> None:
            os.dup2(to_browser, 3)
            os.dup2(from_browser, 4)

        # The pipes' own numbers may be 3 and 4 already, and are closed at exec if they aren't passed on.
        high = [os.dup2(fd, 50 + n, inheritable=True) for n, fd in enumerate((to_browser, from_browser))]
        os.close(to_browser)
        os.close(from_browser)
        to_browser, from_browser = high
        self._process = subprocess.Popen(
            [BROWSER, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4, to_browser, from_browser),
            preexec_fn=place_pipes,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._reader = os.fdopen(self._in, "rb")
        self._number = 0
        self.events: list[dict[str, Any]] = []
        # A browser that hangs ends the pipe, and with it every wait.
        self._alarm = threading.Timer(LIMIT * 3, self._end)
        self._alarm.start()
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exc: object) -> None:
        self._alarm.cancel()
        self._end()
        self._process.wait(30)
        self._reader.close()
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own group: all its processes, and no others

    def _read(self) -> dict[str, Any]:
        buffer = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has gone")
            buffer += byte
        message: dict[str, Any] = json.loads(buffer)
        if "method" in message:
            self.events.append(message)
        return message

    def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params or {}}
        if not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path, width: int, *, dark: bool = False) -> None:
        """Load a page from disk, as in a window of this width; :attr:`events` has what happened meanwhile."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.events.clear()
        self.call("Page.navigate", {"url": path.resolve().as_uri()})
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """What the console says: errors, warnings, exceptions."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Log.entryAdded":
                found.append(f"{params['entry']['level']}: {params['entry']['text']}")
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(f"{params['type']}: {params['args']}")
            elif event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
        return found

    def requests(self) -> list[str]:
        """All addresses that were asked for, but those that hold their own data."""
        sent = [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
        return [url for url in sent if not url.startswith("data:")]

    def screenshot(self, path: Path) -> Path:
        """The whole page, however long, as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


def main() -> None:
    page, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        for width in [int(word) for word in sys.argv[3:]] or [1280, 400]:
            for dark in (False, True):
                browser.open(page, width, dark=dark)
                name = f"{page.stem}_{width}{'_dark' if dark else ''}.png"
                overflow = browser.evaluate("document.documentElement.scrollWidth - innerWidth")
                print(browser.screenshot(out / name), browser.complaints(), browser.requests(), overflow)


if __name__ == "__main__":
    main()
