"""Files of gridded climate records: what each holds, and the fields of some of its times.

What is understood, by the names that the field uses:

    NetCDF 3 and 4, Zarr    dimensions time (valid_time, t), latitude (lat), longitude (lon), and
                            level (pressure_level, isobaricInhPa, plev, lev) of 3-D variables:
                            ERA5 from the CDS, WeatherBench 2, ARCO-ERA5
    HDF5                    one file a year, fields[time, channel, lat, lon], such as 1979.h5:
                            NERSC's tutorials, FourCastNet, makani.  What such a file does not
                            say follows from the conventions in ``Hdf5File``

A channel is a 2-D variable, or one level of a 3-D one.  Fields come out north to south and west to
east, in the files' units.  Files are read through xarray's lazy indexing and h5py, one thread at a
time: HDF5 and NetCDF allow no more.  A process that was forked opens them again.
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
PASCAL = ("pa", "pascal", "pascals")
NETCDF = (".nc", ".nc3", ".nc4", ".cdf", ".netcdf")
HDF5 = (".h5", ".hdf5")
# Folders of the NERSC tutorials.
SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test", "out_of_sample")
SECONDS = "datetime64[s]"
_LOCK = threading.Lock()  # HDF5 and NetCDF are not thread-safe
os.register_at_fork(
    before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
)


@dataclass(frozen=True, eq=False)
class Grid:
    """The points of a regular latitude-longitude grid.

    Attributes:
        lat: [H] float64, degrees north, descending, evenly spaced or not.
        lon: [W] float64, degrees east, ascending."""

    lat: np.ndarray
    lon: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return len(self.lat), len(self.lon)

    @property
    def periodic(self) -> bool:
        """Whether the columns go round the globe.

        They do if W times their mean distance is 360 degrees, within 1 %."""
        columns = len(self.lon)
        if columns < 2:
            return False
        circle = columns * (self.lon[-1] - self.lon[0]) / (columns - 1)
        return abs(circle / 360 - 1) <= 0.01

    def weights(self) -> np.ndarray:
        """[H] float64: cos(latitude), divided by its mean over the rows; 0 in a row at a pole."""
        cosine = np.maximum(np.cos(np.deg2rad(self.lat)), 0)
        cosine[np.abs(self.lat) >= 90] = 0  # cos(90 degrees) is 6e-17 in floating point
        return cosine / cosine.mean()


class Channel(NamedTuple):
    """Where a channel lies in a file."""

    variable: str
    level: int | None  # its index along the levels
    hpa: float | None
    units: str
    long_name: str


# ---- one file


class FieldFile:
    """One file or store: what ``XarrayFile`` and ``Hdf5File`` share.

    Rows and columns are turned here, once for all formats.

    Attributes:
        file: its path.
        title: what it is, for people; may be "".
        times: [n] datetime64[s]; none in a file of static fields.
        channels: by name, in the file's order.
        refused: variables that cannot be channels, and why.
        grid: the points."""

    grid: Grid

    def __init__(self, file: Path):
        self.file = file
        self.title = ""
        self.times = np.empty(0, SECONDS)
        self.channels: dict[str, Channel] = {}
        self.refused: dict[str, str] = {}
        self._south_first = False
        self._first_column = 0  # the westernmost, as stored
        self._pid = os.getpid()
        with reading(file):
            self._handle = self._open()

    def _open(self) -> Any:
        """What stays open.  It has close()."""
        raise NotImplementedError

    def _read_stored(self, variable: str, levels: list[int | None], rows: slice) -> np.ndarray:
        """[n, levels, H, W] of one variable, as stored."""
        raise NotImplementedError

    def statics(self) -> dict[str, np.ndarray]:
        """[H, W] float32 of each variable without time, by name."""
        return {}

    def size(self, channels: Sequence[str]) -> int:
        """Bytes of the file."""
        return self.file.stat().st_size

    def read(self, channels: Sequence[str], rows: slice) -> np.ndarray:
        """[n, C, H, W] float32 of consecutive times, north to south.

        Raises:
            ValueError: the file cannot be read."""
        out = np.empty((rows.stop - rows.start, len(channels), *self.grid.shape), np.float32)
        channels_of: dict[str, list[int]] = {}  # indices of `channels` by variable
        for i, name in enumerate(channels):
            channels_of.setdefault(self.channels[name].variable, []).append(i)
        with _LOCK, reading(self.file):
            self._reopen_after_fork()
            for variable, indices in channels_of.items():
                # All levels at once: they often lie in one chunk.
                levels = [self.channels[channels[i]].level for i in indices]
                stored = self._read_stored(variable, levels, rows)
                out[:, indices] = self._turn(stored)
        return out

    def _reopen_after_fork(self) -> None:
        if self._pid != os.getpid():
            self._handle.close()
            self._handle = self._open()
            self._pid = os.getpid()

    def _set_grid(self, latitude: np.ndarray, longitude: np.ndarray) -> None:
        """Takes the coordinates as stored; ValueError where they are no regular grid."""
        latitude = np.asarray(latitude, np.float64)
        longitude = np.asarray(longitude, np.float64)
        for name, values in (("latitude", latitude), ("longitude", longitude)):
            if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
                raise ValueError(
                    f"{self.file}: {name} is no row of numbers (shape {values.shape}); "
                    "only regular grids are read."
                )
        self.grid = Grid(self._north_to_south(latitude), self._west_to_east(longitude))

    def _north_to_south(self, latitude: np.ndarray) -> np.ndarray:
        if np.abs(latitude).max() > 90.001:
            farthest = latitude[np.abs(latitude).argmax()]
            raise ValueError(
                f"{self.file}: latitude reaches {farthest:g}; it must be in degrees, -90 to 90."
            )
        self._south_first = len(latitude) > 1 and bool(latitude[1] > latitude[0])
        if self._south_first:
            latitude = latitude[::-1]
        if not (np.diff(latitude) < 0).all():
            raise ValueError(
                f"{self.file}: latitude neither ascends nor descends throughout; "
                "sort it (sortby('latitude'))."
            )
        return latitude.copy()

    def _west_to_east(self, longitude: np.ndarray) -> np.ndarray:
        self._first_column = int(longitude.argmin())
        longitude = np.roll(longitude, -self._first_column)
        if not (np.diff(longitude) > 0).all():
            raise ValueError(
                f"{self.file}: longitude does not ascend, nor does any rotation of it; "
                "sort it (sortby('longitude'))."
            )
        if longitude[-1] - longitude[0] >= 359.999:
            raise ValueError(
                f"{self.file}: longitude {longitude[0]:g} and {longitude[-1]:g} are the same "
                "meridian twice; leave out the last column."
            )
        return longitude

    def _turn(self, stored: np.ndarray) -> np.ndarray:
        """[..., H, W] as stored -> north to south, west to east."""
        if self._south_first:
            stored = stored[..., ::-1, :]
        return np.roll(stored, -self._first_column, -1)


class XarrayFile(FieldFile):
    """A NetCDF file or a Zarr store, through xarray."""

    def __init__(self, file: Path):
        self._engine = _engine(file)
        super().__init__(file)
        data = self._handle
        self.title = str(data.attrs.get("title", ""))
        latitude = _dimension(data, LATITUDE, "north")
        longitude = _dimension(data, LONGITUDE, "east")
        for kind, dimension in (("latitude", latitude), ("longitude", longitude)):
            if dimension is None:
                raise ValueError(
                    f"{file}: no dimension is a {kind} with values (it has {_sizes(data)}); "
                    "regular latitude-longitude grids are read: dimensions named latitude and "
                    "longitude, or lat and lon."
                )
        self._latitude, self._longitude = str(latitude), str(longitude)
        self._set_grid(data[latitude].values, data[longitude].values)
        self._level = next((name for name in LEVEL if name in data.sizes), None)
        self._time = self._find_time()
        if self._time is not None:
            with reading(file):
                self.times = to_seconds(data[self._time].values)
        for name in data.data_vars:
            self._add_channels(str(name))

    def _open(self) -> Any:
        import xarray

        with warnings.catch_warnings():
            # A _FillValue that cannot occur, and a Zarr store without consolidated metadata.
            warnings.simplefilter("ignore", xarray.SerializationWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            return xarray.open_dataset(
                self.file,
                engine=self._engine,
                chunks=None,  # xarray's own lazy indexing
                cache=False,  # nothing that was read is kept
                decode_timedelta=False,
            )

    def _find_time(self) -> str | None:
        """The dimension of time; None in a file of static fields only."""
        data = self._handle
        for name in TIME:
            if name in data.sizes and self._holds_dates(name):
                return name
        on_grid = [
            variable
            for variable in data.data_vars.values()
            if {self._latitude, self._longitude} <= set(variable.dims)
        ]
        if on_grid and all(variable.ndim == 2 for variable in on_grid):
            return None
        raise ValueError(
            f"{self.file}: there is no time axis (dimensions {_sizes(data)}); the record needs a "
            "dimension named time or valid_time that holds dates."
        )

    def _holds_dates(self, name: str) -> bool:
        """Whether a dimension has dates; ValueError where it should have them and has not."""
        data = self._handle
        if name in data.coords and data[name].dtype.kind == "M":
            return True
        if name in data.coords and data[name].dtype == object:
            calendar = data[name].encoding.get("calendar", "?")
            raise ValueError(
                f"{self.file}: {name} is in the calendar {calendar!r}, which has no dates of "
                "every day; convert it to the standard calendar (xarray: "
                "convert_calendar('standard'))."
            )
        if name != "t":  # which may be something else
            raise ValueError(
                f"{self.file}: {name} has no dates; give it units such as 'hours since 1979-01-01'."
            )
        return False

    def _add_channels(self, name: str) -> None:
        """Adds the channels of a variable, or the reason why it is none."""
        data = self._handle[name]
        if not self._changes_in_time(data):
            return
        known = (self._time, self._latitude, self._longitude, self._level)
        further = [axis for axis in data.dims if axis not in known and data.sizes[axis] > 1]
        if further:
            self.refused[name] = (
                f"has the further dimension {further[0]} of size {data.sizes[further[0]]}; "
                "choose one (isel)"
            )
            return
        units = str(data.attrs.get("units", ""))
        long_name = str(data.attrs.get("long_name", data.attrs.get("standard_name", name)))
        if self._level not in data.dims:
            self.channels[name] = Channel(name, None, None, units, long_name)
            return
        for i, hpa in enumerate(self._levels()):
            whole = round(hpa) == round(hpa, 6)
            channel = f"{name}{round(hpa)}" if whole else f"{name}{hpa:g}"
            self.channels[channel] = Channel(name, i, hpa, units, f"{long_name} at {hpa:g} hPa")

    def _changes_in_time(self, data: Any) -> bool:
        """Whether a variable holds a number for each time and point."""
        required = {self._time, self._latitude, self._longitude}
        return self._time is not None and required <= set(data.dims) and data.dtype.kind in "fiu"

    def _levels(self) -> list[float]:
        """The levels in hPa; ValueError if they have no values."""
        if self._level not in self._handle.coords:
            raise ValueError(
                f"{self.file}: dimension {self._level} has no values; give it pressures in hPa."
            )
        levels = self._handle[self._level]
        in_pascal = str(levels.attrs.get("units", "")).lower() in PASCAL
        scale = 0.01 if in_pascal else 1.0
        return [round(float(value) * scale, 6) for value in np.atleast_1d(levels.values)]

    def _read_stored(self, variable: str, levels: list[int | None], rows: slice) -> np.ndarray:
        data = self._handle[variable]
        known = (self._time, self._latitude, self._longitude, self._level)
        chosen: dict[Any, Any] = {name: 0 for name in data.dims if name not in known}
        chosen[self._time] = rows
        data = data.isel(chosen)
        if levels[0] is None:
            return data.transpose(self._time, self._latitude, self._longitude).values[:, None]
        data = data.isel({self._level: levels})
        return data.transpose(self._time, self._level, self._latitude, self._longitude).values

    def statics(self) -> dict[str, np.ndarray]:
        fields = {}
        for name, data in self._handle.data_vars.items():
            # Further dimensions of size 1 do not matter; those of time do.
            of_size_1 = [
                dimension
                for dimension, size in data.sizes.items()
                if size <= 1 and dimension not in (self._time, self._latitude, self._longitude)
            ]
            rest = set(data.dims) - set(of_size_1)
            if rest == {self._latitude, self._longitude} and data.dtype.kind in "fiub":
                with _LOCK, reading(self.file):
                    flat = data.isel(dict.fromkeys(of_size_1, 0))
                    stored = flat.transpose(self._latitude, self._longitude).values
                    fields[str(name)] = self._turn(stored.astype(np.float32))
        return fields

    def size(self, channels: Sequence[str]) -> int:
        """Bytes of the file; of a store, of all files of its chosen variables."""
        if self._engine != "zarr":
            return super().size(channels)
        total = 0
        for folder in {self.file / self.channels[name].variable for name in channels}:
            for path, _, names in os.walk(folder):
                total += sum((Path(path) / name).stat().st_size for name in names)
        return total


def _engine(file: Path) -> str:
    """The engine with which xarray opens a file.

    NetCDF's own library reads zeros where a classic file was cut off; SciPy refuses it."""
    if is_zarr(file):
        return "zarr"
    with reading(file), file.open("rb") as f:
        classic = f.read(4) in (b"CDF\x01", b"CDF\x02")
    return "scipy" if classic else "netcdf4"


