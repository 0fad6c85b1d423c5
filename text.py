"""text.py - from a prompt to the tokens that tell later stages what to draw.

CLIP (2103.00020): a causal text transformer and a picture transformer, trained to agree about which caption belongs to
which picture. Stable Diffusion reads the text half's last hidden states, token by token; so do our stages, and leave CLIP's
own summary of a prompt, `pooled`, to readers.

    in    one or more prompts
    out   text.pt   tokens (B, L, D), pooled (B, D), and the same of the empty prompt, for guidance

    python text.py "a red star moving left" "a blue ring bouncing on sand" -o text.pt

Layers bear the names of Hugging Face's CLIPModel, whose text half is the text encoder in Stable Diffusion's folder.
Differs: pictures hold no motion, so beside CLIP's loss the text half learns two things from captions alone: to predict
the next token, as a language model does, and to name all of a caption's words from its last state. The second is what
keeps "left" far from "right": nothing ever follows these words from which a next token could tell them apart.
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from base import WEIGHTS, Parser, UserError, attend, check_out, configure, fill, load_weights, note, run, save_stage, weights_in

START, END = "<|startoftext|>", "<|endoftext|>"
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


# ------------------------------------------------------------------------------------------------
# Byte-pair encoding, as CLIP does it: bytes never fail, and "</w>" marks the end of a word.

def build_tokenizer(vocab: dict, merges: list) -> Tokenizer:
    """CLIP's tokenizer for a vocabulary {token: id} and a list of merges (pairs)."""
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in merges], end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([token for token in (START, END) if token in vocab])
    return tokenizer


