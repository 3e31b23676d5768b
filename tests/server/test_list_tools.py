"""Which tools a caller may see, asked of a real sidecar."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp.api.v1 import authorization_pb2
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
STARTER = ROOT / "policies/bundle.tar.gz"
SCOPES = ("orders:read", "orders:write")
AUTHZ = 'package pdp.authz\n\ndecision := {"allow": true, "reason_code": "ok"}'
BUDGET = """package pdp.budget

limits := []

decision := {"allow": true, "reason_code": "ok"}
"""


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("listing")
    with SidecarProcess(directory, issuer=ISSUER, bundle=STARTER) as process:
        yield process


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    """Its policy lists what the caller says that it should."""
    directory = tmp_path_factory.mktemp("odd")
    rego = "package pdp.tools\n\nvisible := input.context.client.tools"
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle_of(directory, rego)) as process:
        yield process


def bundle_of(directory: Path, rego: str) -> Path:
    sources = directory / "policy"
    sources.mkdir()
    for name, text in {"authz": AUTHZ, "budget": BUDGET, "tools": rego}.items():
        if text:
            (sources / f"{name}.rego").write_text(text)
    return build_bundle(sources, directory / "bundle.tar.gz", opa=ROOT / ".tools/opa")


def acting(
    sidecar: SidecarProcess, tenant: str = "tenant_acme", actor: str = "user-7", **token: Any
) -> Caller:
    rights: dict[str, Sequence[str]] = {"roles": ["support_agent"], "scopes": SCOPES}
    return Caller(sidecar.target, token=ISSUER.token(tenant, actor, **{**rights, **token}))


def listed(caller: Caller, context: object = None) -> authorization_pb2.ListToolsResponse:
    request = authorization_pb2.ListToolsRequest()
    if context is not None:
        request.context_json = json.dumps(context).encode()
    response: authorization_pb2.ListToolsResponse = caller.authorization.ListTools(request)
    return response


def codes(caller: Caller) -> dict[str, str]:
    return {tool.name: tool.reason_code for tool in listed(caller).tools}


def records(sidecar: SidecarProcess, actor: str) -> list[dict[str, Any]]:
    lines = [
        json.loads(line)
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for line in segment.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line["actor_id"] == actor]


def test_a_caller_sees_its_tenant_s_tools_and_why_not_the_rest(sidecar: SidecarProcess) -> None:
    with acting(sidecar) as caller:
        response = listed(caller)
        names = [tool.name for tool in response.tools]
        assert names == sorted(names)
        assert response.policy_revision == caller.authorize("none").policy_revision
        assert codes(caller) == {
            "mail.send": "scope_missing",
            "orders.read": "ok",
            "orders.update": "ok",
            "reports.generate": "role_not_allowed",
        }
        for tool in response.tools:
            assert tool.callable is (tool.reason_code == "ok")


def test_a_listing_says_of_each_tool_what_a_call_would(sidecar: SidecarProcess) -> None:
    with acting(sidecar, roles=["analyst"]) as caller:
        for name, code in codes(caller).items():
            answer = caller.authorize(name)
            # With no arguments at all, those are what is wrong where nothing else is.
            expected = "argument_not_allowed" if code == "ok" else code
            assert answer.reason_code in {expected, "ok"}
            assert not answer.decision or code == "ok"


@pytest.mark.parametrize(
    ("tenant", "expected"),
    (("tenant_initech", {"tenant_suspended"}), ("tenant_nobody", set()), ("tenant_globex", None)),
)
def test_each_tenant_sees_its_own(
    sidecar: SidecarProcess, tenant: str, expected: set[str] | None
) -> None:
    with acting(sidecar, tenant) as caller, acting(sidecar) as other:
        seen = codes(caller)
        if expected is None:
            assert seen.keys() <= codes(other).keys()
        else:
            assert set(seen.values()) == expected


def test_a_tenant_in_the_context_changes_nothing(sidecar: SidecarProcess) -> None:
    with acting(sidecar) as caller:
        before = listed(caller)
        for context in ({"tenant": "tenant_globex"}, {"subject": {"id": "root"}}):
            assert listed(caller, context) == before


def test_a_listing_is_one_record_with_the_number_of_tools(sidecar: SidecarProcess) -> None:
    actor = f"user-{uuid.uuid4()}"
    with acting(sidecar, actor=actor) as caller:
        revision = listed(caller).policy_revision
    (record,) = records(sidecar, actor)
    assert (record["type"], record["action"], record["outcome"]) == (
        "listing", "tools.list", "allowed",
    )  # fmt: skip
    assert (record["tenant_id"], record["reason_code"]) == ("tenant_acme", "ok")
    assert record["policy_revision"] == revision
    assert record["detail"] == {"tools": 4, "callable": 2}
    assert "orders.read" not in json.dumps(record)


def test_nobody_sees_nothing(sidecar: SidecarProcess) -> None:
    for token, code in ((None, "token_missing"), ("x", "token_invalid")):
        with Caller(sidecar.target, token=token) as stranger:
            refused = refusal_of(listed, stranger)
            assert (refused.status, refused.reason_code) == (
                grpc.StatusCode.UNAUTHENTICATED, code,
            )  # fmt: skip


@pytest.mark.parametrize("context", ([], "x", {"a": "x" * 17_000}))
def test_context_has_its_form_and_bound(sidecar: SidecarProcess, context: object) -> None:
    with acting(sidecar) as caller:
        refused = refusal_of(listed, caller, context)
        assert refused.status is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == ("context_json",)


def test_a_bundle_without_such_a_rule_shows_none(tmp_path: Path) -> None:
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle_of(tmp_path, "")) as own,
        acting(own) as caller,
    ):
        response = listed(caller)
        assert list(response.tools) == []
        assert response.policy_revision


def test_a_rule_that_says_nothing_shows_none(odd: SidecarProcess) -> None:
    with acting(odd) as caller:
        assert list(listed(caller).tools) == []


@pytest.mark.parametrize(
    "tools",
    (
        {"orders.read": True},
        [{"name": "orders.read", "callable": True, "reason_code": "no"}],
        [{"name": "orders.read", "callable": False, "reason_code": "no", "tenant": "globex"}],
    ),
)
def test_an_answer_of_another_form_shows_none_and_is_on_record(
    odd: SidecarProcess, tools: object
) -> None:
    actor = f"user-{uuid.uuid4()}"
    with acting(odd, actor=actor) as caller:
        refused = refusal_of(listed, caller, {"tools": tools})
    assert refused.reason_code == "policy_invalid"
    assert "globex" not in refused.message
    (record,) = records(odd, actor)
    assert (record["outcome"], record["reason_code"]) == ("denied", "policy_invalid")


def test_a_listing_counts_as_a_call_of_its_tenant(tmp_path: Path) -> None:
    config = {"limits": {"tenants": {"calls_per_second": 0.1, "burst": 1}}}
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=STARTER, config=config) as own,
        acting(own) as caller,
    ):
        listed(caller)
        assert refusal_of(listed, caller).reason_code == "rate_limited"


def test_what_was_not_delegated_is_not_callable(sidecar: SidecarProcess) -> None:
    with acting(sidecar) as caller:
        token = caller.authorization.Delegate(
            authorization_pb2.DelegateRequest(
                request_id="1", delegate="researcher", tools=["orders.read", "mail.send"]
            )
        ).token
    with Caller(sidecar.target, token=token) as agent:
        assert codes(agent) == {
            "mail.send": "scope_missing",
            "orders.read": "ok",
            "orders.update": "tool_not_delegated",
            "reports.generate": "tool_not_delegated",
        }
