"""Forecasts drawn: maps beside their targets, skill by lead time, zonal spectra.

    python -m apps.vit.maps FOLDER --out DIR                                   # first and last lead of the first time
    python -m apps.vit.maps FOLDER --out DIR --variable t2m --time 2019-03-25T06 --lead 6

FOLDER is what apps.vit.predict wrote: forecasts.nc or forecasts.zarr, and beside it scores.csv and spectra.csv.  Without
--variable, maps are drawn of the first 4.  Writes DIR/map_VARIABLE_TIME_LEADh, DIR/skill and DIR/spectra_LEADh, each as PNG and
SVG, with numbers as CSV; more than 6 variables have their skill and spectra in several files.  A figure that lacks its file is
skipped with the reason.  Coastlines need cartopy, which downloads them once.  Needs matplotlib: pip install 'ringx[plot]'
"""

import argparse
import itertools
import math
import re
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.common.arguments import Parser
from apps.vit import scores
from apps.vit.scores import Row, SpectrumRow
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


# ---- the files


def open_forecasts(folder: "str | Path") -> "xr.Dataset":
    """FOLDER/forecasts.nc, or else FOLDER/forecasts.zarr, read as far as it is looked at; lead_time is decoded to timedelta64.

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
        file = xr.open_dataset(
            path, decode_timedelta=False
        )  # a field in seconds or hours is no lead
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{path} cannot be read: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
        ) from None
    try:
        return _expect_forecasts(file)
    except ValueError as e:
        file.close()
        raise ValueError(f"{path} {e}; it must be what apps.vit.predict writes.") from None


def _expect_forecasts(file: "xr.Dataset") -> "xr.Dataset":
    """The dataset with decoded leads; closing it closes the file."""
    import xarray as xr

    if missing := [d for d in DIMS if d not in file.dims or d not in file.coords]:
        raise ValueError(f"has no dimension with coordinates {missing[0]!r}")
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
    both = [n for n in map(str, dataset.data_vars) if f"{n}_truth" in dataset.data_vars]
    return [n for n in both if set(dataset[n].dims) == set(DIMS) == set(dataset[f"{n}_truth"].dims)]


def lead_hours(dataset: "xr.Dataset") -> list[int]:
    """The leads in hours."""
    return [round(float(lead / HOUR)) for lead in dataset.lead_time.values]


def coastlines(dataset: "xr.Dataset") -> list[np.ndarray]:
    """Natural Earth's coastlines through cartopy: [n, 2] degrees east and north each, finer for a region than for the globe.

    Raises:
        ValueError: cartopy is missing, or has no coastlines and cannot download them; says which."""
    try:
        from cartopy.io import shapereader
    except ImportError:
        raise ValueError("cartopy is not installed") from None
    fine = np.ptp(dataset.longitude.values) < 90
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: some compute nodes never answer
    try:
        file = shapereader.natural_earth(
            resolution="50m" if fine else "110m", category="physical", name="coastline"
        )
        shapes = list(shapereader.Reader(file).geometries())
    except OSError as e:
        raise ValueError(f"cartopy cannot get its coastlines ({e})") from None
    finally:
        socket.setdefaulttimeout(before)
    return [
        np.asarray(line.coords)[:, :2]
        for shape in shapes
        for line in getattr(shape, "geoms", [shape])
    ]


# ---- maps


def map_numbers(
    dataset: "xr.Dataset", channel: str, time_index: int, lead_index: int
) -> dict[str, Any]:
    """What a map shows, in numbers: variable, units, time, valid_time, lead_hours, rmse and bias (weighted by cos(latitude)), and
    the least and largest values of target, forecast and difference.

    Raises:
        ValueError: there is no such channel, time or lead; or nothing finite to draw; names it."""
    target, forecast = _fields(dataset, channel, time_index, lead_index)
    weights = scores.latitude_weights(dataset.latitude.values)
    with np.errstate(invalid="ignore", over="ignore"):  # a forecast that is not finite
        difference = forecast - target
        rmse, bias = np.sqrt((difference**2).mean(-1) @ weights), difference.mean(-1) @ weights
    start, lead = dataset.time.values[time_index], dataset.lead_time.values[lead_index]
    numbers = {
        "variable": channel,
        "units": dataset[channel].attrs.get("units", ""),
        "time": _written(start),
        "valid_time": _written(start + lead),
        "lead_hours": lead_hours(dataset)[lead_index],
        "rmse": float(rmse),
        "bias": float(bias),
    }
    for name, field in (("target", target), ("forecast", forecast), ("difference", difference)):
        finite = field[np.isfinite(field)]
        if not finite.size:
            raise ValueError(
                f"the {name} of {channel} from {numbers['time']}, lead {numbers['lead_hours']} h, has no finite value."
            )
        numbers |= {f"{name}_min": float(finite.min()), f"{name}_max": float(finite.max())}
    return numbers


def draw_maps(
    dataset: "xr.Dataset",
    channel: str,
    time_index: int,
    lead_index: int,
    coasts: Sequence[np.ndarray] = (),
):
    """Target, forecast, and forecast - target: side by side, or one above the other where the region is wide.  The first two share
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
    attrs, units = dataset[channel].attrs, numbers["units"]
    name = attrs.get("long_name", channel)
    lat, lon = dataset.latitude.values, dataset.longitude.values
    aspect = 1 / max(
        0.2, math.cos(math.radians(float(lat.mean())))
    )  # as long a km to the north as to the east
    shape = aspect * np.ptp(lat) / max(np.ptp(lon), 1e-6)  # height of a panel by its width
    wide = shape < 0.7
    across, size = (
        ((1, 3), (11, 3.4 * min(shape, 2) + 1.6))
        if not wide
        else ((3, 1), (figures.WIDTH, 3 * 5.6 * max(shape, 0.2) + 1.8))
    )
    at = "right" if wide else "bottom"
    shared = {"cmap": "viridis", "vmin": min(numbers["target_min"], numbers["forecast_min"])}
    shared["vmax"] = max(numbers["target_max"], numbers["forecast_max"])
    most = max(abs(numbers["difference_min"]), abs(numbers["difference_max"])) or 1.0
    plt = figures.pyplot(None)
    with plt.rc_context(figures.RC):
        fig, axes = plt.subplots(
            *across, sharex=wide, sharey=not wide, layout="compressed", figsize=size
        )
        panels = (
            ("target", target, shared),
            ("forecast", forecast, shared),
            (
                "forecast - target",
                forecast - target,
                {"cmap": "RdBu_r", "vmin": -most, "vmax": most},
            ),
        )
        meshes = []
        for ax, (title, field, colours) in zip(axes, panels, strict=True):
            meshes.append(
                ax.pcolormesh(lon, lat, field, shading="nearest", rasterized=True, **colours)
            )
            _frame(ax, title, aspect, coasts)
        for ax in axes if wide else axes[:1]:
            ax.set_ylabel("latitude (degrees north)")
        for ax in axes[2:] if wide else axes:
            ax.set_xlabel("longitude (degrees east)")
        label = f"{channel} ({units})" if units else channel
        fig.colorbar(meshes[0], ax=list(axes[:2]), location=at, label=label, shrink=0.7, aspect=40)
        fig.colorbar(
            meshes[2],
            ax=axes[2],
            location=at,
            label=f"difference ({units})" if units else "difference",
        )
        named = name if name == channel else f"{name} ({channel})"
        fig.suptitle(
            f"{named}, RMSE {numbers['rmse']:.4g} {units}".rstrip()
            + f"\ninitial time {numbers['time']}, valid {numbers['valid_time']}, lead {numbers['lead_hours']} h"
        )
    plt.close(fig)
    return fig


