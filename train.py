"""train.py - the toy world, and one loop that trains every stage on it, or on your own clips.

    python train.py all                        all captioned stages, one after the other: days
    python train.py all --minutes 60           the same in an hour: fewer data, steps, samples
    python train.py base                       one stage, from its checkpoint if there is one
    python train.py base --data clips/         on videos with a captions.csv, or a .txt for each
    torchrun --nproc_per_node 2 train.py base  each batch shared by two processes

Stages, in order: vae; clip; prior, Make-A-Video's P; image, a text-to-image U-Net; mean-clip; base,
that U-Net on video (Make-A-Video, 3.4); interpolate; superres-low, -high; and Imagen Video's
ssr-128, ssr-256, ssr-768, tsr-32, tsr-128.

Sample i of step n is a pure function of (seed, n, i), so a stopped run goes on to the same bits.
runs/STAGE/ gets checkpoint.pt, log.csv (loss by quartile of t), the first batch as pictures and
captions, and preview.png, what the network makes of that batch.
"""
import copy
import csv
import hashlib
import io
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import base
import interpolate
import superres
import text
import vae
from base import UNet, UserError, fast_autocast, load_pt, save_pt

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm, trange

RUNS = Path(__file__).resolve().parent / "runs"
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
STILLS, CLIPS, SIDE = 64000, 16000, 64  # of the world: how many to render, and at which size
SAVE_MINUTES = 3


# ------------------------------------------------------------------------------------------------
# The toy world: one shaded shape, one motion, one quiet ground. Positions are in the unit square (x
# right, y down), times in seconds, so a scene renders at any size and frame rate. A new colour,
# shape, motion or ground is one entry at the end of its table.

SCENE_SECONDS = 3.75  # 16 frames at 4 fps, or 76 at 20

COLOURS = {"red": (230, 40, 40), "orange": (250, 140, 30), "yellow": (245, 215, 50),
           "green": (50, 190, 70), "cyan": (50, 205, 215), "blue": (50, 90, 235),
           "purple": (155, 60, 200), "pink": (245, 130, 185)}


def star(u, v):
    """One edge, from a tip at radius 1.2 to a notch at .52, mirrored and turned five times."""
    wedge = 2 * math.pi / 5
    theta = torch.remainder(torch.atan2(u, -v) + wedge / 2, wedge) - wedge / 2  # 0 is up, at a tip
    r = torch.hypot(u, v)
    a, b = r * theta.cos(), r * theta.abs().sin()
    notch_a, notch_b = .52 * math.cos(wedge / 2), .52 * math.sin(wedge / 2)
    edge = math.hypot(1.2 - notch_a, notch_b)
    return ((a - 1.2) * notch_b + b * (1.2 - notch_a)) / edge


# Signed distances to outlines of radius about 1, negative inside; u right, v down.
SHAPES = {
    "circle": lambda u, v: torch.hypot(u, v) - 1,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - .86,
    "triangle": lambda u, v: torch.maximum(v, .5 * (math.sqrt(3) * u.abs() - v)) - .6,
    "star": star,
    "cross": lambda u, v: torch.minimum(torch.maximum(u.abs() - .36, v.abs() - 1.05),
                                        torch.maximum(u.abs() - 1.05, v.abs() - .36)),
    "ring": lambda u, v: (torch.hypot(u, v) - .74).abs() - .26}
ROUND = ("circle", "ring")  # a round shape that spins stands still


@dataclass
class Motion:
    path: Callable           # (x, y, r, phase, seconds t (T,)) -> x, y, r, clockwise angle
    x: tuple = (.35, .65)    # ranges of the scene's free numbers
    y: tuple = (.35, .65)
    radius: tuple = (.10, .14)
    often: int = 1           # how many times as often as others it is drawn in training


# Motions whose frames must agree on a phase p, or show turned shapes, are drawn more often.
# Differs: the papers oversample no class.
TURN = 2 * math.pi
MOTIONS = {
    "moving left": Motion(lambda x, y, r, p, t: (x - .14 * t, y, r, 0.), x=(.68, .78), y=(.3, .7)),
    "moving right": Motion(lambda x, y, r, p, t: (x + .14 * t, y, r, 0.), x=(.22, .32), y=(.3, .7)),
    "moving up": Motion(lambda x, y, r, p, t: (x, y - .14 * t, r, 0.), x=(.3, .7), y=(.68, .78)),
    "moving down": Motion(lambda x, y, r, p, t: (x, y + .14 * t, r, 0.), x=(.3, .7), y=(.22, .32)),
    "growing": Motion(lambda x, y, r, p, t: (x, y, .07 + .17 * t / SCENE_SECONDS, 0.)),
    "shrinking": Motion(lambda x, y, r, p, t: (x, y, .24 - .17 * t / SCENE_SECONDS, 0.)),
    "bouncing": Motion(lambda x, y, r, p, t:
                       (x, .74 - .42 * (TURN / 2 * (t / 2.5 + p)).sin().abs(), r, 0.),
                       x=(.3, .7), radius=(.10, .13), often=4),
    "circling": Motion(lambda x, y, r, p, t: (x + .22 * (TURN * (t / 5 + p)).cos(),
                                              y + .22 * (TURN * (t / 5 + p)).sin(), r, 0.),
                       (.45, .55), (.45, .55), (.09, .12), often=2),
    "spinning": Motion(lambda x, y, r, p, t: (x, y, r, TURN / 6 * t + TURN * p),
                       radius=(.14, .2), often=4)}


def octaves(layers, seed: int, size: int):
    """The light of a ground: a sum of random lattices (weight, rows, columns), without aliases."""
    light = torch.zeros(size, size)
    for weight, rows, columns in layers:
        if rows <= 8 * size:  # finer ones would average out
            rng = np.random.default_rng((seed, rows, columns))
            lattice = torch.from_numpy(rng.standard_normal((1, 1, rows, columns), np.float32))
            shape = max(rows, size), max(columns, size)
            fine = F.interpolate(lattice, shape, mode="bilinear", align_corners=False)
            light = light + weight * F.adaptive_avg_pool2d(fine, size)[0, 0]
    return light


def bricks(seed: int, size: int):
    centre = (torch.arange(size) + .5) / size
    y, x = centre[:, None], centre[None, :]
    row, blur = (y * 10).floor(), max(.0045, .55 / size)  # mortar is a pixel wide at least

    def to_joint(position, period: float):
        return (torch.remainder(position / period + .5, 1) - .5).abs() * period
    joint = torch.minimum(to_joint(y, .1).expand(size, size), to_joint(x + .1 * (row % 2), .2))
    light = octaves([(.02, 10, 5), (.045, 260, 260)], seed, size)
    return light + .13 * (.0045 / blur) * torch.exp(-(joint / blur) ** 2)


def night(seed: int, size: int):
    centre = (torch.arange(size) + .5) / size
    light, seen = octaves([(.006, 6, 6)], seed, size), math.hypot(.003, .4 / size)
    stars = torch.from_numpy(np.random.default_rng((seed, 7)).uniform(size=(16, 3))).float()
    for x, y, bright in stars:  # a star smaller than a pixel keeps its light
        square = (centre[None, :] - x) ** 2 + (centre[:, None] - y) ** 2
        peak = (.4 + .6 * bright) * (.003 / seen) ** 2
        light = light + peak * torch.exp(-square / (2 * seen ** 2))
    return light


GRASS = (.014, 5, 5), (.02, 16, 64), (.056, 60, 260), (.06, 150, 600)
SAND = (.015, 4, 4), (.02, 24, 12), (.05, 190, 190), (.06, 420, 420)
GROUNDS = {  # a colour, and the light of (seed, size) that is added to it
    "": ((0, 0, 0), partial(octaves, ())),
    "on grass": ((74, 96, 66), partial(octaves, GRASS)),
    "on sand": ((158, 142, 112), partial(octaves, SAND)),
    "on bricks": ((118, 88, 80), bricks),
    "at night": ((22, 24, 35), night)}
