"""What the images of a training look like, in a few numbers that stay with its weights: is a new image like them?"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import mahalanobis
from torch import Tensor

PAIRS = 32  # of each training domain


def statistics(image: Tensor) -> np.ndarray:
    """Of an image `(1, *S)` in [0, 1]: mean, spread, dark and bright shares, log gradient at three scales."""
    pool = F.avg_pool2d if image.dim() == 3 else F.avg_pool3d
    numbers = [image.mean(), image.std(), (image < 0.05).float().mean(), (image > 0.95).float().mean()]
    for _ in range(3):
        steps = [image.diff(dim=axis).abs().mean() for axis in range(1, image.dim())]
        numbers.append(torch.log(torch.stack(steps).mean() + 1e-4))
        image = pool(image, 2)
    return torch.stack(numbers).double().numpy()


def seen(dataset, numbers: range) -> dict[str, dict]:
    """By domain of a training: mean and inverse covariance of its images' statistics, and how far the farthest is.

    numbers: of the pairs that the training has read, so that no damaged file can stop it at its very end.
    """
    found, domains = {}, getattr(dataset, "domains", [dataset])  # a mixture takes its domains in turn
    for turn, domain in enumerate(domains):
        pairs = [dataset.training_pair(i) for i in numbers[: PAIRS * len(domains)] if i % len(domains) == turn]
        if not pairs:  # fewer pairs than domains
            continue
        table = np.array([statistics(image) for pair in pairs for image in (pair.moving, pair.fixed)])
        covariance = np.cov(table.T) + np.diag(0.05 * table.var(axis=0) + 1e-6)
        of = {"mean": table.mean(axis=0).tolist(), "inverse": np.linalg.inv(covariance).tolist()}
        found[domain.name] = of | {"reach": float(max(mahalanobis(row, of["mean"], of["inverse"]) for row in table))}
    return found


def unlike(images: list[Tensor], domains: dict[str, dict]) -> tuple[float, str]:
    """How far the images are from the nearest training domain, in its own images' largest distance; and which it is.

    The Mahalanobis distance of `statistics`, of the image that is farther: above 1 no training image was as far.
    """
    rows = [statistics(image) for image in images]
    away = {name: [mahalanobis(row, of["mean"], of["inverse"]) for row in rows] for name, of in domains.items()}
    return min((float(max(away[name])) / of["reach"], name) for name, of in domains.items())
