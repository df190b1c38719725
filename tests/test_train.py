"""The training loop: what it optimises, that it resumes, and that several processes do what one does."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TOY, noisy_model, script, sprite
from torch.nn.parallel import DistributedDataParallel

import data
import train
from data import TASKS
from mentor import (CODES, CONFIGS, HIDDEN, PATCH, WORD_IDS, BadInput, Mentor, build_sequence, hide_condition,
                    weighted_loss)
from tokenizer import Tokenizer, reference_copies, to_images

CONFIG, CPU = CONFIGS["test"], torch.device("cpu")
N = CONFIG.n_patches


def toy_tokenizer():
    torch.manual_seed(0)
    return Tokenizer(CONFIG)


def toy_samples(n):
    dataset = data.TaskDataset(data.load_subjects("shapes"), train.MIXES[2], CONFIG.image_size, (0,))
    return [dataset[i] for i in range(n)]


def toy_batches(n, size):
    return train.collate(CONFIG, size, toy_samples(n))


def toy_run(stage=2, step=9, init=None):
    """What a step asks of a run: its plan, its tokenizer, and how far it is."""
    plan = argparse.Namespace(stage=stage, device=CPU, steps=10, settings={"init": init})
    return argparse.Namespace(plan=plan, tokenizer=toy_tokenizer(), step=step)


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Gradients are compared to 1e-5: no bf16, whatever the hardware."""
    monkeypatch.setattr(train, "has_bf16", lambda device: False)
    monkeypatch.setattr(train, "autocast", lambda device: torch.autocast(device.type, enabled=False))


def gradients(model, batches):
    model.zero_grad()
    train.accumulate(toy_run(), model, batches)
    return [p.grad.clone() for p in model.parameters()]


def test_workers_lay_out_what_the_device_fills_with_codes():
    """The same as encoding each picture by itself and building its sequence with the codes."""
    samples, toy = toy_samples(16), toy_tokenizer()
    assert "picture" in {s.hide for s in samples}

    def encode(picture):
        return toy.encode(to_images([picture], CPU))[0]

    def by_itself(s):
        copies = [reference_copies(CONFIG, TASKS[s.task].copies, reference) for reference in s.references]
        references = [torch.stack([encode(copy) for copy in of_one]) for of_one in copies]
        condition = hide_condition(data.fill_prompt(s.task, s.labels, s.caption), references, s.hide)
        target = encode(s.target)
        tokens = build_sequence(CONFIG, *condition, TASKS[s.task].copies, target)
        if s.hide == "picture":  # what is drawn so far is not told
            tokens[len(tokens) - N + 1 :, WORD_IDS] = HIDDEN
            tokens[..., CODES] *= tokens[:, :1] == PATCH
        return tokens, target

    wanted, found = [by_itself(s) for s in samples], []
    for batch in train.collate(CONFIG, 4, samples):
        tokens, lengths, targets = train.fill_codes(toy, batch, CPU)
        tokens[:, CODES] *= tokens[:, :1] == PATCH  # what stands beside a word is never looked at
        found += zip(tokens.split(lengths), targets)
    for (tokens, target), (laid_out, codes) in zip(wanted, found, strict=True):
        assert torch.equal(tokens, laid_out) and torch.equal(target, codes)


def test_a_patch_weighs_the_more_the_more_of_the_subject_it_holds():
    nats, coverage, ones = torch.rand(2, N, 3), torch.zeros(2, N), torch.ones(2)
    assert weighted_loss(nats, coverage, ones).item() == pytest.approx(nats.sum(-1).mean().item(), rel=1e-5)
    coverage[0, 3], coverage[0, 5] = 1, 0.5
    nats[0] = 0
    nats[0, 3], nats[0, 5], nats[0, 7] = 1, 10, 100  # each a sum of three codes
    wanted = 3 * (5 * 1 + 3 * 10 + 1 * 100) / (N - 2 + 5 + 3)  # the weights have mean 1
    assert weighted_loss(nats[:1], coverage[:1], ones[:1]).item() == pytest.approx(wanted, rel=1e-5)


