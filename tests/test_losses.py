"""Loss terms against golden numbers (float64), plain-loop versions, gradients and hand cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edge_ilseg.errors import TrainingError
from edge_ilseg.losses import (
    cross_entropy,
    cross_entropy_unbiased,
    entropy,
    kd_dilation,
    kd_feature,
    kd_feature_plain,
    kd_output,
    kd_similarity,
    kd_unbiased,
    local_pod,
    pod_embedding,
    pseudo_labels,
)

RELATIVE = 1e-9


def wave(function: object, factor: float, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * function(factor * k).reshape(shape)  # type: ignore[operator]


@pytest.fixture
def new_logits() -> Tensor:
    return wave(torch.sin, 0.1, (2, 7, 16, 16), 2.0)


@pytest.fixture
def old_logits() -> Tensor:
    return wave(torch.cos, 0.07, (2, 5, 16, 16), 2.0)


@pytest.fixture
def labels() -> Tensor:
    k = torch.arange(2 * 16 * 16)
    labels = (3 * k) % 7
    labels[k % 11 == 0] = 255
    return labels.reshape(2, 16, 16)


def test_cross_entropy_equals_the_golden_number(new_logits: Tensor, labels: Tensor) -> None:
    assert cross_entropy(new_logits, labels).item() == pytest.approx(2.4890897523, rel=RELATIVE)


def test_output_distillation_equals_the_golden_numbers(new_logits: Tensor, old_logits: Tensor, labels: Tensor) -> None:
    as_coded = kd_output(new_logits, old_logits, labels)
    renormalised = kd_output(new_logits, old_logits, labels, softmax="old")
    all_512_pixels = kd_output(new_logits, old_logits, labels, mask="all")
    ilt = kd_output(new_logits, old_logits, labels, softmax="old", mask="all", classes="mean")
    assert as_coded.item() == pytest.approx(2.3914253364, rel=RELATIVE)
    assert renormalised.item() == pytest.approx(1.8454059519, rel=RELATIVE)
    assert all_512_pixels.item() == pytest.approx(2.4100670725, rel=RELATIVE)
    assert ilt.item() == pytest.approx(0.3736216337, rel=RELATIVE)


def test_unbiased_terms_equal_the_golden_numbers(new_logits: Tensor, old_logits: Tensor, labels: Tensor) -> None:
    masked = torch.where(labels < 5, 0, labels)
    for given in (labels, masked):
        assert cross_entropy_unbiased(new_logits, given, 5).item() == pytest.approx(1.1015815997, rel=RELATIVE)
    counted = (labels != 255).sum().item()
    over_all_512 = cross_entropy_unbiased(new_logits, labels, 5).item() * counted / 512
    assert over_all_512 == pytest.approx(1.0004598513, rel=RELATIVE)
    assert kd_unbiased(new_logits, old_logits, 0).item() == pytest.approx(0.4074379373, rel=RELATIVE)
    assert kd_unbiased(new_logits, old_logits, 0, alpha=2).item() == pytest.approx(0.3962016807, rel=RELATIVE)


def test_local_pod_and_entropy_equal_the_golden_numbers(new_logits: Tensor, old_logits: Tensor) -> None:
    teacher = [wave(torch.sin, 0.05, (2, 6, 16, 16)), wave(torch.cos, 0.09, (2, 6, 8, 8))]
    student = [wave(torch.cos, 0.05, (2, 6, 16, 16)), wave(torch.sin, 0.09, (2, 6, 8, 8))]
    found = local_pod(student, teacher, new_logits, old_logits, 0)
    assert found.item() == pytest.approx(0.2186634988, rel=1e-7)
    # Published: the mean over the 5 classes in place of the sum, and 1e-8 inside the logarithm.
    assert entropy(old_logits).mean().item() / 5 == pytest.approx(0.1341021999, rel=1e-6)


def test_dilation_and_similarity_equal_the_golden_numbers() -> None:
    factors = [0.03 + 0.01 * i for i in range(4)]
    teacher = [wave(torch.cos, factor, (2, 5, 8, 8)) for factor in factors]
    student = [wave(torch.sin, factor, (2, 7, 8, 8)) for factor in factors]
    assert kd_dilation(student, teacher).item() == pytest.approx(1.0594334234, rel=RELATIVE)
    old, new = (wave(function, 0.05, (4, 6, 4, 4)) + 0.5 for function in (torch.cos, torch.sin))
    assert kd_similarity(new, old).item() == pytest.approx(0.0598298533, rel=RELATIVE)
    assert kd_similarity(new, old, spatial_average=True).item() == pytest.approx(0.0686826075, rel=RELATIVE)


def test_feature_distillation_equals_the_golden_numbers() -> None:
    teacher, student = wave(torch.cos, 0.05, (2, 6, 16, 16)), wave(torch.sin, 0.05, (2, 6, 16, 16))
    assert kd_feature_plain(student, teacher).item() == pytest.approx(0.9991827080, rel=RELATIVE)
    assert kd_feature(student, teacher).item() == pytest.approx(2.0023689820, rel=RELATIVE)


def loop_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    total, count = 0.0, 0
    for n in range(logits.shape[0]):
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                label = int(labels[n, y, x])
                if label != 255:
                    z = [float(v) for v in logits[n, :, y, x]]
                    total += math.log(sum(math.exp(v) for v in z)) - z[label]
                    count += 1
    return total / max(count, 1)


def loop_kd_output(
    student: Tensor, teacher: Tensor, labels: Tensor, softmax: str, mask: str, classes: str, temperature: float
) -> float:
    old = teacher.shape[1]
    total, count = 0.0, 0
    for n in range(student.shape[0]):
        for y in range(student.shape[2]):
            for x in range(student.shape[3]):
                label = int(labels[n, y, x])
                if mask == "old_pixels" and not label < old:
                    continue
                if mask == "not_new" and old <= label < 255:
                    continue
                s = [float(v) / temperature for v in student[n, :, y, x]]
                t = [math.exp(float(v) / temperature) for v in teacher[n, :, y, x]]
                s = s if softmax == "all" else s[:old]
                log_norm = math.log(sum(math.exp(v) for v in s))
                terms = [t[c] / sum(t) * (s[c] - log_norm) for c in range(old)]
                total -= temperature**2 * sum(terms) / (old if classes == "mean" else 1)
                count += 1
    return total / max(count, 1)


def random_batch(channels: int = 4, old: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(2, channels, 3, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, old, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, channels, (2, 3, 5), generator=generator)
    labels[0, 0, :2] = 255
    return student, teacher, labels


@pytest.mark.parametrize("softmax", ["all", "old"])
@pytest.mark.parametrize("mask", ["old_pixels", "not_new", "all"])
@pytest.mark.parametrize("classes", ["sum", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_output_distillation_equals_its_plain_loop(softmax: str, mask: str, classes: str, temperature: float) -> None:
    batch = random_batch()
    switches = {"softmax": softmax, "mask": mask, "classes": classes, "temperature": temperature}
    found = kd_output(*batch, **switches)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(loop_kd_output(*batch, **switches), rel=1e-12)  # type: ignore[arg-type]


def test_cross_entropy_equals_its_plain_loop() -> None:
    student, _, labels = random_batch()
    assert cross_entropy(student, labels).item() == pytest.approx(loop_cross_entropy(student, labels), rel=1e-12)
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    counts = [(labels[n] != 255).sum().item() for n in range(2)]
    parts = [loop_cross_entropy(student[n : n + 1], labels[n : n + 1]) * counts[n] for n in range(2)]
    expected = (0.5 * parts[0] + 2.0 * parts[1]) / sum(counts)
    assert cross_entropy(student, labels, weight).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("background", [0, 1])
def test_unbiased_terms_equal_their_plain_loops(background: int) -> None:
    student, teacher, labels = random_batch(5, 3)
    ce, kd, count, pixels = 0.0, 0.0, 0, 0
    for n, y, x in [(n, y, x) for n in range(2) for y in range(3) for x in range(5)]:
        p = [math.exp(float(v)) for v in student[n, :, y, x]]
        p = [v / sum(p) for v in p]
        t = [math.exp(2 * float(v)) for v in teacher[n, :, y, x]]
        rest = [background, 3, 4]
        kd -= sum(t[c] / sum(t) * math.log(sum(p[r] for r in rest) if c == background else p[c]) for c in range(3)) / 3
        pixels += 1
        if (label := int(labels[n, y, x])) != 255:
            ce -= math.log(sum(p[:3]) if label < 3 else p[label])
            count += 1
    assert cross_entropy_unbiased(student, labels, 3).item() == pytest.approx(ce / count, rel=1e-12)
    assert kd_unbiased(student, teacher, background, alpha=2).item() == pytest.approx(kd / pixels, rel=1e-12)


def test_unbiased_cross_entropy_takes_a_factor_for_each_image() -> None:
    student, _, labels = random_batch(5, 3)
    counts = [(labels[n] != 255).sum().item() for n in range(2)]
    parts = [cross_entropy_unbiased(student[n : n + 1], labels[n : n + 1], 3).item() * counts[n] for n in range(2)]
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = (0.5 * parts[0] + 2.0 * parts[1]) / sum(counts)
    assert cross_entropy_unbiased(student, labels, 3, weight).item() == pytest.approx(expected, rel=1e-12)


def test_feature_distillation_equals_its_plain_loop() -> None:
    generator = torch.Generator().manual_seed(9)
    student, teacher = (torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    error = energy = 0.0
    for n, c, y, x in [(n, c, y, x) for n in range(2) for c in range(3) for y in range(2) for x in range(4)]:
        error += (float(student[n, c, y, x]) - float(teacher[n, c, y, x])) ** 2
        energy += float(teacher[n, c, y, x]) ** 2
    assert kd_feature_plain(student, teacher).item() == pytest.approx(error / 48, rel=1e-12)
    assert kd_feature(student, teacher).item() == pytest.approx(error / energy, rel=1e-12)


def loop_entropy(logits: list[float]) -> float:
    p = [math.exp(v) for v in logits]
    return -sum(v / sum(p) * math.log(v / sum(p)) for v in p) / math.log(len(logits))


def test_pseudo_labels_equal_their_plain_loop() -> None:
    generator = torch.Generator().manual_seed(8)
    teacher = 2 * torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 6, (3, 5, 6), generator=generator)
    labels[0, 1] = 255
    hidden = labels < 3
    hidden[2] = False
    thresholds = [0.4, 0.6, 0.5, 0.7]
    found, factor = pseudo_labels(labels, hidden, teacher, torch.tensor(thresholds, dtype=torch.float64))
    for n in range(3):
        sure = 0
        for y, x in [(y, x) for y in range(5) for x in range(6)]:
            expected = int(labels[n, y, x])
            if hidden[n, y, x]:
                logits = [float(v) for v in teacher[n, :, y, x]]
                seen = logits.index(max(logits))
                is_sure = loop_entropy(logits) < thresholds[seen]
                sure += is_sure
                expected = seen if is_sure else 255
            assert int(found[n, y, x]) == expected
        count = int(hidden[n].sum())
        assert factor[n].item() == pytest.approx(sure / count if count else 1.0)


def test_entropy_equals_its_plain_loop(old_logits: Tensor) -> None:
    found = entropy(old_logits)
    for y, x in ((0, 0), (3, 11), (15, 15)):
        assert found[1, y, x].item() == pytest.approx(loop_entropy(old_logits[1, :, y, x].tolist()), rel=1e-12)


def loop_pod_distance(student: Tensor, teacher: Tensor) -> float:
    """Regions of a map cut into s x s equal parts; each part's means along its width and along its height."""
    _, depth, height, width = teacher.shape
    distances = []
    for n in range(teacher.shape[0]):
        square = 0.0
        for scale in (1, 2, 4):
            h, w = height // scale, width // scale
            for i in range(scale):
                for j in range(scale):
                    for d in range(depth):
                        parts = [m[n, d, i * h : (i + 1) * h, j * w : (j + 1) * w] ** 2 for m in (student, teacher)]
                        a, b = ([[float(v) for v in row] for row in part] for part in parts)
                        square += sum((sum(a[y]) / w - sum(b[y]) / w) ** 2 for y in range(h))
                        square += sum(
                            (sum(a[y][x] for y in range(h)) / h - sum(b[y][x] for y in range(h)) / h) ** 2
                            for x in range(w)
                        )
        distances.append(math.sqrt(square))
    return sum(distances) / len(distances)


