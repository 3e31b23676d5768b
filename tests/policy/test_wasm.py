"""The embedded engine answers as the policy says, or refuses with a code of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import subprocess
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import wasmtime

from pdp.canonical import MAX_DEPTH, MAX_SAFE_INTEGER, JsonObject, JsonValue
from pdp.policy import wasm
from pdp.policy.abi import EPOCHS, Instance, Program
from pdp.policy.bundle import Bundle, load_bundle
from pdp.policy.engine import BundleError, Entrypoint, PolicyEngine, PolicyError
from pdp.policy.wasm import MAX_WAITING_PER_WORKER, WasmEngine, WasmEvaluator, compile_wasm

BuildPolicy = Callable[[Mapping[str, str | JsonObject]], Bundle]

BUDGET = """package pdp.budget

limits := []

decision := {"allow": false, "reason_code": "budget_not_allowed"}
"""

# Every way in which a rule can end, by what the input asks for.
AUTHZ = """package pdp.authz

decision := input.value if input.ask == "echo"

decision := null if input.ask == "null"

decision := "exact" if {
	input.ask == "integer"
	input.value == 9007199254740991
	input.value - 1 == 9007199254740990
	input.value != 9007199254740990
}

decision := "seen" if {
	input.ask == "text"
	input.value == "caf\u00e9 \u2603 \U0001f600"
	count(input.value) == 8
}

# Two values at once: a conflict, which traps.
decision := [value] if {
	input.ask == "conflict"
	some value in [input.value, 2]
}

decision := "printed" if {
	input.ask == "print"
	print(input.value)
}

# Runs for hours.
decision := "done" if {
	input.ask == "runaway"
	many := numbers.range(1, 3000)
	some a in many
	some b in many
	some c in many
	a < b
	b < c
	c < a
}

decision := [concat("", [input.value, format_int(n, 10)]) | some n in numbers.range(1, 1000000)] if {
	input.ask == "memory"
}

decision := [long | some _ in numbers.range(1, 3000)] if input.ask == "long"

