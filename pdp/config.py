"""The sidecar's configuration: one YAML file and PDP_* variables, read once.

The models below are the reference: ``docs/configuration.md`` and
``pdp config schema`` are generated from them. A key that is not known is
refused, with the file, the line and the key that may have been meant.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

import yaml
from msgspec import Meta, field
from msgspec.structs import replace

from pdp.admission import Priority, ServiceClass
from pdp.config_reading import Fault, Location, Section, read_section
from pdp.errors import PdpError
from pdp.identity.subject import MAX_ORGANISATION_LENGTH, TENANT_PATTERN
from pdp.identity.tenancy import WorkloadRoute
from pdp.reason import ReasonCode
from pdp.storage import Durability

ENVIRONMENT_PREFIX: Final = "PDP_"
MAX_CONFIG_BYTES: Final = 1024 * 1024
_SERVICE_LINK: Final = re.compile(r"PDP_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP)\w*)?)")
"""What Kubernetes sets in every pod when a Service is named "pdp"."""


class ConfigError(PdpError):
    """The configuration can not be used; the message has one line per fault."""

    def __init__(self, message: str) -> None:
        super().__init__(ReasonCode.REQUEST_INVALID, message)


def _expand_user(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("begins with the home directory of a user who is not known") from None


def _address(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004
        host = ""
    if not re.fullmatch(r"[^\s@/]+", host):  # no scheme, and no password either
        raise ValueError("must be HOST:PORT, for example 127.0.0.1:8443 or [::1]:8443")
    return value


def _octal_mode(value: str) -> str:
    if not re.fullmatch(r"0?[0-7]{3}", value) or int(value, 8) & 0o007:
        raise ValueError('must be an octal mode without access for others, such as "0660"')
    return value


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tenant_id(value: str) -> str:
    if not TENANT_PATTERN.fullmatch(value):
        raise ValueError(f"is not a tenant id ({TENANT_PATTERN.pattern})")
    return value


FilePath = Annotated[Path, _expand_user]
Address = Annotated[str, _address]
Name = Annotated[str, Meta(min_length=1, max_length=255)]
HttpUrl = Annotated[str, Meta(pattern=r"^https?://[^\s@]{1,2000}$")]
TenantId = Annotated[str, _tenant_id]
TrustDomain = Annotated[str, Meta(pattern=r"^[a-z0-9._-]{1,255}$")]
Audience = Annotated[str, Meta(pattern=r"^[A-Za-z0-9:/._-]{1,255}$")]


class Tls(Section, frozen=True, kw_only=True):
    """Certificates of a TCP listener."""

    certificate_file: FilePath
    """PEM file with the certificate chain."""
    key_file: FilePath
    """PEM file with the private key."""
    client_ca_file: FilePath | None = None
    """PEM file with the authorities of client certificates. When it is set, a
    client without a certificate of theirs is refused (mTLS)."""


class TcpListener(Section, frozen=True, kw_only=True):
    """A TCP listener for gRPC."""

    address: Address
    """HOST:PORT; port 0 takes a free one. Without tls only loopback is allowed."""
    tls: Tls | None = None
    """Certificates. Required unless the address is loopback."""

    def __post_init__(self) -> None:
        if self.tls is None and not is_loopback(self.address):
            raise ValueError("plain TCP is allowed only on loopback; set tls")


class NamedListener(Section, frozen=True, kw_only=True):
    """A further listener for gRPC, which identity.routes can name."""

    unix: FilePath | None = None
    """Path of a Unix socket."""
    unix_mode: Annotated[str, _octal_mode] = "0660"
    """Octal mode of the socket; others never have access."""
    tcp: TcpListener | None = None
    """In place of unix: a TCP listener, with certificates of its own."""

    def __post_init__(self) -> None:
        if (self.unix is None) is (self.tcp is None):
            raise ValueError("set exactly one of unix and tcp")


ListenerName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class Listen(Section, frozen=True, kw_only=True):
    """Where the sidecar answers."""

    unix: FilePath | None = field(default_factory=lambda: Path("/run/pdp/pdp.sock"))
    """Path of the Unix socket for gRPC; null for none."""
    unix_mode: Annotated[str, _octal_mode] = "0660"
    """Octal mode of the socket; others never have access."""
    tcp: TcpListener | None = None
    """TCP listener for gRPC."""
    named: Annotated[dict[ListenerName, NamedListener], Meta(max_length=64)] = field(
        default_factory=dict
    )
    """Further listeners for gRPC, by name."""
    metrics: Address | None = "127.0.0.1:9464"
    """HOST:PORT of the HTTP listener for /metrics, /healthz, /readyz and
    /.well-known/jwks.json; null for none. It shows no tenant's data."""
    admin: bool = True
    """Whether `pdp budget` is answered, on admin/pdp.sock in the state directory, which
    only the sidecar's own user can open."""

    def __post_init__(self) -> None:
        if self.unix is None and self.tcp is None and not self.named:
            raise ValueError("set unix or tcp, or nobody can ask")


class TenantLimits(Section, frozen=True, kw_only=True):
    """What a tenant may use of the sidecar. The policy may lower it, and set another priority."""

    priority: Priority = Priority.NORMAL
    """high, normal or low: while calls wait, four of a high tenant are let in for two of
    a normal and one of a low one."""
    max_concurrent_calls: Annotated[int, Meta(ge=1, le=100_000)] = 256
    """Its calls at the same time, those that wait included; one more is refused with
    rate_limited."""
    calls_per_second: Annotated[float, Meta(ge=0.01, le=100_000)] = 100.0
    """Its calls on average; faster ones are refused with rate_limited. Calls that finish
    what was begun (redeem, report, settle, release) count apart, at four times this."""
    burst: Annotated[int, Meta(ge=1, le=100_000)] = 100
    """Its calls at once, after a pause."""

    @property
    def service_class(self) -> ServiceClass:
        """The same, for admission."""
        return ServiceClass(
            priority=self.priority,
            max_concurrent_calls=self.max_concurrent_calls,
            calls_per_second=self.calls_per_second,
            burst=self.burst,
        )


