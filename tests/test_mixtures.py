"""Corpora that are tokens already, and mixtures: their arrays, shares, splits and errors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import prepare as module
from data.batches import Batches
from data.corpora import open_corpus
from data.formats import DataError, Mixture, TokenFiles
from data.prepare import DataConfig, prepare, reopen
from data.tokenizer import byte_tokenizer
from data.tokens import Tokens, interleave, mixed_lengths

BYTES = byte_tokenizer()


def write(folder: Path, **files) -> Path:
    """A folder of text files, by name without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def tokens(*texts: str) -> np.ndarray:
    return BYTES.encode_documents([piece for text in texts for piece in (text, None)])


def header(magic: int, version: int, count: int) -> bytes:
    return np.array([magic, version, count, *[0] * 253], np.int32).tobytes()


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder of tokens of raw bytes: two shards to train on, of two formats, and one to validate on."""
    folder = tmp_path / "shards"
    folder.mkdir()
    first, second, val = tokens("one", "two"), tokens("three"), tokens("four", "five")
    (folder / "text_train_000001.bin").write_bytes(header(20240520, 1, len(first)) + first.tobytes())
    (folder / "text_train_000002.bin").write_bytes(
        header(20240801, 7, len(second)) + second.astype(np.uint32).tobytes()
    )
    (folder / "text_val_000000.bin").write_bytes(val.tobytes())
    (folder / "input.txt").write_text("The text that these tokens were made of.")
    return folder


@pytest.fixture
def open_(tmp_path):
    """A function that prepares a corpus with the bytes tokenizer by default."""

    def open_(corpus: object, **config):
        config = {"tokenizer": "bytes", "val_fraction": 0.2, "cache": str(tmp_path / "cache")} | config
        return prepare(DataConfig(corpus=str(corpus), **config), open_.lines.append)

    open_.lines = []
    return open_


def test_arrays_are_indexed_as_one():
    arrays = [np.arange(5, dtype=np.uint16), np.arange(100, 103, dtype=np.uint32)]
    joined = Tokens(arrays, [5, 3])
    expected = np.concatenate(arrays)
    assert len(joined) == 8 and joined.dtype == np.uint32
    for index in (slice(None), slice(2, 7), slice(-3, None), -1, 4, np.array([[7, 0], [-8, 5]])):
        assert np.array_equal(joined[index], expected[index])
    repeated = Tokens(arrays, [2, 7])
    assert repeated[:].tolist() == [3, 4, 102, 100, 101, 102, 100, 101, 102]  # each ends with the array's end


def test_every_part_is_used_and_the_short_ones_are_repeated():
    assert mixed_lengths([70, 30], [0.7, 0.3]) == [70, 30]
    assert mixed_lengths([700, 3], [0.7, 0.3]) == [700, 300]
    assert mixed_lengths([700, 3], [0.7, 0.3], limit=100) == [70, 30]
    assert mixed_lengths([7, 3], [0.7, 0.3], limit=100) == [7, 3]


def test_any_beginning_has_each_part_in_its_share(monkeypatch):
    monkeypatch.setattr("data.tokens._PIECE", 64)
    arrays = [np.full(n, i, np.uint16) for i, n in enumerate((50_000, 2_000, 90_000))]
    arrays[0][99::100] = arrays[1][49::50] = 9  # the third is one long document
    shares = [0.5, 0.1, 0.4]
    pieces = interleave(arrays, shares, eot=9)
    source = np.concatenate([np.full(len(piece), piece[0]) for piece in pieces])
    assert (source == 1).sum() == 2000  # the shortest is there whole, and nothing is repeated
    assert len(source) == pytest.approx(20_000, abs=200)
    for end in (1_000, 8_000, 16_000):
        for i, share in enumerate(shares):
            assert (source[:end] == i).mean() == pytest.approx(share, abs=200 / end)
    for i, array in enumerate(arrays):
        taken = np.concatenate([piece for piece in pieces if piece[0] == i])
        assert np.array_equal(taken, array[: len(taken)])


def test_files_of_tokens_are_read_as_they_are(open_, shards):
    dataset = open_(shards)
    assert dataset.tokenizer.name == "bytes" and isinstance(open_corpus(str(shards)), TokenFiles)
    assert np.array_equal(dataset.train[:], tokens("one", "two", "three"))
    assert np.array_equal(dataset.val[:], tokens("four", "five"))
    assert dataset.summary["train"] == {"documents": 3, "bytes": 11, "tokens": 14}
    assert dataset.summary["val"] == {"documents": 2, "bytes": 8, "tokens": 10}
    assert sorted(path.name for path in dataset.path.iterdir()) == ["manifest.json", "tokenizer.json"]
    said = len(open_.lines)
    assert open_(shards).digest == dataset.digest and len(open_.lines) == said  # they are checked once
    assert np.array_equal(open_(shards, max_tokens=9).train[:], tokens("one", "two", "three")[:9])
    found = reopen(
        DataConfig(str(shards), "bytes", val_fraction=0.2, cache=str(dataset.path.parent)), BYTES, dataset.digest
    )
    assert found.path == dataset.path
    (shards / "text_val_000000.bin").write_bytes(tokens("four", "six!").tobytes())
    assert open_(shards).digest != dataset.digest


def test_tokens_are_those_of_gpt2_unless_another_tokenizer_is_named(shards, tmp_path):
    assert DataConfig(str(shards)).own_tokenizer == DataConfig(f"stdlib:1,{shards}:1").own_tokenizer == "gpt2"
    assert DataConfig(str(shards)).expected_vocab_size == 50257
    assert DataConfig(str(shards), tokenizer="bytes").own_tokenizer == "bytes"
    text = write(tmp_path / "text", train="a")
    (text / "training_args.bin").write_bytes(b"of another program")
    assert DataConfig(str(text)).own_tokenizer == "bpe"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("train.bin", b"\0", r"train.bin is no file of uint16 tokens: it has 1 bytes"),
        ("train.bin", header(20240520, 2, 0), r"magic number 20240520 and version 2: known are \[\(20240520, 1\)"),
        ("val.bin", header(20240520, 1, 9) + b"\0" * 16, "val.bin has 1,040 bytes, and not 1,042 for the 9 tokens"),
        ("train.bin", np.array([1, 300], np.uint16).tobytes(), "id 300, and the ids of the tokenizer bytes end at 256"),
        ("train.bin", header(20240801, 7, 1) + b"\xff" * 4, "train.bin has the id 4294967295"),
        ("meta.pkl", b"cos\nsystem\n", r"meta.pkl, .* not read: a pickle can run any code. Give the text"),
        ("val.bin", None, r"train on in \*train\*.bin, but none to validate on in \*val\*.bin"),
    ],
    ids=["odd", "version", "cut", "id", "huge id", "pickle", "no val"],
)
def test_bad_files_of_tokens(open_, tmp_path, name, content, told):
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in ("train.bin", "val.bin"):
        (folder / file).write_bytes(tokens("some", "text").tobytes())
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        open_(folder)
    assert not [*tmp_path.glob("cache/*")]


def test_files_of_tokens_that_are_cut_short_later(open_, shards):
    dataset = open_(shards)
    config = DataConfig(str(shards), "bytes", val_fraction=0.2, cache=str(dataset.path.parent))
    (shards / "text_val_000000.bin").write_bytes(tokens("four").tobytes())
    assert reopen(config, BYTES, dataset.digest) is None
    with pytest.raises(DataError, match="val split have fewer tokens than when they were checked"):
        module._open(dataset.path)


@pytest.fixture
def parts(tmp_path) -> tuple[Path, Path]:
    """A larger and a smaller folder, with other words."""
    large = write(tmp_path / "large", **{f"d{n}": f"alpha {n} " * (30 + n % 7) for n in range(60)})
    return large, write(tmp_path / "small", **{f"d{n}": f"beta {n}\n" * (9 + n % 5) for n in range(20)})


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_mixture_has_its_parts_in_their_shares(open_, parts, tokenizer):
    large, small = parts
    dataset = open_(f"{large}:3,{small}:1", tokenizer=tokenizer)
    own = {part["corpus"]: part for part in dataset.summary["parts"]}
    assert own["large"]["share"] == 0.75 and own["small"]["tokens"] * 3 == pytest.approx(own["large"]["tokens"], abs=3)
    n_large = own["large"]["tokens"]
    text = dataset.tokenizer.decode(dataset.train[:n_large])
    assert "beta" not in text and text.count("<|endoftext|>") == len(set(text.split("<|endoftext|>"))) - 1  # once
    repeated = dataset.train[n_large:]
    once = open_(small, tokenizer=tokenizer) if tokenizer == "bytes" else None
    assert "alpha" not in dataset.tokenizer.decode(repeated) and dataset.train[-1] == dataset.tokenizer.eot
    if once:  # its folder is that of the part alone
        assert np.array_equal(repeated[-len(once.train) :], once.train) and once.path.name == own["small"]["folder"]
        assert f"75.0% large, 25.0% small {len(repeated) / len(once.train):.3g} times" in str(dataset)
    val = dataset.tokenizer.decode(dataset.val).split("<|endoftext|>")
    assert val.pop() == "" and not set(val) & set(dataset.tokenizer.decode(dataset.train[:]).split("<|endoftext|>"))
    assert {"alpha", "beta"} == {document.split()[0] for document in val}
    lengths = dataset.tokenizer.byte_lengths()
    assert dataset.summary["val"]["bytes"] == lengths[dataset.val].sum() == sum(map(len, val))
    assert dataset.val[-1] == dataset.tokenizer.eot


def test_a_mixture_is_the_same_again_and_another_with_other_text(open_, parts):
    large, small = parts
    name = f"{large}:0.5,{small}:0.5"
    dataset = open_(name, tokenizer="bpe")
    said = len(open_.lines)
    again = open_(name, tokenizer="bpe")
    assert (again.path, again.digest, len(open_.lines)) == (dataset.path, dataset.digest, said)
    config = DataConfig(name, "bpe", val_fraction=0.2, cache=str(dataset.path.parent))
    write(small, new="gamma")
    assert open_(name, tokenizer="bpe").digest != dataset.digest
    found = reopen(config, dataset.tokenizer, dataset.digest)
    assert found.path == dataset.path and np.array_equal(found.train[:], dataset.train[:])
    other = open_(f"{large}:0.6,{small}:0.4", tokenizer="bpe")
    assert other.digest != dataset.digest and other.path != dataset.path


def test_max_tokens_of_a_mixture_are_those_of_all_parts(open_, parts):
    large, small = parts
    dataset = open_(f"{large}:0.9,{small}:0.1", max_tokens=2000)
    assert len(dataset.train) == 2000 and [part["tokens"] for part in dataset.summary["parts"]] == [1800, 200]
    assert str(dataset).endswith("its first 2,000 tokens, 90.0% large, 10.0% small)")


def test_tokens_are_a_part_of_a_mixture(open_, parts, shards):
    dataset = open_(f"{parts[0]}:0.5,{shards}:0.5")
    batches = Batches(dataset.train, 16, seed=0)
    read = BYTES.decode(batches.get(0, batches.windows_per_epoch)[0].flatten())
    assert read.count("w") == pytest.approx(len(dataset.train) / 2 / 14, rel=0.02)  # of "two", once in 14 tokens
    assert {"four", "five"} < {*BYTES.decode(dataset.val).split("<|endoftext|>")}


def test_a_damaged_part_is_an_error_that_names_its_folder(open_, parts):
    name = "{}:0.5,{}:0.5".format(*parts)
    dataset = open_(name)
    part = dataset.path.with_name(dataset.summary["parts"][1]["folder"])
    (part / "train.bin").unlink()
    with pytest.raises(DataError, match=f"{part} is damaged"):
        open_(name)


def test_a_published_tokenizer_prepares_text_and_mixtures(open_, parts, tmp_path):
    """The vocabulary of a run of ours, and a tokenizer.json of Hugging Face's."""
    own = open_(parts[0], tokenizer="bpe", vocab_size=260)
    (tmp_path / "theirs").mkdir()
    own.tokenizer.to_huggingface().save(str(tmp_path / "theirs" / "tokenizer.json"))
    for place in (own.path, own.path / "tokenizer.json", tmp_path / "theirs"):
        dataset = open_(parts[1], tokenizer=str(place))
        assert dataset.tokenizer.ranks == own.tokenizer.ranks and dataset.tokenizer.eot == 259
        mixture = open_("{}:0.5,{}:0.5".format(*parts), tokenizer=str(place))
        assert mixture.summary["parts"][1]["folder"] == dataset.path.name
        config = DataConfig(str(parts[1]), str(place), val_fraction=0.2, cache=str(tmp_path / "cache"))
        assert reopen(config, dataset.tokenizer, dataset.digest).path == dataset.path
    assert dataset.path != own.path