def _frame(ax, title: str, aspect: float, coasts: Sequence[np.ndarray]) -> None:
    ax.grid(False)
    ax.set(title=title, aspect=aspect)
    ax.locator_params(steps=[1, 3, 6, 9, 10])  # degrees: 30, 60 and 90, not 50
    limits = ax.get_xlim(), ax.get_ylim()
    for line, turn in itertools.product(
        coasts, (-360, 0, 360)
    ):  # whether longitudes start at 0 or -180
        x = line[:, 0] + turn
        if x.max() >= limits[0][0] and x.min() <= limits[0][1]:
            ax.plot(x, line[:, 1], color="black", lw=0.6)
    ax.set(xlim=limits[0], ylim=limits[1])


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
    here = dataset.isel(time=time_index, lead_time=lead_index)
    target, forecast = (
        here[n].transpose(*DIMS[2:]).values.astype(np.float64)
        for n in (f"{channel}_truth", channel)
    )
    return target, forecast


def _written(time: np.datetime64) -> str:
    """To the minute, as UTC."""
    return str(time.astype("datetime64[m]")).replace("T", " ") + " UTC"


# ---- curves


def draw_skill(rows: Sequence[Row]):
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
            mine = [r for r in rows if r.variable == variable]
            for forecast in scores.FORECASTS:
                points = sorted((r.lead_hours, r.rmse) for r in mine if r.forecast == forecast)
                if points:
                    ax.plot(*zip(*points, strict=True), label=forecast, **_look(forecast))
            units = mine[0].units
            ax.set(
                title=variable,
                xlabel="lead time (h)",
                ylabel=f"RMSE ({units})" if units else "RMSE",
            )
            ax.margins(y=0.1)
            ax.set_ylim(bottom=0)
        _legend(fig, panels.values())
    plt.close(fig)
    return fig


