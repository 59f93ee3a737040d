"""Kinds of option values, and the options of sbatch that have no meaning here (yet)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import click

from broker.protocol.errors import UsageError
from broker.protocol.times import parse_duration, parse_instant
from slurm_plugin.cli.common import REFUSED, refuse

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]  # older releases of click have no such parameter at run time
else:
    ParamType = click.ParamType


class SloType(ParamType):
    """A duration that ends: seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            seconds = parse_duration(value)
        except UsageError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)
        if not 0 < seconds < math.inf:
            self.fail(f"{value!r} sets no deadline; give more than 0 s, or leave it out for none", param, ctx)
        return seconds


class InstantType(ParamType):
    """A point in time: epoch seconds. With `past`, a bare time of day is the last one."""

    name = "time"

    def __init__(self, past: bool = False) -> None:
        self._past = past

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_instant(value, time.time(), past=self._past)
        except UsageError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)


class FiniteRange(click.FloatRange):
    """A range of finite numbers: click's lets NaN through, which is neither too low nor too high."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Flag(click.Option):
    """A flag that the environment sets as sbatch's: set and empty, `yes` or a number other than 0 mean on."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        name = f"{ctx.auto_envvar_prefix}_{(self.name or '').upper()}"
        value = os.environ.get(name)
        if value is None or value.lower() in ("0", "no"):
            return None
        if value == "" or value.lower() == "yes" or (value.isascii() and value.isdigit()):
            return "1"
        raise click.UsageError(f"{name}={value!r}: a flag is set by 'yes' or 1, and not set by 'no' or 0", ctx=ctx)


def words_of(kind: type[Enum]) -> click.Choice[Any]:
    """The values of one of the protocol's enumerations, in any case."""
    return click.Choice([member.value for member in kind], case_sensitive=False)


# sbatch's options that may come: refused wherever they stand, since leaving them out would change what is asked for.
LATER: tuple[str, ...] = ("-a/--array", "-b/--begin", "-d/--dependency", "--kill-on-invalid-dep", "--nice", "--signal")
LATER += ("--export",)
LATER += ("--mail-type", "--mail-user", "-M/--clusters", "--open-mode", "-t/--time", "--time-min", "--revision")
LATER_FLAGS: tuple[str, ...] = ("-H/--hold", "--requeue", "--no-requeue", "--no-share", "--yaml", "--spool")
# Of the job that sbatch would start; here the site's pools have them.
POOLS: tuple[str, ...] = ("-C/--constraint", "-G/--gpus", "--gres", "-N/--nodes", "-n/--ntasks", "-c/--cpus-per-task")
POOLS += ("--mem",)
POOLS += ("--mem-per-cpu", "--mem-per-gpu", "--gpus-per-node", "--gpus-per-task", "--ntasks-per-node", "-w/--nodelist")
POOLS += ("-x/--exclude", "--reservation", "-L/--licenses", "--exclusive", "--pool")
NO_CODE = ("--wrap", "-e/--error", "-i/--input")
# `sbatch` spells these differently in its environment.
_VARIABLES = {"array": "ARRAY_INX", "time": "TIMELIMIT"}

WHY_POOLS = "is not for a request: the site's pools say which nodes and GPUs hold the model (see ptinfo)"
WHY_NO_CODE = "is not for a request: ptbatch trains a prompt and runs no commands; use sbatch for those"


def sbatch_options(function: F) -> F:
    """Declares every option of sbatch that is refused by name."""
    function = refuse(*LATER)(function)
    function = refuse(*LATER_FLAGS, flag=True)(function)
    function = refuse(*POOLS, why=WHY_POOLS)(function)
    return refuse(*NO_CODE, why=WHY_NO_CODE)(function)


def variables_of(option: click.Option, prefix: str) -> list[str]:
    """The environment variables that would set `option`."""
    name = (option.name or "").removeprefix(REFUSED).lower()
    return [f"{prefix}_{suffix}" for suffix in dict.fromkeys((name.upper(), _VARIABLES.get(name, name.upper())))]
