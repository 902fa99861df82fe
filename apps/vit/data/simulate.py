"""Weather-like data made on the spot: a simulation with the shallow-water equations.

    python -m apps.vit.simulate --out record.nc      # 400 days, every 6 hours, 32 x 64 points
    python -m apps.vit.simulate --out other.nc --days 100 --seed 1

Nothing is downloaded.  One layer of fluid, 6 km deep, flows around three mountains.  It is drawn
slowly towards a westerly jet in the mid-latitudes of either hemisphere, which is unstable: waves
grow on it, break and form anew, without end.  The sun adds fluid by day, and the night takes it
away, so that the hour of the day matters.  There are no seasons.  Weak random torques keep the
flow from settling.  The record has the winds u and v and the height h of the free surface.

``apps.vit.data.shallow_water`` solves the equations, at T21; its head explains the symbols.  The
jets are after Galewsky et al. 2004, Tellus A 56, 429-440.
"""

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from apps.common.arguments import run_command
from ringx.files import write_file

from .shallow_water import GRAVITY, ShallowWater, Sphere

DAY = 86400  # s, of the sun
EVERY = 6 * 3600  # s between two times of the record
DAYS = 400
START = np.datetime64("2001-01-01T00", "ns")
VERSION = 1  # of how a record is made: raise it whenever the same settings make another record

# Is called with the number of days that are done, spin-up included.
Progress = Callable[[int], None]


# ---- the forced flow


