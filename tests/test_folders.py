"""Folders as people publish them: each convention, and what is said of what is not read.

Areas of outlines are what pycocotools 2.0.11 counts, columns of metadata what datasets 5.2.0 reads."""

import json
import zlib

import numpy as np
import pytest
from conftest import picture, sprite
from PIL import Image, ImageDraw, ImageOps

import data
import tokenizer
from data import load_subjects, open_cutout
from mentor import BadInput, word_ids, words_of

BOX, SIZE = (24, 20, 71, 59), (96, 80)  # of a red ellipse on a green photograph
AREA = 1500  # pixels of the ellipse
SQUARE = [20, 20, 60, 20, 60, 60, 20, 60]


def photo(path, size=SIZE, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (90, 160, 90))
    ImageDraw.Draw(image).ellipse(BOX, fill=(200, 60, 40))
    image.save(path, **how)
    return path


def mask(path, ground=0, subject=255, edge=None, mode="L", palette=None, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, ground)
    ImageDraw.Draw(image).ellipse(BOX, fill=subject, outline=edge, width=3 if edge else 1)
    if palette:
        image.putpalette(palette)
    image.save(path)


def cutout(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", SIZE)
    ImageDraw.Draw(image).ellipse(BOX, fill=(200, 60, 40, 255))
    image.save(path)
    return path


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))


def lines(path, *records):
    text(path, "".join(json.dumps(record) + "\n" for record in records))


def area(subject):
    return sum(np.asarray(open_cutout(subject).getchannel("A")).flatten() > 127) if subject.has_cutout else 0


def read(folder):
    """-> label: (area of the cut-out, caption, split), the report"""
    subjects = load_subjects(str(folder))
    found = {s.label: (area(s), s.caption, s.split) for s in subjects}
    assert len(found) == len(subjects)
    return found, subjects.report


# -- Masks


@pytest.mark.parametrize("name", ["dog-masklabel.png", "dog_mask.png", "dog-mask.webp", "dog.mask.png"])
def test_a_mask_beside_its_picture(tmp_path, name):
    photo(tmp_path / "dog.jpg")
    mask(tmp_path / name)
    photo(tmp_path / "iron_mask.png")  # a picture: there is no iron.*
    found, _ = read(tmp_path)
    assert found.keys() == {"dog", "iron mask"} and abs(found["dog"][0] - AREA) < 30  # (a lossy mask)


@pytest.mark.parametrize(
    "pictures, masks",
    [
        ("images/dog.jpg", "masks/dog.png"),
        ("images/dog.jpg", "masks/dog_mask.png"),
        ("train/images/dog.jpg", "train/masks/dog.png"),
        ("images/train/dog.jpg", "masks/train/dog.png"),
        ("JPEGImages/dog.jpg", "SegmentationClass/dog.png"),
        ("images/dog.jpg", "annotations/trimaps/dog.png"),
        ("dog.jpg", "masks/dog.png"),
        ("IMAGES/dog.jpg", "MASKS/dog.png"),
        ("train/dog.jpg", "train_masks/dog_mask.png"),  # Carvana
        ("DUTS-TR/DUTS-TR-Image/dog.jpg", "DUTS-TR/DUTS-TR-Mask/dog.png"),
        ("images/dog.jpg", "ground_truth_mask/dog.png"),  # ECSSD
        ("images/dog.jpg", "masks/dog_m01yrx_4f.png"),  # Open Images
        ("JPEGImages/480p/dog/0.jpg", "Annotations/480p/dog/0.png"),  # DAVIS
        ("images/001.dog/0.jpg", "segmentations/001.dog/0.png"),  # CUB
    ],
)
def test_masks_in_a_parallel_folder(tmp_path, pictures, masks):
    photo(tmp_path / pictures)
    mask(tmp_path / masks)
    mask((tmp_path / masks).with_name("lonely.png"))
    subjects = load_subjects(str(tmp_path))
    assert [area(subject) for subject in subjects] == [AREA]
    assert subjects[0].label in ("dog", "duts-tr-image")
    assert subjects[0].split == "train" * ("train" in pictures)
    assert "not read: 1 unused masks" in subjects.report


