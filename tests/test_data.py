"""Subjects, scenes and tasks."""

import itertools
import json

import numpy as np
from conftest import SHAPES, sprite, tasks
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

import data
from data import COLOURS, TASKS, Placement, Subject, TaskDataset, compose, load_subjects, open_cutout

# -- the same sample again


def test_same_seed_and_index_same_sample_whatever_the_workers():
    def flat(sample):
        return [
            sample.task,
            sample.labels,
            sample.caption,
            sample.hide,
            *(a.tobytes() for a in (*sample.references, sample.target)),
        ]

    mix = {task: 1 / len(TASKS) for task in TASKS}
    order = [[5, 17], [3, 4], [99, 5]]
    alone = [[flat(TaskDataset(SHAPES, mix, 32, (7, 1))[i]) for i in batch] for batch in order]
    for workers in (0, 2):
        loader = DataLoader(
            TaskDataset(SHAPES, mix, 32, (7, 1)), batch_sampler=order, collate_fn=list, num_workers=workers
        )
        assert [[flat(s) for s in batch] for batch in loader] == alone
    assert flat(TaskDataset(SHAPES, mix, 32, (7, 2))[5]) != alone[0][0]
    for cache in (data.open_cutout, data.paint_ground, data.paint_background):  # with nothing composed before
        cache.cache_clear()
    assert flat(TaskDataset(SHAPES, mix, 32, (7, 1))[99]) == alone[2][0]


def test_held_out_subjects_never_occur_in_training():
    held_out = {s.label for s in SHAPES if data.is_held_out(s)}
    assert 0.05 < len(held_out) / len(SHAPES) < 0.15
    mix = {task: 1 / len(TASKS) for task in TASKS}
    datasets = [TaskDataset(SHAPES, mix, 8, (0,), train) for train in (True, False)]
    known = {s.label for s in SHAPES}  # (segmentation asks for "red blue star on the left", too)
    train, test = (
        {label for i in range(3000) for label in dataset[i].labels if label in known} for dataset in datasets
    )
    assert not train & held_out and len(train) > 350
    assert test == held_out


def test_shares_of_the_mix_are_kept():
    dataset = TaskDataset(SHAPES, {"segmentation": 0.7, "text-to-image": 0.3}, 8, (0,))
    drawn = [dataset[i] for i in range(600)]
    assert 0.6 < np.mean([s.task == "segmentation" for s in drawn]) < 0.8
    hidden = np.mean([[s.hide == h for h in ("all", "text")] for s in drawn], 0)
    assert np.allclose(hidden, [0.1, 0.05], atol=0.035)


# -- each task's target is what the paper says


def test_reconstruction_gives_back_its_reference_with_and_without_caption():
    samples = [tasks("reconstruction")[i] for i in range(100)]
    assert all(np.array_equal(s.references[0], s.target) for s in samples)
    assert 25 <= sum(s.caption == "" for s in samples) <= 60  # a third stand on a ground without words


def flat_background(colour):
    return lambda words, size, rng: Image.new("RGB", (size, size), colour)


def test_segmentation_keeps_the_asked_subject_in_place_and_all_else_is_exactly_black(monkeypatch):
    """The true mask is what differs when the same scene is drawn on black and on white."""
    asked_by, compose_scene, places = set(), TaskDataset.scene, []

    def scene(*how, **more):
        composed = compose_scene(*how, **more)
        places[:] = composed.places
        return composed

    monkeypatch.setattr(TaskDataset, "scene", scene)
    for i in range(60):
        with monkeypatch.context() as patch:
            patch.setattr(data, "paint_background", flat_background("black"))
            patch.setattr(data, "paint_ground", lambda *how: flat_background("black")("", how[0], None))
            on_black = (sample := tasks("segmentation")[i]).references[0].astype(int)
            patch.setattr(data, "paint_background", flat_background("white"))
            patch.setattr(data, "paint_ground", lambda *how: flat_background("white")("", how[0], None))
            on_white = tasks("segmentation")[i].references[0].astype(int)
        alpha = 255 - (on_white - on_black).max(-1)  # (H, W), 0 outside the subjects
        place, *others = places
        if others:
            (asked,) = sample.labels
            asked_by.add((not asked.startswith("thing"), asked.endswith(place)))
            where = {**data.SIDES, **data.QUARTERS}[place]
            left, top = round(where.x * 16), round(where.y * 16)
            box = np.zeros_like(alpha)
            box[top : top + 16, left : left + 16] = 1
            alpha, on_black = alpha * box, on_black * box[..., None]
        target = sample.target.astype(int)
        assert np.all(target[alpha == 0] == 0) and 0.01 < (alpha == 255).mean() < 0.9
        assert np.array_equal(target, on_black)
        assert np.array_equal(target[alpha == 255], on_white[alpha == 255])
        assert np.abs(sample.mask.astype(int) - alpha).max() <= 1
    assert asked_by == {(True, False), (True, True), (False, True)}


