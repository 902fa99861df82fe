"""apps/gpt's data: what is prepared is what was given, whatever stops it; ranks read their parts.

pytest test/apps/gpt/test_gpt_data.py
"""

import gzip
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.ranks import run

import ringx
from apps.common.loader import Loader
from apps.gpt.data import dataset, documents, prepare
from apps.gpt.data.dataset import Rows, expect_window, open_dataset
from apps.gpt.data.format import INDEX, index_digest, read_index
from apps.gpt.data.prepare import dataset_for
from apps.gpt.data.tokenizer import load_tokenizer

LAYOUTS = ("zigzag", "contiguous", "striped")
DOCUMENTS = [  # of lengths 1 to 300, with what text may hold
    *(
        "a",
        "Zwölf Boxkämpfer jagen Viktor\nquer über den Sylter Deich. 🙂",
        "\n\n  indented\ttext\r\n",
        "<|end_of_text|> is text",
    ),
    *(" ".join(f"word{i * j % 17}" for j in range(i)) + "\n" for i in range(1, 40)),
]


def jsonl(file: Path, documents=DOCUMENTS, key="text") -> Path:
    file.write_text(
        "".join(json.dumps({"id": i, key: d}) + "\n" for i, d in enumerate(documents)),
        encoding="utf-8",
    )
    return file


def prepared(tmp_path: Path, documents=DOCUMENTS, name="tokens", **settings) -> Path:
    out = tmp_path / name
    prepare.prepare(
        [jsonl(tmp_path / f"{name}.jsonl", documents)], out, **{"tokenizer": "bytes", **settings}
    )
    return out


def stream(tokens: dataset.Tokens) -> list[int]:
    return np.concatenate(tokens.shards).tolist()


def as_bytes(documents) -> list[int]:
    """The stream of byte tokens, written out."""
    return [t for d in documents for t in [*(b + 1 for b in d.encode()), 0]]


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture(scope="module")
def default(tmp_path_factory) -> Path:
    """The default text, as the trainer asks for it."""
    return dataset_for(None, tmp_path_factory.mktemp("default") / "below" / "tokens", vocab=1024)


# ---- what is prepared


