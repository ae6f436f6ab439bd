"""What a scenario compares: its classes step by step, its data, and the settings that all methods share.

1. Settings that change a method are left out: each chain has its own, as its preset is.
2. A method may be named with another cut point than its preset's, and with weights and switches set by hand:
   `kd-output@stages:2:kd_output=2` (`edge_ilseg.method_text`).
3. The background, where there is one, belongs to step 0, whatever the class order.
4. Whatever can be found out before anything is trained is found out here.
5. A folder keeps the plan of its first run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from edge_ilseg.classes import resolve_classes
from edge_ilseg.config import Config, DataConfig, StepConfig, TrainConfig, step_method
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import DatasetInfo
from edge_ilseg.data.step_view import class_pixels, count_pixels
from edge_ilseg.errors import ConfigError, WorkspaceError
from edge_ilseg.files import disk_error, write_bytes
from edge_ilseg.method_text import parse_method
from edge_ilseg.methods import SWITCHES, check_switches_act
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.planning import fit_step_method
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.records import parse_versioned
from edge_ilseg.scenario import CLASS_ORDERS, order_classes, parse_scenario

FORMAT: Final = "edge-ilseg-scenario"
FORMAT_VERSION = 1
PLAN_NAME = "scenario.json"


class ScenarioPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the runs of one folder have in common; it never changes (rule 5)."""

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

    @property
    def hides_old(self) -> bool:
        """Whether the setup hides the old classes in the new images."""
        return self.data.setup != "sequential"

    def step_settings(self, index: int, method: str, seed: int) -> StepConfig:
        """How increment `index` is trained with a method, as it is or with settings of its own (rule 2)."""
        iterations = self.step.iterations
        if self.iterations_per_class is not None:
            iterations = self.iterations_per_class * len(self.classes[index])
        return parse_method(method).settings(msgspec.structs.replace(self.step, iterations=iterations, seed=seed))

    def base_settings(self, seed: int) -> TrainConfig:
        """How step 0 is trained."""
        return msgspec.structs.replace(self.train, seed=seed)

    def joint_settings(self, seed: int) -> TrainConfig:
        """How the upper bound is trained: with the iterations of step 0 and of all increments together."""
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
        ConfigError: the scenario cannot be read, does not fit the data set or has no increment, the order is unknown,
            or a preallocated head has no room.
        ClassNameError: a name is unknown or given twice.
        DataError: the data set cannot be read.
    """
    if not config.data.eval_split:
        raise ConfigError(
            "a scenario scores every step, and there is no split to score on",
            where="--eval-split",
            found="an empty name",
            hint="name a split of the data set, such as val or test",
        )
    dataset = open_data(config.data)
    info = dataset.info
    if isinstance(class_order, str):
        pixels = {}
        if class_order == "frequency":
            pixels = class_pixels(info, count_pixels(dataset, dataset.ids(config.data.train_split), progress))
        ordered = order_classes(class_order, pixels, info.classes, info.background, order_seed)  # type: ignore[arg-type]
    else:
        ordered = _given_order(class_order, info)
    classes = parse_scenario(scenario, ordered, info.background)
    if len(classes) == 1:
        raise ConfigError(
            "a scenario has a step that adds classes",
            found=f"{scenario!r}: all classes in step 0",
            expected="two steps or more, such as '16+5'",
            hint="split the classes with +, or train them together: edge-ilseg train",
        )
    _check_room(config.model.preallocated_classes, sum(map(len, classes[1:])))
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


def _given_order(names: Sequence[str], info: DatasetInfo) -> tuple[str, ...]:
    """Every class of the data set in the order of `names`; the background first, named or not (rule 3)."""
    named = resolve_classes(names, info.classes, info.aliases)
    foreground = tuple(name for name in named if name != info.background)
    missing = [name for name in info.classes if name != info.background and name not in foreground]
    if missing:
        raise ConfigError(
            "a class order names every class of the data set",
            where="--class-order",
            found=f"{len(foreground)} of {len(foreground) + len(missing)} classes, without {', '.join(missing)}",
            expected=", ".join(name for name in info.classes if name != info.background),
            hint="add the classes that are missing, or take one of the orders " + ", ".join(CLASS_ORDERS),
        )
    return foreground if info.background is None else (info.background, *foreground)


def without_changes(step: StepConfig) -> StepConfig:
    """The settings without those that change a method: losses, what is frozen, switches."""
    preset: dict[str, Any] = {"freeze": None, "losses": {}, **dict.fromkeys(SWITCHES)}
    return msgspec.structs.replace(step, **preset)


def fix_plan(folder: Path, plan: ScenarioPlan) -> None:
    """Write the plan of a new folder, or find that the folder's is the same (rule 5).

    Raises:
        WorkspaceError: the folder has another plan, or cannot be made or read.
    """
    path = folder / PLAN_NAME
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
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
    except OSError as error:
        raise disk_error(error, path) from error
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


def check_works(plan: ScenarioPlan, method: str) -> None:
    """Find out before anything is trained that a method cannot work on this network, batch or data.

    Raises:
        ConfigError: it is unknown, or cannot work, and why.
    """
    settings = plan.step_settings(1, method, 0)
    fitted, _ = fit_step_method(settings, plan.model, hides_old=plan.hides_old, background=plan.background)
    check_switches_act(step_method(settings), parse_method(method).switches)
    leave = {"[train]": plan.train.statistics, "[step]": plan.step.statistics or len(plan.classes) == 2}
    if fitted.is_closed_form and not all(leave.values()):
        raise ConfigError(
            "a head in closed form goes on from statistics, and these settings leave none",
            where=f"method {method!r}",
            found=f"statistics = false in {min(leave, key=lambda name: leave[name])}",
            hint="leave statistics at true, or the method out",
        )
    if fitted.is_closed_form:
        _check_sums_fit(plan, method)


def _check_room(reserved: int, added: int) -> None:
    """Refuse a preallocated head (0: none) that has no channel for the last classes."""
    if 0 < reserved < added:
        raise ConfigError(
            "the preallocated head has no room for the classes of all increments",
            where="preallocated_classes",
            found=f"{reserved} channels, {added} classes",
            hint=f"set preallocated_classes = {added}, or 0: the head then grows",
        )


def _check_sums_fit(plan: ScenarioPlan, method: str) -> None:
    """Refuse a head in closed form where step 0 leaves no sums because they are too large."""
    from edge_ilseg.analytic_step import MOST_BYTES, sums_bytes

    size_bytes = sums_bytes(plan.model, len(plan.classes[0]))
    if size_bytes > MOST_BYTES:
        raise ConfigError(
            "the sums that a head in closed form goes on from are larger than a step leaves unasked",
            where=f"method {method!r}",
            found=f"{size_bytes / 2**20:.0f} MiB for {len(plan.classes[0])} classes with {plan.model.backbone}",
            expected=f"at most {MOST_BYTES / 2**20:.0f} MiB",
            hint="a smaller backbone, or leave the method out",
        )


def replacements(plan: ScenarioPlan, method: str) -> tuple[str, ...]:
    """What of a method is replaced on this data, one sentence each (`methods.fit_method`); nothing of joint training.

    Raises:
        ConfigError: as of `check_works`.
    """
    settings = plan.step_settings(1, method, 0)
    return fit_step_method(settings, plan.model, hides_old=plan.hides_old, background=plan.background)[1]
