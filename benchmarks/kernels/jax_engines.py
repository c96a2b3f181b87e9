"""neural-tangents on the same networks, weights and images: runs in the environment of JAX alone.

The last release, 0.6.5, names two things that JAX has since moved; both are put back for its structured
derivatives, which then agree with its Jacobian contraction.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax  # type: ignore[import-not-found,unused-ignore]
import jax.numpy as jnp  # type: ignore[import-not-found,unused-ignore]
import neural_tangents as nt  # type: ignore[import-not-found,unused-ignore]
import numpy as np
from jax import lax
from jax._src import source_info_util  # type: ignore[import-not-found,unused-ignore]
from jax.interpreters import ad  # type: ignore[import-not-found,unused-ignore]
from measure import Array, Spec, worker

Weights = dict[str, Any]
ad.source_info_util = source_info_util
ad.config = SimpleNamespace(jax_enable_checks=False)

IMPLEMENTATIONS = {
    "neural-tangents": nt.NtkImplementation.JACOBIAN_CONTRACTION,
    "neural-tangents-structured": nt.NtkImplementation.STRUCTURED_DERIVATIVES,
}
AXES: dict[str, dict[str, Any]] = {
    "full": {"trace_axes": ()},
    "class": {"trace_axes": (), "diagonal_axes": (-1,)},
    "trace": {"trace_axes": (-1,)},
}


def conv(x: Any, w: Any, stride: int = 1, padding: int = 1) -> Any:
    """torch's Conv2d without bias."""
    dimensions = ("NCHW", "OIHW", "NCHW")
    return lax.conv_general_dilated(x, w, (stride,) * 2, ((padding,) * 2,) * 2, dimension_numbers=dimensions)


def conv3(p: Weights, _: Weights, x: Any) -> Any:
    for k in (0, 2, 4):
        x = jax.nn.relu(conv(x, p[f"{k}.weight"], 2) + p[f"{k}.bias"][:, None, None])
    return x.reshape(len(x), -1) @ p["7.weight"].T + p["7.bias"]


def prn18(p: Weights, s: Weights, x: Any) -> Any:
    """tangentlab.models.PreActResNet18 in evaluation mode; s holds BatchNorm's statistics."""

    def normed(x: Any, at: str) -> Any:
        scale = p[f"{at}.weight"] / jnp.sqrt(s[f"{at}.running_var"] + 1e-5)
        shift = p[f"{at}.bias"] - scale * s[f"{at}.running_mean"]
        return jax.nn.relu(x * scale[:, None, None] + shift[:, None, None])

    x = conv(x, p["stem.weight"])
    for k in range(8):
        at, stride = f"blocks.{k}", 2 if k in (2, 4, 6) else 1
        a = normed(x, f"{at}.bn1")
        residual = conv(
            normed(conv(a, p[f"{at}.conv1.weight"], stride), f"{at}.bn2"), p[f"{at}.conv2.weight"]
        )
        shortcut = p.get(f"{at}.shortcut.weight")
        x = (x if shortcut is None else conv(a, shortcut, stride, 0)) + residual
    return normed(x, "bn").mean((2, 3)) @ p["head.weight"].T + p["head.bias"]


def vit_tiny(p: Weights, _: Weights, x: Any, heads: int = 3, depth: int = 12, patch: int = 4) -> Any:
    def linear(x: Any, at: str) -> Any:
        return x @ p[f"{at}.weight"].T + p[f"{at}.bias"]

    def normed(x: Any, at: str) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{at}.weight"]
            + p[f"{at}.bias"]
        )

    n, channels, side, _width = x.shape
    cells = x.reshape(n, channels, side // patch, patch, side // patch, patch).transpose(0, 2, 4, 1, 3, 5)
    x = linear(cells.reshape(n, (side // patch) ** 2, -1), "embed")
    x = jnp.concatenate([jnp.broadcast_to(p["token"], (n, 1, x.shape[-1])), x], 1) + p["position"]
    for k in range(depth):
        at = f"blocks.{k}"
        qkv = linear(normed(x, f"{at}.norm1"), f"{at}.qkv").reshape(n, x.shape[1], 3, heads, -1)
        q, key, v = qkv.transpose(2, 0, 3, 1, 4)
        A = jax.nn.softmax(q @ key.swapaxes(-1, -2) / q.shape[-1] ** 0.5, axis=-1)
        x = x + linear((A @ v).swapaxes(1, 2).reshape(n, x.shape[1], -1), f"{at}.out")
        x = x + linear(
            jax.nn.gelu(linear(normed(x, f"{at}.norm2"), f"{at}.up"), approximate=False), f"{at}.down"
        )
    return linear(normed(x, "norm")[:, 0], "head")


NETWORKS = {"conv3": conv3, "prn18": prn18, "vit-tiny": vit_tiny}


def build(spec: Spec) -> tuple[Callable[[], Array], list[str]]:
    """The call to be measured, compiled by its first use."""
    case = spec["case"]
    with np.load(spec["problem"]) as stored:
        arrays = {name: jnp.asarray(stored[name]) for name in stored.files}
    x = arrays.pop("inputs")
    statistics = {k: v for k, v in arrays.items() if "running" in k or "batches" in k}
    weights = {k: v for k, v in arrays.items() if k not in statistics}
    net = NETWORKS[case["network"]]
    implementation = IMPLEMENTATIONS[spec["engine"]]
    theta = nt.empirical_ntk_fn(
        lambda p, x: net(p, statistics, x), vmap_axes=0, implementation=implementation, **AXES[case["kind"]]
    )
    compiled = jax.jit(lambda x, p: theta(x, None, p))

    def call() -> Array:
        K = np.asarray(compiled(x, weights))
        return np.moveaxis(K, -1, 0) if case["kind"] == "class" else K

    return call, ["neural-tangents", "jax"]


if __name__ == "__main__":
    worker(build)
