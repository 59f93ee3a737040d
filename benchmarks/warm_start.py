"""Warm against cold on a real Slurm cluster: seconds from submission to the first training step.

Warm: `ptbatch` to a broker with a warm worker, from the start of the ptbatch process. Cold: the same request as its own
sbatch job, from the start of the sbatch process: queue, Python, imports, model, first step. Taken in turn, on one
cluster.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import emit, options
from tests.cluster import Cluster
from tests.site import Site, until

TASK = "copy-cities-plain"
CLUSTER = Path("/var/tmp/prompttuner-bench")
COLD_TIMEOUT_S = 120.0


def warm_s(site: Site, user: str | None) -> float:
    """One request through ptbatch, followed to its end so that the worker is idle again."""
    began_unix_s = time.time()
    words = [
        "--model=tiny",
        f"--train={site.task(TASK)}",
        f"--eval={site.task(TASK, 'eval')}",
        "--prompt-tokens=8",
        "--max-steps=5",
        "--slo=2m",
        "--parsable",
    ]
    request_id = site.run("ptbatch", *words, user=user).stdout.strip()
    return first_step_unix_s(site, user, request_id) - began_unix_s


def first_step_unix_s(site: Site, user: str | None, request_id: str) -> float:
    """When the request's first training step had ended, as accounting says once the request is over."""

    def ended() -> dict[str, Any] | None:
        listing = json.loads(site.run("ptacct", f"--jobs={request_id}", "--json", user=user).stdout)
        row: dict[str, Any] = listing["requests"][0]
        return row if row["state"] == "COMPLETED" else None

    return float(until(ended, COLD_TIMEOUT_S, f"request {request_id} completes")["first_step_unix_s"])


def cold_s(site: Site, user: str | None, number: int) -> float:
    """The same request, tuned by a job of its own."""
    home = site.cluster.home(user)
    output = home / f"cold-{number}"
    script = f"""#!/bin/sh
exec {sys.executable} -I -m tuner.lone --model {site.dir / "tiny"} --request {site.dir / "lone.json"} \\
    --train {site.task(TASK)} --eval {site.task(TASK, "eval")} --output {output}
"""
    log = home / f"cold-{number}.log"
    began_unix_s = time.time()
    command = ["sbatch", "--parsable", "--gres=gpu:h100:1", "--mem=2000", f"--output={log}"]
    site.cluster.run(*command, user=user, input=script, env={"OMP_NUM_THREADS": "1"})

    def report() -> dict[str, Any] | None:
        text = site.cluster.run("cat", log, user=user, check=False).stdout
        lines = [line for line in text.splitlines() if line.startswith("{")]
        found: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
        return found

    took_s = float(until(report, COLD_TIMEOUT_S, "the cold job reports")["first_step_unix_s"]) - began_unix_s
    site.cluster.run("rm", "-rf", output, log, user=user)
    return took_s


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--warm-runs", type=int, default=20)
    parser.add_argument("--cold-runs", type=int, default=5)
    given = parser.parse_args()
    cluster = Cluster.up(CLUSTER)
    user = None if cluster.rootless else "alice"
    site = Site(cluster, pool={"max_workers": 1})
    try:
        lone = {"model": "tiny", "virtual_tokens": 8, "max_steps": 5}
        (site.dir / "lone.json").write_text(json.dumps(lone), encoding="utf-8")
        site.start_broker()
        until(lambda: " idle " in site.run("ptinfo", "-N", user=user).stdout, 120, "a worker is warm")
        warm, cold = [], []
        for number in range(given.warm_runs):
            warm.append(warm_s(site, user))
            if number % max(1, given.warm_runs // given.cold_runs) == 0:
                cold.append(cold_s(site, user, number))
    finally:
        site.down()
        cluster.down()
        shutil.rmtree(CLUSTER, ignore_errors=True)
    figures = {
        "warm_s": statistics.median(warm),
        "cold_s": statistics.median(cold),
        "ratio": statistics.median(cold) / statistics.median(warm),
        "warm_max_s": max(warm),
        "cold_min_s": min(cold),
        "warm_runs": len(warm),
        "cold_runs": len(cold),
        "slurm": "sbatch default scheduling of the test cluster",
    }
    emit("warm_start", figures, len(warm), given.json)


if __name__ == "__main__":
    main()
