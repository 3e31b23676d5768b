"""Both principals of a call: who acts, and which workload asks."""

from __future__ import annotations

from dataclasses import replace

from pdp.identity.resolver import Credentials, IdentityResolver
from pdp.identity.subject import Subject
from pdp.identity.tenancy import Routes, Source, agreed
from pdp.identity.workloads import Workloads


class Principals:
    """Resolves the actor by its token, the workload by what it shows, and the tenant by
    all that name one, which must agree.
    """

    def __init__(
        self, actors: IdentityResolver, *, workloads: Workloads | None, routes: Routes
    ) -> None:
        """Without ``workloads`` nothing that a workload shows is looked at."""
        self._actors = actors
        self._workloads = workloads
        self._routes = routes

    async def resolve(self, credentials: Credentials) -> Subject:
        """The subject. A route alone is nobody: it takes an actor. Raises IdentityError."""
        peer = credentials.peer
        workload = await self._workloads.workload_of(credentials) if self._workloads else ""
        routed = self._routes.sources(listener=peer.listener, workload=workload)
        if routed:
            credentials = replace(credentials, route_tenant=agreed(routed))
        subject = await self._actors.resolve(credentials)
        named = (*routed, *self._routes.asked_for(peer.server_name))
        if named:
            agreed((Source("token", subject.tenant), *named), actor=subject.actor)
        if workload or peer.certificate_sha256:
            return replace(subject, workload=workload, certificate_sha256=peer.certificate_sha256)
        return subject
