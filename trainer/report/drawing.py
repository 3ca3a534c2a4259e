"""How charts look: a light and a dark drawing of each, colours and marks that colour-blind readers tell apart.

Colours are those of Okabe & Ito (2008), "Color universal design"; every series also has a marker or a hatch of its own.
Charts are narrow, so that their labels stay readable on a phone.

Legend: M rows and N columns of a matrix, N points, I × J the grid of image tokens.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Chart
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator
from PIL import Image

WIDTH_INCHES = 4.6
_DOTS_PER_INCH = 200
_MARKERS = "os^DvPX*"
_HEAT = LinearSegmentedColormap.from_list("heat", [(0.84, 0.37, 0.0, 0.0), (0.84, 0.37, 0.0, 0.85)])
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo", "----")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one drawing."""

    background: str
    text: str
    faint: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1b1f24", "#d0d7de", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6e6e6e")
)
DARK = Theme(
    "#171a1f", "#e6e8eb", "#3a414a", ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#b0b0b0")
)


Triple = tuple[float, float, float]
"""A value and the ends of its interval; all three are equal where it has none."""


def draw(chart: Callable[[Theme], Chart]) -> tuple[bytes, bytes]:
    """PNGs of a chart in light and dark."""
    light, dark = (_png(chart, theme) for theme in (LIGHT, DARK))
    return light, dark


def bars(theme: Theme, series: Mapping[str, Mapping[str, Triple]], label: str, span: tuple[float, float]) -> Chart:
    """Horizontal bars with intervals, one group per category. series: name → category → (value, low, high)."""
    categories = list(dict.fromkeys(category for values in series.values() for category in values))
    thickness = 0.84 / len(series)
    chart, axes = _axes(0.9 + len(categories) * (0.13 + 0.15 * len(series)))
    for i, (name, values) in enumerate(series.items()):
        centres = [categories.index(c) - 0.42 + (i + 0.5) * thickness for c in values]
        value, low, high = np.array(list(values.values())).T
        axes.barh(
            centres,
            value,
            thickness,
            xerr=np.maximum([value - low, high - value], 0),
            label=name,
            color=_colour(theme, i),
            hatch=_HATCHES[i % len(_HATCHES)],
            edgecolor=theme.background,
            error_kw={"ecolor": theme.text, "elinewidth": 1, "capsize": 2},
        )
    axes.axvline(0, color=theme.text, linewidth=0.8)
    axes.set_yticks(range(len(categories)), categories)
    axes.set_ylim(len(categories) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(*span)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))  # more would run into each other beside long category names
    axes.set_xlabel(label)
    _legend(chart, series)
    return chart


