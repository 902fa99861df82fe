"""The shallow-water equations on the rotating sphere, by the spectral transform method.

The equations are solved in vorticity-divergence form (Williamson et al. 1992, J. Comput. Phys. 102, 211-224, "W92"; Hack & Jakob
1992, NCAR/TN-343+STR), truncated triangularly, by semi-implicit leapfrog.  The transforms are matrix products of numpy: the
libraries for spherical harmonics need compilers or accelerators to install.
"""

import numpy as np

RADIUS = 6.37122e6  # m; this and the next two as in W92
OMEGA = 7.292e-5  # s-1
GRAVITY = 9.80616  # m s-2


# ---- the sphere


class Sphere:
    """Spherical harmonics up to degree `truncation`, and the Gaussian grid on which products of two of them are exact.

    On the grid, K fields are [K, lat, lon] float64, from north to south and from 0 degrees to the east.  Their coefficients are
    [m, n, K] complex128, order m and degree n both 0..truncation, zero where n < m; those of negative order are the conjugates.
    The harmonics are normalised to a mean square of 1 over the sphere, so that coefficient [0, 0] is the mean.

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
        rows = (
            -(-(3 * truncation + 1) // 4) * 2
        )  # even, and 2 * rows >= 3 T + 1: no aliasing of products
        self.shape = (rows, 2 * rows)
        mu, weights = np.polynomial.legendre.leggauss(rows)
        self.mu = mu[::-1].copy()  # sine of the latitude
        self.weights = weights[::-1] / 2  # of each row in the mean over the sphere; they sum to 1
        self.cos = np.sqrt(1 - self.mu**2)[:, None]
        self.latitude = np.degrees(np.arcsin(self.mu))
        self.longitude = np.arange(2 * rows) * (360 / (2 * rows))
        self.order, self.degree = np.ogrid[: truncation + 1, : truncation + 1]
        self.laplacian = (
            -self.degree * (self.degree + 1) / radius**2
        )  # [1, n], m-2: a harmonic's Laplacian is so much of itself
        self.inverse_laplacian = np.divide(
            1, self.laplacian, out=np.zeros_like(self.laplacian), where=self.degree > 0
        )
        p, slope = legendre(truncation, self.mu)  # [m, n, lat]
        along, across = (
            self.order[..., None] * p / (radius * self.cos[:, 0]),
            slope / (radius * self.cos[:, 0]),
        )
        self._values, self._along, self._across = (x * self.weights for x in (p, along, across))
        self._values_at = _turned(p)  # [m, lat, n]
        self._along_at, self._across_at = (
            _turned(x * self.inverse_laplacian[..., None]) for x in (along, across)
        )

    def grid(self, coefficients: np.ndarray) -> np.ndarray:
        """[m, n, K] -> [K, lat, lon]: the fields of these coefficients."""
        return self._from_waves(_product(self._values_at, coefficients))

    def spectral(self, fields: np.ndarray) -> np.ndarray:
        """[K, lat, lon] -> [m, n, K]: their coefficients, by Gaussian quadrature; what is above the truncation is lost."""
        return _product(self._values, self._waves(fields))

    def winds(self, rotation: np.ndarray) -> np.ndarray:
        """Vorticity and divergence [m, n, 2], s-1 -> the eastward and northward wind [2, lat, lon], m s-1."""
        x, y = 1j * _product(self._along_at, rotation), _product(self._across_at, rotation)
        return self._from_waves(np.stack([x[..., 1] - y[..., 0], x[..., 0] + y[..., 1]], -1))

    def curl_div(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K vector fields, their eastward and northward parts [K, lat, lon] -> curl and divergence, each [m, n, K], over m.

        By parts: the derivative along the meridian falls upon the Legendre functions."""
        waves, k = self._waves(np.concatenate([u, v])), len(u)
        x, y = 1j * _product(self._along, waves), _product(self._across, waves)
        return x[..., k:] + y[..., :k], x[..., :k] - y[..., k:]

    def mean(self, fields: np.ndarray) -> np.ndarray:
        """[..., lat, lon] -> [...]: the mean over the sphere's area."""
        return fields.mean(-1) @ self.weights

    def _waves(self, fields: np.ndarray) -> np.ndarray:  # [m, lat, K]
        return np.fft.rfft(fields, norm="forward")[..., : self.truncation + 1].T

    def _from_waves(self, waves: np.ndarray) -> np.ndarray:
        return np.fft.irfft(waves.T, self.shape[1], norm="forward")


