"""What this code promises, a promise per test: `python -m pytest test_all.py`. Nothing is downloaded."""
import gzip, json, math, os, re, shlex, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
import data, degia, flows, geomreg, train, warp
import eval as evaluation

HERE = Path(__file__).parent
DEGIA = ("degia --dtype f32 --train 60 --size 16 --batch 8 --rounds 2 --K 2 "
         "--flow-size 4 --flow-steps 1")
REG = ("reg --dtype f32 --train 20 --width 16 --height 16 --batch 4 "
       "--scales 1 --R-width 4 --T-width 4 --D-width 4")

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

@pytest.mark.parametrize("channels,size,levels", [(3, 4, 2), (1, 4, 1), (2, 4, 1), (1, 8, 3)])
def test_the_flow_is_inverted_and_its_log_determinant_is_the_jacobians(channels, size, levels):
    """Sampling undoes the training path and dequantisation; eq. (2) by brute force, half factored out."""
    F, (x, u) = perturbed_flow(channels, size, levels=levels), rand(2, 3, channels, size, size)
    (z, log_det), y = F(x, u), (255 * x + u) / 256
    assert z.std() > .3
    same(F.inverse(z), y, 1e-9)
    same(F.inverse(F((256 * y).floor() / 255, (256 * y).frac())[0]), y, 1e-9)  # `sample` cuts y
    jacobian = torch.autograd.functional.jacobian(lambda v: F(v[None], u[:1])[0][0], x[0]).view(F.dim, F.dim)
    same(log_det[0], torch.linalg.slogdet(jacobian)[1] - F.dim * math.log(255 / 256), 1e-8)
    grey = 255 * F.float().sample(torch.tensor([0, 1, 2] * 20), torch.Generator().manual_seed(0))
    assert grey.min() >= 0 and grey.max() <= 255 and grey.std() > 12
    same(grey, grey.round(), .01)

def test_density_integrates_to_one_and_its_measures_measure():
    """Else a likelihood compares with nothing; a uniform one costs 8 bits; W2 in 1-D pairs sorted samples."""
    F, width = perturbed_flow(1, 2, classes=2, levels=1), 1 / (1 - 2 * flows.SQUEEZED_LOGIT)
    y = .5 + width * (rand(400_000, 1, 2, 2, seed=2) - .5)  # Monte Carlo over the logit's whole domain
    with torch.no_grad():
        p = F.log_prob(y * 256 / 255, torch.ones(len(y), dtype=torch.long), torch.zeros_like(y)).exp()
    assert abs(p.mean().item() * width ** 4 - 1) < .02
    same(flows.bits_per_dim(torch.tensor([0., 784 * math.log(256)]), 784), torch.tensor([8., 0.]), 1e-5)
    a, b = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0)).sort(1)[0]
    cost = (1 + .5 * a + .5 - 2 * b).square().mean().item()  # in each of two dimensions
    assert flows.gaussian_w2(*torch.tensor([[1., .5, -.5, 2.]] * 2).T).item() == pytest.approx(cost, rel=.03)

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

def test_prior_is_eq_8_and_its_noise_shift_keeps_deviation_lambda_after_training():
    """Maximum likelihood would shrink H_m(n), or make it a constant; then lambda would mean nothing."""
    F = perturbed_flow(gamma=.7, lam=.3)
    (x, u), c, n = rand(2, 64, 3, 4, 4), torch.arange(64) % 3, torch.randn(31, 64, flows.NOISE_DIM).double()
    optimizer, before = torch.optim.Adam(F.parameters(), 1e-2), F.log_prob(x, c, u).mean()
    for noise in n[1:]:
        optimizer.zero_grad()
        (-F.log_prob(x, c, u, F.prior.shift(noise)).mean()).backward()
        optimizer.step()
    shift = F.prior.shift(torch.randn(256, flows.NOISE_DIM).double())
    assert F.log_prob(x, c, u).mean() > before + 1 and shift.mean(0).abs().max() < 1e-5
    assert shift.square().mean().sqrt().item() == pytest.approx(.3, abs=1e-3)
    F.prior.log_G_std.weight.data *= 20  # beyond its bounds
    z, shift = 4 * rand(64, F.dim) - 2, F.prior.shift(n[0])
    mean, std = .7 * F.prior.G_m.weight[c] + shift, F.prior.log_G_std.weight[c].clamp(-2, .5).exp()
    assert std.min() < .14 and std.max() > 1.6
    same(F.prior.log_prob(z, c, shift), torch.distributions.Normal(mean, std).log_prob(z).sum(1), 1e-9)

