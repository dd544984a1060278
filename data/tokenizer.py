"""Tokenizers: text to token ids and back.

All tokenizers here (raw bytes, trained BPE, GPT-2, published ones) are byte-level BPE, which a split pattern and a
table of ranks define. Every text can be encoded and decodes exactly. tiktoken encodes, because it is fast and releases
the GIL. Hugging Face's `tokenizers` trains, and is the format of published tokenizers and of exported checkpoints. Raw
bytes need neither package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.formats import DataError, digest
from data.hub import hub_tokenizer, within
from runtime.files import write_atomically

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>")  # of published tokenizers
GPT2_TIMEOUT_S = 30.0

# The pattern of Qwen2 and Qwen3, which llama.cpp knows as the pre-tokenizer "qwen2". Each digit is a word of its own:
# a small vocabulary cannot afford a thousand tokens for all groups of three.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The same with bounded runs, to train with: training takes quadratic time in the length of the longest word.
TRAINING_PATTERN = SPLIT_PATTERN.replace("*", "{0,255}").replace("+", "{1,255}")

# GPT-2's pattern, the default of a tokenizer.json without one, with possessive quantifiers for tiktoken's speed.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# The same where each digit is split off first, as by SmolLM and StarCoder: white space then also ends before a digit.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s"

# Texts whose ids a published tokenizer must share: its file may have steps that a split pattern and ranks do not.
_PROBES = (
    "It's 1234567 o'clock, They'LL say: naïve café\u0301, 你好。 Привет!\r\n",
    "def f(x):\n\treturn {'a': x[0] != 3.14 +  15}  # \t\n\n\n        pass",
    *(f"a{' ' * n}b{' ' * n}" for n in (1, 2, 3, 4, 8, 16, 31)),
)

# In a tokenizer.json every byte is a printable character: itself, or one from U+0100 on (GPT-2's bytes_to_unicode).
_PRINTABLE = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
_OTHER = [b for b in range(256) if b not in _PRINTABLE]
_CHAR_OF = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(_OTHER)}
_BYTE_OF = {char: b for b, char in _CHAR_OF.items()}


@dataclass(frozen=True)
class Tokenizer:
    """An immutable byte-level BPE tokenizer.

    `ranks` maps each token's bytes to its id; lower ids merge first. `eot` is the id of the end-of-text token, which no
    text encodes to. Raises `DataError` unless all 256 single bytes are tokens and all ids differ.
    """

    name: str
    pattern: str
    ranks: dict[bytes, int]
    eot: int

    def __post_init__(self) -> None:
        missing = [b for b in range(256) if bytes([b]) not in self.ranks]
        if missing:
            raise DataError(
                f"tokenizer {self.name!r} has no token for the byte {missing[0]:#04x}: it must have all 256"
            )
        ids = [*self.ranks.values(), self.eot]
        if wrong := [id for id in ids if type(id) is not int or not 0 <= id < 2**32]:
            raise DataError(f"tokenizer {self.name!r} has the id {wrong[0]!r}: ids must be whole numbers from 0")
        if len(set(ids)) < len(ids):
            raise DataError(f"tokenizer {self.name!r} has two tokens with the same id: ids must differ")

    @cached_property
    def encoding(self) -> tiktoken.Encoding | _Bytes:
        """The encoder, created at first use."""
        if len(self.ranks) == 256:
            return _Bytes(self.ranks, self.eot)
        import tiktoken

        # A run before a look-ahead takes a stack entry per character, and tiktoken's has room for a million.
        pattern = self.pattern.replace(r"\s+(?!", r"\s{1,500000}(?!")
        return tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={EOT: self.eot})

    @property
    def ids(self) -> list[int]:
        """All ids that are tokens, `eot` last. There may be gaps."""
        return [*self.ranks.values(), self.eot]

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self.ids) + 1

    @cached_property
    def dtype(self) -> np.dtype:
        """Dtype of ids on disk: uint16 if they fit, otherwise uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        """Encode `text`; "<|endoftext|>" in it is ordinary text."""
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, pieces: Iterable[str | None]) -> np.ndarray:
        """Encode documents into one 1-D array of `dtype`. After its pieces, None ends a document and becomes `eot`.

        With `eot` after a document rather than before it, the model learns to end one.
        """
        parts, end = [np.empty(0, self.dtype)], np.array([self.eot], self.dtype)
        for piece in pieces:
            # Before tiktoken 0.11 this took "<|endoftext|>" in a text for `eot`.
            parts.append(end if piece is None else self.encoding.encode_to_numpy(piece, disallowed_special=()))
        return np.concatenate(parts, dtype=self.dtype, casting="unsafe")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode `ids` to bytes."""
        return self.encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids` to text, with U+FFFD for invalid UTF-8: a sample may start or end within a character."""
        return self.decode_bytes(ids).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """Number of bytes of each id, int64 `[vocab_size]`; 0 for `eot`. For bits per byte."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what text becomes: equal for tokenizers that give equal ids, whatever their names."""
        return digest(self.pattern, self.eot, [(token.hex(), rank) for token, rank in self._by_rank()])

    def _by_rank(self) -> list[tuple[bytes, int]]:
        return sorted(self.ranks.items(), key=lambda item: item[1])

    def save(self, path: Path) -> None:
        """Write the tokenizer to a JSON file, with bytes as the characters U+0000 to U+00FF."""
        ranks = {token.decode("latin-1"): rank for token, rank in self._by_rank()}
        write_atomically(path, json.dumps(asdict(self) | {"ranks": ranks}, indent=0))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load a file that `save` wrote. Raises `DataError` for any other."""
        try:
            fields = json.loads(path.read_text())
            ranks = {token.encode("latin-1"): int(rank) for token, rank in fields.pop("ranks").items()}
            return cls(ranks=ranks, **fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is not a tokenizer that nanofuse saved: {error}") from error

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """Convert to a `tokenizers.Tokenizer` with equal ids, for `transformers` and others that read tokenizer.json.

        Programs that load the file decide whether "<|endoftext|>" in a text is a special token.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models

        # Ranks do not record which two tokens a token was merged from. As in tiktoken, every split into two known
        # tokens is a valid merge.
        merges = [
            (_text(token[:cut]), _text(token[cut:]))
            for token, _ in self._by_rank()
            for cut in range(1, len(token))
            if token[:cut] in self.ranks and token[cut:] in self.ranks
        ]
        vocabulary = {_text(token): rank for token, rank in self.ranks.items()} | {EOT: self.eot}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
        tokenizer.pre_tokenizer = _pre_tokenizer(self.pattern)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True  # encode them as ordinary text
        return tokenizer

    @classmethod
    def from_huggingface(cls, path: Path, name: str = "") -> Tokenizer:
        """Load a byte-level BPE tokenizer.json (of GPT-2, Llama 3, Qwen), with equal ids for equal text.

        Added tokens are dropped, except the one that ends a text, the first found of `EOT_NAMES`: in a text they are
        ordinary characters. NFC, the one normalization that is accepted, is dropped too, because decoding must return
        the original text; ids are then equal for normalized text. `name` is the folder's by default. Raises `DataError`
        for other kinds of tokenizers, and where the `tokenizers` library finds other ids.
        """
        import tokenizers

        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            added = {token["content"]: token["id"] for token in fields["added_tokens"]}
            model = fields["model"]
            if (kind := model.get("type", "BPE")) != "BPE":
                raise ValueError(f"its model is {kind!r}")
            normalizer = fields.get("normalizer") or {"normalizers": []}
            for step in normalizer.get("normalizers", [normalizer]):
                if step["type"] != "NFC":
                    raise ValueError(f"its normalizer {step['type']!r} changes the text, so that bytes are lost")
            ranks = {_bytes(text): id for text, id in model["vocab"].items() if text not in added}
            merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
            order = [ranks[_bytes("".join(merge))] for merge in merges]
            pattern = _pattern_of(fields["pre_tokenizer"])
            theirs = tokenizers.Tokenizer.from_str(json.dumps(fields))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise DataError(f"{path} is not the tokenizer.json of a byte-level BPE tokenizer: {error!r}") from error
        if order != sorted(order):
            raise DataError(f"{path} merges tokens in another order than that of their ids: tiktoken cannot do that")
        eot = next((added[text] for text in EOT_NAMES if text in added), None)
        if eot is None:
            raise DataError(f"{path} has no end-of-text token: it needs {' or '.join(EOT_NAMES)}")
        tokenizer = cls(name or path.resolve().parent.name, pattern, ranks, eot)
        try:
            _ = tokenizer.encoding
        except ValueError as error:
            raise DataError(f"{path} has the split pattern {pattern!r}, which tiktoken cannot use: {error}") from error
        theirs.encode_special_tokens = True
        for text in _PROBES:
            if theirs.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
                raise DataError(f"{path} gives {text!r} other ids than byte-level BPE does: it cannot be used here")
        return tokenizer


