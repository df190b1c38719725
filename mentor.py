r"""MENTOR in one file: a transformer that draws an image, patch by patch, from a prefix of text and images.

    <bos> the dog in <boi> c1 ... cN s1 ... sM <eoi> . a dog on the beach <boi> | t1 t2 ... tN
    \ text as words, reference images as VQ codes, in the order of the prompt _/ \ the picture /

One causal transformer, one loss: cross-entropy on the picture's codes (arXiv 2507.09574, section 3). Each c,
s and t is a patch, named by a few codes, coarse to fine; c is the reference as it is, s at two thirds: a task
takes either or both (Task.sizes).
"""
import copy
import functools
import math
import re
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer import BadInput, has_bf16, repeat

# ---- Configuration and vocabulary -------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    image_size: int = 64        # pixels a side
    downsample: int = 8         # pixels a side of a patch
    n_codebooks: int = 6        # codes that name a patch, coarse to fine
    codebook_size: int = 1024   # codes in each codebook
    code_dim: int = 32          # numbers in a codebook vector
    channels: int = 80          # width of the tokenizer
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    block_size: int = 352       # longest sequence, in tokens: words, references and picture together
    reference_sizes: tuple = (1.0, 2 / 3)  # of references: as it is; as small to big in data.SIZES

    @property
    def side(self):  # patches a side of an image
        return self.image_size // self.downsample

    @property
    def n_patches(self):  # patches of an image, a token each: N, where a comment gives shapes
        return self.side ** 2


CONFIGS = {
    "test": Config(image_size=32, n_codebooks=3, codebook_size=64, code_dim=8, channels=32, n_layer=2,
                   n_head=2, n_embd=64, block_size=256),
    "cpu": Config(),
    "gpu": Config(image_size=128, codebook_size=4096, channels=128, n_layer=12, n_head=12, n_embd=768,
                  block_size=1184),
}
# Text is words: a hash of each names two rows of one table, which are added (the hashing trick): any word of
# any script has a vector of its own. An id is both numbers, first * N_ROWS + second. The first five rows:
# begin of sequence, begin and end of an image, a patch that is hidden, and one that is not, by its codes.
N_ROWS = 4096
BOS, BOI, EOI, HIDDEN, PATCH = range(0, 5 * (N_ROWS + 1), N_ROWS + 1)
ID, POSITION, CODES = 0, slice(1, 4), slice(4, None)  # the columns of a token; position: order, row, column
WORD = re.compile(r"\w+|[^\w\s]")  # or sign
MAX_LABEL, MAX_BACKGROUND, MAX_CAPTION = 5, 8, 20  # words


def words_of(text):
    """Its words and signs in small letters, a final s dropped, so that dogs are dog (foxes become foxe); an
    is a."""
    return ["a" if word == "an" else re.sub("(?<=..[^s])s$", "", word) for word in WORD.findall(text.lower())]


def word_id(word):
    first, second = divmod(zlib.crc32(word.encode()) % (N_ROWS - 5) ** 2, N_ROWS - 5)  # the same anywhere
    return (first + 5) * N_ROWS + second + 5


def clean_text(text, limit=None):
    """The words of a prompt as the model knows them, in training and in sample.py alike: the first line, in
    small letters, without a full stop, and at most `limit` words."""
    text = " ".join(text.strip().split("\n")[0].lower().split())
    starts = [word.start() for word in WORD.finditer(text)] + [None]
    return text[:starts[limit] if limit and limit < len(starts) else None].rstrip("., ")


def clean_label(text):
    """What names a thing -> its name, without an article, at most MAX_LABEL words, and where it stands among
    several: ("cat", " on the left"), or ("cat", "")"""
    text = clean_text(re.sub(r"^\s*(an?|the)\s+", "", text, flags=re.I))
    where = " (?:on the|at the top|at the bottom) (?:left|right)"
    name, place = re.fullmatch(f"(.*?)((?:{where})?)", text).groups()
    return clean_text(name, MAX_LABEL), place


# ---- The tasks --------------------------------------------------------------------------------------------
# To add one, colourisation say: a row here; a method of its name (with _ for -) in data.py's Tasks, with as
# many references as the prompt has <image>; a share in train.py's MIXES; how to ask in sample.py.

class Task(NamedTuple):
    prompt: str         # <image>: a reference stands there
    cfg_image: float    # the guidance that suits it, towards the reference
    cfg_text: float     # and towards the text: copying wants little, composing more
    needs_cutout: bool  # False: a picture without alpha or mask will do
    sizes: tuple = (0, 1)  # which of Config.reference_sizes references enter at: those that its targets have
    coarse: float = 1.0    # what a patch's coarsest code weighs in the loss; the others weigh 1


