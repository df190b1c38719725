"""How good is a trained model? The paper's measures, on held-out subjects, run by hand:

    python tests/bench_quality.py --ckpt out/stage2.pt            one table, and a labelled sheet, quality.png
    python tests/bench_quality.py --ckpt out/stage2.pt --sweep    the same as guidance changes, in sweep.png

CP, concept preservation: is the drawn subject the referenced one? The cut-outs of the true subject and of 19
others are laid over the drawn picture, at every place and size that prompts name, mirrored or not, and a 32nd
of the canvas to and fro. Whichever explains most of what stands out from the background is the one that was
drawn. CP is the share of pictures where that is the true subject (chance: .05, more where fewer than 20 are
held out), similarity the share of it that the true subject explains. Hard CP is the same against the 19 whose
outlines are most alike, each brought to the true subject's mean colour and laid into its outline, so that
only what is inside tells. PF, prompt following: the share of the prompt's parts that hold: background
(chance: 1/19), place (1/3) and size (1/2), so by chance .30; the right background without any subject has
.61.

We composed the scenes, so the truth is known and no network has to judge. Five references are scored by the
same code: the true pictures, as they are and through the tokenizer (ceilings), their subjects' outlines
filled with one colour, the mean (what an outline and a hue are worth), the reference handed back as it is (CP
without PF), and the same model without the reference (PF without CP). In the references the subject is large
and in the middle, on whole patches, as in most of training, and on a painted background. "Cut out" is the
same on grey, as sample.py shows a reference with alpha. "Reference anywhere" is .5 to .9 of the canvas and
anywhere, and framed as sample.py does. "Any ground" is one of a kind that training has not
(bench_grounds.py), or with --grounds a part of a photograph.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data import AS_GIVEN, BACKGROUNDS, PLACES, SIZES, compose, fill_prompt, open_cutout, paint_background
from mentor import BadInput
from sample import (Parser, add_device_flag, at_least, draw, frame_subjects, load_models, run_script,
                    save_plot, save_sheet, show_cutout, whole_file)
from tokenizer import to_arrays, to_images
from train import psnr

# -----------------------------------------------------------------------------------------------------------
# What is asked of the model


LOOKS = [(size, place) for size in SIZES for place in PLACES]  # what prompts can ask for
PLACEMENTS = [data.named_placement(*look) for look in LOOKS]


class Case(NamedTuple):
    number: int
    subject: data.Subject
    background: str  # what the prompt names,
    size: str
    place: str
    caption: str  # and in words
    reference: np.ndarray  # (H, W, 3): the subject large and in the middle, on another background
    cutout: np.ndarray  # the same without one, as sample.py shows a reference with alpha
    target: np.ndarray  # what the prompt describes
    scene: np.ndarray  # the subject anywhere: to be copied, and to be cut out
    alone: np.ndarray  # the subject of that scene on black
    mask: np.ndarray  # (H, W), bool


def some_background(words, size, rng):
    """A drawing of these words that no training has shown."""
    return paint_background(words, size, int(rng.integers(data.N_BACKGROUNDS, 10**9)))


def make_cases(subjects, n, image_size, seed):
    """n cases, each a pure function of (seed, index); the subjects take turns."""
    cases, turns = [], np.random.default_rng(seed).permutation(len(subjects))
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        subject, sprite = subjects[turns[i % len(turns)]], open_cutout(subjects[turns[i % len(turns)]])
        here, there, anywhere = rng.choice(list(BACKGROUNDS), 3, replace=False)
        size, place = LOOKS[rng.integers(len(LOOKS))]
        reference = compose(sprite, some_background(there, image_size, rng), AS_GIVEN)[0]
        target = compose(sprite, some_background(here, image_size, rng), data.named_placement(size, place))[0]
        free = data.free_placement(rng)
        scene, alone, _ = compose(sprite, some_background(anywhere, image_size, rng), free)
        pictures = map(np.asarray, (reference, show_cutout(sprite, image_size), target, scene, alone))
        caption = data.write_caption(rng, [(subject.label, size, place)], here)
        cases.append(
            Case(i, subject, here, size, place, caption, *pictures, silhouette(sprite, image_size, free))
        )
    return cases


def silhouette(sprite, image_size, placement):
    """Where a sprite is at least half opaque -> (H, W), bool"""
    white = Image.new("RGBA", sprite.size, "white")
    white.putalpha(sprite.getchannel("A"))
    return np.asarray(compose(white, Image.new("RGB", (image_size, image_size)), placement)[1])[..., 0] >= 128


def flattened(case):
    """The true picture, its subject one patch of its mean colour: (H, W, 3)"""
    placement = data.named_placement(case.size, case.place)
    mask = silhouette(open_cutout(case.subject), len(case.target), placement)
    return np.where(mask[..., None], case.target[mask].mean(0), case.target).astype(np.uint8)


# -----------------------------------------------------------------------------------------------------------
# The judge

N_OTHERS = 19


def templates(subject, image_size, placements=PLACEMENTS):
    """Every way in which a prompt can place the subject -> pixels (n, H, W, 3), 0 outside the mask; masks (n,
    H, W), 0 or 1. They go through the placements in order, with as many shifts and mirrorings each."""
    pixels, masks, black, step = [], [], Image.new("RGB", (image_size, image_size)), image_size // 32
    for placement in placements:
        for sprite in (open_cutout(subject), ImageOps.mirror(open_cutout(subject))):
            alone, mask = np.asarray(compose(sprite, black, placement)[1]), silhouette(
                sprite, image_size, placement
            )
            alone, mask = (
                np.pad(x, ((step, step), (step, step), (0, 0)))
                for x in (alone * mask[..., None], mask[..., None])
            )
            for dy, dx in itertools.product((0, step, 2 * step), repeat=2):
                pixels.append(alone[dy : dy + image_size, dx : dx + image_size])
                masks.append(mask[dy : dy + image_size, dx : dx + image_size, 0])
    return np.stack(pixels).astype(np.float32) / 255, np.stack(masks).astype(np.float32)


def coarse(pictures):
    """(n, H, W, ...) -> (n, 256, ...): means over a grid of 16 x 16"""
    n, H = pictures.shape[:2]
    return pictures.reshape(n, 16, H // 16, 16, H // 16, -1).mean((2, 4)).reshape(n, 256, -1)


def judge(pictures, cases, seed=0):
    """pictures: uint8 (n, H, W, 3), one a case -> dict of arrays (n,): big (as asked), recognised,
    recognised inside, similarity, background, place, size (each as drawn)."""
    n, size = pictures.shape[:2]
    drawn = pictures.astype(np.float32) / 255
    rng = np.random.default_rng(seed)
    words = np.repeat(
        list(BACKGROUNDS), 12
    )  # a dozen drawings of each: their light, horizon and details differ
    drawings = np.stack([np.asarray(some_background(w, size, rng)) for w in words]).astype(np.float32) / 255
    seen = coarse(drawn)
    errors = np.stack(
        [((seen - picture) ** 2).sum(2) for picture in coarse(drawings)], 1
    )  # (n, drawings, 256)
    # First guess: the drawing that fits best at the upper and lower edge, where no subject stands, and where
    # it fits best.
    edge = errors.reshape(n, -1, 16, 16)[:, :, [0, 1, 14, 15]].mean((2, 3))
    fit = (edge + np.partition(errors, 100, 2)[:, :, :100].mean(2)).argmin(1)
    behind = drawings[fit]  # (n, H, W, 3)

    # A template explains: the squared error of the bare background minus that of the template, where the
    # template is. Expanded, that is |background|^2 - 2 picture . background + 2 picture . template -
    # |template|^2: two matrix products.
    total = ((drawn - behind) ** 2).sum((1, 2, 3)) + 1e-6
    bare = (behind**2 - 2 * drawn * behind).sum(3).reshape(n, -1)
    subjects = list(dict.fromkeys(case.subject for case in cases))
    explained, best = np.empty((n, len(subjects))), np.empty((n, len(subjects)), int)
    for j, subject in enumerate(subjects):
        pixels, masks = templates(subject, size)
        gain = bare @ masks.reshape(len(masks), -1).T
        gain += 2 * drawn.reshape(n, -1) @ pixels.reshape(len(masks), -1).T
        gain -= (pixels**2).sum((1, 2, 3))  # (n, templates)
        explained[:, j], best[:, j] = gain.max(1) / total, gain.argmax(1)

    closest = explained.argmax(1)  # size and place count whoever was drawn
    best = best[np.arange(n), closest]
    looks = best * len(LOOKS) // len(masks)  # (n,): which was drawn
    result = {name: np.zeros(n) for name in ("recognised", "similarity", "background", "place", "size")}
    result["big"] = np.array([case.size == "" for case in cases])
    result["recognised inside"] = recognise_inside(drawn, behind, looks, cases, subjects)
    for i, case in enumerate(cases):
        true = subjects.index(case.subject)
        others = other_subjects(subjects, true)
        some = np.random.default_rng([seed, case.number]).choice(
            others, min(N_OTHERS, len(others)), replace=False
        )
        result["recognised"][i] = explained[i, true] > explained[i, some].max()
        result["similarity"][i] = max(0.0, explained[i, true])
        size_drawn, place_drawn = LOOKS[looks[i]]
        result["size"][i], result["place"][i] = size_drawn == case.size, place_drawn == case.place
        _, masks = templates(subjects[closest[i]], size)
        outside = coarse(masks[best[i]][None])[0, :, 0] < 0.25
        result["background"][i] = words[errors[i][:, outside].mean(1).argmin()] == case.background
    return result


def other_subjects(subjects, true):
    """Indices of the rivals; other views of the true subject are none."""
    return [j for j, subject in enumerate(subjects) if subject.name != subjects[true].name]


def outline_likeness(subjects, size):
    """What share of two subjects' outlines, one laid over the other, both fill, mirrored or not -> (subjects,
    subjects)"""
    outlines = np.stack([silhouette(open_cutout(s), size, AS_GIVEN) for s in subjects]).astype(np.float32)
    flat, mirrored = (o.reshape(len(subjects), -1) for o in (outlines, outlines[:, :, ::-1]))
    areas, both = flat.sum(1), np.maximum(flat @ flat.T, flat @ mirrored.T)
    return both / (areas[:, None] + areas - both)


def recognise_inside(drawn, behind, looks, cases, subjects):
    """Whether the inside of the true subject explains a picture better than those of the rivals do whose
    outlines are most alike -> (n,), bool.

    Each rival is shifted to the true subject's mean colour and laid into the true outline, whose mean colour
    shows where the rival does not reach. So all templates of a picture have one outline and one hue. Size and
    place are as drawn (looks: n indices of LOOKS).
    """
    size, alike = drawn.shape[1], outline_likeness(subjects, drawn.shape[1])
    recognised = np.zeros(len(cases), bool)
    for look in np.unique(looks):
        hues, masks, reliefs = [], [], []
        for subject in subjects:
            pixels, mask = templates(
                subject, size, [PLACEMENTS[look]]
            )  # (templates, H, W, 3), (templates, H, W)
            hues.append(pixels.sum((0, 1, 2)) / mask.sum())
            masks.append(mask[..., None])
            reliefs.append((pixels - hues[-1]) * mask[..., None])  # colours less their mean
        for i in np.flatnonzero(looks == look):
            true = subjects.index(cases[i].subject)
            others = np.array(other_subjects(subjects, true))
            hardest = others[alike[true, others].argsort()[::-1][:N_OTHERS]]
            outline = masks[true]
            bare = (outline * (drawn[i] - behind[i]) ** 2).sum((1, 2, 3))  # (templates,)
            error = [
                (outline * (drawn[i] - hues[true] - reliefs[j]) ** 2).sum((1, 2, 3)) for j in (true, *hardest)
            ]
            explained = (bare - np.stack(error)).max(1)  # (1 + rivals,)
            recognised[i] = explained[0] > explained[1:].max()
    return recognised


def summary(result):
    """What the table says of judged pictures."""
    mean = {name: float(result[name].mean()) for name in ("similarity", "background", "place", "size")}
    pf = (mean["background"] + mean["place"] + mean["size"]) / 3
    row = {}
    for name, recognised in (("CP", "recognised"), ("hard CP", "recognised inside")):
        row[name] = float(result[recognised].mean())
        for size, these in (("big", result["big"]), ("small", ~result["big"])):
            row[f"{name} {size}"] = float(result[recognised][these].sum() / max(1, these.sum()))
    return row | {"PF": pf, "CP.PF": row["CP"] * pf, "CP/PF": row["CP"] / max(pf, 1e-9)} | mean


# -----------------------------------------------------------------------------------------------------------
# What the model draws


@torch.no_grad()
def through_tokenizer(tokenizer, pictures, device):
    return to_arrays(tokenizer.decode(tokenizer.encode(to_images(pictures, device))))


def draw_all(model, tokenizer, task, prompts, seed, **guidance):
    """-> uint8 (prompts, H, W, 3), by fifty; the task's own guidance where none is given"""
    parts = [
        draw(model, tokenizer, task, prompts[i : i + 50], seed=seed + i, **guidance)
        for i in range(0, len(prompts), 50)
    ]
    return np.concatenate(parts)


