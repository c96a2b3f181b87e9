"""The neural tangent kernel of any PyTorch model: a plan, four kinds, bounded memory, batch statistics, bf16.

    python examples/kernel_of_your_model.py

The model is an ordinary module with what engines find hard: a position embedding that is a bare parameter,
attention, one block applied twice, BatchNorm. Put yours in its place. Ten seconds on one core.
"""

import torch
from torch import Tensor, nn

import tangentlab as tl


class Yours(nn.Module):
    """A convolutional stem, then one transformer block applied twice to its 16 positions."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, padding_mode="reflect", bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(0.02 * torch.randn(16, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.block(self.block(tokens)).mean(1))
        return logits


torch.manual_seed(0)
model, x = Yours(), torch.rand(48, 3, 16, 16)
for _ in range(20):
    model(x)  # gives BatchNorm running statistics; the mode is left at training, the engine minds it itself

print(tl.kernels.plan(model, x, kind="class", memory="64MiB"), end="\n\n")

for kind in ("full", "class", "trace", "pseudo"):
    print(f"{kind:7}{list(tl.ntk(model, x, kind=kind).shape)}")
print("between two sets  ", list(tl.ntk(model, x[:40], x[40:], kind="class").shape))


def difference(K: Tensor, reference: Tensor) -> float:
    """‖K − reference‖ / ‖reference‖."""
    return float((K - reference).norm() / reference.norm())


K = tl.ntk(model, x, kind="class")
small = tl.ntk(model, x, kind="class", memory="6MiB")
print("within 6 MiB:", str(tl.kernels.plan(model, x, kind="class", memory="6MiB")).splitlines()[1])
print(f"  difference {difference(small, K):.1e}")
print(f"bf16 products: difference {difference(tl.ntk(model, x, kind='class', products='bf16'), K):.1e}")

batch = tl.ntk(model, x, kind="class", batchnorm="batch")  # derivative through the statistics of all 48
mixed = tl.ntk(model, x, kind="class", batchnorm=("running", "batch"))  # evaluation, training: not symmetric
print(f"from the running kernel: batch {difference(batch, K):.3f}, mixed {difference(mixed, K):.3f}")
