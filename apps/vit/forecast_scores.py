"""Scores of a model's forecasts beside those of simple ones, added up over initial times and ranks.

Shapes: n initial times, C channels, fields of H x W points, K wavenumbers.  `t0s` are initial
times, as indices of the record's times.
"""

import numpy as np

from apps.vit import scores

from .data.samples import Samples

Sums = tuple[
    dict[str, np.ndarray], dict[tuple[str, int], np.ndarray], dict[tuple[str, int], int]
]  # of scores, by forecast; energies and numbers of spectra, by forecast and lead


class ForecastScores:
    """Scores and spectra of a model's forecasts, of its roll-out and of the simple forecasts.

    Args:
        samples: those of the part that is scored, with where="valid" and the model's leads.
        leads: hours, all that are scored; the statistics of `samples` have all of them."""

    def __init__(self, samples: Samples, leads: tuple[int, ...]):
        self.samples = samples
        self.leads = leads
        fields = samples.fields
        self._scores = {
            name: scores.Score(fields.channels, leads, fields.grid.lat) for name in scores.FORECASTS
        }
        self._energies: dict[tuple[str, int], np.ndarray] = {}  # sums [C, K], by forecast and lead
        self._spectra: dict[tuple[str, int], int] = {}  # how many spectra these sums are of

    def add(self, name: str, lead: int, forecasts: np.ndarray, t0s: np.ndarray) -> None:
        """Scores those of the forecasts [n, C, H, W] whose valid time lies in the part."""
        samples, fields = self.samples, self.samples.fields
        lag = lead // fields.step_hours
        in_part = (t0s + lag >= samples.split.start) & (t0s + lag < samples.split.stop)
        if not in_part.any():
            return
        valid = t0s[in_part] + lag
        forecasts = forecasts[in_part]
        truth = fields.read(valid)
        climatology = samples.statistics.climatology(fields.times[valid])
        self._scores[name].add(self.leads.index(lead), forecasts, truth, climatology)
        if fields.grid.periodic and name in scores.SPECTRA and lead in samples.leads:
            self._add_spectra(name, lead, forecasts)
            if name == "model":
                self._add_spectra("truth", lead, truth)

    def add_simple_forecasts(self, t0s: np.ndarray) -> None:
        """Scores persistence, climatology and the damped anomaly from these initial times."""
        fields, statistics = self.samples.fields, self.samples.statistics
        now = fields.read(t0s)
        climatology_now = statistics.climatology(fields.times[t0s])
        for lead in self.leads:
            climatology = statistics.climatology(fields.times[t0s] + np.timedelta64(lead, "h"))
            damping = statistics.damping[statistics.lead_index(lead)]
            damped = scores.damped_anomaly(now, climatology_now, climatology, damping)
            self.add("persistence", lead, scores.persistence(now), t0s)
            self.add("climatology", lead, climatology, t0s)
            self.add("damped anomaly", lead, damped, t0s)

    def rows(self) -> list[scores.ScoreRow]:
        """The scores of all forecasts that were added, by channel and lead."""
        channels, units = self.samples.fields.channels, self.samples.fields.units
        rows = []
        for name, score in self._scores.items():
            rows += [row for row in score.rows(name, units) if row.times]
        return sorted(rows, key=lambda row: (channels.index(row.variable), row.lead_hours))

    def spectrum_rows(self) -> list[scores.SpectrumRow]:
        """The mean spectra; none where the grid does not go around the globe."""
        rows = []
        for (name, lead), energies in self._energies.items():
            means = energies / self._spectra[name, lead]
            for channel, mean in zip(self.samples.fields.channels, means, strict=True):
                rows += scores.spectrum_rows(channel, lead, name, mean)
        return rows

    def _add_spectra(self, name: str, lead: int, fields: np.ndarray) -> None:
        energy = scores.spectrum(fields, self.samples.fields.grid.lat)[1].sum(0)
        self._add_energy((name, lead), energy, len(fields))

    def _add_energy(self, key: tuple[str, int], energy: np.ndarray, count: int) -> None:
        self._energies[key] = self._energies.get(key, 0) + energy
        self._spectra[key] = self._spectra.get(key, 0) + count

    def sums(self) -> Sums:
        """All that has been added up, for ``add_sums`` on another rank."""
        return (
            {name: score.sums for name, score in self._scores.items()},
            self._energies,
            self._spectra,
        )

    def add_sums(self, sums: Sums) -> None:
        """Adds the ``sums`` of a rank that scored other initial times."""
        scored, energies, spectra = sums
        for name, score_sums in scored.items():
            self._scores[name].sums += score_sums
        for key, energy in energies.items():
            self._add_energy(key, energy, spectra[key])
