"""Bad command lines, each of which its program must refuse in one sentence, leaving everything on disk as it was.

python tests/fuzz_commands.py              # all of them; prints what is wrong, and a summary
python tests/fuzz_commands.py --every 10   # every tenth
"""

import gc
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

import experiments.__main__ as sweeps
import train
from bench import compare, gpu, nanogpt, op, report, steps, tune
from model import checkpoint, evaluate, export, generate, lm_eval, plan
from runtime import doctor

PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "train": train.main,
    "generate": generate.main,
    "evaluate": evaluate.main,
    "export": export.main,
    "plan": plan.main,
    "lm_eval": lm_eval.main,
    "experiments": lambda argv: sweeps.main(argv, (sys.executable, "-c", "raise SystemExit(3)")),
    "bench.compare": compare.main,
    "bench.gpu": gpu.main,
    "bench.nanogpt": nanogpt.main,
    "bench.op": op.main,
    "bench.report": report.main,
    "doctor": doctor.main,
    "bench.steps": steps.main,
    "bench.tune": tune.main,
}

# Flags that make each command line a good one, but for what a case adds.
SMALL = (
    "--config=small.py --steps=2 --batch_size=4 --model.n_layer=2 --model.n_head=2 --model.d_model=32 "
    "--model.seq_len=32 "
    "--data.corpus=text --data.tokenizer=bytes --data.val_fraction=0.1 --data.cache=cache --eval_tokens=256 "
    "--precision=fp32 --compile=off --device=cpu --save_every=1"
)
GOOD = {
    "train": f"{SMALL} --run=new",
    "generate": "--run=small --tokens=2",
    "evaluate": "--run=small",
    "experiments": "--dry-run",
    "bench.nanogpt": "--corpus=text",
}

