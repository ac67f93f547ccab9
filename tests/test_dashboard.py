"""api/dashboard.html in a real browser, before the real application."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvicorn

import aggregate_app
from api import config
from sandbox.sites import Sandbox
from tests.helpers.api import aggregate_http
from tests.helpers.base import wait_until
from tests.helpers.browser import Tab, open_tab


class DashboardServer:
    """The application in a thread, to be stopped and started again on its port."""

    def __init__(self, table: dict[str, config.Upstream]) -> None:
        self._table, self.port = table, 0
        self.start()

    def start(self) -> None:
        self._app = aggregate_app.create_app(self._table)
        self._server = uvicorn.Server(uvicorn.Config(self._app, port=self.port, log_level="error"))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            runner.run(self._server.serve())

    def stop(self) -> None:
        """As at a signal, which a thread does not get: streams end first."""
        assert self._app.service is not None
        self._loop.call_soon_threadsafe(self._app.service.stop)
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def dashboard_server(web: Sandbox) -> Iterator[DashboardServer]:
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("weather", "/api/weather?city={city}", {"parameters": {"city": "Dash"}, "ttl": 600.0}),
        ("news", "/api/news?dashboard", {"keep": "items", "ttl": 600.0}),
        ("broken", "/status/503", {"retries": 0, "failures": 3, "reset": 30.0}),
        ("idle", "/api/news?idle", {}),
    ]
    server = DashboardServer(
        {name: config.Upstream(name, web.url(path), timeout=20.0, **more) for name, path, more in rows}
    )
    yield server
    server.stop()


class DashboardPage:
    """A tab of the dashboard for each ``play``, and what they asked for and complained of."""

    def __init__(self, chromium: str, server: DashboardServer) -> None:
        self.server, self._chromium = server, chromium
        self.origin = f"http://127.0.0.1:{server.port}"
        self.asked: list[str] = []
        self.complaints: list[str] = []

    def play(self, steps: Callable[[Tab], Awaitable[None]]) -> None:
        async def main() -> None:
            async with open_tab(self._chromium, self.origin + "/") as page:
                self.asked, self.complaints = page.asked, page.complaints
                await page.see("#cards h3")
                await page.see("#stream", "live")
                await steps(page)

        asyncio.run(main())

    def aggregate(self, source: str) -> Any:
        """The answer of /aggregate/{source}, asked for beside the page."""
        answer = aggregate_http(self.server.port, f"/aggregate/{source}?deadline_ms=20000")[1]
        return answer["sources"][source]

    def nudge(self) -> None:
        """Cause an event, so that the page asks for /health now and not after its five seconds."""
        assert aggregate_http(self.server.port, "/cache/invalidate?source=idle", "POST")[0] == 200


@pytest.fixture
def dashboard_page(chromium: str, dashboard_server: DashboardServer) -> Iterator[DashboardPage]:
    """A page that may complain of nothing, and ask nobody but its own server."""
    page = DashboardPage(chromium, dashboard_server)
    yield page
    assert page.complaints == []
    assert page.asked and {url for url in page.asked if not url.startswith((page.origin + "/", "data:"))} == set()


def card(name: str, inside: str = "") -> str:
    return f"#cards [data-name={name}] {inside}"


def test_tells_every_source_and_state_in_words(dashboard_page: DashboardPage) -> None:
    async def steps(page: Tab) -> None:
        dashboard_page.aggregate("weather")
        await page.see(card("weather", ".answers"), "fresh")
        await page.see("#log", "weather loaded in")
        assert await page.texts("#cards h3") == ["weather", "news", "broken", "idle"]
        assert set(await page.texts(".state")) == {"closed"}
        [fresh], [text] = await page.texts(card("weather", ".fresh")), await page.texts(card("weather"))
        assert fresh.startswith("fresh, ") and "TTL 10 min" in text
        [(_, label)] = await page.nodes("image", within=card("weather"))
        assert label.startswith("Latency of the last ") and "p50" in label and "p95" in label and "p99" in label
        [(_, button)] = await page.nodes("button", within=card("weather"))
        assert button == "Invalidate weather"
        assert "no answer yet" in (await page.texts(card("idle")))[0]
        assert "ok: all 4 circuits closed" in (await page.texts("#overall"))[0]
        assert "none" in (await page.texts("#database"))[0] and "ms" in (await page.texts("#lag"))[0]
        shapes = "['closed', 'half_open', 'open'].map((state) => document.getElementById('s-' + state).innerHTML)"
        assert len(set(await page.evaluate(shapes))) == 3
        asked = "fetch('/').then((answer) => answer.headers.get('content-security-policy'))"
        policy = await page.evaluate(asked)
        assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy
        assert (await page.texts("h1, h2"))[:3] == ["Aggregation", "Sources", "Events"]

    dashboard_page.play(steps)


def test_shows_a_breaker_that_opens_without_a_reload(dashboard_page: DashboardPage) -> None:
    """And the time to the next probe goes down between two updates."""

    async def steps(page: Tab) -> None:
        await page.evaluate("window.mark = 'the same page'")
        state, probe = card("broken", ".state"), card("broken", ".probe")
        assert await page.texts(state) == ["closed"]
        for _ in range(3):
            assert dashboard_page.aggregate("broken")["state"] == "error"
        await page.see(state, "open")
        [text] = await page.texts(probe)
        assert text.startswith("probe in ")
        assert "last error: http: 503" in (await page.texts(card("broken")))[0]
        await page.see("#overall", "degraded: 1 of 4 circuits open")
        assert await page.evaluate("document.title") == "1 of 4 circuits open – Aggregation"
        await page.see("#log", "broken circuit open, was closed")
        await page.see("#news", "broken: circuit open, was closed", exact=True)
        await page.answer("/health", None)  # no more updates
        left = f"document.querySelector({json.dumps(probe)}).innerText"
        await page.until(f"{left} !== {json.dumps(await page.evaluate(left))}")
        assert await page.evaluate("window.mark") == "the same page"

    dashboard_page.play(steps)


def test_invalidates_and_says_so(dashboard_page: DashboardPage) -> None:
    async def steps(page: Tab) -> None:
        def serials() -> list[int]:
            return [dashboard_page.aggregate("weather")["data"]["serial"] for _ in range(2)]

        [first, again] = serials()
        assert again == first
        await page.focus("button", "Invalidate weather")
        await page.press("Enter")
        await page.see("#said", "Invalidated: weather", exact=True)
        assert len(await page.nodes("status")) == 1 and len(await page.nodes("status", within="#said")) == 1
        assert serials() == [first + 1] * 2
        await page.see("#log", "weather invalidated")
        await page.click("button", "Invalidate all")
        await page.see("#said", "Invalidated: broken, idle, news, weather")
        assert serials() == [first + 2] * 2

    dashboard_page.play(steps)


def test_is_amber_only_where_loading_fails(dashboard_page: DashboardPage) -> None:
    rows: list[tuple[dict[str, Any], str, str, str]] = [  # of /health; what is said, and in which class, and the probe
        ({"age_s": 1}, "fresh, 1 s old", "good", ""),
        ({"age_s": 900}, "stale, 15 min old", "soft", ""),  # nobody asked
        ({"age_s": 900, "failing": True}, "stale, 15 min old", "warn", ""),
        ({"age_s": 10, "cache": {"entries": 0}}, "nothing cached", "soft", ""),
        ({"cache": {"entries": 0}}, "no answer yet", "soft", ""),
        ({"breaker": "half_open"}, "no answer yet", "soft", "probing"),
        ({"breaker": "half_open", "waits_for_call": True}, "no answer yet", "soft", "waits for a call"),
        ({"breaker": "open", "next_probe_s": 0}, "no answer yet", "soft", "probe is due"),
        ({"paused_s": 3600}, "no answer yet", "soft", "paused for "),
    ]
    usual = {"breaker": "closed", "ttl_s": 600, "cache": {"entries": 1}, "next_probe_s": 0, "paused_s": 0}
    sources = {f"s{number}": usual | row for number, (row, *_) in enumerate(rows)}

    async def steps(page: Tab) -> None:
        await page.answer("/health", (200, json.dumps({"status": "ok", "sources": sources})))
        dashboard_page.nudge()
        await page.see("#cards h3", "s0")
        for number, (row, text, tone, probe) in enumerate(rows):
            shown = f"document.querySelector('#cards [data-name=s{number}] .fresh').className"
            assert (row, await page.evaluate(shown)) == (row, f"fresh {tone}")
            [said] = await page.texts(card(f"s{number}", ".fresh"))
            assert said.split(",")[0] == text.split(",")[0]
            assert (await page.texts(card(f"s{number}", ".probe")))[0].startswith(probe)

    dashboard_page.play(steps)


def test_asks_for_a_token(dashboard_page: DashboardPage, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, a wrong one, the right one; it is kept for the tab, and a wrong one is not."""
    monkeypatch.setenv("AGGREGATE_TOKEN", "right")

    async def steps(page: Tab) -> None:
        serial = dashboard_page.aggregate("weather")["data"]["serial"]
        await page.click("button", "Invalidate all")
        await page.see("#dialog")
        assert [name for _, name in await page.nodes("dialog")] == ["A token is needed"]
        await page.press("Escape")
        await page.see("#said", "Nothing invalidated: no token was given")
        assert dashboard_page.aggregate("weather")["data"]["serial"] == serial
        await page.click("button", "Invalidate all")
        await page.see("#dialog")
        await page.focus("textbox", "Token")
        await page.call("Input.insertText", text="wrong")
        await page.press("Enter")
        await page.see("#why", "refused")
        assert await page.evaluate("sessionStorage.getItem('token')") is None
        await page.focus("textbox", "Token")
        await page.call("Input.insertText", text="right")
        await page.click("button", "Invalidate", within="#dialog")
        await page.see("#said", "Invalidated: ")
        assert dashboard_page.aggregate("weather")["data"]["serial"] == serial + 1
        await page.call("Page.navigate", url=dashboard_page.origin + "/")
        await page.see("#stream", "live")
        await page.click("button", "Invalidate weather")
        await page.see("#said", "Invalidated: weather")
        assert await page.nodes("dialog") == []

    dashboard_page.play(steps)
    assert len(dashboard_page.complaints) == 3  # the browser's own note of each 401
    dashboard_page.complaints[:] = [text for text in dashboard_page.complaints if "401" not in text]


