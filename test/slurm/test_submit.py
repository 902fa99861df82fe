"""ringx submit: what it renders (golden files, written anew where one was deleted), refuses and
asks for.

python -m pytest test/slurm/test_submit.py
"""

import argparse
import itertools
import re
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT

import ringx
from ringx.command import cli
from ringx.measure import bench_attention, bench_collectives, records
from ringx.measure import cases as attention_cases
from ringx.slurm import site, submit
from ringx.slurm.jobs import least_memory

GOLDEN = Path(__file__).parent / "golden"
CPU = ["--site", "generic-cpu"]
GPU = ["--account", "ABC123", "--nodes", "4", "--seqlens-per-rank", "8192", "--time", "20"]
RENDERED = {
    "cpu": [
        *CPU,
        "--nodes",
        "1,2",
        "--seqlens",
        "2048,4096",
        "--kv-heads",
        "8,2",
        "--label",
        "note=it's a $(test)",
    ],
    "chain": [
        *CPU,
        "--nodes",
        "4",
        "--chain",
        "3",
        "--serial",
        "--time",
        "2:00:00",
        "--sbatch=--exclusive",
    ],
    "comm": [
        *CPU,
        "--job",
        "bench-comm",
        "--nodes",
        "2",
        "--options",
        "--max-bytes 4M --seconds 9",
        "--label",
        "a=b",
    ],
    **{
        name: ["--site", name, *GPU]
        for name in ("frontier", "lumi", "perlmutter", "alps", "juwels", "generic-gpu")
    },
}


def options(*argv):
    parser = argparse.ArgumentParser()
    submit.add_arguments(parser)
    return parser.parse_args(argv)


def jobs(*argv, out="/scratch/my runs"):
    return submit.prepare(options(*argv, "--out", out), ROOT, "/opt/python")


def rendered(*argv):
    return [submit.render(job).replace(str(ROOT), "/home/me/ringx") for job in jobs(*argv)[0]]


@pytest.mark.fast
@pytest.mark.parametrize("name", RENDERED)
def test_golden(name):
    GOLDEN.mkdir(exist_ok=True)
    file, text = GOLDEN / f"{name}.sbatch", "\n".join(rendered(*RENDERED[name]))
    if not file.exists():
        file.write_text(text)
        pytest.fail(f"{file.name} was written anew: look at it, commit it, run again")
    assert text == file.read_text()


@pytest.mark.fast
@pytest.mark.parametrize("name", RENDERED)
def test_a_rendered_script_is_bash_and_its_command_says_what_was_asked_for(name, tmp_path):
    """The command line reaches Python as it was typed: bash splits it, with a stand-in for job.sh
    and an array task."""
    for job in jobs(*RENDERED[name])[0]:
        words = words_of_ranks(submit.render(job), tmp_path)
        assert words[:3] == ["p", "-m", "ringx"]
        assert not list(tmp_path.iterdir())
        module = {"bench": bench_attention, "bench-comm": bench_collectives}[words[3]]
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        args = parser.parse_args(words[4:])
        assert args.out == Path("/scratch/my runs")
        assert args.resume
        assert int(args.nproc) == job.nodes * job.ranks_per_node
        if module is bench_attention:
            assert args.label == (["note=it's a $(test)"] if name == "cpu" else [])
            check_array_tasks_share_the_cases(args, job.tasks)
        else:
            assert (args.max_bytes, args.seconds, args.label) == ("4M", 9, ["a=b"])


def words_of_ranks(script, folder):
    """What the ranks of a script would run, as bash splits it in that folder."""
    stand_in = (
        "SLURM_ARRAY_TASK_ID=0; PYTHON=p; ranks() { printf '%s\\0' \"$@\"; }; job_end() { :; }"
    )
    command = script[script.index("\nranks ") :]
    done = subprocess.run(
        ["bash", "-euc", stand_in + command],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return done.stdout.split("\0")[:-1]


def check_array_tasks_share_the_cases(args, tasks):
    """Each case is in one part, and no part is empty."""
    cases, faults = attention_cases.examine(args, None, None)
    assert not faults
    parts = [attention_cases.part(cases, f"{task}/{tasks}") for task in range(tasks)]
    assert all(parts)
    measured = sorted(case.id for case in itertools.chain.from_iterable(parts))
    assert measured == sorted(case.id for case in cases)


@pytest.mark.fast
def test_header_lines_hold_nothing_that_slurm_would_split():
    (text,) = rendered("--site", "generic-cpu")
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in header]
    assert all(len(w) == 1 for w in words)
    assert ["--output=/scratch/my runs/jobs/ringx-bench-n1_%j.out"] in words


