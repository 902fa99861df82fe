"""Runs that are killed, told to stop or damaged go on as if nothing had been.

The machinery is the same for all trainers; here it runs the GPT.

python -m pytest test/apps/common/test_resume.py
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.runs import losses, output_of, parameters, remove_checkpoints, start

from apps.common.log import read_metrics, read_sessions
from apps.gpt.data.prepare import prepare
from apps.gpt.train import main

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled"
)  # pytest undoes the filter of checkpoint.py
SMALL = """
preset: tiny
model: {dim: 32, layers: 2, ffn: 48, vocab: 264}
train: {seqlen: 32, global_batch: 2, steps: 12, save_every: 3, dtype: float64}
"""


def train(*words: object) -> int:
    """In this process."""
    return main([*map(str, words), "--no-tensorboard"])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Configuration and data of all runs."""
    folder = tmp_path_factory.mktemp("gpt")
    (folder / "small.yaml").write_text(SMALL)
    prepare([str(ROOT / "ringx")], folder / "data", tokenizer="bytes")
    return ["--config", folder / "small.yaml", "--data", folder / "data"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, words):
    """A run of one process."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(*words, "--out", out, "--keep", 0) == 0
    return out


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(p, other[name]) for name, p in one.items()
    )


def whole_checkpoints(out) -> list[Path]:
    return list((out / "checkpoints").glob("step-????????"))


def await_records(process, out, count, needs_checkpoint):
    """Waits until a run has more than `count` records, or ends; for at most 60 s."""
    file = out / "metrics.jsonl"
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        enough = file.exists() and len(file.read_text().splitlines()) > count
        if enough and (whole_checkpoints(out) or not needs_checkpoint):
            return
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_random_it_goes_on_bitwise(kills, unbroken, words, tmp_path):
    """kill -9 at no particular moment; then the curve is that of the unbroken run, bit for bit."""
    out, chance = tmp_path / "run", random.Random(0)
    words = [*words, "--out", out, "--resume", out, "--save-every", 1]
    last_step = -1
    for _ in range(kills):
        process = start("-m", "apps.gpt.train", *words)
        await_records(process, out, last_step + chance.randint(1, 3), needs_checkpoint=kills == 1)
        time.sleep(chance.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        last_step = max((record["step"] for record in read_metrics(out)), default=-1)
    assert train(*words) == 0
    if kills == 1:
        assert read_sessions(out)[-1]["start_step"] > 0
    assert losses(out) == losses(unbroken)
    assert same_bits(parameters(out, 12), parameters(unbroken, 12))


def test_told_to_stop_it_saves_and_says_75(unbroken, words, tmp_path, capsys):
    out, number = tmp_path / "run", signal.SIGTERM  # test/slurm sends SIGUSR1
    words = [*words, "--out", out, "--resume", out, "--save-every", 0]
    process = start("-m", "apps.gpt.train", *words)
    while not (out / "metrics.jsonl").exists() or not read_metrics(out):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    done = len(read_metrics(out))
    assert f"stopped by {number.name} after {done} steps, all saved" in output
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{done:08d}"] and done < 12
    assert train(*words) == 0
    assert f"after {done} steps" in capsys.readouterr().out
    assert losses(out) == losses(unbroken)


def test_two_processes_go_on_as_one_did(unbroken, tmp_path, capfd):
    """From step 6 as two ranks of one context; without naming data and configuration again."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    remove_checkpoints(out, after=6)
    assert train("--resume", out, "--cp", 2, "--nproc", 2) == 0
    output = capfd.readouterr().out
    assert "step-00000006, after 6 steps" in output and "cp 2 x tp 1 x dp 1" in output
    expect_near(out, unbroken)


def expect_near(out, unbroken):
    """Losses and the last checkpoint."""
    assert losses(out) == pytest.approx(losses(unbroken), rel=1e-9)
    want = parameters(unbroken, 12)
    for name, p in parameters(out, 12).items():
        assert (p - want[name]).abs().max() <= 1e-9, name


@pytest.mark.slow  # CI has two processes above, and meshes of threads in the tests of each app
def test_four_processes_equal_one_and_any_mesh_goes_on(unbroken, words, tmp_path):
    """cp 4 ends after 5 of 12 steps and goes on as cp 2 x dp 2, then from step 8 as one process."""
    out, command = tmp_path / "run", ["-m", "apps.gpt.train", "--no-tensorboard"]
    cp = ["--nproc", 4, "--cp", 4, "--save-every", 5, "--keep", 0]
    output_of(*command, *words, "--out", out, *cp)
    assert losses(out) == pytest.approx(losses(unbroken), rel=1e-9)
    remove_checkpoints(out, after=5)
    resume = [*command, "--resume", out]  # the same data, without naming it
    assert "step-00000005, after 5 steps" in output_of(
        *resume, "--cp", 2, "--dp", 2, "--nproc", 4, "--save-every", 8
    )
    expect_near(out, unbroken)
    remove_checkpoints(out, after=8)
    # one process: the old mesh does not fit, and is not asked for
    assert "step-00000008, after 8 steps" in output_of(*resume)
    assert losses(out) == pytest.approx(losses(unbroken), rel=1e-9)
    assert [s["start_step"] for s in read_sessions(out)] == [0, 5, 8]


def test_a_damaged_checkpoint_is_named_and_passed_over(unbroken, tmp_path, capfd):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    (file,) = (out / "checkpoints" / "step-00000012").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert train("--resume", out) == 0
    printed = capfd.readouterr()
    output = printed.out + printed.err
    assert "step-00000012 is damaged and passed over" in output
    assert "step-00000009, after 9 steps" in output
    assert losses(out) == losses(unbroken)


def test_a_loss_that_is_not_finite_is_one_line_and_nothing_is_saved(words, tmp_path):
    out = tmp_path / "run"
    flags = ["--lr", "1e300", "--clip", 0, "--no-tensorboard"]
    output = output_of("-m", "apps.gpt.train", *words, "--out", out, *flags, status=1)
    assert "lower --lr?" in output and "Traceback" not in output
    assert not (out / "checkpoints").exists()


def test_an_old_run_is_not_overwritten(unbroken, capsys):
    with pytest.raises(SystemExit):
        main(["--preset", "tiny", "--out", str(unbroken)])
    assert "go on with --resume" in capsys.readouterr().err
