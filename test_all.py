"""What this code promises, a promise per test: `python -m pytest test_all.py`. Nothing is downloaded."""
import csv, gzip, json, math, re, shlex, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
import data, degia, flows, geomreg, train, warp
import eval as evaluation

DEGIA = "degia --dtype f32 --train 60 --size 16 --batch 8 --rounds 2 --eta .01 --flow-size 4 --flow-steps 1"
REG = "reg --dtype f32 --train 20 --width 16 --height 16 --batch 4 --R-width 4 --T-width 4 --D-width 4"

def same(a, b, tolerance=0.):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
def rand(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def bumpy(n, size, bend):
    return warp.random_field(n, size, bend, 0, torch.Generator().manual_seed(1)).double()  # smooth
def perturbed_flow(channels=3, size=4, levels=2, **options):
    """A small flow whose every parameter is random, so that no layer is an identity."""
    torch.manual_seed(0)
    F = flows.Flow(channels, size, 3, levels, steps=2, hidden=8, **options).double()
    for p in F.parameters():
        p.data.add_(.15 * torch.randn_like(p))
    return F

@pytest.mark.parametrize("channels,size,levels", [(3, 4, 2), (1, 4, 1), (2, 4, 1), (1, 8, 3)])
def test_the_flow_is_inverted_and_its_log_determinant_is_the_jacobians(channels, size, levels):
    """Sampling undoes the training path and dequantisation; eq. (2) by brute force; uniform is 8 bits."""
    F, (x, u) = perturbed_flow(channels, size, levels), rand(2, 3, channels, size, size)
    z, log_det = F(x, u)
    same(F.inverse(z), (255 * x + u) / 256, 1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda v: F(v[None], u[:1])[0][0], x[0]).view(F.dim, F.dim)
    same(log_det[0], torch.linalg.slogdet(jacobian)[1] - F.dim * math.log(255 / 256), 1e-8)
    grey = 255 * F.float().sample(torch.tensor([0, 1, 2] * 20), torch.Generator().manual_seed(0))
    assert grey.std() > 12 and (grey - grey.round().clamp(0, 255)).abs().max() < .01
    same(flows.bits_per_dim(torch.tensor([0., -math.log(2) * F.dim]), F.dim), torch.tensor([8., 9.]), 1e-5)

def test_a_flow_starts_normalised_learns_under_eq_8_and_is_the_same_after_a_reload():
    """Likelihood alone would shrink H_m(n) or make it a constant; an unsaved flag would set ActNorm anew."""
    F, other = (perturbed_flow(gamma=.7, lam=.3) for _ in range(2))
    (x, u), c, log_p = rand(2, 64, 3, 4, 4), torch.arange(64) % 3, []
    F.initialise(x, u)
    h = F.levels[0][0](nnf.pixel_unshuffle(torch.logit(.05 + .9 * (255 * x + u) / 256), 2))[0]
    assert h.mean((0, 2, 3)).abs().max() < 1e-6 and (h.std((0, 2, 3)) - 1).abs().max() < .01
    for n in torch.randn(31, 64, flows.NOISE_DIM).double():
        shift = F.prior.shift(n)
        log_p.append(F.log_prob(x, c, u, shift).mean())
        for p, g in zip(F.parameters(), torch.autograd.grad(log_p[-1], [*F.parameters()])):
            p.data += .01 * g.sign()
    assert log_p[-1] > log_p[0] + 1 and shift.mean(0).abs().max() < 1e-5 and abs(shift.std() - .3) < 1e-3
    F.prior.log_G_std.weight.data = 8 * rand(3, F.dim) - 4  # beyond both bounds
    mean, std = .7 * F.prior.G_m.weight[c] + shift, F.prior.log_G_std.weight[c].clamp(-2, .5).exp()
    z, log_det = F(x, u)
    same(F.log_prob(x, c, u, shift), torch.distributions.Normal(mean, std).log_prob(z).sum(1) + log_det, 1e-9)
    other.load_state_dict(F.state_dict())
    other.initialise(.1 * x, u)
    same(other(x, u), (z, log_det))

def test_the_ascent_climbs_eq_7_stays_in_range_and_touches_no_parameter():
    """Each term against its definition, d without the noise shift; M and F learn in the min phase only."""
    F, M = perturbed_flow().float(), degia.TaskNetwork("lenet", 8, 16, 10).eval()
    x_src, c, u = torch.rand(12, 3, 16, 16), torch.full((12,), 1), torch.rand(12, *F.shape)
    shift, feature = F.prior.shift(torch.randn(12, flows.NOISE_DIM)).detach(), M(x_src)[1].detach()
    def objective(x, alpha=1., density=1.):
        return degia.max_objective(x, c, c, M, F, feature, u, shift, alpha, density)
    values = [objective(degia.ascend(x_src, objective, K, 1e-3, 1)).item() for K in (0, 1, 2, 4)]
    assert values == sorted(set(values))
    eta = torch.tensor([.02, .5] * 6).view(12, 1, 1, 1)
    x = degia.ascend(x_src, objective, 1, eta, 3)
    moved = ((x - x_src) / eta).square().mean((1, 2, 3)).sqrt()
    assert x.min() >= 0 and x.max() <= 1 and .5 < moved.min() and moved.max() < 1.001
    assert not x.requires_grad and all(p.grad is None for net in (M, F) for p in net.parameters())
    seen, a = nnf.avg_pool2d(x, 4), torch.tensor([[-1.], [1.]])  # a has mean 0 and deviation 1, as N(0, 1)
    P_x = F(seen, u)[0].mean(0) + a * F(seen, u)[0].std(0, correction=0)
    d = (P_x - F.prior.mean(c[:1]) - a * F.prior.std(c[:1])).square().mean()  # W2 pairs equal quantiles
    ada = nnf.cross_entropy(M(x)[0], c, reduction="none") - 2 * (M(x)[1] - feature).square().mean(1)
    same(degia.max_objective(x, c, c, M, None, feature, None, None, 2., 1.), ada.sum(), 1e-4)  # without F
    same(objective(x, 2., 3.), (ada - 3 * F.log_prob(seen, c, u, shift) / F.dim - 2 * d).sum(), 1e-4)

@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5), (33, 20)])
def test_the_resampler_does_what_eq_1_says(size):
    """Zero is the identity, channel 0 is x, sign as in (1); a pointwise T commutes, as dual flow needs."""
    I, phi, T = rand(2, 3, *size), bumpy(2, size, .1), torch.nn.Conv2d(3, 1, 1, bias=False).double()
    same(warp.resample(I, 0 * phi), I, 1e-9)
    same(warp.resample(I, 0 * phi + torch.tensor([[[1.]], [[0.]]]))[..., :-1], I[..., 1:], 1e-9)
    same(T(warp.resample(I, phi)), warp.resample(T(I), phi), 1e-9)

