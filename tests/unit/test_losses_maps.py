"""The losses on feature maps against loops over images, channels and positions, written from the formulas."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn
from torch._subclasses import FakeTensorMode

from stepwell.losses.ab import AB
from stepwell.losses.at import at_loss
from stepwell.losses.fitnet import FitNet
from stepwell.losses.fsp import fsp_loss
from stepwell.losses.ft import FT
from stepwell.losses.maps import at_smaller_size
from stepwell.losses.nst import nst_loss
from stepwell.losses.review import ReviewKD, hierarchical_distance
from stepwell.losses.vid import VID

# Shapes (channels, height, width) from shallow to deep: student's, teacher's.
EQUAL = [(3, 4, 5), (4, 2, 3)], [(3, 4, 5), (4, 2, 3)]
OTHER_SIZES = [(3, 6, 5), (4, 3, 2), (5, 2, 2)], [(3, 5, 7), (4, 3, 3), (5, 1, 2)]
OTHER_WIDTHS = [(3, 6, 4), (5, 3, 3)], [(4, 5, 6), (2, 3, 2)]
# More channels than positions, as in the deepest maps.
MANY_CHANNELS = [(4, 2, 1), (6, 1, 2)], [(5, 2, 1), (7, 2, 2)]

BATCH = 3


class Case(NamedTuple):
    """A loss on two lists of maps; `make` gets the channels of both."""

    make: Callable
    by_loop: Callable
    equal_channels: bool = False


# --- loops


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


def fitnet_by_loop(module, student, teacher) -> float:
    s, t = pair_by_loop(student[-1], teacher[-1])
    predicted = conv_bn_by_loop(s, arrays_of(module), "regressor")
    if len(module.regressor) == 3:
        predicted = np.where(predicted > 0, predicted, 0)
    return mean_square_by_loop(predicted, t)


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


def at_by_loop(module, student, teacher) -> float:
    total = 0.0
    for pair in zip(student, teacher, strict=True):
        a, b = (attention_by_loop(x) for x in pair_by_loop(*pair))
        squares = [(u - v) ** 2 for x, y in zip(a, b, strict=True) for u, v in zip(x, y, strict=True)]
        total += sum(squares) / len(squares)
    return total


def flow_by_loop(maps) -> list[np.ndarray]:
    flows = []
    for i in range(len(maps) - 1):
        a, b = pair_by_loop(maps[i], maps[i + 1])
        gram = np.zeros((len(a), a.shape[1], b.shape[1]))
        for n, c, d in np.ndindex(*gram.shape):
            values = [a[n, c, y, z] * b[n, d, y, z] for y, z in np.ndindex(*a.shape[2:])]
            gram[n, c, d] = sum(values) / len(values)
        flows.append(gram)
    return flows


def fsp_by_loop(module, student, teacher) -> float:
    return sum(
        mean_square_by_loop(*pair) for pair in zip(flow_by_loop(student), flow_by_loop(teacher), strict=True)
    )


def nst_by_loop(module, student, teacher) -> float:
    def channels(x, b) -> list[list[float]]:
        rows = [[x[b, c, y, z] for y, z in np.ndindex(*x.shape[2:])] for c in range(x.shape[1])]
        return [[v / math.sqrt(sum(u**2 for u in row)) for v in row] for row in rows]

    def mean_kernel(one, other) -> float:
        kernels = [sum(u * v for u, v in zip(a, b, strict=True)) ** 2 for a in one for b in other]
        return sum(kernels) / len(kernels)

    total = 0.0
    for pair in zip(student, teacher, strict=True):
        s, t = pair_by_loop(*pair)
        for b in range(len(s)):
            ours, theirs = channels(s, b), channels(t, b)
            both = mean_kernel(theirs, theirs) + mean_kernel(ours, ours)
            total += (both - 2 * mean_kernel(ours, theirs)) / len(s)
    return total


def ab_by_loop(module, student, teacher) -> float:
    p, count, total = arrays_of(module), len(student), 0.0
    for i, pair in enumerate(zip(student, teacher, strict=True)):
        s, t = pair_by_loop(*pair)
        s = conv_bn_by_loop(s, p, f"connectors.{i}")
        for index in np.ndindex(*t.shape):
            if t[index] <= 0 and s[index] > -module.margin:
                term = (s[index] + module.margin) ** 2
            elif t[index] > 0 and s[index] <= module.margin:
                term = (s[index] - module.margin) ** 2
            else:
                term = 0.0
            total += 2 ** (i - count + 1) * term / len(s)
    return 3 * total / 1000


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


def vid_by_loop(module, student, teacher) -> float:
    p, total = arrays_of(module), 0.0
    for i, pair in enumerate(zip(student, teacher, strict=True)):
        mean, t = pair_by_loop(*pair)
        for layer in (0, 2, 4):
            mean = conv_by_loop(mean, p[f"regressors.{i}.{layer}.weight"])
            if layer < 4:
                mean = np.where(mean > 0, mean, 0)
        terms = []
        for index in np.ndindex(*t.shape):
            variance = math.log(1 + math.exp(p[f"rho.{i}"][index[1]])) + 1e-5
            terms.append(((mean[index] - t[index]) ** 2 / variance + math.log(variance)) / 2)
        total += sum(terms) / len(terms)
    return total


def hierarchical_by_loop(a: np.ndarray, b: np.ndarray) -> float:
    total, weight, weights = mean_square_by_loop(a, b), 1.0, 1.0
    for size in (4, 2, 1):
        if size < a.shape[2] and size < a.shape[3]:
            weight /= 2
            weights += weight
            total += weight * mean_square_by_loop(
                pooled_by_loop(a, size, size), pooled_by_loop(b, size, size)
            )
    return total / weights


def review_by_loop(module, student, teacher) -> float:
    p = arrays_of(module)
    s, t = pooled_by_loop(student[-1], 1, 1), pooled_by_loop(teacher[-1], 1, 1)
    below = conv_bn_by_loop(s, p, "deepest.reduce")
    total = hierarchical_by_loop(conv_bn_by_loop(below, p, "deepest.predict"), t)
    for i in reversed(range(len(student))):
        s, t = pair_by_loop(student[i], teacher[i])
        own = conv_bn_by_loop(s, p, f"fusions.{i}.reduce")
        height, width = own.shape[2:]
        enlarged = np.zeros_like(own)
        for y, z in np.ndindex(height, width):
            # The nearest cell: with the corners of both grids laid over each other.
            source = math.floor(y * below.shape[2] / height), math.floor(z * below.shape[3] / width)
            enlarged[:, :, y, z] = below[:, :, source[0], source[1]]
        score = conv_by_loop(
            np.concatenate([own, enlarged], axis=1),
            p[f"fusions.{i}.attention.weight"],
            p[f"fusions.{i}.attention.bias"],
        )
        fused = np.zeros_like(own)
        for b, c, y, z in np.ndindex(*own.shape):
            first, second = (1 / (1 + math.exp(-score[b, k, y, z])) for k in (0, 1))
            fused[b, c, y, z] = first * own[b, c, y, z] + second * enlarged[b, c, y, z]
        below = fused
        total += hierarchical_by_loop(conv_bn_by_loop(fused, p, f"fusions.{i}.predict"), t)
    return total


# --- the losses in one form


class LastPair(nn.Module):
    """A loss on one pair of maps, on the last of two lists."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, student, teacher):
        return self.loss(student[-1], teacher[-1])


