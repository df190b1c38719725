"""Where subjects come from: the emoji font, and folders that people have."""

import argparse
import colorsys
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import SHAPES, picture, sprite, tasks
from PIL import Image, ImageOps

import data
import train
from data import TASKS, TaskDataset, emoji_font, load_subjects, open_cutout, open_square, read_image
from mentor import BadInput


def test_emoji_are_things_with_names():
    if emoji_font() is None:
        pytest.skip("no colour emoji font on this machine")
    subjects = load_subjects("emoji")
    labels = [s.label for s in subjects]
    assert (
        len(subjects) > 800
        and {"dog", "red apple", "bicycle"} <= set(labels)
        and len(labels) == len(set(labels))
    )
    assert not [name for name in labels if "keycap" in name or "regional" in name]
    assert open_cutout(subjects[0]).mode == "RGBA"


def test_no_emoji_font_falls_back_to_shapes_aloud_only_by_default(monkeypatch, capsys):
    monkeypatch.setattr(data, "emoji_font", lambda: None)
    assert list(load_subjects()) == list(SHAPES) and "using --data shapes" in capsys.readouterr().err
    with pytest.raises(BadInput, match="apt-get install"):
        load_subjects("emoji")


def test_folder_with_sidecars_or_classes(tmp_path):
    sprite(tmp_path / "a" / "one.png")
    (tmp_path / "a" / "one.txt").write_text("A Red Ball.\nsecond line\n")
    sprite(tmp_path / "a" / "dog" / "1.png")
    picture(tmp_path / "a" / "plain.jpg")
    by_label = {s.label: s for s in load_subjects(str(tmp_path / "a"))}
    assert set(by_label) == {"red ball", "dog", "plain"}
    assert by_label["red ball"].has_cutout and not by_label["plain"].has_cutout


def test_plain_pictures_serve_reconstruction_and_text_to_image_alone(tmp_path):
    for i in range(30):
        picture(tmp_path / f"photo {i}.jpg", (i * 8, 100, 100))
    subjects = load_subjects(str(tmp_path))
    sample = tasks("reconstruction", subjects=subjects)[0]
    assert sample.target.shape == (32, 32, 3) and np.array_equal(sample.references[0], sample.target)
    with pytest.raises(BadInput, match="--mix text-to-image"):
        tasks("segmentation", subjects=subjects)


def colour_of(i):
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / 10, 1, 1))


def bomb(path):
    """A PNG whose header promises 10,000 x 10,000 pixels."""
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\0" * 40
    )


def test_bad_files_by_the_dozen_are_named_and_never_fed(tmp_path, capfd):
    """Ten good cut-outs, each of its own colour, among ten times as many bad files: every sample shows the
    colour of its label."""
    for i in range(10):
        sprite(tmp_path / f"good {i}.png", colour_of(i))
    whole = (tmp_path / "good 1.png").read_bytes()
    for i in range(30):
        (tmp_path / f"empty {i}.png").write_bytes(b"")
        (tmp_path / f"text {i}.jpg").write_text("not an image")
        (tmp_path / f"cut {i}.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    picture(tmp_path / "photo.jpg", size=(400, 300))
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:1000])
    bomb(tmp_path / "bomb.png")
    Image.new("RGBA", (9, 9)).save(tmp_path / "nothing.png")  # clear all over
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good 2.txt").write_bytes("not utf-8: \xe9".encode("latin-1"))
    (tmp_path / "good 3.txt").write_text("🦉 בומה")
    (tmp_path / "good 4.txt").write_text("word " * 2000)
    subjects = load_subjects(str(tmp_path))
    assert "skipped 94 files" in subjects.report and len(subjects) == 10 + 1
    colours = {
        subject.label: colour_of(i)
        for i in range(10)
        for subject in subjects
        if subject.path.endswith(f"good {i}.png")
    }
    assert (
        len(colours) == 10
        and "🦉 בומה" in colours
        and max(len(label.split()) for label in colours) <= data.MAX_LABEL
    )
    for task in TASKS:
        dataset = TaskDataset(subjects, {task: 1.0}, 32, (0,))
        dataset.train = False  # the same subjects, their colours as they are
        for i in range(60):
            sample = dataset[i]
            for j, label in enumerate(sample.labels if task != "in-context" else ()):
                colour = colours.get(label.split(" on the ")[0].split(" at the ")[0])  # None: "thing"
                for image in (sample.target, *sample.references[j : j + 1]) if colour else ():
                    assert (np.abs(image.astype(int) - colour).max(2) < 40).any(), (task, i, label)
    said = capfd.readouterr().err
    assert (
        said.count("photo.jpg: not a readable image") == 1
    )  # a JPEG's pixels are read only where it is used