def test_the_inverse_undoes_the_field_and_the_jacobian_finds_its_folds():
    """A dot is then where `warp_points` says, at any scale; det A is 1.2 .9 + .3 .1, or -.8 .9 + .3 .1."""
    phi, p = bumpy(1, (40, 50), .05), torch.tensor([[[21., 17.]]]).double()
    v, back = warp.grid_of(phi), warp.compose(phi, warp.invert(phi))
    assert phi.abs().max() > 2 and back[..., 6:-6, 6:-6].abs().max() < 1e-6
    seen = warp.resample(torch.exp(-(v - p.view(1, 2, 1, 1)).square().sum(1, keepdim=True) / 4), phi)
    centre, q = (seen * v).sum((2, 3)) / seen.sum(), warp.warp_points(p, phi)
    assert (q[0] - centre).abs().max() < .1 and (q - p).abs().max() > .4
    same((warp.warp_points((p + .5) * 2 - .5, warp.resize_field(phi, (80, 100))) + .5) / 2 - .5, q, 2e-2)
    x, y = v[:, :, :6, :5].unbind(1)
    phi = torch.stack([.2 * x + .3 * y - 2 * (x > 2), -.1 * x - .1 * y], 1)  # mirrored between x = 2 and 3
    same(warp.jacobian_determinant(phi).float(), torch.tensor([[[1.11, 1.11, -.69, 1.11]] * 5]), 1e-5)

