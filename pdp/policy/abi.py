"""OPA's Wasm ABI, 1.2 and later: one policy module in a memory of its own.

https://www.openpolicyagent.org/docs/wasm says what the exports and imports do.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import wasmtime

# wasmtime's public call looks up types and wraps values at each call, and keeps what a
# host function raised in one global for all threads: 100 us an evaluation, where C's takes 36.
from wasmtime import _ffi as c

from pdp.policy.epochs import TICK_SECONDS, Epochs

LOAD_SECONDS: Final = 60.0
"""Longest time that a module may take to start and to read its data."""
MAX_RESULT_BYTES: Final = 1024 * 1024
MAX_BUILTIN_BYTES: Final = 16 * 1024 * 1024
"""Largest argument or result of a built-in that the host lends."""
MAX_TABLE_ELEMENTS: Final = 1_000_000
_PAGE_BYTES: Final = 64 * 1024
_STACK_BYTES: Final = 512 * 1024
"""Half of what the smallest stack of a thread has room for."""
_FIRST_READ_BYTES: Final = 1024

_IMPORTS: Final[Mapping[str, tuple[int, int]]] = {
    "opa_abort": (1, 0),
    "opa_println": (1, 0),
    **{f"opa_builtin{count}": (count + 2, 1) for count in range(5)},
}
"""What a module may import from env besides its memory: how many i32 go in and out."""
_EXPORTS: Final[Mapping[str, tuple[int, int]]] = {
    "builtins": (0, 1),
    "entrypoints": (0, 1),
    "opa_eval": (7, 1),
    "opa_free": (1, 0),
    "opa_heap_ptr_get": (0, 1),
    "opa_json_dump": (1, 1),
    "opa_malloc": (1, 1),
    "opa_value_dump": (1, 1),
    "opa_value_parse": (2, 1),
}

_ABI_MAJOR: Final = 1
_ABI_MINOR_LEAST: Final = 2
"""The first that has opa_eval."""

_NO_MEMORY: Final = b"opa_malloc: failed"
"""What a module says when its memory may grow no more."""
_STARVED: Final = "it needs more memory than it may have"

Lend = Callable[[str, Sequence[bytes]], bytes | None]
"""Calls a built-in by its name. Arguments and result are values in OPA's text form;
None is undefined. What it raises ends the evaluation.
"""


class ModuleError(Exception):
    """A module can not be used. The text follows "The policy bundle"."""


class RunError(Exception):
    """A module failed while it ran, and can be used no more. The text quotes nothing
    that the policy or its input hold.
    """


class DeadlineError(RunError):
    """It ran past its deadline."""


def _config() -> wasmtime.Config:
    config = wasmtime.Config()
    config.epoch_interruption = True
    # The first module is what the start waits for. Later ones are compiled in a process
    # of their own, which keeps to one core.
    config.parallel_compilation = True
    config.max_wasm_stack = _STACK_BYTES
    # So that an address in memory stays what it is: what a memory may grow to is reserved.
    config.memory_reservation = 4 * 1024**3
    config.memory_may_move = False
    # OPA needs none of these; some would bring memory that no limit counts.
    config.wasm_threads = False
    config.wasm_memory64 = False
    config.wasm_multi_memory = False
    config.wasm_gc = False
    config.wasm_function_references = False
    config.wasm_exceptions = False
    return config


ENGINE: Final = wasmtime.Engine(_config())
"""One for the process: what is compiled for it can be shared."""
# It is never let go of: at exit wasmtime-py may be gone before it.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(ENGINE))
EPOCHS: Final = Epochs(ENGINE.increment_epoch)
_HOST_FUNCTIONS: Final = threading.Lock()
"""wasmtime-py keeps those of all threads in one list, which it does not guard."""


def deadline_ticks(seconds: float) -> int:
    """A deadline as the engine counts it. The first tick may come at once, so there is
    one more: none is cut early.
    """
    return math.ceil(seconds / TICK_SECONDS) + 1


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Program:
    """A policy module as machine code, which any number of instances share."""

    module: wasmtime.Module = field(repr=False)
    wasm_length: int
    """Bytes of the Wasm that it was compiled from."""

    @classmethod
    def compile(cls, wasm: bytes) -> Self:
        """Takes up to seconds. Raises ModuleError for what is no Wasm."""
        try:
            return cls(wasmtime.Module(ENGINE, wasm), len(wasm))
        except wasmtime.WasmtimeError as error:
            raise ModuleError(f"has a policy.wasm that is no Wasm: {error}") from None

    @classmethod
    def from_machine_code(cls, code: bytes, *, wasm: bytes) -> Self:
        """What :meth:`machine_code` gave, for the same Wasm. The code is run as it is,
        outside of any sandbox: it must come from this product's own hands.

        Raises ModuleError for code of another wasmtime or processor.
        """
        try:
            return cls(wasmtime.Module.deserialize(ENGINE, code), len(wasm))
        except wasmtime.WasmtimeError as error:
            raise ModuleError(f"was compiled for something else: {error}") from None

    def machine_code(self) -> bytes:
        """The program in a form that another process of the same product can take up."""
        return bytes(self.module.serialize())


class Instance:
    """A program, its memory and its data. For one thread at a time.

    After a RunError its memory is in any state: close it and make another.
    """

    def __init__(self, program: Program, *, data: bytes | Image, memory_max_bytes: int) -> None:
        """``data`` is text, or the memory of an instance of the same program that has
        read it.

        Raises ModuleError for a module that OPA has not built, RunError when
        starting it or reading the data takes more memory or time than it may.
        """
        _check_exports(program.module)
        self._lend: Lend = _lend_nothing
        self._fault: BaseException | None = None
        self._functions: dict[str, _Function] = {}
        self._size = 0
        self._store = wasmtime.Store(ENGINE)
        try:
            self._store.set_limits(
                memory_size=memory_max_bytes,
                table_elements=MAX_TABLE_ELEMENTS,
                instances=1,
                tables=1,
                memories=1,
            )
            with EPOCHS:
                self._store.set_epoch_deadline(deadline_ticks(LOAD_SECONDS))
                self._start(program)
                self.entrypoints = self._table("entrypoints")
                """The number of each entrypoint."""
                self.builtins = {number: name for name, number in self._table("builtins").items()}
                """The built-ins that the module asks the host for, by number."""
                if isinstance(data, Image):
                    self._grow_to(data.size)
                    data.lay_over(self._base)
                    self._data, self._heap = data.address, data.heap
                else:
                    self._data = self._parse(data)
                    self._heap = self._call("opa_heap_ptr_get")
        except BaseException:
            self.close()
            raise

    def evaluate(
        self, entrypoint: int, document: bytes, *, ticks: int, lend: Lend | None = None
    ) -> bytes:
        """The result set of an entrypoint for ``input = document``: JSON text.

        ``ticks`` is the deadline, which EPOCHS must be counting. Raises RunError.
        """
        self._lend = lend or _lend_nothing
        # Above the data; what the last evaluation left there is of no use to anybody.
        self._write(self._heap, document)
        end = self._heap + len(document)
        self._store.set_epoch_deadline(ticks)
        address = self._call(
            "opa_eval", 0, entrypoint, self._data, self._heap, len(document), end + -end % 8, 0
        )
        return self._text(address, MAX_RESULT_BYTES)

    def close(self) -> None:
        """Let go of the memory."""
        with _HOST_FUNCTIONS:
            self._store.close()

    def into_image(self) -> Image:
        """Its memory as it is before the first evaluation, for other instances; this one
        is closed. Raises RunError.
        """
        try:
            self._size = self._memory.data_len(self._store)
            return Image(self._base, self._size, address=self._data, heap=self._heap)
        finally:
            self.close()

    def _start(self, program: Program) -> None:
        imports = [self._imported(wanted, program.wasm_length) for wanted in program.module.imports]
        if not self._size:
            raise _not_opas("it imports no memory")
        try:
            instance = wasmtime.Instance(self._store, program.module, imports)
        except wasmtime.Trap as trap:
            raise _run_error(trap) from None
        except wasmtime.WasmtimeError as error:
            raise ModuleError(f"has a policy.wasm that can not be started: {error}") from None
        exports = instance.exports(self._store)
        for name in _EXPORTS:
            function = exports[name]
            assert isinstance(function, wasmtime.Func)  # noqa: S101 - checked before
            self._functions[name] = _Function(self._store, function)
        version = []
        for name in ("opa_wasm_abi_version", "opa_wasm_abi_minor_version"):
            number = exports[name]
            assert isinstance(number, wasmtime.Global)  # noqa: S101 - same
            version.append(number.value(self._store))
        major, minor = version
        if major != _ABI_MAJOR or minor < _ABI_MINOR_LEAST:
            raise ModuleError(
                f"has a policy.wasm of ABI {major}.{minor}, where {_ABI_MAJOR}.{_ABI_MINOR_LEAST}"
                " or later is needed: build it with a current OPA"
            )

    def _imported(
        self, wanted: wasmtime.ImportType, wasm_length: int
    ) -> wasmtime.Func | wasmtime.Memory:
        name, kind = wanted.name or "", wanted.type
        if wanted.module == "env" and name == "memory" and isinstance(kind, wasmtime.MemoryType):
            return self._new_memory(kind.limits, wasm_length)
        if (
            wanted.module != "env"
            or not isinstance(kind, wasmtime.FuncType)
            or _shape(kind) != _IMPORTS.get(name)
        ):
            raise _not_opas(f"it imports {wanted.module}.{name}")
        call = {"opa_abort": self._abort, "opa_println": _ignore}.get(name, self._call_builtin)
        with _HOST_FUNCTIONS:
            return wasmtime.Func(self._store, kind, call)

    def _new_memory(self, limits: wasmtime.Limits, wasm_length: int) -> wasmtime.Memory:
        # A module says how much OPA's own code needs. Its constants come on top, and are
        # no longer than the module.
        pages = limits.min + math.ceil(wasm_length / _PAGE_BYTES)
        try:
            kind = wasmtime.MemoryType(wasmtime.Limits(pages, limits.max))
            self._memory = wasmtime.Memory(self._store, kind)
        except wasmtime.WasmtimeError:
            raise RunError(_STARVED) from None
        self._size = self._memory.data_len(self._store)
        self._base = ctypes.addressof(self._memory.data_ptr(self._store).contents)
        return self._memory

    def _table(self, name: str) -> dict[str, int]:
        text = self._text(self._call("opa_json_dump", self._call(name)), MAX_BUILTIN_BYTES)
        try:
            return {str(key): int(number) for key, number in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise _not_opas(f"its {name} can not be read") from None

    # What the module calls. These raise nothing: wasmtime-py keeps what they raise in one
    # place for all threads, and another thread may be the one that finds it there.

    def _abort(self, message: int) -> None:
        # Any other message may quote what the policy was asked.
        try:
            starved = self._text(message, len(_NO_MEMORY)) == _NO_MEMORY
        except RunError:
            starved = False
        self._end(RunError(_STARVED if starved else "it gave up"))

    def _call_builtin(self, number: int, _context: int, *arguments: int) -> int:
        try:
            texts = []
            for argument in arguments:
                address = self._call("opa_value_dump", argument)
                texts.append(self._text(address, MAX_BUILTIN_BYTES))
                self._call("opa_free", address)
            value = self._lend(self.builtins[number], texts)
            return 0 if value is None else self._parse(value)
        except RunError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001 - whatever it is ends the evaluation
            self._end(RunError(f"a built-in failed: {type(error).__name__}"))
        except BaseException as error:  # noqa: BLE001 - Ctrl-C; raised when the module has ended
            self._end(error)
        return 0

    def _end(self, fault: BaseException) -> None:
        """Let the evaluation fail, and the module be cut at its next step."""
        self._fault = self._fault or fault
        self._store.set_epoch_deadline(0)

    # What the host calls.

    def _call(self, name: str, *arguments: int) -> int:
        try:
            result = self._functions[name](*arguments)
        except wasmtime.Trap as trap:
            if self._fault is None:
                raise _run_error(trap) from None
        if self._fault is not None:
            raise self._fault
        return result

    def _parse(self, text: bytes) -> int:
        """The address of the value that a text stands for."""
        address = self._call("opa_malloc", len(text))
        self._write(address, text)
        value = self._call("opa_value_parse", address, len(text))
        if not value:
            raise RunError("a value could not be read")
        self._call("opa_free", address)
        return value

    def _write(self, address: int, text: bytes) -> None:
        end = address + len(text)
        if end > self._size:
            self._grow_to(end)
        ctypes.memmove(self._base + address, text, len(text))

    def _grow_to(self, end: int) -> None:
        # The module may have done it already.
        self._size = self._memory.data_len(self._store)
        if end > self._size:
            try:
                self._memory.grow(self._store, math.ceil((end - self._size) / _PAGE_BYTES))
            except wasmtime.WasmtimeError:
                raise RunError(_STARVED) from None
            self._size = self._memory.data_len(self._store)

    def _text(self, address: int, max_bytes: int) -> bytes:
        """What stands from an address up to a zero byte."""
        address &= 0xFFFF_FFFF  # host functions are given it signed
        self._size = self._memory.data_len(self._store)
        most = min(max_bytes + 1, self._size - address)
        length = min(_FIRST_READ_BYTES, most)
        while length > 0:
            text = ctypes.string_at(self._base + address, length)
            end = text.find(0)
            if end >= 0:
                return text[:end]
            if length == most:
                break
            length = min(length * 16, most)
        raise RunError("a value is longer than it may be")


class Image:
    """The memory of a program that has read its data: once for all instances that are made
    of it. Each has pages of its own only where it writes, which the others do not see.

    Data of 10,000 tenants take ten times as much here as in their text, and seconds to read.
    """

    def __init__(self, base: int, size: int, *, address: int, heap: int) -> None:
        """The bytes at ``base``, which are given back as they are copied. Raises RunError."""
        self.size = size
        self.address = address
        """Where the data stand."""
        self.heap = heap
        """Where what is above them begins."""
        try:
            self._file = _memory_file()
            weakref.finalize(self, os.close, self._file)
            for start in range(0, size, _COPIED_BYTES):
                length = min(_COPIED_BYTES, size - start)
                if os.write(self._file, ctypes.string_at(base + start, length)) != length:
                    raise RunError(_STARVED)
                _madvise(base + start, length, mmap.MADV_DONTNEED)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            raise RunError(_STARVED) from None

    def lay_over(self, base: int) -> None:
        """Let the memory at ``base`` begin with these bytes. Raises RunError."""
        kind = mmap.MAP_PRIVATE | _MAP_FIXED
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if _mmap(base, self.size, access, kind, self._file, 0) != base:
            raise RunError(_STARVED)


def _memory_file() -> int:
    """A file that lies in memory, and is no program to a machine that asks for that
    (vm.memfd_noexec). Raises OSError.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("policy", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("policy", flags)


_MFD_NOEXEC_SEAL: Final = 0x8
"""Of Linux 6.3 and later; Python does not name it."""
_COPIED_BYTES: Final = 16 * _PAGE_BYTES
"""At a time: what is there twice meanwhile."""
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAP_FIXED: Final = 0x10
"""Python's mmap chooses where; here wasmtime has."""
_C: Final = ctypes.CDLL(None)
_mmap: Final = _C.mmap
_mmap.restype = ctypes.c_size_t
_mmap.argtypes = (
    ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip
_madvise: Final = _C.madvise
_madvise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)


class _Function:
    """An exported function that takes i32 and returns at most one."""

    def __init__(self, store: wasmtime.Store, function: wasmtime.Func) -> None:
        self._context = store._context()  # noqa: SLF001 - see the import of _ffi
        self._function = function._func  # noqa: SLF001 - same
        kind = function.type(store)
        self._arguments = (c.wasmtime_val_t * len(kind.params))()
        for argument in self._arguments:
            argument.kind = c.WASMTIME_I32
        self._results = (c.wasmtime_val_t * len(kind.results))()

    def __call__(self, *arguments: int) -> int:
        """What it returns, unsigned; 0 for nothing. Raises wasmtime.Trap."""
        for slot, argument in zip(self._arguments, arguments, strict=True):
            slot.of.i32 = argument
        trap = ctypes.POINTER(c.wasm_trap_t)()
        error = c.wasmtime_func_call(
            self._context,
            ctypes.byref(self._function),
            self._arguments,
            len(self._arguments),
            self._results,
            len(self._results),
            ctypes.byref(trap),
        )
        if error:  # type: ignore[truthy-bool]  # no null pointer
            raise wasmtime.WasmtimeError._from_ptr(error)  # noqa: SLF001 - same
        if trap:  # type: ignore[truthy-bool]  # same
            raise wasmtime.Trap._from_ptr(trap)  # noqa: SLF001 - same
        return self._results[0].of.i32 & 0xFFFF_FFFF if self._results else 0


def _check_exports(module: wasmtime.Module) -> None:
    exports = {export.name: export.type for export in module.exports}
    for name, shape in _EXPORTS.items():
        kind = exports.get(name)
        if not isinstance(kind, wasmtime.FuncType) or _shape(kind) != shape:
            raise _not_opas(f"it exports no {name}, or another one")
    for name in ("opa_wasm_abi_version", "opa_wasm_abi_minor_version"):
        if not isinstance(exports.get(name), wasmtime.GlobalType):
            raise _not_opas(f"it exports no {name}")


def _shape(kind: wasmtime.FuncType) -> tuple[int, int] | None:
    """How many i32 go in and out; None where there are other types."""
    params, results = kind.params, kind.results
    only_i32 = all(str(one) == "i32" for one in [*params, *results])
    return (len(params), len(results)) if only_i32 else None


def _run_error(trap: wasmtime.Trap) -> RunError:
    if trap.trap_code is wasmtime.TrapCode.INTERRUPT:
        return DeadlineError("it ran past its deadline")
    code = trap.trap_code.name if trap.trap_code else "unknown"
    return RunError(f"it trapped: {code}")


def _not_opas(why: str) -> ModuleError:
    return ModuleError(f"has a policy.wasm that OPA has not built for Wasm: {why}")


def _lend_nothing(_name: str, _arguments: Sequence[bytes]) -> bytes | None:
    raise RunError("it called a built-in that it does not have")


def _ignore(_message: int) -> None:
    """What a policy prints may quote its input."""
