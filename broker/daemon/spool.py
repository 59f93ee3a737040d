"""The files that the broker leaves for its workers on the shared filesystem."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import shutil
from pathlib import Path

import msgspec

from broker.allocations import AllocationOrder
from broker.protocol.config import SiteConfig, WorkerConfig
from broker.protocol.errors import ConfigError
from broker.state.model import Allocation


class Spool:
    """Folders of allocations and checkpoints below `root`, all of them 0700."""

    def __init__(self, site: SiteConfig, root: Path, bank: Path, secret: bytes) -> None:
        self._site = site
        self._secret = secret
        self._allocations, self._checkpoints, self._bank = root / "allocations", root / "checkpoints", bank
        for folder in (root, self._allocations, self._checkpoints, bank):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def key_of(self, allocation: str) -> str:
        """The key by which this allocation's worker proves itself; drawn from the broker's secret, so never stored."""
        return hmac.new(self._secret, allocation.encode(), hashlib.sha256).hexdigest()

    def order(self, allocation: Allocation, worker_address: str, server_public_key: str | None) -> AllocationOrder:
        """Writes the worker's file (0600) and returns the order that names it. Safe to repeat."""
        pool = self._site.pools[allocation.pool]
        folder = self._allocations / allocation.name
        folder.mkdir(mode=0o700, exist_ok=True)
        limits = self._site.limits
        config = WorkerConfig(
            allocation=allocation.name,
            key=self.key_of(allocation.name),
            broker=worker_address,
            server_public_key=server_public_key,
            pool=allocation.pool,
            model=pool.model,
            model_path=self._site.models[pool.model].path,
            slots=pool.slots,
            gpus=pool.gpus_per_worker,
            checkpoint_dir=str(self._checkpoints),
            bank_dir=str(self._bank),
            heartbeat_s=float(limits.heartbeat),
            orphan_timeout_s=float(limits.orphan_timeout),
            checkpoint_s=float(limits.checkpoint),
            steps=self._site.backend == "slurm" and self._site.slurm.steps,
            srun=f"{self._site.slurm.bin_dir}/srun" if self._site.slurm.bin_dir else "srun",
        )
        worker_file = folder / "worker.json"
        _write_private(worker_file, msgspec.json.encode(config))
        return AllocationOrder(
            name=allocation.name,
            pool_name=allocation.pool,
            pool=pool,
            worker_file=worker_file,
            log_file=folder / "worker.log",
        )

    def forget(self, name: str) -> None:
        """Removes the key of an allocation that has ended; its log stays for the site's retention."""
        (self._allocations / name / "worker.json").unlink(missing_ok=True)

    def forget_checkpoint(self, request_id: int) -> None:
        (self._checkpoints / f"{request_id}.safetensors").unlink(missing_ok=True)

    def prune(self, before_unix_s: float) -> None:
        """Removes the folders of allocations that ended and were last written before then."""
        for folder in self._allocations.iterdir():
            if not (folder / "worker.json").exists() and folder.stat().st_mtime < before_unix_s:
                shutil.rmtree(folder, ignore_errors=True)


def load_secret(path: Path) -> bytes:
    """The broker's secret, made at the first start (mode 0600). Raises `ConfigError` if others could have read it."""
    if not path.exists():
        _write_private(path, secrets.token_hex(32).encode())
    status = path.stat()
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise ConfigError(f"the broker's secret {path} is readable by others", f"chmod 600 {path}, then replace it")
    return path.read_bytes()


def _write_private(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
