"""The commands of the README, and what they say when they cannot go on."""

import errno
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, noisy_model
from PIL import Image, ImageColor, ImageOps

import data
import sample
import train
from data import AS_GIVEN, Placement, compose, fill_prompt, paint_shape
from mentor import BadInput
from tokenizer import emoji_font


@pytest.fixture
def ref(tmp_path):
    path = tmp_path / "ref.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


def call(monkeypatch, capsys, main, *args):
    """A script's main in this process -> (exit code, last words on stderr, stdout)"""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
    code = 0
    try:
        sample.run_script(main)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, err.splitlines(), out


@pytest.mark.parametrize(
    "given, task",
    [
        (("--ref", "REF", "--label", "red star", "--prompt", "a red star in space"), "subject-driven"),
        (("--ref", "REF", "--label", "red star"), "segmentation"),
        (("--ref", "REF", "--prompt", "a star"), "reconstruction"),
        (("--ref", "REF"), "reconstruction"),
        (("--ref", "REF", "--label", "the red star on the left"), "segmentation"),
        (
            (
                "--ref",
                "REF",
                "--label",
                "sun",
                "--ref",
                "REF",
                "--label",
                "star",
                "--prompt",
                "a sun and a star",
            ),
            "multi-image",
        ),
        (("--example", "REF", "REF", "--ref", "REF"), "in-context"),
        (("--prompt", "a star in space ⭐ 星"), "text-to-image"),
    ],
)
def test_task_follows_from_what_is_given(trained, tmp_path, ref, monkeypatch, capsys, given, task):
    given = [str(ref) if word == "REF" else word for word in given]
    code, _, out = call(
        monkeypatch, capsys, sample.main, *given, "--ckpt", trained / "stage2.pt", "-o", tmp_path / "x.png"
    )
    assert code == 0 and out.startswith(task) and "s a picture" in out
    assert Image.open(tmp_path / "x.png").size == (32, 32)


def test_references_stand_behind_their_labels_in_the_order_of_the_prompt():
    for labels, prompt, wanted, order in [
        (["dog", "cat"], "a cat and a dog", "a cat <image> and a dog <image>", [1, 0]),
        (["cat", "black cat"], "a black cat, a cat", "a black cat <image>, a cat <image>", [1, 0]),
        (["cat", "cat"], "a cat and a cat", "a cat <image> and a cat <image>", [0, 1]),
        (["dog", "dog face"], "a dog face and a dog", "a dog face <image> and a dog <image>", [1, 0]),
        (["dog", "cat"], "a hot-dog, a cat, a dog", "a hot-dog, a cat <image>, a dog <image>", [1, 0]),
    ]:
        assert sample.name_references(labels, prompt) == (wanted, order)
    with pytest.raises(BadInput, match="does not name 'cat'"):
        sample.name_references(["cat"], "a caterpillar")


def test_where_a_label_places_a_thing_is_not_where_it_is_drawn(trained, ref, tmp_path, monkeypatch, capsys):
    """A label places what to look for; the prompt names it without. It may write <image> as training does."""
    opened, drawn = [], []

    def draw(model, tokenizer, task, prompts, **how):
        drawn.extend(prompts)
        return np.zeros((1, 9, 9, 3), np.uint8)

    def open_references(files, *_):
        opened.extend(label for _, label in files)
        return [label for _, label in files]

    monkeypatch.setattr(sample, "open_references", open_references)
    monkeypatch.setattr(sample, "draw", draw)
    sun, star = (("--ref", ref, "--label", label) for label in ("the sun on the left", "star"))
    for given, prompt in (
        ((*sun, *star), "a star on the left and a sun on the right"),
        ((*sun, *star), "a star <image> on the left and a sun<image> on the right"),
        (sun, "a sun in space"),
    ):
        code, _, _ = call(
            monkeypatch,
            capsys,
            sample.main,
            *given,
            *("--prompt", prompt, "--ckpt", trained / "stage2.pt", "-o", tmp_path / "x.png"),
        )
        assert code == 0
    assert opened == ["star", "sun on the left"] * 2 + ["sun on the left"]
    both = ["a star ", " on the left and a sun ", " on the right"]
    assert [pieces for pieces, _ in drawn] == [both, both, ["The sun in ", ".\na sun in space"]]


