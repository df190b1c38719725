"""The judge of tests/bench_quality.py must tell apart what it is there to tell apart."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import TOY, script, sprite

import bench_finetune
import bench_quality
import bench_several
import bench_speed
import data
from data import emoji_font
from mentor import CONFIGS, Mentor
from bench_grounds import on_any_ground
from bench_quality import copying, cutting_out, draw_cases, flattened, judge, make_cases, summary


@pytest.fixture(scope="module", params=["shapes", "emoji"])
def cases(request):
    if request.param == "emoji" and emoji_font() is None:
        pytest.skip("no colour emoji font on this machine")
    held_out = [s for s in data.load_subjects(request.param) if data.is_held_out(s)]
    return make_cases(held_out, 40, 64, 0)


def test_the_true_pictures_score_high_on_both(cases):
    for moved in (0, 2):  # by two pixels: as near as a drawing of whole patches comes
        score = summary(judge(np.roll(np.stack([case.target for case in cases]), moved, (1, 2)), cases))
        assert score["CP"] >= 0.95 and score["PF"] >= 0.95 and score["similarity"] > 0.7
        assert score["hard CP"] >= 0.95


def test_hard_rivals_leave_an_outline_and_a_hue_nothing_to_tell(cases):
    score = summary(judge(np.stack([flattened(case) for case in cases]), cases))
    assert score["hard CP"] <= 0.25 < score["CP"]


def test_copying_the_reference_keeps_the_subject_and_not_the_prompt(cases):
    score = summary(judge(np.stack([case.reference for case in cases]), cases))
    assert score["CP"] >= 0.9 and score["PF"] <= 0.5 and score["background"] == 0
    for part in ("place", "size"):  # right where the prompt happens to ask for what the reference shows
        assert abs(score[part] - np.mean([getattr(case, part) == "" for case in cases])) <= 0.05


def test_another_subject_in_the_right_scene_keeps_the_prompt_and_not_the_subject(cases):
    drawn = []
    for case, other in zip(cases, cases[1:] + cases[:1]):
        background = data.paint_background(case.background, 64, case.number)
        drawn.append(
            np.asarray(
                data.compose(
                    data.open_cutout(other.subject), background, data.named_placement(case.size, case.place)
                )[0]
            )
        )
    score = summary(judge(np.stack(drawn), cases))
    assert score["CP"] <= 0.15 and score["PF"] >= 0.9 and score["similarity"] < 0.5


def test_copies_and_cutouts_of_the_truth_are_perfect_and_a_black_picture_is_not(cases):
    assert copying(np.stack([case.scene for case in cases]), cases) == {
        "L2": 0.0,
        "PSNR": pytest.approx(106, abs=1),
    }
    truth, black = np.stack([case.alone for case in cases]), np.zeros((40, 64, 64, 3), np.uint8)
    assert cutting_out(truth, cases)["IoU"] > 0.9 and cutting_out(truth, cases)["colour error"] == 0
    white = [case._replace(scene=np.full((64, 64, 3), 255, np.uint8)) for case in cases]
    assert copying(black, white) == {"L2": pytest.approx(1), "PSNR": pytest.approx(0, abs=1e-3)}
    assert cutting_out(black, cases)["IoU"] == 0 and cutting_out(black, cases)["colour error"] > 0.2


def test_unseen_grounds_hide_no_subject_and_repeat_themselves(cases):
    moved = on_any_ground(cases, 64, 0)
    assert all(np.array_equal(a.scene, b.scene) for a, b in zip(moved[:5], on_any_ground(cases[:5], 64, 0)))
    assert len({case.reference[0, 0].tobytes() for case in moved}) > 30  # no two grounds are alike
    truth = cutting_out(np.stack([case.alone for case in moved]), moved)
    assert truth["IoU"] > 0.9 and truth["colour error"] == 0
    score = summary(judge(np.stack([case.reference for case in moved]), moved))
    assert score["CP"] > 0.6 and score["background"] < 0.2 and score["PF"] < 0.5


def test_without_references_the_model_is_given_words_alone(cases, monkeypatch):
    asked = []
    monkeypatch.setattr(
        bench_quality,
        "draw",
        lambda model, tokenizer, task, prompts, **how: asked.extend(prompts) or np.zeros((len(prompts), 2)),
    )
    for references in (None, [case.reference for case in cases]):
        draw_cases(None, None, "subject-driven", cases, references, 0, None)
    for case, (pieces, shown), (_, whole) in zip(cases, asked, asked[40:]):
        assert len(pieces) == 1 and shown == [] and case.caption in pieces[0] and whole[0] is case.reference


@pytest.mark.parametrize("sweep", [False, True])
def test_bench_runs_and_repeats_itself(trained, tmp_path, monkeypatch, capsys, sweep):
    figures = []
    monkeypatch.setattr(bench_quality, "IMAGE_SCALES", (1.0, 3.0))
    monkeypatch.setattr(bench_quality, "TEXT_SCALES", (1.0, 2.0))
    for i in range(2):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "bench_quality.py",
                "--ckpt",
                str(trained / "stage2.pt"),
                "--data",
                "shapes",
                "--n",
                "4",
                "-o",
                str(tmp_path / "sheet.png"),
                "--json",
                str(tmp_path / "figures.json"),
            ]
            + ["--sweep"] * sweep,
        )
        bench_quality.main()
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    assert figures[0] == figures[1] and (tmp_path / "sheet.png").stat().st_size > 1000
    assert (
        len(figures[0]) == (4 if sweep else 16 + 6 + 9 + 3) and "| CP | CP big |" in capsys.readouterr().out
    )
    assert sweep or figures[0]["copy the reference"]["background"] == 0


def test_what_fine_tuning_gained_and_forgot_is_one_table(trained, tmp_path, monkeypatch, capsys):
    if emoji_font() is None:
        pytest.skip("no colour emoji font on this machine")
    for name, colour in (("mug", (200, 30, 30)), ("hat", (30, 30, 200))):
        sprite(tmp_path / "mine" / f"{name}.png", colour)
    models = [str(trained / f"stage{stage}.pt") for stage in (1, 2)]
    sheet = tmp_path / "sheet.png"
    command = ["bench_finetune.py", *models, "--data", str(tmp_path / "mine"), "--n", "4", "-o", str(sheet)]
    monkeypatch.setattr(sys, "argv", command)
    bench_finetune.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| /")]
    rows = [line.split("|")[1].strip() for line in lines]
    kinds = [f"{kind}, {shown}" for kind in ("own", "emoji") for shown in ("cut out", "any ground")]
    assert rows == [f"{model}: {kind}" for model in models for kind in kinds]
    assert sheet.stat().st_size > 1000


def test_an_ablation_row_is_one_command(trained, tmp_path):
    for row, ckpt in (("without stage 1", "stage1.pt"), ("without recovery", "stage2.pt")):
        done = script(
            "tests/bench_ablation.py",
            "--row",
            row,
            "--tokenizer",
            trained / "tokenizer.pt",
            "--steps",
            2,
            1,
            "--n",
            2,
            "--out",
            tmp_path,
            *TOY[:4]
        )
        assert done.returncode == 0, done.stderr
        mix = torch.load(tmp_path / row.replace(" ", "-") / ckpt, weights_only=True)["settings"]["mix"]
        assert abs(sum(mix.values()) - 1) < 1e-9 and ("recovery" in mix) == (row == "without stage 1")
    assert done.stdout.count("| without") == 2 and ".661" in done.stdout


@pytest.fixture(scope="module")
def held_out():
    return [s for s in data.load_subjects("shapes") if data.is_held_out(s)]


def test_the_truth_is_chosen_and_placed_and_a_swap_is_neither(held_out):
    scenes = bench_several.make_scenes(held_out, 6, 64, seed=0)
    assert {len(scene.subjects) for scene in scenes} == {2, 3, 4}
    first, last = (np.stack([scene.alone[i] for scene in scenes]) for i in (0, -1))
    assert bench_several.chosen(first, scenes)["chosen"] == 1
    assert bench_several.chosen(last, scenes)["chosen"] == 0
    assert bench_several.chosen(np.zeros_like(first), scenes)["chosen"] == 0
    pictures = np.stack([scene.picture for scene in scenes])
    truth = bench_several.judge_several(pictures, scenes, held_out, 0)
    assert truth["CP"] > 0.9 and truth["right place"] == truth["background"] == 1
    swapped = [scene._replace(subjects=scene.subjects[1:] + scene.subjects[:1]) for scene in scenes]
    assert bench_several.judge_several(pictures, swapped, held_out, 0)["right place"] == 0


def test_the_right_operation_explains_its_own_answer(held_out):
    queries = bench_several.make_queries(held_out, 10, 64, seed=0)
    right = bench_several.judge_queries(np.stack([q.answers[q.operation] for q in queries]), queries)
    assert right["right operation"] == 1 and right["CP"] > 0.9
    unchanged = bench_several.judge_queries(np.stack([q.picture for q in queries]), queries)
    assert unchanged["right operation"] < 0.5


def test_share_of_peak_counts_the_work_of_a_transformer(monkeypatch):
    model, lengths = Mentor(CONFIGS["test"]), [100, 50]
    assert bench_speed.share_of_peak(model, lengths, 2.0) is None  # nobody knows a CPU's
    monkeypatch.setattr(bench_speed, "peak_flops", lambda device: 1e9)
    weights = 2 * (4 * 64 * 64 + 8 * 64 * 64)  # two layers: attention and MLP; their gains hardly count
    wanted = 6 * (weights * 150 + 2 * 64 * (100**2 + 50**2)) / 2.0 / 1e9
    assert bench_speed.share_of_peak(model, lengths, 2.0) == pytest.approx(wanted, rel=0.01)
