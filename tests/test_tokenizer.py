"""The VQ tokenizer."""
import json

import numpy as np
import torch

from tokenizer import Tokenizer, codebook_usage, psnr, to_arrays, to_images


def small():
    torch.manual_seed(0)
    return Tokenizer(codebook_size=64, channels=16)


def test_shapes_and_ranges():
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = small().encode(images)
    assert codes.shape == (2, 16) and codes.dtype == torch.long and codes.max() < 64
    drawn = small().decode(codes)
    assert drawn.shape == images.shape and drawn.abs().max() <= 1
    assert Tokenizer(downsample=16, codebook_size=64, channels=16).encode(images).shape == (2, 4)


def test_nearest_code_is_the_nearest():
    tokenizer, z = small(), torch.nn.functional.normalize(torch.randn(1, 50, 8), dim=-1)
    distances = torch.cdist(z, torch.nn.functional.normalize(tokenizer.codebook, dim=-1)[None])
    assert torch.equal(tokenizer.nearest(z), distances.argmin(-1))


def test_straight_through_gradient_reaches_the_encoder():
    tokenizer = small()
    with torch.no_grad():
        tokenizer.decoder[-2].weight.normal_()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    z = tokenizer.features(images)
    q = tokenizer.vectors(tokenizer.nearest(z))
    drawn = tokenizer.render(z + (q - z).detach())
    assert torch.allclose(drawn, tokenizer.render(q), atol=1e-5)  # the decoder sees the code's vector
    loss, codes, _ = tokenizer(images)
    loss.backward()
    assert tokenizer.encoder[0].weight.grad.abs().max() > 0
    assert tokenizer.codebook.grad[codes.unique()].abs().max() > 0


def test_codebook_gets_the_whole_quantisation_term_and_the_encoder_a_quarter():
    """With the commitment weight on the wrong term the codebook would learn four times too slowly."""
    tokenizer, images = small(), torch.rand(2, 3, 32, 32) * 2 - 1
    loss, codes, z = tokenizer(images)
    got = torch.autograd.grad(loss, tokenizer.codebook)[0]
    wanted = torch.autograd.grad((tokenizer.vectors(codes) - z).pow(2).mean(), tokenizer.codebook)[0]
    assert torch.allclose(got, wanted, atol=1e-7) and wanted.abs().max() > 1e-4


def test_dead_codes_move_onto_the_encoders_vectors():
    tokenizer, z = small(), torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1)
    before, codes = tokenizer.codebook.detach().clone(), torch.zeros(2, 16, dtype=torch.long)
    for _ in range(3):
        tokenizer.restart_dead_codes(codes, z, patience=3)
    assert torch.equal(tokenizer.codebook[0], before[0])  # the one in use stays
    nearest = torch.cdist(tokenizer.codebook[1:].detach(), z.flatten(0, 1)).min(1).values
    assert nearest.max() < 1e-3 and torch.all(tokenizer.idle == 0)


def test_codes_stay_alive_in_training_and_pictures_come_back(trained):
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    first, *_, last = [r["held_out"] for r in records if r["stage"] == 0 and "held_out" in r]
    assert last["used"] > 256 / 3 and last["perplexity"] > 40
    assert last["psnr"] > first["psnr"] + 2 and last["psnr"] > 16


def test_a_subject_moved_by_whole_patches_keeps_its_inner_codes():
    """Nothing in the encoder looks at the whole image: what is far away does not change a code."""
    tokenizer, image = small(), torch.zeros(1, 3, 128, 128)
    image[..., 32:96, 32:96] = torch.rand(1, 3, 64, 64)
    a, b = (tokenizer.encode(x).view(16, 16) for x in (image, image.roll((8, 16), (2, 3))))
    assert torch.equal(a[4:11, 4:10], b[5:12, 6:12])


def test_images_survive_the_way_to_tensors_and_back():
    arrays = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = to_images(list(arrays), torch.device("cpu"))
    assert images.shape == (2, 3, 8, 8) and np.array_equal(to_arrays(images), arrays)


def test_psnr_and_perplexity_of_known_values():
    assert abs(psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)) - 20.0) < 1e-4
    used, perplexity = codebook_usage(torch.tensor([[0, 1], [2, 3]]), 8)
    assert used == 4 and abs(perplexity - 4) < 1e-4
