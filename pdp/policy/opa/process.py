"""One OPA process on one bundle, in a folder that only the sidecar can enter."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from pdp.policy.bundle import Bundle
from pdp.policy.engine import BundleError
from pdp.policy.opa import leash
from pdp.reason import ReasonCode

GRACE_SECONDS: Final = 2.0
"""How long a process may take to end before it is killed."""
MAX_SAID_BYTES: Final = 16 * 1024
"""How much of what OPA prints is kept."""
BUNDLE: Final = "bundle"
"""The name of the bundle's folder, as it stands in what OPA says of a file."""
_MAX_SOCKET_PATH: Final = 107
"""sun_path of unix(7), less its NUL."""
_ENVIRONMENT_KEPT: Final = ("LD_LIBRARY_PATH",)
"""What Python itself may need to start. OPA gets nothing else: a policy can read its
environment (opa.runtime)."""


class OpaFolder:
    """A folder with mode 0700: the bundle for OPA, and the socket that OPA answers on.

    Raises BundleError when it can not be written.
    """

    def __init__(self, bundle: Bundle) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="pdp-opa-"))
        except OSError as error:
            raise _refused(f"no folder can be made: {error.strerror}; set TMPDIR") from None
        self.socket = self.path / "s"
        """Where OPA listens."""
        try:
            self._write(bundle)
        except BaseException:
            self.remove()
            raise

    def clear(self) -> None:
        """Delete the bundle, which OPA has read: tenants' data need not outlast a sidecar
        that is killed.
        """
        shutil.rmtree(self.path / BUNDLE, ignore_errors=True)

    def remove(self) -> None:
        """Delete it, also when some of it is gone already."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, bundle: Bundle) -> None:
        if len(os.fsencode(self.socket)) > _MAX_SOCKET_PATH:
            raise _refused("the temporary folder's path is too long for a socket; set TMPDIR")
        files = {
            ".manifest": json.dumps({"revision": bundle.revision, "roots": [""]}).encode(),
            "data.json": bundle.data,
        }
        for name, text in bundle.rego.items():
            if not name.endswith("_test.rego"):
                files[name] = text.encode()
        for name, content in files.items():
            file = self.path / BUNDLE / name
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            except OSError as error:
                raise _refused(f"{name} can not be written: {error.strerror}") from None


class OpaProcess:
    """A running OPA, which dies with the sidecar, however that dies."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said = bytearray()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, opa: Path, folder: OpaFolder, *, workers: int) -> OpaProcess:
        """Start it. Raises BundleError when it can not be started."""
        environment = {name: os.environ[name] for name in _ENVIRONMENT_KEPT if name in os.environ}
        try:
            process = await asyncio.create_subprocess_exec(
                *_command(opa, folder.socket),
                cwd=folder.path,
                env={**environment, "GOMAXPROCS": str(workers)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # Ctrl-C is for the sidecar, which answers what it has begun and then ends OPA.
                start_new_session=True,
            )
        except OSError as error:
            raise _refused(f"it can not be started: {error.strerror}") from None
        return cls(process)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended, by itself or not."""
        return self._process.returncode is not None

    async def wait(self) -> None:
        """Return when it has ended."""
        await self._process.wait()

    async def refusal(self) -> BundleError:
        """Why it has ended instead of answering, in OPA's own words.

        Only for a process that has not been asked anything yet: later words may
        repeat what a policy was asked.
        """
        await self._listening
        return _refused(f"OPA says:\n{self._said.decode(errors='replace').strip()}")

    async def stop(self) -> None:
        """End it: politely, then not."""
        if not self.ended:
            self._process.terminate()
            try:
                async with asyncio.timeout(GRACE_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._listening

    async def _listen(self) -> None:
        """Keep the end of what it prints, and its pipe from filling up."""
        stream = self._process.stdout
        while stream is not None and (chunk := await stream.read(MAX_SAID_BYTES)):
            self._said += chunk
            del self._said[:-MAX_SAID_BYTES]


def _command(opa: Path, socket: Path) -> list[str]:
    return [
        sys.executable, "-I", "-S", leash.__file__, str(os.getpid()),
        str(opa.absolute()), "run", "--server", "--addr", f"unix://{socket}",
        "--unix-socket-perm", "600", "--bundle", BUNDLE, "--log-level", "error",
        "--skip-version-check", "--shutdown-grace-period", "1",
    ]  # fmt: skip


def _refused(why: str) -> BundleError:
    return BundleError(
        ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle can not be served by OPA: {why}"
    )
