"""What several tests of losses share: formulas as plain loops, and random inputs for the losses."""

import math

import numpy as np
import torch
from beartype import beartype
from jaxtyping import jaxtyped

from stepwell.losses.crd import CRD

# --- formulas


def number(scalar) -> float:
    # float() warns where there is a gradient.
    return scalar.item()


def array(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def softmax(row, temperature: float = 1.0) -> list[float]:
    largest = max(row)
    exponentials = [math.exp((x - largest) / temperature) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def divergence(p, q) -> float:
    """KL(p || q) of two lists of probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def dot(a, b) -> float:
    return sum(float(x) * float(y) for x, y in zip(np.ravel(a), np.ravel(b), strict=True))


def cosine(a, b) -> float:
    lengths = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / lengths if lengths else 0.0


def linear(layer, row) -> np.ndarray:
    return np.array([dot(w, row) + number(b) for w, b in zip(array(layer.weight), layer.bias, strict=True)])


def checked(function):
    """With the shapes of its annotations checked."""
    return jaxtyped(function, typechecker=beartype)


# --- logits and labels


SIZES = [(2, 2), (3, 5), (8, 40)]
TEMPERATURES = [0.5, 1.0, 4.0]


def batch(seed: int, images: int, classes: int, size: float = 3.0):
    """Logits of student and teacher, and labels, as arrays that fp32 holds exactly."""
    rng = np.random.default_rng(seed)
    student, teacher = (size * rng.standard_normal((2, images, classes))).astype(np.float32).astype(float)
    return student, teacher, rng.integers(classes, size=images)


def tensors(student, teacher, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(student).float(), torch.tensor(teacher).float(), torch.tensor(labels)


# --- features of images


NUM_IMAGES, STUDENT_DIM, TEACHER_DIM, NUM_CLASSES = 12, 5, 7, 3
LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 2, 1, 2, 2])


def features(seed: int, *shape: int) -> torch.Tensor:
    # Not centred on 0, as features behind a ReLU are not.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def crd_batch(seed: int, batch: int = 3):
    indices = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(seed))[:batch]
    return features(seed, batch, STUDENT_DIM), features(seed + 100, batch, TEACHER_DIM), indices


def make_crd(labels=LABELS, **options) -> CRD:
    return CRD(STUDENT_DIM, TEACHER_DIM, labels, NUM_IMAGES, **{"embed_dim": 4, "num_negatives": 6} | options)


def sskd_batch(seed: int, batch: int = 4):
    return (
        features(seed, 4 * batch, STUDENT_DIM),
        features(seed + 1, 4 * batch, TEACHER_DIM),
        3 * features(seed + 2, 4 * batch, NUM_CLASSES),
        3 * features(seed + 3, 4 * batch, NUM_CLASSES),
        torch.arange(batch) % NUM_CLASSES,
    )
