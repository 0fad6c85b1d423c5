"""interpolate.py - the frames between, before and after: interpolation, extrapolation, animation.

Make-A-Video (2209.14792), 3.3: the video model, fine-tuned to fill in the frames that a mask hides.
Imagen Video (2210.02303), 2.2-2.3, has TSR instead: a network in pixels sees each frame twice, or
blanks between, and makes all frames at once.

    in    base.pt     latents (B, T, 4, h, w), from base.py or `vae.py encode`
    out   frames.pt   latents (B, T', 4, h, w); known frames keep every bit

    python interpolate.py base.pt -o frames.pt --skip 5     16 frames at 4 fps become 76 at 20
    python interpolate.py base.pt -o longer.pt --extend 15  15 more frames; or --extend-before 15
    python interpolate.py text.pt -o z.pt --animate a.png   animate an image, as the prompt says
    python interpolate.py pixels.pt -o p.pt --double tsr-32 TSR, on pixels: 16 frames become 32
"""
from dataclasses import replace

import base
import superres
import text
import vae
from base import Diffusion, UNet, UserError

import torch
import torch.nn.functional as F
from tqdm import tqdm

WINDOW = 16  # frames that the network sees at once


# ------------------------------------------------------------------------------------------------
# The masked-frame model: base's U-Net with nine input channels

def widen(unet: UNet, diffusion: Diffusion) -> tuple[UNet, Diffusion]:
    """base's U-Net with input channels for `condition`. The weights of these and of the output are
    zero, and the target is x."""
    state, C = unet.state_dict(), unet.config.in_channels
    state["conv_in.weight"] = F.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, C + 1))  # (D, 9, 3, 3)
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = torch.zeros_like(state[name])
    wide = UNet(replace(unet.config, in_channels=2 * C + 1))
    wide.load_state_dict(state)
    return wide, Diffusion(diffusion.schedule, "sample")


def blend(x, known):
    """Known frames of x (B, T, C, h, w) as they are; elsewhere a linear blend of the known frames
    before and after, or a copy of the one there is. known (B, T) bool, never all False."""
    T = x.shape[1]
    index = torch.arange(T, device=x.device).expand_as(known)  # (B, T)
    before = torch.where(known, index, -1).cummax(1).values  # the last known frame, or -1
    after = torch.where(known, index, T).flip(1).cummin(1).values.flip(1)  # the next, or T
    left = torch.where(before < 0, after, before)
    right = torch.where(after == T, before, after)
    weight = (index - left) / (right - left).clamp(min=1)  # (B, T)

    def frames(i):
        return x.gather(1, i[:, :, None, None, None].expand_as(x))  # (B, T, C, h, w)
    return torch.lerp(frames(left), frames(right), weight[:, :, None, None, None].to(x))


def condition(x, known):
    """What the network is shown, (B, T, 4 + 1, h, w): a blend and the mask, 1 = known.
    Differs: Make-A-Video shows zeros where nothing is known; a blend is close to x."""
    mask = known[:, :, None, None, None].to(x).expand_as(x[:, :, :1])  # (B, T, 1, h, w)
    return torch.cat([blend(x, known), mask], dim=2)


def clean_predictor(unet: UNet, cond, context, null_context, fps, scale=1.):
    """A predict(z, t) of the clean clip: the blend in cond (B, T, 4 + 1, h, w) plus the output,
    which is zero at first. Differs: Make-A-Video names no target."""
    predict = base.classifier_free_guidance(unet, context, null_context, fps, scale, cond)

    def predict_x(z, t):
        return cond[:, :, :-1] + predict(z, t)  # (B, T, 4, h, w)
    return predict_x


def loss(unet: UNet, diffusion: Diffusion, batch: dict) -> torch.Tensor:
    """Squared error of unknown frames / rms(x - blend), (B,). batch: as for base.loss, and known
    (B, T) bool. Known frames are noised like the others.

    A blend leaves ten times as much to predict where a clip is continued as between two frames.
    Dividing by the RMS gives easy and hard masks comparable gradients."""
    x, known = batch["latents"], batch["known"]
    cond = condition(x, known)
    unknown = (~known).to(x)[:, :, None, None, None]  # (B, T, 1, 1, 1)
    unknown = unknown / unknown.mean(1, keepdim=True)  # of mean 1
    of_blend = (unknown * (x - cond[:, :, :-1]).pow(2)).mean((1, 2, 3, 4), keepdim=True)
    weight = unknown / (of_blend + 1e-4).sqrt()
    predict = clean_predictor(unet, cond, batch["context"], None, batch["fps"])
    return diffusion.loss(predict, x, batch["noise"], batch["t"], weight)


