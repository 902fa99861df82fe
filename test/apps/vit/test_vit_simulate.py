"""apps/vit's simulation solves its equations, and makes the same record every time.

python -m pytest test/apps/vit/test_vit_simulate.py
"""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import xarray as xr

from apps.vit.data import simulate as module
from apps.vit.data.shallow_water import GRAVITY, OMEGA, RADIUS, ShallowWater, Sphere, legendre
from apps.vit.data.simulate import DAY, ForcedFlow, Settings, default_record, main, simulate

pytestmark = pytest.mark.fast

BARE = Settings(  # the equations alone
    jets=(),
    mountains=(),
    heating=0.0,
    stirring=0.0,
    kick=0.0,
    relaxation=math.inf,
    diffusion=math.inf,
    filter=0.0,
)
SMALL = Settings(truncation=10, spin_up=1)  # 16 x 32 points


@pytest.fixture(scope="module")
def sphere():
    return Sphere(21)


def rng(seed=0):
    return np.random.default_rng(seed)


def coefficients(sphere, k, seed=0):
    """Random ones of K real fields."""
    x = rng(seed).standard_normal(
        (2, *np.broadcast_shapes(sphere.order.shape, sphere.degree.shape), k)
    )
    c = (x[0] + 1j * x[1]) * (sphere.order <= sphere.degree)[..., None]
    c[0].imag = 0
    return c


def march(flow, state, steps):
    """The states at 0, 1, ..., steps."""
    return np.array(list(itertools.islice(flow.march(state, rng()), steps + 1)))


# ---- transforms


def test_legendre_functions_are_orthonormal():
    mu, w = np.polynomial.legendre.leggauss(40)
    p, _ = legendre(21, mu)
    gram = np.einsum("mnx,mkx,x->mnk", p, p, w / 2)
    m, n = np.ogrid[:22, :22]
    expected = np.eye(22)[None] * (m <= n)[..., None]
    np.testing.assert_allclose(gram, expected, atol=1e-12)


def test_legendre_functions_and_slopes_have_their_closed_forms():
    mu = np.linspace(-0.99, 0.99, 31)
    c = np.sqrt(1 - mu**2)
    p, slope = legendre(6, mu)
    closed = {  # (m, n): P, (1 - mu^2) dP/dmu
        (0, 0): (1 + 0 * mu, 0 * mu),
        (0, 2): (math.sqrt(5) * (3 * mu**2 - 1) / 2, math.sqrt(5) * 3 * mu * c**2),
        (1, 1): (math.sqrt(3 / 2) * c, -math.sqrt(3 / 2) * mu * c),
        (2, 3): (math.sqrt(105 / 8) * mu * c**2, math.sqrt(105 / 8) * (1 - 3 * mu**2) * c**2),
    }
    for at, (value, derivative) in closed.items():
        np.testing.assert_allclose(p[at], value, atol=1e-13, err_msg=str(at))
        np.testing.assert_allclose(slope[at], derivative, atol=1e-13, err_msg=str(at))
    for n in range(7):  # another recurrence: numpy's
        np.testing.assert_allclose(
            p[0, n], math.sqrt(2 * n + 1) * np.polynomial.Legendre.basis(n)(mu), atol=1e-13
        )


def test_the_grid_is_gaussian_and_the_default_one_32_by_64(sphere):
    assert sphere.shape == (32, 64)
    assert (
        (np.diff(sphere.latitude) < 0).all()
        and sphere.longitude[0] == 0
        and sphere.longitude[-1] == 354.375
    )
    np.testing.assert_allclose(sphere.weights.sum(), 1, rtol=1e-14)
    np.testing.assert_allclose(
        sphere.mean(np.broadcast_to(sphere.mu[:, None] ** 2, sphere.shape)), 1 / 3, rtol=1e-13
    )