@pytest.mark.parametrize("background", [0, 1, None])
def test_local_pod_equals_its_plain_loop_on_a_map_that_is_not_square(background: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    maps = [torch.randn(2, 2, 4, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    student, teacher = (torch.randn(2, k, 8, 12, generator=generator, dtype=torch.float64) for k in (3, 2))
    folded = student[:, :2].clone()
    if background is not None:
        folded[:, background] += student[:, 2]
    expected = 0.01 * loop_pod_distance(*maps) + 0.0005 * loop_pod_distance(folded, teacher)
    expected *= math.sqrt(3 / 1) / 2
    found = local_pod(maps[:1], maps[1:], student, teacher, background)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_pod_embedding_of_a_map_that_four_does_not_divide_equals_its_plain_loop() -> None:
    map_NDHW = torch.randn(1, 2, 7, 10, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    expected = []
    for scale in (1, 2, 4):
        # Band i of s over a length of n: from floor(i n / s) up to ceil((i + 1) n / s), so bands may share a row.
        rows, columns = (
            [range(i * size // scale, -(-(i + 1) * size // scale)) for i in range(scale)] for size in (7, 10)
        )
        squared = map_NDHW[0].square().tolist()
        for d in range(2):
            expected += [sum(squared[d][y][x] for x in band) / len(band) for y in range(7) for band in columns]
        for d in range(2):
            expected += [sum(squared[d][y][x] for y in band) / len(band) for band in rows for x in range(10)]
    assert pod_embedding(map_NDHW)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_the_bands_of_local_pod_cover_a_map_that_four_does_not_divide() -> None:
    for y, x in ((6, 0), (0, 9), (6, 9)):  # 7 x 10: regions of 1 x 2 would end at row 4 and column 8
        map_NDHW = torch.zeros(1, 1, 7, 10)
        map_NDHW[0, 0, y, x] = 1.0
        at_scale_4 = pod_embedding(map_NDHW)[0, -(7 * 4 + 4 * 10) :]
        assert at_scale_4[: 7 * 4].sum() > 0
        assert at_scale_4[7 * 4 :].sum() > 0


def test_dilation_and_similarity_equal_their_plain_loops() -> None:
    generator = torch.Generator().manual_seed(6)
    student = [torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    teacher = [torch.randn(3, 2, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    branches = [
        sum((a - b) ** 2 for a, b in zip(s[:, :2].flatten().tolist(), t.flatten().tolist(), strict=True)) / t.numel()
        for s, t in zip(student, teacher, strict=True)
    ]
    assert kd_dilation(student, teacher).item() == pytest.approx(sum(branches) / 2, rel=1e-12)

    def similarities(rows: list[list[float]]) -> list[list[float]]:
        gram = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
        return [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in gram]

    for average in (False, True):
        pooled = [x.mean(dim=(2, 3)) if average else x.flatten(1) for x in (student[0], teacher[0])]
        new, old = (similarities(rows.tolist()) for rows in pooled)
        expected = sum((a - b) ** 2 for p, q in zip(new, old, strict=True) for a, b in zip(p, q, strict=True)) / 9
        found = kd_similarity(student[0], teacher[0], spatial_average=average)
        assert found.item() == pytest.approx(expected, rel=1e-12)


def test_similarity_needs_two_images_and_survives_an_image_of_zeros() -> None:
    with pytest.raises(TrainingError, match=r"compares the images of a batch(.|\n)*raise the batch size"):
        kd_similarity(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2))
    student = torch.zeros(2, 2, 2, 2, requires_grad=True)
    loss = kd_similarity(student, torch.zeros(2, 2, 2, 2))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0.0
    assert torch.isfinite(gradient).all()


def test_a_sure_teacher_labels_hidden_pixels_and_an_unsure_one_makes_them_void() -> None:
    sure, unsure = [9.0, 0.0], [0.1, 0.0]
    teacher = torch.tensor([[[sure, unsure, sure]], [[sure, sure, sure]]]).permute(0, 3, 1, 2)
    labels = torch.tensor([[[0, 0, 2]], [[2, 2, 255]]])
    found, factor = pseudo_labels(labels, labels == 0, teacher, torch.tensor([0.5, 0.5]))
    assert found.tolist() == [[[0, 255, 2]], [[2, 2, 255]]]
    assert factor.tolist() == [0.5, 1.0]
    never, factor = pseudo_labels(labels, labels == 0, teacher, torch.tensor([0.0, 0.5]))
    assert never.tolist() == [[[255, 255, 2]], [[2, 2, 255]]]
    assert factor.tolist() == [0.0, 1.0]


def test_entropy_is_one_for_a_teacher_that_knows_nothing_and_zero_for_one_that_is_sure() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]]).T.reshape(1, 3, 1, 2)
    assert entropy(logits).flatten().tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert entropy(torch.zeros(1, 1, 1, 1)).item() == 0.0


def test_no_gradient_flows_into_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 2, 4, 4, requires_grad=True)
    same, old = torch.randn(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 4, 4, dtype=torch.long)
    loss = kd_output(student, teacher, old) + kd_unbiased(student, teacher, 0) + kd_dilation([student], [teacher])
    loss = (
        loss
        + kd_feature(student, same)
        + kd_similarity(student, same)
        + local_pod([student], [same], student, teacher, 0)
    )
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is same.grad is None


def test_at_the_start_of_a_step_terms_that_compare_equal_layers_have_a_finite_gradient() -> None:
    student = torch.randn(2, 2, 4, 4, requires_grad=True)
    grown = torch.cat([student, torch.zeros(2, 1, 4, 4)], dim=1)
    loss = kd_feature(student, student) + kd_dilation([grown], [student]) + kd_similarity(student, student)
    loss = loss + local_pod([student], [student], grown, student, 0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.isfinite(gradient).all()


def test_the_feature_loss_does_not_depend_on_the_scale_of_the_features() -> None:
    teacher, student = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert kd_feature(1000 * student, 1000 * teacher).item() == pytest.approx(kd_feature(student, teacher).item(), 1e-4)


def test_a_silent_teacher_does_not_make_the_feature_loss_nan() -> None:
    assert torch.isfinite(kd_feature(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)))
