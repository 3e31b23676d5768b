"""What an operator's command, or another in its place, asks of the admin socket.

See pdp.server.admin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor

from pdp.api.v1 import admin_pb2
from tests.fuzz.choices import Choices
from tests.fuzz.in_process import sidecar
from tests.fuzz.targets.services import asked, message_of

METHODS: Final[Sequence[MethodDescriptor]] = list(
    admin_pb2.DESCRIPTOR.services_by_name["BudgetAdminService"].methods
)


def samples() -> Iterable[bytes]:
    for number, method in enumerate(METHODS):
        if method.name.startswith("List"):
            yield bytes([number])


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    method = choices.pick(METHODS)
    running = sidecar()
    running.errors.seen.clear()  # see services
    call: Any = running.operators.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}"
    )
    taken = asked(call, message_of(method.input_type, choices), method)
    assert not running.errors.seen, running.errors.seen
    return taken
