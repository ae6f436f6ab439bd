"""Decide what a step will do, before anything is trained: classes, images, labels, method. Needs no torch.

1. Whatever can be wrong with the request (a name, a class without an image, a method that cannot work) is found here.
2. The channels of the parent keep their order; new classes follow in the order in which they were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from edge_ilseg.checkpoint import ClassRecord, StepRecord
from edge_ilseg.classes import check_spelling, resolve_classes
from edge_ilseg.config import DataConfig, StepConfig, TrainConfig, step_method
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import Dataset, DatasetInfo
from edge_ilseg.data.step_view import StepView, channel_pixels, count_pixels, presence
from edge_ilseg.errors import ClassNameError, ConfigError, DataError, WorkspaceError
from edge_ilseg.feature_statistics import COLLECT_HINT, STATISTICS_NAME, read_header
from edge_ilseg.feature_views import check_views
from edge_ilseg.methods import SWITCHES, Method, check_terms_can_move, fit_method
from edge_ilseg.models.freezing import is_encoder_frozen
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.scenario import (
    check_every_class_has_an_image,
    evaluation_lookup,
    label_lookup,
    later_classes,
    select_images,
)
from edge_ilseg.workspace import BASE_STEP, Workspace


@dataclass(frozen=True)
class StepPlan:
    """All that is decided of a step before it is trained."""

    name: str
    parent: StepRecord | None
    classes: tuple[ClassRecord, ...]
    background: str | None
    view: StepView
    data: DataConfig
    from_workspace: bool
    """Whether the images are those of the workspace's own data set."""
    settings: TrainConfig
    method: Method | None
    notes: tuple[str, ...] = ()
    """What of the method was replaced because the data at hand has no place for it."""

    @property
    def index(self) -> int:
        """0 for the base step, one more than the parent's otherwise."""
        return 0 if self.parent is None else self.parent.index + 1

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in channel order."""
        return tuple(item.name for item in self.classes)

    @property
    def background_channel(self) -> int | None:
        """Channel of the background class, where the data set has one."""
        return self.class_names.index(self.background) if self.background else None

    @property
    def is_closed_form(self) -> bool:
        """Whether the head is solved for and nothing is trained."""
        return self.method is not None and self.method.is_closed_form

    @property
    def old_count(self) -> int:
        """How many of the first channels are the parent's."""
        return 0 if self.parent is None else len(self.parent.classes)


def is_workspace_data(workspace: Workspace, data: DataConfig) -> bool:
    """Whether `data` reads the workspace's own images, whatever the splits and the setup."""
    own = workspace.config.data
    return (data.kind, data.root, data.options) == (own.kind, own.root, own.options)


def base_classes(names: Sequence[str], info: DatasetInfo) -> tuple[str, ...]:
    """The classes of step 0 in channel order: a data set's background first, then those that were asked for.

    Raises:
        ClassNameError: a name is unknown or given twice.
    """
    resolved = resolve_classes(names, info.classes, info.aliases)
    foreground = tuple(name for name in resolved if name != info.background)
    if not foreground:
        raise ClassNameError(
            "step 0 needs at least one class besides the background",
            found=", ".join(resolved) or "none",
            hint="name one that is not the background: --base-classes",
        )
    return foreground if info.background is None else (info.background, *foreground)


def make_step_view(
    dataset: Dataset,
    data: DataConfig,
    *,
    old: Sequence[str],
    new: Sequence[str],
    progress: ProgressCallback = no_progress,
) -> StepView:
    """The images of a step and what it sees in them, by the setup.

    Raises:
        ClassNameError: a new class is left without a single image.
    """
    info = dataset.info
    image_ids = dataset.ids(data.train_split)
    pixels_NK = count_pixels(dataset, image_ids, progress)
    shown = presence(info, image_ids, pixels_NK)
    later = later_classes(info.classes, old=old, new=new)
    selected = select_images(data.setup, shown, new=new, old=old, later=later, seed=data.partition_seed)
    check_every_class_has_an_image(data.setup, shown, selected, new=new, later=later, background=info.background)
    lookup = label_lookup(data.setup, info.classes, info.background, old=old, new=new)
    chosen = set(selected)
    rows_NK = pixels_NK[[image_id in chosen for image_id in image_ids]]
    return StepView(dataset, selected, lookup, channel_pixels(rows_NK, lookup, len(old) + len(new)))


