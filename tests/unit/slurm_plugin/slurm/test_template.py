"""Job scripts: what a pool says and nothing else, whatever its values hold."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.allocations import AllocationOrder
from broker.protocol.config import Duration, PoolConfig
from broker.protocol.errors import ConfigError
from slurm_plugin.slurm.template import TEMPLATE, Launch, comment_of, pool_of, render

REPO = Path(__file__).resolve().parents[4]
SHIPPED = (REPO / "job_templates" / TEMPLATE).read_text()
LAUNCH = Launch(cluster="lab", python="/opt/pt/bin/python", srun="/usr/bin/srun", template_dir=REPO / "job_templates")
ORDER = AllocationOrder(
    name="pt-small-1-x",
    pool_name="small",
    pool=PoolConfig(model="tiny", partition="gpu"),
    worker_file=Path("/spool/pt-small-1-x/worker.json"),
    log_file=Path("/spool/pt-small-1-x/worker.log"),
)
# Sixty values that would do something if they were pasted into a script, an option, or a template.
HOSTILE = [
    *("{{7*7}}", "{% import os %}", "{{ ''.__class__.__mro__ }}", "{# x #}", "{{ name }}", "{%raw%}"),
    *("a\n#SBATCH --uid=0", "a\r\n#SBATCH --uid=0", "a\r#SBATCH --uid=0", "a\n", "\na", "a\n\nrm /", "a\x0b#SBATCH"),
    *("a\x0c#SBATCH --x", "a\x85#SBATCH --x", "a\u2028#SBATCH --x", "a\u2029#SBATCH --x", "a\x00b", "a\tb", "a\x1b[3m"),
    *("$(id)", "`id`", "${HOME}", "$HOME", "$((1+1))", "a$(touch /tmp/x)", "<(id)", "!!", "a;id", "a; rm -rf /"),
    *("a'b", "a' --uid=0 '", 'a"b', 'a" --uid=0 "', "'", '"', "a\\", "\\n", "a\\\nb", "a b", " a", "a ", ""),
    *("-x", "--wrap=id", "-p scavenge", "--uid=0", "a --uid=0", "a #SBATCH --uid=0", "#SBATCH --uid=0", "#"),
    *("a>b", "a<b", ">/etc/passwd", "~root", "a^b", "a?b", "é", "a\u202eb", "ａ", "a" * 300, "{}", "a{b,c}"),
]  # fmt: skip
FIELDS = ("partition", "account", "qos", "gres", "constraint", "reservation")


def order(**pool: object) -> AllocationOrder:
    return msgspec.structs.replace(ORDER, pool=msgspec.structs.replace(ORDER.pool, **pool))


def options(script: str) -> dict[str, str]:
    """The options as sbatch reads them."""
    lines = [shlex.split(line)[1:] for line in script.split("\n") if line.startswith("#SBATCH")]
    assert all(len(words) == 1 for words in lines)
    return dict(words[0].partition("=")[::2] for words in lines)


def test_the_list_of_hostile_values_is_long_enough() -> None:
    assert len(set(HOSTILE)) >= 60


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_hostile_value_is_refused_in_every_field_of_a_pool(value: str) -> None:
    for field in FIELDS:
        if value == "" and field != "partition":
            continue  # an option that is not set
        with pytest.raises(ConfigError, match=field):
            render(order(**{field: value}), LAUNCH)


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_hostile_value_is_refused_by_the_site_files_types_too(value: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"model": "tiny", "partition": value, "account": value}, PoolConfig)


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_hostile_name_is_refused(value: str) -> None:
    for changed in (
        msgspec.structs.replace(ORDER, name=value),
        msgspec.structs.replace(ORDER, pool_name=value),
    ):
        with pytest.raises(ConfigError):
            render(changed, LAUNCH)
    with pytest.raises(ConfigError):
        render(ORDER, msgspec.structs.replace(LAUNCH, cluster=value))


# Spaces, tildes and dashes inside an absolute path are only a name.
HARMLESS_IN_PATHS = re.compile(r"[A-Za-z0-9 ~=#-]*")


@pytest.mark.parametrize(
    "value", [value for value in HOSTILE if "#" in value or not HARMLESS_IN_PATHS.fullmatch(value)], ids=ascii
)
@pytest.mark.parametrize("field", ["log_file", "worker_file"])
def test_a_hostile_path_is_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=field):
        render(msgspec.structs.replace(ORDER, **{field: Path("/spool") / f"x{value}"}), LAUNCH)


@pytest.mark.parametrize("log_file", ["/spool/%j.log", "relative.log", "/spool/\\n.log"])
def test_a_log_path_that_slurm_would_rewrite_is_refused(log_file: str) -> None:
    with pytest.raises(ConfigError, match="log_file"):
        render(msgspec.structs.replace(ORDER, log_file=Path(log_file)), LAUNCH)


@given(st.sampled_from(FIELDS), st.text(max_size=40))
def test_no_text_becomes_anything_but_the_value_of_its_own_option(field: str, text: str) -> None:
    plain = options(render(ORDER, LAUNCH))
    try:
        script = render(order(**{field: text}), LAUNCH)
    except ConfigError:
        return
    expected = plain | ({f"--{field}": text} if text else {})
    assert options(script) == expected
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_every_setting_of_a_pool_becomes_its_option() -> None:
    pool = PoolConfig(
        model="tiny",
        partition="gpu,scavenge",
        account="teama",
        qos="high",
        gres="gpu:h100:2",
        cpus_per_worker=8,
        mem_mb=2048,
        constraint="[a|b]&c",
        reservation="maint",
        time_limit=Duration(90061),
    )
    found = options(render(msgspec.structs.replace(ORDER, pool=pool), LAUNCH))
    assert found == {
        "--job-name": "pt-small-1-x",
        "--comment": "prompttuner cluster=lab pool=small",
        "--output": "/spool/pt-small-1-x/worker.log",
        "--open-mode": "append",
        "--partition": "gpu,scavenge",
        "--account": "teama",
        "--qos": "high",
        "--gres": "gpu:h100:2",
        "--mem": "2048M",
        "--constraint": "[a|b]&c",
        "--reservation": "maint",
        "--nodes": "1",
        "--ntasks": "1",
        "--cpus-per-task": "8",
        "--time": "1-01:02:00",  # whole minutes, rounded up
        "--signal": "B:USR1@120",
        "--no-requeue": "",
        "--export": "ALL",
    }


def test_a_pool_without_gpus_asks_for_none_and_an_endless_one_says_so() -> None:
    found = options(render(order(gpus_per_worker=0, time_limit=Duration("inf")), LAUNCH))
    assert "--gres" not in found
    assert found["--time"] == "UNLIMITED"


def test_the_script_is_valid_shell_with_spaces_in_paths() -> None:
    spaced = msgspec.structs.replace(ORDER, worker_file=Path("/my spool/worker.json"))
    script = render(spaced, msgspec.structs.replace(LAUNCH, slurm_conf="/etc/my slurm/slurm.conf"))
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    assert "-I -m tuner.worker '/my spool/worker.json'" in script


def test_the_tag_is_recognised_only_as_a_whole_and_of_this_cluster() -> None:
    assert pool_of(comment_of("lab", "small"), "lab") == "small"
    for foreign in (
        "",
        "prompttuner",
        comment_of("other", "small"),
        comment_of("lab", "small") + " x",
        "x" + comment_of("lab", "s"),
    ):
        assert pool_of(foreign, "lab") is None


def site_template(folder: Path, text: str) -> Launch:
    (folder / TEMPLATE).write_text(text)
    return msgspec.structs.replace(LAUNCH, template_dir=folder)


def test_a_site_may_add_options_that_it_writes_out(tmp_path: Path) -> None:
    text = SHIPPED.replace("#SBATCH --nodes=1\n", "#SBATCH --nodes=1\n#SBATCH --exclusive\n#SBATCH --licenses=a:1\n")
    assert "#SBATCH --exclusive\n" in render(ORDER, site_template(tmp_path, text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("#!/bin/bash\n", "", ":1: .*#!"),
        ("#SBATCH --nodes=1", "#SBATCH --uid=0", "not what the pool says"),
        ("#SBATCH --nodes=1", "#SBATCH --partition=other", "twice"),
        ("--partition={{ partition }}", "--partition=other", "not what the pool says"),
        ("#SBATCH --partition={{ partition }}\n", "", "no #SBATCH line for --partition"),
        ("#SBATCH --nodes=1", "#SBATCH --nodelist={{ name }}", "was not meant"),
        ("#SBATCH --nodes=1", "#SBATCH -N 1", "--option=value"),
        ("#SBATCH --nodes=1", "#SBATCH --nodes=1 --uid=0", "--option=value"),
        ("#SBATCH --nodes=1", "#SBATCH --comment='a", "No closing quotation"),
        ("#SBATCH --nodes=1", "#PBS -l nodes=1", "#PBS lines too"),
        ("#SBATCH --nodes=1", "#BSUB -n 1", "#BSUB lines too"),
        ("set -u\n", "set -u\n#SBATCH --nice=1\n", "after the first command"),
        ("set -u\n", "set -u\x0b\n", "control characters"),
        ("{{ cpus }}", "{{ cpsu }}", "cpsu"),
        ("{{ cpus }}", "{{ cpus", r"warm_worker\.sbatch\.j2:\d+"),
        ("{{ cpus }}", "{{ cpus.__class__ }}", "__class__"),
        ("{{ cpus }}", "{{ [1, 2] }}", "not list"),
        ("{{ cpus }}", "{{ 1 / 0 }}", "division by zero"),
        ("{{ cpus }}", "{% include '../../etc/passwd' %}", "passwd"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_with_its_path(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SHIPPED
    (tmp_path / TEMPLATE).write_text(SHIPPED.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        render(ORDER, msgspec.structs.replace(LAUNCH, template_dir=tmp_path))
    assert str(tmp_path / TEMPLATE) in caught.value.message
    assert caught.value.hint


def test_a_template_with_dos_line_ends_makes_a_script_without(tmp_path: Path) -> None:
    (tmp_path / TEMPLATE).write_bytes(SHIPPED.replace("\n", "\r\n").encode())
    assert render(ORDER, msgspec.structs.replace(LAUNCH, template_dir=tmp_path)) == render(ORDER, LAUNCH)


def test_a_missing_template_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        render(ORDER, msgspec.structs.replace(LAUNCH, template_dir=tmp_path))


def test_every_variable_is_in_the_readme() -> None:
    import jinja2.meta
    from jinja2 import Environment

    used = jinja2.meta.find_undeclared_variables(Environment().parse(SHIPPED))
    readme = (REPO / "job_templates" / "README.md").read_text()
    assert {name for name in used if f"`{name}`" not in readme} == set()
