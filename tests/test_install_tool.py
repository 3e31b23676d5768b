"""OPA and Regal are taken from where they are, or built; what can not be had says what to do.

The commands are stand-ins that print a version; building for real takes minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPA_VERSION = "Version: 1.22.2"
# Stands for Go: builds a command that prints the version which it was built as.
GO = """case $1 in
env) echo go1.26.3 ;;
build)
    shift
    while [ "$1" != -o ]; do shift; done
    printf '#!/bin/sh\\necho "Version: 1.22.2"\\n' > "$2"
    /bin/chmod +x "$2"
    /bin/cp go.mod "$GO_MOD_COPY"
    ;;
esac
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The one folder on PATH."""
    path = tmp_path / "bin"
    path.mkdir()
    return path


def put(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    command = folder / name
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return command


def install(path: Path, tool: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            ROOT / "scripts" / "install_tool.py",
            tool,
            "--into",
            path.parent / "tools",
        ],
        env={"PATH": str(path), "HOME": str(path.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def installed(path: Path) -> list[str]:
    return [file.name for file in (path.parent / "tools").iterdir()]


def version(command: Path) -> str:
    return subprocess.run([command], capture_output=True, text=True, check=True).stdout.strip()


def test_what_is_there_in_the_right_version_stays(path: Path) -> None:
    there = put(path.parent / "tools", "opa", f'echo "{OPA_VERSION}"')
    put(path, "opa", 'echo "Version: 1.22.9"')

    done = install(path, "opa")

    assert done.returncode == 0, done.stderr
    assert "there already" in done.stdout
    assert version(there) == OPA_VERSION


@pytest.mark.parametrize(
    ("tool", "printed"), (("opa", "Version: 1.22.9"), ("regal", "Version:       0.38.1"))
)
def test_the_right_version_on_path_is_linked_in_place_of_a_wrong_one(
    path: Path, tool: str, printed: str
) -> None:
    wrong = put(path.parent / "tools", tool, 'echo "Version: 0.1.0"')
    right = put(path, tool, f'echo "{printed}"')

    done = install(path, tool)

    assert done.returncode == 0, done.stderr
    assert wrong.resolve() == right


@pytest.mark.parametrize("printed", ("Version: 1.21.0", "Version: 1.220.1", "Version: 2.1.22", ""))
def test_another_version_on_path_is_not_used_and_go_builds_the_right_one(
    path: Path, printed: str
) -> None:
    put(path, "opa", f'echo "{printed}"')
    put(path, "go", GO)
    go_mod = path.parent / "go.mod"

    done = install(path, "opa", GO_MOD_COPY=str(go_mod))

    assert done.returncode == 0, done.stderr
    assert version(path.parent / "tools" / "opa") == OPA_VERSION
    assert "require github.com/open-policy-agent/opa v1.22.2\n" in go_mod.read_text()
    assert installed(path) == ["opa"]


def test_a_command_that_fails_is_not_the_right_version(path: Path) -> None:
    put(path, "opa", f'echo "{OPA_VERSION}"; exit 1')
    put(path, "go", "exit 1")

    done = install(path, "opa", PIP_NO_INDEX="1")

    assert done.returncode == 1


@pytest.mark.parametrize("go", (None, "echo go1.20.4", "echo nonsense"))
def test_without_go_and_without_a_package_index_it_says_what_to_install(
    path: Path, go: str | None
) -> None:
    if go is not None:
        put(path, "go", go)

    done = install(path, "opa", PIP_NO_INDEX="1")

    assert done.returncode == 1
    assert "Install Go 1.26 or newer" in done.stderr
    assert "Traceback" not in done.stderr
    assert installed(path) == []


def test_a_build_that_fails_says_what_to_do(path: Path) -> None:
    put(path, "go", '[ "$1" = env ] && echo go1.26.3')

    done = install(path, "regal")

    assert done.returncode == 1
    assert "put regal 0.38.1 on PATH" in done.stderr
    assert installed(path) == []


def test_a_build_that_gives_another_version_is_not_installed(path: Path) -> None:
    put(path, "go", GO)

    done = install(path, "regal", GO_MOD_COPY=os.devnull)

    assert done.returncode == 1
    assert "another version" in done.stderr
    assert installed(path) == []


def test_only_tools_that_are_known_are_installed(path: Path) -> None:
    assert install(path, "curl").returncode == 2