TASKS = {
    "text-to-image": Task("{caption}", 3.0, 3.0, needs_cutout=False),
    "reconstruction": Task("The image is <image>\n{caption}", 1.0, 1.0, needs_cutout=False, sizes=(0,)),
    # Which of several things is asked for is one bit a patch: its fine codes' randomness would drown it.
    "segmentation": Task("The {label} in <image>.", 1.0, 1.5, needs_cutout=True, sizes=(0,), coarse=8.0),
    "recovery": Task("The {label} in <image>.\n{caption}", 2.0, 2.0, needs_cutout=True),
    "subject-driven": Task("The {label} in <image>.\n{caption}", 3.0, 2.0, needs_cutout=True),
    "multi-image": Task("{caption}", 3.0, 2.0, needs_cutout=True, sizes=(1,)),
    "in-context": Task("<image> becomes <image>.\n<image> becomes", 2.0, 1.0, needs_cutout=True, sizes=(0,)),
}


def fill_prompt(task, labels=("",), caption=""):
    """-> the n + 1 texts around n images. The caption of multi-image has <image> in it, behind each label."""
    if task == "multi-image":
        return caption.split("<image>")
    return [piece.format(label=labels[0], caption=caption) for piece in TASKS[task].prompt.split("<image>")]


def hide_condition(pieces, references, hide):
    """A prompt as it is, without its text ("text"), or nothing ("all"): what guidance compares."""
    if hide == "all":
        return [""], []
    return [""] * len(pieces) if hide == "text" else pieces, references


# ---- The sequence -----------------------------------------------------------------------------------------

@functools.cache
def reference_patches(config, sizes):
    """Which patches of a reference enter at these sizes (indices of Config.reference_sizes): of each, centred
    on its own canvas of N patches, those that it fills -> their numbers, counted through all canvases."""
    numbers = []
    for i, size in enumerate(config.reference_sizes[index] for index in sizes):
        first, end = math.floor(config.side * (1 - size) / 2), math.ceil(config.side * (1 + size) / 2)
        canvas = torch.arange(config.n_patches * i, config.n_patches * (i + 1)).view(config.side, config.side)
        numbers.append(canvas[first:end, first:end].flatten())
    return torch.cat(numbers)


def build_sequence(config, pieces, references, sizes, target=None):
    """Texts with images between them -> tokens (T, 4 + n_codebooks). Raises BadInput: too long.
    pieces: strings. references: at most one behind each piece: the codes of its patches that enter at these
    sizes (reference_patches), n_codebooks each. target: the picture's (N, n_codebooks): the last N tokens are
    <boi> and all its patches but the last, each of which predicts the next; without it <boi>, ready to draw.
    A token is its id, where it stands (order, row, column: each turns a rotary axis) and, if it is a patch,
    its codes. All patches of an image, at one size, share one order. A patch of a reference stands at its own
    row and column, a token of the picture at those of the patch it is about to PREDICT: so the same patch of
    a reference that enters as it is differs in the order alone, and is easy to copy."""
    tokens = []
    def add(ids, order, patches=0, codes=0):
        rows = np.zeros((len(ids), 4 + config.n_codebooks), int)
        rows[:, ID], rows[:, 1], rows[:, 2:4], rows[:, CODES] = ids, order, patches, codes
        tokens.append(rows)

    grid = np.indices((config.side, config.side)).reshape(2, -1).T  # (N, 2): row, column
    canvas, patch = divmod(reference_patches(config, sizes).numpy(), config.n_patches)
    add([BOS], 0)
    order = 1
    for i, piece in enumerate(pieces):
        words = [word_id(word) for word in words_of(piece)]
        add(words, order + np.arange(len(words)))
        order += len(words)
        if i < len(references):
            add([BOI], order)
            add([PATCH] * len(patch), order + 1 + np.array(sizes)[canvas], grid[patch], references[i].cpu())
            add([EOI], order + 2 + sizes[-1])
            order += 3 + sizes[-1]
    room = config.block_size - sum(map(len, tokens)) - config.n_patches
    if room < 0:
        n_words = len(words_of(" ".join(pieces)))
        raise BadInput(f"--label and --prompt make a sentence of {n_words} words of text, "
                       f"and {max(0, n_words + room)} fit: shorten them")
    add([BOI], order, grid[0])
    if target is not None:
        add([PATCH] * (config.n_patches - 1), order, grid[1:], target[:-1])
    return torch.from_numpy(np.concatenate(tokens))


