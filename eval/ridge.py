"""The fast linear probe, `python -m eval.linear_probe --protocol ridge`: ridge regression in closed form.

Features are not augmented; they are standardised with the statistics of the training images, as by the
BatchNorm of the papers' probe. Only a D x D matrix of them is kept. Nothing is tuned or drawn.
Dimension key: B batch, D width, K classes."""

import torch
import torch.nn.functional as F

from eval.protocol import frozen_tokens

# Added to the features' correlation matrix, whose diagonal is 1. Fixed: not chosen on the test images.
RIDGE = 1e-2


def extract(vit, images, pool, config, dist):
    """Yields features (B, D) float64 and labels (B,), on the CPU, of this process's share of `images`."""
    for features, labels in frozen_tokens(vit, images, config.micro_batch or 256, config, dist, pool):
        yield features.cpu().double(), labels


def fit_ridge(batches, num_classes, ridge=RIDGE, all_reduce=lambda tensor: tensor):
    """Ridge regression of one-hot labels y on standardised features z, in one pass over (x, labels):
    minimises mean |z W + b - y|^2 + ridge |W|^2 with z = (x - mean) / sqrt(variance + 1e-6). It needs only
    the sums of x, y, x x^T, x y^T over all images; `all_reduce` adds up those of the processes. Returns
    (weight (D, K), bias (K,)) float64, for x itself: the standardisation is folded in."""
    n, x_sum, y_sum, xx, xy = torch.zeros((), dtype=torch.float64), 0, 0, 0, 0
    for features, labels in batches:
        targets = F.one_hot(labels, num_classes).double()  # (B, K)
        n += len(features)
        x_sum = x_sum + features.sum(dim=0)  # (D,)
        y_sum = y_sum + targets.sum(dim=0)  # (K,)
        xx = xx + features.T @ features  # (D, D)
        xy = xy + features.T @ targets  # (D, K)
    n, x_sum, y_sum, xx, xy = (all_reduce(part) for part in (n, x_sum, y_sum, xx, xy))
    mean, share = x_sum / n, y_sum / n
    covariance = xx / n - mean.outer(mean)  # (D, D)
    std = (covariance.diagonal() + 1e-6).sqrt()  # (D,)
    correlation = covariance / std.outer(std)  # (D, D)
    cross = (xy / n - mean.outer(share)) / std[:, None]  # (D, K)
    correlation.diagonal().add_(ridge)
    weight = torch.linalg.solve(correlation, cross) / std[:, None]  # (D, K)
    return weight, share - mean @ weight


def count_right(batches, weight, bias):
    """How many images in (features, labels) batches have their largest output at their label: a tensor."""
    return sum((features @ weight + bias).argmax(dim=1).eq(labels).sum() for features, labels in batches)


def ridge_probe(vit, train, val, pool, config, dist):
    """Per cent of `val` that the ridge classifier of `train` gets right on the frozen features of `vit`."""
    batches = extract(vit, train, pool, config, dist)
    weight, bias = fit_ridge(batches, len(train.classes), all_reduce=dist.all_reduce)  # on the CPU, by gloo
    right = count_right(extract(vit, val, pool, config, dist), weight, bias)
    return 100 * int(dist.all_reduce(right)) / len(val)
