"""What operations cost on a class of devices: the table by which a plan chooses, and its measurement.

The table holds round figures for a class of devices, so that plans are the same on every machine of it;
:func:`measured` replaces them by figures of the device at hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentlab.kernels.products import formed, outer


@dataclass(frozen=True)
class Costs:
    """Rates of one device.

    Attributes:
        source: "table" or "measured".
        product: flop/s of large matrix products a bᵀ in float32.
        batched: flop/s of batched products of the sizes of per-example gradients, long sums.
        single: flop/s of the same in single precision, example by example, from about ten megaflop each.
        convolution: flop/s of weight gradients of convolutions of a single example, images of 16×16 and more.
        grouped: the same with many examples as groups of one call, at most 32 channels.
        forward: flop/s of a network's forward and backward.
        bandwidth: bytes/s that elementwise work moves.
        call: seconds that a call takes whatever it does.
        workspace: elements beyond which more room for slices of gradients gains nothing.
        double, half: speed of float64 and of bf16 (TF32) products relative to float32.
    """

    source: str
    product: float
    batched: float
    single: float
    convolution: float
    grouped: float
    forward: float
    bandwidth: float
    call: float
    workspace: int
    double: float
    half: float

    def speed(self, dtype: torch.dtype, products: str | None) -> float:
        """Relative to float32."""
        if dtype == torch.float64:
            return self.double
        return self.half if products is not None else 1.0

    def to_json(self) -> dict[str, object]:
        """The rates by name."""
        return asdict(self)


# One core of a server CPU with AVX-512, and a data-centre GPU.
_CORE = Costs("table", 100e9, 80e9, 140e9, 140e9, 140e9, 140e9, 6e9, 15e-6, 2**28, 0.45, 2.0)
_GPU = Costs("table", 40e12, 15e12, 15e12, 1e12, 1e12, 25e12, 2e12, 10e-6, 2**28, 0.5, 6.0)


def table(device: torch.device) -> Costs:
    """The rates of the device's class; on a CPU they grow with the threads that PyTorch uses."""
    if device.type == "cuda":
        return _GPU
    threads = torch.get_num_threads()
    rates = ("product", "batched", "single", "convolution", "grouped", "forward", "bandwidth")
    return replace(_CORE, **{name: threads * getattr(_CORE, name) for name in rates})


def measured(device: torch.device) -> Costs:
    """The rates of the device at hand, each the median of a few runs; about a second."""

    def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def seconds(work: Callable[[], object]) -> float:
        work()
        taken = []
        for _ in range(5):
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            taken.append(time.perf_counter() - start)
        return sorted(taken)[len(taken) // 2]

    def weight_gradient(examples: int, channels: int, together: int, groups: int) -> Callable[[], object]:
        x = rand(examples // together, together * channels, 32, 32)
        w = rand(together * channels, channels, 3, 3)

        def work() -> object:
            return [
                torch.ops.aten.convolution_backward(
                    one, one, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [False, True, False]
                )
                for one in x.unsqueeze(1)
            ]

        return work

    G, a, d = rand(256, 2**15), rand(16, 256, 576), rand(16, 64, 256)
    product = seconds(lambda: outer(G, G, G.dtype))
    conv = 2 * 1024 * 9
    into = rand(16, 64, 576)
    image, weight = rand(16, 64, 32, 32), rand(64, 64, 3, 3)
    return Costs(
        source="measured",
        product=2 * 256**2 * 2**15 / product,
        batched=2 * 16 * 256 * 576 * 64 / seconds(lambda: torch.bmm(d, a)),
        single=2 * 16 * 256 * 576 * 64 / seconds(lambda: formed(d, a.transpose(1, 2), into)),
        convolution=8 * conv * 64**2 / seconds(weight_gradient(8, 64, 1, 1)),
        grouped=32 * conv * 16**2 / seconds(weight_gradient(32, 16, 32, 32)),
        forward=16 * conv * 64**2 / seconds(lambda: F.conv2d(image, weight, padding=1)),
        bandwidth=3 * G.nbytes / seconds(lambda: G.mul(G)),
        call=seconds(lambda: rand(1).add(1)),
        workspace=table(device).workspace,
        double=product / 2 / seconds(lambda: outer(G[:, ::2].double(), G[:, ::2].double(), torch.float64)),
        half=product / seconds(lambda: outer(G.bfloat16(), G.bfloat16(), torch.float32)),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
