"""ringx bench-comm: the collectives do what their names say, the numbers are those of nccl-tests,
the fit finds alpha and beta."""

import argparse
import itertools
import json
import math

import pytest
import torch
import torch.distributed as dist
from helpers import invented, ranks

from ringx import launch
from ringx.comm.collectives import BENCHMARKS
from ringx.command import cli
from ringx.launch import stopping
from ringx.measure import bench_collectives, machine, records
from ringx.patterns.registry import ALGORITHMS

SMALL = ["--nproc", "2", "--max-bytes", "4K", "--reps", "3", "--seconds", "30", "--device", "cpu"]


def options(out, *argv):
    parser = argparse.ArgumentParser()
    bench_collectives.add_arguments(parser)
    return parser.parse_args([*SMALL, "--out", str(out), *argv])


@pytest.fixture
def on_threads(monkeypatch):
    monkeypatch.setattr(launch, "run", ranks.launch_threads)


# ---- what is measured


@pytest.mark.fast
def test_every_row_of_the_table_of_collectives_is_measured():
    assert bench_collectives.PREPARATIONS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_collective_against_its_definition(name, world):
    """The result of one pass, and what the check expects of it, both against the definition."""
    elements = 8 * world
    cpu = torch.device("cpu")
    inputs = [bench_collectives._values(rank, elements, cpu, True) for rank in range(world)]
    assert len({values[0].item() for values in inputs}) == world

    def rank_main(rank):
        call, expected = bench_collectives.PREPARATIONS[name](rank, world, elements, cpu, True)
        return call().clone(), expected()

    for rank, (result, expected) in enumerate(ranks.run(world, rank_main)):
        if name == "reduce" and rank:
            assert expected is None
            continue
        defined = result_by_definition(name, inputs, rank)
        assert torch.equal(result, defined)
        assert torch.equal(expected, defined)


