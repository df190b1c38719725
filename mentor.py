"""MENTOR in one file: an autoregressive transformer that draws an image from an interleaved prefix of text and images.

    <bos> T h e _ d o g _ i n _ <boi> c1 ... cN <eoi> . \\n a _ d o g ... <boi> | t1 t2 ... tN
    \\______ text as UTF-8 bytes, reference images as VQ codes, in the order of the prompt ____/ \\__ the picture __/

One vocabulary, one causal transformer, one loss: cross-entropy on the picture's codes (paper: arXiv 2507.09574, section 3).
Read on in the order in which data flows: Config, the sequence, attention, block, model, generate.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Configuration and vocabulary


@dataclass
class Config:
    image_size: int = 64        # pixels a side
    downsample: int = 8         # pixels a side of the patch that one code stands for
    codebook_size: int = 1024   # of each of the tokenizer's two codebooks: an image code is a pair, coarse and fine
    code_dim: int = 8           # numbers in a codebook vector
    channels: int = 80          # width of the tokenizer
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    block_size: int = 240       # longest sequence, in tokens: text bytes, references and picture together

    @property
    def side(self):  # codes a side of an image
        return self.image_size // self.downsample

    @property
    def n_codes(self):  # codes an image
        return self.side ** 2


CONFIGS = {
    "test": Config(image_size=32, codebook_size=64, channels=32, n_layer=2, n_head=2, n_embd=64, block_size=144),
    "cpu": Config(),
    "gpu": Config(image_size=128, codebook_size=4096, channels=128, n_layer=12, n_head=12, n_embd=768, block_size=640),
    "paper": Config(image_size=512, downsample=16, codebook_size=16384, channels=256, n_layer=36, n_head=20, n_embd=1280,
                    block_size=5 * 1024 + 512),
}
BOS, BOI, EOI, PAD = 256, 257, 258, 259  # after the 256 bytes: begin of sequence, begin and end of an image, padding
FIRST_CODE = 260  # then the image codes, coarse * codebook_size + fine: each is the sum of two vectors, not a row of a table

# ---------------------------------------------------------------------------------------------------------------------
# The sequence

PROMPTS = {  # the official code's wording; <image> is where a reference stands
    "text-to-image": "{caption}",
    "reconstruction": "The image is <image>\n{caption}",
    "segmentation": "The {label} in <image>.",
    "recovery": "The {label} in <image>.\n{caption}",
    "subject-driven": "The {label} in <image>.\n{caption}",
}


def fill_prompt(task, label="", caption=""):
    """-> the texts around the images: n + 1 strings for n images. `<image>` in a label or caption stays plain text."""
    return [piece.format(label=label, caption=caption) for piece in PROMPTS[task].split("<image>")]


def hide_condition(pieces, references, hide):
    """What training hides ("all", "images", "text" or ""), so that the model learns every branch that guidance compares."""
    if hide == "all":
        return [""], []
    if hide == "images":
        return ["".join(pieces)], []
    return ([""] * len(pieces) if hide == "text" else pieces), references


def build_sequence(config, pieces, references, target=None):
    """Texts with images between them -> one sequence.

    pieces: strings. references: code tensors (N,), at most one behind each piece. target: the picture's codes (N,).
    -> ids (T,), positions (T, 3). With a target the last N tokens are <boi> and all its codes but the last: each of them
    predicts the next code. Without one, the sequence ends with <boi>, ready to draw.
    Raises ValueError if it does not fit the block, with the number of bytes that do.

    A position is (order, row, column), one rotary axis each. All codes of an image share one order. A code of a
    reference stands at its own patch; a token of the picture stands at the patch it is about to PREDICT. So when the
    model asks "what is drawn here?", the same place of a reference differs in the order alone: copying is easy to learn.
    """
    grid = [(row, column) for row in range(config.side) for column in range(config.side)]
    ids, positions, order = [BOS], [(0, 0, 0)], 1
    for i, piece in enumerate(pieces):
        text = list(piece.encode())
        ids += text
        positions += [(order + j, 0, 0) for j in range(len(text))]
        order += len(text)
        if i < len(references):
            ids += [BOI, *(references[i] + FIRST_CODE).tolist(), EOI]
            positions += [(order, 0, 0), *((order + 1, *patch) for patch in grid), (order + 2, 0, 0)]
            order += 3
    room = config.block_size - (len(ids) + config.n_codes)
    if room < 0:
        n_bytes = len("".join(pieces).encode())
        raise ValueError(f"the prompt has {n_bytes} bytes of text, and {max(0, n_bytes + room)} fit: shorten it")
    ids.append(BOI)
    if target is None:
        positions.append((order, 0, 0))
    else:
        ids += (target[:-1] + FIRST_CODE).tolist()
        positions += [(order, *patch) for patch in grid]
    return torch.tensor(ids), torch.tensor(positions)


def pad_sequences(sequences, multiple=1):
    """List of (ids, positions) -> ids (B, T), positions (B, T, 3), lengths (B,), padded on the right. T is rounded up to a
    multiple of `multiple`: torch.compile compiles each length anew, so let it meet few.

    Attention is causal, so nothing ever looks at the padding: no key mask, and no sample depends on its batch.
    """
    lengths = torch.tensor([len(ids) for ids, _ in sequences])
    T = -(-int(lengths.max()) // multiple) * multiple
    ids = torch.stack([F.pad(ids, (0, T - len(ids)), value=PAD) for ids, _ in sequences])
    positions = torch.stack([F.pad(p, (0, 0, 0, T - len(p))) for _, p in sequences])
    return ids, positions, lengths


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:])


def rotary_table(positions, head_dim, side):
    """positions (B, T, 3) -> cos, sin (B, 1, T, head_dim / 2): half of the pairs turn with the order, a quarter each with
    row and column. At position 0 that is cos 1 and sin 0, the identity (a table of zeros would blind attention to the
    prefix, as it did in LlamaGen). Rows and columns turn fast, from half a turn a patch to half a turn an image of
    `side` patches: neighbours must be told apart by a single step for a patch to be copied and not blurred."""
    half, quarter = head_dim // 4, head_dim // 8
    angles = []
    for axis, pairs, fastest, base in ((0, half, 1.0, 10000), (1, quarter, torch.pi, side), (2, quarter, torch.pi, side)):
        frequency = fastest * base ** (-torch.arange(pairs, device=positions.device) / pairs)
        angles.append(positions[:, None, :, axis, None] * frequency)  # (B, 1, T, pairs)
    angles = torch.cat(angles, -1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)  # (B, n_head, T, head_dim / 2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.gain = nn.Parameter(torch.empty(config.n_head, 1, 1))  # QK-norm fixes the lengths; this sets how sharp

    def forward(self, x, rotary, cache=None, index=None):
        """x (B, T, n_embd) -> (B, T, n_embd). cache: in prefill a list, to which keys and values are appended; in a decode
        step (T = 1) this layer's (2, B, n_head, S, head_dim), and index (B,) says where in it each row's token stands."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_dim)
        q, k = rotate(rms_norm(q) * self.gain, *rotary), rotate(rms_norm(k), *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast keeps norms in fp32 on some devices
        if index is None:
            if cache is not None:
                cache.append(torch.stack((k, v)))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys, values = cache  # (B, n_head, S, head_dim)
            place = index.view(B, 1, 1, 1).expand_as(k)
            keys.scatter_(2, place, k)
            values.scatter_(2, place, v)
            seen = torch.arange(keys.shape[2], device=x.device) <= index[:, None]  # (B, S)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, cache=None, index=None):
        x = x + self.attention(rms_norm(x), rotary, cache, index)
        return x + self.mlp(rms_norm(x))


class Mentor(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(FIRST_CODE + 2 * config.codebook_size, config.n_embd)  # text, coarse, fine
        self.code_proj = nn.Linear(config.code_dim, config.n_embd, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.fine_mlp = MLP(config)
        self.register_buffer("codebook", torch.zeros(2, config.codebook_size, config.code_dim))  # the tokenizer's
        self.init_weights()

    def init_weights(self):
        """embedding normal .02; code_proj normal .04 (similar codes start similar); qkv and fc uniform with the variance
        1 / n_embd; both proj zero (a block starts as the identity); gain 1.5."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.code_proj.weight, std=0.04)
        bound = (3 / self.config.n_embd) ** 0.5
        for block in self.blocks:
            nn.init.uniform_(block.attention.qkv.weight, -bound, bound)
            nn.init.zeros_(block.attention.proj.weight)
            nn.init.constant_(block.attention.gain, 1.5)
        for mlp in (*(block.mlp for block in self.blocks), self.fine_mlp):
            nn.init.uniform_(mlp.fc.weight, -bound, bound)
            nn.init.zeros_(mlp.proj.weight)

    def code_vectors(self):
        """Coarse and fine vectors (2, codebook_size, n_embd): an embedding each plus a projection of the codebook's.
        An image code enters as the sum of its two. The same vectors are the head: what attention copies from a reference
        is at once the logit of that code."""
        return self.embedding.weight[FIRST_CODE:].view(2, -1, self.config.n_embd) + self.code_proj(self.codebook)

    def hidden(self, ids, positions, cache=None, index=None):
        """ids (B, T), positions (B, T, 3) -> the last block's output, normalised (B, T, n_embd)."""
        coarse, fine = self.code_vectors()
        codes = (ids - FIRST_CODE).clamp_min(0)  # (B, T): coarse * K + fine, 0 where there is text
        images = F.embedding(codes // len(fine), coarse) + F.embedding(codes % len(fine), fine)
        text = F.embedding(ids.clamp_max(FIRST_CODE - 1), self.embedding.weight[:FIRST_CODE])
        x = rms_norm(torch.where((ids < FIRST_CODE)[..., None], text, images))
        rotary = rotary_table(positions, self.config.n_embd // self.config.n_head, self.config.side)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, cache if index is None else cache[i], index)
        return rms_norm(x)

    def coarse_logits(self, x):
        """The last block's output (..., n_embd) -> logits of the coarse half of the code it predicts (..., codebook_size)"""
        return F.linear(x, self.code_vectors()[0]).float()

    def fine_logits(self, x, coarse):
        """The same output, told the coarse half (...) -> logits of the fine half (..., codebook_size)"""
        coarse_vectors, fine_vectors = self.code_vectors()
        x = x + self.fine_mlp(rms_norm(x + rms_norm(F.embedding(coarse, coarse_vectors))))
        return F.linear(x, fine_vectors).float()

    def forward(self, ids, positions, lengths, target):
        """A sequence's loss: cross-entropy on the picture's codes alone, and only there are the heads computed.

        ids (B, T), positions (B, T, 3), lengths (B,) without padding, target (B, N) -> (B,), nats a code, both halves.
        """
        x = self.hidden(ids, positions)  # (B, T, n_embd)
        N, K = target.shape[1], self.config.codebook_size
        last = lengths[:, None] - N + torch.arange(N, device=ids.device)  # (B, N): the tokens that predict the picture
        x = x.gather(1, last[..., None].expand(-1, -1, x.shape[2]))  # (B, N, n_embd)
        coarse, fine = self.coarse_logits(x), self.fine_logits(x, target // K)  # (B, N, codebook_size)
        loss = F.cross_entropy(coarse.transpose(1, 2), target // K, reduction="none")
        return (loss + F.cross_entropy(fine.transpose(1, 2), target % K, reduction="none")).mean(1)

    # -- drawing

    @torch.no_grad()
    def prefill(self, ids, positions, lengths):
        """The whole prefix at once -> the output that predicts the first code (B, n_embd), and the cache of keys and values
        with room for the picture, (n_layer, 2, B, n_head, T + N, head_dim)."""
        layers = []
        x = self.hidden(ids, positions, layers)
        x = x[torch.arange(len(ids), device=ids.device), lengths - 1]  # (B, n_embd)
        return x, F.pad(torch.stack(layers), (0, 0, 0, self.config.n_codes))

    @torch.no_grad()
    def decode(self, codes, positions, index, cache):
        """One more code each: codes (B,), positions (B, 3), index (B,) in the cache -> output (B, n_embd).
        Every shape is static and the cache is written in place, as torch.compile wants it (tried on the CPU alone)."""
        return self.hidden(codes[:, None] + FIRST_CODE, positions[:, None], cache, index)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing with guidance

GUIDANCE = {  # (cfg_image, cfg_text) that suit each task: copying wants little, composing more
    "text-to-image": (3.0, 3.0), "reconstruction": (1.0, 1.0), "segmentation": (1.5, 1.5), "recovery": (2.0, 2.0),
    "subject-driven": (3.0, 3.0),
}
TEMPERATURE = 0.6


def guidance_branches(pieces, references, cfg_image, cfg_text):
    """logits = null + cfg_image (image only - null) + cfg_text (full - image only), written as a weighted sum.

    -> [(weight, pieces, references)], leaving out what weighs nothing: guidance of 1 is the conditional model alone.
    """
    branches = [(cfg_text, pieces, references),
                (cfg_image - cfg_text, *hide_condition(pieces, references, "text")),
                (1 - cfg_image, *hide_condition(pieces, references, "all"))]
    return [branch for branch in branches if abs(branch[0]) > 1e-6]


@torch.no_grad()
def generate(model, prompts, n=1, seed=0, temperature=TEMPERATURE, top_k=0, cfg_image=1.0, cfg_text=1.0):
    """Draws n pictures of each prompt.

    prompts: list of (pieces, references), as build_sequence takes them. All guidance branches run as one batch, and the
    n pictures of a prompt share its prefill. Row i of the result uses the noise of seed + i, whatever is drawn beside it.
    -> codes (len(prompts) * n, N)
    """
    config, device = model.config, model.embedding.weight.device
    rows = [guidance_branches(*prompt, cfg_image, cfg_text) for prompt in prompts]
    weights = torch.tensor([w for w, _, _ in rows[0]], device=device)  # the same for every prompt
    ids, positions, lengths = pad_sequences([build_sequence(config, p, r) for row in rows for _, p, r in row])
    ids, positions, lengths = ids.to(device), positions.to(device), lengths.to(device)
    order = positions[torch.arange(len(ids), device=device), lengths - 1, 0]  # the picture's own order

    x, cache = model.prefill(ids, positions, lengths)
    cache, x = cache.repeat_interleave(n, 2), x.repeat_interleave(n, 0)  # rows: prompt, branch, picture
    order, lengths = order.repeat_interleave(n), lengths.repeat_interleave(n)
    patches = torch.cartesian_prod(*[torch.arange(config.side, device=device)] * 2)  # (N, 2)
    # A picture's noise on the CPU, from its own seed: the same on every device and in every batch, so the same picture but for rounding.
    noise = torch.empty(len(prompts) * n, config.n_codes, 2, config.codebook_size)
    for i, picture in enumerate(noise):
        picture.exponential_(generator=torch.Generator().manual_seed(seed + i))
    noise = noise.to(device)

    def choose(logits, noise):
        """Guided logits of all branches, and a picture's noise -> what is drawn (len(prompts) * n,)"""
        branches = logits.view(len(prompts), len(weights), n, -1)
        guided = (branches * weights[None, :, None, None]).sum(1).flatten(0, 1)  # (len(prompts) * n, codebook_size)
        if top_k:
            guided = guided.masked_fill(guided < guided.topk(min(top_k, guided.shape[-1])).values[:, -1:], -torch.inf)
        if temperature > 0:  # probabilities over exponential noise: their argmax is a draw from the softmax
            guided = (guided / temperature).softmax(-1) / noise
        return guided.argmax(-1)

    def to_branches(chosen):
        return chosen.view(len(prompts), 1, n).expand(-1, len(weights), -1).flatten()

    codes = []
    for i in range(config.n_codes):
        if i > 0:
            x = model.decode(to_branches(codes[-1]), torch.cat((order[:, None], patches[i].expand(len(order), 2)), 1), lengths + i - 1, cache)
        coarse = choose(model.coarse_logits(x), noise[:, i, 0])
        fine = choose(model.fine_logits(x, to_branches(coarse)), noise[:, i, 1])
        codes.append(coarse * config.codebook_size + fine)
    return torch.stack(codes, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


VERSION = 2  # of the files: raised whenever older ones no longer fit


def load_checkpoint(path):
    """-> dict(config, stage, model, tokenizer, ...): tensors and plain values alone; nothing in the file is executed.
    Raises ValueError, in words for the user, on a file that is missing, truncated or holds anything else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        Config(**checkpoint["config"]), checkpoint["model"], checkpoint["tokenizer"], checkpoint["stage"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file can fail anywhere inside torch.load
        raise ValueError(f"{path}: not a checkpoint of this program, or damaged ({type(error).__name__})") from error
    if checkpoint.get("version") != VERSION:
        raise ValueError(f"{path}: written by another version of this program ({checkpoint.get('version')}, here {VERSION}): train it anew")
    return checkpoint


if __name__ == "__main__":  # what each preset costs, computed
    print("preset  pixels  codes an image  block_size  parameters  weights, gradients, AdamW (fp32, 16 bytes each; activations not)")
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Mentor(config).parameters())
        print(f"{name:6} {config.image_size:7} {config.n_codes:15} {config.block_size:11} {parameters / 1e6:9.1f}M"
              f" {parameters * 16 / 2**30:9.2f} GiB")
