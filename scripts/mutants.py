"""Change the rooms that decide, one small change at a time, and see whether the tests notice.

``python scripts/mutants.py [GROUP ...]`` runs mutmut for the groups of mutants.toml, or for all,
each in a copy of the tree below dist/mutants; it takes long. What no test has noticed is kept
in docs/mutants.json, and docs/mutants.md is written from that and from mutants-explained.toml,
as it is by ``--page`` without a run.

Exit codes: 0, or 1 where a change has gone unnoticed and nothing explains it, or where an
explanation is of none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
GROUPS: Final[Mapping[str, Mapping[str, list[str]]]] = tomllib.loads(
    (ROOT / "scripts" / "mutants.toml").read_text(encoding="utf-8")
)
WORK: Final = ROOT / "dist" / "mutants"
FOUND: Final = ROOT / "docs" / "mutants.json"
EXPLAINED: Final = ROOT / "scripts" / "mutants-explained.toml"
PAGE: Final = ROOT / "docs" / "mutants.md"
CHILDREN: Final = 2
UNNOTICED: Final = {0: "survived", 33: "no test"}
"""By the exit code that mutmut keeps; 33 is its own, for code that no test runs."""


@dataclass(frozen=True, slots=True, order=True)
class Mutant:
    """One change that went unnoticed, without the numbers that every edit shifts."""

    module: str
    function: str
    before: str
    after: str
    outcome: str


def run(group: str) -> None:
    """Run mutmut for one group, and keep what came of it."""
    copy = WORK / group
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    _copy_tree(copy)
    told = GROUPS[group]
    (copy / "setup.cfg").write_text(_config(told["mutate"], told["tests"]), encoding="utf-8")
    mutmut = Path(sys.executable).with_name("mutmut")
    with (WORK / f"{group}.log").open("wb") as log:
        subprocess.run(
            [mutmut, "run", "--max-children", str(CHILDREN)],
            cwd=copy,
            stdout=log,
            stderr=log,
            check=True,
        )
    with contextlib.chdir(copy):
        outcomes, unnoticed = _read(told["mutate"])
    shutil.rmtree(copy)
    found = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {}
    found[group] = {
        "outcomes": outcomes,
        "unnoticed": [asdict(each) for each in sorted(unnoticed)],
    }
    FOUND.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


def _copy_tree(target: Path) -> None:
    """What git knows, as it stands now."""
    files = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607 - the developer's
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".tools").symlink_to(ROOT / ".tools")


def _config(mutate: Sequence[str], tests: Sequence[str]) -> str:
    lists = {
        "source_paths": ["pdp"],
        "only_mutate": mutate,
        "also_copy": ["policies", "docs", "proto", ".tools"],
        "pytest_add_cli_args": [
            "-p no:randomly",
            "-p no:cacheprovider",
            "-mnot slow",
            "-knot redis and not memory",
        ],
        "pytest_add_cli_args_test_selection": tests,
    }
    lines = [f"{name}=\n" + "\n".join(f"    {each}" for each in of) for name, of in lists.items()]
    return "[mutmut]\n" + "\n".join(lines) + "\n"


def _read(modules: Sequence[str]) -> tuple[dict[str, int], list[Mutant]]:
    """What mutmut has written below the current folder."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant  # noqa: PLC0415 - reads setup.cfg
    from mutmut.utils.format_utils import (  # noqa: PLC0415
        orig_function_and_class_names_from_key,
    )

    outcomes: Counter[str] = Counter()
    unnoticed = []
    for module in modules:
        meta = json.loads(Path(f"mutants/{module}.meta").read_text(encoding="utf-8"))
        for key, code in meta["exit_code_by_key"].items():
            outcome = UNNOTICED.get(code, "noticed")
            outcomes[outcome] += 1
            if outcome == "noticed":
                continue
            function, owner = orig_function_and_class_names_from_key(key)
            name = function.rpartition(".")[-1]
            before, after = _change(get_diff_for_mutant(key, path=module))
            qualified = f"{owner}.{name}" if owner else name
            unnoticed.append(Mutant(module, qualified, before, after, outcome))
    return dict(outcomes), unnoticed


def _change(diff: str) -> tuple[str, str]:
    lines = diff.splitlines()[2:]
    return tuple(  # type: ignore[return-value]
        " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
    )


