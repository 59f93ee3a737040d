"""Measures the small world: steps of prompt tuning from a random start and from the tuned prompt of a relative.

    python examples/small_world/measure.py [--tasks 20] [--json]

The loop is prompt tuning at its plainest, one request at a time: eight virtual tokens before each row, loss on the
target's tokens, AdamW whose update of a virtual token is scaled by 0.3 of that token's root mean square. It shares no
code with the tuner, so that each can judge the other.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from language import (
    PREFIX_WORDS,
    SPECIAL_WORDS,
    TWEAKS,
    Task,
    all_tasks,
    demo_tasks,
    held_out_tasks,
    rows,
    tag_words,
    vocabulary,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGET_LOSS = 0.1
MAX_STEPS = 250
EVAL_EVERY_STEPS = 5
BANK_SAMPLES = 16
ROWS_PER_STEP = 8
WARM_UP_STEPS = 10
RELATIVE_LR = 0.3
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
Pairs = list[tuple[str, str]]


class Base(NamedTuple):
    """A frozen base model with its tokenizer."""

    model: Any
    tokenizer: Any

    def embedding_rms(self) -> float:
        """The root mean square of the model's input embeddings."""
        return float(self.model.get_input_embeddings().weight.square().mean().sqrt())


class Outcome(NamedTuple):
    """A tuned prompt [8, width] and how it came about; ``reached`` says whether the target loss was met."""

    prompt: torch.Tensor
    steps: int
    eval_loss: float
    reached: bool


def load_base(folder: Path) -> Base:
    """The base model of a folder, frozen, on one thread."""
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval().requires_grad_(False)
    return Base(model, AutoTokenizer.from_pretrained(folder))