CASES = {
    "fitnet": Case(lambda s, t: LastPair(FitNet(s[-1], t[-1])), lambda m, *x: fitnet_by_loop(m.loss, *x)),
    "fitnet-relu": Case(
        lambda s, t: LastPair(FitNet(s[-1], t[-1], relu=True)), lambda m, *x: fitnet_by_loop(m.loss, *x)
    ),
    "at": Case(lambda s, t: at_loss, at_by_loop),
    "fsp": Case(lambda s, t: fsp_loss, fsp_by_loop, equal_channels=True),
    "nst": Case(lambda s, t: nst_loss, nst_by_loop),
    "ab": Case(AB, ab_by_loop),
    "ab-margin": Case(lambda s, t: AB(s, t, margin=0.3), ab_by_loop),
    "ft": Case(lambda s, t: LastPair(FT(s[-1], t[-1])), lambda m, *x: ft_by_loop(m.loss, *x)),
    "vid": Case(VID, vid_by_loop),
    "review": Case(ReviewKD, review_by_loop),
    "review-narrow": Case(lambda s, t: ReviewKD(s, t, max_mid_channels=2), review_by_loop),
}
MODULES = ["fitnet", "fitnet-relu", "ab", "ft", "vid", "review"]
FUNCTIONS = ["at", "fsp", "nst"]
EVERY = [*MODULES, *FUNCTIONS]


