"""Microsoft's Agent Governance Toolkit: as a library, and as the server that it brings."""

from __future__ import annotations

import http.client
import json
import socket
import tempfile
import threading
from pathlib import Path

from agent_os.audit_logger import GovernanceAuditLogger, JsonlFileBackend
from agent_os.policies.evaluator import PolicyEvaluator
from agent_os.policies.schema import PolicyDocument

from bench.peers import policies
from bench.peers.question import TOOL, Call


class Library:
    """Its own rules, one set for each tenant, and its own audit log, in the caller's process.
    Its log is written through after each decision, or a killed process forgets what it allowed.
    """

    def __init__(self) -> None:
        self._evaluators = {
            name: PolicyEvaluator(
                [
                    PolicyDocument.model_validate(
                        {
                            "name": name,
                            "rules": policies.agt_rules(allowlist),
                            "defaults": {"action": "deny"},
                        }
                    )
                ]
            )
            for name, allowlist in policies.tenants()
        }
        self._audit = GovernanceAuditLogger()
        self._audit.add_backend(JsonlFileBackend(Path(tempfile.mkdtemp(), "audit.jsonl")))

    def ask(self, call: Call) -> bool:
        evaluator = self._evaluators.get(call.tenant)
        if evaluator is None:
            return False
        decision = evaluator.evaluate(
            {
                "tenant": call.tenant,
                "tool_name": TOOL,
                "role_tool": f"{call.role}/{TOOL}",
                "tool_scopes": [f"{TOOL}/{scope}" for scope in call.scopes],
                "order_id": call.order_id,
                "status": call.status,
            }
        )
        self._audit.log_decision(
            "alice", TOOL, decision.action, decision.reason, tenant=call.tenant
        )
        self._audit.flush()
        return decision.allowed


class Server:
    """``python -m agent_os.server``. It takes no policies of its user's: what it can be asked
    for is one of those it is built with, and it puts no decision on record.
    """

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        self._of_thread = threading.local()

    def ask(self, call: Call) -> bool:
        arguments = {"order_id": call.order_id, "status": call.status}
        body = json.dumps({"action": TOOL, "params": arguments, "policies": ["read_only"]})
        try:
            return self._ask(self._of_thread.connection, body)
        except (AttributeError, ConnectionError):
            # The first call of a thread, or one after the server has closed what was idle.
            self._of_thread.connection = self._connect()
            return self._ask(self._of_thread.connection, body)

    def _ask(self, connection: http.client.HTTPConnection, body: str) -> bool:
        connection.request("POST", "/api/v1/execute", body, self._headers)
        return bool(json.loads(connection.getresponse().read())["success"])

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
