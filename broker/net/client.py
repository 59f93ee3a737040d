"""The client side of the broker's socket, as login-node commands use it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from types import TracebackType
from urllib.parse import urlsplit

import zmq
from msgspec import Struct

from broker.net.munge import Munge, digest_of
from broker.protocol.errors import AuthError, BrokerUnreachable, Transient, error_for
from broker.protocol.messages import ClientReply, ErrorReply, Message, Update, Watch, client_reply_decoder, pack, unpack

MAX_REPLY_BYTES = 1 << 30
IPC_PATH_MAX = 107  # sun_path, without its closing NUL


class Contact(Struct, frozen=True, kw_only=True):
    """Where a broker is, and how to prove to it who is calling."""

    address: str
    auth: str = "owner"  # "owner": only its owner can enter the socket's folder; "munge"
    server_public_key: str | None = None
    munge_socket: str | None = None
    service_user: str | None = None  # who alone may decode our credentials


class BrokerClient:
    """One connection to the broker. Not for use by several threads at once."""

    def __init__(self, contact: Contact) -> None:
        self._contact = contact
        self._munge = _munge_for(contact) if contact.auth == "munge" else None
        self._socket = self._open()

    def __enter__(self) -> BrokerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close(linger=0)

    def _open(self) -> zmq.Socket[bytes]:
        dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
        dealer.setsockopt(zmq.RECONNECT_IVL, 50)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if self._contact.server_public_key:
            public, secret = zmq.curve_keypair()
            dealer.curve_publickey, dealer.curve_secretkey = public, secret
            dealer.curve_serverkey = self._contact.server_public_key.encode("ascii")
        elif self._contact.address.startswith("tcp://"):
            raise AuthError(
                f"the broker at {self._contact.address} has no public key in the site file",
                "set broker.public_key: TCP without it would not be encrypted",
            )
        dealer.connect(self._contact.address)
        return dealer

    def send(self, message: Message) -> None:
        """Hands `message` to the socket with a credential of its own; does not wait for the answer."""
        frames = pack(message)
        credential = b""
        if self._munge:
            credential = self._munge.encode(digest_of(frames[1], self._contact.server_public_key or ""))
        self._socket.send_multipart([*frames, credential])

    def receive(self, timeout_s: float) -> ClientReply | None:
        """The next reply, errors as values, or None after `timeout_s`."""
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return None
        return unpack(self._socket.recv_multipart(), client_reply_decoder)

    def call(self, message: Message, timeout_s: float = 10.0) -> ClientReply:
        """The broker's answer to `message`.

        Raises what an `ErrorReply` names; `BrokerUnreachable` at once where nobody listens, or after `timeout_s`.
        """
        check_listening(self._contact.address)
        self.send(message)
        until = time.monotonic() + timeout_s
        reply = self.receive(timeout_s)
        while isinstance(reply, Update) and not isinstance(message, Watch):  # an earlier watch's
            reply = self.receive(until - time.monotonic())
        if reply is None:
            self.close()
            self._socket = self._open()  # a late answer must not be taken for the next call's
            raise BrokerUnreachable(
                f"the broker at {self._contact.address} did not answer within {timeout_s:g} s",
                "is it running? ptctl broker status",
            )
        if isinstance(reply, ErrorReply):
            raise error_for(reply.code, reply.message, reply.hint)
        return reply

    def stream(self, watch: Watch, resend_s: float = 3.0, patience_s: float = 120.0) -> Iterator[Update]:
        """Updates of the watched requests, for as long as the caller iterates. The watch is renewed, so that it
        survives a restart of the broker; one that stays away for `patience_s` raises `BrokerUnreachable`.
        """
        heard = time.monotonic()
        renew_at = 0.0
        while True:
            now = time.monotonic()
            if now >= renew_at:
                self.send(watch)
                renew_at = now + resend_s
            reply = self.receive(renew_at - now)
            if reply is None:
                if time.monotonic() - heard > patience_s:
                    raise BrokerUnreachable(
                        f"the broker at {self._contact.address} has not answered for {patience_s:g} s"
                    )
                continue
            if isinstance(reply, ErrorReply):
                error = error_for(reply.code, reply.message, reply.hint)
                if not isinstance(error, Transient) or time.monotonic() - heard > patience_s:
                    raise error
                continue
            heard = time.monotonic()
            if isinstance(reply, Update):
                yield reply


def _munge_for(contact: Contact) -> Munge:
    only_uid = None
    if contact.service_user:
        import pwd

        try:
            only_uid = pwd.getpwnam(contact.service_user).pw_uid
        except KeyError:
            raise AuthError(
                f"the site file's service user {contact.service_user} is not known on this host",
                "the same users must exist on login and service nodes",
            ) from None
    return Munge(contact.munge_socket, only_uid)


def check_listening(address: str) -> None:
    """Returns if somebody accepts connections at `address`; a socket alone would wait in silence.

    Raises `BrokerUnreachable`.
    """
    parts = urlsplit(address)
    hint = "start one with: ptctl broker start"
    try:
        if parts.scheme == "ipc":
            path = address.removeprefix("ipc://")
            if len(os.fsencode(path)) > IPC_PATH_MAX:
                raise BrokerUnreachable(
                    f"the socket's path is too long: {path}", "set PROMPTTUNER_RUN_DIR to a shorter one"
                )
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(path)
        else:
            hint = "is the broker running, and does this host reach it? ask the site's admin"
            socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5).close()
    except OSError as error:
        raise BrokerUnreachable(f"no broker at {address}: {error.strerror or error}", hint) from None
