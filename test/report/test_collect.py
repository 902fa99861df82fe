"""ringx collect: every record is in the table or named; nothing is lost, nothing twice."""

import csv
import json

import pytest
from helpers import invented
from helpers.paths import RESULTS

from ringx.command import cli
from ringx.measure import machine, records
from ringx.report import collect, tables

pytest.importorskip("pandas", reason="needs pandas and pyarrow: pip install 'ringx[plot]'")


def put(folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    return records.write(folder, record)


@pytest.fixture
def folders(tmp_path):
    """Two jobs' folders: attention at two rates of the link, collectives, one copy, and three files
    that are no records."""
    a, b = tmp_path / "a/200", tmp_path / "b"
    for world in (1, 2, 4):
        put(
            a,
            invented.attention(
                world=world, wire=1.5 if world > 1 else None, labels={"link": "200"}
            ),
        )
        put(b, invented.attention("ringx4", world=world, baseline=False, kv_heads=8))
    put(a, invented.collective(world=2, labels={"link": "200"}))
    put(a, invented.collective(world=4, factor=None))
    copy = next(b.glob("*n2*.json"))
    put(tmp_path / "b/copy", json.loads(copy.read_text()))
    (b / "half.json").write_text(copy.read_text()[:300])
    (b / "other.json").write_text("{}")
    (b / "x.json.broken").write_text("")
    return tmp_path


@pytest.mark.fast
def test_one_table_of_all_records(folders, capsys):
    out = collected(folders)
    printed = capsys.readouterr()
    for name in ("half.json", "other.json", "x.json.broken"):
        assert sum(name in line for line in printed.err.splitlines()) == 1
    assert "8 records; 1 copies taken once; 3 broken files" in printed.out
    rows = tables.read_table(out / "attention.parquet")
    assert len(rows) == 6
    with open(out / "attention.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [row["id"] for row in rows]
    assert len(tables.read_table(out / "collectives.csv")) == 12
    assert {fit["world"] for fit in machine.load(out / "machine.json")} == {2, 4}
    environment = json.loads((out / "environment.json").read_text())
    assert [entry["records"] for entry in environment["versions"]] == [8]
    assert "/a/b" not in json.dumps(environment["command"])


def collected(folders):
    """The folder of the tables."""
    out = folders / "table"
    assert cli.main(["collect", str(folders / "a"), str(folders / "b"), "--out", str(out)]) == 0
    return out


@pytest.mark.fast
def test_a_row_holds_what_its_record_holds_and_what_the_collectives_make_of_it(folders):
    rows = tables.read_table(collected(folders) / "attention.parquet")
    (row,) = [row for row in rows if row["algorithm"] == "ringx3" and row["world"] == 2]
    record = invented.attention(world=2, wire=1.5)
    expected = {
        "total_s": record["seconds"]["total"]["median"],
        "total_raw_s": "1 1.2 0.9",
        "label_link": "200",
        "labels": "link=200",
        "forward_bytes": record["bytes"]["forward"]["counted"],
        "source": f"{row['id']}.json",
        "torch": record["versions"]["torch"],
    }
    assert {name: row[name] for name in expected} == expected
    assert row["wire_bytes"] == pytest.approx(row["wire_expected_bytes"])  # factor 1.5 of both
    sent = row["forward_bytes"] + row["backward_bytes"]
    # 2 messages each way; half of S is sent at N = 2
    assert row["unhidden_s"] == pytest.approx(4 * 1e-4 + sent / 0.5 * 1e-8, rel=1e-6)
    # of the others the labels are others, or none was measured
    assert {other["wire_expected_bytes"] for other in rows if other is not row} == {None}


@pytest.mark.parametrize("kind", ["parquet", pytest.param("csv", marks=pytest.mark.slow)])
def test_a_table_draws_what_its_records_draw(folders, tmp_path, kind, capsys):
    """All figures that a folder of records allows, with the same numbers."""
    source = folders / "a/200"
    assert cli.main(["collect", str(source), "--out", str(tmp_path / "t")]) == 0
    assert cli.main(["plot", str(source), "--out", str(tmp_path / "from_records")]) == 0
    table_files = [str(tmp_path / f"t/{name}.{kind}") for name in ("attention", "collectives")]
    assert cli.main(["plot", *table_files, "--out", str(tmp_path / "from_table")]) == 0
    from_records = csv_files(tmp_path / "from_records")
    from_table = csv_files(tmp_path / "from_table")
    assert from_records.keys() >= {"bytes.csv", "wire.csv"}
    # with a label and without
    assert sum(name.startswith("collectives") for name in from_records) == 2
    assert from_table.keys() == from_records.keys()
    for name, rows in from_records.items():
        for row, row_of_table in zip(rows, from_table[name], strict=True):
            check_same_numbers(row, row_of_table)


def csv_files(folder):
    """{name: rows} of the CSV files in a folder."""
    return {
        path.name: list(csv.DictReader(path.read_text().splitlines()))
        for path in folder.glob("*.csv")
    }


def check_same_numbers(row, other):
    """Equal texts, or numbers that are equal but for rounding."""
    for column, text in row.items():
        if text != other[column]:
            assert float(text) == pytest.approx(float(other[column])), column


def with_collective(record, name, sent=7.0, messages=1):
    """The record, in which the ranks also sent so many bytes by the collective `name`, forward."""
    forward = record["bytes"]["forward"]
    forward["collectives"][name] = sent
    forward["messages"][name] = messages
    forward["counted"] += sent
    return record


@pytest.mark.fast
@pytest.mark.parametrize("name", ["send_recv", "not_in_the_table"])
def test_a_collective_that_only_some_records_name_has_a_column(tmp_path, name):
    put(tmp_path, invented.attention(world=2))
    put(tmp_path, with_collective(invented.attention(world=4), name))
    assert cli.main(["collect", str(tmp_path)]) == 0
    rows = tables.read_table(tmp_path / "attention.csv")
    assert [r[f"{name}_bytes"] for r in sorted(rows, key=lambda r: r["world"])] == [0, 7]
    of_collectives = [
        c for c in rows[0] if c.endswith("_bytes") and c[:5] not in ("wire_", "peak_")
    ]
    for r in rows:
        assert sum(r[c] for c in of_collectives[2:]) == r["forward_bytes"] + r["backward_bytes"]


@pytest.mark.fast
def test_a_collective_that_no_record_names_adds_no_column(tmp_path):
    put(tmp_path, invented.attention())
    assert cli.main(["collect", str(tmp_path)]) == 0
    (row,) = tables.read_table(tmp_path / "attention.csv")
    assert [c for c in row if c.endswith("_bytes")] == [
        "forward_bytes", "backward_bytes", "broadcast_bytes", "reduce_bytes", "all_reduce_bytes",
        "all_gather_bytes", "all_to_all_bytes", "wire_bytes", "peak_bytes", "wire_expected_bytes",
    ]  # fmt: skip


@pytest.mark.fast
def test_what_is_expected_of_send_recv_follows_from_its_benchmark(tmp_path):
    """The benchmark of send_recv is called ring."""
    put(
        tmp_path, with_collective(invented.attention(world=2), "send_recv", sent=1000.0, messages=4)
    )
    put(tmp_path, invented.collective("ring", world=2, alpha=1e-3, beta=1e-6, factor=1.25))
    put(tmp_path, invented.collective("all_gather", world=2, alpha=1e-3, beta=1e-6, factor=1.25))
    assert cli.main(["collect", str(tmp_path)]) == 0
    (row,) = tables.read_table(tmp_path / "attention.csv")
    gathered = row["all_gather_bytes"]
    assert row["wire_expected_bytes"] == pytest.approx(1.25 * (gathered + 1000))
    seconds = (4 + 4) * 1e-3 + (1000 + gathered / 0.5) * 1e-6
    assert row["unhidden_s"] == pytest.approx(seconds)


@pytest.mark.fast
def test_nothing_to_collect(tmp_path, capsys):
    assert cli.main(["collect", str(tmp_path)]) == 2
    assert "no valid record" in capsys.readouterr().err
    assert cli.main(["collect", str(tmp_path / "absent")]) == 2
    assert "is no directory" in capsys.readouterr().err


@pytest.mark.fast
def test_what_is_no_table(tmp_path):
    (tmp_path / "bad.parquet").write_text("no")
    for name in ("absent.csv", "bad.parquet", "table.xlsx"):
        with pytest.raises(ValueError, match=name):
            tables.read_table(tmp_path / name)


@pytest.mark.fast
def test_committed_results_are_valid_records_or_tables():
    """Whatever is committed under results/ can be read by this version."""
    results = RESULTS
    seen = 0
    not_records = ("gpt_", "vit_", "notebooks", "house_")
    folders = sorted(p for p in results.iterdir() if p.is_dir())
    for folder in folders:
        if folder.name.startswith(not_records):
            continue
        written = list(folder.glob("*.parquet"))
        entries, broken, _ = collect.gather([folder])
        assert not broken
        assert written or entries, folder
        for table in written:
            rows = tables.read_table(table)
            assert rows and len(tables.read_table(table.with_suffix(".csv"))) == len(rows)
        seen += len(entries) + len(written)
    assert seen > 30
