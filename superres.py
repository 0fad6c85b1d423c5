"""superres.py - more pixels: Make-A-Video's two networks, and Imagen Video's three.

Make-A-Video (2209.14792), 3.1-3.2: SR_l (`low`) works on space and time. SR_h (`high`) works on
single frames, all from the same noise, which keeps invented detail from flickering.
Imagen Video (2210.02303), 2.2-2.3: three SSR, space-time networks that read the prompt; the first
two attend within a frame. Every frame has its own noise.

All see the small clip, enlarged, beside the noisy large one. All are distilled to one step
(2202.00512). Differs: Imagen Video (2.7) distils to eight; and here SR_l shares its noise too.

    in    pixels.pt   uint8 (B, T, 3, h, w), from `vae.py decode` or the stage before, or any video
    out   large.pt    uint8 (B, T, 3, k*h, k*w): k = 4 for low, 3 for high and ssr-768, else 2

    python superres.py low pixels.pt -o low.pt
    python superres.py high low.pt -o high.mp4
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import base
import text
import vae
from base import Diffusion, UNet, UNetConfig, UserError

import torch
import torch.nn.functional as F
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------
# Conditioning augmentation, in training and in sampling

def blur(video, sigma: float):
    """Gaussian blur of every frame (B, T, C, H, W), sigma in pixels."""
    reach, C = math.ceil(3 * sigma), video.shape[2]
    x = torch.arange(-reach, reach + 1, device=video.device, dtype=video.dtype)
    kernel = torch.softmax(-x ** 2 / (2 * sigma ** 2), 0).expand(C, 1, 1, -1)  # (C, 1, 1, K)
    frames = F.pad(video.flatten(0, 1), (reach,) * 4, mode="replicate")  # (B*T, C, H+2r, W+2r)
    frames = frames.contiguous(memory_format=torch.channels_last)  # half the time on a CPU
    with torch.autocast(video.device.type, enabled=False):  # fp32
        frames = F.conv2d(F.conv2d(frames, kernel, groups=C), kernel.transpose(2, 3), groups=C)
    return frames.unflatten(0, video.shape[:2])  # (B, T, C, H, W)


def enlarge(small, scale: int, level):
    """The condition: clips (B, T, C, h, w), bilinearly `scale` times as large, blurred by level
    (B,) in 0...1. In training the level is random and the network is told, so that it copes with
    the faults of the stage before; TSR has level 0.

    Differs: Imagen Video (2.5) adds Gaussian noise; our networks are too narrow to take it out of
    every pixel. A blur is unCLIP's (2204.06125), for its first upsampler."""
    large = F.interpolate(small.flatten(0, 1), scale_factor=scale, mode="bilinear")
    large = large.unflatten(0, small.shape[:2])  # (B, T, C, H, W)
    if not level.any():
        return large
    return large.lerp(blur(large, scale * .75), level.view(-1, 1, 1, 1, 1).to(large))


# ------------------------------------------------------------------------------------------------
# The networks, as data

@dataclass
class StageConfig:
    name: str
    scale: int            # times as many pixels each way
    unet: UNetConfig
    level: float          # of augmentation, when sampling
    chunk_pixels: int     # of the frames that a chunk yields
    shared_noise: bool    # do all frames of a clip start from one noise?
    steps: int = 4        # of sampling; the weights say if they are distilled to fewer

    @property
    def checkpoint(self) -> str:
        return self.name if "-" in self.name else f"superres-{self.name}"

    @property
    def halo(self) -> int:
        """Frames that a frame sees on either side: one per temporal convolution, two per block."""
        blocks = (2 * self.unet.layers + 1) * len(self.unet.channels) + 2  # down and up; the middle
        return 2 * blocks if "conv" in self.unet.temporal else 0

    @property
    def shift(self) -> float:
        """For base.shift_noise. Fine detail is decided only at low noise, so most steps go there.
        TSR invents little and needs no shift."""
        return 1 / (2 * self.scale) if self.scale > 1 else 1.


# Differs: Imagen Video goes from 24 x 40 to 768 x 1280 in pixels, by x 2, x 4, x 4; here 64 x 64
# comes out of latents.
PIXELS = UNetConfig(in_channels=6, out_channels=3, channels=(24, 48, 64), context_dim=None,
                    attention=(False, False, False), groups=0, temporal=("conv",), patch_size=4,
                    embeddings=("fps", "level"))