class Hdf5File(FieldFile):
    """A file with a dataset fields[time, channel, lat, lon]: NERSC's tutorials, FourCastNet.

    Such files say little of themselves.  Unless datasets of these names are there,
      time, timestamp      at even steps from January 1 of the year in the file's name, to the end
                           of that year
      channel              names: those given, else channel0, channel1, ...
      lat, latitude        90 - i 180 / (H - 1) for odd H (both poles), 90 - i 180 / H for even H
                           (the south pole cut off)
      lon, longitude       i 360 / W
    """

    def __init__(self, file: Path, names: Sequence[str] | None = None):
        super().__init__(file)
        rows, count, height, width = self._fields_shape()
        with reading(file):
            latitude = self._first_of(LATITUDE[:2])
            longitude = self._first_of(LONGITUDE[:2])
            stored_names = self._stored_names()
        self.times = self._find_times(rows)
        self._set_coordinates(latitude, longitude, height, width)
        channel_names = list(names or stored_names or (f"channel{i}" for i in range(count)))
        _expect_channel_names(file, channel_names, count)
        self.channels = {
            name: Channel("fields", i, None, "", name) for i, name in enumerate(channel_names)
        }

    def _open(self) -> Any:
        import h5py

        return h5py.File(self.file, "r")

    def _fields_shape(self) -> tuple[int, int, int, int]:
        """(times, channels, H, W) of the dataset; ValueError if there is none."""
        datasets = self._handle
        if "fields" not in datasets or getattr(datasets["fields"], "ndim", 0) != 4:
            raise ValueError(
                f"{self.file}: there is no dataset fields[time, channel, lat, lon] (it has "
                f"{', '.join(datasets) or 'nothing'}); if this is NetCDF, end its name in .nc."
            )
        return datasets["fields"].shape

    def _stored_names(self) -> list[str] | None:
        """The names of the channels, if the file holds them."""
        if "channel" not in self._handle:
            return None
        return [_decoded(name) for name in self._handle["channel"][...]]

    def _set_coordinates(
        self, latitude: np.ndarray | None, longitude: np.ndarray | None, height: int, width: int
    ) -> None:
        """Takes the coordinates as stored, or else by the conventions for fields of H x W."""
        if latitude is None:
            latitude = 90 - np.arange(height) * 180 / (height - height % 2 or 1)
        if longitude is None:
            longitude = np.arange(width) * 360 / width
        self._set_grid(latitude, longitude)
        if self.grid.shape != (height, width):
            raise ValueError(
                f"{self.file}: fields are {height} x {width}, but its coordinates "
                f"{len(latitude)} x {len(longitude)}; write it again."
            )

    def _first_of(self, names: Sequence[str]) -> np.ndarray | None:
        """The values of the first of these datasets that is there."""
        for name in names:
            if name in self._handle:
                return self._handle[name][...]
        return None

    def _find_times(self, rows: int) -> np.ndarray:
        """[rows] datetime64[s] of the file's dataset, or by the year in its name."""
        stored = [name for name in ("time", "valid_time", "timestamp") if name in self._handle]
        if not stored:
            return self._times_by_year(rows)
        times = self._stored_times(stored[0])
        if len(times) != rows:
            raise ValueError(
                f"{self.file}: it holds {len(times)} times, but fields has {rows}; "
                "write the file again."
            )
        return times

    def _stored_times(self, name: str) -> np.ndarray:
        with reading(self.file):
            values = self._handle[name][...]
            attributes = dict(self._handle[name].attrs)
        if values.dtype.kind in "SO":  # dates as text
            with reading(self.file):
                dates = [value.decode() if isinstance(value, bytes) else value for value in values]
                return to_seconds(np.array(dates, SECONDS))
        units = attributes.get("units")
        if units is None and name == "timestamp":
            units = "seconds since 1970-01-01"
        if units is None:
            raise ValueError(
                f"{self.file}: {name} has no dates; give it the attribute "
                "units='hours since 1979-01-01'."
            )
        import xarray

        with reading(self.file):
            coded = xarray.Dataset({"time": ("time", values, {"units": units})})
            return to_seconds(xarray.decode_cf(coded)["time"].values)

    def _times_by_year(self, rows: int) -> np.ndarray:
        years = re.findall(r"(?<!\d)[12]\d{3}(?!\d)", self.file.stem)
        if len(years) != 1:
            raise ValueError(
                f"{self.file}: its times are unknown; name the file after its year (1979.h5), "
                "or add a dataset time."
            )
        year = np.datetime64(f"{int(years[0]):04d}", "Y")
        start = year.astype(SECONDS)
        end = (year + 1).astype(SECONDS)
        hours = int((end - start) / np.timedelta64(1, "h"))
        if rows == 0 or hours % rows:
            raise ValueError(
                f"{self.file}: {rows} times in the {hours} hours of {years[0]} are no whole number "
                "of hours apart; if it is not a whole year, add a dataset time."
            )
        return start + np.arange(rows) * np.timedelta64(hours // rows * 3600, "s")

    def _read_stored(self, variable: str, levels: list[int | None], rows: slice) -> np.ndarray:
        data = self._handle[variable]
        if levels == list(range(data.shape[1])):
            return data[rows]
        return np.stack([data[rows, level] for level in levels], 1)


def _decoded(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _expect_channel_names(file: Path, names: list[str], count: int) -> None:
    if len(names) != count:
        raise ValueError(
            f"{file}: it has {count} channels, but {len(names)} names are given: "
            f"{', '.join(names)}."
        )
    if len(set(names)) != count:
        raise ValueError(
            f"channel_names={names} holds a name twice; name each of the {count} channels "
            "differently."
        )


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns what the libraries raise into a ValueError of one line that names the file."""
    try:
        yield
    except Exception as e:  # noqa: BLE001 - they raise anything
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(
            f"{file}: cannot be read: {reason.rstrip('.')}; check the file, or fetch it again."
        ) from None


def _dimension(data: Any, names: tuple[str, ...], direction: str) -> str | None:
    """The first of these dimensions with values; y and x only in degrees."""
    for name in names:
        if name not in data.sizes or name not in data.coords:
            continue
        units = str(data[name].attrs.get("units", ""))
        if len(name) > 1 or units.startswith(f"degrees_{direction}"):
            return name
    return None


def _sizes(data: Any) -> str:
    """The dimensions of a dataset, for messages."""
    return ", ".join(f"{name} = {size}" for name, size in data.sizes.items()) or "none"


def to_seconds(times: np.ndarray) -> np.ndarray:
    """datetime64[s], to the nearest second.

    Dates that are stored as fractions of days are off by nanoseconds."""
    return (times.astype("datetime64[ms]") + np.timedelta64(500, "ms")).astype(SECONDS)


def is_zarr(path: Path) -> bool:
    """Whether it is a Zarr store."""
    if not path.is_dir():
        return False
    marks = ("zarr.json", ".zgroup", ".zmetadata")
    return path.suffix == ".zarr" or any((path / name).exists() for name in marks)


def find_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files and stores that are meant by files, stores, folders and globs.

    Of a folder, all in it with a known ending; if there is none, those in its folders train,
    valid, test (and the like).

    Raises:
        ValueError: one is not there, or named twice; or there is none."""
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise ValueError("path_or_paths is empty; name files, a folder, or a Zarr store.")
    files = [file for path in given for file in _files_of(path)]
    for i, file in enumerate(files):
        if file in files[:i]:
            raise ValueError(f"{file} is named twice; name it once.")
    return files


def _files_of(path: str | Path) -> list[Path]:
    """The files and stores of one path, folder or glob."""
    if "://" in str(path):
        raise ValueError(f"{path} is not on this machine; copy it here first, and name the copy.")
    if Path(path).exists():
        return _files_in(Path(path))
    names: list[str] = []
    if glob.has_magic(str(path)):
        names = sorted(glob.glob(str(path), recursive=True))
    if not names:
        raise ValueError(f"{path} does not exist; name a file, a folder, a glob or a Zarr store.")
    return [file for name in names for file in _files_in(Path(name))]


def _files_in(path: Path) -> list[Path]:
    """The path itself if it is a file or a store, otherwise what is in the folder."""
    if is_zarr(path) or path.is_file():
        return [path]
    below = [path / name for name in SPLIT_FOLDERS if (path / name).is_dir()]
    for folders in ([path], below):
        files: list[Path] = []
        for folder in folders:
            files += [file for file in folder.iterdir() if _is_readable(file)]
        if files:
            return sorted(files)
    endings = ", ".join((*NETCDF, *HDF5))
    raise ValueError(
        f"{path} holds no file that ends in {endings}, and no .zarr store; name another folder."
    )


def _is_readable(file: Path) -> bool:
    """Whether it is a store or a file with a known ending, and not hidden."""
    if file.name.startswith("."):
        return False
    return is_zarr(file) or (file.is_file() and file.suffix in (*NETCDF, *HDF5))
