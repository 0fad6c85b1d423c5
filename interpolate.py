"""interpolate.py - the frames between, before and after: masked-frame interpolation, extrapolation, image animation.

Make-A-Video (2209.14792) section 3.3: the video model, fine-tuned to fill in the frames of a clip that a mask hides. Its
input gains the known frames and the mask as channels, and which frames are known decides what it does: keyframes are
interpolated, a clip is continued either way, a picture comes to life.

Imagen Video (2210.02303) sections 2.2-2.3 have another design for the same job, TSR: a network in pixels is shown the clip at twice
the rate, each frame repeated, and makes all frames in one block. No mask, no windows, and nothing else that it can do. The network
is that of superres.py, at a scale of one.

    in    base.pt     latents (B, T, 4, h, w), as base.py or `vae.py encode` made them
    out   frames.pt   latents (B, k*(T-1) + 1, 4, h, w) at k times the frame rate; the known ones unchanged to the bit

    python interpolate.py base.pt -o frames.pt --skip 5         16 frames at 4 fps become 76 at 20
    python interpolate.py base.pt -o longer.pt --extend 15      go on for 15 frames; --extend-before 15: how it came to this
    python interpolate.py text.pt -o z.pt --animate picture.png      bring a picture to life, as the prompt says
    python interpolate.py pixels.pt -o more.pt --double tsr-32  TSR, on pixels: 16 frames become 32

The network sees 16 frames at once, so a long timeline is filled window by window: each begins a stride after the one before
and is shown what that made. The papers do not say how; a stride of 10 leaves six frames in common (seven windows for 76
frames), and `--parallel` fills five windows at once that share only keyframes: faster, and free to disagree between them. Either
way, what comes after the last keyframe of a window is left to the next, which knows what follows.
"""
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import base
import superres
import text
import vae
from base import WEIGHTS, Diffusion, Parser, UNet, UserError, finite, load_stage, positive, run, save_stage

WINDOW = 16  # frames the network was trained on


# ------------------------------------------------------------------------------------------------
# The model: base's, with nine input channels.

CHANGES = {"in_channels": 4 + 4 + 1}  # noisy latents, known ones and their blends, mask


def inflate(weights: dict) -> dict:
    """base's weights made ready to learn to interpolate: the new input columns and the output are zero, and x is the target."""
    new = CHANGES["in_channels"] - weights["model"]["conv_in.weight"].shape[1]      # conv_in.weight: (C, 4, 3, 3)
    changed = {name: torch.zeros_like(tensor) for name, tensor in weights["model"].items() if name.startswith("conv_out.")}
    changed["conv_in.weight"] = F.pad(weights["model"]["conv_in.weight"], (0, 0, 0, 0, 0, new))
    config = weights["config"] | {"diffusion": weights["config"]["diffusion"] | {"target": "sample"}}
    return weights | {"config": config, "model": weights["model"] | changed}


def blends(x, known):
    """The known frames of x (B, T, C, h, w), and linear blends of the nearest two elsewhere; before the first and after the last known
    frame it is that one. known (B, T), one in each video at least."""
    T, known = x.shape[1], known.bool()
    at = torch.arange(T, device=x.device).expand_as(known)                          # (B, T)
    before = torch.where(known, at, -1).cummax(1).values                            # (B, T): the last known frame so far, -1 for none
    after = torch.where(known, at, T).flip(1).cummin(1).values.flip(1)              # (B, T): the next, T for none
    before, after = torch.where(before < 0, after, before), torch.where(after == T, before, after)
    share = (at - before) / (after - before).clamp(min=1)                           # (B, T)
    frames = lambda i: x.gather(1, i[:, :, None, None, None].expand_as(x))          # (B, T, C, h, w)
    return torch.lerp(frames(before), frames(after), share[:, :, None, None, None].to(x))          # (B, T, C, h, w)


def given(x, known):
    """What the network is shown beside the noisy frames: the known ones, blends of them elsewhere, and the mask, 1 = known.
    x (B, T, 4, h, w), known (B, T), one in each video at least -> (B, T, 4 + 1, h, w)

    Differs: Make-A-Video shows zeros where nothing is known. The ground, and all else that stands still, is in the blend already,
    and need not be carried from frame to frame by attention."""
    mask = known[:, :, None, None, None].to(x).expand_as(x[:, :, :1])               # (B, T, 1, h, w)
    return torch.cat([blends(x, known), mask], dim=2)


