"""ptbatch: submits one prompt-tuning request, as sbatch submits a job."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from click.core import ParameterSource

from broker.protocol.errors import BrokerUnreachable, DataError, ProtocolMismatch, Transient, UsageError
from broker.protocol.messages import Submit, Submitted
from broker.protocol.spec import INPUT_FIELD, RequestSpec
from broker.protocol.states import Init, Metric, OnMiss, Rule, Schedule, Share
from broker.protocol.times import format_instant
from slurm_plugin.cli.common import envelope, expect, printable, refuse, say, standard_options, warn
from slurm_plugin.cli.fields import slack_text
from slurm_plugin.cli.options import FiniteRange, Flag, InstantType, ParamType, SloType, sbatch_options, words_of
from slurm_plugin.cli.scripted import ScriptedCommand
from slurm_plugin.cli.tasks import Task, fill_in, presets_help

if TYPE_CHECKING:
    from broker.net.client import BrokerClient
    from broker.protocol.config import SiteConfig
    from slurm_plugin.cli.data import Data

NAME = "ptbatch"
ATTEMPTS = 3
RETRY_PAUSE_S = 1.0
MOST_STEPS = 1_000_000
MOST_VERBALIZER = 4096  # characters
ADAMW_RATE = 0.03  # the protocol's default is the other rule's, in parts of a token's size
_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "auto_envvar_prefix": "PTBATCH",
}


def _number(kind: type[int] | type[float], low: float, high: float, open_low: bool = False) -> ParamType:
    if kind is int:
        return click.IntRange(int(low), int(high))
    return FiniteRange(low, high, min_open=open_low)


@click.command(NAME, cls=ScriptedCommand, context_settings=_SETTINGS)
@click.argument("script", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.option("--model", metavar="NAME", help="The base model, as ptinfo names it.")
@click.option("--train", metavar="FILE", help="Training rows: JSON Lines or CSV with input and target.")
@click.option("--eval", metavar="FILE", help="Evaluation rows; else some of the training rows are kept back.")
@click.option("--task", type=words_of(Task), help=f"Defaults for options that are not given: {presets_help()}.")
@click.option(
    "--prompt-tokens", type=_number(int, 1, 512), metavar="N", help="Virtual tokens of the prompt.  [default: 16]"
)
@click.option("--init", type=words_of(Init), help="The first prompt.  [default: bank]")
@click.option("--init-text", metavar="TEXT", help="The text that --init=text begins with.")
@click.option(
    "--metric",
    type=words_of(Metric),
    help="What --target-score is measured in (accuracy: exact match).  [default: loss]",
)
@click.option("--target-score", type=float, metavar="X", help="End when the evaluation rows reach this score.")
@click.option(
    "--verbalizer", metavar="TEXT", help="The words around each input, which replaces {input}.  [default: {input}]"
)
@click.option(
    "--max-input-tokens",
    type=_number(int, 1, 1_000_000),
    metavar="N",
    help="Cut longer inputs, verbalizer included: their last N tokens stay.",
)
@click.option(
    "--max-target-tokens", type=_number(int, 1, 1_000_000), metavar="N", help="Refuse rows with longer targets."
)
@click.option("--max-steps", type=_number(int, 1, MOST_STEPS), metavar="N", help="End after N steps.  [default: 250]")
@click.option(
    "--epochs",
    type=_number(float, 0, 1_000_000, open_low=True),
    metavar="X",
    help="End when each training row was seen X times.",
)
@click.option(
    "--patience", type=_number(int, 1, 1_000_000), metavar="N", help="End after N evaluations without a better prompt."
)
@click.option("--eval-every", type=_number(int, 1, 10_000), metavar="N", help="Evaluate each N steps.  [default: 5]")
@click.option("--batch-size", type=_number(int, 1, 1024), metavar="N", help="Rows of each step.  [default: 8]")
@click.option(
    "--rate",
    type=_number(float, 0, 100, open_low=True),
    metavar="X",
    help="Step size, in parts of a token's own size.  [default: 0.3; with --rule=adamw 0.03, the learning rate]",
)
@click.option("--rule", type=words_of(Rule), help="How a step moves the tokens.  [default: scaled]")
@click.option(
    "--weight-decay",
    type=_number(float, 0, 100),
    metavar="X",
    help="Shrink the tokens by rate times X each step.  [default: 0]",
)
@click.option(
    "--clip-norm",
    type=_number(float, 0, 1e9, open_low=True),
    metavar="X",
    help="The gradient's largest norm.  [default: none]",
)
@click.option("--schedule", type=words_of(Schedule), help="How the rate goes on.  [default: constant]")
@click.option(
    "--warmup-steps",
    type=_number(int, 0, 1_000_000),
    metavar="N",
    help="Steps in which the rate rises.  [default: 10; with --rule=adamw 0]",
)
@click.option("--accumulate-steps", type=_number(int, 1, 1024), metavar="N", help="Batches of each step.  [default: 1]")
@click.option("--seed", type=_number(int, 0, 2**63 - 1), metavar="N", help="Of the data's order and the split.")
@click.option("--slo", type=SloType(), metavar="DURATION", help="Deadline after submission: 10 (minutes), 90s, 1h30m.")
@click.option("--deadline", type=InstantType(), metavar="TIME", help="Deadline: 16:30, now+1hour, 2030-01-31T12:00.")
@click.option("--on-miss", type=words_of(OnMiss), help="When it cannot be met.  [default: continue]")
@click.option("--share", type=words_of(Share), help="Who may start from the result.  [default: private]")
@click.option("-J", "--job-name", metavar="NAME", help="The request's name.")
@click.option("-A", "--account", metavar="NAME", help="The account to charge.")
@click.option("-p", "--partition", metavar="NAME", help="The partition of the pool.")
@click.option("-q", "--qos", metavar="NAME", help="The quality of service.")
@click.option("--comment", metavar="TEXT", help="A note to keep with the request.")
@click.option("-W", "--wait", cls=Flag, is_flag=True, help="Wait for the end; the exit code is the request's.")
@click.option("-o", "--output", metavar="DIR", help="With --wait: write the tuned prompt into this new folder.")
@click.option("-D", "--chdir", metavar="DIR", help="Take relative file names from this folder.")
@click.option("--test-only", cls=Flag, is_flag=True, help="Check all and predict the finish; submit nothing.")
@click.option("--parsable", cls=Flag, is_flag=True, help="Print the id alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-Q", "--quiet", cls=Flag, is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", cls=Flag, is_flag=True, help="Say more.")
@click.option("--ignore-sbatch", cls=Flag, is_flag=True, help="Do not read the script's #SBATCH lines.")
@standard_options
@sbatch_options
@refuse("--each-line", "--from-json")
@click.pass_context
def main(ctx: click.Context, /, **options: Any) -> int:
    """Submit a prompt-tuning request to the broker.

    Options also come from the environment (PTBATCH_MODEL, ...) and from #PT lines of SCRIPT ("-": standard input), in
    which no line is run. The command line is the strongest, then the environment, then #PT, then #SBATCH lines.
    """
    if options["arguments"]:
        raise UsageError(f"unexpected argument {options['arguments'][0]!r}", "a script is not run, so it takes none")
    if options["chdir"]:
        _change_folder(options["chdir"])
    folder = _output_folder(options)
    _resolve_two_deadlines(ctx, options)
    fill_in(options)

    from slurm_plugin.contact import contact_for, read_site_config

    site = read_site_config(options["site_file"])
    submit = _submission(ctx, options, site)
    from broker.net.client import BrokerClient

    contact = contact_for(site)
    if options["verbose"]:
        say(NAME, f"broker {contact.address} of cluster {site.cluster}")
    with BrokerClient(contact) as client:
        reply = _submit(client, contact.address, submit)
        _report(options, reply, submit)
        if not options["wait"] or options["test_only"]:
            return 0
        return _wait(client, reply.id, folder, options["quiet"])


def _change_folder(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise UsageError(f"--chdir={folder}: {error.strerror}", "name a folder that you may enter") from None


def _output_folder(options: dict[str, Any]) -> Path | None:
    if options["output"] is None:
        return None
    if not options["wait"]:
        raise UsageError("--output needs --wait", "without it, fetch the result later: ptfetch ID -o DIR")
    from slurm_plugin.cli.results import check_folder

    check_folder(Path(options["output"]))
    return Path(os.path.abspath(options["output"]))


def _resolve_two_deadlines(ctx: click.Context, options: dict[str, Any]) -> None:
    """--slo and --deadline say one thing: the stronger source wins, and two of one source are a mistake; without
    either there is nothing to miss."""
    if options["slo"] is None and options["deadline"] is None and options["on_miss"] in ("drop", "reject"):
        raise UsageError(f"--on-miss={options['on_miss']} without a deadline", "give --slo or --deadline")
    if options["slo"] is None or options["deadline"] is None:
        return
    strength = [ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP]
    slo, deadline = (
        strength.index(source) if (source := ctx.get_parameter_source(name)) in strength else len(strength)
        for name in ("slo", "deadline")
    )
    if slo == deadline:
        raise UsageError("--slo and --deadline exclude each other", "give the one or the other")
    options["deadline" if slo < deadline else "slo"] = None


def _submission(ctx: click.Context, options: dict[str, Any], site: SiteConfig) -> Submit:
    for name in ("model", "train"):
        if not options[name]:
            raise UsageError(f"--{name} is missing", "for instance: ptbatch --model=NAME --train=FILE --slo=10m")
    data = _read(options, "train", site, 0)
    evaluation = _read(options, "eval", site, len(data.canonical)) if options["eval"] else None
    blobs = {data.digest: data.canonical}
    if evaluation:
        blobs[evaluation.digest] = evaluation.canonical
    spec = _spec(ctx, options, data, evaluation)
    key = os.urandom(16).hex()
    return Submit(spec=spec, submit_key=key, blobs=blobs, test_only=options["test_only"])


def _read(options: dict[str, Any], name: str, site: SiteConfig, taken: int) -> Data:
    from slurm_plugin.cli.data import read_data

    path = Path(options[name])
    limit = site.limits.data_mb << 20
    data = read_data(path, limit, site.limits.rows)
    if taken + len(data.canonical) > limit:
        raise DataError(
            f"{path}: with the training rows more than {site.limits.data_mb} MiB of data",
            "this site takes no more in one request: use fewer rows",
        )
    for text in data.warnings:
        warn(NAME, text)
    if options["verbose"]:
        say(NAME, f"{name}: {data.rows} rows, {len(data.canonical)} bytes, sha256 {data.digest}")
    return data


def _spec(ctx: click.Context, options: dict[str, Any], train: Data, evaluation: Data | None) -> RequestSpec:
    now = time.time()
    deadline = options["deadline"] if options["slo"] is None else now + options["slo"]
    if deadline is not None and deadline <= now:
        raise UsageError(
            f"the deadline {format_instant(deadline)} is in the past (now {format_instant(now)})", "choose a later one"
        )
    values: dict[str, Any] = {
        "train": train.digest,
        "eval": evaluation.digest if evaluation else None,
        "virtual_tokens": options["prompt_tokens"],
        "rate": _rate(options),
        "max_steps": _max_steps(options, train.rows),
        "deadline_unix_s": deadline,
        "init": _init(options),
        "job_name": options["job_name"] or _script_name(ctx),
    }
    same: tuple[str, ...] = ("model", "account", "partition", "qos", "comment", "init_text", "metric", "target_score")
    same += ("eval_every", "batch_size", "seed", "on_miss", "share", "rule", "weight_decay", "clip_norm", "schedule")
    same += ("warmup_steps", "accumulate_steps", "epochs", "patience", "verbalizer", "max_input_tokens")
    same += ("max_target_tokens",)
    values.update({name: options[name] for name in same})
    _check_target(options)
    _check_verbalizer(options["verbalizer"])
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return msgspec.convert(given, RequestSpec)
    except msgspec.ValidationError as error:
        raise UsageError(_complaint(str(error), given), "see ptbatch --help for what is allowed") from None


def _complaint(text: str, given: dict[str, Any]) -> str:
    """The protocol's complaint about a value, in the words of the command line."""
    reason, _, field = text.replace("`", "").partition(" - at $.")
    option = {"virtual_tokens": "prompt-tokens", "deadline_unix_s": "deadline"}.get(field, field.replace("_", "-"))
    if "regex" in reason:
        reason = "control characters and empty words are not allowed"
    return f"--{option}={str(given.get(field, ''))[:60]!r}: {reason[:1].lower()}{reason[1:]}"