def channels(shapes) -> list[int]:
    return [shape[0] for shape in shapes]


def make(name: str, shapes):
    """The loss with all its parameters drawn, so that none hides behind a 0 or a 1."""
    loss = CASES[name].make(*map(channels, shapes))
    if isinstance(loss, nn.Module):
        for parameter in loss.parameters():
            nn.init.uniform_(parameter, 0.2, 1.0)
            parameter.data *= torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0)
    return loss


def random_maps(shapes, seed: int = 0, batch: int = BATCH) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(batch, *shape, generator=generator) for shape in side] for side in shapes)


def arrays(maps) -> list[np.ndarray]:
    return [m.double().numpy() for m in maps]


def number(value: torch.Tensor) -> float:
    return value.detach().item()


def learning(maps) -> list[torch.Tensor]:
    return [m.clone().requires_grad_() for m in maps]


SHAPES = {
    "equal": EQUAL,
    "other-sizes": OTHER_SIZES,
    "other-widths": OTHER_WIDTHS,
    "many-channels": MANY_CHANNELS,
}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        pytest.param(name, shapes, id=f"{name}-{kind}")
        for name, case in CASES.items()
        for kind, shapes in SHAPES.items()
        if not case.equal_channels or channels(shapes[0]) == channels(shapes[1])
    ],
)
def test_each_loss_is_its_formula(name, shapes):
    loss, (student, teacher) = make(name, shapes), random_maps(shapes)
    expected = CASES[name].by_loop(loss, arrays(student), arrays(teacher))
    value = loss(student, teacher)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert number(value) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_the_student_and_what_is_learned_but_not_the_teacher(name):
    shapes = OTHER_SIZES
    loss, (student, teacher) = make(name, shapes), map(learning, random_maps(shapes))
    loss(student, teacher).backward()
    assert all(m.grad is None for m in teacher)
    used = student[-1:] if isinstance(loss, LastPair) else student
    for m in used:
        assert torch.isfinite(m.grad).all()
        assert m.grad.abs().max() > 1e-8
    if isinstance(loss, nn.Module):
        for parameter_name, parameter in loss.named_parameters():
            if "coder" in parameter_name:  # the paraphraser's encoder and decoder
                assert parameter.grad is None, parameter_name
            else:
                assert torch.isfinite(parameter.grad).all(), parameter_name
                assert parameter.grad.abs().max() > 1e-8, parameter_name


