"""Packed requests against lone PEFT runs: useful tokens a second, memory, padding.

Useful tokens are the rows' own, neither virtual nor padding. `speedup_sequential` is against as many lone runs one
after the other, by the time of one thread on a CPU and by the wall clock on a GPU; `speedup_concurrent` is against as
many at once, each in a process of its own. `limit_share` is the share of the device's own matrix-multiply peak that
goes into the 4 N FLOPs of each token, virtual ones included.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tokenizers import Tokenizer, models

from benchmarks.lone_peft import Step, lone_step
from benchmarks.report import emit, options
from tuner import packing
from tuner.data import Example
from tuner.memory import Budget, bytes_per_request
from tuner.model import Base, load_base
from tuner.optimizer import PromptState, StepRule, update
from tuner.start import random_prompt
from tuner.ways import fastest

SHAPES: dict[str, dict[str, int]] = {
    "llama-2m": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4},
    "llama-16m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
VOCABULARY = {"llama-2m": 2000, "llama-16m": 2000, "llama-1b": 128_256}
KEY_VALUE_HEADS = {"llama-1b": 8}
CONCURRENT = (2, 4)  # requests of the first kind of case that also run at once: each is a process with all imports


@dataclass(frozen=True, slots=True)
class Case:
    requests: int
    rows: int
    tokens: int
    virtual_tokens: int
    ragged: bool = False  # lengths uniform from 16 to `tokens`

    def data(self, base: Base) -> list[list[Example]]:
        """Each request's rows; half of each row is target."""
        random = np.random.default_rng(0)
        found = []
        for _ in range(self.requests):
            lengths = random.integers(16, self.tokens + 1, self.rows) if self.ragged else [self.tokens] * self.rows
            ids = [random.integers(0, base.vocabulary, length).tolist() for length in lengths]
            found.append([Example(tuple(row), len(row) // 2) for row in ids])
        return found


CPU_CASES = [
    *(Case(requests, 1, 32, 20) for requests in (1, 2, 4, 8, 16, 32)),
    *(Case(requests, 2, 32, 20) for requests in (1, 8)),
    *(Case(requests, 8, 32, 20) for requests in (1, 4)),
    *(Case(requests, 8, 32, 100) for requests in (1, 4)),
    Case(1, 8, 128, 20),
    Case(1, 16, 128, 20, ragged=True),
]
CUDA_CASES = [
    *(Case(requests, 2, 64, 20) for requests in (1, 2, 4, 8, 16, 32)),
    *(Case(requests, 8, 128, 20) for requests in (1, 8, 32)),
    Case(8, 8, 32, 100),
    Case(1, 16, 128, 20, ragged=True),
]


def make_base(shape: str, folder: Path) -> Base:
    """A model of the shape with random weights, loaded as a worker loads it."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY[shape], num_key_value_heads=KEY_VALUE_HEADS.get(shape), **SHAPES[shape]
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return fastest(load_base(str(folder))[0])


def packed_step(base: Base, prompts: list[torch.Tensor], data: list[list[Example]]) -> Step:
    """A function that runs one step of all requests in one pack."""
    states = [PromptState.new(prompt) for prompt in prompts]
    rules = [StepRule(0.01, scaled=False, weight_decay=0.01, warmup_steps=0)] * len(states)
    rows = [(i, row) for i, each in enumerate(data) for row in each]

    def step() -> None:
        _, slope = packing.gradient(base, [state.prompt for state in states], rows)
        update(states, rules, slope, base.embedding_rms)

    return step


def seconds(steps: Sequence[Step], runs: int, device: torch.device) -> list[float]:
    """The seconds of each step: medians of `runs` rounds in which they take turns, so that all see the same machine."""
    taken: list[list[float]] = [[] for _ in steps]
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for number in range(runs + 1):
        for step, found in zip(steps, taken, strict=True):
            began_s = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:  # the first round warms up
                found.append(clock() - began_s)
    return [statistics.median(each) for each in taken]


def measure(base: Base, case: Case, runs: int, peak_flops: float) -> dict[str, Any]:
    data = case.data(base)
    prompts = [random_prompt(base, case.virtual_tokens, seed) for seed in range(case.requests)]
    packed = packed_step(base, prompts, data)
    lone = lone_step(base.model, prompts[0], data[0], base.device)  # the others differ in nothing that takes time
    packed_s, lone_s = seconds([packed, lone], runs, base.device)
    rows = [(i, row) for i, each in enumerate(data) for row in each]
    how = packing.plan(base, [case.virtual_tokens] * case.requests, rows)
    useful = sum(len(row) for _, row in rows)
    needed = useful + case.virtual_tokens * (case.requests if how.shared else len(rows))
    weights = sum(weight.numel() for weight in base.model.parameters()) - base.vocabulary * base.hidden_size
    return {
        "requests": case.requests,
        "rows": case.rows,
        "tokens": case.tokens,
        "virtual_tokens": case.virtual_tokens,
        "ragged": case.ragged,
        "step_ms": 1000 * packed_s,
        "lone_step_ms": 1000 * lone_s,
        "useful_tokens_per_s": useful / packed_s,
        "speedup_sequential": case.requests * lone_s / packed_s,
        "speedup_concurrent": None,
        "limit_share": 4 * weights * needed / packed_s / peak_flops,
        "shared_prefix": how.shared,
        "passes": len(how.passes),
        "padding_waste": 1 - needed / how.tokens,
        "memory_mb_per_request": step_bytes(base, case, packed, how.tokens) / case.requests / 2**20,
    }


def step_bytes(base: Base, case: Case, step: Step, tokens: int) -> float:
    """What the step takes: the allocator's peak on a GPU, by formula on a CPU, where nothing counts it."""
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
        before = torch.cuda.memory_allocated(base.device)
        step()
        return float(torch.cuda.max_memory_allocated(base.device) - before)
    return tokens * Budget.of(base).bytes_per_token + case.requests * bytes_per_request(base, case.virtual_tokens)


def padded_to_the_longest(base: Base, case: Case, runs: int) -> float:
    """How many times quicker a ragged case is than with all its rows padded to the longest."""
    data = case.data(base)
    prompts = [random_prompt(base, case.virtual_tokens, seed) for seed in range(case.requests)]
    one_pass = replace(base, ways=replace(base.ways, pass_tokens=1e12, shared_prefix=False))
    quick_s, padded_s = seconds(
        [packed_step(base, prompts, data), packed_step(one_pass, prompts, data)], runs, base.device
    )
    return padded_s / quick_s


def concurrent_s(folder: Path, case: Case, runs: int, device: str) -> float:
    """Seconds of one step of each of as many lone runs as the case has requests, all at once in processes of their
    own: processor time on a CPU, so that a crowded machine does not count, and wall time on a GPU."""
    context = multiprocessing.get_context("spawn")
    gate, out = context.Barrier(case.requests), context.Queue()
    workers = [
        context.Process(target=_concurrent, args=(str(folder), case, runs, device, gate, out))
        for _ in range(case.requests)
    ]
    for worker in workers:
        worker.start()
    taken: list[float] = [out.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return sum(taken) if device == "cpu" else max(taken)


def _concurrent(folder: str, case: Case, runs: int, device: str, gate: Barrier, out: Any) -> None:
    quieten()
    base, _ = load_base(folder)
    prompt = random_prompt(base, case.virtual_tokens, 0)
    step = lone_step(base.model, prompt, case.data(base)[0], base.device)
    step()
    gate.wait(timeout=600)
    out.put(seconds([step], runs, base.device)[0])


def matmul_flops(base: Base) -> float:
    """The most that the device's own matrix product gives, in the base's number format."""
    size = 1024 if base.device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=base.device, dtype=base.dtype) for _ in range(2))

    def product() -> None:
        torch.matmul(a, b)

    return max(2 * size**3 / seconds([product], 3, base.device)[0] for _ in range(5))


def quieten() -> None:
    transformers: Any = importlib.import_module("transformers")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def main() -> None:
    parser = options((__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: llama-16m on a CPU, llama-1b on a GPU")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--no-concurrent", action="store_true", help="leave out the runs in processes of their own")
    given = parser.parse_args()
    quieten()
    if (given.device == "cuda") != torch.cuda.is_available():
        raise SystemExit(f"--device={given.device}: a worker here takes the other one")
    shape = given.shape or ("llama-16m" if given.device == "cpu" else "llama-1b")
    cases = CPU_CASES if given.device == "cpu" else CUDA_CASES
    with tempfile.TemporaryDirectory(prefix="pt-bench-") as folder:
        base = make_base(shape, Path(folder))
        gc.freeze()
        peak_flops = matmul_flops(base)
        found = []
        for case in cases:
            figures = measure(base, case, given.runs, peak_flops)
            if case.ragged:
                figures["speedup_over_padding"] = padded_to_the_longest(base, case, given.runs)
            if not given.no_concurrent and case in [replace(cases[0], requests=count) for count in CONCURRENT]:
                at_once_s = concurrent_s(Path(folder), case, given.runs, given.device)
                figures["speedup_concurrent"] = 1000 * at_once_s / figures["step_ms"]
            found.append(figures)
    figures = {"device": given.device, "shape": shape, "matmul_peak_gflops": peak_flops / 1e9}
    emit("packing", {**figures, "cases": found}, given.runs, given.json)


if __name__ == "__main__":
    main()
