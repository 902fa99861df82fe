"""Maps, skill and spectra drawn from what apps.vit.predict writes: numbers, texts, the command.

python -m pytest test/apps/vit/test_vit_maps.py
"""

import csv
import math
import sys
import types

import numpy as np
import pytest
import xarray as xr

from apps.vit import maps
from apps.vit.scores import FORECASTS, ScoreRow, SpectrumRow, spectrum_rows, write_rows

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
LEADS = (6, 24, 72)
TIMES = np.array(["2020-01-31T00", "2020-01-31T18"], "datetime64[ns]")


def forecasts(channels=("u10", "z500"), lat=None, lon=None):
    """Forecasts whose values follow from their place.

    The target is 100 channel + 10 time + lead; the forecast is 3 less in the first row and 1 more
    in the others."""
    lat = np.array([60.0, 30.0, 0.0, -30.0]) if lat is None else lat
    lon = np.arange(8) * 45.0 if lon is None else lon
    dataset = xr.Dataset(
        coords={
            "time": TIMES,
            "lead_time": np.array(LEADS, "m8[h]").astype("m8[ns]"),
            "latitude": lat,
        }
    )
    dataset = dataset.assign_coords(longitude=lon)
    shape = (len(TIMES), len(LEADS), len(lat), len(lon))
    base = (
        10.0 * np.arange(len(TIMES))[:, None, None, None]
        + np.arange(len(LEADS))[:, None, None]
        + np.zeros(shape)
    )
    for c, name in enumerate(channels):
        attrs = {"units": "m s-1", "long_name": f"field {name}"}
        dataset[f"{name}_truth"] = (maps.DIMS, base + 100 * c, attrs)
        dataset[name] = (
            maps.DIMS,
            base + 100 * c + np.where(lat == lat[0], -3.0, 1.0)[:, None],
            attrs,
        )
    return dataset


def score_rows(channels=("u10", "z500")):
    return [
        ScoreRow(v, lead, f, math.sqrt(lead) * (1 + i), 0.5, 0.0, 1.0, "m s-1", 9)
        for v in channels
        for lead in LEADS
        for i, f in enumerate(FORECASTS)
    ]


def spectra_rows(channels=("u10", "z500")):
    energy = np.array([5.0, 4.0, 2.0, 1.0, 0.5])
    kinds = (("truth", 1.0), ("model", 0.5), ("persistence", 2.0))
    return [
        r
        for v in channels
        for lead in LEADS
        for f, by in kinds
        for r in spectrum_rows(v, lead, f, by * lead * energy)
    ]


def write_folder(folder, *channels):
    """The files that apps.vit.predict writes."""
    forecasts(channels).to_netcdf(folder / "forecasts.nc")
    write_rows(folder / "scores.csv", ScoreRow, score_rows(channels))
    write_rows(folder / "spectra.csv", SpectrumRow, spectra_rows(channels))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, "u10", "z500")


def texts(fig):
    fig.draw_without_rendering()
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


def meshes(fig):
    """Of the panels, not of their colour bars."""
    return [
        m
        for ax in fig.axes[:3]
        for m in ax.collections
        if isinstance(m, matplotlib.collections.QuadMesh)
    ]


# ---- maps


@pytest.mark.fast
def test_a_map_shows_target_forecast_and_difference():
    dataset = forecasts()
    fig = maps.draw_maps(dataset, "z500", 1, 2)
    target, forecast, difference = meshes(fig)
    where = dict(time=1, lead_time=2)
    np.testing.assert_array_equal(target.get_array(), dataset.z500_truth.isel(where))
    np.testing.assert_array_equal(forecast.get_array(), dataset.z500.isel(where))
    np.testing.assert_array_equal(
        difference.get_array(), (dataset.z500 - dataset.z500_truth).isel(where)
    )
    assert target.get_clim() == forecast.get_clim() == (109.0, 113.0)  # of both together
    assert difference.get_clim() == (-3.0, 3.0)
    assert target.get_cmap().name == "viridis" and difference.get_cmap().name == "RdBu_r"


@pytest.mark.fast
def test_a_map_names_what_it_shows():
    dataset = forecasts()
    error = (dataset.u10 - dataset.u10_truth).isel(time=1, lead_time=2)
    weighted = error.weighted(np.cos(np.deg2rad(dataset.latitude)))
    rmse = math.sqrt((error**2).weighted(np.cos(np.deg2rad(dataset.latitude))).mean())
    printed = texts(maps.draw_maps(dataset, "u10", 1, 2))
    title = (
        f"field u10 (u10), RMSE {rmse:.4g} m s-1\n"
        "initial time 2020-01-31 18:00 UTC, valid 2020-02-03 18:00 UTC, lead 72 h"
    )
    labels = {
        "target",
        "forecast",
        "forecast - target",
        "latitude (degrees north)",
        "longitude (degrees east)",
    }
    assert {title, "u10 (m s-1)", "difference (m s-1)"} | labels <= set(printed)
    numbers = maps.map_numbers(dataset, "u10", 1, 2)
    assert numbers["rmse"] == pytest.approx(rmse) and numbers["bias"] == pytest.approx(
        float(weighted.mean())
    )
    assert (numbers["difference_min"], numbers["difference_max"], numbers["lead_hours"]) == (
        -3.0,
        1.0,
        72,
    )