def test_smoothness_is_eq_2_neighbour_by_neighbour():
    """Against all pairs of pixels; phi may bend at an edge; a field costs the same at two sizes."""
    phi, O_s = bumpy(1, (5, 6), .1), rand(1, 2, 5, 6)
    v, bend, edge = (torch.cdist(*[I.flatten(1).T.double()] * 2, norm) for I, norm in (
        (warp.grid_of(phi)[0], math.inf), (phi[0] / torch.tensor([[[2.5]], [[2.]]]), 2.), (O_s[0], 2.)))
    for a in (0., 1.):
        same(warp.smoothness(phi, O_s, a), (torch.exp(-a * edge) * bend)[v == 1].sum() / 30 * 6 / 256, 1e-9)
    small, large = (warp.smoothness(bumpy(1, (s, s), .1), torch.zeros(1, 1, s, s), 0.) for s in (64, 128))
    assert small.item() == pytest.approx(large.item(), rel=.05)

@pytest.mark.parametrize("size", [(5, 5), (17, 30)])
@pytest.mark.parametrize("registration,blocks", [("pyramid", 0), ("unet", 1)])
def test_the_networks_pass_any_size_and_the_papers_have_the_papers_sizes(registration, blocks, size):
    """A field and a picture of B's channels, as large as the input; all learns; about 2.1, 11.4 and 2.8 M."""
    o = train.Reg(registration=registration, R_width=4, T_width=4, T_blocks=blocks, D_width=4)
    R, T, D = nets = torch.nn.ModuleList(geomreg.build(o, 3, 2).values())
    I_a, I_b = (rand(2, c, *size).float() for c in (3, 2))
    phi, O = R(I_a, I_b), T(I_a)
    assert phi.shape == (2, 2, *size) and O.shape == I_b.shape and phi.abs().max() < 5
    (phi.square().sum() + O.square().sum() + D(I_a, I_b).square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in nets.parameters())
    paper = geomreg.build(train.parse(["reg", "--paper"])[0], 3, 1).values()
    assert [sum(map(torch.numel, N.parameters())) for N in paper] == pytest.approx([2.1e6, 11.4e6, 2.8e6], .1)

def test_measures_of_an_image_with_itself():
    """Correlation and SSIM are 1; correlation of the negative is -1 and its square does not care."""
    I = nnf.interpolate(2 * rand(1, 1, 9, 9) - 1, (32, 32), mode="bicubic", align_corners=True)
    same(geomreg.ssim(I, I, 9), torch.ones_like(I), 1e-9)
    assert geomreg.correlation(I, I, 9).mean() > .85 and geomreg.correlation(I, -I, 9).mean() < -.85
    for measure in geomreg.MEASURES:
        itself, another = (geomreg.distance(measure, J, I, 9, 2) for J in (I, I.roll(5, 3)))
        assert itself < .45 and another > itself + .2
    same(geomreg.distance("ncc", I, -I, 9, 1), geomreg.distance("ncc", I, I, 9, 1), 1e-9)

def test_embedded_digits_depend_on_the_seed_alone_and_a_stroke_covers_its_area():
    """Everybody measures on the same digits. A capsule of length L and radius r has 2 r L + pi r^2 pixels."""
    (x, y), (again, _), (other, _) = (data.make_digits(600, 16, seed) for seed in (5, 5, 6))
    assert torch.equal(x, again) and not torch.equal(x, other) and (y.bincount() > 30).tolist() == 10 * [True]
    for look in (data.apply_look(name, x, 0) for name in data.LOOKS):
        assert look.shape == (600, 3, 16, 16) and look.dtype == torch.uint8 and look.float().std() > 12
    a, b, radius = torch.tensor([[[20., 30.]]]), torch.tensor([[[50., 45.]]]), torch.tensor([[6.]])
    cover = data.draw_strokes(a, b, radius, (70, 80))[0, 0]
    assert cover.sum().item() == pytest.approx(12 * math.hypot(30, 15) + math.pi * 36, rel=.01)
    assert cover[30, 20] == 1 and cover[45, 50] == 1 and cover[60, 20] == 0