def _turned(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 2, 1).copy()


def _product(matrices: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[m, rows, cols] real times [m, cols, K] complex: a product for each m, real and imaginary parts side by side."""
    return (matrices @ np.ascontiguousarray(x).view(np.float64)).view(np.complex128)


def legendre(truncation: int, mu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Associated Legendre functions P and (1 - mu^2) dP/dmu at `mu` [points] in (-1, 1): each [m, n, points], 0..truncation.

    Without the sign (-1)^m, normalised to mean squares of 1 over -1..1, by recurrence in n."""
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
        if k:
            slope[:, k] += (k + 1) * epsilon[:, k, None] * p[:, k - 1]
    return p[:-1, :-1], slope[:-1, :-1]


# ---- the equations


class ShallowWater:
    """The shallow-water equations without forcing or dissipation, in W92's vorticity-divergence form.

    A state is [m, n, 3] complex128: coefficients of the wind's relative vorticity and divergence, s-1, and of g times the depth of
    the fluid, m2 s-2.

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
        ground = np.zeros(sphere.shape) if orography is None else GRAVITY * orography
        self.ground = sphere.spectral(ground[None])[
            ..., 0
        ]  # m2 s-2, as all that has to do with heights here
        self.coriolis = 2 * OMEGA * sphere.mu[:, None] if coriolis is None else coriolis

    def tendency(self, state: np.ndarray) -> np.ndarray:
        """The state's rate of change, [m, n, 3]."""
        u, v = self.sphere.winds(state[..., :2])
        carried = self.sphere.grid(state[..., ::2])  # absolute vorticity, depth
        carried[0] += self.coriolis
        curl, div = self.sphere.curl_div(u * carried, v * carried)
        energy = (
            self.sphere.spectral((u * u + v * v)[None] / 2)[..., 0] + state[..., 2] + self.ground
        )
        return np.stack(
            [-div[..., 0], curl[..., 0] - self.sphere.laplacian * energy, -div[..., 1]], -1
        )

    def leap(
        self, before: np.ndarray, now: np.ndarray, rate: np.ndarray, step: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """From the states at t - step and t and the rate at t: the state at t + step, and its second difference in time.

        Leapfrog, with gravity waves on the mean depth averaged over t - step and t + step (Robert 1969; W92's model does the same):
        (after - before) / 2 step = rate + L (after - 2 now + before) / 2, L being their linear part, solved for the bracket.
        A wave of frequency s then has atan(s step) / step, and is stable for steps of any length."""
        mean, laplacian = now[0, 0, 2].real, self.sphere.laplacian
        bend = 2 * (before - now + step * rate)
        bend[..., 2] = (bend[..., 2] - step * mean * bend[..., 1]) / (
            1 - step**2 * mean * laplacian
        )
        bend[..., 1] -= step * laplacian * bend[..., 2]
        return 2 * now - before + bend, bend

    def fields(self, state: np.ndarray) -> np.ndarray:
        """[3, lat, lon]: u and v, m s-1, and the height h of the free surface, m."""
        surface = state[..., 2:] + self.ground[..., None]
        return np.concatenate(
            [self.sphere.winds(state[..., :2]), self.sphere.grid(surface) / GRAVITY]
        )

    def state(self, fields: np.ndarray) -> np.ndarray:
        """The state of these fields u, v, h, as far as the truncation holds them."""
        curl, div = self.sphere.curl_div(fields[:1], fields[1:2])
        depth = GRAVITY * self.sphere.spectral(fields[2:]) - self.ground[..., None]
        return np.concatenate([curl, div, depth], -1)

    def balanced(self, u: np.ndarray, height: float) -> np.ndarray:
        """The steady state over flat ground of the zonal wind u [lat, 1], m s-1, with a free surface of mean `height`, m, and the
        ground then lifted under it.

        The surface is what keeps the divergence from changing (gradient-wind balance)."""
        wind = np.broadcast_to(u, self.sphere.shape)
        state = self.state(np.stack([wind, 0 * wind, 0 * wind]))  # no height: surface at 0
        state[..., 2] += self.tendency(state)[..., 1] * self.sphere.inverse_laplacian
        state[0, 0, 2] += GRAVITY * height
        return state
