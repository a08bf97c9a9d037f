"""What this code promises, each promise held against something simpler: an inverse, a brute-force Jacobian, a
loop over pixels, a library's formula, a file whose content is known. Run: `python -m pytest test_all.py`"""
import csv
import gzip
import json
import math
import os
import re
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
DEGIA = "degia --train 60 --size 16 --batch 8 --rounds 2 --eta .01 --flow-size 4 --flow-steps 1"
REG = "reg --train 20 --width 16 --height 16 --batch 4 --R-width 4 --T-width 4 --D-width 4"

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

@pytest.mark.parametrize("channels,size,levels", [(3, 4, 2), (1, 4, 1), (2, 4, 1), (1, 8, 3)])
def test_the_flow_is_inverted_and_its_log_determinant_is_the_jacobians(channels, size, levels):
    """Eq. (2). Many flows in the wild are not invertible above two channels: no loss shows it."""
    F, (x, u) = random_flow(channels, size, levels), rand(2, 3, channels, size, size)
    z, log_det = F(x, u)
    same(F.inverse(z), (255 * x + u) / 256, 1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda x: F(x[None], u[:1])[0][0], x[0])
    dz_dx = torch.linalg.slogdet(jacobian.view(F.dim, F.dim)).logabsdet
    same(log_det[0], dz_dx - F.dim * math.log(255 / 256), 1e-8)  # that of dz/dy: y = (255 x + u) / 256
    same(flows.bits_per_dim(0 * log_det, F.dim), 8 + 0 * log_det)  # a uniform density: 256 levels, once
    grey = 255 * F.float().sample(torch.arange(60) % 3, torch.Generator().manual_seed(0))
    assert grey.std() > 12 and (grey - grey.round().clamp(0, 255)).abs().max() < 1e-3

def test_actnorm_normalizes_the_first_batch_and_no_other():
    """A flag that checkpoints forget would set it anew after a reload, and change a trained density."""
    F, reloaded, (x, u) = random_flow(), random_flow(), rand(2, 64, 3, 4, 4)
    F.initialise(x, u)
    h, _ = F.levels[0][0](nnf.pixel_unshuffle(torch.logit(0.05 + 0.9 * (255 * x + u) / 256), 2))
    assert h.mean((0, 2, 3)).abs().max() < 1e-6 and (h.std((0, 2, 3)) - 1).abs().max() < 1e-2
    reloaded.load_state_dict(F.state_dict())
    reloaded.initialise(0.1 * x, u)
    same(reloaded(x, u), F(x, u))

def test_the_prior_is_eq_8_and_its_noise_cannot_be_learned_away():
    """However small H_m becomes, its shift keeps mean 0 and deviation lambda; each image has its own."""
    F, (x, u) = random_flow(gamma=0.7, lam=0.3), rand(2, 64, 3, 4, 4)
    c, n = torch.arange(64) % 3, torch.randn(64, flows.NOISE_DIM).double()
    shift = F.prior.shift(n)
    F.prior.H_m[2].weight.data *= 1e-2
    same(F.prior.shift(n[:1]), shift[:1], 1e-3)
    F.prior.log_G_std.weight.data = 8 * rand(3, F.dim) - 4  # beyond both bounds
    mean, std = 0.7 * F.prior.G_m.weight[c] + shift, F.prior.std(c)
    assert shift.mean().abs() < 0.05 and abs(shift.std() - 0.3) < 0.05 and -2.01 < std.log().min() < 0.51
    z, log_det = F(x, u)
    same(F.log_prob(x, c, u, shift), torch.distributions.Normal(mean, std).log_prob(z).sum(1) + log_det, 1e-9)