@pytest.mark.parametrize("zero", ["neither", "student", "teacher", "both"])
@pytest.mark.parametrize("name", EVERY)
def test_the_gradient_is_finite_between_equals_and_where_maps_are_0(name, zero):
    loss, (_, teacher) = make(name, EQUAL), random_maps(EQUAL)
    student = [m.clone() for m in teacher]
    for side, maps in (("student", student), ("teacher", teacher)):
        if zero in (side, "both"):
            for m in maps:
                m.zero_()
    student = learning(student)
    value = loss(student, teacher)
    value.backward()
    assert math.isfinite(number(value))
    for m in student[-1:] if isinstance(loss, LastPair) else student:
        assert torch.isfinite(m.grad).all()
        # Batch normalisation of a constant multiplies by 1 / sqrt(1e-5), and there may be several.
        assert m.grad.abs().max() < (1e6 if zero in ("student", "both") else 10)
    if isinstance(loss, nn.Module):
        assert all(torch.isfinite(p.grad).all() for p in loss.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", EVERY)
def test_one_image_whose_map_is_0_changes_no_other_gradient_to_nan(name):
    loss, (student, teacher) = make(name, OTHER_SIZES), random_maps(OTHER_SIZES)
    for m in student:
        m[1] = 0
    student = learning(student)
    loss(student, teacher).backward()
    assert torch.isfinite(student[-1].grad).all()
    assert student[-1].grad[0].abs().max() > 1e-8


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_distance_is_0_between_equals_and_grows(name):
    loss, (_, teacher) = make(name, EQUAL), random_maps(EQUAL)
    noise = random_maps(EQUAL, seed=1)[0]
    values = [
        number(loss([m + size * n for m, n in zip(teacher, noise, strict=True)], teacher))
        for size in (0.0, 0.1, 0.5)
    ]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert 1e-5 < values[1] < values[2]


def without_learning(name: str, shapes=EQUAL):
    """The loss with the student's part taken out of the way: a good student is then one that is equal."""
    loss = CASES[name].make(*map(channels, shapes))
    match name:
        case "fitnet":
            loss.loss.regressor = nn.Identity()
        case "ft":
            loss.loss.translator = copy.deepcopy(loss.loss.encoder)
        case "vid":
            loss.regressors = nn.ModuleList(nn.Identity() for _ in shapes[0])
        case "ab":
            loss.connectors = nn.ModuleList(nn.Identity() for _ in shapes[0])
    return loss


@pytest.mark.parametrize(("name", "least"), [("fitnet", 0.0), ("ft", 0.0), ("vid", math.log(5.0))])
def test_a_learned_loss_is_least_where_the_student_says_what_the_teacher_says(name, least):
    # VID: 1/2 log 5 for each of two maps, as initial_variance is 5.
    loss, (_, teacher) = without_learning(name), random_maps(EQUAL)
    noise = random_maps(EQUAL, seed=1)[0]
    values = [
        number(loss([m + size * n for m, n in zip(teacher, noise, strict=True)], teacher))
        for size in (0.0, 0.1, 0.5)
    ]
    assert values[0] == pytest.approx(least, abs=1e-6)
    assert values[0] + 1e-4 < values[1] < values[2]


def test_a_student_that_is_on_and_off_as_the_teacher_by_the_margin_costs_nothing():
    loss, (_, teacher) = without_learning("ab"), random_maps(EQUAL)
    assert number(loss([1.01 * m.sign() for m in teacher], teacher)) == 0
    assert number(loss([0.9 * m.sign() for m in teacher], teacher)) > 0
    off = number(loss([0 * m for m in teacher], teacher))
    assert number(loss([-m.sign() for m in teacher], teacher)) > off > 0


# --- small examples, by hand


def row(*values: float) -> torch.Tensor:
    """One image, one channel, one row."""
    return torch.tensor(values, dtype=torch.float32)[None, None, None]


def column(*values: float) -> torch.Tensor:
    """One image, one position, many channels."""
    return torch.tensor(values, dtype=torch.float32)[None, :, None, None]


def test_at_by_hand():
    # Attention (1, 0) against (0, 1), whatever the sizes; and (.8, .6) against (.6, .8) from mean squares.
    assert number(at_loss([row(1, 0)], [row(0, -7)])) == pytest.approx(1)
    half = torch.cat([row(2, 0), row(0, math.sqrt(3))], dim=1)
    other = torch.cat([row(0, 2), row(math.sqrt(3), 0)], dim=1)
    assert number(at_loss([half], [other])) == pytest.approx((4 / 5 - 3 / 5) ** 2)
    assert number(at_loss([row(1, 0), half], [row(0, 1), other])) == pytest.approx(1.04)


def test_fsp_by_hand():
    # G = (3, 6) against (1, 0): (2^2 + 6^2) / 2.
    assert number(fsp_loss([column(1, 2), column(3)], [column(1, 0), column(1)])) == pytest.approx(20)
    # The larger of two consecutive maps is averaged: (1 + 3) / 2 * 5 = 10 against 0.
    assert number(fsp_loss([row(1, 3), row(5)], [row(0, 0), row(5)])) == pytest.approx(100)


def test_nst_by_hand():
    assert number(nst_loss([row(3, 0)], [row(0, 2)])) == pytest.approx(2)
    # Channels e1, e2 against e2: 1/2 + 1 - 2 * 1/2.
    two = torch.cat([row(1, 0), row(0, 1)], dim=1)
    assert number(nst_loss([two], [row(0, 2)])) == pytest.approx(0.5)
    # A channel and its negative are the same to a squared kernel.
    assert number(nst_loss([row(1, 2)], [row(-1, -2)])) == pytest.approx(0, abs=1e-6)


def test_ab_by_hand():
    loss = without_learning("ab", ([(1, 1, 4)], [(1, 1, 4)]))
    student, teacher = row(0.5, 0.5, 2.0, -3.0), row(1.0, -1.0, 3.0, 0.0)
    assert number(loss([student], [teacher])) == pytest.approx((0.25 + 2.25) * 3 / 1000)
    loss.connectors.append(nn.Identity())
    # The shallower of two maps counts half.
    assert number(loss([student, row(9.0)], [teacher, row(9.0)])) == pytest.approx(2.5 / 2 * 3 / 1000)
    assert number(loss([row(9.0), student], [row(9.0), teacher])) == pytest.approx(2.5 * 3 / 1000)


def test_ft_by_hand():
    loss = FT(1, 1)
    loss.encoder, loss.translator = nn.Identity(), nn.Identity()
    assert number(loss(row(1, 0), row(0, 2))) == pytest.approx(1)
    # Mean squares 9 and 16 have the length sqrt(337).
    assert number(loss(row(3, 4), row(4, 3))) == pytest.approx(7 / math.sqrt(337))


@pytest.mark.parametrize(("relu", "expected"), [(False, (1 + 4) / 2), (True, (1 + 0) / 2)])
def test_fitnet_by_hand(relu, expected):
    # The regressor of a map of mean 0 and variance 1 leaves it as it is, but for what a ReLU cuts off.
    loss = FitNet(1, 1, relu=relu)
    nn.init.ones_(loss.regressor[0].weight)
    value = loss(row(1, -1), row(2, 1) if not relu else row(2, 0))
    assert number(value) == pytest.approx(expected, rel=1e-4)
    assert number(FitNet(1, 1)(row(5, 5), row(2, 1))) == pytest.approx((4 + 1) / 2, rel=1e-3)


@pytest.mark.parametrize("variance", [0.1, 5.0])
def test_vid_by_hand(variance):
    loss = VID([1], [1], initial_variance=variance)
    loss.regressors = nn.ModuleList([nn.Identity()])
    value = loss([row(1, 2)], [row(1, 4)])
    assert number(value) == pytest.approx(0.5 * (math.log(variance) + (0 + 4) / 2 / variance), rel=1e-5)


def test_the_hierarchical_distance_by_hand():
    # A constant difference is the same on every grid.
    ones = torch.ones(1, 1, 8, 8)
    assert number(hierarchical_distance(3 * ones, ones)) == pytest.approx(4)
    # What cancels out in the mean counts at full size alone: 1 / (1 + 1/2).
    checkered = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[None, None]
    assert number(hierarchical_distance(checkered, 0 * checkered)) == pytest.approx(2 / 3)
    # On 8 x 8 the halves differ on 8, 4 and 2 cells a side, not in the mean: (1 + 1/2 + 1/4) / (15/8).
    halves = torch.cat([ones[..., :4], -ones[..., :4]], dim=3)
    assert number(hierarchical_distance(halves, 0 * ones)) == pytest.approx(1.75 / 1.875)


def test_the_larger_map_is_averaged_in_each_direction():
    student, teacher = torch.arange(8.0).reshape(1, 1, 4, 2), torch.arange(6.0).reshape(1, 1, 2, 3)
    ours, theirs = at_smaller_size(student, teacher)
    assert ours.tolist() == [[[[1, 2], [5, 6]]]]
    assert theirs.tolist() == [[[[0.5, 1.5], [3.5, 4.5]]]]


# --- what changes nothing


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_the_images_does_not_matter(name):
    loss, (student, teacher) = make(name, OTHER_SIZES), random_maps(OTHER_SIZES)
    order = torch.tensor([2, 0, 1])
    turned = loss([m[order] for m in student], [m[order] for m in teacher])
    assert number(turned) == pytest.approx(number(loss(student, teacher)), rel=1e-5)
    mixed = loss([m[order] for m in student], teacher)
    assert number(mixed) != pytest.approx(number(loss(student, teacher)), rel=1e-3)


def test_at_sees_neither_the_size_of_an_image_nor_the_order_of_channels():
    student, teacher = random_maps(OTHER_WIDTHS)
    value = number(at_loss(student, teacher))
    factor = torch.tensor([0.1, 3.0, -20.0])[:, None, None, None]
    assert number(at_loss([factor * m for m in student], teacher)) == pytest.approx(value, rel=1e-4)
    assert number(at_loss([m.flip(1) for m in student], teacher)) == pytest.approx(value, rel=1e-4)
    assert number(at_loss([m.flip(2) for m in student], teacher)) != pytest.approx(value, rel=1e-2)


@pytest.mark.parametrize("shapes", [OTHER_WIDTHS, MANY_CHANNELS])
def test_nst_sees_neither_size_nor_sign_nor_order_of_channels(shapes):
    student, teacher = random_maps(shapes)
    value = number(nst_loss(student, teacher))
    for m in student:
        m *= torch.linspace(-3, 2.5, m.shape[1])[:, None, None]
    assert number(nst_loss([m.flip(1) for m in student], teacher)) == pytest.approx(value, rel=1e-4)
    assert number(nst_loss([m.flip(2, 3) for m in student], teacher)) != pytest.approx(value, rel=1e-2)


def test_nst_is_the_same_for_channels_given_twice():
    student, teacher = random_maps(OTHER_WIDTHS)
    twice = [torch.cat([m, m], dim=1) for m in student]
    assert number(nst_loss(twice, teacher)) == pytest.approx(number(nst_loss(student, teacher)), rel=1e-4)


def test_fsp_forgets_where_things_are_if_both_maps_are_turned():
    shapes = [(3, 4, 4), (2, 4, 4)], [(3, 4, 4), (2, 4, 4)]
    student, teacher = random_maps(shapes)
    value = number(fsp_loss(student, teacher))
    assert number(fsp_loss([m.flip(2) for m in student], teacher)) == pytest.approx(value, rel=1e-4)
    assert number(fsp_loss([student[0].flip(2), student[1]], teacher)) != pytest.approx(value, rel=1e-2)


def test_ab_sees_the_teachers_signs_alone_before_or_behind_a_relu():
    loss, (student, teacher) = make("ab", EQUAL), random_maps(EQUAL)
    value = number(loss(student, teacher))
    assert number(loss(student, [100 * m for m in teacher])) == pytest.approx(value, rel=1e-6)
    assert number(loss(student, [m.relu() for m in teacher])) == pytest.approx(value, rel=1e-6)
    assert number(loss(student, [-m for m in teacher])) != pytest.approx(value, rel=1e-2)


# --- state and number formats


@pytest.mark.parametrize("name", MODULES)
def test_a_reloaded_loss_goes_on_identically(name):
    first, second = make(name, OTHER_SIZES), make(name, OTHER_SIZES)
    maps, others = random_maps(OTHER_SIZES), random_maps(OTHER_SIZES, seed=1)
    assert number(second(*others)) != pytest.approx(number(first(*others)), rel=1e-4)
    first(*maps)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*others), second(*others))
    assert torch.equal(first.eval()(*maps), second.eval()(*maps))


