"""How good is a trained model at more than one subject? The tables that bench_quality.py prints last:

    a label that chooses     scenes of two to four, of which one is asked for; chance: one in as many
    several references       two, three or four in one picture, each judged where the words put it
    an example               which operation explains what was drawn, and whose subject

As there, we composed the scenes, so the truth is known, and the truth itself is scored by the same code.
"""

import functools
from typing import NamedTuple

import numpy as np

import data
from bench_quality import (N_OTHERS, draw_all, other_subjects, outline_likeness, some_background,
                           templates)
from data import AS_GIVEN, BACKGROUNDS, HUE_TURNS, OPERATIONS, compose, fill_prompt, open_cutout, operate


class Scene(NamedTuple):
    """Two to four subjects in one picture."""
    subjects: list       # data.Subject each
    places: list         # in words
    placements: list
    background: str
    caption: str
    picture: np.ndarray  # uint8 (H, W, 3)
    alone: np.ndarray    # uint8 (subjects, H, W, 3): each on black
    masks: np.ndarray    # bool (subjects, H, W): where each is at least half opaque
    references: list     # uint8 (H, W, 3): each large, in the middle, on another background


def make_scenes(subjects, n, size, seed, count=None):
    """n scenes, each a pure function of (seed, index). count: of the subjects in each; None: two to four."""
    scenes = []
    for i in range(n):
        rng = np.random.default_rng([seed, count or 0, i])
        chosen, labels = [], set()
        for j in rng.permutation(len(subjects)):
            if len(chosen) < (count or 2 + i % 3) and subjects[j].label not in labels:
                chosen.append(subjects[j])
                labels.add(subjects[j].label)
        here, there = (str(words) for words in rng.choice(list(BACKGROUNDS), 2, replace=False))
        looks = data.choose_placements(rng, len(chosen))
        picture, alone, masks, references = some_background(here, size, rng), [], [], []
        for subject, (placement, _, _) in zip(chosen, looks):
            picture, on_black, mask = compose(open_cutout(subject), picture, placement)
            alone.append(np.asarray(on_black))
            masks.append(np.asarray(mask) >= 128)
            behind = some_background(there, size, rng)
            references.append(np.asarray(compose(open_cutout(subject), behind, AS_GIVEN)[0]))
        things = [(subject.label, None, place) for subject, (_, _, place) in zip(chosen, looks)]
        caption = data.write_caption(rng, things, here, " <image>")
        placements, _, places = zip(*looks)
        scenes.append(Scene(chosen, places, placements, here, caption, np.asarray(picture), np.stack(alone),
                            np.stack(masks), references))
    return scenes


# ---- A label that chooses ---------------------------------------------------------------------------------

def asked(scene, by):
    """The first subject of the scene, in words."""
    name = "thing" if by == "place" else scene.subjects[0].label
    return name if by == "label" else f"{name} {scene.places[0]}"


def chosen(drawn, scenes):
    """Cut-outs of each scene's first subject, uint8 (n, H, W, 3) -> how often it is the one of the scene that
    explains the picture best, and the IoU with it."""
    right, iou = [], []
    for picture, scene in zip(drawn.astype(float), scenes):
        errors = ((picture - scene.alone) ** 2).sum((1, 2, 3))  # (subjects,)
        shown = picture.max(2) > 40
        right.append(errors.argmin() == 0 and shown.any())
        iou.append((shown & scene.masks[0]).sum() / (shown | scene.masks[0]).sum())
    return {"chosen": float(np.mean(right)), "IoU": float(np.mean(iou))}


