r"""MENTOR in one file: a transformer that draws an image, patch by patch, from a prefix of text and images.

    <bos> the dog in <boi> c1 ... cN s1 ... sM <eoi> . a dog on the beach <boi> | t1 t2 ... tN
    \ text as words, reference images as VQ codes, in the order of the prompt _/ \ the picture /

One causal transformer, one loss: cross-entropy on the picture's codes (arXiv 2507.09574, section 3). Each c,
s and t is a patch with a few codes, coarse to fine. The patches c show the reference as it is, the patches s
show it at two thirds; a task uses one or both of these copies (data.Task).
"""
import copy
import functools
import math
import re
import unicodedata
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer import BadInput


# ---- Configuration ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    image_size: int = 64        # pixels per side
    downsample: int = 8         # pixels per side of a patch
    n_codebooks: int = 6        # codes of a patch, coarse to fine
    codebook_size: int = 1024   # codes in each codebook
    code_dim: int = 32          # length of a codebook vector
    channels: int = 80          # width of the tokenizer
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    block_size: int = 352       # longest sequence in tokens: words, references and picture together
    # Side of each copy of a reference, as a share of the canvas: 2 / 3 makes a small subject of a big one.
    reference_sizes: tuple = (1.0, 2 / 3)

    @property
    def side(self):  # patches per side of an image
        return self.image_size // self.downsample

    @property
    def n_patches(self):  # patches of an image, each one token; N in the comments that give shapes
        return self.side ** 2


CONFIGS = {
    "test": Config(image_size=32, n_codebooks=3, codebook_size=64, code_dim=8, channels=32, n_layer=2,
                   n_head=2, n_embd=64, block_size=256),
    "cpu": Config(),
    "gpu": Config(image_size=128, codebook_size=4096, channels=128, n_layer=12, n_head=12, n_embd=768,
                  block_size=1184),
}


