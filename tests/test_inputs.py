"""What people bring: alpha that cuts nothing out, pixels that are no bytes, words that training never met."""

import numpy as np
import pytest
import torch
from conftest import noisy_model, picture, sprite
from PIL import Image, ImageChops, ImageDraw

import data
import sample
import train
from data import Subject, load_subjects, open_cutout, paint_shape, read_image
from mentor import BadInput
from sample import frame_subjects, load_models, open_references, say_unknown

RAMP = np.linspace(0, 1, 48).repeat(48).reshape(48, 48)  # from black at the top to white at the foot


def photograph(alpha):
    """Grey at .8, with this alpha (48, 48)."""
    return Image.fromarray(np.dstack([np.full((48, 48, 3), 200, np.uint8), alpha.astype(np.uint8)]))


def one_clear_pixel(path):
    alpha = np.full((48, 48), 255)
    alpha[0, 5] = 0
    photograph(alpha).save(path)


def almost_opaque(path):
    photograph(np.full((48, 48), 254)).save(path)


def round_corners(path):
    mask = Image.new("L", (48, 48))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 47, 47), 6, 255)
    photograph(np.asarray(mask)).save(path)


def palette_with_holes(path):
    """The transparent index is a colour of the subject, too, and the ground has another."""
    image = Image.new("P", (48, 48), 0)
    image.putpalette([200, 200, 200, 255, 0, 0, 0, 0, 255])
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), 1)
    image.save(path, transparency=1)


@pytest.mark.parametrize("write", [one_clear_pixel, almost_opaque, round_corners, palette_with_holes])
def test_alpha_that_leaves_no_ground_free_is_no_cutout(tmp_path, write):
    path = tmp_path / "thing.png"
    write(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.getpixel((20, 2)) == (200, 200, 200)
    if write is palette_with_holes:
        assert image.getpixel((24, 24)) == (255, 255, 255)  # on white, as cut-outs are shown
    assert not load_subjects(str(tmp_path))[0].has_cutout


def test_such_a_picture_is_looked_through_for_its_subject(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "frame_subjects", lambda *args: asked.append(args[2]) or [args[3][0]])
    for name, write in (("photo.png", one_clear_pixel), ("cut.png", sprite)):
        write(tmp_path / name)
        open_references([(str(tmp_path / name), "thing")], "subject-driven", noisy_model(), None)
    assert asked == [["thing"]]  # not of the cut-out


def test_alpha_that_does_is_one_in_any_mode(tmp_path):
    disc = Image.open(sprite(tmp_path / "disc.png"))
    disc.convert("LA").save(tmp_path / "grey.png")
    disc.quantize(16).save(tmp_path / "palette.png")
    for name in ("disc.png", "grey.png", "palette.png"):
        assert read_image(tmp_path / name).getchannel("A").getextrema()[0] == 0
    assert [subject.has_cutout for subject in load_subjects(str(tmp_path))] == [True] * 3


def test_a_picture_that_is_clear_all_over_is_named(tmp_path):
    Image.new("RGBA", (9, 9)).save(tmp_path / "clear.png")
    with pytest.raises(BadInput, match="clear.png: .*nothing in it is opaque"):
        read_image(tmp_path / "clear.png")


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("float.tif", RAMP.astype(np.float32)),
        ("float to 255.tif", (RAMP * 255).astype(np.float32)),
        ("16 bits.png", (RAMP * 65535).astype(np.uint16)),
        ("16 bits.tif", (RAMP * 65535).astype(np.uint16)),
        ("32 bits.tif", (RAMP * 255).astype(np.int32)),
        ("32 bits, of 16.tif", (RAMP * 65535).astype(np.int32)),
        ("8 bits.tif", (RAMP * 255).astype(np.uint8)),
    ],
)
def test_pixels_of_any_kind_of_number_become_bytes(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    found = np.asarray(read_image(tmp_path / name))
    assert found.shape == (48, 48, 3) and np.abs(found[..., 0] - RAMP * 255).max() <= 1


def test_pixels_that_have_no_white_are_named_with_their_mode(tmp_path):
    for name, pixels, mode in (
        ("negative.tif", (RAMP * 100 - 50).astype(np.int32), "I"),
        ("nan.tif", np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "F"),
        ("huge.tif", (RAMP * 1e6).astype(np.float32), "F"),
    ):
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(BadInput, match=f"{name}: .*mode {mode} .*save it with 8 bits"):
            read_image(tmp_path / name)


def without_adobe(jpeg):
    """The same without its APP14 segment."""
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]


