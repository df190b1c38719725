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
from data import TASKS, fill_prompt
from mentor import (BOI, BOS, CODES, CONFIGS, EOI, PATCH, POSITION, WORD_IDS, BadInput, Mentor, Packing,
                    build_sequence, choose_codes, copy_patches, generate, guidance_branches, hide_condition,
                    pack_sequences, rotary_table, word_ids, words_of)
from sample import draw, load_checkpoint
from tokenizer import Tokenizer
from train import MIXES, collate, fill_codes

CONFIG = CONFIGS["test"]
N = CONFIG.n_patches
COLD = (0,) * CONFIG.n_codebooks
AS_IT_IS = (0,)  # the copies of these references


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Drawings are compared code by code: no bf16, whatever the hardware."""
    monkeypatch.setattr(mentor, "has_bf16", lambda device: False)


def random_codes(seed=0, n_codebooks=CONFIG.n_codebooks):
    """Of a picture: (N, n_codebooks)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.codebook_size, (N, n_codebooks), generator=generator)


def random_reference(seed=0, n_codebooks=CONFIG.n_codebooks, copies=1):
    return torch.stack([random_codes(seed + 100 * copy, n_codebooks) for copy in range(copies)])


def outputs(model, pieces, references=(), target=None):
    """The last block's output at every token (T, n_embd)"""
    tokens = build_sequence(model.config, pieces, references, AS_IT_IS, target)
    x, seen = model.embed(tokens, model.code_table()), Packing([len(tokens)], torch.arange(len(tokens)))
    return model.run_blocks(x, rotary_table(tokens[:, POSITION], model.config), [seen] * CONFIG.n_layer)


def prefix_logits(model, pieces, references=()):
    """Logits of the first patch's coarsest code (codebook_size,)"""
    x = outputs(model, pieces, references)[-1]
    return code_logits(model, x, torch.empty(0, dtype=torch.long))


def code_logits(model, x, coarser):
    """Logits of the code that follows these coarser ones (..., level)"""
    table, level = model.code_table(), coarser.shape[-1]
    known = sum(F.embedding(codes, vectors) for codes, vectors in zip(coarser.unbind(-1), table))
    return model.logits(x, known, level, table[level])


# -- the sequence


def test_sequence_interleaves_text_and_images_in_prompt_order():
    pieces = fill_prompt("subject-driven", ["cat"], "a cat")
    reference, target = random_reference(1), random_codes(2)
    tokens = build_sequence(CONFIG, pieces, [reference], AS_IT_IS, target)
    the, cat, into, a, stop = (word_ids(word) for word in ("the", "cat", "in", "a", "."))
    bos, boi, patch, eoi = ((row, row) for row in (BOS, BOI, PATCH, EOI))
    wanted = [bos, the, cat, into, boi, *[patch] * N, eoi, stop, a, cat, boi, *[patch] * (N - 1)]
    assert list(map(tuple, tokens[:, WORD_IDS].tolist())) == wanted
    is_patch = tokens[:, 0] == PATCH
    assert torch.equal(tokens[is_patch][:, CODES], torch.cat((reference[0], target[:-1])))
    assert torch.all(tokens[~is_patch][:, CODES] == 0)


def test_a_token_of_the_picture_differs_from_the_same_patch_of_a_reference_in_the_order_alone():
    tokens = build_sequence(CONFIG, ["", ""], [random_reference(1)], AS_IT_IS, random_codes(2))
    reference, picture = tokens[2 : 2 + N, POSITION], tokens[-N:, POSITION]
    assert torch.equal(reference[:, 1:], picture[:, 1:])
    orders = reference[:, 0].unique(), picture[:, 0].unique()
    assert len(orders[0]) == len(orders[1]) == 1 and orders[1] > orders[0]


