"""The embedded default: allocations are process groups on this machine, and nothing else is needed.

What runs is read from the kernel, not from a file: a worker is found by its command line, so neither a crash of the
broker between start and note, nor a reused process id, can lose or confuse one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from broker.allocations import Account, AllocationOrder, JobReport, JobState
from broker.protocol.errors import SlurmRejected, SlurmUnavailable

KILL_AFTER_S = 10.0
WORKER_MODULE = "tuner.worker"
_JOB_ID = re.compile(r"local-([0-9]+)-([0-9]+)")  # process id, and its start in clock ticks since boot
_PROC = Path("/proc")


class _Process(Struct, frozen=True):
    pid: int
    start_ticks: int

    @property
    def job_id(self) -> str:
        return f"local-{self.pid}-{self.start_ticks}"


class LocalProvider:
    """AllocationProvider over this machine's processes. Safe for threads.

    `root` holds the folders of the allocations; workers that an earlier broker started from there are found again."""

    name = "local"

    def __init__(
        self,
        root: Path,
        kill_after_s: float = KILL_AFTER_S,
        gpus: Sequence[str] | None = None,
        command: Sequence[str] = (sys.executable, "-I", "-m", WORKER_MODULE),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._kill_after_s = kill_after_s
        self._gpus = machine_gpus() if gpus is None else tuple(gpus)
        self._command = tuple(command)
        self._clock = clock
        self._lock = threading.Lock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # by job id; only ours can be waited for
        self._running: dict[str, _Process] = self._found_running(root.absolute())

    def submit(self, order: AllocationOrder) -> str:
        """Starts the worker in a session of its own, or returns the one of this name that runs already."""
        with self._lock:
            running = self._running.get(order.name) or self._find(order.worker_file.absolute())
            if running is None:
                child = self._start(order)
                running = _Process(child.pid, _start_ticks(child.pid) or 0)
                self._children[running.job_id] = child
            self._running[order.name] = running
            return running.job_id

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Asks each process group to end; one that does not is killed some seconds later. Does not wait."""
        with self._lock:
            # A worker knows itself by its allocation's name only, so that names it too.
            known = self._running | {process.job_id: process for process in self._running.values()}
        doomed = []
        for job_id in job_ids:
            if job_id not in known and _JOB_ID.fullmatch(job_id) is None:
                raise SlurmRejected(f"no local job id: {job_id!r}", "only jobs that were started here can be cancelled")
            if job_id in known and self._signal(known[job_id], signal.SIGTERM):
                doomed.append(known[job_id])
        if doomed:
            timer = threading.Timer(self._kill_after_s, self._kill, [doomed])
            timer.daemon = True
            timer.start()

    def poll(self) -> list[JobReport]:
        """Every worker that runs, and once each that has ended since the last poll."""
        with self._lock:
            reports = [self._report(name, process) for name, process in self._running.items()]
            for report in reports:
                if report.state is JobState.ENDED:
                    del self._running[report.name]
                    self._children.pop(report.job_id, None)
        return reports

    def accounts(self) -> dict[str, Account] | None:
        return None

    def _start(self, order: AllocationOrder) -> subprocess.Popen[bytes]:
        # A broker inside a Slurm job must not make its workers believe that the job is theirs.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment = (
            inherited
            | self._gpu_environment(order)
            | {
                "PROMPTTUNER_JOB_ID": order.name,
                "OMP_NUM_THREADS": str(order.pool.cpus_per_worker),
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
            }
        )
        try:
            log_fd = os.open(order.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            try:
                return subprocess.Popen(
                    [*self._command, str(order.worker_file.absolute())],
                    stdin=subprocess.DEVNULL,
                    stdout=log_fd,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    env=environment,
                    start_new_session=True,
                )
            finally:
                os.close(log_fd)
        except BlockingIOError as error:
            raise SlurmUnavailable(
                f"cannot start a worker: {error.strerror}", "this user has too many processes"
            ) from None
        except OSError as error:
            raise SlurmRejected(
                f"cannot start a worker: {error.strerror}: {error.filename}", "check the state folder and its space"
            ) from None

    def _gpu_environment(self, order: AllocationOrder) -> dict[str, str]:
        """GPUs that no other worker of ours holds. A machine without any serves every pool with its processors."""
        wanted = order.pool.gpus_per_worker
        if not wanted or not self._gpus:
            return {}
        taken = {gpu for process in self._running.values() for gpu in _visible_gpus(process.pid)}
        free = [gpu for gpu in self._gpus if gpu not in taken]
        if len(free) < wanted:
            raise SlurmUnavailable(
                f"{order.name}: {wanted} of {len(self._gpus)} GPUs asked for, {len(free)} free",
                "lower max_workers or gpus_per_worker, or wait until a worker ends",
            )
        return {"CUDA_VISIBLE_DEVICES": ",".join(free[:wanted])}

    def _report(self, name: str, process: _Process) -> JobReport:
        child = self._children.get(process.job_id)
        code = child.poll() if child else None
        ended = code is not None or not _alive(process)
        reason = (
            "" if not ended else "ended" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        )
        return JobReport(
            name=name,
            job_id=process.job_id,
            state=JobState.ENDED if ended else JobState.RUNNING,
            reason=reason,
            node=os.uname().nodename,
            start_unix_s=_boot_unix_s() + process.start_ticks / os.sysconf("SC_CLK_TCK"),
            end_unix_s=self._clock() if ended else 0.0,
        )

    def _signal(self, process: _Process, number: signal.Signals) -> bool:
        """Signals the process group, if it is still the one that we mean."""
        child = self._children.get(process.job_id)
        if (child is not None and child.poll() is not None) or not _alive(process):
            return False
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _kill(self, doomed: list[_Process]) -> None:
        with self._lock:
            for process in doomed:
                self._signal(process, signal.SIGKILL)

    def _found_running(self, root: Path) -> dict[str, _Process]:
        found = {}
        for worker_file, process in self._workers():
            if worker_file.parent.parent == root:
                found[worker_file.parent.name] = process
        return found

    def _find(self, worker_file: Path) -> _Process | None:
        return next((process for file, process in self._workers() if file == worker_file), None)

    def _workers(self) -> list[tuple[Path, _Process]]:
        """This user's workers on this machine: leaders of their own session whose command line is ours."""
        head = [*(part.encode() for part in self._command[1:])]
        found = []
        for entry in _PROC.iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if entry.stat().st_uid != os.geteuid():
                    continue
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                pid = int(entry.name)
                if words[1:-1] != head or os.getsid(pid) != pid:
                    continue
            except OSError:  # it ended while we looked
                continue
            process = _Process(pid, _start_ticks(pid) or 0)
            if _alive(process):
                found.append((Path(os.fsdecode(words[-1])), process))
        return found


def machine_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip())
    numbers = sorted(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
    return tuple(str(number) for number in numbers)


def _visible_gpus(pid: int) -> list[str]:
    try:
        words = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # it ended
        return []
    found = [os.fsdecode(word.partition(b"=")[2]) for word in words if word.startswith(b"CUDA_VISIBLE_DEVICES=")]
    return found[0].split(",") if found else []


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name; empty if there is no such process."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def _start_ticks(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _alive(process: _Process) -> bool:
    fields = _stat(process.pid)
    return bool(fields) and fields[0] not in ("Z", "X") and int(fields[19]) == process.start_ticks


def _boot_unix_s() -> float:
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
