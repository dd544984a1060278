"""Kernels of a user's own: how they are loaded, trained with and refused."""

import json

import pytest
import torch

import train
from kernels import OPS, KernelChoice, KernelError, bind, own
from model import generate

MINE = """
import torch.nn.functional as F

calls = []

def swiglu(x, activation="silu", gated=True):
    calls.append(x.shape)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up

def narrow(x):
    return x

def swapped(x, gated=True, activation="silu"):
    return x

def any_arguments(*arguments, **options):
    return swiglu(*arguments, **options)

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """`mine.py` in the current folder. Files are imported once, so each test's has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_function_from_a_file_is_bound_by_its_name(mine):
    bound = bind(KernelChoice(swiglu="mine.py:swiglu", rope="torch"))
    assert bound.names["swiglu"] == "mine.py:swiglu" and "swiglu mine.py:swiglu" in str(bound)
    x = torch.randn(3, 8)
    torch.testing.assert_close(bound.swiglu(x), OPS["swiglu"].implementations["torch"](x))
    again = bind(KernelChoice(swiglu=f"{mine}:any_arguments"))
    again.swiglu(x)
    assert len(own.load("mine.py:swiglu", OPS["swiglu"]).__globals__["calls"]) == 2, "the file ran twice"


@pytest.mark.parametrize("name, said", {
    "absent.py:swiglu": "there is no file", "mine.py:swigul": "did you mean swiglu",
    "mine.py:number": "its functions are",
    "mine.py": "write it as mine.py:swiglu", "mine.py:": "write it as mine.py:swiglu",
    "mine.py:narrow": r"parameters are \(x, activation='silu', gated=True\): its parameters are \(x\)",
    "mine.py:swapped": r"its parameters are \(x, gated=True, activation='silu'\)",
    "broken.py:swiglu": "line 2: ZeroDivisionError", "unwritten.py:swiglu": "line 1: SyntaxError",
    "needs.py:swiglu": "line 1: ModuleNotFoundError: No module named 'no_such_package'",
}.items())  # fmt: skip
def test_what_cannot_be_used_is_refused_in_words(mine, name, said):
    mine.with_name("broken.py").write_text("x = 1\ny = x / 0\n")
    mine.with_name("unwritten.py").write_text("def swiglu(:\n")
    mine.with_name("needs.py").write_text("import no_such_package\n")
    with pytest.raises(KernelError, match=said):
        bind(KernelChoice(swiglu=name))


def test_one_function_is_not_the_kernel_of_every_op(mine):
    with pytest.raises(KernelError, match=r"--kernels\.swiglu=mine\.py:swiglu"):
        bind(KernelChoice(every="mine.py:swiglu"))


def test_triton_kernels_of_a_file_need_a_gpu_or_the_interpreter(mine, monkeypatch):
    pytest.importorskip("triton")
    mine.write_text("import triton\n@triton.jit\ndef kernel(): pass\n" + MINE)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match=r"mine\.py:swiglu has Triton kernels, which need a GPU"):
        bind(KernelChoice(swiglu="mine.py:swiglu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bind(KernelChoice(swiglu="mine.py:swiglu")).names["swiglu"] == "mine.py:swiglu"


def test_a_run_trains_with_it_and_resumes_and_generates(mine, run, capsys):
    """The loss is that of the reference; a resumed run whose file is gone says which."""
    code, folder = run("--kernels.swiglu=mine.py:swiglu", steps=6, save_every=3)
    assert code == 0 and "swiglu mine.py:swiglu" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["kernels"]["swiglu"] == "mine.py:swiglu"
    assert run(steps=6, run="reference")[0] == 0
    rows = [(folder.parent / name / "metrics.jsonl").read_text().splitlines() for name in ("small", "reference")]
    losses = [[json.loads(row).get("val_loss") for row in lines][-1] for lines in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    resume = ["--resume", "--run=small", f"--out={folder.parent}", "--steps=8"]
    assert train.main(resume) == 0
    assert generate.main([f"--run={folder}", "--tokens=2"]) == 0
    mine.unlink()
    own._import.cache_clear()
    capsys.readouterr()
    assert train.main([*resume[:-1], "--steps=10"]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert train.main([*resume[:-1], "--steps=10", "--kernels.swiglu=torch"]) == 0
