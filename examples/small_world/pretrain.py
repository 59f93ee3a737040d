"""Pretrains the small world's base model: a GPT-2 of 134 thousand parameters that obeys tag words.

Every sequence is ``[8 tag words] read [6 letters] write [6 output words]`` with the loss on the six output words only,
which is also what a tuner builds when it puts eight virtual tokens before a row's input and target. Having learnt to
take its task from the first eight positions, the model can be told a task by a tuned prompt, too.
"""

import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from language import (
    PAD,
    PREFIX_WORDS,
    ROW_LETTERS,
    UNKNOWN,
    Task,
    all_tasks,
    held_out_tasks,
    row,
    tag_words,
    vocabulary,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CONTEXT_TOKENS = 64
SOURCE_TOKENS = PREFIX_WORDS + ROW_LETTERS + 2
LEARNING_RATE = 4e-3
WARM_UP_STEPS = 100
TASKS_PER_STEP, ROWS_PER_TASK = 32, 2


def make_tokenizer() -> Any:
    """A tokenizer of whole words. It has no end-of-sequence token: six output words are always six tokens."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN))
    inner.pre_tokenizer = WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=inner,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int) -> Any:
    """The untrained model, the same for the same seed."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(vocabulary()),
        n_positions=CONTEXT_TOKENS,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def tagged_rows(tasks: list[Task], rows_per_task: int, rng: random.Random) -> torch.Tensor:
    """Token ids [rows, 22] of rows of these tasks, each after tag words of its own."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    sequences = []
    for task in tasks:
        for _ in range(rows_per_task):
            source, target = row(task, rng)
            sequences.append([ids[word] for word in (*tag_words(task, rng), *source, *target)])
    return torch.tensor(sequences)


def target_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits [rows, 6, words] that predict the output words."""
    hidden = model.transformer(tokens[:, :-1]).last_hidden_state
    logits: torch.Tensor = model.lm_head(hidden[:, SOURCE_TOKENS - 1 :])
    return logits


@torch.no_grad()
def tag_accuracy(model: Any, tasks: list[Task], rows_per_task: int, seed: int) -> float:
    """The fraction of output words that the model gets right when tag words name the task."""
    tokens = tagged_rows(tasks, rows_per_task, random.Random(seed))
    guesses = target_logits(model, tokens).argmax(-1)
    return float((guesses == tokens[:, SOURCE_TOKENS:]).float().mean())


def pretrain(steps: int, seed: int) -> Any:
    """A model trained for that many steps on the tasks that are not held out; progress goes to standard error."""
    model = make_model(seed)
    rng = random.Random(f"pretrain/{seed}")
    held_out = held_out_tasks()
    tasks = [task for task in all_tasks() if task not in held_out]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * step / steps)),
    )
    start_s = time.process_time()
    for step in range(1, steps + 1):
        tokens = tagged_rows(rng.choices(tasks, k=TASKS_PER_STEP), ROWS_PER_TASK, rng)
        logits = target_logits(model, tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, SOURCE_TOKENS:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            accuracy = tag_accuracy(model, held_out, 4, seed=1)
            used_s = time.process_time() - start_s
            print(
                f"step {step}/{steps}  loss {loss.item():.4f}  held-out accuracy {accuracy:.2%}  {used_s:.0f} CPU-s",
                file=sys.stderr,
                flush=True,
            )
    return model.eval()


def save(model: Any, folder: Path) -> None:
    """Writes the folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, and the model is for every user of the checkout
