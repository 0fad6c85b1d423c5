"""train.py - the toy world, and one loop that trains every stage on it, or on a folder of your clips.

    python train.py all                        everything in weights/, one stage after the other
    python train.py base                       one stage; goes on from runs/base/checkpoint.pt if there
    python train.py base --data clips/         on videos with a captions.csv, or a .txt beside each
    torchrun --nproc_per_node 2 train.py base  each batch shared by two processes

Stages, in order: vae; clip, the text encoder; image, a text-to-image U-Net; mean-clip; base, that
U-Net inflated and trained on video (Make-A-Video, 3.4); interpolate, base fine-tuned on masked frames;
superres-low and -high; and for Imagen Video ssr-128, ssr-256, ssr-768, tsr-32, tsr-128.

Sample i of step n is a pure function of (seed, n, i), noise and timestep included: a run that was
stopped reaches the very bits of one that was not. runs/STAGE/ gets log.csv (loss by quartile of t),
preview.png, first_batch.gif and checkpoint.pt.
"""
import copy
import csv
import hashlib
import io
import json
import math
import os
import re
import time
import unicodedata
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import base
import interpolate
import superres
import text
import vae
from base import WEIGHTS, UNet, UserError, fast_autocast, find_checkpoint, load_pt, save_pt

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm, trange

RUNS = Path(__file__).resolve().parent / "runs"
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
STILLS, CLIPS, SIDE = 64000, 16000, 64  # of the world: how many to render, and at which size
SAVE_MINUTES = 3


# ------------------------------------------------------------------------------------------------
# The toy world: one shaded shape, one motion, one quiet ground. Positions are in the unit square (x
# right, y down), times in seconds, so a scene renders at any size and frame rate: the truth of every
# stage. A new colour, shape, motion or ground is one entry at the end of its table.

SCENE_SECONDS = 3.75  # 16 frames at 4 fps, or 76 at 20

COLOURS = {"red": (230, 40, 40), "orange": (250, 140, 30), "yellow": (245, 215, 50),
           "green": (50, 190, 70), "cyan": (50, 205, 215), "blue": (50, 90, 235),
           "purple": (155, 60, 200), "pink": (245, 130, 185)}


# Signed distances to outlines of radius about 1, negative inside; u right, v down.

def circle(u, v):
    return torch.hypot(u, v) - 1


def square(u, v):
    return torch.maximum(u.abs(), v.abs()) - .86


def triangle(u, v):
    return torch.maximum(v, .5 * (math.sqrt(3) * u.abs() - v)) - .6


def star(u, v):
    """One edge, from a tip at radius 1.2 to a notch at .52, mirrored and turned five times."""
    wedge = 2 * math.pi / 5
    theta = torch.remainder(torch.atan2(u, -v) + wedge / 2, wedge) - wedge / 2  # 0 is up, at a tip
    a, b = torch.hypot(u, v) * theta.cos(), torch.hypot(u, v) * theta.abs().sin()
    notch_a, notch_b = .52 * math.cos(wedge / 2), .52 * math.sin(wedge / 2)
    edge = math.hypot(1.2 - notch_a, notch_b)
    return ((a - 1.2) * notch_b + b * (1.2 - notch_a)) / edge


def cross(u, v):
    upright = torch.maximum(u.abs() - .36, v.abs() - 1.05)
    level = torch.maximum(u.abs() - 1.05, v.abs() - .36)
    return torch.minimum(upright, level)


def ring(u, v):
    return (torch.hypot(u, v) - .74).abs() - .26


SHAPES = {"circle": circle, "square": square, "triangle": triangle, "star": star, "cross": cross,
          "ring": ring}


# Paths: a scene's x, y, radius and clockwise angle at times t (T,) in seconds.

def slide(dx: float, dy: float, scene: dict, t):
    return scene["x"] + .14 * dx * t, scene["y"] + .14 * dy * t, scene["radius"], 0.


def resize(first: float, last: float, scene: dict, t):
    return scene["x"], scene["y"], first + (last - first) * t / SCENE_SECONDS, 0.


def bounce(scene: dict, t):
    height = (math.pi * (t / 2.5 + scene["phase"])).sin().abs()
    return scene["x"], .74 - .42 * height, scene["radius"], 0.


def circulate(scene: dict, t):
    turn = 2 * math.pi * (t / 5 + scene["phase"])  # y points down: a growing angle is clockwise
    return scene["x"] + .22 * turn.cos(), scene["y"] + .22 * turn.sin(), scene["radius"], 0.


def spin(scene: dict, t):
    angle = math.radians(60) * t + 2 * math.pi * scene["phase"]
    return scene["x"], scene["y"], scene["radius"], angle


@dataclass
class Motion:
    path: Callable
    x: tuple = (.35, .65)       # ranges of the scene's free numbers
    y: tuple = (.35, .65)
    radius: tuple = (.10, .14)
    often: int = 1              # how many times as often as others it is drawn in training


# Motions whose frames must agree on a phase, or show turned shapes, are drawn more often.
# Differs: the papers oversample no class.
MOTIONS = {"moving left": Motion(partial(slide, -1, 0), x=(.68, .78), y=(.3, .7)),
           "moving right": Motion(partial(slide, 1, 0), x=(.22, .32), y=(.3, .7)),
           "moving up": Motion(partial(slide, 0, -1), x=(.3, .7), y=(.68, .78)),
           "moving down": Motion(partial(slide, 0, 1), x=(.3, .7), y=(.22, .32)),
           "growing": Motion(partial(resize, .07, .24)),
           "shrinking": Motion(partial(resize, .24, .07)),
           "bouncing": Motion(bounce, x=(.3, .7), radius=(.10, .13), often=4),
           "circling": Motion(circulate, (.45, .55), (.45, .55), (.09, .12), often=2),
           "spinning": Motion(spin, radius=(.14, .20), often=4)}


