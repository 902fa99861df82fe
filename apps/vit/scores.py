"""How forecasts of gridded fields are scored: RMSE, anomaly correlation, bias and zonal spectra; and the tables that hold them.

The definitions are those of WeatherBench 2 (Rasp et al. 2024, arXiv 2308.15560), with one difference: rows of the grid count by
the cosine of their latitude, as in WeatherBench 1.  WeatherBench 2 takes the exact areas of the cells between the poles.  On an
even grid the two differ in the first and last row alone; on a regional one only the cosine makes sense.

scores.csv has a line for each variable, lead and forecast; spectra.csv one for each of their wavenumbers.  Where a score does
not exist (nan), its cell is empty.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ringx.checks import require_name
from ringx.files import write_text

FORECASTS = ("model", "persistence", "climatology", "damped anomaly", "roll-out")
MODELS = ("model", "roll-out")  # roll-out: the model fed with its own forecasts
SPECTRA = ("truth", "model", "persistence")
EARTH_RADIUS_KM = 6371.0
COLUMNS = 100  # of a terminal, at most
DIGITS = 6  # significant ones, in files
COLUMN_OF = {
    "model": "model",
    "persistence": "persist.",
    "climatology": "climat.",
    "damped anomaly": "damped",
}  # of a table


# ---- scores


class Score:
    """Adds up, time by time, what the scores of a forecast need.  All sums are float64, and nothing else is kept.

    Ranks that scored different times add their `sums`, for example with ``dist.all_reduce(torch.from_numpy(score.sums))``, and
    then have the scores of all times.

    Args:
        channels: names of the C fields.
        leads: the L lead times in hours.
        lat: [H] degrees north, in the order of the fields' rows.

    Attributes:
        sums: [5 * L * C] float64, flat.  Changed in place, the scores follow.

    Raises:
        ValueError: no channels or leads, one named twice, or latitudes that are none; names it."""

    def __init__(self, channels: Sequence[str], leads: Sequence[int], lat: np.ndarray):
        self.channels = tuple(channels)
        self.leads = tuple(int(h) for h in leads)
        for name, values in (("channels", self.channels), ("leads", self.leads)):
            if not values or len(set(values)) < len(values):  # type: ignore[arg-type]
                raise ValueError(f"{name}={list(values)} must name at least one, and none twice.")
        self.lat = np.array(lat, np.float64)
        self.weights = latitude_weights(self.lat)
        self.sums = np.zeros(5 * len(self.leads) * len(self.channels))

    def add(
        self, lead_index: int, forecast: np.ndarray, truth: np.ndarray, climatology: np.ndarray
    ) -> None:
        """Scores forecasts of n times.  Each time is scored by itself, so that it does not matter how many come at once.

        Args:
            lead_index: which of the leads they are for, 0 .. L-1.
            forecast, truth, climatology: [n, C, H, W], all at the valid times, in the same units.  A forecast with nan or inf
                in it has such scores.

        Raises:
            ValueError: a lead_index or shapes that do not fit, or a truth or climatology that is not finite; names it."""
        if not 0 <= lead_index < len(self.leads):
            raise ValueError(
                f"lead_index={lead_index} is none of the {len(self.leads)} leads; the first is 0."
            )
        forecast, truth, climatology = (
            np.asarray(forecast),
            np.asarray(truth),
            np.asarray(climatology),
        )
        self._expect(forecast, truth, climatology)
        mine = self._parts()[:, lead_index]
        for f, t, c in zip(forecast, truth, climatology, strict=True):
            mine += self._of_one_time(
                f.astype(np.float64), t.astype(np.float64), c.astype(np.float64)
            )

    def merge(self, other: "Score") -> None:
        """Adds what `other` has seen.

        Raises:
            ValueError: it is of other channels, leads or latitudes."""
        for name in ("channels", "leads", "lat"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise ValueError(
                    f"other.{name} differ from these {name}; merge scores of the same fields on the same grid."
                )
        self.sums += other.sums

    @property
    def times(self) -> np.ndarray:
        """[L] int: how many times were added."""
        return self._parts()[0, :, 0].round().astype(int)

    @property
    def rmse(self) -> np.ndarray:
        """[L, C], in the fields' units: sqrt(1/T sum_t sum_ij w_i (f - o)^2), with weights w of sum 1.

        The mean over all times and points comes *before* the root: WeatherBench 2's RMSE, and WMO's.  nan where no time was added.
        """
        return np.sqrt(self._mean(1))

    @property
    def rmse_mean_of_roots(self) -> np.ndarray:
        """[L, C], in the fields' units: 1/T sum_t sqrt(sum_ij w_i (f - o)^2).

        The root comes before the mean over times: WeatherBench 1's RMSE (Rasp et al. 2020).  Never above `rmse`."""
        return self._mean(2)

    @property
    def bias(self) -> np.ndarray:
        """[L, C], in the fields' units: 1/T sum_t sum_ij w_i (f - o), forecast minus truth."""
        return self._mean(3)

    @property
    def acc(self) -> np.ndarray:
        """[L, C] in -1 .. 1: anomaly correlation, uncentred, of each time by itself, then the mean over times (WeatherBench 2):

            1/T sum_t  sum_ij w_i f' o' / sqrt(sum_ij w_i f'^2  sum_ij w_i o'^2),   f' = f - c,  o' = o - c,  c the climatology

        Not done here: to centre the anomalies, i.e. to take their spatial mean off first (WMO-No. 485; Murphy and Epstein 1989,
        Mon. Wea. Rev. 117), or to pool all times in one correlation.  nan (0/0) where a forecast equals the climatology."""
        return self._mean(4)

    def rows(self, forecast: str, units: Mapping[str, str]) -> "list[Row]":
        """The scores as lines of scores.csv, by channel and then lead.

        Args:
            forecast: one of FORECASTS.
            units: of each channel.

        Raises:
            ValueError: an unknown forecast, or a channel without units; names it."""
        if missing := [c for c in self.channels if c not in units]:
            raise ValueError(f"units lack channel {missing[0]!r}; give '' where it has none.")
        rmse, acc, bias, roots, times = (
            self.rmse,
            self.acc,
            self.bias,
            self.rmse_mean_of_roots,
            self.times,
        )
        return [
            Row(
                variable=channel,
                lead_hours=hours,
                forecast=forecast,
                rmse=float(rmse[l, c]),
                acc=float(acc[l, c]),
                bias=float(bias[l, c]),
                rmse_mean_of_roots=float(roots[l, c]),
                units=units[channel],
                times=int(times[l]),
            )
            for c, channel in enumerate(self.channels)
            for l, hours in enumerate(self.leads)
        ]

    def _parts(self) -> np.ndarray:
        """[5, L, C], sums over times: of 1, and of each time's mean square error, its root, mean error, and correlation."""
        return self.sums.reshape(5, len(self.leads), len(self.channels))

    def _mean(self, part: int) -> np.ndarray:
        sums = self._parts()
        with np.errstate(invalid="ignore"):  # 0/0 where nothing was added
            return sums[part] / sums[0]

    def _of_one_time(self, f: np.ndarray, t: np.ndarray, c: np.ndarray) -> np.ndarray:
        """[5, C] of fields [C, H, W]."""
        with np.errstate(
            invalid="ignore", over="ignore"
        ):  # forecasts that are not finite; 0/0 in the correlation
            error = f - t
            square = self._average(error**2)
            f -= c
            t -= c
            correlation = self._average(f * t) / np.sqrt(
                self._average(f * f) * self._average(t * t)
            )
            return np.stack(
                [np.ones(len(f)), square, np.sqrt(square), self._average(error), correlation]
            )

    def _average(self, x: np.ndarray) -> np.ndarray:
        return x.mean(-1) @ self.weights

    def _expect(self, forecast: np.ndarray, truth: np.ndarray, climatology: np.ndarray) -> None:
        given = {"forecast": forecast, "truth": truth, "climatology": climatology}
        wanted = (len(self.channels), len(self.lat))
        for name, x in given.items():
            if x.ndim != 4 or x.shape[1:3] != wanted or x.shape != forecast.shape:
                raise ValueError(
                    f"{name} has shape {list(x.shape)}; it must be [n, {wanted[0]}, {wanted[1]}, W], "
                    "the same for forecast, truth and climatology."
                )
            if name != "forecast" and not np.isfinite(x).all():
                raise ValueError(
                    f"{name} holds nan or inf at {(~np.isfinite(x)).sum()} points; score without such times or channels."
                )


