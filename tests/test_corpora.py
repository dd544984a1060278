"""Corpora of the Python installation and of local files: their documents, and their error messages."""

import codecs
import gzip
import json
import os
import sysconfig
import tracemalloc
from importlib.metadata import Distribution, version
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

import pyarrow
import pyarrow.parquet
from packaging.version import Version

from data import corpora, formats
from data.corpora import CORPORA, open_corpus, wikitext_articles
from data.docstrings import docstrings
from data.formats import DataError, pieces, read_parquet
from data.prepare import DataConfig, prepare

MODULE = '''"""The module."""
if True:
    class A:
        """A class.

            Indented.

        Not indented.
        """
        def f(self):
            "Quoted once."
            return lambda: """not a docstring"""
try:
    async def g():
        """In a try."""
except ImportError:
    def g(): """In its handler."""
else:
    def g(): """Else."""
finally:
    def g(): """Finally."""
match 1:
    case _:
        def h(): """In a case."""
def last():
    def inner(): """Inside."""
'''


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A fake standard library with the given files, and one required package, `package` 1.0, with others."""

    def build(library: dict[str, str], package: dict[str, str], version: str = "1.0") -> None:
        site = tmp_path / "lib/site-packages"
        info = site / f"package-{version}.dist-info"
        files = {tmp_path / "lib" / name: text for name, text in library.items()}
        files |= {site / name: text for name, text in package.items()}
        files[info / "METADATA"] = f"Name: package\nVersion: {version}\n"
        files[info / "RECORD"] = "".join(f"{name},,\n" for name in (*package, "../../bin/package.py"))
        files[tmp_path / "pyproject.toml"] = (
            "[project]\ndependencies = ['package>=1', 'other; sys_platform == \"linux\"', 'missing', 'free']"
        )
        files[tmp_path / "constraints.txt"] = "# versions\npackage==1.0\nother==1.0\nmissing==2.0\nindirect==3.0\n"
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        found = {"package": Distribution.at(info)}

        def distribution(name: str) -> Distribution:
            if name not in found:
                assert name == "missing", f"{name} is not of the corpus"
                raise corpora.importlib.metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(corpora, "_STANDARD_LIBRARY", tmp_path / "lib")
        monkeypatch.setattr(corpora, "_ROOT", tmp_path)
        monkeypatch.setattr(corpora.importlib.metadata, "distribution", distribution)

    return build


def read(name: object) -> dict[str, list[str]]:
    corpus = open_corpus(str(name))
    assert corpus.deduplicate
    shards = corpus.shards()
    assert all(shard.split is None for shard in shards)
    return {shard.name: list(shard.read()) for shard in shards}


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_docstrings_of_every_definition_in_source_order():
    assert docstrings(MODULE.encode()) == [
        "The module.",
        "A class.\n\n    Indented.\n\nNot indented.",
        "Quoted once.",
        "In a try.",
        "In its handler.",
        "Else.",
        "Finally.",
        "In a case.",
        "Inside.",
    ]


@pytest.mark.parametrize(
    "source", [b'"""unfinished', b'print """two"""', b'"""nul\0"""', b"x = 1", b'def of_python_312[T](): """Doc."""']
)
def test_source_without_docstrings(source):
    assert docstrings(source) == []


def test_docstrings_corpus(embedded):
    """Modules of the required packages alone, in the order of their paths' parts."""
    embedded(
        {"a.py": '"""Of the standard library."""'},
        {
            "package/b.py": '"""Second."""',
            "package/a.py": '"""First."""\ndef f(): """Shared."""\ndef g(): """Shared."""',
            "package/a/z.py": '"""Shared."""\ndef f(): """Own."""',
            "package/broken.py": '"""',
            "package/surrogate.py": r'"""\ud800"""',
            "package/tests/t.py": '"""A test."""',
            "package/distutils/d.py": '"""Not in every wheel."""',
        },
    )
    assert read("docstrings") == {"docstrings": ["Shared.\n\nOwn.", "First.", "Second.", "���"]}


def test_stdlib_corpus(embedded):
    latin = "# -*- coding: latin-1 -*-\nx = 'é'\n"
    embedded({"b.py": "b = 1\r\n", "a/__init__.py": "", "a/test/t.py": "t = 1"}, {"package/z.py": "z = 1"})
    (corpora._STANDARD_LIBRARY / "a/latin.py").write_bytes(latin.encode("latin-1"))
    assert read("stdlib") == {"stdlib": [latin, "b = 1\n"]}