UNSEEN_PAIRS = {("star", "circling"), ("ring", "moving up"), ("cross", "growing"),
                ("triangle", "bouncing")}


def split_of(colour: str, shape: str, motion: str) -> str | None:
    """"train"; "held-out" or "unseen" (a whole pair), which no video stage sees; None, where the
    motion is invisible."""
    if motion == "spinning" and shape in ROUND:
        return None
    if (shape, motion) in UNSEEN_PAIRS:
        return "unseen"
    c, s, m = list(COLOURS).index(colour), list(SHAPES).index(shape), list(MOTIONS).index(motion)
    return "train" if (7 * c + 3 * s + 5 * m) % 8 else "held-out"


EVERY = [(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS]
TRIPLES = {split: [triple for triple in EVERY if split_of(*triple) == split]
           for split in ("train", "held-out", "unseen")}
TRIPLES["any"] = TRIPLES["train"] + TRIPLES["held-out"] + TRIPLES["unseen"]
HARD = [(c, s, m) for c, s, m in TRIPLES["any"]  # turned shapes, and rings at the border
        if m == "spinning" or s == "ring" and m.startswith("moving")]
DRAWN = TRIPLES | {
    "train": [t for t in TRIPLES["train"] for _ in range(MOTIONS[t[2]].often)],
    "still": [t for t in TRIPLES["any"] for _ in range(4 if t in HARD else 1)]}


def caption(scene: dict, still: bool = False) -> str:
    """"a red star bouncing on grass"; a still has no motion: "a red star on grass"."""
    words = "a", scene["colour"], scene["shape"], "" if still else scene["motion"], scene["ground"]
    return " ".join(word for word in words if word)


def draw_scene(rng: np.random.Generator, split: str = "train", ground: str | None = None) -> dict:
    """A scene of a split, of "any" triple, or as "still" pictures are drawn."""
    colour, shape, motion = DRAWN[split][rng.integers(len(DRAWN[split]))]
    ranges = MOTIONS[motion]
    if ground is None:
        ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
    return {"colour": colour, "shape": shape, "motion": motion, "ground": ground,
            **{key: rng.uniform(*getattr(ranges, key)) for key in ("x", "y", "radius")},
            "phase": rng.uniform(0, 1), "seed": int(rng.integers(2 ** 31))}


def trajectory(scene: dict, times) -> tuple:
    """Where the object is at times (T,): x, y, radius and clockwise angle, each (T,)."""
    t = torch.as_tensor(times, dtype=torch.float32)
    numbers = (scene[key] for key in ("x", "y", "radius", "phase"))
    path = MOTIONS[scene["motion"]].path(*numbers, t)
    return tuple(torch.as_tensor(value, dtype=t.dtype).expand_as(t) for value in path)


def crop(video: torch.Tensor, window) -> torch.Tensor:
    """A copy of a window (left, top, side) of every frame. (..., S, S) -> (..., side, side)"""
    left, top, side = window
    return video[..., top:top + side, left:left + side].clone()


def render_ground(name: str, seed: int, size: int) -> torch.Tensor:  # (3, size, size) in 0...1
    colour, light = GROUNDS[name]
    return (torch.tensor(colour)[:, None, None] / 255 + light(seed, size)).clamp(0, 1)


def paint(scene: dict, path, size: int, window=None) -> torch.Tensor:
    """A scene's object on its ground, where `path` says, x, y, radius and angle, each (T,): frames
    (T, 3, size, size) in 0...1, or a window of them, as `crop` takes it."""
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
    ground = crop(render_ground(scene["ground"], scene["seed"], size), (left, top, side))
    return cover * (colour * shade).clamp(0, 1) + (1 - cover) * ground


def render(scene: dict, times, size: int = SIDE, window=None) -> torch.Tensor:
    """Frames of a scene at times in seconds, or a window of each. uint8 (T, 3, size, size)"""
    return (paint(scene, trajectory(scene, times), size, window) * 255).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------
# Data: from a folder (args.folder), from the toy world (args.world), or from both. What is slow to
# make is kept in runs/cache/.

def say(message: str):
    """Print once, however many processes there are."""
    if RANK == 0:
        print(message)


def digest(thing) -> str:
    """Eight hex digits for anything that its repr tells from others."""
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:8]


def cached(name: str, make: Callable) -> dict:
    """What make() returns, made by process 0 if runs/cache/NAME.pt is not there."""
    path = RUNS / "cache" / f"{name}.pt"
    if RANK == 0 and not path.is_file():
        base.check_output(path, ".pt")
        save_pt(path, make())
    while not path.is_file():  # process 0 is making it; the file appears whole
        time.sleep(1)
    return load_pt(path)


def files_of(folder, *kinds: str) -> list:
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in kinds)


@cache
def world_id() -> str:
    """Hash of how the toy world looks."""
    clips = [draw_item(np.random.default_rng(i), "clips", 16) for i in range(64)]
    grounds = [render_ground(name, 0, 128) for name in GROUNDS]
    return digest((DRAWN, [(255 * ground).byte().numpy().tobytes() for ground in grounds],
                   [(words, video.numpy().tobytes(), fps) for video, words, fps in clips]))


@cache
def folder_id(folder) -> str:
    """Hash of the names, sizes and dates of a folder's files."""
    files = files_of(folder, *vae.VIDEOS, *vae.IMAGES, ".txt", ".csv")
    stats = [(file.relative_to(folder).as_posix(), file.stat()) for file in files]
    return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def data_id(args) -> str:
    """Hash of all that a run learns from."""
    world = (world_id(), args.amount, STILLS, CLIPS) if args.world else None
    folder = folder_id(args.folder) if args.folder else None
    return digest((world, folder, SIDE, args.seed))


def draw_item(rng, kind: str, side: int) -> tuple:
    """Frames (T, 3, side, side) of a random scene, caption, fps. Half of all clips run at 4 fps and
    show a whole scene, the others at up to 30 from a random start. Stills are of any triple, most
    often from the beginning or end, when what slides is at the border. Three in four "beginnings"
    are captioned as training clips, so that stills teach words of motion.

    Differs: Make-A-Video (3.4) draws 1 to 30 fps by a beta function, high rates first; its stills
    are LAION's."""
    if kind == "clips":
        scene = draw_scene(rng, "train")
        fps = 4 * 7.5 ** max(0., rng.uniform(-1, 1))
        start = rng.uniform(0, SCENE_SECONDS - 15 / fps)
        return render(scene, start + np.arange(16) / fps, side), caption(scene), fps
    if kind == "beginnings" and rng.random() >= .25:
        scene = draw_scene(rng, "train")
        return render(scene, [0.], side), caption(scene), 1.
    scene, seconds = draw_scene(rng, "still"), SCENE_SECONDS * rng.beta(.25, .25)
    return render(scene, [seconds], side), caption(scene, still=True), 1.


def world_clips(args, kind: str, side: int):
    """Yields items of a kind, 64 at a time: pixels (n, T, 3, side, side), captions, fps (n,)."""
    key, count = (2, CLIPS) if kind == "clips" else (1, STILLS)
    numbers = range(math.ceil(args.amount * count))
    for first in trange(0, len(numbers), 64, desc=f"rendering {kind}"):
        rngs = [np.random.default_rng((args.seed, key, i)) for i in numbers[first:first + 64]]
        videos, captions, rates = zip(*(draw_item(rng, kind, side) for rng in rngs))
        yield {"pixels": torch.stack(videos), "captions": captions, "fps": torch.tensor(rates)}


