"""The top of the kernel's spectrum of a model too large for its Gram matrix to be worth it.

    python examples/spectrum_of_a_large_model.py          # ViT-B/16, 86 million parameters: two minutes
    python examples/spectrum_of_a_large_model.py --small  # seconds

The model is somebody else's: transformers' vision transformer, with the weights that it starts with. Nothing
of it is changed, and no kernel is formed.
"""

import sys
import time

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import tangentlab as tl

small = "--small" in sys.argv
size = 32 if small else 224
config = ViTConfig()  # ViT-B/16
if small:
    config = ViTConfig(
        image_size=size,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
    )
config.num_labels = 10


class Logits(nn.Module):
    """The model's logits [n, C], for it returns an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


torch.manual_seed(0)
model = Logits(ViTForImageClassification(config))
x = torch.rand(4, 3, size, size)

op = tl.NTKOperator(model, x, memory="8GiB")
parameters = sum(p.numel() for p in model.parameters())
print(f"{parameters:,} parameters; Θ is {op.shape[0]} × {op.shape[1]}, and never formed")

started = time.perf_counter()
# Its outputs have nearly the same kernel, so that the next eigenvalues are near and take many more products.
found = tl.top_eigenpairs(op, 1, tolerance=0.01)
for value, error in zip(found.values.tolist(), found.errors.tolist(), strict=True):
    print(f"eigenvalue {value:.6g} ± {error:.2g}")
print(f"{found.products} products in {time.perf_counter() - started:.1f} s")

trace = tl.metrics.estimate_trace(op, vectors=5)
print(f"trace {trace.value:.5g}, 95 % interval {trace.low:.5g} … {trace.high:.5g}, {trace.products} products")
print(f"the first explains {100 * float(found.values[0]) / trace.value:.0f} % of it")
