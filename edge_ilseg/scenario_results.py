"""What the runs of a scenario have shown: scores of every chain, their means over seeds, and tables of them.

Conventions: IoU as in `edge_ilseg.metrics`, on the evaluation split. *old* are the classes of step 0 and *new* those of
all increments, after the last step, as in the tables of arXiv 1907.13372. The background, where there is one, is an old
class. Forgetting of a class is its IoU right after the step that taught it minus its IoU after the last step.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from edge_ilseg.checkpoint import StepRecord
from edge_ilseg.errors import ConfigError, WorkspaceError
from edge_ilseg.method_text import parse_method
from edge_ilseg.methods import METHODS
from edge_ilseg.metrics import Metrics
from edge_ilseg.scenario_plan import ScenarioPlan, read_plan, replacements
from edge_ilseg.scenario_run import FAILED, JOINT, joint_folder, seed_folder
from edge_ilseg.workspace import BASE_STEP, Workspace, open_workspace

FORMAT: Final = "edge-ilseg-scenario-results"
FORMAT_VERSION = 2


class StepScore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step of a chain."""

    index: int
    new_classes: tuple[str, ...]
    images: int
    iterations: int
    training_seconds: float
    weights_bytes: int
    metrics: Metrics


class Chain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A method with one seed: step 0 and the increments that are there; joint training has one step."""

    method: str
    seed: int
    steps: tuple[StepScore, ...]


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Mean over the seeds, and the sample standard deviation where there are two or more."""

    mean: float
    std: float | None


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A method over its finished chains. Shares in 0..1; None where no pixel, or no step, defines a score."""

    method: str
    seeds: tuple[int, ...]
    miou_old: Spread | None
    miou_new: Spread | None
    miou_all: Spread | None
    mpa: Spread | None
    mca: Spread | None
    miou_steps: Spread | None
    """Mean over the steps, step 0 with them, of mIoU over the classes known then."""
    iou: dict[str, Spread | None]
    forgetting: dict[str, Spread | None]
    training_seconds: Spread
    """Of the increments; of joint training, of its one step."""


class ScenarioResults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a folder holds."""

    format: Literal["edge-ilseg-scenario-results"]
    format_version: int
    plan: ScenarioPlan
    chains: tuple[Chain, ...]
    summaries: tuple[Summary, ...]
    unfinished: tuple[str, ...]
    """Chains that lack a step, as `<method>, seed <n>`, with the reason where one failed; they are in no summary."""
    replaced: dict[str, tuple[str, ...]] = {}
    """What of a method cannot be on this data, and what it is replaced by (`methods.fit_method`)."""


def read_results(folder: Path) -> ScenarioResults:
    """Collect the scores of all steps that a folder holds.

    Raises:
        WorkspaceError: there is no scenario, or a step is damaged.
    """
    plan = read_plan(folder)
    return collect(plan, _read_chains(folder, plan), _read_failures(folder))


def collect(plan: ScenarioPlan, chains: Sequence[Chain], failed: Mapping[tuple[str, int], str]) -> ScenarioResults:
    """The results of these chains; `failed` says of (method, seed) why a chain has ended."""
    finished: dict[str, list[Chain]] = {}
    unfinished = []
    for chain in chains:
        if chain.method == JOINT or len(chain.steps) == len(plan.classes):
            finished.setdefault(chain.method, []).append(chain)
        else:
            reason = failed.get((chain.method, chain.seed))
            unfinished.append(f"{chain.method}, seed {chain.seed}" + (f" ({reason})" if reason else ""))
    ordered = sorted(finished, key=lambda method: (method != "finetune", method == JOINT))
    return ScenarioResults(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        plan=plan,
        chains=tuple(chains),
        summaries=tuple(summarize(plan, finished[method]) for method in ordered),
        unfinished=tuple(unfinished),
        replaced=_replaced(plan, [chain.method for chain in chains]),
    )


def _replaced(plan: ScenarioPlan, methods: Sequence[str]) -> dict[str, tuple[str, ...]]:
    presets = [method for method in dict.fromkeys(methods) if _is_known(method)]
    noted = {method: replacements(plan, method) for method in presets}
    return {method: notes for method, notes in noted.items() if notes}


def _is_known(method: str) -> bool:
    """Whether a chain's name says its method: a step that was named by hand need not."""
    try:
        return parse_method(method).preset in METHODS
    except ConfigError:
        return False


