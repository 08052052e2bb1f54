"""`kd_loss`: eager against textbook formulas, every backend against eager float64; hard numbers, layouts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbscale.kernels import KDLoss, kd_loss
from dbscale.kernels.kd_loss import is_interpreted

pytestmark = [  # numpy's, where the interpreter computes what a `where` then drops
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
EXAMPLES = settings(
    max_examples=6 if is_interpreted() else 20, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # to shrink a failure would take minutes
)  # fmt: skip
UPSTREAM = 2.5


def make_target(kind: str, rows: int, classes: int, device: torch.device) -> Any:
    """Of each kind one row is out of the ordinary: a soft target of half the mass, two equal labels."""
    labels = torch.randint(classes, (2, rows), device=device)
    if kind == "hard":
        return labels[0]
    if kind == "soft":
        soft = torch.rand(rows, classes, device=device).softmax(1)
        soft[0] *= 0.5
        return soft
    labels[1, 0] = labels[0, 0]
    return labels[0], labels[1], 0.3


def run(student: Tensor, teacher: Tensor, target: Any, upstream: float = UPSTREAM, **options: Any):
    """(what kd_loss returns, the gradient of upstream · loss in the student's logits)."""
    student = student.detach().requires_grad_()
    result = kd_loss(student, teacher, target, **({"alpha": 0.3, "temperature": 4.0} | options))
    (grad,) = torch.autograd.grad((upstream * result.loss).sum(), student)
    return KDLoss(*(each.detach() for each in result)), grad


def reference(student: Tensor, teacher: Tensor, target: Any, **options: Any):
    if isinstance(target, Tensor) and target.is_floating_point():
        target = target.double()
    return run(student.double(), teacher.double(), target, **(options | {"backend": "eager"}))


def error(value: Tensor, expected: Tensor, smallest: float = 1e-30) -> float:
    return float((value.double() - expected).norm() / expected.norm().clamp_min(smallest))


def check(result: tuple[KDLoss, Tensor], expected: tuple[KDLoss, Tensor], tolerance: float) -> None:
    for name, value, other in zip(KDLoss._fields, result[0], expected[0], strict=True):
        # A small KL is wrong by the rounding of log-probabilities, whatever it is.
        assert error(value, other, smallest=0.5) <= tolerance, name
    assert error(result[1], expected[1]) <= tolerance, "gradient"


def textbook(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, temperature: float, smoothing: float
) -> Tensor:
    student, teacher = student.double(), teacher.double()
    log_p = torch.log_softmax(student, 1)
    ce = -(1 - smoothing) * log_p.gather(1, target[:, None])[:, 0] - smoothing * log_p.mean(1)
    p_t = torch.softmax(teacher / temperature, 1)
    kl = (p_t * (torch.log_softmax(teacher / temperature, 1) - torch.log_softmax(student / temperature, 1))).sum(1)
    return ((1 - alpha) * ce + alpha * temperature**2 * kl).mean()


@given(
    rows=st.integers(1, 9), classes=st.sampled_from([2, 10, 257, 1003]), alpha=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 4.0]), smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_eager_is_the_textbook(rows, classes, alpha, temperature, smoothing, seed) -> None:
    torch.manual_seed(seed)
    student, teacher = torch.randn(rows, classes) * 3, torch.randn(rows, classes) * 3
    target = torch.randint(classes, (rows,))
    options = {"alpha": alpha, "temperature": temperature, "label_smoothing": smoothing, "backend": "eager"}
    result, grad = run(student, teacher, target, **options)
    expected = student.double().requires_grad_()
    loss = textbook(expected, teacher, target, alpha, temperature, smoothing)
    (expected_grad,) = torch.autograd.grad(UPSTREAM * loss, expected)
    assert error(result.loss, loss.detach()) < 1e-5 and error(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("classes", [2, 10, 1000, 1003, 4095, 4096, 4097, 21841])
def test_class_counts_around_the_block(backend, device, tolerance, classes) -> None:
    student, teacher = torch.randn(2, 3, classes, device=device) * 3
    options = {"label_smoothing": 0.1, "backend": backend, "reduction": "none"}
    target = make_target("hard", 3, classes, device)
    check(run(student, teacher, target, **options), reference(student, teacher, target, **options), tolerance)


@pytest.mark.parametrize("kind", ["hard", "soft", "mixup"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (4.0, 0.1), (2.7, 0.1)])
def test_targets_weights_and_temperatures(backend, device, tolerance, kind, alpha, temperature, smoothing) -> None:
    student, teacher = torch.randn(2, 4, 37, device=device) * 3
    target = make_target(kind, 4, 37, device)
    options = {"alpha": alpha, "temperature": temperature, "label_smoothing": smoothing, "backend": backend}
    check(run(student, teacher, target, **options), reference(student, teacher, target, **options), tolerance)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_reductions(backend, device, tolerance, reduction) -> None:
    student, teacher = torch.randn(2, 5, 11, device=device)
    target = make_target("hard", 5, 11, device)
    options = {"reduction": reduction, "backend": backend}
    check(run(student, teacher, target, **options), reference(student, teacher, target, **options), tolerance)


@given(
    rows=st.integers(1, 6), classes=st.integers(2, 300), alpha=st.floats(0, 1), temperature=st.floats(0.5, 9),
    smoothing=st.sampled_from([0.0, 0.2]), kind=st.sampled_from(["hard", "soft", "mixup"]), seed=st.integers(0, 999),
)  # fmt: skip
@EXAMPLES
def test_drawn_shapes(backend, device, tolerance, rows, classes, alpha, temperature, smoothing, kind, seed) -> None:
    torch.manual_seed(seed)
    student, teacher = torch.randn(2, rows, classes, device=device) * 2
    target = make_target(kind, rows, classes, device)
    options = {"alpha": alpha, "temperature": temperature, "label_smoothing": smoothing, "backend": backend}
    check(run(student, teacher, target, **options), reference(student, teacher, target, **options), 2 * tolerance)


def test_a_gradient_of_many_rows_is_scaled_whole(backend, device, tolerance, monkeypatch) -> None:
    if backend != "triton":
        pytest.skip("only the kernels scale a finished gradient")
    from dbscale.kernels import kd_loss_triton

    monkeypatch.setattr(kd_loss_triton, "SCALERS", 2)
    student, teacher = torch.randn(2, 5, 11, device=device)
    target = make_target("hard", 5, 11, device)
    for reduction in ("sum", "none"):
        options = {"reduction": reduction, "backend": backend, "upstream": 3.0}
        check(run(student, teacher, target, **options), reference(student, teacher, target, **options), tolerance)


@pytest.mark.parametrize("delta", [0.1, 1.0])
@pytest.mark.parametrize("shift", [96.0, 1000.0])
def test_a_large_common_shift_costs_no_digits(backend, device, delta, shift) -> None:
    for classes in (10, 1003):
        teacher = torch.randn(3, classes, device=device) * 3
        student = teacher + delta * torch.randn(3, classes, device=device) + shift
        target = make_target("hard", 3, classes, device)
        options = {"alpha": 1.0, "temperature": 1.0, "backend": backend, "reduction": "none"}
        result, expected = (each(student, teacher, target, **options)[0].kl for each in (run, reference))
        assert bool(((result.double() - expected).abs() <= 1e-5 * expected + 1e-6).all())


def test_long_rows_of_equal_numbers_are_added_exactly_enough(backend, device) -> None:
    """Adding 100,000 equal probabilities in turn is wrong by 3e-5."""
    teacher = torch.zeros(2, 100_000, device=device)
    student = teacher.clone()
    student[:, ::2] = 8.0
    target = make_target("hard", 2, 100_000, device)
    options = {"temperature": 1.0, "backend": backend, "reduction": "none"}
    check(run(student, teacher, target, **options), reference(student, teacher, target, **options), 1e-6)


def test_the_gradient_is_that_of_finite_differences(backend) -> None:
    if backend == "triton":
        pytest.skip("needs float64, which the kernels do not take")
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64)
    for kind in ("hard", "soft", "mixup"):
        target = make_target(kind, 3, 7, torch.device("cpu"))
        target = target.double() if kind == "soft" else target

        def loss(logits: Tensor, target: Any = target) -> Tensor:
            return kd_loss(
                logits, teacher, target, alpha=0.4, temperature=3.0, label_smoothing=0.1, reduction="none",
                backend=backend,
            ).loss  # fmt: skip

        assert torch.autograd.gradcheck(loss, student.clone().requires_grad_())