def test_fits_a_phone_and_the_dark(dashboard_page: DashboardPage) -> None:
    async def steps(page: Tab) -> None:
        async def style(selector: str, name: str) -> str:
            return str(await page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}"))

        async def prefer(**features: str) -> None:
            told = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
            await page.call("Emulation.setEmulatedMedia", features=told)

        async def brightness(scheme: str) -> float:
            await prefer(color_scheme=scheme, reduced_motion="reduce")
            return sum(map(int, (await style("body", "backgroundColor"))[4:-1].split(","))) / 3

        size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        await page.call("Emulation.setDeviceMetricsOverride", **size)
        assert await page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        await prefer(reduced_motion="no-preference")
        assert await style("button", "transitionDuration") != "0s"
        assert await brightness("dark") < 40 and await brightness("light") > 215
        assert await style("button", "transitionDuration") == "0s"

    dashboard_page.play(steps)


def test_shows_what_a_server_says_as_text(dashboard_page: DashboardPage) -> None:
    """Whatever it says: a name, an error or an event that is markup; states that are not known to the page."""
    evil = "<img src=x onerror=alert(1)>"
    source = {"breaker": evil, "last_error": evil, "answers": {evil: 1}, "recent_ms": [1], "ttl_s": 1}
    body = {
        "status": evil,
        "database": {"state": evil, "kind": evil, "error": evil},
        "tasks": {evil: "ended"},
        "sources": {evil: source},
    }

    async def steps(page: Tab) -> None:
        await page.answer("/health", (200, json.dumps(body)))
        dashboard_page.nudge()
        await page.see("#cards h3", "<img")
        [cards] = await page.texts("#cards")
        assert cards.count(evil) == 5  # name, state, answers, error, button
        assert await page.evaluate("document.querySelectorAll('#cards > li').length") == 1
        await page.answer("/cache/", (503, json.dumps({"title": evil})))
        await page.click("button", "Invalidate all")
        await page.see("#said", f"Nothing invalidated: 503 {evil}", exact=True)
        assert await page.texts("img[src], [onerror]") == []

    dashboard_page.play(steps)
    dashboard_page.complaints[:] = [text for text in dashboard_page.complaints if "503" not in text]