def latitude_weights(lat: np.ndarray) -> np.ndarray:
    """[H]: cos(latitude) divided by its sum.  A row at a pole weighs nothing.

    Args:
        lat: [H] degrees north.

    Raises:
        ValueError: not [H], or not all in -90 .. 90."""
    lat = np.asarray(lat, np.float64)
    if lat.ndim != 1 or not lat.size or not (np.abs(lat) <= 90).all():
        raise ValueError(
            f"lat has shape {list(lat.shape)} or values outside -90 .. 90; give the rows' latitudes in degrees, [H]."
        )
    cosines = np.cos(np.deg2rad(lat))
    return cosines / cosines.sum()


# ---- spectra


def spectrum(
    field: np.ndarray, lat: np.ndarray, band: "tuple[float, float] | None" = None
) -> tuple[np.ndarray, np.ndarray]:
    """Zonal energy spectrum of fields on full circles of latitude.

    With F_k = 1/W sum_l f_l exp(-2 pi i k l / W) a row has the energy |F_k|^2 at wavenumber k, doubled where -k is another
    wavenumber than k.  The sum over k is then the mean of the squares along the circle (Parseval).  Rows are averaged by
    cos(latitude).  WeatherBench 2's ZonalEnergySpectrum is this times the circle's circumference, and doubles k = W/2 too.

    Args:
        field: [..., H, W].  The W columns must go once round the globe: a regional field has no such spectrum.
        lat: [H] degrees north.
        band: (south, north) in degrees: only the rows within, both included.  None: all.

    Returns:
        wavenumbers [W//2+1] (waves per circle), energy [..., W//2+1] float64 in the square of the field's units.

    Raises:
        ValueError: a field that does not fit the latitudes, or a band without rows; names it."""
    lat, field = np.asarray(lat, np.float64), np.asarray(field)
    weights = latitude_weights(lat)
    if field.ndim < 2 or field.shape[-2] != len(lat):
        raise ValueError(
            f"field has shape {list(field.shape)}; it must be [..., H, W] with H = {len(lat)}, as lat says."
        )
    if band is not None:
        inside = (lat >= band[0]) & (lat <= band[1])
        if not weights[inside].sum() > 0:
            raise ValueError(
                f"band={band} holds no row of {lat.min():g} .. {lat.max():g} degrees; give (south, north)."
            )
        field, weights = field[..., inside, :], weights[inside] / weights[inside].sum()
    width = field.shape[-1]
    numbers = np.arange(width // 2 + 1)
    amplitude = np.fft.rfft(field.astype(np.float64), norm="forward")
    energy = np.where((numbers == 0) | (2 * numbers == width), 1.0, 2.0) * np.abs(amplitude) ** 2
    return numbers, np.einsum("...hk,h->...k", energy, weights)


def zonal_wavelength(wavenumbers: np.ndarray, latitude: float = 0.0) -> np.ndarray:
    """Wavelength in km of zonal wavenumbers on the circle at `latitude` (degrees): 2 pi R cos(latitude) / k; inf for k = 0.

    The Earth is a sphere of EARTH_RADIUS_KM."""
    around = 2 * np.pi * EARTH_RADIUS_KM * np.cos(np.deg2rad(latitude))
    with np.errstate(divide="ignore"):
        return around / np.asarray(wavenumbers, np.float64)


# ---- forecasts that need no model


def persistence(x0: np.ndarray) -> np.ndarray:
    """Nothing changes: the fields at the initial time, as they are."""
    return x0


def damped_anomaly(
    x0: np.ndarray, clim0: np.ndarray, clim_valid: np.ndarray, r: np.ndarray
) -> np.ndarray:
    """clim_valid + r (x0 - clim0): the initial anomaly decays towards the climatology, for each lead by its own r.

    Args:
        x0, clim0: [..., C, H, W] at the initial times.
        clim_valid: [..., C, H, W] at the valid times.
        r: [C] or [C, H, W], of the lead.

    Raises:
        ValueError: r of another shape."""
    r, shape = np.asarray(r), np.shape(x0)[-3:]
    if r.shape not in (shape[:1], shape):
        raise ValueError(
            f"r has shape {list(r.shape)}; it must be {list(shape[:1])} or {list(shape)}: one lead's."
        )
    return clim_valid + (r[:, None, None] if r.ndim == 1 else r) * (x0 - clim0)


# ---- files


@dataclass(frozen=True)
class Row:
    """A line of scores.csv: one variable, lead and forecast, over `times` valid times.  ValueError for an unknown forecast."""

    variable: str
    lead_hours: int
    forecast: str
    rmse: float
    acc: float
    bias: float
    rmse_mean_of_roots: float
    units: str
    times: int

    def __post_init__(self) -> None:
        require_name(self.forecast, FORECASTS, "forecast")


@dataclass(frozen=True)
class SpectrumRow:
    """A line of spectra.csv: the energy at one zonal wavenumber.  ValueError for an unknown forecast."""

    variable: str
    lead_hours: int
    forecast: str
    wavenumber: int
    energy: float

    def __post_init__(self) -> None:
        require_name(self.forecast, SPECTRA, "forecast")


def spectrum_rows(
    variable: str, lead_hours: int, forecast: str, energy: np.ndarray
) -> list[SpectrumRow]:
    """Energy [K] of wavenumbers 0 .. K-1 as lines of spectra.csv.  ValueError for an unknown forecast."""
    return [SpectrumRow(variable, lead_hours, forecast, k, float(e)) for k, e in enumerate(energy)]


def write_scores(path: "str | Path", rows: Iterable[Row]) -> None:
    """Writes scores.csv, whole or not at all; numbers with 6 significant digits.

    Raises:
        ValueError: two rows are of the same variable, lead and forecast."""
    _write(path, Row, rows)


def read_scores(path: "str | Path") -> list[Row]:
    """What ``write_scores`` wrote.

    Raises:
        ValueError: it is no such file; names it and the line.
        OSError: it cannot be read."""
    return _read(path, Row)


def write_spectra(path: "str | Path", rows: Iterable[SpectrumRow]) -> None:
    """Writes spectra.csv, whole or not at all; numbers with 6 significant digits.

    Raises:
        ValueError: two rows are of the same variable, lead, forecast and wavenumber."""
    _write(path, SpectrumRow, rows)


def read_spectra(path: "str | Path") -> list[SpectrumRow]:
    """What ``write_spectra`` wrote.

    Raises:
        ValueError: it is no such file; names it and the line.
        OSError: it cannot be read."""
    return _read(path, SpectrumRow)


R = TypeVar("R", Row, SpectrumRow)


def _write(path: "str | Path", kind: type[R], rows: Iterable[R]) -> None:
    rows = list(rows)
    _expect_once(rows)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = [f.name for f in fields(kind)]
    table.writerow(names)
    table.writerows([_cell(getattr(row, name)) for name in names] for row in rows)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue(), replace=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{DIGITS}g}"
    return str(value)


