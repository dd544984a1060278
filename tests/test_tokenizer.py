"""Tokenizers: exact round trips, and the same ids from tiktoken as from Hugging Face."""

import argparse
import inspect
import json
import random
import socket
import unicodedata
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

for package in ("tiktoken", "tokenizers", "hypothesis"):
    pytest.importorskip(package)

import huggingface_hub.constants
import tiktoken.load
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data import formats
from data import tokenizer as module
from data.formats import DataError, pieces
from data.tokenizer import EOT, GPT2_PATTERN, SPLIT_PATTERN, Tokenizer, byte_tokenizer, gpt2_tokenizer, train_bpe

SOURCE = inspect.getsource(argparse)
BPE = train_bpe([SOURCE], 700)
TEXTS = {
    "nothing": "",
    "code": 'def f(x_1, *y):\n    """It\'s."""\n\n    return {"a": x_1[2:10] + 12345}\t# 3.14e-10\r\n',
    "prose": "They'll say we've DON'T it's; naïve café — “quoted”… ¿Qué?",
    "scripts": "Привет, мир! 你好,世界。 こんにちは नमस्ते مرحبا ½ ٣٤٥ Ⅷ",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \U0010ffff \x00\x7f\x85\xa0\u2028\ufeff",
    "white space": "a  b\t\tc \n\n \n   d\r\n\r\n" + " " * 700 + "e" + "\n" * 300 + " ",
    "special": f"{EOT} <|endoftext|>{EOT}x <|im_start|>",
    "one long run": "a" * 5000 + "=" * 5000 + "7" * 5000,
}
# Only characters that are assigned in this Python's version of Unicode: the two regular expression engines may classify
# later ones differently.
characters = st.characters(exclude_categories=["Cs", "Cn"])


@pytest.fixture(params=[byte_tokenizer(), BPE], ids=lambda tokenizer: tokenizer.name)
def tokenizer(request) -> Tokenizer:
    return request.param


def check(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert HUGGINGFACE[tokenizer.name].encode(text).ids == ids
    assert HUGGINGFACE[tokenizer.name].decode(ids, skip_special_tokens=False) == text


HUGGINGFACE = {tokenizer.name: tokenizer.to_huggingface() for tokenizer in (byte_tokenizer(), BPE)}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_round_trips_and_both_libraries_give_equal_ids(tokenizer, text):
    check(tokenizer, text)


@given(st.text(characters) | st.text(st.sampled_from(" \n\t\r'sdel09_(")))
def test_any_text_round_trips_and_both_libraries_give_equal_ids(text):
    check(BPE, text)
    check(byte_tokenizer(), text)


def test_bytes_are_their_own_ids():
    assert byte_tokenizer().encode("Aé") == [65, 0xC3, 0xA9]
    assert byte_tokenizer().vocab_size == 257


def test_training_compresses_and_gives_the_requested_vocabulary():
    assert BPE.vocab_size == 700 and sorted(BPE.ranks.values()) == list(range(699)) and BPE.eot == 699
    assert len(BPE.encode(SOURCE)) < len(SOURCE) / 2.5
    assert train_bpe([SOURCE], 700) == BPE


def test_too_large_a_vocabulary_is_refused_with_the_possible_size():
    with pytest.raises(DataError, match="supports only 258"):
        train_bpe(["ab", "ab", "cd"], 300)
    assert train_bpe(["ab", "ab", "cd"], 258).encode("ab") == [256]
    with pytest.raises(DataError, match="at least 257"):
        train_bpe([SOURCE], 256)
    with pytest.raises(DataError, match="supports only 257"):  # digits never merge
        train_bpe(["121212"] * 9, 300)


def test_a_vocabulary_may_have_fewer_tokens_than_ids():
    some = train_bpe(["ab cd", "ab"], 300, allow_fewer=True)
    assert some.vocab_size == 300 and some.eot == 299 and len(some.ids) == 258
    theirs = some.to_huggingface()
    for text in ("ab cd", SOURCE):
        assert theirs.encode(text).ids == some.encode(text) and some.decode(some.encode(text)) == text
    assert theirs.token_to_id(EOT) == 299


def test_words_are_those_of_qwen2():
    """The expected words were written by hand from llama.cpp's pre-tokenizer "qwen2"."""
    words = {
        "They'll DON'T It'S 'round": ["They", "'ll", " DON", "'T", " It", "'S", " '", "round"],
        "1234 x86 ½Ⅷ": ["1", "2", "3", "4", " x", "8", "6", " ", "½", "Ⅷ"],
        "f(a_b) != {}\r\n\n  y": ["f", "(a", "_b", ")", " !=", " {}\r\n\n", " ", " y"],
        "a \n\t\n  b  ": ["a", " \n\t\n", " ", " b", "  "],
        "z" * 3000 + "==" * 900: ["z" * 3000, "==" * 900],
    }
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(BPE.pattern), "isolated")
    for text, expected in words.items():
        assert [word for word, _ in split.pre_tokenize_str(text)] == expected
        assert BPE.encode(text) == [id for word in expected for id in BPE.encode(word)]