def choosing(model, tokenizer, through, held_out, trained, n, size, seed):
    """-> rows of the first table. through: pictures -> the same through the tokenizer"""
    new, known = (make_scenes(subjects, n, size, seed) for subjects in (held_out, trained))
    rows = {"chance": {"chosen": float(np.mean([1 / len(scene.subjects) for scene in new]))},
            "the truth through the tokenizer": chosen(through([scene.alone[0] for scene in new]), new)}
    for name, by, scenes in (("by place", "place", new), ("by label and place", "both", new),
                             ("by label, trained", "label", known), ("by label, held out", "label", new)):
        prompts = [(fill_prompt("segmentation", [asked(s, by)]), [s.picture]) for s in scenes]
        rows[name] = chosen(draw_all(model, tokenizer, "segmentation", prompts, seed), scenes)
    return rows


# ---- Several references -----------------------------------------------------------------------------------

def explained(picture, behind, pixels, masks):
    """How much of what differs from the background the best of the templates explains: picture and behind (H,
    W, 3), pixels (templates, H, W, 3), masks (templates, H, W) -> float"""
    bare = ((picture - behind) ** 2).sum(2)  # (H, W)
    left = ((picture - pixels) ** 2).sum(3)  # (templates, H, W)
    return ((bare - left) * masks).sum((1, 2)).max()


def behind_subjects(picture, scene, drawings, words):
    """The drawn background that fits best where no subject of the scene stands -> its words, the drawing"""
    free = ~scene.masks.any(0)  # (H, W)
    errors = ((drawings[:, free] - picture[free]) ** 2).mean((1, 2))  # (drawings,)
    return words[errors.argmin()], drawings[errors.argmin()]


def window(placement, size):
    """The rows and columns of a placement's box, and a 32nd of the canvas around it."""
    side, edge = placement.side * size, size // 32
    x, y = (round(share * (size - side)) for share in (placement.x, placement.y))
    return tuple(slice(max(0, start - edge), round(start + side) + edge) for start in (y, x))


def judge_several(drawn, scenes, subjects, seed):
    """Pictures of several subjects, uint8 (n, H, W, 3) -> how often each of the scene's subjects explains its
    place better than 19 others (CP), than 19 others in its outline and mean colour (hard CP), and than the
    others of the scene (right place); how often the background is the right one."""
    rng, size = np.random.default_rng(seed), drawn.shape[1]
    words = np.repeat(list(BACKGROUNDS), 12)
    drawings = np.stack([np.asarray(some_background(w, size, rng)) for w in words]) / np.float32(255)
    alike = outline_likeness(subjects, size)
    hits = {"CP": [], "hard CP": [], "right place": [], "background": []}

    @functools.cache
    def at(subject, placement):
        rows, columns = window(placement, size)
        pixels, masks = templates(subject, size, [placement])
        return pixels[:, rows, columns], masks[:, rows, columns]

    for i, (picture, scene) in enumerate(zip(drawn / np.float32(255), scenes)):
        background, behind = behind_subjects(picture, scene, drawings, words)
        hits["background"].append(background == scene.background)
        for subject, placement in zip(scene.subjects, scene.placements):
            here, there = picture[window(placement, size)], behind[window(placement, size)]
            own, (pixels, masks) = explained(here, there, *at(subject, placement)), at(subject, placement)
            true = subjects.index(subject)
            others = np.array(other_subjects(subjects, true))
            some = np.random.default_rng([seed, i]).permutation(others)[:N_OTHERS]
            hits["CP"].append(own > max(explained(here, there, *at(subjects[j], placement)) for j in some))
            best = max(explained(here, there, *at(other, placement)) for other in scene.subjects)
            hits["right place"].append(own == best and own > 0)
            hue, inside = mean_colour(pixels, masks), []
            for j in others[alike[true, others].argsort()[::-1][:N_OTHERS]]:
                rival, covered = at(subjects[j], placement)
                relief = (rival - mean_colour(rival, covered)) * covered[..., None]
                inside.append(explained(here, there, (hue + relief) * masks[..., None], masks))
            hits["hard CP"].append(own > max(inside))
    return {name: float(np.mean(values)) for name, values in hits.items()}


def mean_colour(pixels, masks):
    return pixels.sum((0, 1, 2)) / masks.sum()