def test_subjects_of_a_scene_never_overlap_and_stand_where_the_caption_says():
    rng = np.random.default_rng(0)
    for i in range(60):
        numbers = tasks("multi-image").different(i, 2 + i % 3, rng)
        labels = [SHAPES[number].label for number in numbers]
        assert len(set(labels)) == len(numbers) == 2 + i % 3
        cutouts = [open_cutout(SHAPES[number]) for number in numbers]
        scene = tasks("multi-image").scene(numbers, cutouts, rng)
        assert (np.stack(scene.masks) > 0).sum(0).max() == 1
        assert scene.labels == tuple(labels) and scene.background_name in scene.caption
        for label, mask, place in zip(labels, scene.masks, scene.places):
            assert f" {label} {place}" in scene.caption
            y, x = (mask.nonzero()[axis].mean() / 32 for axis in (0, 1))
            assert (x < 0.5) == place.endswith("left") and (x > 0.5) == place.endswith("right")
            assert "top" not in place or y < 0.5
            assert "bottom" not in place or y > 0.5


def test_several_references_come_in_the_order_of_their_labels():
    for i in range(20):
        sample = tasks("multi-image", train=False)[i]
        assert 2 <= len(sample.labels) == len(sample.references) <= 4
        named = sample.caption.split(" <image>")[:-1]  # each reference behind its label
        assert all(words.endswith(label) for words, label in zip(named, sample.labels))
        for label, reference in zip(sample.labels, sample.references):
            outer = np.array(COLOURS[label.split()[0]])  # of the shape; most references show it large
            assert (np.abs(reference.astype(int) - outer).max(2) < 30).sum() > 20


def test_an_example_shows_what_its_query_becomes(monkeypatch):
    seen, operate = [], data.operate
    monkeypatch.setattr(data, "operate", lambda *how: seen.append(how) or operate(*how))
    for i in range(60):
        before, after, query = (sample := tasks("in-context")[i]).references
        (operation, scene, *_, behind, turn), (same, other, alone, mask, same_behind, same_turn) = seen[-2:]
        assert operation == same and turn == same_turn and np.array_equal(behind, same_behind)
        assert np.array_equal(before, scene) and np.array_equal(query, other)
        assert not np.array_equal(before, query)
        target = sample.target.astype(int)
        if operation == "cut out":
            assert np.array_equal(target, alone)
        elif operation == "another scene":
            assert np.array_equal(target[mask == 0], behind[mask == 0])
            assert np.array_equal(target[mask == 255], query[mask == 255])
        elif operation == "mirror":
            assert np.array_equal(target[:, ::-1], query) and np.array_equal(sample.mask[:, ::-1], mask)
        elif operation == "grey":
            assert np.all(target == target[..., :1])
        else:
            assert np.abs(target.max(2) - query.max(2).astype(int)).max() <= 3  # the value stays
    assert {operation for operation, *_ in seen} == set(data.OPERATIONS)


def test_no_halo_of_the_old_background(tmp_path):
    """The hidden pixels of the cut-out are green; no green may come through its soft edge, at any scale."""
    subject = Subject("x", "x", "file", str(sprite(tmp_path / "disc.png", (200, 30, 30))))
    for side in (0.4, 0.5, 0.9):
        scene, alone, _ = compose(
            open_cutout(subject), Image.new("RGB", (64, 64), (30, 30, 200)), Placement(side, 0.3, 0.6)
        )
        for image in (np.asarray(scene), np.asarray(alone)):
            assert image[..., 1].max() <= 40


def test_recovery_shows_the_subject_distorted_elsewhere_and_wants_the_scene_of_the_caption(monkeypatch):
    differs = 0
    distorted, distort = [], data.distort
    monkeypatch.setattr(data, "distort", lambda *how: distorted.append(True) or distort(*how))
    for i in range(30):
        recovery, driven = tasks("recovery", train=False)[i], tasks("subject-driven", train=False)[i]
        assert recovery.caption == driven.caption and np.array_equal(recovery.target, driven.target)
        differs += not np.array_equal(recovery.references[0], driven.references[0])
    assert differs == len(distorted) == 30


def test_an_outline_filled_with_another_subjects_pixels():
    red, tall = Image.new("RGBA", (20, 20), (200, 30, 30, 255)), Image.new("RGBA", (10, 40))
    tall.paste((30, 30, 200, 255), (0, 20, 10, 40))  # the lower half is blue, the upper clear
    disc = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(disc).ellipse((8, 8, 56, 56), fill=(30, 200, 30, 255))
    for other, colour in ((red, (200, 30, 30)), (tall, (30, 30, 200))):
        filled = np.asarray(data.fill_outline(disc, other))
        assert np.array_equal(filled[..., 3], np.asarray(disc)[..., 3])
        assert np.abs(filled[..., :3].astype(int) - colour).mean() < 3  # its mean where it does not reach


