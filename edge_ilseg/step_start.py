"""What a planned step is trained from: its networks, what its losses know, and how sure its teacher must be.

Each is a function of the plan, its seed and the files of the workspace; torch is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_ilseg.checkpoint import load_model
from edge_ilseg.planning import StepPlan
from edge_ilseg.progress import ProgressCallback, is_first_process
from edge_ilseg.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

    from edge_ilseg.models.segmentation import SegmentationModel
    from edge_ilseg.terms import StepFacts
    from edge_ilseg.tuning import Tuning


def make_models(workspace: Workspace, plan: StepPlan) -> tuple[SegmentationModel, SegmentationModel | None, str | None]:
    """The network to train, its teacher (None at step 0), and the hash of the file that step 0 began with."""
    import torch

    if plan.parent is None:
        from edge_ilseg.models.segmentation import build_model
        from edge_ilseg.models.weights import load_backbone_weights

        torch.manual_seed(plan.settings.seed)
        model = build_model(workspace.config.model, (len(plan.classes),))
        source = workspace.config.weights
        named = source in ("imagenet", "none")
        return model, None, load_backbone_weights(model, source if named else workspace.root / source)
    parent_folder = workspace.step_folder(plan.parent.name)
    teacher, model = load_model(parent_folder, plan.parent), load_model(parent_folder, plan.parent)
    torch.manual_seed(plan.settings.seed)
    if plan.method is not None and plan.method.is_closed_form:
        from edge_ilseg.models.segmentation import with_skip_classifier

        model = with_skip_classifier(model)
    model.grow(
        len(plan.classes) - plan.old_count,
        init=plan.method.head_init if plan.method else "default",
        background_channel=plan.background_channel,
    )
    return model, teacher, None


def step_facts(plan: StepPlan, model: SegmentationModel) -> StepFacts:
    """What the losses know of the step beside a batch."""
    import torch

    from edge_ilseg.terms import StepFacts

    if plan.method is None or not plan.method.logit_adjustment:
        return StepFacts(plan.old_count, plan.background_channel)
    pixels = torch.tensor([*plan.view.channel_pixels, *([0] * (model.reserved_count or 0))], dtype=torch.float64)
    frequency = (pixels / pixels.sum()).clamp(min=plan.method.smallest_frequency)
    return StepFacts(plan.old_count, plan.background_channel, log_frequency_C=frequency.log().float())


def threshold_finder(plan: StepPlan, progress: ProgressCallback) -> Callable[[SegmentationModel], Tensor] | None:
    """How sure the teacher must be, measured on the step's images once it is on its device; None without need."""
    if plan.method is None or plan.method.pseudo_labels == "none":
        return None
    from edge_ilseg.pseudo_labels import entropy_thresholds

    return lambda teacher: entropy_thresholds(teacher, plan.view, plan.background_channel, progress)


def choose_tuning(
    plan: StepPlan,
    model: SegmentationModel,
    text: str,
    *,
    accelerator: str,
    devices: int,
    say: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """The memory format and the threads that were asked for, or those that are fastest here, which are told."""
    import torch

    from edge_ilseg.tuning import FIXED, parse_tuning, tune_step

    given = parse_tuning(text)
    if given is not None or not is_first_process():  # the others are told by the first one
        return given or FIXED
    on_gpu = accelerator in ("auto", "cuda") and torch.cuda.is_available()
    freeze = plan.method.freeze if plan.method else "none"
    device = "cuda" if on_gpu else "cpu"
    chosen = tune_step(model, plan.view, plan.settings, freeze, device=device, processes=devices)
    say(f"computed in {chosen.describe()}")
    return chosen