@pytest.mark.fast
def test_the_first_row_is_drawn_in_the_north_whatever_the_order_of_dimensions():
    dataset = forecasts(lat=np.array([58.0, 56.0, 54.0, 52.0]), lon=np.arange(-4.0, 4.0))
    for given in (dataset, dataset.transpose("longitude", "latitude", "lead_time", "time")):
        fig = maps.draw_maps(given, "u10", 0, 0)
        difference = meshes(fig)[2]
        corners = difference.get_coordinates()
        assert (corners[..., 1].min(), corners[..., 1].max()) == (51.0, 59.0)
        assert difference.get_array()[0, 0] == -3.0 and corners[0, 0, 1] == 59.0
        assert fig.axes[0].get_ylim() == (51.0, 59.0) and fig.axes[0].get_xlim() == (-4.5, 3.5)
    assert fig.axes[0].get_aspect() == pytest.approx(1 / math.cos(math.radians(55)))


@pytest.mark.fast
@pytest.mark.parametrize(("lat", "lon"), [((80, -80), (0, 355)), ((58, 50), (-10, 2))])
def test_titles_do_not_lie_on_each_other(lat, lon):
    fig = maps.draw_maps(
        forecasts(lat=np.linspace(*lat, 33), lon=np.linspace(*lon, 49)), "u10", 0, 0
    )
    fig.draw_without_rendering()
    above = fig._suptitle.get_window_extent()
    for ax in fig.axes[:3]:
        assert not ax.title.get_window_extent().overlaps(above)
        assert not any(ax.title.get_window_extent().overlaps(other.bbox) for other in fig.axes)


@pytest.mark.fast
def test_an_exact_forecast_and_one_with_gaps_can_be_drawn():
    dataset = forecasts()
    dataset["u10"] = dataset.u10_truth
    assert meshes(maps.draw_maps(dataset, "u10", 0, 0))[2].get_clim() == (-1.0, 1.0)
    dataset["u10"] = dataset.u10.where(dataset.longitude > 0)
    assert meshes(maps.draw_maps(dataset, "u10", 0, 0))[1].get_array().mask[:, 0].all()
    assert math.isnan(maps.map_numbers(dataset, "u10", 0, 0)["rmse"])
    dataset["u10"] = dataset.u10 * np.nan
    with pytest.raises(
        ValueError,
        match="the forecast of u10 from 2020-01-31 00:00 UTC, lead 6 h, has no finite value",
    ):
        maps.draw_maps(dataset, "u10", 0, 0)


@pytest.mark.fast
def test_coastlines_come_round_the_globe():
    line = np.array([[-30.0, 0.0], [-25.0, 10.0], [-40.0, 20.0]])
    fig = maps.draw_maps(forecasts(), "u10", 0, 0, [line])  # longitudes 0 .. 315
    for ax in fig.axes[:3]:
        (drawn,) = ax.lines
        np.testing.assert_array_equal(drawn.get_xdata(), line[:, 0] + 360)
        assert ax.get_xlim() == (-22.5, 337.5)


def cartopy(monkeypatch, natural_earth):
    """A stand-in: one shape of two lines."""
    lines = [
        types.SimpleNamespace(coords=[(0, 50), (1, 51)]),
        types.SimpleNamespace(coords=[(2, 50, 7), (3, 51, 7)]),
    ]
    shapes = [types.SimpleNamespace(geoms=lines)]
    reader = types.SimpleNamespace(
        natural_earth=natural_earth,
        Reader=lambda file: types.SimpleNamespace(geometries=lambda: shapes),
    )
    monkeypatch.setitem(sys.modules, "cartopy", types.ModuleType("cartopy"))
    monkeypatch.setitem(sys.modules, "cartopy.io", types.SimpleNamespace(shapereader=reader))


@pytest.mark.fast
def test_coastlines_are_finer_for_a_region(monkeypatch):
    resolutions = []
    cartopy(monkeypatch, lambda **options: resolutions.append(options["resolution"]))
    for lon in (np.arange(8) * 45.0, np.arange(8) * 1.0):
        first, second = maps.coastlines(forecasts(lon=lon))
        assert first.tolist() == [[0, 50], [1, 51]] and second.tolist() == [[2, 50], [3, 51]]
    assert resolutions == ["110m", "50m"]


