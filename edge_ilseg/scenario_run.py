"""Every method of a scenario over several seeds: each chain of steps from one shared step 0, and the two bounds.

1. A run is a folder: `scenario.json` says what is compared, and each seed has two workspaces, `seed-<n>` with step 0
   and the chains of all methods, and `seed-<n>-joint` with one step on all classes, the upper bound.
2. What is finished is not run again: a step is written whole or not at all (`edge_ilseg.checkpoint`), so a run that was
   killed goes on with the step that it was at. More methods and seeds may be asked for later.
3. The settings of a folder are fixed by its first run; a step that was trained with others is an error.
4. A chain whose loss is not finite, or whose closed form has no solution, ends there, and the others go on:
   `seed-<n>/failed/<step>.txt` says why. It is not tried again while that file is there.
5. Joint training gets the iterations of step 0 and of all increments together.
6. A step is a function of its parent, its settings and the data: trained one after another or several at a time
   (`edge_ilseg.scenario_jobs`), with one thread each, the weights are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_ilseg.checkpoint import StepRecord, check_weights
from edge_ilseg.config import ClassesConfig, Config, StepConfig, step_method
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.data.decoded import DecodedDataset
from edge_ilseg.errors import ConfigError, NotFiniteError, TrainingError, WorkspaceError
from edge_ilseg.files import write_bytes
from edge_ilseg.methods import Method
from edge_ilseg.planning import fit_step_method, plan_base, plan_step, training_settings
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.scenario_plan import ScenarioPlan, check_works, fix_plan
from edge_ilseg.workspace import BASE_STEP, Workspace, create_workspace, open_workspace

FAILED = "failed"
JOINT = "joint"
"""What joint training is called among the methods; it is no method of a step."""


class Task(msgspec.Struct, frozen=True):
    """One step to train, and where. Plain values, so that another process can take it over."""

    workspace: Path
    config: Config
    name: str
    iterations: int
    parent: str | None = None
    """The step that it goes on from; None for a step 0."""
    new: tuple[str, ...] = ()
    """The classes that it adds to its parent's."""
    settings: StepConfig | None = None
    """How an increment is trained; a step 0 is trained as its workspace says."""

    @property
    def failure(self) -> Path:
        """The file that says why this step has failed (rule 4)."""
        return self.workspace / FAILED / f"{self.name}.txt"

    def chain_failed(self) -> bool:
        """Whether this step, or one before it in its chain, has failed."""
        _, _, method = self.name.partition("-")
        return any(path.stem.partition("-")[2] == method for path in self.failure.parent.glob("*.txt"))

    def needs(self, other: Task) -> bool:
        """Whether this step goes on from the other."""
        return (self.workspace, self.parent) == (other.workspace, other.name)


def run_scenario(
    folder: Path,
    plan: ScenarioPlan,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    joint: bool = True,
    accelerator: str = "auto",
    workers: int = 0,
    jobs: int = 1,
    progress: ProgressCallback = no_progress,
) -> None:
    """Train whatever of the scenario is not there yet (rule 2).

    Args:
        folder: of the run.
        plan: from `plan_scenario`.
        methods: names of `edge_ilseg.methods.METHODS`, as they are or set by hand (`edge_ilseg.method_text`).
        seeds: of initial weights, order and augmentation; each has a step 0 of its own.
        joint: train the upper bound, too.
        accelerator, workers: as of `pipeline.run_plan`.
        jobs: steps that are trained at the same time, each in a process of its own.
        progress: told the share of all iterations that is done.

    Raises:
        EdgeIlsegError: a method cannot work here, a class has no image, step 0 diverges, the disk is full, or a step
            that is there was trained with other settings. What is finished stays.
    """
    for name in methods:
        check_works(plan, name)
    _check_differ(plan, methods)
    fix_plan(folder, plan)
    tasks = list(_tasks(folder, plan, methods, seeds, joint))
    if jobs > 1:
        from edge_ilseg.scenario_jobs import run_in_processes

        run_in_processes(tasks, accelerator=accelerator, workers=workers, jobs=jobs, progress=progress)
        return
    dataset = DecodedDataset(open_data(plan.data))
    total = sum(task.iterations for task in tasks)
    done = 0
    for number, task in enumerate(tasks, start=1):
        where = f"scenario, {number} of {len(tasks)}: {task.workspace.name} {task.name}"
        report = _within(progress, where, done / total, task.iterations / total)
        run_task(task, dataset, accelerator=accelerator, workers=workers, progress=report)
        done += task.iterations
        progress(where, done / total)


def run_task(task: Task, dataset: Dataset, *, accelerator: str, workers: int, progress: ProgressCallback) -> None:
    """Train one step unless it is there (rule 2) or its chain has ended (rule 4); its parent is there.

    Args:
        task: which, and where.
        dataset: the scenario's, open.
        accelerator, workers: as of `pipeline.run_plan`.
        progress: told of this step alone.

    Raises:
        EdgeIlsegError: as of `run_scenario`.
    """
    from edge_ilseg.pipeline import run_plan

    workspace = _workspace(task)
    if task.name in workspace.step_names():
        _check_is_the_same(workspace, task, dataset.info.background)
        return
    if task.chain_failed():
        return
    if task.settings is None:
        plan = plan_base(workspace, dataset=dataset)
    else:
        _, _, method = task.name.partition("-")
        plan = plan_step(workspace, task.new, task.settings, parent_name=task.parent, name=method, dataset=dataset)
    try:
        run_plan(workspace, plan, accelerator=accelerator, workers=workers, parent_is_scored=True, progress=progress)
    except TrainingError as error:
        if task.settings is None or not (isinstance(error, NotFiniteError) or plan.is_closed_form):
            raise
        task.failure.parent.mkdir(exist_ok=True)
        write_bytes(task.failure, f"{error}\n".encode())