FRAMES = replace(PIXELS, temporal=(), gates=False, embeddings=("level",))
SSR = replace(PIXELS, context_dim=128, embeddings=("fps", "level", "text"))
SSR_ATTENTION = replace(SSR, attention=(False, False, True), patch_size=2)
LOW = replace(PIXELS, patch_size=2)
STAGES = {stage.name: stage for stage in (
    # name, scale, network, level, pixels in a chunk, shared noise
    StageConfig("low", 4, LOW, .3, 76 * 256 ** 2, True),
    StageConfig("high", 3, FRAMES, .3, 4 * 768 ** 2, True),
    StageConfig("ssr-128", 2, SSR_ATTENTION, .2, 32 * 128 ** 2, False),
    StageConfig("ssr-256", 2, SSR_ATTENTION, .2, 32 * 256 ** 2, False),
    StageConfig("ssr-768", 3, replace(SSR, gates=False), .2, 64 * 768 ** 2, False))}


def clean_predictor(unet: UNet, large, level, fps=None, context=None, null_context=None, scale=1.):
    """A predict(z, t) of the clean clip: the condition `large` (B, T, 3, H, W) plus the output. For
    TSR it is (B, T, 6, H, W), the frames before and after. The output mixes them, and adds what is
    new: neither shows a tip that moved. Where both frames are the same, the result is that frame.

    Differs: Imagen Video predicts v. A narrow network cannot carry the noise of a whole patch; it
    can carry a correction of the condition."""
    predict = base.classifier_free_guidance(unet, context, null_context, fps, scale, large, level)

    def predict_x(z, t):
        output = predict(z, t)  # (B, T, 3, H, W)
        if large.shape[2] == 3:
            return large + output
        before, after = large.chunk(2, dim=2)
        share, new = output.chunk(2, dim=2)  # (B, T, 3, H, W); a share of 0 is the mean
        given = (before == after).flatten(2).all(2)[..., None, None, None]  # (B, T, 1, 1, 1)
        return before + (.5 + share) * (after - before) + new * ~given
    return predict_x


def loss(unet: UNet, diffusion: Diffusion, batch: dict, stage: StageConfig) -> torch.Tensor:
    """Squared error of x per clip, (B,). batch: pixels and noise (B, T, 3, H, W), small
    (B, T, C, h, w), level, fps, t (B,), and for SSR and TSR context (B, L, D).

    Differs: Imagen Video's error is that of the noise, alpha^2 / sigma^2 times this, so it counts
    most at low noise, where z almost is x."""
    large = enlarge(batch["small"], stage.scale, batch["level"])
    predict = clean_predictor(unet, large, batch["level"], batch["fps"], batch.get("context"))
    return diffusion.loss(predict, batch["pixels"], batch["noise"], batch["t"])


def has_texture(pixels) -> torch.Tensor:
    """Which clips (B, T, 3, H, W) have texture, (B,): more than a tenth of their pixels differ from
    the right neighbour by more than 3 of 255."""
    step = (pixels[..., 1:] - pixels[..., :-1]).abs().amax(2)  # (B, T, H, W - 1)
    return (step > 7 / 255).float().flatten(1).mean(1) > .1


def distillation_loss(unet: UNet, teacher: UNet, diffusion: Diffusion, batch: dict,
                      stage: StageConfig) -> torch.Tensor:
    """Squared error of x per clip, (B,). batch: as for `loss`, and path (B, K + 1), the timesteps
    that the teacher takes.                                                     Imagen Video, 2.7

    A network of one step predicts the mean of all plausible details, a blur; its student learns
    what many steps of the teacher draw. Where there is no texture to invent, the truth teaches
    better.
    Differs: Imagen Video halves the steps again and again and samples with fresh noise; here the
    student takes any K steps of the teacher at once, by DDIM. 2202.00512 weights the error by
    max(SNR, 1) or SNR + 1."""
    x, large = batch["pixels"], enlarge(batch["small"], stage.scale, batch["level"])
    condition = large, batch["level"], batch["fps"], batch.get("context")
    student, teacher = (clean_predictor(network, *condition) for network in (unet, teacher))
    t = batch["path"][:, 0]
    z = diffusion.add_noise(x, batch["noise"], t)  # (B, T, 3, H, W)
    with torch.no_grad():
        target = diffusion.distillation_target(teacher, z, batch["path"])
    target = torch.where(has_texture(x).view(-1, 1, 1, 1, 1), target, x)
    return (student(z, t) - target).pow(2).flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------
# Sampling, a chunk of frames at a time, so that memory does not grow with the length of the clip

