"""A bundle is taken as a whole and within its roots, or refused with what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdp.policy.archive import Files, pack
from pdp.policy.bundle import Bundle, Part, assemble, load_bundle, read_part
from pdp.policy.engine import BundleError, Entrypoint
from pdp.policy.part import content_revision
from tests.policy.bundles import FILES, REGO, WASM, manifest, message_of, write_files

BUILT = {"policy.wasm": WASM, "data.json": b"{}"}
PLATFORM = {**REGO, ".manifest": manifest(revision="p-1", roots=["pdp", "tools"])}
TENANTS = {
    "tenants/acme/data.json": b'{"status": "active"}',
    ".manifest": manifest(revision="t-1", roots=["tenants"]),
}


def part(files: Files, name: str = "policy") -> Part:
    return read_part(files, name=name, place=f"bundles/{name}", verifier=None)


def refusal_of(files: Files) -> str:
    with pytest.raises(BundleError) as refusal:
        part(files)
    message = message_of(refusal)
    assert message.startswith("The policy bundle bundles/policy ")
    assert message.isprintable()
    return message


def joint(bundles: Mapping[str, Files]) -> Bundle:
    return assemble([part(files, name) for name, files in bundles.items()])


def test_sources_are_read_in_full() -> None:
    read = part(FILES)

    assert read.manifest.revision == "r-1"
    assert read.data == {"tenants": {"acme": {"status": "active", "limit": 1.5}}}
    assert read.rego.keys() == {name for name in FILES if name.endswith(".rego")}
    assert read.wasm is None


def test_without_a_revision_the_content_that_decides_is_the_revision() -> None:
    def revision(**changed: bytes) -> str:
        files = {**FILES, **{name.replace("__", "/"): body for name, body in changed.items()}}
        return part({**files, ".manifest": b"{}"}).manifest.revision

    plain = revision()
    assert plain.startswith("sha256:")
    assert len(plain) == len("sha256:") + 32
    assert revision(README=b"words") == plain
    assert part({**FILES, ".manifest": b'{"revision":""}'}).manifest.revision == plain
    others = {
        plain,
        part({**FILES, ".manifest": b"{}", "policy.wasm": WASM}).manifest.revision,
        part({**FILES, ".manifest": b"{}", "tenants/data.json": b"{}"}).manifest.revision,
        part({**FILES, ".manifest": b"{}", "x.rego": b"package x"}).manifest.revision,
        part({**FILES, ".manifest": b"{}", "y.rego": b"package x"}).manifest.revision,
        part({**FILES, ".manifest": b"{}", "x_test.rego": b"package x"}).manifest.revision,
    }
    assert len(others) == 6


def test_a_module_and_the_data_can_not_be_shifted_into_each_other() -> None:
    assert content_revision(wasm=b"ab", rego={}, data=b"c") != content_revision(
        wasm=b"a", rego={}, data=b"bc"
    )
    assert content_revision(wasm=None, rego={"ab": "c"}, data=b"") != content_revision(
        wasm=None, rego={"a": "bc"}, data=b""
    )


def test_neither_data_nor_module_nor_rego_shows_in_a_repr() -> None:
    read = part({**FILES, "policy.wasm": WASM, ".manifest": b"{}"})

    for shown in (repr(read), repr(assemble([read]))):
        assert "acme" not in shown
        assert "asm" not in shown
        assert "package" not in shown


def test_data_stands_where_its_folder_says() -> None:
    files = {
        "data.json": b'{"tenants":{"a":{"status":"active"}}}',
        "tenants/a/data.json": b'{"scopes":["x"]}',
        "tenants/a/quota/data.json": b"7",
        "tenants/b/data.yaml": b"status: active\nscopes: [x, 'yes']\nlimit: 1.5\n",
        "tools/data.yml": b"{}",
    }

    assert part(files).data == {
        "tenants": {
            "a": {"status": "active", "scopes": ["x"], "quota": 7},
            "b": {"status": "active", "scopes": ["x", "yes"], "limit": 1.5},
        },
        "tools": {},
    }


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    (
        ("data.json", b"[]", "has a data.json that must be an object."),
        ("data.json", b'{"a":1,"a":2}', "duplicate key"),
        ("data.json", b'{"a":NaN}', "NaN"),
        ("data.json", b'{"a":9007199254740993}', "integer"),
        ("data.json", b"\xff", "UTF-8"),
        ("data.json", b'{"a":' + b"[" * 70 + b"]" * 70 + b"}", "deep"),
        ("data.json", b"{", "JSON"),
        ("tenants/data.json", b"[1", "tenants/data.json"),
        ("a/" * 20 + "data.json", b"[" * 50 + b"]" * 50, "nested more than 64 deep"),
        (".hidden/data.json", b"{}", "OPA passes over the dot"),
        ("x.rego", b"package \xff", "has a x.rego that is not UTF-8."),
        ("x.rego", b"allow := true", "has a x.rego that does not begin with its package."),
        ("sub/policy.wasm", WASM, "holds sub/policy.wasm; its one module is policy.wasm"),
        ("patch.json", b'{"data":[]}', "is a delta bundle (patch.json) without the whole one"),
        ("a/patch.json", b"{}", "is a delta bundle (a/patch.json)"),
    ),
)
def test_what_is_not_well_formed_is_refused(name: str, content: bytes, complaint: str) -> None:
    assert complaint in refusal_of({"policy.wasm": WASM, name: content})


def test_data_that_stands_in_two_files_is_refused() -> None:
    root = b'{"tenants":{"a":1},"flag":true}'
    for name, content in (
        ("tenants/data.json", b'{"a":2}'),
        ("tenants/a/data.json", b'{"b":1}'),
        ("flag/data.json", b"{}"),
        ("data.yaml", b"flag: true"),
    ):
        message = refusal_of({"data.json": root, name: content})
        assert message.endswith("where other data stands already.")


@pytest.mark.parametrize(
    ("content", "complaint"),
    (
        (b"a: yes", "at line 1 that YAML parsers read differently"),
        (b"a: 1\nb: [No]", "at line 2 that YAML parsers read differently"),
        (b"a: 012", "differently"),
        (b"a: 0x1F", "differently"),
        (b"a: 1_000", "differently"),
        (b"a: .5", "differently"),
        (b"a: 1.2.3", "differently"),
        (b"a: 2026-11-24", "differently"),
        (b"a: .inf", "differently"),
        (b"a: True", "differently"),
        (b"a: -0.0", "differently"),
        (b"a: 9007199254740993", "integer"),
        (b"a: &x 1", "an anchor or a tag at line 1"),
        (b"a: !!str 1", "an anchor or a tag"),
        (b"a: !", "an anchor or a tag"),
        (b"- &x 1\n- *x", "an anchor or a tag"),
        (b"- *x", "an alias at line 1; write the value out"),
        (b"a: 1\na: 2", "a duplicate key at line 2"),
        (b"1: x", "a key at line 1 that is not text"),
        (b"<<: {a: 1}", "a merge key"),
        (b"a: 1\n---\nb: 2", "a second document"),
        (b"a: [", "is not YAML"),
        (b"a: \x01", "is not YAML"),
        (b"\xff", "not UTF-8"),
        (b"[" * 70 + b"]" * 70, "nested more than 64 deep"),
        (b"a: '" + b"x" * 1024 * 1024 + b"'", "more than 1048576 bytes"),
    ),
)
def test_yaml_that_can_be_read_in_two_ways_is_refused(content: bytes, complaint: str) -> None:
    message = refusal_of({"x/data.yaml": content})

    assert "x/data.yaml" in message
    assert complaint in message


def test_yaml_that_all_read_alike_is_taken() -> None:
    text = b"""\
