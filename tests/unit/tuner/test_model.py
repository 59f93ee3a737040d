"""Only a directory with a causal language model is loaded; anything else is told plainly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from broker.protocol.errors import ConfigError
from tuner.model import load_base
from tuner.reading import base_digest


@pytest.fixture
def directory(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(model_dirs["llama"], copy)
    return copy


def set_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def test_a_loaded_base_is_frozen_and_described(directory: Path) -> None:
    base, phases_s = load_base(str(directory))
    assert list(phases_s) == ["imports", "read", "to_device"]
    assert (base.hidden_size, base.layers, base.heads, base.positions) == (32, 2, 4, 64)
    assert base.embedding_rms == pytest.approx(base.model.model.embed_tokens.weight.pow(2).mean().sqrt().item())
    assert not base.model.training
    assert not any(weight.requires_grad for weight in base.model.parameters())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "no causal language model.*BertForMaskedLM"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "no causal language model"),
        ({"architectures": None}, "no causal language model.*llama"),
        ({"is_encoder_decoder": True}, "no causal language model"),
        ({"model_type": "never-heard-of"}, "cannot be loaded"),
    ],
)
def test_what_is_no_causal_language_model_is_told(directory: Path, config: dict[str, object], told: str) -> None:
    set_config(directory, **config)
    with pytest.raises(ConfigError, match=told):
        load_base(str(directory))


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (["config.json"], "has no config.json"),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer"),
        (["model.safetensors"], "has no safetensors"),
    ],
)
def test_a_missing_part_is_told(directory: Path, missing: list[str], told: str) -> None:
    for name in missing:
        (directory / name).unlink()
    with pytest.raises(ConfigError, match=told):
        load_base(str(directory))


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        load_base(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_part_is_told(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"\x00damaged")
    with pytest.raises(ConfigError, match="cannot be"):
        load_base(str(directory))


def test_code_inside_the_directory_is_never_run(directory: Path) -> None:
    set_config(directory, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    ran = directory / "ran"
    (directory / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(ConfigError):
        load_base(str(directory))
    assert not ran.exists()


def test_the_digest_tells_weights_and_configurations_apart(directory: Path) -> None:
    first = base_digest(directory)
    assert base_digest(directory) == first
    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (directory / "model.safetensors").write_bytes(weights)
    second = base_digest(directory)
    set_config(directory, rms_norm_eps=1e-3)
    assert len({first, second, base_digest(directory)}) == 3


def test_importing_the_session_is_quick_and_brings_no_torch() -> None:
    check = "import sys, tuner.session; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-c", check], check=False).returncode == 0
