"""Teachers guide by the formulas, in every kind of distillation, and with no weight not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dbscale.errors import FileError, TrainingError
from dbscale.study.recipe import Attention, Augment, Budget, DeiT, Distill, TimmModel
from dbscale.study.resources import Resources
from dbscale.training import losses, prepare
from dbscale.training.losses import CachedTeacher


def dense(target: Any, num_classes: int, smoothing: float) -> torch.Tensor:
    """[b, num_classes]: the smoothed distribution that a mixed batch is to predict, written out."""
    one, other = (torch.nn.functional.one_hot(labels, num_classes) for labels in (target.y_a, target.y_b))
    return (1 - smoothing) * (target.lam * one + (1 - target.lam) * other) + smoothing / num_classes


SMALL, LARGE = DeiT(heads=1, head_width=8, depth=2, patch_size=4), DeiT(heads=3, head_width=8, depth=3, patch_size=4)


@pytest.mark.parametrize("attention", [None, Attention(beta=0.0)])
def test_distilling_with_no_weight_is_plain_bitwise(attention, bench):
    teacher = bench.cell(model=SMALL)
    plain = bench.cell()
    idle = bench.cell("distill", teacher=teacher, distill=Distill(alpha=0.0, attention=attention))
    rows = [bench.run(cell).row for cell in (teacher, plain, idle)]
    assert rows[1].weights_sha256 == rows[2].weights_sha256
    assert rows[1].train_loss == rows[2].train_loss


@pytest.mark.parametrize(
    ("teacher_model", "distill", "terms"),
    [
        (SMALL, Distill(alpha=0.5), {"kl"}),
        (LARGE, Distill(alpha=1.0), {"kl"}),
        (SMALL, Distill(alpha=0.5, target="hard"), {"hard"}),
        (SMALL, Distill(alpha=0.5, target="mixed"), {"kl", "hard"}),
        (SMALL, Distill(alpha=0.5, attention=Attention(layers="all", head_map="repeat")), {"kl", "attention_kl"}),
        (LARGE, Distill(alpha=0.5, attention=Attention(layers=(0, -1), head_map="matrix")), {"kl", "attention_kl"}),
        (LARGE, Distill(alpha=0.0, attention=Attention(head_map="mean")), {"attention_kl"}),
    ],
    ids=["smaller", "larger", "hard", "mixed", "all layers", "matrix", "maps only"],
)
def test_each_kind_of_distillation_trains_and_reports_its_terms(teacher_model, distill, terms, bench):
    options = {"augment": Augment(mixup=0.8), "budget": Budget(steps=10)}
    teacher = bench.cell(model=teacher_model, **options)
    cell = bench.cell("distill", teacher=teacher, distill=distill, **options)
    bench.run(teacher)
    before = bench.weights(teacher)
    outcome = bench.run(cell)
    assert outcome.status == "done", outcome.reason
    line = bench.fingerprint(cell)["metrics"][-1]
    assert line.keys() - {"step", "lr", "loss", "ce"} == terms
    expected = (1 - distill.alpha) * line["ce"]
    soft, hard = distill.temperature**2 * line.get("kl", 0), line.get("hard", 0)
    expected += distill.alpha * ((soft + hard) / 2 if distill.target == "mixed" else soft + hard)
    expected += line.get("attention_kl", 0) * (distill.attention.beta if distill.attention else 0)
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert outcome.row.arm == "distilled" and outcome.row.teacher == teacher.key
    assert all(torch.equal(before[name], value) for name, value in bench.weights(teacher).items())


def test_losses_match_their_formulas():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    from dbscale.data import MixTarget

    mixed = MixTarget(labels, labels.flip(0), 0.3)
    found = losses._cross_entropy(logits, mixed, 0.1)
    wanted = dense(mixed, 5, 0.1)
    assert found == pytest.approx(float(torch.nn.functional.cross_entropy(logits, wanted)), rel=1e-6)


def _soft_term(student, teacher, temperature):
    p_t, log_p_s = (teacher / temperature).softmax(1), (student / temperature).log_softmax(1)
    return temperature**2 * (p_t * (p_t.log() - log_p_s)).sum(1).mean()


@pytest.mark.parametrize("target", ["soft", "hard", "mixed"])
@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed labels"])
def test_distillation_is_its_formula_in_value_and_gradient(target, mixed):
    """loss = (1-α)·CE + α·T²·KL; hard: α·CE to the teacher's decision, which is not smoothed
    (DeiT); mixed: half of each."""
    from dbscale.data import MixTarget

    torch.manual_seed(1)
    labels, teacher_logits = torch.randint(0, 7, (9,)), 3 * torch.randn(9, 7)
    wanted = MixTarget(labels, labels.flip(0), 0.3) if mixed else labels
    settings = Distill(alpha=0.4, temperature=2.5, target=target)
    found, expected = (torch.randn(9, 7).requires_grad_() for _ in range(2))
    with torch.no_grad():
        expected.copy_(found)

    objective = losses._DistillObjective(settings, 0.1, lambda _: teacher_logits, None, "auto")
    terms = objective(lambda _: found, torch.empty(0), wanted)

    aim = dense(wanted, 7, 0.1) if mixed else labels
    smoothing = 0.0 if mixed else 0.1
    ce = torch.nn.functional.cross_entropy(expected, aim, label_smoothing=smoothing)
    soft = _soft_term(expected, teacher_logits, 2.5)
    hard = torch.nn.functional.cross_entropy(expected, teacher_logits.argmax(1))
    guided = {"soft": soft, "hard": hard, "mixed": (soft + hard) / 2}[target]
    loss = 0.6 * ce + 0.4 * guided
    terms.loss.backward()
    loss.backward()
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert terms.ce.item() == pytest.approx(ce.item(), rel=1e-5)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["soft", "hard", "mixed"])
@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed labels"])
def test_of_parallel_heads_one_learns_labels_and_the_other_the_teacher(target, mixed):
    """loss = (1-α)·CE(first) + α·guidance(second), so that each head's gradient is that of its own term alone."""
    from dbscale.data import MixTarget

    torch.manual_seed(2)
    labels, teacher_logits = torch.randint(0, 7, (9,)), 3 * torch.randn(9, 7)
    wanted = MixTarget(labels, labels.flip(0), 0.3) if mixed else labels
    settings = Distill(alpha=0.4, temperature=2.5, target=target, head="parallel")
    first, second = (torch.randn(9, 7).requires_grad_() for _ in range(2))

    objective = losses._DistillObjective(settings, 0.1, lambda _: teacher_logits, None, "auto")
    terms = objective(lambda _: (first, second), torch.empty(0), wanted)
    terms.loss.backward()

    aim = dense(wanted, 7, 0.1) if mixed else labels
    ce = torch.nn.functional.cross_entropy(first, aim, label_smoothing=0.0 if mixed else 0.1)
    soft, hard = (
        _soft_term(second, teacher_logits, 2.5), torch.nn.functional.cross_entropy(second, teacher_logits.argmax(1))
    )  # fmt: skip
    guided = {"soft": soft, "hard": hard, "mixed": (soft + hard) / 2}[target]
    assert terms.loss.item() == pytest.approx((0.6 * ce + 0.4 * guided).item(), rel=1e-5)
    assert terms.ce.item() == pytest.approx(ce.item(), rel=1e-5)
    expected = [torch.autograd.grad(0.6 * ce, first)[0], torch.autograd.grad(0.4 * guided, second)[0]]
    torch.testing.assert_close([first.grad, second.grad], expected, rtol=1e-4, atol=1e-6)


