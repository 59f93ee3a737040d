"""Job scripts from templates. A value can fill its place in a script and do nothing else: it is checked against an
allow-list, quoted, and the finished script is parsed again and its options compared with those that were meant."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateNotFound, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct

from broker.allocations import AllocationOrder
from broker.protocol.errors import ConfigError
from broker.protocol.times import format_duration
from slurm_plugin.paths import find_data

TEMPLATE = "warm_worker.sbatch.j2"
TAG = "prompttuner"
WARNING_BEFORE_END_S = 120
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"

# Spaces only where we put them ourselves; never a control character, quote, `$`, backtick, backslash or leading dash.
_WORD = r"[A-Za-z0-9_.,:=+*@%/\[\]&|()][A-Za-z0-9_.,:=+*@%/\[\]&|()-]{0,255}"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_PATH = r"/[A-Za-z0-9_.,:=+@~/ -]{0,1023}"  # without %, which Slurm replaces in names of output files
_PATTERNS = {
    "name": _NAME,
    "pool": _NAME,
    "cluster": _NAME,
    "comment": rf"{TAG} cluster={_NAME} pool={_NAME}",
    "log_file": _PATH,
    "worker_file": _PATH,
    "python": _PATH,
    "srun": rf"srun|{_PATH}",
    "path": rf"{_PATH}",
    "slurm_conf": rf"|{_PATH}",
    "partition": _WORD,
    "account": rf"|{_WORD}",
    "qos": rf"|{_WORD}",
    "reservation": rf"|{_WORD}",
    "constraint": rf"|{_WORD}",
    "gres": rf"|{_WORD}",
    "mem": r"|[1-9][0-9]{0,8}M",
    "cpus": r"[1-9][0-9]{0,5}",
    "time_limit": r"UNLIMITED|(?:[0-9]{1,5}-)?[0-9]{2}:[0-9]{2}:[0-9]{2}",
    "signal": r"B:USR1@[0-9]{1,5}",
}
# Which value each option of the script must carry; those with an empty value must be absent.
_OPTIONS = {
    "--job-name": "name",
    "--comment": "comment",
    "--output": "log_file",
    "--partition": "partition",
    "--account": "account",
    "--qos": "qos",
    "--reservation": "reservation",
    "--constraint": "constraint",
    "--gres": "gres",
    "--mem": "mem",
    "--cpus-per-task": "cpus",
    "--time": "time_limit",
    "--signal": "signal",
}
_NEVER = ("--uid", "--gid", "--wrap", "--array", "--get-user-env", "--requeue", "--wait", "--test-only", "--parsable")


class Launch(Struct, frozen=True, kw_only=True):
    """What every script of one site has in common."""

    cluster: str
    python: str = sys.executable
    srun: str = "srun"
    slurm_conf: str | None = None
    template_dir: Path | None = None


def comment_of(cluster: str, pool: str) -> str:
    """The comment that marks a Slurm job as an allocation of this broker."""
    return f"{TAG} cluster={cluster} pool={pool}"


def pool_of(comment: str, cluster: str) -> str | None:
    """The pool that a job's comment names, None if the job is not an allocation of this cluster's broker."""
    match = re.fullmatch(rf"{TAG} cluster=({_NAME}) pool=({_NAME})", comment)
    return match[2] if match and match[1] == cluster else None


def values_of(order: AllocationOrder, launch: Launch) -> dict[str, str]:
    """The template's variables for one order; an option that is not set is empty. Raises ConfigError for a value that
    may not stand in a job script."""
    pool = order.pool
    gres = pool.gres or (f"gpu:{pool.gpus_per_worker}" if pool.gpus_per_worker else "")
    # Slurm counts limits in minutes and rounds up.
    limit_s = pool.time_limit if math.isinf(pool.time_limit) else math.ceil(pool.time_limit / 60) * 60
    values = {
        "name": order.name,
        "pool": order.pool_name,
        "cluster": launch.cluster,
        "comment": comment_of(launch.cluster, order.pool_name),
        "log_file": str(order.log_file),
        "worker_file": str(order.worker_file),
        "python": launch.python,
        "srun": launch.srun,
        "path": f"{Path(launch.srun).parent}:{_SYSTEM_PATH}" if "/" in launch.srun else _SYSTEM_PATH,
        "slurm_conf": launch.slurm_conf or "",
        "partition": pool.partition,
        "account": pool.account or "",
        "qos": pool.qos or "",
        "reservation": pool.reservation or "",
        "constraint": pool.constraint or "",
        "gres": gres,
        "mem": f"{pool.mem_mb}M" if pool.mem_mb else "",
        "cpus": str(pool.cpus_per_worker),
        "time_limit": format_duration(limit_s),
        "signal": f"B:USR1@{WARNING_BEFORE_END_S}",
    }
    for key, value in values.items():
        if re.fullmatch(_PATTERNS[key], value) is None:
            raise ConfigError(
                f"pool {order.pool_name!r}: {key} = {value!r} may not stand in a job script",
                "use letters, digits and plain punctuation: no spaces, quotes, control characters or leading dashes",
            )
    return values


def render(order: AllocationOrder, launch: Launch) -> str:
    """The batch script of one allocation, checked. Raises ConfigError that names template, line and remedy."""
    path = find_data("job_templates", launch.template_dir) / TEMPLATE
    values = values_of(order, launch)
    try:
        source = path.read_text(encoding="utf-8")
        script = _environment(path.parent).from_string(source).render(values)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.message}", "see job_templates/README.md") from None
    except TemplateNotFound as error:  # which is an OSError too
        raise ConfigError(f"{path}: includes {error.name}, which is not there", "put it beside the template") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", "restore it from the installation") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8", "save it as UTF-8") from None
    except (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise ConfigError(f"{path}: {error}", "see the variables in job_templates/README.md") from None
    _check(script, source, values, path)
    return script


def _environment(folder: Path) -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        finalize=_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _quoted(value: Any) -> str:
    """Every value that a template prints is a single word of the shell."""
    if isinstance(value, StrictUndefined):
        return str(value)  # raises, naming the variable
    if not isinstance(value, str | int):
        raise TypeError(f"a template may print strings and numbers, not {type(value).__name__}")
    return shlex.quote(str(value))


def _check(script: str, source: str, values: Mapping[str, str], path: Path) -> None:
    """Compares the options that sbatch will find in `script` with those that were meant: the values', and the lines
    that the template's author wrote out in full."""
    if not script.startswith("#!"):
        raise ConfigError(f"{path}:1: the script does not start with #!", "begin it with #!/bin/bash")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", script):
        raise ConfigError(f"{path}: control characters or DOS line ends", "save it with plain Unix line ends")
    written = {line.strip() for line in source.split("\n") if line.startswith("#SBATCH") and "{" not in line}
    meant = {option: values[key] for option, key in _OPTIONS.items() if values[key]}
    found: dict[str, str] = {}
    in_head = True
    for number, line in enumerate(script.split("\n"), start=1):
        if re.match(r"#(?:PBS|BSUB)", line):
            raise ConfigError(
                f"{path}: line {number} of the script: sbatch reads {line.split()[0]} lines too", "remove it"
            )
        in_head = in_head and (not line.strip() or line.startswith("#"))
        if not line.startswith("#SBATCH"):
            continue
        if not in_head:
            raise ConfigError(f"{path}: line {number} of the script: an option after the first command", "move it up")
        option, value = _option(line, number, path)
        if option in found:
            raise ConfigError(f"{path}: line {number} of the script: {option} is there twice", "keep one of them")
        if option in _NEVER or (option in _OPTIONS and meant.get(option) != value):
            raise ConfigError(
                f"{path}: line {number} of the script: {line!r} is not what the pool says", "print the pool's own value"
            )
        if option not in _OPTIONS and line.strip() not in written:
            raise ConfigError(
                f"{path}: line {number} of the script: {line!r} was not meant", "write options out in full"
            )
        found[option] = value
    missing = [option for option in meant if option not in found]
    if missing:
        remedy = "take over these lines from the template of the installation"
        raise ConfigError(f"{path}: no #SBATCH line for {', '.join(missing)}", remedy)


def _option(line: str, number: int, path: Path) -> tuple[str, str]:
    try:
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
    except ValueError as error:
        raise ConfigError(f"{path}: line {number} of the script: {error}", "close the quotes") from None
    if len(words) != 1 or not words[0].startswith("--"):
        raise ConfigError(f"{path}: line {number} of the script: {line!r}", "write #SBATCH --option=value, one a line")
    option, _, value = words[0].partition("=")
    return option, value
