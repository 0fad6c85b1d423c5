"""text.py - from a prompt to the tokens that later stages read.

CLIP (2103.00020): a text and an image transformer learn which caption belongs to which image. As in
Stable Diffusion, later stages read the last hidden states of its text half.
Make-A-Video's P (2209.14792, 3.1; unCLIP, 2204.06125) turns a prompt into the CLIP embedding of an
image, for a video network that reads no words.

    in    prompts; or a picture or video, with --image
    out   text.pt   tokens (B, L, D), and those of the empty prompt, for guidance; with --prior or
                    --image, an image_embedding (B, E)

    python text.py "a red star moving left" "a blue ring bouncing on sand" -o text.pt

Layers are named as in Hugging Face's CLIPModel.
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import vae
from base import (SD_ID, WEIGHTS, Diffusion, TimestepEmbedding, UserError, attend, check_output,
                  classifier_free_guidance, command_line, initial_noise, load_checkpoint,
                  load_state, new_clip, run, save_clip, tensors_id, warn)

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

START, END = "<|startoftext|>", "<|endoftext|>"
WORD = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
        r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


# ------------------------------------------------------------------------------------------------
# Byte-pair encoding as CLIP does it: over bytes, and "</w>" marks the end of a word.

def build_tokenizer(vocab: dict, merges: list) -> Tokenizer:
    """vocab: {token: id}; merges: pairs (a, b), or in some files "a b"."""
    pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def vocabulary(tokens) -> dict:
    """{token: id} in the order of tokens, without repetitions; start and end come last."""
    others = [token for token in dict.fromkeys(tokens) if token not in (START, END)]
    return {token: i for i, token in enumerate([*others, START, END])}


def learn_tokenizer(captions: list) -> tuple[dict, list]:
    """A vocabulary and merges that make one token of each word of captions of a small world. In
    CLIP's order: bytes, bytes that end a word, merges, start, end."""
    learner = build_tokenizer(vocabulary([]), [])
    learner.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", show_progress=False, special_tokens=[END]))
    merges = json.loads(learner.to_str())["model"]["merges"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + "</w>" for letter in letters]
    return vocabulary([*letters, *ends, *map("".join, merges)]), merges


def grow_tokenizer(vocab: dict, merges: list, captions: list) -> tuple[dict, list]:
    """Appends to both until every word of captions is one token."""
    tokens, merges = list(vocab), list(merges)
    for word in words_of(captions):
        left, *pieces = build_tokenizer(vocabulary(tokens), merges).encode(word).tokens
        for piece in pieces:
            if left.endswith("</w>"):  # to CLIP, "r2d2" is four words
                left = piece
            else:
                merges.append([left, piece])
                left += piece
                tokens.append(left)
    return vocabulary(tokens), merges


def words_of(captions) -> list:
    return sorted({word for line in captions for word in re.findall(r"\w+", line.lower())})


def read_tokenizer(folder: Path) -> dict:
    """CLIP's own vocabulary and merges: tokenizer.json, or vocab.json and merges.txt."""
    file = folder / "tokenizer.json"
    if file.is_file():
        model = json.loads(file.read_bytes())["model"]
        return {"vocab": model["vocab"], "merges": model["merges"]}
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]  # 0: the version
    return {"vocab": json.loads((folder / "vocab.json").read_bytes()), "merges": merges}


def tokenize(tokenizer: Tokenizer, prompts: list, context: int) -> torch.Tensor:
    """Ids (B, context): start, the prompt, then ends. A longer prompt is cut, with a warning.
    Differs: CLIP first mends the text, with ftfy and html.unescape."""
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt).ids
        if len(ids) > context - 2:
            warn(f"'{prompt}' has {len(ids)} tokens; only the first {context - 2} are read")
        ids = [start, *ids[:context - 2], end]
        rows.append(ids + [end] * (context - len(ids)))
    return torch.tensor(rows)


# ------------------------------------------------------------------------------------------------
# CLIP

