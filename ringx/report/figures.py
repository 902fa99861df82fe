"""The figures of ``ringx plot``: scaling, efficiency, time, bytes and collectives, from rows of ``tables``."""

import csv
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..checks import DTYPES, MASKS, require_name
from ..comm.collectives import BENCHMARKS
from ..measure import records
from ..patterns.registry import ALGORITHMS

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
)  # Okabe-Ito, yellow darkened
MARKERS = "os^DvPX*"
STYLES = ("-", "--", "-.", ":")
PANELS = 4  # rows or columns of panels in a figure: the largest sizes are shown, the CSV holds all
SETTING = (
    "machine",
    "device",
    "dtype",
    "kernel",
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "threads",
    "labels",
)
WHERE = ("device", "backend", "dtype", "ranks_per_host", "labels")  # of collectives
Row = dict[str, Any]


class Lacking(Exception):
    """There are no records for this figure; says which are needed."""


def figure(name: str, rows: Sequence[Row]):
    """One figure, for notebooks: a name of FIGURES or BANDWIDTH, and rows of one setting.

    Raises:
        ValueError: there is no such figure, or the rows lack what it needs; says what."""
    require_name(name, [*FIGURES, *BANDWIDTH], "figure")
    plt = pyplot(None)
    with plt.rc_context(RC):
        try:
            fig, _ = (FIGURES | BANDWIDTH)[name](plt, _sorted(rows))
        except Lacking as reason:
            raise ValueError(f"{name}: {reason}.") from None
    plt.close(fig)
    return fig


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """In the order in which figures show them."""
    return sorted(
        rows,
        key=lambda r: (
            (_index(r["algorithm"]), r["layout"], not r["overlap"], r["world"])
            if "algorithm" in r
            else (list(BENCHMARKS).index(r["collective"]), "", False, r["world"], r["bytes"])
        ),
    )


def draw_figure(plt, figure, rows: Sequence[Row], path: Path) -> str:
    try:
        with plt.rc_context(RC):
            fig, shown = figure(plt, rows)
    except Lacking as reason:
        return f"skipped {path.name}: {reason}"
    for ending in ("png", "svg"):
        fig.savefig(
            f"{path}.{ending}", dpi=150, metadata={"Date": None} if ending == "svg" else None
        )
    plt.close(fig)
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, fieldnames=list(shown[0]))
        table.writeheader()
        table.writerows(shown)
    return f"{path}.png, .svg, .csv"


# ---- figures: each returns (figure, the rows of its CSV) or raises Lacking


def strong(plt, rows: Sequence[Row]):
    """Time against N at a fixed length."""
    panels = _with_several_ranks(
        rows, "seqlen", "one sequence length on at least two numbers of ranks"
    )
    return _scaling(
        plt, panels, "Strong scaling: the same sequence on more ranks", "seqlen", "S = {:,}"
    )


def weak(plt, rows: Sequence[Row]):
    """Time against N at a fixed length per rank."""
    panels = _with_several_ranks(
        rows, "seqlen_per_rank", "the same tokens per rank on at least two numbers of ranks"
    )
    title = "Weak scaling: the sequence grows with the ranks, and a rank's work with it"
    return _scaling(plt, panels, title, "seqlen_per_rank", "S / N = {:,}")


def _scaling(plt, rows, title, by, text):
    fig, axes = _panels(plt, rows, by, title)
    for (value, mask), ax in axes.items():
        here = [r for r in rows if r[by] == value and r["mask"] == mask]
        ideal = {
            n: median(t)
            for n in _values(here, "world")
            if (t := _ideals(r for r in here if r["world"] == n))
        }
        if ideal:
            ax.plot(
                *zip(*sorted(ideal.items()), strict=True),
                color="0.55",
                ls=(0, (2, 2)),
                lw=1.2,
                zorder=1,
                label=IDEAL,
            )
        _lines(ax, here, rows, lambda r: r["total_s"], spread=("total_q1_s", "total_q3_s"))
        ax.set(yscale="log", title=f"{mask}, {text.format(value)}")
        _plain_log(ax)
    return _finish(fig, axes, _values(rows, "world"), "forward + backward (s)"), _pick(
        rows, "total_s", "total_q1_s", "total_q3_s", "total_ideal_s"
    )


