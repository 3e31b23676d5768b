"""bench/smoke.py fails when something gets slower, and only then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import smoke
from bench.smoke import Plan, Ratios, judge, measure, recording, worse

TINY = Plan(starts=1, warm_up=20, slices=5, calls=20, blocks=3)
SLOW_DISK = """
import os, time

write = os.write

def slow(descriptor, data):
    time.sleep(0.02)
    return write(descriptor, data)

os.write = slow
"""


def silent(_line: str) -> None:
    pass


def test_a_fifth_more_is_let_pass_and_what_is_above_it_is_not() -> None:
    recorded = {"stream": 2.0, "memory": 3.0}
    assert worse(recorded, {"stream": 2.39, "memory": 3.0}) == []
    assert worse(recorded, {"stream": 2.41, "memory": 3.0}) == ["stream"]
    assert worse(recorded, {"stream": 1.0, "memory": 3.7}) == ["memory"]


@pytest.mark.parametrize("found", ({"stream": 1.0}, {"stream": 1.0, "memory": 1.0, "new": 1.0}))
def test_no_ratio_falls_out_of_the_comparison(found: Ratios) -> None:
    with pytest.raises(KeyError):
        worse({"stream": 2.0, "memory": 3.0}, found)


def test_what_is_worse_in_every_attempt_fails() -> None:
    attempts = iter([{"stream": 2.9}, {"stream": 2.5}, {"stream": 2.7}])
    assert judge({"stream": 2.0}, lambda: next(attempts), silent) == ({"stream": 2.5}, ["stream"])


def test_a_slow_moment_is_forgiven_by_one_attempt_without_it() -> None:
    attempts = iter([{"stream": 2.9, "start": 1.0}, {"stream": 2.1, "start": 9.0}])
    found, failed = judge({"stream": 2.0, "start": 1.0}, lambda: next(attempts), silent)
    assert (found, failed) == ({"stream": 2.1, "start": 1.0}, [])


def test_what_is_as_recorded_is_measured_once() -> None:
    attempts = iter([{"stream": 2.0}])
    assert judge({"stream": 2.0}, lambda: next(attempts), silent) == ({"stream": 2.0}, [])


def test_the_recorded_ratios_are_the_medians_of_the_attempts_and_say_how_they_spread() -> None:
    written = recording([{"stream": ratio} for ratio in (2.0, 9.0, 2.2)], load_average=0.5)
    spread = [written[name]["stream"] for name in ("lowest", "ratios", "highest")]
    assert spread == [2.0, 2.2, 9.0]


def test_what_is_recorded_is_what_is_measured() -> None:
    recorded = json.loads(smoke.RECORDED.read_text(encoding="utf-8"))
    assert recorded["ratios"].keys() == smoke.MEANING.keys()


def test_its_exit_code_says_whether_something_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recorded.json"
    recorded = dict.fromkeys(smoke.MEANING, 2.0)
    file.write_text(json.dumps({"ratios": recorded}), encoding="utf-8")
    ratios: Iterator[Ratios] = iter([recorded, *[{**recorded, "unary": 3.0}] * smoke.ATTEMPTS])
    monkeypatch.setattr(smoke, "measure", lambda _plan: next(ratios))
    assert smoke.main([f"--recorded={file}"]) == 0
    assert smoke.main([f"--recorded={file}", "--output=json"]) == 1
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") :])["worse"] == ["unary"]


@pytest.mark.slow
def test_a_disk_that_takes_longer_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK, encoding="utf-8")
    usual = measure(TINY)
    slow = measure(TINY, environment={"PYTHONPATH": str(tmp_path)})
    assert usual.keys() == slow.keys() == smoke.MEANING.keys()
    failed = worse(usual, slow)
    # Each decision is written to the log before it is answered.
    assert {"stream", "unary", "write"} <= set(failed)
