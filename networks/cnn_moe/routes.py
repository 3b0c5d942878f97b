"""Which expert every image of a batch takes at each routing site: plain values that are passed to the layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Rearranged(torch.autograd.Function):
    """batch[order], where back undoes it: the gradient is a gather as well, and keeps its layout."""

    @staticmethod
    def forward(ctx, batch: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return batch[order]

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return slope[back], None, None


@dataclass(frozen=True)
class Share:
    """What one expert does: the rows of the batch that it sees, and what its answer to each is multiplied by ([n];
    None: by 1, with no gradient to the weight)."""

    expert: int
    rows: slice | Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class Route:
    """Of a batch [B, ...] at one site. The shares of a one-hot route are consecutive slices that cover the batch after
    it has been put into `order` (None: it is in that order); those of a weighted one are rows that may overlap."""

    shares: tuple[Share, ...]
    one_hot: bool
    order: Tensor | None = None
    back: Tensor | None = None

    def sort(self, batch: Tensor) -> Tensor:
        return batch if self.order is None else Rearranged.apply(batch, self.order, self.back)

    def unsort(self, batch: Tensor) -> Tensor:
        return batch if self.back is None else Rearranged.apply(batch, self.back, self.order)

    def split(self, batch: Tensor) -> Sequence[Tensor]:
        """Of a one-hot route the rows of a sorted batch that take each expert."""
        if len(self.shares) == 1:
            return [batch]
        return batch.split([share.rows.stop - share.rows.start for share in self.shares])

    def apart(self, batch: Tensor) -> "list[tuple[Tensor, Route]]":
        """The same, with the route of these rows alone."""
        return [
            (part, Route((Share(share.expert, slice(0, len(part)), share.weight),), True))
            for part, share in zip(self.split(batch), self.shares, strict=True)
        ]

    def sorted(self) -> "Route":
        """The same for a batch that has been sorted already."""
        return Route(self.shares, self.one_hot)


def routes_of(weights: Tensor) -> list[Route]:
    """A route per site from weights [S, B, E]: one-hot where each image has one weight of exactly 1 and others of 0,
    else weighted. The weights' gradient flows through the answers of the experts they belong to. One wait for the
    device."""
    sites, images, experts = weights.shape
    chosen = weights.argmax(dim=2)  # [S, B], the lowest index of equals
    one_hot = (weights.detach().amax(dim=2) == 1).all() & ((weights.detach() != 0).sum(dim=2) == 1).all()
    counts = torch.nn.functional.one_hot(chosen, experts).sum(dim=1)
    *told, whole = torch.cat([counts.flatten(), one_hot[None].long()]).tolist()
    if not whole:
        return [_weighted(one) for one in weights]
    carried = weights.gather(2, chosen[..., None])[..., 0] if weights.requires_grad else None
    return [
        _one_hot(
            chosen[site],
            told[site * experts : (site + 1) * experts],
            None if carried is None else carried[site],
        )
        for site in range(sites)
    ]


def _one_hot(chosen: Tensor, counts: Sequence[int], weight: Tensor | None) -> Route:
    order = chosen.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    weight = None if weight is None else weight[order]
    shares, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            shares.append(Share(expert, rows, None if weight is None else weight[rows]))
            start += count
    return Route(tuple(shares), True, order, back)


def _weighted(weights: Tensor) -> Route:
    """weights [B, E]: an expert sees the images that give it any weight."""
    shares = []
    for expert, column in enumerate(weights.unbind(dim=1)):
        rows = column.detach().nonzero()[:, 0]
        if len(rows):
            shares.append(Share(expert, rows, column[rows]))
    return Route(tuple(shares), False)
