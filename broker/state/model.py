"""The broker's knowledge: requests and allocations that have not ended, and what was learned from those that have.

One `State` has one owner, which alone changes it, through `broker.core`. Every record that a transition touched is
noted, so that the journal can store it in the same transaction as the event.
"""

from __future__ import annotations

from msgspec import Struct, field

from broker.allocations import Account
from broker.protocol.config import PoolConfig, SiteConfig
from broker.protocol.messages import Profile
from broker.protocol.rows import RequestRow
from broker.protocol.spec import RequestSpec
from broker.protocol.states import AllocationState, Reason, RequestState


class Request(Struct, kw_only=True):
    """One tuning request, from its acknowledgement to its end. Times are epoch seconds, 0 for 'not yet'."""

    id: int
    spec: RequestSpec
    uid: int
    user: str
    account: str
    pool: str
    submit_key: str
    submit_unix_s: float
    state: RequestState = RequestState.PENDING
    reason: Reason = Reason.PRIORITY
    attempt: int = 0
    allocation_id: int = 0  # of the running attempt
    allocation: str = ""  # of the latest attempt, by name
    job_id: str = ""
    node: str = ""
    step_id: str = ""
    start_unix_s: float = 0.0
    first_step_unix_s: float = 0.0
    end_unix_s: float = 0.0
    predicted_finish_unix_s: float = 0.0
    step: int = 0
    loss: float | None = None
    score: float | None = None
    start: str = ""
    lookup_s: float = 0.0
    gpu_s: float = 0.0
    error: str = ""
    exit_code: int = 0
    cancelled_by: int | None = None
    result: str | None = None

    @property
    def deadline_unix_s(self) -> float:
        """Infinite without one, so that the earliest deadline sorts first."""
        return self.spec.deadline_unix_s or float("inf")

    def row(self, partition: str) -> RequestRow:
        """What listings and accounting show."""
        spec = self.spec
        return RequestRow(
            id=self.id,
            job_name=spec.job_name,
            model=spec.model,
            pool=self.pool,
            partition=partition,
            uid=self.uid,
            user=self.user,
            account=self.account,
            qos=spec.qos or "",
            state=self.state,
            reason=self.reason.value,
            submit_unix_s=self.submit_unix_s,
            deadline_unix_s=spec.deadline_unix_s or 0.0,
            predicted_finish_unix_s=self.predicted_finish_unix_s,
            start_unix_s=self.start_unix_s,
            first_step_unix_s=self.first_step_unix_s,
            end_unix_s=self.end_unix_s,
            step=self.step,
            max_steps=spec.max_steps,
            loss=self.loss,
            score=self.score,
            metric=spec.metric.value,
            target_score=spec.target_score,
            start=self.start,
            lookup_s=self.lookup_s,
            gpu_s=self.gpu_s,
            attempts=self.attempt,
            allocation=self.allocation,
            job_id=self.job_id,
            nodes=self.node,
            step_id=self.step_id,
            comment=spec.comment,
            error=self.error,
            exit_code=self.exit_code,
            cancelled_by=self.cancelled_by,
            virtual_tokens=spec.virtual_tokens,
            batch_size=spec.batch_size,
            seed=spec.seed,
        )


class Allocation(Struct, kw_only=True):
    """One allocation and the warm worker in it. The fields from `connected` on are not worth a disk write of their
    own."""

    id: int
    name: str
    pool: str
    ordered_unix_s: float
    state: AllocationState = AllocationState.ORDERED
    reason: str = ""
    job_id: str = ""
    node: str = ""
    gpus: str = ""
    epoch: int = 0
    incarnation: str = ""
    restart_count: int = 0
    started_unix_s: float = 0.0  # the job runs
    ready_unix_s: float = 0.0
    end_unix_s: float = 0.0  # when Slurm will end it; 0 for unknown
    phases_s: dict[str, float] = field(default_factory=dict)
    profile: Profile | None = None
    running: dict[int, int] = field(default_factory=dict)  # request id -> attempt
    ever_ready: bool = False
    accrued_unix_s: float = 0.0
    connected: bool = False
    draining_since_mono_s: float = 0.0
    heard_mono_s: float = 0.0
    accrued_mono_s: float = 0.0
    idle_since_mono_s: float = 0.0
    idle_since_unix_s: float = 0.0
    rss_mb: float = 0.0

    @property
    def serving(self) -> bool:
        """Takes new requests now."""
        return self.state is AllocationState.WARM and self.connected

    @property
    def coming(self) -> bool:
        """Will serve later, if all goes well. Not capacity."""
        return self.state in (AllocationState.ORDERED, AllocationState.PENDING, AllocationState.LOADING) or (
            self.state is AllocationState.WARM and not self.connected
        )


class PoolHealth(Struct, kw_only=True):
    """Why a pool orders nothing for a while: after each failure in a row the pause doubles."""

    failures: int = 0
    paused_until_unix_s: float = 0.0
    reason: str = ""


class Learned(Struct, kw_only=True):
    """Running means of what a pool's requests and allocations took; 0 for 'nothing seen yet'."""

    steps: float = 0.0
    stretch: float = 0.0  # seconds a step really took over the profile's, evaluations included
    overhead_s: float = 0.0  # placement to first training step: data, bank lookup
    load_s: float = 0.0  # job start to warm
    queue_s: float = 0.0  # order to job start
    profile: Profile | None = None


class Counters(Struct, kw_only=True):
    request_id: int = 0
    allocation_id: int = 0
    epoch: int = 0


class State(Struct, kw_only=True):
    """All of it. `site` and `accounts` come from outside and are not journalled."""

    site: SiteConfig
    tag: str  # drawn once with the journal: tells this broker's jobs from another's
    accounts: dict[str, Account] | None = None
    requests: dict[int, Request] = field(default_factory=dict)
    allocations: dict[int, Allocation] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    learned: dict[str, Learned] = field(default_factory=dict)
    health: dict[str, PoolHealth] = field(default_factory=dict)
    by_key: dict[str, int] = field(default_factory=dict)  # submit keys of requests that have not ended
    outlook: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # pool -> [(deadline, finish)] waiting
    touched_requests: dict[int, Request] = field(default_factory=dict)
    touched_allocations: dict[int, Allocation] = field(default_factory=dict)

    def pool_of(self, request: Request) -> PoolConfig:
        return self.site.pools[request.pool]

    def allocations_of(self, pool: str) -> list[Allocation]:
        return [a for a in self.allocations.values() if a.pool == pool]

    def by_name(self, name: str) -> Allocation | None:
        return next((a for a in self.allocations.values() if a.name == name), None)

    def known(self, pool: str) -> Learned:
        """What was learned of the pool, for reading."""
        return self.learned.get(pool) or Learned()

    def knowledge(self, pool: str) -> Learned:
        """The same, to be added to."""
        return self.learned.setdefault(pool, Learned())

    def pool_health(self, pool: str) -> PoolHealth:
        return self.health.setdefault(pool, PoolHealth())

    def touch(self, *records: Request | Allocation) -> None:
        """Notes records whose stored form must follow."""
        for record in records:
            if isinstance(record, Request):
                self.touched_requests[record.id] = record
            else:
                self.touched_allocations[record.id] = record
