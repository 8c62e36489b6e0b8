"""Every error that tip-ray raises on purpose.

TipRayError
├── UserError                  the user can mend it; exit code 2
│   ├── SpecError              a spec or an argument: field, found, expected, cure
│   ├── AccessError            a token is missing, malformed or wrong
│   ├── ModelMismatchError     student and teacher cannot be paired
│   ├── RunDirectoryError      the run directory cannot be used
│   │   └── LeaseLostError     another driver has taken the run over
│   └── PlacementError         the cluster can never, or did not in time, hold the run
├── NotFoundError              no such run or file; exit code 3
├── NotSupportedError          this client or feature cannot do that; says what can
├── UnreachableError           a cluster or a status API does not answer, or answers nonsense
├── NotInTimeError             what was waited for did not happen in time; it may yet
├── RunFailedError             the run itself failed; exit code 1
├── RunCancelledError          the run was asked to stop and did; exit code 130
├── RunTerminatedError         the driver was told to go at once; exit code 143
├── TableError                 a table does not conform to its schema
├── TransitionError            an illegal RunState transition
├── DataError                  one piece of data is poisonous; it is quarantined, not retried
├── ReplicaError               a replica died, hung or answered from an older epoch; retried
└── ObjectsLostError           tables went with the node that held them; made again

All of them survive pickling: their state is their message and plain attributes.
"""

from __future__ import annotations

from typing import Any


class TipRayError(Exception):
    """Base of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[TipRayError], args: tuple[Any, ...], state: dict[str, Any]) -> TipRayError:
    """Rebuild an error without calling its own constructor, whatever its signature is."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class UserError(TipRayError):
    """The user can mend it: nothing was started."""

    exit_code = 2


class SpecError(UserError):
    """A spec field or an argument is wrong: one line with field, found, expected and cure."""

    def __init__(self, field: str, found: str, expected: str, cure: str = "") -> None:
        self.field, self.found, self.expected, self.cure = field, found, expected, cure
        line = f"{field}: found {found}, expected {expected}"
        super().__init__(f"{line}; {cure}" if cure else line)


class AccessError(UserError):
    """A token is missing, malformed or wrong: whose, and where to put the right one."""


class ModelMismatchError(UserError):
    """Student and teacher cannot be paired: vocabulary, tokenizer, EOS or chat template."""


class RunDirectoryError(UserError):
    """The run directory cannot be read, written, or belongs to something else."""


class LeaseLostError(RunDirectoryError):
    """Another driver has taken the run over: this one writes nothing more."""


class PlacementError(UserError):
    """The cluster can never hold the run, or did not give it room in time."""


class NotFoundError(TipRayError):
    """No such run, step or file."""

    exit_code = 3


class NotSupportedError(TipRayError):
    """The thing asked for cannot be done this way; the message says which way can."""


class UnreachableError(TipRayError):
    """A cluster or a status API does not answer, or with something that is no answer."""


class NotInTimeError(TipRayError):
    """What was waited for did not happen in the time that was given; it may yet."""


class RunFailedError(TipRayError):
    """The run failed; the message is what status.json shows under `error`."""


class RunCancelledError(TipRayError):
    """The run stopped because it was asked to."""

    exit_code = 130


class RunTerminatedError(TipRayError):
    """SIGTERM: the driver wrote its status and went; the newest checkpoint stays."""

    exit_code = 143


class TableError(TipRayError):
    """A table does not conform to its schema: which column, what was expected, what to do."""


class TransitionError(TipRayError):
    """An illegal change of RunState."""


class DataError(TipRayError):
    """One piece of data cannot be processed by any replica; retrying would not help."""


class ReplicaError(TipRayError):
    """A replica died, hung, or answered from an older epoch; the work is dispatched again."""


class ObjectsLostError(TipRayError):
    """Tables or weights went with the node that held them; no replica is at fault."""
