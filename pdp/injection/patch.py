"""What makes a pod one with the sidecar: the same as the chart's MutatingAdmissionPolicy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdp.canonical import JsonError, JsonObject, JsonValue, parse_object
from pdp.errors import PdpError
from pdp.reason import ReasonCode

LABEL: Final = "agent-pdp/inject"
NAME: Final = "pdp"
MAX_BYTES: Final = 256 * 1024
_KEYS: Final = frozenset(
    {"native", "container", "volumes", "env", "mounts", "groupId", "pullSecrets"}
)


class InjectionError(PdpError):
    """What is to be injected can not be read: reason code request_invalid. The message is
    for operators.
    """

    def __init__(self, message: str) -> None:
        super().__init__(ReasonCode.REQUEST_INVALID, message)


@dataclass(frozen=True, slots=True)
class Injection:
    """What is put into a pod, as the chart renders it. Every part is as in a pod's spec."""

    native: bool
    """Whether the container is an init container that goes on."""
    container: JsonObject
    volumes: list[JsonValue]
    env: list[JsonValue]
    """For every other container of the pod, as are mounts."""
    mounts: list[JsonValue]
    group_id: int
    """The pod's fsGroup, where it has chosen none."""
    pull_secrets: list[JsonValue]
    """For the sidecar's image, besides the pod's own."""

    @classmethod
    def from_file(cls, path: Path) -> Injection:
        """Read what the chart has rendered. Raises InjectionError."""
        try:
            with path.open("rb") as file:
                found = parse_object(file.read(MAX_BYTES + 1), max_bytes=MAX_BYTES)
        except OSError as error:
            raise InjectionError(f"{path}: can not be read: {error.strerror}") from None
        except JsonError as error:
            raise InjectionError(f"{path}: {error}") from None
        if found.keys() != _KEYS:
            raise InjectionError(f"{path}: expected exactly {', '.join(sorted(_KEYS))}")
        native, container, group_id = found["native"], found["container"], found["groupId"]
        volumes, env, mounts = found["volumes"], found["env"], found["mounts"]
        pull_secrets = found["pullSecrets"]
        if not (
            isinstance(native, bool)
            and isinstance(container, dict)
            and container.get("name") == NAME
            and isinstance(group_id, int)
            and isinstance(volumes, list)
            and isinstance(env, list)
            and isinstance(mounts, list)
            and isinstance(pull_secrets, list)
        ):
            raise InjectionError(f"{path}: is not what the chart renders")
        return cls(native, container, volumes, env, mounts, group_id, pull_secrets)


def patch(pod: JsonObject, injection: Injection) -> list[JsonObject]:
    """The JSON patch (RFC 6902) for a pod that asks for the sidecar by its label; empty for
    any other, and for one that has it.
    """
    spec = _object(pod.get("spec"))
    kinds = {kind: _objects(spec.get(kind)) for kind in ("initContainers", "containers")}
    has_it = any(each.get("name") == NAME for found in kinds.values() for each in found)
    if not _asks(pod) or has_it:
        return []
    operations: list[JsonObject] = []
    for kind, containers in kinds.items():
        for place, container in enumerate(containers):
            for key, ours, same in (
                ("env", injection.env, "name"),
                ("volumeMounts", injection.mounts, "mountPath"),
            ):
                merged = _merged(_objects(container.get(key)), ours, same)
                operations.append(_add(f"/spec/{kind}/{place}/{key}", merged))
    volumes = [*_objects(spec.get("volumes")), *injection.volumes]
    operations.append(_add("/spec/volumes", volumes))
    security = _object(spec.get("securityContext"))
    if security.get("fsGroup") is None:
        # A group that the pod did not ask for is given its volumes at most once.
        group: JsonObject = {
            "fsGroup": injection.group_id,
            "fsGroupChangePolicy": "OnRootMismatch",
        }
        operations.append(_add("/spec/securityContext", {**security, **group}))
    if injection.pull_secrets:
        key = "imagePullSecrets"
        merged = _merged(_objects(spec.get(key)), injection.pull_secrets, "name")
        operations.append(_add(f"/spec/{key}", merged))
    # First of all, so that it is there for init containers that call tools.
    into = "initContainers" if injection.native else "containers"
    if not kinds[into]:
        operations.append(_add(f"/spec/{into}", []))
    operations.append(_add(f"/spec/{into}/0", injection.container))
    return operations


def _asks(pod: JsonObject) -> bool:
    labels = _object(_object(pod.get("metadata")).get("labels"))
    return labels.get(LABEL) == "enabled"


def _merged(theirs: list[JsonObject], ours: list[JsonValue], same: str) -> list[JsonValue]:
    """Ours in the place of what is the same by that key."""
    # No set: theirs may be no text, and what the API server makes of that is its affair.
    taken = [_object(each).get(same) for each in ours]
    return [*(each for each in theirs if each.get(same) not in taken), *ours]


def _add(path: str, value: JsonValue) -> JsonObject:
    return {"op": "add", "path": path, "value": json.loads(json.dumps(value))}


def _object(value: JsonValue) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _objects(value: JsonValue) -> list[JsonObject]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
