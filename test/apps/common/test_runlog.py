"""What a run leaves behind and shows: metrics, header, progress, curves.

And the learning rate's schedules.

pytest test/apps/common/test_runlog.py
"""

import csv
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT

from apps.common import log, plot
from apps.common.log import (
    Metrics,
    expect_loggers,
    progress,
    read_metrics,
    read_sessions,
    write_header,
)
from apps.common.schedule import SCHEDULES, rate, warmup_cosine, wsd


def record(step, **more):
    return {"step": step, "loss": 5.0 / (step + 1), "tokens_per_s": 1000.0 + step, **more}


def written(folder, *steps, **options):
    with Metrics(folder, tensorboard=False, **options) as metrics:
        for step in steps:
            metrics.write(record(step))


def steps_in(folder):
    return [r["step"] for r in read_metrics(folder)]


# ---- metrics


@pytest.mark.fast
def test_records_are_read_as_written(tmp_path):
    records = [
        record(0, lr=0.1 + 0.2, name="ü", done=True),
        record(1, loss=math.inf),
        record(7, val_loss=1e-300),
    ]
    with Metrics(tmp_path / "new" / "run", tensorboard=False) as metrics:
        for i, r in enumerate(records):
            metrics.write(r)
            assert (
                read_metrics(tmp_path / "new" / "run") == records[: i + 1]
            )  # on its way to disk before the next step
    assert [p.name for p in (tmp_path / "new" / "run").iterdir()] == ["metrics.jsonl"]