def test_a_reference_at_a_second_size_stands_behind_the_first_with_an_order_of_its_own():
    patches, reference = [copy_patches(CONFIG, copy) for copy in (0, 1)], random_reference(1, copies=2)
    tokens = build_sequence(CONFIG, ["", "a"], [reference], (0, 1), random_codes(2))
    rows, order = tokens[:, 0], tokens[:, POSITION][:, 0]
    shown = tokens[(rows == PATCH) & (torch.arange(len(rows)) < len(rows) - N)]  # those of the reference
    orders, *grid = shown[:, POSITION].T
    codes = torch.cat([its[filled] for its, filled in zip(reference, patches)])
    assert torch.equal(shown[:, CODES], codes)
    assert (grid[0] * CONFIG.side + grid[1]).tolist() == np.concatenate(patches).tolist()
    assert orders.tolist() == [2] * len(patches[0]) + [3] * len(patches[1])
    assert order[rows == EOI].tolist() == [4] and order[rows == word_ids("a")[0]].tolist() == [5]


def test_several_references_at_the_second_size_alone():
    patches, references = copy_patches(CONFIG, 1), [random_reference(i) for i in (1, 2)]
    pieces = fill_prompt("multi-image", caption="a dog <image> on the left and a cat <image>, in space")
    assert pieces == ["a dog ", " on the left and a cat ", ", in space"]
    tokens = build_sequence(CONFIG, pieces, references, (1,))
    shown = tokens[tokens[:, 0] == PATCH]
    assert torch.equal(shown[:, CODES], torch.cat([reference[0, patches] for reference in references]))
    orders, *grid = shown[:, POSITION].T
    assert (grid[0] * CONFIG.side + grid[1]).tolist() == [*patches, *patches]
    assert len(orders.unique()) == 2
    assert torch.all(tokens[:, POSITION][:, 0].diff() >= 0)  # in the order of the prompt


def test_the_patches_of_a_copy_are_those_that_it_fills():
    """On 8 x 8 patches a picture at two thirds reaches from patch 1.33 to 6.67."""
    assert copy_patches(CONFIGS["cpu"], 0).tolist() == list(range(64))
    wanted = [8 * row + column for row in range(1, 7) for column in range(1, 7)]
    assert copy_patches(CONFIGS["cpu"], 1).tolist() == wanted


def test_a_users_placeholders_are_no_references():
    label, caption = data.clean_label("the <image> dog")[0], data.clean_text("A {label} <IMAGE>, here.")
    assert (label, caption) == ("dog", "a {label} , here")
    assert fill_prompt("subject-driven", [label], caption) == ["The dog in ", ".\na {label} , here"]


def test_text_that_does_not_fit_is_refused_with_the_words_that_do():
    room = CONFIG.block_size - 1 - N
    assert len(build_sequence(CONFIG, ["é " * room], [], AS_IT_IS, random_codes())) == CONFIG.block_size
    with pytest.raises(BadInput, match=f"{room + 2} words of text, and {room} fit"):
        build_sequence(CONFIG, ["é " * room + "so, "], [], AS_IT_IS)


def test_words_of_any_script_have_rows_of_their_own():
    words = ["dog", "cat", "собака", "犬", "🐶", ".", "a", "don", "2", "glass", "bus", "dress"]
    rows = [word_ids(word) for word in words]
    assert all(5 <= row < mentor.WORD_TABLE_SIZE for pair in rows for row in pair)
    assert len(rows) == len({frozenset(pair) for pair in rows})
    for form, known in (("dogs", "dog"), ("an", "a"), ("eyes", "eye")):
        assert words_of(form) == [known]
    for form, known in (("glass", "glas"), ("as", "a"), ("bus", "bu")):
        assert words_of(form) == [form] != [known]


def test_a_word_enters_as_the_sum_of_its_two_rows(model):
    token = torch.zeros(1, 1, 5 + CONFIG.n_codebooks).long()
    token[..., WORD_IDS] = torch.tensor(word_ids("dog"))
    entered = model.embed(token, model.code_table())
    assert torch.equal(entered[0, 0], model.word_embedding.weight[list(word_ids("dog"))].sum(0))