class _Bytes:
    """The part of the `tiktoken.Encoding` interface that `Tokenizer` uses, for a vocabulary of single bytes."""

    def __init__(self, ranks: dict[bytes, int], eot: int) -> None:
        self.ids = np.array(
            [ranks[bytes([b])] for b in range(256)], np.uint32 if max(ranks.values()) >= 2**16 else np.uint16
        )
        self.tokens = {id: token for token, id in ranks.items()} | {eot: EOT.encode()}

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str, disallowed_special: Sequence[str] = ()) -> np.ndarray:
        try:
            content = text.encode()
        except UnicodeEncodeError:  # unpaired surrogates become U+FFFD
            content = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        return self.ids[np.frombuffer(content, np.uint8)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode `ids` to bytes."""
        return b"".join(self.tokens[id] for id in ids)


def byte_tokenizer() -> Tokenizer:
    """The tokenizer of raw bytes: each byte is its own id, and 256 is `eot`."""
    # The pattern must split "<|endoftext|>", because that is a token of the exported vocabulary.
    return Tokenizer("bytes", r"\w+|\W+", {bytes([b]): b for b in range(256)}, eot=256)


def train_bpe(documents: Iterable[str], vocab_size: int, allow_fewer: bool = False) -> Tokenizer:
    """Train a BPE tokenizer with `vocab_size` ids, including `eot`, on `documents`.

    Too few pairs may occur twice for that many merges. With `allow_fewer`, the ids before `eot`, the last, are then
    unused. Raises `DataError` otherwise, and if `vocab_size` is below 257 (all bytes and `eot`).
    """
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise DataError(f"vocab_size is {vocab_size}: it must be at least 257, all bytes and {EOT}")
    trained = HFTokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer(TRAINING_PATTERN)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False),
    )
    ranks = {_bytes(text): id for text, id in trained.get_vocab().items()}
    if len(ranks) < vocab_size - 1 and not allow_fewer:
        raise DataError(
            f"vocab_size is {vocab_size}, and the text to train it on supports only {len(ranks) + 1}: "
            "lower vocab_size or use a larger corpus"
        )
    ranks |= {bytes([b]): b for b in range(256)}  # training gives the single bytes ids 0 to 255 in another order
    return Tokenizer("bpe", SPLIT_PATTERN, ranks, eot=vocab_size - 1)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer, which tiktoken downloads once, or else the Hub's file of the same vocabulary.

    Raises `DataError` if neither can be fetched. For tiktoken's host that is after `GPT2_TIMEOUT_S`."""
    from tiktoken_ext import openai_public

    try:
        fields = within(GPT2_TIMEOUT_S, openai_public.gpt2)  # tiktoken itself has no timeout
    except Exception as error:  # the exception types depend on tiktoken's version
        failure = error
    else:
        return Tokenizer("gpt2", fields["pat_str"], fields["mergeable_ranks"], fields["special_tokens"][EOT])
    try:
        _, path = hub_tokenizer("hub:openai-community/gpt2")
    except DataError as error:
        raise DataError(
            f"cannot fetch GPT-2's vocabulary from openaipublic.blob.core.windows.net: {failure}; and {error} Or, on a "
            'machine that can reach it, run TIKTOKEN_CACHE_DIR=gpt2 python -c "import tiktoken; '
            "tiktoken.get_encoding('gpt2')\", then copy the folder gpt2 here and set TIKTOKEN_CACHE_DIR to it; or "
            "choose bpe or bytes, which need no network"
        ) from failure
    return Tokenizer.from_huggingface(path, "gpt2")


def published_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by name: `hub:org/name`, or the path of a tokenizer.json, or of the folder that it is in.

    A file of Hugging Face's, or one that a run here has written. Raises `DataError`."""
    if name.startswith("hub:"):
        repository, path = hub_tokenizer(name)
        return Tokenizer.from_huggingface(path, repository)
    path = Path(os.path.expanduser(name))
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        ours = "ranks" in json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(
            f"{name!r} is no tokenizer ({error.strerror}): it is to be bytes, bpe, gpt2, hub:org/name, or the path of "
            "a tokenizer.json"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error
    return Tokenizer.load(path) if ours else Tokenizer.from_huggingface(path)


def _text(token: bytes) -> str:
    return "".join(_CHAR_OF[b] for b in token)


def _bytes(text: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in text)
    except KeyError:
        raise ValueError(f"its token {text!r} does not tell its bytes") from None


def _pre_tokenizer(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _pattern_of(fields: dict) -> str:
    """The split pattern of a tokenizer.json's pre-tokenizer. Raises `ValueError` unless it is byte-level only."""
    match fields:
        case {"type": "ByteLevel", "add_prefix_space": False} if fields.get("use_regex", True):
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
        }:
            return DIGITS_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern:
            return pattern
    raise ValueError(f"its pre-tokenizer is {fields}")
