"""Files of gridded climate records: what each holds, and some of its times when asked for.

What is understood, by the names that the field uses:

    NetCDF 3 and 4, Zarr    dimensions time (valid_time, t), latitude (lat), longitude (lon), and level (pressure_level,
                            isobaricInhPa, plev, lev) of 3-D variables: ERA5 from the CDS, WeatherBench 2, ARCO-ERA5
    HDF5                    one file a year, fields[time, channel, lat, lon], such as 1979.h5: NERSC's tutorials, FourCastNet,
                            makani.  What such a file does not say follows from the conventions in ``Hdf5File``

A channel is a 2-D variable, or one level of a 3-D one.  Fields come out north to south and west to east, in the files' units.
Files are read through xarray's lazy indexing and h5py, one thread at a time: HDF5 and NetCDF allow no more.  A process that
was forked opens them again.
"""

import contextlib
import glob
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TIME = ("time", "valid_time", "t")
LATITUDE = ("latitude", "lat", "y")
LONGITUDE = ("longitude", "lon", "x")
LEVEL = ("level", "pressure_level", "isobaricInhPa", "plev", "lev")
NETCDF = (".nc", ".nc3", ".nc4", ".cdf", ".netcdf")
HDF5 = (".h5", ".hdf5")
SPLIT_FOLDERS = (
    "train",
    "val",
    "valid",
    "validation",
    "test",
    "out_of_sample",
)  # of the NERSC tutorials
SECONDS = "datetime64[s]"
_LOCK = threading.Lock()  # HDF5 and NetCDF are not thread-safe
os.register_at_fork(
    before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
)


@dataclass(frozen=True, eq=False)
class Grid:
    """The points of a regular latitude-longitude grid."""

    lat: np.ndarray  # [H] float64, degrees north, descending, evenly spaced or not
    lon: np.ndarray  # [W] float64, degrees east, ascending

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return len(self.lat), len(self.lon)

    @property
    def periodic(self) -> bool:
        """Whether the columns go round the globe: W times their mean distance is 360 degrees, within 1 %."""
        columns = len(self.lon)
        return (
            columns > 1
            and abs(columns * (self.lon[-1] - self.lon[0]) / (columns - 1) / 360 - 1) <= 0.01
        )

    def weights(self) -> np.ndarray:
        """[H] float64: cos(latitude), divided by its mean over the rows; 0 in a row at a pole."""
        cosine = np.maximum(
            np.cos(np.deg2rad(self.lat)), 0
        )  # cos(90 degrees) is 6e-17 in floating point
        cosine[np.abs(self.lat) >= 90] = 0
        return cosine / cosine.mean()


class Channel(NamedTuple):
    """Where a channel lies in a file."""

    variable: str
    level: "int | None"  # its index along the levels
    hpa: "float | None"
    units: str
    long_name: str


# ---- one file


