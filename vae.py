"""vae.py - the autoencoder between pixels and latents, and the border where video files are read and written.

Latent diffusion (2112.10752) section 3.1 compresses pictures before any diffusion happens, here eightfold per side: base.py and
interpolate.py see 8 x 8 x 4 numbers instead of 64 x 64 x 3. Frames are coded one by one; time is theirs.

    encode   any video or picture                   ->  latents (1, T, 4, H/8, W/8) of unit variance
    decode   latents (B, T, 4, h, w)                ->  video .mp4 .gif, contact sheet .png, or pixels .pt (B, T, 3, 8h, 8w)

    python vae.py encode clip.mp4 -o z.pt
    python vae.py decode z.pt -o video.mp4

Layers bear Stable Diffusion's names. Differs: the authors add a perceptual and an adversarial loss to the pixel loss;
in a world whose truth is known exactly, distance to that truth is the honest measure, and the only one used here. And
diffusion learns from the mean of a picture's posterior, where theirs is a sample of it.
"""
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from base import (WEIGHTS, Attention, Downsample, Parser, ResnetBlock, Upsample, UserError, atomic, check_out, configure,
                  fast_autocast, fill, load_stage, load_weights, note, run, save_stage)

CHUNK = 32 * 64 * 64  # pixels coded at a time, so that memory does not grow with the length of a video
logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns of clips that were filmed upright, and reads them rightly


# ------------------------------------------------------------------------------------------------
# The model

@dataclass
class VAEConfig:
    channels: tuple = (32, 64, 64, 128)   # width of each level; every level but the last halves H and W
    layers: int = 1                       # residual blocks per level (one more in the decoder)
    latent_channels: int = 4
    groups: int = 8                       # of GroupNorm
    scaling_factor: float = 1.            # 1 / standard deviation of raw latents, measured on training data

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.channels) - 1)


SD15 = VAEConfig(channels=(128, 256, 512, 512), layers=2, groups=32, scaling_factor=.18215)


class MidAttention(Attention):
    """One head over all positions of a frame, with its own norm and residual."""

    def __init__(self, dim: int, groups: int):
        super().__init__(dim, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)

    def forward(self, x):                                                           # (N, C, H, W)
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)                      # (N, H*W, C)
        return x + super().forward(tokens).transpose(1, 2).reshape(x.shape)         # (N, C, H, W)


def resnets(widths: list, groups: int) -> nn.ModuleList:
    """Residual blocks from each width to the next."""
    return nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=1e-6) for a, b in zip(widths, widths[1:]))


class Coder(nn.Module):
    """What encoder and decoder share: levels of residual blocks, and a middle that attends over the whole picture."""

    def __init__(self, config: VAEConfig, in_channels: int, out_channels: int, widths: list):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = nn.Module()
        middle = config.channels[-1]
        self.mid_block.resnets = resnets([middle] * 3, config.groups)
        self.mid_block.attentions = nn.ModuleList([MidAttention(middle, config.groups)])
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def middle(self, x):
        return self.mid_block.resnets[1](self.mid_block.attentions[0](self.mid_block.resnets[0](x)))

    def levels(self, x, blocks):
        for block in blocks:
            for layer in [*block.resnets, *block.downsamplers, *block.upsamplers]:
                x = layer(x)
        return x


class Block(nn.Module):
    """One level: residual blocks and, under the names Stable Diffusion gives them, a resampler."""

    def __init__(self, widths: list, groups: int, downsampler: nn.Module | None = None, upsampler: nn.Module | None = None):
        super().__init__()
        self.resnets = resnets(widths, groups)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])


