"""A site file: what is right is read, and everything wrong is told at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from broker.protocol.config import SiteConfig
from broker.protocol.errors import ConfigError
from slurm_plugin.site import default_site, load_site, read_site

REPO = Path(__file__).resolve().parents[3]
POOL = '[models.tiny]\npath = "/m"\n[pools.small]\nmodel = "tiny"\n'

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.setenv("PROMPTTUNER_STATE_DIR", str(tmp_path / "state"))

    def write(text: str) -> Path:
        path = tmp_path / "site.toml"
        path.write_text(text)
        return path

    return write


def told(path: Path) -> list[tuple[int, str, str]]:
    return [(finding.line, finding.what, finding.remedy) for finding in read_site(path)[1]]


def test_a_personal_site_needs_no_more_than_a_model_and_a_pool(write: Write, tmp_path: Path) -> None:
    site = load_site(write(POOL))
    assert (site.mode, site.backend) == ("personal", "local")
    assert site.paths.spool == str(tmp_path / "state/spool")
    assert site.paths.bank == str(tmp_path / "state/bank")
    assert site.broker.state_dir == str(tmp_path / "state")


def test_the_empty_file_is_a_site_without_pools(write: Write) -> None:
    assert load_site(write("")).pools == {}


def test_durations_are_strings_in_slurms_forms_or_with_units(write: Write) -> None:
    site = load_site(write(POOL + 'time_limit = "1-12"\nidle_window = "30"\n[limits]\nheartbeat = "2s"\n'))
    pool = site.pools["small"]
    assert (pool.time_limit, pool.idle_window, site.limits.heartbeat) == (36 * 3600.0, 1800.0, 2.0)


def test_all_mistakes_are_told_at_once_with_their_lines(write: Write) -> None:
    text = """\
