"""Where things are found, and that nobody else can enter a personal broker's run directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from broker.protocol.errors import AuthError, ConfigError
from slurm_plugin import paths


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("PROMPTTUNER_RUN_DIR", "PROMPTTUNER_STATE_DIR", "PROMPTTUNER_CONF_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(paths, "SYSTEM_CONF_DIR", tmp_path / "etc")
    return tmp_path


def test_the_run_directory_is_made_private_whatever_the_umask(home: Path) -> None:
    old = os.umask(0)
    try:
        path = paths.personal_run_dir()
    finally:
        os.umask(old)
    assert path == home / ".local/state/prompttuner/run"
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert paths.personal_run_dir() == path


def test_the_run_directory_prefers_its_variable_then_the_sessions(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "missing"))
    assert paths.personal_run_dir() == home / ".local/state/prompttuner/run"
    (home / "runtime").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "runtime"))
    assert paths.personal_run_dir() == home / "runtime/prompttuner"
    monkeypatch.setenv("PROMPTTUNER_RUN_DIR", str(home / "mine"))
    assert paths.personal_run_dir() == home / "mine"


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o750, 0o701, 0o1777])
def test_a_run_directory_that_others_may_enter_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    (home / "run").mkdir()
    (home / "run").chmod(mode)
    monkeypatch.setenv("PROMPTTUNER_RUN_DIR", str(home / "run"))
    with pytest.raises(AuthError, match="mode"):
        paths.personal_run_dir()


def test_a_run_directory_that_is_a_link_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "real").mkdir(mode=0o700)
    (home / "run").symlink_to(home / "real")
    monkeypatch.setenv("PROMPTTUNER_RUN_DIR", str(home / "run"))
    with pytest.raises(AuthError, match="link"):
        paths.personal_run_dir()


def test_a_run_directory_of_somebody_else_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "run").mkdir(mode=0o700)
    monkeypatch.setenv("PROMPTTUNER_RUN_DIR", str(home / "run"))
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.raises(AuthError, match="belongs to user id"):
        paths.personal_run_dir()


def test_a_run_directory_that_cannot_be_made_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("PROMPTTUNER_RUN_DIR", str(home / "file" / "run"))
    with pytest.raises(ConfigError, match="cannot make"):
        paths.personal_run_dir()


def test_templates_are_found_in_their_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(paths.__file__).resolve().parent.parent
    monkeypatch.setattr("sys.prefix", str(home / "prefix"))
    assert paths.find_data("job_templates") == source / "job_templates"
    for place in ("prefix/share/prompttuner", "etc", "conf"):
        (home / place / "job_templates").mkdir(parents=True)
        if place == "conf":
            monkeypatch.setenv("PROMPTTUNER_CONF_DIR", str(home / "conf"))
        assert paths.find_data("job_templates") == home / place / "job_templates"
    assert paths.find_data("job_templates", home) == home


def test_an_explicit_template_folder_is_never_replaced_by_another(home: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        paths.find_data("job_templates", home / "nowhere")


def test_the_site_file_is_found_in_its_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.find_site() is None
    for place in (".config/prompttuner", "etc", "conf"):
        (home / place).mkdir(parents=True)
        (home / place / "site.toml").write_text("")
        if place == "conf":
            monkeypatch.setenv("PROMPTTUNER_CONF_DIR", str(home / "conf"))
        assert paths.find_site() == home / place / "site.toml"
    (home / "mine.toml").write_text("")
    assert paths.find_site(home / "mine.toml") == home / "mine.toml"
    with pytest.raises(ConfigError, match="no such site file"):
        paths.find_site(home / "nowhere.toml")
