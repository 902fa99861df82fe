"""ringx bench: records are valid, its arithmetic is right, nothing that was measured is lost."""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from helpers import invented, ranks
from helpers.paths import ROOT

from ringx import launch
from ringx.layout import Sharding
from ringx.measure import attention_table, bench_attention, bench_collectives, cases, records
from ringx.measure.peak import peak_bytes
from ringx.patterns.registry import ALGORITHMS
from ringx.tiles import tiles

SMALL = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--reps", "2", "--dtypes", "fp32"]


def options(out, *argv):
    parser = argparse.ArgumentParser()
    bench_attention.add_arguments(parser)
    return parser.parse_args(
        ["--out", str(out), "--nproc", "2", "--seqlens", "64", "--device", "cpu", *SMALL, *argv]
    )


@pytest.fixture(autouse=True)
def on_threads(monkeypatch):
    monkeypatch.setattr(launch, "run", ranks.launch_threads)


@pytest.fixture
def record(tmp_path):
    assert bench_attention.main(options(tmp_path, "--algorithms", "ringx3")) == 0
    (path,) = tmp_path.glob("*.json")
    return records.read(path)


# ---- the numbers


@pytest.mark.fast
def test_the_slowest_rank_of_each_repetition_counts():
    result = bench_attention.slowest(
        [[(1.0, 3.0), (2.0, 9.0), (1.0, 4.0)], [(2.0, 4.0), (1.0, 5.0), (3.0, 5.0)]]
    )
    assert result["forward"]["raw"] == [2.0, 2.0, 3.0]
    assert result["total"]["raw"] == [4.0, 9.0, 5.0]
    assert result["backward"]["raw"] == [2.0, 7.0, 2.0]
    assert result["total"]["median"] == 5.0 and result["total"]["min"] == 4.0


