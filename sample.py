"""sample.py - the whole cascade behind one command: prompts in, videos out.

    python sample.py "a red star moving left"
    python sample.py "a blue ring bouncing on sand" "a pink cross spinning" --samples 2 --out videos/ --keep stages/
    python sample.py "a yellow star moving up" --animate picture.png
    python sample.py "a red star moving left" --cascade imagen-video

Runs the stages' own programs one after the other, through the .pt files they exchange: Make-A-Video's cascade (Eq. 1, but for its
prior P, since base reads the prompt's own tokens), or Imagen Video's (section 2.2). `--keep` leaves those files for a look, with
the commands that made them in stages.txt; the same call then goes on from what is there.
"""
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch

import base
import interpolate
import superres
import text
import vae
from base import WEIGHTS, Parser, UserError, load_stage, positive, run

# What follows the keyframes of base.py. Each stage: its name, which is its file's too; the script that makes it, its weights, and
# what it is told; GIVEN is the file of the stage before.
CASCADES = {
    "make-a-video": [("interpolate", interpolate.main, "interpolate", "GIVEN --skip 5"),       # 76 x 8 x 8 latents
                     ("decode", vae.main, "vae", "decode GIVEN"),                              # 76 x 64 x 64
                     ("low", superres.main, "superres-low", "low GIVEN"),                      # 76 x 256 x 256
                     ("high", superres.main, "superres-high", "high GIVEN")],                  # 76 x 768 x 768
    "imagen-video": [("decode", vae.main, "vae", "decode GIVEN"),                              # 16 x 64 x 64
                     ("tsr-32", interpolate.main, "tsr-32", "GIVEN --double tsr-32"),          # 32 x 64 x 64
                     ("ssr-128", superres.main, "ssr-128", "ssr-128 GIVEN"),                   # 32 x 128 x 128
                     ("ssr-256", superres.main, "ssr-256", "ssr-256 GIVEN"),                   # 32 x 256 x 256
                     ("tsr-64", interpolate.main, "tsr-128", "GIVEN --double tsr-128"),        # 64 x 256 x 256
                     ("tsr-128", interpolate.main, "tsr-128", "GIVEN --double tsr-128"),       # 128 x 256 x 256
                     ("ssr-768", superres.main, "ssr-768", "ssr-768 GIVEN")]}                  # 128 x 768 x 768


def cascade(args, prompts: list, folder: Path) -> list:
    """The pipeline to run: (stage, its main, its arguments, the file it writes, the files it reads). Raises UserError
    if weights are missing, before an early stage has run in vain."""
    following = CASCADES[args.cascade]
    names = ["base", *(name for name, *_ in following)]
    if args.until and args.until not in names:
        raise UserError(f"--until {args.until} is no stage of {args.cascade}: {', '.join(name for name in names if name != 'decode')}")
    chosen = [stage for stage in following if not args.until or stage[0] in (*names[:names.index(args.until) + 1], "decode")]
    if args.frames == 1:  # nothing lies between the frames of a picture
        chosen = [stage for stage in chosen if stage[1] is not interpolate.main]
    weights = lambda name: base.weights_in(args.weights, name)
    missing = lambda name: not weights(name).exists()
    lacking = [i for i, (_, _, own, _) in enumerate(chosen) if own != "vae" and missing(own)]
    if lacking and not args.until:  # as far as the weights go, and the decoder
        base.note(f"{args.weights / chosen[lacking[0]][2]}.pt is not there: stopping before {chosen[lacking[0]][0]}")
        chosen = [stage for i, stage in enumerate(chosen) if i < lacking[0] or stage[0] == "decode"]
    for name in (["interpolate"] if args.animate else []) + [own for _, _, own, _ in chosen]:
        if missing(name):
            raise UserError(f"{args.weights / name}.pt: no such weights; train them with `python train.py {name}`, or stop before with --until")
    file = lambda name: str(folder / f"{name}.pt")
    weights_flag = lambda name, main: ["--weights", str(args.weights if main is interpolate.main else weights(name))]
    seed = ["--seed", str(args.seed)]
    steps = ["--steps", str(args.steps)] if args.steps else []
    how = ["--fps", str(args.fps), *steps, "--guidance", str(args.guidance), *seed]
    keyframes = ("base", base.main, [file("text"), *weights_flag("base", base.main), "--frames", str(args.frames), *how,
                                     *(["--shared-noise"] if args.shared_noise else [])], [file("text"), weights("base")])
    if args.animate:
        keyframes = ("base", interpolate.main, [file("text"), *weights_flag("", interpolate.main), "--animate", str(Path(args.animate)), *how],
                     [file("text"), weights("interpolate"), weights("vae"), args.animate])
    stages = [("text", text.main, [*weights_flag("text", text.main), "--", *prompts], [weights("text")]), keyframes]
    for name, main, own, told in chosen:
        given = file(stages[-1][0])
        told = [given if word == "GIVEN" else word for word in told.split()]
        stages += [(name, main, [*told, *weights_flag(own, main), *([] if main is vae.main else seed)], [given, weights(own)])]
    return [(name, main, ["-o", file(name), "--device", args.device, *argv], file(name), read) for name, main, argv, read in stages]