@pytest.mark.parametrize("truncation", [1, 2, 5, 10, 21])
def test_band_limited_fields_come_back(truncation):
    sphere = Sphere(truncation)
    c = coefficients(sphere, 3)
    np.testing.assert_allclose(sphere.spectral(sphere.grid(c)), c, atol=1e-11)
    rotation = c[..., :2] * (sphere.degree > 0)[..., None]
    curl, div = sphere.curl_div(*(x[None] for x in sphere.winds(rotation)))
    np.testing.assert_allclose(np.concatenate([curl, div], -1), rotation, atol=1e-11)


def test_a_field_is_the_sum_of_its_harmonics(sphere):
    c = np.zeros((22, 22, 1), complex)
    c[2, 3], c[0, 0] = 0.5 * (3 - 4j), 7  # the one of order -2 is its conjugate: 2 Re(...)
    lon, mu = np.radians(sphere.longitude), sphere.mu[:, None]
    wave = math.sqrt(105 / 8) * mu * (1 - mu**2) * (3 * np.cos(2 * lon) + 4 * np.sin(2 * lon))
    np.testing.assert_allclose(sphere.grid(c)[0], 7 + wave, atol=1e-12)


def test_gradient_laplacian_and_rotation_agree_with_calculus(sphere):
    lon, lat = np.radians(sphere.longitude), np.radians(sphere.latitude)[:, None]
    s, c = np.sin(lat), np.cos(lat)
    chi = np.sin(2 * lon) * c**2 * s  # of degree 3: its Laplacian is -12 / a^2 of it
    gradient = (
        np.stack([2 * np.cos(2 * lon) * c * s, np.sin(2 * lon) * (c**3 - 2 * c * s**2)]) / RADIUS
    )
    curl, div = sphere.curl_div(gradient[:1], gradient[1:])
    np.testing.assert_allclose(sphere.grid(div)[0], -12 / RADIUS**2 * chi, atol=1e-25)
    np.testing.assert_allclose(sphere.grid(curl), 0, atol=1e-25)
    np.testing.assert_allclose(
        sphere.laplacian[..., None] * sphere.spectral(chi[None]), div, atol=1e-25
    )
    np.testing.assert_allclose(
        sphere.winds(np.concatenate([0 * div, div], -1)), gradient, atol=1e-18
    )
    np.testing.assert_allclose(
        sphere.winds(np.concatenate([div, 0 * div], -1)),
        gradient[::-1] * [[[-1]], [[1]]],
        atol=1e-18,
    )


# ---- the equations


def test_williamson_case_2_stays_as_it_is_whatever_its_tilt():
    """Steady geostrophic flow, its axis tilted by 45 degrees; W92, test case 2."""
    flow = ForcedFlow(dataclasses.replace(BARE, filter=0.03))
    sphere, tilt = flow.sphere, np.pi / 4
    lon, lat = np.radians(sphere.longitude), np.radians(sphere.latitude)[:, None]
    speed = 2 * np.pi * RADIUS / (12 * DAY)
    axis = np.sin(lat) * np.cos(tilt) - np.cos(lon) * np.cos(lat) * np.sin(tilt)
    u = speed * (np.cos(lat) * np.cos(tilt) + np.cos(lon) * np.sin(lat) * np.sin(tilt))
    v = np.broadcast_to(-speed * np.sin(lon) * np.sin(tilt), u.shape)
    h = (2.94e4 - (RADIUS * OMEGA * speed + speed**2 / 2) * axis**2) / GRAVITY
    flow.water = ShallowWater(sphere, coriolis=2 * OMEGA * axis)
    last = march(flow, flow.water.state(np.stack([u, v, h])), 5 * 48)[-1]
    after = flow.water.fields(last)
    np.testing.assert_allclose(after[:2], [u, v], atol=1e-7)
    np.testing.assert_allclose(after[2], h, atol=1e-6)


