"""The training loop: what it optimises, that it resumes, and that several processes do what one does."""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TOY, noisy_model, script
from torch.nn.parallel import DistributedDataParallel

import data
import train
from mentor import CONFIGS, Mentor
from tokenizer import Tokenizer

CONFIG, CPU = CONFIGS["test"], torch.device("cpu")


def toy_tokenizer():
    torch.manual_seed(0)
    return Tokenizer(CONFIG.downsample, CONFIG.codebook_size, CONFIG.code_dim, CONFIG.channels)


def toy_samples(n):
    dataset = data.Tasks(data.load_subjects("shapes"), train.MIXES[2], CONFIG.image_size, 0)
    return [dataset[i] for i in range(n)]


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Gradients are compared to 1e-5: no bf16, whatever the hardware."""
    monkeypatch.setattr(train, "has_bf16", lambda device: False)


def gradients(model, parts):
    model.zero_grad()
    train.accumulate(model, parts, CPU)
    return [p.grad.clone() for p in model.parameters()]


def test_accumulation_over_micro_batches_equals_one_batch(model):
    tokenizer, samples = toy_tokenizer(), toy_samples(16)
    whole, parts = (list(train.micro_batches(CONFIG, tokenizer, samples, size, CPU)) for size in (16, 4))
    assert len(whole) == 1 and len(parts) == 4
    assert parts[0][0].shape[1] < parts[-1][0].shape[1]  # sorted by length, so that short ones are short
    for a, b in zip(gradients(model, whole), gradients(model, parts)):
        assert torch.allclose(a, b, atol=1e-5)


def test_schedule_warms_up_to_the_peak_and_ends_at_zero():
    rates = [train.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == rates[5] == max(rates) == 1.0 and rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert train.learning_rate(0, 1, 1.0) == 1.0


@pytest.mark.parametrize("bf16", [True, False])
def test_every_parameter_is_in_exactly_one_group(bf16):
    for model in (Mentor(CONFIG), toy_tokenizer()):
        optimizers = train.make_optimizers(model, bf16, fused=False)
        grouped = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())
        assert len(optimizers) == 1 + bf16


def test_mix_is_read_and_normalised():
    assert train.parse_mix("segmentation=3,text-to-image=1") == {"segmentation": 0.75, "text-to-image": 0.25}
    for mix in train.MIXES.values():
        assert sum(mix.values()) == pytest.approx(1) and set(mix) <= set(data.TASKS)


def test_gains_measure_whether_the_model_looks_at_its_prefix(model):
    datasets = {"subject-driven": data.Tasks(data.load_subjects("shapes"), {"subject-driven": 1.0}, 32, 0, train=False)}
    deaf = Mentor(CONFIG)  # fresh: every block is the identity, so nothing of the prefix arrives
    for subject, looks in ((deaf, False), (model, True)):
        losses = train.held_out_losses(subject, toy_tokenizer(), datasets, 16, CPU)
        for gain in ("reference gain", "prompt gain"):
            assert (abs(losses[gain]) > 1e-3) == looks, (gain, losses)


# -- stages


def test_losses_fall_and_everything_is_written(trained):
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    for stage in (1, 2):
        first, *_, last = [r["held_out"] for r in records if r["stage"] == stage and "held_out" in r]
        assert last["text-to-image"] < first["text-to-image"] and last["segmentation"] < first["segmentation"]
        assert (trained / f"stage{stage}.png").stat().st_size > 10_000
    assert {"loss", "lr", "samples_per_second", "seconds"} <= set(next(r for r in records if "loss" in r))
    assert not list(trained.glob("*.tmp"))


def run_stage(stage, out, **changes):
    """A stage in this process, with the toy's settings -> its checkpoint."""
    args = argparse.Namespace(preset="test", data="shapes", backgrounds=None, steps=None, batch_size=None, seed=0, out=str(out), mix=None,
                              workers=0, compile=False)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.train(stage, argparse.Namespace(**vars(args) | changes), CPU, 0, 1)
        assert all(signal.getsignal(name) == handler for name, handler in handlers.items())
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    return torch.load(out / f"stage{stage}.pt", weights_only=True)


def test_stage_2_starts_from_stage_1(trained, tmp_path, capsys):
    shutil.copy(trained / "stage1.pt", tmp_path)
    before, after = torch.load(trained / "stage1.pt", weights_only=True), run_stage(2, tmp_path, steps=1)
    assert "448 subjects" in capsys.readouterr().err  # said before it starts
    for name, weight in before["model"].items():
        assert (after["model"][name] - weight).abs().max() < 0.02, name  # one step away
    assert any(not torch.equal(after["model"][name], weight) for name, weight in before["model"].items())
    assert all(torch.equal(after["tokenizer"][name], weight) for name, weight in before["tokenizer"].items())


