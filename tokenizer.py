"""The ground floor: what the machine can do, pictures in and out, and the VQ tokenizer, pictures to codes.

    images (B, 3, H, W) in [-1, 1]  --encode-->  codes (B, N, n_codebooks)  --decode-->  images
    N = (H / downsample)^2 patches, row by row; a patch has one code from each codebook, coarse to fine

The encoder gives a unit vector per patch (l2-normalised, as in LlamaGen, arXiv 2406.06525). Residual
quantisation names it step by step: the first codebook takes its nearest vector, each further codebook the
nearest to what the coarser ones leave; their sum stands for the patch. The encoder sees each patch alone, so
that a subject that moves by whole patches keeps its codes whatever is behind it: drawing it elsewhere begins
as copying. The decoder does look at the neighbours, and so hides the seams.
"""
import contextlib
import functools
import os
import textwrap
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from torch import nn


class BadInput(Exception):
    """What the user can mend: ends a script with one line and exit code 2. All else is a bug of ours."""


# ---- What the machine can do ------------------------------------------------------------------------------

def has_bf16(device):
    """Whether the hardware multiplies bf16: CUDA since Ampere, CPUs with avx512_bf16 (others are slow)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def repeat(step, times, device):
    """Calls step() so many times; on CUDA by replaying a graph of it, with no Python between kernels."""
    if device.type != "cuda":
        for _ in range(times):
            step()
        return
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):  # what a first call sets up must not be captured; these steps count
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader may pin memory meanwhile
        step()
    for _ in range(times - 3):
        graph.replay()


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


# ---- Pictures in: from files, from the emoji font, drawn by code ------------------------------------------

warnings.simplefilter("error", Image.DecompressionBombWarning)  # 90 megapixels are no picture
BLACK, WHITE = (0, 0, 0, 255), (255, 255, 255, 255)


def read_image(path, least=None):
    """Any image file, turned as its EXIF says -> RGBA image where it is a cut-out, else RGB, on white.

    least: pixels that either side has to keep: a larger JPEG is decoded at a half, a quarter or an eighth,
    which is much faster. Raises BadInput, naming the file."""
    try:
        with Image.open(path) as image:
            if least:
                image.draft(None, (least, least))
            if image.mode[0] in "IF":  # I;16, I, F: convert() would clip them
                image = to_8_bits(image)
            if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
                image = ImageChops.invert(image)  # pillow inverts all; only Adobe's are inverted
            has_alpha = image.has_transparency_data
            image = ImageOps.exif_transpose(image).convert("RGBA" if has_alpha else "RGB")
            return image if not has_alpha or cuts_out(image.getchannel("A")) else over(image, WHITE)
    except Exception as error:  # a damaged file can fail anywhere inside pillow
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: not a readable image ({reason})") from error


def to_8_bits(image):
    """An image of 16 or 32 bits a pixel, whole numbers or floats -> L. White is the first of 1, 255 and
    65,535 that no pixel exceeds."""
    pixels = np.asarray(image, np.float64)
    least, most = pixels.min(), pixels.max()
    white = next((white for white in (1, 255, 65535) if most <= white), 0)
    if not white or not least >= 0:
        raise ValueError(f"its mode {image.mode} has pixels from {least:g} to {most:g}: save it with 8 bits")
    return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))


def cuts_out(alpha):
    """Whether it leaves a ground free: a quarter of the border. (Round corners, or holes, do not.)"""
    opaque = np.asarray(alpha) > 127
    if not opaque.any():
        raise ValueError("nothing in it is opaque")
    border = np.concatenate((opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]))
    return border.mean() < 0.75


def is_cutout(path):
    """Whether read_image gives RGBA. (Of a file without alpha the header alone is read.)"""
    with Image.open(path) as image:
        return image.has_transparency_data and read_image(path).mode == "RGBA"


def over(image, colour):
    """An RGB or RGBA image -> RGB image; where it is clear, `colour` (RGBA) shows."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
    return image.convert("RGB")


def square_of(image, size, share=1, x=0.5, y=0.5):
    """A square of an image, its side a share of the shorter one, at a share of the room -> size x size"""
    side = share * min(image.size)
    left, top = (at * (n - side) for at, n in zip((x, y), image.size))
    return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side), 3)


