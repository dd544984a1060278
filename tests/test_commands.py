"""Every program, by its command line: what it refuses, and what it says outside of an environment."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_commands import PROGRAMS, Case, cases, fault, faults

from runtime.errors import UserError
from runtime.program import program

ROOT = Path(__file__).parents[1]
CHANGES = {
    "deleted": Path.unlink,
    "changed": lambda path: path.write_text("other text"),
    "added": lambda path: path.with_name("new").touch(),
}


def test_a_tenth_of_the_bad_command_lines_is_refused(tmp_path):
    assert len(cases()) >= 300 and {case.program for case in cases()} == set(PROGRAMS)
    tried = list(faults(tmp_path, every=10))
    assert len(tried) >= 30 and [(case, found) for case, found in tried if found] == []


@pytest.mark.parametrize(
    "code, out, err, error, found",
    [
        (2, "", "error: no flag --x\n", None, ""),
        (0, "", "", None, "exit code 0, not 2"),
        (2, "", "", None, "not one sentence"),
        (2, "", "usage: ...\nerror: --x\n", None, "not one sentence"),
        (2, "working\n", "error: --x\n", None, "more than an error"),
        (2, "", "error: bad\n", None, "does not say --x"),
        (2, "", "error: --x\n", KeyError("x"), "KeyError: 'x'"),
        (2, "", "error: --x\n", SystemExit(1), "exit code 1, not 2"),
    ],
)
def test_the_fuzz_sees_what_is_wrong(tmp_path, code, out, err, error, found):
    def main(argv):
        print(out, end="")
        print(err, end="", file=sys.stderr)
        if error:
            raise error
        return code

    said = fault(Case("it", [], ["--x"]), tmp_path, {"it": main})
    assert found in said and bool(found) == bool(said)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fuzz_sees_what_changes_on_disk(tmp_path, change):
    (tmp_path / "mine").write_text("text")

    @program
    def main(argv):
        change(tmp_path / "mine")
        raise UserError("--x")

    assert "changed " in fault(Case("it", [], ["--x"]), tmp_path, {"it": main})


@pytest.mark.parametrize("command", ["train.py", "-m model.generate", "-m experiments", "-m bench.op"])
def test_without_an_environment_a_program_says_how_to_get_one(command):
    """`python -S` finds no installed package."""
    ended = subprocess.run([sys.executable, "-S", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    sentence = r"error: \S+ has no torch\. `make train` sets up an environment.*`source \.venv/bin/activate` first\.\n"
    assert re.fullmatch(sentence, ended.stderr)


@pytest.mark.parametrize("closed", ["", "stdout", "stderr"])
def test_a_program_leaves_when_its_threads_and_exit_functions_are_done(closed):
    """And takes nothing apart: a module's objects are not deleted."""
    code = f"""
import atexit, sys, threading, time
from runtime.program import leave
class Deleted:
    def __del__(self): print("deleted")
kept = Deleted()
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
atexit.register(print, "exit function")
print("last word")
sys.{closed or "closed"} = None
leave(3)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said = "last word\n" + ("" if closed == "stdout" else "thread\nexit function\n")
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, said, "")
