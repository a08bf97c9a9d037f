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
    (x, u), c = rand(2, 64, 3, 4, 4), torch.arange(64) % 3
    F.initialise(x, u)
    h = F.levels[0][0](nnf.pixel_unshuffle(torch.logit(.05 + .9 * (255 * x + u) / 256), 2))[0]
    assert h.mean((0, 2, 3)).abs().max() < 1e-6 and (h.std((0, 2, 3)) - 1).abs().max() < .01
    before = F.log_prob(x, c, u).mean()
    for n in torch.randn(31, 64, flows.NOISE_DIM).double():
        shift = F.prior.shift(n)
        gradients = torch.autograd.grad(F.log_prob(x, c, u, shift).mean(), [*F.parameters()])
        for p, g in zip(F.parameters(), gradients):
            p.data += .01 * g.sign()
    assert F.log_prob(x, c, u).mean() > before + 1 and shift.mean(0).abs().max() < 1e-5
    assert shift.square().mean().sqrt().item() == pytest.approx(.3, abs=1e-3)
    F.prior.log_G_std.weight.data = 8 * rand(3, F.dim) - 4  # beyond both bounds
    mean, std = .7 * F.prior.G_m.weight[c] + shift, F.prior.log_G_std.weight[c].clamp(-2, .5).exp()
    z, log_det = F(x, u)
    expected = torch.distributions.Normal(mean, std).log_prob(z).sum(1) + log_det
    same(F.log_prob(x, c, u, shift), expected, 1e-9)
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
    right = torch.tensor([1., 0.]).view(1, 2, 1, 1).expand_as(phi).double()
    same(warp.resample(I, 0 * phi), I, 1e-9)
    same(warp.resample(I, right)[..., :-1], I[..., 1:], 1e-9)
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
    for alpha in (0., 1.):
        expected = (torch.exp(-alpha * edge) * bend)[v == 1].sum() / 30 * 6 / 256
        same(warp.smoothness(phi, O_s, alpha), expected, 1e-9)
    small, large = (warp.smoothness(bumpy(1, (s, s), .1), torch.zeros(1, 1, s, s), 0.) for s in (64, 128))
    assert small.item() == pytest.approx(large.item(), rel=.05)

@pytest.mark.parametrize("size", [(5, 5), (17, 30)])
@pytest.mark.parametrize("registration,blocks", [("pyramid", 0), ("unet", 1)])
def test_the_networks_pass_any_size_and_the_papers_have_the_papers_sizes(registration, blocks, size):
    """A field and a picture of B's channels, as large as the input; all learns; about 2.1, 11.4 and 2.8 M."""
    o = train.Reg(registration=registration, R_width=4, T_width=4, T_blocks=blocks, D_width=4)
    R, T, D = nets = torch.nn.ModuleList(geomreg.build(o, (3, 2)))
    I_a, I_b = (rand(2, c, *size).float() for c in (3, 2))
    phi, O = R(I_a, I_b), T(I_a)
    assert phi.shape == (2, 2, *size) and O.shape == I_b.shape and phi.abs().max() < 5
    (phi.square().sum() + O.square().sum() + D(I_a, I_b).square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in nets.parameters())
    papers = geomreg.build(train.parse(["reg", "--paper"])[0], (3, 1))
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in papers]
    assert counts == pytest.approx([2.1, 11.4, 2.8], rel=.1)

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
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert len(y.bincount()) == 10 and y.bincount().min() > 30
    for look in (data.apply_look(name, x, 0) for name in data.LOOKS):
        assert look.shape == (600, 3, 16, 16) and look.dtype == torch.uint8 and look.float().std() > 12
    a, b, radius = torch.tensor([[[20., 30.]]]), torch.tensor([[[50., 45.]]]), torch.tensor([[6.]])
    cover = data.draw_strokes(a, b, radius, (70, 80))[0, 0]
    assert cover.sum().item() == pytest.approx(12 * math.hypot(30, 15) + math.pi * 36, rel=.01)
    assert cover[30, 20] == 1 and cover[45, 50] == 1 and cover[60, 20] == 0

