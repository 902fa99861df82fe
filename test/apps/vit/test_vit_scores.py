"""Scores of forecasts and their files.

Scores are compared with xarray's own weighted means, closed forms, and known figures of the ERA5
sample.

python -m pytest test/apps/vit/test_vit_scores.py
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from helpers.paths import ROOT

from apps.vit.scores import (
    FORECASTS,
    Score,
    ScoreRow,
    SpectrumRow,
    damped_anomaly,
    latitude_weights,
    persistence,
    read_rows,
    spectrum,
    spectrum_rows,
    table,
    write_rows,
    zonal_wavelength,
)

ERA5 = ROOT.parent / "shared" / "data" / "era5_t2m_uk_2019-03.nc"
LAT = np.linspace(80, -60, 8)
LON = np.arange(12) * 30.0


def fields(n=9, channels=2, seed=0):
    """forecast, truth, climatology: [n, C, 8, 12] float32, one channel far from 0."""
    rng = np.random.default_rng(seed)
    truth = (
        rng.normal(size=(n, channels, 8, 12)).cumsum(-1)
        + np.array([280.0, 0.0])[:channels, None, None]
    )
    forecast = truth + rng.normal(size=truth.shape) + 0.2
    climatology = np.broadcast_to(truth.mean(0), truth.shape)
    return tuple(x.astype(np.float32) for x in (forecast, truth, climatology))


def scored(*xs, lat=LAT):
    score = Score([f"c{i}" for i in range(xs[0].shape[1])], [6], lat)
    score.add(0, *xs)
    return score


def labelled(x):
    return xr.DataArray(
        x.astype("f8"), dims=("time", "channel", "lat", "lon"), coords={"lat": LAT, "lon": LON}
    )


# ---- scores


@pytest.mark.fast
def test_scores_are_those_of_xarray():
    f, o, c = map(labelled, fields())
    weights = np.cos(np.deg2rad(f.lat))

    def mean(x, *more):
        return x.weighted(weights).mean(["lat", "lon", *more])

    score = scored(*fields())
    squares = (f - o) ** 2
    np.testing.assert_allclose(score.rmse[0], np.sqrt(mean(squares, "time")), rtol=1e-12)
    np.testing.assert_allclose(
        score.rmse_mean_of_roots[0], np.sqrt(mean(squares)).mean("time"), rtol=1e-12
    )
    np.testing.assert_allclose(score.bias[0], mean(f - o, "time"), rtol=1e-10)
    acc = mean((f - c) * (o - c)) / np.sqrt(mean((f - c) ** 2) * mean((o - c) ** 2))
    np.testing.assert_allclose(score.acc[0], acc.mean("time"), rtol=1e-12)
    assert score.times.tolist() == [9]
    assert (score.rmse_mean_of_roots < score.rmse).all()


@pytest.mark.fast
def test_a_constant_offset_is_the_rmse_and_the_bias():
    _, o, c = fields()
    o = o.astype("f8")
    score = scored(o - 1.5, o, c)
    for result, expected in (
        (score.rmse, 1.5),
        (score.rmse_mean_of_roots, 1.5),
        (score.bias, -1.5),
    ):
        np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.fast
def test_anomaly_correlation_of_the_truth_its_opposite_and_the_climatology():
    _, o, c = (x.astype("f8") for x in fields())
    np.testing.assert_allclose(scored(o, o, c).acc, 1, rtol=1e-14)
    np.testing.assert_allclose(scored(2 * c - o, o, c).acc, -1, rtol=1e-14)
    np.testing.assert_allclose(
        scored(c + 0.1 * (o - c), o, c).acc, 1, rtol=1e-12
    )  # of the pattern, not of its size
    assert np.isnan(scored(c, o, c).acc).all()
    assert np.isfinite(scored(c, o, c).rmse).all()


@pytest.mark.fast
def test_errors_count_by_the_cosine_of_their_latitude():
    lat = np.array([60.0, 0.0])
    zero, error = np.zeros((1, 1, 2, 4)), np.zeros((1, 1, 2, 4))
    error[..., 0, :] = 3.0  # weight 0.5 of 1.5
    assert scored(error, zero, zero, lat=lat).bias[0, 0] == pytest.approx(1.0)
    assert scored(error, zero, zero, lat=lat).rmse[0, 0] == pytest.approx(math.sqrt(3))


@pytest.mark.fast
def test_the_mean_over_times_comes_before_the_root():
    zero, error = np.zeros((2, 1, 8, 12)), np.zeros((2, 1, 8, 12))
    error[0], error[1] = 1.0, 7.0
    score = scored(error, zero, zero)
    assert score.rmse[0, 0] == pytest.approx(5.0)  # sqrt((1 + 49) / 2)
    assert score.rmse_mean_of_roots[0, 0] == pytest.approx(4.0)


@pytest.mark.fast
def test_pieces_and_merged_scores_are_those_of_all_at_once():
    xs = fields()
    whole, pieces, parts = (Score(["a", "b"], [6, 12], LAT) for _ in range(3))
    other = Score(["a", "b"], [6, 12], LAT)
    whole.add(1, *xs)
    for at in (slice(0, 1), slice(1, 5), slice(5, 9)):
        pieces.add(1, *(x[at] for x in xs))
    assert np.array_equal(pieces.sums, whole.sums)  # to the bit
    parts.add(1, *(x[:4] for x in xs))
    other.add(1, *(x[4:] for x in xs))
    added = parts.sums + other.sums  # what an all-reduce makes of them
    parts.merge(other)
    assert np.array_equal(parts.sums, added)
    for name in ("rmse", "rmse_mean_of_roots", "bias", "acc"):
        np.testing.assert_allclose(getattr(parts, name)[1], getattr(whole, name)[1], rtol=1e-13)
        assert np.isnan(getattr(parts, name)[0]).all()  # nothing of this lead was added
    assert parts.times.tolist() == [0, 9]


@pytest.mark.fast
def test_sums_that_are_set_in_place_are_the_scores():
    first, second = scored(*fields(seed=1)), scored(*fields(seed=2))
    both = [np.concatenate(pair) for pair in zip(fields(seed=1), fields(seed=2), strict=True)]
    first.sums[:] = first.sums + second.sums
    np.testing.assert_allclose(first.rmse, scored(*both).rmse, rtol=1e-13)
    assert first.sums.flags["C_CONTIGUOUS"]
    assert first.sums.dtype == np.float64 and first.sums.ndim == 1


@pytest.mark.fast
def test_sums_are_float64_of_float32_fields():
    big = np.full((1, 1, 8, 12), 1e5, np.float32)
    off = big.copy()
    off[..., 0] = np.nextafter(np.float32(1e5), np.float32(2e5))
    assert scored(off, big, big).bias[0, 0] == pytest.approx(
        2.0**-7 / 12, rel=1e-12
    )  # float32 steps by 2^-7 there


@pytest.mark.fast
def test_a_forecast_that_is_not_finite_shows():
    f, o, c = fields()
    f[3, 1, 2, 2] = np.nan
    assert np.isfinite(scored(f, o, c).rmse[0, 0]) and np.isnan(scored(f, o, c).rmse[0, 1])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(lead_index=1), "lead_index=1"),
        (dict(lead_index=-1), "lead_index=-1"),
        (dict(forecast=np.zeros((9, 2, 8, 11))), r"truth has shape \[9, 2, 8, 12\]"),
        (dict(truth=np.zeros((8, 2, 8, 12))), r"truth has shape \[8, 2, 8, 12\]"),
        (dict(climatology=np.zeros((2, 8, 12))), r"climatology has shape \[2, 8, 12\]"),
        (dict(climatology=np.full((9, 2, 8, 12), np.nan)), "climatology holds nan"),
    ],
)
def test_fields_that_do_not_fit_are_named(wrong, message):
    f, o, c = fields()
    with pytest.raises(ValueError, match=message):
        Score(["a", "b"], [6], LAT).add(
            **(dict(lead_index=0, forecast=f, truth=o, climatology=c) | wrong)
        )


@pytest.mark.fast
def test_scores_that_make_no_sense_are_refused():
    for channels, leads, lat, named in (
        ([], [6], LAT, "channels"),
        (["a", "a"], [6], LAT, "channels"),
        (["a"], [6, 6], LAT, "leads"),
        (["a"], [6], [[0.0]], "lat"),
        (["a"], [6], [91.0], "lat"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            Score(channels, leads, lat)
    for other in (
        Score(["b"], [6], LAT),
        Score(["a"], [12], LAT),
        Score(["a"], [6], LAT[::-1]),
        Score(["a"], [6], LAT[1:]),
    ):
        with pytest.raises(ValueError, match="differ"):
            Score(["a"], [6], LAT).merge(other)


@pytest.mark.fast
def test_weights_of_all_rows_are_1_and_poles_have_none():
    weights = latitude_weights(np.array([90.0, 60.0, 0.0, -90.0]))
    np.testing.assert_allclose(weights, [0, 1 / 3, 2 / 3, 0], atol=1e-15)


@pytest.mark.fast
@pytest.mark.skipif(not ERA5.exists(), reason=f"{ERA5.name} is not in shared/data")
def test_the_known_scores_of_era5():
    """2 m temperature over the British Isles, from an independent evaluation, to 3 decimals."""
    with xr.open_dataset(ERA5) as record:
        x, lat, hour = record.t2m.load().astype("f8"), record.latitude.values, record.time.dt.hour
    climatology = x[:504].groupby("time.hour").mean().sel(hour=hour).values[:, None]
    x = x.values[:, None]
    anomaly = (x - climatology)[:504]
    leads, valid = [1, 3, 6], np.arange(576, 744)
    scores = {f: Score(["t2m"], leads, lat) for f in FORECASTS[1:4]}
    for i, lead in enumerate(leads):
        start = valid - lead
        r = np.array([(anomaly[:-lead] * anomaly[lead:]).sum() / (anomaly[:-lead] ** 2).sum()])
        for name, forecast in (
            ("persistence", persistence(x[start])),
            ("climatology", climatology[valid]),
            ("damped anomaly", damped_anomaly(x[start], climatology[start], climatology[valid], r)),
        ):
            scores[name].add(i, forecast, x[valid], climatology[valid])
    known = {
        "persistence": [0.576, 1.557, 2.683],
        "climatology": [1.839] * 3,
        "damped anomaly": [0.432, 1.062, 1.648],
    }
    for name, expected in known.items():
        np.testing.assert_allclose(scores[name].rmse[:, 0], expected, atol=6e-4)


# ---- spectra


@pytest.mark.fast
@pytest.mark.parametrize("width", [12, 13])
def test_energies_add_up_to_the_mean_of_squares(width):
    x = np.random.default_rng(0).normal(size=(3, 2, 8, width)) + 5
    numbers, energy = spectrum(x, LAT)
    assert numbers.tolist() == list(range(width // 2 + 1)) and energy.shape == (
        3,
        2,
        width // 2 + 1,
    )
    np.testing.assert_allclose(energy.sum(-1), (x**2).mean(-1) @ latitude_weights(LAT), rtol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("k", "part"), [(0, 1.0), (1, 0.5), (3, 0.5), (6, 1.0)]
)  # at 6 of 12 points cos is 1, -1, 1, ...
def test_a_wave_has_its_energy_at_its_wavenumber(k, part):
    _, energy = spectrum(np.tile(3 * np.cos(np.deg2rad(k * LON)), (8, 1)), LAT)
    np.testing.assert_allclose(energy, np.where(np.arange(7) == k, 9 * part, 0), atol=1e-12)


@pytest.mark.fast
def test_a_band_leaves_the_other_rows_out():
    x = np.zeros((8, 12))
    x[(LAT >= 20) & (LAT <= 60)] = np.cos(np.deg2rad(2 * LON))
    assert spectrum(x, LAT, band=(20, 60))[1][2] == pytest.approx(0.5)
    assert spectrum(x, LAT)[1][2] == pytest.approx(0.5 * latitude_weights(LAT)[1:4].sum())
    assert spectrum(x, LAT, band=(-30, 0))[1] == pytest.approx(np.zeros(7))
    for band in ((60, 20), (81, 89)):
        with pytest.raises(ValueError, match=r"band=\("):
            spectrum(x, LAT, band=band)
    with pytest.raises(ValueError, match=r"field has shape \[8, 12\]"):
        spectrum(x, LAT[1:])


@pytest.mark.fast
def test_wavelengths_in_km():
    np.testing.assert_allclose(
        zonal_wavelength(np.array([0, 1, 2])), [np.inf, 40030.17, 20015.09], rtol=1e-6
    )
    assert zonal_wavelength(np.array(4), 60.0) == pytest.approx(40030.17 / 8, rel=1e-6)


# ---- forecasts that need no model


@pytest.mark.fast
def test_the_anomaly_decays_by_channel_or_by_point():
    x0, c0, c1 = fields()
    assert persistence(x0) is x0
    r = np.array([0.5, 0.0])
    result = damped_anomaly(x0, c0, c1, r)
    np.testing.assert_allclose(result[:, 0], c1[:, 0] + 0.5 * (x0 - c0)[:, 0], rtol=1e-6)
    assert np.array_equal(result[:, 1], c1[:, 1])
    by_point = np.broadcast_to(r[:, None, None], (2, 8, 12))
    assert np.array_equal(damped_anomaly(x0, c0, c1, by_point), result)
    with pytest.raises(ValueError, match=r"r has shape \[3\]"):
        damped_anomaly(x0, c0, c1, np.zeros(3))


# ---- files


def rows(variables=("t2m", "z500"), leads=(6, 24)):
    made = []
    for v, variable in enumerate(variables):
        for lead in leads:
            for i, f in enumerate(FORECASTS):
                acc = math.nan if f == "climatology" else 0.9 - i / 10
                made.append(
                    ScoreRow(
                        variable, lead, f, (1 + v) * (1.23456789 + i), acc, -1e-7, 1.0, "K", 168
                    )
                )
    return made


@pytest.mark.fast
def test_scores_csv_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "scores.csv"
    write_rows(path, ScoreRow, rows())
    lines = path.read_text().splitlines()
    assert lines[0] == "variable,lead_hours,forecast,rmse,acc,bias,rmse_mean_of_roots,units,times"
    assert lines[1] == "t2m,6,model,1.23457,0.9,-1e-07,1,K,168"
    assert lines[3] == "t2m,6,climatology,3.23457,,-1e-07,1,K,168"
    back = read_rows(path, ScoreRow)
    assert len(back) == len(rows()) and back[0].times == 168 and math.isnan(back[2].acc)
    for a, b in zip(back, rows(), strict=True):
        assert (a.variable, a.lead_hours, a.forecast, a.units) == (
            b.variable,
            b.lead_hours,
            b.forecast,
            b.units,
        )
        assert a.rmse == pytest.approx(b.rmse, rel=5e-6)
    write_rows(path, ScoreRow, back)  # replaced
    assert path.read_text().splitlines() == lines
    assert [p.name for p in path.parent.iterdir()] == ["scores.csv"]


@pytest.mark.fast
def test_rows_of_a_score():
    score = Score(["a", "b"], [6, 12], LAT)
    score.add(0, *fields())
    result = score.rows("model", {"a": "K", "b": ""})
    assert [(r.variable, r.lead_hours, r.units, r.times) for r in result] == [
        ("a", 6, "K", 9), ("a", 12, "K", 0), ("b", 6, "", 9), ("b", 12, "", 0),
    ]  # fmt: skip
    assert (
        result[2].rmse == score.rmse[0, 1]
        and result[2].acc == score.acc[0, 1]
        and math.isnan(result[3].bias)
    )
    assert result[0].rmse_mean_of_roots == score.rmse_mean_of_roots[0, 0]
    with pytest.raises(ValueError, match="'b'"):
        score.rows("model", {"a": "K"})
    with pytest.raises(ValueError, match=r"forecast='modell' is unknown\. Did you mean 'model'"):
        score.rows("modell", {"a": "K", "b": "K"})


@pytest.mark.fast
def test_spectra_csv_is_read_as_it_was_written(tmp_path):
    made = [
        r
        for f in ("truth", "model")
        for r in spectrum_rows("u", 6, f, np.array([1.0, 0.123456789]))
    ]
    write_rows(tmp_path / "spectra.csv", SpectrumRow, made)
    assert (tmp_path / "spectra.csv").read_text().splitlines()[:3] == [
        "variable,lead_hours,forecast,wavenumber,energy", "u,6,truth,0,1", "u,6,truth,1,0.123457",
    ]  # fmt: skip
    assert [r.wavenumber for r in read_rows(tmp_path / "spectra.csv", SpectrumRow)] == [0, 1, 0, 1]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("t2m,6,model,1,1,1,1,K", "line 2: it has 8 cells, not 9"),
        ("t2m,six,model,1,1,1,1,K,5", "line 2: .*'six'"),
        ("t2m,6,oracle,1,1,1,1,K,5", "line 2: forecast='oracle'"),
        ("t2m,6,model,1,1,1,1,K,5\nt2m,6,model,1,1,1,1,K,5", "t2m, 6 h, model twice"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message):
    path = tmp_path / "scores.csv"
    write_rows(path, ScoreRow, [])
    with open(path, "a") as f:
        f.write(line + "\n")
    with pytest.raises(ValueError, match=f"scores.csv .*{message}"):
        read_rows(path, ScoreRow)


@pytest.mark.fast
def test_other_files_are_no_scores(tmp_path):
    for text in ("", "a,b\n"):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=r"x\.csv line 1: its columns must be variable,"):
            read_rows(tmp_path / "x.csv", ScoreRow)
    with pytest.raises(ValueError, match="twice"):
        write_rows(tmp_path / "y.csv", ScoreRow, [rows()[0], rows()[0]])
    assert not (tmp_path / "y.csv").exists()


# ---- for a terminal


@pytest.mark.fast
def test_the_table_marks_the_best_and_has_one_line_per_lead():
    lines = table(rows()).splitlines()
    assert len(lines) == 2 + 4 + 1
    assert lines[2].split() == [
        "t2m",
        "(K)",
        "6",
        "h",
        "1.235*",
        "2.235",
        "3.235",
        "4.235",
        "0.9000",
        "0.8000",
        "0.6000",
    ]
    assert lines[1].split() == [
        "variable",
        "lead",
        "model",
        "persist.",
        "climat.",
        "damped",
        "model",
        "persist.",
        "damped",
    ]
    worse = [ScoreRow(**vars(r) | {"rmse": 9.0}) if r.forecast == "model" else r for r in rows()]
    assert table(worse).splitlines()[2].split()[4:6] == ["9", "2.235*"]


@pytest.mark.fast
@pytest.mark.parametrize("acc", [math.nan, -0.5])
def test_the_table_is_at_most_100_columns_wide(acc):
    long = rows(("10m_u_component_of_wind_at_the_surface", "specific_humidity1000"), (6, 240))
    long = [
        ScoreRow(
            **vars(r)
            | {"rmse": r.rmse * 1.234e-6, "acc": acc if r.forecast == "climatology" else -0.5}
        )
        for r in long
    ]
    lines = table(long).splitlines()
    assert 80 < max(map(len, lines)) <= 100
    assert lines[2].startswith("10m_u") and "…" in lines[2] and "rface" in lines[2]
    assert len({line.index(" h ") for line in lines[2:6]}) == 1


@pytest.mark.fast
def test_missing_forecasts_have_no_column_and_missing_scores_no_number():
    some = [
        r
        for r in rows()
        if r.forecast != "damped anomaly" and (r.forecast, r.lead_hours) != ("model", 24)
    ]
    lines = table(some).splitlines()
    assert "damped" not in lines[1]
    assert lines[3].split() == ["t2m", "(K)", "24", "h", "-", "2.235*", "3.235", "-", "0.8000"]


def test_importing_scores_needs_no_matplotlib():
    code = "import sys, apps.vit.scores; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