# A line is a flag, ending in =, with bad values: the error names the flag or the value. Or it is a whole bad command
# line, => and what the error says.
TABLE = {
    "train": """
        --steps=                       -1 1.5 many 1e3 0x10 nan 99999999999999999999
        --tokens=                      -1 lots inf
        --seconds=                     -1 nan inf 1e999 5min
        --time_limit=                  -1 nan inf soon
        --optimizer=                   sgd Adam ""
        --lr=                          0 -1 nan inf 1e-400 high ""
        --muon_lr=                     0 -0.1 nan
        --weight_decay=                -1 nan inf
        --beta1=                       1 -0.1 nan
        --beta2=                       1.0 2 x
        --eps=                         0 -1e-8 nan
        --clip=                        -1 nan inf
        --schedule=                    step cos
        --warmup=                      -1 nan inf
        --decay=                       0 1.5 nan
        --final_lr=                    -0.1 1.1 nan
        --seed=                        -1 1.5 x 18446744073709551616
        --model.n_layer=               0 -1 2.5 20000 1000000000000
        --model.n_head=                0 -2 x 5
        --model.n_kv_head=             -1 3 x
        --model.head_dim=              -2 7 x
        --model.d_model=               0 -32 31 wide
        --model.d_ff=                  -1 2.5
        --model.seq_len=               0 -1 long
        --model.vocab_size=            -1 256 x
        --model.tied=                  2 maybe ""
        --model.qk_norm=               yes 0.5
        --model.rope_theta=            0 -1 nan inf
        --model.norm_eps=              0 nan -1
        --model.window=                0 -1 X SLX:4 S:0 S: 1.5
        --model.separator=             -2 x
        --model.dropout=               1 -0.1 nan
        --model.norm=                  batch RMS
        --model.norm_place=            middle
        --model.position=              absolute
        --model.activation=            tanh
        --model.bias=                  some
        --model.init=                  zeros
        --model.embedding_std=         -1 nan inf
        --model.recompute=             1.5 -1 nan
        --model.logit_softcap=         -1 nan inf
        --model.label_smoothing=       1 -0.1 nan
        --model.z_loss=                -1 nan inf
        --data.tokenizer=              words "" hub: hub:nope/ hub:org/name:x text text/0.txt list.json
        --data.vocab_size=             256 -1 x
        --data.val_fraction=           0 1 -0.5 nan
        --data.max_tokens=             -1 x
        --data.packing=                tight
        --data.shift=                  2 -1
        --data.corpus=                 nowhere nowhere.jsonl empty empty.txt bad.jsonl bad.parquet bad.txt.gz
        --data.corpus=                 bad.jsonl.zst blob.bin list.json hub:nope/ hub: text#body bad.jsonl#body
        --data.corpus=                 nowhere/*.txt text:0.5,nowhere:0.5 text:0,bad.jsonl:1 text:1,bad.jsonl shards
        --data.corpus=shards           => pickle
        --data.corpus=                 => data.corpus
        --data.cache=                  "" text/0.txt text/0.txt/cache
        --kernels=                     cuda Triton ""
        --kernels=                     mine.py:swiglu
        --kernels.swiglu=              nowhere.py:swiglu imports.py raises.py: callable.py:lr callable.py:rl text.py:f
        --kernels.swiglu=              raises.py:f exits.py:f quits.py:f imports.py:f binary.py:f
        --kernels.rope=                fast
        --kernels.attention=           flash2
        --kernels.rmsnorm=             apex
        --kernels.linear_cross_entropy= liger
        --kernels.fp8_linear=          sdpa
        --kernels.block_scaled_linear= cublas
        --device=                      tpu cuda:99 gpu cpu:1 meta ""
        --precision=                   fp4 float32
        --head_precision=              bf16 fp8 ""
        --residual=                    fp16 bf16
        --compile=                     true maybe
        --capture=                     1 on
        --deterministic=               2 maybe
        --shard=                       some "" 2 Full full hybrid
        --batch_size=                  0 -1 2.5 1e3 "" 1000000000000000000000
        --micro_batch=                 -1 3 x all
        --log_every=                   0 -1 often
        --eval_every=                  0 -1 1.5
        --eval_tokens=                 0 -1
        --save_every=                  0 -1
        --sample_every=                -1 x
        --diag=                        -1 x
        --profile=                     0 x 5:0 :3 1.5 1e3
        --wandb=                       on True
        --compare=                     -1 nan x
        --log=                         on "" wandb,x ,tensorboard
        --run=                         a/b .. . ../x /abs out/small
        --config=                      nowhere.py text flat.yaml nested.yaml knobs.json exits.py raises.py imports.py
        --config=                      syntax.py divides.py binary.py quits.py
        --config=unknown.py            => learning_rate
        --config=typed.py              => muon_lr
        --config=callable.py           => lr must be a number
        --out=                         text/0.txt text/0.txt/out
        --rn=new                       => --run
        --Lr=1                         => --lr
        --model=x                      => model
        --model.nlayer=2               => n_layer
        --data.                        => data.
        -x                             => -x
        stray                          => stray
        new words "and more"           => new
        --                             => no flag called --
        --lr                           => --lr
        --steps=2 --tokens=100         => exactly one of steps, tokens and seconds
        --seconds=1 --steps=2          => exactly one of steps, tokens and seconds
        --steps=0                      => exactly one of steps, tokens and seconds
        --batch_size=4 --micro_batch=3 => multiple of micro_batch
        --batch_size=1000000000        => batch_size
        --model.d_model=1000000000     => d_model
        --model.n_layer=10000 --model.d_model=32768 => memory
        --model.seq_len=1000000000     => seq_len
        --model.d_model=30 --model.n_head=4    => multiple of n_head
        --model.n_head=4 --model.n_kv_head=3   => multiple of n_kv_head
        --model.norm=none --model.norm_place=post => norm
        --model.init=look-back --model.position=none => look-back
        --model.vocab_size=100         => vocab_size
        --data.tokenizer=bpe --data.vocab_size=100000 => vocab_size
        --data.corpus=text/0.txt --model.seq_len=100000 => seq_len
        --seconds=5 --steps=0 --warmup=10 => warmup
        --resume --run=none            => none
        --resume --run=cut             => last.pt
        --resume --run=lost            => lost
        --resume --run=alien           => last.pt
        --resume --run=pickled         => last.pt
        --resume --run=untokenized --steps=9 => tokenizer.json
        --resume --run=partless        => model_config
        --resume --run=unsharded       => is missing
        --resume --run=reshaped --steps=9 => norm.gain
        --resume --run=knobbed         => bogus
        --resume --run=imported        => imported
        --resume --run=small --steps=9 --init_from=hf => init_from
        --init_from=                   nowhere text out/cut hub: hub:a/b/c
        --init_from=hf --model.n_layer=3 => leave it out
        --init_from=small --data.tokenizer=gpt2 => data.tokenizer
        --resume --overwrite --run=small => --overwrite
        --resume --run=small --model.d_model=64 => d_model
        --resume --run=small --optimizer=adamw => optimizer
        --resume --run=small --data.tokenizer=bpe --data.vocab_size=300 => vocab
        --resume --run=small --steps=1 => steps
        --overwrite --run=hf           => not a run
        --overwrite --run=linked       => link
        --overwrite --run=notes        => not a run
        --run=small                    => exists
        --run=hf                       => exists
        --print_config=                maybe
        --print_config --device=tpu    => tpu
        --print_config --resume --run=none => none
        --print_config --resume --run=hf   => config.json
        --eval_only=                   maybe
        --eval_only --run=none         => none
        --eval_only --run=lost         => lost
        --eval_only --run=cut          => last.pt
        --eval_only --run=imported     => imported
        -h modle                       => modle
        -h --config=nowhere.py         => nowhere.py
    """,
    "generate": """
        --run=                         nowhere out/nowhere out text hf "" . /
        --run=                         cut lost alien pickled untokenized partless reshaped knobbed badtokens
        --checkpoint=                  newest best.pt ""
        --tokens=                      0 -1 1.5 x inf 99999999999999999999
        --temperature=                 -1 nan inf 1e-39 1e39 warm ""
        --top-k=                       -1 2.5 x 99999999999999999999
        --top-p=                       0 -1 1.1 nan x
        --seed=                        1.5 x 18446744073709551616 -9223372036854775809
        --stop=                        ab ""
        --device=                      tpu cuda:99 ""
        --precision=                   fp8 ""
        --kernels=                     cuda flash ""
        --bogus=1                      => --bogus
        stray                          => stray
        --tokens                       => --tokens
        --run                          => --run
        --prompt                       => --prompt
        --run=nan                      => NaN
    """,
    "evaluate": """
        --data=                        nowhere empty empty.txt bad.jsonl blob.bin ""
        --tokens=                      0 -1 x
        --stride=                      0 -1 33 x
        --batch-size=                  0 1.5
        --checkpoint=                  newest
        --device=                      tpu
        --run=imported                 => --data
        --run=cut                      => last.pt
        --bogus=1                      => --bogus
    """,
    "export": """
        --to=new                       => --run
        --run=small                    => --to
        --run=small --to=a --from=hf   => --from
        --run=small --to               => --to
        --run=small --bogus            => --to
        --run=small --to=text          => text
        --run=small --to=text/0.txt    => text/0.txt
        --run=small --to=text/0.txt/hf => text/0.txt
        --run=small --to=deep/a.gguf   => gguf
        --run=small --to=deep/a.pt     => deep
        --run=small --to=text/0.txt/a.pt => text/0.txt
        --run=small --to=out/small/last.pt => exists
        --run=nowhere --to=a.pt        => nowhere
        --run=cut --to=a.pt            => last.pt
        --run=lost --to=a.pt           => lost
        --run=pickled --to=a.pt        => last.pt
        --run=unsharded --to=a.pt      => is missing
        --run=unsharded --to=new       => is missing
        --run=text --to=a.gguf         => text
        --run=nowhere --to=new         => nowhere
        --run= --to=new                => not a run
        --run=text --to=new            => text
        --run=cut --to=new             => last.pt
        --run=lost --to=new            => lost
        --run=alien --to=new           => last.pt
        --run=partless --to=new        => model_config
        --run=reshaped --to=new        => norm.gain
        --run=untokenized --to=new     => tokenizer.json
        --run=biased --to=deep/new     => bias
        --run=capped --to=deep/new     => logit_softcap
        --run=windowed --to=deep/new   => window
        --run=small --from=hf          => exists
        --run=out/small --from=hf      => exists
        --run=new --from=nowhere       => nowhere
        --run=new --from=text          => text
        --run=new --from=text/0.txt    => text/0.txt
        --run=new --from=out/small     => is a run
        --run=text/0.txt/new --from=hf => text/0.txt
    """,
    "plan": """
        --config=                      nowhere.py flat.yaml exits.py ""
        --card=                        TPU
        --cards=                       0 -8 7 1024 x 1.5
        --per_machine=                 0 x
        --achieved=                    0 1.5 nan half
        --shard=                       some ""
        --batch_size=                  0 100 x
        --micro_batch=                 0 0.5 48 big "" 128
        --precision=                   fp8
        --optimizer=                   sgd
        --kernels=                     cuda
        --model.n_head=                7
        --model.n_layer=               0 -1
        --bogus=1                      => --bogus
        stray                          => stray
    """,
    "lm_eval": """
        --run=small                    => --tasks
        --tasks=hellaswag              => --run
        --limit=                       0 -1 x
        --num-fewshot=                 -1 x
        --batch-size=                  0 1.5
        --run=small --tasks=nowhere    => lm
        --bogus                        => --
    """,
    "experiments": """
        --scale=                       big ""
        --jobs=                        0 -1 x 1.5
        --seeds=                       0 -1 x
        --time-limit=                  x nan -1
        --within=                      soon -5s nan 5years ""
        --wandb=                       on
        lr --set=                      lr bogus=1 lr=fast batch_size=0 "" =
        --base=                        nowhere.py flat.yaml exits.py text ""
        --base=small.py --budget=      60 s -1s nan 60parsecs 0s 1.2.3s
        --base=small.py --budget=60s --grid=    lr bogus=1 lr= lr=fast model.n_layer=0 = lr=1e-3,,2e-3
        --base=small.py --budget=60s --versus=  norm model.norm=batch bogus=1,2
        --base=small.py --budget=60s --name=    a/b .. ""
        --results=                     text/0.txt
        nowhere                        => nowhere
        lr nowhere                     => nowhere
        report nowhere                 => nowhere
        --grid=lr=1e-3                 => --base
        --versus=model.norm=rms,layer  => --base
        --budget=60s                   => --base
        compare                        => two
        compare small                  => two
        compare small small small      => two
        compare nowhere small          => nowhere
        compare out/small text         => text
        --bogus                        => --bogus
    """,
    "bench.compare": """
        --run=small --seconds=         0 -1 nan x
        --run=nowhere                  => nowhere
        --seconds=1                    => --run
        --run=small stray              => stray
    """,
    "bench.gpu": """
        tunes                          => tunes
        --bogus                        => --bogus
    """,
    "bench.nanogpt": """
        --seconds=                     0 -1 nan inf x
        --corpus=text                  => --seconds
        --seconds=1 --corpus=nowhere   => nowhere
        --seconds=1 stray              => stray
    """,
    "bench.op": """
        nowhere                        => nowhere
        "" --bogus                     => op
        swiglu --implementation=       nowhere.py:swiglu raises.py:f callable.py:lr callable.py flat.yaml
    """,
    "doctor": """
        stray                          => stray
        --bogus                        => --bogus
    """,
    "bench.report": """
        stray                          => stray
        --bogus                        => --bogus
    """,
    "bench.steps": """
        --shape=                       huge
        --variant=                     fast
        --seconds=                     0 -1 nan x
        stray                          => stray
    """,
    "bench.tune": """
        --candidates=                  0 -1 x
        --seconds=                     0 -1 nan inf
        stray                          => stray
    """,
}

