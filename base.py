"""base.py - from text tokens to sixteen keyframes of latents; U-Net and diffusion of all stages.

Make-A-Video (2209.14792), 3.2, adds temporal layers to a trained text-to-image U-Net. They start as
the identity, so video training starts from the image model on every frame. Diffusion, guidance and
distillation are Imagen Video's (2210.02303). "Differs:" marks where the code leaves a paper.
Differs: both work in pixels; here the U-Net is Stable Diffusion's (2112.10752), on latents.

    in    text.pt   tokens (B, L, D) of B prompts, from text.py
    out   base.pt   latents (B, T, 4, h, w) of unit variance, for interpolate.py and vae.py

    python base.py text.pt -o base.pt --frames 16 --fps 4 --guidance 2 --seed 0

Shapes: (B, T, C, H, W) is a video, (B*T, C, H, W) are its frames, (B, L, D) is text, (B, E) is a
timestep embedding. Modules are named as in Hugging Face's Stable Diffusion, whose weights load.
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import sys
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

# Read when torch is loaded, so our modules import base first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a third of the time beside a busy process
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what mps lacks, the CPU does

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------
# Pseudo-3D layers. Frames are channels-last in memory, so the convolution over them copies nothing.

def sinusoid(position: torch.Tensor, dim: int) -> torch.Tensor:
    """[cos, sin] of positions (...) at dim/2 frequencies from 1 to about 1/10000. (..., dim)"""
    index = torch.arange(dim // 2, device=position.device)
    frequency = torch.exp(-math.log(10000) * index / (dim // 2))
    angle = position.float()[..., None] * frequency  # (..., dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def zero_module(layer: nn.Module) -> nn.Module:
    """Zero all parameters: a residual branch that ends in this layer starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class PseudoConv3d(nn.Conv2d):
    """Conv_P3D(h) = Conv1D( Conv2D(h) o T ) o T, o T swaps space and time    Make-A-Video, Eq. 2

    Stable Diffusion's 3 x 3 convolution, then one over frames, the identity at first.
    Differs: the paper extends all 2-D convolutions; here only those of residual blocks."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool):
        super().__init__(in_channels, out_channels, 3, padding=1)
        if temporal:
            self.temporal = nn.Conv1d(out_channels, out_channels, 3, padding=1)
            nn.init.dirac_(self.temporal.weight)
            nn.init.zeros_(self.temporal.bias)

    def forward(self, x, frames: int = 1):
        x = super().forward(x)  # (B*T, C, H, W)
        if frames == 1 or not hasattr(self, "temporal"):
            return x
        size = x.shape[-2:]
        x = x.unflatten(0, (-1, frames)).flatten(3).transpose(1, 2)  # (B, C, T, H*W)
        kernel = self.temporal.weight[..., None]  # 3 x 1: Conv1D at every pixel in one call
        x = F.conv2d(x, kernel, self.temporal.bias, padding=(1, 0))  # (B, C, T, H*W)
        return x.transpose(1, 2).flatten(0, 1).unflatten(-1, size)  # (B*T, C, H, W)


def attend(q, k, v, is_causal: bool = False):
    """softmax(q k^T / sqrt(d)) v, all (B, heads, L, d)."""
    if len(q) >= 2 ** 16:  # over time, B*H*W sequences; CUDA's kernels take fewer than 2^16
        parts = zip(*(x.split(2 ** 16 - 1) for x in (q, k, v)))
        return torch.cat([attend(*part, is_causal) for part in parts])
    if q.device.type == "cpu" and q.requires_grad:  # backward in bf16 takes ten times as long
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) to itself or to a context (B, L, D). -> (B, N, C)"""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (h.unflatten(-1, (self.heads, -1)).transpose(1, 2) for h in (q, k, v))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))  # from (B, heads, N, d)


class TransformerBlock(nn.Module):
    """Self-attention within a frame, cross-attention to the text, feed-forward; all residual."""

    def __init__(self, dim: int, heads: int, context_dim: int | None):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads)
        if context_dim:
            self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        geglu = nn.ModuleDict({"proj": nn.Linear(dim, 8 * dim)})
        net = nn.ModuleList([geglu, nn.Identity(), nn.Linear(4 * dim, dim)])
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x, context=None):  # (B*T, H*W, C), (B, L, D)
        x = x + self.attn1(self.norm1(x))
        if context is not None:
            queries = self.norm2(x).reshape(len(context), -1, x.shape[-1])  # (B, T*H*W, C)
            x = x + self.attn2(queries, context).view_as(x)
        value, gate = self.ff.net[0].proj(self.norm3(x)).chunk(2, dim=-1)  # GEGLU, (B*T, H*W, 4*C)
        return x + self.ff.net[2](value * F.gelu(gate))  # (B*T, H*W, C)


class ChannelNorm(nn.Module):
    """RMS norm of every pixel over its channels, (N, C, H, W). Unlike GroupNorm it is local, so a
    network trained on windows computes the same on whole frames."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        if x.is_cuda:
            return self.normalize(x)
        few = max(1, 2 ** 19 // x[0].numel())  # fit into a CPU's cache; saves a third of `low`
        return torch.cat([self.normalize(part) for part in x.split(few)])

    def normalize(self, x):
        h = x.permute(0, 2, 3, 1).float()  # (N, H, W, C); on a CPU bf16 takes twice as long
        h = F.rms_norm(h, self.weight.shape, self.weight, self.eps) + self.bias
        return h.permute(0, 3, 1, 2).to(x.dtype)


def make_norm(groups: int, channels: int, eps: float = 1e-5) -> nn.Module:
    return nn.GroupNorm(groups, channels, eps) if groups else ChannelNorm(channels, eps)


class SpatialTransformer(nn.Module):
    """Stable Diffusion's attention block on each frame, which is ATTN2D below."""

    def __init__(self, dim: int, heads: int, context_dim: int | None, groups: int):
        super().__init__()
        self.norm = make_norm(groups, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, heads, context_dim)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x, context=None):
        N, C, H, W = x.shape  # B*T frames
        h = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(N, H * W, C)  # (B*T, H*W, C)
        h = self.transformer_blocks[0](h, context)
        return x + self.proj_out(h.reshape(N, H, W, C).permute(0, 3, 1, 2))  # (B*T, C, H, W)


