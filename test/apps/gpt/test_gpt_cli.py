"""apps/gpt/train.py as users start it: processes, what a run leaves behind, mistakes.

Runs that are killed, told to stop, resumed: test/apps/common/test_resume.py.

pytest test/apps/gpt/test_gpt_cli.py
"""

import importlib.util
import json
import shutil
import zlib

import pytest
from helpers.paths import ROOT
from helpers.runs import losses, output_of

from apps.common.log import read_metrics, read_sessions
from apps.gpt.data.prepare import prepare
from apps.gpt.train import main

SMALL = """
preset: tiny
model: {dim: 32, layers: 2, ffn: 48, vocab: 264}
train: {seqlen: 32, global_batch: 2, steps: 12, save_every: 3, dtype: float64}
"""


def absent(package: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is not None, reason=f"{package} is installed"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare([str(ROOT / "ringx")], folder, tokenizer="bytes")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory, small, data):
    """An unbroken run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    said = output_of("-m", "apps.gpt.train", "--config", small, "--data", data, "--out", out)
    return out, said


def test_what_a_run_leaves_behind(alone):
    out, said = alone
    records = read_metrics(out)
    assert [r["step"] for r in records] == list(range(12)) and all(
        r["tokens_per_s"] > 0 for r in records
    )
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-00000009",
        "step-00000012",
    ]
    (session,) = read_sessions(out)
    assert (
        session["config"]["train"]["seqlen"] == 32
        and session["launch"]["world"] == 1
        and len(session["data"]["sha256"]) == 64
    )
    assert (out / "config.yaml").read_text() in said  # printed in full
    assert "cp 1 x tp 1 x dp 1" in said and said.count("step ") >= 12
    assert f"loss {records[0]['loss']:.4f} -> {records[-1]['loss']:.4f}" in said.splitlines()[-1]


def test_torchrun_as_the_issue_names_it(alone, small, data, tmp_path):
    """The file, not the module; a text file; cp x tp."""
    text, out = tmp_path / "some text.txt", tmp_path / "run"
    text.write_text("".join(p.read_text() for p in sorted((ROOT / "ringx").glob("*.py"))))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "apps/gpt/train.py"]
    words = [
        "--preset",
        "tiny",
        "--steps",
        2,
        "--seqlen",
        512,
        "--global-batch",
        4,
        "--seed",
        0,
        "--dtype",
        "float32",
        "--data",
        text,
    ]
    output_of(*torchrun, *words, "--cp", 1, "--tp", 2, "--dp", 1, "--out", out)
    assert main([*map(str, words), "--out", str(tmp_path / "one")]) == 0
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert all(
        {"step", "loss", "tokens_per_s"} <= json.loads(x).keys()
        for x in (out / "metrics.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--preset tiny", "the checkpoint is of another model: its dim is 32, here 128"),
        ("--seqlen 16", "the checkpoint's run has seqlen 32, here it is 16"),
        ("--seed 1", "give --seed 0"),
        ("--global-batch 4", "give --global-batch 2"),
        ("--data {other}", "read other data than"),
    ],
)
def test_checkpoints_that_do_not_fit(arguments, message, alone, data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(alone[0], out)
    other = tmp_path / "other.txt"
    other.write_text("other text\n" * 400)
    words = arguments.format(other=other).split()
    words += [] if "--data" in words else ["--data", str(data)]
    if "tiny" in words:
        words += ["--steps", "12", "--seqlen", "32", "--global-batch", "2"]
    assert main(["--resume", str(out), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert (out / "metrics.jsonl").read_text() == (alone[0] / "metrics.jsonl").read_text()


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--preset huge", "preset='huge' is unknown"),
        ("--preset tiny --config x.yaml", "--preset and --config: give one"),
        ("--config {tmp}/missing", "cannot be read"),
        ("--config {tmp}/bad.yaml", "model has no field 'depth'"),
        ("--config {tmp}/bad2.yaml", "unknown key 'modle'"),
        ("--algorithm ringx7", "algorithm='ringx7' is unknown. Did you mean"),
        ("--layout zigzig", "Did you mean 'zigzag'"),
        ("--kernel refrence", "Did you mean 'reference'"),
        ("--dtype float46", "Did you mean 'float64'"),
        ("--dp-engine fdsp", "Did you mean 'fsdp'"),
        ("--parallel-order tp-dp", "parallel_order='tp-dp' is unknown"),
        ("--steps 0", "steps=0 must be at least 1"),
        ("--steps many", "--steps"),
        ("--lr -1", "lr=-1.0"),
        ("--lr 0", "lr=0 must be greater than 0"),
        ("--lr nan", "lr=nan"),
        ("--seqlen 0", "seqlen=0"),
        ("--global-batch -1", "global_batch=-1"),
        ("--seed -1", "seed=-1"),
        ("--warmup -3", "warmup=-3"),
        ("--decay 5", "decay=5 is for --schedule wsd"),
        ("--mask-documents", "cannot mask documents packed into one sequence yet"),
        ("--offload", "this run is on the CPU"),
        ("--reduce-dtype bfloat16", "reduce_dtype=bfloat16 is for dtype=bfloat16"),
        ("--dtype bfloat16 --reduce-dtype bfloat16 --dp-engine ddp", "with dtype=bfloat16 and ddp"),
        ("--dry-run --nproc 4 --cp 3", "cp=3 x tp=1 x dp=1 is 3 ranks, but there are 4"),
        ("--nproc 0", "nproc"),
        ("--nproc 4 --seqlen 3", "seqlen=3 is shorter than world=4"),
        ("--nproc 4 --cp 3", "cp=3 x tp=1 x dp=1 is 3 ranks, but there are 4"),
        ("--nproc 4 --tp 4", "tp=4 does not divide kv_heads=2"),
        (
            "--nproc 2 --tp 2 --seqlen 511",
            "seqlen=511 leaves 511 tokens on a cp rank, which tp=2 cannot cut evenly",
        ),
        ("--nproc 2 --tp 2 --dp-engine ddp", "cannot be combined with tp=2"),
        ("--nproc 2 --dp 2 --global-batch 3", "global_batch=3 must be a multiple of dp=2"),
        ("--micro-batch 3", "micro_batch=3 must divide the 4 samples"),
        ("--dp-replicate 2 --nproc 3 --dp 3", "replicate=2 must divide dp=3"),
        ("--mlp-tiles 600", "mlp_tiles=600"),
        ("--resume {tmp}/nowhere", "there is no such folder"),
        ("--resume {tmp}/nowhere --out {tmp}/new", "there is no run in it"),
        ("--init {tmp}/nowhere", "nowhere"),
        ("--out {tmp}/short", "cannot be written: File exists"),
        ("--out {tmp}/short/below", "cannot be written: Not a directory"),
        pytest.param("--wandb project", "W&B is not installed", marks=absent("wandb")),
        pytest.param(
            "--nproc 2 --dp-engine zero2",
            "DeepSpeed is not installed; pip install deepspeed",
            marks=absent("deepspeed"),
        ),
        ("--frobnicate", "--frobnicate"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, tmp_path, capsys):
    (tmp_path / "short").write_bytes(b"0123456789")
    (tmp_path / "bad.yaml").write_text("preset: tiny\nmodel: {depth: 3}\n")
    (tmp_path / "bad2.yaml").write_text("preset: tiny\nmodle: {dim: 3}\n")
    words = arguments.format(tmp=tmp_path).split()
    with pytest.raises(SystemExit) as stop:
        main(
            words
            if "--out" in words
            else [*words, "--out", str(tmp_path / "out")]
            if "nowhere" not in arguments
            else words
        )
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--data {tmp}/missing", "missing"),
        ("--data {tmp}/empty.txt", "empty"),
        (
            "--data {tmp}/short.txt --seqlen 100",
            "but one sequence of --seqlen 100 and its last label take 101",
        ),
        ("--data {tmp}/large", "vocab=320 is smaller"),
        ("--data {tmp}/cut", "train-00000.bin"),
    ],
)
def test_data_that_cannot_be_used_is_named_before_the_first_step(
    arguments, message, data, tmp_path, capsys
):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_bytes(b"0123456789\n")
    prepare([str(ROOT / "ringx")], tmp_path / "large", vocab=500)
    shutil.copytree(data, tmp_path / "cut")
    with (tmp_path / "cut" / "train-00000.bin").open("r+b") as f:
        f.truncate(1000)
    out = tmp_path / "out"
    assert (
        main(["--preset", "tiny", *arguments.format(tmp=tmp_path).split(), "--out", str(out)]) == 2
    )
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and "step" not in printed.out


def test_weights_alone_are_not_resumed(alone, data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(alone[0], out)
    for path in (out / "checkpoints").iterdir():
        about = json.loads((path / "about.json").read_text())
        del about["data"]
        (path / "about.json").write_text(json.dumps(about))
        manifest = json.loads((path / "complete.json").read_text())
        content = (path / "about.json").read_bytes()
        manifest["files"]["about.json"] = {
            "bytes": len(content),
            "crc32": f"{zlib.crc32(content):08x}",
        }
        (path / "complete.json").write_text(json.dumps(manifest))
    assert main(["--resume", str(out), "--data", str(data)]) == 2
    assert "begin from them with --init" in capsys.readouterr().err