def random_known(rng) -> torch.Tensor:
    """A mask to train on, (16,) bool. In half of the "every" masks the first frames are known too,
    as they are once an earlier window has filled them."""
    at = torch.arange(WINDOW)
    k, n = rng.integers(2, 7), rng.integers(1, WINDOW)
    chances = {"every": .3, "beginning": .3, "end": .1, "ends": .05, "first": .2, "one": .05}
    kind = rng.choice(list(chances), p=list(chances.values()))
    if kind == "every":
        made = rng.integers(0, WINDOW - 4) if rng.random() < .5 else 0
        return (at % k == rng.integers(k)) | (at < made)
    ends = (at == 0) | (at == WINDOW - 1)
    masks = {"beginning": at < n, "end": at >= n, "ends": ends, "first": at == 0, "one": at == n}
    return masks[kind]


# ------------------------------------------------------------------------------------------------
# Sampling: one window, then a timeline of them

STEPS = 2  # per window; eight are no better, except for animation


def inpaint_window(unet: UNet, diffusion: Diffusion, x, known, noise, text_emb: dict, fps,
                   guidance: float = 1., steps: int = STEPS):
    """Fill in the unknown frames of windows x (B, T, 4, h, w). known (B, T) bool, text_emb: tokens
    (B, L, D) and null_tokens. At every step the known frames of z are alpha_t x + sigma_t eps."""
    scale = base.interval_guidance(diffusion, guidance)
    predict_x = clean_predictor(unet, condition(x, known), text_emb["tokens"],
                                text_emb["null_tokens"], fps, scale)
    known = known[:, :, None, None, None]  # (B, T, 1, 1, 1)

    def predict(z, t):
        return predict_x(torch.where(known, diffusion.add_noise(x, noise, t), z), t)
    return torch.where(known, x, diffusion.sample(predict, noise, steps))


def plan_windows(T: int) -> list:
    """The first frame of each window over T frames: 76 frames take seven. Windows advance by 10, so
    that two share 6 frames, and a keyframe if the skip is at most 6. The paper does not say how."""
    last = max(0, T - WINDOW)
    return [*range(0, last, 10), last]


def fill_timeline(unet: UNet, diffusion: Diffusion, x, known, text_emb: dict, fps: float,
                  seed: int = 0, **sampling):
    """Fill in timelines of any length; each window sees what earlier ones made. x (B, T, 4, h, w)
    holds the known frames, known (T,) bool. `sampling` goes to inpaint_window."""
    device, (B, T) = next(unet.parameters()).device, x.shape[:2]
    noise = base.initial_noise(x.shape, seed, "interpolate").to(device)  # shared by all windows
    x, known = x.to(device).float().clone(), known.to(device).clone()
    starts = plan_windows(T)
    if known[-1] and not known[0]:  # go backward, away from what is known
        starts = [starts[-1] - start for start in starts]
    windows = [slice(start, start + WINDOW) for start in starts]
    for window in tqdm(windows, "interpolate", leave=False):
        new = ~known[window]  # (16,)
        if known[window.stop:].any():  # the next window sees what follows the last known frame
            new[known[window].nonzero().max() + 1:] = False
        if not new.any():
            continue
        made = inpaint_window(unet, diffusion, x[:, window], known[window].expand(B, -1),
                              noise[:, window], text_emb, float(fps), **sampling)
        x[:, window][:, new] = made[:, new]
        known[window] |= new
    return x.cpu()  # (B, T, 4, h, w)


def timeline(latents, skip: int = 1, before: int = 0, after: int = 0):
    """Spread known frames out in time: (B, T, ...) -> x (B, T', ...), zero where nothing is known,
    and known (T',) bool."""
    B, T = latents.shape[:2]
    length = before + skip * (T - 1) + 1 + after
    places = before + skip * torch.arange(T)
    x = latents.new_zeros(B, length, *latents.shape[2:])
    x[:, places] = latents
    known = torch.zeros(length, dtype=torch.bool)
    known[places] = True
    return x, known


# ------------------------------------------------------------------------------------------------
# Imagen Video's TSR: a network of superres.py that enlarges by 1

# Between two given frames little is left to invent: TSR is in effect a regressor, which another
# seed hardly moves. So it takes one step. Differs: Imagen Video takes 128 steps, or 8 distilled,
# and augments the condition.
DOUBLE = replace(superres.SSR, in_channels=3 + 6, out_channels=6, channels=(16, 32, 48),
                 patch_size=2, embeddings=("fps", "text"))  # z, before, after -> share, what is new
TSR = {stage.name: stage for stage in (  # named after the frames they make
    superres.StageConfig("tsr-32", 1, replace(DOUBLE, patch_size=1), 0., 32 * 64 ** 2, False, 1),
    superres.StageConfig("tsr-128", 1, DOUBLE, 0., 128 * 256 ** 2, False, 1))}


