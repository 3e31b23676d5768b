"""Policy modules of anybody's making, and what they answer (pdp.policy.wasm, pdp.policy.abi)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final
from unittest.mock import patch

import wasmtime

from pdp.canonical import JsonValue
from pdp.policy import abi
from pdp.policy.abi import MAX_RESULT_BYTES
from pdp.policy.bundle import Bundle
from pdp.policy.engine import REQUIRED_ENTRYPOINTS, BundleError, PolicyError
from pdp.policy.tools import parse_visible_tools
from pdp.policy.verdict import parse_budget_verdict, parse_limits, parse_verdict
from pdp.policy.wasm import WasmEvaluator
from tests.fuzz.choices import ODD_VALUES, Choices, edited, edited_bytes
from tests.fuzz.contract import SECRET, refuses

DEADLINE_MS: Final = 50
MEMORY_MIB: Final = 16
LIMIT: Final[JsonValue] = {
    "id": "daily", "budget": "llm", "unit": "calls", "window": "day", "limit": 10, "scope": "tenant",
    "warn_at": [50, 80],
}  # fmt: skip
ANSWERS: Final[Sequence[tuple[Callable[[JsonValue], object], JsonValue]]] = [
    (
        parse_verdict,
        {
            "allow": True, "reason_code": "ok", "scopes": ["orders:read"],
            "permit": {"binds": ["tool", "arguments"], "ttl_seconds": 30, "max_uses": 1},
            "charge": [{"budget": "llm", "unit": "calls", "amount": 1}],
        },
    ),
    (parse_budget_verdict, {"allow": True, "reason_code": "ok"}),
    (parse_limits, [LIMIT]),
    (parse_visible_tools, [{"name": "orders.read", "callable": True, "reason_code": "ok"}]),
]  # fmt: skip
"""Who reads what a rule says, and what it says where nothing else was chosen."""
NUMBERS: Final[JsonValue] = {name: number for number, name in enumerate(REQUIRED_ENTRYPOINTS)}
TEXT_AT: Final = 1024
"""Where the result set begins."""
ROOM_AT: Final = 16_384
"""Where the module says that a text may be written."""
FUNCTIONS: Final[Mapping[str, tuple[int, int]]] = {
    "builtins": (0, 64),
    "entrypoints": (0, 256),
    "opa_eval": (7, TEXT_AT),
    "opa_free": (1, -1),
    "opa_heap_ptr_get": (0, ROOM_AT),
    "opa_json_dump": (1, 0),
    "opa_malloc": (1, ROOM_AT),
    "opa_value_dump": (1, 0),
    "opa_value_parse": (2, 1),
}
"""What OPA's modules export: how many i32 go in, and what comes out; 0: the first that went
in, -1: nothing.
"""
BODIES: Final = (
    "unreachable",
    "i32.const -1",
    "i32.const 0x7fffffff",
    "i32.const 131071",
    "(loop $again br $again) unreachable",
    "(drop (memory.grow (i32.const 65535))) i32.const 0",
    "(drop (memory.grow (i32.const 1))) i32.const 1024",
    "(call $abort (i32.const 1024)) i32.const 1024",
    "(call $abort (i32.const -1)) i32.const 1024",
    "(call $println (i32.const 1024)) i32.const 1024",
    "(call $builtin0 (i32.const 0) (i32.const 0))",
    "(call $builtin0 (i32.const 77) (i32.const 0))",
    "(call $builtin2 (i32.const 1) (i32.const 0) (i32.const 1024) (i32.const -9))",
    "(i32.store (i32.const 131072) (i32.const 1)) i32.const 0",
    "(memory.fill (i32.const 1) (i32.const 120) (i32.const 131071)) i32.const 1",
    "(memory.fill (i32.const 1024) (i32.const 91) (i32.const 15000)) i32.const 1024",
    "(i32.div_s (i32.const 1) (i32.const 0))",
    "(call $deep)",
    "(call_indirect (result i32) (i32.const 5))",
)
"""What a module may do in place of what is expected."""


def samples() -> Iterable[bytes]:
    for number in range(len(ANSWERS)):
        yield bytes([number])


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    read, answer = choices.pick(ANSWERS)
    wasm = _module(_said(answer, choices), choices)
    if choices.number(4) == 1:
        wasm = edited_bytes(wasm, choices)
    bundle = Bundle(revision="r-1", data=b"{}", wasm=wasm)
    with patch.object(abi, "LOAD_SECONDS", DEADLINE_MS / 1000):
        evaluator = refuses(
            lambda: WasmEvaluator(bundle, deadline_ms=DEADLINE_MS, memory_max_mib=MEMORY_MIB),
            BundleError,
        )
    if evaluator is None:
        return False
    with evaluator:
        taken = False
        for _ in range(2):  # and again: a failure leaves nothing behind
            value = refuses(lambda: _asked(evaluator), PolicyError)
            if value is None:
                continue
            assert len(json.dumps(value, ensure_ascii=False)) <= 2 * MAX_RESULT_BYTES
            taken = refuses(lambda said=value: (read(said),), PolicyError) is not None  # type: ignore[misc]
        return taken


def _asked(evaluator: WasmEvaluator) -> JsonValue:
    return evaluator.evaluate(REQUIRED_ENTRYPOINTS[0], {"argument": SECRET})


def _said(answer: JsonValue, choices: Choices) -> bytes:
    """A result set."""
    results: JsonValue = [{"result": answer}]
    match choices.number(5):
        case 1:
            results = [{"result": edited(answer, choices)}]
        case 2:
            results = edited(results, choices)
        case 3:
            return edited_bytes(json.dumps(results).encode(), choices)
        case 4:
            results = choices.pick(ODD_VALUES)
        case _:
            pass
    return json.dumps(results).encode("utf-8", "surrogatepass")[: ROOM_AT - TEXT_AT]


def _module(said: bytes, choices: Choices) -> bytes:
    builtins, entrypoints = edited_json({"time.now_ns": 0}, choices), edited_json(NUMBERS, choices)
    parts = [
        '(module (import "env" "memory" (memory 2))',
        *(_import(name, takes, gives) for name, takes, gives in _IMPORTS),
        f'(global (export "opa_wasm_abi_version") i32 (i32.const {1 + (choices.number(8) == 1)}))',
        '(global (export "opa_wasm_abi_minor_version") i32 (i32.const 3))',
        "(table 10 funcref) (elem (i32.const 1) $deep)",
        "(func $deep (result i32) (i32.add (call $deep) (i32.const 1)))",
    ]
    odd = choices.number(3 * len(FUNCTIONS))
    for number, (name, (takes, gives)) in enumerate(FUNCTIONS.items()):
        body = _usual(gives)
        if number == odd - 1:
            body = choices.pick(BODIES)
            body = f"(drop {body})" if gives < 0 and body.startswith("(call $d") else body
        result = "" if gives < 0 else "(result i32)"
        params = f"(param {'i32 ' * takes})" if takes else ""
        parts.append(f'(func (export "{name}") {params} {result} {body})')
    for at, text in ((64, builtins), (256, entrypoints), (TEXT_AT, said)):
        parts.append(f'(data (i32.const {at}) "{_escaped(text + bytes(1))}")')
    if choices.number(16) == 1:
        parts.append("(func $start (drop (call $deep))) (start $start)")
    try:
        return bytes(wasmtime.wat2wasm("\n".join([*parts, ")"])))
    except wasmtime.WasmtimeError:
        return b"\0asm\1\0\0\0"  # a body that does not fit where it was to stand


def edited_json(value: JsonValue, choices: Choices) -> bytes:
    """Its text; changed, one time in eight."""
    changed = edited(value, choices) if choices.number(8) == 1 else value
    return json.dumps(changed).encode("utf-8", "surrogatepass")[:180]


_IMPORTS: Final[Sequence[tuple[str, int, int]]] = (
    ("abort", 1, 0),
    ("println", 1, 0),
    ("builtin0", 2, 1),
    ("builtin2", 4, 1),
)


def _import(name: str, takes: int, gives: int) -> str:
    result = "(result i32)" if gives else ""
    return f'(import "env" "opa_{name}" (func ${name} (param {"i32 " * takes}) {result}))'


def _usual(gives: int) -> str:
    return {0: "local.get 0", -1: ""}.get(gives, f"i32.const {gives}")


def _escaped(content: bytes) -> str:
    return "".join(f"\\{byte:02x}" for byte in content)
