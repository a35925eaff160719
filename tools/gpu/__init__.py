"""Run a real CUDA engine on a machine with one Hopper GPU and no network: docs/gpu.md says how."""
