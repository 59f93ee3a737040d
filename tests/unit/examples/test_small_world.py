"""The small world keeps its promises: stock libraries load it, prompts are learnt on it, and good starts help."""

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SMALL_WORLD = Path(__file__).parents[3] / "examples" / "small_world"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The scripts of the small world, imported as its own commands import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(SMALL_WORLD))
        yield {name: importlib.import_module(name) for name in ("language", "make_world", "measure")}


@pytest.fixture(scope="module")
def language(modules: dict[str, ModuleType]) -> Any:
    return modules["language"]


@pytest.fixture(scope="module")
def measure(modules: dict[str, ModuleType]) -> Any:
    return modules["measure"]


@pytest.fixture(scope="module")
def base(measure: Any) -> Any:
    return measure.load_base(SMALL_WORLD / "tiny")


def test_kept_rows_are_those_that_the_recipe_makes(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    modules["make_world"].write_tasks(tmp_path)
    kept = {path.name: path.read_bytes() for path in (SMALL_WORLD / "tasks").iterdir()}
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == made


def test_the_language_needs_the_standard_library_only() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import language; print(language.rows('copy-trees-plain', 1, 0))"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code, str(SMALL_WORLD)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert "read" in run.stdout


def test_a_seed_gives_the_same_rows_and_another_seed_gives_others(language: Any) -> None:
    task = language.parse("reverse-fruits-end_a")
    assert language.rows(task, 64, 3) == language.rows("reverse-fruits-end_a", 64, 3)
    assert language.rows(task, 64, 3)[:16] == language.rows(task, 16, 3)
    assert not set(language.rows(task, 64, 3)) & set(language.rows(task, 64, 4))


def test_a_row_is_rewritten_as_its_task_says(language: Any) -> None:
    fruits = dict(zip(language.LETTERS, language.ALPHABETS["fruits"], strict=True))
    for source, target in language.rows("reverse-fruits-end_a", 20, 0):
        begin, *letters, end = source.split()
        assert (begin, end) == ("read", "write")
        assert target.split() == [*(fruits[letter] for letter in letters[:0:-1]), "apple"]


@pytest.mark.parametrize(
    "name", ["", "reverse", "reverse-fruits", "reverse-fruits-nothing", "a-b-c", "copy-trees-plain-x"]
)
def test_a_name_of_no_task_is_refused(language: Any, name: str) -> None:
    with pytest.raises(ValueError, match="ROUTING-ALPHABET-TWEAK"):
        language.parse(name)


def test_the_list_of_tasks_names_the_files_beside_it(language: Any) -> None:
    folder = SMALL_WORLD / "tasks"
    names = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    assert len(names["first"]) == 10 and len(names["burst"]) == 20 and len(names["held_out"]) == 40
    assert not set(names["first"]) & (set(names["held_out"]) | set(names["burst"]))
    for name in names["first"] + names["burst"]:
        assert len((folder / f"{name}.train.jsonl").read_text(encoding="utf-8").splitlines()) == 128
        assert len((folder / f"{name}.eval.jsonl").read_text(encoding="utf-8").splitlines()) == 32


def test_every_word_of_a_row_is_one_known_token(base: Any, language: Any) -> None:
    tokenizer = base.tokenizer
    assert tokenizer.eos_token is None and tokenizer.pad_token_id == 0
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(language.vocabulary())}
    for task in language.all_tasks():
        source, target = language.rows(task, 1, 0)[0]
        ids = tokenizer(source).input_ids + tokenizer(target).input_ids
        assert len(ids) == 14 and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == f"{source} {target}"


def test_the_model_is_small_and_untied(base: Any) -> None:
    model = base.model
    assert sum(parameter.numel() for parameter in model.parameters()) < 140_000
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert (SMALL_WORLD / "tiny" / "model.safetensors").stat().st_size < 600_000


def test_tag_words_make_the_model_do_tasks_that_it_never_saw(base: Any, language: Any, measure: Any) -> None:
    rng = random.Random(11)
    accuracies = [
        measure.accuracy_of(base, measure.text_start(base, language.tag_words(task, rng)), language.rows(task, 16, 11))
        for task in language.held_out_tasks()
    ]
    assert sum(accuracies) / len(accuracies) >= 0.97


def test_without_a_prompt_the_model_does_not_know_the_task(base: Any, language: Any, measure: Any) -> None:
    accuracies = [
        measure.accuracy_of(base, measure.random_start(base, seed), language.rows(task, 16, 11))
        for seed, task in enumerate(language.held_out_tasks())
    ]
    assert sum(accuracies) / len(accuracies) < 0.3


@pytest.mark.parametrize("index", [0, 17, 31])
def test_a_random_prompt_learns_a_held_out_task(base: Any, language: Any, measure: Any, index: int) -> None:
    task = language.held_out_tasks()[index]
    outcome = measure.tune(base, task, measure.random_start(base, index), index)
    assert outcome.reached and outcome.eval_loss <= 0.1
    assert measure.accuracy_of(base, outcome.prompt, language.rows(task, 64, 99)) >= 0.95


def test_a_relatives_prompt_takes_fewer_steps_than_a_random_one(base: Any, language: Any, measure: Any) -> None:
    outcomes = [measure.compare(base, task, seed) for seed, task in enumerate(language.held_out_tasks()[::4])]
    random_steps = [of_task["random"].steps for of_task in outcomes]
    relative_steps = [of_task["same but tweak"].steps for of_task in outcomes]
    assert sum(relative_steps) < sum(random_steps)
    assert sorted(relative_steps)[len(outcomes) // 2] <= 0.7 * sorted(random_steps)[len(outcomes) // 2]
