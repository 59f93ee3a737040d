"""Submitting: what is sent, what is said, and every way to get it wrong."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result

from broker.protocol.messages import ErrorReply, Fetch, FetchReply, Submit, Submitted, Update, Watch
from broker.protocol.rows import RequestRow
from broker.protocol.states import Init, Metric, OnMiss, RequestState, Rule, Schedule, Share
from slurm_plugin.cli import ptbatch

Run = Callable[..., Result]
Row = Callable[..., RequestRow]
ROWS = b'{"input": "a", "target": "b"}\n{"input":"c","target":"\xc3\xa9"}'
CANONICAL = '{"input":"a","target":"b"}\n{"input":"c","target":"é"}\n'.encode()


@pytest.fixture
def train(home: Path) -> str:
    (home / "train.jsonl").write_bytes(ROWS)
    return "train.jsonl"


@pytest.fixture
def accepting(broker: Any) -> Any:
    """A broker that accepts: request 1234, finished in ten seconds."""
    broker.answer = lambda message: Submitted(
        id=0 if message.test_only else 1234,
        predicted_finish_unix_s=time.time() + 10,
        deadline_unix_s=message.spec.deadline_unix_s,
        cluster="lab",
    )
    return broker


def test_a_request_is_sent_whole_and_acknowledged(accepting: Any, run: Run, train: str) -> None:
    result = run("ptbatch", "--model=tiny", f"--train={train}", "--slo=2m")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "Submitted prompt-tuning request 1234\n"
    assert "ptbatch: predicted finish " in result.stderr and "(slack +1:" in result.stderr
    [submit] = accepting.heard
    assert isinstance(submit, Submit)
    digest = sha256(CANONICAL).hexdigest()
    assert submit.blobs == {digest: CANONICAL}
    assert (submit.spec.model, submit.spec.train, submit.spec.eval) == ("tiny", digest, None)
    assert 110 < submit.spec.deadline_unix_s - time.time() <= 120
    assert len(submit.submit_key) == 32


def test_every_option_reaches_the_request(accepting: Any, run: Run, train: str, home: Path) -> None:
    (home / "eval.csv").write_text("input,target\nx,y\n")
    words = "--eval=eval.csv --prompt-tokens=4 --init-text=hello --metric=Accuracy --target-score=0.9 --max-steps=9 "
    words += "--eval-every=3 --batch-size=2 --rate=0.5 --seed=11 --deadline=now+1hour --on-miss=drop --share=account "
    words += "-J name -A teama -p gpu -q high --comment=note --epochs=2.5 --patience=4 --rule=adamw --weight-decay=0.1 "
    words += "--clip-norm=1.5 --schedule=Cosine --warmup-steps=0 --accumulate-steps=3 --max-input-tokens=50 "
    words += "--max-target-tokens=7"
    verbalizer = "Text: {input} {0} {x!r}\n:"
    result = run("ptbatch", "--model=tiny", f"--train={train}", *words.split(), f"--verbalizer={verbalizer}")
    assert result.exit_code == 0, result.stderr
    spec = accepting.heard[0].spec
    assert len(accepting.heard[0].blobs) == 2
    assert (spec.virtual_tokens, spec.init, spec.init_text, spec.metric) == (4, Init.TEXT, "hello", Metric.ACCURACY)
    assert (spec.target_score, spec.max_steps, spec.eval_every, spec.batch_size) == (0.9, 9, 3, 2)
    assert (spec.rate, spec.seed, spec.on_miss, spec.share) == (0.5, 11, OnMiss.DROP, Share.ACCOUNT)
    assert (spec.job_name, spec.account, spec.partition, spec.qos) == ("name", "teama", "gpu", "high")
    assert spec.comment == "note"
    assert (spec.verbalizer, spec.max_input_tokens, spec.max_target_tokens) == (verbalizer, 50, 7)
    assert (spec.rule, spec.weight_decay, spec.clip_norm, spec.schedule) == (Rule.ADAMW, 0.1, 1.5, Schedule.COSINE)
    assert (spec.epochs, spec.patience, spec.warmup_steps, spec.accumulate_steps) == (2.5, 4, 0, 3)
    assert 3590 < spec.deadline_unix_s - time.time() <= 3600


def test_adamw_has_a_rate_of_its_own_unless_told(accepting: Any, run: Run, train: str) -> None:
    for words in ([], ["--rule=adamw"], ["--rule=adamw", "--rate=0.5"]):
        run("ptbatch", "--model=tiny", f"--train={train}", *words)
    assert [submit.spec.rate for submit in accepting.heard] == [0.3, ptbatch.ADAMW_RATE, 0.5]


@pytest.mark.parametrize(
    ("task", "values"),
    [
        ("classification", (Metric.LABEL_ACCURACY, 10, 15, 16)),
        ("Generation", (Metric.LOSS, 10, 10, 8)),
        ("summarization", (Metric.LOSS, 20, 8, 4)),
    ],
)
def test_a_task_chooses_the_defaults_and_help_says_which(
    accepting: Any, run: Run, train: str, task: str, values: tuple[Any, ...]
) -> None:
    result = run("ptbatch", "--model=tiny", f"--train={train}", f"--task={task}")
    assert result.exit_code == 0, result.stderr
    spec = accepting.heard[0].spec
    assert (spec.metric, spec.eval_every, spec.patience, spec.batch_size) == values
    told = " ".join(run("ptbatch", "--help").stdout.split())
    assert f"{task.lower()}: --metric={values[0].value} --eval-every={values[1]} --patience={values[2]}" in told


def test_what_any_source_gives_is_stronger_than_the_task(accepting: Any, run: Run, train: str, home: Path) -> None:
    job = script(home, "#PT --model=tiny --train=train.jsonl --eval-every=3 --task=generation")
    result = run("ptbatch", "--metric=accuracy", "--task=classification", job, env={"PTBATCH_PATIENCE": "99"})
    assert result.exit_code == 0, result.stderr
    spec = accepting.heard[0].spec
    assert (spec.metric, spec.eval_every, spec.patience, spec.batch_size) == (Metric.ACCURACY, 3, 99, 16)


def test_a_tasks_metric_bounds_the_target(accepting: Any, run: Run, train: str) -> None:
    for words in ("--task=classification --target-score=1.5", "--task=translation"):
        assert run("ptbatch", *BASE, *words.split()).exit_code == 2
    assert accepting.heard == []


def test_epochs_are_as_many_steps_as_they_can_be_at_most(accepting: Any, run: Run, home: Path) -> None:
    (home / "many.jsonl").write_bytes(b'{"input": "a", "target": "b"}\n' * 20)
    for words in ("--epochs=3", "--epochs=3 --batch-size=2 --accumulate-steps=2", "--epochs=3 --batch-size=99",
                  "--epochs=0.01", "--epochs=1000000", "--epochs=3 --max-steps=5"):  # fmt: skip
        result = run("ptbatch", "--model=tiny", "--train=many.jsonl", *words.split())
        assert result.exit_code == 0, result.stderr
    assert [submit.spec.max_steps for submit in accepting.heard] == [8, 15, 3, 1, 1_000_000, 5]


def test_parsable_prints_the_id_alone_and_quiet_nothing(accepting: Any, run: Run, train: str) -> None:
    assert run("ptbatch", "--model=tiny", f"--train={train}", "--parsable").stdout == "1234\n"
    quiet = run("ptbatch", "--model=tiny", f"--train={train}", "-Q")
    assert (quiet.stdout, quiet.stderr, quiet.exit_code) == ("", "", 0)


def test_json_is_one_document_in_slurms_envelope(accepting: Any, run: Run, train: str) -> None:
    document = json.loads(run("ptbatch", "--model=tiny", f"--train={train}", "--json").stdout)
    assert document["schema"] == "pt/1" and document["errors"] == [] and document["meta"]["cluster"] == "lab"
    assert document["requests"][0]["id"] == 1234


def test_only_tests(accepting: Any, run: Run, train: str) -> None:
    result = run("ptbatch", "--model=tiny", f"--train={train}", "--test-only")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "this request could run" in result.stderr
    assert accepting.heard[0].test_only


def test_a_deadline_that_will_be_missed_is_a_warning(broker: Any, run: Run, train: str) -> None:
    broker.answer = lambda m: Submitted(
        id=1, predicted_finish_unix_s=m.spec.deadline_unix_s + 60, deadline_unix_s=m.spec.deadline_unix_s, cluster=""
    )
    result = run("ptbatch", "--model=tiny", f"--train={train}", "--slo=5s")
    assert result.exit_code == 0
    assert "ptbatch: warning: the deadline will likely be missed" in result.stderr


def test_the_brokers_refusal_is_told_with_its_exit_code(broker: Any, run: Run, train: str) -> None:
    broker.answer = lambda m: ErrorReply(code="Refused", message="no model 'tiny'", hint="models here: big")
    result = run("ptbatch", "--model=tiny", f"--train={train}")
    assert result.exit_code == 4
    assert result.stderr == "ptbatch: error: no model 'tiny'\nptbatch: models here: big\n"


def test_without_a_broker_it_says_how_to_start_one(home: Path, run: Run, train: str) -> None:
    result = run("ptbatch", "--model=tiny", f"--train={train}")
    assert result.exit_code == 3
    assert f"ipc://{home}/run/broker.sock" in result.stderr
    assert "start one with: ptctl broker start" in result.stderr


def test_a_broker_of_another_version_is_told_apart(home: Path, run: Run, train: str) -> None:
    import threading

    import zmq

    (home / "run").mkdir(mode=0o700)
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(f"ipc://{home}/run/broker.sock")

    def answer() -> None:
        peer = router.recv_multipart()[0]
        router.send_multipart([peer, b"PT9", b""])

    thread = threading.Thread(target=answer)
    thread.start()
    result = run("ptbatch", "--model=tiny", f"--train={train}")
    thread.join(timeout=10)
    router.close(linger=0)
    assert result.exit_code == 3
    assert "protocol version 9" in result.stderr


def test_silence_is_answered_by_the_same_submission_again(
    broker: Any, run: Run, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from broker.net.client import BrokerClient

    call = BrokerClient.call
    monkeypatch.setattr(BrokerClient, "call", lambda self, message: call(self, message, timeout_s=0.2))
    monkeypatch.setattr(ptbatch, "RETRY_PAUSE_S", 0.01)
    done = Submitted(id=5, predicted_finish_unix_s=None, deadline_unix_s=None, cluster="")
    broker.answer = lambda m: done if len(broker.heard) == 2 else None
    result = run("ptbatch", "--model=tiny", f"--train={train}")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "Submitted prompt-tuning request 5\n"
    first, second = broker.heard
    assert first == second
    broker.answer = lambda m: None
    result = run("ptbatch", "--model=tiny", f"--train={train}")
    assert result.exit_code == 3
    assert "it may have been accepted all the same" in result.stderr


# --- precedence -------------------------------------------------------------------------------------------------------


def script(home: Path, *lines: str) -> str:
    (home / "job.sh").write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return "job.sh"


def test_command_line_beats_environment_beats_pt_beats_sbatch(accepting: Any, run: Run, train: str, home: Path) -> None:
    job = script(
        home,
        "#SBATCH --account=s --qos=s --comment=s -J s",
        "#PT --account=p --qos=p --comment=p  # a comment",
        "#PT --model=tiny --train=train.jsonl",
    )
    result = run("ptbatch", "--account=c", job, env={"PTBATCH_ACCOUNT": "e", "PTBATCH_QOS": "e"})
    assert result.exit_code == 0, result.stderr
    spec = accepting.heard[0].spec
    assert (spec.account, spec.qos, spec.comment, spec.job_name) == ("c", "e", "p", "s")


def test_ignore_sbatch_leaves_those_lines_out(accepting: Any, run: Run, train: str, home: Path) -> None:
    job = script(home, "#SBATCH --account=s", "#SBATCH --array=0-3", "#PT --model=tiny --train=train.jsonl")
    assert run("ptbatch", "--ignore-sbatch", job).exit_code == 0
    assert accepting.heard[0].spec.account is None
    assert accepting.heard[0].spec.job_name == "job.sh"


def test_a_stronger_slo_replaces_a_weaker_deadline(accepting: Any, run: Run, train: str, home: Path) -> None:
    job = script(home, "#SBATCH --deadline=now+9hours", "#PT --slo=60 --model=tiny --train=train.jsonl")
    assert run("ptbatch", job).exit_code == 0
    assert run("ptbatch", job, "--deadline=now+30").exit_code == 0
    hour, half_minute = (message.spec.deadline_unix_s - time.time() for message in accepting.heard)
    assert 3500 < hour <= 3600 and 0 < half_minute <= 30


def test_a_script_comes_from_standard_input_too(accepting: Any, run: Run, train: str) -> None:
    text = "#!/bin/sh\n#PT --model=tiny\n#PT --train=train.jsonl --comment='two words # not a comment'\n"
    assert run("ptbatch", "-", input=text).exit_code == 0
    assert accepting.heard[0].spec.comment == "two words # not a comment"


def test_a_redirected_script_is_read_but_a_loops_input_is_left_alone(accepting: Any, home: Path, train: str) -> None:
    job = script(home, "#PT --model=tiny --train=train.jsonl --comment=redirected")
    command = [str(Path(sys.executable).parent / "ptbatch"), "--parsable"]
    with open(job) as stdin:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("1234\n", 0), done.stderr
    loop = f'while read -r f; do "{command[0]}" --parsable --model=tiny --train="$f"; done < list'
    (home / "list").write_text("train.jsonl\ntrain.jsonl\n")
    done = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1234\n1234\n", done.stderr


def test_chdir_moves_the_relative_names(accepting: Any, run: Run, train: str, home: Path) -> None:
    (home / "sub").mkdir()
    (home / "sub" / "x.jsonl").write_bytes(ROWS)
    assert run("ptbatch", "-D", "sub", "--model=tiny", "--train=x.jsonl").exit_code == 0


@pytest.mark.parametrize(("value", "waits"), [("", True), ("yes", True), ("2", True), ("0", False), ("no", False)])
def test_flags_of_the_environment_mean_what_sbatchs_mean(
    accepting: Any, run: Run, train: str, value: str, waits: bool
) -> None:
    result = run("ptbatch", "--model=tiny", f"--train={train}", env={"PTBATCH_QUIET": value})
    assert (result.stdout == "") is waits


def test_unread_variables_and_sbatch_lines_are_told(accepting: Any, run: Run, train: str, home: Path) -> None:
    job = script(home, "#SBATCH --nodes=2 -t 10 -A s", "#SBATCH --no-such", "#PT --model=tiny --train=train.jsonl")
    result = run("ptbatch", "-v", job, env={"PTBATCH_MODELL": "x"})
    assert result.exit_code == 0
    assert "ptbatch: warning: PTBATCH_MODELL in the environment sets no option" in result.stderr
    assert "job.sh:2: #SBATCH --nodes has no meaning for a request" in result.stderr
    assert "job.sh:3: '#SBATCH --no-such' has no meaning for a request" in result.stderr
    assert accepting.heard[0].spec.account == "s"


# --- bad input: one message, its exit code, nothing sent --------------------------------------------------------------


BASE = ("--model=tiny", "--train=train.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--modle=x",), "No such option '--modle'. Did you mean '--model'?\n"),
        (("--train=train.jsonl",), "--model is missing"),
        (("--model=tiny",), "--train is missing"),
        ((*BASE, "--array=0-3"), "-a/--array is not supported yet"),
        ((*BASE, "-H"), "-H/--hold is not supported yet"),
        ((*BASE, "-d", "afterok:1"), "-d/--dependency is not supported yet"),
        ((*BASE, "--mail-type=END"), "--mail-type is not supported yet"),
        ((*BASE, "-t", "10"), "-t/--time is not supported yet"),
        ((*BASE, "--nodes=2"), "-N/--nodes is not for a request: the site's pools say which nodes"),
        ((*BASE, "--gres=gpu:1"), "--gres is not for a request"),
        ((*BASE, "--wrap=hostname"), "--wrap is not for a request: ptbatch trains a prompt and runs no commands"),
        ((*BASE, "--slo=5x"), "Invalid value for '--slo': not a duration: '5x'"),
        ((*BASE, "--slo=0"), "sets no deadline"),
        ((*BASE, "--slo=0s"), "sets no deadline"),
        ((*BASE, "--slo=-5"), "not a duration: '-5'"),
        ((*BASE, "--slo=1", "--deadline=now+1"), "--slo and --deadline exclude each other"),
        ((*BASE, "--on-miss=drop"), "--on-miss=drop without a deadline"),
        ((*BASE, "--deadline=2020-01-01"), "the deadline 2020-01-01T00:00:00 is in the past"),
        ((*BASE, "--deadline=someday"), "Invalid value for '--deadline': not a time: 'someday'"),
        ((*BASE, "--max-steps=0"), "0 is not in the range 1<=x<=1000000"),
        ((*BASE, "--max-steps=many"), "'many' is not a valid int"),
        ((*BASE, "--rate=nan"), "Invalid value for '--rate': 'nan' is not a finite number"),
        ((*BASE, "--epochs=nan"), "Invalid value for '--epochs': 'nan' is not a finite number"),
        ((*BASE, "--rate=0"), "0.0 is not in the range 0<x<=100"),
        ((*BASE, "--on-miss=perhaps"), "'perhaps' is not one of"),
        ((*BASE, "--init=text"), "--init=text needs --init-text"),
        ((*BASE, "--init=random", "--init-text=x"), "exclude each other"),
        ((*BASE, "--metric=accuracy", "--target-score=90"), "--target-score=90 cannot be reached"),
        ((*BASE, "--metric=label_accuracy", "--target-score=90"), "an accuracy is 0..1"),
        ((*BASE, "--verbalizer=Text:"), "--verbalizer has no {input}"),
        ((*BASE, "--verbalizer="), "--verbalizer has no {input}"),
        ((*BASE, "--verbalizer={input} {input}"), "--verbalizer has {input} 2 times"),
        ((*BASE, "--verbalizer={input}" + "x" * 4090), "--verbalizer has 4097 characters, and 4096 are the most"),
        ((*BASE, "--verbalizer={input}\x1b"), "control characters"),
        ((*BASE, "--max-input-tokens=0"), "0 is not in the range"),
        ((*BASE, "--max-target-tokens=0"), "0 is not in the range"),
        ((*BASE, "--target-score=nan"), "--target-score=nan cannot be reached"),
        ((*BASE, "--job-name=a\nb"), "--job-name='a\\nb': control characters and empty words are not allowed"),
        ((*BASE, "--comment=" + "x" * 5000), "expected str of length <= 4096"),
        ((*BASE, "--output=out"), "--output needs --wait"),
        ((*BASE, "--wait", "--output=missing/out"), "its parent folder does not exist"),
        ((*BASE, "--wait", "--output=full"), "is there already and not empty"),
        ((*BASE, "--wait", "--output=train.jsonl"), "is there already and no folder"),
        ((*BASE, "--chdir=nowhere"), "--chdir=nowhere: No such file or directory"),
        ((*BASE, "no-script.sh"), "unable to open file no-script.sh"),
        (("good.sh", "argument"), "unexpected argument 'argument'"),
    ],
)
def test_a_wrong_call_is_told_and_sends_nothing(
    accepting: Any, run: Run, train: str, home: Path, words: tuple[str, ...], message: str
) -> None:
    (home / "full").mkdir()
    (home / "full" / "file").touch()
    script(home, "#PT --model=tiny --train=train.jsonl")
    (home / "job.sh").rename(home / "good.sh")
    result = run("ptbatch", *words)
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith("ptbatch: error: ")
    assert message in result.stderr
    assert result.stdout == "" and accepting.heard == []


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("PTBATCH_ARRAY_INX", "PTBATCH_ARRAY_INX is set in the environment: -a/--array is not supported yet"),
        ("PTBATCH_TIMELIMIT", "-t/--time is not supported yet"),
        ("PTBATCH_MAIL_TYPE", "--mail-type is not supported yet"),
        ("PTBATCH_WAIT", "a flag is set by 'yes' or 1"),
    ],
)
def test_the_environment_is_held_to_the_same(accepting: Any, run: Run, train: str, variable: str, message: str) -> None:
    result = run("ptbatch", *BASE, env={variable: "maybe"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert accepting.heard == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"#PT --model=tiny\n", "this does not look like a batch script"),
        (b"", "this does not look like a batch script"),
        (b"#!/bin/sh\r\n#PT --model=tiny\r\n", "DOS line breaks"),
        (
            b"#!/bin/sh\n#PT --model=tiny\npython x.py\n",
            "job.sh:3: a command, and ptbatch runs none: 'python x.py'",
        ),
        (b"#!/bin/sh\n#PT --modle=tiny\n", "job.sh:2: No such option '--modle'"),
        (b"#!/bin/sh\n\n#PT --max-steps=many\n", "job.sh:3: Invalid value for '--max-steps'"),
        (b"#!/bin/sh\n#PT --model\n", "job.sh:2: Option '--model' requires an argument"),
        (b"#!/bin/sh\n#PT --hold\n", "job.sh:2: -H/--hold is not supported yet"),
        (b"#!/bin/sh\n#PT --nodes=2\n", "job.sh:2: -N/--nodes is not for a request"),
        (b"#!/bin/sh\n#PT stray --model=x\n", "job.sh:2: unexpected word 'stray'"),
        (b"#!/bin/sh\n#PT --comment='open\n", "job.sh:2: a quote is not closed"),
        (b"#!/bin/sh\n#PT --version\n", "job.sh:2: --version stands on the command line only"),
        (b"#!/bin/sh\n#SBATCH --array=1-4\n", "job.sh:2: -a/--array is not supported yet"),
        (b"#!/bin/sh\n#SBATCH --dependency=afterok:1\n", "job.sh:2: -d/--dependency is not supported yet"),
        (b"#!/bin/sh\n" + b"# filling\n" * 4000 + b"#PT --model=x\n", "#PT after the first 32 KiB is not read"),
        (b"#!/bin/sh\n#PT --comment=\xff\n", "not UTF-8: byte 24"),
        (b"#!/bin/sh\n" + b"#" * (5 << 20), "larger than 4 MiB"),
    ],
)
def test_a_wrong_script_is_told_by_its_line(accepting: Any, run: Run, home: Path, text: bytes, message: str) -> None:
    (home / "job.sh").write_bytes(text)
    result = run("ptbatch", "job.sh")
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert accepting.heard == []


def test_bad_data_names_its_line_and_sends_nothing(accepting: Any, run: Run, home: Path) -> None:
    (home / "bad.jsonl").write_text('{"input": "a", "target": "b"}\n{"input": "a"}\n')
    result = run("ptbatch", "--model=tiny", "--train=bad.jsonl")
    assert result.exit_code == 1
    assert "ptbatch: error: bad.jsonl:2: the field 'target' is missing" in result.stderr
    assert accepting.heard == []


# --- waiting ----------------------------------------------------------------------------------------------------------


FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0\1", "prompttuner.json": b"{}"}


def serving(rows: list[RequestRow], files: dict[str, bytes] | None = None) -> Callable[[Any], Any]:
    def answer(message: Any) -> Any:
        if isinstance(message, Submit):
            return Submitted(id=7, predicted_finish_unix_s=None, deadline_unix_s=None, cluster="lab")
        if isinstance(message, Watch):
            assert message.ids == [7]
            return [Update(row=row) for row in rows]
        assert isinstance(message, Fetch)
        return FetchReply(id=7, files=FILES if files is None else files)

    return answer


def test_wait_shows_progress_and_writes_the_folder_as_the_user(
    broker: Any, run: Run, row: Row, train: str, home: Path
) -> None:
    end = row(state=RequestState.COMPLETED, end_unix_s=1012.0, deadline_unix_s=1100.0)
    broker.answer = serving([row(state=RequestState.PENDING, reason="ColdStart"), row(), end])
    old = os.umask(0o077)
    try:
        result = run("ptbatch", *BASE, "--wait", "--output=out")
    finally:
        os.umask(old)
    assert result.exit_code == 0, result.stderr
    assert "request 7 PENDING (ColdStart)" in result.stderr
    assert "request 7 RUNNING step 35/250 loss 0.25" in result.stderr
    assert "request 7 COMPLETED after 00:00:12, 35 steps, loss 0.25, deadline met (slack +1:28)" in result.stderr
    assert {path.name: path.read_bytes() for path in (home / "out").iterdir()} == FILES
    assert stat.S_IMODE((home / "out" / "prompttuner.json").stat().st_mode) == 0o600
    assert sorted(path.name for path in home.iterdir()) == ["out", "run", "train.jsonl"]


def test_an_empty_folder_and_a_link_to_one_may_be_filled(
    broker: Any, run: Run, row: Row, train: str, home: Path
) -> None:
    broker.answer = serving([row(state=RequestState.COMPLETED)])
    (home / "real").mkdir()
    (home / "link").symlink_to("real")
    assert run("ptbatch", *BASE, "--wait", "-o", "link").exit_code == 0
    assert (home / "link").is_symlink()
    assert sorted(os.listdir(home / "real")) == sorted(FILES)


@pytest.mark.parametrize("state", [RequestState.FAILED, RequestState.CANCELLED, RequestState.DEADLINE])
def test_the_exit_code_is_the_requests(
    broker: Any, run: Run, row: Row, train: str, home: Path, state: RequestState
) -> None:
    broker.answer = serving([row(state=state, error="out of luck\ntry again")])
    result = run("ptbatch", *BASE, "--wait", "--output=out", "-Q")
    assert result.exit_code == 1
    assert f"ptbatch: error: request 7 {state.value}" in result.stderr and "out of luck; try again\n" in result.stderr
    assert not (home / "out").exists()


@pytest.mark.parametrize("name", ["../escape", "/etc/x", "", ".hidden", "a/b", "a\0b", "-x"])
def test_a_result_never_leaves_its_folder(broker: Any, run: Run, row: Row, train: str, home: Path, name: str) -> None:
    broker.answer = serving([row(state=RequestState.COMPLETED)], {name: b"x"})
    result = run("ptbatch", *BASE, "--wait", "--output=out")
    assert result.exit_code == 1
    assert "the broker sent a file with the name" in result.stderr
    assert sorted(path.name for path in home.iterdir()) == ["run", "train.jsonl"]


def test_an_interrupt_leaves_the_request_running_and_says_so(broker: Any, row: Row, train: str, home: Path) -> None:
    broker.answer = serving([row()])
    command = [str(Path(sys.executable).parent / "ptbatch"), *BASE, "--wait"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    while "RUNNING" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "request 7 goes on: ptattach 7 follows it, ptcancel 7 ends it" in rest
    assert "Traceback" not in rest
    assert all(type(message).__name__ != "Cancel" for message in broker.heard)


def test_every_request_option_has_its_bounds_from_the_protocol() -> None:
    """The command's ranges and the protocol's are written twice: here they are held together."""
    from broker.protocol.spec import RequestSpec

    names = {"virtual_tokens": "prompt_tokens"}
    params = {param.name: param for param in ptbatch.main.params}
    info = {field.name: field for field in msgspec.inspect.type_info(RequestSpec).fields}  # type: ignore[attr-defined]
    checked = 0
    for name, field in info.items():
        low, high = getattr(field.type, "ge", None), getattr(field.type, "le", None)
        kind = getattr(params.get(names.get(name, name)), "type", None)
        if high is not None and hasattr(kind, "max"):
            assert kind.max == high, name
            assert kind.min == (getattr(field.type, "gt", None) if low is None else low), name
            checked += 1
    assert checked >= 6
