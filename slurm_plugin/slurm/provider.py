"""Allocations as Slurm jobs: ordered once each, watched by one call for all, ended."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from broker.allocations import Account, AllocationOrder, JobReport, JobState
from broker.protocol.errors import ConfigError, SlurmError, SlurmRejected, SlurmUnknown
from slurm_plugin.slurm.client import IDS_PER_CALL, SlurmClient
from slurm_plugin.slurm.parse import ENDED_STATES, PENDING_STATES, HistoryRow, QueueRow
from slurm_plugin.slurm.template import Launch, pool_of, render

log = logging.getLogger(__name__)

SCRIPT_NAME = "job.sbatch"
_HISTORY_S = 30 * 86400.0  # how far back accounting is asked for a job that left squeue
_CLOCK_SKEW_S = 3600.0


class SlurmProvider:
    """AllocationProvider over a Slurm cluster. Safe for threads.

    The script of each order is kept beside its worker file, for people, and as the mark that this name may have been
    submitted before: then the name is looked up first, also after a crash between the two."""

    name = "slurm"

    def __init__(self, client: SlurmClient, launch: Launch, clock: Callable[[], float] = time.time) -> None:
        self._client = client
        self._launch = launch
        self._clock = clock
        self._lock = threading.Lock()
        self._live: dict[str, str] = {}  # job id by name: submitted or seen alive, and not seen ended yet

    def submit(self, order: AllocationOrder) -> str:
        """The job id of the one job of this name. SlurmUnknown means: nobody knows yet; submit the same order again
        later, and it will be found if it is there."""
        try:
            script = render(order, self._launch)
        except ConfigError as error:
            raise SlurmRejected(error.message, error.hint) from error
        kept = order.worker_file.with_name(SCRIPT_NAME)
        job_id = None if _keep(kept, script) else self._find(order.name, kept)
        if job_id is None:
            try:
                job_id = self._client.submit(script)
            except SlurmUnknown as unknown:
                job_id = self._find_after(unknown, order.name, kept)
        with self._lock:
            self._live[order.name] = job_id
        return job_id

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancels all of them in one call."""
        wrong = [job_id for job_id in job_ids if re.fullmatch("[0-9]+", job_id) is None]
        if wrong:
            raise SlurmRejected(f"no Slurm job id: {wrong[0]!r}", "only jobs that Slurm has named can be cancelled")
        if job_ids:
            self._client.cancel(job_ids)

    def poll(self) -> list[JobReport]:
        """The state of every job with this cluster's tag by one squeue; those that left squeue since the last poll are
        told as ended, once, with what accounting says of them if it answers."""
        with self._lock:
            live_before = dict(self._live)
        rows = self._one_each(row for row in self._client.queue() if pool_of(row.comment, self._launch.cluster))
        reports = [_report(row) for row in rows.values()]
        gone = {name: job_id for name, job_id in live_before.items() if name not in rows}
        reports += self._gone(gone)
        with self._lock:
            for report in reports:
                if report.state is JobState.ENDED:
                    self._live.pop(report.name, None)
                else:
                    self._live[report.name] = report.job_id
        return reports

    def accounts(self) -> dict[str, Account] | None:
        settings = self._client.settings()
        enforced = re.split(r"[,\s]+", settings.get("AccountingStorageEnforce", "").lower())
        if not {"associations", "limits", "qos", "safe", "wckeys", "all"} & set(enforced):
            return None
        associations = self._client.associations(settings.get("ClusterName", ""))
        if associations is None:
            return None
        allowed: dict[str, set[str]] = {}
        default: dict[str, str] = {}
        for one in associations:
            allowed.setdefault(one.user, set()).add(one.account)
            if one.default:
                default[one.user] = one.account
        return {
            user: Account(default=default.get(user, min(accounts)), allowed=frozenset(accounts))
            for user, accounts in allowed.items()
        }

    def _find_after(self, unknown: SlurmUnknown, name: str, kept: Path) -> str:
        try:
            found = self._find(name, kept)
        except SlurmError:
            raise unknown from None
        if found is None:
            raise unknown
        log.warning("%s; it was submitted all the same, as job %s", unknown.message, found)
        return found

    def _find(self, name: str, kept: Path) -> str | None:
        """The job of this name: squeue decides; accounting, where it answers, knows those that ended long ago."""
        ids = [row.job_id for row in self._client.queue(name) if row.name == name]
        if not ids:
            try:
                since_unix_s = kept.stat().st_mtime - _CLOCK_SKEW_S
                ids = [row.job_id for row in self._client.history(name=name, since_unix_s=since_unix_s)]
            except (SlurmError, OSError) as error:
                log.info("accounting does not say whether %s ran: %s", name, error)
        return min(ids, key=int, default=None)

    def _one_each(self, rows: Iterable[QueueRow]) -> dict[str, QueueRow]:
        """One job for each name: a live one before an ended one, then the oldest. A second live job of a name is the
        echo of a submission whose answer was lost, and is cancelled."""
        chosen: dict[str, QueueRow] = {}
        echoes: list[str] = []
        for row in sorted(rows, key=lambda row: (_state(row) is JobState.ENDED, int(row.job_id))):
            if row.name not in chosen:
                chosen[row.name] = row
            elif _state(row) is not JobState.ENDED:
                echoes.append(row.job_id)
        if echoes:
            log.warning("cancelling second jobs of a name: %s", ", ".join(echoes))
            try:
                self._client.cancel(echoes)
            except SlurmError as error:
                log.warning("they are cancelled at a later poll: %s", error)
        return chosen

    def _gone(self, gone: dict[str, str]) -> list[JobReport]:
        """Jobs that squeue does not show any more have ended; a failing accounting does not change that."""
        history: dict[str, HistoryRow] = {}
        if gone:
            try:
                ids = list(gone.values())[:IDS_PER_CALL]
                rows = self._client.history(ids=ids, since_unix_s=self._clock() - _HISTORY_S)
                history = {row.job_id: row for row in rows}
            except SlurmError as error:
                log.info("accounting does not say how jobs ended: %s", error)
        reports = []
        for name, job_id in gone.items():
            row = history.get(job_id)
            ended = row if row is not None and row.state in ENDED_STATES else None
            report = JobReport(
                name=name,
                job_id=job_id,
                state=JobState.ENDED,
                reason=ended.state if ended else "gone from squeue",
                node=ended.node if ended else "",
                start_unix_s=ended.start_unix_s if ended else 0.0,
                end_unix_s=ended.end_unix_s if ended else self._clock(),
            )
            reports.append(report)
        return reports


def _state(row: QueueRow) -> JobState:
    if row.state in ENDED_STATES:
        return JobState.ENDED
    if row.state in PENDING_STATES or row.state == "CONFIGURING" or not row.node:
        return JobState.PENDING
    return JobState.RUNNING  # also COMPLETING, SUSPENDED, and states of later releases that hold a node


def _report(row: QueueRow) -> JobReport:
    state = _state(row)
    reasons = {JobState.PENDING: row.reason, JobState.RUNNING: "" if row.state == "RUNNING" else row.state}
    pending = state is JobState.PENDING
    return JobReport(
        name=row.name,
        job_id=row.job_id,
        state=state,
        reason=reasons.get(state, row.state),
        node=row.node,
        # Of a pending job squeue tells an estimate, which is no fact yet.
        start_unix_s=0.0 if pending else row.start_unix_s,
        end_unix_s=0.0 if pending else row.end_unix_s,
    )


def _keep(path: Path, script: str) -> bool:
    """Writes the script durably, with mode 0600; False if it is there already, from an earlier attempt."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise SlurmRejected(f"{path}: {error.strerror}", "check paths.spool: its space and permissions") from None
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        os.fsync(file.fileno())
    return True