long := concat("", ["x" | some _ in numbers.range(1, 500)])
"""

SECRET = "s3cret-argument"


@pytest.fixture(scope="session")
def bundle(build_policy: BuildPolicy) -> Bundle:
    return build_policy({"pdp/authz/authz.rego": AUTHZ, "pdp/budget/budget.rego": BUDGET})


def started(
    bundle: Bundle, *, deadline_ms: int = 1_000, workers: int = 2, memory_max_mib: int = 64
) -> WasmEngine:
    return WasmEngine(
        bundle, deadline_ms=deadline_ms, workers=workers, memory_max_mib=memory_max_mib
    )


def run(engine: WasmEngine, use: Callable[[], Awaitable[None]]) -> None:
    async def walk() -> None:
        try:
            await use()
        finally:
            await engine.close()

    asyncio.run(walk())


async def ask(engine: PolicyEngine, what: str, value: JsonValue = None) -> JsonValue:
    return await engine.evaluate(Entrypoint.AUTHZ_DECISION, {"ask": what, "value": value})


async def reason_of(answer: Awaitable[JsonValue]) -> str:
    with pytest.raises(PolicyError) as refusal:
        await answer
    return refusal.value.reason_code


def test_a_policy_sees_what_was_sent_and_its_value_comes_back(bundle: Bundle) -> None:
    engine = started(bundle)
    values: list[JsonValue] = [
        True,
        "",
        "line\n\t\x00\x7f end",
        'quote " and \\ backslash',
        "caf\u00e9 \u2603 \U0001f600 \u2028",
        0,
        -MAX_SAFE_INTEGER,
        MAX_SAFE_INTEGER,
        0.1,
        1e300,
        -2.5e-7,
        [],
        {},
        [None, [True, {"a": [1, 2.5, "x"]}]],
        {"": 1, "\u00e9": {"deep": [[[[]]]]}},
    ]

    async def use() -> None:
        for value in values:
            assert await ask(engine, "echo", value) == value

    run(engine, use)


def test_a_document_as_deep_as_any_that_is_read_comes_back(bundle: Bundle) -> None:
    engine = started(bundle)
    deep: JsonValue = "leaf"
    for n in range(MAX_DEPTH):
        deep = [deep] if n % 2 else {"down": deep}

    async def use() -> None:
        assert await ask(engine, "echo", deep) == deep

    run(engine, use)


def test_integers_and_text_compare_exactly_inside_the_policy(bundle: Bundle) -> None:
    engine = started(bundle)

    async def use() -> None:
        assert await ask(engine, "integer", MAX_SAFE_INTEGER) == "exact"
        assert await reason_of(ask(engine, "integer", MAX_SAFE_INTEGER - 1)) == "policy_undefined"
        assert await ask(engine, "text", "caf\u00e9 \u2603 \U0001f600") == "seen"

    run(engine, use)


def test_undefined_is_a_denial_and_null_is_a_value(bundle: Bundle) -> None:
    engine = started(bundle)

    async def use() -> None:
        assert await reason_of(ask(engine, "nothing of the kind")) == "policy_undefined"
        assert await ask(engine, "null") is None

    run(engine, use)


@pytest.mark.parametrize("failing", ("conflict", "memory", "long"))
def test_a_failed_evaluation_is_a_denial_and_leaves_the_next_one_clean(
    bundle: Bundle, failing: str
) -> None:
    engine = started(bundle, deadline_ms=10_000, workers=1, memory_max_mib=16)

    async def use() -> None:
        for _ in range(3):
            assert await reason_of(ask(engine, failing, SECRET)) == "policy_error"
            assert await ask(engine, "echo", "clean") == "clean"

    run(engine, use)


@pytest.mark.slow
def test_memory_does_not_grow_over_many_evaluations(bundle: Bundle) -> None:
    engine = started(bundle, workers=1)

    async def use() -> None:
        async def evaluate(times: int) -> int:
            for n in range(times):
                await ask(engine, "echo", ["x" * (n % 2_000), n])
            return resident_kib()

        settled = await evaluate(2_000)
        assert await evaluate(20_000) - settled < 4 * 1024

    run(engine, use)


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def test_a_runaway_is_cut_at_its_deadline_while_another_is_served(bundle: Bundle) -> None:
    engine = started(bundle, deadline_ms=300, workers=2)

    async def use() -> None:
        runaway = asyncio.create_task(reason_of(ask(engine, "runaway")))
        await asyncio.sleep(0)
        for _ in range(20):
            assert await ask(engine, "echo", 1) == 1
        assert not runaway.done()
        assert await runaway == "policy_timeout"

    run(engine, use)


def test_nobody_who_waits_behind_a_slow_question_is_forgotten_there(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wasm, "HELP_AFTER_SECONDS", 0.1)
    engine = started(bundle, workers=2)
    first_ends, slow_ends = threading.Event(), threading.Event()

    async def first(_engine: PolicyEngine) -> None:
        first_ends.wait(30)

    async def slow(_engine: PolicyEngine) -> None:
        slow_ends.wait(30)

    async def use() -> None:
        tasks = [asyncio.create_task(engine.walk(steps)) for steps in (first, slow)]
        early = asyncio.create_task(ask(engine, "echo", 1))
        await asyncio.sleep(0.05)
        first_ends.set()
        # Sees before the one that waits longer how slow it is, and its help goes to that one.
        late = asyncio.create_task(ask(engine, "echo", 2))
        _, forgotten = await asyncio.wait({early, late}, timeout=5)
        slow_ends.set()
        await asyncio.gather(*tasks)
        assert not forgotten

    run(engine, use)


def test_a_wait_for_a_worker_ends_also_where_nothing_was_evaluated_when_it_was_too_long(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wasm, "MAX_WAIT_SECONDS", 0.05)
    engine = started(bundle, deadline_ms=50, workers=1)
    now = time.monotonic()
    monkeypatch.setattr(EPOCHS, "_clock", lambda: now)
    disk = threading.Event()

    async def steps(at_hand: PolicyEngine) -> JsonValue:
        disk.wait(30)
        return await ask(at_hand, "runaway")

    async def use() -> None:
        held_up = asyncio.create_task(reason_of(engine.walk(steps)))
        behind = asyncio.create_task(reason_of(ask(engine, "echo", 1)))
        await asyncio.sleep(0.3)
        disk.set()
        done, _ = await asyncio.wait({held_up, behind}, timeout=5)
        monkeypatch.undo()
        assert {task.result() for task in done} == {"policy_timeout", "policy_unavailable"}

    run(engine, use)


def test_a_worker_outlives_whatever_fails_while_it_recovers(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started(bundle, deadline_ms=50, workers=1)

    def fail(*_: object, **__: object) -> Instance:
        raise MemoryError

    async def use() -> None:
        monkeypatch.setattr(wasm, "Instance", fail)
        assert await reason_of(ask(engine, "runaway")) == "policy_timeout"
        assert await reason_of(ask(engine, "echo", 1)) == "policy_error"
        monkeypatch.setattr(wasm, "Instance", Instance)
        assert await asyncio.wait_for(ask(engine, "echo", 2), 5) == 2

    run(engine, use)


def test_workers_serve_on_after_every_one_of_them_was_cut(bundle: Bundle) -> None:
    engine = started(bundle, deadline_ms=50, workers=2)

    async def use() -> None:
        cut = await asyncio.gather(*(reason_of(ask(engine, "runaway")) for _ in range(4)))
        assert cut == ["policy_timeout"] * 4
        served = await asyncio.gather(*(ask(engine, "echo", n) for n in range(8)))
        assert served == list(range(8))

    run(engine, use)


def test_a_full_queue_refuses_at_once_and_takes_again_when_it_has_room(bundle: Bundle) -> None:
    engine = started(bundle, deadline_ms=500, workers=1)

    async def use() -> None:
        runaway = asyncio.create_task(reason_of(ask(engine, "runaway")))
        waiting = [
            asyncio.create_task(ask(engine, "echo", n)) for n in range(MAX_WAITING_PER_WORKER - 1)
        ]
        await asyncio.sleep(0)
        assert await reason_of(ask(engine, "echo", 0)) == "policy_unavailable"
        assert not runaway.done()
        assert await runaway == "policy_timeout"
        assert await asyncio.gather(*waiting) == list(range(MAX_WAITING_PER_WORKER - 1))
        assert await ask(engine, "echo", 1) == 1

    run(engine, use)


def test_an_asker_who_gives_up_gives_its_place_back(bundle: Bundle) -> None:
    engine = started(bundle, deadline_ms=1_000, workers=1)

    async def use() -> None:
        runaway = asyncio.create_task(reason_of(ask(engine, "runaway")))
        await asyncio.sleep(0)
        waiting = [
            asyncio.create_task(ask(engine, "echo", n)) for n in range(MAX_WAITING_PER_WORKER - 1)
        ]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not runaway.done()
        assert await ask(engine, "echo", 1) == 1

    run(engine, use)


def test_a_closed_engine_takes_no_question(bundle: Bundle) -> None:
    engine = started(bundle)

    async def use() -> None:
        begun = asyncio.create_task(ask(engine, "echo", 1))
        await asyncio.sleep(0)
        await engine.close()
        assert await begun == 1
        assert await reason_of(ask(engine, "echo", 1)) == "policy_unavailable"

    run(engine, use)


@pytest.mark.parametrize("ending", ("conflict", "memory", "runaway", "print", "long"))
def test_neither_message_nor_log_holds_what_was_asked(
    bundle: Bundle, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = started(bundle, deadline_ms=100, memory_max_mib=16)
    said: list[str] = []

    async def use() -> None:
        try:
            said.append(str(await ask(engine, ending, SECRET)))
        except PolicyError as error:
            said.extend([str(error), repr(error), error.message, repr(error.__cause__)])

    run(engine, use)

    assert said
    assert SECRET not in "".join(said)
    assert SECRET not in caplog.text


def test_a_document_that_can_not_be_written_is_a_denial_without_its_content(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    engine = started(bundle)

    async def use() -> None:
        with pytest.raises(PolicyError) as refusal:
            await ask(engine, "echo", SECRET + "\ud800")
        assert refusal.value.reason_code == "policy_error"
        assert SECRET not in str(refusal.value)
        assert await ask(engine, "echo", 1) == 1

    run(engine, use)
    assert SECRET not in caplog.text


def test_an_answer_comes_in_time_even_if_the_deadline_in_the_sandbox_fails(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wasm, "MAX_WAIT_SECONDS", 0.1)
    engine = started(bundle, deadline_ms=50, workers=1)
    now = time.monotonic()
    monkeypatch.setattr(EPOCHS, "_clock", lambda: now)

    async def use() -> None:
        runaway = asyncio.create_task(reason_of(ask(engine, "runaway")))
        await asyncio.sleep(0)
        assert await reason_of(ask(engine, "echo", 1)) == "policy_unavailable"
        assert await runaway == "policy_timeout"
        monkeypatch.undo()

    run(engine, use)


def test_steps_go_on_where_the_policy_was_evaluated(bundle: Bundle) -> None:
    engine = started(bundle)

    async def steps(at_hand: PolicyEngine) -> tuple[JsonValue, JsonValue, str, str]:
        first, second = await ask(at_hand, "echo", 1), await ask(at_hand, "echo", 2)
        reason_code = await reason_of(ask(at_hand, "undefined"))
        return first, second, reason_code, threading.current_thread().name

    async def fail(_engine: PolicyEngine) -> None:
        raise KeyError("why")

    async def wait(_engine: PolicyEngine) -> None:
        await asyncio.sleep(0)

    async def use() -> None:
        assert await engine.walk(steps) == (1, 2, "policy_undefined", "policy")
        with pytest.raises(KeyError, match="why"):
            await engine.walk(fail)
        with pytest.raises(RuntimeError, match="off it"):
            await engine.walk(wait)
        assert await ask(engine, "echo", 3) == 3

    run(engine, use)


@pytest.mark.parametrize("fails", (False, True))
def test_a_worker_keeps_nothing_of_what_it_was_asked(bundle: Bundle, *, fails: bool) -> None:
    class Message:
        pass

    engine = started(bundle)

    async def ask_once(message: Message) -> None:
        async def steps(_engine: PolicyEngine) -> int:
            if fails:
                raise KeyError(id(message))
            return id(message)

        with pytest.raises(KeyError) if fails else contextlib.nullcontext():
            await engine.walk(steps)

    async def use() -> None:
        message = Message()
        kept = weakref.ref(message)
        await ask_once(message)
        del message
        for _ in range(100):  # the worker answers just before it lets go
            gc.collect()
            if kept() is None:
                break
            await asyncio.sleep(0.05)
        assert kept() is None

    run(engine, use)


def test_a_disk_that_hangs_is_not_told_as_a_fault_of_the_policy(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wasm, "MAX_WAIT_SECONDS", 0.01)
    engine = started(bundle, deadline_ms=20, workers=1)
    disk = threading.Event()

    async def steps(at_hand: PolicyEngine) -> JsonValue:
        value = await ask(at_hand, "echo", 1)
        disk.wait(30)
        return value

    async def use() -> None:
        held_up = asyncio.create_task(engine.walk(steps))
        behind = asyncio.create_task(ask(engine, "echo", 2))
        done, _ = await asyncio.wait({held_up, behind}, timeout=0.3)
        assert not done
        disk.set()
        assert (await held_up, await behind) == (1, 2)

    run(engine, use)


def test_steps_that_nobody_waits_for_any_more_go_no_further(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wasm, "MAX_WAIT_SECONDS", 0.05)
    engine = started(bundle, deadline_ms=50, workers=1)
    now = time.monotonic()
    monkeypatch.setattr(EPOCHS, "_clock", lambda: now)
    went_on = []

    async def steps(at_hand: PolicyEngine) -> None:
        with contextlib.suppress(PolicyError):
            await ask(at_hand, "runaway")
        went_on.append(True)

    async def use() -> None:
        assert await reason_of(engine.walk(steps)) == "policy_timeout"
        monkeypatch.undo()

    run(engine, use)
    assert not went_on


def test_an_engine_leaves_no_thread_behind(bundle: Bundle) -> None:
    before = set(threading.enumerate())
    engine = started(bundle)

    async def use() -> None:
        assert await ask(engine, "echo", 1) == 1

    run(engine, use)
    with pytest.raises(BundleError):
        started(replace(bundle, data=b'{"broken":'))

    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not {name for name in left if "policy" in name or "ticker" in name}


@pytest.mark.parametrize(
    ("call", "builtin"),
    (
        ('http.send({"method": "get", "url": input.url}).status_code == 200', "http.send"),
        ('rand.intn("seed", input.most) == 1', "rand.intn"),
        ("opa.runtime().env.HOME == input.home", "opa.runtime"),
        ("io.jwt.decode(input.token)[0].alg == input.alg", "io.jwt.decode"),
        ("net.lookup_ip_addr(input.host)[_] == input.address", "net.lookup_ip_addr"),
    ),
)
def test_a_built_in_that_the_host_lacks_is_refused_at_load_by_name_and_file(
    build_policy: BuildPolicy, call: str, builtin: str
) -> None:
    needy = build_policy(
        {
            "pdp/authz/authz.rego": f"package pdp.authz\n\ndecision := true if {call}\n",
            "pdp/budget/budget.rego": BUDGET,
        }
    )

    with pytest.raises(BundleError, match="built-in") as refusal:
        started(needy)

    assert builtin in refusal.value.message
    assert "pdp/authz/authz.rego" in refusal.value.message
    assert "engine: {opa: {managed: true}}" in refusal.value.message
    assert refusal.value.reason_code == "policy_unavailable"


def test_a_missing_entrypoint_is_refused_at_load_by_name(
    opa: Path, write_policy: Callable[[Mapping[str, str | JsonObject]], Path], tmp_path: Path
) -> None:
    sources = write_policy({"pdp/authz/authz.rego": AUTHZ, "pdp/budget/budget.rego": BUDGET})
    command: list[str | Path] = [opa, "build", "-t", "wasm", "-b", sources]
    command += ["-e", "pdp/authz/decision", "-o", tmp_path / "bundle.tar.gz"]
    subprocess.run(command, check=True)

    with pytest.raises(BundleError, match="no entrypoint") as refusal:
        started(load_bundle(tmp_path / "bundle.tar.gz"))

    named = refusal.value.message.split(";")[0]
    assert "pdp/budget/decision" in named
    assert "pdp/budget/limits" in named
    assert "pdp/authz/decision" not in named


def test_a_module_that_is_not_opas_is_refused(bundle: Bundle) -> None:
    assert bundle.wasm is not None
    for module in (b"", b"not wasm", b"\x00asm\x01\x00\x00\x00", bundle.wasm[:-100], None):
        with pytest.raises(BundleError, match=r"policy\.wasm"):
            started(replace(bundle, wasm=module))


def test_data_that_does_not_fit_into_the_memory_is_refused_at_load(bundle: Bundle) -> None:
    data = b'{"tenants":"' + b"x" * (32 * 1024 * 1024) + b'"}'

    with pytest.raises(BundleError, match="more memory than it may have"):
        started(replace(bundle, data=data), memory_max_mib=16)


WALKING = """package pdp.authz

