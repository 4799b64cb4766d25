"""What `stepwell doctor` takes besides the options of the run that it is asked about."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from stepwell.config.base import Count, Positive
from stepwell.config.commands import CompressConfig

BANDWIDTH = 10.0


class DoctorConfig(CompressConfig):
    """All options of `doctor`: those of the run, and how closely to look at what it will take."""

    plan: bool = False
    """Say what every stage will take (seconds, memory, disk), by timing a few steps of the run's own models
    on this device: about a minute, or two for large ones. Nothing is kept."""
    num_images: Count | None = None
    """Of --plan: so many training images, in place of --data: 1281167 for ImageNet. They are made up, as
    large as ImageNet's, and decoded as yours would be."""
    devices: Count = 1
    """Of --plan: also on so many devices like this one, among which every batch is divided."""
    bandwidth: Positive = BANDWIDTH
    """Of --devices: gigabytes a second that each can send to the next, while it receives as much. Every step
    ends with one all-reduce of its gradients over it."""

    @model_validator(mode="after")
    def _planned(self) -> Self:
        given = {
            "--num-images": self.num_images is not None,
            "--devices": self.devices > 1,
            "--bandwidth": self.bandwidth != BANDWIDTH,
        }
        if not self.plan:
            if flags := [flag for flag, is_given in given.items() if is_given]:
                raise ValueError(f"{flags[0]} is for --plan: give it, too")
            return self
        if not self.data and self.num_images is None:
            raise ValueError("--plan needs --data, or --num-images with the number of training images")
        if self.data and self.num_images is not None:
            raise ValueError("--data says how many images there are: leave --num-images out, or --data")
        if self.num_images is not None and self.task == "segmentation":
            raise ValueError("--num-images makes up images, and no masks: give --data")
        if given["--bandwidth"] and self.devices == 1:
            raise ValueError("--bandwidth is between devices: give --devices, too")
        if self.batch_size % self.devices:
            raise ValueError(
                f"--batch-size {self.batch_size} is that of all {self.devices} devices: give a multiple"
            )
        if self.cache_teacher:
            raise ValueError(
                "--plan times steps in which the teacher is asked: leave --cache-teacher out, and the plan "
                "is an upper bound"
            )
        if self.path == "curriculum":
            raise ValueError(
                "--plan times one teacher, and --path curriculum has several: without --plan, doctor "
                "estimates it"
            )
        return self
