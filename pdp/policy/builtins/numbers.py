"""numbers.range_step and units.*."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Final

from pdp.policy.builtins.faults import UndefinedError, too_large
from pdp.policy.builtins.operands import string, whole_number
from pdp.policy.builtins.values import MAX_DIGITS, Number, Value, number

MAX_RANGE: Final = 100_000
"""Numbers in one range."""
_FLOAT_BITS: Final = 64
"""Of the mantissa of Go's big.Float."""
_MAX_EXPONENT_DIGITS: Final = 6
_AMOUNT: Final = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?")
_KILO: Final = {letter: 1000**power for power, letter in enumerate("kmgtpe", 1)}
_KIBI: Final = {f"{letter}i": 1024**power for power, letter in enumerate("kmgtpe", 1)}
_BYTE_UNITS: Final[Mapping[str, int]] = {
    "": 1,
    **_KILO,
    **_KIBI,
    **{f"{letter}b": factor for letter, factor in (_KILO | _KIBI).items()},
}
_UNITS: Final[Mapping[str, Fraction]] = {
    "": Fraction(1),
    # The double, not the decimal fraction.
    "m": Fraction(0.001),
    "M": Fraction(_KILO["m"]),
    **{spelt: Fraction(_KILO[letter]) for letter in "kgtpe" for spelt in (letter, letter.upper())},
    **{spelt: Fraction(factor) for unit, factor in _KIBI.items() for spelt in (unit, unit.title())},
}
_FRACTION_DIGITS: Final = 10


def range_step(first: Value, last: Value, step: Value) -> Value:
    """numbers.range_step: both ends are part of it."""
    start, end, width = whole_number(first), whole_number(last), whole_number(step)
    if width <= 0:
        raise UndefinedError
    if abs(end - start) // width >= MAX_RANGE:
        raise too_large("a range")
    numbers = range(start, end + 1, width) if start <= end else range(start, end - 1, -width)
    return tuple(map(number, numbers))


def parse_bytes(text: Value) -> Value:
    """units.parse_bytes: a whole number of bytes."""
    amount, unit = _amount_and_unit(string(text).lower().replace('"', ""))
    factor = _BYTE_UNITS.get(unit)
    if factor is None:
        raise UndefinedError
    return number(int(_rounded(_rounded(amount) * factor)))


def parse(text: Value) -> Value:
    """units.parse: an exact number."""
    amount, unit = _amount_and_unit(string(text).replace('"', ""))
    factor = _UNITS.get(unit[:1] + unit[1:].lower())
    if factor is None:
        raise UndefinedError
    exact = amount * factor
    if exact.denominator == 1:
        return number(exact.numerator)
    scaled = abs(exact) * 10**_FRACTION_DIGITS
    digits = str(int(scaled + Fraction(1, 2))).rjust(_FRACTION_DIGITS + 1, "0")
    sign = "-" if exact < 0 else ""
    return Number(f"{sign}{digits[:-_FRACTION_DIGITS]}.{digits[-_FRACTION_DIGITS:]}")


def _amount_and_unit(text: str) -> tuple[Fraction, str]:
    if " " in text:
        raise UndefinedError
    end = _end_of_amount(text)
    found = _AMOUNT.fullmatch(text[:end])
    if found is None or not (found[2] or found[3]):
        raise UndefinedError
    whole, fraction = found[2], found[3] or ""
    exponent = int(found[4] or "0")
    if len(whole) + len(fraction) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        raise too_large("a number")
    amount = Fraction(int(whole + fraction)) * Fraction(10) ** (exponent - len(fraction))
    return (-amount if found[1] == "-" else amount), text[end:]


def _end_of_amount(text: str) -> int:
    """Where the unit begins. An "e" belongs to the amount when a number comes after it."""
    at = 0
    while at < len(text):
        character = text[at]
        if character in "eE":
            following = text[at + 1 : at + 2]
            if not following or following not in "0123456789+-":
                return at
            if following in "+-":
                at += 1
            digits = re.match("[0-9]*", text[at + 1 :])
            if digits is not None and digits.end() > _MAX_EXPONENT_DIGITS:
                raise UndefinedError
        elif character not in "0123456789.+-":
            return at
        at += 1
    return at


def _rounded(exact: Fraction) -> Fraction:
    """As a big.Float holds it: 64 bits, ties to even."""
    if not exact:
        return exact
    magnitude = abs(exact)
    shift = magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - _FLOAT_BITS
    scale = Fraction(2) ** shift
    if magnitude / scale >= 2**_FLOAT_BITS:
        scale *= 2
    rounded = round(magnitude / scale) * scale
    return -rounded if exact < 0 else rounded


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    "numbers.range_step": range_step,
    "units.parse": parse,
    "units.parse_bytes": parse_bytes,
}
