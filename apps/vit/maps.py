"""Forecasts drawn: maps beside their targets, skill by lead time, zonal spectra.

    python -m apps.vit.maps FOLDER --out DIR      # first and last lead of the first time
    python -m apps.vit.maps FOLDER --out DIR --variable t2m --time 2019-03-25T06 --lead 6

FOLDER is what apps.vit.predict wrote: forecasts.nc or forecasts.zarr, and beside it scores.csv and
spectra.csv.  Without --variable, maps are drawn of the first 4.  Writes
DIR/map_VARIABLE_TIME_LEADh, DIR/skill and DIR/spectra_LEADh, each as PNG and SVG, with numbers as
CSV; more than 6 variables have their skill and spectra in several files.  A figure that lacks its
file is skipped with the reason.  Coastlines need cartopy, which downloads them once.
Needs matplotlib: pip install 'ringx[plot]'
"""

import argparse
import itertools
import math
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from apps.common.arguments import Parser, run_command
from apps.vit import scores
from apps.vit.scores import ScoreRow, SpectrumRow
from ringx.checks import require_name
from ringx.report import figures

if TYPE_CHECKING:
    import xarray as xr

PROG = "apps.vit.maps"
DIMS = ("time", "lead_time", "latitude", "longitude")
VARIABLES = 4  # of which maps are drawn unless one is named
PANELS = 6  # of a figure, at most
STYLES = (*figures.STYLES[:4], (0, (6, 1, 1, 1, 1, 1)), "-")  # of FORECASTS, and the truth
WAVELENGTHS = (20000, 5000, 2000, 500, 100, 20)  # km, marked on spectra
HOUR = np.timedelta64(1, "h")

R = TypeVar("R", ScoreRow, SpectrumRow)


# ---- the files


def open_forecasts(folder: str | Path) -> "xr.Dataset":
    """FOLDER/forecasts.nc, or else FOLDER/forecasts.zarr, read lazily.

    lead_time is decoded to timedelta64.

    Raises:
        ValueError: there is none, or it is not laid out as apps.vit.predict writes it; names it.
        ImportError: xarray is missing."""
    try:
        import xarray as xr
    except ImportError:
        raise ImportError("apps.vit.maps needs xarray: pip install xarray netCDF4") from None
    folder = Path(folder)
    paths = [p for p in (folder / "forecasts.nc", folder / "forecasts.zarr") if p.exists()]
    if not paths:
        raise ValueError(
            f"{folder} holds no forecasts.nc or forecasts.zarr; apps.vit.predict writes one."
        )
    path = paths[0]
    try:
        # Timedeltas are not decoded: a field in seconds or hours is no lead.
        file = xr.open_dataset(path, decode_timedelta=False)
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from None
    try:
        return _decode_forecasts(file)
    except ValueError as e:
        file.close()
        raise ValueError(f"{path} {e}; it must be what apps.vit.predict writes.") from None


def _decode_forecasts(file: "xr.Dataset") -> "xr.Dataset":
    """The dataset with decoded leads, whose close() closes the file.

    Raises:
        ValueError: it is not laid out as forecasts are."""
    import xarray as xr

    for name in DIMS:
        if name not in file.dims or name not in file.coords:
            raise ValueError(f"has no dimension with coordinates {name!r}")
    leads = xr.decode_cf(file[["lead_time"]], decode_timedelta=True)
    dataset = file.assign_coords(lead_time=leads.lead_time)
    dataset.set_close(file.close)
    for name, kind in (("time", "datetime64"), ("lead_time", "timedelta64")):
        if not np.issubdtype(dataset[name].dtype, getattr(np, kind)):
            raise ValueError(
                f"has a {name} of {dataset[name].dtype}, not {kind}: units are missing or unknown"
            )
    if not channels_of(dataset):
        raise ValueError(
            f"holds no pair of variables NAME and NAME_truth with dimensions {', '.join(DIMS)}"
        )
    return dataset


def channels_of(dataset: "xr.Dataset") -> list[str]:
    """Names of the forecast fields: those that have a NAME_truth beside them."""
    channels = []
    for name in map(str, dataset.data_vars):
        truth = f"{name}_truth"
        if truth not in dataset.data_vars:
            continue
        if set(dataset[name].dims) == set(DIMS) == set(dataset[truth].dims):
            channels.append(name)
    return channels


