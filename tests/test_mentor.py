"""The sequence, the transformer and the drawing."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import data
import mentor
from mentor import (BOI, BOS, CONFIGS, EOI, FIRST_CODE, GUIDANCE, Mentor, build_sequence, fill_prompt, generate, guidance_branches,
                    hide_condition, load_checkpoint, pad_sequences, rotary_table)

CONFIG = CONFIGS["test"]
N = CONFIG.n_codes


def random_codes(seed=0):
    return torch.randint(CONFIG.codebook_size ** 2, (N,), generator=torch.Generator().manual_seed(seed))


def prefix_logits(model, pieces, references=()):
    """Logits of the first code's coarse half (codebook_size,)"""
    ids, positions, lengths = pad_sequences([build_sequence(CONFIG, pieces, references)])
    return model.coarse_logits(model.prefill(ids, positions, lengths)[0])[0]


# -- the sequence


def test_sequence_interleaves_text_and_images_in_prompt_order():
    pieces, reference, target = fill_prompt("subject-driven", "cat", "a cat"), random_codes(1), random_codes(2)
    ids, positions = build_sequence(CONFIG, pieces, [reference], target)
    expected = [BOS, *b"The cat in ", BOI, *(reference + FIRST_CODE).tolist(), EOI, *b".\na cat", BOI,
                *(target[:-1] + FIRST_CODE).tolist()]
    assert ids.tolist() == expected and len(positions) == len(ids)


def test_a_token_of_the_picture_differs_from_the_same_patch_of_a_reference_in_the_order_alone():
    _, positions = build_sequence(CONFIG, ["", ""], [random_codes(1)], random_codes(2))
    reference, picture = positions[2:2 + N], positions[-N:]
    assert torch.equal(reference[:, 1:], picture[:, 1:])
    assert len(reference[:, 0].unique()) == len(picture[:, 0].unique()) == 1 and picture[0, 0] > reference[0, 0]


def test_placeholder_written_by_a_user_stays_text():
    assert fill_prompt("subject-driven", "<image>", "{label} <image>") == ["The <image> in ", ".\n{label} <image>"]


