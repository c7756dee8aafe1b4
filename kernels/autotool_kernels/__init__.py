"""Fused log-prob, entropy, policy-loss and sampling ops, callable from any PyTorch trainer.

Each op has a PyTorch backend (every device, float64-capable), a Triton kernel, and where it earns its place
a CUDA C++ one; `backends()` says what is available here and why not. Imports neither the trainer nor
transformers.
"""

from .api import linear_logp_entropy, logits_logp_entropy, policy_loss, sample_logp_entropy
from .chunked import Chunk, chunked_policy_step
from .dispatch import Backend, Choice, backends, choose
from .results import ChunkedStep, LogpEntropy, PolicyLoss, SampledTokens
from .vocab_parallel import merge_vocab_parallel, vocab_parallel_linear_logp_entropy

__all__ = [
    "Backend",
    "Choice",
    "Chunk",
    "ChunkedStep",
    "LogpEntropy",
    "PolicyLoss",
    "SampledTokens",
    "backends",
    "choose",
    "chunked_policy_step",
    "linear_logp_entropy",
    "logits_logp_entropy",
    "merge_vocab_parallel",
    "policy_loss",
    "sample_logp_entropy",
    "vocab_parallel_linear_logp_entropy",
]
