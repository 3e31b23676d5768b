"""What the scenes are played on: a real sidecar, the tool servers and the agent."""

from __future__ import annotations

import contextlib
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

import pdp
from pdp.api.v1 import budget_pb2, budget_pb2_grpc, common_pb2
from pdp.client import Guard
from pdp.demo.mail import MailAccount, MailServer
from pdp.demo.orders import Order, OrdersDatabase, OrdersServer
from pdp.demo.planner import Plan
from pdp.demo.recorder import Call, Recorder, WatchedAgent
from pdp.demo.smtp import SmtpServer
from pdp.demo.tenants import TENANTS, Login, Tenant, other_than
from pdp.errors import PdpError
from pdp.permit import PermitRedeemer, PermitVerifier
from pdp.testing import SidecarProcess, TokenIssuer
from pdp.tool import PermitDoor

PERMIT_ISSUER: Final = "agent-pdp"
FIRST_STATUS: Final = "processing"
_TIMEOUT_SECONDS: Final = 10.0
_SCOPES: Final = ("orders:read", "orders:write", "mail:send", "reports:generate")


class StageError(Exception):
    """The stage can not be set; says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Everything that a scene needs."""

    plan: Plan
    tenant: Tenant
    """Whose request it is."""
    other: Tenant
    issuer: TokenIssuer
    sidecar: SidecarProcess
    ready_seconds: float
    """What the sidecar took from its start until it served."""
    guard: Guard
    agent: WatchedAgent
    recorder: Recorder
    orders: OrdersServer
    others_orders: OrdersServer
    """The other tenant's own orders server, which serves nobody else."""
    mail: MailServer
    smtp: SmtpServer
    databases: dict[str, Path]
    orders_logins: dict[str, Login]

    def token(
        self, *, tenant: Tenant | None = None, role: str = "support_agent", actor: str = ""
    ) -> str:
        """A token as the identity provider issues it to a user of a tenant."""
        tenant = tenant or self.tenant
        return self.issuer.token(
            tenant.id, actor or tenant.agent_user, roles=[role], scopes=_SCOPES
        )

    def calls_of(self, run: Callable[[], object]) -> tuple[Call, ...]:
        """The calls that were made while this ran; a refusal ends it."""
        first = len(self.recorder.calls)
        with contextlib.suppress(PdpError):
            run()
        return tuple(self.recorder.calls[first:])

    def order_of(self, tenant: Tenant) -> Order:
        """The order that all is about, as this tenant's database has it."""
        with self.database_of(tenant) as database:
            return database.order(self.plan.order_id)

    def database_of(self, tenant: Tenant) -> OrdersDatabase:
        """The tenant's orders, opened from behind the scenes."""
        return OrdersDatabase(self.databases[tenant.id], self.orders_logins[tenant.id])

    def limits_of(self, tenant: Tenant) -> list[common_pb2.LimitStatus]:
        """The tenant's limits as the sidecar's ledger has them."""
        with grpc.insecure_channel(self.sidecar.target) as channel:
            response = budget_pb2_grpc.BudgetServiceStub(channel).GetBudget(
                budget_pb2.GetBudgetRequest(),
                metadata=(("authorization", f"Bearer {self.token(tenant=tenant)}"),),
                timeout=_TIMEOUT_SECONDS,
            )
        return list(response.limits)


def wait_out_midnight(
    clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Do not begin shortly before midnight in UTC: the budgets of the day would begin
    anew in the middle, and what was spent could not be told.
    """
    left = _DAY_SECONDS - clock() % _DAY_SECONDS
    if left <= _DEMO_SECONDS:
        print(f"the day ends in {left:.0f} s; waiting for the next", file=sys.stderr)  # noqa: T201
        sleep(left)


_DAY_SECONDS: Final = 86_400
_DEMO_SECONDS: Final = 20
"""More than a whole demo takes."""


@contextlib.contextmanager
def set_stage(
    plan: Plan,
    tenant: Tenant,
    *,
    listener: Callable[[Call], None],
    new_secret: Callable[[], str] = secrets.token_urlsafe,
) -> Iterator[Stage]:
    """Build it all in a temporary directory; take it down at the end. ``listener``
    is told of every call. Raises StageError if the sidecar does not start.
    """
    wait_out_midnight()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdp-demo-")))
        issuer = TokenIssuer()
        sidecar = SidecarProcess(
            directory, issuer=issuer, bundle=find_bundle(), config={"instance": "demo"}
        )
        began = time.perf_counter()
        try:
            stack.enter_context(sidecar)
        except RuntimeError as error:
            raise StageError(str(error)) from None
        ready_seconds = time.perf_counter() - began

        # What only the tool servers know: a login for each tenant at each system.
        orders_logins = {name: Login(f"{name}-orders", new_secret()) for name in TENANTS}
        mail_accounts = {
            name: MailAccount(login=Login(f"{name}-mail", new_secret()), sender=each.sender)
            for name, each in TENANTS.items()
        }
        databases = {name: directory / f"{name}.sqlite" for name in TENANTS}
        for name, each in TENANTS.items():
            # Both tenants have an order of the same number.
            order = Order(plan.order_id, FIRST_STATUS, each.customer)
            OrdersDatabase.create(databases[name], orders_logins[name], [order])
        smtp = stack.enter_context(SmtpServer(mail_accounts.values()))

        other = other_than(tenant)
        redeemer = stack.enter_context(
            PermitRedeemer(sidecar.target, timeout_seconds=_TIMEOUT_SECONDS)
        )
        keys = redeemer.keys()

        def door(audience: str, only_tenant: str | None = None) -> PermitDoor:
            verifier = PermitVerifier(keys, issuer=PERMIT_ISSUER, audience=audience)
            return PermitDoor(verifier, redeemer, only_tenant=only_tenant)

        orders = OrdersServer(door("orders"), databases=databases, logins=orders_logins)
        others_orders = OrdersServer(
            door("orders", only_tenant=other.id),
            databases={other.id: databases[other.id]},
            logins={other.id: orders_logins[other.id]},
        )
        mail = MailServer(door("mail"), address=smtp.address, accounts=mail_accounts)

        recorder = Recorder(listener)
        guard = stack.enter_context(
            Guard(
                sidecar.target,
                permit_issuer=PERMIT_ISSUER,
                permit_keys=keys,
                timeout_seconds=_TIMEOUT_SECONDS,
                observe=recorder.observe,
            )
        )
        yield Stage(
            plan=plan,
            tenant=tenant,
            other=other,
            issuer=issuer,
            sidecar=sidecar,
            ready_seconds=ready_seconds,
            guard=guard,
            agent=WatchedAgent(guard, orders=orders, mail=mail, recorder=recorder),
            recorder=recorder,
            orders=orders,
            others_orders=others_orders,
            mail=mail,
            smtp=smtp,
            databases=databases,
            orders_logins=orders_logins,
        )


def find_bundle() -> Path:
    """The starter policy: the copy in the wheel, or that of the checkout. Raises
    StageError when there is neither.
    """
    candidates = (
        Path(__file__).parent / "bundle.tar.gz",
        Path(pdp.__file__).parents[1] / "policies" / "bundle.tar.gz",
    )
    for path in candidates:
        if path.is_file():
            return path
    raise StageError("The starter policy is missing: run `make policies` in the checkout.")