def upscale(unet: UNet, diffusion: Diffusion, stage: StageConfig, small, fps: float, seed: int = 0,
            context=None, null_context=None, guidance: float = 1.):
    """uint8 (T, C, h, w) -> uint8 (T, 3, k*h, k*w). C is 3, or 6 for TSR. SSR and TSR need context
    and null_context (1, L, D).

    A chunk is denoised to the end before the next. A step sees `halo` frames on either side of one,
    so a chunk is computed with steps * halo more, and the result is that of one call on the whole
    clip. A guided clip is one chunk, because dynamic thresholding takes one percentile of it."""
    device, T = next(unet.parameters()).device, len(small)
    H, W = (stage.scale * side for side in small.shape[-2:])
    reach = stage.halo * stage.steps
    chunk = T if guidance != 1 else max(1, reach, stage.chunk_pixels // (H * W))
    level = torch.tensor([stage.level], device=device)

    def noise(i):  # (1, 3, H, W); fps, because tsr-128 runs twice in a cascade
        return base.initial_noise((1, 3, H, W), seed, f"{stage.name} at {fps:g} fps", i)
    shared = noise(0) if stage.shared_noise else None

    def as_batch(frames):  # (T', C, H, W): one clip; without temporal layers, pictures
        return frames[None] if stage.halo else frames[:, None]

    def denoise(first: int, last: int):  # frames first to last - 1
        frames = vae.to_float(as_batch(small[first:last])).to(device)  # (B, T', C, h, w)
        z = torch.cat([shared if stage.shared_noise else noise(i) for i in range(first, last)])
        z = as_batch(z).to(device)  # (B, T', 3, H, W)
        predict = clean_predictor(unet, enlarge(frames, stage.scale, level), level.expand(len(z)),
                                  float(fps), context, null_context, guidance)
        x = diffusion.sample(predict, z, stage.steps, "ddim", stage.shift, threshold=guidance != 1)
        return vae.to_uint8(x.flatten(0, 1)).cpu()  # (T', 3, H, W)

    out = []
    for start in tqdm(range(0, T, chunk), stage.name, leave=False):
        first = max(0, start - reach)
        frames = denoise(first, min(T, start + chunk + reach))
        out.append(frames[start - first:][:chunk])
    return torch.cat(out)


def load(stage: StageConfig, weights=base.WEIGHTS, device="cpu"):
    """The stage's U-Net and Diffusion, the stage with the steps of its weights, and its made_by."""
    unet, diffusion, made_by = base.load(weights, device, stage.checkpoint)
    steps = made_by.get("distill", [stage.steps])[-1]  # [teacher's, student's]
    return unet, diffusion, replace(stage, unet=unet.config, steps=steps), made_by


def read_clip(path) -> dict:
    """A .pt of pixels, or any video or image, as a clip (see base.new_clip)."""
    if Path(path).suffix.lower() == ".pt":
        return base.load_clip(path, "pixels")
    video, fps = vae.read_video(path)
    return base.new_clip("pixels", video[None], prompts=[Path(path).stem], fps=fps)


def upscale_clip(clip: dict, stage: StageConfig, weights=base.WEIGHTS, device="cpu", seed: int = 0,
                 guidance: float = 1., **changes) -> dict:
    """A clip of pixels, (B, T, C, h, w) -> (B, T, 3, H, W); video i starts from seed + i. `changes`
    to the stage: steps=4, or shared_noise=False, to see `low` and `high` flicker."""
    unet, diffusion, stage, made_by = load(stage, weights, device)
    stage = replace(stage, **changes)
    prompts, null = [None] * len(clip["data"]), None
    if "text" in unet.config.embeddings:
        clip = text.with_text(clip, weights, device)
        base.check_ids(clip, {"text": made_by.get("text")}, unet.config.context_dim)
        prompts, null = clip["text"]["tokens"].split(1), clip["text"]["null_tokens"]  # (1, L, D)
    elif guidance != 1:
        raise UserError(f"{stage.name} does not read the prompt, so it takes no guidance")
    videos = [
        upscale(unet, diffusion, stage, video, clip["fps"], seed + i, prompt, null, guidance)
        for i, (video, prompt) in enumerate(zip(clip["data"], prompts))]
    return clip | {"data": torch.stack(videos), "seed": seed}


def main(argv=None):
    parser = base.command_line(__doc__, argv)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("input", help="a .pt of pixels, or any video")
    parser.add_argument("-o", "--out", default="large.pt", help=".pt, .mp4, .gif, .png [large.pt]")
    parser.add_argument("--guidance", type=float, default=1., help="ssr-*: scale; 1 is none [1]")
    args = parser.parse_args(argv)
    base.check_output(args.out, ".pt", *vae.WRITTEN)
    clip = upscale_clip(read_clip(args.input), STAGES[args.stage], args.weights, args.device,
                        args.seed, args.guidance)
    vae.write_clip(args.out, clip, args.command)


if __name__ == "__main__":
    base.run(main)
