"""The one way to Slurm: a protocol, and its fulfilment by Slurm's own commands.

Every call is an argument list without a shell, options in their `--option=value` form, a time limit, an environment
free of inherited Slurm settings, and a token from one bucket that all calls share."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import IO, Protocol, TypeVar

from msgspec import Struct
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_random_exponential

from broker.protocol.config import SlurmConfig
from broker.protocol.errors import ConfigError, SlurmRejected, SlurmUnavailable, SlurmUnknown
from slurm_plugin.slurm import parse
from slurm_plugin.slurm.failures import failure, last_words
from slurm_plugin.slurm.throttle import Throttle

MAX_OUTPUT_BYTES = 64 << 20
IDS_PER_CALL = 50  # a longer list of ids makes sacct hang on some sites
ATTEMPTS = 3
_SCRUBBED = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_", "SACCT", "SINFO_", "SCONTROL_", "SREPORT_")
_SCRUBBED_NAMES = ("CUDA_VISIBLE_DEVICES", "LD_PRELOAD")
_TOOLS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "sacctmgr", "srun")
_HANDED_ON = ("HOME", "USER", "LOGNAME", "PATH", "LD_LIBRARY_PATH", "LC_ALL", "SLURM_CONF")
_REQUIRED = ("sbatch", "squeue", "scancel", "scontrol")

T = TypeVar("T")


class Association(Struct, frozen=True):
    """That a user may charge an account."""

    user: str
    account: str
    default: bool


class SlurmClient(Protocol):
    """What this plugin asks of Slurm. Raises SlurmRejected, SlurmUnavailable or SlurmUnknown as their names say."""

    def submit(self, script: str) -> str:
        """Submits a batch script and returns its job id. Never tried twice: after SlurmUnknown, look before you do."""
        ...

    def test(self, script: str) -> str:
        """What `sbatch --test-only` says to this script. Submits nothing. SlurmRejected if Slurm would refuse it."""
        ...

    def queue(self, name: str | None = None) -> list[parse.QueueRow]:
        """The caller's own jobs (of this name) that are live or ended minutes ago."""
        ...

    def history(self, *, ids: Sequence[str] = (), name: str = "", since_unix_s: float) -> list[parse.HistoryRow]:
        """What accounting knows of these ids, or of the caller's jobs of this name, since then. Empty without sacct."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancels these jobs; those that ended already, or are not known any more, are no error."""
        ...

    def settings(self) -> dict[str, str]:
        """The cluster's configuration as `scontrol show config` prints it."""
        ...

    def partitions(self) -> list[dict[str, str]]:
        """Each partition's record as `scontrol show partition` prints it."""
        ...

    def associations(self, cluster: str) -> list[Association] | None:
        """Who may charge what on this cluster; None without sacctmgr."""
        ...


class _Result(Struct, frozen=True):
    stdout: str
    stderr: str