def _rate(options: dict[str, Any]) -> float | None:
    if options["rate"] is None and options["rule"] == Rule.ADAMW.value:
        return ADAMW_RATE
    return options["rate"]  # type: ignore[no-any-return]  # options are click's: a float or None here


def _max_steps(options: dict[str, Any], rows: int) -> int | None:
    """With --epochs, as many steps as these are at most: the worker may keep rows back for evaluation."""
    if options["max_steps"] is not None or options["epochs"] is None:
        return options["max_steps"]  # type: ignore[no-any-return]  # options are click's: an int or None here
    batch: int = (options["batch_size"] or _default("batch_size")) * (options["accumulate_steps"] or 1)
    epochs: float = options["epochs"]
    return min(MOST_STEPS, max(1, math.ceil(epochs * rows / min(batch, rows))))


def _default(field: str) -> Any:
    """The protocol's."""
    return {known.name: known.default for known in msgspec.structs.fields(RequestSpec)}[field]


def _init(options: dict[str, Any]) -> str | None:
    if options["init_text"] is None and options["init"] != Init.TEXT.value:
        return options["init"]  # type: ignore[no-any-return]  # options are click's: a str or None here
    if options["init_text"] is None:
        raise UsageError("--init=text needs --init-text", "for instance: --init=text --init-text='Translate:'")
    if options["init"] not in (None, Init.TEXT.value):
        raise UsageError(f"--init-text and --init={options['init']} exclude each other", "leave --init out")
    return Init.TEXT.value


