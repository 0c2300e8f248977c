"""Names become documents: every format and layout gives the same text; what is wrong is said, or counted and named."""

import bz2
import gzip
import json
import shutil
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from shards import corpus, sources
from shards.corpus import SAMPLED, Tally, documents_in
from shards.sources import Source
from tests.conftest import documents, generated_documents

WRITTEN = generated_documents(12)
ROWS = ["\n".join(document) for document in WRITTEN]
EXPECTED = [[sentence.replace(" .", ".") for sentence in document] for document in WRITTEN]
SENTENCES = [sentence for document in EXPECTED for sentence in document]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def small_blocks(data: bytes) -> bytes:
    return bz2.compress(data, 1)


def in_members(data: bytes) -> bytes:
    """A .gz as `cat a.gz b.gz` makes it."""
    return gzip.compress(data[:500]) + gzip.compress(data[500:])


def text_bytes() -> bytes:
    return "\n\n".join(ROWS).encode() + b"\n"


def json_bytes(column: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, column: row}) + "\n" for n, row in enumerate(ROWS)).encode()


def write_parquet(path, rows, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"id": range(len(rows)), column: pyarrow.array(rows, pyarrow.string())}), path,
                        row_group_size=5)
    return path


def read(source: Source, skip: bool = False) -> tuple[list[list[str]], Tally]:
    tally = Tally(skip)
    return [form.sentences(units) for form, units in source.documents(tally)], tally


@pytest.mark.parametrize("name, data", [
    ("a.txt", text_bytes()), ("a.txt", b"\xef\xbb\xbf" + text_bytes().replace(b"\n", b"\r\n")),
    ("a.txt.gz", gzip.compress(text_bytes())), ("a.txt.gz", in_members(text_bytes())), ("a.zst", zstd(text_bytes())),
    ("a.txt.bz2", bz2.compress(text_bytes())), ("a.jsonl", json_bytes()), ("a.json.gz", gzip.compress(json_bytes())),
    ("a.ndjson.zst", zstd(json_bytes())), ("a.parquet", None)])
def test_every_format_gives_the_same_documents(tmp_path, name, data):
    if data is None:
        write_parquet(tmp_path / name, ROWS)
    else:
        (tmp_path / name).write_bytes(data)
    for given in (str(tmp_path / name), f"{tmp_path}/*", *([str(tmp_path)] if name != "a.zst" else [])):
        source = Source.opened(given)
        assert source.bytes == (tmp_path / name).stat().st_size
        for _ in range(2):
            found, tally = read(source)
            assert found == EXPECTED and tally.read == source.bytes
        assert "lines" in str(source) and ("a row is a document" in str(source)) == (name[2] in "jnp")


def test_a_column_is_named_behind_the_path(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_bytes("body"))
    write_parquet(tmp_path / "b.parquet", ROWS, "body")
    for given in (tmp_path / "a.jsonl", tmp_path / "b.parquet"):
        assert list(documents(f"{given}:body")) == EXPECTED
    assert list(documents(f"{tmp_path}:body")) == list(documents(f"{tmp_path}/*:body")) == EXPECTED * 2
    with pytest.raises(ValueError, match=r"a.jsonl: line 1: no text in column 'text' \(PATH:COLUMN names another\) .*body"):
        Source.opened(str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="b.parquet: no text in column 'id'; name one of {'id': 'int64', 'body': 'string'}"):
        Source.opened(f"{tmp_path / 'b.parquet'}:id")


