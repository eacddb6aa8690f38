"""The theory of preferences as functions: Bradley-Terry, Plackett-Luce, KL divergences, the optimal
policy.

NumPy alone, except for `reward_loss` and the divergences of tensors.
"""

from dpo_ext.preference.policy import implied_reward, kl_from_samples, log_partition, optimal_policy
from dpo_ext.preference.strengths import StrengthFit, bt_fit, bt_probability, plackett_luce_fit
from dpo_ext.preference.tensors import kl_divergence, reward_loss

__all__ = [
    "StrengthFit",
    "bt_fit",
    "bt_probability",
    "implied_reward",
    "kl_divergence",
    "kl_from_samples",
    "log_partition",
    "optimal_policy",
    "plackett_luce_fit",
    "reward_loss",
]