def _read(path: "str | Path", kind: type[R]) -> list[R]:
    columns = fields(kind)
    made_of: dict[Any, Any] = {str: str, int: int, float: lambda cell: float(cell or "nan")}
    with open(path, newline="", encoding="utf-8") as f:
        lines = csv.reader(f)
        rows: list[R] = []
        try:
            header = next(lines, [])
            if header != [c.name for c in columns]:
                raise ValueError(f"its columns must be {','.join(c.name for c in columns)}")
            for cells in lines:
                if len(cells) != len(columns):
                    raise ValueError(f"it has {len(cells)} cells, not {len(columns)}")
                rows.append(
                    kind(*(made_of[c.type](cell) for c, cell in zip(columns, cells, strict=True)))
                )
            _expect_once(rows)
        except (ValueError, csv.Error) as e:
            raise ValueError(
                f"{path} line {max(1, lines.line_num)}: {e}; mend the file or write it again."
            ) from None
    return rows


def _expect_once(rows: Sequence[Any]) -> None:
    seen = set()
    for row in rows:
        key = (row.variable, row.lead_hours, row.forecast, getattr(row, "wavenumber", None))
        if key in seen:
            raise ValueError(
                f"rows hold {row.variable}, {row.lead_hours} h, {row.forecast} twice; keep one of them"
            )
        seen.add(key)