def test_training_bounds_the_length_of_words():
    for word in ("a", "=", " ", "\n"):
        trained = train_bpe([word * 4096 + "x"] * 2, 264)
        assert max(map(len, trained.ranks)) == 128  # 255 characters merge no further than to their largest power of two


def test_a_run_of_white_space_of_any_length_is_encoded():
    text = " " * 2_000_000 + "x"
    assert BPE.decode(BPE.encode(text)) == text


def test_documents_end_with_eot_and_only_documents_do(tokenizer):
    texts = list(TEXTS.values())
    stream = tokenizer.encode_documents(chain.from_iterable((text, None) for text in texts))
    assert stream.dtype == tokenizer.dtype == np.uint16
    ends = np.flatnonzero(stream == tokenizer.eot)
    assert [tokenizer.decode(ids[:-1]) for ids in np.split(stream, ends[:-1] + 1)] == texts
    assert tokenizer.byte_lengths()[stream].sum() == sum(len(text.encode()) for text in texts)
    assert tokenizer.encode_documents([]).shape == (0,)


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, GPT2_PATTERN], ids=["qwen2", "gpt2"])
def test_pieces_have_the_tokens_of_the_whole(monkeypatch, pattern):
    """10,000 odd documents in pieces of a few characters, with a vocabulary that merges across any wrong cut."""
    rng = random.Random(0)
    atoms = [
        " ",
        " ",
        "\n",
        "\n",
        "\r\n",
        "\t",
        "\xa0",
        "\u2028",
        "\x1c",
        "\x85",
        "a",
        "b",
        "'s",
        "1",
        "!",
        "é",
        "👩‍👧",
        "你",
    ]
    texts = ["".join(rng.choices(atoms, k=rng.randrange(60))) for _ in range(10_000)]
    trained = module.train_bpe(texts, 2000)
    encode = replace(trained, pattern=pattern).encode
    monkeypatch.setattr(formats, "PIECE_CHARS", 16)
    cut = 0
    for text in texts:
        found = list(pieces(text))
        assert "".join(found) == text
        assert [id for piece in found for id in encode(piece)] == encode(text)
        cut += len(found) > 1
    assert cut > 5000


def test_a_vocabulary_beyond_16_bits_takes_32():
    wide = Tokenizer("wide", BPE.pattern, BPE.ranks, eot=2**16)
    assert wide.encode_documents(["a", None]).tolist() == [97, 2**16]
    assert wide.dtype == np.uint32
    assert Tokenizer("narrow", BPE.pattern, BPE.ranks, eot=2**16 - 1).dtype == np.uint16


def test_decoding_replaces_incomplete_characters():
    assert byte_tokenizer().decode([65, 0xC3]) == "A\ufffd"
    assert byte_tokenizer().decode_bytes(np.array([65, 0xC3], np.uint16)) == b"A\xc3"


def test_saving_keeps_everything(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json") == tokenizer
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"eot"', '"end"'),
        lambda text: text.replace('"A": 65,', ""),
        lambda text: text.replace('"A": 65,', '"A": 66,'),
    ],
    ids=["cut short", "something else", "field missing", "byte missing", "id twice"],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    BPE.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=str(path)):
        Tokenizer.load(path)


