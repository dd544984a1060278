"""The files with which a job is started on several cards: the commands that they make are those of train.py."""

import re
import shlex
import subprocess

import pytest
import yaml
from torch.distributed.run import get_args_parser

import train
from model.command_line import CONFIGS
from model.memory import USABLE
from model.plan import cluster_of, plan, read_options, setup_of
from runtime.config import build, flatten, read_file, read_flags

SKYPILOT = yaml.safe_load((CONFIGS / "skypilot.yaml").read_text())
# What the launchers set, by the pages "Output environment variables" of sbatch and "Secrets and environment variables"
# of SkyPilot.
SLURM = {"SLURM_SUBMIT_DIR": ".", "SLURM_CPUS_PER_TASK": "8"}
SKY = {
    "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}  # fmt: skip


@pytest.fixture
def command(tmp_path):
    """A function that runs a script with no variables but those given, in a folder where `python` and `srun` are
    programs that print their arguments. Returns these."""
    for program in (".venv/bin/python", "bin/srun"):
        path = tmp_path / program
        path.parent.mkdir(parents=True)
        path.write_text('#!/bin/bash\nprintf "%q " "$@"\n')
        path.chmod(0o755)

    def run(script: list[str], variables: dict[str, str]) -> list[str]:
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **variables}
        done = subprocess.run(["bash", "-eu", *script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return shlex.split(done.stdout)

    return run


@pytest.mark.parametrize("script", [(CONFIGS / "slurm.sh").read_text(), SKYPILOT["run"], SKYPILOT["setup"]])
def test_scripts_have_no_syntax_errors(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_slurm_starts_train(command):
    flags = ["--config", "gpt2_1.5b.py", "--sample_prompt=two words"]
    argv = command([str(CONFIGS / "slurm.sh"), *flags], SLURM)
    here = argv.index("train.py")
    assert argv[here - 1] == ".venv/bin/python" and all(flag.startswith("--") for flag in argv[: here - 1])
    assert read_flags(train.Config, argv[here + 1 :], "") == {"config": "gpt2_1.5b.py", "sample_prompt": "two words"}


def test_slurm_asks_for_a_task_for_each_gpu():
    asked = dict(re.findall(r"^#SBATCH --(.+)=(.+)$", (CONFIGS / "slurm.sh").read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["cpus-per-task"] == "8" and asked["signal"].startswith("TERM@")


@pytest.mark.parametrize("flags", [SKYPILOT["envs"]["FLAGS"], "--config gpt2_1.5b.py --steps=100"])
def test_skypilot_starts_train(command, flags):
    argv = command(["-c", SKYPILOT["run"]], SKY | SKYPILOT["envs"] | {"FLAGS": flags})
    assert argv[:2] == ["-m", "torch.distributed.run"]
    launch = get_args_parser().parse_args(argv[2:])
    assert (launch.nnodes, launch.nproc_per_node, launch.node_rank, launch.max_restarts) == ("2", "8", 1, 3)
    assert launch.master_addr == "10.0.0.1"
    assert launch.training_script == "train.py"
    config = read_flags(train.Config, launch.training_script_args, "")["config"]
    assert (CONFIGS / config).is_file()


def test_skypilot_sets_up_what_it_runs():
    assert SKYPILOT["setup"].split() == ["make", ".venv/ready"]
    assert ".venv/ready:" in (CONFIGS.parent / "Makefile").read_text()


def test_gpt2_xl_is_predicted_to_fit_eight_cards_of_80_gb():
    name = "gpt2_1.5b.py"
    config = build(train.Config, flatten(train.Config, read_file(name, CONFIGS)))
    assert config.shape.n_parameters() == pytest.approx(1.558e9, rel=0.01)
    assert config.batch_size * config.shape.seq_len == 2**20
    options = read_options([f"--config={name}"])
    # Of this micro-batch alone: `auto` tries all that divide the batch, for a second each.
    found = plan(setup_of(options, config.shape), cluster_of(options), config.batch_size, micro_batch=4)
    assert found.cluster.cards == 8 and found.memory.peak <= USABLE * 80e9
    days = config.tokens / found.tok_s / 86400
    assert 0.8 < days < 1.3  # llm.c takes one
