"""The Redis of the tests of budgets serves those of permits too."""

from __future__ import annotations

from tests.budget.conftest import redis_server, session_redis

__all__ = ["redis_server", "session_redis"]
