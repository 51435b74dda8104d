"""Losses with their reductions, and distances."""

import torch
import torch.nn.functional as F

from .table import cases, normal, uniform

REDUCTIONS = ("mean", "sum", "none")
p = uniform(3, 7, 4, low=0.05, high=0.95)
sign = normal(3, 7, 4).sign()
LOSSES = {
    "mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss,
    "bce logits": lambda a, b, reduction: F.binary_cross_entropy_with_logits(
        a, p, weight=p[0], pos_weight=p[0, 0], reduction=reduction),
    "bce": lambda a, b, reduction: F.binary_cross_entropy(a.sigmoid(), p, p, reduction=reduction),
    "soft margin": lambda a, b, reduction: F.soft_margin_loss(a, sign, reduction=reduction),
    "kl": lambda a, b, reduction: F.kl_div(a, b.softmax(1), reduction=reduction),
    "kl log": lambda a, b, reduction: F.kl_div(a, b, reduction=reduction, log_target=True),
    "gaussian": lambda a, b, reduction: F.gaussian_nll_loss(a, b, p, reduction=reduction),
    "poisson": lambda a, b, reduction: F.poisson_nll_loss(a, p, reduction=reduction),
    "hinge": lambda a, b, reduction: F.hinge_embedding_loss(a, sign, reduction=reduction),
    "ranking": lambda a, b, reduction: F.margin_ranking_loss(a, b, sign, 0.1, reduction=reduction),
    "multilabel": lambda a, b, reduction: F.multilabel_soft_margin_loss(
        a.flatten(0, 1), p.flatten(0, 1), reduction=reduction),
    "cosine": lambda a, b, reduction: F.cosine_embedding_loss(
        a[0], b[0], sign[0, :, 0], 0.2, reduction=reduction),
    "triplet": lambda a, b, reduction: F.triplet_margin_loss(a, b, p, reduction=reduction),
    "huber delta": lambda a, b, reduction: F.huber_loss(
        a, b, reduction=reduction, delta=0.4, weight=p),
    "smooth beta": lambda a, b, reduction: F.smooth_l1_loss(a, b, reduction=reduction, beta=0.3),
    "weighted mse": lambda a, b, reduction: F.mse_loss(a, b, reduction=reduction, weight=p),
    "gaussian one variance": lambda a, b, reduction: F.gaussian_nll_loss(
        a, b, p[:, :, 0], full=True, reduction=reduction),
    "poisson plain": lambda a, b, reduction: F.poisson_nll_loss(
        a.exp(), p, log_input=False, full=True, reduction=reduction),
    "triplet distance": lambda a, b, reduction: F.triplet_margin_with_distance_loss(
        a, b, p, reduction=reduction),
}  # fmt: skip
DISTANCES = {
    "cosine": lambda a, b: [F.cosine_similarity(a, b, d) for d in (0, 1, 2)],
    "pairwise": lambda a, b: (F.pairwise_distance(a, b), F.pairwise_distance(a, b, 1, keepdim=True)),
    "normalize": lambda a, b: [F.normalize(a, p, d) for p in (2, 1, 3) for d in (0, 1, 2)],
    "cdist": lambda a, b: [torch.cdist(a, b[:, :5], p) for p in (1, 2, 2.5, float("inf"))],
    "cdist batch": lambda a, b: (torch.cdist(a[None], b[:1]), torch.cdist(a[0], b)),
}  # fmt: skip

x, y = normal(3, 7, 4), normal(3, 7, 4)


def reduced(loss):
    return lambda a, b: [loss(a, b, reduction=r) for r in REDUCTIONS]


MODULES = {
    m.__class__.__name__: m
    for m in (torch.nn.MSELoss(), torch.nn.CosineSimilarity(1), torch.nn.PairwiseDistance(1.5))
}
cases("loss", {k: reduced(f) for k, f in LOSSES.items()}, x, y)
cases(
    "loss", {"kl of a batch": lambda a, b: F.kl_div(a, b.softmax(1), reduction="batchmean")}, x, y
)
cases("loss", MODULES, x, y, share=3)
cases("distance", DISTANCES, x, y, rtol=1e-11)
