"""The embedded default keeps its promises: real commands, a real broker, real workers, real tuning, without Slurm."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.embedded import Embedded, local_site
from tests.processes import alive, until
from tests.site import BIN, WORLD
from tests.stock_peft import loss_of

TINY = WORLD / "tiny"
TASK = "copy-cities-plain"
STEPS = 400  # six such requests on two workers take some ten seconds
LONG = (f"--max-steps={STEPS}", "--prompt-tokens=8", "--init=random")
LONGER = (f"--max-steps={2 * STEPS}", *LONG[1:])  # for one alone
ENDLESS = ("--max-steps=1000000", *LONG[1:])
COMMANDS = [
    ("ptbatch", "--model=tiny", f"--train={WORLD}/tasks/{TASK}.train.jsonl"),
    ("ptqueue",),
    ("ptinfo",),
    ("ptacct",),
    ("ptcancel", "1"),
    ("ptfetch", "1"),
    ("ptattach", "1"),
    ("ptctl", "broker", "status"),
    ("ptctl", "broker", "stop"),
]


@pytest.fixture(scope="module")
def calm() -> Iterator[Embedded]:
    """A broker with two warm workers that nobody disturbs."""
    home = Embedded()
    try:
        home.start_warm("--model", f"tiny={TINY}", "--workers", "2")
        yield home
    finally:
        home.down()


@pytest.fixture(scope="module")
def rough() -> Iterator[Embedded]:
    """A broker with two warm workers whose processes get killed."""
    home = Embedded(local_site(TINY, limits='checkpoint = "1s"\nheartbeat = "1s"'))
    try:
        home.start_warm(workers=2)
        yield home
    finally:
        home.down()


@pytest.fixture(scope="module")
def tuned(calm: Embedded) -> tuple[int, Path]:
    """A request that reached its target, and the folder that ptbatch wrote."""
    folder = calm.dir / "first"
    done = calm.run(
        "ptbatch",
        "--model=tiny",
        f"--train={calm.task(TASK)}",
        f"--eval={calm.task(TASK, 'eval')}",
        "--prompt-tokens=8",
        "--target-score=0.1",
        "--slo=2m",
        "--job-name=first",
        "--wait",
        f"--output={folder}",
    )
    return int(done.stdout.split()[-1]), folder


def results(rows: list[dict[str, Any]]) -> list[str]:
    return [row["state"] for row in rows]


# --- the way of a request -------------------------------------------------------------------------------------------


def test_a_request_reaches_its_target_and_stock_peft_agrees_with_the_reported_loss(
    calm: Embedded, tuned: tuple[int, Path]
) -> None:
    request_id, folder = tuned
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "prompttuner.json",
    }
    report = json.loads((folder / "prompttuner.json").read_text())
    assert report["request_id"] == request_id and report["target_reached"] is True
    measured = loss_of(TINY, folder, calm.task(TASK, "eval"))
    assert measured == pytest.approx(report["best"]["loss"], abs=1e-3)
    row = calm.row(request_id)
    assert row["loss"] == pytest.approx(measured, abs=1e-3) and row["loss"] <= 0.1
    assert row["state"] == "COMPLETED" and row["met"] is True and row["gpu_s"] > 0 and row["attempts"] == 1


def test_accounting_without_a_target_tells_the_loss_of_the_prompt_that_is_handed_out(calm: Embedded) -> None:
    folder = calm.dir / "untargeted"
    files = (f"--train={calm.task(TASK)}", f"--eval={calm.task(TASK, 'eval')}")
    done = calm.run("ptbatch", "--model=tiny", *files, "--max-steps=40", "--wait", f"--output={folder}", "--parsable")
    measured = loss_of(TINY, folder, calm.task(TASK, "eval"))
    assert json.loads((folder / "prompttuner.json").read_text())["best"]["loss"] == pytest.approx(measured, abs=1e-3)
    assert calm.row(int(done.stdout))["loss"] == pytest.approx(measured, abs=1e-3)


def test_progress_goes_to_stderr_and_the_id_alone_to_stdout(calm: Embedded) -> None:
    done = calm.run("ptbatch", "--model=tiny", f"--train={calm.task(TASK)}", "--max-steps=20", "--slo=2m", "--wait")
    assert done.stdout.startswith("Submitted prompt-tuning request ") and len(done.stdout.splitlines()) == 1
    assert "RUNNING step" in done.stderr and "COMPLETED" in done.stderr and "deadline met" in done.stderr


def test_ptfetch_writes_the_same_files_again_but_never_over_a_folder(calm: Embedded, tuned: tuple[int, Path]) -> None:
    request_id, folder = tuned
    again = calm.dir / "again"
    assert "3 files" in calm.run("ptfetch", str(request_id), "-o", again).stdout
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    refused = calm.run("ptfetch", str(request_id), "-o", again, code=None)
    assert refused.returncode != 0 and str(again) in refused.stderr


def test_listings_tell_of_a_request_while_it_runs_and_after(calm: Embedded) -> None:
    request_id = calm.submit(TASK, *ENDLESS, "--job-name=watched", "--slo=10m")
    until(lambda: calm.row(request_id)["step"] > 0, 60, "its first steps")
    line = calm.run("ptqueue", "-h", "-n", "watched").stdout.split()
    assert line[0] == str(request_id) and line[4] == "R"
    [row] = calm.json("ptqueue", "-j", str(request_id))["requests"]
    assert row["state"] == "RUNNING" and row["deadline_unix_s"] > time.time() and row["predicted_finish_unix_s"]
    assert "runs on" in calm.run("ptqueue", f"--why={request_id}").stdout
    [pool] = calm.json("ptinfo")["pools"]
    assert [request_id] in [a["running"] for a in pool["allocations"]]
    assert "warm" in calm.run("ptinfo").stdout and "warm" in calm.run("ptinfo", "-N", "-h").stdout
    assert calm.run("ptfetch", str(request_id), code=4).stderr.startswith("ptfetch: error: ")
    calm.run("ptcancel", "-v", str(request_id))
    attached = calm.run("ptattach", str(request_id), code=1)
    assert "CANCELLED" in attached.stderr
    assert calm.row(request_id)["state"] == "CANCELLED"
    assert f"{request_id}|CANCELLED" in calm.run("ptacct", "-j", str(request_id), "-nP", "-o", "ReqID,State").stdout
    assert calm.run("ptqueue", "-h").stdout == ""
    calm.run("ptfetch", str(request_id), code=6)


def test_ptattach_follows_to_the_end(calm: Embedded) -> None:
    request_id = calm.submit(TASK, "--max-steps=100")
    assert "COMPLETED" in calm.run("ptattach", str(request_id)).stderr


def test_cancelling_by_filter_leaves_the_others(calm: Embedded) -> None:
    doomed = [calm.submit(TASK, *ENDLESS, "--job-name=doomed") for _ in range(2)]
    kept = calm.submit(TASK, "--max-steps=60", "--job-name=kept")
    calm.run("ptcancel", "--name=doomed")
    assert results(calm.wait([*doomed, kept])) == ["CANCELLED", "CANCELLED", "COMPLETED"]
    assert "ended already" in calm.run("ptcancel", "-v", str(doomed[0])).stderr


def test_a_script_on_stdin_sets_options_and_the_command_line_is_stronger(calm: Embedded) -> None:
    script = f"#!/bin/bash\n#PT --model=tiny --train={calm.task(TASK)}\n#PT --max-steps=30 -J scripted\n"
    done = calm.run("ptbatch", "--parsable", "--max-steps=15", input=script)
    [row] = calm.wait([int(done.stdout)])
    assert (row["state"], row["max_steps"], row["job_name"]) == ("COMPLETED", 15, "scripted")


def test_csv_gives_what_json_lines_give(calm: Embedded) -> None:
    rows = [json.loads(line) for line in calm.task(TASK).read_text().splitlines()]
    table = calm.dir / "rows.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["target", "input"])
        writer.writeheader()
        writer.writerows(rows)
    options = ("--model=tiny", "--max-steps=10", "--init=random", "--seed=3", "--parsable")
    ids = [int(calm.run("ptbatch", f"--train={path}", *options).stdout) for path in (table, calm.task(TASK))]
    from_csv, from_json = calm.wait(ids)
    assert from_csv["state"] == "COMPLETED"
    assert from_csv["loss"] == pytest.approx(from_json["loss"], abs=1e-3)


def test_a_few_rows_are_evaluated_on_without_an_eval_file(calm: Embedded) -> None:
    few = calm.dir / "few.jsonl"
    few.write_text("".join(f"{line}\n" for line in calm.task(TASK).read_text().splitlines()[:5]))
    one = calm.dir / "one.jsonl"
    one.write_text(few.read_text().splitlines()[0] + "\n")
    ids = []
    for path in (few, one):
        done = calm.run("ptbatch", "--model=tiny", f"--train={path}", "--max-steps=10", "--parsable")
        ids.append(int(done.stdout))
    for row in calm.wait(ids):
        assert row["state"] == "COMPLETED" and row["loss"] is not None


def test_text_random_and_bank_starts_are_told(calm: Embedded, tuned: tuple[int, Path]) -> None:
    common = ("--max-steps=5", "--prompt-tokens=8")
    ids = [
        calm.submit(TASK, *common, "--init=text", "--init-text=read the letters and write the words"),
        calm.submit(TASK, *common, "--init=random"),
        calm.submit(TASK, *common),
    ]
    rows = calm.wait(ids)
    assert results(rows) == ["COMPLETED"] * 3
    assert [row["start"].split(":")[0] for row in rows] == ["text", "random", "bank"]


def test_a_bank_start_takes_fewer_steps_than_a_random_one(calm: Embedded, tuned: tuple[int, Path]) -> None:
    common = ("--prompt-tokens=8", "--target-score=0.1", "--slo=2m")
    from_bank, from_random = calm.wait([calm.submit(TASK, *common), calm.submit(TASK, *common, "--init=random")])
    assert from_bank["start"].startswith("bank:") and from_random["start"] == "random"
    assert from_bank["step"] < from_random["step"]


def test_an_accuracy_target_ends_a_request(calm: Embedded) -> None:
    options = ("--prompt-tokens=8", "--metric=accuracy", "--target-score=0.5")
    [row] = calm.wait([calm.submit(TASK, *options)])
    assert row["state"] == "COMPLETED" and row["metric"] == "accuracy"
    assert row["score"] >= 0.5 and row["step"] < row["max_steps"]


def test_a_tasks_settings_and_the_verbalizer_reach_the_result(calm: Embedded) -> None:
    folder = calm.dir / "worded"
    words = ("--task=generation", "--metric=token_accuracy", "--target-score=0.3", "--verbalizer={input} write")
    calm.run("ptbatch", "--model=tiny", f"--train={calm.task(TASK)}", *words, "--wait", f"--output={folder}")
    report = json.loads((folder / "prompttuner.json").read_text())
    assert (report["verbalizer"], report["spec"]["eval_every"]) == ("{input} write", 10)
    assert report["target_reached"] and report["best"]["token_accuracy"] >= 0.3


def test_a_target_that_is_too_long_ends_its_request_by_its_row(calm: Embedded) -> None:
    [row] = calm.wait([calm.submit(TASK, "--max-target-tokens=1")])
    assert row["state"] == "FAILED" and "training row 1: the target has" in row["error"]


def test_on_miss_drop_ends_and_on_miss_reject_refuses(calm: Embedded) -> None:
    dropped = calm.submit(TASK, "--max-steps=100000", "--slo=3s", "--on-miss=drop")
    assert results(calm.wait([dropped])) == ["DEADLINE"]
    files = ("--model=tiny", f"--train={calm.task(TASK)}")
    refused = calm.run("ptbatch", *files, "--max-steps=100000", "--slo=1s", "--on-miss=reject", code=4)
    assert "after the deadline" in refused.stderr


def test_test_only_predicts_and_changes_nothing(calm: Embedded) -> None:
    before = calm.rows()
    done = calm.run("ptbatch", "--model=tiny", f"--train={calm.task(TASK)}", "--slo=5m", "--test-only")
    assert "predicted finish" in done.stderr and done.stdout == ""
    assert calm.json("ptqueue")["requests"] == [] and calm.rows() == before


def test_the_journal_and_its_folder_are_their_owners_alone(calm: Embedded) -> None:
    files = [calm.state_dir, *calm.state_dir.rglob("*"), calm.dir / "run"]
    assert files and [str(file) for file in files if file.stat().st_mode & 0o077] == []


def test_nothing_in_the_working_directory_is_ever_imported(calm: Embedded, tuned: tuple[int, Path]) -> None:
    assert (calm.cwd / "bank" / "__init__.py").exists() and not calm.trapped.exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_without_a_broker_every_command_says_so(command: tuple[str, ...]) -> None:
    home = Embedded()
    try:
        done = home.run(*command, code=3)
        assert done.stdout == ""
        assert "error: no broker at ipc://" in done.stderr and "ptctl broker start" in done.stderr
    finally:
        home.down()


def test_the_demo_completes_everything_and_the_bank_saves_steps() -> None:
    """Also for a person whose site file names another broker: the demo speaks to its own."""
    key = "0" * 40
    home = Embedded(f'{local_site(TINY)}[broker]\nlisten = "tcp://127.0.0.1:9"\npublic_key = "{key}"\n')
    try:
        (home.dir / "home/.config").mkdir()
        (home.dir / "conf").rename(home.dir / "home/.config/prompttuner")
        figures = home.json("ptctl", "demo")["demo"]
        hidden = home.run("ptctl", "broker", "start", f"--model=tiny={TINY}", code=4)
        assert "commands would not find this one" in hidden.stderr
        assert not (home.state_dir / "journal.sqlite").exists()
    finally:
        home.down()
    assert figures["completed"] == figures["requests"] >= 20
    assert figures["bank_steps_mean"] < figures["random_steps_mean"]
    assert figures["deadlines_met_share"] >= 0.9


# --- what breaks ----------------------------------------------------------------------------------------------------


def six_long(home: Embedded) -> list[int]:
    ids = [home.submit(task, *LONG) for task in (TASK, "copy-names-end_a", "odds-fruits-plain") for _ in range(2)]
    until(lambda: all(home.row(i)["step"] > 20 for i in ids), 90, "all six to train")
    return ids


def ended_once(home: Embedded, ids: list[int]) -> list[dict[str, Any]]:
    rows = home.wait(ids)
    assert results(rows) == ["COMPLETED"] * len(ids)
    assert [row["step"] for row in rows] == [STEPS] * len(ids)
    listed = [row["id"] for row in home.rows()]
    assert len(listed) == len(set(listed))
    for request_id in ids:
        folder = home.dir / f"result-{request_id}"
        home.run("ptfetch", str(request_id), "-o", folder)
        assert json.loads((folder / "prompttuner.json").read_text())["request_id"] == request_id
    return rows


def kept(home: Embedded, request_id: int) -> tuple[int, int]:
    """The attempt and the step that the request's checkpoint holds; zeros where there is none."""
    try:
        data = (home.state_dir / "spool" / "checkpoints" / f"{request_id}.safetensors").read_bytes()
    except FileNotFoundError:
        return 0, 0
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    meta = json.loads(header["__metadata__"]["prompttuner"])
    return int(meta["attempt"]), int(meta["step"])


