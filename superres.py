"""superres.py - more pixels, by two designs for one job: Make-A-Video's two networks and Imagen Video's three.

Make-A-Video (2209.14792) sections 3.1-3.2. SR_l (`low`) is a space-time network, so that detail it invents agrees over time. SR_h
(`high`) is too big for that and works on single frames; what keeps it from flickering is that every frame starts from the same
noise, as here those of `low` do too. Imagen Video (2210.02303) sections 2.2-2.3: SSR, three space-time networks (x 2, x 4, x 4 there;
x 2, x 2, x 3 here), all of which hear the prompt, the first two with attention within a frame. Its frames keep noises of their own:
temporal convolution makes them agree.

All see the small clip, enlarged, beside the noisy large one; in training the enlarged clip is damaged by a random amount that
the network is told (conditioning augmentation), so that it forgives the faults of the stage before. One that has learned to denoise in
several steps can be distilled into a student that does so in one (Imagen Video, section 2.7).

    in    pixels.pt   uint8 (B, T, 3, h, w), from vae.py decode or from the stage before
    out   large.pt    uint8 (B, T, 3, k*h, k*w), k = 4 for low, 3 for high and ssr-768, 2 for ssr-128 and ssr-256

    python superres.py low pixels.pt -o low.pt
    python superres.py high low.pt -o high.pt       --independent-noise shows the flicker that the shared noise removes

Any size works: what does not fit the networks' strides is padded and cropped back.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import base
import text
import vae
from base import WEIGHTS, Diffusion, Parser, UNet, UNetConfig, UserError, load_stage, positive, run, save_stage


# ------------------------------------------------------------------------------------------------
# Conditioning augmentation: one function, in training and in sampling.

def blur(video, sigma: float):
    """Gaussian blur of every frame, sigma in pixels. (B, T, C, H, W)"""
    reach = math.ceil(3 * sigma)
    x = torch.arange(-reach, reach + 1, device=video.device, dtype=video.dtype)
    kernel = torch.softmax(-x ** 2 / (2 * sigma ** 2), 0).expand(video.shape[2], 1, 1, -1)         # (C, 1, 1, K)
    frames = F.pad(video.flatten(0, 1), (reach,) * 4, mode="replicate")                            # (B*T, C, H+2r, W+2r)
    frames = frames.contiguous(memory_format=torch.channels_last)  # in which a CPU blurs twice as fast
    with torch.autocast(video.device.type, enabled=False):  # the same in training and in sampling
        frames = F.conv2d(F.conv2d(frames, kernel, groups=len(kernel)), kernel.transpose(2, 3), groups=len(kernel))
    return frames.unflatten(0, video.shape[:2])                                                    # (B, T, C, H, W)


def enlarge(small, scale: int, level):
    """The condition: a clip (B, T, C, h, w) in -1...1, bilinearly `scale` times as large and blurred by level (B,) in 0...1.
    Level 0 is the enlarged clip itself.

    Differs: Imagen Video (section 2.5) adds Gaussian noise. Here the network's output is added to the enlarged clip, and it is too
    narrow to take noise back out of every pixel; blur is what unCLIP (2204.06125) gave its first upsampler."""
    large = F.interpolate(small.flatten(0, 1), scale_factor=scale, mode="bilinear").unflatten(0, small.shape[:2])  # (B, T, C, H, W)
    level = level.view(-1, 1, 1, 1, 1).to(large)
    return large.lerp(blur(large, scale * .75), level) if level.any() else large


# ------------------------------------------------------------------------------------------------
# The models

@dataclass
class Stage:
    scale: int           # times as many pixels each way
    config: UNetConfig
    level: float         # of augmentation, when sampling
    pixels: int          # per chunk, over all of its frames, when sampling
    steps: int = 4       # of sampling; a student's weights want fewer
    blank: bool = False  # TSR: show nothing between the frames that are given

    @property
    def halo(self) -> int:
        """Frames on either side of a chunk that reach into it: one for each temporal convolution, of which a residual block has two."""
        c = self.config
        return 2 * ((2 * c.layers + 1) * len(c.channels) + 2) if "conv" in c.temporal else 0

    @property
    def shift(self) -> float:
        """Where most timesteps of training and sampling lie: see base.shifted. An enlarged picture lacks only detail, which is faint, the
        fainter the finer: it is decided at low noise, where a uniform walk of four steps never gets. TSR invents none."""
        return 1 / (2 * self.scale) if self.scale > 1 else 1.

    @property
    def shared_noise(self) -> bool:
        """Do all frames of a clip share one noise? In low and high they do (the paper says so of SR_h), in Imagen Video's networks, which
        hear the prompt, not."""
        return not self.config.pooled


# Differs: Imagen Video goes from 24 x 40 to 768 x 1280, in pixels from the start and in larger steps; here it starts from 64 x 64,
# out of latents.
# Small patches and narrow levels: behind patches of 8 x 8, a network twice as wide could not place an edge.
PIXELS = UNetConfig(in_channels=6, out_channels=3, channels=(24, 48, 64), attention=(False, False, False), context_dim=None,
                    temporal="conv", patch_size=4, level=True)
SSR = replace(PIXELS, context_dim=128, pooled=True)
STAGES = {"low": Stage(4, replace(PIXELS, patch_size=2), level=.3, pixels=76 * 256 ** 2),
          "high": Stage(3, replace(PIXELS, temporal="none", gates=False), level=.3, pixels=4 * 768 ** 2),
          "ssr-128": Stage(2, replace(SSR, attention=(False, False, True), patch_size=2), level=.2, pixels=32 * 128 ** 2),
          "ssr-256": Stage(2, replace(SSR, attention=(False, False, True), patch_size=2), level=.2, pixels=32 * 256 ** 2),
          "ssr-768": Stage(3, replace(SSR, gates=False), level=.2, pixels=64 * 768 ** 2)}


def diffusion_of() -> Diffusion:
    """Differs: both papers predict noise or v. Behind a patch of p x p pixels a narrow network cannot carry 3 p^2 numbers of
    noise per position; the clean picture, as a residual on the enlarged one, it can."""
    return Diffusion(target="sample")


def predict_with(unet: UNet, stage: Stage, large, level, fps=None, context=None, null_context=None, guidance_scale=1.):
    """A predict(z, t) of the clean clip, from the condition `large` (B, T, 3, H, W), and for SSR the prompt's tokens (B, L, D).

    For TSR, `large` is two clips (B, T, 6, H, W), of the frames before and after each; its network predicts where between the two a
    pixel lies. Differs: Imagen Video's predicts the pixel, which is harder: where an object passes in front of a still ground, a
    pixel is always one of the two, whatever the colours."""
    shown = large
    if stage.blank:
        shown = large.clone()
        shown[:, 1::2] = 0
    predict = base.guided(unet, context, null_context, fps, guidance_scale, shown, level)
    if large.shape[2] == 3:
        return lambda z, t: predict(z, t).float().add_(large)  # in place: of a long clip, each of these fills memory
    before, after = large.chunk(2, dim=2)                                           # (B, T, 3, H, W)
    def between(z, t):
        share = .5 + predict(z, t)
        share = share if unet.training else share.clamp(0, 1)  # in training, a clamp would stop the gradient of overshoots
        return before + share * (after - before)
    return between


def loss(unet: UNet, diffusion: Diffusion, batch: dict, stage: Stage) -> torch.Tensor:
    """Loss per clip, (B,). batch: pixels (B, T, 3, H, W), small (B, T, C, h, w), both in -1...1, C as in `upscale`, level (B,),
    fps (B,), noise like pixels, t (B,), and for SSR and TSR context (B, L, D).

    |x - x'|^2, weighted alike at all noise levels. Differs: Imagen Video's error, that of the noise, is alpha^2 / sigma^2 times this, which
    counts most next to no noise, where z gives the answer away; but edges are learnt from the small clip, and detail from a z that shows it
    faintly."""
    large = enlarge(batch["small"], stage.scale, batch["level"])
    predict = predict_with(unet, stage, large, batch["level"], batch["fps"], batch.get("context"))
    return diffusion.loss(predict, batch["pixels"], batch["noise"], batch["t"])


def teacher_walks(stage: Stage, teacher: int, student: int) -> torch.Tensor:
    """The teacher's timesteps, a row for each step of the student: the K steps that it replaces, and where they end. (student, K + 1), the
    last of all is -1, no noise. Raises UserError."""
    timesteps = torch.tensor(base.walk(teacher, stage.shift) + [-1])
    if teacher % student or teacher <= student or len(timesteps) != teacher + 1:  # of very many steps, some are the same
        raise UserError(f"--distill {teacher} {student}: each of a student's {student} steps must stand for as many of its teacher's {teacher}, "
                        "two or more, all of them at noise levels of their own")
    return timesteps.unfold(0, teacher // student + 1, teacher // student)


def fitted(stage: Stage, weights: dict) -> Stage:
    """The stage as these weights want it: with their own network, a student's in the steps that it was taught, TSR blank or not."""
    (config, _), made_by = base.read_config(weights, "the network's file"), weights["made_by"]
    return replace(stage, config=config, steps=made_by.get("distill", [stage.steps])[-1], blank=made_by.get("blank", False))