def test_the_coarsest_codes_of_segmentation_count_eight_times():
    samples = toy_samples(16)
    assert {s.task for s in samples} > {"segmentation"}
    for s in samples:
        (batch,) = train.collate(CONFIG, 1, [s])
        nats, even = torch.rand(1, N, 3), torch.zeros(1, N)
        wanted = (nats * torch.tensor([8 if s.task == "segmentation" else 1, 1, 1])).sum(-1).mean()
        assert weighted_loss(nats, even, batch.coarse).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_coarsest_codes_weigh_more_once_copying_is_learnt(model):
    """Not in stage 1, nor in the first third of stage 2, unless it starts from a trained model."""
    batch = next(b for b in toy_batches(16, 1) if b.coarse[0] == 8)

    def loss(*how):
        return train.batch_loss(toy_run(*how), model, batch)[0].item()

    assert loss(1, 9) == loss(2, 0) == loss(2, 2) < loss(2, 3) == loss(2, 9) == loss(1, 0, "cpu.pt")


def test_the_logged_loss_is_unweighted(model):
    batches, run = toy_batches(8, 4), toy_run()
    logged, _ = train.accumulate(run, model, batches)
    with torch.no_grad():
        nats = [model(*train.fill_codes(run.tokenizer, batch, CPU)) for batch in batches]
    wanted = torch.stack(nats).sum(-1).mean()
    assert logged.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_coverage_is_the_share_of_a_patch_that_the_subject_covers():
    samples = toy_samples(8)
    batches = train.collate(CONFIG, 8, samples)
    wanted = {s.target.tobytes(): s.mask.reshape(4, 8, 4, 8).mean((1, 3)).flatten() / 255 for s in samples}
    for picture, coverage in zip(batches[0].pictures, batches[0].coverage):
        assert torch.allclose(coverage, torch.tensor(wanted[picture.numpy().tobytes()]).float(), atol=1e-5)
    assert max(share.max() for share in wanted.values()) > train.SUBJECT_PATCH


def test_a_reference_at_two_thirds_is_shrunk_towards_the_middle_and_its_edges_go_on():
    picture = np.full((96, 96, 3), 50, np.uint8)
    picture[12:84, 12:84] = 200  # a subject given as most are: in the middle, .75 of the canvas
    as_it_is, smaller = reference_copies(CONFIG, TASKS["subject-driven"].copies, picture)
    assert np.array_equal(as_it_is, picture)
    wanted = np.full((96, 96, 3), 50, np.uint8)
    wanted[24:72, 24:72] = 200  # .5 of it
    assert (np.abs(smaller.astype(int) - wanted) > 20).mean() < 0.05  # (soft edges)
    assert len(reference_copies(CONFIG, TASKS["segmentation"].copies, picture)) == 1


def test_accumulation_over_micro_batches_equals_one_batch(model):
    whole, parts = toy_batches(16, 16), toy_batches(16, 4)
    assert len(whole) == 1 and len(parts) == 4
    assert len(whole[0].tokens) == sum(whole[0].lengths)  # no padding
    for a, b in zip(gradients(model, whole), gradients(model, parts)):
        assert torch.allclose(a, b, atol=1e-5)


def test_schedule_warms_up_to_the_peak_and_the_last_step_still_learns():
    rates = [train.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == rates[5] == max(rates) == 1.0
    assert 0 < rates[-1] < 0.01 and rates[5:] == sorted(rates[5:], reverse=True)
    assert train.learning_rate(0, 1, 1.0) == 1.0


@pytest.mark.parametrize("bf16", [True, False])
def test_every_parameter_is_in_exactly_one_group(bf16):
    for model in (Mentor(CONFIG), toy_tokenizer()):
        optimizers = train.make_optimizers(model, bf16)
        grouped = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())
        assert len(optimizers) == 1 + bf16


