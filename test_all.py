"""What this code promises, a promise per test: `python -m pytest test_all.py`. Nothing is downloaded.

Each compares with an oracle written differently: an inverse, autograd's Jacobian, torch.distributions, a run
that was not interrupted. Layers that start at zero are perturbed first, else an identity would pass.
"""
import gzip
import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image

import data
import degia
import eval as evaluation
import flows
import train

HERE = Path(__file__).parent
TINY = ("--train 60 --size 16 --batch 8 --rounds 2 --K 2 --flow-size 4 --flow-steps 1 --flow-hidden 8 "
        "--dtype f32").split()

def same(a, b, tolerance=0.):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def rand(*shape, seed=1, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def perturbed_flow(channels=3, size=4, classes=3, levels=2, dtype=torch.float64, **options):
    """A small flow whose every parameter is random, so that no layer is an identity."""
    torch.manual_seed(0)
    F = flows.Flow(channels, size, classes, levels, steps=2, hidden=8, **options).to(dtype)
    for p in F.parameters():
        p.data.add_(.15 * torch.randn_like(p))
    return F

# ---------------------------------------------------------------- flows

@pytest.mark.parametrize("channels,size,levels", [(3, 4, 2), (1, 4, 1), (2, 4, 1), (1, 8, 3)])
def test_the_flow_is_inverted_and_its_log_determinant_is_the_jacobians(channels, size, levels):
    """Sampling undoes the training path; eq. (2) by brute force, with half of the code factored out."""
    F = perturbed_flow(channels, size, levels=levels)
    x, u = rand(2, 3, channels, size, size)
    z, log_det = F(x, u)
    assert z.std() > .3
    same(F.inverse(z), (255 * x + u) / 256, 1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda v: F(v[None], u[:1])[0][0], x[0]).view(F.dim, F.dim)
    same(log_det[0], torch.linalg.slogdet(jacobian)[1] - F.dim * math.log(255 / 256), 1e-8)

def test_density_integrates_to_one():
    """A likelihood that does not integrate to 1 compares with nothing (4 dimensions, Monte Carlo)."""
    F, eps = perturbed_flow(1, 2, classes=2, levels=1), flows.SQUEEZED_LOGIT
    low, width = -eps / (1 - 2 * eps), 1 / (1 - 2 * eps)  # the logit's whole domain
    y = low + width * rand(400_000, 1, 2, 2, seed=2)
    with torch.no_grad():
        p = F.log_prob(y * 256 / 255, torch.ones(len(y), dtype=torch.long), torch.zeros_like(y)).exp()
    assert abs(p.mean().item() * width ** 4 - 1) < .02

def test_actnorm_normalises_its_first_batch_and_stays_set_after_a_reload():
    """A flag that is not in the checkpoint makes a reloaded flow set itself anew, from another batch."""
    F, other = perturbed_flow(), perturbed_flow()
    x, u = rand(2, 64, 3, 4, 4)
    F.initialise(x, u)
    h = F.levels[0][0](nnf.pixel_unshuffle(torch.logit(.05 + .9 * (255 * x + u) / 256), 2))[0]
    assert h.mean((0, 2, 3)).abs().max() < 1e-6 and (h.std((0, 2, 3)) - 1).abs().max() < .01
    other.load_state_dict(F.state_dict())
    other.initialise(.1 * x, u)
    same(other(x, u), F(x, u))

def test_prior_is_the_gaussian_of_eq_8():
    """mu_c = gamma G_m(c) + shift, Sigma_c = G_std(c) within its bounds, against torch.distributions."""
    F = perturbed_flow(gamma=.7, lam=.4)
    F.prior.log_G_std.weight.data *= 20
    z, c = 4 * rand(6, F.dim) - 2, torch.tensor([0, 1, 2, 2, 1, 0])
    shift = F.prior.shift(rand(6, flows.NOISE_DIM))
    std = F.prior.log_G_std.weight[c].clamp(-2, .5).exp()
    assert std.min() < .14 and std.max() > 1.6
    expected = torch.distributions.Normal(.7 * F.prior.G_m.weight[c] + shift, std).log_prob(z).sum(1)
    same(F.prior.log_prob(z, c, shift), expected, 1e-9)

def test_noise_shift_keeps_deviation_lambda_after_training():
    """Maximum likelihood would shrink H_m(n), or make it a constant; then lambda would mean nothing."""
    F = perturbed_flow(lam=.3, dtype=torch.float32)
    x, u = rand(2, 64, 3, 4, 4, dtype=torch.float32)
    c, optimizer = torch.arange(64) % 3, torch.optim.Adam(F.parameters(), 1e-2)
    before = F.log_prob(x, c, u).mean()
    for step in range(30):
        loss = -F.log_prob(x, c, u, F.prior.shift(torch.randn(64, flows.NOISE_DIM))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shift = F.prior.shift(torch.randn(256, flows.NOISE_DIM))
    assert -loss > before + 1 and shift.mean(0).abs().max() < 1e-5
    assert abs(shift.square().mean().sqrt().item() - .3) < 1e-3

def test_sample_undoes_dequantisation_and_logit():
    """x = floor(256 y)/255: with u = the fraction that was cut off, F takes the sample back to its z."""
    F = perturbed_flow()
    y = F.inverse(F(*rand(2, 5, 3, 4, 4))[0])
    same(F.inverse(F((256 * y).floor() / 255, 256 * y - (256 * y).floor())[0]), y, 1e-9)
    levels = 255 * F.float().sample(torch.tensor([0, 1, 2] * 20), torch.Generator().manual_seed(0))
    assert levels.min() >= 0 and levels.max() <= 255 and levels.std() > 12
    assert (levels - levels.round()).abs().max() < .01

def test_bits_per_dim_and_w2_agree_with_what_they_measure():
    """A uniform density costs 8 bits, counted once; optimal transport in one dimension pairs the sorted."""
    assert flows.bits_per_dim(torch.zeros(1), 784).item() == 8
    assert flows.bits_per_dim(torch.tensor(784 * math.log(256)), 784).item() == pytest.approx(0, abs=1e-5)
    a, b = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0)).sort(1)[0]
    cost = (1 + .5 * a + .5 - 2 * b).square().mean().item()
    closed = flows.gaussian_w2(*(torch.tensor([v, v]) for v in (1., .5, -.5, 2.)))
    assert closed.item() == pytest.approx(cost, rel=.03)

