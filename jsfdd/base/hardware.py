"""Peak speed and memory of accelerators, from their data sheets, and a description of the machine that measured a figure."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

# JAX's name of a device kind -> (memory in GB, dense bfloat16 TFLOP/s). TPU figures come from the page of each version
# under docs.cloud.google.com/tpu/docs, NVIDIA's from the SXM data sheets (half of the figures with sparsity).
KNOWN_DEVICES = {
    "TPU v4": (32, 275),
    "TPU v5 lite": (16, 197),
    "TPU v5": (95, 459),
    "TPU v6 lite": (32, 918),
    "TPU7x": (96, 1153),  # half a chip, as JAX counts them
    "NVIDIA A100-SXM4-80GB": (80, 312),
    "NVIDIA H100 80GB HBM3": (80, 989),
    "NVIDIA H200": (141, 989),
    "NVIDIA B200": (180, 2250),
}


def peak_flops(mesh: Mesh) -> float | None:
    """Peak dense bfloat16 FLOP/s of all devices of the mesh together; None for a device kind that the table lacks."""
    device = KNOWN_DEVICES.get(mesh.devices.flat[0].device_kind)
    return None if device is None else mesh.devices.size * device[1] * 1e12


def describe_hardware() -> dict:
    """The machine that a figure was measured on: platform, device kind and count, host cores, JAX version."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
    }