def efficiency(plt, rows: Sequence[Row]):
    """Percent of flash against N."""
    rows = [r for r in rows if r["total_efficiency_percent"] is not None]
    if not rows:
        raise Lacking("it needs records with a baseline (bench without --no-baseline)")
    fig, axes = _panels(plt, rows, "seqlen", "Parallel efficiency, forward + backward")
    top = max(105, *(1.05 * r["total_efficiency_percent"] for r in rows))
    for (seqlen, mask), ax in axes.items():
        here = [r for r in rows if r["seqlen"] == seqlen and r["mask"] == mask]
        ax.axhline(100, color="0.55", ls=(0, (2, 2)), lw=1.2, zorder=1, label=IDEAL)
        _lines(ax, here, rows, lambda r: r["total_efficiency_percent"])
        ax.set(ylim=(0, top), title=f"{mask}, S = {seqlen:,}")
    columns = [f"{p}_efficiency_percent" for p in records.PHASES]
    return _finish(fig, axes, _values(rows, "world"), "% of one-process flash / N"), _pick(
        rows, *columns
    )


def times(plt, rows: Sequence[Row]):
    """Time by algorithm and length, for one N."""
    fitting = [r for r in rows if not r["oversubscribed"]] or rows
    world = max(r["world"] for r in fitting)
    shown = [r for r in fitting if r["world"] == world]
    masks, lengths = _masks(shown), _values(shown, "seqlen")[-PANELS:]
    names = list(dict.fromkeys(_series(r) for r in shown))
    size = (max(WIDTH, 1.6 + 2.9 * len(lengths)), 1.5 + len(masks) * (0.55 + 0.34 * len(names)))
    fig, grid = plt.subplots(len(masks), len(lengths), squeeze=False, sharey=True, figsize=size)
    _title(fig, shown, f"Time by algorithm and sequence length, N = {world}")
    for (i, mask), (j, seqlen) in ((m, s) for m in enumerate(masks) for s in enumerate(lengths)):
        ax, here = grid[i][j], [r for r in shown if r["mask"] == mask and r["seqlen"] == seqlen]
        for r in here:
            y, colour = names.index(_series(r)), COLOURS[_index(r["algorithm"])]
            forward, total = 1e3 * r["forward_s"], 1e3 * r["total_s"]
            whisker = [[total - 1e3 * r["total_q1_s"]], [1e3 * r["total_q3_s"] - total]]
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
            ax.errorbar(total, y, xerr=_not_negative(whisker), color="black", capsize=2, lw=1)
            ax.annotate(
                f"{total:,.0f}" if total >= 100 else f"{total:.3g}",
                (max(total, 1e3 * r["total_q3_s"]), y),
                (4, 0),
                textcoords="offset points",
                va="center",
                size=8,
            )
        end = 1.22 * max((1e3 * r["total_q3_s"] for r in here), default=1)
        if ideal := _ideals(here):
            ax.axvline(1e3 * median(ideal), color="0.35", ls=(0, (2, 2)), lw=1.2)
            end = max(end, 1.05e3 * median(ideal))
        ax.set(title=f"{mask}, S = {seqlen:,}", yticks=range(len(names)), yticklabels=names)
        ax.set_xlim(0, end)
        ax.grid(axis="y", visible=False)
        if i == len(masks) - 1:
            ax.set_xlabel("time (ms)")
    grid[0][0].invert_yaxis()
    patch, line = plt.matplotlib.patches.Patch, plt.matplotlib.lines.Line2D
    handles = [
        patch(facecolor="0.6", edgecolor="black", lw=0.6, label="forward"),
        patch(facecolor="0.85", edgecolor="black", lw=0.6, hatch="///", label="backward"),
        line([], [], color="0.35", ls=(0, (2, 2)), lw=1.2, label=IDEAL),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=_columns(fig))
    return fig, _pick(
        shown, *(f"{p}_{q}" for p in records.PHASES for q in ("s", "q1_s", "q3_s", "ideal_s"))
    )


