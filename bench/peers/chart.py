"""Bars, as SVG that a page can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH: Final = 1_000
_LABELS: Final = 440
_ROW: Final = 24
_BAR: Final = 14
_VALUES: Final = 150
"""Room for what stands behind the longest bar."""
_COLOURS: Final = {"ours": "#1f6feb", "floor": "#8b949e", "peer": "#d29922"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    label: str
    value: float
    kind: str
    """ours, floor or peer."""
    text: str
    """What stands behind the bar."""


def bars(title: str, unit: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars from zero, in the order given."""
    height = 56 + _ROW * len(rows)
    longest = max(row.value for row in rows)
    scale = (_WIDTH - _LABELS - _VALUES) / longest
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"'
            f' viewBox="0 0 {_WIDTH} {height}" role="img" font-family="sans-serif" font-size="13">'
        ),
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="{_WIDTH - 12}" y="24" text-anchor="end" fill="#57606a">{escape(unit)}</text>',
    ]
    for number, row in enumerate(rows):
        top = 44 + _ROW * number
        middle = top + _BAR - 3
        end = _LABELS + max(1.0, row.value * scale)
        lines += [
            f'<text x="{_LABELS - 8}" y="{middle}" text-anchor="end">{escape(row.label)}</text>',
            (
                f'<rect x="{_LABELS}" y="{top}" width="{end - _LABELS:.1f}" height="{_BAR}"'
                f' fill="{_COLOURS[row.kind]}"/>'
            ),
            f'<text x="{end + 6:.1f}" y="{middle}" fill="#57606a">{escape(row.text)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