def plan_base(
    workspace: Workspace,
    settings: TrainConfig | None = None,
    *,
    dataset: Dataset | None = None,
    progress: ProgressCallback = no_progress,
) -> StepPlan:
    """Plan step 0 on the workspace's base classes.

    Args:
        workspace: where the step will be.
        settings: how to train; the workspace's `[train]` otherwise.
        dataset: the workspace's data set, where it is open already.
        progress: told what is done.

    Raises:
        EdgeIlsegError: no data, an unknown class or one without an image, or there is a step 0 already.
    """
    config = workspace.config
    settings = settings or config.train
    check_views(settings, None, config.model.backbone)
    _check_name_is_free(workspace, BASE_STEP)
    dataset = dataset or open_data(config.data)
    classes = base_classes(config.classes.base, dataset.info)
    view = make_step_view(dataset, config.data, old=(), new=classes, progress=progress)
    _check_evaluation(dataset, config.data, classes)
    return StepPlan(
        name=BASE_STEP,
        parent=None,
        classes=_class_records(classes, dataset.info, 0),
        background=dataset.info.background,
        view=view,
        data=config.data,
        from_workspace=True,
        settings=settings,
        method=None,
    )


def plan_step(
    workspace: Workspace,
    add_classes: Sequence[str],
    settings: StepConfig | None = None,
    *,
    parent_name: str | None = None,
    name: str | None = None,
    data: DataConfig | None = None,
    dataset: Dataset | None = None,
    progress: ProgressCallback = no_progress,
) -> StepPlan:
    """Plan an incremental step.

    Args:
        workspace: where the parent is, and the new step will be.
        add_classes: names or aliases of the classes to add, in channel order.
        settings: how to train; the workspace's `[step]` otherwise.
        parent_name: the step to go on from; the latest otherwise.
        name: of the new step, behind its number; the new classes otherwise.
        data: where the new images are, if not in the workspace's data set.
        dataset: the data set of `data`, where it is open already.
        progress: told what is done.

    Raises:
        EdgeIlsegError: no data, a class that is unknown, known already or without an image, a method that cannot
            work, or a step of that name.
    """
    settings = settings or workspace.config.step
    data = data or workspace.config.data
    from_workspace = is_workspace_data(workspace, data)
    if not add_classes:
        raise ClassNameError("a step adds at least one class", hint="name it: --add-classes boat")
    step_method(settings)  # a mistake in it is told before anything is read
    parent = workspace.read_step(parent_name) if parent_name else workspace.latest_step()
    dataset = dataset or open_data(data)
    _check_background(parent, dataset.info)
    check_spelling(dataset.info.classes, parent.class_names)
    method, notes = fit_step_method(
        settings, parent.model, hides_old=data.setup != "sequential", background=dataset.info.background
    )
    if method.is_closed_form:
        _check_statistics(workspace, parent)
    new = resolve_classes(add_classes, dataset.info.classes, dataset.info.aliases)
    _check_new_to(parent, new)
    index = parent.index + 1
    full_name = f"{index:02}-{name or '+'.join(new)}"
    _check_name_is_free(workspace, full_name)
    view = make_step_view(dataset, data, old=parent.class_names, new=new, progress=progress)
    _check_evaluation(dataset, data, (*parent.class_names, *new))
    if from_workspace and data.setup != "overlapped":
        _check_no_image_again(workspace, parent, view)
    return StepPlan(
        name=full_name,
        parent=parent,
        classes=parent.classes + _class_records(new, dataset.info, index),
        background=parent.background,
        view=view,
        data=data,
        from_workspace=from_workspace,
        settings=training_settings(settings, method),
        method=method,
        notes=notes,
    )


def training_settings(settings: StepConfig, method: Method) -> TrainConfig:
    """What a step's record says of its training: no iteration, where the head is solved for."""
    own = TrainConfig(**{key: getattr(settings, key) for key in TrainConfig.__struct_fields__})
    return msgspec.structs.replace(own, iterations=0) if method.is_closed_form else own


def _check_statistics(workspace: Workspace, parent: StepRecord) -> None:
    """Refuse a head in closed form where the sums over earlier images are not there."""
    folder = workspace.step_folder(parent.name)
    header = read_header(folder)
    if header is None:
        raise WorkspaceError(
            f"step {parent.name} has no statistics to go on from: it was trained with a method that moves what makes "
            "the features, with statistics = false, or with an older version",
            where=folder,
            expected=STATISTICS_NAME,
            hint="train the chain from step 0 on with analytic or another method that freezes all but the head; or, "
            + COLLECT_HINT,
        )
    if header.classes != parent.class_names:
        raise WorkspaceError(
            f"the statistics of step {parent.name} are of other classes",
            where=folder / STATISTICS_NAME,
            found=", ".join(header.classes),
            expected=", ".join(parent.class_names),
            hint="delete the file, and collect them again " + COLLECT_HINT,
        )