class Encoder(Coder):
    """Pixels (N, 3, H, W) to the mean and log variance of their latents, (N, 2*4, h, w)."""

    def __init__(self, config: VAEConfig):
        widths = [config.channels[0], *config.channels]
        super().__init__(config, 3, 2 * config.latent_channels, widths)
        self.down_blocks = nn.ModuleList(
            Block([a] + [b] * config.layers, config.groups, downsampler=Downsample(b, (0, 1, 0, 1)) if i < len(config.channels) else None)
            for i, (a, b) in enumerate(zip(widths, widths[1:]), start=1))

    def forward(self, x):
        x = self.middle(self.levels(self.conv_in(x), self.down_blocks))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(Coder):
    """Latents (N, 4, h, w) to pixels (N, 3, H, W)."""

    def __init__(self, config: VAEConfig):
        widths = [config.channels[-1], *config.channels[::-1]]
        super().__init__(config, config.latent_channels, 3, widths)
        self.up_blocks = nn.ModuleList(
            Block([a] + [b] * (config.layers + 1), config.groups, upsampler=Upsample(b) if i < len(config.channels) else None)
            for i, (a, b) in enumerate(zip(widths, widths[1:]), start=1))

    def forward(self, z):
        x = self.levels(self.middle(self.conv_in(z)), self.up_blocks)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder. Pixels are in -1...1; `encode` and `decode` speak raw, unscaled latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels):                                                       # (N, 3, H, W)
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)        # (N, 4, h, w) each
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents):                                                      # (N, 4, h, w)
        return self.decoder(self.post_quant_conv(latents))                          # (N, 3, H, W)


def loss(vae: AutoencoderKL, batch: dict) -> torch.Tensor:
    """Reconstruction plus KL, one number per picture. batch: pixels (N, 3, H, W) in -1...1, noise (N, 4, h, w).

    A pixel counts the more the further it is from its picture's mean colour: with equal weights a small object drowns in
    its ground, and its colour is the first thing lost. Differs: the authors' L1 becomes L1 + L2, for PSNR's sake, and the KL counts a
    few thousand times more: theirs is 1e-6 of a sum over latents beside a sum over pixels, here both are means."""
    x = batch["pixels"]
    mean, logvar = vae.encode(x)
    mean, logvar = mean.float(), logvar.float()
    error = vae.decode(mean + (logvar / 2).exp() * batch["noise"]).float() - x      # (N, 3, H, W)
    unusual = (x - x.mean((2, 3), keepdim=True)).abs().mean(1, keepdim=True)        # (N, 1, H, W)
    weight = 1 + 50 * unusual ** 2
    reconstruction = (weight * (error.abs() + error ** 2)).mean((1, 2, 3))
    kl = .5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean((1, 2, 3))
    return reconstruction + 1e-4 * kl


# ------------------------------------------------------------------------------------------------
# Whole videos through the model, a chunk of frames at a time

def load(path=WEIGHTS / "vae.pt", device="cpu"):
    """The shipped autoencoder, and the weights' dict."""
    weights = load_weights(path, "vae")
    if "settings" in weights:
        s = weights["settings"]
        config = VAEConfig(tuple(s["block_out_channels"]), s["layers_per_block"], s["latent_channels"], s["norm_num_groups"],
                           s.get("scaling_factor", SD15.scaling_factor))
    else:
        config = configure(VAEConfig, weights["config"], path)
    vae = fill(AutoencoderKL(config), weights, path)
    return vae.to(device, memory_format=torch.channels_last).eval(), weights


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0...255 -> float -1...1"""
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """float -1...1 -> uint8 0...255"""
    return (pixels.float() + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def in_chunks(function, frames: torch.Tensor, factor: int, device, label: str) -> torch.Tensor:
    """function, without gradients, over frames (N, C, h, w), a chunk at a time; each place of a frame stands for factor x factor pixels.
    A label shows a progress bar."""
    results, H, W = [], factor * frames.shape[-2], factor * frames.shape[-1]
    with torch.inference_mode(), fast_autocast(device):
        for chunk in tqdm(frames.split(max(1, CHUNK // (H * W))), desc=label, disable=not label, leave=False):
            chunk = chunk.to(device, memory_format=torch.channels_last)
            results.append(function(chunk).cpu().contiguous())
    return torch.cat(results)


def encode_video(vae: AutoencoderKL, video: torch.Tensor, label: str = "") -> torch.Tensor:
    """uint8 (B, T, 3, H, W) -> scaled latents (B, T, 4, h, w): the mean of each frame's posterior, at unit variance."""
    scale, device = vae.config.scaling_factor, next(vae.parameters()).device
    encode = lambda pixels: vae.encode(to_float(pixels))[0].float() * scale
    return in_chunks(encode, video.flatten(0, 1), 1, device, label).unflatten(0, video.shape[:2])