def multi_image(model, tokenizer, through, held_out, n, size, seed):
    """-> rows of the second table"""
    rows = {}
    for count in (2, 3, 4):
        scenes = make_scenes(held_out, n, size, seed, count)
        prompts = [fill_prompt("multi-image", caption=scene.caption) for scene in scenes]
        blind = [(["".join(pieces)], []) for pieces in prompts]
        seeing = [(pieces, scene.references) for pieces, scene in zip(prompts, scenes)]
        shown = {f"{count}, the truth through the tokenizer": through([scene.picture for scene in scenes]),
                 f"{count}, references ignored": draw_all(model, tokenizer, "multi-image", blind, seed),
                 f"**{count} references**": draw_all(model, tokenizer, "multi-image", seeing, seed)}
        for name, drawn in shown.items():
            rows[name] = judge_several(drawn, scenes, held_out, seed)
    return rows


# ---- An example -------------------------------------------------------------------------------------------

class Query(NamedTuple):
    operation: str
    example: list        # uint8 (H, W, 3): before, after
    picture: np.ndarray  # uint8 (H, W, 3)
    answers: dict        # operation -> what it makes of the picture, uint8 (H, W, 3)
    rivals: np.ndarray   # (19, H, W, 3): the right answer with other subjects


def make_queries(subjects, n, size, seed):
    """n queries, each a pure function of (seed, index); the operations take turns."""
    queries = []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        operation, turn = list(OPERATIONS)[i % len(OPERATIONS)], int(rng.choice(HUE_TURNS))
        chosen = [subjects[j] for j in rng.permutation(len(subjects))[:21]]
        words = rng.choice(list(BACKGROUNDS), 3, replace=False)
        behind, *grounds = (some_background(str(w), size, rng) for w in words)
        looks = [data.choose_placements(rng, 1)[0][0] for _ in range(2)]

        def answer(subject, ground, look, operation, behind=behind, turn=turn):
            scene, alone, mask = map(np.asarray, compose(open_cutout(subject), ground, look))
            return scene, operate(operation, scene, alone, mask, np.asarray(behind), turn)

        own, shown, *rivals = chosen
        answers = {name: answer(own, grounds[0], looks[0], name)[1] for name in OPERATIONS}
        wrong = [answer(rival, grounds[0], looks[0], operation)[1] for rival in rivals]
        picture = answer(own, grounds[0], looks[0], operation)[0]
        example = list(answer(shown, grounds[1], looks[1], operation))
        queries.append(Query(operation, example, picture, answers, np.stack(wrong)))
    return queries


def judge_queries(drawn, queries):
    """-> share of pictures that the right operation explains best, in all and by operation, and CP"""
    right, kept = [], []
    for picture, query in zip(drawn.astype(float), queries):
        errors = {name: ((picture - answer) ** 2).mean() for name, answer in query.answers.items()}
        right.append(min(errors, key=errors.get) == query.operation)
        kept.append(errors[query.operation] < ((picture - query.rivals) ** 2).mean((1, 2, 3)).min())
    shares = {}
    for name in OPERATIONS:
        these = [r for r, query in zip(right, queries) if query.operation == name]
        shares |= {name: float(np.mean(these))} if these else {}
    return {"right operation": float(np.mean(right)), **shares, "CP": float(np.mean(kept))}


def in_context(model, tokenizer, through, held_out, n, size, seed):
    """-> rows of the third table"""
    queries = make_queries(held_out, n, size, seed)
    pieces = fill_prompt("in-context")
    others = queries[1:] + queries[:1]  # the next one shows another operation
    asked = {"another example": [(pieces, [*b.example, a.picture]) for a, b in zip(queries, others)],
             "**in-context**": [(pieces, [*query.example, query.picture]) for query in queries]}
    truth = through([query.answers[query.operation] for query in queries])
    rows = {"the truth through the tokenizer": judge_queries(truth, queries)}
    for name, prompts in asked.items():
        rows[name] = judge_queries(draw_all(model, tokenizer, "in-context", prompts, seed), queries)
    return rows
