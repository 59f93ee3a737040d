"""The two doors: what arrives is answered or dropped, the door lives on, and on TCP nothing comes in unencrypted."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.net.client import BrokerClient, Contact, check_listening
from broker.net.doors import ClientDoor, Keys, OwnerOnly, WorkerDoor
from broker.protocol.errors import (
    AuthError,
    BrokerUnreachable,
    NotFound,
    PromptTunerError,
    ProtocolMismatch,
    error_for,
)
from broker.protocol.messages import (
    PROTOCOL,
    Cancel,
    ErrorReply,
    Fetch,
    Heartbeat,
    Info,
    InfoReply,
    Message,
    Queue,
    Requests,
    Submit,
    Update,
    Watch,
    client_reply_decoder,
    pack,
    to_worker_decoder,
    unpack,
)
from broker.state.model import Request
from tests.unit.broker.worlds import spec

LIMIT_S = 20.0
MAX_BYTES = 100_000
EVERY_CLIENT_WORD: list[Message] = [
    Submit(spec=spec(), submit_key="k" * 16, blobs={"0" * 64: b"x"}),
    Queue(ids=[1, 2]),
    Cancel(mine=True),
    Fetch(id=3),
    Info(),
    Watch(ids=[5]),
]


@pytest.fixture
def door(tmp_path: Path) -> Iterator[ClientDoor]:
    made = ClientDoor(f"ipc://{tmp_path}/d", None, MAX_BYTES, OwnerOnly(os.geteuid()))
    yield made
    made.close()


@pytest.fixture
def worker_door(tmp_path: Path) -> Iterator[WorkerDoor]:
    made = WorkerDoor(f"ipc://{tmp_path}/w", None, MAX_BYTES)
    yield made
    made.close()


@pytest.fixture
def dealer() -> Iterator[Callable[..., zmq.Socket[bytes]]]:
    made: list[zmq.Socket[bytes]] = []

    def connect(address: str, server_key: bytes | None = None) -> zmq.Socket[bytes]:
        peer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        peer.setsockopt(zmq.LINGER, 0)
        if server_key:
            peer.curve_publickey, peer.curve_secretkey = zmq.curve_keypair()
            peer.curve_serverkey = server_key
        peer.connect(address)
        made.append(peer)
        return peer

    yield connect
    for peer in made:
        peer.close()


def answer(door: Any, peer: zmq.Socket[bytes], arrived: list[Any] | None = None) -> list[bytes]:
    """Turns the door until the peer has its answer."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        got = door.receive(100)
        if arrived is not None:
            arrived += got
        if peer.poll(5):
            return peer.recv_multipart()
    raise AssertionError("no answer")


def arrival(door: Any, peers: int = 1) -> list[Any]:
    """Turns the door until so many messages have come in."""
    until, arrived = time.monotonic() + LIMIT_S, []
    while len(arrived) < peers and time.monotonic() < until:
        door.socket.poll(5)
        arrived += door.receive(100)
    return arrived


# --- malformed messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"PT1"],
        [b"PT1", b""],
        [b"", b"", b""],
        [b"HTTP/1.1 200 OK", b"x"],
        [b"PT1", b"\xc1"],
        [b"PT1", b"\x91" * 50_000],
        [b"PT1", b"\x81\xa4type\xa4\xff\xff\xff\xff"],
        [b"PT1", b"\x82\xa4type\xa6Cancel\xa8job_name\xa3\xff\xff\xff"],
        [b"PT1", msgspec.msgpack.encode({"type": "Nonsense"})],
        [b"PT1", msgspec.msgpack.encode({"type": "Info", "extra": 1})],
        [b"PT1", msgspec.msgpack.encode({"type": "Fetch", "id": 0})],
        [b"PT1", msgspec.msgpack.encode({"type": "Fetch", "id": -1})],
        [b"PT1", msgspec.msgpack.encode({"type": "Fetch", "id": 2**63})],
        [b"PT1", msgspec.msgpack.encode({"type": "Fetch", "id": 2**64 - 1})],
        [b"PT1", msgspec.msgpack.encode({"type": "Fetch", "id": 1.5})],
        [b"PT1", msgspec.msgpack.encode({"type": "Heartbeat", "epoch": 1})],
        [b"PT1", *pack(Info())],
        [b"PT" + b"9" * 100, b"x"],
    ],
    ids=lambda frames: repr(frames)[:40],
)
def test_what_is_no_message_is_answered_with_an_error(door: Any, dealer: Any, frames: list[bytes]) -> None:
    peer = dealer(door.address)
    peer.send_multipart(frames)
    assert isinstance(unpack(answer(door, peer), client_reply_decoder), ErrorReply)
    peer.send_multipart([*pack(Info()), b""])
    ((_, _, message),) = arrival(door)
    assert message == Info()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_end_the_door(door: Any, worker_door: Any, dealer: Any, data: st.DataObject) -> None:
    """Any frames, and any message with some of its bytes changed."""
    for one, words in ((door, EVERY_CLIENT_WORD), (worker_door, [Heartbeat(epoch=3, rss_mb=1.5)])):
        body = bytearray(pack(data.draw(st.sampled_from(words)))[1])
        for where, byte in data.draw(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4)):
            body[where % len(body)] = byte
        frames = data.draw(st.just([b"PT1", bytes(body)]) | st.lists(st.binary(max_size=60), min_size=1, max_size=5))
        peer = dealer(one.address)
        peer.send_multipart(frames)
        until, arrived = time.monotonic() + LIMIT_S, []
        while not arrived and not peer.poll(1):
            assert time.monotonic() < until
            arrived = one.receive(100)
        peer.close()