# Changes of a Hugging Face config.json; each is a folder to import, whose error must name the key.
CONFIGS = [
    ("model_type", "mamba"), ("model_type", None), ("num_hidden_layers", 1), ("num_hidden_layers", 3),
    ("num_hidden_layers", "2"), ("num_hidden_layers", None), ("num_hidden_layers", 2.0), ("num_hidden_layers", 10**12),
    ("num_attention_heads", 0), ("num_attention_heads", 3), ("num_key_value_heads", -1), ("head_dim", 8.5),
    ("hidden_size", None), ("hidden_size", [32]), ("hidden_size", True), ("intermediate_size", "wide"),
    ("vocab_size", {}), ("vocab_size", 0), ("max_position_embeddings", None), ("rms_norm_eps", "small"),
    ("rms_norm_eps", -1), ("tie_word_embeddings", "yes"), ("tie_word_embeddings", False), ("rope_parameters", "plain"),
    ("rope_theta", float("nan")), ("hidden_act", "gelu"), ("attention_bias", True), ("quantization_config", {}),
]  # fmt: skip
FILES = {
    "empty.txt": b"",
    "bad.jsonl": b'{"text": "one"}\n{"text": ',
    "bad.parquet": b"PAR1 and no more",
    "bad.txt.gz": b"\x1f\x8b and no more",
    "bad.jsonl.zst": b"\x28\xb5\x2f\xfd and no more",
    "blob.bin": bytes(range(256)) * 9,
    "list.json": b"[1, 2",
    "flat.yaml": b"lr: 0.001\nbatch_size: 4\n",
    "nested.yaml": b"model:\n  n_layer: 4\n",
    "knobs.json": b'{"lr": 0.001}',
    "exits.py": b"import sys\nsys.exit()\n",
    "quits.py": b"quit()\n",
    "raises.py": b"raise RuntimeError('no\\nluck')\n",
    "imports.py": b"import nowhere\n",
    "syntax.py": b"lr = = 1\n",
    "divides.py": b"lr = 1 / 0\n",
    "unknown.py": b"learning_rate = 1e-3\n",
    "typed.py": b"muon_lr = 'high'\n",
    "callable.py": b"lr = lambda: 1e-3\n",
    "binary.py": b"\x00\xff\xfe",
}