default decision := "no"

# Each level of the walk starts a walk of its own.
decision := "found" if {
	walk(input.value, [path, _])
	walk(input.value, [_, below])
	walk(input.value, [_, again])
	below == again
	count(path) > 1000
}
"""


def test_a_walk_over_walks_is_cut_while_another_is_served(build_policy: BuildPolicy) -> None:
    bundle = build_policy({"pdp/authz/authz.rego": WALKING, "pdp/budget/budget.rego": BUDGET})
    # A walk takes memory as it goes; the deadline is to come first.
    engine = started(bundle, deadline_ms=100, workers=2, memory_max_mib=1_024)
    deep: JsonValue = {"leaf": list(range(200))}
    for n in range(50):
        deep = {"down": deep, "value": n}

    async def use() -> None:
        cut = asyncio.create_task(reason_of(ask(engine, "walk", deep)))
        await asyncio.sleep(0)
        for _ in range(20):
            assert await ask(engine, "walk", 1) == "no"
        assert not cut.done()
        assert await cut == "policy_timeout"
        assert await ask(engine, "walk", 1) == "no"

    run(engine, use)


def test_a_document_nested_too_deep_for_the_sandbox_is_a_denial(bundle: Bundle) -> None:
    engine = started(bundle, workers=1)
    deep: JsonValue = 1
    for _ in range(100_000):
        deep = [deep]

    async def use() -> None:
        assert await reason_of(ask(engine, "echo", deep)) == "policy_error"
        assert await ask(engine, "echo", "clean") == "clean"

    run(engine, use)


def test_a_number_beyond_a_double_is_no_answer(build_policy: BuildPolicy) -> None:
    authz = "package pdp.authz\n\ndecision := 1e400 if input.ask == true\n"
    huge = build_policy({"pdp/authz/authz.rego": authz, "pdp/budget/budget.rego": BUDGET})

    with WasmEvaluator(huge) as evaluator, pytest.raises(PolicyError) as refusal:
        evaluator.evaluate("pdp/authz/decision", {"ask": True})

    assert refusal.value.reason_code == "policy_error"


def test_a_document_beyond_the_bound_is_a_denial(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wasm, "MAX_DOCUMENT_BYTES", 100)

    with WasmEvaluator(bundle) as evaluator:
        assert evaluator.evaluate("pdp/authz/decision", {"ask": "echo", "value": "x"}) == "x"
        with pytest.raises(PolicyError) as refusal:
            evaluator.evaluate("pdp/authz/decision", {"ask": "echo", "value": "x" * 100})
    assert refusal.value.reason_code == "policy_error"


def test_200_engines_leave_neither_thread_nor_memory_behind(bundle: Bundle) -> None:
    data = b'{"tenants":{%s}}' % b",".join(
        b'"tenant_%d":{"roles":["viewer","agent"],"limit":%d}' % (n, n) for n in range(1_000)
    )

    assert bundle.wasm is not None
    code = compile_wasm(bundle.wasm)

    async def use(bundle: Bundle, number: int) -> None:
        engine = WasmEngine(bundle, deadline_ms=1_000, workers=1, memory_max_mib=64, compiled=code)
        assert await ask(engine, "echo", number) == number
        await engine.close()

    def make(times: int) -> int:
        for number in range(times):
            # Every other one is of another data document, as after a reload.
            changed = replace(bundle, data=data if number % 2 else b"{}")
            asyncio.run(use(changed, number))
        return resident_kib()

    threads = {thread for thread in threading.enumerate() if thread.name != "policy-epochs"}
    settled = make(40)
    # One engine's data alone take more than 1 MiB: 160 that stayed would take 200.
    assert make(160) - settled < 16 * 1024
    left = set(threading.enumerate()) - threads
    assert {thread.name for thread in left} <= {"policy-epochs"}


def test_the_thread_that_counts_deadlines_ends_when_nothing_runs(bundle: Bundle) -> None:
    engine = started(bundle)

    async def use() -> None:
        assert await ask(engine, "echo", 1) == 1

    run(engine, use)
    patience = time.monotonic() + 10
    while "policy-epochs" in {thread.name for thread in threading.enumerate()}:
        assert time.monotonic() < patience
        threading.Event().wait(0.05)


def test_a_bundle_with_the_same_wasm_is_not_compiled_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WasmEvaluator(bundle):
        monkeypatch.setattr(wasmtime, "Module", None)
        engine = started(replace(bundle, data=b'{"other":1}'))

        async def use() -> None:
            assert await ask(engine, "echo", 1) == 1

        run(engine, use)


def test_machine_code_stands_in_for_compiling(
    build_policy: BuildPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_policy({"pdp/authz/authz.rego": ECHO, "pdp/budget/budget.rego": BUDGET})
    assert other.wasm is not None
    code = compile_wasm(other.wasm)
    monkeypatch.setattr(Program, "compile", None)
    engine = WasmEngine(other, deadline_ms=1_000, workers=1, memory_max_mib=64, compiled=code)

    async def use() -> None:
        assert await ask(engine, "echo", 1) == 1

    run(engine, use)


ECHO = """package pdp.authz