def haurwitz(sphere, omega, m, n, size):
    """Solid rotation omega and one harmonic: the vorticity [m, n]."""
    vorticity = np.zeros((sphere.truncation + 1,) * 2, complex)
    vorticity[0, 1] = 2 * omega / math.sqrt(3)
    vorticity[m, n] = size
    return vorticity


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 2), (4, 5), (3, 10), (7, 7)])
def test_vorticity_of_a_rossby_haurwitz_wave_turns_at_haurwitzs_speed(sphere, m, n):
    """Haurwitz 1940: its speed is omega - 2 (Omega + omega) / (n (n + 1)), whatever its size."""
    omega = 3e-6
    state = np.zeros((22, 22, 3), complex)
    state[..., 0] = haurwitz(sphere, omega, m, n, 2e-5 + 1e-5j)
    rate = ShallowWater(sphere).tendency(state)[..., 0]
    speed = omega - 2 * (OMEGA + omega) / (n * (n + 1))
    turning = -1j * m * speed * haurwitz(sphere, 0, m, n, 2e-5 + 1e-5j)
    np.testing.assert_allclose(rate, turning, atol=1e-22)


def test_a_rossby_wave_on_deep_water_turns_at_haurwitzs_speed():
    flow = ForcedFlow(
        dataclasses.replace(BARE, truncation=8, height=1e7, step=900)
    )  # so deep that the flow hardly diverges
    sphere, water = flow.sphere, flow.water
    omega, m, n = 4e-6, 3, 4
    state = np.zeros((9, 9, 3), complex)
    state[..., 0] = haurwitz(sphere, omega, m, n, 2e-6)
    state[..., 2] = (
        water.tendency(state)[..., 1] * sphere.inverse_laplacian
    )  # so that it does not diverge to begin with
    state[0, 0, 2] = GRAVITY * 1e7
    speed = omega - 2 * (OMEGA + omega) / (n * (n + 1))
    states = march(flow, state, 2 * 96)
    turned = -np.unwrap(np.angle(states[:, m, n, 0]))[-1] / m
    assert turned == pytest.approx(speed * 2 * DAY, rel=0.01)
    assert abs(states[-1, m, n, 0]) == pytest.approx(2e-6, rel=0.01)