# ---------------------------------------------------------------- the ascent

@pytest.fixture(scope="module")
def players():
    """A digit network, a flow, twelve images of one class, u, the noise shift, and M(x_src)."""
    torch.manual_seed(0)
    M, F = degia.LeNet(10, 16).eval(), perturbed_flow(dtype=torch.float32)
    x_src, c, n = torch.rand(12, 3, 16, 16), torch.full((12,), 1), torch.randn(12, flows.NOISE_DIM)
    return M, F, x_src, c, torch.rand(12, *F.shape), F.prior.shift(n).detach(), M(x_src)[1].detach()

def test_the_ascent_climbs_stays_in_range_and_touches_no_parameter(players):
    """Small steps go uphill on (7), by at most eta in image units; M and F learn in the min phase only."""
    M, F, x_src, c, u, shift, feature = players

    def objective(x):
        return degia.max_objective(x, c, c, M, F, feature, u, shift, alpha=1., density=1.)

    values = [objective(degia.ascend(x_src, objective, K, 1e-3, 1)).item() for K in (0, 1, 2, 4)]
    assert values == sorted(values) and values[-1] > values[0]
    for eta in (.02, .5):
        x = degia.ascend(x_src, objective, 1, eta, 3)
        moved = (x - x_src).square().mean((1, 2, 3)).sqrt()
        assert x.min() >= 0 and x.max() <= 1 and not x.requires_grad
        assert (moved <= eta * 1.001).all() and (moved > .5 * eta).all()
    assert all(p.grad is None for net in (M, F) for p in net.parameters())

def test_eq_7_is_what_the_paper_says(players):
    """Each term against its definition; d is without the noise shift; without F, -log p and d go (`ada`)."""
    M, F, x_src, c, u, shift, feature = players
    x = .9 * x_src + .05
    z, log_det = F(nnf.avg_pool2d(x, 4), u)
    mean, std = F.prior.gamma * F.prior.G_m.weight[1], F.prior.log_G_std.weight[1].exp()
    log_p = torch.distributions.Normal(mean + shift, std).log_prob(z).sum(1) + log_det
    d = ((z.mean(0) - mean).square() + (z.std(0, correction=0) - std).square()).mean()
    ada = nnf.cross_entropy(M(x)[0], c, reduction="none") - 2 * (M(x)[1] - feature).square().mean(1)
    same(degia.max_objective(x, c, c, M, None, feature, None, None, 2., 1.), ada.sum(), 1e-4)
    expected = (ada - 3 * log_p / F.dim - 2 * d).sum()
    same(degia.max_objective(x, c, c, M, F, feature, u, shift, 2., 3.), expected, 1e-4)

