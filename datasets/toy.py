"""Two-dimensional test problems: densities to draw samples from, and energies U(x) whose density is exp(-U(x)) / Z.

The samplers are the ones that FFJORD (Grathwohl et al., 2019) made customary; the energies are those of table 1 of
Rezende & Mohamed (2015).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import make_moons, make_swiss_roll

# --------------------------------------------------------------------------------------------------- samplers
# Each takes a numpy Generator and a number n and gives n independent points (n, 2).


def eight_gaussians(rng, n):
    angle = rng.integers(8, size=n) * np.pi / 4
    centre = 4 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return (centre + 0.5 * rng.normal(size=(n, 2))) / math.sqrt(2)


def two_spirals(rng, n):
    t = np.sqrt(rng.random(n)) * 3 * np.pi
    arm = np.stack([-t * np.cos(t), t * np.sin(t)], 1) + rng.random((n, 2)) / 2
    return arm * rng.choice([-1, 1], (n, 1)) / 3 + 0.1 * rng.normal(size=(n, 2))


def checkerboard(rng, n):
    """Uniform on the 8 dark squares, of side 2, of a board over [-4, 4]^2"""
    x = rng.random(n) * 4 - 2
    y = rng.random(n) - 2 * rng.integers(2, size=n) + np.floor(x) % 2
    return 2 * np.stack([x, y], 1)


def rings(rng, n):
    angle, radius = 2 * np.pi * rng.random(n), rng.integers(1, 5, n) / 4
    return 3 * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.08 * rng.normal(
        size=(n, 2)
    )


def moons(rng, n):
    points, _ = make_moons(2 * n, noise=0.1, random_state=int(rng.integers(2**31)))
    return 2 * points[:n] + [
        -1,
        -0.2,
    ]  # of twice as many, shuffled: how many lie on which moon is left to chance


def pinwheel(rng, n):
    radial = 1 + 0.3 * rng.normal(size=n)
    angle = 2 * np.pi / 5 * rng.integers(5, size=n) + 0.25 * np.exp(radial)
    tangential = 0.1 * rng.normal(size=n)
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.stack([radial * cos - tangential * sin, radial * sin + tangential * cos], 1)


def swissroll(rng, n):
    return make_swiss_roll(n, noise=1.0, random_state=int(rng.integers(2**31)))[0][:, [0, 2]] / 5


SAMPLERS = {
    '8gaussians': eight_gaussians,
    '2spirals': two_spirals,
    'checkerboard': checkerboard,
    'rings': rings,
    'moons': moons,
    'pinwheel': pinwheel,
    'swissroll': swissroll,
}


# --------------------------------------------------------------------------------------------------- energies
# Each takes points (..., 2) and gives U (...). u2 to u4 are periodic in x1 and have no normaliser: walls confine them
# to |x1| <= 4, which is what the papers' figures show.


def walls(x):
    return F.relu(x[..., 0].abs() - 4).square() / (2 * 0.2**2)


def wave(x):
    return x[..., 1] - torch.sin(math.pi / 2 * x[..., 0])


def u1(x):
    """Two half moons on a ring of radius 2"""
    ring = ((x.norm(dim=-1) - 2) / 0.4).square() / 2
    return ring - torch.logaddexp(
        -((x[..., 0] - 2) / 0.6).square() / 2, -((x[..., 0] + 2) / 0.6).square() / 2
    )


def u2(x):
    """One sine wave"""
    return (wave(x) / 0.4).square() / 2 + walls(x)


def u3(x):
    """A sine wave that splits into two around x1 = 1"""
    bump = 3 * torch.exp(-((x[..., 0] - 1) / 0.6).square() / 2)
    return walls(x) - torch.logaddexp(
        -(wave(x) / 0.35).square() / 2, -((wave(x) + bump) / 0.35).square() / 2
    )


def u4(x):
    """A sine wave that becomes two beyond x1 = 1"""
    step = 3 * torch.sigmoid((x[..., 0] - 1) / 0.3)
    return walls(x) - torch.logaddexp(
        -(wave(x) / 0.4).square() / 2, -((wave(x) + step) / 0.35).square() / 2
    )


ENERGIES = {'u1': u1, 'u2': u2, 'u3': u3, 'u4': u4}


def log_normaliser(energy, extent=8.0, n=2001):
    """log Z by the trapezoidal rule on an n x n grid over [-extent, extent]^2, outside of which nothing is left"""
    axis = torch.linspace(-extent, extent, n, dtype=torch.float64)
    u = energy(torch.cartesian_prod(axis, axis))
    return (torch.logsumexp(-u, 0) + 2 * torch.log(axis[1] - axis[0])).item()
