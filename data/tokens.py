"""Token ids on disk: the files of nanoGPT, modded-nanogpt and llm.c, several files as one array, and mixtures.

Training tokens are neither copied nor converted: files are memory-mapped, and `Tokens` joins the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.formats import DataError

# Headers of llm.c and modded-nanogpt are 256 int32: magic, version, number of tokens. nanoGPT's files have none.
_HEADER_BYTES = 1024
_FORMATS = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}  # of GPT-2, and of Llama 3
_PIECE = 4096  # most tokens of one part that follow each other in the validation split of a mixture


def map_tokens(path: Path) -> np.ndarray:
    """Memory-map a `.bin` file of tokens: 1-D, uint16 or uint32. Raises `DataError` if it has another format."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 3)
    magic, version, count = map(int, header) if len(header) == 3 else (0, 0, 0)
    if magic not in {known for known, _ in _FORMATS}:
        if size % 2 or not size:
            raise DataError(f"{path} is no file of uint16 tokens: it has {size:,} bytes")
        return np.memmap(path, np.uint16, "r")
    if (magic, version) not in _FORMATS:
        raise DataError(f"{path} has the magic number {magic} and version {version}: known are {[*_FORMATS]}")
    dtype = np.dtype(_FORMATS[magic, version])
    if size != (expected := _HEADER_BYTES + count * dtype.itemsize):
        raise DataError(f"{path} has {size:,} bytes, and not {expected:,} for the {count:,} tokens of its header")
    return np.memmap(path, dtype, "r", _HEADER_BYTES)


class Tokens:
    """Several arrays of token ids as one, 1-D and read-only. It is indexed with a number, a slice or an array.

    Each array takes up a given length. If that is more than its own, the array is repeated; if it is less, or no
    multiple of it, the beginning is left out the first time. So each array ends as it does alone, with a document.
    """

    def __init__(self, arrays: Sequence[np.ndarray | Tokens], lengths: Sequence[int]) -> None:
        self.arrays = arrays
        self.ends = np.cumsum(lengths)
        self.dtype = np.result_type(*(array.dtype for array in arrays))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: slice | int | np.ndarray) -> np.ndarray:
        index = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        index = np.where(index < 0, index + len(self), index)
        source = np.searchsorted(self.ends, index, "right")
        found = np.empty(index.shape, self.dtype)
        for i in np.unique(source):
            chosen = source == i
            found[chosen] = self.arrays[i][(index[chosen] - self.ends[i]) % len(self.arrays[i])]
        return found


def mixed_lengths(lengths: Sequence[int], shares: Sequence[float], limit: int = 0) -> list[int]:
    """The number of tokens of each part in an epoch of a mixture, in proportion to the shares, which sum to 1.

    One part is read once, and the others once or more. `limit` is a maximum of the sum (0: none)."""
    total = max(length / share for length, share in zip(lengths, shares, strict=True))
    total = min(total, limit) if limit else total
    return [max(1, round(share * total)) for share in shares]


def interleave(arrays: Sequence[np.ndarray], shares: Sequence[float], eot: int) -> list[np.ndarray]:
    """Merge arrays of documents, which end with `eot`, so that every prefix has tokens of each in proportion to the
    shares, to within a piece. Returns the pieces: documents, cut after every `_PIECE` tokens of an array.

    Nothing is repeated. The merge ends with the first array that ends, and with a piece of each at least."""
    total = min(len(array) / share for array, share in zip(arrays, shares, strict=True))
    pieces, keys = [], []
    for array, share in zip(arrays, shares, strict=True):
        ends = np.union1d(np.flatnonzero(array == eot) + 1, np.r_[_PIECE : len(array) : _PIECE, len(array)])
        ends = ends[ends <= max(round(share * total), ends[0])]
        pieces += np.split(array[: ends[-1]], ends[:-1])
        keys.append(np.concatenate([[0], ends[:-1]]) / share)
    return [pieces[i] for i in np.argsort(np.concatenate(keys), kind="stable")]
