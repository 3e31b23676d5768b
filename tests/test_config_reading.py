"""Whatever stands in a document, each fault is named by its place and never by what stands there."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, field

from pdp.config import Config, Listen, TenantClaim
from pdp.config_reading import Section, read_section

SECRET = "s3cret-word"


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


def short(value: str) -> str:
    if len(value) > 5:
        raise ValueError("is too long")
    return value.upper()


class Leaf(Section, frozen=True, kw_only=True):
    size: Annotated[int, Meta(ge=1, le=9)] = 3

    def __post_init__(self) -> None:
        if self.size == 7:
            raise ValueError("seven is not wanted")


class Round(Section, frozen=True, kw_only=True, tag_field="shape", tag="round"):
    radius: Annotated[float, Meta(gt=0, le=5)]


class Square(Section, frozen=True, kw_only=True, tag_field="shape", tag="square"):
    side: int


class Root(Section, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=8)]
    word: Annotated[str, Meta(pattern=r"^[a-z]{1,4}$")] = "abc"
    rule: Annotated[str, short] = "A"
    share: Annotated[float, Meta(ge=0.5, le=2)] = 1.0
    on: bool = False
    file: Path | None = None
    colour: Colour = Colour.RED
    kind: Literal["one", "two"] = "one"
    engine: Literal["inner"] | Leaf = "inner"
    shape: Round | Square | None = None
    leaves: Annotated[list[Leaf], Meta(max_length=2)] = field(default_factory=list)
    named: dict[Annotated[str, Meta(pattern="^[a-z]$")], Leaf] = field(default_factory=dict)


def faults(**keys: object) -> list[tuple[str, str]]:
    _, found = read_section(Root, {"name": "x", **keys})
    return [(".".join(map(str, place)), what) for place, what in found]


def read(**keys: object) -> Root:
    root, found = read_section(Root, {"name": "x", **keys})
    assert not found
    assert isinstance(root, Root)
    return root


def test_each_value_becomes_what_its_key_says() -> None:
    root = read(
        share=1,
        rule="abc",
        file="a/b",
        colour="blue",
        engine={"size": 9},
        shape={"shape": "square", "side": 2},
        leaves=[{}, {"size": 1}],
        named={"a": {"size": 2}},
    )
    assert (root.share, type(root.share)) == (1.0, float)
    assert (root.rule, root.file, root.colour) == ("ABC", Path("a/b"), Colour.BLUE)
    assert root.engine == Leaf(size=9)
    assert root.shape == Square(side=2)
    assert root.leaves == [Leaf(), Leaf(size=1)]
    assert root.named == {"a": Leaf(size=2)}


@pytest.mark.parametrize(
    ("key", "value", "place", "what"),
    (
        ("name", "", "name", "expected a text of 1 to 8 characters"),
        ("name", 5, "name", "expected a text of 1 to 8 characters, got an integer"),
        ("name", None, "name", "expected a text of 1 to 8 characters, got null"),
        ("name", "\ud800", "name", "expected a text of 1 to 8 characters"),
        ("word", "abcde", "word", "expected a text that matches ^[a-z]{1,4}$"),
        ("word", "abc\n", "word", "expected a text that matches ^[a-z]{1,4}$"),
        ("rule", "abcdef", "rule", "is too long"),
        ("share", 3, "share", "expected a number from 0.5 to 2"),
        ("share", "1", "share", "expected a number from 0.5 to 2, got a text"),
        ("share", True, "share", "expected a number from 0.5 to 2"),
        ("share", math.nan, "share", "expected a number from 0.5 to 2"),
        ("share", math.inf, "share", "expected a number from 0.5 to 2"),
        ("share", 10**400, "share", "expected a number from 0.5 to 2"),
        ("on", 1, "on", "expected true or false, got an integer"),
        ("on", "true", "on", "expected true or false, got a text"),
        ("file", 1, "file", "expected a path, got an integer"),
        ("colour", SECRET, "colour", "expected red or blue"),
        ("colour", 1, "colour", "expected red or blue, got an integer"),
        ("kind", SECRET, "kind", "expected one or two"),
        ("engine", SECRET, "engine", "expected inner or a section"),
        ("engine", [], "engine", "expected inner or a section, got a list"),
        ("engine", {"size": 0}, "engine.size", "expected an integer from 1 to 9"),
        ("engine", {"size": 3.0}, "engine.size", "expected an integer from 1 to 9, got a number"),
        ("engine", {"size": True}, "engine.size", "expected an integer from 1 to 9"),
        ("engine", {"size": 7}, "engine", "seven is not wanted"),
        ("shape", {}, "shape.shape", "is required"),
        ("shape", {"shape": SECRET}, "shape.shape", "expected round or square"),
        ("shape", {"shape": []}, "shape.shape", "expected round or square"),
        ("shape", "round", "shape", "expected a section, got a text"),
        ("shape", {"shape": "round"}, "shape.radius", "is required"),
        ("shape", {"shape": "round", "radius": 0}, "shape.radius", "expected a number over 0 to 5"),
        ("leaves", [{}, {}, {}], "leaves", "expected a list of 0 to 2 entries"),
        ("leaves", {1}, "leaves", "expected a list of 0 to 2 entries, got set"),
        ("leaves", [{}, {"size": 0}], "leaves.1.size", "expected an integer from 1 to 9"),
        ("leaves", [{}, {"sise": 1}], "leaves.1.sise", "unknown key; did you mean size?"),
        ("named", {"a": {"size": 7}}, "named.a", "seven is not wanted"),
        ("named", {"B": {}}, "named.B", "expected a text that matches ^[a-z]$"),
        ("named", {1: {}}, "named.1", "expected a text that matches ^[a-z]$, got an integer"),
        ("named", [], "named", "expected a mapping, got a list"),
        (None, 1, "None", "unknown key; did you mean on?"),
    ),
)
def test_what_is_wrong_is_said_at_its_place(key: str, value: object, place: str, what: str) -> None:
    _, found = read_section(Root, {"name": "x", key: value})
    assert [(".".join(map(str, at)), said) for at, said in found] == [(place, what)]


def test_all_faults_are_found_at_once_and_rules_only_of_what_is_whole() -> None:
    found = faults(
        name="",
        engine={"size": 0},
        leaves=[
            {"size": 7},
            {"size": 8},
        ],
        on=3,
        what=1,
    )
    assert [place for place, _ in found] == ["name", "engine.size", "leaves.0", "on", "what"]


TEXT = st.text(st.characters(codec=None), max_size=4).map(lambda text: f"{SECRET}{text}")
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.dates() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=5,
)


@given(st.sampled_from(Root.__struct_fields__), ANY)
def test_no_value_is_ever_repeated(key: str, value: Any) -> None:
    said = " ".join(what for _, what in read_section(Root, {"name": "x", key: value})[1])
    assert SECRET not in said


@given(ANY)
def test_no_document_is_too_odd_to_be_refused(document: Any) -> None:
    _, found = read_section(Config, document)
    assert found


def test_what_was_read_stays_as_it_is() -> None:
    root = read()
    with pytest.raises(AttributeError):
        root.name = "y"  # type: ignore[misc]
    assert read().leaves is not root.leaves
    assert Listen().named is not Listen().named


def test_a_usual_claim_that_is_written_out_counts() -> None:
    claim, found = read_section(TenantClaim, {"fixed": "tenant_acme"})
    assert claim == TenantClaim(fixed="tenant_acme")
    _, found = read_section(TenantClaim, {"fixed": "tenant_acme", "claim": "tenant_id"})
    assert [what for _, what in found] == ["a claim, fixed and by_route exclude each other"]
