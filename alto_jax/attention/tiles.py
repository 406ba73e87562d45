"""What the kernels of Pallas (Triton) here share: where they run, and the words of a softmax over tiles."""

from typing import Any

import jax
import jax.numpy as jnp

from alto_jax.attention import cudnn

Array = jax.Array
NEVER = -1e30
LOG2_E = 1.4426950408889634  # exponentials are powers of two there


def why_not(device: Any) -> str:
    """Why Triton's kernels do not run on a device; "" if they do."""
    capability = cudnn.capability(device)
    if capability is None:
        return f"these kernels want an NVIDIA GPU, not the platform {device.platform!r}"
    if capability < (8, 0):
        return f"these kernels want compute capability 8.0, this device has {device.compute_capability}"
    return ""


def dot(a: Array, b: Array) -> Array:
    """a [M, K] · b [K, N] → float32[M, N]."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