def test_embedded_plants_are_honest_and_augmentation_keeps_the_relation_of_a_pair():
    """5 to 7 px that no mean field, translation or affine map removes; only `deform` moves A against B."""
    A, _, points, salient = data.make_plants(100, (64, 64), 999_003)
    there, left = ~points.isnan(), evaluation.simple_maps(points)
    assert there.all(2).sum(1).min() >= 6 and there[:, salient].float().mean() > .3
    assert points[there].min() >= -.5 and points[there].max() <= 63.5
    nothing = (points[..., :2] - points[..., 2:]).norm(dim=2).nanmean(1).mean().item()
    assert 5 <= nothing <= 7 and left["mean field"] >= .95 * nothing
    assert left["translation"] >= .55 * nothing and left["affine"] >= .35 * nothing
    I = A[:8] / 255
    (a, b), (c, d) = (data.augment(I, I, .3, deform, torch.Generator().manual_seed(0)) for deform in (0, .1))
    assert torch.equal(a, b) and torch.equal(b, d) and (a - I).abs().mean() > .02 < (c - a).abs().mean()

@pytest.mark.parametrize("backbone,width,millions", [
    ("lenet", 64, 4.6), ("alexnet", 64, 7.8), ("vgg", 64, 14.), ("resnet", 64, 11.4), ("densenet", 32, .89)])
def test_each_backbone_learns_with_every_parameter_and_has_its_size(backbone, width, millions):
    """A layer that nothing depends on, or a template feature of another length, would go unseen."""
    M = degia.TaskNetwork(backbone, width, 32, 34)
    assert sum(p.numel() for p in M.parameters()) / 1e6 == pytest.approx(millions, rel=.02)
    M = degia.TaskNetwork(backbone, 4, 40, 34)
    output, feature = M(rand(3, 3, 40, 40).float())
    degia.task_loss(output, rand(3, 34)).mean().backward()
    assert output.shape == (3, 34) and feature.shape == (3, M.head.in_features)
    assert all(p.grad.abs().sum() > 0 for p in M.parameters())

def test_hands_show_their_landmarks_in_all_modalities():
    """In each a landmark is on the hand: skin is redder than blue, near is bright in depth, dense on film."""
    views, y = data.make_hands(60, 64, 3)
    assert torch.equal(y, data.make_hands(60, 64, 3)[1]) and 0 <= y.min() and y.max() <= 1
    rgb, depth, xray = (view.float() for view in views.values())
    places = (y.view(60, 17, 2) * 64 - .5).transpose(1, 2)[..., None]
    for view in (rgb[:, :1] - rgb[:, 2:], depth, xray):
        seen = warp.look_up(nnf.max_pool2d(view[:, :1], 3, 1, 1), places).view(60, 17)
        assert (seen > view[:, 0].flatten(1).median(1, keepdim=True).values + 12).float().mean() > .95

def test_poses_are_clustered_and_a_pose_like_the_template_is_not_warped():
    """k-means finds separated clusters; the similarity of a similar pose is exact."""
    centres = 10 * torch.eye(34)[:5]
    y = centres.repeat_interleave(20, 0) + .1 * rand(100, 34).float()
    assert torch.cdist(centres, degia.k_means(y[torch.randperm(100)], 5)).amin(1).max() < .5
    p, turn = rand(17, 2), torch.tensor([[1.2, -.5], [.5, 1.2]]).double()
    same(evaluation.similarity(p, p), torch.eye(2, 3).double(), 1e-9)
    same(evaluation.similarity(p, p @ turn.T + 3), torch.cat([turn, torch.full((2, 1), 3.)], 1), 1e-9)

def hands(folder, *rows):
    """The folder, with a black image of 96x48 that has white squares at (10, 20) and (80, 40), and rows."""
    (folder / "images").mkdir(parents=True)
    pixels = np.zeros((48, 96), np.uint8)
    pixels[17:24, 7:14] = pixels[37:44, 77:84] = 255
    Image.fromarray(pixels).save(folder / "images/h.png")
    rows = "name," + ",".join(f"x{i},y{i}" for i in range(17)), *rows
    (folder / "landmarks.csv").write_text("\n".join(rows))
    return folder
