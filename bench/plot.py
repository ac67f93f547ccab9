"""Plots of what bench measured: from the figures of a subcommand to an SVG for light pages, and one for dark ones.

``draw(figures, folder)`` takes what stands in ``NAME.json`` and writes ``NAME-light.svg`` and ``NAME-dark.svg``.

* **One design**: ours in one accent colour, whoever else in grey; where threads and asyncio are both ours, asyncio has
  the accent and threads a second colour that is told from it by all kinds of sight (Okabe and Ito). Names stand at the
  bars and at the ends of the lines, so there is no legend. A thin line through the end of a bar goes from the smallest
  to the largest of the repetitions. Each axis names its unit; where values span decades it is logarithmic.
* **What is drawn** follows from the rows: a function in ``PLOTS`` makes panels of them, and what none is there for gets
  bars of its first columns. A panel without values is left out.
* **Letters are text**, so they can be searched, read aloud, and the files are small. They are laid out in DejaVu Sans,
  which is among the widest fonts; where it is missing, Verdana is as wide, and any other leaves more room, not less.
* The same figures give the same bytes: no date, no random ids.

Drawing needs matplotlib, which is imported only here, and only then. One thread.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 8.6
"""Inches of a figure: the width of a README's text."""
FONTS = "'DejaVu Sans', Verdana, sans-serif"
BAR = 0.235
"""Inches of a bar with what is around it."""
EARLY = 0.6
"""Where in the width a line must end, as the only one, for its name to stand at its end, not beside the panel."""
THEMES = {
    "light": {
        "paper": "#ffffff",
        "ink": "#1f2328",
        "faint": "#d0d7de",
        "ours": "#0072b2",
        "second": "#c24e00",
        "peer": "#8c959f",
    },
    "dark": {
        "paper": "#0d1117",
        "ink": "#e6edf3",
        "faint": "#30363d",
        "ours": "#56b4e9",
        "second": "#e69f00",
        "peer": "#7d8590",
    },
}
OURS = re.compile(r"crawl_|html_parse|ingest_logs|market_pipeline|^ours|^async|^bare tasks|^tasks|^in the loop")
UNIT = re.compile(r"(?<= )(s|ms|us|ns|MB|KB|%)$|\w+/s$")
SITUATIONS = {
    "breaker closed": "one of four upstreams is silent, deadline 300 ms",
    "breaker open": "the same, once its circuit is open",
    "chaos": "all upstreams fail, hang, drip and lie, deadlines of 5 to 800 ms",
    "/aggregate alone": "/aggregate, nobody asks for /report",
    "/aggregate beside reports": "/aggregate, while /report is asked for",
}
DASHES = "-", (0, (3, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2))
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

# ------------------------------------------------------------------------------------------- from rows to panels


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


# ------------------------------------------------------------------------------------------------ from panels to SVG


