"""Components of variance of a square of trainings in which three causes vary."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats


class Component(NamedTuple):
    """The variance of one cause.

    Attributes:
        name: The cause.
        variance: Its estimate; below 0 if the cause has no more effect than chance.
        low: Lower end of its 95 % interval, at least 0.
        high: Upper end.
        p_value: Probability of at least such an effect if there were none; `None` for the rest.
    """

    name: str
    variance: float
    low: float
    high: float
    p_value: float | None


def split_variance(square: np.ndarray, names: tuple[str, str, str]) -> list[Component]:
    """Splits the variance of a Latin square into those of its causes and of the rest.

    The value in row i and column j has level i of the first cause, j of the second and
    (i + j) mod n of the third, so that all levels of one cause meet each level of another once.
    Effects are taken as normal and as adding up; what does not add up is part of the rest.

    Args:
        square: `[n, n]`, n at least 3.
        names: The three causes.

    Returns:
        The components in the order of the names, and the rest. They sum to the variance of a
        training that draws everything for itself.
    """
    size = len(square)
    rows, columns = np.indices(square.shape)
    levels = (rows, columns, (rows + columns) % size)
    effects = [
        np.array([square[level == number].mean() for number in range(size)]) - square.mean()
        for level in levels
    ]
    fitted = square.mean() + sum(
        effect[level] for effect, level in zip(effects, levels, strict=True)
    )
    degrees = size - 1
    rest_degrees = (size - 1) * (size - 2)
    rest = float(((square - fitted) ** 2).sum() / rest_degrees)
    components = []
    for name, effect in zip(names, effects, strict=True):
        mean_square = size * (effect**2).sum() / degrees
        # Exact for the ratio of the two variances, at the estimated variance of the rest.
        ratio = mean_square / rest if rest > 0 else 0.0
        low, high = (
            max(0.0, float(rest * (ratio / stats.f.ppf(q, degrees, rest_degrees) - 1) / size))
            for q in (0.975, 0.025)
        )
        p_value = float(stats.f.sf(ratio, degrees, rest_degrees))
        components.append(Component(name, (mean_square - rest) / size, low, high, p_value))
    low, high = (
        float(rest * rest_degrees / stats.chi2.ppf(q, rest_degrees)) for q in (0.975, 0.025)
    )
    return [*components, Component("rest", rest, low, high, None)]


def count_seeds(difference: float, deviation: float, *, paired: bool = False) -> int:
    """Returns how many seeds find a difference with a probability of 80 %, tested at 5 %.

    Args:
        difference: The true difference of two means, above 0.
        deviation: Standard deviation of one training, or of the differences if they are paired.
        paired: Whether trainings are compared seed by seed.

    Returns:
        The seeds of each of the two, at least 2, by the t-test.
    """
    for seeds in range(2, 10_000):
        degrees = seeds - 1 if paired else 2 * (seeds - 1)
        scale = difference / deviation * math.sqrt(seeds if paired else seeds / 2)
        critical = stats.t.ppf(0.975, degrees)
        if stats.nct.sf(critical, degrees, scale) >= 0.8:
            return seeds
    raise ValueError(
        f"a difference of {difference:g} needs more than 10,000 seeds at a deviation of "
        f"{deviation:g}"
    )
