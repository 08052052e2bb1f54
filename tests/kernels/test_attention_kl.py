"""`attention_kl` and `sdpa_with_attention_kl`: eager against textbook formulas and an identity, every backend against
eager float64; values and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbscale.kernels import attention_kl, sdpa_with_attention_kl
from dbscale.kernels.kd_loss import is_interpreted
from tests.kernels.attention_cases import NAMES, UPSTREAM, check, draw, error, reference, run, run_alone

pytestmark = [  # numpy's, where the interpreter computes what a `where` then drops
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
EXAMPLES = settings(
    max_examples=6 if is_interpreted() else 20, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # to shrink a failure would take minutes
)  # fmt: skip
SPREAD_3_TO_8 = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)).softmax(1)


def textbook(given_: dict[str, Tensor], groups: tuple[int, int], repeats: int) -> Tensor:
    """Mean KL(teacher ‖ student) of float64 maps, each the mean of a group of neighbouring heads."""
    maps = []
    for q, k, group in (("q", "k", groups[0]), ("q_t", "k_t", groups[1])):
        scores = given_[q].double() @ given_[k].double().transpose(2, 3) * given_[q].shape[3] ** -0.5
        each = torch.softmax(scores, -1)
        maps.append(torch.stack([each[:, i : i + group].mean(1) for i in range(0, each.shape[1], group)], 1))
    p_s, p_t = maps[0], maps[1].repeat_interleave(repeats, dim=1)
    return (p_t * (p_t / p_s).log()).sum(-1).mean()


@pytest.mark.parametrize(
    ("tokens", "heads", "head_map", "groups", "repeats"),
    [(1, (2, 2), "repeat", (1, 1), 1), (17, (4, 1), "repeat", (1, 1), 4), (198, (8, 2), "repeat", (1, 1), 4),
     (65, (8, 2), "mean", (4, 1), 1), (17, (3, 8), "mean", (3, 8), 1), (64, (2, 2), "mean", (1, 1), 1)],
)  # fmt: skip
def test_eager_is_the_textbook(tokens, heads, head_map, groups, repeats) -> None:
    given_ = draw(torch.device("cpu"), 2, heads, tokens, (16, 32))
    result = run(given_, head_map=head_map, backend="eager")
    q, k, v = (given_[name].double().requires_grad_() for name in "qkv")
    kl = textbook(given_ | {"q": q, "k": k}, groups, repeats)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    grads = torch.autograd.grad(UPSTREAM * kl + (out * weights).sum(), (q, k, v))
    check(result, dict(zip(NAMES, (kl.detach(), out.detach(), *grads), strict=True)), 1e-5)


def test_the_expected_score_of_eager_is_that_of_fused_attention() -> None:
    """KL = Σ p_t z_t − lse_t − Σ p_t z_s + lse_s, and Σ_j p_t z_s = scale · q_s·SDPA(q_t, k_t, v=k_s): no map is formed."""
    q, k, q_t, k_t = torch.randn(4, 2, 3, 21, 16, dtype=torch.float64)

    def expected(q_map: Tensor, k_map: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q * torch.nn.functional.scaled_dot_product_attention(q_map, k_map, k)).sum(-1) / 4

    lse_s, lse_t = ((a @ b.mT / 4).logsumexp(-1) for a, b in ((q, k), (q_t, k_t)))
    identity = expected(q_t, k_t, q_t, k_t) - lse_t - expected(q_t, k_t, q, k) + lse_s
    torch.testing.assert_close(attention_kl(q, k, q_t, k_t, reduction="none", backend="eager"), identity)


@pytest.mark.parametrize("tokens", [1, 17, 64, 65] if is_interpreted() else [1, 17, 64, 65, 197, 198])
def test_token_counts_around_the_tile(backend, device, tolerance, tokens) -> None:
    given_ = draw(device, 1, (2, 1), tokens, (32, 16))
    check(run(given_, backend=backend), reference(given_), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [197, 198, 257, 577] if is_interpreted() else [257, 577, 1100])
def test_longer_sequences(backend, device, tolerance, tokens) -> None:
    given_ = draw(device, 1, (2, 1), tokens, (64, 64))
    check(run(given_, backend=backend), reference(given_), tolerance)


@pytest.mark.parametrize("widths", [(32, 64), (64, 32), (24, 40), (8, 8), (80, 64)])
def test_widths_of_student_and_teacher_differ(backend, device, tolerance, widths) -> None:
    given_ = draw(device, 1, (2, 2), 33, widths)
    check(run(given_, backend=backend), reference(given_), tolerance)


@pytest.mark.parametrize(
    ("heads", "head_map"),
    [((8, 2), "repeat"), ((2, 2), "mean"), ((8, 2), "mean"), ((3, 8), "mean"), ((2, 4), "mean"), ((4, 6), "mean"),
     ((3, 8), SPREAD_3_TO_8)],
    ids=["8/2 repeat", "2/2 mean", "8/2 mean", "3/8 mean", "2/4 mean", "4/6 mean", "3/8 matrix"],
)  # fmt: skip
def test_head_counts_differ(backend, device, tolerance, heads, head_map) -> None:
    given_ = draw(device, 1, heads, 9, (16, 24))
    options = {"head_map": head_map, "backend": backend}
    if not isinstance(head_map, str):
        tolerance = 1e-5  # a matrix has no kernel
    check(run(given_, **options), reference(given_, **options), tolerance)
    check(run_alone(given_, **options), reference(given_, run_alone, **options), tolerance)


@pytest.mark.parametrize(("tokens", "wants"), [(1, "both"), (17, "both"), (17, "kl"), (17, "out"), (65, "both")])
def test_averaged_heads_around_the_tile(backend, device, tolerance, tokens, wants) -> None:
    given_ = draw(device, 1, (3, 2), tokens, (32, 16))
    options = {"head_map": "mean", "wants": wants, "backend": backend}
    check(run(given_, **options), reference(given_, **options), tolerance)


def test_heads_of_a_group_that_is_too_large_to_hold(backend, device, tolerance, monkeypatch) -> None:
    if backend != "triton":
        pytest.skip("only the kernels hold query rows from tile to tile")
    from dbscale.kernels import attention_kl_triton

    monkeypatch.setattr(attention_kl_triton, "HELD_BYTES", 0)
    given_ = draw(device, 1, (4, 6), 40, (16, 16))
    options = {"head_map": "mean", "backend": backend}
    check(run(given_, **options), reference(given_, **options), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "heads", "widths"), [(64, (8, 2), (64, 64)), (197, (2, 1), (64, 32))])
def test_averaged_heads_of_real_sizes(backend, device, tolerance, tokens, heads, widths) -> None:
    given_ = draw(device, 1, heads, tokens, widths)
    options = {"head_map": "mean", "backend": backend}
    check(run(given_, **options), reference(given_, **options), tolerance)


def test_averaged_heads_of_weighted_rows_and_a_slice(backend, device, tolerance) -> None:
    given_ = draw(device, 2, (4, 2), 12, (16, 16))
    given_ |= {name: given_[name][:, :, 1:] for name in ("q_t", "k_t")}
    options = {
        "token_slice": (slice(2, None), slice(1, None)), "row_weight": torch.rand((2, 2, 10), device=device),
        "reduction": "sum", "head_map": "mean", "backend": backend,
    }  # fmt: skip
    check(run(given_, **options), reference(given_, **options), tolerance)


def test_averaged_heads_where_every_share_underflows(backend, device) -> None:
    """The student's maps are 0 in float32 where the teacher's are not: only sums of logarithms see by how much."""
    given_ = draw(device, 1, (2, 1), 17, (16, 16))
    options = {"head_map": "mean", "scale_s": 40.0, "scale_t": 0.2, "backend": backend}
    result = run(given_, **options)
    assert all(each.isfinite().all() for each in result.values()) and result["kl"] > 100
    check(result, reference(given_, **options), 1e-4)


@given(
    batch=st.integers(1, 3), heads_t=st.integers(1, 2), repeats=st.integers(1, 2), tokens=st.integers(1, 40),
    width_s=st.integers(1, 20), width_t=st.integers(1, 20), reduction=st.sampled_from(["batchmean", "sum", "none"]),
    seed=st.integers(0, 999),
)  # fmt: skip
@EXAMPLES
def test_drawn_shapes(
    backend, device, tolerance, batch, heads_t, repeats, tokens, width_s, width_t, reduction, seed
) -> None:
    torch.manual_seed(seed)
    given_ = draw(device, batch, (heads_t * repeats, heads_t), tokens, (width_s, width_t))
    options = {"reduction": reduction, "scale_s": 0.3, "scale_t": 0.2, "backend": backend}
    check(run(given_, **options), reference(given_, **options), 3 * tolerance)


@pytest.mark.parametrize("wants", ["kl", "out", "both"])
def test_gradients_of_either_output_alone(backend, device, tolerance, wants) -> None:
    given_ = draw(device, 2, (4, 2), 33, (16, 32))
    check(run(given_, wants=wants, backend=backend), reference(given_, wants=wants), tolerance)


@pytest.mark.parametrize("weight_shape", [(20,), (2, 20), (2, 4, 20)])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_row_weights_and_token_slices(backend, device, tolerance, weight_shape, reduction) -> None:
    given_ = draw(device, 2, (4, 2), 22, (16, 16))
    given_ |= {name: given_[name][:, :, 1:] for name in ("q_t", "k_t")}
    options = {
        "token_slice": (slice(2, None), slice(1, None)), "row_weight": torch.rand(weight_shape, device=device),
        "reduction": reduction, "backend": backend,
    }  # fmt: skip
    for how in (run, run_alone):
        check(how(given_, **options), reference(given_, how, **options), tolerance)


def test_the_gradient_is_that_of_finite_differences(backend, device) -> None:
    if backend == "triton":
        pytest.skip("needs float64, which the kernels do not take")
    given_ = {name: each.double() for name, each in draw(device, 1, (2, 1), 4, (3, 2)).items()}
    operands = [given_[name].clone().requires_grad_() for name in "qkv"]
    for head_map in ("repeat", "mean"):

        def both(*qkv: Tensor, head_map: str = head_map, reduction: str = "none"):
            return sdpa_with_attention_kl(
                *qkv, given_["q_t"], given_["k_t"], head_map=head_map, reduction=reduction, backend=backend
            )

        assert torch.autograd.gradcheck(both, operands)
        assert torch.autograd.gradcheck(lambda *qkv: both(*qkv, reduction="batchmean"), operands)


def test_equal_maps_cost_exactly_nothing(backend, device) -> None:
    if backend == "eager":
        pytest.skip("the textbook form leaves rounding behind")
    given_ = draw(device, 1, (2, 2), 65, (32, 32), scale=2.0)
    given_ |= {"q_t": given_["q"].clone(), "k_t": given_["k"].clone()}
    result = run_alone(given_, backend=backend)
    assert result["kl"] == 0
    assert torch.count_nonzero(result["grad_q"]) == 0 and torch.count_nonzero(result["grad_k"]) == 0


@pytest.mark.parametrize("head_map", ["repeat", "mean"])
def test_the_gradient_of_nearly_equal_maps_keeps_its_digits(backend, device, head_map) -> None:
    given_ = draw(device, 1, (2, 2) if head_map == "repeat" else (2, 1), 33, (16, 16))
    given_ |= {"q_t": given_["q"][:, :1], "k_t": given_["k"][:, :1]}
    given_ |= {name: given_[name[0]] for name in ("q_t", "k_t")} if head_map == "repeat" else {}
    # Whole multiples of small powers of two make the scores' products exact.
    given_ = {name: (each * 2**6).round() / 2**6 for name, each in given_.items()}
    given_ |= {"k_t": given_["k_t"] + (torch.randn_like(given_["k_t"]) * 2).round() / 2**11}
    options = {"head_map": head_map, "backend": backend}
    result, expected = run_alone(given_, **options), reference(given_, run_alone, **options)
    assert abs(float(result["kl"].double() - expected["kl"])) <= 1e-6
    assert error(result["grad_q"], expected["grad_q"]) <= 1e-3


def test_large_scores(backend, device) -> None:
    given_ = draw(device, 1, (2, 1), 33, (32, 32))
    options = {"scale_s": 60 * 32**-0.5, "scale_t": 60 * 32**-0.5, "backend": backend}
    result = run(given_, **options)
    assert all(each.isfinite().all() for each in result.values())
    check(result, reference(given_, **options), 5e-5)  # a rounded score of 300 is wrong by 3e-5


def test_a_common_shift_of_all_scores_of_a_row_changes_nothing(backend, device) -> None:
    """So rows of the scores' gradient sum to 0."""
    given_ = draw(device, 1, (2, 2), 20, (16, 16))
    shifted = given_ | {"k": given_["k"] + torch.randn(16, device=device)}
    plain, moved = (run_alone(each, backend=backend) for each in (given_, shifted))
    assert error(moved["kl"], plain["kl"].double()) <= 1e-5 and error(moved["grad_q"], plain["grad_q"].double()) <= 1e-5


