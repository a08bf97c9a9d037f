"""What this code promises, each promise held against something simpler: an inverse, a loop, a library."""
import gc
import gzip
import json
import os
import re
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image

import data
import degia
import eval as evaluation
import flows
import geomreg
import train
import warp

train.device = evaluation.device = torch.device("cpu")  # bit for bit equality is promised there
evaluation.bfloat16 = False  # its rounding would blur the oracles
DEGIA = "degia --train 60 --size 16 --batch 8 --rounds 2 --eta .01 --flow-size 4"
REG = "reg --train 20 --width 17 --height 30 --batch 4 --R-width 4 --T-width 4 --D-width 4"

def same(a, b, tolerance=0.0):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def rand(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def smooth_field(n, size, bend=0.1):
    return warp.random_field(n, size, bend, 0.0, torch.Generator().manual_seed(1)).double()

def random_flow(channels=3, size=4, levels=2, **options):  # any bug passes where couplings are identities
    torch.manual_seed(0)
    F = flows.Flow(channels, size, classes=3, levels=levels, steps=2, hidden=8, **options).double()
    for p in F.parameters():
        p.data += 0.15 * torch.randn_like(p)
    return F

@pytest.mark.parametrize("channels,size,levels", [(3, 4, 2), (2, 4, 1), (1, 8, 3)])
def test_the_flow_is_inverted_and_its_log_determinant_is_the_jacobians(channels, size, levels):
    """Eq. (2). Many flows in the wild are not invertible above two channels: no loss shows it."""
    F, (x, u) = random_flow(channels, size, levels), rand(2, 3, channels, size, size)
    z, log_det = F(x, u)
    same(F.inverse(z), (255 * x + u) / 256, 1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda x: F(x[None], u[:1])[0][0], x[0])
    dz_dx = torch.linalg.slogdet(jacobian.view(F.dim, F.dim)).logabsdet
    same(log_det[0], dz_dx - F.dim * np.log(255 / 256), 1e-8)  # that of dz/dy: y = (255 x + u) / 256
    same(flows.bits_per_dim(0 * log_det, F.dim), 8 + 0 * log_det)  # a uniform density: 256 levels, once
    grey = 255 * F.float().sample(torch.arange(60) % 3, torch.Generator().manual_seed(0))
    assert grey.std() > 12 and (grey - grey.round().clamp(0, 255)).abs().max() < 1e-3

def test_actnorm_normalizes_the_first_batch_and_no_other():
    """Only `initialise` does, never a first call of forward: a reloaded F must stay as it was."""
    F, (x, u) = random_flow(), rand(2, 64, 3, 4, 4)
    F(x, u, initialise=True)
    F(0.1 * x, u)
    h, _ = F.levels[0][0](nnf.pixel_unshuffle(torch.logit(0.05 + 0.9 * (255 * x + u) / 256), 2))
    assert h.mean((0, 2, 3)).abs().max() < 1e-6 and (h.std((0, 2, 3)) - 1).abs().max() < 1e-2

def test_the_prior_is_eq_8_and_its_noise_cannot_be_learned_away():
    """However small H_m becomes, its shift keeps mean 0 and deviation lambda; each image has its own."""
    F, (x, u) = random_flow(lam=0.3), rand(2, 64, 3, 4, 4)
    c, n = torch.arange(64) % 3, torch.randn(64, flows.NOISE_DIM).double()
    shift = F.prior.shift(n)
    F.prior.H_m[2].weight.data *= 1e-2
    same(F.prior.shift(n[:1]), shift[:1], 1e-3)
    F.prior.log_G_std.weight.data = 8 * rand(3, F.dim) - 4  # beyond both bounds
    mean, std = F.prior.G_m.weight[c] + shift, F.prior.std(c)
    assert shift.mean().abs() < 0.05 and abs(shift.std() - 0.3) < 0.05 and -2.01 < std.log().min() < 0.51
    z, log_det = F(x, u)
    same(F.log_prob(x, c, u, shift), torch.distributions.Normal(mean, std).log_prob(z).sum(1) + log_det, 1e-9)

def test_the_ascent_climbs_eq_7_stays_in_range_and_touches_no_parameter():
    F, M = random_flow().float(), degia.TaskNetwork("lenet", 8, 16, 10)
    x_src, c, u = torch.rand(12, 3, 16, 16), torch.full((12,), 1), torch.rand(12, *F.shape)
    shift, feature_src = F.prior.shift(torch.randn(12, flows.NOISE_DIM)).detach(), M(x_src)[1].detach()
    def objective(x):
        return degia.max_objective(x, c, c, M, F, feature_src, u, shift, 2.0)
    values = [objective(degia.ascend(x_src, objective, K, eta=1e-3, blur=1)).item() for K in (0, 1, 3)]
    assert values == sorted(set(values))
    x = degia.ascend(x_src, objective, 1, eta=0.5, blur=3)
    assert 0 <= x.min() and x.max() <= 1 and all(p.grad is None for p in [*M.parameters(), *F.parameters()])
    assert 0.25 < (x - x_src).square().mean().sqrt() < 0.501  # eta, or less where x was clamped
    l_task, features = nnf.cross_entropy(M(x)[0], c), (M(x)[1] - feature_src).square().mean()
    view = nnf.avg_pool2d(x, 4)
    z = F(view, u)[0]
    d = ((z.mean(0) - F.prior.mean(c[0])) ** 2 + (z.std(0, correction=0) - F.prior.std(c[0])) ** 2).mean()
    by_hand = l_task - F.log_prob(view, c, u, shift).mean() / F.dim - 2 * (d + features)
    same(objective(x) / 12, by_hand, 1e-4)

@pytest.mark.parametrize("backbone", degia.BACKBONES)
def test_backbones_learn_with_every_parameter(backbone):
    M = degia.TaskNetwork(backbone, 8, 40, 34)
    degia.task_loss(M(rand(3, 3, 40, 40).float())[0], rand(3, 34)).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in M.parameters())

