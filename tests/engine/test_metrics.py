"""The numbers of continual learning, worked by hand."""

import pytest

from engine.metrics import average_accuracy, backward_transfer, forgetting
from tests import reference

# Task 2 forgets and recovers a little; task 1 gets better after task 2 and then worse.
THREE_TASKS = [
    [80.0, None, None],
    [86.0, 70.0, None],
    [74.0, 65.0, 90.0],
]


def test_average_accuracy_is_that_of_the_last_row():
    assert average_accuracy([[90, 0], [70, 80]]) == 75
    assert average_accuracy(THREE_TASKS) == pytest.approx((74 + 65 + 90) / 3)
    assert average_accuracy([[42.5]]) == 42.5


def test_backward_transfer_is_over_one_task_fewer():
    assert backward_transfer([[90, 0], [70, 80]]) == -20  # one task could be forgotten, not two
    assert backward_transfer(THREE_TASKS) == pytest.approx(((74 - 80) + (65 - 70)) / 2)


def test_backward_transfer_is_positive_where_later_tasks_help():
    assert backward_transfer([[50.0, None], [60.0, 70.0]]) == 10


def test_forgetting_is_from_the_best():
    assert forgetting([[90, 0], [70, 80]]) == 20
    assert forgetting(THREE_TASKS) == pytest.approx(((86 - 74) + (70 - 65)) / 2)
    assert forgetting([[50.0, None], [60.0, 70.0]]) == -10


def test_a_single_task_has_nothing_to_forget():
    assert backward_transfer([[42.5]]) == 0
    assert forgetting([[42.5]]) == 0


def test_what_was_not_measured_does_not_matter():
    filled = [[0.0 if value is None else value for value in row] for row in THREE_TASKS]
    for metric in (average_accuracy, backward_transfer, forgetting):
        assert metric(filled) == metric(THREE_TASKS)


def test_agrees_with_the_definitions():
    assert average_accuracy(THREE_TASKS) == pytest.approx(reference.average_accuracy(THREE_TASKS))
    assert backward_transfer(THREE_TASKS) == pytest.approx(reference.backward_transfer(THREE_TASKS))