def noise_octave(seed: int, rows: int, columns: int, size: int) -> torch.Tensor:
    """Value noise of unit variance on a lattice, seen at `size` pixels: (size, size). A lattice finer
    than the pixels is averaged, as a lens would; so small pictures show less, never an alias."""
    if rows > 8 * size:
        return torch.zeros(size, size)
    rng = np.random.default_rng((seed, rows, columns))
    lattice = torch.from_numpy(rng.standard_normal((1, 1, rows, columns), np.float32))
    shape = max(rows, size), max(columns, size)
    fine = F.interpolate(lattice, shape, mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(fine, size)[0, 0]


def octaves(seed: int, size: int, *layers):
    """The sum of weighted octaves, given as (weight, rows, columns)."""
    return sum(weight * noise_octave(seed, r, c, size) for weight, r, c in layers)


# Grounds: a light (size, size) that is added to the ground's colour.

def grass(seed: int, size: int):
    return octaves(seed, size, (.014, 5, 5), (.02, 16, 64), (.056, 60, 260), (.06, 150, 600))


def sand(seed: int, size: int):
    return octaves(seed, size, (.015, 4, 4), (.02, 24, 12), (.05, 190, 190), (.06, 420, 420))


def bricks(seed: int, size: int):
    centre = (torch.arange(size) + .5) / size
    y, x = centre[:, None], centre[None, :]
    row, blur = (y * 10).floor(), max(.0045, .55 / size)  # mortar is a pixel wide at least

    def to_joint(position, period: float):
        return (torch.remainder(position / period + .5, 1) - .5).abs() * period
    joint = torch.minimum(to_joint(y, .1).expand(size, size), to_joint(x + .1 * (row % 2), .2))
    light = octaves(seed, size, (.02, 10, 5), (.045, 260, 260))
    return light + .13 * (.0045 / blur) * torch.exp(-(joint / blur) ** 2)


def night(seed: int, size: int):
    centre = (torch.arange(size) + .5) / size
    light, seen = octaves(seed, size, (.006, 6, 6)), math.hypot(.003, .4 / size)
    stars = torch.from_numpy(np.random.default_rng((seed, 7)).uniform(size=(16, 3))).float()
    for x, y, bright in stars:  # a star smaller than a pixel keeps its light
        square = (centre[None, :] - x) ** 2 + (centre[:, None] - y) ** 2
        light = light + (.4 + .6 * bright) * (.003 / seen) ** 2 * torch.exp(-square / (2 * seen ** 2))
    return light


def black(seed: int, size: int):
    return torch.zeros(size, size)


GROUNDS = {"": ((0, 0, 0), black), "on grass": ((74, 96, 66), grass),
           "on sand": ((158, 142, 112), sand), "on bricks": ((118, 88, 80), bricks),
           "at night": ((22, 24, 35), night)}

ROUND = ("circle", "ring")  # a round shape that spins stands still
UNSEEN_PAIRS = {("star", "circling"), ("ring", "moving up"), ("cross", "growing"),
                ("triangle", "bouncing")}


def split_of(colour: str, shape: str, motion: str) -> str | None:
    """The part of the world that a triple belongs to: "train"; "held-out", triples that no video stage
    sees; "unseen", whole shape-motion pairs that none sees; None if the motion cannot be seen."""
    if motion == "spinning" and shape in ROUND:
        return None
    if (shape, motion) in UNSEEN_PAIRS:
        return "unseen"
    index = [list(table).index(key) for table, key in
             ((COLOURS, colour), (SHAPES, shape), (MOTIONS, motion))]
    return "held-out" if np.dot((7, 3, 5), index) % 8 == 0 else "train"


EVERY = [(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS]
TRIPLES = {split: [triple for triple in EVERY if split_of(*triple) == split]
           for split in ("train", "held-out", "unseen")}
TRIPLES["any"] = TRIPLES["train"] + TRIPLES["held-out"] + TRIPLES["unseen"]


def hard_still(shape: str, motion: str) -> bool:
    """Stills that an autoencoder learns last: rings at the border, turned shapes."""
    return motion == "spinning" or shape == "ring" and motion.startswith("moving")


DRAWN = TRIPLES | {
    "train": [t for t in TRIPLES["train"] for _ in range(MOTIONS[t[2]].often)],
    "still": [t for t in TRIPLES["any"] for _ in range(4 if hard_still(*t[1:]) else 1)]}


def caption(scene: dict, still: bool = False) -> str:
    """"a red star bouncing on grass"; a still has no motion: "a red star on grass"."""
    motion = "" if still else scene["motion"]
    words = "a", scene["colour"], scene["shape"], motion, scene["ground"]
    return " ".join(word for word in words if word)


def draw_scene(rng: np.random.Generator, split: str = "train", ground: str | None = None) -> dict:
    """A scene of a split, of "any" triple, or as "still" pictures are drawn."""
    colour, shape, motion = DRAWN[split][rng.integers(len(DRAWN[split]))]
    ranges = MOTIONS[motion]
    if ground is None:
        ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
    return {"colour": colour, "shape": shape, "motion": motion, "ground": ground,
            "x": rng.uniform(*ranges.x), "y": rng.uniform(*ranges.y),
            "radius": rng.uniform(*ranges.radius), "phase": rng.uniform(0, 1),
            "seed": int(rng.integers(2 ** 31))}


def trajectory(scene: dict, t: torch.Tensor) -> tuple:
    """Where the object is at times t (T,): x, y, radius and clockwise angle, each (T,)."""
    path = MOTIONS[scene["motion"]].path(scene, t)
    return tuple(torch.as_tensor(value, dtype=t.dtype).expand_as(t) for value in path)


def render_ground(scene: dict, size: int) -> torch.Tensor:
    """The still ground behind the object, (3, size, size) in 0...1."""
    colour, light = GROUNDS[scene["ground"]]
    return (torch.tensor(colour)[:, None, None] / 255 + light(scene["seed"], size)).clamp(0, 1)


def crop(video: torch.Tensor, window) -> torch.Tensor:
    """A window (left, top, side) of every frame. (..., S, S) -> (..., side, side)"""
    left, top, side = window
    return video[..., top:top + side, left:left + side]


def paint(scene: dict, path, size: int, window=None) -> torch.Tensor:
    """A scene's object at x, y, radii and angles `path`, each (T,), on its ground: frames
    (T, 3, size, size) in 0...1, or a window of them, (T, 3, side, side), as `crop` takes it."""
    left, top, side = window or (0, 0, size)
    x, y, r, angle = (value[:, None, None] for value in path)  # (T, 1, 1)
    centre = (torch.arange(size) + .5) / size
    u = (centre[None, None, left:left + side] - x) / r  # (T, 1, S)
    v = (centre[None, top:top + side, None] - y) / r  # (T, S, 1)
    along, across = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
    distance = SHAPES[scene["shape"]](along, across)  # (T, S, S)
    cover = (.5 - distance * r * size).clamp(0, 1)[:, None]  # (T, 1, S, S): share of each pixel
    shade = (.94 - .085 * (u + v)).clamp(0, 1.1)[:, None]  # light falls from the upper left
    colour = torch.tensor(COLOURS[scene["colour"]]).view(1, 3, 1, 1) / 255
    ground = crop(render_ground(scene, size), (left, top, side))
    return cover * (colour * shade).clamp(0, 1) + (1 - cover) * ground


def render(scene: dict, times, size: int = SIDE, window=None) -> torch.Tensor:
    """Frames of a scene at times in seconds, or a window of each. uint8 (T, 3, size, size)"""
    path = trajectory(scene, torch.as_tensor(times, dtype=torch.float32))
    return (paint(scene, path, size, window) * 255).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------
# Data. What is slow to make is made once and kept in runs/cache/.

def digest(thing) -> str:
    """Eight letters for anything that its repr tells from others."""
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:8]


def cached(name: str, make: Callable) -> dict:
    """What make() returns, made by process 0 if runs/cache/NAME.pt is not there."""
    path = RUNS / "cache" / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and not path.is_file():
        save_pt(path, make())
    while not path.is_file():  # another process is at it; the file appears whole
        time.sleep(1)
    return load_pt(path)


@cache
def world_id() -> str:
    """Hash of how the toy world looks; invalidates the cache."""
    clips = [draw_clip(np.random.default_rng(i), 16) for i in range(64)]
    grounds = [render_ground({"ground": name, "seed": 0}, 128) for name in GROUNDS]
    return digest((DRAWN, [(255 * ground).byte().numpy().tobytes() for ground in grounds],
                   [(caption(scene), video.numpy().tobytes(), fps) for scene, video, fps in clips]))


def data_id(data: str) -> str:
    """Hash of the world, or of a folder's files and their dates."""
    if data == "world":
        return world_id()
    kinds = (*vae.VIDEOS, *vae.IMAGES, ".txt", ".csv", ".jsonl")
    files = sorted(path for path in Path(data).rglob("*") if path.suffix.lower() in kinds)
    return digest([(path.relative_to(data).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
                   for path in files])


def world_stills(seed: int, side: int):
    """Images of any scene: yields (pixels (n, 1, 3, side, side), captions, fps), in groups. A scene's
    beginning and end come most often: what slides is at the border then. No split: a still does not
    show how a thing moves."""
    for group in trange(0, STILLS, 256, desc="rendering stills"):
        pixels, captions = [], []
        for i in range(group, min(group + 256, STILLS)):
            rng = np.random.default_rng((seed, 1, i))
            scene = draw_scene(rng, "still")
            pixels.append(render(scene, [SCENE_SECONDS * rng.beta(.25, .25)], side))
            captions.append(caption(scene, still=True))
        yield torch.stack(pixels), captions, torch.ones(len(captions))


def rate_at(share: float) -> float:
    """Frame rates from 4 to 30, log-uniform where `share` is uniform in 0...1."""
    return 4 * (30 / 4) ** share


def draw_clip(rng: np.random.Generator, side: int = SIDE):
    """A training scene, sixteen frames of it (16, 3, side, side), and their rate. Half of all clips run
    at 4 fps and show a whole scene, the others at up to 30 from a random start.

    Differs: Make-A-Video (3.4) draws 1 to 30 fps by a beta function, high rates first."""
    scene = draw_scene(rng, "train")
    fps = rate_at(max(0., rng.uniform(-1, 1)))
    start = rng.uniform(0, SCENE_SECONDS - 15 / fps)
    return scene, render(scene, start + np.arange(16) / fps, side), fps


def world_clips(seed: int, side: int):
    """Training clips of the world, in groups: yields (pixels (n, 16, 3, side, side), captions, fps)."""
    for group in trange(0, CLIPS, 64, desc="rendering clips"):
        rngs = [np.random.default_rng((seed, 2, i)) for i in range(group, min(group + 64, CLIPS))]
        scenes, videos, rates = zip(*(draw_clip(rng, side) for rng in rngs))
        yield torch.stack(videos), [caption(scene) for scene in scenes], torch.tensor(rates)


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig").strip() if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not written in UTF-8: {error}") from error


def read_table(path: Path):
    """Yields (line, file, caption). Hugging Face's tables say file_name and text."""
    text, line = read_text(path), 1
    is_csv = path.suffix == ".csv"
    rows = csv.DictReader(io.StringIO(text), strict=True) if is_csv else map(json.loads, text.split("\n"))
    try:
        for row in rows:
            line = getattr(rows, "line_num", line + 1)
            if None in row:
                raise ValueError("too many fields; a caption with commas needs quotes")
            file, words = row.get("file", row.get("file_name")), row.get("caption", row.get("text"))
            if file is None or words is None:
                raise ValueError("no 'file' and 'caption', nor 'file_name' and 'text'")
            yield line, file, str(words)
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}, line {line} or the next: {error}") from error