def test_gravity_waves_have_the_frequency_of_the_scheme_and_in_its_limit_that_of_theory():
    """Without rotation the square of the frequency w0 of theory is g H n (n + 1) / a^2.

    That of the scheme, which averages over t - step and t + step, is w with tan(w step) = w0 step.
    Odd and even steps are apart without the filter: each of the two sequences is a cosine."""
    n, height = 5, 6000.0
    frequency = math.sqrt(GRAVITY * height * n * (n + 1)) / RADIUS
    for step, hours in ((3600, 48), (150, 6)):
        flow = ForcedFlow(dataclasses.replace(BARE, truncation=6, step=step, height=height))
        flow.water = ShallowWater(flow.sphere, coriolis=np.zeros((1, 1)))
        state = flow.target.copy()
        state[2, n, 2] = 1e-3
        wave = march(flow, state, hours * 3600 // step)[:, 2, n, 2].real
        cosine = math.cos(2 * math.atan(frequency * step))
        np.testing.assert_allclose(
            wave[4:] + wave[:-4], 2 * cosine * wave[2:-2], atol=1e-9, err_msg=str(step)
        )
    np.testing.assert_allclose(
        wave, 1e-3 * np.cos(frequency * step * np.arange(len(wave))), atol=2e-5
    )


def test_mass_and_energy_are_conserved_without_forcing():
    settings = dataclasses.replace(
        BARE, jets=Settings.jets, mountains=Settings.mountains, kick=50.0, step=600
    )
    flow = ForcedFlow(settings)
    sphere, ground = flow.sphere, flow.orography
    states = march(flow, flow.start(rng(3)), 2 * 144)
    mass = states[:, 0, 0, 2]
    assert np.abs(mass - mass[0]).max() <= 1e-13 * abs(mass[0])
    u, v, h = np.moveaxis(np.array([flow.water.fields(s) for s in states[::24]]), 1, 0)
    kinetic = sphere.mean((h - ground) * (u**2 + v**2) / 2)
    energy = kinetic + sphere.mean(GRAVITY * (h**2 - ground**2) / 2)
    assert np.ptp(kinetic) > 0.01 * kinetic[0]  # something happened
    assert np.ptp(energy) < 1e-3 * kinetic[0]


def test_water_at_rest_over_mountains_stays_at_rest():
    flow = ForcedFlow(dataclasses.replace(BARE, mountains=Settings.mountains, filter=0.03))
    assert np.ptp(flow.orography) > 2000
    after = flow.water.fields(march(flow, flow.target, 48)[-1])
    np.testing.assert_allclose(after[:2], 0, atol=1e-8)
    np.testing.assert_allclose(after[2], Settings.height, atol=1e-6)


# ---- the forcing


def test_the_jets_are_where_they_should_be_and_balanced():
    flow = ForcedFlow(dataclasses.replace(BARE, jets=Settings.jets))
    assert np.abs(flow.water.tendency(flow.target)[..., 0]).max() < 1e-20  # s-2
    assert np.abs(flow.water.tendency(flow.target)[..., 1]).max() < 1e-20
    u, v, h = flow.water.fields(flow.target)
    np.testing.assert_allclose(v, 0, atol=1e-9)
    lat = np.radians(flow.sphere.latitude)
    drawn = sum(
        s * np.exp(-(((flow.sphere.latitude - y) / w) ** 2)) for y, s, w in Settings.jets
    ) * np.cos(lat)
    np.testing.assert_allclose(u[:, 0], drawn, atol=0.03 * drawn.max())  # what T21 leaves of it
    slope = np.gradient(h[:, 0], lat) * GRAVITY / RADIUS  # -u (f + u tan(lat) / a): gradient wind
    wind = -u[:, 0] * (2 * OMEGA * np.sin(lat) + u[:, 0] * np.tan(lat) / RADIUS)
    np.testing.assert_allclose(
        slope[3:-3], wind[3:-3], atol=0.15 * np.abs(wind).max()
    )  # differences over 5.6 degrees


@pytest.mark.parametrize(("hour", "noon"), [(0, 180), (6, 90), (12, 0), (18, 270)])
def test_the_sun_is_highest_at_local_noon_and_adds_nothing_over_a_latitude(hour, noon):
    flow = ForcedFlow(dataclasses.replace(BARE, heating=100.0))
    rate = (
        flow.sphere.grid(flow.rate(3600 * hour, flow.target)[..., 2:])[0] / GRAVITY * DAY
    )  # m a day
    row = rate[15]
    assert flow.sphere.longitude[row.argmax()] == noon
    assert row.max() == pytest.approx(100 * (1 - 1 / np.pi), rel=0.03)  # max(0, cos), less its mean
    np.testing.assert_allclose(rate.mean(-1), 0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "n", "hours", "left"),
    [
        ({"relaxation": 2.0}, 5, 48, math.exp(-1)),
        ({"diffusion": 12.0}, 21, 12, math.exp(-1)),
        ({"diffusion": 12.0}, 10, 12, math.exp(-((10 * 11 / (21 * 22)) ** 4))),
    ],
)
def test_relaxation_and_diffusion_damp_at_their_rates(change, n, hours, left):
    flow = ForcedFlow(dataclasses.replace(BARE, **change))
    flow.water = ShallowWater(
        flow.sphere, coriolis=np.zeros((1, 1))
    )  # vorticity stays where it is, but for what is tested
    state = flow.target.copy()
    state[3, n, 0] = 1e-12
    last = march(flow, state, 2 * hours)[-1]
    assert last[3, n, 0].real / 1e-12 == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.2])
def test_the_filter_takes_off_its_share_of_the_second_difference(share):
    """A gravity wave against its two complex parts, each followed by itself."""
    n, step, height = 5, 3600, 6000.0
    flow = ForcedFlow(
        dataclasses.replace(BARE, truncation=6, step=step, height=height, filter=share)
    )
    flow.water = ShallowWater(flow.sphere, coriolis=np.zeros((1, 1)))
    state = flow.target.copy()
    state[2, n, 2] = 1e-3
    wave = march(flow, state, 50)[:, 2, n, 2].real
    turn = 1j * step * math.sqrt(GRAVITY * height * n * (n + 1)) / RADIUS
    x, factor = [1e-3 + 0j], (1 + turn / 2) / (1 - turn / 2)  # the first step is forward
    before = x[0]
    for _ in range(50):
        after = factor * before
        before = x[-1] + share * (after - 2 * x[-1] + before)
        x.append(after)
        factor = (1 + turn) / (1 - turn)
    np.testing.assert_allclose(wave, np.real(x), atol=1e-9)