def test_equal_logits_pull_nowhere(backend, device) -> None:
    logits = torch.randn(5, 1003, device=device) * 5
    target = make_target("hard", 5, 1003, device)
    result, grad = run(logits, logits.clone(), target, alpha=1.0, backend=backend)
    if backend == "triton":
        assert result.loss == 0 and result.kl == 0 and torch.count_nonzero(grad) == 0
    assert abs(float(result.kl)) < 1e-6 and grad.abs().max() < 1e-6
    whole = logits.round()  # a shift of whole numbers is exact
    result, grad = run(whole + 8, whole, target, alpha=1.0, backend=backend)
    assert abs(float(result.kl)) < 1e-6 and grad.abs().max() < 1e-6


@pytest.mark.parametrize("delta", [1e-2, 1e-3, 1e-4])
def test_the_gradient_of_nearly_equal_logits_keeps_its_digits(backend, device, delta) -> None:
    """The value, which is of the order of delta², is right to 1e-6 and may not be negative by more."""
    teacher = torch.randn(4, 1000, device=device) * 3
    student = teacher + delta * torch.randn(4, 1000, device=device)
    target = make_target("hard", 4, 1000, device)
    options = {"alpha": 1.0, "backend": backend, "reduction": "none"}
    (result, grad), (expected, expected_grad) = (each(student, teacher, target, **options) for each in (run, reference))
    assert float((result.kl.double() - expected.kl).abs().max()) <= 1e-6
    # p_s and p_t are rounded to 6e-8 of themselves, and differ by about delta / T.
    assert error(grad, expected_grad) <= 2e-6 / delta


