"""The VQ image tokenizer: an image becomes a few rows of codes, and codes become an image.

    images (B, 3, H, W) in [-1, 1]  --encode-->  codes (B, N), N = (H / downsample)^2  --decode-->  images

A convolutional encoder, two codebooks, a convolutional decoder. A patch's vector is a unit vector (LlamaGen: dimension 8,
l2-normalised); the first codebook names it coarsely, the second what is then still missing (residual quantisation). The
pair is one code, coarse * codebook_size + fine: a patch stays one place in the transformer's sequence.
The first layer already sees patches of downsample / 2 pixels, and the decoder ends with them: convolutions at full
resolution would cost most of the time on a small machine. Normalisation is per position, never over the image, so that
a subject that moves by whole patches keeps its codes.
"""
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """x + conv(silu(conv(norm(x)))), 3 x 3; starts as the identity. The weights are kept as the matrices that they are,
    (channels, 3 * 3 * channels), because Muon trains matrices."""

    def __init__(self, channels):
        super().__init__()
        bound = (9 * channels) ** -0.5
        self.conv1 = nn.Parameter(torch.empty(channels, 9 * channels).uniform_(-bound, bound))
        self.conv2 = nn.Parameter(torch.zeros(channels, 9 * channels))
        self.bias1, self.bias2 = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, x):  # (B, C, h, w)
        C = x.shape[1]
        conv1, conv2 = (w.view(C, 3, 3, C).permute(0, 3, 1, 2) for w in (self.conv1, self.conv2))  # (C, C, 3, 3)
        y = F.rms_norm(x.permute(0, 2, 3, 1), (C,)).permute(0, 3, 1, 2)  # over C, position by position
        y = F.silu(F.conv2d(y, conv1, self.bias1, padding=1))
        return x + F.conv2d(y, conv2, self.bias2, padding=1)


