"""One tree of errors. Each kind has an exit code and a wire code, so that a refusal made in the broker ends a login
node's command with the same class, message and exit code."""

from __future__ import annotations


class PromptTunerError(Exception):
    """The root. `message` says what and where; `hint` says what to do about it."""

    exit_code = 1
    code = "Error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(PromptTunerError):
    """The call's own words are wrong: an unknown option value, an impossible time."""

    exit_code = 2
    code = "Usage"


class DataError(PromptTunerError):
    """The user's data cannot be used; the message names the file and the line."""

    code = "Data"


class ConfigError(PromptTunerError):
    """A site file cannot be used; the message lists every mistake found."""

    code = "Config"


class BrokerUnreachable(PromptTunerError):
    """No broker answered."""

    exit_code = 3
    code = "Unreachable"


class ProtocolMismatch(BrokerUnreachable):
    """The peer speaks another version of the protocol."""

    code = "Version"


class Refused(PromptTunerError):
    """The request is well formed, and policy or limits say no. Nothing was changed."""

    exit_code = 4
    code = "Refused"


class AuthError(PromptTunerError):
    """The identity could not be established, or the credential is not for this message."""

    exit_code = 5
    code = "Auth"


class NotFound(PromptTunerError):
    """No such request, or none that this user may see: the two are told alike on purpose."""

    exit_code = 6
    code = "NotFound"


class Transient(PromptTunerError):
    """A passing fault: the same call may succeed later. Nothing was acknowledged."""

    exit_code = 75
    code = "Transient"


class SlurmError(PromptTunerError):
    """A Slurm command did not do what was asked."""

    code = "Slurm"


class SlurmRejected(SlurmError):
    """Permanent: Slurm understood and refused (bad account, partition, limits). Not retried."""

    code = "SlurmRejected"


class SlurmUnavailable(SlurmError, Transient):
    """Transient: the controller or the database did not answer. Retried with back-off."""

    exit_code = 75
    code = "SlurmUnavailable"


class SlurmUnknown(SlurmError):
    """It may or may not have happened (a time-out after sending): look before trying again."""

    code = "SlurmUnknown"


def _tree(root: type[PromptTunerError]) -> dict[str, type[PromptTunerError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def error_for(code: str, message: str, hint: str = "") -> PromptTunerError:
    """The error of the tree that carries `code`; an unknown code (a newer peer) becomes the root class."""
    return _tree(PromptTunerError).get(code, PromptTunerError)(message, hint)
