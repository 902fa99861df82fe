"""apps/vit's data: records, statistics and samples.

A record comes out as it was written, whatever its format; statistics are those of xarray; samples
are reproducible.

python -m pytest test/apps/vit/test_vit_data.py
"""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import SHARED

pytestmark = [
    pytest.mark.fast,
    pytest.mark.filterwarnings("ignore:Consolidated metadata"),  # of Zarr 3, on writing
]
xr = pytest.importorskip("xarray")
h5py = pytest.importorskip("h5py")

from apps.vit.data.dataset import Fields, Grid, Split, open_fields, splits  # noqa: E402
from apps.vit.data.samples import Samples  # noqa: E402
from apps.vit.data.statistics import Statistics, statistics  # noqa: E402

REAL = SHARED / "data"
ERA5 = REAL / "era5_t2m_uk_2019-03.nc"
MONTHS = REAL / "eraint_uvz.nc"
needs_era5 = pytest.mark.skipif(not ERA5.exists(), reason=f"real data is not there: {ERA5.name}")


def record(times=48, start="2001-01-30", step=6, height=5, width=8, seed=0, lat=None, lon=None):
    """A dataset with a 2-D variable, one at two levels, and a static one.

    Its weather has a daily cycle and memory."""
    rng = np.random.default_rng(seed)
    time = np.datetime64(start, "ns") + np.arange(times) * np.timedelta64(step, "h")
    lat = np.linspace(60, -60, height) if lat is None else np.asarray(lat, float)
    lon = np.arange(width) * 360 / width if lon is None else np.asarray(lon, float)
    noise = rng.standard_normal((times, 3, len(lat), len(lon)))
    for t in range(1, times):
        noise[t] += 0.8 * noise[t - 1]
    noise += 3 * np.sin(np.arange(times) * step * 2 * np.pi / 24)[:, None, None, None]
    return xr.Dataset(
        {
            "t2m": (
                ("time", "latitude", "longitude"),
                (280 + noise[:, 0]).astype("f4"),
                {"units": "K", "long_name": "warmth"},
            ),
            "z": (
                ("time", "level", "latitude", "longitude"),
                (5e4 + 99 * noise[:, 1:]).astype("f4"),
                {"units": "m2 s-2"},
            ),
            "lsm": (("latitude", "longitude"), rng.random((len(lat), len(lon))).astype("f4")),
        },
        {
            "time": time,
            "latitude": lat,
            "longitude": lon,
            "level": ("level", [500, 850], {"units": "hPa"}),
        },
    )


def stacked(data) -> np.ndarray:
    return np.concatenate([data.t2m.values[:, None], data.z.values], 1)


def opened(tmp_path, data=None, name="a.nc", **kwargs) -> Fields:
    data = record() if data is None else data
    data.to_netcdf(tmp_path / name)
    return open_fields(tmp_path / name, **kwargs)