@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5)])
def test_the_resampler_does_what_eq_1_says(size):
    """Zero is the identity, channel 0 is x, and the sign is that of (1); y: the next test."""
    I, phi = rand(2, 3, *size), smooth_field(2, size)
    same(warp.resample(I, 0 * phi), I, 1e-9)
    same(warp.resample(I, warp.scaled(0 * phi + 1, 1, 0))[..., :-1], I[..., 1:], 1e-9)

def test_points_go_where_the_resampler_shows_them():
    """A dot is seen where `warp_points` says, at any scale, and where phi stretches with a slope above 1."""
    phi, p = smooth_field(1, (40, 50), 0.06), torch.tensor([[[21.0, 17.0]]]).double()
    v, q = warp.pixel_grid(40, 50, like=phi), warp.warp_points(p, phi)
    seen = warp.resample(torch.exp(-(v - p.view(1, 2, 1, 1)).square().sum(1, keepdim=True) / 4), phi)
    same(q[0], (seen * v).sum((2, 3)) / seen.sum(), 0.1)
    same((warp.warp_points(2 * p + 0.5, warp.resize_field(phi, (80, 100))) - 0.5) / 2, q, 2e-2)
    A = torch.tensor([[1.5, 0.3], [-0.2, 0.4]]).double()
    steep = torch.einsum("ij,bjhw->bihw", A, v - 33)
    q = warp.warp_points(p + 15, steep)
    same(q + (q - 33) @ A.T, p + 15, 1e-6)
    same(warp.jacobian_determinant(-steep)[0, 3, 4].item(), -0.24, 1e-6)  # det(1 - A): a fold

@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_smoothness_is_eq_2_neighbour_by_neighbour(alpha):
    phi, O_s, total = smooth_field(1, (5, 6))[0], rand(2, 5, 6), 0.0
    for y, x, v, u in np.ndindex(5, 6, 5, 6):
        if max(abs(y - v), abs(x - u)) == 1:
            bend = (phi[:, y, x] - phi[:, v, u]) / torch.tensor([2.5, 2.0])  # in half-sides
            total += torch.exp(-alpha * (O_s[:, y, x] - O_s[:, v, u]).norm()) * bend.norm()
    same(warp.smoothness(phi[None], O_s[None], alpha), total / 30 * 6 / 256, 1e-6)
    assert not warp.smoothness(phi[None], O_s[None].requires_grad_(), alpha).requires_grad  # a constant
    small, large = (warp.smoothness(smooth_field(1, (s, s)), torch.zeros(1, 1, s, s), 1.0) for s in (64, 128))
    assert small.item() == pytest.approx(large.item(), rel=0.05)