@pytest.mark.parametrize("name, content, says", [
    ("a.txt", b"fine\nbad \xff byte\n", "a.txt: line 2: cannot be read .'utf-8' codec can't decode byte 0xff in position 4.*; "
     "mend it or get it again, or leave such records out with --on-error skip"),
    ("a.txt", b"fine\nnu\0l\n", "a.txt: line 2: a NUL byte; mend it"),
    ("a.txt", b"A sentence.\n" * (SAMPLED + 5) + b"\xe9\n", "line 2,006: .* byte 0xe9 in position 0"),
    ("a.txt", b"", "a.txt: no document in it; leave it out"),
    ("a.txt", b" = Title = \n\n = = Part = = \n\n", "a.txt: no document in it; leave it out"),
    ("a.jsonl", b'{"text": "Fine."}\n[1]\n', "a.jsonl: line 2: no text in column 'text'"),
    ("a.jsonl", b'{"text": "Fine."}\n{"text": 3}\n', "a.jsonl: line 2: no text in column 'text' .* of .*: 3}"),
    ("a.jsonl", b'{"text": "Fine."}\n{"text": ["no"]}\n', "a.jsonl: line 2: no text in column 'text'"),
    ("a.jsonl", b'{"text": "Fine."}\n\n{"text": "cu\n', "a.jsonl: line 3: cannot be read .Unterminated string"),
    ("a.parquet", b"PAR1 no", "a.parquet: cannot be read on after byte 0 .Parquet"),
    ("b.txt", b"fine\n", r"c.txt: no such file .*; write PATH\[:COLUMN\]"),
    ("b.md", b"fine\n", "a folder without text; write PATH"),
])
def test_a_bad_file_says_what_to_do(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    given = {"b.txt": tmp_path / "c.txt", "b.md": tmp_path}.get(name, tmp_path / name)
    with pytest.raises(ValueError, match=says):
        list(documents(str(given)))


@pytest.mark.parametrize("given, says", [
    ("no/such/*.txt", "no such file or match"), ("no/such/a.parquet:body", "no such file"),
    *((f"books.txt={weight}", "a weight must be above 0 and at most 255") for weight in ("0", "-1", "256", "nan", "inf")),
    *((given, r"write hf:NAME\[:CONFIG\]:COLUMN, wikitext:\[NAME:\]CONFIG or bookcorpus")
      for given in ("hf", "hf:a/b", "hf:a:b:c:d", "wikitext", "wikitext:a:b:c", "bookcorpusopen:a:b:c")),
])
def test_an_unknown_source_says_what_to_give(given, says):
    with pytest.raises(ValueError, match=says):
        Source.opened(given)


def test_bad_records_are_left_out_counted_and_named(tmp_path):
    lines = [b"One sentence.", b"A bad \xff byte.", b"Another sentence.", b"", b"A NUL \0 byte.", b"A third one."]
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "Fine."}\n{"text": null}\n{"tex\xfft": 1}\n' + b"no\n" * 25)
    write_parquet(tmp_path / "c.parquet", ["Good.", None, "Better."])
    (tmp_path / "d.txt.gz").write_bytes(b"no gzip at all")
    found, tally = read(Source.opened(str(tmp_path)), skip=True)
    assert found == [["One sentence."], ["Another sentence."], ["A third one."], ["Fine."], ["Good."], ["Better."]]
    assert tally.counts["bad_records"] == 2 + 27 + 1 + 1 and len(tally.bad) == 20
    assert [text.removeprefix(f"{tmp_path}/") for text in tally.bad[:4]] == [
        "a.txt: line 2: cannot be read ('utf-8' codec can't decode byte 0xff in position 6: invalid start byte)",
        "a.txt: line 5: a NUL byte",
        "b.jsonl: line 2: no text in column 'text' (PATH:COLUMN names another) of b'{\"text\": null}\\n'",
        "b.jsonl: line 3: cannot be read ('utf-8' codec can't decode byte 0xff in position 5: invalid start byte)"]


@pytest.mark.faults
@pytest.mark.parametrize("name, pack", [("a.txt.gz", gzip.compress), ("a.txt.zst", zstd), ("a.txt.bz2", small_blocks)])
def test_a_file_that_is_cut_is_never_taken_for_whole(tmp_path, name, pack):
    data = pack("".join(f"Sentence {n * n} stands here.\n\n" for n in range(20_000)).encode())
    for size in (len(data) // 2, len(data) - 1):
        (tmp_path / name).write_bytes(data[:size])
        source = Source.opened(str(tmp_path / name))
        with pytest.raises(ValueError, match=rf"{name}: cannot be read on after byte [\d,]+ \(Truncated.*get it again"):
            read(source)
        found, tally = read(source, skip=True)
        assert 0 < len(found) < 20_000 and tally.counts["bad_records"] == len(tally.bad) == 1
        assert found[-1][-1].startswith("Sentence ")


def test_reading_is_lazy(tmp_path, monkeypatch):
    """A file larger than memory without a blank line: its first document comes before the file is read."""
    monkeypatch.setattr(corpus, "LARGEST", 10_000)
    lines = [f"A sentence of a long file has number {n * n}" for n in range(50_000)]
    (tmp_path / "lines.txt").write_text("".join(f"{line}.\n" for line in lines))
    (tmp_path / "wrapped.txt").write_text("\n".join(lines))
    parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "rows.parquet")  # one row group
    seen = []
    monkeypatch.setattr(sources, "documents_in", lambda form, texts, tally: documents_in(form, counted(texts), tally))

    def counted(texts):
        for number, text in enumerate(texts):
            seen.append((number, tally.read))
            yield text

    for name, verdict in (("lines.txt", "a sentence each"), ("wrapped.txt", "wrapped lines"), ("rows.parquet", "a row")):
        source, tally = Source.opened(str(tmp_path / name)), Tally()
        assert verdict in str(source) and len(next(source.documents(tally))[1][0]) <= 10_000
        assert len(seen) < 1_000
        seen.clear()
    list(source.documents(tally := Tally()))
    assert len({read for _, read in seen}) > 3  # the row group came in parts


