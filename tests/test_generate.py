"""`python -m model.generate` on a trained run."""

import json

import pytest

from model.generate import main


@pytest.fixture
def folder(run):
    return run(steps=6)[1]


def test_one_prompt_is_streamed_and_repeats_with_the_same_seed(folder, capsys):
    texts = []
    for seed in (0, 0, 1):
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
        (["--temperature=-1"], "--temperature must be 0 or more"),
        (["--top-p=0"], "--top-p must be more than 0 and at most 1"),
        (["--tokens=0"], "--tokens must be at least 1"),
        (["--stop=ab"], "--stop 'ab' is 2 tokens in this run's vocabulary"),
        (["--device=tpu"], "device 'tpu' is not on this machine"),
        (["--kernels=sdpa"], "choose from 'auto', 'torch', 'triton'"),
        (["--run=out/nowhere"], "out/nowhere is not a run"),
    ],
)
def test_refusals(folder, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        main(["--run", str(folder), *flags])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_run_that_lacks_its_tokenizer(folder, capsys):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SystemExit):
        main(["--run", str(folder)])
    assert "tokenizer.json is not a tokenizer that nanofuse saved: " in capsys.readouterr().err
