"""The webhook's answers, without an API server."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pdp.injection.patch import Injection, InjectionError, patch
from pdp.injection.webhook import application

Pod = dict[str, Any]
WANTED: Pod = {
    "native": True,
    "container": {"name": "pdp", "image": "registry.example/agent-pdp"},
    "volumes": [{"name": "pdp-socket", "emptyDir": {}}],
    "env": [{"name": "PDP_TARGET", "value": "unix:///run/pdp/pdp.sock"}],
    "mounts": [{"name": "pdp-socket", "mountPath": "/run/pdp"}],
    "groupId": 65532,
    "pullSecrets": [],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "injection.json"
    path.write_text(json.dumps(WANTED))
    return path


def pod(*, label: str = "enabled", **spec: Any) -> Pod:
    return {
        "metadata": {"labels": {"agent-pdp/inject": label}},
        "spec": {"containers": [{"name": "agent"}], **spec},
    }


def applied(before: Pod, file: Path) -> Pod:
    """The pod with the patch, of which every operation adds."""
    after: Pod = json.loads(json.dumps(before))
    for operation in patch(before, Injection.from_file(file)):
        assert operation["op"] == "add"
        *above, last = str(operation["path"]).split("/")[1:]
        place: Any = after
        for key in above:
            place = place[int(key)] if isinstance(place, list) else place[key]
        if isinstance(place, list):
            place.insert(int(last), operation["value"])
        else:
            place[last] = operation["value"]
    return after


def test_the_sidecar_comes_first_and_its_socket_to_everyone_else(file: Path) -> None:
    spec = applied(pod(initContainers=[{"name": "migrate"}]), file)["spec"]
    assert [each["name"] for each in spec["initContainers"]] == ["pdp", "migrate"]
    for container in (spec["initContainers"][1], spec["containers"][0]):
        assert container["env"] == WANTED["env"]
        assert container["volumeMounts"] == WANTED["mounts"]
    assert spec["volumes"] == WANTED["volumes"]
    group = {"fsGroup": 65532, "fsGroupChangePolicy": "OnRootMismatch"}
    assert spec["securityContext"] == group
    assert "imagePullSecrets" not in spec


def test_what_a_pod_has_stays_unless_it_is_ours(file: Path) -> None:
    theirs = {
        "name": "agent",
        "env": [{"name": "A", "value": "1"}, {"name": "PDP_TARGET", "value": "elsewhere:1"}],
        "volumeMounts": [{"name": "x", "mountPath": "/x"}, {"name": "y", "mountPath": "/run/pdp"}],
    }
    chosen = {"fsGroup": 2000, "runAsNonRoot": True}
    spec = applied(pod(containers=[theirs], securityContext=chosen), file)["spec"]
    assert spec["containers"][0]["env"] == [{"name": "A", "value": "1"}, *WANTED["env"]]
    mounts = [{"name": "x", "mountPath": "/x"}, *WANTED["mounts"]]
    assert spec["containers"][0]["volumeMounts"] == mounts
    assert spec["securityContext"] == chosen


@pytest.mark.parametrize("name", ([], {}, None, 1))
def test_names_that_are_no_text_stay_for_the_api_server_to_refuse(file: Path, name: object) -> None:
    theirs = {"name": "agent", "env": [{"name": name}]}
    spec = applied(pod(containers=[theirs]), file)["spec"]
    assert spec["containers"][0]["env"] == [{"name": name}, *WANTED["env"]]


def test_a_pod_that_does_not_ask_or_has_it_stays_as_it_is(file: Path) -> None:
    injection = Injection.from_file(file)
    assert patch(pod(label="disabled"), injection) == []
    assert patch({"spec": {"containers": []}}, injection) == []
    assert patch(applied(pod(), file), injection) == []


def test_what_the_image_is_pulled_with_comes_to_what_the_pod_has(file: Path) -> None:
    file.write_text(json.dumps({**WANTED, "pullSecrets": [{"name": "a"}, {"name": "ours"}]}))
    spec = applied(pod(imagePullSecrets=[{"name": "theirs"}, {"name": "a"}]), file)["spec"]
    assert [each["name"] for each in spec["imagePullSecrets"]] == ["theirs", "a", "ours"]


def test_a_plain_container_comes_first_of_the_containers(file: Path) -> None:
    file.write_text(json.dumps({**WANTED, "native": False}))
    spec = applied(pod(), file)["spec"]
    assert [each["name"] for each in spec["containers"]] == ["pdp", "agent"]
    assert spec["containers"][1]["env"] == WANTED["env"]
    assert "initContainers" not in spec


@pytest.mark.parametrize(
    "content",
    (
        "",
        "[]",
        "{}",
        json.dumps({**WANTED, "more": 1}),
        json.dumps({**WANTED, "container": {"name": "other"}}),
        json.dumps({**WANTED, "groupId": "1"}),
        json.dumps({**WANTED, "volumes": {}}),
        json.dumps({**WANTED, "pullSecrets": "a"}),
    ),
)
def test_what_the_chart_did_not_render_is_refused_with_the_file(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(InjectionError, match=r"injection\.json: "):
        Injection.from_file(file)


def served(file: Path, use: Callable[[aiohttp.ClientSession, str], Awaitable[None]]) -> None:
    async def run() -> None:
        runner = web.AppRunner(application(file), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            port = runner.addresses[0][1]
            async with aiohttp.ClientSession() as session:
                await use(session, f"http://127.0.0.1:{port}")
        finally:
            await runner.cleanup()

    asyncio.run(run())


def test_a_review_is_answered_with_a_patch(file: Path) -> None:
    async def use(session: aiohttp.ClientSession, address: str) -> None:
        review = {"request": {"uid": "7", "object": pod()}}
        async with session.post(f"{address}/inject", json=review) as answer:
            response = (await answer.json())["response"]
        assert response["uid"] == "7"
        assert response["allowed"] is True
        operations = json.loads(base64.b64decode(response["patch"]))
        assert operations == patch(pod(), Injection.from_file(file))
        async with session.get(f"{address}/healthz") as answer:
            assert answer.status == 200

    served(file, use)


@pytest.mark.parametrize(
    "body", (b"", b"{", b"[]", b"{}", b'{"request": 1}', b'{"request": {"uid": "7"}}')
)
def test_what_is_no_review_is_refused(file: Path, body: bytes) -> None:
    async def use(session: aiohttp.ClientSession, address: str) -> None:
        async with session.post(f"{address}/inject", data=body) as answer:
            assert answer.status == 400

    served(file, use)


def test_a_file_that_went_bad_lets_no_pod_through_unchanged(file: Path) -> None:
    async def use(session: aiohttp.ClientSession, address: str) -> None:
        await asyncio.to_thread(file.write_text, "{")
        review = {"request": {"uid": "7", "object": pod()}}
        async with session.post(f"{address}/inject", json=review) as answer:
            assert answer.status == 500

    served(file, use)


def test_a_file_that_is_bad_from_the_start_is_told(file: Path) -> None:
    file.write_text("{}")
    with pytest.raises(InjectionError):
        application(file)
