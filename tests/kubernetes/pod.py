"""Runs the containers of a pod as a kubelet would, out of a root file system, as processes
of this machine: the order of start and stop, probes, restarts, volumes and their swaps.

There is no network of its own: ports of the pod are ports of this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pdp.closing import Closing

LAUNCH: Final = Path(__file__).with_name("launch.py")
POLL_SECONDS: Final = 0.01

Object = dict[str, Any]
Files = Mapping[str, bytes]


class Pod(Closing):
    """A pod on this machine. Its manifest is one that an API server has admitted."""

    def __init__(
        self,
        manifest: Object,
        directory: Path,
        *,
        images: Mapping[str, Path],
        config_maps: Mapping[str, Files],
        secrets: Mapping[str, Files],
        name: str = "agent-1",
    ) -> None:
        """``images``: by container the folder that its image unpacks to."""
        self.spec: Object = manifest["spec"]
        self.name = name
        self.namespace: str = manifest["metadata"]["namespace"]
        self.directory = directory
        self._images = images
        self._sources = {"configMap": config_maps, "secret": secrets}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.events: list[str] = []
        """What became of containers, in order."""
        self._fs_group: int = self.spec["securityContext"]["fsGroup"]
        for volume in self.spec["volumes"]:
            self._make_volume(volume)

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait(30)

    @property
    def containers(self) -> dict[str, Object]:
        """All of them, by name."""
        every = (*self.spec.get("initContainers", ()), *self.spec["containers"])
        return {container["name"]: container for container in every}

    @property
    def _sidecars(self) -> list[Object]:
        return [
            container
            for container in self.spec.get("initContainers", ())
            if container.get("restartPolicy") == "Always"
        ]

    def start(self, *, ready: Callable[[], None] = lambda: None) -> None:
        """Start everything in its order. ``ready`` is called when the sidecars are, and
        before the containers are started.
        """
        for container in self.spec.get("initContainers", ()):
            self._run(container)
            if container in self._sidecars:
                self.wait_for(container["name"], "startupProbe")
            else:
                self._finish(container["name"])
        ready()
        for container in self.spec["containers"]:
            self._run(container)

    def wait_for(self, name: str, probe: str) -> None:
        """Probe until it succeeds. Raises RuntimeError past the probe's own patience."""
        settings = self.containers[name][probe]
        patience = settings.get("periodSeconds", 10) * settings.get("failureThreshold", 3)
        ends_at = time.monotonic() + patience
        while time.monotonic() < ends_at:
            if self.processes[name].poll() is not None:
                raise RuntimeError(f"{name} has ended:\n{self.log(name)}")
            if self.probe(name, probe):
                self.events.append(f"{name} {probe}")
                return
            time.sleep(POLL_SECONDS)
        raise RuntimeError(f"the {probe} of {name} has failed:\n{self.log(name)}")

    def probe(self, name: str, probe: str) -> bool:
        """Look once."""
        container = self.containers[name]
        get = container[probe]["httpGet"]
        (port,) = (
            each["containerPort"] for each in container["ports"] if each["name"] == get["port"]
        )
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{get['path']}", timeout=1):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def restart(self, name: str) -> None:
        """What a kubelet does when a container that always restarts has ended."""
        self.processes[name].wait(30)
        self._run(self.containers[name])

    def wait_for_job(self) -> int:
        """Wait for the containers to end by themselves, then stop the sidecars. The worst
        exit code of the containers.
        """
        codes = [self._finish(container["name"]) for container in self.spec["containers"]]
        self._stop_sidecars(time.monotonic() + self._grace_seconds)
        return max(codes)

    def delete(self) -> dict[str, int]:
        """Stop everything as when a pod is deleted: containers first, then sidecars, the
        last one first, all within the pod's grace. The exit code of each.
        """
        ends_at = time.monotonic() + self._grace_seconds
        for container in self.spec["containers"]:
            self._signal(container["name"])
        codes = {
            container["name"]: self._end(container["name"], ends_at)
            for container in self.spec["containers"]
        }
        return codes | self._stop_sidecars(ends_at)

    def log(self, name: str) -> str:
        """What a container has printed."""
        return (self.directory / f"{name}.log").read_text(encoding="utf-8")

    def volume(self, name: str) -> Path:
        """Where a volume lies."""
        return self.directory / "volumes" / name

    def update(self, volume: str, files: Files) -> None:
        """Swap the content of a ConfigMap or Secret, all of it at once."""
        folder = self.volume(volume)
        fresh = folder / f"..{time.monotonic_ns()}"
        fresh.mkdir()
        for name, content in files.items():
            (fresh / name).write_bytes(content)
        self._own(fresh, self._mode(volume))
        link = folder / "..data_tmp"
        link.symlink_to(fresh.name)
        before = (folder / "..data").resolve() if (folder / "..data").is_symlink() else None
        link.replace(folder / "..data")
        for name in files:
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(Path("..data", name))
        if before is not None:
            shutil.rmtree(before)

    @property
    def _grace_seconds(self) -> float:
        return float(self.spec.get("terminationGracePeriodSeconds", 30))

    def _stop_sidecars(self, ends_at: float) -> dict[str, int]:
        codes = {}
        for container in reversed(self._sidecars):
            self._signal(container["name"])
            codes[container["name"]] = self._end(container["name"], ends_at)
        return codes

    def _signal(self, name: str) -> None:
        self.events.append(f"{name} SIGTERM")
        if self.processes[name].poll() is None:
            self.processes[name].send_signal(signal.SIGTERM)

    def _end(self, name: str, ends_at: float) -> int:
        process = self.processes[name]
        try:
            code = process.wait(max(0.0, ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait(30)
        self.events.append(f"{name} ended {code}")
        return code

    def _finish(self, name: str) -> int:
        code = self.processes[name].wait(120)
        self.events.append(f"{name} ended {code}")
        return code

    def _run(self, container: Object) -> None:
        name, security = container["name"], container["securityContext"]
        scratch = self.directory / f"{name}.scratch"
        scratch.mkdir(exist_ok=True)
        command = [*container.get("command", ["/usr/bin/pdp"]), *container.get("args", ())]
        spec = {
            "image": str(self._images[name]),
            "scratch": str(scratch),
            "mounts": [
                [str(self.volume(each["name"])), each["mountPath"], each.get("readOnly", False)]
                for each in container["volumeMounts"]
            ],
            "user": security["runAsUser"],
            "group": security.get("runAsGroup", security["runAsUser"]),
            "groups": [self._fs_group],
            "environment": {
                "PATH": "/usr/bin",
                **self._environment(container),
            },
            "command": command,
        }
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["/usr/bin/unshare", "--mount", sys.executable, LAUNCH, json.dumps(spec)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.events.append(f"{name} started")

    def _environment(self, container: Object) -> dict[str, str]:
        """Variables may name those before them: $(NAME)."""
        of_pod = {"metadata.name": self.name, "metadata.namespace": self.namespace}
        found: dict[str, str] = {}
        for variable in container.get("env", ()):
            if "value" in variable:
                value = re.sub(
                    r"\$\((\w+)\)", lambda match: found.get(match[1], match[0]), variable["value"]
                )
            else:
                value = of_pod[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            found[variable["name"]] = value
        return found

    def _make_volume(self, volume: Object) -> None:
        folder = self.volume(volume["name"])
        folder.mkdir(parents=True)
        if "emptyDir" in volume:
            os.chown(folder, 0, self._fs_group)
            folder.chmod(0o2777)
            return
        for kind, named in (("configMap", "name"), ("secret", "secretName")):
            if kind in volume:
                self.update(volume["name"], self._sources[kind][volume[kind][named]])
                return
        # A projected service-account token, which only a kubelet can get.
        os.chown(folder, 0, self._fs_group)

    def _mode(self, volume: str) -> int:
        (found,) = (each for each in self.spec["volumes"] if each["name"] == volume)
        source: Object = found.get("configMap") or found["secret"]
        return int(source.get("defaultMode", 0o644))

    def _own(self, folder: Path, mode: int) -> None:
        """As a kubelet hands out files where the pod has an fsGroup."""
        os.chown(folder, 0, self._fs_group)
        folder.chmod(0o2755)
        for file in folder.iterdir():
            os.chown(file, 0, self._fs_group)
            file.chmod(mode | 0o040)
