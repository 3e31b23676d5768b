"""A module can do what OPA's ABI lets it, and neither crash the process nor outlive its bounds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from pdp.canonical import JsonObject
from pdp.policy import abi
from pdp.policy.abi import (
    EPOCHS,
    MAX_RESULT_BYTES,
    DeadlineError,
    Instance,
    Lend,
    ModuleError,
    Program,
    RunError,
    deadline_ticks,
)
from pdp.policy.bundle import Bundle
from pdp.policy.engine import BundleError
from pdp.policy.wasm import WasmEvaluator

BuildPolicy = Callable[[Mapping[str, str | JsonObject]], Bundle]
MIB = 1024 * 1024

AUTHZ = """package pdp.authz

decision := json.patch(input.value, [])

# The host is asked once for each number.
many := [sprintf("%d", [n]) | some n in numbers.range(1, input.count)]
"""


# What each part of a module is unless a test says otherwise. It has a result at 512 and
# room for a document at 4096.
PARTS = {
    "memory": '(import "env" "memory" (memory 2))',
    "imports": '(import "env" "opa_abort" (func $abort (param i32)))',
    "version": '(global (export "opa_wasm_abi_version") i32 (i32.const 1))',
    "minor": '(global (export "opa_wasm_abi_minor_version") i32 (i32.const 3))',
    "builtins": '(func (export "builtins") (result i32) i32.const 64)',
    "entrypoints": '(func (export "entrypoints") (result i32) i32.const 128)',
    "eval": "i32.const 512",
    "malloc": '(func (export "opa_malloc") (param i32) (result i32) i32.const 4096)',
    "free": '(func (export "opa_free") (param i32))',
    "heap": '(func (export "opa_heap_ptr_get") (result i32) i32.const 4096)',
    "json_dump": '(func (export "opa_json_dump") (param i32) (result i32) local.get 0)',
    "dump": '(func (export "opa_value_dump") (param i32) (result i32) local.get 0)',
    "parse": '(func (export "opa_value_parse") (param i32 i32) (result i32) i32.const 1)',
    "data": r"""
        (data (i32.const 64) "{}\00")
        (data (i32.const 128) "{\"pdp/authz/decision\":0,\"pdp/budget/decision\":1,\"pdp/budget/limits\":2}\00")
        (data (i32.const 512) "[{\"result\":true}]\00")""",
    "more": "",
}


def module(**changes: str) -> bytes:
    parts = {**PARTS, **changes}
    evaluate = (
        '(func $eval (export "opa_eval") (param i32 i32 i32 i32 i32 i32 i32) (result i32) '
        f"{parts.pop('eval')})"
    )
    imports = [parts.pop("memory"), parts.pop("imports")]
    text = "\n".join(["(module", *imports, evaluate, *parts.values(), ")"])
    return bytes(wasmtime.wat2wasm(text))


def loaded(wasm: bytes, *, data: bytes = b"{}", memory_max_bytes: int = 16 * MIB) -> Instance:
    return Instance(Program.compile(wasm), data=data, memory_max_bytes=memory_max_bytes)


def evaluated(
    instance: Instance, *, document: bytes = b"{}", ticks: int = 100, lend: Lend | None = None
) -> bytes:
    try:
        with EPOCHS:
            return instance.evaluate(0, document, ticks=ticks, lend=lend)
    finally:
        instance.close()


def test_a_module_of_the_least_that_the_abi_asks_for_is_run() -> None:
    assert evaluated(loaded(module())) == b'[{"result":true}]'


@pytest.mark.parametrize(
    ("changes", "why"),
    (
        ({"version": PARTS["version"].replace("const 1", "const 2")}, "ABI 2.3"),
        ({"minor": PARTS["minor"].replace("const 3", "const 1")}, "ABI 1.1"),
        ({"version": ""}, "exports no opa_wasm_abi_version"),
        ({"minor": '(func (export "opa_wasm_abi_minor_version"))'}, "opa_wasm_abi_minor_version"),
        ({"malloc": ""}, "exports no opa_malloc"),
        ({"malloc": '(global (export "opa_malloc") i32 (i32.const 1))'}, "opa_malloc"),
        ({"free": '(func (export "opa_free") (param i64))'}, "opa_free"),
        ({"heap": '(func (export "opa_heap_ptr_get") (result f64) f64.const 1)'}, "opa_heap_ptr"),
        ({"memory": "", "more": "(memory 2)"}, "imports no memory"),
        ({"memory": '(import "env" "memory" (func))', "more": "(memory 2)"}, "env.memory"),
        ({"imports": '(import "env" "opa_abort" (func (param i64)))'}, "env.opa_abort"),
        ({"imports": '(import "env" "opa_builtin5" (func (param i32)))'}, "env.opa_builtin5"),
        ({"imports": '(import "env" "clock" (global i32))'}, "env.clock"),
        (
            {"imports": '(import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))'},
            "wasi_snapshot_preview1.proc_exit",
        ),
        ({"data": r'(data (i32.const 64) "\00") (data (i32.const 128) "\00")'}, "can not be read"),
        ({"data": r'(data (i32.const 64) "[1]\00") (data (i32.const 128) "{}\00")'}, "can not be"),
        ({"more": "(table 100000000 funcref)"}, "can not be started"),
    ),
)
def test_a_module_that_opa_has_not_built_is_refused(changes: dict[str, str], why: str) -> None:
    with pytest.raises(ModuleError, match=why):
        loaded(module(**changes))


@pytest.mark.parametrize(
    "changes",
    (
        {"more": "(memory 65536)"},
        {"memory": '(import "env" "memory" (memory i64 2))'},
        {"memory": '(import "env" "memory" (memory 2 4 shared))'},
        {"more": "(type (array (mut i64)))"},
    ),
)
def test_memory_of_a_kind_that_opa_does_not_use_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ModuleError, match="is no Wasm"):
        loaded(module(**changes))


@pytest.mark.parametrize("wasm", (b"", b"not wasm", b"(module)", b"\x00asm\x01\x00\x00\x00"))
def test_what_is_no_module_is_refused(wasm: bytes) -> None:
    with pytest.raises(ModuleError):
        loaded(wasm)


def test_a_module_cut_off_anywhere_is_refused(policy: Bundle) -> None:
    assert policy.wasm is not None
    for length in range(0, len(policy.wasm), 9_973):
        with pytest.raises(ModuleError):
            Program.compile(policy.wasm[:length])


@pytest.mark.parametrize(
    "changes",
    (
        {"memory": '(import "env" "memory" (memory 60000))'},
        {"more": "(start $grow) (func $grow (drop (memory.grow (i32.const 60000))) unreachable)"},
        {"malloc": '(func (export "opa_malloc") (param i32) (result i32) i32.const -8)'},
        {"parse": '(func (export "opa_value_parse") (param i32 i32) (result i32) i32.const 0)'},
        {"more": "(start $deep) (func $deep call $deep)"},
        {"builtins": '(func (export "builtins") (result i32) i32.const -1)'},
        {"builtins": '(func (export "builtins") (result i32) i32.const 0x7fffffff)'},
    ),
)
def test_a_module_that_does_not_come_up_is_an_error_and_no_crash(changes: dict[str, str]) -> None:
    with pytest.raises(RunError):
        loaded(module(**changes))


def test_a_start_that_never_ends_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "LOAD_SECONDS", 0.05)

    with pytest.raises(DeadlineError):
        loaded(module(more="(start $spin) (func $spin (loop br 0))"))


@pytest.mark.parametrize(
    "evaluate",
    (
        "i32.const -1",
        "i32.const 0x7fffffff",
        "(i32.store8 (i32.const 0x1ffff) (i32.const 65)) i32.const 0x1ffff",
        "(memory.fill (i32.const 1024) (i32.const 65) (i32.const 100000)) i32.const 1024 unreachable",
        "(call $abort (i32.const 512)) i32.const 512",
        "(call $abort (i32.const -1)) i32.const 512",
        f"(call $eval {'(i32.const 0)' * 7})",
        "(i32.div_u (i32.const 1) (i32.const 0))",
    ),
)
def test_an_evaluation_that_goes_astray_is_an_error_and_no_crash(evaluate: str) -> None:
    # Without the pages that a module gets on top, so that the ends are where they seem.
    instance = Instance(
        replace(Program.compile(module(eval=evaluate)), wasm_length=0),
        data=b"{}",
        memory_max_bytes=16 * MIB,
    )

    with pytest.raises(RunError):
        evaluated(instance)


def test_an_endless_evaluation_is_cut() -> None:
    with pytest.raises(DeadlineError):
        evaluated(loaded(module(eval="(loop br 0) unreachable")), ticks=deadline_ticks(0.05))


def test_a_result_has_a_largest_length() -> None:
    fill = f"(memory.fill (i32.const 8192) (i32.const 32) (i32.const {MAX_RESULT_BYTES + 1}))"
    memory = '(import "env" "memory" (memory 20))'

    with pytest.raises(RunError, match="longer than it may be"):
        evaluated(loaded(module(memory=memory, eval=f"{fill} i32.const 8192")))
    shorter = fill.replace(str(MAX_RESULT_BYTES + 1), str(MAX_RESULT_BYTES))
    result = evaluated(loaded(module(memory=memory, eval=f"{shorter} i32.const 8192")))
    assert result == b" " * MAX_RESULT_BYTES


def test_a_document_that_needs_more_memory_gets_it_within_the_bound() -> None:
    assert evaluated(loaded(module()), document=b"x" * MIB)

    with pytest.raises(RunError, match="more memory than it may have"):
        evaluated(loaded(module(), memory_max_bytes=MIB), document=b"x" * MIB)


def test_memory_beyond_two_gib_is_reached() -> None:
    assert (
        evaluated(
            loaded(
                module(
                    memory='(import "env" "memory" (memory 40000))',
                    eval="(i32.store (i32.const 0x90000000) (i32.const 0x203120)) i32.const 0x90000000",
                ),
                memory_max_bytes=4096 * MIB,
            )
        )
        == b" 1 "
    )


# From here on with what OPA builds.


@pytest.fixture(scope="session")
def policy(build_policy: BuildPolicy) -> Bundle:
    budget = "package pdp.budget\n\ndecision := data.pdp.authz.many\n\nlimits := []\n"
    return build_policy({"pdp/authz/authz.rego": AUTHZ, "pdp/budget/budget.rego": budget})


@pytest.fixture
def instance(policy: Bundle) -> Instance:
    assert policy.wasm is not None
    return loaded(policy.wasm, data=policy.data)


def results(instance: Instance, entrypoint: str, document: JsonObject, lend: Lend) -> Any:
    number = instance.entrypoints[entrypoint]
    with EPOCHS:
        text = instance.evaluate(number, json.dumps(document).encode(), ticks=500, lend=lend)
    return json.loads(text)


def first_argument(_name: str, arguments: Sequence[bytes]) -> bytes:
    return arguments[0]


def test_a_built_in_gets_its_arguments_and_gives_its_value(instance: Instance) -> None:
    assert set(instance.builtins.values()) == {"json.patch", "sprintf"}
    called: list[tuple[str, Sequence[bytes]]] = []

    def lend(name: str, arguments: Sequence[bytes]) -> bytes:
        called.append((name, arguments))
        return b'{"a": {1, 2}, "caf\xc3\xa9": [null, set()]}'

    given: JsonObject = {"value": {"k": ["caf\u00e9", 1.5, None]}}
    answer = results(instance, "pdp/authz/decision", given, lend)

    assert answer == [{"result": {"a": [1, 2], "caf\u00e9": [None, []]}}]
    [(name, arguments)] = called
    assert name == "json.patch"
    assert [json.loads(argument) for argument in arguments] == [given["value"], []]


def test_a_built_in_may_be_undefined(instance: Instance) -> None:
    assert results(instance, "pdp/authz/decision", {"value": 1}, lambda *_: None) == []


@pytest.mark.parametrize(
    "lend",
    (
        lambda *_: b"not a value",
        lambda *_: b"",
        lambda *_: b"[" * 100_000,
        lambda *_: b'"' + b"x" * (32 * MIB) + b'"',
        lambda *_: 1 / 0,
    ),
)
def test_a_built_in_that_fails_ends_the_evaluation(instance: Instance, lend: Lend) -> None:
    with pytest.raises(RunError):
        results(instance, "pdp/authz/decision", {"value": "s3cret"}, lend)
    instance.close()


def test_what_a_failed_built_in_says_stays_within(instance: Instance) -> None:
    def lend(_name: str, arguments: Sequence[bytes]) -> bytes:
        raise ValueError(arguments[0])

    with pytest.raises(RunError) as failure:
        results(instance, "pdp/authz/decision", {"value": "s3cret"}, lend)

    assert "s3cret" not in f"{failure.value!r} {failure.value.__cause__!r}"
    assert "ValueError" in str(failure.value)


def test_an_interrupt_in_a_built_in_reaches_the_caller(instance: Instance) -> None:
    def lend(_name: str, _arguments: Sequence[bytes]) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results(instance, "pdp/authz/decision", {"value": 1}, lend)


def test_a_policy_calls_no_built_in_after_one_has_failed(instance: Instance) -> None:
    calls = 0

    def lend(_name: str, _arguments: Sequence[bytes]) -> bytes:
        nonlocal calls
        calls += 1
        raise ValueError

    with pytest.raises(RunError):
        results(instance, "pdp/budget/decision", {"count": 1_000}, lend)
    assert calls == 1


def test_what_built_ins_leave_in_memory_is_gone_with_the_evaluation(instance: Instance) -> None:
    lengths = set()
    for _ in range(5):
        [answer] = results(instance, "pdp/budget/decision", {"count": 2_000}, first_argument)
        assert answer["result"] == ["%d"] * 2_000
        lengths.add(instance._memory.data_len(instance._store))
    assert len(lengths) == 1


@pytest.fixture(scope="module")
def roomy(build_policy: BuildPolicy) -> Bundle:
    """A policy whose data take some 40 MiB of memory."""
    authz = """package pdp.authz

