"""The types of a site file, and of the file that an allocation's worker reads. Reading files is not done here."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field


class Duration(float):
    """Seconds, written in a site file in any of Slurm's time forms or with units: "1-00:00:00", "90s", "UNLIMITED"."""


Count = Annotated[int, Meta(ge=0, le=100_000)]
Positive = Annotated[int, Meta(ge=1, le=100_000)]
# What may stand in an sbatch option: no spaces, no control characters, no leading dash.
Word = Annotated[str, Meta(max_length=256, pattern=r"^[A-Za-z0-9_.,:=+*@%/\[\]&|()][A-Za-z0-9_.,:=+*@%/\[\]&|()-]*\Z")]
PoolName = Annotated[str, Meta(max_length=32, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*\Z")]


class _Table(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class ModelConfig(_Table, frozen=True):
    """A base model: a directory that transformers loads."""

    path: str


class PoolConfig(_Table, frozen=True):
    """Warm workers of one base model, and the Slurm jobs that hold them."""

    model: str
    partition: Word = "local"
    account: Word | None = None
    qos: Word | None = None
    gres: Word | None = None  # "gpu:h100:1"; the default asks for gpus_per_worker
    gpus_per_worker: Count = 1
    cpus_per_worker: Positive = 1
    mem_mb: Positive | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    time_limit: Duration = Duration(24 * 3600)
    min_workers: Count = 0  # the floor: kept warm even when idle
    max_workers: Positive = 1  # the cap: never more allocations than this, pending ones counted
    idle_window: Duration = Duration(300)
    slots: Positive = 8  # requests that share one worker's steps


class BrokerConfig(_Table, frozen=True):
    """Where the broker listens and keeps its journal. Unset addresses mean a unix socket in the run directory."""

    listen: str | None = None  # tcp://host:port for login nodes
    address: str | None = None  # what login nodes dial, where it differs from listen
    worker_listen: str | None = None  # tcp://host:port for compute nodes; port 0 picks one
    worker_address: str | None = None  # what workers dial, where it differs from worker_listen
    public_key: str | None = None  # CURVE (Z85); its secret is in secret_key_file
    secret_key_file: str | None = None
    munge_socket: str | None = None  # None: MUNGE's default
    user: str | None = None  # the service user; None: whoever starts the broker
    state_dir: str | None = None  # node-local disk: journal, log
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class PathsConfig(_Table, frozen=True):
    """Folders that broker and compute nodes share."""

    spool: str | None = None  # worker files, checkpoints, logs
    bank: str | None = None


class LimitsConfig(_Table, frozen=True):
    data_mb: Positive = 16  # of one request's training and evaluation rows together
    rows: Annotated[int, Meta(ge=1, le=10_000_000)] = 100_000
    pending_per_user: Annotated[int, Meta(ge=1, le=10_000_000)] = 20_000
    retention: Duration = Duration(7 * 86400)  # of results
    heartbeat: Duration = Duration(5)
    worker_timeout: Duration = Duration(120)  # of silence, before a worker that Slurm still shows is given up
    orphan_timeout: Duration = Duration(900)  # of a worker without its broker
    checkpoint: Duration = Duration(5)


class SlurmConfig(_Table, frozen=True):
    conf: str | None = None  # SLURM_CONF of the commands; None: Slurm's own default
    bin_dir: str | None = None  # where sbatch, squeue, ... are; None: PATH
    calls_per_s: Annotated[float, Meta(gt=0, le=100)] = 1.0
    burst: Positive = 10
    poll: Duration = Duration(30)
    timeout: Duration = Duration(20)
    steps: bool = True  # show each request as a step of its allocation's job


class SiteConfig(_Table, frozen=True):
    """One site file."""

    cluster: Annotated[str, Meta(max_length=40, pattern=r"^[A-Za-z0-9_-]+\Z")] = "local"
    mode: Literal["site", "personal"] = "personal"
    backend: Literal["slurm", "local"] = "local"
    accounts: list[Word] = field(default_factory=lambda: ["default"])  # without Slurm's own associations
    admins: list[str] = []
    models: dict[PoolName, ModelConfig] = {}
    pools: dict[PoolName, PoolConfig] = {}
    broker: BrokerConfig = BrokerConfig()
    paths: PathsConfig = PathsConfig()
    limits: LimitsConfig = LimitsConfig()
    slurm: SlurmConfig = SlurmConfig()


class WorkerConfig(_Table, frozen=True):
    """What one allocation's worker is told, in a file that only its user may read (mode 0600): never in the job script
    or its environment, which Slurm may keep in its database."""

    allocation: str
    key: str
    broker: str  # the address that workers dial
    server_public_key: str | None
    pool: str
    model: str
    model_path: str
    slots: int
    gpus: int
    checkpoint_dir: str
    bank_dir: str
    heartbeat_s: float
    orphan_timeout_s: float
    checkpoint_s: float
    steps: bool  # launch a Slurm step for each request
    srun: str = "srun"
    more_models: dict[str, str] = {}  # name -> directory: what this worker may load beside `model`
