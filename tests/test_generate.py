"""`python -m model.generate` on a trained run."""

import io
import json
import os
import sys

import pytest
import torch

from model import checkpoint, generate
from model.generate import main, next_tokens
from model.load import load_run


@pytest.fixture
def folder(run):
    return run(steps=6)[1]


def test_one_prompt_is_streamed_and_repeats_with_the_same_seed(folder, capsys):
    texts = []
    for seed in (1, 1, 0):
        assert main(["--run", str(folder), "--prompt", "The old ", "--tokens", "30", "--seed", str(seed)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("The old ") and len(texts[0]) > 20


def test_a_batch_of_prompts_gives_one_json_line_each(folder, capsys):
    flags = ["--run", str(folder), "--tokens", "5", "--temperature=0"]
    assert main([*flags, "--prompt", "A", "--prompt", "The old fox"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["A", "The old fox"]
    main([*flags, "--prompt", "A"])
    assert capsys.readouterr().out.rstrip("\n") == "A" + lines[0]["text"]


def test_small_top_p_and_top_k_of_one_are_greedy(folder, capsys):
    texts = set()
    for flags in (["--temperature=0"], ["--temperature=9", "--top-p=1e-9"], ["--temperature=9", "--top-k=1"]):
        main(["--run", str(folder), "--prompt", "The", *flags])
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


def test_it_ends_at_the_stop_token(folder, capsys):
    main(["--run", str(folder), "--prompt", "The", "--tokens", "60"])
    whole = capsys.readouterr().out
    stop = next(char for char in whole[10:] if char.isascii())
    main(["--run", str(folder), "--prompt", "The", "--tokens", "60", "--stop", stop])
    assert capsys.readouterr().out == whole[: whole.index(stop, 3)] + "\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--temperature=-1"], "--temperature: it must be at least 0, not -1.0"),
        (["--temperature=1e-39"], "--temperature: it must be 0, which is greedy, or at least 1.2e-38, not 1e-39"),
        (["--temperature=nan"], "--temperature: it must be at least 0, not nan"),
        (["--temperature=1e39"], "--temperature: it must be at most 3.4"),
        (["--temperature=hot"], "--temperature: it must be a number, not 'hot'"),
        (["--top-p=0"], "--top-p: it must be more than 0, not 0.0"),
        (["--top-p=nan"], "--top-p: it must be more than 0, not nan"),
        (["--top-k=-1"], "--top-k: it must be at least 0, not -1"),
        (["--top-k=2.5"], "--top-k: it must be a whole number, not '2.5'"),
        (["--tokens=0"], "--tokens: it must be at least 1, not 0"),
        (["--seed=18446744073709551616"], "--seed: it must be a whole number that 64 bits hold"),
        (["--stop=ab"], "--stop 'ab' is 2 tokens in this run's vocabulary"),
        (["--device=tpu"], "device 'tpu' is not on this machine"),
        (["--kernels=sdpa"], "choose from 'auto', 'torch', 'triton'"),
        (["--run=out/nowhere"], "out/nowhere is not a run"),
        (["--run=nowhere"], "out/nowhere is not a run"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_refusals(folder, capsys, flags, message):
    assert main(["--run", str(folder), *flags]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and err.count("\n") == 1 and not out


def test_half_precision_casts_the_weights_once(folder):
    model, tokenizer = load_run(folder, torch.device("cpu"), precision="bf16")
    assert {copy.dtype for copy in model.copies().values()} == {torch.bfloat16}
    ids = torch.tensor([tokenizer.encode("The old fox")])
    exact = load_run(folder, torch.device("cpu"))[0].logits(ids)
    torch.testing.assert_close(model.logits(ids), exact, rtol=0.05, atol=0.05)
    assert not torch.equal(model.logits(ids), exact)


def test_a_run_that_lacks_its_tokenizer(folder, capsys):
    (folder / "tokenizer.json").unlink()
    assert main(["--run", str(folder)]) == 2
    assert "tokenizer.json is not a tokenizer that nanofuse saved: " in capsys.readouterr().err


def test_the_ends_of_the_ranges_work(folder, capsys):
    ends = (
        ["--temperature=1.2e-38"], ["--temperature=3.4e38"], ["--top-p=1e-320"], ["--top-k=9223372036854775807"],
        ["--seed=18446744073709551615"], ["--seed=-1"],
    )  # fmt: skip
    for flags in ends:
        assert main(["--run", str(folder), "--tokens=3", *flags]) == 0
    uniform = torch.arange(64, dtype=torch.float64) / 64
    for temperature in (1.2e-38, 3.4e38):  # the second is uniform over what is not excluded
        logits = torch.tensor([[-9.0, 100.0, -torch.inf, 7.0]]).expand(64, 4)
        drawn = set(next_tokens(logits, temperature, 0, 1.0, uniform).tolist())
        assert drawn == ({1} if temperature < 1 else {0, 1, 3})
    assert set(next_tokens(logits, 3.4e38, 0, 1e-320, uniform).tolist()) == {1}


def test_a_run_is_named_as_in_out(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parents[1])
    texts = set()
    for name in ("small", "out/small", "./out/small", str(folder)):
        assert main(["--run", name, "--tokens=5"]) == 0
        texts.add(capsys.readouterr().out)
    monkeypatch.chdir(folder.parent)
    assert main(["--run", "small", "--tokens=5"]) == 0
    assert texts == {capsys.readouterr().out}


def test_a_closed_pipe_and_ctrl_c_end_it_quietly(folder, capsys, monkeypatch):
    for batch in ([], ["--prompt=A", "--prompt=B"]):  # streamed, and printed at the end
        read, write = os.pipe()
        os.close(read)
        with monkeypatch.context() as patch, open(write, "w") as closed:
            patch.setattr(sys, "stdout", closed)
            assert main(["--run", str(folder), "--tokens=5", *batch]) == 141

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", interrupt)
    assert main(["--run", str(folder)]) == 130
    assert capsys.readouterr().err == ""


def test_output_is_utf_8_whatever_the_locale(folder, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["--run", str(folder), "--tokens=1", "--prompt=é🙂\udcff"]) == 0
    assert raw.getvalue().decode().startswith("é🙂\ufffd")


def test_a_model_that_gives_nan_is_refused(folder, capsys):
    state = checkpoint.load(folder / "best.pt")
    state["model"]["norm.gain"][0] = torch.nan
    (folder / "best.pt").unlink()
    checkpoint.save(folder, state)
    assert main(["--run", str(folder)]) == 2
    assert "error: the model's logits are NaN or infinite" in capsys.readouterr().err