def read_captions(folder: Path) -> dict:
    """{clip: caption}, from captions.csv (file,caption), or else a .txt beside the clip."""
    def plain(file):  # whichever slashes and case it is written with
        return os.path.normpath(str(file).strip().replace("\\", "/")).lower()

    def read(path: Path) -> str:
        return path.read_text("utf-8-sig").strip() if path.is_file() else ""

    table, captions, path = {}, {}, folder / "captions.csv"
    try:
        for row in csv.DictReader(io.StringIO(read(path)), strict=True):
            if None in row or not row.get("file") or row.get("caption") is None:
                raise ValueError(f"{row} is not file,caption; a caption with commas needs quotes")
            table[plain(row["file"])] = row["caption"]
        for clip in files_of(folder, *vae.VIDEOS, *vae.IMAGES):
            path = clip.with_suffix(".txt")
            captions[clip] = table.pop(plain(clip.relative_to(folder)), "") or read(path)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from error
    if table:
        message = f"{folder} has no clip for {len(table)} captions: {', '.join(list(table)[:3])}"
        if min(len(table), list(captions.values()).count("")) > len(captions) / 10:
            raise UserError(f"{message}; mend or drop these rows")
        base.warn(message)
    return captions


def look(folder) -> list:
    """(file, caption, frames, shorter side, fps) of each readable clip. Names the others once."""
    def read():
        clips, skipped = [], []
        for path, words in tqdm(read_captions(Path(folder)).items(), desc=f"looking at {folder}"):
            file = str(path.relative_to(folder))
            try:
                sides, rates = zip(*((min(x.shape[1:]), fps) for x, fps in vae.read_frames(path)))
                clips.append((file, words, len(sides), sides[0], rates[0]))
            except UserError as error:
                skipped.append(str(error))
        if skipped:
            base.warn(f"skipped {len(skipped)} files: {'; '.join(skipped[:3])}")
        return {"clips": clips}
    return cached(f"look-{folder_id(folder)}", read)["clips"]


def folder_clips(args, frames: int, side: int):
    """Yields pixels (1, frames, 3, side, side), [caption], fps (1,): middle squares of clips that
    are long and large enough, at full, half and quarter rate; or four stills a second."""
    for file, words, length, shorter, fps in look(args.folder):
        if length < frames or shorter < side:
            continue
        windows = {skip: [] for skip in ((1, 2, 4) if frames > 1 else [max(1, round(fps / 4))])}
        for i, (frame, _) in enumerate(vae.read_frames(Path(args.folder) / file, side)):
            for skip, window in windows.items():
                if i % skip == 0:
                    window.append(frame)
                if len(window) == frames:
                    yield {"pixels": torch.stack(window)[None], "captions": [words],
                           "fps": torch.tensor([fps / skip])}
                    window.clear()


def gather(args, name: str, own, world) -> dict:
    """All items of the folder and of the world as one dict of tensors (N, ...), captions (N), and
    `own`, how many are the folder's, which come first."""
    def make():
        items = list(own) if args.folder else []
        count = sum(len(item["captions"]) for item in items)
        items += world if args.world else []
        if not items:
            raise UserError(f"{args.data} holds no clip long and large enough for {name}")
        captions = [words for item in items for words in item.pop("captions")]
        tensors = {key: torch.cat([item[key] for item in items]) for key in items[0]}
        return tensors | {"captions": captions, "own": count}
    return cached(f"{name}-{data_id(args)}", make)


def stills(args, kind: str = "stills") -> dict:
    """pixels uint8 (N, 1, 3, side, side), captions, fps."""
    return gather(args, kind, folder_clips(args, 1, SIDE), world_clips(args, kind, SIDE))


def latents(args, kind: str, side: int = SIDE) -> dict:
    """Stills or clips as fp16 latents (N, T, 4, h, w), captions, fps; facts, ids of what made them;
    and what add_tokens or, with --captions none, add_embeddings adds."""
    autoencoder, vae_id = vae.load(args.weights, args.device)

    def encode(item):
        pixels = item.pop("pixels")
        return item | {"latents": vae.encode_video(autoencoder, pixels).half()}  # (n, T, 4, h, w)
    name, frames = f"{kind}-{side}-{vae_id}", 16 if kind == "clips" else 1
    data = gather(args, name, map(encode, folder_clips(args, frames, side)),
                  map(encode, world_clips(args, kind, side)))
    data["facts"] = {"vae": vae_id, "side": data["latents"].shape[-1]}
    if args.captions == "none":
        return add_embeddings(args, data, autoencoder, name)
    return add_tokens(args, data)


def add_tokens(args, data: dict, for_prior: bool = False) -> dict:
    """Adds the tokens of each distinct caption (K, L, D), rows (N,) in them, and null_tokens. P
    reads one token more, the CLIP embedding of the caption."""
    clip, tokenizer, facts = text.load(args.weights, args.device)
    distinct = sorted(set(data["captions"]))
    if RANK == 0:
        text.warn_unknown(distinct, facts["words"], ". Use words that it knows, or teach it these: "
                          f"`train.py clip --init {args.weights}/text.pt`, and train later stages "
                          "further, on these captions")

    def encode(prompts):
        tokens, embedding = text.encode(clip, tokenizer, prompts)
        return torch.cat([tokens, embedding[:, None]], dim=1) if for_prior else tokens
    tokens = torch.cat([encode(distinct[i:i + 256]) for i in range(0, len(distinct), 256)])
    row = {words: i for i, words in enumerate(distinct)}
    rows = torch.tensor([row[words] for words in data["captions"]])
    return data | {"tokens": tokens, "rows": rows, "null_tokens": encode([""]),
                   "facts": data["facts"] | {"text": facts["id"]}}


def add_embeddings(args, data: dict, autoencoder, name: str) -> dict:
    """Adds tokens (N, 1, E), CLIP embeddings of decoded first frames (P's are of the originals),
    and empties the captions."""
    clip, _, facts = text.load(args.weights, args.device)

    def make():
        frames = vae.decode_video(autoencoder, data["latents"][:, :1], "decoding")[:, 0]
        return {"tokens": text.embed_images(clip, frames)}
    decoder = base.tensors_id(autoencoder.state_dict(), ("decoder.",))
    made = cached(f"{name}-{decoder}-{facts['image_id']}-{data_id(args)}", make)
    tokens = made["tokens"][:, None]  # (N, 1, E)
    ids = {"text": facts["id"], "image_encoder": facts["image_id"]}
    return data | {"tokens": tokens, "rows": torch.arange(len(tokens)),
                   "null_tokens": torch.zeros_like(tokens[:1]),
                   "captions": [""] * len(tokens), "facts": data["facts"] | ids}


@dataclass
class Pairs:
    """What a network between pixels learns from: windows of a small clip and of a larger one."""
    frames: int
    side: int            # of the small clip
    inner: int           # of the window that is cut from it
    count: int           # of the world's
    rates: tuple = ()    # frames per second; (): from 4 to 30, log-uniform


NETWORKS = superres.STAGES | interpolate.TSR
PAIRS = {"low": Pairs(8, 64, 32, 2400), "high": Pairs(1, 256, 64, 9600),
         "tsr-32": Pairs(16, 64, 48, 3200, (8.,)), "ssr-128": Pairs(8, 64, 48, 3200, (8.,)),
         "ssr-256": Pairs(8, 128, 48, 3200, (8.,)), "tsr-128": Pairs(16, 256, 64, 1600, (16., 32.)),
         "ssr-768": Pairs(8, 256, 128, 500, (32.,))}  # small windows cost it .9 dB on whole frames