@pytest.mark.parametrize("without", ["stirring", "kick"])
def test_the_seed_decides_both_the_start_and_the_stirring(without):
    settings = dataclasses.replace(SMALL, **{without: 0.0})
    a, b = (simulate(1, seed, settings=settings).h for seed in (0, 1))
    c = simulate(1, 0, settings=dataclasses.replace(settings, stirring=0.0, kick=0.0)).h
    assert float(np.abs(a - b).max()) > 1e-2 and float(np.abs(a - c).max()) > 1e-2


def test_the_start_is_disturbed_by_the_kick():
    flow = ForcedFlow(dataclasses.replace(BARE, kick=100.0))
    h = (
        np.array([flow.water.fields(flow.start(rng(seed)))[2] for seed in range(40)])
        - Settings.height
    )
    assert math.sqrt(flow.sphere.mean(h**2).mean()) == pytest.approx(100, rel=0.1)


def test_the_flow_is_weather_persistent_for_hours_and_not_for_days():
    settings = dataclasses.replace(Settings(), spin_up=15)
    h = simulate(16, 0, settings=settings).h.astype(np.float64)
    weights = np.cos(np.radians(h.latitude))

    def rms(x):
        return float(np.sqrt((x**2).weighted(weights).mean()))

    spread = rms(h - h.mean("time"))
    error = [
        rms(
            h.isel(time=slice(lead, None)).drop_vars("time")
            - h.isel(time=slice(None, -lead)).drop_vars("time")
        )
        for lead in (1, 4, 12)
    ]
    assert 30 < spread < 150
    assert (
        error[0] < 0.5 * spread
        and error[0] < 0.6 * error[1]
        and error[1] < 0.8 * error[2]
        and error[2] > 0.9 * spread
    )
    assert float(h.min()) > 3500 and float(h.max()) < 7500


# ---- the record