def refusal(call, *args, **kwargs) -> str:
    """The message of the ValueError: one line that ends."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def write_years(
    folder: Path, years=(2001, 2002), rows=None, shape=(3, 6, 8)
) -> dict[int, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    values = {}
    for year in years:
        n = rows or (366 if year % 4 == 0 else 365)
        values[year] = np.random.default_rng(year).random((n, *shape), dtype=np.float32)
        with h5py.File(folder / f"{year}.h5", "w") as f:
            f["fields"] = values[year]
    return values


# ---- opening


@pytest.mark.parametrize("kind", ["NETCDF4", "NETCDF3_64BIT", "zarr"])
def test_every_format_gives_what_was_written(tmp_path, kind):
    data = record()
    path = tmp_path / ("a.zarr" if kind == "zarr" else "a.nc")
    _ = data.to_zarr(path) if kind == "zarr" else data.to_netcdf(path, format=kind)
    fields = open_fields(path)
    assert fields.channels == ("t2m", "z500", "z850")
    assert (
        fields.units == {"t2m": "K", "z500": "m2 s-2", "z850": "m2 s-2"}
        and fields.long_names["t2m"] == "warmth"
    )
    assert (
        fields.step_hours == 6
        and len(fields) == 48
        and fields.times.dtype == np.dtype("datetime64[s]")
    )
    assert (fields.times == data.time.values).all() and fields.grid.periodic
    np.testing.assert_array_equal(fields.static["lsm"], data.lsm.values)
    result = fields.read([7, 3, 4, 3])  # any order, twice
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, stacked(data)[[7, 3, 4, 3]])
    assert fields.read([]).shape == (0, 3, 5, 8)


def test_weatherbench2_names(tmp_path):
    data = record(lat=[-60, -30, 0, 30, 60]).rename(
        t2m="2m_temperature", z="geopotential", lsm="land_sea_mask"
    )
    data = data.transpose("time", "level", "longitude", "latitude")  # as WeatherBench 2 has it
    data.to_zarr(tmp_path / "1959-2023-6h-8x5.zarr")
    fields = open_fields(tmp_path)  # a folder with a store in it
    assert fields.channels == ("2m_temperature", "geopotential500", "geopotential850") and set(
        fields.static
    ) == {"land_sea_mask"}
    north_first = data.transpose("time", "level", "latitude", "longitude").sortby(
        "latitude", ascending=False
    )
    np.testing.assert_array_equal(fields.read([5])[0, 2], north_first.geopotential.values[5, 1])
    np.testing.assert_array_equal(fields.static["land_sea_mask"], north_first.land_sea_mask.values)


def test_cds_names_and_pascals(tmp_path):
    data = record().rename(time="valid_time", level="plev", latitude="lat", longitude="lon")
    data = data.assign_coords(plev=("plev", [50000.0, 85000.0], {"units": "Pa"})).expand_dims(
        number=[0]
    )
    data["time_bnds"] = (("valid_time", "bnds"), np.zeros((48, 2)))
    fields = opened(tmp_path, data)
    assert fields.channels == ("t2m", "z500", "z850") and fields.read([0, 1]).shape == (2, 3, 5, 8)
    np.testing.assert_array_equal(fields.read([9])[0, 1], data.z.values[0, 9, 0])


def test_packed_netcdf3_is_decoded(tmp_path):
    data = record()[["t2m"]]
    packing = {
        "t2m": {"dtype": "i2", "scale_factor": 0.001, "add_offset": 280.0, "_FillValue": -32768}
    }
    data.to_netcdf(tmp_path / "a.nc", format="NETCDF3_CLASSIC", encoding=packing)
    np.testing.assert_allclose(
        open_fields(tmp_path / "a.nc").read([4])[0, 0], data.t2m.values[4], atol=6e-4
    )


def test_orientation(tmp_path):
    turned = record(lat=[-60, -30, 0, 30, 60], lon=[225, 270, 315, 0, 45, 90, 135, 180])
    fields = opened(tmp_path, turned)
    right = turned.sortby("latitude", ascending=False).sortby("longitude")
    np.testing.assert_array_equal(fields.grid.lat, right.latitude)
    np.testing.assert_array_equal(fields.grid.lon, right.longitude)
    np.testing.assert_array_equal(fields.read([0, 5]), stacked(right)[[0, 5]])
    np.testing.assert_array_equal(fields.static["lsm"], right.lsm.values)
    west = opened(tmp_path, record(lon=np.arange(-180, 180, 45)), "west.nc")  # taken as it is
    assert west.grid.lon[0] == -180 and west.grid.periodic


def test_several_files_are_one_record(tmp_path):
    data = record()
    for name, part in (
        ("c", slice(0, 10)),
        ("a", slice(10, 11)),
        ("b", slice(11, 48)),
    ):  # names say nothing of the order
        data.isel(time=part).to_netcdf(tmp_path / f"{name}.nc")
    for paths in (
        tmp_path,
        str(tmp_path / "*.nc"),
        [tmp_path / "a.nc", tmp_path / "b.nc", tmp_path / "c.nc"],
    ):
        fields = open_fields(paths)
        assert (fields.times == data.time.values).all()
        np.testing.assert_array_equal(
            fields.read([47, *range(8, 13)]), stacked(data)[[47, *range(8, 13)]]
        )
    data[["lsm"]].rename(lsm="orography").to_netcdf(tmp_path / "constant.nc")
    assert set(open_fields(tmp_path).static) == {"lsm", "orography"}


def test_selection(tmp_path):
    data = record()
    fields = opened(tmp_path, data, variables=["z", "t2m"], levels=[850])
    assert fields.channels == ("z850", "t2m")
    np.testing.assert_array_equal(fields.read([2])[0], stacked(data)[2, [2, 0]])
    file = tmp_path / "a.nc"
    assert open_fields(file, variables=["z850", "z500"]).channels == ("z850", "z500")
    np.testing.assert_array_equal(
        open_fields(file, variables=["z850", "z500"]).read([2])[0], stacked(data)[2, [2, 1]]
    )
    text = refusal(open_fields, file, variables=["u10"])
    assert "'u10'" in text and "t2m, z500, z850" in text
    assert "500, 850" in refusal(open_fields, file, levels=[700])
    assert "static" in refusal(open_fields, file, variables=["lsm"])
    assert "channel_names" in refusal(open_fields, file, channel_names=["a"])
    assert "z500" in refusal(open_fields, file, variables=["z500"], levels=[850])


def test_a_static_field_that_is_repeated_in_time_is_static(tmp_path):
    data = record()
    data["lsm"] = data.lsm.expand_dims(time=data.time)
    data["orography"] = data.t2m * 1  # only named so: it changes
    fields = opened(tmp_path, data)
    assert set(fields.static) == {"lsm"} and "orography" in fields.channels
    np.testing.assert_array_equal(fields.static["lsm"], data.lsm.values[0])


def test_threads_and_forks_read_the_same(tmp_path):
    data = record()
    data.to_netcdf(tmp_path / "a.nc", format="NETCDF3_64BIT")
    data.to_zarr(tmp_path / "a.zarr")
    data.to_netcdf(tmp_path / "b.nc")
    for name in ("a.nc", "b.nc", "a.zarr"):
        fields = open_fields(tmp_path / name)
        fields.read([0])
        wrong = []

        def work(fields=fields, wrong=wrong):
            for i in range(10):
                if not np.array_equal(fields.read([i, 40 - i]), stacked(data)[[i, 40 - i]]):
                    wrong.append(i)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        child = os.fork()  # while they read
        if child == 0:
            wrong = [1]  # until it has worked
            try:
                wrong = []
                work(fields, wrong)
            finally:
                os._exit(len(wrong))
        for thread in threads:
            thread.join()
        assert os.waitpid(child, 0)[1] == 0 and not wrong, name


# ---- HDF5 of the tutorials


def test_yearly_hdf5(tmp_path):
    values = write_years(tmp_path / "train", (2003, 2004))
    (tmp_path / "stats").mkdir()
    np.save(tmp_path / "stats" / "global_means.npy", np.arange(3.0).reshape(1, 3, 1, 1))
    np.save(tmp_path / "stats" / "global_stds.npy", np.arange(1.0, 4).reshape(1, 3, 1, 1))
    fields = open_fields(
        tmp_path, channel_names=["u10", "v10", "t2m"], variables=["t2m", "u10"]
    )  # the folder above
    assert fields.channels == ("t2m", "u10") and fields.step_hours == 24 and len(fields) == 731
    assert (
        str(fields.times[0]) == "2003-01-01T00:00:00"
        and str(fields.times[-1]) == "2004-12-31T00:00:00"
    )
    np.testing.assert_array_equal(
        fields.grid.lat, [90, 60, 30, 0, -30, -60]
    )  # the south pole is cut off
    np.testing.assert_array_equal(fields.grid.lon, np.arange(8) * 45.0)
    whole = np.concatenate(list(values.values()))
    np.testing.assert_array_equal(fields.read([364, 365, 2]), whole[[364, 365, 2]][:, [2, 0]])
    assert fields.given_mean.tolist() == [2, 0] and fields.given_std.tolist() == [3, 1]
    assert open_fields(tmp_path / "train").channels == ("channel0", "channel1", "channel2")


def test_hdf5_grids_and_times(tmp_path):
    write_years(tmp_path, (2001,), rows=1460, shape=(1, 5, 4))
    fields = open_fields(tmp_path / "2001.h5")
    assert fields.step_hours == 6 and fields.grid.lat.tolist() == [90, 45, 0, -45, -90]
    with h5py.File(tmp_path / "part.h5", "w") as f:
        f["fields"] = np.zeros((3, 1, 2, 2), "f4")
        f["time"] = [0, 3, 6]
        f["time"].attrs["units"] = "hours since 1990-05-01"
        f["lat"], f["lon"], f["channel"] = [10.0, 20.0], [0.0, 1.0], [b"msl"]
    part = open_fields(tmp_path / "part.h5")
    assert (
        str(part.times[2]) == "1990-05-01T06:00:00"
        and part.channels == ("msl",)
        and part.grid.lat.tolist() == [20, 10]
    )


def test_hdf5_refusals(tmp_path):
    write_years(tmp_path / "a", (2004,), rows=1460, shape=(1, 4, 4))
    text = refusal(open_fields, tmp_path / "a")
    assert "2004.h5" in text and "1460" in text and "8784" in text
    os.rename(tmp_path / "a" / "2004.h5", tmp_path / "a" / "x.h5")
    assert "x.h5: its times are unknown" in refusal(open_fields, tmp_path / "a")
    write_years(tmp_path / "b", (2001, 2003))
    assert "2003.h5" in (text := refusal(open_fields, tmp_path / "b")) and "2001-12-31" in text
    assert "3 channels, but 1 names" in refusal(open_fields, tmp_path / "b", channel_names=["t"])
    assert "twice" in refusal(open_fields, tmp_path / "b", channel_names=["t", "t", "u"])
    np.save(tmp_path / "b" / "global_means.npy", np.zeros(2))
    (tmp_path / "b" / "2003.h5").unlink()
    assert "global_means.npy" in refusal(open_fields, tmp_path / "b")
    with h5py.File(tmp_path / "1999.h5", "w") as f:
        f["orography"] = np.zeros((2, 2))
    assert "orography" in refusal(open_fields, tmp_path / "1999.h5")


# ---- records that are refused


def test_months_are_no_times():
    if not MONTHS.exists():
        pytest.skip(f"real data is not there: {MONTHS.name}")
    text = refusal(open_fields, MONTHS)
    assert MONTHS.name in text and "no time axis" in text and "month = 2" in text


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda d: d.isel(time=[0, 1, 2, 4, 5]),
            ["unevenly", "12 h", "2001-01-30T12:00:00", "6 h elsewhere"],
        ),
        (lambda d: d.isel(time=[0, 1, 1, 2]), ["twice", "2001-01-30T06:00:00"]),
        (lambda d: d.isel(time=slice(None, None, -1)), ["after a later time"]),
        (lambda d: d.isel(time=[0]), ["two times"]),
        (
            lambda d: d.assign_coords(
                time=d.time.values[0] + np.arange(48) * np.timedelta64(90, "m")
            ),
            ["whole hours", "1.5 h"],
        ),
        (lambda d: d.assign_coords(time=np.arange(48)), ["time has no dates"]),
        (lambda d: d.convert_calendar("noleap"), ["noleap", "convert_calendar"]),
        (lambda d: d.isel(latitude=[0, 2, 1, 3, 4]), ["latitude neither"]),
        (lambda d: d.isel(longitude=[0, 2, 1, 3, 4, 5, 6, 7]), ["longitude does not ascend"]),
        (lambda d: d.assign_coords(longitude=np.linspace(0, 360, 8)), ["same meridian"]),
        (lambda d: d.assign_coords(latitude=d.latitude * 100), ["degrees", "6000"]),
        (lambda d: d.drop_vars("latitude"), ["latitude"]),
        (lambda d: d.drop_vars("level"), ["level has no values"]),
        (lambda d: d.expand_dims(member=3), ["member of size 3"]),
        (lambda d: d[["t2m"]].isel(latitude=0), ["latitude"]),
        (lambda d: d[["lsm"]], ["no times"]),
    ],
)
def test_refused_by_name(tmp_path, change, words):
    text = refusal(opened, tmp_path, change(record()))
    assert "a.nc" in text and all(word in text for word in words), text


def test_files_that_do_not_fit_together(tmp_path):
    data = record()
    data.isel(time=slice(0, 24)).to_netcdf(tmp_path / "a.nc")
    for changed, words in (
        (record(height=6), "grid differs"),
        (data.drop_vars("t2m"), "t2m"),
        (data.assign(t2m=data.t2m.assign_attrs(units="degC")), "degC"),
    ):
        changed.isel(time=slice(24, 48)).to_netcdf(tmp_path / f"{words[:3]}.nc")
        text = refusal(open_fields, [tmp_path / f"{words[:3]}.nc", tmp_path / "a.nc"])
        assert words in text and text.startswith(f"{tmp_path}/{words[:3]}.nc")
    data.isel(time=slice(23, 48)).to_netcdf(tmp_path / "b.nc")
    text = refusal(open_fields, [tmp_path / "a.nc", tmp_path / "b.nc"])
    assert "b.nc: time 2001-02-04T18:00:00 occurs twice" in text


def test_damaged_and_missing_files(tmp_path):
    assert "nowhere.nc does not exist" in refusal(open_fields, tmp_path / "nowhere.nc")
    assert "does not exist" in refusal(open_fields, str(tmp_path / "*.nc"))
    assert "holds no file" in refusal(open_fields, tmp_path)
    assert "gs://x" in refusal(open_fields, "gs://x")
    assert "empty" in refusal(open_fields, [])
    (tmp_path / "text.nc").write_text("no NetCDF")
    assert "text.nc: cannot be read" in refusal(open_fields, tmp_path / "text.nc")
    (tmp_path / "2001.h5").write_text("no HDF5")
    assert "2001.h5: cannot be read" in refusal(open_fields, tmp_path / "2001.h5")
    (tmp_path / "empty.zarr").mkdir()
    assert "empty.zarr: cannot be read" in refusal(open_fields, tmp_path / "empty.zarr")
    for kind in ("NETCDF4", "NETCDF3_CLASSIC"):
        record().to_netcdf(tmp_path / "cut.nc", format=kind)
        whole = (tmp_path / "cut.nc").read_bytes()
        (tmp_path / "cut.nc").write_bytes(whole[: len(whole) // 2])
        assert "cut.nc: " in refusal(lambda: open_fields(tmp_path / "cut.nc").read(range(48)))


def test_damage_that_shows_on_reading(tmp_path):
    record().to_netcdf(
        tmp_path / "a.nc",
        encoding={"t2m": {"zlib": True, "fletcher32": True, "chunksizes": (48, 5, 8)}},
    )
    fields = open_fields(tmp_path / "a.nc")
    content = bytearray((tmp_path / "a.nc").read_bytes())
    with h5py.File(tmp_path / "a.nc") as f:
        at = f["t2m"].id.get_chunk_info(0).byte_offset
    content[at + 100 : at + 200] = bytes(100)
    (tmp_path / "a.nc").write_bytes(content)
    assert "a.nc: cannot be read" in refusal(fields.read, [0])


def test_identity(tmp_path):
    data = record()
    one = opened(tmp_path, data).identity
    assert len(one) == 64 and opened(tmp_path, data, "copy.nc").identity == one
    others = [
        opened(tmp_path, data, variables=["t2m"]).identity,
        opened(tmp_path, data.isel(time=slice(0, 47)), "b.nc").identity,
        opened(tmp_path, data.assign_coords(longitude=data.longitude + 1), "c.nc").identity,
        opened(tmp_path, data.assign_attrs(note="x" * 99999), "d.nc").identity,  # another size
    ]
    data.to_zarr(tmp_path / "a.zarr")
    store = open_fields(tmp_path / "a.zarr")
    chunk = next(
        f
        for f in (tmp_path / "a.zarr" / "t2m").rglob("*")
        if f.is_file() and not f.name.startswith((".", "zarr"))
    )
    before = store.identity
    chunk.write_bytes(chunk.read_bytes() + b"x")
    others += [before, open_fields(tmp_path / "a.zarr").identity]
    assert len({one, *others}) == len(others) + 1


def test_grid():
    grid = Grid(np.array([90.0, 45, 0, -45, -90]), np.arange(8) * 45.0)
    root = np.sqrt(0.5)
    np.testing.assert_allclose(
        grid.weights(), np.array([0, root, 1, root, 0]) * 5 / (1 + 2 * root), atol=1e-15
    )
    assert grid.weights()[0] == 0 and grid.periodic and grid.shape == (5, 8)
    assert not Grid(grid.lat, np.arange(8) * 40.0).periodic


def test_read_outside(tmp_path):
    fields = opened(tmp_path)
    for bad in (-1, 48):
        assert f"index {bad} " in refusal(fields.read, [0, bad])


# ---- splits


@pytest.fixture(scope="module")
def years(tmp_path_factory) -> Fields:
    """Three years, every 12 hours, a month at its start and its end cut off."""
    return opened(
        tmp_path_factory.mktemp("years"),
        record(times=2 * 1010, start="2001-02-01", step=12, height=2, width=2),
    )


@pytest.mark.parametrize(
    "text, first, last",
    [
        ("0/504", "2001-02-01T00", "2001-10-10T12"),
        ("2001/2002", "2001-02-01T00", "2002-12-31T12"),
        ("2003", "2003-01-01T00", "2003-11-07T12"),
        ("2001-03/2001-03", "2001-03-01T00", "2001-03-31T12"),
        ("2001-03-05/2001-03-06", "2001-03-05T00", "2001-03-06T12"),
        (
            "2001-03-05T12/2001-03-06T12",
            "2001-03-05T12",
            "2001-03-06T00",
        ),  # a time of day is not part of it
        ("0/1500", "2001-02-01T00", "2003-02-20T12"),
        ("2001-02-01T06:00Z / 2002", "2001-02-01T12", "2002-12-31T12"),
        ("0/02001", "2001-02-01T00", "2003-10-29T00"),  # an index of four digits
    ],
)
def test_ends_of_splits(years, text, first, last):
    begin, end = (int(np.flatnonzero(years.times == np.datetime64(at))[0]) for at in (first, last))
    free = [i for i in range(len(years)) if not begin <= i <= end]
    others = [f"{i:05d}/{i + 1:05d}" for i in (free[-1], free[-2])]
    split = splits(years, text, *others)["train"]
    assert (split.start, split.stop - 1) == (begin, end)


def test_default_splits_are_in_order(years):
    parts = splits(years)
    assert [(s.start, s.stop) for s in parts.values()] == [(0, 1414), (1414, 1717), (1717, 2020)]
    assert (
        list(parts) == ["train", "val", "test"] == [s.name for s in parts.values()]
        and len(parts["val"]) == 303
    )


@pytest.mark.parametrize(
    "given, words",
    [
        (("0/10", "9/20", "20/30"), ["train", "val", "overlap"]),
        (("2001", "2002", "2002-12/2003"), ["val", "test", "overlap", "2002-12-01"]),
        (("10/10", "20/30", "30/40"), ["train='10/10' is empty"]),
        (
            ("0/10", "30/20", "30/40"),
            ["val='30/20'", "backwards", "0/2020 (2001-02-01T00:00:00 to 2003-11-07T12:00:00"],
        ),
        (("0/10", "10/20", "20/02021"), ["test", "outside", "0/2020"]),
        (("2000/2001", "2002", "2003"), ["train='2000/2001'", "2000 is outside"]),
        (("2001", "2002", "2003/2004"), ["test", "2004 is outside"]),
        (("2001", "2002", "soon/later"), ["test", "'soon'"]),
        (("2001", "2002-13/2003", "2003"), ["val", "2002-13", "no date"]),
        (("2001", "2002", "1/2/3"), ["test='1/2/3'"]),
        (("5", "2002", "2003"), ["train='5' is one index"]),
        (("0/10", None, None), ["val is not given"]),
        (("0/10", "-5/20", "30/40"), ["val='-5/20'"]),
    ],
)
def test_wrong_splits(years, given, words):
    text = refusal(splits, years, *given)
    assert all(word in text for word in words), text


# ---- statistics


def damped(a, b) -> float:
    """Least squares through the origin, by numpy's solver."""
    return float(np.linalg.lstsq(a.reshape(-1, 1), b.reshape(-1), rcond=None)[0][0])