def test_embedded_plants_are_honest_and_augmentation_keeps_the_relation_of_a_pair():
    """5 to 7 px that no mean field, translation or affine map removes; only `deform` moves A against B."""
    A, _, points, salient = data.make_plants(100, (64, 64), 999_003)
    there, left, I = ~points.isnan(), evaluation.simple_maps(points), A[:8] / 255
    assert there.all(2).sum(1).min() >= 6 and there[:, salient].float().mean() > .3
    assert points[there].min() >= -.5 and points[there].max() <= 63.5
    nothing = (points[..., :2] - points[..., 2:]).norm(dim=2).nanmean(1).mean().item()
    assert 5 <= nothing <= 7 and left["mean field"] >= .95 * nothing
    assert left["translation"] >= .55 * nothing and left["affine"] >= .35 * nothing
    (a, b), (c, d) = (data.augment(I, I, .3, deform, torch.Generator().manual_seed(0)) for deform in (0, .1))
    assert torch.equal(a, b) and torch.equal(b, d) and (a - I).abs().mean() > .02 < (c - a).abs().mean()

@pytest.mark.parametrize("backbone,width,millions", [
    ("lenet", 64, 4.6), ("alexnet", 64, 7.8), ("vgg", 64, 14.), ("resnet", 64, 11.4), ("densenet", 32, .89)])
def test_each_backbone_learns_with_every_parameter_and_has_its_size(backbone, width, millions):
    """A layer that nothing depends on, or a template feature of another length, would go unseen."""
    M = degia.TaskNetwork(backbone, width, 40, 34)
    assert sum(p.numel() for p in M.parameters()) / 1e6 == pytest.approx(millions, rel=.02)
    output, feature = M(rand(3, 3, 40, 40).float())
    degia.task_loss(output, rand(3, 34)).mean().backward()
    assert output.shape == (3, 34) and feature.shape == (3, M.head.in_features)
    assert all(p.grad.abs().sum() > 0 for p in M.parameters())

def test_landmarks_are_on_the_hand_poses_are_clustered_and_one_like_the_template_is_not_warped():
    """Skin is redder than blue, near bright in depth, dense on film; similar poses: exact similarity."""
    views, y = data.make_hands(60, 64, 3)
    assert torch.equal(y, data.make_hands(60, 64, 3)[1]) and 0 <= y.min() and y.max() <= 1
    rgb, depth, xray = (view.float() for view in views.values())
    for I in (rgb[:, :1] - rgb[:, 2:], depth, xray):
        seen = warp.look_up(nnf.max_pool2d(I[:, :1], 3, 1, 1), (y.view(60, 1, 17, 2) * 64 - .5).movedim(3, 1))
        assert (seen > I[:, 0].flatten(1).median(1).values.view(60, 1, 1, 1) + 12).float().mean() > .95
    centres = 10 * torch.eye(34)[:5]
    poses = centres[torch.randperm(100) % 5] + .1 * rand(100, 34).float()
    assert torch.cdist(centres, degia.k_means(poses, 5)).amin(1).max() < .5
    p, turn = rand(17, 2), torch.tensor([[1.2, -.5], [.5, 1.2]]).double()
    same(evaluation.similarity(p, p), torch.eye(2, 3).double(), 1e-9)
    same(evaluation.similarity(p, p @ turn.T + 3), torch.cat([turn, torch.full((2, 1), 3.)], 1), 1e-9)