def plain(file) -> str:
    """A path, whichever slashes or kind of accents it is written with."""
    return os.path.normpath(unicodedata.normalize("NFC", str(file)).strip().replace("\\", "/"))


def read_captions(folder: Path, lenient: bool) -> dict:
    """{clip: caption} from a folder's captions.csv, metadata.csv or metadata.jsonl, else from a .txt
    beside the clip. Names what has no partner, and stops if that is much, unless lenient."""
    clips = sorted(p for p in folder.rglob("*") if p.suffix.lower() in vae.VIDEOS + vae.IMAGES)
    exact = {plain(clip.relative_to(folder)): clip for clip in clips}
    known = {file.casefold(): clip for file, clip in exact.items()} | exact
    captions = {clip: read_text(clip.with_suffix(".txt")) for clip in clips}
    tables = [folder / name for name in ("captions.csv", "metadata.csv", "metadata.jsonl")]
    table, lost = next((path for path in tables if path.is_file()), None), []
    for line, file, words in read_table(table) if table else ():
        clip = known.get(plain(file), known.get(plain(file).casefold()))
        if clip:
            captions[clip] = words or captions[clip]
        else:
            lost.append(f"{table}, line {line}: no such file: {file}")
    silent = [f"{clip} has no caption" for clip in clips if table and not captions[clip]]
    for message in lost + silent:
        base.warn(message)
    if min(len(lost), len(silent)) > len(clips) / 10 and not lenient:
        raise UserError(f"{table}: {len(lost)} rows find no file, and {len(silent)} of {len(clips)} "
                        "clips get no caption. Mend those above, or train so with --lenient")
    return captions


def folder_clips(folder, frames: int, side: int, lenient: bool = False):
    """Clips of `frames` frames from every video below a folder, cut to the middle square: yields
    (pixels (1, frames, 3, side, side), [caption], fps). Images count as videos of one frame.

    Of 1, 2 and 4 frames one is taken; of stills, four per second. A file that is unreadable, too short
    or too small is named and counted, never padded, enlarged or replaced."""
    folder, skipped, used, silent = Path(folder), [], 0, 0
    captions = read_captions(folder, lenient)
    kinds = vae.VIDEOS if frames > 1 else vae.VIDEOS + vae.IMAGES
    files = [path for path in captions if path.suffix.lower() in kinds]
    for path in tqdm(files, desc=f"reading {folder}"):
        words, windows = captions[path], {}
        try:
            for i, (frame, fps) in enumerate(vae.read_frames(path, side)):
                for skip in (1, 2, 4) if frames > 1 else (max(1, round(fps / 4)),):
                    window = windows.setdefault(skip, [])
                    window += [frame] * (i % skip == 0)
                    if len(window) == frames:
                        yield torch.stack(windows.pop(skip))[None], [words], torch.tensor([fps / skip])
            if i + 1 < frames:
                raise UserError(f"{path}: {i + 1} frames; {frames} are needed")
        except UserError as error:
            skipped.append(str(error))
            continue
        used, silent = used + 1, silent + (not words)
    for line in skipped:
        base.warn(f"skipped {line}")
    base.warn(f"{folder}: {used} files used, {silent} without a caption; {len(skipped)} skipped")
    if not used:
        raise UserError(f"{folder} holds no clip of {frames} frames, {side} x {side}")


def clips_of(args, kind: str, side: int):
    """The groups of clips, or of stills, that --data asks for."""
    if args.data != "world":
        return folder_clips(args.data, 1 if kind == "stills" else 16, side, args.lenient)
    return world_stills(args.seed, side) if kind == "stills" else world_clips(args.seed, side)


def gather(groups, key: str, function) -> dict:
    """function(pixels) of all groups as `key` (N, ...), with captions (N) and fps (N,)."""
    parts, captions, rates = [], [], []
    for pixels, words, fps in groups:
        parts.append(function(pixels))
        captions += words
        rates.append(fps)
    return {key: torch.cat(parts), "captions": captions, "fps": torch.cat(rates)}


def stills(args) -> dict:
    """pixels uint8 (N, 1, 3, side, side), captions, fps."""
    name = f"{data_id(args.data)}-stills-{STILLS}-{SIDE}-{args.seed}"
    return cached(name, lambda: gather(clips_of(args, "stills", SIDE), "pixels", lambda x: x))


