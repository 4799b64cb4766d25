"""ScaleKD by loops, written from the equations: the projector, the two views, the DCT of the second one."""

from __future__ import annotations

import math

import numpy as np
from loss_reference import array, softmax
from loss_reference_maps import conv_by_loop
from torch import nn


def linear(module: nn.Linear, row: np.ndarray) -> np.ndarray:
    weight, bias = array(module.weight), array(module.bias)
    return np.array([sum(w * x for w, x in zip(weights, row, strict=True)) for weights in weight]) + bias


def layer_norm(module: nn.LayerNorm, row: np.ndarray) -> np.ndarray:
    return array(module.weight) * (row - row.mean()) / math.sqrt(row.var() + 1e-5) + array(module.bias)


def normed(norm: nn.BatchNorm2d, given: np.ndarray) -> np.ndarray:
    """By the statistics of evaluation."""
    out = np.zeros_like(given)
    for c in range(len(given)):
        deviation = math.sqrt(norm.running_var[c].item() + 1e-5)
        centred = (given[c] - norm.running_mean[c].item()) / deviation
        out[c] = array(norm.weight)[c] * centred + array(norm.bias)[c]
    return out


def projected(cap, student_map: np.ndarray, queries: np.ndarray, num_heads: int, scale: float) -> np.ndarray:
    """One image: (C_s, H, W) and (positions, C_t) to (positions, C_t)."""
    conv, norm, _ = cap.student
    mixed = conv_by_loop(student_map[None], array(conv.weight), array(conv.bias))[0]
    seen = np.maximum(normed(norm, mixed), 0) + array(cap.positions)[0]
    places = [seen[:, row, column] for row, column in np.ndindex(*seen.shape[1:])]
    keys = [linear(cap.to_key, place) for place in places]
    values = [linear(cap.to_value, place) for place in places]
    tokens = []
    for query in queries:
        asked = linear(cap.to_query, np.maximum(linear(cap.asking[0], query), 0))
        width = len(asked) // num_heads
        heads = []
        for head in range(num_heads):
            part = slice(head * width, (head + 1) * width)
            logits = [scale / math.sqrt(width) * float(asked[part] @ key[part]) for key in keys]
            heads.append(sum(w * v[part] for w, v in zip(softmax(logits), values, strict=True)))
        row = layer_norm(cap.norm, linear(cap.out, np.concatenate(heads)))
        tokens.append(row + linear(cap.ffn[2], np.maximum(linear(cap.ffn[0], row), 0)))
    return np.array(tokens)


def original(student: np.ndarray, teacher: np.ndarray) -> float:
    """(batch, positions, channels)."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            total += float(((a / math.sqrt((a**2).sum()) - b / math.sqrt((b**2).sum())) ** 2).sum())
    return total / len(student)


def dct_basis(n: int) -> np.ndarray:
    """DCT-II, as the authors use it: not normalised."""
    return np.array([[2 * math.cos(math.pi * k * (2 * i + 1) / (2 * n)) for i in range(n)] for k in range(n)])


def without_direct_component(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each channel of one image through the DCT, without its first coefficient, and back."""
    rows, columns = dct_basis(height), dct_basis(width)
    out = np.zeros_like(tokens)
    for channel in range(tokens.shape[1]):
        spectrum = rows @ tokens[:, channel].reshape(height, width) @ columns.T
        spectrum[0, 0] = 0
        back = np.linalg.inv(rows) @ spectrum @ np.linalg.inv(columns).T
        out[:, channel] = back.reshape(-1)
    return out


def alternative(student: np.ndarray, teacher: np.ndarray, height: int, width: int) -> float:
    ours, theirs = (
        np.array([without_direct_component(image, height, width) for image in images])
        for images in (student, teacher)
    )
    return original(ours, theirs)