def _class_records(names: Sequence[str], info: DatasetInfo, step: int) -> tuple[ClassRecord, ...]:
    return tuple(ClassRecord(name, step, info.colors[info.classes.index(name)]) for name in names)


def _check_name_is_free(workspace: Workspace, name: str) -> None:
    if "/" in name or name in (".", "..") or name != name.strip():
        raise WorkspaceError(
            "a step's name must be usable as a folder's name",
            found=repr(name),
            hint="give another --name, without slashes and spaces around it",
        )
    if workspace.step_folder(name).exists():
        raise WorkspaceError(
            "there is a step of that name already",
            where=workspace.step_folder(name),
            hint="give the new one another --name, or delete the folder to train it again",
        )


def _check_background(parent: StepRecord, info: DatasetInfo) -> None:
    if info.background != parent.background:
        raise DataError(
            "the data set's background is not the model's",
            where=f"data set of kind {info.kind}, step {parent.name}",
            found=repr(info.background),
            expected=repr(parent.background),
            hint="new images must be labelled with the background class that step 0 was trained with, or none",
        )


def _check_new_to(parent: StepRecord, new: Sequence[str]) -> None:
    known = [name for name in new if name in parent.class_names]
    if known:
        steps = ", ".join(f"{item.name} since step {item.step}" for item in parent.classes if item.name in known)
        raise ClassNameError(
            "a class to add is known already",
            where=f"step {parent.name}",
            found=steps,
            expected="classes that the model does not know",
            hint="leave it out, or choose an earlier step to go on from (--from)",
        )


def _check_evaluation(dataset: Dataset, data: DataConfig, classes: Sequence[str]) -> None:
    """Find out before hours of training, not after them, that the result cannot be scored."""
    if data.eval_split:
        dataset.ids(data.eval_split)
        evaluation_lookup(dataset.info.classes, dataset.info.background, classes)


def fit_step_method(
    settings: StepConfig, model: ModelSpec, *, hides_old: bool, background: str | None
) -> tuple[Method, tuple[str, ...]]:
    """The method of a step as it can be run, and what was replaced (`methods.fit_method`).

    Args:
        settings: of the step.
        model: the network's.
        hides_old: the setup hides the old classes in the new images.
        background: name of the background class, or None.

    Raises:
        ConfigError: the method is unknown or cannot work on this data, this network or this batch; views that it
            cannot use.
    """
    given = [name for name in SWITCHES if getattr(settings, name) is not None]
    method, notes = fit_method(step_method(settings), hides_old=hides_old, background=background, given=given)
    check_views(settings, method, model.backbone)
    if method.is_closed_form and model.head != "deeplab_v3":
        raise ConfigError(
            "this head has no closed form: its dilated 3x3 branches are no 1x1 classifiers on one set of features",
            where=f"method {method.name!r}",
            found=model.head,
            expected="deeplab_v3",
            hint="take a method with gradients",
        )
    if settings.augment_views and method.is_closed_form:
        raise ConfigError(
            "a head in closed form sees every image once, as it is",
            where="augment_views",
            found=settings.augment_views,
            expected="0",
            hint="set augment_views = 0",
        )
    check_terms_can_move(
        method,
        encoder_frozen=is_encoder_frozen(method.freeze, model.backbone),
        branches_frozen=method.freeze == "all_but_head" and model.head != "deeplab_v2",
    )
    if method.losses.get("kd_similarity") and settings.batch_size < 2:
        raise ConfigError(
            "similarity distillation compares the images of a batch with each other",
            where="batch_size",
            found=settings.batch_size,
            expected="2 or more",
            hint="raise --batch-size, or leave the term out: --loss kd_similarity=0",
        )
    return method, notes


def _check_no_image_again(workspace: Workspace, parent: StepRecord, view: StepView) -> None:
    """Check that no image of an earlier step is learned from again."""
    ancestor: StepRecord | None = parent
    while ancestor is not None:
        again = sorted(set(view.image_ids) & set(ancestor.data.image_ids)) if ancestor.data.from_workspace else []
        if again:
            raise DataError(
                f"{len(again)} images of step {ancestor.name} would be learned from again",
                found=f"image {again[0]!r}",
                expected="images that no earlier step has seen",
                hint="keep the setup and the partition_seed of the earlier steps, or use the setup overlapped",
            )
        ancestor = workspace.parent_of(ancestor)
