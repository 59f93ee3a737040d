"""A trainer with a session that sleeps instead of training: the processes around it are the real ones."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from broker.protocol.config import WorkerConfig
from broker.protocol.errors import ConfigError
from broker.protocol.messages import Assign, Ended, Profile, Progress, Running
from broker.protocol.states import RequestState
from tuner.trainer import main

STEP_S = 0.005


class FakeSession:
    """`model` says how it loads: "fake", "unloadable", "crash"; `job_name` "crash" kills the trainer at its step."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.assigned: dict[int, Assign] = {}
        self.done: dict[int, int] = {}

    @property
    def resident_models(self) -> list[str]:
        return [self.config.model]

    def load(self) -> dict[str, float]:
        if self.config.model == "unloadable":
            raise ConfigError("no model here", "look elsewhere")
        if self.config.model == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        gate = Path(self.config.model_path)
        while not gate.exists():  # the test opens it; the supervisor ends us if the test fails
            time.sleep(STEP_S)
        return {"imports": 0.1, "read": 0.2, "to_device": 0.3}

    def first_step(self) -> float:
        return 0.2

    def warm_up(self) -> tuple[float, Profile]:
        return 0.4, Profile(base_s=time.monotonic(), per_request_s=STEP_S)

    @property
    def busy(self) -> bool:
        return bool(self.assigned)

    def join(self, assign: Assign) -> None:
        self.assigned[assign.request_id] = assign
        self.done[assign.request_id] = 0

    def stop(self, request_id: int, attempt: int) -> None:
        self.assigned.pop(request_id, None)

    def step(self) -> list[Progress | Ended]:
        time.sleep(STEP_S)
        said: list[Progress | Ended] = []
        for request_id, assign in list(self.assigned.items()):
            if assign.spec.job_name == "crash":
                raise MemoryError("not the request's own fault")
            self.done[request_id] += 1
            step, attempt = self.done[request_id], assign.attempt
            start = "random" if step == 1 else ""
            said.append(Progress(epoch=0, request_id=request_id, attempt=attempt, step=step, loss=1.0, start=start))
            if step >= assign.spec.max_steps:
                del self.assigned[request_id]
                files = {"adapter.bin": assign.train}
                state = RequestState.COMPLETED
                said.append(Ended(epoch=0, request_id=request_id, attempt=attempt, state=state, step=step, files=files))
        return said

    def give_back(self) -> list[Running]:
        Path(self.config.checkpoint_dir, "given_back").touch()
        back = [Running(request_id=assign.request_id, attempt=assign.attempt) for assign in self.assigned.values()]
        self.assigned.clear()
        return back


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], FakeSession, lambda config: None))