def test_colours_of_print_are_right_whoever_wrote_them(tmp_path):
    red = Image.new("RGB", (32, 32), (230, 20, 20)).convert("CMYK")
    red.save(tmp_path / "print.tif")
    red.save(tmp_path / "adobe.jpg", quality=95)
    ImageChops.invert(red).save(tmp_path / "inverted.jpg", quality=95)
    plain = without_adobe((tmp_path / "inverted.jpg").read_bytes())
    (tmp_path / "plain.jpg").write_bytes(plain)
    for name in ("print.tif", "adobe.jpg", "plain.jpg"):
        assert np.abs(np.asarray(read_image(tmp_path / name))[9, 9] - (230, 20, 20)).max() < 12, name


def test_black_and_white_is_read_as_it_is_and_lab_as_what_it_means(tmp_path):
    Image.fromarray(RAMP > 0.5).save(tmp_path / "bits.png")
    assert np.asarray(read_image(tmp_path / "bits.png"))[[2, 40], 0, 0].tolist() == [0, 255]
    Image.new("LAB", (9, 9), (255, 128, 128)).save(tmp_path / "white.tif")
    assert min(read_image(tmp_path / "white.tif").getpixel((4, 4))) > 245


@pytest.mark.parametrize("bright", [1, 60, 255])
def test_a_mask_is_cut_at_half_of_its_brightest(tmp_path, bright):
    """Masks of 0 and 1 are as common as those of 0 and 255."""
    image, mask = picture(tmp_path / "a.jpg", size=(40, 40)), np.zeros((40, 40), np.uint8)
    mask[5:15, 10:30] = bright
    Image.fromarray(mask).save(tmp_path / "mask.png")
    subject = Subject("a", "a", "file", str(image), str(tmp_path / "mask.png"))
    assert open_cutout(subject).size == (20, 10)


KNOWN = train.known_text(load_subjects("shapes"), ())


@pytest.mark.parametrize(
    "labels, caption, named",
    [
        (["red blue star"], "a red blue star on the beach", []),
        (["sun"], "a sun, a sunflower", ["'sunflower'"]),
        (["stars"], "two big stars, at the top left, under water", ["'at the top left'", "'two'"]),
        (["hunde"], "", ["'hunde'"]),
        (["sun", "star"], "a sun at the top left and a star in the middle", ["'in the middle'"]),
        ([], "a star on the moon, in the corner", ["'on the moon'", "'in the corner'"]),
        ([], "a dromedary", ["'dromedary'"]),
    ],
)
def test_what_training_never_saw_is_said_in_one_line(capsys, labels, caption, named):
    say_unknown(KNOWN, labels, caption)
    said = capsys.readouterr().err
    assert said.count("\n") == bool(named) and ("on the grass, on the beach" in said) == bool(named)
    assert said.split(" never saw ")[-1].split(", which")[0].split(", ") == (named or [""])


def test_training_says_the_label_of_a_cutout_and_the_caption_of_a_picture(tmp_path):
    for file in (sprite(tmp_path / "owl.png"), picture(tmp_path / "hill.jpg")):
        file.with_suffix(".txt").write_text(f"{file.stem} beside one two three four house")
    words = train.known_text(load_subjects(str(tmp_path)), ())["words"].split()
    assert {"owl", "hill", "four", "house"} - set(words) == set()
    (tmp_path / "hill.jpg").unlink()
    words = train.known_text(load_subjects(str(tmp_path)), ())["words"].split()
    assert {"owl", "beside"} <= set(words) and "house" not in words


def test_training_keeps_the_words_that_it_saw_and_not_those_held_out(trained):
    known = torch.load(trained / "stage2.pt", weights_only=True)["known"]
    assert known == KNOWN and {"star", "beach", "the", "thing"} <= set(known["words"].split())
    held_out = train.known_text(load_subjects("emoji"), ())["words"].split() if data.emoji_font() else []
    assert "ophiuchus" not in held_out  # (a label held out)


def test_of_two_things_the_one_that_the_label_places_is_framed():
    """By the shipped model, which a place tells what to look for."""
    *models, _ = load_models(sample.SHIPPED, torch.device("cpu"))
    scene = Image.new("RGB", (256, 256), (120, 160, 200))
    for recipe, x in (("star red yellow", 0), ("sun purple white", 128)):
        shape = paint_shape(recipe)
        scene.paste(shape, (x, 96), shape)
    left, right = frame_subjects(*models, ["star on the left", "sun on the right"], [np.asarray(scene)] * 2)
    reds = [(np.abs(image.astype(int) - (220, 40, 40)).max(2) < 60).mean() for image in (left, right)]
    assert reds[0] > 0.1 > 0.05 > reds[1], reds