def traffic(plt, rows: Sequence[Row]):
    """Bytes that a rank sends against N: counted points on closed-form lines."""
    if max(r["world"] for r in rows) < 2:
        raise Lacking("one rank sends nothing; it needs records of at least two ranks")
    ranks_of = {
        s: len({r["world"] for r in rows if r["seqlen"] == s and r["world"] > 1})
        for s in _values(rows, "seqlen")
    }
    seqlen = max(ranks_of, key=lambda s: (ranks_of[s], s))
    here = [r for r in rows if r["seqlen"] == seqlen]
    shown = [
        q
        for r in here
        for q in _bytes_rows(r, "counted", r["world"], (r["forward_bytes"], r["backward_bytes"]))
    ]
    series = {_series(r, r["mask"]): r for r in here}.values()
    lines = [
        q
        for r in series
        for n, sent in closed_form(r, here)
        for q in _bytes_rows(r, "closed form", n, sent)
    ]
    masks = _masks(here)
    fig, grid = plt.subplots(
        len(masks), 2, squeeze=False, sharex=True, figsize=(9, 1.6 + 2.7 * len(masks))
    )
    _title(
        fig, here, f"Bytes that a rank sends, S = {seqlen:,}: counted points on closed-form lines"
    )
    for i, mask in enumerate(masks):
        for j, direction in enumerate(("forward", "backward")):
            ax = grid[i][j]
            for k, name in enumerate(dict.fromkeys(_series(r) for r in shown)):

                def points(source, name=name, mask=mask, direction=direction):
                    return [
                        r
                        for r in source
                        if _series(r) == name and r["mask"] == mask and r["direction"] == direction
                    ]

                if points(lines):
                    xy = [(r["world"], r["bytes_per_rank"] / 1e6) for r in points(lines)]
                    look = _look(points(lines)[0], k, shown) | {"marker": "", "label": None}
                    ax.plot(*zip(*xy, strict=True), **look)
                if points(shown):
                    xy = [(r["world"], r["bytes_per_rank"] / 1e6) for r in points(shown)]
                    look = _look(points(shown)[0], k, shown) | {"mfc": "none", "mew": 1.6}
                    ax.plot(
                        *zip(*xy, strict=True), **look | {"ls": "", "label": None, "clip_on": False}
                    )
                    ax.plot([], [], **look)
            ax.set_title(f"{mask}, {direction}")
            ax.set_ylim(bottom=0)
    axes = {(i, j): grid[i][j] for i in range(len(masks)) for j in range(2)}
    return _finish(fig, axes, [r["world"] for r in (*shown, *lines)], "MB sent by a rank (mean)"), [
        *shown,
        *lines,
    ]


def wired(plt, rows: Sequence[Row]):
    """Bytes on the wire against N: what the interfaces counted, and what the collectives' factors make of the closed form."""
    shown = [r for r in rows if r["wire_bytes"] is not None]
    if not shown:
        raise Lacking(
            "it needs records of ranks on several hosts over gloo, whose interfaces were read"
        )
    seqlen = max(r["seqlen"] for r in shown)
    shown = [r for r in shown if r["seqlen"] == seqlen]
    masks = _masks(shown)
    fig, grid = plt.subplots(
        1, len(masks), squeeze=False, sharey=True, figsize=(max(WIDTH, 1.2 + 3.9 * len(masks)), 4.3)
    )
    _title(
        fig,
        shown,
        f"Bytes that left a host (points) over the closed form, S = {seqlen:,}\nlines: by each collective's own factor",
    )

    def over(r: Row, column: str) -> float:
        return r[column] / (r["forward_bytes_closed_form"] + r["backward_bytes_closed_form"])

    for mask, ax in zip(masks, grid[0], strict=True):
        here = [r for r in shown if r["mask"] == mask]
        for k, name in enumerate(dict.fromkeys(_series(r) for r in shown)):
            mine = sorted((r for r in here if _series(r) == name), key=lambda r: r["world"])
            if not mine:
                continue
            look = _look(mine[0], k, shown)
            expected = [r for r in mine if r.get("wire_expected_bytes") is not None]
            line = [
                [r["world"] for r in expected],
                [over(r, "wire_expected_bytes") for r in expected],
            ]
            ax.plot(*line, **look | {"marker": "", "label": None})
            ax.plot(
                [r["world"] for r in mine],
                [over(r, "wire_bytes") for r in mine],
                **look | {"ls": "", "label": None},
            )
            ax.plot([], [], **look)
        ax.axhline(1, color="0.55", ls=(0, (2, 2)), lw=1.2, zorder=1)
        ax.set(ylim=(0.9, 1.05 * max(over(r, "wire_bytes") for r in shown)), title=mask)
    fig = _finish(
        fig,
        {(0, i): ax for i, ax in enumerate(grid[0])},
        [r["world"] for r in shown],
        "bytes on the wire / closed form",
    )
    return fig, [
        r | {"seqlen": seqlen}
        for r in _pick(
            shown, "wire_bytes", "forward_bytes_closed_form", "backward_bytes_closed_form"
        )
    ]