def has_bf16(device):
    """Whether the hardware multiplies bf16: CUDA since Ampere, CPUs with avx512_bf16 (others are slow)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


# ---- Words ------------------------------------------------------------------------------------------------
# The hash of a word gives two indices into one table, whose vectors are added (the hashing trick). So every
# word of every script has a vector. The first indices are for tokens that are not words, which have theirs
# twice: begin of sequence, begin and end of image, hidden patch, and patch, whose vector is never read.

WORD_TABLE_SIZE, N_SPECIAL = 4096, 5
BOS, BOI, EOI, HIDDEN, PATCH = range(N_SPECIAL)
# Marks and joiners are parts of words: the vowels of Thai, the accents of decomposed letters.
MARKS = "\u200c\u200d" + "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")
WORD = re.compile(rf"[\w{MARKS}]+|[^\w\s{MARKS}]")  # a word or a sign


def words_of(text):
    """The words and signs of a text in lowercase, its accents composed (NFC). dogs becomes dog (bus and glass
    stay), an becomes a."""
    words = WORD.findall(unicodedata.normalize("NFC", text.lower()))
    return ["a" if word == "an" else re.sub("(?<=..[^s])s$", "", word) for word in words]


def word_ids(word):
    """-> two indices into the word table, the same on every machine"""
    n = WORD_TABLE_SIZE - N_SPECIAL
    first, second = divmod(zlib.crc32(word.encode(errors="surrogatepass")) % n ** 2, n)
    return first + N_SPECIAL, second + N_SPECIAL


# ---- The sequence -----------------------------------------------------------------------------------------

# A token is 5 + k integers: two indices into the word table, three of position (order, row, column), and k
# codes if it is a patch.
WORD_IDS, POSITION, CODES = slice(0, 2), slice(2, 5), slice(5, None)


@functools.cache
def patch_grid(side):
    """Row and column of each patch of an image: (N, 2)"""
    return torch.cartesian_prod(torch.arange(side), torch.arange(side))


@functools.cache
def copy_patches(config, index):
    """The patches of the canvas that copy `index` of a reference covers, in its middle: indices below N"""
    size, side = config.reference_sizes[index], config.side
    first, end = math.floor(side * (1 - size) / 2), math.ceil(side * (1 + size) / 2)
    return np.arange(side * side).reshape(side, side)[first:end, first:end].flatten()


def build_sequence(config, pieces, references, copies, target=None):
    """Texts with images between them -> tokens (T, 5 + k). Raises BadInput if they are too long.

    pieces: strings. references: tensors (len(copies), N, k), the first after the first piece and so on.
    copies: indices into config.reference_sizes, ascending; only the patches that a copy covers become tokens.
    target: (N, k), the picture to draw; without it the sequence ends with <boi>, ready to draw. k is
    n_codebooks, or 1 while a patch has an index instead of codes (train.lay_out).

                    <bos> the dog in <boi> c... s... <eoi> a dog <boi> t1 ... t63
        order         0    1   2  3    4    5    6     7   8  9   10  10 ... 10
        row, column  0,0  0,0  ...    0,0  its own    0,0  ...    0,0 0,1 ... 7,7

    The last <boi> and the patches of the picture have the row and column of the patch that they PREDICT, the
    next one. So the position of what draws a patch differs from that of the same patch of a reference in the
    order alone, which makes copying easy to learn. All other tokens have no place in an image: 0, 0."""
    tokens, k = [], config.n_codebooks if target is None else target.shape[1]

    def add(n, ids, order, grid=0, codes=0):  # n tokens
        token = np.zeros((n, 5 + k), int)
        token[:, WORD_IDS], token[:, 2], token[:, 3:5], token[:, CODES] = ids, order, grid, codes
        tokens.append(token)

    grid = patch_grid(config.side).numpy()
    add(1, BOS, 0)
    order = 1
    for i, piece in enumerate(pieces):
        words = np.array([word_ids(word) for word in words_of(piece)]).reshape(-1, 2)
        add(len(words), words, order + np.arange(len(words)))
        order += len(words)
        if i < len(references):
            add(1, BOI, order)
            # The order counts by `index`: copy 1 has the same distance from <boi> without copy 0, too.
            for index, codes in zip(copies, references[i].cpu().numpy()):
                patches = copy_patches(config, index)
                add(len(patches), PATCH, order + 1 + index, grid[patches], codes[patches])
            add(1, EOI, order + 2 + copies[-1])
            order += 3 + copies[-1]
    room = config.block_size - sum(map(len, tokens)) - config.n_patches
    if room < 0:
        n_words = len(words_of(" ".join(pieces)))
        raise BadInput(f"--label and --prompt make a sentence of {n_words} words of text, "
                       f"and {max(0, n_words + room)} fit: shorten them")
    add(1, BOI, order, grid[0])
    if target is not None:
        add(config.n_patches - 1, PATCH, order, grid[1:], target[:-1])
    return torch.from_numpy(np.concatenate(tokens))


def pack_sequences(sequences):
    """Sequences of tokens, one behind the other: tokens (n, 5 + k), lengths (a list that sums to n). Training
    reads them so: padding would take time and teach nothing."""
    return torch.cat(sequences), [len(sequence) for sequence in sequences]


def pad_sequences(sequences):
    """Sequences of tokens, one below the other, padded on the right: tokens (B, T, 5 + k), lengths (B,).
    Drawing reads them so. Attention is causal: nothing looks at the padding."""
    tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return tokens, torch.tensor([len(sequence) for sequence in sequences])


# ---- The transformer --------------------------------------------------------------------------------------

def rms_norm(x):
    """x / sqrt(mean(x^2)) over the last axis, in fp32. (On a CPU this is faster than F.rms_norm.)"""
    x = x.float()
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-6)


def rotary_table(positions, config):
    """positions (..., 3) -> cos and (-sin, sin) for `rotate`: (..., 1, head_dim), the 1 for the heads.
    Half of the pairs turn with the order, a quarter each with row and column. Position 0 has cos 1 and sin 0,
    the identity (a table of zeros would blind attention to the prefix, as it did in LlamaGen). Of row and
    column the fastest pair makes half a turn per patch, so that copying tells neighbours apart. The slowest
    makes about half a turn per image."""
    head_dim, side, angles = config.n_embd // config.n_head, config.side, []
    n_order, n_grid = head_dim // 4, head_dim // 8  # pairs that turn with the order; with row or column
    for axis, (n_pairs, fastest, base) in enumerate([(n_order, 1.0, 10000)] + 2 * [(n_grid, torch.pi, side)]):
        frequency = fastest * base ** (-torch.arange(n_pairs, device=positions.device) / n_pairs)
        angles.append(positions[..., None, axis, None] * frequency)  # (..., 1, n_pairs)
    angles = torch.cat(angles, -1)  # (..., 1, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Pairs (a, b) of x (..., head_dim), first all a, then all b -> (a cos - b sin, b cos + a sin)"""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(head_dim) + mask) v: q (..., n_head, T, head_dim), k and v (..., n_head, S,
    head_dim). Causal if there is no mask. (On a CPU in bf16 the formula is faster than torch's kernel.)"""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.full((q.shape[-2], q.shape[-2]), -torch.inf, dtype=q.dtype).triu(1)  # (T, T)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (..., n_head, T, S)
    return (scores + mask).softmax(-1) @ v


class Packing(NamedTuple):
    """Where B sequences stand in a packed batch of n tokens."""
    lengths: list        # of each sequence
    slots: torch.Tensor  # (n,): where each token would stand if all were padded to the longest, row by row


@torch.compiler.disable  # lengths change from step to step
def attend_within(q, k, v, packing):
    """Causal attention within each of the packed sequences: q, k, v (n, n_head, head_dim) -> the same shape.
    On a CPU they take turns, without padding. Other devices are faster if all are one batch."""
    if q.device.type != "cpu":
        return attend_padded(q, k, v, packing)
    each = zip(*(x.transpose(0, 1).split(packing.lengths, 1) for x in (q, k, v)))  # (n_head, T, head_dim)
    return torch.cat([attend(*qkv) for qkv in each], 1).transpose(0, 1)


def attend_padded(q, k, v, packing):
    """attend_within, on a batch that is padded for this alone."""
    lengths, slots = packing
    B, T = len(lengths), max(lengths)
    q, k, v = (x.new_zeros(B * T, *x.shape[1:]).index_copy(0, slots, x).unflatten(0, (B, T)).transpose(1, 2)
               for x in (q, k, v))  # (B, n_head, T, head_dim)
    return attend(q, k, v).transpose(1, 2).flatten(0, 1)[slots]


class KVCache(NamedTuple):
    """Keys and values of a layer, and where the query tokens stand among them."""
    keys: torch.Tensor    # (B, n_head, S, head_dim)
    values: torch.Tensor  # (B, n_head, S, head_dim)
    slots: torch.Tensor   # (T,): which of the S belong to the query tokens
    mask: torch.Tensor    # (B, 1, T, S) or (T, S): 0 where they look, -inf where they do not


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # Three matrices and not one, since Muon (train.py) orthogonalises each by itself.
        self.qkv = nn.ParameterList(torch.empty(config.n_embd, config.n_embd) for _ in range(3))
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.gain = nn.Parameter(torch.empty(config.n_head, 1, 1))  # QK-norm fixes lengths; this sharpens

    def forward(self, x, rotary, context):
        """context: in training a Packing, with x (n, n_embd); in drawing a KVCache, which is written to, with
        x (B, T, n_embd). Returns the shape of x."""
        x = x.to(self.proj.weight.dtype)
        q, k, v = (F.linear(x, matrix).unflatten(-1, (self.n_head, -1)) for matrix in self.qkv)
        dtype = v.dtype  # that of the matrix products; q, k, v: (..., n_head, head_dim)
        q, k = rotate(rms_norm(q), *rotary) * self.gain.squeeze(-1), rotate(rms_norm(k), *rotary)  # in fp32
        if isinstance(context, Packing):
            y = attend_within(q.to(dtype), k.to(dtype), v, context)
        else:
            q, k, v = (x.transpose(1, 2).to(context.keys.dtype) for x in (q, k, v))  # (B, n_head, T, ...)
            keys = context.keys.index_copy_(2, context.slots, k)  # (B, n_head, S, head_dim)
            values = context.values.index_copy_(2, context.slots, v)
            y = attend(q, keys, values, context.mask).transpose(1, 2)
        return self.proj(y.flatten(-2).to(dtype))


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

    def forward(self, x, rotary, context, kept=None):
        """kept: indices of the tokens that are needed after this block, if not all are."""
        x = x + self.attention(rms_norm(x), rotary, context)
        x = x if kept is None else x[kept]
        return x + self.mlp(rms_norm(x))


class Mentor(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        levels, K, C = config.n_codebooks, config.codebook_size, config.n_embd
        self.word_embedding = nn.Embedding(WORD_TABLE_SIZE, C)
        self.code_embedding = nn.Parameter(torch.empty(levels, K, C))
        self.code_proj = nn.Parameter(torch.empty(levels, config.code_dim, C))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.level_mlps = nn.ModuleList(MLP(config, expansion=2) for _ in range(levels - 1))
        self.head_gain = nn.Parameter(torch.empty(levels))
        self.register_buffer("codebooks", torch.zeros(levels, K, config.code_dim))  # the tokenizer's
        self.init_weights()

    def init_weights(self):
        """Similar codes start out similar. The last matrix of attention and MLPs is zero, so that a block
        starts as the identity. head_gain is small: else a model that passes its input on would be sure that
        the last code comes again."""
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
        """The vectors of all codes: a list of (codebook_size, n_embd), one for each level. A vector is a
        learned embedding plus a projection of the codebook vector. Codebook vectors are first scaled to a
        mean length of 1 per level, because coarse ones are much longer. The output head is tied to the
        table: a reference's patch that attention passes on raises the logits of its own codes."""
        norms = self.codebooks.norm(dim=-1).mean(-1).clamp_min(1e-6)  # (n_codebooks,)
        table = self.code_embedding + (self.codebooks / norms[:, None, None]) @ self.code_proj
        return list(table.unbind())  # (indexing it level by level would make full-size gradients)

    def embed(self, tokens, table):
        """(..., 5 + n_codebooks) -> (..., n_embd): text by its two rows, a patch by its codes."""
        text = self.word_embedding(tokens[..., WORD_IDS]).sum(-2)
        patches = sum(F.embedding(codes, level) for codes, level in zip(tokens[..., CODES].unbind(-1), table))
        return torch.where(tokens[..., :1] == PATCH, patches, text)

    def run_blocks(self, x, rotary, contexts, kept=None):
        """Embedded tokens (..., n_embd), their rotary table and the context of each block's attention -> the
        last block's output, normalised: of all tokens, or of those kept."""
        x = rms_norm(x)
        for block, context in zip(self.blocks, contexts):
            x = block(x, rotary, context, kept if block is self.blocks[-1] else None)
        return rms_norm(x)

    def logits(self, x, coarser, level, vectors):
        """Logits of one code of the patch that x (..., n_embd) predicts -> (..., codebook_size), fp32.
        coarser: the sum of the vectors of its coarser codes (..., n_embd). vectors: code_table()[level]"""
        if level > 0:
            x = x + self.level_mlps[level - 1](rms_norm(x + rms_norm(coarser)))
        return F.linear((x * self.head_gain[level]).to(vectors.dtype), vectors).float()

    def forward(self, tokens, lengths, target):
        """Packed tokens (n, 5 + n_codebooks), their lengths (a list of B), codes of the target (B, N,
        n_codebooks) -> the cross-entropy of each of these codes, in nats (B, N, n_codebooks)."""
        N, longest, ends = target.shape[1], max(lengths), torch.tensor(lengths).cumsum(0)
        # The last N tokens of a sequence, <boi> and all patches but the last, predict its N patches.
        predicting = (ends[:, None] + torch.arange(-N, 0)).flatten().to(tokens.device)  # (B * N,)
        slots = torch.cat([i * longest + torch.arange(length) for i, length in enumerate(lengths)])
        packing, table = Packing(lengths, slots.to(tokens.device)), self.code_table()
        x, rotary = self.embed(tokens, table), rotary_table(tokens[:, POSITION], self.config)
        x = self.run_blocks(x, rotary, [packing] * len(self.blocks), predicting)  # (B * N, n_embd)
        nats, coarser = [], 0.0
        for level, codes in enumerate(target.flatten(0, 1).unbind(-1)):  # (B * N,) each
            logits = self.logits(x, coarser, level, table[level])  # (B * N, codebook_size)
            nats.append(F.cross_entropy(logits, codes, reduction="none"))
            coarser = coarser + F.embedding(codes, table[level])
        return torch.stack(nats, -1).view(target.shape)


def weighted_loss(nats, coverage, coarse):
    """The loss of the transformer, from what Mentor.forward returns (B, N, n_codebooks) -> a scalar

        loss = mean over samples and patches p of  w_p * sum over levels l of  c_l * nats[p, l]
        nats[p, l] = -log P(code l of patch p | prompt, the patches before p, the coarser codes of p)
        w_p = (1 + 4 coverage_p) / its mean over the picture;  c_0 = coarse, all other c_l = 1

    coverage (B, N): how much of each patch the subject covers, 0 to 1. Three patches in four are background,
    whose randomness would drown what the reference has to teach. coarse (B,): see data.Task. The paper has
    w = c = 1."""
    weights = 1 + 4 * coverage
    weights = weights / weights.mean(1, keepdim=True)
    nats = coarse[:, None] * nats[..., 0] + nats[..., 1:].sum(-1)  # (B, N)
    return (weights * nats).mean()


# ---- Guidance ---------------------------------------------------------------------------------------------

def hide_condition(pieces, references, hide):
    """A prompt without its text (hide "text"), empty ("all"), or else as it is: what guidance compares."""
    if hide == "all":
        return [""], []
    return ([""] * len(pieces) if hide == "text" else pieces), references


def guidance_branches(pieces, references, cfg_image, cfg_text):
    """logits = null + cfg_image (image only - null) + cfg_text (full - image only), as a weighted sum -> list
    of (weight, pieces, references), without those that weigh nothing."""
    branches = [(cfg_text, pieces, references),
                (cfg_image - cfg_text, *hide_condition(pieces, references, "text")),
                (1 - cfg_image, *hide_condition(pieces, references, "all"))]
    return [branch for branch in branches if abs(branch[0]) > 1e-6]


# ---- Drawing ----------------------------------------------------------------------------------------------

TEMPERATURES = (0.3, 0.2, 0.15, 0.1, 0.05, 0.02)  # one for each level: the finer, the cooler


def drawing_copy(model):
    """A copy whose matrices are bf16 where the hardware multiplies it: half as much to read for every patch.
    Norms, softmax and sums stay in fp32. (A copy is not compiled, either: drawing has too many shapes.)"""
    model = copy.deepcopy(model)
    if has_bf16(model.head_gain.device):
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.ParameterList)):
                module.bfloat16()
    return model