def distillation_loss(unet: UNet, teacher: UNet, diffusion: Diffusion, batch: dict, stage: Stage) -> torch.Tensor:
    """Loss per clip, (B,), of a student that is to do in one step what its teacher does in several. batch: as for `loss`, and walk
    (B, K + 1), the timesteps of the teacher, the first of them t.                       Imagen Video section 2.7

    One step predicts the mean of what may be there; each next one sees a little of it, and adds more. So few steps draw less texture
    than many; but the student is taught what many draw. Differs: the paper halves the steps again and again, from hundreds to eight;
    from four to sixteen, one to three rounds suffice, and a round may leave less than half. Its student samples with fresh noise,
    ours by DDIM; it weights by the signal-to-noise ratio, where here all levels count alike, as in `loss`."""
    large = enlarge(batch["small"], stage.scale, batch["level"])
    student, taught = (predict_with(model, stage, large, batch["level"], batch["fps"], batch.get("context")) for model in (unet, teacher))
    z = diffusion.add_noise(batch["pixels"], batch["noise"], batch["t"])            # (B, T, 3, H, W)
    with torch.no_grad():
        x = diffusion.x_of_walk(taught, z, batch["walk"])                           # (B, T, 3, H, W)
    return (diffusion.x_of(student(z, batch["t"]), z, batch["t"]) - x).float().pow(2).flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------
