"""Ensembles: functions of the experts' full-resolution logits, and a network that applies one."""

import math
from collections.abc import Callable

import torch
from torch import nn

from networks.moe import Frozen, check_experts


def mean(expert_logits: torch.Tensor) -> torch.Tensor:
    """Mean of the logits: [B, E, C, H, W] -> [B, C, H, W]."""
    return expert_logits.mean(dim=1)


def max(expert_logits: torch.Tensor) -> torch.Tensor:
    """Largest logit of each class; depends on the constants that logits of a pixel may be shifted by."""
    return expert_logits.amax(dim=1)


def mean_probs(expert_logits: torch.Tensor) -> torch.Tensor:
    """Logarithm of the mean of the probabilities."""
    return expert_logits.log_softmax(dim=2).logsumexp(dim=1) - math.log(expert_logits.shape[1])


def vote(expert_logits: torch.Tensor) -> torch.Tensor:
    """Majority vote, ties by mean probability: log of (votes + mean probability / 2), normalised."""
    experts, classes = expert_logits.shape[1:3]
    choices = expert_logits.argmax(dim=2, keepdim=True)  # [B, E, 1, H, W]
    labels = torch.arange(classes, device=expert_logits.device).view(-1, 1, 1)
    votes = (choices == labels).sum(dim=1)
    halved = mean_probs(expert_logits) - math.log(2)  # stays a logarithm: probabilities underflow
    return torch.logaddexp(votes.to(halved.dtype).log(), halved) - math.log(experts + 0.5)


class Ensemble(nn.Module):
    """Frozen experts under one of the functions above. Raises UserError where experts don't fit together."""

    def __init__(self, experts: dict[str, nn.Module], combine: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.num_classes = next(iter(experts.values())).num_classes
        check_experts(experts, self.num_classes, at_least=1)
        self.expert_names = tuple(experts)
        self.experts = nn.ModuleList(e if isinstance(e, Frozen) else Frozen(e) for e in experts.values())
        self.combine = combine

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, C, H, W]."""
        return self.combine(self.expert_logits(images))

    def expert_logits(self, images: torch.Tensor) -> torch.Tensor:
        """[B, E, C, H, W], what `combine` takes; each expert run once."""
        return torch.stack([expert(images) for expert in self.experts], dim=1)