@pytest.mark.fast
def test_everything_wrong_is_named_at_once(capsys):
    argv = [
        "submit",
        "--site",
        "frntier",
        "--nodes",
        "two,3",
        "--algorithms",
        "ringx5",
        "--seqlens",
        "4097",
        "--kv-heads",
        "3",
    ]
    assert (
        cli.main(
            [
                *argv,
                "--time",
                "soon",
                "--chain",
                "0",
                "--account",
                "a b",
                "--sbatch=--x y",
                "--label",
                "x",
                "--dry-run",
            ]
        )
        == 2
    )
    printed = capsys.readouterr().err
    for word in (
        "site='frntier' is unknown. Did you mean 'frontier'",
        "'two,3' is no comma-separated list of integers",
        "Did you mean 'ringx4'",
        "S=4097 on N=3",
        "--heads 8 is no multiple of --kv-heads 3",
        "'soon' is no time",
        "--chain '0' must be a positive integer",
        "--account 'a b' must be a plain word",
        "--sbatch '--x y'",
        "--label 'x' must be NAME=TEXT",
    ):
        assert word in printed
    assert "Traceback" not in printed


@pytest.mark.fast
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--site", "frontier"], "--account is missing: frontier wants one"),
        (
            ["--site", "frontier", "--account", "a", "--time", "3:00:00"],
            "frontier gives 1 nodes at most 2:00:00; see --chain",
        ),
        (["--site", "frontier", "--account", "a", "--nodes", "100000"], "frontier has at most"),
        (
            [*CPU, "--memory-per-rank", "1", "--seqlens", "4194304"],
            "ringx3 needs at least 40 GiB a rank, of 1",
        ),
        (
            ["--site", "frontier", "--account", "a", "--array", "1000"],
            "1000 array tasks, frontier allows",
        ),
        ([*CPU, "--job", "bench-comm"], "1 rank cannot communicate with itself"),
        (
            [*CPU, "--job", "bench-comm", "--nodes", "2", "--options=--max-bytes 4X"],
            "'4X' is no size in bytes",
        ),
        ([*CPU, "--job", "bench-comm", "--nodes", "2", "--options=--nonsense"], "--nonsense"),
        ([*CPU, "--options=--max-bytes 4M"], "is for --job bench-comm"),
        (
            [*CPU, "--job", "bench-comm", "--nodes", "2", "--seqlens", "8", "--no-baseline"],
            "--seqlens, --no-baseline: for --job bench",
        ),
        (
            [*CPU, "--job", "bench-comm", "--nodes", "2", "--options=--label a=b"],
            "give --label to `ringx submit` itself",
        ),
        (
            [*CPU, "--array", "3", "--seqlens", "64,128"],
            "--array 3: there are 2 sizes to measure on 1 nodes",
        ),
        (
            [*CPU, "--memory-per-rank", "0"],
            "--memory-per-rank 0.0 must be a positive number of GiB",
        ),
        (
            [*CPU, "--job", "bench-comm", "--nodes", "2", "--memory-per-rank", "4"],
            "bench-comm bounds its sizes by",
        ),
        ([*CPU, "--dry-run", "--wait"], "there is nothing to wait for"),
        ([*CPU, "--nodes", "1.5"], "'1.5' is no comma-separated list of integers"),
        (["--site", "../frontier"], "site='../frontier' is unknown"),
    ],
)
def test_refusals(argv, says):
    with pytest.raises(ValueError) as e:
        jobs(*argv)
    assert says in str(e.value)


@pytest.mark.fast
def test_quotes_in_the_folder_are_refused():
    with pytest.raises(ValueError, match="mean something to Slurm"):
        jobs("--site", "generic-cpu", out="/a/%j\"b'")