class TemporalAttention(nn.Module):
    """ATTN_P3D(h) = ATTN1D( ATTN2D(h) o T ) o T                          Make-A-Video, Eq. 3

    This is ATTN1D: every pixel attends over the frames. Residual, with an output projection that
    starts at zero. Differs: the paper names no positions; these are sinusoids."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        zero_module(self.attn.to_out)

    def forward(self, x, frames: int = 1):
        if frames == 1:
            return x
        N, C, H, W = x.shape
        h = x.unflatten(0, (-1, frames)).flatten(3)  # (B, T, C, H*W)
        h = h.permute(0, 3, 1, 2).flatten(0, 1)  # (B*H*W, T, C)
        position = sinusoid(torch.arange(frames, device=x.device), C)  # (T, C)
        h = self.attn(self.norm(h) + position.to(h.dtype))
        h = h.unflatten(0, (-1, H * W)).transpose(1, 2)  # (B, T, H*W, C)
        return x + h.reshape(N, H, W, C).permute(0, 3, 1, 2)  # (B*T, C, H, W)


class ResnetBlock(nn.Module):
    """Two pseudo-3D convolutions; the timestep embedding is added in between. Norms are per frame,
    so frames see each other only through temporal layers."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None = None,
                 groups: int = 8, eps: float = 1e-5, temporal: bool = False):
        super().__init__()
        self.norm1 = make_norm(groups, in_channels, eps)
        self.conv1 = PseudoConv3d(in_channels, out_channels, temporal)
        if time_dim:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = make_norm(groups, out_channels, eps)
        self.conv2 = PseudoConv3d(out_channels, out_channels, temporal)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, emb=None, frames: int = 1):  # (B*T, C, H, W), (B*T, E)
        h = self.conv1(F.silu(self.norm1(x)), frames)
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)), frames)
        return h + self.conv_shortcut(x)  # (B*T, C', H, W)


def downsample(channels: int, padding: tuple = (1, 1, 1, 1)) -> nn.Module:
    """Halve H and W. The U-Net pads on all sides, Stable Diffusion's VAE only right and below."""
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d(padding), conv=conv))


def upsample(channels: int) -> nn.Module:
    """Double H and W: nearest neighbours, then a convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


class AttentionGate(nn.Module):
    """alpha = sigmoid(psi(relu(W_x x + W_g g))), skip <- alpha skip    Attention U-Net, Eqs. 1-2

    With emb_dim the gate also reads the embedding of timestep, fps and image; alpha starts at .95.
    Without it (all networks but make-a-video.pt) alpha is doubled: it starts at 1 and may reach 2.
    In base.pt, interpolate.pt and make-a-video.pt the deepest gate, up_blocks.0.gates.0, is 0: the
    middle block's residual path brings its skip, too.
    Differs: the video papers have no gates. In 1804.03999 alpha is at most 1 and on g's coarser
    grid."""

    def __init__(self, skip_channels: int, gating_channels: int, emb_dim: int | None = None):
        super().__init__()
        inner = skip_channels // 2
        self.to_skip = nn.Conv2d(skip_channels, inner, 1, bias=False)
        self.to_gating = nn.Conv2d(gating_channels, inner, 1)
        self.psi = zero_module(nn.Conv2d(inner, 1, 1))
        if emb_dim:
            self.to_emb = nn.Linear(emb_dim, inner)
            nn.init.constant_(self.psi.bias, 3.)

    def forward(self, skip, gating, emb):  # (B*T, C, H, W), (B*T, C', H, W), (B*T, E)
        h = self.to_skip(skip) + self.to_gating(gating)
        if hasattr(self, "to_emb"):
            h = h + self.to_emb(F.silu(emb))[:, :, None, None]
        alpha = self.psi(F.relu(h)).sigmoid()  # (B*T, 1, H, W)
        return skip * (alpha if hasattr(self, "to_emb") else 2 * alpha)


class TimestepEmbedding(nn.Module):
    """A scalar (B,) as a vector (B, E): sinusoid, then a two-layer MLP."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_dim, dim), nn.Linear(dim, dim)

    def forward(self, value):
        return self.linear_2(F.silu(self.linear_1(sinusoid(value, self.linear_1.in_features))))


class MeanClip(nn.Module):
    """The mean of all training clips of a prompt, (B, L, D), fps (B,) -> (B, T, C, H, W).

    Trained first, then frozen and shown to the U-Net: at high noise the mean is the MSE-optimal
    prediction. Position depends jointly on prompt, time and pixel, so the network multiplies them.
    Prompt-to-motion rests on it. Differs: it is ours."""

    def __init__(self, context_dim: int, channels: int, dim: int = 128):
        super().__init__()
        self.norm = nn.LayerNorm(context_dim)
        self.text_proj, self.time_proj = nn.Linear(context_dim, dim), nn.Linear(64, dim)
        self.place_proj, self.fps_proj = nn.Linear(64, dim), nn.Linear(64, dim)
        self.linear_1, self.linear_2 = nn.Linear(dim, dim), zero_module(nn.Linear(dim, channels))

    def forward(self, context, fps, T: int, H: int, W: int):
        seconds = torch.arange(T, device=fps.device) / fps[:, None]  # (B, T)
        time = self.time_proj(sinusoid(4 * seconds, 64))  # (B, T, D')
        y, x = (sinusoid(8 * (torch.arange(n, device=fps.device) + .5) / n, 32) for n in (H, W))
        place = torch.cat([y[:, None].expand(H, W, 32), x.expand(H, W, 32)], dim=-1)  # (H, W, 64)
        text = self.text_proj(self.norm(context[:, -1]))[:, None]  # (B, 1, D'); CLIP is causal
        h = (time * (1 + 4 * text))[:, :, None, None]  # (B, T, 1, 1, D')
        h = h * (1 + 4 * self.place_proj(place))  # (B, T, H, W, D')
        h = self.linear_1(h) + self.fps_proj(sinusoid(fps, 64))[:, None, None, None]
        return self.linear_2(F.silu(h)).permute(0, 1, 4, 2, 3)  # from (B, T, H, W, C)