# ---------------------------------------------------------------- data

def test_embedded_digits_depend_on_the_seed_alone():
    """Everybody measures on the same digits."""
    x, y = data.make_digits(600, 16, 5)
    assert torch.equal(x, data.make_digits(600, 16, 5)[0])
    assert not torch.equal(x, data.make_digits(600, 16, 6)[0])
    assert y.unique().tolist() == list(range(10)) and y.bincount().min() > 30
    for name in data.LOOKS:
        look = data.apply_look(name, x, 0)
        assert look.shape == (600, 3, 16, 16) and look.dtype == torch.uint8 and look.float().std() > 12

def test_a_drawn_stroke_covers_its_area():
    """A capsule of length L and radius r covers 2 r L + pi r^2 pixels, wherever it lies."""
    start, end = torch.tensor([[[20., 30.]]]), torch.tensor([[[50., 45.]]])
    cover = data.draw_strokes(start, end, torch.tensor([[6.]]), (70, 80))
    assert cover.sum().item() == pytest.approx(12 * math.hypot(30, 15) + math.pi * 36, rel=.01)
    assert cover[0, 0, 30, 20] == 1 and cover[0, 0, 45, 50] == 1 and cover[0, 0, 60, 20] == 0

def write_mnist(folder, n=40, label=None, cut=0, swap=False):
    """A folder with MNIST's four files, filled with n small digits; optionally damaged."""
    folder.mkdir(exist_ok=True)
    x, y = data.make_digits(n, 28, 0)
    y = y if label is None else torch.full_like(y, label)
    images = struct.pack(">4BIII", 0, 0, 8, 3, n, 28, 28) + data.to_uint8(x).numpy().tobytes()
    labels = struct.pack(">4BI", 0, 0, 8, 1, n) + y.to(torch.uint8).numpy().tobytes()
    images, labels = (labels, images) if swap else (images[:len(images) - cut], labels)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return folder

def write_mnist_m(folder, labels="3 1 4", damaged=False):
    """A folder in the layout of MNIST-M's release: constant images of brightness 80, 81, ..."""
    (folder / "mnist_m_train").mkdir(parents=True)
    for i, _ in enumerate(labels.split()):
        path = folder / f"mnist_m_train/{i}.png"
        Image.new("RGB", (32, 32), (80 + i, 0, 0)).save(path)
        path.write_bytes(path.read_bytes()[:60 if damaged and i == 1 else None])
    lines = [f"{i}.png {label}\n" for i, label in enumerate(labels.split())]
    (folder / "mnist_m_train_labels.txt").write_text("".join(lines))
    return folder

def test_real_digits_are_read_as_they_were_written(tmp_path):
    """IDX plain and gzipped, MNIST-M as released, MNIST-M made from photographs; images keep labels."""
    x, y = data.make_digits(40, 28, 0)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (50, 40), (255, 0, 0)).save(tmp_path / "photos" / "red.png")
    unseen = [str(write_mnist_m(tmp_path / "mm")), str(tmp_path / "photos")]
    o = train.Degia(data=str(write_mnist(tmp_path / "mnist")), unseen=unseen, size=28, train=30)
    source, labels, domains = data.load_digits(o, tmp_path / "run")
    assert list(domains) == ["source", "mm", "photos"]
    assert torch.equal(source[:, 0], data.to_uint8(x[:30, 0])) and torch.equal(labels, y[:30])
    assert domains["mm"][1].tolist() == [3, 1, 4] and domains["mm"][0][:, 0, 5, 5].tolist() == [80, 81, 82]
    digit, made = data.to_uint8(x)[:, 0].int(), domains["photos"][0].int()
    assert (made[:, 0] - (255 - digit)).abs().max() <= 1 and torch.equal(made[:, 1], digit)
    assert len(list((tmp_path / "run").iterdir())) == 1  # the cache, and nothing partial