def test_only_training_fills_outlines_and_only_where_no_view_shows_the_subject(monkeypatch):
    filled, fill_outline = [], data.fill_outline
    monkeypatch.setattr(data, "fill_outline", lambda *how: filled.append(True) or fill_outline(*how))
    for i in range(50):
        tasks("subject-driven", train=False)[i]
    assert not filled
    for i in range(200):
        tasks("subject-driven")[i]
    assert 50 < len(filled) < 110  # two in five
    monkeypatch.setattr(data.Subjects, "other_views", lambda self, i: [i])
    filled.clear()
    for i in range(50):
        tasks("subject-driven")[i]
    assert not filled


def test_distortion_keeps_the_subject_in_sight():
    subject = open_cutout(SHAPES[0])
    shares = []
    for i in range(60):
        moved = data.distort(subject, np.random.default_rng(i))
        shares.append(np.asarray(moved.getchannel("A")).mean() / np.asarray(subject.getchannel("A")).mean())
    assert 15 < sum(s == 1 for s in shares) < 45  # with p .5 nothing but place and scale changes
    assert min(shares) > 0.3


def test_subject_driven_moves_the_subject_to_another_background(monkeypatch):
    for i in range(20):
        drawn, paint_background = [], data.paint_background
        with monkeypatch.context() as patch:
            patch.setattr(
                data,
                "paint_background",
                lambda words, *how: drawn.append(words) or paint_background(words, *how),
            )
            sample = tasks("subject-driven")[i]
        there, *elsewhere = drawn  # (two in three references stand on a ground without a name)
        assert there in sample.caption and not any(words in sample.caption for words in elsewhere)


def test_views_of_one_subject_make_pairs_and_are_held_out_together(tmp_path, monkeypatch):
    with open(tmp_path / "metadata.jsonl", "w") as f:
        for i in range(20):
            for view, colour in (("a", (250, 0, 0)), ("b", (0, 0, 250))):
                sprite(tmp_path / f"{i}{view}.png", colour)
                f.write(
                    json.dumps({"file_name": f"{i}{view}.png", "text": f"thing {i}", "subject_id": i}) + "\n"
                )
    subjects = load_subjects(str(tmp_path))
    assert len(subjects) == 40 and len({s.name for s in subjects}) == 20
    monkeypatch.setattr(
        data, "paint_background", lambda words, size, rng: Image.new("RGB", (size, size), "white")
    )
    monkeypatch.setattr(data, "paint_ground", lambda size, *how: Image.new("RGB", (size, size), "white"))
    dataset = tasks("subject-driven", subjects=subjects, size=64)
    for i in range(20):
        sample = dataset[i]
        blue = [(image[..., 0] < 50).sum() > 50 for image in (sample.references[0], sample.target)]
        red = [(image[..., 2] < 50).sum() > 50 for image in (sample.references[0], sample.target)]
        assert (
            blue == [not r for r in red] and blue[0] != blue[1]
        )  # one view in the reference, the other in the target


def test_captions_name_subject_background_size_and_place():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        caption = data.write_caption(rng, [("owl", "small", "on the left")], "in the snow")
        assert (
            all(words in caption for words in ("a small owl", "in the snow", "on the left"))
            and "  " not in caption
        )
        seen.add(caption)
    assert len(seen) == 3
    assert data.write_caption(rng, [("owl", None, None)], "in space").startswith(
        ("an owl", "a big owl", "in space, a")
    )


def test_named_placements_are_whole_patches():
    for size, place in itertools.product(data.SIZES, data.PLACES):
        placement = data.named_placement(size, place)
        side = placement.side * 64
        assert side % 8 == 0 and placement.x * (64 - side) % 8 == 0 and placement.y * (64 - side) % 8 == 0


def test_grounds_are_of_any_look_and_a_pure_function_of_their_number():
    def draw(i):
        data.paint_ground.cache_clear()
        return np.asarray(data.paint_ground(32, i, SHAPES[0])).astype(int)

    drawn = [draw(i) for i in range(60)]
    assert all(image.shape == (32, 32, 3) and np.array_equal(image, draw(i)) for i, image in enumerate(drawn))
    assert min(np.abs(a - b).mean() for a, b in itertools.combinations(drawn, 2)) > 5
    flat = np.mean([np.abs(image - image[0, 0]).max() < 60 for image in drawn])
    assert 0.05 < flat < 0.6  # some are plain, most are not


def test_two_in_three_references_stand_on_a_ground_that_no_caption_names(monkeypatch):
    grounds, ground = [], data.paint_ground
    monkeypatch.setattr(data, "paint_ground", lambda *how: grounds.append(True) or ground(*how))
    for i in range(100):
        tasks("subject-driven")[i]
    assert 50 < len(grounds) < 80
    grounds.clear()
    for i in range(40):
        tasks("text-to-image")[i]
    assert not grounds  # a caption names its background


def test_every_background_is_drawn_and_differs():
    drawn = [np.asarray(data.paint_background(words, 32, 7)).astype(int) for words in data.BACKGROUNDS]
    assert all(image.shape == (32, 32, 3) for image in drawn)
    for i, a in enumerate(drawn):
        assert all(np.abs(a - b).mean() > 5 for b in drawn[:i])
