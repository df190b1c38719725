"""The VQ tokenizer: images to codes and back. The rest of the file reads and paints pictures.

    images (B, 3, H, W) in [-1, 1]  --encode-->  codes (B, N, n_codebooks)  --decode-->  images
    N = (H / downsample)^2 patches, row by row; a patch has one code from each codebook, coarse to fine

The encoder gives one unit vector per patch (l2-normalised, as in LlamaGen, arXiv 2406.06525). Residual
quantisation approximates it step by step: the first codebook takes its nearest vector, and each further
codebook takes the nearest to what the coarser ones leave over. Their sum stands for the patch.

The encoder sees each patch alone. So a subject that moves by whole patches keeps its codes, whatever is
behind it, and drawing it elsewhere starts out as copying. The decoder sees the neighbours: it hides seams.
"""
import contextlib
import functools
import json
import os
import re
import sys
import unicodedata
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from torch import nn


class BadInput(Exception):
    """Something that the user can mend: ends a script with one line and exit code 2. The rest are bugs."""


def printable(text):
    """A text from a file as a terminal may show it: without escape sequences"""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


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
    found = [torch.addmm(-half_squares, rows, codebook.T).argmax(-1) for rows in flat.split(4096)]
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


# ---- Files: pictures and texts ----------------------------------------------------------------------------

FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "TGA", "PPM", "PCX",
           "ICO", "PSD", "QOI", "SGI")  # not all of pillow's: it hands PostScript to another program
IMAGE_ENDINGS = {ending for ending, kind in Image.registered_extensions().items()
                 if kind in (*FORMATS, "MPO")}  # an MPO is a JPEG with further pictures behind it
BLACK, WHITE = (0, 0, 0, 255), (255, 255, 255, 255)
MOST_PIXELS = 89_000_000  # to decode
Image.MAX_IMAGE_PIXELS = 250_000_000  # of a JPEG, as phones take: it can be decoded at an eighth of its size
warnings.simplefilter("error", Image.DecompressionBombWarning)


@contextlib.contextmanager
def opened(path, least=None):
    """An image file, before its pixels are decoded. least: pixels that each side must keep; a larger JPEG is
    decoded at a half, a quarter or an eighth, which is faster. Raises BadInput, which names the file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if least or image.width * image.height > MOST_PIXELS:
                image.draft(None, (least or 4096, least or 4096))
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels: the limit is 89 million")
            yield image
    except Exception as error:  # a damaged file can fail anywhere inside pillow
        reason = str(getattr(error, "strerror", None) or error).replace(f" {str(path)!r}", "")
        raise BadInput(f"{path}: not a readable image ({reason})") from error


def read_image(path, least=None):
    """Any image file, turned as its EXIF says -> an RGBA image if it is a cut-out, else RGB, on white.
    least: as `opened` takes it. Raises BadInput."""
    with opened(path, least) as image:
        if image.mode[0] in "IF":  # I;16, I, F: convert() would clip them
            image = to_8_bits(image)
        if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
            image = ImageChops.invert(image)  # pillow inverts all; only Adobe's are inverted
        has_alpha = image.has_transparency_data
        image = ImageOps.exif_transpose(image).convert("RGBA" if has_alpha else "RGB")
        return image if not has_alpha or has_free_border(image.getchannel("A")) else over(image, WHITE)


read_once = functools.lru_cache(maxsize=4)(read_image)  # several things may share a photograph


def to_8_bits(image):
    """16 or 32 bits a pixel -> L. White is the first of 1, 255 and 65,535 that no pixel exceeds."""
    pixels = np.asarray(image, np.float64)
    least, most = pixels.min(), pixels.max()
    white = next((white for white in (1, 255, 65535) if most <= white), 0)
    if not white or not least >= 0:
        raise ValueError(f"its mode {image.mode} has pixels from {least:g} to {most:g}: save it with 8 bits")
    return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))


def has_free_border(alpha):
    """Whether a quarter of the border is transparent, as in cut-outs (round corners and holes leave less)."""
    opaque = np.asarray(alpha) > 127
    if not opaque.any():
        raise ValueError("nothing in it is opaque")
    border = np.concatenate((opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]))
    return border.mean() < 0.75


def is_cutout(path):
    """Whether read_image gives RGBA. (Of a file without alpha it reads the header only.)"""
    with opened(path) as image:
        has_alpha = image.has_transparency_data
    return has_alpha and read_image(path).mode == "RGBA"


def hides_something(path):
    """Whether a file has transparent pixels"""
    with opened(path) as image:
        return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 128


def is_black_and_white(path):
    """Whether a file of one channel has two levels of grey at most, as masks have"""
    with opened(path) as image:
        if image.mode not in ("1", "L", "P") or image.has_transparency_data:
            return False
        colours = image.convert("RGB").getcolors(2)  # None if there are more
        return colours is not None and all(red == green == blue for _, (red, green, blue) in colours)


def over(image, colour):
    """An RGB or RGBA image -> RGB image; `colour` (RGBA) shows where it is transparent."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
    return image.convert("RGB")