def test_masks_that_cannot_be_told_apart_are_no_pictures_either(tmp_path):
    """Parts of a mask, several masks of a picture, masks of any name in black and white, and Cityscapes'."""
    photo(tmp_path / "images" / "dog.jpg")
    for name in ("SegmentationClass/dog.png", "SegmentationObject/dog.png"):
        mask(tmp_path / "voc" / name)
    photo(tmp_path / "voc" / "JPEGImages" / "dog.jpg")
    for name in ("masks/dog_0.png", "masks/dog_1.png", "brush/task-1-tag-dog-0.png"):
        mask(tmp_path / name)
    mask(tmp_path / "gtFine" / "aachen" / "dog_gtFine_labelIds.png", 7, 26)
    photo(tmp_path / "ade.jpg")
    mask(tmp_path / "ade_seg.png")
    mask(tmp_path / "ade_parts_1.png")
    subjects = load_subjects(str(tmp_path))
    assert {(s.label, area(s)) for s in subjects} == {("voc", AREA), ("ade", AREA)}
    assert "1 it has several masks: list one for each subject in metadata.jsonl, first images/dog.jpg" in (
        subjects.report)
    assert "1 pure black and white, like a mask" in subjects.report
    assert "3 unused masks" in subjects.report


def test_masks_alone_are_a_class_of_their_own(tmp_path):
    cutout(tmp_path / "masks" / "1.png")
    cutout(tmp_path / "hats" / "1.png")
    assert read(tmp_path)[0].keys() == {"masks", "hats"}


VOC = [0] * 36 + [64, 0, 128] + [0] * 726 + [224, 224, 192]  # the palette of VOC: 12 is a dog, 255 void


@pytest.mark.parametrize(
    "how, value, wanted",
    [
        ({}, None, AREA),
        ({"edge": 128}, None, AREA),  # a soft edge
        ({"subject": 1}, None, AREA),
        ({"ground": 2, "subject": 1, "edge": 3}, None, "1, 2, 3"),  # the trimap of Oxford's pets
        ({"ground": 2, "subject": 1, "edge": 3}, 1, 1132),
        ({"ground": 1, "subject": 2}, None, "1, 2"),
        ({"ground": 255, "subject": 0}, None, "is it inverted?"),
        ({"subject": 0}, None, "nothing in it is opaque"),
        ({"subject": (250, 250, 0), "edge": (120, 0, 0), "mode": "RGB"}, None, "0, 36, 222"),
        ({"ground": 0, "subject": 12, "edge": 255}, None, "0, 12, 255"),  # VOC, its palette lost
        ({"ground": 0, "subject": 12, "edge": 255}, 12, 1132),
        ({"ground": 0, "subject": 12, "edge": 255, "mode": "P", "palette": VOC}, None, 1132),
        ({"ground": 3, "subject": 12, "edge": 255, "mode": "P", "palette": VOC}, 12, 1132),
        ({"ground": 1, "subject": 0, "mode": "P", "palette": [255] * 3 + [0] * 3}, None, AREA),  # white is 0
    ],
)
def test_masks_by_what_they_hold(tmp_path, how, value, wanted):
    photo(tmp_path / "1.png")
    mask(tmp_path / "m.png", **({"ground": (0, 0, 0)} if how.get("mode") == "RGB" else {}) | how)
    cutout(tmp_path / "2.png")
    first = {"file_name": "1.png", "mask": "m.png", "label": "dog", "mask_value": value}
    lines(tmp_path / "metadata.jsonl", first, {"file_name": "2.png", "label": "other"})
    found, report = read(tmp_path)
    if isinstance(wanted, str):
        wanted = f"its levels {wanted} look like numbers of classes" if "," in wanted else wanted
        assert "dog" not in found and wanted in report
    else:
        assert found["dog"][0] == wanted