def user_folder(folder, cut=None, label=None, table="0.png 3,1.png 1,2.png 4",
                points="name,xa,ya,xb,yb a0,3,4,5,6 a1,23,19,0,0", no_image="A/notes.txt"):
    """40 digits as MNIST, red images as MNIST-M, pairs: A 24x20, colours, B twice as large, 16-bit, grey."""
    x, y = data.make_digits(40, 28, 0)
    images = np.array([0x803, 40, 28, 28], ">i4").tobytes() + data.to_uint8(x).numpy().tobytes()
    labels = np.array([0x801, 40], ">i4").tobytes() + bytes([label] * 40 if label else y.tolist())
    for side in ("mnist_m_train", "train/A", "train/B"):
        (folder / side).mkdir(parents=True)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images[:cut]))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    for i, mode in enumerate(("P", "RGB", "RGBA")):
        Image.new("RGB", (32, 32), (80 + i, 0, 0)).save(folder / f"mnist_m_train/{i}.png")
        picture = Image.fromarray((rand(5, 6, 3, seed=i) * 255).byte().numpy()).resize((24, 20))
        picture.convert(mode).save(folder / f"train/A/a{i}.png")
        deep = np.asarray(picture.convert("L").resize((48, 40)), np.uint16) * 200
        Image.fromarray(deep).save(folder / f"train/B/a{i}.png")
    (folder / "mnist_m_train_labels.txt").write_text(table.replace(",", "\n"))
    (folder / "train/landmarks.csv").write_text(points.replace(" ", "\n"))
    (folder / "train" / no_image).write_text("text")
    return folder

def test_folders_are_read_as_they_were_written(tmp_path):
    """MNIST, MNIST-M, photographs, pairs of any depth and size: pixels, labels and points stay together."""
    (x, y), folder, run = data.make_digits(40, 28, 0), user_folder(tmp_path / "mm"), tmp_path / "run"
    unseen, digit = [str(folder), str(folder / "mnist_m_train")], data.to_uint8(x)[:, 0].int()
    o = train.Degia(data=str(folder), unseen=unseen, size=28, train=30)
    source, labels, domains = data.load_digits(o, run)
    assert list(domains) == ["source", "mm", "mnist_m_train"] and len(list(run.iterdir())) == 1  # cache
    assert torch.equal(source[:, 0].int(), digit[:30]) and torch.equal(labels, y[:30])
    assert domains["mm"][1].tolist() == [3, 1, 4] and domains["mm"][0][:, 0, 5, 5].tolist() == [80, 81, 82]
    red, green, _ = domains["mnist_m_train"][0].int().unbind(1)  # |photograph - digit|
    assert (red - (81 - digit).abs()).abs().max() <= 2 and torch.equal(green, digit)
    o = train.Reg(data=str(folder), height=20, width=24)
    pairs, reading = data.load_pairs(o, run)  # there is no test/: the training pairs take its place
    A, B, points = pairs["test"].A, pairs["train"].B, pairs["train"].points
    assert A.shape == (3, 3, 20, 24) and B.shape == (3, 1, 20, 24) and reading["B"][2] < 65535
    assert torch.corrcoef(torch.stack([A.float().mean(1).flatten(), B.float().flatten()]))[0, 1] > .7
    same(points[:2, 0], torch.tensor([[3, 4, 2.25, 2.75], [23, 19, -.25, -.25]]), 1e-5)
    assert points[2:].isnan().all()
    x, y = data.load_landmarks(hands(tmp_path / "h", "h.png" + 8 * ",10,20,80,40" + ",10,20"), 24, run)
    places = (y.view(1, 17, 2) * 24 - .5).transpose(1, 2)[..., None]  # of an image at another size and shape
    assert x.shape == (1, 3, 24, 24) and warp.look_up(x.float(), places).min() > 200

def main(words, out):
    """Runs `train.py WORDS --out OUT`; the checkpoint that it leaves, with the `results` of a whole run."""
    train.main([*words.split(), "--out", str(out)])
    results = [json.loads(path.read_text()) for path in out.glob("results.json")]
    return {**evaluation.load_checkpoint(out), "results": results[0] if results else None}

