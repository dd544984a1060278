"""Check an op and time it on this machine: `python -m bench.op swiglu`, the first thing to run on a new kernel.

It is `pytest bench/bench_kernels.py --kernel swiglu` and takes further options of pytest. On a GPU it checks and times
every implementation and its rivals. Without one it checks the Triton kernels and counts what they move in the
interpreter, and times the reference, eager and compiled. The exit code is 0 if every implementation is right.

`--implementation mine.py:swiglu` does so for a function of your own: bench/audit.py says what is checked.
"""

import os
import sys

import pytest
import torch

# Without a GPU kernels run in the interpreter. Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# isort: split

from bench.processes import ROOT
from kernels import OPS, KernelError, own
from runtime.config import Parser
from runtime.program import program


@program
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.op", description=__doc__.partition("\n")[0])
    parser.add_argument("op", choices=OPS, help="its name in kernels.OPS")
    parser.add_argument("--implementation", default="", help="a function of your own: path.py:function")
    args, options = parser.parse_known_args(argv)
    if args.implementation:
        try:
            own.load(args.implementation, OPS[args.op])
        except KernelError as error:
            parser.error(str(error))
        options = [f"--implementation={args.implementation}", *options]
    always = f"--kernel={args.op}", "--benchmark-quiet", "-q", "-p", "no:warnings"
    return pytest.main([str(ROOT / "bench/bench_kernels.py"), *always, *options])


if __name__ == "__main__":
    sys.exit(main())
