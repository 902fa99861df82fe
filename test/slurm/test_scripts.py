"""The batch scripts: what they source and call makes sense, wherever they are submitted.

python -m pytest test/slurm/test_scripts.py
"""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.paths import SCRIPT

import ringx
from apps.gpt import train
from apps.gpt.config import PRESETS
from apps.vit import train as vit
from apps.vit.config import load
from ringx.launch import environ
from ringx.measure import bench_attention, bench_collectives, cases

pytestmark = pytest.mark.fast

SHELL = sorted(
    [
        *SCRIPT.glob("*.sbatch"),
        SCRIPT.parent / "apps/gpt/job.sbatch",
        *(SCRIPT.parent / "apps/vit").glob("*.sbatch"),
        *SCRIPT.glob("*.sh"),
        SCRIPT.parent / "test/slurm/cluster",
        SCRIPT.parent / ".ci/run",
    ]
)
LISTS = [
    "login",
    "n[1-3,07-09]",
    "gpu[001-004,7]-ib,login",
    "r[1-2]n[01,3]",
    "n[8-11],m2",
    "node-1.site.org,x[2]",
    "a,b[3-4]",
]


def bash(script, cwd=None, **env):
    clean = {"PATH": "/usr/bin:/bin", **env}
    return subprocess.run(
        ["bash", "-c", script], env=clean, cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("file", SHELL, ids=lambda f: f.name)
def test_is_bash(file):
    assert (
        subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False).stderr
        == ""
    )
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", "-S", "error", file], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


# ---- setup_dist_vars.sh


@pytest.mark.parametrize("nodes", LISTS)
def test_setup_dist_vars_says_what_ringx_would(nodes):
    """For every rank of a step on these nodes, one task more on the first: the same as
    ringx.launch.environ, which asks Slurm itself."""
    hosts = environ.hosts_of(nodes)
    places = [(0, 0), (0, 1), *((node, 0) for node in range(1, len(hosts)))]  # (node, local rank)
    tasks_per_node = {1: "2", 2: "2,1"}.get(len(hosts), f"2,1(x{len(hosts) - 1})")
    for rank, (node, local_rank) in enumerate(places):
        slurm = {
            "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "3", "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": str(len(places)), "SLURM_LOCALID": str(local_rank),
            "SLURM_NODEID": str(node),
            "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
        }  # fmt: skip
        variables = variables_of_setup_dist_vars(slurm)
        info = environ.read(slurm)
        assert variables == {
            "RANK": str(info.rank),
            "LOCAL_RANK": str(info.local_rank),
            "WORLD_SIZE": str(info.world_size),
            "LOCAL_WORLD_SIZE": str(info.local_world),
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": str(info.port),
        }
        # ringx accepts what the script has set
        assert environ.read(slurm | variables).world_size == info.world_size


def variables_of_setup_dist_vars(slurm):
    """What the script sets for a task with these variables of Slurm."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    show = "; ".join(f"printenv {name}" for name in names)
    done = bash(f"source {shlex.quote(str(SCRIPT / 'setup_dist_vars.sh'))}; {show}", **slurm)
    values = done.stdout.splitlines()
    assert len(values) == len(names), done.stderr
    return dict(zip(names, values, strict=True))


def test_setup_dist_vars_keeps_what_is_set_and_refuses_other_shells():
    source = f"source {shlex.quote(str(SCRIPT / 'setup_dist_vars.sh'))}"
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_LOCALID": "0",
    }
    done = bash(
        f"{source}; echo $MASTER_ADDR $MASTER_PORT", **slurm, MASTER_ADDR="there", MASTER_PORT="9"
    )
    assert done.stdout.split() == ["there", "9"]
    done = bash(f"{source} || echo refused")
    assert done.stdout.strip() == "refused" and "this is no task of srun" in done.stderr


# ---- job.sh and the batch scripts


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for srun and scontrol; srun runs the command once."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(
        '#!/bin/bash\necho "srun $*" >>"$LOG"\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n'
    )
    (folder / "scontrol").write_text('#!/bin/bash\necho "scontrol $*" >>"$LOG"\n')
    (folder / "sleep").write_text("#!/bin/bash\nexec /bin/sleep 0.1\n")
    (folder / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$*"\nexit ${STATUS:-0}\n')
    for tool in folder.iterdir():
        tool.chmod(0o755)
    log = tmp_path / "log"
    log.write_text("")
    return {
        "PATH": f"{folder}:/usr/bin:/bin",
        "LOG": str(log),
        "PYTHON": "python",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
    }


from_checkout_and_script = pytest.mark.parametrize("folder", [SCRIPT.parent, SCRIPT])


def command_of_ranks(script, *, folder, **variables):
    """The words after python of what the ranks of a batch script run, submitted from a folder."""
    done = bash(f"bash {SCRIPT}/{script}", cwd="/", SLURM_SUBMIT_DIR=str(folder), **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@from_checkout_and_script
@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("test.sbatch ringx3", "test/test_ringx3.py"),
        (
            "gpt.sbatch --preset tiny",
            "-m apps.gpt.train --preset tiny --out gpt_7 --resume gpt_7",
        ),
        ("vit.sbatch --dim 8", "-m apps.vit.train --dim 8 --out vit_7 --resume vit_7"),
    ],
)
def test_batch_scripts_run_the_program_of_their_name(slurm, script, command, folder):
    assert command_of_ranks(script, folder=folder, **slurm) == command.split()


@pytest.mark.fast
def test_the_program_of_the_test_script_is_there():
    assert (SCRIPT.parent / "test/test_ringx3.py").exists()


@from_checkout_and_script
def test_the_bench_script_measures_its_part(slurm, folder):
    words = command_of_ranks("bench.sbatch ringx1", folder=folder, SLURM_ARRAY_TASK_ID="2", **slurm)
    args = parsed(bench_attention, words[3:])
    assert args.part == "2/4"
    assert {case.algorithm for case in cases.plan(args, 2)} == {"ringx1"}
    array = re.search(r"--array=0-(\d)", (SCRIPT / "bench.sbatch").read_text())
    all_cases, _ = cases.examine(args, 2, None)
    assert len({case.size for case in all_cases}) == int(array[1]) + 1


@from_checkout_and_script
def test_the_collectives_script_measures_what_it_is_told(slurm, folder):
    words = command_of_ranks("collectives.sbatch ring", folder=folder, **slurm)
    args = parsed(bench_collectives, words[3:])
    assert bench_collectives.examine(args) == (["ring"], [])


def parsed(module, words):
    """The options of a benchmark on two ranks that resumes."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(words)
    assert args.nproc == "2"
    assert args.resume
    return args