def test_a_cutout_is_shown_as_training_shows_it_wherever_it_stands_in_its_file(tmp_path):
    star = paint_shape("star red blue")
    for name, place in (("a.png", (0, 0)), ("b.png", (170, 90))):
        sheet = Image.new("RGBA", (300, 240))
        sheet.paste(star, place)
        sheet.save(tmp_path / name)
    files = [(str(tmp_path / name), "star") for name in ("a.png", "b.png")]
    a, b = sample.open_references(files, "multi-image", noisy_model(), None)
    shown = compose(star.crop(star.getbbox()), Image.new("RGB", (32, 32), (128, 128, 128)), AS_GIVEN)[0]
    assert np.array_equal(a, b) and np.abs(a.astype(int) - np.asarray(shown)).max() < 40


@pytest.mark.parametrize("where", [Placement(0.5, 0, 1), Placement(0.6, 0.8, 0.3), Placement(0.95, 0.5, 0.5)])
def test_a_subject_is_found_and_framed_wherever_it_stands(monkeypatch, where):
    star, blue = paint_shape("sun red yellow"), (50, 90, 220)
    scene, alone, _ = compose(star.crop(star.getbbox()), Image.new("RGB", (128, 128), blue), where)
    asked = []

    def draw(model, tokenizer, task, prompts, **how):  # the model that cuts out without a fault
        asked.append((task, prompts[0][0]))
        return np.asarray(alone.resize((32, 32)))[None]

    monkeypatch.setattr(sample, "draw", draw)
    (framed,) = sample.frame_subjects(noisy_model(), None, ["sun"], [np.asarray(scene)])
    right = np.asarray(compose(star.crop(star.getbbox()), Image.new("RGB", (32, 32), blue), AS_GIVEN)[0])
    assert asked == [("segmentation", fill_prompt("segmentation", ["sun"]))]
    unframed = np.asarray(scene.resize((32, 32)))
    assert np.abs(framed - right.astype(float)).mean() < 15 < np.abs(unframed - right.astype(float)).mean()


def test_a_subject_that_stands_right_or_is_not_found_is_left_where_it_is():
    star = paint_shape("sun red yellow")
    alone = compose(star.crop(star.getbbox()), Image.new("RGB", (64, 64)), AS_GIVEN)[1]
    assert sample.box_to_frame(np.asarray(alone)).tolist() == [0, 0, 1, 1]
    assert sample.box_to_frame(np.full((64, 64, 3), 20, np.uint8)) is None


def test_several_pictures_as_a_grid_or_one_file_each(trained, tmp_path, monkeypatch, capsys):
    common = ("--prompt", "a red star", "-n", 5, "--seed", 3, "--ckpt", trained / "stage2.pt", "-o")
    assert call(monkeypatch, capsys, sample.main, *common, tmp_path / "grid.png")[0] == 0
    assert Image.open(tmp_path / "grid.png").width > 4 * 96
    assert call(monkeypatch, capsys, sample.main, *common, tmp_path / "each")[0] == 0
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == [f"{i}.png" for i in range(3, 8)]
    call(
        monkeypatch,
        capsys,
        sample.main,
        "--prompt",
        "a red star",
        "--seed",
        5,
        "--ckpt",
        trained / "stage2.pt",
        "-o",
        tmp_path / "one.png",
    )
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "each" / "5.png").read_bytes()


def test_a_plot_shows_each_line_where_its_numbers_say(tmp_path):
    lines = {"rises": [(0, 1.0), (100, 3.0)], "stays": [(0, 2.0, 0.5), (100, 2.0, 0.5)]}
    sample.save_plot([("left", "samples", lines), ("right", "samples", {}), ("flat", "x", {"one": [(5, 7)]})],
                     tmp_path / "plot.png")
    image = np.asarray(Image.open(tmp_path / "plot.png")).astype(int)
    assert image.shape[1] == 3 * 640
    assert sample.ticks([1.0, 3.0]) == [1, 1.5, 2, 2.5, 3]
    assert sample.ticks([0, 100]) == [0, 20, 40, 60, 80, 100]
    assert sample.ticks([7, 7])[0] <= 7 < sample.ticks([7, 7])[-1]
    where = {}
    for name, colour in zip(lines, sample.PLOT_COLOURS):
        same = (image == ImageColor.getrgb(colour)).all(2)[:, :460]  # without the names
        where[name] = [np.flatnonzero(same[:, x]) for x in (60, 260, 459)]
    bottom, middle, top = (rows.mean() for rows in where["rises"])
    assert bottom > middle > top and abs(middle - (bottom + top) / 2) < 2
    assert abs(where["stays"][1].mean() - middle) < 2 and np.ptp(where["stays"][0]) > (bottom - top) / 2 - 6


