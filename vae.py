"""vae.py - the autoencoder between pixels and latents, and video files in and out.

Latent diffusion (2112.10752), section 3.1, compresses images before any diffusion happens, here
eightfold per side: base.py and interpolate.py see 8 x 8 x 4 numbers instead of 64 x 64 x 3. Frames
are coded one by one.

    encode   any video or image                ->  latents (1, T, 4, H/8, W/8) of unit variance
    decode   latents (B, T, 4, h, w)           ->  .mp4 .gif, contact sheet .png, or pixels .pt

    python vae.py encode clip.mp4 -o z.pt
    python vae.py decode z.pt -o video.mp4

Layers bear Stable Diffusion's names.
"""
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

from base import (SD_ID, WEIGHTS, Attention, Downsample, ResnetBlock, Upsample, UserError, atomic,
                  check_ids, check_output, command_line, fast_autocast, find_checkpoint,
                  load_checkpoint, load_clip, load_stable_diffusion, load_state, new_clip, run,
                  save_clip, tensors_id, warn)

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------
# The model

@dataclass
class VAEConfig:
    channels: tuple = (32, 64, 64, 128)   # width of each level; each level but the last halves H, W
    layers: int = 1                       # residual blocks per level, one more in the decoder
    latent_channels: int = 4
    groups: int = 8                       # of GroupNorm
    scaling_factor: float = 1.            # 1 / standard deviation of raw latents

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.channels) - 1)


SD15 = VAEConfig(channels=(128, 256, 512, 512), layers=2, groups=32, scaling_factor=.18215)


class MidAttention(Attention):
    """One head over all positions of a frame, with its own norm and residual. (N, C, H, W)"""

    def __init__(self, dim: int, groups: int):
        super().__init__(dim, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, H*W, C)
        return x + super().forward(h).transpose(1, 2).reshape(x.shape)


def resnets(widths: list, groups: int) -> nn.ModuleList:
    """Residual blocks from each width to the next."""
    pairs = zip(widths, widths[1:])
    return nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=1e-6) for a, b in pairs)


class Block(nn.Module):
    """One level: residual blocks and a resampler, under Stable Diffusion's names."""

    def __init__(self, widths: list, groups: int, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = resnets(widths, groups)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def forward(self, x):
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class Coder(nn.Module):
    """What encoder and decoder share: first and last layers, and a middle that attends."""

    def __init__(self, c: VAEConfig, in_channels: int, out_channels: int, widths: list):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = nn.Module()
        self.mid_block.resnets = resnets([c.channels[-1]] * 3, c.groups)
        self.mid_block.attentions = nn.ModuleList([MidAttention(c.channels[-1], c.groups)])
        self.conv_norm_out = nn.GroupNorm(c.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def middle(self, x):
        x = self.mid_block.attentions[0](self.mid_block.resnets[0](x))
        return self.mid_block.resnets[1](x)


class Encoder(Coder):
    """Pixels (N, 3, H, W) -> mean and log variance of their latents (N, 2*4, h, w)."""

    def __init__(self, c: VAEConfig):
        widths, last = [c.channels[0], *c.channels], len(c.channels) - 1
        super().__init__(c, 3, 2 * c.latent_channels, widths)
        self.down_blocks = nn.ModuleList(
            Block([a] + [b] * c.layers, c.groups,
                  downsampler=Downsample(b, (0, 1, 0, 1)) if i < last else None)
            for i, (a, b) in enumerate(zip(widths, widths[1:])))

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.middle(x))))


class Decoder(Coder):
    """Latents (N, 4, h, w) -> pixels (N, 3, H, W)."""

    def __init__(self, c: VAEConfig):
        widths, last = [c.channels[-1], *c.channels[::-1]], len(c.channels) - 1
        super().__init__(c, c.latent_channels, 3, widths)
        self.up_blocks = nn.ModuleList(
            Block([a] + [b] * (c.layers + 1), c.groups, upsampler=Upsample(b) if i < last else None)
            for i, (a, b) in enumerate(zip(widths, widths[1:])))

    def forward(self, z):
        x = self.middle(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder: pixels in -1...1, raw (unscaled) latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        channels = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, pixels):  # (N, 3, H, W)
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)  # (N, 4, h, w)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents):  # (N, 4, h, w)
        return self.decoder(self.post_quant_conv(latents))  # (N, 3, H, W)


