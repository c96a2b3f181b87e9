import pytest
import torch
from torch import nn

from tangentlab import modes
from tangentlab.errors import ConfigError


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
    model.train()
    model[2].eval()  # a mixed mode, to be put back submodule by submodule
    return model


def snapshot(model: nn.Module) -> tuple[list[bool], list[torch.Tensor]]:
    return [m.training for m in model.modules()], [b.clone() for b in model.buffers()]


def assert_as_before(model: nn.Module, before: tuple[list[bool], list[torch.Tensor]]) -> None:
    assert [m.training for m in model.modules()] == before[0]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before[1], strict=True))


def test_preserved_restores_modes_buffers_gradients_and_flags() -> None:
    model = network()
    before = snapshot(model)
    grad = torch.ones_like(model[0].weight)
    model[0].weight.grad = grad
    with pytest.raises(ZeroDivisionError), modes.preserved(model):  # noqa: PT012
        model.train()
        model(torch.randn(8, 4)).sum().backward(inputs=[model[3].weight])
        model[0].weight.grad = None
        model[0].requires_grad_(False)
        model[1].running_mean = torch.full((6,), 9.0)
        raise ZeroDivisionError
    assert_as_before(model, before)
    assert model[0].weight.grad is grad
    assert model[3].weight.grad is None
    assert all(p.requires_grad for p in model.parameters())


def test_preserved_does_not_write_into_untouched_buffers() -> None:
    model = network()
    versions = [b._version for b in model.buffers()]
    with modes.preserved(model):
        model.eval()(torch.randn(2, 4))
    assert [b._version for b in model.buffers()] == versions


@pytest.mark.parametrize(("statistics", "same"), [("batch", False), ("running", True)])
def test_batchnorm_chooses_the_statistics(statistics: str, same: bool) -> None:
    model = network()
    model[2].p = 0.0
    x = torch.randn(8, 4)
    expected = model.eval()(x)
    model.train()
    before = snapshot(model)
    with modes.batchnorm(model, statistics=statistics):
        found = model(x)
    assert torch.allclose(found, expected) is same
    assert_as_before(model, before)


def test_without_update_the_batch_statistics_leave_no_trace_and_the_output_is_the_same() -> None:
    model = network()
    model[2].p = 0.0
    x = torch.randn(8, 4)
    before = snapshot(model)
    with modes.batchnorm(model, statistics="batch"):
        frozen = model(x)
    assert_as_before(model, before)
    assert int(model[1].num_batches_tracked) == 0
    with modes.batchnorm(model, statistics="batch", update=True):
        moved = model(x)
    assert torch.equal(frozen, moved)
    assert int(model[1].num_batches_tracked) == 1
    assert not torch.equal(model[1].running_mean, before[1][0])


def test_updates_are_asked_for_by_the_innermost_context() -> None:
    model = network()
    assert not modes.updates_buffers(model)
    with modes.batchnorm(model, update=True):
        assert modes.updates_buffers(model)
        assert not modes.updates_buffers(network())
        with modes.batchnorm(model, update=False):
            assert not modes.updates_buffers(model)
        assert modes.updates_buffers(model)
    assert not modes.updates_buffers(model)


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = "crafted"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.branch == "clean" else -x


def test_a_branch_is_chosen_and_put_back() -> None:
    model = nn.Sequential(Apart(), Apart(), Apart(), nn.Identity())
    model[1].branch = "clean"
    model[3].branch = "git"  # somebody else's word
    x = torch.ones(1)
    with pytest.raises(ZeroDivisionError), modes.branch(model, "crafted"):  # noqa: PT012
        assert model(x) == -1
        with modes.branch(model, "clean"):
            assert model(x) == 1
        assert model(x) == -1
        raise ZeroDivisionError
    assert [m.branch for m in model] == ["crafted", "clean", "crafted", "git"]
    with pytest.raises(ConfigError, match=r"branch 'craft' is unknown; did you mean 'crafted'\?"):
        modes.branch(model, "craft").__enter__()


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"statistics 'bacth' is unknown; did you mean 'batch'\?"):
        modes.batchnorm(network(), statistics="bacth").__enter__()
    with pytest.raises(ConfigError, match="only batch statistics can update"):
        modes.batchnorm(network(), statistics="running", update=True).__enter__()
