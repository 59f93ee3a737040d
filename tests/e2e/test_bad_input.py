"""Every mistake gets one clear message and its exit code, and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import zmq

from broker.protocol.messages import ErrorReply, Info, client_reply_decoder, pack, unpack
from tests.embedded import Embedded, local_site
from tests.site import WORLD

TINY = WORLD / "tiny"
GOOD = WORLD / "tasks" / "copy-cities-plain.train.jsonl"
ROW = '{"input": "a b", "target": "c"}\n'


@pytest.fixture(scope="module")
def home() -> Iterator[Embedded]:
    """A broker whose pool has no floor: nothing runs unless a request was taken."""
    home = Embedded(local_site(TINY, workers=1, floor=0))
    try:
        home.start()
        yield home
    finally:
        home.down()


@pytest.fixture
def nobody() -> Iterator[Embedded]:
    """An environment without a broker."""
    home = Embedded()
    yield home
    home.down()


def journal(home: Embedded) -> str:
    with sqlite3.connect(f"file:{home.state_dir / 'journal.sqlite'}?mode=ro", uri=True) as connection:
        return "\n".join(connection.iterdump())


def refused(home: Embedded, code: int, command: str, *words: str, **more: str | None) -> str:
    """Ends with `code`, says nothing on standard output and one error on standard error, which is returned."""
    done = home.run(command, *words, code=code, input=more.get("input"), timeout=60)
    assert done.stdout == ""
    assert f"{command}: error: " in done.stderr and "Traceback" not in done.stderr
    return done.stderr


# --- what ptbatch is given ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    words: list[str]
    code: int
    said: list[str]
    script: str | None = None
    trained: bool = True  # --model and --train are given too


CASES = {
    "unknown option": Case(["--frobnicate=1"], 2, ["--frobnicate"]),
    "option of sbatch": Case(["--array=1-3"], 2, ["--array", "not supported yet"]),
    "unknown directive": Case(["-"], 2, ["standard input:2", "--frobnicate"], "#!/bin/sh\n#PT --frobnicate=1\n"),
    "command in a script": Case(["-"], 2, ["standard input:3", "runs none"], "#!/bin/sh\n#PT -J x\nrm -rf data\n"),
    "no model": Case([f"--train={GOOD}"], 2, ["--model is missing"], None, False),
    "no data": Case(["--model=tiny"], 2, ["--train is missing"], None, False),
    "unknown model": Case(["--model=tinny"], 4, ["unknown model: tinny", "did you mean tiny?"]),
    "unknown account": Case(["--account=nobodys"], 4, ["account nobodys", "default"]),
    "unknown partition": Case(["--partition=nowhere"], 4, ["partition nowhere", "local"]),
    "unknown qos": Case(["--qos=gold"], 4, ["QOS gold"]),
    "deadline in the past": Case(["--deadline=2001-01-31T12:00"], 2, ["2001-01-31T12:00:00", "in the past"]),
    "deadline that is no time": Case(["--deadline=soon"], 2, ["soon"]),
    "slo that is no time": Case(["--slo=soon"], 2, ["soon"]),
    "slo of nothing": Case(["--slo=0"], 2, ["sets no deadline"]),
    "two deadlines": Case(["--slo=5m", "--deadline=now+1hour"], 2, ["exclude each other"]),
    "no virtual tokens": Case(["--prompt-tokens=0"], 2, ["--prompt-tokens"]),
    "accuracy above 1": Case(["--metric=accuracy", "--target-score=1.5"], 2, ["cannot be reached", "0..1"]),
    "text start without a text": Case(["--init=text"], 2, ["--init-text"]),
    "output without waiting": Case(["--output=out"], 2, ["--output needs --wait"]),
    "output that is there": Case(["--wait", "--output=."], 2, ["is there already"]),
    "control characters in a name": Case(["--job-name=a\tb"], 2, ["--job-name"]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_wrong_call_is_told_and_changes_nothing(home: Embedded, case: Case) -> None:
    before = journal(home)
    words = (["--model=tiny", f"--train={GOOD}"] if case.trained else []) + case.words
    said = refused(home, case.code, "ptbatch", *words, input=case.script)
    assert [part for part in case.said if part not in said] == [], said
    unchanged(home, before)


def unchanged(home: Embedded, before: str) -> None:
    assert home.json("ptqueue")["requests"] == [] and home.allocations() == []
    assert journal(home) == before


def write(content: str | bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def endless_line(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"target": "c", "input": "')
        for _ in range(100):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n')


DATA: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "missing": (lambda path: None, "x.jsonl", ["cannot be read: No such file"]),
    "empty": (write(""), "x.jsonl", ["no rows"]),
    "blank": (write("\n\n"), "x.jsonl", ["no rows"]),
    "not json": (write(ROW + "input: a\n"), "x.jsonl", [":2: not JSON"]),
    "no object": (write(ROW + "[1]\n"), "x.jsonl", [":2: a list"]),
    "missing field": (write(ROW + '{"input": "a"}\n'), "x.jsonl", [":2: ", "'target' is missing"]),
    "number for text": (write('{"input": "a", "target": 7}\n'), "x.jsonl", [":1: ", "'target' is a number"]),
    "empty target": (write('{"input": "a", "target": ""}\n'), "x.jsonl", [":1: ", "target is empty"]),
    "not utf-8": (write(ROW.encode() + b'{"input": "\xe9", "target": "c"}\n'), "x.jsonl", [":2: not UTF-8", "0xe9"]),
    "binary": (write(b"\0" * 4096), "x.jsonl", ["NUL byte"]),
    "line of 100 MB": (endless_line, "x.jsonl", [":1: a line longer than 1 MiB"]),
    "csv without a column": (write("input,label\na,b\n"), "x.csv", ["'target' is missing in the header"]),
    "csv with ragged rows": (write("input,target\na,b,c\n"), "x.csv", [":2: 3 fields"]),
    "directory": (Path.mkdir, "x.jsonl", ["not a regular file"]),
    "fifo": (os.mkfifo, "x.jsonl", ["not a regular file"]),
    "device": (lambda path: path.symlink_to("/dev/zero"), "x.jsonl", ["not a regular file"]),
}


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("name", DATA)
def test_wrong_data_is_told_with_file_and_line(home: Embedded, tmp_path: Path, name: str, part: str) -> None:
    make, file_name, parts = DATA[name]
    path = tmp_path / file_name
    make(path)
    before = journal(home)
    words = [f"--{part}={path}"] + ([f"--train={GOOD}"] if part == "eval" else [])
    said = refused(home, 1, "ptbatch", "--model=tiny", *words)
    assert [expected for expected in (str(path), *parts) if expected not in said] == [], said
    unchanged(home, before)


def test_data_beyond_the_sites_limit_is_refused_before_it_is_sent(home: Embedded, tmp_path: Path) -> None:
    row = json.dumps({"input": "a" * 500_000, "target": "c"}) + "\n"
    path = tmp_path / "large.jsonl"
    path.write_text(row * 40)
    assert "more than 16 MiB" in refused(home, 1, "ptbatch", "--model=tiny", f"--train={path}")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ptfetch", ["12345"]),
        ("ptattach", ["12345"]),
        ("ptcancel", ["12345"]),
        ("ptqueue", ["-j", "12345"]),
        ("ptacct", ["-j", "12345"]),
    ],
)
def test_an_unknown_request_is_told(home: Embedded, command: str, words: list[str]) -> None:
    assert "12345" in refused(home, 6, command, *words)
    refused(home, 2, command, *words[:-1], "twelve")
    refused(home, 2, command, "--frobnicate")


# --- what the broker is given ---------------------------------------------------------------------------------------


def model_folder(path: Path, without: tuple[str, ...] = (), **config: object) -> Path:
    shutil.copytree(TINY, path, ignore=shutil.ignore_patterns(*without))
    if config:
        values = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**values, **config}))
    return path


def test_a_model_that_is_not_there_starts_no_broker(nobody: Embedded, tmp_path: Path) -> None:
    said = refused(nobody, 1, "ptctl", "broker", "start", f"--model=tiny={tmp_path / 'gone'}")
    assert str(tmp_path / "gone") in said and "holds no config.json" in said
    refused(nobody, 1, "ptctl", "broker", "start", "--model=tiny")
    refused(nobody, 1, "ptctl", "broker", "start")
    assert not (nobody.state_dir / "journal.sqlite").exists()


@pytest.mark.parametrize(
    ("without", "config", "said"),
    [
        (
            (),
            {"model_type": "t5", "architectures": ["T5Model"], "is_encoder_decoder": True},
            "no causal language model",
        ),
        ((), {"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no causal language model"),
        (("tokenizer*",), {}, "tokenizer"),
        (("*.safetensors",), {}, "weights"),
    ],
    ids=["encoder and decoder", "masked model", "no tokenizer", "no weights"],
)
def test_a_folder_that_is_no_whole_causal_model_starts_no_broker(
    nobody: Embedded, tmp_path: Path, without: tuple[str, ...], config: dict[str, object], said: str
) -> None:
    folder = model_folder(tmp_path / "model", without, **config)
    told = refused(nobody, 1, "ptctl", "broker", "start", f"--model=tiny={folder}")
    assert str(folder) in told and said in told
    assert not (nobody.state_dir / "journal.sqlite").exists()


def test_all_mistakes_of_a_site_file_are_told_at_once(nobody: Embedded) -> None:
    file = nobody.dir / "site.toml"
    lines = [
        'mode = "personl"',
        "[limits]",
        'heartbeat = "soon"',
        "[models.tiny]",
        f'path = "{nobody.dir}/gone"',
        "[pools.tiny]",
        'model = "tiny"',
        "max_worker = 3",
        "[pools.other]",
        'model = "tinny"',
    ]
    file.write_text("\n".join(lines))
    for words in (["check", str(file)], ["broker", "start", f"--site={file}"]):
        said = nobody.run("ptctl", *words, code=1)
        text = said.stdout + said.stderr
        for line, part in (
            (1, "personl"),
            (3, "soon"),
            (5, "holds no config.json"),
            (8, "did you mean max_workers?"),
            (10, "tinny"),
        ):
            assert f"{file}:{line}: " in text and part in text, text
        assert "Traceback" not in text
    assert not (nobody.state_dir / "journal.sqlite").exists()


def test_a_state_directory_has_one_broker(home: Embedded) -> None:
    before = home.broker_pid
    assert str(before) in refused(home, 4, "ptctl", "broker", "start")
    other_run = home.run("ptctl", "broker", "start", env={"PROMPTTUNER_RUN_DIR": str(home.dir / "run2")}, code=1)
    assert f"another broker (pid {before})" in other_run.stderr
    home.run("ptctl", "broker", "status")
    assert home.broker_pid == before


def test_a_run_directory_that_others_may_enter_is_refused(home: Embedded) -> None:
    open_dir = home.dir / "open"
    open_dir.mkdir(mode=0o755)
    open_dir.chmod(0o755)
    done = home.run("ptqueue", env={"PROMPTTUNER_RUN_DIR": str(open_dir)}, code=5)
    assert str(open_dir) in done.stderr and "chmod 0700" in done.stderr


# --- what comes over the wire ---------------------------------------------------------------------------------------


@pytest.fixture
def newer_broker(nobody: Embedded) -> Iterator[Embedded]:
    """Something that answers as a broker of protocol version 9 does."""
    run = Path(nobody.env["PROMPTTUNER_RUN_DIR"])
    run.mkdir(mode=0o700)
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.linger = 0
    router.bind(f"ipc://{run / 'broker.sock'}")
    stopped = threading.Event()

    def answer() -> None:
        while not stopped.is_set():
            if router.poll(100):
                router.send_multipart([router.recv_multipart()[0], b"PT9", b"\xc1"])

    thread = threading.Thread(target=answer)
    thread.start()
    yield nobody
    stopped.set()
    thread.join()
    router.close()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ptbatch", ["--model=tiny", f"--train={GOOD}"]),
        ("ptqueue", []),
        ("ptinfo", []),
        ("ptacct", []),
        ("ptcancel", ["1"]),
        ("ptfetch", ["1"]),
        ("ptattach", ["1"]),
        ("ptctl", ["broker", "status"]),
    ],
)
def test_a_broker_of_another_version_is_told(newer_broker: Embedded, command: str, words: list[str]) -> None:
    said = refused(newer_broker, 3, command, *words)
    assert "protocol version 9" in said and "one release" in said


def test_the_broker_answers_other_versions_and_outlives_garbage(home: Embedded) -> None:
    before = journal(home)
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(f"ipc://{home.dir / 'run' / 'broker.sock'}")
    with dealer:
        for frames, code in (
            ([b"PT9", pack(Info())[1], b""], "Version"),
            ([b"GET / HTTP/1.1"], "Error"),
            ([b"PT1", b"\xc1", b""], "Error"),
            ([b"PT1", b"\x81\xa4type\xa4Nope", b""], "Error"),
        ):
            dealer.send_multipart(frames)
            assert dealer.poll(10_000), f"no answer to {frames}"
            reply = unpack(dealer.recv_multipart(), client_reply_decoder)
            assert isinstance(reply, ErrorReply) and reply.code == code
    unchanged(home, before)
