"""The command line: verify can fail, info explains, mistakes are one line, the demo says what it
made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ringx
from ringx import kernels
from ringx.command import cli, demo
from ringx.kernels import cpu
from ringx.measure import verify


def small(*more: str) -> list[str]:
    return ["verify", "--nproc", "1", "--seqlens", "24,23", "--head-dims", "8", *more]


def test_verify_on_two_processes(tmp_path, capfd):
    file = tmp_path / "new" / "verify.json"
    assert (
        cli.main(
            [
                *small("--json", str(file)),
                "--nproc",
                "1,2",
                "--dtypes",
                "fp64,bf16",
                "--layouts",
                "zigzag",
            ]
        )
        == 0
    )
    printed = capfd.readouterr().out
    cases = json.loads(file.read_text())["cases"]
    # numbers of ranks, algorithms, masks, dtypes, lengths, overlap
    assert len(cases) == 2 * len(ringx.algorithms()) * 2 * 2 * 2 * 2
    assert f"{len(cases)} cases on 1, 2 ranks: none missed (ok)" in printed
    assert all(c["ok"] and c["repeatable"] for c in cases)
    assert (
        max(c["errors"]["dk"] for c in cases if c["dtype"] == "fp64")
        < 1e-10
        < min(c["errors"]["dk"] for c in cases if c["dtype"] == "bf16")
    )
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.fast
@pytest.mark.parametrize(
    ("spoil", "missed"),
    [
        (lambda dq, dk, dv: (dq, dk * (1 + 1e-7), dv), "dk"),
        (lambda dq, dk, dv: (dq + torch.rand(()) * 1e-14, dk, dv), "repeat"),
        (lambda dq, dk, dv: (torch.empty_like(dq), dk, dv), "dq"),  # memory that nobody wrote
    ],
)
def test_verify_finds_faults(spoil, missed, monkeypatch, capsys):
    original = cpu.backward
    verify._reference_run.cache_clear()
    monkeypatch.setattr(
        cpu, "backward", lambda *args, **options: spoil(*original(*args, **options))
    )
    assert cli.main(small("--dtypes", "fp64", "--algorithms", "ringx4", "--kernel", "cpu")) == 1
    printed = capsys.readouterr().out
    assert any(missed in line.partition("MISS ")[2] for line in printed.splitlines())
    verify._reference_run.cache_clear()


@pytest.mark.fast
def test_errors_that_grow_with_the_ranks_are_missed():
    """bf16 errors within the limit, but more than twice the kernel's own, are misses too."""
    result = {
        "errors": dict.fromkeys(verify.NAMES, 0.005),
        "single": dict.fromkeys(verify.NAMES, 0.002),
    }
    assert verify.missed(result["errors"], result["single"], "bf16") == list(verify.NAMES)
    assert not verify.missed(dict.fromkeys(verify.NAMES, 0.0039), result["single"], "bf16")
    assert verify.missed({n: float("nan") for n in verify.NAMES}, result["single"], "bf16") == list(
        verify.NAMES
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verify", "--algorithms", "ringX3"], "Did you mean 'ringx3'"),
        (["verify", "--nproc", "0"], "0 is less than 1"),
        (["verify", "--nproc", "two"], "'two' is no comma-separated list of integers"),
        (["verify", "--heads", "4", "--kv-heads", "3"], "--heads 4 is no multiple of --kv-heads 3"),
        (["verify", "--seqlens", "3", "--nproc", "4"], "--seqlens 3 is shorter than --nproc 4"),
        (
            ["verify", "--kernel", "flush2", "--nproc", "1"],
            "kernel='flush2' is unknown. Did you mean 'flash2'",
        ),
        (["verify", "--kernel", "flash2", "--nproc", "1"], "kernel='flash2' cannot do this"),
        (["bench", "--out", "x", "--masks", "causel"], "Did you mean 'causal'"),
        (["plot", "/no/such/folder"], "/no/such/folder"),
        (["info", "--dtype", "fp8"], "fp8"),
        (["verfy"], "verfy"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(argv)
    except SystemExit as e:  # argparse
        status = e.code
    printed = capsys.readouterr()
    assert status == 2
    assert message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.fast
def test_info_says_why_not(capsys):
    assert cli.main(["info", "--head-dim", "64,40"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for name in kernels.KERNELS:
        assert printed.count(f" {name} ") >= 2
    if not torch.cuda.is_available():
        assert "* cpu" in printed
        assert "no: it runs on GPUs, these tensors are on cpu" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_as_a_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "ringx", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"
    assert (
        subprocess.run([sys.executable, "-m", "ringx"], capture_output=True, check=False).returncode
        == 2
    )


@pytest.mark.fast
def test_demo(tmp_path, capsys, monkeypatch):
    """What it asks for and says, with its commands stood in for; `make demo` (in CI) runs them."""
    out, asked, status = tmp_path / "a folder", [], {"bench": 0}

    def run(words, **_):
        asked.append(words[2:])
        into = Path(words[words.index("--out" if "--out" in words else "--json") + 1])
        if "apps.gpt.train" in words:
            into.mkdir()
            loss = 4.0 + 2.0**-40 * int(words[words.index("--cp") + 1])
            (into / "metrics.jsonl").write_text(
                "".join(json.dumps({"loss": x}) + "\n" for x in (5.5, loss))
            )
        elif "verify" in words:
            into.write_text("{}")
        return subprocess.CompletedProcess(words, status.get(words[3], 0))

    monkeypatch.setattr(demo.subprocess, "run", run)
    assert cli.main(["demo", "--ranks", "1,2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    names = [next(word for word in words if word != "ringx") for words in asked]
    assert names == ["verify", "bench", "plot", "apps.gpt.train", "apps.gpt.train"]
    assert (
        "The loss fell from 5.500 to 4.000; on 1, 2 ranks it differs by at most 9.1e-13." in printed
    )
    assert all(
        str(out / name) in printed
        for name in ("verify.json", "gpt_cp1/metrics.jsonl", "gpt_cp2/metrics.jsonl")
    )
    status["bench"], asked[:] = 3, []
    assert cli.main(["demo", "--ranks", "1,2", "--out", str(out)]) == 3
    assert len(asked) == 2 and "that step failed with exit status 3" in capsys.readouterr().err