def test_an_exported_tokenizer_is_read_back(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.json"
    tokenizer.to_huggingface().save(str(path))
    exported = tokenizers.Tokenizer.from_file(str(path))
    assert exported.encode(SOURCE).ids == tokenizer.encode(SOURCE)
    assert exported.token_to_id(EOT) == tokenizer.eot
    back = Tokenizer.from_huggingface(path)
    assert (back.ranks, back.pattern, back.eot) == (tokenizer.ranks, tokenizer.pattern, tokenizer.eot)


LOSSY = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
ADDED = [
    {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    | {"special": special}
    for id, text, special in ((1, EOT, True), (600, "    ", False))
]


def published(path, **changes) -> None:
    """A tokenizer.json like GPT-2's, without a split pattern, but with special tokens first."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([SOURCE], 600, special_tokens=["<pad>", EOT], show_progress=False)
    path.write_text(json.dumps(json.loads(trained.to_str()) | changes))


@pytest.mark.parametrize("digits", [False, True], ids=["gpt2", "digits"])
def test_a_published_tokenizer_gives_its_own_ids(tmp_path, digits):
    path = tmp_path / "tokenizer.json"
    published(path, normalizer={"type": "NFC"})
    if digits:
        theirs = tokenizers.Tokenizer.from_file(str(path))
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        theirs.save(str(path))
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), Tokenizer.from_huggingface(path)
    theirs.encode_special_tokens = True
    assert ours.eot == 1
    for text in (SOURCE, *TEXTS.values()):
        assert ours.encode(unicodedata.normalize("NFC", text)) == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {"type": "Metaspace"}}, "not the tokenizer.json of a byte-level BPE.*Metaspace"),
        ({"pre_tokenizer": None}, "not the tokenizer.json of a byte-level BPE"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "not the tokenizer.json of a byte-level BPE"),
        ({"added_tokens": []}, "it needs <|endoftext|> or"),
        ({"normalizer": LOSSY}, "its normalizer 'Lowercase' changes the text, so that bytes are lost"),
        ({"model": {"vocab": {"▁the": 0}, "merges": []}}, "its token '▁the' does not tell its bytes"),
        ({"post_processor": None, "added_tokens": ADDED}, "gives .* other ids than byte-level BPE does"),
    ],
    ids=["pre-tokenizer", "none", "unigram", "no end", "lossy", "not bytes", "added spaces"],
)
def test_another_kind_of_tokenizer_is_an_error_that_names_the_file(tmp_path, changes, message):
    path = tmp_path / "tokenizer.json"
    published(path, **changes)
    with pytest.raises(DataError, match=message.replace("|", r"\|")) as error:
        Tokenizer.from_huggingface(path)
    assert str(path) in str(error.value)


def test_merges_out_of_order_are_an_error(tmp_path):
    path = tmp_path / "tokenizer.json"
    published(path)
    fields = json.loads(path.read_text())
    fields["model"]["merges"].reverse()
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="another order"):
        Tokenizer.from_huggingface(path)


# GPT-2's vocabulary with one of its merges.
CHARS = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=lambda char: (ord(char) > 255, char))
GPT2 = {char: n for n, char in enumerate(CHARS)} | {"he": 256, EOT: 50256}


def test_gpt2_is_fetched_once_and_then_read_from_its_cache(tmp_path, monkeypatch):
    """A vocabulary with one merge replaces the real one, so the check of the real one's hash is disabled."""
    files = {"vocab.bpe": "#version: 0.2\nh e\n", "encoder.json": json.dumps(GPT2)}
    fetched = []

    def fetch(url):
        fetched.append(url)
        return files[url.rsplit("/", 1)[1]].encode()

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", fetch)
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda content, expected: True)
    first = gpt2_tokenizer()
    assert (first.vocab_size, first.encode("he")) == (50257, [256])
    assert gpt2_tokenizer() == first
    assert len(fetched) == 2

    # The same vocabulary as the Hub has it, where tiktoken's host cannot be reached.
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(GPT2, [("h", "e")]))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens([EOT])
    theirs.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: 1 / 0)
    monkeypatch.setattr(module, "hub_tokenizer", lambda name: (name, tmp_path / "tokenizer.json"))
    assert gpt2_tokenizer() == first


@pytest.mark.parametrize("server", ["refuses", "never answers"])
def test_unreachable_gpt2_vocabulary_is_an_error_with_remedies(tmp_path, monkeypatch, server):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "never answers":
            listener.listen()
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:{1}".format(*listener.getsockname(), ""))
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(module, "GPT2_TIMEOUT_S", 5.0 if server == "refuses" else 0.2)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 5.0 if server == "refuses" else 0.2)
        said = r"openaipublic.*the model openai-community/gpt2 \(.*TIKTOKEN_CACHE_DIR.*bpe or bytes"
        with pytest.raises(DataError, match=said) as error:
            gpt2_tokenizer()
        assert ("no answer in 0.2 s; and" in str(error.value)) == (server == "never answers")
