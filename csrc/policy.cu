// Launcher of policy_loss.
#include "policy.cuh"
#include "torch.cuh"

namespace autotool {

void policy_loss(
    const Tensor& logp, const Tensor& old_logp, const Tensor& entropy, const Tensor& advantages,
    const Tensor& cu_seqlens, const Tensor& mask, const Tensor& is_short, double target_short, double target_long,
    double beta_short, double beta_long, const std::optional<Tensor>& gate, double clip_low, double clip_high,
    int64_t normalize, double constant, Tensor loss, Tensor sequence_entropy, Tensor metrics, Tensor grad_logp,
    Tensor grad_entropy, Tensor workspace) {
  const int device = logp.get_device_index();
  STD_TORCH_CHECK(logp.size(0) < INT32_MAX - 64 && advantages.size(0) < INT32_MAX - 512, "too many tokens for one launch");
  const int tokens = static_cast<int>(logp.size(0)), sequences = static_cast<int>(advantages.size(0));
  STD_TORCH_CHECK(workspace.numel() >= policy_workspace(sequences), "workspace is too small");
  const auto floats = [](const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "inputs must be contiguous float32");
    return static_cast<const float*>(t.const_data_ptr());
  };
  const torch::stable::accelerator::DeviceGuard guard(device);
  const PolicyLoss p = {
      floats(logp), floats(old_logp), floats(entropy), floats(advantages), make_integers(cu_seqlens, "cu_seqlens"),
      make_integers(is_short, "is_short"), static_cast<const bool*>(mask.const_data_ptr()), tokens, sequences,
      static_cast<float>(target_short), static_cast<float>(target_long), static_cast<float>(beta_short),
      static_cast<float>(beta_long), gate.has_value() ? floats(*gate) : nullptr, static_cast<float>(clip_low),
      static_cast<float>(clip_high), static_cast<int>(normalize), constant, data<float>(loss),
      data<float>(sequence_entropy), data<float>(metrics), data<float>(grad_logp), data<float>(grad_entropy),
      data<double>(workspace)};
  if (has_clusters(device))
    launch(
        policy_loss<true>, kPolicyBlocks, kPolicyThreads, kPolicyShared, device, kPolicyBlocks, false, p);
  else
    launch(policy_loss<false>, kPolicyBlocks, kPolicyThreads, kPolicyShared, device, 0, true, p);
}

}  // namespace autotool
