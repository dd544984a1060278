"""The root of errors that a user can mend."""


class UserError(ValueError):
    """What the user can mend: shown as one message, without a traceback."""