decision := input.value
"""


def test_what_is_compiled_beside_calls_gives_way_to_them(
    build_policy: BuildPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_policy({"pdp/authz/authz.rego": ECHO, "pdp/budget/budget.rego": BUDGET})
    assert other.wasm is not None
    nice: list[int] = []
    compiled = Program.compile

    def compile_noting(wasm_bytes: bytes) -> Program:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return compiled(wasm_bytes)

    monkeypatch.setattr(Program, "compile", compile_noting)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    asyncio.run(asyncio.to_thread(compile_wasm, other.wasm))
    compile_wasm(other.wasm)

    assert nice[0] > before
    assert nice[1] == before
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_what_is_compiled_gives_way_also_where_the_process_has_given_way_itself() -> None:
    nice: list[int] = []

    def note() -> None:
        wasm._give_way()
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def begin_nice() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        # A thread is as nice as the one that starts it.
        thread = threading.Thread(target=note)
        thread.start()
        thread.join()

    starter = threading.Thread(target=begin_nice)
    starter.start()
    starter.join()
    assert nice == [19]


def test_an_evaluator_answers_as_the_engine_and_refuses_with_its_codes(bundle: Bundle) -> None:
    def reason(evaluator: WasmEvaluator, what: str) -> str:
        with pytest.raises(PolicyError) as refusal:
            evaluator.evaluate("pdp/authz/decision", {"ask": what, "value": SECRET})
        assert SECRET not in f"{refusal.value!r} {refusal.value.__cause__!r}"
        return refusal.value.reason_code

    with WasmEvaluator(bundle, deadline_ms=50, memory_max_mib=16) as evaluator:
        for _ in range(2):
            assert reason(evaluator, "nothing of the kind") == "policy_undefined"
            assert reason(evaluator, "runaway") == "policy_timeout"
            assert reason(evaluator, "conflict") == "policy_error"
            answer = evaluator.evaluate(Entrypoint.AUTHZ_DECISION, {"ask": "echo", "value": [1]})
            assert answer == [1]
        assert evaluator.evaluate("pdp/budget/limits", {}) == []
        with pytest.raises(PolicyError):
            evaluator.evaluate("pdp/no/such/rule", {})


def test_an_evaluator_takes_other_data(build_policy: BuildPolicy) -> None:
    authz = "package pdp.authz\n\ndecision := data.tenants[input.tenant].status\n"
    bundle = build_policy(
        {
            "pdp/authz/authz.rego": authz,
            "pdp/budget/budget.rego": BUDGET,
            "data.json": {"tenants": {"a": {"status": "active"}}},
        }
    )

    with WasmEvaluator(bundle) as evaluator:
        assert evaluator.evaluate("pdp/authz/decision", {"tenant": "a"}) == "active"
        evaluator.set_data(b'{"tenants":{"a":{"status":"suspended"}}}')
        assert evaluator.evaluate("pdp/authz/decision", {"tenant": "a"}) == "suspended"
        with pytest.raises(BundleError, match="can not be loaded"):
            evaluator.set_data(b'{"tenants":')


def test_an_evaluator_runs_a_module_of_other_entrypoints(
    opa: Path, write_policy: Callable[[Mapping[str, str | JsonObject]], Path], tmp_path: Path
) -> None:
    sources = write_policy({"p/p.rego": "package p\n\nx := input.n + 1\n"})
    command: list[str | Path] = [opa, "build", "-t", "wasm", "-b", sources]
    command += ["-e", "p/x", "-o", tmp_path / "bundle.tar.gz"]
    subprocess.run(command, check=True)
    bundle = load_bundle(tmp_path / "bundle.tar.gz")

    with WasmEvaluator(bundle, entrypoints=["p/x"]) as evaluator:
        assert evaluator.evaluate("p/x", {"n": 1}) == 2
    with pytest.raises(BundleError, match="no entrypoint p/y"):
        WasmEvaluator(bundle, entrypoints=["p/x", "p/y"])


@pytest.mark.parametrize("workers", (1, 3))
def test_answers_under_load_go_to_those_who_asked(bundle: Bundle, workers: int) -> None:
    engine = started(bundle, workers=workers)

    async def use() -> None:
        asked = [[n, "x" * (n % 700)] for n in range(500)]
        assert await asyncio.gather(*(ask(engine, "echo", one) for one in asked)) == asked  # type: ignore[arg-type]

    run(engine, use)
