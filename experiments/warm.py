"""The imports of a trial, done once by the fork server of `experiments.forks`. Nothing else imports this module.

Nothing here may compute: a process forked from one that has started OpenMP's threads hangs.
"""

import gc
import os
from contextlib import suppress

import torch._dynamo  # noqa: F401 - which torch's optimizers import when they are built

import train  # noqa: F401
from experiments.forks import die_with_parent

with suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

PID = os.getpid()
os.setsid()  # a terminal's signals are for the sweep to answer
die_with_parent()
gc.freeze()  # the collector leaves these objects alone, so that their pages stay shared with the trials
