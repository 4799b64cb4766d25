"""What a process knows of the others from its launcher, before they talk."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from stepwell.cli import main
from stepwell.config.commands import CompareConfig, CompressConfig, TrainConfig
from stepwell.config.files import make_config
from stepwell.data.batches import images_per_process, part_of_batch
from stepwell.errors import ConfigError, DataError, LostProcessError
from stepwell.run import distributed, processes
from stepwell.run.device import find_device, set_up_torch
from stepwell.run.processes import alone, check_precision, is_main, rank, wait_for_the_end, world


@pytest.fixture
def second_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)


def test_a_plain_run_is_a_world_of_one(monkeypatch):
    assert (world(), rank(), is_main()) == (1, 0, True)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of something else: no launcher without LOCAL_RANK
    assert world() == 1
    assert distributed.from_main(lambda: 5) == 5
    assert distributed.joined([1, 2]) == [1, 2]
    tensor = torch.ones(2)
    distributed.mean_([tensor])
    assert distributed.whole(tensor) is tensor


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, capsys, tmp_path):
    """Else each would write a run of its own into the same folder."""
    words = ["inspect", str(tmp_path / "nothing")]
    for variable, who in (("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")):
        for number in ("1", "4"):
            monkeypatch.setenv(variable, number)
            assert main(words) == 2
            assert (f"{who} has started 4 processes" in capsys.readouterr().err) == (number == "4")
        monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun has started this one
        assert main(words) == 2
        assert who not in capsys.readouterr().err
        monkeypatch.delenv("LOCAL_RANK")
        monkeypatch.delenv(variable)


def test_a_number_format_that_a_launcher_asks_for_is_not_ignored(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_precision("fp32")  # no launcher has started this one
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_precision("bf16")
    with pytest.raises(ConfigError, match="asks for bf16, and --precision is fp32: give both the same"):
        set_up_torch(TrainConfig())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_precision("fp32")


@pytest.mark.usefixtures("second_of_three")
def test_who_one_is():
    assert (world(), rank(), is_main()) == (3, 1, False)
    with alone():
        assert (world(), rank(), is_main()) == (1, 0, False)


@pytest.mark.usefixtures("second_of_three")
def test_a_part_of_a_batch():
    assert part_of_batch(12).tolist() == [4, 5, 6, 7]
    assert part_of_batch(12, mixes=True).tolist() == [2, 3, 8, 9]
    options = make_config(CompressConfig, {"batch_size": 9})
    assert images_per_process(options, 100) == 3
    with pytest.raises(ConfigError) as caught:
        images_per_process(options, 100, mixes=True)
    assert str(caught.value) == (
        "--batch-size 9 is that of all 3 processes together, which get equal parts of pairs of images, which "
        "are mixed: give a multiple of 6"
    )
    with pytest.raises(ConfigError, match=r"a multiple of 3 \(a batch has at most the 8 training images\)"):
        images_per_process(options, 8)


@pytest.mark.usefixtures("second_of_three")
def test_each_has_a_gpu_of_its_own(monkeypatch):
    with pytest.raises(ConfigError, match="--device mps is a single one, and there are 3 processes"):
        find_device("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="more processes than GPUs here, of which there are 1"):
        find_device("cuda")
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("second_of_three")
def test_what_one_does_alone_the_others_leave(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "nothing")]) == 0
    assert main(["--help"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("second_of_three")
def test_several_processes_make_every_run_together():
    from stepwell.commands.compare import check

    with pytest.raises(ConfigError, match="--jobs 2: 3 processes make every run together"):
        check(make_config(CompareConfig, {"jobs": 2}))


def test_who_speaks_first(monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    wait_for_the_end(DataError("mine"))  # a single process
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    wait_for_the_end(DataError("of all"))
    assert waited == []
    wait_for_the_end(LostProcessError("follows from another's"))
    monkeypatch.setenv("RANK", "1")
    wait_for_the_end(DataError("of all"))
    assert waited == [processes.PATIENCE] * 2


@pytest.mark.usefixtures("second_of_three")
def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        ConfigError, match=r"several processes need Accelerate: pip install 'stepwell\[many\]'"
    ):
        distributed.joined([1])