@pytest.mark.fast
def test_median_and_quartiles():
    result = records.stats([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (result["min"], result["q1"], result["median"], result["q3"]) == (1.0, 2.0, 3.0, 4.0)
    assert result["raw"] == [5.0, 1.0, 3.0, 2.0, 4.0]
    assert records.stats([7.0]) == {"median": 7.0, "min": 7.0, "q1": 7.0, "q3": 7.0, "raw": [7.0]}


def case(**changes):
    default = cases.AttentionCase(
        algorithm="ringx3",
        layout="zigzag",
        mask="causal",
        dtype="bf16",
        world=2,
        seqlen=48,
        batch=3,
        heads=4,
        kv_heads=2,
        head_dim=8,
        kernel="auto",
        overlap=True,
        threads=1,
        baseline_threads=None,
        baseline=True,
        warmup=1,
        reps=7,
    )
    return replace(default, **changes)


@pytest.mark.fast
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_flops_are_those_of_the_pairs_that_the_ranks_compute(layout, mask):
    sharding = Sharding(48, 4, layout)
    window = (None, 0 if mask == "causal" else None)
    both = itertools.product(range(4), repeat=2)
    pairs = sum(
        t.area for i, j in both for t in tiles(sharding.runs(i), sharding.runs(j), window=window)
    )
    flops = case(mask=mask, layout=layout).flops()
    matmul = 2 * 3 * 4 * 8 * pairs  # batch 3, 4 heads of size 8: one product of that many pairs
    assert flops == {"forward": 2 * matmul, "backward": 5 * matmul, "total": 7 * matmul}


def seconds(forward, total):
    return bench_attention.slowest([[(forward, total)] * 7])


@pytest.mark.fast
def test_derived_numbers():
    against = {"kernel": "cpu", "workers": 2, "seconds": seconds(1.0, 4.0), "missing": None}
    result = bench_attention.derived(case(world=4), seconds(0.5, 2.5), 4, against)
    assert result["efficiency_percent"]["forward"] == pytest.approx(100 * 1.0 * 2 / (4 * 0.5))
    assert result["efficiency_percent"]["total"] == pytest.approx(100 * 4.0 * 2 / (4 * 2.5))
    assert result["tokens_per_second"] == pytest.approx(3 * 48 / 2.5)
    assert result["tflops_per_rank"]["total"] == pytest.approx(
        case().flops()["total"] / 4 / 2.5 / 1e12
    )
    alone = bench_attention.derived(case(), seconds(1.0, 2.0), 2, None)
    assert (
        alone["baseline"] is None
        and alone["efficiency_percent"] is None
        and "--no-baseline" in alone["baseline_missing"]
    )


@pytest.mark.fast
def test_peak_memory_of_known_tensors():
    before = torch.ones(1000)

    def call():
        a = before * 2  # 4000 bytes
        b = a.view(10, 100) + 1  # 8000: a view holds no memory of its own
        del a
        c = b.double()  # 4000 + 8000
        del b
        c.add_(1)
        return torch.ones(10)  # 8000 + 40

    assert peak_bytes(call, torch.device("cpu"))[0] == 12000


# ---- records


@pytest.mark.fast
def test_a_record_survives_the_file(record, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    path = records.write(new, record)
    assert records.read(path) == record
    assert [p.name for p in new.iterdir()] == [path.name]  # nothing left aside


@pytest.mark.fast
def test_a_late_write_changes_nothing(record, tmp_path):
    """A rank that lost its job to a restart may still come to the end of a case that the restarted
    job has measured."""
    path = records.path_of(tmp_path, record["id"])
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="is there already and was kept"):
        records.write(tmp_path, {**record, "date": "later"})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.fast
def test_the_schema_holds_the_fields_of_the_cases():
    """What a record holds under "case" is declared once more, as a dataclass that is measured."""
    of_kind = {
        "attention": cases.AttentionCase,
        "collective": bench_collectives.CollectiveCase,
    }
    for kind, dataclass in of_kind.items():
        paths = [field.path for field in records.FIELDS[kind] if field.path.startswith("case.")]
        assert sorted(paths) == sorted(f"case.{field.name}" for field in fields(dataclass))


def test_figures_name_columns_that_there_are(record):
    (row,) = records.flat_rows(record, {"source": {}, "sent": {}, "expected": {}})
    assert {*records.CASE_COLUMNS, *records.SETTING_COLUMNS["attention"]} <= row.keys()
    (row, *_) = records.flat_rows(invented.collective(), {"source": {}, "fit": {}})
    assert row.keys() >= {*records.SETTING_COLUMNS["collective"]}


def test_records_of_schema_1_are_read(record, tmp_path):
    old = json.loads(json.dumps(record))
    for key in ("labels", "wire", "wire_missing"):
        del old[key]
    del old["launch"]["job"]
    old["schema"] = 1
    path = records.path_of(tmp_path, record["id"])
    path.write_text(json.dumps(old))
    new = records.read(path)
    assert (
        new["seconds"] == record["seconds"] and new["labels"] == {} and new["launch"]["job"] is None
    )


def edits():
    yield "schema 2", lambda r: r.update(schema=3)
    yield "case.world is missing", lambda r: r["case"].pop("world")
    yield "case.seqlen='64' has the wrong type", lambda r: r["case"].update(seqlen="64")
    yield "case.reps=True has the wrong type", lambda r: r["case"].update(reps=True)
    yield "does not hold 2 repetitions", lambda r: r["seconds"]["total"]["raw"].pop()
    yield "is not the summary", lambda r: r["seconds"]["total"].update(median=1.0)
    yield (
        "other than positive numbers",
        lambda r: r["seconds"]["forward"]["raw"].__setitem__(0, -1.0),
    )
    yield (
        "other than positive numbers",
        lambda r: r["baseline"]["seconds"]["forward"]["raw"].__setitem__(0, float("nan")),
    )
    yield "baseline.seconds.total does not hold", lambda r: r["baseline"]["seconds"].pop("total")
    yield "tflops_per_rank.total=None", lambda r: r["tflops_per_rank"].pop("total")
    yield "efficiency_percent.total='90'", lambda r: r["efficiency_percent"].update(total="90")
    yield "bytes.backward.messages is missing", lambda r: r["bytes"]["backward"].pop("messages")
    yield "bytes.forward.counted", lambda r: r["bytes"]["forward"].pop("counted")


@pytest.mark.fast
@pytest.mark.parametrize(("says", "edit"), list(edits()))
def test_a_broken_record_is_refused(record, tmp_path, says, edit):
    edit(record)
    with pytest.raises(ValueError, match=says):
        records.write(tmp_path, record)
    path = records.path_of(tmp_path, record["id"])
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=says) as e:
        records.read(path)
    assert path.name in str(e.value)


@pytest.mark.fast
def test_read_all_names_every_broken_file(record, tmp_path):
    good = next(tmp_path.glob("*.json"))
    (tmp_path / "half.json").write_text(good.read_text()[:500])
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other-name.json").write_text(good.read_text())
    valid, broken = records.read_all(tmp_path)
    assert valid == [record]
    assert len(broken) == 3 and all(
        any(n in b for b in broken) for n in ("half.json", "list.json", "other-name.json")
    )
    with pytest.raises(FileNotFoundError, match="no directory"):
        records.read_all(tmp_path / "absent")


# ---- running


def test_every_case_gives_a_valid_record(tmp_path, capsys):
    argv = (
        "--nproc",
        "1,2",
        "--masks",
        "causal,full",
        "--layouts",
        "recommended,striped",
        "--kv-heads",
        "4,2",
        "--overlap",
        "on,off",
    )
    assert bench_attention.main(options(tmp_path, *argv, "--reps", "1")) == 0
    of_attention, broken = records.read_all(tmp_path)
    assert not broken
    # algorithms, N, masks, layouts, Hkv, overlap
    assert len(of_attention) == len(ALGORITHMS) * 2 * 2 * 2 * 2 * 2
    for record in of_attention:
        check_origin_and_efficiency(record)
        check_bytes_and_memory(record)
    printed = capsys.readouterr().out
    assert max(map(len, attention_table.table(of_attention).splitlines())) <= 100
    assert printed.count("ringx4") == 2 * 16


def check_origin_and_efficiency(record):
    assert record["kernel"] == "cpu"
    assert record["machine"]["device"] == "cpu"
    assert record["launch"]["launcher"] == "threads"
    again = bench_attention.derived(
        cases.AttentionCase(**record["case"]),
        record["seconds"],
        record["workers"],
        record["baseline"],
    )
    assert again["efficiency_percent"] == record["efficiency_percent"]


def check_bytes_and_memory(record):
    """Of a case with S 64, H 4 and D 16 in fp32: bytes sent as in closed form, and a peak of at
    least out, dq, dk and dv."""
    case = record["case"]
    closed_form = ALGORITHMS[case["algorithm"]].bytes(
        B=1,
        S=64,
        H=4,
        Hkv=case["kv_heads"],
        D=16,
        N=case["world"],
        itemsize=4,
        causal=case["mask"] == "causal",
        layout=case["layout"],
    )
    for direction, size in zip(("forward", "backward"), closed_form, strict=True):
        assert record["bytes"][direction]["closed_form"] == size
        assert record["bytes"][direction]["counted"] == pytest.approx(size)
    bytes_of_head = 64 // case["world"] * 16 * 4
    assert record["memory"]["peak_bytes"] >= bytes_of_head * (2 * 4 + 2 * case["kv_heads"])


@pytest.mark.fast
def test_weak_scaling_and_no_baseline(tmp_path):
    args = options(tmp_path, "--nproc", "1,2", "--algorithms", "ringx4", "--no-baseline")
    args.seqlens, args.seqlens_per_rank = None, "32"
    assert bench_attention.main(args) == 0
    valid, _ = records.read_all(tmp_path)
    assert sorted((r["case"]["world"], r["case"]["seqlen"]) for r in valid) == [(1, 32), (2, 64)]
    assert all(r["baseline"] is None and r["efficiency_percent"] is None for r in valid)


@pytest.mark.fast
def test_where_the_baseline_does_not_fit_the_algorithms_are_measured_still(tmp_path, monkeypatch):
    def full(self):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory:"
            " you tried to allocate 8 bytes."
        )

    monkeypatch.setattr(bench_attention.Baseline, "_once", full)
    assert bench_attention.main(options(tmp_path, "--algorithms", "ringx3")) == 0
    (r,) = records.read_all(tmp_path)[0]
    assert r["baseline"] is None and r["baseline_missing"].startswith("out of memory")


