"""`ptctl broker`: start, stop and look at the broker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from broker.protocol.errors import BrokerUnreachable, PromptTunerError, Refused
from broker.protocol.messages import Info, InfoReply, Shutdown, ShuttingDown
from broker.protocol.states import AllocationState
from broker.protocol.times import format_duration
from slurm_plugin.cli.common import PtGroup, expect, open_broker, say

if TYPE_CHECKING:
    from broker.protocol.config import SiteConfig

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL_LINES = 15

site_option = click.option(
    "--site-file",
    "--site",
    "site",
    type=click.Path(path_type=Path),
    envvar="PROMPTTUNER_SITE_FILE",
    metavar="FILE",
    help="The site file.",
)


@click.group("broker", cls=PtGroup)
def broker() -> None:
    """Start, stop and look at the broker."""


@broker.command("start")
@site_option
@click.option("--model", "models", multiple=True, metavar="NAME=DIR", help="Serve this base model (no site file).")
@click.option("--workers", type=click.IntRange(1, 64), default=1, help="Most local workers of each model.")
@click.option("--template-dir", type=click.Path(path_type=Path), help="Where the job templates are.")
@click.option("--foreground", is_flag=True, help="Stay, and log to stderr.")
def start(site: Path | None, models: tuple[str, ...], workers: int, template_dir: Path | None, foreground: bool) -> int:
    """Start a broker: with a site file on Slurm, with --model on this machine."""
    from slurm_plugin.brokerd import main, site_of

    arguments = _arguments(site, models, workers, template_dir)
    if foreground:
        return main(arguments)
    site_of(site, list(models), workers)  # tells every mistake before anything is started
    if site is None:
        _refuse_hidden(models)
    running = ask(site)
    if running is not None:
        raise Refused(f"a broker is running already (pid {running.pid})", "ptctl broker stop ends it")
    reply, log_file = launch(site, arguments)
    say("ptctl", f"the broker runs (pid {reply.pid}), its log is {log_file}")
    return 0


@broker.command("stop")
@site_option
@click.option("--keep-workers", is_flag=True, help="Leave warm workers to the next broker.")
def stop(site: Path | None, keep_workers: bool) -> int:
    """Stop the broker and its workers. Requests stay in its journal and go on when it is started again."""
    with open_broker(site) as client:
        pid = expect(client.call(Info()), InfoReply).pid
        expect(client.call(Shutdown(end_workers=not keep_workers)), ShuttingDown)
    _wait_closed(site, pid)
    say("ptctl", f"the broker (pid {pid}) has stopped")
    return 0


@broker.command("status")
@site_option
def status(site: Path | None) -> int:
    """Say whether a broker runs, and what it holds. Exit code 3 if none does."""
    with open_broker(site) as client:
        reply = expect(client.call(Info()), InfoReply)
    warm = sum(1 for p in reply.pools for a in p.allocations if a.state is AllocationState.WARM)
    held = sum(len(p.allocations) for p in reply.pools)
    up = format_duration(max(0.0, time.time() - reply.up_since_unix_s))
    click.echo(f"broker {reply.version} of cluster {reply.cluster} ({reply.mode}, {reply.backend}), pid {reply.pid}")
    click.echo(f"up {up}, {reply.active_requests} open requests, {warm} of {held} workers warm, {reply.rss_mb:.0f} MB")
    return 0


@broker.command("keygen")
@click.argument("file", type=click.Path(path_type=Path))
def keygen(file: Path) -> int:
    """Make the broker's secret key in FILE (mode 0600) and print the public key for the site file."""
    from slurm_plugin.brokerd import write_key

    try:
        click.echo(write_key(file))
    except OSError as error:
        raise PromptTunerError(
            f"cannot make {file}: {error.strerror}", "name a new file in a folder of yours"
        ) from None
    return 0


def ask(site: Path | None) -> InfoReply | None:
    """What the running broker says of itself, or None if none runs."""
    try:
        with open_broker(site) as client:
            return expect(client.call(Info()), InfoReply)
    except BrokerUnreachable:
        return None


def _wait_closed(site: Path | None, pid: int) -> None:
    """Returns when nobody listens any more: the broker closes its client socket last of all."""
    from broker.net.client import check_listening
    from slurm_plugin.contact import find_contact

    address = find_contact(site)[0].address
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            check_listening(address)
        except BrokerUnreachable:
            return
        time.sleep(0.02)
    raise PromptTunerError(f"the broker (pid {pid}) has not stopped within {STOP_TIMEOUT_S:g} s", "look at its log")


def launch(site: Path | None, arguments: list[str]) -> tuple[InfoReply, Path]:
    """Starts the daemon in a session of its own and returns once it answers.

    Raises `PromptTunerError` with the end of its log if it does not.
    """
    log_file = _log_file(site)
    command = [sys.executable, "-I", "-m", "slurm_plugin.brokerd", *arguments]
    with open(log_file, "ab", opener=_private) as log:
        offset = log.tell()
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and daemon.poll() is None:
        reply = ask(site)
        if reply is not None and reply.pid == daemon.pid:
            return reply, log_file
        time.sleep(0.05)
    said = log_file.read_bytes()[offset:].decode("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:]
    error = PromptTunerError("the broker did not start:\n  " + "\n  ".join(said), f"its log is {log_file}")
    error.exit_code = daemon.returncode or error.exit_code
    daemon.kill()
    raise error


def _arguments(site: Path | None, models: tuple[str, ...], workers: int, template_dir: Path | None) -> list[str]:
    arguments = [f"--workers={workers}", *(f"--model={m}" for m in models)]
    if site is not None:
        arguments.append(f"--site={site}")
    if template_dir is not None:
        arguments.append(f"--template-dir={template_dir}")
    return arguments


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _refuse_hidden(models: tuple[str, ...]) -> None:
    """A broker of --model that no command would find is not started."""
    from slurm_plugin.contact import find_contact

    contact, _ = find_contact()
    if models and contact.auth != "owner":
        raise Refused(
            f"the site file in force names the broker at {contact.address}: commands would not find this one",
            "leave out --model, or set PROMPTTUNER_CONF_DIR to a folder with an empty site.toml",
        )


def _log_file(site: Path | None) -> Path:
    from slurm_plugin.contact import read_site_config
    from slurm_plugin.paths import personal_state_dir

    config: SiteConfig = read_site_config(site)
    folder = Path(config.broker.state_dir or personal_state_dir())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / "broker.log"