@dataclass(frozen=True, slots=True)
class Explained:
    """Why nobody need notice: of one change, or of all that read like it."""

    reason: str
    modules: re.Pattern[str]
    functions: re.Pattern[str]
    before: re.Pattern[str]
    after: re.Pattern[str]
    only_words: bool
    """Whether texts are all in which the two differ, or that are missing."""

    def explains(self, mutant: Mutant) -> bool:
        """Whether it is about this one."""
        return (
            self.modules.fullmatch(mutant.module) is not None
            and self.functions.fullmatch(mutant.function) is not None
            and self.before.fullmatch(mutant.before) is not None
            and self.after.fullmatch(mutant.after) is not None
            and (not self.only_words or _differ_in_words(mutant.before, mutant.after))
        )


def _differ_in_words(before: str, after: str) -> bool:
    bare = [_LITERAL.sub("None", text) for text in (before, after)]
    return bare[0] == bare[1]


_LITERAL: Final = re.compile(r"""[fr]*"(?:[^"\\]|\\.)*"|[fr]*'(?:[^'\\]|\\.)*'""")


def explanations() -> list[Explained]:
    """What mutants-explained.toml says: texts as they stand, patterns between slashes."""
    told = tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))["explained"]
    return [
        Explained(
            reason=each["reason"],
            modules=_pattern(each.get("module", "/.*/")),
            functions=_pattern(each.get("function", "/.*/")),
            before=_pattern(each.get("before", "/.*/")),
            after=_pattern(each.get("after", "/.*/")),
            only_words=each.get("only_words", False),
        )
        for each in told
    ]


def _pattern(text: str | list[str]) -> re.Pattern[str]:
    texts = [text] if isinstance(text, str) else text
    return re.compile("|".join(_one(each) for each in texts), re.DOTALL)


def _one(text: str) -> str:
    is_pattern = len(text) > 1 and text.startswith("/") and text.endswith("/")
    return f"(?:{text[1:-1]})" if is_pattern else re.escape(text)


def page() -> tuple[str, list[Mutant], list[Explained]]:
    """The page, what is not explained, and the explanations of nothing."""
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    known = explanations()
    by_reason: dict[str, list[Mutant]] = {each.reason: [] for each in known}
    open_ones: list[Mutant] = []
    used: set[int] = set()
    rows = []
    for group, told in found.items():
        mutants = [Mutant(**each) for each in told["unnoticed"]]
        for mutant in mutants:
            at = next((n for n, each in enumerate(known) if each.explains(mutant)), None)
            if at is None:
                open_ones.append(mutant)
            else:
                used.add(at)
                by_reason[known[at].reason].append(mutant)
        total = sum(told["outcomes"].values())
        modules = ", ".join(f"`{module}`" for module in GROUPS[group]["mutate"])
        noticed = told["outcomes"]["noticed"]
        rows.append(f"| {group} | {modules} | {total} | {noticed} | {len(mutants)} |")
    lists = [
        f"- {reason}: {len(mutants)} ({_places(mutants)})"
        for reason, mutants in by_reason.items()
        if mutants
    ]
    text = _TEXT.format(rows="\n".join(rows), lists="\n".join(lists), unexplained=len(open_ones))
    return text, open_ones, [each for n, each in enumerate(known) if n not in used]


def _places(mutants: Sequence[Mutant]) -> str:
    places = Counter(f"`{Path(each.module).name}` {each.function}" for each in mutants)
    listed = [name if count == 1 else f"{name} x{count}" for name, count in sorted(places.items())]
    more = len(listed) - PLACES_SHOWN
    return ", ".join(listed[:PLACES_SHOWN]) + (f" and {more} more" if more > 0 else "")


PLACES_SHOWN: Final = 6
_TEXT: Final = """# What the tests notice

Generated by `make mutants`, which changes the rooms that decide, one small change at a time, and
runs the quick tests of each room: `scripts/mutants.toml` says which. What a slower test would
notice, of the server, its clients or whole processes, counts as unnoticed here.

| group | modules | changes | noticed | unnoticed |
|---|---|---|---|---|
{rows}

Every change is in [mutants.json](mutants.json); why each need not be noticed stands in
`scripts/mutants-explained.toml`. Not explained: {unexplained}.

{lists}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, write the page, and tell what is left to explain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS], metavar="GROUP")
    parser.add_argument("--page", action="store_true", help="run nothing")
    given = parser.parse_args(arguments)
    if not given.page:
        for group in given.groups or GROUPS:
            run(group)
    text, open_ones, of_nothing = page()
    PAGE.write_text(text, encoding="utf-8")
    for mutant in open_ones:
        print(f"{mutant.module} {mutant.function}\n  - {mutant.before}\n  + {mutant.after}")
    for each in of_nothing:
        print(f"explains nothing: {each.reason} ({each.before.pattern})")
    return 1 if open_ones or of_nothing else 0


if __name__ == "__main__":
    raise SystemExit(main())