def test_the_ascent_climbs_eq_7_stays_in_range_and_touches_no_parameter():
    F, M = random_flow().float(), degia.TaskNetwork("lenet", 8, 16, 10)
    x_src, c, u = torch.rand(12, 3, 16, 16), torch.full((12,), 1), torch.rand(12, *F.shape)
    shift, feature_src = F.prior.shift(torch.randn(12, flows.NOISE_DIM)).detach(), M(x_src)[1].detach()
    def objective(x, alpha=1.0):
        return degia.max_objective(x, c, c, M, F, feature_src, u, shift, alpha)
    values = [objective(degia.ascend(x_src, objective, K, eta=1e-3, blur=1)).item() for K in (0, 1, 2, 4)]
    eta = torch.tensor([0.02, 0.5] * 6).view(12, 1, 1, 1)
    x = degia.ascend(x_src, objective, 1, eta, blur=3)
    moved = ((x - x_src) / eta).square().mean((1, 2, 3)).sqrt()  # below 1 where x was clamped
    assert values == sorted(set(values)) and 0 <= x.min() and x.max() <= 1
    assert 0.5 < moved.min() and moved.max() < 1.001 and not x.requires_grad
    assert all(p.grad is None for net in (M, F) for p in net.parameters())
    output, feature = M(x)
    ada = nnf.cross_entropy(output, c, reduction="none") - 2 * (feature - feature_src).square().mean(1)
    same(degia.max_objective(x, c, c, M, None, feature_src, None, None, 2.0), ada.sum(), 1e-4)
    view, ends = nnf.avg_pool2d(x, 4), torch.tensor([[-1.0], [1.0]])
    quantiles = F(view, u)[0].mean(0) + ends * F(view, u)[0].std(0, correction=0)  # W2 pairs equal quantiles
    d = (quantiles - F.prior.mean(c[:1]) - ends * F.prior.std(c[:1])).square().mean()
    same(objective(x, 2.0), (ada - F.log_prob(view, c, u, shift) / F.dim - 2 * d).sum(), 1e-4)

@pytest.mark.parametrize("size", [(5, 5), (17, 30)])
@pytest.mark.parametrize("words", ["--registration pyramid", "--registration unet --T-blocks 1"])
def test_networks_take_any_size_and_learn_with_every_parameter(words, size):
    for backbone in degia.BACKBONES:
        M = degia.TaskNetwork(backbone, 8, 40, 34)
        degia.task_loss(M(rand(3, 3, 40, 40).float())[0], rand(3, 34)).mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in M.parameters())
    R, T, D = geomreg.build(train.parse(f"{REG} {words}".split())[0], 3, 2)
    I_a, I_b = rand(2, 3, *size).float(), rand(2, 2, *size).float()
    phi, O = R(I_a, I_b), T(I_a)
    assert phi.shape == (2, 2, *size) and O.shape == I_b.shape and phi.abs().max() < 5
    (phi.square().sum() + O.square().sum() + D(I_a, I_b).square().sum()).backward()
    assert all(p.grad.isfinite().all() for net in (R, T, D) for p in net.parameters())
    same(geomreg.InstanceNorm()(I_a), nnf.instance_norm(I_a), 1e-5)
    assert geomreg.adversarial(0 * I_a + 9, True) + geomreg.adversarial(0 * I_a - 9, False) < 0.01  # eq. (5)

@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5), (33, 20)])
def test_the_resampler_does_what_eq_1_says(size):
    """Zero is the identity, channel 0 is x, the sign is (1)'s; a pointwise T commutes, as dual flow needs."""
    I, phi, T = rand(2, 3, *size), smooth_field(2, size), torch.nn.Conv2d(3, 1, 1, bias=False).double()
    same(warp.resample(I, 0 * phi), I, 1e-9)
    same(warp.resample(I, 0 * phi + torch.tensor([1, 0]).view(2, 1, 1))[..., :-1], I[..., 1:], 1e-9)
    same(T(warp.resample(I, phi)), warp.resample(T(I), phi), 1e-9)

def test_points_go_where_the_resampler_shows_them():
    """A dot is seen where `warp_points` says, at any scale, and where phi stretches with a slope above 1."""
    phi, p = smooth_field(1, (40, 50), 0.06), torch.tensor([[[21.0, 17.0]]]).double()
    v, q = warp.pixel_grid(40, 50, like=phi), warp.warp_points(p, phi)
    seen = warp.resample(torch.exp(-(v - p.view(1, 2, 1, 1)).square().sum(1, keepdim=True) / 4), phi)
    same(q[0], (seen * v).sum((2, 3)) / seen.sum(), 0.1)
    assert (q - p).abs().max() > 0.4
    same((warp.warp_points(2 * p + 0.5, warp.resize_field(phi, (80, 100))) - 0.5) / 2, q, 2e-2)
    steep = (v - 33) * torch.tensor([1.1, 0]).view(1, 2, 1, 1)  # q + 1.1 (q - 33) = 36
    same(warp.warp_points(p + 15, steep)[..., 0], torch.tensor([[72.3 / 2.1]]).double(), 1e-6)

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