# ---------------------------------------------------------------- the script

def run_script(*arguments, out):
    train.main(["degia", "--out", str(out), *TINY, *arguments])
    return evaluation.load_checkpoint(out)

def results_of(out):
    return json.loads((out / "results.json").read_text())

def test_a_run_stopped_and_resumed_equals_the_whole_run_bit_for_bit(tmp_path):
    """Networks, optimizers, pool and log, with a max round before and one after the interruption."""
    whole = run_script("--steps", "12", out=tmp_path / "whole")
    half = run_script("--steps", "12", "--stop-after", "5", out=tmp_path / "parts")
    assert half["step"] == 5 and len(half["extra"]["x"]) == 12
    train.main(["degia", "--resume", "--out", str(tmp_path / "parts")])
    resumed = evaluation.load_checkpoint(tmp_path / "parts")
    same((whole["state"], whole["extra"]), (resumed["state"], resumed["extra"]))
    runs = tmp_path / "whole", tmp_path / "parts"
    a, b = ([line.rsplit(",", 1)[0] for line in (run / "log.csv").read_text().splitlines()] for run in runs)
    assert a == b and len(a) == 13
    a, b = ({**results_of(run), "seconds": 0} for run in runs)
    assert a == b

def test_two_processes_equal_one(tmp_path):
    """torchrun with gloo on the same global batches: the same networks as one process."""
    one = run_script("--steps", "6", out=tmp_path / "one")
    command = "-m torch.distributed.run --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=localhost:0"
    script = [HERE / "train.py", "degia", "--steps", "6", "--out", tmp_path / "two", *TINY]
    ran = subprocess.run([sys.executable, *command.split(), *script], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr[-3000:]
    two = evaluation.load_checkpoint(tmp_path / "two")
    for name in ("M", "F"):
        same(one["state"][name], two["state"][name], 3e-4)
    assert torch.equal(one["extra"]["source"], two["extra"]["source"])
    assert (one["extra"]["x"].int() - two["extra"]["x"].int()).abs().float().mean() < .5

def test_new_samples_keep_the_label_of_their_source(tmp_path):
    """`source` says which image a new sample started from: with a tiny eta it looks like no other."""
    pool = run_script("--steps", "8", "--eta", ".01", out=tmp_path / "run")["extra"]
    x_src, _, _ = data.load_digits(train.Degia(size=16, train=60), tmp_path)
    apart = (pool["x"][:, None].float() - x_src[None].float()).square().mean((2, 3, 4))
    assert torch.equal(apart.argmin(1), pool["source"])

def test_kill_during_a_write_leaves_the_last_checkpoint(tmp_path):
    """The process is killed with half of a checkpoint written: the one before it is still there and loads."""
    run_script("--steps", "8", "--stop-after", "4", out=tmp_path)
    code = ("import os, signal, torch, train\n"
            "def save(content, path):\n"
            "    open(path, 'wb').write(b'half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "torch.save = save\n"
            f"train.main(['degia', '--resume', '--out', {str(tmp_path)!r}])\n")
    killed = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True)
    assert killed.returncode == -9 and (tmp_path / "checkpoint.part").read_bytes() == b"half"
    assert evaluation.load_checkpoint(tmp_path)["step"] == 4
    train.main(["degia", "--resume", "--out", str(tmp_path)])
    assert evaluation.load_checkpoint(tmp_path)["step"] == 8

def test_a_short_run_learns_the_source(tmp_path):
    """Sixty steps of the stand-alone CNN read most source digits; one that learns nothing reads a tenth."""
    words = "degia --method pure --train 1000 --steps 60 --size 20 --lr 1e-3 --out"
    train.main([*words.split(), str(tmp_path)])
    results = results_of(tmp_path)
    assert results["domains"]["source"]["accuracy"] > 80 and "bits_per_dim" not in results

def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """The step and the term are named and the last good checkpoint stays."""
    with pytest.raises(ValueError, match=r"step \d+: loss task is (nan|inf)"):
        run_script("--steps", "8", "--method", "pure", "--lr", "1e30", out=tmp_path)
    assert evaluation.load_checkpoint(tmp_path)["step"] == 0

