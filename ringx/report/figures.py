"""The figures of ``ringx plot``: scaling, efficiency, time, bytes and collectives.

They are drawn from flat rows (``ringx.report.tables``).  Other figures take their look from here.
"""

import csv
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..checks import DTYPES, MASKS, require_name
from ..comm.collectives import BENCHMARKS
from ..measure import records
from ..measure.records import Row
from ..patterns.registry import ALGORITHMS

COLOURS = (  # Okabe-Ito, yellow darkened
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
)
MARKERS = "os^DvPX*"
STYLES = ("-", "--", "-.", ":")
DASHES = (0, (2, 2))  # of lines of what is ideal
PANELS = 4  # rows or columns of panels in a figure: the largest sizes are shown, the CSV holds all
WIDTH = 7.0  # inches, at least: title and legend must fit
IDEAL = "ideal: one-process flash / N"
RC = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "svg.hashsalt": "ringx",  # the same records give the same file
}
# A figure takes matplotlib.pyplot and rows of one setting; it returns the figure and the rows of
# its CSV, or raises Lacking.
Figure = Callable[[Any, Sequence[Row]], tuple[Any, list[Row]]]


class Lacking(Exception):
    """There are no records for this figure; says which are needed."""


def pyplot(backend: str | None = "agg") -> Any:
    """The module matplotlib.pyplot; an ImportError with the remedy where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("ringx plot needs matplotlib: pip install 'ringx[plot]'") from None
    if backend:
        matplotlib.use(backend)
    import matplotlib.pyplot as plt

    return plt


def figure(name: str, rows: Sequence[Row]) -> Any:
    """One figure, for notebooks: a name of FIGURES or BANDWIDTH, and rows of one setting.

    Raises:
        ValueError: there is no such figure, or the rows lack what it needs; says what."""
    known = {**FIGURES, **BANDWIDTH}
    require_name(name, known, "figure")
    plt = pyplot(None)
    with plt.rc_context(RC):
        try:
            fig, _ = known[name](plt, sort_rows(rows))
        except Lacking as reason:
            raise ValueError(f"{name}: {reason}.") from None
    plt.close(fig)
    return fig


def draw_figure(plt: Any, figure: Figure, rows: Sequence[Row], path: Path) -> str:
    """Writes a figure as `path`.png, .svg and .csv; a line about what was done."""
    try:
        with plt.rc_context(RC):
            fig, shown = figure(plt, rows)
    except Lacking as reason:
        return f"skipped {path.name}: {reason}"
    fig.savefig(f"{path}.png", dpi=150)
    fig.savefig(f"{path}.svg", dpi=150, metadata={"Date": None})
    plt.close(fig)
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(shown[0]))
        table.writeheader()
        table.writerows(shown)
    return f"{path}.png, .svg, .csv"


def kind_of(row: Row) -> str:
    """The kind of the record that a row is of."""
    return "attention" if "algorithm" in row else "collective"


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """In the order in which figures show them."""
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple:
    if kind_of(row) == "attention":
        return _index(row["algorithm"]), row["layout"], not row["overlap"], row["world"]
    return list(BENCHMARKS).index(row["collective"]), row["world"], row["bytes"]


# ---- scaling and efficiency


def strong_scaling(plt: Any, rows: Sequence[Row]) -> tuple[Any, list[Row]]:
    """Time against N at a fixed length."""
    panels = _with_several_ranks(
        rows, "seqlen", "one sequence length on at least two numbers of ranks"
    )
    return _scaling(
        plt,
        panels,
        title="Strong scaling: the same sequence on more ranks",
        by="seqlen",
        panel_title="S = {:,}",
    )


def weak_scaling(plt: Any, rows: Sequence[Row]) -> tuple[Any, list[Row]]:
    """Time against N at a fixed length per rank."""
    panels = _with_several_ranks(
        rows, "seqlen_per_rank", "the same tokens per rank on at least two numbers of ranks"
    )
    return _scaling(
        plt,
        panels,
        title="Weak scaling: the sequence grows with the ranks, and a rank's work with it",
        by="seqlen_per_rank",
        panel_title="S / N = {:,}",
    )


def _scaling(
    plt: Any, rows: Sequence[Row], *, title: str, by: str, panel_title: str
) -> tuple[Any, list[Row]]:
    fig, axes = _panels(plt, rows, by, title)
    for (value, mask), ax in axes.items():
        panel = _selected(rows, **{by: value, "mask": mask})
        ideal = _ideal_by_world(panel)
        if ideal:
            ax.plot(
                list(ideal),
                list(ideal.values()),
                color="0.55",
                ls=DASHES,
                lw=1.2,
                zorder=1,
                label=IDEAL,
            )
        _plot_series(ax, panel, rows, "total_s", spread=("total_q1_s", "total_q3_s"))
        ax.set(yscale="log", title=f"{mask}, {panel_title.format(value)}")
        _plain_log(ax)
    _finish(fig, axes, _values(rows, "world"), "forward + backward (s)")
    return fig, _csv_rows(rows, "total_s", "total_q1_s", "total_q3_s", "total_ideal_s")


def _ideal_by_world(rows: Sequence[Row]) -> dict[int, float]:
    """{number of ranks: seconds that would be ideal}, the median where several are known."""
    ideal = {}
    for world in _values(rows, "world"):
        seconds = _ideal_seconds(_selected(rows, world=world))
        if seconds:
            ideal[world] = median(seconds)
    return ideal


def efficiency(plt: Any, rows: Sequence[Row]) -> tuple[Any, list[Row]]:
    """Percent of flash against N."""
    column = "total_efficiency_percent"
    rows = [row for row in rows if row[column] is not None]
    if not rows:
        raise Lacking("it needs records with a baseline (bench without --no-baseline)")
    fig, axes = _panels(plt, rows, "seqlen", "Parallel efficiency, forward + backward")
    top = max(105, *(1.05 * row[column] for row in rows))
    for (seqlen, mask), ax in axes.items():
        panel = _selected(rows, seqlen=seqlen, mask=mask)
        ax.axhline(100, color="0.55", ls=DASHES, lw=1.2, zorder=1, label=IDEAL)
        _plot_series(ax, panel, rows, column)
        ax.set(ylim=(0, top), title=f"{mask}, S = {seqlen:,}")
    _finish(fig, axes, _values(rows, "world"), "% of one-process flash / N")
    columns = [f"{phase}_efficiency_percent" for phase in records.PHASES]
    return fig, _csv_rows(rows, *columns)


# ---- time by algorithm


def time_by_algorithm(plt: Any, rows: Sequence[Row]) -> tuple[Any, list[Row]]:
    """Time by algorithm and length, for one N: the most ranks that have a core for each thread."""
    shown = _on_most_ranks(rows)
    masks = _masks(shown)
    lengths = _values(shown, "seqlen")[-PANELS:]
    names = _series_names(shown)
    width = max(WIDTH, 1.6 + 2.9 * len(lengths))
    height = 1.5 + len(masks) * (0.55 + 0.34 * len(names))
    fig, grid = plt.subplots(
        len(masks), len(lengths), squeeze=False, sharey=True, figsize=(width, height)
    )
    _title(fig, shown, f"Time by algorithm and sequence length, N = {shown[0]['world']}")
    for mask, row_of_axes in zip(masks, grid, strict=True):
        for seqlen, ax in zip(lengths, row_of_axes, strict=True):
            _time_panel(ax, _selected(shown, mask=mask, seqlen=seqlen), names)
            ax.set_title(f"{mask}, S = {seqlen:,}")
    for ax in grid[-1]:
        ax.set_xlabel("time (ms)")
    grid[0][0].invert_yaxis()
    fig.legend(handles=_time_legend(plt), loc="outside lower center", ncols=_legend_columns(fig))
    columns: list[str] = []
    for phase in records.PHASES:
        columns += [f"{phase}_s", f"{phase}_q1_s", f"{phase}_q3_s", f"{phase}_ideal_s"]
    return fig, _csv_rows(shown, *columns)


def _on_most_ranks(rows: Sequence[Row]) -> list[Row]:
    """The rows of the most ranks that have a core for each thread; of the most, if none have."""
    candidates = [row for row in rows if not row["oversubscribed"]] or rows
    return _selected(candidates, world=max(row["world"] for row in candidates))


def _time_panel(ax: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """A bar for each series, at the place of its name."""
    for row in rows:
        _time_bar(ax, row, names.index(_series(row)))
    end = 1.22 * max((1e3 * row["total_q3_s"] for row in rows), default=1)
    ideal = _ideal_seconds(rows)
    if ideal:
        ax.axvline(1e3 * median(ideal), color="0.35", ls=DASHES, lw=1.2)
        end = max(end, 1.05e3 * median(ideal))
    ax.set(yticks=range(len(names)), yticklabels=names)
    ax.set_xlim(0, end)
    ax.grid(axis="y", visible=False)


def _time_bar(ax: Any, row: Row, y: int) -> None:
    """Forward and backward one after the other, the quartiles of both, and the number."""
    colour = COLOURS[_index(row["algorithm"])]
    forward, total = 1e3 * row["forward_s"], 1e3 * row["total_s"]
    first_quartile, third_quartile = 1e3 * row["total_q1_s"], 1e3 * row["total_q3_s"]
    ax.barh(y, forward, color=colour, edgecolor="black", lw=0.6)
    ax.barh(
        y,
        total - forward,
        left=forward,
        color=colour,
        alpha=0.45,
        edgecolor="black",
        lw=0.6,
        hatch="///",
    )
    whisker = _not_negative([[total - first_quartile], [third_quartile - total]])
    ax.errorbar(total, y, xerr=whisker, color="black", capsize=2, lw=1)
    ax.annotate(
        f"{total:,.0f}" if total >= 100 else f"{total:.3g}",
        (max(total, third_quartile), y),
        (4, 0),
        textcoords="offset points",
        va="center",
        size=8,
    )


def _time_legend(plt: Any) -> list[Any]:
    patch, line = plt.matplotlib.patches.Patch, plt.matplotlib.lines.Line2D
    return [
        patch(facecolor="0.6", edgecolor="black", lw=0.6, label="forward"),
        patch(facecolor="0.85", edgecolor="black", lw=0.6, hatch="///", label="backward"),
        line([], [], color="0.35", ls=DASHES, lw=1.2, label=IDEAL),
    ]


# ---- bytes


def bytes_sent(plt: Any, rows: Sequence[Row]) -> tuple[Any, list[Row]]:
    """Bytes that a rank sends against N: counted points on closed-form lines."""
    if max(row["world"] for row in rows) < 2:
        raise Lacking("one rank sends nothing; it needs records of at least two ranks")
    seqlen = _length_on_most_ranks(rows)
    rows = _selected(rows, seqlen=seqlen)
    counted = _counted(rows)
    lines = _closed_form_lines(rows)
    masks = _masks(rows)
    fig, grid = plt.subplots(
        len(masks), 2, squeeze=False, sharex=True, figsize=(9, 1.6 + 2.7 * len(masks))
    )
    _title(
        fig, rows, f"Bytes that a rank sends, S = {seqlen:,}: counted points on closed-form lines"
    )
    axes = {}
    for mask, row_of_axes in zip(masks, grid, strict=True):
        for direction, ax in zip(records.DIRECTIONS, row_of_axes, strict=True):
            axes[mask, direction] = ax
            _bytes_panel(ax, counted, lines, mask=mask, direction=direction)
            ax.set_title(f"{mask}, {direction}")
            ax.set_ylim(bottom=0)
    shown = counted + lines
    _finish(fig, axes, [row["world"] for row in shown], "MB sent by a rank (mean)")
    return fig, shown


def _length_on_most_ranks(rows: Sequence[Row]) -> int:
    """The sequence length that was measured on most numbers of ranks, the longest of these."""

    def order(seqlen: int) -> tuple[int, int]:
        worlds = {row["world"] for row in _selected(rows, seqlen=seqlen)}
        return len(worlds - {1}), seqlen

    return max(_values(rows, "seqlen"), key=order)


def _counted(rows: Sequence[Row]) -> list[Row]:
    counted: list[Row] = []
    for row in rows:
        sent = (row["forward_bytes"], row["backward_bytes"])
        counted += _bytes_rows(row, "counted", row["world"], sent)
    return counted


def _closed_form_lines(rows: Sequence[Row]) -> list[Row]:
    """What the closed forms give for each series and mask of the rows."""
    representatives = {_series(row, row["mask"]): row for row in rows}
    lines: list[Row] = []
    for row in representatives.values():
        for world, sent in closed_form(row, rows):
            lines += _bytes_rows(row, "closed form", world, sent)
    return lines


def _bytes_rows(row: Row, kind: str, world: int, sent: Sequence[float]) -> list[Row]:
    """A row of the CSV for each direction; sent: bytes forward and backward."""
    of_one_world = ("world", "seqlen_per_rank", "oversubscribed")
    columns = [column for column in records.CASE_COLUMNS if column not in of_one_world]
    columns += records.SETTING_COLUMNS["attention"]
    shared = {column: row[column] for column in columns}
    return [
        {
            **shared,
            "world": world,
            "direction": direction,
            "kind": kind,
            "bytes_per_rank": size,
        }
        for direction, size in zip(records.DIRECTIONS, sent, strict=True)
    ]


def closed_form(row: Row, measured: Sequence[Row]) -> list[tuple[int, tuple[float, float]]]:
    """[(N, (forward, backward) bytes)] of the row's algorithm and sizes, for the N that were
    measured and powers of two up to 16."""
    algorithm = ALGORITHMS.get(row["algorithm"])
    if algorithm is None:
        return []
    by_world = []
    worlds = {1, 2, 4, 8, 16}.union(_column(measured, "world"))
    for world in sorted(worlds):
        try:
            sent = algorithm.bytes(
                B=row["batch"],
                S=row["seqlen"],
                H=row["heads"],
                Hkv=row["kv_heads"],
                D=row["head_dim"],
                N=world,
                itemsize=DTYPES[row["dtype"]].itemsize,
                causal=row["mask"] == "causal",
                layout=row["layout"],
            )
        except ValueError:  # so many ranks cannot hold the sequence in equal shards
            continue
        by_world.append((world, sent))
    return by_world


def _bytes_panel(
    ax: Any, counted: Sequence[Row], lines: Sequence[Row], *, mask: str, direction: str
) -> None:
    points_of_panel = _selected(counted, mask=mask, direction=direction)
    lines_of_panel = _selected(lines, mask=mask, direction=direction)
    for place, name in enumerate(_series_names(counted)):
        line = [row for row in lines_of_panel if _series(row) == name]
        points = [row for row in points_of_panel if _series(row) == name]
        if line:
            look = {**_look(line[0], place, counted), "marker": "", "label": None}
            ax.plot(_column(line, "world"), _megabytes(line), **look)
        if points:
            look = {**_look(points[0], place, counted), "mfc": "none", "mew": 1.6}
            hollow = {**look, "ls": "", "label": None, "clip_on": False}
            ax.plot(_column(points, "world"), _megabytes(points), **hollow)
            ax.plot([], [], **look)  # for the legend


def _megabytes(rows: Sequence[Row]) -> list[float]:
    return [row["bytes_per_rank"] / 1e6 for row in rows]


def bytes_on_wire(plt: Any, rows: Sequence[Row]) -> tuple[Any, list[Row]]:
    """Bytes on the wire against N: what the interfaces counted, and what the collectives' factors
    make of the closed form."""
    shown = _longest_on_wire(rows)
    masks = _masks(shown)
    size = (max(WIDTH, 1.2 + 3.9 * len(masks)), 4.3)
    fig, grid = plt.subplots(1, len(masks), squeeze=False, sharey=True, figsize=size)
    seqlen = shown[0]["seqlen"]
    title = f"Bytes that left a host (points) over the closed form, S = {seqlen:,}"
    _title(fig, shown, f"{title}\nlines: by each collective's own factor")
    axes = {}
    top = 1.05 * max(_over_closed_form(shown, "wire_bytes"))
    for mask, ax in zip(masks, grid[0], strict=True):
        axes[0, mask] = ax
        _wire_panel(ax, _selected(shown, mask=mask), shown)
        ax.set(ylim=(0.9, top), title=mask)
    _finish(fig, axes, _column(shown, "world"), "bytes on the wire / closed form")
    columns = ("wire_bytes", "forward_bytes_closed_form", "backward_bytes_closed_form")
    return fig, _csv_rows(shown, *columns)


def _longest_on_wire(rows: Sequence[Row]) -> list[Row]:
    """The rows of the longest sequence of which bytes on the wire were counted."""
    counted = [row for row in rows if row["wire_bytes"] is not None]
    if not counted:
        raise Lacking(
            "it needs records of ranks on several hosts over gloo, whose interfaces were read"
        )
    return _selected(counted, seqlen=max(row["seqlen"] for row in counted))


def _wire_panel(ax: Any, rows: Sequence[Row], shown: Sequence[Row]) -> None:
    for place, name in enumerate(_series_names(shown)):
        series = _of_series(rows, name)
        if not series:
            continue
        look = _look(series[0], place, shown)
        expected = [row for row in series if row.get("wire_expected_bytes") is not None]
        ax.plot(
            _column(expected, "world"),
            _over_closed_form(expected, "wire_expected_bytes"),
            **{**look, "marker": "", "label": None},
        )
        ax.plot(
            _column(series, "world"),
            _over_closed_form(series, "wire_bytes"),
            **{**look, "ls": "", "label": None},
        )
        ax.plot([], [], **look)  # for the legend
    ax.axhline(1, color="0.55", ls=DASHES, lw=1.2, zorder=1)


def _over_closed_form(rows: Sequence[Row], column: str) -> list[float]:
    return [
        row[column] / (row["forward_bytes_closed_form"] + row["backward_bytes_closed_form"])
        for row in rows
    ]


# ---- collectives


def bus_bandwidth(plt: Any, rows: Sequence[Row]) -> tuple[Any, list[Row]]:
    """Bus bandwidth against size, a panel per collective, with the fits."""
    measured = set(_values(rows, "collective"))
    names = [name for name in BENCHMARKS if name in measured]
    columns = min(len(names), 4)
    lines = math.ceil(len(names) / columns)
    size = (max(WIDTH, 1.0 + 2.7 * columns), 1.5 + 2.5 * lines)
    fig, grid = plt.subplots(lines, columns, squeeze=False, sharex=True, sharey=True, figsize=size)
    fig.suptitle(_bandwidth_title(rows[0]), fontsize=10.5)
    used, unused = grid.flat[: len(names)], grid.flat[len(names) :]
    for name, ax in zip(names, used, strict=True):
        _bandwidth_panel(ax, rows, name)
    for ax in used[-columns:]:  # nothing is below these
        ax.set_xlabel("size (bytes)")
        ax.tick_params(labelbottom=True)
    for ax in unused:
        ax.set_visible(False)
    for row_of_axes in grid:
        row_of_axes[0].set_ylabel("busbw (GB/s)")
    handles = _legend_handles(grid.flat)
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    shown = [
        "collective",
        "world",
        "hosts",
        "bytes",
        "median_s",
        "algbw_bytes_per_s",
        "busbw_bytes_per_s",
        "wire_factor",
        *records.SETTING_COLUMNS["collective"],
        "fit_alpha_s",
        "fit_beta_s_per_byte",
    ]
    return fig, [{column: row[column] for column in shown} for row in rows]


def _bandwidth_title(row: Row) -> str:
    labels = f", {row['labels']}" if row["labels"] else ""
    return (
        "Bus bandwidth of collectives (points) and time = alpha + beta S (lines)\n"
        f"{row['device']}, {row['backend']}{labels}"
    )


def _bandwidth_panel(ax: Any, rows: Sequence[Row], collective: str) -> None:
    """Points of the medians, of which the fit is, and the fit, for each number of ranks."""
    for place, world in enumerate(_values(rows, "world")):
        series = _selected(rows, collective=collective, world=world)
        if not series:
            continue
        first = series[0]
        colour = COLOURS[place % len(COLOURS)]
        bus_factor = first["busbw_bytes_per_s"] / first["algbw_bytes_per_s"]
        sizes = _column(series, "bytes")
        ax.plot(
            sizes,
            [bus_factor * row["bytes"] / row["median_s"] / 1e9 for row in series],
            ls="",
            label=f"N = {world}",
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            ms=4.5,
        )
        if first["fit_alpha_s"] is not None:
            fitted = [bus_factor * row["bytes"] / _fitted_seconds(row) / 1e9 for row in series]
            ax.plot(sizes, fitted, color=colour, lw=1.2)
    ax.set(xscale="log", yscale="log", title=collective)
    ax.minorticks_off()


def _fitted_seconds(row: Row) -> float:
    return row["fit_alpha_s"] + row["fit_beta_s_per_byte"] * row["bytes"]


FIGURES: dict[str, Figure] = {
    "strong_scaling": strong_scaling,
    "weak_scaling": weak_scaling,
    "efficiency": efficiency,
    "time_by_algorithm": time_by_algorithm,
    "bytes": bytes_sent,
    "wire": bytes_on_wire,
}
BANDWIDTH: dict[str, Figure] = {"collectives": bus_bandwidth}
OF_KIND = {"attention": FIGURES, "collective": BANDWIDTH}  # by the kind of the records

# ---- parts of figures


def _panels(
    plt: Any, rows: Sequence[Row], by: str, title: str
) -> tuple[Any, dict[tuple[Any, str], Any]]:
    """(figure, {(value of `by`, mask): axes}): rows of panels by size, columns by mask."""
    values, masks = _values(rows, by)[-PANELS:], _masks(rows)
    size = (max(WIDTH, 1.2 + 3.9 * len(masks)), 1.5 + 2.6 * len(values))
    fig, grid = plt.subplots(
        len(values), len(masks), squeeze=False, sharex=True, sharey="row", figsize=size
    )
    _title(fig, rows, title)
    axes = {}
    for value, row_of_axes in zip(values, grid, strict=True):
        for mask, ax in zip(masks, row_of_axes, strict=True):
            axes[value, mask] = ax
    return fig, axes


def _plot_series(
    ax: Any,
    panel: Sequence[Row],
    rows: Sequence[Row],
    column: str,
    spread: tuple[str, str] | None = None,
) -> None:
    """One line for each algorithm, layout and overlap; hollow points where threads outnumber cores.

    panel: the rows to draw; rows: those of the whole figure, which decide about the looks; spread:
    the columns of the ends of error bars."""
    for place, name in enumerate(_series_names(rows)):
        series = _of_series(panel, name)
        if not series:
            continue
        look = _look(series[0], place, rows)
        ax.plot(_column(series, "world"), _column(series, column), **look)
        if spread:
            _error_bars(ax, series, column, spread, colour=look["color"])
        oversubscribed = [row for row in series if row["oversubscribed"]]
        if oversubscribed:
            hollow = {
                **look,
                "ls": "",
                "mfc": "white",
                "label": None,
                "zorder": look["zorder"] + 0.1,
            }
            ax.plot(_column(oversubscribed, "world"), _column(oversubscribed, column), **hollow)
    if any(row["oversubscribed"] for row in panel):
        ax.plot(
            [],
            [],
            ls="",
            marker="o",
            mfc="white",
            mec="0.3",
            label="hollow: more threads than cores",
        )


def _error_bars(
    ax: Any, series: Sequence[Row], column: str, spread: tuple[str, str], *, colour: str
) -> None:
    low, high = spread
    ends = _not_negative(
        [
            [row[column] - row[low] for row in series],
            [row[high] - row[column] for row in series],
        ]
    )
    worlds, values = _column(series, "world"), _column(series, column)
    ax.errorbar(worlds, values, yerr=ends, fmt="none", ecolor=colour, capsize=2, lw=1)


def _look(row: Row, place: int, rows: Sequence[Row]) -> dict[str, Any]:
    """Colour and marker by algorithm, the same in every figure; line style by its variants (layout,
    overlap).  Later series are narrower, so that lines which coincide all show.

    place: of the series among those of the figure's `rows`."""
    of_algorithm = [other for other in rows if other["algorithm"] == row["algorithm"]]
    variant = _series_names(of_algorithm).index(_series(row))
    index = _index(row["algorithm"])
    shrink = min(place, 5)
    return {
        "color": COLOURS[index],
        "marker": MARKERS[index],
        "ls": STYLES[variant % len(STYLES)],
        "lw": 3.0 - 0.4 * shrink,
        "ms": 9 - 0.9 * shrink,
        "zorder": 3 + place,
        "label": _series(row),
    }


