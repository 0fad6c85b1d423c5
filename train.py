"""train.py - the toy world, and the one loop that trains every stage on it (or on a folder of your own clips).

    python train.py all                     everything in weights/, from nothing, one stage after the other
    python train.py base                    one stage; it goes on from runs/base/checkpoint.pt if that is there
    python train.py base --data clips/      the same on .mp4 .gif .webm files with captions.csv, or a .txt beside each
    torchrun --nproc_per_node 2 train.py base       each batch shared by two processes

Stages, each finished before the next begins: vae (pixels <-> latents), clip (the text encoder), image (a text-to-image
U-Net), prior (the mean clip of a prompt), base (that U-Net inflated to video: Make-A-Video's central idea, section 3.4),
interpolate (base fine-tuned to fill in masked frames), superres-low and superres-high; and for Imagen Video's cascade tsr-32, tsr-128
(frame rate), ssr-128, ssr-256 and ssr-768 (pixels).

Sample i of step n is a pure function of (seed, n, i), its noise and timestep included. So a run that was stopped goes on
to the very bits it would have reached, and no random state needs saving. Every stage leaves in runs/STAGE/: log.csv
(loss by quartile of t), preview.png, first_batch.gif with its captions beside it, and checkpoint.pt.
"""
import argparse
import copy
import csv
import hashlib
import io
import math
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm, trange

import base
import interpolate
import superres
import text
import vae
from base import WEIGHTS, Parser, UNet, UserError, atomic, fast_autocast, note, positive, read_pt, run, save_weights, weights_in, write_pt

RUNS = Path(__file__).resolve().parent / "runs"
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them


# ------------------------------------------------------------------------------------------------
# The toy world: one shaded shape, one motion, one quiet ground. Positions live in the unit square
# (x right, y down), lengths are fractions of its side, time is in seconds: so the same scene can be
# rendered at any size and any frame rate, which is what gives every stage of the cascade its truth.

