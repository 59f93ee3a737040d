"""Where things are: the run and state directories of one user, the site file, the templates. Standard library only."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Literal

from broker.protocol.errors import AuthError, ConfigError

SYSTEM_CONF_DIR = Path("/etc/prompttuner")
_SOURCE_TREE = Path(__file__).resolve().parent.parent


def personal_run_dir() -> Path:
    """The directory of a personal broker's sockets: `$PROMPTTUNER_RUN_DIR`, else `$XDG_RUNTIME_DIR/prompttuner`, else
    `~/.local/state/prompttuner/run`.

    It exists on return, and only its owner, the caller, may enter it. Raises AuthError if it is anything else:
    whoever can enter it can speak to the broker in the owner's name."""
    explicit = os.environ.get("PROMPTTUNER_RUN_DIR")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if explicit:
        path = Path(explicit)
    elif runtime and Path(runtime).is_dir():
        path = Path(runtime) / "prompttuner"
    else:
        path = _user_state_home() / "prompttuner" / "run"
    return _private_dir(path)


def personal_state_dir() -> Path:
    """The directory of a personal broker's journal, spool and bank: `$PROMPTTUNER_STATE_DIR`, else
    `$XDG_STATE_HOME/prompttuner`, else `~/.local/state/prompttuner`. It need not exist yet."""
    explicit = os.environ.get("PROMPTTUNER_STATE_DIR")
    return Path(explicit) if explicit else _user_state_home() / "prompttuner"


def find_data(name: Literal["job_templates", "site_configs", "small_world"], explicit: Path | None = None) -> Path:
    """The folder of templates or example site files. An explicit one is taken as it is; else the first that exists of
    `$PROMPTTUNER_CONF_DIR`, `/etc/prompttuner`, the prefix's `share/prompttuner`, the source tree.

    Raises ConfigError when there is none."""
    if explicit is not None:
        places = [explicit]
    else:
        installed = (*_conf_dirs(), Path(sys.prefix) / "share/prompttuner")
        places = [place / name for place in (*installed, _SOURCE_TREE, _SOURCE_TREE / "examples")]
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(str(place) for place in places)
    raise ConfigError(f"no {name} folder: looked at {looked}", "reinstall, or set PROMPTTUNER_CONF_DIR")


def find_site(explicit: Path | None = None) -> Path | None:
    """The site file: an explicit one (ConfigError if it is not there), else the first that exists of
    `$PROMPTTUNER_CONF_DIR/site.toml`, `/etc/prompttuner/site.toml`, `~/.config/prompttuner/site.toml`; None if there is
    none, which means the embedded default."""
    if explicit is not None:
        if not explicit.is_file():
            raise ConfigError(f"{explicit}: no such site file", "name an existing TOML file")
        return explicit
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for place in (*_conf_dirs(), config_home / "prompttuner"):
        if (place / "site.toml").is_file():
            return place / "site.toml"
    return None


def _conf_dirs() -> list[Path]:
    explicit = os.environ.get("PROMPTTUNER_CONF_DIR")
    return [Path(explicit), SYSTEM_CONF_DIR] if explicit else [SYSTEM_CONF_DIR]


def _user_state_home() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")


def _private_dir(path: Path) -> Path:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot make the run directory: {error.strerror}",
            "set PROMPTTUNER_RUN_DIR to a directory that you own",
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        raise AuthError(f"{path}: the run directory is a link or a file", "remove it, or set PROMPTTUNER_RUN_DIR")
    if found.st_uid != os.geteuid():
        raise AuthError(
            f"{path}: the run directory belongs to user id {found.st_uid}, not to you ({os.geteuid()})",
            "set PROMPTTUNER_RUN_DIR to a directory that you own",
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode != 0o700:
        raise AuthError(f"{path}: the directory has mode {mode:04o}", f"let only its owner in: chmod 0700 {path}")
    return path