def _within(progress: ProgressCallback, where: str, start: float, share: float) -> ProgressCallback:
    """The progress of one task as a part of the whole; only training moves it."""
    reached = 0.0

    def report(text: str, part: float) -> None:
        nonlocal reached
        if text.startswith("training"):
            reached = part
        progress(f"{where}, {text}", start + share * reached)

    return report


def _check_differ(plan: ScenarioPlan, methods: Sequence[str]) -> None:
    """Refuse two names of one method: it would be trained twice."""
    named: dict[str, Method] = {}
    for name in dict.fromkeys(methods):
        method = step_method(plan.step_settings(1, name, 0))
        same = next((other for other, known in named.items() if known == method), None)
        if same is not None:
            raise ConfigError(
                "two methods are the same", where="--methods", found=f"{same} and {name}", hint="leave one of them out"
            )
        named[name] = method


def _tasks(
    folder: Path, plan: ScenarioPlan, methods: Sequence[str], seeds: Sequence[int], joint: bool
) -> Iterator[Task]:
    """Every step, each behind the one that it goes on from."""
    for seed in seeds:
        config = Config(plan.data, ClassesConfig(plan.classes[0]), plan.model, plan.weights)
        settings = plan.base_settings(seed)
        config = msgspec.structs.replace(config, train=settings, step=plan.step_settings(1, plan.step.method, seed))
        workspace = seed_folder(folder, seed)
        yield Task(workspace, config, BASE_STEP, settings.iterations)
        for method in methods:
            parent = BASE_STEP
            for index in range(1, len(plan.classes)):
                step = plan.step_settings(index, method, seed)
                name = f"{index:02}-{method}"
                iterations = 0 if step_method(step).is_closed_form else step.iterations
                yield Task(workspace, config, name, iterations, parent, plan.classes[index], step)
                parent = name
        if joint:
            every_class = tuple(name for step_classes in plan.classes for name in step_classes)
            settings = plan.joint_settings(seed)
            model = msgspec.structs.replace(plan.model, preallocated_classes=0)  # no class is left for later
            classes = ClassesConfig(every_class)
            whole = msgspec.structs.replace(config, classes=classes, model=model, train=settings)
            yield Task(joint_folder(folder, seed), whole, BASE_STEP, settings.iterations)


def seed_folder(folder: Path, seed: int) -> Path:
    """Workspace of the chains of one seed."""
    return folder / f"seed-{seed}"


def joint_folder(folder: Path, seed: int) -> Path:
    """Workspace of joint training with one seed."""
    return folder / f"seed-{seed}-{JOINT}"


def _workspace(task: Task) -> Workspace:
    if (task.workspace / "edge-ilseg.toml").is_file():
        return Workspace(task.workspace, open_workspace(task.workspace).config)
    return create_workspace(task.workspace, task.config)


def _check_is_the_same(workspace: Workspace, task: Task, background: str | None) -> None:
    """Check a step that is there against what it would be (rule 3); reads no image."""
    record = workspace.read_step(task.name)
    check_weights(workspace.step_folder(task.name), record)
    again = "delete its folder to train it again, or take another folder (--out)"
    where = workspace.step_folder(task.name)
    if task.config.data.eval_split not in record.metrics:
        raise WorkspaceError(
            "a step that is there was trained and could not be scored",
            where=where,
            found=f"scores on: {', '.join(record.metrics) or 'nothing'}",
            expected=f"scores on {task.config.data.eval_split}",
            hint="mend the data, delete its folder and those of the steps that go on from it, and run the same command",
        )
    found, expected = _trained_as(record), _to_be_trained_as(task, background)
    if differing := [name for name in expected if found[name] != expected[name]]:
        raise WorkspaceError(
            "a step that is there was trained with other settings",
            where=where,
            found=", ".join(f"{name} {found[name]}" for name in differing),
            expected=", ".join(f"{name} {expected[name]}" for name in differing),
            hint=again,
        )
    if task.parent is not None and record.parent_id != workspace.read_step(task.parent).id:
        raise WorkspaceError(
            f"a step that is there goes on from another {task.parent} than the one that is there now",
            where=where,
            found=f"parent {str(record.parent_id)[:12]}",
            expected=workspace.read_step(task.parent).id[:12],
            hint=again,
        )


def _trained_as(record: StepRecord) -> dict[str, Any]:
    method = {} if record.method is None else msgspec.to_builtins(record.method)
    return {**msgspec.to_builtins(record.training), **method}


def _to_be_trained_as(task: Task, background: str | None) -> dict[str, Any]:
    """The settings of a step as its record will have them."""
    if task.settings is None:
        return dict(msgspec.to_builtins(task.config.train))
    method, _ = fit_step_method(
        task.settings,
        task.config.model,
        hides_old=task.config.data.setup != "sequential",
        background=background,
    )
    return {**msgspec.to_builtins(training_settings(task.settings, method)), **msgspec.to_builtins(method)}
