"""sample.py - prompts in, videos out: both cascades, one line per stage.

    python sample.py "a red star moving left"
    python sample.py "a blue ring bouncing on sand" "a pink cross spinning" --samples 2 -o videos/
    python sample.py "a yellow star moving up" --animate image.png
    python sample.py "a yellow triangle growing" --prior
    python sample.py "a red star moving left" --cascade imagen-video
"""
import re
from pathlib import Path

import base
import text
import vae
from base import WEIGHTS, UserError
from interpolate import TSR, animate_clip, double_clip, fill_clip
from superres import STAGES, upscale_clip


# ------------------------------------------------------------------------------------------------
# Each cascade yields (name, clip) after every stage. A clip is the dict of base.new_clip.

def make_a_video(prompts: list, weights=WEIGHTS, device="cpu", seed: int = 0, frames: int = 16,
                 image=None, prior: bool = False, **how):
    """SR_h o SR_l^t o F o D^t o P (text)                                   Make-A-Video, Eq. 1

    Differs: all stages of the paper are in pixels. F learned from captioned clips. Without `prior`,
    so did D^t, which then reads the prompt itself. `how` goes to base.generate_clip, or with an
    image to animate_clip."""
    where = weights, device, seed
    yield "text", (clip := text.encode_clip(prompts, *where, prior))  # P, if `prior`
    yield "base", (clip := keyframes(clip, *where, frames, image, **how))  # D^t: (B, 16, 4, 8, 8)
    if frames > 1:
        clip = fill_clip(clip, *where, skip=5)
    yield "interpolate", clip  # F: (B, 76, 4, 8, 8)
    yield "decode", (clip := vae.decode_clip(clip, weights, device))  # (B, 76, 3, 64, 64)
    yield "low", (clip := upscale_clip(clip, STAGES["low"], *where))  # SR_l: (B, 76, 3, 256, 256)
    yield "high", (clip := upscale_clip(clip, STAGES["high"], *where))  # SR_h: (B, 76, 3, 768, 768)


def imagen_video(prompts: list, weights=WEIGHTS, device="cpu", seed: int = 0, frames: int = 16,
                 image=None, prior: bool = False, **how):
    """TSR doubles the frames, SSR enlarges them.                            Imagen Video, Fig. 6

    Differs: the base is in latents; SSR is x 2, x 2, x 3, not x 2, x 4, x 4; one TSR runs twice."""
    where = weights, device, seed
    yield "text", (clip := text.encode_clip(prompts, *where, prior))
    yield "base", (clip := keyframes(clip, *where, frames, image, **how))  # (B, 16, 4, 8, 8)
    yield "decode", (clip := vae.decode_clip(clip, weights, device))  # (B, 16, 3, 64, 64)
    yield "tsr-32", (clip := double_clip(clip, TSR["tsr-32"], *where))  # (B, 32, 3, 64, 64)
    yield "ssr-128", (clip := upscale_clip(clip, STAGES["ssr-128"], *where))  # (B, 32, 3, 128, 128)
    yield "ssr-256", (clip := upscale_clip(clip, STAGES["ssr-256"], *where))  # (B, 32, 3, 256, 256)
    yield "tsr-64", (clip := double_clip(clip, TSR["tsr-128"], *where))  # (B, 64, 3, 256, 256)
    yield "tsr-128", (clip := double_clip(clip, TSR["tsr-128"], *where))  # (B, 128, 3, 256, 256)
    yield "ssr-768", (clip := upscale_clip(clip, STAGES["ssr-768"], *where))  # (B, 128, 3, 768, 768)


def keyframes(clip, weights, device, seed, frames, image, **how) -> dict:
    """Latents of new clips, or of clips that begin with an image."""
    if image:
        return animate_clip(clip, image, weights, device, seed, frames, **how)
    return base.generate_clip(clip, weights, device, seed, frames, **how)


CASCADES = {"make-a-video": make_a_video, "imagen-video": imagen_video}
STOPS = {"make-a-video": ("base", "interpolate", "low", "high"),
         "imagen-video": ("base", "tsr-32", "ssr-128", "ssr-256", "tsr-64", "tsr-128", "ssr-768")}


# ------------------------------------------------------------------------------------------------

def file_names(prompts: list, suffix: str) -> list:
    """A file name per video, after its prompt; with the video's number if prompts come twice."""
    slugs = [re.sub(r"\W+", "-", prompt.lower()).strip("-")[:80] or "empty" for prompt in prompts]
    if len(set(slugs)) < len(slugs):
        slugs = [f"{slug}-{i}" for i, slug in enumerate(slugs)]
    return [slug + suffix for slug in slugs]


def main(argv=None):
    parser = base.command_line(__doc__, argv)
    parser.add_argument("prompts", nargs="+", help="what to show, one prompt per video")
    parser.add_argument("-o", "--out", default="out", help="a folder, or .mp4, .gif, .png [out/]")
    parser.add_argument("--samples", type=base.positive, default=1, help="videos per prompt [1]")
    parser.add_argument("--frames", type=base.positive, default=16, help="1 makes a picture [16]")
    parser.add_argument("--guidance", type=float, help="of base; 1 is none [2]")
    parser.add_argument("--cascade", choices=CASCADES, default="make-a-video", help="[%(default)s]")
    parser.add_argument("--until", metavar="STAGE", help="stop after base, low, ... [the last one]")
    first = parser.add_mutually_exclusive_group()
    first.add_argument("--prior", action="store_true", help="by way of an image embedding, with the "
                       "video network that never saw a caption")
    first.add_argument("--animate", metavar="IMAGE", help="begin with this image")
    parser.add_argument("--keep", metavar="DIR", help="keep every stage's .pt file here")
    args = parser.parse_args(argv)
    out, stops = Path(args.out), STOPS[args.cascade]
    if Path(args.weights).is_file():
        raise UserError(f"--weights {args.weights}: give the folder, with the files of all stages")
    if args.until and args.until not in stops:
        raise UserError(f"--until {args.until}: {args.cascade} has {', '.join(stops)}")
    if args.frames == 1 and args.cascade == "imagen-video" and args.until != "base":
        raise UserError("imagen-video doubles the rate, and one frame has none; use --until base")
    base.check_output(out if out.suffix else out / "a.mp4", *vae.WRITTEN)
    prompts = [prompt for prompt in args.prompts for _ in range(args.samples)]
    how = {} if args.guidance is None else {"guidance": args.guidance}
    stages = CASCADES[args.cascade](prompts, args.weights, args.device, args.seed, args.frames,
                                    args.animate, args.prior, **how)
    for name, clip in stages:
        print(name)
        if args.keep:
            base.check_output(f"{args.keep}/{name}.pt", ".pt")
            base.save_clip(f"{args.keep}/{name}.pt", clip, args.command)
        if name == args.until:
            break
    if clip["kind"] == "latents":
        clip = vae.decode_clip(clip, args.weights, args.device)
    videos, fps = clip["data"], clip["fps"]
    T, _, H, W = videos.shape[1:]
    if out.suffix:
        paths = vae.write_videos(out, videos, fps)
    else:
        paths = [out / n for n in file_names(prompts, ".png" if T == 1 else ".mp4")]
        for path, video in zip(paths, videos):
            vae.write_videos(path, video[None], fps)
    for path in paths:
        print(f"{path}: {T} frames of {W} x {H} at {fps:g} fps")


if __name__ == "__main__":
    base.run(main)
