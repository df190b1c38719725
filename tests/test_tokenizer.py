"""Pictures in and out, and the VQ tokenizer."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mentor import Config
from tokenizer import Tokenizer, nearest, to_arrays, to_images
from train import psnr

SMALL = Config(n_codebooks=2, codebook_size=64, code_dim=8, channels=16)


def small(**changes):
    torch.manual_seed(0)
    return Tokenizer(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize("n_codebooks", [1, 2, 4])
def test_shapes_and_ranges(n_codebooks):
    tokenizer, images = small(n_codebooks=n_codebooks), torch.rand(2, 3, 32, 32) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 16, n_codebooks) and codes.dtype == torch.long and codes.max() < 64
    drawn = tokenizer.decode(codes)
    assert drawn.shape == images.shape and drawn.abs().max() <= 1
    assert small(downsample=16).encode(images).shape == (2, 4, 2)


def test_each_code_is_the_nearest_to_what_the_coarser_ones_leave():
    tokenizer, z = small(n_codebooks=3), F.normalize(torch.randn(2, 25, 8), dim=-1)
    codes, left = tokenizer.quantize(z), z
    for level, codebook in enumerate(tokenizer.codebooks):
        wanted = torch.cdist(left, codebook[None].expand(2, -1, -1)).argmin(-1)
        assert torch.equal(codes[..., level], wanted)
        left = left - codebook[wanted]
    assert torch.allclose(tokenizer.look_up(codes).sum(2), z - left, atol=1e-6)


def test_finer_codebooks_bring_the_sum_nearer():
    tokenizer = small(n_codebooks=4)
    z = F.normalize(torch.randn(4, 100, 8), dim=-1)
    errors = (tokenizer.look_up(tokenizer.quantize(z)).cumsum(2) - z[:, :, None]).norm(dim=-1).mean((0, 1))
    assert errors.tolist() == sorted(errors.tolist(), reverse=True)


def test_the_search_in_parts_finds_what_the_search_at_once_does():
    vectors, codebook = torch.randn(3, 3000, 8), torch.randn(64, 8)
    assert torch.equal(nearest(vectors, codebook), torch.cdist(vectors, codebook[None]).argmin(-1))


def test_straight_through_gradient_reaches_the_encoder():
    """With the encoder's own vectors as codebook the quantisation terms are 0: only the picture's error is
    left."""
    tokenizer, images = small(), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        tokenizer.codebooks[0, :32] = tokenizer.features(images).flatten(0, 1)
        tokenizer.codebooks[1, 0] = 0
    loss, codes, z = tokenizer(images)
    assert torch.allclose(tokenizer.look_up(codes).sum(2), z, atol=1e-5)
    loss.backward()
    assert tokenizer.encoder[0].weight.grad.abs().max() > 1e-6


def test_decoder_sees_the_code_and_not_the_encoders_vector():
    tokenizer, images = small(), torch.rand(2, 3, 32, 32) * 2 - 1
    seen = []
    tokenizer.decoder.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    _, codes, _ = tokenizer(images)
    assert torch.allclose(seen[0].flatten(2).transpose(1, 2), tokenizer.look_up(codes).sum(2), atol=1e-5)


def test_a_picture_has_the_same_codes_in_training_as_in_drawing():
    """Encoding is in fp32 whatever is around it: under bf16 some would come out otherwise."""
    tokenizer, images = small(), torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        codes = tokenizer.encode(images)
        rough = tokenizer.quantize(tokenizer.features(images))
    assert torch.equal(codes, tokenizer.encode(images)) and not torch.equal(codes, rough)


def test_each_codebook_gets_its_whole_quantisation_term_and_the_encoder_a_quarter():
    """With the commitment weight on the wrong term the codebooks would learn four times too slowly."""
    tokenizer, images = small(n_codebooks=3), torch.rand(2, 3, 32, 32) * 2 - 1
    torch.nn.init.zeros_(
        tokenizer.decoder[0].weight
    )  # nothing of the picture's error reaches codebook or encoder
    loss, codes, _ = tokenizer(images)
    z = tokenizer.features(images)
    first, second, third = tokenizer.look_up(codes).unbind(2)
    to_codebooks = sum(
        (vector - left.detach()).pow(2).mean()
        for vector, left in ((first, z), (second, z - first), (third, z - first - second))
    )
    to_encoder = 0.25 * (z - (first + second + third).detach()).pow(2).mean()
    for parameter, wanted in ((tokenizer.codebooks, to_codebooks), (tokenizer.encoder[0].weight, to_encoder)):
        wanted = torch.autograd.grad(wanted, parameter, retain_graph=True)[0]
        got = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
        assert torch.allclose(got, wanted, atol=1e-7) and wanted.abs().max() > 1e-5


def test_dead_codes_move_onto_what_is_left_to_name():
    tokenizer, z = small(), F.normalize(torch.randn(2, 16, 8), dim=-1)
    before, codes = tokenizer.codebooks.detach().clone(), torch.zeros(2, 16, 2, dtype=torch.long)
    for _ in range(3):
        tokenizer.restart_dead_codes(codes, z, patience=3)
    assert torch.equal(tokenizer.codebooks[:, 0], before[:, 0])  # the ones in use stay
    for level, to_name in enumerate((z, z - before[0, 0])):
        moved = tokenizer.codebooks[level, 1:].detach()
        assert torch.cdist(moved, to_name.flatten(0, 1)).min(1).values.max() < 1e-3
    assert torch.all(tokenizer.idle == 0)


def test_dead_codes_seldom_restart_from_what_is_named_well():
    """Nine patches in ten are flat and exactly named: the dead ones go to the tenth."""
    tokenizer = small()
    flat, odd = tokenizer.codebooks[0, 0].detach() + tokenizer.codebooks[1, 0].detach(), -torch.ones(8)
    z = torch.cat((flat.expand(1, 90, 8), odd.expand(1, 10, 8)), 1)
    tokenizer.restart_dead_codes(torch.zeros(1, 100, 2, dtype=torch.long), z, patience=1)
    assert torch.allclose(tokenizer.codebooks[1, 1:], odd - tokenizer.codebooks[0, 0], atol=1e-6)


def test_codes_stay_alive_in_training_and_pictures_come_back(trained):
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    first, *_, last = [r["held_out"] for r in records if r["stage"] == 0 and "held_out" in r]
    assert min(last["codes"]) > 64 / 3
    assert last["psnr"] > first["psnr"] + 1 and last["psnr"] > 18  # (an untrained one has 10)


def test_a_patch_keeps_its_codes_wherever_it_stands_and_whatever_is_beside_it():
    tokenizer, image, other = small(), *torch.rand(2, 1, 3, 64, 64) * 2 - 1
    other[..., 8:40, 16:48] = image[..., 0:32, 0:32]  # 4 x 4 patches, one down and two to the right
    a, b = (tokenizer.encode(x[None]).view(8, 8, 2) for x in (image[0], other[0]))
    assert torch.equal(a[0:4, 0:4], b[1:5, 2:6]) and not torch.equal(a[4:6], b[5:7])


def test_images_survive_the_way_to_tensors_and_back():
    arrays = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = to_images(list(arrays), torch.device("cpu"))
    assert images.shape == (2, 3, 8, 8) and np.array_equal(to_arrays(images), arrays)


def test_psnr_of_known_values():
    assert abs(psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)) - 20.0) < 1e-4
