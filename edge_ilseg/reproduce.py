"""The paper's own experiments on VOC 2012: its network, its schedule, its weights of the losses, and its results.

What a run of ours gives is printed beside the published row. The published numbers are those of arXiv 1907.13372
(sequential setup, VOC 2012 val); where its text leaves a value open, docs/method.md says what is taken here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig
from edge_ilseg.errors import ConfigError, choice_hint
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.scenario_plan import ScenarioPlan, plan_scenario
from edge_ilseg.scenario_results import ScenarioResults, percent_spread
from edge_ilseg.scenario_run import JOINT


class Published(msgspec.Struct, frozen=True):
    """A row of the paper: mIoU in per cent over the old, the new and all classes."""

    old: float
    new: float
    all: float


_JOINT_15 = Published(75.1, 68.5, 73.6)
PUBLISHED: dict[str, dict[str, Published]] = {
    # experiment: our method -> its row; none is at hand for the last three
    "voc-19+1": {
        "finetune": Published(67.3, 20.1, 65.1),
        "kd-output": Published(70.0, 35.3, 68.4),
        "freeze": Published(71.9, 43.3, 70.5),
        "freeze+kd-output": Published(72.5, 51.4, 71.5),
        "kd-feature-plain": Published(72.6, 50.6, 71.6),
        JOINT: Published(73.7, 70.5, 73.6),
    },
    "voc-15+5": {
        "finetune": Published(60.6, 38.7, 55.4),
        "kd-output": Published(71.0, 49.0, 65.7),
        "freeze+kd-output": Published(70.0, 45.8, 64.2),
        "kd-feature-plain": Published(65.6, 43.9, 60.5),
        JOINT: _JOINT_15,
    },
    "voc-15+1x5": {
        "finetune": Published(47.8, 33.0, 44.2),
        "kd-output": Published(57.4, 34.9, 52.0),
        "freeze+kd-output": Published(70.5, 44.2, 64.3),
        "kd-feature-plain": Published(65.9, 45.4, 61.0),
        JOINT: _JOINT_15,
    },
    "voc-10+10": {},
    "voc-10+1x10": {},
    "voc-10+5+5": {},
}
PAPERS_METHODS = tuple(name for name in PUBLISHED["voc-19+1"] if name != JOINT)
"""Those that the papers have rows for."""

ITERATIONS_PER_CLASS = 1000
"""Of the paper: step 0 is trained for 1000 |S_0| iterations, background counted, and step k for 1000 |U_k|."""
MODEL = ModelSpec(backbone="resnet101", head="deeplab_v2", output_stride=8, input_height_px=321, input_width_px=321)
_SHARED: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate_end": 1e-6,
    "decoder_rate_factor": 1.0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule_power": 0.9,
    "batch_norm": "eval",
    "geometry": "native",
}
TRAIN = TrainConfig(learning_rate=1e-4, **_SHARED)
STEP = StepConfig(learning_rate=5e-5, **_SHARED)


def check_experiment(name: str) -> None:
    """Raise `ConfigError` when there is no published experiment of that name."""
    if name not in PUBLISHED:
        raise ConfigError(
            "there is no such published experiment",
            found=repr(name),
            expected=", ".join(PUBLISHED),
            hint=choice_hint(name, PUBLISHED),
        )


def plan_reproduction(
    name: str,
    root: Path,
    weights: str,
    *,
    model: ModelSpec = MODEL,
    iterations_per_class: int = ITERATIONS_PER_CLASS,
    batch_size: int = TRAIN.batch_size,
    progress: ProgressCallback = no_progress,
) -> ScenarioPlan:
    """The scenario of a published experiment: VOC's own class order, setup sequential, scored on val.

    Args:
        name: a key of `PUBLISHED`.
        root: of VOC 2012.
        weights: a file with the backbone's ImageNet weights, or `none`.
        model, iterations_per_class, batch_size: the paper's; others make it another experiment, to try the path.
        progress: told what is done.

    Raises:
        ConfigError: no such experiment.
        DataError: no VOC 2012 there.
    """
    check_experiment(name)
    data = DataConfig("voc", str(root.resolve()))
    train = msgspec.structs.replace(TRAIN, batch_size=batch_size)
    step = msgspec.structs.replace(STEP, batch_size=batch_size)
    plan = plan_scenario(
        Config(data, ClassesConfig(()), model, weights, train, step),
        name.removeprefix("voc-"),
        class_order="listed",
        iterations_per_class=iterations_per_class,
        progress=progress,
    )
    base = msgspec.structs.replace(plan.train, iterations=iterations_per_class * len(plan.classes[0]))
    return msgspec.structs.replace(plan, train=base)


COMPARISON_HEADER = ("method", "old", "new", "all", "published old", "new", "all")


def comparison_rows(name: str, results: ScenarioResults) -> tuple[tuple[str, ...], ...]:
    """One row a published method, in per cent: ours, mean ± standard deviation over the seeds, beside the paper's."""
    ours = {item.method: item for item in results.summaries}
    rows = []
    for method, row in PUBLISHED[name].items():
        item = ours.get(method)
        found = (item.miou_old, item.miou_new, item.miou_all) if item else (None, None, None)
        cells = (percent_spread(value) for value in found)
        rows.append((method, *cells, *(f"{value:.1f}" for value in (row.old, row.new, row.all))))
    return tuple(rows)