def decode_video(vae: AutoencoderKL, latents: torch.Tensor, label: str = "") -> torch.Tensor:
    """Scaled latents (B, T, 4, h, w) -> uint8 (B, T, 3, H, W)."""
    scale, device = vae.config.scaling_factor, next(vae.parameters()).device
    decode = lambda z: to_uint8(vae.decode(z / scale))
    return in_chunks(decode, latents.float().flatten(0, 1), vae.config.factor, device, label).unflatten(0, latents.shape[:2])


# ------------------------------------------------------------------------------------------------
# Files people look at. Pixels are uint8 everywhere here.

PICTURES, VIDEOS = (".png", ".jpg", ".jpeg"), (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")  # what is read
WRITTEN = (".mp4", ".gif", ".png")


def on_black(frame: np.ndarray) -> np.ndarray:
    """What is transparent in a frame uint8 (H, W, 4) shows black, not the colour that is hidden there. (H, W, 3)"""
    return (frame[..., :3] * (frame[..., 3:] / 255)).round().astype(np.uint8)


def read_video(path):
    """A video or picture file as uint8 (T, 3, H, W), and its frames per second (1 for a picture).
    Raises UserError on anything that cannot be read."""
    path = Path(path)
    suffix, fps = path.suffix.lower(), 1.
    if suffix not in PICTURES + VIDEOS:
        raise UserError(f"{path}: unknown extension, where one of {' '.join(VIDEOS + PICTURES)} is wanted")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with iio.imopen(path, "r", plugin="pillow" if suffix in (*PICTURES, ".gif") else "FFMPEG") as file:
            if suffix in PICTURES:  # a phone's .jpg may hold a second, smaller one
                if file.metadata(index=0)["mode"].startswith("I"):
                    raise ValueError("it has 16 bits for each value, where 8 are wanted")
                frames = [on_black(file.read(index=0, mode="RGBA", rotate=True))]   # as the camera was held
            elif suffix == ".gif":  # a frame that is shown longer than others stands for several; under 20 ms means 100, as in browsers
                last = [file.metadata(index=i).get("duration", 0) for i in range(file.properties(index=...).n_images)]
                last = [ms if ms >= 20 else 100 for ms in last]
                frames = [frame for frame, ms in zip(map(on_black, file.iter(mode="RGBA")), last) for _ in range(round(ms / min(last)))]
                fps = 1000 * len(frames) / sum(last)  # 15 fps are frames of 60 and of 70 ms
            else:  # as they are: else ffmpeg fills the pauses of an uneven clip with copies
                fps, frames = float(file.metadata()["fps"]), file.iter(output_params=["-fps_mode", "passthrough"])
            frames = [torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames]      # (3, H, W) each
        if not frames or not math.isfinite(fps) or fps <= 0:
            raise ValueError("it holds no frames, or no frame rate")
        return torch.stack(frames).contiguous(), fps                                # (T, 3, H, W)
    except Exception as error:  # imageio's plugins raise whatever ffmpeg or pillow made them raise
        raise UserError(f"{path} cannot be read: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


def contact_sheet(videos: torch.Tensor, columns: int = 16) -> torch.Tensor:
    """uint8 (B, T, 3, H, W) as one picture (3, rows*H, columns*W): every video starts a new row, time runs right."""
    B, T, C, H, W = videos.shape
    columns = min(columns, T)
    padded = F.pad(videos, (0, 0, 0, 0, 0, 0, 0, -T % columns))                     # (B, rows*columns, 3, H, W)
    grid = padded.reshape(-1, columns, C, H, W)                                     # (B*rows, columns, 3, H, W)
    return grid.permute(2, 0, 3, 1, 4).reshape(C, -1, columns * W)


def write_picture(path, picture: torch.Tensor):
    """Write uint8 (3, H, W) as .png."""
    with atomic(path) as temporary:
        iio.imwrite(temporary, picture.permute(1, 2, 0).numpy())


def write_video(path, video: torch.Tensor, fps: float):
    """Write uint8 (T, 3, H, W) as .mp4 or .gif at `fps`, or as a .png contact sheet."""
    check_out(path, WRITTEN)
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        return write_picture(path, contact_sheet(video[None]))
    with atomic(path) as temporary:
        if suffix == ".gif":
            delay = min(6000, max(2, round(100 / fps)))
            if abs(100 / delay - fps) > .01:
                note(f"{path}: a gif counts in 1/100 s, so {fps:g} fps is written as {100 / delay:.4g}")
            iio.imwrite(temporary, video.permute(0, 2, 3, 1).numpy(), duration=10 * delay, loop=0)
        else:
            video = F.pad(video, (0, video.shape[3] % 2, 0, video.shape[2] % 2), mode="replicate")  # the codec takes even sides alone
            iio.imwrite(temporary, video.permute(0, 2, 3, 1).numpy(), plugin="FFMPEG", fps=fps, codec="libx264",
                        macro_block_size=1, quality=None, ffmpeg_log_level="error", output_params=["-crf", "12"])


def write_videos(path, videos: torch.Tensor, fps: float) -> list:
    """Write (B, T, 3, H, W) and return the paths: one png sheet for all, or file-0, file-1 ... where there are several."""
    path = Path(path)
    if path.suffix.lower() == ".png":
        write_picture(path, contact_sheet(videos))
        return [path]
    paths = [path] if len(videos) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(videos))]
    for one, video in zip(paths, videos):
        write_video(one, video, fps)
    return paths


