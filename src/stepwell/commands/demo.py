"""`stepwell demo`: the whole path on scikit-learn's digits, 1,797 scans of handwritten digits.

Nothing here but the data set and a recipe: the work is done by the same `train` and `compress` that
everyone calls.
"""

from __future__ import annotations

from stepwell.commands import compress, train
from stepwell.commands.compress import Compressed
from stepwell.config.commands import CompressConfig, DemoConfig, TrainConfig
from stepwell.config.files import make_config
from stepwell.data.digits import MODEL, MODEL_ARGS, write_digits
from stepwell.run.distributed import from_main
from stepwell.run.progress import say


def run(config: DemoConfig) -> Compressed:
    """Train a teacher on the digits and compress it to a tenth, with the equal-compute control."""
    data = config.out_dir / "digits"
    from_main(lambda: write_digits(data))
    shared = {
        "data": str(data),
        "seed": config.seed,
        "augment": "affine",
        "device": config.device,
        "threads": 1,
    }
    say(
        train.run(
            make_config(
                TrainConfig,
                {
                    "model": MODEL,
                    "model_args": MODEL_ARGS,
                    "pretrained": False,
                    "epochs": 60 * config.effort,
                    "batch_size": 32,
                    "lr": 2e-3,
                    "out_dir": config.out_dir / "teacher",
                    **shared,
                },
            )
        )
    )
    return compress.run(
        make_config(
            CompressConfig,
            {
                "teacher": str(config.out_dir / "teacher"),
                "keep_ratio": 0.1,
                "path": "amd",  # all of it, to be seen
                "control": "equal_compute",
                "budget_epochs": 80 * config.effort,
                "batch_size": 64,
                "lr": 4e-3,
                "out_dir": config.out_dir / "compressed",
                **shared,
            },
        )
    )
