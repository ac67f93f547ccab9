"""From the rows of a command to the panels of its plot: what is drawn, not how.

A function in ``PLOTS`` makes panels of the rows of a command; what none is there for gets bars of its first columns. A
panel without values is left out. The rows are those of ``NAME.json``: a spread is a list of three.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = re.compile(r"crawl_|html_parse|ingest_logs|market_pipeline|^ours|^async|^bare tasks|^tasks|^in the loop")
UNIT = re.compile(r"(?<= )(s|ms|us|ns|MB|KB|%)$|\w+/s$")
SITUATIONS = {
    "breaker closed": "one of four upstreams is silent, deadline 300 ms",
    "breaker open": "the same, once its circuit is open",
    "chaos": "all upstreams fail, hang, drip and lie, deadlines of 5 to 800 ms",
    "/aggregate alone": "/aggregate, nobody asks for /report",
    "/aggregate beside reports": "/aggregate, while /report is asked for",
}
THREADS = re.compile(r"crawl_threads|^(bare |\d )?threads?\b")
Row = Mapping[str, Any]


@dataclass
class Bar:
    """A line of a panel of bars; ``value`` is a number, a median with smallest and largest, or None for a heading."""

    name: str
    value: Any
    more: str = ""
    colour: str = "peer"


@dataclass
class Bars:
    """Horizontal bars, one below the other, along an axis that is called ``axis``."""

    title: str
    axis: str
    bars: list[Bar]
    log: bool = False
    reference: float | None = None


@dataclass
class Line:
    """Points, each of x, and a value as in `Bar`."""

    name: str
    points: list[tuple[float, Any]]
    colour: str = "peer"
    dash: int = 0


@dataclass
class Lines:
    """Lines with their names at their right ends."""

    title: str
    x: str
    y: str
    lines: list[Line] = field(default_factory=list)
    log_x: bool = True
    log_y: bool = True


Panel = Bars | Lines


def median(value: Any) -> float | None:
    """Of a number, or of three; None for what is neither."""
    if isinstance(value, (list, tuple)) and len(value) == 3:
        value = value[0]
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def extent(value: Any) -> tuple[float, float]:
    """Smallest and largest."""
    middle = median(value)
    assert middle is not None
    return (float(value[1]), float(value[2])) if isinstance(value, (list, tuple)) else (middle, middle)


def figure_text(value: float) -> str:
    """Three digits, or all before the point: ``0.02``, ``4.8``, ``37,700``."""
    if value == 0 or abs(value) >= 99.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1g}"


def ratio_text(value: float | None) -> str:
    """Two digits, or all before the point, and a times sign; nothing for no ratio."""
    text = "" if value is None else f"{value:.0f}" if value >= 9.95 else f"{value:#.2g}"
    return text and f"{text}\N{MULTIPLICATION SIGN}"


def colour_of(name: str) -> str:
    return "second" if THREADS.search(name) else "ours" if OURS.search(name) else "peer"


def bars(rows: Iterable[Row], column: str, *, ratio: str = "", unit: str = "") -> list[Bar]:
    """A bar for each row that has the column; behind it the ratio in another, of ``unit``: x Scrapy, for one."""
    found = []
    for row in rows:
        if median(row.get(column)) is not None:
            times = median(row.get(ratio))
            more = "" if times in (None, 1.0) else f"{ratio_text(times)}{(unit or ratio).removeprefix('x')}"
            name = str(row[""]).strip()
            found.append(Bar(name, row[column], more, colour_of(name)))
    return found


def lines(rows: Iterable[Row], x: str, y: str) -> list[Line]:
    """A line for each name, through the values in column ``y`` of its rows."""
    found: dict[str, Line] = {}
    for row in rows:
        at, name = median(row.get(x)), str(row[""]).strip()
        if at is not None and median(row.get(y)) is not None:
            if name not in found:
                colour, bare = colour_of(name), name.startswith("bare")
                alike = sum(line.colour == colour and not line.name.startswith("bare") for line in found.values())
                found[name] = Line(name, [], colour, 1 if bare else alike)
            line = found[name]
            line.points.append((at, row[y]))
    for line in found.values():
        line.points.sort(key=lambda point: (point[0], median(point[1])))
    return list(found.values())


def generic(rows: Sequence[Row]) -> list[Panel]:
    """For rows that nobody knows more of: a panel for each unit that columns end in, of a bar for each figure."""
    found: dict[str, list[Bar]] = {}
    for row in rows:
        name = str(row[""]).strip()
        for column, value in row.items():
            if median(value) is not None and (unit := UNIT.search(column)):
                title = column.removesuffix(f" {unit[0]}") if len(rows) == 1 else f"{name}, {column}"
                found.setdefault(unit[0], []).append(Bar(title, value, "", colour_of(name)))
    about = str(rows[0][""]).strip() if len(rows) == 1 else "All figures"
    return [Bars(f"{about}, in {unit}", unit, made[:12]) for unit, made in list(found.items())[:4]]


def plot_crawl(rows: Sequence[Row]) -> list[Panel]:
    """curl, which parses nothing, would make the others' bars too short to compare: its figure is told beside them."""
    crawlers = [row for row in rows if row[""] != "curl"]
    curl = "".join(
        f"; curl, which only fetches: {figure_text(median(row['pages/s']) or 0)}" for row in rows if row[""] == "curl"
    )
    speed = bars(crawlers, "pages/s", ratio="x Scrapy")
    return [
        Bars("Pages a second, whole crawls (more is better)", f"pages/s{curl}", speed),
        Bars("Peak memory of the process (less is better)", "MB", bars(crawlers, "peak MB")),
    ]


