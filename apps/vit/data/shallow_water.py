"""The shallow-water equations on the rotating sphere, solved by the spectral transform method.

The equations have the vorticity-divergence form of Williamson et al. 1992, J. Comput. Phys. 102,
211-224 ("W92" below); the method is that of Hack & Jakob 1992, NCAR/TN-343+STR: triangular
truncation and semi-implicit leapfrog steps.  The transforms are matrix products of numpy, because
the libraries for spherical harmonics need compilers or accelerators to install.

Symbols:
    T           truncation: the greatest degree of a harmonic
    m, n        order and degree of a harmonic, both 0..T
    mu          sine of the latitude
    P           associated Legendre functions of mu
    K           number of fields that are transformed together
    u, v        eastward and northward wind, m s-1
    h           height of the free surface, m
    t           time, s
    lat, lon    rows and columns of the grid
"""

import numpy as np

RADIUS = 6.37122e6  # m, of the Earth; this and the next two as in W92
OMEGA = 7.292e-5  # s-1, of the Earth's rotation
GRAVITY = 9.80616  # m s-2


# ---- the sphere


class Sphere:
    """Spherical harmonics up to a degree, and the Gaussian grid on which their products are exact.

    On the grid, K fields are [K, lat, lon] float64, from north to south and from 0 degrees to the
    east.  Their coefficients are [m, n, K] complex128, zero where n < m; those of negative order
    are the conjugates.  The harmonics are normalised to a mean square of 1 over the sphere, so
    that coefficient [0, 0] is the mean.

    Args:
        truncation: T of the triangular truncation, at least 1.
        radius: m.

    Raises:
        ValueError: truncation below 1.
    """

    def __init__(self, truncation: int, radius: float = RADIUS):
        if truncation < 1:
            raise ValueError(f"truncation={truncation} must be at least 1.")
        self.truncation = truncation
        # The number of rows is even and 2 * rows >= 3 T + 1: products of two fields do not alias.
        rows = -(-(3 * truncation + 1) // 4) * 2
        columns = 2 * rows
        self.shape = (rows, columns)
        mu, weights = np.polynomial.legendre.leggauss(rows)
        self.mu = mu[::-1].copy()  # [lat]
        self.weights = weights[::-1] / 2  # [lat], of a row in the mean over the sphere; sum 1
        self.cos = np.sqrt(1 - self.mu**2)[:, None]  # [lat, 1]
        self.latitude = np.degrees(np.arcsin(self.mu))
        self.longitude = np.arange(columns) * (360 / columns)
        self.order, self.degree = np.ogrid[: truncation + 1, : truncation + 1]
        # [1, n], m-2: the Laplacian of a harmonic is this multiple of the harmonic.
        self.laplacian = -self.degree * (self.degree + 1) / radius**2
        self.inverse_laplacian = np.divide(
            1, self.laplacian, out=np.zeros_like(self.laplacian), where=self.degree > 0
        )
        p, slope = legendre(truncation, self.mu)  # [m, n, lat]
        d_lon = self.order[..., None] * p / (radius * self.cos[:, 0])  # eastward derivative / i
        d_lat = slope / (radius * self.cos[:, 0])  # northward derivative
        # Matrices from waves along the rows to coefficients, [m, n, lat].
        self._analysis = p * self.weights
        self._analysis_d_lon = d_lon * self.weights
        self._analysis_d_lat = d_lat * self.weights
        # Matrices from coefficients to waves along the rows, [m, lat, n].
        inverse = self.inverse_laplacian[..., None]
        self._synthesis = _swap_last_two(p)
        self._wind_d_lon = _swap_last_two(d_lon * inverse)
        self._wind_d_lat = _swap_last_two(d_lat * inverse)

    def grid(self, coefficients: np.ndarray) -> np.ndarray:
        """[m, n, K] -> [K, lat, lon]: the fields of these coefficients."""
        return self._from_waves(_product(self._synthesis, coefficients))

    def spectral(self, fields: np.ndarray) -> np.ndarray:
        """[K, lat, lon] -> [m, n, K]: their coefficients, by Gaussian quadrature.

        What is above the truncation is lost."""
        return _product(self._analysis, self._waves(fields))

    def winds(self, rotation: np.ndarray) -> np.ndarray:
        """Winds of a vorticity and a divergence.

        Args:
            rotation: [m, n, 2], s-1: vorticity and divergence.

        Returns:
            [2, lat, lon], m s-1: eastward and northward wind."""
        x = 1j * _product(self._wind_d_lon, rotation)
        y = _product(self._wind_d_lat, rotation)
        u = x[..., 1] - y[..., 0]
        v = x[..., 0] + y[..., 1]
        return self._from_waves(np.stack([u, v], -1))

    def curl_div(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Curl and divergence, each [m, n, K], of K vector fields.

        By parts: it is the Legendre functions that are differentiated along the meridian, not the
        fields.

        Args:
            u, v: [K, lat, lon] each: the eastward and the northward component."""
        k = len(u)
        waves = self._waves(np.concatenate([u, v]))
        x = 1j * _product(self._analysis_d_lon, waves)
        y = _product(self._analysis_d_lat, waves)
        curl = x[..., k:] + y[..., :k]
        divergence = x[..., :k] - y[..., k:]
        return curl, divergence

    def mean(self, fields: np.ndarray) -> np.ndarray:
        """[..., lat, lon] -> [...]: the mean over the sphere's area."""
        return fields.mean(-1) @ self.weights

    def _waves(self, fields: np.ndarray) -> np.ndarray:
        """[K, lat, lon] -> [m, lat, K]: the Fourier coefficients along each row."""
        return np.fft.rfft(fields, norm="forward")[..., : self.truncation + 1].T

    def _from_waves(self, waves: np.ndarray) -> np.ndarray:
        """[m, lat, K] -> [K, lat, lon]: the inverse of ``_waves``."""
        return np.fft.irfft(waves.T, self.shape[1], norm="forward")


def _swap_last_two(matrices: np.ndarray) -> np.ndarray:
    """[m, a, b] -> [m, b, a], contiguous."""
    return np.moveaxis(matrices, 2, 1).copy()


def _product(matrices: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[m, rows, cols] real times [m, cols, K] complex: one matrix product for each m.

    Real and imaginary parts are side by side in one real product."""
    return (matrices @ np.ascontiguousarray(x).view(np.float64)).view(np.complex128)


def legendre(truncation: int, mu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Associated Legendre functions P and (1 - mu^2) dP/dmu, by recurrence in n.

    They are normalised to mean squares of 1 over -1..1 and lack the sign (-1)^m.

    Args:
        truncation: T.
        mu: [points] in (-1, 1).

    Returns:
        P and (1 - mu^2) dP/dmu, each [m, n, points]."""
    size = truncation + 2
    n, m = np.arange(size)[None, :], np.arange(size)[:, None]
    epsilon = np.sqrt(np.maximum(n**2 - m**2, 0) / (4 * n**2 - 1))  # [m, n]
    p = np.zeros((size, size, len(mu)))
    p[0, 0] = 1
    for k in range(1, size):
        p[k, k] = np.sqrt((2 * k + 1) / (2 * k)) * np.sqrt(1 - mu**2) * p[k - 1, k - 1]
    for k in range(1, size):
        orders = slice(0, k)  # those with m < n
        before = epsilon[orders, k - 1, None] * p[orders, k - 2] if k > 1 else 0
        p[orders, k] = (mu * p[orders, k - 1] - before) / epsilon[orders, k, None]
    slope = np.zeros_like(p)
    for k in range(size - 1):
        slope[:, k] = -k * epsilon[:, k + 1, None] * p[:, k + 1]
        if k > 0:
            slope[:, k] += (k + 1) * epsilon[:, k, None] * p[:, k - 1]
    return p[:-1, :-1], slope[:-1, :-1]


# ---- the equations


class ShallowWater:
    """The shallow-water equations without forcing or dissipation, in W92's form.

    A state is [m, n, 3] complex128: coefficients of the wind's relative vorticity and divergence,
    s-1, and of g times the depth of the fluid, m2 s-2.

    Args:
        sphere: the harmonics and the grid.
        orography: [lat, lon], m: the height of the ground; None is flat.
        coriolis: [lat, lon] or [lat, 1], s-1; None is the Earth's.
    """

    def __init__(
        self,
        sphere: Sphere,
        orography: np.ndarray | None = None,
        coriolis: np.ndarray | None = None,
    ):
        self.sphere = sphere
        if orography is None:
            ground = np.zeros(sphere.shape)
        else:
            ground = GRAVITY * orography
        # [m, n], m2 s-2: g times the height of the ground.
        self.ground = sphere.spectral(ground[None])[..., 0]
        if coriolis is None:
            coriolis = 2 * OMEGA * sphere.mu[:, None]
        self.coriolis = coriolis

    def tendency(self, state: np.ndarray) -> np.ndarray:
        """The state's rate of change, [m, n, 3]."""
        u, v = self.sphere.winds(state[..., :2])
        advected = self.sphere.grid(state[..., ::2])  # vorticity and g times the depth
        advected[0] += self.coriolis  # now the absolute vorticity
        curl, div = self.sphere.curl_div(u * advected, v * advected)
        kinetic = self.sphere.spectral((u * u + v * v)[None] / 2)[..., 0]
        energy = kinetic + state[..., 2] + self.ground
        vorticity_rate = -div[..., 0]
        divergence_rate = curl[..., 0] - self.sphere.laplacian * energy
        depth_rate = -div[..., 1]
        return np.stack([vorticity_rate, divergence_rate, depth_rate], -1)

    def leap(
        self, before: np.ndarray, now: np.ndarray, rate: np.ndarray, step: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """One leapfrog step.

        Gravity waves on the mean depth are averaged over t - step and t + step (Robert 1969; the
        model of W92 does the same): with L the linear operator of these waves,

            (after - before) / (2 step) = rate + L (after - 2 now + before) / 2

        is solved for the second difference, after - 2 now + before.  A wave of frequency s then
        has the frequency atan(s step) / step, and is stable for steps of any length.

        Args:
            before, now: the states at t - step and t.
            rate: the rate of change at t.
            step: s.

        Returns:
            The state at t + step, and the second difference."""
        mean = now[0, 0, 2].real  # g times the mean depth
        laplacian = self.sphere.laplacian
        d2 = 2 * (before - now + step * rate)  # first without L, then with it
        d2[..., 2] = (d2[..., 2] - step * mean * d2[..., 1]) / (1 - step**2 * mean * laplacian)
        d2[..., 1] -= step * laplacian * d2[..., 2]
        return 2 * now - before + d2, d2

    def fields(self, state: np.ndarray) -> np.ndarray:
        """[3, lat, lon]: u and v, m s-1, and h, m."""
        winds = self.sphere.winds(state[..., :2])
        surface = state[..., 2:] + self.ground[..., None]
        return np.concatenate([winds, self.sphere.grid(surface) / GRAVITY])

    def state(self, fields: np.ndarray) -> np.ndarray:
        """The state of the fields [u, v, h], as far as the truncation holds them."""
        curl, div = self.sphere.curl_div(fields[:1], fields[1:2])
        depth = GRAVITY * self.sphere.spectral(fields[2:]) - self.ground[..., None]
        return np.concatenate([curl, div, depth], -1)

    def balanced(self, u: np.ndarray, height: float) -> np.ndarray:
        """The steady state of a zonal wind over flat ground, with the ground then lifted under it.

        The surface is the one that keeps the divergence from changing (gradient-wind balance).

        Args:
            u: [lat, 1], m s-1.
            height: m: the mean of the free surface."""
        wind = np.broadcast_to(u, self.sphere.shape)
        state = self.state(np.stack([wind, 0 * wind, 0 * wind]))  # no height: surface at 0
        state[..., 2] += self.tendency(state)[..., 1] * self.sphere.inverse_laplacian
        state[0, 0, 2] += GRAVITY * height
        return state