def test_odd_files_are_read_all_the_same(tmp_path):
    picture(tmp_path / "png.jpg", format="PNG")  # by content, not by name
    picture(tmp_path / "dot.png", size=(1, 1))
    picture(tmp_path / "line.png", size=(1, 5000))
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    disc = Image.open(sprite(tmp_path / "disc.png"))
    disc.quantize(16).save(tmp_path / "palette.png")
    subjects = load_subjects(str(tmp_path))
    assert {s.label: s.has_cutout for s in subjects} == dict.fromkeys(
        ("png", "dot", "line", "moving"), False
    ) | {"disc": True, "palette": True}
    assert "skipped 0 files" in subjects.report
    for subject in subjects:
        assert open_square(subject.path, 32).size == (32, 32)
        assert not subject.has_cutout or max(open_cutout(subject).size) <= 256
    assert np.asarray(open_square(tmp_path / "moving.gif", 8))[0, 0].tolist() == [
        255,
        0,
        0,
    ]  # its first picture


def test_bad_lines_of_metadata_are_passed_over(tmp_path):
    folder = tmp_path / "mine"
    for name in ("good", "small", "dark", "no mask"):
        picture(folder / f"{name}.jpg", size=(40, 40))
    picture(tmp_path / "outside.jpg")
    half = np.zeros((20, 20), np.uint8)  # half the size of its picture, and grey where it must not count
    half[5:15, 5:15], half[0:3] = 255, 100
    Image.fromarray(half).save(folder / "half.png")
    Image.new("L", (40, 40)).save(folder / "empty mask.png")
    lines = [
        {"file_name": "good.jpg", "text": "the good one", "mask": "half.png"},
        {"file_name": "small.jpg", "mask": "../outside.jpg"},
        {"file_name": "../outside.jpg"},
        {"file_name": str(tmp_path / "outside.jpg")},
        {"file_name": "dark.jpg", "mask": "empty mask.png"},
        {"file_name": "no mask.jpg", "mask": "nowhere.png"},
        {"file_name": "nowhere.jpg"},
        {"file_name": "good.jpg", "label": "\ud83d"},
    ]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    subjects = load_subjects(str(folder))
    assert [s.label for s in subjects] == ["good one"]
    assert "skipped 7 files" in subjects.report
    assert "3 a link that leads out of the folder (copy the file), first small.jpg" in subjects.report
    assert "its mask cannot be used: nothing in it is opaque, first dark.jpg" in subjects.report
    assert open_cutout(subjects[0]).size == (20, 20)
    dataset = TaskDataset(subjects, {"subject-driven": 1.0}, 32, (0,))
    assert {dataset[i].labels[0] for i in range(40)} == {"good one"}


def test_a_class_of_number_0_is_a_label(tmp_path):
    sprite(tmp_path / "thing.png").with_suffix(".txt").write_text("")  # says nothing, and hides nothing
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "thing.png", "label": 0, "text": null}')
    assert [subject.label for subject in load_subjects(str(tmp_path))] == ["0"]


def test_the_name_of_a_plain_picture_is_no_background(tmp_path):
    """Cut-outs stand on parts of it, but no caption says "a star, img 2034"."""
    for i in range(12):
        sprite(tmp_path / "mine" / f"star {i}.png")
        picture(tmp_path / "mine" / f"img {i}.jpg")
    dataset = TaskDataset(load_subjects(str(tmp_path / "mine")), {"reconstruction": 1.0}, 32, (0,))
    captions = [sample.caption for sample in map(dataset.__getitem__, range(200)) if sample.mask.any()]
    assert len(captions) > 50 and not any("img" in caption for caption in captions)


