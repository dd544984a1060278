"""Errors that the user can fix."""


class UserError(ValueError):
    """An error that the user can fix. Programs print its message, without a traceback."""


def error_message(error: BaseException) -> str:
    """The message to print for an error that the user can fix, with its notes."""
    if isinstance(error, ModuleNotFoundError):
        return f"this configuration needs the package {error.name}, which is not installed"
    return "; ".join([str(error), *getattr(error, "__notes__", [])])