BAD = {  # arguments, made in an empty folder t; the message
    "no folder": (lambda t: f"degia --data {t}/none", "none: no such folder"),
    "empty folder": (lambda t: f"degia --data {t}", "no train-images-idx3-ubyte"),
    "truncated": (lambda t: f"degia --data {write_mnist(t / 'm', cut=9)}", "idx3-ubyte.gz: truncated"),
    "label 11": (lambda t: f"degia --data {write_mnist(t / 'm', label=11)}", "label 11 .* outside 0-9"),
    "mislabelled": (lambda t: f"degia --data {write_mnist(t / 'm', swap=True)}", "not an IDX file"),
    "too few": (lambda t: f"degia --data {write_mnist(t / 'm')} --train 41", "--train 41"),
    "no png": (lambda t: f"degia --data {write_mnist(t / 'm')} --train 20 --unseen "
                         f"{write_mnist_m(t / 'u', damaged=True)}", "1.png: not a readable image"),
    "bad label": (lambda t: f"degia --data {write_mnist(t / 'm')} --train 20 --unseen "
                            f"{write_mnist_m(t / 'u', '3 x')}", "labels.txt, line 2"),
    "beta": (lambda t: "degia --beta 2", "--beta 2.0: must be from 0.0001 to 1"),
    "download": (lambda t: "degia --download", "--download: into which folder"),
    "flow size": (lambda t: "degia --train 60 --flow-size 6", "--flow-size 6: not a multiple of 4"),
    "nothing to resume": (lambda t: "degia --resume", "checkpoint.pt: no such checkpoint"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_writes_nothing(case, tmp_path, monkeypatch, capsys):
    """It names the file or the value, exits with 2, and no run folder is left behind."""
    arguments, message = BAD[case]
    words = arguments(tmp_path).split()
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        evaluation.exit_on_bad_input(train.main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and re.search(message, lines[0])
    assert not (tmp_path / "run").exists()

def test_a_run_is_never_overwritten_and_a_foreign_checkpoint_never_loaded(tmp_path):
    """Started twice, resumed with other options, resumed from a file of another program: each is refused."""
    run_script("--steps", "4", "--stop-after", "2", out=tmp_path)
    path = tmp_path / "checkpoint.pt"
    before = path.read_bytes()
    for words, message in (("degia", "--resume or choose another"),
                           ("degia --resume --steps 9", "another --steps")):
        with pytest.raises(ValueError, match=message):
            train.main([*words.split(), "--out", str(tmp_path)])
    assert path.read_bytes() == before
    for foreign in (b"text", {"model": torch.zeros(1)}):
        path.write_bytes(foreign) if isinstance(foreign, bytes) else torch.save(foreign, path)
        with pytest.raises(ValueError, match="not a checkpoint"):
            train.main(["degia", "--resume", "--out", str(tmp_path)])

def test_eval_repeats_the_numbers_and_reads_the_users_images(tmp_path, capsys):
    """`eval.py RUN` prints what results.json says; `--images` answers with a digit for each file."""
    run_script("--steps", "4", out=tmp_path)
    capsys.readouterr()
    evaluation.main([str(tmp_path)])
    printed = capsys.readouterr().out
    for name, numbers in results_of(tmp_path)["domains"].items():
        assert re.search(rf"{name} +accuracy +{numbers['accuracy']:.3f}", printed)
    Image.new("L", (40, 30), 200).save(tmp_path / "mine.png")
    evaluation.main([str(tmp_path), "--images", str(tmp_path / "mine.png")])
    assert re.search(r"mine.png: \d", capsys.readouterr().out) and (tmp_path / "images.png").exists()
    evaluation.main([str(tmp_path), "--judge", str(tmp_path)])
    share = float(re.search(r"read as their class: ([\d.]+) %", capsys.readouterr().out)[1])
    assert 0 <= share <= 30  # neither network has learned anything in four steps

def readme_commands():
    """Every `python train.py ...` and `python eval.py ...` in the README's code blocks."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(r"\b(train|eval)\.py\b", line)]

@pytest.mark.parametrize("command", readme_commands())
def test_each_command_of_the_readme_parses(command):
    """A README that names an option which no longer exists is worse than none."""
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    (train if words[script].endswith("train.py") else evaluation).parse(words[script + 1:])