class FieldFile:
    """One file or store: what ``XarrayFile`` and ``Hdf5File`` share.  Rows and columns are turned here, once for all formats."""

    def __init__(self, file: Path):
        self.file = file
        self.title = ""
        self.times = np.empty(0, SECONDS)  # [n]; none in a file of static fields
        self.channels: dict[str, Channel] = {}  # by name, in the file's order
        self.refused: dict[str, str] = {}  # variables that are no channels: why
        self.grid: Grid
        self._flip, self._shift = False, 0
        self._pid = os.getpid()
        with reading(file):
            self._handle = self._open()

    def _open(self) -> Any:
        """What stays open.  It has close()."""
        raise NotImplementedError

    def _block(self, variable: str, levels: "list[int | None]", rows: slice) -> np.ndarray:
        """[n, levels, H, W] of one variable, as stored."""
        raise NotImplementedError

    def statics(self) -> dict[str, np.ndarray]:
        """[H, W] float32 of each variable without time, by name."""
        return {}

    def size(self, channels: Sequence[str]) -> int:
        """Bytes of the file."""
        return self.file.stat().st_size

    def read(self, channels: Sequence[str], rows: slice) -> np.ndarray:
        """[n, C, H, W] float32 of consecutive times, north to south.  ValueError if the file cannot be read."""
        out = np.empty((rows.stop - rows.start, len(channels), *self.grid.shape), np.float32)
        places: dict[str, list[int]] = {}
        for i, name in enumerate(channels):
            places.setdefault(self.channels[name].variable, []).append(i)
        with _LOCK, reading(self.file):
            self._after_fork()
            for variable, at in places.items():  # all levels at once: they often lie in one chunk
                block = self._block(variable, [self.channels[channels[i]].level for i in at], rows)
                out[:, at] = self._turn(block)
        return out

    def _after_fork(self) -> None:
        if self._pid != os.getpid():
            self._handle.close()
            self._handle, self._pid = self._open(), os.getpid()

    def _set_grid(self, lat: np.ndarray, lon: np.ndarray) -> None:
        lat, lon = np.asarray(lat, np.float64), np.asarray(lon, np.float64)
        for name, values in (("latitude", lat), ("longitude", lon)):
            if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
                raise ValueError(
                    f"{self.file}: {name} is no row of numbers (shape {values.shape}); only regular grids are read."
                )
        if np.abs(lat).max() > 90.001:
            raise ValueError(
                f"{self.file}: latitude reaches {lat[np.abs(lat).argmax()]:g}; it must be in degrees, -90 to 90."
            )
        self._flip = len(lat) > 1 and bool(lat[1] > lat[0])
        lat = lat[::-1] if self._flip else lat
        if not (np.diff(lat) < 0).all():
            raise ValueError(
                f"{self.file}: latitude neither ascends nor descends throughout; sort it (sortby('latitude'))."
            )
        self._shift = int(lon.argmin())
        lon = np.roll(lon, -self._shift)
        if not (np.diff(lon) > 0).all():
            raise ValueError(
                f"{self.file}: longitude does not ascend, nor does any rotation of it; sort it (sortby('longitude'))."
            )
        if lon[-1] - lon[0] >= 359.999:
            raise ValueError(
                f"{self.file}: longitude {lon[0]:g} and {lon[-1]:g} are the same meridian twice; leave out the last column."
            )
        self.grid = Grid(lat.copy(), lon)

    def _turn(self, block: np.ndarray) -> np.ndarray:
        """[..., H, W] as stored -> north to south, west to east."""
        return np.roll(block[..., ::-1, :] if self._flip else block, -self._shift, -1)


