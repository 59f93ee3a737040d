"""The cluster's shape and its configuration files: pure functions from a `Layout` to text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tests.cluster.packages import SEARCH_PATH

NODES = ("node1", "node2", "node3", "node4")
PORT_NAMES = ("mariadbd", "slurmdbd", "slurmctld", *NODES)
CPUS_PER_NODE = 16
GPUS_PER_NODE = 2
MEMORY_PER_NODE_MIB = 65536
PARTITIONS = ("normal", "preemptible")
DATABASE = "slurm_acct_db"
MARK = "PROMPTTUNER_CLUSTER_DIR"


@dataclass(frozen=True)
class Layout:
    """Where everything of one cluster lies, who runs it, and on which ports. Kept as JSON in its directory."""

    dir: Path
    service_user: str  # runs every daemon but slurmd: an unprivileged one under root, else the one user there is
    rootless: bool
    controller_host: str
    ports: dict[str, int]

    @property
    def name(self) -> str:
        """The ClusterName: of its own for each directory, as it marks the environment of the cluster's jobs."""
        return "lab" + blake2b(str(self.dir).encode(), digest_size=4).hexdigest()

    @property
    def slurm_conf(self) -> Path:
        return self.dir / "etc/slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """The environment of Slurm's commands."""
        return {"PATH": SEARCH_PATH, "LANG": "C.UTF-8", "SLURM_CONF": str(self.slurm_conf)}

    @property
    def daemon_env(self) -> dict[str, str]:
        """The environment of the daemons, with the mark by which they and what they fork are known for ours."""
        # The mark is last: Slurm's daemons write their titles over the first bytes of their environment.
        return {**self.env, MARK: str(self.dir)}

    @property
    def marks(self) -> list[bytes]:
        """What stands in the environment of every process of this cluster: one for the daemons, one for its jobs."""
        # Not SLURM_CONF, which is also in the shells of people who use the cluster.
        return [f"{MARK}={self.dir}".encode(), f"SLURM_CLUSTER_NAME={self.name}".encode()]

    @property
    def munge_socket(self) -> Path:
        return self.dir / "run/munge.sock"

    @property
    def munge_key(self) -> Path:
        return self.dir / "etc/munge.key"

    @property
    def database_init(self) -> Path:
        return self.dir / "etc/mariadb-init.sql"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dir": str(self.dir)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Layout:
        return cls(**{**value, "dir": Path(value["dir"])})


def slurm_conf(layout: Layout) -> str:
    """slurm.conf: four nodes that are one host, told apart by their ports, with more CPUs than the host has."""
    d, ports = layout.dir, layout.ports
    nodes = "\n".join(
        f"NodeName={node} NodeAddr=127.0.0.1 Port={ports[node]} CPUs={CPUS_PER_NODE} RealMemory={MEMORY_PER_NODE_MIB} "
        f"Gres=gpu:h100:{GPUS_PER_NODE} State=UNKNOWN"
        for node in NODES
    )
    # AccountingStoragePass: sacct and sacctmgr look for MUNGE there, and not in AuthInfo.
    return f"""\
ClusterName={layout.name}
SlurmctldHost={layout.controller_host}(127.0.0.1)
SlurmctldPort={ports["slurmctld"]}
SlurmUser={layout.service_user}
SlurmdUser={layout.service_user if layout.rootless else "root"}
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/run/slurmctld.pid
SlurmdPidFile={d}/run/slurmd-%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd@%n.log
MailProg=/bin/true

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
SlurmdParameters=config_overrides

SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1024
GresTypes=gpu
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=5
KillWait=5
SlurmdTimeout=10
InactiveLimit=0

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports["slurmdbd"]}
AccountingStoragePass={layout.munge_socket}
AccountingStorageTRES=gres/gpu,gres/gpu:h100
AccountingStorageEnforce=associations,limits,qos
AccountingStoreFlags=job_comment,job_env,job_script

{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF DefaultTime=60 MaxTime=7-0 State=UP
PartitionName=preemptible Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 DefaultTime=60 MaxTime=7-0 State=UP
"""


def gres_conf(layout: Layout) -> str:
    """gres.conf: the fake GPUs. CUDA_VISIBLE_DEVICES takes its numbers from the ends of the device files' names."""
    lines = [
        f"NodeName={node} Name=gpu Type=h100 File={layout.dir}/dev/{node}/nvidia[0-{GPUS_PER_NODE - 1}]"
        for node in NODES
    ]
    return "\n".join(["AutoDetect=off", *lines, ""])


def slurmdbd_conf(layout: Layout, database_password: str) -> str:
    return f"""\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={layout.ports["slurmdbd"]}
SlurmUser={layout.service_user}
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
PidFile={layout.dir}/run/slurmdbd.pid
LogFile={layout.dir}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={layout.ports["mariadbd"]}
StorageUser=slurm
StoragePass={database_password}
StorageLoc={DATABASE}
"""


def database_init_sql(database_password: str) -> str:
    """What MariaDB runs at each start: no client program and no root password are needed."""
    return f"""\
CREATE DATABASE IF NOT EXISTS {DATABASE};
CREATE OR REPLACE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{database_password}';
GRANT ALL ON {DATABASE}.* TO 'slurm'@'127.0.0.1';
"""


def cgroup_conf(version: tuple[int, int]) -> str | None:
    """cgroup.conf where a release insists on one (23.11 and later), else None: older ones refuse the value."""
    return "CgroupPlugin=disabled\n" if version >= (23, 11) else None


def accounts(layout: Layout) -> list[str]:
    """The sacctmgr commands that make the accounts and their users, in order."""
    commands = [
        f"add cluster {layout.name}",
        "add account lab Description=lab Organization=lab",
        "add account teama parent=lab Description=teama Organization=lab",
        "add account teamb parent=lab Description=teamb Organization=lab",
        "add account svc Description=services Organization=lab",
    ]
    if layout.rootless:
        return [*commands, f"add user {layout.service_user} account=teama,teamb,svc DefaultAccount=teama"]
    return [
        *commands,
        "add user alice account=teama",
        "add user bob account=teamb",
        "add user prompttuner account=svc AdminLevel=Operator",
    ]