def prefill(model, table, tokens, lengths, prompt_of):
    """Reads each prompt once, and copies its state to every row that draws from it: tokens (B, T, 5 +
    n_codebooks), lengths (B,), prompt_of (rows,), which of the B a row continues.
    Returns x (rows, n_embd), which predicts the first patch; the rotary tables of all N patches, (rows, N, 1,
    head_dim) each; a KVCache for each layer, with room for N patches."""
    config, device, N = model.config, tokens.device, model.config.n_patches
    (B, T, _), head_dim = tokens.shape, config.n_embd // config.n_head
    S = T + N  # slots: those of the prompt with its padding, then those of the picture
    # On a CPU attention to the cache is faster in fp32.
    dtype = torch.float32 if device.type == "cpu" else model.blocks[0].mlp.fc.weight.dtype
    keys, values = torch.zeros(2, config.n_layer, B, config.n_head, S, head_dim, dtype=dtype, device=device)
    causal = torch.full((T, S), -torch.inf, dtype=dtype, device=device).triu(1)
    caches = [KVCache(k, v, torch.arange(T, device=device), causal) for k, v in zip(keys, values)]
    x = model.run_blocks(model.embed(tokens, table), rotary_table(tokens[..., POSITION], config), caches)

    last = lengths[prompt_of] - 1  # (rows,)
    order = tokens[prompt_of, last][:, None, 2:3].expand(-1, N, -1)  # (rows, N, 1)
    grid = patch_grid(config.side).to(device).expand(len(prompt_of), -1, -1)  # (rows, N, 2)
    rotary = rotary_table(torch.cat((order, grid), 2), config)
    mask = torch.zeros(len(prompt_of), 1, 1, S, dtype=dtype, device=device)
    unseen = torch.arange(S, device=device) > last[:, None]  # (rows, S): padding, and patches to come
    mask.masked_fill_(unseen[:, None, None], -torch.inf)
    slots = torch.full((1,), T, device=device)  # of the patch that is drawn next
    caches = [KVCache(k[prompt_of], v[prompt_of], slots, mask) for k, v in zip(keys, values)]
    return x[prompt_of, last], rotary, caches