# ------------------------------------------------------------------------------------------------
# The U-Net: Stable Diffusion's, inflated.

@dataclass
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple = (64, 128)      # width of each level; each level but the last halves H and W
    layers: int = 1                  # residual blocks per level, and one more on the way up
    attention: tuple = (True, True)  # which levels attend
    heads: int = 4
    context_dim: int | None = 128    # width of the text tokens, or None
    groups: int = 8                  # of GroupNorm; 0: ChannelNorm
    temporal: tuple = ("mean_clip", "attention", "conv")  # layers across frames; images: ()
    gates: bool = True               # attention gates on the skips
    patch_size: int = 1              # patches become channels, which makes 256 px affordable
    embeddings: tuple = ("fps",)     # added to the timestep's: "fps"; "level", of augmentation;
                                     # "text", the last token; "image", a CLIP embedding


TINY_IMAGE = UNetConfig(temporal=(), gates=False, embeddings=())


class UNetBlock(nn.Module):
    """One level: residual blocks, each followed by attention in space and in time; a resampler.
    widths_in: channels into each residual block; skips: how many of these a skip brings."""

    def __init__(self, c: UNetConfig, widths_in: list, width: int, attentions: int,
                 skips: tuple = (), down=False, up=False):
        super().__init__()
        emb_dim, over_time = 4 * c.channels[0], "conv" in c.temporal
        self.resnets = nn.ModuleList(
            ResnetBlock(w, width, emb_dim, c.groups, temporal=over_time) for w in widths_in)
        self.attentions = nn.ModuleList(
            SpatialTransformer(width, c.heads, c.context_dim, c.groups) for _ in range(attentions))
        self.temporal_attentions = nn.ModuleList(
            TemporalAttention(width, c.heads) for _ in self.attentions if "attention" in c.temporal)
        self.gates = nn.ModuleList(
            AttentionGate(skip, w - skip, emb_dim if "image" in c.embeddings else None)
            for skip, w in zip(skips, widths_in) if c.gates)
        self.downsamplers = nn.ModuleList([downsample(width)] if down else [])
        self.upsamplers = nn.ModuleList([upsample(width)] if up else [])

    def layer(self, i: int, x, skip, emb, context, frames: int):  # (B*T, C, H, W)
        if skip is not None:
            skip = self.gates[i](skip, x, emb) if self.gates else skip
            x = torch.cat([x, skip], dim=1)  # (B*T, C + C', H, W)
        x = self.resnets[i](x, emb, frames)
        if i < len(self.attentions):
            x = self.attentions[i](x, context)
        if i < len(self.temporal_attentions):
            x = self.temporal_attentions[i](x, frames)
        return x