def test_longest_sample_of_every_preset_fits_its_block():
    label, place, background = ("x " * data.MAX_LABEL).strip(), max(data.QUARTERS), "y " * data.MAX_BACKGROUND
    rng, longest = np.random.default_rng(0), f"a small {label} {background}, in the middle"
    several = data.write_caption(rng, [(label, None, place)] * 4, background, " <image>")
    captions = {"multi-image": several, "reconstruction": "z " * data.MAX_CAPTION}
    for task, config in itertools.product(TASKS, CONFIGS.values()):
        pieces = fill_prompt(task, [f"{label} {place}"], captions.get(task, longest))
        reference = torch.zeros(len(TASKS[task].copies), config.n_patches, config.n_codebooks)
        target = torch.zeros(config.n_patches, config.n_codebooks)
        build_sequence(config, pieces, [reference] * (len(pieces) - 1), TASKS[task].copies, target)


def test_hidden_conditions_are_the_branches_that_guidance_compares():
    pieces, references = ["The cat in ", ".\na cat"], [random_codes()]
    assert hide_condition(pieces, references, "") == (pieces, references)
    assert hide_condition(pieces, references, "all") == ([""], [])
    assert hide_condition(pieces, references, "text") == (["", ""], references)
    dataset = data.TaskDataset(data.load_subjects("shapes"), {"segmentation": 1.0}, 8, (0,))
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
    assert torch.all(cos == 1) and torch.all(sin == 0) and cos.shape == (1, 3, 1, 32)


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
    a, b = random_reference(1), random_reference(1)
    for level in range(CONFIG.n_codebooks):
        b[..., level] = (b[..., level] + 1) % CONFIG.codebook_size
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
    dataset = data.TaskDataset(data.load_subjects("shapes"), MIXES[2], size, (0,))
    (batch,) = collate(config, 6, [dataset[i] for i in range(6)])
    with torch.no_grad():
        loss = model(*fill_codes(tokenizer, batch, torch.device("cpu"))).mean().item()
    chance = math.log(config.codebook_size)
    assert abs(loss / chance - 1) < 0.05, (loss, chance)


