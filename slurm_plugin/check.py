"""Whether a site file will work here: everything that can be told before the broker starts, all findings at once."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path

from broker.allocations import AllocationOrder
from broker.protocol.config import PoolConfig, SiteConfig
from broker.protocol.errors import ConfigError, PromptTunerError, SlurmError, SlurmRejected
from slurm_plugin.site import Finding, key_line, read_site
from slurm_plugin.slurm.client import CommandLineSlurm
from slurm_plugin.slurm.template import Launch, render

__all__ = ["Finding", "check_site", "render_pool"]


def check_site(path: Path, template_dir: Path | None = None) -> list[Finding]:
    """Everything wrong with the site file: its words, its files, and what Slurm says to the jobs that it would submit.
    Submits nothing. An empty list means that the broker would start."""
    as_service = _is_service_user(path)
    site, findings = read_site(path, service=as_service, check_models=True)
    if site is None:
        return findings
    if not as_service:
        what = (
            f"checked as {pwd.getpwuid(os.geteuid()).pw_name}: keys, folders and accounts are judged for the wrong user"
        )
        remedy = f"run it as {site.broker.user}"
        findings.append(Finding(key_line(path, "broker", "user"), what, remedy, "warning"))
    if not site.pools:
        findings.append(
            Finding(0, "there is no pool: no request could ever run", "add a table [pools.NAME]", "warning")
        )
    for table, key in (("paths", "spool"), ("paths", "bank"), ("broker", "state_dir")):
        findings += _writable(f"{table}.{key}", Path(getattr(getattr(site, table), key)))
    if site.backend == "slurm":
        findings += _check_slurm(site, path, template_dir)
    return findings


def render_pool(site: SiteConfig, pool_name: str, template_dir: Path | None = None) -> str:
    """The script that an allocation of this pool would be submitted with, under an example's name.

    Raises ConfigError: no such pool, or a template or value that cannot be used."""
    if pool_name not in site.pools:
        known = ", ".join(site.pools) or "none"
        raise ConfigError(f"no pool {pool_name!r} in the site file", f"known: {known}")
    return render(_example_order(site, pool_name), _launch(site, template_dir))


def _launch(site: SiteConfig, template_dir: Path | None, srun: str = "srun") -> Launch:
    return Launch(cluster=site.cluster, srun=srun, slurm_conf=site.slurm.conf, template_dir=template_dir)


def _example_order(site: SiteConfig, pool_name: str) -> AllocationOrder:
    name = f"pt-{pool_name}-0-example"
    folder = Path(site.paths.spool or "/nonexistent") / "allocations" / name
    return AllocationOrder(
        name=name,
        pool_name=pool_name,
        pool=site.pools[pool_name],
        worker_file=folder / "worker.json",
        log_file=folder / "worker.log",
    )


def _is_service_user(path: Path) -> bool:
    """Whether the caller is the one who will start the broker, and so can judge the files that only it may read."""
    site, _ = read_site(path)
    if site is None or site.broker.user is None:
        return True
    try:
        return pwd.getpwnam(site.broker.user).pw_uid == os.geteuid()
    except KeyError:
        return False


def _writable(key: str, path: Path) -> list[Finding]:
    there = next(place for place in (path, *path.parents) if place.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return []
    user = pwd.getpwuid(os.geteuid()).pw_name
    return [Finding(0, f"{key}: {user} cannot write {there}", f"make {path} and give it to the service user")]


def _check_slurm(site: SiteConfig, path: Path, template_dir: Path | None) -> list[Finding]:
    try:
        client = CommandLineSlurm(site.slurm)
        settings = client.settings()
        partitions = {partition.get("PartitionName", ""): partition for partition in client.partitions()}
    except ConfigError as error:
        return [Finding(0, error.message, error.hint)]
    except SlurmError as error:
        return [Finding(0, f"Slurm does not answer: {error.message}", error.hint)]
    gres_types = {name for name in settings.get("GresTypes", "").replace("(null)", "").split(",") if name}
    findings: list[Finding] = []
    for name, pool in site.pools.items():
        found = _check_partition(name, pool, partitions) + _check_gres(name, pool, gres_types)
        found = found or _check_submission(site, name, client, template_dir)
        line = key_line(path, "pools", name)
        findings += [Finding(line, one.what, one.remedy, one.severity) for one in found]
    return findings


def _check_partition(name: str, pool: PoolConfig, partitions: dict[str, dict[str, str]]) -> list[Finding]:
    findings = []
    for wanted in pool.partition.split(","):
        found = partitions.get(wanted)
        if found is None:
            known = ", ".join(partitions) or "none"
            findings.append(Finding(0, f"pools.{name}.partition: Slurm has no partition {wanted}", f"it has: {known}"))
            continue
        if found.get("State", "UP") != "UP":
            what = f"pools.{name}.partition: {wanted} is {found['State']}"
            findings.append(Finding(0, what, "its allocations will wait until it is up", "warning"))
        findings += _check_group(name, wanted, found.get("AllowGroups", "ALL"))
    return findings


def _check_group(name: str, partition: str, allowed: str) -> list[Finding]:
    if allowed in ("ALL", ""):
        return []
    mine = {os.getegid(), *os.getgroups()}
    for group in allowed.split(","):
        try:
            if grp.getgrnam(group).gr_gid in mine:
                return []
        except KeyError:
            continue
    what = f"pools.{name}.partition: {partition} lets in only the groups {allowed}"
    return [Finding(0, what, "run this as the service user, or add it to one of them", "warning")]


def _check_gres(name: str, pool: PoolConfig, known: set[str]) -> list[Finding]:
    wanted = pool.gres or (f"gpu:{pool.gpus_per_worker}" if pool.gpus_per_worker else "")
    types = {part.split(":")[0].removeprefix("gres/") for part in wanted.split(",") if part}
    return [
        Finding(
            0,
            f"pools.{name}: this cluster has no GRES of type {gres}",
            f"GresTypes: {', '.join(sorted(known)) or 'none'}; for a worker without a GPU set gpus_per_worker = 0",
        )
        for gres in sorted(types - known)
    ]


def _check_submission(
    site: SiteConfig, name: str, client: CommandLineSlurm, template_dir: Path | None
) -> list[Finding]:
    """Lets Slurm judge the very script: account, QOS, limits, GRES counts, whether this user may."""
    try:
        client.test(render(_example_order(site, name), _launch(site, template_dir, client.srun)))
    except ConfigError as error:
        return [Finding(0, f"pools.{name}: {error.message}", error.hint)]
    except SlurmRejected as error:
        return [Finding(0, f"pools.{name}: Slurm would refuse its jobs: {error.message}", error.hint)]
    except PromptTunerError as error:
        return [Finding(0, f"pools.{name}: not tested: {error.message}", error.hint, "warning")]
    return []
