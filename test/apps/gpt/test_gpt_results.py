"""What is committed of the GPT trainer's proofs says what README claims of it.

pytest test/apps/gpt/test_gpt_results.py
"""

import json

import pytest
from helpers.paths import RESULTS

from apps.common.log import read_metrics
from apps.gpt.config import load

pytestmark = pytest.mark.fast

FOLDER = RESULTS / "gpt_cpu2_202611"


def read(name):
    return json.loads((FOLDER / name).read_text())


def test_every_mesh_engine_and_algorithm_equals_one_process():
    rows = read("product.json")["rows"]
    assert len(rows) == 30 and all(r["ok"] for r in rows)
    assert {r["engine"] for r in rows} == {"fsdp", "ddp", "zero1", "zero2", "zero3"}
    for r in rows:
        assert r["fell"] >= 0.3 and max(r["loss"], r["parameters"]) <= (
            1e-9 if r["dtype"] == "fp64" else 1e-4
        ), r


def test_twenty_kills_change_no_bit():
    found = read("kills.json")
    assert (
        len(found["kills"]) == 20
        and found["losses_bitwise_equal"]
        and found["parameters_bitwise_equal"]
    )
    assert sum(k["while_saving"] for k in found["kills"]) >= 10


def test_four_ranks_reach_the_loss_that_one_process_was_expected_to():
    one, four = read_metrics(FOLDER / "one"), read_metrics(FOLDER / "cp4")
    assert abs(one[-1]["val_loss"] - 6.37) < 0.005 and abs(four[-1]["val_loss"] - 6.37) < 0.005
    assert (
        max(abs(a["loss"] - b["loss"]) for a, b in zip(one, four, strict=True)) < 0.05
    )  # fp32 sums in another order
    assert load(str(FOLDER / "cp4/config.yaml")).mesh.cp == 4


def test_contexts_saw_as_many_tokens():
    assert {read_metrics(FOLDER / name)[-1]["tokens"] for name in ("1K", "4K", "16K")} == {
        60 * 16384
    }
