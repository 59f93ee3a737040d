"""Reading Slurm's text: whole, cut, broken, foreign."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.errors import SlurmUnavailable
from slurm_plugin.slurm import parse

LINE = "pt1|57|RUNNING|None|node1|2026-11-20T09:23:12|2026-11-21T09:23:12|pt-a-1-x|prompttuner cluster=lab pool=a|pt1\n"


def test_a_whole_line_becomes_a_row_with_times_in_utc() -> None:
    (row,) = parse.queue_rows(LINE)
    assert (row.job_id, row.state, row.node, row.name) == ("57", "RUNNING", "node1", "pt-a-1-x")
    assert row.comment == "prompttuner cluster=lab pool=a"
    assert row.start_unix_s == 1795166592.0
    assert row.end_unix_s - row.start_unix_s == 86400.0


def test_an_empty_queue_is_an_answer() -> None:
    assert parse.queue_rows("") == []


@given(st.integers(1, len(LINE) * 2 - 1))
def test_a_cut_listing_is_unknown_not_gone(length: int) -> None:
    text = (LINE * 2)[:length]
    if length == len(LINE):  # cut exactly between two lines: nothing can tell
        assert len(parse.queue_rows(text)) == 1
    else:
        with pytest.raises(SlurmUnavailable):
            parse.queue_rows(text)


def test_foreign_lines_and_line_breaks_in_comments_hide_no_job() -> None:
    stray = "pt1|58|RUNNING|None|n|N/A|N/A|x|two\nlines|pt1\nslurm_load_jobs warning\n|||\n"
    assert [row.job_id for row in parse.queue_rows(stray + LINE)] == ["57"]


def test_a_delimiter_in_a_foreign_comment_stays_in_the_comment() -> None:
    (row,) = parse.queue_rows("pt1|9|PENDING|Priority||N/A|N/A|mine|a|b|pt1\n")
    assert (row.name, row.comment, row.start_unix_s) == ("mine", "a|b", 0.0)


def test_bytes_that_are_not_utf8_break_nothing() -> None:
    text = parse.decode(b"pt1|9|PENDING|None||N/A|N/A|\xff\xfe|\xc3|pt1\n" + LINE.encode())
    assert [row.job_id for row in parse.queue_rows(text)] == ["9", "57"]


@given(st.text())
def test_no_text_at_all_raises_anything_but_unavailable(text: str) -> None:
    with contextlib.suppress(SlurmUnavailable):
        parse.queue_rows(text)
    parse.history_rows(text)
    parse.submitted_id(text)
    parse.tres(text)
    parse.settings(text)
    list(parse.records(text))


def test_history_keeps_the_first_word_of_a_state_and_takes_names_with_delimiters() -> None:
    text = (
        "57|CANCELLED by 1001|0:15|2026-11-20T09:23:12|2026-11-20T09:24:12|node1|pt-a|b\n"
        "58|COMPLETED|0:0|Unknown|None\n"
        "59.batch|COMPLETED|0:0|Unknown|Unknown|n|batch\n"
        "60||0:0|Unknown|Unknown|None assigned|x\n"
    )
    (row,) = parse.history_rows(text)
    assert (row.job_id, row.state, row.name) == ("57", "CANCELLED", "pt-a|b")
    assert row.end_unix_s - row.start_unix_s == 60.0


@pytest.mark.parametrize(
    ("text", "job_id"),
    [("57\n", "57"), ("57;lab\n", "57"), ("warning: x\n57\n", "57"), ("", None), ("Submitted", None), ("5 7\n", None)],
)
def test_the_id_of_a_submission(text: str, job_id: str | None) -> None:
    assert parse.submitted_id(text) == job_id


@pytest.mark.parametrize("text", ["Unknown", "None", "N/A", "", "2026-13-40T00:00:00", "soon"])
def test_what_is_no_time_is_zero(text: str) -> None:
    assert parse.unix_s(text) == 0.0


def test_trackable_resources_count_untyped_and_typed_gpus_apart() -> None:
    found = parse.tres("billing=1,cpu=4,gres/gpu:h100=2,gres/gpu=2,mem=2G,node=1,junk,=3")
    assert found == {"billing": 1, "cpu": 4, "gres/gpu:h100": 2, "gres/gpu": 2, "mem": 2048, "node": 1}
    assert parse.tres("") == {}
    assert parse.tres("mem=400M") == {"mem": 400}


def test_records_of_scontrol_with_spaces_in_values() -> None:
    (found,) = parse.records("PartitionName=normal State=UP Reason=a b c Nodes=node[1-4]\n")
    assert found == {"PartitionName": "normal", "State": "UP", "Reason": "a b c", "Nodes": "node[1-4]"}


def test_settings_of_scontrol() -> None:
    text = (
        "Configuration data as of 2026\nClusterName             = lab\nAccountingStorageEnforce = associations,limits\n"
    )
    assert parse.settings(text) == {"ClusterName": "lab", "AccountingStorageEnforce": "associations,limits"}
