"""What no single key of a site file can tell: how keys fit together, and whether the files that they name will do."""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path

from broker.protocol.config import PoolConfig, SiteConfig
from broker.protocol.times import format_duration

Key = tuple[str, ...]  # ("pools", "small", "max_workers")
Mistake = tuple[Key, str, str]  # where, what, and what is allowed


def shown(value: object) -> str:
    """A value as a message may print it: quoted, control characters escaped, not too long."""
    text = repr(value) if not isinstance(value, str) else '"' + value.encode("unicode_escape").decode("ascii") + '"'
    return text if len(text) <= 60 else text[:57] + "..."


def cross_check(site: SiteConfig, *, service: bool = False, check_models: bool = False) -> list[Mistake]:
    """Everything that does not fit together in `site`.

    `service` also checks the files that only the broker may read; `check_models` the model directories."""
    checks = _Checks(site)
    for name, pool in site.pools.items():
        checks.pool(name, pool)
    checks.durations()
    checks.needs()
    checks.addresses()
    if service:
        checks.secrets()
    if check_models:
        checks.models()
    return checks.mistakes


class _Checks:
    def __init__(self, site: SiteConfig) -> None:
        self.site = site
        self.mistakes: list[Mistake] = []

    def _error(self, key: Key, what: str, remedy: str) -> None:
        self.mistakes.append((key, what, remedy))

    def pool(self, name: str, pool: PoolConfig) -> None:
        table = ("pools", name)
        if pool.model not in self.site.models:
            known = ", ".join(self.site.models) or "none"
            self._error(
                (*table, "model"),
                f"pools.{name}.model = {shown(pool.model)} is no model of this file",
                f"known: {known}; add a table [models.{pool.model}]",
            )
        if pool.min_workers > pool.max_workers:
            self._error(
                (*table, "min_workers"),
                f"pools.{name}: min_workers = {pool.min_workers} is more than max_workers = {pool.max_workers}",
                "raise max_workers or lower min_workers",
            )
        if pool.time_limit < 60:
            self._error(
                (*table, "time_limit"),
                f"pools.{name}.time_limit = {format_duration(pool.time_limit)} is too short for a warm worker",
                "allowed: a minute or more; hours are usual",
            )

    def durations(self) -> None:
        limits, slurm = self.site.limits, self.site.slurm
        times = {
            **{("limits", key): getattr(limits, key) for key in ("heartbeat", "worker_timeout", "orphan_timeout")},
            ("limits", "checkpoint"): limits.checkpoint,
            ("slurm", "poll"): slurm.poll,
            ("slurm", "timeout"): slurm.timeout,
        }
        for key, seconds in times.items():
            if seconds <= 0 or math.isinf(seconds):
                self._error(key, f"{'.'.join(key)} must be longer than zero and end some time", 'such as "30s"')
        if limits.worker_timeout < 4 * limits.heartbeat:
            self._error(
                ("limits", "worker_timeout"),
                f"limits.worker_timeout = {limits.worker_timeout:g}s is less than four heartbeats "
                f"of {limits.heartbeat:g}s: one lost message would cost a warm worker",
                f"allowed: {4 * limits.heartbeat:g}s or more",
            )

    def needs(self) -> None:
        """What a service cannot do without; a personal broker has defaults for all of it."""
        site = self.site
        if site.mode == "personal":
            return
        needed: dict[Key, object] = {
            ("broker", "listen"): site.broker.listen,
            ("broker", "worker_listen"): site.broker.worker_listen,
            ("broker", "public_key"): site.broker.public_key,
            ("broker", "secret_key_file"): site.broker.secret_key_file,
            ("paths", "spool"): site.paths.spool,
            ("paths", "bank"): site.paths.bank,
        }
        for key, value in needed.items():
            if value is None:
                self._error(key, f'{".".join(key)} is missing: mode = "site" needs it', _NEEDED_HINTS[key[-1]])

    def addresses(self) -> None:
        broker = self.site.broker
        for key in ("listen", "worker_listen", "worker_address"):
            address = getattr(broker, key)
            if address is not None and not re.fullmatch(r"tcp://[A-Za-z0-9_.:*\[\]-]+:[0-9]{1,5}", address):
                self._error(("broker", key), f"broker.{key} = {shown(address)}", "allowed: tcp://HOST:PORT")
        if broker.public_key is not None and not re.fullmatch(_Z85_KEY, broker.public_key):
            self._error(("broker", "public_key"), "broker.public_key is no CURVE key", "allowed: 40 characters of Z85")
        for table, keys in {"paths": ("spool", "bank"), "broker": ("state_dir", "secret_key_file")}.items():
            for key in keys:
                value = getattr(getattr(self.site, table), key)
                if value is not None and not value.startswith("/"):
                    self._error((table, key), f"{table}.{key} = {shown(value)}", "allowed: an absolute path")

    def secrets(self) -> None:
        path = self.site.broker.secret_key_file
        if path is None:
            return
        key = ("broker", "secret_key_file")
        try:
            found = Path(path).lstat()
        except OSError as error:
            self._error(key, f"{path} cannot be read: {error.strerror}", "make it with: ptctl broker keygen")
            return
        mode = stat.S_IMODE(found.st_mode)
        if not stat.S_ISREG(found.st_mode):
            self._error(key, f"{path} is not a regular file", "a secret key may not be a link")
        elif mode & 0o077:
            self._error(key, f"{path} has mode {mode:04o}: others may read the secret key", f"chmod 0600 {path}")
        elif found.st_uid != os.geteuid():
            self._error(key, f"{path} belongs to user id {found.st_uid}", "the service user must own it")

    def models(self) -> None:
        from slurm_plugin.model_folder import model_mistake  # not for login commands

        for name, model in self.site.models.items():
            if mistake := model_mistake(Path(model.path)):
                self._error(
                    ("models", name, "path"),
                    f"models.{name}.path = {shown(model.path)} {mistake}",
                    "name a directory that transformers loads",
                )


_Z85_KEY = r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}"
_NEEDED_HINTS = {
    "listen": 'such as listen = "tcp://*:7801", which login nodes can reach',
    "worker_listen": 'such as worker_listen = "tcp://HOST:7802", which compute nodes can reach',
    "public_key": "the server's CURVE public key, 40 characters of Z85",
    "secret_key_file": "the file of the CURVE secret key, mode 0600, owned by the service user",
    "spool": "a folder that broker and compute nodes share",
    "bank": "a folder that broker and compute nodes share",
}
