"""A model sharded over ranks: the same training as by one process, and checkpoints that any number of ranks reads."""

import json
import os
import pickle
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from ranks import Launcher, brief, code_of, forks  # noqa: F401
from torch.overrides import TorchFunctionMode

import kernels.linear_cross_entropy
import train
from kernels import KernelChoice, bind
from model import checkpoint, export, generate, shards
from model.diagnostics import Probe
from model.gpt import GPT, ModelConfig
from model.memory import Setup
from model.optim import OptimizerConfig, build_optimizers
from model.parallel import build_model, pick_shard
from runtime.distributed import ALONE, joined

pytestmark = forks

QUIET = {
    "batch_size": 8, "log_every": 1, "eval_every": 4, "save_every": 4, "eval_tokens": 1000, "steps": 8,
    "schedule": "constant", "warmup": 0,
}  # fmt: skip
KINDS = {
    "adamw": {"optimizer": "adamw", "model.tied": False, "model.init": "look-back", "diag": 3},
    "muon": {"optimizer": "muon", "micro_batch": 1, "model.recompute": 0.5},
}


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path / "said")


@pytest.fixture
def job(tiny, tmp_path, launcher):
    """A function that trains `mine` on some ranks, `per_machine` to a machine, with some options changed. Returns the
    run's folder."""

    def start(size, *extra, per_machine=8, **changes):
        flags = [*tiny(tmp_path / "out", **QUIET | {"run": "mine"} | changes), *extra]

        def run(rank):
            os.environ |= {"LOCAL_RANK": str(rank % per_machine), "LOCAL_WORLD_SIZE": str(min(size, per_machine))}
            return train.main(flags)

        codes = launcher.run(size, run) if size else [train.main(flags)]  # 0 ranks: without a launcher
        assert set(codes) == {0}, launcher.said()
        return tmp_path / "out" / "mine"

    return start


@contextmanager
def in_float64():
    """There the order of a sum changes so little that any wrong factor shows."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64():
    with in_float64():
        yield


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    keys = ("step", "loss", "grad_norm", "val_loss")
    return [{key: row[key] for key in keys if key in row} for row in rows if "event" not in row]


def tensors(folder):
    state = checkpoint.load(folder / "last.pt", parts=checkpoint.SHARDED)
    return dict(checkpoint.named_tensors({part: state[part] for part in checkpoint.SHARDED}))


def assert_same_training(folder, expected):
    for row, other in zip(losses(folder), losses(expected), strict=True):
        assert row == pytest.approx(other, rel=1e-9)
    torch.testing.assert_close(tensors(folder), tensors(expected), rtol=1e-7, atol=1e-9)
    assert (folder / "samples.txt").read_text() == (expected / "samples.txt").read_text()


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The folders of runs of one process."""
    out = tmp_path_factory.mktemp("alone")
    with in_float64():
        for name, knobs in KINDS.items():
            assert train.main(tiny(out, run=name, **QUIET | knobs)) == 0
    return out


@pytest.mark.parametrize("kind, size, shard", [
    ("adamw", 1, "full"), ("adamw", 2, "full"), ("muon", 2, "full"), ("muon", 4, "hybrid"),
])  # fmt: skip
def test_a_sharded_model_trains_as_one_process_does(job, alone, float64, kind, size, shard):
    """Samples and evaluations, too, and diagnostics in between. A machine has two ranks."""
    assert_same_training(job(size, shard=shard, per_machine=2, **KINDS[kind]), alone / kind)


