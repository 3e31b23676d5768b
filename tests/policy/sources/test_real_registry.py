"""Against a registry, and pushed by a client, that others wrote: crane's."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdp.config import OciSource
from pdp.policy.sources.oci import OciBundleSource
from pdp.policy.sources.source import SourceError
from tests.policy.sources.servers import archive, fetched

CRANE = Path(__file__).resolve().parents[3] / ".tools" / "crane"
Push = Callable[[int], str]

pytestmark = pytest.mark.slow


@pytest.fixture
def address() -> Iterator[str]:
    if not CRANE.exists():
        pytest.fail("there is no .tools/crane; `make test-slow` installs it")
    command = (CRANE, "registry", "serve", "--address", "127.0.0.1:0")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        started = re.search(r"serving on port (\d+)", process.stderr.readline())
        assert started is not None
        try:
            yield f"127.0.0.1:{started[1]}"
        finally:
            process.terminate()


@pytest.fixture
def push(address: str, tmp_path: Path) -> Push:
    """Push a bundle as :1.2; its digest."""

    def run(*arguments: str | Path) -> str:
        return subprocess.run(
            [CRANE, *arguments],
            env={"DOCKER_CONFIG": str(tmp_path), "HOME": str(tmp_path)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()

    def push_bundle(number: int) -> str:
        bundle = tmp_path / "bundle.tar.gz"
        bundle.write_bytes(archive(number))
        image = f"{address}/policies/acme:1.2"
        run("append", "--oci-empty-base", "--new_layer", bundle, "--new_tag", image)
        return run("digest", image)

    return push_bundle


def source(address: str, reference: str) -> OciBundleSource:
    image = f"{address}/policies/acme{reference}"
    return OciBundleSource(OciSource(image=image, plain_http=True))


def test_a_tag_that_moves_is_followed(address: str, push: Push) -> None:
    digest = push(1)
    watched = source(address, ":1.2")
    first, same = fetched(watched, None, digest)
    assert first is not None
    assert (first.files, first.tag) == ({"data.json": b'{"number": 1}'}, digest)
    assert same is None
    moved = push(2)
    (second,) = fetched(watched, digest)
    assert second is not None
    assert (second.files, second.tag) == ({"data.json": b'{"number": 2}'}, moved)


def test_a_digest_stays_what_it_is(address: str, push: Push) -> None:
    digest = push(1)
    push(2)
    (found,) = fetched(source(address, f"@{digest}"), None)
    assert found is not None
    assert found.files == {"data.json": b'{"number": 1}'}


def test_what_was_never_pushed_is_an_error(address: str, push: Push) -> None:
    push(1)
    with pytest.raises(SourceError, match="is not there: check the address"):
        fetched(source(address, ":other"), None)
