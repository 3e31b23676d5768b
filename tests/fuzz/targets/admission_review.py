"""Pods that the API server shows to the webhook, which puts the sidecar into them
(pdp.injection).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Final, cast

from pdp.canonical import JsonObject, JsonValue
from pdp.injection.patch import LABEL, NAME, Injection, patch
from tests.fuzz.choices import Choices, edited

INJECTION: Final = Injection(
    native=True,
    container={"name": NAME, "image": "pdp"},
    volumes=[{"name": "pdp", "emptyDir": {}}],
    env=[{"name": "PDP_TARGET", "value": "unix:///run/pdp/pdp.sock"}],
    mounts=[{"name": "pdp", "mountPath": "/run/pdp"}],
    group_id=65532,
    pull_secrets=[{"name": "registry"}],
)
POD: Final[JsonValue] = {
    "metadata": {"labels": {LABEL: "enabled"}},
    "spec": {
        "initContainers": [{"name": "init", "env": [{"name": "A", "value": "1"}]}],
        "containers": [
            {"name": "agent", "volumeMounts": [{"name": "v", "mountPath": "/v"}]},
            {"name": "other"},
        ],
        "volumes": [{"name": "v"}],
        "securityContext": {"fsGroup": None},
        "imagePullSecrets": [{"name": "own"}],
    },
}


def samples() -> Iterable[bytes]:
    yield b""


def one_input(data: bytes) -> bool:
    pod = edited(POD, Choices(data))
    if not isinstance(pod, dict):
        return False
    before = copy.deepcopy(pod)
    operations = patch(pod, INJECTION)
    assert pod == before, "the pod that was shown is changed"
    if not operations:
        return False
    if not _is_typed(pod):
        return False  # which no API server shows
    patched = copy.deepcopy(pod)
    for operation in operations:
        _add(patched, operation)
    spec = cast("Any", patched)["spec"]
    assert spec["initContainers"][0] == INJECTION.container
    assert all(each in spec["volumes"] for each in INJECTION.volumes)
    for container in [*spec["initContainers"][1:], *spec.get("containers", [])]:
        assert INJECTION.env[0] in container["env"]
        assert INJECTION.mounts[0] in container["volumeMounts"]
    return True


def _is_typed(pod: JsonObject) -> bool:
    """Whether lists of objects are that, as the API server sees to."""
    spec: Any = pod.get("spec")
    if not isinstance(spec, dict):
        return False
    lists = [spec.get(kind, []) for kind in ("initContainers", "containers", "volumes")]
    return all(
        isinstance(found, list) and all(isinstance(each, dict) for each in found) for found in lists
    )


def _add(document: Any, operation: JsonObject) -> None:
    """RFC 6902 4.1, for paths that need no escapes."""
    *steps, last = str(operation["path"]).split("/")[1:]
    for step in steps:
        document = document[int(step)] if isinstance(document, list) else document[step]
    if isinstance(document, list):
        document.insert(int(last), operation["value"])
    else:
        document[last] = operation["value"]