def test_documents_are_separated_by_the_end_of_a_published_tokenizer(tmp_path):
    first = replace(BYTES, ranks={token: id + 1 for token, id in BYTES.ranks.items()}, eot=0)
    first.save(tmp_path / "tokenizer.json")
    config = DataConfig(tokenizer=str(tmp_path), packing="documents")
    assert (config.expected_vocab_size, config.separator) == (257, 0)
    assert DataConfig(tokenizer="bytes", packing="documents").separator == 256


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("stdlib:0,docstrings:1", "'stdlib' has the weight 0"),
        ("stdlib:1,stdlib:2", "has a corpus twice: give it the sum of its weights"),
        ("stdlib:1,nowhere:2", "'nowhere' is no file or folder"),
        ("stdlib:0.7,docstrings", "no mixture, which has a weight after each part, as in a:0.7,b:0.3"),
        ("stdlib:0.7,docstrings:x", "no mixture, which has a weight after each part"),
        ("stdlib:0.5", "'stdlib:0.5' is no file or folder"),
    ],
)
def test_bad_mixtures(name, told):
    with pytest.raises(DataError) as error:
        open_corpus(name)
    assert told in str(error.value)


def test_a_path_that_exists_is_neither_a_mixture_nor_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a:0.7,b:0.3", "C:\\texts, old:2", "hub:org/name", "notes[1].txt", "x#y", "*.md"]
    Path("hub:org").mkdir()
    for name in names:
        Path(name).write_text(name)
        (shard,) = open_corpus(name).shards()
        assert [*shard.read()] == [name]
    mixture = open_corpus("C:\\texts, old:2:0.5,hub:org/name:.25,x#y:0.25")
    assert isinstance(mixture, Mixture)
    assert [(part.name, share) for part, share in mixture.parts] == [
        ("C:\\texts, old:2", 0.5),
        ("name", 0.25),
        ("x#y", 0.25),
    ]


def test_a_run_on_a_mixture_resumes_exactly(run, parts):
    options = {"data.corpus": "{}:0.5,{}:0.5".format(*parts), "warmup": 2, "schedule": "constant"}
    assert run(run="cut", steps=6, **options)[0] == 0
    found = [run("--resume", run="cut", **options), run(run="whole", **options)]
    losses = []
    for code, folder in found:
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append({row["step"]: row["loss"] for row in rows if "loss" in row and row["step"] > 6})
        assert code == 0
    assert losses[0] == losses[1] != {}