def plot_scale(rows: Sequence[Row]) -> list[Panel]:
    size = "URLs in the crawl"
    return [
        Lines("Time for a URL: flat is good", size, "ms a URL", lines(rows, "URLs", "ms/URL"), log_y=False),
        Lines("Memory for each further one", size, "bytes a URL", lines(rows, "URLs", "more bytes/URL"), log_y=False),
    ]


def plot_parse(rows: Sequence[Row]) -> list[Panel]:
    speed = bars(rows, "MB/s", ratio="x textbook", unit="x html.parser")
    return [Bars("HTML to title, links and words (more is better)", "MB/s", speed)]


def plot_rate(rows: Sequence[Row]) -> list[Panel]:
    ideal = median(rows[0].get("ideal s")) if rows else None
    return [
        Bars(
            "Time for the list at the given rate; the line is what the rate allows",
            "s",
            bars(rows, "wall s"),
            reference=ideal,
        )
    ]


def plot_million(rows: Sequence[Row]) -> list[Panel]:
    speeds = [
        Bar(f"{row['']}, {column}", row[column], "", colour_of(str(row[""])))
        for row in rows
        for column in ("first tenth", "slowest tenth", "last tenth")
    ]
    return [
        Bars("Rows a second, as the crawl goes on", "rows/s", speeds),
        Bars("Peak memory", "MB", bars(rows, "peak MB")),
    ]


def plot_models(rows: Sequence[Row]) -> list[Panel]:
    flight = [row for row in rows if "units" in row]
    units = "in flight"
    ideals = sorted(
        {(row["units"], (median(row["requests/s"]) or 0) / row["x ideal"]) for row in flight if row["x ideal"]}
    )
    ideal = Line("ideal", [(at, max(rate for same, rate in ideals if same == at)) for at in dict(ideals)], "peer", 1)
    return [
        Lines("Requests a second", units, "requests/s", [ideal, *lines(flight, "units", "requests/s")]),
        Lines("Time to the first answer", units, "s", lines(flight, "units", "first row s")),
        Lines("CPU time of a request", units, "ms", lines(flight, "units", "CPU ms/request")),
        Lines(
            "Memory of one in flight",
            units,
            "KB",
            lines((row for row in flight if row["units"] >= 10), "units", "KB/unit"),
        ),
        Bars("A loop's lag, p99, while pages of 20 to 200 KB are parsed", "ms", bars(rows, "lag p99 ms")),
        Bars(
            "p99 of 100 units' requests of 100 ms; a call blocks for 200 ms once a second",
            "ms",
            bars(rows, "request p99 ms"),
        ),
    ]


def plot_primitives(rows: Sequence[Row]) -> list[Panel]:
    """Cases that have a peer: a heading each, ours, and how many times ours the others take."""
    cases: list[list[Row]] = []
    for row in rows:
        if row["ns"] is None:
            cases.append([])
        cases[-1].append(row)
    found: list[Bar] = []
    for heading, *calls in cases:
        if len(calls) > 1:
            found.append(Bar(str(heading[""]), None))
            for place, call in enumerate(calls):
                times = median(call["ours / theirs"])
                more = "" if times is None else f"ours: {ratio_text(times)}"
                name = str(call[""]).strip()
                ours = not place or name[0].isupper() or name.startswith("primitives.")
                found.append(Bar(name, call["ns"], more, "ours" if ours else "peer"))
    return [Bars("A call, nobody else there unless it says so (less is better)", "ns", found, log=True)]


def plot_aggregate(rows: Sequence[Row]) -> list[Panel]:
    fast = [row for row in rows if "requests/s" in row]
    speed = bars(fast, "requests/s", ratio="x usual", unit="x the usual way")
    late: list[Bar] = []
    for row in rows:
        if row not in fast:
            late.append(Bar(SITUATIONS.get(row[""], str(row[""]).strip()), None))
            late += [Bar(part, row[f"{part} ms"], "", "ours") for part in ("p50", "p99", "max") if f"{part} ms" in row]
    return [
        Bars("Cached answers a second (more is better)", "requests/s", speed),
        Bars("Their p99 (less is better)", "ms", bars(fast, "p99 ms")),
        Bars("Time to the answer", "ms", late),
    ]