@pytest.mark.parametrize("kind, before, after", [
    ("adamw", (2, "full"), (4, "full")), ("muon", (2, "full"), (0, "off")), ("muon", (2, "off"), (2, "full")),
], ids=["more ranks", "one process", "sharded now"])  # fmt: skip
def test_a_run_goes_on_with_any_number_of_ranks_and_any_sharding(job, alone, float64, kind, before, after):
    job(before[0], shard=before[1], steps=4, **KINDS[kind])
    folder = job(after[0], "--resume", shard=after[1], **KINDS[kind])
    samples = folder / "samples.txt"
    samples.write_text(samples.read_text()[samples.read_text().index("--- step 8") :])  # without that of step 4
    assert_same_training(folder, alone / kind)
    kept = {checkpoint.shards_folder(path) for path in folder.glob("*.pt")} - {""}
    assert {path.name for path in folder.glob("shards-*")} == kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_its_checkpoint_made_whole(job, alone, float64, tmp_path, kind):
    """In one process, and on two ranks that share nothing."""
    folder, whole = job(2, shard="full", steps=4, **KINDS[kind]), tmp_path / "whole.pt"
    saved = tensors(folder)
    assert export.main(["--run", str(folder), "--to", str(whole)]) == 0
    for path in (*folder.glob("*.pt"), *folder.glob("shards-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copy(whole, folder / "last.pt")
    assert tensors(folder).keys() == saved.keys()
    assert all(torch.equal(x, saved[name]) for name, x in tensors(folder).items())
    shutil.copytree(folder, tmp_path / "spare")
    for size in (0, 2):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "spare", folder)
        job(size, "--resume", shard="off", **KINDS[kind])
        samples = folder / "samples.txt"
        samples.write_text(samples.read_text()[samples.read_text().index("--- step 8") :])  # without that of step 4
        assert_same_training(folder, alone / kind)


def test_a_whole_checkpoint_is_copied(alone, tmp_path, capsys):
    source, target = alone / "adamw" / "last.pt", tmp_path / "whole.pt"
    argv = ["--run", str(source.parent), "--to", str(target)]
    assert export.main(argv) == 0
    found, expected = (
        checkpoint.map_tensors(lambda name, x: x.tolist(), torch.load(path, weights_only=True))
        for path in (target, source)
    )
    assert found == expected
    before = target.read_bytes()
    assert export.main(argv) == 2 and "exists" in capsys.readouterr().err and target.read_bytes() == before


def test_a_kill_in_a_save_leaves_the_last_checkpoint(job, launcher, tiny, tmp_path):
    """Rank 1 dies when it has written its part. What is there of that is deleted when a later one is complete."""
    folder, flags = tmp_path / "out" / "mine", tiny(tmp_path / "out", **QUIET | {"run": "mine", "shard": "full"})

    def die_in_second_save(rank):
        checksum = shards._checksum

        def die(path):
            if rank and "shards-8" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            return checksum(path)

        shards._checksum = die
        return train.main(flags)

    assert launcher.run(2, die_in_second_save) == [1, -signal.SIGKILL]
    assert checkpoint.load(folder / "last.pt")["step"] == 4 and (folder / "shards-8").exists()
    job(2, "--resume", shard="full")
    assert checkpoint.load(folder / "last.pt")["step"] == 8
    assert {path.name for path in folder.glob("shards-*")} == {"shards-4", "shards-8-2"}


def test_a_rank_that_is_stopped_in_a_save_ends_the_others(launcher, tiny, tmp_path, monkeypatch):
    """Rank 0 does not wait for the rest of a checkpoint that cannot come."""
    monkeypatch.setattr("runtime.distributed.DEAD_S", 3.0)
    monkeypatch.setattr("runtime.distributed.LINGER_S", 0.0)
    monkeypatch.setattr("model.saver.REPORT_S", 0.1)
    flags = tiny(tmp_path / "out", **QUIET | {"run": "mine", "shard": "full"})

    def stop_in_second_save(rank):
        write = shards.write

        def stop(folder, step, *args):
            if rank and step == 8:
                os.kill(os.getpid(), signal.SIGSTOP)
            return write(folder, step, *args)

        shards.write = stop
        return train.main(flags)

    main, stopped = launcher.start(2, stop_in_second_save)
    code = code_of(main)
    os.kill(stopped, signal.SIGKILL)
    assert (code, code_of(stopped)) == (1, -signal.SIGKILL)
    assert "has not been heard of for 3 s; --resume continues from" in launcher.said()


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory):
    """The folder of a run of two ranks, in float32."""
    out = tmp_path_factory.mktemp("sharded")
    flags = tiny(out, run="mine", **QUIET | {"shard": "full", "steps": 4})
    assert Launcher(out / "said").run(2, lambda rank: train.main(flags)) == [0, 0]
    return out / "mine"


@pytest.fixture
def mine(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "mine")


