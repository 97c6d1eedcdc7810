"""Two-dimensional test problems: distributions to sample from, and unnormalised densities.

The samplers are those that FFJORD (Grathwohl et al., 2019) made customary. The energies U of the
densities exp(-U(x)) / Z are those of Rezende and Mohamed (2015), table 1.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from sklearn.datasets import make_moons, make_swiss_roll

Sampler = Callable[[Generator, int], np.ndarray]  # n -> n independent points (n, 2)
Energy = Callable[[torch.Tensor], torch.Tensor]  # points (..., 2) -> U of each (...)


# --------------------------------------------------------------------------------------- samplers


def eight_gaussians(rng: Generator, n: int) -> np.ndarray:
    """Draw from eight Gaussians on a circle."""
    angle = rng.integers(8, size=n) * np.pi / 4
    centre = 4 * on_unit_circle(angle)
    noise = 0.5 * rng.normal(size=(n, 2))
    return (centre + noise) / math.sqrt(2)


def two_spirals(rng: Generator, n: int) -> np.ndarray:
    """Draw from two spiral arms that are each other's mirror image in the origin."""
    t = np.sqrt(rng.random(n)) * 3 * np.pi
    x, y = -t * np.cos(t), t * np.sin(t)
    spiral = np.stack([x, y], axis=1)
    arm = spiral + rng.random((n, 2)) / 2

    sign = rng.choice([-1, 1], (n, 1))
    return arm * sign / 3 + 0.1 * rng.normal(size=(n, 2))


def checkerboard(rng: Generator, n: int) -> np.ndarray:
    """Draw uniformly from the eight dark squares, of side 2, of a board over [-4, 4]^2."""
    x = rng.random(n) * 4 - 2
    y = rng.random(n) - 2 * rng.integers(2, size=n)
    y = y + np.floor(x) % 2
    return 2 * np.stack([x, y], axis=1)


def rings(rng: Generator, n: int) -> np.ndarray:
    """Draw from four concentric rings, each as likely as the others."""
    angle = 2 * np.pi * rng.random(n)
    radius = rng.integers(1, 5, n) / 4
    points = 3 * radius[:, None] * on_unit_circle(angle)
    return points + 0.08 * rng.normal(size=(n, 2))


def moons(rng: Generator, n: int) -> np.ndarray:
    """Draw from two interleaved half moons, centred."""
    # make_moons puts exactly half of its points on each moon. Half of twice as many, shuffled, are
    # independent: how many of them are on which moon is left to chance.
    points, _ = make_moons(2 * n, noise=0.1, random_state=random_seed(rng))
    return 2 * points[:n] + [-1, -0.2]


def pinwheel(rng: Generator, n: int) -> np.ndarray:
    """Draw from five Gaussians around the origin, bent into the arms of a pinwheel."""
    radial = 1 + 0.3 * rng.normal(size=n)
    arm = 2 * np.pi / 5 * rng.integers(5, size=n)
    angle = arm + 0.25 * np.exp(radial)
    tangential = 0.1 * rng.normal(size=n)

    cos, sin = np.cos(angle), np.sin(angle)
    x = radial * cos - tangential * sin
    y = radial * sin + tangential * cos
    return 2 * np.stack([x, y], axis=1)


def swissroll(rng: Generator, n: int) -> np.ndarray:
    """Draw from scikit-learn's Swiss roll, seen along its axis."""
    points, _ = make_swiss_roll(n, noise=1.0, random_state=random_seed(rng))
    return points[:, [0, 2]] / 5


def on_unit_circle(angle: np.ndarray) -> np.ndarray:
    """Return the points (n, 2) of the unit circle at the given angles (n,)."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def random_seed(rng: Generator) -> int:
    """Draw a seed for scikit-learn, which takes no numpy ``Generator``."""
    return int(rng.integers(2**31))


SAMPLERS: dict[str, Sampler] = {
    '8gaussians': eight_gaussians,
    '2spirals': two_spirals,
    'checkerboard': checkerboard,
    'rings': rings,
    'moons': moons,
    'pinwheel': pinwheel,
    'swissroll': swissroll,
}


# --------------------------------------------------------------------------------------- energies
# u2, u3 and u4 are periodic in x1, so the paper's densities have no normaliser. Walls confine them
# to |x1| <= 4, the part that the paper's figures show.


def u1(x: torch.Tensor) -> torch.Tensor:
    """Two half moons on a ring of radius 2."""
    x1 = x[..., 0]
    ring = gaussian_energy(x.norm(dim=-1) - 2, 0.4)
    return ring + energy_of_sum(gaussian_energy(x1 - 2, 0.6), gaussian_energy(x1 + 2, 0.6))


def u2(x: torch.Tensor) -> torch.Tensor:
    """One sine wave."""
    return gaussian_energy(height_above_wave(x), 0.4) + walls(x)


def u3(x: torch.Tensor) -> torch.Tensor:
    """A sine wave that splits into two around x1 = 1."""
    bump = 3 * torch.exp(-gaussian_energy(x[..., 0] - 1, 0.6))
    return walls(x) + energy_of_sum(
        gaussian_energy(height_above_wave(x), 0.35),
        gaussian_energy(height_above_wave(x) + bump, 0.35),
    )


def u4(x: torch.Tensor) -> torch.Tensor:
    """A sine wave that becomes two beyond x1 = 1."""
    step = 3 * torch.sigmoid((x[..., 0] - 1) / 0.3)
    return walls(x) + energy_of_sum(
        gaussian_energy(height_above_wave(x), 0.4),
        gaussian_energy(height_above_wave(x) + step, 0.35),
    )


def height_above_wave(x: torch.Tensor) -> torch.Tensor:
    """Return how far x2 is above the sine wave at x1."""
    return x[..., 1] - torch.sin(math.pi / 2 * x[..., 0])


def walls(x: torch.Tensor) -> torch.Tensor:
    """Return an energy that is 0 for |x1| <= 4 and rises steeply beyond."""
    depth = F.relu(x[..., 0].abs() - 4)
    return depth.square() / (2 * 0.2**2)


def gaussian_energy(distance: torch.Tensor, width: float) -> torch.Tensor:
    """Return -log of a Gaussian bump of height 1 and standard deviation ``width``."""
    return (distance / width).square() / 2


def energy_of_sum(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the energy of the sum of two densities that are given by their energies."""
    return -torch.logaddexp(-first, -second)


ENERGIES: dict[str, Energy] = {'u1': u1, 'u2': u2, 'u3': u3, 'u4': u4}


def log_normaliser(energy: Energy, extent: float = 8.0, n: int = 2001) -> float:
    """Return log Z by the trapezoidal rule on an n x n grid over [-extent, extent]^2.

    The density has to vanish at the edges of the grid: their half weights are left out.
    """
    axis = torch.linspace(-extent, extent, n, dtype=torch.float64)
    u = energy(torch.cartesian_prod(axis, axis))
    log_cell_area = 2 * torch.log(axis[1] - axis[0])
    return (torch.logsumexp(-u, dim=0) + log_cell_area).item()