def test_a_hundred_parts_are_one_message(door: Any, dealer: Any) -> None:
    peer = dealer(door.address)
    peer.send_multipart([*pack(Info()), *[b"x"] * 98])
    assert len(arrival(door)) == 1


def test_an_oversized_message_is_dropped_and_others_are_served(door: Any, dealer: Any) -> None:
    greedy, modest = dealer(door.address), dealer(door.address)
    greedy.send_multipart([b"PT1", b"x" * (MAX_BYTES + 1)])
    modest.send_multipart([*pack(Info()), b""])
    ((_, _, message),) = arrival(door)
    assert message == Info()
    assert not greedy.poll(50)


def test_another_version_is_named_together_with_ours(door: Any, dealer: Any) -> None:
    peer = dealer(door.address)
    peer.send_multipart([b"PT9", b"whatever it means", b""])
    reply = unpack(answer(door, peer), client_reply_decoder)
    assert isinstance(reply, ErrorReply)
    error = error_for(reply.code, reply.message, reply.hint)
    assert type(error) is ProtocolMismatch
    assert error.exit_code == 3
    assert error.message == f"the peer speaks protocol version 9, this side speaks {PROTOCOL}"
    assert "one release" in error.hint


def test_clients_do_not_speak_workers_words_nor_the_other_way_round(door: Any, worker_door: Any, dealer: Any) -> None:
    client, worker = dealer(door.address), dealer(worker_door.address)
    client.send_multipart([*pack(Heartbeat(epoch=1)), b""])
    assert isinstance(unpack(answer(door, client), client_reply_decoder), ErrorReply)
    worker.send_multipart(pack(Info()))
    assert isinstance(unpack(answer(worker_door, worker), to_worker_decoder), ErrorReply)


def test_a_peer_that_is_gone_is_no_error(door: Any, dealer: Any) -> None:
    assert door.send(b"nobody", Info()) is False
    peer = dealer(door.address)
    peer.send_multipart([*pack(Info()), b""])
    ((identity, _, _),) = arrival(door)
    peer.close()
    until = time.monotonic() + LIMIT_S
    while door.send(identity, Info()):
        assert time.monotonic() < until


def test_a_socket_that_another_broker_serves_is_not_taken_from_it(door: Any, dealer: Any) -> None:
    with pytest.raises(PromptTunerError, match="cannot listen") as caught:
        ClientDoor(door.address, None, MAX_BYTES, OwnerOnly(os.geteuid()))
    assert "another broker" in caught.value.hint
    peer = dealer(door.address)
    peer.send_multipart([*pack(Info()), b""])
    assert len(arrival(door)) == 1


def test_a_socket_that_a_dead_broker_left_is_taken_over(tmp_path: Path, dealer: Any) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "stale"))
    made = ClientDoor(f"ipc://{tmp_path}/stale", None, MAX_BYTES, OwnerOnly(os.geteuid()))
    peer = dealer(made.address)
    peer.send_multipart([*pack(Info()), b""])
    assert len(arrival(made)) == 1
    made.close()


def test_a_taken_address_is_refused(door: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PromptTunerError, match="cannot listen"):
            WorkerDoor(address, Keys(*zmq.curve_keypair()), MAX_BYTES)
    with pytest.raises(PromptTunerError, match="cannot listen"):
        WorkerDoor(f"ipc://{tmp_path}/no/such/folder", None, MAX_BYTES)


# --- TCP ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys() -> Keys:
    return Keys(*zmq.curve_keypair())


@pytest.fixture
def tcp_door(keys: Keys) -> Iterator[ClientDoor]:
    made = ClientDoor("tcp://127.0.0.1:*", keys, MAX_BYTES, OwnerOnly(os.geteuid()))
    yield made
    made.close()


def test_tcp_without_a_key_is_refused_on_both_sides() -> None:
    with pytest.raises(AuthError, match="without a CURVE key"):
        WorkerDoor("tcp://127.0.0.1:*", None, MAX_BYTES)
    with pytest.raises(AuthError, match="no public key"):
        BrokerClient(Contact(address="tcp://127.0.0.1:1"))


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
        b"\xff" + b"\0" * 8 + b"\x7f\x03",
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00NULL" + b"\0" * 48 + b"\x04\x26\x05READY",
        b"PT1" + b"\0" * 200,
        bytes(range(256)) * 40,
    ],
    ids=["http", "tls", "half a greeting", "null greeting", "ours, unframed", "noise"],
)
def test_raw_bytes_get_nothing_through(tcp_door: Any, keys: Keys, dealer: Any, bytes_sent: bytes) -> None:
    host, port = tcp_door.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(bytes_sent)
        good = dealer(tcp_door.address, keys.public)
        good.send_multipart([*pack(Fetch(id=9)), b""])
        ((_, _, message),) = arrival(tcp_door)
    assert message == Fetch(id=9)
    assert tcp_door.receive(100) == []