def test_the_preset_follows_from_the_device_or_the_model(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shipped = str(ROOT / "weights" / "cpu.pt")
    for given, preset in (((), "gpu"), (("--device", "cpu"), "cpu"), (("--preset", "test"), "test"),
                          (("--init", shipped), "cpu"), (("--init", shipped, "--preset", "gpu"), "gpu")):
        monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "1", *given])
        assert train.parse_args().preset == preset


def test_export_halves_the_weights_and_draws(trained, tmp_path, monkeypatch, capsys):
    small = tmp_path / "weights" / "toy.pt"
    code, _, out = call(monkeypatch, capsys, train.main, "--export", small, "--out", trained)
    assert code == 0 and "MB" in out
    exported = torch.load(small, weights_only=True)
    assert all(t.dtype == torch.float16 for t in exported["model"].values()) and "optimizers" not in exported
    assert (
        call(
            monkeypatch, capsys, sample.main, "--prompt", "a star", "--ckpt", small, "-o", tmp_path / "x.png"
        )[0]
        == 0
    )
    shutil.copy(small, tmp_path / "stage2.pt")
    code, err, _ = call(monkeypatch, capsys, train.main, "--export", tmp_path / "again.pt", "--out", tmp_path)
    assert code == 2 and "an exported model already" in err[-1] and not (tmp_path / "again.pt").exists()
    for target in (*(trained / name for name in train.CHECKPOINTS), small):
        before = target.read_bytes()
        code, err, _ = call(monkeypatch, capsys, train.main, "--export", target, "--out", trained)
        assert code == 2 and "give another name" in err[-1] and target.read_bytes() == before