def test_one_photograph_does_not_keep_scenes_from_the_tokenizer(tmp_path):
    for i in range(12):
        sprite(tmp_path / "mine" / f"star {i}.png")
    for folder in ("mine", "plain"):
        picture(tmp_path / folder / "photo.jpg")
    for folder, mix in (("mine", train.MIXES[0]), ("plain", {"text-to-image": 1.0})):
        flags = argparse.Namespace(data=str(tmp_path / folder), backgrounds=None, out=str(tmp_path), seed=0,
                                   preset="test", batch_size=None, steps=None, mix=None, init=None)
        plan = train.make_plan(0, flags, torch.device("cpu"))
        dataset = train.make_datasets(plan, flags)[0]
        assert dataset.mix == mix
        pictures = next(iter(train.make_loader(plan, dataset, 0, 0)))[0]
        assert len(pictures) == (2 * 16 if folder == "mine" else 16)  # scenes come with their reference


def test_pictures_without_a_subject_are_not_views_of_one(tmp_path):
    for name in ("1.png", "2.png", "2.webp"):
        sprite(tmp_path / name)
    lines = [
        {"file_name": "1.png", "subject_id": None},
        {"file_name": "2.png", "subject_id": None},
        {"file_name": "2.webp", "subject_id": "1.png"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "0 pairs" in load_subjects(str(tmp_path)).report
    (tmp_path / "metadata.jsonl").unlink()
    assert "0 pairs" in load_subjects(str(tmp_path)).report


def test_a_rectangle_without_a_transparent_pixel_is_a_plain_picture(tmp_path):
    """As screenshots are: RGBA, and opaque all over. They serve where a plain picture does, and nowhere
    else."""
    for i in range(9):
        picture(tmp_path / f"shot {i}.png", mode="RGBA")
    subjects = load_subjects(str(tmp_path))
    assert "9 images, 0 of them cut-outs" in subjects.report
    sample = tasks("text-to-image", subjects=subjects)[0]
    assert sample.labels[0].startswith("shot") and np.abs(sample.target - (200, 30, 30)).max() == 0
    with pytest.raises(BadInput, match="none of these images has alpha"):
        tasks("segmentation", subjects=subjects)
    sprite(tmp_path / "disc.png")
    subjects = load_subjects(str(tmp_path))
    for task, shown in (("segmentation", {"disc"}), ("text-to-image", {s.label for s in subjects})):
        dataset = TaskDataset(subjects, {task: 1.0}, 32, (0,))
        assert {dataset[i].labels[0] for i in range(200)} == shown


def test_whatever_is_wrong_with_a_file_the_scan_goes_on(tmp_path, monkeypatch):
    sprite(tmp_path / "good.png")
    sprite(tmp_path / "bad.png")
    picture(tmp_path / "odd  name.png")
    is_cutout = data.is_cutout

    def picky(path):
        if path.name == "bad.png":
            raise SyntaxError("broken PNG file")  # as pillow says of a bad chunk behind the pixels
        return is_cutout(path)

    monkeypatch.setattr(data, "is_cutout", picky)
    subjects = load_subjects(str(tmp_path))
    assert {subject.label for subject in subjects} == {"good", "odd name"}
    assert "skipped 1 files" in subjects.report and "broken PNG file" in subjects.report


def test_words_of_a_long_file_name_fit_the_block(tmp_path):
    picture(tmp_path / f"{'word ' * 40}.jpg")
    subject = load_subjects(str(tmp_path))[0]
    assert len(subject.caption.split()) == data.MAX_CAPTION


def test_a_label_is_held_out_in_all_sources_at_once(tmp_path):
    """Two hands draw each thing: neither's drawing of a held-out one may be trained on. They are two
    subjects, not views of one."""
    for hand in ("a", "b"):
        for i in range(120):
            sprite(tmp_path / hand / f"thing number {i}.png")
    subjects = load_subjects(f"{tmp_path / 'a'},{tmp_path / 'b'}")
    held_out = {subject.label for subject, out in zip(subjects, subjects.table["held_out"]) if out}
    trained = {subject.label for subject, out in zip(subjects, subjects.table["held_out"]) if not out}
    assert "240 subjects, 120 labels" in subjects.report and not held_out & trained
    assert 4 <= len(held_out) <= 25 and subjects.table["held_out"].sum() == 2 * len(held_out)
    few = load_subjects(str(sprite(tmp_path / "c" / "dog" / "1.png").parent.parent))
    assert few.table["held_out"].tolist() == [data.is_held_out(few[0], by_label=False)]


def test_a_photograph_is_a_ground_too_in_parts_of_it(tmp_path):
    """Where no caption names it: of a picture red on the left and blue on the right parts are either."""
    image = np.zeros((60, 60, 3), np.uint8)
    image[:, :30], image[:, 30:] = (250, 0, 0), (0, 0, 250)
    (tmp_path / "photos").mkdir()
    Image.fromarray(image).save(tmp_path / "photos" / "1.png")
    photographs = load_subjects(str(tmp_path / "photos"))
    dataset = TaskDataset(SHAPES, {"segmentation": 1.0}, 32, (0,), True, photographs)
    shares = []
    for i in range(100):
        picture = np.asarray(dataset.background(np.random.default_rng(i), any_ground=True).image).astype(int)
        red, blue = ((np.abs(picture - colour).max(2) < 20).mean() for colour in ((250, 0, 0), (0, 0, 250)))
        shares += [red] if red + blue > 0.9 else []
    assert 30 < len(shares) < 70 and min(shares) < 0.3 and max(shares) > 0.7


def test_files_of_emoji_sets_are_named_by_their_code_points(tmp_path):
    for name in ("1f436.png", "emoji_u1f431.png", "u1f98a.png", "2600-fe0f.png", "26BD.png"):
        sprite(tmp_path / "set" / "72x72" / name)
    for name in ("1f468-200d-1f33e.png", "1f44d-1f3fb.png", "emoji_u1f1e6_1f1e8.png", "a9.png"):
        sprite(tmp_path / "set" / "72x72" / name)  # several characters, or none of a thing
    for name in ("2600.png", "face.png", "12345.png"):  # no emoji set: nothing else in it is named so
        sprite(tmp_path / "photos" / name)
    sprite(tmp_path / "set" / "other" / "1f600.png")
    (tmp_path / "set" / "other" / "1f600.txt").write_text("a grin")
    subjects = load_subjects(str(tmp_path / "set"))
    labels = {"dog face", "cat face", "fox face", "black sun with rays", "soccer ball", "grin"}
    assert {subject.label for subject in subjects} == labels and "skipped 4 files" in subjects.report
    assert {subject.label for subject in load_subjects(str(tmp_path / "photos"))} == {"2600", "face", "12345"}
    if emoji_font():  # what is held out of one source is held out of the other
        both = load_subjects(f"emoji,{tmp_path / 'set'}")
        out = {(subject.label, bool(out)) for subject, out in zip(both, both.table["held_out"])}
        assert len(out) == len({label for label, _ in out})


def test_what_metadata_says_of_the_split_overrides_the_hash(tmp_path):
    names = [sprite(tmp_path / f"{i}.png").name for i in range(120)]
    splits = ("train", "test", None) * 40
    lines = [{"file_name": a, "label": f"a {a}", "split": b} for a, b in zip(names, splits)]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    subjects = load_subjects(str(tmp_path))
    for subject, held_out in zip(subjects, subjects.table["held_out"]):
        by_hash = zlib.crc32(subject.label.encode()) % 10 == 0
        assert held_out == {"train": False, "test": True, "": by_hash}[subject.split]
    (tmp_path / "metadata.jsonl").write_text("\n" + json.dumps({"file_name": "0.png", "split": "none"}))
    with pytest.raises(BadInput, match="metadata.jsonl, line 2: \"split\" is 'none': write train or test"):
        load_subjects(str(tmp_path))


def test_mirrored_files_are_views_of_one_subject(tmp_path):
    sprite(tmp_path / "owl.png")
    sprite(tmp_path / "owl_mirror.png")
    (tmp_path / "owl.txt").write_text("A wise owl.")
    subjects = load_subjects(str(tmp_path))
    assert (
        [s.label for s in subjects] == ["wise owl"] * 2
        and "1 subjects" in subjects.report
        and "2 pairs" in subjects.report
    )
    assert subjects.other_views(0) == [1] and subjects.other_views(1) == [0]


def test_photographs_and_plain_pictures_become_backgrounds(tmp_path):
    for i in range(3):
        picture(tmp_path / "photos" / f"on planet {i}.jpg", (250, 0, 250))
    for i in range(20):
        sprite(tmp_path / "mine" / f"{i}.png", (0, 0, 0))
        picture(tmp_path / "mine" / f"plain {i}.jpg", (0, 250, 250))
    subjects, photographs = load_subjects(str(tmp_path / "mine")), load_subjects(str(tmp_path / "photos"))

    def shows(image, colour):
        return (np.abs(image.astype(int) - colour).max(2) < 30).mean() > 0.1

    dataset = TaskDataset(subjects, {"subject-driven": 1.0}, 32, (0,), True, photographs)
    samples = [dataset[i] for i in range(100)]
    for sample in samples:
        assert shows(sample.target, (250, 0, 250)) == ("on planet" in sample.caption)
        assert not shows(
            sample.target, (0, 250, 250)
        )  # nobody knows words for what is behind in a plain picture
    assert 35 < sum("on planet" in sample.caption for sample in samples) < 65
    assert 10 < sum(shows(sample.references[0], (0, 250, 250)) for sample in samples) < 45


def test_target_and_reference_never_share_a_background(tmp_path):
    """With two photographs, by chance, they would share one in a quarter of the pairs."""
    for i, colour in enumerate(((250, 0, 250), (0, 250, 250))):
        picture(tmp_path / f"on planet {i}.jpg", colour)
    photographs = load_subjects(str(tmp_path))
    for task in ("subject-driven", "recovery"):
        dataset = TaskDataset(SHAPES, {task: 1.0}, 32, (0,), True, photographs)
        pairs = []
        for i in range(150):
            sample = dataset[i]
            corners = [image[0, 0].astype(int) for image in (sample.references[0], sample.target)]
            pairs.append(np.abs(corners[0] - corners[1]).max() < 8)
            if "on planet" in sample.caption:
                assert not pairs[-1]
        assert np.mean(pairs) < 0.1  # (two drawn ones may have like skies)


def test_looking_a_subject_up_copies_no_column():
    """A million pictures have a column of 8 MB: searching in one that is not aligned would copy it each
    time."""
    assert SHAPES.table["subject"].flags.aligned and SHAPES.table.dtype.isalignedstruct


def test_two_sources_of_one_name_are_refused(tmp_path):
    for parent in ("a", "b"):
        sprite(tmp_path / parent / "dogs" / "1.png")
        (tmp_path / f"link {parent}").symlink_to(tmp_path / parent / "dogs")
    for sources in ("{0}/a/dogs,{0}/b/dogs/", "{0}/link a,{0}/link b"):
        with pytest.raises(BadInput, match="of one name"):
            load_subjects(sources.format(tmp_path))


@pytest.mark.parametrize(
    "mode, ending",
    [("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png"), ("I;16", "png")],
)
def test_any_mode_of_image_is_read(tmp_path, mode, ending):
    path = tmp_path / f"image.{ending}"
    if mode == "I;16":
        Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(path)
    else:
        picture(path, mode=mode)
    square = np.asarray(open_square(path, 32)).astype(int)
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
    square = np.asarray(open_square(tmp_path / "turned.png", 20)).astype(int)
    assert square[:8].mean() < 60 and square[-8:].mean() > 200
    almost = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    almost.putpixel((4, 4), (255, 255, 255, 255))
    almost.save(tmp_path / "clear.png")
    assert np.all(np.asarray(open_square(tmp_path / "clear.png", 8)) == 255)


def test_labels_are_short_and_bare():
    name, place = data.clean_label("The quick brown fox jumps over the dog.\nmore")
    assert (name, place) == ("quick brown fox jumps over", "")
    assert data.clean_label("a pear-shaped, well-known thing") == ("pear-shaped", "")
    assert data.clean_label("The cat on the left.") == ("cat", " on the left")
    assert data.clean_label("a dog at the top right") == ("dog", " at the top right")


def test_words_of_a_background_are_not_cut_like_a_label(tmp_path):
    picture(tmp_path / "on a mountain in the morning.jpg")
    dataset = TaskDataset(SHAPES, {"text-to-image": 1.0}, 16, (0,), True, load_subjects(str(tmp_path)))
    captions = [dataset[i].caption for i in range(40)]
    assert sum("on a mountain in the morning" in caption for caption in captions) > 10


def test_captions_are_in_the_words_that_a_user_types(tmp_path):
    """sample.py cleans a prompt by the same function: articles stay, capitals and the full stop go."""
    picture(tmp_path / "1.jpg")
    (tmp_path / "1.txt").write_text("A red square on  the Wall.\nsecond line")
    sample = tasks("text-to-image", subjects=load_subjects(str(tmp_path)))[0]
    assert sample.caption == data.clean_text("A red square on the wall") == "a red square on the wall"
    assert sample.labels[0] == "red square on the wall"


def test_large_photographs_are_decoded_small(tmp_path, monkeypatch):
    """12 megapixels, drawn at 64 px: no more than 256 x 256 is decoded, and the picture is the same but for
    rounding."""
    y, x = np.mgrid[:3000, :4000]
    pixels = np.stack((x / 16, y / 12, (x + y) / 28), -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    decoded, transpose = [], ImageOps.exif_transpose
    monkeypatch.setattr(
        ImageOps, "exif_transpose", lambda image: decoded.append(image.size) or transpose(image)
    )
    small = np.asarray(open_square(tmp_path / "large.jpg", 64)).astype(int)
    assert max(decoded[0]) <= 512
    wanted = Image.fromarray(pixels[:, 500:3500]).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(small - np.asarray(wanted)).mean() < 2
    assert (
        read_image(tmp_path / "large.jpg").size == (4000, 3000)
        and read_image(tmp_path / "large.jpg").mode == "RGB"
    )


def test_large_pictures_get_subjects_of_their_own_size(tmp_path):
    """At 512 px a subject of 400 px is not drawn up from 256."""
    alpha = np.pad(np.full((400, 400), 255, np.uint8), 20)
    Image.fromarray(np.dstack([np.zeros((440, 440, 3), np.uint8), alpha])).save(tmp_path / "big.png")
    subject = load_subjects(str(tmp_path))[0]
    assert open_cutout(subject).size == (256, 256) and open_cutout(subject, 512).size == (400, 400)


def test_whatever_pillow_raises_the_file_is_named(tmp_path, monkeypatch):
    sprite(tmp_path / "a.png")

    def fail(image):
        raise struct.error(
            "unpack requires a buffer of 4 bytes"
        )  # a cut EXIF header, with some versions of pillow

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(BadInput, match="a.png: not a readable image"):
        read_image(tmp_path / "a.png")


def test_sources_take_equal_turns_however_large(tmp_path):
    """Twenty pictures of one's own beside a thousand emoji are half of what training sees. What a source has
    nothing of, as the held-out ones of so few pictures, is left to the others."""
    for name in ("mug", "hat", "key"):
        sprite(tmp_path / "mine" / f"{name}.png")
    picture(tmp_path / "photographs" / "photo.jpg")
    subjects = load_subjects(f"shapes,{tmp_path / 'mine'},{tmp_path / 'photographs'}")
    dataset = TaskDataset(subjects, {"recovery": 1.0}, 32, (0,))
    rng = np.random.default_rng(0)

    def picked(dataset, pool):
        names = [subjects[dataset.pick(rng, pool)].name.split("/")[0] for _ in range(600)]
        return {name: names.count(name) / 600 for name in set(names)}

    shares = picked(dataset, dataset.cutouts)
    assert set(shares) == {"shapes", "mine"} and abs(shares["mine"] - 1 / 2) < 0.06
    shares = picked(dataset, dataset.all)
    assert set(shares) == {"shapes", "mine", "photographs"}
    assert all(abs(share - 1 / 3) < 0.06 for share in shares.values())
    held_out = TaskDataset(subjects, {"recovery": 1.0}, 32, (0,), train=False)
    assert set(picked(held_out, held_out.cutouts)) == {"shapes"}
