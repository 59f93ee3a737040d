"""What Slurm's own words mean. The texts are what Slurm 22.05 to 26.05 print."""

from __future__ import annotations

import pytest

from broker.protocol.errors import SlurmError, SlurmRejected, SlurmUnavailable, SlurmUnknown
from slurm_plugin.slurm.failures import failure

REJECTED = [
    "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
    "sbatch: error: invalid partition specified: nosuch\n"
    "sbatch: error: Batch job submission failed: Invalid partition name specified",
    "sbatch: error: Batch job submission failed: Invalid qos specification",
    "sbatch: error: Batch job submission failed: Requested node configuration is not available",
    "sbatch: error: Batch job submission failed: Requested reservation is invalid",
    "sbatch: error: QOSMaxGRESPerUser\n"
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size "
    "and/or time limits)",
    "sbatch: error: job_submit: comment says reject\nsbatch: error: Batch job submission failed: Unspecified error",
    "allocation failure: Requested node configuration is not available",
    "sbatch: unrecognized option '--nosuch'\nTry \"sbatch --help\" for more information",
    "sbatch: error: Batch script contains DOS line breaks (\\r\\n)",
    "sbatch: error: This does not look like a batch script.",
    "scancel: error: Kill job error on job id 7: Access/permission denied",
    "squeue: fatal: Could not establish a configuration source",
]
UNAVAILABLE = [
    "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
    "sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection to host:localhost:6819: "
    "Connection refused\nsacct: error: Problem talking to the database: Connection refused",
    'sbatch: error: Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file or directory',
    "squeue: error: Slurm backup controller in standby mode",
]
UNANSWERED = [
    "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
    "slurm_load_jobs error: Socket timed out on send/recv operation",
]


@pytest.mark.parametrize("text", REJECTED)
@pytest.mark.parametrize("changes", [True, False])
def test_what_slurm_refuses_is_not_tried_again(text: str, changes: bool) -> None:
    assert type(failure("sbatch", 1, text, changes=changes)) is SlurmRejected


@pytest.mark.parametrize("text", UNAVAILABLE)
@pytest.mark.parametrize("changes", [True, False])
def test_what_never_arrived_may_be_tried_again(text: str, changes: bool) -> None:
    assert type(failure("sbatch", 1, text, changes=changes)) is SlurmUnavailable


@pytest.mark.parametrize("text", UNANSWERED)
def test_a_submission_without_an_answer_may_have_happened(text: str) -> None:
    assert type(failure("sbatch", 1, text, changes=True)) is SlurmUnknown


@pytest.mark.parametrize("text", UNANSWERED)
def test_a_question_without_an_answer_may_be_asked_again(text: str) -> None:
    assert type(failure("squeue", 1, text, changes=False)) is SlurmUnavailable


@pytest.mark.parametrize("code", [None, -9, 1, 127])
def test_a_silent_failure_of_a_submission_is_unknown_and_of_a_question_unavailable(code: int | None) -> None:
    assert type(failure("sbatch", code, "", changes=True)) is SlurmUnknown
    assert type(failure("squeue", code, "", changes=False)) is SlurmUnavailable


def test_the_message_says_command_and_cause_and_no_control_characters() -> None:
    error: SlurmError = failure("sbatch", 1, "sbatch: error: \x1b[31mInvalid qos\x07 specification\n\n", changes=True)
    assert error.message == "sbatch: ?[31mInvalid qos? specification"
    assert error.hint
    assert len(failure("sbatch", 1, "x" * 10_000, changes=True).message) < 400
