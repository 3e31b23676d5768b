"""Everything that is asked, in the order of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One client of one server, or of a library."""

    name: str
    title: str
    asker: str
    """MODULE:CLASS of the client, which bench.peers.seat runs."""
    server: str = ""
    """Of :func:`bench.peers.__main__.every_server`; empty where nothing is asked over a wire."""
    of_peer: bool = False
    """Whether the client runs in the peers' environment."""
    shows_token: bool = False
    """Whether it tells who asks by a token, where others are told the tenant."""
    decides: bool = True
    """Whether it gives the cases their right answers, which is checked first."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the class, besides."""
    group: str
    """The table that it stands in."""


FLOOR, STAGES, OURS, PEERS, INSIDE = "floor", "stages", "ours", "peers", "in process"


def _stage(name: str, title: str, stage: str) -> System:
    return System(
        name=f"stage-{name}",
        title=title,
        asker="bench.peers.ask_stages:Stage",
        options={"stage": stage},
        server="stages",
        shows_token=True,
        decides=False,
        group=STAGES,
    )


def _floor(name: str, title: str, asker: str) -> System:
    return System(
        name=name,
        title=title,
        asker=f"bench.peers.ask_stages:{asker}",
        server="stages",
        shows_token=True,
        decides=False,
        group=FLOOR,
    )


SYSTEMS: Final = (
    _floor("empty-unary", "an empty call", "Unary"),
    _floor("empty-unary-async", "an empty call, async", "AsyncUnary"),
    _floor("empty-stream-async", "an empty exchange on an open stream, async", "AsyncEmpty"),
    _stage("empty", "an empty exchange on an open stream", "Empty"),
    _stage("walk", "+ the question read, and a walk through empty rooms", "Walk"),
    _stage("identity", "+ identity", "Identity"),
    _stage("rego", "+ Rego", "Rego"),
    _stage("permit", "+ signed permit", "Permit"),
    _stage("audit", "+ audit record", "Audit"),
    _stage("hold", "+ durable hold", "Hold"),
    System(
        name="ours-stream",
        title="ours, Guard, over its stream",
        asker="bench.peers.ask_ours:Sync",
        shows_token=True,
        server="ours",
        group=OURS,
    ),
    System(
        name="ours-unary",
        title="ours, Guard, a call each",
        asker="bench.peers.ask_ours:SyncUnary",
        shows_token=True,
        server="ours",
        group=OURS,
    ),
    System(
        name="ours-async-stream",
        title="ours, AsyncGuard, over its stream",
        asker="bench.peers.ask_ours:Async",
        shows_token=True,
        server="ours",
        group=OURS,
    ),
    System(
        name="ours-async-unary",
        title="ours, AsyncGuard, a call each",
        asker="bench.peers.ask_ours:AsyncUnary",
        shows_token=True,
        server="ours",
        group=OURS,
    ),
    System(
        name="ours-power-stream",
        title="ours, Guard, over its stream, durability `power`",
        asker="bench.peers.ask_ours:Sync",
        shows_token=True,
        server="ours-power",
        group=OURS,
    ),
    System(
        name="ours-power-unary",
        title="ours, Guard, a call each, durability `power`",
        asker="bench.peers.ask_ours:SyncUnary",
        shows_token=True,
        server="ours-power",
        group=OURS,
    ),
    System(
        name="ours-guarded",
        title="ours, a whole guarded call: asked, run, reported",
        asker="bench.peers.ask_ours:Guarded",
        shows_token=True,
        server="ours",
        group=OURS,
    ),
    System(
        name="ours-reusable",
        title="ours, a guarded call under a reusable permit",
        asker="bench.peers.ask_ours:Reusable",
        shows_token=True,
        server="ours",
        decides=False,
        group=INSIDE,
    ),
    System(
        name="cerbos",
        title="Cerbos, its Python SDK",
        asker="bench.peers.ask_cerbos:Sync",
        server="cerbos",
        of_peer=True,
        group=PEERS,
    ),
    System(
        name="cerbos-async",
        title="Cerbos, its Python SDK, async",
        asker="bench.peers.ask_cerbos:Async",
        server="cerbos",
        of_peer=True,
        group=PEERS,
    ),
    System(
        name="cerbos-audit",
        title="Cerbos, its Python SDK, decision log to a file",
        asker="bench.peers.ask_cerbos:Sync",
        server="cerbos-audit",
        of_peer=True,
        group=PEERS,
    ),
    System(
        name="opa-client",
        title="OPA, opa-python-client",
        asker="bench.peers.ask_opa:Client",
        server="opa",
        of_peer=True,
        group=PEERS,
    ),
    System(
        name="opa-client-async",
        title="OPA, opa-python-client, async",
        asker="bench.peers.ask_opa:AsyncClient",
        server="opa",
        of_peer=True,
        group=PEERS,
    ),
    System(
        name="opa-tuned",
        title="OPA, http.client by hand",
        asker="bench.peers.ask_opa:Tuned",
        server="opa",
        of_peer=True,
        group=PEERS,
    ),
    System(
        name="opa-client-log",
        title="OPA, opa-python-client, decision log on",
        asker="bench.peers.ask_opa:Client",
        server="opa-log",
        of_peer=True,
        group=PEERS,
    ),
    System(
        name="opa-tuned-log",
        title="OPA, http.client by hand, decision log on",
        asker="bench.peers.ask_opa:Tuned",
        server="opa-log",
        of_peer=True,
        group=PEERS,
    ),
    System(
        name="agt-library",
        title="Agent Governance Toolkit, in process, audit to a file",
        asker="bench.peers.ask_agt:Library",
        of_peer=True,
        group=INSIDE,
    ),
    System(
        name="agt-server",
        title="Agent Governance Toolkit, its server, a built-in policy, no audit",
        asker="bench.peers.ask_agt:Server",
        server="agt",
        of_peer=True,
        decides=False,
        group=PEERS,
    ),
    System(
        name="litellm",
        title="LiteLLM proxy, reserve and reconcile a budget, in process",
        asker="bench.peers.ask_litellm:Proxy",
        of_peer=True,
        decides=False,
        group=INSIDE,
    ),
)