def lead_hours(dataset: "xr.Dataset") -> list[int]:
    """The leads in hours."""
    return [round(float(lead / HOUR)) for lead in dataset.lead_time.values]


def coastlines(dataset: "xr.Dataset") -> list[np.ndarray]:
    """Natural Earth's coastlines through cartopy, finer for a region than for the globe.

    Returns:
        [n, 2] degrees east and north of each line.

    Raises:
        ValueError: cartopy is missing, or has no coastlines and cannot download them."""
    try:
        from cartopy.io import shapereader
    except ImportError:
        raise ValueError("cartopy is not installed") from None
    regional = np.ptp(dataset.longitude.values) < 90
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: some compute nodes never answer
    try:
        file = shapereader.natural_earth(
            resolution="50m" if regional else "110m", category="physical", name="coastline"
        )
        shapes = list(shapereader.Reader(file).geometries())
    except OSError as e:
        raise ValueError(f"cartopy cannot get its coastlines ({e})") from None
    finally:
        socket.setdefaulttimeout(before)
    lines = []
    for shape in shapes:
        for line in getattr(shape, "geoms", [shape]):
            lines.append(np.asarray(line.coords)[:, :2])
    return lines


# ---- maps


def map_numbers(
    dataset: "xr.Dataset", channel: str, time_index: int, lead_index: int
) -> dict[str, Any]:
    """What a map shows, in numbers.

    Returns:
        variable, units, time, valid_time, lead_hours, rmse and bias (weighted by cos(latitude)),
        and the least and largest values of target, forecast and difference.

    Raises:
        ValueError: there is no such channel, time or lead; or nothing finite to draw; names it."""
    target, forecast = _fields(dataset, channel, time_index, lead_index)
    weights = scores.latitude_weights(dataset.latitude.values)
    with np.errstate(invalid="ignore", over="ignore"):  # a forecast that is not finite
        difference = forecast - target
        rmse = np.sqrt((difference**2).mean(-1) @ weights)
        bias = difference.mean(-1) @ weights
    start, lead = dataset.time.values[time_index], dataset.lead_time.values[lead_index]
    numbers = {
        "variable": channel,
        "units": dataset[channel].attrs.get("units", ""),
        "time": _time_text(start),
        "valid_time": _time_text(start + lead),
        "lead_hours": lead_hours(dataset)[lead_index],
        "rmse": float(rmse),
        "bias": float(bias),
    }
    for name, field in (("target", target), ("forecast", forecast), ("difference", difference)):
        finite = field[np.isfinite(field)]
        if not finite.size:
            raise ValueError(
                f"the {name} of {channel} from {numbers['time']}, lead {numbers['lead_hours']} h, "
                "has no finite value."
            )
        numbers[f"{name}_min"] = float(finite.min())
        numbers[f"{name}_max"] = float(finite.max())
    return numbers


def draw_maps(
    dataset: "xr.Dataset",
    channel: str,
    time_index: int,
    lead_index: int,
    coasts: Sequence[np.ndarray] = (),
) -> Any:
    """Target, forecast, and forecast - target.

    They are side by side, or one above the other where the region is wide.  The first two share
    their colours; those of the difference are symmetric about 0.

    Args:
        dataset: of ``open_forecasts``.
        channel: name of a field.
        time_index, lead_index: which initial time and lead, from 0.
        coasts: of ``coastlines``, or none.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: as ``map_numbers`` does.
        ImportError: matplotlib is missing."""
    numbers = map_numbers(dataset, channel, time_index, lead_index)
    target, forecast = _fields(dataset, channel, time_index, lead_index)
    shared_colours = {
        "cmap": "viridis",
        "vmin": min(numbers["target_min"], numbers["forecast_min"]),
        "vmax": max(numbers["target_max"], numbers["forecast_max"]),
    }
    largest = max(abs(numbers["difference_min"]), abs(numbers["difference_max"])) or 1.0
    difference_colours = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    panels = (
        ("target", target, shared_colours),
        ("forecast", forecast, shared_colours),
        ("forecast - target", forecast - target, difference_colours),
    )
    units = numbers["units"]
    plt = figures.pyplot(None)
    with plt.rc_context(figures.RC):
        fig, axes, wide = _map_panels(plt, dataset)
        meshes = []
        for ax, (title, field, colours) in zip(axes, panels, strict=True):
            meshes.append(_draw_field(ax, dataset, field, colours))
            _finish_map(ax, title, _aspect(dataset), coasts)
        bars: dict[str, Any] = {"location": "right" if wide else "bottom"}
        label = f"{channel} ({units})" if units else channel
        fig.colorbar(meshes[0], ax=list(axes[:2]), label=label, shrink=0.7, aspect=40, **bars)
        label = f"difference ({units})" if units else "difference"
        fig.colorbar(meshes[2], ax=axes[2], label=label, **bars)
        fig.suptitle(_map_title(dataset, numbers))
    plt.close(fig)
    return fig


