"""Check an op and time it on this machine: `python -m bench.op swiglu`, the first thing to run on a new kernel.

It is `pytest bench/bench_kernels.py --kernel swiglu` without a record: the implementations beside their rivals on a
GPU; without one, accuracy, bytes and host calls of the Triton kernels in the interpreter, and the reference, eager and
compiled. The exit code is 0 when every implementation is right.
"""

import argparse
import sys
import tempfile

import pytest

from bench.processes import ROOT


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.op", description=__doc__.partition("\n")[0])
    parser.add_argument("op", help="its name in kernels.OPS")
    args, options = parser.parse_known_args(argv)  # other options are pytest's
    with tempfile.TemporaryDirectory() as folder:
        always = f"--kernel={args.op}", f"--results={folder}", "--benchmark-quiet", "-q", "-p", "no:warnings"
        return pytest.main([str(ROOT / "bench/bench_kernels.py"), *always, *options])


if __name__ == "__main__":
    sys.exit(main())