def test_the_ascent_climbs_eq_7_stays_in_range_and_touches_no_parameter():
    """Each term against its definition, d without the noise shift; M and F learn in the min phase only."""
    torch.manual_seed(0)
    M, F = degia.LeNet(10, 16).eval(), perturbed_flow(dtype=torch.float32)
    x_src, c, u = torch.rand(12, 3, 16, 16), torch.full((12,), 1), torch.rand(12, *F.shape)
    shift, feature = F.prior.shift(torch.randn(12, flows.NOISE_DIM)).detach(), M(x_src)[1].detach()
    def objective(x, alpha=1., density=1.):
        return degia.max_objective(x, c, c, M, F, feature, u, shift, alpha, density)
    values = [objective(degia.ascend(x_src, objective, K, 1e-3, 1)).item() for K in (0, 1, 2, 4)]
    assert values == sorted(values) and values[-1] > values[0]
    for eta in (.02, .5):
        x = degia.ascend(x_src, objective, 1, eta, 3)
        moved = (x - x_src).square().mean((1, 2, 3)).sqrt()
        assert x.min() >= 0 and x.max() <= 1 and not x.requires_grad
        assert (moved <= eta * 1.001).all() and (moved > .5 * eta).all()
    assert all(p.grad is None for net in (M, F) for p in net.parameters())
    x = .9 * x_src + .05
    z, log_det = F(nnf.avg_pool2d(x, 4), u)
    mean, std = F.prior.gamma * F.prior.G_m.weight[1], F.prior.log_G_std.weight[1].exp()
    log_p = torch.distributions.Normal(mean + shift, std).log_prob(z).sum(1) + log_det
    d = ((z.mean(0) - mean).square() + (z.std(0, correction=0) - std).square()).mean()
    ada = nnf.cross_entropy(M(x)[0], c, reduction="none") - 2 * (M(x)[1] - feature).square().mean(1)
    same(degia.max_objective(x, c, c, M, None, feature, None, None, 2., 1.), ada.sum(), 1e-4)  # without F
    same(objective(x, 2., 3.), (ada - 3 * log_p / F.dim - 2 * d).sum(), 1e-4)

def bumpy(height, width, size=1.):
    """A smooth field without folds, (1,2,H,W) in pixels, float64."""
    coarse = size * (rand(1, 2, 3, 3) - .5)
    return nnf.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)

@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5), (33, 20)])
def test_the_resampler_does_what_eq_1_says(size):
    """Zero is the identity, channel 0 is x, sign as in (1); a pointwise T commutes, as dual flow needs."""
    I, phi = rand(2, 3, *size), torch.zeros(2, 2, *size, dtype=torch.float64)
    same(warp.resample(I, phi), I, 1e-9)
    phi[:, 0] = 1
    same(warp.resample(I, phi)[..., :-1], I[..., 1:], 1e-9)
    phi, T = bumpy(*size, 6.).expand(2, -1, -1, -1), torch.nn.Conv2d(3, 1, 1, bias=False).double()
    same(T(warp.resample(I, phi)), warp.resample(T(I), phi), 1e-9)

