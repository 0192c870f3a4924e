"""NVIDIA's data-centre GPUs as XLA's compiler wants them described, so that it compiles for one that is not there.

The fields are those of XLA's `GpuTargetConfigProto`; the figures are the chips' own, from their data sheets and CUDA's
tables of compute capabilities.
"""

from __future__ import annotations

from typing import NamedTuple


class GpuKind(NamedTuple):
    """A chip: what a driver would say of it."""

    name: str
    capability: int  # the major number; the minor one is 0
    cores: int
    memory: int  # bytes
    bandwidth: float  # bytes a second
    l2: int  # bytes
    clock: float  # GHz


KINDS = {
    "h100": GpuKind("NVIDIA H100 80GB HBM3", 9, 132, 84_942_979_072, 3.35e12, 50 << 20, 1.98),
    "h200": GpuKind("NVIDIA H200", 9, 132, 151_397_597_184, 4.8e12, 50 << 20, 1.98),
    "b200": GpuKind("NVIDIA B200", 10, 148, 191_514_411_008, 7.7e12, 126 << 20, 1.965),
}


def target_config(kind: GpuKind) -> str:
    """The text proto of a chip. What every chip from H100 to B200 has alike is written out; versions are CUDA 13's."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: {kind.cores}  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: {kind.bandwidth:.0f}  l2_cache_size: {kind.l2}
  clock_rate_ghz: {kind.clock}  device_memory_size: {kind.memory}
  cuda_compute_capability {{ major: {kind.capability}  feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"  name: "{kind.name}"  device_address_bits: 64  ecc_enabled: true
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10 }}
device_description_str: "{kind.name}"
"""
