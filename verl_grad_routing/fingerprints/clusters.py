"""Two clusters of fingerprints, their names, and a soft score between them.

Legend: ``P`` fingerprinted rollouts, ``F`` length of a fingerprint, ``2`` the clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from verl_grad_routing.errors import UserError


@dataclass(frozen=True, eq=False)
class Clusters:
    """What k-means found.

    Attributes:
        member_P: Cluster of each rollout, 0 or 1.
        centroids_2F: Means, float64.
        silhouette: Mean silhouette (Rousseeuw 1987), in [-1, 1]: 1 is apart, 0 is one cloud cut in two.
    """

    member_P: Tensor
    centroids_2F: Tensor
    silhouette: float

    @property
    def smallest_share(self) -> float:
        return float(torch.bincount(self.member_P, minlength=2).min()) / len(self.member_P)


def two_clusters(fingerprints_PF: Tensor, seed: int) -> Clusters:
    """K-means with k = 2 and ten starts from ``seed``.

    Raises:
        UserError: Fewer than two rollouts.
    """
    if len(fingerprints_PF) < 2:
        raise UserError("positive rollouts", len(fingerprints_PF), "two clusters need at least two fingerprints")
    points = fingerprints_PF.detach().double().cpu()
    if len(points.unique(dim=0)) < 2:  # k-means would warn and leave a cluster empty
        return Clusters(torch.zeros(len(points), dtype=torch.int64), points[:2].clone(), 0.0)
    means = KMeans(n_clusters=2, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    found = means.fit(points.numpy())
    member_P = torch.from_numpy(found.labels_).long()
    # a cluster of one has silhouette 0, and with two rollouts both are
    apart = float(silhouette_score(points.numpy(), found.labels_)) if len(points) > 2 else 0.0
    return Clusters(member_P, torch.from_numpy(found.cluster_centers_).double(), apart)


def nearest(fingerprints_PF: Tensor, clusters: Clusters, count: int) -> list[list[int]]:
    """Row numbers of each cluster's ``count`` members nearest to its centroid, nearest first, or all of them."""
    distances_P2 = torch.cdist(fingerprints_PF.double(), clusters.centroids_2F)
    chosen = []
    for cluster in (0, 1):
        members = (clusters.member_P == cluster).nonzero().flatten()
        order = torch.argsort(distances_P2[members, cluster], stable=True)
        chosen.append(members[order][:count].tolist())
    return chosen


def match(centroids_2F: Tensor, known_2F: Tensor) -> Tensor:
    """``centroids`` in the order of ``known``, by the bijection with the least sum of squared distances."""
    cost = torch.cdist(known_2F.double(), centroids_2F.double()) ** 2
    return centroids_2F[torch.from_numpy(linear_sum_assignment(cost.numpy())[1])]


def soft_scores(fingerprints_PF: Tensor, clean_F: Tensor, hacking_F: Tensor) -> Tensor:
    """GRIFT's score at temperature 1, ``e^{-d-} / (e^{-d+} + e^{-d-})``, float64 [P]; high is hacking.

    ``d+`` and ``d-`` are the squared distances to the clean and to the hacking centroid.
    """
    points = fingerprints_PF.double()
    to_clean_P = (points - clean_F.double()).square().sum(1)
    to_hacking_P = (points - hacking_F.double()).square().sum(1)
    return torch.sigmoid(to_clean_P - to_hacking_P)