def run_cascade(stages: list, folder: Path):
    """Run the stages, but for those at the beginning that an earlier call left in `folder`: with the same arguments, and with all that
    they read unchanged since."""
    newest = lambda path: max(one.stat().st_mtime_ns for one in (path, *path.rglob("*")))  # weights may be a folder, of Stable Diffusion
    log, done = folder / "stages.txt", ""
    before = log.read_text(encoding="utf-8") if log.is_file() else ""
    for name, stage_main, argv, file, read in stages:
        dates = [str(newest(path)) for path in map(Path, read) if path.exists()]
        earlier, done = done, done + " ".join([f"{name}:", shlex.join(argv), *dates]) + "\n"
        if before.startswith(done) and Path(file).is_file():
            print(f"{name:11s}  kept in {file}")
            continue
        before = ""  # what follows an anew made file must be made anew too
        log.write_text(earlier, encoding="utf-8")
        forget_peak()
        start = time.time()
        stage_main(argv)
        log.write_text(done, encoding="utf-8")
        print(f"{name:11s} {time.time() - start:6.1f} s   peak {peak_memory()}")


def cards() -> range:
    """The GPUs that this process may ask about their memory: none before it has used one."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def forget_peak():
    """Start a new measurement of peak memory, where the system can (Linux; elsewhere the peak is since the start)."""
    base.allocator("malloc_trim", 0)  # what base.keep_freed_memory kept for the stage before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    for card in cards():
        torch.cuda.reset_peak_memory_stats(card)


def peak_memory() -> str:
    """Most memory held since `forget_peak`: of this process, and of the GPU if one was used."""
    try:
        kilobytes = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        try:
            import resource
        except ImportError:  # Windows
            return "unknown"
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    held = sum(torch.cuda.max_memory_allocated(card) for card in cards())
    return f"{kilobytes / 2 ** 20:.2f} GiB" + f", GPU {held / 2 ** 30:.2f} GiB" * (held > 0)


def file_names(prompts: list, suffix: str) -> list:
    """A file name per video, after its prompt; numbered where a prompt comes several times."""
    slugs = [re.sub(r"\W+", "-", prompt.lower()).strip("-").encode()[:80].decode(errors="ignore") or "unconditional" for prompt in prompts]
    names = [f"{slug}-{slugs[:i].count(slug)}" if slugs.count(slug) > 1 else slug for i, slug in enumerate(slugs)]
    if len(set(names)) < len(names):  # a prompt that itself ends in such a number
        names = [f"{slug}-{i}" for i, slug in enumerate(slugs)]
    return [name + suffix for name in names]


def main(argv=None):
    parser = Parser("Turn prompts into videos.")
    parser.add_argument("prompts", nargs="+", help="what to show, such as 'a red star moving left'")
    parser.add_argument("--samples", type=positive(int), default=1, help="videos per prompt")
    parser.add_argument("--frames", type=positive(int), default=16, help="keyframes per video; 1 gives a picture")
    parser.add_argument("--fps", type=positive(float), default=4., help="frame rate of the keyframes")
    parser.add_argument("--steps", type=positive(int), help="sampling steps of the first stage; 48 if not given, or 16 for a picture and with "
                        f"--shared-noise, {interpolate.STEPS} with --animate")
    parser.add_argument("--guidance", type=base.finite, default=base.GUIDANCE, help="classifier-free guidance scale; 1 is none")
    parser.add_argument("-o", "--out", default="out", help="a folder, or a file: .mp4, .gif, or .png for one contact sheet of all")
    parser.add_argument("--cascade", choices=CASCADES, default="make-a-video", help="whose design goes on from the keyframes of base")
    parser.add_argument("--until", metavar="STAGE", help="where the cascade stops; as far as there are weights if not given. base, then "
                        "interpolate, low, high, or with imagen-video tsr-32, ssr-128, ssr-256, tsr-64, tsr-128, ssr-768")
    parser.add_argument("--animate", metavar="PICTURE", help="bring this picture to life, instead of starting from noise")
    parser.add_argument("--keep", metavar="DIR", help="keep every stage's .pt file in this folder")
    parser.add_argument("--shared-noise", action="store_true", help="start every frame from the same noise: without training on video, one picture over and over")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of weights, ours or Stable Diffusion 1.x's")
    parser.add_seed()
    parser.add_device()
    args = parser.parse_args(argv)
    if args.animate and (args.frames != 16 or args.shared_noise):
        raise UserError("--animate makes 16 frames, each of its own noise")
    if args.cascade == "imagen-video" and args.until != "base" and args.fps != 4:
        base.note("what follows the keyframes of imagen-video was trained on 4 fps alone")
    prompts = [prompt for prompt in args.prompts for _ in range(args.samples)]
    out = Path(args.out)
    base.check_out(out, vae.WRITTEN) if out.suffix else base.check_folder(out)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        base.check_folder(folder)
        stages = cascade(args, prompts, folder)
        run_cascade(stages, folder)
        stage = load_stage(stages[-1][3], "pixels")
    videos, fps = stage["data"], stage["fps"]
    if out.suffix:
        paths = vae.write_videos(out, videos, fps)
    else:
        paths = [out / name for name in file_names(prompts, ".png" if videos.shape[1] == 1 else ".mp4")]
        for path, video in zip(paths, videos):
            vae.write_video(path, video, fps)
    for path in paths:
        print(f"{path}: {videos.shape[1]} frames of {videos.shape[4]} x {videos.shape[3]} at {fps:g} fps")


if __name__ == "__main__":
    run(main)