def test_resume_measures_only_what_is_missing_or_broken(tmp_path, capsys, monkeypatch):
    first = ("--algorithms", "ringx3,ringx4")
    assert bench_attention.main(options(tmp_path, *first)) == 0
    paths = sorted(tmp_path.glob("*.json"))
    before = [p.stat().st_mtime_ns for p in paths]
    with pytest.raises(
        ValueError, match=f"already holds 2 of these {len(ALGORITHMS)} cases.*--resume"
    ):
        bench_attention.main(options(tmp_path))
    paths[1].write_text(paths[1].read_text()[:100])
    assert bench_attention.main(options(tmp_path, "--resume")) == 0
    assert f"{paths[1].name}.broken): {paths[1]}" in capsys.readouterr().err
    assert (
        len(paths[1].with_name(f"{paths[1].name}.broken").read_text()) == 100
    )  # nothing is thrown away
    assert len(list(tmp_path.glob("*.json"))) == len(ALGORITHMS)
    assert paths[0].stat().st_mtime_ns == before[0] and records.read(paths[1])
    monkeypatch.setattr(bench_attention, "measure_size", None)
    assert (
        bench_attention.main(options(tmp_path, "--resume")) == 0
    )  # everything is there: nothing is called
    with pytest.raises(
        ValueError, match=rf"{len(ALGORITHMS)} faults(.|\n)*measured with reps=2, now 3"
    ):
        bench_attention.main(options(tmp_path, "--resume", "--reps", "3"))


