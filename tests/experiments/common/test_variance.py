"""Components of variance of a Latin square, and the number of seeds that a difference needs."""

import numpy as np
import pytest

from experiments.common.variance import count_seeds, split_variance

NAMES = ("rows", "columns", "letters")


def make_square(size, deviations, generator):
    """Draws a square with these standard deviations of the three causes and the rest."""
    rows, columns = np.indices((size, size))
    effects = [deviation * generator.standard_normal(size) for deviation in deviations[:3]]
    square = effects[0][rows] + effects[1][columns] + effects[2][(rows + columns) % size]
    return square + deviations[3] * generator.standard_normal((size, size))


def test_a_square_by_hand():
    # Rows alone differ, by 3 from the mean; the rest is a pattern of ±1 that no cause explains.
    pattern = np.array([[1, -1, 0], [-1, 0, 1], [0, 1, -1]])
    letters = (np.indices((3, 3)).sum(0)) % 3
    assert all(pattern[letters == number].sum() in (3, -3, 0) for number in range(3))
    square = np.array([[-3.0], [0.0], [3.0]]) + np.zeros((3, 3))
    square[0, 0] += 1
    parts = {part.name: part for part in split_variance(square, NAMES)}
    mean = square.mean()
    rows = square.mean(1) - mean
    columns = square.mean(0) - mean
    by_letter = np.array([square[letters == number].mean() for number in range(3)]) - mean
    fitted = mean + rows[:, None] + columns[None] + by_letter[letters]
    rest = ((square - fitted) ** 2).sum() / 2
    np.testing.assert_allclose(parts["rest"].variance, rest)
    np.testing.assert_allclose(parts["rows"].variance, (3 * (rows**2).sum() / 2 - rest) / 3)
    np.testing.assert_allclose(parts["columns"].variance, (3 * (columns**2).sum() / 2 - rest) / 3)


def test_components_are_those_of_the_draws_on_average():
    generator = np.random.default_rng(0)
    deviations = (1.0, 0.5, 0.0, 0.7)
    estimates, covered = [], []
    for _ in range(2000):
        parts = split_variance(make_square(5, deviations, generator), NAMES)
        estimates.append([part.variance for part in parts])
        covered.append(
            [part.low <= d**2 <= part.high for part, d in zip(parts, deviations, strict=True)]
        )
    np.testing.assert_allclose(np.mean(estimates, 0), np.square(deviations), atol=0.05)
    # The interval of a cause takes the rest as known.
    assert (np.mean(covered, 0) > 0.9).all()


def test_a_cause_without_effect_is_rarely_significant():
    generator = np.random.default_rng(1)
    p_values = [
        split_variance(make_square(5, (1, 0, 0, 1), generator), NAMES)[1].p_value
        for _ in range(2000)
    ]
    assert 0.035 < np.mean(np.array(p_values) < 0.05) < 0.065


def test_equal_values_have_no_variance():
    for part in split_variance(np.full((3, 3), 7.0), NAMES):
        assert part.variance == part.low == 0


@pytest.mark.parametrize(
    ("difference", "paired", "seeds"), [(1.0, False, 17), (0.5, False, 64), (1.0, True, 10)]
)
def test_numbers_of_seeds_are_those_of_the_textbooks(difference, paired, seeds):
    assert count_seeds(difference, 1.0, paired=paired) == seeds


def test_a_tiny_difference_is_refused():
    with pytest.raises(ValueError, match="more than 10,000 seeds"):
        count_seeds(1e-6, 1.0)
