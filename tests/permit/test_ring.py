from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from pdp.permit import jws
from pdp.permit.claims import PermitError
from pdp.permit.keys import MAX_KEYS, PermitKeySet
from pdp.permit.ring import MAX_FILE_BYTES, KeyRing, LiveKeys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "permit-key.pem"


def kids(keys: LiveKeys | KeyRing) -> list[str]:
    ring = keys.ring if isinstance(keys, LiveKeys) else keys
    return [key.kid for key in ring.keys]


def test_keys_are_made_once_and_kept_private(file: Path) -> None:
    first = LiveKeys(file, make=True)
    assert kids(LiveKeys(file, make=True)) == kids(first)
    assert file.stat().st_mode & 0o777 == 0o600


def test_no_key_is_made_where_one_is_configured(file: Path) -> None:
    with pytest.raises(PermitError, match="can not be read: No such file"):
        LiveKeys(file)
    assert not file.exists()


def test_keys_that_others_can_read_are_refused(file: Path) -> None:
    LiveKeys(file, make=True)
    file.chmod(0o640)
    with pytest.raises(PermitError, match=r"is open to others.*chmod 600"):
        LiveKeys(file)


@pytest.mark.parametrize(
    ("owner", "reader", "mode", "taken"),
    (
        (0, 65532, 0o440, True),
        (0, 65532, 0o400, True),
        (0, 65532, 0o444, False),
        (0, 65532, 0o460, False),
        (0, 0, 0o440, False),
        (65532, 65532, 0o440, False),
        (1000, 65532, 0o440, False),
    ),
)
def test_a_group_may_read_only_what_root_has_mounted_for_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, *, owner: int, reader: int, mode: int, taken: bool
) -> None:
    LiveKeys(file, make=True)
    really = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        found = list(really(descriptor))
        found[0], found[4] = 0o100000 | mode, owner
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "geteuid", lambda: reader)
    if taken:
        assert KeyRing.from_file(file).keys
    else:
        with pytest.raises(PermitError, match="is open to others"):
            KeyRing.from_file(file)


def encrypted() -> bytes:
    private = load_pem_private_key(KeyRing.generate().to_pem(), password=None)
    return private.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )


def rsa() -> bytes:
    private = generate_private_key(65537, 2048)
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_only() -> bytes:
    return b"".join(key.only_public().to_pem() for key in KeyRing.generate().keys)


@pytest.mark.parametrize(
    ("content", "told"),
    (
        (b"", "holds no unencrypted PKCS 8 PEM key"),
        (public_only(), "holds no unencrypted PKCS 8 PEM key"),
        (encrypted(), "not an unencrypted Ed25519 key"),
        (rsa(), "not an unencrypted Ed25519 key"),
        (
            b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            "a PEM block that can not be read",
        ),
        (
            # X448 by its name, and 32 bytes: an error of OpenSSL's own, found by a fuzzer.
            b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VvBCIEIGtr%s\n-----END PRIVATE KEY-----\n"
            % (b"a2tr" * 10),
            "a PEM block that can not be read",
        ),
        (KeyRing.generate().to_pem() * 2, "holds a key twice"),
        (b"x" * 70_000, "is larger than"),
        (b"".join(KeyRing.generate().to_pem() for _ in range(65)), "holds more than 64 keys"),
    ),
)
def test_a_file_that_holds_no_keys_is_refused(file: Path, content: bytes, told: str) -> None:
    file.touch(mode=0o600)
    file.write_bytes(content)
    with pytest.raises(PermitError) as caught:
        KeyRing.from_file(file)
    assert caught.value.reason_code == "permit_unavailable"
    assert caught.value.message.startswith(f"The permit key {file} ")
    assert told in caught.value.message
    assert "AAAA" not in caught.value.message


def test_the_next_key_is_published_before_it_signs() -> None:
    ring = KeyRing.generate()
    both = ring.with_next()
    assert both.signing.kid == ring.signing.kid
    assert all(both.public_set.find(kid) for kid in kids(both))
    rotated = both.signing_with(kids(both)[1])
    assert kids(rotated) == kids(both)[::-1]
    assert rotated.signing.kid == kids(both)[1]


def test_a_key_that_has_signed_can_never_sign_again() -> None:
    both = KeyRing.generate().with_next()
    old, new = kids(both)
    rotated = both.signing_with(new)
    assert rotated.to_pem().count(b"PRIVATE KEY") == 2  # begin and end of one
    with pytest.raises(PermitError, match="can only verify"):
        rotated.signing_with(old)
    assert kids(rotated.without(old)) == [new]
    with pytest.raises(PermitError, match="is the one that signs"):
        rotated.without(new)
    with pytest.raises(PermitError, match="There is no key"):
        rotated.without("none")


