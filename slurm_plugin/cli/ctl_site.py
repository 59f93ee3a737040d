"""ptctl check and render: what a site file means, before anything runs by it."""

from __future__ import annotations

from pathlib import Path

import click

from broker.protocol.errors import ConfigError
from slurm_plugin.cli.common import printable, say

NAME = "ptctl"
_EXISTING = click.Path(path_type=Path)


@click.command("check")
@click.argument("site_file", type=_EXISTING, required=False)
def check(site_file: Path | None) -> int:
    """Check SITE_FILE, or the one in force: every mistake with its line and its remedy."""
    from slurm_plugin.check import check_site

    path = _site_path(site_file)
    findings = check_site(path)
    for finding in findings:
        where = f"{path}:{finding.line}" if finding.line else str(path)
        remedy = f" ({finding.remedy})" if finding.remedy else ""
        click.echo(printable(f"{where}: {finding.severity}: {finding.what}{remedy}"))
    errors = sum(finding.severity == "error" for finding in findings)
    say(NAME, f"{path}: {errors} errors, {len(findings) - errors} warnings")
    return 1 if errors else 0


@click.command("render")
@click.argument("pool")
@click.option("--site-file", "--site", "site_file", type=_EXISTING, metavar="FILE", help="The site file.")
@click.option("--template-dir", type=click.Path(path_type=Path), metavar="DIR", help="Take job templates from here.")
def render(pool: str, site_file: Path | None, template_dir: Path | None) -> None:
    """Print the script that would be submitted for an allocation of POOL; nothing is submitted."""
    from slurm_plugin.check import render_pool
    from slurm_plugin.site import load_site

    site = load_site(_site_path(site_file))
    click.echo(render_pool(site, pool, template_dir), nl=False)


def _site_path(explicit: Path | None) -> Path:
    from slurm_plugin.paths import find_site

    found = find_site(explicit)
    if found is None:
        raise ConfigError("there is no site file: personal brokers need none", "name one: ptctl check FILE")
    return found