def test_no_output_overwrites_an_input(trained, tmp_path, ref, monkeypatch, capsys):
    (tmp_path / "own").mkdir()
    shutil.copy(ref, tmp_path / "own" / "0.png")
    shutil.copy(ref, tmp_path / "dog.png")
    os.link(tmp_path / "dog.png", tmp_path / "same.png")
    shutil.copy(trained / "stage2.pt", tmp_path / "model.png")
    for output, *given in (
        ("dog.png", "--ref", tmp_path / "dog.png"),
        ("same.png", "--ref", tmp_path / "dog.png"),
        ("own", "--ref", tmp_path / "own" / "0.png"),
        ("dog.png", "--example", tmp_path / "dog.png", ref, "--ref", ref),
        ("model.png", "--prompt", "a star", "--ckpt", tmp_path / "model.png"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
        given = ("--ckpt", trained / "stage2.pt", "-o", tmp_path / output, *given)
        code, err, _ = call(monkeypatch, capsys, sample.main, *given)
        assert code == 2 and "it would overwrite" in err[-1] and "give another name" in err[-1]
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


def test_files_of_others_stay_and_what_is_there_already_is_said(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.png.tmp").write_text("mine")
    common = ("--prompt", "a star", "--ckpt", trained / "stage2.pt", "-o")
    assert call(monkeypatch, capsys, sample.main, *common, tmp_path / "x.png")[0] == 0
    assert (tmp_path / "x.png.tmp").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
    for n, said in ((1, ""), (2, "1 of these pictures are there already and will be overwritten (0.png,")):
        code, err, _ = call(monkeypatch, capsys, sample.main, *common, tmp_path / "each", "-n", n)
        assert code == 0 and said in " ".join(err) and bool(said) == ("overwritten" in " ".join(err))


def test_a_second_line_of_the_prompt_is_said_to_be_ignored(trained, tmp_path, monkeypatch, capsys):
    given = ("--prompt", "a star\non the beach", "--ckpt", trained / "stage2.pt", "-o", tmp_path / "x.png")
    code, err, _ = call(monkeypatch, capsys, sample.main, *given)
    assert code == 0 and err[0] == "--prompt, --label: only the first line of each is used"


def test_what_a_reference_leaves_out_is_said(trained, tmp_path, monkeypatch, capsys):
    """A cut-out without a margin is read as a plain picture; a prompt may not name the label."""
    tight = Image.new("RGBA", (64, 64), "red")
    tight.paste((0, 0, 0, 0), (20, 20, 40, 40))
    tight.save(tmp_path / "tight.png")
    ImageOps.expand(tight, 16, (0, 0, 0, 0)).save(tmp_path / "margin.png")
    Image.new("RGBA", (64, 64), "red").save(tmp_path / "opaque.png")
    for name, prompt, shown_white, unnamed in (("tight", "a ring in space", True, False),
                                               ("margin", "a ring in space", False, False),
                                               ("opaque", "a star in space", False, True)):
        given = ("--ref", tmp_path / f"{name}.png", "--label", "ring", "--prompt", prompt)
        code, err, _ = call(monkeypatch, capsys, sample.main, *given, "--ckpt", trained / "stage2.pt",
                            "-o", tmp_path / "x.png")
        assert code == 0 and ("its transparent parts are shown white" in " ".join(err)) == shown_white
        assert ("--prompt does not name 'ring'" in " ".join(err)) == unnamed


@pytest.mark.parametrize("script, flag, given", [(sample, "--ckpt", ("--prompt", "a dog")),
                                                 (train, "--init", ("--stage", "2")),
                                                 (train, "--data", ("--stage", "1", "--show"))])
def test_an_empty_value_is_not_taken_for_none(script, flag, given, monkeypatch, capsys):
    code, err, _ = call(monkeypatch, capsys, script.main, *given, flag, "")
    assert code == 2 and f"{flag} is empty: give a value, or leave it out" in err[-1]


def test_several_references_are_framed_in_one_drawing(tmp_path, monkeypatch):
    """Those that need it, each for its label, and they come back in their order."""
    calls = []

    def draw(model, tokenizer, task, prompts, **how):
        calls.append([pieces for pieces, _ in prompts])
        return np.zeros((len(prompts), 32, 32, 3), np.uint8)  # nothing is found

    monkeypatch.setattr(sample, "draw", draw)
    files = []
    for i, colour in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200))):
        files.append((str(tmp_path / f"{i}.png"), f"thing {i}"))
        Image.new("RGB", (40, 40), colour).save(files[-1][0])
    star = paint_shape("star red blue")
    star.save(tmp_path / "star.png")
    files.insert(1, (str(tmp_path / "star.png"), "star"))
    shown = sample.open_references(files, "multi-image", noisy_model(), None)
    assert calls == [[fill_prompt("segmentation", [label]) for _, label in files if label != "star"]]
    assert [picture[0, 0].argmax() for picture in shown[:1] + shown[2:]] == [0, 1, 2]
    assert shown[1][0, 0].tolist() == [128] * 3


# -- bad input: the last line says what is wrong, exit code 2, nothing overwritten


