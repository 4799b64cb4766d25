"""examples/cluster: what the files for Slurm and Kubernetes start, as bash, torchrun and stepwell read it."""

from __future__ import annotations

import os
import re
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from stepwell.cli import parse
from stepwell.config.commands import CompressConfig

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SCRIPT = FOLDER / "slurm.sh"
MACHINES = ("node7", "node8", "node9", "node10")
# What the script calls: srun runs its words, others write down what they were given, a line for each word.
COMMANDS = {
    "srun": 'exec "$@"',
    "scontrol": f"printf '%s\\n' {' '.join(MACHINES)}",
    "mkdir": ":",
    "cp": 'printf "%s\\n" "$@" >copied',
    ".venv/bin/torchrun": 'printf "%s\\n" "$@" >started',
}


def sbatch_options() -> dict[str, str]:
    """What sbatch reads: comments before the first command."""
    options = {}
    for line in SCRIPT.read_text().splitlines()[1:]:
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            options[name] = value
    return options


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A folder in which the script has run as the only task of its job, with `copied` and `started`."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, line in COMMANDS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{line}\n")
        file.chmod(0o755)
    options = sbatch_options()
    slurm = {
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node[7-10]",
        "SLURM_NNODES": options["nodes"],
        "SLURM_GPUS_ON_NODE": options["gpus-per-node"],
    }
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(["bash", SCRIPT], cwd=folder, env={**os.environ, **slurm, "PATH": path}, check=True)
    return folder


def words(file: Path) -> list[str]:
    return file.read_text().splitlines()


def on_kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    return service, job


def check_command(launched: Namespace, machines: int, gpus: int) -> CompressConfig:
    """That torchrun starts a stepwell whose options exist, on as many processes as divide the batch."""
    assert launched.rdzv_backend == "c10d"
    assert (int(launched.nnodes), int(launched.nproc_per_node)) == (machines, gpus)
    assert launched.module
    command, *rest = launched.training_script_args
    assert (launched.training_script, command) == ("stepwell", "compress")
    config = parse(command, CompressConfig, rest)
    assert isinstance(config, CompressConfig)
    assert config.batch_size % (machines * gpus) == 0
    return config


def test_the_slurm_file_is_bash_that_asks_for_machines():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    options = sbatch_options()
    assert (int(options["nodes"]), int(options["gpus-per-node"])) == (4, 8)
    assert options["ntasks-per-node"] == "1"  # torchrun starts the others
    assert "requeue" in options
    assert re.fullmatch(r"\d+:\d\d:\d\d", options["time"])


def test_what_the_slurm_file_starts(started):
    launched = parse_args(words(started / "started"))
    config = check_command(launched, 4, 8)
    host, port = launched.rdzv_endpoint.split(":")
    assert host == MACHINES[0]
    assert 1024 < int(port) < 65536
    assert launched.rdzv_id == "1234567"
    how, source, target = words(started / "copied")
    assert "a" in how  # times are kept, by which the index of the shards is believed
    assert target == config.data
    assert Path(source).parent == config.out_dir.parents[1]


def test_an_option_that_stepwell_does_not_have_would_be_noticed(started):
    wrong = [word.replace("--keep", "--kept") for word in words(started / "started")]
    with pytest.raises(Exception, match="--kept"):
        check_command(parse_args(wrong), 4, 8)


def test_what_the_kubernetes_file_starts():
    service, job = on_kubernetes()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command, *rest = container["command"]
    assert command == "torchrun"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    config = check_command(launched := parse_args(rest), spec["completions"], gpus)
    assert spec["parallelism"] == spec["completions"]  # they wait for each other
    assert spec["completionMode"] == "Indexed"
    # A pod has a name of its own where its subdomain is a service without an address.
    name = service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == name
    assert launched.rdzv_endpoint.split(":")[0] == f"{job['metadata']['name']}-0.{name}"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.data in mounted
    assert str(config.out_dir.parents[1]) in mounted


def test_the_kubernetes_file_copies_the_images_first():
    pod = on_kubernetes()[1]["spec"]["template"]["spec"]
    (first,), (container,) = pod["initContainers"], pod["containers"]
    assert first["command"][0] == "cp"
    assert first["command"][-1] == container["command"][container["command"].index("--data") + 1]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for one in (first, container):
        assert {mount["name"] for mount in one["volumeMounts"]} <= volumes


def test_both_files_start_the_same_run(started):
    on_slurm = words(started / "started")
    pod = on_kubernetes()[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    one, other = (parse("compress", CompressConfig, w[w.index("compress") + 1 :]) for w in (on_slurm, pod))
    assert one is not None
    assert one.model_copy(update={"data": "/local"}) == other