@pytest.mark.parametrize(
    "words, preset",
    [
        ("", "tiny"),
        ("llama3-8b-1m --cp 128", "8b-1m --cp 128"),
        ("160m --steps 3", "160m --steps 3"),
        ("--preset 1b", "1b"),
    ],
)
def test_the_gpt_job_takes_a_recipe_by_its_name(slurm, words, preset):
    folder = SCRIPT.parent / "apps/gpt"
    done = bash(
        f"bash {folder}/job.sbatch {words}",
        cwd="/",
        SLURM_SUBMIT_DIR=str(folder),
        OUT="my run",
        **slurm,
    )
    assert (
        done.stdout.splitlines()[-1]
        == f"-m apps.gpt.train --preset {preset} --out my run --resume my run"
    )
    args = train.parser().parse_args(done.stdout.split()[2:6])
    assert args.preset in PRESETS


@pytest.mark.parametrize(
    "words, base",
    [
        ("", "--preset tiny"),
        ("5m --steps 3", "--preset 5m --steps 3"),
        ("mp_p2_ringx --tp 4", "--config mp_p2_ringx --tp 4"),
    ]
    + [("my.yaml", "--config my.yaml"), ("--config dp_p8", "--config dp_p8")],
)
def test_the_vit_job_takes_a_preset_or_a_configuration_by_its_name(slurm, words, base):
    folder = SCRIPT.parent / "apps/vit"
    done = bash(
        f"bash {folder}/submit.sbatch {words}",
        cwd="/",
        SLURM_SUBMIT_DIR=str(folder),
        OUT="my run",
        **slurm,
    )
    assert done.stdout.splitlines()[-1] == f"-m apps.vit.train {base} --out my run --resume my run"
    args = vit.parser().parse_args(base.split())
    assert args.config == "my.yaml" or vit.base_config(args)


# ---- the matrix of the vit


MATRIX = SCRIPT.parent / "apps/vit/submit_cp.sbatch"
TWO = {"ALGORITHMS": "ringx1, ringx4", "PATCHES": "2", "CPS": "1,2"}


def test_the_matrix_lists_its_cases():
    assert bash(f"bash {MATRIX} --list", cwd="/", **TWO).stdout.splitlines() == [
        "0  ringx1_p2_cp1", "1  ringx1_p2_cp2", "2  ringx4_p2_cp1", "3  ringx4_p2_cp2",
    ]  # fmt: skip
    known = bash(f"bash {MATRIX} --list").stdout
    assert len(known.splitlines()) == 8 and {x.split("_")[0] for x in known.split()[1::2]} <= set(
        ringx.algorithms()
    )
    assert f"--array=0-{len(known.splitlines()) - 1} " in MATRIX.read_text()


