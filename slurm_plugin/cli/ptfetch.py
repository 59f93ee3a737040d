"""ptfetch: writes the result folder of a request, as the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slurm_plugin.cli.common import command, open_broker, request_ids
from slurm_plugin.cli.follow import Progress, fetch, follow, report_end
from slurm_plugin.cli.results import check_folder

NAME = "ptfetch"


@command(NAME)
@click.argument("request", metavar="ID")
@click.option("-o", "--output", metavar="DIR", help="The new folder.  [default: pt-ID]")
@click.option("-W", "--wait", is_flag=True, help="Wait for the request's end first.")
@click.option("-Q", "--quiet", is_flag=True, help="Print nothing but errors.")
def main(request: str, **options: Any) -> int:
    """Write the tuned prompt of request ID into a new folder: a PEFT adapter."""
    ids = request_ids([request])
    if len(ids) != 1:
        raise click.UsageError("one request at a time")
    folder = Path(options["output"] or f"pt-{ids[0]}")
    check_folder(folder)
    with open_broker(options["site_file"]) as client:
        if options["wait"]:
            row = follow(client, ids[0], Progress(NAME, options["quiet"]))
            if code := report_end(NAME, row, options["quiet"]):
                return code
        count = fetch(client, ids[0], folder)
    if not options["quiet"]:
        click.echo(f"Fetched request {ids[0]}: {count} files in {folder}")
    return 0
