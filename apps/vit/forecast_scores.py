"""Scores of a model's forecasts beside those of simple forecasts, added up over initial times and ranks."""

import numpy as np

from apps.vit import scores

from .data.samples import Samples


class ForecastScores:
    """Scores of a model's forecasts, of its roll-out and of the simple forecasts beside them.

    samples: with where="valid", of the model's leads; their statistics have all of `leads`, too."""

    def __init__(self, samples: Samples, leads: tuple[int, ...]):
        self.samples, self.leads = samples, leads
        f = samples.fields
        self.all = {name: scores.Score(f.channels, leads, f.grid.lat) for name in scores.FORECASTS}
        self.spectra: dict[
            tuple[str, int], np.ndarray
        ] = {}  # sums of energy [C, K], by forecast and lead
        self.counted: dict[tuple[str, int], int] = {}

    def add(self, name: str, lead: int, forecast: np.ndarray, t0s: np.ndarray) -> None:
        """Scores those of the forecasts [n, C, H, W] whose valid time lies in the part."""
        s = self.samples
        lag = lead // s.fields.step_hours
        counts = (t0s + lag >= s.split.start) & (t0s + lag < s.split.stop)
        if not counts.any():
            return
        t0s, forecast = t0s[counts], forecast[counts]
        truth, usual = s.fields.read(t0s + lag), s.statistics.climatology(s.fields.times[t0s + lag])
        self.all[name].add(self.leads.index(lead), forecast, truth, usual)
        if s.fields.grid.periodic and name in scores.SPECTRA and lead in s.leads:
            self._spectrum(name, lead, forecast)
            if name == "model":
                self._spectrum("truth", lead, truth)

    def add_simple(self, t0s: np.ndarray, leads: "tuple[int, ...] | None" = None) -> None:
        """Persistence, climatology and the damped anomaly from these initial times."""
        s = self.samples
        now = s.fields.read(t0s)
        usual = s.statistics.climatology(s.fields.times[t0s])
        for lead in leads or self.leads:
            valid = s.fields.times[t0s] + np.timedelta64(lead, "h")
            later = s.statistics.climatology(valid)
            damping = s.statistics.damping[s.statistics.lead_index(lead)]
            self.add("persistence", lead, scores.persistence(now), t0s)
            self.add("climatology", lead, later, t0s)
            self.add("damped anomaly", lead, scores.damped_anomaly(now, usual, later, damping), t0s)

    def rows(self) -> list[scores.Row]:
        units = self.samples.fields.units
        found = [
            row for name, score in self.all.items() for row in score.rows(name, units) if row.times
        ]
        return sorted(
            found, key=lambda r: (self.samples.fields.channels.index(r.variable), r.lead_hours)
        )

    def spectrum_rows(self) -> list[scores.SpectrumRow]:
        out = []
        for (name, lead), energy in self.spectra.items():
            for channel, mine in zip(
                self.samples.fields.channels, energy / self.counted[name, lead], strict=True
            ):
                out += scores.spectrum_rows(channel, lead, name, mine)
        return out

    def _spectrum(self, name: str, lead: int, field: np.ndarray) -> None:
        energy = scores.spectrum(field, self.samples.fields.grid.lat)[1].sum(0)
        self.spectra[name, lead] = self.spectra.get((name, lead), 0) + energy
        self.counted[name, lead] = self.counted.get((name, lead), 0) + len(field)

    def sums(self) -> tuple[dict, dict, dict]:
        """What has been added up; of ranks that scored other times, ``take`` adds it."""
        return {name: score.sums for name, score in self.all.items()}, self.spectra, self.counted

    def take(self, other: tuple[dict, dict, dict]) -> None:
        for name, sums in other[0].items():
            self.all[name].sums += sums
        for key, energy in other[1].items():
            self.spectra[key] = self.spectra.get(key, 0) + energy
            self.counted[key] = self.counted.get(key, 0) + other[2][key]
