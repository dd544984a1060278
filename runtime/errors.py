"""Errors that the user can fix."""


class UserError(ValueError):
    """An error that the user can fix. Programs print its message, without a traceback."""


EXTRAS = {  # of pyproject.toml, by package
    "pyarrow": "parquet", "triton": "kernels", "tensorboard": "tensorboard", "transformers": "test",
    "scipy": "experiments", "jinja2": "experiments", "gguf": "gguf", "lm_eval": "lm-eval",
}  # fmt: skip


def error_message(error: BaseException) -> str:
    """The message to print for an error that the user can fix, with its notes."""
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).partition(".")[0]
        mend = f": pip install '.[{EXTRAS[package]}]'" if package in EXTRAS else ""
        return f"this configuration needs the package {package}, which is not installed{mend}"
    return "; ".join([str(error), *getattr(error, "__notes__", [])])
