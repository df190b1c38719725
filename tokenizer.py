"""The VQ tokenizer: images to codes and back.

    images (B, 3, H, W) in [-1, 1]  --encode-->  codes (B, N, n_codebooks)  --decode-->  images
    N = (H / downsample)^2 patches, row by row; a patch has one code from each codebook, coarse to fine

The encoder gives one unit vector per patch (l2-normalised, as in LlamaGen, arXiv 2406.06525). Residual
quantisation approximates it step by step: the first codebook takes its nearest vector, and each further
codebook takes the nearest to what the coarser ones leave over. Their sum stands for the patch.

The encoder sees each patch alone. So a subject that moves by whole patches keeps its codes, whatever is
behind it, and drawing it elsewhere starts out as copying. The decoder sees the neighbours: it hides seams.
"""
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- Between pictures (uint8 arrays) and images (tensors) -------------------------------------------------

def from_bytes(pictures):
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1], on the same device"""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(arrays, device):
    """uint8 (H, W, 3) arrays -> (B, 3, H, W) in [-1, 1]"""
    return from_bytes(torch.from_numpy(np.stack(arrays)).to(device))


def to_arrays(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)"""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


# ---- The tokenizer ----------------------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))), which starts as the identity. Its weights are matrices (channels,
    kernel_size^2 * channels) and not an nn.Conv2d's of four dimensions: torch's Muon takes only matrices."""

    def __init__(self, channels, kernel_size=3):
        super().__init__()
        self.kernel_size, n_inputs = kernel_size, kernel_size ** 2 * channels
        bound = n_inputs ** -0.5
        self.conv1 = nn.Parameter(torch.empty(channels, n_inputs).uniform_(-bound, bound))
        self.conv2 = nn.Parameter(torch.zeros(channels, n_inputs))
        self.bias1 = nn.Parameter(torch.zeros(channels))
        self.bias2 = nn.Parameter(torch.zeros(channels))

    def forward(self, x):  # (B, C, h, w)
        y = F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],)).permute(0, 3, 1, 2)  # over C, at each position
        y = F.silu(self.conv(y, self.conv1, self.bias1))
        return x + self.conv(y, self.conv2, self.bias2)

    def conv(self, x, matrix, bias):
        C, k = x.shape[1], self.kernel_size
        kernel = matrix.view(C, k, k, C).permute(0, 3, 1, 2)  # (C out, C in, k, k)
        return F.conv2d(x, kernel, bias, padding=k // 2)


def nearest(vectors, codebook):
    """The index of the nearest vector of a codebook (codebook_size, code_dim): (..., code_dim) -> (...)"""
    flat, half_squares = vectors.flatten(0, -2), codebook.pow(2).sum(-1) / 2
    # |v - c|^2 is smallest where v . c - |c|^2 / 2 is largest. (All rows at once would take gigabytes.)
    found = [(rows @ codebook.T - half_squares).argmax(-1) for rows in flat.split(4096)]
    return torch.cat(found).view(vectors.shape[:-1])


class Tokenizer(nn.Module):
    def __init__(self, config):
        """config: mentor.Config. The decoder has `channels` channels at patches of downsample / 2 pixels
        (full resolution would take most of the time), and twice as many at the codes. The encoder has four
        times as many, since its layers see one position only."""
        super().__init__()
        code_dim, channels = config.code_dim, config.channels
        patch, stem, wide = config.downsample, config.downsample // 2, 2 * channels
        self.encoder = nn.Sequential(                       # (B, 3, H, W)
            nn.Conv2d(3, 2 * wide, patch, stride=patch),    # (B, 4 channels, h, w), h = H / downsample
            ResidualBlock(2 * wide, kernel_size=1),
            ResidualBlock(2 * wide, kernel_size=1),
            nn.Conv2d(2 * wide, code_dim, 1),               # (B, code_dim, h, w)
        )
        self.decoder = nn.Sequential(                       # (B, code_dim, h, w)
            nn.Conv2d(code_dim, wide, 3, padding=1),        # (B, 2 channels, h, w)
            ResidualBlock(wide),
            ResidualBlock(wide),
            nn.Conv2d(wide, 4 * channels, 1),
            nn.PixelShuffle(2),                             # (B, channels, 2h, 2w)
            ResidualBlock(channels),
            ResidualBlock(channels),
            nn.Conv2d(channels, 3 * stem * stem, 3, padding=1),
            nn.PixelShuffle(stem),                          # (B, 3, H, W)
        )
        codebooks = F.normalize(torch.randn(config.n_codebooks, config.codebook_size, code_dim), dim=-1)
        norms = 0.3 ** torch.arange(config.n_codebooks)  # coarser codes leave less of a unit vector
        self.codebooks = nn.Parameter(norms[:, None, None] * codebooks)
        self.register_buffer("idle", torch.zeros(codebooks.shape[:2]))  # steps since each code was chosen
        self.to(memory_format=torch.channels_last)

    def features(self, images):
        """The encoder's vector for each patch: (B, 3, H, W) -> unit vectors (B, N, code_dim)."""
        z = self.encoder(images.contiguous(memory_format=torch.channels_last))  # (B, code_dim, h, w)
        return F.normalize(z.float().flatten(2).transpose(1, 2), dim=-1)        # (B, N, code_dim)

    @torch.no_grad()
    def quantize(self, z):
        """Residual quantisation: (B, N, code_dim) -> codes (B, N, n_codebooks), coarse to fine."""
        codes, residual = [], z
        with torch.autocast(z.device.type, enabled=False):  # in bf16 near codes tie: the wrong one may win
            for codebook in self.codebooks:
                codes.append(nearest(residual, codebook))
                residual = residual - codebook[codes[-1]]
        return torch.stack(codes, -1)

    def look_up(self, codes):
        """Codes (B, N, n_codebooks) -> their vectors (B, N, n_codebooks, code_dim); a patch is their sum."""
        return self.codebooks[torch.arange(codes.shape[-1], device=codes.device), codes]

    def render(self, vectors):
        """The decoder's image of one vector per patch: (B, N, code_dim) -> (B, 3, H, W)."""
        side = int(vectors.shape[1] ** 0.5)
        z = vectors.transpose(1, 2).unflatten(2, (side, side))  # (B, code_dim, h, w)
        return self.decoder(z.contiguous(memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> codes (B, N, n_codebooks). In fp32: the same in training and drawing."""
        in_fp32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), in_fp32:
            return self.quantize(self.features(images))

    @torch.no_grad()
    def decode(self, codes):
        """Codes (B, N, n_codebooks) -> images (B, 3, H, W) in [-1, 1]."""
        return self.render(self.look_up(codes).sum(2)).clamp(-1, 1)

    def forward(self, images):
        """One training pass: (B, 3, H, W) -> loss, codes (B, N, n_codebooks), z (B, N, code_dim).

        loss = |image - decoded|^2 + 0.2 |image - decoded| + 0.25 |z - sg(quantized)|^2
               + sum over codebooks of |sg(residual) - vector|^2,    sg: no gradient flows into it
        """
        z = self.features(images)
        codes = self.quantize(z.detach())
        quantized, codebook_loss = torch.zeros_like(z), 0.0  # (B, N, code_dim)
        for vector in self.look_up(codes).unbind(2):  # (B, N, code_dim) each, coarse to fine
            residual = z.detach() - quantized
            codebook_loss = codebook_loss + F.mse_loss(vector, residual)
            quantized = quantized + vector.detach()
        commitment_loss = F.mse_loss(z, quantized)
        decoded = self.render(z + (quantized - z).detach())  # straight-through: its gradient goes to z
        image_loss = F.mse_loss(decoded, images) + 0.2 * F.l1_loss(decoded, images)
        return image_loss + codebook_loss + 0.25 * commitment_loss, codes, z.detach()

    @torch.no_grad()
    def restart_dead_codes(self, codes, z, patience=100):
        """After a step on z (B, N, code_dim) with codes (B, N, n_codebooks): a code that was not chosen for
        `patience` steps moves onto a residual of this batch, the likelier the more the codes leave of it.
        Without restarts most codes die in the first minutes and never come back."""
        codes, residual = codes.flatten(0, 1).T, z.flatten(0, 1)  # (n_codebooks, B * N), (B * N, code_dim)
        used = torch.zeros_like(self.idle).scatter_(1, codes, 1)
        if dist.is_initialized():  # a code is used if any process uses it
            dist.all_reduce(used, dist.ReduceOp.MAX)
        self.idle.add_(1).mul_(1 - used)
        dead = self.idle >= patience
        for codebook, code, is_dead in zip(self.codebooks, codes, dead):
            before, residual = residual, residual - codebook[code]
            weights = residual.pow(2).sum(-1).nan_to_num() + 1e-12  # (B * N,)
            chosen = weights.multinomial(len(codebook), replacement=True)
            codebook.copy_(torch.where(is_dead[:, None], before[chosen], codebook))
        self.idle.masked_fill_(dead, 0)
        if dist.is_initialized():  # every process must keep the same codebooks: the first one's
            dist.broadcast(self.codebooks.data, 0)
