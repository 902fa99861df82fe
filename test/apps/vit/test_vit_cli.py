"""apps/vit/train.py as users start it: processes, mistakes, resuming, the configurations by name.

Runs that are killed, told to stop, resumed: test/apps/common/test_resume.py.

python -m pytest test/apps/vit/test_vit_cli.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import losses, output_of, parameters, remove_checkpoints

xr = pytest.importorskip("xarray")
pytest.importorskip("netCDF4")

from helpers.invented import weather  # noqa: E402

import ringx  # noqa: E402
from apps.common.log import read_metrics, read_sessions  # noqa: E402
from apps.vit.config import CONFIGS, PRESETS, load  # noqa: E402
from apps.vit.data import simulate  # noqa: E402
from apps.vit.train import configure, main, parser, work  # noqa: E402

SMALL = """
preset: tiny
model: {dim: 32, layers: 2, patch: 2}
train: {global_batch: 2, steps: 12, warmup: 2, save_every: 3, keep: 0, val_every: 0, dtype: float64}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "weather.nc"
    weather().to_netcdf(file)
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(SMALL)
    return file


def train(*words: object) -> int:
    """In this process."""
    return main([*map(str, words), "--no-tensorboard"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory, small, data):
    """An unbroken run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train("--config", small, "--data", data, "--out", out) == 0
    return out


# ---- runs


def test_what_a_run_leaves_behind(alone, data):
    records = read_metrics(alone)
    assert [r["step"] for r in records] == list(range(12)) and all(
        r["tokens_per_s"] > 0 for r in records
    )
    assert [r["tokens"] for r in records] == [
        (i + 1) * 2 * 4 * 6 for i in range(12)
    ]  # 2 samples of 8 x 12 points, 2 x 2 a token
    samples = 60 * 70 // 100 - 1
    assert [r["epoch"] for r in records] == pytest.approx(
        [(i + 1) / -(-samples // 2) for i in range(12)]
    )
    assert [p.name for p in sorted((alone / "checkpoints").iterdir())] == [
        f"step-{n:08d}" for n in (3, 6, 9, 12)
    ]
    (session,) = read_sessions(alone)
    assert session["config"]["model"]["height"] == 8 and session["config"]["model"]["width"] == 12
    assert session["data"]["channels"] == ["t2m", "u10"] and session["data"]["step_hours"] == 6
    assert session["data"]["folder"] == str(data) and len(session["data"]["sha256"]) == 64
    assert (alone / "config.yaml").exists() and list((alone / "statistics").glob("*.npz"))


def test_torchrun_as_the_issue_names_it(data, tmp_path):
    """The file, not the module, on two cp ranks: the losses are those of one process."""
    out, one = tmp_path / "run", tmp_path / "one"
    words = [
        "--data",
        data,
        "--patch",
        1,
        "--steps",
        6,  # the whole twenty are in test_vit.py
        "--global-batch",
        4,
        "--seed",
        0,
        "--dtype",
        "float32",
    ]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "apps/vit/train.py"]
    output = output_of(*torchrun, *words, "--cp", 2, "--tp", 1, "--dp", 1, "--out", out)
    assert train(*words, "--out", one) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(6)) and all(
        "tokens_per_s" in r for r in records
    )
    assert losses(out) == pytest.approx(losses(one), rel=1e-5)
    assert "cp 2 x tp 1 x dp 1" in output and "60 times x 2 channels x 8 x 12 points" in output
    assert f"loss {records[0]['loss']:.4f} -> {records[-1]['loss']:.4f}" in output


def test_a_resumed_run_ends_bitwise_as_the_unbroken_one(alone, tmp_path):
    """With the same data and configuration, which the command need not name.

    Runs that are killed are tested in test/apps/common/test_resume.py."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    remove_checkpoints(out, after=6)
    assert train("--resume", out) == 0
    assert [session["start_step"] for session in read_sessions(out)] == [0, 6]
    assert losses(out) == losses(alone)
    one, other = parameters(alone, 12), parameters(out, 12)
    assert one.keys() == other.keys()
    assert all(torch.equal(p, other[name]) for name, p in one.items())


def test_epochs(small, data, tmp_path):
    """Steps are epochs times samples over the global batch, rounded up; each epoch validates."""
    out = tmp_path / "run"
    times = ["--train-times", "0/20", "--val-times", "20/40", "--test-times", "40/60"]
    assert (
        train(
            "--config",
            small,
            "--data",
            data,
            "--out",
            out,
            "--epochs",
            2,
            "--leads",
            "6,24",
            "--global-batch",
            3,
            *times,
        )
        == 0
    )
    records = read_metrics(out)
    assert (
        len(records) == 2 * 6 and records[5]["epoch"] == 1 and records[-1]["epoch"] == 2
    )  # 16 samples: 4 steps to the last lead
    scores = {f"val_rmse/{name}+{lead}h" for name in ("t2m", "u10") for lead in (6, 24)}
    for i, record in enumerate(records):
        assert (
            scores | {"val_loss"} <= record.keys() if i in (5, 11) else not scores & record.keys()
        )
    before, after = (records[i]["val_loss"] for i in (5, 11))
    assert np.isfinite(before) and after < before
    assert load(str(out / "config.yaml")).train.steps == 12


def test_without_data_the_default_record_is_read(small, data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(simulate, "default_record", lambda folder: asked.append(folder) or data)
    assert train("--config", small, "--out", tmp_path / "run", "--steps", 2) == 0
    assert asked == [tmp_path / "cache" / "ringx"] and len(losses(tmp_path / "run")) == 2
    assert read_sessions(tmp_path / "run")[0]["data"]["folder"] == str(data)


# ---- configurations by name


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*p*_ringx.yaml")) + ["dp_p8"])
def test_configurations_by_name(name, capsys):
    """Their meshes, and the estimated memory of a model with one block (that of all takes long)."""
    c = load(name)
    base = PRESETS[f"2.6b-p{c.model.patch}"]
    assert c.name == name and (c.model, c.train) == (base.model, base.train)
    if name == "dp_p8":
        assert (c.mesh.cp, c.mesh.tp) == (1, 1)
    else:
        assert (
            c.mesh.cp > 1
            and c.mesh.tp > 1
            and name == f"mp_p{c.model.patch}_ringx"
            and c.train.algorithm.startswith("ringx")
        )
        assert c.mesh.fit(8 * c.mesh.cp * c.mesh.tp).dp == 8  # what is left
    args = ["--config", name, "--estimate"]
    shape = configure(parser().parse_args(args))[1]
    assert (shape.cp, shape.tp, shape.dp) == (c.mesh.cp, c.mesh.tp, 1)
    assert main([*args, "--layers", "1"]) == 0
    output = capsys.readouterr().out
    assert (
        f"{name}: " in output
        and f"on {shape.world_size} ranks (fsdp)" in output
        and "peak, of which" in output
    )
    remote = next(line for line in output.splitlines() if "of other ranks' blocks" in line).split()
    assert (float(remote[0]) > 0) == (shape.cp > 1)


@pytest.mark.fast
def test_a_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mp_p2_ringx").mkdir()  # a run's, say
    assert load("mp_p2_ringx").model.patch == 2


def test_a_resumed_run_keeps_the_mesh_that_is_asked_for(alone, tmp_path):
    """--config's other axes are meant, those of the run's own config.yaml are not."""
    yaml = tmp_path / "cut.yaml"
    yaml.write_text("preset: tiny\nmesh: {cp: 2, tp: 2}\n")
    words = ["--cp", "4", "--nproc", "8", "--resume", str(alone), "--dry-run"]
    _, shape = configure(parser().parse_args(["--config", str(yaml), *words]))
    assert (shape.cp, shape.tp, shape.dp) == (4, 2, 1)
    run = tmp_path / "run"
    run.mkdir()
    yaml.rename(run / "config.yaml")
    _, shape = configure(parser().parse_args(["--resume", str(run), "--dry-run", *words[:4]]))
    assert (shape.cp, shape.tp, shape.dp) == (4, 1, 2)


# ---- mistakes


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--preset tiny --config mp_p2_ringx", "--preset and --config: give one"),
        ("--preset huge", "preset='huge' is unknown"),
        ("--config mp_p3_ringx", "names: dp_p8"),
        (
            "--config 2.6b-p2",
            "no such name in apps/vit/configs; names: dp_p8",
        ),  # a dot, but no file
        ("--config {tmp}/missing.yaml", "cannot be read"),
        ("--config {tmp}/bad.yaml", "model has no field 'depth'"),
        ("--config mp_p2_ringx --nproc 6", "ranks, but there are 6"),
        ("--patch 9", "patch=9 must be at most 8"),
        ("--heads 5", "heads=5 must divide dim=96"),
        ("--leads 0", "leads='0' must be different whole numbers of hours above 0"),
        ("--leads 6,6", "leads='6,6'"),
        ("--positions round", "positions='round' is unknown"),
        ("--algorithm ringx7", "algorithm='ringx7' is unknown. Did you mean"),
        ("--epochs -1", "epochs=-1"),
        ("--epochs 2 --steps 4", "--epochs 2 and --steps 4: give one"),
        ("--epochs 2 --val-every 3", "--val-every 3: a run of epochs is validated after each"),
        ("--history 0", "history='0' must be different whole numbers of hours above 0"),
        ("--base best", "base='best' is unknown"),
        ("--nproc 2 --tp 2 --dp-engine ddp", "dp_engine=ddp cannot be combined with tp=2"),
        ("--nproc 3 --tp 3", "tp=3 does not divide heads=4"),
        ("--nproc 2 --dp 2 --global-batch 3", "global_batch=3 must be a multiple of dp=2"),
        ("--resume {tmp}/nowhere", "there is no such folder"),
        ("--out {tmp}/bad.yaml", "cannot be written: File exists"),
        ("--estimate --data {tmp}/missing.nc", "missing.nc does not exist"),
        (
            "--estimate --preset 2.6b-p2 --leads 6,24",
            "--leads: without --data an estimate is of 2.6b-p2's own channels",
        ),
        ("--frobnicate", "--frobnicate"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("preset: tiny\nmodel: {depth: 3}\n")
    words = arguments.format(tmp=tmp_path).split()
    if not {"--out", "--resume"} & set(words):
        words += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert message in printed.err


def spoilt(folder: Path) -> None:
    """Files with one thing wrong with each."""
    good = weather(times=40)
    good.to_netcdf(folder / "good.nc")
    (folder / "cut.nc").write_bytes(
        (folder / "good.nc").read_bytes()[: (folder / "good.nc").stat().st_size // 2]
    )
    classic = good[["latitude", "longitude", "time", "t2m"]]
    classic.to_netcdf(folder / "classic.nc", format="NETCDF3_64BIT", unlimited_dims=[])
    (folder / "text.nc").write_text("hello\n")
    good.isel(time=0, drop=True).to_netcdf(folder / "timeless.nc")
    good.rename(latitude="row").to_netcdf(folder / "rows.nc")
    good.assign(u10=good.u10 * np.nan).to_netcdf(folder / "nan.nc")
    later = good.copy(deep=True)
    later["u10"][30] = np.nan  # among the validation times, 28 to 34
    later.to_netcdf(folder / "nan_later.nc")
    good.assign(u10=good.u10 * 0 + 1).to_netcdf(folder / "constant.nc")
    good.isel(time=[0, 1, 3, 4]).to_netcdf(folder / "gap.nc")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    spoilt(folder)
    return folder


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments, message",
    [
        ("cut.nc", "cut.nc: cannot be read"),
        ("text.nc", "text.nc: cannot be read"),
        ("none.nc", "none.nc does not exist"),
        ("timeless.nc", "timeless.nc: it has no times"),
        ("rows.nc", "rows.nc: no dimension is a latitude"),
        (
            "nan.nc",
            "nan.nc: channel u10 is missing (or infinite) at 96 of 96 points "
            "at 2001-01-30T00:00:00",
        ),
        ("nan_later.nc --val-every 1", "channel u10 is missing (or infinite) at 96 of 96 points"),
        ("nan_later.nc --epochs 2", "channel u10 is missing (or infinite) at 96 of 96 points"),
        ("constant.nc", "channel u10 is 1 everywhere in train"),
        ("gap.nc", "gap.nc: times are unevenly spaced"),
        ("good.nc --variables t2m,q", "variables: 'q' is not a channel of"),
        ("good.nc --levels 500", "levels: 500 hPa is not in"),
        ("good.nc --levels high", "levels='high' must be whole numbers"),
        ("good.nc --channel-names a,b", "is for HDF5 files"),
        ("good.nc --inputs static", "'static' is asked for"),
        ("good.nc --inputs sun", "inputs: 'sun' is unknown"),
        (
            "good.nc --train-times 5/5 --val-times 6/20 --test-times 20/40",
            "--train-times, --val-times, --test-times: train='5/5' is empty or backwards",
        ),
        ("good.nc --train-times 0/20", "val is not given"),
        (
            "good.nc --train-times 0/20 --val-times 20/21 --test-times 21/40 --val-every 1",
            "val has 1 times (20/21), too few",
        ),
        ("good.nc --leads 600", "train has 28 times (0/28), too few for a lead of 600 h"),
        ("good.nc --leads 7", "leads: 7 h is no positive multiple of the record's step, 6 h"),
        ("good.nc --cp 1 --patch 8 --mlp-tiles 9", "mlp_tiles=9 is more than the tokens"),
    ],
)
def test_data_that_cannot_be_used_is_named_before_the_first_step(
    arguments, message, small, bad, tmp_path, capsys
):
    words = ["--config", small, "--out", tmp_path / "out", "--data", *f"{bad}/{arguments}".split()]
    assert train(*words) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and "step" not in printed.out
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.fast
@pytest.mark.parametrize("kept", [0.6, 0.999])
def test_a_truncated_classic_file_is_named(kept, small, bad, tmp_path, capsys):
    whole = (bad / "classic.nc").read_bytes()
    (tmp_path / "cut.nc").write_bytes(whole[: int(kept * len(whole))])
    assert train("--config", small, "--out", tmp_path / "out", "--data", tmp_path / "cut.nc") == 2
    printed = capsys.readouterr()
    assert "cut.nc" in printed.err and printed.err.count("\n") == 1 and "step" not in printed.out


def test_all_ranks_refuse_a_file_and_one_says_it(small, bad, tmp_path, capfd):
    words = ["--config", small, "--data", bad / "nan.nc", "--out", tmp_path / "out", "--nproc", 2]
    job, _ = configure(parser().parse_args([*map(str, words)]))
    assert ringx.launch.run(work, 2, job, device="cpu", timeout=60) == [2, 2]
    printed = capfd.readouterr()
    assert (
        printed.err.count("channel u10 is missing") == 1
        and "Traceback" not in printed.err
        and "step" not in printed.out
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--leads 12", "the checkpoint's run has leads 6, here it is 12"),
        (
            "--leads 6,24",
            "the checkpoint's run has leads 6, here it is 6,24: the model would forecast something "
            "else; give --leads 6",
        ),
        ("--variables t2m", "here it is t2m"),
        ("--seed 1", "give --seed 0"),
        ("--global-batch 4", "give --global-batch 2"),
        ("--dim 64", "the checkpoint is of another model: its dim is 32, here 64"),
        ("--data {other}", "read other data than other.nc"),
        (
            "--train-times 0/30 --val-times 30/40 --test-times 40/60",
            "the checkpoint's run has train_times",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(arguments, message, alone, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    weather(times=61).to_netcdf(tmp_path / "other.nc")
    assert train("--resume", out, *arguments.format(other=tmp_path / "other.nc").split()) == 2
    err = capsys.readouterr().err
    assert message in err and "--resume" in err and err.count("\n") == 1
    assert (out / "metrics.jsonl").read_text() == (alone / "metrics.jsonl").read_text()
