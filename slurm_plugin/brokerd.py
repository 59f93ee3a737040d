"""The broker's daemon: from a site file, or from models named on the command line, to a broker on Slurm or on this
machine.

Started by `ptctl broker start`, by systemd, or by hand as `python -I -m slurm_plugin.brokerd`.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import pwd
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import zmq

from broker.allocations import AllocationProvider
from broker.daemon.allocator import Allocator
from broker.daemon.clients import About, Clients
from broker.daemon.loop import Daemon, Wiring
from broker.daemon.spool import Spool, load_secret
from broker.daemon.workers import Workers
from broker.net.doors import MIB, Authenticator, ClientDoor, Keys, MungeIdentity, OwnerOnly, WorkerDoor
from broker.net.munge import Munge
from broker.protocol.config import SiteConfig
from broker.protocol.errors import ConfigError, PromptTunerError
from broker.store.journal import Journal
from slurm_plugin import __version__
from slurm_plugin.contact import SOCKET_NAME, dial_address
from slurm_plugin.local import LocalProvider, machine_gpus
from slurm_plugin.model_folder import model_mistake
from slurm_plugin.paths import find_site, personal_run_dir, personal_state_dir
from slurm_plugin.site import default_site, load_site

log = logging.getLogger(__name__)

WORKER_MESSAGE_MIB = 64


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; workers stay for the next broker. Returns an exit code of the errors' tree."""
    options = _options(argv)
    os.umask(0o077)
    try:
        site = site_of(options.site, options.model, options.workers)
        logging.basicConfig(
            level=site.broker.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        with _one_broker(Path(site.broker.state_dir or "")):
            daemon = build(site, options.template_dir)

            def stop(number: int, frame: FrameType | None) -> None:
                daemon.stop()

            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, stop)
            log.info("serving cluster %s (%s, %s)", site.cluster, site.mode, site.backend)
            daemon.run()
    except PromptTunerError as error:
        print(f"brokerd: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def site_of(site_file: Path | None, models: list[str], workers: int) -> SiteConfig:
    """The site file in force, or the embedded default that serves `models` ("NAME=DIR").

    Raises `ConfigError`, every mistake at once."""
    found = None if models and site_file is None else find_site(site_file)
    if found is not None:
        if models:
            raise ConfigError(f"{found} names the models", "leave out --model, or --site")
        return load_site(found, service=True, check_models=True)
    named = _named_models(models)
    return default_site(named, workers, personal_state_dir(), gpus_per_worker=1 if machine_gpus() else 0)


def build(site: SiteConfig, template_dir: Path | None = None, provider: AllocationProvider | None = None) -> Daemon:
    """Wires a daemon: journal, sockets, provider (the site's, unless given). Raises what any of them refuses."""
    state_dir = Path(site.broker.state_dir or "")
    journal = Journal(state_dir / "journal.sqlite")
    spool_dir, bank_dir = Path(site.paths.spool or ""), Path(site.paths.bank or "")
    spool = Spool(site, spool_dir, bank_dir, load_secret(state_dir / "secret"))
    keys = _keys(site, state_dir)
    client_address, authenticator = _client_side(site, keys)
    client_door = ClientDoor(client_address, keys, (site.limits.data_mb + 1) * MIB, authenticator)
    worker_door = _worker_door(site, state_dir, keys)
    allocator = Allocator(provider or _provider(site, spool_dir, template_dir))
    about = About(version=__version__, pid=os.getpid(), up_since_unix_s=time.time())
    wiring = Wiring(
        site=site,
        journal=journal,
        spool=spool,
        allocator=allocator,
        client_door=client_door,
        worker_door=worker_door,
        clients=Clients(client_door, journal, about),
        workers=Workers(worker_door, journal, spool),
        worker_address=_worker_address(site, worker_door.address),
        server_public_key=keys.public.decode() if worker_door.address.startswith("tcp://") and keys else None,
    )
    return Daemon(wiring)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="brokerd", description="The broker's daemon.")
    parser.add_argument("--site", type=Path, help="the site file")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="serve this base model")
    parser.add_argument("--workers", type=int, default=1, help="most local workers of each model (embedded default)")
    parser.add_argument("--template-dir", type=Path, help="where the job templates are")
    return parser.parse_args(argv)