def curves(
    theme: Theme,
    series: Mapping[str, Mapping[float, Triple]],
    x_label: str,
    y_label: str,
    *,
    y_span: tuple[float, float] | None = None,
    log: bool = False,
    mark_x: tuple[float, str] | None = None,
    marks_only: Collection[str] = (),
) -> Chart:
    """Lines with markers and shaded intervals, name → x → y. mark_x: a vertical line and what it stands for."""
    chart, axes = _axes(3.3)
    for i, (name, points) in enumerate(series.items()):
        x = sorted(points)
        y, low, high = np.array([points[at] for at in x]).T
        axes.plot(
            x,
            y,
            label=name,
            color=_colour(theme, i),
            marker=_MARKERS[i % len(_MARKERS)],
            markevery=max(1, len(x) // 10),
            linestyle="none" if name in marks_only else "solid",
            markersize=7 if name in marks_only else 4.5,
        )
        axes.fill_between(x, low, high, color=_colour(theme, i), alpha=0.2, linewidth=0)
    if mark_x is not None:
        axes.axvline(mark_x[0], label=mark_x[1], color=theme.text, linewidth=1, linestyle="dashed")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear", ylim=y_span)
    _legend(chart, series)
    return chart


def boxes(theme: Theme, summaries: Mapping[str, Sequence[float]], label: str) -> Chart:
    """One box per name from minimum, quartiles and maximum."""
    chart, axes = _axes(0.9 + 0.7 * len(summaries))
    keys = ("whislo", "q1", "med", "q3", "whishi")
    statistics = [{"label": name, **dict(zip(keys, ends, strict=True))} for name, ends in summaries.items()]
    line = {"color": theme.text}
    drawn = axes.bxp(
        statistics,
        orientation="horizontal",
        showfliers=False,
        patch_artist=True,
        widths=0.5,
        medianprops=line,
        whiskerprops=line,
        capprops=line,
    )
    for i, box in enumerate(drawn["boxes"]):
        box.set(facecolor=_colour(theme, i), edgecolor=theme.text, hatch=_HATCHES[i % len(_HATCHES)])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    return chart


def matrix(values_MN: np.ndarray, label: str) -> Chart:
    """Cosines from −1 to 1 as colours, and as numbers while they fit."""
    chart, axes = _axes(4.0)
    image = axes.imshow(values_MN, cmap="PuOr", vmin=-1, vmax=1)
    chart.colorbar(image, shrink=0.8).set_label(label)
    axes.grid(visible=False)
    for ticks in (axes.xaxis, axes.yaxis):
        ticks.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set(xlabel="slot", ylabel="slot")
    if len(values_MN) <= 10:
        for (row, column), value in np.ndenumerate(values_MN):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    return chart


def scatter(theme: Theme, points: Mapping[str, np.ndarray], x_label: str, y_label: str) -> Chart:
    """Two-dimensional points (N, 2) by name, smaller the more there are; without labels there are no axes."""
    chart, axes = _axes(3.9)
    for i, (name, points_N2) in enumerate(points.items()):
        axes.scatter(
            points_N2[:, 0],
            points_N2[:, 1],
            label=f"{name} ({len(points_N2)})",
            s=float(np.clip(4000 / len(points_N2), 6, 30)),
            marker=_MARKERS[i % len(_MARKERS)],
            color=_colour(theme, i),
            edgecolors=theme.background,
            linewidths=0.3,
            zorder=2 + i,
        )
    axes.set(xlabel=x_label, ylabel=y_label)
    if not (x_label or y_label):
        axes.set_axis_off()
    for handle in _legend(chart, points).legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([30.0])  # points of a large cloud are too small to tell their marks apart
    return chart


def heat_tiles(image: Image.Image, heats_IJ: Mapping[str, np.ndarray], label: str) -> Chart:
    """The image, then the image made pale under each heat map; one scale for all, from clear at 0."""
    n_columns = 4
    n_rows = -(-(1 + len(heats_IJ)) // n_columns)
    chart = Chart(figsize=(WIDTH_INCHES, 1.35 * n_rows + 0.5), layout="constrained")
    tiles = list(chart.subplots(n_rows, n_columns, squeeze=False).flat)
    for tile in tiles:
        tile.set_axis_off()
    extent = (0, image.width, image.height, 0)
    pale = Image.blend(image, Image.new("RGB", image.size, "white"), 0.6)
    tiles[0].imshow(image, extent=extent)
    tiles[0].set_title("image")
    highest = max(float(heat.max()) for heat in heats_IJ.values())
    for tile, (name, heat_IJ) in zip(tiles[1:], heats_IJ.items(), strict=False):
        tile.imshow(pale, extent=extent)
        drawn = tile.imshow(heat_IJ, extent=extent, cmap=_HEAT, vmin=0, vmax=highest)
        tile.set_title(name)
    bar = chart.colorbar(drawn, ax=tiles, orientation="horizontal", aspect=40, shrink=0.8)
    bar.set_label(label)
    bar.ax.set_facecolor("white")  # as the paled image is, in dark, too: the scale is clear at 0
    return chart


def _axes(height_inches: float) -> tuple[Chart, Axes]:
    chart = Chart(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    return chart, chart.subplots()


def _legend(chart: Chart, names: Collection[str]) -> Legend:
    return chart.legend(loc="outside upper center", ncols=3 if max(map(len, names)) <= 16 else 2, frameon=False)


def _colour(theme: Theme, i: int) -> str:
    return theme.series[i % len(theme.series)]


def _png(chart: Callable[[Theme], Chart], theme: Theme) -> bytes:
    style: Any = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.faint,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.faint,
        "grid.linewidth": 0.5,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.titlesize": 9,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "hatch.linewidth": 0.6,
        "font.size": 9,
    }
    with matplotlib.rc_context(style), io.BytesIO() as file:
        chart(theme).savefig(file, format="png", dpi=_DOTS_PER_INCH)
        return file.getvalue()