COLOURS = {"red": (230, 40, 40), "orange": (250, 140, 30), "yellow": (245, 215, 50), "green": (50, 190, 70),
           "cyan": (50, 205, 215), "blue": (50, 90, 235), "purple": (155, 60, 200), "pink": (245, 130, 185)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
MOTIONS = ("moving left", "moving right", "moving up", "moving down",
           "growing", "shrinking", "bouncing", "circling", "spinning")
GROUNDS = ("", "on grass", "on sand", "on bricks", "at night")
SCENE_SECONDS = 3.75  # 16 frames at 4 fps, or 76 at 20: Make-A-Video's two frame counts

UNSEEN_PAIRS = {("star", "circling"), ("ring", "moving up"), ("cross", "growing"), ("triangle", "bouncing")}


def split_of(colour: int, shape: int, motion: int) -> str | None:
    """Which part of the world a (colour, shape, motion) triple belongs to, by index into the tables above:
    "train", "held-out" (triples no video stage sees), "unseen" (whole shape-motion pairs that none sees),
    or None where the motion could not be told: a circle that spins is a circle that stands still."""
    if MOTIONS[motion] == "spinning" and SHAPES[shape] in ("circle", "ring"):
        return None
    if (SHAPES[shape], MOTIONS[motion]) in UNSEEN_PAIRS:
        return "unseen"
    return "held-out" if (7 * colour + 3 * shape + 5 * motion) % 8 == 0 else "train"


TRIPLES = {split: [(c, s, m) for c in range(8) for s in range(6) for m in range(9) if split_of(c, s, m) == split]
           for split in ("train", "held-out", "unseen")}

# How many times as often as others a motion is drawn in training, since its frames must agree on a phase, or show turned shapes.
# Differs: in the papers data come as they are found.
OFTEN = {"bouncing": 4, "circling": 2, "spinning": 4}
# Stills drawn four times as often, since an autoencoder learns them last: rings at the border, turned shapes.
HARD = re.compile("ring moving|spinning")
ANY = sum(TRIPLES.values(), [])
DRAWN = TRIPLES | {"any": ANY,
                   "train": [triple for triple in TRIPLES["train"] for _ in range(OFTEN.get(MOTIONS[triple[2]], 1))],
                   "still": [(c, s, m) for c, s, m in ANY for _ in range(4 if HARD.search(f"{SHAPES[s]} {MOTIONS[m]}") else 1)]}


def caption(scene: dict, still: bool = False) -> str:
    """"a red star bouncing on grass"; a still has no motion: "a red star on grass"."""
    words = ["a", list(COLOURS)[scene["colour"]], SHAPES[scene["shape"]],
             "" if still else MOTIONS[scene["motion"]], GROUNDS[scene["ground"]]]
    return " ".join(word for word in words if word)


def draw_scene(rng: np.random.Generator, split: str = "train", ground: int | None = None) -> dict:
    """One scene: four factors and the free numbers of its motion. `split` as in `split_of`, or "any", or "still" for pictures."""
    colour, shape, motion = DRAWN[split][rng.integers(len(DRAWN[split]))]
    u = rng.uniform
    kind = MOTIONS[motion]
    radius = {"bouncing": u(.10, .13), "circling": u(.09, .12), "spinning": u(.14, .20)}.get(kind, u(.10, .14))
    x, y = u(.35, .65), u(.35, .65)
    if kind.startswith("moving"):
        along, across = (u(.68, .78) if kind.endswith(("left", "up")) else u(.22, .32)), u(.3, .7)
        x, y = (along, across) if kind.endswith(("left", "right")) else (across, along)
    elif kind == "bouncing":
        x = u(.3, .7)
    elif kind == "circling":
        x, y = u(.45, .55), u(.45, .55)
    return {"colour": colour, "shape": shape, "motion": motion,
            "ground": int(rng.integers(len(GROUNDS))) if ground is None else ground,
            "x": x, "y": y, "radius": radius, "phase": u(0, 1), "seed": int(rng.integers(2 ** 31))}


def trajectory(scene: dict, t: torch.Tensor):
    """Where the object is at t (seconds from the scene's start): x, y, radius and clockwise angle, each (T,)."""
    x, y, r, angle = (torch.full_like(t, v) for v in (scene["x"], scene["y"], scene["radius"], 0.))
    kind, phase = MOTIONS[scene["motion"]], scene["phase"]
    if kind.startswith("moving"):
        dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[kind.split()[1]]
        x, y = x + .14 * dx * t, y + .14 * dy * t
    elif kind in ("growing", "shrinking"):
        share = t / SCENE_SECONDS if kind == "growing" else 1 - t / SCENE_SECONDS
        r = .07 + (.24 - .07) * share
    elif kind == "bouncing":
        y = .74 - .42 * (math.pi * (t / 2.5 + phase)).sin().abs()
    elif kind == "circling":
        turn = 2 * math.pi * (t / 5 + phase)  # y points down, so a growing angle is clockwise
        x, y = x + .22 * turn.cos(), y + .22 * turn.sin()
    elif kind == "spinning":
        angle = math.radians(60) * t + 2 * math.pi * phase
    return x, y, r, angle


def signed_distance(shape: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Signed distance to the outline of a shape of radius about 1, negative inside; u right, v down. Exact along edges, not beyond corners."""
    if shape == "circle":
        return torch.hypot(u, v) - 1
    if shape == "ring":
        return (torch.hypot(u, v) - .74).abs() - .26
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - .86
    if shape == "cross":
        arm = lambda a, b: torch.maximum(a.abs() - 1.05, b.abs() - .36)
        return torch.minimum(arm(u, v), arm(v, u))
    if shape == "triangle":
        return torch.maximum(v, .5 * (math.sqrt(3) * u.abs() - v)) - .6
    # A star is one edge, from a tip at radius 1.2 to a notch at .52, mirrored and turned five times.
    wedge = 2 * math.pi / 5
    theta = torch.remainder(torch.atan2(u, -v) + wedge / 2, wedge) - wedge / 2  # 0 points up, at a tip
    a, b = torch.hypot(u, v) * theta.cos(), torch.hypot(u, v) * theta.abs().sin()
    notch = (.52 * math.cos(wedge / 2), .52 * math.sin(wedge / 2))
    edge = math.hypot(1.2 - notch[0], notch[1])
    return ((a - 1.2) * notch[1] + b * (1.2 - notch[0])) / edge


def noise_octave(seed: int, rows: int, columns: int, size: int) -> torch.Tensor:
    """Value noise of unit variance on a lattice, seen at `size` pixels. A lattice finer than the pixels is averaged,
    as a lens would: small pictures show less of the texture, never an alias of it. (size, size)"""
    if rows > 8 * size:
        return torch.zeros(size, size)
    lattice = torch.from_numpy(np.random.default_rng((seed, rows, columns)).standard_normal((1, 1, rows, columns), np.float32))
    fine = F.interpolate(lattice, (max(rows, size), max(columns, size)), mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(fine, size)[0, 0]


def render_ground(scene: dict, size: int) -> torch.Tensor:
    """The still ground behind the object, (3, size, size) in 0…1."""
    kind, seed = GROUNDS[scene["ground"]], scene["seed"]
    centre = (torch.arange(size) + .5) / size
    y, x = centre[:, None], centre[None, :]
    octaves = lambda *cells: sum(weight * noise_octave(seed, r, c, size) for weight, r, c in cells)
    if kind == "on grass":
        colour, light = (74, 96, 66), octaves((.014, 5, 5), (.02, 16, 64), (.056, 60, 260), (.06, 150, 600))
    elif kind == "on sand":
        colour, light = (158, 142, 112), octaves((.015, 4, 4), (.02, 24, 12), (.05, 190, 190), (.06, 420, 420))
    elif kind == "on bricks":
        colour, light = (118, 88, 80), octaves((.02, 10, 5), (.045, 260, 260))
        row, blur = (y * 10).floor(), max(.0045, .55 / size)  # mortar as wide as a pixel at least, and then fainter
        to_joint = lambda position, period: (torch.remainder(position / period + .5, 1) - .5).abs() * period
        joint = torch.minimum(to_joint(y, .1).expand(size, size), to_joint(x + .1 * (row % 2), .2))
        light = light + .13 * (.0045 / blur) * torch.exp(-(joint / blur) ** 2)
    elif kind == "at night":
        colour, light = (22, 24, 35), octaves((.006, 6, 6))
        stars = np.random.default_rng((seed, 7)).uniform(size=(16, 3))
        for sx, sy, bright in torch.from_numpy(stars).float():
            sigma, seen = .003, math.hypot(.003, .4 / size)  # a star smaller than a pixel keeps its light
            light = light + (.4 + .6 * bright) * (sigma / seen) ** 2 * torch.exp(-((x - sx) ** 2 + (y - sy) ** 2) / (2 * seen ** 2))
    else:
        return torch.zeros(3, size, size)
    return (torch.tensor(colour)[:, None, None] / 255 + light).clamp(0, 1)


def cut(video: torch.Tensor, window) -> torch.Tensor:
    """A window (left, top and side, in pixels) of a picture or of every frame of a clip. (..., S, S) -> (..., side, side)"""
    left, top, side = window
    return video[..., top:top + side, left:left + side]


def paint(scene: dict, path, size: int = 64, window=None) -> torch.Tensor:
    """A scene's object on its ground, at places (0...1), radii and clockwise angles `path`, each (T,): frames (T, 3, size, size) in 0...1,
    or a window of each, (T, 3, side, side), as `cut` would cut it."""
    window = window or (0, 0, size)
    left, top, side = window
    x, y, r, angle = (value[:, None, None] for value in path)                      # (T, 1, 1)
    centre = (torch.arange(size) + .5) / size
    u = (centre[None, None, left:left + side] - x) / r                             # (T, 1, S)
    v = (centre[None, top:top + side, None] - y) / r                               # (T, S, 1)
    distance = signed_distance(SHAPES[scene["shape"]], u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin())
    cover = (.5 - distance * r * size).clamp(0, 1)[:, None]                        # (T, 1, S, S): share of a pixel covered
    shade = (.94 - .085 * (u + v)).clamp(0, 1.1)[:, None]                          # light falls from the upper left
    colour = torch.tensor(list(COLOURS.values())[scene["colour"]]).view(1, 3, 1, 1) / 255
    return cover * (colour * shade).clamp(0, 1) + (1 - cover) * cut(render_ground(scene, size), window)            # (T, 3, S, S)


def render(scene: dict, times, size: int = 64, window=None) -> torch.Tensor:
    """Frames of a scene at the given times (seconds), or a window of each. Returns uint8 (T, 3, size, size), or (T, 3, side, side)."""
    frames = paint(scene, trajectory(scene, torch.as_tensor(times, dtype=torch.float32)), size, window)
    return (frames * 255).round().to(torch.uint8)                                  # (T, 3, S, S)


# ------------------------------------------------------------------------------------------------
# Data sets: what the stages draw from, made once and kept in runs/.

def digest(thing) -> str:
    """Eight letters for anything that its repr tells from others."""
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:8]


def batches(items: list, size: int) -> list:
    """Consecutive pieces of a list, of `size` items each."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def world_stills(count: int, seed: int, side: int) -> dict:
    """Pictures of any scene at any moment, and their captions. No split: a still does not show how a thing moves. A scene's beginning and
    end come most often: what slides is at the border then, which an autoencoder learns last."""
    pixels, captions = [], []
    for i in trange(count, desc="rendering stills"):
        rng = np.random.default_rng((seed, 1, i))
        scene = draw_scene(rng, "still")
        pixels.append(render(scene, [SCENE_SECONDS * rng.beta(.25, .25)], side))
        captions.append(caption(scene, still=True))
    return {"pixels": torch.stack(pixels), "captions": captions, "fps": torch.ones(count)}          # (N, 1, 3, side, side), N, (N,)


def rate_at(share: float) -> float:
    """Frame rates from 4 to 30, log-uniform where `share` is uniform in 0...1."""
    return 4 * (30 / 4) ** share


def draw_clip(rng: np.random.Generator, side: int = 64):
    """A training scene, sixteen frames of it (16, 3, side, side) and their rate. Half of the clips, at random, run at 4 fps,
    where they show a whole scene; the others at a rate up to 30, log-uniform, from a random start within the scene.

    Differs: Make-A-Video draws 1 to 30 fps by a beta function (section 3.2.2), high rates first (3.4); both at once is simpler."""
    scene = draw_scene(rng, "train")
    fps = rate_at(max(0., rng.uniform(-1, 1)))
    start = rng.uniform(0, SCENE_SECONDS - 15 / fps)
    return scene, render(scene, start + np.arange(16) / fps, side), fps


def world_clips(count: int, seed: int, side: int):
    """Training clips of the world, in groups small enough to encode at once: yields (pixels, captions, fps)."""
    for group in trange(0, count, 64, desc="rendering and encoding clips"):
        scenes, videos, rates = zip(*(draw_clip(np.random.default_rng((seed, 2, i)), side) for i in range(group, min(group + 64, count))))
        yield torch.stack(videos), [caption(scene) for scene in scenes], torch.tensor(rates)


def read_captions(path: Path) -> list:
    """The rows of a captions.csv, each with `file` and `caption`; none if there is no such file. Raises UserError."""
    if not path.is_file():
        return []
    try:
        table = csv.DictReader(io.StringIO(path.read_text("utf-8-sig")))  # spreadsheets put a mark before the first name
        rows = list(table)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not written in UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not {"file", "caption"} <= set(table.fieldnames or ()):
        raise UserError(f"{path} has no columns 'file' and 'caption' in its first line")
    return rows


def folder_clips(folder, frames: int, side: int):
    """Clips of `frames` frames, cut to the middle square, from every video below a folder: yields (pixels, captions, fps).

    The frame rate is the file's own, divided by a frame-skip of 1, 2 or 4 where the video is long enough; of single frames, four
    for each second. A file that cannot be read, or is too short or too small, is named and counted, never padded, enlarged or replaced."""
    folder, skipped, used, silent = Path(folder), [], 0, 0
    rows = read_captions(folder / "captions.csv")
    captions = {row["file"]: row["caption"] or "" for row in rows}
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (vae.VIDEOS if frames > 1 else vae.VIDEOS + vae.PICTURES))
    for path in tqdm(files, desc=f"reading {folder}"):
        try:
            video, fps = vae.read_video(path)
            if len(video) < frames:
                raise UserError(f"{path}: {len(video)} frames, where {frames} are wanted")
            if min(video.shape[-2:]) < side:
                raise UserError(f"{path}: {video.shape[3]} x {video.shape[2]} pixels, where {side} x {side} are wanted")
        except UserError as error:
            skipped.append(str(error))
            continue
        H, W = video.shape[-2:]
        S = min(H, W)
        square = cut(video[::max(1, round(fps / 4))] if frames == 1 else video, ((W - S) // 2, (H - S) // 2, S))
        square = torch.cat([F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True).round().byte()
                            for part in square.split(64)])                          # (T, 3, side, side)
        beside = path.with_suffix(".txt")
        words = captions.get(path.relative_to(folder).as_posix()) or (beside.read_text("utf-8-sig", "replace").strip() if beside.is_file() else "")
        used, silent = used + 1, silent + (not words)
        for skip in (1, 2, 4) if frames > 1 else (1,):
            if len(square[::skip]) >= frames:
                windows = square[::skip].unfold(0, frames, frames).movedim(-1, 1)                      # (N, T, 3, side, side)
                yield windows, [words] * len(windows), torch.full((len(windows),), fps / skip)
    for line in skipped:
        print(f"skipped {line}")
    print(f"{folder}: {used} files used, {silent} of them without a caption, {len(skipped)} skipped")
    unread = len(rows) - len(captions.keys() & {path.relative_to(folder).as_posix() for path in folder.rglob("*")})
    if unread:
        print(f"{unread} rows of captions.csv are of no such file, or of one that a later row names too")
    if not used:
        raise UserError(f"{folder} holds no usable clip of {frames} frames or more, {side} x {side} pixels or more")


@cache
def name_of_world() -> str:
    """Eight letters for how the world looks: who changes it does not want to train on the pictures of before."""
    clips = [draw_clip(np.random.default_rng(i), 16) for i in range(64)]
    large = [render_ground({"ground": i, "seed": 0}, 128) for i in range(len(GROUNDS))]  # whose finest texture 16 pixels do not show
    grounds = [(255 * ground).round().byte().numpy().tobytes() for ground in large]
    return digest((DRAWN, grounds, [(caption(scene), video.numpy().tobytes(), fps) for scene, video, fps in clips]))


def name_of_data(args) -> str:
    """Eight letters for the world, or for the files of a folder and their dates."""
    if args.data == "world":
        return name_of_world()
    files = sorted((p.relative_to(args.data).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in Path(args.data).rglob("*")
                   if p.suffix.lower() in (*vae.VIDEOS, *vae.PICTURES, ".txt", ".csv"))
    return digest(files)


def cached(args, kind: str, count: int, make, of: str = "pixels") -> dict:
    """What make() returns, kept in runs/cache/ under a name that says what it depends on."""
    return kept(f"{name_of_data(args)}-{kind}-{count}-{args.side}-{args.seed}-{of}", make)


def kept(name: str, make) -> dict:
    """What make() returns, made by process 0 where runs/cache/ does not hold it yet, and read from there by all."""
    path = RUNS / "cache" / f"{name}.pt"
    if RANK == 0 and not path.is_file():
        write_pt(path, make())
    while not path.is_file():  # another process is at it; the file appears whole
        time.sleep(1)
    return read_pt(path)


def pictures(args) -> dict:
    """pixels uint8 (N, 1, 3, side, side), captions, fps."""
    if args.data != "world":
        return gather(folder_clips(args.data, 1, args.side), "pixels", lambda pixels: pixels)
    return cached(args, "stills", args.stills, lambda: world_stills(args.stills, args.seed, args.side))


def gather(groups, key: str, of_pixels) -> dict:
    """Concatenate of_pixels(group) over groups of clips, as `key`, with their captions and frame rates."""
    parts, captions, rates = [], [], []
    for pixels, words, fps in groups:
        parts.append(of_pixels(pixels))
        captions += words
        rates.append(fps)
    return {key: torch.cat(parts), "captions": captions, "fps": torch.cat(rates)}


def latents(args, kind: str) -> tuple[dict, str]:
    """Stills or clips as fp16 latents (N, T, 4, h, w) with captions and fps; and the hash of the autoencoder they are of."""
    autoencoder, weights = vae.load(weights_in(args.weights, "vae"), args.device)

    def groups():
        if args.data != "world":
            return folder_clips(args.data, 1 if kind == "stills" else 16, args.side)
        if kind == "clips":
            return world_clips(args.clips, args.seed, args.side)
        stills = pictures(args)
        return zip(stills["pixels"].split(256), batches(stills["captions"], 256), stills["fps"].split(256))

    make = lambda: gather(groups(), "latents", lambda pixels: vae.encode_video(autoencoder, pixels).half())
    return cached(args, kind, args.stills if kind == "stills" else args.clips, make, weights["hash"]), weights["hash"]


def window_about(x: float, y: float, side: int, size: int) -> tuple:
    """Left, top and side of a window of `side` pixels about the point (x, y) of the unit square, within a picture of `size` pixels."""
    left, top = (min(max(0, round(at * size) - side // 2), size - side) for at in (x, y))
    return left, top, side


@dataclass
class Pairs:
    """What a network between pixels learns from: a window of a small clip, and the same `scale` times as large; for TSR, every other
    frame of it, and all."""
    frames: int
    side: int            # of the small clip
    inner: int           # of the window cut from it
    count: int
    rates: tuple = ()    # frames per second; none: any from 4 to 30


NETWORKS = superres.STAGES | interpolate.TSR  # those between pixels
PAIRS = {"low": Pairs(8, 64, 32, 2400), "high": Pairs(1, 256, 64, 9600),
         "tsr-32": Pairs(16, 64, 48, 3200, (8.,)), "ssr-128": Pairs(8, 64, 48, 3200, (8.,)), "ssr-256": Pairs(8, 128, 48, 3200, (8.,)),
         "tsr-128": Pairs(16, 256, 64, 1600, (16., 32.)), "ssr-768": Pairs(8, 256, 32, 2700, (32.,))}  # tsr-128 serves twice


def pairs(args, which: str) -> tuple[dict, dict]:
    """Windows of clips at two sizes: pixels uint8 (N, T, 3, S, S), small (N, T, 3, s, s), decoded (small
    after a round trip through our autoencoder where that makes 64 pixels, else small again), captions, fps. And that autoencoder's hashes.

    Seven windows in ten are about the object's outline: most of a picture is ground, and of its inside little is left to learn."""
    p, scale = PAIRS[which], NETWORKS[which].scale
    autoencoder, weights = vae.load(weights_in(args.weights, "vae"), args.device)

    def world():  # the small clip, what makes a window of the large one, the place of the window
        for i in trange(p.count, desc=f"rendering pairs for {which}"):
            rng = np.random.default_rng((args.seed, 6 + list(PAIRS).index(which), i))
            scene, fps = draw_scene(rng, "train"), float(rng.choice(p.rates)) if p.rates else rate_at(rng.random())
            times = rng.uniform(0, SCENE_SECONDS - (p.frames - 1) / fps) + np.arange(p.frames) / fps
            x, y, radius, _ = (float(path[p.frames // 2]) for path in trajectory(scene, torch.as_tensor(times, dtype=torch.float32)))
            turn = 2 * math.pi * rng.random()
            outline = x + radius * math.cos(turn), y + radius * math.sin(turn)
            place = outline if rng.random() < .7 else rng.random(2)
            small = render(scene, times, p.side)
            yield small, partial(render, scene, times, scale * p.side) if scale > 1 else partial(cut, small), place, caption(scene), fps

    def folder():
        rng = np.random.default_rng((args.seed, 5))
        for windows, words, rates in folder_clips(args.data, p.frames, scale * p.side):
            for large, line, fps in zip(windows, words, rates):
                small = F.interpolate(large.float(), (p.side, p.side), mode="area").round().byte()
                yield small, partial(cut, large), rng.random(2), line, float(fps)

    def make():
        blocks, captions = [], []
        for i, (small, large, place, line, fps) in enumerate(world() if args.data == "world" else folder()):
            again = vae.decode_video(autoencoder, vae.encode_video(autoencoder, small[None]))[0] if p.side == 64 else small
            window = window_about(*place, p.inner, p.side)
            item = {"small": cut(small, window), "decoded": cut(again, window), "pixels": large([scale * n for n in window]),
                    "fps": torch.tensor(fps)}
            if i % 256 == 0:  # small tensors kept one by one between large ones that come and go would fragment all memory
                blocks.append({key: torch.empty(256, *part.shape, dtype=part.dtype) for key, part in item.items()})
            for key, part in item.items():
                blocks[-1][key][i % 256] = part
            captions.append(line)
        return {key: torch.cat([block[key] for block in blocks])[:len(captions)] for key in blocks[0]} | {"captions": captions}

    decoder = weights["own"] if p.side == 64 else "none"
    return cached(args, f"pairs-{which}-{digest(p)}", p.count, make, decoder), {"vae": weights["hash"], "decoder": decoder}


# ------------------------------------------------------------------------------------------------
# Randomness: a generator for each sample of each step, and nothing else. Its seed is (seed, what for, ...): 1 for stills, 2 for clips,
# 3 for samples, 5 for masks or for windows of a folder's clips, 6 and on for the world's pairs.

def draw(args, step: int, samples, count: int) -> tuple[list, list]:
    """The generator of each sample of a step, and the first thing drawn from it: which of `count` items the sample is."""
    rngs = [np.random.default_rng((args.seed, 3, step, i)) for i in samples]
    return rngs, [int(rng.integers(count)) for rng in rngs]


def normal(rngs, shape) -> torch.Tensor:
    """Standard normal noise (N, *shape), a part from each sample's own generator."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))


def middle_timesteps(rngs) -> torch.Tensor:
    """t (N,), most often from the middle: t = arccos(1 - 2 u) / pi, whose density is as sin(pi t). So is Diffusion.balance, which comes
    on top, so that a level counts by the square of that. Differs: in the papers t is uniform."""
    return torch.tensor([int(1000 * math.acos(1 - 2 * rng.random()) / math.pi) for rng in rngs])


def shifted_timesteps(rngs, shift: float = math.sqrt(16)) -> torch.Tensor:
    """t (N,), uniform and then moved by base.shifted, for clips of 16 frames by default. Differs: in the papers t is uniform."""
    return torch.tensor([int(1000 * base.shifted(rng.random(), shift)) for rng in rngs])


# ------------------------------------------------------------------------------------------------
# Stages: how long each is trained, and what the loop needs to know of it.

@dataclass
class Recipe:
    steps: int
    batch: int
    lr: float
    fresh_lr: float = 0.     # of the layers that an image model does not have
    warmup: int = 100
    ema: float = .999


RECIPES = {  # steps: about the sum of the shipped weights' runs but for the last ones, on a GPU; the README has the exact commands
    "vae": Recipe(steps=32000, batch=32, lr=1.5e-3),
    "clip": Recipe(steps=700, batch=128, lr=1e-3),
    "image": Recipe(steps=4500, batch=128, lr=1e-3),
    "prior": Recipe(steps=2000, batch=64, lr=5e-3, warmup=50),
    "base": Recipe(steps=32000, batch=16, lr=4e-4, fresh_lr=1.5e-3),
    "interpolate": Recipe(steps=10700, batch=16, lr=8e-4),
    "superres-low": Recipe(steps=7900, batch=4, lr=2e-3),
    "superres-high": Recipe(steps=9900, batch=8, lr=2e-3),
    "tsr-32": Recipe(steps=3200, batch=16, lr=2e-3),
    "ssr-128": Recipe(steps=1750, batch=32, lr=2e-3),
    "ssr-256": Recipe(steps=1750, batch=32, lr=2e-3),
    "tsr-128": Recipe(steps=2600, batch=16, lr=2e-3),
    "ssr-768": Recipe(steps=4600, batch=32, lr=2e-3),
}


@dataclass
class Setup:
    model: torch.nn.Module
    batch_of: Callable       # (step, samples) -> tensors, and "captions" for people to read
    loss_of: Callable        # (model, batch) -> loss of each sample (N,)
    preview: Callable        # (model) -> picture, uint8 (3, H, W)
    config_of: Callable      # (model) -> config, as the weights keep it
    facts: dict              # what its weights keep of how they were made: hashes of the weights they stand on, and more


def prepare_vae(args) -> Setup:
    data, side = pictures(args), args.side
    model, facts = vae.AutoencoderKL(vae.VAEConfig()), {}
    if args.freeze == "encoder":  # latents stay what they are, their scale, and the name by which all other weights know them
        model, weights = vae.load(args.init)
        facts["latents"] = weights["hash"]
    latent_shape = (model.config.latent_channels, side // model.config.factor, side // model.config.factor)

    def batch_of(step, samples):
        rngs, picks = draw(args, step, samples, len(data["pixels"]))
        return {"pixels": vae.to_float(data["pixels"][picks, 0]), "noise": normal(rngs, latent_shape),
                "captions": [data["captions"][i] for i in picks]}

    def preview(model):
        originals = data["pixels"][:16, 0]
        mean = model.encode(vae.to_float(originals).to(args.device))[0]
        return vae.contact_sheet(torch.stack([originals, vae.to_uint8(model.decode(mean)).cpu()]))

    def config_of(model):  # latent diffusion, appendix G: unit variance, measured, and kept with the weights
        if args.freeze != "encoder":
            chunks = data["pixels"][:2048, 0].split(128)
            raw = torch.cat([model.encode(vae.to_float(chunk).to(args.device))[0] for chunk in chunks])
            model.config.scaling_factor = (1 / raw.std()).item()
        return asdict(model.config)

    return Setup(model, batch_of, vae.loss, preview, config_of, facts)


def training_captions() -> list:
    """Every caption a training clip can have; none of a held-out triple or an unseen pair."""
    return sorted({caption({"colour": c, "shape": s, "motion": m, "ground": g})
                   for c, s, m in TRIPLES["train"] for g in range(len(GROUNDS))})


def prepare_clip(args) -> Setup:
    data = pictures(args)
    captions = training_captions() if args.data == "world" else sorted(set(data["captions"]))
    every = captions + data["captions"]
    vocab, merges = text.learn_tokenizer(every)
    tokenizer = text.build_tokenizer(vocab, merges)
    model = text.CLIP(text.CLIPConfig(vocab_size=len(vocab), image_size=args.side))
    words = sorted({word for line in every for word in re.findall(r"\w+", line.lower())})
    motion_ids, ids = text.tokenize(tokenizer, every, model.config.context).split([len(captions), len(data["captions"])])      # (N, L) each

    def batch_of(step, samples):
        rngs, picks = draw(args, step, samples, len(ids))
        others = [rng.integers(len(motion_ids)) for rng in rngs]
        return {"pixels": vae.to_float(data["pixels"][picks, 0]), "ids": ids[picks], "motion_ids": motion_ids[others],
                "captions": [data["captions"][i] for i in picks]}

    def preview(model):  # pictures over the cosines of each with each caption: bright where they agree
        shown = data["pixels"][:16, 0]
        cosines = model.similarity(vae.to_float(shown).to(args.device), ids[:16].to(args.device)) / model.logit_scale.exp()
        tiles = (cosines.T.clamp(0, 1) * 255).byte().cpu().repeat_interleave(args.side, 1).repeat_interleave(16, 0).expand(3, -1, -1)
        return torch.cat([vae.contact_sheet(shown[None]), tiles], dim=1)

    def config_of(model):
        return {"clip": asdict(model.config), "tokenizer": {"vocab": vocab, "merges": merges}, "words": words}

    return Setup(model, batch_of, text.loss, preview, config_of, {})


def caption_tokens(args, captions: list):
    """Tokens (K, L, D) of every distinct caption, the row of each caption in them (N,), the null prompt's tokens (L, D),
    and the hash of the text encoder."""
    clip, tokenizer, weights = text.load(weights_in(args.weights, "text"), args.device)
    distinct = sorted(set(captions))
    row_of = {words: i for i, words in enumerate(distinct)}

    def make():
        groups = tqdm(batches(distinct, 256), desc="encoding captions", disable=len(distinct) < 4096)
        encoded = [text.encode(clip, tokenizer, group) for group in groups]
        return {"tokens": torch.cat([part["tokens"] for part in encoded]), "null": encoded[0]["null_tokens"][0].clone()}  # (K, L, D), (L, D)

    made = kept(f"tokens-{digest(distinct)}-{weights['hash']}", make)
    return made["tokens"], torch.tensor([row_of[words] for words in captions]), made["null"], weights["hash"]


def spoken(rngs, tokens, null, captions: list):
    """Tokens (N, L, D) and captions, one in ten replaced by the null prompt's, which guidance subtracts."""
    dropped = torch.tensor([rng.random() < .1 for rng in rngs])
    return torch.where(dropped[:, None, None], null, tokens), ["" if drop else words for drop, words in zip(dropped, captions)]


def diffusion_batch(args, data: dict, step: int, samples, timesteps=middle_timesteps) -> dict:
    """Latents with their prompts' tokens, frame rates, noise and timesteps."""
    rngs, picks = draw(args, step, samples, len(data["latents"]))
    context, captions = spoken(rngs, data["tokens"][data["rows"][picks]], data["null"], [data["captions"][i] for i in picks])
    x = data["latents"][picks].float()                                              # (N, T, 4, h, w)
    return {"latents": x, "context": context, "fps": data["fps"][picks],
            "noise": normal(rngs, x.shape[1:]), "t": timesteps(rngs), "captions": captions}


def with_tokens(args, kind: str) -> tuple[dict, dict]:
    """Latents of `kind` beside the tokens of their captions, and the hashes of what made both."""
    data, vae_hash = latents(args, kind)
    tokens, rows, null, text_hash = caption_tokens(args, data["captions"])
    facts = {"vae": vae_hash, "text": text_hash, "side": data["latents"].shape[-1]}
    return data | {"tokens": tokens, "rows": rows, "null": null}, facts


def sheet(args, latents, columns: int = 16) -> torch.Tensor:
    """Latents (B, T, 4, h, w) as a picture, a row for each video."""
    autoencoder, _ = vae.load(weights_in(args.weights, "vae"), args.device)
    return vae.contact_sheet(vae.decode_video(autoencoder, latents), columns)


def preview_of(args, prompts: list, frames: int, diffusion: base.Diffusion, side: int, fps: float = 1.):
    """A function that samples the prompts and lays the frames out: a video per row, or pictures."""
    def preview(model):
        z = base.generate(model, diffusion, text.said(args.weights, prompts), frames, fps, side)
        return sheet(args, z) if frames > 1 else sheet(args, z.transpose(0, 1), columns=8)
    return preview


def diffusion_config(diffusion: base.Diffusion):
    return lambda model: {"unet": asdict(model.config), "diffusion": diffusion.config}


def prepare_image(args) -> Setup:
    data, facts = with_tokens(args, "stills")
    width = data["tokens"].shape[-1]
    model, diffusion = UNet(replace(base.TINY, temporal="none", gates=False, context_dim=width)), base.Diffusion()
    prompts = data["captions"][:32]
    if args.data == "world":
        factors = zip(list(COLOURS) * 4, SHAPES * 6, GROUNDS * 7)
        prompts = [f"a {colour} {shape} {ground}".strip() for colour, shape, ground in factors]
    return Setup(model, lambda step, samples: diffusion_batch(args, data, step, samples),
                 lambda model, batch: base.loss(model, diffusion, batch), preview_of(args, prompts, 1, diffusion, facts["side"]),
                 diffusion_config(diffusion), facts)


def parent(path, stage: str, facts: dict) -> dict:
    """The weights to start from, of `stage`, if they stand on the same autoencoder and text encoder."""
    weights = base.load_weights(path, stage)
    if any(weights["made_by"].get(key) != facts[key] for key in ("vae", "text", "prior") if key in facts):
        raise UserError(f"{path} is of another autoencoder, text encoder or prior; train it anew with `python train.py {stage} --fresh`")
    return weights


VIDEO_PROMPTS = ["a red star moving left", "a cyan circle bouncing on sand", "a yellow square spinning on grass",
                 "a green triangle growing at night", "a pink ring circling", "a blue cross moving up on bricks"]


def prepare_prior(args) -> Setup:
    """The mean clip of every prompt and frame rate, which the video model is handed."""
    data, facts = with_tokens(args, "clips")
    model = base.TemporalPrior(data["tokens"].shape[-1], data["latents"].shape[2])
    prompts = VIDEO_PROMPTS if args.data == "world" else data["captions"][:6]

    def preview(model):
        context = text.said(args.weights, prompts)["tokens"].to(args.device)
        slowest = data["fps"].min().to(args.device).expand(len(prompts))            # which shows most motion: 4 fps, of the world
        return sheet(args, model(context, slowest, *data["latents"][0, :, 0].shape).cpu())

    return Setup(model, lambda step, samples: diffusion_batch(args, data, step, samples), base.prior_loss, preview,
                 lambda model: {"context_dim": data["tokens"].shape[-1]}, facts)


def inflation(args) -> dict:
    """What becomes of an image model's config: with a prior if one has been trained."""
    has_prior = (args.weights / "prior.pt").is_file()
    return {"temporal": "prior+attention+conv" if has_prior else "attention+conv", "gates": True}


def freeze(model, args):
    """Leave to training what `--freeze` does not name."""
    trained = {"none": lambda name: True, "spatial": UNet.is_inflation,
               "encoder": lambda name: name.startswith(("decoder.", "post_quant_conv."))}[args.freeze]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))


def prepare_base(args) -> Setup:
    """Make-A-Video, section 3.4: the image model, inflated, goes on to learn from video.

    Every fourth step is of pictures, four for each clip. Differs: Imagen Video packs its pictures into clips."""
    data, facts = with_tokens(args, "clips")
    joint = args.joint and args.freeze == "none"  # a picture teaches what was added for video next to nothing
    stills = with_tokens(args, "stills")[0] if joint else None
    image = parent(weights_in(args.weights, "image"), "image", facts)
    model, diffusion = base.build(image, args.weights, **inflation(args))
    if hasattr(model, "temporal_prior"):
        prior = parent(args.weights / "prior.pt", "prior", facts)
        base.fill(model.temporal_prior, prior, args.weights / "prior.pt")
        facts["prior"] = prior["hash"]
    else:
        note("base: no prior.pt, so attention alone must find what a prompt means for a frame; `python train.py prior` makes one")

    def batch_of(step, samples):
        if joint and step % 4 == 3:
            return diffusion_batch(args, stills, step, [4 * i + k for i in samples for k in range(4)])
        return diffusion_batch(args, data, step, samples, shifted_timesteps)

    prompts = VIDEO_PROMPTS if args.data == "world" else data["captions"][:6]
    return Setup(model, batch_of, lambda model, batch: base.loss(model, diffusion, batch),
                 preview_of(args, prompts, 16, diffusion, facts["side"], data["fps"].min().item()),
                 diffusion_config(diffusion), facts | {"image": image["hash"]})


def prepare_interpolate(args) -> Setup:
    """Make-A-Video, section 3.3: the video model goes on to learn from clips some of whose frames it is shown."""
    data, facts = with_tokens(args, "clips")
    weights = parent(args.weights / "base.pt", "base", facts)
    model, diffusion = base.build(interpolate.inflate(weights), args.weights / "base.pt", **interpolate.CHANGES)

    def batch_of(step, samples):
        masks = [interpolate.random_known(np.random.default_rng((args.seed, 5, step, i))) for i in samples]
        return diffusion_batch(args, data, step, samples, shifted_timesteps) | {"known": torch.stack(masks)}

    def preview(model):  # sixteen frames of which every fifth is given, below the truth
        fps = data["fps"][0].item()
        rows = (data["fps"] == fps).nonzero()[:4, 0]
        x, known = data["latents"][rows].float(), torch.arange(16) % 5 == 0
        said = {"tokens": data["tokens"][data["rows"][rows]], "null_tokens": data["null"][None]}
        made = interpolate.fill_timeline(model, diffusion, x, known, said, fps)
        return sheet(args, torch.stack([x, made], dim=1).flatten(0, 1))             # of (8, T, 4, h, w)

    return Setup(model, batch_of, lambda model, batch: interpolate.loss(model, diffusion, batch), preview,
                 diffusion_config(diffusion), facts | {"base": weights["hash"]})


def prepare_pixels(args, which: str) -> Setup:
    """A network between pixels. Every fourth step is of single frames, except for TSR, which needs two.

    Differs: Make-A-Video's SR_l is an image model first, and Imagen Video's networks learn from whole blocks of whole frames, the last
    alone from crops. Here all learn from windows of short clips, and those that enlarge from single frames too."""
    stage = replace(NETWORKS[which], blank=args.blank)
    doubles, taught = which in interpolate.TSR, {}
    if args.distill:
        teacher, _, weights = superres.load(which, args.init, args.device)
        steps = superres.fitted(stage, weights).steps
        if "distill" in weights["made_by"] and steps != args.distill[0]:
            raise UserError(f"{args.init} was distilled to {steps} step{'s' * (steps > 1)}, and cannot teach what {args.distill[0]} do")
        walks, taught = superres.teacher_walks(stage, *args.distill), {"distill": args.distill}     # (steps, K + 1)
        stage = replace(stage, steps=args.distill[1])  # to preview
    data, facts = pairs(args, which)
    config, diffusion = stage.config, superres.diffusion_of()
    if config.pooled:
        tokens, rows, null, facts["text"] = caption_tokens(args, data["captions"])
        config = replace(config, context_dim=tokens.shape[-1])
    if doubles:
        facts["blank"] = args.blank
    model = UNet(config)

    def loss_of(model, batch):
        if args.distill:
            return superres.distillation_loss(model, teacher, diffusion, batch, stage)
        return superres.loss(model, diffusion, batch, stage)

    def batch_of(step, samples):
        rngs, picks = draw(args, step, samples, len(data["pixels"]))
        small = torch.stack([data["decoded" if rng.random() < .5 else "small"][i] for i, rng in zip(picks, rngs)])
        x = vae.to_float(data["pixels"][picks])                                     # (N, T, 3, S, S)
        if doubles:
            small = interpolate.double(small[:, ::2])                               # (N, T, 6, s, s)
        elif step % 4 == 3:
            x, small = x[:, :1], small[:, :1]
        noise = normal(rngs, (1 if stage.shared_noise else x.shape[1], *x.shape[2:])).expand_as(x)  # (N, T, 3, S, S)
        batch = {"pixels": x, "small": vae.to_float(small), "level": torch.tensor([rng.random() for rng in rngs], dtype=torch.float32),
                 "fps": data["fps"][picks].float(), "noise": noise, "captions": [data["captions"][i] for i in picks]}
        if args.distill:
            batch["walk"] = walks[[int(rng.integers(len(walks))) for rng in rngs]]  # (N, K + 1)
            batch["t"] = batch["walk"][:, 0]
        else:
            batch["t"] = shifted_timesteps(rngs, stage.shift)
        if config.pooled:
            batch["context"], batch["captions"] = spoken(rngs, tokens[rows[picks]], null, batch["captions"])
        return batch

    def preview(model):  # what is given, ours, truth
        small, truth, moment = data["decoded"][:8], data["pixels"][:8], int(doubles)
        small = interpolate.double(small[:, ::2]) if doubles else small  # (8, T, C, s, s)
        prompt = lambda i: {"context": tokens[rows[i]][None], "null_context": null[None]} if config.pooled else {}
        ours = torch.stack([superres.upscale(model, diffusion, stage, clip, data["fps"][i].item(), **prompt(i)) for i, clip in enumerate(small)])
        plain = vae.to_uint8(superres.enlarge(vae.to_float(small[:, :, :3]), stage.scale, torch.zeros(len(small))))
        return vae.contact_sheet(torch.stack([v[:, moment] for v in (plain, ours, truth)]), columns=8)

    return Setup(model, batch_of, loss_of, preview, diffusion_config(diffusion), facts | taught)


PREPARE = {"vae": prepare_vae, "clip": prepare_clip, "image": prepare_image, "prior": prepare_prior, "base": prepare_base,
           "interpolate": prepare_interpolate} | {superres.name_of(which): partial(prepare_pixels, which=which) for which in NETWORKS}
OUTPUT = {stage: f"{stage}.pt" for stage in PREPARE} | {"clip": "text.pt"}  # each stage's file in weights/


# ------------------------------------------------------------------------------------------------
# The loop, one for all stages.

def learning_rate(step: int, recipe: Recipe) -> float:
    """A share of the full rate, by the step alone: up over the warm-up, level for a third, then straight down to zero.
    Raising `--steps` continues a finished run, and raises the rate again."""
    return max(0., min(1., (step + 1) / recipe.warmup, 1.5 * (recipe.steps - step) / recipe.steps))


class Loss(torch.nn.Module):
    """The loss as a module, so that data-parallel training and torch.compile see one forward, whatever a stage calls."""

    def __init__(self, model, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, batch):
        return self.loss_of(self.model, batch)                                      # (N,)


def ahead(make: Callable, of, threads: int = 4):
    """make(*each) for each of `of`, in order, made ahead of time by threads, so that a GPU need not wait."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for each in of:
            waiting.append(pool.submit(make, *each))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


LOG_COLUMNS = ["step", "minutes", "loss", "t<1/4", "t<1/2", "t<3/4", "t<1"]


def trim_log(path: Path, start: int):
    """Keep the rows up to step `start` alone: those after the checkpoint that a run goes on from are about to be written again."""
    rows = [row.split(",") for row in path.read_text().splitlines()[1:]] if path.is_file() else []
    rows = [row for row in rows if len(row) == len(LOG_COLUMNS) and int(row[0]) <= start]
    with atomic(path) as temporary:
        temporary.write_text("".join(",".join(row) + "\n" for row in [LOG_COLUMNS, *rows]))


def gathered(values: torch.Tensor) -> torch.Tensor:
    """The rows of every process, one after the other. (N, ...) -> (RANKS * N, ...)"""
    if RANKS == 1:
        return values.cpu()
    parts = [torch.empty_like(values) for _ in range(RANKS)]
    dist.all_gather(parts, values)
    return torch.cat(parts).cpu()


def dump_first_batch(folder: Path, batch: dict, args):
    """A batch of up to eight samples as eyes see them, side by side, and their captions: an error of range, channel order, stride
    or caption shows here at once."""
    if "pixels" in batch:
        videos = vae.to_uint8(batch["pixels"])
        videos = videos[:, None] if videos.ndim == 4 else videos                    # (8, T, 3, H, W)
    else:
        videos = vae.decode_video(vae.load(weights_in(args.weights, "vae"), args.device)[0], batch["latents"])
    vae.write_video(folder / "first_batch.gif", torch.cat(list(videos), dim=3), 4.)  # (T, 3, H, 8*W)
    rates = batch["fps"].tolist() if "fps" in batch else [1.] * len(videos)
    lines = [f"{rate:5.2f} fps  {words}\n" for rate, words in zip(rates, batch["captions"])]
    (folder / "first_batch.txt").write_text("".join(lines), encoding="utf-8")


def train(stage: str, args):
    """Train one stage from where its checkpoint stands to the end, and write weights/STAGE.pt."""
    recipe = RECIPES[stage]
    if args.lr:
        recipe = replace(recipe, lr=args.lr, fresh_lr=recipe.fresh_lr * args.lr / recipe.lr)
    recipe = replace(recipe, steps=args.steps or recipe.steps, batch=args.batch or recipe.batch)
    folder = RUNS / args.name / stage
    say = print if RANK == 0 else lambda *words: None
    torch.manual_seed(args.seed)
    if "cuda" in args.device:
        torch.cuda.reset_peak_memory_stats(args.device)
    if args.init:  # what cannot be read or written is refused before an hour of making data
        base.load_weights(args.init, stage)
    if RANK == 0:
        base.check_folder(folder)
        base.check_folder(args.weights)
    setup = PREPARE[stage](args)
    model = setup.model.to(args.device, memory_format=torch.channels_last).train()
    if hasattr(model, "gradient_checkpointing"):
        model.gradient_checkpointing = args.checkpointing
    freeze(model, args)
    fresh = lambda name: recipe.fresh_lr > 0 and UNet.is_inflation(name)
    groups = [{"params": [p for n, p in model.named_parameters() if p.requires_grad and fresh(n)], "base_lr": recipe.fresh_lr},
              {"params": [p for n, p in model.named_parameters() if p.requires_grad and not fresh(n)], "base_lr": recipe.lr}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=(.9, .99), weight_decay=.01)
    start, minutes, running, checkpoint = 0, 0., math.nan, folder / "checkpoint.pt"
    state = read_pt(checkpoint) if checkpoint.is_file() and not args.fresh else None
    if args.init:  # go on from finished weights of this very stage
        weights = parent(args.init, stage, setup.facts)
        if "distill" in weights["made_by"] and not args.distill:
            note(f"{args.init} was distilled, and has to learn anew all noise levels but those of its steps")
        base.fill(model, weights, args.init)
        made_by, earlier = weights["made_by"], state["origin"] if state else {}
        begun = {"init": weights["own"], "init_steps": made_by.get("steps", 0), "init_minutes": made_by.get("minutes", 0.)}
        if "init" in earlier and earlier["init"] == made_by.get("init") and not args.distill:
            begun = {key: earlier[key] for key in begun}  # --init now names what this very run has written over the weights it began from
        setup.facts |= begun
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    for average, parameter in zip(ema.parameters(), model.parameters()):
        if not parameter.requires_grad:  # what is frozen is its own average: of Stable Diffusion, 3 GiB
            average.data = parameter.data
    origin = {"stage": stage, "seed": args.seed, "data": name_of_data(args), "stills": args.stills, "clips": args.clips,
              "side": args.side, "joint": args.joint and stage == "base", "freeze": args.freeze, **setup.facts}
    if state:
        now, then = asdict(recipe) | origin, state["recipe"] | state["origin"] | {"steps": max(recipe.steps, state["step"])}
        other = [key for key in now | then if now.get(key) != then.get(key)]
        if other:
            raise UserError(f"{checkpoint} differs in {', '.join(other)} from what is asked for; --fresh starts over")
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, minutes, running = state["step"], state["minutes"], state["loss"]
        if start >= recipe.steps and (args.weights / OUTPUT[stage]).is_file():
            return say(f"{stage}: already trained; --fresh starts over")
        say(f"{stage}: going on from step {start}")
    loss_of = Loss(model, setup.loss_of)
    if RANKS > 1:  # steps on pictures, where there are such, leave the temporal layers unused
        loss_of = DistributedDataParallel(loss_of, find_unused_parameters=hasattr(model, "fps_embedding"))
    if args.compile:
        torch.compiler.assume_constant_result(base.has_fast_bf16)  # which it cannot look into
        loss_of = torch.compile(loss_of)
    say(f"{stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {recipe}")

    def save(step):
        write_pt(checkpoint, {
            "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
            "step": step, "minutes": minutes, "loss": running, "recipe": asdict(recipe), "origin": origin})

    @torch.inference_mode()
    def export(path, step):
        save_weights(path, stage, setup.config_of(ema), ema, steps=step, seed=args.seed, data=args.data, minutes=round(minutes, 1),
                     metrics={"loss": round(running, 5)}, **setup.facts)

    @torch.inference_mode()
    def show():
        vae.write_picture(folder / "preview.png", setup.preview(ema))

    if RANK == 0:
        trim_log(folder / "log.csv", start)
        dump_first_batch(folder, setup.batch_of(0, range(min(8, recipe.batch))), args)
    stop = []  # Ctrl-C lets the step end, and saves; a second one does not wait
    before = signal.signal(signal.SIGINT, lambda *_: (stop.append(True), signal.signal(signal.SIGINT, signal.default_int_handler)))
    mine = list(range(RANK, recipe.batch, RANKS))
    parts = batches(mine, len(mine) // args.accumulate)
    ready = ahead(setup.batch_of, ((step, part) for step in range(start, recipe.steps) for part in parts))
    bar = trange(start, recipe.steps, initial=start, total=recipe.steps, desc=stage, unit="step", disable=RANK > 0)
    window, saves, last_save, last_step = [], 0, time.time(), time.time()
    try:
        for step in bar:
            seen = []
            for _ in parts:
                batch = {key: value.to(args.device) for key, value in next(ready).items() if key != "captions"}
                with fast_autocast(args.device):
                    each = loss_of(batch)                                           # (N,)
                (each.mean() / args.accumulate).backward()
                loss = each.detach().float()
                seen.append(torch.stack([loss, batch["t"] / 1000 if "t" in batch else torch.zeros_like(loss)], dim=1))
            seen = gathered(torch.cat(seen))                                        # (N, 2): loss and noise level of each sample
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            if not (seen.isfinite().all() and norm.isfinite()):
                raise UserError(f"the loss of step {step}, or its gradient, is not finite; what {checkpoint} holds is from before")
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * learning_rate(step, recipe)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                decay = min(recipe.ema, (1 + step) / (10 + step))
                for average, parameter in zip(ema.parameters(), model.parameters()):
                    average.lerp_(parameter, 1 - decay)
            minutes += (time.time() - last_step) / 60
            last_step = time.time()
            last = step + 1 == recipe.steps  # whose checkpoint is written after the weights: where it is, they are
            if gathered(torch.tensor([len(stop)], device=args.device)).any() and not last:  # all processes stop at the same step
                if RANK == 0:
                    save(step + 1)
                raise KeyboardInterrupt
            if RANK > 0:
                continue
            window.append(seen)
            if (step + 1) % 25 == 0 or last:
                losses, levels = torch.cat(window).unbind(1)
                running = losses.mean().item()
                quartiles = [losses[(levels * 4).long() == q].mean().item() for q in range(4)]
                rate = len(losses) / len(window) * (bar.format_dict["rate"] or 0)
                bar.set_postfix(loss=f"{running:.4f}", samples_per_s=f"{rate:.1f}")
                row = [step + 1, round(minutes, 2), *(round(x, 5) for x in (running, *quartiles))]
                with open(folder / "log.csv", "a") as file:
                    file.write(",".join(map(str, row)) + "\n")
                window = []
            if time.time() - last_save > 60 * args.save_minutes and not last:
                save(step + 1)
                saves += 1
                if saves.bit_count() == 1:  # at the first, second, fourth, eighth ...: sampling takes its time
                    show()
                last_save = last_step = time.time()
            if args.snapshots and (step + 1) * args.snapshots // recipe.steps > step * args.snapshots // recipe.steps:
                export(folder / f"weights-{step + 1:06d}.pt", step + 1)
    except KeyboardInterrupt:
        say(f"\n{stage}: stopped; the same command goes on from {checkpoint}")
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if RANK == 0:
        export(args.weights / OUTPUT[stage], recipe.steps)
        save(recipe.steps)
        show()
    if RANKS > 1:
        dist.barrier()  # the next stage reads what this one wrote
    memory = f", GPU memory {torch.cuda.max_memory_allocated(args.device) / 2 ** 30:.2f} GiB at most" if "cuda" in args.device else ""
    say(f"{stage}: {minutes:.1f} minutes{memory}, loss {running:.4f}; wrote {args.weights / OUTPUT[stage]}; look at {folder / 'preview.png'}")


def dry_run(args):
    """What a step of `base` would cost, reckoned on the meta device: nothing is computed, and no GPU is needed."""
    path, config = weights_in(args.weights, "image"), base.SD15
    if path.exists():
        config, _ = base.read_config(base.load_weights(path, "image"), path)
    else:
        note(f"{args.weights} has no weights yet: reckoned with the numbers of Stable Diffusion 1.5")
    whole = args.batch or RECIPES["base"].batch
    batch, side = whole // args.accumulate, args.side // 8
    fast = base.has_fast_bf16(args.device)
    saved = {}
    with torch.device("meta"):
        unet = UNet(replace(config, **inflation(args))).train()
        unet.gradient_checkpointing = args.checkpointing
        freeze(unet, args)
        inputs = torch.zeros(batch, 16, 4, side, side), torch.zeros(batch), torch.zeros(batch, 77, config.context_dim), torch.ones(batch)
        keep = lambda tensor: saved.__setitem__(tensor.untyped_storage()._cdata, tensor.numel()) or tensor
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(*inputs).sum().backward()
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    every = sum(p.numel() for p in unet.parameters())
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    activations = sum(n for key, n in saved.items() if key not in weights) * (2 if fast else 4)
    print(f"base: {every / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained")
    print(f"a step on {whole} clips of 16 x {args.side} x {args.side}, {batch} at a time, forward and backward: "
          f"{args.accumulate * counter.get_total_flops() / 1e12:.2f} TFLOP")
    sizes = {"weights and their average, fp32": 4 * (every + trained), "gradients and Adam's moments, fp32": 12 * trained,
             f"activations, {'bf16' if fast else 'fp32'}": activations}
    for what, size in sizes.items():
        print(f"  {what:36s} {size / 2 ** 30:6.2f} GiB")
    print(f"  {'together':36s} {sum(sizes.values()) / 2 ** 30:6.2f} GiB, and what the kernels need for themselves")


def main(argv=None):
    if RANKS > 1 and torch.cuda.is_available():  # a card for each process, before anything opens the first one
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    parser = Parser("Train one stage, or all of them in order.")
    parser.add_argument("stage", choices=[*PREPARE, "all"], help="what to train; a stage needs the weights of those before it")
    parser.add_argument("--data", default="world", help="'world', the built-in toy world, or a folder of clips")
    parser.add_argument("--stills", type=positive(int), default=64000, help="pictures of the world to make; not for superres, tsr and ssr")
    parser.add_argument("--clips", type=positive(int), default=16000, help="clips of the world to make")
    parser.add_argument("--side", type=positive(int), default=64, help="side of these, in pixels")
    parser.add_argument("--steps", type=positive(int), help="steps, instead of the recipe's")
    parser.add_argument("--batch", type=positive(int), help="samples per step, instead of the recipe's")
    parser.add_argument("--lr", type=positive(float), help="learning rate, instead of the recipe's")
    parser.add_argument("--freeze", choices=("none", "spatial", "encoder"), default="none",
                        help="spatial, of base: train the temporal layers and gates alone; encoder, of vae: the decoder alone, so that latents stay")
    parser.add_argument("--joint", action=argparse.BooleanOptionalAction, default=True, help="base: every fourth step on pictures; not with --freeze spatial")
    parser.add_argument("--blank", action="store_true", help="tsr: leave what is between the given frames blank, instead of repeating them")
    parser.add_argument("--distill", type=positive(int), nargs=2, metavar=("TEACHER", "STUDENT"),
                        help="superres, ssr: learn to do in STUDENT steps of sampling what --init does in TEACHER; 4 1, say")
    parser.add_argument("--accumulate", type=positive(int), default=1,
                        help="cut each batch into this many pieces (clip contrasts within one)")
    parser.add_argument("--checkpointing", action="store_true", help="U-Nets: recompute activations backwards, to save memory")
    parser.add_argument("--dry-run", action="store_true", help="base: print parameters, FLOPs and memory of a step, and stop")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--init", help="start from these weights of the same stage, such as weights/base.pt, to train them further")
    parser.add_argument("--fresh", action="store_true", help="start over, whatever checkpoint there is")
    parser.add_argument("--save-minutes", type=positive(float), default=3., help="minutes between checkpoints")
    parser.add_argument("--snapshots", type=positive(int), help="keep this many weights on the way, for a curve over training")
    parser.add_argument("--name", default="", help="folder in runs/ to keep this run's stages apart from others")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of weights, read and written")
    parser.add_argument("--seed", type=base.seed, default=0, help="of the data, the initial weights and every sample")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.init and args.stage == "all":
        raise UserError("--init is for one stage")
    if args.freeze == "spatial" and args.stage != "base":
        raise UserError("--freeze spatial is for stage base, which has layers that its image model had not")
    if args.freeze == "encoder" and not (args.stage == "vae" and args.init):
        raise UserError("--freeze encoder is for stage vae, and for weights that --init names: a decoder trained further")
    if args.distill and not (args.init and args.stage in map(superres.name_of, superres.STAGES)):
        raise UserError("--distill is for the super-resolution stages, and for weights that --init names, which are the teacher")
    if args.distill and Path(args.init).resolve() == (args.weights / OUTPUT[args.stage]).resolve():
        raise UserError(f"the student would be written over {args.init}, its teacher; copy that first, and name the copy")
    if args.blank and not args.stage.startswith("tsr"):
        raise UserError("--blank is for the stages tsr-32 and tsr-128")
    if args.data != "world" and not Path(args.data).is_dir():
        raise UserError(f"{args.data}: no such folder of clips")
    if args.side % 8:
        raise UserError(f"--side is {args.side}, where a multiple of the autoencoder's stride of 8 is wanted")
    stages = list(PREPARE) if args.stage == "all" else [args.stage]
    for stage in stages:  # all of them before the first is trained, for days
        batch = args.batch or RECIPES[stage].batch
        if batch % (RANKS * args.accumulate):
            raise UserError(f"{stage}: a batch of {batch} cannot be cut into {RANKS * args.accumulate} equal parts, processes times --accumulate")
    if args.dry_run:
        if args.stage != "base":
            raise UserError("--dry-run is for stage base")
        return dry_run(args)
    if RANKS > 1:  # one process waits for as long as another renders data
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=timedelta(days=1))
    for stage in stages:
        train(stage, args)
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