def test_the_inverse_undoes_the_field_and_the_jacobian_finds_its_folds():
    """A dot in I is then where `warp_points` says, at any scale; v + phi = A v has determinant |A|."""
    phi, p = bumpy(40, 50, 8.), torch.tensor([[[21., 17.]]]).double()
    v, back = warp.grid_of(phi), warp.compose(phi, warp.invert(phi))
    assert phi.abs().max() > 2 and back[..., 6:-6, 6:-6].abs().max() < 1e-6
    seen = warp.resample(torch.exp(-(v - p.view(1, 2, 1, 1)).square().sum(1, keepdim=True) / 8), phi)
    centre, q = (seen * v).sum((2, 3)) / seen.sum(), warp.warp_points(p, phi)
    assert (q[0] - centre).abs().max() < .1 and (q - p).abs().max() > .4
    same((warp.warp_points((p + .5) * 2 - .5, warp.resize_field(phi, (80, 100))) + .5) / 2 - .5, q, 2e-2)
    v = v[..., :6, :7]
    phi = torch.einsum("ij,bjhw->bihw", torch.tensor([[1.2, .3], [-.1, .9]]).double(), v) - v
    same(warp.jacobian_determinant(phi), torch.full((1, 5, 6), 1.2 * .9 + .03).double(), 1e-9)
    phi[:, 0, :, 3:] -= 2  # mirrors a strip
    assert (warp.jacobian_determinant(phi) <= 0).double().mean() == pytest.approx(1 / 6)

def test_smoothness_is_eq_2_neighbour_by_neighbour():
    """Against a double loop; alpha = 1 lets phi bend at an edge; a field costs the same at two sizes."""
    phi, O_s, total = bumpy(5, 6), rand(1, 2, 5, 6), torch.zeros(2).double()
    for y, x, dy, dx in np.ndindex(5, 6, 3, 3):
        if (dy, dx) != (1, 1) and 0 <= y + dy - 1 < 5 and 0 <= x + dx - 1 < 6:
            bend, edge = (I[0, :, y + dy - 1, x + dx - 1] - I[0, :, y, x] for I in (phi, O_s))
            length = (bend / torch.tensor([2.5, 2.])).norm()  # in halves of W - 1 and H - 1
            total += torch.stack([length, torch.exp(-edge.norm()) * length])
    found = torch.stack([warp.smoothness(phi, O_s, alpha) for alpha in (0., 1.)])
    same(found, total / 30 * 6 / 256, 1e-9)
    small, large = (warp.smoothness(bumpy(s, s, .1 * s), torch.zeros(1, 1, s, s), 0.) for s in (64, 128))
    assert found[1] < found[0] and small.item() == pytest.approx(large.item(), rel=.05)

@pytest.mark.parametrize("registration,blocks", [("pyramid", 0), ("unet", 1)])
def test_the_networks_pass_any_size_and_the_papers_have_the_papers_sizes(registration, blocks):
    """A field and a picture of B's channels, as large as the input; all learns; about 2.1, 11.4 and 2.8 M."""
    o = train.Reg(registration=registration, R_width=4, T_width=4, T_blocks=blocks, D_width=4)
    R, T, D = geomreg.build(o, (3, 2))
    for size in ((5, 5), (17, 30)):
        I_a, I_b = (rand(2, c, *size, dtype=torch.float32) for c in (3, 2))
        phi, O = R(I_a, I_b), T(I_a)
        assert phi.shape == (2, 2, *size) and O.shape == I_b.shape and phi.abs().max() < 5
        (phi.square().sum() + O.square().sum() + D(I_a, I_b).square().sum()).backward()
        for p in (p for net in (R, T, D) for p in net.parameters()):
            assert p.grad.isfinite().all()
            p.grad = None
    o, _, _ = train.parse(["reg", "--paper"])
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in geomreg.build(o, (3, 1))]
    assert counts == pytest.approx([2.1, 11.4, 2.8], rel=.1)

def test_measures_of_an_image_with_itself():
    """Correlation and SSIM are 1; correlation of the negative is -1 and its square does not care."""
    I = nnf.interpolate(2 * rand(1, 1, 9, 9) - 1, (32, 32), mode="bicubic", align_corners=True)
    same(geomreg.ssim(I, I, 9), torch.ones_like(I), 1e-9)
    assert geomreg.correlation(I, I, 9).mean() > .85 and geomreg.correlation(I, -I, 9).mean() < -.85
    for measure in geomreg.MEASURES:
        values = [geomreg.distance(measure, J, I, 9, 2) for J in (I, I.roll(5, 3))]
        assert values[0] < .45 and values[1] > values[0] + .2
    same(geomreg.distance("ncc", I, -I, 9, 1), geomreg.distance("ncc", I, I, 9, 1), 1e-9)

