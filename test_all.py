"""test_all.py - tests, rulers, tables.

    python -m pytest test_all.py            what must hold whatever the weights are
    python test_all.py evaluate             the model card's tables; --weights mine/ for yours
    python test_all.py benchmark            seconds, memory and GFLOP/s per stage

Prompt fidelity is read from pixels by `describe`, by fixed rules: no trained model judges another.
"""
import json
import math
import os
import resource
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import count, cycle, islice, pairwise
from pathlib import Path

import base
import interpolate
import sample
import superres
import text
import train
import vae
from base import WEIGHTS, Diffusion, UNet, UNetConfig, UserError
from train import NETWORKS

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

SMALL = UNetConfig(channels=(16, 32), heads=2, context_dim=8, groups=4)
INTERPOLATOR = replace(SMALL, in_channels=9)
SAMPLERS = "ddim", "dpmpp", "ancestral", "stochastic"
V, X = Diffusion(), Diffusion(target="sample")
cases = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def sandbox(monkeypatch, tmp_path):
    """fp32, in an empty folder."""
    monkeypatch.setattr(base, "has_fast_bf16", lambda device: False)
    monkeypatch.setattr(train, "RUNS", Path("runs"))
    monkeypatch.chdir(tmp_path)


def close(a, b, tolerance: float = 1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, check_dtype=False)


def differ(a, b) -> bool:
    return not torch.allclose(a, b, atol=1e-2)


def randn(*shape, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(model, only=lambda name: True, scale: float = .3):
    """Random weights; zero layers hide errors."""
    for i, (name, p) in enumerate(model.named_parameters()):
        if only(name):
            is_gain, noise = p.ndim == 1 and name.endswith("weight"), randn(*p.shape, seed=i)
            p.data = noise / math.sqrt(p[0].numel()) if p.ndim > 1 else is_gain + scale * noise
    return model.eval()


def inputs(dim: int = 8):
    """A noisy video, timesteps, text and frame rates."""
    return randn(2, 5, 4, 8, 8), torch.tensor([950, 400]), randn(2, 6, dim), torch.tensor([4., 24.])


def base_batch() -> dict:
    x, t, context, fps = inputs()
    return {"latents": x, "noise": randn(*x.shape, seed=1), "t": t, "context": context, "fps": fps}


def text_emb(first: int = 0) -> dict:
    return {"tokens": randn(2, 6, 8)[first:], "null_tokens": randn(1, 6, 8, seed=1)}


def calls_of(model, call) -> list:
    """x, t, context, fps, level, cond of each call."""
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args))
    call()
    return seen


def guided_steps(model, call) -> tuple:
    """Timesteps of all calls on two videos, and of doubled ones."""
    calls = [(int(t[0]), len(t)) for _, t, *_ in calls_of(model, call)]
    return [t for t, _ in calls], [t for t, n in calls if n == 4]


# ------------------------------------------------------------------------------------------------
# base.py: the U-Net, diffusion, guidance, sampling

def test_attention_over_very_many_sequences_is_split():
    q, k, v = randn(3, 2 ** 16 + 3, 1, 2, 2)
    close(base.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


@cases("told", [(), ("image",)])
def test_temporal_layers_are_identity_at_init(told):
    image = randomize(UNet(replace(SMALL, temporal=(), gates=bool(told), embeddings=told)))
    video = UNet(replace(SMALL, embeddings=("fps", *told)))
    base.load_state(video, image.state_dict(), "", UNet.is_inflation)
    x, t, context, fps = inputs()
    frames = [image(frame, t, context) for frame in x.split(1, dim=1)]
    close(video(x, t, context, fps), torch.cat(frames, dim=1))


def test_a_gate_told_an_image_starts_open_and_stays_below_one():
    gate = base.AttentionGate(8, 8, 16)
    skip, gating, emb = randn(2, 8, 4, 4), randn(2, 8, 4, 4), randn(2, 16)
    close(gate(skip, gating, emb), torch.sigmoid(torch.tensor(3.)) * skip)
    alpha = randomize(gate)(skip, gating, emb) / skip
    assert (alpha < 1).all() and differ(alpha, gate(skip, gating, emb + 1) / skip)


def test_only_gates_whose_skip_comes_again_have_closed():
    """The first, up_blocks.0.gates.0, takes what the middle block also adds to its result."""
    (unet, *_), open_by = base.load(name="make-a-video", stage="base"), []
    for gate in unet.modules():
        if isinstance(gate, base.AttentionGate):
            gate.register_forward_hook(
                lambda _, args, out: open_by.append(out.norm() / args[0].norm()))
    with torch.inference_mode():
        unet(randn(2, 16, 4, 8, 8), torch.tensor([300, 700]), randn(2, 1, 128), torch.tensor([4., 4.]))
    assert open_by[0] < .01 and min(open_by[1:]) > .1


@cases("layer, reach", [
    (base.PseudoConv3d(8, 8, True), [1, 2, 3]), (base.TemporalAttention(8, 2), [0, 1, 2, 3, 4])])
def test_temporal_layers_relate_frames_of_one_pixel_and_know_their_order(layer, reach):
    if isinstance(randomize(layer), base.PseudoConv3d):
        torch.nn.init.dirac_(layer.weight)  # in space it does nothing
    x = randn(2 * 5, 8, 3, 4).requires_grad_()
    layer(x, 5)[5 + 2, :, 1, 3].square().sum().backward()
    seen = x.grad.unflatten(0, (2, 5)).abs().sum(2).nonzero()  # video, frame, row, column
    assert seen.tolist() == [[1, frame, 1, 3] for frame in reach]
    assert differ(layer(x[[2, 0, 4, 1, 3]], 5), layer(x[:5], 5)[[2, 0, 4, 1, 3]])


def test_every_fresh_parameter_learns():
    model, learned = UNet(SMALL), set()
    randomize(model, lambda name: "mean_clip." in name or not model.is_inflation(name)).train()
    for model.gradient_checkpointing in (False, True, True):  # one step opens a zero projection
        base.loss(model, V, base_batch()).mean().backward()
        for name, p in model.named_parameters():
            if p.grad is not None and p.grad.any():
                learned.add(name)
                p.data -= .1 * p.grad
    assert learned == {n for n, _ in model.named_parameters() if not n.startswith("mean_clip.")}


def test_fps_reaches_the_output_and_pictures_have_none():
    model, (x, t, context, fps) = randomize(UNet(SMALL)), inputs()
    for clip, heard in ((x, True), (x[:, :1], False)):
        a, b = model(clip, t, context, fps), model(clip, t, context, 2 * fps)
        assert torch.allclose(a, b) != heard


def test_mean_clip_counts_seconds_and_reads_the_last_token():
    model, context, one = randomize(base.MeanClip(8, 4)), randn(2, 6, 8), torch.ones(2)
    base.zero_module(model.fps_proj)
    slow, fast = model(context, 4 * one, 5, 2, 3), model(context, 8 * one, 9, 6, 9)
    close(slow, fast[:, ::2, :, 1::3, 1::3])  # places are shares of a side
    assert differ(slow[:, 1:], slow[:, :-1]) and differ(slow[..., 1:], slow[..., :-1])
    close(slow, model(context[:, [1, 2, 3, 4, 5, 5]], 4 * one, 5, 2, 3), 0)
    off = torch.tensor([2., 3.]).view(2, 1, 1, 1, 1)
    batch = {"context": context, "fps": 4 * one, "latents": slow + off}
    close(base.mean_clip_loss(model, batch), torch.tensor([4., 9.]))


@cases("schedule, expected", [
    ("cosine", [.9999994, .5007854, 6.1685e-7]), ("scaled_linear", [.99915, .27767, .0046601])])
def test_schedules_and_fp32_coefficients_for_fp16_z(schedule, expected):
    t, z = torch.tensor([0, 499, 999, -1]), randn(4, 2).half()
    alpha, sigma = Diffusion(schedule).alpha_sigma(t, z)
    assert alpha.dtype == sigma.dtype == torch.float32 and alpha.shape == (4, 1)
    torch.testing.assert_close(alpha[:, 0] ** 2, torch.tensor([*expected, 1]), rtol=1e-4, atol=0)
    close(alpha ** 2 + sigma ** 2, torch.ones(4, 1), 1e-6)


def test_base_loss_is_of_v_and_weighted():
    unet, batch = randomize(UNet(SMALL)), base_batch()
    x, noise, t = batch["latents"], batch["noise"], batch["t"]
    alpha, sigma = V.alpha_sigma(t, x)
    v, weight = alpha * noise - sigma * x, 2 * alpha * sigma
    made = unet(alpha * x + sigma * noise, t, batch["context"], batch["fps"])
    close(base.loss(unet, V, batch), (weight * (made - v) ** 2).mean((1, 2, 3, 4)))
    close(Diffusion(target="epsilon").loss_weight(t, x) * alpha ** 2, weight)
    close(X.loss_weight(t, x) * sigma ** 2, weight)


@cases("target", ["v", "epsilon", "sample"])
@cases("sampler", SAMPLERS)
def test_with_a_perfect_oracle_every_step_is_on_the_path(sampler, target):
    diffusion, visited, (x, noise) = Diffusion("cosine", target), [], randn(2, 3, 7).double()

    def oracle(z, t):
        visited.append(int(t[0]))
        alpha, sigma = diffusion.alpha_sigma(t, z)
        if sampler in ("ddim", "dpmpp"):  # the others replace noise
            close(z, alpha * x + sigma * noise)
        return diffusion.target_of(x, (z - alpha * x) / sigma, t)
    z = diffusion.add_noise(x, noise, torch.full((3,), 999))
    close(diffusion.sample(oracle, z, 13, sampler, step_noise=lambda i: randn(3, 7, seed=i)), x)
    assert visited == base.sampling_timesteps(13)


SHARE, MEAN, STD = torch.tensor([[.3, .7], [-2., 1.], [.3, .5]]).double()  # two Gaussians


def mixture(z, t):
    """The perfect network for a mixture: E[x | z] of each Gaussian, weighted by its likelihood."""
    alpha, sigma = X.alpha_sigma(t, z)
    var = alpha ** 2 * STD ** 2 + sigma ** 2
    likelihood = SHARE.log() - .5 * var.log() - (z - alpha * MEAN) ** 2 / (2 * var)
    means = MEAN + alpha * STD ** 2 / var * (z - alpha * MEAN)
    return (likelihood.softmax(-1) * means).sum(-1, keepdim=True)


@cases("sampler, gamma, steps, shift", [
    ("ddim", 0, 100, 4), ("dpmpp", 0, 15, 1), ("ancestral", 0, 200, 1), ("ancestral", .3, 99, 4),
    ("stochastic", 0, 200, 1)])
def test_the_exact_score_of_a_mixture_gives_its_moments(sampler, gamma, steps, shift):
    x = X.sample(mixture, randn(1, 20000, 1).double(), steps, sampler, shift, gamma,
                 lambda i: randn(1, 20000, 1, seed=i))
    mean = (SHARE * MEAN).sum()
    variance = (SHARE * (STD ** 2 + MEAN ** 2)).sum() - mean ** 2
    assert abs(x.mean() - mean) < .05 and abs(x.var() / variance - 1) < .05


def test_an_ancestral_step_is_gaussian_conditioning():
    """Of z_s = alpha_s x + noise on z_t = (alpha_t / alpha_s) z_s + fresh noise, given x."""
    (x, z, zero), (t, s) = torch.tensor([[[.4]], [[-1.3]], [[0]]]), torch.tensor([[700], [450]])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (V.alpha_sigma(n, z) for n in (t, s))
    slope = alpha_t / alpha_s
    gain = slope * sigma_s ** 2 / sigma_t ** 2  # cov(z_s, z_t) / var(z_t)
    mean = alpha_s * x + gain * (z - alpha_t * x)
    lower, upper = (1 - gain * slope) * sigma_s ** 2, sigma_t ** 2 - slope ** 2 * sigma_s ** 2
    close(V.ancestral_step(z, x, t, s, 0., zero), mean)
    for gamma, variance in ((0., lower), (1., upper), (.5, (lower * upper).sqrt())):
        close((V.ancestral_step(z, x, t, s, gamma, zero + 1) - mean) ** 2, variance)


@cases("teacher, student", [(8, 4), (16, 1)])
def test_a_distilled_student_walks_as_its_teacher_does(teacher, student):
    shift, z = superres.STAGES["high"].shift, randn(3, 50, 1).double()
    paths = base.teacher_paths(teacher, student, shift)
    assert len(paths) == student

    def distilled(z, t):
        return X.distillation_target(mixture, z, paths[paths[:, 0] == t[0]].expand(len(z), -1))
    close(X.sample(distilled, z, student, "ddim", shift), X.sample(mixture, z, teacher, "ddim", shift))


@cases("shift", [1 / 4, 1., 4.])
def test_a_shift_multiplies_sigma_over_alpha(shift):
    shifted = math.tan(math.pi / 2 * base.shift_noise(.3, shift))
    assert shifted == pytest.approx(shift * math.tan(math.pi / 2 * .3))
    t = base.sampling_timesteps(1000, shift)
    assert t[-1] >= 0 and t == sorted(set(t), reverse=True)
    assert base.sampling_timesteps(4, 2.) == [999, 869, 704, 439]


def test_dynamic_threshold_is_an_exact_percentile():
    x = 2 * randn(2, 4, 3, 8, 8)
    x[1] /= 10  # within range
    s = x[0].abs().flatten().sort().values[math.ceil(.995 * 768) - 1]
    close(base.dynamic_threshold(x), torch.stack([x[0].clamp(-s, s) / s, x[1]]), 1e-6)


def test_guidance_is_linear_in_all_channels():
    model = randomize(UNet(replace(SMALL, in_channels=7, embeddings=("fps", "level"))))
    (x, t, context, fps), null = inputs(), randn(1, 6, 8, seed=1)
    cond, level = randn(2, 5, 3, 8, 8), torch.tensor([.2, .7])
    null_only, text_only, guided = (base.classifier_free_guidance(
        model, context, null, fps, scale, cond, level)(x, t) for scale in (0, 1, 3))
    close(text_only, model(x, t, context, fps, level, cond))
    close(null_only, model(x, t, null.expand_as(context), fps, level, cond))
    close(guided, null_only + 3 * (text_only - null_only))
    assert ((guided - text_only).abs().mean((0, 1, 3, 4)) > .01).all()


def test_guidance_oscillates_in_the_second_half():
    for steps, expected in ((10, [9.] * 5 + [1., 9., 1., 9., 1.]), (3, [9., 9., 1.])):
        timesteps = base.sampling_timesteps(steps, 4.)
        assert [*map(base.oscillating_guidance(9., 1., timesteps), timesteps)] == expected


@cases("schedule", ["cosine", "scaled_linear"])
def test_guidance_is_within_an_interval_of_noise_levels(schedule):
    diffusion = Diffusion(schedule)
    log_snr = torch.logit(diffusion.alpha_bar[:1000])
    scales = [base.interval_guidance(diffusion, 3.)(t) for t in range(1000)]
    assert scales == torch.where((-2.78 <= log_snr) & (log_snr < 0), 3., 1.).tolist()
    assert base.interval_guidance(diffusion, .5)(0) == .5


def test_a_clip_is_guided_at_middling_noise_and_hears_prompt_and_fps():
    model, t = randomize(UNet(SMALL)), base.sampling_timesteps(8, 2.)  # sqrt of four frames
    picture = partial(base.generate, model, V, text_emb(), frames=1, fps=24., side=4, steps=8)
    clip = partial(picture, frames=4)
    assert guided_steps(model, clip) == (t, [n for n in t if 500 <= n < 843])
    for _, _, context, fps, *_ in calls_of(model, partial(clip, guidance=1.)):
        assert torch.equal(context, text_emb()["tokens"]) and fps.tolist() == [24, 24]
    every, guided = guided_steps(model, picture)
    assert every == guided and differ(clip(gamma=0.), clip(gamma=1.))
    close(picture(), picture(sampler="dpmpp"), 0)


@cases("sampler", SAMPLERS)
def test_a_video_does_not_depend_on_what_else_is_made(sampler, monkeypatch):
    model, noise, used = UNet(SMALL), base.initial_noise, []
    randomize(model, lambda name: not model.is_inflation(name))
    monkeypatch.setattr(base, "initial_noise", lambda *how: used.append(noise(*how)) or used[-1])
    a, b, c = (base.generate(model, V, text_emb(i), 3, 4., 4, 2., 4, sampler, seed=seed)
               for i, seed in ((0, 7), (1, 8), (1, 9)))
    close(a[1:], b)
    assert differ(b, c) and (sampler != "ancestral" or differ(used[0], used[1]))
    assert differ(a[:, 1:], a[:, :-1])


def test_every_use_of_noise_has_its_own_stream():
    uses = [(seed, stage, i) for seed in (0, 1) for stage in ("base", "low") for i in (0, 1)]
    drawn = torch.stack([base.initial_noise((1, 64), *use)[0] for use in uses])
    assert (drawn.corrcoef() - torch.eye(len(uses))).abs().max() < .6


# ------------------------------------------------------------------------------------------------
# text.py and vae.py

def test_long_prompts_and_unknown_words_are_named(capsys):
    text.main(["a red Elephant", "", "star " * 15, "日本 🙂"])
    messages, emb = capsys.readouterr().err, base.load_clip("text.pt", "text")["text"]
    assert "on: elephant, 日本\n" in messages and "only the first 14" in messages
    assert torch.equal(emb["tokens"][1], emb["null_tokens"][0])


def test_contrastive_loss_is_symmetric_and_equal_captions_all_count():
    model = randomize(text.CLIP(text.CLIPConfig(vocab_size=12, context=3)), lambda n: n != "logit_scale")
    pixels = randn(3, 3, 64, 64)
    ids = torch.tensor([[10, 1, 11], [10, 1, 11], [10, 2, 11]])
    right = torch.tensor([[.5, .5, 0], [.5, .5, 0], [0, 0, 1]])
    states = model.text_model(ids)[1]
    logits = model.similarity(pixels, states)
    of_images, of_captions = (-(right * x.log_softmax(1)).sum(1) for x in (logits, logits.T))
    loss = text.loss(model, {"pixels": pixels, "ids": ids, "motion_ids": ids.flip(0)})
    close(loss, (of_images + of_captions) / 2 + model.language_loss(ids.flip(0)), 1e-5)
    locked = text.locked_loss(model, {"pixels": pixels, "states": states, "row": torch.tensor([2, 0, 0])})
    close(locked, -logits.log_softmax(1)[[0, 1, 2], [2, 0, 0]], 1e-5)


def test_language_loss_is_of_next_tokens_and_of_all_words_from_the_last():
    model, end = randomize(text.CLIP(text.CLIPConfig(vocab_size=12, context=8))), 11
    ids = torch.tensor([[10, 3, 4] + [end] * 5, [10] + [end] * 7])
    embeddings = model.text_model.embeddings.token_embedding.weight
    tokens, last = (states @ embeddings.T for states in model.text_model(ids))  # logits
    following = [F.cross_entropy(tokens[i, :n], ids[i, 1:n + 1]) for i, n in ((0, 3), (1, 1))]
    words = -last[0].log_softmax(0)[[3, 4]].mean()
    close(model.language_loss(ids), torch.stack([following[0] + words, following[1]]))


def test_autoencoder_loss_is_weighted_reconstruction_plus_kl():
    model = randomize(vae.AutoencoderKL(vae.VAEConfig()))
    x, noise = .1 * randn(2, 3, 8, 8), randn(2, 4, 1, 1)  # so small that the KL shows
    mean, logvar = model.encode(x)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).mean((1, 2, 3))
    error = (model.decode(mean + posterior.stddev * noise) - x).abs()
    distance = (x - x.mean((2, 3), True)).abs().mean(1, True)
    reconstruction = ((1 + 50 * distance ** 2) * (error + error ** 2)).mean((1, 2, 3))
    close(vae.loss(model, {"pixels": x, "noise": noise}), reconstruction + 1e-4 * kl, 1e-6)