def bandwidth(plt, rows: Sequence[Row]):
    """Bus bandwidth against size, a panel per collective, with the fits."""
    names = [n for n in BENCHMARKS if any(r["collective"] == n for r in rows)]
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    size = (max(WIDTH, 1.0 + 2.7 * columns), 1.5 + 2.5 * lines)
    fig, grid = plt.subplots(lines, columns, squeeze=False, sharex=True, sharey=True, figsize=size)
    worlds = _values(rows, "world")
    first = rows[0]
    labels = f", {first['labels']}" if first["labels"] else ""
    title = f"Bus bandwidth of collectives (points) and time = alpha + beta S (lines)\n{first['device']}, {first['backend']}{labels}"
    fig.suptitle(title, fontsize=10.5)
    for i, ax in enumerate(grid.flat):
        if i >= len(names):
            ax.set_visible(False)
            continue
        for k, world in enumerate(worlds):
            here = [r for r in rows if (r["collective"], r["world"]) == (names[i], world)]
            if not here:
                continue
            look = {
                "color": COLOURS[k % len(COLOURS)],
                "marker": MARKERS[k % len(MARKERS)],
                "ms": 4.5,
            }
            bus = here[0]["busbw_bytes_per_s"] / here[0]["algbw_bytes_per_s"]
            xs, ys = (
                [r["bytes"] for r in here],
                [bus * r["bytes"] / r["median_s"] / 1e9 for r in here],
            )  # the fit is of medians
            ax.plot(xs, ys, ls="", label=f"N = {world}", **look)
            if here[0]["fit_alpha_s"] is not None:
                fitted = [
                    bus * x / (r["fit_alpha_s"] + r["fit_beta_s_per_byte"] * x) / 1e9
                    for x, r in zip(xs, here, strict=True)
                ]
                ax.plot(xs, fitted, color=look["color"], lw=1.2)
        ax.set(xscale="log", yscale="log", title=names[i])
        ax.minorticks_off()
        if i >= len(names) - columns:  # nothing below it
            ax.set_xlabel("size (bytes)")
            ax.tick_params(labelbottom=True)
    for row in grid:
        row[0].set_ylabel("busbw (GB/s)")
    handles: dict[str, Any] = {}
    for ax in grid.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    keep = (
        "collective",
        "world",
        "hosts",
        "bytes",
        "median_s",
        "algbw_bytes_per_s",
        "busbw_bytes_per_s",
        "wire_factor",
        *WHERE,
    )
    return fig, [{k: r[k] for k in (*keep, "fit_alpha_s", "fit_beta_s_per_byte")} for r in rows]


