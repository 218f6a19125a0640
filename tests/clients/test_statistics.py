"""Medians, quartiles and intervals, against values worked out by hand."""

import pytest
from bitwatt_client.statistics import bootstrap_ratio, quantile, spread


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5.0], 0.25, 5.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([4.0, 1.0, 3.0, 2.0], 0.25, 1.75),  # position 0.75: 1 + 0.75 x (2 - 1)
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.9, 4.6),  # position 3.6
        ([1.0, 9.0], 1.0, 9.0),
    ],
)
def test_a_quantile_is_interpolated_between_neighbours(values, share, expected):
    assert quantile(values, share) == pytest.approx(expected)


def test_a_spread_is_the_median_between_the_quartiles():
    found = spread([10.0, 40.0, 20.0, 30.0, 50.0])
    assert (found.median, found.low, found.high, found.n) == (30.0, 20.0, 40.0, 5)


def test_pairs_of_one_ratio_give_an_interval_without_width():
    found = bootstrap_ratio([2.0, 4.0, 60.0], [1.0, 2.0, 30.0])
    assert found.value == 2.0
    # The median of any draw of these pairs is one of them, and each has the ratio 2.
    assert (found.low, found.high) == (2.0, 2.0)


def test_two_pairs_reach_from_the_smaller_ratio_to_the_larger():
    # A draw is both of one pair (a quarter each) or one of each (a half): 8/2, 12/2 and 20/4.
    found = bootstrap_ratio([8.0, 12.0], [2.0, 2.0])
    assert found.value == 5.0
    assert (found.low, found.high) == (4.0, 6.0)


def test_a_disturbance_that_meets_both_of_a_pair_cancels():
    paired = bootstrap_ratio([10.0, 5.0, 20.0, 10.0], [5.0, 2.5, 10.0, 5.0], center=sum)
    assert (paired.low, paired.value, paired.high) == (2.0, 2.0, 2.0)


def test_equal_input_gives_equal_intervals():
    values = [1.0, 2.0, 4.0, 3.0], [2.0, 1.0, 3.0, 2.0]
    assert bootstrap_ratio(*values) == bootstrap_ratio(*values)


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_what_makes_no_ratio_is_refused(above, below):
    with pytest.raises(ValueError, match=r"no pairs|not positive"):
        bootstrap_ratio(above, below)
