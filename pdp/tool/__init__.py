"""What a tool server puts before its tools, each in a module of its own.

- :class:`PermitDoor`: verify and redeem, by call or as a decorator;
- :mod:`pdp.tool.grpc_server`: an interceptor for a gRPC server;
- :mod:`pdp.tool.asgi`: a middleware for an ASGI application;
- :mod:`pdp.tool.mcp_server`: a middleware for an MCP server of the official SDK;
- :mod:`pdp.tool.fastmcp`: a middleware for an MCP server of the package fastmcp;
- :func:`current_permit`: the permit of the call that is being served behind any of them;
- :class:`Once`: do a mutation once, however often the call comes.
"""

from __future__ import annotations

from pdp.tool.current import current_permit
from pdp.tool.door import PermitDoor
from pdp.tool.once import Once, OnceError, RedisOnce, SqliteOnce

__all__ = ["Once", "OnceError", "PermitDoor", "RedisOnce", "SqliteOnce", "current_permit"]