def test_a_mask_of_another_shape_is_refused_and_one_of_another_size_scaled(tmp_path):
    photo(tmp_path / "dog.jpg", (400, 300))
    mask(tmp_path / "dog_mask.png", size=(300, 400))
    photo(tmp_path / "pig.jpg", (500, 500))
    mask(tmp_path / "pig_mask.png", size=(500, 490))
    photo(tmp_path / "cat.png")
    Image.open(photo(tmp_path / "x.png")).convert("L").point(lambda v: 255 * (v < 110)).resize((48, 40)).save(
        tmp_path / "cat_mask.png"
    )
    found, report = read(tmp_path)
    assert found.keys() == {"cat", "x"} and abs(found["cat"][0] - AREA) < 100
    assert "dog.jpg (400 x 300) and" in report
    assert "dog_mask.png (300 x 400): their proportions differ" in report
    assert "skipped: 2 " in report and "pig" not in found


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_that_exif_turns_turns_its_mask(tmp_path, turn):
    """If the mask is stored as the picture is. Where the shape does not tell, it is refused."""
    exif = Image.Exif()
    exif[0x112] = turn
    photo(tmp_path / "dog.jpg", exif=exif, quality=95)
    mask(tmp_path / "dog_mask.png")
    if turn in (2, 3, 4):
        with pytest.raises(BadInput, match="EXIF rotates the picture, maybe not the mask"):
            load_subjects(str(tmp_path))
        return
    (subject,) = load_subjects(str(tmp_path))
    cut = open_cutout(subject)
    assert cut.size == ((48, 40) if turn == 1 else (40, 48)) and area(subject) == AREA
    assert np.abs(np.asarray(cut)[12:28, 12:28, :3].astype(int) - (200, 60, 40)).max() < 40
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "dog.jpg"))
    upright = ImageOps.exif_transpose(upright).convert("L").point(lambda v: 255 * (v < 120))
    upright.save(tmp_path / "dog_mask.png")
    assert abs(area(load_subjects(str(tmp_path))[0]) - AREA) < 40  # a mask of what is seen


# -- Metadata


@pytest.mark.parametrize("mark", ",\t;")
def test_metadata_csv(tmp_path, mark):
    photo(tmp_path / "1.png")
    rows = (("file_name", "text", "label", "author"), ("1.png", '"a dog, seen; from\tbehind"', "dog", "me"))
    text(tmp_path / "metadata.csv", "\r\n".join(mark.join(row) for row in rows) + "\r\n\r\n", "utf-8-sig")
    found, report = read(tmp_path)
    assert found == {"dog": (0, "a dog, seen; from behind", "")}
    assert "not read: 1 values of 'author'" in report and "labels from: 1 metadata" in report


