"""The policy says whose turn it is in a full sidecar, and may bound a tenant further."""

from __future__ import annotations

import itertools
import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from pdp.canonical import JsonValue
from pdp.policy.archive import pack, read_archive
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle

ROOT: Final = Path(__file__).parents[2]
OPA: Final = ROOT / ".tools/opa"
ISSUER: Final = TokenIssuer()
TRIES: Final = 400
CLASS: Final = "pdp/sidecar/sidecar.rego"
RULES: Final = {
    # Some milliseconds of work, so that it is the sidecar that is full and not its callers.
    "pdp/authz/authz.rego": """package pdp.authz

decision := {"allow": worked > 0, "reason_code": "ok"}

worked := count([n | some n in numbers.range(1, 4000); n % 7 == 0])
""",
    "pdp/budget/budget.rego": """package pdp.budget

decision := {"allow": false, "reason_code": "budget_not_allowed"}

limits := []
""",
    CLASS: """package pdp.sidecar

service_class := data.tenants[input.subject.properties.tenant].service
""",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A release without tenants."""
    return build(tmp_path_factory.mktemp("built"), RULES)


def build(directory: Path, rules: dict[str, str]) -> dict[str, bytes]:
    sources = directory / "sources"
    files = {**rules, ".manifest": json.dumps({"roots": ["pdp", "tenants"]})}
    for name, text in files.items():
        file = sources / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    target = build_bundle(sources, directory / "built.tar.gz", opa=OPA)
    return dict(read_archive(target.read_bytes(), place="built"))


def release(path: Path, built: dict[str, bytes], number: int, **classes: JsonValue) -> Path:
    """Put a release there that gives these tenants their classes."""
    manifest = json.loads(built[".manifest"]) | {
        "revision": f"r{number}",
        "metadata": {"pdp": {"sequence": number}},
    }
    data = {"tenants": {name: {"service": service} for name, service in classes.items()}}
    content = {
        **built,
        ".manifest": json.dumps(manifest).encode(),
        "data.json": json.dumps(data).encode(),
    }
    draft = path.with_suffix(".draft")
    draft.write_bytes(pack(content))
    return draft.replace(path)


def serving(
    directory: Path, bundle: Path, *, engine: JsonValue = "embedded", **limits: Any
) -> SidecarProcess:
    policy = {
        "bundles": {"main": {"path": str(bundle), "poll_seconds": 0.1}},
        "engine": engine,
        "opa_command": str(OPA),
    }
    config = {"listen": {"metrics": "127.0.0.1:0"}, "policy": policy, "limits": limits}
    return SidecarProcess(directory, issuer=ISSUER, bundle=bundle, config=config)


def acting(sidecar: SidecarProcess, tenant: str) -> Caller:
    return Caller(sidecar.target, token=ISSUER.token(tenant, "user-7"))


def is_let_in(caller: Caller) -> bool:
    try:
        return caller.authorize("orders.read").decision
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return False
        raise


def until(condition: Callable[[], bool]) -> None:
    for _ in range(TRIES):
        if condition():
            return
    raise AssertionError("it does not come to that")


WIDE: Final = {"calls_per_second": 100_000, "burst": 100_000, "max_concurrent_calls": 1_000}


def served(sidecar: SidecarProcess, tenants: tuple[str, ...], total: int) -> Counter[str]:
    """Of so many calls that were let in while each tenant always had some waiting: whose."""
    inside: Counter[str] = Counter()
    each = 8
    full = threading.Barrier(each * len(tenants))
    numbers = itertools.count()

    def ask_on(tenant: str, caller: Caller) -> None:
        full.wait()
        while True:
            assert caller.authorize("orders.read").decision
            if next(numbers) >= total:
                return
            inside[tenant] += 1

    with ThreadPoolExecutor(each * len(tenants)) as threads:
        callers = {tenant: acting(sidecar, tenant) for tenant in tenants}
        for caller in callers.values():
            for _ in range(2):  # after the first its class is known
                assert caller.authorize("orders.read").decision
        asking = [
            threads.submit(ask_on, tenant, callers[tenant])
            for tenant in tenants
            for _ in range(each)
        ]
        for task in asking:
            task.result()
        for caller in callers.values():
            caller.close()
    return inside


def test_a_full_sidecar_serves_high_before_low_and_starves_nobody(
    tmp_path: Path, built: dict[str, bytes]
) -> None:
    bundle = release(
        tmp_path / "bundle.tar.gz", built, 1, first={"priority": "high"}, last={"priority": "low"}
    )

    with serving(tmp_path, bundle, max_concurrent_calls=1, tenants=WIDE) as sidecar:
        counted = served(sidecar, ("first", "last"), 200)

    # Four for one, but for how the calls come in at the beginning.
    assert counted["first"] > 2.5 * counted["last"]
    assert counted["last"] > 20


def test_without_classes_tenants_are_served_alike(tmp_path: Path, built: dict[str, bytes]) -> None:
    bundle = release(tmp_path / "bundle.tar.gz", built, 1)

    with serving(tmp_path, bundle, max_concurrent_calls=1, tenants=WIDE) as sidecar:
        counted = served(sidecar, ("first", "last"), 100)

    assert counted["first"] < 1.5 * counted["last"]
    assert counted["last"] < 1.5 * counted["first"]


@pytest.mark.parametrize("engine", ("embedded", {"opa": {"managed": True}}))
def test_a_new_release_changes_the_class_of_a_running_sidecar(
    tmp_path: Path, built: dict[str, bytes], engine: JsonValue
) -> None:
    path = tmp_path / "bundle.tar.gz"
    slow: JsonValue = {"priority": "low", "calls_per_second": 0.01, "burst": 1}
    release(path, built, 1, bounded=slow)

    with (
        serving(tmp_path, path, engine=engine, tenants=WIDE) as sidecar,
        acting(sidecar, "bounded") as caller,
        acting(sidecar, "other") as other,
    ):
        until(lambda: not is_let_in(caller))
        assert other.authorize("orders.read").decision
        release(path, built, 2)
        until(lambda: is_let_in(caller))
        assert all(is_let_in(caller) for _ in range(10))
        assert "pdp_service_class_failures_total{" not in scraped(sidecar)


def test_no_policy_lifts_what_the_operator_allows(tmp_path: Path, built: dict[str, bytes]) -> None:
    bundle = release(
        tmp_path / "bundle.tar.gz", built, 1,
        greedy={"priority": "high", "calls_per_second": 100_000, "burst": 100_000},
    )  # fmt: skip
    tenants = {**WIDE, "calls_per_second": 0.01, "burst": 3}

    with serving(tmp_path, bundle, tenants=tenants) as sidecar, acting(sidecar, "greedy") as caller:
        assert [is_let_in(caller) for _ in range(4)] == [True] * 3 + [False]


def test_a_class_that_is_malformed_stops_nobody_and_is_counted(
    tmp_path: Path, built: dict[str, bytes]
) -> None:
    bundle = release(tmp_path / "bundle.tar.gz", built, 1, odd={"priority": "highest"})

    with serving(tmp_path, bundle, tenants=WIDE) as sidecar, acting(sidecar, "odd") as caller:
        counted = 'pdp_service_class_failures_total{reason_code="policy_invalid"} 1.0'
        until(lambda: is_let_in(caller) and counted in scraped(sidecar))
        assert counted in scraped(sidecar)
        log = sidecar.log.read_text(encoding="utf-8")
        assert log.count("gives no service class") == 1
        assert "highest" not in log


def test_a_policy_without_the_rule_leaves_every_tenant_to_the_configuration(
    tmp_path: Path,
) -> None:
    rules = {name: text for name, text in RULES.items() if name != CLASS}
    bundle = release(tmp_path / "bundle.tar.gz", build(tmp_path, rules), 1)
    tenants = {**WIDE, "calls_per_second": 0.01, "burst": 3}

    with serving(tmp_path, bundle, tenants=tenants) as sidecar, acting(sidecar, "any") as caller:
        assert [is_let_in(caller) for _ in range(4)] == [True] * 3 + [False]
        assert "pdp_service_class_failures_total{" not in scraped(sidecar)


def scraped(sidecar: SidecarProcess) -> str:
    (place,) = (
        word.rstrip(",")
        for word in sidecar.log.read_text(encoding="utf-8").split()
        if word.startswith("http://127.0.0.1:")
    )
    with urllib.request.urlopen(f"{place}/metrics", timeout=5) as response:  # noqa: S310 - loopback
        return str(response.read().decode("utf-8"))
