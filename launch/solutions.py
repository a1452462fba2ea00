"""What kind of solution a training found, from arrays alone: forgetting, ranks, overlap of classes, sparsity.

Definitions of the studies that compare update rules (arXiv 2507.12224). Curvature is in trainer/sharpness.py.
"""

import numpy as np

# --- a sequence of tasks -----------------------------------------------------------------------------------------------------
# accuracies (T T): in row t, after task t was learned, those of tasks 0 to T - 1.


def new_accuracy(accuracies: np.ndarray) -> float:
    """Of each task right after it was learned, on average."""
    return float(np.mean(np.diag(accuracies)))


def final_accuracy(accuracies: np.ndarray) -> float:
    """Of all tasks after the last, on average."""
    return float(np.mean(accuracies[-1]))


def forgetting(accuracies: np.ndarray) -> float:
    """What each task but the last lost from its best since it was learned, on average (Chaudhry et al. 2018)."""
    best = [accuracies[task:, task].max() for task in range(len(accuracies) - 1)]
    return float(np.mean(best - accuracies[-1, :-1]))


def backward_transfer(accuracies: np.ndarray) -> float:
    """What each task but the last gained since it was learned, on average (Lopez-Paz & Ranzato 2017)."""
    return float(np.mean((accuracies[-1] - np.diag(accuracies))[:-1]))


def interference(gradients: np.ndarray) -> float:
    """Mean cosine of the gradient of the task just learned with that of each task before it, where its learning ended.

    gradients (T T P): in row t, after task t was learned, those of the losses of tasks 0 to T - 1. Below 0 a step down the new
    loss goes up the old one. A gradient of zeros has cosine 0 with all.
    """
    lengths = np.linalg.norm(gradients.astype(np.float64), axis=-1, keepdims=True)
    units = gradients / np.where(lengths > 0, lengths, 1)
    return float(np.mean([units[new, new] @ units[new, old] for new in range(len(units)) for old in range(new)]))


# --- representations: features (N D), a row an example ------------------------------------------------------------------------


def centred(features: np.ndarray) -> np.ndarray:
    return features - features.mean(axis=0)


def effective_rank(matrix: np.ndarray) -> float:
    """exp of the entropy of the singular values divided by their sum (Roy & Vetterli 2007); 0 of zeros."""
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def stable_rank(matrix: np.ndarray) -> float:
    """|W|_F^2 / |W|_2^2; 0 of zeros."""
    squares = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    return float(squares.sum() / squares[0]) if squares.any() else 0.0


def participation_ratio(features: np.ndarray) -> float:
    """(sum of l)^2 / sum of l^2, l the eigenvalues of the features' covariance; 0 of constant features."""
    values = np.linalg.svd(centred(np.asarray(features, np.float64)), compute_uv=False) ** 2
    return float(values.sum() ** 2 / np.sum(values**2)) if values.any() else 0.0


def class_cosine(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean cosine of the mean features of two different classes; a class whose mean is 0 has cosine 0 with all."""
    means = np.stack([features[labels == label].mean(axis=0) for label in np.unique(labels)]).astype(np.float64)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    means = means / np.where(lengths > 0, lengths, 1)
    return float((means @ means.T)[~np.eye(len(means), dtype=bool)].mean())


def dead_share(features: np.ndarray) -> float:
    """Share of the units that are 0 for every example."""
    return float(np.mean(~np.any(features != 0, axis=0)))


# --- weights -----------------------------------------------------------------------------------------------------------------


def near_zero_share(weights: np.ndarray, of_largest: float = 0.01) -> float:
    """Share of the weights whose size is below a hundredth of the largest."""
    sizes = np.abs(weights)
    return float(np.mean(sizes < of_largest * sizes.max()))


def hoyer(weights: np.ndarray) -> float:
    """(sqrt n - |w|_1 / |w|_2) / (sqrt n - 1): 0 where all weights have one size, 1 where one alone is not 0 (Hoyer 2004)."""
    flat = np.abs(np.asarray(weights, np.float64)).ravel()
    root = np.sqrt(flat.size)
    return float((root - flat.sum() / np.linalg.norm(flat)) / (root - 1))


def pruned(weights: np.ndarray, keep: float) -> np.ndarray:
    """Zeros but for the share `keep` of the largest weights in size, rounded to a whole number of them, at least one."""
    count = max(1, round(keep * weights.size))
    kept = np.zeros(weights.size, bool)
    kept[np.argsort(-np.abs(weights).ravel(), kind="stable")[:count]] = True
    return np.where(kept.reshape(weights.shape), weights, 0)
