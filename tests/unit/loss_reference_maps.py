"""What several tests of losses on feature maps share: layers as plain loops, and random or tiny maps."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from loss_reference import array, number
from torch import nn

# Shapes (channels, height, width) from shallow to deep: student's, teacher's.
EQUAL = [(3, 4, 5), (4, 2, 3)], [(3, 4, 5), (4, 2, 3)]
OTHER_SIZES = [(3, 6, 5), (4, 3, 2), (5, 2, 2)], [(3, 5, 7), (4, 3, 3), (5, 1, 2)]
OTHER_WIDTHS = [(3, 6, 4), (5, 3, 3)], [(4, 5, 6), (2, 3, 2)]
# More channels than positions, as in the deepest maps.
MANY_CHANNELS = [(4, 2, 1), (6, 1, 2)], [(5, 2, 1), (7, 2, 2)]

SHAPES = {
    "equal": EQUAL,
    "other-sizes": OTHER_SIZES,
    "other-widths": OTHER_WIDTHS,
    "many-channels": MANY_CHANNELS,
}
each_shape = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)

BATCH = 3


# --- layers by loop


def pooled_by_loop(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cell (i, j) is the mean of the rows and columns that it touches, if only in part."""
    pooled = np.zeros((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            top, bottom = math.floor(i * x.shape[2] / height), math.ceil((i + 1) * x.shape[2] / height)
            left, right = math.floor(j * x.shape[3] / width), math.ceil((j + 1) * x.shape[3] / width)
            for b, c in np.ndindex(*x.shape[:2]):
                cell = [x[b, c, y, z] for y in range(top, bottom) for z in range(left, right)]
                pooled[b, c, i, j] = sum(cell) / len(cell)
    return pooled


def pair_by_loop(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    return pooled_by_loop(s, height, width), pooled_by_loop(t, height, width)


def conv_by_loop(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    num_out, num_in, side, _ = weight.shape
    out = np.zeros((len(x), num_out, *x.shape[2:]))
    reach = side // 2
    for b, o, y, z in np.ndindex(*out.shape):
        total = 0.0 if bias is None else bias[o]
        for c in range(num_in):
            for dy in range(-reach, reach + 1):
                for dz in range(-reach, reach + 1):
                    if 0 <= y + dy < x.shape[2] and 0 <= z + dz < x.shape[3]:
                        total += weight[o, c, dy + reach, dz + reach] * x[b, c, y + dy, z + dz]
        out[b, o, y, z] = total
    return out


def norm_by_loop(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Batch normalisation in training mode."""
    out = np.zeros_like(x)
    for c in range(x.shape[1]):
        values = [x[b, c, y, z] for b in range(len(x)) for y, z in np.ndindex(*x.shape[2:])]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        out[:, c] = (x[:, c] - mean) / math.sqrt(variance + 1e-5) * weight[c] + bias[c]
    return out


def arrays_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def conv_bn_by_loop(x: np.ndarray, p: dict[str, np.ndarray], name: str) -> np.ndarray:
    return norm_by_loop(conv_by_loop(x, p[f"{name}.0.weight"]), p[f"{name}.1.weight"], p[f"{name}.1.bias"])


def mean_square_by_loop(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return sum((a[index] - b[index]) ** 2 for index in np.ndindex(*a.shape)) / a.size


def attention_by_loop(x: np.ndarray) -> list[list[float]]:
    of_images = []
    for b in range(len(x)):
        row = [
            sum(x[b, c, y, z] ** 2 for c in range(x.shape[1])) / x.shape[1]
            for y, z in np.ndindex(*x.shape[2:])
        ]
        length = math.sqrt(sum(v**2 for v in row))
        of_images.append([v / length for v in row])
    return of_images


# --- losses and their inputs


class LastPair(nn.Module):
    """A loss on one pair of maps, on the last of two lists."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, student, teacher):
        return self.loss(student[-1], teacher[-1])


def both_channels(shapes) -> tuple[list[int], list[int]]:
    """The channels of the student's maps and of the teacher's."""
    student, teacher = ([shape[0] for shape in side] for side in shapes)
    return student, teacher


def drawn(loss: nn.Module) -> nn.Module:
    """The loss with all its parameters drawn, so that none hides behind a 0 or a 1."""
    for parameter in loss.parameters():
        nn.init.uniform_(parameter, 0.2, 1.0)
        parameter.data *= torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0)
    return loss


def random_maps(shapes, seed: int = 0, batch: int = BATCH) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(batch, *shape, generator=generator) for shape in side] for side in shapes)


def row(*values: float) -> torch.Tensor:
    """One image, one channel, one row."""
    return torch.tensor(values, dtype=torch.float32)[None, None, None]


def column(*values: float) -> torch.Tensor:
    """One image, one position, many channels."""
    return torch.tensor(values, dtype=torch.float32)[None, :, None, None]


def check_formula(loss: Callable, by_loop: Callable, shapes) -> None:
    """The loss of random maps is the number that the loop over its formula gives."""
    student, teacher = random_maps(shapes)
    expected = by_loop([array(m) for m in student], [array(m) for m in teacher])
    value = loss(student, teacher)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert number(value) == pytest.approx(expected, rel=1e-4), f"{number(value)} is not {expected}"