def draw_spectra(rows: Sequence[SpectrumRow], lead: int, units: "dict[str, str] | None" = None):
    """Zonal energy spectra at one lead, both axes logarithmic, with the wavelength at the equator above: a panel for each variable,
    at most 6, and a line each for truth, model and persistence.  Wavenumber 0, the zonal mean, has no place on it.

    Args:
        rows: of spectra.csv.
        lead: hours.
        units: of the variables, for the axes.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: there is nothing at this lead, or there are more than 6 variables.
        ImportError: matplotlib is missing."""
    known = sorted({r.lead_hours for r in rows})
    if lead not in known:
        raise ValueError(
            f"lead={lead} is in none of the spectra, which have {_listed(known)} hours."
        )
    rows = [r for r in rows if r.lead_hours == lead and r.wavenumber > 0 and r.energy > 0]
    variables = _variables(rows)
    plt = figures.pyplot(None)
    with plt.rc_context(figures.RC):
        fig, panels = _panels(plt, variables, f"Zonal energy spectra, lead {lead} h")
        for variable, ax in panels.items():
            for forecast in scores.SPECTRA:
                points = sorted(
                    (r.wavenumber, r.energy)
                    for r in rows
                    if (r.variable, r.forecast) == (variable, forecast)
                )
                if points:
                    ax.plot(
                        *zip(*points, strict=True), label=forecast, **_look(forecast), markevery=0.1
                    )
            unit = (units or {}).get(variable, "")
            squared = f" ({unit}$^2$)" if unit.isalpha() else f" (({unit})$^2$)" if unit else ""
            ax.set(xscale="log", yscale="log", xlabel="zonal wavenumber", ylabel=f"energy{squared}")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set_title(variable, pad=12)
            above = ax.secondary_xaxis("top", functions=(_wavelength, _wavelength))
            shortest = float(scores.zonal_wavelength(np.array(max(r.wavenumber for r in rows))))
            above.set_xticks([w for w in WAVELENGTHS if w >= shortest], minor=False)
            above.xaxis.set_major_formatter("{x:,.0f}")
            above.minorticks_off()
            above.set_xlabel("zonal wavelength at the equator (km)", fontsize="small")
            above.tick_params(labelsize="small")
        _legend(fig, panels.values())
    plt.close(fig)
    return fig


def _wavelength(x: np.ndarray) -> np.ndarray:
    """Of wavenumbers, and back."""
    return scores.zonal_wavelength(np.maximum(np.asarray(x, float), 1e-12))


def _variables(rows: "Sequence[Row] | Sequence[SpectrumRow]") -> list[str]:
    variables = list(dict.fromkeys(r.variable for r in rows))
    if not 1 <= len(variables) <= PANELS:
        raise ValueError(
            f"rows hold {len(variables)} variables; a figure has 1 to {PANELS}: draw some of them at a time."
        )
    return variables


def _panels(plt, names: Sequence[str], title: str):
    """{name: axes}."""
    across = min(3, len(names)) if len(names) != 4 else 2
    down = math.ceil(len(names) / across)
    size = (max(figures.WIDTH, 3.6 * across), 1.0 + 2.9 * down)
    fig, grid = plt.subplots(down, across, squeeze=False, figsize=size)
    for ax in grid.flat[len(names) :]:
        ax.remove()
    fig.suptitle(title)
    return fig, dict(zip(names, grid.flat, strict=False))


def _look(forecast: str) -> dict[str, Any]:
    """Colour, marker and line of a kind of forecast: the same in all figures, and all three other than the others'."""
    k = (*scores.FORECASTS, "truth").index(forecast)
    colour = "black" if forecast == "truth" else figures.COLOURS[k]
    return {"color": colour, "marker": figures.MARKERS[k], "ls": STYLES[k], "lw": 1.6, "ms": 5}


def _legend(fig, panels: Iterable[Any]) -> None:
    entries: dict[str, Any] = {}
    for ax in panels:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    fig.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=len(entries),
        handlelength=3,
    )


# ---- the command


