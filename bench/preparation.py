"""Ways to turn text into tokens, each in a process of its own: `python -m bench.preparation WAY ARGUMENTS`.

It prints the seconds without imports, the peak of anonymous memory, which has no mapped files in it, and the number of
tokens.
"""

import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.prepare import DataConfig, prepare
from data.tokenizer import Tokenizer

STATUS = Path("/proc/self/status")  # of Linux; elsewhere memory is not measured
SAMPLE_S = 0.02
GROUP = 64  # documents that a thread encodes at a time


def texts(file: str) -> list[str]:
    with open(file) as lines:
        return [json.loads(line)["text"] for line in lines]


def nanofuse(config: str) -> Callable[[], int]:
    def run() -> int:
        data = prepare(DataConfig(**json.loads(config)), say=lambda line: None)
        return len(data.train) + len(data.val)

    return run


def buffers(file: str, vocabulary: str) -> Callable[[], int]:
    """tiktoken alone: documents that are in memory already, to arrays that are not kept."""
    encoding, documents = Tokenizer.load(Path(vocabulary)).encoding, texts(file)

    def encode(start: int) -> int:
        group = documents[start : start + GROUP]
        return sum(len(encoding.encode_to_numpy(text, disallowed_special=())) + 1 for text in group)  # 1: end of text

    def run() -> int:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return sum(pool.map(encode, range(0, len(documents), GROUP)))

    return run


def nanogpt(file: str, vocabulary: str, target: str) -> Callable[[], int]:
    """As nanoGPT's prepare.py does: processes that return lists of ids, then a memory map of all."""

    def run() -> int:
        with multiprocessing.Pool(os.cpu_count(), _load, (vocabulary,)) as pool:
            documents = pool.map(_encode, texts(file), chunksize=GROUP)
        ids = np.memmap(target, np.uint16, "w+", shape=sum(map(len, documents)))
        position = 0
        for document in documents:
            ids[position : position + len(document)] = document
            position += len(document)
        ids.flush()
        return len(ids)

    return run


def _load(vocabulary: str) -> None:
    global tokenizer  # of a process of the pool
    tokenizer = Tokenizer.load(Path(vocabulary))


def _encode(text: str) -> list[int]:
    return [*tokenizer.encoding.encode_ordinary(text), tokenizer.eot]


def copy(file: str, target: str) -> Callable[[], int]:
    """What the disk allows."""

    def run() -> int:
        shutil.copyfile(file, target)
        with open(target, "rb+") as written:
            os.fsync(written.fileno())
        return 0

    return run


WAYS = {way.__name__: way for way in (nanofuse, buffers, nanogpt, copy)}


def measure(run: Callable[[], int]) -> dict:
    """Seconds and result of `run`, and this process's peak of anonymous memory meanwhile, in bytes, by samples."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(SAMPLE_S):
            peak = max(peak, 1024 * int(re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())[1]))

    watcher = threading.Thread(target=watch)
    if STATUS.exists():
        watcher.start()
    begin = time.perf_counter()
    try:
        tokens = run()
        return {"seconds": time.perf_counter() - begin, "tokens": tokens} | (
            {"memory": peak} if STATUS.exists() else {}
        )
    finally:
        ended.set()


if __name__ == "__main__":
    way, *arguments = sys.argv[1:]
    print(json.dumps(measure(WAYS[way](*arguments))))
