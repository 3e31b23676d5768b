"""A real API server and its etcd, on loopback, with nothing behind them: no node runs a
pod, and no controller follows up.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Final, Self

import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from pdp.closing import Closing

TOOLS: Final = Path(__file__).parents[2] / ".tools"
START_SECONDS: Final = 90.0
SERVICE_ACCOUNT_ISSUER: Final = "https://kubernetes.default.svc"

Object = dict[str, Any]


class Cluster(Closing):
    """Whoever has it is its administrator."""

    def __init__(self, directory: Path) -> None:
        """Everything that it keeps lies below ``directory``."""
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self._token = secrets.token_urlsafe(24)
        self._kubeconfig = directory / "kubeconfig"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop both."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait(30)
        self._processes.clear()

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        """What kubectl prints. Raises RuntimeError with what it says instead."""
        done = subprocess.run(
            [TOOLS / "kubectl", f"--kubeconfig={self._kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            # Nothing of the user's own.
            env={"HOME": str(self._directory), "PATH": os.environ["PATH"]},
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return done.stdout

    def apply(self, manifests: str, *, dry_run: bool = False) -> list[Object]:
        """Apply manifests as the API server itself does, and what it made of them."""
        options = ["--dry-run=server"] if dry_run else []
        printed = self.kubectl(
            *("apply", "--server-side", "--output=json", "--filename=-", *options),
            stdin=manifests,
        )
        decoder, position = json.JSONDecoder(), 0
        objects: list[Object] = []
        while position < len(printed.rstrip()):
            value, position = decoder.raw_decode(printed, position)
            objects += value["items"] if value["kind"] == "List" else [value]
            position += len(printed[position:]) - len(printed[position:].lstrip())
        return objects

    def create(self, manifest: Object, *, dry_run: bool = False) -> Object:
        """Create one object, and what it became on the way in."""
        options = ["--dry-run=server"] if dry_run else []
        printed = self.kubectl(
            *("create", "--output=json", "--filename=-", *options), stdin=yaml.safe_dump(manifest)
        )
        created: Object = json.loads(printed)
        return created

    def make_namespace(self, name: str, **labels: str) -> str:
        """A namespace with the service account that a controller would put into it."""
        self.create(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name, "labels": labels},
            }
        )
        self.create(
            {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"name": "default", "namespace": name},
            }
        )
        return name

    def service_account_keys(self) -> str:
        """The JWK set that service-account tokens verify with."""
        return self.kubectl("get", "--raw", "/openid/v1/jwks")

    def _start(self) -> None:
        client, peer, secure = _free_port(), _free_port(), _free_port()
        etcd = f"http://127.0.0.1:{client}"
        self._run(
            "etcd",
            *("--data-dir", str(self._directory / "etcd")),
            *("--listen-client-urls", etcd, "--advertise-client-urls", etcd),
            *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
            *("--unsafe-no-fsync",) if _knows_no_fsync() else (),
        )
        private, public = self._service_account_keys()
        users = self._directory / "users.csv"
        users.write_text(f'{self._token},admin,admin,"system:masters"\n', encoding="utf-8")
        self._run(
            "kube-apiserver",
            *("--etcd-servers", etcd),
            *("--bind-address", "127.0.0.1", "--secure-port", str(secure)),
            *("--cert-dir", str(self._directory / "certificates")),
            *("--authorization-mode", "RBAC", "--token-auth-file", str(users)),
            *("--service-cluster-ip-range", "10.0.0.0/24"),
            *("--service-account-issuer", SERVICE_ACCOUNT_ISSUER),
            *("--service-account-key-file", str(public)),
            *("--service-account-signing-key-file", str(private)),
            "--profiling=false",
        )
        self._write_kubeconfig(secure)
        self._wait()

    def _run(self, command: str, *arguments: str) -> None:
        with (self._directory / f"{command}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [TOOLS / command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._directory,
                )
            )

    def _service_account_keys(self) -> tuple[Path, Path]:
        key = rsa.generate_private_key(65537, 2048)
        private, public = self._directory / "service-account.pem", self._directory / "public.pem"
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public.write_bytes(
            key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
        return private, public

    def _write_kubeconfig(self, port: int) -> None:
        server = {
            "server": f"https://127.0.0.1:{port}",
            # Its own certificate, which it makes when it starts.
            "certificate-authority": str(self._directory / "certificates" / "apiserver.crt"),
        }
        self._kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "test", "cluster": server}],
                    "users": [{"name": "admin", "user": {"token": self._token}}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
                    "current-context": "test",
                }
            ),
            encoding="utf-8",
        )
        self._kubeconfig.chmod(0o600)

    def _wait(self) -> None:
        ends_at = time.monotonic() + START_SECONDS
        said = ""
        while time.monotonic() < ends_at:
            for process in self._processes:
                if process.poll() is not None:
                    raise RuntimeError(f"{process.args!r} ended; its log is in {self._directory}")
            try:
                self.kubectl("get", "--raw", "/readyz")
                self.kubectl("get", "namespace", "default")
            except RuntimeError as error:
                said = str(error)
                time.sleep(0.2)
            else:
                return
        raise RuntimeError(f"the API server is not ready: {said}")


def _knows_no_fsync() -> bool:
    printed = subprocess.run(
        [TOOLS / "etcd", "--help"], capture_output=True, text=True, timeout=30, check=False
    )
    return "unsafe-no-fsync" in printed.stdout + printed.stderr


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
