"""Plots of what was measured: from the panels of a command to an SVG for light pages, and one for dark ones.

``draw(figures, folder)`` takes what stands in ``NAME.json`` and writes ``NAME-light.svg`` and ``NAME-dark.svg``.

* **One design**: ours in one accent colour, whoever else in grey; where threads and asyncio are both ours, asyncio has
  the accent and threads a second colour that is told from it by all kinds of sight (Okabe and Ito). Names stand at the
  bars and at the ends of the lines, so there is no legend. A thin line through the end of a bar goes from the smallest
  to the largest of the repetitions. Each axis names its unit; where values span decades it is logarithmic.
* **Letters are text**, so they can be searched, read aloud, and the files are small. They are laid out in DejaVu Sans,
  which is among the widest fonts; where it is missing, Verdana is as wide, and any other leaves more room, not less.
* The same figures give the same bytes: no date, no random ids.

Drawing needs matplotlib, which is imported only here, and only then. One thread.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.measure import Row, command, present
from bench.panels import Bars, Line, Lines, Panel, extent, figure_text, median, panels_of

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
DASHES = "-", (0, (3, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2))


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


@command(
    "draw the plots anew from the figures in --out, without measuring",
    "plot --out bench/results",
    "plot crawl models --out bench/results",
    NAMES=((), "as in NAME.json; default: all that are there"),
)
def plot(args: argparse.Namespace) -> list[Row]:
    if not present("matplotlib"):
        raise SystemExit(1)
    files = [Path(args.out, f"{name}.json") for name in args.NAMES] or sorted(Path(args.out).glob("*.json"))
    for file in files:
        try:
            drawn = draw(json.loads(file.read_text()), file.parent)
        except (OSError, ValueError) as error:
            raise SystemExit(f"bench: plot: {file}: {error}") from None
        print(*(map(str, drawn) if drawn else [f"{file}: nothing to draw"]), sep="\n")
    return []