@pytest.mark.parametrize(
    "piece", [1, 3 * 8 * 40 * 5, 2**26]
)  # bytes: one time, five times, all at once
def test_statistics_are_xarrays(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("apps.vit.data.statistics.PIECE", piece)
    data = record()
    fields = opened(tmp_path, data)
    reported: list[tuple[int, int]] = []
    result = statistics(
        fields, Split(2, 41), (6, 18), cache=None, progress=lambda *counts: reported.append(counts)
    )
    assert reported[-1] == (78, 78)
    assert result.leads == (6, 18) and result.channels == fields.channels
    t2m, z = (
        data.t2m.astype("f8").isel(time=slice(2, 41)),
        data.z.astype("f8").isel(time=slice(2, 41)),
    )
    x = xr.concat(
        [t2m, z.sel(level=500), z.sel(level=850)], "channel", coords="minimal", compat="override"
    )
    dims = ("time", "latitude", "longitude")
    np.testing.assert_allclose(result.mean, x.mean(dims), rtol=1e-12)
    np.testing.assert_allclose(result.std, x.std(dims), rtol=1e-11)
    hourly = x.groupby("time.hour").mean("time")
    assert result.slots.tolist() == [0, 21600, 43200, 64800]
    assert result.climate.shape == (1, 4, 3, 5, 8)
    np.testing.assert_allclose(
        result.climate[0], hourly.transpose("hour", "channel", ...), rtol=2e-7
    )
    np.testing.assert_array_equal(
        result.climatology(fields.times[[3, 4, 47]]), result.climate[0][[3, 0, 3]]
    )
    anomalies = (x.groupby("time.hour") - hourly).transpose("time", "channel", ...).values
    for i, lag in enumerate((1, 3)):
        change = (x.shift(time=-lag) - x).std(dims)
        np.testing.assert_allclose(result.std_change[i], change, rtol=1e-11)
        a, b = anomalies[:-lag], anomalies[lag:]
        np.testing.assert_allclose(
            result.damping[i], [damped(a[:, c], b[:, c]) for c in range(3)], rtol=1e-4
        )
        assert result.damping_map[i, 2, 1, 3] == pytest.approx(
            damped(a[:, 2, 1, 3], b[:, 2, 1, 3]), rel=1e-3
        )
        left = b - result.damping[i][:, None, None] * a
        np.testing.assert_allclose(
            result.std_damped[i], np.sqrt(np.square(left).mean((0, 2, 3))), rtol=1e-4
        )


def test_climatology_by_month(tmp_path):
    data = record(times=3 * 365 * 2, start="2001-01-01", step=12, height=2, width=2)
    fields = opened(tmp_path, data)
    result = statistics(fields, Split(0, 3 * 365 * 2), (12,), cache=None)
    assert result.climate.shape == (12, 2, 3, 2, 2)
    t2m = data.t2m.astype("f8")
    july = t2m.sel(time=(t2m.time.dt.month == 7) & (t2m.time.dt.hour == 12)).mean("time")
    august = t2m.sel(time=(t2m.time.dt.month == 8) & (t2m.time.dt.hour == 12)).mean("time")
    january = t2m.sel(time=(t2m.time.dt.month == 1) & (t2m.time.dt.hour == 12)).mean("time")
    december = t2m.sel(time=(t2m.time.dt.month == 12) & (t2m.time.dt.hour == 12)).mean("time")

    def at(time):
        return result.climatology(np.array([time], "datetime64[s]"))[0, 0]

    np.testing.assert_allclose(result.climate[6, 1, 0], july, rtol=1e-6)
    np.testing.assert_allclose(
        at("2003-08-01T12"), july + (august - july) * 16 / 31, rtol=1e-6
    )  # 16 of 31 days after July 16.5
    np.testing.assert_allclose(
        at("2002-01-01T12"), december + (january - december) * 16 / 31, rtol=1e-6
    )
    np.testing.assert_allclose(
        at("2001-12-31T12"), december + (january - december) * 15 / 31, rtol=1e-6
    )


def test_short_of_two_years_there_are_no_months(years):
    assert len(statistics(years, Split(0, 1459), (12,), cache=None).climate) == 1
    assert len(statistics(years, Split(0, 1460), (12,), cache=None).climate) == 12


def test_a_constant_offset_does_not_hurt_precision(tmp_path):
    """Variance 1e-4 beside a mean of 1e5: sums of squares in one go would lose it."""
    data = record()[["t2m"]]
    wave = np.tile([0.0, 1.0], 24)[:, None, None] * np.ones((48, 5, 8)) * 2**-6
    data["t2m"] = data.t2m.dims, 131071 + wave
    result = statistics(opened(tmp_path, data), Split(0, 48), (6,), cache=None)
    assert result.mean[0] == 131071 + 2**-7 and result.std[0] == pytest.approx(2**-7, rel=1e-9)
    assert result.damping.tolist() == [[0]]  # no anomaly is left


def test_statistics_refusals(tmp_path):
    data = record()
    holes = data.copy(deep=True)
    holes["z"][20, 1, :2, 3] = np.nan
    text = refusal(statistics, opened(tmp_path, holes), Split(0, 40), (6,), cache=None)
    assert (
        "z850" in text
        and "2 of 40 points" in text
        and "2001-02-04T00:00:00" in text
        and "--variables" in text
    )
    flat = opened(tmp_path, data.assign(z=data.z * 0 + np.float32(0.1)), "b.nc")
    assert "z500 is 0.1 everywhere" in refusal(statistics, flat, Split(0, 40), (6,), cache=None)
    still = opened(tmp_path, data.assign(t2m=data.t2m * 0 + data.lsm), "c.nc")
    assert "t2m does not change in time" in refusal(
        statistics, still, Split(0, 40), (6,), cache=None
    )
    fields = opened(tmp_path, data)
    assert "12:00 UTC" in refusal(statistics, fields, Split(0, 2, "train"), (6,), cache=None)
    text = refusal(statistics, fields, Split(0, 4, "train"), (6, 24), cache=None)
    assert "train has 4 times" in text and "lead of 24 h" in text
    for leads, word in (
        ((), "empty"),
        ((7,), "7 h"),
        ((0,), "0 h"),
        ((-6,), "-6 h"),
        ((6, 6), "twice"),
    ):
        assert word in refusal(statistics, fields, Split(0, 40), leads, cache=None)
    result = statistics(fields, Split(0, 40), (6,), cache=None)
    assert "03:00:00" in refusal(result.climatology, fields.times[:1] + np.timedelta64(3, "h"))


def same(a: Statistics, b: Statistics) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def test_cache(tmp_path, monkeypatch, capsys):
    fields, cache = opened(tmp_path), tmp_path / "cache" / "below"
    computed = statistics(fields, Split(0, 40), (6, 12), cache=cache)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Fields, "read", None)  # nothing is read a second time
        assert same(statistics(fields, Split(0, 40), (6, 12), cache=cache), computed)
    assert capsys.readouterr().err == ""
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (whole[: len(whole) // 2], b"", b"text", bytes(flipped)):
        file.write_bytes(broken)
        assert same(statistics(fields, Split(0, 40), (6, 12), cache=cache), computed)
        assert f"{file} is broken" in capsys.readouterr().err and file.read_bytes() == whole
    statistics(fields, Split(0, 41), (6, 12), cache=cache)
    statistics(fields, Split(0, 40), (6,), cache=cache)
    assert len(list(cache.iterdir())) == 3  # a file for each, and nothing left aside


# ---- samples


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data = record(times=300)
    fields = opened(tmp_path_factory.mktemp("samples"), data)
    return data, fields, statistics(fields, Split(0, 200, "train"), (6, 12, 24), cache=None)


def test_inputs_and_targets(prepared):
    data, fields, stats = prepared
    names = ("climatology", "latitude", "static", "time_of_year", "time_of_day")  # in any order
    samples = Samples(fields, Split(200, 250, "val"), stats, (6, 24), names)
    t0s = np.array([210, 203])
    inputs, target = samples.get(t0s)
    assert inputs.dtype == target.dtype == np.float32
    assert inputs.shape == (2, len(samples.input_names), 5, 8) and target.shape == (2, 2, 3, 5, 8)
    channels = ["t2m", "z500", "z850"]
    assert samples.input_names == (
        *channels,
        *(
            "time_of_day:sin",
            "time_of_day:cos",
            "time_of_year:sin",
            "time_of_year:cos",
            "latitude:sin",
            "static:lsm",
        ),
        *(f"climatology:{c}+{lead}h" for lead in (6, 24) for c in channels),
        *(f"climatology:{c}" for c in channels),
    )
    by_name = dict(zip(samples.input_names, inputs.swapaxes(0, 1), strict=True))
    x = stacked(data).astype("f8")
    np.testing.assert_allclose(
        by_name["z850"], (x[t0s, 2] - stats.mean[2]) / stats.std[2], atol=2e-5
    )
    time = data.time[t0s]
    hour = (time.dt.hour + data.longitude / 15) * 2 * np.pi / 24
    for name, f in (("sin", np.sin), ("cos", np.cos)):
        np.testing.assert_allclose(
            by_name[f"time_of_day:{name}"], f(hour).values[:, None, :].repeat(5, 1), atol=1e-6
        )
        year = (time.dt.dayofyear - 1 + time.dt.hour / 24) / 365.2425 * 2 * np.pi
        np.testing.assert_allclose(by_name[f"time_of_year:{name}"][:, 4, 7], f(year), atol=1e-6)
    np.testing.assert_allclose(
        by_name["latitude:sin"][1, :, 2], np.sin(np.deg2rad(data.latitude)), atol=1e-7
    )
    np.testing.assert_allclose(
        by_name["static:lsm"][0], (data.lsm - data.lsm.mean()) / data.lsm.std(), atol=1e-5
    )
    usual = stats.climatology(fields.times[t0s + 4])[:, 1]
    np.testing.assert_allclose(
        by_name["climatology:z500+24h"], (usual - stats.mean[1]) / stats.std[1], atol=2e-5
    )
    usual = stats.climatology(fields.times[t0s])[:, 0]
    np.testing.assert_allclose(
        by_name["climatology:t2m"], (usual - stats.mean[0]) / stats.std[0], atol=2e-5
    )
    change = (
        np.stack([x[t0s + 1] - x[t0s], x[t0s + 4] - x[t0s]], 1)
        / stats.std_change[[0, 2], :, None, None]
    )
    np.testing.assert_allclose(target, change, atol=2e-5)
    back = samples.to_fields(target, t0s)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, np.stack([x[t0s + 1], x[t0s + 4]], 1), rtol=2e-7)
    np.testing.assert_array_equal(samples.to_fields(target * 0, t0s)[:, 1], x[t0s])


def test_history_is_seen_and_the_damped_anomaly_corrected(prepared):
    data, fields, stats = prepared
    samples = Samples(
        fields,
        Split(200, 250, "val"),
        stats,
        (24, 6),
        ("climatology",),
        history=(12, 6),
        base="damped",
    )
    assert len(samples) == 44 and samples.starts(6)[[0, -1]].tolist() == [
        202,
        245,
    ]  # all times of a sample lie in the part
    x, t0s = stacked(data).astype("f8"), np.array([210, 203])
    inputs, target = samples.get(t0s)
    assert samples.input_names[3:9] == tuple(
        f"{c} since -{hours}h" for hours in (12, 6) for c in ("t2m", "z500", "z850")
    )
    by_name = dict(zip(samples.input_names, inputs.swapaxes(0, 1), strict=True))
    np.testing.assert_allclose(
        by_name["z500 since -12h"], (x[t0s, 1] - x[t0s - 2, 1]) / stats.std_change[1, 1], atol=2e-5
    )
    np.testing.assert_array_equal(samples.inputs_of(samples.seen(t0s), t0s), inputs)

    def usual(t):
        return stats.climatology(fields.times[t]).astype("f8")

    simple = []
    for i, steps in ((2, 4), (0, 1)):
        simple.append(usual(t0s + steps) + stats.damping[i][:, None, None] * (x[t0s] - usual(t0s)))
        left = (x[t0s + steps] - simple[-1]) / stats.std_damped[i][:, None, None]
        np.testing.assert_allclose(target[:, len(simple) - 1], left, atol=5e-5)
    np.testing.assert_allclose(samples.to_fields(target * 0, t0s), np.stack(simple, 1), rtol=2e-7)
    np.testing.assert_allclose(
        samples.to_fields(target, t0s), np.stack([x[t0s + 4], x[t0s + 1]], 1), rtol=2e-7
    )

    whole = Samples(
        fields, Split(200, 250, "val"), stats, (6, 24), (), base="none"
    )  # nothing is corrected: the fields themselves
    target = whole.get(t0s)[1]
    want = (np.stack([x[t0s + 1], x[t0s + 4]], 1) - stats.mean[:, None, None]) / stats.std[
        :, None, None
    ]
    np.testing.assert_allclose(target, want, atol=2e-5)
    np.testing.assert_allclose(
        whole.to_fields(target, t0s), np.stack([x[t0s + 1], x[t0s + 4]], 1), rtol=1e-6
    )

    valid = Samples(fields, Split(0, 10, "first"), stats, (6,), where="valid", history=(24,))
    assert valid.starts(6).tolist() == [4, 5, 6, 7, 8] and "t0=3" in refusal(valid.get, [3])
    assert "history: 7 h" in refusal(Samples, fields, Split(0, 40), stats, (6,), history=(7,))
    assert "lead 18 h is not in the statistics" in refusal(
        Samples, fields, Split(0, 40), stats, (6,), history=(18,)
    )
    assert "base='best'" in refusal(Samples, fields, Split(0, 40), stats, (6,), base="best")
    assert "too few for a lead of 24 h and a history of 24 h" in refusal(
        Samples, fields, Split(0, 8), stats, (24,), history=(24,)
    )


def test_where_samples_lie(prepared):
    _, fields, stats = prepared
    inside = Samples(fields, Split(200, 250, "val"), stats, (6, 24))
    assert len(inside) == 46 and inside.starts(6).tolist() == list(range(200, 246))
    assert "t0=246" in refusal(inside.get, [246]) and "t0=199" in refusal(inside.get, [199])
    valid = Samples(fields, Split(296, 300, "test"), stats, (6, 24), where="valid")
    assert valid.starts(6).tolist() == [295, 296, 297, 298] and valid.starts(24).tolist() == [
        292,
        293,
        294,
        295,
    ]
    _, target = valid.get([298])
    assert (
        np.isfinite(target[0, 0]).all() and np.isnan(target[0, 1]).all()
    )  # the record ends before 298 + 4
    first = Samples(fields, Split(0, 10, "first"), stats, (24,), where="valid")
    assert first.starts(24).tolist() == [0, 1, 2, 3, 4, 5]
    assert "no order" in refusal(valid.order, 0, 0)
    assert "lead 12 h" in refusal(valid.starts, 12)


def test_order_is_a_function_of_the_step(prepared):
    _, fields, stats = prepared
    samples = Samples(fields, Split(200, 250), stats, (24,))
    for epoch in (0, 1):
        assert sorted(samples.order(epoch, 5)) == list(range(200, 246))
    assert not np.array_equal(samples.order(0, 5), samples.order(1, 5))
    assert not np.array_equal(samples.order(0, 5), samples.order(0, 6))
    three = np.concatenate([samples.order(epoch, 5) for epoch in range(3)])
    for batch in (1, 7, 46, 100):  # also more than an epoch
        rows = np.concatenate([samples.rows(step, batch, 5) for step in range(len(three) // batch)])
        np.testing.assert_array_equal(rows, three[: len(rows)])
    elsewhere = Samples(
        fields, Split(100, 150), stats, (6, 24), inputs=()
    )  # as many samples: the same order
    np.testing.assert_array_equal(elsewhere.order(2, 5) - 100, samples.order(2, 5) - 200)
    assert samples.order(0, 5)[:5].tolist() == [
        207,
        221,
        232,
        214,
        222,
    ]  # frozen: a run must go on with any numpy
    assert "step=-1" in refusal(samples.rows, -1, 4, 0)


def test_time_of_year_needs_60_days(tmp_path):
    for times, long_enough in ((239, False), (240, True)):
        fields = opened(tmp_path, record(times=times), f"{times}.nc")
        stats = statistics(fields, Split(0, 100), (6,), cache=None)
        names = Samples(fields, Split(0, 100), stats, (6,)).input_names
        assert ("time_of_year:sin" in names) is long_enough and "time_of_day:sin" in names


def test_samples_refusals(tmp_path, prepared):
    data, fields, stats = prepared
    split = Split(200, 250, "val")
    assert "'moon'" in refusal(Samples, fields, split, stats, (6,), ("moon",))
    assert "where='here'" in refusal(Samples, fields, split, stats, (6,), where="here")
    assert "lead 18 h" in refusal(Samples, fields, split, stats, (18,))
    text = refusal(Samples, fields, Split(200, 204, "val"), stats, (6, 24))
    assert "val has 4 times" in text and "24 h" in text
    text = refusal(Samples, fields, Split(0, 4, "test"), stats, (6, 24), where="valid")
    assert "test (0/4)" in text and "24 h" in text
    other = opened(tmp_path, data, variables=["t2m"])
    assert "statistics are of t2m, z500, z850" in refusal(Samples, other, split, stats, (6,))
    bare = opened(tmp_path, data.drop_vars("lsm"), "bare.nc")
    assert "no static fields" in refusal(Samples, bare, split, stats, (6,), ("static",))
    holes = data.copy(deep=True)
    holes["lsm"][0, 0] = np.nan
    holes["t2m"][230, 1, 1] = np.nan
    damaged = opened(tmp_path, holes, "holes.nc")
    assert "lsm is missing at 1 of 40" in refusal(Samples, damaged, split, stats, (6,), ("static",))
    samples = Samples(damaged, split, stats, (6,))
    samples.get([228])
    assert "t2m is missing (or infinite) at 1 of 40 points at 2001-03-28T12" in refusal(
        samples.get, [229]
    )
    assert "prediction has shape" in refusal(samples.to_fields, np.zeros((1, 1, 3, 5, 7)), [228])


def test_a_static_field_without_contrast_is_zero(tmp_path):
    data = record()
    data["lsm"] = data.lsm * 0 + np.float32(0.3)
    fields = opened(tmp_path, data)
    samples = Samples(
        fields, Split(0, 40), statistics(fields, Split(0, 40), (6,), cache=None), (6,), ("static",)
    )
    assert (samples.get([0])[0][:, 3] == 0).all()


# ---- real data


@needs_era5
def test_era5_baselines():
    """Persistence, climatology and the damped anomaly have known errors.

    They are of the valid hours 576..743, trained on the first 504."""
    fields = open_fields(ERA5)
    assert (
        fields.channels == ("t2m",)
        and fields.grid.shape == (33, 49)
        and len(fields) == 744
        and fields.step_hours == 1
    )
    assert not fields.grid.periodic and fields.units["t2m"] == "K"
    parts = splits(fields, "0/504", "504/576", "576/744")
    stats = statistics(fields, parts["train"], (1, 3, 6), cache=None)
    samples = Samples(fields, parts["test"], stats, (1, 3, 6), where="valid")
    weights = fields.grid.weights()[:, None]
    known = {1: (0.576, 1.839, 0.432), 3: (1.557, 1.839, 1.062), 6: (2.683, 1.839, 1.648)}
    for i, lead in enumerate((1, 3, 6)):
        t0 = samples.starts(lead)
        assert (t0[0] + lead, t0[-1] + lead) == (576, 743)
        x, truth = (fields.read(t)[:, 0].astype("f8") for t in (t0, t0 + lead))
        before, usual = (stats.climatology(fields.times[t])[:, 0] for t in (t0, t0 + lead))
        forecasts = (x, usual, usual + stats.damping[i, 0] * (x - before))
        assert (
            tuple(round(float(np.sqrt((weights * (f - truth) ** 2).mean())), 3) for f in forecasts)
            == known[lead]
        )
