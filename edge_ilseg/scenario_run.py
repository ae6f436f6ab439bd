"""Every method of a scenario over several seeds: each chain of steps from one shared step 0, and the two bounds.

1. A run is a folder: `scenario.json` says what is compared, and each seed has two workspaces, `seed-<n>` with step 0
   and the chains of all methods, and `seed-<n>-joint` with one step on all classes, the upper bound.
2. What is finished is not run again: a step is written whole or not at all (`edge_ilseg.checkpoint`), so a run that was
   killed goes on with the step that it was at. More methods and seeds may be asked for later.
3. The settings of a folder are fixed by its first run; a step that was trained with others is an error.
4. A chain whose loss is not finite ends there, and the others go on: `seed-<n>/failed/<step>.txt` says why. It is not
   tried again while that file is there.
5. Joint training gets the iterations of step 0 and of all increments together.
6. A step is a function of its parent, its settings and the data: trained one after another or several at a time
   (`edge_ilseg.scenario_jobs`), with one thread each, the weights are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from edge_ilseg.checkpoint import check_weights
from edge_ilseg.classes import resolve_classes
from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig, step_method
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.data.decoded import DecodedDataset
from edge_ilseg.data.step_view import class_pixels, count_pixels
from edge_ilseg.errors import ConfigError, NotFiniteError, WorkspaceError
from edge_ilseg.files import write_bytes
from edge_ilseg.methods import SWITCHES
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.planning import fit_step_method, plan_base, plan_step
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.records import parse_versioned
from edge_ilseg.scenario import CLASS_ORDERS, order_classes, parse_scenario
from edge_ilseg.workspace import BASE_STEP, Workspace, create_workspace, open_workspace

FORMAT: Final = "edge-ilseg-scenario"
FORMAT_VERSION = 1
PLAN_NAME = "scenario.json"
FAILED = "failed"
JOINT = "joint"
"""What joint training is called among the methods; it is no method of a step."""


class ScenarioPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the runs of one folder have in common (rule 3)."""

    format: Literal["edge-ilseg-scenario"]
    format_version: int
    scenario: str
    """As `16+5`."""
    class_order: str
    """A word of `scenario.CLASS_ORDERS`, or `given`."""
    classes: tuple[tuple[str, ...], ...]
    """The classes of each step; a background is in the first."""
    data: DataConfig
    model: ModelSpec
    weights: str
    train: TrainConfig
    step: StepConfig
    """Without what changes a method: each chain has its own, as the preset is (`plan_scenario`)."""
    iterations_per_class: Annotated[int, Meta(ge=1)] | None = None
    """Of each increment, times the classes that it adds, as in the paper; None: `step.iterations`."""
    background: str | None = None
    """Name of the background class, where the data set has one."""

    def step_settings(self, index: int, method: str, seed: int) -> StepConfig:
        """How increment `index` is trained."""
        iterations = self.step.iterations
        if self.iterations_per_class is not None:
            iterations = self.iterations_per_class * len(self.classes[index])
        return msgspec.structs.replace(self.step, method=method, iterations=iterations, seed=seed)

    def base_settings(self, seed: int) -> TrainConfig:
        """How step 0 is trained."""
        return msgspec.structs.replace(self.train, seed=seed)

    def joint_settings(self, seed: int) -> TrainConfig:
        """How the upper bound is trained (rule 5)."""
        steps = range(1, len(self.classes))
        more = sum(self.step_settings(index, self.step.method, seed).iterations for index in steps)
        return msgspec.structs.replace(self.train, iterations=self.train.iterations + more, seed=seed)


