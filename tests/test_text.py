"""Text is UTF-8, whatever the locale."""

import io
import json
import os
import subprocess
import sys

from runtime.run import ROOT
from runtime.text import typed, use_utf8


def test_output_is_utf8(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="latin-1") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    use_utf8()
    for stream in streams:
        print("é € \udcff", file=stream, flush=True)
        assert stream.buffer.getvalue() == "é € \\udcff\n".encode()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    use_utf8()


def test_bytes_that_are_not_utf8_are_replaced_in_typed_text():
    assert typed("é € \udcff") == "é € \ufffd"


def test_a_run_in_another_locale_reads_and_writes_utf8(tiny, tmp_path):
    """The locale is ASCII; prompt and name are UTF-8 but for one byte."""
    (tmp_path / "é.txt").write_text("é € ü\n" * 400, encoding="utf-8")
    argv = [*tiny(tmp_path / "out", steps=2), f"--data.corpus={tmp_path / 'é.txt'}"]
    odd = [b"--sample_prompt=\xc3\xa9 \xff", b"--run=caf\xc3\xa9 \xff"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "train.py", *argv, *odd]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    folder = tmp_path / "out" / os.fsdecode(b"caf\xc3\xa9 \xff")
    assert b"run      " in done.stdout and done.stdout.decode("utf-8")
    assert (folder / "samples.txt").read_text(encoding="utf-8").startswith("--- step 2 ---\né \ufffd")
    assert json.loads((folder / "status.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert (folder / "loss.png").exists()