class ServerLimits(Section, frozen=True, kw_only=True):
    """Bounds on what clients may use of the server."""

    max_message_bytes: Annotated[int, Meta(ge=65_536, le=16_777_216)] = 4_194_304
    """Largest gRPC message that is read. Arguments are bounded at 1 MiB besides."""
    max_metadata_bytes: Annotated[int, Meta(ge=8_192, le=65_536)] = 16_384
    """Largest metadata of a call, the token included."""
    max_concurrent_streams: Annotated[int, Meta(ge=16, le=10_000)] = 1_024
    """Calls under way per connection; gRPC resets what a client sends beyond. A stub's stream
    of questions is one of them, and so is what it watches."""
    max_concurrent_calls: Annotated[int, Meta(ge=1, le=100_000)] = 8
    """Calls that are worked on at the same time, and as many again that finish what was
    begun (redeem, report, settle, release). More wait, and tenants take turns."""
    max_waiting_calls: Annotated[int, Meta(ge=0, le=100_000)] = 1_024
    """Calls that wait, of either kind; of those beyond, the tenant that waits with most
    is refused with rate_limited."""
    tenants: TenantLimits = field(default_factory=TenantLimits)
    """Bounds on what each tenant may use."""
    call_timeout_seconds: Annotated[float, Meta(gt=0, le=60)] = 5.0
    """Longest time for one call; a client's shorter deadline wins."""
    keepalive_seconds: Annotated[int, Meta(ge=10, le=7_200)] = 60
    """Time between keepalive pings on a quiet connection."""
    drain_seconds: Annotated[float, Meta(ge=0, le=300)] = 10.0
    """After SIGTERM, how long calls under way may take to finish."""


class TenantClaim(Section, frozen=True, kw_only=True):
    """Where the tenant of an issuer's tokens comes from: a claim, unless fixed or by_route."""

    claim: Name = "tenant_id"
    """The claim that holds the tenant id or, with organisations, the organisation id."""
    organisations: (
        Annotated[dict[Name, TenantId], Meta(min_length=1, max_length=100_000)] | None
    ) = None
    """Organisation id, of at most 128 characters, to tenant id. Null: the claim is the tenant
    id itself."""
    organisations_file: FilePath | None = None
    """The same in a JSON file, which is taken up again when it changes."""
    fixed: TenantId | None = None
    """The one tenant of all tokens of the issuer."""
    by_route: bool = False
    """true: the route that the call came by names it (identity.routes)."""
    tenants: Annotated[list[TenantId], Meta(min_length=1, max_length=10_000)] | None = None
    """The only tenants that the issuer may speak for; others are refused with tenant_unknown.
    Null: all that the claim, the organisations or the routes name."""

    @property
    def maps_organisations(self) -> bool:
        """Whether the claim holds an organisation id."""
        return self.organisations is not None or self.organisations_file is not None

    @property
    def only_tenants(self) -> frozenset[str] | None:
        """All that it can ever come to; None where the configuration alone does not say."""
        if self.fixed is not None:
            return frozenset({self.fixed})
        if self.tenants is not None:
            return frozenset(self.tenants)
        return None if self.organisations is None else frozenset(self.organisations.values())

    def __post_init__(self) -> None:
        if any(len(name) > MAX_ORGANISATION_LENGTH for name in self.organisations or ()):
            raise ValueError(
                f"an organisation id is longer than {MAX_ORGANISATION_LENGTH} characters"
            )
        self._check_rule(by_claim=self.maps_organisations)
        if self.organisations is not None and self.organisations_file is not None:
            raise ValueError("organisations and organisations_file exclude each other")
        if self.fixed is not None and self.tenants is not None:
            raise ValueError("tenants has nothing to say beside fixed")

    def check_given(self, keys: Collection[str]) -> None:
        """Whoever names the usual claim wants it too."""
        self._check_rule(by_claim=self.maps_organisations or "claim" in keys)

    def _check_rule(self, *, by_claim: bool) -> None:
        if [by_claim, self.fixed is not None, self.by_route].count(True) > 1:
            raise ValueError("a claim, fixed and by_route exclude each other")


class IssuerKeys(Section, frozen=True, kw_only=True):
    """Where an issuer's public keys are from: one place of four."""

    jwks_file: FilePath | None = None
    """A JWK set in a file, taken up again when it changes; each key needs a kid."""
    jwks_url: HttpUrl | None = None
    """In place of jwks_file: the URL of a JWK set. Plain http:// is allowed only to loopback."""
    discovery: bool = False
    """In place of jwks_file: ask the issuer, whose name is then its URL, where its keys are
    (OpenID Connect Discovery)."""
    workload_api: Annotated[str, Meta(pattern=r"^unix:///\S{1,255}$")] | None = None
    """In place of jwks_file: unix:///PATH of a SPIFFE agent, which knows the keys of the trust
    domain."""
    ca_file: FilePath | None = None
    """PEM file with the authorities of an https server; null: the system's."""
    bearer_token_file: FilePath | None = None
    """File with a token for the server, as Kubernetes asks for; read anew for every request."""
    poll_seconds: Annotated[float, Meta(ge=1, le=86_400)] | None = None
    """Time between two looks, moved by up to a tenth: so long a key counts that was taken away.
    One that is not known is looked for at once, but at most every ten seconds. Null: 1 for a
    file, 60 for a SPIFFE agent, 300 for a URL."""
    max_age_seconds: Annotated[int, Meta(ge=2, le=604_800)] = 3_600
    """How long keys count where they can not be looked at any more; then calls are refused with
    keys_unavailable."""

    @property
    def seconds_between_looks(self) -> float:
        """poll_seconds, or what it is by default."""
        if self.poll_seconds is not None:
            return self.poll_seconds
        if self.jwks_file is not None:
            return 1.0
        return 60.0 if self.workload_api is not None else 300.0

    def __post_init__(self) -> None:
        places = [self.jwks_file, self.jwks_url, self.discovery or None, self.workload_api]
        if places.count(None) != len(places) - 1:
            raise ValueError("set exactly one of jwks_file, jwks_url, discovery and workload_api")
        over_http = self.jwks_url is not None or self.discovery
        if self.jwks_url is not None:
            _plain_only_to_loopback(self.jwks_url)
        if self.ca_file is not None and not over_http:
            raise ValueError("ca_file goes with jwks_url or discovery")
        if self.bearer_token_file is not None and not over_http:
            raise ValueError("bearer_token_file goes with jwks_url or discovery")
        if self.max_age_seconds < 2 * self.seconds_between_looks:
            raise ValueError("max_age_seconds must be at least twice poll_seconds")

    def _check_place(self, *, issuer: str | None, is_trust_domain: bool) -> None:
        """Whether the place is one for an issuer of this name. Raises ValueError."""
        if self.workload_api is not None and not is_trust_domain:
            raise ValueError("workload_api is for the keys of a trust domain (spiffe://NAME)")
        if self.discovery:
            if issuer is None or not re.fullmatch(r"https?://[^\s@?#]+", issuer):
                raise ValueError("discovery needs an issuer that is a URL")
            _plain_only_to_loopback(issuer)