def _named_models(models: list[str]) -> dict[str, str]:
    if not models:
        raise ConfigError(
            "no site file, and no model to serve",
            "name a directory that transformers loads: ptctl broker start --model NAME=DIR",
        )
    named: dict[str, str] = {}
    for model in models:
        name, separator, folder = model.partition("=")
        path = Path(folder)
        if not (separator and name.replace("-", "").replace("_", "").isalnum()):
            raise ConfigError(f"--model {model}: not of the form NAME=DIR", "for example --model tiny=/models/tiny")
        if mistake := model_mistake(path):
            raise ConfigError(f"--model {model}: {path} {mistake}", "name a directory that transformers loads")
        named[name] = str(path.absolute())
    return named


class _one_broker:
    """Holds the state directory's lock: one journal has one broker."""

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._state_dir = state_dir
        self._file = (state_dir / "lock").open("a+", encoding="ascii")

    def __enter__(self) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            raise ConfigError(
                f"another broker (pid {holder}) uses {self._state_dir}", "ptctl broker status tells more"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _keys(site: SiteConfig, state_dir: Path) -> Keys | None:
    """The CURVE pair: the site's, or one of its own where a personal broker must speak TCP to its workers."""
    if site.broker.secret_key_file:
        path = Path(site.broker.secret_key_file)
    elif site.backend == "slurm":
        path = state_dir / "curve.secret"
        if not path.exists():
            write_key(path)
    else:
        return None
    status = path.stat()
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise ConfigError(f"{path} must be readable by its owner, the broker's user, alone", f"chmod 600 {path}")
    secret = path.read_bytes().strip()
    public = zmq.curve_public(secret)
    if site.broker.public_key and public.decode() != site.broker.public_key:
        raise ConfigError(f"broker.public_key is not the key of {path}", f"set it to {public.decode()!r}")
    return Keys(public, secret)


def write_key(path: Path) -> str:
    """Makes a CURVE secret key (mode 0600, never over an old one) and returns its public key."""
    public, secret = zmq.curve_keypair()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret + b"\n")
    return public.decode()


def _client_side(site: SiteConfig, keys: Keys | None) -> tuple[str, Authenticator]:
    if site.broker.listen is None:
        return f"ipc://{personal_run_dir() / SOCKET_NAME}", OwnerOnly(os.geteuid())
    if keys is None:
        raise ConfigError("broker.listen needs broker.secret_key_file", "make one: ptctl broker keygen FILE")
    if site.broker.user and pwd.getpwuid(os.geteuid()).pw_name != site.broker.user:
        raise ConfigError(f"the site file wants the broker to run as {site.broker.user}", "start it as that user")
    munge = Munge(site.broker.munge_socket)
    return site.broker.listen, MungeIdentity(munge, keys.public.decode(), frozenset(site.admins), os.geteuid())


def _worker_door(site: SiteConfig, state_dir: Path, keys: Keys | None) -> WorkerDoor:
    """Binds where the workers look. A port that was picked is kept for the next start: they dial it again."""
    limit = WORKER_MESSAGE_MIB * MIB
    if site.backend == "local" and site.broker.worker_listen is None:
        return WorkerDoor(f"ipc://{personal_run_dir() / 'workers.sock'}", None, limit)
    listen = site.broker.worker_listen or "tcp://0.0.0.0:0"
    scheme, _, port = listen.rpartition(":")
    if port not in ("0", "*"):
        return WorkerDoor(listen, keys, limit)
    kept = state_dir / "worker_port"
    if kept.exists():
        try:
            return WorkerDoor(f"{scheme}:{kept.read_text(encoding='ascii').strip()}", keys, limit)
        except PromptTunerError as error:
            log.warning("%s; workers of the former broker will not find this one", error.message)
    door = WorkerDoor(f"{scheme}:*", keys, limit)
    kept.write_text(door.address.rpartition(":")[2], encoding="ascii")
    return door


def _worker_address(site: SiteConfig, bound: str) -> str:
    if site.broker.worker_address:
        return site.broker.worker_address
    if bound.startswith("tcp://0.0.0.0:"):
        return f"tcp://{socket.getfqdn()}:{bound.rpartition(':')[2]}"
    return bound if bound.startswith("ipc://") else dial_address(bound)


def _provider(site: SiteConfig, spool_dir: Path, template_dir: Path | None) -> AllocationProvider:
    if site.backend == "local":
        return LocalProvider(spool_dir / "allocations")
    from slurm_plugin.slurm.client import CommandLineSlurm
    from slurm_plugin.slurm.provider import SlurmProvider
    from slurm_plugin.slurm.template import Launch

    client = CommandLineSlurm(site.slurm)
    launch = Launch(cluster=site.cluster, srun=client.srun, slurm_conf=site.slurm.conf, template_dir=template_dir)
    return SlurmProvider(client, launch)


if __name__ == "__main__":
    sys.exit(main())
