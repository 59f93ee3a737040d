"""Commits one request after the other to the journal named in argv[1]; prints each id once it is acknowledged."""

import sys
from pathlib import Path

from broker.core.step import step
from broker.protocol.config import ModelConfig, PoolConfig, SiteConfig
from broker.protocol.spec import RequestSpec
from broker.state.events import Now, RequestSubmitted
from broker.state.model import State
from broker.store.journal import Batch, Journal


def main() -> None:
    journal = Journal(Path(sys.argv[1]))
    site = SiteConfig(models={"tiny": ModelConfig(path="/m")}, pools={"a": PoolConfig(model="tiny")})
    state = State(site=site, tag=journal.tag)
    journal.fill(state)
    while True:
        number = state.counters.request_id + 1
        event = RequestSubmitted(
            request_id=number,
            spec=RequestSpec(model="tiny", train=f"{number:064x}"),
            uid=1,
            user="alice",
            account="x",
            pool="a",
            submit_key=f"key-{number:020}",
        )
        step(state, event, Now(1e6 + number, 1e3 + number))
        journal.commit(Batch(events=[(1e6 + number, event)], blobs={f"{number:064x}": b"x" * 3000}), state)
        print(number, flush=True)


main()