def loss(vae: AutoencoderKL, batch: dict) -> torch.Tensor:
    """Reconstruction plus KL, one number per image. batch: pixels (N, 3, H, W), noise (N, 4, h, w).

    A pixel counts more the further it is from its image's mean colour: with equal weights a small
    object drowns in its ground. Differs: the authors use L1, a perceptual and an adversarial loss,
    and a KL that weighs thousands of times less."""
    x = batch["pixels"]
    mean, logvar = (part.float() for part in vae.encode(x))
    z = mean + (logvar / 2).exp() * batch["noise"]
    error = vae.decode(z).float() - x  # (N, 3, H, W)
    distance = (x - x.mean((2, 3), keepdim=True)).abs().mean(1, keepdim=True)  # (N, 1, H, W)
    weight = 1 + 50 * distance ** 2
    reconstruction = (weight * (error.abs() + error ** 2)).mean((1, 2, 3))
    kl = .5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean((1, 2, 3))
    return reconstruction + 1e-4 * kl


# ------------------------------------------------------------------------------------------------
# Whole videos through the model, a chunk of frames at a time

CHUNK = 32 * 64 * 64  # pixels coded at once: memory does not grow with the length of a video


def load(path=WEIGHTS / "vae.pt", device="cpu"):
    """The autoencoder, and the id of its encoder half, on which latents depend."""
    if Path(path).is_dir():
        s, state = load_stable_diffusion(path, "vae")
        config = VAEConfig(tuple(s["block_out_channels"]), s["layers_per_block"],
                           s["latent_channels"], s["norm_num_groups"],
                           s.get("scaling_factor", SD15.scaling_factor))
        vae_id = SD_ID
    else:
        weights = load_checkpoint(path, "vae")
        config, state = VAEConfig(**weights["config"]), weights["model"]
        vae_id = tensors_id(state, ("encoder.", "quant_conv."))
    vae = load_state(AutoencoderKL(config), state, path)
    return vae.to(device, memory_format=torch.channels_last).eval(), vae_id


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0...255 -> float -1...1"""
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """float -1...1 -> uint8 0...255"""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def in_chunks(function, frames, chunk: int, device, label: str):
    """function over frames (N, C, h, w), `chunk` at a time. A label shows a progress bar."""
    results = []
    with fast_autocast(device):
        for part in tqdm(frames.split(max(1, chunk)), desc=label, disable=not label, leave=False):
            part = part.to(device, memory_format=torch.channels_last)
            results.append(function(part).cpu().contiguous())
    return torch.cat(results)


def encode_video(vae: AutoencoderKL, video: torch.Tensor, label: str = "") -> torch.Tensor:
    """uint8 (B, T, 3, H, W) -> scaled latents (B, T, 4, h, w), the mean of each frame's posterior.
    Differs: latent diffusion samples the posterior."""
    device, (H, W) = next(vae.parameters()).device, video.shape[-2:]
    def encode(pixels):
        return vae.encode(to_float(pixels))[0].float() * vae.config.scaling_factor
    latents = in_chunks(encode, video.flatten(0, 1), CHUNK // (H * W), device, label)
    return latents.unflatten(0, video.shape[:2])


def decode_video(vae: AutoencoderKL, latents: torch.Tensor, label: str = "") -> torch.Tensor:
    """Scaled latents (B, T, 4, h, w) -> uint8 (B, T, 3, H, W)."""
    device, (h, w) = next(vae.parameters()).device, latents.shape[-2:]
    def decode(z):
        return to_uint8(vae.decode(z / vae.config.scaling_factor))
    chunk = CHUNK // (h * w * vae.config.factor ** 2)
    pixels = in_chunks(decode, latents.float().flatten(0, 1), chunk, device, label)
    return pixels.unflatten(0, latents.shape[:2])


# ------------------------------------------------------------------------------------------------
# Files that people look at. Pixels are uint8 everywhere here.

IMAGES, VIDEOS = (".png", ".jpg", ".jpeg"), (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
WRITTEN = (".mp4", ".gif", ".png")
BT709, PQ, HLG = 1, 16, 18  # FFmpeg's numbers
REFORMATTER = av.video.reformatter.VideoReformatter()  # kept: its table for HDR takes seconds


def decode(file, stream):
    """The frames of a stream, with the times at which players show them."""
    decoder, end = stream.codec_context, 0
    if stream.metadata.get("alpha_mode") == "1":  # FFmpeg's own decoders of webm drop alpha
        decoder = av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[decoder.name], "r")
    decoder.thread_type = "AUTO"
    for packet in file.demux(stream):
        with suppress(av.InvalidDataError):  # what is damaged is left out
            for frame in decoder.decode(packet):
                if file.format.name == "gif" and frame.duration < 2:  # 1/100 s, as browsers do
                    frame.duration = 10
                time = {"avi": frame.dts, "gif": end}.get(file.format.name, frame.pts)
                frame.pts = end if time is None else time
                if end and frame.pts - end > 300 / frame.time_base:  # damaged, or years of one picture
                    raise ValueError("one of its frames lasts longer than five minutes")
                end = frame.pts + frame.duration
                yield frame


def as_shown(frames, header: float, aspect: float, side: int | None):
    """See read_frames. The constant rate is the header's if the first times keep it within 2 %, else
    that of their usual distance, without pauses. aspect: of a pixel, W / H."""
    first = list(islice(frames, 32))
    if not first:
        raise ValueError("it holds no frames")
    head, times = first[0], [frame.pts for frame in first]
    gaps = np.diff([*times, times[-1] + first[-1].duration]) * float(head.time_base)
    gaps = gaps[gaps > 0] if max(gaps) > 0 else np.array([1 / header])
    usual = gaps[abs(np.log(gaps / np.sort(gaps)[(len(gaps) - 1) // 2])) < .4].mean()
    fps = header if abs(usual * header - 1) < .02 else float(1 / usual)
    W, H = head.width * aspect, head.height
    scale = side / min(W, H) if side else 1
    if scale > 1:
        raise ValueError(f"{W:g} x {H:g} pixels; {side} x {side} are needed")
    like = {"width": head.width, "height": head.height, "format": head.format.name}
    if head.color_trc in (PQ, HLG):
        like |= {"format": "gbrp", "dst_color_trc": BT709, "dst_color_primaries": BT709}
    steps = [("buffer", "video_size={width}x{height}:pix_fmt={format}".format(**like)
              + f":time_base={head.time_base}")]
    steps += [("bwdif", "send_frame:deint=interlaced")] * head.interlaced_frame
    if head.format.has_palette or any(part.is_alpha for part in head.format.components):
        steps += [("format", "gbrapf32le"), ("premultiply", "inplace=1")]  # hidden means black
    size = f"{round(W * scale)}:{round(H * scale)}"
    steps += [("scale", size + ":flags=bicubic+accurate_rnd+full_chroma_int"), ("format", "rgb24"),
              ("crop", f"{side or 'iw'}:{side or 'ih'}"), ("fps", str(fps)), ("buffersink", None)]
    graph = av.filter.Graph()
    graph.link_nodes(*(graph.add(*step) for step in steps)).configure()
    for frame in chain(first, frames, [None]):
        if frame:  # the last one's duration counts; in live files it is too short
            frame.duration = max(frame.duration, round(usual / frame.time_base))
            frame = REFORMATTER.reformat(frame, **like)
        graph.push(frame)
        with suppress(BlockingIOError, EOFError):
            while True:
                pixels = np.rot90(graph.pull().to_ndarray(), head.rotation // 90)  # (H, W, 3)
                yield torch.from_numpy(pixels.transpose(2, 0, 1).copy()), fps


def read_frames(path, side: int | None = None):
    """Yields each frame of a file as a player shows it, uint8 (3, H, W), and the frames per second (1
    for an image). With a side: the middle square, shrunk."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in IMAGES + VIDEOS:
        raise UserError(f"{path}: unknown extension; use one of {' '.join(VIDEOS + IMAGES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if suffix in IMAGES:
            if iio.immeta(path, index=0, plugin="pillow")["mode"].startswith("I"):
                raise ValueError("it has 16 bits per value, not 8")
            rgba = iio.imread(path, index=0, plugin="pillow", mode="RGBA", rotate=True)
            frame = av.VideoFrame.from_ndarray(rgba, "rgba")
            frame.pts, frame.duration, frame.time_base = 0, 1, Fraction(1)
            yield from as_shown(iter([frame]), 1., 1., side)
            return
        with av.open(f"file:{path}") as file:
            if not file.streams.video:
                raise ValueError("it holds no video")
            stream = max(file.streams.video, key=lambda s: s.disposition & 1)  # default, else first
            yield from as_shown(decode(file, stream), float(stream.average_rate or 1),
                                float(stream.sample_aspect_ratio or 1), side)
    except Exception as error:  # pillow and av raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} cannot be read: {reason[0]}") from error


def read_video(path):
    """A video or image file as uint8 (T, 3, H, W), and its frames per second (1 for an image)."""
    frames, rates = zip(*read_frames(path))
    return torch.stack(frames), rates[0]


def contact_sheet(videos: torch.Tensor, columns: int = 16) -> torch.Tensor:
    """uint8 (B, T, 3, H, W) as one image (3, rows*H, columns*W); every video starts a new row."""
    B, T, C, H, W = videos.shape
    columns = min(columns, T)
    videos = F.pad(videos, (0, 0, 0, 0, 0, 0, 0, -T % columns))
    grid = videos.reshape(-1, columns, C, H, W)  # (rows, columns, 3, H, W)
    return grid.permute(2, 0, 3, 1, 4).reshape(C, -1, columns * W)


def write_image(path, image: torch.Tensor):
    """Write uint8 (3, H, W) as .png."""
    with atomic(path) as temporary:
        iio.imwrite(temporary, image.permute(1, 2, 0).numpy())


def write_video(path, video: torch.Tensor, fps: float):
    """Write uint8 (T, 3, H, W) as .mp4 or .gif at `fps`, or as a .png contact sheet."""
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        return write_image(path, contact_sheet(video[None]))
    frames = video.permute(0, 2, 3, 1).numpy()  # (T, H, W, 3)
    with atomic(path) as temporary:
        if suffix == ".gif":  # which counts time in 1/100 s
            delay = min(6000, max(2, round(100 / fps)))
            if abs(100 / delay - fps) > .01:
                warn(f"{path}: {fps:g} fps is written as {100 / delay:.4g}, the nearest a gif can do")
            iio.imwrite(temporary, frames, duration=10 * delay, loop=0)
        else:
            frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)),
                            mode="edge")  # the codec takes only even sides
            with av.open(f"file:{temporary}", "w") as file:
                stream = file.add_stream("libx264", Fraction(fps).limit_denominator(65535), {"crf": "12"})
                stream.height, stream.width = frames.shape[1:3]
                stream.colorspace = stream.color_primaries = stream.color_trc = BT709
                stream.color_range = 1  # 16...235
                for frame in map(av.VideoFrame.from_ndarray, frames):
                    frame.colorspace = BT709
                    file.mux(stream.encode(frame))
                file.mux(stream.encode(None))