@pytest.fixture
def wikitext_repository(tmp_path):
    """A repository as Salesforce/wikitext is laid out: a row is a line with its end; an article goes over two files."""
    lines = ["", " = Fox = ", "", " It is red @-@ brown . ", "", " = = Range = = ", "", " Here . ", "",
             " = Wolf = ", "", " Grey . "]
    lines = [f"{line}\n" if line else "" for line in lines]
    for n, part in enumerate((lines[:7], lines[7:])):
        write_parquet(tmp_path / f"repository/wikitext-2-v1/train-{n:05d}-of-00002.parquet", part)
    write_parquet(tmp_path / "repository/wikitext-2-v1/test-00000-of-00001.parquet", lines[9:])
    return tmp_path / "repository"


@pytest.mark.parametrize("card", [False, True])
def test_wikitext_of_the_hub_is_cut_at_titles(wikitext_repository, card):
    if card:
        (wikitext_repository / "README.md").write_text(
            "---\nconfigs:\n- config_name: wikitext-2-v1\n  data_files:\n" + "".join(
                f"  - split: {split}\n    path: wikitext-2-v1/{split}-*\n" for split in ("train", "test")) + "---\n")
    source = Source.opened(f"wikitext:{wikitext_repository}:wikitext-2-v1=3")
    assert source.weight == 3 and "titles end documents" in str(source)
    found, tally = read(source)
    assert found == [["It is red-brown.", "Here."], ["Grey."]] and tally.counts["headings"] == 3
    assert list(documents(f"wikitext:{wikitext_repository}:wikitext-2-v1@test")) == [["Grey."]]
    with pytest.raises(ValueError, match="no split 'dev'; name one of train, test as @SPLIT"):
        Source.opened(f"wikitext:{wikitext_repository}:wikitext-2-v1@dev")
    with pytest.raises(ValueError, match="cannot be opened.*wikitext-9"):
        Source.opened(f"wikitext:{wikitext_repository}:wikitext-9")


def test_bookcorpus_is_cut_into_runs_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "RUN", 50)
    write_parquet(tmp_path / "plain_text/train-00000-of-00001.parquet", [row for rows in WRITTEN for row in rows])
    source = Source.opened(f"bookcorpus:{tmp_path}:plain_text")
    assert "50 rows are a document" in str(source)
    found, _ = read(source)
    assert found == [SENTENCES[n:n + 50] for n in range(0, len(SENTENCES), 50)]


def test_a_row_of_bookcorpusopen_is_a_book(tmp_path):
    book = ("Title\n*** START OF THIS PROJECT GUTENBERG EBOOK A ***\n\nIt was a long day, and the sun\nwas slow. Nobody came.\n"
            "*** END OF THIS PROJECT GUTENBERG EBOOK A ***\nLicence\n")
    write_parquet(tmp_path / "train-00000-of-00001.parquet", [book, "Another book, that has no\nheader and goes\non."])
    found, tally = read(Source.opened(f"bookcorpusopen:{tmp_path}"))
    assert found == [["It was a long day, and the sun was slow.", "Nobody came."],
                     ["Another book, that has no header and goes on."]]
    assert tally.counts["gutenberg_lines"] == 4