def until_kept(home: Embedded, request_id: int, least: tuple[int, int]) -> tuple[int, int]:
    """The checkpoint's attempt and step once they are beyond `least`."""
    until(lambda: kept(home, request_id) > least, 60, f"a checkpoint of request {request_id} beyond {least}")
    return kept(home, request_id)


def kill_one(home: Embedded, processes: dict[int, str]) -> tuple[int, str, list[int]]:
    """kill -9 of the first of these processes while six requests run, and the six: those that it held go on from the
    step of their checkpoint."""
    ids = six_long(home)
    pid, allocation = next(iter(processes.items()))
    held = [i for i in ids if home.row(i)["allocation"] == allocation]
    assert held, "it had nothing to do"
    before = [until_kept(home, request_id, (1, 20))[1] for request_id in held]
    os.kill(pid, signal.SIGKILL)
    for request_id, step in zip(held, before, strict=True):
        # A new attempt is kept after its first step: one that began anew would be there at step 1.
        assert until_kept(home, request_id, (2, 0)) > (2, step)
    rows = {row["id"]: row for row in ended_once(home, ids)}
    for request_id in held:
        assert rows[request_id]["attempts"] == 2
        report = json.loads((home.dir / f"result-{request_id}" / "prompttuner.json").read_text())
        steps = [point["step"] for point in report["curve"]]
        assert steps == sorted(set(steps)) and steps[0] <= 5 and steps[-1] == STEPS
    return pid, allocation, held