def test_embedded_digits_depend_on_the_seed_alone_and_a_stroke_covers_its_area():
    """Everybody measures on the same digits. A capsule of length L and radius r has 2 r L + pi r^2 pixels."""
    (x, y), (again, _), (other, _) = (data.make_digits(600, 16, seed) for seed in (5, 5, 6))
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert y.unique().tolist() == list(range(10)) and y.bincount().min() > 30
    for name in data.LOOKS:
        look = data.apply_look(name, x, 0)
        assert look.shape == (600, 3, 16, 16) and look.dtype == torch.uint8 and look.float().std() > 12
    ends = torch.tensor([[[20., 30.]]]), torch.tensor([[[50., 45.]]])
    cover = data.draw_strokes(*ends, torch.tensor([[6.]]), (70, 80))[0, 0]
    assert cover.sum().item() == pytest.approx(12 * math.hypot(30, 15) + math.pi * 36, rel=.01)
    assert cover[30, 20] == 1 and cover[45, 50] == 1 and cover[60, 20] == 0

def test_embedded_plants_are_honest():
    """5 to 7 px that no mean field, translation or affine map removes; points in the images."""
    _, _, points, salient = data.make_plants(100, (64, 64), 999_003)
    there, left = ~points.isnan(), evaluation.simple_maps(points)
    assert there.all(2).sum(1).min() >= 6 and there[:, salient].float().mean() > .3
    assert points[there].min() >= -.5 and points[there].max() <= 63.5
    nothing = (points[..., :2] - points[..., 2:]).norm(dim=2).nanmean(1).mean().item()
    assert 5 <= nothing <= 7 and left["mean field"] >= .95 * nothing
    assert left["translation"] >= .55 * nothing and left["affine"] >= .35 * nothing

def mnist(folder, label=None, cut=None):
    """The folder, with MNIST's four files in it, filled with 40 small digits; optionally damaged."""
    x, y = data.make_digits(40, 28, 0)
    images = np.array([0x803, 40, 28, 28], ">i4").tobytes() + data.to_uint8(x).numpy().tobytes()
    labels = np.array([0x801, 40], ">i4").tobytes() + bytes([label] * 40 if label else y.tolist())
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images[:cut]))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return folder

def mnist_m(folder, labels="3 1 4"):
    """The folder, in the layout of MNIST-M's release: constant images of brightness 80, 81, ..."""
    (folder / "mnist_m_train").mkdir(parents=True)
    lines = [f"{i}.png {label}\n" for i, label in enumerate(labels.split())]
    (folder / "mnist_m_train_labels.txt").write_text("".join(lines))
    for i in range(len(lines)):
        Image.new("RGB", (32, 32), (80 + i, 0, 0)).save(folder / f"mnist_m_train/{i}.png")
    return folder

def pair_folder(folder, points="a0,3,4,5,6 a1,23,19,0,0", spoil=None):
    """The folder, with pairs: A 24x20 in colours, B twice as large, 16-bit, grey; spoil = (file, content)."""
    for root in (folder / "train", folder / "test"):
        (root / "A").mkdir(parents=True)
        (root / "B").mkdir()
        for i, mode in enumerate(("RGB", "RGB", "P", "RGBA")):
            picture = Image.fromarray((rand(5, 6, 3, seed=i) * 255).byte().numpy()).resize((24, 20))
            picture.convert(mode).save(root / f"A/a{i}.png")
            deep = np.asarray(picture.convert("L").resize((48, 40)), np.uint16) * 200
            Image.fromarray(deep).save(root / f"B/a{i}.png")
        (root / "landmarks.csv").write_text("\n".join(["name,xa,ya,xb,yb", *points.split()]))
    if spoil:
        (folder / "train" / spoil[0]).write_bytes(spoil[1])
    return folder