@pytest.mark.parametrize("n_codebooks", [1, 2, 4])
def test_decoding_step_by_step_equals_the_full_forward_at_every_patch(n_codebooks, monkeypatch):
    """Prompts of different lengths, so that one of them is padded, and two pictures of each."""
    model = noisy_model(n_codebooks=n_codebooks)
    prompts = [(["The cat in ", ".\na cat"], [random_reference(1, n_codebooks)]), (["a cat"], [])]
    seen, run_blocks = [], Mentor.run_blocks
    with monkeypatch.context() as patch:
        patch.setattr(Mentor, "run_blocks", lambda *how: seen.append(run_blocks(*how).clone()) or seen[-1])
        codes = generate(model, prompts, AS_IT_IS, n=2, temperatures=(1.0,) * n_codebooks)
    prefix, *steps = seen  # (prompts, T, n_embd), then a row a picture (rows, 1, n_embd)
    for i, target in enumerate(codes):
        full = outputs(model, *prompts[i // 2], target)
        length = len(full) - N + 1  # of the prompt
        assert torch.allclose(prefix[i // 2, :length], full[:length], atol=1e-3)
        assert torch.allclose(torch.stack(steps)[:, i, 0], full[length:], atol=1e-3)


def test_padding_on_the_right_changes_nothing():
    """Of devices that pad packed sequences, here on the CPU, beside the CPU's own way."""
    lengths, q = [3, 5, 1], torch.randn(3, 9, 2, 16)
    slots = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 10])
    on_cpu = mentor.attend_within(*q, Packing(lengths, slots))
    assert torch.allclose(mentor.attend_padded(*q, Packing(lengths, slots)), on_cpu, atol=1e-6)


def test_packed_sequences_do_not_see_each_other(model):
    sequences = [
        build_sequence(CONFIG, ["a cat"], [], AS_IT_IS, random_codes(1)),
        build_sequence(CONFIG, ["The cat in ", "."], [random_reference(3)], AS_IT_IS, random_codes(2)),
    ]
    target = torch.stack([random_codes(1), random_codes(2)])
    together = model(*pack_sequences(sequences), target)
    alone = torch.cat([model(*pack_sequences([s]), t[None]) for s, t in zip(sequences, target)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("n_codebooks", [1, 2, 4])
def test_loss_is_the_cross_entropy_of_the_pictures_codes_alone(n_codebooks):
    """What stands in the text or the reference is never a target."""
    model, target = noisy_model(n_codebooks=n_codebooks), random_codes(2, n_codebooks)
    for pieces, references in ((["a cat"], []), (["", ""], [random_reference(3, n_codebooks)])):
        x = outputs(model, pieces, references, target)[-N:]
        wanted = []
        for level in range(n_codebooks):
            logits = code_logits(model, x, target[:, :level])
            wanted.append(F.cross_entropy(logits, target[:, level], reduction="none"))
        sequence = build_sequence(model.config, pieces, references, AS_IT_IS, target)
        nats = model(*pack_sequences([sequence]), target[None])[0]
        assert torch.allclose(nats, torch.stack(wanted, -1), atol=1e-4)


def test_each_code_is_told_all_coarser_ones():
    model, x = noisy_model(n_codebooks=4), torch.randn(1, CONFIG.n_embd)
    codes = torch.zeros(1, 4, dtype=torch.long)
    for level in range(1, 4):
        for told in range(level):
            other = codes.clone()
            other[0, told] = 1
            changed = code_logits(model, x, codes[:, :level]) - code_logits(model, x, other[:, :level])
            assert changed.abs().max() > 1e-3


# -- drawing


def greedy(model, pieces, references):
    """The slow way: the whole sequence again for every code."""
    codes = torch.zeros(N, CONFIG.n_codebooks, dtype=torch.long)
    for i in range(N):
        x = outputs(model, pieces, references, codes)[i - N]
        for level in range(CONFIG.n_codebooks):
            codes[i, level] = code_logits(model, x, codes[i, :level]).argmax()
    return codes


def test_guidance_of_one_is_the_conditional_model(model):
    prompt = (["The cat in ", ".\na cat"], [random_reference(1)])
    assert len(guidance_branches(*prompt, 1.0, 1.0)) == 1
    assert torch.equal(generate(model, [prompt], AS_IT_IS, temperatures=COLD)[0], greedy(model, *prompt))


def test_guidance_is_null_plus_two_differences(model):
    prompt = (["The cat in ", ".\na cat"], [random_reference(1)])
    branches = (prompt, hide_condition(*prompt, "text"), ([""], []))
    full, image, null = (prefix_logits(model, *branch) for branch in branches)
    wanted = null + 3.0 * (image - null) + 2.0 * (full - image)
    got = sum(weight * prefix_logits(model, p, r) for weight, p, r in guidance_branches(*prompt, 3.0, 2.0))
    assert torch.allclose(got, wanted, atol=1e-3)
    drawn = generate(model, [prompt], AS_IT_IS, temperatures=COLD, cfg_image=3.0, cfg_text=2.0)
    assert drawn[0, 0, 0] == wanted.argmax()


@pytest.mark.parametrize("bf16", [True, False])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(model, monkeypatch, bf16):
    """sample.py draws so: the seventh of a grid can be drawn again alone."""
    monkeypatch.setattr(mentor, "has_bf16", lambda device: bf16)
    prompts = [(["a cat"], []), (["The dog in ", ".\na small dog"], [random_reference(1)])]
    for how in ({"cfg_image": 2.0, "cfg_text": 1.5}, {}):  # three branches, one
        together = generate(model, prompts, AS_IT_IS, n=8, seed=5, **how)
        assert together.shape == (16, N, CONFIG.n_codebooks)
        for first, n in ((0, 1), (3, 3), (7, 1), (8, 3), (15, 1)):
            few = generate(model, [prompts[first // 8]], AS_IT_IS, n=n, seed=5 + first, **how)
            assert torch.equal(together[first:first + n], few), (first, n, how)
    assert not torch.equal(together[2], together[3])


def test_a_picture_has_the_same_pixels_in_every_batch(model):
    torch.manual_seed(0)
    tokenizer, prompt = Tokenizer(CONFIG).eval(), (["a cat"], [])
    several = draw(model, tokenizer, "text-to-image", [prompt], n=5)
    for i in range(5):
        assert np.array_equal(draw(model, tokenizer, "text-to-image", [prompt], seed=i)[0], several[i])


def test_a_draw_follows_the_probabilities():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(1000, -1)
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = choose_codes(logits, uniform, 1.0).bincount(minlength=4).tolist()
    assert drawn == [100, 200, 0, 700]
    cold = choose_codes(logits, uniform, 0.5).bincount(minlength=4) / 1000  # squares: .01, .04, 0, .49
    assert torch.allclose(cold, torch.tensor([0.0185, 0.0741, 0, 0.9074]), atol=0.002)
    edges = choose_codes(logits[:2], torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert edges.tolist() == [0, 3]


def test_a_temperature_near_nothing_takes_the_likeliest():
    logits, uniform = torch.tensor([[9.0, 30.0, 29.0]]), torch.tensor([0.9])
    for temperature in (0, 1e-42, 1e-40, 1e-12, 1e-3):
        assert choose_codes(logits, uniform, temperature).tolist() == [1]


def test_each_level_has_its_own_temperature(model):
    prompt = [(["a cat"], [])]
    cold, mixed = (generate(model, prompt, AS_IT_IS, temperatures=t) for t in (COLD, (0, 5.0, 0)))
    assert mixed[0, 0, 0] == cold[0, 0, 0] and not torch.equal(mixed[..., 1], cold[..., 1])


@pytest.mark.parametrize("bf16", [True, False])
def test_drawing_leaves_the_model_as_it_was(model, monkeypatch, bf16):
    monkeypatch.setattr(mentor, "has_bf16", lambda device: bf16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    copied = mentor.drawing_copy(model)
    assert copied.blocks[0].mlp.fc.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert copied.blocks[0].attention.gain.dtype == copied.code_embedding.dtype == torch.float32
    with torch.no_grad():
        first = [outputs(version, ["a cat"])[-1] for version in (model, copied)]
    assert F.cosine_similarity(*first, 0) > (0.99 if bf16 else 1 - 1e-6)
    assert generate(model, [(["a cat"], [])], AS_IT_IS).shape == (1, N, CONFIG.n_codebooks)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_every_task_is_a_row_and_a_method():
    assert all(callable(getattr(data.TaskDataset, task.replace("-", "_"))) for task in TASKS)


def test_training_step_and_drawing_step_on_the_meta_device():
    """Meta tensors refuse to meet a CPU tensor, and to say a number: what passes here leaves no tensor behind
    on another device, and waits for none."""
    model = Mentor(CONFIG).to("meta")
    tokens, lengths = pack_sequences([build_sequence(CONFIG, ["a"], [], AS_IT_IS, random_codes())])
    model(tokens.to("meta"), lengths, random_codes()[None].to("meta")).mean().backward()
    assert all(p.grad.device.type == "meta" for p in model.parameters())
    prompt = (["The dog in ", "."], [random_reference()])
    codes = generate(model, [prompt], AS_IT_IS, 3, 0, (0.6, 0, 0.1), 3.0, 2.0)
    assert codes.device.type == "meta" and codes.shape == (3, N, CONFIG.n_codebooks)


def test_compiled_blocks_equal_eager_ones(model):
    sequences = pack_sequences([build_sequence(CONFIG, ["a cat"], [], AS_IT_IS, random_codes())])
    losses = [model(*sequences, random_codes()[None])]
    for block in model.blocks:
        block.compile(dynamic=False)
    losses.append(model(*sequences, random_codes()[None]))
    gradients = [torch.autograd.grad(loss.mean(), list(model.parameters())) for loss in losses]
    assert torch.allclose(*losses, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))


def test_a_compiled_drawing_step_equals_an_eager_one(model, monkeypatch):
    """In one graph: no part of it needs Python."""
    how = {"n": 2, "temperatures": COLD, "cfg_image": 2.0, "cfg_text": 2.0}
    eager, steps = generate(model, [(["a cat"], [])], AS_IT_IS, **how), []

    def repeat(step, times, device):
        compiled = torch.compile(step, dynamic=False, fullgraph=True)
        for _ in range(times):
            steps.append(compiled())

    monkeypatch.setattr(mentor, "repeat", repeat)
    assert torch.equal(generate(model, [(["a cat"], [])], AS_IT_IS, **how), eager) and len(steps) == N - 1


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