@dataclass
class CLIPConfig:
    vocab_size: int
    context: int = 16           # tokens per prompt, start and end included
    width: int = 128
    layers: int = 3
    heads: int = 4
    image_size: int = 64
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 3
    projection_dim: int = 128


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in projections})
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width),
                                  "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        h, attn = self.layer_norm1(x), self.self_attn
        q, k, v = (proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for proj in (attn.q_proj, attn.k_proj, attn.v_proj))  # (B, heads, L, d)
        h = attend(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)  # (B, L, D)
        x = x + attn.out_proj(h)
        h = self.mlp.fc1(self.layer_norm2(x))  # (B, L, 4 * D)
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))  # CLIP's quick GELU


def encoder(width: int, heads: int, layers: int, causal: bool) -> nn.Module:
    """Transformer layers, called `encoder.layers` as in Hugging Face's files."""
    blocks = (EncoderLayer(width, heads, causal) for _ in range(layers))
    return nn.ModuleDict({"layers": nn.Sequential(*blocks)})


class TextTransformer(nn.Module):
    """Ids (B, L) -> one state per token (B, L, D), and the state at the first end token (B, D)."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(c.vocab_size, c.width),
                                         "position_embedding": nn.Embedding(c.context, c.width)})
        self.encoder = encoder(c.width, c.heads, c.layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(c.width)
        nn.init.normal_(self.embeddings.token_embedding.weight, std=.1)  # also an output layer
        nn.init.normal_(self.embeddings.position_embedding.weight, std=.05)

    def forward(self, ids):
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight
        tokens = self.final_layer_norm(self.encoder.layers(x))  # (B, L, D)
        first_end = ids.argmax(1)  # end has the largest id
        return tokens, tokens[torch.arange(len(ids)), first_end]


def patch_stem(width: int, patch_size: int) -> nn.Module:
    """Images (B, 3, H, W) -> patches (B, D, H/p, W/p), by convolutions that halve H and W. Differs:
    CLIP reads a patch by one linear layer. Convolutions learn shapes sooner (2106.14881)."""
    layers, before = [], 3
    for i in reversed(range(int(math.log2(patch_size)))):
        after = width >> i  # D/4, D/2, D for p = 8
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
        layers += [nn.GroupNorm(8, after), nn.GELU()]
        before = after
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1))


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) in -1...1 -> the state of the class token (B, D)."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        patches = (c.image_size // c.patch_size) ** 2
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(.02 * torch.randn(c.vision_width))
        self.embeddings.patch_embedding = patch_stem(c.vision_width, c.patch_size)
        self.embeddings.position_embedding = nn.Embedding(patches + 1, c.vision_width)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=c.vision_width ** -.5)
        self.pre_layrnorm = nn.LayerNorm(c.vision_width)  # spelt as in the files
        self.encoder = encoder(c.vision_width, max(1, c.vision_width // 64), c.vision_layers, False)
        self.post_layernorm = nn.LayerNorm(c.vision_width)

    def forward(self, pixels):
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, patches, D)
        first = self.embeddings.class_embedding.expand(len(pixels), 1, -1).to(x)  # (B, 1, D)
        x = torch.cat([first, x], dim=1) + self.embeddings.position_embedding.weight
        return self.post_layernorm(self.encoder.layers(self.pre_layrnorm(x))[:, 0])  # (B, D)


class CLIP(nn.Module):
    """A text and an image transformer, and projections of both into one space."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model, self.vision_model = TextTransformer(config), VisionTransformer(config)
        self.text_projection = nn.Linear(config.width, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))

    def similarity(self, pixels, states):
        """Scaled cosines (N, M) of images (N, 3, H, W) with captions of last states (M, D)."""
        images = self.visual_projection(self.vision_model(pixels)).float()  # (N, E)
        captions = self.text_projection(states).float()  # (M, E)
        images, captions = F.normalize(images, dim=-1), F.normalize(captions, dim=-1)
        return self.logit_scale.exp().clamp(max=100) * images @ captions.T

    def language_loss(self, ids):
        """Cross-entropy of each next token, plus that of all words of a caption from its last
        state, (M, L) -> (M,). Without the latter "left" and "right", which are followed by the same
        tokens, stay alike. Differs: CLIP has no such loss. It teaches motion without images."""
        embeddings = self.text_model.embeddings.token_embedding.weight  # (V, D)
        position = torch.arange(ids.shape[1], device=ids.device)  # (L,)
        end = ids.argmax(1, keepdim=True)  # (M, 1): where the first end stands
        tokens, last = self.text_model(ids)  # (M, L, D), (M, D)
        logits = (tokens[:, :-1] @ embeddings.T).transpose(1, 2)  # (M, V, L - 1)
        next_token = F.cross_entropy(logits, ids[:, 1:], reduction="none")  # (M, L - 1)
        read = position[:-1] < end  # (M, L - 1)
        named = -(last @ embeddings.T).log_softmax(1).gather(1, ids)  # (M, L)
        words = (position > 0) & (position < end)  # (M, L); the null prompt has none
        return ((next_token * read).sum(1) / read.sum(1)
                + (named * words).sum(1) / words.sum(1).clamp(min=1))


