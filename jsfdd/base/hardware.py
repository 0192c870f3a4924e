"""What devices can do, as their makers state it, and what a figure was measured on."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

# Device kind as JAX names it -> (memory in GB, dense bfloat16 TFLOP/s), as their makers state them: a page per version
# under docs.cloud.google.com/tpu/docs for TPUs, the data sheets for NVIDIA's SXM modules (half of their figures with sparsity).
KNOWN_DEVICES = {
    "TPU v4": (32, 275),
    "TPU v5 lite": (16, 197),
    "TPU v5": (95, 459),
    "TPU v6 lite": (32, 918),
    "NVIDIA A100-SXM4-80GB": (80, 312),
    "NVIDIA H100 80GB HBM3": (80, 989),
    "NVIDIA H200": (141, 989),
}


def peak_flops(mesh: Mesh) -> float | None:
    """FLOP/s of all the mesh's devices together in dense bfloat16, as their makers state it; None of an unknown kind."""
    known = KNOWN_DEVICES.get(mesh.devices.flat[0].device_kind)
    return None if known is None else mesh.devices.size * known[1] * 1e12


def describe_hardware() -> dict:
    """What a figure was measured on: platform, device kind and count, host cores."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
    }