def result_by_definition(name, inputs, rank):
    """What a rank has after a collective of these inputs; the root is rank 0."""
    world = len(inputs)
    chunks = [values.chunk(world) for values in inputs]
    results = {
        "broadcast": inputs[0],
        "reduce": sum(inputs),
        "all_reduce": sum(inputs),
        "all_gather": torch.cat([values[: len(values) // world] for values in inputs]),
        "reduce_scatter": sum(chunk[rank] for chunk in chunks),
        "all_to_all": torch.cat([chunk[rank] for chunk in chunks]),
        "ring": inputs[rank - 1],
    }
    return results[name]


@pytest.mark.fast
def test_wrong_elements_are_counted(on_threads, tmp_path, monkeypatch, capsys):
    """A broadcast that delivers one element wrong on every rank."""
    real = dist.broadcast

    def broken(x, src, **options_of_call):
        real(x, src, **options_of_call)
        if x.dtype == bench_collectives.DTYPE:  # not the control messages
            x[5] += 1

    monkeypatch.setattr(dist, "broadcast", broken)
    assert bench_collectives.main(options(tmp_path, "--collectives", "broadcast")) == 0
    (r,) = machine.collected(tmp_path)
    assert [s["wrong"] for s in r["sizes"]] == [2, 2]


@pytest.mark.fast
def test_bandwidths_are_those_of_nccl_tests():
    """doc/PERFORMANCE.md of nccl-tests: the factors from algbw to busbw."""
    n = 8
    bus = {name: c.bus(n) for name, c in BENCHMARKS.items()}
    of_parts = dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all"), 7 / 8)
    assert bus == {"broadcast": 1, "reduce": 1, "ring": 1, "all_reduce": 2 * 7 / 8} | of_parts


@pytest.mark.fast
def test_sizes():
    assert bench_collectives.sizes_of(1024, 2**20, 4, 8) == [4**k for k in range(5, 11)]
    assert bench_collectives.sizes_of(1000, 1000, 2, 3) == [
        996
    ]  # whole elements on each of three ranks
    assert bench_collectives.sizes_of(1024, 4096, 4, 2, also=[2080, 1024]) == [1024, 2080, 4096]
    assert (
        bench_collectives.in_bytes("16M") == 2**24
        and bench_collectives.in_bytes("1kb") == 1024
        and bench_collectives.in_bytes("7") == 7
    )


# ---- records


@pytest.mark.fast
def test_records_table_and_machine_file(on_threads, tmp_path, capsys):
    assert bench_collectives.main(options(tmp_path, "--label", "net=x")) == 0
    printed = capsys.readouterr().out
    of_collectives = machine.collected(tmp_path)
    assert {record["case"]["collective"] for record in of_collectives} == set(BENCHMARKS)
    assert len(of_collectives) == 7
    assert list(of_collectives[0])[:5] == ["schema", "kind", "id", "date", "case"]
    for record in of_collectives:
        check_record_of_two_sizes(record)
    assert printed.count("all_to_all") == 2
    assert max(map(len, printed.splitlines()[:15])) <= 100
    check_machine_file(tmp_path / "machine.json")


def check_machine_file(path):
    """Of a run with --label net=x on two ranks."""
    fits = machine.load(path)
    assert len(fits) == 7
    ring = machine.find(fits, "ring", 2)
    assert ring["labels"] == {"net": "x"}
    # written as whole numbers, not as 1.0
    assert json.dumps([ring["bus_factor"], ring["sent_per_byte"]]) == "[1, 1]"


def check_record_of_two_sizes(record):
    """Of a run with --label net=x on two ranks of one host."""
    assert [size["bytes"] for size in record["sizes"]] == [1024, 4096]
    assert record["ended"] is None
    assert record["labels"] == {"net": "x"}
    assert record["wire_missing"] == "all ranks are on one host"
    assert record["sizes"][0]["wire_factor"] is None
    bus_factor = BENCHMARKS[record["case"]["collective"]].bus(2)
    for size in record["sizes"]:
        assert size["wrong"] == 0
        assert size["algbw"] == pytest.approx(size["bytes"] / size["mean"])
        assert size["busbw"] == pytest.approx(size["algbw"] * bus_factor)


def test_resume_measures_only_what_is_missing(on_threads, tmp_path):
    assert bench_collectives.main(options(tmp_path, "--collectives", "ring")) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("collective*")}
    with pytest.raises(
        ValueError, match=r"already holds 1 of these 2 cases \(collective_ring_fp32_n2_hosts1, "
    ):
        bench_collectives.main(options(tmp_path, "--collectives", "ring,broadcast"))
    assert (
        bench_collectives.main(options(tmp_path, "--collectives", "ring,broadcast", "--resume"))
        == 0
    )
    with pytest.raises(ValueError, match=r"was measured with labels \{\}, now \{'net': 'x'\}"):
        bench_collectives.main(
            options(tmp_path, "--collectives", "ring", "--resume", "--label", "net=x")
        )
    assert len(machine.collected(tmp_path)) == 2 and all(
        p.stat().st_mtime_ns == t for p, t in before.items()
    )


def test_time_and_memory_bound_the_sizes(on_threads, tmp_path, monkeypatch):
    assert (
        bench_collectives.main(
            options(
                tmp_path / "t", "--collectives", "ring", "--max-bytes", "1G", "--seconds", "0.5"
            )
        )
        == 0
    )
    (r,) = machine.collected(tmp_path / "t")
    assert "are left of --seconds" in r["ended"] and r["sizes"][-1]["bytes"] < 2**30
    monkeypatch.setattr(bench_collectives, "_free_memory", lambda: 2**17)
    assert (
        bench_collectives.main(
            options(tmp_path / "m", "--collectives", "ring", "--max-bytes", "1G")
        )
        == 0
    )
    (r,) = machine.collected(tmp_path / "m")
    assert (
        "GiB that are free" in r["ended"] and r["sizes"][-1]["bytes"] == 4096
    )  # 4 x 16 KiB x 2 ranks is more than half


@pytest.mark.fast
def test_told_to_stop_it_keeps_what_is_complete(on_threads, tmp_path, monkeypatch, capsys):
    real = bench_collectives.measure_collective

    def until_told(world, case, *rest):
        if case.collective == "reduce":
            monkeypatch.setattr(stopping, "_received", "SIGUSR1")
        return real(world, case, *rest)

    monkeypatch.setattr(bench_collectives, "measure_collective", until_told)
    assert bench_collectives.main(options(tmp_path)) == stopping.AGAIN
    assert [r["case"]["collective"] for r in machine.collected(tmp_path)] == ["broadcast"]
    assert "interrupted by SIGUSR1" in capsys.readouterr().out


@pytest.mark.fast
def test_told_before_anything_is_complete_it_does_not_ask_to_come_again(
    on_threads, tmp_path, monkeypatch
):
    monkeypatch.setattr(stopping, "_received", "SIGUSR1")
    assert bench_collectives.main(options(tmp_path)) == 1


@pytest.mark.fast
def test_mistakes_are_named_at_once(capsys, tmp_path):
    argv = [
        "bench-comm",
        "--out",
        str(tmp_path / "new"),
        "--collectives",
        "brodcast",
        "--min-bytes",
        "4X",
        "--also",
        "3,x",
    ]
    assert cli.main([*argv, "--factor", "1", "--nproc", "1", "--seconds", "0", "--label", "a"]) == 2
    printed = capsys.readouterr().err
    for word in (
        "Did you mean 'broadcast'",
        "'4X' is no size",
        "--also: 'x' is no size",
        "--factor 1",
        "--nproc 1: it takes two",
    ):
        assert word in printed
    for word in ("--seconds 0", "--label 'a'"):
        assert word in printed
    assert not (tmp_path / "new").exists()


def edits():
    yield "kind: None", lambda r: r.pop("kind")
    yield "case.hosts is missing", lambda r: r["case"].pop("hosts")
    yield r"sizes\[1\].wrong is missing", lambda r: r["sizes"][1].pop("wrong")
    yield "other than positive numbers", lambda r: r["sizes"][0].update(mean=0.0)
    yield "do not rise", lambda r: r["sizes"][0].update(min=1.0)
    yield "sizes is empty", lambda r: r.update(sizes=[])


@pytest.mark.fast
@pytest.mark.parametrize(("says", "edit"), list(edits()))
def test_a_broken_record_is_refused(tmp_path, says, edit):
    record = invented.collective()
    edit(record)
    with pytest.raises(ValueError, match=says):
        records.write(tmp_path, record)


# ---- the model


@pytest.mark.fast
def test_the_fit_finds_alpha_and_beta():
    points = [(2**k, 3e-5 + 2e-9 * 2**k) for k in range(10, 28, 2)]
    fitted = machine.fit(points)
    assert (
        fitted["alpha_s"] == pytest.approx(3e-5)
        and fitted["beta_s_per_byte"] == pytest.approx(2e-9)
        and fitted["relative_error"] < 1e-9
    )


@pytest.mark.fast
def test_the_fit_is_never_negative():
    """Points of which plain least squares would make a negative latency or time per byte."""
    steep = machine.fit([(10, 1.0), (100, 20.0), (1000, 300.0)])
    flat = machine.fit([(10, 3.0), (100, 2.0), (1000, 1.0)])
    assert 0 <= steep["alpha_s"] < 1e-9 and steep["beta_s_per_byte"] == pytest.approx(
        (0.1 * 0.2 * 0.3) ** (1 / 3)
    )
    assert flat["alpha_s"] == pytest.approx(6 ** (1 / 3)) and 0 <= flat["beta_s_per_byte"] < 1e-9
    assert machine.fit([(10, 1.0)]) is None


@pytest.mark.fast
def test_the_fit_is_the_best_one():
    """Noisy points: no alpha and beta on a fine grid have a smaller sum of squared logarithms."""
    noise = [1.3, 0.8, 1.1, 0.7, 1.4, 0.9]
    points = [(4**k * 1024, n * (5e-4 + 3e-9 * 4**k * 1024)) for k, n in enumerate(noise)]
    best = machine.fit(points)

    def off(alpha, beta):
        return sum(math.log((alpha + beta * size) / t) ** 2 for size, t in points)

    least = off(best["alpha_s"], best["beta_s_per_byte"])
    steps = [1 + 0.02 * i for i in range(-20, 21)]
    assert all(
        off(best["alpha_s"] * x, best["beta_s_per_byte"] * y) >= least - 1e-12
        for x in steps
        for y in steps
    )


@pytest.mark.fast
def test_the_machine_file_answers(tmp_path):
    kinds = itertools.product(("broadcast", "reduce"), (2, 4), "ab")
    made = [
        invented.collective(name, n, beta=1e-8 * n, labels={"link": link})
        for name, n, link in kinds
    ]
    machine.write(tmp_path, made)
    fits = machine.load(tmp_path / "machine.json")
    assert len(fits) == 8
    one = machine.find(fits, "reduce", 4, {"link": "b"})
    assert one["beta_s_per_byte"] == pytest.approx(4e-8) and one["labels"] == {"link": "b"}
    with pytest.raises(LookupError, match="no fit of reduce on 8 ranks"):
        machine.find(fits, "reduce", 8)
    assert machine.seconds_unhidden(one, 900.0, 3) == pytest.approx(3 * 1e-4 + 900 / 0.75 * 4e-8)
    (tmp_path / "machine.json").write_text(json.dumps({"kind": "x"}))
    with pytest.raises(ValueError, match="is no machine file"):
        machine.load(tmp_path / "machine.json")


@pytest.mark.fast
def test_wire_bytes_grow_linearly_between_sizes():
    """As gloo's reduce: 1.5 times the optimum up to 4 MiB, 2.5 bytes for every further byte."""
    mib = 2**20
    fit = {
        "collective": "reduce",
        "world": 2,
        "sent_per_byte": 0.5,
        "wire_factors": [[mib, 1.5], [4 * mib, 1.5], [16 * mib, 2.25]],
    }

    def of(size, messages=1):
        return machine.wire_bytes(fit, 0.5 * size * messages, messages) / (0.5 * messages)

    assert (
        of(100) == pytest.approx(150)
        and of(3 * mib) == pytest.approx(4.5 * mib)
        and of(3 * mib, 7) == pytest.approx(4.5 * mib)
    )
    assert of(8 * mib) == pytest.approx(6 * mib + 4 * 2.5 * mib)
    assert of(32 * mib) == pytest.approx(36 * mib + 16 * 2.5 * mib)
    with pytest.raises(LookupError, match="no bytes on the wire"):
        machine.wire_bytes(fit | {"wire_factors": None}, 1, 1)


def test_messages_of_attention_are_counted(tmp_path):
    """As the docstrings of the algorithms have them, and their closed forms; N = 2: the mean over
    ranks of the collectives that a rank takes part in."""
    argv = [
        "bench",
        "--nproc",
        "2",
        "--seqlens",
        "64",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--head-dim",
        "16",
        "--masks",
        "full",
    ]
    assert (
        cli.main(
            [*argv, "--dtypes", "fp32", "--reps", "1", "--no-baseline", "--out", str(tmp_path)]
        )
        == 0
    )
    for r in records.read_all(tmp_path)[0]:
        forward, backward = (r["bytes"][d]["messages"] for d in ("forward", "backward"))
        algorithm = r["case"]["algorithm"]
        closed_form = ALGORITHMS[algorithm].messages(
            B=1, S=64, H=4, Hkv=2, D=16, N=2, itemsize=4, causal=False
        )
        assert (forward, backward) == closed_form
        expected = {
            "ringx1": (
                {"broadcast": 2, "all_reduce": 2, "reduce": 2},
                {"broadcast": 2, "reduce": 2},
            ),
            "ringx2": (
                {"broadcast": 2, "all_reduce": 2, "reduce": 2},
                {"broadcast": 2, "reduce": 2},
            ),
            "ringx3": ({"all_gather": 1}, {"all_gather": 1, "all_to_all": 1}),
            "ringx4": ({"broadcast": 2}, {"broadcast": 2, "reduce": 2}),
        }
        assert (forward, backward) == expected.get(algorithm, closed_form)