def submitted(slurm, out, words="5m --tp 1", **env):
    return bash(
        f"bash {MATRIX} {words}",
        cwd="/",
        SLURM_SUBMIT_DIR=str(MATRIX.parent),
        OUT=str(out),
        **TWO | slurm | env,
    )


def asked(done):
    return [line for line in done.stdout.splitlines() if line.startswith("-m")]


def test_an_array_task_does_its_case_once(slurm, tmp_path):
    out = tmp_path / "my runs"
    (out / "ringx4_p2_cp1").mkdir(parents=True)  # as the trainer makes it
    done = submitted(slurm, out, SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 0, done.stderr
    folder = f"{out}/ringx4_p2_cp1"
    words = "--preset 5m --tp 1 --algorithm ringx4 --patch 2 --cp 1 --dp 0"
    assert asked(done) == [f"-m apps.vit.train {words} --out {folder} --resume {folder}"]
    _, shape = vit.configure(vit.parser().parse_args([*words.split(), "--dry-run", "--nproc", "8"]))
    assert shape.dp == 8  # what is left
    assert (out / "ringx4_p2_cp1" / "done").exists()
    again = submitted(slurm, out, SLURM_ARRAY_TASK_ID="2")
    assert asked(again) == [] and "ringx4_p2_cp1 is done" in again.stdout
    assert (
        len(asked(submitted(slurm, out, "5m --tp 1 --steps 9", SLURM_ARRAY_TASK_ID="2"))) == 1
    )  # other words: more to do


def test_without_an_array_all_cases_are_done_one_after_another(slurm, tmp_path):
    for name in ("ringx1_p2_cp1", "ringx1_p2_cp2", "ringx4_p2_cp1", "ringx4_p2_cp2"):
        (tmp_path / name).mkdir()
    done = submitted(slurm, tmp_path, "mp_p2_ringx")
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1].rpartition("/")[2] for line in asked(done)] == sorted(
        p.name for p in tmp_path.glob("*_cp*")
    )
    assert (
        all(" --config mp_p2_ringx " in line for line in asked(done))
        and load("mp_p2_ringx").model.patch == 2
    )


def test_cases_that_fail_or_do_not_fit_are_named_and_the_others_done(slurm, tmp_path):
    done = submitted(slurm, tmp_path, CPS="3,two,1", STATUS="9")
    assert done.returncode == 9 and len(asked(done)) == 2
    assert (
        "ringx1_p2_cp3: cp=3 does not divide the 2 ranks" in done.stderr
        and "ringx4_p2_cptwo: cp=two" in done.stderr
    )
    assert "ringx4_p2_cp1 ended with status 9" in done.stderr and not list(tmp_path.rglob("done"))
    alone = submitted(slurm, tmp_path, CPS="3", SLURM_ARRAY_TASK_ID="1")
    assert alone.returncode == 2 and asked(alone) == [] and "ringx4_p2_cp3: cp=3" in alone.stderr
    outside = submitted(slurm, tmp_path, SLURM_ARRAY_TASK_ID="4")
    assert (
        outside.returncode == 2
        and "there is no case 4, only --array=0-3" in outside.stderr
        and asked(outside) == []
    )


def test_a_matrix_that_is_stopped_early_is_requeued(slurm, tmp_path):
    done = submitted(slurm, tmp_path, STATUS="75")
    assert done.returncode == 75 and len(asked(done)) == 1
    assert "scontrol requeue 7" in Path(slurm["LOG"]).read_text()


@pytest.mark.parametrize(
    ("status", "limit", "requeued"),
    [(75, "", True), (75, "on_limit=leave", False), (1, "", False), (0, "", False)],
)
def test_only_ranks_that_stopped_early_are_requeued(slurm, status, limit, requeued):
    script = f"{limit}\nsource script/job.sh generic-cpu\nranks $PYTHON x\njob_end"
    done = bash(script, cwd=SCRIPT.parent, **slurm, STATUS=str(status))
    assert done.returncode == status
    assert ("scontrol requeue 7" in Path(slurm["LOG"]).read_text()) == requeued


def test_a_site_that_is_not_there(slurm):
    done = bash("source script/job.sh nowhere; echo on", cwd=SCRIPT.parent, **slurm)
    assert (
        done.returncode == 2
        and "there is no site 'nowhere'" in done.stderr
        and "on" not in done.stdout
    )


def test_srun_gets_the_sites_options(slurm):
    """Those of alps.sh, which loads no modules, and the user's own."""
    done = bash(
        "source script/job.sh alps >/dev/null; ranks $PYTHON x",
        cwd=SCRIPT.parent,
        **slurm,
        RINGX_SRUN="--label -l",
    )
    assert (
        "srun --kill-on-bad-exit=1 --cpus-per-task=72 --label -l bash -c"
        in Path(slurm["LOG"]).read_text()
    ), done.stderr
