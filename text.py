"""text.py - from a prompt to the tokens that tell later stages what to draw.

CLIP (2103.00020): a causal text transformer and an image transformer, trained to agree on which caption
belongs to which image. Stable Diffusion reads the text half's last hidden states; so do our stages.

Make-A-Video's P turns a prompt into the CLIP embedding of an image (2209.14792, 3.1; unCLIP, 2204.06125).

    in    one or more prompts; or a picture or video, with --image
    out   text.pt   tokens (B, L, D), and those of the empty prompt, for guidance; with --prior or --image
                    an image_embedding (B, E), for a video network that knows no words

    python text.py "a red star moving left" "a blue ring bouncing on sand" -o text.pt

Layers bear the names of Hugging Face's CLIPModel, whose text half is in Stable Diffusion's folder.
Differs: captions of stills name no motion at first, so the text half also learns from captions without images: to predict
the next token, and to name all words of a caption from its last state. The latter keeps "left" far
from "right": no next token ever tells these two apart.
"""
import html
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from base import (SD_ID, WEIGHTS, Diffusion, TimestepEmbedding, UserError, attend, check_output,
                  classifier_free_guidance, command_line, initial_noise, load_checkpoint, load_state,
                  new_clip, run, save_clip, tensors_id, warn)

import vae

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

START, END = "<|startoftext|>", "<|endoftext|>"
STRAIGHT = str.maketrans("‘’‚‛“”„‟", 4 * "'" + 4 * '"')
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


# ------------------------------------------------------------------------------------------------
# Byte-pair encoding as CLIP does it: over bytes, and "</w>" marks the end of a word.

def build_tokenizer(vocab: dict, merges: list) -> Tokenizer:
    """CLIP's tokenizer for a vocabulary {token: id} and a list of merges (pairs)."""
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in merges],
                                     end_of_word_suffix="</w>", unk_token=END))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([token for token in (START, END) if token in vocab])
    return tokenizer


