"""The VQ image tokenizer: an image becomes a few rows of codes, and codes become an image.

    images (B, 3, H, W) in [-1, 1]  --encode-->  codes (B, N), N = (H / downsample)^2  --decode-->  images

A convolutional encoder, a codebook of unit vectors (LlamaGen: dimension 8, l2-normalised), a convolutional decoder.
Both ends work on patches from the start: on a small machine only fewer multiplications are faster. Normalisation is
per position, never over the image, so that a subject that moves by whole patches keeps its codes.
"""
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """x + conv(silu(conv(norm(x)))); starts as the identity."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):  # (B, C, h, w)
        y = F.rms_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)  # over C, position by position
        return x + self.conv2(F.silu(self.conv1(y)))


class Tokenizer(nn.Module):
    def __init__(self, downsample=8, codebook_size=4096, code_dim=8, channels=80):
        """downsample: pixels a side of the patch that one code stands for, an even number.
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
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebook_size, code_dim), dim=-1))
        self.register_buffer("idle", torch.zeros(codebook_size))  # steps since each code was last chosen
        self.to(memory_format=torch.channels_last)

    def features(self, images):
        """What the encoder says of each patch: (B, 3, H, W) -> unit vectors (B, N, code_dim)."""
        z = self.encoder(images.contiguous(memory_format=torch.channels_last))  # (B, code_dim, h, w)
        return F.normalize(z.float().flatten(2).transpose(1, 2), dim=-1)        # (B, N, code_dim)

    def nearest(self, z):
        """The nearest code of each unit vector: on the sphere, the one with the largest cosine. (..., code_dim) -> (...)"""
        with torch.autocast(z.device.type, enabled=False):  # in bf16 close codes would tie, and the wrong one could win
            return (z @ F.normalize(self.codebook, dim=-1).T).argmax(-1)

    def vectors(self, codes):
        """The unit vectors of codes."""
        return F.normalize(self.codebook, dim=-1)[codes]  # (B, N) -> (B, N, code_dim)

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
        return self.render(self.vectors(codes)).clamp(-1, 1)

    def forward(self, images):
        """One training pass: (B, 3, H, W) -> loss, codes (B, N), z (B, N, code_dim): the encoder's vectors."""
        z = self.features(images)
        codes = self.nearest(z.detach())
        q = self.vectors(codes)
        # The codebook goes to the encoder's vectors (weight 1), and the encoder stays near its codes (weight 0.25).
        vq = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        drawn = self.render(z + (q - z).detach())  # straight-through: the decoder sees q, the gradient goes to z
        return F.mse_loss(drawn, images) + 0.2 * F.l1_loss(drawn, images) + vq, codes, z.detach()

    @torch.no_grad()
    def restart_dead_codes(self, codes, z, patience=100):
        """After a step: codes that nobody chose for `patience` steps move onto random vectors of this batch.

        Without it most codes die in the first minutes and never come back.
        """
        used = torch.zeros_like(self.idle)
        used[codes.flatten()] = 1
        if dist.is_initialized():  # by any of the processes
            dist.all_reduce(used, dist.ReduceOp.MAX)
        self.idle.add_(1).mul_(1 - used)
        dead = self.idle >= patience
        chosen = torch.randint(z.shape[0] * z.shape[1], (len(dead),), device=z.device)
        self.codebook.copy_(torch.where(dead[:, None], z.flatten(0, 1)[chosen], self.codebook))
        self.idle.masked_fill_(dead, 0)
        if dist.is_initialized():  # every process must keep the same codebook: the first one's
            dist.broadcast(self.codebook.data, 0)


def psnr(a, b):
    """Peak signal-to-noise ratio of images in [-1, 1], in dB, averaged over the pictures. (B, 3, H, W) x 2 -> float"""
    mse = (a - b).pow(2).flatten(1).mean(1)  # (B,)
    return (10 * torch.log10(4 / mse.clamp_min(1e-10))).mean().item()


def codebook_usage(codes, codebook_size):
    """How many codes occur at all, and their perplexity: as many codes, equally likely, would carry as much."""
    share = codes.flatten().bincount(minlength=codebook_size) / codes.numel()
    return int((share > 0).sum()), torch.special.entr(share).sum().exp().item()


@torch.no_grad()
def quality(tokenizer, images):
    """How well pictures survive: (B, 3, H, W) -> the same after encode and decode, and dict(psnr, used, perplexity).

    psnr in dB; used: the number of codes that occur at all in these pictures.
    """
    codes = tokenizer.encode(images)
    drawn = tokenizer.decode(codes)
    used, perplexity = codebook_usage(codes, len(tokenizer.codebook))
    return drawn, {"psnr": round(psnr(drawn, images), 2), "used": used, "perplexity": round(perplexity, 1)}


def to_images(arrays, device):
    """uint8 (H, W, 3) arrays -> (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_arrays(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)"""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
