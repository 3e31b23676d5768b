"""sprintf, with the verbs and the flags of Go's fmt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Final

from pdp.policy.builtins.faults import BuiltinError, UndefinedError, too_large
from pdp.policy.builtins.operands import array, int64, string
from pdp.policy.builtins.quoting import quote, quote_rune
from pdp.policy.builtins.values import MAX_RESULT_BYTES, Number, Object, Value, in_order

_MAX_PARSED: Final = 1_000_000
"""Go reads no more digits of a width or a precision when it is larger."""
_MAX_SIGNIFICANT_DIGITS: Final = 800
"""A double has no more than 767."""
MAX_ARGUMENTS: Final = 10_000
_MAX_VERBS: Final = 10_000
"""Some 30 ms."""
_SMALL_EXPONENTS: Final = (-4, 6)
"""Of numbers that need no power of ten when they are written the shortest way."""
_FLAGS: Final = "#0+- "
_MAX_RUNE: Final = 0x10FFFF
_REPLACEMENT: Final = 0xFFFD
_BASES: Final[Mapping[str, str]] = {
    "d": "d",
    "v": "d",
    "b": "b",
    "o": "o",
    "O": "o",
    "x": "x",
    "X": "X",
}


def sprintf(layout: Value, values: Value) -> Value:
    """The built-in of that name."""
    given = array(values)
    if len(given) > MAX_ARGUMENTS:
        raise too_large("the number of values")
    return _Printer(string(layout), [_argument(value) for value in given]).text()


_Argument = str | int | float | Decimal
"""What Go is given. A Decimal is an integer beyond an int64: to Go a ``*big.Int``."""


def _argument(value: Value) -> _Argument:
    match value:
        case str():
            return value
        case Number():
            return _number(value)
        case _:
            return go_text(value)


def _number(value: Number) -> _Argument:
    if re.search("[.eE]", value.text):
        as_float = float(value.value)
        return value.text if abs(as_float) == float("inf") else as_float
    try:
        return int64(value)
    except UndefinedError:
        value.integer()
        return value.value


def go_text(value: Value) -> str:
    """The text of a value as OPA writes it in messages."""
    parts: list[str] = []
    _write(value, parts)
    return "".join(parts)


def _write(value: Value, parts: list[str]) -> None:
    match value:
        case None:
            parts.append("null")
        case bool():
            parts.append("true" if value else "false")
        case Number():
            parts.append(value.text)
        case str():
            parts.append(quote(value))
        case Object():
            _write_items("{", [(key, value[key]) for key in in_order(value)], "}", parts)
        case tuple():
            _write_items("[", [(item,) for item in value], "]", parts)
        case frozenset():
            opening, closing = ("{", "}") if value else ("set(", ")")
            _write_items(opening, [(item,) for item in in_order(value)], closing, parts)


def _write_items(
    opening: str, items: list[tuple[Value, ...]], closing: str, parts: list[str]
) -> None:
    parts.append(opening)
    for index, item in enumerate(items):
        if index:
            parts.append(", ")
        for position, part in enumerate(item):
            if position:
                parts.append(": ")
            _write(part, parts)
    parts.append(closing)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How one value is to be written."""

    flags: frozenset[str] = frozenset()
    width: int | None = None
    precision: int | None = None
    go_syntax: bool = False
    """%#v."""
    with_names: bool = False
    """%+v."""

    def has(self, flag: str) -> bool:
        """Whether a flag is set."""
        return flag in self.flags

    def pad(self, text: str, *, zeros: bool = True) -> str:
        """A text, as wide as asked."""
        width = self.width or 0
        if self.has("-"):
            return text.ljust(width)
        return text.rjust(width, "0" if zeros and self.has("0") else " ")