def open_square(path, size, rng=None):
    """Any image file -> RGB, size x size: the centred square, or by rng a part of it. Raises BadInput."""
    where = () if rng is None else rng.uniform((0.4, 0, 0), 1)
    return over(square_of(read_image(path, least=2 * size), size, *where), WHITE)


EMOJI_FONTS = {  # file: the one pixel size that its bitmaps have (Debian, Arch, Fedora, macOS, Windows)
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf": 109, "/usr/share/fonts/noto/NotoColorEmoji.ttf": 109,
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf": 109,
    "/System/Library/Fonts/Apple Color Emoji.ttc": 160, "C:/Windows/Fonts/seguiemj.ttf": 128}


@functools.cache
def emoji_font():
    found = (ImageFont.truetype(path, size) for path, size in EMOJI_FONTS.items() if os.path.exists(path))
    return next(found, None)


def draw_emoji(char):
    font = emoji_font()
    image = Image.new("RGBA", (2 * font.size, 2 * font.size))
    ImageDraw.Draw(image).text((font.size // 4, font.size // 4), char, font=font, embedded_color=True)
    return image


# Points around the middle; how far out every second one is.
SHAPES = {"circle": (64, 1), "triangle": (3, 1), "square": (4, 1), "pentagon": (5, 1), "hexagon": (6, 1),
          "star": (10, 0.45), "sun": (16, 0.45), "cross": (8, 0.45)}
COLOURS = {"red": (220, 40, 40), "green": (50, 170, 70), "blue": (50, 90, 220), "yellow": (240, 210, 50),
           "purple": (150, 60, 190), "orange": (245, 140, 40), "white": (240, 240, 240),
           "grey": (120, 120, 120)}


def draw_shape(recipe):
    shape, outer, inner = recipe.split()
    image, (n, inward) = Image.new("RGBA", (128, 128)), SHAPES[shape]
    turns = np.linspace(0, 2 * np.pi, n, endpoint=False)
    around = np.stack((np.sin(turns), -np.cos(turns)), 1)  # (n, 2)
    around[1::2] *= inward
    for radius, colour in ((60, outer), (30, inner)):
        ImageDraw.Draw(image).polygon((64 + radius * around).flatten().tolist(), fill=COLOURS[colour])
    return image


# Their words are exactly true. Colours: of the sky, top and foot, and of the ground.
BACKGROUNDS = {
    "on the grass": ((90, 170, 240), (205, 232, 250), (125, 195, 80), (60, 140, 50)),
    "on the beach": ((110, 190, 245), (210, 235, 250), (240, 220, 160), (225, 195, 130)),
    "in the snow": ((150, 185, 220), (225, 235, 245), (250, 250, 255), (210, 222, 240)),
    "in the desert": ((240, 180, 100), (252, 228, 175), (228, 175, 100), (190, 130, 70)),
    "in the city at night": ((12, 14, 45), (55, 45, 95), (48, 48, 58), (28, 28, 34)),
    "in the forest": ((150, 200, 190), (200, 225, 190), (85, 115, 55), (50, 80, 30)),
    "under water": ((90, 190, 225), (40, 130, 195), (30, 100, 170), (12, 45, 100)),
    "in space": ((6, 6, 22), (14, 10, 40), (14, 10, 40), (30, 12, 55)),
    "at sunset": ((95, 55, 125), (250, 150, 80), (120, 60, 80), (55, 30, 60)),
    "on the road": ((140, 195, 240), (220, 235, 245), (105, 105, 110), (75, 75, 80)),
    "in a room": ((238, 218, 190), (228, 205, 172), (165, 110, 68), (120, 75, 45)),
    **{f"on {'an' if name == 'orange' else 'a'} {name} background": (c,) * 4 for name, c in COLOURS.items()}}


@functools.lru_cache(maxsize=1500)
def draw_background(words, size, number):
    """The background of these words, each number with its light, horizon and details -> RGB, size x size."""
    rng = np.random.default_rng([number, list(BACKGROUNDS).index(words)])
    big = 2 * size  # drawn twice as large and averaged: smooth edges
    light = rng.uniform(0.9, 1.1) if words.endswith("background") else rng.uniform(0.9, 1.1, 2).repeat(2)
    colours = np.clip(np.array(BACKGROUNDS[words]) * np.reshape(light, (-1, 1)), 0, 255)  # (4, 3)
    sky, sky_low, ground, ground_low = colours
    # Horizon, place of a thing, dots: in 64ths of the canvas, like all details.
    h, x, dots = rng.uniform(33, 38), rng.uniform(8, 56), rng.uniform(0, 64, (12, 2))
    up, down = (np.linspace(0, 1, n)[:, None] for n in (int(h * big / 64), big - int(h * big / 64)))
    column = np.concatenate([sky + (sky_low - sky) * up, ground + (ground_low - ground) * down])  # (big, 3)
    image = Image.fromarray(np.broadcast_to(column[:, None], (big, big, 3)).astype(np.uint8))

    def disc(x, y, r, colour):
        return "ellipse", (x - r, y - r, x + r, y + r), colour
    def box(left, top, right, bottom, colour):
        return "rectangle", (left, top, right, bottom), colour
    def peak(x, top, width, bottom, colour):
        return "polygon", (x - width / 2, bottom, x, top, x + width / 2, bottom), colour

    towers = [(i * 11 - x / 5, h - 6 * (2 + int(dot) % 3)) for i, dot in enumerate(dots[:7, 1])]
    details = {
        "on the grass": [disc(x + dx, 10, r, (250, 250, 252)) for dx, r in ((-5, 3), (0, 4.5), (5, 3.5))],
        "on the beach": [box(0, h - 10, 64, h, (45, 130, 195)), box(0, h - 1.5, 64, h, (235, 245, 250))],
        "in the snow": [peak(x + dx, 10, 40, h, (175, 195, 218)) for dx in (-26, 4, 34)],
        "in the desert": [disc(x, 14, 6, (255, 240, 190))],
        "in the city at night":
            [box(left, top, left + 9, h, (32, 32, 52)) for left, top in towers]
            + [box(left + 2, y, left + 7, y + 2, (250, 220, 120)) for left, top in towers
               for y in np.arange(top + 2, h - 2, 6)],
        "in the forest": [peak(tree, 6, 16, h + 2, (35, 95, 50)) for tree in np.arange(5) * 16 - x / 4],
        "under water": [disc(*dot, 1.6, (150, 215, 240)) for dot in dots],
        "in space": [disc(*dot, 0.8, (255, 255, 230)) for dot in dots],
        "at sunset": [disc(x, 14, 6, (255, 240, 190))],
        "on the road": [box(0, h, 64, h + 3, (120, 160, 90)), box(0, 57, 64, 59, (240, 240, 225))],
        "in a room": [box(x - 7, 6, x + 7, 18, (110, 70, 40)), box(x - 5, 8, x + 5, 16, (250, 250, 245))]}
    draw = ImageDraw.Draw(image)
    for kind, corners, colour in details.get(words, []):
        getattr(draw, kind)([c * big / 64 for c in corners], fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


def draw_ground(size, rng, other):
    """A ground of any look: plain, a gradient, soft noise, a pattern, or another sprite's inside -> RGB"""
    kind = rng.choice(["gradient", "noise", "pattern", "inside"], p=[0.42, 0.23, 0.1, 0.25])
    colours, angle = rng.uniform(0, 255, (3, 3)), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / (size - 1) - 0.5
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == "gradient":
        n, share = rng.integers(1, 4), (along - along.min()) / np.ptp(along)  # of one colour it is plain
        image = np.stack([np.interp(share, np.linspace(0, 1, n), c[:n]) for c in colours.T], -1)
    elif kind == "pattern":
        period, squares = rng.uniform(0.08, 0.4), rng.uniform() < 0.5
        odd = (along / period % 1 < 0.5) ^ (squares & (across / period % 1 < 0.5))
        image = np.where(odd[..., None], colours[0], colours[1])
    elif kind == "noise":
        cells = rng.uniform(-1, 1, (rng.integers(2, 12),) * 2 + (3,)) * rng.uniform(20, 140) + colours[0]
        cells = Image.fromarray(np.clip(cells, 0, 255).astype(np.uint8))
        image = np.asarray(cells.resize((size, size), Image.Resampling.BICUBIC))
    else:
        flat = over(other, (*map(round, colours[0]), 255))
        image = np.asarray(square_of(flat, size, *rng.uniform((0.25, 0, 0), 1)))
    if rng.uniform() < 0.25:
        image = image + rng.normal(0, rng.uniform(2, 14), (size, size, 1))
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def turn_hue(image, turn):
    """An RGB or RGBA image, its hue turned: 256 is a full turn"""
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    hue = hue.point([(v + turn) % 256 for v in range(256)])
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if image.mode == "RGBA":
        turned.putalpha(image.getchannel("A"))
    return turned


def fill_outline(sprite, other):
    """One sprite's outline with another's pixels, or their mean: the inside must be looked at, too."""
    mean = other.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))[:3]  # weighed by its alpha
    filled = over(other.resize(sprite.size, Image.Resampling.NEAREST), (*mean, 255))
    filled.putalpha(sprite.getchannel("A"))
    return filled


# What examples show in-context, and how often; hues turn by a third (by any angle they are hardly learnt).
OPERATIONS = {"cut out": 0.16, "another scene": 0.16, "mirror": 0.16, "grey": 0.16, "hue": 0.36}
HUE_TURNS = (85, 171)  # in 256ths of the circle


def operate(operation, scene, alone, mask, behind, turn):
    """scene: its subject is `alone` on black and covers `mask`; behind: another background; all uint8 (H, W,
    3), the mask (H, W). turn: as turn_hue takes it."""
    if operation == "another scene":
        return (alone + behind * (1 - mask[..., None] / 255)).round().astype(np.uint8)
    if operation == "hue":
        return np.asarray(turn_hue(Image.fromarray(scene), turn))
    grey = np.asarray(Image.fromarray(scene).convert("L").convert("RGB"))
    return {"cut out": alone, "mirror": scene[:, ::-1], "grey": grey}[operation]


def from_bytes(pictures):
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1], on the same device"""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(arrays, device):
    """uint8 (H, W, 3) arrays -> (B, 3, H, W) in [-1, 1]"""
    return from_bytes(torch.from_numpy(np.stack(arrays)).to(device))


# ---- Pictures out -----------------------------------------------------------------------------------------

def to_arrays(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)"""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