# Sampling: the network sees chunks of frames, so that memory does not grow with the length of the clip.

def upscale(unet: UNet, diffusion: Diffusion, stage: Stage, small, fps: float, steps: int | None = None, sampler: str = "ddim",
            seed: int = 0, independent: bool = False, level: float | None = None, label: str = "",
            context=None, null_context=None, guidance_scale=1.):
    """A clip uint8 (T, C, h, w) at `stage.scale` times the size, uint8 (T, 3, H, W); C is 3, and 6 for TSR, which is given two. SSR
    and TSR also want the tokens of the prompt, and of the null prompt, both (1, L, D).

    Chunk by chunk, each denoised to the end before the next. A space-time network also sees, on either side, the `halo` frames per step
    that reach into a chunk, so that the result is that of one call on the whole clip. A guided clip is one chunk, since dynamic
    thresholding takes one percentile of it. A per-frame network has no halo; its chunk is a batch of pictures. So memory grows with the
    size of a frame, not with their number; but a single space-time step holds at least 66 of them, at some 300 bytes a pixel."""
    device, (T, _, h, w), steps = next(unet.parameters()).device, small.shape, steps or stage.steps
    shape, reach = (3, stage.scale * h, stage.scale * w), stage.halo * steps
    chunk = T if guidance_scale != 1 else max(1, reach, stage.pixels // (shape[1] * shape[2]))      # in a shorter one most frames would be halo
    chunk += chunk % 2 if stage.blank else 0  # every other frame is blank, counted from where a chunk begins
    level = torch.tensor([stage.level if level is None else level], device=device)
    context, null_context = (None if tokens is None else tokens.to(device).float() for tokens in (context, null_context))
    shared, one = stage.shared_noise and not independent, base.initial_noise((1, *shape), seed)[0]    # (3, H, W)

    def denoised(first: int, last: int):
        """Frames first to last - 1, from noise to data at once, (T', 3, H, W). Their condition and noise, which fill memory, are fp16."""
        large, z = (torch.empty(last - first, channels, *shape[1:], dtype=torch.half, device=device) for channels in (small.shape[1], 3))
        for i in range(first, last):
            large[i - first] = enlarge(vae.to_float(small[None, None, i]).to(device), stage.scale, level)[0, 0]
            z[i - first] = one if shared else base.initial_noise((1, *shape), 1000003 * (seed + 1) + i)[0]
        large, z = (frames.unflatten(0, (1, -1) if stage.halo else (-1, 1)) for frames in (large, z))   # (B, T', C, H, W)
        rates = torch.full((len(z),), float(fps), device=device)
        predict = predict_with(unet, stage, large, level.expand(len(z)), rates, context, null_context, guidance_scale)
        made = diffusion.sample(predict, z, steps, sampler, label=label if T <= chunk else "", threshold=guidance_scale != 1, shift=stage.shift)
        return made.flatten(0, 1)                                                   # (T', 3, H, W)

    out = torch.empty(T, *shape, dtype=torch.uint8)
    for start in tqdm(range(0, T, chunk), desc=label, disable=not label or T <= chunk, leave=False):  # a single chunk shows its steps
        first, last = max(0, start - reach), min(T, start + chunk + reach)
        out[start:start + chunk] = vae.to_uint8(denoised(first, last)[start - first:][:chunk]).cpu()   # (T', 3, H, W)
    return out


def name_of(which: str) -> str:
    """What the weights of a stage are called: superres-low, superres-high, and all others by their own names."""
    return which if "-" in which else f"superres-{which}"


def load(which: str, path=None, device="cpu"):
    """The U-Net of a stage, ready to sample, its Diffusion, and the weights' dict."""
    return base.load(path or WEIGHTS / f"{name_of(which)}.pt", device, (name_of(which),))


def read_pixels(path) -> dict:
    """A file of pixels, or any video or picture, as a stage's dict."""
    if Path(path).suffix.lower() not in vae.VIDEOS + vae.PICTURES:
        return load_stage(path, "pixels")
    video, fps = vae.read_video(path)
    return {"data": video[None], "text": None, "prompts": [Path(path).stem], "fps": fps, "history": []}


def process(clips: dict, which: str, stage: Stage, loaded: tuple, path: Path, args, **how):
    """Put clips, as `read_pixels` gave them, through a network, as `load` gave it from `path`, and write args.out. args are a
    script's own: input, out, steps, sampler, guidance, oscillate, seed. Raises UserError."""
    unet, diffusion, weights = loaded
    stage = fitted(stage, weights)
    args.steps = args.steps or stage.steps
    if "distill" in weights["made_by"] and (args.steps, args.sampler) != (stage.steps, "ddim"):
        base.note(f"{path} was distilled to {stage.steps} step{'s' * (stage.steps > 1)} of ddim, and gains nothing from others")
    heard = unet.config.pooled and clips["text"] is not None
    if (args.guidance != 1 or args.oscillate is not None) and not heard:
        raise UserError(f"{args.input} came without a prompt, or {which} does not hear it: there is nothing to guide")
    guidance_of = [{}] * len(clips["data"])                                         # of each clip
    if unet.config.pooled:
        prompts = clips["text"] or text.said(path.parent, [""] * len(guidance_of))
        base.check_encoder(args.input, prompts, path, weights["made_by"])
        scale = base.oscillating(args.guidance, args.oscillate, args.steps, stage.shift)
        guidance_of = [{"context": tokens[None], "null_context": prompts["null_tokens"], "guidance_scale": scale} for tokens in prompts["tokens"]]
    if which == "low":  # high does not hear it, and those of Imagen Video have theirs fixed
        base.remark_rate(clips["fps"], clips["data"].shape[1])
    how |= {"steps": args.steps, "sampler": args.sampler, "label": which}
    made = torch.stack([upscale(unet, diffusion, stage, clip, clips["fps"], seed=args.seed + i, **guidance_of[i], **how)
                        for i, clip in enumerate(clips["data"])])                   # (B, T, 3, H, W)
    if Path(args.out).suffix.lower() != ".pt":
        return vae.write_videos(args.out, made, clips["fps"])
    remarks = {"level": how.get("level"), "guidance": args.guidance if heard else None, "oscillate": args.oscillate}
    done = f"{name_of(which)} {weights['hash']} {args.sampler} steps {args.steps}" + " independent noise" * how.get("independent", False)
    done += "".join(f" {key} {value:g}" for key, value in remarks.items() if value is not None)
    save_stage(args.out, "pixels", made, text=clips["text"], prompts=clips["prompts"], fps=clips["fps"],
               seed=args.seed, history=clips["history"] + [done])


def main(argv=None):
    parser = Parser("Enlarge the clips of a file of pixels.")
    parser.add_argument("which", choices=STAGES, help="low: 64 to 256, in space and time; high: 256 to 768, frame by frame; "
                        "ssr-N: Imagen Video's, to N pixels")
    parser.add_argument("input", help="pixels from `vae.py decode` or the stage before, or any video")
    parser.add_argument("-o", "--out", default="large.pt", help=".pt of pixels, or .mp4, .gif, .png to look at")
    parser.add_argument("--weights", type=Path, help="weights, written by train.py; those in weights/ if not given")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, 1000 at most; 4 if not given, or as many as the weights were distilled to")
    parser.add_argument("--guidance", type=base.finite, default=1., help="ssr: classifier-free guidance scale; 1 is none")
    parser.add_argument("--oscillate", type=base.finite, metavar="LOW", help="ssr-128: in the second half, guide every other step by this "
                        "scale; on larger pictures Imagen Video saw artifacts")
    parser.add_argument("--sampler", choices=("dpmpp", "ddim"), default="ddim", help="DPM-Solver++(2M) or DDIM")
    parser.add_argument("--level", type=base.finite, help="how much to mistrust the input's detail, 0 to 1; .3 if not given, for ssr .2")
    parser.add_argument("--independent-noise", action="store_true", help="low, high: a noise of its own for every frame; watch it flicker")
    parser.add_seed()
    parser.add_device()
    args = parser.parse_args(argv)
    base.check_out(args.out, (*vae.WRITTEN, ".pt"))
    base.check_sampling(args)
    if args.level is not None and not 0 <= args.level <= 1:
        raise UserError(f"--level is {args.level:g}, where 0 to 1 is wanted")
    if args.independent_noise and not STAGES[args.which].shared_noise:
        raise UserError(f"--independent-noise is for low and high; the frames of {args.which} have noises of their own as it is")
    path = args.weights or WEIGHTS / f"{name_of(args.which)}.pt"
    clips, loaded = read_pixels(args.input), load(args.which, path, args.device)
    process(clips, args.which, STAGES[args.which], loaded, path, args, level=args.level, independent=args.independent_noise)


if __name__ == "__main__":
    run(main)