# Files of a user: MNIST's images (noise here) and labels, the header of landmarks.csv, a folder of all kinds
IMAGES = np.array([0x803, 40, 28, 28], ">i4").tobytes() + (rand(40, 28, 28) * 255).byte().numpy().tobytes()
LABELS = np.array([0x801, 40], ">i4").tobytes() + 4 * bytes(range(10))
HAND = b"name," + b",".join(b"x%d,y%d" % (i, i) for i in range(17))
def user_folder(folder, spoilt={}):
    """MNIST, red MNIST-M, pairs (B is 16-bit, twice as large), a landmark folder; `spoilt`: {file: bytes}."""
    for side in ("mnist_m_train", "train/A", "train/B", "images"):
        (folder / side).mkdir(parents=True)
    for i, mode in enumerate(("P", "RGB", "RGBA")):
        Image.new("RGB", (32, 32), (80 + i, 0, 0)).save(folder / f"mnist_m_train/{i}.png")
        picture = Image.fromarray((rand(5, 6, 3, seed=i) * 255).byte().numpy()).resize((24, 20))
        picture.convert(mode).save(folder / f"train/A/a{i}.png")
        deep = np.asarray(picture.convert("L").resize((48, 40)), np.uint16) * 200
        Image.fromarray(deep).save(folder / f"train/B/a{i}.png")
    hand = np.zeros((48, 96), np.uint8)
    hand[17:24, 7:14] = hand[37:44, 77:84] = 255  # squares around (10, 20) and (80, 40)
    Image.fromarray(hand).save(folder / "images/h.png")
    files = {"train-images-idx3-ubyte.gz": gzip.compress(IMAGES), "train-labels-idx1-ubyte": LABELS,
             "t10k-images-idx3-ubyte.gz": gzip.compress(IMAGES), "t10k-labels-idx1-ubyte": LABELS,
             "mnist_m_train_labels.txt": b"0.png 3\n1.png 1\n2.png 4", "train/A/notes.txt": b"no image",
             "train/landmarks.csv": b"name,xa,ya,xb,yb\na0,3,4,5,6\na1,23,19,0,0",
             "landmarks.csv": HAND + b"\nh.png" + 8 * b",10,20,80,40" + b",10,20"}
    for name, content in {**files, **spoilt}.items():
        (folder / name).write_bytes(content)
    return folder

def test_folders_are_read_as_they_were_written(tmp_path):
    """MNIST, MNIST-M, photographs, pairs of any depth and size: pixels, labels and points stay together."""
    folder, run, digit = user_folder(tmp_path / "mm"), tmp_path / "run", (rand(40, 28, 28) * 255).int()
    o = train.Degia(data=str(folder), unseen=[str(folder), f"{folder}/mnist_m_train"], size=28, train=30)
    source, labels, domains = data.load_digits(o, run)
    assert list(domains) == ["source", "mm", "mnist_m_train"] and len(list(run.iterdir())) == 1  # cache
    assert torch.equal(source[:, 0].int(), digit[:30]) and labels.tolist() == [*range(10)] * 3
    assert domains["mm"][1].tolist() == [3, 1, 4] and domains["mm"][0][:, 0, 5, 5].tolist() == [80, 81, 82]
    red, green, _ = domains["mnist_m_train"][0].int().unbind(1)  # |photograph - digit|
    assert (red - (81 - digit).abs()).abs().max() <= 2 and torch.equal(green, digit)
    pairs, reading = data.load_pairs(train.Reg(data=str(folder), height=20, width=24), run)
    A, B, p = pairs["test"].A, pairs["train"].B, pairs["train"].points.nan_to_num(-9)  # test/ is train/ here
    assert A.shape == (3, 3, 20, 24) and B.shape == (3, 1, 20, 24) and reading["B"][2] < 65535
    assert torch.corrcoef(torch.stack([A.float().mean(1).flatten(), B.float().flatten()]))[0, 1] > .7
    same(p.view(3, 4), torch.tensor([[3, 4, 2.25, 2.75], [23, 19, -.25, -.25], 4 * [-9]]), 1e-5)
    x, y = data.load_landmarks(folder, 24, run)
    places = (y.view(1, 17, 2) * 24 - .5).transpose(1, 2)[..., None]  # of an image at another size and shape
    assert x.shape == (1, 3, 24, 24) and warp.look_up(x.float(), places).min() > 200