def double(video):
    """(..., T, 3, H, W) -> (..., 2*T, 6, H, W): frames 0 0 1 1 2 2 and, as further channels,
    0 1 1 2 2 2: nothing comes after the last frame, so it stands still. Differs: Imagen Video has
    only the former, or blanks for the repeated frames."""
    first = video.repeat_interleave(2, dim=-4)
    second = torch.cat([first[..., 1:, :, :, :], first[..., -1:, :, :, :]], dim=-4)
    return torch.cat([first, second], dim=-3)


def double_clip(clip: dict, stage: superres.StageConfig, weights=base.WEIGHTS, device="cpu",
                seed: int = 0, **how) -> dict:
    """A clip of pixels at twice its rate: (B, T, 3, H, W) -> (B, 2*T, 3, H, W)."""
    doubled = clip | {"data": double(clip["data"]), "fps": 2 * clip["fps"]}
    return superres.upscale_clip(doubled, stage, weights, device, seed, **how)


# ------------------------------------------------------------------------------------------------
# Whole clips, and the command line

def fill_clip(clip: dict, weights=base.WEIGHTS, device="cpu", seed: int = 0, skip: int = 1,
              before: int = 0, after: int = 0, guidance: float = 1., steps: int = STEPS) -> dict:
    """A clip of latents with skip - 1 new frames in every gap, and `after` more at the end or, if
    skip is 1, `before` at the start."""
    unet, diffusion, made_by = base.load(weights, device, "interpolate")
    clip = text.with_text(clip, weights, device)
    base.check_ids(clip, made_by, unet.config.context_dim)
    x, known = timeline(clip["data"], skip, before, after)
    if known.all() or skip > 6:  # windows share 6 frames
        raise UserError("nothing to fill in: it takes 2 frames and a skip of 2 to 6")
    fps = clip["fps"] * skip
    z = fill_timeline(unet, diffusion, x, known, clip["text"], fps, seed, guidance=guidance,
                      steps=steps)
    return clip | {"data": z, "fps": fps, "seed": seed}


def animate_clip(clip: dict, image, weights=base.WEIGHTS, device="cpu", seed: int = 0,
                 frames: int = WINDOW, guidance: float = 2.) -> dict:
    """A clip of text and an image file -> latents at 4 fps that begin with the image, whose shorter
    side becomes that of the training clips. An image embedding is not read."""
    side = base.load_checkpoint(weights, "interpolate")["made_by"]["side"]
    autoencoder, vae_id = vae.load(weights, device)
    pixels = next(vae.read_frames(image))[0][None].float()  # (1, 3, H, W)
    scale = side / min(pixels.shape[-2:])
    size = [autoencoder.config.factor * max(1, round(scale * n)) for n in pixels.shape[-2:]]
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True).round().byte()
    z = vae.encode_video(autoencoder, pixels[None])  # (1, 1, 4, h, w)
    z = z.expand(len(clip["prompts"]), -1, -1, -1, -1)  # (B, 1, 4, h, w)
    still = clip | {"kind": "latents", "data": z, "fps": 4., "vae": vae_id}
    return fill_clip(still, weights, device, seed, after=frames - 1, guidance=guidance, steps=8)


def main(argv=None):
    parser = base.command_line(__doc__, argv)
    parser.add_argument("input", help="latents; --animate: a text.pt; --double: pixels")
    parser.add_argument("-o", "--out", default="frames.pt", help=".pt to write [frames.pt]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--skip", type=base.positive, help="multiply the rate by 2 to 6")
    what.add_argument("--extend", type=base.positive, metavar="N", help="add N frames at the end")
    what.add_argument("--extend-before", type=base.positive, metavar="N", help="... at the start")
    what.add_argument("--animate", metavar="IMAGE", help="16 frames at 4 fps from one image")
    what.add_argument("--double", choices=TSR, help="Imagen Video's TSR, on pixels")
    parser.add_argument("--guidance", type=float, help="scale; 1 is none [1; --animate: 2]")
    args = parser.parse_args(argv)
    base.check_output(args.out, ".pt")
    where = args.weights, args.device, args.seed
    how = {} if args.guidance is None else {"guidance": args.guidance}
    if args.double:
        clip = double_clip(superres.read_clip(args.input), TSR[args.double], *where, **how)
    elif args.animate:
        clip = animate_clip(base.load_clip(args.input, "text"), args.animate, *where, **how)
    else:
        clip = fill_clip(base.load_clip(args.input, "latents"), *where, args.skip or 1,
                         args.extend_before or 0, args.extend or 0, **how)
    base.save_clip(args.out, clip, args.command)


if __name__ == "__main__":
    base.run(main)
