"""What every command shares: how it reports errors, the options that all have, and how it reaches the broker."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from broker.protocol.errors import PromptTunerError, UsageError
from slurm_plugin import __version__

if TYPE_CHECKING:
    from broker.net.client import BrokerClient

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE = 128 + signal.SIGPIPE
CALL_TIMEOUT_S = 10.0
REFUSED = "refused_"  # before the names of options that are


class PtCommand(click.Command):
    """A command that ends as Slurm's do: `name: error: what`, one exit code for each kind of error."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        _lenient_output()
        sys.exit(_guarded(self.name or "", super().main, args, kwargs))


class PtGroup(click.Group):
    """A group of commands that ends as `PtCommand` does."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        _lenient_output()
        sys.exit(_guarded(self.name or "", super().main, args, kwargs))


def _guarded(name: str, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    try:
        code = body(*args, **kwargs)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption):
            error = _suggesting_only_shown(error)
        fail(name, error.format_message(), _help_hint(error))
        return error.exit_code
    except PromptTunerError as error:
        fail(name, error.message, error.hint)
        return error.exit_code
    except click.Abort:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough; nothing is to be said, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE


def _suggesting_only_shown(error: click.NoSuchOption) -> click.NoSuchOption:
    """A misspelt option is not answered with one that is refused."""
    params = error.ctx.command.params if error.ctx else []
    shown = {name for param in params if not getattr(param, "hidden", False) for name in param.opts}
    near = [name for name in error.possibilities or () if name in shown]
    return click.NoSuchOption(error.option_name, possibilities=near, ctx=error.ctx)


def _help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"Try '{context.command_path} --help' for more information." if context else ""


def _lenient_output() -> None:
    """A name that the terminal's encoding lacks is shown as `?`; it never ends a listing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def printable(text: str) -> str:
    """`text` with `?` in the place of control and other invisible characters: they could rewrite the terminal."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def fail(name: str, message: str, hint: str = "") -> None:
    """Prints `name: error: message` and the hint, each line of them, on stderr."""
    for line in message.splitlines():
        say(name, f"error: {line}")
    for line in hint.splitlines():
        say(name, line)


def warn(name: str, message: str) -> None:
    say(name, f"warning: {message}")


def say(name: str, message: str) -> None:
    """Prints `name: message` on stderr."""
    sys.stderr.write(f"{name}: {printable(message)}\n")
    sys.stderr.flush()


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"prompttuner {__version__}")
        context.exit()


def _print_usage(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(context.get_usage())
        context.exit()


def _refuse(context: click.Context, param: click.Parameter, value: Any) -> None:
    if value not in (None, (), False):
        assert isinstance(param, Refused)
        raise click.UsageError(param.refusal(), ctx=context)


class Refused(click.Option):
    """An option that users of Slurm may expect: refused by name, never ignored."""

    def __init__(self, *names: str, why: str = "", **kwargs: Any) -> None:
        self.why = why or "is not supported yet"
        settings: dict[str, Any] = {
            "hidden": True,
            "expose_value": False,
            "allow_from_autoenv": False,
            "callback": _refuse,
        }
        name = max(names, key=len).lstrip("-").replace("-", "_")  # apart from a used option that is spelt alike
        super().__init__([f"{REFUSED}{name}", *names], **settings, **kwargs)

    def refusal(self) -> str:
        return f"{'/'.join(self.opts)} {self.why}"


def refuse(*names: str, flag: bool = False, why: str = "") -> Callable[[F], F]:
    """Declares options that are refused by name."""

    def decorate(function: F) -> F:
        for name in names:
            parts = name.split("/")
            extra: dict[str, Any] = {"is_flag": True} if flag else {}
            _add_param(function, Refused(*parts, why=why, **extra))
        return function

    return decorate


def _add_param(function: Any, param: click.Parameter) -> None:
    if not hasattr(function, "__click_params__"):
        function.__click_params__ = []
    function.__click_params__.append(param)


def brief_options(function: F) -> F:
    """--version and --usage, which every command has."""
    for names, callback, text in (
        (("--usage",), _print_usage, "Show the form of a call and exit."),
        (("-V", "--version"), _print_version, "Show the version and exit."),
    ):
        option = click.option(
            *names,
            is_flag=True,
            is_eager=True,
            expose_value=False,
            allow_from_autoenv=False,
            callback=callback,
            help=text,
        )
        function = option(function)
    return function


def standard_options(function: F) -> F:
    """--site-file, --version, --usage: the same in every command of users."""
    path = click.Path(path_type=Path)
    variable = "PROMPTTUNER_SITE_FILE"
    site = click.option("--site-file", "--site", type=path, envvar=variable, metavar="FILE", help="Use this site file.")
    return site(brief_options(function))


def command(name: str, *, h_is_help: bool = True) -> Callable[[Callable[..., Any]], PtCommand]:
    """Declares a command with the standard options. `-h` is help, but where Slurm has it for `--noheader`."""
    names = ["-h", "--help"] if h_is_help else ["--help"]
    settings = {"help_option_names": names, "max_content_width": 110}

    def decorate(function: Callable[..., Any]) -> PtCommand:
        return click.command(name, cls=PtCommand, context_settings=settings)(standard_options(function))

    return decorate


def open_broker(site_file: Path | None) -> BrokerClient:
    """A connection to the broker that `site_file`, or the one in force, names.

    Raises BrokerUnreachable at once when nobody listens there.
    """
    from broker.net.client import BrokerClient, check_listening
    from slurm_plugin.contact import find_contact

    contact, _ = find_contact(site_file)
    check_listening(contact.address)
    return BrokerClient(contact)


def expect(reply: object, kind: type[R]) -> R:
    """`reply`, which is of this kind; anything else is a fault of the broker's."""
    if isinstance(reply, kind):
        return reply
    raise PromptTunerError(
        f"the broker answered {type(reply).__name__} where {kind.__name__} was due",
        "use commands and broker of one release",
    )


def own_name() -> str:
    """The user's name as the system knows it, whatever the environment says."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def split_list(text: str | None) -> list[str]:
    """The words of a comma-separated option value."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def request_ids(words: Sequence[str]) -> list[int]:
    """Request ids from ids or comma-separated lists of them.

    Raises UsageError for anything that is no positive number.
    """
    ids = []
    for word in (part for text in words for part in split_list(text)):
        if not (word.isascii() and word.isdigit() and 0 < int(word[:19]) < 2**63 and len(word) < 20):
            raise UsageError(f"not a request id: {word[:60]!r}", "ids are the numbers that ptbatch and ptqueue show")
        ids.append(int(word))
    return ids


def envelope(kind: str, items: list[dict[str, Any]], meta: dict[str, Any], warnings: Sequence[str] = ()) -> str:
    """The one JSON document of `--json`, as Slurm's own commands frame theirs."""
    import msgspec

    document = {
        "schema": "pt/1",
        "meta": {"version": __version__, **meta},
        "errors": [],
        "warnings": list(warnings),
        kind: items,
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"
