"""Rewards: what a picture is worth, for GRPO and for evaluation. One file a reward, one interface (`base`), docs/rewards.md."""

from .base import DIFFERENTIABLE, REWARDS, Reward, RewardError, RewardSettings, check_settings, combine, load_reward, read_settings, score, score_differentiably, settings_of
from .scorer import Scorer

__all__ = ["DIFFERENTIABLE", "REWARDS", "Reward", "RewardError", "RewardSettings", "Scorer", "check_settings", "combine",
           "load_reward", "read_settings", "score", "score_differentiably", "settings_of"]