def test_the_record_is_a_cf_dataset(tmp_path):
    record = simulate(2, settings=dataclasses.replace(Settings(), spin_up=0))
    module.write(record, tmp_path / "new" / "r.nc")
    with xr.open_dataset(tmp_path / "new" / "r.nc", engine="netcdf4") as ds:
        xr.testing.assert_identical(ds.load(), record)
    assert dict(record.sizes) == {"time": 8, "latitude": 32, "longitude": 64}
    assert set(record.data_vars) == {"u", "v", "h", "orography"} and all(
        x.dtype == np.float32 for x in record.data_vars.values()
    )
    assert (np.diff(record.time) == np.timedelta64(6, "h")).all() and (
        np.diff(record.latitude) < 0
    ).all()
    for variable in record.variables.values():
        assert variable.attrs["long_name"] and variable.attrs["standard_name"]
    assert [record[x].units for x in ("u", "v", "h", "orography")] == ["m s-1", "m s-1", "m", "m"]
    assert (
        record.Conventions == "CF-1.8"
        and record.title
        and record.source
        and "seed=0" in record.history
    )
    assert json.loads(record.settings)["truncation"] == 21
    assert float(record.orography.max()) == pytest.approx(2500, rel=0.05)


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(tmp_path):
    files = [
        default_record(tmp_path / str(i), seed, days=2, settings=SMALL)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert files[0].name == files[1].name == files[2].name.replace("seed1", "seed0")
    assert files[0].read_bytes() == files[1].read_bytes()
    with xr.open_dataset(files[0]) as a, xr.open_dataset(files[2]) as b:
        assert float(np.abs(a.h - b.h).max()) > 10


def test_a_longer_record_begins_as_the_shorter_one():
    short, long = (simulate(days, 5, settings=SMALL) for days in (1, 2))
    xr.testing.assert_equal(long.isel(time=slice(4)), short)


def test_the_default_record_is_made_once_and_named_by_its_settings(tmp_path, monkeypatch):
    writes, write = [], xr.Dataset.to_netcdf
    monkeypatch.setattr(
        xr.Dataset,
        "to_netcdf",
        lambda self, path, **o: (writes.append(path), write(self, path, **o)),
    )
    file = default_record(tmp_path, days=1, settings=SMALL)
    assert file.name.startswith("shallow_water_16x32_seed0_") and file.suffix == ".nc"
    other = default_record(tmp_path, days=1, settings=dataclasses.replace(SMALL, heating=0.0))
    longer = default_record(tmp_path, days=2, settings=SMALL)
    assert len(writes) == 3 and not {file, other, longer} & set(writes)  # written aside
    assert len({file, other, longer}) == 3 and set(tmp_path.iterdir()) == {file, other, longer}
    monkeypatch.setattr(module, "simulate", None)  # cannot be called
    assert default_record(tmp_path, days=1, settings=SMALL) == file
    assert default_record.__kwdefaults__ == {"days": 400, "settings": Settings()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_it_leaves_no_half_file(tmp_path, monkeypatch, error):
    whole = xr.Dataset.to_netcdf

    def cut(self, path, **options):
        assert path.name.startswith(".") and path.suffix != ".nc"  # no one takes it for a record
        whole(self, path, **options)
        path.write_bytes(path.read_bytes()[:1000])
        raise error

    monkeypatch.setattr(xr.Dataset, "to_netcdf", cut)
    with pytest.raises(
        KeyboardInterrupt if error is KeyboardInterrupt else ValueError,
        match=r"$|cannot be written: No space left",
    ):
        default_record(tmp_path, days=1, settings=SMALL)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with xr.open_dataset(default_record(tmp_path, days=1, settings=SMALL)) as ds:
        assert ds.sizes["time"] == 4


def test_progress_is_reported_every_day_spin_up_included():
    reported = []
    simulate(2, settings=SMALL, progress=reported.append)
    assert reported == [1, 2, 3]


# ---- mistakes of the user


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate(0), r"days=0 must be a whole number of at least 1"),
        (lambda: simulate(2.5), r"days=2\.5 must be a whole number"),
        (lambda: simulate(1, -1), r"seed=-1 must be a whole number of at least 0"),
        (lambda: simulate(1, True), r"seed=True must be"),
        (lambda: Sphere(0), r"truncation=0 must be at least 1"),
        (lambda: Settings(truncation=42), r"truncation=42 must be 1\.\.21"),
        (lambda: Settings(step=7000), r"step=7000 must divide the 21600 s"),
        (lambda: Settings(spin_up=-1), r"spin_up=-1 must be at least 0 days"),
        (lambda: Settings(relaxation=0), r"relaxation=0 must be above 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_folder_that_is_a_file_is_named_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "simulate", None)  # cannot be called
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file.*cannot be written"):
        default_record(tmp_path / "file", days=1, settings=SMALL)
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "file" / "r.nc")])
    assert "cannot be written" in capsys.readouterr().err


def test_a_simulation_that_leaves_all_bounds_is_refused():
    with (
        pytest.raises(FloatingPointError, match=r"after .* days; take a shorter step than 21600 s"),
        np.errstate(all="ignore"),
    ):
        simulate(30, settings=dataclasses.replace(Settings(), step=21600, heating=1e5))


def test_the_command_makes_a_file_and_keeps_one_that_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "DEFAULT", SMALL)
    monkeypatch.setattr(
        module,
        "simulate",
        lambda days, seed, progress: simulate(days, seed, settings=SMALL, progress=progress),
    )
    out = tmp_path / "sub" / "r.nc"
    assert main(["--out", str(out), "--days", "1", "--seed", "4"]) == 0
    assert "4 times of u, v, h on 16 x 32 points" in capsys.readouterr().out
    with xr.open_dataset(out) as ds:
        xr.testing.assert_equal(ds.load(), simulate(1, 4, settings=SMALL))
    for arguments, message in (
        (["--out", str(out)], "there already"),
        (["--out", f"{out}2", "--days", "0"], "days=0 must be"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err
    assert [f.name for f in out.parent.iterdir()] == ["r.nc"]
