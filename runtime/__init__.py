"""What surrounds training: configuration, hardware, the run's folder and record.

Importing it checks the environment, so every program imports it before torch. It also begins to watch the launcher of a
rank (runtime/launcher.py).
"""

import sys
from importlib.util import find_spec

missing = [name for name in ("torch", "numpy") if find_spec(name) is None]
if missing or sys.version_info < (3, 11):
    reason = f"has no {missing[0]}" if missing else "is older than Python 3.11"
    print(
        f"error: {sys.executable} {reason}. `make train` sets up an environment in .venv: then run .venv/bin/python "
        "in place of python, or `source .venv/bin/activate` first.",
        file=sys.stderr,
    )
    sys.exit(2)

from runtime import launcher  # noqa: E402

launcher.watch()
