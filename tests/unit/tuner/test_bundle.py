"""A result says which base model and tokenizer it is for, and another one is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.protocol.errors import ConfigError
from broker.protocol.messages import Assign, Ended
from tuner.bundle import check_base, tokenizer_digest
from tuner.reading import base_digest
from tuner.session import Session


@pytest.fixture
def result(make_session: Callable[..., Session], make_request: Callable[..., Assign], tmp_path: Path) -> Path:
    """The folder of a request on the Llama base."""
    session = make_session()
    session.join(make_request(max_steps=2, verbalizer="a {input}"))
    while True:
        for said in session.step():
            if isinstance(said, Ended):
                folder = tmp_path / "result"
                folder.mkdir()
                for name, data in said.files.items():
                    (folder / name).write_bytes(data)
                return folder


def test_the_report_holds_what_using_the_prompt_takes(result: Path, model_dirs: dict[str, Path]) -> None:
    report = json.loads((result / "prompttuner.json").read_bytes())
    model = model_dirs["llama"]
    assert report["verbalizer"] == report["spec"]["verbalizer"] == "a {input}"
    assert report["base_digest"] == base_digest(model)
    assert report["tokenizer_digest"] == hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
    assert (report["base_path"], report["start"], len(report["curve"])) == (str(model), "random", 2)


def test_the_base_that_it_was_tuned_on_is_taken_wherever_it_lies(
    result: Path, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    check_base(result, model_dirs["llama"])
    check_base(result, Path(shutil.copytree(model_dirs["llama"], tmp_path / "elsewhere")))


def test_another_base_is_refused_with_both_digests(result: Path, model_dirs: dict[str, Path]) -> None:
    ours, theirs = base_digest(model_dirs["llama"]), base_digest(model_dirs["gpt2"])
    with pytest.raises(ConfigError, match=f"tuned on the base model {ours}, and .* {theirs}"):
        check_base(result, model_dirs["gpt2"])


def test_another_tokenizer_is_refused_with_both_digests(
    result: Path, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_dirs["llama"], tmp_path / "model"))
    ours = tokenizer_digest(model)
    with open(model / "tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=f"tuned on the tokenizer {ours}, and .* {tokenizer_digest(model)}"):
        check_base(result, model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has the tokenizer None"):
        check_base(result, model)


def test_what_is_no_result_or_no_model_is_told(result: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        check_base(result, tmp_path / "nothing")
    (result / "prompttuner.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no report"):
        check_base(result, tmp_path)
    (result / "prompttuner.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        check_base(result, tmp_path)
