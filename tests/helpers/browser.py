"""Chromium without a window, over its DevTools protocol: as much of both as the tests need.

``chromium`` is one process. A ``Tab`` has storage, a cache and a connection of its own, and belongs to the event loop
that opened it. Its keys and clicks are a person's; its roles and names are what a screen reader is told.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.absent import reason
from tests.helpers.base import HANG_LIMIT, wait_until

SWITCHES = """--headless=new --remote-debugging-port=0 --window-size=1280,800 --hide-scrollbars --disable-gpu
 --no-sandbox --disable-quic --disable-background-networking --disable-sync --disable-component-update about:blank"""
SEEN = """[...document.querySelectorAll({css})].some((node) => node.checkVisibility({{ visibilityProperty: true }})
    && ((text) => {exact} ? text === {text} : text.includes({text}))(node.innerText.replace(/\\s+/g, " ").trim()))"""
KEYS = {"Enter": ("\r", 13), "Escape": ("", 27)}


@pytest.fixture(scope="session")
def chromium() -> Iterator[str]:
    """The address of its DevTools."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(reason("a Chromium", how="apt-get install chromium"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command, null = [program, f"--user-data-dir={profile}", *SWITCHES.split()], subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
        told = Path(profile, "DevToolsActivePort")
        try:
            wait_until(lambda: process.poll() is not None or (told.exists() and "\n" in told.read_text()))
            port, path = told.read_text().split()
            yield f"ws://127.0.0.1:{port}{path}"
        finally:
            process.terminate()
            process.wait(HANG_LIMIT)


class Tab:
    """``asked``: the URLs of its requests; ``complaints``: the console's warnings and errors, what nobody caught."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self._socket, self._session, self._numbers = socket, dict[str, str](), itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._answers: dict[str, tuple[int, str] | None] = {}

    async def call(self, method: str, **parameters: Any) -> Any:
        number, told = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = told
        await self._socket.send_json({"id": number, "method": method, "params": parameters, **self._session})
        async with asyncio.timeout(HANG_LIMIT):
            message = await told
        assert "error" not in message, (method, message)
        return message["result"]

    async def listen(self, tasks: asyncio.TaskGroup) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._waiting.pop(told["id"]).set_result(told)
            elif told["method"] == "Fetch.requestPaused":
                tasks.create_task(self._answer(told["params"]["requestId"], told["params"]["request"]["url"]))
            else:
                self._note(told["method"], told["params"])

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(each.get("value", each)) for each in told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))

    async def _answer(self, request: str, url: str) -> None:
        answer = next(each for path, each in self._answers.items() if path in url)
        if answer is not None:
            status, body = answer[0], base64.b64encode(answer[1].encode()).decode()
            await self.call("Fetch.fulfillRequest", requestId=request, responseCode=status, body=body)

    async def answer(self, path: str, answer: tuple[int, str] | None) -> None:
        """Requests for it get this status and body from now on, or no answer: the server is not asked."""
        self._answers[path] = answer
        await self.call("Fetch.enable", patterns=[{"urlPattern": f"*{each}*"} for each in self._answers])

    async def open(self, url: str) -> None:
        context = await self.call("Target.createBrowserContext", disposeOnDetach=True)
        target = await self.call("Target.createTarget", url="about:blank", **context)
        self._session = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        for domain in ("Runtime", "Log", "Network", "DOM", "Accessibility"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        told = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, condition: str) -> None:
        look = f"const look = () => ({condition}) ? done() : setTimeout(look, 10); look()"
        await self.evaluate(f"new Promise((done) => {{ {look} }})")

    async def see(self, selector: str, text: str = "", *, exact: bool = False) -> None:
        """Wait until one of these elements can be seen, and has this text in it, or no other."""
        await self.until(SEEN.format(css=json.dumps(selector), text=json.dumps(text), exact=json.dumps(exact)))

    async def texts(self, selector: str) -> list[str]:
        nodes = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return list(await self.evaluate(f"{nodes}.map((node) => node.innerText)"))

    async def nodes(self, role: str, within: str = "html", **name: str) -> list[tuple[int, str]]:
        """Number and name of what has this role, and this ``accessibleName`` if one is given."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = await self.call("DOM.querySelector", nodeId=root, selector=within)
        found = (await self.call("Accessibility.queryAXTree", role=role, **node, **name))["nodes"]
        return [(each["backendDOMNodeId"], each["name"]["value"]) for each in found if not each["ignored"]]

    async def focus(self, role: str, name: str) -> None:
        [(node, _)] = await self.nodes(role, accessibleName=name)
        await self.call("DOM.focus", backendNodeId=node)

    async def click(self, role: str, name: str, within: str = "html") -> None:
        [(node, _)] = await self.nodes(role, within, accessibleName=name)
        await self.call("DOM.scrollIntoViewIfNeeded", backendNodeId=node)
        quad = (await self.call("DOM.getContentQuads", backendNodeId=node))["quads"][0]
        place = {"x": sum(quad[::2]) / 4, "y": sum(quad[1::2]) / 4, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, **place)

    async def press(self, key: str) -> None:
        text, code = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=code)


@contextlib.asynccontextmanager
async def open_tab(chromium: str, url: str) -> AsyncIterator[Tab]:
    async with (
        aiohttp.ClientSession() as client,
        client.ws_connect(chromium, max_msg_size=0) as socket,
        asyncio.TaskGroup() as tasks,
    ):
        tab = Tab(socket)
        tasks.create_task(tab.listen(tasks))
        await tab.open(url)
        yield tab
        await socket.close()