def draw_cases(model, tokenizer, task, cases, references, seed, guidance):
    """One picture a case, uint8 (n, H, W, 3). references: a picture a case, or None: then the prompt loses
    its <image>. guidance: (cfg_image, cfg_text), or None: the task's."""
    prompts = [fill_prompt(task, [case.subject.label], case.caption) for case in cases]
    prompts = (
        [(["".join(p)], []) for p in prompts]
        if references is None
        else [(p, [r]) for p, r in zip(prompts, references)]
    )
    scales = dict(zip(("cfg_image", "cfg_text"), guidance or ()))
    return draw_all(model, tokenizer, task, prompts, seed, **scales)


def framed(model, tokenizer, cases, pictures):
    """Pictures in which the subject stands anywhere, as sample.py would show them to the model."""
    labels = [case.subject.label for case in cases]
    parts = [slice(i, i + 50) for i in range(0, len(cases), 50)]
    return sum((frame_subjects(model, tokenizer, labels[part], pictures[part]) for part in parts), [])


def copying(drawn, cases):
    """Reconstruction -> L2 (root mean square error of a picture's pixels in [0, 1], averaged) and PSNR in
    dB."""
    a, b = (to_images(list(pictures), "cpu") for pictures in (drawn, [case.scene for case in cases]))
    return {"L2": ((a - b) / 2).pow(2).mean((1, 2, 3)).sqrt().mean().item(), "PSNR": psnr(a, b)}


