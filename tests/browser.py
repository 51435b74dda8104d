"""A headless Chromium for tests of pages, driven through its pipe."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next(filter(None, map(shutil.which, NAMES)), None)
# seconds that an answer may take on a busy machine
PATIENCE = 120.0


class Browser:
    """A page in a window. errors: what its scripts raised; asked: addresses that it loaded."""

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.number, self.left = 0, b""
        theirs, mine = os.pipe()
        self.reads, answers = os.pipe()
        self.writes = mine

        # the browser reads commands from 3 and writes answers to 4
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec 3<&{theirs} 4>&{answers}; exec "$@"', "browser", FOUND,
             "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             "--hide-scrollbars", f"--user-data-dir={self.folder.name}", "about:blank"],
            pass_fds=(theirs, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self.session = None
        targets = self.send("Target.getTargets")["targetInfos"]
        (target,) = [t["targetId"] for t in targets if t["type"] == "page"][:1]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for name in ("Page", "Runtime", "Network"):
            self.send(f"{name}.enable")
        self.size(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.reads)
        os.close(self.writes)
        self.folder.cleanup()

    def send(self, method: str, **params: object) -> dict:
        """A command of the DevTools protocol and its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def _next(self) -> dict:
        while b"\0" not in self.left:
            more = os.read(self.reads, 2**20)
            assert more, "the browser has ended"
            self.left += more
        one, _, self.left = self.left.partition(b"\0")
        found = json.loads(one)
        params = found.get("params", {})
        if found.get("method") == "Runtime.exceptionThrown":
            told = params["exceptionDetails"]
            self.errors.append(str(told.get("exception", {}).get("description", told["text"])))
        elif found.get("method") == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(str(params["args"]))
        elif found.get("method") == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        return found

    def size(self, width: int, height: int = 900) -> None:
        """The window's, in pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip

    def media(self, medium: str = "", dark: bool = False) -> None:
        """ "print" or "screen", light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=medium, features=[scheme])

    def open(self, path: Path) -> None:
        """Load a page and wait until it is drawn."""
        self.send("Page.navigate", url=path.as_uri())
        self.until("document.documentElement?.dataset.ready === 'yes'")

    def until(self, expression: str) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + PATIENCE
        while not self.js(expression):
            if self.errors or time.monotonic() > end:
                raise TimeoutError(f"{expression}: {self.errors}")
            time.sleep(0.05)

    def js(self, expression: str) -> object:
        """The value of an expression in the page; of a promise what it comes to."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True,
                          awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path: Path, rows: tuple[float, float] | None = None) -> None:
        """Write a PNG of the page, or of so many rows of pixels of it."""
        w, h = (self.js(f"document.documentElement.scroll{x}") for x in ("Width", "Height"))
        top, end = rows or (0, h)
        clip = {"x": 0, "y": top, "width": w, "height": end - top, "scale": 1}
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True,
                          clip=clip)  # fmt: skip
        path.write_bytes(base64.b64decode(found["data"]))

    def paper(self, path: Path) -> None:
        """Write a PDF of the page."""
        found = self.send("Page.printToPDF", printBackground=True, preferCSSPageSize=False)
        path.write_bytes(base64.b64decode(found["data"]))
