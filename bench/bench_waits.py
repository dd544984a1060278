"""What a user waits for besides the step, beside a peer or a limit: turn by turn in one run.

    pytest bench/bench_waits.py --size full    # one text file of 1 GB rather than 256 MB

Text is lines of the standard library's sources, drawn by a seed.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.utils._pytree import tree_leaves

from bench.bench_train import process
from bench.harness import DEVICE
from bench.processes import ROOT
from bench.steps import SHAPES, Knobs, trainer_of
from bench.timing import synchronize
from data.corpora import open_corpus
from data.formats import pieces
from model import export
from model.generate import generate
from model.load import load_run
from runtime.hardware import autocast
from train import Trainer


@dataclass(frozen=True)
class Size:
    """How much of each: text in MB, tokens generated in each row of a batch, steps of a trial."""

    turns: int
    documents: int
    text: int
    vocabulary: int
    model: Knobs
    tokens: int
    saved: Knobs
    steps: int
    compile: str = "auto"


MODEL = {"config": "tinystories.py", "model.seq_len": 512, "model.vocab_size": 10_000, "batch_size": 1}
SMALL = {"model.n_layer": 1, "model.n_head": 2, "model.d_model": 32, "model.seq_len": 32, "model.vocab_size": 300}
USUAL = Size(3, 100, 256, 32_768, MODEL, 128, SHAPES["124M"] | {"model.seq_len": 64}, 150)
SIZES = {
    "usual": USUAL,
    "full": replace(USUAL, text=1000),
    "tiny": Size(1, 2, 1, 512, SMALL, 8, SMALL, 5, "off"),
}


@pytest.fixture(scope="module")
def size(pytestconfig) -> Size:
    return SIZES[pytestconfig.getoption("size")]


def timed(call: Callable[[], object], **row) -> dict:
    synchronize()
    begin = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - begin, **row}


# Preparation


@dataclass(frozen=True)
class Text:
    """A file of so many MB, and the folder of its preparations."""

    file: Path
    megabytes: int

    @property
    def cache(self) -> Path:
        return self.file.parent / "cache"

    def prepare(self, **config) -> dict:
        config = json.dumps({"corpus": str(self.file), "cache": str(self.cache), **config})
        return process("-m", "bench.preparation", "nanofuse", config).said | {"amount": self.megabytes}

    def prepare_anew(self, **config) -> dict:
        shutil.rmtree(self.cache, ignore_errors=True)
        return self.prepare(**config)

    def peer(self, way: str, *arguments: object) -> dict:
        """A turn of another way. Its memory is not compared: some begin with the documents, some have processes."""
        said = process("-m", "bench.preparation", way, self.file, *arguments).said
        return {"seconds": said["seconds"], "tokens": said["tokens"], "amount": self.megabytes}

    def prepare_again(self, **config) -> dict:
        """Prepare with the vocabulary of the last time, as if that had been interrupted once it had one."""
        (manifest,) = self.cache.glob("*/manifest.json")
        prepared, begun = manifest.parent, manifest.parent.with_name(manifest.parent.name + ".partial")
        begun.mkdir()
        (prepared / "tokenizer.json").rename(begun / "tokenizer.json")
        shutil.rmtree(prepared)
        return self.prepare(**config)


@pytest.fixture(scope="module")
def write(tmp_path_factory) -> Callable[[str, int], Text]:
    """Write so many MB as documents (`.jsonl`) or as one text (`.txt`)."""
    texts = ("".join(pieces(document)) for shard in open_corpus("stdlib").shards() for document in shard.read())
    lines = list(chain.from_iterable(text.splitlines(keepends=True) for text in texts))

    def drawn(megabytes: int) -> Iterator[str]:
        rng, left = random.Random(0), 1e6 * megabytes
        while left > 0:
            yield (text := "".join(rng.choices(lines, k=100)))
            left -= len(text.encode())

    @cache
    def written(suffix: str, megabytes: int) -> Text:
        path = tmp_path_factory.mktemp("text") / f"text{suffix}"
        with path.open("w", encoding="utf-8") as file:
            for text in drawn(megabytes):
                file.write(text if suffix == ".txt" else json.dumps({"text": text}) + "\n")
        return Text(path, megabytes)

    return written


@pytest.fixture
def documents(write, size) -> Text:
    return write(".jsonl", size.documents)


@pytest.fixture
def one_file(write, size) -> Text:
    return write(".txt", size.text)


@pytest.fixture(scope="module")
def bpe(size) -> dict:
    return {"tokenizer": "bpe", "vocab_size": size.vocabulary}


def test_train_bpe(documents, one_file, bpe, size, race):
    """Training a vocabulary, with the first tokens, since there is no corpus without any."""
    texts = {"nanofuse": one_file, "from JSONL": documents}
    turns = {who: partial(text.prepare_anew, max_tokens=1, **bpe) for who, text in texts.items()}
    race(f"BPE of {size.vocabulary:,} from one text file of {one_file.megabytes} MB", size.turns, turns)


def test_prepare_documents(documents, bpe, size, race, tmp_path):
    tokens = documents.prepare_anew(**bpe)["tokens"]
    vocabulary = shutil.copy(*documents.cache.glob("*/tokenizer.json"), tmp_path)
    turns = {
        "nanofuse": partial(documents.prepare_again, **bpe),
        "tiktoken's buffers alone": partial(documents.peer, "buffers", vocabulary),
        "nanoGPT's way": partial(documents.peer, "nanogpt", vocabulary, tmp_path / "ids"),
    }
    row = race(f"prepare {size.documents} MB of JSONL with a vocabulary at hand", size.turns, turns, "MB")
    assert all(result["tokens"] == tokens for result in row["results"].values())


def test_prepare_one_file(documents, one_file, bpe, size, race):
    texts = {"nanofuse": one_file, "from JSONL": documents}
    for text in texts.values():
        text.prepare_anew(**bpe)
    turns = {who: partial(text.prepare_again, **bpe) for who, text in texts.items()}
    race(f"prepare one text file of {size.text} MB with a vocabulary at hand", size.turns, turns, "MB")


def test_prepare_bytes(documents, size, race, tmp_path):
    turns = {
        "nanofuse": partial(documents.prepare_anew, tokenizer="bytes"),
        "a copy of the file": partial(documents.peer, "copy", tmp_path / "copy"),
    }
    race(f"prepare {size.documents} MB of JSONL as bytes", size.turns, turns, "MB")


# Generation


def saved(trainer: Trainer) -> dict:
    """The time for which a save blocks. Writing goes on in the background, and is waited for."""
    row = timed(trainer.save)
    trainer.saver.wait()
    return row


@pytest.fixture(scope="module")
def trainer(size, tmp_path_factory) -> Trainer:
    """A run of an untrained model, with a checkpoint, and exported to `hf` in its folder."""
    place = tmp_path_factory.mktemp("model")
    trainer = trainer_of(size.model | {"compile": "off"}, place)
    saved(trainer)
    export.main([f"--run={trainer.run.folder}", f"--to={trainer.run.folder / 'hf'}"])
    return trainer


def label(trainer: Trainer) -> str:
    return f"generate, {trainer.model.n_parameters() / 1e6:.0f}M"


def generating(trainer: Trainer, rows: int, prompt: int, tokens: int, precision: str = "fp32") -> Callable[[], dict]:
    """A turn of generation after random prompts."""
    model, _ = load_run(trainer.run.folder, DEVICE, precision=precision)
    prompts = torch.randint(model.config.vocab_size, (rows, prompt)).tolist()

    def turn() -> None:
        with autocast(DEVICE, precision):
            new = generate(model, prompts, tokens, temperature=0.8, generator=torch.Generator().manual_seed(0))
        assert [len(row) for row in new] == [tokens] * rows

    return partial(timed, turn, amount=rows * tokens)


def llama_cpp(trainer: Trainer, rows: int, prompt: int, tokens: int) -> Callable[[], dict]:
    """A turn of llama.cpp, which runs on the CPU, with its own defaults. Raises ImportError where it is missing."""
    import gguf  # noqa: F401 - the export needs it
    import xllamacpp

    file = trainer.run.folder.with_suffix(".gguf")
    if not file.exists():
        export.main([f"--run={trainer.run.folder}", "--to=gguf"])
    params, shape = xllamacpp.CommonParams(), trainer.model.config
    params.model.path, params.n_parallel, params.n_ctx = str(file), rows, rows * shape.seq_len
    params.cpuparams.n_threads, params.fit_params = torch.get_num_threads(), False
    server = xllamacpp.Server(params)
    sampling = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    request = {"prompt": torch.randint(shape.vocab_size, (rows, prompt)).tolist(), "n_predict": tokens} | sampling

    def turn() -> None:
        answer = server.handle_completions(request | {"ignore_eos": True, "cache_prompt": False})
        assert (len(answer["choices"]), answer["usage"]["completion_tokens"]) == (rows, tokens)  # those of a row

    return partial(timed, turn, amount=rows * tokens)


@pytest.mark.parametrize("rows", [1, 8])
def test_generate(trainer, size, rows, race):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(trainer.run.folder / "hf").to(DEVICE)
    model.generation_config.eos_token_id = None
    ids = torch.randint(model.config.vocab_size, (rows, 16), device=DEVICE)
    options = {"max_new_tokens": size.tokens, "do_sample": True, "temperature": 0.8, "top_k": 0, "pad_token_id": 0}

    def theirs() -> None:
        assert model.generate(ids, attention_mask=torch.ones_like(ids), **options).shape == (rows, 16 + size.tokens)

    turns = {"nanofuse": generating(trainer, rows, 16, size.tokens)}
    turns["transformers"] = partial(timed, theirs, amount=rows * size.tokens)
    if DEVICE.type == "cpu":
        with suppress(ImportError):
            turns["llama.cpp"] = llama_cpp(trainer, rows, 16, size.tokens)
    race(f"{label(trainer)}, batch {rows}, temperature 0.8", size.turns, turns, "tok")


@pytest.mark.parametrize("rows", [1, 8])
def test_generate_in_half_precision(trainer, size, rows, race):
    turns = {who: generating(trainer, rows, 16, size.tokens, who) for who in ("bf16", "fp32")}
    race(f"{label(trainer)}, batch {rows}, --precision bf16", size.turns, turns, "tok")


def test_generate_past_the_context(trainer, size, race):
    """As many tokens as the context has, after a prompt of one token and after one that fills it."""
    context = size.model["model.seq_len"]
    past, before = generating(trainer, 1, context, context), generating(trainer, 1, 1, context - 1)
    race(f"{label(trainer)}, past the context of {context}", size.turns, {"nanofuse": past, "up to it": before}, "tok")


# Saves


def test_save(size, race, tmp_path):
    """How long training waits: at the least for a copy of the state."""
    trainer = trainer_of(size.saved | {"batch_size": 1, "compile": "off", "capture": "off"}, tmp_path)
    shape = trainer.model.config
    trainer.train_step(*torch.randint(shape.vocab_size, (2, 1, shape.seq_len)), 0.5)  # makes the optimizer's state
    parts = trainer.model.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]
    tensors = [x for x in tree_leaves(parts) if isinstance(x, Tensor)]
    state = {str(x.data_ptr()): x for x in tensors}  # a tied head is the embedding
    kept = {name: torch.empty_like(x, device="cpu") for name, x in state.items()}

    def copy() -> None:
        for name, x in state.items():
            kept[name].copy_(x)

    def async_save() -> dict:
        futures = []
        row = timed(lambda: futures.append(dcp.async_save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)))
        futures[0].result()
        return row

    gigabytes = sum(x.nbytes for x in state.values()) / 1e9
    turns = {"nanofuse": partial(saved, trainer), "a copy": partial(timed, copy), "DCP async_save": async_save}
    race(f"save {gigabytes:.2f} GB, training waits", size.turns, turns)


# Processes


def test_trial(write, size, race, tmp_path):
    knobs = {"data.corpus": write(".txt", 1).file, "data.cache": tmp_path / "cache", "steps": size.steps}
    sweep = ["bars", "--scale=tiny", f"--seeds={size.turns}", "--jobs=1"]
    folders = [f"--results={tmp_path / 'results'}", f"--out={tmp_path / 'out'}"]
    process("-m", "experiments", *sweep, *folders, *(f"--set={knob}={value}" for knob, value in knobs.items()))
    ledger = (tmp_path / "results/tiny/bars.jsonl").read_text()
    outcomes = [json.loads(line) for line in ledger.splitlines()]
    assert [outcome["status"] for outcome in outcomes] == ["finished"] * size.turns
    whole = iter([{"seconds": outcome["seconds"]} for outcome in outcomes])
    training = iter([{"seconds": outcome["steps"][-1]["seconds"]} for outcome in outcomes])
    turns = {"nanofuse": whole.__next__, "its training": training.__next__}
    race(f"a trial of {size.steps} steps at tiny", size.turns, turns)


def ending(*command: object) -> dict:
    """Seconds from the last line that a process prints to its end."""
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE) as child:
        for _ in child.stdout:
            begin = time.perf_counter()
    assert child.returncode == 0
    return {"seconds": time.perf_counter() - begin}


def test_end_of_a_run(write, size, race, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # bench/conftest.py sets 1
    knobs = {"data.corpus": write(".txt", 1).file, "data.cache": tmp_path, "out": tmp_path, "compile": size.compile}
    run = "train.py", "--config=trial.py", "--steps=5", *(f"--{knob}={value}" for knob, value in knobs.items())
    alone = "-c", "import torch; print(flush=True)"
    turns = {"nanofuse": partial(ending, *run), "torch imported alone": partial(ending, *alone)}
    race("end of a run, after its last word", size.turns, turns)


def test_list_of_experiments(size, race):
    commands = {"nanofuse": ("-m", "experiments"), "import torch": ("-c", "import torch")}
    turns = {who: partial(timed, partial(process, *command)) for who, command in commands.items()}
    race("python -m experiments", size.turns, turns)
