"""Requests, allocations and pools as listings and accounting see them."""

from __future__ import annotations

from broker.protocol.spec import Frozen
from broker.protocol.states import AllocationState, RequestState


class RequestRow(Frozen, frozen=True, array_like=True):
    """One request as listings and accounting see it. Times are epoch seconds, 0 for 'not yet'."""

    id: int
    job_name: str
    model: str
    pool: str
    partition: str
    uid: int
    user: str
    account: str
    qos: str
    state: RequestState
    reason: str
    submit_unix_s: float
    deadline_unix_s: float
    predicted_finish_unix_s: float
    start_unix_s: float
    first_step_unix_s: float
    end_unix_s: float
    step: int
    max_steps: int
    loss: float | None
    score: float | None
    metric: str
    target_score: float | None
    start: str  # which initial prompt it got: bank:<digest>, random, text
    lookup_s: float
    gpu_s: float
    attempts: int
    allocation: str
    job_id: str
    nodes: str
    step_id: str  # the Slurm step that shows it
    comment: str
    error: str
    exit_code: int
    cancelled_by: int | None
    virtual_tokens: int
    batch_size: int
    seed: int

    @property
    def met(self) -> bool | None:
        """Whether the deadline was met: None while open or without one."""
        if not self.deadline_unix_s or not self.state.final:
            return None
        return self.state is RequestState.COMPLETED and self.end_unix_s <= self.deadline_unix_s

    @property
    def slack_s(self) -> float | None:
        """Seconds between the (predicted or real) end and the deadline; negative when late."""
        end = self.end_unix_s or self.predicted_finish_unix_s
        return self.deadline_unix_s - end if self.deadline_unix_s and end else None


class AllocationRow(Frozen, frozen=True):
    """One allocation as `ptinfo -N` sees it."""

    name: str
    pool: str
    state: AllocationState
    job_id: str
    node: str
    gpus: str
    running: list[int]
    slots: int
    ordered_unix_s: float
    started_unix_s: float
    ready_unix_s: float
    end_unix_s: float  # when Slurm will end it; 0 for unknown
    idle_since_unix_s: float
    phases_s: dict[str, float]
    rss_mb: float
    reason: str


class PoolRow(Frozen, frozen=True):
    """One pool as `ptinfo` sees it."""

    name: str
    model: str
    partition: str
    min_workers: int
    max_workers: int
    idle_window_s: float
    slots: int
    gpus_per_worker: int
    pending_requests: int
    available: bool
    reason: str
    allocations: list[AllocationRow]
