"""What `pdp serve` takes up when it starts, and leaves when it serves."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from pdp.testing import SidecarProcess, TokenIssuer

STARTER: Final = Path(__file__).parents[2] / "policies" / "bundle.tar.gz"
SERVE: Final = """
import sys
from pdp.cli import main
sys.argv = ["pdp", "serve", "--config", {config!r}]
"""
MODULES_OF_A_WRONG_START: Final = """
try:
    main()
except SystemExit as exit:
    assert exit.code == 2, exit.code
print(*sys.modules)
"""
INTERRUPTED: Final = """
from pdp.cli import run_sidecar

def interrupted(config):
    raise KeyboardInterrupt

run_sidecar.run = interrupted
main()
"""
COLLECTS_WHILE_IT_SERVES: Final = """
import gc, os, pathlib, signal, threading
state = pathlib.Path({state!r})
stopped = threading.Event()

def look():
    # The lock is taken after collection was switched off.
    while not ((state / "lock").exists() and gc.isenabled()):
        if stopped.wait(0.01):
            return
    print("collects", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

thread = threading.Thread(target=look)
thread.start()
try:
    main()
finally:
    stopped.set()
    thread.join()
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_start_imports_no_other_command(tmp_path: Path) -> None:
    serve = SERVE.format(config=str(tmp_path / "missing.yaml"))
    modules = run(serve + MODULES_OF_A_WRONG_START).split()
    assert "pdp.cli.run_sidecar" in modules
    others = {name for name in modules if name.startswith("pdp.cli.")}
    assert others == {"pdp.cli.run_sidecar", "pdp.cli.exit_codes"}
    assert "typer" not in modules


def test_what_compiles_the_policy_waits_for_no_signatures() -> None:
    program = "import sys, pdp.server.policy, pdp.policy.wasm; print(*sys.modules)"
    assert not {"joserfc", "cryptography"} & set(run(program).split())


@pytest.mark.parametrize(
    "arguments",
    (["--config", "{}"], ["-c", "{}"], ["--config={}"], ["-c{}"]),
)
def test_serve_says_the_same_however_its_configuration_is_named(
    tmp_path: Path, arguments: list[str]
) -> None:
    missing = str(tmp_path / "missing.yaml")
    told = [argument.format(missing) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pdp", "serve", *told],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"{missing}: can not be read: No such file or directory\n",
    )


def test_a_start_that_is_interrupted_says_nothing() -> None:
    program = SERVE.format(config="pdp.yaml") + INTERRUPTED
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_sidecar_that_serves_collects_garbage_which_a_start_does_not(tmp_path: Path) -> None:
    with closing(SidecarProcess(tmp_path, issuer=TokenIssuer(), bundle=STARTER)) as sidecar:
        serve = SERVE.format(config=str(sidecar.config_file))
        look = COLLECTS_WHILE_IT_SERVES.format(state=str(sidecar.state))
        assert run(serve + look) == "collects\n"