def test_a_single_pair_is_aligned_and_two_scenes_are_not():
    """B is the negative of A, moved by a known field: no difference of greys could find it."""
    I_a, field = data.make_plants(4, (96, 96), 1).A / 127.5 - 1, smooth_field(4, (96, 96), 0.04).float()
    I_b = -warp.resample(I_a, field, "border")
    phi = geomreg.optimise(I_a, I_b)
    assert warp.norm(phi - field)[:, 10:-10, 10:-10].mean() < 0.2 * warp.norm(field).mean()
    assert warp.jacobian_determinant(phi).min() > 0
    for other in (data.make_hands(4, 96, 1)[0]["source"] / 127.5 - 1, I_a, 0 * I_a):  # another, same, nothing
        same(geomreg.optimise(I_a, other), 0 * phi)

@pytest.mark.parametrize("seed", range(101, 106))
def test_embedded_plants_are_honestly_misaligned(seed):
    pairs, errors = [p[~p.isnan().any(1)].double() for p in data.make_plants(100, (64, 64), seed).points], []
    for i, pair in enumerate(pairs):
        a, b = pair.split(2, dim=1)
        a_others, b_others = torch.cat(pairs[:i] + pairs[i + 1:]).split(2, dim=1)
        near = torch.softmax(-torch.cdist(a, a_others).square() / 32, dim=1)
        A = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        affine = A @ torch.linalg.lstsq(A, b).solution
        guesses = torch.stack([a, a + near @ (b_others - a_others), a + (b - a).mean(0), affine])
        errors.append((guesses - b).norm(dim=2).mean(1))
    nothing, *left = torch.stack(errors).mean(0)  # by: the field of other scenes, own mean shift, own affine
    assert 5 <= nothing <= 7 and (torch.stack(left) > torch.tensor([0.95, 0.55, 0.35]) * nothing).all()

IMAGES = np.array([0x803, 40, 28, 28], ">i4").tobytes() + (255 * rand(40, 28, 28)).byte().numpy().tobytes()
LABELS = np.array([0x801, 40], ">i4").tobytes() + 4 * bytes(range(10))
TABLE, HANDS = b"name,xa,ya,xb,yb", f"name,{','.join(data.HAND_COLUMNS)}".encode()

def user_folder(folder, spoilt=None):  # MNIST, red MNIST-M, hands, pairs with B deep; spoilt: {file: bytes}
    for name in ("mnist_m_train", "images", "train/A", "train/B"):
        (folder / name).mkdir(parents=True)
    for i, mode in enumerate(("P", "RGB", "RGBA")):
        Image.new("RGB", (32, 32), (80 + i, 0, 0)).save(folder / f"mnist_m_train/{i}.png")
        picture = Image.fromarray((255 * rand(5, 6, 3, seed=i)).byte().numpy()).resize((24, 20))
        picture.convert(mode).save(folder / f"train/A/a{i}.png")
        picture.save(folder / f"images/{i}.png")
        deep = np.asarray(picture.convert("L").resize((48, 40)), np.uint16) * 200
        Image.fromarray(deep).save(folder / f"train/B/a{i}.png")
    files = {"train-images-idx3-ubyte.gz": gzip.compress(IMAGES), "train-labels-idx1-ubyte": LABELS,
             "t10k-images-idx3-ubyte.gz": gzip.compress(IMAGES), "t10k-labels-idx1-ubyte": LABELS,
             "mnist_m_train_labels.txt": b"0.png 3\n1.png 1\n2.png 4", "train/A/notes.txt": b"no image",
             "landmarks.csv": HANDS + b"".join(b"\n%d.png%s" % (i, b",%d,9" % i * 17) for i in range(3)),
             "train/landmarks.csv": TABLE + b"\na0,3,4,5,6\na1,23,19,0,0"}
    for name, content in (files | (spoilt or {})).items():
        (folder / name).write_bytes(content)
    return folder

def test_folders_are_read_as_they_were_written(tmp_path):
    folder = user_folder(tmp_path / "mm")
    o, _ = train.parse(f"degia --data {folder} --unseen {folder} --size 28 --train 30".split())
    x, y, domains = data.load_digits(o)
    same(x[:, 0], (255 * rand(40, 28, 28)).byte()[:30])
    assert y.tolist() == 3 * [*range(10)] and domains["mm"][1].tolist() == [3, 1, 4]
    assert domains["mm"][0][:, 0, 5, 5].tolist() == [80, 81, 82]
    o, _ = train.parse(f"degia --task hands --data {folder} --unseen {folder} --size 48".split())
    x, y, domains = data.load_hands(o)  # every tenth image is held out
    same((x, y), (domains["mm"][0][1:], domains["mm"][1][1:]))
    same(y[1, 32:], torch.tensor([2.5 / 24, 9.5 / 20]), 1e-6)
    o, _ = train.parse(f"reg --data {folder} --height 20 --width 24".split())
    A, B, points, _ = data.load_pairs(o)[0]["test"]  # those of train/, for want of others
    assert A.shape == (3, 3, 20, 24) and B.shape == (3, 1, 20, 24) and points[2].isnan().all()
    assert np.corrcoef(A.float().mean(1).flatten(), B.flatten())[0, 1] > 0.7
    same(points[:2, 0], torch.tensor([[3, 4, 2.25, 2.75], [23, 19, -0.25, -0.25]]), 1e-5)

