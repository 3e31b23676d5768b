"""The orders tool server: one database per tenant, each with its own login."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pdp.canonical import JsonObject
from pdp.demo.tenants import Login
from pdp.tool import PermitDoor

_SCHEMA: Final = """
CREATE TABLE account (login TEXT PRIMARY KEY, password_sha256 BLOB NOT NULL);
CREATE TABLE customer_order (id TEXT PRIMARY KEY, status TEXT NOT NULL, customer TEXT NOT NULL);
CREATE TABLE change (order_id TEXT NOT NULL, status TEXT NOT NULL, login TEXT NOT NULL);
"""


class OrdersError(Exception):
    """The database refused: a wrong login, or no such order."""


@dataclass(frozen=True, slots=True)
class Order:
    """One order."""

    id: str
    status: str
    customer: str


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of a database's own journal."""

    order_id: str
    status: str
    login: str


class OrdersDatabase:
    """One tenant's orders, open under that tenant's login."""

    def __init__(self, path: Path, login: Login) -> None:
        """Open it. Raises OrdersError for a login that is not the database's own."""
        self._login = login.name
        self._connection = sqlite3.connect(path, isolation_level=None)
        row = self._connection.execute(
            "SELECT password_sha256 FROM account WHERE login = ?", (login.name,)
        ).fetchone()
        if row is None or not hmac.compare_digest(row[0], _digest(login)):
            self.close()
            raise OrdersError("The database knows no such login.")

    @staticmethod
    def create(path: Path, login: Login, orders: Iterable[Order]) -> None:
        """Make a database that only ``login`` opens."""
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.executescript(_SCHEMA)
            connection.execute("INSERT INTO account VALUES (?, ?)", (login.name, _digest(login)))
            connection.executemany(
                "INSERT INTO customer_order VALUES (?, ?, ?)",
                [(order.id, order.status, order.customer) for order in orders],
            )

    def order(self, order_id: str) -> Order:
        """Raises OrdersError if there is none."""
        row = self._connection.execute(
            "SELECT id, status, customer FROM customer_order WHERE id = ?", (order_id,)
        ).fetchone()
        if row is None:
            raise OrdersError("There is no such order.")
        return Order(*row)

    def change(self, order_id: str, status: str) -> Order:
        """Change an order's status and put it in the journal; the order as it is then.
        Raises OrdersError.
        """
        self.order(order_id)
        self._connection.execute("BEGIN IMMEDIATE")
        with self._connection:
            self._connection.execute(
                "UPDATE customer_order SET status = ? WHERE id = ?", (status, order_id)
            )
            self._connection.execute(
                "INSERT INTO change VALUES (?, ?, ?)", (order_id, status, self._login)
            )
        return self.order(order_id)

    def changes(self) -> list[Change]:
        """The journal, oldest first."""
        rows = self._connection.execute("SELECT order_id, status, login FROM change ORDER BY rowid")
        return [Change(*row) for row in rows]

    def close(self) -> None:
        """Close it."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OrdersServer:
    """What an agent's tool orders.update reaches. It is given a permit and
    arguments, and trusts nobody: the permit alone says whose database is opened.
    """

    def __init__(
        self, door: PermitDoor, *, databases: Mapping[str, Path], logins: Mapping[str, Login]
    ) -> None:
        """``databases`` and ``logins`` are by tenant id."""
        self._door = door
        self._databases = databases
        self._logins = logins

    def update(self, permit: str, arguments: JsonObject) -> JsonObject:
        """Change the status of an order. Raises PermitError, OrdersError."""
        tenant = self._door.admit(permit, tool="orders.update", arguments=arguments).tenant
        with OrdersDatabase(self._databases[tenant], self._logins[tenant]) as database:
            order = database.change(str(arguments["order_id"]), str(arguments["status"]))
        return {"order_id": order.id, "status": order.status, "customer": order.customer}


def _digest(login: Login) -> bytes:
    # A plain digest is enough for a password that is random and long.
    return hashlib.sha256(login.password.encode("utf-8")).digest()
