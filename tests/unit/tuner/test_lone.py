"""One cold process tunes one request and says when things happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def lone(tmp_path: Path, model: Path, request: dict[str, object], rows: bytes) -> subprocess.CompletedProcess[str]:
    (tmp_path / "request.json").write_text(json.dumps(request))
    (tmp_path / "train.jsonl").write_bytes(rows)
    command = [sys.executable, "-I", "-m", "tuner.lone", "--model", str(model)]
    command += ["--request", str(tmp_path / "request.json"), "--train", str(tmp_path / "train.jsonl")]
    command += ["--output", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def test_it_writes_the_folder_and_one_line_of_times(model_dirs, make_rows, tmp_path: Path) -> None:
    before = time.time()
    request = {"init": "random", "virtual_tokens": 4, "max_steps": 6}
    done = lone(tmp_path, model_dirs["llama"], request, make_rows(20))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["state"], told["steps"]) == ("COMPLETED", 6)
    clock_tick_s = 0.02
    assert before - clock_tick_s <= told["process_start_unix_s"] < told["first_step_unix_s"]
    assert told["first_step_unix_s"] < told["end_unix_s"] <= time.time()
    report = json.loads((tmp_path / "out" / "prompttuner.json").read_text())
    assert report["best"]["loss"] == told["loss"]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_request_with_an_unknown_field_is_refused(model_dirs, make_rows, tmp_path: Path) -> None:
    done = lone(tmp_path, model_dirs["llama"], {"stepz": 6}, make_rows(20))
    assert done.returncode == 1
    assert "stepz" in done.stderr


def test_a_request_that_fails_is_told_and_writes_nothing(model_dirs, tmp_path: Path) -> None:
    done = lone(tmp_path, model_dirs["llama"], {}, b'{"input":"a","target":""}\n')
    assert done.returncode == 1
    assert "row 1" in json.loads(done.stdout)["error"]
    assert list((tmp_path / "out").iterdir()) == []