def turn_hue(image, turn):
    """An RGB or RGBA image with its hue turned; 256 is a full turn."""
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    hue = hue.point([(v + turn) % 256 for v in range(256)])
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if image.mode == "RGBA":
        turned.putalpha(image.getchannel("A"))
    return turned


def square_of(image, size, share=1, x=0.5, y=0.5):
    """A square part of an image -> size x size. Its side is a share of the shorter side; x, y are shares of
    the space that is left."""
    side = share * min(image.size)
    left, top = (at * (n - side) for at, n in zip((x, y), image.size))
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3)


@functools.lru_cache(maxsize=1000)  # at 64 px, as the cpu preset has it, 200 MB at most
def open_shrunk(path, size):
    """An image file, shrunk to at most the area of (4 size)^2 pixels. (A large PNG takes .2 s to decode.)"""
    image = read_image(path, least=5 * size // 2)
    share = 4 * size / (image.width * image.height) ** 0.5
    if share < 1:
        image = image.resize([max(1, round(n * share)) for n in image.size], reducing_gap=3)
    return image


def open_square(path, size, rng=None):
    """Any image file -> RGB, size x size: its central square, or with rng a random part. Raises BadInput."""
    where = () if rng is None else rng.uniform((0.4, 0, 0), 1)
    return over(square_of(open_shrunk(path, size), size, *where), WHITE)


def widened(picture, margin):
    """uint8 (H, W, 3) -> an image with `margin` pixels more on each side, which repeat its edges"""
    rows, columns = (np.arange(-margin, n + margin).clip(0, n - 1) for n in picture.shape[:2])
    return Image.fromarray(picture[rows][:, columns])  # (np.pad takes several times as long)


def read_text(path):
    """A text file in UTF-8, with or without a byte-order mark, or else in cp1252. Raises BadInput."""
    with open(path, "rb") as file:
        content = file.read()
    if b"\0" in content:
        raise BadInput(f"{path}: has zero bytes: save it as UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def reference_copies(config, copies, picture):
    """A reference, uint8 (H, W, 3) -> these copies of it: shrunk, in the middle, edges repeated. copies:
    indices into config.reference_sizes."""
    def shrunk(size):
        wider = widened(picture, round(len(picture) * (1 / size - 1) / 2))
        return np.asarray(wider.resize(picture.shape[:2], Image.Resampling.BICUBIC))

    sizes = [config.reference_sizes[index] for index in copies]
    return [picture if size == 1 else shrunk(size) for size in sizes]


# ---- Painted by code: emoji, shapes, backgrounds ----------------------------------------------------------

EMOJI_FONTS = {  # file: the one pixel size that its bitmaps have (Debian, Arch, Fedora, macOS, Windows)
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf": 109, "/usr/share/fonts/noto/NotoColorEmoji.ttf": 109,
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf": 109,
    "/System/Library/Fonts/Apple Color Emoji.ttc": 160, "C:/Windows/Fonts/seguiemj.ttf": 128}


@functools.cache
def emoji_font():
    """The machine's colour emoji font; None if there is none that pillow can draw (it says so)."""
    for path, size in EMOJI_FONTS.items():
        if os.path.exists(path):
            with contextlib.suppress(OSError):
                font = ImageFont.truetype(path, size)
                if paint_emoji("\N{GRINNING FACE}", font).getbbox():
                    return font
            print(f"{path}: pillow cannot draw this font", file=sys.stderr)
    return None


def paint_emoji(char, font=None):
    font = font or emoji_font()
    image = Image.new("RGBA", (2 * font.size, 2 * font.size))
    ImageDraw.Draw(image).text((font.size // 4, font.size // 4), char, font=font, embedded_color=True)
    return image


# Letters in boxes, arrows, clock faces, skin tones, flags of letters; and things that have such a word.
A_SIGN = re.compile(
    r"REGIONAL|FITZPATRICK|COMPONENT|SQUARED|CIRCLED|IDEOGRAPH|ARROW|KEYCAP|CLOCK FACE|TRIANGLE|SIGN\b|SYMBOL"
    r"|MARK\b|SQUARE$|CIRCLE$|DIAMOND|INPUT|BUTTON|HEAVY|CURLY|DIGIT|NUMBER|LARGE|VARIATION")
A_THING = re.compile(
    r"HEART|MOON|HANDS?\b|THUMBS|HORNS|^BOW |CAKE|KISS|MOUSE|BANKNOTE|BOOKMARK|ENVELOPE|E-MAIL|PHONE|CHART"
    r"|(ANGER|SLEEPING|COLLISION|SWEAT|DASH|DIZZY|POINTS|LINK) SYMBOL|VOLTAGE|CONSTRUCTION|OCTAGONAL|^SMOKING"
    r"|(GRINNING|SERIOUS) FACE")
EMOJI = [*range(0x2300, 0x2C00), *range(0x1F300, 0x1FB00)]  # code points of Unicode's pictures


def emoji_label(char):
    """Its Unicode name, if it names a thing, else "". Of a long name fillers and all beyond five words go."""
    name = unicodedata.name(char, "").lower()
    if A_SIGN.search(name.upper()) and not A_THING.search(name.upper()):
        return ""
    if len(re.findall(r"\w+|-", name)) > 5:
        name = " ".join(re.sub(r"-| with\b| and\b", " ", name).split()[:5])
    return name


is_emoji_set = functools.cache(lambda folder: any(folder.glob("*1f[3-9a][0-9a-f][0-9a-f].*")))


def code_point_label(path):
    """The label of a file of an emoji set, 1f436.png, emoji_u1f436.png or 2600-fe0f.png; of others "".
    Raises ValueError if it is not a single thing."""
    match = re.fullmatch("(?:(?:emoji_)?u)?([0-9a-f]{2,5})((?:[-_][0-9a-f]{2,5})*)", path.stem.lower())
    if not match or not is_emoji_set(path.parent):
        return ""
    number = int(match[1], 16)
    if number in EMOJI and match[2][1:] in ("", "fe0f") and (label := emoji_label(chr(number))):
        return label
    raise ValueError("an emoji of several characters, or not a thing")


# Points around the middle; how far out every second one is.
SHAPES = {"circle": (64, 1), "triangle": (3, 1), "square": (4, 1), "pentagon": (5, 1), "hexagon": (6, 1),
          "star": (10, 0.45), "sun": (16, 0.45), "cross": (8, 0.45)}
COLOURS = {"red": (220, 40, 40), "green": (50, 170, 70), "blue": (50, 90, 220), "yellow": (240, 210, 50),
           "purple": (150, 60, 190), "orange": (245, 140, 40), "white": (240, 240, 240),
           "grey": (120, 120, 120)}


def paint_shape(recipe):
    """"star red blue" -> an RGBA image: a red star with a blue one inside"""
    shape, outer, inner = recipe.split()
    image, (n, inward) = Image.new("RGBA", (128, 128)), SHAPES[shape]
    turns = np.linspace(0, 2 * np.pi, n, endpoint=False)
    around = np.stack((np.sin(turns), -np.cos(turns)), 1)  # (n, 2)
    around[1::2] *= inward
    for radius, colour in ((60, outer), (30, inner)):
        ImageDraw.Draw(image).polygon((64 + radius * around).flatten().tolist(), fill=COLOURS[colour])
    return image


# Words: the colours of the sky at the top and at the horizon, of the ground at the horizon and at the bottom.
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
def paint_background(words, size, variant):
    """The background of these words -> RGB, size x size. Each variant has its own light and details."""
    rng = np.random.default_rng([variant, list(BACKGROUNDS).index(words)])
    big = 2 * size  # painted twice as large and averaged: smooth edges
    light = rng.uniform(0.9, 1.1) if words.endswith("background") else rng.uniform(0.9, 1.1, 2).repeat(2)
    colours = np.clip(np.array(BACKGROUNDS[words]) * np.reshape(light, (-1, 1)), 0, 255)  # (4, 3)
    sky, sky_low, ground, ground_low = colours
    # The horizon, the place of a thing, dots: in 64ths of the canvas, like all details.
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
    pen = ImageDraw.Draw(image)
    for kind, corners, colour in details.get(words, []):
        getattr(pen, kind)([c * big / 64 for c in corners], fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


# ---- Masks: which pixels of a picture are its subject -----------------------------------------------------

def read_mask(path, value=None):
    """A mask file -> L image, 255 where the subject is. value: the level that means the subject. Without it
    two levels, or a smooth edge, are cut at half of the brightest; of a palette all numbers are the subject
    but 0 (background) and 255 (void). Raises BadInput if the levels seem to be numbers of classes."""
    with opened(path) as image:
        levels, palette = np.asarray(image), np.reshape(image.getpalette() or [], (-1, 3))
        of_palette = image.mode == "P" and np.ptp(palette[np.unique(levels)], 1).any()  # not just greys
    if not of_palette:
        colours = over(read_image(path), BLACK)
        levels = np.asarray(colours.convert("L"))
        several = np.ptp(np.asarray(colours), 2).max() > 32 and len(colours.getcolors(2) or "abc") > 2
    found, inside = np.unique(levels), levels > levels.max() / 2  # never at > 0: no halo of the background
    if value is not None:
        inside = levels == int(float(value))
    elif of_palette:
        inside = (levels > 0) & (levels < 255)
    elif several or found[-1] < 200 and (len(found) > 2 or found[0] > 0) or (
            2 < len(found) < 32 and (levels[~inside] > 0).sum() > inside.sum()):
        levels = ", ".join(map(str, found[:9])) + ", ..." * (len(found) > 9)
        raise BadInput(f"{path}: its levels {levels} look like numbers of classes: say which of them is the "
                       "subject with \"mask_value\", beside \"file_name\" and \"mask\" in metadata.jsonl")
    return Image.fromarray((inside * 255).astype(np.uint8))


def turn_of_mask(size, path, name):
    """How to turn a mask of this size so that it fits the picture at `path`: EXIF's number, 1 for not at all.
    Raises BadInput if their shapes differ, or if the turn cannot be told."""
    def is_stored(size):
        return abs(size[0] * stored[1] - size[1] * stored[0]) <= max(*size, *stored)  # allowing for rounding

    with opened(path) as picture:
        stored, turn = picture.size, picture.getexif().get(0x112, 1)
    fits, fits_turned = is_stored(size), is_stored(size[::-1])
    if turn not in range(2, 9) and fits:
        return 1
    if turn in range(5, 9) and fits != fits_turned:
        return turn if fits else 1
    what = "EXIF rotates the picture, maybe not the mask: rotate both" if fits else "their proportions differ"
    raise BadInput(f"{path} ({stored[0]} x {stored[1]}) and {name} ({size[0]} x {size[1]}): {what}")


def open_mask(path, mask, value=None, outline="", most=4096):
    """The mask of the picture at `path`, turned as the picture is -> L image, 0 or 255. outline: instead of a
    mask file, what draw_outline takes, as JSON. Raises BadInput if it does not fit, or cannot be read."""
    try:
        image = draw_outline(json.loads(outline), most) if outline else read_mask(mask, value)
        if not has_free_border(image):
            raise ValueError("it leaves less than a quarter of the border free: is it inverted?")
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise BadInput(f"{path}: its {'outline' if outline else 'mask'} cannot be used: {error}") from error
    image.getexif()[0x112] = turn_of_mask(image.size, path, mask or "its outlines")
    return ImageOps.exif_transpose(image)


def draw_outline(outline, most=4096):
    """An outline of COCO -> L image, 255 inside, as pycocotools 2.0.11 draws it. It has "size" (height,
    width) and "counts" (run lengths, columns first) or "polygons" (lists of x, y, x, y, ...). These are drawn
    up to 8 times as large, `most` pixels a side at most: Pillow draws the rim, too. Raises ValueError."""
    height, width = outline["size"]
    if height * width > MOST_PIXELS:
        raise ValueError(f"it is of {width} x {height} pixels: the limit is 89 million")
    if "counts" in outline:
        counts = outline["counts"]
        counts = decompress_counts(counts) if isinstance(counts, str) else counts
        if sum(counts) != width * height or min(counts) < 0:
            raise ValueError(f"its run lengths do not add up to {width} x {height} pixels")
        inside = np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T
        return Image.fromarray((inside * 255).astype(np.uint8))
    polygons = [np.reshape(polygon, (-1, 2)) for polygon in outline["polygons"]]
    corners = np.concatenate(polygons) / (width, height)
    if not (np.abs(corners - 0.5) < 0.6).all():
        raise ValueError(f"its corners lie outside of {width} x {height} pixels")
    corners = corners.clip(0, 1) * (width, height)
    (left, top), (right, bottom) = np.floor(corners.min(0)).astype(int), np.ceil(corners.max(0)).astype(int)
    w, h = max(1, right - left), max(1, bottom - top)
    fine = max(1, min(8, most // max(w, h)))
    drawn = Image.new("L", (w * fine, h * fine))
    for polygon in polygons:
        corners = (polygon - (left, top)) * fine - 0.5
        ImageDraw.Draw(drawn).polygon(corners.flatten().tolist(), fill=255)
    mask = Image.new("L", (width, height))
    mask.paste(drawn.reduce(fine).point(lambda v: 255 * (v > 127)), (left, top))
    return mask


def decompress_counts(text):
    """COCO's compressed run lengths: five bits a character, least first; from the fourth on differences"""
    counts, value, shift = [], 0, 0
    for bits in (ord(char) - 48 for char in text):
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last of this number
            value -= (bits & 16) << shift - 4  # its sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