def test_docstrings_depend_on_the_public_versions_of_the_packages(embedded):
    embedded({}, {}, version="1.0")
    fixed = open_corpus("docstrings")
    assert fixed.remark("of another text") == "not the fixed text of constraints.txt: missing is missing, not 2.0"
    assert fixed.remark(corpora.DOCSTRINGS_DIGEST) == "the fixed text of constraints.txt"
    embedded({}, {}, version="1.0+cpu")
    assert open_corpus("docstrings").fingerprint == fixed.fingerprint
    embedded({}, {}, version="1.1")
    other = open_corpus("docstrings")
    assert other.fingerprint != fixed.fingerprint
    assert "missing is missing, not 2.0, package is 1.1, not 1.0" in other.remark("of another text")


@pytest.mark.skipif(
    any(Version(version(name)).public != pin for name, pin in corpora._fixed_versions().items()),
    reason="the packages are not at the versions of constraints.txt",
)
def test_docstrings_are_the_fixed_text(tmp_path):
    dataset = prepare(DataConfig(tokenizer="bytes", cache=str(tmp_path)), lambda line: None)
    assert dataset.digest == corpora.DOCSTRINGS_DIGEST
    assert str(dataset) == f"docstrings (digest {dataset.digest[:12]}, the fixed text of constraints.txt)"
    assert len(dataset.train) > 10_000_000


def test_reading_can_stop_early(embedded, capfd, monkeypatch):
    embedded({}, {f"{index:02d}.py": f'"""{index} {"x" * 10_000}"""' for index in range(100)})
    (shard,) = open_corpus("docstrings").shards()
    workers = []
    popen = corpora.subprocess.Popen
    monkeypatch.setattr(
        corpora.subprocess, "Popen", lambda *args, **options: workers.append(popen(*args, **options)) or workers[-1]
    )
    documents = shard.read()
    assert next(documents).startswith("0 x")
    assert all(os.getpgid(worker.pid) == worker.pid for worker in workers)  # a terminal's Ctrl-C does not reach them
    del documents
    assert workers and all(worker.returncode is not None for worker in workers)
    assert capfd.readouterr().err == ""


def test_a_real_part_of_the_standard_library(monkeypatch):
    monkeypatch.setattr(corpora, "_STANDARD_LIBRARY", Path(sysconfig.get_path("stdlib"), "json"))
    (sources,) = read("stdlib").values()
    assert Path(json.__file__).read_text() in sources


def test_a_package_file_that_is_missing(embedded):
    embedded({}, {"package/a.py": '"""A."""'})
    (corpora._STANDARD_LIBRARY / "site-packages/package/a.py").unlink()
    with pytest.raises(DataError, match=r"stopped at or before .*package/a\.py"):
        read("docstrings")


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "input"
    path.write_bytes("één\r\n\ntwo\n".encode())
    assert read(path) == {"text": ["één\r\n\ntwo\n"]}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.ndjson.gz", "rows.json"])
def test_jsonl(tmp_path, name):
    rows = [{"text": "one\ntwo", "id": 1}, {"text": ""}, {"text": None}, {"text": "a\ud800b 😀"}]
    content = ("\n".join(map(json.dumps, rows)) + "\n\n").encode()
    path, suffix = tmp_path / name, Path(name).suffix
    if suffix == ".zst":
        with pyarrow.output_stream(path, compression="zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content) if suffix == ".gz" else codecs.BOM_UTF8 + content)
    assert read(path) == {path.name: ["one\ntwo", "a���b 😀"]}


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", id=[1, 2, 3, 4], text=["one", None, "", "two"])
    assert list(read_parquet(path)) == ["one", "", "", "two"]
    assert read(path) == {"rows.parquet": ["one", "two"]}


def test_parquet_with_a_dictionary_of_strings(tmp_path):
    text = pyarrow.array(["one", "two", None, "one"]).dictionary_encode()
    assert list(read_parquet(write_parquet(tmp_path / "rows.parquet", text=text))) == ["one", "two", "", "one"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "één \ufeff".encode())
    assert read(tmp_path / "a.txt") == {"text": ["één \ufeff"]}


def test_a_long_text_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE_CHARS", 2**12)
    path = tmp_path / "a.txt"
    text = "Zwei Wörter 👩‍👧\r\n" * 2**16
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    (document,) = read(path)["text"]
    tracemalloc.start()
    size = longest = 0
    for piece in pieces(document):
        assert text.startswith(piece, size)
        size, longest = size + len(piece), max(longest, len(piece))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == len(text) and longest < 2**13 and peak < 2**17
    with path.open("ab") as file:
        file.write(b"\xff")
    (document,) = read(path)["text"]
    with pytest.raises(DataError, match=f"not UTF-8: invalid start byte at byte {path.stat().st_size - 1};"):
        list(pieces(document))
    path.write_bytes(text.encode() + "é".encode()[:1])
    with pytest.raises(DataError, match=f"not UTF-8: unexpected end of data at byte {path.stat().st_size - 1};"):
        list(pieces(document))


def test_zstd_with_a_long_window_is_refused_with_a_way_out(tmp_path):
    # A frame that announces a window of 256 MiB, and one empty raw block.
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, 18 << 3]) + b"\x01\x00\x00"
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    with pytest.raises(DataError, match=r"a\.jsonl\.zst cannot be read.*: decompress it first, with zstd -d --long=31"):
        read(tmp_path / "a.jsonl.zst")