class XarrayFile(FieldFile):
    """A NetCDF file or a Zarr store, through xarray."""

    def __init__(self, file: Path):
        self._zarr = is_zarr(file)
        # NetCDF's own library reads zeros where a classic file was cut off; SciPy finds that out when it opens one
        self._engine = "zarr" if self._zarr else "scipy" if _is_classic(file) else "netcdf4"
        super().__init__(file)
        data = self._handle
        self.title = str(data.attrs.get("title", ""))
        lat, lon = _dimension(data, LATITUDE, "north"), _dimension(data, LONGITUDE, "east")
        for kind, found in (("latitude", lat), ("longitude", lon)):
            if found is None:
                raise ValueError(
                    f"{file}: no dimension is a {kind} with values (it has {_sizes(data)}); regular latitude-longitude grids are "
                    f"read: dimensions named latitude and longitude, or lat and lon."
                )
        self._lat, self._lon = str(lat), str(lon)
        self._set_grid(data[lat].values, data[lon].values)
        self._level = next((d for d in LEVEL if d in data.sizes), None)
        self._time = self._find_time()
        if self._time is not None:
            with reading(file):
                self.times = to_seconds(data[self._time].values)
        for name in data.data_vars:
            self._find_channels(str(name))

    def _open(self) -> Any:
        import xarray

        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", xarray.SerializationWarning
            )  # a _FillValue that cannot occur
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # a Zarr store without consolidated metadata
            # chunks=None: xarray's own lazy indexing; cache=False: nothing that was read is kept
            return xarray.open_dataset(
                self.file, engine=self._engine, chunks=None, cache=False, decode_timedelta=False
            )

    def _find_time(self) -> "str | None":
        """The dimension of time; None in a file of static fields only."""
        data = self._handle
        for name in TIME:
            if name not in data.sizes:
                continue
            if name in data.coords and data[name].dtype.kind == "M":
                return name
            if name in data.coords and data[name].dtype == object:
                raise ValueError(
                    f"{self.file}: {name} is in the calendar {data[name].encoding.get('calendar', '?')!r}, which has no dates of "
                    f"every day; convert it to the standard calendar (xarray: convert_calendar('standard'))."
                )
            if name != "t":
                raise ValueError(
                    f"{self.file}: {name} has no dates; give it units such as 'hours since 1979-01-01'."
                )
        of_grid = [v for v in data.data_vars.values() if {self._lat, self._lon} <= set(v.dims)]
        if of_grid and all(v.ndim == 2 for v in of_grid):
            return None
        raise ValueError(
            f"{self.file}: there is no time axis (dimensions {_sizes(data)}); the record needs a dimension named "
            f"time or valid_time that holds dates."
        )

    def _find_channels(self, name: str) -> None:
        data = self._handle[name]
        if (
            self._time is None
            or not {self._time, self._lat, self._lon} <= set(data.dims)
            or data.dtype.kind not in "fiu"
        ):
            return
        extra = [
            d
            for d in data.dims
            if d not in (self._time, self._lat, self._lon, self._level) and data.sizes[d] > 1
        ]
        if extra:
            self.refused[name] = (
                f"has the further dimension {extra[0]} of size {data.sizes[extra[0]]}; choose one (isel)"
            )
            return
        units = str(data.attrs.get("units", ""))
        long_name = str(data.attrs.get("long_name", data.attrs.get("standard_name", name)))
        if self._level not in data.dims:
            self.channels[name] = Channel(name, None, None, units, long_name)
            return
        for i, hpa in enumerate(self._levels()):
            channel = f"{name}{round(hpa)}" if round(hpa) == round(hpa, 6) else f"{name}{hpa:g}"
            self.channels[channel] = Channel(name, i, hpa, units, f"{long_name} at {hpa:g} hPa")

    def _levels(self) -> list[float]:
        """The levels in hPa; ValueError if they have no values."""
        if self._level not in self._handle.coords:
            raise ValueError(
                f"{self.file}: dimension {self._level} has no values; give it pressures in hPa."
            )
        levels = self._handle[self._level]
        scale = (
            0.01
            if str(levels.attrs.get("units", "")).lower() in ("pa", "pascal", "pascals")
            else 1.0
        )
        return [round(float(v) * scale, 6) for v in np.atleast_1d(levels.values)]

    def _block(self, variable: str, levels: "list[int | None]", rows: slice) -> np.ndarray:
        data = self._handle[variable]
        kept = (self._time, self._lat, self._lon, self._level)
        data = data.isel({self._time: rows, **{d: 0 for d in data.dims if d not in kept}})
        if levels[0] is None:
            return data.transpose(self._time, self._lat, self._lon).values[:, None]
        data = data.isel({self._level: levels})
        return data.transpose(self._time, self._level, self._lat, self._lon).values

    def statics(self) -> dict[str, np.ndarray]:
        found = {}
        for name, data in self._handle.data_vars.items():
            sizes = {
                d: n
                for d, n in data.sizes.items()
                if n > 1 or d in (self._time, self._lat, self._lon)
            }
            if set(sizes) == {self._lat, self._lon} and data.dtype.kind in "fiub":
                with _LOCK, reading(self.file):
                    flat = data.isel({d: 0 for d in data.dims if d not in sizes}).transpose(
                        self._lat, self._lon
                    )
                    found[str(name)] = self._turn(flat.values.astype(np.float32))
        return found

    def size(self, channels: Sequence[str]) -> int:
        """Bytes of the file; of a store, of all files of its chosen variables."""
        if not self._zarr:
            return super().size(channels)
        folders = {self.file / self.channels[name].variable for name in channels}
        return sum(
            (Path(at) / name).stat().st_size
            for f in folders
            for at, _, names in os.walk(f)
            for name in names
        )