class _Printer:
    """Goes through one format, as Go's doPrintf does."""

    def __init__(self, layout: str, arguments: list[_Argument]) -> None:
        self._layout = layout
        self._arguments = arguments
        self._at = 0
        self._next = 0
        self._is_reordered = False
        self._is_index_good = True
        self._after_index = False
        self._last_bracket = layout.rfind("]")
        self._parts: list[str] = []
        self._length = 0
        self._verbs = 0

    def text(self) -> str:
        """All of it. Raises BuiltinError where it is too long."""
        end = len(self._layout)
        while self._at < end:
            percent = self._layout.find("%", self._at)
            literal = self._layout[self._at : percent if percent >= 0 else end]
            self._add(literal)
            self._at += len(literal)
            if self._at < end:
                self._at += 1
                self._verb()
        if not self._is_reordered and self._next < len(self._arguments):
            extra = (f"{_type(one)}={_plain(one)}" for one in self._arguments[self._next :])
            self._add(f"%!(EXTRA {', '.join(extra)})")
        return "".join(self._parts)

    def _add(self, text: str) -> None:
        self._length += len(text)
        if self._length > MAX_RESULT_BYTES:
            raise too_large("a string")
        self._parts.append(text)

    def _peek(self) -> str:
        return self._layout[self._at : self._at + 1]

    def _verb(self) -> None:
        self._verbs += 1
        if self._verbs > _MAX_VERBS:
            raise too_large("a format")
        self._is_index_good = True
        self._after_index = False
        form = self._form()
        if not (verb := self._peek()):
            self._add("%!(NOVERB)")
            return
        self._at += 1
        if verb == "%":
            self._add("%")
        elif not self._is_index_good:
            self._add(f"%!{verb}(BADINDEX)")
        elif self._next >= len(self._arguments):
            self._add(f"%!{verb}(MISSING)")
        else:
            if verb in "vw":
                form = replace(
                    form,
                    flags=form.flags - {"#", "+"},
                    go_syntax=form.has("#"),
                    with_names=form.has("+"),
                )
            self._add(_written(self._arguments[self._next], verb, form))
            self._next += 1

    def _form(self) -> _Form:
        start = self._at
        while self._peek() and self._peek() in _FLAGS:
            self._at += 1
        flags = frozenset(self._layout[start : self._at])
        self._index()
        width, flags = self._width(flags)
        precision = self._precision()
        if not self._after_index:
            self._index()
        return _Form(flags=flags, width=width, precision=precision)

    def _width(self, flags: frozenset[str]) -> tuple[int | None, frozenset[str]]:
        if self._peek() == "*":
            self._at += 1
            width = self._from_argument()
            if width is None:
                self._add("%!(BADWIDTH)")
            elif width < 0:
                width, flags = -width, (flags | {"-"}) - {"0"}
            self._after_index = False
            return width, flags
        width = self._digits()
        if self._after_index and width is not None:
            self._is_index_good = False
        return width, flags

    def _precision(self) -> int | None:
        # A point that is the last character is a verb.
        if self._peek() != "." or self._at + 1 >= len(self._layout):
            return None
        self._at += 1
        if self._after_index:
            self._is_index_good = False
        self._index()
        if self._peek() != "*":
            return self._digits() or 0
        self._at += 1
        precision = self._from_argument()
        if precision is None or precision < 0:
            self._add("%!(BADPREC)")
            precision = None
        self._after_index = False
        return precision

    def _digits(self) -> int | None:
        """The number that stands here. Past a giant one nothing is read any more."""
        value: int | None = None
        while (digit := self._peek()) and digit in "0123456789":
            if value is not None and value > _MAX_PARSED:
                self._at = len(self._layout)
                return None
            value = (value or 0) * 10 + int(digit)
            self._at += 1
        return value

    def _from_argument(self) -> int | None:
        """The width or precision that is the next argument."""
        if self._next >= len(self._arguments):
            return None
        value = self._arguments[self._next]
        self._next += 1
        return value if isinstance(value, int) and abs(value) <= _MAX_PARSED else None

    def _index(self) -> None:
        """``[n]``: the argument that comes next."""
        self._after_index = False
        if self._peek() != "[":
            return
        self._is_reordered = True
        start = self._at
        if self._last_bracket < start or len(self._layout) - start < len("[n]"):
            self._at += 1
            self._is_index_good = False
            return
        end = self._layout.index("]", start)
        self._at = end + 1
        digits = self._layout[start + 1 : end]
        if not re.fullmatch("[0-9]+", digits) or len(digits.lstrip("0")) > len("10000009"):
            self._is_index_good = False
            return
        self._after_index = True
        if 0 < int(digits.lstrip("0") or "0") <= len(self._arguments):
            self._next = int(digits.lstrip("0")) - 1
        else:
            self._is_index_good = False


def _written(value: _Argument, verb: str, form: _Form) -> str:
    if verb == "T":
        return form.pad(_cut(_type(value), form))
    match value:
        case Decimal():
            return _written_big(int(value), verb, form)
        case str():
            text = _written_string(value, verb, form)
        case int():
            text = _written_integer(value, verb, form)
        case float():
            text = _written_float(value, verb, form)
    if text is None:
        return f"%!{verb}({_type(value)}={_written(value, 'v', form)})"
    return text


def _type(value: _Argument) -> str:
    match value:
        case str():
            return "string"
        case int():
            return "int64"
        case float():
            return "float64"
        case Decimal():
            return "*big.Int"


def _plain(value: _Argument) -> str:
    return _written(value, "v", _Form())


def _cut(text: str, form: _Form) -> str:
    return text if form.precision is None else text[: form.precision]