@pytest.mark.fast
def test_without_coastlines_the_reason_is_printed(monkeypatch, folder):
    def offline(**options):
        raise OSError("no route to host")

    cartopy(monkeypatch, offline)
    with pytest.raises(ValueError, match="no route to host"):
        maps.coastlines(forecasts())
    monkeypatch.setitem(sys.modules, "cartopy.io", None)
    assert (
        next(iter(maps.draw(folder, folder / "out", variable="u10", lead=6)))
        == "no coastlines: cartopy is not installed"
    )


# ---- curves


@pytest.mark.fast
def test_skill_has_a_panel_for_each_variable_and_a_line_for_each_forecast():
    fig = maps.draw_skill(score_rows())
    assert [ax.get_title() for ax in fig.axes] == ["u10", "z500"]
    for ax in fig.axes:
        assert (
            ax.get_ylabel() == "RMSE (m s-1)"
            and ax.get_xlabel() == "lead time (h)"
            and ax.get_ylim()[0] == 0
        )
        assert [line.get_label() for line in ax.lines] == list(FORECASTS)
        for i, line in enumerate(ax.lines):
            np.testing.assert_array_equal(line.get_xdata(), LEADS)
            np.testing.assert_allclose(line.get_ydata(), np.sqrt(LEADS) * (1 + i))
        assert all(
            len({getattr(line, f"get_{what}")() for line in ax.lines}) == 5
            for what in ("marker", "color")
        )
    assert [t.get_text() for t in fig.legends[0].texts] == list(FORECASTS)


@pytest.mark.fast
def test_spectra_are_logarithmic_with_wavelengths_above():
    fig = maps.draw_spectra(spectra_rows(), 24, {"u10": "m", "z500": "m s-1"})
    assert [ax.get_title() for ax in fig.axes] == ["u10", "z500"]
    assert [ax.get_ylabel() for ax in fig.axes] == ["energy (m$^2$)", "energy ((m s-1)$^2$)"]
    for ax in fig.axes:
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        truth, model, _ = ax.lines
        assert truth.get_label() == "truth" and truth.get_xdata().tolist() == [1, 2, 3, 4]
        np.testing.assert_allclose(truth.get_ydata(), 24 * np.array([4, 2, 1, 0.5]))
        np.testing.assert_allclose(model.get_ydata(), 12 * np.array([4, 2, 1, 0.5]))
        (above,) = ax.child_axes
        assert above.get_xlabel() == "zonal wavelength at the equator (km)"
        fig.draw_without_rendering()
        at = (
            above.transData.transform((20000, 0))[0],
            ax.transData.transform((40030.17 / 20000, 1))[0],
        )
        assert at[0] == pytest.approx(at[1], abs=0.01)  # pixels
        assert [t.get_text() for t in above.get_xticklabels()] == ["20,000"]
    with pytest.raises(
        ValueError, match="lead=7 is in none of the spectra, which have 6, 24, 72 hours"
    ):
        maps.draw_spectra(spectra_rows(), 7)


@pytest.mark.fast
def test_a_figure_has_at_most_6_panels():
    names = [f"v{i}" for i in range(7)]
    assert len(maps.draw_skill(score_rows(names[:6])).axes) == 6
    for count, rows in ((7, score_rows(names)), (0, [])):
        with pytest.raises(ValueError, match=f"rows hold {count} variables"):
            maps.draw_skill(rows)


# ---- files


@pytest.mark.fast
def test_zarr_and_netcdf_are_read_alike(tmp_path):
    dataset = forecasts()
    dataset["age"] = (("time",), [1.0, 2.0], {"units": "hours"})  # not a lead
    dataset.to_netcdf(tmp_path / "forecasts.nc")
    (tmp_path / "z").mkdir()
    dataset.to_zarr(tmp_path / "z" / "forecasts.zarr", zarr_format=2, consolidated=True)
    for folder in (tmp_path, tmp_path / "z"):
        with maps.open_forecasts(folder) as opened:
            assert sorted(maps.channels_of(opened)) == ["u10", "z500"]
            assert maps.lead_hours(opened) == list(LEADS)
            xr.testing.assert_equal(opened.u10.load(), dataset.u10)
            assert opened.age.dtype == float


@pytest.mark.fast
def test_leads_in_hours_as_plain_numbers_need_units(tmp_path):
    dataset = forecasts().assign_coords(lead_time=("lead_time", [6, 24, 72], {"units": "hours"}))
    dataset.to_netcdf(tmp_path / "forecasts.nc")
    with maps.open_forecasts(tmp_path) as opened:
        assert maps.lead_hours(opened) == [6, 24, 72]
    del dataset.lead_time.attrs["units"]
    dataset.to_netcdf(tmp_path / "forecasts.nc")
    with pytest.raises(ValueError, match="a lead_time of int64, not timedelta64") as refused:
        maps.open_forecasts(tmp_path)
    dataset.to_netcdf(tmp_path / "forecasts.nc")  # what was refused is not held open
    assert refused