def test_any_other_set_is_read_by_its_column(tmp_path):
    write_parquet(tmp_path / "en/train-00000-of-00001.parquet", ROWS, "body")
    assert list(documents(f"hf:{tmp_path}:en:body")) == list(documents(f"hf:{tmp_path}:body")) == EXPECTED
    with pytest.raises(ValueError, match="no text in column 'text'; name one of {'id': 'int64', 'body': 'string'}"):
        Source.opened(f"hf:{tmp_path}:en:text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/train.csv").write_text("body\nx\n")
    with pytest.raises(ValueError, match="its files are .csv .*#refs/convert/parquet at the end takes"):
        Source.opened(f"hf:{tmp_path / 'other'}:body")


@pytest.mark.parametrize("given, name, revision, says", [
    ("bookcorpus", "bookcorpus/bookcorpus", "refs/convert/parquet", "no network .NAME can be a folder of Parquet files"),
    ("wikitext:wikitext-2-v1#abc=2", "Salesforce/wikitext", "abc", "wikitext cannot be opened: ConnectionError: no network"),
    ("bookcorpusopen", "lucadiliello/bookcorpusopen", None, "no network"),
    ("hf:some/script:en:text@test", "some/script", None, "no longer supported, but found script.py .*#refs/convert/parquet at")])
def test_what_the_hub_does_not_give_is_said(monkeypatch, given, name, revision, says):
    def dataset_info(self, *about, revision, timeout):
        asked.append((*about, revision))
        if name != "some/script":
            raise ConnectionError("no network")

    def load_dataset_builder(*about, **more):
        raise RuntimeError("Dataset scripts are no longer supported, but found script.py")  # as datasets does

    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    with pytest.raises(ValueError, match=says):
        Source.opened(given)
    assert asked == [(name, revision)]


def test_files_of_the_hub_are_streamed_and_their_loss_is_no_bad_record(monkeypatch):
    import fsspec

    files = [f"memory://set/{n}.jsonl.gz" for n in range(2)]  # as hf://datasets/... , a file system known by its prefix
    for file in files:
        with fsspec.open(file, "wb") as written:
            written.write(gzip.compress(json_bytes()))
    builder = SimpleNamespace(config=SimpleNamespace(data_files={"train": files}))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *about, **more: None)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *about, **more: builder)
    source = Source.opened("hf:some/set:text")
    assert read(source)[0] == EXPECTED * 2 and source.bytes is None and source.files == ()
    assert source.stated()["files"] == 2
    fsspec.filesystem("memory").rm("/set/1.jsonl.gz")
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"1.jsonl.gz: cannot be read on after byte 0 .*give the same command again"):
            read(source, skip)
    with fsspec.open(files[1], "wb") as written:
        written.write(gzip.compress(b"no JSON"))
    with pytest.raises(ValueError, match=r"^memory://set/1.jsonl.gz: line 1: .*--on-error skip$"):
        read(source)


def test_a_weight_stands_behind_the_name_and_a_path_with_a_sign_wins(tmp_path):
    for name in ("a.txt", "b.txt", "b.txt=2"):
        (tmp_path / name).write_text(f"This is {name}.\n")
    assert (Source.opened(f"{tmp_path}/a.txt=0.5").weight, Source.opened(f"{tmp_path}/a.txt").weight) == (0.5, 1)
    named = Source.opened(f"{tmp_path}/b.txt=2")
    assert named.weight == 1 and read(named)[0] == [["This is b.txt=2."]]
    assert Source.opened(f"{tmp_path}/b.txt=2=3").weight == 3
    assert "(weight 0.5)" in str(Source.opened(f"{tmp_path}/*.txt=.5"))


def test_what_is_stated_names_the_files_and_not_their_place(tmp_path):
    (tmp_path / "here/deep").mkdir(parents=True)
    (tmp_path / "here/deep/a.txt").write_bytes(text_bytes())
    (tmp_path / "here/b.txt").write_bytes(b"\n")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (Source.opened(str(tmp_path / name)) for name in ("here", "there"))
    stated = here.stated()
    assert json.loads(json.dumps(stated)) == stated == there.stated() | {"name": str(tmp_path / "here")}
    assert stated["files"] == len(here.files) == len(stated["verdicts"]) == 2 and stated["bytes"] == len(text_bytes()) + 1
    assert read(here)[0] == EXPECTED
    (tmp_path / "there/b.txt").write_bytes(b"\n\n")
    assert Source.opened(str(tmp_path / "there")).stated()["sha256"] != stated["sha256"]