def test_a_folder_leaves_out_our_runs(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    for run in ("out/small", "out/sweep/one"):
        (tmp_path / run).mkdir(parents=True)
        for name in ("config.json", "status.json", "metrics.jsonl", "samples.txt"):
            (tmp_path / run / name).write_text("{}")
    assert read(tmp_path) == {"text": ["mine"]}


def test_folder(tmp_path):
    for name in (
        "b.md",
        "a/z.PY",
        "a/b.txt",
        ".hidden.txt",
        ".git/c.txt",
        "image.png",
        "empty.txt",
        "d.JSONL",
        "e.json",
        "f.csv",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name == "empty.txt" else json.dumps({"text": name}))
    write_parquet(tmp_path / "a/t.parquet", text=["row"])
    texts = [json.dumps({"text": name}) for name in ("a/b.txt", "a/z.PY", "b.md")]
    assert read(tmp_path) == {"a/t.parquet": ["row"], "d.JSONL": ["d.JSONL"], "text": texts}
    assert open_corpus(str(tmp_path)).name == tmp_path.name


def test_fingerprint_of_a_folder_follows_its_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = open_corpus(str(tmp_path)).fingerprint
    assert open_corpus(f"{tmp_path}/../{tmp_path.name}").fingerprint == first
    (tmp_path / "a.txt").write_text("three")
    second = open_corpus(str(tmp_path)).fingerprint
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, open_corpus(str(tmp_path)).fingerprint}) == 3


def test_files_of_one_name_size_and_time_are_two_corpora(tmp_path):
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.txt").write_text(name)
        os.utime(tmp_path / name / "data.txt", (0, 0))
        found.append(open_corpus(str(tmp_path / name / "data.txt")).fingerprint)
    (tmp_path / "two" / "data.txt").write_text("new")
    os.utime(tmp_path / "two" / "data.txt", (0, 0))
    assert len({*found, open_corpus(str(tmp_path / "two" / "data.txt")).fingerprint}) == 3


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("there")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("here")
    (tmp_path / "here" / "books").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "here")
    assert read(tmp_path / "here") == {"text": ["here", "there"]}