def _check_target(options: dict[str, Any]) -> None:
    score = options["target_score"]
    if score is None:
        return
    accuracy = options["metric"] not in (None, Metric.LOSS.value)
    if not math.isfinite(score) or score < 0 or (accuracy and score > 1):
        allowed = "an accuracy is 0..1" if accuracy else "a loss is 0 or more"
        raise UsageError(f"--target-score={score:g} cannot be reached", f"{allowed}; --metric says which it is")


def _check_verbalizer(text: str | None) -> None:
    count = 1 if text is None else text.count(INPUT_FIELD)
    if count != 1:
        times = "has no {input}" if count == 0 else f"has {{input}} {count} times"
        raise UsageError(f"--verbalizer {times}", "say once where the input stands: --verbalizer='Review: {input}'")
    if text is not None and len(text) > MOST_VERBALIZER:
        raise UsageError(f"--verbalizer has {len(text)} characters, and {MOST_VERBALIZER} are the most", "shorten it")


def _script_name(ctx: click.Context) -> str | None:
    script = ctx.meta.get("script", "-")
    return None if script == "-" else printable(Path(script).name)[:128]


def _submit(client: BrokerClient, address: str, submit: Submit) -> Submitted:
    """Submits once: where the answer stays out, the same submission is sent again under its key."""
    from broker.net.client import check_listening

    check_listening(address)  # nobody there is told at once; from here on, silence is worth another try
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return expect(client.call(submit), Submitted)
        except ProtocolMismatch:
            raise
        except (BrokerUnreachable, Transient) as error:
            if attempt == ATTEMPTS:
                error.hint = "it may have been accepted all the same: look with ptqueue --me before you submit again"
                raise
            warn(NAME, f"{error.message}; trying again")
            time.sleep(RETRY_PAUSE_S * attempt)
    raise AssertionError("unreachable")


