"""test_all.py - the proofs.

    python -m pytest test_all.py         properties: what must hold whatever the weights are
    python test_all.py evaluate          measurements of the shipped weights; prints the README's tables
    python test_all.py benchmark         seconds, peak memory and GFLOP/s per stage, beside this machine's convolution peak

Prompt fidelity is read from pixels by `describe`, which has no learned part, so that nothing marks its own homework.
"""
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import base
import sample
import text
import train
import vae
from base import WEIGHTS, Diffusion, UNet, UNetConfig, UserError

HERE = Path(__file__).resolve().parent
SMALL = UNetConfig(channels=(16, 32), heads=2, context_dim=8, groups=4)


# ------------------------------------------------------------------------------------------------
# Helpers of the proofs

def shaken(model, seed: int = 0, only=lambda name: True, scale: float = .3):
    """The model with random parameters where `only` says so: zeros at the start would make most proofs vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only(name):
                fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
                noise = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
                parameter.copy_(noise if parameter.ndim > 1 else parameter + scale * noise)
    return model


def inputs(batch: int = 2, frames: int = 5, channels: int = 4, side: int = 8, dim: int = 8, seed: int = 0):
    """A noisy video (B, T, C, H, W), timesteps, context and frame rates for a small U-Net."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, frames, channels, side, side, generator=g), torch.randint(0, 1000, (batch,), generator=g),
            torch.randn(batch, 6, dim, generator=g), torch.full((batch,), 4.))


