"""Whether a large text is at hand: prepared, the user's own, or downloaded within a minute.

python -m data.fetch tinystories    # download the first shard of each split to the hub's cache
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.corpora import open_corpus
from data.formats import Corpus, DataError, Mixture
from data.prepare import DataConfig, is_prepared
from runtime.config import Parser, build, read_file
from runtime.errors import error_message
from runtime.program import program
from runtime.text import say

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0  # for a download, which the next run resumes
LARGE = 100 * 10**6  # bytes of text


def lacking(flags: Mapping[str, Any], name: str) -> str:
    """Why the text of the config file `name` with `flags` is not at hand, or too small for a model of 15M parameters;
    "" if it is neither.

    A corpus of the user's choice is only looked at. Another one of the hub is downloaded, for up to `PATIENCE_S`
    seconds. Raises `DataError` for a corpus that does not exist."""
    section = read_file(name, ROOT / "configs")["data"]
    config = build(DataConfig, {f"data.{key}": value for key, value in section.items()} | flags, "data.")
    corpus = open_corpus(config.corpus)
    if not corpus.remote:
        size = corpus.size or _size(Path(config.corpus))
        return "" if size >= LARGE else f"it has {f'{size / 1e6:.1f}' if size else 'some 10'} MB"
    return "" if "data.corpus" in flags or is_prepared(config) else _download(config.corpus)


def _size(path: Path) -> int:
    """Bytes of the files of a corpus that are compressed; 0 for a corpus by name."""
    files = path.rglob("*") if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files if file.is_file())


def _download(name: str) -> str:
    """Run this module as a program, whose download ends with it. Returns why it failed, "" if it did not."""
    command, options = [sys.executable, "-m", "data.fetch", name], {"cwd": ROOT, "stdout": subprocess.PIPE}
    say(f"fetching {name} from the hub, for up to {PATIENCE_S:.0f} s")
    try:
        done = subprocess.run(command, **options, encoding="utf-8", timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"{name} was not downloaded within {PATIENCE_S:.0f} s"
    return "" if done.returncode == 0 else done.stdout.partition(". ")[0].strip() or f"{name} could not be fetched"


@program
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 where the corpus could not be downloaded, and prints why."""
    parser = Parser(prog="python -m data.fetch", description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", help="name of a corpus")
    corpus = open_corpus(parser.parse_args(argv).corpus)
    parts = [part for part, _ in corpus.parts] if isinstance(corpus, Mixture) else [corpus]
    try:
        for part in parts:
            firsts = {shard.split: shard for shard in reversed(part.shards())} if isinstance(part, Corpus) else {}
            for shard in firsts.values():
                next(shard.read())
    except (DataError, ModuleNotFoundError) as error:
        print(error_message(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
