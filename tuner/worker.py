"""The entry of one allocation's worker: `python -I -m tuner.worker WORKER_FILE`. Never imports torch."""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from broker.protocol.config import WorkerConfig
from broker.protocol.errors import ConfigError, PromptTunerError, UsageError
from tuner.supervisor import TRAINER_COMMAND, Supervisor

WORKER_FILE_MAX = 1 << 20


def read_worker_file(path: Path) -> WorkerConfig:
    """The worker's configuration, from a file that nobody else could read or write.

    Raises `ConfigError`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"cannot read the worker file {path}: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ConfigError(
                f"refusing the worker file {path}: it is not private to uid {os.geteuid()}, and holds a key",
                "it must be a regular file of that user with mode 0600",
            )
        content = file.read(WORKER_FILE_MAX)
    try:
        return msgspec.json.decode(content, type=WorkerConfig)
    except msgspec.MsgspecError as error:
        hint = "broker and worker must be of one release"
        raise ConfigError(f"the worker file {path} is malformed: {error}", hint) from None


def start_log(process: str) -> None:
    """One line each on standard error, which is the allocation's log. Ids only: never what users wrote."""
    form = f"%(asctime)s {process}[%(process)d] %(levelname)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=form, datefmt="%Y-%m-%dT%H:%M:%S%z")


def main(argv: list[str], trainer_command: Sequence[str] = TRAINER_COMMAND) -> int:
    """Runs one worker to its end; returns its exit code."""
    start_log("worker")
    try:
        if len(argv) != 1:
            raise UsageError("usage: python -I -m tuner.worker WORKER_FILE")
        path = Path(argv[0]).absolute()
        return Supervisor(read_worker_file(path), path, trainer_command).run()
    except PromptTunerError as error:
        logging.getLogger(__name__).error("%s", " ".join(str(error).split()))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