# a comment
time: 24h
cidr: 10.0.0.0/8
word: on-call
quoted: "yes"
none:
null: null
block: |
  two
  lines
numbers: [0, -1, 1.5, 2e3, true, false, ~]
'1': text
"""
    with pytest.raises(BundleError, match="line 7 that is not text"):
        part({"data.yaml": text})

    assert part({"data.yaml": text.replace(b"null: null\n", b"")}).data == {
        "time": "24h",
        "cidr": "10.0.0.0/8",
        "word": "on-call",
        "quoted": "yes",
        "none": None,
        "block": "two\nlines\n",
        "numbers": [0, -1, 1.5, 2000.0, True, False, None],
        "1": "text",
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@given(json_values)
def test_json_is_yaml_too(value: object) -> None:
    files = {"x/data.yaml": json.dumps(value).encode()}

    assert part(files).data == {"x": value}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    (
        ("x/data.json", b"1", 'has data in x/data.json at "x", outside of the roots'),
        ("data.json", b'{"tenants":{},"x":1}', 'has data in data.json at "x"'),
        ("data.json", b'{"pdp":{"b":{}}}', 'at "pdp/b"'),
        ("data.json", b'{"pdp":[]}', 'at "pdp"'),
        ("x.rego", b"package tools", 'has the package "tools" in x.rego, outside of the roots'),
        ("x.rego", b"package pdp", 'has the package "pdp"'),
        ("x.rego", b"# package pdp.a\npackage x", 'has the package "x"'),
        ("x.rego", b'package pdp["b"].a', 'has the package "pdp/b/a"'),
        ("policy.wasm", WASM, "holds policy.wasm, whose rules lie outside of the roots"),
    ),
)
def test_what_lies_outside_of_the_roots_is_refused(
    name: str, content: bytes, complaint: str
) -> None:
    sound = {".manifest": manifest(roots=["pdp/a", "tenants"])}
    part(
        {**sound, "data.json": b'{"pdp":{"a":1},"tenants":{"x":{}}}', "a.rego": b"package pdp.a.b"}
    )

    assert complaint in refusal_of({**sound, name: content})


@pytest.mark.parametrize(
    ("rego", "package"),
    (
        ("package a.b\n.c", "a/b"),
        ('package a["b"].c', "a/b/c"),
        ('package a["b/c"]', "a/b/c"),
        ('package a["\\u0062"]', "a/b"),
        ("\r\n# one\n\t# two\npackage\n  a.b#c", "a/b"),
        ("package a.b x := 1", "a/b"),
        ('package a["\\x"]', None),
        ("package a.b{", None),
        ("package a.b[x]", None),
        ("package a.b['c']", None),
        ("package a[`b`]", None),
        ("package a. b", None),
        ("\ufeffpackage a", None),
        ("\x0cpackage a", None),
        ("package\u00a0a", None),
        ("import x\npackage a", None),
        ("#" * 100_000 + "\n" * 100_000, None),
        ("", None),
    ),
)
def test_a_package_is_read_as_opa_reads_it_or_not_at_all(rego: str, package: str | None) -> None:
    files = {"x.rego": rego.encode(), ".manifest": manifest(roots=["nowhere"])}

    shown = f'the package "{package}"' if package else "does not begin with its package"
    assert shown in refusal_of(files)


def test_one_bundle_is_as_it_is() -> None:
    whole = {**FILES, "policy.wasm": WASM}

    bundle = joint({"only": whole})

    assert bundle == Bundle(
        revision="r-1",
        data=b'{"tenants":{"acme":{"limit":1.5,"status":"active"}}}',
        rego={name: FILES[name].decode() for name in FILES if name.endswith(".rego")},
        wasm=WASM,
    )


def test_several_bundles_are_one_policy() -> None:
    bundle = joint({"tenants": TENANTS, "platform": PLATFORM})

    assert bundle.revision == "platform=p-1,tenants=t-1"
    assert json.loads(bundle.data) == {"tenants": {"acme": {"status": "active"}}}
    assert bundle.rego == {f"platform/{name}": content.decode() for name, content in REGO.items()}
    assert bundle.wasm is None


def test_data_of_several_bundles_meets_on_the_way_to_their_roots() -> None:
    bundles = {
        name: {
            "data.json": json.dumps({"tenants": {name: {"status": name}}}).encode(),
            ".manifest": manifest(roots=[f"tenants/{name}"]),
        }
        for name in ("acme", "globex")
    }
    parts = [part(files, name) for name, files in bundles.items()]

    assert json.loads(assemble(parts).data) == {
        "tenants": {"acme": {"status": "acme"}, "globex": {"status": "globex"}}
    }
    assert [one.data for one in parts] == [
        {"tenants": {"acme": {"status": "acme"}}},
        {"tenants": {"globex": {"status": "globex"}}},
    ]


@pytest.mark.parametrize(
    ("roots", "shown"),
    ((["tenants/acme"], "tenants/acme"), (["tenants"], "tenants"), ([""], ""), (None, "")),
)
def test_bundles_whose_roots_overlap_are_refused(roots: list[str] | None, shown: str) -> None:
    other = {".manifest": manifest(roots=roots)}

    with pytest.raises(BundleError) as refusal:
        joint({"tenants": TENANTS, "other": other})

    assert message_of(refusal) == (
        f'The policy bundle tenants has the root "tenants", which overlaps "{shown}" of the'
        " policy bundle other."
    )


def test_the_joint_revision_names_each_bundle_or_is_a_digest_of_all() -> None:
    def revision(**revisions: str) -> str:
        return joint(
            {
                name: {".manifest": manifest(revision=text, roots=[name])}
                for name, text in revisions.items()
            }
        ).revision

    assert revision(b="2", a="1") == revision(a="1", b="2") == "a=1,b=2"
    long = revision(a="r" * 128, b="2")
    assert long.startswith("sha256:")
    assert len({long, revision(a="r" * 128, b="3"), revision(a="1", b="2,c=3")}) == 3
    assert revision(a="1,b=2", b="3") != revision(a="1", b="2,b=3")
    assert all(len(text) <= 128 for text in (long, revision(a="1" * 60, b="2" * 62)))


def test_the_module_of_the_one_bundle_with_rules_is_used() -> None:
    data_with_tests = {**TENANTS, "tenants/x_test.rego": b"package tenants.x_test"}
    for platform in (
        {**PLATFORM, "policy.wasm": WASM},
        {**BUILT, ".manifest": PLATFORM[".manifest"]},
    ):
        assert joint({"platform": platform, "tenants": data_with_tests}).wasm == WASM


def test_where_rules_of_several_bundles_meet_all_are_compiled_anew() -> None:
    ruling = {**TENANTS, "tenants/x.rego": b"package tenants.x"}

    bundle = joint({"platform": {**PLATFORM, "policy.wasm": WASM}, "tenants": ruling})

    assert bundle.wasm is None
    assert bundle.rego.keys() == {*(f"platform/{name}" for name in REGO), "tenants/tenants/x.rego"}


@pytest.mark.parametrize("entrypoint", tuple(Entrypoint))
def test_data_where_a_rule_is_asked_for_is_refused(entrypoint: Entrypoint) -> None:
    data: object = None
    for key in reversed(entrypoint.split("/")):
        data = {key: data}

    with pytest.raises(BundleError) as refusal:
        joint({"only": {**FILES, "data.json": json.dumps(data).encode()}})

    assert message_of(refusal) == (
        f"The policy bundle only has data at {entrypoint}, where a rule is asked for."
    )


def test_a_module_without_its_rego_can_not_be_joined_with_rules() -> None:
    ruling = {**TENANTS, "tenants/x.rego": b"package tenants.x"}
    platform = {"policy.wasm": WASM, ".manifest": PLATFORM[".manifest"]}

    with pytest.raises(BundleError) as refusal:
        joint({"platform": platform, "tenants": ruling})

    assert message_of(refusal) == (
        "The policy bundle platform holds policy.wasm without the Rego that it was made of, and"
        " other bundles hold rules too: all Rego is needed to compile them together."
    )


def test_a_built_bundle_is_loaded_without_opa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    archive = tmp_path / "bundle.tar.gz"
    archive.write_bytes(pack({**FILES, "policy.wasm": WASM}))
    directory = write_files(tmp_path / "bundle", {**FILES, "policy.wasm": WASM})

    assert load_bundle(archive) == load_bundle(directory)
    assert load_bundle(archive).wasm == WASM


def test_sources_are_compiled_when_they_are_loaded(opa: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bundle.tar.gz"
    archive.write_bytes(pack(FILES))
    directory = write_files(tmp_path / "bundle", FILES)

    bundle = load_bundle(directory, opa=opa)

    assert bundle == load_bundle(archive, opa=opa)
    assert bundle.wasm is not None
    assert bundle.wasm.startswith(b"\x00asm")


def test_a_bundle_without_module_and_rego_is_refused(opa: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as refusal:
        load_bundle(write_files(tmp_path, {"data.json": b"{}"}), opa=opa)

    assert message_of(refusal) == (
        f"The policy bundle {tmp_path} holds no Rego, and no policy.wasm that was made of it."
    )


def test_what_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.tar.gz", Path("/dev/null")):
        with pytest.raises(BundleError) as refusal:
            load_bundle(path)
        assert str(path) in message_of(refusal)