@pytest.mark.fast
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.rename(lead_time="step"), "no dimension with coordinates 'lead_time'"),
        (
            lambda d: d.drop_vars(["u10_truth", "z500_truth"]),
            "no pair of variables NAME and NAME_truth",
        ),
        (lambda d: d.isel(time=0, drop=True), "no dimension with coordinates 'time'"),
    ],
)
def test_other_layouts_are_refused(tmp_path, spoil, message):
    spoil(forecasts()).to_netcdf(tmp_path / "forecasts.nc")
    with pytest.raises(ValueError, match=rf"forecasts\.nc .*{message}"):
        maps.open_forecasts(tmp_path)


# ---- the command


def table(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_the_command_draws_first_and_last_lead_skill_and_spectra(tmp_path, capsys):
    out = tmp_path / "figures"
    write_folder(tmp_path, "z500")
    assert maps.main([str(tmp_path), "--out", str(out)]) == 0
    stems = [f"map_z500_2020-01-31-00-00_{h}h" for h in (6, 72)]
    stems += ["skill", "spectra_6h", "spectra_72h"]
    assert {p.name for p in out.iterdir()} == {
        f"{s}.{e}" for s in stems for e in ("png", "svg", "csv")
    }
    for stem in stems:
        assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG") and (
            out / f"{stem}.png"
        ).stat().st_size > 5000
        assert "</svg>" in (out / f"{stem}.svg").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "coastlines" not in line] == [
        f"{out / s}.png, .svg, .csv" for s in stems
    ]
    (row,) = table(out / "map_z500_2020-01-31-00-00_72h.csv")
    assert (
        float(row["rmse"]) == maps.map_numbers(forecasts(["z500"]), "z500", 0, 2)["rmse"]
        and row["valid_time"] == "2020-02-03 00:00 UTC"
    )
    assert len(table(out / "skill.csv")) == 3 * 5 and {
        r["lead_hours"] for r in table(out / "spectra_72h.csv")
    } == {"72"}


def test_the_command_draws_only_the_chosen_variable_time_and_lead(folder):
    out = folder / "figures"
    arguments = ["--variable", "z500", "--time", "2020-01-31T18:00", "--lead", "24"]
    assert maps.main([str(folder), "--out", str(out), *arguments]) == 0
    assert {p.stem for p in out.iterdir()} == {
        "map_z500_2020-01-31-18-00_24h",
        "skill",
        "spectra_24h",
    }
    assert {
        r["variable"] for name in ("skill", "spectra_24h") for r in table(out / f"{name}.csv")
    } == {"z500"}


def test_many_variables_make_several_figures_and_lacking_files_are_named(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(maps, "PANELS", 2)
    monkeypatch.setattr(maps, "VARIABLES", 1)
    names = ["a", "b", "c"]
    write_folder(tmp_path, *names)
    (tmp_path / "spectra.csv").unlink()
    assert maps.main([str(tmp_path), "--out", str(tmp_path / "out"), "--lead", "6"]) == 0
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        "map_a_2020-01-31-00-00_6h.png",
        "skill_1.png",
        "skill_2.png",
    }
    drawn = [{r["variable"] for r in table(tmp_path / "out" / f"skill_{i}.csv")} for i in (1, 2)]
    assert drawn == [{"a", "b"}, {"c"}]
    printed = capsys.readouterr().out
    assert "maps of the first 1 of 3 variables; --variable names another" in printed
    assert f"skipped spectra_6h: {tmp_path / 'spectra.csv'} is not there" in printed


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--variable", "z50"],
            "variable='z50' is unknown. Did you mean 'z500'? Known: u10, z500.",
        ),
        (
            ["--time", "2020-02-01"],
            "time='2020-02-01' is none of the 2 initial times from 2020-01-31 00:00 UTC to "
            "2020-01-31 18:00",
        ),
        (["--time", "monday"], "time='monday' is no time; write it as 2020-01-31T00:00."),
        (["--lead", "7"], "lead=7 is none of the leads, which are 6, 24, 72 hours."),
    ],
)
def test_unknown_variables_times_and_leads_are_named(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        maps.main([str(folder), "--out", str(folder / "out"), *arguments])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (folder / "out").exists()


@pytest.mark.fast
def test_a_broken_or_missing_file_is_one_line(tmp_path, capsys):
    def message():
        with pytest.raises(SystemExit) as end:
            maps.main([str(tmp_path), "--out", str(tmp_path / "out")])
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert f"{tmp_path} holds no forecasts.nc or forecasts.zarr" in message()
    (tmp_path / "forecasts.nc").write_bytes(b"no such format")
    assert f"{tmp_path / 'forecasts.nc'} cannot be read" in message()