def test_muon_meets_each_projection_of_attention_alone():
    _, muon = train.make_optimizers(Mentor(CONFIG), True)
    shapes = [tuple(p.shape) for p in muon.param_groups[0]["params"]]
    assert shapes.count((64, 64)) == 2 * 4 and (192, 64) not in shapes  # q, k, v and proj of two layers


def test_mix_is_read_normalised_and_put_in_order():
    assert train.parse_mix("segmentation=3,text-to-image=1") == {"segmentation": 0.75, "text-to-image": 0.25}
    orders = [
        list(train.parse_mix(text)) for text in ("recovery=1,segmentation=1", "segmentation=1,recovery=1")
    ]
    assert orders[0] == orders[1]  # which task a random number means depends on it
    assert list(train.parse_mix("recovery=1,segmentation=0")) == ["recovery"]
    for mix in train.MIXES.values():
        assert sum(mix.values()) == pytest.approx(1) and list(mix) == [task for task in TASKS if task in mix]


def test_stages_and_seeds_share_no_samples():
    def first(seed, stage):
        args = argparse.Namespace(**ARGS | {"seed": seed, "out": "nowhere"})
        plan = train.make_plan(stage, args, CPU)
        subjects = data.load_subjects("shapes"), ()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "load_sources", lambda *args: subjects)
            dataset, held_out = train.make_datasets(plan, args)
        return dataset[0].target.tobytes(), next(iter(held_out.values()))[0].target.tobytes()

    trained = [first(seed, stage)[0] for seed in (0, 1) for stage in (0, 1, 2)]
    assert len(set(trained)) == 6
    assert first(0, 1)[1] == first(0, 2)[1] and first(0, 1)[1] not in trained  # held-out ones are all stages'


def test_gains_measure_whether_the_model_looks_at_its_prefix(model):
    subjects = data.load_subjects("shapes")
    datasets = {"subject-driven": data.TaskDataset(subjects, {"subject-driven": 1.0}, 32, (0,), train=False)}
    deaf = Mentor(CONFIG)  # fresh: every block is the identity, so nothing of the prefix arrives
    for subject, looks in ((deaf, False), (model, True)):
        losses = train.held_out_losses(subject, toy_tokenizer(), datasets, 16, CPU)
        for gain in ("reference gain", "prompt gain", "its reference gain"):
            assert (np.abs(losses[gain]).max() > 0) == looks, (gain, losses)
        assert len(losses["on the subject"]) == len(losses["on its edge"]) == CONFIG.n_codebooks
    samples = [datasets["subject-driven"][i]._replace(hide="") for i in range(4)]
    (batch,) = train.collate(CONFIG, 4, samples)
    nats = model(*train.fill_codes(toy_tokenizer(), batch, CPU))  # (B, N, n_codebooks)
    on_edge = nats[(batch.coverage > 0.02) & (batch.coverage < 0.98)].mean(0)
    losses = train.held_out_losses(model, toy_tokenizer(), {"subject-driven": samples}, 4, CPU)
    assert losses["on its edge"] == pytest.approx(on_edge.tolist(), abs=1e-3)


# -- stages


def test_losses_fall_and_everything_is_written(trained):
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    for stage in (1, 2):
        first, *_, last = [r["held_out"] for r in records if r["stage"] == stage and "held_out" in r]
        assert last["text-to-image"] < first["text-to-image"] and last["segmentation"] < first["segmentation"]
        assert (trained / f"stage{stage}.png").stat().st_size > 10_000
    assert (trained / "curves.png").stat().st_size > 5_000
    assert {"loss", "lr", "samples_per_second", "seconds"} <= set(next(r for r in records if "loss" in r))
    assert not list(trained.glob("*.tmp"))