@pytest.mark.parametrize("name", MODULES)
def test_the_caller_seeds_the_parameters(name):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(arrays_of(CASES[name].make(*map(channels, EQUAL))))
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(np.array_equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_maps_are_compared_in_full_precision(name):
    loss = make(name, OTHER_SIZES)
    student, teacher = ([m.bfloat16() for m in maps] for maps in random_maps(OTHER_SIZES))
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss([m.float() for m in student], [m.float() for m in teacher]))


@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_learned_layers_alone(name):
    loss, (student, teacher) = make(name, OTHER_SIZES), random_maps(OTHER_SIZES)
    expected = loss(student, teacher)
    student = learning(student)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    if name in FUNCTIONS:
        assert torch.equal(value, expected)
    assert number(value) == pytest.approx(number(expected), rel=0.05)
    assert torch.isfinite(student[-1].grad).all()


@pytest.mark.parametrize("name", EVERY)
def test_no_value_is_asked_for_on_the_way(name):
    # Tensors without values: whatever reads one, which would make a GPU wait, raises.
    with FakeTensorMode():
        loss = CASES[name].make(*map(channels, OTHER_SIZES))
        student, teacher = ([torch.randn(BATCH, *shape) for shape in side] for side in OTHER_SIZES)
        student = learning(student)
        loss(student, teacher).backward()
        assert student[-1].grad.shape == student[-1].shape


