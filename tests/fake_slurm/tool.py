"""One fake Slurm command; its name tells which. See `tests.fake_slurm`."""

import fcntl
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(os.environ["SLURM_CONF"]).parent
TOOL = Path(sys.argv[0]).name


def load(name: str, default: Any) -> Any:
    path = ROOT / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else default


def save(name: str, value: Any) -> None:
    (ROOT / f"{name}.json").write_text(json.dumps(value))


def option(name: str) -> str | None:
    for argument in sys.argv[1:]:
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
    return None


def next_word() -> dict[str, Any]:
    words = load(f"plan-{TOOL}", [])
    if words:
        save(f"plan-{TOOL}", words[1:])
    return words[0] if words else {"do": True}


def sbatch() -> str:
    script = sys.stdin.read()
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    options = dict(shlex.split(line)[1].partition("=")[::2] for line in lines)
    if "--test-only" in sys.argv:
        print("sbatch: Job 1 to start at 2026-11-20T09:23:12 using 1 processors on nodes n1", file=sys.stderr)
        return ""
    jobs = load("jobs", [])
    job_id = str(max([int(job["id"]) for job in jobs], default=100) + 1)
    job = {"id": job_id, "name": options["--job-name"], "comment": options["--comment"], "state": "PENDING"}
    save("jobs", [*jobs, job | {"script": script}])
    return f"{job_id}\n"


def squeue() -> str:
    name = option("name")
    lines = []
    for job in load("jobs", []):
        if job.get("forgotten") or (name is not None and job["name"] != name):
            continue
        values = {
            "A": job["id"],
            "T": job["state"],
            "r": job.get("reason", "None"),
            "N": job.get("node", ""),
            "S": job.get("start", "N/A"),
            "e": job.get("end", "N/A"),
            "j": job["name"],
            "k": job["comment"],
        }
        parts = re.split("%([A-Za-z])", option("format") or "")  # every second one is a field's letter
        lines.append("".join(values[part] if index % 2 else part for index, part in enumerate(parts)))
    return "".join(line + "\n" for line in lines)


def sacct() -> str:
    ids = option("jobs") or ""
    lines = []
    for job in load("jobs", []):
        if (ids and job["id"] not in ids.split(",")) or (option("name") and job["name"] != option("name")):
            continue
        values = {"JobIDRaw": job["id"], "State": job["state"], "ExitCode": "0:0", "JobName": job["name"]}
        values |= {
            "NodeList": job.get("node", ""),
            "Start": job.get("start", "Unknown"),
            "End": job.get("end", "Unknown"),
        }
        lines.append("|".join(values[field] for field in (option("format") or "").split(",")) + "\n")
    return "".join(lines)


def scancel() -> str | None:
    ids = [argument for argument in sys.argv[1:] if argument.isdigit()]
    jobs = load("jobs", [])
    known = {job["id"] for job in jobs}
    save("jobs", [job | {"state": "CANCELLED"} if job["id"] in ids else job for job in jobs])
    for job_id in ids:
        if job_id not in known:
            print(f"scancel: error: Kill job error on job id {job_id}: Invalid job id specified", file=sys.stderr)
    return "" if set(ids) <= known else None


def answer() -> str:
    return str(load(f"answer-{TOOL}", ""))


WORK = {"sbatch": sbatch, "squeue": squeue, "sacct": sacct, "scancel": scancel}


def main() -> int:
    with open(ROOT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        call = {"tool": TOOL, "argv": sys.argv[1:], "env": dict(os.environ), "time": time.time()}
        with open(ROOT / "calls.jsonl", "a") as log:
            log.write(json.dumps(call) + "\n")
        word = next_word()
        done = WORK.get(TOOL, answer)() if word.get("do") else ""
    time.sleep(word.get("hang_s", 0))
    text = word.get("stdout", done or "")
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape")[: -word["cut"] if "cut" in word else None])
    sys.stderr.write(word.get("stderr", ""))
    return int(word.get("code", 1 if done is None else 0))


sys.exit(main())