def _written_string(value: str, verb: str, form: _Form) -> str | None:
    if verb == "s" or (verb == "v" and not form.go_syntax):
        return form.pad(_cut(value, form))
    if verb in "qv":
        text = _cut(value, form)
        if form.has("#") and "`" not in text and not _NO_RAW.search(text):
            return form.pad(f"`{text}`")
        return form.pad(quote(text, ascii_only=form.has("+")))
    if verb in "xX":
        return _hex_of_string(value, verb, form)
    return None


_NO_RAW: Final = re.compile("[\x00-\x08\x0a-\x1f\x7f\ufeff]")


def _hex_of_string(value: str, verb: str, form: _Form) -> str:
    content = _cut(value, form).encode()
    if form.precision is not None:
        content = content[: form.precision]
    prefix = f"0{verb}" if form.has("#") and content else ""
    between = f" {prefix}" if form.has(" ") else ""
    digits = content.hex()
    if between:
        digits = between.join(re.findall("..", digits))
    return form.pad(prefix + (digits.upper() if verb == "X" else digits))


def _sign(*, negative: bool, form: _Form) -> str:
    if negative:
        return "-"
    return "+" if form.has("+") else " " if form.has(" ") else ""


def _written_integer(value: int, verb: str, form: _Form) -> str | None:
    if verb in "cqU":
        return _written_rune(value, verb, form)
    base = _BASES.get(verb)
    if base is None:
        return None
    sign = _sign(negative=value < 0, form=form)
    least = 0
    if form.precision is not None:
        least = form.precision
        if least == value == 0:
            return " " * (form.width or 0)
    elif form.has("0") and not form.has("-") and form.width:
        least = form.width - len(sign)
    digits = f"{abs(value):{base}}".rjust(least, "0")
    if form.has("#"):
        if base == "o":
            digits = digits if digits[0] == "0" else f"0{digits}"
        elif base != "d":
            digits = f"0{base}{digits}"
    if verb == "O":
        digits = f"0o{digits}"
    return form.pad(sign + digits, zeros=False)


def _written_rune(value: int, verb: str, form: _Form) -> str:
    unsigned = value % 2**64
    if verb == "U":
        text = f"U+{unsigned:0{max(4, form.precision or 0)}X}"
        if form.has("#") and unsigned <= _MAX_RUNE and chr(unsigned).isprintable():
            text += f" '{chr(unsigned)}'"
        return form.pad(text, zeros=False)
    is_rune = unsigned <= _MAX_RUNE and not 0xD800 <= unsigned <= 0xDFFF  # noqa: PLR2004
    rune = chr(unsigned if is_rune else _REPLACEMENT)
    return form.pad(rune if verb == "c" else quote_rune(rune, ascii_only=form.has("+")))


def _written_big(value: int, verb: str, form: _Form) -> str:
    if verb in "pw":
        raise BuiltinError(f"sprintf does not write a large number with %{verb}")
    base = "d" if verb == "s" else _BASES.get(verb)
    if base is None:
        return f"%!{verb}(big.Int={value})"
    plus = form.has("+") or form.with_names
    sign = "-" if value < 0 else "+" if plus else " " if form.has(" ") else ""
    prefix = "0o" if verb == "O" else ""
    if form.has("#") and verb in "boxX":
        prefix = "0" if verb == "o" else f"0{verb}"
    digits = f"{abs(value):{base}}".rjust(form.precision or 0, "0")
    missing = (form.width or 0) - len(sign + prefix + digits)
    if form.has("0") and not form.has("-") and form.precision is None and missing > 0:
        digits = "0" * missing + digits
    return form.pad(sign + prefix + digits, zeros=False)


def _written_float(value: float, verb: str, form: _Form) -> str | None:
    if verb in "xXb" or form.has("#"):
        raise BuiltinError(f"sprintf does not write a fraction with %{verb}, nor with a '#'")
    if verb in "eEfF":
        precision = 6 if form.precision is None else form.precision
        text = f"{abs(value):.{precision}{verb}}"
    elif verb in "gGv":
        text = _general(abs(value), form.precision)
        text = text.upper() if verb == "G" else text
    else:
        return None
    negative = value < 0 or str(value).startswith("-")
    sign = _sign(negative=negative, form=form)
    if form.has("0") and not form.has("-"):
        return sign + text.rjust((form.width or 0) - len(sign), "0")
    return form.pad(sign + text)


def _general(value: float, precision: int | None) -> str:
    if precision is not None:
        return f"{value:.{min(precision, _MAX_SIGNIFICANT_DIGITS)}g}"
    shortest = Decimal(repr(value)).normalize()
    exponent = shortest.adjusted()
    if not value:
        return "0"
    if _SMALL_EXPONENTS[0] <= exponent < _SMALL_EXPONENTS[1]:
        return f"{shortest:f}"
    digits = "".join(map(str, shortest.as_tuple().digits))
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{digits[0]}{fraction}e{exponent:+03}"


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {"sprintf": sprintf}