# --- the paraphraser


def test_only_the_translator_is_ever_in_training_mode():
    loss = FT(3, 4)
    for _ in range(2):
        assert not any(part.training for part in (*loss.encoder.modules(), *loss.decoder.modules()))
        assert loss.translator.training
        loss.train()
    assert not any(part.training for part in loss.eval().modules())


def test_the_paraphrasers_own_training_reproduces_the_teachers_map_and_leaves_the_rest():
    loss, (_, (teacher, *_)) = FT(3, 3), random_maps(EQUAL)
    p = arrays_of(loss)
    factors = convs_by_loop(teacher.double().numpy(), p, "encoder", batch_norm=False)
    assert factors.shape == (BATCH, 1, 4, 5)
    reproduced = convs_by_loop(factors, p, "decoder", batch_norm=False)
    value = loss.pretraining_loss(teacher.requires_grad_())
    assert number(value) == pytest.approx(mean_square_by_loop(reproduced, arrays([teacher.detach()])[0]))
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


@pytest.mark.parametrize(("last", "cap", "mid"), [(600, 512, 512), (8, 512, 8), (8, 5, 5)])
def test_review_fuses_in_the_students_last_width_or_less(last, cap, mid):
    loss = ReviewKD([4, last], [6, 9], max_mid_channels=cap)
    assert [fusion.reduce[0].out_channels for fusion in (*loss.fusions, loss.deepest)] == [mid, mid, mid]


