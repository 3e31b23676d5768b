"""LiteLLM's budgets: what its proxy does around a call, in this process, without the proxy's
HTTP around it and without the database that it writes what was spent to later on.
"""

from __future__ import annotations

from litellm.proxy import proxy_server
from litellm.proxy._types import LiteLLM_TeamTable, UserAPIKeyAuth
from litellm.proxy.spend_tracking.budget_reservation import (
    reconcile_budget_reservation,
    reserve_budget_for_request,
)

from bench.peers.question import Call

MODEL = "gpt-4o-mini"
BUDGET_USD = 1e9
ROUTE = "/chat/completions"
COUNTERS = 2


class Proxy:
    """Reserve before the call and reconcile after it, for the key and its team: two counters,
    as two limits are held in ours.
    """

    async def ask(self, call: Call) -> bool:
        reservation = await reserve_budget_for_request(
            request_body={
                "model": MODEL,
                "messages": [{"role": "user", "content": f"{call.order_id} is {call.status}"}],
                "max_tokens": 16,
            },
            route=ROUTE,
            llm_router=None,
            valid_token=UserAPIKeyAuth(
                token=f"key-of-{call.tenant}", team_id=call.tenant, max_budget=BUDGET_USD
            ),
            team_object=LiteLLM_TeamTable(team_id=call.tenant, max_budget=BUDGET_USD),
            user_object=None,
            prisma_client=None,
            user_api_key_cache=proxy_server.user_api_key_cache,
            proxy_logging_obj=proxy_server.proxy_logging_obj,
        )
        if reservation is None or len(reservation["entries"]) != COUNTERS:
            return False
        await reconcile_budget_reservation(reservation, actual_cost=1e-6)
        return True
