"""Recipes that make no sense are refused in one line, before anything is read."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from stepwell.config.base import flag_of
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config
from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.config.recipe_options import RecipeOptions
from stepwell.errors import ConfigError

NOTATION = (
    "not timm's notation, which is like rand-m9-mstd0.5-inc1 (magnitude m, number n, probability p, spread "
    "mstd, limit mmax, inc1 for increasing severity)"
)
MIXED = "makes one image of two, and"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mixup": 0.2, "logit_loss": "dkd"},
            f"options: --mixup {MIXED} --logit-loss dkd wants to know which one it is: leave out --mixup, or "
            f"take another loss",
        ),
        (
            {"cutmix": 1.0, "feature_loss": "crd"},
            f"options: --cutmix {MIXED} --feature-loss crd wants to know which one it is: leave out "
            f"--cutmix, or take another loss",
        ),
        (
            {"mix_prob": 0.5},
            "options: --mix-prob says how many batches are mixed: give --mixup or --cutmix, too",
        ),
        (
            {"cutmix": 1.0, "batch_size": 1},
            "options: --cutmix mixes the images of a batch, and --batch-size 1 leaves nothing to mix with",
        ),
        (
            {"label_smoothing": 0.1, "task_weight": 0.0},
            "options: --label-smoothing softens the labels, and with --task-weight 0 nobody reads them",
        ),
        ({"ema": 1.0}, "ema: Input should be less than 1, got 1.0"),
        ({"accumulate": 0}, "accumulate: Input should be greater than or equal to 1, got 0"),
        ({"keep_best": 0.0}, "keep_best: Input should be greater than 0, got 0.0"),
        ({"mixup": -1.0}, "mixup: Input should be greater than or equal to 0, got -1.0"),
        ({"rand_augment": "augmix-m5"}, f"options: --rand-augment augmix-m5: {NOTATION}"),
        ({"rand_augment": "rand-mnine"}, f"options: --rand-augment rand-mnine: {NOTATION}"),
        ({"rand_augment": "rand-m9-tnone"}, f"options: --rand-augment rand-m9-tnone: {NOTATION}"),
        ({"rand_augment": "rand-x9"}, f"options: --rand-augment rand-x9: {NOTATION}"),
        ({"rand_augment": ""}, f"options: --rand-augment : {NOTATION}"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError) as error:
        make_config(CompressConfig, values)
    assert str(error.value) == message


def test_train_refuses_likewise():
    with pytest.raises(ConfigError, match="--batch-size 1 leaves nothing to mix with"):
        make_config(TrainConfig, {"mixup": 0.2, "batch_size": 1})


@pytest.mark.parametrize(
    ("option", "name"),
    [*(("logit_loss", name) for name in LOGIT_LOSSES), *(("feature_loss", name) for name in FEATURE_LOSSES)],
)
def test_a_loss_goes_with_mixing_unless_it_wants_to_know_the_image(option, name):
    refused = name in {"dkd", "pld", "crd", "sskd", "ofa", "ifvd", "cirkd"}
    with pytest.raises(ConfigError, match=MIXED) if refused else nullcontext():
        make_config(CompressConfig, {"mixup": 0.2, option: name})


def test_a_loss_of_weight_0_is_not_asked():
    make_config(CompressConfig, {"mixup": 0.2, "feature_loss": "crd", "feature_weight": 0.0})


def test_all_of_it_is_off():
    for kind in (CompressConfig, TrainConfig):
        config = kind()
        assert not config.mixes
        assert (config.rand_augment, config.random_erasing) == (None, 0)
        assert (config.ema, config.accumulate, config.keep_best) == (0, 1, None)
    assert CompressConfig().label_smoothing == 0
    assert (TrainConfig().label_smoothing, TrainConfig().layer_decay) == (0.1, 1)


def test_the_guide_tells_of_every_option():
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "recipe.md").read_text(encoding="utf-8")
    for name in (*RecipeOptions.model_fields, "label_smoothing", "layer_decay"):
        assert f"`{flag_of(name)} " in guide, name
    headings = {
        re.sub(r"[^a-z -]", "", line[3:].lower()).replace(" ", "-")
        for line in guide.splitlines()
        if line.startswith("## ")
    }
    assert set(re.findall(r"\(#([a-z-]+)\)", guide)) == headings