def _aspect(dataset: "xr.Dataset") -> float:
    """The length of a degree to the north by that of one to the east, in the middle of the map."""
    middle = float(dataset.latitude.values.mean())
    return 1 / max(0.2, math.cos(math.radians(middle)))


def _map_panels(plt: Any, dataset: "xr.Dataset") -> tuple[Any, Any, bool]:
    """A figure, its three axes, and whether these are one above the other."""
    latitude, longitude = dataset.latitude.values, dataset.longitude.values
    # The height of a panel by its width.
    shape = _aspect(dataset) * np.ptp(latitude) / max(np.ptp(longitude), 1e-6)
    wide = bool(shape < 0.7)
    if wide:
        rows, columns = 3, 1
        size = (figures.WIDTH, 3 * 5.6 * max(shape, 0.2) + 1.8)
    else:
        rows, columns = 1, 3
        size = (11, 3.4 * min(shape, 2) + 1.6)
    fig, axes = plt.subplots(
        rows, columns, sharex=wide, sharey=not wide, layout="compressed", figsize=size
    )
    for ax in axes if wide else axes[:1]:
        ax.set_ylabel("latitude (degrees north)")
    for ax in axes[2:] if wide else axes:
        ax.set_xlabel("longitude (degrees east)")
    return fig, axes, wide


def _draw_field(ax: Any, dataset: "xr.Dataset", field: np.ndarray, colours: dict[str, Any]) -> Any:
    return ax.pcolormesh(
        dataset.longitude.values,
        dataset.latitude.values,
        field,
        shading="nearest",
        rasterized=True,
        **colours,
    )


def _finish_map(ax: Any, title: str, aspect: float, coasts: Sequence[np.ndarray]) -> None:
    """Title, ticks and coastlines."""
    ax.grid(False)
    ax.set(title=title, aspect=aspect)
    ax.locator_params(steps=[1, 3, 6, 9, 10])  # degrees: 30, 60 and 90, not 50
    west_east, south_north = ax.get_xlim(), ax.get_ylim()
    # Longitudes of the map may start at 0 or at -180.
    for line, turn in itertools.product(coasts, (-360, 0, 360)):
        longitude = line[:, 0] + turn
        if longitude.max() >= west_east[0] and longitude.min() <= west_east[1]:
            ax.plot(longitude, line[:, 1], color="black", lw=0.6)
    ax.set(xlim=west_east, ylim=south_north)


def _map_title(dataset: "xr.Dataset", numbers: dict[str, Any]) -> str:
    channel = numbers["variable"]
    name = dataset[channel].attrs.get("long_name", channel)
    if name != channel:
        name = f"{name} ({channel})"
    first = f"{name}, RMSE {numbers['rmse']:.4g} {numbers['units']}".rstrip()
    return (
        f"{first}\ninitial time {numbers['time']}, valid {numbers['valid_time']}, "
        f"lead {numbers['lead_hours']} h"
    )


