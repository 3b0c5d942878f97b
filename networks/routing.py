"""From gate logits to weights, from their grid to that of the logits, and what training may ask of them."""

import torch
import torch.nn.functional as F


def soft(gate_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Weights of the same shape [..., E, K, h, w]: softmax over the experts of gate logits / temperature."""
    return (gate_logits / temperature).softmax(dim=-4)


def top1(gate_logits: torch.Tensor, temperature: float = 1.0, straight_through: bool = False) -> torch.Tensor:
    """One-hot weights of the same shape [..., E, K, h, w]: all to the largest gate logit, the first of equals.

    straight_through: the gradient to the gate logits is that of `soft` at this temperature (Bengio et al.
    2013, arXiv 1308.3432); else there is none, which is the truth about a step function.
    """
    best = gate_logits.argmax(dim=-4, keepdim=True)
    hard = torch.zeros_like(gate_logits).scatter(-4, best, 1.0)
    if not straight_through:
        return hard
    weights = soft(gate_logits, temperature)
    return hard + (weights - weights.detach())  # adds exactly 0


def spread(weights: torch.Tensor, size: tuple[int, int], hard: bool = False) -> torch.Tensor:
    """Weights [B, E, K, h, w] as [B, E, K, *size], on the same area; those of 1 x 1 stay as they are.

    Bilinear, which keeps them a convex combination: at least 0, summing to 1 over the experts. hard: from the
    nearest, so that one-hot weights stay one-hot.
    """
    if weights.shape[-2:] in ((1, 1), tuple(size)):
        return weights
    mode = {"mode": "nearest-exact"} if hard else {"mode": "bilinear", "align_corners": False}
    return F.interpolate(weights.flatten(1, 2), size=size, **mode).unflatten(1, weights.shape[1:3])


def routing_penalty(weights: torch.Tensor, balance: float = 0.0, entropy: float = 0.0) -> torch.Tensor:
    """What is added to the loss for weights [B, E, K, h, w] of a batch, a scalar.

    balance: times the squared coefficient of variation of the experts' mean weights over the batch, their
        importance (Shazeer et al. 2017, arXiv 1701.06538, equation 6): 0 where all are used alike, E - 1 where
        one has it all. It sees a batch, so it says little about batches of few images.
    entropy: times the mean entropy of the weights of an image (and class, and place) in nats, 0 to log E:
        above 0 the gate is pushed to decide for one expert, below 0 to weigh them alike.

    Both are means over the classes of the gate.
    """
    penalty = weights.new_zeros(())
    if balance:
        importance = weights.mean(dim=(0, 3, 4))  # [E, K]
        mean, variance = importance.mean(dim=0), importance.var(dim=0, correction=0)
        penalty = penalty + balance * (variance / mean.square()).mean()
    if entropy:
        smallest = torch.finfo(weights.dtype).tiny  # 0 log 0 = 0, and its gradient is finite
        logarithms = weights.clamp_min(smallest).log()
        penalty = penalty - entropy * (weights * logarithms).sum(dim=1).mean()
    return penalty
