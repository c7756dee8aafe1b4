"""TRL's GRPOTrainer on the fused kernel: log-probs and entropies without logits, forward or backward.

    from fused_grpo import FusedGRPOTrainer      # in place of trl.GRPOTrainer, same arguments

Text models with a linear head, in one process or under DDP, with or without an adapter. Everything else (images, the
auxiliary loss of experts, sharded parameters, a head that caps or scales its logits) goes to TRL's own code.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from autotool_kernels import linear_logp_entropy
from trl import GRPOTrainer


class FusedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose per-token log-probs and entropies come from `linear_logp_entropy`."""

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **others,
    ):
        """(log-probs [B, T], entropies [B, T] or None, None) of the last T = `logits_to_keep` tokens, 0 on padding."""
        inner = self.accelerator.unwrap_model(model)
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # of an adapter
        if compute_aux_loss or any(value is not None for value in others.values()) or not _plain_head(self, inner):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **others,
            )
        head = inner.get_output_embeddings()
        logps, entropies = [], []
        size = batch_size or len(input_ids)
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            with self.accelerator.autocast(), _hidden_states(inner) as caught:
                # The wrapped model is called, so that DDP sees the pass; one position's logits are not used.
                model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
                hidden = caught[0][:, -logits_to_keep - 1 : -1]
                target = ids[:, -logits_to_keep:].masked_fill(mask[:, -logits_to_keep:] == 0, -100)
                out = linear_logp_entropy(
                    hidden.flatten(0, 1),
                    head.weight,
                    target.flatten(),
                    bias=head.bias,
                    temperature=self.temperature,
                )
            logps.append(out.logp.view_as(target))
            entropies.append(out.entropy.view_as(target))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None


def _plain_head(trainer, model) -> bool:
    """Whether logits are `hidden @ weight.T + bias` and the weight is here in full."""
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    special = any(getattr(text, name, None) for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"))
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return isinstance(head, torch.nn.Linear) and not special and not sharded


@contextmanager
def _hidden_states(model):
    """Collects what the decoder's body returns, [B, L, H], while the model is called."""
    caught = []

    def keep(_module, _inputs, output):
        caught.append(output[0])

    hook = model.get_decoder().register_forward_hook(keep)
    try:
        yield caught
    finally:
        hook.remove()
