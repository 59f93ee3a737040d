"""A command whose options also come from the environment and from a script's directives.

Precedence, as sbatch's: command line, environment, `#PT` lines, `#SBATCH` lines. The directives become click's map of
defaults, which stands below the environment.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from typing import Any

import click

from slurm_plugin.cli.common import REFUSED, PtCommand, Refused, say, warn
from slurm_plugin.cli.directives import Directive, read_script
from slurm_plugin.cli.options import LATER, LATER_FLAGS, variables_of

# What an #SBATCH line says of the request too. Its other options are about the job that sbatch would start.
_SBATCH_MEANS = {"account", "partition", "qos", "job_name", "comment", "deadline", "chdir"}
_SBATCH_REFUSES = {name.split("/")[-1] for name in (*LATER, *LATER_FLAGS)} - {"--time", "--time-min", "--export"}
_NOT_IN_SCRIPTS = {"help", "version", "usage", "ignore_sbatch", "site_file"}


class ScriptedCommand(PtCommand):
    """A command with an optional script, whose directives are its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            options, _, _ = self.make_parser(ctx).parse_args(list(args))
            if not {"help", "version", "usage"} & {name for name, value in options.items() if value is True}:
                self._check_environment(ctx)
                script = _script_of(options)
                if script is not None:
                    ctx.default_map = self._defaults(ctx, read_script(script), options)
                    ctx.meta["script"] = script
        return super().parse_args(ctx, args)

    def _check_environment(self, ctx: click.Context) -> None:
        prefix = ctx.auto_envvar_prefix or ""
        known = set()
        for param in self.params:
            if not isinstance(param, click.Option):
                continue
            names = variables_of(param, prefix)
            known.update(names)
            found = [name for name in names if name in os.environ] if isinstance(param, Refused) else []
            if isinstance(param, Refused) and found and os.environ[found[0]].lower() not in ("no", "0"):
                raise click.UsageError(f"{found[0]} is set in the environment: {param.refusal()}", ctx=ctx)
        for name in sorted(os.environ):
            if name.startswith(prefix + "_") and name not in known:
                warn(self.name or "", f"{name} in the environment sets no option")

    def _defaults(self, ctx: click.Context, directives: Sequence[Directive], options: dict[str, Any]) -> dict[str, Any]:
        sbatch: dict[str, Any] = {}
        ours: dict[str, Any] = {}
        notes: list[str] = []
        for directive in directives:
            if directive.prefix == "#PT":
                ours.update(self._parsed(ctx, directive))
            elif options.get("ignore_sbatch") is not True:
                sbatch.update(self._understood(ctx, directive, notes))
        if "slo" in ours or "deadline" in ours:  # two ways to say one thing
            sbatch.pop("deadline", None)
        merged = {**sbatch, **ours}
        if options.get("verbose") is True or merged.get("verbose") is True:
            for note in notes:
                say(self.name or "", note)
        return merged

    def _understood(self, ctx: click.Context, directive: Directive, notes: list[str]) -> dict[str, Any]:
        """What an #SBATCH line says of the request; the rest of it is noted."""
        try:
            found = self._parsed(ctx, directive, sbatch=True)
        except click.NoSuchOption:
            notes.append(f"{directive.where}: '#SBATCH {' '.join(directive.words)}' has no meaning for a request")
            return {}
        for name in found.keys() - _SBATCH_MEANS:
            option = name.removeprefix(REFUSED).replace("_", "-")
            notes.append(f"{directive.where}: #SBATCH --{option} has no meaning for a request")
        return {name: value for name, value in found.items() if name in _SBATCH_MEANS}

    def _parsed(self, ctx: click.Context, directive: Directive, sbatch: bool = False) -> dict[str, Any]:
        """The options of one line by name, checked as on the command line; errors name the line."""
        parser = self.make_parser(ctx)
        parser.allow_interspersed_args = False
        try:
            options, rest, order = parser.parse_args(list(directive.words))
            words = [*rest, *(options[param.name or ""] or () for param in order if isinstance(param, click.Argument))]
            words = [word for word in words if isinstance(word, str)]
            if words:
                raise click.UsageError(f"unexpected word {words[0][:60]!r}", ctx=ctx)
            for param in order:
                self._check(ctx, param, options, sbatch)
        except click.UsageError as error:
            if sbatch and isinstance(error, click.NoSuchOption):
                raise
            raise click.UsageError(f"{directive.where}: {error.format_message()}", ctx=ctx) from None
        return {param.name or "": options[param.name or ""] for param in order if isinstance(param, click.Option)}

    def _check(self, ctx: click.Context, param: click.Parameter, options: dict[str, Any], sbatch: bool) -> None:
        if isinstance(param, Refused):
            if not sbatch or _SBATCH_REFUSES & set(param.opts):
                raise click.UsageError(param.refusal(), ctx=ctx)
        elif param.name in _NOT_IN_SCRIPTS:
            raise click.UsageError(f"{param.opts[-1]} stands on the command line only", ctx=ctx)
        elif isinstance(param, click.Option) and (not sbatch or param.name in _SBATCH_MEANS):
            param.type_cast_value(ctx, options[param.name or ""])


def _script_of(options: dict[str, Any]) -> str | None:
    """The script's name. Standard input is read where `-` asks for it, or where neither model nor data are named and a
    file or pipe stands there: a request without a script must not eat its caller's input."""
    script = options.get("script")
    if isinstance(script, str):
        return script
    wanted = ("model", "train")
    named = any(isinstance(options.get(name), str) or f"PTBATCH_{name.upper()}" in os.environ for name in wanted)
    if named or not sys.stdin or sys.stdin.closed:
        return None
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return None
    return "-" if stat.S_ISREG(mode) or stat.S_ISFIFO(mode) else None