def pad_sequences(sequences, multiple=1):
    """Sequences of tokens -> tokens (B, T, 4 + n_codebooks), lengths (B,), padded on the right to a multiple:
    odd sizes are slower. Attention is causal: nothing looks at the padding, so no key mask."""
    tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    tokens = F.pad(tokens, (0, 0, 0, -tokens.shape[1] % multiple))
    return tokens, torch.tensor([len(sequence) for sequence in sequences])


# ---- The transformer --------------------------------------------------------------------------------------

def rms_norm(x):
    """x / sqrt(mean(x^2)) over the last axis, in fp32. (On a CPU faster than F.rms_norm.)"""
    x = x.float()
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-6)


def rotary_table(positions, config):
    """positions (B, T, 3) -> cos, sin (B, 1, T, head_dim), as `rotate` takes them.
    Half of the pairs turn with the order, a quarter each with row and column. At position 0 that is cos 1 and
    sin 0, the identity (a table of zeros would blind attention to the prefix, as it did in LlamaGen). Rows
    and columns turn by half a turn a patch to half a turn an image: neighbours must be told apart to copy."""
    head_dim, side, angles = config.n_embd // config.n_head, config.side, []
    n_order, n_grid = head_dim // 4, head_dim // 8  # pairs that turn with the order; with row or column
    for axis, (n_pairs, fastest, base) in enumerate([(n_order, 1.0, 10000)] + 2 * [(n_grid, torch.pi, side)]):
        frequency = fastest * base ** (-torch.arange(n_pairs, device=positions.device) / n_pairs)
        angles.append(positions[:, None, :, axis, None] * frequency)  # (B, 1, T, n_pairs)
    angles = torch.cat(angles, -1)  # (B, 1, T, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Pairs (a, b) of x (..., head_dim), first all a, then all b -> (a cos - b sin, b cos + a sin)"""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(head_dim) + mask) v: q (B, n_head, T, head_dim), k and v (B, n_head, S, head_dim).
    Without a mask it is causal. (On a CPU in bf16 the formula is faster than torch's kernel for it.)"""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.full((q.shape[2], q.shape[2]), -torch.inf, dtype=q.dtype).triu(1)  # (T, T)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, n_head, T, S)
    return (scores + mask).softmax(-1) @ v


class KVCache(NamedTuple):
    """A layer's keys and values, and where the query tokens stand among them."""
    keys: torch.Tensor    # (B, n_head, S, head_dim)
    values: torch.Tensor  # (B, n_head, S, head_dim)
    slots: torch.Tensor   # (T,): which of the S are theirs
    mask: torch.Tensor    # (B, 1, T, S) or (T, S): 0 where they look, -inf where not


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # Three matrices, since Muon (train.py) orthogonalises each alone; `drawing_copy` joins them once.
        self.qkv = nn.ParameterList(torch.empty(config.n_embd, config.n_embd) for _ in range(3))
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.gain = nn.Parameter(torch.empty(config.n_head, 1, 1))  # QK-norm fixes lengths; this sharpens

    def forward(self, x, rotary, cache=None):
        """x (B, T, n_embd) -> (B, T, n_embd). Without a cache x is all that there is to look at."""
        B, T, C = x.shape
        matrix = torch.cat(tuple(self.qkv)) if len(self.qkv) > 1 else self.qkv[0]  # (3 * n_embd, n_embd)
        qkv = F.linear(x.to(matrix.dtype), matrix).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, n_head, T, head_dim)
        q, k = rotate(rms_norm(qkv[:2]), *rotary)  # in fp32
        q, v = q * self.gain, qkv[2]
        if cache is None:
            y = attend(q.to(v.dtype), k.to(v.dtype), v)
        else:
            keys = cache.keys.index_copy_(2, cache.slots, k.to(cache.keys.dtype))  # (B, n_head, S, head_dim)
            values = cache.values.index_copy_(2, cache.slots, v.to(cache.values.dtype))
            y = attend(q.to(keys.dtype), keys, values, cache.mask)
        return self.proj(y.transpose(1, 2).reshape(B, T, C).to(v.dtype))


class MLP(nn.Module):
    def __init__(self, config, expansion):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, expansion * config.n_embd, bias=False)
        self.proj = nn.Linear(expansion * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x.to(self.fc.weight.dtype))).square())


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = CausalSelfAttention(config)
        self.mlp = MLP(config, expansion=4)

    def forward(self, x, rotary, cache=None):
        x = x + self.attention(rms_norm(x), rotary, cache)
        return x + self.mlp(rms_norm(x))


