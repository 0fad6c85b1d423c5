"""vae.py - the autoencoder between pixels and latents, and video files in and out.

Latent diffusion (2112.10752), 3.1: images are compressed before any diffusion, here eightfold per
side. Frames are coded one by one.

    python vae.py encode clip.mp4 -o z.pt     any video or image -> latents (1, T, 4, H/8, W/8)
    python vae.py decode z.pt -o video.mp4    latents -> .mp4, .gif, contact sheet .png, or .pt
"""
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import base
from base import WEIGHTS, Attention, ResnetBlock, UserError, downsample, upsample

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------
# The model. Layers bear Stable Diffusion's names.

@dataclass
class VAEConfig:
    channels: tuple = (32, 64, 64, 128)  # width of each level; all but the last halve H, W
    layers: int = 1                      # residual blocks per level, one more in the decoder
    latent_channels: int = 4
    groups: int = 8                      # of GroupNorm
    scaling_factor: float = 1.           # 1 / standard deviation of raw latents

    @property
    def factor(self) -> int:  # pixels per latent, along each side
        return 2 ** (len(self.channels) - 1)


class MidAttention(Attention):
    """One head over all positions of a frame, with norm and residual."""

    def __init__(self, dim: int, groups: int):
        super().__init__(dim, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)

    def forward(self, x):  # (N, C, H, W)
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, H*W, C)
        return x + super().forward(h).transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """Residual blocks from each width to the next; attention after the first; a resampler."""

    def __init__(self, widths: list, groups: int, attention=False, down=None, up=None):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(a, b, groups=groups, eps=1e-6) for a, b in zip(widths, widths[1:]))
        self.attentions = nn.ModuleList([MidAttention(widths[1], groups)] if attention else [])
        self.downsamplers = nn.ModuleList([down] if down else [])
        self.upsamplers = nn.ModuleList([up] if up else [])

    def forward(self, x):  # (N, C, H, W)
        x = self.resnets[0](x)
        for layer in [*self.attentions, *self.resnets[1:], *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class Coder(nn.Module):
    """Encoder or decoder: levels that halve or double H and W, and a middle that attends."""

    def __init__(self, c: VAEConfig, encodes: bool):
        super().__init__()
        n = c.latent_channels
        widths = c.channels if encodes else c.channels[::-1]
        self.conv_in = nn.Conv2d(3 if encodes else n, widths[0], 3, padding=1)
        self.mid_block = Block([c.channels[-1]] * 3, c.groups, attention=True)
        self.conv_norm_out = nn.GroupNorm(c.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * n if encodes else 3, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.Sequential(), nn.Sequential()  # one stays empty
        for i, width in enumerate(widths):
            before, is_last = widths[max(0, i - 1)], i == len(widths) - 1
            if encodes:
                down = None if is_last else downsample(width, (0, 1, 0, 1))
                self.down_blocks.append(Block([before] + [width] * c.layers, c.groups, down=down))
            else:
                up = None if is_last else upsample(width)
                self.up_blocks.append(Block([before] + [width] * (c.layers + 1), c.groups, up=up))

    def forward(self, x):
        x = self.up_blocks(self.mid_block(self.down_blocks(self.conv_in(x))))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder of pixels in -1...1; its latents are not yet scaled."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config, n = config, config.latent_channels
        self.encoder, self.decoder = Coder(config, encodes=True), Coder(config, encodes=False)
        self.quant_conv = nn.Conv2d(2 * n, 2 * n, 1)
        self.post_quant_conv = nn.Conv2d(n, n, 1)

    def encode(self, pixels):  # (N, 3, H, W) -> mean and log variance
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)  # (N, 4, h, w)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents):  # (N, 4, h, w)
        return self.decoder(self.post_quant_conv(latents))  # (N, 3, H, W)


def loss(vae: AutoencoderKL, batch: dict):
    """Reconstruction plus KL (N,). batch: pixels (N, 3, H, W), noise (N, 4, h, w). A pixel counts
    more the further it is from its image's mean colour, or small objects would be lost.
    Differs: the authors use plain L1, a perceptual and an adversarial loss, and a KL that weighs
    thousands of times less."""
    x = batch["pixels"]
    mean, logvar = (part.float() for part in vae.encode(x))
    z = mean + (logvar / 2).exp() * batch["noise"]
    error = vae.decode(z).float() - x  # (N, 3, H, W)
    distance = (x - x.mean((2, 3), keepdim=True)).abs().mean(1, keepdim=True)  # (N, 1, H, W)
    weight = 1 + 50 * distance ** 2
    reconstruction = (weight * (error.abs() + error ** 2)).mean((1, 2, 3))
    kl = .5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean((1, 2, 3))
    return reconstruction + 1e-4 * kl


CHUNK = 32 * 64 * 64  # pixels coded at once


def load(weights=WEIGHTS, device="cpu"):
    """The autoencoder, and the id of its encoder half, on which latents depend."""
    checkpoint = base.load_checkpoint(weights, "vae")
    s, state = checkpoint["config"], checkpoint["model"]
    if "block_out_channels" in s:  # Stable Diffusion's
        config = VAEConfig(s["block_out_channels"], s["layers_per_block"], s["latent_channels"],
                           s.get("norm_num_groups", 32), s.get("scaling_factor", .18215))
        vae_id = base.SD_ID
    else:
        config, vae_id = VAEConfig(**s), base.tensors_id(state, ("encoder.", "quant_conv."))
    vae = base.load_state(AutoencoderKL(config), state, weights)
    return vae.to(device, memory_format=torch.channels_last).eval(), vae_id


def to_float(pixels):  # uint8 0...255 -> float -1...1
    return pixels.float() / 127.5 - 1


def to_uint8(pixels):  # float -1...1 -> uint8 0...255
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def in_chunks(function, vae: AutoencoderKL, video, chunk: int, label: str):
    """function of the frames of a video (B, T, C, h, w), about `chunk` pixels at once."""
    device, results = next(vae.parameters()).device, []
    parts = video.flatten(0, 1).split(max(1, chunk // video[0, 0, 0].numel()))  # (N, C, h, w)
    with base.fast_autocast(device):
        for part in tqdm(parts, desc=label, disable=not label, leave=False):
            part = part.to(device, memory_format=torch.channels_last)
            results.append(function(part).cpu().contiguous())
    return torch.cat(results).unflatten(0, video.shape[:2])


def encode_video(vae: AutoencoderKL, video, label: str = ""):
    """uint8 (B, T, 3, H, W) -> scaled latents (B, T, 4, h, w). A label shows a progress bar.
    Differs: latent diffusion samples each posterior; this is its mean."""
    def encode(pixels):
        return vae.encode(to_float(pixels))[0].float() * vae.config.scaling_factor
    return in_chunks(encode, vae, video, CHUNK, label)


def decode_video(vae: AutoencoderKL, latents, label: str = ""):
    """Scaled latents (B, T, 4, h, w) -> uint8 (B, T, 3, H, W)."""
    def decode(z):
        return to_uint8(vae.decode(z / vae.config.scaling_factor))
    return in_chunks(decode, vae, latents.float(), CHUNK // vae.config.factor ** 2, label)


# ------------------------------------------------------------------------------------------------
# Image and video files, always uint8

IMAGES, VIDEOS = (".png", ".jpg", ".jpeg"), (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
WRITTEN = (".mp4", ".gif", ".png")
BT709, PQ, HLG = 1, 16, 18  # FFmpeg's numbers of colour spaces and curves
REFORMATTER = av.video.reformatter.VideoReformatter()  # keeps a table that HDR takes seconds for


def decode_stream(file, stream):
    """The frames of a stream, with the times at which players show them."""
    container, end = file.format.name, 0
    stream.thread_type = "AUTO"
    for packet in file.demux(stream):
        with suppress(av.InvalidDataError):  # damaged frames are left out
            for frame in packet.decode():
                if container == "gif" and frame.duration < 2:  # 1/100 s; browsers make it 10
                    frame.duration = 10
                time = {"avi": frame.dts, "gif": end}.get(container, frame.pts)
                frame.pts = end if time is None else time
                if end and frame.pts - end > 300 / frame.time_base:
                    raise ValueError("one of its frames lasts longer than five minutes")
                end = frame.pts + frame.duration
                yield frame


def frame_rate(frames: list, header: float) -> float:
    """Frames per second: the header's, if the frames keep it within 2 %; else from the mean of
    their gaps, except pauses."""
    times = [frame.pts for frame in frames] + [frames[-1].pts + frames[-1].duration]
    gaps = np.diff(times) * float(frames[0].time_base)  # seconds
    gaps = gaps[gaps > 0]
    if not len(gaps):
        return header
    median = np.quantile(gaps, .5, method="lower")
    usual = gaps[abs(np.log(gaps / median)) < .4].mean()
    return header if abs(usual * header - 1) < .02 else float(1 / usual)


def as_shown(frames, side: int | None, header: float = 1., aspect: float = 1.):
    """Yields what read_frames does, from decoded frames. header: the file's frames per second;
    aspect: W / H of its pixels."""
    first = list(islice(frames, 32))
    if not first:
        raise ValueError("it holds no frames")
    head, fps = first[0], frame_rate(first, header)
    W, H = head.width * aspect, head.height
    scale = side / min(W, H) if side else 1
    if scale > 1:
        raise ValueError(f"{W:g} x {H:g} pixels; {side} x {side} are needed")
    pixels, sdr = head.format.name, {}
    if head.color_trc in (PQ, HLG):  # HDR
        pixels, sdr = "gbrp", {"dst_color_trc": BT709, "dst_color_primaries": BT709}
    steps = [f"buffer=video_size={head.width}x{head.height}:pix_fmt={pixels}"
             f":time_base={head.time_base}"]
    if head.interlaced_frame:
        steps += ["bwdif=send_frame:deint=interlaced"]
    if head.format.has_palette or any(part.is_alpha for part in head.format.components):
        steps += ["format=gbrapf32le", "premultiply=inplace=1"]  # what is hidden is black
    steps += [f"scale={round(W * scale)}:{round(H * scale)}"
              ":flags=bicubic+accurate_rnd+full_chroma_int", "format=rgb24",
              f"crop={side or 'iw'}:{side or 'ih'}", f"fps={fps}", "buffersink"]
    graph = av.filter.Graph()
    graph.link_nodes(*(graph.add(*step.split("=", 1)) for step in steps)).configure()
    for frame in chain(first, frames, [None]):
        if frame:  # only the last one's duration counts; in live recordings it is too short
            frame.duration = max(frame.duration, round(1 / fps / frame.time_base))
            frame = REFORMATTER.reformat(frame, head.width, head.height, pixels, **sdr)
        graph.push(frame)
        with suppress(BlockingIOError, EOFError):
            while True:
                image = np.rot90(graph.pull().to_ndarray(), head.rotation // 90)  # (H, W, 3)
                yield torch.from_numpy(image.transpose(2, 0, 1).copy()), fps


def read_frames(path, side: int | None = None):
    """Yields each frame of a file as a player shows it, (3, H, W), and the frames per second (1
    for an image). With a side: the middle square, shrunk."""
    try:
        if Path(path).suffix.lower() in IMAGES:
            if iio.immeta(path, index=0, plugin="pillow")["mode"].startswith("I"):
                raise ValueError("it has 16 bits per value, not 8")
            rgba = iio.imread(path, index=0, plugin="pillow", mode="RGBA", rotate=True)
            frame = av.VideoFrame.from_ndarray(rgba, "rgba")
            frame.pts, frame.duration, frame.time_base = 0, 1, Fraction(1)
            yield from as_shown(iter([frame]), side)
            return
        with av.open(f"file:{path}") as file:
            if not file.streams.video:
                raise ValueError("it holds no video")
            stream = max(file.streams.video, key=lambda s: s.disposition & 1)  # default or first
            yield from as_shown(decode_stream(file, stream), side, float(stream.average_rate or 1),
                                float(stream.sample_aspect_ratio or 1))
    except Exception as error:  # pillow and av raise anything
        raise UserError(f"{path} cannot be read: {str(error) or repr(error)}") from error


def read_video(path):
    """All of read_frames: (T, 3, H, W), and the frames per second."""
    frames, rates = zip(*read_frames(path))
    return torch.stack(frames), rates[0]


def contact_sheet(videos):
    """(B, T, 3, H, W) as one image (3, rows*H, columns*W); every video starts a new row."""
    B, T, C, H, W = videos.shape
    columns = min(16, T)
    videos = F.pad(videos, (0, 0, 0, 0, 0, 0, 0, -T % columns))  # black frames end the last row
    grid = videos.reshape(-1, columns, C, H, W)  # (rows, columns, 3, H, W)
    return grid.permute(2, 0, 3, 1, 4).reshape(C, -1, columns * W)


def write_image(path, image):
    """Write (3, H, W) as .png."""
    with base.atomic(path) as temporary:
        iio.imwrite(temporary, image.permute(1, 2, 0).numpy())


def write_video(path, video, fps: float):
    """Write (T, 3, H, W) as .mp4 or .gif, which counts time in 1/100 s."""
    frames = video.permute(0, 2, 3, 1).numpy()  # (T, H, W, 3)
    with base.atomic(path) as temporary:
        if Path(path).suffix.lower() == ".gif":
            duration = 10 * max(2, round(100 / fps))  # ms
            iio.imwrite(temporary, frames, duration=duration, loop=0)
            return
        H, W = frames.shape[1:3]  # the codec takes only even sides
        frames = np.pad(frames, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
        with av.open(f"file:{temporary}", "w") as file:
            rate = Fraction(fps).limit_denominator(65535)
            stream = file.add_stream("libx264", rate, {"crf": "12"})
            stream.height, stream.width = frames.shape[1:3]
            stream.colorspace = stream.color_primaries = stream.color_trc = BT709
            stream.color_range = 1  # 16...235
            for frame in map(av.VideoFrame.from_ndarray, frames):
                frame.colorspace = BT709
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))


def write_videos(path, videos, fps: float) -> list:
    """Write (B, T, 3, H, W) as one sheet .png, or as .mp4 or .gif: several as file-0, file-1 ...
    Returns the paths."""
    path = Path(path)
    if path.suffix.lower() == ".png":
        write_image(path, contact_sheet(videos))
        return [path]
    several = len(videos) > 1
    paths = [path.with_stem(f"{path.stem}-{i}") if several else path for i in range(len(videos))]
    for one, video in zip(paths, videos):
        write_video(one, video, fps)
    return paths


def write_clip(path, clip: dict, command: str):
    """Write a clip as a .pt, or its pixels as files to look at."""
    if Path(path).suffix.lower() == ".pt":
        base.save_clip(path, clip, command)
    else:
        print(*write_videos(path, clip["data"], clip["fps"]), sep="\n")


def encode_clip(path, weights=WEIGHTS, device="cpu") -> dict:
    """Any video or image -> a clip of latents. Sides are cut to multiples of the VAE's 8."""
    vae, vae_id = load(weights, device)
    video, fps = read_video(path)
    H, W = (side - side % vae.config.factor for side in video.shape[-2:])
    if not H * W:
        raise UserError(f"{path} is smaller than {vae.config.factor} pixels")
    z = encode_video(vae, video[None, ..., :H, :W], "vae encode")
    return base.new_clip("latents", z, prompts=[Path(path).stem], fps=fps, vae=vae_id)


def decode_clip(clip: dict, weights=WEIGHTS, device="cpu") -> dict:
    """A clip of latents -> a clip of pixels."""
    vae, vae_id = load(weights, device)
    base.check_ids(clip, {"vae": vae_id})
    return clip | {"kind": "pixels", "data": decode_video(vae, clip["data"], "vae decode")}


def main(argv=None):
    parser = base.command_line(__doc__, argv, seed=False)
    parser.add_argument("action", choices=("encode", "decode"))
    parser.add_argument("input", help="encode: a video or image; decode: a .pt of latents")
    parser.add_argument("-o", "--out", required=True, help="what to write: see above")
    args = parser.parse_args(argv)
    base.check_output(args.out, ".pt", *(WRITTEN if args.action == "decode" else ()))
    if args.action == "encode":
        clip = encode_clip(args.input, args.weights, args.device)
    else:
        clip = decode_clip(base.load_clip(args.input, "latents"), args.weights, args.device)
    write_clip(args.out, clip, args.command)


if __name__ == "__main__":
    base.run(main)