def closed_form(r: Row, measured: Sequence[Row]) -> list[tuple[int, tuple[float, float]]]:
    """[(N, (forward, backward) bytes)] of r's algorithm and sizes, for the measured N and powers of two up to 16."""
    algorithm = ALGORITHMS.get(r["algorithm"])
    counts = sorted({q["world"] for q in measured} | {1, 2, 4, 8, 16})
    if algorithm is None:
        return []
    found = []
    for n in counts:
        try:
            sizes = (
                r["batch"],
                r["seqlen"],
                r["heads"],
                r["kv_heads"],
                r["head_dim"],
                n,
                DTYPES[r["dtype"]].itemsize,
            )
            found.append((n, algorithm.bytes(*sizes, r["mask"] == "causal", r["layout"])))
        except ValueError:  # this many ranks cannot hold the sequence in equal shards
            continue
    return found


def _bytes_rows(r: Row, kind: str, world: int, sent: Sequence[float]) -> list[Row]:
    keep = ("algorithm", "layout", "overlap", "mask", "seqlen", *SETTING)
    return [
        {
            **{k: r[k] for k in keep},
            "world": world,
            "direction": d,
            "kind": kind,
            "bytes_per_rank": b,
        }
        for d, b in zip(("forward", "backward"), sent, strict=True)
    ]


FIGURES: dict[str, Callable[[Any, Sequence[Row]], tuple[Any, list[Row]]]] = {
    "strong_scaling": strong,
    "weak_scaling": weak,
    "efficiency": efficiency,
    "time_by_algorithm": times,
    "bytes": traffic,
    "wire": wired,
}
BANDWIDTH = {"collectives": bandwidth}
IDEAL = "ideal: one-process flash / N"
WIDTH = 7.0  # inches, at least: title and legend must fit
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


# ---- parts of figures


def _panels(plt, rows, by, title):
    """{(value of `by`, mask): axes}: rows of panels by size, columns by mask."""
    values, masks = _values(rows, by)[-PANELS:], _masks(rows)
    size = (max(WIDTH, 1.2 + 3.9 * len(masks)), 1.5 + 2.6 * len(values))
    fig, grid = plt.subplots(
        len(values), len(masks), squeeze=False, sharex=True, sharey="row", figsize=size
    )
    _title(fig, rows, title)
    return fig, {(v, m): grid[i][j] for i, v in enumerate(values) for j, m in enumerate(masks)}


def _lines(ax, here, rows, y, spread=None):
    """One line for each algorithm, layout and overlap; hollow points where threads outnumber cores."""
    for k, name in enumerate(dict.fromkeys(_series(r) for r in rows)):
        mine = sorted((r for r in here if _series(r) == name), key=lambda r: r["world"])
        if not mine:
            continue
        look = _look(mine[0], k, rows)
        xs, ys = [r["world"] for r in mine], [y(r) for r in mine]
        ax.plot(xs, ys, **look)
        if spread:
            ends = [
                [v - r[spread[0]] for r, v in zip(mine, ys, strict=True)],
                [r[spread[1]] - v for r, v in zip(mine, ys, strict=True)],
            ]
            ax.errorbar(
                xs, ys, yerr=_not_negative(ends), fmt="none", ecolor=look["color"], capsize=2, lw=1
            )
        over = [(a, b) for a, b, r in zip(xs, ys, mine, strict=True) if r["oversubscribed"]]
        if over:
            hollow = look | {
                "ls": "",
                "mfc": "white",
                "label": None,
                "zorder": look["zorder"] + 0.1,
            }
            ax.plot(*zip(*over, strict=True), **hollow)
    if any(r["oversubscribed"] for r in here):
        ax.plot(
            [],
            [],
            ls="",
            marker="o",
            mfc="white",
            mec="0.3",
            label="hollow: more threads than cores",
        )


def _look(r: Row, k: int, rows: Sequence[Row]) -> dict[str, Any]:
    """Colour and marker by algorithm, the same in every figure; line style by its variants (layout, overlap).  Later series are
    narrower, so that lines which coincide all show."""
    variants = list(dict.fromkeys(_series(q) for q in rows if q["algorithm"] == r["algorithm"]))
    i = _index(r["algorithm"])
    shrink = min(k, 5)
    return {
        "color": COLOURS[i],
        "marker": MARKERS[i],
        "ls": STYLES[variants.index(_series(r)) % len(STYLES)],
        "lw": 3.0 - 0.4 * shrink,
        "ms": 9 - 0.9 * shrink,
        "zorder": 3 + k,
        "label": _series(r),
    }