def test_sample_says_what_is_wrong(trained, tmp_path, ref, monkeypatch, capsys):
    whole, broken = trained / "stage2.pt", tmp_path / "broken.pt"
    broken.write_bytes(whole.read_bytes()[:50_000])
    (tmp_path / "text.png").write_text("not an image")
    unknown = torch.load(whole, weights_only=True)
    del unknown["known"]
    torch.save(unknown, tmp_path / "unknown.pt")
    kept = tmp_path / "x.png"
    kept.write_text("kept")
    good, given = ("--prompt", "a star"), ("--ref", ref, "--ref", ref)
    for args, words in [
        (("--label", "star"), "--ref 0 times and --label 1 times"),
        ((*given, "--label", "star"), "--ref 2 times and --label 1 times"),
        ((*given, "--label", "star", "--label", "sun"), "say with --prompt where"),
        ((*given, *given, "--ref", ref, *good), "--ref 5 times: four at most"),
        (("--example", ref, ref), "give one --ref"),
        (("--example", ref, ref, "--ref", ref, *good), "no --label or --prompt"),
        (("--example", ref, "--ref", ref), "expected 2 arguments"),
        ((*given, "--label", "cat", "--label", "dog", "--prompt", "a cat"), "does not name 'dog'"),
        ((*given, "--label", "cat", "--label", "cat", "--prompt", "a cat"), "does not name 'cat'"),
        ((*given, *["--label", "x"] * 2, "--prompt", "x " * 500), "words of text, and"),
        ((), "nothing to draw"),
        (("--prompt", "   "), "--prompt has no words"),
        (("--ref", ref, "--label", "", "--prompt", "a dog"), "--label has no words"),
        (("--ref", ref, "--label", "the <image>"), "--label has no words"),
        (("--ref", tmp_path / "none.png"), "none.png: not a readable image"),
        (("--ref", tmp_path / "text.png"), "text.png: not a readable image"),
        (("--prompt", "x " * 500), "words of text, and"),
        ((*good, "--ckpt", broken), "broken.pt: not a checkpoint"),
        ((*good, "--ckpt", tmp_path / "none.pt"), "none.pt: no such file"),
        ((*good, "--ckpt", trained), "is a folder: name a checkpoint in it"),
        ((*good, "--ckpt", tmp_path / "unknown.pt"), "unknown.pt: not a checkpoint"),
        ((*good, "--ckpt", trained / "tokenizer.pt"), "the tokenizer alone"),
        ((*good, "-n", "0"), "not a whole number from 1 up"),
        ((*good, "--temperature", "-1"), "not a number from 0 up"),
        ((*good, "--temperature", ".6", ".5"), "give one number, or 3"),
        ((*good, "--cfg-text", "nan"), "not a number from 0 up"),
        ((*good, "--seed", "-1"), "not a whole number from 0 up"),
        ((*good, "--seed", "9" * 20), "not a whole number from 0 up"),
        ((*good, "--nonsense"), "unrecognized arguments"),
        ((*good, "-o", tmp_path / "x.jpg"), "written as PNG"),
        ((*good, "-o", ref / "under" / "a" / "file.png"), "cannot be written"),
    ]:
        code, err, _ = call(monkeypatch, capsys, sample.main, "--ckpt", whole, "-o", kept, *args)
        # What is said before the words are counted:
        err = [line for line in err if "was found in it" not in line and "training never saw" not in line]
        assert code == 2 and len(err) == 1 and words in err[0], (args, err)
        assert kept.read_text() == "kept"


def test_out_of_gpu_memory_is_one_line(capsys):
    def main():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    with pytest.raises(SystemExit) as stopped:
        sample.run_script(main)
    err = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(err) == 1 and "CUDA out of memory" in err[0]