def test_the_jacobian_finds_folds():  # of phi = A v, which mirrors between x = 2 and 3
    x, y = warp.pixel_grid(6, 5, like=torch.zeros(1)).unbind(1)
    phi = torch.stack([0.2 * x + 0.3 * y - 2 * (x > 2), -0.1 * x - 0.1 * y], dim=1)
    there, mirrored = 1.2 * 0.9 + 0.3 * 0.1, -0.8 * 0.9 + 0.3 * 0.1
    same(warp.jacobian_determinant(phi), torch.tensor([[[there, there, mirrored, there]] * 5]), 1e-5)

def test_landmarks_lie_on_the_hand():  # skin is redder than blue, near is bright, bones are bright
    views, y = data.make_hands(40, 64, 3)
    (rgb, depth, xray), places = views.values(), 64 * y.view(40, 1, 17, 2).movedim(3, 1) - 0.5
    for I in (rgb[:, :1].float() - rgb[:, 2:], depth[:, :1].float(), xray[:, :1].float()):
        on_hand = warp.sample_at(nnf.max_pool2d(I, 3, 1, 1), places)
        assert (on_hand > I.flatten(1).median(1).values.view(40, 1, 1, 1) + 12).float().mean() > 0.9

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
    nothing, *left = torch.stack(errors).mean(0)
    assert 5 <= nothing <= 7 and (torch.stack(left) > torch.tensor([0.95, 0.55, 0.35]) * nothing).all()

IMAGES = np.array([0x803, 40, 28, 28], ">i4").tobytes() + (255 * rand(40, 28, 28)).byte().numpy().tobytes()
LABELS = np.array([0x801, 40], ">i4").tobytes() + 4 * bytes(range(10))
HAND = b"name," + b",".join(b"x%d,y%d" % (i, i) for i in range(17))
PAIRS = b"name,xa,ya,xb,yb"

def user_folder(folder, spoilt=None):  # MNIST, red MNIST-M, a hand, pairs with B deep; spoilt: {file: bytes}
    for name in ("mnist_m_train", "train/A", "train/B", "images"):
        (folder / name).mkdir(parents=True)
    for i, mode in enumerate(("P", "RGB", "RGBA")):
        Image.new("RGB", (32, 32), (80 + i, 0, 0)).save(folder / f"mnist_m_train/{i}.png")
        picture = Image.fromarray((255 * rand(5, 6, 3, seed=i)).byte().numpy()).resize((24, 20))
        picture.convert(mode).save(folder / f"train/A/a{i}.png")
        deep = np.asarray(picture.convert("L").resize((48, 40)), np.uint16) * 200
        Image.fromarray(deep).save(folder / f"train/B/a{i}.png")
    hand = np.zeros((48, 96), np.uint8)
    hand[17:24, 7:14] = hand[37:44, 77:84] = 255  # squares around (10, 20) and (80, 40)
    Image.fromarray(hand).save(folder / "images/h.png")
    files = {"train-images-idx3-ubyte.gz": gzip.compress(IMAGES), "train-labels-idx1-ubyte": LABELS,
             "t10k-images-idx3-ubyte.gz": gzip.compress(IMAGES), "t10k-labels-idx1-ubyte": LABELS,
             "mnist_m_train_labels.txt": b"0.png 3\n1.png 1\n2.png 4", "train/A/notes.txt": b"no image",
             "train/landmarks.csv": PAIRS + b"\na0,3,4,5,6\na1,23,19,0,0",
             "landmarks.csv": HAND + b"\nh.png" + 8 * b",10,20,80,40" + b",10,20"}
    for name, content in {**files, **(spoilt or {})}.items():
        (folder / name).write_bytes(content)
    return folder