@pytest.mark.parametrize("tiny,other", [(DEGIA, "reg"), (REG, "degia")], ids=["degia", "reg"])
def test_a_run_stopped_killed_and_resumed_equals_a_whole_one_and_two_processes(tiny, other, tmp_path):
    """Bit for bit (networks, optimizers, pool, log), whatever wrong commands were given; torchrun nearly."""
    words, runs = f"{tiny} --steps 12", [tmp_path / name for name in ("whole", "parts", "two")]
    whole, half = main(words, runs[0]), main(f"{words} --stop-after 5", runs[1])
    resume = f"{half['task']} --resume"
    assert half["step"] == 5 and (tiny == REG or len(half["extra"]["x"]) == 12)  # between two max rounds
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed while it writes
        patch.setattr(torch, "save", lambda _, file: (file.write_bytes(b"half"), os.kill(os.getpid(), 2)))
        main(resume, runs[1])
    def refuses(words, message):
        with pytest.raises(ValueError, match=message):
            main(words, runs[1])
    refuses(words, "--resume or choose another")
    refuses(f"{other} --resume", f"not of `{other}`")
    refuses(f"{resume} --steps 13", "another --steps")
    resumed = main(resume, runs[1])
    same((whole["state"], whole["extra"]), (resumed["state"], resumed["extra"]))
    a, b = ([row.rsplit(",", 1)[0] for row in (run / "log.csv").read_text().split()] for run in runs[:2])
    assert a == b and len(a) == 13
    assert {**whole["results"], "seconds": 0} == {**resumed["results"], "seconds": 0}
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node=2 train.py {words} --out {runs[2]}"
    subprocess.run([sys.executable, *torchrun.split()], cwd=HERE, check=True)
    two = evaluation.load_checkpoint(runs[2])
    same(whole["state"], two["state"], 3e-4)
    assert all((two["extra"][k] - t.double()).abs().mean() < .5 for k, t in whole["extra"].items())
    path = runs[1] / "checkpoint.pt"
    for write in (lambda: path.write_bytes(b"text"), lambda: torch.save({"model": torch.zeros(1)}, path)):
        write()  # a file of another program
        refuses(resume, "not a checkpoint")

def test_short_runs_learn_and_a_rate_far_too_high_costs_no_checkpoint(tmp_path):
    """Sixty steps of the stand-alone CNN read most digits; R brings plants closer than doing nothing."""
    found = main("degia --method pure --train 999 --steps 60 --size 20", tmp_path / "d")["results"]
    assert found["domains"]["source"]["accuracy"] > 80 and "bits_per_dim" not in found
    found = main("reg --train 100 --steps 160 --gan 0 --smooth 100", tmp_path / "r")["results"]
    assert found["registered"]["scene"] < .95 * found["unregistered"]["scene"] and found["folding"] < .02
    with pytest.raises(ValueError, match="loss task is (nan|inf)"):
        main(f"{DEGIA} --steps 8 --method pure --lr 1e30", tmp_path)
    assert evaluation.load_checkpoint(tmp_path)["step"] == 0

def test_each_phase_of_registration_moves_its_own_networks(tmp_path, monkeypatch):
    """(1) leaves no gradient in R and T; (2) leaves D's as it was."""
    descend, grads = train.Run.descend, []
    def watched(run, *phase, **options):
        descend(run, *phase, **options)
        grads.append([[p.grad is None or p.grad.norm() for p in run.parts[N].parameters()] for N in "RTD"])
    monkeypatch.setattr(train.Run, "descend", watched)
    main(f"{REG} --steps 1", tmp_path)
    (R, T, D), (*_, D_later) = grads
    assert all(g is True for g in R + T) and D == D_later