# --- mistakes

SHAPE_ERRORS = (AssertionError, RuntimeError, ValueError, TypeCheckError)


@pytest.mark.parametrize("name", EVERY)
def test_other_images_or_no_maps_are_refused(name):
    loss, (student, teacher) = make(name, EQUAL), random_maps(EQUAL)
    with pytest.raises(SHAPE_ERRORS):
        loss(student, [m[:1] for m in teacher])
    with pytest.raises(SHAPE_ERRORS):
        loss([m[0] for m in student], teacher)


@pytest.mark.parametrize("name", ["at", "fsp", "nst", "ab", "vid", "review"])
def test_maps_must_pair_up(name):
    loss, (student, teacher) = make(name, OTHER_SIZES), random_maps(OTHER_SIZES)
    with pytest.raises(ValueError, match=r"argument \d is (longer|shorter) than|equal channels"):
        loss(student[:-1], teacher)
    with pytest.raises(ValueError, match=r"argument \d is (longer|shorter) than|equal channels"):
        loss(student, teacher[:-1])


@pytest.mark.parametrize("name", MODULES)
def test_channels_must_be_those_announced(name):
    # One channel would broadcast.
    loss, (student, teacher) = make(name, EQUAL), random_maps(EQUAL)
    with pytest.raises(SHAPE_ERRORS):
        loss([m[:, :1] for m in student], teacher)
    with pytest.raises(SHAPE_ERRORS):
        loss(student, [m[:, :1] for m in teacher])


@pytest.mark.parametrize("make_loss", [AB, VID, ReviewKD])
def test_lists_of_channels_must_pair_up(make_loss):
    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        make_loss([3, 4], [3, 4, 5])


def test_fsp_says_what_it_needs():
    student, teacher = random_maps(OTHER_WIDTHS)
    with pytest.raises(ValueError, match=r"equal channels: the student has \[3, 5\], the teacher \[4, 2\]"):
        fsp_loss(student, teacher)
    with pytest.raises(ValueError, match="needs at least two, not 1"):
        fsp_loss(student[:1], student[:1])
