"""The probe measures what it says, leaves no trace, and resumes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import tangentlab as tl
from tangentlab import metrics
from tangentlab.errors import ConfigError, KernelError

EPS = 0.2


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3)
    )
    model.train()
    model(torch.rand(16, 1, 8, 8))
    return model


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(9, 1, 8, 8), torch.arange(9) % 3


def attacks() -> dict[str, tl.attacks.Attack | None]:
    return {"clean": None, "fgsm": tl.attacks.FGSM(EPS), "pgd": tl.attacks.PGD(EPS, EPS / 4, 3)}


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def test_values_are_the_metrics_of_the_kernels(model: nn.Module, points: tuple[Tensor, Tensor]) -> None:
    probe = tl.KernelProbe(*points, inputs=attacks())
    first = probe.measure(model, 0, summed_learning_rate=0.0)
    move(model)
    second = probe.measure(model, 10, summed_learning_rate=0.5)
    assert set(second.kernels) == {
        f"{name}/{kind}" for name in ("clean", "fgsm", "pgd", "pgd-once") for kind in ("class", "trace")
    }
    kernel = tl.ntk(model, points[0], kind="class")
    assert torch.equal(second.kernels["clean/class"], kernel)
    assert torch.allclose(second.kernels["clean/trace"], kernel.mean(0))
    found = {k.removeprefix("kernel/clean/class/"): v for k, v in second.values.items() if "clean/class" in k}
    distances = metrics.kernel_distance(first.kernels["clean/class"], kernel)
    assert found["distance_from_previous"] == pytest.approx(float(distances.mean()))
    assert found["distance_from_first"] == found["distance_from_previous"]
    assert found["velocity"] == pytest.approx(float(distances.mean()) / 10)
    angle = sum(math.acos(1 - float(d)) for d in distances) / 3
    assert found["angle_velocity"] == pytest.approx(angle / 10, rel=1e-4)
    assert found["angle_per_learning_rate"] == pytest.approx(angle / 0.5, rel=1e-4)
    assert found["entropy_rank"] == pytest.approx(float(metrics.entropy_rank(kernel).mean()))
    assert found["participation_ratio"] == pytest.approx(float(metrics.participation_ratio(kernel).mean()))
    assert len(found["top_eigenvalues"]) == 9
    assert found["top_eigenvalues"][0] == pytest.approx(
        sum(float(torch.linalg.eigvalsh(k.double())[-1]) for k in kernel) / 3
    )
    matrix = metrics.kernel_specialization(kernel, points[1])
    assert torch.allclose(torch.tensor(found["specialization_matrix"], dtype=torch.float64), matrix)
    assert found["specialization"] == pytest.approx(float(matrix.diagonal().mean()))
    between = metrics.kernel_distance(second.kernels["fgsm/class"], second.kernels["pgd/class"]).mean()
    assert second.values["kernel/fgsm~pgd/class/distance"] == pytest.approx(float(between))
    assert not any("once~" in key or "~pgd-once" in key for key in second.values)


def test_inputs_crafted_once_stay_and_those_crafted_anew_follow(
    model: nn.Module, points: tuple[Tensor, Tensor]
) -> None:
    probe = tl.KernelProbe(*points, inputs=attacks())
    first = probe.measure(model, 0)
    assert torch.equal(first.kernels["pgd/class"], first.kernels["pgd-once/class"])
    again = probe.measure(model, 1)  # nothing moved, and the attack's noise is the same
    assert all(torch.equal(again.kernels[name], kernel) for name, kernel in first.kernels.items())
    assert again.values["kernel/pgd/class/velocity"] == 0
    move(model)
    moved = probe.measure(model, 2)
    assert not torch.equal(moved.kernels["pgd/class"], moved.kernels["pgd-once/class"])


def test_the_model_and_global_state_come_back_as_they_were(
    model: nn.Module, points: tuple[Tensor, Tensor]
) -> None:
    model[1].eval()
    model[0].weight.grad = grad = torch.ones_like(model[0].weight)
    model[3].requires_grad_(False)
    held = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    tl.KernelProbe(*points, inputs=attacks()).measure(model, 0)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
    assert model[0].weight.grad is grad
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_velocity_is_given_over_one_fixed_gap(model: nn.Module, points: tuple[Tensor, Tensor]) -> None:
    probe = tl.KernelProbe(*points)
    for step, expected in [(0, False), (5, True), (10, True), (12, False), (17, True)]:
        values = probe.measure(model, step).values
        assert ("kernel/clean/class/velocity" in values) is expected
        assert ("kernel/clean/class/distance_from_previous" in values) is (step > 0)
    with pytest.raises(ConfigError, match="step=17 does not follow the last snapshot's, 17"):
        probe.measure(model, 17)


def test_snapshots_between_are_described_and_leave_the_others_alone(
    model: nn.Module, points: tuple[Tensor, Tensor]
) -> None:
    plain, dense = (tl.KernelProbe(*points, inputs=attacks()) for _ in range(2))
    with pytest.raises(ConfigError, match="step=0 is the first snapshot; between=True takes one before it"):
        dense.measure(model, 0, between=True)
    for probe in (plain, dense):
        probe.measure(model, 0, summed_learning_rate=0.0)
    move(model)
    early = dense.measure(model, 1, summed_learning_rate=0.1, between=True)
    assert not any("velocity" in name or "previous" in name for name in early.values)
    assert early.values["kernel/clean/class/distance_from_first"] > 0
    move(model)
    a, b = (probe.measure(model, 4, summed_learning_rate=0.4) for probe in (plain, dense))
    assert a.values == b.values
    assert "kernel/clean/class/velocity" in b.values
    assert set(early.kernels) == set(b.kernels)


def test_a_resumed_probe_goes_on(model: nn.Module, points: tuple[Tensor, Tensor]) -> None:
    whole, broken = (tl.KernelProbe(*points, inputs=attacks()) for _ in range(2))
    for probe in (whole, broken):
        probe.load_state_dict(probe.state_dict())  # nothing yet
        probe.measure(model, 0, summed_learning_rate=0.1)
    move(model)
    for probe in (whole, broken):
        probe.measure(model, 3, summed_learning_rate=0.2)
    resumed = tl.KernelProbe(*points, inputs=attacks())
    resumed.load_state_dict(broken.state_dict())
    move(model)
    a, b = (probe.measure(model, 6, summed_learning_rate=0.7) for probe in (whole, resumed))
    assert a.values == b.values
    assert all(torch.equal(a.kernels[k], b.kernels[k]) for k in a.kernels)


def test_bad_settings_are_named(model: nn.Module, points: tuple[Tensor, Tensor]) -> None:
    x, y = points
    with pytest.raises(ConfigError, match=r"y \(8,\) torch.int64; y must hold the labels \[n\]"):
        tl.KernelProbe(x, y[:-1])
    with pytest.raises(ConfigError, match="kind 'clas' is unknown; did you mean 'class'"):
        tl.KernelProbe(x, y, kinds=("clas",))
    with pytest.raises(ConfigError, match="inputs name 'a~b'"):
        tl.KernelProbe(x, y, inputs={"a~b": None})
    with pytest.raises(ConfigError, match="inputs name 'pgd-once'"):
        tl.KernelProbe(x, y, inputs={"pgd-once": None})
    with pytest.raises(ConfigError, match="y must hold the labels"):
        tl.KernelProbe(x, y.float())
    with pytest.raises(ConfigError, match="y holds the label 3; the model has 3 outputs"):
        tl.KernelProbe(x, y + 1).measure(model, 0)
    with pytest.raises(ConfigError, match="x is a list"):
        tl.KernelProbe([1.0], y)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="no parameters"):
        tl.KernelProbe(x, y).measure(nn.Flatten(), 0)


def test_specialization_is_left_out_where_a_class_has_no_example(
    model: nn.Module, points: tuple[Tensor, Tensor]
) -> None:
    values = tl.KernelProbe(points[0], points[1] % 2).measure(model, 0).values
    assert "kernel/clean/class/target_alignment" in values
    assert not any("specialization" in name for name in values)


@pytest.mark.parametrize("context", ["autocast", "inference", "no_grad"])
def test_the_callers_context_does_not_matter(
    model: nn.Module, points: tuple[Tensor, Tensor], context: str
) -> None:
    expected = tl.KernelProbe(*points, inputs=attacks()).measure(model, 0)
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
    }
    with contexts[context]():
        found = tl.KernelProbe(*points, inputs=attacks()).measure(model, 0)
    assert all(torch.equal(found.kernels[name], kernel) for name, kernel in expected.kernels.items())


def test_the_probes_tensors_are_its_own(model: nn.Module, points: tuple[Tensor, Tensor]) -> None:
    x, y = (tensor.clone() for tensor in points)
    probe = tl.KernelProbe(x, y)
    first = probe.measure(model, 0)
    x.zero_()
    first.kernels["clean/class"].zero_()
    assert probe.measure(model, 1).values["kernel/clean/class/distance_from_first"] == 0


def test_the_precision_is_the_models(model: nn.Module, points: tuple[Tensor, Tensor]) -> None:
    single = tl.KernelProbe(*points, inputs=attacks()).measure(model, 0).kernels["pgd/class"]
    double = tl.KernelProbe(*points, inputs=attacks()).measure(model.double(), 0).kernels["pgd/class"]
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, rtol=1e-3, atol=1e-4 * float(double.max()))


def test_the_mode_does_not_matter_and_nan_is_an_error(
    model: nn.Module, points: tuple[Tensor, Tensor]
) -> None:
    in_training = tl.KernelProbe(*points).measure(model.train(), 0).kernels["clean/class"]
    with torch.no_grad():
        in_evaluation = tl.KernelProbe(*points).measure(model.eval(), 0).kernels["clean/class"]
    assert torch.equal(in_training, in_evaluation)
    nn.init.constant_(model[5].weight, float("nan"))
    with pytest.raises(KernelError):
        tl.KernelProbe(*points).measure(model, 0)


def test_a_sketch_is_near_and_says_how_near(model: nn.Module, points: tuple[Tensor, Tensor]) -> None:
    exact, rough = (tl.KernelProbe(*points, inputs=attacks(), sketch=sketch) for sketch in (None, 32))
    measured = []
    for probe in (exact, rough):
        torch.manual_seed(2)
        moved = copy.deepcopy(model)
        probe.measure(moved, 0, summed_learning_rate=0.0)
        move(moved)
        measured.append(probe.measure(moved, 10, summed_learning_rate=0.5))
    true, sketched = measured
    assert {name: K.shape for name, K in true.kernels.items()} == {
        name: K.shape for name, K in sketched.kernels.items()
    }
    groups = tl.kernels.sketched_ntk(moved, points[0], features=32, seed=0)
    assert torch.equal(sketched.kernels["clean/class"], groups.mean(0))
    assert not torch.equal(groups[0], groups[1])
    numbers = {name for name, value in true.values.items() if isinstance(value, float)}
    assert set(sketched.values) == set(true.values) | {f"{name}_interval" for name in numbers}
    inside = 0
    for name in numbers:
        low, high = sketched.values[f"{name}_interval"]
        assert low <= sketched.values[name] <= high
        inside += low <= true.values[name] <= high
    assert 0.85 * len(numbers) < inside
    near = ("entropy_rank", "participation_ratio", "specialization")
    for name in (f"kernel/clean/class/{metric}" for metric in near):
        assert sketched.values[name] == pytest.approx(true.values[name], rel=0.1)
        assert sketched.values[name] != true.values[name]


def test_a_sketching_probe_goes_on(model: nn.Module, points: tuple[Tensor, Tensor]) -> None:
    whole, first, second = (tl.KernelProbe(*points, inputs=attacks(), sketch=16) for _ in range(3))
    for step, probes in ((0, (whole, first)), (5, (whole, first)), (10, (whole, second))):
        if second in probes:
            second.load_state_dict(first.state_dict())
        ours, other = (probe.measure(model, step) for probe in probes)
        assert ours.values == other.values
        move(model)


@pytest.mark.parametrize("sketch", [0, 1.5, "many"])
def test_a_sketch_out_of_range_is_named(sketch: object, points: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ConfigError, match=f"sketch={sketch!r} is out of range"):
        tl.KernelProbe(*points, sketch=sketch)