decision := {"held": data.tenants[input.tenant], "longest": strings.reverse(input.value)}
"""
    budget = "package pdp.budget\n\ndecision := data.tenants\n\nlimits := []\n"
    bundle = build_policy({"pdp/authz/authz.rego": authz, "pdp/budget/budget.rego": budget})
    tenants = {f"tenant_{number}": [number] * 100 for number in range(10_000)}
    return replace(bundle, data=json.dumps({"tenants": tenants}).encode())


@pytest.fixture(scope="module")
def roomy_program(roomy: Bundle) -> Program:
    assert roomy.wasm is not None
    return Program.compile(roomy.wasm)


def of_one_image(program: Program, data: bytes, count: int) -> list[Instance]:
    image = Instance(program, data=data, memory_max_bytes=512 * MIB).into_image()
    return [Instance(program, data=image, memory_max_bytes=512 * MIB) for _ in range(count)]


def test_instances_of_one_image_see_its_data_and_nothing_of_each_other(
    roomy: Bundle, roomy_program: Program
) -> None:
    instances = of_one_image(roomy_program, roomy.data, 3)

    for round_ in range(3):
        for number, instance in enumerate(instances):
            # Larger than what the memory had room for: it grows, and is written all over.
            value = "abc"[number] * ((round_ + 1) * MIB // 4)
            document: JsonObject = {"tenant": f"tenant_{number}", "value": value}
            [answer] = results(instance, "pdp/authz/decision", document, first_argument)
            assert answer["result"] == {"held": [number] * 100, "longest": value}

    another = instances[0]
    with pytest.raises(DeadlineError), EPOCHS:
        another.evaluate(another.entrypoints["pdp/authz/decision"], b"{}", ticks=0)
    another.close()
    [answer] = results(
        instances[1], "pdp/authz/decision", {"tenant": "tenant_9", "value": "x"}, first_argument
    )
    assert answer["result"] == {"held": [9] * 100, "longest": "x"}


def test_instances_of_one_image_hold_the_data_once(roomy: Bundle, roomy_program: Program) -> None:
    (first,) = of_one_image(roomy_program, roomy.data, 1)
    whole = first._size
    assert whole > 32 * MIB, "small data would not show"
    before = resident_bytes()

    instances = of_one_image(roomy_program, roomy.data, 8)
    for instance in instances:
        document: JsonObject = {"tenant": "tenant_7", "value": "x"}
        [answer] = results(instance, "pdp/authz/decision", document, first_argument)
        assert answer["result"]["held"] == [7] * 100

    assert resident_bytes() - before < whole, "which is what the image takes beside them"


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_image_is_bound_by_the_memory_of_the_instance(
    roomy: Bundle, roomy_program: Program
) -> None:
    image = Instance(roomy_program, data=roomy.data, memory_max_bytes=512 * MIB).into_image()
    with pytest.raises(RunError, match="more memory"):
        Instance(roomy_program, data=image, memory_max_bytes=8 * MIB)


@pytest.mark.parametrize("knows", (True, False))
def test_an_image_is_a_file_that_nobody_can_change_or_run(
    policy: Bundle, monkeypatch: pytest.MonkeyPatch, *, knows: bool
) -> None:
    create = os.memfd_create

    def create_as_the_kernel(name: str, flags: int) -> int:
        if flags & 0x8 and not knows:
            raise OSError(errno.EINVAL, "an older Linux")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", create_as_the_kernel)
    assert policy.wasm is not None
    instance = Instance(Program.compile(policy.wasm), data=policy.data, memory_max_bytes=512 * MIB)
    image = instance.into_image()
    with pytest.raises(PermissionError):
        os.pwrite(image._file, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(image._file, 0)
    linux = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if knows and linux >= (6, 3):
        assert os.fstat(image._file).st_mode & 0o111 == 0


def test_an_image_that_nobody_needs_is_let_go_of(policy: Bundle) -> None:
    def open_images() -> int:
        found = 0
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one of the folder itself
                found += "memfd:policy" in str(descriptor.readlink())
        return found

    before = open_images()
    assert policy.wasm is not None
    (instance,) = of_one_image(Program.compile(policy.wasm), policy.data, 1)
    assert open_images() == before, "what is mapped needs no descriptor"
    assert results(instance, "pdp/authz/decision", {"value": 7}, first_argument)


def test_each_thread_gets_its_own_failure(policy: Bundle) -> None:
    assert policy.wasm is not None
    program = Program.compile(policy.wasm)
    wrong: list[str] = []

    class FirstError(Exception):
        pass

    class SecondError(Exception):
        pass

    def fail_with(error: type[Exception]) -> None:
        def lend(_name: str, _arguments: Sequence[bytes]) -> bytes:
            raise error

        for _ in range(50):
            instance = Instance(program, data=b"{}", memory_max_bytes=16 * MIB)
            try:
                results(instance, "pdp/authz/decision", {"value": 1}, lend)
            except RunError as failure:
                if error.__name__ not in str(failure):
                    wrong.append(str(failure))
            finally:
                instance.close()

    threads = [
        threading.Thread(target=fail_with, args=(error,))
        for error in (FirstError, SecondError, FirstError, SecondError)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_machine_code_does_what_its_wasm_does(policy: Bundle) -> None:
    assert policy.wasm is not None
    code = Program.compile(policy.wasm).machine_code()
    program = Program.from_machine_code(code, wasm=policy.wasm)

    instance = Instance(program, data=b"{}", memory_max_bytes=16 * MIB)

    answer = results(instance, "pdp/authz/decision", {"value": 7}, first_argument)
    assert answer == [{"result": 7}]


def test_machine_code_of_another_wasmtime_is_refused() -> None:
    with pytest.raises(ModuleError, match="something else"):
        Program.from_machine_code(b"\x7fELF of another", wasm=module())


def test_the_evaluator_refuses_a_bad_module_as_a_bundle(policy: Bundle) -> None:
    for wasm in (module(malloc=""), module(more="(start $t) (func $t unreachable)"), b""):
        with pytest.raises(BundleError, match="The policy bundle") as refusal:
            WasmEvaluator(replace(policy, wasm=wasm))
        assert refusal.value.reason_code == "policy_unavailable"
