"""Forecasts as a CF dataset, and its NetCDF file or Zarr store."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data.samples import Samples

if TYPE_CHECKING:
    import xarray as xr

FORMATS = ("nc", "zarr")


def forecast_dataset(
    samples: Samples, t0s: np.ndarray, ahead: np.ndarray, about: dict[str, str]
) -> "xr.Dataset":
    """Forecasts [n, L, C, H, W] from initial times `t0s` and what then was, as CF-1.11 describes forecasts."""
    import xarray as xr

    f, steps = samples.fields, np.array(samples.leads) // samples.fields.step_hours
    times = f.times[t0s].astype("datetime64[ns]")
    leads = np.array(samples.leads, "timedelta64[h]").astype("timedelta64[ns]")
    coords = {
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
            f.grid.lat,
            {"standard_name": "latitude", "units": "degrees_north"},
        ),
        "longitude": (
            "longitude",
            f.grid.lon,
            {"standard_name": "longitude", "units": "degrees_east"},
        ),
        "valid_time": (
            ("time", "lead_time"),
            times[:, None] + leads,
            {"standard_name": "time", "long_name": "valid time"},
        ),
    }
    truth = f.read((t0s[:, None] + steps).ravel()).reshape(ahead.shape)
    dims, variables = ("time", "lead_time", "latitude", "longitude"), {}
    for i, name in enumerate(f.channels):
        long = f.long_names[name] or name
        attributes = {"units": f.units[name] or "1"}
        variables[name] = (dims, ahead[:, :, i], {**attributes, "long_name": f"{long}, forecast"})
        variables[f"{name}_truth"] = (
            dims,
            truth[:, :, i],
            {**attributes, "long_name": f"{long}, as it was"},
        )
    return xr.Dataset(variables, coords, {"Conventions": "CF-1.11", **about}).sortby(
        "lead_time"
    )  # CF: in order


def write_dataset(dataset: "xr.Dataset", out: Path, kind: str) -> Path:
    """OUT/forecasts.nc or .zarr, written aside first; one of the other kind from before is removed."""
    path = out / f"forecasts.{kind}"
    aside = out / f".forecasts.partial.{kind}"
    for old in (aside, *(out / f"forecasts.{k}" for k in FORMATS)):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    hours = {"units": "hours", "dtype": "int32"}
    encoding: dict[str, Any] = {
        "lead_time": hours,
        "time": {"units": "hours since 1970-01-01", "dtype": "int64"},
    }
    encoding["valid_time"] = encoding["time"]
    encoding["latitude"] = encoding["longitude"] = {"_FillValue": None}  # CF: coordinates have none
    if kind == "nc":
        dataset.to_netcdf(aside, encoding=encoding)
    else:
        dataset.to_zarr(aside, encoding=encoding, zarr_format=2, consolidated=True)
    aside.rename(path)
    return path
