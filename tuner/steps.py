"""Tracer steps: each request shows in Slurm's accounting as one step of the allocation's job.

A step is a shell that waits for its exit code on standard input. Steps are a courtesy to whoever reads `sacct`: they
are launched in the background, and a Slurm that does not answer costs no request anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)

Key = tuple[int, int]  # request id, attempt

SCRIPT = 'echo "$SLURM_JOB_ID.$SLURM_STEP_ID"; read code && exit "$code"'
STEP_ID = re.compile(rb"^([0-9]+\.[0-9]+)$", re.MULTILINE)
SCRUBBED = ("SLURM_", "SBATCH_", "SRUN_", "CUDA_VISIBLE_DEVICES")

CREATE_TIMEOUT_S = 5.0  # a creation that meets a restarting slurmctld is parked for ever; the next one is answered
END_TIMEOUT_S = 10.0
KILL_AFTER_S = 2.0
TRIES = 4
RETRY_S = 2.0  # times the number of tries so far
LAUNCHES = 4  # at once
WAITING_MAX = 64
PAUSE_AFTER = 3  # requests in a row without a step
PAUSE_S = 60.0
OUTPUT_MAX = 4096


def step_name(request_id: int, user: str) -> str:
    """`req-<id>.<user>` with nothing in it that Slurm or a terminal could take for something else."""
    return f"req-{request_id}." + re.sub(r"[^A-Za-z0-9_.-]", "_", user)[:64]


def step_environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without what would make srun take its options from the surrounding step."""
    return {name: value for name, value in env.items() if name == "SLURM_CONF" or not name.startswith(SCRUBBED)}


class _Step:
    """One request's step, from the wish to its end."""

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.tries = 0
        self.launch_s = now_s  # not before
        self.limit_s = 0.0  # of what the process is doing now
        self.process: subprocess.Popen[bytes] | None = None
        self.output = b""
        self.step_id = ""
        self.code: bytes | None = None  # known once the request has ended

    def launch(self, command: list[str], env: dict[str, str], now_s: float) -> None:
        self.tries += 1
        self.output = b""
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=env, cwd="/", bufsize=0
        )
        assert self.process.stdout
        os.set_blocking(self.process.stdout.fileno(), False)
        self.limit_s = now_s + CREATE_TIMEOUT_S
        if self.code is not None:
            self.end(self.code, now_s)

    def end(self, code: bytes, now_s: float) -> None:
        self.code = code
        if self.process and self.process.stdin:
            with contextlib.suppress(OSError):  # it is gone already
                self.process.stdin.write(code)
                self.process.stdin.close()
            self.limit_s = max(self.limit_s, now_s + END_TIMEOUT_S) if self.step_id else self.limit_s

    def read(self) -> bool:
        """Takes what srun said; True when the step's id has just become known."""
        if not (self.process and self.process.stdout) or self.process.stdout.closed:
            return False
        while True:
            try:
                heard = os.read(self.process.stdout.fileno(), OUTPUT_MAX)
            except BlockingIOError:
                break
            if not heard:
                self.process.stdout.close()
                break
            self.output = (self.output + heard)[-OUTPUT_MAX:]
        found = STEP_ID.search(self.output)
        if self.step_id or not found:
            return False
        self.step_id = found[1].decode()
        return True

    @property
    def last_words(self) -> str:
        lines = self.output.decode("ascii", "replace").split("\n")
        said = [line for line in lines if line.strip()]
        return "".join(c for c in said[-1][:200] if c.isprintable()) if said else "no answer"


