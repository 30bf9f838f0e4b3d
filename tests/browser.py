"""Chromium without a window, over its debugging protocol: for tests of what a browser shows."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def program() -> str | None:
    """Where one is installed."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Tab:
    """A page that is open.

    Attributes:
        errors: what its console has said that is an error or a warning.
        requests: addresses that it has asked for, but for what it holds itself.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.errors: list[str] = []
        self.requests: list[str] = []

    async def call(self, method: str, until: str = "", **parameters: Any) -> Any:
        """A command's answer; with ``until`` once that event has come too."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        answer, waiting = None, bool(until)
        while answer is None or waiting:
            message = json.loads((await self._socket.receive(timeout=30)).data)
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                answer = message["result"]
            waiting = waiting and message.get("method") != until
        return answer

    def _note(self, message: dict[str, Any]) -> None:
        kind, about = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown" or (
            kind == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning")
        ):
            self.errors.append(json.dumps(about))
        elif kind == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(about["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            address = about["request"]["url"]
            if not address.startswith("data:"):
                self.requests.append(address)

    async def open(self, page: Path, width: int, height: int, dark: bool) -> None:
        """Load a page at a size in pixels, in dark or light."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", until="Page.loadEventFired", url=page.as_uri())

    async def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def shoot(self, path: Path) -> None:
        """A picture of the whole page, as PNG."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


def browse(visit: Callable[[Tab], Awaitable[Any]], folder: Path) -> Any:
    """Start a browser, let ``visit`` use a tab of it, end it.

    Args:
        folder: for its files.
    """
    return asyncio.run(_browse(visit, folder))


async def _browse(visit: Callable[[Tab], Awaitable[Any]], folder: Path) -> Any:
    command = [
        str(program()), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={folder / 'profile'}",
        "--remote-debugging-port=0", "about:blank",
    ]  # fmt: skip
    started = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        assert started.stderr is not None
        port = None
        for line in started.stderr:
            if found := re.search(r"DevTools listening on ws://[^:]+:(\d+)/", line):
                port = found[1]
                break
        assert port is not None, "the browser didn't start"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                tabs = await answer.json()
            address = next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                return await visit(Tab(socket))
    finally:
        started.terminate()
        started.wait(10)
