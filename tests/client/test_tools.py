"""Which tools there are, to be shown to a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pdp.client import ListingRefused, ToolInfo
from tests.client.faces import Face


def test_each_caller_sees_its_own_tools(face: Face, token_of: Callable[..., str]) -> None:
    with face.acting_for(token_of("tenant_acme", "user-1")):
        assert face.tools() == (
            ToolInfo("mail.send", True, "ok"),
            ToolInfo("orders.read", True, "ok"),
            ToolInfo("orders.update", True, "ok"),
            ToolInfo("reports.generate", False, "role_not_allowed"),
        )
    with face.acting_for(token_of("tenant_acme", "user-1", ["viewer"])):
        assert [tool.name for tool in face.tools() if tool.callable] == ["orders.read"]


def test_what_is_not_callable_is_denied_for_the_same_reason(
    face: Face, token: str, audit: Callable[[], list[dict[str, Any]]]
) -> None:
    with face.acting_for(token):
        (report,) = [tool for tool in face.tools() if not tool.callable]
        with pytest.raises(Exception, match=report.reason_code):
            face.authorize(report.name, {})
    assert [record["type"] for record in audit()] == ["listing", "decision"]


def test_nobody_sees_tools(face: Face) -> None:
    with pytest.raises(ListingRefused) as refused:
        face.tools()
    assert refused.value.reason_code == "identity_missing"
    with face.acting_for("no.valid.token"), pytest.raises(ListingRefused) as refused:
        face.tools()
    assert refused.value.reason_code == "token_invalid"
    assert refused.value.__context__ is None
    assert refused.value.__cause__ is None


def test_without_a_sidecar_there_are_none(face_of: Callable[..., Face], tmp_path: Any) -> None:
    face = face_of(f"unix://{tmp_path}/none.sock", timeout_seconds=0.2)
    with face.acting_for("a.b.c"), pytest.raises(ListingRefused) as refused:
        face.tools()
    assert refused.value.reason_code in {"pdp_unavailable", "deadline_exceeded"}