def test_a_line_nested_too_deep(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not a line of JSON \("):
        read(tmp_path / "a.jsonl")


def test_a_parquet_string_that_is_not_utf8(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=["caf\u00e9"])
    path.write_bytes(path.read_bytes().replace("caf\u00e9".encode(), b"caf\xe9 "))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet: "):
        list(read_parquet(path))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"", "empty.txt holds no text"),
        ("image.txt", b"PNG\0\1", "image.txt is not text: byte 3 of it is NUL"),
        ("latin.txt", b"caf\xe9 au lait", "latin.txt is not UTF-8: invalid continuation byte at byte 3"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl:3: not a line of JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not a line of JSON ('utf-8' codec can't decode byte 0xff"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: not an object with a field 'text' but list"),
        (
            "a.jsonl",
            b'{"body": "b", "text": 1}\n',
            "a.jsonl:1: no field 'text' holding a string; its fields: body (str), text",
        ),
        ("a.json", b'[\n{"text": "a"}\n]', "a.json:1: not a line of JSON"),
        ("a.json", b'[{"text": "a"}]', "a.json:1: not an object with a field 'text' but list; each line is to be"),
        ("a.csv", b"text\na\n", "a.csv is a table: convert it to JSONL or Parquet"),
        ("utf-16.txt", "text".encode("utf-16"), "utf-16.txt is UTF-16: convert it to UTF-8"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz cannot be read: Not a gzipped file"),
        # The fixed mtime makes the bytes deterministic: they are part of the test's id, equal in all workers.
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-4], "a.jsonl.gz cannot be read: Compressed file ended before"),
        ("a.jsonl.zst", b"plain", "a.jsonl.zst cannot be read: ZSTD decompress failed"),
        ("a.parquet", b"PAR1 not PAR1", "a.parquet cannot be read as Parquet: "),
    ],
)
def test_bad_files(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert f"{tmp_path}/{told}" in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_is_deleted_after_opening(tmp_path, name):
    path = tmp_path / name
    path.write_text("text")
    (shard,) = open_corpus(str(path)).shards()
    path.unlink()
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        list(shard.read())


def test_parquet_without_text_names_its_columns(tmp_path):
    with pytest.raises(DataError, match=r"no column 'text' of strings; its columns: text \(int64\), body \(string\)"):
        read(write_parquet(tmp_path / "a.parquet", text=[1], body=["b"]))


def test_folder_without_text(tmp_path):
    (tmp_path / "image.png").write_bytes(b"PNG")
    with pytest.raises(DataError, match=r"holds no text.*\.md.*\.parquet"):
        open_corpus(str(tmp_path))


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(DataError, match=r"'tinystory' is no file or folder.*did you mean tinystories\?") as error:
        open_corpus("tinystory")
    assert all(name in str(error.value) for name in CORPORA)


def test_corpus_name_wins_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile/a.txt").write_text("mine")
    assert not open_corpus("pile").deduplicate
    assert read("./pile") == {"text": ["mine"]}


def test_wikitext_rows_become_articles():
    one = ["", " = One = \n", "", " = is a sign . \n", " = = Part = = \n", " More . \n"]
    two = [" = Two = Too = \n", "", " Text . \n"]
    assert list(filter(None, wikitext_articles([*one, *two]))) == [
        "".join(row or "\n" for row in one[1:]),
        "".join(row or "\n" for row in two),
    ]


def test_the_size_of_a_text_is_known_unless_it_is_compressed(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    assert open_corpus(str(tmp_path)).size == 7 + 18
    (tmp_path / "c.jsonl.gz").write_bytes(b"\x1f\x8b")
    assert open_corpus(str(tmp_path)).size == 0


def test_a_column_by_name(tmp_path):
    rows = [{"body": "one", "title": "t"}, {"body": "two", "title": None}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_parquet(tmp_path / "rows.parquet", body=["three"], title=["u"])
    (tmp_path / "a.txt").write_text("text")
    assert read(f"{tmp_path}/rows.jsonl#body") == {"rows.jsonl": ["one", "two"]}
    assert read(f"{tmp_path}/rows.parquet#title") == {"rows.parquet": ["u"]}
    assert read(f"{tmp_path}#title") == {"rows.jsonl": ["t"], "rows.parquet": ["u"]}
    assert read(f"{tmp_path}/*.p*#body") == {f"{tmp_path}/rows.parquet": ["three"]}
    columns = [f"{tmp_path}/rows.jsonl{column}" for column in ("", "#body", "#title")]
    opened = [open_corpus(name) for name in columns]
    assert len({corpus.fingerprint for corpus in opened}) == 3 and opened[1].name == "rows.jsonl#body"


def test_the_only_column_of_strings_is_the_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "body": "one"}\n{"body": "two", "other": "x"}\n{"id": 2}')
    with pytest.raises(DataError, match=r"rows\.jsonl:3: no field 'body' holding a string; its fields: id \(int\);"):
        read(tmp_path / "rows.jsonl")
    assert read(write_parquet(tmp_path / "a.parquet", id=[1], body=["b"])) == {"a.parquet": ["b"]}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.txt#text", "a.txt#text has no column 'text': only JSONL and Parquet files have columns"),
        (
            "rows.jsonl#titel",
            "rows.jsonl:1: no field 'titel' holding a string; its fields: body (str), title (str);",
        ),
        ("rows.jsonl", "its fields: body (str), title (str); choose one by its name after the corpus"),
        ("nowhere.jsonl#body", "nowhere.jsonl#body' is no file or folder"),
        ("**/*.rst", "no file matches"),
        ("train.bin", "train.bin is no text: for tokens, give the folder"),
    ],
)
def test_names_of_columns_and_patterns_that_are_wrong(tmp_path, name, told):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    (tmp_path / "rows.jsonl").write_text('{"body": "b", "title": "t"}')
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert told in str(error.value)


def test_a_pattern_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("notes/a.md", "notes/deep/er/b.md", "notes/c.txt", "notes/.hidden/d.md", "out/run/samples.md"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(path)
    for name in ("config.json", "status.json"):
        Path("out/run", name).write_text("{}")
    Path("notes/rows.jsonl").write_text('{"text": "row"}')
    assert read("notes/**/*.md") == {"text": ["notes/a.md", "notes/deep/er/b.md"]}
    assert read("notes/*.md") == read("n?tes/[ab].md") == {"text": ["notes/a.md"]}
    assert read("notes/*") == {"notes/rows.jsonl": ["row"], "text": ["notes/a.md", "notes/c.txt"]}
    assert read("**/*.md") == read("notes/**/*.md")  # without those of a run
    with pytest.raises(DataError, match="no file matches"):
        read("out/**/*.md")
    first = open_corpus("notes/*.md")
    Path("notes/new.md").write_text("new")
    assert open_corpus("notes/*.md").fingerprint != first.fingerprint and first.name == "notes/*.md"
