"""ringx plot: every figure the records allow, with the records' own numbers."""

import argparse
import contextlib
import csv
import io
import sys

import pytest
from helpers import invented, ranks

from ringx import launch
from ringx.measure import bench_attention, records
from ringx.patterns.registry import ALGORITHMS
from ringx.report import figures, plot, tables

pytest.importorskip("matplotlib")
FIGURES = {"strong_scaling", "weak_scaling", "efficiency", "time_by_algorithm", "bytes"}


def run(directory, *argv):
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    return plot.main(parser.parse_args([str(directory), *argv]))


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """(records, the folder with their figures, what was said about a broken one)."""
    made = [
        invented.attention(a, n, s, m, time=s / 64 / n * (1 + 0.1 * i), overlap=overlap)
        for i, a in enumerate(ALGORITHMS)
        for n in (1, 2, 4)
        for s in (64, 128)
        for m in ("causal", "full")
        for overlap in ((True, False) if a == "ringx4" else (True,))
    ]
    folder = tmp_path_factory.mktemp("records")
    for r in made:
        records.write(folder, r)
    (folder / "broken.json").write_text("{")
    with contextlib.redirect_stderr(io.StringIO()) as messages:
        assert run(folder, "--out", str(folder / "figures")) == 0
    return made, folder / "figures", messages.getvalue()


def test_all_figures_are_drawn(many):
    _, folder, messages = many
    assert "broken.json" in messages
    assert {p.name for p in folder.iterdir()} == {
        f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg", "csv")
    }
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (folder / f"{name}.svg").read_text()


def key(c):
    return tuple(str(c[k]) for k in ("algorithm", "layout", "overlap", "mask", "world", "seqlen"))


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("strong_scaling", "total_s", lambda r: r["seconds"]["total"]["median"]),
        ("weak_scaling", "total_q3_s", lambda r: r["seconds"]["total"]["q3"]),
        ("efficiency", "total_efficiency_percent", lambda r: r["efficiency_percent"]["total"]),
        ("time_by_algorithm", "forward_s", lambda r: r["seconds"]["forward"]["median"]),
    ],
)
def test_the_csv_holds_the_records_numbers(many, name, column, value):
    made, folder, _ = many
    of = {key(r["case"]): value(r) for r in made}
    shown = {key(x): float(x[column]) for x in rows(folder / f"{name}.csv")}
    assert shown and shown.items() <= of.items()
    if name in ("strong_scaling", "efficiency"):
        assert shown == of


def test_ideal_and_choice_of_ranks(many):
    _, folder, _ = many
    ideal = {(x["world"], float(x["total_ideal_s"])) for x in rows(folder / "strong_scaling.csv")}
    assert ideal == {("1", 2.0), ("2", 1.0), ("4", 0.5)}  # 1 second on two workers
    assert {x["world"] for x in rows(folder / "time_by_algorithm.csv")} == {
        "2"
    }  # 4 ranks share two cores


def test_counted_bytes_lie_on_the_closed_form(many):
    points = {"counted": {}, "closed form": {}}
    for x in rows(many[1] / "bytes.csv"):
        where = tuple(
            x[k] for k in ("algorithm", "layout", "overlap", "mask", "world", "direction")
        )
        points[x["kind"]][where] = float(x["bytes_per_rank"])
    assert points["counted"] and points["counted"].items() <= points["closed form"].items()
    assert {where[4] for where in points["closed form"]} == {"1", "2", "4", "8", "16"}


def test_settings_do_not_mix(tmp_path, capsys):
    for n in (1, 2):
        for kv in (2, 8):
            records.write(tmp_path, invented.attention(world=n, kv_heads=kv))
    assert run(tmp_path) == 0
    for kv in (2, 8):
        assert {x["kv_heads"] for x in rows(tmp_path / f"strong_scaling_kv{kv}.csv")} == {str(kv)}
    assert "skipped weak_scaling_kv2" in capsys.readouterr().out


@pytest.mark.fast
def test_figures_that_lack_data_say_what_they_need(tmp_path, capsys):
    records.write(tmp_path, invented.attention(world=1, baseline=False))
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    for name in FIGURES - {"time_by_algorithm"}:
        assert f"skipped {name}: " in out and not (tmp_path / f"{name}.png").exists()
    assert (tmp_path / "time_by_algorithm.png").exists()


def test_one_colour_an_algorithm(many):
    shown = [row for r in many[0] for row in tables.rows_of(r)]
    looks = [figures._look(r, k, shown) for k, r in enumerate(shown)]
    by_algorithm = {
        (r["algorithm"], look["color"], look["marker"])
        for r, look in zip(shown, looks, strict=True)
    }
    assert len(by_algorithm) == len(ALGORITHMS) == len({c for _, c, _ in by_algorithm})
    assert (
        len(
            {look["ls"] for r, look in zip(shown, looks, strict=True) if r["algorithm"] == "ringx4"}
        )
        == 2
    )  # overlap on, off


@pytest.mark.fast
def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no valid record"):
        run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        run(tmp_path / "absent")


@pytest.mark.fast
def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    records.write(tmp_path, invented.attention())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'ringx\[plot\]'"):
        run(tmp_path)


def test_records_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "run", ranks.launch_threads)
    parser = argparse.ArgumentParser()
    bench_attention.add_arguments(parser)
    sizes = [
        "--seqlens",
        "32,64",
        "--heads",
        "2",
        "--kv-heads",
        "2",
        "--head-dim",
        "8",
        "--reps",
        "2",
    ]
    assert (
        bench_attention.main(
            parser.parse_args(["--nproc", "1,2", "--device", "cpu", *sizes, "--out", str(tmp_path)])
        )
        == 0
    )
    assert run(tmp_path) == 0
    assert {p.stem for p in tmp_path.glob("*.png")} == FIGURES
    counted = [x for x in rows(tmp_path / "bytes.csv") if x["kind"] == "counted"]
    measured = {r["id"]: r for r in records.read_all(tmp_path)[0] if r["case"]["seqlen"] == 64}
    assert sorted(float(x["bytes_per_rank"]) for x in counted) == sorted(
        r["bytes"][d]["counted"] for r in measured.values() for d in ("forward", "backward")
    )