@dataclass(frozen=True)
class Settings:
    """What decides a record besides its length and its seed.

    Latitudes and longitudes are in degrees.

    Raises:
        ValueError: a truncation outside 1..21, a step that does not divide 6 hours, a negative
            spin-up, or a relaxation or diffusion that is not above 0.
    """

    truncation: int = 21  # 32 x 64 points
    step: int = 1800  # s
    spin_up: int = 40  # days that are thrown away
    height: float = 6000.0  # m: mean of the free surface, were the ground flat
    # Latitude, m s-1 / cos(latitude), half width.
    jets: tuple[tuple[float, float, float], ...] = (
        (42.0, 130.0, 9.0),
        (-46.0, 130.0, 9.0),
    )
    # Latitude, longitude, m, half width.
    mountains: tuple[tuple[float, float, float, float], ...] = (
        (45.0, 90.0, 2500.0, 15.0),
        (42.0, 250.0, 2000.0, 10.0),
        (-30.0, 290.0, 2000.0, 12.0),
    )
    relaxation: float = 10.0  # days in which a departure from the jets falls to 1/e
    diffusion: float = 9.0  # hours in which the smallest waves fall to 1/e
    heating: float = 150.0  # m of fluid that the sun overhead adds in a day
    # s-2: of random torques on waves of degrees 3..10, which last for a day.
    stirring: float = 1e-11
    kick: float = 100.0  # m: of the random disturbance at the start
    # Robert-Asselin: how much of the second difference in time is taken off at each step.
    filter: float = 0.03

    def __post_init__(self) -> None:
        if not 1 <= self.truncation <= 21:
            raise ValueError(f"truncation={self.truncation} must be 1..21 (21 is 32 x 64 points).")
        if self.step < 1 or EVERY % self.step:
            raise ValueError(
                f"step={self.step} must divide the {EVERY} s between two times of the record."
            )
        if self.spin_up < 0:
            raise ValueError(f"spin_up={self.spin_up} must be at least 0 days.")
        for name in ("relaxation", "diffusion"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 (infinite: none).")


class ForcedFlow:
    """ShallowWater with the forcing of the settings: mountains, jets, the sun, and diffusion.

    Attributes:
        water: the equations over the mountains.
        orography: [lat, lon], m: the mountains, as far as the truncation holds them.
        target: the balanced state of the jets, to which the flow is drawn."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.sphere = sphere = Sphere(settings.truncation)
        lat, lon = sphere.latitude[:, None], sphere.longitude
        ground = np.zeros(sphere.shape)
        for latitude, longitude, height, width in settings.mountains:
            ground += height * np.exp(-((_angle(lat, lon, latitude, longitude) / width) ** 2))
        self.water = ShallowWater(sphere, ground)
        self.orography = sphere.grid(self.water.ground[..., None])[0] / GRAVITY
        jets = np.zeros_like(lat)
        for latitude, speed, width in settings.jets:
            jets += speed * np.exp(-(((lat - latitude) / width) ** 2))
        self.target = self.water.balanced(jets * sphere.cos, settings.height)
        # The sine of the sun's height at 0 UTC, when it is noon at 180 degrees.
        daylight = np.maximum(sphere.cos * np.cos(np.radians(lon - 180)), 0)
        daylight -= daylight.mean(1, keepdims=True)  # no net source at any latitude
        self._sun = GRAVITY * settings.heating / DAY * sphere.spectral(daylight[None])[..., 0]
        scale = (sphere.laplacian / sphere.laplacian[0, -1])[..., None] ** 4
        damping = 1 / (settings.relaxation * DAY) + scale / (settings.diffusion * 3600)  # s-1
        self._damping = np.exp(-2 * settings.step * damping)

    def rate(self, t: float, state: np.ndarray) -> np.ndarray:
        """The state's rate of change at t seconds after 0 UTC, without damping."""
        rate = self.water.tendency(state)
        # The sun moves to the west.
        rate[..., 2] += self._sun * np.exp(2j * np.pi * t / DAY * self.sphere.order)
        return rate

    def start(self, rng: np.random.Generator) -> np.ndarray:
        """The jets, with a random disturbance of the height."""
        state = self.target.copy()
        state[..., 2] += GRAVITY * self.settings.kick * self._noise(rng)
        return state

    def march(self, state: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The state at 0 UTC, and step by step what becomes of it, without end."""
        step = self.settings.step
        t = 0
        before = state
        stirring = self._noise(rng)
        memory = np.exp(-step / DAY)
        while True:
            yield state
            rate = self.rate(t, state)
            rate[..., 0] += self.settings.stirring * stirring
            leap_step = step if t else step / 2  # the first step is forward in time
            after, second_difference = self.water.leap(before, state, rate, leap_step)
            # Asselin 1972: keeps the states of odd and even steps together.
            before = state + self.settings.filter * second_difference
            state = self.target + self._damping * (after - self.target)
            t += step
            stirring = memory * stirring + np.sqrt(1 - memory**2) * self._noise(rng)

    def _noise(self, rng: np.random.Generator) -> np.ndarray:
        """[m, n]: a random field of large waves whose mean square is 1 in the mean."""
        order, degree = self.sphere.order, self.sphere.degree
        large = (order >= 1) & (order <= degree) & (degree >= 3) & (degree <= 10)
        parts = rng.standard_normal((2, *large.shape))
        return (parts[0] + 1j * parts[1]) * large / np.sqrt(4 * max(large.sum(), 1))


def _angle(lat: np.ndarray, lon: np.ndarray, latitude: float, longitude: float) -> np.ndarray:
    """Degrees on the sphere between the points (lat, lon) and (latitude, longitude)."""
    lat, latitude = np.radians(lat), np.radians(latitude)
    turn = np.radians(lon - longitude)
    across = np.cos(lat) * np.cos(latitude) * np.cos(turn)
    cosine = np.sin(lat) * np.sin(latitude) + across
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


# ---- the record

DEFAULT = Settings()
VARIABLES = {  # of a record: long name, CF standard name, unit
    "u": ("eastward wind", "eastward_wind", "m s-1"),
    "v": ("northward wind", "northward_wind", "m s-1"),
    "h": ("height of the free surface", "geopotential_height", "m"),
}


def simulate(
    days: int = DAYS,
    seed: int = 0,
    *,
    settings: Settings = DEFAULT,
    progress: Progress | None = None,
) -> xr.Dataset:
    """A simulated record as a CF dataset: every 6 hours from 2001-01-01T00.

    The date stands for nothing.  u and v, m s-1, and h, m, are [time, latitude, longitude]
    float32, and the static orography, m, is [latitude, longitude].  Latitudes are Gaussian and
    descend, longitudes are 0..354.375.  The same seed gives the same bytes on the same machine.

    Args:
        days: the length, at least 1.
        seed: at least 0: of the disturbance at the start and of the stirring.
        settings: of the flow that is simulated.
        progress: called with the number of days done, up to settings.spin_up + days.

    Raises:
        ValueError: days or seed is out of range.
        FloatingPointError: settings with which the simulation does not stay bounded.
    """
    _require_days_and_seed(days, seed)
    flow, rng = ForcedFlow(settings), np.random.default_rng(seed)
    stride = EVERY // settings.step  # steps between two times of the record
    skipped = settings.spin_up * DAY // EVERY
    count = days * DAY // EVERY
    record = np.empty((count, len(VARIABLES), *flow.sphere.shape), np.float32)
    states = itertools.islice(
        flow.march(flow.start(rng), rng), 0, (skipped + count) * stride, stride
    )
    for i, state in enumerate(states):
        if not np.isfinite(state).all():
            raise FloatingPointError(
                f"the simulation left all bounds after {i * EVERY / DAY:g} days; "
                f"take a shorter step than {settings.step} s."
            )
        if i >= skipped:
            record[i - skipped] = flow.water.fields(state)
        if progress is not None and (i + 1) * EVERY % DAY == 0:
            progress((i + 1) * EVERY // DAY)
    return _dataset(flow, record, f"simulate(days={days}, seed={seed})")


def _require_days_and_seed(days: int, seed: int) -> None:
    for name, value, least in (("days", days, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def _dataset(flow: ForcedFlow, record: np.ndarray, made_by: str) -> xr.Dataset:
    """The CF dataset of a record [time, variable, lat, lon]."""
    grid = ("latitude", "longitude")
    variables: dict[str, Any] = {}
    for i, (name, (long_name, standard_name, units)) in enumerate(VARIABLES.items()):
        attributes = {"long_name": long_name, "standard_name": standard_name, "units": units}
        variables[name] = (("time", *grid), record[:, i], attributes)
    variables["orography"] = (
        grid,
        flow.orography.astype(np.float32),
        {"long_name": "height of the ground", "standard_name": "surface_altitude", "units": "m"},
    )
    times = START + np.arange(len(record)) * np.timedelta64(EVERY, "s")
    coordinates: dict[str, Any] = {
        "time": ("time", times, {"long_name": "time", "standard_name": "time", "axis": "T"}),
        "latitude": ("latitude", flow.sphere.latitude, _axis("latitude", "degrees_north", "Y")),
        "longitude": ("longitude", flow.sphere.longitude, _axis("longitude", "degrees_east", "X")),
    }
    attributes = {
        "Conventions": "CF-1.8",
        "title": "Weather-like flow of a shallow layer of fluid on the rotating sphere",
        "source": "simulation: forced shallow-water equations, spectral, "
        f"T{flow.settings.truncation}; no observations",
        "history": f"ringx, apps.vit.simulate, recipe {VERSION}: {made_by}",
        "references": "Williamson et al. 1992, J. Comput. Phys. 102, 211-224",
        "settings": json.dumps(dataclasses.asdict(flow.settings)),
    }
    return xr.Dataset(variables, coords=coordinates, attrs=attributes)


def _axis(name: str, units: str, axis: str) -> dict[str, str]:
    """The attributes of a coordinate of the grid."""
    return {"long_name": name, "standard_name": name, "units": units, "axis": axis}


def write(record: xr.Dataset, file: Path) -> None:
    """Writes what `simulate` made as NetCDF, in one step: a reader never sees half of it.

    Raises:
        ValueError: the file's folder cannot be made or written to."""
    encoding: dict[str, dict[str, Any]] = {
        str(name): {"_FillValue": None} for name in record.variables
    }
    encoding["time"].update(
        units="hours since 2001-01-01 00:00:00", calendar="standard", dtype="int32"
    )
    for name in VARIABLES:
        chunks = (min(len(record.time), 64), *record[name].shape[1:])
        encoding[name].update(zlib=True, complevel=1, chunksizes=chunks)

    def fill(aside: Path) -> None:
        record.to_netcdf(aside, engine="netcdf4", format="NETCDF4", encoding=encoding)

    _require_writable_folder(file)
    try:
        write_file(file, fill, replace=True)
    except OSError as e:
        raise ValueError(
            f"{file} cannot be written: {e.strerror or e}; name another place."
        ) from None


def _require_writable_folder(file: Path) -> None:
    """Makes the folder of the file; ValueError if that cannot be, or it cannot be written to."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        raise ValueError(f"{file} cannot be written: {e.strerror}; name another place.") from None


def default_record(
    folder: Path, seed: int = 0, *, days: int = DAYS, settings: Settings = DEFAULT
) -> Path:
    """The file of the default record in `folder`, made there the first time.

    Its name holds the seed and a hash of the settings, so that other settings have another file.
    Processes that make it at the same time do so side by side, and the last one's file, the same,
    stays.  At a terminal a bar shows the progress.

    Raises:
        ValueError: days or seed is out of range, or the folder cannot be written to."""
    _require_days_and_seed(days, seed)
    recipe = json.dumps([VERSION, days, dataclasses.asdict(settings)])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    rows, columns = Sphere(settings.truncation).shape
    file = Path(folder) / f"shallow_water_{rows}x{columns}_seed{seed}_{digest}.nc"
    if not file.is_file():
        _require_writable_folder(file)
        with _progress_bar(days + settings.spin_up) as show:
            record = simulate(days, seed, settings=settings, progress=show)
        write(record, file)
    return file


@contextlib.contextmanager
def _progress_bar(days: int) -> Iterator[Progress]:
    """A bar of the days simulated; none where stderr is no terminal."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("days, left"),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("simulating", total=days)

        def show(done: int) -> None:
            bar.update(task, completed=done)

        yield show


# ---- the command line


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m apps.vit.simulate",
        description="Make weather-like data on the sphere for apps.vit.",
    )
    p.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="NetCDF file to make; one that is there is kept",
    )
    p.add_argument(
        "--days",
        type=int,
        default=DAYS,
        help=f"length of the record, after a spin-up (default: {DAYS})",
    )
    p.add_argument("--seed", type=int, default=0, help="another seed, another record (default: 0)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Makes a record; a user's mistake is one line on stderr and exit status 2."""
    return run_command(
        parser(),
        argv,
        _make_record,
        mistakes=(ValueError,),
        interrupted="interrupted; nothing was written",
    )


def _make_record(args: argparse.Namespace) -> int:
    if args.out.exists():
        raise ValueError(
            f"--out {args.out} is there already and was kept; name another file, or delete it."
        )
    _require_days_and_seed(args.days, args.seed)
    _require_writable_folder(args.out)
    with _progress_bar(args.days + DEFAULT.spin_up) as show:
        record = simulate(args.days, args.seed, progress=show)
    write(record, args.out)
    rows, columns = record.u.shape[1:]
    mebibytes = args.out.stat().st_size / 2**20
    print(
        f"{args.out}: {len(record.time)} times of u, v, h on {rows} x {columns} points, "
        f"{mebibytes:.1f} MiB"
    )
    return 0