def test_survives_a_restart_of_its_server(dashboard_page: DashboardPage) -> None:
    """It says that the server is gone, keeps what it has, marked as old, and is live again without a reload."""

    async def steps(page: Tab) -> None:
        await page.evaluate("window.mark = 'the same page'")
        dashboard_page.aggregate("weather")
        await page.see(card("weather", ".fresh"), "fresh")
        dashboard_page.server.stop()
        await page.see("#old", "it cannot be reached")
        await page.see("#stream", "reconnecting")
        assert len(await page.texts("#cards h3")) == 4
        [text] = await page.texts(card("weather", ".fresh"))
        assert text.startswith("was fresh, ")
        dashboard_page.server.start()
        await page.see("#stream", "live")
        await page.until("document.getElementById('old').hidden")
        dashboard_page.aggregate("news")
        await page.see("#log", "news loaded in")
        assert await page.evaluate("window.mark") == "the same page"

    dashboard_page.play(steps)
    lost = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET")
    dashboard_page.complaints[:] = [
        text for text in dashboard_page.complaints if not any(word in text for word in lost)
    ]


def test_a_page_that_breaks_its_policy_is_noticed(dashboard_page: DashboardPage) -> None:
    """And one that asks another host: what the other tests rely on."""

    async def steps(page: Tab) -> None:
        await page.evaluate('void (document.body.innerHTML += \'<b style="color: red" onclick="x()">b</b>\')')
        await page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
        await page.evaluate("console.warn('told')")
        uncaught = "setTimeout(() => { throw new Error('uncaught') })"
        await page.evaluate(f"new Promise((done) => {{ {uncaught}; setTimeout(done) }})")

    dashboard_page.play(steps)
    for text in ("inline style", "inline event handler", "127.0.0.1:9", "told", "Error: uncaught"):
        assert any(text in complaint for complaint in dashboard_page.complaints), text
    dashboard_page.complaints.clear()