def learn_tokenizer(captions: list) -> tuple[dict, list]:
    """Vocabulary and merges in which every word of a small world's captions is one token.
    Ids are laid out as CLIP's: bytes, bytes that end a word, merges, start, end."""
    learner = build_tokenizer({END: 0}, [])
    learner.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", show_progress=False, special_tokens=[END]))
    merges = read_merges(json.loads(learner.to_str())["model"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet]
    tokens += ["".join(pair) for pair in merges] + [START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def words_of(captions) -> list:
    return sorted({word for line in captions for word in re.findall(r"\w+", line.lower())})


def grow_tokenizer(vocab: dict, merges: list, captions: list) -> tuple[dict, list]:
    """The same with every word of captions as one token. Known tokens keep their merges, and their
    order; start and end stay last."""
    tokens, merges = [token for token in vocab if token not in (START, END)], list(merges)
    for word in words_of(captions):
        tokenizer = build_tokenizer({token: i for i, token in enumerate([*tokens, START, END])}, merges)
        first, *others = tokenizer.encode(word, add_special_tokens=False).tokens
        for piece in others:
            merges.append([first, piece])
            first += piece
            tokens.append(first)
    tokens = [*dict.fromkeys(tokens), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def read_merges(model: dict) -> list:
    """The merges of a tokenizer.json, written as "a b" or as ["a", "b"], as pairs."""
    return [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]


def read_tokenizer(folder: Path) -> dict:
    """CLIP's own vocabulary and merges: tokenizer.json, or vocab.json and merges.txt."""
    if (folder / "tokenizer.json").is_file():
        model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
        return {"vocab": model["vocab"], "merges": read_merges(model)}
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    return {"vocab": json.loads((folder / "vocab.json").read_bytes()), "merges": merges}


def tokenize(tokenizer: Tokenizer, prompts: list, context: int) -> torch.Tensor:
    """Ids (B, context): start, the prompt, then ends. A longer prompt is cut, with a warning.
    Differs: CLIP's ftfy also splits ligatures, narrows full-width forms and mends mojibake."""
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    rows = []
    for prompt in prompts:
        plain = html.unescape(html.unescape(prompt)).translate(STRAIGHT)
        ids = tokenizer.encode(plain, add_special_tokens=False).ids
        if len(ids) > context - 2:
            warn(f"'{prompt}' has {len(ids)} tokens; only the first {context - 2} are read")
        ids = [start, *ids[:context - 2], end]
        rows.append(ids + [end] * (context - len(ids)))
    return torch.tensor(rows)


# ------------------------------------------------------------------------------------------------
# The model

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
    projection_dim: int = 128   # of the space where images and captions meet


SD15 = CLIPConfig(vocab_size=49408, context=77, width=768, layers=12, heads=12, image_size=224,
                  patch_size=14, vision_width=1024, vision_layers=24, projection_dim=768)


class SelfAttention(nn.Module):
    """Multi-head attention over (B, L, D). Causal for text: nothing after a word changes it."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, heads, L, d)
        h = attend(q, k, v, is_causal=self.causal)
        return self.out_proj(h.transpose(1, 2).flatten(2))  # (B, L, D)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(width), SelfAttention(width, heads, causal)
        self.layer_norm2, self.mlp = nn.LayerNorm(width), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))  # CLIP's quick GELU


def encoder(width: int, heads: int, layers: int, causal: bool) -> nn.Module:
    module = nn.Module()
    module.layers = nn.Sequential(*(EncoderLayer(width, heads, causal) for _ in range(layers)))
    return module


class TextTransformer(nn.Module):
    """Ids (B, L) -> one state per token (B, L, D), and the state at the first end token (B, D)."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.embeddings.position_embedding = nn.Embedding(c.context, c.width)
        self.encoder = encoder(c.width, c.heads, c.layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(c.width)
        nn.init.normal_(self.embeddings.token_embedding.weight, std=.1)  # also an output layer
        nn.init.normal_(self.embeddings.position_embedding.weight, std=.05)

    def forward(self, ids):
        position = self.embeddings.position_embedding.weight[:ids.shape[1]]
        x = self.embeddings.token_embedding(ids) + position
        tokens = self.final_layer_norm(self.encoder.layers(x))  # (B, L, D)
        first_end = ids.argmax(1)  # end has the largest id
        return tokens, tokens[torch.arange(len(ids)), first_end]


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) in -1...1 -> the state of the class token (B, D)."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        patches = (c.image_size // c.patch_size) ** 2
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(.02 * torch.randn(c.vision_width))
        self.embeddings.patch_embedding = nn.Conv2d(3, c.vision_width, c.patch_size, c.patch_size,
                                                    bias=False)
        self.embeddings.position_embedding = nn.Embedding(patches + 1, c.vision_width)
        self.pre_layrnorm = nn.LayerNorm(c.vision_width)  # spelt as in the files
        self.encoder = encoder(c.vision_width, max(1, c.vision_width // 64), c.vision_layers, False)
        self.post_layernorm = nn.LayerNorm(c.vision_width)

    def forward(self, pixels):
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, patches, D)
        first = self.embeddings.class_embedding.expand(len(pixels), 1, -1).to(x)  # (B, 1, D)
        x = torch.cat([first, x], dim=1) + self.embeddings.position_embedding.weight
        return self.post_layernorm(self.encoder.layers(self.pre_layrnorm(x))[:, 0])  # (B, D)


class CLIP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model, self.vision_model = TextTransformer(config), VisionTransformer(config)
        self.text_projection = nn.Linear(config.width, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))

    def embed_images(self, pixels):  # (N, 3, H, W) -> unit vectors (N, E)
        return F.normalize(self.visual_projection(self.vision_model(pixels)).float(), dim=-1)

    def embed_captions(self, ids):  # (M, L) -> unit vectors (M, E)
        return F.normalize(self.text_projection(self.text_model(ids)[1]).float(), dim=-1)

    def similarity(self, pixels, ids):
        """Scaled cosines of N images (N, 3, H, W) with M captions (M, L). (N, M)"""
        scale = self.logit_scale.exp().clamp(max=100)
        return scale * self.embed_images(pixels) @ self.embed_captions(ids).T

    def language_loss(self, ids):
        """Cross-entropy of the next token, up to the first end; plus that of naming all words of the
        caption from its last state. (M, L) -> (M,)"""
        embeddings = self.text_model.embeddings.token_embedding.weight  # (V, D)
        position = torch.arange(ids.shape[1], device=ids.device)
        length = ids.argmax(1, keepdim=True)  # (M, 1): where the first end stands
        tokens, last = (states.float() for states in self.text_model(ids))  # (M, L, D), (M, D)
        logits = (tokens[:, :-1] @ embeddings.T).transpose(1, 2)  # (M, V, L - 1)
        next_token = F.cross_entropy(logits, ids[:, 1:], reduction="none")  # (M, L - 1)
        recall = -(last @ embeddings.T).log_softmax(1).gather(1, ids)  # (M, L)

        def mean(losses, counts):
            return (losses * counts).sum(1) / counts.sum(1).clamp(min=1)  # the null prompt: 0 words
        words = (position > 0) & (position < length)
        return mean(next_token, position[:-1] < length) + mean(recall, words)


def loss(clip: CLIP, batch: dict) -> torch.Tensor:
    """Symmetric contrastive loss (CLIP, Fig. 3) plus the language loss, (N,). batch: pixels
    (N, 3, H, W), ids (N, L) of their captions, motion_ids (N, L) of captions without images.

    Differs: in so small a world several images share a caption, and all of them count as right."""
    logits, ids = clip.similarity(batch["pixels"], batch["ids"]), batch["ids"]
    same = (ids[:, None] == ids[None]).all(-1).float()  # (N, N)
    target = same / same.sum(1, keepdim=True)
    of_images = F.cross_entropy(logits, target, reduction="none")
    of_captions = F.cross_entropy(logits.T, target, reduction="none")
    return (of_images + of_captions) / 2 + clip.language_loss(batch["motion_ids"])


# ------------------------------------------------------------------------------------------------
# Make-A-Video's P: from a prompt to the CLIP embedding of an image that shows it. It is trained on
# captioned stills, and never sees a video.

@dataclass
class PriorConfig:
    context: int             # tokens of a prompt, and one for its CLIP embedding
    width: int               # of tokens, embeddings and the transformer
    layers: int = 3
    heads: int = 4


class Prior(nn.Module):
    """The diffusion prior of unCLIP (2204.06125), 2.2: a causal transformer over the prompt's tokens
    and CLIP embedding, the timestep, the noisy image embedding and a learned query, whose output is
    the clean image embedding."""

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
    """|f(z_t, t, y) - z_i|^2, (B,). batch: image embeddings `latents` and noise (B, D), t (B,), and
    context (B, L + 1, D) of a caption or, for one in ten, of none.             unCLIP, 2.2"""
    def predict(z, t):
        return prior(z, t, batch["context"])
    return diffusion.loss(predict, batch["latents"], batch["noise"], batch["t"])


@torch.inference_mode()
def sample_prior(prior: Prior, diffusion: Diffusion, context, null_context, guidance: float = 1.,
                 seed: int = 0):
    """An image embedding of norm sqrt(D) for each prompt, (B, D). context (B, L + 1, D), null_context
    (1, L + 1, D). Differs: unCLIP draws two and keeps the one that is nearer to the text."""
    z = initial_noise((len(context), prior.config.width), seed, "prior").to(context.device)
    predict = classifier_free_guidance(prior, context, null_context, None, guidance)
    x = diffusion.sample(predict, z, 16, "ddim")
    return (F.normalize(x.float(), dim=-1) * math.sqrt(x.shape[1])).cpu()


# ------------------------------------------------------------------------------------------------
# Loading, encoding, the command line

def load(weights=WEIGHTS, device="cpu"):
    """CLIP, its tokenizer, and what is known of it: {"id": str, "words": the words it was trained on}.
    A Stable Diffusion folder has only the text half."""
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
        facts = {"id": SD_ID, "image_id": None, "words": []}
        if config.vocab_size > len(tokenizer["vocab"]):
            raise UserError(f"{weights} has tokens of textual inversion, which are not read")
    clip = load_state(CLIP(config), state, weights, lambda name: not name.startswith("text_model"))
    return clip.to(device).eval(), build_tokenizer(**tokenizer), facts


def encoder_id(weights: dict) -> str:
    """Of the text half; one that has grown keeps its id, since old prompts keep their tokens."""
    return weights["config"].get("id") or tensors_id(weights["model"], ("text_model.",))


def grow(path, captions: list) -> tuple[CLIP, dict]:
    """A trained CLIP with a token for each new word of captions, to be trained further, and its config.
    Only the embeddings of new tokens, the projections and the image half are left to training: prompts
    without new words keep their tokens to the bit, so what was trained on these stays valid; P and
    what is told image embeddings do not. As textual inversion (2208.01618), but by captions and stills."""
    weights = load_checkpoint(path, "clip")
    config, name = weights["config"], "text_model.embeddings.token_embedding.weight"
    old, rows = config["tokenizer"]["vocab"], weights["model"][name]
    vocab, merges = grow_tokenizer(**config["tokenizer"], captions=captions)
    typical = torch.stack([rows[old[w + "</w>"]] for w in config["words"] if w + "</w>" in old]).mean(0)
    rows = torch.stack([rows[old[token]] if token in old else typical for token in vocab])  # (V, D)
    new = [token not in old for token in vocab]
    config = config | {"clip": config["clip"] | {"vocab_size": len(vocab)}, "id": encoder_id(weights),
                       "tokenizer": {"vocab": vocab, "merges": merges}, "new": new,
                       "words": sorted({*config["words"], *words_of(captions)})}
    clip = load_state(CLIP(CLIPConfig(**config["clip"])), weights["model"] | {name: rows}, path)
    clip.text_model.requires_grad_(False)
    embedding = clip.get_parameter(name).requires_grad_(True)
    embedding.register_hook(lambda grad: grad * torch.tensor(new, device=grad.device)[:, None])
    return clip, config


@torch.inference_mode()
def encode(clip: CLIP, tokenizer: Tokenizer, prompts: list) -> dict:
    """tokens (B, L, D) of the prompts and null_tokens (1, L, D) of the empty one, on the CPU."""
    ids = tokenize(tokenizer, [*prompts, ""], clip.config.context)  # (B + 1, L)
    tokens = clip.text_model(ids.to(clip.logit_scale.device))[0].cpu()  # (B + 1, L, D)
    return {"tokens": tokens[:-1].clone(), "null_tokens": tokens[-1:].clone()}


@torch.inference_mode()
def encode_for_prior(clip: CLIP, tokenizer: Tokenizer, prompts: list) -> torch.Tensor:
    """What P reads of prompts: their tokens, then their CLIP embedding, (B, L + 1, D)."""
    ids = tokenize(tokenizer, prompts, clip.config.context).to(clip.logit_scale.device)  # (B, L)
    embedding = math.sqrt(clip.config.projection_dim) * clip.embed_captions(ids)  # (B, D)
    return torch.cat([clip.text_model(ids)[0], embedding[:, None]], dim=1)


@torch.inference_mode()
def embed_images(clip: CLIP, images) -> torch.Tensor:
    """uint8 images (N, 3, H, W) -> CLIP embeddings of norm sqrt(E), so of unit variance, (N, E)."""
    side, device = clip.config.image_size, clip.logit_scale.device
    parts = []
    for part in images.split(256):
        pixels = F.interpolate(part.to(device) / 127.5 - 1, (side, side), mode="area")
        parts.append(clip.embed_images(pixels).cpu())
    return math.sqrt(clip.config.projection_dim) * torch.cat(parts)


def encode_clip(prompts: list, weights=WEIGHTS, device="cpu") -> dict:
    """A new clip of text, by the text encoder in a folder of weights."""
    clip, tokenizer, facts = load(weights, device)
    warn_unknown(prompts, facts["words"])
    return new_clip("text", text=encode(clip, tokenizer, prompts), prompts=prompts,
                    encoder=facts["id"])


def with_prior(clip: dict, weights=WEIGHTS, device="cpu", seed: int = 0) -> dict:
    """A clip of text, with the image embeddings that P makes of its prompts."""
    model, tokenizer, facts = load(weights, device)
    saved = load_checkpoint(weights, "prior")
    if saved["made_by"]["image_encoder"] != facts["image_id"]:
        raise UserError("prior.pt stands on another CLIP; train it anew with `python train.py prior`")
    prior = load_state(Prior(PriorConfig(**saved["config"])), saved["model"], "prior.pt").to(device).eval()
    context = encode_for_prior(model, tokenizer, [*clip["prompts"], ""])  # (B + 1, L + 1, D)
    e = sample_prior(prior, Diffusion(target="sample"), context[:-1], context[-1:], seed=seed)
    return clip | {"text": clip["text"] | {"image_embedding": e}, "image_encoder": facts["image_id"]}


def clip_of_image(path, weights=WEIGHTS, device="cpu") -> dict:
    """A clip of text without a prompt, with the embedding of a picture, or the mean of a video's
    frames. make-a-video.pt makes a video "about" a picture, or a variation of a video
    (Make-A-Video, Fig. 4)."""
    model, tokenizer, facts = load(weights, device)
    if facts["image_id"] is None:
        raise UserError(f"{weights} has only the text half of CLIP")
    frames = torch.stack([frame for frame, _ in vae.read_frames(path, model.config.image_size)])
    mean = embed_images(model, frames).mean(0, keepdim=True)  # (1, E), of the middle square
    mean = F.normalize(mean, dim=-1) * math.sqrt(mean.shape[1])
    return new_clip("text", text=encode(model, tokenizer, [""]) | {"image_embedding": mean}, prompts=[""],
                    encoder=facts["id"], image_encoder=facts["image_id"])


def with_text(clip: dict, weights=WEIGHTS, device="cpu") -> dict:
    """A clip that came without a prompt, with the empty one."""
    if clip["text"] is not None:
        return clip
    empty = encode_clip([""] * len(clip["data"]), weights, device)
    return clip | {"text": empty["text"], "encoder": empty["encoder"]}


def warn_unknown(prompts: list, words: list, cure: str = ""):
    """Name the words of prompts that the text encoder was never trained on."""
    unknown = set(words_of(prompts)) - set(words)
    if words and unknown:
        warn(f"the text encoder was never trained on: {', '.join(sorted(unknown))}{cure}")


def main(argv=None):
    parser = command_line(__doc__, argv)
    parser.add_argument("prompts", nargs="*", help="what to show, one prompt per video")
    parser.add_argument("-o", "--out", default="text.pt", help="tokens to write [text.pt]")
    parser.add_argument("--prior", action="store_true", help="add the image embedding that P makes of "
                        "each prompt, for make-a-video.pt [off]")
    parser.add_argument("--image", metavar="FILE", help="instead of prompts: the embedding of a picture, "
                        "or of a video, which gives a variation of it")
    args = parser.parse_args(argv)
    check_output(args.out, ".pt")
    if bool(args.prompts) == bool(args.image):
        raise UserError("give prompts, or --image FILE")
    if args.image:
        clip = clip_of_image(args.image, args.weights, args.device)
    else:
        clip = encode_clip(args.prompts, args.weights, args.device)
        clip = with_prior(clip, args.weights, args.device, args.seed) if args.prior else clip
    save_clip(args.out, clip, args.command)


if __name__ == "__main__":
    run(main)