def _finish(fig: Any, axes: dict[tuple[Any, Any], Any], worlds: Iterable[int], ylabel: str) -> None:
    """Axes of ranks, labels at the outer panels only, one legend below all of them.

    axes: by (row, column), in order."""
    ticks = sorted(set(worlds))
    places = list(axes)
    last_row, first_column = places[-1][0], places[0][1]
    for (row, column), ax in axes.items():
        _rank_axis(ax, ticks)
        if row == last_row:
            ax.set_xlabel("ranks N")
        if column == first_column:
            ax.set_ylabel(ylabel)
    handles = _legend_handles(axes.values())
    ordered = sorted(handles, key=lambda label: (label == IDEAL, label.startswith("hollow")))
    fig.legend(
        [handles[label] for label in ordered],
        ordered,
        loc="outside lower center",
        ncols=_legend_columns(fig),
    )


def _legend_handles(axes: Iterable[Any]) -> dict[str, Any]:
    """{label: what stands for it in the legend} of several axes, each label once."""
    labelled: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            labelled.setdefault(label, handle)
    return labelled


def _legend_columns(fig: Any) -> int:
    """How many legend entries fit side by side."""
    return int(fig.get_figwidth() // 2.3)


def _rank_axis(ax: Any, worlds: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(worlds, [str(world) for world in worlds])
    ax.minorticks_off()
    ax.set_xlim(worlds[0] / 1.25, worlds[-1] * 1.25)


def _plain_log(ax: Any) -> None:
    """1, 2, 5 on a log axis as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _title(fig: Any, rows: Sequence[Row], title: str) -> None:
    """The title, and below it the setting of the rows."""
    setting = "\n".join(textwrap.wrap(_setting_text(rows[0]), int(12 * fig.get_figwidth())))
    fig.suptitle(f"{title}\n{setting}", fontsize=10.5)


def _setting_text(row: Row) -> str:
    processor = row["device"]
    if row["device"] == "cpu":
        plural = "s" if row["threads"] > 1 else ""
        processor = f"{row['machine']}, {row['threads']} thread{plural} a rank"
    names = {"B": "batch", "H": "heads", "Hkv": "kv_heads", "D": "head_dim"}
    sizes = ", ".join(  # no line may break within a size
        f"{name}\N{NO-BREAK SPACE}{row[column]}" for name, column in names.items()
    )
    labels = f", {row['labels']}" if row["labels"] else ""
    return f"{processor}, {row['dtype']}, kernel {row['kernel']}, {sizes}{labels}"


# ---- rows


def _with_several_ranks(rows: Sequence[Row], by: str, needed: str) -> list[Row]:
    """The rows whose value of `by` was measured on several numbers of ranks."""
    values = set()
    for value in _values(rows, by):
        worlds = _values(_selected(rows, **{by: value}), "world")
        if len(worlds) > 1:
            values.add(value)
    if not values:
        raise Lacking(f"it needs records of {needed}")
    return [row for row in rows if row[by] in values]


def _selected(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values in these columns."""
    return [row for row in rows if all(row[column] == value for column, value in wanted.items())]


def _csv_rows(rows: Sequence[Row], *columns: str) -> list[Row]:
    """What the CSV of a figure holds of rows of attention: case, setting and these columns."""
    shown = (*records.CASE_COLUMNS, *records.SETTING_COLUMNS["attention"], *columns)
    return [{column: row[column] for column in shown} for row in rows]


def slug(column: str, value: object) -> str:
    """A value of a column as part of a file's name."""
    prefixes = {"heads": "h", "kv_heads": "kv", "head_dim": "d", "batch": "b", "threads": "t"}
    text = re.sub(r"[\W_]", "-", str(value)).strip("-")
    return prefixes.get(column, "") + text


def _series(row: Row, *more: str) -> str:
    """The name of the line that a row is a point of."""
    words = [row["algorithm"], row["layout"]]
    if not row["overlap"]:
        words.append("no overlap")
    return " ".join([*words, *more])


def _series_names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(_series(row) for row in rows))


def _of_series(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows of a series, by rising number of ranks."""
    return sorted((row for row in rows if _series(row) == name), key=lambda row: row["world"])


def _index(algorithm: str) -> int:
    """Where the looks of an algorithm are among COLOURS and MARKERS."""
    names = list(ALGORITHMS)
    place = names.index(algorithm) if algorithm in names else len(names)
    return place % len(COLOURS)


def _ideal_seconds(rows: Iterable[Row]) -> list[float]:
    return [row["total_ideal_s"] for row in rows if row["total_ideal_s"]]


def _column(rows: Iterable[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _values(rows: Iterable[Row], name: str) -> list[Any]:
    """The distinct values of a column, rising."""
    return sorted({row[name] for row in rows})


def _masks(rows: Sequence[Row]) -> list[str]:
    return [mask for mask in MASKS if any(row["mask"] == mask for row in rows)]


def _not_negative(ends: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[max(0.0, value) for value in side] for side in ends]