def test_neither_no_mechanism_nor_another_servers_key_gets_in(tcp_door: Any, keys: Keys, dealer: Any) -> None:
    plain, misled = dealer(tcp_door.address), dealer(tcp_door.address, zmq.curve_keypair()[0])
    for peer in (plain, misled):
        peer.send_multipart([*pack(Info()), b""])
    good = dealer(tcp_door.address, keys.public)
    good.send_multipart([*pack(Fetch(id=9)), b""])
    ((_, _, message),) = arrival(tcp_door)
    assert message == Fetch(id=9)
    assert tcp_door.receive(100) == []


# --- the client's side ----------------------------------------------------------------------------------------------


def test_no_broker_is_told_at_once(tmp_path: Path) -> None:
    with BrokerClient(Contact(address=f"ipc://{tmp_path}/none")) as client:
        with pytest.raises(BrokerUnreachable, match="no broker at") as caught:
            client.call(Info(), timeout_s=3600)
        assert caught.value.exit_code == 3
        assert "ptctl broker start" in caught.value.hint


def test_a_socket_file_that_a_dead_broker_left_is_no_broker(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "stale"))
    with pytest.raises(BrokerUnreachable, match="no broker at"):
        check_listening(f"ipc://{tmp_path}/stale")


def test_a_path_too_long_for_a_socket_is_named() -> None:
    with pytest.raises(BrokerUnreachable, match="too long") as caught:
        check_listening("ipc:///" + "x" * 200)
    assert "PROMPTTUNER_RUN_DIR" in caught.value.hint


def test_nobody_on_the_port_is_told_with_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(BrokerUnreachable, match=address):
        check_listening(address)


def test_a_silent_broker_is_given_up_and_its_late_answer_is_nobody_elses(door: Any) -> None:
    with BrokerClient(Contact(address=door.address)) as client:
        with pytest.raises(BrokerUnreachable, match="did not answer"):
            client.call(Queue(), timeout_s=0.05)
        ((late, _, _),) = arrival(door)
        door.send(late, Requests(rows=[], cluster="late"))
        client.send(Info())
        ((peer, _, message),) = arrival(door)
        assert message == Info()
        door.send(peer, _info("now"))
        reply = client.receive(LIMIT_S)
        assert isinstance(reply, InfoReply)
        assert reply.cluster == "now"


def test_an_update_of_an_earlier_watch_is_not_the_answer_to_a_call(door: Any) -> None:
    with BrokerClient(Contact(address=door.address)) as client:
        client.send(Watch(ids=[1]))
        ((peer, _, _),) = arrival(door)
        for _ in range(2):
            assert door.send(peer, _update())
        assert door.send(peer, _info("answer"))
        until = time.monotonic() + LIMIT_S
        while len(_pending(client)) < 1:
            assert time.monotonic() < until
        assert isinstance(client.call(Info(), timeout_s=LIMIT_S), InfoReply)


def test_a_refusal_becomes_the_same_error_here(door: Any) -> None:
    with BrokerClient(Contact(address=door.address)) as client:
        client.send(Fetch(id=1))
        ((peer, _, _),) = arrival(door)
        door.send(peer, ErrorReply(code="NotFound", message="no such request: 1", hint="ptqueue"))
        with pytest.raises(NotFound) as caught:
            client.call(Fetch(id=1), timeout_s=LIMIT_S)
        assert (caught.value.message, caught.value.hint) == ("no such request: 1", "ptqueue")


def test_a_passing_fault_does_not_end_a_watch_and_a_refusal_does(door: Any) -> None:
    with BrokerClient(Contact(address=door.address)) as client:
        client.send(Watch(ids=[1]))
        ((peer, _, _),) = arrival(door)
        door.send(peer, ErrorReply(code="Transient", message="the journal cannot be written"))
        door.send(peer, _update())
        door.send(peer, ErrorReply(code="NotFound", message="no such request: 1"))
        stream = client.stream(Watch(ids=[1]))
        assert isinstance(next(stream), Update)
        with pytest.raises(NotFound):
            next(stream)


def _pending(client: BrokerClient) -> list[int]:
    return [1] if client._socket.poll(10) else []


def _info(cluster: str) -> InfoReply:
    return InfoReply(
        cluster=cluster,
        version="0",
        backend="local",
        mode="personal",
        pid=1,
        up_since_unix_s=0.0,
        active_requests=0,
        rss_mb=0.0,
        pools=[],
    )


def _update() -> Update:
    fields = {"id": 1, "uid": 1, "user": "alice", "account": "x", "pool": "a", "submit_key": "k", "submit_unix_s": 1.0}
    return Update(row=Request(spec=spec(), **fields).row("local"))
