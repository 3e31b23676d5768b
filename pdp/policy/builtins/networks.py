"""net.cidr_*: those built-ins about addresses that OPA does not compile into the module.

An address is its number of 128 bits, as Go has it: those of IPv4 lie in ``::ffff:0:0/96``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, summarize_address_range
from typing import Final

from pdp.policy.builtins.faults import UndefinedError, too_large
from pdp.policy.builtins.operands import string
from pdp.policy.builtins.values import Object, Value, number

MAX_ADDRESSES: Final = 65_536
"""That net.cidr_expand lists, and pairs that net.cidr_contains_matches compares."""
MAX_MERGED: Final = 10_000
_IPV4_BITS: Final = 32
_IPV6_BITS: Final = 128
_IPV4_BLOCK: Final = 0xFFFF
"""The upper 96 bits of an IPv4 address."""
_PREFIX: Final = re.compile(r"[0-9]{1,8}")
_IPV6_WITH_ALL_BYTES: Final = 1 << 120
"""OPA loses the leading zero bytes of what it merges; below this one there are some."""


@dataclass(frozen=True, slots=True)
class _Network:
    address: int
    """Of the one that it was written with, which need not be the first."""
    length: int
    bits: int

    @property
    def first(self) -> int:
        return self.address >> self._free << self._free

    @property
    def last(self) -> int:
        return self.address | ((1 << self._free) - 1)

    @property
    def is_ipv4(self) -> bool:
        """Whether Go counts it so; an IPv6 network of mapped addresses too."""
        return _is_ipv4(self.first)

    @property
    def _free(self) -> int:
        return self.bits - self.length

    def holds(self, address: int) -> bool:
        return (
            _is_ipv4(address) == self.is_ipv4
            and address >> self._free == self.address >> self._free
        )

    def holds_all(self, other: _Network) -> bool:
        if self.is_plain_ipv6 and other.is_plain_ipv6:
            return self.length <= other.length and self.first <= other.first <= self.last
        return self.holds(other.first) and self.holds(other.last)

    @property
    def is_plain_ipv6(self) -> bool:
        return self.bits == _IPV6_BITS and not self.is_ipv4

    def __str__(self) -> str:
        length = self.length - 96 if self.is_ipv4 and self.bits == _IPV6_BITS else self.length
        return f"{_text(self.address)}/{length}"


def cidr_is_valid(cidr: Value) -> Value:
    """net.cidr_is_valid."""
    if not isinstance(cidr, str):
        return False
    try:
        _network(cidr)
    except UndefinedError:
        return False
    return True


def cidr_expand(cidr: Value) -> Value:
    """net.cidr_expand."""
    network = _network(string(cidr))
    if network.last - network.first >= MAX_ADDRESSES:
        raise too_large("a network")
    return frozenset(map(_text, range(network.first, network.last + 1)))


def cidr_contains_matches(cidrs: Value, inner: Value) -> Value:
    """net.cidr_contains_matches."""
    outer_ones = list(_indexed(cidrs))
    inner_ones = list(_indexed(inner)) if outer_ones else []
    if len(outer_ones) * len(inner_ones) > MAX_ADDRESSES:
        raise too_large("the product of two collections of networks")
    if not inner_ones:
        return frozenset()
    outer_networks = [(_network(string(text)), index) for text, index in outer_ones]
    inner_networks = [(_address_or_network(string(text)), index) for text, index in inner_ones]
    return frozenset(
        (outer_index, inner_index)
        for network, outer_index in outer_networks
        for held, inner_index in inner_networks
        if (network.holds(held) if isinstance(held, int) else network.holds_all(held))
    )


def cidr_merge(cidrs: Value) -> Value:
    """net.cidr_merge."""
    if not isinstance(cidrs, tuple | frozenset):
        raise UndefinedError
    if len(cidrs) > MAX_MERGED:
        raise too_large("a collection of networks")
    networks = [_classful_or_network(string(text)) for text in cidrs]
    if len(networks) > 1 and any(one.is_ipv4 and one.bits == _IPV6_BITS for one in networks):
        raise too_large("a mapped network among others")  # OPA counts it wrong
    return frozenset(str(network) for same in _ranges(networks) for network in _networks_of(same))


def _ranges(networks: Sequence[_Network]) -> list[list[_Network]]:
    """Networks that overlap or adjoin, together."""
    ranges: list[list[_Network]] = []
    last = -2
    for network in sorted(networks, key=lambda one: one.first):
        if network.first > last + 1:
            ranges.append([])
        ranges[-1].append(network)
        last = max(last, network.last)
    return ranges


def _networks_of(together: Sequence[_Network]) -> Iterator[_Network]:
    if len(together) == 1:
        yield together[0]
        return
    first, last = min(one.first for one in together), max(one.last for one in together)
    if all(one.bits == _IPV4_BITS for one in together):
        for network in summarize_address_range(_ipv4(first), _ipv4(last)):
            address = _number(network.network_address)
            yield _Network(address, network.prefixlen, _IPV4_BITS)
    elif all(one.is_plain_ipv6 for one in together) and (
        first >= _IPV6_WITH_ALL_BYTES or _is_first_network(first, last)
    ):
        for span in summarize_address_range(IPv6Address(first), IPv6Address(last)):
            yield _Network(int(span.network_address), span.prefixlen, _IPV6_BITS)
    else:
        # What OPA makes of these is no set of networks that anybody means.
        raise too_large("the span of networks that adjoin")


def _is_first_network(first: int, last: int) -> bool:
    return first == 0 and last & (last + 1) == 0


def _indexed(collection: Value) -> Iterator[tuple[Value, Value]]:
    """What is to be compared, and how a match names it."""
    match collection:
        case str():
            yield collection, collection
        case tuple():
            for position, item in enumerate(collection):
                yield _cidr_of(item), number(position)
        case frozenset():
            for item in collection:
                yield _cidr_of(item), item
        case Object():
            for key, item in collection.items():
                yield _cidr_of(item), key
        case _:
            return


def _cidr_of(item: Value) -> Value:
    if isinstance(item, tuple) and item:
        return item[0]
    return string(item)


def _classful_or_network(text: str) -> _Network:
    """A network; for an address of IPv4 the one of its class, as OPA has it."""
    address = _parse_address(text)
    if address is None:
        return _network(text)
    if not _is_ipv4(address[0]):
        raise UndefinedError
    return _Network(address[0], _class_length(address[0]), _IPV4_BITS)


def _class_length(address: int) -> int:
    leading_bits = address >> 30 & 0b11
    return (8, 8, 16, 24)[leading_bits]


def _address_or_network(text: str) -> int | _Network:
    address = _parse_address(text)
    return _network(text) if address is None else address[0]


def _network(text: str) -> _Network:
    before, _, prefix = text.partition("/")
    address = _parse_address(before)
    if address is None or not _PREFIX.fullmatch(prefix) or int(prefix) > address[1]:
        raise UndefinedError
    network = _Network(address[0], int(prefix), address[1])
    return _Network(network.first, network.length, network.bits)


def _parse_address(text: str) -> tuple[int, int] | None:
    """An address and how many bits those of its kind have."""
    try:
        if ":" not in text:
            return _number(IPv4Address(text)), _IPV4_BITS
        return (int(IPv6Address(text)), _IPV6_BITS) if "%" not in text else None
    except ValueError:
        return None


def _is_ipv4(address: int) -> bool:
    return address >> _IPV4_BITS == _IPV4_BLOCK


def _ipv4(address: int) -> IPv4Address:
    return IPv4Address(address & 0xFFFF_FFFF)


def _number(address: IPv4Address) -> int:
    return _IPV4_BLOCK << _IPV4_BITS | int(address)


def _text(address: int) -> str:
    return str(_ipv4(address) if _is_ipv4(address) else IPv6Address(address))


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    "net.cidr_contains_matches": cidr_contains_matches,
    "net.cidr_expand": cidr_expand,
    "net.cidr_is_valid": cidr_is_valid,
    "net.cidr_merge": cidr_merge,
}