def main(words, out):
    """Runs `train.py WORDS --out OUT`; the checkpoint that it leaves and the json files, by name."""
    train.main([*words.split(), "--out", str(out)])
    return evaluation.load_checkpoint(out) | {f.stem: json.loads(f.read_text()) for f in out.glob("*.json")}

@pytest.mark.parametrize("task,other,tiny", [("degia", "reg", DEGIA), ("reg", "degia", REG), (
    "reg", "degia", f"{REG} --similarity cyclegan --modality depth")])
def test_a_run_stopped_killed_and_resumed_equals_a_whole_one_and_two_processes(task, other, tiny, tmp_path):
    """Bit for bit (networks, optimizers, pool, log), whatever wrong commands were given; torchrun nearly."""
    words, (one, parts, two) = f"{tiny} --steps 12", (tmp_path / name for name in ("one", "parts", "two"))
    whole, half = main(words, one), main(f"{words} --stop-after 5", parts)
    assert half["step"] == 5 and (task == "reg" or len(half["extra"]["x"]) == 12)  # between two max rounds
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):  # it dies while it writes
        patch.setattr(torch, "save", lambda _, file: file.write_bytes(b"half") / 0)
        main(f"{task} --resume", parts)
    pytest.raises(ValueError, main, words, parts).match("--resume or choose another")
    pytest.raises(ValueError, main, f"{other} --resume", parts).match(f"not of `{other}`")
    pytest.raises(ValueError, main, f"{task} --resume --steps 13", parts).match("another --steps")
    rest = main(f"{task} --resume", parts)
    same((whole["state"], whole["extra"]), (rest["state"], rest["extra"]))
    a, b = ([row.rsplit(",", 1)[0] for row in (run / "log.csv").read_text().split()] for run in (one, parts))
    own = {"seconds": 0, "out": 0}
    assert a == b and len(a) == 13 and whole["results"] | own == rest["results"] | own
    command = f"-m torch.distributed.run --standalone --nproc_per_node=2 {train.__file__} {words} --out {two}"
    subprocess.run([sys.executable, *command.split()], check=True)
    shared = evaluation.load_checkpoint(two)
    same(whole["state"], shared["state"], 3e-4)
    assert all((shared["extra"][k] - t.double()).abs().mean() < .5 for k, t in whole["extra"].items())
    for write in (lambda f: f.write_bytes(b"text"), lambda f: torch.save({"model": torch.zeros(1)}, f)):
        write(parts / "checkpoint.pt")  # a file of another program
        pytest.raises(ValueError, main, f"{task} --resume", parts).match("not a checkpoint")

def test_short_runs_learn_and_a_rate_far_too_high_costs_no_checkpoint(tmp_path):
    found = main("degia --method pure --train 999 --steps 60 --size 20", tmp_path / "d")["results"]
    assert found["domains"]["source"]["accuracy"] > 80 and "bits_per_dim" not in found
    found = main("reg --train 100 --steps 80 --adversarial 0 --smooth 100", tmp_path / "r")["results"]
    assert found["registered"]["scene"] < .9 * found["unregistered"]["scene"] and found["folding"] < .02
    with pytest.raises(ValueError, match=r"^step \d+: task is (nan|inf)"):
        main(f"{DEGIA} --steps 8 --method pure --lr 1e30", tmp_path)
    assert evaluation.load_checkpoint(tmp_path)["step"] == 0