def cutting_out(drawn, cases):
    """Segmentation -> IoU of what is not black with the true mask, and the mean absolute colour error in it,
    in [0, 1]. (Subjects with black parts lose some: see the row of the scenes through the tokenizer.)"""
    mask = np.stack([case.mask for case in cases])
    shown = drawn.max(3) > 40  # black after the tokenizer is not quite 0
    iou = (shown & mask).sum((1, 2)) / (shown | mask).sum((1, 2))
    error = np.abs(drawn.astype(float) - np.stack([case.alone for case in cases])).mean(3) / 255
    return {"IoU": float(iou.mean()), "colour error": float((error * mask).sum() / mask.sum())}


def print_table(rows):
    """rows: name -> dict of figures; in README's form, seven columns at a time, so that lines stay narrow."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    for i in range(0, len(columns), 7):
        some = columns[i:i + 7]
        print("\n" * (i > 0) + "| |", " | ".join(some), "|\n|---|" + "---|" * len(some))
        for name, row in rows.items():
            figures = [f"{row[c]:.{1 if c == 'PSNR' else 3}f}" if c in row else "" for c in some]
            print(f"| {name} |", " | ".join(figure.removeprefix("0") for figure in figures), "|")


IMAGE_SCALES, TEXT_SCALES = (1.0, 2.0, 3.0, 5.0), (1.0, 1.5, 3.0)


def draw_curves(points, path):
    """points: (cfg_image, cfg_text) -> judged pictures. Hard CP and PF over cfg_image; a line a cfg_text,
    with bars of one standard error."""
    inside, follows = {}, {}
    for (cfg_image, cfg_text), judged in points.items():
        parts = (judged["background"] + judged["place"] + judged["size"]) / 3
        for lines, values in ((inside, judged["recognised inside"]), (follows, parts)):
            point = cfg_image, values.mean(), values.std() / len(values) ** 0.5
            lines.setdefault(f"--cfg-text {cfg_text:g}", []).append(point)
    save_plot([("hard CP: how often its inside is recognised", "--cfg-image", inside),
               ("PF: how much of the prompt holds", "--cfg-image", follows)], path)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="out/stage2.pt", help="a trained model (default: out/stage2.pt)")
    parser.add_argument("--data", help="what it was trained on (default: emoji)")
    parser.add_argument("--n", type=at_least(2), default=200, help="pictures a task (default: 200)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument(
        "--sweep", action="store_true", help="subject-driven alone, over a grid of --cfg-image and --cfg-text"
    )
    parser.add_argument("--grounds", metavar="DIR", help="photographs for the rows of any ground")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "-o", "--output", help="the sheet to write (default: quality.png, with --sweep: sweep.png)"
    )
    add_device_flag(parser)
    args = parser.parse_args()
    started, device = time.time(), torch.device(args.device)
    model, tokenizer, _ = load_models(args.ckpt, device)
    size, subjects = model.config.image_size, data.load_subjects(args.data)
    has_cutout, is_held_out = subjects.table["has_cutout"], subjects.table["held_out"]
    held_out, trained = ([subjects[i] for i in np.flatnonzero(has_cutout & (is_held_out == wanted))]
                         for wanted in (True, False))
    if len(held_out) < 2:
        raise BadInput(f"--data {args.data}: fewer than two held-out cut-outs to tell apart")
    cases = make_cases(held_out, args.n, size, args.seed)
    from bench_grounds import on_any_ground

    unseen = on_any_ground(cases, size, args.seed, args.grounds)
    references, scenes = [case.reference for case in cases], [case.scene for case in cases]

    def drawn(task, references, cases=cases, guidance=None):
        return draw_cases(model, tokenizer, task, cases, references, args.seed, guidance)

    if args.sweep:
        grid = [(image, text) for text in TEXT_SCALES for image in IMAGE_SCALES]
        pictures = np.concatenate([drawn("subject-driven", references, guidance=scales) for scales in grid])
        judged = judge(pictures, cases * len(grid))
        parts = [
            {name: values[i * args.n : (i + 1) * args.n] for name, values in judged.items()}
            for i in range(len(grid))
        ]
        rows = {
            f"--cfg-image {image:g} --cfg-text {text:g}": summary(part)
            for (image, text), part in zip(grid, parts)
        }
        path = args.output or "sweep.png"
        draw_curves(dict(zip(grid, parts)), path)
    else:
        known = make_cases(trained, args.n, size, args.seed)
        shown = {
            "true pictures": np.stack([case.target for case in cases]),
            "true pictures through the tokenizer": through_tokenizer(
                tokenizer, [case.target for case in cases], device
            ),
            "true outlines in one colour": np.stack([flattened(case) for case in cases]),
            "copy the reference": np.stack(references),
            "ignore the reference": drawn("subject-driven", None),
            "subject-driven": drawn("subject-driven", references),
            "subject-driven, cut out": drawn("subject-driven", [case.cutout for case in cases]),
            "subject-driven, reference anywhere": drawn(
                "subject-driven", framed(model, tokenizer, cases, scenes)
            ),
            "copy the reference, any ground": np.stack([case.reference for case in unseen]),
            "subject-driven, any ground": drawn("subject-driven", [case.reference for case in unseen]),
            "subject-driven, any ground, anywhere": drawn(
                "subject-driven", framed(model, tokenizer, cases, [case.scene for case in unseen])
            ),
        }
        judged = judge(np.concatenate(list(shown.values())), cases * len(shown))
        rows = {
            name: summary({k: v[i * args.n : (i + 1) * args.n] for k, v in judged.items()})
            for i, name in enumerate(shown)
        }
        shown["text-to-image, known labels"] = drawn("text-to-image", None, known)
        rows["text-to-image, known labels"] = summary(judge(shown["text-to-image, known labels"], known))
        shown["reconstruction"] = drawn("reconstruction", scenes)
        shown["segmentation"] = drawn("segmentation", scenes)
        shown["segmentation, any ground"] = drawn("segmentation", [case.scene for case in unseen])
        seen = through_tokenizer(tokenizer, scenes + [case.alone for case in cases], device)
        copies = {
            "scenes through the tokenizer": copying(seen[: args.n], cases)
            | cutting_out(seen[args.n :], cases),
            "reconstruction": copying(shown["reconstruction"], cases),
            "segmentation": cutting_out(shown["segmentation"], cases),
            "segmentation, any ground": cutting_out(shown["segmentation, any ground"], unseen),
        }
        path, sheet = args.output or "quality.png", []
        for name, pictures in shown.items():
            asked = known if "known" in name else unseen if "any ground" in name else cases
            beside = ["cutout" if name.endswith("cut out") else "reference", "target"]
            beside[0] = "scene" if name.endswith("anywhere") else beside[0]
            if name.startswith(("reconstruction", "segmentation")):
                beside = ["scene"]
            beside = beside[1:] if asked is known else beside
            cells = [
                (
                    case.subject.label if beside == ["scene"] else case.caption,
                    [*(getattr(case, field) for field in beside), picture],
                )
                for case, picture in zip(asked[:8], pictures)
            ]
            sheet.append((f"{name}: {', '.join(beside)}, drawn", cells))
        save_sheet(sheet, path)
    print_table(rows)
    if not args.sweep:
        from bench_several import choosing, in_context, multi_image  # (which judges with what stands above)

        def through(pictures):
            return through_tokenizer(tokenizer, pictures, device)

        tables, common = {"copying": copies}, (args.n, size, args.seed)
        try:
            tables["choosing"] = choosing(model, tokenizer, through, held_out, trained, *common)
            tables["in-context"] = in_context(model, tokenizer, through, held_out, *common)
            tables["several"] = multi_image(model, tokenizer, through, held_out, *common)
        except BadInput as error:  # a model from before these tasks has no room for their prompts
            print(f"{args.ckpt}: no tables of several subjects: {error}", file=sys.stderr)
        for title, table in tables.items():
            print()
            print_table(table)
            rows |= {f"{name} ({title})": row for name, row in table.items()}
    print(
        f"\n{args.n} cases of {len({c.subject.name for c in cases})} held-out subjects, "
        f"seed {args.seed}, {args.ckpt}: "
        f"{time.time() - started:.0f} s, wrote {path}"
    )
    if args.json:
        with whole_file(args.json) as temporary:
            Path(temporary).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    run_script(main)