def test_kill_in_the_middle_then_the_same_command_gives_the_same_weights(trained, tmp_path):
    shutil.copy(trained / "stage1.pt", tmp_path)
    command = [sys.executable, str(ROOT / "train.py"), "--stage", "2", *TOY, "--out", str(tmp_path)]
    log = tmp_path / "log.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not log.exists() or log.read_text().count('"loss"') < 4:
        time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):  # its worker leaves, too
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    killed = torch.load(tmp_path / "stage2.pt", weights_only=True)
    assert 0 < killed["step"] < killed["settings"]["steps"]
    assert script("train.py", *command[2:]).returncode == 0
    undisturbed, resumed = (torch.load(out / "stage2.pt", weights_only=True) for out in (trained, tmp_path))
    assert all(torch.equal(undisturbed["model"][name], weight) for name, weight in resumed["model"].items())


def test_interrupt_saves_and_leaves_with_one_line(trained, tmp_path):
    shutil.copy(trained / "stage1.pt", tmp_path)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--stage", "2", *TOY, "--out", str(tmp_path)],
                               stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stage2.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be interrupted"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved in" in error.splitlines()[-1] and "Traceback" not in error


def test_a_signal_after_the_last_step_is_not_lost(trained, tmp_path, monkeypatch):
    """The tokenizer's last evaluation may be under way: what is finished is kept, and stage 1 does not begin."""
    shutil.copy(trained / "stage1.pt", tmp_path)
    monkeypatch.setattr(train, "held_out_losses", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {})
    monkeypatch.setattr(train, "held_out_sheet", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        run_stage(2, tmp_path, steps=1)
    assert stopped.value.code == 130
    assert torch.load(tmp_path / "stage2.pt", weights_only=True)["step"] == 1


def test_a_signal_that_stops_the_compiler_too_leaves_with_one_line(trained, tmp_path, monkeypatch, capsys):
    shutil.copy(trained / "stage1.pt", tmp_path)
    accumulate, steps = train.accumulate, []

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("C++ compile error")
        return accumulate(*args)
    monkeypatch.setattr(train, "accumulate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run_stage(2, tmp_path)
    assert stopped.value.code == 130 and "stopped: 2 of 80 steps" in capsys.readouterr().err.splitlines()[-1]
    assert torch.load(tmp_path / "stage2.pt", weights_only=True)["step"] == 2
    steps.clear()
    monkeypatch.setattr(train, "accumulate", lambda *args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):  # without a signal it is one of ours
        run_stage(2, tmp_path)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_checkpoint(trained, tmp_path, monkeypatch):
    shutil.copy(trained / "stage1.pt", tmp_path)
    seen, accumulate = [], train.accumulate

    def accumulate_until(*args):
        seen.append(True)
        loss, beside = accumulate(*args)
        return (loss * float("nan") if len(seen) == 6 else loss), beside

    monkeypatch.setattr(train, "accumulate", accumulate_until)
    with pytest.raises(data.BadInput, match="step 5: loss nan.* checkpoint is .*stage2.pt, of step 4"):
        run_stage(2, tmp_path, steps=80)
    kept = torch.load(tmp_path / "stage2.pt", weights_only=True)
    assert kept["step"] == 4 and all(torch.isfinite(weight).all() for weight in kept["model"].values())


def test_terminating_the_whole_group_saves_and_leaves_with_one_line(trained, tmp_path):
    """As Ctrl-C, timeout and job schedulers do: the workers get the signal, too."""
    shutil.copy(trained / "stage1.pt", tmp_path)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--stage", "2", *TOY, "--workers", "2", "--out", str(tmp_path)],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "stage2.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be stopped"
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved in" in error.splitlines()[-1] and "Traceback" not in error


def test_full_disk_keeps_the_last_good_checkpoint(trained, tmp_path):
    import resource

    for name in ("stage1.pt", "tokenizer.pt"):
        shutil.copy(trained / name, tmp_path)

    def limit():  # a file may not grow beyond 100 kB: what a full disk looks like
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = script("train.py", "--stage", 2, *TOY, "--out", tmp_path, preexec_fn=limit)
    assert done.returncode == 2 and "stage2.pt: cannot be written" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "stage2.pt").exists() and not list(tmp_path.glob("*.tmp"))


# -- several processes


def one_of_two(rank, folder):
    """Half of the batch in each of two gloo processes; the first writes down the gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = noisy_model()
    train.has_bf16 = lambda device: False
    net, parts = DistributedDataParallel(model), list(train.micro_batches(CONFIG, toy_tokenizer(), toy_samples(16)[rank::2], 4, CPU))
    train.accumulate(net, parts, CPU)
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{folder}/gradients.pt")
    dist.barrier()  # neither leaves while the other still talks to it
    os._exit(0)  # gloo's threads abort now and then when the interpreter takes them down


def test_two_processes_give_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    model = noisy_model()
    alone = gradients(model, list(train.micro_batches(CONFIG, toy_tokenizer(), toy_samples(16), 16, CPU)))
    for a, b in zip(alone, torch.load(tmp_path / "gradients.pt", weights_only=True)):
        assert torch.allclose(a, b, atol=1e-5)


def test_torchrun_trains_as_one_process_does(trained, tmp_path):
    losses = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        shutil.copy(trained / "stage1.pt", out)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone",
                               str(ROOT / "train.py"), "--stage", "2", *TOY, "--steps", "3", "--out", str(out)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([r["held_out"]["text-to-image"] for r in records if "held_out" in r])
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