class CommandLineSlurm:
    """SlurmClient by Slurm's commands, whose text output is the same in all releases in use."""

    def __init__(self, config: SlurmConfig, throttle: Throttle | None = None, first_wait_s: float = 0.5) -> None:
        """Resolves the commands once; raises ConfigError when one that is needed is not there."""
        self._timeout_s = float(config.timeout)
        self._throttle = throttle or Throttle(config.calls_per_s, config.burst)
        self._uid = os.geteuid()
        self._first_wait_s = first_wait_s  # before the second attempt at most; it doubles with each
        self._tools = _resolve(config.bin_dir)
        self._environment = scrubbed_environment(config.conf)
        # sbatch hands its environment on to the job, and Slurm may keep it in its database.
        self._job_environment = {name: self._environment[name] for name in _HANDED_ON if name in self._environment}

    @property
    def srun(self) -> str:
        """The absolute path of srun; `srun` where it is not found."""
        return self._tools.get("srun", "srun")

    def submit(self, script: str) -> str:
        result = self._retried(lambda: self._call("sbatch", "--parsable", stdin=script, changes=True))
        job_id = parse.submitted_id(result.stdout)
        if job_id is None:
            raise SlurmUnknown(
                f"sbatch: no job id in its answer {result.stdout[:80]!r}", "the job is looked up by name"
            )
        return job_id

    def test(self, script: str) -> str:
        result = self._retried(lambda: self._call("sbatch", "--test-only", stdin=script))
        return last_words(result.stderr)

    def queue(self, name: str | None = None) -> list[parse.QueueRow]:
        arguments = ["--noheader", "--states=all", f"--user={self._uid}", f"--format={parse.QUEUE_FORMAT}"]
        if name is not None:
            arguments.append(f"--name={name}")
        return self._retried(lambda: parse.queue_rows(self._call("squeue", *arguments).stdout))

    def history(self, *, ids: Sequence[str] = (), name: str = "", since_unix_s: float) -> list[parse.HistoryRow]:
        if "sacct" not in self._tools:
            return []
        since = datetime.fromtimestamp(since_unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        arguments = ["--noheader", "--parsable2", "--allocations", f"--starttime={since}"]
        arguments.append(f"--format={','.join(parse.HISTORY_FIELDS)}")
        if ids:
            arguments.append(f"--jobs={','.join(ids[:IDS_PER_CALL])}")
        else:
            arguments += [f"--user={self._uid}", f"--name={name}"]
        return parse.history_rows(self._call("sacct", *arguments).stdout)

    def cancel(self, ids: Sequence[str]) -> None:
        for first in range(0, len(ids), IDS_PER_CALL):
            self._retried(partial(self._call, "scancel", *ids[first : first + IDS_PER_CALL], forgives=_ENDED_ALREADY))

    def settings(self) -> dict[str, str]:
        return self._retried(lambda: parse.settings(self._call("scontrol", "show", "config").stdout))

    def partitions(self) -> list[dict[str, str]]:
        text = self._retried(lambda: self._call("scontrol", "--oneliner", "show", "partition").stdout)
        return list(parse.records(text))

    def associations(self, cluster: str) -> list[Association] | None:
        if "sacctmgr" not in self._tools:
            return None
        columns = "format=User,DefaultAccount,Account,Cluster"
        text = self._retried(
            lambda: self._call("sacctmgr", "--noheader", "--parsable2", "show", "user", "withassoc", columns).stdout
        )
        found = []
        for line in text.splitlines():
            fields = line.split("|")
            if len(fields) == 4 and fields[0] and fields[2] and fields[3] == cluster:
                found.append(Association(fields[0], fields[2], fields[1] == fields[2]))
        return found

    def _retried(self, call: Callable[[], T]) -> T:
        """Tries again while Slurm is unavailable, but not for long: whoever asked has other things to ask as well."""
        retrying = Retrying(
            retry=retry_if_exception_type(SlurmUnavailable),
            stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(self._timeout_s),
            wait=wait_random_exponential(multiplier=self._first_wait_s, max=5),
            reraise=True,
        )
        return retrying(call)

    def _call(
        self,
        tool: str,
        *arguments: str,
        stdin: str = "",
        changes: bool = False,
        forgives: str = "",
    ) -> _Result:
        """One run of one command. An error line that matches `forgives` is no error."""
        self._throttle.take()
        environment = self._job_environment if tool == "sbatch" else self._environment
        code, stdout, stderr = run([self._tools[tool], *arguments], stdin, environment, self._timeout_s)
        if code != 0:
            blamed = "\n".join(line for line in stderr.splitlines() if not forgives or not re.search(forgives, line))
            if code is None or code < 0 or blamed.strip() or not forgives:
                raise failure(tool, code, blamed, changes=changes)
        return _Result(stdout, stderr)


_ENDED_ALREADY = r"Invalid job id specified|already completing or completed|has already finished"


def run(argv: Sequence[str], stdin: str, environment: dict[str, str], timeout_s: float) -> tuple[int | None, str, str]:
    """Return code (None: killed at its time limit), output and error output of one command, in a session of its own.

    Output goes through unnamed files: a grandchild that keeps a pipe open cannot hold us beyond the time limit."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                argv, stdin=given, stdout=out, stderr=err, env=environment, cwd="/", start_new_session=True
            )
        except OSError as error:
            raise SlurmRejected(f"{argv[0]}: {error.strerror}", "check slurm.bin_dir") from None
        code: int | None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        return code, _read(out), _read(err)


def scrubbed_environment(slurm_conf: str | None) -> dict[str, str]:
    """This process's environment without what would act on Slurm's commands: set variables work as options there, and
    a daemon may have been started inside a job. Times are printed in UTC, messages in English."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _SCRUBBED_NAMES and (name == "SLURM_CONF" or not name.startswith(_SCRUBBED))
    }
    if slurm_conf is not None:
        kept["SLURM_CONF"] = slurm_conf
    return kept | {"TZ": "UTC", "LC_ALL": "C.UTF-8"}


def _resolve(bin_dir: str | None) -> dict[str, str]:
    found = {tool: shutil.which(tool, path=bin_dir) for tool in _TOOLS}
    missing = [tool for tool in _REQUIRED if not found[tool]]
    if missing:
        where = bin_dir or "$PATH"
        raise ConfigError(f"no {', '.join(missing)} in {where}", "install Slurm's client commands or set slurm.bin_dir")
    return {tool: os.path.abspath(path) for tool, path in found.items() if path}


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return parse.decode(file.read(MAX_OUTPUT_BYTES))
