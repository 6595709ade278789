"""A headless Chromium, spoken to over its DevTools pipe: what a page does when it is really opened."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60
# Where the pipe is expected: commands to the browser, and what it says.
TO_BROWSER, FROM_BROWSER = 3, 4
MEASURE = """(() => {
  const sizes = [...document.querySelectorAll('svg, img')].map(x => {
    const box = x.getBoundingClientRect();
    return [box.width, box.height, x.querySelectorAll('path, use, text').length];
  });
  const fonts = [...document.querySelectorAll('svg text')].map(x => x.getBoundingClientRect().height);
  const page = document.scrollingElement;
  return {width: window.innerWidth, scrolls: page.scrollWidth, pictures: sizes, letters: fonts,
          text: document.body.innerText};
})()"""


class Opened(NamedTuple):
    """said: messages of the console, errors and warnings; requests: addresses asked for beside the page.

    width: of the window; scrolls: of the page; pictures: (width, height, marks) each; letters: heights of
    the texts in pictures, in pixels; text: what can be read.
    """

    said: list[str]
    requests: list[str]
    width: int
    scrolls: int
    pictures: list[tuple[float, float, int]]
    letters: list[float]
    text: str


class Browser:
    """Use as a context; skips the test, visibly, where there is no Chromium."""

    def __init__(self, profile: Path) -> None:
        found = next((path for name in NAMES if (path := shutil.which(name))), None)
        if found is None:
            pytest.skip(f"no browser here, looked for {', '.join(NAMES)}")
        self.command = [
            found,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        self.number, self.events, self.rest = 0, list[dict[str, Any]](), b""

    def __enter__(self) -> Browser:
        theirs_in, self.write_to = os.pipe()
        self.read_from, theirs_out = os.pipe()

        def arrange() -> None:
            # Out of the way first: either may lie on the number of the other.
            a, b = os.dup(theirs_in), os.dup(theirs_out)
            while min(a, b) <= FROM_BROWSER:
                a, b = os.dup(a), os.dup(b)
            os.dup2(a, TO_BROWSER)
            os.dup2(b, FROM_BROWSER)

        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=arrange,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write_to)
        os.close(self.read_from)

    def open(self, page: Path, *, width: int, height: int = 800) -> Opened:
        """Open a file in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=True,
        )
        address = page.resolve().as_uri()
        self.events.clear()
        self.call("Page.navigate", session, url=address)
        self._until("Page.loadEventFired")
        found = self.call("Runtime.evaluate", session, expression=MEASURE, returnByValue=True)
        asked = [e["request"]["url"] for e in self._all("Network.requestWillBeSent")]
        others = [url for url in asked if url != address and not url.startswith("data:")]
        said = [json.dumps(e) for e in self._all("Runtime.consoleAPICalled")]
        said += [json.dumps(e) for e in self._all("Runtime.exceptionThrown")]
        said += [e["entry"]["text"] for e in self._all("Log.entryAdded")]
        self.call("Target.closeTarget", targetId=target)
        measured = found["result"]["value"]
        sizes = [(w, h, marks) for w, h, marks in measured.pop("pictures")]
        return Opened(said=said, requests=others, pictures=sizes, **measured)

    def picture(self, page: Path, *, width: int, most: int, quality: int = 70) -> bytes:
        """A page as WebP, from its top: as wide as the window, at most so many pixels high."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable", session)
        shape = {"width": width, "height": most, "deviceScaleFactor": 1, "mobile": True}
        self.call("Emulation.setDeviceMetricsOverride", session, **shape)
        self.events.clear()
        self.call("Page.navigate", session, url=page.resolve().as_uri())
        self._until("Page.loadEventFired")
        asked = "document.documentElement.getBoundingClientRect().height"
        found = self.call("Runtime.evaluate", session, expression=asked, returnByValue=True)
        height = min(float(found["result"]["value"]), most)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        made = self.call("Page.captureScreenshot", session, format="webp", quality=quality, clip=clip)
        self.call("Target.closeTarget", targetId=target)
        return base64.b64decode(made["data"])

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command, and its result."""
        self.number += 1
        number = self.number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _all(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def _until(self, method: str) -> None:
        while not self._all(method):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        """The next message of the browser; messages end with a zero byte."""
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.rest:
            left = deadline - time.monotonic()
            ready = select.select([self.read_from], [], [], max(left, 0))[0]
            assert ready, f"the browser said nothing for {SECONDS} s"
            piece = os.read(self.read_from, 1 << 16)
            assert piece, "the browser has ended"
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer
