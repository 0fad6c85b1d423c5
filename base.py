"""base.py - the text-to-video model: 16 keyframes of latents from a prompt's tokens, and the root of every stage.

Make-A-Video (2209.14792) section 3.2 inflates a text-to-image U-Net to video: each spatial layer of Stable Diffusion
(2112.10752) in a residual or attention block is followed by a temporal one that starts as the identity, so that step 0 of
video training *is* the image model applied to every frame. Also here: the frame rate as an input (section 3.2.2); and, in
neither paper, attention gates on the skip connections (1804.03999), and a mean clip of each prompt as a place to start.

    in    text.pt   tokens (B, L, D) of B prompts, from text.py
    out   base.pt   latents (B, T, 4, h, w) of unit variance, for vae.py decode

    python base.py text.pt -o base.pt --frames 16 --fps 4 --steps 48 --guidance 2 --seed 0

Read top to bottom: pseudo-3D layers, the U-Net, diffusion and its samplers, the base model. What follows is in no paper: errors, files
and the command line, as all stages share them; and main.
Shapes: (B, T, C, H, W) is a video, (B*T, C, H, W) are its frames, (B, L, D) is text.
"""
import argparse
import ctypes
import hashlib
import io
import json
import math
import os
import pickle
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------
# Pseudo-3D layers. Frames are kept channels-last, (B*T, H, W, C) in memory, so that what is a batch of pictures to a
# spatial layer is (B, T, H*W, C) to a convolution over time without moving a byte.

def sinusoid(position: torch.Tensor, dim: int) -> torch.Tensor:
    """[cos, sin] of a position (N,) at dim/2 frequencies from 1 down towards 1/10000. (N, dim)"""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=position.device) / (dim // 2))
    angle = position.float()[:, None] * frequency                                   # (N, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all parameters zero: its output is 0 at first, so a residual branch that ends in it starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class PseudoConv3d(nn.Conv2d):
    """Conv_P3D(h) = Conv1D( Conv2D(h) o T ) o T, where o T swaps space and time       Make-A-Video, Eq. 2

    A Conv2d of Stable Diffusion, names included, (B*T, C, H, W) -> (B*T, C', H, W); then `over_time`, a convolution over frames that
    starts as the identity and keeps that shape. Two calls, so that the input of the first, large for a large clip, is freed before the
    second. Differs: the paper does so with every 2-D convolution; here only with the two of a residual block."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool):
        super().__init__(in_channels, out_channels, 3, padding=1)
        if temporal:
            self.temporal = nn.Conv1d(out_channels, out_channels, 3, padding=1)
            nn.init.dirac_(self.temporal.weight)
            nn.init.zeros_(self.temporal.bias)

    def over_time(self, x, frames: int):                                            # (B*T, C, H, W)
        if frames == 1 or not hasattr(self, "temporal"):
            return x
        N, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1).reshape(N // frames, frames, H * W, C)            # (B, T, H*W, C)
        x = x.permute(0, 3, 1, 2)                                                   # (B, C, T, H*W)
        x = F.conv2d(x, self.temporal.weight[..., None], self.temporal.bias, padding=(1, 0))       # 3 x 1: over T alone
        return x.permute(0, 2, 3, 1).reshape(N, H, W, C).permute(0, 3, 1, 2)        # (B*T, C, H, W)


def attend(q, k, v, is_causal: bool = False):
    """softmax(q k^T / sqrt(d)) v, all (B, heads, L, d)."""
    if len(q) >= 2 ** 16:  # over time there is a sequence for each pixel, and CUDA's kernels take fewer than 2^16
        return torch.cat([attend(*parts, is_causal) for parts in zip(*(x.split(2 ** 16 - 1) for x in (q, k, v)))])
    if q.device.type == "cpu":  # where it is slower in bf16 than in fp32, backward several times
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=is_causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C), N places or frames, to itself or to a context (B, L, D)."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context=None):
        context = x if context is None else context
        split = lambda h: h.unflatten(-1, (self.heads, -1)).transpose(1, 2)         # (B, heads, N, C/heads)
        h = attend(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)))
        return self.to_out(h.transpose(1, 2).flatten(2))                            # (B, N, C)


class GEGLU(nn.Module):
    """value * gelu(gate), both from one projection."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):  # two products: half of a single one is not contiguous, and its gelu ten times slower on a CPU
        weight, bias = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        return F.linear(x, weight[0], bias[0]) * F.gelu(F.linear(x, weight[1], bias[1]))


class TransformerBlock(nn.Module):
    """Self-attention within a frame, cross-attention to the prompt, feed-forward; all residual."""

    def __init__(self, dim: int, heads: int, context_dim: int | None):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads)
        if context_dim:
            self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), nn.Module()
        self.ff.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x, context=None):                                             # (B*T, H*W, C), (B, L, D)
        x = x + self.attn1(self.norm1(x))
        if context is not None:
            queries = self.norm2(x).reshape(len(context), -1, x.shape[-1])          # (B, T*H*W, C): one prompt per clip
            x = x + self.attn2(queries, context).view_as(x)
        return x + self.ff.net(self.norm3(x))                                       # (B*T, H*W, C)


class SpatialTransformer(nn.Module):
    """Stable Diffusion's attention block on every frame by itself: ATTN2D of Make-A-Video, Eq. 3."""

    def __init__(self, dim: int, heads: int, context_dim: int | None, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, heads, context_dim)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x, context=None):                                             # (B*T, C, H, W)
        N, C, H, W = x.shape
        h = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(N, H * W, C)     # (B*T, H*W, C)
        h = self.transformer_blocks[0](h, context)
        return x + self.proj_out(h.reshape(N, H, W, C).permute(0, 3, 1, 2))         # (B*T, C, H, W)


class TemporalAttention(nn.Module):
    """ATTN1D of Make-A-Video, Eq. 3: every position attends over the frames, residual, output projection zero at first.

    Differs: the paper's frame positions are relative; sinusoids of the frame number need no table, work past the
    trained length, and are not zero at the start (behind a zero projection, a zero encoding would never learn)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        zeroed(self.attn.to_out)

    def forward(self, x, frames: int = 1):                                          # (B*T, C, H, W)
        if frames == 1:
            return x
        N, C, H, W = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(N // frames, frames, H * W, C)       # (B, T, H*W, C)
        tokens = tokens.transpose(1, 2).reshape(-1, frames, C)                      # (B*H*W, T, C)
        position = sinusoid(torch.arange(frames, device=x.device), C)               # (T, C)
        h = self.attn(self.norm(tokens) + position.to(tokens.dtype))                # (B*H*W, T, C)
        h = h.reshape(N // frames, H * W, frames, C).transpose(1, 2)                # (B, T, H*W, C)
        return x + h.reshape(N, H, W, C).permute(0, 3, 1, 2)                        # (B*T, C, H, W)


class ResnetBlock(nn.Module):
    """Two pseudo-3D convolutions around the timestep embedding. Norms are per frame: across frames they would leak."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None = None, groups: int = 8,
                 eps: float = 1e-5, temporal: bool = False):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = PseudoConv3d(in_channels, out_channels, temporal)
        if time_dim:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = PseudoConv3d(out_channels, out_channels, temporal)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, emb=None, frames: int = 1):                                # (B*T, C, H, W), (B*T, E)
        in_place = not torch.is_grad_enabled()  # spares a copy of a large clip: nobody else holds a norm's output
        h = self.conv1.over_time(self.conv1(F.silu(self.norm1(x), in_place)), frames)
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2.over_time(self.conv2(F.silu(self.norm2(h), in_place)), frames)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)  # (B*T, C', H, W)


class Downsample(nn.Module):
    """Halve H and W. The U-Net pads all around, Stable Diffusion's VAE only at the right and below."""

    def __init__(self, channels: int, padding: tuple = (1, 1, 1, 1)):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Double H and W: nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class AttentionGate(nn.Module):
    """alpha = sigmoid( psi( relu( W_x x + W_g g ) ) ), skip <- alpha * skip         Attention U-Net (1804.03999), Eqs. 1-2

    Differs: the video papers have no gates. And of these, skip and gating signal have one resolution already, and alpha is doubled, with
    psi zero at first, so that a fresh gate is the identity and pretrained weights keep their output."""

    def __init__(self, skip_channels: int, gating_channels: int):
        super().__init__()
        inner = skip_channels // 2
        self.to_skip = nn.Conv2d(skip_channels, inner, 1, bias=False)
        self.to_gating = nn.Conv2d(gating_channels, inner, 1)
        self.psi = zeroed(nn.Conv2d(inner, 1, 1))

    def forward(self, skip, gating):                                                # (B*T, C, H, W), (B*T, C', H, W)
        return skip * (2 * self.psi(F.relu(self.to_skip(skip) + self.to_gating(gating))).sigmoid())


class Embedding(nn.Module):
    """A scalar (B,) as a vector (B, E): sinusoid, then a two-layer MLP."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_dim, dim), nn.Linear(dim, dim)

    def forward(self, value):
        return self.linear_2(F.silu(self.linear_1(sinusoid(value, self.linear_1.in_features))))


class TemporalPrior(nn.Module):
    """The mean of all clips that a prompt describes, frame by frame: (B, L, D), (B,) -> (B, T, C, H, W). Not Make-A-Video's prior P.

    Differs: the papers leave it to attention to relate prompt, moment and place. Where a thing is depends on their product, not on
    "left" or on the frame number alone, so here the product is a feature. The mean is regressed first, then frozen and shown to the
    U-Net: at the noisiest timesteps, where motion is decided, no prediction is better."""

    def __init__(self, context_dim: int, channels: int):
        super().__init__()
        dim = 128
        self.norm = nn.LayerNorm(context_dim)
        self.prompt, self.moment, self.place = nn.Linear(context_dim, dim), nn.Linear(64, dim), nn.Linear(64, dim)
        self.rate, self.linear_1, self.linear_2 = nn.Linear(64, dim), nn.Linear(dim, dim), zeroed(nn.Linear(dim, channels))

    def forward(self, context, fps, T: int, H: int, W: int):
        seconds = torch.arange(T, device=fps.device) / fps[:, None]                 # (B, T), below scaled to be some 15 radians long
        moment = self.moment(sinusoid(4 * seconds.flatten(), 64)).unflatten(0, seconds.shape)      # (B, T, D')
        y, x = (sinusoid(8 * (torch.arange(n, device=fps.device) + .5) / n, 32) for n in (H, W))   # (H, 32), (W, 32)
        place = self.place(torch.cat([y[:, None].expand(H, W, 32), x.expand(H, W, 32)], dim=-1))   # (H, W, D')
        prompt = self.prompt(self.norm(context[:, -1]))                             # (B, D'): the last token has seen the others
        h = (moment * (1 + 4 * prompt[:, None]))[:, :, None, None] * (1 + 4 * place)               # (B, T, H, W, D'): 1 +, each alone too
        h = F.silu(self.linear_1(h) + self.rate(sinusoid(fps, 64))[:, None, None, None])
        return self.linear_2(h).permute(0, 1, 4, 2, 3)                              # (B, T, C, H, W)


# ------------------------------------------------------------------------------------------------
# The U-Net: Stable Diffusion's, inflated.

@dataclass
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple = (64, 128)           # width of each level; each level but the last halves H and W
    layers: int = 1                       # residual blocks per level (one more on the way up)
    attention: tuple = (True, True)       # which levels attend
    heads: int = 4
    context_dim: int | None = 128         # width of the prompt's tokens; None: no text
    groups: int = 8                       # of GroupNorm: 32 groups of few channels would erase colour
    temporal: str = "prior+attention+conv"  # or fewer of them, or "none": an image model
    gates: bool = True                    # attention gates on the skips
    patch_size: int = 1                   # fold patches into channels around the network: what makes 256 px affordable
    level: bool = False                   # level of conditioning augmentation as an input: super-resolution
    pooled: bool = False                  # the prompt's last token as a further embedding: all its text where there is no attention


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention within its frame and then over frames, and a resampler."""

    def __init__(self, c: UNetConfig, widths_in: list, width: int, attentions: int, skips: tuple = (), resampler: str = ""):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(w, width, 4 * c.channels[0], c.groups, temporal="conv" in c.temporal) for w in widths_in)
        self.attentions = nn.ModuleList(SpatialTransformer(width, c.heads, c.context_dim, c.groups) for _ in range(attentions))
        self.temporal_attentions = nn.ModuleList(
            TemporalAttention(width, c.heads) for _ in range(attentions if "attention" in c.temporal else 0))
        self.gates = nn.ModuleList(AttentionGate(s, w - s) for s, w in zip(skips, widths_in) if c.gates)
        self.downsamplers = nn.ModuleList([Downsample(width)] if resampler == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if resampler == "up" else [])

    def join(self, i: int, x, skip):                                                # (B*T, C, H, W), (B*T, C', H, W)
        return torch.cat([x, self.gates[i](skip, x) if self.gates else skip], dim=1)               # (B*T, C + C', H, W)

    def layer(self, i: int, x, skip, emb, context, frames: int):                    # (B*T, C, H, W), (B*T, C', H, W), (B*T, E), (B, L, D)
        x = self.resnets[i](x if skip is None else self.join(i, x, skip), emb, frames)
        if i < len(self.attentions):
            x = self.attentions[i](x, context)
        if i < len(self.temporal_attentions):
            x = self.temporal_attentions[i](x, frames)
        return x


class UNet(nn.Module):
    """From a noisy video, (B, T, C, H, W) -> (B, T, C', H, W), at noise level t, for a prompt and a frame rate. For base, this is
    Diffusion.target; interpolate.py and superres.py make a clean clip of it (`predict_with`). `given` are further input channels.

    Names are Stable Diffusion's: its weights load as they are, and all that is missing then is `is_inflation(name)`. Differs: Make-A-Video
    tells the frame rate to base and interpolation, Imagen Video to no network; here every space-time network is told."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = self.config = config
        n, width, patch = len(c.channels), c.channels[0], c.patch_size ** 2
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(c.in_channels * patch, width, 3, padding=1)
        self.time_embedding = Embedding(width, 4 * width)
        if c.temporal != "none":
            self.fps_embedding = Embedding(width, 4 * width)
            zeroed(self.fps_embedding.linear_2)
        if c.level:
            self.level_embedding = Embedding(width, 4 * width)
        if c.pooled:
            self.text_embedding = nn.Linear(c.context_dim, 4 * width)
        if c.context_dim and "prior" in c.temporal:
            self.temporal_prior = TemporalPrior(c.context_dim, c.out_channels)
            self.temporal_prior_conv = zeroed(nn.Conv2d(c.out_channels * patch, width, 3, padding=1))

        skips = [width]
        self.down_blocks = nn.ModuleList()
        for i, out in enumerate(c.channels):
            self.down_blocks.append(Level(c, [skips[-1]] + [out] * (c.layers - 1), out, c.layers * c.attention[i],
                                          resampler="down" if i < n - 1 else ""))
            skips += [out] * (c.layers + (i < n - 1))
        self.mid_block = Level(c, [out, out], out, int(any(c.attention)))
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(n)):
            popped = [skips.pop() for _ in range(c.layers + 1)]
            widths_in = [w + s for w, s in zip([out] + [c.channels[i]] * c.layers, popped)]
            out = c.channels[i]
            self.up_blocks.append(Level(c, widths_in, out, (c.layers + 1) * c.attention[i], popped, resampler="up" if i else ""))
        self.conv_norm_out = nn.GroupNorm(c.groups, width)
        self.conv_out = zeroed(nn.Conv2d(width, c.out_channels * patch, 3, padding=1))

    @staticmethod
    def is_inflation(name: str) -> bool:
        """Is this parameter one that an image model does not have?"""
        return any(part in name for part in ("temporal", "fps_embedding", "gates"))

    def fold(self, frames):
        """Patches as channels, (N, C, H, W) -> (N, p*p*C, H/p, W/p). A size that does not fit the strides is padded."""
        H, W = frames.shape[-2:]
        stride = self.config.patch_size * 2 ** (len(self.config.channels) - 1)
        if H % stride or W % stride:
            frames = F.pad(frames, (0, -W % stride, 0, -H % stride), mode="replicate")
        return F.pixel_unshuffle(frames, self.config.patch_size).to(self.conv_in.weight.dtype, memory_format=torch.channels_last)

    def unfold(self, h, H: int, W: int):
        """The other way round, and cropped. (N, p*p*C, H/p, W/p) -> (N, C, H, W)"""
        return F.pixel_shuffle(h, self.config.patch_size)[..., :H, :W]

    def forward(self, x, t, context=None, fps=None, level=None, given=None):
        """x (B, T, C, H, W), t (B,), context (B, L, D), fps (B,), level (B,), given (B, T, C", H, W) -> (B, T, C', H, W)"""
        B, T, _, H, W = x.shape
        emb = self.time_embedding(t)                                                # (B, E)
        if level is not None:
            emb = emb + self.level_embedding(100 * level)  # from 0 to 1 all sinusoids are much the same
        if self.config.pooled:
            emb = emb + self.text_embedding(context[:, -1])
        if T > 1 and hasattr(self, "fps_embedding"):  # a picture has no frame rate
            emb = emb + self.fps_embedding(fps)
        emb = emb.repeat_interleave(T, 0)                                           # (B*T, E)
        recompute = self.gradient_checkpointing and self.training
        def through(layer, *args):
            return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False) if recompute else layer(*args)

        shown = [video.flatten(0, 1) for video in (x, given) if video is not None]  # (B*T, C, H, W) each
        few = max(1, 2 ** 24 // shown[0][0].numel())  # frames at once in conv_in and conv_out: copies of a long clip would fill memory
        x = torch.cat([self.conv_in(torch.cat([self.fold(video[i:i + few]) for video in shown], dim=1))
                       for i in range(0, B * T, few)])                              # (B*T, C, H/p, W/p)
        if T > 1 and hasattr(self, "temporal_prior"):
            with torch.no_grad():  # it is trained first, and no further
                mean = self.temporal_prior(context, fps, T, H, W)                   # (B, T, C', H, W)
            x = x + self.temporal_prior_conv(self.fold(mean.flatten(0, 1)))
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = through(block.layer, i, x, None, emb, context, T)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = through(self.mid_block.layer, i, x, None, emb, context, T)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                skip = skips.pop()
                if not recompute:  # joined out here, both are freed before the layer runs; recomputing, the whole would be kept instead
                    x, skip = block.join(i, x, skip), None
                x = through(block.layer, i, x, skip, emb, context, T)
            for upsample in block.upsamplers:
                x = upsample(x)
        x = torch.cat([self.unfold(self.conv_out(F.silu(self.conv_norm_out(part))), H, W) for part in x.split(few)]).float()
        return x.unflatten(0, (B, T))                                               # (B, T, C', H, W)


# ------------------------------------------------------------------------------------------------
# Diffusion: z_t = alpha_t x + sigma_t eps, with alpha^2 + sigma^2 = 1 and alpha_bar = alpha^2.

def shifted(u: float, shift: float) -> float:
    """Move u in 0...1, the share of the way into noise, to where the cosine schedule's sigma / alpha is `shift` times as large, so that
    training and sampling (but for interpolate.py's) spend their steps where most is decided. simple diffusion (2301.11093), section
    3.1, does so for larger pictures.

    Frames with independent noise show the same thing again and again: 16 of them at t = 844 reveal as much as one picture at t = 500,
    and which way a thing goes is decided among the noisiest levels. So shift is sqrt(frames). superres.py explains shifts below 1.
    On other schedules than the cosine this is approximate. Differs: the papers' steps are even."""
    return 2 / math.pi * math.atan(shift * math.tan(math.pi / 2 * u))


def walk(steps: int, shift: float = 1.) -> list:
    """The timesteps of a walk from noise to data. Trailing: it starts at 999, and its last step ends at no noise. Timesteps that coincide
    after the shift are walked once."""
    return list(dict.fromkeys(max(0, round(1000 * shifted(1 - i / steps, shift)) - 1) for i in range(steps)))


class Diffusion:
    """1000 discrete noise levels t = 0 ... 999, what the network predicts at each, and how to walk back from noise.

    schedule  "cosine" (Imagen Video section 2.1) or "scaled_linear" (Stable Diffusion)
    target    "v" (Imagen Video section 2.4), "epsilon" (Stable Diffusion) or "sample" (the clean x itself)

    Differs: Imagen Video's t is continuous, and its networks are told the log-SNR; ours t itself, as Stable Diffusion's is."""

    def __init__(self, schedule: str = "cosine", target: str = "v"):
        self.config = {"schedule": schedule, "target": target}
        self.target = target
        if schedule == "cosine":  # alpha = cos(pi t / 2), at the middle of each of 1000 steps: neither end is ever reached
            alpha_bar = torch.cos(math.pi / 2 * (torch.arange(1000, dtype=torch.float64) + .5) / 1000) ** 2
        elif schedule == "scaled_linear":
            beta = torch.linspace(.00085 ** .5, .012 ** .5, 1000, dtype=torch.float64) ** 2
            alpha_bar = torch.cumprod(1 - beta, 0)
        else:
            raise ValueError(f"schedule {schedule!r} is neither 'cosine' nor 'scaled_linear'")
        self.alpha_bar = torch.cat([alpha_bar, torch.ones(1, dtype=torch.float64)])  # so that [-1] is no noise at all

    def alpha_sigma(self, t, like: torch.Tensor):
        """alpha_t and sigma_t of timesteps (B,), shaped to multiply `like` (B, ...). t = -1 means clean."""
        alpha_bar = self.alpha_bar[t.cpu()].view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    def add_noise(self, x, noise, t):
        """z_t = alpha_t x + sigma_t eps"""
        alpha, sigma = self.alpha_sigma(t, x)
        return alpha * x + sigma * noise

    def target_of(self, x, noise, t):
        """What the network should predict from add_noise(x, noise, t)."""
        alpha, sigma = self.alpha_sigma(t, x)
        return {"v": alpha * noise - sigma * x, "epsilon": noise, "sample": x}[self.target]

    def x_of(self, prediction, z, t):
        """The clean x that a prediction at z implies."""
        alpha, sigma = self.alpha_sigma(t, z)
        if self.target == "sample":
            return prediction
        return alpha * z - sigma * prediction if self.target == "v" else (z - sigma * prediction) / alpha

    def loss(self, predict, x, noise, t, weight=1.):
        """Weighted mean squared error of the target, one number per video. (B, ...) -> (B,)"""
        error = predict(self.add_noise(x, noise, t), t) - self.target_of(x, noise, t)
        return (weight * error.float().pow(2)).flatten(1).mean(1)

    def balance(self, t, like: torch.Tensor):
        """A weight of the target's squared error at timesteps (B,), shaped to multiply `like`, that makes all noise levels count about
        alike: 2 alpha_t sigma_t for v. Errors of noise and of the clean x, where these are the target, are alpha_t and sigma_t times v's.

        Next to no noise, v asks for detail that cannot be predicted, next to pure noise for a clip that z does not show: its error at
        both ends is ten times that in the middle, where things and their paths take shape. Differs: Imagen Video (Eq. 2) takes the
        plain error of the noise that v implies, which is alpha_t^2 times that of v."""
        alpha, sigma = self.alpha_sigma(t, like)
        return 2 * alpha * sigma / {"v": 1, "epsilon": alpha, "sample": sigma}[self.target] ** 2

    def ddim_step(self, z, x, t, s):
        """z_s = alpha_s x + (sigma_s / sigma_t) (z_t - alpha_t x)                   DDIM (2010.02502), Eq. 12, eta = 0

        Written out as (sigma_s / sigma_t) z_t + (...) x, since a long clip at 768 x 768 fills memory: nothing is made but z_s."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t, z), self.alpha_sigma(s, z)
        return (sigma_s / sigma_t * z).addcmul_(alpha_s - sigma_s / sigma_t * alpha_t, x)

    def x_of_walk(self, predict, z, walk):
        """A student's target: the x that takes z in one step of DDIM to where K steps of predict(z, t) lead, through the timesteps walk
        (B, K + 1).

        x = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)   Imagen Video section 2.7, after 2202.00512"""
        t, s = walk[:, 0], walk[:, -1]
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t, z), self.alpha_sigma(s, z)
        z_s = z
        for here, there in zip(walk.unbind(1), walk[:, 1:].unbind(1)):
            z_s = self.ddim_step(z_s, self.x_of(predict(z_s, here), z_s, here), here, there)
        return (z_s - sigma_s / sigma_t * z) / (alpha_s - sigma_s / sigma_t * alpha_t)

    def ancestral_step(self, z, x, t, s, gamma: float, fresh):
        """z_s = r (alpha_s / alpha_t) z + (1 - r) alpha_s x + sqrt(lower^(1 - gamma) upper^gamma) n    Imagen Video, Eqs. 3-4

        r = e^(lambda_t - lambda_s), of the log-SNRs. The variance of z_s lies between two bounds: lower is right where x is a
        single point, upper where x is itself Gaussian noise; gamma picks one between."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t, z), self.alpha_sigma(s, z)
        r = (alpha_t * sigma_s / (sigma_t * alpha_s)) ** 2
        lower, upper = (1 - r) * sigma_s ** 2, (1 - r) * sigma_t ** 2
        return r * (alpha_s / alpha_t) * z + (1 - r) * alpha_s * x + (lower ** (1 - gamma) * upper ** gamma).sqrt() * fresh

    def dpmpp_step(self, z, x, t, s, x_before, t_before):
        """z_s = (sigma_s / sigma_t) z - alpha_s (e^-h - 1) D                        DPM-Solver++ (2211.01095), Alg. 2

        D extrapolates x from the step before; h is the stride in half log-SNR, log(alpha / sigma)."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t, z), self.alpha_sigma(s, z)
        h = (alpha_s / sigma_s).log() - (alpha_t / sigma_t).log()
        if x_before is not None:
            alpha_b, sigma_b = self.alpha_sigma(t_before, z)
            ratio = ((alpha_t / sigma_t).log() - (alpha_b / sigma_b).log()) / h
            x = x + (x - x_before) / (2 * ratio)
        return (sigma_s / sigma_t) * z - alpha_s * torch.expm1(-h) * x

    def sample(self, predict, z, steps: int = 16, sampler: str = "dpmpp", gamma: float = 0., seed: int = 0, label: str = "",
               threshold: bool = False, shift: float = 1.):
        """Walk z (B, ...) from pure noise to clean data in at most `steps` calls of predict(z, t): by "dpmpp", "ddim", or "ancestral",
        which alone draws on gamma and seed. `threshold` is for pixels under guidance, `shift` says where most steps are. A label shows
        a progress bar."""
        with torch.no_grad():  # a decorator would keep the first z alive
            timesteps, x_before, t_before = walk(steps, shift), None, None
            at = lambda t: torch.full((len(z),), t, device=z.device)
            for i, step in enumerate(tqdm(timesteps, desc=label, disable=not label, leave=False), start=1):
                t = at(step)
                x = self.x_of(predict(z, t), z, t)
                x = dynamic_threshold(x) if threshold else x
                if i == len(timesteps):  # no noise is left to step to
                    return x
                s = at(timesteps[i])
                if sampler == "dpmpp":
                    z, x_before, t_before = self.dpmpp_step(z, x, t, s, x_before, t_before), x, t
                elif sampler == "ancestral":
                    z = self.ancestral_step(z, x, t, s, gamma, initial_noise(z.shape, seed + 1000003 * i).to(z))
                else:
                    z, x = self.ddim_step(z, x, t, s), None  # x is freed before the next is predicted


def dynamic_threshold(x, share: float = .995):
    """clip(x, -s, s) / s, where s is the 99.5-th percentile of |x|, or 1 if that is more: what guidance drives out of range comes
    back without saturating.                                                         Imagen Video section 2.6.2

    x (B, T, C, H, W) in -1...1: one s for all frames of a video, so that none of them flickers."""
    rank = lambda video: math.ceil(share * video.numel())
    s = torch.stack([video.abs().float().flatten().kthvalue(rank(video)).values for video in x])  # torch.quantile ends at 2^24 numbers
    s = s.clamp(min=1).view(-1, *[1] * (x.ndim - 1)).to(x)                          # (B, 1, 1, 1, 1)
    return x.clamp(-s, s) / s


def oscillating(high: float, low: float | None, steps: int, shift: float = 1.):
    """A guidance scale that changes with t: high for the first half of the steps, then low and high in turn: colours and motion
    are settled under strong guidance, and what it saturates is undone.              Imagen Video section 2.6.2

    Without a `low` it is the number `high`. The paper does not say how long the beginning is. Raises UserError where nothing follows it."""
    if low is None:
        return high
    timesteps = walk(steps, shift)
    if len(timesteps) < 2:
        raise UserError("--oscillate is about the second half of the steps, and there is but one")
    def scale(t: int) -> float:
        since = timesteps.index(t) - (len(timesteps) + 1) // 2                      # steps since the first half ended
        return low if since >= 0 and since % 2 == 0 else high
    return scale


def within(interval: tuple, guidance_scale: float):
    """A guidance scale as a function of t: `guidance_scale` where low < t <= high, elsewhere 1 at most, the prompt alone.

    An unguided step costs half; and outside the interval guidance bends outlines.   Limited interval (2404.07724)"""
    low, high = interval
    return lambda t: guidance_scale if low < t <= high else min(guidance_scale, 1.)


def has_fast_bf16(device) -> bool:
    """Does the hardware multiply bf16 natively? A CPU that does not is slower in bf16 than in fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return can.get("amx_bf16", False) or can.get("avx512_bf16", False)


def fast_autocast(device):
    """bf16 where that is fast, fp32 elsewhere."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_fast_bf16(device))


def initial_noise(shape: tuple, seed: int) -> torch.Tensor:
    """Standard normal (B, ...) on the CPU, one generator per video: video i does not depend on how many are made. Where steps, or the
    frames of superres.py, have noises of their own, multiples of 1000003 keep their seeds apart from those of neighbouring videos."""
    return torch.stack([torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed + i)) for i in range(shape[0])])


def guided(unet: UNet, context, null_context, fps, guidance_scale, given=None, level=None):
    """Classifier-free guidance as a predict(z, t): null + scale * (prompt - null), on all channels.

    A scale of 1 is the prompt alone, 0 the null prompt alone; Imagen Video's weight w is scale - 1 (Eq. 5). It is a number, or
    a function of t (`oscillating`, `within`). `given` are further input channels (B, T, C', h, w), the same at every t: the known frames
    of interpolate.py, the small clip of superres.py, whose augmentation is `level` (B,)."""
    twice = lambda x: None if x is None else torch.cat([x, x])
    def predict(z, t):
        scale = guidance_scale(int(t[0])) if callable(guidance_scale) else guidance_scale
        if scale in (0, 1):
            with fast_autocast(z.device):
                return unet(z, t, context if scale else null_context.expand_as(context), fps, level, given)
        # Concatenated out here: on a CPU, autocast refuses to do it for clips kept in fp16.
        inputs = twice(z), twice(t), torch.cat([context, null_context.expand_as(context)]), twice(fps), twice(level), twice(given)
        with fast_autocast(z.device):
            prompt, null = unet(*inputs).chunk(2)
        return null + scale * (prompt - null)
    return predict


# ------------------------------------------------------------------------------------------------
# The base model itself.

TINY = UNetConfig()
SD15 = UNetConfig(channels=(320, 640, 1280, 1280), layers=2, attention=(True, True, True, False), heads=8,
                  context_dim=768, groups=32)


def loss(unet: UNet, diffusion: Diffusion, batch: dict) -> torch.Tensor:
    """Loss per video, (B,). batch: latents (B, T, 4, h, w), context (B, L, D), fps (B,), noise like latents, t (B,)."""
    x, t = batch["latents"], batch["t"]
    return diffusion.loss(lambda z, t: unet(z, t, batch["context"], batch["fps"]), x, batch["noise"], t, diffusion.balance(t, x))


def prior_loss(prior: TemporalPrior, batch: dict) -> torch.Tensor:
    """Squared error of the mean clip, (B,): least where the prediction is the mean. batch: latents, context, fps, as above."""
    B, T, C, H, W = batch["latents"].shape
    return (prior(batch["context"], batch["fps"], T, H, W) - batch["latents"]).float().pow(2).flatten(1).mean(1)


GUIDANCE = 2.  # where no scale is asked for
INTERVAL = (500, 844)  # timesteps at which a clip is guided: at 500 noise and clip are equal, 844 is the middle of its walk


def usual(frames: int, steps: int | None = None, sampler: str | None = None) -> tuple[int, str]:
    """Steps and sampler: those asked for, or what suits `frames` with independent noise. A clip needs many ancestral steps: their fresh
    noise lets later steps correct a path that the noisiest got wrong, which DPM-Solver++ would keep. A picture has no path."""
    usual_steps, usual_sampler = (48, "ancestral") if frames > 1 else (16, "dpmpp")
    return steps or usual_steps, sampler or usual_sampler


def generate(unet: UNet, diffusion: Diffusion, text: dict, frames: int, fps: float, side: int = 8, steps: int | None = None,
             guidance: float = GUIDANCE, sampler: str | None = None, gamma: float = 0., seed: int = 0, label: str = "",
             shared_noise: bool = False, oscillate: float | None = None, interval: tuple | None = None):
    """Latents of one video per prompt, (B, T, 4, side, side). Steps and sampler are the `usual` ones if not given. By default a clip is
    guided within INTERVAL, a picture at all noise levels."""
    independent = 1 if shared_noise else frames  # frames with noises of their own
    (steps, sampler), shift = usual(independent, steps, sampler), math.sqrt(independent)
    device = next(unet.parameters()).device
    tokens, null = text["tokens"].to(device).float(), text["null_tokens"].to(device).float()
    z = initial_noise((len(tokens), independent, unet.config.out_channels, side, side), seed).to(device)
    z = z.expand(-1, frames, -1, -1, -1)                                            # (B, T, 4, side, side)
    interval = interval or (INTERVAL if independent > 1 else (-1, 999))
    scale = within(interval, guidance) if oscillate is None else oscillating(guidance, oscillate, steps, shift)
    predict = guided(unet, tokens, null, torch.full((len(tokens),), fps, device=device), scale)
    return diffusion.sample(predict, z, steps, sampler, gamma, seed, label, shift=shift).cpu()


# ------------------------------------------------------------------------------------------------
# What every stage shares, and no paper has: errors in one line, the command line, and files that are whole or not there.

WEIGHTS = Path(__file__).resolve().parent / "weights"
MADE_BY = {"text": 'python text.py "a red star moving left" -o text.pt', "latents": "python base.py text.pt -o base.pt",
           "pixels": "python vae.py decode base.pt -o pixels.pt"}


class UserError(Exception):
    """Something only the user can mend; `run` prints it as one line on stderr and exits with code 2."""


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the default of each flag that has one."""

    def _get_help_string(self, action):
        shown = action.default not in (None, "") and action.default is not False    # `in` would take 0 for False
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, knows the flags that stages share, and errs in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Defaults)

    def add_device(self):
        self.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")

    def add_seed(self):
        self.add_argument("--seed", type=seed, default=0, help="video i of a call starts from the noise of seed + i")

    def error(self, message: str):
        raise UserError(message)