def test_folders_are_read_as_they_were_written(tmp_path):
    """MNIST, MNIST-M, photographs, pairs of any depth and size: pixels, labels and points stay together."""
    x, y = data.make_digits(40, 28, 0)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (50, 40), (255, 0, 0)).save(tmp_path / "photos/red.png")
    unseen, run = [str(mnist_m(tmp_path / "mm")), str(tmp_path / "photos")], tmp_path / "run"
    o = train.Degia(data=str(mnist(tmp_path)), unseen=unseen, size=28, train=30)
    source, labels, domains = data.load_digits(o, run)
    assert list(domains) == ["source", "mm", "photos"]
    assert torch.equal(source[:, 0], data.to_uint8(x[:30, 0])) and torch.equal(labels, y[:30])
    assert domains["mm"][1].tolist() == [3, 1, 4] and domains["mm"][0][:, 0, 5, 5].tolist() == [80, 81, 82]
    digit, made = data.to_uint8(x)[:, 0].int(), domains["photos"][0].int()
    assert (made[:, 0] - (255 - digit)).abs().max() <= 1 and torch.equal(made[:, 1], digit)
    assert len(list(run.iterdir())) == 1  # the cache, and nothing partial
    (pair_folder(tmp_path) / "test").rename(tmp_path / "unused")  # then the training pairs take its place
    pairs, reading = data.load_pairs(train.Reg(data=str(tmp_path), height=20, width=24), run)
    A, B, points = pairs["test"].A, pairs["train"].B, pairs["train"].points
    assert A.shape == (4, 3, 20, 24) and B.shape == (4, 1, 20, 24) and reading["B"][2] < 65535
    assert torch.corrcoef(torch.stack([A.float().mean(1).flatten(), B.float().flatten()]))[0, 1] > .7
    same(points[:2, 0], torch.tensor([[3, 4, 2.25, 2.75], [23, 19, -.25, -.25]]), 1e-5)
    assert points[2:].isnan().all()

def test_augmentation_keeps_the_relation_of_a_pair():
    """Both are flipped and cropped alike; only `deform` moves A against B."""
    I = bumpy(20, 24).float().expand(8, -1, -1, -1)
    (a, b), (c, d) = (data.augment(I, I, .3, deform, torch.Generator().manual_seed(0)) for deform in (0, .1))
    assert torch.equal(a, b) and torch.equal(b, d) and (a - I).abs().mean() > .02 < (c - a).abs().mean()

def main(words, out):
    """Runs `train.py WORDS --out OUT`; the checkpoint that it leaves, with the `results` of a whole run."""
    train.main([*words.split(), "--out", str(out)])
    results = [json.loads(path.read_text()) for path in out.glob("results.json")]
    return {**evaluation.load_checkpoint(out), "results": results[0] if results else None}