def test_folders_are_read_as_they_were_written(tmp_path):
    folder = user_folder(tmp_path / "mm")
    o, _ = train.parse(f"degia --data {folder} --unseen {folder} --size 28 --train 30".split())
    x, y, domains = data.load_digits(o)
    same(x[:, 0], (255 * rand(40, 28, 28)).byte()[:30])
    assert y.tolist() == 3 * [*range(10)] and domains["mm"][1].tolist() == [3, 1, 4]
    assert domains["mm"][0][:, 0, 5, 5].tolist() == [80, 81, 82]
    o, _ = train.parse(f"reg --data {folder} --height 20 --width 24".split())
    A, B, points, _ = data.load_pairs(o)[0]["test"]  # those of train/, for want of others
    assert A.shape == (3, 3, 20, 24) and B.shape == (3, 1, 20, 24) and points[2].isnan().all()
    assert np.corrcoef(A.float().mean(1).flatten(), B.flatten())[0, 1] > 0.7
    same(points[:2, 0], torch.tensor([[3, 4, 2.25, 2.75], [23, 19, -0.25, -0.25]]), 1e-5)
    x, y = data.load_landmarks(folder, 24)
    places = (24 * y.view(1, 17, 2) - 0.5).transpose(1, 2)[..., None]  # in an image of another size and shape
    assert x.shape == (1, 3, 24, 24) and warp.sample_at(x.float(), places).min() > 200

@pytest.mark.parametrize("message,words,spoilt", [  # {}: the user's folder, a file of which may be spoilt
    ("idx3-ubyte.gz: damaged", "degia --data {}", {"train-images-idx3-ubyte.gz": gzip.compress(IMAGES[:-9])}),
    ("labels up to 11", "degia --data {}", {"train-labels-idx1-ubyte": LABELS[:8] + 40 * b"\x0b"}),
    ("--train 41", "degia --data {} --train 41", {}),
    ("labels.txt, line 2", "degia --train 20 --unseen {}", {"mnist_m_train_labels.txt": b"0.png 3\n1.png x"}),
    ("--beta: 2 is not from 0.0001 to 1", "degia --beta 2", {}),
    ("line 2: .*outside", "degia --task hands --data {}", {"landmarks.csv": HAND + b"\nh" + 17 * b",97,1"}),
    ("h.png: has 2", "degia --task hands --data {}", {"landmarks.csv": HAND + 2 * (b"\nh" + 34 * b",1")}),
    ("checkpoint.pt: no such checkpoint", "reg --resume", {}),
    ("A/a9.png: no partner", "reg --data {}", {"train/A/a9.png": b"text"}),
    ("B/a1.png: not a readable", "reg --data {}", {"train/B/a1.png": b"text"}),
    ("line 3.*x,4", "reg --data {}", {"train/landmarks.csv": PAIRS + b"\na0,1,2,3,4\na1,1,2,x,4"}),
    ("first line must be", "reg --data {}", {"train/landmarks.csv": b"x,y"})])
def test_bad_input_gets_one_line_and_writes_nothing(message, words, spoilt, tmp_path, capsys, monkeypatch):
    words = words.format(user_folder(tmp_path, spoilt)) + f" --out {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    pytest.raises(SystemExit, evaluation.exit_on_bad_input, train.main).match("^2$")
    assert re.fullmatch(f".*{message}.*\n", capsys.readouterr().err) and not (tmp_path / "run").exists()

def run(words, out):  # what `train.py WORDS --out OUT` leaves: its checkpoint and results.json
    train.main([*words.split(), "--out", str(out)])
    return evaluation.load_checkpoint(out), json.loads((out / "results.json").read_text())

@pytest.mark.parametrize("words,other", [
    (DEGIA, "reg"), (REG, "degia"), (f"{REG} --similarity ncc --modality depth", "degia")])
