"""Subjects, scenes and tasks."""
import functools
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import BadInput, Placement, Subject, Tasks, compose, cutout, load_subjects

SHAPES = load_subjects("shapes")


@functools.cache
def tasks_of_shapes(task, train):
    return Tasks(SHAPES, {task: 1.0}, 32, 0, train)


def tasks(task, train=True, subjects=SHAPES, size=32):
    if subjects is SHAPES and size == 32:
        return tasks_of_shapes(task, train)
    return Tasks(subjects, {task: 1.0}, size, 0, train)


def picture(path, colour=(200, 30, 30), size=(40, 30), mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **how)
    return path


def sprite(path, colour=(200, 30, 30)):
    """A cut-out: a coloured disc with a soft edge, on pixels of another colour that alpha hides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:48, :48] - 23.5
    alpha = np.clip((20 - np.hypot(x, y)) * 64 + 128, 0, 255)
    pixels = np.where(alpha[..., None] > 0, colour, (0, 255, 0))
    Image.fromarray(np.dstack([pixels, alpha]).astype(np.uint8)).save(path)
    return path


# -- the same sample again


def test_same_seed_and_index_same_sample_whatever_the_workers():
    def flat(sample):
        return [sample["task"], sample["label"], sample["caption"], sample["hide"],
                *(a.tobytes() for a in (*sample["refs"], sample["target"]))]

    mix = {task: 0.2 for task in data.TASKS}
    order = [[5, 17], [3, 4], [99, 5]]
    alone = [[flat(Tasks(SHAPES, mix, 32, 7)[i]) for i in batch] for batch in order]
    for workers in (0, 2):
        loader = DataLoader(Tasks(SHAPES, mix, 32, 7), batch_sampler=order, collate_fn=list, num_workers=workers)
        assert [[flat(s) for s in batch] for batch in loader] == alone
    assert flat(Tasks(SHAPES, mix, 32, 8)[5]) != alone[0][0]


def test_held_out_subjects_never_occur_in_training():
    held_out = {s.label for s in SHAPES if data.is_held_out(s)}
    assert 0.05 < len(held_out) / len(SHAPES) < 0.15
    mix = {task: 0.2 for task in data.TASKS}
    datasets = [Tasks(SHAPES, mix, 8, 0, train) for train in (True, False)]
    train, test = ({dataset[i]["label"] for i in range(3000)} for dataset in datasets)
    assert not train & held_out and len(train) > 350
    assert test == held_out


def test_shares_of_the_mix_are_kept():
    dataset = Tasks(SHAPES, {"segmentation": 0.7, "text-to-image": 0.3}, 8, 0)
    drawn = [dataset[i] for i in range(600)]
    assert 0.6 < np.mean([s["task"] == "segmentation" for s in drawn]) < 0.8
    hidden = np.mean([[s["hide"] == h for h in ("all", "images", "text")] for s in drawn], 0)
    assert np.allclose(hidden, [0.1, 0.05, 0.05], atol=0.035)


# -- each task's target is what the paper says


def test_reconstruction_gives_back_its_reference_with_and_without_caption():
    samples = [tasks("reconstruction")[i] for i in range(100)]
    assert all(np.array_equal(s["refs"][0], s["target"]) for s in samples)
    assert 2 <= sum(s["caption"] == "" for s in samples) <= 25


def test_segmentation_keeps_the_subject_in_place_and_all_else_is_exactly_black(monkeypatch):
    """The true mask is what differs when the same scene is drawn on black and on white."""
    for i in range(20):
        sample = tasks("segmentation")[i]
        with monkeypatch.context() as patch:
            patch.setattr(data, "draw_background", lambda words, size, rng: Image.new("RGB", (size, size)))
            on_black = tasks("segmentation")[i]["refs"][0].astype(int)
            patch.setattr(data, "draw_background", lambda words, size, rng: Image.new("RGB", (size, size), "white"))
            on_white = tasks("segmentation")[i]["refs"][0].astype(int)
        alpha = 255 - (on_white - on_black).max(-1)  # (H, W), 0 outside the subject
        reference, target = sample["refs"][0].astype(int), sample["target"].astype(int)
        assert np.all(target[alpha == 0] == 0) and 0.02 < (alpha == 255).mean() < 0.9
        assert np.array_equal(target, on_black) and np.array_equal(target[alpha == 255], on_white[alpha == 255])
        assert reference.shape == target.shape


def test_no_halo_of_the_old_background(tmp_path):
    """The hidden pixels of the cut-out are green; no green may come through its soft edge, at any scale."""
    subject = Subject("x", "x", "file", str(sprite(tmp_path / "disc.png", (200, 30, 30))))
    for side in (0.4, 0.5, 0.9):
        scene, alone = compose(cutout(subject), Image.new("RGB", (64, 64), (30, 30, 200)), Placement(side, 0.3, 0.6))
        for image in (np.asarray(scene), np.asarray(alone)):
            assert image[..., 1].max() <= 40


def test_recovery_shows_the_subject_distorted_elsewhere_and_wants_the_scene_of_the_caption():
    differs = 0
    for i in range(30):
        recovery, driven = tasks("recovery", train=False)[i], tasks("subject-driven", train=False)[i]
        assert recovery["caption"] == driven["caption"] and np.array_equal(recovery["target"], driven["target"])
        differs += not np.array_equal(recovery["refs"][0], driven["refs"][0])
    assert differs == 30


def test_distortion_keeps_the_subject_in_sight():
    subject = cutout(SHAPES[0])
    shares = []
    for i in range(60):
        moved = data.distort(subject, np.random.default_rng(i))
        shares.append(np.asarray(moved.getchannel("A")).mean() / np.asarray(subject.getchannel("A")).mean())
    assert 15 < sum(s == 1 for s in shares) < 45  # with p .5 nothing but place and scale changes
    assert min(shares) > 0.3


def test_subject_driven_moves_the_subject_to_another_background():
    for i in range(20):
        sample = tasks("subject-driven")[i]
        corners = [image[[0, 0, -1], [0, -1, -1]].tolist() for image in (sample["refs"][0], sample["target"])]
        assert corners[0] != corners[1]


def test_views_of_one_subject_make_pairs_and_are_held_out_together(tmp_path, monkeypatch):
    with open(tmp_path / "metadata.jsonl", "w") as f:
        for i in range(20):
            for view, colour in (("a", (250, 0, 0)), ("b", (0, 0, 250))):
                sprite(tmp_path / f"{i}{view}.png", colour)
                f.write(json.dumps({"file_name": f"{i}{view}.png", "text": f"thing {i}", "subject_id": i}) + "\n")
    subjects = load_subjects(str(tmp_path))
    assert len(subjects) == 40 and len({s.name for s in subjects}) == 20
    monkeypatch.setattr(data, "draw_background", lambda words, size, rng: Image.new("RGB", (size, size), "white"))
    dataset = tasks("subject-driven", subjects=subjects, size=64)
    for i in range(20):
        sample = dataset[i]
        blue = [(image[..., 0] < 50).sum() > 50 for image in (sample["refs"][0], sample["target"])]
        red = [(image[..., 2] < 50).sum() > 50 for image in (sample["refs"][0], sample["target"])]
        assert blue == [not r for r in red] and blue[0] != blue[1]  # one view in the reference, the other in the target


def test_captions_name_subject_background_size_and_place():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        caption = data.write_caption(rng, "owl", "in the snow", "small", "on the left")
        assert all(words in caption for words in ("a small owl", "in the snow", "on the left")) and "  " not in caption
        seen.add(caption)
    assert len(seen) == 3
    assert data.write_caption(rng, "owl", "in space").startswith(("an owl", "a big owl", "in space, a"))


def test_named_placements_are_whole_patches():
    for size, place in itertools.product(data.SIZES, data.PLACES):
        placement = data.named_placement(size, place)
        side = placement.side * 64
        assert side % 8 == 0 and placement.x * (64 - side) % 8 == 0 and placement.y * (64 - side) % 8 == 0


def test_every_background_is_drawn_and_differs():
    rng = np.random.default_rng(0)
    drawn = [np.asarray(data.draw_background(words, 32, rng)).astype(int) for words in data.BACKGROUNDS]
    assert all(image.shape == (32, 32, 3) for image in drawn)
    for i, a in enumerate(drawn):
        assert all(np.abs(a - b).mean() > 5 for b in drawn[:i])


# -- where subjects come from


def test_emoji_are_things_with_names():
    if data.emoji_font() is None:
        pytest.skip("no colour emoji font on this machine")
    subjects = load_subjects("emoji")
    labels = [s.label for s in subjects]
    assert len(subjects) > 800 and {"dog", "red apple", "bicycle"} <= set(labels) and len(labels) == len(set(labels))
    assert not [name for name in labels if "keycap" in name or "regional" in name]
    assert cutout(subjects[0]).mode == "RGBA"


def test_no_emoji_font_falls_back_to_shapes_aloud_only_by_default(monkeypatch, capsys):
    monkeypatch.setattr(data, "emoji_font", lambda: None)
    assert load_subjects() == SHAPES and "using --data shapes" in capsys.readouterr().err
    with pytest.raises(BadInput, match="apt-get install"):
        load_subjects("emoji")


def test_folder_with_sidecars_classes_or_metadata(tmp_path):
    sprite(tmp_path / "a" / "one.png")
    (tmp_path / "a" / "one.txt").write_text("A Red Ball.\nsecond line\n")
    sprite(tmp_path / "a" / "dog" / "1.png")
    picture(tmp_path / "a" / "plain.jpg")
    by_label = {s.label: s for s in load_subjects(str(tmp_path / "a"))}
    assert set(by_label) == {"red ball", "dog", "plain"}
    assert by_label["red ball"].has_cutout and not by_label["plain"].has_cutout

    picture(tmp_path / "b" / "photo.jpg", size=(40, 40))
    mask = np.zeros((20, 20), np.uint8)  # half the size of its picture, and grey where it must not count
    mask[5:15, 5:15], mask[0:3] = 255, 100
    Image.fromarray(mask).save(tmp_path / "b" / "mask.png")
    (tmp_path / "b" / "metadata.jsonl").write_text(
        json.dumps({"file_name": "photo.jpg", "text": "the big photo", "label": "photo", "mask": "mask.png"}) + "\nnot json\n")
    (subject,) = load_subjects(str(tmp_path / "b"))
    assert subject.label == "photo" and cutout(subject).size == (20, 20)


def test_plain_pictures_serve_reconstruction_and_text_to_image_alone(tmp_path):
    for i in range(30):
        picture(tmp_path / f"photo {i}.jpg", (i * 8, 100, 100))
    subjects = load_subjects(str(tmp_path))
    sample = tasks("reconstruction", subjects=subjects)[0]
    assert sample["target"].shape == (32, 32, 3) and np.array_equal(sample["refs"][0], sample["target"])
    with pytest.raises(BadInput, match="--mix text-to-image"):
        tasks("segmentation", subjects=subjects)


def test_broken_files_are_passed_over(tmp_path, capsys):
    for i in range(20):
        sprite(tmp_path / f"good {i}.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    whole = (tmp_path / "good 1.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])  # its header is whole: found out only on reading
    subjects = load_subjects(str(tmp_path))
    assert "skipped 2 of 23" in capsys.readouterr().err
    dataset = tasks("segmentation", subjects=subjects)
    assert "cut" not in {dataset[i]["label"] for i in range(100)}


@pytest.mark.parametrize("mode, ending", [("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png"), ("I;16", "png")])
def test_any_mode_of_image_is_read(tmp_path, mode, ending):
    path = tmp_path / f"image.{ending}"
    if mode == "I;16":
        Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(path)
    else:
        picture(path, mode=mode)
    square = np.asarray(data.open_square(path, 32)).astype(int)
    assert square.shape == (32, 32, 3)
    if mode != "1":  # a dither has no one colour
        wanted = (156,) * 3 if mode == "I;16" else (82,) * 3 if "L" in mode else (200, 30, 30)
        assert np.abs(square.mean((0, 1)) - wanted).max() < 12


def test_exif_rotation_is_followed_and_alpha_lies_on_white(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 255
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    square = np.asarray(data.open_square(tmp_path / "turned.png", 20)).astype(int)
    assert square[:8].mean() < 60 and square[-8:].mean() > 200
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.all(np.asarray(data.open_square(tmp_path / "clear.png", 8)) == 255)


def test_labels_are_short_and_bare():
    assert data.clean_label("The quick brown fox jumps over the lazy dog.\nmore") == "quick brown fox jumps"
    assert len(data.clean_label("é" * 40).encode()) <= data.MAX_LABEL