def latents(args, kind: str, side: int = SIDE) -> tuple[dict, dict]:
    """Stills or clips as fp16 latents (N, T, 4, h, w) with captions, fps, the tokens of each distinct
    caption (K, L, D), rows (N,) in them, and null_tokens; and the ids of what made both."""
    autoencoder, vae_id = vae.load(find_checkpoint(args.weights, "vae"), args.device)
    count = STILLS if kind == "stills" else CLIPS
    name = f"{data_id(args.data)}-{kind}-{count}-{side}-{args.seed}-{vae_id}"
    data = cached(name, lambda: gather(clips_of(args, kind, side), "latents",
                                       lambda x: vae.encode_video(autoencoder, x).half()))
    facts = {"vae": vae_id, "side": data["latents"].shape[-1]}
    return add_tokens(args, data, facts), facts


def add_tokens(args, data: dict, facts: dict) -> dict:
    clip, tokenizer, known = text.load(find_checkpoint(args.weights, "text"), args.device)
    facts["text"] = known["id"]
    distinct = sorted(set(data["captions"]))
    text.warn_unknown(distinct, known["words"], ". Use words that it knows, or train clip, and then "
                      "every later stage, on these captions")
    groups = [distinct[i:i + 256] for i in range(0, len(distinct), 256)]
    encoded = [text.encode(clip, tokenizer, group) for group in groups]
    row = {words: i for i, words in enumerate(distinct)}
    return data | {"tokens": torch.cat([part["tokens"] for part in encoded]),
                   "rows": torch.tensor([row[words] for words in data["captions"]]),
                   "null_tokens": encoded[0]["null_tokens"]}


@dataclass
class Pairs:
    """What a network between pixels learns from: a window of a small clip, and the same `scale` times as
    large; for TSR, every other frame of it, and all."""
    frames: int
    side: int            # of the small clip
    inner: int           # of the window that is cut from it
    count: int
    rates: tuple = ()    # frames per second; (): any from 4 to 30


NETWORKS = superres.STAGES | interpolate.TSR
PAIRS = {"low": Pairs(8, 64, 32, 2400), "high": Pairs(1, 256, 64, 9600),
         "tsr-32": Pairs(16, 64, 48, 3200, (8.,)), "ssr-128": Pairs(8, 64, 48, 3200, (8.,)),
         "ssr-256": Pairs(8, 128, 48, 3200, (8.,)), "tsr-128": Pairs(16, 256, 64, 1600, (16., 32.)),
         "ssr-768": Pairs(8, 256, 32, 2700, (32.,))}


