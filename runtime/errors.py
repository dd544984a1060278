"""The base class of errors that the user can fix."""


class UserError(ValueError):
    """An error that the user can fix. Programs print its message, without a traceback."""