def test_other_programs_read_a_sharded_run(mine, tmp_path, capsys):
    assert generate.main(["--run", str(mine), "--tokens=3", "--device=cpu"]) == 0
    assert export.main(["--run", str(mine), "--to", str(tmp_path / "hf")]) == 0


def test_reading_a_sharded_run_runs_no_code(mine, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (folder,) = mine.glob("shards-*")
    (folder / ".metadata").write_bytes(pickle.dumps(Trap()))  # where DCP keeps its own
    checkpoint.load(mine / "last.pt")
    torch.save({"format": checkpoint.SHARDED_FORMAT, "shards": Trap()}, mine / "last.pt")
    with pytest.raises(checkpoint.CheckpointError, match="more than tensors and plain values"):
        checkpoint.load(mine / "last.pt")
    assert not (tmp_path / "sprung").exists()


def test_damaged_shards_are_refused(mine):
    (folder,) = mine.glob("shards-*")
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        for damaged, why in ((flipped, "damaged"), (whole[:-9], "damaged"), (None, "missing")):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(checkpoint.CheckpointError, match=rf"last\.pt cannot be used: its file .* is {why}"):
                checkpoint.load(mine / "last.pt")
        file.write_bytes(whole)
    state = checkpoint.load_to_resume(mine / "last.pt", train.Config)
    state["shards"]["folder"] = f"../{mine.name}/{folder.name}"
    checkpoint.save(mine, state)
    with pytest.raises(checkpoint.CheckpointError, match="named by paths"):
        checkpoint.load(mine / "last.pt")


def test_shards_of_another_model_are_refused(mine):
    (folder,) = mine.glob("shards-*")
    state = checkpoint.load_to_resume(mine / "last.pt", train.Config)
    state["model"]["norm.gain"] = torch.empty(33, device="meta")
    checkpoint.save(mine, state)
    with pytest.raises(checkpoint.CheckpointError, match=f"the files in {folder} do not have its tensors"):
        checkpoint.load(mine / "last.pt")


def test_a_full_disk_ends_all_ranks_and_keeps_the_last_checkpoint(launcher, tiny, tmp_path):
    flags = tiny(tmp_path / "out", **QUIET | {"run": "mine", "shard": "full"})

    def fail_in_second_save(rank):
        write = shards.dcp.HuggingFaceStorageWriter.write_data

        def full(writer, *args):
            if rank and "shards-8" in str(writer.path):
                raise OSError(28, "No space left on device")
            return write(writer, *args)

        shards.dcp.HuggingFaceStorageWriter.write_data = full
        return train.main(flags)

    assert launcher.run(2, fail_in_second_save) == [1, 1]
    assert "cannot write" in launcher.said() and "No space left on device" in launcher.said()
    folder = tmp_path / "out" / "mine"
    assert checkpoint.load(folder / "last.pt")["step"] == 4
    assert [path.name for path in folder.glob("shards-*")] == ["shards-4"]


# Below, ranks build a model themselves.
CONFIG = ModelConfig(n_layer=2, n_head=2, d_model=32, seq_len=16).resolved(257)
CPU = torch.device("cpu")


def on_ranks(launcher, size, run):
    """Call `run(world)` on each of `size` ranks, and end with its first error, if any."""

    def start(rank):
        with joined(lambda failure: 1) as world:
            run(world)
        return 0

    assert launcher.run(size, start) == [0] * size, launcher.said()


def model_of(world, shard="full", choice=KernelChoice(), precision="fp32", config=CONFIG):  # noqa: B008
    torch.manual_seed(0)
    setup = pick_shard(shard, Setup(config, "cpu", precision, None), CPU, world)
    return build_model(setup, bind(choice, CPU), CPU)


def batch(world=ALONE):
    ids = torch.randint(257, (4, 16), generator=torch.Generator().manual_seed(1))
    return [x[world.rank :: world.size] for x in (ids, ids.roll(1, 1))]


def test_initial_weights_are_those_of_one_process(launcher):
    def compare(world, **knobs):
        config = ModelConfig(n_layer=2, n_head=2, d_model=32, seq_len=16, **knobs).resolved(53)
        model = model_of(world, config=config)
        follows = torch.rand(1)
        torch.manual_seed(0)
        expected = GPT(config, bind(KernelChoice(), CPU))
        assert torch.equal(follows, torch.rand(1))
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(p.full_tensor(), q), name
            assert p.to_local().numel() <= -(-len(q) // 3) * q[0].numel()
        for (name, x), y in zip(model.named_buffers(), expected.buffers(), strict=True):
            assert torch.equal(x, y), name

    def run(world):
        compare(world, tied=False, init="look-back")
        compare(world, init="xavier", norm="layer", bias=True, position="learned")
        compare(world, position="sinusoidal")
        compare(world, position="alibi")

    on_ranks(launcher, 3, run)


def test_in_bf16_parameters_are_gathered_in_half_precision_and_gradients_summed_in_float32(launcher):
    def run(world):
        model, gathered = model_of(world, precision="bf16"), []
        model.blocks[0].attention.register_forward_hook(lambda block, *_: gathered.append(block.qkv.weight.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch(world), "sum")
        loss.backward()
        assert gathered == [torch.bfloat16] and not model.copies()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        exact = model_of(ALONE, "off")
        exact(*batch(), "sum").backward()
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            assert (p.grad.full_tensor() - q.grad).norm() < 0.05 * q.grad.norm()

    on_ranks(launcher, 2, run)


class Logits(TorchFunctionMode):
    """Records the number of rows of all tensors that have a column for every token."""

    def __init__(self):
        super().__init__()
        self.rows = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] >= 257:
            self.rows.add(result.numel() // result.shape[-1])
        return result


def test_a_sharded_model_never_makes_all_logits(launcher, monkeypatch):
    monkeypatch.setattr(kernels.linear_cross_entropy, "CHUNK_BYTES", 4 * 320 * 4)  # four rows of them

    def run(world):
        config = ModelConfig(n_layer=1, n_head=1, d_model=8, seq_len=16).resolved(257)
        model = model_of(world, choice=KernelChoice(linear_cross_entropy="triton"), config=config)
        ids = torch.arange(32).view(2, 16)
        with Logits() as logits:
            model(ids, ids, "sum").backward()
        assert 4 in logits.rows and max(logits.rows) < 32, logits.rows

    on_ranks(launcher, 2, run)


def test_diagnostics_are_those_of_one_process(launcher):
    """After a sample, and of one micro-batch of two rows after the other, which two ranks share."""

    def measured(world, shard):
        model = model_of(world, shard)
        optimizers = build_optimizers(model, OptimizerConfig("adamw"), world)
        generate.generate(model, [[1]], 2, generator=torch.Generator())
        probe = Probe(model, optimizers, world=world)
        probe.before_backward()
        ids, _ = batch()
        targets = torch.full_like(ids, 5)  # so that gradients agree, and their noise can be measured
        for rows in ((0, 1), (2, 3)):
            rows = list(rows[world.rank :: world.size])
            model(ids[rows], targets[rows], "sum", torch.tensor(1 / 64)).backward()
            probe.after_backward()
        probe.before_step()
        for optimizer in optimizers:
            optimizer.step()
        row = probe.after_step(ids[:: world.size])
        return {key: row[key] for key in row if key not in ("activation", "entropy")}  # these are of a rank's rows

    def run(world):
        ours, alone = measured(world, "full"), measured(ALONE, "off")
        assert ours.keys() == alone.keys()
        assert alone["noise_scale"] and alone["coherence"]
        for key, value in alone.items():
            assert ours[key] == pytest.approx(value, rel=1e-6), key

    with in_float64():
        on_ranks(launcher, 2, run)


@pytest.mark.parametrize("flags, said", [
    ("--compile=on", "cannot compile"), ("--capture=on", "cannot capture"), ("--precision=fp16", "not fp16"),
], ids=str)  # fmt: skip
def test_what_a_sharded_model_cannot_do_is_refused(launcher, tiny, tmp_path, flags, said):
    flags = [*tiny(tmp_path / "out", **QUIET | {"shard": "full"}), flags]
    assert launcher.run(1, lambda rank: train.main(flags)) == [2]
    assert said in launcher.said().splitlines()[-1] and not (tmp_path / "out").exists()


def test_sharding_needs_a_launcher(run, capsys):
    code, folder = run(shard="full")
    assert code == 2 and not folder.exists()
    assert "shard full needs several ranks: start the job with torchrun" in capsys.readouterr().err