def test_large_logits(backend, device, tolerance) -> None:
    student, teacher = torch.randn(2, 4, 1003, device=device) * 60
    target = make_target("hard", 4, 1003, device)
    for temperature in (1.0, 4.0):
        options = {"temperature": temperature, "backend": backend, "reduction": "none"}
        result = run(student, teacher, target, **options)
        assert all(each.isfinite().all() for each in (*result[0], result[1]))
        check(result, reference(student, teacher, target, **options), tolerance)


def test_a_teacher_without_mass_somewhere_or_anywhere(backend, device, tolerance) -> None:
    student, teacher = torch.randn(2, 4, 50, device=device)
    teacher[0, 10:30] = -torch.inf
    teacher[1] = -torch.inf
    target = make_target("hard", 4, 50, device)
    options = {"backend": backend, "reduction": "none"}
    result = run(student, teacher, target, **options)
    assert result[0].kl[1] == 0 and result[1].isfinite().all()
    rows = [0, 2, 3]
    check(
        (KDLoss(*(each[rows] for each in result[0])), result[1][rows]),
        reference(student[rows], teacher[rows], target[rows], **options),
        tolerance,
    )
    _, ce_grad = reference(student[1:2], student[1:2], target[1:2], **options)
    assert error(result[1][1:2], ce_grad) <= 1e-6, "a teacher without mass pulls nowhere"


@pytest.mark.parametrize("kind", ["hard", "mixup"])
def test_a_class_without_mass_in_either(backend, device, tolerance, kind) -> None:
    student, teacher = torch.randn(2, 3, 40, device=device)
    student[:, 7] = teacher[:, 7] = -torch.inf
    target = make_target(kind, 3, 40, device)
    for labels, ruled_out in [(target, 7)] if isinstance(target, Tensor) else [(target[0], 7), (target[1], 3)]:
        labels[:] = torch.tensor([ruled_out, 1, 2], device=device)
    options = {"backend": backend, "reduction": "none"}
    result, expected = (each(student, teacher, target, **options) for each in (run, reference))
    assert result[0].ce[0] == torch.inf, "the label is ruled out"
    check(*((KDLoss(*(part[1:] for part in each[0])), each[1][1:]) for each in (result, expected)), tolerance)
    assert error(result[0].kl, expected[0].kl) <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_no_worse_than_twice_eager(backend, device, dtype) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter is wrong for bfloat16; needs a CUDA device")
    student, teacher = (torch.randn(2, 16, 1000, device=device) * 4).to(dtype)
    target = make_target("hard", 16, 1000, device)
    options: dict[str, Any] = {"backend": backend, "label_smoothing": 0.1}
    result, eager = (
        run(student, teacher, target, **options),
        run(student, teacher, target, **options | {"backend": "eager"}),
    )
    expected = reference(student, teacher, target, **options)
    assert result[1].dtype == dtype and result[0].loss.dtype == torch.float32
    assert error(result[1], expected[1]) <= 2 * error(eager[1], expected[1])
    assert error(result[0].loss, expected[0].loss) <= 1e-6