class Steps:
    """The tracer steps of one allocation, never more than `slots` alive. No call blocks; `advance` does the work."""

    def __init__(self, srun: str, job_id: str, slots: int, env: Mapping[str, str]) -> None:
        self._srun = srun
        self._job_id = job_id
        self._slots = slots
        self._env = step_environment(env)
        self._steps: dict[Key, _Step] = {}
        self._dying: list[tuple[subprocess.Popen[bytes], float]] = []
        self._failed_in_row = 0
        self._paused_until_s = 0.0

    def start(self, request_id: int, attempt: int, user: str, now_s: float) -> None:
        """Wishes for a step; it is launched by a later `advance`."""
        if now_s < self._paused_until_s:
            return
        if len(self._steps) >= self._slots + WAITING_MAX:
            self._failed("too many requests wait for their steps", now_s)
            return
        self._steps.setdefault((request_id, attempt), _Step(step_name(request_id, user), now_s))

    def end(self, request_id: int, attempt: int, ok: bool, now_s: float) -> None:
        """Lets the step end COMPLETED or FAILED; one that is not there is no error."""
        step = self._steps.get((request_id, attempt))
        if step and step.code is None:
            step.end(b"0\n" if ok else b"1\n", now_s)

    def descriptors(self) -> list[int]:
        """What to poll: readable means that `advance` has something to do."""
        outputs = [step.process.stdout for step in self._steps.values() if step.process]
        return [output.fileno() for output in outputs if output and not output.closed]

    def due_s(self) -> float | None:
        """When `advance` has something to do by the clock (monotonic seconds)."""
        times = [step.limit_s for step in self._steps.values() if step.process and (not step.step_id or step.code)]
        times += [limit_s for _, limit_s in self._dying]
        if self._room():
            times += [step.launch_s for step in self._steps.values() if not step.process]
        return min(times, default=None)

    def advance(self, now_s: float) -> list[tuple[Key, str]]:
        """Reads, reaps, gives up and launches. Returns the steps whose Slurm id became known: `("<job>.<step>")`."""
        known = []
        for key, step in list(self._steps.items()):
            if step.read():
                known.append((key, step.step_id))
                self._made(step, now_s)
            self._follow(key, step, now_s)
        self._bury(now_s)
        self._launch(now_s)
        return known

    def close(self, patience_s: float) -> None:
        """Fails the steps that are left and waits up to `patience_s` for all to end, then drops them."""
        limit_s = time.monotonic() + patience_s
        for step in self._steps.values():
            if step.code is None:
                step.end(b"1\n", limit_s)
        for step in self._steps.values():
            if step.process and step.step_id:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    step.process.wait(max(0.0, limit_s - time.monotonic()))
        for process in [step.process for step in self._steps.values()] + [process for process, _ in self._dying]:
            if process and process.poll() is None:
                process.terminate()
        self._steps.clear()
        self._dying.clear()

    def _follow(self, key: Key, step: _Step, now_s: float) -> None:
        if step.process is None:
            return
        if step.process.poll() is not None:
            if step.read():  # its last words came with its end
                self._made(step, now_s)
            if step.step_id:
                del self._steps[key]
            else:
                self._try_again(key, step, now_s)
        elif now_s >= step.limit_s and (not step.step_id or step.code):
            step.process.terminate()
            self._dying.append((step.process, now_s + KILL_AFTER_S))
            if step.step_id:
                del self._steps[key]
            else:
                self._try_again(key, step, now_s)

    def _bury(self, now_s: float) -> None:
        dying, self._dying = self._dying, []
        for process, limit_s in dying:
            if process.poll() is not None:
                continue
            if now_s >= limit_s:
                process.kill()
                limit_s = now_s + KILL_AFTER_S
            self._dying.append((process, limit_s))

    def _try_again(self, key: Key, step: _Step, now_s: float) -> None:
        step.process = None
        step.launch_s = now_s + RETRY_S * step.tries
        if step.tries >= TRIES:
            del self._steps[key]
            self._failed(step.last_words, now_s)

    def _made(self, step: _Step, now_s: float) -> None:
        if self._failed_in_row:
            log.info("tracer steps work again")
        self._failed_in_row = 0
        step.limit_s = now_s + END_TIMEOUT_S

    def _failed(self, why: str, now_s: float) -> None:
        if not self._failed_in_row:
            log.warning("no tracer step in job %s: %s; requests go on without", self._job_id, why)
        self._failed_in_row += 1
        if self._failed_in_row >= PAUSE_AFTER:
            self._paused_until_s = now_s + PAUSE_S

    def _room(self) -> int:
        alive = sum(step.process is not None for step in self._steps.values())
        launching = sum(step.process is not None and not step.step_id for step in self._steps.values())
        return min(self._slots - alive - len(self._dying), LAUNCHES - launching)

    def _launch(self, now_s: float) -> None:
        waiting = [item for item in self._steps.items() if item[1].process is None and item[1].launch_s <= now_s]
        for key, step in waiting[: max(0, self._room())]:
            try:
                step.launch(self._command(step.name), self._env, now_s)
            except OSError as error:
                del self._steps[key]
                self._failed(str(error), now_s)

    def _command(self, name: str) -> list[str]:
        return [
            self._srun,
            f"--jobid={self._job_id}",
            "--overlap",
            "--gres=none",
            "--mem=0",
            "-N1",
            "-n1",
            "-c1",
            f"--job-name={name}",
            "--input=0",
            "--chdir=/",
            "/bin/sh",
            "-c",
            SCRIPT,
        ]
