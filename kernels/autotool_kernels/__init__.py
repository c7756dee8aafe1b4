"""Fused log-prob, entropy, policy-loss and sampling ops, callable from any PyTorch trainer.

Each op has a PyTorch backend (every device, float64-capable), a Triton kernel, and where it earns its place
a CUDA C++ one; `backends()` says what is available here and why not. Imports neither the trainer nor
transformers.
"""

from .api import linear_logp_entropy, logits_logp_entropy, policy_loss, sample_logp_entropy
from .dispatch import Backend, Choice, backends, choose
from .results import LogpEntropy, PolicyLoss, SampledTokens

__all__ = [
    "Backend",
    "Choice",
    "LogpEntropy",
    "PolicyLoss",
    "SampledTokens",
    "backends",
    "choose",
    "linear_logp_entropy",
    "logits_logp_entropy",
    "policy_loss",
    "sample_logp_entropy",
]