def test_latents_of_the_world_have_unit_variance():
    rngs = [np.random.default_rng(i) for i in range(96)]
    frames = torch.stack([train.render(train.draw_scene(rng, "any"), [1.]) for rng in rngs])
    assert abs(vae.encode_video(vae.load()[0], frames).square().mean() - 1) < .05


def test_all_256_values_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(vae.to_uint8(1.001 * vae.to_float(values)), values)


def film(frames: int = 6, H: int = 48, W: int = 64):
    """A star that slides to the right, uint8 (T, 3, H, W)."""
    scene = a_scene(motion="moving right", x=.2, y=.4, radius=.2)
    return train.render(scene, np.arange(frames) / 4, max(H, W))[..., :H, :W]


@cases("suffix, fps, W", [(".mp4", 4., 64), (".mp4", 30., 63), (".gif", 20., 64)])
def test_video_files_keep_frames_and_fps(suffix, fps, W):
    video, path = film(W=W), f"clip{suffix}"
    video[:2] = video[0]  # a gif's writer makes one long frame of these
    vae.write_video(path, video, fps)
    read, rate = vae.read_video(path)
    assert read.shape == (6, 3, 48, 64) and rate == pytest.approx(fps, abs=.01)
    assert (read[..., :W].float() - video.float()).abs().mean() < 1.5  # mirrored it is off by 18


# ------------------------------------------------------------------------------------------------
# interpolate.py

def fill(skip=1, before=0, after=0, length=16):
    """Keyframes; which frames are known; timelines; what each window is shown: z, blend, mask."""
    latents, unet, shown = randn(2, length, 4, 4, 4), randomize(UNet(INTERPOLATOR)), []
    unet.register_forward_pre_hook(
        lambda _, args: shown.append((args[0], *args[5].split([4, 1], 2))))
    x, known = interpolate.timeline(latents, skip, before, after)
    made = interpolate.fill_timeline(unet, X, x, known, text_emb(), 8., steps=1)
    return latents, known, made, shown


def test_condition_is_known_frames_their_blend_and_a_mask_of_one():
    x, known = randn(1, 8, 4, 2, 2), torch.tensor([[0, 0, 1, 0, 0, 1, 1, 0]]).bool()
    cond = interpolate.condition(torch.where(known[:, :, None, None, None], x, math.inf), known)[0]
    a, b, c = x[0, [2, 5, 6]]
    close(cond[:, :4], torch.stack([a, a, a, (2 * a + b) / 3, (a + 2 * b) / 3, b, c, c]))
    assert cond[:, 4, 0, 0].tolist() == known[0].tolist()


def test_interpolation_loss_counts_only_unknown_frames_over_their_rms():
    unet, batch = randomize(UNet(INTERPOLATOR)), base_batch()
    x, t, known = batch["latents"], batch["t"], torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 1, 0]]).bool()
    z, cond = X.add_noise(x, batch["noise"], t), interpolate.condition(x, known)
    left = x - cond[:, :, :4]
    error = unet(z, t, batch["context"], batch["fps"], None, cond) - left
    expected = [error[i][~known[i]].pow(2).mean() / left[i][~known[i]].pow(2).mean().sqrt() for i in (0, 1)]
    close(interpolate.loss(unet, X, batch | {"known": known}), torch.stack(expected), 1e-3)


@cases("skip, before, after", [(5, 0, 0), (1, 0, 20), (1, 20, 0)])
def test_known_frames_come_back_bit_identical_where_they_belong(skip, before, after):
    latents, known, made, _ = fill(skip, before, after, length=7)
    assert known.nonzero().flatten().tolist() == [before + skip * i for i in range(7)]
    assert torch.equal(made[:, known], latents) and made.shape[1] == before + 6 * skip + 1 + after
    assert (made[:, ~known] != 0).all()


@cases("skip, known", [(5, [4] + [8] * 6), (3, [6, 9, 8, 8])])  # 3: ends are left to the next window
def test_every_window_sees_what_the_one_before_made_and_shares_its_noise(skip, known):
    _, _, made, shown = fill(skip)
    assert [int(mask[0, :, 0, 0, 0].sum()) for _, _, mask in shown] == known
    close(shown[1][1][:, 1:5], made[:, 11:15])  # frames 11 to 14
    for (a, *_), (b, *_) in pairwise(shown):
        close(a[:, 10:], b[:, :6], 1e-2)  # of known frames there is a trace
        assert differ(a, b)