def choose_codes(logits, uniform, temperature):
    """Samples one code per row: the first whose cumulative probability exceeds `uniform`, from [0, 1).
    logits (B, codebook_size), uniform (B,) -> (B,). Below a temperature of 1e-3, where the division could
    overflow, it takes the likeliest."""
    if temperature < 1e-3:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)  # (B, codebook_size)
    passed = cumulative <= uniform[:, None] * cumulative[:, -1:]
    return passed.sum(-1).clamp_max(logits.shape[-1] - 1)


def repeat(step, times, device):
    """Calls step() so many times. On CUDA it replays a graph of it, without Python between the kernels."""
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


@torch.inference_mode()
def generate(model, prompts, copies, n=1, seed=0, temperatures=TEMPERATURES, cfg_image=1.0, cfg_text=1.0):
    """Draws n pictures of each prompt -> codes (len(prompts) * n, N, n_codebooks).

    prompts: list of (pieces, references), as build_sequence takes them with copies. temperatures: one for
    each level. Picture i of the result uses the random numbers of seed + i, whatever is drawn beside it.

    A row is one picture in one branch of guidance: rows = prompts x branches x pictures. With 2 prompts, 3
    branches and n = 4, row 17 is picture 1 in branch 1 of prompt 1."""
    model, config, device = drawing_copy(model), model.config, model.head_gain.device
    branches = [branch for prompt in prompts for branch in guidance_branches(*prompt, cfg_image, cfg_text)]
    sequences = [build_sequence(config, *prompt, copies) for _, *prompt in branches]
    weights = [weight for weight, _, _ in branches[:len(branches) // len(prompts)]]  # the same for all
    weights = torch.tensor(weights, device=device)[:, None, None]  # (branches, 1, 1)
    shape, n_rows = (len(prompts), len(weights), n), len(sequences) * n
    # On a CPU an fp32 product gives a row the same bits only in blocks of four rows: pad with the last row.
    row = torch.arange(n_rows + -n_rows % 4, device=device).clamp_max(n_rows - 1)
    picture_of = row // (len(weights) * n) * n + row % n  # (rows,)
    uniform = [torch.rand(config.n_patches, config.n_codebooks, generator=torch.Generator().manual_seed(i))
               for i in range(seed, seed + len(prompts) * n)]
    uniform = torch.stack(uniform).to(device)  # (pictures, N, n_codebooks)

    table = model.code_table()
    heads = [vectors.to(model.blocks[0].mlp.fc.weight.dtype) for vectors in table]
    tokens, lengths = (x.to(device) for x in pad_sequences(sequences))
    x, rotary, caches = prefill(model, table, tokens, lengths, row // n)
    mask, slots = caches[0].mask, caches[0].slots  # all layers share them
    drawn, patch = torch.zeros_like(x), torch.zeros(1, dtype=torch.long, device=device)
    codes = torch.zeros_like(uniform, dtype=torch.long)

    # A step changes tensors in place and brings no number to Python: so CUDA can replay it as a graph.
    def draw_patch():
        """Samples the codes of the next patch, coarse to fine, each given the coarser ones."""
        coarser, chosen = torch.zeros_like(x), []
        for level in range(config.n_codebooks):
            logits = model.logits(x, coarser, level, heads[level])  # (rows, codebook_size)
            guided = (logits[:n_rows].unflatten(0, shape) * weights).sum(1).flatten(0, 1)  # a row per picture
            chosen.append(choose_codes(guided, uniform[:, patch, level].squeeze(1), temperatures[level]))
            coarser = coarser + F.embedding(chosen[-1], table[level])[picture_of]
        codes.index_copy_(1, patch, torch.stack(chosen, -1)[:, None])
        drawn.copy_(coarser)  # now the sum of all its codes: the patch as the transformer reads it

    def step():
        """The transformer reads the patch that was drawn last, and the next one is drawn."""
        mask.index_fill_(3, slots, 0)  # from now on rows see it
        patch.add_(1)
        x.copy_(model.run_blocks(drawn[:, None], [t.index_select(1, patch) for t in rotary], caches)[:, 0])
        slots.add_(1)
        draw_patch()

    draw_patch()
    repeat(step, config.n_patches - 1, device)
    return codes
