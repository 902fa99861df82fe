"""apps/vit/predict.py: fields, scores and spectra equal formulas written here, on any ranks.

And files, figures, mistakes.

python -m pytest test/apps/vit/test_vit_predict.py
"""

import csv
import itertools
import json
import math
import shutil
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from helpers.ranks import run, world_of

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled"
    ),  # pytest undoes the filter of checkpoint.py
    pytest.mark.filterwarnings("ignore:Consolidated metadata"),
]
xr = pytest.importorskip("xarray")
netCDF4 = pytest.importorskip("netCDF4")

import ringx  # noqa: E402
from apps.common.checkpoint import MANIFEST  # noqa: E402
from apps.common.config import from_dict  # noqa: E402
from apps.vit import forecast_files, predict, scores, train  # noqa: E402
from apps.vit.config import Config  # noqa: E402
from apps.vit.data.dataset import open_fields, splits  # noqa: E402
from apps.vit.data.samples import INPUTS, Samples  # noqa: E402
from apps.vit.data.statistics import statistics  # noqa: E402
from apps.vit.model import ViT  # noqa: E402

CHANNELS, LEADS, HISTORY, ROLLOUT = ("t2m", "u10"), (6, 24), (6, 12), 48
TRAIN, TEST = slice(0, 168), range(204, 240)  # of 240 times: 70 %, and the last 15 %
SPACE = ("latitude", "longitude")
SIMPLE = ("persistence", "climatology", "damped anomaly")
HEADER = "variable,lead_hours,forecast,rmse,acc,bias,rmse_mean_of_roots,units,times"
DIGITS = 5e-6  # the most that 6 significant digits are off


def weather(times=240, lat=None, lon=None):
    """Two channels, 6-hourly: waves to the east and the west, a daily cycle, noise with memory."""
    lat = np.linspace(84.375, -84.375, 16) if lat is None else lat
    lon = np.arange(32) * 11.25 if lon is None else lon
    noise = np.random.default_rng(0).standard_normal((2, times, len(lat), len(lon)))
    for t in range(1, times):
        noise[:, t] += 0.7 * noise[:, t - 1]
    x, t = np.deg2rad(lon), 2 * np.pi * np.arange(times)[:, None, None]
    cosine = np.cos(np.deg2rad(lat))[:, None]
    t2m = 280 + 4 * cosine * np.sin(3 * x - t / 20) + 2 * np.cos(x + t / 4) + noise[0]
    u10 = 3 * cosine * np.cos(3 * x - t / 20) + np.sin(x + t / 28) + noise[1]
    dims = ("time", *SPACE)
    variables = {
        "t2m": (dims, t2m.astype("f4"), {"units": "K", "long_name": "2 metre temperature"}),
        "u10": (dims, u10.astype("f4"), {"units": "m s-1"}),
    }
    time = np.datetime64("2001-01-01", "ns") + np.arange(times) * np.timedelta64(6, "h")
    return xr.Dataset(variables, {"time": time, "latitude": lat, "longitude": lon})


def trained(out, data, *words):
    """A run of the trainer in `out`."""
    size = [
        "--layers",
        1,
        "--heads",
        4,
        "--warmup",
        2,
        "--val-every",
        0,
        "--no-tensorboard",
        "--device",
        "cpu",
    ]
    assert train.main([str(w) for w in ("--data", data, "--out", out, *size, *words)]) == 0
    return out