def test_small_float16_gradients_survive_a_large_batch(backend, device) -> None:
    rows = 128
    student, teacher = (torch.randn(2, rows, 64, device=device) * 0.5).half()
    target = make_target("hard", rows, 64, device)
    _, grad = run(student, teacher, target, upstream=2.0**14, backend=backend)
    _, expected = reference(student, teacher, target, upstream=2.0**14)
    assert error(grad, expected) < 1e-3, "the loss scale arrives only in backward"


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "gap"])
def test_any_strides(backend, device, tolerance, layout) -> None:
    wide = torch.randn(40, 60, device=device)
    logits = {
        "transposed": wide.T[:5, :33],
        "sliced": wide[::3, 1:34],
        "expanded": wide[:1, :33].expand(5, 33),
        "gap": wide[:5, :50:2],
    }[layout]
    teacher = torch.randn(5, 40, device=device).flip(0)[:, : logits.shape[1]]
    logits = logits[:5]
    target = make_target("hard", 5, logits.shape[1], device)
    result = run(logits, teacher, target, backend=backend)
    check(result, reference(logits.contiguous(), teacher, target), tolerance)


def test_offsets_beyond_32_bits(backend, device) -> None:
    if backend == "eager":
        pytest.skip("plain torch")
    stride = 2**31 + 16
    try:
        storage = torch.empty(stride + 64, dtype=torch.float16, device=device)  # on the CPU pages nobody touches
    except RuntimeError as reason:
        pytest.skip(f"4 GiB of address space are not to be had: {reason}")
    student = storage.as_strided((2, 50), (stride, 1))
    student.copy_(torch.randn(2, 50))
    teacher, target = torch.randn(2, 50, device=device), make_target("hard", 2, 50, device)
    result = run(student, teacher, target, backend=backend)
    assert error(result[1], reference(student.clone(), teacher, target)[1]) < 1e-3


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_batch_and_a_single_row(backend, device, rows) -> None:
    student, teacher = torch.randn(2, rows, 6, device=device)
    result, grad = run(student, teacher, make_target("hard", rows, 6, device), backend=backend)
    assert grad.shape == (rows, 6) and result.loss.isfinite()


def test_parts_add_up_and_are_detached(backend, device) -> None:
    student = torch.randn(4, 10, device=device).requires_grad_()
    result = kd_loss(
        student, torch.randn(4, 10, device=device).requires_grad_(), make_target("hard", 4, 10, device),
        alpha=0.3, temperature=3.0, backend=backend,
    )  # fmt: skip
    assert result.loss.requires_grad and not result.ce.requires_grad and not result.kl.requires_grad
    torch.testing.assert_close(result.loss.detach(), 0.7 * result.ce + 0.3 * 9 * result.kl)


def test_autocast_changes_nothing(backend, device) -> None:
    student, teacher = torch.randn(2, 4, 100, device=device)
    target = make_target("hard", 4, 100, device)
    plain = run(student, teacher, target, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mixed = run(student, teacher, target, backend=backend)
    assert torch.equal(plain[0].loss, mixed[0].loss) and torch.equal(plain[1], mixed[1])


def test_repeats_are_bitwise_equal(backend, device) -> None:
    student, teacher = torch.randn(2, 8, 1003, device=device)
    target = make_target("mixup", 8, 1003, device)
    first, second = (run(student, teacher, target, backend=backend) for _ in range(2))
    assert torch.equal(first[1], second[1]) and all(
        torch.equal(*pair) for pair in zip(first[0], second[0], strict=True)
    )


@pytest.mark.parametrize(
    ("field", "value"), [("backend", "cuda"), ("alpha", 1.5), ("temperature", 0.0), ("reduction", "max")]
)
def test_numbers_and_names_that_do_not_fit(field: str, value: object) -> None:
    options: dict = {"alpha": 0.5, "temperature": 1.0} | {field: value}
    with pytest.raises(ValueError, match=field):
        kd_loss(torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, dtype=torch.long), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.tensor([0, 9])}, "0…9, but the logits have 4 classes"),
        ({"target": torch.tensor([0.5, 1.0])}, r"soft target has shape \[2\]"),
        ({"target": torch.tensor([0, 1, 2])}, r"expected integers of shape \[2\]"),
        ({"target": (torch.tensor([0, 1]), torch.tensor([0, 1]))}, "a mixup target is"),
        ({"teacher": torch.zeros(2, 5)}, r"\[2, 4\], teacher logits \[2, 5\]"),
        ({"student": torch.zeros(2, 4, dtype=torch.long)}, "expected floating"),
        ({"backend": "triton"}, "needs CUDA tensors"),
    ],
)
def test_refusals_say_what_and_which(change, words, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given_: dict[str, Any] = {
        "student": torch.zeros(2, 4),
        "teacher": torch.zeros(2, 4),
        "target": torch.tensor([0, 1]),
    }
    given_ |= {"backend": "auto"} | change
    with pytest.raises(ValueError, match=words):
        kd_loss(
            given_["student"],
            given_["teacher"],
            given_["target"],
            alpha=0.5,
            temperature=1.0,
            backend=given_["backend"],
        )