def test_text_that_does_not_fit_is_refused_with_the_bytes_that_do():
    room = CONFIG.block_size - 1 - N
    assert len(build_sequence(CONFIG, ["é" * (room // 2)], [], random_codes())[0]) <= CONFIG.block_size
    with pytest.raises(ValueError, match=f"{room + 2 - room % 2} bytes of text, and {room} fit"):
        build_sequence(CONFIG, ["é" * (room // 2 + 1)], [])


def test_longest_sample_of_every_preset_fits_its_block():
    longest = len("The  in .\n, a small , in the middle") + 3 * data.MAX_LABEL + 4  # label, background and label again
    for name, config in CONFIGS.items():
        assert longest + 2 * config.n_codes <= config.block_size, name


def test_hidden_conditions_are_the_branches_that_guidance_compares():
    pieces, references = ["The cat in ", ".\na cat"], [random_codes()]
    assert hide_condition(pieces, references, "") == (pieces, references)
    assert hide_condition(pieces, references, "all") == ([""], [])
    assert hide_condition(pieces, references, "images") == (["The cat in .\na cat"], [])
    assert hide_condition(pieces, references, "text") == (["", ""], references)


# -- the transformer


def test_rotary_table_is_the_identity_at_position_zero():
    cos, sin = rotary_table(torch.zeros(1, 3, 3, dtype=torch.long), 32, 4)
    assert torch.all(cos == 1) and torch.all(sin == 0) and cos.shape == (1, 1, 3, 16)


def test_rotary_table_turns_with_each_of_the_three_axes():
    tables = [rotary_table(torch.tensor([[position]]), 32, 4)[0] for position in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    turned = torch.stack([table.flatten() < 1 for table in tables])  # (axis, pair)
    assert turned.sum(1).tolist() == [8, 4, 4] and torch.all(turned.sum(0) == 1)


def test_prefixes_of_equal_length_and_swapped_words_give_different_logits(model):
    a, b, c = (prefix_logits(model, [text]) for text in ("a red cat", "a red dog", "a cat red"))
    assert (a - b).abs().max() > 1e-3 and (a - c).abs().max() > 1e-3


def test_reference_is_looked_at(model):
    a, b = (prefix_logits(model, ["", ""], [random_codes(seed)]) for seed in (1, 2))
    assert (a - b).abs().max() > 1e-3


def test_cached_decode_equals_the_full_forward_at_every_position(model):
    pieces, references, target = ["The cat in ", ".\na cat"], [random_codes(1)], random_codes(2)
    prompts = [(pieces, references), (["a cat"], [])]  # of different lengths: the second row is padded
    full = []
    for prompt in prompts:
        ids, positions = build_sequence(CONFIG, *prompt, target)
        full.append(model.hidden(ids[None], positions[None])[0, -N:])
    full = torch.stack(full, 1)  # (N, 2, n_embd)

    prefixes = [build_sequence(CONFIG, *prompt) for prompt in prompts]
    prefix, where, lengths = pad_sequences(prefixes)
    x, cache = model.prefill(prefix, where, lengths)
    order = torch.stack([p[-1, 0] for _, p in prefixes])
    for i in range(N):
        assert torch.allclose(x, full[i], atol=1e-4), i
        if i + 1 < N:
            patch = torch.tensor([(i + 1) // CONFIG.side, (i + 1) % CONFIG.side]).expand(2, 2)
            x = model.decode(target[i].expand(2), torch.cat((order[:, None], patch), 1), lengths + i, cache)


def test_right_padding_changes_nothing(model):
    sequences = [build_sequence(CONFIG, ["a cat"], [], random_codes(1)),
                 build_sequence(CONFIG, ["The cat in ", "."], [random_codes(3)], random_codes(2))]
    target = torch.stack([random_codes(1), random_codes(2)])
    together = model(*pad_sequences(sequences, multiple=32), target)
    alone = torch.cat([model(*pad_sequences([s]), t[None]) for s, t in zip(sequences, target)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_loss_is_the_cross_entropy_of_the_pictures_two_halves_alone(model):
    """What stands in the text or the reference is never a target."""
    target, K = random_codes(2), CONFIG.codebook_size
    for pieces, references in ((["a cat"], []), (["", ""], [random_codes(3)])):
        ids, positions = build_sequence(CONFIG, pieces, references, target)
        x = model.hidden(ids[None], positions[None])[0, -N:]
        wanted = sum(F.cross_entropy(logits, half) for logits, half in
                     ((model.coarse_logits(x), target // K), (model.fine_logits(x, target // K), target % K)))
        assert torch.allclose(model(*pad_sequences([(ids, positions)]), target[None])[0], wanted, atol=1e-5)


def test_the_fine_half_depends_on_the_coarse_one(model):
    x = torch.randn(1, CONFIG.n_embd)
    assert (model.fine_logits(x, torch.tensor([1])) - model.fine_logits(x, torch.tensor([2]))).abs().max() > 1e-3


# -- drawing


def greedy(model, pieces, references):
    """The slow way: the whole sequence again for every code."""
    codes = torch.zeros(N, dtype=torch.long)
    for i in range(N):
        ids, positions = build_sequence(CONFIG, pieces, references, codes)
        x = model.hidden(ids[None], positions[None])[0, i - N]
        coarse = model.coarse_logits(x).argmax()
        codes[i] = coarse * CONFIG.codebook_size + model.fine_logits(x, coarse).argmax()
    return codes


def test_guidance_of_one_is_the_conditional_model(model):
    prompt = (["The cat in ", ".\na cat"], [random_codes(1)])
    assert len(guidance_branches(*prompt, 1.0, 1.0)) == 1
    assert torch.equal(generate(model, [prompt], temperature=0)[0], greedy(model, *prompt))


def test_guidance_is_null_plus_two_differences(model):
    prompt = (["The cat in ", ".\na cat"], [random_codes(1)])
    full, image, null = (prefix_logits(model, *branch) for branch in (prompt, hide_condition(*prompt, "text"), ([""], [])))
    wanted = null + 3.0 * (image - null) + 2.0 * (full - image)
    got = sum(weight * prefix_logits(model, p, r) for weight, p, r in guidance_branches(*prompt, 3.0, 2.0))
    assert torch.allclose(got, wanted, atol=1e-4)
    assert generate(model, [prompt], temperature=0, cfg_image=3.0, cfg_text=2.0)[0, 0] // CONFIG.codebook_size == wanted.argmax()


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(model):
    prompts = [(["a cat"], []), (["The dog in ", ".\na small dog"], [random_codes(1)])]
    four = generate(model, prompts, n=2, seed=5, cfg_image=2.0, cfg_text=2.0)
    assert torch.equal(four[3], generate(model, prompts[1:], seed=8, cfg_image=2.0, cfg_text=2.0)[0])
    assert not torch.equal(four[2], four[3])


def test_top_k_of_one_is_the_likeliest_code(model):
    prompt = [(["a cat"], [])]
    assert torch.equal(generate(model, prompt, top_k=1), generate(model, prompt, temperature=0))


def test_every_task_has_a_prompt_and_a_guidance():
    assert set(mentor.PROMPTS) == set(GUIDANCE) == set(data.TASKS)


def test_training_step_and_decode_step_on_the_meta_device():
    """Meta tensors refuse to meet a CPU tensor: what passes here leaves no tensor behind on another device."""
    model = Mentor(CONFIG).to("meta")
    ids, positions, lengths = (x.to("meta") for x in pad_sequences([build_sequence(CONFIG, ["a"], [], random_codes())]))
    model(ids, positions, lengths, torch.zeros(1, N, dtype=torch.long, device="meta")).mean().backward()
    assert all(p.grad.device.type == "meta" for p in model.parameters())
    x, caches = model.prefill(ids, positions, lengths)
    x = model.decode(model.coarse_logits(x).argmax(-1), positions[:, -1], lengths, caches)
    logits = model.fine_logits(x, model.coarse_logits(x).argmax(-1))
    assert logits.shape == (1, CONFIG.codebook_size) and logits.device.type == "meta"


@pytest.mark.parametrize("part", ["step", "decode"])
def test_compiled_equals_eager(model, part):
    if part == "step":
        batch = (*pad_sequences([build_sequence(CONFIG, ["a cat"], [], random_codes())]), random_codes()[None])
        compiled, eager = torch.compile(model, dynamic=False)(*batch), model(*batch)
        gradients = [torch.autograd.grad(loss.mean(), list(model.parameters())) for loss in (compiled, eager)]
        assert torch.allclose(compiled, eager, atol=1e-4)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))
    else:
        prompt = [(["a cat"], [])]
        eager = generate(model, prompt, temperature=0)
        model.decode = torch.compile(model.decode, dynamic=False)
        assert torch.equal(generate(model, prompt, temperature=0), eager)


# -- checkpoints


def test_checkpoint_with_code_in_it_executes_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "bomb.pt"
    torch.save({"config": dataclasses.asdict(CONFIG), "model": Bomb(), "tokenizer": {}, "stage": 2}, path)
    with pytest.raises(ValueError, match="bomb.pt: not a checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_checkpoint_of_another_version_is_refused_by_name(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"config": dataclasses.asdict(CONFIG), "model": {}, "tokenizer": {}, "stage": 2}, path)
    with pytest.raises(ValueError, match="old.pt: written by another version"):
        load_checkpoint(path)
