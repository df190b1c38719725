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
    assert codes.shape == (2, 16) and codes.dtype == torch.long and codes.max() < 64 * 64
    drawn = small().decode(codes)
    assert drawn.shape == images.shape and drawn.abs().max() <= 1
    assert Tokenizer(downsample=16, codebook_size=64, channels=16).encode(images).shape == (2, 4)


def test_the_coarse_code_is_the_nearest_and_the_fine_one_the_nearest_to_the_rest():
    tokenizer, z = small(), torch.nn.functional.normalize(torch.randn(50, 8), dim=-1)
    coarse_book, fine_book = tokenizer.books().detach()
    assert torch.allclose(coarse_book.norm(dim=-1), torch.ones(64))
    coarse = torch.cdist(z, coarse_book).argmin(-1)
    fine = torch.cdist(z - coarse_book[coarse], fine_book).argmin(-1)
    assert torch.equal(tokenizer.nearest(z), coarse * 64 + fine)
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.vectors(coarse * 64 + fine), (coarse_book[coarse], fine_book[fine])))


def test_straight_through_gradient_reaches_the_encoder():
    """With the encoder's own vectors as codebook the quantisation terms are 0: only the picture's error is left."""
    tokenizer, images = small(), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        tokenizer.codebook[0, :32] = tokenizer.features(images).flatten(0, 1)
        tokenizer.codebook[1, 0] = 0
    loss, codes, z = tokenizer(images)
    assert torch.allclose(sum(tokenizer.vectors(codes)), z, atol=1e-5)
    loss.backward()
    assert tokenizer.encoder[0].weight.grad.abs().max() > 1e-6


def test_decoder_sees_the_code_and_not_the_encoders_vector():
    tokenizer, images = small(), torch.rand(2, 3, 32, 32) * 2 - 1
    seen = []
    tokenizer.decoder.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    _, codes, _ = tokenizer(images)
    assert torch.allclose(seen[0].flatten(2).transpose(1, 2), sum(tokenizer.vectors(codes)), atol=1e-5)


def test_search_for_the_nearest_code_is_not_done_in_bf16():
    tokenizer, z = small(), torch.nn.functional.normalize(torch.randn(8, 500, 8), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        codes = tokenizer.nearest(z)
    assert torch.equal(codes, tokenizer.nearest(z))


def test_codebook_gets_the_whole_quantisation_term_and_the_encoder_a_quarter():
    """With the commitment weight on the wrong term the codebook would learn four times too slowly."""
    tokenizer, images = small(), torch.rand(2, 3, 32, 32) * 2 - 1
    torch.nn.init.zeros_(tokenizer.decoder[0].weight)  # nothing of the picture's error reaches codebook or encoder
    loss, codes, _ = tokenizer(images)
    z = tokenizer.features(images)
    coarse, fine = tokenizer.vectors(codes)
    to_codebooks = (coarse - z).pow(2).mean() + (fine - (z - coarse).detach()).pow(2).mean()
    for parameter, wanted in ((tokenizer.codebook, to_codebooks), (tokenizer.encoder[0].weight, 0.25 * (coarse + fine - z).pow(2).mean())):
        wanted = torch.autograd.grad(wanted, parameter, retain_graph=True)[0]
        got = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
        assert torch.allclose(got, wanted, atol=1e-7) and wanted.abs().max() > 1e-5


def test_dead_codes_move_onto_what_is_to_be_named():
    tokenizer, z = small(), torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1)
    before, codes = tokenizer.codebook.detach().clone(), torch.zeros(2, 16, dtype=torch.long)
    for _ in range(3):
        tokenizer.restart_dead_codes(codes, z, patience=3)
    assert torch.equal(tokenizer.codebook[:, 0], before[:, 0])  # the ones in use stay
    for book, to_name in enumerate((z, z - torch.nn.functional.normalize(before[0, 0], dim=-1))):
        assert torch.cdist(tokenizer.codebook[book, 1:].detach(), to_name.flatten(0, 1)).min(1).values.max() < 1e-3
    assert torch.all(tokenizer.idle == 0)


def test_codes_stay_alive_in_training_and_pictures_come_back(trained):
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    first, *_, last = [r["held_out"] for r in records if r["stage"] == 0 and "held_out" in r]
    for used, perplexity in (last["coarse"], last["fine"]):
        assert used > 64 / 3 and perplexity > 15
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