def test_the_keys_that_wait_their_turn_can_sign_after_others_have() -> None:
    ring = KeyRing.generate().with_next().with_next()
    first, second, third = kids(ring)
    after = ring.signing_with(second).signing_with(third)
    assert kids(after) == [third, second, first]
    assert [key.private is not None for key in after.keys] == [True, False, False]
    assert ring.signing_with(second).keys[2].private is not None


def test_as_many_keys_as_may_be_are_read_and_no_more(file: Path) -> None:
    ring = KeyRing.generate()
    while len(ring.keys) < MAX_KEYS:
        ring = ring.with_next()
    ring.write(file)
    assert kids(KeyRing.from_file(file)) == kids(ring)
    ring.with_next().write(file)
    with pytest.raises(PermitError, match=f"{file} holds more than {MAX_KEYS} keys"):
        KeyRing.from_file(file)


def test_a_file_is_read_up_to_its_bound(file: Path) -> None:
    pem = KeyRing.generate().to_pem()
    file.write_bytes(pem + b"#" * (MAX_FILE_BYTES - len(pem)))
    file.chmod(0o600)
    assert KeyRing.from_file(file).to_pem() == pem
    file.write_bytes(pem + b"#" * (MAX_FILE_BYTES - len(pem) + 1))
    with pytest.raises(PermitError, match=f"{file} is larger than {MAX_FILE_BYTES} bytes"):
        KeyRing.from_file(file)


def test_what_is_signed_verifies_by_the_key_and_type_that_it_says(file: Path) -> None:
    keys = LiveKeys(file, make=True)
    signed = keys.sign({"jti": "1"}, kind="delegation+jwt")
    assert jws.verify(signed, find_key=keys.find, kind="delegation+jwt") == {"jti": "1"}
    assert jws.verify(keys.sign({"jti": "2"}), find_key=keys.find) == {"jti": "2"}
    with pytest.raises(jws.JwsError, match="type tool-permit"):
        jws.verify(signed, find_key=keys.find)


def test_what_is_written_is_read_again(file: Path) -> None:
    both = KeyRing.generate().with_next()
    rotated = both.signing_with(kids(both)[1]).with_next()
    rotated.write(file)
    read = KeyRing.from_file(file)
    assert kids(read) == kids(rotated)
    assert read.to_pem() == rotated.to_pem()
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert rotated.to_pem() == b"".join(key.to_pem() for key in rotated.keys)


def test_what_can_not_be_used_is_told_by_its_file(file: Path) -> None:
    with pytest.raises(PermitError, match=rf"^The permit key {file} can not be read: No such"):
        KeyRing.from_file(file)
    ring = KeyRing.generate()
    KeyRing((*ring.keys, *ring.keys)).write(file)
    with pytest.raises(PermitError, match=rf"^The permit key {file} holds a key twice\.$"):
        KeyRing.from_file(file)
    file.chmod(0o644)
    with pytest.raises(PermitError, match=rf"^The permit key {file} is open to others \(mode 0644"):
        KeyRing.from_file(file)


def test_which_key_signs_from_now_on_is_logged(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = LiveKeys(file, make=True)
    ring = keys.ring.with_next()
    ring.signing_with(kids(ring)[1]).write(file)
    asyncio.run(keys.look())
    assert f"permits are signed with key {kids(ring)[1]}" in caplog.messages


def test_changed_keys_come_in_force_and_old_permits_still_verify(file: Path) -> None:
    keys = LiveKeys(file, make=True)
    old = keys.sign({"jti": "1"})
    ring = keys.ring.with_next()
    ring = ring.signing_with(kids(ring)[1])
    ring.write(file)
    asyncio.run(keys.look())
    assert kids(keys) == kids(ring)
    assert keys.sign({"jti": "1"}) != old
    assert {jwk["kid"] for jwk in json.loads(keys.to_jwks())["keys"]} == set(kids(ring))
    assert PermitKeySet.from_jwks(keys.to_jwks()).find(kids(ring)[1])
    ring.without(kids(ring)[1]).write(file)
    asyncio.run(keys.look())
    assert keys.find(kids(ring)[1]) is None


@pytest.mark.parametrize("how", ("broken", "open", "gone"))
def test_a_file_that_goes_bad_leaves_the_keys_in_force(
    file: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = LiveKeys(file, make=True)
    before = kids(keys)
    if how == "broken":
        file.write_bytes(b"nothing")
    elif how == "open":
        file.chmod(0o644)
    else:
        file.unlink()
    asyncio.run(keys.look())
    assert kids(keys) == before
    assert "stay in force" in caplog.text
    caplog.clear()
    asyncio.run(keys.look())
    assert caplog.text == ""