def loss(model: CLIP, batch: dict) -> torch.Tensor:
    """Symmetric contrastive loss (CLIP, Fig. 3) plus the language loss, (N,). batch: pixels
    (N, 3, H, W), ids (N, L) of their captions, motion_ids (N, L) of captions without images.
    Differs: several images of so small a world share a caption, and all of them count as right.
    With --accumulate or several processes, only a part of a batch is compared."""
    ids = batch["ids"]
    logits = model.similarity(batch["pixels"], model.text_model(ids)[1])  # (N, N)
    same = (ids[:, None] == ids[None]).all(-1).float()  # (N, N)
    target = same / same.sum(1, keepdim=True)
    of_images = F.cross_entropy(logits, target, reduction="none")
    of_captions = F.cross_entropy(logits.T, target, reduction="none")
    return (of_images + of_captions) / 2 + model.language_loss(batch["motion_ids"])


def locked_loss(model: CLIP, batch: dict) -> torch.Tensor:
    """Cross-entropy of each image's caption among all M captions of the data, (N,), with a locked
    text half. batch: pixels (N, 3, H, W), states (M, D) of the captions, row (N,), which of them is
    an image's. Differs: LiT (2111.07991) locks the image half, and compares the captions of a
    batch, of which too few differ only in the shape."""
    logits = model.similarity(batch["pixels"], batch["states"])  # (N, M)
    return F.cross_entropy(logits, batch["row"], reduction="none")


def unit_rms(x):
    """Vectors (N, E), scaled to norm sqrt(E)."""
    return F.normalize(x.float(), dim=-1) * math.sqrt(x.shape[-1])


@torch.inference_mode()
def encode(model: CLIP, tokenizer: Tokenizer, prompts: list):
    """Tokens (B, L, D) of prompts, and their CLIP embeddings (B, E), of norm sqrt(E)."""
    ids = tokenize(tokenizer, prompts, model.config.context).to(model.logit_scale.device)  # (B, L)
    tokens, last = model.text_model(ids)  # (B, L, D), (B, D)
    return tokens.cpu(), unit_rms(model.text_projection(last)).cpu()


@torch.inference_mode()
def embed_images(model: CLIP, images) -> torch.Tensor:
    """uint8 images (N, 3, H, W) -> CLIP embeddings (N, E), of norm sqrt(E)."""
    if not model.config.vision_layers:
        raise UserError("this CLIP has no image half; Stable Diffusion 1.x has only its text half")
    side, device = model.config.image_size, model.logit_scale.device
    parts = []
    for part in images.split(256):
        pixels = F.interpolate(vae.to_float(part.to(device)), (side, side), mode="area")
        parts.append(unit_rms(model.visual_projection(model.vision_model(pixels))).cpu())
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------
# Make-A-Video's P, trained on captioned stills, not on the clips of the video network. Three in
# four are first frames of other scenes of training triples, and their captions name the motion.

@dataclass
class PriorConfig:
    context: int             # tokens of a prompt, and one for its CLIP embedding
    width: int               # of tokens, embeddings and the transformer
    layers: int = 2
    heads: int = 4