@pytest.mark.fast
def test_node_hours(capsys, tmp_path):
    argv = [
        "submit",
        "--site",
        "generic-cpu",
        "--nodes",
        "2,4",
        "--seqlens",
        "2048,4096",
        "--time",
        "1:30:00",
        "--chain",
        "2",
    ]
    assert cli.main([*argv, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    # (2 + 4) nodes x 1.5 h x 2 sizes x 2 jobs
    assert "asks for 36.00 node-hours at most" in printed
    assert printed.count("#!/bin/bash") == 2 and not (tmp_path / "out").exists()
    assert all(
        len(line) <= 100 for line in printed.splitlines() if line.startswith(("job", "ringx-"))
    )


@pytest.mark.fast
def test_without_sbatch_the_remedy_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["submit", "--site", "generic-cpu", "--out", str(tmp_path / "out")]) == 2
    assert "submit from a login node, or look with --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.fast
def test_what_is_there_is_looked_at_before_the_queue(capsys, tmp_path, monkeypatch):
    """Records of other labels are refused; where everything is measured nothing is submitted."""
    fake = tmp_path / "bin/sbatch"
    fake.parent.mkdir()
    fake.write_text("#!/bin/bash\necho called >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    matrix = [
        "--seqlens",
        "64",
        "--algorithms",
        "ringx3",
        "--no-baseline",
        "--dtypes",
        "fp32",
        "--label",
        "a=b",
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.main(["bench", "--nproc", "1", *matrix]) == 0
    assert cli.main(["submit", *CPU, *matrix]) == 0
    assert "nothing to submit" in capsys.readouterr().out
    assert cli.main(["submit", *CPU, *matrix, "--label", "c=d"]) == 2
    assert (
        "was measured with labels {'a': 'b'}, now {'a': 'b', 'c': 'd'}" in capsys.readouterr().err
    )


@pytest.mark.fast
def test_a_refusal_half_way_says_what_was_submitted(capsys, tmp_path, monkeypatch):
    """sbatch takes the first script and not the second."""
    fake = tmp_path / "bin/sbatch"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/bash\n"
        'case "$*" in *n1.sbatch) echo 17 ;; *) echo "Invalid partition" >&2; exit 1 ;; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    assert (
        cli.main(
            ["submit", "--site", "generic-cpu", "--nodes", "1,2", "--out", str(tmp_path / "out")]
        )
        == 1
    )
    printed = capsys.readouterr().err
    assert "Invalid partition; submitted before: 17 (scancel 17 ends them)" in printed


def test_least_memory_is_below_what_is_measured(tmp_path):
    """Peaks of real passes lie above the bound (and the inputs, which a peak does not count), but
    not far."""
    argv = [
        "bench",
        "--nproc",
        "2",
        "--seqlens",
        "512",
        "--dtypes",
        "fp32,bf16",
        "--heads",
        "4",
        "--kv-heads",
        "4",
        "--reps",
        "1",
    ]
    assert cli.main([*argv, "--layouts", "zigzag", "--no-baseline", "--out", str(tmp_path)]) == 0
    found, _ = records.read_all(tmp_path)
    assert len(found) == 2 * len(ringx.algorithms())
    for r in found:
        case = attention_cases.AttentionCase(**r["case"])
        inputs = 4 * 512 // 2 * 4 * case.head_dim * (4 if case.dtype == "fp32" else 2)
        held = r["memory"]["peak_bytes"] + inputs
        assert least_memory(case) <= held <= 4 * least_memory(case), case.id


# ---- sites


@pytest.mark.fast
@pytest.mark.parametrize("name", site.names(ROOT / "env"))
def test_every_site_file(name):
    found = site.load(ROOT / "env", name)
    text = (ROOT / f"env/{name}.sh").read_text()
    assert found.ranks_per_node >= 1 and all(option.startswith("--") for option in found.sbatch)
    assert re.search(r"Revised 20\d\d-\d\d-\d\d", text) and (
        "Untested" in text or name == "generic-cpu"
    )
    assert found.account_required == (not name.startswith("generic"))
    subprocess.run(["bash", "-n", ROOT / f"env/{name}.sh"], check=True)


@pytest.mark.fast
def test_the_sites_that_users_ask_for():
    assert set(site.names(ROOT / "env")) == {
        "alps",
        "frontier",
        "generic-cpu",
        "generic-gpu",
        "juwels",
        "lumi",
        "perlmutter",
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("0:00:05", 5),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-12:30", 131400),
        ("2-01:02:03", 176523),
    ],
)
def test_walltime(text, seconds):
    time = site.walltime(text)
    assert time == timedelta(seconds=seconds)
    assert site.walltime(site.format_walltime(time)) == time


@pytest.mark.fast
@pytest.mark.parametrize("text", ["", "soon", "1:2:3", "-5", "0", "1:00:00:00", "1h"])
def test_no_walltime(text):
    with pytest.raises(ValueError, match=r"is no time"):
        site.walltime(text)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("#SITE colour red", "line 1: 'colour' is no fact"),
        ("#SITE limit 91", "limit '91' is not NODES TIME"),
        ("#SITE limit 9 1:00:00\n#SITE limit 3 2:00:00", "limits do not rise"),
        ("#SITE device tpu", "device 'tpu' must be cpu or cuda"),
        ("#SITE ranks-per-node many", "ranks-per-node 'many' is not: ranks on a full node"),
        ("#SITE account required\n#SITE account optional", "account is there 2 times"),
        ("#SITE", "is not '#SITE KEY VALUE'"),
    ],
)
def test_a_site_file_that_makes_no_sense(tmp_path, line, says):
    (tmp_path / "here.sh").write_text(line + "\n")
    with pytest.raises(ValueError, match=says):
        site.load(tmp_path, "here")


@pytest.mark.fast
def test_site_facts(tmp_path):
    (tmp_path / "here.sh").write_text(
        "# Here\n#SITE device cuda  # torch's name\n#SITE memory-per-rank 39.5\n"
        "#SITE srun --a=b -c 7\n#SITE limit 4 1:00:00\n"
        "#SITE limit 8 2-0\n#SBATCH --partition=x\nexport A=1 # SITE\n"
    )
    here = site.load(tmp_path, "here")
    assert (here.device, here.memory_per_rank, here.srun, here.sbatch) == (
        "cuda",
        39.5,
        ("--a=b", "-c", "7"),
        ("--partition=x",),
    )
    assert here.longest(4) == timedelta(hours=1) and here.longest(5) == timedelta(days=2)
    with pytest.raises(ValueError, match="at most 8 nodes"):
        here.longest(9)


@pytest.mark.fast
@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a machine without GPUs")
def test_a_gpu_site_can_be_rendered_where_there_is_no_gpu():
    ((job,), _) = jobs("--site", "perlmutter", "--account", "a", "--kernel", "flash2")
    assert "--device cuda" in submit.render(job) and sys.executable not in submit.render(job)
