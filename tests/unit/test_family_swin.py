"""Swin, Swin V2, S3 of timm, and torchvision's: what is cut, what it computes and costs, how it leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import timm
import torch
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import nn
from torchvision.models import swin_t, swin_v2_t
from torchvision.models import swin_transformer as tv

from blocks import check_sliced_equals_masked, shaken, whole
from stepwell.config.path_options import GridOptions
from stepwell.data.batches import Batch
from stepwell.data.spec import InputSpec
from stepwell.losses.observe import Observed
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import Architecture, Card, narrow_and_load, save_model
from stepwell.models.export import export_onnx
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import kept_counts
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, fill
from stepwell.pruning.units import Candidate, Group, tensors_of
from stepwell.stages.grid import make_grid
from stepwell.stages.score import importance_by_gradient
from tiny import NUM_CLASSES, FixedEval, random_batches, random_images

RATIOS = (0.1, 0.6)
SPEC = InputSpec((32, 32), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Maps of 8 x 8 and 4 x 4: several windows, shifted in the second block; and then a single window.
TINY = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (3, 6),
    "window_size": 4,
    "mlp_ratio": 2.0,
    "num_classes": NUM_CLASSES,
}
V1, V2, CR = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"


def timm_swin(name: str, **args: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**TINY, **args})


def torchvision_swin(
    version: int = 1, window: int = 4, depths: Sequence[int] = (2, 2)
) -> Callable[[], nn.Module]:
    block, merging = (tv.SwinTransformerBlock, tv.PatchMerging)
    if version == 2:
        block, merging = tv.SwinTransformerBlockV2, tv.PatchMergingV2
    return lambda: tv.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=list(depths),
        num_heads=[3, 6][: len(depths)],
        window_size=[window, window],
        mlp_ratio=2.0,
        num_classes=NUM_CLASSES,
        block=block,
        downsample_layer=merging,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "v1": timm_swin(V1),
    "v1, windows that need padding": timm_swin(V1, window_size=3),
    "v1, windows and shift of two sizes": timm_swin(V1, window_size=(2, 4)),
    "v1, no bias, larger heads": timm_swin(V1, qkv_bias=False, head_dim=16),
    "v1, always windows, any size": timm_swin(V1, always_partition=True, strict_img_size=False),
    "s3": timm_swin("swin_s3_tiny_224", window_size=(4, 2)),
    "v2": timm_swin(V2),
    "v2, no bias, pretrained windows": timm_swin(V2, qkv_bias=False, pretrained_window_sizes=(6, 6)),
    "v2, windows that need padding": timm_swin(V2, window_size=3),
    "v2 cr": timm_swin(CR),
    "v2 cr, two heads, norms in between": timm_swin(CR, num_heads=(2, 6), extra_norm_stage=True),
    "torchvision v1": torchvision_swin(),
    "torchvision v1, windows that need padding": torchvision_swin(window=3),
    "torchvision v2": torchvision_swin(2),
    "torchvision v2, windows that need padding": torchvision_swin(2, window=3),
}


def can_be_built(name: str) -> bool:
    """Not all, in timm's older versions: there the mask of a shift lacks the padding, and does not fit."""
    try:
        MODELS[name]()
    except RuntimeError:
        return False
    return True


PADDED = "v2, windows that need padding"
CASES = [
    pytest.param(
        n, marks=pytest.mark.skipif(n == PADDED and not can_be_built(n), reason="timm cannot build it")
    )
    for n in MODELS
]
EACH_BLOCK = ["v1", "v2", "v2 cr", "torchvision v1", "torchvision v2"]
# Two blocks are enough, with one that is shifted; the exporter is slow.
SHALLOW: dict[str, Callable[[], nn.Module]] = {
    "v1": MODELS["v1"],
    "v2": timm_swin(V2, depths=(2,), num_heads=(3,)),
    "v2 cr": timm_swin(CR, depths=(2,), num_heads=(3,)),
    "torchvision v1": torchvision_swin(depths=(2,)),
    "torchvision v2": torchvision_swin(2, depths=(2,)),
}


