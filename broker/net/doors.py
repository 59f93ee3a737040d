"""The broker's two ROUTER sockets: one door for login nodes, one for workers."""

from __future__ import annotations

import logging
import pwd
from collections.abc import Callable, Iterator
from typing import Protocol

import zmq
from msgspec import Struct
from msgspec.msgpack import Decoder

from broker.net.client import check_listening
from broker.net.munge import Munge, digest_of
from broker.protocol.errors import AuthError, BrokerUnreachable, PromptTunerError
from broker.protocol.messages import (
    ClientRequest,
    ErrorReply,
    FromWorker,
    Message,
    client_request_decoder,
    from_worker_decoder,
    pack,
    unpack,
)
from broker.protocol.spec import Identity

log = logging.getLogger(__name__)

MIB = 1 << 20
TURN_BYTES = 64 * MIB  # what one turn takes from a door, whoever sends how much


class Authenticator(Protocol):
    """Says who sent a message."""

    def identify(self, body: bytes, credential: bytes) -> Identity:
        """Raises `AuthError` when the credential is not for this body, or `Transient`."""
        ...


class OwnerOnly:
    """Personal mode: the socket lives in a folder that its owner alone may enter, so whoever speaks is the owner."""

    def __init__(self, uid: int) -> None:
        self._identity = Identity(uid=uid, user=pwd.getpwuid(uid).pw_name, admin=True)

    def identify(self, body: bytes, credential: bytes) -> Identity:
        return self._identity


class MungeIdentity:
    """Site mode: a MUNGE credential over the message's digest and this server's key."""

    def __init__(self, munge: Munge, server_public_key: str, admins: frozenset[str], service_uid: int) -> None:
        self._munge = munge
        self._server_public_key = server_public_key
        self._admins = admins
        self._service_uid = service_uid

    def identify(self, body: bytes, credential: bytes) -> Identity:
        if not credential:
            raise AuthError("the message carries no MUNGE credential", "use the site's ptbatch with the site's file")
        decoded = self._munge.decode(credential)
        if decoded.payload != digest_of(body, self._server_public_key):
            raise AuthError("the credential is not for this message")
        try:
            user = pwd.getpwuid(decoded.uid).pw_name
        except KeyError:
            raise AuthError(f"uid {decoded.uid} has no user name on the broker's host") from None
        return Identity(uid=decoded.uid, user=user, admin=decoded.uid in (0, self._service_uid) or user in self._admins)


class Keys(Struct, frozen=True):
    """A CURVE key pair (Z85)."""

    public: bytes
    secret: bytes


def _served(address: str) -> bool:
    try:
        check_listening(address)
    except BrokerUnreachable:
        return False
    return True


class _Door:
    def __init__(self, address: str, keys: Keys | None, max_bytes: int) -> None:
        router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 200)
        router.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        router.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
        router.setsockopt(zmq.HEARTBEAT_TIMEOUT, 60_000)
        router.setsockopt(zmq.RCVHWM, 64)
        router.setsockopt(zmq.SNDHWM, 20_000)
        router.setsockopt(zmq.BACKLOG, 512)
        if address.startswith("tcp://"):
            if keys is None:
                raise AuthError(f"refusing to listen on {address} without a CURVE key", "set broker.secret_key_file")
            router.curve_server = True
            router.curve_publickey, router.curve_secretkey = keys.public, keys.secret
        try:
            if address.startswith("ipc://") and _served(address):  # a bind would take the socket away from its owner
                raise zmq.ZMQError(zmq.EADDRINUSE)
            router.bind(address)
        except zmq.ZMQError as error:
            router.close()
            raise PromptTunerError(
                f"cannot listen on {address}: {error.strerror}", "is another broker running?"
            ) from None
        self.socket = router
        self.address: str = router.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, peer: bytes, message: Message) -> bool:
        """False if the peer is gone or does not read; nothing is queued for it then."""
        try:
            self.socket.send_multipart([peer, *pack(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("peer does not take %s: %s", type(message).__name__, error)
            return False
        return True

    def _frames(self, limit: int) -> Iterator[tuple[bytes, list[bytes]]]:
        taken_bytes = 0
        for _ in range(limit):
            try:
                peer, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield peer, frames
            taken_bytes += sum(map(len, frames))
            if taken_bytes > TURN_BYTES:
                return

    def _answer_errors(self, peer: bytes, read: Callable[[], None]) -> None:
        try:
            read()
        except PromptTunerError as error:
            log.info("refused a message: %s", error.message)
            self.send(peer, ErrorReply(code=error.code, message=error.message, hint=error.hint))

    def close(self) -> None:
        self.socket.close()


class ClientDoor(_Door):
    """Login nodes: each message is authenticated by itself, refusals are answered here."""

    def __init__(self, address: str, keys: Keys | None, max_bytes: int, authenticator: Authenticator) -> None:
        super().__init__(address, keys, max_bytes)
        self._authenticator = authenticator

    def receive(self, limit: int) -> list[tuple[bytes, Identity, ClientRequest]]:
        """Up to `limit` messages that are well formed and authentic."""
        arrived: list[tuple[bytes, Identity, ClientRequest]] = []
        for peer, frames in self._frames(limit):

            def read(peer: bytes = peer, frames: list[bytes] = frames) -> None:
                message = unpack(frames, client_request_decoder)
                credential = frames[2] if len(frames) > 2 else b""
                arrived.append((peer, self._authenticator.identify(frames[1], credential), message))

            self._answer_errors(peer, read)
        return arrived


class WorkerDoor(_Door):
    """Compute nodes: a worker proves itself by its allocation's key in `Register`; later messages carry its epoch."""

    _decoder: Decoder[FromWorker] = from_worker_decoder

    def receive(self, limit: int) -> list[tuple[bytes, FromWorker]]:
        """Up to `limit` messages that are well formed."""
        arrived: list[tuple[bytes, FromWorker]] = []
        for peer, frames in self._frames(limit):

            def read(peer: bytes = peer, frames: list[bytes] = frames) -> None:
                arrived.append((peer, unpack(frames, self._decoder)))

            self._answer_errors(peer, read)
        return arrived