def random_start(base: Base, seed: int) -> torch.Tensor:
    """Random virtual tokens as large as the model's own."""
    shape = (PREFIX_WORDS, base.model.config.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * base.embedding_rms()


def text_start(base: Base, words: list[str]) -> torch.Tensor:
    """The embeddings of these words."""
    ids = base.tokenizer(" ".join(words), add_special_tokens=False, return_tensors="pt").input_ids[0]
    embedded: torch.Tensor = base.model.get_input_embeddings()(ids)
    return embedded


def target_logits(base: Base, prompt: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, target, words] and ids [rows, target] of the target tokens of rows that are equally long."""
    source = torch.tensor(base.tokenizer([pair[0] for pair in pairs], add_special_tokens=False).input_ids)
    target = torch.tensor(base.tokenizer([pair[1] for pair in pairs], add_special_tokens=False).input_ids)
    embedded = base.model.get_input_embeddings()(torch.cat([source, target], dim=1))
    embedded = torch.cat([prompt.expand(len(pairs), -1, -1), embedded], dim=1)
    logits = base.model(inputs_embeds=embedded, use_cache=False).logits
    return logits[:, -target.shape[1] - 1 : -1], target


def loss_of(base: Base, prompt: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """The mean cross-entropy of the target tokens."""
    logits, target = target_logits(base, prompt, pairs)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


@torch.no_grad()
def accuracy_of(base: Base, prompt: torch.Tensor, pairs: Pairs) -> float:
    """The fraction of target tokens that the model gets right after this prompt."""
    logits, target = target_logits(base, prompt, pairs)
    return float((logits.argmax(-1) == target).float().mean())


def train_rows(task: Task, seed: int) -> Pairs:
    """The rows that ``tune`` trains on for this seed."""
    return rows(task, 128, 2 * seed)


def tune(
    base: Base,
    task: Task,
    start: torch.Tensor,
    data_seed: int = 0,
    *,
    target_loss: float = TARGET_LOSS,
    max_steps: int = MAX_STEPS,
) -> Outcome:
    """Tunes from ``start`` until the target loss on 32 other rows or the step limit; the seed fixes rows and order."""
    train, held_back = train_rows(task, data_seed), rows(task, 32, 2 * data_seed + 1)
    order = random.Random(data_seed)
    prompt = start.clone().requires_grad_(True)
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    eval_loss = float("inf")
    for step in range(1, max_steps + 1):
        loss = loss_of(base, prompt, order.sample(train, ROWS_PER_STEP))
        (gradient,) = torch.autograd.grad(loss, prompt)
        with torch.no_grad():
            mean.lerp_(gradient, 1 - BETA_1)
            square.lerp_(gradient.square(), 1 - BETA_2)
            update = mean / (1 - BETA_1**step) / ((square / (1 - BETA_2**step)).sqrt() + EPSILON)
            token_rms = prompt.square().mean(dim=1, keepdim=True).sqrt()
            prompt -= RELATIVE_LR * min(1.0, step / WARM_UP_STEPS) * token_rms * update
            if step % EVAL_EVERY_STEPS == 0:
                eval_loss = float(loss_of(base, prompt, held_back))
                if eval_loss <= target_loss:
                    return Outcome(prompt.detach(), step, eval_loss, True)
    return Outcome(prompt.detach(), max_steps, eval_loss, False)


def relative_of(task: Task) -> Task:
    """The task that differs in its tweak only, of those that pretraining saw if there is one."""
    held_out = held_out_tasks()
    others = [task._replace(tweak=tweak) for tweak in TWEAKS if tweak != task.tweak]
    return min(others, key=lambda other: other in held_out)


def cousin_of(task: Task) -> Task:
    """A task with the same routing and tweak in another alphabet."""
    return next(t for t in all_tasks() if t[::2] == task[::2] and t.alphabet != task.alphabet)


def random_words(seed: int) -> list[str]:
    """Eight words of the vocabulary, none of them special."""
    return random.Random(seed).sample(vocabulary()[len(SPECIAL_WORDS) :], PREFIX_WORDS)


def compare(base: Base, task: Task, seed: int) -> dict[str, Outcome]:
    """The outcome of one task from each kind of start, on the same rows in the same order."""
    starts = {"random": random_start(base, seed), "random words": text_start(base, random_words(seed))}
    for kind, other in (("same but tweak", relative_of(task)), ("same but alphabet", cousin_of(task))):
        starts[kind] = tune(base, other, random_start(base, 1000 + seed), 1000 + seed).prompt
    return {kind: tune(base, task, start, data_seed=seed) for kind, start in starts.items()}


def replay_burst(base: Base) -> Iterator[dict[str, Outcome]]:
    """The demonstration's burst, one task after another, each from a random start and from the best of the bank.

    The bank holds the ten first tasks, then also each burst task that reached the target; the best is the one of least
    loss on 16 training rows.
    """
    first, burst = demo_tasks()
    bank = [tune(base, task, random_start(base, 500 + i), 500 + i) for i, task in enumerate(first)]
    for seed, task in enumerate(burst):
        sample = train_rows(task, seed)[:BANK_SAMPLES]
        best = min((o.prompt for o in bank if o.reached), key=lambda prompt: float(loss_of(base, prompt, sample)))
        outcome = tune(base, task, best, seed)
        bank.append(outcome)
        yield {"random": tune(base, task, random_start(base, seed), seed), "best of bank": outcome}


def summarize(outcomes: list[dict[str, Outcome]]) -> dict[str, dict[str, float]]:
    """Median and mean steps, and how many missed the target, by kind of start."""
    summary = {}
    for kind in outcomes[0]:
        steps = [of_task[kind].steps for of_task in outcomes]
        missed = sum(not of_task[kind].reached for of_task in outcomes)
        summary[kind] = {
            "steps_median": statistics.median(steps),
            "steps_mean": statistics.fmean(steps),
            "missed": missed,
        }
    return summary


def measure(base: Base, count: int) -> dict[str, Any]:
    """All that the command prints, as one document."""
    start_s = time.process_time()
    held_out = [compare(base, task, seed) for seed, task in enumerate(held_out_tasks()[:count])]
    burst = list(replay_burst(base))
    tags = random.Random(0)
    accuracies = [accuracy_of(base, text_start(base, tag_words(t, tags)), rows(t, 32, 7)) for t in held_out_tasks()]
    return {
        "target_loss": TARGET_LOSS,
        "tag_accuracy_held_out": statistics.fmean(accuracies),
        "held_out": {"tasks": len(held_out), "starts": summarize(held_out)},
        "burst": {"tasks": len(burst), "starts": summarize(burst)},
        "cpu_s": time.process_time() - start_s,
        "step_cpu_ms": 1000 * step_cpu_s(base),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.machine(),
    }


def step_cpu_s(base: Base) -> float:
    """CPU seconds of one training step, evaluation included: the median of five runs of 50 steps."""
    runs = []
    for seed in range(5):
        start_s = time.process_time()
        outcome = tune(base, held_out_tasks()[seed], random_start(base, seed), seed, target_loss=0.0, max_steps=50)
        runs.append((time.process_time() - start_s) / outcome.steps)
    return statistics.median(runs)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure prompt tuning on the small world.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "tiny", help="folder of the base model")
    parser.add_argument("--tasks", type=int, default=40, help="how many held-out tasks to try (1-40)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if not 1 <= options.tasks <= 40:
        parser.error("--tasks must be from 1 to 40")
    report = measure(load_base(options.model), options.tasks)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"accuracy on held-out tasks, told by tag words: {report['tag_accuracy_held_out']:.2%}")
    print(f"one step: {report['step_cpu_ms']:.1f} ms of CPU; all: {report['cpu_s']:.0f} CPU-s\n")
    print(f"{'steps to eval loss ' + str(TARGET_LOSS):<36}{'median':>8}{'mean':>8}{'missed':>8}")
    for group in ("held_out", "burst"):
        for kind, row in report[group]["starts"].items():
            label = f"{group} ({report[group]['tasks']}): {kind}"
            print(f"{label:<36}{row['steps_median']:>8.0f}{row['steps_mean']:>8.0f}{row['missed']:>8}")


if __name__ == "__main__":
    main()