class UNet(nn.Module):
    """A noisy video (B, T, C, H, W) -> the diffusion's target, (B, T, C', H, W). Differs: every
    space-time network reads the frame rate; in Make-A-Video only base and interpolation do, in
    Imagen Video none does."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = self.config = config
        width, patch, last = c.channels[0], c.patch_size ** 2, len(c.channels) - 1
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(c.in_channels * patch, width, 3, padding=1)
        self.time_embedding = TimestepEmbedding(width, 4 * width)
        if "fps" in c.embeddings:
            self.fps_embedding = TimestepEmbedding(width, 4 * width)
            zero_module(self.fps_embedding.linear_2)
        if "level" in c.embeddings:
            self.level_embedding = TimestepEmbedding(width, 4 * width)
        if "text" in c.embeddings:
            self.text_embedding = nn.Linear(c.context_dim, 4 * width)
        if "image" in c.embeddings:
            self.image_embedding = zero_module(nn.Linear(c.context_dim, 4 * width))
            self.image_tokens = nn.Linear(c.context_dim, 4 * c.context_dim)
        if "mean_clip" in c.temporal:
            self.mean_clip = MeanClip(c.context_dim, c.out_channels)
            conv = nn.Conv2d(c.out_channels * patch, width, 3, padding=1)
            self.mean_clip_conv = zero_module(conv)

        skip_widths = [width]  # a stack, like the skips in `forward`
        self.down_blocks = nn.ModuleList()
        for i, out in enumerate(c.channels):
            widths_in = [skip_widths[-1]] + [out] * (c.layers - 1)
            attentions = c.layers if c.attention[i] else 0
            self.down_blocks.append(UNetBlock(c, widths_in, out, attentions, down=i < last))
            skip_widths += [out] * (c.layers + (i < last))
        below = c.channels[-1]  # width of what comes up
        self.mid_block = UNetBlock(c, [below, below], below, 1 if any(c.attention) else 0)
        self.up_blocks = nn.ModuleList()
        for i in range(last, -1, -1):
            out, skips = c.channels[i], [skip_widths.pop() for _ in range(c.layers + 1)]
            widths_in = [w + s for w, s in zip([below] + [out] * c.layers, skips)]
            attentions = c.layers + 1 if c.attention[i] else 0
            self.up_blocks.append(UNetBlock(c, widths_in, out, attentions, skips, up=i > 0))
            below = out
        self.conv_norm_out = make_norm(c.groups, width)
        self.conv_out = zero_module(nn.Conv2d(width, c.out_channels * patch, 3, padding=1))

    @staticmethod
    def is_inflation(name: str) -> bool:
        """Does this parameter belong to a layer that an image model lacks?"""
        return any(part in name for part in
                   ("temporal", "fps_embedding", "gates", "mean_clip", "image_"))

    def patchify(self, video):
        """(B, T, C, H, W) -> (B*T, p*p*C, H/p, W/p), p the patch size; H and W padded to fit."""
        frames, (H, W) = video.flatten(0, 1), video.shape[-2:]
        stride = self.config.patch_size * 2 ** (len(self.config.channels) - 1)
        frames = F.pad(frames, (0, -W % stride, 0, -H % stride), mode="replicate")
        frames = F.pixel_unshuffle(frames, self.config.patch_size)
        return frames.contiguous(memory_format=torch.channels_last)

    def forward(self, x, t, context=None, fps=None, level=None, cond=None):
        """t, level (B,); fps (B,), if T > 1; cond (B, T, C", H, W), further input channels; context
        (B, L, D), text tokens. With "image" in embeddings context is one CLIP embedding (B, 1, D),
        or zeros: added to the timestep's, and turned into four tokens.  unCLIP (2204.06125), 2.1"""
        B, T, _, H, W = x.shape
        embeddings, tokens = self.config.embeddings, context
        emb = self.time_embedding(t)  # (B, E)
        if "level" in embeddings:
            emb = emb + self.level_embedding(100 * level)  # sinusoids barely differ within 0...1
        if "text" in embeddings:
            emb = emb + self.text_embedding(context[:, -1])  # the last token has seen all others
        if "fps" in embeddings and T > 1:  # a picture has no frame rate
            emb = emb + self.fps_embedding(fps)
        if "image" in embeddings:
            emb = emb + self.image_embedding(context[:, 0])
            tokens = self.image_tokens(context[:, 0]).unflatten(1, (4, -1))  # (B, 4, D)
        emb = emb.repeat_interleave(T, 0)  # (B*T, E)

        def run_layer(block, i, x, skip=None):
            args = i, x, skip, emb, tokens, T
            if self.gradient_checkpointing and self.training:
                return checkpoint(block.layer, *args, use_reentrant=False, preserve_rng_state=False)
            return block.layer(*args)

        x = x if cond is None else torch.cat([x, cond], dim=2)
        x = self.conv_in(self.patchify(x))  # (B*T, C, H/p, W/p)
        if "mean_clip" in self.config.temporal and T > 1:
            with torch.no_grad():  # frozen
                mean = self.mean_clip(context, fps, T, H, W)  # (B, T, C', H, W)
            x = x + self.mean_clip_conv(self.patchify(mean))
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                skips.append(run_layer(block, i, skips[-1]))
            for downsampler in block.downsamplers:
                skips.append(downsampler(skips[-1]))
        x = run_layer(self.mid_block, 1, run_layer(self.mid_block, 0, skips[-1]))
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = run_layer(block, i, x, skips.pop())
            for upsampler in block.upsamplers:
                x = upsampler(x)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (B*T, p*p*C', H/p, W/p)
        x = F.pixel_shuffle(x, self.config.patch_size)[..., :H, :W]  # (B*T, C', H, W)
        return x.float().unflatten(0, (B, T))


# ------------------------------------------------------------------------------------------------
# Diffusion: z_t = alpha_t x + sigma_t eps, alpha^2 + sigma^2 = 1, alpha_bar = alpha^2.

def shift_noise(u: float, shift: float) -> float:
    """u is a place in the cosine schedule, from 0, clean, to 1, pure noise. Returns the place whose
    sigma / alpha is `shift` times as large.             simple diffusion (2301.11093), section 3.1

    Sixteen noisy frames of one scene carry more signal than one; a shift of sqrt(frames)
    compensates. On scaled_linear it only moves the steps towards noise. Differs: Imagen Video's
    schedule is not shifted."""
    return 2 / math.pi * math.atan(shift * math.tan(math.pi / 2 * u))


def sampling_timesteps(steps: int, shift: float = 1.) -> list:
    """At most `steps` timesteps, from 999 down; the step after the last leads to clean data."""
    u = [shift_noise(1 - i / steps, shift) for i in range(steps)]
    return list(dict.fromkeys(max(0, round(1000 * x) - 1) for x in u))  # without repeats


class Diffusion:
    """1000 noise levels t = 0 ... 999 (-1 is clean), the network's target, and the steps back.

    schedule: "cosine" (Imagen Video 2.1) or "scaled_linear" (Stable Diffusion)
    target: "v" (Imagen Video 2.4), "epsilon" (Stable Diffusion) or "sample", the clean x
    Differs: Imagen Video's t is continuous, and its networks are told the log-SNR."""

    def __init__(self, schedule: str = "cosine", target: str = "v"):
        self.schedule, self.target = schedule, target
        if schedule == "cosine":  # alpha = cos(pi t / 2), at the middle of each step
            t = (torch.arange(1000, dtype=torch.float64) + .5) / 1000
            alpha_bar = torch.cos(math.pi / 2 * t) ** 2
        else:
            beta = torch.linspace(.00085 ** .5, .012 ** .5, 1000, dtype=torch.float64) ** 2
            alpha_bar = torch.cumprod(1 - beta, 0)
        self.alpha_bar = F.pad(alpha_bar, (0, 1), value=1.)  # [-1] is clean

    def alpha_sigma(self, t, like):
        """alpha_t and sigma_t of timesteps (B,), in fp32, (B, 1, ...) where like is (B, ...)."""
        alpha_bar = self.alpha_bar[t.cpu()].view(-1, *[1] * (like.ndim - 1))
        return tuple(x.sqrt().to(like.device, torch.float32) for x in (alpha_bar, 1 - alpha_bar))

    def add_noise(self, x, noise, t):
        """z_t = alpha x + sigma eps                                         Imagen Video, Eq. 1"""
        alpha, sigma = self.alpha_sigma(t, x)
        return alpha * x + sigma * noise

    def target_of(self, x, noise, t):
        """What the network should predict at z_t: v = alpha eps - sigma x, or eps, or x."""
        alpha, sigma = self.alpha_sigma(t, x)
        return {"v": alpha * noise - sigma * x, "epsilon": noise, "sample": x}[self.target]

    def to_x(self, prediction, z, t):
        """The clean x that a prediction of v, eps or x at z_t implies."""
        alpha, sigma = self.alpha_sigma(t, z)
        return {"v": alpha * z - sigma * prediction, "sample": prediction,
                "epsilon": (z - sigma * prediction) / alpha}[self.target]

    def loss(self, predict, x, noise, t, weight=1.):
        """Weighted mean squared error of the target, one number per video. (B, ...) -> (B,)"""
        error = predict(self.add_noise(x, noise, t), t) - self.target_of(x, noise, t)
        return (weight * error.float().pow(2)).flatten(1).mean(1)

    def loss_weight(self, t, like):
        """2 alpha sigma for v, and its equal for other targets, (B, 1, ...). Without it, both ends
        dominate: unpredictable detail at low noise, an invisible clip at high noise.
        Differs: Imagen Video (Eq. 2) takes the error of eps, alpha^2 times v's."""
        alpha, sigma = self.alpha_sigma(t, like)
        return 2 * alpha * sigma / {"v": 1, "epsilon": alpha, "sample": sigma}[self.target] ** 2

    def ddim_step(self, z, x, t, s):
        """z_s = alpha_s x + (sigma_s / sigma_t) (z_t - alpha_t x)      DDIM (2010.02502), Eq. 12"""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t, z), self.alpha_sigma(s, z)
        return alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)

    def ancestral_step(self, z, x, t, s, gamma: float, noise):
        """z_s = r alpha_s / alpha_t z_t + (1 - r) alpha_s x + sqrt(lower^(1-gamma) upper^gamma) eps

        r = e^(lambda_t - lambda_s); lower, upper: the variances of q(z_s | z_t, x) and of
        q(z_t | z_s).                                                    Imagen Video, Eqs. 3-4"""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t, z), self.alpha_sigma(s, z)
        r = (alpha_t * sigma_s / (sigma_t * alpha_s)) ** 2
        lower, upper = (1 - r) * sigma_s ** 2, (1 - r) * sigma_t ** 2
        mean = r * (alpha_s / alpha_t) * z + (1 - r) * alpha_s * x
        return mean + (lower ** (1 - gamma) * upper ** gamma).sqrt() * noise

    def stochastic_step(self, z, x, t, s, r, noise):
        """z_s = (alpha_s / alpha_r) z_r + sqrt(sigma_s^2 - (alpha_s sigma_r / alpha_r)^2) eps

        For students: DDIM over two steps to r, then noise, a step back to s.  Imagen Video, 2.7"""
        (alpha_s, sigma_s), (alpha_r, sigma_r) = self.alpha_sigma(s, z), self.alpha_sigma(r, z)
        slope = alpha_s / alpha_r
        z_r = self.ddim_step(z, x, t, r)
        return slope * z_r + (sigma_s ** 2 - (slope * sigma_r) ** 2).sqrt() * noise

    def dpmpp_step(self, z, x, t, s, x_last, t_last):
        """z_s = (sigma_s / sigma_t) z_t - alpha_s (e^-h - 1) D    DPM-Solver++ (2211.01095), Alg. 2

        D = x + (x - x_last) / (2 r), r = h_last / h; h is the step in log(alpha / sigma)."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t, z), self.alpha_sigma(s, z)
        h = (alpha_s / sigma_s).log() - (alpha_t / sigma_t).log()
        if x_last is not None:
            alpha_l, sigma_l = self.alpha_sigma(t_last, z)
            r = ((alpha_t / sigma_t).log() - (alpha_l / sigma_l).log()) / h
            x = x + (x - x_last) / (2 * r)
        return (sigma_s / sigma_t) * z - alpha_s * torch.expm1(-h) * x

    def distillation_target(self, predict, z, path):
        """x = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)

        One DDIM step with this x leads where the teacher's K steps lead, through the timesteps
        path (B, K + 1). In the paper K = 2.               Progressive distillation (2202.00512)"""
        z_s = z
        for t, s in pairwise(path.unbind(1)):
            z_s = self.ddim_step(z_s, self.to_x(predict(z_s, t), z_s, t), t, s)
        alpha_t, sigma_t = self.alpha_sigma(path[:, 0], z)
        alpha_s, sigma_s = self.alpha_sigma(path[:, -1], z)
        return (z_s - sigma_s / sigma_t * z) / (alpha_s - sigma_s / sigma_t * alpha_t)

    @torch.no_grad()
    def sample(self, predict, z, steps: int = 16, sampler: str = "dpmpp", shift: float = 1.,
               gamma: float = 0., step_noise=None, threshold: bool = False, label: str = ""):
        """From noise z (B, ...) to clean data in at most `steps` calls of predict(z, t). sampler:
        "ddim", "dpmpp", "ancestral" (with gamma) or "stochastic"; the latter two add step_noise(i),
        like z, in step i = 1, 2, ... threshold: for guided pixels. label: of a progress bar."""
        assert sampler in ("ddim", "dpmpp", "ancestral", "stochastic"), sampler
        pairs = list(pairwise(sampling_timesteps(steps, shift) + [-1]))
        x_last, t_last = None, None
        for i, pair in enumerate(tqdm(pairs, desc=label, disable=not label, leave=False), start=1):
            t, s = (torch.full((len(z),), n, device=z.device) for n in pair)
            x = self.to_x(predict(z, t), z, t)
            x = dynamic_threshold(x) if threshold else x
            if i == len(pairs):  # no noise is left
                return x
            if sampler == "dpmpp":
                z, x_last, t_last = self.dpmpp_step(z, x, t, s, x_last, t_last), x, t
            elif sampler == "ancestral":
                z = self.ancestral_step(z, x, t, s, gamma, step_noise(i).to(z))
            elif sampler == "stochastic":
                r = torch.full_like(t, pairs[i][1])  # the end of the next step
                z = self.stochastic_step(z, x, t, s, r, step_noise(i).to(z))
            else:
                z = self.ddim_step(z, x, t, s)


def teacher_paths(teacher: int, student: int, shift: float) -> torch.Tensor:
    """The teacher's timesteps, one row per step of the student, (student, K + 1)."""
    timesteps = torch.tensor(sampling_timesteps(teacher, shift) + [-1])
    if teacher % student or len(timesteps) != teacher + 1:
        raise UserError(f"{student} steps cannot each stand for several of {teacher}")
    return timesteps.unfold(0, teacher // student + 1, teacher // student)


def dynamic_threshold(x):
    """clamp(x, -s, s) / s, where s is a percentile of |x|, at least 1.     Imagen Video, 2.6.2

    x (B, T, C, H, W). One s for all frames of a video, against flicker; the paper is silent."""
    rank = math.ceil(.995 * x[0].numel())  # as in Imagen (2205.11487); torch.quantile stops at 2^24
    s = x.abs().float().flatten(1).kthvalue(rank).values.clamp(min=1)  # (B,)
    s = s.view(-1, *[1] * (x.ndim - 1)).to(x)  # (B, 1, 1, 1, 1)
    return x.clamp(-s, s) / s


# ------------------------------------------------------------------------------------------------
# Guidance

def interval_guidance(diffusion: Diffusion, high: float):
    """A guidance scale as a function of t: `high` while sigma / alpha is from 4 to 1; otherwise,
    where guidance bends outlines, at most 1. The idea is 2404.07724's, the limits are ours."""
    def scale(t: int) -> float:
        log_snr = torch.logit(diffusion.alpha_bar[t])  # log(alpha^2 / sigma^2)
        return high if -2.78 <= log_snr < 0 else min(high, 1.)
    return scale


def oscillating_guidance(high: float, low: float, timesteps: list):
    """A guidance scale as a function of t: high for the first half of the sampler's timesteps (the
    paper does not say how many), then low and high in turn.               Imagen Video, 2.6.2"""
    second = timesteps[(len(timesteps) + 1) // 2:]  # low, high, low, ...
    return lambda t: low if t in second[::2] else high


def classifier_free_guidance(unet: UNet, context, null_context, fps, scale, cond=None, level=None):
    """predict(z, t) = null + s (text - null)                     Imagen Video, Eq. 5; s = 1 + w

    scale: s, or a function of t, which is then the same for all. context (B, L, D), null_context
    (1, L, D), cond (B, T, C", H, W), level (B,), fps (B,) or one number for all."""
    def twice(x):
        return None if x is None else torch.cat([x, x])

    def predict(z, t):
        s = scale(int(t[0])) if callable(scale) else scale
        rate = torch.full((len(z),), fps, device=z.device) if isinstance(fps, (int, float)) else fps
        text = context if context is None else context.to(z.device).float()
        with fast_autocast(z.device):
            if s == 1:
                return unet(z, t, text, rate, level, cond)
            both = torch.cat([text, null_context.to(text).expand_as(text)])  # (2*B, L, D)
            out = unet(twice(z), twice(t), both, twice(rate), twice(level), twice(cond))
        text, null = out.chunk(2)
        return null + s * (text - null)
    return predict


def has_fast_bf16(device) -> bool:
    """Does the device multiply bf16 natively?"""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(f"{unit}_bf16") for unit in ("amx", "avx512"))


def fast_autocast(device):
    """bf16 where it is fast, else fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_fast_bf16(device))


# ------------------------------------------------------------------------------------------------
# The base model

def loss(unet: UNet, diffusion: Diffusion, batch: dict) -> torch.Tensor:
    """Per video, (B,). batch: latents, noise (B, T, 4, h, w), context (B, L, D), fps and t (B,)."""
    def predict(z, t):
        return unet(z, t, batch["context"], batch["fps"])
    x, t = batch["latents"], batch["t"]
    return diffusion.loss(predict, x, batch["noise"], t, diffusion.loss_weight(t, x))


def mean_clip_loss(mean_clip: MeanClip, batch: dict) -> torch.Tensor:
    """Squared error per video, (B,); its minimum is the mean. batch as in `loss`."""
    x = batch["latents"]
    mean = mean_clip(batch["context"], batch["fps"], x.shape[1], *x.shape[3:])
    return (mean - x).float().pow(2).flatten(1).mean(1)


def initial_noise(shape: tuple, seed: int, stage: str, index: int = 0) -> torch.Tensor:
    """Standard normal (B, ...), on the CPU. Video i depends only on (seed + i, stage, index); index
    counts steps, or frames."""
    def video(i):
        key = hashlib.sha256(f"{stage} {seed + i} {index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
        return torch.randn(shape[1:], generator=generator)
    return torch.stack([video(i) for i in range(shape[0])])


def generate(unet: UNet, diffusion: Diffusion, text: dict, frames: int = 16, fps: float = 4.,
             side: int = 8, guidance=2., steps: int = 24, sampler: str | None = None,
             shift: float | None = None, gamma: float = 0., seed: int = 0, label: str = ""):
    """Latents of one video per prompt, (B, T, 4, side, side). text: tokens (B, L, D), null_tokens
    (1, L, D). guidance: a function of t, used as it is, or a scale, which clips use only inside an
    interval. By default clips take the ancestral sampler, whose fresh noise lets later steps
    correct errors of motion, and a shift of sqrt(frames)."""
    device, B = next(unet.parameters()).device, len(text["tokens"])
    sampler = sampler or ("ancestral" if frames > 1 else "dpmpp")
    if frames > 1 and not callable(guidance):
        guidance = interval_guidance(diffusion, guidance)
    tokens, null = text["tokens"], text["null_tokens"]
    predict = classifier_free_guidance(unet, tokens, null, float(fps), guidance)

    def step_noise(i):  # (B, T, 4, side, side)
        return initial_noise((B, frames, unet.config.out_channels, side, side), seed, "base", i)
    return diffusion.sample(predict, step_noise(0).to(device), steps, sampler,
                            shift or math.sqrt(frames), gamma, step_noise, label=label).cpu()


# ------------------------------------------------------------------------------------------------
# File I/O and the command line, shared by all stages.

WEIGHTS = Path(__file__).resolve().parent / "weights"
COMMANDS = {"text": 'python text.py "a red star moving left" -o text.pt',
            "latents": "python base.py text.pt -o base.pt` or `python vae.py encode VIDEO -o z.pt",
            "pixels": "python vae.py decode base.pt -o pixels.pt"}
SD_ID = "stable-diffusion-1"  # all 1.x folders share one text encoder and one latent space
SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": .00085, "beta_end": .012,
            "rescale_betas_zero_snr": False}
SD_PARTS = {"base": "unet", "image": "unet", "text": "text_encoder"}


class UserError(Exception):
    """Something only the user can mend."""


def warn(message: str):
    print(message, file=sys.stderr)


def run(main):
    """The last line of every script: main(), with a user's mistake as one line and exit code 2."""
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        warn(f"{Path(sys.argv[0]).name}: {error}".splitlines()[0])
        sys.exit(2)


def positive(text: str) -> int:
    """An argparse type."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def command_line(doc: str, argv=None, seed: bool = True) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the flags that scripts share."""
    parser = argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS,  # errors in one line
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = ["cpu"] + ["mps"] * torch.mps.is_available() + ["cuda"] * torch.cuda.is_available()
    parser.add_argument("--device", choices=devices, default=devices[-1], help="[%(default)s]")
    parser.add_argument("--weights", default=WEIGHTS, help="a folder of weights [weights/]")
    if seed:
        parser.add_argument("--seed", type=int, default=0, help="video i starts from seed + i [0]")
    argv = sys.argv[1:] if argv is None else argv
    parser.set_defaults(command=shlex.join([doc.split()[0], *argv]))
    return parser


def check_output(path, *suffixes: str):
    """Refuse an unknown kind of file before any work is done. Makes the file's folder."""
    if Path(path).suffix.lower() not in suffixes:
        raise UserError(f"{path}: unknown extension; use one of {' '.join(suffixes)}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def atomic(path):
    """Yield a temporary path, renamed to `path` at the end: no file is half written."""
    temporary = Path(path).with_name(f".{os.getpid()}-{Path(path).name[-40:]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_pt(path, content: dict):
    """torch.save; through a handle, so that equal content gives equal bytes."""
    with atomic(path) as temporary, open(temporary, "wb") as handle:
        torch.save(content, handle)


def load_pt(path, remedy: str = "") -> dict:
    """The dict in a .pt or .safetensors file. weights_only: it never runs code."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file{remedy}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a foreign file provokes
        raise UserError(f"{path} is damaged, foreign or a Git-LFS pointer{remedy}") from error


def new_clip(kind: str, data=None, text=None, prompts=(), fps: float = 1., **more) -> dict:
    """What a .pt file between stages holds. kind: "text", "latents" (data is float (B, T, 4, h, w))
    or "pixels" (uint8 (B, T, 3, H, W)). text: tokens (B, L, D), null_tokens (1, L, D), perhaps an
    image_embedding (B, E); encoder, vae, image_encoder: ids of what made tokens, latents and it."""
    return {"kind": kind, "data": data, "text": text, "prompts": list(prompts), "fps": float(fps),
            "seed": None, "history": [], "encoder": None, "vae": None, "image_encoder": None} | more


def save_clip(path, clip: dict, command: str):
    """Write a clip, with one more line of history, and print its name and shape."""
    save_pt(path, clip | {"history": clip["history"] + [command]})
    shape = tuple(clip["text"]["tokens"].shape if clip["data"] is None else clip["data"].shape)
    print(f"{path}: {clip['kind']} {shape}")


def load_clip(path, kind: str) -> dict:
    """Read a file between stages, and check what the next stage relies on."""
    remedy = f"; make one with `{COMMANDS[kind]}`"
    clip = new_clip("something else", fps=math.nan) | load_pt(path, remedy)
    if clip["kind"] != kind:
        raise UserError(f"{path} holds {clip['kind']}, not {kind}{remedy}")
    try:
        data, text, B = clip["data"], clip["text"], len(clip["prompts"])
        if kind != "text":
            assert data.ndim == 5 and len(data) == B and (data.shape[2] == 3) == (kind == "pixels")
            assert data.is_floating_point() == (kind == "latents") and 0 < clip["fps"] < math.inf
        if kind == "text" or text is not None:
            assert text["tokens"].ndim == 3 and len(text["tokens"]) == B
            assert text["null_tokens"].shape == (1, *text["tokens"].shape[1:])
        assert all(x.isfinite().all() for x in (data, *(text or {}).values()) if x is not None)
        assert isinstance(clip["history"], list)
    except Exception as error:  # whatever a foreign file holds
        raise UserError(f"{path} needs finite data (B, T, C, H, W), tokens (B, L, D), null_tokens "
                        f"(1, L, D), B prompts and fps{remedy}") from error
    return clip


def check_ids(clip: dict, made_by: dict, width: int | None = None):
    """Refuse tokens or latents of another text encoder, VAE or width than the weights read."""
    for key, name in (("encoder", "text"), ("image_encoder", "image_encoder"), ("vae", "vae")):
        ours = made_by.get(name)
        if ours and clip[key] not in (None, ours):
            raise UserError(f"the clip was made with {key} {clip[key]}, but these weights need "
                            f"{ours}: make it again with them")
    if width and clip["text"]["tokens"].shape[-1] != width:
        raise UserError(f"the weights need tokens {width} wide: make them anew with text.py")


def tensors_id(model: dict, prefixes: tuple) -> str:
    """Eight hex digits for the tensors whose names begin with one of the prefixes."""
    digest = hashlib.sha256()
    for name in sorted(name for name in model if name.startswith(prefixes)):
        digest.update(name.encode() + model[name].half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def save_checkpoint(path, config: dict, model: nn.Module, **made_by):
    """Weights of one model: its config, its tensors in fp16, and how they came to be."""
    tensors = {name: t.detach().half().cpu().contiguous() for name, t in model.state_dict().items()}
    save_pt(path, {"config": config, "model": tensors, "made_by": made_by})


def load_checkpoint(weights, name: str, stage: str = "") -> dict:
    """What save_checkpoint wrote for a stage (by default NAME): the file `weights`, or NAME.pt in
    that folder; or the part of a Stable Diffusion 1.x folder."""
    stage = stage or name
    path = Path(weights) if Path(weights).is_file() else Path(weights) / f"{name}.pt"
    part = Path(weights) / SD_PARTS.get(name, name)
    if part.is_dir() and not path.is_file():
        return load_stable_diffusion(part)
    train = stage + " --captions none" * name.startswith("make-a-video")
    remedy = f"; train it with `python train.py {train} --weights {path.parent}`"
    checkpoint = load_pt(path, remedy)
    held = checkpoint.get("made_by", {}).get("stage", "something else")
    if held != stage:
        raise UserError(f"{path} holds {held}, not {stage}{remedy}")
    return checkpoint


def load_stable_diffusion(folder: Path) -> dict:
    """A checkpoint from unet/, vae/ or text_encoder/, whose config is config.json."""
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    if not files:
        raise UserError(f"{folder} holds no weights")
    file = min(files, key=lambda file: len(file.name))  # .fp16 and .non_ema have longer names
    old_names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # 2022
    state = {}
    for name, tensor in load_pt(file).items():
        for old, new in old_names.items():
            name = name.replace(f".{old}.", f".{new}.")
        if folder.name == "text_encoder" and not name.startswith("text_model."):
            name = f"text_model.{name}"  # transformers 5 leaves it out
        if not name.endswith("position_ids"):
            state[name] = tensor
    config = json.loads((folder / "config.json").read_bytes())
    return {"config": config, "model": state, "made_by": {"vae": SD_ID, "text": SD_ID}}


def load_state(model: nn.Module, state: dict, path, may_lack=lambda name: False) -> nn.Module:
    """load_state_dict; the state may lack only parameters that `may_lack` allows."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name, tensor in state.items() if shapes.pop(name, None) != tensor.shape]
    wrong += [name for name in shapes if not may_lack(name)]
    if wrong:
        raise UserError(f"{path} does not fit the model: {wrong[0]}, {len(wrong)} in all (of "
                        "Stable Diffusion only 1.x does, without LCM or inpainting)")
    model.load_state_dict(state, strict=False)
    return model


def load(weights=WEIGHTS, device="cpu", name: str = "base", stage: str = "", **changes):
    """The U-Net of a stage or a Stable Diffusion folder, its Diffusion, and its made_by. `changes`
    to its config may add temporal layers."""
    checkpoint = load_checkpoint(weights, name, stage)
    s, made_by = checkpoint["config"], checkpoint["made_by"]
    if "unet" in s:
        config, diffusion = UNetConfig(**s["unet"]), Diffusion(**s["diffusion"])
    else:  # Stable Diffusion's config.json
        file = Path(weights) / "scheduler/scheduler_config.json"
        scheduler = json.loads(file.read_bytes()) if file.is_file() else {}
        target = scheduler.get("prediction_type", "epsilon").removesuffix("_prediction")
        if not SD_NOISE.items() <= (SD_NOISE | scheduler).items() or target not in (
                "epsilon", "v", "sample"):
            raise UserError(f"{file}: only {SD_NOISE} of epsilon, v_prediction or sample are read")
        diffusion, made_by["side"] = Diffusion("scaled_linear", target), s["sample_size"]
        config = UNetConfig(channels=s["block_out_channels"], layers=s["layers_per_block"],
                            attention=tuple("CrossAttn" in kind for kind in s["down_block_types"]),
                            heads=s["attention_head_dim"], context_dim=s["cross_attention_dim"],
                            groups=s["norm_num_groups"], temporal=("attention", "conv"))
    unet = UNet(replace(config, **changes))
    may_lack = UNet.is_inflation if changes or "unet" not in s else lambda name: False
    load_state(unet, checkpoint["model"], weights, may_lack)
    return unet.to(device, memory_format=torch.channels_last).eval(), diffusion, made_by


def generate_clip(clip: dict, weights=WEIGHTS, device="cpu", seed: int = 0, frames: int = 16,
                  fps: float = 4., **how) -> dict:
    """A clip of text -> a clip of latents. `how` goes to `generate`.

    An image embedding goes to make-a-video.pt, and later stages read the null prompt: in
    Make-A-Video text reaches a video only through that embedding. Differs: its interpolation is D^t
    trained further; ours is the captioned base trained further, with captions."""
    text, embedding = clip["text"], clip["text"].get("image_embedding")
    name = "base" if embedding is None else "make-a-video"
    unet, diffusion, made_by = load(weights, device, name, "base")
    if ("image" in unet.config.embeddings) != (embedding is not None):
        raise UserError("only make-a-video.pt reads an image embedding; text.py --prior makes one")
    condition = text
    if embedding is not None:
        tokens = embedding[:, None]  # (B, 1, E)
        condition = {"tokens": tokens, "null_tokens": torch.zeros_like(tokens[:1])}
        text = text | {"tokens": text["null_tokens"].expand_as(text["tokens"])}
    check_ids(clip | {"text": condition}, made_by, unet.config.context_dim)
    z = generate(unet, diffusion, condition, frames, fps, made_by["side"], seed=seed, label=name,
                 **how)
    return clip | {"kind": "latents", "data": z, "text": text, "fps": fps, "seed": seed,
                   "vae": made_by["vae"]}


def main(argv=None):
    parser = command_line(__doc__, argv)
    parser.add_argument("text", help="the prompts' tokens, from text.py")
    parser.add_argument("-o", "--out", default="base.pt", help="latents to write [base.pt]")
    parser.add_argument("--frames", type=positive, default=16, help="1 makes a picture [16]")
    parser.add_argument("--fps", type=float, default=4., help="trained on 4 to 30 [4]")
    parser.add_argument("--steps", type=positive, default=24, help="[24]")
    parser.add_argument("--guidance", type=float, default=2., help="scale; 1 is none [2]")
    parser.add_argument("--sampler", choices=("dpmpp", "ddim", "ancestral", "stochastic"),
                        help="[ancestral, or dpmpp for a picture]")
    args = parser.parse_args(argv)
    check_output(args.out, ".pt")
    if not 0 < args.fps < math.inf:
        raise UserError(f"{args.fps} frames per second make no clip")
    clip = generate_clip(load_clip(args.text, "text"), args.weights, args.device, args.seed,
                         args.frames, args.fps, steps=args.steps, guidance=args.guidance,
                         sampler=args.sampler)
    save_clip(args.out, clip, args.command)


if __name__ == "__main__":
    run(main)