def window_about(x: float, y: float, side: int, size: int) -> tuple:
    """Left, top and side of a window about a point of the unit square, in a picture `size` wide."""
    left, top = (min(max(0, round(at * size) - side // 2), size - side) for at in (x, y))
    return left, top, side


def world_pairs(args, name: str):
    """Yields a small clip, `whole` (1, T, 3, s, s), a window of it, and as `pixels` that window of
    the large clip; captions [1], fps (1,). Most windows are about an outline."""
    p, scale, key = PAIRS[name], NETWORKS[name].scale, 6 + list(PAIRS).index(name)
    for i in trange(math.ceil(args.amount * p.count), desc="rendering pairs"):
        rng = np.random.default_rng((args.seed, key, i))
        scene = draw_scene(rng, "train")
        fps = float(rng.choice(p.rates)) if p.rates else 4 * 7.5 ** rng.random()
        start = rng.uniform(0, SCENE_SECONDS - (p.frames - 1) / fps)
        times = start + np.arange(p.frames) / fps
        x, y, radius, _ = (float(path[p.frames // 2]) for path in trajectory(scene, times))
        turn = TURN * rng.random()
        outline = x + radius * math.cos(turn), y + radius * math.sin(turn)
        window = window_about(*(outline if rng.random() < .7 else rng.random(2)), p.inner, p.side)
        large = render(scene, times, scale * p.side, [scale * n for n in window])
        yield {"whole": render(scene, times, p.side)[None], "window": window, "pixels": large[None],
               "captions": [caption(scene)], "fps": torch.tensor([fps])}


def folder_pairs(args, name: str):
    """The same from the clips of a folder, whose windows are anywhere."""
    p, scale, rng = PAIRS[name], NETWORKS[name].scale, np.random.default_rng((args.seed, 5))
    for item in folder_clips(args, p.frames, scale * p.side):
        large, window = item["pixels"][0], window_about(*rng.random(2), p.inner, p.side)
        small = F.interpolate(large.float(), (p.side, p.side), mode="area").round().byte()
        yield item | {"whole": small[None], "window": window,
                      "pixels": crop(large, [scale * n for n in window])[None]}


def pairs(args, name: str) -> dict:
    """pixels uint8 (N, T, 3, S, S), small (N, T, 3, s, s), decoded (small, as the autoencoder shows
    it if it has SIDE pixels), captions, fps (N,), facts."""
    autoencoder, facts, shown_by = None, {}, ""
    if PAIRS[name].side == SIDE:
        autoencoder, vae_id = vae.load(args.weights, args.device)
        facts, shown_by = {"vae": vae_id}, base.tensors_id(autoencoder.state_dict(), ("",))

    def cut(item):
        whole, window = item.pop("whole"), item.pop("window")
        item["small"] = crop(whole, window)
        if autoencoder:
            whole = vae.decode_video(autoencoder, vae.encode_video(autoencoder, whole))
        return item | {"decoded": crop(whole, window)}
    data = gather(args, f"{name}-{digest((PAIRS[name], shown_by))}",
                  map(cut, folder_pairs(args, name)), map(cut, world_pairs(args, name)))
    return data | {"facts": facts}


# ------------------------------------------------------------------------------------------------
# Batches. Each sample of a step has its own generator, seeded by (seed, purpose, ...). Purposes: 1
# stills, 2 clips, 3 samples, 5 masks and windows of a folder's clips, 6 and up the world's pairs.

def draw(args, step: int, samples, data: dict) -> tuple[list, list]:
    """The generator and the item of each sample; with --with-world, half are the folder's."""
    own, count = data["own"], len(data["captions"])

    def pick(rng) -> int:
        first, end = 0, count
        if 0 < own < count:
            first, end = (0, own) if rng.random() < .5 else (own, count)
        return int(rng.integers(first, end))
    rngs = [np.random.default_rng((args.seed, 3, step, i)) for i in samples]
    return rngs, [pick(rng) for rng in rngs]


def normal(rngs, shape) -> torch.Tensor:
    """Standard normal noise (N, *shape), each sample's from its own generator."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))


def middle_timesteps(rngs) -> torch.Tensor:
    """t (N,) of density sin(pi t), most often from the middle. The loss weight has the same shape,
    so a level counts by sin^2. Differs: Imagen Video draws t uniformly."""
    return torch.tensor([int(1000 * math.acos(1 - 2 * rng.random()) / math.pi) for rng in rngs])


def shifted_timesteps(rngs, shift: float = math.sqrt(16)) -> torch.Tensor:
    """t (N,), uniform and then moved by base.shift_noise, for clips of 16 frames by default."""
    times = (base.shift_noise(rng.random(), shift) for rng in rngs)
    return torch.tensor([min(999, int(1000 * time)) for time in times])


def drop_prompt(rngs, data: dict, picks: list) -> tuple[torch.Tensor, list]:
    """Tokens (N, L, D) and captions of items; one in ten is the null prompt, for guidance."""
    dropped = [rng.random() < .1 for rng in rngs]
    tokens = data["tokens"][data["rows"][picks]]
    tokens = torch.where(torch.tensor(dropped)[:, None, None], data["null_tokens"], tokens)
    captions = ["" if drop else data["captions"][i] for drop, i in zip(dropped, picks)]
    return tokens, captions


def diffusion_batch(args, data: dict, step: int, samples, timesteps=middle_timesteps) -> dict:
    """Samples of a step, as base.loss takes them, and their captions."""
    rngs, picks = draw(args, step, samples, data)
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
    share: int = 2           # of --minutes, relative to other stages
    lr_scale: float = 1.     # of both rates; --minutes decides


# Shares are a judgement: most goes to what all else stands on, and to what makes things move right.
RECIPES = {"vae": Recipe(32000, 32, 1.5e-3, share=26), "clip": Recipe(700, 128, 1e-3, share=4),
           "prior": Recipe(3000, 128, 1e-3, share=2), "image": Recipe(4500, 128, 1e-3, share=12),
           "mean-clip": Recipe(2000, 64, 5e-3, warmup=50, share=4),
           "base": Recipe(32000, 16, 4e-4, fresh_lr=1.5e-3, share=30),
           "interpolate": Recipe(10700, 16, 8e-4, share=8),
           "superres-low": Recipe(7900, 4, 2e-3), "superres-high": Recipe(9900, 8, 2e-3),
           "ssr-128": Recipe(1750, 32, 2e-3), "ssr-256": Recipe(1750, 32, 2e-3),
           "ssr-768": Recipe(4600, 2, 2e-3), "tsr-32": Recipe(3200, 16, 2e-3),
           "tsr-128": Recipe(2600, 16, 2e-3)}


@dataclass
class Setup:
    model: torch.nn.Module
    batch_of: Callable       # (step, samples) -> tensors, mostly (N, ...), and "captions" to show
    loss_of: Callable        # (model, batch) -> loss of each sample (N,)
    config: dict             # what the checkpoint says of the model
    facts: dict = field(default_factory=dict)  # ids of what it stands on, and more
    preview: Callable | None = None  # (model, batch) -> pixels uint8 or latents (B, T, C, H, W)
    finish: Callable = lambda model, config: config  # (model, config) -> the config to ship


def unet_setup(model: UNet, diffusion: base.Diffusion, loss, batch_of, facts, preview) -> Setup:
    """The Setup of a U-Net with loss(model, diffusion, batch)."""
    config = {"unet": asdict(model.config),
              "diffusion": {"schedule": diffusion.schedule, "target": diffusion.target}}
    return Setup(model, batch_of, lambda model, batch: loss(model, diffusion, batch), config, facts,
                 preview)


def generates(diffusion: base.Diffusion, data: dict, **how) -> Callable:
    """A preview: what the model makes of the prompts of a batch."""
    fps, side = data["fps"].min().item(), data["latents"].shape[-1]

    def preview(model, batch):
        text_emb = {"tokens": batch["context"], "null_tokens": data["null_tokens"]}
        return base.generate(model, diffusion, text_emb, fps=fps, side=side, **how)
    return preview


def check_same(path, then: dict, now: dict, cure: str):
    """Refuse a file that was made from something else than this run."""
    differing = [f"{key} (then {then.get(key)!s:.400}, now {now[key]!s:.400})"
                 for key in sorted(now) if then.get(key) != now[key]]
    if differing:
        raise UserError(f"{path} differs in {'; '.join(differing)}. {cure}")


def check_parent(path, made_by: dict, facts: dict):
    """Refuse weights to start from that stand on another autoencoder or text encoder."""
    ids = {"vae", "text", "image_encoder"} & facts.keys() & made_by.keys()
    check_same(path, made_by, {key: facts[key] for key in ids}, "Train it anew")


def prepare_vae(args) -> Setup:
    data, model = stills(args), vae.AutoencoderKL(vae.VAEConfig())
    if args.freeze == "encoder":  # latents stay what they are, and so does their scale
        model, _ = vae.load(args.init)
    c = model.config
    shape = c.latent_channels, SIDE // c.factor, SIDE // c.factor

    def batch_of(step, samples):
        rngs, picks = draw(args, step, samples, data)
        return {"pixels": vae.to_float(data["pixels"][picks, 0]),
                "captions": [data["captions"][i] for i in picks], "noise": normal(rngs, shape)}

    def preview(model, batch):  # originals above their reconstructions
        made = model.decode(model.encode(batch["pixels"])[0])
        return vae.to_uint8(torch.stack([batch["pixels"], made]))

    def finish(model, config):  # unit variance, measured: latent diffusion, appendix G
        if args.freeze == "encoder":
            return config
        _, picks = draw(args, 0, range(2048), data)
        pixels = vae.to_float(data["pixels"][picks, 0])  # (N, 3, side, side)
        raw = [model.encode(chunk.to(args.device))[0] for chunk in pixels.split(128)]
        return config | {"scaling_factor": (1 / torch.cat(raw).std()).item()}
    return Setup(model, batch_of, vae.loss, asdict(c), {}, preview, finish)


def prepare_clip(args) -> Setup:
    """CLIP learns from captioned stills, and words of motion from captions without images. --init
    adds new words to a trained one; --freeze text trains its image half further, on beginnings."""
    locked = args.freeze == "text"
    data = stills(args, "beginnings" if locked else "stills")
    captions = sorted(set(data["captions"])) if args.folder else []
    if args.world:  # every caption of its clips
        captions += sorted(f"a {' '.join(triple)} {ground}".strip()
                           for triple in TRIPLES["train"] for ground in GROUNDS)
    every = captions + data["captions"]
    if args.init:
        model, config = text.grow(args.init, [] if locked else every)
    else:
        vocab, merges = text.learn_tokenizer(every)
        model = text.CLIP(text.CLIPConfig(vocab_size=len(vocab), image_size=SIDE))
        config = {"clip": asdict(model.config), "tokenizer": {"vocab": vocab, "merges": merges},
                  "words": text.words_of(every)}
    first_embedding = model.text_model.embeddings.token_embedding.weight.detach().clone()  # (V, D)
    distinct, tokenizer = sorted(set(every)), text.build_tokenizer(**config["tokenizer"])
    ids_of = dict(zip(distinct, text.tokenize(tokenizer, distinct, model.config.context)))
    motion_ids = torch.stack([ids_of[words] for words in captions])  # (M, L)
    ids = torch.stack([ids_of[words] for words in data["captions"]])  # (N, L)
    if locked:
        distinct_ids, row = ids.unique(dim=0, return_inverse=True)  # (K, L), (N,)
        with torch.no_grad():
            states = model.text_model(distinct_ids)[1]  # (K, D)

    def batch_of(step, samples):
        rngs, picks = draw(args, step, samples, data)
        batch = {"pixels": vae.to_float(data["pixels"][picks, 0]),
                 "captions": [data["captions"][i] for i in picks]}
        if locked:
            return batch | {"states": states, "row": row[picks]}
        others = [rng.integers(len(motion_ids)) for rng in rngs]
        return batch | {"ids": ids[picks], "motion_ids": motion_ids[others]}

    def finish(model, config):  # known tokens stay to the bit, in spite of weight decay
        if args.init:
            old = ~torch.tensor(config.pop("new"))  # (V,)
            embedding = model.text_model.embeddings.token_embedding.weight
            embedding[old] = first_embedding[old].to(args.device)
        return config
    return Setup(model, batch_of, text.locked_loss if locked else text.loss, config, finish=finish)


def prepare_prior(args) -> Setup:
    """P learns from captioned stills which image embedding a caption has."""
    clip, _, facts = text.load(args.weights, args.device)
    data = stills(args, "beginnings") | {"facts": {"image_encoder": facts["image_id"]}}
    data = add_tokens(args, data, for_prior=True)  # (K, L + 1, D)
    data["latents"] = text.embed_images(clip, data["pixels"][:, 0])  # (N, D)
    config = text.PriorConfig(*data["tokens"].shape[1:])
    model, diffusion = text.Prior(config), base.Diffusion(target="sample")
    batch_of = partial(diffusion_batch, args, data, timesteps=partial(shifted_timesteps, shift=1.))
    return Setup(model, batch_of, lambda model, batch: text.prior_loss(model, diffusion, batch),
                 asdict(config), data["facts"])


def prepare_image(args) -> Setup:
    """Text to image; with --captions none, image embedding to image, from the weights of the former
    where they are there. Only then the skips have gates."""
    data = latents(args, "stills")
    channels = data["latents"].shape[2]
    changes = {} if args.captions == "all" else {"embeddings": ("image",), "gates": True}
    if changes and (Path(args.weights) / "image.pt").is_file():
        model, diffusion, made_by = base.load(args.weights, "cpu", "image", **changes)
        check_parent("image.pt", made_by, data["facts"])
    else:
        model = UNet(replace(base.TINY_IMAGE, context_dim=data["tokens"].shape[-1],
                             in_channels=channels, out_channels=channels, **changes))
        diffusion = base.Diffusion()
    return unet_setup(model, diffusion, base.loss, partial(diffusion_batch, args, data),
                      data["facts"], generates(diffusion, data, frames=1))


def prepare_mean_clip(args) -> Setup:
    """The mean clip of a prompt, regressed on the clips that base will see."""
    data = latents(args, "clips")
    T, C, h, w = data["latents"].shape[1:]
    config = {"context_dim": data["tokens"].shape[-1], "channels": C}
    return Setup(base.MeanClip(**config), partial(diffusion_batch, args, data), base.mean_clip_loss,
                 config, data["facts"],
                 lambda model, batch: model(batch["context"], batch["fps"], T, h, w))


def prepare_base(args) -> Setup:
    """Make-A-Video, 3.2 and 3.4: the image model, inflated, learns from video. With captions, every
    fourth step is of stills, four for each clip. Differs: Make-A-Video's clips have no captions;
    Imagen Video packs its stills into clips."""
    image, mean_clip = output_of(args, "image"), output_of(args, "mean-clip")
    if args.init and not image.is_file():
        image = Path(args.init)
        model, diffusion, made_by = base.load(image, "cpu", "base")
    else:
        new = ("attention", "conv")
        temporal = ("mean_clip", *new) if mean_clip.is_file() else new
        embeddings = ("fps",) if args.captions == "all" else ("fps", "image")
        model, diffusion, made_by = base.load(args.weights, "cpu", image.stem, "image", gates=True,
                                              temporal=temporal, embeddings=embeddings)
    side = 8 * made_by["side"]
    data = latents(args, "clips", side)
    check_parent(image, made_by, data["facts"])
    if mean_clip.is_file():
        weights = base.load_checkpoint(mean_clip, "mean-clip")
        check_parent(mean_clip, weights["made_by"], data["facts"])
        base.load_state(model.mean_clip, weights["model"], mean_clip)
    use_stills = args.freeze == "none" and args.captions == "all"
    joint = latents(args, "stills", side) if use_stills else None

    def batch_of(step, samples):
        if joint and step % 4 == 3:
            four_each = [4 * i + k for i in samples for k in range(4)]
            return diffusion_batch(args, joint, step, four_each)
        return diffusion_batch(args, data, step, samples, shifted_timesteps)
    return unet_setup(model, diffusion, base.loss, batch_of, data["facts"],
                      generates(diffusion, data, steps=16))


def prepare_interpolate(args) -> Setup:
    """Make-A-Video, 3.3: the video model learns from clips some of whose frames it is shown."""
    model, diffusion, made_by = base.load(args.weights, "cpu", "base")
    if "stage" not in made_by:  # it is Stable Diffusion's
        raise UserError(f"no base.pt yet: run `python train.py base --weights {args.weights}`")
    data = latents(args, "clips", 8 * made_by["side"])
    check_parent("base.pt", made_by, data["facts"])
    model, diffusion = interpolate.widen(model, diffusion)

    def batch_of(step, samples):
        rngs = [np.random.default_rng((args.seed, 5, step, i)) for i in samples]
        known = torch.stack([interpolate.random_known(rng) for rng in rngs])  # (N, T)
        return diffusion_batch(args, data, step, samples, shifted_timesteps) | {"known": known}

    def preview(model, batch):
        text_emb = {"tokens": batch["context"], "null_tokens": data["null_tokens"]}
        return interpolate.inpaint_window(model, diffusion, batch["latents"], batch["known"],
                                          batch["noise"], text_emb, batch["fps"])
    return unet_setup(model, diffusion, interpolate.loss, batch_of, data["facts"], preview)


def prepare_pixels(args, name: str) -> Setup:
    """A network between pixels. Every fourth step is of single frames, except for TSR, which needs
    two. Differs: Make-A-Video's SR_l is an image model first; Imagen Video's networks see whole
    blocks of whole frames, the last one crops. Here all see windows of short clips."""
    stage, diffusion = NETWORKS[name], base.Diffusion(target="sample")
    is_tsr, reads_text = name in interpolate.TSR, "text" in stage.unet.embeddings
    if args.distill:
        teacher, _, made_by = base.load(args.teacher or args.init, args.device, stage.checkpoint)
        steps, student_steps = args.distill
        if made_by.get("distill", [steps])[-1] != steps:
            raise UserError(f"the teacher takes {made_by['distill'][-1]} steps, not {steps}")
        paths = base.teacher_paths(steps, student_steps, stage.shift)  # (STUDENT, K + 1)
        stage = replace(stage, steps=student_steps)
    data = pairs(args, name)
    if reads_text:
        data = add_tokens(args, data)
        stage = replace(stage, unet=replace(stage.unet, context_dim=data["tokens"].shape[-1]))

    def loss(model, diffusion, batch):
        if args.distill:
            return superres.distillation_loss(model, teacher, diffusion, batch, stage)
        return superres.loss(model, diffusion, batch, stage)

    def batch_of(step, samples):
        rngs, picks = draw(args, step, samples, data)
        kinds = ["decoded" if rng.random() < .5 else "small" for rng in rngs]
        small = torch.stack([data[kind][i] for kind, i in zip(kinds, picks)])
        x = vae.to_float(data["pixels"][picks])  # (N, T, 3, S, S)
        if is_tsr:
            small = interpolate.double(small[:, ::2])[:, :-1]  # (N, T - 1, 6, s, s)
            x = x[:, :-1]  # nothing comes after the last frame
        elif step % 4 == 3:
            x, small = x[:, :1], small[:, :1]
        frames = 1 if stage.shared_noise else x.shape[1]
        noise = normal(rngs, (frames, *x.shape[2:])).expand_as(x)  # (N, T, 3, S, S)
        level = torch.tensor([0. if is_tsr else rng.random() for rng in rngs])
        batch = {"pixels": x, "small": vae.to_float(small), "level": level, "noise": noise,
                 "captions": [data["captions"][i] for i in picks], "fps": data["fps"][picks]}
        if args.distill:
            batch["path"] = paths[[int(rng.integers(len(paths))) for rng in rngs]]  # (N, K + 1)
            batch["t"] = batch["path"][:, 0]
        else:
            batch["t"] = shifted_timesteps(rngs, stage.shift)
        if reads_text:
            batch["context"], batch["captions"] = drop_prompt(rngs, data, picks)
        return batch

    def preview(model, batch):  # a row for each clip: what is given, ours, truth
        large = superres.enlarge(batch["small"], stage.scale, batch["level"])
        predict = superres.clean_predictor(model, large, batch["level"], batch["fps"],
                                           batch.get("context"))
        ours = diffusion.sample(predict, batch["noise"], stage.steps, "ddim", stage.shift)
        videos = large[:, :, :3], ours, batch["pixels"]
        return vae.to_uint8(torch.stack([video[:, int(is_tsr)] for video in videos], dim=1))
    return unet_setup(UNet(stage.unet), diffusion, loss, batch_of, data["facts"], preview)


PREPARE = {"vae": prepare_vae, "clip": prepare_clip, "prior": prepare_prior, "image": prepare_image,
           "mean-clip": prepare_mean_clip, "base": prepare_base, "interpolate": prepare_interpolate,
           **{network.checkpoint: partial(prepare_pixels, name=name)
              for name, network in NETWORKS.items()}}
OUTPUT = {name: f"{name}.pt" for name in PREPARE} | {"clip": "text.pt", "mean-clip": "mean_clip.pt"}
UNCAPTIONED = {"image": "make-a-video-image.pt", "mean-clip": "make-a-video-mean-clip.pt",
               "base": "make-a-video.pt"}  # what --captions none trains


def output_of(args, name: str) -> Path:
    """The weights that a stage makes."""
    names = OUTPUT | UNCAPTIONED if args.captions == "none" else OUTPUT
    return Path(args.weights) / names[name]


# ------------------------------------------------------------------------------------------------
# The loop, one for all stages

FITTED = "steps", "batch", "warmup", "lr_scale"  # of a recipe: what --minutes decides
RESTART = "Start over with --fresh, or go on from finished weights with --fresh --init FILE"


FREEZES = {  # --freeze: of which stage, and which of its parameters still train
    "none": ("", lambda name: True), "spatial": ("base", UNet.is_inflation),
    "encoder": ("vae", lambda name: name.startswith(("decoder.", "post_quant_conv."))),
    "text": ("clip", lambda name: not name.startswith("text_model."))}


def make_optimizer(model, recipe: Recipe, freeze: str) -> torch.optim.Optimizer:
    """AdamW for what --freeze leaves, with another rate for layers that an image model lacks."""
    fresh, others = [], []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and FREEZES[freeze][1](name))
        if parameter.requires_grad:
            (fresh if recipe.fresh_lr and UNet.is_inflation(name) else others).append(parameter)
    groups = [{"params": group, "base_lr": lr}
              for group, lr in ((fresh, recipe.fresh_lr), (others, recipe.lr)) if group]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(.9, .99), weight_decay=.01)


def to_device(batch: dict, device) -> dict:
    return {key: value.to(device) for key, value in batch.items() if key != "captions"}


def take_step(step: int, parts: list, model, loss_of: Callable, ema, optimizer, recipe, device):
    """One step of the optimizer and of the average, on the parts of a batch. Returns the loss and
    the noise level of each sample of this process, (N, 2)."""
    parameters, seen = list(model.parameters()), []
    for batch in parts:
        batch = to_device(batch, device)
        with fast_autocast(device):
            losses = loss_of(model, batch)  # (N,)
        (losses.mean() / len(parts)).backward()
        losses = losses.detach().float()
        seen.append(torch.stack([losses, batch.get("t", 0 * losses) / 1000], dim=1))
    if RANKS > 1:  # the mean over all processes, each of which has an equal part of the batch
        for parameter in parameters:
            if parameter.grad is not None:  # a still leaves temporal layers unused
                dist.all_reduce(parameter.grad)
                parameter.grad /= RANKS
    if not torch.nn.utils.clip_grad_norm_(parameters, 1.).isfinite():
        raise UserError(f"step {step}: the gradient is not finite, and would be again; use --fresh "
                        "and a lower --lr")
    left = (recipe.steps - step) / recipe.steps  # warm up, stay for a third, then go down to zero
    rate = recipe.lr_scale * max(0., min(1., (step + 1) / recipe.warmup, 1.5 * left))
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * rate
    optimizer.step()
    optimizer.zero_grad()
    decay = min(recipe.ema, (1 + step) / (10 + step))
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), parameters):
            average.lerp_(parameter, 1 - decay)
    return torch.cat(seen).cpu()


def ahead(make: Callable, steps, threads: int = 4):
    """make(step) for each step, in order, made ahead by threads, so that a GPU need not wait."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
        for made in waiting:
            yield made.result()


def my_parts(batch: int, args) -> list:
    """The samples of a step that this process computes, in --accumulate equal parts."""
    if batch % (RANKS * args.accumulate):
        raise UserError(f"a batch of {batch} does not split into {RANKS * args.accumulate} equal "
                        "parts, processes times --accumulate")
    return np.array_split(range(RANK, batch, RANKS), args.accumulate)


def fit_recipe(recipe: Recipe, seconds: float, setup: Setup, args) -> Recipe:
    """As many steps as fit into the time. Where neither the recipe's nor 2,000 fit, batches are
    halved, and the rate falls as their root: at first, more steps help more. Five steps of a copy
    are timed. Timings vary, so the checkpoint keeps the result."""
    model, clocks = copy.deepcopy(setup.model), [time.time()]
    optimizer = make_optimizer(model, recipe, args.freeze)
    for step in range(5):
        parts = [setup.batch_of(step, part) for part in my_parts(recipe.batch, args)]
        take_step(step, parts, model, setup.loss_of, model, optimizer, recipe, args.device)
        clocks.append(time.time())
    seconds -= clocks[5] - clocks[0]
    steps = [int(4 * seconds / (clocks[5] - clocks[1]))]  # the first is slow, one may be of stills
    if RANKS > 1:
        dist.broadcast_object_list(steps, 0)
    splits = recipe.batch > 4 and recipe.batch % (2 * RANKS * args.accumulate) == 0
    if steps[0] < min(2000, recipe.steps) and splits:
        recipe = replace(recipe, batch=recipe.batch // 2, lr_scale=recipe.lr_scale / math.sqrt(2))
        return fit_recipe(recipe, seconds, setup, args)
    steps = max(20, steps[0])
    return replace(recipe, steps=steps, warmup=min(recipe.warmup, steps // 5))


def origin_of(args, recipe: Recipe, limit: float | None) -> dict:
    """What a run is made from, except the model's config and facts. More steps are welcome."""
    flags = "seed", "freeze", "init", "teacher", "captions", "distill"
    rates = "batch", "lr", "fresh_lr", "warmup", "ema"
    return ({"data": data_id(args), "minutes": limit} | {key: getattr(args, key) for key in flags}
            | {key: getattr(recipe, key) for key in rates})


def resume(name: str, args, steps: int | None, limit: float | None) -> tuple[Recipe, dict]:
    """A stage's recipe, and what its checkpoint holds, {} at first. Refuses that of another run."""
    recipe, checkpoint = RECIPES[name], RUNS / args.name / name / "checkpoint.pt"
    lr = args.lr or recipe.lr
    recipe = replace(recipe, steps=args.steps or steps or recipe.steps, lr=lr,
                     batch=args.batch or recipe.batch, fresh_lr=recipe.fresh_lr * lr / recipe.lr)
    if args.fresh or not checkpoint.is_file():
        return recipe, {}
    state = load_pt(checkpoint)
    if limit:
        recipe = replace(recipe, **{key: state[key] for key in FITTED})
    check_same(checkpoint, state["run"], origin_of(args, recipe, limit), RESTART)
    return recipe, state


def load_init(model, setup: Setup, name: str, args):
    """--init: weights of this stage and config, on the same autoencoder and text encoder."""
    weights = base.load_checkpoint(args.init, name)
    check_parent(args.init, weights["made_by"], setup.facts)
    for part in ("unet", "diffusion"):
        check_same(args.init, weights["config"].get(part, {}), setup.config.get(part, {}),
                   "Train from other weights, or change the code back")
    mean_clip = {key: tensor for key, tensor in model.state_dict().items()
                 if key.startswith("mean_clip.")}  # just read from mean_clip.pt
    base.load_state(model, weights["model"] | mean_clip, args.init)


def write_sheet(path: Path, videos, args):
    """A picture of (B, ..., C, H, W), pixels or latents: a row for each video, or one of stills."""
    videos = videos.reshape(len(videos), -1, *videos.shape[-3:])  # (B, T, C, H, W)
    if videos.is_floating_point():
        autoencoder, _ = vae.load(args.weights, args.device)
        videos = vae.decode_video(autoencoder, videos)
    videos = videos.transpose(0, 1) if videos.shape[1] == 1 else videos
    vae.write_image(path, vae.contact_sheet(videos.cpu()))


def log_losses(path: Path, step: int, minutes: float, seen: list) -> float:
    """Logs the mean loss and that of each quartile of t. seen: losses and noise levels (N, 2)."""
    losses, levels = torch.cat(seen).unbind(1)
    quartiles = [losses[(levels * 4).long() == q].mean() for q in range(4)]
    row = [round(x.item(), 5) for x in (losses.mean(), *quartiles)]
    if RANK == 0:
        with open(path, "a") as log:
            print(step, f"{minutes:.2f}", *row, sep=",", file=log)
    return row[0]


def train(name: str, args, steps: int | None, limit: float | None):
    """Train a stage from where its checkpoint stands to the end, and write its weights. steps: what
    the folder is good for, if there is one; limit: minutes, if --minutes is given."""
    recipe, state = resume(name, args, steps, limit)
    folder, output = RUNS / args.name / name, output_of(args, name)
    checkpoint = folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    start, wrote = state.get("step", 0), str(output.resolve())
    if output.is_file() and state.get("wrote") == wrote and start >= recipe.steps:
        return say(f"{name}: already trained; use --fresh after a change of code or of an earlier "
                   "stage")
    torch.manual_seed(args.seed)
    setup = PREPARE[name](args)
    if state:
        check_same(checkpoint, state["run"], setup.config | setup.facts, RESTART)

    model = setup.model.to(args.device, memory_format=torch.channels_last).train()
    model.gradient_checkpointing = args.checkpointing
    if args.init and name != "clip":  # which grows
        load_init(model, setup, name, args)
    if limit and not state:  # a sixth is for data and pictures
        recipe = fit_recipe(recipe, 50 * limit, setup, args)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, recipe, args.freeze)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for key in parts.keys() & state.keys():
        parts[key].load_state_dict(state[key])
    loss_of = setup.loss_of
    if args.compile:
        torch.compiler.assume_constant_result(base.has_fast_bf16)  # which it cannot look into
        loss_of = torch.compile(loss_of)

    if RANK == 0:
        size = sum(p.numel() for p in ema.parameters()) / 1e6
        print(f"{name}: {size:.2f} M parameters, {recipe}")
        first = setup.batch_of(0, range(min(8, recipe.batch)))  # shows errors of range or caption
        videos = vae.to_uint8(first["pixels"]) if "pixels" in first else first["latents"]
        if videos.ndim > 2:  # P's are embeddings
            write_sheet(folder / "first_batch.png", videos, args)
        (folder / "first_batch.txt").write_text("\n".join(first["captions"]), encoding="utf-8")
        if start == 0:
            (folder / "log.csv").write_text("step,minutes,loss,t<1/4,t<1/2,t<3/4,t<1\n")
    origin = origin_of(args, recipe, limit) | setup.config | setup.facts
    began = last_save = time.time()

    def minutes() -> float:
        return state.get("minutes", 0.) + (time.time() - began) / 60

    def save(step: int, wrote: str = ""):
        save_pt(checkpoint, {key: part.state_dict() for key, part in parts.items()} | {
            "step": step, "minutes": minutes(), "wrote": wrote, "run": origin,
            **{key: getattr(recipe, key) for key in FITTED}})

    mine, seen, steps = my_parts(recipe.batch, args), [], max(start, recipe.steps)
    batches = ahead(lambda step: [setup.batch_of(step, part) for part in mine], range(start, steps))
    bar = trange(start, steps, initial=start, total=steps, desc=name, disable=RANK > 0)
    for step, batch in zip(bar, batches):
        seen.append(take_step(step, batch, model, loss_of, ema, optimizer, recipe, args.device))
        last = step + 1 == steps
        if (step + 1) % 25 == 0 or last:
            bar.set_postfix(loss=log_losses(folder / "log.csv", step + 1, minutes(), seen))
            seen.clear()
        if RANK == 0 and not last and time.time() - last_save > 60 * SAVE_MINUTES:
            save(step + 1)
            last_save = time.time()

    if RANK == 0:
        made_by = {"stage": name, "command": args.command, "steps": steps, "seed": args.seed,
                   "data": args.data, "minutes": round(minutes(), 1), **setup.facts}
        if args.distill:
            made_by["distill"] = args.distill
        with torch.inference_mode():
            base.save_checkpoint(output, setup.finish(ema, setup.config), ema, **made_by)
            save(steps, wrote)
            if setup.preview:
                videos = setup.preview(ema, to_device(first, args.device))
                write_sheet(folder / "preview.png", videos, args)
        print(f"{name}: {minutes():.1f} minutes; wrote {output}; look at {folder}")
    if RANKS > 1:
        dist.barrier()  # the next stage reads what this one wrote


# ------------------------------------------------------------------------------------------------
# The command line

def plan(args, stages: list) -> dict:
    """{stage: steps} of the stages that a folder can train: about a hundred passes, at most the
    recipe's. Prints what the folder holds, and what the other stages would need."""
    clips, steps = look(args.folder), {}
    needs = dict.fromkeys(("vae", "clip", "prior", "image"), (1, SIDE))
    needs |= {NETWORKS[key].checkpoint: (p.frames, NETWORKS[key].scale * p.side)
              for key, p in PAIRS.items()}
    say(f"{args.folder}: {len(clips)} clips, {sum(n / fps for *_, n, _, fps in clips):.0f} s; "
        f"{sum(not words for _, words, *_ in clips)} have no caption")
    for name in stages:
        frames, side = needs.get(name, (16, SIDE))
        fitting = [(n, fps) for *_, n, shorter, fps in clips if n >= frames and shorter >= side]
        verdict = "so it is not trained"
        if fitting:  # of stills, four a second are taken
            samples = sum(n // (frames if frames > 1 else max(1, round(fps / 4)))
                          for n, fps in fitting)
            batch = args.batch or RECIPES[name].batch
            steps[name] = min(RECIPES[name].steps, max(200, 100 * samples // batch))
            verdict = "trained" if args.minutes or args.steps else f"{steps[name]} steps"
        say(f"  {name:14s} {frames:2d} frames of {side} x {side}: {len(fitting)} fit, {verdict}")
    if not steps:
        raise UserError(f"{args.folder} holds no clip that {', '.join(stages)} can learn from")
    return steps


def check_autoencoder(args):
    """Say how well the autoencoder shows a folder: no later stage can be better."""
    autoencoder, _ = vae.load(args.weights, args.device)
    data = stills(args)
    x = data["pixels"][:data["own"]]  # (N, 1, 3, side, side)
    x = x[::math.ceil(len(x) / 32)]
    shown = vae.decode_video(autoencoder, vae.encode_video(autoencoder, x))
    psnr = 10 * math.log10(255 ** 2 / (shown.float() - x).square().mean())
    say(f"the autoencoder shows these clips at {psnr:.1f} dB"
        + ", which is blurred: train vae on them first" * (psnr < 20))


def read_flags(argv=None):
    parser = base.command_line(__doc__, argv, seed=False)
    flag = parser.add_argument
    flag("--seed", type=int, default=0, help="of first weights, data and samples [0]")
    flag("stage", choices=[*PREPARE, "all"])
    flag("--data", default="world", help="'world', or a folder of clips [world]")
    flag("--with-world", action="store_true", help="mix in clips of the world")
    flag("--init", metavar="FILE", help="train these weights of the stage further")
    flag("--freeze", choices=FREEZES, default="none",
         help="base: all but temporal layers; vae: the encoder; clip: the text transformer [none]")
    flag("--captions", choices=("all", "none"), default="all",
         help="none: image, mean-clip and base read the CLIP embedding of a frame instead, as in "
         "Make-A-Video [all]")
    flag("--steps", type=base.positive, help="[the recipe's]")
    flag("--minutes", type=float, help="so long for all stages together, whatever --steps says")
    flag("--batch", type=base.positive, help="samples per step [the recipe's]")
    flag("--lr", type=float, help="learning rate [the recipe's]")
    flag("--accumulate", type=base.positive, default=1, metavar="N", help="parts of a batch [1]")
    flag("--checkpointing", action="store_true", help="U-Nets: less memory, more time")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--distill", type=base.positive, nargs=2, metavar=("TEACHER", "STUDENT"),
         help="superres, ssr: do in STUDENT steps what --init does in TEACHER")
    flag("--teacher", metavar="FILE", help="--distill: the teacher [--init]")
    flag("--name", default="", help="runs/NAME/STAGE/ instead of runs/STAGE/")
    flag("--fresh", action="store_true", help="ignore the checkpoint")
    args = parser.parse_args(argv)
    args.name = args.name or "make-a-video" * (args.captions == "none")
    args.folder = None if args.data == "world" else args.data
    args.world = args.with_world or not args.folder
    return args


def check_flags(args, stages: list):
    """Refuse what cannot work before the first stage is trained for hours."""
    of_stage = FREEZES[args.freeze][0]
    rules = {
        "--seed is 0 or more": args.seed < 0,
        "--minutes and --lr are above 0":
            any(x is not None and x <= 0 for x in (args.minutes, args.lr)),
        "--init goes with one stage": args.init and args.stage == "all",
        "--with-world goes with --data FOLDER": args.with_world and not args.folder,
        f"--freeze {args.freeze} goes with {of_stage}": of_stage not in ("", args.stage),
        f"--freeze {args.freeze} wants --init":
            args.freeze in ("encoder", "text") and not args.init,
        f"--captions none goes with {', '.join(UNCAPTIONED)}":
            args.captions == "none" and not set(stages) <= UNCAPTIONED.keys(),
        "--distill goes with superres or ssr, and wants --init":
            args.distill and not (args.init and args.stage.startswith(("superres", "ssr"))),
        "--teacher goes with --distill": args.teacher and not args.distill,
        f"{args.data}: no such folder of clips": args.folder and not Path(args.folder).is_dir()}
    rules |= {f"{file}: no such file": not Path(file).is_file()
              for file in (args.init, args.teacher) if file}
    for message, broken in rules.items():
        if broken:
            raise UserError(message)
    for name in stages:
        my_parts(args.batch or RECIPES[name].batch, args)


def main(argv=None):
    args = read_flags(argv)
    every = PREPARE if args.captions == "all" else UNCAPTIONED
    stages = list(every) if args.stage == "all" else [args.stage]
    check_flags(args, stages)
    if RANKS > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if args.device == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    steps = plan(args, stages) if args.folder else dict.fromkeys(stages)
    size = sum(path.stat().st_size for path in files_of(RUNS / "cache", ".pt"))
    say(f"{RUNS / 'cache'} holds {size / 1e9:.1f} GB, and may be deleted at any time")
    limits = dict.fromkeys(steps)
    args.amount = .125 if args.with_world else 1.  # of the world
    if args.minutes:
        unit = args.minutes / sum(RECIPES[name].share for name in steps)
        limits = {name: unit * RECIPES[name].share for name in steps}
        args.amount *= min(1., unit / 6)  # all for ten hours
    if args.folder and not {"vae", "clip", "prior"} & steps.keys():
        check_autoencoder(args)
    for name in steps:  # refuse all before the first is trained for hours
        resume(name, args, steps[name], limits[name])
    for name in steps:
        train(name, args, steps[name], limits[name])
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    base.run(main)
