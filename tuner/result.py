"""What a finished request gives: a PEFT adapter folder, and the prompt's entry for the bank."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import safetensors.torch

from bank.entries import Entry
from tuner.bundle import REPORT
from tuner.model import Base
from tuner.run import Run


def result_files(base: Base, run: Run) -> dict[str, bytes]:
    """The files of the best evaluated prompt: `PeftModel.from_pretrained` loads the folder."""
    prompt = run.best_prompt.detach().cpu().float().contiguous()
    weights = safetensors.torch.save({"prompt_embeddings": prompt}, metadata={"format": "pt"})
    return {
        "adapter_config.json": _json(_adapter_config(base, run.spec.virtual_tokens)),
        "adapter_model.safetensors": weights,
        REPORT: _json(_report(base, run)),
    }


def bank_entry(base: Base, run: Run) -> Entry:
    """The best prompt's entry; its digest is the store's to fill in."""
    spec, best = run.spec, run.history.best
    if best is None:
        raise ValueError("a request that was never evaluated has no prompt to publish")
    return Entry(
        digest="0" * 64,
        base_digest=base.digest,
        virtual_tokens=spec.virtual_tokens,
        hidden_size=base.hidden_size,
        uid=run.assign.uid,
        user=run.assign.user,
        account=run.assign.account,
        share=spec.share.value,
        metric=spec.metric.value,
        score=best.score(spec.metric),
        loss=best.loss,
        steps=best.step,
        start=run.history.start,
        created_unix_s=time.time(),
        converged=run.converged,
        job_name=spec.job_name,
    )


def _adapter_config(base: Base, virtual_tokens: int) -> dict[str, Any]:
    """As PEFT's PromptTuningConfig writes it; written by hand because importing PEFT takes seconds."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base.path,
        "inference_mode": True,
        "num_attention_heads": base.heads,
        "num_layers": base.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": virtual_tokens,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": base.hidden_size,
        "tokenizer_name_or_path": None,
    }


def _report(base: Base, run: Run) -> dict[str, Any]:
    best = run.history.best
    return {
        "request_id": run.assign.request_id,
        "attempt": run.assign.attempt,
        "spec": msgspec.to_builtins(run.spec),
        "base_path": base.path,
        "base_digest": base.digest,
        "tokenizer_digest": base.tokenizer_digest,
        "verbalizer": run.spec.verbalizer,
        "start": run.history.start,
        "restart": msgspec.to_builtins(run.history.restart),
        "lookup_s": run.history.lookup_s,
        "steps": run.step,
        "target_reached": run.target_reached,
        "best": msgspec.to_builtins(best),
        "curve": msgspec.to_builtins(run.history.curve),
        "train_rows": len(run.data.train),
        "eval_rows": len(run.data.eval),
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