def test_a_killed_run_loses_no_finished_step(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from apps.common.log import Metrics\n"
        "m = Metrics(Path(sys.argv[1]), tensorboard=False)\n"
        "for step in range(5): m.write({'step': step, 'loss': 1.0, 'tokens_per_s': 2.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL and steps_in(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.fast
@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_resumption_drops_what_is_redone_and_a_torn_line(tmp_path, cut):
    written(tmp_path, 0, 1, 2, 3, 4, 5)
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before)[:-cut])  # 1: all but the end of the line
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4] + [5] * (cut == 1)
    written(tmp_path, start_step=4)  # resumed, and stopped before its first step
    assert path.read_bytes() == b"".join(before[:4])
    written(tmp_path, 4, 5, start_step=4)
    written(tmp_path, 6, start_step=6)
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    assert path.read_bytes().splitlines(keepends=True)[:6] == before
    written(tmp_path, 0, 1)  # anew
    assert steps_in(tmp_path) == [0, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.fast
def test_a_whole_last_line_without_its_end_is_kept_and_ended(tmp_path):
    written(tmp_path, 0, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    written(tmp_path, 2, start_step=2)
    assert steps_in(tmp_path) == [0, 1, 2]


@pytest.mark.fast
def test_a_kill_while_the_file_is_rewritten_loses_nothing(tmp_path, monkeypatch):
    written(tmp_path, 0, 1, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Metrics(tmp_path, start_step=1, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.fast
def test_a_broken_line_in_the_middle_is_named_and_not_dropped(tmp_path):
    written(tmp_path, 0, 1, 2)
    path = tmp_path / "metrics.jsonl"
    for wrong in (b'{"loss": 1.0}\n', b"{\n", b"3\n", b"\n"):
        first, *rest = path.read_bytes().splitlines(keepends=True)[-3:]
        path.write_bytes(wrong + first + b"".join(rest))
        before = path.read_bytes()
        for call in (
            lambda: read_metrics(tmp_path),
            lambda: Metrics(tmp_path, start_step=2, tensorboard=False),
        ):
            with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is no record"):
                call()
        assert path.read_bytes() == before


@pytest.mark.fast
def test_mistakes_in_records(tmp_path):
    with Metrics(tmp_path, start_step=3, tensorboard=False) as metrics:
        with pytest.raises(ValueError, match=r"record=.* lacks loss, tokens_per_s\."):
            metrics.write({"step": 3})
        with pytest.raises(
            ValueError, match=r"step=2 was written already or lies before start_step; the next is 3"
        ):
            metrics.write(record(2))
        with pytest.raises(TypeError):
            metrics.write(record(3, grad_norm=torch.ones(2)))
        metrics.write(record(4))
        with pytest.raises(ValueError, match="step=4"):
            metrics.write(record(4))
    assert steps_in(tmp_path) == [4]
    with pytest.raises(ValueError, match="start_step=-1"):
        Metrics(tmp_path, start_step=-1)
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        read_metrics(tmp_path / "absent")


@pytest.mark.fast
def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Metrics(None, start_step=2) as metrics:
        metrics.write(record(2))
    assert list(tmp_path.iterdir()) == []


# ---- TensorBoard and W&B


@pytest.mark.fast
def test_tensorboard_shows_the_records_and_a_resumption_purges(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curves():
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return {
            tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]
        }

    with Metrics(tmp_path, config={"seed": 5}) as metrics:  # "auto"
        for step in range(4):
            metrics.write(record(step, note="text", ok=True))
    assert curves().keys() == {"loss", "tokens_per_s"}
    assert curves()["loss"] == pytest.approx({s: 5.0 / (s + 1) for s in range(4)})
    with Metrics(tmp_path, start_step=2, tensorboard=True) as metrics:
        metrics.write(record(2, loss=0.5))
    assert curves()["loss"] == pytest.approx({0: 5.0, 1: 2.5, 2: 0.5})
    written(tmp_path / "none", 0)
    assert not (tmp_path / "none" / "tensorboard").exists()


@pytest.mark.fast
def test_loggers_that_are_asked_for_and_missing(tmp_path, monkeypatch):
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    for folder in (tmp_path, None):  # on every rank
        with pytest.raises(
            ValueError,
            match="tensorboard=True, but TensorBoard is not installed: pip install tensorboard",
        ):
            Metrics(folder, tensorboard=True)
        with pytest.raises(
            ValueError, match="wandb='p', but W&B is not installed: pip install wandb"
        ):
            Metrics(folder, tensorboard=False, wandb="p")
    with Metrics(tmp_path) as metrics:
        metrics.write(record(0))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(ValueError, match="tensorboard='yes'"):
        expect_loggers("yes")
    with pytest.raises(ValueError, match="wandb='' must name"):
        expect_loggers(False, "")


@pytest.mark.fast
def test_wandb_gets_project_configuration_and_numbers(tmp_path, monkeypatch):
    """Against a stand-in: W&B needs an account."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda *a, **k: calls.append((a, k)), finish=lambda **k: calls.append(k)
    )
    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = types.SimpleNamespace()
    stand_in.init = lambda **k: (calls.append(k), run)[1]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    written(tmp_path, 0, wandb="proj", config={"lr": 1})
    start, logged, end = calls
    assert (
        start.items()
        >= {
            "project": "proj",
            "name": tmp_path.name,
            "config": {"lr": 1},
            "resume": "allow",
        }.items()
    )
    assert logged == (({"loss": 5.0, "tokens_per_s": 1000.0},), {"step": 0}) and end == {
        "exit_code": 0
    }
    with (
        pytest.raises(ZeroDivisionError),
        Metrics(tmp_path, tensorboard=False, wandb="proj", start_step=1),
    ):
        _ = 1 / 0
    assert calls[-1] == {"exit_code": 1} and calls[-2]["id"] == start["id"]  # goes on in its run
    written(tmp_path, wandb="proj")
    assert calls[-2]["id"] != start["id"]  # anew


# ---- run.json


@pytest.mark.fast
def test_sessions(tmp_path):
    folder = tmp_path / "run"
    assert read_sessions(folder) == []
    write_header(folder, {"config": {"lr": 0.5}})
    write_header(folder, {"config": {"lr": 0.25}}, start_step=7)
    first, second = json.loads((folder / "run.json").read_text())["sessions"]
    assert [first, second] == read_sessions(folder)
    assert (first["config"], first["start_step"], second["config"], second["start_step"]) == (
        {"lr": 0.5},
        0,
        {"lr": 0.25},
        7,
    )
    assert first["versions"]["torch"] == torch.__version__ and first["started"][:2] == "20"
    write_header(folder, {})
    assert len(read_sessions(folder)) == 1
    assert [p.name for p in folder.iterdir()] == ["run.json"]
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json holds no sessions"):
        write_header(folder, {}, start_step=1)
    assert (folder / "run.json").read_text() == "{"


# ---- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_steps(text):
    return [int(line.split()[1]) for line in text.splitlines()]


@pytest.mark.fast
def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = itertools.count(0.0, 0.5)  # every look at the clock: half a second
    monkeypatch.setattr(log, "monotonic", lambda: next(now))
    with progress(100, 0, "a run") as show:
        for step in range(100):
            show(
                record(
                    step, **({"val_loss": 0.25, "grad_norm": 2.0, "lr": 1e-3} if step == 50 else {})
                )
            )
    out = capsys.readouterr().out
    steps = shown_steps(out)
    assert steps[:20] == list(range(20)) and steps[-1] == 99 and 50 in steps and len(steps) < 30
    apart = [b - a for a, b in itertools.pairwise(s for s in steps[19:-1] if s != 50)]
    assert min(apart[:2]) >= 18 and max(apart) <= 39  # 10 s or more
    assert (
        "step   50  loss 0.098039  val loss 0.250000  grad norm 2.0000  lr 1.00e-03  1,050 tokens/s"
        in out.splitlines()
    )


@pytest.mark.fast
def test_slow_steps_have_a_line_each(capsys, monkeypatch):
    now = itertools.count(0.0, 11.0)
    monkeypatch.setattr(log, "monotonic", lambda: next(now))
    with progress(40, 5, "a run") as show:
        for step in range(5, 40):
            show(record(step))
    assert shown_steps(capsys.readouterr().out) == list(range(5, 40))


@pytest.mark.fast
def test_the_last_step_before_a_failure_is_shown(capsys):
    with pytest.raises(FloatingPointError), progress(50, 0, "a run") as show:
        for step in range(30):
            show(record(step))
        raise FloatingPointError
    assert shown_steps(capsys.readouterr().out) == [*range(20), 29]


@pytest.mark.fast
def test_a_bar_at_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with progress(10, 4, "gpt [x] on 2 ranks") as show:
        for step in range(4, 9):
            show(record(step, val_loss=0.125))
    said = sys.stdout.getvalue()
    last = [line for line in said.replace("\r", "\n").splitlines() if "gpt [x] on 2 ranks" in line][
        -1
    ]
    for part in (" 9/10", "loss 0.5556", "val 0.1250", "1,008 tokens/s", "left"):
        assert part in last, last
    assert "step    " not in said


@pytest.mark.fast
def test_other_ranks_show_nothing(capsys, monkeypatch):
    for terminal in (False, True):
        if terminal:
            monkeypatch.setattr(sys, "stdout", Terminal())
        with progress(3, 0, "a run", is_main_rank=False) as show:
            show(record(0))
        assert not (sys.stdout.getvalue() if terminal else capsys.readouterr().out)


# ---- plots


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder of two runs of one name, folder of their figures, what was said)."""
    pytest.importorskip("matplotlib")
    runs = tmp_path_factory.mktemp("runs")
    for k, parent in enumerate(("a", "b")):
        with Metrics(runs / parent / "run", tensorboard=False) as metrics:
            for step in range(12):
                more = (
                    {"tokens": 512 * (step + 1), "val_loss": 4.5 - k}
                    if step % 4 == 3
                    else {"tokens": 512 * (step + 1)}
                )
                metrics.write(
                    record(
                        step, loss=5.0 - k - 0.25 * step, peak_memory_bytes=(k + 1) * 2**30, **more
                    )
                )
        write_header(runs / parent / "run", {"loss_unit": "nats per token"})
    said = plot.plot_runs(
        [runs / "a/run", runs / "b/run", runs / "a" / ".." / "a/run"], runs / "figures", smooth=4
    )
    return runs, runs / "figures", said


def rows(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_figures_and_what_lacks_data(drawn):
    _, out, said = drawn
    names = {"loss", "loss_by_tokens", "throughput", "memory"}
    assert {p.name for p in out.iterdir()} == {
        f"{n}.{e}" for n in names for e in ("png", "svg", "csv")
    }
    assert all(
        (out / f"{n}.png").read_bytes().startswith(b"\x89PNG")
        and "</svg>" in (out / f"{n}.svg").read_text()
        for n in names
    )
    assert said[-1] == "skipped mfu: it needs records with 'mfu'" and len(said) == 5


@pytest.mark.fast
def test_the_csv_holds_the_records_numbers(drawn):
    runs, out, _ = drawn
    for name, columns in (
        ("loss", ("step", "loss", "val_loss")),
        ("loss_by_tokens", ("step", "tokens", "loss", "val_loss")),
        ("throughput", ("step", "tokens_per_s")),
        ("memory", ("step", "peak_memory_bytes")),
    ):
        table = rows(out / f"{name}.csv")
        for run in (
            "a/run",
            "b/run",
        ):  # told apart by their parents; the one named twice is there once
            want = [[r.get(c) for c in columns] for r in read_metrics(runs / run)]
            assert [
                [float(r[c]) if r[c] else None for c in columns] for r in table if r["run"] == run
            ] == want
    table = rows(out / "loss.csv")
    assert [float(r["loss_mean_of_4"]) for r in table[:6]] == [
        5.0,
        4.875,
        4.75,
        4.625,
        4.375,
        4.125,
    ]
    assert not any("mean" in column for column in rows(out / "memory.csv")[0])


@pytest.mark.fast
def test_units_runs_and_validation_are_named(drawn, tmp_path, monkeypatch):
    import matplotlib.figure

    runs, _, _ = drawn
    seen = {}
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda fig, path, **_: seen.setdefault(Path(path).stem, fig),
    )
    plot.plot_runs([runs / "a/run", runs / "b/run"], tmp_path)
    axes = {name: fig.axes[0] for name, fig in seen.items()}
    assert {name: (ax.get_xlabel(), ax.get_ylabel()) for name, ax in axes.items()} == {
        "loss": ("step", "loss (nats per token)"),
        "loss_by_tokens": ("training tokens seen", "loss (nats per token)"),
        "throughput": ("step", "throughput (tokens/s)"),
        "memory": ("step", "peak memory of a rank (GiB)"),
    }
    assert [t.get_text() for t in seen["loss"].legends[0].get_texts()] == [
        "a/run",
        "b/run",
        "hollow: validation",
    ]
    first, marks, second, *_ = axes["loss"].get_lines()
    assert list(first.get_ydata()) == [5.0 - 0.25 * s for s in range(12)]
    assert (
        list(marks.get_xdata()) == [3, 7, 11]
        and list(marks.get_ydata()) == [4.5] * 3
        and marks.get_linestyle() == "None"
    )
    for look in ("color", "marker", "linestyle"):  # apart in print too
        assert getattr(first, f"get_{look}")() != getattr(second, f"get_{look}")()
    assert list(axes["memory"].get_lines()[1].get_ydata()) == [2.0] * 12
    assert list(axes["loss_by_tokens"].get_lines()[0].get_xdata()) == [
        512 * (s + 1) for s in range(12)
    ]


@pytest.mark.fast
def test_many_runs_look_different():
    looks = [plot._look(k, 100) for k in range(32)]
    assert len({(look["color"], look["marker"], look["ls"]) for look in looks}) == 32


@pytest.mark.fast
def test_smoothing():
    assert plot.mean_of_last([1.0, 2.0, 6.0, 4.0], 2) == [1.0, 1.5, 4.0, 5.0]
    assert plot.mean_of_last([], 3) == []


def test_the_plot_command(drawn, tmp_path, capsys):
    runs, _, _ = drawn
    assert plot.main([str(runs / "a/run"), "--out", str(tmp_path / "figures")]) == 0
    assert "loss.png, .svg, .csv" in capsys.readouterr().out
    assert {r["run"] for r in rows(tmp_path / "figures" / "loss.csv")} == {"run"}
    written(tmp_path / "broken", 0, 1)
    (tmp_path / "broken" / "metrics.jsonl").write_text("{\n{}\n")
    for arguments, message in (
        ([str(runs)], f"{runs} holds no metrics.jsonl"),
        ([str(tmp_path / "broken")], "metrics.jsonl line 1 is no record"),
        ([str(runs / "a/run"), "--smooth", "-2"], "smooth=-2 must be at least 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            plot.main([*arguments, "--out", str(tmp_path / "no")])
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    assert not (tmp_path / "no").exists()


def test_the_plot_module_runs(tmp_path):
    command = [sys.executable, "-m", "apps.common.plot", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"python -m apps.common.plot: error: {tmp_path} holds no metrics.jsonl; "
        "name the folder that a trainer wrote.\n"
    )


# ---- schedules


@pytest.mark.fast
def test_wsd():
    rates = [wsd(s, steps=20, peak=1.0, warmup=4, decay=5, floor=0.1) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])
    longer = [wsd(s, steps=40, peak=1.0, warmup=4, decay=5, floor=0.1) for s in range(15)]
    assert longer == rates[:15]  # so it can be prolonged
    assert [wsd(s, steps=4, peak=2.0, warmup=0, decay=0, floor=0.5) for s in range(4)] == [2.0] * 4
    assert [wsd(s, steps=4, peak=2.0, warmup=2, decay=2, floor=0.0) for s in range(4)] == [
        1.0,
        2.0,
        1.0,
        0.0,
    ]


@pytest.mark.fast
def test_a_schedule_by_name():
    common = {"steps": 20, "peak": 0.5, "warmup": 4, "floor": 0.1}
    for s in range(20):
        assert rate("cosine", s, decay=0, **common) == warmup_cosine(s, **common)
        assert rate("wsd", s, decay=6, **common) == wsd(s, decay=6, **common)
    assert list(SCHEDULES) == ["cosine", "wsd"]


@pytest.mark.fast
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "cosin"}, "schedule='cosin' is unknown. Did you mean 'cosine'"),
        ({"name": "cosine", "decay": 3}, "decay=3 is for schedule 'wsd'"),
        ({"warmup": 8, "decay": 3}, "warmup=8 and decay=3 together are longer than steps=10"),
        ({"step": -1}, "step=-1 must be an integer of at least 0"),
        ({"step": 10}, "step=10 is beyond the last of steps=10"),
        ({"steps": 0}, "steps=0"),
        ({"warmup": 1.5}, "warmup=1.5 must be an integer"),
        ({"decay": -1}, "decay=-1"),
        ({"peak": 0.0}, "peak=0.0 must be a number greater than 0"),
        ({"peak": math.nan}, "peak=nan"),
        ({"floor": 1.5}, "floor=1.5 must be from 0 to 1"),
    ],
)
def test_schedules_that_cannot_be(wrong, message):
    arguments = {
        "name": "wsd",
        "step": 0,
        "steps": 10,
        "peak": 1.0,
        "warmup": 2,
        "decay": 2,
        "floor": 0.1,
        **wrong,
    }
    with pytest.raises(ValueError, match=message) as e:
        rate(arguments.pop("name"), arguments.pop("step"), **arguments)
    assert "\n" not in str(e.value)
