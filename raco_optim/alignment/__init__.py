"""Preference alignment of language models, in pure torch."""

from raco_optim.alignment.baselines import amopo_losses, modpo_loss
from raco_optim.alignment.kto import kto_unpaired_loss
from raco_optim.alignment.log_probs import PairLogProbs
from raco_optim.alignment.losses import PreferenceLoss, preference_losses, reward_margins
from raco_optim.alignment.soups import rewarded_soup

__all__ = [
    "PairLogProbs",
    "PreferenceLoss",
    "amopo_losses",
    "kto_unpaired_loss",
    "modpo_loss",
    "preference_losses",
    "reward_margins",
    "rewarded_soup",
]
