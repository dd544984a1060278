import runtime  # noqa: F401 - checks the environment