cluster = "a b"
mod = "site"
calls_per_s = 3
[models.tiny]
path = 3
[pools.small]
max_workers = "x"   # the value, not the key
time_limit = 30
partition = "--wrap=x"
[pools."two"]
model = "huge"
[pools.three]
model = "tiny"
min_workers = 3
max_workers = 2
[limits]
worker_timeout = "10s"
[brokr]
"""
    expected = [
        (1, 'cluster = "a b"', "letters, digits, _ and -"),
        (2, "unknown key mod", "did you mean mode?"),
        (3, "unknown key calls_per_s", "under [slurm]"),
        (5, "models.tiny.path = 3", "expected str, got int"),
        (6, "pools.small.model is missing", "no default"),
        (7, 'pools.small.max_workers = "x"', "expected int, got str"),
        (8, "pools.small.time_limit = 30", '"90s"'),
        (9, 'pools.small.partition = "--wrap=x"', "not starting with -"),
        (11, 'pools.two.model = "huge"', "known: tiny"),
        (14, "min_workers = 3 is more than max_workers = 2", "raise max_workers"),
        (17, "less than four heartbeats", "20s or more"),
        (18, "unknown key brokr", "did you mean broker?"),
    ]
    findings = told(write(text))
    assert [line for line, _, _ in findings] == [line for line, _, _ in expected]
    for (_, what, remedy), (_, part, hint) in zip(findings, expected, strict=True):
        assert part in what
        assert hint in remedy


def test_loading_raises_one_error_with_every_mistake_and_its_place(write: Write) -> None:
    path = write('mod = 1\ncluster = ""\n')
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    assert "2 mistakes" in caught.value.message
    assert f"{path}:1: unknown key mod (" in caught.value.message
    assert f"{path}:2: cluster" in caught.value.message
    assert "ptctl check" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[broker\n", "not TOML"),
        ("a = 1\na = 2\n", "not TOML"),
        ('mode = "cluster"\n', "mode"),
        ('backend = "pbs"\n', "backend"),
        ("accounts = 'a'\n", "accounts"),
        ('accounts = ["a b"]\n', "accounts"),
        ('cluster = "a\\n"\n', "cluster"),
        ("models = 3\n", "models = 3"),
        ("[pools]\nsmall = 3\n", "pools.small = 3"),
        ('[models."a b"]\npath = "/m"\n', "no name"),
        (POOL + "max_workers = 0\n", "max_workers = 0"),
        (POOL + "max_workers = -1\n", "max_workers = -1"),
        (POOL + "max_workers = 1000000\n", "max_workers"),
        (POOL + "max_workers = 1.5\n", "max_workers = 1.5"),
        (POOL + "max_workers = true\n", "max_workers"),
        (POOL + "slots = 0\n", "slots"),
        (POOL + "gpus_per_worker = -1\n", "gpus_per_worker"),
        (POOL + 'time_limit = "0s"\n', "too short"),
        (POOL + 'time_limit = "-5"\n', "time_limit"),
        (POOL + 'time_limit = "soon"\n', "time_limit"),
        (POOL + 'account = "-A"\n', "account"),
        (POOL + 'qos = ""\n', "qos"),
        (POOL + 'gres = "gpu:1\\n#SBATCH --uid=0"\n', "gres"),
        ('[limits]\nheartbeat = "0s"\n', "heartbeat"),
        ('[limits]\norphan_timeout = "UNLIMITED"\n', "orphan_timeout"),
        ('[limits]\nworker_timeout = "19s"\n', "four heartbeats"),
        ("[limits]\nrows = 0\n", "rows"),
        ("[slurm]\ncalls_per_s = 0\n", "calls_per_s"),
        ("[slurm]\ncalls_per_s = -1\n", "calls_per_s"),
        ("[slurm]\ncalls_per_s = nan\n", "calls_per_s"),
        ("[slurm]\nburst = 0\n", "burst"),
        ('[slurm]\ntimeout = "0s"\n', "timeout"),
        ('[broker]\nlisten = "0.0.0.0:1"\n', "tcp://HOST:PORT"),
        ('[broker]\nlisten = "ipc:///tmp/x"\n', "tcp://HOST:PORT"),
        ('[broker]\npublic_key = "short"\n', "CURVE"),
        ('[broker]\nlog_level = "LOUD"\n', "log_level"),
        ('[broker]\nsecret_key_file = "key"\n', "absolute"),
        ('[paths]\nspool = "spool"\n', "absolute"),
    ],
    ids=ascii,
)  # fmt: skip
def test_a_mistake_is_told(write: Write, text: str, part: str) -> None:
    findings = told(write(text))
    assert any(part in what or part in remedy for _, what, remedy in findings), findings
    assert all(remedy for _, _, remedy in findings)
    with pytest.raises(ConfigError):
        load_site(write(text))


def test_a_service_needs_addresses_keys_and_shared_folders(write: Write) -> None:
    needs = [
        "broker.listen",
        "broker.worker_listen",
        "broker.public_key",
        "broker.secret_key_file",
        "paths.spool",
        "paths.bank",
    ]
    findings = told(write('mode = "site"\n'))
    assert sorted(what.split()[0] for _, what, _ in findings) == sorted(needs)


def test_a_personal_broker_on_slurm_has_defaults_for_everything(write: Write) -> None:
    assert load_site(write('backend = "slurm"\n' + POOL)).backend == "slurm"


def test_control_characters_of_a_value_do_not_reach_the_terminal(write: Write) -> None:
    (finding,) = told(write('cluster = "\\u001b[31mred"\n'))
    assert "\x1b" not in finding[1]


def test_a_file_that_anyone_may_write_is_refused(write: Write) -> None:
    path = write(POOL)
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="anyone may write"):
        load_site(path)


def test_files_that_are_no_site_files_are_refused(tmp_path: Path) -> None:
    cases = {"a directory": tmp_path, "missing": tmp_path / "nowhere", "a device": Path("/dev/zero")}
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "huge").write_bytes(b"#" * (2 << 20))
    for path in (*cases.values(), tmp_path / "binary", tmp_path / "huge"):
        with pytest.raises(ConfigError, match=str(path)):
            load_site(path)


def test_secret_keys_are_files_of_their_owner_alone(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    path = write(f'[broker]\nsecret_key_file = "{secret}"\n')
    load_site(path)  # a login node does not look at it
    with pytest.raises(ConfigError, match="cannot be read"):
        load_site(path, service=True)
    secret.write_text("x")
    secret.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0640"):
        load_site(path, service=True)
    secret.chmod(0o600)
    load_site(path, service=True)
    real = os.geteuid()
    with monkeypatch.context() as context:
        context.setattr(os, "geteuid", lambda: real + 1)
        with pytest.raises(ConfigError, match="belongs to user id"):
            load_site(path, service=True)
    secret.rename(tmp_path / "real")
    secret.symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_site(path, service=True)


def test_model_directories_are_looked_at_only_when_asked(write: Write) -> None:
    path = write(POOL)
    load_site(path)
    with pytest.raises(ConfigError, match=r"models\.tiny\.path.*config\.json"):
        load_site(path, check_models=True)


def test_the_embedded_default_has_a_pool_for_each_model(tmp_path: Path) -> None:
    site = default_site({"tiny": "/m", "big": "/b"}, 2, tmp_path)
    assert (site.mode, site.backend, set(site.pools)) == ("personal", "local", {"tiny", "big"})
    assert (site.pools["big"].model, site.pools["big"].min_workers, site.pools["big"].max_workers) == ("big", 1, 2)
    assert site.paths.spool == str(tmp_path / "spool")


def test_the_shipped_site_files_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_site(REPO / "site_configs/minimal.toml").pools["tiny"].model == "tiny"
    assert set(load_site(REPO / "site_configs/example.toml").pools) == {"llama-8b", "small"}


def test_the_example_shows_every_key_and_every_default_that_it_names() -> None:
    import tomllib

    data = tomllib.loads((REPO / "site_configs/example.toml").read_text())
    for field in msgspec.structs.fields(SiteConfig):
        assert field.name in data
    tables = {
        **{name: data[name] for name in ("broker", "paths", "limits", "slurm")},
        "pools": data["pools"]["llama-8b"],
        "models": data["models"]["llama-8b"],
    }
    for name, kind in SiteConfig.__annotations__.items():
        del kind
        if name in tables:
            known = {field.name for field in msgspec.structs.fields(_kind(name))}
            assert set(tables[name]) == known


def _kind(name: str) -> type[msgspec.Struct]:
    from slurm_plugin import site

    return {**site._TABLES, **site._NAMED_TABLES}[name]


def test_loading_a_site_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from slurm_plugin.site import load_site; "
        f"load_site(Path({str(REPO / 'site_configs/example.toml')!r})); "
        "print(*sorted(set(sys.modules) & {'jinja2', 'tenacity', 'zmq', 'click', 'subprocess', 'difflib', 'asyncio'}))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
