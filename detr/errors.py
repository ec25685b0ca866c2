"""Errors that a user can cause: one line explains each of them. Everything else is a fault of ours."""


class UserError(Exception):
    """Something that a user can mend; the message is one line that says what, where, and what was expected."""


class DataError(UserError, ValueError):
    """Input that cannot be used; the message names the file, the entry and the field."""
