"""A loss of your own: tested, registered, trained to an optimum that is known.

python examples/own_loss.py
"""

import torch
from torch.nn.functional import logsigmoid

from dpo_ext.testing import bradley_terry_world, check_loss_invariants
from dpo_ext.torch import preference_loss, register_loss


@register_loss("capped_dpo", replace=True, text="-log sigmoid(min(beta*D, cap))", paper="none")
def capped_dpo(logps, ref_logps, beta=0.1, cap=8.0):
    """DPO that stops pulling once a pair is apart."""
    ratios = logps - ref_logps
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    return -logsigmoid(margin.clamp(max=cap))


# Hypothesis looks for inputs at which it is not what it claims to be, and prints the smallest.
check_loss_invariants(capped_dpo, only_margin=True, monotone=True)

# By name it is like any loss of the table: weights, parameters for each pair, TRL's metrics.
logps = torch.tensor([[-10.0, -14.0], [-9.0, -8.0]], requires_grad=True)
ref_logps = torch.tensor([[-11.0, -12.0], [-9.0, -9.0]])
out = preference_loss(logps, ref_logps, loss="capped_dpo", beta=torch.tensor([0.1, 0.5]), cap=4.0)
out.loss.backward()
print(out.loss.item(), out.metrics["rewards/margins"])

# In a world of four completions the policy that DPO must reach is known in fractions.
world = bradley_terry_world()
print("the optimum at beta 1:", world.optimum(1))
