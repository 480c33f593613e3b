"""A real browser for tests: headless Chromium, spoken to through its DevTools protocol."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Browser:
    """One page. `said` collects what it says on its console, `asked` the dialogs that it opened."""

    def __init__(self, folder: Path, width: int = 1200, height: int = 900):
        assert CHROMIUM is not None, "no browser on this machine"
        self._loop = asyncio.new_event_loop()
        self._number, self.said, self.asked = 0, [], []
        headless = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        here = ["--remote-debugging-port=0", f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        told = folder / "said.txt"  # a file: a pipe that nobody empties would stop the browser one day
        folder.mkdir(parents=True)
        with told.open("w") as file:
            command = [CHROMIUM, *headless, *here, "about:blank"]
            self._process = subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL)
        try:
            self._loop.run_until_complete(asyncio.wait_for(self._connect(told), 60))
        except BaseException:
            self._process.kill()
            raise
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    async def _connect(self, told: Path) -> None:
        while not (found := re.search(r"DevTools listening on ws://([^/]+)/", told.read_text())):
            await asyncio.sleep(0.1)
        self._session, pages = aiohttp.ClientSession(), []
        while not pages:
            async with self._session.get(f"http://{found[1]}/json") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
            await asyncio.sleep(0.1)
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call of the protocol; what happens meanwhile is noted."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, params), 60))

    async def _call(self, method: str, params: dict[str, Any], until: str | None = None) -> dict[str, Any]:
        self._number += 1
        mine, result, seen = self._number, None, until is None
        await self._socket.send_json({"id": mine, "method": method, "params": params})
        while result is None or not seen:
            message = json.loads((await self._socket.receive()).data)
            seen = seen or message.get("method") == until
            if message.get("id") == mine:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                result = message["result"]
            elif message.get("method") == "Page.javascriptDialogOpening":
                self.asked.append(message["params"]["message"])
                self._number += 1
                dismiss = {"id": self._number, "method": "Page.handleJavaScriptDialog", "params": {"accept": False}}
                await self._socket.send_json(dismiss)
            elif message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(message["params"]))
        return result

    def open(self, address: str) -> None:
        """Load a page, to its end."""
        call = self._call("Page.navigate", {"url": address}, until="Page.loadEventFired")
        self._loop.run_until_complete(asyncio.wait_for(call, 60))

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> Any:
        """The value of an expression in the page as soon as there is one."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"expected {script}, found {self.run('document.body.innerText')[:2000]!r}")
            time.sleep(0.2)
        return found

    def picture(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._loop.run_until_complete(self._session.close())
        self._process.kill()
        self._process.wait()
        self._loop.close()
