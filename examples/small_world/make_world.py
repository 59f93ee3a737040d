"""Makes the small world: the base model in tiny/ and the rows of the demonstration's tasks in tasks/.

    python examples/small_world/make_world.py --out examples/small_world

The same seed and steps give the same rows everywhere, and the same weights on the same machine and library versions.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from language import demo_tasks, held_out_tasks, rows

TRAIN_ROWS, EVAL_ROWS = 128, 32
TRAIN_SEED, EVAL_SEED = 0, 1
DEFAULT_STEPS = 5000


def write_rows(path: Path, pairs: list[tuple[str, str]]) -> None:
    """Writes rows as JSON Lines with the fields ``input`` and ``target``."""
    lines = (json.dumps({"input": source, "target": target}) + "\n" for source, target in pairs)
    path.write_text("".join(lines), encoding="utf-8")


def write_tasks(folder: Path) -> None:
    """Writes NAME.train.jsonl and NAME.eval.jsonl of each task of the demonstration, and their list, tasks.json."""
    folder.mkdir(parents=True, exist_ok=True)
    first, burst = demo_tasks()
    for task in first + burst:
        write_rows(folder / f"{task.name}.train.jsonl", rows(task, TRAIN_ROWS, TRAIN_SEED))
        write_rows(folder / f"{task.name}.eval.jsonl", rows(task, EVAL_ROWS, EVAL_SEED))
    names = {
        "first": [task.name for task in first],
        "burst": [task.name for task in burst],
        "held_out": [task.name for task in held_out_tasks()],
    }
    (folder / "tasks.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def write_model(folder: Path, steps: int, seed: int) -> None:
    """Pretrains the base model and writes its folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Imported here so that --tasks-only needs the standard library only.
    import torch
    from pretrain import pretrain, save

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    save(pretrain(steps, seed), folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the small world's model and tasks.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write tiny/ and tasks/ to")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="pretraining steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and its pretraining rows")
    parser.add_argument("--tasks-only", action="store_true", help="write the rows only; needs no torch")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    start_s = time.monotonic()
    write_tasks(options.out / "tasks")
    if not options.tasks_only:
        write_model(options.out / "tiny", options.steps, options.seed)
    print(f"wrote {options.out} in {time.monotonic() - start_s:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