def predict_with(unet: UNet, beside, context, null_context, fps, guidance_scale=1.):
    """A predict(z, t) of the clean clip, from what is `given` (B, T, 4 + 1, h, w): the blends in it, plus the network's output.

    Differs: from noise, which is what is usually predicted. But a blend of latents is nearly right already: decoded, it is some
    6 dB above the blend of the decoded frames. A fresh network, whose output is zero, starts there."""
    predict = base.guided(unet, context, null_context, fps, guidance_scale, beside)
    return lambda z, t: beside[:, :, :-1] + predict(z, t)                           # (B, T, 4, h, w)


def loss(unet: UNet, diffusion: Diffusion, batch: dict) -> torch.Tensor:
    """Loss per video over its unknown frames, (B,). batch: as for base.loss, and known (B, T), 1 where a frame is given.

    |x - x'|^2 / rms(x - blend). Differs: from the squared error of the noise. What a blend leaves to predict is ten times as large where a
    clip is continued as where every other frame is known, and squared, the one would drown the other. So their gradients are alike.
    Known frames are among the noisy ones too, as alpha_t known + sigma_t eps, here and in `fill`."""
    x, known = batch["latents"], batch["known"].to(batch["latents"])
    unknown = ((1 - known) / (1 - known).mean(1, keepdim=True))[:, :, None, None, None]            # (B, T, 1, 1, 1), of mean one
    beside = given(x, known)
    left = (unknown * (x - beside[:, :, :-1]).pow(2)).mean((1, 2, 3, 4), keepdim=True)             # (B, 1, 1, 1, 1)
    predict = predict_with(unet, beside, batch["context"], None, batch["fps"])
    return diffusion.loss(predict, x, batch["noise"], batch["t"], weight=unknown / (left + 1e-4).sqrt())


def random_known(rng, frames: int = WINDOW) -> torch.Tensor:
    """A mask to train on, (T,) bool: every k-th frame, half the time after a run of frames that an earlier window made; or a beginning,
    an end, both ends, the first frame alone, or any one."""
    at, k, n = torch.arange(frames), rng.integers(2, 7), rng.integers(1, frames)
    kind = rng.choice(["every", "beginning", "end", "ends", "first", "one"], p=[.3, .3, .1, .05, .2, .05])
    if kind == "every":
        made = rng.integers(0, frames - 4) if rng.random() < .5 else 0
        return (at % k == rng.integers(k)) | (at < made)
    return {"beginning": at < n, "end": at >= n, "ends": (at == 0) | (at == frames - 1), "first": at == 0, "one": at == n}[kind]


# ------------------------------------------------------------------------------------------------
# Sampling: one window, then a timeline of them.

def windows(known, stride: int) -> list:
    """The first frame of each window over a timeline, whose frames are known (T,) or not: a stride after the one before, or sooner, on the
    last known frame of that, if more known ones follow its end. The last window ends at the last frame."""
    starts, last = [0], len(known) - WINDOW
    while starts[-1] < last:
        start = starts[-1]
        inside = [i for i in range(start + 1, start + WINDOW) if known[i]] if known[start + WINDOW:].any() else []
        starts.append(min(start + stride, last, *inside[-1:]))
    return starts


STEPS = 8  # of sampling a window: a blend is nearly right to begin with, and 16 are no better


def fill(unet: UNet, diffusion: Diffusion, x, known, noise, said: dict, fps, steps: int = STEPS, guidance: float = 1.,
         sampler: str = "dpmpp", label: str = ""):
    """Fill in the unknown frames of windows. x and noise (B, T, 4, h, w), known (B, T) bool, fps (B,); returns x, filled in. What
    guidance there is, is within base.INTERVAL."""
    at = known[:, :, None, None, None]                                              # (B, T, 1, 1, 1)
    scale = base.within(base.INTERVAL, guidance)
    clean = predict_with(unet, given(x, known), said["tokens"], said["null_tokens"], fps, scale)
    predict = lambda z, t: clean(torch.where(at, diffusion.add_noise(x, noise, t), z), t)
    return torch.where(at, x, diffusion.sample(predict, noise, steps, sampler, label=label))