def images(num: int = 2) -> torch.Tensor:
    return random_images(num, torch.float64, size=32)


def extracted(model: nn.Module, keep_ratio: float, min_heads: int = 0) -> tuple[Candidate, nn.Module]:
    """A candidate of `model`; without attention and FFN in some blocks, if it is small."""
    groups = find_groups(model)
    scores = {g.name: [1.0 / (i + 1) + position / 1000 for i in range(g.num_units)]
              for position, g in enumerate(groups)}  # fmt: skip
    grid = make_grid(groups, scores, [keep_ratio], GridOptions(round_to=2, min_heads_per_layer=min_heads))
    return grid[0], SharedWeights(model, groups, tensors_of(model), grid).extract(0).eval()


@pytest.mark.parametrize("name", CASES)
def test_sliced_equals_masked(name):
    check_sliced_equals_masked(shaken(MODELS[name]), images(1), RATIOS)


@pytest.mark.parametrize("name", CASES)
def test_at_full_width_nothing_changes(name):
    model = shaken(MODELS[name])
    groups = find_groups(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("logit_scale"):
                parameter[0] = 6.0  # more than counts
    copy = fill(build_skeleton(model, groups, whole(groups).widths), tensors_of(model)).eval()
    with torch.no_grad():
        torch.testing.assert_close(copy(images()), model(images()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_every_attention_and_ffn_is_cut_and_nothing_else(name):
    model = MODELS[name]()
    leaves = [n for n, _ in model.named_modules() if n.endswith((".attn", ".mlp"))]
    assert len(leaves) == 8
    assert [group.name for group in find_groups(model)] == leaves


def test_what_a_head_is_made_of():
    v1 = {g.name: g for g in find_groups(MODELS["v1"]())}["layers.1.blocks.0.attn"]
    assert repr(v1) == (
        "Group(layers.1.blocks.0.attn: 6 heads := layers.1.blocks.0.attn.qkv.weight(3, units, 8, 48), "
        "layers.1.blocks.0.attn.qkv.bias(3, units, 8), "
        "layers.1.blocks.0.attn.relative_position_bias_table(49, units), "
        "layers.1.blocks.0.attn.proj.weight(48, units, 8))"
    )
    v2 = {g.name: g for g in find_groups(MODELS["v2"]())}["layers.0.blocks.1.attn"]
    parts = {s.tensor.removeprefix("layers.0.blocks.1.attn."): s.axis for s in v2.slices}
    assert parts == {
        "qkv.weight": 1, "q_bias": 0, "k_bias": 0, "v_bias": 0, "logit_scale": 0, "cpb_mlp.2.weight": 0,
        "proj.weight": 1,
    }  # fmt: skip


def test_a_subclass_of_an_attention_stays_whole():
    class Other(WindowAttentionV2):
        pass

    model = MODELS["v2"]()
    model.get_submodule("layers.0.blocks.0").attn = Other(24, (4, 4), 3)
    assert "layers.0.blocks.0.attn" not in {g.name for g in find_groups(model)}


# --- a model that was cut before


@pytest.mark.parametrize("name", EACH_BLOCK)
def test_a_cut_model_can_be_cut_again(name):
    candidate, model = extracted(shaken(MODELS[name]), 0.6)
    groups = find_groups(model)
    assert {g.name: g.num_units for g in groups} == {n: w for n, w in candidate.widths.items() if w}
    assert any(g.num_units == 2 for g in groups if g.kind == "head")  # as many as meta_mlp has inputs
    check_sliced_equals_masked(model, images(1), (0.3, 0.7))


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's resizing of position biases
@pytest.mark.parametrize("name", ["v1", "v2", "v2 cr"])
def test_images_of_another_size_before_the_cut_or_after(name):
    teacher = MODELS[name]().double().eval()
    candidate, cut = extracted(teacher, 0.1)
    assert 0 in candidate.widths.values()
    resize = {"img_size": (48, 48), "window_size": (6, 6)}
    try:
        teacher.set_input_size(**resize)
    except RuntimeError as error:  # older versions of the other V2 keep a table of the old size
        pytest.skip(f"timm cannot resize its own model: {error}")
    cut.set_input_size(**resize)
    again = extracted(teacher, 0.1)[1]
    pixels = random_images(2, torch.float64, size=48)
    with torch.no_grad():
        torch.testing.assert_close(cut(pixels), again(pixels), rtol=1e-8, atol=1e-10)


# --- published sizes


@pytest.mark.parametrize(
    ("build", "size", "params", "gmacs"),
    [
        # As torchvision publishes them for its own; the papers' 4.5, 15.4 and 5.9 G are the same counts.
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), 224, 28_288_354, 4.491),
        (lambda: timm.create_model("swin_base_patch4_window7_224"), 224, 87_768_224, 15.431),
        (lambda: timm.create_model("swinv2_tiny_window8_256"), 256, 28_347_154, 5.94),
        (lambda: swin_t(), 224, 28_288_354, 4.491),
        (lambda: swin_v2_t(), 256, 28_351_570, 5.94),
    ],
)
def test_published_sizes(build, size, params, gmacs):
    with torch.device("meta"):
        model = build()
    spec = InputSpec((size, size), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert num_params(model) == params
    assert count_macs(model, spec) / 1e9 == pytest.approx(gmacs, rel=1e-3)
    groups = find_groups(model)
    skeleton = build_skeleton(model, groups, whole(groups).widths)
    assert (num_params(skeleton), count_macs(skeleton, spec)) == (params, count_macs(model, spec))


@pytest.mark.parametrize(
    ("name", "totals", "kept"),
    [
        ("swin_base_patch4_window7_224", (8, 16, 288, 64), (1, 2, 29, 6)),
        ("swin_large_patch4_window7_224", (12, 24, 432, 96), (1, 2, 43, 10)),
        ("swin_tiny_patch4_window7_224", (6, 12, 72, 48), (1, 1, 7, 5)),
    ],
)
def test_a_tenth_of_the_heads_of_each_stage(name, totals, kept):
    with torch.device("meta"):
        groups = [g for g in find_groups(timm.create_model(name)) if g.kind == "head"]
    scores = {g.name: torch.rand(g.num_units).tolist() for g in groups}
    assert _by_section(groups, {g.name: g.num_units for g in groups}) == totals
    assert _by_section(groups, kept_counts(groups, scores, 0.1)) == kept


def _by_section(groups: list[Group], counts: dict[str, int]) -> tuple[int, ...]:
    sections: Counter[str] = Counter()
    for group in groups:
        sections[group.section] += counts[group.name]
    assert list(sections) == [f"layers.{i}.blocks" for i in range(4)]
    return tuple(sections.values())


def test_macs_and_parameters_fall_by_what_a_head_costs():
    """METHODS: a head of size d on width C costs d (4 C + 3) parameters and its column of the table."""
    model = MODELS["v1"]()
    groups = find_groups(model)
    widths = whole(groups).widths | {"layers.0.blocks.1.attn": 1}
    skeleton = build_skeleton(model, groups, widths)
    size, width, tokens, windows = 8, 24, 16, 4
    assert num_params(model) - num_params(skeleton) == 2 * (size * (4 * width + 3) + 49)
    macs = windows * (4 * tokens * width * size + 2 * tokens**2 * size)
    assert count_macs(model, SPEC) - count_macs(skeleton, SPEC) == 2 * macs


# --- states


@pytest.mark.parametrize("name", EACH_BLOCK)
def test_states_of_a_small_candidate_have_the_shapes_of_the_teachers(name):
    model = MODELS[name]().eval()
    blocks = list(dict.fromkeys(group.block for group in find_groups(model)))
    assert len(blocks) == 4
    _, small = extracted(model, 0.1)
    with torch.no_grad():
        whole_states = Observed(model, blocks)(random_images(size=32))[1]
        states = Observed(small, blocks)(random_images(size=32))[1]
    assert [s.shape for s in states] == [s.shape for s in whole_states]


# --- scores


@pytest.mark.parametrize("name", EACH_BLOCK)
def test_scores_of_a_batch_are_those_of_its_images_one_by_one(name):
    """An attention sees the windows of all images in its first dimension."""
    model = shaken(MODELS[name])
    groups = find_groups(model)
    batch = Batch(images(3), random_batches(1, 3)[0].labels, torch.arange(3))
    single = [Batch(batch.images[i : i + 1], batch.labels[i : i + 1], torch.tensor([i])) for i in range(3)]
    together = importance_by_gradient(model, groups, FixedEval([batch])).raw
    apart = [importance_by_gradient(model, groups, FixedEval([one])).raw for one in single]
    for group in groups:
        mean = torch.tensor([one[group.name] for one in apart], dtype=torch.float64).mean(dim=0)
        largest = mean.max()
        assert largest > 1e-7
        assert torch.allclose(torch.tensor(together[group.name], dtype=torch.float64), mean,
                              rtol=1e-4, atol=1e-4 * largest.item())  # fmt: skip


@pytest.mark.parametrize("name", EACH_BLOCK)
def test_a_score_is_what_the_loss_loses_when_the_head_fades(name):
    """Finite differences on the columns of the output layer: a gate of 1 +- e on one head."""
    model = shaken(MODELS[name])
    group = find_groups(model)[2]
    assert group.name.endswith("1.attn")
    batch = Batch(images(1), torch.tensor([2]), torch.arange(1))
    found = importance_by_gradient(model, [group], FixedEval([batch])).raw[group.name]
    columns = model.get_submodule(group.gate).weight
    with torch.no_grad():
        for head, expected in enumerate(found):
            block = columns[:, 8 * head : 8 * head + 8]
            original, losses = block.clone(), []
            for gate in (1.001, 0.999):
                block.copy_(gate * original)
                losses.append(nn.functional.cross_entropy(model(batch.images), batch.labels))
            block.copy_(original)
            assert abs(losses[0] - losses[1]).item() / 0.002 == pytest.approx(expected, rel=1e-2, abs=1e-4)


# --- delivery


@pytest.mark.parametrize("name", SHALLOW)
@pytest.mark.slow
def test_save_load_and_onnx(name, tmp_path):
    """Of a candidate that has lost the attention of its first block and most of that of the second."""
    model = shaken(SHALLOW[name]).float()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("k_bias"):  # not saved: it is 0 in every model but a shaken one
            buffer.zero_()
    candidate, small = extracted(model, 0.2)
    assert [w for n, w in candidate.widths.items() if n.endswith("attn")][:2] == [0, 1]
    pixels = random_images(3, size=32)
    card = Card(
        architecture=Architecture(source="factory", name=name),
        widths=candidate.widths,
        classes=[str(i) for i in range(NUM_CLASSES)],
        input=SPEC,
    )
    save_model(tmp_path, small, card)
    loaded = narrow_and_load(SHALLOW[name](), candidate.widths, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(pixels), small(pixels))
    assert export_onnx(small, SPEC, tmp_path / "model.onnx", pixels) <= 1e-5


def test_gradients_reach_every_parameter_of_a_cut_swin():
    """Backward of a cut model, as in training; the norm before an emptied attention has nothing to do."""
    for name in EACH_BLOCK:
        candidate, small = extracted(shaken(MODELS[name]), 0.5, min_heads=1)
        assert min(candidate.widths.values()) > 0
        small(images(1)).square().sum().backward()
        idle = [n for n, p in small.named_parameters() if p.grad is None]
        assert not idle, name