def _is_classic(file: Path) -> bool:
    """Whether it is NetCDF 3 of a kind that SciPy reads."""
    with reading(file), file.open("rb") as f:
        return f.read(4) in (b"CDF\x01", b"CDF\x02")


class Hdf5File(FieldFile):
    """A file with a dataset fields[time, channel, lat, lon], as in NERSC's tutorials and FourCastNet.

    Such files say little of themselves.  Unless datasets of these names are there,
      time, timestamp      at even steps from January 1 of the year in the file's name, to the end of that year
      channel              names: those given, else channel0, channel1, ...
      lat, latitude        90 - i 180 / (H - 1) for odd H (both poles), 90 - i 180 / H for even H (the south pole cut off)
      lon, longitude       i 360 / W
    """

    def __init__(self, file: Path, names: "Sequence[str] | None" = None):
        super().__init__(file)
        f = self._handle
        if "fields" not in f or getattr(f["fields"], "ndim", 0) != 4:
            raise ValueError(
                f"{file}: there is no dataset fields[time, channel, lat, lon] (it has {', '.join(f) or 'nothing'}); "
                f"if this is NetCDF, end its name in .nc."
            )
        rows, count, height, width = f["fields"].shape
        with reading(file):
            lat, lon = (
                next((f[n][...] for n in known if n in f), None)
                for known in (LATITUDE[:2], LONGITUDE[:2])
            )
            stored = (
                [n.decode() if isinstance(n, bytes) else str(n) for n in f["channel"][...]]
                if "channel" in f
                else None
            )
        self.times = self._find_times(rows)
        if len(self.times) != rows:
            raise ValueError(
                f"{file}: it holds {len(self.times)} times, but fields has {rows}; write the file again."
            )
        if lat is None:
            lat = 90 - np.arange(height) * 180 / (height - height % 2 or 1)
        if lon is None:
            lon = np.arange(width) * 360 / width
        self._set_grid(lat, lon)
        if self.grid.shape != (height, width):
            raise ValueError(
                f"{file}: fields are {height} x {width}, but its coordinates {len(lat)} x {len(lon)}; write it again."
            )
        names = list(names or stored or (f"channel{i}" for i in range(count)))
        if len(names) != count:
            raise ValueError(
                f"{file}: it has {count} channels, but {len(names)} names are given: {', '.join(names)}."
            )
        if len(set(names)) != count:
            raise ValueError(
                f"channel_names={names} holds a name twice; name each of the {count} channels differently."
            )
        self.channels = {name: Channel("fields", i, None, "", name) for i, name in enumerate(names)}

    def _open(self) -> Any:
        import h5py

        return h5py.File(self.file, "r")

    def _find_times(self, rows: int) -> np.ndarray:
        for name in ("time", "valid_time", "timestamp"):
            if name not in self._handle:
                continue
            with reading(self.file):
                values, attributes = self._handle[name][...], dict(self._handle[name].attrs)
            if values.dtype.kind in "SO":
                with reading(self.file):
                    return to_seconds(
                        np.array(
                            [v.decode() if isinstance(v, bytes) else v for v in values], SECONDS
                        )
                    )
            units = attributes.get(
                "units", "seconds since 1970-01-01" if name == "timestamp" else None
            )
            if units is None:
                raise ValueError(
                    f"{self.file}: {name} has no dates; give it the attribute units='hours since 1979-01-01'."
                )
            import xarray

            with reading(self.file):
                coded = xarray.Dataset({"time": ("time", values, {"units": units})})
                return to_seconds(xarray.decode_cf(coded)["time"].values)
        return self._times_by_year(rows)

    def _times_by_year(self, rows: int) -> np.ndarray:
        years = re.findall(r"(?<!\d)[12]\d{3}(?!\d)", self.file.stem)
        if len(years) != 1:
            raise ValueError(
                f"{self.file}: its times are unknown; name the file after its year (1979.h5), or add a dataset time."
            )
        start, end = (
            np.datetime64(f"{int(years[0]) + i:04d}", "Y").astype(SECONDS) for i in (0, 1)
        )
        hours = int((end - start) / np.timedelta64(1, "h"))
        if rows == 0 or hours % rows:
            raise ValueError(
                f"{self.file}: {rows} times in the {hours} hours of {years[0]} are no whole number of hours apart; "
                f"if it is not a whole year, add a dataset time."
            )
        return start + np.arange(rows) * np.timedelta64(hours // rows * 3600, "s")

    def _block(self, variable: str, levels: "list[int | None]", rows: slice) -> np.ndarray:
        data = self._handle[variable]
        if levels == list(range(data.shape[1])):
            return data[rows]
        return np.stack([data[rows, c] for c in levels], 1)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """What the libraries raise, as one line that names the file."""
    try:
        yield
    except Exception as e:  # noqa: BLE001 - they raise anything
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(
            f"{file}: cannot be read: {reason.rstrip('.')}; check the file, or fetch it again."
        ) from None


def _dimension(data: Any, names: tuple[str, ...], direction: str) -> "str | None":
    """The first of these dimensions with values; y and x only in degrees."""
    for name in names:
        in_degrees = name in data.coords and str(data[name].attrs.get("units", "")).startswith(
            f"degrees_{direction}"
        )
        if name in data.sizes and name in data.coords and (len(name) > 1 or in_degrees):
            return name
    return None


def _sizes(data: Any) -> str:
    return ", ".join(f"{name} = {size}" for name, size in data.sizes.items()) or "none"


def to_seconds(times: np.ndarray) -> np.ndarray:
    """datetime64[s], to the nearest second: dates stored as fractions of days are off by nanoseconds."""
    return (times.astype("datetime64[ms]") + np.timedelta64(500, "ms")).astype(SECONDS)


def is_zarr(path: Path) -> bool:
    """Whether it is a Zarr store."""
    marks = ("zarr.json", ".zgroup", ".zmetadata")
    return path.is_dir() and (
        path.suffix == ".zarr" or any((path / name).exists() for name in marks)
    )


def find_files(paths: "str | Path | Sequence[str | Path]") -> list[Path]:
    """The files and stores that are meant by files, stores, folders and globs.

    Of a folder, all in it with a known ending; if there is none, those in its folders train, valid, test (and the like).
    Raises ValueError for what is not there."""
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise ValueError("path_or_paths is empty; name files, a folder, or a Zarr store.")
    found: list[Path] = []
    for path in given:
        if "://" in str(path):
            raise ValueError(
                f"{path} is not on this machine; copy it here first, and name the copy."
            )
        if Path(path).exists():
            found += _below(Path(path))
        elif glob.has_magic(str(path)) and (names := sorted(glob.glob(str(path), recursive=True))):
            found += [file for name in names for file in _below(Path(name))]
        else:
            raise ValueError(
                f"{path} does not exist; name a file, a folder, a glob or a Zarr store."
            )
    if twice := [file for i, file in enumerate(found) if file in found[:i]]:
        raise ValueError(f"{twice[0]} is named twice; name it once.")
    return found


def _below(path: Path) -> list[Path]:
    if is_zarr(path) or path.is_file():
        return [path]
    for folders in ([path], [path / name for name in SPLIT_FOLDERS if (path / name).is_dir()]):
        files = sorted(
            f for folder in folders for f in folder.iterdir() if not f.name.startswith(".")
        )
        if known := [
            f for f in files if is_zarr(f) or (f.is_file() and f.suffix in (*NETCDF, *HDF5))
        ]:
            return known
    raise ValueError(
        f"{path} holds no file that ends in {', '.join((*NETCDF, *HDF5))}, and no .zarr store; name another folder."
    )
