"""The committed results of the ViT app are what its README claims, and as good as they should be.

pytest test/apps/vit/test_vit_results.py
"""

import json
import statistics

import pytest
from helpers.paths import RESULTS

from apps.common.log import read_metrics
from apps.vit.config import load
from apps.vit.scores import ScoreRow, read_rows

pytestmark = pytest.mark.fast

FOLDER = RESULTS / "vit_cpu2_202611"
SIMPLE = ("persistence", "climatology", "damped anomaly")


def rmse(run: str) -> dict[tuple[str, int, str], float]:
    return {
        (r.variable, r.lead_hours, r.forecast): r.rmse
        for r in read_rows(FOLDER / run / "scores.csv", ScoreRow)
    }


@pytest.mark.parametrize(
    "lead, most, known",
    [
        (1, 0.40, (0.576, 1.839, 0.432)),
        (3, 0.99, (1.557, 1.839, 1.062)),
        (6, 1.60, (2.683, 1.839, 1.648)),
    ],
)
def test_skill_on_real_data(lead, most, known):
    """The median of three seeds, with known errors of simple forecasts beside it.

    The model was trained with its tokens cut over two ranks."""
    seeds = [rmse(f"seed{n}") for n in range(3)]
    for errors in seeds:
        assert [round(errors["t2m", lead, name], 3) for name in SIMPLE] == list(known)
    assert statistics.median(errors["t2m", lead, "model"] for errors in seeds) <= most
    for n in range(3):
        c = load(str(FOLDER / f"seed{n}/config.yaml"))
        assert (c.mesh.cp, c.model.patch, c.train.seed, c.data.test_times) == (2, 3, n, "576/744")


def test_the_default_record_is_forecast_better_than_by_simple_means():
    errors = rmse("default")
    for variable in "uvh":
        for lead in (6, 24, 72):
            simple = [errors[variable, lead, name] for name in SIMPLE]
            assert errors[variable, lead, "model"] < min(simple)


def test_patches_were_trained_alike():
    configs = [load(str(FOLDER / f"p{p}/config.yaml")) for p in (4, 2, 1)]
    assert [c.model.patch for c in configs] == [4, 2, 1]
    assert (
        len(
            {
                (
                    c.train.steps,
                    c.train.epochs,
                    c.train.global_batch,
                    c.train.seed,
                    c.data,
                    c.model.dim,
                )
                for c in configs
            }
        )
        == 1
    )
    for p, c in zip((4, 2, 1), configs, strict=True):
        assert (
            sum(r.get("val_loss") is not None for r in read_metrics(FOLDER / f"p{p}"))
            == c.train.epochs
        )


def test_every_algorithm_was_timed_on_every_patch():
    found = json.loads((FOLDER / "time.json").read_text())
    assert {(t["patch"], t["algorithm"]) for t in found["times"]} == {
        (p, a) for p in (4, 2, 1) for a in ("ringx1", "ringx2", "ringx3", "ringx4")
    }
    assert found["ranks"] == 2 and all(min(t["seconds"]) > 0 for t in found["times"])
