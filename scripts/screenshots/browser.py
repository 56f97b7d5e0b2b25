"""Chromium without a window, for programs that look at a page or take its picture.

Commands go through a pair of pipes in the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/), so
that no package is needed.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Each element of a page, also within the shadow roots that most of TensorBoard's tabs are made of.
_ALL = """
function* all(root) {
  for (const each of root.querySelectorAll('*')) {
    yield each;
    if (each.shadowRoot) yield* all(each.shadowRoot);
  }
}
"""


def find_chromium() -> str | None:
    """Returns the program; None if it is not installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for found in map(shutil.which, names) if found), None)


class Browser:
    """A browser with one page. `opened_browser` makes it.

    Args:
        read: the descriptor that its answers come from.
        write: the descriptor that commands go to.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._number, self._received = 0, b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def resize(self, width: int, height: int) -> None:
        """Gives the page a size in pixels."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url: str) -> None:
        """Opens a page, and waits until its scripts have started."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && document.body.innerText.length > 0")

    def run(self, script: str) -> Any:
        """Returns the value of an expression of JavaScript. `all(document)` yields each element of the page."""
        expression = f"(() => {{ {_ALL} return ({script}); }})()"
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, condition: str, secs: float = 60) -> None:
        """Waits until an expression of JavaScript is true.

        Raises:
            TimeoutError: it was not true in time; with the text of the page.
        """
        end = time.monotonic() + secs
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} is not true after {secs} s. The page has: {self.text()[:3000]}")
            time.sleep(0.1)

    def wait_for_text(self, *parts: str, secs: float = 60) -> str:
        """Waits until the page shows all of these texts; returns all that it shows.

        Raises:
            TimeoutError: one was not shown in time.
        """
        end = time.monotonic() + secs
        while missing := [part for part in parts if part not in (text := self.text())]:
            if time.monotonic() > end:
                raise TimeoutError(f"The page does not show {missing} after {secs} s, but: {text[:5000]}")
            time.sleep(0.2)
        return text

    def text(self) -> str:
        """Returns the visible text of the page, also that within shadow roots."""
        return str(
            self.run(
                "[...all(document)].filter(e => !e.closest('style, script') && e.checkVisibility())"
                ".map(e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join(' '))"
                ".filter(line => line.trim()).join('\\n')"
            )
        )

    def click(self, element: str) -> None:
        """Clicks on the element that an expression of JavaScript returns."""
        self.wait_for(f"Boolean({element})")
        self.run(f"{element}.click()")

    def picture(self, file: Path) -> None:
        """Writes what the page shows as a PNG."""
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": arguments}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            if not select.select([self._read], [], [], 60)[0]:
                raise TimeoutError("The browser does not answer.")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("The browser has ended.")
            self._received += part
        first, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message


@contextlib.contextmanager
def opened_browser(program: str) -> Iterator[Browser]:
    """Yields a browser, and ends it.

    Args:
        program: what `find_chromium` returns.
    """
    commands, answers = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-first-run", "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]  # fmt: skip
        # The browser reads commands from descriptor 3 and writes answers to descriptor 4.
        moved = f'exec "$0" "$@" 3<&{commands[0]} 4>&{answers[1]}'
        process = subprocess.Popen(
            ["bash", "-c", moved, program, *options],
            pass_fds=(commands[0], answers[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands[0])
        os.close(answers[1])
        try:
            browser = Browser(answers[0], commands[1])
            yield browser
            browser._call("Browser.close")
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            os.close(commands[1])
            os.close(answers[0])