@pytest.mark.fast
def test_every_format_gives_the_same_tokens(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "texts"
    for i, text in enumerate(DOCUMENTS):
        file = folder / f"{i // 10}" / f"{i:03d}{('.txt', '.md', '')[i % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    (folder / ".hidden").write_bytes(b"\xff")
    (folder / "0" / "empty").write_bytes(b"")
    table = arrow.table({"id": list(range(len(DOCUMENTS))), "body": DOCUMENTS})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    jsonl(tmp_path / "plain.jsonl")
    (tmp_path / "packed.jsonl.gz").write_bytes(
        gzip.compress(jsonl(tmp_path / "x.jsonl", key="body").read_bytes())
    )
    halves = [
        jsonl(tmp_path / "1.jsonl", [*DOCUMENTS[:9], ""]),
        jsonl(tmp_path / "2.jsonl", DOCUMENTS[9:]),
    ]

    found = {}
    for name, inputs, key in (
        ("folder", [folder], None),
        ("jsonl", [tmp_path / "plain.jsonl"], None),
        ("gz", [tmp_path / "packed.jsonl.gz"], "body"),
        ("parquet", [tmp_path / "a.parquet"], "body"),
        ("two", halves, "text"),
    ):
        out = tmp_path / "out" / name
        prepare.prepare(inputs, out, tokenizer="bytes", text_key=key, val_fraction=0.3)
        assert read_index(out)["documents"] == len(DOCUMENTS)
        found[name] = [open_dataset(out, split, verify="full").sha256 for split in ("train", "val")]
        assert not list((tmp_path / "out").glob("*.partial"))
    assert len({tuple(f) for f in found.values()}) == 1, found
    train, val = (open_dataset(tmp_path / "out" / "gz", split) for split in ("train", "val"))
    assert stream(train) + stream(val) == as_bytes(DOCUMENTS)
    held = len(val.starts)
    assert stream(val) == as_bytes(DOCUMENTS[-held:])
    sizes = [len(d) for d in DOCUMENTS]
    assert (
        abs(sum(sizes[-held:]) / sum(sizes) - 0.3) <= max(sizes) / sum(sizes) / 2
    )  # as near as whole documents can be


@pytest.mark.fast
def test_a_trained_tokenizer_knows_nothing_of_what_is_held_back(tmp_path):
    documents = ["in train in train in train " * 9] * 19 + ["Quark Quark Quark " * 9]
    folder = prepared(tmp_path, documents, tokenizer="train", vocab=300)
    tokens = (folder / "tokenizer.json").read_text()
    assert "train" in tokens and "ark" not in tokens
    a, b = open_dataset(folder), load_tokenizer(folder)
    assert a.vocab == b.vocab <= 300 and a.eos == b.eos == 0
    assert b.decode(stream(a)) == "".join(documents[:19])
    assert stream(a) == [t for d in documents[:19] for t in [*b.encode(d), 0]]


@pytest.mark.fast
def test_one_document_is_cut_at_a_line_end(tmp_path, monkeypatch):
    text = "".join(f"line {i}\n" for i in range(1000))
    for piece in (2**18, 100):  # the cut lies within a piece of many, too
        monkeypatch.setattr(documents, "PIECE_CHARACTERS", piece)
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 4 * piece)
        (tmp_path / "book").write_text(text)
        prepare.prepare([tmp_path / "book"], tmp_path / f"{piece}", tokenizer="bytes")
        train, val = (
            load_tokenizer(tmp_path / f"{piece}").decode(
                stream(open_dataset(tmp_path / f"{piece}", s))
            )
            for s in ("train", "val")
        )
        assert train + val == text and train.endswith("\n")
        assert 0.94 < len(train) / len(text) <= 0.95
    for text, split in (
        ("ab", ["a", "b"]),
        ("one two three four", ["one two three ", "four"]),
        ("x", ["x"]),
        ("xx\n", ["xx", "\n"]),
    ):
        (tmp_path / "book").write_text(text)
        shutil.rmtree(tmp_path / "short", ignore_errors=True)
        prepare.prepare(
            [tmp_path / "book"], tmp_path / "short", tokenizer="bytes", val_fraction=0.1
        )
        got = [
            load_tokenizer(tmp_path / "short").decode(stream(open_dataset(tmp_path / "short", s)))
            for s in ("train", "val")[: len(split)]
        ]
        assert got == split
    with pytest.raises(ValueError, match="has no 'val' tokens, only train; prepare more text"):
        open_dataset(prepared(tmp_path, val_fraction=0.0), "val")


@pytest.mark.fast
def test_pieces_and_chunks_leave_documents_whole(tmp_path, monkeypatch):
    whole = prepared(tmp_path, shard_tokens=2**28)
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 13)
    monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 40)
    pieces = prepared(tmp_path, name="pieces", shard_tokens=2**28)
    assert {**contents(whole), INDEX: b""} == {**contents(pieces), INDEX: b""}
    (tmp_path / "text").write_bytes("".join(DOCUMENTS).encode())
    blocks = [
        p.text
        for p in documents._read_text(
            documents.list_inputs([tmp_path / "text"], tmp_path)[0][0], "", lambda read: None
        )
    ]
    assert "".join(blocks) == "".join(DOCUMENTS) and 1 < max(map(len, blocks)) <= 13


@pytest.mark.fast
def test_shards_are_read_as_one_stream(tmp_path):
    one, many = (
        prepared(tmp_path, val_fraction=0.0),
        prepared(tmp_path, name="many", shard_tokens=37, val_fraction=0.0),
    )
    a, b = open_dataset(one), open_dataset(many)
    assert (
        len(a.shards) == 1
        and {len(s) for s in b.shards[:-1]} == {37}
        and 1 <= len(b.shards[-1]) <= 37
    )
    assert stream(a) == stream(b) == as_bytes(DOCUMENTS) and a.length == b.length
    for seqlen in (1, 36, 37, 38, 100):
        assert a.num_windows(seqlen) == b.num_windows(seqlen) == (a.length - 1) // seqlen
        everything = range(a.num_windows(seqlen))
        for x, y in zip(a.take(everything, seqlen), b.take(everything, seqlen), strict=True):
            assert torch.equal(x, y)