def _read_chains(folder: Path, plan: ScenarioPlan) -> list[Chain]:
    chains = []
    seeds = sorted(
        int(path.name.removeprefix("seed-")) for path in folder.glob("seed-*") if path.name[len("seed-") :].isdecimal()
    )
    for seed in seeds:
        workspace = open_workspace(seed_folder(folder, seed))
        names = workspace.step_names()
        tried = [*names, *sorted(path.stem for path in (workspace.root / FAILED).glob("*.txt"))]
        methods = dict.fromkeys(name.partition("-")[2] for name in tried if name != BASE_STEP)
        for method in methods:
            steps = [BASE_STEP, *(f"{index:02}-{method}" for index in range(1, len(plan.classes)))]
            there = [name for name in steps if name in names]
            chains.append(Chain(method, seed, tuple(_score(workspace, name, plan) for name in there)))
        if (joint_folder(folder, seed) / "steps" / BASE_STEP).is_dir():
            joint = open_workspace(joint_folder(folder, seed))
            chains.append(Chain(JOINT, seed, (_score(joint, BASE_STEP, plan),)))
    return chains


def _read_failures(folder: Path) -> dict[tuple[str, int], str]:
    """(method, seed) -> which step of the chain failed, and at which term and iteration."""
    reasons = {}
    for path in sorted(folder.glob(f"seed-*/{FAILED}/*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        where = next((line.partition(":")[2].strip() for line in lines if line.strip().startswith("where:")), "")
        step, _, method = path.stem.partition("-")
        seed = int(path.parents[1].name.removeprefix("seed-"))
        told = f"diverged at step {int(step)}: {where}" if where else f"step {int(step)}: {lines[0]}"
        reasons[method, seed] = told
    return reasons


def _score(workspace: Workspace, name: str, plan: ScenarioPlan) -> StepScore:
    record: StepRecord = workspace.read_step(name)
    if plan.data.eval_split not in record.metrics:
        raise WorkspaceError(
            f"step {name} was trained and could not be scored",
            where=workspace.step_folder(name),
            found=f"scores on: {', '.join(record.metrics) or 'nothing'}",
            expected=f"scores on {plan.data.eval_split}",
            hint="mend the data, delete its folder and those of the steps that go on from it, and run it again",
        )
    return StepScore(
        index=record.index,
        new_classes=record.new_classes,
        images=len(record.data.image_ids),
        iterations=record.training.iterations,
        training_seconds=record.training_seconds,
        weights_bytes=record.weights_bytes,
        metrics=record.metrics[plan.data.eval_split],
    )


def summarize(plan: ScenarioPlan, chains: Sequence[Chain]) -> Summary:
    """One method over its seeds; every chain is finished."""
    old, new = plan.classes[0], tuple(name for step in plan.classes[1:] for name in step)
    last = [chain.steps[-1].metrics for chain in chains]
    increments = [chain.steps[1:] or chain.steps for chain in chains]
    return Summary(
        method=chains[0].method,
        seeds=tuple(chain.seed for chain in chains),
        miou_old=spread([_mean_iou(metrics, old) for metrics in last]),
        miou_new=spread([_mean_iou(metrics, new) for metrics in last]),
        miou_all=spread([metrics.miou_all for metrics in last]),
        mpa=spread([metrics.mpa for metrics in last]),
        mca=spread([metrics.mca for metrics in last]),
        miou_steps=spread([_mean([step.metrics.miou_all for step in chain.steps]) for chain in chains])
        if len(chains[0].steps) > 1
        else None,
        iou={name: spread([metrics.iou.get(name) for metrics in last]) for name in (*old, *new)},
        forgetting={name: spread([forgotten(chain, name) for chain in chains]) for name in (*old, *new)},
        training_seconds=Spread(*_mean_and_std([sum(step.training_seconds for step in steps) for steps in increments])),
    )


def forgotten(chain: Chain, name: str) -> float | None:
    """IoU of a class right after the step that taught it, minus that after the last step; None for joint training."""
    taught = next((step for step in chain.steps if name in step.new_classes), None)
    if taught is None or len(chain.steps) == 1:
        return None
    before, after = taught.metrics.iou.get(name), chain.steps[-1].metrics.iou.get(name)
    return None if before is None or after is None else before - after


def _mean_iou(metrics: Metrics, names: Sequence[str]) -> float | None:
    return _mean([metrics.iou.get(name) for name in names])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and standard deviation of the values that are there; None where there is none."""
    known = [value for value in values if value is not None]
    return Spread(*_mean_and_std(known)) if known else None


def _mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


# Tables: a header and rows of texts, for the terminal and for Markdown alike.

Rows = tuple[tuple[str, ...], ...]
SUMMARY_HEADER = ("method", "old", "new", "all", "mPA", "mCA", "mean over steps", "training, s")


def summary_rows(results: ScenarioResults) -> Rows:
    """One row a method, in per cent, mean ± standard deviation over the seeds."""
    return tuple(
        (
            item.method,
            *(
                percent_spread(value)
                for value in (item.miou_old, item.miou_new, item.miou_all, item.mpa, item.mca, item.miou_steps)
            ),
            f"{item.training_seconds.mean:.0f}",
        )
        for item in results.summaries
    )


def class_rows(
    results: ScenarioResults, values: Literal["iou", "forgetting"], *, with_std: bool = True
) -> tuple[tuple[str, ...], Rows]:
    """Header and rows: one row a class, one column a method, mean ± standard deviation over the seeds in per cent.

    `with_std=False` gives the means alone: many methods beside each other are too wide for a terminal.
    """
    items = [item for item in results.summaries if values == "iou" or item.method != JOINT]
    step_of = {name: index for index, names in enumerate(results.plan.classes) for name in names}
    table: Mapping[str, list[Spread | None]] = {
        name: [(item.iou if values == "iou" else item.forgetting)[name] for item in items] for name in step_of
    }
    rows = tuple(
        (
            name,
            str(step_of[name]),
            *(percent_spread(cell if with_std or cell is None else Spread(cell.mean, None)) for cell in cells),
        )
        for name, cells in table.items()
    )
    return ("class", "step", *(item.method for item in items)), rows


StepTable = Literal["miou_all", "miou_old", "miou_new", "mpa", "mca"]
STEP_TABLES: dict[str, StepTable] = {
    "mIoU over the classes known after each step": "miou_all",
    "mIoU after each step over the classes known before it": "miou_old",
    "mIoU after each step over the classes that it adds": "miou_new",
    "mPA after each step": "mpa",
    "mCA after each step": "mca",
}
"""Titles, and the score in them."""


def step_rows(results: ScenarioResults, score: StepTable) -> tuple[tuple[str, ...], Rows]:
    """Header and rows: one score after each step, mean ± standard deviation over the seeds, in per cent."""
    count = len(results.plan.classes)
    rows = []
    for item in results.summaries:
        chains = [chain for chain in results.chains if chain.method == item.method and len(chain.steps) == count]
        if chains:
            by_step = ([getattr(chain.steps[index].metrics, score) for chain in chains] for index in range(count))
            rows.append((item.method, *(percent_spread(spread(values)) for values in by_step)))
    return ("method", *(f"step {index}" for index in range(count))), tuple(rows)


def percent_spread(value: Spread | None) -> str:
    """`59.7 ± 0.4`, in per cent."""
    if value is None:
        return "-"
    return f"{100 * value.mean:.1f}" + (f" ± {100 * value.std:.1f}" if value.std is not None else "")


def describe(results: ScenarioResults) -> str:
    """What the tables are about, in one paragraph."""
    plan = results.plan
    background = "the background counts as an old class" if plan.background else "there is no background class"
    increments = " / ".join(", ".join(names) for names in plan.classes[1:])
    seeds = sorted({chain.seed for chain in results.chains})
    return (
        f"{plan.data.kind} {plan.scenario}, setup {plan.data.setup}, class order {plan.class_order} "
        f"({increments}), {plan.model.backbone} with {plan.model.head}, "
        f"{plan.model.input_width_px}x{plan.model.input_height_px}, learned from {plan.data.train_split}, scored on "
        f"{plan.data.eval_split}, seeds {', '.join(map(str, seeds))}. mIoU in per cent; {background}."
    )


def remarks(results: ScenarioResults) -> list[str]:
    """What a reader of the means must know: rows of fewer seeds than others, and what is in none."""
    seeds = {seed for item in results.summaries for seed in item.seeds}
    fewer = [
        f"{item.method} ({', '.join(map(str, item.seeds))})" for item in results.summaries if set(item.seeds) != seeds
    ]
    found = [f"Of fewer seeds than others: {'; '.join(fewer)}."] if fewer else []
    found += [f"On this data {method} is run with {'; '.join(notes)}." for method, notes in results.replaced.items()]
    if results.unfinished:
        found.append(f"Not finished, and left out: {'; '.join(results.unfinished)}.")
    return found


def markdown(results: ScenarioResults) -> str:
    """All tables as Markdown."""
    parts = [describe(results), "", *_markdown_table(SUMMARY_HEADER, summary_rows(results))]
    for sentence in remarks(results):
        parts += ["", sentence]
    for title, (header, rows) in (
        *((title, step_rows(results, score)) for title, score in STEP_TABLES.items()),
        ("IoU of each class after the last step", class_rows(results, "iou")),
        ("Forgetting of each class, points", class_rows(results, "forgetting")),
    ):
        parts += ["", f"{title}:", "", *_markdown_table(header, rows)]
    return "\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """One table as Markdown."""
    return "\n".join(_markdown_table(header, rows)) + "\n"


def _markdown_table(header: Sequence[str], rows: Rows) -> list[str]:
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
