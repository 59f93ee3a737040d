"""States and reasons, named and abbreviated as Slurm does."""

from __future__ import annotations

from enum import StrEnum


class RequestState(StrEnum):
    """Where a tuning request stands. The last five are final."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    DEADLINE = "DEADLINE"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"

    @property
    def short(self) -> str:
        """squeue's compact form."""
        return _SHORT[self]

    @property
    def final(self) -> bool:
        return self not in (RequestState.PENDING, RequestState.RUNNING)


_SHORT = {
    RequestState.PENDING: "PD",
    RequestState.RUNNING: "R",
    RequestState.COMPLETED: "CD",
    RequestState.FAILED: "F",
    RequestState.CANCELLED: "CA",
    RequestState.DEADLINE: "DL",
    RequestState.OUT_OF_MEMORY: "OOM",
}


class Reason(StrEnum):
    """Why a request waits, in squeue's manner."""

    NONE = "None"
    PRIORITY = "Priority"  # warm workers exist, requests with earlier deadlines hold them
    RESOURCES = "Resources"  # the pool is at its cap
    COLD_START = "ColdStart"  # an allocation for it is on its way
    POOL_DOWN = "PoolDown"  # Slurm refuses the pool's allocations
    WORKER_LOST = "WorkerLost"  # its worker went away; it goes on elsewhere from its checkpoint


class AllocationState(StrEnum):
    """One allocation is one Slurm job (or local process group) that holds one warm worker."""

    ORDERED = "ordered"  # the intent is journalled; Slurm has not answered yet
    PENDING = "pending"  # in Slurm's queue: never counted as capacity
    LOADING = "loading"  # the job runs; imports, weights, warm-up
    WARM = "warm"  # one real training step ran: ready
    DRAINING = "draining"  # takes nothing new, ends when its requests have moved or ended
    ENDED = "ended"


class OnMiss(StrEnum):
    """What a deadline means once it cannot be met."""

    CONTINUE = "continue"
    DROP = "drop"
    REJECT = "reject"


class Init(StrEnum):
    """Where the first prompt comes from."""

    BANK = "bank"
    TEXT = "text"
    RANDOM = "random"


class Metric(StrEnum):
    """What the target score is measured in, on the evaluation rows."""

    LOSS = "loss"  # mean token cross-entropy; lower is better
    ACCURACY = "accuracy"  # share of rows whose target tokens are all predicted; higher is better
    TOKEN_ACCURACY = "token_accuracy"  # share of target tokens that are predicted; higher is better
    LABEL_ACCURACY = "label_accuracy"  # share of rows whose target is the likeliest of all targets; higher is better

    def reached(self, score: float, target: float) -> bool:
        return score <= target if self is Metric.LOSS else score >= target


class Rule(StrEnum):
    """How a step moves the virtual tokens."""

    SCALED = "scaled"  # AdamW's step, times the token's own size: the rate means the same on every base model
    ADAMW = "adamw"  # plain AdamW, as torch has it


class Schedule(StrEnum):
    """How the rate goes on after its warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"  # to 0 at the last step
    COSINE = "cosine"  # to 0 at the last step


class Share(StrEnum):
    """Who may start from the tuned prompt."""

    PRIVATE = "private"
    ACCOUNT = "account"
    ALL = "all"