def write_videos(path, videos: torch.Tensor, fps: float) -> list:
    """Write (B, T, 3, H, W) and return the paths: one sheet, or file-0, file-1 ... for several."""
    path = Path(path)
    if path.suffix.lower() == ".png":
        write_image(path, contact_sheet(videos))
        return [path]
    paths = [path]
    if len(videos) > 1:
        paths = [path.with_stem(f"{path.stem}-{i}") for i in range(len(videos))]
    for one, video in zip(paths, videos):
        write_video(one, video, fps)
    return paths


def write_clip(path, clip: dict, script: str, argv):
    """Write a clip as a .pt for the next stage, or its pixels as files to look at, and say so."""
    if Path(path).suffix.lower() == ".pt":
        save_clip(path, clip, script, argv)
    else:
        print(*write_videos(path, clip["data"], clip["fps"]), sep="\n")


# ------------------------------------------------------------------------------------------------

def encode_clip(path, weights=WEIGHTS, device="cpu") -> dict:
    """Any video or image -> a clip of latents, by the autoencoder in a folder of weights."""
    vae, vae_id = load(find_checkpoint(weights, "vae"), device)
    video, fps = read_video(path)
    H, W = (side - side % vae.config.factor for side in video.shape[-2:])
    if not H * W:
        raise UserError(f"{path} is smaller than the autoencoder's stride of {vae.config.factor}")
    if (H, W) != video.shape[-2:]:
        warn(f"{path} is cut to {W} x {H}, multiples of the autoencoder's stride {vae.config.factor}")
    z = encode_video(vae, video[None, ..., :H, :W], "vae encode")
    return new_clip("latents", z, prompts=[Path(path).stem], fps=fps, vae=vae_id)


