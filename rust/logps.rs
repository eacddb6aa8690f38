//! Masked log-probs of given logits on the CPU: the same definition as `cuda/`.
