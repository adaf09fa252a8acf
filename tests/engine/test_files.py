"""JSON that a person can read: a row of a matrix, or any list of plain values, on one line."""

import json

import pytest

from engine.files import write_json


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        [[]],
        {"a": []},
        {"a": {}},
        None,
        1.5,
        "é\n[",
        [1, [2, {"b": [None, True]}]],
        {"m": [[90.0, None], [1, 2]]},
    ],
    ids=str,
)
def test_what_is_written_is_read_back(tmp_path, value):
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value


def test_a_row_takes_one_line(tmp_path):
    write_json(
        tmp_path / "x.json", {"accuracy": [[90.0, None], [80.0, 85.5]], "sizes": {"fc1": 3}, "names": ["a", "b"]}
    )
    assert (tmp_path / "x.json").read_text().splitlines() == [
        "{",
        ' "accuracy": [',
        "  [90.0, null],",
        "  [80.0, 85.5]",
        " ],",
        ' "sizes": {',
        '  "fc1": 3',
        " },",
        ' "names": ["a", "b"]',
        "}",
    ]
