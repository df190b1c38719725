"""The sequence, the transformer and the drawing."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noisy_model

import data
import mentor
from mentor import (
    BOI,
    BOS,
    CONFIGS,
    EOI,
    HIDDEN,
    PATCH,
    TASKS,
    Drawing,
    Mentor,
    build_sequence,
    draw_codes,
    fill_prompt,
    generate,
    guidance_branches,
    hide_condition,
    pad_sequences,
    reference_patches,
    rotary_table,
    word_id,
    words_of,
)
from sample import collate, fill_codes, load_checkpoint
from tokenizer import BadInput, Tokenizer
from train import MIXES

CONFIG = CONFIGS["test"]
N = CONFIG.n_patches
COLD = (0,) * CONFIG.n_codebooks
AS_IT_IS = (0,)  # the size at which these references enter


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Drawings are compared code by code: no bf16, whatever the hardware."""
    monkeypatch.setattr(mentor, "has_bf16", lambda device: False)


def random_codes(seed=0, n_codebooks=CONFIG.n_codebooks, n=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.codebook_size, (n, n_codebooks), generator=generator)


def outputs(model, pieces, references=(), target=None):
    """The last block's output at every token (T, n_embd)"""
    tokens = build_sequence(model.config, pieces, references, AS_IT_IS, target)[None]
    x = model.embed(tokens, model.code_table())
    return model.hidden(x, rotary_table(tokens[..., 1:4], model.config))[0]


def prefix_logits(model, pieces, references=()):
    """Logits of the first patch's coarsest code (codebook_size,)"""
    x = outputs(model, pieces, references)[-1]
    return model.logits(x, torch.empty(0, dtype=torch.long), model.code_table())


# -- the sequence


def test_sequence_interleaves_text_and_images_in_prompt_order():
    pieces, reference, target = (
        fill_prompt("subject-driven", ["cat"], "a cat"),
        random_codes(1),
        random_codes(2),
    )
    tokens = build_sequence(CONFIG, pieces, [reference], AS_IT_IS, target)
    ids = tokens[:, 0]
    the, cat, a, stop = (word_id(word) for word in ("the", "cat", "a", "."))
    before, after = [the, cat, word_id("in")], [stop, a, cat]
    assert ids.tolist() == [BOS, *before, BOI, *[PATCH] * N, EOI, *after, BOI, *[PATCH] * (N - 1)]
    assert torch.equal(tokens[ids == PATCH][:, 4:], torch.cat((reference, target[:-1])))
    assert torch.all(tokens[ids != PATCH][:, 4:] == 0)


def test_a_token_of_the_picture_differs_from_the_same_patch_of_a_reference_in_the_order_alone():
    tokens = build_sequence(CONFIG, ["", ""], [random_codes(1)], AS_IT_IS, random_codes(2))
    reference, picture = tokens[2 : 2 + N, 1:4], tokens[-N:, 1:4]
    assert torch.equal(reference[:, 1:], picture[:, 1:])
    orders = reference[:, 0].unique(), picture[:, 0].unique()
    assert len(orders[0]) == len(orders[1]) == 1 and orders[1] > orders[0]