class Case(NamedTuple):
    """A bad command line of a program, and words of which its error must have one."""

    program: str
    argv: list[str]
    said: list[str]


def cases() -> list[Case]:
    """The whole table."""
    found = []
    for program, text in TABLE.items():
        good = shlex.split(GOOD.get(program, ""))
        for line in filter(None, map(str.strip, text.splitlines())):
            line, _, said = (part.strip() for part in line.partition("=>"))
            if said:
                found.append(Case(program, [*good, *shlex.split(line)], [said]))
                continue
            words = shlex.split(line)
            last = next(i for i, word in enumerate(words) if word.endswith("="))
            flag, values = words[: last + 1], words[last + 1 :]
            name = flag[-1].strip("-=").rpartition(".")[2]
            for value in values:
                said = [word for word in (name, value, *value.split("=")) if word]
                found.append(Case(program, [*good, *flag[:-1], flag[-1] + value], said))
    for i, (key, _) in enumerate(CONFIGS):
        found.append(Case("export", ["--run=new", f"--from=hf{i}"], [key]))
    return found


def set_up(folder: Path) -> None:
    """Make what the command lines name: texts, bad files, a run and damaged ones, its export and contradictory ones."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for name in ("text", "empty", "shards", "out/notes"):
        (folder / name).mkdir(parents=True)
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (folder / "shards" / name).write_bytes(b"\1\0" * 99)
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text(f"The quick brown fox {i} jumps over the lazy dog. " * 20)
    (folder / "out/notes/notes.txt").write_text("mine")
    llama = "--model.qk_norm=false --model.init=fan-in"
    varied = {"biased": "--model.bias", "capped": "--model.logit_softcap=30", "windowed": f"{llama} --model.window=8"}
    for name, flags in {"small": "", **varied}.items():
        assert train.main(shlex.split(f"{SMALL} --run={name} {flags}")) == 0
    assert export.main(["--run=small", "--to=hf"]) == 0 == export.main(["--run=imported", "--from=hf"])
    shutil.copytree("hf", "out/hf")
    Path("out/linked").symlink_to("small")

    config = json.loads(Path("hf/config.json").read_text())
    for i, (key, value) in enumerate(CONFIGS):
        shutil.copytree("hf", f"hf{i}")
        changed = {k: v for k, v in (config | {key: value}).items() if v is not None}
        if key == "rope_theta":
            del changed["rope_parameters"]
        Path(f"hf{i}/config.json").write_text(json.dumps(changed))

    def damaged(name: str) -> Path:
        run = Path(shutil.copytree("out/small", f"out/{name}"))
        for path in run.glob("*.pt"):
            path.unlink() if path.name != "last.pt" else None
        return run

    state = checkpoint.load(Path("out/small/last.pt"))
    weights = state["model"]
    broken = {
        "alien": {"format": "another"},
        "partless": {key: value for key, value in state.items() if key != "model_config"},
        "reshaped": state | {"model": weights | {"norm.gain": torch.ones(3)}},
        "knobbed": state | {"model_config": state["model_config"] | {"bogus": 1}},
        "nan": state | {"model": weights | {"norm.gain": weights["norm.gain"] * torch.nan}},
        "pickled": state | {"config": Path("text")},
        "unsharded": state | {"format": checkpoint.SHARDED_FORMAT, "shards": {"folder": "shards-2", "files": {"a": 1}}},
    }
    for name, content in broken.items():
        torch.save(content, damaged(name) / "last.pt")
    cut = damaged("cut") / "last.pt"
    cut.write_bytes(cut.read_bytes()[:999])
    (damaged("lost") / "last.pt").unlink()
    (damaged("untokenized") / "tokenizer.json").unlink()
    (damaged("badtokens") / "tokenizer.json").write_text("{}")


def snapshot(folder: Path) -> dict[str, tuple]:
    """Every file below a folder, with what changes when it is written, every folder and every link.

    Text prepared whole may be added to the cache: the next run takes it from there."""
    found = {}
    for path in folder.rglob("*"):
        name, stat = str(path.relative_to(folder)), path.lstat()
        if not name.startswith("cache") or ".partial" in name:
            found[name] = () if path.is_dir() else (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def fault(case: Case, folder: Path, programs: Mapping[str, Callable[[list[str]], int]] = PROGRAMS) -> str:
    """What is wrong with how the program takes a bad command line; "" if nothing is."""
    before, out, err = snapshot(folder), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = programs[case.program](case.argv)
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            return traceback.format_exc().strip()[-800:]
    after, error = snapshot(folder), err.getvalue()
    if before != after:
        gc.collect()  # as the end of a process does: a lock that a traceback held is let go
        after = snapshot(folder)
    if code != 2:
        return f"exit code {code}, not 2: {(error + out.getvalue()).strip()[-800:]}"
    if not error.startswith("error: ") or error.count("\n") != 1:
        return f"not one sentence: {error!r}"
    if more := [line for line in out.getvalue().splitlines() if not line.startswith("prepared ")]:
        return f"more than an error: {more}"
    if not any(word in error for word in case.said):
        return f"does not say {' or '.join(case.said)}: {error.strip()}"
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return f"changed {', '.join(changed)}; it said {error.strip()}" if changed else ""


def faults(folder: Path, every: int = 1) -> Iterator[tuple[Case, str]]:
    """Try every n-th command line in an empty folder, which ends as it began. Yields each with its fault, or ""."""
    with tempfile.TemporaryDirectory() as spare:
        with chdir(folder), redirect_stdout(io.StringIO()):
            set_up(folder)
        pristine = Path(shutil.copytree(folder, Path(spare, "pristine"), symlinks=True))
        for case in cases()[::every]:
            with chdir(folder):
                found = fault(case, folder)
            yield case, found
            if found:  # it may have changed what the next ones find
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                shutil.copytree(pristine, folder, symlinks=True, dirs_exist_ok=True)


def main() -> int:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only every n-th command line")
    args = parser.parse_args()
    begin, n, bad = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for case, found in faults(Path(folder).resolve(), args.every):
            n += 1
            if found:
                bad += 1
                argv = case.argv[len(shlex.split(GOOD.get(case.program, ""))) :]
                print(f"{case.program} {shlex.join(argv)}\n    {found}".replace("\n", "\n    "), flush=True)
    print(f"{n} bad command lines, {bad} not refused as they should be, {time.monotonic() - begin:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