ARGS = dict(preset="test", data="shapes", backgrounds=None, steps=None, batch_size=None, seed=0, mix=None)
ARGS |= dict(workers=0, compile=False, init=None)


def run_stage(stage, out, **changes):
    """A stage in this process, with the toy's settings -> its checkpoint."""
    train.train(stage, argparse.Namespace(**ARGS | {"out": str(out)} | changes), CPU)
    return torch.load(out / f"stage{stage}.pt", weights_only=True)


def test_stage_2_starts_from_stage_1(trained, tmp_path, capsys):
    shutil.copy(trained / "stage1.pt", tmp_path)
    before, after = torch.load(trained / "stage1.pt", weights_only=True), run_stage(2, tmp_path, steps=1)
    assert "448 subjects" in capsys.readouterr().err  # said before it starts
    for name, weight in before["model"].items():
        assert (after["model"][name] - weight).abs().max() < 0.02, name  # one step away
    assert any(not torch.equal(after["model"][name], weight) for name, weight in before["model"].items())
    assert all(torch.equal(after["tokenizer"][name], weight) for name, weight in before["tokenizer"].items())


@pytest.fixture
def exported(trained, tmp_path):
    train.export(str(trained / "stage2.pt"), str(tmp_path / "exported.pt"))
    return tmp_path / "exported.pt"


@pytest.mark.parametrize(
    "stage, init", [(1, "stage2.pt"), (2, "stage1.pt"), (2, "stage2.pt"), (2, "exported.pt")]
)
def test_fine_tuning_starts_from_any_model_of_its_preset(trained, exported, tmp_path, capsys, stage, init):
    """It needs no stage before, takes the tokenizer along, and says what it gained."""
    init, out = exported if init == "exported.pt" else trained / init, tmp_path / "own"
    for name in ("red mug", "blue mug"):
        sprite(tmp_path / "mine" / f"{name}.png")
    after = run_stage(stage, out, steps=1, data=str(tmp_path / "mine"), init=str(init))
    before = torch.load(init, weights_only=True)
    away = [(after["model"][name] - weight.float()).abs().max() for name, weight in before["model"].items()]
    assert 0 < max(away) < 0.02  # one step
    for name, weight in before["tokenizer"].items():
        assert torch.equal(after["tokenizer"][name], weight.float())
    assert after["optimizers"][0]["state"][0]["step"] == 1  # fresh
    known = after["known"]["words"].split()
    assert "mug" in known and {*before["known"]["words"].split()} <= {*known}
    looks = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks if "held_out" in look] == [0, 1]
    names = {path.name for path in out.iterdir()}
    sheets = {f"stage{stage}.png", f"stage{stage}-before.png", "curves.png"}
    assert names == {f"stage{stage}.pt", "log.jsonl"} | sheets
    assert f"stage{stage}-before.png" in capsys.readouterr().err


def test_fine_tuning_has_a_schedule_of_its_own():
    plans = [train.make_plan(2, argparse.Namespace(**ARGS | {"out": "", "init": init}), CPU)
             for init in (None, "model.pt")]
    assert plans[1].steps == train.FINE_TUNING["steps"] and plans[1].lr < plans[0].lr
    plan = train.make_plan(2, argparse.Namespace(**ARGS | {"out": "", "steps": 7, "init": "model.pt"}), CPU)
    assert plan.steps == 7


def test_interrupted_fine_tuning_ends_with_the_same_weights(trained, tmp_path, monkeypatch):
    how, steps = {"steps": 12, "init": str(trained / "stage2.pt"), "data": "shapes"}, []
    undisturbed, train_step = run_stage(2, tmp_path / "a", **how), train.train_step

    def broken(*args):
        steps.append(1)
        if len(steps) == 8:
            raise OSError("the power went out")
        return train_step(*args)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(train, "train_step", broken)
        run_stage(2, tmp_path / "b", **how)
    resumed = run_stage(2, tmp_path / "b", **how)
    assert all(torch.equal(undisturbed["model"][name], weight) for name, weight in resumed["model"].items())
    with pytest.raises(BadInput, match="init"):  # a run that was begun otherwise
        run_stage(2, tmp_path / "b", **how | {"init": None})


