"""FT, which compares factors of the last maps, equals a loop over its layers and trains its paraphraser."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from loss_reference import array, number
from loss_reference_maps import (
    BATCH,
    EQUAL,
    LastPair,
    arrays_of,
    attention_by_loop,
    both_channels,
    check_formula,
    conv_by_loop,
    drawn,
    each_shape,
    mean_square_by_loop,
    norm_by_loop,
    pair_by_loop,
    random_maps,
    row,
)
from torch import nn

from stepwell.losses.ft import FT


def convs_by_loop(x: np.ndarray, p: dict[str, np.ndarray], name: str, batch_norm: bool) -> np.ndarray:
    step = 3 if batch_norm else 2
    for layer in (0, step, 2 * step):
        x = conv_by_loop(x, p[f"{name}.{layer}.weight"], p.get(f"{name}.{layer}.bias"))
        if batch_norm:
            x = norm_by_loop(x, p[f"{name}.{layer + 1}.weight"], p[f"{name}.{layer + 1}.bias"])
        x = np.where(x > 0, x, 0.1 * x)
    return x


def ft_by_loop(module, student, teacher) -> float:
    p = arrays_of(module)
    ours = convs_by_loop(student[-1], p, "translator", batch_norm=True)
    theirs = convs_by_loop(teacher[-1], p, "encoder", batch_norm=False)
    a, b = (attention_by_loop(x) for x in pair_by_loop(ours, theirs))
    values = [abs(u - v) for x, y in zip(a, b, strict=True) for u, v in zip(x, y, strict=True)]
    return sum(values) / len(values)


@each_shape
def test_ft_is_its_formula(shapes):
    student, teacher = both_channels(shapes)
    loss = drawn(FT(student[-1], teacher[-1]))
    check_formula(LastPair(loss), partial(ft_by_loop, loss), shapes)


def test_ft_by_hand():
    loss = FT(1, 1)
    loss.encoder, loss.translator = nn.Identity(), nn.Identity()
    assert number(loss(row(1, 0), row(0, 2))) == pytest.approx(1)
    # Mean squares 9 and 16 have the length sqrt(337).
    assert number(loss(row(3, 4), row(4, 3))) == pytest.approx(7 / math.sqrt(337))


def test_only_the_translator_is_ever_in_training_mode():
    loss = FT(3, 4)
    for _ in range(2):
        assert not any(part.training for part in (*loss.encoder.modules(), *loss.decoder.modules()))
        assert loss.translator.training
        loss.train()
    assert not any(part.training for part in loss.eval().modules())


def test_the_training_of_the_paraphraser_reproduces_the_teachers_map_and_leaves_the_translator():
    loss, (_, (teacher, *_)) = FT(3, 3), random_maps(EQUAL)
    p = arrays_of(loss)
    factors = convs_by_loop(array(teacher), p, "encoder", batch_norm=False)
    assert factors.shape == (BATCH, 1, 4, 5)
    reproduced = convs_by_loop(factors, p, "decoder", batch_norm=False)
    value = loss.pretraining_loss(teacher.requires_grad_())
    assert number(value) == pytest.approx(mean_square_by_loop(reproduced, array(teacher)))
    value.backward()
    assert teacher.grad is None
    for name, parameter in loss.named_parameters():
        if name.startswith("translator"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().max() > 1e-8, name


def test_the_paraphraser_can_be_trained():
    loss = FT(3, 4, paraphrase_rate=0.5)
    teacher = random_maps(EQUAL)[1][1]
    optimizer = torch.optim.Adam([*loss.encoder.parameters(), *loss.decoder.parameters()], lr=1e-2)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss.pretraining_loss(teacher)
        value.backward()
        optimizer.step()
        values.append(number(value))
    assert values[-1] < 0.6 * values[0]


@pytest.mark.parametrize(("rate", "factors"), [(0.5, 3), (0.25, 1), (0.01, 1), (1.0, 7)])
def test_the_factors_are_a_share_of_the_teachers_channels_and_at_least_one(rate, factors):
    loss = FT(2, 7, paraphrase_rate=rate)
    assert loss.encoder(torch.randn(2, 7, 3, 3)).shape == (2, factors, 3, 3)
    assert loss.translator(torch.randn(2, 2, 3, 3)).shape == (2, factors, 3, 3)
