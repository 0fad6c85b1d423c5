"""sample.py - prompts in, videos out: both cascades, one line per stage.

    python sample.py "a red star moving left"
    python sample.py "a blue ring bouncing on sand" "a pink cross spinning" --samples 2 --out videos/
    python sample.py "a yellow star moving up" --animate image.png
    python sample.py "a red star moving left" --cascade imagen-video

--keep DIR keeps every stage's .pt file; the next stage's own script goes on from any of them.
"""
import re
import time
from pathlib import Path

import base
import text
import vae
from base import WEIGHTS, UserError
from interpolate import TSR, animate_clip, double_clip, fill_clip
from superres import STAGES, upscale_clip


# ------------------------------------------------------------------------------------------------
# Each cascade yields (name, clip) after every stage, so whoever iterates may stop at any. A clip is the
# dict of base.new_clip.

def make_a_video(prompts: list, weights=WEIGHTS, device="cpu", seed: int = 0, frames: int = 16,
                 guidance: float | None = None, image=None, prior: bool = False):
    """SR_h o SR_l^t o F o D^t o P (text)                                   Make-A-Video, Eq. 1

    Differs: all stages of the paper are in pixels. Without `prior`, D^t reads the prompt itself and
    was trained on captioned clips."""
    where, how = (weights, device, seed), {} if guidance is None else {"guidance": guidance}
    clip = text.encode_clip(prompts, *where, prior)
    yield "text", clip  # tokens (B, L, D), and from P an image embedding (B, E)
    if image:
        clip = animate_clip(clip, image, *where, **how)
    else:
        clip = base.generate_clip(clip, *where, frames, **how)
    yield "base", clip  # (B, 16, 4, 8, 8)
    if frames > 1:
        clip = fill_clip(clip, *where, skip=5)
    yield "interpolate", clip  # (B, 76, 4, 8, 8)
    clip = vae.decode_clip(clip, weights, device)
    yield "decode", clip  # (B, 76, 3, 64, 64)
    clip = upscale_clip(clip, STAGES["low"], *where)
    yield "low", clip  # (B, 76, 3, 256, 256)
    clip = upscale_clip(clip, STAGES["high"], *where)
    yield "high", clip  # (B, 76, 3, 768, 768)


def imagen_video(prompts: list, weights=WEIGHTS, device="cpu", seed: int = 0, frames: int = 16,
                 guidance: float | None = None, image=None, prior: bool = False):
    """TSR doubles the frames, SSR enlarges them.                            Imagen Video, Fig. 6

    Differs: the base is in latents, and SSR is x 2, x 2, x 3, not x 2, x 4, x 4."""
    where = weights, device, seed
    for name, clip in make_a_video(prompts, *where, frames, guidance, image, prior):
        yield name, clip
        if name == "base":  # (B, 16, 4, 8, 8)
            break
    clip = vae.decode_clip(clip, weights, device)
    yield "decode", clip  # (B, 16, 3, 64, 64)
    clip = double_clip(clip, TSR["tsr-32"], *where)
    yield "tsr-32", clip  # (B, 32, 3, 64, 64)
    clip = upscale_clip(clip, STAGES["ssr-128"], *where)
    yield "ssr-128", clip  # (B, 32, 3, 128, 128)
    clip = upscale_clip(clip, STAGES["ssr-256"], *where)
    yield "ssr-256", clip  # (B, 32, 3, 256, 256)
    clip = double_clip(clip, TSR["tsr-128"], *where)
    yield "tsr-64", clip  # (B, 64, 3, 256, 256)
    clip = double_clip(clip, TSR["tsr-128"], *where)  # the same network once more
    yield "tsr-128", clip  # (B, 128, 3, 256, 256)
    clip = upscale_clip(clip, STAGES["ssr-768"], *where)
    yield "ssr-768", clip  # (B, 128, 3, 768, 768)


CASCADES = {"make-a-video": make_a_video, "imagen-video": imagen_video}
STOPS = {"make-a-video": ("base", "interpolate", "low", "high"),
         "imagen-video": ("base", "tsr-32", "ssr-128", "ssr-256", "tsr-64", "tsr-128", "ssr-768")}


# ------------------------------------------------------------------------------------------------

def file_names(prompts: list, suffix: str) -> list:
    """A file name per video, after its prompt; numbered where a prompt comes several times."""
    slugs = [re.sub(r"\W+", "-", prompt.lower()).strip("-")[:80] or "empty" for prompt in prompts]
    return [slug + (f"-{slugs[:i].count(slug)}" if slugs.count(slug) > 1 else "") + suffix
            for i, slug in enumerate(slugs)]


def main(argv=None):
    parser = base.command_line(__doc__, argv)
    parser.add_argument("prompts", nargs="+", help="what to show, one prompt per video")
    parser.add_argument("-o", "--out", default="out", help="a folder, or .mp4, .gif, .png [out/]")
    parser.add_argument("--samples", type=base.positive, default=1, help="videos per prompt [1]")
    parser.add_argument("--frames", type=base.positive, default=16, help="1 makes a picture [16]")
    parser.add_argument("--guidance", type=float, help="of base; 1 is none [2; students: 1]")
    parser.add_argument("--cascade", choices=CASCADES, default="make-a-video", help="[%(default)s]")
    parser.add_argument("--until", metavar="STAGE", help="stop after base, low, ... [the last stage]")
    parser.add_argument("--prior", action="store_true", help="by way of an image embedding, with the "
                        "video network that never saw a caption [off]")
    parser.add_argument("--animate", metavar="IMAGE", help="animate this image [off]")
    parser.add_argument("--keep", metavar="DIR", help="keep every stage's .pt file here [off]")
    args = parser.parse_args(argv)
    out, keep, stops = Path(args.out), args.keep and Path(args.keep), STOPS[args.cascade]
    if args.until and args.until not in stops:
        raise UserError(f"--until {args.until}: {args.cascade} has {', '.join(stops)}")
    if args.frames == 1 and args.cascade == "imagen-video" and args.until != "base":
        raise UserError("imagen-video doubles the frame rate, and one frame has none; use --until base")
    if args.prior and args.animate:
        raise UserError("--animate reads the prompt itself, so --prior has no effect on it")
    base.check_output(out if out.suffix else out / "a.mp4", *vae.WRITTEN)
    prompts = [prompt for prompt in args.prompts for _ in range(args.samples)]
    stages = CASCADES[args.cascade](prompts, args.weights, args.device, args.seed, args.frames,
                                    args.guidance, args.animate, args.prior)
    start = time.time()
    for name, clip in stages:
        print(f"{name:12s} {time.time() - start:6.1f} s")
        if keep:
            base.check_output(keep / f"{name}.pt", ".pt")
            base.save_clip(keep / f"{name}.pt", clip, args.command)
        if name == args.until:
            break
        start = time.time()
    if clip["kind"] == "latents":
        clip = vae.decode_clip(clip, args.weights, args.device)
    videos, fps = clip["data"], clip["fps"]  # (B, T, 3, H, W)
    if out.suffix:
        paths = vae.write_videos(out, videos, fps)
    else:
        paths = [out / n for n in file_names(prompts, ".png" if videos.shape[1] == 1 else ".mp4")]
        for path, video in zip(paths, videos):
            vae.write_videos(path, video[None], fps)
    for path in paths:
        print(f"{path}: {videos.shape[1]} frames of {videos.shape[4]} x {videos.shape[3]} at {fps:g} fps")


if __name__ == "__main__":
    base.run(main)