@contextlib.contextmanager
def whole_file(path):
    """Gives a temporary name to write to, then moves it to `path`: a file is there whole or not at all."""
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        what = f"cannot be written (is the disk full? {error}); what was there before is untouched"
        raise BadInput(f"{path}: {what}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def save_sheet(rows, path):
    """rows: (title, cells), a cell being (caption, list of uint8 (H, W, 3) images) -> one labelled PNG."""
    cells = [cell for _, row in rows for cell in row]
    shown = max(96, *(len(image) for _, images in cells for image in images))  # pixels a side, enlarged
    cell_width = max(len(images) for _, images in cells) * (shown + 2) + 10
    row_height = shown + 24 + (30 if any(caption for caption, _ in cells) else 0)
    columns = max(len(row) for _, row in rows)
    sheet = Image.new("RGB", (columns * cell_width + 10, len(rows) * row_height + 6), "white")
    pen, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(12)
    for r, (title, row) in enumerate(rows):
        pen.text((10, r * row_height + 4), title, fill="black", font=large)
        for c, (caption, images) in enumerate(row):
            x, y = 10 + c * cell_width, r * row_height + 24
            for i, image in enumerate(images):
                enlarged = Image.fromarray(image).resize((shown, shown), Image.Resampling.LANCZOS)
                sheet.paste(enlarged, (x + i * (shown + 2), y))
            lines = textwrap.wrap(caption, max(10, (cell_width - 10) // 6))[:2]
            pen.text((x, y + shown), "\n".join(lines), fill=(90, 90, 90), font=small)
    with whole_file(path) as temporary:
        sheet.save(temporary, "PNG")


# ---- The tokenizer ----------------------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))); starts as the identity. Its weights are matrices, (channels,
    kernel_size^2 * channels), not an nn.Conv2d's of four dimensions: torch's Muon takes nothing else."""

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
    """Which of a codebook's vectors (codebook_size, code_dim) is the nearest: (..., code_dim) -> (...)"""
    flat, half_squares = vectors.flatten(0, -2), codebook.pow(2).sum(-1) / 2
    # |v - c|^2 is smallest where v . c - |c|^2 / 2 is largest. (All rows at once would take gigabytes.)
    found = [(rows @ codebook.T - half_squares).argmax(-1) for rows in flat.split(4096)]
    return torch.cat(found).view(vectors.shape[:-1])


class Tokenizer(nn.Module):
    def __init__(self, config):
        """config: mentor.Config, of which it takes downsample, n_codebooks, codebook_size, code_dim and
        channels (the decoder's width at patches of downsample / 2; full resolution would cost most of the
        time; twice that where the codes are; four times in the encoder, whose layers see one position)."""
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
        lengths = 0.3 ** torch.arange(config.n_codebooks)  # coarser codes leave less of a unit vector
        self.codebooks = nn.Parameter(lengths[:, None, None] * codebooks)
        self.register_buffer("idle", torch.zeros(codebooks.shape[:2]))  # steps since each was last chosen
        self.to(memory_format=torch.channels_last)

    def features(self, images):
        """What the encoder says of each patch: (B, 3, H, W) -> unit vectors (B, N, code_dim)."""
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
        """What the decoder draws from a vector a patch: (B, N, code_dim) -> (B, 3, H, W)."""
        side = int(vectors.shape[1] ** 0.5)
        z = vectors.transpose(1, 2).unflatten(2, (side, side))  # (B, code_dim, h, w)
        return self.decoder(z.contiguous(memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> codes (B, N, n_codebooks). In fp32: the same wherever it is asked."""
        in_fp32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), in_fp32:
            return self.quantize(self.features(images))

    @torch.no_grad()
    def decode(self, codes):
        """Codes (B, N, n_codebooks) -> images (B, 3, H, W) in [-1, 1]."""
        return self.render(self.look_up(codes).sum(2)).clamp(-1, 1)

    def forward(self, images):
        """One training pass: (B, 3, H, W) -> loss, codes (B, N, n_codebooks), z (B, N, code_dim)."""
        z = self.features(images)
        target = z.detach()
        codes = self.quantize(target)
        vectors = self.look_up(codes)            # (B, N, n_codebooks, code_dim)
        named = vectors.detach().cumsum(2)       # what each codebook and the coarser ones say together
        residuals = target[:, :, None] - (named - vectors.detach())  # what the coarser ones leave to each
        q = named[:, :, -1]                      # (B, N, code_dim)
        # Each codebook goes to its residuals (weight 1); the encoder stays near its codes (weight 0.25).
        vq = codes.shape[-1] * F.mse_loss(vectors, residuals) + 0.25 * F.mse_loss(z, q)
        drawn = self.render(z + (q - target))  # straight-through: the decoder sees q, the gradient goes to z
        return F.mse_loss(drawn, images) + 0.2 * F.l1_loss(drawn, images) + vq, codes, target

    @torch.no_grad()
    def restart_dead_codes(self, codes, z, patience=100):
        """After a step on codes (B, N, n_codebooks) of z (B, N, code_dim): a code not chosen for `patience`
        steps moves onto something that this batch has to name, the likelier the less of it is named by now.
        Without it most codes die in the first minutes and never come back."""
        codes, residual = codes.flatten(0, 1).T, z.flatten(0, 1)  # (n_codebooks, B * N), (B * N, code_dim)
        used = torch.zeros_like(self.idle).scatter_(1, codes, 1)
        if dist.is_initialized():  # by any of the processes
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


def psnr(a, b):
    """Peak signal-to-noise ratio of images in [-1, 1], in dB, averaged: (B, 3, H, W) x 2 -> float"""
    mean_square = (a - b).pow(2).mean((1, 2, 3))  # (B,)
    return (10 * torch.log10(4 / mean_square.clamp_min(1e-10))).mean().item()


@torch.no_grad()
def quality(tokenizer, pictures, sheet):
    """How well pictures (uint8 (H, W, 3) each) survive -> dict(psnr: dB, codes: how many of each codebook
    occur in them). sheet: where to write a PNG of the first 24, before and after."""
    images = to_images(pictures, tokenizer.codebooks.device)
    codes = tokenizer.encode(images)
    drawn = tokenizer.decode(codes)
    cells = [("", pair) for pair in zip(pictures, to_arrays(drawn[:24]))]
    rows = [cells[i:i + 6] for i in range(0, len(cells), 6)]
    save_sheet([("picture, through the tokenizer", row) for row in rows], sheet)
    used = [len(level.unique()) for level in codes.unbind(-1)]
    return {"psnr": round(psnr(drawn, images), 2), "codes": used}