class Mentor(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.known = {"words": "", "backgrounds": []}  # what training said (train.known_text)
        levels, K, C = config.n_codebooks, config.codebook_size, config.n_embd
        self.word_embedding = nn.Embedding(N_ROWS, C)
        self.code_embedding = nn.Parameter(torch.empty(levels, K, C))
        self.code_proj = nn.Parameter(torch.empty(levels, config.code_dim, C))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.level_mlps = nn.ModuleList(MLP(config, expansion=2) for _ in range(levels - 1))
        self.head_gain = nn.Parameter(torch.empty(levels))
        self.register_buffer("codebooks", torch.zeros(levels, K, config.code_dim))  # the tokenizer's
        self.init_weights()

    def init_weights(self):
        """Similar codes start similar; every proj is zero: a block starts as the identity; head_gain is
        small: a model that hands its input on would else be sure that the last code comes again."""
        nn.init.normal_(self.word_embedding.weight, std=0.02)
        nn.init.normal_(self.code_embedding, std=0.1)
        nn.init.normal_(self.code_proj, std=0.2)
        nn.init.constant_(self.head_gain, 1.6 / self.config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.zeros_(parameter)
            elif ".qkv." in name or name.endswith("fc.weight"):  # of variance 1 / n_embd
                nn.init.uniform_(parameter, -(3 / self.config.n_embd) ** 0.5, (3 / self.config.n_embd) ** 0.5)
            elif name.endswith(".gain"):
                nn.init.constant_(parameter, 1.5)

    def code_table(self):
        """A vector for every code (n_codebooks, codebook_size, n_embd): an embedding plus a projection of
        what it means to the tokenizer, at length 1: the coarse must not drown the fine. They are the head,
        too: what attention copies from a reference is at once the logit of that code."""
        lengths = self.codebooks.norm(dim=-1).mean(-1).clamp_min(1e-6)  # (n_codebooks,)
        return self.code_embedding + (self.codebooks / lengths[:, None, None]) @ self.code_proj

    def sum_codes(self, codes, table):
        """A patch's codes, or the coarser of them (..., n) -> the sum of their vectors (..., n_embd)"""
        return sum(F.embedding(codes[..., level], table[level]) for level in range(codes.shape[-1]))

    def embed(self, tokens, table):
        """(B, T, 4 + n_codebooks) -> (B, T, n_embd): text by its id, patches by their codes."""
        ids, codes = tokens[..., ID], tokens[..., CODES]
        text = self.word_embedding(ids // N_ROWS) + self.word_embedding(ids % N_ROWS)
        return torch.where((ids == PATCH)[..., None], self.sum_codes(codes, table), text)

    def hidden(self, x, rotary, caches=None):
        """Embedded tokens, their rotary table -> the last block's output, normalised (B, T, n_embd)."""
        x = rms_norm(x)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, caches[i] if caches else None)
        return rms_norm(x)

    def logits(self, x, coarser, table):
        """Logits of one code of the patch that x (..., n_embd) predicts -> (..., codebook_size), fp32.
        coarser (..., level): the codes of the patch that are known; they say which level comes next."""
        level = coarser.shape[-1]
        if level > 0:
            known = rms_norm(self.sum_codes(coarser, table))
            x = x + self.level_mlps[level - 1](rms_norm(x + known))
        return F.linear(x.to(table.dtype), table[level]).float() * self.head_gain[level]

    def forward(self, tokens, lengths, target):
        """Cross-entropy of each of the picture's codes, in nats: tokens (B, T, 4 + n_codebooks), lengths (B,)
        without padding, target and result (B, N, n_codebooks)."""
        table = self.code_table()
        x = self.embed(tokens, table)  # (B, T, n_embd)
        x = self.hidden(x, rotary_table(tokens[..., POSITION], self.config))
        N = target.shape[1]
        last = lengths[:, None] - N + torch.arange(N, device=tokens.device)  # (B, N): what predicts it
        x = x.gather(1, last[..., None].expand(-1, -1, x.shape[2])).flatten(0, 1)  # (B * N, n_embd)
        nats, codes = [], target.flatten(0, 1)  # (B * N, n_codebooks)
        for level in range(self.config.n_codebooks):
            logits = self.logits(x, codes[:, :level], table)  # (B * N, codebook_size)
            nats.append(F.cross_entropy(logits, codes[:, level], reduction="none"))
        return torch.stack(nats, -1).view(target.shape)


# ---- Drawing with guidance --------------------------------------------------------------------------------

TEMPERATURES = (0.3, 0.2, 0.15, 0.1, 0.05, 0.02)  # one a codebook: the finer, the cooler
GROUP_SIZE = 8  # pictures side by side: more would share more of the prompt, but compute more that is masked


def drawing_copy(model, exact=False):
    """The model, its matrices cast to bf16 once, where hardware multiplies it and it need not be exact."""
    dtype = torch.bfloat16 if has_bf16(model.head_gain.device) and not exact else torch.float32
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # deepcopy's memo
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shared[id(module.weight)] = nn.Parameter(module.weight.to(dtype))
        if isinstance(module, CausalSelfAttention):
            shared[id(module.qkv)] = nn.ParameterList([torch.cat(tuple(module.qkv)).to(dtype)])
    return copy.deepcopy(model, shared)  # (uncompiled blocks: not every shape of a sheet is worth compiling)


def guidance_branches(pieces, references, cfg_image, cfg_text):
    """logits = null + cfg_image (image only - null) + cfg_text (full - image only), as a weighted sum -> list
    of (weight, pieces, references), without what weighs nothing."""
    branches = [(cfg_text, pieces, references),
                (cfg_image - cfg_text, *hide_condition(pieces, references, "text")),
                (1 - cfg_image, *hide_condition(pieces, references, "all"))]
    return [branch for branch in branches if abs(branch[0]) > 1e-6]


def draw_codes(logits, uniform, temperature):
    """Draws a code a row by one number from [0, 1) each: the first up to which probabilities add up to it.
    logits (B, codebook_size), uniform (B,) -> (B,). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)  # (B, codebook_size)
    passed = cumulative <= uniform[:, None] * cumulative[:, -1:]
    return passed.sum(-1).clamp_max(logits.shape[-1] - 1)


class Drawing:
    """The pictures of one `generate` while they are drawn. The G of a group are G query tokens of a row:
    after the prompt that they share, each sees its own patches alone. Rows go prompt by prompt, branch by
    branch, group by group. A step changes in place what was allocated before and brings no number to Python:
    so a CUDA graph can take it."""

    def __init__(self, model, prompts, sizes, n, seed, temperatures, cfg_image, cfg_text, exact=False):
        config, device, levels = model.config, model.head_gain.device, model.config.n_codebooks
        self.model, self.temperatures = drawing_copy(model, exact), temperatures[:levels]
        n_groups = -(-n // GROUP_SIZE)
        self.G = -(-n // n_groups)
        self.n_drawn = n_groups * self.G  # pictures of a prompt: n, and a few that fill the groups
        # The numbers that decide picture i come from its own seed: the same on every device, in every batch.
        seeds = [seed + first + i for first in range(0, n * len(prompts), n) for i in range(self.n_drawn)]
        uniform = [torch.rand(config.n_patches, levels, generator=torch.Generator().manual_seed(number))
                   for number in seeds]
        self.uniform = torch.stack(uniform).to(device)  # (pictures, N, n_codebooks)
        self.codes = torch.zeros(self.uniform.shape, dtype=torch.long, device=device)
        self.patch = torch.zeros(1, dtype=torch.long, device=device)  # the one that is drawn next

        branches = [guidance_branches(*prompt, cfg_image, cfg_text) for prompt in prompts]
        self.weights = torch.tensor([weight for weight, _, _ in branches[0]], device=device)
        sequences = [build_sequence(config, *prompt, sizes) for row in branches for _, *prompt in row]
        self.prefill(*(x.to(device) for x in pad_sequences(sequences)), n_groups)

    def prefill(self, tokens, lengths, n_groups):
        """Runs the transformer over prompts: tokens (B, T, 4 + n_codebooks), lengths (B,)."""
        model, config, device, N = self.model, self.model.config, tokens.device, self.model.config.n_patches
        (B, T, _), last = tokens.shape, (torch.arange(len(tokens), device=device), lengths - 1)
        S = T + self.G * N  # slots: the prompt, then N for each picture of the group
        self.table = model.code_table().to(model.blocks[0].mlp.fc.weight.dtype)
        dtype = torch.float32 if device.type == "cpu" else self.table.dtype  # a CPU attends faster in fp32
        keys, values = torch.zeros(2, config.n_layer, B, config.n_head, S, config.n_embd // config.n_head,
                                   dtype=dtype, device=device)
        causal = torch.full((T, S), -torch.inf, dtype=dtype, device=device).triu(1)
        caches = [KVCache(k, v, torch.arange(T, device=device), causal) for k, v in zip(keys, values)]
        x = model.embed(tokens, self.table)
        x = model.hidden(x, rotary_table(tokens[..., POSITION], config), caches)[last]  # (B, n_embd)

        # From here on a row is a group of pictures in a branch.
        self.x = x.repeat_interleave(n_groups * self.G, 0)  # (rows * G, n_embd): what predicts the next patch
        grid = torch.cartesian_prod(*[torch.arange(config.side, device=device)] * 2)  # (N, 2)
        order = tokens[last][:, None, 1:2].expand(-1, N, -1)  # (B, N, 1)
        positions = torch.cat((order, grid.expand(B, -1, -1)), 2)  # (B, N, 3)
        self.rotary = rotary_table(positions.repeat_interleave(n_groups, 0), config)  # (rows, 1, N, head_dim)
        self.slots = T + N * torch.arange(self.G, device=device)
        unseen = torch.arange(S, device=device) >= lengths.repeat_interleave(n_groups)[:, None]  # (rows, S)
        self.mask = torch.zeros(len(unseen), 1, self.G, S, dtype=dtype, device=device)
        self.mask.masked_fill_(unseen[:, None, None], -torch.inf)
        self.caches = [KVCache(k.repeat_interleave(n_groups, 0), v.repeat_interleave(n_groups, 0), self.slots,
                               self.mask) for k, v in zip(keys, values)]

    def to_branches(self, x):
        """(pictures, ...) -> the same for every branch (rows * G, ...)"""
        x = x.unflatten(0, (-1, 1, self.n_drawn))  # (prompts, 1, n_drawn, ...)
        return x.expand(-1, len(self.weights), *x.shape[2:]).flatten(0, 2)

    def guide(self, logits):
        """The branches' logits (rows * G, codebook_size) -> their weighted sum (pictures, codebook_size)"""
        logits = logits.unflatten(0, (-1, len(self.weights), self.n_drawn))  # (prompts, branches, n_drawn, K)
        return (logits * self.weights[:, None, None]).sum(1).flatten(0, 1)

    def draw_patch(self):
        """Draws the codes of the next patch of every picture, coarse to fine, each told the coarser ones."""
        uniform = self.uniform.index_select(1, self.patch)[:, 0]  # (pictures, n_codebooks)
        codes = self.codes[:, 0, :0]  # (pictures, 0)
        for level, temperature in enumerate(self.temperatures):
            logits = self.guide(self.model.logits(self.x, self.to_branches(codes), self.table))
            code = draw_codes(logits, uniform[:, level], temperature)
            codes = torch.cat((codes, code[:, None]), 1)
        self.codes.index_copy_(1, self.patch, codes[:, None])

    def step(self):
        """The transformer reads the patch that was drawn last (decode), and the next one is drawn."""
        codes = self.codes.index_select(1, self.patch)[:, 0]  # (pictures, n_codebooks)
        x = self.to_branches(self.model.sum_codes(codes, self.table))
        x = x.unflatten(0, (-1, self.G))  # (rows, G, n_embd)
        self.patch.add_(1)
        rotary = [table.index_select(2, self.patch) for table in self.rotary]  # (rows, 1, 1, head_dim) each
        self.mask.scatter_(3, self.slots.view(1, 1, -1, 1).expand(len(x), 1, -1, 1), 0)
        self.x.copy_(self.model.hidden(x, rotary, self.caches).flatten(0, 1))
        self.slots.add_(1)
        self.draw_patch()


@torch.inference_mode()
def generate(model, prompts, sizes, n=1, seed=0, temperatures=TEMPERATURES, cfg_image=1.0, cfg_text=1.0,
             exact=False):
    """Draws n pictures of each prompt -> codes (len(prompts) * n, N, n_codebooks). prompts: list of (pieces,
    references), as build_sequence takes them with sizes. temperatures: one a codebook. Row i uses the
    random numbers of seed + i, whatever is drawn beside it. exact: in fp32, where that makes it the same
    picture; in bf16 rounding may turn it into another."""
    drawing = Drawing(model, prompts, sizes, n, seed, temperatures, cfg_image, cfg_text, exact)
    drawing.draw_patch()
    repeat(drawing.step, model.config.n_patches - 1, drawing.codes.device)
    return drawing.codes.unflatten(0, (len(prompts), -1))[:, :n].flatten(0, 1)
