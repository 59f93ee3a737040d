"""Tracer steps with a stand-in for srun: a real executable that does what a test wants."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner import steps as module
from tuner.steps import Key, Steps, step_environment, step_name

LIMIT_S = 60.0
WORKING = "echo 77.$$; read code || code=9; echo $code >> codes; exit $code"


class Bench:
    """Drives `Steps` as the supervisor does."""

    def __init__(self, folder: Path, script: str, slots: int = 4) -> None:
        self.folder = folder
        self.srun = folder / "srun"
        self.rewrite(script)
        self.known: list[tuple[Key, str]] = []
        self.steps = Steps(str(self.srun), "77", slots, os.environ)

    def rewrite(self, script: str) -> None:
        fresh = self.folder / "srun.new"
        fresh.write_text(f'#!/bin/sh\ncd {self.folder}\necho "$@" >> calls\n{script}\n')
        fresh.chmod(0o755)
        fresh.rename(self.srun)

    def start(self, request_id: int, user: str = "alice") -> None:
        self.steps.start(request_id, 1, user, time.monotonic())

    def end(self, request_id: int, ok: bool) -> None:
        self.steps.end(request_id, 1, ok, time.monotonic())

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def turn(self) -> None:
        due_s = self.steps.due_s()
        wait_s = 0.1 if due_s is None else min(0.1, max(0.0, due_s - time.monotonic()))
        select.select(self.steps.descriptors(), [], [], wait_s)
        self.known += self.steps.advance(time.monotonic())

    def until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not reached():
            assert time.monotonic() < deadline, "not reached"
            self.turn()

    def until_done(self) -> None:
        self.until(lambda: self.steps.due_s() is None and not self.steps.descriptors())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CREATE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    monkeypatch.setattr(module, "KILL_AFTER_S", 0.2)


def test_a_step_lives_as_long_as_its_request_and_ends_as_it_does(tmp_path: Path) -> None:
    bench = Bench(tmp_path, WORKING)
    bench.start(1)
    bench.start(2)
    bench.until(lambda: len(bench.known) == 2)
    assert {key for key, _ in bench.known} == {(1, 1), (2, 1)}
    assert all(step_id.startswith("77.") for _, step_id in bench.known)
    assert bench.lines("codes") == []
    bench.end(1, ok=True)
    bench.until(lambda: bench.lines("codes") == ["0"])
    bench.end(2, ok=False)
    bench.until(lambda: bench.lines("codes") == ["0", "1"])
    bench.until_done()


def test_a_request_that_ends_before_its_step_is_made_still_shows(tmp_path: Path) -> None:
    bench = Bench(tmp_path, WORKING)
    bench.start(1)
    bench.end(1, ok=True)
    bench.until(lambda: bench.lines("codes") == ["0"])


def test_no_word_of_a_user_reaches_a_shell(tmp_path: Path) -> None:
    bench = Bench(tmp_path, WORKING)
    bench.start(7, user="$(touch /x); a b")
    bench.until(lambda: bool(bench.known))
    [call] = bench.lines("calls")
    assert "--job-name=req-7.__touch__x___a_b " in call
    assert call.endswith("/bin/sh -c " + module.SCRIPT)
    assert "--jobid=77 --overlap --gres=none --mem=0 -N1 -n1 -c1 " in call
    bench.steps.close(LIMIT_S)


def test_names_are_bounded() -> None:
    assert step_name(3, "") == "req-3."
    assert len(step_name(3, "x" * 1000)) < 80


def test_the_surrounding_steps_options_are_not_inherited() -> None:
    env = {"SLURM_CONF": "/c", "SLURM_MEM_PER_CPU": "1", "SRUN_X": "1", "SBATCH_Y": "1", "CUDA_VISIBLE_DEVICES": "0"}
    assert step_environment({**env, "PATH": "/bin"}) == {"SLURM_CONF": "/c", "PATH": "/bin"}


def test_an_srun_that_hangs_is_ended_and_tried_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "trap '' TERM; exec sleep 600")
    bench.start(1)
    bench.until(lambda: len(bench.lines("calls")) == 1)
    bench.rewrite(WORKING)
    bench.until(lambda: bool(bench.known))
    assert len(bench.lines("calls")) == 2
    bench.end(1, ok=True)
    bench.until_done()


def test_failure_is_logged_once_and_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, "echo 'srun: error: Step limit reached for this job' >&2; exit 1")
    bench.start(1)
    bench.start(2)
    bench.until_done()
    assert len(bench.lines("calls")) == 2 * module.TRIES
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "Step limit reached" in record.getMessage()


def test_a_slurm_that_makes_no_steps_is_left_alone_for_a_while(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "exit 1")
    for request_id in range(module.PAUSE_AFTER):
        bench.start(request_id)
    bench.until_done()
    before = len(bench.lines("calls"))
    bench.start(99)
    bench.until_done()
    assert len(bench.lines("calls")) == before


def test_a_missing_srun_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, WORKING)
    bench.srun.unlink()
    bench.start(1)
    bench.until_done()
    assert "no tracer step" in caplog.text


def test_never_more_steps_alive_than_slots(tmp_path: Path) -> None:
    bench = Bench(tmp_path, WORKING, slots=2)
    for request_id in range(1, 5):
        bench.start(request_id)
    bench.until(lambda: len(bench.known) == 2)
    assert not bench.steps.due_s() and len(bench.lines("calls")) == 2
    bench.end(1, ok=True)
    bench.until(lambda: len(bench.known) == 3)
    assert len(bench.lines("calls")) == 3
    bench.steps.close(LIMIT_S)


def test_closing_fails_what_is_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path, WORKING)
    bench.start(1)
    bench.until(lambda: bool(bench.known))
    bench.steps.close(LIMIT_S)
    assert bench.lines("codes") == ["1"]


def test_the_real_script_fails_when_its_supervisor_is_gone(tmp_path: Path) -> None:
    import subprocess

    script = subprocess.Popen(["/bin/sh", "-c", module.SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert script.stdin
    script.stdin.close()
    assert script.wait(LIMIT_S) != 0
