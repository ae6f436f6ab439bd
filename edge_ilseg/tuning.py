"""Which memory format and how many threads make a step fast on this machine: measured at its start, once.

1. What is measured is forward and backward of a copy of the network, frozen as it will be trained, on a few of the
   step's own images: the network itself, its gradients and the random generators stay as they are.
2. Another choice than the usual one (`USUAL_FORMAT`, torch's own number of threads) has to be faster by a tenth: what
   is about equally fast must not change from run to run.
   Where one of the two was measured once alone it has to be twice as fast.
3. Measuring ends after `BUDGET_S` and the iteration that is running: what was not measured by then is not chosen.
4. Format and threads decide in which order numbers are summed, so the last bits of the weights depend on them. A run
   that must give the same bits as another is given that one's choice; nothing is measured then.
5. In one process the same step is measured once.

The format is that of the images; the activations take it over from one layer to the next, whatever the weights have.
`normalize` leaves them in channels_last, because bytes of images come so: that is the usual one.

`torch.compile` is not among the choices. It takes tens of seconds before the first iteration, in every step again
because the head has grown, and on a CPU needs a C++ compiler; a step has a few hundred short iterations.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Literal

import msgspec
import torch
from torch import Tensor

from edge_ilseg.allocator import keep_freed_memory
from edge_ilseg.config import TrainConfig
from edge_ilseg.data.loader import TrainingSamples
from edge_ilseg.data.step_view import StepView
from edge_ilseg.errors import ConfigError
from edge_ilseg.losses import cross_entropy
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel

MemoryFormat = Literal["contiguous", "channels_last"]
FORMATS: dict[MemoryFormat, torch.memory_format] = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}
USUAL_FORMAT: MemoryFormat = "channels_last"
BUDGET_S = 1.5
IMAGES = 2
ROUNDS = 4
"""Iterations of each choice; the first, which finds its kernels, does not count."""
WORTH_IT = 0.9
HOPELESS = 2.0
"""A choice whose best iteration takes that many times as long as the best of all is not measured on."""


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One choice and how long its iterations took."""

    memory_format: MemoryFormat
    threads: int
    iteration_ms: float
    """Median."""
    iterations: int
    """That the median is of."""


class Tuning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a step is computed. Plain data: it goes into logs, and into what a run is resumed from (rule 4)."""

    memory_format: MemoryFormat = USUAL_FORMAT
    threads: int | None = None
    """Of one process; None: torch's own number."""
    timings: tuple[Timing, ...] = ()
    """What it was chosen by; nothing where it was given."""
    seconds: float = 0.0
    """That measuring took."""

    def arrange(self, images_NCHW: Tensor) -> Tensor:
        """The same images in the chosen format."""
        return images_NCHW.contiguous(memory_format=FORMATS[self.memory_format])

    def describe(self) -> str:
        """One line for a log, with the options that choose the same again."""
        threads = torch.get_num_threads() if self.threads is None else self.threads
        text = f"{self.memory_format}, {threads} {'thread' if threads == 1 else 'threads'}"
        if not self.timings:
            return text
        measured = ", ".join(
            f"{item.memory_format} {item.threads}: {item.iteration_ms:.0f} ms" for item in self.timings
        )
        return f"{text}; measured in {self.seconds:.1f} s ({measured})"


FIXED = Tuning()
"""What is used where nothing was chosen: the same in every run on one machine."""


def parse_tuning(text: str) -> Tuning | None:
    """`auto` (None: to be measured), `usual`, or a choice such as `contiguous` or `channels_last:1`.

    Raises:
        ConfigError: anything else.
    """
    if text == "auto":
        return None
    if text == "usual":
        return FIXED
    name, separator, count = text.partition(":")
    for memory_format in FORMATS:
        if name == memory_format and (not separator or (count.isdecimal() and int(count) > 0)):
            return Tuning(memory_format, int(count) if separator else None)
    raise ConfigError(
        "the choice of memory format and threads cannot be read",
        where="--tuning",
        found=repr(text),
        expected="auto, usual, or FORMAT[:THREADS] with FORMAT " + " or ".join(FORMATS),
        hint="leave --tuning out, or take --tuning auto",
    )