@pytest.mark.parametrize("message,words,spoilt", [  # {}: the user's folder, a file of which may be spoilt
    ("idx3-ubyte.gz: damaged", "degia --data {}", {"train-images-idx3-ubyte.gz": gzip.compress(IMAGES[:-9])}),
    ("line 2: .*outside", "reg --data {}", {"train/landmarks.csv": TABLE + b"\na0,1,2,97,4"}),
    ("A/a9.png: no partner", "reg --data {}", {"train/A/a9.png": b"text"}),
    ("B/a1.png: not a readable", "reg --data {}", {"train/B/a1.png": b"text"}),
    ("0.png: has 0 lines", "degia --task hands --data {}", {"landmarks.csv": HANDS}),
    ("line 3.*x,4", "reg --data {}", {"train/landmarks.csv": TABLE + b"\na0,1,2,3,4\na1,1,2,x,4"}),
    ("no coordinate is above 1", "reg --data {}", {"train/landmarks.csv": TABLE + b"\na0,0,.5,1,.2"})])
def test_bad_input_gets_one_line_and_writes_nothing(message, words, spoilt, tmp_path, capsys, monkeypatch):
    words = words.format(user_folder(tmp_path / "mine", spoilt)) + f" --out {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    pytest.raises(SystemExit, evaluation.exit_on_bad_input, train.main).match("^2$")
    assert re.fullmatch(f".*{message}.*\n", capsys.readouterr().err) and not (tmp_path / "run").exists()

def test_a_run_has_a_folder_of_its_own(tmp_path):
    mine, out = user_folder(tmp_path / "mine"), tmp_path / "run"
    words = f"{REG} --steps 1 --data {mine}"
    for wrong in (mine, mine / "run", tmp_path):
        pytest.raises(data.InputError, run, words, wrong).match("it holds the data")
    run(words, out)
    for wrong, message in {words: "it holds files", "degia --resume": "train.py reg",
                           "reg --resume --steps 13": "another --steps"}.items():
        pytest.raises(data.InputError, run, wrong, out).match(message)
    (mine / "train/A/a0.png").write_bytes(LABELS)
    pytest.raises(data.InputError, run, "reg --resume", out).match("not those of the run")
    run(f"reg --resume --data {user_folder(tmp_path / 'moved')}", out)
    _other = sqlite3.connect(out / "lock").execute("BEGIN EXCLUSIVE")
    pytest.raises(data.InputError, run, "reg --resume", out).match("another process")

def run(words, out):  # what `train.py WORDS --out OUT` leaves: its checkpoint and results.json
    gc.collect()  # a run that was killed within this process would still hold its lock
    train.main([*words.split(), "--out", str(out)])
    return evaluation.load_checkpoint(out), json.loads((out / "results.json").read_text())

@pytest.mark.parametrize("words", [DEGIA, f"{DEGIA} --task hands --size 32", f"{REG} --similarity mind",
                                   f"{REG} --registration unet --T-blocks 1"])
def test_a_run_that_is_killed_and_resumed_equals_a_whole_one(words, tmp_path, monkeypatch):  # bit for bit
    save, program = torch.save, words.split()[0]
    whole, results = run(f"{words} --steps 12", tmp_path / "whole")
    def die(content, path):
        save(content, path)
        if content["step"] == 7:
            raise KeyboardInterrupt
    monkeypatch.setattr(train.time, "time", iter(range(0, 10 ** 6, 100)).__next__)  # so it saves at each step
    monkeypatch.setattr(torch, "save", die)
    pytest.raises(KeyboardInterrupt, run, f"{words} --steps 12", tmp_path / "parts")
    monkeypatch.undo()
    assert evaluation.load_checkpoint(tmp_path / "parts")["step"] == 6
    rest, resumed_results = run(f"{program} --resume", tmp_path / "parts")
    same(whole["state"], rest["state"])
    own = {"seconds": 0, "out": "", "resume": True}
    assert [row | own for row in whole["log"]] == [row | own for row in rest["log"]] != []
    assert results | own == resumed_results | own and str(whole["extra"]) == str(rest["extra"])