def positive(kind: type):
    """An argparse type: a finite number of `kind` above zero."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf):
            raise argparse.ArgumentTypeError(f"'{text}' is not a positive {'whole ' if kind is int else ''}number")
        return value
    return parse


def finite(text: str) -> float:
    """An argparse type: any number but nan and the infinities."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


def seed(text: str) -> int:
    """An argparse type: a whole number small enough for every random generator, offsets included."""
    if not (text.isascii() and text.isdigit() and int(text) < 2 ** 32):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 0 to 4294967295")
    return int(text)


def device(text: str) -> str:
    """An argparse type: a device that this machine has."""
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # a RuntimeError, AssertionError, ModuleNotFoundError ..., by kind of device
        raise argparse.ArgumentTypeError(f"'{text}' cannot be used here: {str(error).splitlines()[0]}")
    return text


def note(message: str):
    """A remark to the user, beside the output."""
    print(message, file=sys.stderr)


def allocator(function: str, *values: int):
    """Tell glibc's allocator something, where there is a glibc."""
    with suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), function)(*values)


def keep_freed_memory():
    """glibc returns the memory of every large tensor to the system, and new pages must be mapped and cleared for the next: a quarter of
    the time of a stage on large frames. So blocks under 32 MiB are kept when freed. Larger ones would fragment memory; for these torch
    asks for pages of 2 MiB, which are mapped and cleared faster."""
    allocator("mallopt", -3, 2 ** 25)                                               # M_MMAP_THRESHOLD, as large as it can be
    allocator("mallopt", -1, 2 ** 31 - 1)                                           # M_TRIM_THRESHOLD: smaller blocks are kept
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def run(main):
    """The last line of every script: call main(), with a UserError as one clear line."""
    keep_freed_memory()
    try:
        main()
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            error = UserError("out of memory: fewer clips at once, or smaller or shorter ones, need less")
        if not isinstance(error, (UserError, OSError)):
            raise
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path` and rename it when all went well: no half-written file has the final name."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def check_out(path, allowed: tuple):
    """Refuse a file name, or a folder that cannot be written, before any time is spent on what would go into it."""
    path = Path(path)
    if path.suffix.lower() not in allowed:
        raise UserError(f"{path}: unknown extension, where one of {' '.join(allowed)} is wanted")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    check_folder(path.parent)


def check_folder(folder):
    """Make a folder, or say at once that nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write into {folder}: permission denied")


def deflate(stored, handle):
    """Copy a .pt, which is a zip of plain bytes, into a packed one, which torch reads as well. fp16 weights shrink by a twelfth."""
    with zipfile.ZipFile(stored) as plain, zipfile.ZipFile(handle, "w") as packed:
        for name in plain.namelist():
            packed.writestr(zipfile.ZipInfo(name), plain.read(name), zipfile.ZIP_DEFLATED)


def write_pt(path, content: dict, packed: bool = False):
    """torch.save of plain tensors and values. Through an open handle, since torch.save(path) stores the file's own name
    inside: this way equal content gives equal bytes."""
    try:
        with atomic(path) as temporary, open(temporary, "wb") as handle:
            stored = io.BytesIO() if packed else handle
            torch.save(content, stored)
            if packed:
                deflate(stored, handle)
    except RuntimeError as error:  # torch's own word, when the disk is full
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def read_pt(path) -> dict:
    """The dict of a .pt file, by torch's weights_only reader: a file from a stranger never runs code."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated, or no .pt file at all")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds a pickled object, which is refused and not run") from error
    except Exception as error:  # torch raises a dozen kinds here, some without a word
        raise UserError(f"{path} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a bare {type(content).__name__}, not one of our files")
    return content


def save_stage(path, kind: str, data, *, text, prompts, fps: float, seed, history: list, vae: str | None = None, size: tuple | None = None):
    """Hand tensors to the next stage. Latents are float (B, T, 4, h, w), pixels uint8 (B, T, 3, H, W), text has no data;
    `fps` is that of this very clip, `vae` the short hash of the autoencoder whose latents these are, and `size` (H, W) that of the
    pictures they were encoded from, where it did not fit the autoencoder's stride."""
    write_pt(path, {"format": 1, "kind": kind, "data": data, "text": text, "prompts": prompts, "fps": float(fps),
                    "seed": seed, "history": history, "vae": vae, "size": size})


def load_stage(path, kind: str) -> dict:
    """Read a stage file and check all that the next stage relies on. Raises UserError, naming what would mend it."""
    stage = read_pt(path)

    def want(condition, otherwise: str):
        if not condition:
            raise UserError(f"{path}: {otherwise}; make one with `{MADE_BY[kind]}`")

    keys = {"kind", "data", "text", "prompts", "fps", "seed", "history", "vae", "size"}
    want(stage.get("format") == 1 and keys <= stage.keys(), "no stage file of format 1")
    want(stage["kind"] == kind, f"holds {stage['kind']} where {kind} {'is' if kind == 'text' else 'are'} wanted")
    data, text, prompts, fps, size = (stage[key] for key in ("data", "text", "prompts", "fps", "size"))
    want(isinstance(prompts, list), "its prompts are no list")
    if kind != "text":
        is_tensor = isinstance(data, torch.Tensor)
        got = f"{data.dtype} {tuple(data.shape)}" if is_tensor else type(data).__name__
        wanted, channels = ("float (B, T, 4, h, w)", 4) if kind == "latents" else ("torch.uint8 (B, T, 3, H, W)", 3)
        right_type = is_tensor and (data.is_floating_point() if kind == "latents" else data.dtype == torch.uint8)
        want(right_type and data.ndim == 5 and data.numel() and data.shape[2] == channels, f"data is {got} where {wanted} is wanted")
        want(kind == "pixels" or data.isfinite().all(), "holds NaN or infinite values")
        want(len(data) == len(prompts), f"holds {len(data)} clips and {len(prompts)} prompts")
        want(isinstance(fps, float) and 0 < fps < math.inf, f"fps is {fps} where a positive number is wanted")
        pair = isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
        want(size is None or pair, f"size is {size} where (H, W) is wanted")
    if kind == "text" or text is not None:
        parts = ("tokens", "pooled", "null_tokens", "null_pooled")
        whole = isinstance(text, dict) and "encoder" in text and all(isinstance(text.get(part), torch.Tensor) for part in parts)
        want(whole and all(text[part].is_floating_point() for part in parts), f"text lacks one of encoder, {', '.join(parts)}")
        want(text["tokens"].ndim == 3 and text["tokens"].numel() and len(text["tokens"]) == len(prompts)
             and text["null_tokens"].shape == (1, *text["tokens"].shape[1:]), "text has not one (L, D) of tokens per prompt")
        want(all(text[part].isfinite().all() for part in parts), "holds NaN or infinite values")
    return stage


def save_weights(path, stage: str, config: dict, model: nn.Module, **made_by):
    """Weights of one model: its config, its tensors in fp16, and how they came to be."""
    tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_pt(path, {"format": 1, "config": config, "model": tensors, "made_by": {"stage": stage, **made_by}}, packed=True)


def load_weights(path, *stages: str) -> dict:
    """Read what save_weights wrote for one of `stages`, and add `own`, a hash of these very weights, and `hash`, by which later weights
    refer to them. They differ only for an autoencoder whose decoder alone was trained further: its latents keep their name. A Stable
    Diffusion folder has the weights of stages image, vae and clip."""
    if Path(path).is_dir():
        return stable_diffusion(Path(path), stages)
    remedy = f"train them with `python train.py {stages[0]}`"
    if not Path(path).is_file():
        raise UserError(f"{path}: no such weights; {remedy}")
    weights = read_pt(path)
    if "made_by" not in weights:
        raise UserError(f"{path} holds no weights; {remedy}")
    if weights["made_by"]["stage"] not in stages:
        raise UserError(f"{path} holds weights of {weights['made_by']['stage']}, where {' or '.join(stages)} is wanted; {remedy}")
    digest = hashlib.sha256(repr(weights["config"]).encode())
    for name, tensor in sorted(weights["model"].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    own = digest.hexdigest()[:8]
    return weights | {"own": own, "hash": weights["made_by"].get("latents", own)}


SD_PARTS = {  # the folder of each stage, and what its config.json must say
    "image": ("unet", ("block_out_channels", "layers_per_block", "attention_head_dim", "down_block_types", "cross_attention_dim")),
    "vae": ("vae", ("block_out_channels", "layers_per_block", "latent_channels")),
    "clip": ("text_encoder", ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"))}


def weights_in(folder, name: str) -> Path:
    """Where the weights of a stage are: NAME.pt in this folder, or else the folder itself if it is Stable Diffusion's."""
    folder, path = Path(folder), Path(folder) / f"{name}.pt"
    has_part = name in ("image", "base", "vae", "text") and (folder / "unet").is_dir()
    return folder if has_part and not path.is_file() else path


def stable_diffusion(folder: Path, stages: tuple) -> dict:
    """One part of a downloaded Stable Diffusion 1.x folder (unet/, vae/, text_encoder/, tokenizer/; .safetensors or .bin) as
    load_weights would give it, but for `settings`, the part's own config.json, instead of a config of ours. Raises UserError."""
    def part_file(part: str) -> Path:
        names = [stem + kind for kind in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
                 for stem in ("diffusion_pytorch_model", "model", "pytorch_model")]
        found = [folder / part / name for name in names if (folder / part / name).is_file()]
        if not found or not (folder / part / "config.json").is_file():
            raise UserError(f"{folder} is no Stable Diffusion folder: {part}/ lacks config.json, or weights (.safetensors, .bin)")
        return found[0]

    def name_of(path: Path) -> str:  # by its size and pieces of it: a hash of gigabytes would take longer than a picture
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as handle:
            for i in range(64):
                handle.seek(i * size // 64)
                digest.update(handle.read(2 ** 16))
        return digest.hexdigest()[:8]

    stage = next((stage for stage in SD_PARTS if stage in stages), None)
    if stage is None:
        raise UserError(f"{folder} is a folder, where weights of {' or '.join(stages)} are wanted")
    part, needed = SD_PARTS[stage]
    path = part_file(part)
    reading = path.parent / "config.json"
    try:
        settings = {"norm_num_groups": 32, "sample_size": 64} | json.loads(reading.read_text())
        reading = path
        tensors = dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # json's, safetensors' and torch's
        raise UserError(f"{reading} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    version = {1024: "2.x", 1280: "XL", 2048: "XL"}.get(settings.get("cross_attention_dim", settings.get("hidden_size")))
    if version:
        raise UserError(f"{folder} is Stable Diffusion {version}, whose text is not 768 wide as that of 1.x is; only 1.x is read")
    for key in needed:
        if key not in settings:
            raise UserError(f"{path.parent / 'config.json'} lacks {key}")
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names of 2022; before that, 1 x 1 convolutions
    model = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        above, _, layer = stem.rpartition(".")
        if layer in old and stage == "vae":
            name, tensor = f"{above}.{old[layer]}.{kind}", tensor.flatten(1) if kind == "weight" else tensor
        if stage == "clip" and not name.startswith("text_model."):  # as of transformers 5
            name = f"text_model.{name}"
        if kind != "position_ids":
            model[name] = tensor
    ids = {key: name_of(part_file(part)) for key, part in (("vae", "vae"), ("text", "text_encoder"))} if stage == "image" else {}
    made_by, own = {"stage": stage, "side": settings["sample_size"], **ids}, name_of(path)
    note(f"Stable Diffusion's {part}: {len(model)} tensors read")
    return {"config": None, "settings": settings, "model": model, "made_by": made_by, "own": own, "hash": own}


def fill(model: nn.Module, weights: dict, path, may_lack=lambda name: False) -> nn.Module:
    """load_state_dict, where only names that `may_lack` allows may be missing. Raises UserError on any other difference."""
    own, given = model.state_dict(), weights["model"]
    wrong = [name for name in own.keys() ^ given.keys() if name in given or not may_lack(name)]
    wrong += [name for name in own.keys() & given.keys() if own[name].shape != given[name].shape]
    if wrong:
        raise UserError(f"{path} is of another config: {len(wrong)} tensors differ, {sorted(wrong)[0]} among them")
    if not all(tensor.isfinite().all() for tensor in given.values()):
        raise UserError(f"{path} holds NaN or infinite weights")
    model.load_state_dict({name: tensor.float() for name, tensor in given.items()}, strict=False)
    return model


def configure(config_class, values: dict, path):
    """A config dataclass from the plain dict that weights keep. Raises UserError on fields it does not know."""
    try:
        return config_class(**values)
    except TypeError as error:
        raise UserError(f"{path} is of another config: {str(error).split('__init__() ')[-1]}") from error


def load(path=WEIGHTS / "base.pt", device="cpu", stages: tuple = ("base", "image")):
    """The U-Net of any stage's weights, ready to sample, its Diffusion, and the weights' dict."""
    weights = load_weights(path, *stages)
    unet, diffusion = build(weights, path)
    return unet.to(device, memory_format=torch.channels_last).eval(), diffusion, weights


def read_config(weights: dict, path) -> tuple[UNetConfig, Diffusion]:
    """The U-Net's config and the diffusion that weights were trained with."""
    if "settings" in weights:  # Stable Diffusion's own words for it
        s = weights["settings"]
        config = UNetConfig(channels=tuple(s["block_out_channels"]), layers=s["layers_per_block"], heads=s["attention_head_dim"],
                            attention=tuple("CrossAttn" in kind for kind in s["down_block_types"]),
                            context_dim=s["cross_attention_dim"], groups=s["norm_num_groups"])
        return config, Diffusion("scaled_linear", "epsilon")
    return configure(UNetConfig, weights["config"]["unet"], path), Diffusion(**weights["config"]["diffusion"])


def build(weights: dict, path, **changes):
    """The U-Net of these weights, with `changes` to its config, and its Diffusion. What an image model lacks starts as the identity."""
    config, diffusion = read_config(weights, path)
    may_lack = UNet.is_inflation if changes or "settings" in weights else lambda name: False
    return fill(UNet(replace(config, **changes)), weights, path, may_lack), diffusion


def remark_rate(fps: float, frames: int):
    """Tell the user of a frame rate that a network is asked for and has not seen. A picture has none."""
    if frames > 1 and not 4 <= fps <= 30:
        note(f"{fps:g} frames per second are asked for, where the shipped weights were trained on 4 to 30")


def check_sampling(args):
    """Refuse flags of a sampler that do not go together."""
    if args.steps and args.steps > 1000:
        raise UserError(f"--steps is {args.steps}, where 1000 noise levels are all there is")
    if args.oscillate is not None and args.sampler == "dpmpp":
        raise UserError("--oscillate wants --sampler ddim, not dpmpp, which extrapolates from step to step across the change of scale")


def check_encoder(path, text: dict, weights_path, made_by: dict):
    """Raise UserError unless the tokens in a stage file are of the text encoder that the weights were trained on."""
    if text["encoder"] != made_by["text"]:
        raise UserError(f"{path} was encoded by text weights {text['encoder']}, but {weights_path} was trained on "
                        f"{made_by['text']}; make it anew with `{MADE_BY['text']}`")


def main(argv=None):
    parser = Parser("Sample keyframe latents for the prompts of a text file.")
    parser.add_argument("text", help="the prompts' tokens, written by text.py")
    parser.add_argument("-o", "--out", default="base.pt", help="file of latents to write")
    parser.add_argument("--weights", default=WEIGHTS / "base.pt", help="base or image weights, or a Stable Diffusion 1.x folder")
    parser.add_argument("--shared-noise", action="store_true", help="start every frame from the same noise")
    parser.add_argument("--frames", type=positive(int), default=16, help="frames per video; 1 gives a picture")
    parser.add_argument("--fps", type=positive(float), default=4., help="frame rate told to the model; trained on 4 to 30")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, 1000 at most; 48 if not given, or 16 for a picture and "
                        "with --shared-noise")
    parser.add_argument("--guidance", type=finite, default=GUIDANCE, help="classifier-free guidance scale; 1 is none")
    parser.add_argument("--interval", type=int, nargs=2, metavar=("LOW", "HIGH"), help="guide at timesteps above LOW, up to HIGH, alone; "
                        f"{INTERVAL[0]} {INTERVAL[1]} if not given, or all for a picture, with --shared-noise and with --oscillate")
    parser.add_argument("--oscillate", type=finite, metavar="LOW", help="in the second half, guide every other step by this scale")
    parser.add_argument("--sampler", choices=("dpmpp", "ddim", "ancestral"), help="DPM-Solver++(2M), DDIM, or ancestral, with fresh noise "
                        "at each step; ancestral if not given, or dpmpp for a picture and with --shared-noise")
    parser.add_argument("--gamma", type=finite, default=0., help="variance of ancestral: 0 is its lower bound, 1 its upper one")
    parser.add_seed()
    parser.add_device()
    args = parser.parse_args(argv)
    args.steps, args.sampler = usual(1 if args.shared_noise else args.frames, args.steps, args.sampler)
    check_out(args.out, (".pt",))
    check_sampling(args)
    if not 0 <= args.gamma <= 1 or args.gamma and args.sampler != "ancestral":
        raise UserError(f"--gamma is {args.gamma:g}, where 0 to 1 is wanted, and 0 with any sampler but ancestral")
    if args.interval and (args.oscillate is not None or args.interval[0] >= args.interval[1]):
        raise UserError(f"--interval {args.interval[0]} {args.interval[1]}: LOW below HIGH is wanted, and no --oscillate, which has an order of its own")
    if args.shared_noise and args.sampler == "ancestral":
        raise UserError("--shared-noise wants --sampler dpmpp or ddim: ancestral steps give every frame fresh noise of its own")
    stage = load_stage(args.text, "text")
    unet, diffusion, weights = load(args.weights, args.device)
    made_by, text = weights["made_by"], stage["text"]
    check_encoder(args.text, text, args.weights, made_by)
    remark_rate(args.fps, args.frames)
    latents = generate(unet, diffusion, text, args.frames, args.fps, made_by["side"], args.steps, args.guidance,
                       args.sampler, args.gamma, args.seed, "base", args.shared_noise, args.oscillate, args.interval)
    history = f"base {weights['hash']} {args.sampler} steps {args.steps} guidance {args.guidance:g} fps {args.fps:g}"
    history += "" if args.oscillate is None else f" oscillate {args.oscillate:g}"
    history += "" if args.interval is None else f" interval {args.interval[0]} {args.interval[1]}"
    history += f" gamma {args.gamma:g}" * (args.sampler == "ancestral")
    history += " shared noise" * args.shared_noise
    save_stage(args.out, "latents", latents, text=text, prompts=stage["prompts"], fps=args.fps, seed=args.seed,
               history=stage["history"] + [history], vae=made_by["vae"])


if __name__ == "__main__":
    run(main)