@cases("before, after, known", [
    (0, 15, [[*range(6)], [*range(11)]]), (15, 0, [[*range(10, 16)], [*range(5, 16)]])])
def test_a_clip_is_continued_away_from_what_is_known(before, after, known):
    *_, shown = fill(1, before, after)
    assert [mask[0, :, 0, 0, 0].nonzero().flatten().tolist() for *_, mask in shown] == known


def test_a_window_hears_its_prompt_and_its_known_frames_are_noised():
    model, (x, noise), emb = randomize(UNet(INTERPOLATOR)), randn(2, 2, 16, 4, 4, 4), text_emb()
    known, fps = (torch.arange(16) % 5 == 0).expand(2, -1), torch.tensor([8., 24.])
    inpaint = partial(interpolate.inpaint_window, model, V, x, known, noise, emb, fps)
    for z, t, context, rate, _, cond in calls_of(model, inpaint):
        close(z[known], V.add_noise(x, noise, t)[known])
        assert context is emb["tokens"] and rate is fps
        assert torch.equal(cond, interpolate.condition(x, known))
    t = base.sampling_timesteps(8)
    guided = guided_steps(model, partial(inpaint, guidance=4., steps=8))
    assert guided == (t, [n for n in t if 500 <= n < 843])


def test_training_masks_hide_and_show_something():
    masks = torch.stack([interpolate.random_known(np.random.default_rng(i)) for i in range(500)])
    assert masks.any(1).all() and not masks.all(1).any()
    regular = {tuple((torch.arange(16) % k == p).tolist()) for k in range(2, 7) for p in range(k)}
    assert regular <= set(map(tuple, masks.tolist()))
    known, start, end = masks.sum(1), masks[:, 0], masks[:, -1]
    assert 75 < (start & (known == 1)).sum() < 150  # 20 %, and chance
    assert 10 < (start & end & (known == 2)).sum() < 50  # 5 %
    assert (masks[:, :11].all(1)).sum() > 10 < (masks[:, 11:].all(1) & ~start).sum()  # runs


def test_a_fresh_interpolator_gives_the_blend():
    video = randomize(UNet(SMALL))
    model, diffusion = interpolate.widen(video, V)
    assert torch.equal(model.conv_in.weight[:, :4], video.conv_in.weight)
    x, known = interpolate.timeline(randn(2, 6, 4, 4, 4), skip=3)
    made = interpolate.fill_timeline(model, diffusion, x, known, text_emb(), 8., guidance=3.)
    close(made, interpolate.blend(x, known.expand(2, -1)), 1e-6)


def test_tsr_doubles_the_rate_and_adds_to_a_share_what_is_new():
    (unet, stage, prompt), clip = small_network("tsr-32"), torch.arange(0, 250, 50).byte()
    twice = interpolate.double(clip.view(1, 5, 1, 1, 1).expand(1, 5, 3, 8, 8))[0]
    assert twice[:, 0, 0, 0].tolist() == [0, 0, 50, 50, 100, 100, 150, 150, 200, 200]
    assert twice[:, 5, 0, 0].tolist() == [0, 50, 50, 100, 100, 150, 150, 200, 200, 200]
    base.zero_module(unet.conv_out)
    for share, new, between in ((0, 0, [0, 50, 100]), (.5, 0, [25, 75, 125]),
                                (1, 0, [50, 100, 150]), (1, .4, [101, 151, 201])):
        unet.conv_out.bias.data[:] = torch.tensor([share - .5, new]).repeat_interleave(3)
        made = superres.upscale(unet, X, stage, twice, 8., **prompt)[:, 0, 0, 0]
        assert torch.equal(made[::2], clip) and made[1:7:2].tolist() == between


# ------------------------------------------------------------------------------------------------
# superres.py

def small_network(name: str):
    """A small random network, its stage, and a prompt if it hears one."""
    stage = NETWORKS[name]
    config = replace(stage.unet, channels=(8, 8, 8), groups=4,
                     context_dim=stage.unet.context_dim and 8)
    prompt = {"context": randn(1, 6, 8), "null_context": randn(1, 6, 8, seed=1)}
    unet = randomize(UNet(config), scale=.1)
    return unet, replace(stage, unet=config), prompt if config.context_dim else {}


def noise_clip(name: str, frames: int, H: int = 8, W: int = 8):
    video = (128 + 40 * randn(frames, 3, H, W)).clamp(0, 255).byte()
    return interpolate.double(video[::2]) if name in interpolate.TSR else video


def upscale(name: str, clip, steps=1, pixels=2 ** 30, seed=0, guidance=1., **how):
    unet, stage, prompt = small_network(name)
    stage = replace(stage, chunk_pixels=pixels, steps=steps, **how)
    return superres.upscale(unet, X, stage, clip, 24., seed, **prompt, guidance=guidance).int()


def test_condition_is_enlarged_and_blurred_by_its_level():
    point, x = torch.zeros(1, 1, 3, 31, 31), torch.arange(31) - 15.
    point[..., 15, 15] = 1
    gauss = F.normalize(torch.exp(-x ** 2 / 8), p=1, dim=0)
    close(superres.blur(point, 2.)[0, 0, 0], gauss[:, None] * gauss, 2e-4)  # cut at three sigma
    small = randn(3, 2, 3, 8, 8)
    plain = F.interpolate(small.flatten(0, 1), scale_factor=4, mode="bilinear").view(3, 2, 3, 32, 32)
    made, blurred = superres.enlarge(small, 4, torch.tensor([0, .25, 1])), superres.blur(plain, 3.)
    close(made, torch.stack([plain[0], .75 * plain[1] + .25 * blurred[1], blurred[2]]), 1e-6)


@cases("name, shift, sampling_level", [
    ("low", 1 / 8, .3), ("high", 1 / 6, .3), ("ssr-128", 1 / 4, .2), ("tsr-32", 1., 0.)])
def test_training_and_sampling_tell_a_network_the_same(name, shift, sampling_level):
    unet, stage, prompt = small_network(name)
    stage, clip = replace(stage, steps=4), noise_clip(name, 2)
    small = vae.to_float(clip)[None] if stage.halo else vae.to_float(clip)[:, None]
    calls = calls_of(unet, lambda: superres.upscale(unet, X, stage, clip, 24., **prompt))
    assert [int(t[0]) for _, t, *_ in calls] == base.sampling_timesteps(4, shift)
    for _, _, context, fps, level, cond in calls:
        assert (fps == 24).all() and (level == torch.tensor(sampling_level)).all()
        assert context is prompt.get("context")
        close(cond, superres.enlarge(small, stage.scale, level))
    x, small = randn(2, 2, 3, 8 * stage.scale, 8 * stage.scale), randn(2, 2, *clip.shape[1:])
    _, t, context, fps = inputs()
    told = {"t": t, "context": context, "fps": fps, "level": torch.tensor([.5, .9])}
    batch = told | {"pixels": x, "noise": randn(*x.shape, seed=1), "small": small}
    z, cond = X.add_noise(x, batch["noise"], t), superres.enlarge(small, stage.scale, told["level"])
    out = unet(z, cond=cond, **told)
    if name != "tsr-32":
        close(superres.loss(unet, X, batch, stage), (cond + out - x).pow(2).mean((1, 2, 3, 4)))
    for key, value in told.items():  # what reaches the output?
        heard = {"context": bool(prompt), "t": True}.get(key, key in stage.unet.embeddings)
        assert differ(unet(z, cond=cond, **told | {key: value.flip(0)}), out) == heard, key


def test_a_guided_clip_is_one_chunk_and_thresholded(monkeypatch):
    clip, shapes = noise_clip("tsr-32", 100), []
    monkeypatch.setattr(base, "dynamic_threshold", lambda x: shapes.append(tuple(x.shape)) or 0 * x)
    upscale("tsr-32", clip, pixels=1)
    assert not shapes and upscale("tsr-32", clip, 2, 1, guidance=4.).unique().item() == 128
    assert shapes == [(1, 100, 3, 8, 8)] * 2


def test_shared_noise_keeps_a_static_clip_static_and_seeds_differ():
    assert {name for name in NETWORKS if NETWORKS[name].shared_noise} == {"low", "high"}
    still = noise_clip("high", 1).expand(5, -1, -1, -1)
    for name, shared in (("high", True), ("high", False), ("ssr-128", False)):
        a, b = (upscale(name, still, seed=seed, shared_noise=shared) for seed in (3, 4))
        static = (a[1:] - a[:-1]).abs().max() <= 1
        assert static == shared and (a - b).abs().max() > 1


@cases("name", ["low", "high", "ssr-128", "tsr-128", "ssr-768"])
def test_upscaling_in_chunks_is_upscaling_whole(name):
    stage = NETWORKS[name]
    clip, H, W = noise_clip(name, 50, 9, 11), 9 * stage.scale, 11 * stage.scale  # padded, cropped
    for steps, chunk in ((2, 7), (1, 23)):  # 2 steps: the halo, 44, is the smallest chunk
        whole, parts = (upscale(name, clip, steps, n * H * W) for n in (50, chunk))
        assert (whole - parts).abs().max() <= 1 and whole.shape == (50, 3, H, W)


@cases("name", ["low", "high", "ssr-128", "tsr-128", "ssr-768"])
def test_how_far_a_network_sees(name):
    stage, context, one = NETWORKS[name], randn(1, 2, 128), torch.ones(1)
    unet = randomize(UNet(stage.unet))

    def reach(T, H, W, at):
        """The farthest frame and column that change frame `at`, column 0 of the output."""
        x = randn(1, T, stage.unet.in_channels, H, W).requires_grad_()
        unet(x, one, context, one, one)[0, at, :, 0, 0].sum().backward()
        _, frames, _, _, columns = x.grad.nonzero().unbind(1)
        return (frames - at).abs().max(), columns.max()
    assert 8 * (stage.halo > 0) <= reach(50, 8, 8, 25)[0] <= stage.halo
    if not any(stage.unet.attention):  # local, so trained on windows
        assert 8 < reach(1, 16, 768, 0)[1] < 384


def test_a_student_starts_where_its_teacher_is():
    (unet, stage, _), (teacher, *_) = small_network("high"), small_network("high")
    x, path = randn(2, 1, 3, 24, 24), torch.tensor([[999, 300], [120, -1]])  # of one step each
    batch = {"pixels": x, "noise": randn(*x.shape, seed=1), "small": randn(2, 1, 3, 8, 8),
             "level": torch.tensor([.5, .75]), "fps": torch.ones(2), "path": path}
    loss = superres.distillation_loss(unet, teacher, X, batch, stage)
    loss.sum().backward()
    assert loss.max() < 1e-6 and teacher.conv_out.weight.grad is None
    batch["pixels"] = torch.ones_like(x)  # without texture the truth teaches
    assert superres.distillation_loss(unet, teacher, X, batch, stage).min() > 1e-3


# ------------------------------------------------------------------------------------------------
# Stable Diffusion, against the libraries that made it

@pytest.fixture(scope="session")
def stable(tmp_path_factory):
    """A small random Stable Diffusion 1.x folder, and the models that wrote it."""
    diffusers, transformers = map(pytest.importorskip, ("diffusers", "transformers"))
    folder = tmp_path_factory.mktemp("sd")
    vocab, merges = text.learn_tokenizer(["a horse on the moon"])
    torch.manual_seed(0)
    models = {"unet": diffusers.UNet2DConditionModel(
        8, block_out_channels=(16, 32), cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))}
    models["vae"] = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    models["text_encoder"] = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, eos_token_id=len(vocab) - 1))
    for part, model in models.items():
        model.eval().save_pretrained(folder / part, variant="fp16" if part == "vae" else None)
    file = folder / "vae/diffusion_pytorch_model.fp16.safetensors"
    state = base.load_file(file)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f".{new}.", f".{old}."): x for name, x in state.items()}
    save_file(state, file)  # with the names of 2022
    (folder / "tokenizer").mkdir()
    files = folder / "tokenizer/vocab.json", folder / "tokenizer/merges.txt"
    files[0].write_text(json.dumps(vocab))
    files[1].write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    return Namespace(folder=folder, tokenizer=transformers.CLIPTokenizer(*map(str, files)), **models)