# ------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser("Encode a video file into latents, or decode latents into a video file.")
    parser.add_argument("action", choices=("encode", "decode"), help="pixels to latents, or latents to pixels")
    parser.add_argument("input", help=f"encode: {' '.join(VIDEOS + PICTURES)}; decode: a .pt of latents")
    parser.add_argument("--weights", default=WEIGHTS / "vae.pt", help="autoencoder weights, written by train.py, or a Stable Diffusion 1.x folder")
    parser.add_argument("-o", "--out", required=True,
                        help="encode: a .pt of latents; decode: .mp4, .gif, .png (a contact sheet), or a .pt of pixels")
    parser.add_device()
    args = parser.parse_args(argv)
    check_out(args.out, (".pt",) if args.action == "encode" else (*WRITTEN, ".pt"))

    if args.action == "encode":
        video, fps = read_video(args.input)
        vae, weights = load(args.weights, args.device)
        H, W = video.shape[-2:]
        pad_h, pad_w = -H % vae.config.factor, -W % vae.config.factor
        if pad_h or pad_w:
            note(f"{W} x {H} is padded at the right and below to fit the autoencoder's stride of {vae.config.factor}, and cropped when decoded")
            video = F.pad(video, (0, pad_w, 0, pad_h), mode="replicate")
        latents = encode_video(vae, video[None], label="vae encode")
        save_stage(args.out, "latents", latents, text=None, prompts=[Path(args.input).stem], fps=fps, seed=None,
                   history=[f"encode {weights['hash']} {Path(args.input).name}"], vae=weights["hash"], size=(H, W) if pad_h or pad_w else None)
    else:
        stage = load_stage(args.input, "latents")
        vae, weights = load(args.weights, args.device)
        if stage["vae"] != weights["hash"]:
            raise UserError(f"{args.input} holds latents of autoencoder {stage['vae']}, but {args.weights} is {weights['hash']}; "
                            "decode them with the weights that made them")
        H, W = stage["size"] or (None, None)
        pixels = decode_video(vae, stage["data"], label="vae decode")[..., :H, :W]  # (B, T, 3, H, W)
        if Path(args.out).suffix.lower() == ".pt":
            save_stage(args.out, "pixels", pixels, text=stage["text"], prompts=stage["prompts"], fps=stage["fps"],
                       seed=stage["seed"], history=stage["history"] + [f"decode {weights['own']}"])
        else:
            write_videos(args.out, pixels, stage["fps"])


if __name__ == "__main__":
    run(main)
