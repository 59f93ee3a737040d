"""ptattach: follows a request's progress to its end."""

from __future__ import annotations

from typing import Any

import click

from slurm_plugin.cli.common import command, open_broker, request_ids
from slurm_plugin.cli.follow import Progress, follow, report_end

NAME = "ptattach"


@command(NAME)
@click.argument("request", metavar="ID")
def main(request: str, **options: Any) -> int:
    """Follow request ID until it ends; the exit code is the request's. Ctrl-C leaves it running."""
    ids = request_ids([request])
    if len(ids) != 1:
        raise click.UsageError("one request at a time")
    with open_broker(options["site_file"]) as client:
        return report_end(NAME, follow(client, ids[0], Progress(NAME)))