def test_two_processes_learn_by_their_own_batches_and_keep_equal_networks(tmp_path):
    start = [sys.executable, "-mtorch.distributed.run", "--standalone", "--nproc-per-node=2", train.__file__]
    words = f"{DEGIA} --train 999 --M-width 16 --rounds 1 --steps 90 --batch 48 --lr 4e-3 --out {tmp_path}"
    subprocess.run([*start, *words.split()], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    first, second = map(evaluation.load_checkpoint, (tmp_path, tmp_path / "rank1"))
    same((first["state"], first["extra"]), (second["state"], second["extra"]))
    assert first["log"][-1]["task"] != second["log"][-1]["task"]
    assert json.loads((tmp_path / "results.json").read_text())["domains"]["source"]["accuracy"] > 70

def test_short_runs_learn_and_a_rate_far_too_high_costs_no_checkpoint(tmp_path):
    _, pairs = run("reg --train 100 --steps 80 --adversarial 0 --width 32 --height 32", tmp_path / "r")
    assert pairs["registered"]["scene"] < 0.88 * pairs["unregistered"]["scene"]
    with pytest.raises(data.InputError, match=r"^step \d+: task is (nan|inf)"):
        run(f"{DEGIA} --steps 8 --method pure --lr 1e9", tmp_path / "n")
    assert evaluation.load_checkpoint(tmp_path / "n")["step"] == 0

def test_each_loss_of_registration_moves_its_own_networks(tmp_path):
    """Table 2, one step: with L_recon to R and the GAN to T, R moves as without D, T as without L_recon."""
    words = f"{REG} --steps 1 --practice 0 --smooth 1 --recon .5"
    routed, no_gan, no_recon = (run(f"{words} {more}", tmp_path / more)[0]["state"]
                                for more in ("--l1 R --gan T", "--adversarial 0", "--recon 0"))
    same(routed["R"], no_gan["R"], 1e-5)
    same((routed["T"], routed["D"]), (no_recon["T"], no_recon["D"]), 1e-5)
    assert geomreg.adversarial(torch.ones(1), True) < 1 < geomreg.adversarial(torch.ones(1), False)  # (5)
    assert "D" not in no_gan and not torch.equal(routed["T"]["net.1.weight"], no_gan["T"]["net.1.weight"])

def test_each_order_is_what_it_says(tmp_path, monkeypatch):
    """With A moved out of sight, no loss sees what a T that came first made; one that comes last learns."""
    monkeypatch.setattr(geomreg.Pyramid, "forward", lambda R, A, B: torch.full((len(A), 2, 30, 17), 99.0))
    words = f"{REG} --steps 1 --practice 0 --adversarial 0 --match l1"
    first, last, none = (run(f"{words} {more}", tmp_path / more)[0]["state"]["T"]["net.1.bias"]
                         for more in ("--order translate-first", "--order register-first", "--recon 0"))
    same(first, none)
    assert not torch.equal(last, none)

def test_eval_repeats_the_numbers_of_a_run_and_reads_the_users_files(tmp_path, capsys):
    folder, digits, reg = user_folder(tmp_path / "mine"), tmp_path / "digits", tmp_path / "reg"
    A, B = folder / "train/A/a1.png", folder / "train/B/a1.png"
    checkpoint, results = run(f"{DEGIA} --steps 8", digits)
    run(f"{REG} --steps 2 --data {folder}", reg)
    pool, (x_src, _) = checkpoint["extra"], data.make_digits(60, 16, 0)
    assert len(pool["x"]) == 24 and (pool["x"] / 255 - x_src[pool["source"]]).abs().mean() < 0.05
    for words in ([digits], [digits, "--images", A], [reg, "--refine"], [reg, "--images", A, B]):
        evaluation.main([*map(str, words)])
    printed = capsys.readouterr().out
    for look in results["domains"].values():  # printed by train.py, and by eval.py again
        assert printed.count(f"accuracy {look['accuracy']:8.5f}") >= 2
    phi = torch.from_numpy(np.load(reg / "a1_field.npy")).view(1, 2, 40, 48)
    I, aligned = data.read_images([A, reg / "a1_aligned.png"], (40, 48))[0].float()
    assert re.search(r"a1.png: \d", printed) and "refined" in (reg / "results.json").read_text()
    assert (aligned - warp.resample(I[None], phi)[0])[:, 2:-2, 2:-2].abs().mean() < 2