def decode_clip(clip: dict, weights=WEIGHTS, device="cpu") -> dict:
    """A clip of latents -> a clip of pixels (B, T, 3, 8*h, 8*w)."""
    vae, vae_id = load(find_checkpoint(weights, "vae"), device)
    check_ids(clip, {"vae": vae_id})
    return clip | {"kind": "pixels", "data": decode_video(vae, clip["data"], "vae decode")}


def main(argv=None):
    parser = command_line(__doc__, seed=False)
    parser.add_argument("action", choices=("encode", "decode"))
    parser.add_argument("input", help=f"encode: {' '.join(VIDEOS + IMAGES)}; decode: a .pt of latents")
    parser.add_argument("-o", "--out", required=True, help="what to write: see above")
    parser.add_argument("--weights", default=WEIGHTS, help="a folder, a .pt, or a Stable Diffusion "
                        "1.x folder [weights/]")
    args = parser.parse_args(argv)
    check_output(args.out, ".pt", *(WRITTEN if args.action == "decode" else ()))
    if args.action == "encode":
        clip = encode_clip(args.input, args.weights, args.device)
    else:
        clip = decode_clip(load_clip(args.input, "latents"), args.weights, args.device)
    write_clip(args.out, clip, "vae.py", argv)


if __name__ == "__main__":
    run(main)