def test_a_killed_broker_comes_back_to_its_warm_workers_and_every_request_ends_once(rough: Embedded) -> None:
    ids = six_long(rough)
    workers = rough.supervisors()
    trainers = rough.trainers()
    rough.kill_broker()
    rough.run("ptqueue", code=3)
    rough.start()
    until(lambda: len([a for a in rough.allocations() if a["state"] == "warm"]) == 2, 30, "both workers are back")
    rows = ended_once(rough, ids)
    assert [row["attempts"] for row in rows] == [1] * 6  # nothing was moved or started anew
    assert rough.supervisors() == workers and rough.trainers() == trainers


def test_ptattach_outlives_a_broker(rough: Embedded) -> None:
    request_id = rough.submit(TASK, *LONGER)
    said = rough.dir / "attached"
    with said.open("w") as stderr:
        follower = subprocess.Popen([BIN / "ptattach", str(request_id)], env=rough.env, cwd=rough.cwd, stderr=stderr)
    try:
        until(lambda: "RUNNING" in said.read_text(), 60, "ptattach shows progress")
        rough.kill_broker()
        rough.start()
        assert follower.wait(timeout=120) == 0
    finally:
        follower.kill()
    assert "COMPLETED" in said.read_text()


def test_a_killed_trainer_costs_only_the_steps_since_the_checkpoint(rough: Embedded) -> None:
    workers = rough.supervisors()
    kill_one(rough, rough.trainers())
    assert rough.supervisors() == workers


