"""Both principals of a call: who acts, and which workload asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from pdp.identity.resolver import Credentials, IdentityError, IdentityResolver
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
        self._made: dict[tuple[int, str, str], tuple[Subject, Subject]] = {}

    async def resolve(self, credentials: Credentials) -> Subject:
        """The subject. A route alone is nobody: it takes an actor. Raises IdentityError."""
        peer = credentials.peer
        workload = await self._workloads.workload_of(credentials) if self._workloads else ""
        try:
            subject = await self._actor(credentials, workload)
        except IdentityError as error:
            error.workload = workload
            raise
        if workload or peer.certificate_sha256:
            return self._by(workload, peer.certificate_sha256, subject)
        return subject

    async def _actor(self, credentials: Credentials, workload: str) -> Subject:
        """The subject by its token and the routes, whoever asks for it. Raises IdentityError."""
        peer = credentials.peer
        routed = self._routes.sources(listener=peer.listener, workload=workload)
        if routed:
            credentials = replace(credentials, route_tenant=agreed(routed))
        subject = await self._actors.resolve(credentials)
        named = (*routed, *self._routes.asked_for(peer.server_name))
        if named:
            agreed((Source("token", subject.tenant), *named), actor=subject.actor)
        return subject

    def _by(self, workload: str, certificate_sha256: str, subject: Subject) -> Subject:
        """The subject, as that workload asks for it. Made anew it would take longer than all
        the rest, and resolvers give the same one for the same token.
        """
        key = (id(subject), workload, certificate_sha256)
        made_of, made = self._made.get(key, (None, None))
        if made is None or made_of is not subject:
            made = replace(subject, workload=workload, certificate_sha256=certificate_sha256)
            if len(self._made) >= _REMEMBERED_SUBJECTS:
                self._made.pop(next(iter(self._made)))
            self._made[key] = (subject, made)
        return made


_REMEMBERED_SUBJECTS: Final = 10_000