def style(theme: Mapping[str, str], name: str) -> dict[str, Any]:
    ink, faint = theme["ink"], theme["faint"]
    return {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.family": ["DejaVu Sans"],  # it comes with matplotlib
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": faint,
        "axes.labelcolor": ink,
        "axes.facecolor": theme["paper"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlecolor": ink,
        "figure.facecolor": theme["paper"],
        "savefig.facecolor": theme["paper"],
        "grid.color": faint,
        "grid.linewidth": 0.5,
        "text.color": ink,
        "xtick.bottom": False,
        "ytick.left": False,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "path.simplify": True,
    }


def number_axis(axis: Any, panel: Panel) -> None:
    """Ticks as numbers are written, ``10,000``; on a logarithmic axis at the decades, at 2 and 5 too if few are."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        span, most = high / low, 30 if axis.axis_name == "x" and high > 9999 else 300  # long numbers need room
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if span < 8 else (1.0, 2.0, 5.0) if span < most else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_locator(NullLocator())
    elif isinstance(panel, Lines):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: figure_text(value))


def draw_bars(axes: Axes, panel: Bars, theme: Mapping[str, str]) -> None:
    places = range(len(panel.bars))
    if panel.log:
        axes.set_xscale("log")
    ends = [extent(bar.value)[1] for bar in panel.bars if bar.value is not None]
    starts = [value for bar in panel.bars if (value := median(bar.value))]
    top = max([*ends, panel.reference or 0]) or 1.0
    low = min(starts, default=1.0) / 2 if panel.log else 0.0
    axes.set_xlim(low, top * (top / low) ** 0.35 if panel.log else top * 1.3)
    for place, bar in zip(places, panel.bars, strict=True):
        value = median(bar.value)
        if value is None:
            axes.annotate(
                bar.name,
                (0, place),
                (2, 0),
                ("axes fraction", "data"),
                "offset points",
                va="center",
                fontweight="bold",
                fontsize=8,
            )
            continue
        smallest, largest = extent(bar.value)
        axes.barh(place, value - low, 0.68, low, color=theme[bar.colour])
        if largest > smallest:
            axes.plot([smallest, largest], [place, place], color=theme["ink"], linewidth=1.1, solid_capstyle="butt")
        text = figure_text(value) + (f" ({bar.more})" if bar.more else "")
        axes.annotate(text, (largest, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    if panel.reference is not None:
        axes.axvline(panel.reference, color=theme["ink"], linewidth=0.8, linestyle=(0, (3, 2)))
    axes.set_yticks(places, ["" if bar.value is None else bar.name for bar in panel.bars])
    axes.set_ylim(len(panel.bars) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(panel.axis)
    axes.set_title(panel.title)
    number_axis(axes.xaxis, panel)


def draw_lines(axes: Axes, panel: Lines, theme: Mapping[str, str]) -> None:
    axes.set_xscale("log" if panel.log_x else "linear")
    axes.set_yscale("log" if panel.log_y else "linear")
    for line in panel.lines:
        points = [(x, value) for x, value in line.points if not panel.log_y or (median(value) or 0) > 0]
        xs, ys = [x for x, _ in points], [median(value) or 0.0 for _, value in points]
        dash = DASHES[line.dash % len(DASHES)]
        colour = theme[line.colour]
        axes.plot(
            xs,
            ys,
            color=colour,
            linewidth=1.5,
            linestyle=dash,
            marker="" if line.name == "ideal" else "o",
            markersize=3.2,
        )
        for x, value in points:
            smallest, largest = extent(value)
            if largest > smallest and (smallest > 0 or not panel.log_y):
                axes.plot([x, x], [smallest, largest], color=colour, linewidth=1.0, solid_capstyle="butt")
    if not panel.log_y:
        highest = max(extent(value)[1] for line in panel.lines for _, value in line.points)
        axes.set_ylim(0, 1.1 * highest if highest > 0 else 1)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.set_title(panel.title)
    number_axis(axes.xaxis, panel)
    number_axis(axes.yaxis, panel)


def name_lines(axes: Axes, panel: Lines, theme: Mapping[str, str]) -> None:
    """The names, right of the last points, moved apart as far as they need to be. The axes must have their places."""
    height, gap = axes.bbox.height, 11.5 * axes.figure.dpi / 72
    last: list[tuple[Line, tuple[float, float]]] = []
    for line in panel.lines:
        points = [(x, median(value) or 0.0) for x, value in line.points if not panel.log_y or (median(value) or 0) > 0]
        last += [(line, points[-1])] if points else []
    shown = axes.transData + axes.transAxes.inverted()
    early = [line.name for line, point in last if shown.transform(point)[0] < EARLY]
    ends = []
    for line, point in last:
        if early == [line.name]:
            colour = theme["ink" if line.colour == "peer" else line.colour]
            axes.annotate(line.name, point, (5, 0), textcoords="offset points", va="center", fontsize=8, color=colour)
        else:
            ends.append((axes.transData.transform(point)[1] - axes.bbox.y0, point, line))
    ends.sort(key=lambda end: end[0])
    places = [end[0] for end in ends]
    for _ in range(100):  # apart, and inside; it settles long before
        for a, b in itertools.pairwise(range(len(places))):
            if (short := gap - (places[b] - places[a])) > 0:
                places[a], places[b] = places[a] - short / 2, places[b] + short / 2
        places = [min(max(place, 0.0), height) for place in places]
    for place, (_, end, line) in zip(places, ends, strict=True):
        at = axes.transAxes.inverted().transform((axes.bbox.x0, axes.bbox.y0 + place))[1]
        axes.annotate(
            line.name,
            end,
            (1.03, at),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=theme["ink" if line.colour == "peer" else line.colour],
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": theme["faint"], "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
        )


def height_of(panel: Panel) -> float:
    """Inches."""
    return 0.72 + BAR * len(panel.bars) if isinstance(panel, Bars) else 2.5


def shorten(tag: str) -> str:
    """Without digits that nobody sees, turns by no degrees, and names; the font is that of the whole."""
    tag = re.sub(r'<g id="[^"]*"', "<g", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", re.sub(r"(\d\.\d\d)\d+", r"\1", tag))
    return tag.replace("font-family: 'DejaVu Sans'; ", "")


def render(name: str, title: str, panels: Sequence[Panel], theme: Mapping[str, str]) -> str:
    """The SVG: bars over the whole width, lines two beside each other."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    mpl.use("svg")
    rows: list[list[Panel]] = []
    for panel in panels:
        if isinstance(panel, Lines) and rows and len(rows[-1]) == 1 and isinstance(rows[-1][0], Lines):
            rows[-1].append(panel)
        else:
            rows.append([panel])
    heights = [max(map(height_of, row)) for row in rows]
    with mpl.rc_context(style(theme, name)):  # type: ignore[arg-type]
        figure = Figure(
            figsize=(WIDTH, sum(heights)),
            layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.05, hspace=0.02, wspace=0.03),
        )
        drawn: list[tuple[Axes, Lines]] = []
        for part, row in zip(
            figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0], rows, strict=True
        ):
            for axes, panel in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
                if isinstance(panel, Bars):
                    draw_bars(axes, panel, theme)
                else:
                    draw_lines(axes, panel, theme)
                    drawn.append((axes, panel))
        for final in (False, True):  # the names need room, and what makes room moves what they are at
            figure.draw_without_rendering()
            if final:
                figure.set_layout_engine("none")
            for axes, panel in drawn:
                for text in list(axes.texts):
                    text.remove()
                name_lines(axes, panel, theme)
        out = io.StringIO()
        about = "; ".join(f"{panel.title} ({panel.axis if isinstance(panel, Bars) else panel.y})" for panel in panels)
        figure.savefig(
            out, format="svg", metadata={"Date": None, "Creator": None, "Title": title, "Description": about}
        )
    svg = re.sub(r"<[^>]+>", lambda tag: shorten(tag[0]), re.sub(r"\n\s+", "\n", out.getvalue()))
    return svg.replace("<svg ", f'<svg font-family="{FONTS}" ', 1)


def recolour(svg: str, theme: str) -> str:
    """A plot for light pages in the colours of another theme; all else stays where it is."""
    new = dict(zip(THEMES["light"].values(), THEMES[theme].values(), strict=True))
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: new.get(colour[0], colour[0]), svg)


def draw(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write both plots of the figures of a subcommand; which files. None if there is nothing to show.

    Raises ValueError if they are no figures of bench, OSError if the folder cannot be written.
    """
    name, rows = figures.get("name"), figures.get("results")
    if not isinstance(name, str) or not isinstance(rows, list):
        raise ValueError("these are no figures of bench")
    panels = panels_of(name, rows)
    if not panels:
        return []
    light = render(name, f"python -m bench {name.replace('-', ' --')}", panels, THEMES["light"])
    files = []
    for theme in THEMES:
        file = Path(folder, f"{name}-{theme}.svg")
        file.write_text(recolour(light, theme))
        files.append(file)
    return files