@pytest.mark.parametrize("message,words", {  # the words are made in an empty folder t
    "none: no such folder": lambda t: f"degia --train 60 --unseen {t}/none",
    "no train-images-idx3-ubyte": lambda t: f"degia --data {t}",
    "idx3-ubyte.gz: damaged": lambda t: f"degia --data {user_folder(t, cut=-9)}",
    "labels up to 11": lambda t: f"degia --data {user_folder(t, label=11)}",
    "--train 41": lambda t: f"degia --data {user_folder(t)} --train 41",
    "labels.txt, line 2": lambda t: f"degia --train 20 --unseen {user_folder(t, table='0.png 3,1.png x')}",
    "--beta 2.0: must be from 0.0001 to 1": lambda t: "degia --beta 2",
    "--flow-size 6: not a multiple of 4": lambda t: "degia --train 60 --flow-size 6",
    "line 2: 'g,.* of this folder": lambda t: f"degia --task hands --data {hands(t, 'g' + 17 * ',1,2')}",
    "line 2: 'h,1,2'.*": lambda t: f"degia --task hands --data {hands(t, 'h,1,2')}",
    "line 2: 'h,x.*": lambda t: f"degia --task hands --data {hands(t, 'h,x' + 33 * ',1')}",
    "line 2: .*,97.* inside": lambda t: f"degia --task hands --data {hands(t, 'h,97' + 33 * ',1')}",
    "h.png: has 2 lines": lambda t: f"degia --task hands --data {hands(t, *['h' + 34 * ',1'] * 2)}",
    "checkpoint.pt: no such checkpoint": lambda t: "reg --resume",
    "train/A: no such folder": lambda t: f"reg --data {t}",
    "A/a9.png: no partner": lambda t: f"reg --data {user_folder(t, no_image='A/a9.png')}",
    "B/a1.png: not a readable": lambda t: f"reg --data {user_folder(t, no_image='B/a1.png')}",
    "line 2: .*99.* inside": lambda t: f"reg --data {user_folder(t, points='name,xa,ya,xb,yb a0,3,4,5,99')}",
    "line 3.*x,4": lambda t: f"reg --data {user_folder(t, points='name,xa,ya,xb,yb a0,1,2,3,4 a1,1,2,x,4')}",
    "first line must be": lambda t: f"reg --data {user_folder(t, points='x,y')}",
}.items())
def test_bad_input_gets_one_clear_line_and_writes_nothing(message, words, tmp_path, capsys):
    """It names the file or the value, exits with 2, and no run folder is left behind."""
    with pytest.raises(SystemExit, match="^2$"):
        evaluation.exit_on_bad_input(lambda _: main(words(tmp_path), tmp_path / "run"))
    assert re.fullmatch(f".*{message}.*\n", capsys.readouterr().err) and not (tmp_path / "run").exists()

def test_eval_repeats_the_numbers_of_a_run_and_reads_the_users_files(tmp_path, capsys):
    """It prints results.json; --images names a digit, or resamples A by the written field at B's size."""
    folder, run, reg, hand = user_folder(tmp_path), *(tmp_path / name for name in ("degia", "reg", "hand"))
    degia_run = main(f"{DEGIA} --steps 8", run)
    (x_src, _), pool = data.make_digits(60, 16, 0), degia_run["extra"]
    assert (pool["x"] / 255 - x_src[pool["source"]]).abs().mean((1, 2, 3)).max() < .05
    registered = main(f"{REG} --steps 2 --data {folder}", reg)["results"]["registered"]
    A, B = (folder / f"train/{side}/a1.png" for side in "AB")
    main(f"{DEGIA} --task hands --size 32 --M-width 2 --steps 2", hand)
    capsys.readouterr()
    for words in ([run], [run, "--images", A], [reg], [reg, "--images", A, B], [hand, "--images", A]):
        evaluation.main([str(word) for word in words])
    printed = capsys.readouterr().out
    for name, numbers in degia_run["results"]["domains"].items():
        assert re.search(rf"{name} +accuracy +{numbers['accuracy']:.5f}", printed)
    assert re.search(rf" registered +scene +{registered['scene']:.5f}", printed)
    assert re.search(r"a1.png: \d", printed) and (run / "images.png").exists()
    found = [line.split(",") for line in (hand / "landmarks.csv").read_text().splitlines()]
    assert found[0][34] == "y16" and found[1][0] == "a1.png" and 0 < float(found[1][1]) < 24
    phi = torch.from_numpy(np.load(reg / "a1_field.npy"))[None]
    assert phi.shape == (1, 2, 40, 48) and (reg / "a1_overlay.png").exists()
    I, aligned = (data.as_tensor(data.open_image(f), (40, 48)).float() for f in (A, reg / "a1_aligned.png"))
    assert (aligned - warp.resample(I[None], phi)[0])[:, 2:-2, 2:-2].abs().mean() < 2

def test_each_command_of_the_readme_parses():
    """A README that names an option which no longer exists is worse than none."""
    blocks = "".join(re.findall(r"```(?:bash)?\n(.*?)```", (HERE / "README.md").read_text(), re.S))
    commands = re.findall(r"^[^#\n]*?\b(train|eval)\.py\b([^#\n]*)", blocks.replace("\\\n", " "), re.M)
    for script, words in commands:
        {"train": train, "eval": evaluation}[script].parse(shlex.split(words))
