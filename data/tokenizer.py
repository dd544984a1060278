"""Text to token ids and back.

Raw bytes, a trained vocabulary and GPT-2's are one thing here: byte-level BPE, which a split pattern and a table of
ranks define completely. Raw bytes take nothing but numpy; else tiktoken encodes, being quick and releasing the GIL, and
Hugging Face's `tokenizers` trains, and is what a checkpoint is exported for. Being byte-level, every tokenizer encodes
any text and decodes it exactly.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.formats import DataError
from runtime.files import write_atomically

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

EOT = "<|endoftext|>"
GPT2_TIMEOUT_S = 30.0

# GPT-4's pattern but for two things. Digits go in pairs: a small vocabulary cannot afford the thousand tokens of all
# threes, and would give them to those that the corpus happens to hold. Runs of white space are bounded: an unbounded
# one before a look-ahead overflows the regular expression's stack at about a million characters.
SPLIT_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s{0,255}[\r\n]|\s{1,256}(?!\S)|\s"
)

# What GPT-2 splits by when a tokenizer.json names no pattern of its own, spelt so that tiktoken is quick with it.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Byte-level vocabularies are written with a visible character for every byte: itself, or one past U+0100.
_VISIBLE = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
_CHAR_OF = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + n) for n, b in enumerate(_HIDDEN)}
_BYTE_OF = {char: b for b, char in _CHAR_OF.items()}


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE vocabulary: an immutable value.

    `ranks` holds every token's bytes and id, lower ids merging first; `eot` is the id that ends a document, which no
    text encodes to. DataError unless all 256 single bytes are tokens and all ids differ.
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
        if len({*self.ranks.values(), self.eot}) <= len(self.ranks):
            raise DataError(f"tokenizer {self.name!r} gives one id to two tokens: ids must differ")

    @cached_property
    def encoding(self) -> tiktoken.Encoding | _Bytes:
        if len(self.ranks) == 256:
            return _Bytes(self.ranks, self.eot)
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={EOT: self.eot}
        )

    @property
    def ids(self) -> list[int]:
        """Every id that stands for something, `eot` last; there may be gaps."""
        return [*self.ranks.values(), self.eot]

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return max(self.ids) + 1

    @property
    def dtype(self) -> np.dtype:
        """Of ids on disk: uint16 where they fit, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which "<|endoftext|>" is ordinary text like any other."""
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """The ids of all `texts`, one after another with `eot` after each: 1-D of `dtype`.

        After and not before: the stream then ends where a document does, and a model learns to end one.
        """
        parts, end = [np.empty(0, self.dtype)], np.array([self.eot], self.dtype)
        for ids in self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1):
            parts += np.asarray(ids, self.dtype), end
        return np.concatenate(parts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, with U+FFFD for bytes that are not UTF-8: a sample may begin or end within a character."""
        return self.decode_bytes(ids).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, int64 [vocab_size]; none for `eot`. For bits per byte."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    def _by_rank(self) -> list[tuple[bytes, int]]:
        return sorted(self.ranks.items(), key=lambda item: item[1])

    def save(self, path: Path) -> None:
        """Write the whole tokenizer as one JSON file; its bytes stand as the characters U+0000 to U+00FF."""
        ranks = {token.decode("latin-1"): rank for token, rank in self._by_rank()}
        write_atomically(path, json.dumps(asdict(self) | {"ranks": ranks}, indent=0))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """What `save` wrote. DataError where `path` holds anything else."""
        try:
            fields = json.loads(path.read_text())
            ranks = {token.encode("latin-1"): int(rank) for token, rank in fields.pop("ranks").items()}
            return cls(ranks=ranks, **fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is not a tokenizer that nanofuse saved: {error}") from error

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """The same tokenizer, giving equal ids, for `transformers` and whatever else reads tokenizer.json.

        That file does not say that "<|endoftext|>" in a text is ordinary: what loads it decides.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models

        # Ranks say which tokens exist and which come first, not what each was merged from: every split into two known
        # tokens is a merge, as for tiktoken.
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
        tokenizer.encode_special_tokens = True  # as the text that they are spelt with
        return tokenizer

    @classmethod
    def from_huggingface(cls, path: Path) -> Tokenizer:
        """A published byte-level BPE tokenizer.json (GPT-2's, Llama 3's, Qwen's), with equal ids for equal text.

        Its special tokens are left out but for the one that ends a text. Unicode normalisation is left out too, since
        decoding must give back the text that came in: where a tokenizer normalises, ids are equal for normalised text.
        DataError for another kind of tokenizer.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            added = {token["content"]: token["id"] for token in fields["added_tokens"]}
            ranks = {_bytes(text): id for text, id in fields["model"]["vocab"].items() if text not in added}
            merges = (m.split(" ") if isinstance(m, str) else m for m in fields["model"]["merges"])
            order = [ranks[_bytes("".join(merge))] for merge in merges]
            pattern = _pattern_of(fields["pre_tokenizer"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is not the tokenizer.json of a byte-level BPE tokenizer: {error!r}") from error
        if order != sorted(order):
            raise DataError(f"{path} merges tokens in another order than that of their ids: tiktoken cannot")
        eot = next((added[text] for text in (EOT, "<|end_of_text|>") if text in added), None)
        if eot is None:
            raise DataError(f"{path} has neither {EOT} nor <|end_of_text|>, one of which must end documents")
        return cls(path.resolve().parent.name, pattern, ranks, eot)


class _Bytes:
    """What is used of `tiktoken.Encoding`, for a vocabulary of single bytes, without that package."""

    def __init__(self, ranks: dict[bytes, int], eot: int) -> None:
        self.ids = np.array([ranks[bytes([b])] for b in range(256)], np.uint32)
        self.tokens = {id: token for token, id in ranks.items()} | {eot: EOT.encode()}

    def encode_ordinary(self, text: str) -> list[int]:
        (ids,) = self.encode_ordinary_batch([text])
        return ids.tolist()

    def encode_ordinary_batch(self, texts: Iterable[str], num_threads: int = 1) -> Iterator[np.ndarray]:
        for text in texts:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # unpaired surrogates: U+FFFD
            yield self.ids[np.frombuffer(text.encode(), np.uint8)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.tokens[id] for id in ids)


def byte_tokenizer() -> Tokenizer:
    """Each byte is its own id; 257 ids with `eot`."""
    # Any pattern would do, but for one whose pieces can be all of "<|endoftext|>", a word of the exported vocabulary.
    return Tokenizer("bytes", r"\w+|\W+", {bytes([b]): b for b in range(256)}, eot=256)


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """The BPE vocabulary of `vocab_size` ids, `eot` among them, that `documents` merge to.

    DataError when that is below 257, the bytes and `eot`, or above what `documents` support: a token must occur twice.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise DataError(f"vocab_size is {vocab_size}: it must be at least 257, all bytes and {EOT}")
    trained = Trained(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer(SPLIT_PATTERN)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False),
    )
    ranks = {_bytes(text): id for text, id in trained.get_vocab().items()}
    if len(ranks) < vocab_size - 1:
        raise DataError(
            f"vocab_size is {vocab_size}, and the text to train it on supports only {len(ranks) + 1}: "
            "lower vocab_size or use a larger corpus"
        )
    ranks |= {bytes([b]): b for b in range(256)}  # single bytes are ids 0 to 255 in any order: make it their own
    return Tokenizer("bpe", SPLIT_PATTERN, ranks, eot=vocab_size - 1)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's, which tiktoken downloads once. DataError when it cannot, within GPT2_TIMEOUT_S."""
    from tiktoken_ext import openai_public

    outcome: list[dict | Exception] = []

    def fetch() -> None:
        try:
            outcome.append(openai_public.gpt2())
        except Exception as error:
            outcome.append(error)

    # tiktoken sets no time-out: a thread that ends with the process puts a bound on a server that never answers.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(GPT2_TIMEOUT_S)
    fields = outcome[0] if outcome else TimeoutError(f"no answer within {GPT2_TIMEOUT_S:g} s")
    if isinstance(fields, Exception):
        raise DataError(
            f"cannot fetch GPT-2's vocabulary from openaipublic.blob.core.windows.net: {fields}. Where that can be "
            "reached, run TIKTOKEN_CACHE_DIR=gpt2 python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\", copy "
            "the folder gpt2 here and set TIKTOKEN_CACHE_DIR to it; or choose bpe or bytes, which need no network"
        ) from fields
    return Tokenizer("gpt2", fields["pat_str"], fields["mergeable_ranks"], fields["special_tokens"][EOT])


def _text(token: bytes) -> str:
    return "".join(_CHAR_OF[b] for b in token)


def _bytes(text: str) -> bytes:
    return bytes(_BYTE_OF[char] for char in text)


def _pre_tokenizer(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _pattern_of(fields: dict) -> str:
    """The split pattern of a tokenizer.json's pre-tokenizer; ValueError if it is not byte-level, or does more."""
    match fields:
        case {"type": "ByteLevel", "add_prefix_space": False} if fields.get("use_regex", True):
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    raise ValueError(f"its pre-tokenizer is {fields}")
