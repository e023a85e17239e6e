"""The judge at work: what the attribute classifier says of pictures, and distances in its features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from proxt2i.embedded import ASSETS
from proxt2i.embedded.train_judge import label_names, split_logits, stated, targets


class Judge:
    """Attribute classifier of portraits (trained by `train_judge`), loaded from a transformers ResNet folder."""

    def __init__(self, folder: Path = ASSETS / "judge", device: str | torch.device = "cpu"):
        from transformers import ResNetForImageClassification

        self.model = ResNetForImageClassification.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval().to(device)
        names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        if names != label_names():
            raise ValueError(f"{folder}: this judge knows other attributes than proxt2i.data.portraits draws; train it anew with proxt2i.embedded.train_judge")
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """uint8 [M, 3, H, W] -> predicted value of each attribute int64 [M, A], pooled features float32 [M, 96]."""
        predicted, features = [], []
        for batch in images.split(batch_size):
            pooled = self.model.resnet(batch.to(self.device).float() / 127.5 - 1).pooler_output
            logits = self.model.classifier(pooled)
            predicted.append(torch.stack([z.argmax(1) for z in split_logits(logits)], 1).cpu())
            features.append(pooled.flatten(1).cpu())
        return torch.cat(predicted), torch.cat(features)


def right_attributes(predicted: Tensor, metadata: list[dict]) -> tuple[Tensor, Tensor]:
    """Which attributes are as asked, bool [M, A], and which were asked for at all ("stated"), bool [M, A]."""
    return predicted == targets(metadata), stated(metadata)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features [M, D] and [K, D]: |mu_a - mu_b|² + tr(A + B - 2 (AB)^½).

    tr (AB)^½ is the sum of the square roots of the eigenvalues of A^½ B A^½ (symmetric, so no complex square root).
    """
    a, b = a.double(), b.double()
    if min(len(a), len(b)) < 2:
        raise ValueError("a Fréchet distance needs at least 2 pictures on each side")
    cov_a = torch.cov(a.T)
    return distance_of_gaussians(a.mean(0) - b.mean(0), cov_a, torch.cov(b.T), symmetric_root(cov_a))


def symmetric_root(covariance: Tensor) -> Tensor:
    """covariance^½ [D, D]."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def distance_of_gaussians(gap: Tensor, cov_a: Tensor, cov_b: Tensor, root_a: Tensor) -> float:
    """`frechet_distance` from the difference of means [D], covariances [D, D] and the root of the first."""
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0).sqrt().sum()
    return (gap.square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def diversity(features: Tensor, groups: int) -> float:
    """Mean within-group variance (trace) of features [groups · G, D] whose G pictures of one prompt stand together."""
    return features.double().reshape(groups, -1, features.shape[1]).var(1).sum(1).mean().item()