class JwtIssuer(IssuerKeys, frozen=True, kw_only=True):
    """A token issuer that is trusted."""

    issuer: Name
    """Its exact iss claim."""
    audiences: Annotated[list[Name], Meta(min_length=1, max_length=64)]
    """One of them must stand in the token's aud."""
    algorithms: Annotated[
        list[Literal["EdDSA", "ES256", "RS256"]], Meta(min_length=1, max_length=3)
    ] = field(default_factory=lambda: ["EdDSA", "ES256", "RS256"])
    """Accepted signature algorithms."""
    types: Annotated[list[Name], Meta(min_length=1, max_length=16)] = field(
        default_factory=lambda: ["JWT", "at+jwt"]
    )
    """Accepted typ headers."""
    tenant: TenantClaim = field(default_factory=TenantClaim)
    """How a token names its tenant."""
    actor_claim: Name = "sub"
    """The claim that names the actor."""
    actor_prefix: Annotated[str, Meta(pattern=r"^[!-~]{0,64}$")] = ""
    """Stands before the names of its actors, such as okta:, so that they are none of another
    issuer's."""
    shared_actors: bool = False
    """Whether an actor of this issuer is the one of the same name of other issuers that say the
    same."""
    roles_claim: Name = "roles"
    """The claim with the roles: a list, or a text with spaces between."""
    scopes_claim: Name = "scope"
    """The claim with the scopes: a list, or a text with spaces between."""
    organisation_claim: Name | None = None
    """The claim that names the tenant's organisation, for limits that its tenants share. Null:
    the one that tenant.organisations maps, if any."""
    team_claim: Name | None = None
    """The claim that names the actor's team, for limits that a team shares. Null: none does."""
    session_claim: Name | None = None
    """The claim that names the session, for limits of one session. Null: none does."""
    leeway_seconds: Annotated[int, Meta(ge=0, le=300)] = 30
    """How far the issuer's clock may differ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.organisation_claim is not None and self.tenant.maps_organisations:
            raise ValueError(
                "organisation_claim can not stand beside tenant.organisations: the organisation is"
                " the one that is mapped there"
            )
        self._check_place(
            issuer=self.issuer,
            is_trust_domain=re.fullmatch(r"spiffe://[a-z0-9._-]{1,255}", self.issuer) is not None,
        )


class WorkloadIssuer(IssuerKeys, frozen=True, kw_only=True):
    """Who issues tokens to workloads: a SPIFFE trust domain or a Kubernetes cluster."""

    trust_domain: TrustDomain | None = None
    """Its JWT-SVIDs are accepted, for SPIFFE ids of this trust domain alone."""
    issuer: Name | None = None
    """In place of trust_domain: the exact iss claim of a cluster, whose service accounts'
    tokens are accepted where they are bound to a pod."""
    cluster: Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,63}$")] | None = None
    """Stands before the names of its service accounts (eu/system:serviceaccount:NAMESPACE:NAME),
    which must differ where there are several clusters."""
    audiences: Annotated[list[Name], Meta(min_length=1, max_length=64)]
    """One of them must stand in the token's aud: a name of the sidecars' own."""
    algorithms: Annotated[
        list[Literal["EdDSA", "ES256", "RS256"]], Meta(min_length=1, max_length=3)
    ] = field(default_factory=lambda: ["EdDSA", "ES256", "RS256"])
    """Accepted signature algorithms."""
    leeway_seconds: Annotated[int, Meta(ge=0, le=300)] = 30
    """How far its clock may differ."""

    @property
    def name(self) -> str:
        """The issuer or, as JWT-SVIDs need not name one, spiffe:// and the trust domain."""
        return f"spiffe://{self.trust_domain}" if self.trust_domain else self.issuer or ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.trust_domain is None) is (self.issuer is None):
            raise ValueError("set exactly one of trust_domain and issuer")
        if self.cluster is not None and self.issuer is None:
            raise ValueError("cluster goes with issuer")
        self._check_place(issuer=self.issuer, is_trust_domain=self.trust_domain is not None)


class WorkloadIdentity(Section, frozen=True, kw_only=True):
    """Which runtime asks, beside who acts."""

    required: bool = False
    """Whether every call must show it; one that does not is refused with workload_missing."""
    certificates: bool = False
    """Whether a client certificate says it (tls.client_ca_file): by its one URI, such as a
    SPIFFE id, or its one DNS name."""
    trust_domains: Annotated[list[TrustDomain], Meta(min_length=1, max_length=64)] | None = None
    """Certificates must do so by a SPIFFE id of one of these. Null: as their authorities see
    fit."""
    issuers: Annotated[list[WorkloadIssuer], Meta(max_length=64)] = field(default_factory=list)
    """Whose tokens say it, in metadata workload-authorization. None of them can be one of
    identity.issuers."""

    def __post_init__(self) -> None:
        if not self.certificates and not self.issuers:
            raise ValueError("set certificates or issuers, or no workload can show who it is")
        if self.trust_domains is not None and not self.certificates:
            raise ValueError("trust_domains is for certificates; set certificates")
        domains = [each.trust_domain for each in self.issuers if each.trust_domain is not None]
        clusters = [each.cluster for each in self.issuers if each.issuer is not None]
        names = [each.name for each in self.issuers]
        for what, listed in (("trust_domain", domains), ("issuer", names), ("cluster", clusters)):
            if len(set(listed)) != len(listed):
                raise ValueError(f"two issuers have the same {what}")


