"""How the broker asks for allocations: the protocol that a Slurm cluster or the local machine fulfils."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from broker.protocol.config import PoolConfig


class JobState(StrEnum):
    """What became of an allocation's job, in the broker's words."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


class AllocationOrder(Struct, frozen=True, kw_only=True):
    """One allocation to bring up. `name` is unique for ever: ordering it twice yields one job."""

    name: str  # pt-<pool>-<id>-<random>
    pool_name: str
    pool: PoolConfig
    worker_file: Path  # WorkerConfig, mode 0600
    log_file: Path


class JobReport(Struct, frozen=True, kw_only=True):
    """One allocation's job as one poll saw it."""

    name: str
    job_id: str
    state: JobState
    reason: str = ""  # Slurm's state and reason: "PREEMPTED", "Resources", "NODE_FAIL"
    node: str = ""
    start_unix_s: float = 0.0
    end_unix_s: float = 0.0  # when it will end by its limit, or did


class Account(Struct, frozen=True, kw_only=True):
    """The accounts one user may charge."""

    default: str
    allowed: frozenset[str]


class AllocationProvider(Protocol):
    """Every call may block (the broker calls from a thread of its own) and may raise SlurmRejected (permanent),
    SlurmUnavailable (transient, after its own retries) or SlurmUnknown (look before trying again)."""

    name: str

    def submit(self, order: AllocationOrder) -> str:
        """Brings the allocation up and returns its job id. If a job of this name is there already, returns that one."""
        ...

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Ends these jobs; those that ended already are no error."""
        ...

    def poll(self) -> list[JobReport]:
        """All live jobs that carry this cluster's tag, and those that ended lately, in one call. A job that was
        reported once and is missing from a later successful poll has ended."""
        ...

    def accounts(self) -> dict[str, Account] | None:
        """Each user's accounts by user name; None where nothing is enforced."""
        ...
