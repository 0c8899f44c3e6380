"""The fast linear probe: ridge regression on features that are seen once, in closed form.

`python -m eval.linear_probe --protocol ridge` takes seconds where the papers' protocol takes hours. Features
are cached and not augmented; they are standardised with the statistics of the training images (the BatchNorm
without affine of the papers' probe), and of them only a D x D matrix is kept, so the data may have any size.
There is nothing to tune and nothing is drawn: the same command gives the same number. These numbers compare
with one another only, not with the papers'.

Dimension key: B batch, D width, K classes, n images.
"""

import math

import torch
import torch.nn.functional as F

from eval.protocol import frozen_tokens, pool_tokens

# Added to the diagonal of the correlation matrix of the features, whose own diagonal is 1. In terms of the
# sum over n images: RIDGE * n. Fixed, so that no number was chosen by looking at the test images.
RIDGE = 1e-2


def extract(vit, images, pool, config, processes):
    """Yields features (B, D) float64 and labels (B,), on the CPU, of this process's share of `images`."""
    for tokens, labels in frozen_tokens(vit, images, config.micro_batch or 256, config, processes):
        yield pool_tokens(tokens, pool, math.prod(vit.grid)).cpu().double(), labels


def fit_ridge(batches, num_classes, ridge=RIDGE, total=lambda tensor: tensor):
    """Ridge regression of one-hot labels y on standardised features z, in one pass over (x, labels) batches.

    Minimises mean |z W + b - y|^2 + ridge |W|^2 with z = (x - mean) / sqrt(variance + 1e-6) over all x. That
    takes no more than sums over the images: of x, y, x x^T and x y^T. `total` adds up those of all processes.
    Returns (weight (D, K), bias (K,)) float64, for x itself: the standardisation is folded in.
    """
    n, x_sum, y_sum, xx, xy = torch.zeros((), dtype=torch.float64), 0, 0, 0, 0
    for features, labels in batches:
        targets = F.one_hot(labels, num_classes).double()  # (B, K)
        n += len(features)
        x_sum = x_sum + features.sum(dim=0)  # (D,)
        y_sum = y_sum + targets.sum(dim=0)  # (K,)
        xx = xx + features.T @ features  # (D, D)
        xy = xy + features.T @ targets  # (D, K)
    n, x_sum, y_sum, xx, xy = (total(part) for part in (n, x_sum, y_sum, xx, xy))
    mean, share = x_sum / n, y_sum / n
    covariance = xx / n - mean.outer(mean)  # (D, D)
    std = (covariance.diagonal() + 1e-6).sqrt()
    correlation = covariance / std.outer(std)
    cross = (xy / n - mean.outer(share)) / std[:, None]  # (D, K)
    correlation.diagonal().add_(ridge)
    weight = torch.linalg.solve(correlation, cross) / std[:, None]  # (D, K)
    return weight, share - mean @ weight


def count_right(batches, weight, bias):
    """How many images in (features, labels) batches have their largest output at their label, as a tensor."""
    return sum((features @ weight + bias).argmax(dim=1).eq(labels).sum() for features, labels in batches)


def ridge_probe(vit, train, val, pool, config, processes):
    """Per cent of `val` that the ridge classifier of `train` gets right on the frozen features of `vit`."""
    def total(tensor):  # NCCL adds on GPUs; a single process may have no float64 there
        return processes.sum(tensor.to(processes.device)).cpu() if processes.world > 1 else tensor

    weight, bias = fit_ridge(extract(vit, train, pool, config, processes), len(train.classes), total=total)
    return 100 * int(total(count_right(extract(vit, val, pool, config, processes), weight, bias))) / len(val)