def test_a_killed_worker_is_replaced_and_its_requests_go_on_elsewhere(rough: Embedded) -> None:
    rough.until_warm(2)
    _, allocation, held = kill_one(rough, rough.supervisors())
    assert allocation not in [rough.row(request_id)["allocation"] for request_id in held]
    until(lambda: allocation not in rough.forks().values(), 30, "its trainer is gone too")
    assert len(rough.until_warm(2)) == 2


def test_keep_workers_hands_warm_workers_to_the_next_broker(rough: Embedded) -> None:
    rough.until_warm(2)
    before = rough.supervisors()
    rough.run("ptctl", "broker", "stop", "--keep-workers")
    rough.run("ptctl", "broker", "status", code=3)
    assert rough.supervisors() == before
    rough.start()
    until(lambda: len([a for a in rough.allocations() if a["state"] == "warm"]) == 2, 30, "both workers are back")
    assert rough.supervisors() == before
    assert results(rough.wait([rough.submit(TASK, "--max-steps=5")])) == ["COMPLETED"]


def test_stop_ends_every_worker_and_the_next_broker_still_knows_the_requests(rough: Embedded) -> None:
    request_id = rough.submit(TASK, *LONGER)
    until(lambda: rough.row(request_id)["step"] > 20, 60, "it trains")
    pids = [*rough.supervisors(), *rough.forks()]
    assert len(pids) == 6, "two workers, each with a trainer and the parent of trainers"
    rough.run("ptctl", "broker", "stop")
    until(lambda: not [pid for pid in pids if alive(pid)], 30, "all processes of the workers are gone")
    rough.start()
    [row] = rough.wait([request_id])
    assert row["state"] == "COMPLETED" and row["attempts"] >= 2
