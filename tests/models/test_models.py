import pytest
import torch
from torch import nn

from tangentlab.errors import ConfigError, ModelError
from tangentlab.models import (
    MLP,
    MODELS,
    DualBatchNorm2d,
    Normalize,
    NormalizeEach,
    PreActResNet18,
    SmallCNN,
    check_output,
    model_class,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("shape", "classes"), [((1, 8, 8), 10), ((3, 32, 32), 7), ((1, 28, 28), 2)])
def test_every_network_maps_images_to_logits_and_trains(name: str, shape: tuple, classes: int) -> None:
    model = (
        MODELS[name](shape, classes) if name != "preactresnet18" else PreActResNet18(shape, classes, width=4)
    )
    x = torch.rand(3, *shape)
    check_output(model, x, classes)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_preactresnet18_is_the_published_network() -> None:
    model = PreActResNet18((3, 32, 32), 10)
    # kuangliu/pytorch-cifar's PreActResNet18 has 11,171,146; the last BatchNorm of Rice et al. adds 1,024.
    assert sum(p.numel() for p in model.parameters()) == 11_171_146 + 1_024
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 17
    narrow = PreActResNet18((3, 32, 32), 10, width=16)
    assert narrow.head.in_features == 128


def test_a_block_adds_its_shortcut() -> None:
    model = PreActResNet18((1, 8, 8), 2, width=2).eval()
    block = model.blocks[0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 2, 8, 8)
    assert torch.equal(block(x), x)
    assert model.blocks[2].shortcut is not None


def test_settings_of_the_small_networks() -> None:
    model = SmallCNN((1, 9, 9), 4, widths=(2, 3), strides=(2, 2), hidden=0)
    assert isinstance(model.head[0], nn.Linear)
    assert model.head[0].in_features == 3 * 3 * 3
    assert not any(isinstance(m, nn.BatchNorm1d) for m in MLP((4,), 2, batchnorm=False).modules())
    with pytest.raises(ConfigError, match=r"widths \(2, 3\) and strides \(1,\) differ in length"):
        SmallCNN((1, 9, 9), 4, widths=(2, 3), strides=(1,))


def test_normalize_standardizes_channels() -> None:
    x = torch.rand(200, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    pixels = x.transpose(0, 1).flatten(1)
    out = Normalize(pixels.mean(1), pixels.std(1))(x).transpose(0, 1).flatten(1)
    assert torch.allclose(out.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out.std(1), torch.ones(3), atol=1e-5)


def test_normalize_each_standardizes_images() -> None:
    x = torch.rand(5, 2, 4, 4) * torch.arange(5.0).reshape(5, 1, 1, 1) + 3
    out = NormalizeEach()(x)
    assert torch.allclose(out.mean((1, 2, 3)), torch.zeros(5), atol=1e-5)
    assert torch.allclose(out[1:].std((1, 2, 3), correction=0), torch.ones(4), atol=1e-5)
    assert out[0].abs().max() == 0  # an image without contrast has a finite one


@pytest.mark.parametrize("network", [SmallCNN, PreActResNet18])
def test_normalizations_take_the_place_of_batchnorm(network: type) -> None:
    kinds = {"batch": nn.BatchNorm2d, "dual": DualBatchNorm2d, "group": nn.GroupNorm, "none": nn.Identity}
    settings = {"width": 4} if network is PreActResNet18 else {}
    counts = []
    for name, kind in kinds.items():
        model = network((1, 8, 8), 3, normalization=name, **settings)
        counts.append(sum(isinstance(m, kind) for m in model.modules()))
        norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
        assert len(norms) == {"batch": 1, "dual": 2, "group": 1, "none": 0}[name] * counts[0]
        check_output(model, torch.rand(3, 1, 8, 8), 3)
    assert len(set(counts)) == 1
    assert SmallCNN((1, 8, 8), 3, normalization="none").features[0].bias is not None
    with pytest.raises(ConfigError, match="normalization 'layer' is unknown; choose from 'batch', 'dual'"):
        network((1, 8, 8), 3, normalization="layer", **settings)
    with pytest.raises(ConfigError, match="channels in multiples of 4, not 6"):
        SmallCNN((1, 8, 8), 3, widths=(6,), strides=(1,), normalization="group")


def test_import_paths_need_permission() -> None:
    with pytest.raises(ModelError, match="runs code of the package 'torch': add --allow-import torch"):
        model_class("torch.nn:Linear")
    assert model_class("torch.nn:Linear", allow_import=["torch"]) is nn.Linear
    with pytest.raises(ModelError, match="cannot be imported"):
        model_class("torch.nn:Linea", allow_import=["torch"])
    with pytest.raises(ModelError, match="cannot be imported"):
        model_class("torch.absent:X", allow_import=["torch"])
    with pytest.raises(ModelError, match="is a str, not a class or function"):
        model_class("torch.version:git_version", allow_import=["torch"])
    with pytest.raises(ModelError, match=r"model 'smal_cnn' is unknown; did you mean 'small_cnn'\?"):
        model_class("smal_cnn")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(1, 2, 3), r"returns shape \(2, 2, 6, 6\) for 2 examples, not \[n, C\] = \(2, 10\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), r"returns shape \(2, 9\)"),
        (nn.Linear(3, 10), r"fails on inputs of shape \(2, 1, 8, 8\): mat1 and mat2"),
        (nn.LSTM(8, 10), "fails on inputs"),
        (nn.Sequential(nn.Flatten(), nn.LSTM(64, 10)), "returns a tuple, not a tensor"),
    ],
)
def test_a_model_with_another_output_is_named(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_output(model, torch.rand(2, 1, 8, 8), 10)