@pytest.mark.fast
def test_more_tokens_than_two_bytes_hold(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["</s>"])
    words.enable_truncation(3)  # a file may say so; text is not cut for it
    words.enable_padding(length=50)
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    for count, dtype in ((70_001, np.uint32), (65_536, np.uint16)):
        if count == 65_536:
            small = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
            small["model"]["vocab"] = {f"w{i}": i for i in range(65_535)}
            small["added_tokens"][0]["id"] = 65_535
            (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(small))
        last = count - 2
        out = prepared(
            tmp_path,
            [f"w1 w2 w{last} w3", "w65000"],
            f"{count}",
            tokenizer=tmp_path / "words",
            val_fraction=0.0,
        )
        tokens = open_dataset(out)
        assert tokens.vocab == count and tokens.eos == count - 1
        assert {s.dtype for s in tokens.shards} == {np.dtype(dtype)}
        assert stream(tokens) == [1, 2, last, 3, count - 1, 65_000, count - 1]
        tokens.check_range()


def test_the_default_text_can_be_decoded_again(default):
    sources, source = documents.list_inputs([], Path("nowhere"))
    texts = [s.path.read_bytes().decode() for s in sources]
    assert (
        100_000 < sum(s.size for s in sources) <= documents.MAX_DEFAULT_BYTES
        and "standard library" in source
    )
    tokenizer = load_tokenizer(default)
    assert tokenizer.vocab == 1024
    got = "".join(
        tokenizer.decode(stream(open_dataset(default, split))) for split in ("train", "val")
    )
    assert got == "".join(texts) and "def __init__(self" in got
    index = read_index(default)
    assert str(Path(sys.prefix)) not in json.dumps(index) and index["documents"] == sum(
        map(bool, texts)
    )
    share = index["splits"]["val"]["tokens"] / sum(s["tokens"] for s in index["splits"].values())
    assert 0.03 < share < 0.08


@pytest.mark.fast
@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_tokenizers_encode_and_decode(tokenizer, tmp_path):
    t = load_tokenizer(
        prepared(tmp_path, tokenizer=tokenizer, **({"vocab": 300} if tokenizer == "train" else {}))
    )
    for text in (*DOCUMENTS, "", "日本語"):
        ids = t.encode(text)
        assert (
            t.decode([*ids, t.eos]) == text
            and t.eos not in ids
            and all(0 <= i < t.vocab for i in ids)
        )
    for wrong in (t.vocab, -1):
        with pytest.raises(
            ValueError, match=f"token {wrong} is none of the tokenizer's {t.vocab} tokens"
        ):
            t.decode([1, wrong])


# ---- what is read


@pytest.mark.fast
def test_an_epoch_reads_every_window_once(tmp_path):
    tokens = open_dataset(
        prepared(tmp_path, ["".join(chr(32 + i % 90) for i in range(10 * 7))], val_fraction=0.0)
    )
    assert tokens.length == 71 and tokens.num_windows(7) == 10

    def step(n, **changed):
        return tokens.rows(
            n, **{"global_batch": 2, "seqlen": 7, "seed": 3, "rows": range(2), **changed}
        ).tokens.tolist()

    rows = [row for n in range(10) for row in step(n)]
    first, second = rows[:10], rows[10:]
    assert (
        sorted(first)
        == sorted(second)
        == sorted(tokens.window(i, 7).tokens[0].tolist() for i in range(10))
    )
    assert len({tuple(row) for row in first}) == 10
    assert first != second
    assert step(4) == rows[8:10]  # resumed there
    assert step(4, seed=4) != rows[8:10]
    assert [
        row for n in range(4) for row in step(n, global_batch=5, rows=range(5))
    ] == rows  # another batch: the same order


