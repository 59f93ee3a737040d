"""Which broker a command talks to."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.protocol.config import BrokerConfig, SiteConfig
from broker.protocol.errors import ConfigError
from slurm_plugin.contact import contact_for, dial_address, find_contact


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PROMPTTUNER_CONF_DIR", str(tmp_path / "conf"))
    monkeypatch.setenv("PROMPTTUNER_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


def test_without_a_site_file_it_is_ones_own_broker(home: Path) -> None:
    contact, cluster = find_contact()
    assert (contact.address, contact.auth, cluster) == (f"ipc://{home}/run/broker.sock", "owner", "local")
    assert contact.server_public_key is None


def test_a_site_file_without_an_address_is_a_personal_broker_too(home: Path) -> None:
    (home / "conf").mkdir()
    (home / "conf" / "site.toml").write_text('cluster = "mine"\n')
    contact, cluster = find_contact()
    assert (contact.auth, cluster) == ("owner", "mine")


def test_a_broker_that_listens_is_reached_with_munge_and_its_pinned_key() -> None:
    broker = BrokerConfig(listen="tcp://svc1:4242", public_key="k" * 40, munge_socket="/run/m", user="broker")
    contact = contact_for(SiteConfig(mode="site", broker=broker))
    assert (contact.address, contact.auth, contact.server_public_key) == ("tcp://svc1:4242", "munge", "k" * 40)
    assert (contact.munge_socket, contact.service_user) == ("/run/m", "broker")


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("tcp://0.0.0.0:4242", "tcp://127.0.0.1:4242"),
        ("tcp://*:4242", "tcp://127.0.0.1:4242"),
        ("tcp://[::]:4242", "tcp://127.0.0.1:4242"),
        ("tcp://[fe80::1]:4242", "tcp://[fe80::1]:4242"),
        ("tcp://host.example:4242", "tcp://host.example:4242"),
    ],
)
def test_every_interface_means_this_host(listen: str, address: str) -> None:
    assert dial_address(listen) == address


def test_an_explicit_site_file_must_be_there(home: Path) -> None:
    with pytest.raises(ConfigError, match="no such site file"):
        find_contact(home / "none.toml")