def plan_scenario(
    config: Config,
    scenario: str,
    *,
    class_order: str | Sequence[str],
    order_seed: int = 0,
    iterations_per_class: int | None = None,
    progress: ProgressCallback = no_progress,
) -> ScenarioPlan:
    """Decide which classes each step has.

    Args:
        config: data, network and settings; its base classes are left out of account.
        scenario: as `16+5` or `15+1x5`.
        class_order: a word of `scenario.CLASS_ORDERS`, or the class names in their order.
        order_seed: of the order `random`.
        iterations_per_class: see `ScenarioPlan`.
        progress: told what is done.

    Raises:
        ConfigError: the scenario cannot be read, does not fit the data set or has no increment, or the order is
            unknown.
        ClassNameError: a name is unknown or given twice.
        DataError: the data set cannot be read.
    """
    dataset = open_data(config.data)
    info = dataset.info
    if isinstance(class_order, str):
        pixels = {}
        if class_order == "frequency":
            pixels = class_pixels(info, count_pixels(dataset, dataset.ids(config.data.train_split), progress))
        ordered = order_classes(class_order, pixels, info.classes, info.background, order_seed)  # type: ignore[arg-type]
    else:
        ordered = resolve_classes(class_order, info.classes, info.aliases)
    classes = parse_scenario(scenario, ordered, info.background)
    if len(classes) == 1:
        raise ConfigError(
            "a scenario has a step that adds classes",
            found=f"{scenario!r}: all classes in step 0",
            expected="two steps or more, such as '16+5'",
            hint="split the classes with +, or train them together: edge-ilseg train",
        )
    return ScenarioPlan(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        scenario=scenario,
        class_order=class_order if isinstance(class_order, str) and class_order in CLASS_ORDERS else "given",
        classes=classes,
        data=config.data,
        model=config.model,
        weights=config.weights,
        train=config.train,
        step=without_changes(config.step),
        iterations_per_class=iterations_per_class,
        background=info.background,
    )


def without_changes(step: StepConfig) -> StepConfig:
    """The settings without those that change a method: losses, what is frozen, switches."""
    preset: dict[str, Any] = {"freeze": None, "losses": {}, **dict.fromkeys(SWITCHES)}
    return msgspec.structs.replace(step, **preset)


def fix_plan(folder: Path, plan: ScenarioPlan) -> None:
    """Write the plan of a new folder, or find that the folder's is the same (rule 3).

    Raises:
        WorkspaceError: the folder has another plan.
    """
    path = folder / PLAN_NAME
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n")
        return
    found = read_plan(folder)
    changed = [name for name in plan.__struct_fields__ if getattr(found, name) != getattr(plan, name)]
    if changed:
        raise WorkspaceError(
            "the folder holds a run of another scenario, or with other settings",
            where=path,
            found=f"other {', '.join(changed)}",
            hint="take another folder (--out), or the settings of the first run",
        )


def read_plan(folder: Path) -> ScenarioPlan:
    """Read the plan of a folder.

    Raises:
        WorkspaceError: there is none, or it cannot be used.
    """
    path = folder / PLAN_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise WorkspaceError(
            "this folder holds no run of a scenario", where=folder, expected=PLAN_NAME, hint="edge-ilseg scenario run"
        ) from error
    return parse_versioned(
        data,
        ScenarioPlan,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=WorkspaceError,
        what="the plan of the scenario",
        where=path,
        hint="take another folder",
    )


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


def check_works(plan: ScenarioPlan, method: str) -> None:
    """Find out before anything is trained that a method cannot work on this network, batch or data.

    Raises:
        ConfigError: it is unknown, or cannot work, and why.
    """
    settings = plan.step_settings(1, method, 0)
    hides_old = plan.data.setup != "sequential"
    fitted, _ = fit_step_method(settings, plan.model, hides_old=hides_old, background=plan.background)
    leave = {"[train]": plan.train.statistics, "[step]": plan.step.statistics or len(plan.classes) == 2}
    if fitted.is_closed_form and not all(leave.values()):
        raise ConfigError(
            "a head in closed form goes on from statistics, and these settings leave none",
            where=f"method {method!r}",
            found=f"statistics = false in {min(leave, key=lambda name: leave[name])}",
            hint="leave statistics at true, or the method out",
        )


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
        methods: names of `edge_ilseg.methods.METHODS`.
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
        _check_is_the_same(workspace, task)
        return
    if task.chain_failed():
        return
    if task.settings is None:
        plan = plan_base(workspace, dataset=dataset)
    else:
        _, _, method = task.name.partition("-")
        plan = plan_step(workspace, task.new, task.settings, parent_name=task.parent, name=method, dataset=dataset)
    try:
        run_plan(workspace, plan, accelerator=accelerator, workers=workers, progress=progress)
    except NotFiniteError as error:
        if task.settings is None:
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
            whole = msgspec.structs.replace(config, classes=ClassesConfig(every_class), train=settings)
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


def _check_is_the_same(workspace: Workspace, task: Task) -> None:
    """Check a step that is there against what it would be (rule 3); reads no image."""
    record = workspace.read_step(task.name)
    check_weights(workspace.step_folder(task.name), record)
    if record.training.iterations != task.iterations:
        raise WorkspaceError(
            "a step that is there was trained with other settings",
            where=workspace.step_folder(task.name),
            found=f"{record.training.iterations} iterations",
            expected=task.iterations,
            hint="delete its folder to train it again, or take another folder (--out)",
        )