def fill_timeline(unet: UNet, diffusion: Diffusion, x, known, said: dict, fps: float, parallel: bool = False, seed: int = 0,
                  label: str = "", **sampling):
    """Fill in timelines of any length. x (B, T, 4, h, w) holds the known frames in place, known (T,) bool says where.

    One window after another, away from what is known, each shown what the earlier ones made; or all at once, in parallel, shown the known
    frames alone, each starting on the last known one of the window before. Raises UserError where a window knows none."""
    device = next(unet.parameters()).device
    B, T = x.shape[:2]
    noise = base.initial_noise(x.shape, seed).to(device)  # of the timeline: windows that share a frame share its noise
    x, made = x.to(device).float().clone(), known.to(device).clone()
    tokens, null = said["tokens"].to(device).float(), said["null_tokens"].to(device).float()
    backwards = known[-1] and not known[0]  # only what came before is missing
    starts = windows(known.flip(0) if backwards else known, WINDOW - 1 if parallel else 10)
    starts = [max(0, T - WINDOW) - start for start in starts] if backwards else starts
    starts = [start for start in starts if not known[start:start + WINDOW].all()]
    if parallel and not all(known[start:start + WINDOW].any() for start in starts):
        raise UserError(f"a window of {WINDOW} frames would know none of them; go on without --parallel")
    following = dict(zip(starts, [*starts[1:], T]))  # where the next window begins
    for i, group in enumerate([starts] if parallel else [[start] for start in starts]):
        n = len(group)
        cut = lambda video: torch.cat([video[:, start:start + WINDOW] for start in group])         # (n*B, 16, ...)
        filled = fill(unet, diffusion, cut(x), cut(made.expand(B, T)), cut(noise),
                      {"tokens": tokens.repeat(n, 1, 1), "null_tokens": null}, torch.full((n * B,), float(fps), device=device),
                      label=label and f"{label} window {i + 1} of {1 if parallel else len(starts)}", **sampling)
        for start, frames in zip(group, filled.split(B)):                           # (B, 16, 4, h, w)
            end = start + WINDOW
            last_known = max(at for at in range(start, min(end, T)) if made[at])
            if made[end:].any() and last_known >= following[start]:  # the rest is for the next window, which knows what follows
                end = last_known + 1
            x[:, start:end] = torch.where(made[start:end, None, None, None], x[:, start:end], frames[:, :end - start])
            made[start:end] = True
    return x.cpu()                                                                  # (B, T, 4, h, w)


def timeline(latents, skip: int = 1, before: int = 0, after: int = 0):
    """Known frames spread out in time. (B, T, ...) -> (B, before + skip*(T-1) + 1 + after, ...) with zeros between, known (T',)"""
    B, T = latents.shape[:2]
    x = latents.new_zeros(B, before + skip * (T - 1) + 1 + after, *latents.shape[2:])
    known = torch.zeros(x.shape[1], dtype=torch.bool)
    places = before + skip * torch.arange(T)
    x[:, places], known[places] = latents, True
    return x, known


# ------------------------------------------------------------------------------------------------
# Imagen Video's way: TSR. Loss and sampling are those of superres.py.

# Differs: Imagen Video samples TSR in 128 steps, or 8 once distilled, with augmentation; here it is in one, undistilled, and without:
# between two given frames hardly anything is left to invent, and the mean that one step predicts is sharp.
DOUBLE = replace(superres.SSR, in_channels=3 + 6, channels=(16, 32, 48))
TSR = {"tsr-32": superres.Stage(1, replace(DOUBLE, patch_size=1), level=0., pixels=32 * 64 ** 2, steps=1),
       "tsr-128": superres.Stage(1, DOUBLE, level=0., pixels=128 * 256 ** 2, steps=1)}


def double(video):
    """A clip uint8 (..., T, 3, H, W) at twice the rate, twice: (..., 2*T, 6, H, W). At 2i, both halves of the channels are frame i; at
    2i + 1, the first three are frame i, the last three frame i + 1 (after the last frame, that again).

    Differs: Imagen Video repeats frame i alone."""
    after = torch.cat([video[..., 1:, :, :, :], video[..., -1:, :, :, :]], dim=-4)  # (..., T, 3, H, W)
    at, between = torch.cat([video, video], dim=-3), torch.cat([video, after], dim=-3)             # (..., T, 6, H, W)
    return torch.stack([at, between], dim=-4).flatten(-5, -4)


def load(path=WEIGHTS / "interpolate.pt", device="cpu"):
    """The U-Net, ready to fill in frames, its Diffusion, and the weights' dict."""
    return base.load(path, device, ("interpolate",))


def still_life(picture, text_path, side: int, weights: Path, device: str) -> dict:
    """A picture as the first frame of one clip per prompt of a text file: a stage dict of latents (B, 1, 4, h, w), its shorter
    side `side` latents long."""
    stage = load_stage(text_path, "text")
    autoencoder, made_by = vae.load(base.weights_in(weights, "vae"), device)
    pixels = vae.read_video(picture)[0][:1]                                         # (1, 3, H, W)
    factor, scale = autoencoder.config.factor, side / min(pixels.shape[-2:])
    size = [factor * max(1, round(scale * n)) for n in pixels.shape[-2:]]
    pixels = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True).round().byte()[None]
    latents = vae.encode_video(autoencoder, pixels).expand(len(stage["prompts"]), -1, -1, -1, -1)
    return stage | {"data": latents, "vae": made_by["hash"], "history": stage["history"] + [f"picture {Path(picture).name}"]}


