"""Forecasts as a dataset with the CF conventions, and its NetCDF file or Zarr store.

Shapes: n initial times, L leads, C channels, fields of H x W points.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringx.files import write_file, write_folder

from .data.samples import Samples

if TYPE_CHECKING:
    import xarray as xr

FORMATS = ("nc", "zarr")


def forecast_dataset(
    samples: Samples, t0s: np.ndarray, forecasts: np.ndarray, attributes: dict[str, str]
) -> "xr.Dataset":
    """Forecasts and what was at their valid times, as CF-1.11 describes forecasts.

    Args:
        samples: whose fields, leads, names and units are taken.
        t0s: [n] the initial times, as indices of the record's; all valid times lie in the record.
        forecasts: [n, L, C, H, W] in physical units.
        attributes: of the whole dataset, besides its conventions."""
    import xarray as xr

    fields = samples.fields
    lags = np.array(samples.leads) // fields.step_hours
    truth = fields.read((t0s[:, None] + lags).ravel()).reshape(forecasts.shape)
    dims = ("time", "lead_time", "latitude", "longitude")
    variables = {}
    for i, name in enumerate(fields.channels):
        units = fields.units[name] or "1"
        long_name = fields.long_names[name] or name
        variables[name] = (
            dims,
            forecasts[:, :, i],
            {"units": units, "long_name": f"{long_name}, forecast"},
        )
        variables[f"{name}_truth"] = (
            dims,
            truth[:, :, i],
            {"units": units, "long_name": f"{long_name}, as it was"},
        )
    dataset = xr.Dataset(
        variables, _coordinates(samples, t0s), {"Conventions": "CF-1.11", **attributes}
    )
    return dataset.sortby("lead_time")  # CF wants coordinates in order


def _coordinates(samples: Samples, t0s: np.ndarray) -> dict[str, tuple]:
    """{name: (dimensions, values, attributes)}"""
    grid = samples.fields.grid
    times = samples.fields.times[t0s].astype("datetime64[ns]")
    leads = np.array(samples.leads, "timedelta64[h]").astype("timedelta64[ns]")
    return {
        "time": (
            "time",
            times,
            {"standard_name": "forecast_reference_time", "long_name": "initial time"},
        ),
        "lead_time": (
            "lead_time",
            leads,
            {"standard_name": "forecast_period", "long_name": "time since the initial time"},
        ),
        "latitude": (
            "latitude",
            grid.lat,
            {"standard_name": "latitude", "units": "degrees_north"},
        ),
        "longitude": (
            "longitude",
            grid.lon,
            {"standard_name": "longitude", "units": "degrees_east"},
        ),
        "valid_time": (
            ("time", "lead_time"),
            times[:, None] + leads,
            {"standard_name": "time", "long_name": "valid time"},
        ),
    }


def write_dataset(dataset: "xr.Dataset", out: Path, kind: str) -> Path:
    """Writes OUT/forecasts.nc or .zarr in one step; older forecasts, of either kind, are removed.

    Args:
        dataset: as ``forecast_dataset`` makes it.
        out: a folder.
        kind: "nc" or "zarr".

    Returns:
        The path of the file or store."""
    path = out / f"forecasts.{kind}"
    encoding = _encoding()

    def write_netcdf(target: Path) -> None:
        dataset.to_netcdf(target, encoding=encoding)

    def write_zarr(target: Path) -> None:
        dataset.to_zarr(target, encoding=encoding, zarr_format=2, consolidated=True)

    for killed in (out / "forecasts.zarr.partial", *out.glob(".forecasts.nc.*")):
        _remove(killed)  # what a killed process left
    for old_kind in FORMATS:
        _remove(out / f"forecasts.{old_kind}")
    if kind == "nc":
        write_file(path, write_netcdf, replace=True)
    else:
        write_folder(path, write_zarr)
    return path


def _encoding() -> dict[str, Any]:
    """How xarray is to write the coordinates."""
    time = {"units": "hours since 1970-01-01", "dtype": "int64"}
    no_missing_values = {"_FillValue": None}  # CF: coordinates have none
    return {
        "lead_time": {"units": "hours", "dtype": "int32"},
        "time": time,
        "valid_time": time,
        "latitude": no_missing_values,
        "longitude": no_missing_values,
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