def test_a_full_disk_is_one_line_and_a_bug_is_not(capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    def bug():
        raise FileNotFoundError(errno.ENOENT, "a name of ours")

    with pytest.raises(SystemExit) as stopped:
        sample.run_script(full)
    assert stopped.value.code == 2 and "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(FileNotFoundError):
        sample.run_script(bug)


def test_train_says_what_is_wrong(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unusable").mkdir()
    (tmp_path / "unusable" / "a.png").write_text("no image")
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "plain" / "a.png")
    for name in ("stage1.pt", "stage2.pt", "tokenizer.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes()[:20_000])
    odd = torch.load(trained / "stage2.pt", weights_only=True)
    torch.save(odd | {"version": 1}, tmp_path / "old.pt")
    del odd["model"]["head_gain"]
    torch.save(odd, tmp_path / "lacking.pt")
    odd = torch.load(trained / "stage2.pt", weights_only=True)
    odd["model"]["head_gain"][0] = torch.nan
    torch.save(odd, tmp_path / "nan.pt")
    torch.save(odd | {"config": odd["config"] | {"n_embd": 8}}, tmp_path / "unknown.pt")
    out, toy = ("--out", tmp_path / "new"), ("--stage", 1, *TOY)
    init = ("--stage", 2, *TOY, *out, "--init")
    for args, words in [
        (("--stage", 2, *TOY, *out), "stage1.pt is missing"),
        ((*out,), "--stage"),
        (("--stage", 3, *out), "--stage"),
        (("--stage", 1, "--preset", "huge", *out), "--preset"),
        ((*toy, *out, "--mix", "painting=1"), "no task 'painting'"),
        ((*toy, *out, "--mix", "segmentation=-1"), "from 0 up"),
        ((*toy, *out, "--mix", "segmentation=0"), "not all 0"),
        ((*toy, *out, "--mix", "segmentation=nan"), "from 0 up"),
        ((*toy, *out, "--mix", ""), "no task ''"),
        ((*toy, *out, "--mix", "recovery=1,recovery=2"), "recovery stands there twice"),
        ((*toy, *out, "--mix", "recovery=1e308,segmentation=1e308"), "from 0 up"),
        ((*toy, *out, "--data", ","), "--data ,: nothing between its commas"),
        ((*toy, *out, "--backgrounds", ","), "--backgrounds ,: nothing between its commas"),
        ((*toy, *out, "--steps", "0"), "not a whole number from 1 up"),
        ((*toy, "--out", tmp_path / "stage1.pt" / "under"), "no such folder, and none can be made"),
        ((*toy, *out, "--data", tmp_path / "none"), "no such folder"),
        ((*toy, *out, "--backgrounds", "shapes"), "give folders of pictures"),
        ((*toy, *out, "--data", tmp_path / "empty"), "not one usable image"),
        ((*toy, *out, "--data", tmp_path / "unusable"), "not one usable image"),
        ((*toy, "--out", trained, "--seed", "1"), "was trained with seed 0"),
        (("--stage", 1, "--preset", "cpu", "--data", "shapes", "--out", trained), "of another preset"),
        ((*toy, "--out", tmp_path), "stage1.pt: not a checkpoint"),
        (("--export", tmp_path / "x.pt", *out), "stage2.pt is missing: train stage 2 first"),
        ((*init, tmp_path / "none.pt"), "none.pt: no such file"),
        ((*init, tmp_path / "stage2.pt"), "stage2.pt: not a checkpoint of this program, or damaged"),
        ((*init, tmp_path / "old.pt"), "old.pt: written by another version"),
        ((*init, tmp_path / "lacking.pt"), "lacking.pt: its weights do not fit"),
        ((*init, trained / "tokenizer.pt"), "tokenizer.pt holds the tokenizer alone"),
        ((*init, tmp_path / "nan.pt"), "nan.pt: some of its weights are not finite"),
        ((*init, tmp_path / "unknown.pt"), "none of this program's: give another --init"),
        ((*init, tmp_path / "none.pt", "--show"), "none.pt: no such file"),
        ((*init, ROOT / "weights" / "cpu.pt"), "of another preset: give --preset cpu, or another --init"),
        (("--stage", 0, *TOY, *out, "--init", trained / "stage2.pt"), "--init: stage 0"),
        (("--stage", 0, *TOY, *out, "--mix", "recovery=1"), "--mix: stage 0"),
        (
            ("--stage", 2, *TOY, "--out", trained, "--init", trained / "stage2.pt"),
            "was trained with no init, not init",
        ),
        (
            ("--stage", 1, "--preset", "test", "--data", tmp_path, "--out", tmp_path / "inside"),
            "would be trained on",
        ),
        (("--stage", 1, "--preset", "test", "--data", tmp_path, "--out", tmp_path), "would be trained on"),
        ((*toy, *out, "--backgrounds", tmp_path / "none"), "no such folder"),
        (("--stage", 1, "--preset", "test", "--data", tmp_path / "plain", *out), "--mix text-to-image"),
    ]:
        code, err, _ = call(monkeypatch, capsys, train.main, *args)
        assert code == 2 and words in err[-1] and not any("Traceback" in line for line in err), (args, err)
    assert not (tmp_path / "x.pt").exists() and not (tmp_path / "new").exists()
    assert (tmp_path / "stage1.pt").stat().st_size == 20_000


def test_show_writes_a_sheet_of_what_a_run_would_learn_from(tmp_path, monkeypatch, capsys):
    for i in range(12):
        (tmp_path / "mine").mkdir(exist_ok=True)
        paint_shape("star red blue").save(tmp_path / "mine" / f"{i}.png")
        Image.new("RGB", (40, 40), "red").save(tmp_path / "mine" / f"on mars {i}.jpg")
    mine = ("--data", f"shapes,{tmp_path / 'mine'}", "--backgrounds", tmp_path / "mine")
    toy = ("--preset", "test", "--show", "--out", tmp_path / "out")
    heights = []
    for stage, args in (
        (0, ("--data", "shapes")),
        (1, mine),
        (2, mine),
        (2, ("--data", "shapes", "--mix", "recovery=1")),
    ):
        train.load_sources.cache_clear()  # each is a command of its own
        code, err, out = call(monkeypatch, capsys, train.main, "--stage", stage, *toy, *args)
        assert code == 0 and "subjects" in "".join(err) and "held out" in out
        sheet = np.asarray(Image.open(tmp_path / "out" / f"stage{stage}-samples.png"))
        heights.append(len(sheet))
        magenta = (np.abs(sheet.astype(int) - (255, 0, 255)).max(2) < 9).mean((1,))
        assert magenta[30:230].mean() > 0.05 > 0.01 > magenta[330:].mean()  # behind two rows of cut-outs
    assert heights[0] == heights[1] < heights[2] and heights[3] < heights[1]  # a row a task: 3, 3, 5, 1
    assert not (tmp_path / "out" / "stage2.pt").exists()
    code, err, _ = call(
        monkeypatch,
        capsys,
        train.main,
        "--stage",
        2,
        *toy,
        "--data",
        "shapes",
        "--backgrounds",
        tmp_path / "no",
    )
    assert code == 2 and "no: no such folder" in err[-1]


def test_show_without_a_cutout_and_of_pictures_that_are_all_held_out(tmp_path, monkeypatch, capsys):
    pictures = {"plain": Image.new("RGB", (40, 40), "red"), "mine": paint_shape("star red blue")}
    for folder, picture in pictures.items():
        data.say_once.cache_clear()
        (tmp_path / folder / "test").mkdir(parents=True)
        picture.save(tmp_path / folder / "test" / "1.png")
        toy = ("--stage", 2, "--preset", "test", "--show", "--data", tmp_path / folder, "--out", tmp_path)
        mix = ("--mix", "text-to-image=1") if folder == "plain" else ()
        code, err, out = call(monkeypatch, capsys, train.main, *toy, *mix)
        assert code == 0 and "every subject is held out: they are trained on" in "".join(err)
        assert "held out, and not in it: 0 images" in out
        assert (tmp_path / "stage2-samples.png").exists()
        (tmp_path / "stage2-samples.png").unlink()


# -- the README


def readme_commands():
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    joined = [block.replace("\\\n", "") for block in blocks]  # a command over two lines is one
    lines = [line.split("  #")[0].strip() for block in joined for line in block.splitlines()]
    return [line for line in lines if re.match(r"python (train|sample|mentor)\.py", line)]


def test_readme_commands_run_as_written(trained, tmp_path, monkeypatch, capsys):
    """The README's own commands, in order, in one folder (its benches and pip lines apart), in this process;
    for hours of training, two toy steps."""
    commands = readme_commands()
    assert len(commands) >= 8
    (tmp_path / "my_folder").mkdir()
    for i in range(12):
        paint_shape("star red blue").save(tmp_path / "my_folder" / f"{i}.png")
    paint_shape("sun red blue").save(tmp_path / "my_folder" / "owl.png")
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    for folder, name, model in (("out", "tokenizer.pt", "tokenizer.pt"), ("weights", "cpu.pt", "stage2.pt")):
        (tmp_path / folder).mkdir()
        shutil.copy(trained / model, tmp_path / folder / name)  # the toy's, in place of the shipped model's
    monkeypatch.chdir(tmp_path)
    for line in commands:
        name, *args = shlex.split(line)[1:]
        if emoji_font() is None:
            args = [arg.replace(",emoji", ",shapes") for arg in args]
        if name == "train.py" and "--export" not in args:
            args += ["--preset", "test", "--steps", "2", "--batch-size", "2", "--device", "cpu"]
        code, err, _ = call(monkeypatch, capsys, {"train.py": train, "sample.py": sample}[name].main, *args)
        assert code == 0, (line, err)