def test_each_loss_of_registration_moves_its_own_networks(tmp_path, monkeypatch):
    """(1) moves D alone, (2) leaves it; --l1 R --gan T: R is moved as without D, T as without L_recon."""
    descend, grads = train.Run.descend, {}
    def watched(run, loss, *nets, **options):
        descend(run, loss, *nets, **options)
        grads[run.folder.name, nets[0]] = {N: [p.grad.clone() for p in run.parts[N].parameters()
                                               if p.grad is not None] for N in "RTD"}
    monkeypatch.setattr(train.Run, "descend", watched)
    for name in ("--l1 R --gan T", "--adversarial 0", "--recon 0"):
        main(f"{REG} --steps 1 --practice 0 --smooth 1 --recon .5 {name}", tmp_path / name)
    first, routed = (grads["--l1 R --gan T", phase] for phase in "DR")
    assert first["R"] == first["T"] == [] and first["D"] != []
    R, T = grads["--adversarial 0", "R"]["R"], grads["--recon 0", "R"]["T"]
    same(routed, {"R": R, "T": T, "D": first["D"]}, 1e-6)

def test_keypoints_recover_a_known_affine_map_to_under_a_pixel():
    """Else CG + SIFT would be a straw man. A picture without keypoints leaves everything where it is."""
    I, R = data.make_plants(4, (64, 64), 1)[0] / 127.5 - 1, geomreg.Keypoints(torch.nn.Identity())
    x, y = (warp.grid_of(I) - 32).unbind(1)
    phi = torch.stack([.05 * x - .1 * y + 3, .1 * x + .03 * y - 2], 1).expand(4, -1, -1, -1)
    assert warp.length(R(I, warp.resample(I, phi, "border")) - phi).mean((1, 2)).max() < 1
    same(R(I, 0 * I), 0 * phi)

@pytest.mark.parametrize("message,words,spoilt", [  # {}: a folder of the user, where some file is spoilt
    ("none: no such folder", "degia --train 60 --unseen {}/none", {}),
    ("no train-images-idx3-ubyte", "degia --data {}/images", {}),
    ("idx3-ubyte.gz: damaged", "degia --data {}", {"train-images-idx3-ubyte.gz": gzip.compress(IMAGES[:-9])}),
    ("labels up to 11", "degia --data {}", {"train-labels-idx1-ubyte": LABELS[:8] + 40 * b"\x0b"}),
    ("--train 41", "degia --data {} --train 41", {}),
    ("labels.txt, line 2", "degia --train 20 --unseen {}", {"mnist_m_train_labels.txt": b"0.png 3\n1.png x"}),
    ("--beta 2.0: must be from 0.0001 to 1", "degia --beta 2", {}),
    ("--flow-size 6: not a multiple of 4", "degia --train 60 --flow-size 6", {}),
    *((message, "degia --task hands --data {}", {"landmarks.csv": HAND + row}) for message, row in (
        ("line 2: 'g,.* of this folder", b"\ng" + 17 * b",1,2"), ("line 2: 'h,1,2'", b"\nh,1,2"),
        ("line 2: 'h,x", b"\nh,x" + 33 * b",1"), ("line 2: .*,97.* inside", b"\nh,97" + 33 * b",1"),
        ("h.png: has 2 lines", 2 * (b"\nh" + 34 * b",1")))),
    ("checkpoint.pt: no such checkpoint", "reg --resume", {}),
    ("train/A: no such folder", "reg --data {}/images", {}),
    ("A/a9.png: no partner", "reg --data {}", {"train/A/a9.png": b"text"}),
    ("B/a1.png: not a readable", "reg --data {}", {"train/B/a1.png": b"text"}),
    ("line 2: .*99.* inside", "reg --data {}", {"train/landmarks.csv": b"name,xa,ya,xb,yb\na0,3,4,5,99"}),
    ("line 3.*x,4", "reg --data {}", {"train/landmarks.csv": b"name,xa,ya,xb,yb\na0,1,2,3,4\na1,1,2,x,4"}),
    ("first line must be", "reg --data {}", {"train/landmarks.csv": b"x,y"})])