def main(argv=None):
    parser = Parser("Fill in frames between, before or after those that are given.")
    parser.add_argument("input", help="latents from base.py or `vae.py encode`; --animate: the text file of its prompt; --double: pixels")
    parser.add_argument("-o", "--out", default="frames.pt", help=".pt to write, of latents; --double: of pixels")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--skip", type=positive(int), help="multiply the frame rate by this: 5 makes 76 frames of 16")
    what.add_argument("--extend", type=positive(int), metavar="N", help="add N frames after the last")
    what.add_argument("--extend-before", type=positive(int), metavar="N", help="add N frames before the first")
    what.add_argument("--animate", metavar="PICTURE", help="bring a picture to life: its first 16 frames at --fps, 4 if not given")
    what.add_argument("--double", choices=TSR, help="Imagen Video's: twice the frames of a file of pixels, tsr-32 for small ones")
    parser.add_argument("--fps", type=positive(float), help="--animate: frame rate; 4 to 30 were trained")
    parser.add_argument("--parallel", action="store_true", help="all windows at once, sharing keyframes alone")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of weights, as written by train.py")
    parser.add_argument("--steps", type=positive(int), help=f"sampling steps per window, 1000 at most; {STEPS}, or 1 for --double")
    parser.add_argument("--guidance", type=finite, help=f"classifier-free guidance scale; 1, which is none, or {base.GUIDANCE:g} for --animate")
    parser.add_argument("--oscillate", type=finite, metavar="LOW", help="tsr-32: in the second half, guide every other step by this scale")
    parser.add_argument("--sampler", choices=("dpmpp", "ddim"), help="DPM-Solver++(2M) or DDIM; dpmpp, or ddim for --double")
    parser.add_seed()
    parser.add_device()
    args = parser.parse_args(argv)
    base.check_out(args.out, (".pt",))
    if args.guidance is None:
        args.guidance = base.GUIDANCE if args.animate else 1.
    args.sampler = args.sampler or ("ddim" if args.double else "dpmpp")
    if not args.double:  # whose weights say how many they want
        args.steps = args.steps or STEPS
    if args.oscillate is not None and not args.double:
        raise UserError("--oscillate is for --double")
    if args.skip and args.skip >= WINDOW:
        raise UserError(f"--skip is {args.skip}, where a window of {WINDOW} frames must hold two keyframes; do it in two runs")
    if args.fps and not args.animate:
        raise UserError("--fps is for --animate: a clip has its own frame rate")
    base.check_sampling(args)
    if args.double:
        if args.parallel:
            raise UserError("--parallel is about windows, which --double has none of")
        path = args.weights / f"{args.double}.pt"
        clips, loaded = superres.read_pixels(args.input), superres.load(args.double, path, args.device)
        clips |= {"data": double(clips["data"]), "fps": 2 * clips["fps"]}
        return superres.process(clips, args.double, TSR[args.double], loaded, path, args)
    unet, diffusion, weights = load(args.weights / "interpolate.pt", args.device)
    made_by = weights["made_by"]
    if args.animate:
        stage = still_life(args.animate, args.input, made_by["side"], args.weights, args.device) | {"fps": args.fps or 4.}
    else:
        stage = load_stage(args.input, "latents")
    x, known = timeline(stage["data"].float(), args.skip or 1, args.extend_before or 0, args.extend or 15 * bool(args.animate))
    if known.all():
        raise UserError(f"there is nothing between {stage['data'].shape[1]} frames at --skip {args.skip}; --extend goes on after them")
    if stage["vae"] != made_by["vae"]:
        raise UserError(f"{args.animate or args.input}: latents of autoencoder {stage['vae']}, but the weights were trained on {made_by['vae']}")
    said = stage["text"]
    if said is None:  # a clip that came without a prompt
        if args.guidance != 1:
            raise UserError(f"{args.input} came without a prompt: there is nothing to guide")
        said = text.said(args.weights, [""] * len(x))
    base.check_encoder(args.input, said, args.weights, made_by)
    fps = stage["fps"] * (args.skip or 1)
    base.remark_rate(fps, x.shape[1])
    frames = fill_timeline(unet, diffusion, x, known, said, fps, args.parallel, args.seed, "interpolate",
                           steps=args.steps, guidance=args.guidance, sampler=args.sampler)
    done = f"interpolate {weights['hash']} {args.sampler} steps {args.steps} guidance {args.guidance:g} fps {fps:g}{' parallel' * args.parallel}"
    save_stage(args.out, "latents", frames, text=stage["text"], prompts=stage["prompts"], fps=fps, seed=args.seed,
               history=stage["history"] + [done], vae=stage["vae"], size=stage["size"])


if __name__ == "__main__":
    run(main)