def _finish(fig, axes, worlds, ylabel):
    """Labels at the outer panels only, one legend below all of them."""
    handles: dict[str, Any] = {}
    last, first = list(axes)[-1][0], next(iter(axes))[1]
    for (row, column), ax in axes.items():
        _rank_axis(ax, sorted(set(worlds)))
        if row == last:
            ax.set_xlabel("ranks N")
        if column == first:
            ax.set_ylabel(ylabel)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    ordered = sorted(handles, key=lambda label: (label == IDEAL, label.startswith("hollow")))
    fig.legend(
        [handles[n] for n in ordered], ordered, loc="outside lower center", ncols=_columns(fig)
    )
    return fig


def _columns(fig) -> int:
    """How many legend entries fit side by side."""
    return int(fig.get_figwidth() // 2.3)


def _rank_axis(ax, worlds) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(worlds, [str(w) for w in worlds])
    ax.minorticks_off()
    ax.set_xlim(worlds[0] / 1.25, worlds[-1] * 1.25)


def _plain_log(ax) -> None:
    """1, 2, 5 on a log axis as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _title(fig, rows, title) -> None:
    r = rows[0]
    where = r["machine"] if r["device"] == "cpu" else r["device"]
    threads = (
        f", {r['threads']} thread{'s' if r['threads'] > 1 else ''} a rank"
        if r["device"] == "cpu"
        else ""
    )
    named = (("B", "batch"), ("H", "heads"), ("Hkv", "kv_heads"), ("D", "head_dim"))
    sizes = ", ".join(
        f"{name}\N{NO-BREAK SPACE}{r[field]}" for name, field in named
    )  # not to be broken in two
    labels = f", {r['labels']}" if r["labels"] else ""
    how = f"{where}{threads}, {r['dtype']}, kernel {r['kernel']}, {sizes}{labels}"
    fig.suptitle(
        "\n".join([title, *textwrap.wrap(how, int(12 * fig.get_figwidth()))]), fontsize=10.5
    )


# ---- rows


def _with_several_ranks(rows: Sequence[Row], by: str, what: str) -> list[Row]:
    found = [v for v in _values(rows, by) if len({r["world"] for r in rows if r[by] == v}) > 1]
    if not found:
        raise Lacking(f"it needs records of {what}")
    return [r for r in rows if r[by] in found]


def _pick(rows: Sequence[Row], *columns: str) -> list[Row]:
    keep = (
        "algorithm",
        "layout",
        "overlap",
        "mask",
        "world",
        "seqlen",
        "seqlen_per_rank",
        "oversubscribed",
        *SETTING,
        *columns,
    )
    return [{k: r[k] for k in keep} for r in rows]


def _slug(name: str, value: object) -> str:
    short = {"heads": "h", "kv_heads": "kv", "head_dim": "d", "batch": "b", "threads": "t"}.get(
        name, ""
    )
    return short + "".join(c if c.isalnum() else "-" for c in str(value)).strip("-")


def _series(r: Row, *more: str) -> str:
    return " ".join([r["algorithm"], r["layout"], *([] if r["overlap"] else ["no overlap"]), *more])


def _index(algorithm: str) -> int:
    names = list(ALGORITHMS)
    return (names.index(algorithm) if algorithm in names else len(names)) % len(COLOURS)


def _ideals(rows: Iterable[Row]) -> list[float]:
    return [r["total_ideal_s"] for r in rows if r["total_ideal_s"]]


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    return sorted({r[name] for r in rows})


def _masks(rows: Sequence[Row]) -> list[str]:
    return [m for m in MASKS if any(r["mask"] == m for r in rows)]


def _not_negative(ends):
    return [[max(0.0, x) for x in side] for side in ends]


def pyplot(backend: str | None = "agg"):
    try:
        import matplotlib
    except ImportError:
        raise ImportError("ringx plot needs matplotlib: pip install 'ringx[plot]'") from None
    if backend:
        matplotlib.use(backend)
    import matplotlib.pyplot as plt

    return plt
