"""Weather-like data made on the spot: the shallow-water equations on the rotating sphere.  Nothing is downloaded.

    python -m apps.vit.simulate --out record.nc                     # 400 days, every 6 hours, 32 x 64 points
    python -m apps.vit.simulate --out other.nc --days 100 --seed 1

One layer of fluid, 6 km deep, flows around three mountains.  It is drawn slowly towards a westerly jet in the mid-latitudes of
either hemisphere, which is unstable: waves grow on it, break and form anew, without end.  The sun adds fluid by day, and the
night takes it away, so that the hour of the day matters.  There are no seasons.  Weak random torques keep the flow from
settling.  The record has the winds u and v and the height h of the free surface.

The equations are solved in vorticity-divergence form by the spectral transform method (Williamson et al. 1992, J. Comput. Phys.
102, 211-224, "W92"; Hack & Jakob 1992, NCAR/TN-343+STR), truncated triangularly at T21, by semi-implicit leapfrog.  The jets
are after Galewsky et al. (2004, Tellus A 56, 429-440).  The transforms are matrix products of numpy: the libraries for
spherical harmonics need compilers or accelerators to install.
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
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .shallow_water import GRAVITY, ShallowWater, Sphere

DAY = 86400  # s, of the sun
EVERY = 6 * 3600  # s between two times of the record
DAYS = 400
START = np.datetime64("2001-01-01T00", "ns")
VERSION = 1  # of how a record is made: raise it whenever the same settings make another record

Progress = Callable[[int], None]  # told how many days are done, spin-up included


# ---- the forced flow


@dataclass(frozen=True)
class Settings:
    """What decides a record besides its length and its seed.  Latitudes and longitudes in degrees.

    Raises:
        ValueError: a truncation outside 1..21, a step that does not divide 6 hours, or a negative spin-up.
    """

    truncation: int = 21  # 32 x 64 points
    step: int = 1800  # s
    spin_up: int = 40  # days that are thrown away
    height: float = 6000.0  # m: mean of the free surface, were the ground flat
    jets: tuple[tuple[float, float, float], ...] = (
        (42.0, 130.0, 9.0),
        (-46.0, 130.0, 9.0),
    )  # latitude, m s-1 / cos, half width
    mountains: tuple[
        tuple[float, float, float, float], ...
    ] = (  # latitude, longitude, m, half width
        (45.0, 90.0, 2500.0, 15.0),
        (42.0, 250.0, 2000.0, 10.0),
        (-30.0, 290.0, 2000.0, 12.0),
    )
    relaxation: float = 10.0  # days in which a departure from the jets falls to 1/e
    diffusion: float = 9.0  # hours in which the smallest waves fall to 1/e
    heating: float = 150.0  # m of fluid that the sun overhead adds in a day
    stirring: float = (
        1e-11  # s-2: of random torques on waves of degrees 3..10, which last for a day
    )
    kick: float = 100.0  # m: of the random disturbance at the start
    filter: float = (
        0.03  # Robert-Asselin: how much of the second difference in time is taken off at each step
    )

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
    """ShallowWater with the forcing of the settings: mountains, jets that it is drawn to, the sun, diffusion."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.sphere = sphere = Sphere(settings.truncation)
        lat, lon = sphere.latitude[:, None], sphere.longitude
        ground = sum(
            (h * np.exp(-((_angle(lat, lon, y, x) / w) ** 2)) for y, x, h, w in settings.mountains),
            np.zeros(sphere.shape),
        )
        self.water = ShallowWater(sphere, ground)
        self.orography = sphere.grid(self.water.ground[..., None])[0] / GRAVITY
        jets = sum(
            (u * np.exp(-(((lat - y) / w) ** 2)) for y, u, w in settings.jets), np.zeros_like(lat)
        )
        self.target = self.water.balanced(jets * sphere.cos, settings.height)
        day = np.maximum(
            sphere.cos * np.cos(np.radians(lon - 180)), 0
        )  # the sun's height at 0 UTC: noon at 180 degrees
        day -= day.mean(1, keepdims=True)  # no net source at any latitude
        self._sun = GRAVITY * settings.heating / DAY * sphere.spectral(day[None])[..., 0]
        scale = (sphere.laplacian / sphere.laplacian[0, -1])[..., None] ** 4
        damping = 1 / (settings.relaxation * DAY) + scale / (settings.diffusion * 3600)  # s-1
        self._damping = np.exp(-2 * settings.step * damping)

    def rate(self, t: float, state: np.ndarray) -> np.ndarray:
        """The state's rate of change at t seconds after 0 UTC, without damping."""
        rate = self.water.tendency(state)
        rate[..., 2] += self._sun * np.exp(
            2j * np.pi * t / DAY * self.sphere.order
        )  # the sun moves west
        return rate

    def start(self, rng: np.random.Generator) -> np.ndarray:
        """The jets, with a random disturbance of the height."""
        state = self.target.copy()
        state[..., 2] += GRAVITY * self.settings.kick * self._noise(rng)
        return state

    def march(self, state: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The state at 0 UTC, and step by step what becomes of it, without end."""
        before, step, t, stirring = state, self.settings.step, 0, self._noise(rng)
        memory = np.exp(-step / DAY)
        while True:
            yield state
            rate = self.rate(t, state)
            rate[..., 0] += self.settings.stirring * stirring
            after, bend = self.water.leap(
                before, state, rate, step if t else step / 2
            )  # first: forward
            before = (
                state + self.settings.filter * bend
            )  # Asselin 1972: keeps odd and even steps together
            state, t = self.target + self._damping * (after - self.target), t + step
            stirring = memory * stirring + np.sqrt(1 - memory**2) * self._noise(rng)

    def _noise(self, rng: np.random.Generator) -> np.ndarray:
        """[m, n]: a random field of large waves whose mean square is 1 in the mean."""
        order, degree = self.sphere.order, self.sphere.degree
        large = (order >= 1) & (order <= degree) & (degree >= 3) & (degree <= 10)
        parts = rng.standard_normal((2, *large.shape))
        return (parts[0] + 1j * parts[1]) * large / np.sqrt(4 * max(large.sum(), 1))


def _angle(lat: np.ndarray, lon: np.ndarray, y: float, x: float) -> np.ndarray:
    """Degrees between the points (lat, lon) and (y, x) on the sphere."""
    lat, y = np.radians(lat), np.radians(y)
    cosine = np.sin(lat) * np.sin(y) + np.cos(lat) * np.cos(y) * np.cos(np.radians(lon - x))
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


# ---- the record

DEFAULT = Settings()


def simulate(
    days: int = DAYS,
    seed: int = 0,
    *,
    settings: Settings = DEFAULT,
    progress: Progress | None = None,
) -> xr.Dataset:
    """A record of `days` days, every 6 hours from 2001-01-01T00 (a date that stands for nothing), as a CF dataset.

    u and v, m s-1, and h, m: [time, latitude, longitude] float32, and the static orography, m: [latitude, longitude].  Latitudes
    are Gaussian and descend, longitudes are 0..354.375.  The same seed gives the same bytes on the same machine.

    Args:
        days: at least 1.
        seed: at least 0: of the disturbance at the start and of the stirring.
        settings: of the flow that is simulated.
        progress: told the number of days done, up to settings.spin_up + days.

    Raises:
        ValueError: days or seed is out of range.
        FloatingPointError: settings with which the simulation does not stay bounded.
    """
    _expect(days, seed)
    flow, rng = ForcedFlow(settings), np.random.default_rng(seed)
    stride, spin_up = EVERY // settings.step, settings.spin_up * DAY // EVERY
    times = days * DAY // EVERY
    record = np.empty((times, 3, *flow.sphere.shape), np.float32)
    states = itertools.islice(
        flow.march(flow.start(rng), rng), 0, (spin_up + times) * stride, stride
    )
    for i, state in enumerate(states):
        if not np.isfinite(state).all():
            raise FloatingPointError(
                f"the simulation left all bounds after {i * EVERY / DAY:g} days; take a shorter step than {settings.step} s."
            )
        if i >= spin_up:
            record[i - spin_up] = flow.water.fields(state)
        if progress is not None and (i + 1) * EVERY % DAY == 0:
            progress((i + 1) * EVERY // DAY)
    return _dataset(flow, record, f"simulate(days={days}, seed={seed})")


def _expect(days: int, seed: int) -> None:
    for name, value, least in (("days", days, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def _dataset(flow: ForcedFlow, record: np.ndarray, made_by: str) -> xr.Dataset:
    grid = ("latitude", "longitude")
    about = {
        "u": ("eastward wind", "eastward_wind", "m s-1"),
        "v": ("northward wind", "northward_wind", "m s-1"),
        "h": ("height of the free surface", "geopotential_height", "m"),
    }
    fields = {
        name: (
            ("time", *grid),
            record[:, i],
            {"long_name": long, "standard_name": standard, "units": units},
        )
        for i, (name, (long, standard, units)) in enumerate(about.items())
    }
    ground = {
        "long_name": "height of the ground",
        "standard_name": "surface_altitude",
        "units": "m",
    }
    lat = {
        "long_name": "latitude",
        "standard_name": "latitude",
        "units": "degrees_north",
        "axis": "Y",
    }
    lon = {
        "long_name": "longitude",
        "standard_name": "longitude",
        "units": "degrees_east",
        "axis": "X",
    }
    time = START + np.arange(len(record)) * np.timedelta64(EVERY, "s")
    return xr.Dataset(
        {**fields, "orography": (grid, flow.orography.astype(np.float32), ground)},
        coords={
            "time": ("time", time, {"long_name": "time", "standard_name": "time", "axis": "T"}),
            "latitude": ("latitude", flow.sphere.latitude, lat),
            "longitude": ("longitude", flow.sphere.longitude, lon),
        },
        attrs={
            "Conventions": "CF-1.8",
            "title": "Weather-like flow of a shallow layer of fluid on the rotating sphere",
            "source": f"simulation: forced shallow-water equations, spectral, T{flow.settings.truncation}; no observations",
            "history": f"ringx, apps.vit.simulate, recipe {VERSION}: {made_by}",
            "references": "Williamson et al. 1992, J. Comput. Phys. 102, 211-224",
            "settings": json.dumps(dataclasses.asdict(flow.settings)),
        },
    )


def write(record: xr.Dataset, file: Path) -> None:
    """Writes what `simulate` made as NetCDF, aside and renamed: a reader never sees half of it.

    Raises:
        ValueError: the file's folder cannot be made or written to."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # of no other process on any host
    encoding: dict[str, dict[str, Any]] = {
        str(name): {"_FillValue": None} for name in record.variables
    }
    encoding["time"].update(
        units="hours since 2001-01-01 00:00:00", calendar="standard", dtype="int32"
    )
    for name in ("u", "v", "h"):
        encoding[name].update(
            zlib=True, complevel=1, chunksizes=(min(len(record.time), 64), *record[name].shape[1:])
        )
    _expect_place(file)
    try:
        record.to_netcdf(aside, engine="netcdf4", format="NETCDF4", encoding=encoding)
        os.replace(aside, file)
    except OSError as e:
        raise ValueError(
            f"{file} cannot be written: {e.strerror or e}; name another place."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _expect_place(file: Path) -> None:
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
    """The file of the default record in `folder`, made there the first time, with a bar at a terminal.

    Its name holds the seed and a hash of the settings, so that other settings never meet an old file.  Processes that make it at
    the same time do so side by side, and the last one's file, the same, stays.

    Raises:
        ValueError: days or seed is out of range, or the folder cannot be written to."""
    _expect(days, seed)
    recipe = json.dumps([VERSION, days, dataclasses.asdict(settings)])
    rows, columns = Sphere(settings.truncation).shape
    name = f"shallow_water_{rows}x{columns}_seed{seed}_{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.nc"
    file = Path(folder) / name
    if not file.is_file():
        _expect_place(file)
        with _bar(days + settings.spin_up) as show:
            record = simulate(days, seed, settings=settings, progress=show)
        write(record, file)
    return file


@contextlib.contextmanager
def _bar(days: int) -> Iterator[Progress]:
    """A bar of the days simulated; none where no one looks."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("days, left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(
        *columns, console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("simulating", total=days)
        yield lambda done: bar.update(task, completed=done)


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
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(
                f"--out {args.out} is there already and was kept; name another file, or delete it."
            )
        _expect(args.days, args.seed)
        _expect_place(args.out)
        with _bar(args.days + DEFAULT.spin_up) as show:
            record = simulate(args.days, args.seed, progress=show)
        write(record, args.out)
    except ValueError as e:
        p.exit(2, f"{p.prog}: error: {e}\n")
    except KeyboardInterrupt:
        p.exit(130, f"{p.prog}: interrupted; nothing was written\n")
    rows, columns = record.u.shape[1:]
    print(
        f"{args.out}: {len(record.time)} times of u, v, h on {rows} x {columns} points, {args.out.stat().st_size / 2**20:.1f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
