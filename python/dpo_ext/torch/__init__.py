"""The torch half: score table, log-probs, losses, loader. Needs torch; nothing needs a GPU."""

from dpo_ext.extras import need

need("torch", "dpo_ext.torch")

from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch.attention import assert_packing_safe
from dpo_ext.torch.audit import audit_first_step
from dpo_ext.torch.forward import ModelScores
from dpo_ext.torch.interface import use_segment_attention
from dpo_ext.torch.loader import PairLoader
from dpo_ext.torch.logps.kl import linear_token_kl, token_kl
from dpo_ext.torch.logps.linear import linear_sequence_logps, linear_token_scores
from dpo_ext.torch.logps.logits import sequence_logps, token_scores, warm_up
from dpo_ext.torch.logps.lowrank import LowRank
from dpo_ext.torch.logps.scores import TokenScores
from dpo_ext.torch.losses.lists import list_loss
from dpo_ext.torch.losses.pairs import PreferenceLoss, preference_loss
from dpo_ext.torch.losses.registry import register_loss
from dpo_ext.torch.losses.result import GroupLoss, UnpairedLoss
from dpo_ext.torch.losses.single import RunningMean, kto_z, unpaired_loss
from dpo_ext.torch.losses.tokens import ld_table, tdpo_kls, wpo_averages
from dpo_ext.torch.pairwise import linear_preference_loss
from dpo_ext.torch.scoring import attach_scoring
from dpo_ext.torch.segments import segment_attention

__all__ = [
    "GroupLoss",
    "LowRank",
    "ModelScores",
    "PairLoader",
    "PreferenceLoss",
    "RunningMean",
    "ScoreTable",
    "TokenScores",
    "UnpairedLoss",
    "assert_packing_safe",
    "attach_scoring",
    "audit_first_step",
    "kto_z",
    "ld_table",
    "linear_preference_loss",
    "linear_sequence_logps",
    "linear_token_kl",
    "linear_token_scores",
    "list_loss",
    "preference_loss",
    "register_loss",
    "segment_attention",
    "sequence_logps",
    "tdpo_kls",
    "token_kl",
    "token_scores",
    "unpaired_loss",
    "use_segment_attention",
    "warm_up",
    "wpo_averages",
]
