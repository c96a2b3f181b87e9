"""Named errors: one line each, that echoes the value and lists the choices.

Every error that a user can cause is a :class:`TangentlabError`; the command line prints its text on one
line and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TangentlabError(Exception):
    """Base of every error that bad input, a bad file or a full disk can cause."""


class ConfigError(TangentlabError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(TangentlabError):
    """A data file is missing, truncated or holds values out of range."""


class ModelError(TangentlabError):
    """A model cannot be built, loaded, or does not map its inputs to [n, C]."""


class KernelError(TangentlabError):
    """A kernel cannot be computed exactly for this model, or not within the memory given."""


class CheckpointError(TangentlabError):
    """A checkpoint is unreadable or belongs to another model."""


class RunFolderError(TangentlabError):
    """A run folder exists, is in use by another process, or is not a run."""


class StorageError(TangentlabError):
    """The disk refused a write; what was written before is whole."""


class DivergedError(TangentlabError):
    """Training produced a loss or a parameter that is not finite."""


class InterruptedRunError(TangentlabError):
    """The run was stopped on request at a step boundary and can be resumed."""


class OtherProcessError(TangentlabError):
    """Another process of the same run cannot begin, or is lost."""


class ConvergenceWarning(UserWarning):
    """A result did not reach the tolerance in the products it was given."""


def unknown_choice(what: str, value: object, choices: Iterable[str]) -> str:
    """One line for an unknown name: echoes it, suggests the nearest, lists the choices.

    >>> unknown_choice("norm", "lnf", ["linf", "l2"])
    "norm 'lnf' is unknown; did you mean 'linf'? Choose from 'linf', 'l2'"
    """
    names = list(choices)
    near = nearest(str(value), names)
    hint = f"did you mean {near!r}? Choose" if near else "choose"
    return f"{what} {value!r} is unknown; {hint} from {', '.join(repr(name) for name in names)}"


def nearest(value: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant: one that begins as the value does, else one spelt like it."""
    known = list(names)
    begins = [name for name in known if value.startswith(name) or (value and name.startswith(value))]
    return next(iter(begins or difflib.get_close_matches(value, known, n=1)), None)


def first_line(error: BaseException) -> str:
    """The first line of somebody else's error, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
