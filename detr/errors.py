"""Errors that a user can cause: one line explains each of them. Everything else is a fault of ours."""


class DetrError(Exception):
    """Something that a user can mend; the message is one line that says what, where, and what was expected."""


class ArgumentError(DetrError, ValueError):
    """An argument, a flag or a field of the config that cannot be used; the message names it."""


class DataError(DetrError, ValueError):
    """A dataset or an image that cannot be used; the message names the file, the entry and the field."""


class CheckpointError(DetrError, ValueError):
    """A file of weights that cannot be read or used; the message names the file and the field."""


class NotFiniteError(DetrError, ValueError):
    """The outputs of a model are not numbers."""


class TrainingError(DetrError, ValueError):
    """A training that cannot go on; the message says at which step and why."""


class ProcessError(TrainingError, RuntimeError):
    """Another process of this run has ended before its time."""


class OutputError(DetrError):
    """A file that cannot be written, or must not be; the message names it and says why."""


class DownloadError(DetrError, ConnectionError):
    """Weights that could not be downloaded."""


class MissingPackageError(DetrError, ImportError):
    """A package that is not installed; the message says how to install it."""
