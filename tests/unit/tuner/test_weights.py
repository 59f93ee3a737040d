"""Weights that are mapped from their files compute what transformers' own loader gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from broker.protocol.errors import ConfigError
from tuner.model import Disturbing, load_base
from tuner.weights import Weights, mapped_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 43).reshape(2, 20)


def mapped(directory: Path) -> torch.nn.Module:
    model = mapped_model(directory)
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def by_library(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16])
def test_mapped_weights_give_the_librarys_logits(
    model_dirs: dict[str, Path], tmp_path: Path, family: str, written: torch.dtype
) -> None:
    by_library(model_dirs[family]).to(written).save_pretrained(tmp_path)
    model = mapped(tmp_path)
    weights = Weights(model, CPU, torch.float32)
    assert weights.placed == (written is torch.float32)
    weights.place()
    wanted = by_library(tmp_path)(IDS).logits
    assert torch.equal(model(IDS).logits, wanted)
    weights.withdraw()
    assert {parameter.dtype for parameter in model.parameters()} == {written}
    weights.place()
    assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_buffers_that_no_file_holds_are_right(tmp_path: Path, tied: bool) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={**scaled, "original_max_position_embeddings": 32},
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, other = mapped(tmp_path), by_library(tmp_path)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    for (name, ours), (_, theirs) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_weights_in_several_files_are_found_by_their_index(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    by_library(model_dirs["llama"]).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(mapped(tmp_path)(IDS).logits, by_library(tmp_path)(IDS).logits)


def test_a_model_whose_files_name_its_weights_otherwise_is_loaded_by_the_library(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(vocab_size=64, max_position_embeddings=64, **sizes)  # type: ignore[arg-type]  # **sizes
    shutil.copytree(model_dirs["llama"], tmp_path, dirs_exist_ok=True)
    wanted = AutoModelForCausalLM.from_config(config)
    wanted.save_pretrained(tmp_path)
    base, _ = load_base(str(tmp_path))
    assert torch.allclose(base.model(IDS).logits, wanted.eval()(IDS).logits)
    assert mapped_model(tmp_path) is None
    with pytest.raises(Disturbing):
        load_base(str(tmp_path), beside_training=True)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_files_that_do_not_fit_are_not_mapped(model_dirs: dict[str, Path], tmp_path: Path, change: str) -> None:
    shutil.copytree(model_dirs["llama"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.norm.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["model.other.weight"] = tensors[name].clone()
    else:
        tensors[name] = torch.ones(7)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert mapped_model(tmp_path) is None


def test_an_index_that_points_out_of_the_directory_is_refused(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(model_dirs["llama"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError):
        load_base(str(tmp_path / "m"))