def test_curves_follow_the_log_over_both_stages(tmp_path, monkeypatch):
    """Where a run was started again, what an earlier one logged from there on is void."""
    def look(stage, step, loss):
        figures = {"segmentation": loss, "reference gain": loss + 1, "on the subject": [1, 2]}
        return {"stage": stage, "step": step, "samples": 10 * step, "held_out": figures}

    records = [{"stage": 0, "step": 5, "samples": 50, "held_out": {"psnr": 20}},
               {"stage": 1, "step": 1, "loss": 9}, look(1, 3, 8), look(1, 6, 7), look(1, 9, 6),
               look(1, 6, 5), look(2, 2, 4), look(2, 4, 3)]
    lines = [json.dumps(record) for record in records]
    lines.insert(3, lines[0][:9])  # a kill left it
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    drawn = []
    monkeypatch.setattr(train, "save_plot", lambda panels, path: drawn.extend([*panels, path]))
    train.draw_curves(str(tmp_path))
    losses, gains, path = drawn
    assert losses[2] == {"segmentation": [(30, 8), (60, 5), (80, 4), (100, 3)]}
    assert gains[2] == {"reference gain": [(30, 9), (60, 6), (80, 5), (100, 4)]}
    assert path == str(tmp_path / "curves.png")


def test_kill_in_the_middle_then_the_same_command_gives_the_same_weights(trained, tmp_path):
    shutil.copy(trained / "stage1.pt", tmp_path)
    command, log = [sys.executable, str(ROOT / "train.py"), "--stage", "2", *TOY], tmp_path / "log.jsonl"
    command += ["--out", str(tmp_path)]
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


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_ends_with_one_line_that_says_what_is_saved(trained, tmp_path, whole_group):
    """A terminal sends it to the worker processes, too."""
    shutil.copy(trained / "stage1.pt", tmp_path)
    command = [sys.executable, str(ROOT / "train.py"), "--stage", "2", *TOY, "--workers", "2"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while not (tmp_path / "stage2.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be interrupted"
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    step = torch.load(tmp_path / "stage2.pt", weights_only=True)["step"]
    said = f"stopped: {step} of 80 steps are saved in {tmp_path / 'stage2.pt'}"
    assert process.returncode == 130 and said in error.splitlines()[-1] and "Traceback" not in error


def test_ctrl_c_under_torchrun_ends_with_one_line_and_no_traceback_of_ours(trained, tmp_path):
    shutil.copy(trained / "stage1.pt", tmp_path)
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(ROOT / "train.py")]
    process = subprocess.Popen([sys.executable, *command, "--stage", "2", *TOY, "--out", str(tmp_path)],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "stage2.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be interrupted"
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error.count("steps are saved in") == 1 and 'train.py", line' not in error  # (torchrun's own is)


def last_words(out, capsys):
    """What an interrupted stage 2 says before it ends"""
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        run_stage(2, out)
    signal.signal(signal.SIGINT, handler)
    assert stopped.value.code == 130
    return capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_before_the_first_save_says_so_and_a_second_one_changes_nothing(
        trained, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    def say_when_interrupted_again(text):
        if text.startswith("stopped"):
            os.kill(os.getpid(), signal.SIGINT)
        print(text, file=sys.stderr)

    shutil.copy(trained / "stage1.pt", tmp_path)
    monkeypatch.setattr(train, "train_step", interrupted)
    monkeypatch.setattr(train, "say", say_when_interrupted_again)
    assert "nothing is saved yet" in last_words(tmp_path, capsys)
    assert not (tmp_path / "stage2.pt").exists()


def test_ctrl_c_right_after_a_save_counts_that_save(trained, tmp_path, monkeypatch, capsys):
    """Under torchrun it may come while the processes wait for each other, with the file written."""
    def save_then_interrupted(run):
        save_run(run)
        raise KeyboardInterrupt

    shutil.copy(trained / "stage1.pt", tmp_path)
    save_run = train.save_run
    monkeypatch.setattr(train, "save_run", save_then_interrupted)
    assert "stopped: 2 of 80 steps are saved in" in last_words(tmp_path, capsys)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(trained, tmp_path, monkeypatch):
    shutil.copy(trained / "stage1.pt", tmp_path)
    seen, accumulate = [], train.accumulate

    def accumulate_until(*args):
        seen.append(True)
        loss, extra = accumulate(*args)
        return (loss * float("nan") if len(seen) == 6 else loss), extra

    monkeypatch.setattr(train, "accumulate", accumulate_until)
    with pytest.raises(BadInput, match="stage 2: loss .* not finite by step 6; .* checkpoint is of step 4"):
        run_stage(2, tmp_path, steps=80)
    kept = torch.load(tmp_path / "stage2.pt", weights_only=True)
    assert kept["step"] == 4 and all(torch.isfinite(weight).all() for weight in kept["model"].values())


def test_a_tokenizer_that_is_not_finite_stops_with_one_line_too(tmp_path, monkeypatch):
    """Its restarts of dead codes draw from what the codes leave, which is then no number."""
    forward = Tokenizer.forward

    def broken(self, images):
        loss, codes, z = forward(self, images)
        return loss * float("nan"), codes, z * float("nan")

    monkeypatch.setattr(Tokenizer, "forward", broken)
    with pytest.raises(BadInput, match="stage 0: loss .* not finite"):
        run_stage(0, tmp_path, steps=10)
    assert not (tmp_path / "tokenizer.pt").exists()


def test_figures_that_an_interrupt_took_are_made_up_for(trained, tmp_path, monkeypatch):
    """Between the last step and its figures: the same command does it again, and evaluates."""
    shutil.copy(trained / "stage1.pt", tmp_path)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "held_out_losses", interrupted)
        with pytest.raises(SystemExit):
            run_stage(2, tmp_path, steps=1)
    for times in (1, 1):  # once, and not again
        run_stage(2, tmp_path, steps=1)
        assert (tmp_path / "log.jsonl").read_text().count('"held_out"') == times
    assert (tmp_path / "stage2.png").exists()


def test_a_run_resumes_on_a_machine_without_bf16_and_with_it_again(trained, tmp_path, monkeypatch, capsys):
    """With the optimizers that it began with, saying that the last bits will differ."""
    shutil.copy(trained / "stage1.pt", tmp_path)
    monkeypatch.setattr(train, "evaluate", lambda *_: None)
    save_run = train.save_run
    for has_bf16, ends in ((True, 10), (False, 20), (True, 30)):
        monkeypatch.setattr(train, "has_bf16", lambda device, has_bf16=has_bf16: has_bf16)

        def stop_there(run, ends=ends):
            save_run(run)
            if run.step == ends < run.plan.steps:
                raise KeyboardInterrupt

        monkeypatch.setattr(train, "save_run", stop_there)
        with contextlib.suppress(SystemExit):
            run_stage(2, tmp_path, steps=30)
        checkpoint = torch.load(tmp_path / "stage2.pt", weights_only=True)
        assert checkpoint["step"] == ends and len(checkpoint["optimizers"]) == 2
        assert ("its last bits will differ" in capsys.readouterr().err) == (not has_bf16)


def test_what_was_held_out_is_compared_with_the_stage_before_and_on_resuming(tmp_path, capsys, monkeypatch):
    """A held-out picture that an earlier stage trained on makes its figures look better than they are."""
    monkeypatch.setattr(train, "evaluate", lambda *_: None)
    for i in range(30):
        sprite(tmp_path / "mine" / f"{i}.png")

    def warned(stage, steps):
        train.load_sources.cache_clear()  # each is a command of its own
        run_stage(stage, tmp_path / "out", steps=steps, data=str(tmp_path / "mine"), mix={"recovery": 1.0})
        return "was trained while another set of subjects was held out" in capsys.readouterr().err

    (tmp_path / "out").mkdir()
    with contextlib.suppress(FileNotFoundError):  # (run_stage looks for a stage0.pt)
        run_stage(0, tmp_path / "out", steps=1, data=str(tmp_path / "mine"))
    assert [warned(1, 1), warned(2, 1), warned(2, 1)] == [False] * 3
    for i in range(30, 60):
        sprite(tmp_path / "mine" / f"{i}.png")
    assert warned(2, 1)  # on resuming
    with contextlib.suppress(SystemExit):
        run_stage(2, tmp_path / "out", steps=1, data=str(tmp_path / "mine"), mix={"recovery": 1.0})
    said = capsys.readouterr().err
    assert "was begun with 30 images; now there are 60" in said
    assert "is already finished: delete it to train it" in said
    (tmp_path / "out" / "stage2.pt").unlink()
    assert warned(2, 1)  # by the stage before


def test_the_logged_rate_is_that_of_the_last_steps(trained, tmp_path, monkeypatch):
    """Ten slow steps, then fast ones, by a clock of the test's own: the second line must know nothing of the
    first ten."""
    shutil.copy(trained / "stage1.pt", tmp_path)
    step, steps = train.train_step, []
    clock = argparse.Namespace(time=lambda: sum(4.0 if i < 10 else 1.0 for i in range(len(steps))))
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(True) or step(*args))
    monkeypatch.setattr(train, "evaluate", lambda *_: None)
    run_stage(2, tmp_path, steps=20)
    lines = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    rates = [line["samples_per_second"] for line in lines if "loss" in line]
    assert rates == [16 / 4, 16 / 1]


def test_full_disk_keeps_the_last_good_checkpoint(trained, tmp_path):
    import resource

    for name in ("stage1.pt", "tokenizer.pt"):
        shutil.copy(trained / name, tmp_path)

    def limit():  # no file may grow beyond a megabyte: what a full disk looks like
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = script("train.py", "--stage", 2, *TOY, "--out", tmp_path, preexec_fn=limit)
    assert (
        done.returncode == 2 and "stage2.pt: cannot be written" in done.stderr.splitlines()[-1]
    ), done.stderr
    assert (
        "Traceback" not in done.stderr
        and not (tmp_path / "stage2.pt").exists()
        and not list(tmp_path.glob("*.tmp"))
    )


# -- several processes


def one_of_two(rank, folder):
    """Half of the batch in each of two gloo processes; the first writes down the gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = noisy_model()
    train.autocast = lambda device: torch.autocast(device.type, enabled=False)
    batches = train.collate(CONFIG, 4, toy_samples(16)[rank::2])
    train.accumulate(toy_run(), DistributedDataParallel(model), batches)
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{folder}/gradients.pt")
    dist.barrier()  # neither leaves while the other still talks to it
    os._exit(0)  # gloo's threads abort now and then when the interpreter takes them down


def test_two_processes_give_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    model = noisy_model()
    alone = gradients(model, toy_batches(16, 16))
    for a, b in zip(alone, torch.load(tmp_path / "gradients.pt", weights_only=True)):
        assert torch.allclose(a, b, atol=1e-5)


def test_torchrun_trains_as_one_process_does(trained, tmp_path):
    losses = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        shutil.copy(trained / "stage1.pt", out)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={processes}",
                "--standalone",
                str(ROOT / "train.py"),
                "--stage",
                "2",
                *TOY,
                "--steps",
                "3",
                "--out",
                str(out),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([r["held_out"]["text-to-image"] for r in records if "held_out" in r])
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