class Prior(nn.Module):
    """unCLIP, 2.2: a causal transformer over a prompt's tokens and CLIP embedding, the timestep,
    the noisy image embedding and a learned query, whose output is the clean image embedding."""

    def __init__(self, c: PriorConfig):
        super().__init__()
        self.config = c
        self.time_embedding = TimestepEmbedding(c.width, c.width)
        self.image_proj = nn.Linear(c.width, c.width)
        self.query = nn.Parameter(.02 * torch.randn(c.width))
        self.position_embedding = nn.Embedding(c.context + 3, c.width)
        self.encoder = encoder(c.width, c.heads, c.layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(c.width)
        self.to_image = nn.Linear(c.width, c.width)

    def forward(self, z, t, context, *unused):  # (B, D), (B,), (B, L + 1, D); called like a U-Net
        last = self.time_embedding(t), self.image_proj(z), self.query.expand(len(z), -1)
        x = torch.cat([context, torch.stack(last, dim=1)], dim=1)  # (B, L + 4, D)
        x = self.encoder.layers(x + self.position_embedding.weight)
        return self.to_image(self.final_layer_norm(x[:, -1]))  # (B, D)


def prior_loss(prior: Prior, diffusion: Diffusion, batch: dict) -> torch.Tensor:
    """Mean of (f(z_t, t, y) - z_i)^2, (B,). batch: image embeddings `latents` and noise (B, D), t
    (B,), and context (B, L + 1, D) of a caption or, for one in ten, of none.        unCLIP, 2.2"""
    def predict(z, t):
        return prior(z, t, batch["context"])
    return diffusion.loss(predict, batch["latents"], batch["noise"], batch["t"])


@torch.inference_mode()
def sample_prior(prior: Prior, diffusion: Diffusion, context, null_context, seed: int = 0,
                 guidance: float = 1.):
    """context (B, L + 1, D) and null_context (1, L + 1, D) -> image embeddings (B, D) of norm
    sqrt(D). Differs: unCLIP draws two and keeps the one nearer to the text."""
    z = initial_noise((len(context), prior.config.width), seed, "prior")
    z = z.to(next(prior.parameters()).device)
    predict = classifier_free_guidance(prior, context, null_context, None, guidance)
    return unit_rms(diffusion.sample(predict, z, 16, "ddim")).cpu()


# ------------------------------------------------------------------------------------------------
# Weights, files and the command line. A clip is the dict of base.new_clip.

def load(weights=WEIGHTS, device="cpu"):
    """CLIP, its tokenizer, and facts: the ids of both halves, and the words it was trained on."""
    checkpoint = load_checkpoint(weights, "text", "clip")
    s, state = checkpoint["config"], checkpoint["model"]
    if "clip" in s:
        config, tokenizer = CLIPConfig(**s["clip"]), s["tokenizer"]
        facts = {"id": encoder_id(checkpoint), "words": s["words"],
                 "image_id": tensors_id(state, ("vision_model.", "visual_projection."))}
    else:  # Stable Diffusion's
        config = CLIPConfig(s["vocab_size"], s["max_position_embeddings"], s["hidden_size"],
                            s["num_hidden_layers"], s["num_attention_heads"], vision_layers=0)
        tokenizer = read_tokenizer(Path(weights) / "tokenizer")
        facts = {"id": SD_ID, "words": [], "image_id": None}

    def may_lack(name):  # Stable Diffusion has only the text half
        return "clip" not in s and not name.startswith("text_model.")
    model = load_state(CLIP(config), state, weights, may_lack)
    return model.to(device).eval(), build_tokenizer(**tokenizer), facts


def encoder_id(checkpoint: dict) -> str:
    """The id of the text half. New words do not change it, since old prompts keep their tokens."""
    return checkpoint["config"].get("id") or tensors_id(checkpoint["model"], ("text_model.",))


def grow(path, captions: list) -> tuple[CLIP, dict]:
    """A trained CLIP with a token for each new word of captions, to train further, and its config.
    As in textual inversion (2208.01618), of the text transformer only the new embeddings learn, so
    prompts of known words keep their tokens. The projections and the image half learn too, so train
    prior.pt and make-a-video.pt again."""
    checkpoint = load_checkpoint(path, "clip")
    config, state = checkpoint["config"], checkpoint["model"]
    name = "text_model.embeddings.token_embedding.weight"
    old, rows = config["tokenizer"]["vocab"], state[name]  # {token: id}, (V, D)
    known = [old[word + "</w>"] for word in config["words"] if word + "</w>" in old]
    typical = rows[known].mean(0)  # (D,)
    vocab, merges = grow_tokenizer(**config["tokenizer"], captions=captions)
    new = [token not in old for token in vocab]
    rows = torch.stack([rows[old[token]] if token in old else typical for token in vocab])
    config = config | {"clip": config["clip"] | {"vocab_size": len(vocab)},
                       "id": encoder_id(checkpoint), "new": new,
                       "tokenizer": {"vocab": vocab, "merges": merges},
                       "words": sorted({*config["words"], *words_of(captions)})}
    model = load_state(CLIP(CLIPConfig(**config["clip"])), state | {name: rows}, path)
    model.text_model.requires_grad_(False)  # except new rows of the embedding
    embedding = model.get_parameter(name).requires_grad_(True)
    embedding.register_hook(lambda grad: grad * torch.tensor(new, device=grad.device)[:, None])
    return model, config


def load_prior(weights, device, image_id: str) -> Prior:
    """P, which makes image embeddings of the CLIP with this id."""
    checkpoint = load_checkpoint(weights, "prior")
    if checkpoint["made_by"]["image_encoder"] != image_id:
        raise UserError("prior.pt is of another CLIP; train it anew with `python train.py prior`")
    prior = Prior(PriorConfig(**checkpoint["config"]))
    return load_state(prior, checkpoint["model"], "prior.pt").to(device).eval()


def encode_clip(prompts: list, weights=WEIGHTS, device="cpu", seed: int = 0, prior: bool = False,
                image=None) -> dict:
    """Prompts -> a clip of text. It gets image embeddings if `prior`, made by P from the seed; or
    that of a file `image`: of a picture, for a video of what it shows, or the mean of a video's
    frames, for a variation of it (Make-A-Video, Fig. 4)."""
    model, tokenizer, facts = load(weights, device)
    warn_unknown(prompts, facts["words"])
    tokens, embedding = encode(model, tokenizer, [*prompts, ""])  # (B + 1, L, D), (B + 1, E)
    text = {"tokens": tokens[:-1], "null_tokens": tokens[-1:]}
    if prior:
        P, diffusion = load_prior(weights, device, facts["image_id"]), Diffusion(target="sample")
        context = torch.cat([tokens, embedding[:, None]], dim=1)  # (B + 1, L + 1, D)
        text["image_embedding"] = sample_prior(P, diffusion, context[:-1], context[-1:], seed)
    elif image:
        frames = [frame for frame, _ in vae.read_frames(image, model.config.image_size)]
        mean = embed_images(model, torch.stack(frames)).mean(0, keepdim=True)  # (1, E)
        text["image_embedding"] = unit_rms(mean)
    return new_clip("text", text=text, prompts=prompts, encoder=facts["id"],
                    image_encoder=facts["image_id"] if prior or image else None)


def with_text(clip: dict, weights=WEIGHTS, device="cpu") -> dict:
    """The clip; if it has no prompt, with the tokens of the empty one."""
    if clip["text"] is not None:
        return clip
    empty = encode_clip([""] * len(clip["data"]), weights, device)
    return clip | {"text": empty["text"], "encoder": empty["encoder"]}


def warn_unknown(prompts: list, words: list, cure: str = ""):
    """Names the words that the text encoder was never trained on."""
    unknown = set(words_of(prompts)) - set(words)
    if words and unknown:
        warn(f"the text encoder was never trained on: {', '.join(sorted(unknown))}{cure}")


def main(argv=None):
    parser = command_line(__doc__, argv)
    parser.add_argument("prompts", nargs="*", help="what to show, one prompt per video")
    parser.add_argument("-o", "--out", default="text.pt", help="tokens to write [text.pt]")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--prior", action="store_true",
                     help="add image embeddings by P, for make-a-video.pt [off]")
    way.add_argument("--image", metavar="FILE",
                     help="instead of prompts: embed a picture, or a video to vary")
    args = parser.parse_args(argv)
    check_output(args.out, ".pt")
    if bool(args.prompts) == bool(args.image):
        raise UserError("give prompts, or --image FILE")
    clip = encode_clip(args.prompts or [""], args.weights, args.device, args.seed, args.prior,
                       args.image)
    save_clip(args.out, clip, args.command)


if __name__ == "__main__":
    run(main)