class Tokenizer(nn.Module):
    def __init__(self, downsample=8, codebook_size=1024, code_dim=8, channels=80):
        """downsample: pixels a side of the patch that one code stands for, an even number.
        codebook_size: of each of the two codebooks.
        channels: width of the networks at half that patch; twice as wide where the codes are.

        The decoder is twice as deep as the encoder: naming a patch is easier than drawing it.
        """
        super().__init__()
        stem, wide = downsample // 2, 2 * channels
        self.encoder = nn.Sequential(                       # (B, 3, H, W)
            nn.Conv2d(3, channels, stem, stride=stem),      # (B, channels, 2h, 2w), h = H / downsample
            Block(channels),
            nn.Conv2d(channels, wide, 2, stride=2),         # (B, 2 channels, h, w)
            Block(wide),
            nn.Conv2d(wide, code_dim, 1),                   # (B, code_dim, h, w)
        )
        self.decoder = nn.Sequential(                       # (B, code_dim, h, w)
            nn.Conv2d(code_dim, wide, 3, padding=1),        # (B, 2 channels, h, w)
            Block(wide),
            Block(wide),
            nn.Conv2d(wide, 4 * channels, 1),
            nn.PixelShuffle(2),                             # (B, channels, 2h, 2w)
            Block(channels),
            Block(channels),
            nn.Conv2d(channels, 3 * stem * stem, 3, padding=1),
            nn.PixelShuffle(stem),                          # (B, 3, H, W)
        )
        scale = torch.tensor([1.0, 0.3]).view(2, 1, 1)  # what a unit vector leaves is shorter
        self.codebook = nn.Parameter(scale * F.normalize(torch.randn(2, codebook_size, code_dim), dim=-1))
        self.register_buffer("idle", torch.zeros(2, codebook_size))  # steps since each was last chosen
        self.to(memory_format=torch.channels_last)

    def features(self, images):
        """What the encoder says of each patch: (B, 3, H, W) -> unit vectors (B, N, code_dim)."""
        z = self.encoder(images.contiguous(memory_format=torch.channels_last))  # (B, code_dim, h, w)
        return F.normalize(z.float().flatten(2).transpose(1, 2), dim=-1)        # (B, N, code_dim)

    def books(self):
        """The two codebooks (2, codebook_size, code_dim), the coarse vectors at unit length."""
        return torch.stack((F.normalize(self.codebook[0], dim=-1), self.codebook[1]))

    def nearest(self, z):
        """The codes of unit vectors: the coarse vector with the largest cosine, then the fine one that is nearest to what
        it leaves. (..., code_dim) -> (...)"""
        coarse_book, fine_book = self.books()
        with torch.autocast(z.device.type, enabled=False):  # in bf16 close codes would tie, and the wrong one could win
            coarse = (z @ coarse_book.T).argmax(-1)
            rest = z - coarse_book[coarse]
            fine = (rest @ fine_book.T - fine_book.pow(2).sum(-1) / 2).argmax(-1)
        return coarse * len(fine_book) + fine

    def vectors(self, codes):
        """Codes (B, N) -> their coarse and their fine vectors, (B, N, code_dim) each; the sum stands for the patch."""
        coarse_book, fine_book = self.books()
        return coarse_book[codes // len(fine_book)], fine_book[codes % len(fine_book)]

    def render(self, vectors):
        """What the decoder draws from a vector a patch: (B, N, code_dim) -> (B, 3, H, W)."""
        side = int(vectors.shape[1] ** 0.5)
        z = vectors.transpose(1, 2).unflatten(2, (side, side))  # (B, code_dim, h, w)
        return self.decoder(z.contiguous(memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> codes (B, N), row by row."""
        return self.nearest(self.features(images))

    @torch.no_grad()
    def decode(self, codes):
        """Codes (B, N) -> images (B, 3, H, W) in [-1, 1]."""
        return self.render(sum(self.vectors(codes))).clamp(-1, 1)

    def forward(self, images):
        """One training pass: (B, 3, H, W) -> loss, codes (B, N), z (B, N, code_dim): the encoder's vectors."""
        z = self.features(images)
        codes = self.nearest(z.detach())
        coarse, fine = self.vectors(codes)
        q = (coarse + fine).detach()
        # Each codebook goes to what it is to name (weight 1), and the encoder stays near its codes (weight 0.25).
        vq = F.mse_loss(coarse, z.detach()) + F.mse_loss(fine, (z - coarse).detach()) + 0.25 * F.mse_loss(z, q)
        drawn = self.render(z + (q - z).detach())  # straight-through: the decoder sees q, the gradient goes to z
        return F.mse_loss(drawn, images) + 0.2 * F.l1_loss(drawn, images) + vq, codes, z.detach()

    @torch.no_grad()
    def restart_dead_codes(self, codes, z, patience=100):
        """After a step: vectors that nobody chose for `patience` steps move onto what this batch has to name.

        Without it most of them die in the first minutes and never come back.
        """
        used = torch.zeros_like(self.idle)
        for book, chosen in enumerate((codes // self.idle.shape[1], codes % self.idle.shape[1])):
            used[book, chosen.flatten()] = 1
        if dist.is_initialized():  # by any of the processes
            dist.all_reduce(used, dist.ReduceOp.MAX)
        self.idle.add_(1).mul_(1 - used)
        dead = self.idle >= patience
        to_name = torch.stack((z, z - self.vectors(codes)[0])).flatten(1, 2)  # (2, B * N, code_dim)
        chosen = torch.randint(to_name.shape[1], (self.idle.shape[1],), device=z.device)
        self.codebook.copy_(torch.where(dead[..., None], to_name[:, chosen], self.codebook))
        self.idle.masked_fill_(dead, 0)
        if dist.is_initialized():  # every process must keep the same codebooks: the first one's
            dist.broadcast(self.codebook.data, 0)


def psnr(a, b):
    """Peak signal-to-noise ratio of images in [-1, 1], in dB, averaged over the pictures. (B, 3, H, W) x 2 -> float"""
    mse = (a - b).pow(2).flatten(1).mean(1)  # (B,)
    return (10 * torch.log10(4 / mse.clamp_min(1e-10))).mean().item()


def codebook_usage(codes, codebook_size):
    """How many of `codebook_size` occur at all, and their perplexity: as many, equally likely, would carry as much."""
    share = codes.flatten().bincount(minlength=codebook_size) / codes.numel()
    return int((share > 0).sum()), round(torch.special.entr(share).sum().exp().item(), 1)


@torch.no_grad()
def quality(tokenizer, images):
    """How well pictures survive: (B, 3, H, W) -> the same after encode and decode, and dict(psnr in dB, coarse, fine):
    of each codebook, the number of vectors that occur at all in these pictures, and their perplexity."""
    codes = tokenizer.encode(images)
    drawn, size = tokenizer.decode(codes), tokenizer.codebook.shape[1]
    return drawn, {"psnr": round(psnr(drawn, images), 2), "coarse": codebook_usage(codes // size, size),
                   "fine": codebook_usage(codes % size, size)}


def to_images(arrays, device):
    """uint8 (H, W, 3) arrays -> (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_arrays(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)"""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
