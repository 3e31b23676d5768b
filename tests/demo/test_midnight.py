"""The demo begins only in a day in which it can also end."""

from __future__ import annotations

import pytest

from pdp.demo.stage import wait_out_midnight

DAY = 86_400.0


@pytest.mark.parametrize(
    ("now", "waited"),
    ((0.0, []), (DAY / 2, []), (20 * DAY - 21, []), (20 * DAY - 20, [20.0]), (DAY - 0.5, [0.5])),
)
def test_it_waits_for_the_next_day_when_this_one_is_about_to_end(
    now: float, waited: list[float]
) -> None:
    naps: list[float] = []
    wait_out_midnight(lambda: now, naps.append)
    assert naps == waited
