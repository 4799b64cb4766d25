"""The heads that OFA puts on maps and on tokens equal loops over their layers, and shrink with depth."""

import math

import numpy as np
import pytest
import torch
from loss_reference import softmax
from torch import nn

from stepwell.losses.ofa import OFA


def parameters_of(module) -> list[np.ndarray]:
    return [p.detach().double().numpy() for p in module.parameters()]


def test_the_head_on_maps_equals_its_convolutions_by_loop():
    # 3 channels at 8 x 8 down to 2 x 2 with 5: two halvings, via min(2 * 3, 5) channels.
    torch.manual_seed(1)
    head = OFA([(3, 8, 8), (5, 2, 2)], 4).heads[0].eval()
    norms = [m for m in head if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    depthwise_1, pointwise_1, depthwise_2, pointwise_2 = (
        m.weight.detach().double().numpy() for m in head if isinstance(m, nn.Conv2d)
    )
    assert len(pointwise_1) == len(pointwise_2) == 5
    given = np.random.default_rng(0).standard_normal((3, 8, 8))
    x = given
    for depthwise, pointwise, norm in [
        (depthwise_1, pointwise_1, norms[0]),
        (depthwise_2, pointwise_2, norms[1]),
    ]:
        channels, size = x.shape[0], x.shape[1]
        assert depthwise.shape == (channels, 1, 3, 3)
        assert pointwise.shape[1:] == (channels, 1, 1)
        smaller = np.zeros((channels, size // 2, size // 2))
        for c, row, column, i, j in np.ndindex(channels, size // 2, size // 2, 3, 3):
            y, z = 2 * row + i - 1, 2 * column + j - 1
            if 0 <= y < size and 0 <= z < size:
                smaller[c, row, column] += depthwise[c, 0, i, j] * x[c, y, z]
        mixed = np.zeros((len(pointwise), size // 2, size // 2))
        for out, c in np.ndindex(len(pointwise), channels):
            mixed[out] += pointwise[out, c, 0, 0] * smaller[c]
        for out in range(len(mixed)):
            centred = mixed[out] - norm.running_mean[out].item()
            mixed[out] = np.maximum(centred / math.sqrt(norm.running_var[out].item() + 1e-5), 0)
        x = mixed
    weight, bias = parameters_of(head[-1])
    expected = weight @ x.mean(axis=(1, 2)) + bias
    logits = head(torch.tensor(given)[None].float())[0].detach().numpy()
    assert logits == pytest.approx(expected, abs=1e-5)


def layer_norm(row: np.ndarray) -> np.ndarray:
    return (row - row.mean()) / math.sqrt(row.var() + 1e-5)


def test_the_head_on_tokens_equals_its_block_by_loop():
    # A class token and 14 x 14 tokens of 2 channels: 2 x 2 are merged to 7 x 7 of width 4, then one block.
    torch.manual_seed(1)
    head = OFA([(197, 2), (50, 4)], 3).heads[0].double().eval()
    given = np.random.default_rng(1).standard_normal((197, 2))
    (_, _, merge_weight, merge_bias), last = parameters_of(head[0]), parameters_of(head[-1])
    tokens = []
    for row, column in np.ndindex(7, 7):
        corners = [(2 * row + i) * 14 + 2 * column + j for i, j in [(0, 0), (0, 1), (1, 0), (1, 1)]]
        merged = np.array([given[1 + corner, c] for c in range(2) for corner in corners])
        tokens.append(merge_weight @ layer_norm(merged) + merge_bias)
    (block,) = head[1].blocks
    w_in, b_in, w_out, b_out = parameters_of(block.self_attn)
    projected = [w_in @ layer_norm(token) + b_in for token in tokens]
    width, num_heads = 4, 4
    attended = []
    for token, q in zip(tokens, projected, strict=True):
        mixed = np.zeros(width)
        for h in range(num_heads):  # one channel each, so the scores are divided by 1
            scores = softmax([q[h] * k[width + h] for k in projected])
            mixed[h] = sum(s * v[2 * width + h] for s, v in zip(scores, projected, strict=True))
        attended.append(token + w_out @ mixed + b_out)
    (w_1, b_1), (w_2, b_2) = parameters_of(block.linear1), parameters_of(block.linear2)
    assert w_1.shape == (16, 4)
    out = np.zeros(width)
    for token in attended:
        hidden = w_1 @ layer_norm(token) + b_1
        gelu = np.array([0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in hidden])
        out += (token + w_2 @ gelu + b_2) / 49
    expected = last[0] @ out + last[1]
    # The float64 head takes the map of the patch tokens, as `OFA.forward` lays it out.
    grid = torch.tensor(given[1:].T.reshape(1, 2, 14, 14).copy())
    assert head(grid)[0].detach().numpy() == pytest.approx(expected, abs=1e-9)


def num_modules(head, kind) -> int:
    return sum(isinstance(module, kind) for module in head.modules())


def test_heads_shrink_with_depth_as_published():
    vit = OFA([(197, 32)] * 4, 10)
    assert [num_modules(head, nn.TransformerEncoderLayer) for head in vit.heads] == [3, 2, 1, 1]
    deep = OFA([(197, 32)] * 6, 10)
    assert [num_modules(head, nn.TransformerEncoderLayer) for head in deep.heads] == [3, 3, 3, 2, 1, 1]
    resnet = OFA([(8, 56, 56), (16, 28, 28), (32, 14, 14), (64, 7, 7)], 10)
    assert [num_modules(head, nn.BatchNorm2d) for head in resnet.heads] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("num_tokens", "grid"), [(16, 4), (64, 8), (196, 7), (257, 8), (225, 8), (729, 7), (1369, 10)], ids=str
)
def test_tokens_are_merged_while_a_grid_of_seven_remains(num_tokens, grid):
    head = OFA([(num_tokens, 6)], 3).heads[0].eval()
    seen = []
    head[-2].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    side = math.isqrt(num_tokens)
    head(torch.randn(2, 6, side, side))
    assert seen == [(2, 6, grid, grid)]