def test_a_run_that_is_killed_and_resumed_equals_a_whole_one(words, other, tmp_path, monkeypatch):
    """Bit for bit, dying while it writes, wrong commands between. Two processes learn what one does."""
    save, program, words, parts = torch.save, words.split()[0], f"{words} --steps 12", tmp_path / "parts"
    whole, results = run(words, tmp_path / "whole")
    def die(content, path):
        if content["step"] == 7:
            path.write_bytes(b"half")
            raise ZeroDivisionError
        save(content, path)
    monkeypatch.setattr(train.time, "time", iter(range(0, 10 ** 6, 100)).__next__)  # so it saves at each step
    monkeypatch.setattr(torch, "save", die)
    pytest.raises(ZeroDivisionError, run, words, parts)
    monkeypatch.undo()
    assert evaluation.load_checkpoint(parts)["step"] == 6
    for wrong, message in {words: "or choose another", f"{other} --resume": f"train.py {program}",
                           f"{program} --resume --steps 13": "another --steps"}.items():
        pytest.raises(data.InputError, run, wrong, parts).match(message)
    rest, resumed_results = run(f"{program} --resume", parts)
    same(whole["state"], rest["state"])
    own = {"seconds": 0, "out": "", "resume": True}
    assert [row | own for row in whole["log"]] == [row | own for row in rest["log"]]
    assert results | own == resumed_results | own and str(whole["extra"]) == str(rest["extra"])
    command = f"-m torch.distributed.run --standalone --nproc_per_node=2 {train.__file__} {words}"
    subprocess.run([sys.executable, *command.split(), "--out", str(tmp_path)], check=True,
                   env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    two = evaluation.load_checkpoint(tmp_path)["log"]
    same(*(torch.tensor([[*row.values()][1:-1] for row in log]).mean(0) for log in (whole["log"], two)), 0.25)

def test_short_runs_learn_and_a_rate_far_too_high_costs_no_checkpoint(tmp_path):
    _, results = run("degia --method pure --train 999 --steps 130 --size 16 --lr 1e-3", tmp_path / "d")
    assert results["domains"]["source"]["accuracy"] > 80 and "bits_per_dim" not in results
    _, results = run("reg --train 100 --steps 80 --adversarial 0 --width 32 --height 32", tmp_path / "r")
    assert results["registered"]["scene"] < 0.9 * results["unregistered"]["scene"]
    with pytest.raises(data.InputError, match=r"^step \d+: task is (nan|inf)"):
        run(f"{DEGIA} --steps 8 --method pure --lr 1e30", tmp_path)
    assert evaluation.load_checkpoint(tmp_path)["step"] == 0

def test_each_loss_of_registration_moves_its_own_networks(tmp_path):
    """Table 2, one step: with L_recon to R and the GAN to T, R moves as without D, T as without L_recon."""
    words = f"{REG} --steps 1 --practice 0 --smooth 1 --recon .5"
    routed, no_gan, no_recon = (run(f"{words} {more}", tmp_path / more)[0]["state"]
                                for more in ("--l1 R --gan T", "--adversarial 0", "--recon 0"))
    same(routed["R"], no_gan["R"], 1e-5)
    same((routed["T"], routed["D"]), (no_recon["T"], no_recon["D"]), 1e-5)
    assert "D" not in no_gan and not torch.equal(routed["T"]["net.1.weight"], no_gan["T"]["net.1.weight"])

def test_eval_repeats_the_numbers_of_a_run_and_reads_the_users_files(tmp_path, capsys):
    folder, (digits, reg, hands) = user_folder(tmp_path), [tmp_path / name for name in ("d", "r", "h")]
    A, B = folder / "train/A/a1.png", folder / "train/B/a1.png"
    checkpoint, results = run(f"{DEGIA} --steps 8", digits)
    _, pairs = run(f"{REG} --steps 2 --data {folder}", reg)
    run(f"{DEGIA} --task hands --size 32 --M-width 2 --steps 4", hands)
    pool, (x_src, _) = checkpoint["extra"], data.make_digits(60, 16, 0)
    assert len(pool["x"]) == 24 and (pool["x"] / 255 - x_src[pool["source"]]).abs().mean() < 0.05
    for words in ([digits], [digits, "--images", A], [reg], [reg, "--images", A, B], [hands, "--images", A]):
        evaluation.main([str(word) for word in words])
    printed = capsys.readouterr().out
    for name, measures in {**results["domains"], "registered": pairs["registered"]}.items():
        for measure, value in measures.items():  # train.py printed it, and eval.py again
            assert len(re.findall(rf" {name} .*{measure} +{value:.5f}", printed)) == 2
    (row,) = csv.DictReader((hands / "landmarks.csv").open())
    assert row["name"] == "a1.png" and len(row) == 35 and 0 < float(row["x16"]) < 24
    phi = torch.from_numpy(np.load(reg / "a1_field.npy"))[None]
    I, aligned = data.read_images([A, reg / "a1_aligned.png"], (40, 48)).float()
    assert re.search(r"a1.png: \d", printed) and phi.shape == (1, 2, 40, 48)
    assert (aligned - warp.resample(I[None], phi)[0])[:, 2:-2, 2:-2].abs().mean() < 2