# ---- what a person sees


def table(rows: Iterable[Row], model: str = "model") -> str:
    """RMSE and then ACC for a terminal, at most 100 columns wide: a line for each variable and lead, a column for
    `model` (one of MODELS) and each simple forecast that has the score at all.  The least RMSE of a line is marked with *.
    Names that are too long lose their middle."""
    kinds = (model, *(f for f in FORECASTS if f not in MODELS))
    found = {(r.variable, r.lead_hours, r.forecast): r for r in rows if r.forecast in kinds}
    columns = [
        (score, forecast, size)
        for score, size in (("rmse", 11), ("acc", 9))
        for forecast in kinds
        if any(r.forecast == forecast and not math.isnan(getattr(r, score)) for r in found.values())
    ]
    room = COLUMNS - 7 - sum(size for *_, size in columns)
    labels = {r.variable: _label(r.variable, r.units, room) for r in found.values()}
    width = max([len("variable"), *map(len, labels.values())])

    def line(first: str, second: str, cells: Iterable[str]) -> str:
        numbers = "".join(
            f"{cell:>{size}}" for cell, (*_, size) in zip(cells, columns, strict=True)
        )
        return f"{first:<{width}}{second:>7}{numbers}".rstrip()

    scores = [score for score, *_ in columns]
    titles = [
        score.upper() + _space(score) if score not in scores[:i] else ""
        for i, score in enumerate(scores)
    ]
    lines = [
        line("", "", titles),
        line("variable", "lead", [COLUMN_OF.get(f, f) + _space(score) for score, f, _ in columns]),
    ]
    for variable, hours in dict.fromkeys((r.variable, r.lead_hours) for r in found.values()):
        here = {f: found[variable, hours, f] for f in kinds if (variable, hours, f) in found}
        least = min((r.rmse for r in here.values() if not math.isnan(r.rmse)), default=None)
        lines.append(
            line(
                labels[variable],
                f"{hours} h",
                [_number(here.get(f), score, least) for score, f, _ in columns],
            )
        )
    return "\n".join(
        [
            *lines,
            "* least RMSE; persist.: persistence, climat.: climatology, damped: damped anomaly",
        ]
    )


def _number(row: "Row | None", score: str, least: "float | None") -> str:
    value = math.nan if row is None else getattr(row, score)
    if math.isnan(value):
        return "-" + _space(score)
    return f"{value:.4g}" + ("*" if value == least else " ") if score == "rmse" else f"{value:.4f}"


def _space(score: str) -> str:
    """Below the marks."""
    return " " if score == "rmse" else ""


def _label(variable: str, units: str, room: int) -> str:
    label = f"{variable} ({units})" if units else variable
    if len(label) > room:
        label = variable
    return (
        label if len(label) <= room else label[: room - room // 2 - 1] + "…" + label[-(room // 2) :]
    )