def test_a_reference_at_a_second_size_stands_behind_the_first_with_an_order_of_its_own():
    patches = reference_patches(CONFIG, (0, 1))
    reference = random_codes(1, n=len(patches))
    tokens = build_sequence(CONFIG, ["", "a"], [reference], (0, 1), random_codes(2))
    ids = tokens[:, 0]
    shown = tokens[(ids == PATCH) & (torch.arange(len(ids)) < len(ids) - N)]  # those of the reference
    assert torch.equal(shown[:, 4:], reference)
    assert torch.equal(shown[:, 2] * CONFIG.side + shown[:, 3], patches % N)
    assert torch.equal(shown[:, 1], 2 + patches // N)
    assert tokens[ids == EOI][0, 1] == 4 and tokens[ids == word_id("a")][0, 1] == 5


def test_several_references_at_the_second_size_alone():
    patches = reference_patches(CONFIG, (1,))
    references = [random_codes(i, n=len(patches)) for i in (1, 2)]
    pieces = fill_prompt("multi-image", caption="a dog <image> on the left and a cat <image>, in space")
    assert pieces == ["a dog ", " on the left and a cat ", ", in space"]
    tokens = build_sequence(CONFIG, pieces, references, (1,))
    shown = tokens[tokens[:, 0] == PATCH]
    assert torch.equal(shown[:, 4:], torch.cat(references))
    assert torch.equal(shown[:, 2] * CONFIG.side + shown[:, 3], torch.cat((patches, patches)))
    orders = tokens[:, 1]
    assert torch.all(orders[1:] >= orders[:-1])  # in the order of the prompt
    assert len(shown[:, 1].unique()) == 2


def test_reference_patches_are_those_that_the_picture_fills():
    """On 8 x 8 patches a picture at two thirds reaches from patch 1.33 to 6.67."""
    patches = reference_patches(CONFIGS["cpu"], (0, 1))
    assert patches[:64].tolist() == list(range(64)) and torch.equal(
        reference_patches(CONFIGS["cpu"], (0,)), patches[:64]
    )
    assert torch.equal(reference_patches(CONFIGS["cpu"], (1,)), patches[64:] - 64)
    assert patches[64:].tolist() == [64 + 8 * row + column for row in range(1, 7) for column in range(1, 7)]


def test_placeholder_written_by_a_user_stays_text():
    assert fill_prompt("subject-driven", ["<image>"], "{label} <image>") == [
        "The <image> in ",
        ".\n{label} <image>",
    ]


def test_text_that_does_not_fit_is_refused_with_the_words_that_do():
    room = CONFIG.block_size - 1 - N
    assert len(build_sequence(CONFIG, ["é " * room], [], AS_IT_IS, random_codes())) == CONFIG.block_size
    with pytest.raises(BadInput, match=f"{room + 2} words of text, and {room} fit"):
        build_sequence(CONFIG, ["é " * room + "so, "], [], AS_IT_IS)


def test_words_of_any_script_have_rows_of_their_own():
    words = ["dog", "cat", "собака", "犬", "🐶", ".", "a", "don", "2", "glass", "bus", "dress"]
    ids = [word_id(word) for word in words]
    assert len(set(ids)) == len(words) and not set(ids) & {BOS, BOI, EOI, HIDDEN, PATCH}
    rows = [divmod(number, mentor.N_ROWS) for number in ids]
    assert all(5 <= row < mentor.N_ROWS for pair in rows for row in pair)
    assert len(rows) == len({frozenset(pair) for pair in rows})
    for form, known in (("dogs", "dog"), ("an", "a"), ("eyes", "eye")):
        assert words_of(form) == [known]
    for form, known in (("glass", "glas"), ("as", "a"), ("bus", "bu")):
        assert words_of(form) == [form] != [known]


def test_a_word_enters_as_the_sum_of_its_two_rows(model):
    first, second = divmod(word_id("dog"), mentor.N_ROWS)
    token = torch.zeros(1, 1, 4 + CONFIG.n_codebooks).long()
    token[..., 0] = word_id("dog")
    entered = model.embed(token, model.code_table())
    assert torch.equal(entered[0, 0], model.word_embedding.weight[[first, second]].sum(0))


def test_longest_sample_of_every_preset_fits_its_block():
    label, place, background = ("x " * data.MAX_LABEL).strip(), max(data.QUARTERS), "y " * data.MAX_BACKGROUND
    rng, longest = np.random.default_rng(0), f"a small {label} {background}, in the middle"
    several = data.write_caption(rng, [(label, None, place)] * 4, background, " <image>")
    captions = {"multi-image": several, "reconstruction": "z " * data.MAX_CAPTION}
    for task, config in itertools.product(TASKS, CONFIGS.values()):
        pieces = fill_prompt(task, [f"{label} {place}"], captions.get(task, longest))
        reference = torch.zeros(len(reference_patches(config, TASKS[task].sizes)), config.n_codebooks)
        target = torch.zeros(config.n_patches, config.n_codebooks)
        build_sequence(config, pieces, [reference] * (len(pieces) - 1), TASKS[task].sizes, target)


def test_hidden_conditions_are_the_branches_that_guidance_compares():
    pieces, references = ["The cat in ", ".\na cat"], [random_codes()]
    assert hide_condition(pieces, references, "") == (pieces, references)
    assert hide_condition(pieces, references, "all") == ([""], [])
    assert hide_condition(pieces, references, "text") == (["", ""], references)
    dataset = data.Tasks(data.load_subjects("shapes"), {"segmentation": 1.0}, 8, (0,))
    trained = {dataset[i].hide for i in range(100)} - {"picture"}  # (which is no part of the condition)
    compared = {"all", "text", ""}
    assert (
        trained
        == compared
        == {
            hide
            for hide in compared
            if hide_condition(pieces, references, hide)
            in [branch[1:] for branch in guidance_branches(pieces, references, 3.0, 2.0)]
        }
    )


# -- the transformer


def test_rotary_table_is_the_identity_at_position_zero():
    cos, sin = rotary_table(torch.zeros(1, 3, 3, dtype=torch.long), CONFIG)
    assert torch.all(cos == 1) and torch.all(sin == 0) and cos.shape == (1, 1, 3, 32)


def test_rotary_table_turns_with_each_of_the_three_axes():
    tables = [
        rotary_table(torch.tensor([[position]]), CONFIG)[0] for position in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    turned = torch.stack([table.flatten()[:16] < 1 for table in tables])  # (axis, pair)
    assert turned.sum(1).tolist() == [8, 4, 4] and torch.all(turned.sum(0) == 1)


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 32)
    dots = []
    for at, to in ((2, 5), (7, 10)):
        tables = [rotary_table(torch.tensor([[[n, n, n]]]), CONFIG) for n in (at, to)]
        turned = [mentor.rotate(x, *table) for x, table in zip((q, k), tables)]
        assert torch.allclose(turned[0].norm(), q.norm(), atol=1e-5)
        dots.append((turned[0] * turned[1]).sum())
    assert torch.allclose(dots[0], dots[1], atol=1e-4)


def test_attention_is_torchs_own():
    q, k, v = torch.randn(3, 2, 4, 10, 16)
    assert torch.allclose(
        mentor.attend(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5
    )
    mask = torch.randn(10, 10)
    assert torch.allclose(
        mentor.attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-5
    )
    assert torch.allclose(mentor.rms_norm(q), F.rms_norm(q, (16,)), atol=1e-4)


def test_prefixes_of_equal_length_and_swapped_words_give_different_logits(model):
    a, b, c = (prefix_logits(model, [text]) for text in ("a red cat", "a red dog", "a cat red"))
    assert (a - b).abs().max() > 1e-3 and (a - c).abs().max() > 1e-3


def test_reference_is_looked_at_every_code_of_it(model):
    a, b = random_codes(1), random_codes(1)
    for level in range(CONFIG.n_codebooks):
        b[:, level] = (b[:, level] + 1) % CONFIG.codebook_size
        changed = prefix_logits(model, ["", ""], [a]) - prefix_logits(model, ["", ""], [b])
        assert changed.abs().max() > 1e-3
        b = a.clone()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_untrained_models_loss_is_that_of_chance(name):
    """At every width: a head that is too sure would spend the first hundred steps on unlearning. (One layer
    is enough: a fresh block is the identity.) Scenes, since there neighbours are often alike."""
    size = min(CONFIGS[name].image_size, 16 * CONFIGS[name].downsample)
    config = dataclasses.replace(CONFIGS[name], n_layer=1, image_size=size)
    torch.manual_seed(0)
    model, tokenizer = Mentor(config), Tokenizer(config)
    model.codebooks.copy_(tokenizer.codebooks.detach())
    dataset = data.Tasks(data.load_subjects("shapes"), MIXES[2], size, (0,))
    (batch,) = collate(config, 6, [dataset[i] for i in range(6)])
    with torch.no_grad():
        loss = model(*fill_codes(tokenizer, batch, torch.device("cpu"))).mean().item()
    chance = math.log(config.codebook_size)
    assert abs(loss / chance - 1) < 0.05, (loss, chance)


@pytest.mark.parametrize("n_codebooks", [1, 2, 4])
def test_decoding_step_by_step_equals_the_full_forward_at_every_patch(n_codebooks):
    """Prompts of different lengths, so that one of them is padded, and two pictures of each."""
    model = noisy_model(n_codebooks=n_codebooks)
    prompts = [(["The cat in ", ".\na cat"], [random_codes(1, n_codebooks)]), (["a cat"], [])]
    with torch.no_grad():
        drawing = Drawing(model, prompts, AS_IT_IS, 2, 0, (1.0,) * n_codebooks, 1.0, 1.0)
        drawing.draw_patch()
        seen = [drawing.x.clone()]
        for _ in range(N - 1):
            drawing.step()
            seen.append(drawing.x.clone())
    for i, target in enumerate(drawing.codes):
        full = outputs(model, *prompts[i // 2], target)[-N:]
        assert torch.allclose(torch.stack(seen)[:, i], full, atol=1e-3)


def test_right_padding_changes_nothing(model):
    sequences = [
        build_sequence(CONFIG, ["a cat"], [], AS_IT_IS, random_codes(1)),
        build_sequence(CONFIG, ["The cat in ", "."], [random_codes(3)], AS_IT_IS, random_codes(2)),
    ]
    target = torch.stack([random_codes(1), random_codes(2)])
    together = model(*pad_sequences(sequences, multiple=32), target)
    alone = torch.cat([model(*pad_sequences([s]), t[None]) for s, t in zip(sequences, target)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("n_codebooks", [1, 2, 4])
def test_loss_is_the_cross_entropy_of_the_pictures_codes_alone(n_codebooks):
    """What stands in the text or the reference is never a target."""
    model, target = noisy_model(n_codebooks=n_codebooks), random_codes(2, n_codebooks)
    for pieces, references in ((["a cat"], []), (["", ""], [random_codes(3, n_codebooks)])):
        x = outputs(model, pieces, references, target)[-N:]
        wanted = []
        for level in range(n_codebooks):
            logits = model.logits(x, target[:, :level], model.code_table())
            wanted.append(F.cross_entropy(logits, target[:, level], reduction="none"))
        sequence = build_sequence(model.config, pieces, references, AS_IT_IS, target)
        nats = model(*pad_sequences([sequence]), target[None])[0]
        assert torch.allclose(nats, torch.stack(wanted, -1), atol=1e-4)


def test_each_code_is_told_all_coarser_ones():
    model, x = noisy_model(n_codebooks=4), torch.randn(1, CONFIG.n_embd)
    table, codes = model.code_table(), torch.zeros(1, 4, dtype=torch.long)
    for level in range(1, 4):
        for told in range(level):
            other = codes.clone()
            other[0, told] = 1
            changed = model.logits(x, codes[:, :level], table) - model.logits(x, other[:, :level], table)
            assert changed.abs().max() > 1e-3


# -- drawing


def greedy(model, pieces, references):
    """The slow way: the whole sequence again for every code."""
    codes, table = torch.zeros(N, CONFIG.n_codebooks, dtype=torch.long), model.code_table()
    for i in range(N):
        x = outputs(model, pieces, references, codes)[i - N]
        for level in range(CONFIG.n_codebooks):
            codes[i, level] = model.logits(x, codes[i, :level], table).argmax()
    return codes


def test_guidance_of_one_is_the_conditional_model(model):
    prompt = (["The cat in ", ".\na cat"], [random_codes(1)])
    assert len(guidance_branches(*prompt, 1.0, 1.0)) == 1
    assert torch.equal(generate(model, [prompt], AS_IT_IS, temperatures=COLD)[0], greedy(model, *prompt))


def test_guidance_is_null_plus_two_differences(model):
    prompt = (["The cat in ", ".\na cat"], [random_codes(1)])
    branches = (prompt, hide_condition(*prompt, "text"), ([""], []))
    full, image, null = (prefix_logits(model, *branch) for branch in branches)
    wanted = null + 3.0 * (image - null) + 2.0 * (full - image)
    got = sum(weight * prefix_logits(model, p, r) for weight, p, r in guidance_branches(*prompt, 3.0, 2.0))
    assert torch.allclose(got, wanted, atol=1e-3)
    drawn = generate(model, [prompt], AS_IT_IS, temperatures=COLD, cfg_image=3.0, cfg_text=2.0)
    assert drawn[0, 0, 0] == wanted.argmax()


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(model):
    """Eleven pictures of each prompt: two groups, and one place left over."""
    prompts = [(["a cat"], []), (["The dog in ", ".\na small dog"], [random_codes(1)])]
    how = {"cfg_image": 2.0, "cfg_text": 1.5}
    together = generate(model, prompts, AS_IT_IS, n=11, seed=5, **how)
    assert together.shape == (22, N, CONFIG.n_codebooks)
    for i in (0, 7, 10, 11, 21):
        alone = generate(model, [prompts[i // 11]], AS_IT_IS, seed=5 + i, **how)
        assert torch.equal(together[i], alone[0]), i
    assert not torch.equal(together[2], together[3])


def test_a_draw_follows_the_probabilities():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(1000, -1)
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = draw_codes(logits, uniform, 1.0).bincount(minlength=4).tolist()
    assert drawn == [100, 200, 0, 700]
    cold = draw_codes(logits, uniform, 0.5).bincount(minlength=4) / 1000  # squares: .01, .04, 0, .49
    assert torch.allclose(cold, torch.tensor([0.0185, 0.0741, 0, 0.9074]), atol=0.002)
    edges = draw_codes(logits[:2], torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert edges.tolist() == [0, 3]


def test_each_level_has_its_own_temperature(model):
    prompt = [(["a cat"], [])]
    cold, mixed = (generate(model, prompt, AS_IT_IS, temperatures=t) for t in (COLD, (0, 5.0, 0)))
    assert mixed[0, 0, 0] == cold[0, 0, 0] and not torch.equal(mixed[..., 1], cold[..., 1])


def test_drawing_in_bf16_is_close_and_leaves_the_model_as_it_was(model, monkeypatch):
    monkeypatch.setattr(mentor, "has_bf16", lambda device: True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    copied = mentor.drawing_copy(model)
    assert copied.blocks[0].mlp.fc.weight.dtype == torch.bfloat16
    with torch.no_grad():
        tokens = build_sequence(CONFIG, ["a cat"], [], AS_IT_IS)[None]
        first = []
        for version in (model, copied):
            x = version.embed(tokens, version.code_table())
            first.append(version.hidden(x, rotary_table(tokens[..., 1:4], CONFIG))[0, -1])
    assert F.cosine_similarity(*first, 0) > 0.99
    assert generate(model, [(["a cat"], [])], AS_IT_IS).shape == (1, N, CONFIG.n_codebooks)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_exact_picture_is_the_same_in_every_batch_also_where_there_is_bf16(model, monkeypatch):
    """sample.py draws so: the seventh of a grid can be drawn again alone."""
    monkeypatch.setattr(mentor, "has_bf16", lambda device: True)
    how = {"cfg_image": 2.0, "cfg_text": 2.0, "exact": True}
    grid = generate(model, [(["a cat"], [])], AS_IT_IS, n=9, seed=5, **how)
    for i in (0, 6, 8):
        assert torch.equal(grid[i], generate(model, [(["a cat"], [])], AS_IT_IS, seed=5 + i, **how)[0])
    assert mentor.drawing_copy(model, exact=True).blocks[0].mlp.fc.weight.dtype == torch.float32


def test_every_task_is_a_row_and_a_method():
    assert all(callable(getattr(data.Tasks, task.replace("-", "_"))) for task in TASKS)


def test_training_step_and_drawing_step_on_the_meta_device():
    """Meta tensors refuse to meet a CPU tensor, and to say a number: what passes here leaves no tensor behind
    on another device, and waits for none."""
    model = Mentor(CONFIG).to("meta")
    sequence = pad_sequences([build_sequence(CONFIG, ["a"], [], AS_IT_IS, random_codes())])
    model(*(x.to("meta") for x in sequence), random_codes()[None].to("meta")).mean().backward()
    assert all(p.grad.device.type == "meta" for p in model.parameters())
    with torch.no_grad():
        prompt = (["The dog in ", "."], [random_codes()])
        drawing = Drawing(model, [prompt], AS_IT_IS, 3, 0, (0.6, 0, 0.1), 3.0, 2.0)
        drawing.draw_patch()
        drawing.step()
    assert drawing.codes.device.type == drawing.x.device.type == "meta"


@pytest.mark.parametrize("part", ["blocks", "step"])
def test_compiled_equals_eager(model, part):
    if part == "blocks":
        batch = (
            *pad_sequences([build_sequence(CONFIG, ["a cat"], [], AS_IT_IS, random_codes())]),
            random_codes()[None],
        )
        losses = [model(*batch)]
        for block in model.blocks:
            block.compile(dynamic=False)
        losses.append(model(*batch))
        gradients = [torch.autograd.grad(loss.mean(), list(model.parameters())) for loss in losses]
        assert torch.allclose(*losses, atol=1e-4)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))
    else:
        prompt = [(["a cat"], [])]
        eager = generate(model, prompt, AS_IT_IS, n=2, temperatures=COLD, cfg_image=2.0, cfg_text=2.0)
        with torch.no_grad():
            drawing = Drawing(model, prompt, AS_IT_IS, 2, 0, COLD, 2.0, 2.0)
            step = torch.compile(drawing.step, dynamic=False, fullgraph=True)  # no part of it needs Python
            drawing.draw_patch()
            for _ in range(N - 1):
                step()
        assert torch.equal(drawing.codes, eager)


# -- checkpoints


def test_checkpoint_with_code_in_it_executes_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "bomb.pt"
    torch.save({"config": dataclasses.asdict(CONFIG), "model": Bomb(), "tokenizer": {}, "stage": 2}, path)
    with pytest.raises(BadInput, match="bomb.pt: not a checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_checkpoint_of_another_version_is_refused_by_name(tmp_path):
    """Whatever its configuration was: one with fields that are gone is old, not damaged."""
    path = tmp_path / "old.pt"
    torch.save(
        {"config": {"image_size": 64, "gone": 1}, "model": {}, "tokenizer": {}, "stage": 2, "version": 2},
        path,
    )
    with pytest.raises(BadInput, match="old.pt: written by another version"):
        load_checkpoint(path)
