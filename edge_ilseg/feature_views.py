"""Which steps may show views again instead of new ones, so that their features can be cached. No torch here.

1. A step whose encoder is trained has no features to keep, and a term that looks into the encoder's stages needs more
   of it than its features: both are refused, not ignored, because a record must say what was done.
2. In a run of `augment_views` epochs or fewer no view comes back: it is the run without a cache, and is run as one.
"""

from __future__ import annotations

from edge_ilseg.config import TrainConfig
from edge_ilseg.errors import ConfigError
from edge_ilseg.methods import Method
from edge_ilseg.models.freezing import is_encoder_frozen

STAGE_TERMS = ("local_pod",)
"""Terms that compare the outputs of the encoder's stages."""
LOGIT_TERMS = ("kd_output", "kd_unbiased")
"""Terms that need nothing of the teacher but its logits."""


def check_views(settings: TrainConfig, method: Method | None, backbone: str) -> None:
    """Refuse views for a step that cannot use them (rule 1).

    Raises:
        ConfigError: step 0, an encoder that is trained, or a term over the encoder's stages.
    """
    if not settings.augment_views:
        return
    if method is None or not is_encoder_frozen(method.freeze, backbone):
        raise ConfigError(
            "features can be cached only while the encoder that makes them is frozen",
            where="augment_views",
            found=f"{settings.augment_views} with " + ("step 0" if method is None else f"freeze = {method.freeze!r}"),
            expected="freeze = encoder or all_but_head",
            hint="set augment_views = 0, or choose a method with a frozen encoder",
        )
    needing = [term for term in STAGE_TERMS if method.losses.get(term)]
    if needing:
        raise ConfigError(
            "a term of the method compares the encoder's stages, and only its features are cached",
            where="augment_views",
            found=f"{settings.augment_views} with {', '.join(needing)}",
            hint="set augment_views = 0, or the weight of the term to 0",
        )


def are_views_reused(settings: TrainConfig, image_count: int) -> bool:
    """Whether any view is shown a second time (rule 2); never without `augment_views`."""
    return 0 < settings.augment_views * image_count < settings.iterations * settings.batch_size


def needs_logits_alone(method: Method) -> bool:
    """Whether the method asks nothing of the teacher but its logits: they can then be kept in its place."""
    return all(term in LOGIT_TERMS for term, weight in method.losses.items() if weight)