@pytest.mark.parametrize("tiny", [DEGIA, REG], ids=["degia", "reg"])
def test_a_run_equals_one_that_was_resumed_and_one_of_two_processes(tiny, tmp_path):
    """Bit for bit when stopped between two max rounds (networks, optimizers, pool, log); torchrun nearly."""
    words, runs = f"{tiny} --steps 12", [tmp_path / name for name in ("whole", "parts", "two")]
    whole, half = main(words, runs[0]), main(f"{words} --stop-after 5", runs[1])
    assert half["step"] == 5 and (tiny == REG or len(half["extra"]["x"]) == 12)
    resumed = main(f"{half['task']} --resume", runs[1])
    same((whole["state"], whole["extra"]), (resumed["state"], resumed["extra"]))
    a, b = ([row.rsplit(",", 1)[0] for row in (run / "log.csv").read_text().split()] for run in runs[:2])
    assert a == b and len(a) == 13
    assert {**whole["results"], "seconds": 0} == {**resumed["results"], "seconds": 0}
    torchrun = "-m torch.distributed.run --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=localhost:0"
    ran = subprocess.run([sys.executable, *torchrun.split(), "train.py", *words.split(), "--out", runs[2]],
                         cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    two = evaluation.load_checkpoint(runs[2])
    for name in "MF" if tiny == DEGIA else "RTD":
        same(whole["state"][name], two["state"][name], 3e-4)
    for name, t in whole["extra"].items():
        assert (t.double() - two["extra"][name].double()).abs().mean() < .5

def test_the_last_good_checkpoint_survives_a_kill_a_wrong_command_and_a_bad_loss(tmp_path, monkeypatch):
    """Killed half way through a write, started twice, resumed with other options: none costs the run."""
    main(f"{DEGIA} --steps 8 --stop-after 4", tmp_path)
    path = tmp_path / "checkpoint.pt"
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", lambda _, file: (file.write_bytes(b"half"), os.kill(os.getpid(), 2)))
        main("degia --resume", tmp_path)
    assert (tmp_path / "checkpoint.part").read_bytes() == b"half"
    def refuses(words, message, out=tmp_path):
        with pytest.raises(ValueError, match=message):
            main(words, out)
    refuses("degia", "--resume or choose another")
    refuses("reg --resume", "not of `reg`")
    refuses("degia --resume --steps 9", "another --steps")
    assert path.read_bytes() == before and evaluation.load_checkpoint(tmp_path)["step"] == 4
    assert main("degia --resume", tmp_path)["step"] == 8
    for write in (lambda: path.write_bytes(b"text"), lambda: torch.save({"model": torch.zeros(1)}, path)):
        write()  # a file of another program
        refuses("degia --resume", "not a checkpoint")
    refuses(f"{DEGIA} --steps 8 --method pure --lr 1e30", "loss task is (nan|inf)", tmp_path / "nan")
    assert evaluation.load_checkpoint(tmp_path / "nan")["step"] == 0

def test_short_runs_learn(tmp_path):
    """Sixty steps of the stand-alone CNN read most digits; R brings plants closer than doing nothing."""
    results = main("degia --method pure --train 999 --steps 60 --size 20", tmp_path / "d")["results"]
    assert results["domains"]["source"]["accuracy"] > 80 and "bits_per_dim" not in results
    results = main("reg --train 100 --steps 160 --gan 0 --smooth 100", tmp_path / "r")["results"]
    assert results["registered"]["scene"] < .95 * results["unregistered"]["scene"]
    assert results["folding"] < .02

def test_each_phase_of_registration_moves_its_own_networks(tmp_path, monkeypatch):
    """(1) leaves no gradient in R and T; (2) leaves D's as it was."""
    step, at_zero, at_step = torch.optim.Adam.step, [], []
    def grads(opt):
        return [None if p.grad is None else p.grad.clone() for p in opt.param_groups[0]["params"]]
    monkeypatch.setattr(torch.optim.Adam, "step", lambda opt: (at_step.append((opt, grads(opt))), step(opt)))
    monkeypatch.setattr(torch.optim.Adam, "zero_grad", lambda opt: at_zero.extend(grads(opt)))
    main(f"{REG} --steps 1", tmp_path)
    (opt_D, grads_D), *_ = at_step
    assert all(g is None for g in at_zero)  # D's, R's, T's before their own backward
    assert len(at_step) == 3 and all(map(torch.equal, grads(opt_D), grads_D))

@pytest.mark.parametrize("message,words", {  # the words are made in an empty folder t
    "none: holds no image": lambda t: f"degia --train 60 --unseen {t}/none",
    "no train-images-idx3-ubyte": lambda t: f"degia --data {t}",
    "idx3-ubyte.gz: damaged": lambda t: f"degia --data {mnist(t, cut=-9)}",
    "labels up to 11": lambda t: f"degia --data {mnist(t, label=11)}",
    "--train 41": lambda t: f"degia --data {mnist(t)} --train 41",
    "labels.txt, line 2": lambda t: f"degia --data {mnist(t)} --train 20 --unseen {mnist_m(t, '3 x')}",
    "--beta 2.0: must be from 0.0001 to 1": lambda t: "degia --beta 2",
    "--flow-size 6: not a multiple of 4": lambda t: "degia --train 60 --flow-size 6",
    "checkpoint.pt: no such checkpoint": lambda t: "reg --resume",
    "train/A: holds no image": lambda t: f"reg --data {t}",
    "A/a9.png: no partner": lambda t: f"reg --data {pair_folder(t, spoil=('A/a9.png', b''))}",
    "B/a1.png: not a readable": lambda t: f"reg --data {pair_folder(t, spoil=('B/a1.png', b'PNG'))}",
    "line 2: .*99.* inside": lambda t: f"reg --data {pair_folder(t, 'a0,3,4,5,99')}",
    "line 3: .*x,4": lambda t: f"reg --data {pair_folder(t, 'a0,1,2,3,4 a1,1,2,x,4')}",
    "first line must be": lambda t: f"reg --data {pair_folder(t, spoil=('landmarks.csv', b'x,y'))}",
}.items())
def test_bad_input_gets_one_clear_line_and_writes_nothing(message, words, tmp_path, monkeypatch, capsys):
    """It names the file or the value, exits with 2, and no run folder is left behind."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words(tmp_path).split(), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        evaluation.exit_on_bad_input(train.main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and re.search(message, lines[0])
    assert not (tmp_path / "run").exists()

def printed(capsys, *words):
    capsys.readouterr()
    evaluation.main([str(word) for word in words])
    return capsys.readouterr().out

def test_eval_repeats_the_numbers_and_new_samples_keep_the_label_of_their_source(tmp_path, capsys):
    """`eval.py RUN` prints results.json, --images a digit a file; a tiny eta leaves samples near."""
    run = main(f"{DEGIA} --steps 8 --eta .01", tmp_path)
    x_src, _, _ = data.load_digits(train.Degia(size=16, train=60), tmp_path)
    apart = (run["extra"]["x"][:, None].float() - x_src[None].float()).square().mean((2, 3, 4))
    assert torch.equal(apart.argmin(1), run["extra"]["source"])
    table = printed(capsys, tmp_path)
    for name, numbers in run["results"]["domains"].items():
        assert re.search(rf"{name} +accuracy +{numbers['accuracy']:.3f}", table)
    Image.new("L", (40, 30), 200).save(tmp_path / "mine.png")
    assert re.search(r"mine.png: \d", printed(capsys, tmp_path, "--images", tmp_path / "mine.png"))
    assert (tmp_path / "images.png").exists()

def test_eval_aligns_the_users_pair_at_full_size(tmp_path, capsys):
    """The written image is A resampled by the written field, at B's size; the table is that of the run."""
    folder, run = pair_folder(tmp_path / "pairs"), tmp_path / "run"
    results = main(f"{REG} --data {folder} --steps 2", run)["results"]
    assert re.search(rf" registered +scene +{results['registered']['scene']:.3f}", printed(capsys, run))
    printed(capsys, run, "--images", folder / "test/A/a1.png", folder / "test/B/a1.png")
    phi = torch.from_numpy(np.load(run / "a1_field.npy"))[None]
    A, aligned = (data.as_tensor(data.open_image(path), (40, 48)).float()
                  for path in (folder / "test/A/a1.png", run / "a1_aligned.png"))
    assert phi.shape == (1, 2, 40, 48) and (run / "a1_overlay.png").exists()
    assert (aligned - warp.resample(A[None], phi)[0])[:, 2:-2, 2:-2].abs().mean() < 2

BLOCKS = "".join(re.findall(r"```(?:bash)?\n(.*?)```", (HERE / "README.md").read_text(), re.S))
COMMANDS = re.findall(r"^[^#\n]*?\b(train|eval)\.py\b([^#\n]*)", BLOCKS.replace("\\\n", " "), re.M)

@pytest.mark.parametrize("script,words", COMMANDS)
def test_each_command_of_the_readme_parses(script, words):
    """A README that names an option which no longer exists is worse than none."""
    {"train": train, "eval": evaluation}[script].parse(shlex.split(words))