def test_distilled_deit_learns_from_a_plain_teacher_with_other_tokens(bench):
    """Two prefix tokens against one, two heads of the classifier, three attention heads against two."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4}
    student = TimmModel(kind="timm", name="deit_tiny_distilled_patch16_224", kwargs=sizes)
    teacher = bench.cell()
    settings = Distill(alpha=0.5, attention=Attention(layers="all", head_map="matrix"), head="parallel")
    cell = bench.cell("distill", teacher=teacher, model=student, distill=settings)
    bench.run(teacher)
    outcome = bench.run(cell)
    assert outcome.status == "done", outcome.reason
    child = bench.cell("finetune", init=cell, model=student)
    outcome = bench.run(child)
    assert outcome.status == "done", outcome.reason
    assert outcome.row.arm == "distilled"
    weights = bench.weights(child)
    assert weights["head.weight"].shape == weights["head_dist.weight"].shape == (3, 24)


TERMS = ("loss", "ce", "kl", "attention_kl")
LOGITS_AND_MAPS = Distill(alpha=0.5, temperature=3.0, attention=Attention(beta=20.0, layers="all", head_map="repeat"))


def distilled(bench: Any, backend: str) -> tuple[Any, list[dict[str, Any]]]:
    """Row and metrics of a student of two heads that a teacher of one has taught, logits and maps."""
    teacher = bench.cell(model=DeiT(heads=1, head_width=8, depth=2, patch_size=4))
    student = bench.cell("distill", teacher=teacher, distill=LOGITS_AND_MAPS)
    resources = Resources(zero_stage=None, threads=1, kd_backend=backend)  # pyright: ignore[reportArgumentType]
    for cell in (teacher, student):
        outcome = bench.run(cell, resources)
        assert outcome.status == "done", outcome.reason
    return outcome.row, bench.fingerprint(student)["metrics"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # the tracer's
def test_the_backend_changes_a_run_by_rounding_alone(bench_of):
    row, metrics = distilled(bench_of("auto"), "auto")
    assert (row.kd_backend, row.resources["attention_backend"]) == ("eager", "eager") and row.teacher is not None
    other_row, other_metrics = distilled(bench_of("compile"), "compile")
    assert (other_row.kd_backend, other_row.resources["attention_backend"]) == ("compile", "compile")
    assert other_row.weights_sha256 != row.weights_sha256, "the two did run different code"
    assert len(metrics) == len(other_metrics) > 0
    for line, other in zip(metrics, other_metrics, strict=True):
        for name in TERMS:
            # Maps of a fresh student differ by a KL of 6e-6, of which the textbook form has few digits.
            assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-7), name
    assert other_row.train_loss == pytest.approx(row.train_loss, rel=1e-4)


def test_the_row_says_what_computed_the_losses(bench):
    row, _ = distilled(bench, "eager")
    assert (row.kd_backend, row.resources["attention_backend"]) == ("eager", "eager")


def test_a_run_without_a_teacher_names_no_backend(bench):
    row = bench.run(bench.cell()).row
    assert row.kd_backend is None and "attention_backend" not in row.resources


CACHED = Resources(zero_stage=None, threads=1, teacher_cache=True)
MIXED = {"augment": Augment(crop_padding=1, hflip=0.5, mixup=0.8, cutmix=1.0)}


@pytest.fixture
def asked(monkeypatch):
    """How often a teacher was really asked."""
    calls: list[int] = []
    original = prepare.load_teacher

    def counting(*arguments, **keywords):
        teacher = original(*arguments, **keywords)
        if teacher is not None:
            teacher.register_forward_pre_hook(lambda *_: calls.append(1))
        return teacher

    monkeypatch.setattr(prepare, "load_teacher", counting)
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_are_bitwise_those_without_a_cache(precision, bench_of, asked, stop_after):
    found = {}
    for name, resources in (("without", Resources(zero_stage=None, threads=1)), ("with", CACHED)):
        bench = bench_of(name)
        teacher = bench.cell(seed=1, precision=precision, **MIXED)
        cell = bench.cell("distill", teacher=teacher, precision=precision, **MIXED)
        bench.run(teacher)
        assert bench.run(cell, resources, stop_after(5)).status == "interrupted"
        assert bench.run(cell, resources).status == "done"
        found[name] = bench.fingerprint(cell)
    assert found["with"] == found["without"]
    assert len(asked) == 24


def test_students_that_share_a_stream_ask_once_and_others_anew(bench, asked):
    teacher = bench.cell(seed=1, **MIXED)
    bench.run(teacher)
    students = [DeiT(heads=heads, head_width=8, depth=2, patch_size=4) for heads in (2, 3)]
    for model in students:
        assert bench.run(bench.cell("distill", teacher=teacher, model=model, **MIXED), CACHED).status == "done"
    assert len(asked) == 12, "the second student saw the same pixels"
    for other in ({"augment": Augment(crop_padding=1)}, {**MIXED, "seed": 7}):
        before = len(asked)
        assert bench.run(bench.cell("distill", teacher=teacher, **other), CACHED).status == "done"
        assert len(asked) == before + 12, "other pixels, other answers"
    retrained = bench.cell(seed=2, **MIXED)
    bench.run(retrained)
    before = len(asked)
    bench.run(bench.cell("distill", teacher=retrained, **MIXED), CACHED)
    assert len(asked) == before + 12, "another teacher"


def test_maps_are_always_asked_for(bench, asked):
    teacher = bench.cell(seed=1)
    bench.run(teacher)
    guided = Distill(alpha=0.5, attention=Attention())
    for model in (None, DeiT(heads=3, head_width=8, depth=2, patch_size=4)):
        assert bench.run(bench.cell("distill", teacher=teacher, distill=guided, model=model), CACHED).status == "done"
    assert not (bench.store.root / losses.CACHE_FOLDER).exists()


def test_which_layers_are_compared_and_with_which_of_the_teacher():
    """At the same relative depth: layer 4 of 12 is a third of the way, as is layer 1 of 3."""

    def chosen(layers: Any) -> tuple[int, ...]:
        return losses.chosen_layers(Attention(layers=layers), 4)

    assert (chosen("all"), chosen("last"), chosen((0, -1)), chosen((-4, 3))) == ((0, 1, 2, 3), (3,), (0, 3), (0, 3))
    for wrong in ((4,), (-5,), ()):
        with pytest.raises(TrainingError, match="the student has layers 0 to 3"):
            chosen(wrong)
    assert [losses._twin(layer, 12, 3) for layer in (0, 3, 7, 11)] == [0, 0, 1, 2]
    assert [losses._twin(layer, 3, 12) for layer in (0, 1, 2)] == [3, 7, 11]
    assert [losses._depth(model) for model in (SimpleNamespace(blocks=[1, 2, 3]), SimpleNamespace(blocks=[]), object())] == [
        3, 1, 1]  # fmt: skip


def test_heads_listen_to_those_that_cover_their_share_of_the_width():
    """Halves against thirds: the first half is the first third and half of the second."""
    assert losses.spread_heads(2, 3).tolist() == [pytest.approx([2 / 3, 1 / 3, 0]), pytest.approx([0, 1 / 3, 2 / 3])]
    assert losses.spread_heads(4, 2).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_models_with_other_prefix_tokens_are_compared_on_their_patches():
    one, two = (SimpleNamespace(num_prefix_tokens=number) for number in (1, 2))
    assert losses._common_tokens(two, one) == (slice(2, None), slice(1, None))
    assert losses._common_tokens(one, one) is None and losses._common_tokens(object(), object()) is None


@pytest.mark.parametrize(
    ("settings", "teacher", "maps"),
    [(None, False, False), (Distill(alpha=0.0), False, False), (Distill(alpha=0.1), True, False),
     (Distill(alpha=0.0, attention=Attention(beta=0.0)), False, False),
     (Distill(alpha=0.0, attention=Attention(beta=0.1)), True, True),
     (Distill(alpha=0.1, attention=Attention(beta=0.0)), True, False)],
)  # fmt: skip
def test_a_teacher_is_asked_only_for_terms_that_weigh_something(settings, teacher, maps):
    assert (losses.wants_teacher(settings), losses.wants_maps(settings)) == (teacher, maps)


def test_a_teacher_that_nothing_weighs_is_not_asked(bench):
    def never(images):
        raise AssertionError("asked")

    recipe = bench.cell("distill", teacher=bench.cell(seed=1), distill=Distill(alpha=0.0), label_smoothing=0.0).recipe
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    network: Any = never
    objective = losses.make_objective(recipe, CACHED, network, network)
    found = objective(lambda _: logits, torch.zeros(1), labels)  # type: ignore[arg-type]
    assert float(found.loss) == float(found.ce) == pytest.approx(np.log(1 + np.exp(2.0))) and found.kl is None


def test_maps_that_weigh_nothing_leave_the_logits_alone(bench):
    teacher_logits, logits, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    found = [
        losses.make_objective(
            bench.cell("distill", teacher=bench.cell(seed=1), distill=Distill(alpha=0.5, attention=attention)).recipe,
            CACHED, nn.Identity(), nn.Identity(), lambda _: teacher_logits,
        )(lambda _: logits, torch.zeros(1), labels)  # type: ignore[arg-type]
        for attention in (None, Attention(beta=0.0))
    ]  # fmt: skip
    assert float(found[0].loss) == float(found[1].loss) and found[0].kl is not None and found[1].attention_kl is None


def test_terms_of_plugins_are_added_with_their_weights_on_the_same_forward_pass():
    calls, logits, images = [], torch.tensor([[2.0, 0.0]]), torch.ones(1, 3, 2, 2)
    target = torch.tensor([0])

    def model(inputs):
        calls.append(inputs)
        return logits

    terms = [(0.5, lambda out, labels, seen: out.sum() + labels.sum()), (2.0, lambda out, labels, seen: seen.mean())]
    found = losses._with_terms(lambda net, x, t: losses._plain(net(x), t, 0.0), terms, model, images, target)
    plain = torch.nn.functional.cross_entropy(logits, target)
    assert float(found.loss) == pytest.approx(float(plain) + 0.5 * 2.0 + 2.0 * 1.0)
    assert float(found.ce) == pytest.approx(float(plain)) and len(calls) == 1


def test_each_way_of_computing_an_answer_has_a_folder_of_its_own(bench):
    teacher, network = bench.cell(), nn.Identity()
    other = bench.cell(seed=3)
    bench.run(teacher)
    bench.run(other)

    def of(teacher, device="cpu", **changes):
        return losses.open_cache(
            bench.store, bench.cell("distill", teacher=teacher, **changes).spec(), network, device
        ).folder

    own = of(teacher)
    assert own.parent == bench.store.root / "teacher_logits" and own == of(teacher, seed=9), (
        "students may share answers"
    )
    assert len({own, of(other), of(teacher, device="cuda"), of(teacher, precision="bf16")}) == 4
    with pytest.raises(FileError, match="has no row; train it first"):
        of(bench.cell(seed=4))


def test_the_last_bit_of_a_pixel_is_another_question_and_damage_is_asked_again(tmp_path):
    network, calls = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    teacher, images = CachedTeacher(network, tmp_path / "kept"), torch.rand(2, 3, 2, 2)
    with torch.no_grad():
        first = teacher(images)
        assert torch.equal(teacher(images.clone()), first) and len(calls) == 1
        changed = images.clone()
        changed.view(-1).view(torch.int32)[5] ^= 1
        teacher(changed)
        teacher(images.reshape(2, 3, 4, 1))
        assert len(calls) == 3
        for path in (tmp_path / "kept").iterdir():
            path.write_bytes(path.read_bytes()[:-5])
        assert torch.equal(teacher(images), first) and len(calls) == 4