class Route(Section, frozen=True, kw_only=True):
    """A way in that is one tenant's: a listener, a workload or a server name."""

    listener: ListenerName | None = None
    """One of listen.named: all calls that come in there."""
    workload: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    """In place of listener: all calls of this workload. In a SPIFFE id or a service account
    "*" stands for any one part, "{tenant}" for the part that is the tenant, and "**" at the
    end for whatever follows: spiffe://example.org/tenant/{tenant}/**."""
    server_name: Annotated[str, Meta(pattern=r"^[a-z0-9.-]{1,253}$")] | None = None
    """In place of listener: all calls that ask for this name by TLS (SNI). As callers choose it
    themselves it is never where a tenant comes from (tenant.by_route); it must agree."""
    tenant: TenantId | None = None
    """The tenant, unless the workload's name holds it."""

    def __post_init__(self) -> None:
        if [self.listener, self.workload, self.server_name].count(None) != 2:  # noqa: PLR2004
            raise ValueError("set exactly one of listener, workload and server_name")
        if self.workload is None and self.tenant is None:
            raise ValueError("name the tenant")
        if self.workload is not None:
            WorkloadRoute.of(self.workload, self.tenant or "")


class JwtIdentity(Section, frozen=True, kw_only=True, tag_field="mode", tag="jwt"):
    """Callers show a JWT as bearer token."""

    mode: ClassVar[Literal["jwt"]] = "jwt"
    """This section's kind."""
    issuers: Annotated[list[JwtIssuer], Meta(min_length=1, max_length=64)]
    """The issuers that are trusted; each iss at most once."""
    routes: Annotated[list[Route], Meta(max_length=1_024)] = field(default_factory=list)
    """Ways in that are one tenant's. A call by one of another tenant than its token's is
    refused with tenant_mismatch."""
    workload: WorkloadIdentity | None = None
    """How the runtime that asks shows which one it is. Null: nothing of the kind is looked at."""

    def __post_init__(self) -> None:
        self._issuers_differ()
        self._actors_differ()
        self._routes_lead_somewhere()

    def _issuers_differ(self) -> None:
        names = [issuer.issuer for issuer in self.issuers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the issuer {name} is named twice: give it one entry")
        for workloads in self.workload.issuers if self.workload is not None else []:
            if workloads.name in names:
                raise ValueError(
                    f"{workloads.name} is an issuer of users and of workloads: take it out of one"
                    " of issuers and workload.issuers"
                )

    def _actors_differ(self) -> None:
        for one, other in itertools.combinations(self.issuers, 2):
            if not (one.shared_actors and other.shared_actors) and _can_name_alike(one, other):
                raise ValueError(
                    f"the issuers {one.issuer} and {other.issuer} can name the same actor of the"
                    " same tenant: give each an actor_prefix that the other's does not begin with,"
                    " or tenants of its own; or set shared_actors in both"
                )

    def _routes_lead_somewhere(self) -> None:
        if self.workload is None and any(route.workload is not None for route in self.routes):
            raise ValueError("a route of a workload needs identity.workload")
        if all(route.server_name is not None for route in self.routes) and any(
            issuer.tenant.by_route for issuer in self.issuers
        ):
            raise ValueError("tenant.by_route needs identity.routes of listeners or workloads")
        for name in ("listener", "server_name"):
            named = [getattr(route, name) for route in self.routes]
            named = [each for each in named if each is not None]
            if len(set(named)) != len(named):
                raise ValueError(f"a {name} has two routes")


def _can_name_alike(one: JwtIssuer, other: JwtIssuer) -> bool:
    prefixes = sorted((one.actor_prefix, other.actor_prefix), key=len)
    if not prefixes[1].startswith(prefixes[0]):
        return False
    tenants, others = one.tenant.only_tenants, other.tenant.only_tenants
    return tenants is None or others is None or not tenants.isdisjoint(others)


class SingleTenantIdentity(
    Section, frozen=True, kw_only=True, tag_field="mode", tag="single_tenant"
):
    """Every caller is the tenant "default". Only on a Unix socket or loopback."""

    mode: ClassVar[Literal["single_tenant"]] = "single_tenant"
    """This section's kind."""
    actor: Name = "local"
    """The actor of every call."""
    roles: Annotated[list[Name], Meta(max_length=64)] = field(default_factory=list)
    """Its roles."""
    scopes: Annotated[list[Name], Meta(max_length=64)] = field(default_factory=list)
    """Its scopes."""
    workload: WorkloadIdentity | None = None
    """As in mode jwt."""


class VerificationKey(Section, frozen=True, kw_only=True):
    """A key that bundles may be signed with."""

    public_key_file: FilePath
    """PEM file with the public key."""
    algorithm: Literal[
        "EdDSA", "ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"
    ] = "EdDSA"
    """The one algorithm that this key signs with."""


class Verification(Section, frozen=True, kw_only=True):
    """Which signature a bundle must carry (.signatures.json, as OPA makes it)."""

    keys: Annotated[dict[Name, VerificationKey], Meta(min_length=1, max_length=16)]
    """Key id to key: a signature must be made with one of these."""
    scope: Name | None = None
    """The scope that the signature must name; null: it must name none."""


class HttpSource(Section, frozen=True, kw_only=True):
    """A bundle server, or any web server that hands out a file with an ETag."""

    url: HttpUrl
    """Where the bundle lies. Plain http:// is allowed only to loopback."""
    bearer_token_file: FilePath | None = None
    """File with a token for the Authorization header; read anew for every request."""
    client_certificate_file: FilePath | None = None
    """PEM file with the sidecar's own certificate (mTLS)."""
    client_key_file: FilePath | None = None
    """PEM file with its key."""
    ca_file: FilePath | None = None
    """PEM file with the authorities of the server; null: the system's."""
    poll_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 60.0
    """Time between two requests, moved by up to a tenth so that sidecars spread."""
    long_poll_seconds: Annotated[int, Meta(ge=1, le=600)] | None = None
    """How long the server may hold a request open until there is a change; null: it
    answers at once."""
    timeout_seconds: Annotated[float, Meta(gt=0, le=600)] = 30.0
    """Longest time for one request, without long_poll_seconds."""

    def __post_init__(self) -> None:
        _plain_only_to_loopback(self.url)
        if (self.client_certificate_file is None) is not (self.client_key_file is None):
            raise ValueError("client_certificate_file and client_key_file go together")


class OciSource(Section, frozen=True, kw_only=True):
    """A bundle in an OCI registry."""

    image: Annotated[
        str, Meta(pattern=r"^[\w.-]+(:\d{1,5})?(/[\w.-]+)+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?$")
    ]
    """REGISTRY/REPOSITORY:TAG, or @sha256:DIGEST, which nothing can be put in place of."""
    username_file: FilePath | None = None
    """File with the user name for the registry."""
    password_file: FilePath | None = None
    """File with the password or token; read anew for every request."""
    plain_http: bool = False
    """Speak http:// with the registry; only for loopback."""
    ca_file: FilePath | None = None
    """PEM file with the authorities of the registry; null: the system's."""
    poll_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 60.0
    """Time between two looks at the tag. A digest is looked at once."""
    timeout_seconds: Annotated[float, Meta(gt=0, le=600)] = 30.0
    """Longest time for one request."""

    def __post_init__(self) -> None:
        if self.plain_http:
            _plain_only_to_loopback(f"http://{self.image}")
        if (self.username_file is None) is not (self.password_file is None):
            raise ValueError("username_file and password_file go together")


def _plain_only_to_loopback(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(f"{parts.hostname}:0"):
        raise ValueError("plain http is allowed only to loopback; use https")


class BundleSettings(Section, frozen=True, kw_only=True):
    """One bundle: where it comes from, and who must have signed it."""

    path: FilePath | None = None
    """A .tar.gz or a directory, looked at anew every poll_seconds. A directory of Rego
    without policy.wasm needs the opa command."""
    poll_seconds: Annotated[float, Meta(ge=0.1, le=3_600)] = 2.0
    """Time between two looks at path."""
    http: HttpSource | None = None
    """A bundle server."""
    oci: OciSource | None = None
    """A bundle in an OCI registry."""
    verification: Verification | None = None
    """Which signature it must carry; null: as policy.verification says."""

    def __post_init__(self) -> None:
        if [self.path, self.http, self.oci].count(None) != 2:  # noqa: PLR2004 - one of three
            raise ValueError("set exactly one of path, http and oci")


BundleName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Bundles = Annotated[dict[BundleName, BundleSettings], Meta(min_length=1, max_length=256)]


class OpaServer(Section, frozen=True, kw_only=True):
    """An OPA server that answers in place of the embedded engine."""

    managed: bool = False
    """true: the sidecar starts its own, feeds it its bundles and ends it. false: one
    that runs already, at url, and has its bundles from elsewhere."""
    url: Annotated[str, Meta(pattern=r"^https?://[^\s@/]{1,255}/?$")] = "http://127.0.0.1:8181"
    """Where a server that is not managed listens. Plain http:// only to loopback."""
    token_file: FilePath | None = None
    """File with a bearer token for a server that is not managed."""

    def __post_init__(self) -> None:
        _plain_only_to_loopback(self.url)


class OpaEngine(Section, frozen=True, kw_only=True):
    """A real OPA server decides."""

    opa: OpaServer = field(default_factory=OpaServer)
    """The server."""


class Shadow(Section, frozen=True, kw_only=True):
    """A candidate that is asked too and never obeyed; what it answers otherwise is
    counted and put on record.
    """

    bundle: FilePath | None = None
    """Short for bundles with one path."""
    bundles: Bundles | None = None
    """The candidate's bundles, by name."""
    verification: Verification | None = None
    """Which signature its bundles must carry unless one says itself."""

    def __post_init__(self) -> None:
        if (self.bundle is None) is (self.bundles is None):
            raise ValueError("set either bundle or bundles")


class Policy(Section, frozen=True, kw_only=True):
    """What decides."""

    bundle: FilePath | None = None
    """A .tar.gz or a directory. Short for bundles with one path."""
    bundles: Bundles | None = None
    """Several bundles by name, whose roots are apart: rules in one, data in others."""
    verification: Verification | None = None
    """Which signature the bundles must carry unless one says itself; null: none."""
    engine: Literal["embedded"] | OpaEngine = "embedded"
    """embedded: OPA's Wasm within the sidecar. {opa: ...}: a real OPA server."""
    opa_command: FilePath | None = None
    """The opa command, to compile Rego, to run its tests, and for a managed server.
    Null: the one on PATH."""
    max_age_seconds: Annotated[int, Meta(ge=1, le=31_536_000)] | None = None
    """How long ago the sources may have been reached last; null: for ever."""
    when_stale: Literal["deny", "serve"] = "deny"
    """What is done past max_age_seconds: deny every call (policy_stale), or go on and
    show it."""
    run_tests: bool = False
    """Run the Rego tests that a bundle carries before it is activated; one that fails
    is refused. Needs the opa command."""
    allow_rollback: bool = False
    """Take a bundle that is older than one that was active before."""
    shadow: Shadow | None = None
    """A candidate that is asked too and never obeyed."""
    evaluation_timeout_ms: Annotated[int, Meta(ge=10, le=10_000)] = 200
    """Longest time for one evaluation; past it the answer is a denial."""
    workers: Annotated[int, Meta(ge=1, le=64)] = 2
    """Evaluations that run at the same time at most. The first worker takes all that comes;
    the others help while one question keeps it for more than 5 ms."""
    max_memory_mib: Annotated[int, Meta(ge=8, le=4_096)] = 512
    """Most memory of one worker: the bundle's data and what an evaluation needs. It is
    a bound, not a reservation; the default has room for some 10,000 tenants."""

    @property
    def external(self) -> OpaServer | None:
        """The OPA server that has its policy from elsewhere, if such a one decides."""
        engine = self.engine
        return engine.opa if isinstance(engine, OpaEngine) and not engine.opa.managed else None

    def __post_init__(self) -> None:
        named = [self.bundle, self.bundles].count(None)
        if self.external is not None:
            if named != 2 or self.shadow is not None:  # noqa: PLR2004 - neither of both
                raise ValueError(
                    "an OPA server that is not managed has its bundles from elsewhere: leave out"
                    " bundle, bundles and shadow"
                )
        elif named != 1:
            raise ValueError("set either bundle or bundles")


class Permits(Section, frozen=True, kw_only=True):
    """How permits are signed."""

    issuer: Name = "agent-pdp"
    """The iss of permits: the name of the trust domain."""
    key_file: FilePath | None = None
    """PEM file with the Ed25519 keys, mode 0600: the first private key signs, the others
    only verify. Null: permit-key.pem in the state directory, made on first start."""
    ttl_seconds: Annotated[int, Meta(ge=1, le=3_600)] = 60
    """How long a permit is valid, unless the policy says less."""
    default_audience: Audience = "tools"
    """The audience of a permit when the question names none."""
    bind_to_certificate: bool = False
    """Bind each permit to the client certificate of whoever asks for it: shown by anybody
    else it is worth nothing. Whoever asks without a certificate gets no permit. Needs
    tls.client_ca_file."""


class TrustedSidecars(Section, frozen=True, kw_only=True):
    """Sidecars of another trust domain, whose delegations count here too."""

    issuer: Name
    """The iss of their delegations: their permit.issuer."""
    jwks_file: FilePath
    """JWK set with their permit keys; read again when it changes."""
    tenants: Annotated[list[TenantId], Meta(min_length=1, max_length=10_000)]
    """The tenants that they may name. Whose delegation it is, and what it may do, is
    theirs to say."""


class Delegations(Section, frozen=True, kw_only=True):
    """What agents may be given to act on somebody's behalf. They are signed with the permit
    keys, so that every sidecar with the same keys takes them.
    """

    max_depth: Annotated[int, Meta(ge=0, le=16)] = 8
    """Most agents that act one for another; 0: nobody can delegate."""
    ttl_seconds: Annotated[int, Meta(ge=1, le=86_400)] = 300
    """How long a delegation lasts that names no time, at most max_ttl_seconds."""
    max_ttl_seconds: Annotated[int, Meta(ge=1, le=86_400)] = 3_600
    """The longest that one can be asked for. None outlasts what it was made with."""
    trusted: Annotated[list[TrustedSidecars], Meta(max_length=64)] = field(default_factory=list)
    """Sidecars with other keys."""

    def __post_init__(self) -> None:
        names = [sidecars.issuer for sidecars in self.trusted]
        if len(set(names)) != len(names):
            raise ValueError("an issuer is named twice in trusted")


class SharedDurability(StrEnum):
    """What an acknowledged write to a shared store survives."""

    PRIMARY = "primary"
    """What the primary survives: with appendonly, its restart."""
    STRICT = "strict"
    """The loss of the primary too, as far as Redis can promise it."""


class Sentinel(Section, frozen=True, kw_only=True):
    """The sentinels that name the primary."""

    service: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
    """Name under which they watch it (master name)."""
    username_file: FilePath | None = None
    """File with the user name for the sentinels themselves."""
    password_file: FilePath | None = None
    """File with the password for the sentinels themselves."""


class RedisSettings(Section, frozen=True, kw_only=True):
    """Redis or Valkey, 7.0 or later, which any number of sidecars share."""

    addresses: Annotated[list[Address], Meta(max_length=32)] = field(default_factory=list)
    """HOST:PORT of the server; of the sentinels, with sentinel; of some nodes of the
    cluster, with cluster."""
    unix: FilePath | None = None
    """Path of the server's Unix socket, in place of addresses."""
    tls: bool = True
    """Whether connections to addresses are encrypted, and the certificate checked.
    Without, whoever is on the way can read and change budgets."""
    ca_file: FilePath | None = None
    """PEM file with the authorities of the server's certificate. Null: the system's."""
    client_certificate_file: FilePath | None = None
    """PEM file with the certificate that the sidecar shows."""
    client_key_file: FilePath | None = None
    """PEM file with its private key."""
    username_file: FilePath | None = None
    """File with the name of the ACL user. Null: the default user."""
    password_file: FilePath | None = None
    """File with the user's password."""
    sentinel: Sentinel | None = None
    """Set where sentinels say which server is the primary."""
    cluster: bool = False
    """Whether the addresses are nodes of a cluster. A tenant lies on one node."""
    durability: SharedDurability = SharedDurability.PRIMARY
    """primary: an answer leaves when the primary has it, and a failover can lose the
    last moments. strict: it leaves when as many replicas as replicas says have it
    too."""
    replicas: Annotated[int, Meta(ge=1, le=8)] = 1
    """How many replicas strict durability waits for."""
    timeout_ms: Annotated[int, Meta(ge=50, le=30_000)] = 1_000
    """How long an operation may take, waiting for a connection included; past it the
    call ends with budget_unavailable, and its outcome is unknown."""
    connections: Annotated[int, Meta(ge=1, le=256)] = 16
    """Connections that the sidecar opens at most, and so operations under way at once."""
    allow_volatile: bool = False
    """Whether a server that forgets is taken all the same: appendonly off, or an
    eviction policy. Budgets start again whenever it does."""
    unchecked: bool = False
    """Whether it is taken unseen that the server keeps what it is given, because its
    user may not run CONFIG GET."""

    def __post_init__(self) -> None:
        if (self.unix is None) == (not self.addresses):
            raise ValueError("set addresses or unix, and not both")
        if self.unix is not None and (self.cluster or self.sentinel is not None):
            raise ValueError("cluster and sentinel need addresses")
        if self.cluster and self.sentinel is not None:
            raise ValueError("set cluster or sentinel, not both")
        if len(self.addresses) > 1 and not (self.cluster or self.sentinel is not None):
            raise ValueError("several addresses need cluster or sentinel")
        if (self.client_certificate_file is None) != (self.client_key_file is None):
            raise ValueError("client_certificate_file and client_key_file go together")
        if self.username_file is not None and self.password_file is None:
            raise ValueError("username_file needs password_file")


class OnOutage(StrEnum):
    """What goes on while the shared store does not answer."""

    DENY = "deny"
    """Nothing, from the first draw, report or operation that failed."""
    SPEND_LEASE = "spend_lease"
    """What is leased can be spent, until the lease ends."""


class Lease(Section, frozen=True, kw_only=True):
    """Slices of shared budgets, which the sidecar spends without asking the store."""

    seconds: Annotated[int, Meta(ge=2, le=600)] = 30
    """For how long a lease is spent. What of it is never reported counts as spent."""
    share: Annotated[float, Meta(ge=0.01, le=0.5)] = 0.125
    """The most of what remains under a limit that one lease takes."""
    on_outage: OnOutage = OnOutage.DENY
    """While the store is away. deny: nothing is spent, once that is noticed.
    spend_lease: what is leased can be spent, until the lease ends."""


class Budget(Section, frozen=True, kw_only=True):
    """The ledger."""

    store: Literal["sqlite"] | RedisSettings = "sqlite"
    """Where budgets, and which permits are used, are counted. sqlite: in the state
    directory, for this sidecar alone. Or a Redis or Valkey, for all sidecars that
    share it."""
    durability: Durability = Durability.PROCESS
    """Of the store sqlite. process: what was answered survives the sidecar's death at
    any moment. power: it survives power loss too, at the cost of a disk sync per
    commit."""
    hold_ttl_seconds: Annotated[int, Meta(ge=1, le=3_600)] = 120
    """How long a hold lasts unless it is settled or released. At least as long as
    permit.ttl_seconds."""
    lease: Lease | None = None
    """Set where the sidecar leases from a shared store. Its permits are then redeemed and
    reported on with this sidecar alone. Null: every operation asks the store."""

    def __post_init__(self) -> None:
        if self.lease is not None and self.store == "sqlite":
            raise ValueError("lease needs a shared store")


class Audit(Section, frozen=True, kw_only=True):
    """The audit log."""

    durability: Durability = Durability.PROCESS
    """As budget.durability. In process mode the log is synced once a second."""
    segment_max_bytes: Annotated[int, Meta(ge=1_048_576, le=1_073_741_824)] = 67_108_864
    """Size at which a new file is begun."""
    record_policy_input: bool = False
    """Put into each decision's record what the policy was asked, raw arguments
    included, so that `pdp policy replay` and `pdp explain` can ask it again."""


class Config(Section, frozen=True, kw_only=True):
    """The whole configuration."""

    state_dir: FilePath = field(default_factory=lambda: Path("/var/lib/pdp"))
    """Directory for ledger, audit log and keys; made with mode 0700. One sidecar
    at a time."""
    instance: Name | None = None
    """Name of this sidecar in audit records. Null: the host's name."""
    listen: Listen = field(default_factory=Listen)
    """Where the sidecar answers."""
    limits: ServerLimits = field(default_factory=ServerLimits)
    """Bounds on what clients may use of the server."""
    identity: JwtIdentity | SingleTenantIdentity
    """Whose call it is."""
    policy: Policy
    """What decides."""
    permit: Permits = field(default_factory=Permits)
    """How permits are signed."""
    delegation: Delegations = field(default_factory=Delegations)
    """What agents may be given to act on somebody's behalf."""
    budget: Budget = field(default_factory=Budget)
    """The ledger."""
    audit: Audit = field(default_factory=Audit)
    """The audit log."""

    def __post_init__(self) -> None:
        if isinstance(self.identity, SingleTenantIdentity):
            for tcp in (self.listen.tcp, *(each.tcp for each in self.listen.named.values())):
                if tcp is not None and not is_loopback(tcp.address):
                    raise ValueError(
                        "identity.mode single_tenant trusts whoever reaches the socket, so "
                        "each address of listen.tcp and listen.named must be loopback"
                    )
        self._check_listeners()
        if self.budget.hold_ttl_seconds < self.permit.ttl_seconds:
            raise ValueError("budget.hold_ttl_seconds must be at least permit.ttl_seconds")
        if self.permit.issuer in {sidecars.issuer for sidecars in self.delegation.trusted}:
            raise ValueError(
                "delegation.trusted names permit.issuer: sidecars of one trust domain share their"
                " permit keys (permit.key_file), and others have another name"
            )

    def _check_listeners(self) -> None:
        """Raises ValueError where a listener is missing that workloads, routes or permits need."""
        listen, identity = self.listen, self.identity
        if isinstance(identity, JwtIdentity):
            for route in identity.routes:
                if route.listener is not None and route.listener not in listen.named:
                    raise ValueError(
                        f"identity.routes names the listener {route.listener}, which is not one"
                        " of listen.named"
                    )
        tcp = (listen.tcp, *(each.tcp for each in listen.named.values()))
        verified = any(each and each.tls and each.tls.client_ca_file for each in tcp)
        if identity.workload is not None and identity.workload.certificates and not verified:
            raise ValueError(
                "identity.workload.certificates needs a listener with tls.client_ca_file"
            )
        if self.permit.bind_to_certificate and not verified:
            raise ValueError("permit.bind_to_certificate needs a listener with tls.client_ca_file")

    @property
    def admin_socket(self) -> Path:
        """Where operators are answered, if listen.admin says so."""
        return self.state_dir / "admin" / "pdp.sock"

    @property
    def permit_key_file(self) -> Path:
        """Where the permit keys lie: as configured, or in the state directory."""
        return self.permit.key_file or self.state_dir / "permit-key.pem"

    @property
    def revocation_file(self) -> Path:
        """Where revocations lie that are not in a shared store."""
        return self.state_dir / "revocations.json"


def load_config(
    path: Path,
    environment: Mapping[str, str],
    *,
    files_must_exist: bool = False,
    bundles_must_exist: bool = False,
) -> Config:
    """Read the file, lay the PDP_* variables over it, and check the whole.

    A variable names its key with "__" between levels: PDP_STATE_DIR,
    PDP_LISTEN__UNIX, PDP_BUDGET__DURABILITY; its value is read as YAML. Relative
    paths in the file are taken from the file's directory. ``files_must_exist`` also
    looks for every file that is named, but for bundles, which a sidecar can start
    without; ``bundles_must_exist`` looks for those. Raises ConfigError.
    """
    document, lines = _read_yaml(path)
    variables = _overlay(document, environment)
    config, found = read_section(Config, document)
    if found:
        faults = [_explain(fault, path, lines, variables) for fault in found]
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    resolved = _resolve_paths(config, path.resolve().parent)
    wanted: set[str] = set()
    if files_must_exist:
        wanted |= _NAMED_FILES
    if bundles_must_exist:
        wanted |= _NAMED_BUNDLES
    faults = [
        f"{_place(location, path, lines, variables)}: {'.'.join(map(str, location))}:"
        f" there is no file {file}"
        for location, file in _named_files(resolved, wanted)
        if not file.exists()
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    return resolved


_NAMED_FILES: Final = frozenset(
    {
        "bearer_token_file",
        "ca_file",
        "certificate_file",
        "client_ca_file",
        "client_certificate_file",
        "client_key_file",
        "jwks_file",
        "key_file",
        "opa_command",
        "organisations_file",
        "password_file",
        "public_key_file",
        "token_file",
        "username_file",
    }
)
"""Keys of files that the sidecar reads and does not make."""
_NAMED_BUNDLES: Final = frozenset({"bundle", "path"})


def _named_files(
    section: Section, wanted: set[str], location: Location = ()
) -> Iterator[tuple[Location, Path]]:
    for name in section.__struct_fields__:
        value = getattr(section, name)
        items: Iterable[tuple[str | int | None, Any]] = [(None, value)]
        if isinstance(value, list):
            items = enumerate(value)
        elif isinstance(value, dict):
            items = value.items()
        for index, item in items:
            here = (*location, name) if index is None else (*location, name, index)
            if isinstance(item, Section):
                yield from _named_files(item, wanted, here)
            elif isinstance(item, Path) and name in wanted:
                yield here, item


def _resolve_paths(config: Config, base: Path) -> Config:
    def walk(section: Section) -> Section:
        changes: dict[str, Any] = {}
        for name in section.__struct_fields__:
            value = getattr(section, name)
            if isinstance(value, Path) and not value.is_absolute():
                changes[name] = base / value
            elif isinstance(value, Section):
                changes[name] = walk(value)
            elif isinstance(value, list) and value and isinstance(value[0], Section):
                changes[name] = [walk(item) for item in value]
            elif isinstance(value, dict):
                changes[name] = {
                    key: walk(item) if isinstance(item, Section) else item
                    for key, item in value.items()
                }
        return replace(section, **changes)

    resolved = walk(config)
    assert isinstance(resolved, Config)  # noqa: S101 - replace keeps the class
    return resolved


class _LineLoader(yaml.SafeLoader):
    """Refuses duplicate keys, aliases and merges, and keeps the line of each key."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self.lines: dict[Location, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - as in the base class
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not used here; write the value out",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def note_lines(self, node: yaml.Node, path: Location = ()) -> None:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem="a key stands twice, or is not a text", problem_mark=key.start_mark
                    )
                seen.add(key.value)
                self.lines[(*path, key.value)] = key.start_mark.line + 1
                self.note_lines(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.note_lines(item, (*path, index))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: can not be read: {error.strerror}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        loader = _LineLoader(data)
    except yaml.YAMLError:
        raise ConfigError(f"{path}: is not YAML: it is no text in UTF-8 or UTF-16") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        loader.note_lines(node)
        document = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {_problem(error)}") from None
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError):
        # PyYAML raises AttributeError at "!!timestamp x".
        raise ConfigError(f"{path}: is not YAML") from None
    finally:
        loader.dispose()
    if not isinstance(document, dict):
        raise ConfigError(f"{path}:1: expected keys such as identity and policy at the top level")
    return document, loader.lines


def _problem(error: yaml.MarkedYAMLError) -> str:
    """What YAML stumbles over, without the text that stands there, which may be a secret."""
    said, named = _YAML_NAME.subn(r"\1", error.problem or "it is not YAML")
    return f"{said}: put a value that begins with *, & or ! in quotes" if named else said


def _overlay(document: dict[str, Any], environment: Mapping[str, str]) -> dict[Location, str]:
    """Put the variables' values into the document; the variable of each key set."""
    variables: dict[Location, str] = {}
    for name, text in sorted(environment.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or _SERVICE_LINK.fullmatch(name):
            continue
        path = tuple(part.lower() for part in name.removeprefix(ENVIRONMENT_PREFIX).split("__"))
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, AttributeError, RecursionError):
            raise ConfigError(f"{name}: its value is not YAML") from None
        target: Any = document
        for part in path[:-1]:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise ConfigError(f"{name}: {'.'.join(path[:-1])} is not a section")
        target[path[-1]] = value
        variables[path] = name
    return variables


def _explain(
    fault: Fault,
    path: Path,
    lines: Mapping[Location, int],
    variables: Mapping[Location, str],
) -> str:
    """One fault as "where: key: what was expected"."""
    location, message = fault
    if not location and "." in message.partition(" ")[0]:
        # A rule between sections begins with the key that breaks it.
        location = tuple(message.partition(" ")[0].split("."))
    key = ".".join(str(part) for part in location) or "the configuration"
    return f"{_place(location, path, lines, variables)}: {key}: {message}"


def _place(
    location: Location,
    path: Path,
    lines: Mapping[Location, int],
    variables: Mapping[Location, str],
) -> str:
    """The variable that set the key, or else file and line of it or of its section."""
    for length in range(len(location), 0, -1):
        if location[:length] in variables:
            return variables[location[:length]]
    for length in range(len(location), -1, -1):
        if location[:length] in lines:
            return f"{path}:{lines[location[:length]]}"
    return f"{path}:1"


_YAML_NAME: Final = re.compile(r"(alias|anchor|tag|tag handle) '.*?'(?=;|$)")
"""Where PyYAML repeats a name out of the text: how a value reads that begins with *, & or !."""