def draw(
    folder: "str | Path",
    out: "str | Path",
    *,
    variable: "str | None" = None,
    time: "str | None" = None,
    lead: "int | None" = None,
) -> Iterable[str]:
    """Draws what FOLDER allows into the folder `out`; yields a line about each figure.

    Args:
        variable: of maps, skill and spectra; None: maps of the first 4 variables, and the others of all.
        time: initial time of the maps, ISO 8601, UTC; None: the first.
        lead: of maps and spectra, in hours; None: the first and the last.

    Raises:
        ValueError: there are no forecasts, or no such variable, time or lead among them; names it.
        ImportError: matplotlib or xarray is missing."""
    folder, out = Path(folder), Path(out)
    with open_forecasts(folder) as dataset:
        known = channels_of(dataset)
        chosen = (
            known[:VARIABLES] if variable is None else [require_name(variable, known, "variable")]
        )
        at = _time_index(dataset, time)
        leads = _leads(dataset, lead)
        plt = figures.pyplot()
        out.mkdir(parents=True, exist_ok=True)
        coasts: Sequence[np.ndarray] = ()
        try:
            coasts = coastlines(dataset)
        except ValueError as reason:
            yield f"no coastlines: {reason}"
        if len(chosen) < len(known) and variable is None:
            yield f"maps of the first {VARIABLES} of {len(known)} variables; --variable names another"
        for channel, index in itertools.product(chosen, leads):
            numbers = map_numbers(dataset, channel, at, index)

            def maps(plt, rows, channel=channel, index=index):
                return draw_maps(dataset, channel, at, index, coasts), rows

            stem = f"map_{channel}_{numbers['time'].removesuffix(' UTC')}_{numbers['lead_hours']}h"
            yield figures.draw_figure(
                plt, maps, [numbers], out / re.sub(r"[^\w.-]+", "-", stem).replace(":", "")
            )
        hours = [lead_hours(dataset)[i] for i in leads]
        units = {c: str(dataset[c].attrs.get("units", "")) for c in known}
    yield from _curves(
        plt, folder / "scores.csv", scores.read_scores, draw_skill, variable, out / "skill"
    )
    for hour in hours:

        def spectra(rows, hour=hour):
            return draw_spectra(rows, hour, units)

        def read(path, hour=hour):
            return [r for r in scores.read_spectra(path) if r.lead_hours == hour]

        yield from _curves(
            plt, folder / "spectra.csv", read, spectra, variable, out / f"spectra_{hour}h"
        )


def _curves(
    plt, file: Path, read: Callable, figure: Callable, variable: "str | None", path: Path
) -> Iterable[str]:
    """One figure for each 6 variables of the file."""
    if not file.exists():
        yield f"skipped {path.name}: {file} is not there"
        return
    rows = [r for r in read(file) if variable in (None, r.variable)]
    if not rows:
        yield f"skipped {path.name}: {file} has no such rows"
        return
    variables = list(dict.fromkeys(r.variable for r in rows))
    parts = [variables[i : i + PANELS] for i in range(0, len(variables), PANELS)]
    for number, part in enumerate(parts, 1):
        mine = [r for r in rows if r.variable in part]

        def drawn(plt, shown, mine=mine):
            return figure(mine), shown

        suffix = f"_{number}" if len(parts) > 1 else ""
        yield figures.draw_figure(
            plt, drawn, [vars(r) for r in mine], path.with_name(path.name + suffix)
        )


def _time_index(dataset: "xr.Dataset", time: "str | None") -> int:
    times = dataset.time.values
    if time is None:
        return 0
    try:
        wanted = np.datetime64(time.strip().removesuffix("Z"), "s")
    except ValueError:
        raise ValueError(
            f"time={time!r} is no time; write it as {times[0].astype('datetime64[m]')!s}."
        ) from None
    found = np.flatnonzero(times.astype("datetime64[s]") == wanted)
    if not found.size:
        raise ValueError(
            f"time={time!r} is none of the {len(times)} initial times from {_written(times[0])} to {_written(times[-1])}."
        )
    return int(found[0])


def _leads(dataset: "xr.Dataset", lead: "int | None") -> list[int]:
    """Indices."""
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


def main(argv: "Sequence[str] | None" = None) -> int:
    """Draws, and says what; a user's mistake is one line on stderr and exit status 2."""
    p = parser()
    args = p.parse_args(argv)
    try:
        for line in draw(
            args.folder, args.out, variable=args.variable, time=args.time, lead=args.lead
        ):
            print(line, flush=True)
    except (ValueError, OSError, ImportError) as e:
        p.error(str(e))
    return 0


if __name__ == "__main__":
    sys.exit(main())
