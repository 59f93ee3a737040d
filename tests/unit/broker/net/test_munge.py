"""Identity by MUNGE: genuine credentials say who sent which message to which server; every other kind is refused, each
with its own advice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.net import munge as munge_module
from broker.net.doors import MungeIdentity
from broker.net.munge import Munge, digest_of
from broker.protocol.errors import AuthError, Transient

LIMIT_S = 20.0
MUNGED = shutil.which("munged", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
pytestmark = pytest.mark.skipif(
    MUNGED is None and not os.environ.get("CI"), reason="munged (Debian package munge) is not installed"
)
SERVER_KEY = "s" * 40
BODY = b"a message's body"
REPO = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def socket() -> Iterator[str]:
    """A munged of our own, with a key of its own."""
    assert MUNGED is not None, "CI must have munged: apt-get install munge"
    folder = Path(tempfile.mkdtemp(prefix="pt-munge-"))
    folder.chmod(0o755)
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    path = folder / "socket"
    options = {"key-file": key, "socket": path, "pid-file": folder / "pid", "log-file": folder / "log"}
    arguments = [f"--{name}={value}" for name, value in (options | {"seed-file": folder / "seed"}).items()]
    munged = subprocess.Popen([MUNGED, "--foreground", *arguments], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + LIMIT_S
        while not path.is_socket():
            assert munged.poll() is None, munged.stderr.read() if munged.stderr else ""
            assert time.monotonic() < until, "munged does not come up"
            time.sleep(0.01)
        yield str(path)
    finally:
        munged.terminate()
        munged.wait(LIMIT_S)
        shutil.rmtree(folder)


@pytest.fixture
def identity(socket: str) -> MungeIdentity:
    return MungeIdentity(Munge(socket), SERVER_KEY, frozenset({"daemon"}), service_uid=4711)


def refusal(identity: MungeIdentity, credential: bytes, body: bytes = BODY) -> AuthError:
    with pytest.raises(AuthError) as caught:
        identity.identify(body, credential)
    assert caught.value.exit_code == 5
    return caught.value


def credential(socket: str, body: bytes = BODY, server_key: str = SERVER_KEY, only_uid: int | None = None) -> bytes:
    return Munge(socket, only_uid).encode(digest_of(body, server_key))


def test_a_genuine_credential_says_who_sent_the_message(socket: str, identity: MungeIdentity) -> None:
    caller = identity.identify(BODY, credential(socket))
    assert caller.uid == os.geteuid()
    assert caller.admin == (os.geteuid() == 0)


def as_nobody(socket: str) -> bytes:
    program = (
        "import sys; from broker.net.munge import Munge, digest_of\n"
        f"sys.stdout.buffer.write(Munge(sys.argv[1]).encode(digest_of({BODY!r}, {SERVER_KEY!r})))"
    )
    command = [sys.executable, "-c", program, socket]
    # What that user can read is tried here, not what it finds in its own folders.
    environment = {"PYTHONPATH": str(REPO), "PATH": os.defpath}
    return subprocess.run(
        command, user="nobody", group="nogroup", extra_groups=[], env=environment, check=True, capture_output=True
    ).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_is_told_apart_by_the_kernel_and_is_no_admin(socket: str, identity: MungeIdentity) -> None:
    caller = identity.identify(BODY, as_nobody(socket))
    assert (caller.user, caller.admin) == ("nobody", False)
    admins = MungeIdentity(Munge(socket), SERVER_KEY, frozenset({"nobody"}), service_uid=4711)
    assert admins.identify(BODY, as_nobody(socket)).admin
    service = MungeIdentity(Munge(socket), SERVER_KEY, frozenset(), service_uid=caller.uid)
    assert service.identify(BODY, as_nobody(socket)).admin


def test_no_credential_is_refused(identity: MungeIdentity) -> None:
    assert "carries no MUNGE credential" in refusal(identity, b"").message


@pytest.mark.parametrize("where", [10, 30, 60, -10])
def test_a_forged_credential_is_refused(socket: str, identity: MungeIdentity, where: int) -> None:
    forged = bytearray(credential(socket))
    forged[where] = ord("A") if forged[where] != ord("A") else ord("B")
    error = refusal(identity, bytes(forged))
    assert "the credential was refused" in error.message
    assert "same MUNGE key" in error.hint


@pytest.mark.parametrize("noise", [b"x", b"MUNGE:", b"MUNGE:AAAA:", b"\0" * 100, b"\xff" * 10_000])
def test_noise_is_refused(identity: MungeIdentity, noise: bytes) -> None:
    assert "the credential was refused" in refusal(identity, noise).message


def test_a_replayed_credential_is_refused(socket: str, identity: MungeIdentity) -> None:
    once = credential(socket)
    identity.identify(BODY, once)
    assert "used before" in refusal(identity, once).hint


def test_an_expired_credential_is_refused(
    socket: str, identity: MungeIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(munge_module, "TTL_S", 1)
    made_unix_s, old = int(time.time()), credential(socket)
    while int(time.time()) <= made_unix_s + 2:  # munged counts in whole seconds
        time.sleep(0.05)
    assert "clocks" in refusal(identity, old).hint


def test_a_credential_for_another_message_is_refused(socket: str, identity: MungeIdentity) -> None:
    other = credential(socket, body=b"another body")
    assert refusal(identity, other).message == "the credential is not for this message"


def test_a_credential_for_another_server_is_refused(socket: str, identity: MungeIdentity) -> None:
    other = credential(socket, server_key="t" * 40)
    assert refusal(identity, other).message == "the credential is not for this message"


def test_a_credential_for_another_service_user_is_refused(socket: str, identity: MungeIdentity) -> None:
    error = refusal(identity, credential(socket, only_uid=os.geteuid() + 12345))
    assert "broker.user" in error.hint
    assert identity.identify(BODY, credential(socket, only_uid=os.geteuid())).uid == os.geteuid()


def test_without_munged_the_client_says_so_and_the_broker_calls_it_passing(tmp_path: Path, socket: str) -> None:
    nowhere = str(tmp_path / "none")
    with pytest.raises(AuthError) as caught:
        Munge(nowhere).encode(b"x")
    assert "munged" in caught.value.hint
    deaf = MungeIdentity(Munge(nowhere), SERVER_KEY, frozenset(), 0)
    with pytest.raises(Transient, match="cannot reach munged"):
        deaf.identify(BODY, credential(socket))