def test_bad_input_gets_one_clear_line_and_writes_nothing(message, words, spoilt, tmp_path, capsys):
    words, run = words.format(user_folder(tmp_path, spoilt)), tmp_path / "run"
    pytest.raises(SystemExit, evaluation.exit_on_bad_input, lambda _: main(words, run)).match("^2$")
    assert re.fullmatch(f".*{message}.*\n", capsys.readouterr().err) and not run.exists()

def test_eval_repeats_the_numbers_of_a_run_and_reads_the_users_files(tmp_path, capsys):
    """It prints results.json; --images names a digit, or resamples A by the written field at B's size."""
    folder, run, reg, hand = user_folder(tmp_path), *(tmp_path / name for name in ("degia", "reg", "hand"))
    A, B = (folder / f"train/{side}/a1.png" for side in "AB")
    digits, pairs = main(f"{DEGIA} --steps 8", run), main(f"{REG} --steps 2 --data {folder}", reg)
    main(f"{DEGIA} --task hands --size 32 --M-width 2 --steps 2", hand)
    (x_src, _), pool = data.make_digits(60, 16, 0), digits["extra"]
    assert (pool["x"] / 255 - x_src[pool["source"]]).abs().mean((1, 2, 3)).max() < .05
    for words in ([run], [run, "--images", A], [reg], [reg, "--images", A, B], [hand, "--images", A]):
        evaluation.main([str(word) for word in words])
    printed = capsys.readouterr().out
    for name, row in {**digits["results"]["domains"], "registered": pairs["results"]["registered"]}.items():
        for measure, value in row.items():  # train.py printed them, and eval.py again
            assert len(re.findall(rf" {name} +{measure} +{value:.5f}", printed)) == 2
    assert re.search(r"a1.png: \d", printed) and (run / "images.png").exists()
    assert re.match(r"name(,\w+){33},y16\na1\.png,(1?\d|2[0-3])\.\d", (hand / "landmarks.csv").read_text())
    phi = torch.from_numpy(np.load(reg / "a1_field.npy"))[None]
    assert phi.shape == (1, 2, 40, 48) and (reg / "a1_overlay.png").exists()
    I, aligned = (data.as_tensor(data.open_image(f), (40, 48)).float() for f in (A, reg / "a1_aligned.png"))
    assert (aligned - warp.resample(I[None], phi)[0])[:, 2:-2, 2:-2].abs().mean() < 2

def test_tables_train_each_configuration_once_and_average_over_seeds(tmp_path, capsys):
    words = f"tables reg --out {tmp_path} {REG[4:]} --steps 2".split()
    evaluation.main([*words, "--seeds", "2", "--rows", "5 both"])
    evaluation.main([*words, "--seeds", "2", "--rows", "3 without"])
    assert capsys.readouterr().out.count("python train.py") == 2 and (tmp_path / "figure_5.png").exists()
    row, runs = next(csv.DictReader((tmp_path / "reg.csv").open())), tmp_path.glob("*/*/results.json")
    found = [json.loads(path.read_text())["registered"]["salient"] for path in runs]
    assert (row["n"], row["measure"], len(found)) == ("2", "salient", 2)
    expected = [np.mean(found), np.std(found, ddof=1)]
    assert [float(row["mean"]), float(row["deviation"])] == pytest.approx(expected, rel=1e-3)

def test_each_command_of_the_readme_and_of_the_tables_parses():
    for row in csv.DictReader(Path(__file__).with_name("figures").joinpath("papers.csv").open()):
        train.parse([row["task"], *row["options"].split()])
    blocks = Path(__file__).with_name("README.md").read_text().replace("\\\n", " ").split("```")[1::2]
    commands = re.findall(r"^[^#\n]*?\b(train|eval)\.py\b([^#\n]*)", "".join(blocks), re.M)
    assert len(commands) > 9
    for script, words in commands:
        found = {"train": train, "eval": evaluation}[script].parse(shlex.split(words))
        if "tables" in words:
            train.parse([found.task, *found.others])
