"""The measures of superpixels, on maps of which the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmsvit.analysis.superpixels import achievable_accuracy, borders, boundary_recall, grid, grid_of

VOID = 9
HALVES = np.repeat([[0, 0, 0, 0, 1, 1, 1, 1]], 6, 0)  # a border between columns 3 and 4


def test_borders_are_on_both_sides_and_not_around_what_is_ignored():
    assert borders(HALVES).sum(0).tolist() == [0, 0, 0, 6, 6, 0, 0, 0]
    with_void = HALVES.copy()
    with_void[:, 4:] = VOID
    assert not borders(with_void, VOID).any() and borders(with_void).any()
    assert borders(HALVES.T).sum(1).tolist() == [0, 0, 0, 6, 6, 0, 0, 0]


def test_recall_counts_borders_nearby():
    # 400x300: a diagonal of 500, so 1.25 rounds to one pixel.
    truth = np.zeros((300, 400), int)
    truth[:, 200:] = 1
    for shift, expected in ((0, 1.0), (1, 1.0), (2, 0.5), (3, 0.0)):
        regions = np.zeros_like(truth)
        regions[:, 200 + shift :] = 1
        assert boundary_recall(regions, truth, VOID) == expected, shift
    assert math.isnan(boundary_recall(truth, np.zeros_like(truth), VOID))


def test_accuracy_is_that_of_the_most_frequent_label():
    assert achievable_accuracy(HALVES, HALVES, VOID) == 1
    assert achievable_accuracy(np.zeros_like(HALVES), HALVES, VOID) == 0.5
    truth = HALVES.copy()
    truth[:, 6:] = VOID
    assert achievable_accuracy(np.zeros_like(HALVES), truth, VOID) == pytest.approx(4 / 6)
    assert math.isnan(achievable_accuracy(HALVES, np.full_like(HALVES, VOID), VOID))


def test_a_grid_has_cells_that_are_cut_at_the_border():
    cells = grid((5, 7), (2, 3))
    assert cells[0].tolist() == [0, 0, 0, 1, 1, 1, 2] and cells[:, 0].tolist() == [0, 0, 3, 3, 6]


@pytest.mark.parametrize(('number', 'expected'), [(48, 48), (40, 40), (37, 35), (1, 1)])
def test_a_grid_of_about_as_many_cells(number, expected):
    cells = grid_of((360, 480), number)
    assert cells.shape == (360, 480)
    assert len(np.unique(cells)) == expected