def window_about(x: float, y: float, side: int, size: int) -> tuple:
    """Left, top and side of a window about a point of the unit square, in an image of `size` pixels."""
    left, top = (min(max(0, round(at * size) - side // 2), size - side) for at in (x, y))
    return left, top, side


def world_pairs(p: Pairs, scale: int, key: int, seed: int):
    """Yields (small clip (T, 3, s, s), a function from a window to the large clip, the window's centre,
    caption, fps). Seven in ten windows are about an outline: little is to be learnt elsewhere."""
    for i in trange(p.count, desc="rendering pairs"):
        rng = np.random.default_rng((seed, key, i))
        scene = draw_scene(rng, "train")
        fps = float(rng.choice(p.rates)) if p.rates else rate_at(rng.random())
        start = rng.uniform(0, SCENE_SECONDS - (p.frames - 1) / fps)
        times = torch.as_tensor(start + np.arange(p.frames) / fps, dtype=torch.float32)
        x, y, radius, _ = (float(path[p.frames // 2]) for path in trajectory(scene, times))
        turn = 2 * math.pi * rng.random()
        outline = x + radius * math.cos(turn), y + radius * math.sin(turn)
        centre = outline if rng.random() < .7 else rng.random(2)
        small = render(scene, times, p.side)
        large = partial(render, scene, times, scale * p.side) if scale > 1 else partial(crop, small)
        yield small, large, centre, caption(scene), fps


def folder_pairs(folder, p: Pairs, scale: int, seed: int, lenient: bool):
    """The same from the clips of a folder."""
    rng = np.random.default_rng((seed, 5))
    for windows, words, rates in folder_clips(folder, p.frames, scale * p.side, lenient):
        for large, line, fps in zip(windows, words, rates):
            small = F.interpolate(large.float(), (p.side, p.side), mode="area").round().byte()
            yield small, partial(crop, large), rng.random(2), line, float(fps)


def pairs(args, name: str) -> tuple[dict, dict]:
    """pixels uint8 (N, T, 3, S, S), small (N, T, 3, s, s), decoded (small after a round trip through the
    autoencoder where that makes 64 pixels, else small), captions, fps, tokens; and the ids."""
    p, scale = PAIRS[name], NETWORKS[name].scale
    autoencoder, vae_id = vae.load(find_checkpoint(args.weights, "vae"), args.device)

    def make():
        source = folder_pairs(args.data, p, scale, args.seed, args.lenient)
        if args.data == "world":
            source = world_pairs(p, scale, 6 + list(PAIRS).index(name), args.seed)
        items, captions = {"small": [], "decoded": [], "pixels": [], "fps": []}, []
        for small, large, centre, line, fps in source:
            decoded = small
            if p.side == 64:
                z = vae.encode_video(autoencoder, small[None])
                decoded = vae.decode_video(autoencoder, z)[0]  # (T, 3, s, s)
            window = window_about(*centre, p.inner, p.side)
            items["small"].append(crop(small, window).clone())
            items["decoded"].append(crop(decoded, window).clone())
            items["pixels"].append(large([scale * n for n in window]).clone())
            items["fps"].append(torch.tensor(fps))
            captions.append(line)
        return {key: torch.stack(values) for key, values in items.items()} | {"captions": captions}

    decoder = base.tensors_id(autoencoder.state_dict(), ("decoder.",)) if p.side == 64 else "none"
    key = f"{data_id(args.data)}-pairs-{name}-{digest(p)}-{args.seed}-{decoder}"
    return cached(key, make), {"vae": vae_id, "windows": p.count}


# ------------------------------------------------------------------------------------------------
# Randomness: one generator per sample and step. Its seed is (seed, purpose, ...): 1 stills, 2 clips,
# 3 samples, 5 masks and windows of a folder's clips, 6 and up the world's pairs.

def draw(args, step: int, samples, count: int) -> tuple[list, list]:
    """The generator of each sample of a step, and which of `count` items the sample is."""
    rngs = [np.random.default_rng((args.seed, 3, step, i)) for i in samples]
    return rngs, [int(rng.integers(count)) for rng in rngs]


def normal(rngs, shape) -> torch.Tensor:
    """Standard normal noise (N, *shape), each sample's from its own generator."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))


def middle_timesteps(rngs) -> torch.Tensor:
    """t (N,) of density sin(pi t), most often from the middle. The loss weight has the same shape, so a
    level counts by its square. Differs: Imagen Video draws t uniformly."""
    return torch.tensor([int(1000 * math.acos(1 - 2 * rng.random()) / math.pi) for rng in rngs])


def shifted_timesteps(rngs, shift: float = math.sqrt(16)) -> torch.Tensor:
    """t (N,), uniform and then moved by base.shift_noise, for clips of 16 frames by default."""
    return torch.tensor([min(999, int(1000 * base.shift_noise(rng.random(), shift))) for rng in rngs])


def drop_prompt(rngs, data: dict, picks: list) -> tuple[torch.Tensor, list]:
    """Tokens (N, L, D) and captions of items; one in ten is the null prompt, for guidance."""
    dropped = [rng.random() < .1 for rng in rngs]
    tokens = data["tokens"][data["rows"][picks]]
    tokens = torch.where(torch.tensor(dropped)[:, None, None], data["null_tokens"], tokens)
    return tokens, ["" if drop else data["captions"][i] for drop, i in zip(dropped, picks)]


def diffusion_batch(args, data: dict, step: int, samples, timesteps=middle_timesteps) -> dict:
    rngs, picks = draw(args, step, samples, len(data["latents"]))
    context, captions = drop_prompt(rngs, data, picks)
    x = data["latents"][picks].float()  # (N, T, 4, h, w)
    return {"latents": x, "context": context, "fps": data["fps"][picks], "captions": captions,
            "noise": normal(rngs, x.shape[1:]), "t": timesteps(rngs)}


# ------------------------------------------------------------------------------------------------
# Stages: how long each trains, and what the loop needs to know of it.

@dataclass
class Recipe:
    steps: int
    batch: int
    lr: float
    fresh_lr: float = 0.     # of layers that an image model does not have
    warmup: int = 100
    ema: float = .999


RECIPES = {"vae": Recipe(steps=32000, batch=32, lr=1.5e-3),
           "clip": Recipe(steps=700, batch=128, lr=1e-3),
           "image": Recipe(steps=4500, batch=128, lr=1e-3),
           "mean-clip": Recipe(steps=2000, batch=64, lr=5e-3, warmup=50),
           "base": Recipe(steps=32000, batch=16, lr=4e-4, fresh_lr=1.5e-3),
           "interpolate": Recipe(steps=10700, batch=16, lr=8e-4),
           "superres-low": Recipe(steps=7900, batch=4, lr=2e-3),
           "superres-high": Recipe(steps=9900, batch=8, lr=2e-3),
           "ssr-128": Recipe(steps=1750, batch=32, lr=2e-3),
           "ssr-256": Recipe(steps=1750, batch=32, lr=2e-3),
           "ssr-768": Recipe(steps=4600, batch=32, lr=2e-3),
           "tsr-32": Recipe(steps=3200, batch=16, lr=2e-3),
           "tsr-128": Recipe(steps=2600, batch=16, lr=2e-3)}


@dataclass
class Setup:
    model: torch.nn.Module
    batch_of: Callable       # (step, samples) -> tensors (N, ...), and "captions" to look at
    loss_of: Callable        # (model, batch) -> loss of each sample (N,)
    preview: Callable        # (model) -> image, uint8 (3, H, W)
    config: dict             # what the checkpoint says of the model
    facts: dict = field(default_factory=dict)  # ids of what it stands on, and more
    finish: Callable = lambda model, config: config  # (model, config) -> the config to ship


def prepare_vae(args) -> Setup:
    data, model = stills(args), vae.AutoencoderKL(vae.VAEConfig())
    if args.freeze == "encoder":  # latents stay what they are, and so does their scale
        model, _ = vae.load(args.init)
    c = model.config
    latent_shape = c.latent_channels, SIDE // c.factor, SIDE // c.factor

    def batch_of(step, samples):
        rngs, picks = draw(args, step, samples, len(data["pixels"]))
        return {"pixels": vae.to_float(data["pixels"][picks, 0]), "noise": normal(rngs, latent_shape),
                "captions": [data["captions"][i] for i in picks]}

    def preview(model):  # originals above their reconstructions
        originals = data["pixels"][:16, 0]
        mean = model.encode(vae.to_float(originals).to(args.device))[0]
        return vae.contact_sheet(torch.stack([originals, vae.to_uint8(model.decode(mean)).cpu()]))

    def finish(model, config):  # unit variance, measured: latent diffusion, appendix G
        if args.freeze == "encoder":
            return config
        chunks = data["pixels"][:2048, 0].split(128)
        raw = [model.encode(vae.to_float(chunk).to(args.device))[0] for chunk in chunks]
        return config | {"scaling_factor": (1 / torch.cat(raw).std()).item()}

    return Setup(model, batch_of, vae.loss, preview, asdict(c), finish=finish)


def training_captions() -> list:
    """Every caption that a training clip can have."""
    return sorted({caption({"colour": c, "shape": s, "motion": m, "ground": g})
                   for c, s, m in TRIPLES["train"] for g in GROUNDS})


def prepare_clip(args) -> Setup:
    data = stills(args)
    captions = training_captions() if args.data == "world" else sorted(set(data["captions"]))
    every = captions + data["captions"]
    vocab, merges = text.learn_tokenizer(every)
    model = text.CLIP(text.CLIPConfig(vocab_size=len(vocab), image_size=SIDE))
    words = sorted({word for line in every for word in re.findall(r"\w+", line.lower())})
    ids = text.tokenize(text.build_tokenizer(vocab, merges), every, model.config.context)
    motion_ids, ids = ids.split([len(captions), len(data["captions"])])  # (N, L) each

    def batch_of(step, samples):
        rngs, picks = draw(args, step, samples, len(ids))
        others = [rng.integers(len(motion_ids)) for rng in rngs]
        return {"pixels": vae.to_float(data["pixels"][picks, 0]), "ids": ids[picks],
                "motion_ids": motion_ids[others], "captions": [data["captions"][i] for i in picks]}

    def preview(model):  # images over the cosines of each with each caption
        shown = data["pixels"][:16, 0]
        logits = model.similarity(vae.to_float(shown).to(args.device), ids[:16].to(args.device))
        cosines = (logits / model.logit_scale.exp()).T.clamp(0, 1).cpu()
        tiles = (cosines * 255).byte().repeat_interleave(SIDE, 1).repeat_interleave(16, 0)
        return torch.cat([vae.contact_sheet(shown[None]), tiles.expand(3, -1, -1)], dim=1)

    config = {"clip": asdict(model.config), "tokenizer": {"vocab": vocab, "merges": merges},
              "words": words}
    return Setup(model, batch_of, text.loss, preview, config)


def sheet(args, z, columns: int = 16) -> torch.Tensor:
    """Latents (B, T, 4, h, w) as an image, a row for each video."""
    autoencoder, _ = vae.load(find_checkpoint(args.weights, "vae"), args.device)
    return vae.contact_sheet(vae.decode_video(autoencoder, z), columns)


def unet_config(model: UNet, diffusion: base.Diffusion) -> dict:
    return {"unet": asdict(model.config),
            "diffusion": {"schedule": diffusion.schedule, "target": diffusion.target}}


VIDEO_PROMPTS = ["a red star moving left", "a cyan circle bouncing on sand",
                 "a yellow square spinning on grass", "a green triangle growing at night",
                 "a pink ring circling", "a blue cross moving up on bricks"]


def prepare_image(args) -> Setup:
    data, facts = latents(args, "stills")
    model = UNet(replace(base.TINY_IMAGE, context_dim=data["tokens"].shape[-1]))
    diffusion, prompts = base.Diffusion(), data["captions"][:32]

    def preview(model):
        text_emb = text.encode_clip(prompts, args.weights)["text"]
        z = base.generate(model, diffusion, text_emb, frames=1, side=facts["side"])
        return sheet(args, z.transpose(0, 1), columns=8)
    return Setup(model, partial(diffusion_batch, args, data),
                 lambda model, batch: base.loss(model, diffusion, batch), preview,
                 unet_config(model, diffusion), facts)


def check_parent(made_by: dict, facts: dict, path):
    """Refuse weights to start from that stand on another autoencoder or text encoder."""
    for key in ("vae", "text"):
        if made_by.get(key, facts.get(key)) != facts.get(key):
            raise UserError(f"{path} stands on {key} {made_by[key]}, not on {facts[key]}: train it anew")


def prepare_mean_clip(args) -> Setup:
    data, facts = latents(args, "clips")
    config = {"context_dim": data["tokens"].shape[-1], "channels": data["latents"].shape[2]}
    prompts = VIDEO_PROMPTS if args.data == "world" else data["captions"][:6]

    def preview(model):
        tokens = text.encode_clip(prompts, args.weights)["text"]["tokens"]
        slowest = data["fps"].min().expand(len(tokens))  # shows most motion
        shape = data["latents"][0, :, 0].shape
        return sheet(args, model(tokens.to(args.device), slowest.to(args.device), *shape).cpu())
    return Setup(base.MeanClip(**config), partial(diffusion_batch, args, data), base.mean_clip_loss,
                 preview, config, facts)


def prepare_base(args) -> Setup:
    """Make-A-Video, 3.2 and 3.4: the image model, inflated, learns from video. Every fourth step is of
    stills, four for each clip. Differs: Make-A-Video's clips have no captions; Imagen Video packs its
    stills into clips."""
    path, mean_clip = find_checkpoint(args.weights, "image"), Path(args.weights) / "mean_clip.pt"
    temporal = ("mean_clip", "attention", "conv") if mean_clip.is_file() else ("attention", "conv")
    model, diffusion, made_by = base.load(path, "cpu", ("image",), temporal=temporal,
                                          gates=True, embeddings=("fps",))
    data, facts = latents(args, "clips", 8 * made_by["side"])
    check_parent(made_by, facts, path)
    if mean_clip.is_file():
        weights = base.load_checkpoint(mean_clip, "mean-clip")
        check_parent(weights["made_by"], facts, mean_clip)
        base.load_state(model.mean_clip, weights["model"], mean_clip)
    joint = latents(args, "stills", 8 * made_by["side"])[0] if args.freeze == "none" else None
    prompts = VIDEO_PROMPTS if args.data == "world" else data["captions"][:6]

    def batch_of(step, samples):
        if joint and step % 4 == 3:
            return diffusion_batch(args, joint, step, [4 * i + k for i in samples for k in range(4)])
        return diffusion_batch(args, data, step, samples, shifted_timesteps)

    def preview(model):
        text_emb = text.encode_clip(prompts, args.weights)["text"]
        fps = data["fps"].min().item()
        return sheet(args, base.generate(model, diffusion, text_emb, fps=fps, side=facts["side"],
                                         steps=16))
    return Setup(model, batch_of, lambda model, batch: base.loss(model, diffusion, batch), preview,
                 unet_config(model, diffusion), facts)


def prepare_interpolate(args) -> Setup:
    """Make-A-Video, 3.3: the video model learns from clips some of whose frames it is shown."""
    data, facts = latents(args, "clips")
    path = find_checkpoint(args.weights, "base")
    weights = interpolate.widen(base.load_checkpoint(path, "base"))
    check_parent(weights["made_by"], facts, path)
    model = UNet(base.UNetConfig(**weights["config"]["unet"]))
    base.load_state(model, weights["model"], path)
    diffusion = base.Diffusion(**weights["config"]["diffusion"])

    def batch_of(step, samples):
        rngs = [np.random.default_rng((args.seed, 5, step, i)) for i in samples]
        known = torch.stack([interpolate.random_known(rng) for rng in rngs])  # (N, T)
        return diffusion_batch(args, data, step, samples, shifted_timesteps) | {"known": known}

    def preview(model):  # sixteen frames of which every fifth is given, below the truth
        fps = data["fps"][0].item()
        picks = (data["fps"] == fps).nonzero()[:4, 0]
        x, known = data["latents"][picks].float(), torch.arange(16) % 5 == 0
        text_emb = {"tokens": data["tokens"][data["rows"][picks]], "null_tokens": data["null_tokens"]}
        made = interpolate.fill_timeline(model, diffusion, x, known, text_emb, fps)
        return sheet(args, torch.stack([x, made], dim=1).flatten(0, 1))
    return Setup(model, batch_of, lambda model, batch: interpolate.loss(model, diffusion, batch),
                 preview, unet_config(model, diffusion), facts)


def prepare_pixels(args, name: str) -> Setup:
    """A network between pixels. Every fourth step is of single frames, except for TSR, which needs two.

    Differs: Make-A-Video's SR_l is an image model first; Imagen Video's networks see whole blocks of
    whole frames, the last one crops. Here all see windows of short clips."""
    stage, doubles, diffusion = NETWORKS[name], name in interpolate.TSR, base.Diffusion(target="sample")
    hears = "text" in stage.unet.embeddings
    teacher, paths, taught = None, None, {}
    if args.distill:
        teacher, _, _, made_by = superres.load(stage, args.teacher or args.init, args.device)
        taught = made_by.get("distill", [0, args.distill[0]])
        if taught[1] != args.distill[0]:
            raise UserError(f"the teacher takes {taught[1]} steps, not {args.distill[0]}")
        paths = superres.teacher_paths(stage, *args.distill)  # (steps, K + 1)
        stage, taught = replace(stage, steps=args.distill[1]), {"distill": args.distill}
    data, facts = pairs(args, name)
    if hears:
        data = add_tokens(args, data, facts)
        stage = replace(stage, unet=replace(stage.unet, context_dim=data["tokens"].shape[-1]))
    model = UNet(stage.unet)

    def loss_of(model, batch):
        if teacher:
            return superres.distillation_loss(model, teacher, diffusion, batch, stage)
        return superres.loss(model, diffusion, batch, stage)

    def batch_of(step, samples):
        rngs, picks = draw(args, step, samples, len(data["pixels"]))
        kinds = ["decoded" if rng.random() < .5 else "small" for rng in rngs]
        small = torch.stack([data[kind][i] for kind, i in zip(kinds, picks)])
        x = vae.to_float(data["pixels"][picks])  # (N, T, 3, S, S)
        if doubles:
            small = interpolate.double(small[:, ::2])  # (N, T, 6, s, s)
        elif step % 4 == 3:
            x, small = x[:, :1], small[:, :1]
        frames = 1 if stage.shared_noise else x.shape[1]
        noise = normal(rngs, (frames, *x.shape[2:])).expand_as(x)  # (N, T, 3, S, S)
        level = torch.tensor([rng.random() for rng in rngs], dtype=torch.float32)
        batch = {"pixels": x, "small": vae.to_float(small), "level": level, "noise": noise,
                 "fps": data["fps"][picks].float(), "captions": [data["captions"][i] for i in picks]}
        if teacher:
            batch["path"] = paths[[int(rng.integers(len(paths))) for rng in rngs]]  # (N, K + 1)
            batch["t"] = batch["path"][:, 0]
        else:
            batch["t"] = shifted_timesteps(rngs, stage.shift)
        if hears:
            batch["context"], batch["captions"] = drop_prompt(rngs, data, picks)
        return batch

    def preview(model):  # what is given, ours, truth
        small, truth, moment = data["decoded"][:8], data["pixels"][:8], int(doubles)
        small = interpolate.double(small[:, ::2]) if doubles else small  # (8, T, C, s, s)
        ours = []
        for i, clip in enumerate(small):
            prompt = {}
            if hears:
                prompt = {"context": data["tokens"][data["rows"][i]][None],
                          "null_context": data["null_tokens"]}
            fps = data["fps"][i].item()
            ours.append(superres.upscale(model, diffusion, stage, clip, fps, **prompt))
        given = superres.enlarge(vae.to_float(small[:, :, :3]), stage.scale, torch.zeros(len(small)))
        videos = vae.to_uint8(given), torch.stack(ours), truth
        return vae.contact_sheet(torch.stack([video[:, moment] for video in videos]), columns=8)

    return Setup(model, batch_of, loss_of, preview, unet_config(model, diffusion), facts | taught)


PREPARE = {"vae": prepare_vae, "clip": prepare_clip, "image": prepare_image,
           "mean-clip": prepare_mean_clip, "base": prepare_base, "interpolate": prepare_interpolate}
PREPARE |= {stage.checkpoint: partial(prepare_pixels, name=name) for name, stage in NETWORKS.items()}
OUTPUT = {name: f"{name}.pt" for name in PREPARE} | {"clip": "text.pt", "mean-clip": "mean_clip.pt"}


# ------------------------------------------------------------------------------------------------
# The loop, one for all stages

def learning_rate(step: int, recipe: Recipe) -> float:
    """A share of the full rate: up over the warm-up, level for a third, then straight down to zero."""
    left = (recipe.steps - step) / recipe.steps
    return max(0., min(1., (step + 1) / recipe.warmup, 1.5 * left))


class Loss(torch.nn.Module):
    """The loss as a module: data-parallel training and torch.compile see one forward."""

    def __init__(self, model, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, batch):
        return self.loss_of(self.model, batch)  # (N,)


def ahead(make: Callable, calls, threads: int = 4):
    """make(*call) for each of `calls`, in order, made ahead by threads, so that a GPU need not wait."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for call in calls:
            waiting.append(pool.submit(make, *call))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def show_first_batch(folder: Path, batch: dict, args):
    """Up to eight samples side by side, with captions: errors of range, order or caption show here."""
    if "pixels" in batch:
        videos = vae.to_uint8(batch["pixels"])
        videos = videos[:, None] if videos.ndim == 4 else videos  # (8, T, 3, H, W)
    else:
        autoencoder, _ = vae.load(find_checkpoint(args.weights, "vae"), args.device)
        videos = vae.decode_video(autoencoder, batch["latents"])
    vae.write_video(folder / "first_batch.gif", torch.cat(list(videos), dim=3), 4.)
    (folder / "first_batch.txt").write_text("\n".join(batch["captions"]) + "\n", encoding="utf-8")


def trainable(name: str, freeze: str) -> bool:
    """Is this parameter left to training by --freeze?"""
    return {"none": True, "spatial": UNet.is_inflation(name),
            "encoder": name.startswith(("decoder.", "post_quant_conv."))}[freeze]


def make_optimizer(model, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, with a learning rate of its own for the layers that an image model does not have."""
    groups = {recipe.lr: [], recipe.fresh_lr or recipe.lr: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fresh = recipe.fresh_lr and UNet.is_inflation(name)
            groups[recipe.fresh_lr if fresh else recipe.lr].append(parameter)
    groups = [{"params": params, "base_lr": lr} for lr, params in reversed(groups.items()) if params]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(.9, .99), weight_decay=.01)


def check_same_run(then: dict, now: dict, path):
    """Refuse to go on from a checkpoint whose model, data or recipe is another."""
    differing = [f"{key} (then {then.get(key)}, now {now.get(key)})" for key in sorted(now | then)
                 if then.get(key) != now.get(key)]
    if differing:
        raise UserError(f"{path} differs in {'; '.join(differing)}. Start over with --fresh, or train "
                        "finished weights further with --init")


def take_step(step: int, pieces: list, loss_of: torch.nn.Module, ema, optimizer, recipe, device):
    """One step of the optimizer and of the average, on the pieces of a batch. Returns the loss and the
    noise level of each sample of this process, (N, 2)."""
    parameters, seen = list(loss_of.parameters()), []
    for batch in pieces:
        batch = {k: v.to(device) for k, v in batch.items() if k != "captions"}
        with fast_autocast(device):
            losses = loss_of(batch)  # (N,)
        (losses.mean() / len(pieces)).backward()
        losses = losses.detach().float()
        levels = batch["t"] / 1000 if "t" in batch else torch.zeros_like(losses)
        seen.append(torch.stack([losses, levels], dim=1))
    if not torch.nn.utils.clip_grad_norm_(parameters, 1.).isfinite():
        raise UserError(f"step {step}: the gradient is not finite; the checkpoint is from before")
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate(step, recipe)
    optimizer.step()
    optimizer.zero_grad()
    decay = min(recipe.ema, (1 + step) / (10 + step))
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), parameters):
            average.lerp_(parameter, 1 - decay)
    return torch.cat(seen).cpu()


def train(name: str, args, steps: int | None = None):
    """Train a stage from where its checkpoint stands to the end, and write weights/STAGE.pt."""
    recipe = replace(RECIPES[name], steps=steps or RECIPES[name].steps)
    if args.lr:
        recipe = replace(recipe, lr=args.lr, fresh_lr=recipe.fresh_lr * args.lr / recipe.lr)
    recipe = replace(recipe, steps=args.steps or recipe.steps, batch=args.batch or recipe.batch)
    folder, output = RUNS / args.name / name, Path(args.weights) / OUTPUT[name]
    checkpoint = folder / "checkpoint.pt"
    for path in (checkpoint, output):
        base.check_output(path, ".pt")
    torch.manual_seed(args.seed)
    setup = PREPARE[name](args)
    model = setup.model.to(args.device, memory_format=torch.channels_last).train()
    model.gradient_checkpointing = args.checkpointing
    if args.init:
        weights = base.load_checkpoint(args.init, name)
        check_parent(weights["made_by"], setup.facts, args.init)
        then, now = (config.get("diffusion") for config in (weights["config"], setup.config))
        if then != now:
            raise UserError(f"{args.init} was trained with diffusion {then}, not {now}")
        base.load_state(model, weights["model"], args.init)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(parameter_name, args.freeze))
    optimizer, ema = make_optimizer(model, recipe), copy.deepcopy(model).eval().requires_grad_(False)
    run = asdict(recipe) | {"seed": args.seed, "data": data_id(args.data), "freeze": args.freeze}
    run |= setup.config | setup.facts | {"stills": STILLS, "clips": CLIPS, "pixels": SIDE}
    run |= {"init": args.init, "teacher": args.teacher}
    start, minutes, running = 0, 0., math.nan
    if checkpoint.is_file() and not args.fresh:
        state = load_pt(checkpoint)
        check_same_run(state["run"] | {"steps": recipe.steps}, run, checkpoint)
        for part, kept in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(state[kept])
        start, minutes, running = state["step"], state["minutes"], state["loss"]
        if start >= recipe.steps and output.is_file():
            return print(f"{name}: already trained; --fresh starts over")
    loss_of = Loss(model, setup.loss_of)
    if RANKS > 1:  # steps on stills leave the temporal layers unused
        loss_of = DistributedDataParallel(loss_of, find_unused_parameters=name == "base")
    if args.compile:
        torch.compiler.assume_constant_result(base.has_fast_bf16)  # which it cannot look into
        loss_of = torch.compile(loss_of)

    def save(step):
        save_pt(checkpoint, {"model": model.state_dict(), "ema": ema.state_dict(), "run": run,
                             "optimizer": optimizer.state_dict(), "step": step, "minutes": minutes,
                             "loss": running})

    if RANK == 0:
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {recipe}")
        if start == 0:
            (folder / "log.csv").write_text("step,minutes,loss,t<1/4,t<1/2,t<3/4,t<1\n")
        show_first_batch(folder, setup.batch_of(0, range(min(8, recipe.batch))), args)
    mine = list(range(RANK, recipe.batch, RANKS))
    size = len(mine) // args.accumulate
    parts = [mine[i:i + size] for i in range(0, len(mine), size)]
    calls = ((step, part) for step in range(start, recipe.steps) for part in parts)
    batches, window, last_save, clock = ahead(setup.batch_of, calls), [], time.time(), time.time()
    bar = trange(start, recipe.steps, initial=start, total=recipe.steps, desc=name, disable=RANK > 0)
    for step in bar:
        pieces = [next(batches) for _ in parts]
        window.append(take_step(step, pieces, loss_of, ema, optimizer, recipe, args.device))
        minutes, clock = minutes + (time.time() - clock) / 60, time.time()
        last = step + 1 == recipe.steps
        if (step + 1) % 25 == 0 or last:
            losses, levels = torch.cat(window).unbind(1)
            quartiles = [losses[(levels * 4).long() == q].mean().item() for q in range(4)]
            running, window = losses.mean().item(), []
            bar.set_postfix(loss=f"{running:.4f}")
            if RANK == 0:
                with open(folder / "log.csv", "a") as log:
                    row = step + 1, round(minutes, 2), *(round(x, 5) for x in (running, *quartiles))
                    log.write(",".join(map(str, row)) + "\n")
        if RANK == 0 and not last and time.time() - last_save > 60 * SAVE_MINUTES:
            save(step + 1)
            last_save = time.time()
    if RANK == 0:
        with torch.inference_mode():
            base.save_checkpoint(output, setup.finish(ema, setup.config), ema, stage=name,
                                 command=args.command, steps=recipe.steps, seed=args.seed,
                                 data=args.data, minutes=round(minutes, 1), **setup.facts)
            save(recipe.steps)  # after the weights: where it is, they are
            vae.write_image(folder / "preview.png", setup.preview(ema))
        print(f"{name}: {minutes:.1f} minutes, loss {running:.4f}; wrote {output}; look at "
              f"{folder / 'preview.png'}")
    if RANKS > 1:
        dist.barrier()  # the next stage reads what this one wrote


def plan(folder, stages: list) -> dict:
    """{stage: steps} of the stages that a folder of clips can train. Says what it holds, and what else
    would be needed. Steps: a hundred passes over the windows, within the recipe."""
    def look():
        clips = []
        for path in tqdm(sorted(Path(folder).rglob("*")), desc=f"looking at {folder}"):
            if path.suffix.lower() in vae.VIDEOS + vae.IMAGES:
                with suppress(UserError):  # named when it is wanted
                    frames, rates = zip(*((frame.shape[1:], fps) for frame, fps in vae.read_frames(path)))
                    clips.append((len(frames), min(frames[0]), rates[0]))
        return {"clips": clips}
    clips, steps = cached(f"{data_id(folder)}-look", look)["clips"], {}
    print(f"{folder}: {len(clips)} readable clips, {sum(n / fps for n, _, fps in clips):.0f} s")
    pixels = {NETWORKS[which].checkpoint: (p.frames, NETWORKS[which].scale * p.side)
              for which, p in PAIRS.items()}
    for name in stages:
        still = name in ("vae", "clip", "image")
        frames, side = pixels.get(name, (1 if still else 16, SIDE))
        fitting = [n // frames for n, shorter, _ in clips if n >= frames and shorter >= side]
        recipe = RECIPES[name]
        if fitting:
            steps[name] = min(recipe.steps, max(200, 100 * sum(fitting) // recipe.batch))
        print(f"  {name:14s} {frames:2d} frames of {side} x {side}: {len(fitting)} clips fit, "
              + (f"{steps[name]} steps" if fitting else "so it is not trained"))
    if not steps:
        raise UserError(f"{folder} holds no clip that {', '.join(stages)} can learn from")
    return steps


def main(argv=None):
    parser = base.command_line(__doc__)
    parser.add_argument("stage", choices=[*PREPARE, "all"])
    parser.add_argument("--data", default="world", help="'world', or a folder of clips [world]")
    parser.add_argument("--lenient", action="store_true", help="train on clips whose caption is lost")
    parser.add_argument("--weights", default=WEIGHTS, help="folder, read and written [weights/]")
    parser.add_argument("--init", metavar="FILE", help="train these weights of the stage further")
    parser.add_argument("--freeze", choices=("none", "spatial", "encoder"), default="none",
                        help="base: train only temporal layers; vae: only the decoder [none]")
    parser.add_argument("--steps", type=base.positive, help="[the recipe's]")
    parser.add_argument("--batch", type=base.positive, help="samples per step [the recipe's]")
    parser.add_argument("--lr", type=float, help="learning rate [the recipe's]")
    parser.add_argument("--accumulate", type=base.positive, default=1, metavar="N",
                        help="make each batch in N parts [1]")
    parser.add_argument("--checkpointing", action="store_true", help="U-Nets: less memory, more time")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--distill", type=int, nargs=2, metavar=("TEACHER", "STUDENT"), help="superres, "
                        "ssr: do in STUDENT steps what --init does in TEACHER")
    parser.add_argument("--teacher", metavar="FILE", help="--distill: the teacher [--init]")
    parser.add_argument("--name", default="", help="runs/NAME/STAGE/ instead of runs/STAGE/")
    parser.add_argument("--fresh", action="store_true", help="ignore the checkpoint")
    args = parser.parse_args(argv)
    args.command = base.command_text("train.py", argv)
    stages = list(PREPARE) if args.stage == "all" else [args.stage]
    wrong = {"--init": args.init and args.stage == "all",
             "--freeze spatial": args.freeze == "spatial" and args.stage != "base",
             "--freeze encoder": args.freeze == "encoder" and not (args.stage == "vae" and args.init),
             "--distill": args.distill and not (args.init and args.stage.startswith(("superres", "ssr")))}
    for flag in wrong:
        if wrong[flag]:
            raise UserError(f"{flag} does not go with stage {args.stage}, or wants --init; see --help")
    if args.data != "world" and not Path(args.data).is_dir():
        raise UserError(f"{args.data}: no such folder of clips")
    for name in stages:  # before the first is trained, for hours
        batch = args.batch or RECIPES[name].batch
        if batch % (RANKS * args.accumulate):
            raise UserError(f"{name}: a batch of {batch} does not split into "
                            f"{RANKS * args.accumulate} equal parts, processes times --accumulate")
    if RANKS > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if args.device == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    steps = {} if args.data == "world" else plan(args.data, stages)
    for name in steps or stages:
        train(name, args, steps.get(name))
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    base.run(main)