def complaint(main, argv) -> str:
    """What a program that must refuse says on stderr; asserts exit code 2, one line, and no traceback."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as exit:
        base.run(lambda: main([str(a) for a in argv]))
    lines = stderr.getvalue().strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1, stderr.getvalue()
    return lines[0]


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
            part = UNet(replace(SMALL, temporal="attention+conv" if kind != "conv" else "conv"))
            shaken(part, only=lambda name: not UNet.is_inflation(name) or kind in name)
            before, after = part(x, t, context, fps), part(touched, t, context, fps)
            assert all(not torch.equal(before[:, i], after[:, i]) for i in others)


def test_every_fresh_parameter_learns_within_two_steps():
    model = shaken(UNet(SMALL), only=lambda name: not UNet.is_inflation(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    x, t, context, fps = inputs()
    learned = set()
    for _ in range(3):  # a gradient behind a zero projection needs one step for the projection to open
        model(x, t, context, fps).pow(2).mean().backward()
        learned |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    unmoved_by_softmax = ("attn.to_k.bias",)
    dead = [name for name, _ in model.named_parameters() if name not in learned and not name.endswith(unmoved_by_softmax)]
    assert not dead, dead


def test_frame_rate_reaches_the_output_and_pictures_have_none():
    model = shaken(UNet(SMALL))
    x, t, context, fps = inputs()
    with torch.no_grad():
        assert not torch.allclose(model(x, t, context, fps), model(x, t, context, 2 * fps))
        assert torch.equal(model(x[:, :1], t, context, fps), model(x[:, :1], t, context, 2 * fps))


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    x, t, context, fps = inputs()
    gradients = []
    for checkpointing in (False, True):
        model = shaken(UNet(SMALL)).train()
        model.gradient_checkpointing = checkpointing
        model(x, t, context, fps).pow(2).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_a_longer_video_than_was_trained_runs():
    x, t, context, fps = inputs(frames=40)
    with torch.no_grad():
        assert shaken(UNet(SMALL))(x, t, context, fps).isfinite().all()


def test_patches_fold_the_picture_and_unfold_it_again():
    model = shaken(UNet(replace(SMALL, patch_size=2, in_channels=3, out_channels=3, context_dim=None)))
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
def test_targets_and_noise_turn_into_each_other(schedule, target):
    diffusion = Diffusion(schedule, target)
    x, noise = torch.randn(2, 50, 3, dtype=torch.float64)
    t = torch.randint(0, 1000, (50,))
    z = diffusion.add_noise(x, noise, t)
    for recovered, truth in zip(diffusion.x_and_noise(diffusion.target_of(x, noise, t), z, t), (x, noise)):
        torch.testing.assert_close(recovered, truth, atol=1e-8, rtol=1e-6)


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


@pytest.mark.parametrize("sampler, eta, steps", [("ddim", 0., 100), ("ddim", 1., 200), ("dpmpp", 0., 40)])
def test_the_exact_score_of_a_gaussian_mixture_gives_its_mean_and_variance(sampler, eta, steps):
    diffusion = Diffusion("cosine", "sample")
    weight, mean, std = (torch.tensor(v, dtype=torch.float64) for v in ([.3, .7], [-2., 1.], [.3, .5]))

    def posterior_mean(z, t):  # E[x | z] of each component, weighed by how well the component explains z
        alpha, sigma = diffusion.alpha_sigma(t, z)
        var = alpha ** 2 * std ** 2 + sigma ** 2
        explains = (weight.log() - .5 * var.log() - (z - alpha * mean) ** 2 / (2 * var)).softmax(-1)
        each = mean + alpha * std ** 2 / var * (z - alpha * mean)
        return (explains * each).sum(-1, keepdim=True)

    z = base.initial_noise((20000, 1), seed=1).double()
    x = diffusion.sample(posterior_mean, z, steps=steps, sampler=sampler, eta=eta)
    truth = (weight * mean).sum()
    variance = (weight * (std ** 2 + mean ** 2)).sum() - truth ** 2
    assert abs(x.mean() - truth) < .05 and abs(x.var() / variance - 1) < .05


def test_guidance_is_linear_in_all_channels():
    model = shaken(UNet(SMALL)).eval()
    x, t, context, fps = inputs()
    null = torch.randn(1, *context.shape[1:])
    predict = lambda scale: base.guided(model, context, null, fps, scale)(x, t)
    with torch.no_grad(), contextlib.nullcontext() if not torch.cpu._is_amx_tile_supported() else torch.autocast("cpu", torch.bfloat16):
        prompt, none = model(x, t, context, fps), model(x, t, null.expand_as(context), fps)
        torch.testing.assert_close(predict(1), prompt)
        torch.testing.assert_close(predict(0), none)
        torch.testing.assert_close(predict(3), none + 3 * (prompt - none), atol=.05, rtol=.05)
        assert ((predict(3) - prompt).abs().mean((0, 1, 3, 4)) > .01).all()


def test_a_video_does_not_depend_on_what_else_is_made():
    assert torch.equal(base.initial_noise((3, 4, 5), seed=7)[2], base.initial_noise((1, 4, 5), seed=9)[0])


def test_a_small_model_learns_one_clip():
    torch.manual_seed(0)
    model, diffusion = UNet(replace(SMALL, channels=(32, 32))), Diffusion()
    clip, (_, _, context, fps) = torch.randn(1, 8, 4, 4, 4), inputs(batch=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        t = torch.randint(0, 1000, (8,), generator=generator)
        batch = {"latents": clip.expand(8, -1, -1, -1, -1), "context": context.expand(8, -1, -1), "fps": fps.expand(8),
                 "noise": torch.randn(8, *clip.shape[1:], generator=generator), "t": t}
        base.loss(model, diffusion, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    text_part = {"tokens": context, "null_tokens": context}
    made = base.generate(model.eval(), diffusion, text_part, frames=8, fps=4., side=4, steps=20, guidance=1.)
    assert (made - clip).pow(2).mean() < .1 * clip.pow(2).mean()


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
    model, tokenizer, weights = clip
    text.main(["a red elephant", "", "star " * 30, "日本 🙂 \x00 é", "-o", str(tmp_path / "t.pt")])
    said = capsys.readouterr().err
    assert "never seen: 'elephant'" in said and "unconditional" in said and "are cut" in said
    stage = base.load_stage(tmp_path / "t.pt", "text")
    assert stage["text"]["tokens"].shape == (4, model.config.context, model.config.width)
    torch.testing.assert_close(stage["text"]["tokens"][1], stage["text"]["null_tokens"][0])
    assert not weights["config"]["words"] or "star" in weights["config"]["words"]


def test_every_word_of_the_world_is_one_token(clip):
    _, tokenizer, _ = clip
    for line in train.training_captions()[::37]:
        assert len(tokenizer.encode(line, add_special_tokens=False).ids) == len(line.split())


def test_a_linear_probe_reads_every_factor_of_held_out_captions(clip):
    model, tokenizer, _ = clip
    factors = lambda splits: [(c, s, m, g) for split in splits for c, s, m in train.TRIPLES[split] for g in range(len(train.GROUNDS))]
    describe_in_words = lambda f: train.caption(dict(zip(("colour", "shape", "motion", "ground"), f)))
    known, held = factors(["train"]), factors(["held-out", "unseen"])
    states = lambda rows: text.encode(model, tokenizer, [describe_in_words(f) for f in rows])["tokens"].mean(1).double()  # (K, D)
    x, y = states(known), states(held)
    for factor in range(4):
        labels = torch.tensor([f[factor] for f in known])
        design = torch.cat([x, torch.ones(len(x), 1)], 1)
        probe = torch.linalg.lstsq(design, F.one_hot(labels).double()).solution
        read = (torch.cat([y, torch.ones(len(y), 1)], 1) @ probe).argmax(1)
        assert (read == torch.tensor([f[factor] for f in held])).double().mean() >= .99


def test_latents_have_unit_variance(autoencoder):
    frames = torch.stack([train.draw_clip(np.random.default_rng((5, i)))[1][:4] for i in range(64)])
    assert abs(vae.encode_video(autoencoder, frames).std() - 1) < .05


def test_decoding_in_chunks_is_decoding_whole(autoencoder, monkeypatch):
    latents = torch.randn(1, 9, 4, 8, 8)
    whole = vae.decode_video(autoencoder, latents)
    monkeypatch.setattr(vae, "CHUNK", 2)
    assert (vae.decode_video(autoencoder, latents).int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("suffix, tolerance", [(".mp4", 8), (".gif", 24)])
@pytest.mark.parametrize("fps", [4., 10.])
def test_video_files_keep_frames_and_frame_rate(tmp_path, suffix, tolerance, fps):
    scene, video, _ = train.draw_clip(np.random.default_rng(3), fps=4.)
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


# ------------------------------------------------------------------------------------------------
# train.py

def test_no_held_out_combination_is_ever_in_a_training_clip():
    forbidden = set(train.TRIPLES["held-out"] + train.TRIPLES["unseen"])
    assert len(train.TRIPLES["train"]) == 336 and len(forbidden) == 80
    for i in range(4000):
        scene = train.draw_scene(np.random.default_rng((0, 2, i)), "train")
        assert (scene["colour"], scene["shape"], scene["motion"]) not in forbidden
    captions = set(train.training_captions())
    for c, s, m in forbidden:
        assert not any(train.caption({"colour": c, "shape": s, "motion": m, "ground": g}) in captions for g in range(5))


def test_clips_of_the_world_are_windows_of_a_scene():
    for i in range(40):
        scene, video, fps = train.draw_clip(np.random.default_rng(i))
        assert 4 <= fps <= 30 and video.shape == (16, 3, 64, 64)
    scene = train.draw_scene(np.random.default_rng(0), ground=1)
    small, large = train.render(scene, [.5], 64)[0].float(), train.render(scene, [.5], 256)[0].float()
    assert (F.avg_pool2d(large, 4) - small).abs().mean() < 4  # the same picture at any size


def test_one_prompt_in_ten_is_dropped_for_guidance():
    args = type("", (), {"seed": 0})
    data = {"latents": torch.zeros(7, 2, 4, 2, 2), "tokens": torch.ones(3, 6, 8), "rows": torch.zeros(7, dtype=torch.long),
            "null": torch.zeros(6, 8), "fps": torch.ones(7)}
    dropped = torch.cat([train.diffusion_batch(args, data, step, range(100))["context"].mean((1, 2)) == 0 for step in range(40)])
    assert abs(dropped.double().mean() - .1) < .02  # four standard deviations of 4000 draws


def test_a_sample_is_a_function_of_seed_step_and_number_alone():
    args = type("", (), {"seed": 0})
    data = {"latents": torch.randn(50, 2, 4, 2, 2), "tokens": torch.ones(3, 6, 8), "rows": torch.zeros(50, dtype=torch.long),
            "null": torch.zeros(6, 8), "fps": torch.ones(50)}
    whole, part = train.diffusion_batch(args, data, 9, range(8)), train.diffusion_batch(args, data, 9, range(4, 8))
    assert all(torch.equal(whole[key][4:], part[key]) for key in whole)
    other = train.diffusion_batch(args, data, 10, range(8))
    assert not torch.equal(whole["noise"], other["noise"]) and whole["noise"].flatten(1).unique(dim=0).shape[0] == 8


def tiny_run(folder, monkeypatch, *flags):
    monkeypatch.setattr(train, "RUNS", folder / "runs")
    train.main(["vae", "--stills", "24", "--steps", "6", "--batch", "4", "--weights", str(folder / "weights"), *flags])
    return base.read_pt(folder / "runs/vae/checkpoint.pt")


def equal(a, b) -> bool:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_an_interrupted_run_reaches_the_very_bits_of_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = tiny_run(tmp_path / "whole", monkeypatch)
    learning_rate = train.learning_rate

    def pull_the_plug(step, recipe):
        if step == 3:
            raise KeyboardInterrupt
        return learning_rate(step, recipe)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learning_rate", pull_the_plug)
        tiny_run(tmp_path / "parts", patch, "--save-minutes", "1e-9")
    resumed = tiny_run(tmp_path / "parts", monkeypatch)
    assert all(equal(whole[key], resumed[key]) for key in ("model", "ema", "optimizer", "step"))
    weights = [base.read_pt(tmp_path / part / "weights/vae.pt") for part in ("whole", "parts")]
    assert equal(weights[0]["model"], weights[1]["model"]) and weights[0]["config"] == weights[1]["config"]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    whole, pieces = tiny_run(tmp_path / "1", monkeypatch, "--steps", "1"), tiny_run(tmp_path / "2", monkeypatch, "--steps", "1", "--accumulate", "2")
    for a, b in zip(whole["optimizer"]["state"].values(), pieces["optimizer"]["state"].values()):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], atol=2e-4, rtol=.05)


def test_a_folder_of_clips_names_what_it_skips(tmp_path, capsys):
    video = train.draw_clip(np.random.default_rng(0), fps=4.)[1]
    vae.write_video(tmp_path / "good.mp4", video, 12.)
    (tmp_path / "good.txt").write_text("a thing moves")
    vae.write_video(tmp_path / "also.gif", video, 10.)
    (tmp_path / "captions.csv").write_text("file,caption\nalso.gif,another thing\n")
    vae.write_video(tmp_path / "short.mp4", video[:1], 12.)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "letter.mp4").write_text("dear diary")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    groups = list(train.folder_clips(tmp_path, 16, 64))
    assert [(words, fps.tolist()) for _, words, fps in groups] == [(["another thing"], [10.]), (["a thing moves"], [12.])]
    assert all(pixels.shape == (1, 16, 3, 64, 64) for pixels, _, _ in groups)
    said = capsys.readouterr().out
    assert all(f"skipped {tmp_path / name}.mp4" in said for name in ("short", "empty", "letter", "broken"))
    assert "2 files used, 4 skipped" in said
    with pytest.raises(UserError, match="no usable clip"):
        list(train.folder_clips(tmp_path, 99, 64))


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
                         "other": {"vae": "00000000"}, "format": {"format": 2}}.items():
        base.write_pt(f"{name}.pt", good | change)
    expected = {"nowhere": "no such file", "truncated": "truncated", "letter": "no .pt file", "bomb": "pickled object", "bare": "bare Tensor",
                "text": "python base.py", "pixels": "python base.py", "shape": "float (B, T, 4, h, w)", "channels": "float (B, T, 4, h, w)",
                "fps": "fps is nan", "dtype": "float (B, T, 4, h, w)", "nan": "NaN", "other": "autoencoder 00000000", "format": "no stage file"}
    for name, words in expected.items():
        assert words in complaint(vae.main, ["decode", f"{name}.pt", "-o", "out.mp4"]), name
    assert "python text.py" in complaint(base.main, ["latents.pt", "-o", "out.pt"])
    assert not list(stages.glob("*out*")) and not (stages / "bombed").exists()


def test_arguments_that_are_refused(stages, monkeypatch):
    monkeypatch.chdir(stages)
    for flags in (["--frames", "0"], ["--fps", "-1"], ["--fps", "nan"], ["--steps", "0"], ["--steps", "1.5"], ["--steps", "1001"]):
        assert flags[0] in complaint(base.main, ["text.pt", "-o", "out.pt", *flags])
        assert flags[0] in complaint(sample.main, ["a red star", "--out", "out.mp4", *flags])
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
    script = "import socket; socket.socket = None\nimport base, text, vae, sample, train"
    subprocess.run([sys.executable, "-c", script], cwd=HERE, check=True, timeout=120)


def test_the_pipeline_by_hand_is_the_pipeline_in_one_command(tmp_path):
    def command(*argv):
        done = subprocess.run([sys.executable, HERE / argv[0], *argv[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    flags = ["--frames", "4", "--fps", "8", "--steps", "2", "--seed", "3"]
    command("text.py", "a red star moving left", "-o", "text.pt")
    command("base.py", "text.pt", "-o", "base.pt", *flags)
    command("vae.py", "decode", "base.pt", "-o", "video.mp4")
    command("vae.py", "encode", "video.mp4", "-o", "z.pt")
    said = command("sample.py", "a red star moving left", *flags, "--keep", "kept", "--out", "again.mp4")
    assert "again.mp4: 4 frames of 64 x 64 at 8 fps" in said
    for name in ("text", "base"):
        assert (tmp_path / f"{name}.pt").read_bytes() == (tmp_path / "kept" / f"{name}.pt").read_bytes()
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    again = base.load_stage(tmp_path / "z.pt", "latents")
    assert again["data"].shape == (1, 4, 4, 8, 8) and again["fps"] == 8 and vae.read_video(tmp_path / "video.mp4")[1] == 8