def plot_feeds(rows: Sequence[Row]) -> list[Panel]:
    titles = {"feeds": "26 feeds", "articles": "their 36 articles", "whole": "both"}
    panels: list[Panel] = []
    for part, title in titles.items():
        chosen = [
            dict(row) | {"": str(row[""]).partition(": ")[2]} for row in rows if str(row[""]).startswith(f"{part}:")
        ]
        panels.append(
            Bars(
                f"Time for {title} (less is better)",
                "s",
                bars(chosen, "s", ratio="x, s", unit="x as fast as one by one"),
            )
        )
    return panels


def plot_simulate(rows: Sequence[Row]) -> list[Panel]:
    found = [
        Bar(f"{row['']}: {name}", row[column], "", colour)
        for row in rows
        if "bound s" in row
        for name, column, colour in (
            ("its makespan", "makespan s", "ours"),
            ("no schedule can beat", "bound s", "peer"),
        )
    ]
    return [Bars("Simulated time of the crawl", "simulated s", found)] if found else generic(rows)


def plot_ladder(rows: Sequence[Row], unit: str) -> list[Panel]:
    """What was lost, and how late the rest was, at a ladder of rates; before them, the highest rate that held."""
    tops = [row for row in rows if "wanted/s" not in row]
    steps = [
        {"lost %": 100 * (row.get("lost", row.get("missing")) or 0) / max(1, row["sent"])} | dict(row)
        for row in rows
        if "wanted/s" in row
    ]
    kept: dict[tuple[Any, Any], Row] = {}
    for step in steps:  # a rate that failed once had a second chance, and holds if that did
        at = step[""], step["wanted/s"]
        if at not in kept or step["lost %"] < kept[at]["lost %"]:
            kept[at] = step
    best = next((key for row in tops for key in row if key.endswith("/s")), "")
    ratio = next((key for row in tops for key in row if key.startswith("x ")), "")
    late = next((key for row in kept.values() for key in row if key.startswith("p99 ")), "p99 s")
    panels: list[Panel] = []
    if best:
        held = bars(tops, best, ratio=ratio)
        panels.append(Bars("Highest rate at which nothing is lost (more is better)", unit, held))
    return [
        *panels,
        Lines(
            "Lost",
            f"rate, {unit}",
            "% of what was sent",
            lines(kept.values(), "wanted/s", "lost %"),
            log_x=False,
            log_y=False,
        ),
        Lines(
            "Latency, p99",
            f"rate, {unit}",
            late.rpartition(" ")[2],
            lines(kept.values(), "wanted/s", late),
            log_x=False,
        ),
    ]


def plot_soak(rows: Sequence[Row]) -> list[Panel]:
    panels: list[Panel] = []
    for row in rows:
        name = str(row[""]).strip()
        late = [column for column in row if re.fullmatch("(p50|p99|max) m?s", column)]
        unit = late[0].rpartition(" ")[2] if late else "s"
        panels.append(
            Bars(f"{name}: latency", unit, [Bar(column.split()[0], row[column], "", "ours") for column in late])
        )
        memory = [(part, row.get(f"MB {part}")) for part in ("at 10 s", "at the end")]
        held = [Bar(part, value, "", "ours") for part, value in memory if value is not None]
        panels.append(Bars(f"{name}: memory of all its processes", "MB", held))
    return panels


def plot_frontier(rows: Sequence[Row]) -> list[Panel]:
    claims = [
        Bar(f"{row['']}, {part}", row[f"claim {part} ms"], "", "ours")
        for row in rows
        if "claim p50 ms" in row
        for part in ("p50", "p99")
    ]
    return [
        Bars("To claim 100 hosts, by the URLs that wait (less is better)", "ms", claims),
        Bars(
            "URLs a second, all workers together",
            "URLs/s",
            [Bar(bar.name, bar.value, bar.more, "ours") for bar in bars(rows, "URLs/s", ratio="x 1 worker")],
        ),
    ]


PLOTS: dict[str, Callable[[Sequence[Row]], list[Panel]]] = {
    "aggregate": plot_aggregate,
    "aggregate-only": plot_aggregate,
    "crawl": plot_crawl,
    "crawl-scale": plot_scale,
    "feeds": plot_feeds,
    "frontier": plot_frontier,
    "ingest-soak": plot_soak,
    "ingest": functools.partial(plot_ladder, unit="events/s"),
    "market-soak": plot_soak,
    "market": functools.partial(plot_ladder, unit="trades/s"),
    "million": plot_million,
    "models": plot_models,
    "parse": plot_parse,
    "primitives": plot_primitives,
    "rate": plot_rate,
    "simulate": plot_simulate,
    "simulate-seeds": lambda rows: [],
    "simulate-shared-seeds": lambda rows: [],
}


def panels_of(name: str, rows: Sequence[Row]) -> list[Panel]:
    """Those that have something to show."""
    made = PLOTS.get(name, generic)(rows)
    return [panel for panel in made if (panel.bars if isinstance(panel, Bars) else panel.lines)]