def _fields(
    dataset: "xr.Dataset", channel: str, time_index: int, lead_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Target and forecast, [H, W] float64."""
    require_name(channel, channels_of(dataset), "variable")
    for name, index, size in (
        ("time_index", time_index, dataset.sizes["time"]),
        ("lead_index", lead_index, dataset.sizes["lead_time"]),
    ):
        if not 0 <= index < size:
            raise ValueError(f"{name}={index} must be in 0 .. {size - 1}.")
    chosen = dataset.isel(time=time_index, lead_time=lead_index)
    target, forecast = (
        chosen[name].transpose(*DIMS[2:]).values.astype(np.float64)
        for name in (f"{channel}_truth", channel)
    )
    return target, forecast


def _time_text(time: np.datetime64) -> str:
    """To the minute, as UTC."""
    return str(time.astype("datetime64[m]")).replace("T", " ") + " UTC"


# ---- curves


def draw_skill(rows: Sequence[ScoreRow]) -> Any:
    """RMSE against lead time: a panel for each variable, at most 6, and a line for each forecast.

    Args:
        rows: of scores.csv.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: no rows, or more than 6 variables.
        ImportError: matplotlib is missing."""
    variables = _variables(rows)
    plt = figures.pyplot(None)
    with plt.rc_context(figures.RC):
        fig, panels = _panels(plt, variables, "RMSE by lead time")
        for variable, ax in panels.items():
            of_variable = [row for row in rows if row.variable == variable]
            for forecast in scores.FORECASTS:
                points = [
                    (row.lead_hours, row.rmse) for row in of_variable if row.forecast == forecast
                ]
                _plot_line(ax, points, forecast)
            units = of_variable[0].units
            ylabel = f"RMSE ({units})" if units else "RMSE"
            ax.set(title=variable, xlabel="lead time (h)", ylabel=ylabel)
            ax.margins(y=0.1)
            ax.set_ylim(bottom=0)
        _legend(fig, panels.values())
    plt.close(fig)
    return fig


def draw_spectra(
    rows: Sequence[SpectrumRow], lead: int, units: dict[str, str] | None = None
) -> Any:
    """Zonal energy spectra at one lead, with the wavelength at the equator above.

    Both axes are logarithmic.  There is a panel for each variable, at most 6, and a line each for
    truth, model and persistence.  Wavenumber 0, the zonal mean, has no place on it.

    Args:
        rows: of spectra.csv.
        lead: hours.
        units: of the variables, for the axes.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: there is nothing at this lead, or there are more than 6 variables.
        ImportError: matplotlib is missing."""
    shown = _drawable_spectra(rows, lead)
    variables = _variables(shown)
    units = units or {}
    shortest = float(scores.zonal_wavelength(np.array(max(row.wavenumber for row in shown))))
    plt = figures.pyplot(None)
    with plt.rc_context(figures.RC):
        fig, panels = _panels(plt, variables, f"Zonal energy spectra, lead {lead} h")
        for variable, ax in panels.items():
            of_variable = [row for row in shown if row.variable == variable]
            _draw_spectra_of_variable(ax, of_variable)
            ylabel = f"energy{_squared(units.get(variable, ''))}"
            ax.set(xscale="log", yscale="log", xlabel="zonal wavenumber", ylabel=ylabel)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_title(variable, pad=12)
            _add_wavelengths(ax, shortest)
        _legend(fig, panels.values())
    plt.close(fig)
    return fig


def _drawable_spectra(rows: Sequence[SpectrumRow], lead: int) -> list[SpectrumRow]:
    """The rows of a lead that have a place on logarithmic axes; ValueError if it has no rows."""
    known = sorted({row.lead_hours for row in rows})
    if lead not in known:
        raise ValueError(
            f"lead={lead} is in none of the spectra, which have {_listed(known)} hours."
        )
    of_lead = [row for row in rows if row.lead_hours == lead]
    return [row for row in of_lead if row.wavenumber > 0 and row.energy > 0]


def _draw_spectra_of_variable(ax: Any, rows: Sequence[SpectrumRow]) -> None:
    """A line each for truth, model and persistence."""
    for forecast in scores.SPECTRA:
        points = [(row.wavenumber, row.energy) for row in rows if row.forecast == forecast]
        _plot_line(ax, points, forecast, markevery=0.1)


def _add_wavelengths(ax: Any, shortest: float) -> None:
    """A second axis above the panel, in km down to the shortest wavelength."""
    above = ax.secondary_xaxis("top", functions=(_wavelength, _wavelength))
    above.set_xticks([length for length in WAVELENGTHS if length >= shortest], minor=False)
    above.xaxis.set_major_formatter("{x:,.0f}")
    above.minorticks_off()
    above.set_xlabel("zonal wavelength at the equator (km)", fontsize="small")
    above.tick_params(labelsize="small")


def _wavelength(x: np.ndarray) -> np.ndarray:
    """Of wavenumbers, and back."""
    return scores.zonal_wavelength(np.maximum(np.asarray(x, float), 1e-12))


def _squared(units: str) -> str:
    """The square of the units in brackets; "" where there are none."""
    if not units:
        return ""
    return f" ({units}$^2$)" if units.isalpha() else f" (({units})$^2$)"


def _variables(rows: Sequence[ScoreRow] | Sequence[SpectrumRow]) -> list[str]:
    variables = list(dict.fromkeys(row.variable for row in rows))
    if not 1 <= len(variables) <= PANELS:
        raise ValueError(
            f"rows hold {len(variables)} variables; a figure has 1 to {PANELS}: "
            "draw some of them at a time."
        )
    return variables


def _panels(plt: Any, names: Sequence[str], title: str) -> tuple[Any, dict[str, Any]]:
    """A figure, and its axes by name."""
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = math.ceil(len(names) / columns)
    size = (max(figures.WIDTH, 3.6 * columns), 1.0 + 2.9 * rows)
    fig, grid = plt.subplots(rows, columns, squeeze=False, figsize=size)
    for ax in grid.flat[len(names) :]:
        ax.remove()
    fig.suptitle(title)
    return fig, dict(zip(names, grid.flat, strict=False))


def _plot_line(ax: Any, points: Sequence[tuple[int, float]], forecast: str, **options: Any) -> None:
    """The line of a forecast, from left to right; none without points."""
    if not points:
        return
    ordered = sorted(points)
    x = [point[0] for point in ordered]
    y = [point[1] for point in ordered]
    ax.plot(x, y, label=forecast, **_look(forecast), **options)


def _look(forecast: str) -> dict[str, Any]:
    """Colour, marker and line style of a forecast: the same in all figures, and its own."""
    index = (*scores.FORECASTS, "truth").index(forecast)
    return {
        "color": "black" if forecast == "truth" else figures.COLOURS[index],
        "marker": figures.MARKERS[index],
        "ls": STYLES[index],
        "lw": 1.6,
        "ms": 5,
    }


def _legend(fig: Any, panels: Iterable[Any]) -> None:
    entries: dict[str, Any] = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries[label] = handle
    fig.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=len(entries),
        handlelength=3,
    )


# ---- the command


def draw(
    folder: str | Path,
    out: str | Path,
    *,
    variable: str | None = None,
    time: str | None = None,
    lead: int | None = None,
) -> Iterator[str]:
    """Draws what FOLDER allows into the folder `out`; yields a line about each figure.

    Args:
        variable: of maps, skill and spectra; None: maps of the first 4 variables, and the others
            of all.
        time: initial time of the maps, ISO 8601, UTC; None: the first.
        lead: of maps and spectra, in hours; None: the first and the last.

    Raises:
        ValueError: there are no forecasts, or no such variable, time or lead among them; names it.
        ImportError: matplotlib or xarray is missing."""
    folder, out = Path(folder), Path(out)
    with open_forecasts(folder) as dataset:
        known = channels_of(dataset)
        if variable is None:
            mapped = known[:VARIABLES]
        else:
            mapped = [require_name(variable, known, "variable")]
        time_index = _time_index(dataset, time)
        lead_indices = _lead_indices(dataset, lead)
        plt = figures.pyplot()
        out.mkdir(parents=True, exist_ok=True)
        coasts: Sequence[np.ndarray] = ()
        try:
            coasts = coastlines(dataset)
        except ValueError as reason:
            yield f"no coastlines: {reason}"
        if len(mapped) < len(known) and variable is None:
            count = f"the first {VARIABLES} of {len(known)} variables"
            yield f"maps of {count}; --variable names another"
        for channel, lead_index in itertools.product(mapped, lead_indices):
            fig = draw_maps(dataset, channel, time_index, lead_index, coasts)
            numbers = map_numbers(dataset, channel, time_index, lead_index)
            yield _save_figure(plt, fig, [numbers], out / _map_name(numbers))
        hours = [lead_hours(dataset)[i] for i in lead_indices]
        units = {channel: str(dataset[channel].attrs.get("units", "")) for channel in known}
    yield from _draw_skill_file(plt, folder / "scores.csv", variable, out / "skill")
    for hour in hours:
        path = out / f"spectra_{hour}h"
        yield from _draw_spectra_file(
            plt, folder / "spectra.csv", variable, hour, units=units, path=path
        )


def _map_name(numbers: dict[str, Any]) -> str:
    """The name of a map's files, without an ending."""
    time = numbers["time"].removesuffix(" UTC")
    name = f"map_{numbers['variable']}_{time}_{numbers['lead_hours']}h"
    return re.sub(r"[^\w.-]+", "-", name)


def _save_figure(plt: Any, fig: Any, rows: Sequence[dict[str, Any]], path: Path) -> str:
    """Writes a figure and the numbers behind it; a line about that."""

    def drawn(plt: Any, shown: Sequence[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        return fig, list(shown)

    return figures.draw_figure(plt, drawn, rows, path)


def _draw_skill_file(plt: Any, file: Path, variable: str | None, path: Path) -> Iterator[str]:
    """The figures of scores.csv, of one variable or all."""
    if not file.exists():
        yield _skipped(path, file, "is not there")
        return
    rows = scores.read_rows(file, ScoreRow)
    yield from _draw_curves(plt, file, _of_variable(rows, variable), draw_skill, path)


def _draw_spectra_file(
    plt: Any, file: Path, variable: str | None, lead: int, *, units: dict[str, str], path: Path
) -> Iterator[str]:
    """The figures of spectra.csv at one lead, of one variable or all."""
    if not file.exists():
        yield _skipped(path, file, "is not there")
        return
    rows = [row for row in scores.read_rows(file, SpectrumRow) if row.lead_hours == lead]

    def figure(shown: Sequence[SpectrumRow]) -> Any:
        return draw_spectra(shown, lead, units)

    yield from _draw_curves(plt, file, _of_variable(rows, variable), figure, path)


def _of_variable(rows: Sequence[R], variable: str | None) -> list[R]:
    return [row for row in rows if variable in (None, row.variable)]


def _draw_curves(
    plt: Any, file: Path, rows: Sequence[R], figure: Callable[[Sequence[R]], Any], path: Path
) -> Iterator[str]:
    """One figure for each PANELS variables of the rows."""
    if not rows:
        yield _skipped(path, file, "has no such rows")
        return
    variables = list(dict.fromkeys(row.variable for row in rows))
    parts = [variables[i : i + PANELS] for i in range(0, len(variables), PANELS)]
    for number, part in enumerate(parts, 1):
        shown = [row for row in rows if row.variable in part]
        suffix = f"_{number}" if len(parts) > 1 else ""
        numbers = [vars(row) for row in shown]
        yield _save_figure(plt, figure(shown), numbers, path.with_name(path.name + suffix))


def _skipped(path: Path, file: Path, reason: str) -> str:
    return f"skipped {path.name}: {file} {reason}"


def _time_index(dataset: "xr.Dataset", time: str | None) -> int:
    """The index of an initial time; None is the first."""
    times = dataset.time.values
    if time is None:
        return 0
    try:
        wanted = np.datetime64(time.strip().removesuffix("Z"), "s")
    except ValueError:
        raise ValueError(
            f"time={time!r} is no time; write it as {times[0].astype('datetime64[m]')!s}."
        ) from None
    indices = np.flatnonzero(times.astype("datetime64[s]") == wanted)
    if not indices.size:
        raise ValueError(
            f"time={time!r} is none of the {len(times)} initial times from "
            f"{_time_text(times[0])} to {_time_text(times[-1])}."
        )
    return int(indices[0])


def _lead_indices(dataset: "xr.Dataset", lead: int | None) -> list[int]:
    """The index of a lead; None: those of the first and the last."""
    hours = lead_hours(dataset)
    if lead is None:
        return sorted({0, len(hours) - 1})
    if lead not in hours:
        raise ValueError(f"lead={lead} is none of the leads, which are {_listed(hours)} hours.")
    return [hours.index(lead)]


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values)) or "no"


def parser() -> argparse.ArgumentParser:
    p = Parser(
        f"python -m {PROG}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("folder", type=Path, metavar="FOLDER", help="what apps.vit.predict wrote")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the figures")
    p.add_argument(
        "--variable",
        metavar="NAME",
        help="draw this one alone (default: maps of the first 4, curves of all)",
    )
    p.add_argument(
        "--time",
        metavar="T",
        help="initial time of the maps, as 2019-03-25T06 (default: the first)",
    )
    p.add_argument(
        "--lead",
        type=int,
        metavar="H",
        help="lead of maps and spectra in hours (default: the first and the last)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Draws, and prints a line about each figure.

    A user's mistake is one line on stderr and exit status 2."""
    return run_command(parser(), argv, _draw, mistakes=(ValueError, OSError, ImportError))


def _draw(args: argparse.Namespace) -> int:
    for line in draw(args.folder, args.out, variable=args.variable, time=args.time, lead=args.lead):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