@pytest.mark.parametrize(
    "record",
    [
        {"file_name": "1.png", "mask_file_name": "m.png", "label": "dog"},
        {"image": "1.png", "mask": "m.png", "caption": "A dog."},
        {"file": "1.png", "mask": "m.png", "text": "dog", "caption": "a cat"},
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_metadata_by_other_names(tmp_path, record, ending):
    photo(tmp_path / "1.png")
    mask(tmp_path / "m.png")
    text(tmp_path / f"metadata.{ending}", json.dumps([record] if ending == "json" else record))
    assert {label: cut for label, (cut, _, _) in read(tmp_path)[0].items()} == {"dog": AREA}


def test_the_nearest_metadata_describes_a_picture_and_folders_are_splits(tmp_path):
    for split, name in (("train", "dog"), ("valid", "cat"), ("dev", "owl")):
        cutout(tmp_path / split / "1.png")
        lines(tmp_path / split / "metadata.jsonl", {"file_name": "1.png", "label": name})
    cutout(tmp_path / "train" / "deep" / "2.png")
    cutout(tmp_path / "train" / "3.png")
    above = ({"file_name": f"train/{name}", "label": name} for name in ("1.png", "deep/2.png"))
    lines(tmp_path / "metadata.jsonl", *above)
    found, report = read(tmp_path)
    assert {label: split for label, (_, _, split) in found.items()} == {
        "dog": "train",
        "cat": "test",
        "owl": "test",
        "deep/2.png": "train",
    }
    assert "1 records of pictures that are described elsewhere" in report
    assert "1 pictures that the metadata does not name" in report and "2 held out" in report


@pytest.mark.parametrize(
    "name, content, error",
    [
        ("metadata.jsonl", '{"file_name": "1.png"}\n{"path": "1.png", "x": 2}', "line 2: .*found are path, x "
         ".*wanted are file_name or filename or image or file, text or"),
        ("metadata.jsonl", '{"file_name": "1.png"}\n\n{"file', "line 3: not JSON"),
        ("metadata.jsonl", '["1.png"]', "line 1: no record with keys: "),
        ("metadata.jsonl", '{"file_name": "1.png", "mask_value": "dog"}', "line 1: \"mask_value\" is 'dog'"),
        ("metadata.jsonl", '{"file_name": {"path": "1.png"}}', "line 1: \"file_name\" is {"),
        ("metadata.json", '{"1.png": "dog"}', "record 1: .*keys found are 1.png"),
        ("metadata.json", "5", "record 1: no record with keys: 5"),
        ("metadata.jsonl", "[" * 100_000, "line 1: maximum recursion"),
        ("metadata.jsonl", "\n\n", "no record in it"),
        ("metadata.jsonl", '{"file_name": "1.png", "label": ["a"]}', "line 1: \"label\" is \\['a'\\]: write"),
        ("metadata.csv", "file_name,text\n", "no record in it"),
        ("metadata.csv", 'file_name,text\n1.png,"a dog\n2.png,an owl\n', "line 1: unexpected end of data"),
        ("metadata.csv", "file_name,text,text\n1.png,a dog,a cat", "two columns have the same name"),
        ("c.json", '{"images": [], "categories": [], "annotations": [{"image_id": 9}]}', "annotation 1: Key"),
        ("metadata.csv", "file_name,text\n1.png,a dog, behind", "line 2: more values than columns: put"),
        ("metadata.csv", "name,text\n1.png,dog", "line 2: .*found are name, text"),
        ("metadata.csv", "file_name,text\n1.png,\0dog", "metadata.csv: has zero bytes"),
        ("x.json", '{"images": 1, "annotations": [], "categories": []}', "x.json: no COCO instances"),
    ],
)
def test_metadata_that_cannot_be_used_is_an_error(tmp_path, name, content, error):
    cutout(tmp_path / "1.png")
    text(tmp_path / name, content)
    with pytest.raises(BadInput, match=error):
        load_subjects(str(tmp_path))


def test_each_file_of_metadata_has_subjects_of_its_own(tmp_path):
    """Both splits count their subjects from 0. They are not views of one another."""
    for split in ("train", "test"):
        for i in range(2):
            cutout(tmp_path / split / f"{i}.png")
        records = [{"file_name": f"{i}.png", "subject_id": i} for i in range(2)]
        lines(tmp_path / split / "metadata.jsonl", *records)
    report = load_subjects(str(tmp_path)).report
    assert "4 subjects" in report and "0 pairs" in report and "2 held out" in report


def test_links_to_nowhere_and_long_names_stop_nothing(tmp_path):
    cutout(tmp_path / "1.png")
    (tmp_path / "x.json").symlink_to(tmp_path / "nowhere.json")
    assert read(tmp_path)[0].keys() == {"1"}
    with pytest.raises(BadInput, match="no such folder"):
        load_subjects("x" * 5000)
    (tmp_path / "metadata.csv").symlink_to(tmp_path / "nowhere.csv")
    with pytest.raises(BadInput, match="metadata.csv, line 0: .*No such file"):
        load_subjects(str(tmp_path))


# -- COCO


def run_lengths(pixels):
    """A mask (H, W) as COCO's run lengths, columns first."""
    ends = np.flatnonzero(np.diff(pixels.T.flatten())) + 1  # (the first and the last pixel are outside)
    return np.diff([0, *ends, pixels.size]).tolist()


RECTANGLE = np.zeros((80, 96), np.int8)
RECTANGLE[30:50, 70:80] = 1


def coco(path, images, things):
    names = {"dog": 1, "cat": 2}
    things = [
        {"id": i, "image_id": 7, "category_id": names[name], "segmentation": outline, **more}
        for i, (name, outline, more) in enumerate(things)
    ]
    images = [{"id": 7, "file_name": name, "width": 96, "height": 80} for name in images]
    categories = [{"id": i, "name": name} for name, i in names.items()]
    text(path, json.dumps({"images": images, "annotations": things, "categories": categories}))



def test_coco_instances_of_polygons_and_run_lengths(tmp_path):
    photo(tmp_path / "images" / "1.jpg")
    two = [SQUARE, [62, 62, 70, 62, 70, 70, 62, 70]]
    cat = {"size": [80, 96], "counts": run_lengths(RECTANGLE)}
    things = [("dog", two, {}), ("cat", cat, {"iscrowd": 1}), ("cat", [], {}), ("dog", [[1, 2, 3, 4]], {})]
    coco(tmp_path / "annotations" / "instances_default.json", ["1.jpg"], things)
    coco(tmp_path / "annotations" / "owls.json", ["1.jpg"], [("dog", [SQUARE], {})])  # a file for each class
    assert "3 subjects" in load_subjects(str(tmp_path)).report
    (tmp_path / "annotations" / "owls.json").unlink()
    found, report = read(tmp_path)
    assert {label: cut for label, (cut, _, _) in found.items()} == {"dog": 1664, "cat": 200}
    assert "2 things without an outline" in report and "used although marked: 1 iscrowd" in report
    assert "labels from: 2 COCO" in report


@pytest.mark.parametrize(
    "photograph, file",
    [
        ("1.jpg", "_annotations.coco.json"),  # Roboflow
        ("images/train/1.jpg", "annotations/instances_train.json"),  # datumaro, CVAT
        ("val2017/1.jpg", "annotations/instances_val2017.json"),  # COCO itself
        ("data/1.jpg", "labels.json"),  # FiftyOne
    ],
)
def test_photographs_of_coco_are_found(tmp_path, photograph, file):
    photo(tmp_path / photograph)
    coco(tmp_path / file, ["1.jpg"], [("dog", [SQUARE], {})])
    split = "train" if "train" in photograph else "test" if "val" in photograph else ""
    assert read(tmp_path)[0] == {"dog": (1600, "dog", split)}


@pytest.mark.parametrize(
    "outline",
    [
        {"size": [80, 96], "counts": [100, 20]},
        {"size": [80, 96], "counts": [100, -5, 7585]},
        {"size": [80, 96], "counts": [100.5, 500, 7079.5]},
        {"size": [80, 96], "counts": "zzz~~"},
        {"size": [80, 96], "counts": None},
        {"size": [80, 96], "counts": [7680]},
        {"size": [80, 96]},
        {"size": [80000, 96000], "counts": [1]},
        {"size": None, "counts": [1]},
        [[10, 10, 50, 10, 50, 50, 20]],
        [["10", "10", "50", "10", "50", "50"]],
        [[None] * 6],
        [[float("nan")] * 6],
        [[400, 10, 500, 10, 500, 50]],
        [[0, 0, 0.5, 0, 0.5, 0.5]],
        [[0, 0, 96, 0, 96, 80, 0, 80]],
        "abc",
        5,
    ],
)
def test_outlines_that_are_none_are_skipped_when_the_folder_is_read(tmp_path, outline):
    photo(tmp_path / "1.jpg")
    coco(tmp_path / "c.json", ["1.jpg"], [("dog", outline, {}), ("cat", [SQUARE], {})])
    found, report = read(tmp_path)
    assert found.keys() == {"cat"} and "skipped 1 files" in report and "its outline cannot be used" in report


def test_a_subset_of_coco_is_a_split_and_things_of_one_id_are_several(tmp_path):
    photo(tmp_path / "images" / "1.jpg")
    things = [("dog", [SQUARE], {"id": 1}), ("cat", [SQUARE], {"id": 1})]
    coco(tmp_path / "annotations" / "instances_val.json", ["1.jpg"], things)
    subjects = load_subjects(str(tmp_path))
    assert [s.split for s in subjects] == ["test"] * 2 and "2 subjects" in subjects.report


def test_things_of_one_photograph_are_held_out_together(tmp_path):
    for i in range(60):
        photo(tmp_path / f"{i}.jpg")
        coco(tmp_path / f"{i}.json", [f"{i}.jpg"], [("dog", [SQUARE], {}), ("cat", [SQUARE], {})])
    subjects = load_subjects(str(tmp_path))
    held_out = {(s.path, bool(out)) for s, out in zip(subjects, subjects.table["held_out"])}
    assert len(subjects) == 120 and len(held_out) == 60 and 1 < sum(out for _, out in held_out) < 15


def test_photographs_of_coco_are_no_pictures_of_their_own(tmp_path):
    photo(tmp_path / "1.jpg")
    coco(tmp_path / "boxes.json", ["1.jpg"], [("dog", None, {"bbox": [1, 2, 3, 4]})])
    with pytest.raises(BadInput, match="not one usable image in it; not read: 1 things without an outline"):
        load_subjects(str(tmp_path))


@pytest.mark.parametrize("polygons", [[SQUARE, [30, 30, 31, 30]], [[30, 30, 31, 30], SQUARE]])
def test_leftovers_of_an_outline_are_dropped_wherever_they_stand(tmp_path, polygons):
    """pycocotools 2.0.11 counts 1600 in the first order and raises in the second."""
    photo(tmp_path / "1.jpg")
    coco(tmp_path / "c.json", ["1.jpg"], [("dog", polygons, {})])
    assert read(tmp_path)[0]["dog"][0] == 1600


@pytest.mark.parametrize("polygon, wanted", [([10, 10, 20, 10, 20, 20, 10, 20], 100), (SQUARE, 1600)])
def test_a_polygon_is_as_large_as_its_corners_say(polygon, wanted):
    """Pillow, asked to draw it as it is, draws the rim as well: 121 pixels."""
    mask = tokenizer.draw_outline({"size": (80, 96), "polygons": [polygon]})
    assert np.asarray(mask).sum() / 255 == wanted


def test_compressed_run_lengths():
    """As pycocotools 2.0.11 compresses the rectangle, and another mask, with numbers as differences."""
    assert tokenizer.decompress_counts(r"n_5d0l100000000000000000RW1") == run_lengths(RECTANGLE)
    stripes = np.zeros((80, 96), np.int8)
    stripes[10:20, 5:90:7] = stripes[40:44, 33:37] = 1
    outline = {"size": (80, 96), "counts": "j<:Va00000000^_OJh100000b66X80000000000000F"}
    assert tokenizer.decompress_counts(outline["counts"]) == run_lengths(stripes)
    assert np.array_equal(np.asarray(tokenizer.draw_outline(outline)) > 0, stripes > 0)


def test_a_photograph_of_several_things_is_decoded_once(tmp_path, monkeypatch):
    photo(tmp_path / "1.jpg")
    things = [("dog", [SQUARE], {}), ("cat", {"size": [80, 96], "counts": run_lengths(RECTANGLE)}, {})]
    coco(tmp_path / "c.json", ["1.jpg"], things)
    subjects, decoded, transpose = load_subjects(str(tmp_path)), [], ImageOps.exif_transpose
    monkeypatch.setattr(
        tokenizer.ImageOps, "exif_transpose", lambda image: decoded.append(image.mode) or transpose(image)
    )
    tokenizer.read_once.cache_clear()
    assert [area(subject) for subject in subjects] == [1600, 200] and decoded.count("RGB") == 1


# -- Names


@pytest.mark.parametrize(
    "path, label, split",
    [
        ("10_sks dog/1.png", "sks dog", ""),  # kohya
        ("n02085620-Chihuahua/1.png", "chihuahua", ""),  # ImageNet
        ("train/dog/1.png", "dog", "train"),
        ("training/dog/1.png", "dog", "train"),
        ("test_set/dog/1.png", "dog", "test"),
        ("dog/val/1.png", "dog", "test"),
        ("dog/images/1.png", "dog", ""),
        ("eval/owl.png", "owl", "test"),
        ("2 cats/1.png", "2 cats", ""),
        ("test tube/1.png", "test tube", ""),  # (to datasets 5.2.0 it is a split)
    ],
)
def test_labels_and_splits_by_folders(tmp_path, path, label, split):
    cutout(tmp_path / path)
    subjects = load_subjects(str(tmp_path))
    assert [(s.label, s.split) for s in subjects] == [(label, split)]
    assert subjects.table["held_out"].tolist() == [split == "test" or not split and data.is_held_out(
        subjects[0], by_label=False)]


@pytest.mark.parametrize("name, beside", [("a.png", "a.caption"), ("b.png", "b.png.txt"), ("C.PNG", "C.TXT")])
def test_text_files_beside(tmp_path, name, beside):
    cutout(tmp_path / name)
    text(tmp_path / beside, "A snowy owl, at night")
    text(tmp_path / "readme.txt", "of nothing")
    found, report = read(tmp_path)
    assert found == {"snowy owl": (AREA, "a snowy owl, at night", "")}
    assert "labels from: 1 text files" in report and "not read: 1 .txt" in report


@pytest.mark.parametrize(
    "content, encoding, label",
    [
        ("the dog\N{RIGHT SINGLE QUOTATION MARK}s toy", "cp1252", "dog\N{RIGHT SINGLE QUOTATION MARK}s toy"),
        ("owl", "utf-8-sig", "owl"),
        ("A dumper. It carries its load behind the driver.\nes.utf8=Un volquete.", "utf-8", "dumper"),
        ("a cafe\u0301", "utf-8", "caf\u00e9"),
        ("owl", "utf-16", "has zero bytes"),
        ("0 0.5 0.5 0.2 0.3\n", "utf-8", "holds boxes, not words"),
        ("0 0.512345 0.498765 0.401234 0.398765 0.2 1e-05", "utf-8", "holds boxes, not words"),
        ("cat,0.5,0.5,0.4,-0.39", "utf-8", "holds boxes, not words"),
        ("1" * 3000 + " cats", "utf-8", "1" * 3000 + " cats"),
    ],
)
def test_texts_as_they_are_written(tmp_path, content, encoding, label):
    cutout(tmp_path / "1.png")
    cutout(tmp_path / "other.png")
    text(tmp_path / "1.txt", content, encoding)
    found, report = read(tmp_path)
    assert label in found or label in report
    if label == "dumper":
        assert found[label][1] == "a dumper. it carries its load behind the driver"


def test_hidden_names_are_passed_over_silently(tmp_path):
    cutout(tmp_path / "dog" / "1.png")
    cutout(tmp_path / ".ipynb_checkpoints" / "dog-checkpoint.png")
    for name in ("dog/._1.png", "__MACOSX/dog/._1.png", ".DS_Store"):
        text(tmp_path / name, "junk")
    found, report = read(tmp_path)
    assert found.keys() == {"dog"} and "not read" not in report and "skipped 0 files" in report


def test_every_ending_that_pillow_opens_and_one_line_for_what_it_does_not(tmp_path):
    endings = ("png", "avif", "jfif", "jp2", "tga", "jpe", "ppm", "ico", "qoi")
    for ending in endings:
        photo(tmp_path / f"{ending}.{ending}")
    Image.open(tmp_path / "jpe.jpe").save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[
        Image.new("RGB", SIZE)])
    for name in ("4.heic", "5.jxl", "metadata.parquet", "notes"):
        text(tmp_path / name, "junk")
    found, report = read(tmp_path)
    assert found.keys() == {*endings, "phone"}
    line = "not read: 1 .heic, 1 .jxl, 1 metadata.parquet, 1 notes (convert pictures to PNG, "
    assert line in report.splitlines()[1]


def test_postscript_is_never_opened_whatever_its_name(tmp_path):
    cutout(tmp_path / "dog.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "owl.eps")
    (tmp_path / "owl.eps").rename(tmp_path / "owl.png")
    found, report = read(tmp_path)
    assert found.keys() == {"dog"} and "not a readable image (cannot identify image file)" in report


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path):
    cutout(tmp_path / "mine" / "dog.png")
    cutout(tmp_path / "outside" / "secret.png")
    (tmp_path / "mine" / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (tmp_path / "mine" / "again.png").symlink_to(tmp_path / "mine" / "dog.png")
    (tmp_path / "mine" / "folder").symlink_to(tmp_path / "outside")
    found, report = read(tmp_path / "mine")
    assert found.keys() == {"dog", "again"}
    assert "1 a link that leads out of the folder (copy the file), first link.png" in report
    assert "1 links to folders" in report
    lines(tmp_path / "mine" / "metadata.jsonl", {"file_name": "folder/secret.png"}, {"file_name": "dog.png"})
    assert read(tmp_path / "mine")[0].keys() == {"dog"}


def test_what_is_said_cannot_reach_the_terminal(tmp_path):
    cutout(tmp_path / "1.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "1.png", "label": "\x1b[2Jdog\x07"})
    report = load_subjects(str(tmp_path)).report
    shown = tokenizer.printable(report)
    assert "\x1b" in report and shown.count("?") == 2 and "\n" in shown


# -- Views, words, fonts, sizes


def test_one_label_of_a_subject_decides_for_its_views(tmp_path):
    views = [(s, f"side {v} of toy {s}") for s in range(300) for v in range(4)]
    records = [{"file_name": "1.png", "subject_id": s, "text": words} for s, words in views]
    cutout(tmp_path / "1.png")
    lines(tmp_path / "metadata.jsonl", *records)
    subjects = load_subjects(str(tmp_path))
    by_subject = subjects.table["held_out"].reshape(300, 4)
    assert (by_subject.all(1) == by_subject.any(1)).all() and 0.06 < by_subject.mean() < 0.14
    assert by_subject[:, 0].tolist() == [
        zlib.crc32(b"side 0 of toy %d" % s) % 10 == 0 for s in range(300)
    ]


def test_a_word_that_is_not_unicode_has_indices_too():
    assert word_ids("dog\udcff") != word_ids("dog")


@pytest.mark.parametrize("word", ["हिन्दी", "ภาษาไทย", "বাংলা", "cafe\u0301", "می\u200cخواهم"])
def test_marks_and_joiners_belong_to_words(word):
    assert len(words_of(f"a {word}, b")) == 4
    assert words_of("cafe\u0301") == words_of("caf\u00e9")


def test_things_whose_name_has_a_word_of_signs_are_emoji_too():
    for char, label in (
        ("👍", "thumbs up sign"),
        ("🍥", "fish cake with swirl design"),
        ("❤", "heavy black heart"),
        ("🌕", "full moon symbol"),
        ("🔖", "bookmark"),
        ("🏹", "bow and arrow"),
        ("🖱", "three button mouse"),
        ("💵", "banknote with dollar sign"),
        ("😄", "smiling face open mouth smiling"),
        ("🙈", "see no evil monkey"),
        ("🐶", "dog face"),
        ("➡", ""),
        ("🕐", ""),
        ("🔣", ""),
        ("❓", ""),
    ):
        assert data.emoji_label(char) == label


def test_a_font_that_pillow_draws_blank_is_named_and_not_used(tmp_path, monkeypatch, capsys):
    fonts = [path for path in tokenizer.EMOJI_FONTS if tokenizer.os.path.exists(path)]
    path = fonts[0] if fonts else str(picture(tmp_path / "no font.ttf", format="PNG"))
    monkeypatch.setattr(tokenizer, "EMOJI_FONTS", {path: 109})
    monkeypatch.setattr(tokenizer, "paint_emoji", lambda char, font: Image.new("RGBA", (9, 9)))
    assert tokenizer.emoji_font.__wrapped__() is None
    assert f"{path}: pillow cannot draw this font" in capsys.readouterr().err


def test_photographs_of_phones_and_what_cannot_be_shrunk(tmp_path):
    Image.new("RGB", (12000, 9000), (200, 60, 40)).save(tmp_path / "phone.jpg")  # 108 megapixels
    Image.new("1", (12000, 9000)).save(tmp_path / "plan.png")
    found, report = read(tmp_path)
    assert found.keys() == {"phone"} and "(12000 x 9000 pixels: the limit is 89 million)" in report
    square = np.asarray(tokenizer.open_square(tmp_path / "phone.jpg", 64)).astype(int)
    assert np.abs(square - (200, 60, 40)).max() < 9
    with pytest.raises(BadInput, match="12000 x 9000"):
        tokenizer.read_image(tmp_path / "plan.png")


def test_photographs_are_decoded_once_and_kept_small(tmp_path):
    photo(tmp_path / "1.png", (1600, 1200))
    tokenizer.open_shrunk.cache_clear()
    for i in range(5):
        tokenizer.open_square(tmp_path / "1.png", 32, np.random.default_rng(i))
    info = tokenizer.open_shrunk.cache_info()
    assert info.misses == 1 and info.hits == 4 and info.maxsize == 1000
    kept = tokenizer.open_shrunk(tmp_path / "1.png", 32)
    assert kept.width * kept.height <= 1.02 * (4 * 32) ** 2


def test_the_report_says_what_was_understood(tmp_path):
    for name, n in (("dog", 3), ("cat", 2), ("owl", 1)):
        for i in range(n):
            sprite(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "broken.png").write_text("junk")
    report = load_subjects(str(tmp_path)).report
    assert 'labels: 3 "dog", 2 "cat", 1 "owl"' in report and "labels from: 6 folders" in report
    assert "skipped: 1 not a readable image (cannot identify image file), first cat/broken.png" in report