def test_stable_diffusion_gives_the_same_numbers_and_a_picture(stable):
    ours, diffusion, _ = base.load(stable.folder)
    assert (diffusion.schedule, diffusion.target) == ("scaled_linear", "epsilon")
    (x, t, context, fps), pixels = inputs(dim=32), randn(2, 3, 32, 32)
    frames = [stable.unet(frame, t, context).sample for frame in x.unbind(1)]
    close(ours(x, t, context, fps), torch.stack(frames, dim=1))
    autoencoder, theirs = vae.load(stable.folder)[0], stable.vae.encode(pixels).latent_dist
    close(autoencoder.encode(pixels), (theirs.mean, theirs.logvar))
    close(autoencoder.decode(theirs.mean), stable.vae.decode(theirs.mean).sample)
    ids = torch.arange(48).view(2, 24)
    states = stable.text_encoder(ids).last_hidden_state
    close(text.load(stable.folder)[0].text_model(ids)[0], states)
    sample.main(f"horse --weights {stable.folder} --frames 1 --until base -o a.png".split())
    assert vae.read_video("a.png")[0].shape == (1, 3, 16, 16)


@cases("sampler, scheduler", [("ddim", "DDIMScheduler"), ("dpmpp", "DPMSolverMultistepScheduler")])
@cases("target, name", [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_samplers_equal_those_of_diffusers(sampler, scheduler, target, name):
    scheduler = getattr(pytest.importorskip("diffusers"), scheduler).from_config({
        "beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "prediction_type": name, "timestep_spacing": "trailing", "final_sigmas_type": "zero"})
    scheduler.set_timesteps(20)
    z = randn(1, 4, 8, 8)

    def predict(z, t):
        return (3 * z + t / 1000).sin()
    made = Diffusion("scaled_linear", target).sample(predict, z, 20, sampler)
    for t in scheduler.timesteps:
        z = scheduler.step(predict(z, t), t, z).prev_sample
    close(made, z, 1e-3)


def test_token_ids_equal_those_of_clip(stable):
    parts = ["HORSE", "moon's", "café", "3.14", "!?", "  ", "\t\n", "日本語", "🦄", "ﬁ",
             "İstanbul", "e\u0301", "<|endoftext|>", "x_y", "\u00a0", "\u200b", ""]
    rng, ours = np.random.default_rng(0), text.load(stable.folder)[1]
    prompts = [" ".join(rng.choice(parts, rng.integers(1, 9))) for _ in range(300)]
    theirs = stable.tokenizer(prompts, padding="max_length", max_length=24, truncation=True)
    assert text.tokenize(ours, prompts, 24).tolist() == theirs["input_ids"]


# ------------------------------------------------------------------------------------------------
# Files and the command line

@pytest.fixture
def weights():
    """Flags for small random weights, whose base makes 16 x 16 pixels."""
    os.mkdir("w")
    for name in ("text.pt", "vae.pt"):
        os.symlink(WEIGHTS / name, f"w/{name}")
    made_by = base.load_pt(WEIGHTS / "base.pt")["made_by"] | {"side": 2}
    models = {s.checkpoint: replace(s.unet, channels=(8,) * 3, groups=4) for s in NETWORKS.values()}
    models["base"] = replace(SMALL, context_dim=128)
    models["interpolate"] = replace(INTERPOLATOR, context_dim=128)
    for name, config in models.items():
        diffusion = {"target": "v" if name == "base" else "sample"}
        base.save_checkpoint(f"w/{name}.pt", {"unet": asdict(config), "diffusion": diffusion},
                             randomize(UNet(config), scale=.05), **made_by | {"stage": name})
    return ["--weights", "w", "--device", "cpu"]


@cases("cascade, stages, shape, fps", [
    ("make-a-video", "base interpolate decode low high", (2, 6, 3, 192, 192), 20),
    ("imagen-video", "base decode tsr-32 ssr-128 ssr-256 tsr-64 tsr-128 ssr-768",
     (2, 16, 3, 192, 192), 32)])
def test_the_pipeline_by_hand_is_the_cascade(weights, cascade, stages, shape, fps):
    flags = ["--frames", "2", "--cascade", cascade, "--out", "made", "--keep", "kept", *weights]
    sample.main(["a Red star!", "ring", "--seed", "3", *flags])
    assert sorted(os.listdir("made")) == ["a-red-star.mp4", "ring.mp4"]
    text.main(["a Red star!", "ring", "-o", "text.pt", *weights])
    commands = {
        "base": "base --frames 2", "interpolate": "interpolate --skip 5", "decode": "vae decode",
        "tsr-32": "interpolate --double tsr-32", "tsr-64": "interpolate --double tsr-128",
        "tsr-128": "interpolate --double tsr-128"}
    for last, stage in pairwise(["text", *stages.split()]):
        command = commands.get(stage, f"superres {stage}")
        script, *argv = f"{command} {last}.pt -o {stage}.pt".split()
        globals()[script].main(argv + weights + ["--seed", "3"] * (script != "vae"))
        ours, theirs = (base.load_pt(f"{folder}/{stage}.pt") for folder in (".", "kept"))
        assert torch.equal(ours["data"], theirs["data"]) and ours["fps"] == theirs["fps"], stage
    assert (ours["data"].shape, ours["fps"]) == (shape, fps)
    assert len(ours["history"]) == 1 + len(stages.split())
    sample.main(["ring", "--seed", "4", *flags])  # whatever else is made
    again = base.load_pt(f"kept/{stage}.pt")["data"][0]
    assert (again.int() - ours["data"][1]).abs().max() <= 1


def test_an_image_is_animated(weights):
    vae.write_videos("a.png", film(1, 40, 60)[None], 1.)
    sample.main("star star --animate a.png --frames 20 --until base --keep kept".split() + weights)
    small = F.interpolate(film(1, 40, 60).float(), (16, 24), mode="bilinear", antialias=True)
    first = vae.encode_video(vae.load()[0], small.round().byte()[None])
    z = base.load_pt("kept/base.pt")["data"]
    assert z.shape == (2, 20, 4, 2, 3) and torch.equal(z[:1, :1], first)
    assert sorted(os.listdir("out")) == ["star-0.mp4", "star-1.mp4"]


@cases("main, argv, message", [
    (vae.main, "decode code.pt -o o.mp4", "code.pt is damaged, foreign or a Git-LFS pointer"),
    (vae.main, "decode text.pt -o o.mp4", "holds text, not latents; make one with `python base"),
    (vae.main, "decode inf.pt -o o.mp4", "needs finite data (B, T, C, H, W)"),
    (vae.main, "decode other.pt -o o.mp4", "vae other"),
    (vae.main, "decode z.pt -o o.mp4 --weights no.pt", "python train.py vae"),
    (vae.main, "decode z.pt -o o.mp4 --weights text.pt", "not vae"),
    (vae.main, "encode a.mp4 -o o.pt", "cannot be read"),
    (base.main, "text.pt -o o.mp4", "extension"),
    (interpolate.main, "z.pt --skip 7", "it takes 2 frames and a skip of 2 to 6"),
    (base.main, "text.pt --weights thin.pt", "does not fit"),
    (train.main, "all --batch 12 --accumulate 5", "a batch of 12 does not split into 5")])
def test_a_mistake_is_one_line_and_writes_nothing(capsys, monkeypatch, main, argv, message):
    monkeypatch.setattr(train, "train", pytest.fail)
    words = text.encode_clip(["a red star"])
    z = words | {"kind": "latents", "data": randn(1, 2, 4, 8, 8), "vae": vae.load()[1]}
    for name, content in {"text": words, "z": z, "code": z | {"code": os.mkdir},
                          "inf": z | {"data": z["data"] / 0}, "other": z | {"vae": "other"},
                          "thin": base.load_pt(WEIGHTS / "base.pt") | {"model": {}}}.items():
        torch.save(content, f"{name}.pt")
    Path("a.mp4").write_text("dear diary")
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as stop:
        base.run(lambda: main(argv.split()))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1
    assert sorted(os.listdir()) == before


# ------------------------------------------------------------------------------------------------
# train.py, Make-A-Video's P, and its video network that reads no words

def a_scene(shape: str = "star", motion: str = "spinning", **changes) -> dict:
    return {"colour": "red", "shape": shape, "motion": motion, "ground": "", "x": .5, "y": .5,
            "radius": .3, "phase": 0., "seed": 0} | changes


def args_of(**changes):
    """What train.main hands to a stage."""
    return Namespace(**vars(train.read_flags(["base"])) | {"device": "cpu", "amount": 1} | changes)


def test_held_out_triples_and_unseen_pairs():
    pairs = "star circling", "ring moving up", "cross growing", "triangle bouncing"
    for n, (c, s, m) in enumerate(train.EVERY):  # 8 colours x 6 shapes x 9 motions
        split = "train" if (7 * (n // 54) + 3 * (n // 9 % 6) + 5 * (n % 9)) % 8 else "held-out"
        split = "unseen" if f"{s} {m}" in pairs else split
        assert train.split_of(c, s, m) == (None if s in train.ROUND and m == "spinning" else split)


def test_what_video_stages_draw_and_when(monkeypatch):
    shown, args = [], args_of(amount=.25)
    monkeypatch.setattr(train, "render", lambda *a: shown.append(a[1]) or torch.zeros(1))
    items = [*train.world_clips(args, "clips", 64), *train.world_pairs(args, "tsr-128")]
    lines = [line for item in items for line in item["captions"]]
    rates = torch.cat([item["fps"] for item in items])
    seen = {f"a {' '.join(t)} {g}".strip() for t in train.TRIPLES["train"] for g in train.GROUNDS}
    assert len(lines) == 4400 and set(lines) <= seen
    for fps, times in zip(rates, shown[:4000] + shown[4000::2]):  # of a pair two are rendered
        assert np.allclose(np.diff(times), [1 / fps] * 15, atol=1e-5)
        assert times[0] >= 0 and times[-1] < 3.7501
    rates = rates[:4000]
    assert abs((rates == 4).float().mean() - .5) < .03 and 29 < rates.max() <= 30


@cases("motion, what, values", [
    ("moving left", 0, (.3125, .05)), ("moving right", 0, (.4875, .75)),
    ("moving up", 1, (.5125, .25)), ("moving down", 1, (.6875, .95)), ("growing", 2, (.098, .183)),
    ("shrinking", 2, (.2117, .1267)), ("bouncing", 1, (.32, .4430)),
    ("spinning", 3, (2.2253, 4.1888)), ("circling", slice(2), ((.2444, .4), (.7556, .38)))])
def test_things_move_as_the_words_say(motion, what, values):
    expected = torch.tensor([.4, .6, .3, 0])[:, None].repeat(1, 2)  # (4, T): x, y, radius, angle
    expected[what] = torch.tensor(values)
    scene = a_scene(motion=motion, x=.4, y=.6, phase=.25)
    path = torch.stack(train.trajectory(scene, torch.tensor([.625, 2.5])))
    assert (path - expected).abs().max() < 5e-4


@cases("shape, u, v", [
    ("circle", [.6, -1], [.8, 0]), ("square", [.86, -.2], [.3, -.86]),
    ("triangle", [0, -1.03923], [-1.2, .6]), ("ring", [.6, 0], [.8, .48]),
    ("star", [0, .305648, -1.141268], [-1.2, -.420689, -.37082]),
    ("cross", [.36, -.7, 0, 1.05], [.7, .36, -1.05, 0])])
def test_shapes_stand_upright_turn_clockwise_and_are_shaded(shape, u, v):
    assert train.SHAPES[shape](torch.tensor(u), torch.tensor(v)).abs().max() < 1e-5
    upright, turned = (train.render(a_scene(shape, phase=p), [0.])[0] for p in (0, .25))
    assert ((turned > 99) ^ (upright > 99).rot90(-1, (1, 2))).sum() < 70
    assert shape != "cross" or upright[:, 31, 24].tolist() == [224, 39, 39]


@cases("ground", train.GROUNDS)
def test_a_scene_is_the_same_at_any_size_and_in_a_window(ground):
    scene, window = a_scene(ground=ground), train.window_about(.3, .9, 40, 96)
    small, large, whole = (train.render(scene, [0., .5], size).float() for size in (64, 768, 96))
    assert (F.avg_pool2d(large, 12) - small).abs().mean() < (2 if ground else .2)
    cut = train.render(scene, [0., .5], 96, window)
    assert window == (9, 56, 40) and torch.equal(cut.float(), whole[..., 56:, 9:49])


def test_stars_at_night_are_points():
    bright = train.render_ground("at night", 0, 256).mean(0) > .3
    assert bright.sum() < 400 and min(bright.any(0).sum(), bright.any(1).sum()) > 16


def test_folders_of_clips(capsys, monkeypatch):
    shade = torch.arange(0, 256, 4, dtype=torch.uint8)
    wide = F.pad(shade.view(64, 1, 1, 1).expand(-1, 3, 32, 32), (16, 16))
    for name, video in zip("abcd", (wide, wide[:16], wide[:15], wide[:, :, :14])):
        vae.write_video(f"{name}.mp4", video, 20.)  # c is short, d is low
    Path("e.mp4").touch()
    Path("captions.csv").write_text("\ufefffile,caption\n.\\A.mp4,schön\n", "utf-8")  # by Windows
    Path("b.txt").write_text("a thing\n")
    monkeypatch.setattr(train, "SIDE", 32)
    clips = [(item["pixels"][0], item["captions"], item["fps"].item())
             for item in train.folder_clips(args_of(folder="."), 16, 16)]
    for skip, n in ((1, 4), (2, 2), (4, 1)):  # frames skipped, windows of a.mp4
        windows = [clip for clip, *about in clips if about == [["schön"], 20 / skip]]
        for clip, shades in zip(windows, shade[::skip].view(n, 16), strict=True):
            assert (clip.float().mean((1, 2, 3)) - shades).abs().max() < 4  # of middle squares
    assert len(clips) == 8 and clips[-1][1:] == (["a thing"], 20)
    assert "skipped 1 files: e.mp4" in capsys.readouterr().err
    args = train.read_flags("all --data . --batch 1".split())
    steps = train.plan(args, ["vae", "base", "superres-high"])
    assert steps == {"vae": 1800, "base": 500}  # no clip is large enough for the third
    assert "4 clips, 8 s; 2 have no caption" in capsys.readouterr().out


@cases("rows, message", [("file,caption\na.png,red, round\n", "a caption with commas needs quotes"),
                         ("name,text\na.png,red\n", "is not file,caption"),
                         ("file,caption\nb.png,red\n", "has no clip for 1 captions: b.png; mend")])
def test_a_wrong_table_of_captions_is_named(rows, message):
    Path("a.png").touch()
    Path("captions.csv").write_text(rows)
    with pytest.raises(UserError, match=message):
        train.read_captions(Path())


def test_pairs_agree_and_their_cache_follows_the_world(monkeypatch):
    vae.write_video("a.mp4", film(6, 256, 256), 20.)
    monkeypatch.setattr(train, "world_id", train.world_id.__wrapped__)
    pairs = replace(train.PAIRS["ssr-256"], frames=2, count=6, inner=24)
    monkeypatch.setitem(train.PAIRS, "ssr-256", pairs)
    for red in ((230, 40, 40), (230, 40, 40), (0, 0, 255)):
        monkeypatch.setitem(train.COLOURS, "red", red)
        made = train.pairs(args_of(folder="."), "ssr-256")
    assert len(list(Path("runs/cache").glob("ssr-256*.pt"))) == 2
    assert made["pixels"].shape == (11, 2, 3, 48, 48)  # five windows of the folder's clip
    small = F.avg_pool2d(made["pixels"].flatten(0, 1).float(), 2).view_as(made["small"])
    assert (small - made["small"].float()).abs().mean((1, 2, 3, 4)).max() < 3.5


def numbered(n: int) -> dict:
    i = torch.arange(float(n))  # clip i is all i, at i fps, with i as caption and token
    return {"latents": i.view(n, 1, 1, 1, 1).expand(n, 2, 4, 2, 2), "rows": i.long().flip(0),
            "tokens": i.flip(0).view(n, 1, 1).expand(n, 6, 8), "null_tokens": -torch.ones(1, 6, 8),
            "fps": i, "captions": [str(k) for k in range(n)], "own": 0, "facts": {}}


def test_a_sample_is_a_function_of_seed_step_and_number():
    def batch(samples=range(999), step=9, **args):
        return train.diffusion_batch(args_of(**args), numbered(50), step, samples)
    whole, part, later, other = batch(), batch(range(4, 8)), batch(step=10), batch(seed=1)
    for key in ("latents", "noise", "t", "fps", "context"):
        assert torch.equal(whole[key][4:8], part[key])
        assert (whole[key] != later[key]).any() and (whole[key] != other[key]).any()
    clips, fps, heard = whole["latents"][:, 1, 1, 1, 1], whole["fps"], whole["context"][:, 0, 0]
    assert torch.equal(clips, fps) and (heard == fps)[heard >= 0].all() and len(fps.unique()) == 50
    assert abs((heard < 0).float().mean() - .1) < .03 and len(whole["noise"].unique(dim=0)) == 999
    picks = train.draw(args_of(), 0, range(999), numbered(50) | {"own": 2})[1]  # --with-world
    assert abs(sum(i < 2 for i in picks) - 500) < 60


@cases("name, median", [("low", 79), ("ssr-128", 156), ("tsr-32", 500)])
def test_batches_of_networks_between_pixels(name, median, monkeypatch):
    data, side, is_tsr = numbered(40), 4 * NETWORKS[name].scale, name == "tsr-32"
    clips = (data["fps"][:, None] + 50 * torch.arange(4)).byte().view(40, 4, 1, 1, 1)
    small = clips.expand(40, 4, 3, 4, 4)
    data |= {"small": small, "decoded": small + 1, "pixels": clips.expand(40, 4, 3, side, side)}
    monkeypatch.setattr(train, "pairs", lambda *a: data)
    monkeypatch.setattr(train, "add_tokens", lambda *a: data)
    batch_of = train.prepare_pixels(args_of(), name).batch_of
    batch = batch_of(2, range(200))
    item, given = (vae.to_uint8(batch[key])[..., 0, 0].int() for key in ("pixels", "small"))
    decoded = given[:, ::2, 0] - item[:, ::2, 0]  # of (N, T, C)
    assert torch.equal(decoded[:, 0], decoded[:, 1]) and abs(decoded.float().mean() - .5) < .1
    assert torch.equal(batch["fps"], item[:, 0, 0].float())
    assert abs((batch["t"] < median).sum() - 100) < 20
    assert batch_of(3, range(4))["small"].shape[1] == (3 if is_tsr else 1)
    assert not is_tsr or (given[:, 1, 3:] - given[:, 1, :3] == 100).all()
    shared = (batch["noise"][:, 0] == batch["noise"][:, 1]).flatten(1).all(1)
    assert shared.all() if name == "low" else not shared.any()


def steep(model, batch):
    return 3 * model.spatial + 4 * model.temporal + 0 * batch["t"]


@pytest.fixture
def two_run(monkeypatch):
    """Trains two numbers, one of a new layer; returns the checkpoint."""
    monkeypatch.setattr(train, "SAVE_MINUTES", 0)

    def batch_of(step, samples):
        return {"pixels": torch.zeros(len(samples), 3, 8, 8), "captions": ["a"] * len(samples),
                "t": torch.tensor([100, 300, 600, 900])[np.array(samples) % 4]}

    def run(loss_of, argv: str = "", config=1, vae=1, **recipe):
        model = torch.nn.ParameterDict({"spatial": torch.zeros(1), "temporal": torch.zeros(1)})
        setup = train.Setup(model, batch_of, loss_of, {"diffusion": {"target": config}}, {"vae": vae})
        recipe = train.Recipe(**{"steps": 1, "batch": 4, "lr": .01} | recipe)
        monkeypatch.setitem(train.PREPARE, "base", lambda args: setup)
        monkeypatch.setitem(train.RECIPES, "base", recipe)
        train.main(f"base --weights . --device cpu {argv}".split())
        return base.load_pt("runs/base/checkpoint.pt")
    return run


@cases("argv, spatial, temporal", [
    ("", .01, .03), ("--lr .005", .005, .015), ("--freeze spatial", 0, .03)])
def test_rates_of_new_and_frozen_layers(argv, spatial, temporal, two_run):
    model = two_run(steep, argv, steps=4, fresh_lr=.03, warmup=2)["model"]
    went = .5 + 1 + .75 + .375  # the schedule; Adam steps by the rate
    moved = [-model[name].item() / went for name in ("spatial", "temporal")]
    assert moved == pytest.approx([spatial, temporal], rel=1e-2)


def test_accumulation_clipping_average_and_log(two_run):
    def gentle(model, batch):
        level = batch["t"] / 1000
        return level + level * model.spatial + level ** 2 * model.temporal
    for loss, ema, share, norm in ((steep, .05, .95, [.6, .8]), (gentle, .999, .9, [.475, .3175])):
        state = two_run(loss, "--fresh --accumulate 2", ema=ema)
        moments = [10 * m["exp_avg"].item() for m in state["optimizer"]["state"].values()]
        assert moments == pytest.approx(norm, rel=1e-3)  # clipped to a norm of 1
        close(state["ema"]["spatial"], share * state["model"]["spatial"], 1e-6)
    row = Path("runs/base/log.csv").read_text().split()[1].split(",")
    assert row[2:] == ["0.475", "0.1", "0.3", "0.6", "0.9"]  # the mean, and by quartile of t


@cases("argv, changes, message", [
    ("--lr .02", {}, r"lr \(then 0.01, now 0.02\).*--fresh.*--init"),
    ("", {"config": 2}, "diffusion"),
    ("--fresh --init base.pt", {"vae": 2}, r"vae \(then 1, now 2\)"),
    ("--fresh --init base.pt", {"config": 2}, r"base.pt differs in target \(then 1, now 2\)")])
def test_a_run_goes_on_only_as_it_began(argv, changes, message, two_run):
    assert two_run(steep)["step"] == two_run(steep)["step"] == 1
    with pytest.raises(UserError, match=message):
        two_run(steep, argv, steps=3, **changes)
    assert two_run(steep, steps=3)["step"] == 3


def test_a_run_stops_where_the_gradient_is_not_finite_and_goes_on_in_time(two_run):
    losses = iter([1] * 22 + [math.nan])  # five are timed of 8 samples, and five of 4
    short = {"argv": "--minutes .002", "steps": 3000, "batch": 8}
    with pytest.raises(UserError, match="step 12: the gradient is not finite"):
        two_run(lambda *a: next(losses) * steep(*a), **short)
    stopped = base.load_pt("runs/base/checkpoint.pt")
    state = two_run(steep, **short)
    assert stopped["step"] == 12 < 20 <= state["step"] == state["steps"] == stopped["steps"]
    assert state["batch"] == 4 and state["lr_scale"] == pytest.approx(.5 ** .5)


def test_kill_9_and_a_second_process_change_nothing():
    Path("tiny.py").write_text("""
import sys, base, train
base.has_fast_bf16, train.world_id = lambda device: False, lambda: "tiny"
train.RUNS, train.STILLS, train.SIDE, train.SAVE_MINUTES = base.Path("runs"), 8, 16, 0
train.main("vae --batch 4 --steps 6 --weights . --device cpu --name".split() + sys.argv[1:])""")
    env = os.environ | {"PYTHONPATH": str(WEIGHTS.parent)}

    def run(name, *argv):
        return subprocess.Popen([sys.executable, *argv, "tiny.py", name], env=env)

    def state(name):
        return base.load_pt(f"runs/{name}/vae/checkpoint.pt")
    process = run("cut")
    while not Path("runs/cut/vae/checkpoint.pt").is_file() and process.poll() is None:
        time.sleep(.01)
    process.kill()
    assert process.wait() and 0 < state("cut")["step"] < 6
    assert run("whole").wait() == run("cut").wait() == 0
    close(*({**state(name)["model"], **state(name)["ema"]} for name in ("cut", "whole")), 0)
    assert run("two", "-m", "torch.distributed.run", "--nproc_per_node", "2").wait() == 0
    one, two = (state(name)["optimizer"]["state"][0]["exp_avg"] for name in ("whole", "two"))
    assert (one - two).norm() < 1e-2 * one.norm()


@pytest.fixture
def trained(tmp_path_factory, monkeypatch):
    """A folder of weights of all stages, of a miniature of the world."""
    folder = tmp_path_factory.getbasetemp() / "trained"
    pairs = {name: replace(p, count=4, inner=16) for name, p in train.PAIRS.items()}
    small = {"STILLS": 24, "CLIPS": 8, "SIDE": 32, "PAIRS": pairs, "RUNS": folder / "runs"}
    for name, value in small.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train.latents, "__defaults__", (32,))
    if not (folder / "make-a-video.pt").is_file():  # once, for all tests
        for captions in ("all", "none"):
            train.main(f"all --captions {captions} --steps 2 --batch 2 --weights {folder} "
                       "--device cpu".split())
        list(zip(range(5), sample.imagen_video(["a red star"], folder, frames=2)))
    return folder


def test_clip_learns_new_words_and_keeps_the_tokens_of_old_ones(monkeypatch, capsys):
    monkeypatch.setattr(train, "STILLS", 24)
    vae.write_video("a.mp4", torch.randint(255, (16, 3, 64, 64)).byte(), 4.)
    Path("a.txt").write_text("a plump heart moving left")
    train.main(f"clip --init {WEIGHTS}/text.pt --data . --with-world --steps 3 --batch 4 --weights . "
               "--device cpu".split())
    prompts = ["a red star moving left", "a plump heart"]
    old, new = (text.encode_clip(prompts, folder) for folder in (WEIGHTS, "."))
    (known, unknown), (same, learned) = (clip["text"]["tokens"] for clip in (old, new))
    assert torch.equal(known, same) and old["encoder"] == new["encoder"]
    assert differ(unknown, learned)
    assert capsys.readouterr().err.count("never trained on: heart, plump") == 1  # by the old one


def test_the_readmes_python_runs(trained, monkeypatch):
    readme = (WEIGHTS.parent / "README.md").read_text("utf-8")
    small = partial(sample.make_a_video, weights=trained, frames=2)
    monkeypatch.setattr(sample, "make_a_video", small)
    exec(readme.split("```python\n")[1].split("```")[0], {})
    assert vae.read_video("star.mp4")[0].shape == (6, 3, 128, 128)


def test_every_stage_trains_and_ships_its_average(trained, monkeypatch, capsys):
    monkeypatch.setattr(train, "PREPARE", dict.fromkeys(train.PREPARE))  # nothing is prepared again
    train.main(f"all --steps 2 --batch 2 --weights {trained} --device cpu".split())
    assert capsys.readouterr().out.count("already trained") == len(train.PREPARE)
    for name, file in train.OUTPUT.items():
        weights = base.load_checkpoint(trained / file, name)["model"]
        ema = base.load_pt(trained / "runs" / name / "checkpoint.pt")["ema"]
        assert all(torch.equal(weights[n], ema[n].half()) for n in ema), name


def test_an_autoencoder_ships_the_scale_of_its_means(trained):
    stub = Namespace(encode=lambda pixels: (2 * randn(len(pixels), 64), 5 * randn(len(pixels), 64)))
    config = train.prepare_vae(args_of(weights=trained)).finish(stub, {})
    assert config["scaling_factor"] == pytest.approx(.5, .02)


def test_weights_are_trained_further_frozen_or_distilled(trained):
    for path in trained.glob("*.pt"):
        os.symlink(path, path.name)

    def further(name, flags):
        train.main(f"{name} --init {trained}/{name}.pt --steps 1 --batch 2 --fresh --device cpu "
                   f"--weights . {flags}".split())
        return base.load_pt(f"{name}.pt")["model"]
    old = base.load_pt(trained / "vae.pt")["model"]
    close(further("vae", "--lr 1e-9"), old, 0)
    new = further("vae", "--freeze encoder")
    changed = [n for n in old if not torch.equal(old[n], new[n])]
    assert changed and all(n.startswith(("decoder.", "post_quant_conv.")) for n in changed)
    further("superres-high", "--distill 4 1")
    assert superres.load(superres.STAGES["high"], ".")[2].steps == 1


def test_a_prior_reads_every_input_and_returns_the_embedding_that_it_knows(monkeypatch):
    prior = randomize(text.Prior(text.PriorConfig(context=6, width=8, heads=2)))
    given = [randn(1, 8), torch.tensor([500]), randn(1, 6, 8)]
    for i, other in enumerate([randn(1, 8, seed=1), given[1] + 400, randn(1, 6, 8, seed=1)]):
        assert differ(prior(*given), prior(*given[:i], other, *given[i + 1:]))
    e = math.sqrt(8) * F.normalize(randn(2, 8, seed=3), dim=-1)
    monkeypatch.setattr(prior, "forward", lambda *inputs: e)
    close(text.sample_prior(prior, X, randn(2, 6, 8), randn(1, 6, 8)), e)
    batch = {"latents": e, "noise": randn(2, 8), "t": torch.tensor([9, 900]), "context": None}
    assert (text.prior_loss(prior, X, batch) == 0).all()


def test_prior_never_sees_a_clip_and_misses_one_prompt_in_ten(trained, monkeypatch):
    monkeypatch.setattr(train, "latents", pytest.fail)
    batch = train.prepare_prior(args_of(weights=trained)).batch_of(0, range(400))
    assert batch["latents"].shape == (400, 128)  # not in time
    assert .06 < batch["captions"].count("") / 400 < .14


@cases("name", train.UNCAPTIONED)
def test_no_caption_reaches_a_network_trained_without(name, trained, monkeypatch):
    monkeypatch.setattr(train, "add_tokens", pytest.fail)
    batch_of = train.PREPARE[name](args_of(weights=trained, captions="none")).batch_of
    for step in (0, 3):  # base: of clips, of stills
        batch = batch_of(step, range(40))
        assert not any(batch["captions"]) and batch["context"].shape[1:] == (1, 128)
        square = batch["context"].square().sum(-1)
        close(square, 128. * (square > 0), 1e-2)
        assert 0 < (square == 0).float().mean() < .3


def test_only_an_embedding_reaches_the_video(trained):
    flags = f"--weights {trained} --device cpu"
    sample.main(f"star --prior --frames 2 --until base -o a.mp4 {flags}".split())
    text.main(f"--image a.mp4 {flags}".split())
    clip = base.load_clip("text.pt", "text")

    def make(**changes):
        told = clip | {"text": clip["text"] | changes}
        return base.generate_clip(told, trained, frames=2, steps=2)["data"]
    assert torch.equal(make(), make(tokens=clip["text"]["tokens"] + 1))
    assert not torch.equal(make(), make(image_embedding=-clip["text"]["image_embedding"]))
    with pytest.raises(UserError, match="image_encoder alien"):
        base.generate_clip(clip | {"image_encoder": "alien"}, trained)


# ------------------------------------------------------------------------------------------------
# Rulers. A clip is read with nothing learned: find the one saturated object on its muted ground,
# then the nearest entries of train.py's tables.

SIDE, TURNS, PHASES = 64, 16, 96  # size that is read; angles tried of a shape, phases of a motion
FACTORS, AT_4_FPS = ("colour", "shape", "motion", "ground"), np.arange(16) / 4


def segment(video):
    """Frames (T, 3, S, S) in 0...1, masks of the object (T, S, S), its contrast (T,)."""
    frames = F.interpolate(video.float() / 255, (SIDE, SIDE), mode="area")
    chroma = (frames - frames.mean(1, keepdim=True)).flatten(2)  # light and texture are grey
    chroma -= chroma.median(2, keepdim=True).values  # and a ground has one hue
    smooth = F.avg_pool2d(chroma.unflatten(2, (SIDE, SIDE)), 3, 1, 1).flatten(2)
    distance = smooth.square().sum(1, True)
    inside = distance >= distance.topk(16).values[..., -1:]  # farthest from the ground,
    for _ in range(2):  # then all that is like it
        hue = (chroma * inside).sum(2, True) / inside.sum(2, True).clamp(min=1)
        share = (chroma * hue).sum(1, True) / hue.square().sum(1, True).clamp(min=1e-6)
        inside = share > .6  # (T, 1, S*S)
    cover = ((share - .2) / .6).clamp(0, 1).unflatten(2, (SIDE, SIDE))  # less noise and shading
    solid = F.avg_pool2d(cover, 3, 1, 1) > .35  # dust has no 3 x 3 body
    return frames, (cover * F.max_pool2d(solid.float(), 5, 1, 2))[:, 0], hue[..., 0].norm(dim=1)


def measure(cover):
    """Areas (T,) and centroids (T, 2) of masks (T, S, S), in pixels."""
    pixel, area = torch.arange(SIDE) + .5, cover.sum((1, 2)).clamp(min=1)
    return area, torch.stack([cover.sum(1) @ pixel, cover.sum(2) @ pixel], 1) / area[:, None]


def mean_colour(frames, weight):  # (T, 3, S, S), (T, S, S) -> (T, 3)
    return (frames * weight[:, None]).sum((2, 3)) / weight.sum((1, 2))[:, None]


def look(video) -> tuple:
    """The object's paint (T, 3) and centroid (T, 2)."""
    frames, cover, _ = segment(video)
    return mean_colour(frames, cover ** 4), measure(cover)[1]  # little of the mixed edge


def draw_mask(shape, place, radius, angle):
    """Soft masks (..., S, S) of a signed distance at place (..., 2), radius and angle (...)."""
    pixel, (x, y) = torch.arange(SIDE) + .5, place[..., None, None].unbind(-3)
    r, angle = radius[..., None, None], angle[..., None, None]
    u, v, cos, sin = (pixel - x) / r, (pixel[:, None] - y) / r, angle.cos(), angle.sin()
    return (.5 - r / 1.2 * shape(u * cos + v * sin, v * cos - u * sin)).clamp(0, 1)


@cache
def facts_of(shape) -> tuple:
    """Area (1,) and centroid (1, 2) at radius 1, and how many angles look alike."""
    angle = torch.tensor([0., 1., *(2 * math.pi / n for n in range(1, 13))])
    mask = draw_mask(shape, torch.full((2,), SIDE / 2), torch.tensor(24.), angle)
    alike = (mask - mask[0]).abs().sum((1, 2)) < .01 * mask[0].sum()
    area, centroid = measure(mask[:1])
    symmetry = math.inf if alike[1] else alike[2:].nonzero().max().item() + 1
    return area / 24 ** 2, (centroid - SIDE / 2) / 24, symmetry


def fit(shape, cover) -> tuple:
    """Overlap of masks (T, S, S) with a shape at its best angle (T,); x, y, radius, angle (T, 4)"""
    (area, centroid), (unit, offset, symmetry) = measure(cover), facts_of(shape)
    angle = torch.arange(TURNS if symmetry < math.inf else 1) / TURNS * 2 * math.pi / symmetry
    radius = (area / unit).sqrt()[:, None].expand(-1, len(angle))  # (T, A)
    to_centroid = torch.polar(radius, angle.expand_as(radius)) * torch.view_as_complex(offset)
    place = centroid[:, None] - torch.view_as_real(to_centroid)  # (T, A, 2)
    mask, cover = draw_mask(shape, place, radius, angle).flatten(2), cover.flatten(1)  # (T, A, S*S)
    both = torch.einsum("tap,tp->ta", mask, cover)
    overlap, best = (both / (mask.square().sum(2) + cover.square().sum(1, True) - both)).max(1)
    step = best.diff(prepend=best[:1]) / TURNS  # from frame to frame, the smallest that fits
    turn = (best[0] / TURNS + (step - step.round()).cumsum(0)) * 2 * math.pi / symmetry
    place = place[torch.arange(len(best)), best]
    return overlap, torch.cat([place, radius[:, :1], turn[:, None]], 1)


@cache
def world_paths(T: int, fps: float):
    """Every motion at every phase, as `fit` has paths. (motions*PHASES, T, 4)"""
    times, paths = torch.arange(T) / fps, []
    for name, motion in train.MOTIONS.items():
        scene = {key: sum(getattr(motion, key)) / 2 for key in ("x", "y", "radius")}
        for phase in np.arange(PHASES) / PHASES:
            scene |= {"motion": name, "phase": float(phase)}
            paths.append(torch.stack(train.trajectory(scene, times), 1))
    return torch.stack(paths) * torch.tensor([SIDE, SIDE, SIDE, 1])


def read_motion(path, seen, fps: float) -> str | None:
    """The motion whose path, anywhere and at about its own pace, is nearest, if it is near."""
    world, path = world_paths(len(path), fps)[:, seen], path[seen]
    unit = torch.tensor([1, 1, 1, path[:, 2].mean()])  # an angle times a radius is in pixels too
    world, path = ((p - p.mean(-2, keepdim=True)) * unit for p in (world, path))
    pace = (world * path).sum((1, 2)) / world.square().sum((1, 2)).clamp(min=1e-6)
    error = path - pace.clamp(.75, 1.33)[:, None, None] * world  # (motions*PHASES, T, 4)
    error, extent = error.square().sum(2).mean(1).sqrt(), path.square().sum(1).mean().sqrt()
    near = error.min() < min(.5 + .1 * extent, .4 * max(1.25, extent))
    return list(train.MOTIONS)[int(error.argmin()) // PHASES] if near else None


def elect(names, votes, valid) -> str | None:
    """What four frames in five say, or None. A frame without a valid vote votes against."""
    winner = votes[valid].mode().values if valid.any() else -1
    return list(names)[winner] if ((votes == winner) & valid).float().mean() >= .8 else None


def describe(video, fps: float = 4.) -> tuple:
    """(colour, shape, motion, ground) of a clip uint8 (T, 3, H, W), names or None."""
    frames, cover, contrast = segment(video)
    overlap, paths = zip(*[fit(shape, cover) for shape in train.SHAPES.values()])
    overlap, index = torch.stack(overlap).max(0)  # (T,)
    seen = (contrast > .12) & (overlap > .8) & (cover.sum((1, 2)) > 14)
    shape, motion = elect(train.SHAPES, index, seen), None
    if shape and seen.float().mean() >= .9:
        motion = read_motion(paths[list(train.SHAPES).index(shape)], seen, fps)
    palette = torch.tensor(list(train.COLOURS.values())).float()
    paint = mean_colour(frames, cover ** 4)[:, None]
    cosine, colour = F.cosine_similarity(paint, palette, dim=2).max(1)  # shading only scales
    bare = mean_colour(frames, (F.max_pool2d(cover, 5, 1, 2) < .1).float())
    grounds = [torch.tensor(ground) / 255 for ground, _ in train.GROUNDS.values()]
    error, ground = (bare[:, None] - torch.stack(grounds)).norm(dim=2).min(1)
    return (elect(train.COLOURS, colour, seen & (cosine > .97)), shape, motion,
            elect(train.GROUNDS, ground, error < .15))


def psnr(a, b) -> float:  # of uint8 pixels, in dB
    return 10 * math.log10(255 ** 2 / max(1e-9, (a.double() - b).square().mean().item()))


def outline_psnr(video, factors: tuple):
    """PSNR (T,) of frames uint8 (T, 3, 64, 64) on black against the nearest picture of their shape."""
    scene, least = dict(zip(FACTORS, factors)) | {"ground": "", "seed": 0}, torch.tensor(math.inf)
    path = fit(train.SHAPES[factors[1]], segment(video)[1])[1] / torch.tensor([SIDE, SIDE, SIDE, 1])
    for halvings in range(8):
        step = torch.diag(torch.tensor([.02, .02, .01, .1])) / 2 ** halvings
        for direction in [0 * step[0], *[*step, *-step] * 3]:
            picture = train.paint(scene, (path + direction).unbind(1), SIDE)
            error = (picture - video / 255).square().mean((1, 2, 3))  # (T,)
            path = torch.where((error < least)[:, None], path + direction, path)
            least = torch.minimum(error, least)
    return -10 * least.log10()


def compare(ours, plain, truth, where=1) -> list:
    """The cells under ABOVE, of uint8 (N, ...): both PSNR, the gain, 95 % of 2,000 bootstraps."""
    where = torch.ones_like(truth) * where
    error = np.array([((way.float() - truth).square() * where).flatten(1).double().sum(1).numpy()
                      for way in (ours, plain)])  # (2, N)
    draws = np.random.default_rng(0).integers(len(truth), size=(2000, len(truth)))
    gain = -10 * np.log10(np.divide(*error[:, [range(len(truth)), *draws]].sum(2)))
    interval = "{:+.1f} ({:+.1f} to {:+.1f})".format(gain[0], *np.percentile(gain, (2.5, 97.5)))
    return [*(10 * np.log10(255 ** 2 * where.sum().item() / error.sum(1))), interval]


def blend(video, skip: int):
    """Linear blends between every skip-th frame of uint8 (N, T, 3, H, W)."""
    known = (torch.arange(video.shape[1]) % skip == 0).expand(video.shape[:2])
    return interpolate.blend(video.float(), known).round().byte()


def moving(video):
    """Where anything moves in clips uint8 (N, T, 3, H, W), for all frames alike."""
    return ((video.amax(1) - video.amin(1)).amax(1) > 24)[:, None, None].expand_as(video)


def fine_detail(videos, where) -> float:
    """Energy finer than a blur of 2 pixels, of uint8 (N, T, 3, H, W) where (N, H, W)."""
    x = vae.to_float(videos)
    return (x - superres.blur(x, 2.)).square().mean((1, 2))[where].mean().item()


@cases("share, times", [(8, AT_4_FPS), (120, np.arange(31) / 8)])
def test_rendered_clips_are_read_back(share, times):
    factors = prompts_of(share, split="any")
    read = [describe(video, 1 / times[1]) for video in render_all(factors, times)]
    assert read == factors


def test_a_new_shape_and_motion_are_drawn_captioned_split_and_read(monkeypatch):
    """The heart that swings, of the model card."""
    card = (WEIGHTS / "README.md").read_text("utf-8")
    shape, motion = card.split('    "heart": ')[1].split('    "swinging": ')
    monkeypatch.setitem(train.SHAPES, "heart", eval(shape.strip(" }\n"), vars(train)))
    monkeypatch.setitem(train.MOTIONS, "swinging", eval(motion.split("}\n")[0], vars(train)))
    monkeypatch.setitem(globals(), "world_paths", world_paths.__wrapped__)
    scene = a_scene("heart", "swinging", radius=.13)
    assert describe(train.render(scene, AT_4_FPS)) == ("red", "heart", "swinging", "")
    assert train.caption(scene) == "a red heart swinging"
    assert {train.split_of(c, "heart", "swinging") for c in train.COLOURS} == {"train", "held-out"}


def test_a_wrong_motion_is_not_read_as_a_right_one():
    for factors in prompts_of(60, split="any"):
        video, motion = render_all([factors], AT_4_FPS)[0], factors[2]
        assert describe(video[:1].expand(16, -1, -1, -1))[2] is None  # nothing moves
        assert describe(torch.zeros_like(video))[:3] == (None, None, None)
        assert describe(video[torch.arange(16) * 7 % 16])[2] != motion
        assert motion == "bouncing" or describe(video.flip(0))[2] != motion


def test_clip_names_what_a_first_frame_shows():
    factors, (model, *_) = prompts_of(10), text.load()
    read = named(text.embed_images(model, render_all(factors, [0.])[:, 0]))
    colour, shape, motion, ground = fidelity(factors, read)[1:5]
    assert min(colour, shape, ground) > 90 and motion > 70  # 89 are in the frame


def test_rulers_measure_what_their_names_say():
    red_star = "red", "star", "moving right", ""
    video = render_all([red_star], AT_4_FPS)[0]
    assert outline_psnr(video, red_star).min() > 55 > 30 > outline_psnr(video, ("red", "cross")).max()
    ramp = 10 * torch.arange(6, dtype=torch.uint8).view(1, 6, 1, 1, 1).expand(1, 6, 3, 8, 8)
    assert torch.equal(blend(ramp, 5), ramp) and moving(ramp).all() and not moving(ramp[:, :3]).any()
    assert compare(ramp + 2, ramp + 4, ramp)[2] == "+6.0 (+6.0 to +6.0)"


# ------------------------------------------------------------------------------------------------
# Tables: python test_all.py evaluate, or benchmark. Of held-out triples, where no row says more,
# in scenes from seeds that no training uses.

ARGS = Namespace(prompts=480, seed=0, device="cpu", part=None, weights=WEIGHTS)  # main changes them
BLACK, ALL = ("black", [""]), ("all grounds", list(train.GROUNDS))
BEFORE = {"high": ["low"], "ssr-256": ["ssr-128"]} | dict.fromkeys(
    ("ssr-768", "tsr-128"), ["ssr-128", "ssr-256"])  # what makes a network's input
FIDELITY = "prompts", "colour", "shape", "motion", "ground", "first three, %", "    95 %"
ABOVE = "ours, dB", "beside", "   ours above it, 95 %"


def table(title: str, *heads):
    """Prints the head of a table; returns a function that prints a row."""
    print(f"\n{title}\n{'':32s}", *heads, sep="  ")

    def row(name: str, *cells):
        cells = [cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
        print(f"  {name:30s}", *map(str.rjust, cells, map(len, heads)), sep="  ", flush=True)
    return row


def prompts_of(share: int, grounds=ALL[1], split="held-out", motion="") -> list:
    """ARGS.prompts / share factors: a fair part of all, or all, repeated."""
    every = [(*triple, ground) for triple in train.TRIPLES[split] for ground in grounds]
    shuffled = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
    fitting = [factors for factors in shuffled if motion in factors[2]]
    return list(islice(cycle(fitting), max(1, ARGS.prompts // share)))


def scene_of(factors: tuple, seed: int) -> dict:
    """A scene with these factors, its free numbers from a seed that no training uses."""
    for attempt in count():
        scene = train.draw_scene(np.random.default_rng((77, seed, attempt)), "any", factors[3])
        if scene["motion"] == factors[2]:  # the only factor that the numbers depend on
            return scene | dict(zip(FACTORS, factors))


def render_all(factors: list, times, size: int = SIDE, **changes):
    """A scene for each, at times (T,) or each at its own (N, T): uint8 (N, T, 3, size, size)."""
    times = np.zeros((len(factors), 1)) + times  # (N, T)
    return torch.stack([train.render(scene_of(f, i) | changes, times[i], size)
                        for i, f in enumerate(factors)])


def spread(frames: int, fps: float, clips: int):
    """Times (N, T) of clips that begin all over the scene."""
    starts = (train.SCENE_SECONDS - (frames - 1) / fps) * (np.arange(clips) + .5) / clips
    return starts[:, None] + np.arange(frames) / fps


def where(seed: int = 0) -> tuple:
    return ARGS.weights, ARGS.device, 1000 * ARGS.seed + seed


def clip_of(factors: list, data=None, fps: float = 4., prior: bool = False, seed: int = 0) -> dict:
    """A clip with these prompts and data; with `prior` also P's image embeddings."""
    prompts = [train.caption(dict(zip(FACTORS, f))) for f in factors]
    return text.encode_clip(prompts, *where(seed), prior) | {"data": data, "fps": fps}


def encode(video):
    return vae.encode_video(vae.load(*where()[:2])[0], video)


def decode(latents):
    return vae.decode_video(vae.load(*where()[:2])[0], latents)


def make(factors: list, fps: float = 4., prior: bool = False, **how):
    """Videos of the prompts, uint8 (N, 16, 3, 64, 64). `how` goes to base.generate."""
    videos, few = [], 8 if ARGS.device == "cpu" else 64
    for i in tqdm(range(0, len(factors), few), "videos", leave=False):
        clip = clip_of(factors[i:i + few], prior=prior, seed=i)
        videos.append(decode(base.generate_clip(clip, *where(i), fps=fps, **how)["data"]))
    return torch.cat(videos)


def fill_in(z, factors: list, fps: float, **how):
    """Videos of keyframes z at a rate, with the frames between or after them."""
    return decode(interpolate.fill_clip(clip_of(factors, z, fps), *where(), **how)["data"])


def enlarge(name: str, videos, factors: list, fps: float, **how):
    """Videos uint8 (N, T, C, h, w) through a network between pixels."""
    clip = clip_of(factors, videos, fps)
    return superres.upscale_clip(clip, NETWORKS[name], *where(), **how)["data"]


def as_made(name: str, factors: list, times, fps: float):
    """A network's input as the stages before it make it."""
    video = decode(encode(render_all(factors, times)))
    for earlier in BEFORE.get(name, []):
        video = enlarge(earlier, video, factors, fps)
    return video


def fidelity(factors: list, read) -> list:
    """The cells under FIDELITY: how often the factors of the prompt are those that were read."""
    right = np.array(factors, object) == np.array(list(read), object)  # (N, 4)
    first, n = right[:, :3].all(1), len(right) + 4
    middle = (first.sum() + 2) / n  # Agresti and Coull: 0 of 96 is not certainty
    error = 1.96 * math.sqrt(middle * (1 - middle) / n)
    interval = f"{100 * max(0, middle - error):.0f} to {100 * min(1, middle + error):.0f}"
    return [str(len(right)), *(100 * right.mean(0)), 100 * first.mean(), interval]


def evaluate_reader():
    row, factors = table("The reader, on rendered clips at 4 fps", *FIDELITY), prompts_of(1)
    row("all grounds", *fidelity(factors, map(describe, render_all(factors, AT_4_FPS))))


def evaluate_autoencoder():
    row = table("decode(encode(x)) against x; the object's colour of 255 and centroid in pixels",
                "PSNR, dB", "colour off by", "centroid off by")
    for name, grounds in (BLACK, ALL):
        truth = render_all(prompts_of(5, grounds), AT_4_FPS)
        made = decode(encode(truth))
        off = [[(x - y).norm(dim=1).mean() for x, y in zip(look(a), look(b))]
               for a, b in zip(truth, made)]
        row(name, psnr(truth, made), *(np.mean(off, 0) * (255, 1)))


def evaluate_interpolation():
    row = table("Between 16 frames at 4 fps, moving pixels of new frames",
                "ours, dB", "blend", "blend of latents", "centroid off by, pixels")
    factors = prompts_of(30)
    for skip in range(2, 7):
        z = encode(render_all(factors, np.arange(15 * skip + 1) / (4 * skip)))
        known = torch.arange(15 * skip + 1) % skip == 0
        truth, ours = decode(z), fill_in(z[:, ::skip], factors, 4., skip=skip)
        new = moving(truth) & ~known[:, None, None, None]
        ways = ours, blend(truth, skip), decode(interpolate.blend(z, known.expand(z.shape[:2])))
        off = [(look(a)[1] - look(b)[1])[~known].norm(dim=1).mean() for a, b in zip(truth, ours)]
        row(f"skip {skip}", *(psnr(way[new], truth[new]) for way in ways), np.mean(off))
    row, factors = table("Fidelity of given and 15 further frames", *FIDELITY), prompts_of(5)
    for given, fps, how in ((16, 8., {"steps": 2}), (1, 4., {"steps": 8, "guidance": 2.})):
        z = encode(render_all(factors, np.arange(given) / fps))
        read = [describe(video, fps) for video in fill_in(z, factors, fps, after=15, **how)]
        row(f"{given} given at {fps:g} fps", *fidelity(factors, read))


def evaluate_superres(which: str):
    stage, side = NETWORKS[which], train.PAIRS[which].side
    size, fps = stage.scale * side, (train.PAIRS[which].rates or [20.])[0]
    row = table(f"{which}: {side} to {size} pixels, beside bicubic", *ABOVE,
                "% of fine detail of the ground", "bicubic")
    for name, grounds in (BLACK, ("textured", ALL[1][1:])):
        factors = prompts_of(30, grounds)
        times = spread(8 if size < 768 else 4, fps, len(factors))
        truth, clean = render_all(factors, times, size), render_all(factors, times, side)
        seen = render_all(factors, times, ground="").amax((1, 2))[:, None] / 255  # (N, 1, 64, 64)
        still = F.interpolate(F.max_pool2d(seen, 5, 1, 2), size)[:, 0] < .03  # far from the object
        for kind, small in (("clean", clean), ("as made", as_made(which, factors, times, fps))):
            plain = F.interpolate(small.flatten(0, 1).float(), scale_factor=stage.scale, mode="bicubic")
            plain = plain.clamp(0, 255).round().byte().view_as(truth)
            ways = enlarge(which, small, factors, fps), plain
            whole = fine_detail(truth, still) if name == "textured" else math.nan
            row(f"{name}, {kind}", *compare(*ways, truth),
                *(100 * fine_detail(way, still) / whole for way in ways))
    for shared in (True, False) if stage.shared_noise else ():
        videos = enlarge(which, clean, factors, fps, shared_noise=shared)
        changes = [(video[1:].int() - video[:-1]).abs()[..., where].float().mean()
                   for video, where in zip(videos, still)]
        print(f"  flicker of the ground, shared noise {shared}: {np.mean(changes):.2f} of 255")


def evaluate_tsr():
    row = table("TSR: moving pixels of new frames, beside blends", *ABOVE)
    for which, fps, share in (("tsr-32", 8., 30), ("tsr-128", 16., 60), ("tsr-128", 32., 60)):
        factors = prompts_of(share)
        times = spread(31, fps, len(factors))
        truth = render_all(factors, times, train.PAIRS[which].side)
        new = moving(truth) & (torch.arange(31) % 2 == 1)[:, None, None, None]
        made = as_made(which, factors, times[:, ::2], fps / 2)
        for kind, given in (("clean", truth[:, ::2]), ("as made", made)):
            ours = enlarge(which, interpolate.double(given), factors, fps)[:, :31]
            plain = blend(given.repeat_interleave(2, 1)[:, :-1], 2)
            row(f"{which} to {fps:g} fps, {kind}", *compare(ours, plain, truth, new))


def evaluate_fidelity():
    row = table("Prompt fidelity at 4 fps", *FIDELITY)
    for share, split, (name, grounds) in (
            (1, "held-out", BLACK), (4, "unseen", BLACK), (4, "unseen", ALL), (4, "train", ALL),
            (1, "held-out", ALL)):
        factors = prompts_of(share, grounds, split)
        row(f"{split} triples, {name}", *fidelity(factors, map(describe, make(factors))))


def named(embeddings) -> list:
    """The factors of the caption nearest to each image embedding (N, E), by CLIP's judgement."""
    model, tokenizer, _ = text.load(*where()[:2])
    every = [(*triple, ground) for triple in train.TRIPLES["any"] for ground in train.GROUNDS]
    lines = [train.caption(dict(zip(FACTORS, factors))) for factors in every]
    captions = text.encode(model, tokenizer, lines)[1]  # (M, E)
    return [every[i] for i in (embeddings @ captions.T).argmax(1)]


def evaluate_make_a_video():
    row = table("Make-A-Video, --prior: no clip had a caption", *FIDELITY)
    for share, split in ((1, "held-out"), (4, "unseen")):
        factors = prompts_of(share, split=split)
        read = [describe(video) for video in make(factors, prior=True)]
        row(f"{split} triples, all grounds", *fidelity(factors, read))
        for kind in dict.fromkeys(motion.split()[0] for motion in train.MOTIONS):
            right = [f[2] == r[2] for f, r in zip(factors, read) if kind in f[2]]
            print(f"  {kind} {sum(right)} of {len(right)}" if right else "", end="")
        print()
    factors, (model, *_) = prompts_of(1), text.load(*where()[:2])
    truth = text.embed_images(model, render_all(factors, [0.])[:, 0])  # of first frames, (N, E)
    made = clip_of(factors, prior=True)["text"]["image_embedding"]  # (N, E)
    row("CLIP names, of first frames", *fidelity(factors, named(truth)))
    row("CLIP names, of P's embeddings", *fidelity(factors, named(made)))
    cosine = F.cosine_similarity(made, truth, dim=-1).median()
    print(f"  cosine of P's embedding and the truth's: median {cosine:.3f}")


def evaluate_outlines():
    row = table("Outlines on black, dB against the nearest picture of their shape", "clips",
                "read right, %", "mean", "worst tenth", "stills animated", "decode(encode(truth))")
    kinds = {}
    for f in prompts_of(1, [""]):
        kind = f"spinning {f[1]}" if f[2] == "spinning" else "others"
        kinds.setdefault("sliding" if "moving" in f[2] else kind, []).append(f)
    for name, factors in sorted(kinds.items()):
        factors = factors[:max(1, ARGS.prompts // 8)]
        videos, z = make(factors), encode(render_all(factors, AT_4_FPS))
        animated = fill_in(z[:, :1], factors, 4., after=15, steps=8, guidance=2.)
        ways = videos, animated, decode(z)
        ours, still, coded = (torch.stack(list(map(outline_psnr, way, factors))) for way in ways)
        worst = ours.flatten().sort().values[:-(-ours.numel() // 10)]
        row(name, str(len(factors)), fidelity(factors, map(describe, videos))[5], ours.mean(),
            worst.mean(), still[:, 1:].mean(), coded.mean())


def evaluate_rate():
    row = table("Frame rate: pixels per frame of what slides, median", "ours", "the world's")
    for fps in (4., 8., 16.):
        speeds = [np.abs(np.polyfit(np.arange(16), look(video)[1], 1)[0]).max()
                  for video in make(prompts_of(5, [""], motion="moving"), fps)]
        row(f"{fps:g} fps", np.median(speeds), .14 * SIDE / fps)


def evaluate_steps():
    for split, (name, grounds) in (("held-out", BLACK), ("held-out", ALL), ("unseen", ALL)):
        row = table(f"Steps of base, {split} triples, {name}", *FIDELITY, "outlines, dB")
        factors = prompts_of(4, grounds, split)
        for steps in (48, 24, 16, 12, 8, 4, 2):
            how = {"guidance": 1., "sampler": "stochastic", "shift": 2.} if steps < 16 else {}
            kind = "unguided, stochastic" if how else "guided, ancestral"
            videos, outlines = make(factors, steps=steps, **how), ""
            if name == "black":
                outlines = np.mean([outline_psnr(*pair).mean() for pair in zip(videos, factors)])
            row(f"{steps} steps {kind}", *fidelity(factors, map(describe, videos)), outlines)


PARTS = ("reader", "autoencoder", "interpolation", *superres.STAGES, "tsr", "fidelity", "make_a_video",
         "outlines", "rate", "steps")


def evaluate():
    for part in ARGS.part or PARTS:
        if part in superres.STAGES:
            evaluate_superres(part)
        else:
            globals()[f"evaluate_{part}"]()


def stages_of(cascade: str):
    """Yields the name of what has been done since the last."""
    layer = torch.nn.Conv2d(128, 128, 3, padding=1, device=ARGS.device).requires_grad_(False)
    x = torch.ones(64, 128, 32, 32, device=ARGS.device).to(memory_format=torch.channels_last)
    for _ in range(10):
        layer(x)
    yield "ten convolutions"  # the machine's fastest layer, to compare with
    for name, _ in sample.CASCADES[cascade](["a red star moving left on sand"], *where()):
        yield name


def benchmark():
    for cascade in ARGS.part or sample.CASCADES:
        row = table(cascade, "seconds", "GFLOP/s", "GiB so far")
        again, start = stages_of(cascade), time.time()
        for name in stages_of(cascade):
            gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
            if ARGS.device == "cuda":
                torch.cuda.synchronize()
                gib = torch.cuda.max_memory_allocated() / 2 ** 30
            seconds = time.time() - start
            with FlopCounterMode(display=False) as counter:  # slow, so a second time
                next(again)
            row(name, seconds, counter.get_total_flops() / seconds / 1e9, gib)
            start = time.time()


def main(argv=None):
    parser = base.command_line("Measure weights, by default the shipped ones: quality and speed.")
    parser.add_argument("command", choices=("evaluate", "benchmark"))
    parser.add_argument("--part", nargs="+", choices=(*PARTS, *sample.CASCADES), metavar="PART",
                        help=f"only {', '.join(PARTS)}; of benchmark: a cascade")
    parser.add_argument("--prompts", type=base.positive, default=480, help="in long rows [480]")
    vars(ARGS).update(vars(parser.parse_args(argv)))
    globals()[ARGS.command]()


if __name__ == "__main__":
    base.run(main)
