"""One request tuned in one cold process, without a broker: what a warm worker is measured against.

    python -I -m tuner.lone --model DIR --request FILE.json --train FILE --output DIR [--eval FILE] [--bank DIR]

Prints one JSON line: when the process started, when its first training step ended, when it was done, and the outcome.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from broker.protocol.errors import DataError, PromptTunerError
from broker.protocol.messages import Assign, Ended, Progress
from broker.protocol.spec import RequestSpec
from broker.protocol.states import RequestState
from tuner.session import Session


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 when the request completed."""
    options = _parser().parse_args(arguments)
    process_start_unix_s = _process_start_unix_s()
    try:
        assign = _assign(options)
        with tempfile.TemporaryDirectory() as scratch:
            phases_s, first_step_unix_s, ended = _tune(options, assign, Path(scratch))
    except PromptTunerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    _write(options.output, ended.files)
    report = {
        "process_start_unix_s": process_start_unix_s,
        "first_step_unix_s": first_step_unix_s,
        "end_unix_s": time.time(),
        "state": ended.state.value,
        "steps": ended.step,
        "loss": ended.loss,
        "score": ended.score,
        "error": ended.error,
        "phases_s": phases_s,
    }
    print(json.dumps(report))
    return 0 if ended.state is RequestState.COMPLETED else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tuner.lone", description="Tune one request in this process.")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--request", required=True, type=Path, metavar="FILE.json", help="fields of a request")
    parser.add_argument("--train", required=True, type=Path, metavar="FILE")
    parser.add_argument("--eval", type=Path, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--bank", type=Path, metavar="DIR", help="default: an empty one")
    return parser


def _assign(options: argparse.Namespace) -> Assign:
    train = _read(options.train)
    evaluation = None if options.eval is None else _read(options.eval)
    try:
        fields: dict[str, Any] = msgspec.json.decode(_read(options.request), type=dict[str, Any])
        fields["train"] = hashlib.sha256(train).hexdigest()
        fields["eval"] = None if evaluation is None else hashlib.sha256(evaluation).hexdigest()
        spec = msgspec.convert({"model": Path(options.model).name, **fields}, RequestSpec)
    except msgspec.MsgspecError as error:
        raise DataError(f"{options.request}: {error}") from None
    return Assign(
        request_id=1,
        attempt=1,
        user=str(os.getuid()),
        uid=os.getuid(),
        account=spec.account or "",
        spec=spec,
        train=train,
        eval=evaluation,
    )


def _tune(options: argparse.Namespace, assign: Assign, scratch: Path) -> tuple[dict[str, float], float, Ended]:
    session = Session(
        model_path=options.model,
        bank_dir=options.bank or scratch / "bank",
        checkpoint_dir=scratch / "checkpoints",
        checkpoint_s=5.0,
        slots=1,
    )
    phases_s = session.load()
    session.join(assign)
    first_step_unix_s = 0.0
    while True:
        for said in session.step():
            if isinstance(said, Progress):
                first_step_unix_s = first_step_unix_s or said.first_step_unix_s
            else:
                return phases_s, first_step_unix_s, said


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _write(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)


def _process_start_unix_s() -> float:
    """When the kernel started this process: before Python and all imports."""
    after_name = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    since_boot_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    now_since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - now_since_boot_s + since_boot_s


if __name__ == "__main__":
    sys.exit(main())
