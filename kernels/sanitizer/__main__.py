"""Run a Python program and check every Triton kernel that it launches: `python -m kernels.sanitizer mine.py`.

The program's tensors are on the CPU. At the end there is a line for each kernel: its launches, and the bytes and FLOPs
that they took. The exit code is 1 if a kernel did what on a GPU is undefined, else the program's own; 2 for a program
that is not there.
"""

import argparse
import os
import runpy
import sys
import traceback
from pathlib import Path

import triton

from . import SanitizerError, sanitize


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.parent}", description=__doc__.partition(":")[0], allow_abbrev=False
    )
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="run the programs of a launch in a random order")
    for check in ("bounds", "races", "overflow"):
        parser.add_argument(f"--no-{check}", dest=check, action="store_false", help=f"do not check {check}")
    parser.add_argument("program", help="a file that launches kernels when it is run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the program gets as sys.argv[1:]")
    args = parser.parse_args(argv)
    if not Path(args.program).is_file():
        parser.error(f"there is no file {args.program}")
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton read it when it was imported: begin again
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", __spec__.parent, *argv])
    sys.argv = [args.program, *args.arguments]
    sys.path[0] = str(Path(args.program).resolve().parent)
    code = 0
    checks = {"bounds": args.bounds, "races": args.races, "overflow": args.overflow, "shuffle": args.shuffle}
    with sanitize(**checks) as record:
        try:
            runpy.run_path(args.program, run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        except SanitizerError as error:
            inside = Path(__file__).parent, Path(triton.__file__).parent, Path(runpy.__file__).parent
            frames = traceback.extract_tb(error.__traceback__)
            traceback.print_list(
                [
                    x
                    for x in frames
                    if not any(Path(x.filename).is_relative_to(at) for at in inside) and x.filename[0] != "<"
                ]
            )
            print(f"SanitizerError: {error}", file=sys.stderr)
            return 1
    for name, counts in record.kernels.items():
        print(
            f"{name}: {counts.launches:,} launches, {counts.bytes_read:,} bytes read, "
            f"{counts.bytes_written:,} written, {counts.flops:,} FLOPs of tl.dot"
        )
    if not record.kernels:
        print(f"{args.program} launched no Triton kernel", file=sys.stderr)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return 1
    return code or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
