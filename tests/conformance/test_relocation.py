"""That a moved policy is the same policy."""

from __future__ import annotations

import pytest

from tests.conformance.relocation import moved


@pytest.mark.parametrize(
    ("rego", "expected"),
    (
        ("package a.b\nimport data.c as d", "package p.a.b\nimport data.p.c as d"),
        ("x := data[y].data", "x := data.p[y].data"),
        ("x if y with data.z as data", "x if y with data.p.z as data.p"),
        ('x := "data.y" # data', 'x := "data.y" # data'),
        ('x := `data " data`', 'x := `data " data`'),
        ("import data.package.foo", "import data.p.package.foo"),
        ('x := $"data {data.y[{"data": data}]} \\{data}"', 'x := $"data {data.p.y[{"data": data.p}]} \\{data}"'),
        ("x := $`{data.y}` + data.z", "x := $`{data.p.y}` + data.p.z"),
        ("database := metadata", "database := metadata"),
    ),
)  # fmt: skip
def test_only_references_to_data_and_packages_are_moved(rego: str, expected: str) -> None:
    assert moved(rego, "p") == expected
