"""sample.py - the whole cascade behind one command: prompts in, videos out.

    python sample.py "a red star moving left"
    python sample.py "a blue ring bouncing on sand" "a pink cross spinning" --samples 2 --out videos/ --keep stages/

Runs the stages' own programs one after the other, through the .pt files they exchange (Make-A-Video, Eq. 1, as far as it
is built: text, base, decode). `--keep` leaves those files for a look, or for going on by hand from any of them.
"""
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

import base
import text
import vae
from base import WEIGHTS, Parser, load_stage, positive, run


def cascade(args, prompts: list, folder: Path) -> list:
    """The pipeline as data: (stage, its main, its arguments). Each reads the file before it and writes its own."""
    common = ["--device", args.device]
    file = lambda name: str(folder / f"{name}.pt")
    weights = lambda name: ["--weights", str(args.weights / f"{name}.pt")]
    return [
        ("text", text.main, [*common, *weights("text"), "-o", file("text"), "--", *prompts]),
        ("base", base.main, [*common, *weights("base"), "-o", file("base"), file("text"), "--frames", str(args.frames),
                             "--fps", str(args.fps), "--steps", str(args.steps), "--guidance", str(args.guidance),
                             "--seed", str(args.seed)]),
        ("decode", vae.main, [*common, *weights("vae"), "-o", file("pixels"), "decode", file("base")]),
    ]


def forget_peak():
    """Start a new measurement of peak memory, where the system can (Linux; elsewhere the peak is since the start)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> str:
    """Most memory held since `forget_peak`: of this process, and of the GPU where there is one."""
    try:
        kilobytes = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    gpu = f", GPU {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB" if torch.cuda.is_available() else ""
    return f"{kilobytes / 2 ** 20:.2f} GiB{gpu}"


def file_names(prompts: list, suffix: str) -> list:
    """A file name per video, after its prompt."""
    slugs = [re.sub(r"\W+", "-", prompt.lower()).strip("-")[:80] or "unconditional" for prompt in prompts]
    return [f"{slug}{f'-{slugs[:i].count(slug)}' * (slugs.count(slug) > 1)}{suffix}" for i, slug in enumerate(slugs)]


def main(argv=None):
    parser = Parser("Turn prompts into videos.")
    parser.add_argument("prompts", nargs="+", help="what to show, such as 'a red star moving left'")
    parser.add_argument("--samples", type=positive(int), default=1, help="videos per prompt")
    parser.add_argument("--frames", type=positive(int), default=16, help="frames per video; 1 gives a picture")
    parser.add_argument("--fps", type=positive(float), default=4., help="frame rate, of the motion and of the file alike")
    parser.add_argument("--steps", type=positive(int), default=16, help="sampling steps")
    parser.add_argument("--guidance", type=base.finite, default=3., help="classifier-free guidance scale; 1 is none")
    parser.add_argument("-o", "--out", default="out", help="a folder, or a file: .mp4, .gif, or .png for one contact sheet of all")
    parser.add_argument("--keep", metavar="DIR", help="keep every stage's .pt file in this folder")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of weights")
    parser.add_seed()
    parser.add_device()
    args = parser.parse_args(argv)
    prompts = [prompt for prompt in args.prompts for _ in range(args.samples)]
    out = Path(args.out)
    base.check_out(out, vae.WRITTEN) if out.suffix else base.check_folder(out)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        base.check_folder(folder)
        for name, stage_main, stage_argv in cascade(args, prompts, folder):
            forget_peak()
            start = time.time()
            stage_main(stage_argv)
            print(f"{name:8s} {time.time() - start:6.1f} s   peak {peak_memory()}")
        stage = load_stage(folder / "pixels.pt", "pixels")
    videos, fps = stage["data"], stage["fps"]
    if out.suffix:
        paths = vae.write_videos(out, videos, fps)
    else:
        paths = [out / name for name in file_names(prompts, ".png" if args.frames == 1 else ".mp4")]
        for path, video in zip(paths, videos):
            vae.write_video(path, video, fps)
    for path in paths:
        print(f"{path}: {args.frames} frames of {videos.shape[4]} x {videos.shape[3]} at {fps:g} fps")


if __name__ == "__main__":
    run(main)
