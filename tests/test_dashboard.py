"""api/dashboard.html in a real browser, before the real application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytest
import uvicorn

import aggregate_app
from api import config
from sandbox.sites import Sandbox
from tests.helpers.base import HANG_LIMIT, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage
    from playwright.sync_api import Page as BrowserPage
    from playwright.sync_api import Request as PageRequest


ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class DashboardBrowser(NamedTuple):
    """Chromium, and the one thread that may touch it: playwright runs an event loop in the thread that calls it, and
    the main thread's other tests run their own."""

    context: BrowserContext
    thread: ThreadPoolExecutor


@pytest.fixture(scope="module")
def dashboard_browser() -> Iterator[DashboardBrowser]:
    """One launch for all tests. Skips if there is no browser on this machine (apt-get install chromium)."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH: the dashboard is not tested")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: the dashboard is not tested")
    with ThreadPoolExecutor(1, "browser") as thread:
        manager = api.sync_playwright()

        def launch() -> BrowserContext:
            browser: Browser = manager.__enter__().chromium.launch(executable_path=path, args=ARGS)
            context = browser.new_context(viewport={"width": 1280, "height": 800})
            context.set_default_timeout(HANG_LIMIT * 1000)
            return context

        def quit_browser() -> None:
            manager.__exit__(None, None, None)  # and with it the browser

        try:
            yield DashboardBrowser(thread.submit(launch).result(), thread)
        finally:
            thread.submit(quit_browser).result()


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
    """A tab of the dashboard, and what it asked for and complained of. ``play(steps)`` runs them in its thread."""

    def __init__(self, browser: DashboardBrowser, server: DashboardServer) -> None:
        self.server, self._browser = server, browser
        self.origin = f"http://127.0.0.1:{server.port}"
        self.asked: list[str] = []
        self.complaints: list[str] = []

    def play(self, steps: Callable[[BrowserPage], None]) -> None:
        def tab() -> None:
            with contextlib.closing(self._browser.context.new_page()) as page:
                page.on("request", self._request)
                page.on("console", self._console)
                page.on("pageerror", lambda error: self.complaints.append(str(error)))
                page.goto(self.origin + "/")
                page.wait_for_selector("#cards h3")
                page.wait_for_selector("#stream:has-text('live')")
                steps(page)

        self._browser.thread.submit(tab).result()

    def _request(self, request: PageRequest) -> None:
        self.asked.append(request.url)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def aggregate(self, page: BrowserPage, source: str) -> Any:
        """The answer of /aggregate/{source}, asked for beside the page."""
        return page.request.get(f"{self.origin}/aggregate/{source}?deadline_ms=20000").json()["sources"][source]

    def nudge(self, page: BrowserPage) -> None:
        """Cause an event, so that the page asks for /health now and not after its five seconds."""
        assert page.request.post(f"{self.origin}/cache/invalidate?source=idle").ok


@pytest.fixture
def dashboard_page(dashboard_browser: DashboardBrowser, dashboard_server: DashboardServer) -> Iterator[DashboardPage]:
    """A page that may complain of nothing, and ask nobody but its own server."""
    page = DashboardPage(dashboard_browser, dashboard_server)
    yield page
    assert page.complaints == []
    assert page.asked and {url for url in page.asked if not url.startswith((page.origin + "/", "data:"))} == set()


def dashboard_card(name: str) -> str:
    return f"#cards li:has(h3:text-is('{name}'))"


def test_tells_every_source_and_state_in_words(dashboard_page: DashboardPage) -> None:
    def steps(page: BrowserPage) -> None:
        dashboard_page.aggregate(page, "weather")
        page.wait_for_selector(dashboard_card("weather") + " .answers:has-text('fresh')")
        page.wait_for_selector("#log:has-text('weather loaded in')")
        assert page.locator("#cards h3").all_inner_texts() == ["weather", "news", "broken", "idle"]
        assert set(page.locator(".state").all_inner_texts()) == {"closed"}
        card = page.locator(dashboard_card("weather"))
        assert card.locator(".fresh").inner_text().startswith("fresh, ") and "TTL 10 min" in card.inner_text()
        label = card.get_by_role("img").get_attribute("aria-label")
        assert (
            label and label.startswith("Latency of the last ") and "p50" in label and "p95" in label and "p99" in label
        )
        assert card.get_by_role("button").inner_text().split() == ["Invalidate", "weather"]
        assert "no answer yet" in page.locator(dashboard_card("idle")).inner_text()
        assert "ok: all 4 circuits closed" in page.locator("#overall").inner_text()
        assert "none" in page.locator("#database").inner_text() and "ms" in page.locator("#lag").inner_text()
        shapes = "['closed', 'half_open', 'open'].map((state) => document.getElementById('s-' + state).innerHTML)"
        assert len(set(page.evaluate(shapes))) == 3
        policy = page.request.get(dashboard_page.origin + "/").headers["content-security-policy"]
        assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy
        assert page.locator("h1, h2").all_inner_texts()[:3] == ["Aggregation", "Sources", "Events"]

    dashboard_page.play(steps)


def test_shows_a_breaker_that_opens_without_a_reload(dashboard_page: DashboardPage) -> None:
    """And the time to the next probe goes down between two updates."""

    def steps(page: BrowserPage) -> None:
        page.evaluate("window.mark = 'the same page'")
        card = page.locator(dashboard_card("broken"))
        assert card.locator(".state").inner_text() == "closed"
        for _ in range(3):
            assert dashboard_page.aggregate(page, "broken")["state"] == "error"
        page.wait_for_selector(dashboard_card("broken") + " .state:has-text('open')")
        assert card.locator(".probe").inner_text().startswith("probe in ")
        assert "last error: http: 503" in card.inner_text()
        page.wait_for_selector("#overall:has-text('degraded: 1 of 4 circuits open')")
        assert page.title() == "1 of 4 circuits open – Aggregation"
        page.wait_for_selector("#log:has-text('broken circuit open, was closed')")
        page.wait_for_selector("#news:text-is('broken: circuit open, was closed')", state="attached")
        page.route("**/health", lambda route: None)  # no more updates
        left = card.locator(".probe").inner_text()
        page.wait_for_selector(f"{dashboard_card('broken')} .probe:not(:text-is('{left}'))")
        assert page.evaluate("window.mark") == "the same page"

    dashboard_page.play(steps)


def test_invalidates_and_says_so(dashboard_page: DashboardPage) -> None:
    def steps(page: BrowserPage) -> None:
        def serials() -> list[int]:
            return [dashboard_page.aggregate(page, "weather")["data"]["serial"] for _ in range(2)]

        [first, again] = serials()
        assert again == first
        button = page.locator(dashboard_card("weather")).get_by_role("button")
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#said:has-text('Invalidated: weather')")
        assert page.get_by_role("status").inner_text() == "Invalidated: weather"
        assert serials() == [first + 1] * 2
        page.wait_for_selector("#log:has-text('weather invalidated')")
        page.get_by_role("button", name="Invalidate all").click()
        page.wait_for_selector("#said:has-text('Invalidated: broken, idle, news, weather')")
        assert serials() == [first + 2] * 2

    dashboard_page.play(steps)


def test_asks_for_a_token(dashboard_page: DashboardPage, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, a wrong one, the right one; it is kept for the tab, and a wrong one is not."""
    monkeypatch.setenv("AGGREGATE_TOKEN", "right")

    def steps(page: BrowserPage) -> None:
        button, dialog = page.get_by_role("button", name="Invalidate all"), page.get_by_role("dialog")
        serial = dashboard_page.aggregate(page, "weather")["data"]["serial"]
        button.click()
        dialog.wait_for()
        page.keyboard.press("Escape")
        page.wait_for_selector("#said:has-text('Nothing invalidated: no token was given')")
        assert dashboard_page.aggregate(page, "weather")["data"]["serial"] == serial
        button.click()
        page.get_by_label("Token", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#why:has-text('refused')")
        assert page.evaluate("sessionStorage.getItem('token')") is None
        page.get_by_label("Token", exact=True).fill("right")
        dialog.get_by_role("button", name="Invalidate").click()
        page.wait_for_selector("#said:has-text('Invalidated: ')")
        assert dashboard_page.aggregate(page, "weather")["data"]["serial"] == serial + 1
        page.reload()
        page.locator(dashboard_card("weather")).get_by_role("button").click()
        page.wait_for_selector("#said:has-text('Invalidated: weather')")
        assert not dialog.is_visible()

    dashboard_page.play(steps)
    assert len(dashboard_page.complaints) == 3  # the browser's own note of each 401
    dashboard_page.complaints[:] = [text for text in dashboard_page.complaints if "401" not in text]


def test_fits_a_phone_and_the_dark(dashboard_page: DashboardPage) -> None:
    def steps(page: BrowserPage) -> None:
        def style(selector: str, name: str) -> str:
            return str(page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}"))

        def brightness(scheme: Literal["light", "dark"]) -> float:
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            return sum(map(int, style("body", "backgroundColor")[4:-1].split(","))) / 3

        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        page.emulate_media(reduced_motion="no-preference")
        assert style("button", "transitionDuration") != "0s"
        assert brightness("dark") < 40 and brightness("light") > 215
        assert style("button", "transitionDuration") == "0s"

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

    def steps(page: BrowserPage) -> None:
        page.route("**/health", lambda route: route.fulfill(body=json.dumps(body), content_type="application/json"))
        dashboard_page.nudge(page)
        page.wait_for_selector("#cards h3:has-text('<img')")
        assert page.locator("#cards > li").count() == 1
        assert page.locator("#cards").inner_text().count(evil) == 5  # name, state, answers, error, button
        refusal = {"title": evil}
        page.route("**/cache/**", lambda route: route.fulfill(status=503, body=json.dumps(refusal)))
        page.get_by_role("button", name="Invalidate all").click()
        page.wait_for_selector(f"#said:text-is('Nothing invalidated: 503 {evil}')")
        assert page.locator("img[src], [onerror]").count() == 0

    dashboard_page.play(steps)
    dashboard_page.complaints[:] = [text for text in dashboard_page.complaints if "503" not in text]


def test_survives_a_restart_of_its_server(dashboard_page: DashboardPage) -> None:
    """It says that the server is gone, keeps what it has, marked as old, and is live again without a reload."""

    def steps(page: BrowserPage) -> None:
        page.evaluate("window.mark = 'the same page'")
        dashboard_page.aggregate(page, "weather")
        page.wait_for_selector(dashboard_card("weather") + " .fresh:has-text('fresh')")
        dashboard_page.server.stop()
        page.wait_for_selector("#old:has-text('it cannot be reached')")
        page.wait_for_selector("#stream:has-text('reconnecting')")
        assert page.locator("#cards h3").count() == 4
        assert page.locator(dashboard_card("weather") + " .fresh").inner_text().startswith("was fresh, ")
        dashboard_page.server.start()
        page.wait_for_selector("#stream:has-text('live')")
        page.wait_for_selector("#old", state="hidden")
        dashboard_page.aggregate(page, "news")
        page.wait_for_selector("#log:has-text('news loaded in')")
        assert page.evaluate("window.mark") == "the same page"

    dashboard_page.play(steps)
    lost = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET")
    dashboard_page.complaints[:] = [
        text for text in dashboard_page.complaints if not any(word in text for word in lost)
    ]


def test_leaves_the_main_thread_alone(dashboard_browser: DashboardBrowser) -> None:
    """The browser's loop is of its thread: here another one runs, beside it and after it."""

    async def main() -> bool:
        page = dashboard_browser.thread.submit(dashboard_browser.context.new_page)
        await asyncio.wrap_future(dashboard_browser.thread.submit(page.result().close))
        return page.result().is_closed()

    assert asyncio.run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()