@pytest.mark.fast
def test_an_interruption_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    measured, real = [], bench_attention.measure_size

    def until_interrupted(world, cases, tick, watch):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(cases)
        return real(world, cases, tick, watch)

    monkeypatch.setattr(bench_attention, "measure_size", until_interrupted)
    argv = ("--nproc", "1", "--seqlens", "16,32,48", "--algorithms", "ringx1,ringx3")
    assert bench_attention.main(options(tmp_path, *argv)) == 130
    assert "interrupted: 4 of 6 cases" in capsys.readouterr().out
    valid, broken = records.read_all(tmp_path)
    assert len(valid) == 4 and not broken
    monkeypatch.setattr(bench_attention, "measure_size", real)
    assert bench_attention.main(options(tmp_path, *argv, "--resume")) == 0
    assert len(records.read_all(tmp_path)[0]) == 6


def test_ctrl_c_on_real_processes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ringx",
        "bench",
        "--out",
        str(tmp_path),
        "--nproc",
        "2",
        "--device",
        "cpu",
        *SMALL,
    ]
    command += ["--algorithms", "ringx3", "--seqlens", "64,4096", "--reps", "10"]
    root = ROOT
    process = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob("*.json")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the ranks too
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "interrupted: 1 of 2 cases" in out and "Traceback" not in err
    (r,) = records.read_all(tmp_path)[0]
    assert (
        r["launch"]["launcher"] == "ringx"
        and r["case"]["reps"] == len(r["seconds"]["total"]["raw"]) == 10
    )


# ---- refusals


@pytest.mark.fast
def test_all_unknown_names_at_once(tmp_path):
    argv = (
        "--algorithms",
        "ringx5",
        "--layouts",
        "zigzg",
        "--masks",
        "casual",
        "--dtypes",
        "int8",
        "--kernel",
        "flash9",
        "--reps",
        "0",
    )
    with pytest.raises(ValueError) as e:
        bench_attention.main(
            options(tmp_path / "new", *argv, "--nproc", "two", "--overlap", "maybe")
        )
    for word in (
        "8 faults",
        "ringx5",
        "zigzg",
        "casual",
        "int8",
        "flash9",
        "--reps 0",
        "two",
        "maybe",
    ):
        assert word in str(e.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.fast
def test_all_impossible_cases_at_once(tmp_path):
    with pytest.raises(ValueError) as e:
        bench_attention.main(
            options(
                tmp_path,
                "--nproc",
                "2,3",
                "--seqlens",
                "64,2",
                "--kv-heads",
                "2,3",
                "--layouts",
                "zigzag",
                "--kernel",
                "cpu",
            )
        )
    for word in (
        "S=64 on N=3",
        "S=2 on N=2",
        "S=2 on N=3",
        "--heads 4 is no multiple of --kv-heads 3",
    ):
        assert word in str(e.value)
    with pytest.raises(ValueError, match=r"fp?\w*32, head size 16.*flash2"):
        bench_attention.main(options(tmp_path, "--kernel", "flash2"))
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_only_the_launchers_number_of_ranks(tmp_path):
    with pytest.raises(ValueError, match="--nproc 2: the launcher started 4 ranks"):
        cases.plan(options(tmp_path, "--nproc", "2,4"), launched=4)
    args = options(tmp_path)
    args.nproc = None
    assert {c.world for c in cases.plan(args, launched=4)} == {4}


@pytest.mark.fast
def test_a_folder_that_cannot_hold_records(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        bench_attention.main(options(tmp_path / "file"))
