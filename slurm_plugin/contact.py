"""Where the broker is, and how to prove to it who is calling: from the site file, or the personal broker's socket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from broker.protocol.config import SiteConfig
from slurm_plugin.paths import find_site, personal_run_dir

if TYPE_CHECKING:
    from broker.net.client import Contact

SOCKET_NAME = "broker.sock"
_WILDCARDS = ("*", "0.0.0.0", "[::]")


def find_contact(site_file: Path | None = None) -> tuple[Contact, str]:
    """The broker to talk to and the cluster's name; no connection is made.

    `site_file` is an explicit one; else the installed or the user's own; without any, the user's personal broker.
    Raises ConfigError for a site file that cannot be used.
    """
    site = read_site_config(site_file)
    return contact_for(site), site.cluster


def read_site_config(site_file: Path | None = None) -> SiteConfig:
    """The site file in force, or the embedded default's values where there is none."""
    found = find_site(site_file)
    if found is None:
        return SiteConfig()
    from slurm_plugin.site import load_site  # tomllib and the checks: only where there is a file

    return load_site(found)


def contact_for(site: SiteConfig) -> Contact:
    """The contact of `site`'s broker: TCP with MUNGE where it listens there, else its owner's unix socket."""
    from broker.net.client import Contact

    broker = site.broker
    if broker.listen is None:
        return Contact(address=f"ipc://{personal_run_dir() / SOCKET_NAME}", auth="owner")
    return Contact(
        address=broker.address or dial_address(broker.listen),
        auth="munge",
        server_public_key=broker.public_key,
        munge_socket=broker.munge_socket,
        service_user=broker.user,
    )


def dial_address(listen: str) -> str:
    """What to connect to for an address that was bound: every-interface means this host."""
    scheme, _, rest = listen.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://{'127.0.0.1' if host in _WILDCARDS else host}:{port}"
