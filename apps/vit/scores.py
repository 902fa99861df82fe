"""How forecasts of gridded fields are scored, and the tables that hold the scores.

RMSE, anomaly correlation, bias and zonal spectra are defined as in WeatherBench 2 (Rasp et al.
2024, arXiv 2308.15560), with one difference: rows of the grid count by the cosine of their
latitude, as in WeatherBench 1.  WeatherBench 2 takes the exact areas of the cells between the
poles.  On an even grid the two differ in the first and last row alone; on a regional one only the
cosine makes sense.

scores.csv has a line for each variable, lead and forecast; spectra.csv one for each of their
wavenumbers.  Where a score does not exist (nan), its cell is empty.
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
COLUMN_OF = {  # a table's columns by forecast
    "model": "model",
    "persistence": "persist.",
    "climatology": "climat.",
    "damped anomaly": "damped",
}
# The parts of `Score.sums`: of each time 1, its mean square error, the root of that, its mean
# error, and its anomaly correlation.
SUMS = ("times", "square", "root", "error", "correlation")


# ---- scores


class Score:
    """Adds up, time by time, what the scores of a forecast need.

    All sums are float64, and nothing else is kept.  Ranks that scored different times add their
    `sums`, for example with ``dist.all_reduce(torch.from_numpy(score.sums))``, and then have the
    scores of all times.

    Args:
        channels: names of the C fields.
        leads: the L lead times in hours.
        lat: [H] degrees north, in the order of the fields' rows.

    Attributes:
        sums: [len(SUMS) * L * C] float64, flat.  Changed in place, the scores follow.

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
        self.sums = np.zeros(len(SUMS) * len(self.leads) * len(self.channels))

    def add(
        self, lead_index: int, forecast: np.ndarray, truth: np.ndarray, climatology: np.ndarray
    ) -> None:
        """Scores forecasts of n times.

        Each time is scored by itself, so that it does not matter how many come at once.

        Args:
            lead_index: which of the leads they are for, 0 .. L-1.
            forecast, truth, climatology: [n, C, H, W], all at the valid times, in the same units.
                A forecast with nan or inf in it has such scores.

        Raises:
            ValueError: a lead_index or shapes that do not fit, or a truth or climatology that is
                not finite; names it."""
        if not 0 <= lead_index < len(self.leads):
            raise ValueError(
                f"lead_index={lead_index} is none of the {len(self.leads)} leads; the first is 0."
            )
        forecast = np.asarray(forecast)
        truth = np.asarray(truth)
        climatology = np.asarray(climatology)
        self._expect_fields(forecast, truth, climatology)
        sums = self._parts()[:, lead_index]
        for fields_of_time in zip(forecast, truth, climatology, strict=True):
            in_float64 = [values.astype(np.float64) for values in fields_of_time]
            sums += self._of_one_time(*in_float64)

    def merge(self, other: "Score") -> None:
        """Adds what `other` has seen.

        Raises:
            ValueError: it is of other channels, leads or latitudes."""
        for name in ("channels", "leads", "lat"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise ValueError(
                    f"other.{name} differ from these {name}; merge scores of the same fields on "
                    "the same grid."
                )
        self.sums += other.sums

    @property
    def times(self) -> np.ndarray:
        """[L] int: how many times were added."""
        return self._sums_of("times")[:, 0].round().astype(int)

    @property
    def rmse(self) -> np.ndarray:
        """[L, C], in the fields' units: sqrt(1/T sum_t sum_ij w_i (f - o)^2), weights w of sum 1.

        The mean over all times and points comes *before* the root: WeatherBench 2's RMSE, and
        WMO's.  nan where no time was added."""
        return np.sqrt(self._mean("square"))

    @property
    def rmse_mean_of_roots(self) -> np.ndarray:
        """[L, C], in the fields' units: 1/T sum_t sqrt(sum_ij w_i (f - o)^2).

        The root comes before the mean over times: WeatherBench 1's RMSE (Rasp et al. 2020).  Never
        above `rmse`."""
        return self._mean("root")

    @property
    def bias(self) -> np.ndarray:
        """[L, C], in the fields' units: 1/T sum_t sum_ij w_i (f - o), forecast minus truth."""
        return self._mean("error")

    @property
    def acc(self) -> np.ndarray:
        """[L, C] in -1 .. 1: anomaly correlation, as in WeatherBench 2.

        It is uncentred, of each time by itself, and then averaged over times:

            1/T sum_t  sum_ij w_i f' o' / sqrt(sum_ij w_i f'^2  sum_ij w_i o'^2)

        with f' = f - c, o' = o - c, and c the climatology.  Not done here: to centre the anomalies,
        i.e. to take their spatial mean off first (WMO-No. 485; Murphy and Epstein 1989, Mon. Wea.
        Rev. 117), or to pool all times in one correlation.  nan (0/0) where a forecast equals the
        climatology."""
        return self._mean("correlation")

    def rows(self, forecast: str, units: Mapping[str, str]) -> "list[ScoreRow]":
        """The scores as lines of scores.csv, by channel and then lead.

        Args:
            forecast: one of FORECASTS.
            units: of each channel.

        Raises:
            ValueError: an unknown forecast, or a channel without units; names it."""
        for channel in self.channels:
            if channel not in units:
                raise ValueError(f"units lack channel {channel!r}; give '' where it has none.")
        rmse, acc, bias, roots = self.rmse, self.acc, self.bias, self.rmse_mean_of_roots
        times = self.times
        rows = []
        for channel_index, channel in enumerate(self.channels):
            for lead_index, hours in enumerate(self.leads):
                index = lead_index, channel_index
                row = ScoreRow(
                    variable=channel,
                    lead_hours=hours,
                    forecast=forecast,
                    rmse=float(rmse[index]),
                    acc=float(acc[index]),
                    bias=float(bias[index]),
                    rmse_mean_of_roots=float(roots[index]),
                    units=units[channel],
                    times=int(times[lead_index]),
                )
                rows.append(row)
        return rows

    def _parts(self) -> np.ndarray:
        """[len(SUMS), L, C]: a view of the sums."""
        return self.sums.reshape(len(SUMS), len(self.leads), len(self.channels))

    def _sums_of(self, name: str) -> np.ndarray:
        """[L, C]: one of SUMS."""
        return self._parts()[SUMS.index(name)]

    def _mean(self, name: str) -> np.ndarray:
        """[L, C]: the mean over times of one of SUMS."""
        with np.errstate(invalid="ignore"):  # 0/0 where nothing was added
            return self._sums_of(name) / self._sums_of("times")

    def _of_one_time(
        self, forecast: np.ndarray, truth: np.ndarray, climatology: np.ndarray
    ) -> np.ndarray:
        """[len(SUMS), C] of fields [C, H, W] float64."""
        # Forecasts may not be finite, and 0/0 occurs in the correlation.
        with np.errstate(invalid="ignore", over="ignore"):
            error = forecast - truth
            square = self._average(error**2)
            forecast_anomaly = forecast - climatology
            true_anomaly = truth - climatology
            covariance = self._average(forecast_anomaly * true_anomaly)
            forecast_variance = self._average(forecast_anomaly * forecast_anomaly)
            true_variance = self._average(true_anomaly * true_anomaly)
            correlation = covariance / np.sqrt(forecast_variance * true_variance)
            times = np.ones(len(forecast))
            return np.stack([times, square, np.sqrt(square), self._average(error), correlation])

    def _average(self, x: np.ndarray) -> np.ndarray:
        """[C, H, W] -> [C]: the weighted mean over the points."""
        return x.mean(-1) @ self.weights

    def _expect_fields(
        self, forecast: np.ndarray, truth: np.ndarray, climatology: np.ndarray
    ) -> None:
        given = {"forecast": forecast, "truth": truth, "climatology": climatology}
        channels, height = len(self.channels), len(self.lat)
        for name, x in given.items():
            if x.ndim != 4 or x.shape[1:3] != (channels, height) or x.shape != forecast.shape:
                raise ValueError(
                    f"{name} has shape {list(x.shape)}; it must be [n, {channels}, {height}, W], "
                    "the same for forecast, truth and climatology."
                )
            if name != "forecast" and not np.isfinite(x).all():
                raise ValueError(
                    f"{name} holds nan or inf at {(~np.isfinite(x)).sum()} points; "
                    "score without such times or channels."
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
            f"lat has shape {list(lat.shape)} or values outside -90 .. 90; "
            "give the rows' latitudes in degrees, [H]."
        )
    cosines = np.cos(np.deg2rad(lat))
    return cosines / cosines.sum()


# ---- spectra


def spectrum(
    field: np.ndarray, lat: np.ndarray, band: tuple[float, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Zonal energy spectrum of fields on full circles of latitude.

    With F_k = 1/W sum_l f_l exp(-2 pi i k l / W) a row has the energy |F_k|^2 at wavenumber k,
    doubled where -k is another wavenumber than k.  The sum over k is then the mean of the squares
    along the circle (Parseval).  Rows are averaged by cos(latitude).  WeatherBench 2's
    ZonalEnergySpectrum is this times the circle's circumference, and doubles k = W/2 too.

    Args:
        field: [..., H, W].  The W columns must go once round the globe: a regional field has no
            such spectrum.
        lat: [H] degrees north.
        band: (south, north) in degrees: only the rows within, both included.  None: all.

    Returns:
        wavenumbers [W//2+1] (waves per circle), energy [..., W//2+1] float64 in the square of the
        field's units.

    Raises:
        ValueError: a field that does not fit the latitudes, or a band without rows; names it."""
    lat, field = np.asarray(lat, np.float64), np.asarray(field)
    weights = latitude_weights(lat)
    if field.ndim < 2 or field.shape[-2] != len(lat):
        raise ValueError(
            f"field has shape {list(field.shape)}; it must be [..., H, W] with H = {len(lat)}, "
            "as lat says."
        )
    if band is not None:
        south, north = band
        inside = (lat >= south) & (lat <= north)
        if not weights[inside].sum() > 0:
            raise ValueError(
                f"band={band} holds no row of {lat.min():g} .. {lat.max():g} degrees; "
                "give (south, north)."
            )
        field = field[..., inside, :]
        weights = weights[inside] / weights[inside].sum()
    width = field.shape[-1]
    wavenumbers = np.arange(width // 2 + 1)
    amplitude = np.fft.rfft(field.astype(np.float64), norm="forward")
    counted_once = (wavenumbers == 0) | (2 * wavenumbers == width)
    energy = np.where(counted_once, 1.0, 2.0) * np.abs(amplitude) ** 2
    return wavenumbers, np.einsum("...hk,h->...k", energy, weights)


def zonal_wavelength(wavenumbers: np.ndarray, latitude: float = 0.0) -> np.ndarray:
    """Wavelength in km of zonal wavenumbers on a circle of latitude: 2 pi R cos(latitude) / k.

    The Earth is a sphere of EARTH_RADIUS_KM.

    Args:
        wavenumbers: k; the wavelength is inf for k = 0.
        latitude: degrees."""
    circumference = 2 * np.pi * EARTH_RADIUS_KM * np.cos(np.deg2rad(latitude))
    with np.errstate(divide="ignore"):
        return circumference / np.asarray(wavenumbers, np.float64)


# ---- forecasts that need no model


def persistence(x0: np.ndarray) -> np.ndarray:
    """Nothing changes: the fields at the initial time, as they are."""
    return x0


def damped_anomaly(
    x0: np.ndarray, clim0: np.ndarray, clim_valid: np.ndarray, r: np.ndarray
) -> np.ndarray:
    """clim_valid + r (x0 - clim0): the initial anomaly decays, for each lead by its own r.

    Args:
        x0, clim0: [..., C, H, W] at the initial times.
        clim_valid: [..., C, H, W] at the valid times.
        r: [C] or [C, H, W], of the lead.

    Raises:
        ValueError: r of another shape."""
    r = np.asarray(r)
    shape = np.shape(x0)[-3:]
    if r.shape not in (shape[:1], shape):
        raise ValueError(
            f"r has shape {list(r.shape)}; it must be {list(shape[:1])} or {list(shape)}: "
            "one lead's."
        )
    if r.ndim == 1:
        r = r[:, None, None]
    return clim_valid + r * (x0 - clim0)


# ---- files


@dataclass(frozen=True)
class ScoreRow:
    """A line of scores.csv: one variable, lead and forecast, over `times` valid times.

    Raises:
        ValueError: an unknown forecast."""

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
    """A line of spectra.csv: the energy at one zonal wavenumber.

    Raises:
        ValueError: an unknown forecast."""

    variable: str
    lead_hours: int
    forecast: str
    wavenumber: int
    energy: float

    def __post_init__(self) -> None:
        require_name(self.forecast, SPECTRA, "forecast")


R = TypeVar("R", ScoreRow, SpectrumRow)


def spectrum_rows(
    variable: str, lead_hours: int, forecast: str, energy: np.ndarray
) -> list[SpectrumRow]:
    """Energy [K] of wavenumbers 0 .. K-1 as lines of spectra.csv.

    Raises:
        ValueError: an unknown forecast."""
    rows = []
    for wavenumber, of_wavenumber in enumerate(energy):
        row = SpectrumRow(variable, lead_hours, forecast, wavenumber, float(of_wavenumber))
        rows.append(row)
    return rows


def write_rows(path: str | Path, kind: type[R], rows: Iterable[R]) -> None:
    """Writes scores.csv or spectra.csv, whole or not at all; numbers with 6 significant digits.

    Args:
        path: the file; its folder is made.
        kind: ScoreRow for scores.csv, SpectrumRow for spectra.csv.
        rows: the lines.

    Raises:
        ValueError: two rows are of the same variable, lead, forecast and wavenumber."""
    rows = list(rows)
    _expect_once(rows)
    names = [field.name for field in fields(kind)]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(names)
    for row in rows:
        lines.writerow([_cell(getattr(row, name)) for name in names])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue(), replace=True)


def read_rows(path: str | Path, kind: type[R]) -> list[R]:
    """What ``write_rows`` wrote.

    Args:
        path: the file.
        kind: ScoreRow for scores.csv, SpectrumRow for spectra.csv.

    Raises:
        ValueError: it is no such file; names it and the line.
        OSError: it cannot be read."""
    names = [field.name for field in fields(kind)]
    with open(path, newline="", encoding="utf-8") as f:
        lines = csv.reader(f)
        rows: list[R] = []
        try:
            if next(lines, []) != names:
                raise ValueError(f"its columns must be {','.join(names)}")
            for cells in lines:
                rows.append(_row(kind, cells))
            _expect_once(rows)
        except (ValueError, csv.Error) as e:
            raise ValueError(
                f"{path} line {max(1, lines.line_num)}: {e}; mend the file or write it again."
            ) from None
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{DIGITS}g}"
    return str(value)


def _row(kind: type[R], cells: list[str]) -> R:
    """The row of a line's cells; ValueError where they do not fit."""
    columns = fields(kind)
    if len(cells) != len(columns):
        raise ValueError(f"it has {len(cells)} cells, not {len(columns)}")
    values: list[Any] = []
    for cell, column in zip(cells, columns, strict=True):
        if column.type is float:
            values.append(float(cell or "nan"))
        elif column.type is int:
            values.append(int(cell))
        else:
            values.append(cell)
    return kind(*values)


def _expect_once(rows: Sequence[ScoreRow] | Sequence[SpectrumRow]) -> None:
    seen = set()
    for row in rows:
        key = (row.variable, row.lead_hours, row.forecast, getattr(row, "wavenumber", None))
        if key in seen:
            raise ValueError(
                f"rows hold {row.variable}, {row.lead_hours} h, {row.forecast} twice; "
                "keep one of them"
            )
        seen.add(key)


# ---- for a terminal


@dataclass(frozen=True)
class _Column:
    """A column of the table: one score of one forecast."""

    score: str  # "rmse" or "acc"
    forecast: str

    @property
    def width(self) -> int:
        return 11 if self.score == "rmse" else 9

    @property
    def margin(self) -> str:
        """Below the mark of the least RMSE."""
        return " " if self.score == "rmse" else ""

    def cell(self, row: ScoreRow | None, least_rmse: float | None) -> str:
        """The score of a row, or "-" where there is none."""
        value = math.nan if row is None else getattr(row, self.score)
        if math.isnan(value):
            return "-" + self.margin
        if self.score == "acc":
            return f"{value:.4f}"
        mark = "*" if value == least_rmse else " "
        return f"{value:.4g}{mark}"


def table(rows: Iterable[ScoreRow], model: str = "model") -> str:
    """RMSE and then ACC for a terminal, at most 100 columns wide.

    There is a line for each variable and lead, and a column for each forecast that has the score
    at all.  The least RMSE of a line is marked with *.  Names that are too long lose their middle.

    Args:
        rows: the scores.
        model: which of MODELS is shown beside the simple forecasts."""
    forecasts = [model, *(name for name in FORECASTS if name not in MODELS)]
    shown = [row for row in rows if row.forecast in forecasts]
    columns = _columns(shown, forecasts)
    room = COLUMNS - 7 - sum(column.width for column in columns)
    labels = {row.variable: _label(row.variable, row.units, room) for row in shown}
    width = max([len("variable"), *map(len, labels.values())])

    def line(label: str, lead: str, cells: Iterable[str]) -> str:
        padded = [f"{cell:>{column.width}}" for cell, column in zip(cells, columns, strict=True)]
        return f"{label:<{width}}{lead:>7}{''.join(padded)}".rstrip()

    names = [COLUMN_OF.get(column.forecast, column.forecast) + column.margin for column in columns]
    lines = [line("", "", _titles(columns)), line("variable", "lead", names)]
    for (variable, hours), by_forecast in _by_line(shown).items():
        cells = _cells(columns, by_forecast)
        lines.append(line(labels[variable], f"{hours} h", cells))
    lines.append(
        "* least RMSE; persist.: persistence, climat.: climatology, damped: damped anomaly"
    )
    return "\n".join(lines)


def _columns(rows: Sequence[ScoreRow], forecasts: Sequence[str]) -> list[_Column]:
    """The scores that at least one row has."""
    columns = []
    for score in ("rmse", "acc"):
        for forecast in forecasts:
            values = [getattr(row, score) for row in rows if row.forecast == forecast]
            if not all(math.isnan(value) for value in values):
                columns.append(_Column(score, forecast))
    return columns


def _by_line(rows: Sequence[ScoreRow]) -> dict[tuple[str, int], dict[str, ScoreRow]]:
    """The rows by variable and lead, and then by forecast."""
    by_line: dict[tuple[str, int], dict[str, ScoreRow]] = {}
    for row in rows:
        by_line.setdefault((row.variable, row.lead_hours), {})[row.forecast] = row
    return by_line


def _cells(columns: Sequence[_Column], by_forecast: dict[str, ScoreRow]) -> list[str]:
    """The cells of a line of the table, the least RMSE marked."""
    errors = [row.rmse for row in by_forecast.values() if not math.isnan(row.rmse)]
    least_rmse = min(errors, default=None)
    return [column.cell(by_forecast.get(column.forecast), least_rmse) for column in columns]


def _titles(columns: Sequence[_Column]) -> list[str]:
    """The name of each score above the first of its columns."""
    titles = []
    previous = ""
    for column in columns:
        titles.append("" if column.score == previous else column.score.upper() + column.margin)
        previous = column.score
    return titles


def _label(variable: str, units: str, room: int) -> str:
    """The variable with its units, or without, or without its middle: what there is room for."""
    label = f"{variable} ({units})" if units else variable
    if len(label) <= room:
        return label
    if len(variable) <= room:
        return variable
    return variable[: room - room // 2 - 1] + "…" + variable[-(room // 2) :]
