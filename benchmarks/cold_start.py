"""Seconds to the first training step of a random Llama of 245 million bfloat16 parameters, on this machine.

cold_s: from the start of a trainer's process, with the model's file out of the page cache, to the end of one real
training step. forked_s: the same for the next trainer, forked from the parent that the first one left warm. swap_s:
until a model that was withdrawn to the host can take a step on the device again; on a CPU that multiplies bfloat16 the
mapped file serves as it is, so swap_converting_s is that of a float16 model, of which a float32 copy is made (the
longest). read_share: what eight workers that start at once, with the file out of the page cache, read from the disk, in
shares of its size: the sum of read_bytes in /proc/<pid>/io of the eight trainers.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import torch
import zmq

from benchmarks.report import emit, options
from broker.protocol.config import WorkerConfig
from broker.protocol.messages import Profile
from tuner.forkserver import ForkServer
from tuner.link import Loaded, from_trainer_decoder
from tuner.session import Session
from tuner.supervisor import TRAINER_COMMAND

LIMIT_MS = 300_000
KNOWN = Profile(base_s=1.0, per_request_s=1.0)  # one step is to be timed, not the measuring of many
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
}


def write_model(directory: Path, dtype: torch.dtype, vocabulary: int = 32_000) -> None:
    """A random Llama and a tokenizer of one word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, num_key_value_heads=16, max_position_embeddings=2048, **SHAPE
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


def forget(model: Path) -> None:
    """Takes the model's file out of the page cache."""
    for file in model.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Worker:
    """A trainer with its parent, as a supervisor holds them."""

    def __init__(self, folder: Path, model: Path, name: str) -> None:
        config = WorkerConfig(
            allocation=name,
            key="",
            broker="",
            server_public_key=None,
            pool="bench",
            model="bench",
            model_path=str(model),
            slots=8,
            gpus=0,
            checkpoint_dir=str(folder / "spool" / "checkpoints"),
            bank_dir=str(folder / "bank"),
            heartbeat_s=5.0,
            orphan_timeout_s=60.0,
            checkpoint_s=5.0,
            steps=False,
        )
        file = folder / f"{name}.json"
        file.touch(0o600)
        file.write_bytes(msgspec.json.encode(config))
        self._endpoint = f"ipc://{folder}/{name}"
        self._trainers = ForkServer(TRAINER_COMMAND, file)

    @contextmanager
    def trainer(self) -> Iterator[tuple[float, Loaded]]:
        """One trainer: the seconds to the end of its first step, and what it says then."""
        with zmq.Context() as context, context.socket(zmq.PAIR) as link:
            link.linger = 0
            link.bind(self._endpoint)
            began_mono_s = time.monotonic()
            self._trainers.start(self._endpoint, KNOWN, os.environ)
            if not link.poll(LIMIT_MS):
                raise TimeoutError("the trainer says nothing")
            said = from_trainer_decoder.decode(link.recv())
            took_s = time.monotonic() - began_mono_s
            if not isinstance(said, Loaded):
                raise RuntimeError(f"the trainer says {said}")
            self._trainers.poll()
            yield took_s, said
            self._trainers.stop()

    @property
    def read_bytes(self) -> int:
        """What the trainer has read from disks."""
        lines = Path(f"/proc/{self._trainers.pid}/io").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))

    def close(self) -> None:
        self._trainers.close()


def starts(folder: Path, model: Path, runs: int) -> dict[str, Any]:
    """The first trainer of a parent and the next one, `runs` times."""
    cold: list[tuple[float, dict[str, float]]] = []
    forked: list[tuple[float, dict[str, float]]] = []
    for run in range(runs):
        forget(model)
        worker = Worker(folder, model, f"start-{run}")
        with worker.trainer() as (took_s, said):
            cold.append((took_s, said.phases_s))
        with worker.trainer() as (took_s, said):
            forked.append((took_s, said.phases_s))
        worker.close()
    figures: dict[str, Any] = {}
    for name, found in (("cold", sorted(cold, key=_seconds)), ("forked", sorted(forked, key=_seconds))):
        seconds, phases_s = found[(len(found) - 1) // 2]
        figures |= {f"{name}_s": seconds, f"{name}_min_s": found[0][0], f"{name}_max_s": found[-1][0]}
        figures[f"{name}_phases_s"] = phases_s
    return figures


def _seconds(start: tuple[float, dict[str, float]]) -> float:
    return start[0]


def swaps(folder: Path, models: list[Path], runs: int) -> dict[str, float]:
    """Two models in one session: both placed, then one in place of the other; and steps while the second one loads."""
    first, second = (str(model) for model in models)
    session = Session(
        model_path=first,
        bank_dir=folder / "bank",
        checkpoint_dir=folder / "spool" / "checkpoints",
        checkpoint_s=1e9,
        slots=8,
        more_models={"second": second},
    )
    session.load()
    session.first_step()
    alone = [session.first_step() for _ in range(5)]
    session.begin_load("second")
    beside = [session.first_step()]
    while not session.take_loaded():
        beside.append(session.first_step())
    near, far, stepped = [], [], []
    for name in ["second", ""] * runs:
        near.append(session.swap(name))
    for name in ["second", ""] * runs:
        session.withdraw(name)
        far.append(session.swap(name))
        stepped.append(session.first_step())
    return {
        "swap_s": statistics.median(far),
        "swap_max_s": max(far),
        "swap_on_device_s": statistics.median(near),
        "step_after_swap_s": statistics.median(stepped),
        "step_alone_s": statistics.median(alone),
        "step_beside_load_max_s": max(beside),
        "steps_beside_load": len(beside),
    }


def crowd(folder: Path, model: Path, workers: int) -> dict[str, float]:
    """That many workers at once, with nothing cached: what they read, and when the last one was ready."""
    forget(model)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    ready, counted = threading.Barrier(workers), threading.Barrier(workers)
    read, seconds = [0] * workers, [0.0] * workers

    def run(number: int) -> None:
        worker = Worker(folder, model, f"crowd-{number}")
        with worker.trainer() as (took_s, _):
            ready.wait()
            read[number], seconds[number] = worker.read_bytes, took_s
            counted.wait()
        worker.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"read_share": sum(read) / size, "read_bytes": sum(read), "model_bytes": size, "crowd_s": max(seconds)}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--dir", type=Path, help="where the models are written; default: the temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pt-cold-", dir=given.dir) as name:
        folder = Path(name)
        models = [folder / "first", folder / "second"]
        for model in models:
            write_model(model, torch.bfloat16)
        converted = folder / "converted"
        write_model(converted, torch.float16)
        figures = starts(folder, models[0], given.runs)
        figures |= crowd(folder, models[1], given.workers)
        figures |= swaps(folder, models, given.runs)
        figures["swap_converting_s"] = swaps(folder, [models[0], converted], given.runs)["swap_max_s"]
    emit("cold_start", figures, given.runs, given.json)


if __name__ == "__main__":
    main()
