"""What a failed Slurm command means: refused for good, not reached, or nobody knows. One table, matched in order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from broker.protocol.errors import SlurmError, SlurmRejected, SlurmUnavailable, SlurmUnknown

# The request left this host and no answer came back: a submission may have been accepted.
_UNANSWERED = (
    r"Socket timed out on send/recv operation",
    r"Zero Bytes were transmitted or received",
    r"Message (?:send|receive) failure",
    r"Unexpected message received",
    r"Connection reset by peer",
    r"Transport endpoint is not connected",
    r"Unspecified communication error",
)
# It never arrived, or was turned away for the moment.
_UNAVAILABLE = (
    r"Unable to contact slurm controller",
    r"Unable to establish (?:controller|control) ",
    r"Connection refused",
    r"Connection timed out",
    r"No route to host",
    r"Slurm backup controller in standby mode",
    r"Slurm temporarily unable to accept job",
    r"Resource temporarily unavailable",
    r"maximum job count reached",
    r"RPC (?:rate )?limit",
    r"Problem talking to the database",
    r"(?:Unable|Failed) to (?:open|connect to) (?:slurmdbd|the? ?database)",
    r"Munge (?:en|de)code failed",
    r"Protocol authentication error",
    r"Slurm(?:ctld| controller).*(?:starting|shutting down)",
)
# Slurm understood, and said no.
_REJECTED = (
    r"Batch job submission failed:",
    r"allocation failure:",
    r"(?:[Ii]nvalid|[Uu]nrecognized|[Uu]nable to parse|[Ii]llegal|requires an argument)",
    r"Access/permission denied",
    r"This does not look like a batch script",
    r"DOS line breaks",
    r"violates accounting/QOS policy",
    r"You must (?:be|have|specify)",
    r"Only administrators",
    r"Could not establish a configuration source",
)


def failure(command: str, return_code: int | None, stderr: str, *, changes: bool) -> SlurmError:
    """The error for a call of `command` that failed; `return_code` None means that it ran into its time limit.

    `changes` tells whether the call would change anything: one that does and whose answer is missing is SlurmUnknown,
    one that only asks is SlurmUnavailable, since it can simply be asked again."""
    said = last_words(stderr) or ("no answer in time" if return_code is None else f"exit code {return_code}")
    message = f"{command}: {said}"
    unknown = SlurmUnknown(message, "it may have been done all the same: it is looked up before it is tried again")
    unavailable = SlurmUnavailable(message, "Slurm is asked again later; if this lasts, run: scontrol ping")
    if return_code is None or return_code < 0 or _matches(_UNANSWERED, stderr):
        return unknown if changes else unavailable
    if _matches(_UNAVAILABLE, stderr):
        return unavailable
    if _matches(_REJECTED, stderr):
        return SlurmRejected(
            message, "Slurm will not do this as it is asked: correct the pool, or ask the site's admins"
        )
    return unknown if changes else unavailable


def last_words(stderr: str) -> str:
    """The line of an error output that says most, without control characters, at most 300 characters."""
    lines = [re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", line.strip()) for line in stderr.splitlines()]
    lines = [re.sub(r"^s[a-z]+: (?:error|fatal): ", "", line) for line in lines if line]
    telling = [line for line in lines if _matches((*_UNANSWERED, *_UNAVAILABLE, *_REJECTED), line)]
    return (telling or lines or [""])[-1][:300]


def _matches(patterns: Sequence[str], text: str) -> bool:
    return any(re.search(pattern, text) for pattern in patterns)