def learn_tokenizer(captions: list) -> tuple[dict, list]:
    """Vocabulary and merges of a small world's captions: every word they hold becomes one token.
    Ids are laid out as CLIP's are: bytes, bytes that end a word, merges, start, end."""
    learner = build_tokenizer({END: 0}, [])
    learner.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False,
                                                              special_tokens=[END]))
    merges = [pair.split() if isinstance(pair, str) else pair for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def tokenize(tokenizer: Tokenizer, prompts: list, context: int) -> torch.Tensor:
    """Ids (B, context): start, the prompt, and ends up to the full length. A longer prompt is cut, with a warning."""
    vocabulary = tokenizer.get_vocab()
    start, end, rows = vocabulary[START], vocabulary[END], {}
    for prompt in dict.fromkeys(prompts):
        try:
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        except TypeError as error:  # a shell of another encoding leaves bytes in it that are no text
            raise UserError(f"the prompt {ascii(prompt)} is not written in UTF-8") from error
        if len(ids) > context - 2:
            note(f"'{prompt}' has {len(ids)} tokens; the last {len(ids) - context + 2} are cut")
        ids = [start, *ids[:context - 2], end]
        rows[prompt] = ids + [end] * (context - len(ids))
    return torch.tensor([rows[prompt] for prompt in prompts])


# ------------------------------------------------------------------------------------------------
# The model

@dataclass
class CLIPConfig:
    vocab_size: int
    context: int = 16                     # tokens per prompt, start and end included
    width: int = 128
    layers: int = 3
    heads: int = 4
    image_size: int = 64
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 3
    projection_dim: int = 64              # of the space in which pictures and captions meet


SD15 = CLIPConfig(vocab_size=49408, context=77, width=768, layers=12, heads=12, image_size=224, patch_size=14, vision_width=1024,
                  vision_layers=24, projection_dim=768)


class SelfAttention(nn.Module):
    """Multi-head attention over (B, L, D); causal for text, so that nothing after a word changes it, padding least of all."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        h = attend(q, k, v, is_causal=self.causal)                                  # (B, heads, L, D/heads)
        return self.out_proj(h.transpose(1, 2).flatten(2))                          # (B, L, D)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # CLIP's quick GELU


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(width), SelfAttention(width, heads, causal)
        self.layer_norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextTransformer(nn.Module):
    """Ids (B, L) -> one state per token (B, L, D), and the state at the first end token (B, D)."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.embeddings.position_embedding = nn.Embedding(c.context, c.width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.Sequential(*(EncoderLayer(c.width, c.heads, causal=True) for _ in range(c.layers)))
        self.final_layer_norm = nn.LayerNorm(c.width)
        nn.init.normal_(self.embeddings.token_embedding.weight, std=.1)  # small: it is the output layer of the next-token loss too
        nn.init.normal_(self.embeddings.position_embedding.weight, std=.05)

    def forward(self, ids):
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[:ids.shape[1]]
        tokens = self.final_layer_norm(self.encoder.layers(x))                      # (B, L, D)
        pooled = tokens[torch.arange(len(ids)), ids.argmax(1)]                      # end is the largest id of all
        return tokens, pooled


class VisionTransformer(nn.Module):
    """Pictures (B, 3, H, W) in -1...1 -> one state each, (B, D): that of the class token."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(.02 * torch.randn(c.vision_width))
        self.embeddings.patch_embedding = nn.Conv2d(3, c.vision_width, c.patch_size, c.patch_size, bias=False)
        self.embeddings.position_embedding = nn.Embedding((c.image_size // c.patch_size) ** 2 + 1, c.vision_width)
        self.pre_layrnorm = nn.LayerNorm(c.vision_width)  # spelt as in the files
        self.encoder = nn.Module()
        heads = max(1, c.vision_width // 64)
        self.encoder.layers = nn.Sequential(*(EncoderLayer(c.vision_width, heads, causal=False) for _ in range(c.vision_layers)))
        self.post_layernorm = nn.LayerNorm(c.vision_width)

    def forward(self, pixels):
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, patches, D)
        first = self.embeddings.class_embedding.expand(len(pixels), 1, -1)            # (B, 1, D)
        x = torch.cat([first.to(patches), patches], dim=1) + self.embeddings.position_embedding.weight
        return self.post_layernorm(self.encoder.layers(self.pre_layrnorm(x))[:, 0])   # (B, D)


class CLIP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model, self.vision_model = TextTransformer(config), VisionTransformer(config)
        self.text_projection = nn.Linear(config.width, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))

    def similarity(self, pixels, ids):
        """Scaled cosines of N pictures with M captions, (N, M)."""
        pictures = F.normalize(self.visual_projection(self.vision_model(pixels)).float(), dim=-1)
        captions = F.normalize(self.text_projection(self.text_model(ids)[1]).float(), dim=-1)
        return self.logit_scale.exp().clamp(max=100) * pictures @ captions.T

    def language_loss(self, ids):
        """Mean cross-entropy of each caption's next token, up to its first end; plus that of naming all its words from the
        state at its end alone. (M, L) -> (M,)"""
        embeddings, position = self.text_model.embeddings.token_embedding.weight, torch.arange(ids.shape[1], device=ids.device)
        length = ids.argmax(1, keepdim=True)                                        # (M, 1): where the first end stands
        tokens, pooled = (states.float() for states in self.text_model(ids))        # (M, L, D), (M, D)
        next_token = F.cross_entropy((tokens[:, :-1] @ embeddings.T).transpose(1, 2), ids[:, 1:], reduction="none")
        recall = -(pooled @ embeddings.T).log_softmax(1).gather(1, ids)             # (M, L)
        mean = lambda losses, counts: (losses * counts).sum(1) / counts.sum(1).clamp(min=1)  # an empty caption has no words
        return mean(next_token, position[:-1] < length) + mean(recall, (position > 0) & (position < length))


def loss(clip: CLIP, batch: dict) -> torch.Tensor:
    """Symmetric contrastive loss of pictures and captions, plus the language loss of captions with motion; (N,).
    batch: pixels (N, 3, H, W), ids (N, L) of their captions, motion_ids (N, L) of other captions.

    Differs: in so small a world many pictures of a batch share a caption, and all that are equal count as right."""
    logits, ids = clip.similarity(batch["pixels"], batch["ids"]), batch["ids"]
    same = (ids[:, None] == ids[None]).all(-1).float()                              # (N, N)
    target = same / same.sum(1, keepdim=True)
    contrastive = (F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")) / 2
    return contrastive + clip.language_loss(batch["motion_ids"])


# ------------------------------------------------------------------------------------------------

def load(path=WEIGHTS / "text.pt", device="cpu"):
    """The shipped CLIP, its tokenizer, and the weights' dict."""
    weights = load_weights(path, "clip")
    if "settings" in weights:  # Stable Diffusion ships the text half alone
        s = weights["settings"]
        config = CLIPConfig(s["vocab_size"], s["max_position_embeddings"], s["hidden_size"], s["num_hidden_layers"], s["num_attention_heads"],
                            vision_layers=0)
        clip = fill(CLIP(config), weights, path, may_lack=lambda name: not name.startswith("text_model"))
        weights["config"] = {"tokenizer": read_tokenizer(Path(path) / "tokenizer"), "words": []}
    else:
        clip = fill(CLIP(configure(CLIPConfig, weights["config"]["clip"], path)), weights, path)
    return clip.to(device).eval(), build_tokenizer(**weights["config"]["tokenizer"]), weights


def read_tokenizer(folder: Path) -> dict:
    """Vocabulary and merges of CLIP's own tokenizer: vocab.json and merges.txt, or tokenizer.json."""
    try:
        if (folder / "vocab.json").is_file():
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
            return {"vocab": json.loads((folder / "vocab.json").read_text(encoding="utf-8")), "merges": merges}
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        return {"vocab": model["vocab"], "merges": [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no tokenizer: vocab.json and merges.txt, or tokenizer.json") from error


@torch.inference_mode()
def encode(clip: CLIP, tokenizer: Tokenizer, prompts: list, encoder: str = "") -> dict:
    """What stage files carry as `text`: tokens (B, L, D), pooled (B, D), null_tokens (1, L, D), null_pooled (1, D), all on
    the CPU, and the short hash of the encoder."""
    ids = tokenize(tokenizer, [*prompts, ""], clip.config.context)                  # (B + 1, L): the empty prompt is last
    tokens, pooled = (part.cpu() for part in clip.text_model(ids.to(clip.logit_scale.device)))
    return {"tokens": tokens[:-1].clone(), "pooled": pooled[:-1].clone(), "null_tokens": tokens[-1:].clone(),
            "null_pooled": pooled[-1:].clone(), "encoder": encoder}


def said(folder, prompts: list) -> dict:
    """What the `text` of a stage file holds for these prompts ("" for a clip that came without one): by the text encoder in this folder of
    weights, or by ours, where it has none."""
    path = weights_in(folder, "text")
    clip, tokenizer, weights = load(path if path.exists() else WEIGHTS / "text.pt")
    return encode(clip, tokenizer, prompts, weights["hash"])


def remark(prompts: list, words: list):
    """Tell the user what a prompt asks for that the shipped models cannot know."""
    for prompt in dict.fromkeys(prompts):
        unseen = [word for word in re.findall(r"\w+", prompt.lower()) if words and word not in words]
        if unseen:
            note(f"the shipped model has never seen: {', '.join(repr(word) for word in unseen)}")
        if not prompt.strip():
            note("an empty prompt is the unconditional one: the model may show anything it knows")


def main(argv=None):
    parser = Parser("Encode prompts into the tokens that tell later stages what to draw.")
    parser.add_argument("prompts", nargs="+", help="what the videos should show, one prompt each")
    parser.add_argument("--weights", default=WEIGHTS / "text.pt", help="text encoder weights, written by train.py, or a Stable Diffusion 1.x folder")
    parser.add_argument("-o", "--out", default="text.pt", help="file of tokens to write")
    parser.add_device()
    args = parser.parse_args(argv)
    check_out(args.out, (".pt",))
    clip, tokenizer, weights = load(args.weights, args.device)
    text = encode(clip, tokenizer, args.prompts, weights["hash"])
    remark(args.prompts, weights["config"]["words"])
    save_stage(args.out, "text", None, text=text, prompts=args.prompts, fps=0, seed=None, history=[f"text {weights['hash']}"])


if __name__ == "__main__":
    run(main)
