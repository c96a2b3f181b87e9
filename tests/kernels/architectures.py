"""Real architectures at tiny sizes, in float64: ours, and those of transformers, timm and torchvision.

transformers builds from a configuration, without a download. The other two are imported where they are
installed. Nothing is imported before a model is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .reference import Inputs
from .zoo import with_statistics


class Logits(nn.Module):
    """The logits of a model that returns them in a container."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.model(*args, **kwargs).logits


def hugging_face(name: str, **settings: object) -> Callable[[], nn.Module]:
    """``name``'s classifier with three labels; attention heads, layers and the like in ``settings``."""

    def build() -> nn.Module:
        family, _, task = name.partition("For")
        config = getattr(importlib.import_module("transformers"), f"{family}Config")
        model = getattr(importlib.import_module("transformers"), f"{family}For{task}")
        return Logits(model(config(num_labels=3, **settings)))

    return build


def timm(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, num_classes=3, **settings)


def torchvision(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module("torchvision").models, name)(num_classes=3, **settings)


def ours(name: str, *shape: int, **settings: object) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("tangentlab.models").MODELS[name](shape, 3, **settings)


def pixels(*shape: int) -> Callable[[int, torch.Generator], Inputs]:
    return lambda n, g: torch.rand(n, *shape, generator=g, dtype=torch.float64)


def text(n: int, g: torch.Generator) -> Inputs:
    """Tokens and a mask of their lengths; 0 pads."""
    lengths = torch.randint(2, 7, (n, 1), generator=g)
    mask = (torch.arange(6) < lengths).long()
    return {"input_ids": torch.randint(1, 20, (n, 6), generator=g) * mask, "attention_mask": mask}


TRANSFORMER = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
LLAMA = TRANSFORMER | {"num_key_value_heads": 1}

# name -> (builder, maker of n examples)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, torch.Generator], Inputs]]] = {
    "PreActResNet-18": (ours("preactresnet18", 3, 8, 8, width=2), pixels(3, 8, 8)),
    "small CNN": (ours("small_cnn", 3, 8, 8, widths=(4, 6), strides=(1, 2), hidden=8), pixels(3, 8, 8)),
    "MLP": (ours("mlp", 3, 4, 4, widths=(8, 6)), pixels(3, 4, 4)),
    "transformers ResNet": (
        hugging_face(
            "ResNetForImageClassification",
            embedding_size=4,
            hidden_sizes=[6, 8],
            depths=[1, 2],
            layer_type="basic",
        ),
        pixels(3, 16, 16),
    ),
    "transformers ViT": (
        hugging_face("ViTForImageClassification", image_size=8, patch_size=4, **TRANSFORMER),
        pixels(3, 8, 8),
    ),
    "transformers ConvNeXt": (
        hugging_face(
            "ConvNextForImageClassification",
            patch_size=2,
            num_stages=2,
            hidden_sizes=[4, 6],
            depths=[1, 2],
            layer_scale_init_value=0.5,
            drop_path_rate=0.2,
        ),
        pixels(3, 8, 8),
    ),
    "transformers Swin": (
        hugging_face(
            "SwinForImageClassification",
            image_size=8,
            patch_size=2,
            embed_dim=4,
            depths=[2],
            num_heads=[2],
            window_size=2,
        ),
        pixels(3, 8, 8),
    ),
    "transformers BERT": (
        hugging_face(
            "BertForSequenceClassification", vocab_size=20, max_position_embeddings=8, **TRANSFORMER
        ),
        text,
    ),
    "transformers BERT, eager attention": (
        hugging_face(
            "BertForSequenceClassification",
            vocab_size=20,
            max_position_embeddings=8,
            attn_implementation="eager",
            **TRANSFORMER,
        ),
        text,
    ),
    "transformers GPT-2": (
        hugging_face(
            "GPT2ForSequenceClassification",
            vocab_size=20,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        text,
    ),
    "transformers Llama": (
        hugging_face(
            "LlamaForSequenceClassification",
            vocab_size=20,
            max_position_embeddings=8,
            pad_token_id=0,
            **LLAMA,
        ),
        text,
    ),
    "timm ResNet": (timm("resnet10t", channels=(8, 8, 12, 12), stem_width=8), pixels(3, 32, 32)),
    "timm ViT": (
        timm("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2),
        pixels(3, 8, 8),
    ),
    "timm ConvNeXt": (
        timm("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 6, 6)),
        pixels(3, 32, 32),
    ),
    "torchvision SqueezeNet": (torchvision("squeezenet1_1"), pixels(3, 32, 32)),
    "torchvision ShuffleNet": (torchvision("shufflenet_v2_x0_5"), pixels(3, 32, 32)),
}

# What a model needs beside the development dependencies.
OPTIONAL = ("timm", "torchvision")


def build(name: str) -> nn.Module:
    """The model, in float64, from a fixed seed, with statistics and biases that training would leave."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = with_statistics(ARCHITECTURES[name][0]()).double()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


def examples(name: str, n: int, seed: int = 2) -> Inputs:
    return ARCHITECTURES[name][1](n, torch.Generator().manual_seed(seed))
