"""AutoTool: tool-use RL with decoupled entropy constraints, on fused log-prob and entropy kernels."""

__version__ = "0.1.0"