def test_rows_of_the_score_gradient_sum_to_zero(backend, device) -> None:
    given_ = draw(device, 1, (2, 2), 16, (16, 16))
    # With the identity for keys, grad_q is the gradient in the scores.
    given_["k"] = torch.eye(16, device=device).expand(1, 2, 16, 16)
    grad = run_alone(given_, reduction="sum", backend=backend)["grad_q"]
    assert grad.norm() > 0.1 and grad.sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["width not contiguous", "one head for all", "every other token"])
def test_any_strides(backend, device, tolerance, layout) -> None:
    given_ = draw(device, 2, (2, 2), 34, (16, 16))
    given_ = {
        name: {
            "width not contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
            "one head for all": lambda x: x[:, :1].expand(-1, 2, -1, -1),
            "every other token": lambda x: x[:, :, ::2],
        }[layout](each)
        for name, each in given_.items()
    }
    check(run(given_, backend=backend), reference(given_), tolerance)


def test_offsets_beyond_32_bits(backend, device) -> None:
    if backend == "eager":
        pytest.skip("plain torch")
    stride = 2**31 + 16
    try:
        storage = torch.empty(stride + 2048, dtype=torch.float16, device=device)  # on the CPU pages nobody touches
    except RuntimeError as reason:
        pytest.skip(f"4 GiB of address space are not to be had: {reason}")
    given_ = {name: each.half() for name, each in draw(device, 2, (1, 1), 17, (16, 16)).items()}
    far = storage.as_strided((2, 1, 17, 16), (stride, 16, 16, 1))
    far.copy_(given_["q"])
    result, expected = run(given_ | {"q": far}, backend=backend), run(given_, backend=backend)
    assert all(torch.equal(result[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_no_worse_than_twice_eager(backend, device, dtype) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter is wrong for bfloat16; needs a CUDA device")
    given_ = {name: each.to(dtype) for name, each in draw(device, 2, (4, 2), 65, (32, 32), scale=1.5).items()}
    result, eager, expected = run(given_, backend=backend), run(given_, backend="eager"), reference(given_)
    for name in NAMES:
        assert error(result[name], expected[name]) <= 2 * error(eager[name], expected[name]) + 1e-7, name


def test_autocast_does_as_fused_attention_does(backend, device) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter is wrong for bfloat16; needs a CUDA device")
    given_ = draw(device, 2, (2, 1), 33, (16, 16))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = run(given_, backend=backend)
    expected = run({name: each.bfloat16() for name, each in given_.items()}, backend=backend)
    assert result["out"].dtype == torch.bfloat16 and result["kl"].dtype == torch.float32
    assert torch.equal(result["kl"], expected["kl"]) and torch.equal(result["out"], expected["out"])


def test_repeats_are_bitwise_equal(backend, device) -> None:
    given_ = draw(device, 1, (4, 2), 33, (16, 16))
    first, second = (run(given_, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("wants", ["both", "kl", "out"])
@pytest.mark.parametrize(("tokens", "head_map"), [(16, "repeat"), (70, "repeat"), (34, "mean")])
def test_the_gradient_of_one_result_alone(backend, device, tolerance, tokens, head_map, wants) -> None:
    given_ = draw(device, 2, (2, 1), tokens, (24, 16))
    options = {"wants": wants, "head_map": head_map, "backend": backend}
    check(run(given_, **options), reference(given_, **options), tolerance)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 2, 5)}, "the student's q has shape"),
        ({"k_t": torch.zeros(2, 1, 6, 4)}, "the teacher's q has shape"),
        ({"head_map": "max"}, "head_map='max': unknown"),
        ({"head_map": torch.ones(2, 1) * 2}, "sum to 1"),
        ({"head_map": torch.ones(3, 1)}, r"shape \[3, 1\]; expected"),
        ({"q_t": torch.zeros(2, 3, 5, 4), "k_t": torch.zeros(2, 3, 5, 4)}, "2 student heads are no multiple of 3"),
        ({"token_slice": (slice(1, None), slice(None))}, "4 student and 5 teacher tokens"),
        ({"token_slice": slice(None, None, 2)}, "step 2"),
        ({"row_weight": torch.ones(4)}, r"row_weight has shape \[4\]"),
        ({"reduction": "mean"}, "unknown reduction 'mean'"),
        ({"backend": "flash"}, "unknown backend 'flash'; use one of auto, triton, eager, compile"),
    ],
)
def test_refusals_say_what_and_which(change, words) -> None:
    operands = {"q": torch.zeros(2, 2, 5, 4), "k": torch.zeros(2, 2, 5, 4)}
    operands |= {"q_t": torch.zeros(2, 1, 5, 4), "k_t": torch.zeros(2, 1, 5, 4)}
    operands |= {name: change[name] for name in operands if name in change}
    options = {name: each for name, each in change.items() if name not in operands}
    with pytest.raises(ValueError, match=words):
        attention_kl(*operands.values(), **options)
