"""ptctl: the administrator's command. Each part of it is imported only when it is called."""

from __future__ import annotations

from importlib import import_module

import click

from slurm_plugin.cli.common import PtGroup, brief_options

NAME = "ptctl"
_PARTS = {
    "broker": ("slurm_plugin.cli.ctl_broker", "broker", "Start, stop and look at the broker."),
    "check": ("slurm_plugin.cli.ctl_site", "check", "Check a site file; every mistake is told at once."),
    "demo": ("slurm_plugin.cli.ctl_demo", "demo", "Tune prompts on this machine, from nothing."),
    "render": ("slurm_plugin.cli.ctl_site", "render", "Print the job script of a pool; nothing is submitted."),
}


class _Parts(PtGroup):
    """Lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_PARTS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _PARTS:
            return None
        module, attribute, _ = _PARTS[cmd_name]
        found = getattr(import_module(module), attribute)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, _, what) in sorted(_PARTS.items())])


@click.group(NAME, cls=_Parts, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@brief_options
def main() -> None:
    """Administer PromptTuner: the broker, site files, job scripts."""
