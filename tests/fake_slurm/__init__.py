"""A Slurm that does what a test tells it: executables on disk under the names of Slurm's commands, and their state.

Each call takes the next word of its command's plan (`FakeSlurm.plan`); without one it behaves:

    {"stderr": "...", "code": 1}     fails like that, having done nothing
    {"do": True, ...}                does its work first, then fails like that
    {"hang_s": 60, ...}              does not answer for so long (after its work, with "do")
    {"stdout": "..."}                prints that instead of its answer
    {"cut": 40}                      prints its answer without the last 40 characters
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOOLS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "sacctmgr", "srun")


class FakeSlurm:
    """One fake cluster in a directory of its own."""

    def __init__(self, root: Path, tools: tuple[str, ...] = TOOLS) -> None:
        self.bin = root / "bin"
        self.conf = root / "slurm.conf"  # its folder is where the commands find their state
        self.bin.mkdir(parents=True)
        self.conf.write_text("ClusterName=fake\n")
        source = Path(__file__).with_name("tool.py").read_text()
        for tool in tools:
            # The same interpreter without its site: quick, and no shim of the tester's PATH adds variables.
            (self.bin / tool).write_text(f"#!{sys.executable} -IS\n{source}")
            (self.bin / tool).chmod(0o755)
        self._root = root
        self._write("jobs", [])

    def plan(self, tool: str, *words: dict[str, Any]) -> None:
        """What the next calls of this command do, one word each."""
        self._write(f"plan-{tool}", list(words))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Every call so far: tool, argv, environment, start time."""
        path = self._root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def count(self, tool: str) -> int:
        return sum(call["tool"] == tool for call in self.calls)

    @property
    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self._root / "jobs.json").read_text())
        return found

    def set_jobs(self, jobs: list[dict[str, Any]]) -> None:
        """Replaces the queue; each job needs id, name, comment, state."""
        self._write("jobs", jobs)

    def change(self, job_id: str, **fields: Any) -> None:
        self.set_jobs([job | fields if job["id"] == job_id else job for job in self.jobs])

    def forget(self, job_id: str) -> None:
        """As slurmctld does with an ended job after MinJobAge; accounting keeps it."""
        self.change(job_id, forgotten=True)

    def set_answers(self, tool: str, text: str) -> None:
        """What scontrol or sacctmgr print."""
        self._write(f"answer-{tool}", text)

    def _write(self, name: str, value: Any) -> None:
        (self._root / f"{name}.json").write_text(json.dumps(value))
