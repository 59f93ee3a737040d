"""What can be told about a site file before the broker starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from broker.protocol.errors import ConfigError
from slurm_plugin.check import check_site, render_pool
from slurm_plugin.site import load_site
from tests.fake_slurm import FakeSlurm

Write = Callable[..., Path]
PARTITIONS = "PartitionName=gpu State=UP AllowGroups=ALL\nPartitionName=old State=DOWN AllowGroups=root,nosuchgroup\n"
SETTINGS = "ClusterName = fake\nGresTypes = gpu,shard\n"


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm")


@pytest.fixture
def write(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.setenv("PROMPTTUNER_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")

    def write(pools: str, extra: str = "") -> Path:
        path = tmp_path / "site.toml"
        path.write_text(
            f'backend = "slurm"\n{extra}[models.tiny]\npath = "{tmp_path}/model"\n{pools}\n'
            '[broker]\nworker_listen = "tcp://127.0.0.1:0"\n'
            f'[slurm]\nconf = "{slurm.conf}"\nbin_dir = "{slurm.bin}"\ncalls_per_s = 100.0\n'
        )
        return path

    return write


def pool(name: str, **fields: str) -> str:
    return f'[pools.{name}]\nmodel = "tiny"\n' + "".join(f'{key} = "{value}"\n' for key, value in fields.items())


def plan_scontrol(slurm: FakeSlurm) -> None:
    slurm.plan("scontrol", {"stdout": SETTINGS}, {"stdout": PARTITIONS})


def test_a_good_site_has_no_findings_and_submits_nothing(slurm: FakeSlurm, write: Write) -> None:
    plan_scontrol(slurm)
    assert check_site(write(pool("small", partition="gpu"))) == []
    assert slurm.jobs == []
    assert [call["argv"] for call in slurm.calls if call["tool"] == "sbatch"] == [["--test-only"]]


def test_all_that_slurm_has_to_say_is_told_with_the_pools_line(slurm: FakeSlurm, write: Write) -> None:
    plan_scontrol(slurm)
    refusal = "allocation failure: Invalid account or account/partition combination specified\n"
    slurm.plan("sbatch", {"stderr": refusal, "code": 1})
    pools = (
        pool("a", partition="nosuch")
        + pool("b", partition="gpu", gres="fpga:1")
        + pool("c", partition="gpu", account="x")
        + pool("d", partition="old")
    )
    path = write(pools)
    lines = path.read_text().splitlines()
    found = {lines[finding.line - 1]: finding for finding in check_site(path)}
    assert "no partition nosuch" in found["[pools.a]"].what
    assert "gpu, old" in found["[pools.a]"].remedy
    assert "no GRES of type fpga" in found["[pools.b]"].what
    assert "Invalid account" in found["[pools.c]"].what
    assert found["[pools.d]"].severity == "warning"
    assert slurm.jobs == []


def test_a_silent_slurm_is_one_finding(slurm: FakeSlurm, write: Write) -> None:
    down = {"stderr": "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)\n", "code": 1}
    slurm.plan("scontrol", *[down] * 3)
    (finding,) = check_site(write(pool("small", partition="gpu")))
    assert "does not answer" in finding.what


def test_mistakes_of_the_file_are_told_without_asking_slurm(slurm: FakeSlurm, write: Write) -> None:
    findings = check_site(write(pool("small", partition="gpu"), "clster = 1\n"))
    assert [finding.line for finding in findings] == [2]
    assert slurm.calls == []


def test_a_folder_that_cannot_be_written_is_told(
    slurm: FakeSlurm, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    plan_scontrol(slurm)
    whats = [finding.what for finding in check_site(write(pool("small", partition="gpu")))]
    assert sum("cannot write" in what for what in whats) == 3


def test_rendering_shows_what_would_be_submitted(slurm: FakeSlurm, write: Write) -> None:
    script = render_pool(load_site(write(pool("small", partition="gpu", account="teama"))), "small")
    assert "#SBATCH --partition=gpu\n" in script
    assert "#SBATCH --account=teama\n" in script
    assert slurm.calls == []


def test_rendering_an_unknown_pool_names_the_known_ones(write: Write) -> None:
    with pytest.raises(ConfigError, match="nosuch") as caught:
        render_pool(load_site(write(pool("small", partition="gpu"))), "nosuch")
    assert "small" in caught.value.hint


def test_a_check_by_another_than_the_service_user_says_so(slurm: FakeSlurm, write: Write) -> None:
    plan_scontrol(slurm)
    path = write(pool("small", partition="gpu"))
    path.write_text(path.read_text().replace("[broker]\n", '[broker]\nuser = "daemon"\n'))
    (finding,) = check_site(path)
    assert (finding.severity, finding.remedy) == ("warning", "run it as daemon")
    assert path.read_text().splitlines()[finding.line - 1] == 'user = "daemon"'