def _report(options: dict[str, Any], reply: Submitted, submit: Submit) -> None:
    if options["as_json"]:
        click.echo(_json(reply, submit), nl=False)
    elif options["parsable"] and not submit.test_only:
        click.echo(str(reply.id))
    elif not submit.test_only and not options["quiet"]:
        click.echo(f"Submitted prompt-tuning request {reply.id}")
    if options["quiet"]:
        return
    predicted, deadline = reply.predicted_finish_unix_s, reply.deadline_unix_s
    text = f"predicted finish {format_instant(predicted)}"
    if deadline:
        text += f", deadline {format_instant(deadline)}"
        text += f" (slack {slack_text(deadline - predicted)})" if predicted else ""
    say(NAME, f"this request could run: {text}" if submit.test_only else text)
    if reply.note:
        warn(NAME, reply.note)
    elif deadline and predicted and predicted > deadline:
        warn(NAME, "the deadline will likely be missed")


def _json(reply: Submitted, submit: Submit) -> str:
    shown = {
        "id": reply.id or None,
        "predicted_finish_unix_s": reply.predicted_finish_unix_s,
        "deadline_unix_s": reply.deadline_unix_s,
        "test_only": submit.test_only,
    }
    meta = {"command": NAME, "cluster": reply.cluster}
    return envelope("requests", [shown], meta, [reply.note] if reply.note else [])


def _wait(client: BrokerClient, request_id: int, folder: Path | None, quiet: bool) -> int:
    from slurm_plugin.cli.follow import Progress, fetch, follow, report_end

    row = follow(client, request_id, Progress(NAME, quiet))
    code = report_end(NAME, row, quiet)
    if code == 0 and folder is not None:
        fetch(client, request_id, folder)
        if not quiet:
            say(NAME, f"wrote {folder}")
    return code