def forecast(run, out, *words):
    """Runs the command here; with --nproc, the ranks are processes."""
    assert (
        predict.main(
            [str(w) for w in ("--checkpoint", run, "--out", out, "--device", "cpu", *words)]
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def data(folder):
    weather().to_netcdf(folder / "weather.nc")
    return folder / "weather.nc"


@pytest.fixture(scope="module")
def trained_run(folder, data):
    """Trained on 2 tp ranks, in float64, with history and the damped anomaly as base.

    The patch does not divide the grid."""
    steps = [
        "--steps",
        24,
        "--save-every",
        12,
        "--global-batch",
        8,
        "--lr",
        "5e-3",
        "--dtype",
        "float64",
    ]
    task = ["--leads", "6,24", "--history", "6,12", "--base", "damped"]
    return trained(
        folder / "run",
        data,
        *task,
        "--dim",
        32,
        "--patch",
        3,
        *steps,
        "--nproc",
        2,
        "--cp",
        1,
        "--tp",
        2,
    )


class Rows(list):
    """What the command writes to scores.csv, before it is rounded to 6 digits."""

    def catch(self, patch):
        write = scores.write_rows

        def caught(path, kind, rows):
            if kind is scores.ScoreRow:
                self[:] = rows
            write(path, kind, rows)

        patch.setattr(scores, "write_rows", caught)
        return self


@pytest.fixture(scope="module")
def one(folder, trained_run):
    """(folder, rows) of one process: everything there is to ask for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cartopy", None)  # it would download
        rows = Rows().catch(patch)
        out = forecast(trained_run, folder / "one", "--rollout", ROLLOUT, "--save", 1000)
    return out, {(r.variable, r.lead_hours, r.forecast): r for r in rows}


def opened(out, kind="nc"):
    with xr.open_dataset(out / f"forecasts.{kind}", decode_timedelta=True) as dataset:
        return dataset.load()


def lines(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def parameters(checkpoint):
    """Of a checkpoint, read without this repository's code."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in stored.items()
        if k.startswith("model.")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return {k.removeprefix("model."): v for k, v in state.items()}


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class Oracle:
    """The model of a checkpoint in one piece, with torch's own attention."""

    def __init__(self, data, checkpoint):
        c = from_dict(Config, json.loads((checkpoint / "about.json").read_text())["config"])
        self.model, self.patches = ViT(c.model, sdpa).double().eval(), c.model.patch_grid()
        self.model.load_state_dict(parameters(checkpoint))
        self.fields = open_fields(data)
        parts = splits(self.fields)
        made = statistics(self.fields, parts["train"], sorted({*LEADS, *HISTORY}), cache=None)
        about = {
            "inputs": [name for name in INPUTS if name != "static"],
            "history": HISTORY,
            "base": "damped",
        }
        self.samples = Samples(self.fields, parts["test"], made, LEADS, where="valid", **about)
        assert (parts["train"].start, parts["train"].stop) == (0, 168) and range(
            parts["test"].start, parts["test"].stop
        ) == TEST

    def __call__(self, t0s, *seen):
        """[n, L, C, H, W] if that were the fields at t0s, 6 h before, and 12 h before."""
        x = self.patches.patchify(
            torch.from_numpy(self.samples.inputs_of(np.stack(seen, 1), t0s))
        ).double()
        with torch.no_grad():
            out = self.patches.unpatchify(self.model(x, torch.arange(self.patches.tokens)))
        prediction = out.unflatten(1, (len(LEADS), len(CHANNELS))).float().numpy()
        return self.samples.ahead_of(seen[0], t0s, prediction)

    def past(self, t0s):
        return [self.fields.read(t0s - k) for k in range(3)]

    def fed_back(self, t0s, times):
        """[n, C, H, W]: its forecast of the first lead, `times` times."""
        seen = self.past(t0s)
        for k in range(times):
            seen = [self(t0s + k, *seen)[:, 0], *seen[:2]]
        return seen[0]


@pytest.fixture(scope="module")
def oracle(data, trained_run):
    return Oracle(data, trained_run / "checkpoints" / "step-00000024")


@pytest.fixture(scope="module")
def record(data):
    with xr.open_dataset(data) as dataset:
        return dataset.load()


@pytest.fixture(scope="module")
def climatology(record):
    """At all times: the mean of the training times at that time of day."""
    mean = record.isel(time=TRAIN).astype("f8").groupby("time.hour").mean("time").astype("f4")
    return mean.sel(hour=record.time.dt.hour)


def start_times(lead):
    return np.array(TEST) - lead // 6


# ---- the fields


def test_fields_are_those_of_the_whole_model(one, oracle, record):
    got = opened(one[0])
    t0s = np.arange(TEST.start, TEST.stop - 4)  # 24 h later is in the record
    assert (got.time.values == record.time.values[t0s]).all() and dict(got.sizes) == {
        "time": 32, "lead_time": 2, "latitude": 16, "longitude": 32,
    }  # fmt: skip
    want = oracle(t0s, *oracle.past(t0s))
    for c, name in enumerate(CHANNELS):
        std = float(record[name].std())
        np.testing.assert_allclose(got[name].values, want[:, :, c], rtol=0, atol=1e-6 * std)
        assert np.abs(got[name] - record[name].values[t0s][:, None]).max() > std  # no persistence
        for i, lead in enumerate(LEADS):
            np.testing.assert_array_equal(
                got[f"{name}_truth"].values[:, i], record[name].values[t0s + lead // 6]
            )


@pytest.fixture(scope="module")
def eight(folder, trained_run):
    return forecast(
        trained_run,
        folder / "eight",
        "--nproc",
        8,
        "--cp",
        8,
        "--save",
        1000,
        "--rollout",
        24,
        "--batch",
        64,
        "--no-maps",
    )


# CI has four ranks on threads below; these are processes, which take long to start
@pytest.mark.slow
def test_eight_ranks_have_the_fields_and_scores_of_one(one, eight, record):
    """66 tokens over 8 processes; the checkpoint is of 2 tp ranks."""
    got, want = opened(eight), opened(one[0])
    for name in CHANNELS:
        np.testing.assert_allclose(
            got[name].values, want[name].values, rtol=0, atol=1e-5 * float(record[name].std())
        )
        np.testing.assert_array_equal(got[f"{name}_truth"].values, want[f"{name}_truth"].values)
    expect_same_lines(eight, one[0], leads=(6, 12, 18, 24))


def expect_same_lines(got, want, leads):
    """scores.csv of `got` is that of `want` at these leads, to the last digit or two."""
    wanted = [r for r in lines(want / "scores.csv") if int(r["lead_hours"]) in leads]
    found = lines(got / "scores.csv")
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        for key in ("rmse", "acc", "bias", "rmse_mean_of_roots"):
            x, y = (float(r.pop(key) or "nan") for r in (a, b))
            assert x == pytest.approx(y, rel=2 * DIGITS, abs=1e-9, nan_ok=True), (a, key)
        assert a == b


def test_times_shared_out_give_the_same_scores(one, folder, trained_run):
    out = forecast(
        trained_run,
        folder / "two",
        "--nproc",
        2,
        "--cp",
        1,
        "--rollout",
        ROLLOUT,
        "--no-maps",
        "--batch",
        5,
    )
    expect_same_lines(out, one[0], leads=range(6, ROLLOUT + 1, 6))
    assert len(lines(out / "spectra.csv")) == len(lines(one[0] / "spectra.csv"))
    for a, b in zip(lines(out / "spectra.csv"), lines(one[0] / "spectra.csv"), strict=True):
        assert (
            float(a.pop("energy")) == pytest.approx(float(b.pop("energy")), rel=2 * DIGITS)
            and a == b
        )
    whole, some = opened(one[0]), opened(out)
    assert some.sizes["time"] == 4  # spread evenly, from the first to the last
    assert (some.time.values == whole.time.values[[0, 10, 21, 31]]).all()
    xr.testing.assert_allclose(some, whole.sel(time=some.time), rtol=1e-6)


def test_cp_and_dp_together_score_as_one_to_all_digits(one, trained_run, tmp_path, monkeypatch):
    """On threads: their rows are seen before they are rounded."""
    rows = Rows().catch(monkeypatch)
    words = [
        "--checkpoint",
        str(trained_run),
        "--out",
        str(tmp_path),
        "--no-maps",
        "--device",
        "cpu",
        "--batch",
        "3",
    ]
    job = replace(predict.configure(predict.parser().parse_args(words)), cp=2)

    def work(rank):
        return predict.work(world_of(rank, 4), job)

    assert run(4, work) == [0] * 4
    wanted = [r for r in one[1].values() if r.lead_hours in LEADS and r.forecast != "roll-out"]
    assert [replace(r, rmse=0, acc=0, bias=0, rmse_mean_of_roots=0) for r in rows] == [
        replace(r, rmse=0, acc=0, bias=0, rmse_mean_of_roots=0) for r in wanted
    ]
    for got, want in zip(rows, wanted, strict=True):
        for key in ("rmse", "acc", "bias", "rmse_mean_of_roots"):
            assert getattr(got, key) == pytest.approx(
                getattr(want, key), rel=1e-8, abs=1e-9, nan_ok=True
            ), (want, key)


# ---- scores


def expected(record, climatology, name, lead, forecast):
    """rmse, acc, bias and mean of roots by xarray; `forecast` [36, H, W] for the test times."""
    truth, usual = (x[name].isel(time=TEST).astype("f8") for x in (record, climatology))
    made = truth.copy(data=np.asarray(forecast, "f8"))
    mean = lambda x: x.weighted(np.cos(np.deg2rad(x.latitude))).mean(SPACE)  # noqa: E731
    error, a, b = made - truth, made - usual, truth - usual
    correlation = mean(a * b) / np.sqrt(mean(a**2) * mean(b**2))
    return {
        "rmse": float(np.sqrt(mean(error**2).mean("time"))),
        "acc": float(correlation.mean("time", skipna=False)),
        "bias": float(mean(error).mean("time")),
        "rmse_mean_of_roots": float(np.sqrt(mean(error**2)).mean("time")),
    }


def simple(record, climatology, name, lead, kind):
    x, c, lag = record[name].values.astype("f8"), climatology[name].values.astype("f8"), lead // 6
    valid, start = np.array(TEST), start_times(lead)
    if kind == "persistence":
        return x[start]
    if kind == "climatology":
        return c[valid]
    a = (x - c)[TRAIN]
    r = (a[:-lag] * a[lag:]).sum() / (a[:-lag] ** 2).sum()
    return c[valid] + r * (x - c)[start]


def expect_row(row, want):
    assert row.times == 36 and row.units == {"t2m": "K", "u10": "m s-1"}[row.variable]
    for key, value in want.items():
        assert getattr(row, key) == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), (
            row,
            key,
        )


def test_scores_of_the_model_by_hand(one, oracle, record, climatology):
    for i, lead in enumerate(LEADS):
        t0s = start_times(
            lead
        )  # the first lie before the test times, the last behind those that are saved
        ahead = oracle(t0s, *oracle.past(t0s))[:, i]
        for c, name in enumerate(CHANNELS):
            expect_row(
                one[1][name, lead, "model"], expected(record, climatology, name, lead, ahead[:, c])
            )


@pytest.mark.parametrize("kind", SIMPLE)
def test_scores_of_simple_forecasts_by_hand(kind, one, record, climatology):
    for name, lead in itertools.product(CHANNELS, range(6, ROLLOUT + 1, 6)):
        made = simple(record, climatology, name, lead, kind)
        want = expected(record, climatology, name, lead, made)
        assert math.isnan(want["acc"]) == (kind == "climatology")
        expect_row(one[1][name, lead, kind], want)


def test_the_model_has_learnt_something(one):
    for name, lead in itertools.product(CHANNELS, LEADS):
        assert one[1][name, lead, "model"].rmse < 0.95 * min(
            one[1][name, lead, kind].rmse for kind in SIMPLE
        )


def test_the_file_of_scores(one):
    path = one[0] / "scores.csv"
    assert path.read_text().splitlines()[0] == HEADER
    rows = lines(path)
    wanted = [
        (name, str(lead), kind)
        for name in CHANNELS
        for lead in range(6, ROLLOUT + 1, 6)
        for kind in ("model", *SIMPLE, "roll-out")
        if kind != "model" or lead in LEADS
    ]
    assert [(r["variable"], r["lead_hours"], r["forecast"]) for r in rows] == wanted
    for r in rows:
        row = one[1][r["variable"], int(r["lead_hours"]), r["forecast"]]
        assert r["units"] == row.units and r["times"] == "36"
        assert (r["acc"] == "") == (r["forecast"] == "climatology")
        for key in ("rmse", "acc", "bias", "rmse_mean_of_roots"):
            assert r[key] == "" or float(r[key]) == pytest.approx(getattr(row, key), rel=DIGITS)


# ---- the roll-out


def test_a_roll_out_is_the_model_fed_with_its_forecasts(one, oracle, record, climatology):
    for k in range(1, ROLLOUT // 6 + 1):
        state = oracle.fed_back(start_times(6 * k), k)
        for c, name in enumerate(CHANNELS):
            expect_row(
                one[1][name, 6 * k, "roll-out"],
                expected(record, climatology, name, 6 * k, state[:, c]),
            )
    for name in CHANNELS:
        first, model = (one[1][name, 6, kind] for kind in ("roll-out", "model"))
        assert replace(first, forecast="model") == model
        assert one[1][name, 24, "roll-out"].rmse != pytest.approx(
            one[1][name, 24, "model"].rmse, rel=1e-4
        )


def test_the_second_step_of_a_roll_out_by_hand(one, oracle):
    """Its inputs are those of 6 h later, with the saved 6 h forecast as the fields."""
    saved, t0 = opened(one[0]).isel(time=[5], lead_time=0), np.array([TEST.start + 5])
    first = np.stack([saved[name].values for name in CHANNELS], 1)
    now, before, _ = oracle.past(t0)
    second = oracle(t0 + 1, first, now, before)[:, 0]
    np.testing.assert_allclose(oracle.fed_back(t0, 2), second, rtol=0, atol=1e-4)
    for wrong in (
        oracle(t0, first, now, before),
        oracle(t0 + 1, first, before, now),
        oracle(t0 + 1, now, before, first),
    ):
        assert np.abs(wrong[:, 0] - second).max() > 1e-2


# ---- spectra


def energies(out, forecast, name, lead):
    rows = [
        r
        for r in lines(out / "spectra.csv")
        if (r["variable"], r["forecast"], r["lead_hours"]) == (name, forecast, str(lead))
    ]
    assert [int(r["wavenumber"]) for r in rows] == list(range(17))
    return np.array([float(r["energy"]) for r in rows])


def energy_by_hand(x, record):
    """[17] of [n, H, W], 32 columns."""
    amplitude = np.fft.rfft(x.astype("f8")) / 32
    energy = np.abs(amplitude) ** 2
    energy[..., 1:16] *= 2  # -k, too
    return np.average(energy.mean(0), axis=0, weights=np.cos(np.deg2rad(record.latitude.values)))


def test_spectra_by_hand(one, oracle, record, climatology):
    for i, lead in enumerate(LEADS):
        t0s = start_times(lead)
        ahead = oracle(t0s, *oracle.past(t0s))[:, i]
        for c, name in enumerate(CHANNELS):
            truth = record[name].values[list(TEST)]
            made = {"truth": truth, "model": ahead[:, c], "persistence": record[name].values[t0s]}
            for forecast, x in made.items():
                np.testing.assert_allclose(
                    energies(one[0], forecast, name, lead), energy_by_hand(x, record), rtol=1e-5
                )
            squares = np.average(
                (truth.astype("f8") ** 2).mean((0, 2)),
                weights=np.cos(np.deg2rad(record.latitude.values)),
            )
            assert energies(one[0], "truth", name, lead).sum() == pytest.approx(
                squares, rel=1e-5
            )  # Parseval


# ---- the files


def test_netcdf_is_as_cf_wants_it(one):
    got = opened(one[0])
    assert (
        got.attrs["Conventions"] == "CF-1.11"
        and "weather.nc" in got.attrs["title"]
        and "step-00000024" in got.attrs["source"]
    )
    assert (got.valid_time == got.time + got.lead_time).all() and got.valid_time.dims == (
        "time",
        "lead_time",
    )
    assert (got.lead_time.values == np.array(LEADS, "timedelta64[h]")).all()
    names = {
        "time": "forecast_reference_time",
        "lead_time": "forecast_period",
        "valid_time": "time",
    }
    assert {k: v.attrs["standard_name"] for k, v in got.coords.items()} == names | {
        x: x for x in SPACE
    }
    with netCDF4.Dataset(one[0] / "forecasts.nc") as raw:
        units = {name: v.units for name, v in raw.variables.items()}
        assert units == {
            "t2m": "K",
            "t2m_truth": "K",
            "u10": "m s-1",
            "u10_truth": "m s-1",
            "latitude": "degrees_north",
            "longitude": "degrees_east",
            "time": "hours since 1970-01-01",
            "valid_time": "hours since 1970-01-01",
            "lead_time": "hours",
        }
        for name, v in raw.variables.items():
            if name in raw.dimensions:  # a coordinate: nothing missing, in order
                assert (
                    v.dimensions == (name,)
                    and "_FillValue" not in v.ncattrs()
                    and (np.diff(v[:]) != 0).all()
                )
                assert len(set(np.sign(np.diff(v[:])))) == 1
            elif name != "valid_time":
                assert (
                    v.dimensions == ("time", "lead_time", *SPACE)
                    and v.coordinates == "valid_time"
                    and v.dtype == "f4"
                )
        assert raw["time"].calendar == raw["valid_time"].calendar == "proleptic_gregorian"
        assert (
            raw["t2m"].long_name == "2 metre temperature, forecast"
            and raw["u10_truth"].long_name == "u10, as it was"
        )


def test_zarr_holds_the_same_bits_and_takes_the_place_of_netcdf(one, trained_run, tmp_path):
    pytest.importorskip("zarr", reason="zarr is not installed")
    (tmp_path / "forecasts.nc").touch()  # from before
    forecast(trained_run, tmp_path, "--format", "zarr", "--save", 1000, "--no-maps")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "forecasts.zarr",
        "scores.csv",
        "spectra.csv",
    ]
    assert (tmp_path / "forecasts.zarr" / ".zmetadata").exists()
    got = opened(tmp_path, "zarr")
    xr.testing.assert_identical(got, opened(one[0]))
    assert got.t2m.dtype == np.float32


def test_chosen_times(one, trained_run, tmp_path):
    forecast(trained_run, tmp_path, "--times", "2001-02-23T06,2001-02-21T12:00Z", "--no-maps")
    whole = opened(one[0])
    xr.testing.assert_identical(
        opened(tmp_path), whole.sel(time=["2001-02-21T12", "2001-02-23T06"])
    )
    assert (tmp_path / "scores.csv").read_text().count("model") == len(CHANNELS) * len(
        LEADS
    )  # of all test times, as ever


def test_the_figures_are_there(one):
    image = pytest.importorskip(
        "matplotlib.image", reason="matplotlib is not installed: no figures"
    )
    maps = [f"map_{name}_2001-02-21-00-00_{lead}h" for name in CHANNELS for lead in LEADS]
    stems = [*maps, "skill", *(f"spectra_{lead}h" for lead in LEADS)]
    assert {p.name for p in (one[0] / "maps").iterdir()} == {
        f"{s}.{kind}" for s in stems for kind in ("png", "svg", "csv")
    }
    for stem in stems:
        pixels = image.imread(one[0] / "maps" / f"{stem}.png")
        assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05, stem
    (numbers,) = lines(one[0] / "maps" / f"{maps[0]}.csv")
    error = (opened(one[0]).t2m - opened(one[0]).t2m_truth)[0, 0].astype("f8")
    rmse = float(np.sqrt((error**2).weighted(np.cos(np.deg2rad(error.latitude))).mean()))
    assert float(numbers["rmse"]) == pytest.approx(rmse, rel=1e-6)


# ---- a region


@pytest.fixture(scope="module")
def region(folder):
    """A run on a few degrees, whose leads are not in order, and one as long as its test part."""
    weather(80, np.linspace(60, 55, 6), np.arange(8.0)).to_netcdf(folder / "region.nc")
    words = [
        "--leads",
        "24,6",
        "--history",
        6,
        "--base",
        "persistence",
        "--dim",
        16,
        "--steps",
        1,
        "--global-batch",
        2,
    ]
    parts = ["--train-times", "0/60", "--val-times", "60/76", "--test-times", "76/80"]
    return trained(folder / "region", folder / "region.nc", *words, *parts)


def test_a_region_has_no_spectra(region, tmp_path, capsys):
    forecast(region, tmp_path, "--part", "val", "--no-maps")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forecasts.nc", "scores.csv"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("forecasts.nc; scores.csv beside it")
    got = opened(tmp_path)
    assert (
        got.lead_time.values.tolist()
        == np.array([6, 24], "timedelta64[h]").astype("timedelta64[ns]").tolist()
    )  # in order
    with xr.open_dataset(region.parent / "region.nc") as record:
        for lead in got.lead_time:
            truth = record.u10.sel(time=got.time + lead).values
            np.testing.assert_array_equal(got.u10_truth.sel(lead_time=lead).values, truth)
            now = record.u10.sel(time=got.time).values
            np.testing.assert_allclose(
                got.u10.sel(lead_time=lead).values, now, rtol=0, atol=0.1
            )  # 1 step: hardly learnt
    assert {(r["lead_hours"], r["times"]) for r in lines(tmp_path / "scores.csv")} == {
        ("6", "16"),
        ("24", "16"),
    }


def test_without_matplotlib_all_but_the_figures_is_written(region, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    forecast(region, tmp_path, "--part", "val")
    output = capsys.readouterr().out
    assert (
        "skipped maps: " in output
        and "pip install 'ringx[plot]'" in output
        and "maps/" not in output
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forecasts.nc", "scores.csv"]


# ---- mistakes


def refused(capsys, *words):
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        sys.exit(predict.main([str(w) for w in (*words, "--device", "cpu", "--no-maps")]))
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and err.startswith("apps.vit.predict: error: ")
        and err.count("\n") == 1
    ), err
    return err


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--checkpoint nowhere",
            "--checkpoint nowhere: it is neither a run (no checkpoints/ in it) nor a checkpoint.",
        ),
        (
            "--checkpoint {run} --step 7",
            "step-00000007 is not there; there are: step-00000012, step-00000024.",
        ),
        (
            "--checkpoint {run}/checkpoints/step-00000012 --step 7",
            "--step 7: {run}/checkpoints/step-00000012 is a checkpoint",
        ),
        (
            "--checkpoint {run} --rollout 7",
            "--rollout 7 must be a multiple of the model's first lead, 6 h.",
        ),
        ("--checkpoint {run} --rollout -6", "--rollout -6 must be at least 0."),
        (
            "--checkpoint {run} --rollout 1008",
            "train has 168 times (0/168), too few for a lead of 1008 h",
        ),
        ("--checkpoint {run} --cp 3", "--cp 3 does not divide the 1 ranks."),
        ("--checkpoint {run} --cp 3 --nproc 8", "--cp 3 does not divide the 8 ranks."),
        ("--checkpoint {run} --save 0", "--save 0 must be at least 1."),
        (
            "--checkpoint {run} --save 2 --times 2001-01-01",
            "--times 2001-01-01 and --save 2: give one.",
        ),
        ("--checkpoint {run} --times soon", "--times soon: they must be ISO times"),
        (
            "--checkpoint {run} --times 2001-01-01T00",
            "--times: 2001-01-01T00:00:00 is no initial time of the test times, which go from",
        ),
        ("--checkpoint {run} --batch 0", "--batch 0 must be at least 1."),
        ("--checkpoint {run} --part all", "'all' (choose from"),
        ("--checkpoint {run} --dtype fp46", "'fp46' (choose from"),
        ("--checkpoint {run} --data {run}/none.nc", "{run}/none.nc does not exist"),
        (
            "--checkpoint {run} --data {other}",
            "other.nc is other data than {run}/checkpoints/step-00000024 was trained on",
        ),
        ("--checkpoint {run} --out {other}", "--out {other} is no folder and cannot be made"),
        (
            "--checkpoint {region} --rollout 48",
            "--rollout 48: the model sees what was 6 h before, and forecasts every 24 h.",
        ),
        ("--checkpoint {region}", "test has 4 times (76/80), too few for a lead of 24 h"),
        ("--out {run}", "--checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    words, message, trained_run, region, folder, tmp_path, capsys
):
    if not (folder / "other.nc").exists():
        weather(239).to_netcdf(folder / "other.nc")
    names = {"run": trained_run, "region": region, "other": folder / "other.nc"}
    out = [] if "--out" in words else ["--out", tmp_path]
    assert message.format(**names) in refused(capsys, *words.format(**names).split(), *out)
    assert not list(tmp_path.iterdir())


def damage(checkpoint):
    file = sorted(checkpoint.glob("*.distcp"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


def test_a_damaged_checkpoint_is_passed_over(trained_run, tmp_path, capsys):
    """The newest without damage is taken; with none that is whole, it is a mistake."""
    shutil.copytree(trained_run, tmp_path / "run")
    newest, older = (tmp_path / "run" / "checkpoints" / f"step-000000{n}" for n in (24, 12))
    name = damage(newest)
    forecast(tmp_path / "run", tmp_path / "out", "--no-maps")
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith(
        f"checkpoint {newest} is damaged and passed over: {name} has other bytes"
    )
    assert (
        output[1].startswith(f"{older}, ")
        and str(older) in opened(tmp_path / "out").attrs["source"]
    )
    forecast(older, tmp_path / "same", "--no-maps", "--data", trained_run.parent / "weather.nc")
    xr.testing.assert_identical(opened(tmp_path / "same"), opened(tmp_path / "out"))
    damage(older)
    err = refused(capsys, "--checkpoint", tmp_path / "run", "--out", tmp_path / "none")
    assert f"--checkpoint {tmp_path / 'run'}: there is no checkpoint in it that can be used." in err
    for words in (("--checkpoint", newest), ("--checkpoint", tmp_path / "run", "--step", 24)):
        err = refused(capsys, *words, "--out", tmp_path / "none")
        assert f"checkpoint {newest} is damaged: {name} has other bytes" in err


def test_missing_values_of_the_last_time_are_named_on_all_ranks(tmp_path, capfd):
    """Only scores would meet them, and one rank of a cp group scores."""
    record = weather(80, np.linspace(60, 55, 6), np.arange(8.0))
    record["u10"][79, 0, 0] = np.nan
    record.to_netcdf(tmp_path / "a.nc")
    run = trained(
        tmp_path / "run", tmp_path / "a.nc", "--dim", 16, "--steps", 1, "--global-batch", 2
    )
    job = predict.configure(
        predict.parser().parse_args(
            ["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--nproc", "2"]
        )
    )
    assert ringx.launch.run(predict.work, 2, job, device="cpu", timeout=60) == [2, 2]
    assert "channel u10 is missing (or infinite) at 1 of 48 points" in capfd.readouterr().err


def test_a_checkpoint_of_another_app(trained_run, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000012"
    shutil.copytree(trained_run / "checkpoints" / checkpoint.name, checkpoint)
    about = json.loads((checkpoint / "about.json").read_text())
    about["config"]["model"]["vocab"] = 256
    text = json.dumps(about).encode()
    (checkpoint / "about.json").write_bytes(text)
    manifest = checkpoint / MANIFEST
    listed = json.loads(manifest.read_text())
    listed["files"]["about.json"] = {"bytes": len(text), "crc32": f"{zlib.crc32(text):08x}"}
    manifest.write_text(json.dumps(listed))
    words = ["--checkpoint", checkpoint, "--out", tmp_path / "out"]
    assert "run.json does not say what it was trained on; name it with --data" in refused(
        capsys, *words
    )
    err = refused(capsys, *words, "--data", Path(trained_run).parent / "weather.nc")
    assert (
        f"{checkpoint} was not written by this version of apps.vit.train" in err and "vocab" in err
    )


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["nc", "zarr"])
def test_what_a_killed_process_left_is_removed(kind, tmp_path):
    (tmp_path / ".forecasts.nc.0123abcd").write_text("half")
    (tmp_path / "forecasts.zarr.partial").mkdir()
    (tmp_path / "forecasts.zarr.partial" / "half").write_text("half")
    hours = np.array([6, 12], dtype="timedelta64[h]").astype("timedelta64[ns]")
    times = np.array(["2001-01-01"], dtype="datetime64[ns]")
    places = {"latitude": [0.0, 1.0], "longitude": [0.0, 1.0]}
    valid = ("time", "lead_time"), times[:, None] + hours
    dataset = xr.Dataset(coords={"time": times, "lead_time": hours, **places, "valid_time": valid})
    path = forecast_files.write_dataset(dataset, tmp_path, kind)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] == [f"forecasts.{kind}"]