@contextmanager
def threads_of(tuning: Tuning) -> Iterator[None]:
    """Compute with the chosen number of threads, and with the number from before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(tuning.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_measured: dict[tuple[object, ...], Tuning] = {}


def tune_step(
    model: SegmentationModel,
    view: StepView,
    settings: TrainConfig,
    freeze: str,
    *,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> Tuning:
    """Measure a step, or give what was measured for it before in this process (rule 5).

    Args:
        model: the network that will be trained; it stays as it is (rule 1).
        view: the step's images.
        settings: as it will be trained.
        freeze: the method's cut point, `none` at step 0.
        device: where it will be trained; on a GPU the format alone is measured.
        processes: that will train on this machine at the same time and share its cores.
    """
    key = (model.spec, model.class_counts, freeze, settings, str(device), processes, torch.get_num_threads())
    if key not in _measured:
        if torch.device(device).type == "cpu":
            keep_freed_memory()  # as training will
        samples = TrainingSamples(view, model.spec, settings)
        pairs = [samples[k] for k in range(min(IMAGES, len(samples)))]
        images_NHWC, labels_NHW = (torch.stack(items).to(device) for items in zip(*pairs, strict=True))
        images_NCHW = normalize(images_NHWC, model.spec)
        trial = copy.deepcopy(model).to(device)
        trial.set_frozen(freeze)
        trial.set_batch_norm(settings.batch_norm)
        trial.train()

        def iterate(choice: Tuning) -> None:
            trial.zero_grad(set_to_none=True)
            loss = cross_entropy(trial(choice.arrange(images_NCHW)).logits_NCHW, labels_NHW)
            torch.autograd.backward(loss)
            if images_NCHW.is_cuda:
                torch.cuda.synchronize()

        _measured[key] = choose(iterate, choices(images_NCHW.is_cuda, processes))
    return _measured[key]


def choices(is_gpu: bool, processes: int = 1) -> tuple[Tuning, ...]:
    """What is measured, the usual choice first: both formats, and on a CPU all threads, half of them and one."""
    usual = torch.get_num_threads()
    own = max(1, min(usual, (os.cpu_count() or 1) // processes))
    counts = (usual,) if is_gpu else tuple(sorted({usual, own, max(1, own // 2), 1}, reverse=True))
    counts = (usual, *(count for count in counts if count < usual))
    return tuple(Tuning(memory_format, count) for count in counts for memory_format in FORMATS)


def choose(
    iterate: Callable[[Tuning], None],
    candidates: Sequence[Tuning],
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Measure candidates in turns and take the fastest, or the first where none is worth it (rules 2 and 3).

    Args:
        iterate: one iteration as a candidate says.
        candidates: the first one is the usual choice.
        budget_s: no iteration begins later than this.
        clock: seconds; another one in tests.
    """
    started = clock()
    with threads_of(candidates[-1]):
        iterate(candidates[-1])  # loads what all need
    seconds: dict[Tuning, list[float]] = {candidate: [] for candidate in candidates}
    for _ in range(ROUNDS):
        for candidate in candidates:
            best = min((min(item) for item in seconds.values() if item), default=0.0)
            is_hopeless = bool(seconds[candidate]) and min(seconds[candidate]) > HOPELESS * best
            if is_hopeless or clock() - started > budget_s:
                continue
            with threads_of(candidate):
                begun = clock()
                iterate(candidate)
                seconds[candidate].append(clock() - begun)
    # What was measured once alone, for want of time or of hope, says only whether it is far slower or far faster.
    counted = {candidate: taken[1:] or taken for candidate, taken in seconds.items() if taken}
    usual = candidates[0]
    fastest = min(counted, key=lambda candidate: median(counted[candidate]), default=usual)
    is_sure = min(len(seconds[usual]), len(seconds[fastest])) > 1
    share = WORTH_IT if is_sure else 1 / HOPELESS
    is_worth_it = usual in counted and median(counted[fastest]) <= share * median(counted[usual])
    timings = tuple(
        Timing(item.memory_format, item.threads or 0, round(1000 * median(taken), 3), len(taken))
        for item, taken in counted.items()
    )
    chosen = fastest if is_worth_it else usual
    return Tuning(chosen.memory_format, chosen.threads, timings, clock() - started)
