"""Reading a site file: every mistake is told at once, with its line, its value and what is allowed.

Login commands read the site file at each call, so what is needed only to explain mistakes is imported only then."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from broker.protocol.config import (
    BrokerConfig,
    Duration,
    LimitsConfig,
    ModelConfig,
    PathsConfig,
    PoolConfig,
    SiteConfig,
    SlurmConfig,
)
from broker.protocol.errors import ConfigError, UsageError
from broker.protocol.times import parse_duration
from slurm_plugin.paths import personal_state_dir
from slurm_plugin.site_checks import Key, cross_check, shown

MAX_SITE_FILE_BYTES = 1 << 20
SERVICE_STATE_DIR = Path("/var/lib/prompttuner")
_TABLES: dict[str, type[Struct]] = {
    "broker": BrokerConfig,
    "paths": PathsConfig,
    "limits": LimitsConfig,
    "slurm": SlurmConfig,
}
_NAMED_TABLES: dict[str, type[Struct]] = {"models": ModelConfig, "pools": PoolConfig}

Table = Mapping[str, Any]


class Finding(Struct, frozen=True):
    """One thing that a check has to say. `line` is the line in the site file, 0 where none can be named."""

    line: int
    what: str
    remedy: str = ""
    severity: Literal["error", "warning"] = "error"


def load_site(path: Path, *, service: bool = False, check_models: bool = False) -> SiteConfig:
    """The site file as a value, with the default state, spool and bank folders filled in.

    `service` also checks the files that only the broker may read; `check_models` that the model directories are there
    (a login node need not see either). Raises ConfigError that lists every mistake."""
    site, findings = read_site(path, service=service, check_models=check_models)
    errors = [finding for finding in findings if finding.severity == "error"]
    if site is None or errors:
        raise ConfigError(
            f"{path}: {len(errors)} mistake{'s' if len(errors) != 1 else ''}\n" + describe(path, errors),
            f"correct them and run: ptctl check {path}",
        )
    return site


def key_line(path: Path, *key: str) -> int:
    """The line of a key in a site file, or of the nearest table around it that the file names; 0 if none."""
    return _Reader(_key_lines(path.read_text(encoding="utf-8", errors="replace"))).line(key)


def describe(path: Path, findings: list[Finding]) -> str:
    """One line for each finding: where, what, and what to do."""
    lines = []
    for finding in findings:
        where = f"{path}:{finding.line}" if finding.line else str(path)
        remedy = f" ({finding.remedy})" if finding.remedy else ""
        lines.append(f"  {where}: {finding.what}{remedy}")
    return "\n".join(lines)


def read_site(
    path: Path, *, service: bool = False, check_models: bool = False
) -> tuple[SiteConfig | None, list[Finding]]:
    """The site file and everything that is wrong with it, in the order of its lines; the value is None when there is
    too much wrong with it to make one."""
    try:
        text, findings = _read(path)
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        return None, [Finding(int(line[1]) if line else 0, f"not TOML: {error}", "see https://toml.io")]
    except ConfigError as error:
        return None, [Finding(0, error.message, error.hint)]
    reader = _Reader(_key_lines(text))
    site = reader.site(data)
    cross = cross_check(site, service=service, check_models=check_models)
    # A table with mistakes holds defaults in their place, which must not be blamed on its writer.
    findings += reader.findings
    findings += [Finding(reader.line(key), what, fix) for key, what, fix in cross if key[:-1] not in reader.broken]
    findings.sort(key=lambda finding: finding.line)
    return (None if reader.findings else _with_defaults(site)), findings


def default_site(models: Mapping[str, str], workers: int, state_dir: Path, gpus_per_worker: int = 0) -> SiteConfig:
    """The embedded default, without any site file: one user, workers are local processes, one pool for each model."""
    pools = {
        name: PoolConfig(model=name, min_workers=1, max_workers=max(1, workers), gpus_per_worker=gpus_per_worker)
        for name in models
    }
    site = SiteConfig(
        models={name: ModelConfig(path=path) for name, path in models.items()},
        pools=pools,
        broker=BrokerConfig(state_dir=str(state_dir)),
    )
    return _with_defaults(site)


def to_seconds(kind: type, value: object) -> object:
    """msgspec's hook for `Duration`: Slurm's time forms, or numbers with units; never a bare TOML number."""
    if kind is not Duration:
        raise NotImplementedError(f"no conversion to {kind}")
    if not isinstance(value, str):
        raise ValueError(_DURATION_HINT)
    try:
        return Duration(parse_duration(value))
    except UsageError as error:
        raise ValueError(f"{error.message}; {_DURATION_HINT}") from None


_DURATION_HINT = 'allowed: a string with a unit, such as "90s", "2h", "1-00:00:00" or "UNLIMITED"'


def _read(path: Path) -> tuple[str, list[Finding]]:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{path} is not a regular file", "name a TOML file")
            raw = file.read(MAX_SITE_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check its name and permissions") from None
    if len(raw) > MAX_SITE_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_SITE_FILE_BYTES} bytes", "a site file has a few kilobytes")
    findings = []
    if found.st_mode & stat.S_IWOTH:
        findings.append(Finding(0, "anyone may write this file", f"chmod o-w {path}"))
    try:
        return raw.decode("utf-8"), findings
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start}: {error.reason}", "save it as UTF-8") from None


class _Reader:
    """Converts a parsed file key by key, so that one mistake does not hide the next."""

    def __init__(self, lines: Mapping[Key, int]) -> None:
        self._lines = lines
        self.findings: list[Finding] = []
        self.broken: set[Key] = set()  # the tables with mistakes

    def site(self, data: Table) -> SiteConfig:
        """The value, with defaults (or nothing) in the place of what is wrong."""
        plain = {key: value for key, value in data.items() if key not in _TABLES and key not in _NAMED_TABLES}
        values = self._keys(SiteConfig, plain, ())
        for name, kind in _TABLES.items():
            values[name] = self._table(kind, data.get(name, {}), (name,))
        for name, kind in _NAMED_TABLES.items():
            tables = data.get(name, {})
            if not isinstance(tables, dict):
                self._wrong((name,), tables, f"allowed: tables such as [{name}.NAME]")
                continue
            values[name] = {key: self._table(kind, table, (name, key)) for key, table in tables.items()}
            for key in tables:
                self._name((name, key))
        return SiteConfig(**values)

    def line(self, key: Key) -> int:
        """The line of a key, or of the nearest table around it that the file names; 0 if none."""
        while key:
            if key in self._lines:
                return self._lines[key]
            key = key[:-1]
        return 0

    def _name(self, key: Key) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}", key[-1]):
            what = f"{key[0]}: {shown(key[-1])} is no name"
            self._tell(key, what, "letters, digits, _ and -, at most 32, not starting with -")

    def _table(self, kind: type[Struct], data: object, path: Key) -> Struct:
        if isinstance(data, dict):
            return kind(**self._keys(kind, data, path))
        self._wrong(path, data, f"allowed: a table [{'.'.join(path)}]")
        self.broken.add(path)
        return kind(**{field.name: "" for field in msgspec.structs.fields(kind) if field.required})

    def _keys(self, kind: type[Struct], data: Table, path: Key) -> dict[str, Any]:
        fields = {field.name: field for field in msgspec.structs.fields(kind)}
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key not in fields:
                self._unknown(kind, (*path, key), list(fields))
                continue
            try:
                values[key] = msgspec.convert(value, fields[key].type, dec_hook=to_seconds)
            except msgspec.ValidationError as error:
                self._wrong((*path, key), value, _allowed(str(error)))
        for name, field in fields.items():
            if field.required and name not in values:
                values[name] = ""
                if name not in data:
                    self._tell((*path, name), f"{'.'.join((*path, name))} is missing", "it has no default")
        return values

    def _unknown(self, kind: type[Struct], key: Key, known: list[str]) -> None:
        import difflib

        near = difflib.get_close_matches(key[-1], known, n=1)
        elsewhere = [name for name, table in _TABLES.items() if key[-1] in table.__struct_fields__]
        if near:
            remedy = f"did you mean {near[0]}?"
        elif elsewhere:
            remedy = f"it belongs under [{elsewhere[0]}]"
        else:
            remedy = f"known: {', '.join(known)}"
        self._tell(key, f"unknown key {'.'.join(key)}", remedy)

    def _wrong(self, key: Key, value: object, allowed: str) -> None:
        self._tell(key, f"{'.'.join(key)} = {shown(value)}", allowed)

    def _tell(self, key: Key, what: str, remedy: str) -> None:
        self.findings.append(Finding(self.line(key), what, remedy))
        self.broken.add(key[:-1])


def _allowed(message: str) -> str:
    """msgspec's complaint in the words of a site file."""
    message = message.replace("`", "").split(" - at `$")[0].split(" - at $")[0]
    if "matching regex" in message and "@%" not in message:
        return "allowed: letters, digits, _ and -, not starting with -"
    if "matching regex" in message:
        return "allowed: letters, digits and _ . , : = + * @ % / [ ] & | ( ) -, no spaces, not starting with -"
    return message[0].lower() + message[1:]


def _with_defaults(site: SiteConfig) -> SiteConfig:
    """Fills in the folders that a site file may leave out."""
    default = SERVICE_STATE_DIR if site.mode == "site" else personal_state_dir()
    state = Path(site.broker.state_dir or default)
    return msgspec.structs.replace(
        site,
        broker=msgspec.structs.replace(site.broker, state_dir=str(state)),
        paths=PathsConfig(spool=site.paths.spool or str(state / "spool"), bank=site.paths.bank or str(state / "bank")),
    )


_HEADER = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_NAME = r"(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')"
_ASSIGNMENT = re.compile(rf"\s*({_NAME}(?:\s*\.\s*{_NAME})*)\s*=")


def _key_lines(text: str) -> dict[Key, int]:
    """The line number of each table and key. A small scan, good enough to point at; the parser has the last word."""
    lines: dict[Key, int] = {}
    table: Key = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _dotted(header[1])
            lines.setdefault(table, number)
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault(table + _dotted(assignment[1]), number)
    return lines


def _dotted(text: str) -> Key:
    return tuple(part[0] or part[1] or part[2] for part in re.findall(r"\"([^\"]*)\"|'([^']*)'|([A-Za-z0-9_-]+)", text))
