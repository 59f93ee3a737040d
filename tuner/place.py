"""Where this worker runs: the job, host, GPUs and end of its allocation, as its environment and /proc tell."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from msgspec import Struct

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 20.0


class Place(Struct, frozen=True, kw_only=True):
    """One process's place in the cluster. `incarnation` is drawn anew by each process."""

    incarnation: str
    job_id: str
    restart_count: int
    host: str
    gpus: str
    pid: int
    end_unix_s: float  # 0 for unknown


def here(env: Mapping[str, str]) -> Place:
    """This process's place; what `env` does not tell is empty or 0."""
    pid = os.getpid()
    return Place(
        incarnation=secrets.token_hex(8),
        job_id=env.get("SLURM_JOB_ID") or env.get("PROMPTTUNER_JOB_ID") or f"local-{pid}",
        restart_count=_whole(env.get("SLURM_RESTART_COUNT")),
        host=env.get("SLURMD_NODENAME") or platform.node(),
        gpus=env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS") or env.get("CUDA_VISIBLE_DEVICES") or "",
        pid=pid,
        end_unix_s=float(_whole(env.get("SLURM_JOB_END_TIME"))),
    )


def _whole(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0


def ask_end_unix_s(job_id: str, squeue: str) -> float:
    """When Slurm will end job `job_id` (epoch seconds), 0 if it does not say. Blocks for up to 20 s.

    For releases whose jobs have no SLURM_JOB_END_TIME.
    """
    command = [squeue, "-h", "-j", job_id, "-o", "%e"]
    env = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        answer = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ASK_TIMEOUT_S
        )
        return datetime.fromisoformat(answer.stdout.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError) as error:  # "N/A", "NONE", no squeue, no answer
        log.info("Slurm does not say when job %s ends: %s", job_id, error)
        return 0.0


def since_process_start_s() -> float:
    """Seconds since the kernel started this process (to 10 ms)."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_ticks = int(after_name[19])  # field 22 of proc(5), counted after pid and name
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory of process `pid` in MiB; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