@pytest.mark.fast
@pytest.mark.parametrize("dp", [1, 2, 3, 6])
def test_any_split_of_the_batch_reads_the_same(dp, default):
    tokens, ask = open_dataset(default), {"global_batch": 6, "seqlen": 50, "seed": 1}
    want = tokens.rows(17, rows=range(6), **ask)
    parts = [tokens.rows(17, rows=range(i * 6 // dp, (i + 1) * 6 // dp), **ask) for i in range(dp)]
    strided = [tokens.rows(17, rows=range(i, 6, dp), **ask) for i in range(dp)]
    for k in range(3):
        assert torch.equal(torch.cat([p[k] for p in parts]), want[k])
        assert torch.equal(torch.stack([strided[r % dp][k][r // dp] for r in range(6)]), want[k])
    for wrong in (range(5, 7), range(0), range(-1, 1)):
        with pytest.raises(ValueError, match=r"must be one or more of the global batch's 0\.\.5"):
            tokens.rows(0, rows=wrong, **ask)


@pytest.mark.fast
def test_labels_and_documents_by_counting(tmp_path):
    """Every window against the stream: labels are one further on, a document ends with its eos."""
    folder = prepared(tmp_path, shard_tokens=101, val_fraction=0.0)
    tokens, want = open_dataset(folder), as_bytes(DOCUMENTS)
    which = [n for n, d in enumerate(DOCUMENTS) for _ in range(len(d.encode()) + 1)]
    for seqlen in (5, 64, 333):
        for i in range(tokens.num_windows(seqlen)):
            got, at = tokens.window(i, seqlen), i * seqlen
            assert [x.shape for x in got] == [(1, seqlen)] * 3 and {x.dtype for x in got} == {
                torch.int64
            }
            assert got.tokens[0].tolist() == want[at : at + seqlen]
            assert got.labels[0].tolist() == want[at + 1 : at + seqlen + 1]
            assert got.documents[0].tolist() == [n - which[at] for n in which[at : at + seqlen]]
    with pytest.raises(ValueError, match="window 99999 is not one of"):
        tokens.window(99_999, 5)


@pytest.mark.fast
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world, seqlen", [(2, 16), (3, 17), (4, 23)])
def test_labels_and_positions_at_shard_edges(layout, world, seqlen, tmp_path):
    tokens = open_dataset(prepared(tmp_path))
    rows = tokens.rows(0, global_batch=2, seqlen=seqlen, seed=0, rows=range(2))
    whole = torch.cat([rows.tokens, rows.labels[:, -1:]], 1)  # [B, S + 1]
    ends = torch.cat(
        [torch.zeros(2, 1, dtype=torch.int64), (rows.tokens == tokens.eos).cumsum(1)[:, :-1]], 1
    )  # before each token
    cuts = run(
        world, lambda _: dataset.shard_rows(rows, layout=ringx.Sharding(seqlen, world, layout))
    )
    for mine in cuts:
        assert torch.equal(mine.tokens, whole[:, mine.positions])
        assert torch.equal(
            mine.labels, whole[:, mine.positions + 1]
        )  # of a shard's last token: the next one, on another rank
        assert torch.equal(mine.documents, ends[:, mine.positions])
    assert torch.equal(
        torch.cat([mine.positions for mine in cuts]).sort().values, torch.arange(seqlen)
    )


@pytest.mark.fast
def test_the_loader_works_ahead(default):
    tokens, begun = open_dataset(default), [threading.Event() for _ in range(5)]

    def make(step: int) -> Rows:
        begun[step].set()
        return tokens.rows(step, global_batch=2, seqlen=8, seed=0, rows=range(2))

    with Loader(make, 1, stop=5) as loader:
        first = next(loader)
        assert begun[2].wait(10) and not begun[0].is_set()  # nobody has asked for it yet
        time.sleep(0.05)
        assert not begun[3].is_set()  # one step, not more
        got = [first, *loader]
    want = [tokens.rows(n, global_batch=2, seqlen=8, seed=0, rows=range(2)) for n in range(1, 5)]
    assert len(got) == 4 and all(
        torch.equal(a.tokens, b.tokens) for a, b in zip(got, want, strict=True)
    )


@pytest.mark.fast
def test_the_loader_says_how_long_it_was_waited_for():
    with Loader(lambda step: time.sleep(0.2) or step, 7) as loader:
        assert next(loader) == 7 and 0.1 < loader.waited < 5
        time.sleep(0.4)
        assert next(loader) == 8 and loader.waited < 0.1 < loader.waited_total


@pytest.mark.fast
def test_the_loader_hands_errors_on_and_closes():
    def make(step):
        if step == 2:
            raise ValueError("broken at 2")
        return step

    with pytest.raises(ValueError, match="broken at 2"), Loader(make, 0) as loader:
        assert [next(loader), next(loader)] == [0, 1]
        next(loader)
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]
    with pytest.raises(StopIteration):
        next(loader)


# ---- interrupted, repeated, at the same time

KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from apps.gpt.data.prepare import prepare

text, out, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def attempt(after=None, call=None):
    child = os.fork()
    if child == 0:
        if call is not None:
            left = [call]
            def deadly(real):
                def wrapped(*arguments):
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return real(*arguments)
                return wrapped
            for name in ("fsync", "rename"):
                setattr(os, name, deadly(getattr(os, name)))
        try:
            prepare([text], out, vocab=300, shard_tokens=20_000)
            os._exit(0)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0

began = time.perf_counter()
assert attempt()
whole = time.perf_counter() - began
os.rename(out, out.with_name("whole"))
leftovers = 0
random.seed(seed)
for call in range(100):
    if attempt(call=call):
        break
    assert not out.exists()
    leftovers += any(out.with_name(out.name + ".partial").iterdir())
    for _ in range(call % 2):  # some more, at any moment, over what the others left
        if attempt(after=random.uniform(0, whole)):
            os.rename(out, out.with_name(f"done{call}"))
        assert not out.exists()
print(call, leftovers)
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, default):
    text = load_tokenizer(default).decode(stream(open_dataset(default))[:20_000])
    (tmp_path / "text").write_text(text)
    seed = str(random.randrange(10**6))
    command = [sys.executable, "-c", KILLER, str(tmp_path / "text"), str(tmp_path / "out"), seed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (seed, done.stderr)
    calls, leftovers = map(int, done.stdout.split())
    assert 6 <= calls < 99 and leftovers == calls  # it was in the middle of things
    whole = contents(tmp_path / "whole")
    assert sum(name.startswith("train-0") for name in whole) >= 2
    for folder in (tmp_path / "out", *tmp_path.glob("done*")):
        assert contents(folder) == whole
    assert not list(tmp_path.glob("*.partial"))


def test_the_command_in_another_process_gives_the_same_bytes(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", DOCUMENTS * 5)
    prepare.prepare([file], tmp_path / "here", vocab=500)
    command = [
        sys.executable,
        "apps/gpt/prepare.py",
        str(file),
        "--out",
        str(tmp_path / "there"),
        "--vocab",
        "500",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert (
        not done.stderr and "vocabulary" in done.stdout and "train" in done.stdout
    )  # no bar where no one looks


@pytest.mark.fast
def test_interrupted_it_leaves_nothing(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    file = jsonl(tmp_path / "a.jsonl")
    with monkeypatch.context() as m:
        m.setattr(prepare.SplitWriter, "close", stop)
        with pytest.raises(SystemExit) as left:
            prepare.main([str(file), "--out", str(tmp_path / "out")])
    assert left.value.code == 130 and capsys.readouterr().err.endswith(
        "interrupted; the same command starts over\n"
    )
    assert [f.name for f in tmp_path.iterdir()] == ["a.jsonl"]
    assert prepare.main([str(file), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.fast
def test_a_second_time_nothing_is_done(tmp_path, monkeypatch):
    file, out = jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    prepare.prepare([file], out, tokenizer="bytes")
    before = {f: f.stat().st_mtime_ns for f in (out, *out.iterdir())}
    monkeypatch.setattr(prepare, "write_tokens", None)
    file.touch()
    prepare.prepare([str(file)], str(out), tokenizer="bytes")
    assert {f: f.stat().st_mtime_ns for f in (out, *out.iterdir())} == before
    for change, message in (
        (
            {"tokenizer": "bytes", "val_fraction": 0.2},
            "prepared with val_fraction=0.05, not 0.2; name another folder, or delete",
        ),
        (
            {"tokenizer": "train", "vocab": 300},
            "tokenizer='bytes', not 'train', vocab=None, not 300",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare.prepare([file], out, **change)
    file.write_bytes(file.read_bytes().replace(b"word3", b"w0rd3"))
    with pytest.raises(ValueError, match="prepared from other inputs; name another folder"):
        prepare.prepare([file], out, tokenizer="bytes")


@pytest.mark.fast
def test_big_files_are_known_by_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_HASHED_BYTES", 100)
    folder = prepared(tmp_path)
    prepare.prepare([tmp_path / "tokens.jsonl"], folder, tokenizer="bytes")
    time.sleep(0.02)
    (tmp_path / "tokens.jsonl").touch()
    with pytest.raises(ValueError, match="other inputs"):
        prepare.prepare([tmp_path / "tokens.jsonl"], folder, tokenizer="bytes")


@pytest.mark.fast
def test_two_at_a_time_do_the_work_once(tmp_path, monkeypatch):
    file, out, writes, errors = jsonl(tmp_path / "a.jsonl"), tmp_path / "out", [], []
    write = prepare.write_tokens

    def slow(*arguments):
        writes.append(1)
        time.sleep(0.2)
        write(*arguments)

    def work():
        try:
            prepare.prepare([file], out, tokenizer="bytes")
        except Exception as e:  # noqa: BLE001 - shown below
            errors.append(e)

    monkeypatch.setattr(prepare, "write_tokens", slow)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert not errors and len(writes) == 1
    assert {f.name for f in tmp_path.iterdir()} == {"a.jsonl", "out"}
    open_dataset(out, verify="full")


@pytest.mark.fast
def test_files_that_change_meanwhile_are_noticed(tmp_path, monkeypatch):
    file = jsonl(tmp_path / "a.jsonl")
    make = prepare.SplitBoundary.make

    def grow(*arguments):
        with file.open("a") as f:
            f.write('{"text": "more"}\n')
        return make(*arguments)

    monkeypatch.setattr(prepare.SplitBoundary, "make", grow)
    with pytest.raises(ValueError, match="have changed while they were read"):
        prepare.prepare([file], tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists()


# ---- what the trainer calls


@pytest.mark.fast
def test_dataset_for(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", DOCUMENTS * 3)
    made = dataset_for(str(file), tmp_path / "cache", vocab=280)
    assert made == tmp_path / "cache" and open_dataset(made).vocab == 280
    assert (
        dataset_for(str(made), tmp_path / "unused", vocab=5) == made
        and not (tmp_path / "unused").exists()
    )
    assert dataset_for(str(file), tmp_path / "cache", vocab=280) == made
    with pytest.raises(
        ValueError, match=r"--data: .*cache holds tokens that were prepared with vocab=280, not 290"
    ):
        dataset_for(str(file), tmp_path / "cache", vocab=290)
    (tmp_path / "texts").mkdir()
    with pytest.raises(ValueError, match=r"--data: .*texts: the folder holds no files"):
        dataset_for(str(tmp_path / "texts"), tmp_path / "other", vocab=280)
    (tmp_path / "texts" / "a.md").write_text("ab")
    assert (
        open_dataset(dataset_for(str(tmp_path / "texts"), tmp_path / "other", vocab=9999)).vocab
        == 257
    )  # no pair comes twice


@pytest.mark.fast
def test_too_large_a_vocabulary_and_too_short_a_text(tmp_path):
    tokens = open_dataset(prepared(tmp_path, ["0123456789"], val_fraction=0.0))
    tokens.check_vocab(257)
    with pytest.raises(
        ValueError,
        match=r"tokens of vocabulary 257, but the model's vocab=256 is smaller; "
        r"take a model with vocab=257",
    ):
        tokens.check_vocab(256)
    expect_window(tokens, 10)
    with pytest.raises(
        ValueError,
        match=r"has 11 train tokens, but one sequence of --seqlen 11 and its last label take 12; "
        r"take a",
    ):
        expect_window(tokens, 11)
    with pytest.raises(ValueError, match="take a shorter --seqlen"):
        tokens.rows(0, global_batch=1, seqlen=11, seed=0, rows=range(1))


# ---- what can be wrong


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def edit(folder: Path, **changed) -> None:
    """As an index of another version would be: whole, but different."""
    index = {**read_index(folder), **changed}
    (folder / INDEX).write_text(json.dumps({**index, "sha256": index_digest(index)}))


@pytest.mark.fast
@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda d: (d / "train-00001.bin").write_bytes(b"12345"),
            r"train-00001\.bin has 5 bytes, but dataset\.json says 400: it is cut s",
        ),
        (
            lambda d: (d / "train-00001.bin").unlink(),
            r"train-00001\.bin of dataset\.json cannot be read: No such file or directory; delet",
        ),
        (
            lambda d: (d / "train-documents.bin").write_bytes(b""),
            r"train-documents\.bin has 0 bytes, but",
        ),
        (
            lambda d: flip(d / "train-00001.bin", 33),
            r"train-00001\.bin is damaged: its sha256 differs",
        ),
        (
            lambda d: flip(d / "train-documents.bin", 9),
            r"train-documents\.bin is damaged: its sha256 differs",
        ),
        (lambda d: flip(d / "dataset.json", 200), r"dataset\.json is damaged"),
        (
            lambda d: (d / "dataset.json").write_bytes((d / "dataset.json").read_bytes()[:-50]),
            r"dataset\.json is damaged: .*; delete the",
        ),
        (
            lambda d: (d / "dataset.json").write_text("[1]"),
            r"dataset\.json is of version None, but this program reads version 1",
        ),
        (
            lambda d: edit(d, version=2),
            r"dataset\.json is of version 2, but this program reads version 1; "
            r"delete the folder and prepare",
        ),
        (
            lambda d: (d / "dataset.json").unlink(),
            r"dataset\.json cannot be read: No such file or directory; make the folder with",
        ),
    ],
)
def test_damaged_folders(harm, message, tmp_path):
    folder = prepared(tmp_path, shard_tokens=200)
    harm(folder)
    with pytest.raises(ValueError, match=message) as e:
        open_dataset(folder, verify="full")
    assert "\n" not in str(e.value)
    if "sha256 differs" in message:  # not looked for unless it is asked for
        open_dataset(folder)
    else:
        with pytest.raises(ValueError, match=message):
            open_dataset(folder)


@pytest.mark.fast
def test_a_token_out_of_range_is_named(tmp_path):
    folder = prepared(tmp_path, shard_tokens=200)
    open_dataset(folder).check_range()
    file = np.memmap(folder / "train-00002.bin", "<u2", "r+")
    for at, wrong, first in ((90, 257, "90 is 257"), (77, 60_000, "77 is 60000")):
        file[at] = wrong
        file.flush()
        with pytest.raises(
            ValueError, match=rf"train-00002\.bin: token {first}, but the vocabulary has 257"
        ):
            open_dataset(folder).check_range()


@pytest.mark.fast
def test_another_tokenizer_is_noticed(tmp_path):
    folder = prepared(tmp_path, tokenizer="train", vocab=300)
    flip(folder / "tokenizer.json", 500)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the one that made these tokens"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        load_tokenizer(folder)


@pytest.mark.fast
def test_which_token_ends_a_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "STOP": 1}, unk_token="a"))
    t.add_special_tokens(["<s>"])
    t.save(str(tmp_path / "t.json"))
    with pytest.raises(
        ValueError,
        match=r"t\.json: none of its special tokens \(<s>\) is one of .*</s>; name with --eos",
    ):
        prepared(tmp_path, ["a"], tokenizer=tmp_path / "t.json")
    with pytest.raises(
        ValueError, match=r"eos='HALT' is no token of .*t\.json; its special tokens: <s>"
    ):
        prepared(tmp_path, ["a"], tokenizer=tmp_path / "t.json", eos="HALT")
    folder = prepared(
        tmp_path, ["a", "a"], tokenizer=tmp_path / "t.json", eos="STOP", val_fraction=0.0
    )
    assert stream(open_dataset(folder)) == [0, 1, 0, 1] and load_tokenizer(folder).eos == 1
    t.add_special_tokens(["</s>", "<|endoftext|>"])
    t.save(str(tmp_path / "t.json"))
    assert open_dataset(
        prepared(tmp_path, ["a"], "second", tokenizer=tmp_path / "t.json")
    ).eos == t.token_to_id("<|endoftext|>")


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments, message",
    [
        ("{tmp}/missing", "missing: cannot be read: No such file or directory"),
        ("{tmp}/empty", "the file is empty"),
        ("{tmp}/blank.jsonl", "no text in 1 file(s)"),
        ("{tmp}/nothing", "the folder holds no files"),
        (
            "{tmp}/binary",
            "binary: is no UTF-8 text: byte 0xff at 1300000; convert it, or leave it out",
        ),
        ("{tmp}/cut", "cut: is no UTF-8 text: byte 0xc3 at 2"),
        ("{tmp}/a.jsonl {tmp}/invalid.jsonl", "invalid.jsonl, line 3: is no JSON: Expecting"),
        (
            "{tmp}/a.jsonl --text-key body",
            "a.jsonl, line 1: has no 'body', only id, text; name the text with --text-key",
        ),
        ("{tmp}/null.jsonl", "null.jsonl, line 2: 'text' is no text, but null"),
        ("{tmp}/list.jsonl", "list.jsonl, line 1: is no JSON object, but a list"),
        (
            "{tmp}/half.jsonl",
            "half.jsonl, line 1: 'text' is no Unicode text: surrogates not allowed",
        ),
        ("{tmp}/latin.jsonl", "latin.jsonl, line 1: is no JSON"),
        ("{tmp}/cut.jsonl.gz", "cut.jsonl.gz: cannot be read: Compressed file ended"),
        ("{tmp}/no.jsonl.gz", "no.jsonl.gz: cannot be read: Not a gzipped file"),
        ("{tmp}/no.parquet", "no.parquet: is no Parquet file that can be read"),
        (
            "{tmp}/a.parquet",
            "a.parquet: has no column 'text', only body, count; name the text with --text-key",
        ),
        ("{tmp}/a.parquet --text-key count", "a.parquet, row 1: 'count' is no text, but a int"),
        ("{tmp}/b.parquet --text-key body", "b.parquet, row 301: 'body' is no text, but null"),
        ("{tmp}/a.txt --text-key body", "text_key='body' is for JSONL and Parquet"),
        ("{tmp}/a.txt --val-fraction 1", "val_fraction=1.0 must be at least 0 and below 1"),
        ("{tmp}/a.txt --val-fraction nan", "val_fraction=nan must be"),
        ("{tmp}/a.txt --shard-tokens 0", "shard_tokens=0 must be at least 1"),
        (
            "{tmp}/a.txt --vocab 256",
            "vocab=256 must be at least 257: each byte and <|end_of_text|>",
        ),
        (
            "{tmp}/a.txt --tokenizer bytes --vocab 300",
            "vocab=300 is of a tokenizer that is trained, but tokenizer='bytes' has its own",
        ),
        ("{tmp}/a.txt --tokenizer bytes --eos x", "eos='x' is for a tokenizer.json"),
        (
            "{tmp}/a.txt --tokenizer {tmp}/missing.json",
            "missing.json: cannot be read: No such file",
        ),
        (
            "{tmp}/a.txt --tokenizer {tmp}/a.txt",
            "a.txt: is no tokenizer.json of the tokenizers library",
        ),
        ("{tmp}/nothing/.. --out {tmp}/below", "lies within the input"),
        (
            "{tmp}/a.txt --out {tmp}",
            "is a folder of something else, without a dataset.json; name a new or an empty one",
        ),
        ("{tmp}/a.txt --out {tmp}/a.txt", "a.txt is a file; name a folder"),
        (
            "{tmp}/a.txt --out {tmp}/a.txt/below",
            "is no directory and cannot be made: Not a directory",
        ),
        (
            "{tmp}/a.txt --out {tmp}/taken",
            "taken.partial, needed to write into, holds something else (mine); move it away",
        ),
        ("{tmp}/done", "done holds tokens that were prepared already; name text"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, tmp_path, capsys):
    if ".parquet" in arguments and "no.parquet" not in arguments:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"body": ["a"], "count": [1]}), tmp_path / "a.parquet")
        parquet.write_table(arrow.table({"body": ["a"] * 300 + [None]}), tmp_path / "b.parquet")
    (tmp_path / "empty").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "taken.partial").mkdir()
    (tmp_path / "taken.partial" / "mine").touch()
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "dataset.json").touch()
    jsonl(tmp_path / "a.jsonl")
    for name, content in {
        "a.txt": b"text",
        "binary": "ä".encode() * 650_000 + b"\xff" + b"rest" * 10,
        "cut": b"ab\xc3",
        "blank.jsonl": b'\n{"text": ""}\n',
        "invalid.jsonl": b'{"text": "a"}\n\n{"text": }\n',
        "null.jsonl": b'{"text": "a"}\n{"text": null}\n',
        "list.jsonl": b'["text"]\n',
        "half.jsonl": b'{"text": "\\ud800"}\n',
        "latin.jsonl": b'{"text": "\xe4"}\n',
        "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 1000)[:-20],
        "no.jsonl.gz": b"plain",
        "no.parquet": b"plain",
    }.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    arguments = arguments.format(tmp=tmp_path).split()
    with pytest.raises(SystemExit) as stop:
        prepare.main(
            [
                *arguments,
                *([] if "--out" in arguments else ["--out", str(tmp_path / "new" / "out")]),
            ]
        )
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert message in printed.err
    assert sorted(set(tmp_path.rglob("*")) - {tmp_path / "new"}) == before  # nothing is left of it
