"""Train DeGIA or the geometry-preserving registration. The two loops come first: read them beside the papers.

    python train.py degia                        embedded digits; --task hands: landmarks of embedded hands
    python train.py reg                          embedded plants, RGB to infrared
    torchrun --nproc_per_node=2 train.py reg     several GPUs or processes
All that is random in step k is drawn for the whole batch from a generator seeded by (seed, k): so a resumed
run needs no random state, and N processes equal one.
"""
import argparse, dataclasses, json, os, time
from pathlib import Path
import torch
import torch.distributed as dist
import data, degia, geomreg, warp
import eval as evaluation
from flows import NOISE_DIM, bits_per_dim

# ---------------------------------------------------------------- DeGIA: the min/max loop
def train_degia(o, run):
    """Minimize (5) over M and F on a growing training set; maximize (7) over images, which grows it."""
    x_src, y_src, domains = data.LOADERS[o.task](o, run.folder)
    if len(x_src) < 2:
        raise ValueError(f"{o.data}: {len(x_src)} images to train on; add some")
    M, F = degia.build(o)
    if o.task == "hands":
        M.template, F.poses = y_src.mean(0), degia.k_means(y_src, o.classes)
    x_src, y_src, c_src = (t.to(run.device) for t in (x_src, y_src, degia.classes_of(y_src, F)))
    pool = {"x": x_src[:0].clone(), "source": c_src[:0].clone()}  # new samples, their source images
    run.start({"M": M, "F": F}, {"M": o.lr, "F": o.flow_lr}, pool)
    rounds = range(1, o.rounds + 1) if o.method in ("degia", "ada") else ()
    rounds = {round(o.steps * i / (o.rounds + 2)) for i in rounds}  # the steps that begin with a max phase
    first = degia.flow_view(run.compute.images(x_src[:512]), F.shape)
    F.initialise(first, torch.rand(first.shape, **run.random(0, 2)))
    M, F = (net if name in degia.TRAINED[o.method] else None for name, net in zip("MF", (M, F)))

    for step in range(run.step, run.end):
        # ---- maximization, eq. (7): ORIGINAL images climb to new samples of plausible new domains
        if step in rounds:
            picked = torch.randperm(len(x_src), **run.random(step, 1))[:round(o.beta * len(x_src)) or 1]
            new = new_samples(o, run, step, M, F, x_src[picked], y_src[picked], c_src[picked])
            pool["x"], pool["source"] = torch.cat([pool["x"], new]), torch.cat([pool["source"], picked])
            if run.rank == 0:
                evaluation.picture_new_samples(x_src, pool, len(picked), run.folder / "new_samples.png")

        # ---- minimization, eq. (5), on a batch of originals and, once there are any, new samples
        gen, losses, share = run.random(step), {}, round(o.share * o.batch) if len(pool["x"]) else 0
        originals = torch.randint(len(x_src), (o.batch - share,), **gen)
        samples = torch.randint(max(1, len(pool["x"])), (share,), **gen)
        x = run.compute.images(torch.cat([x_src[originals], pool["x"][samples]])[run.mine])
        y, c = (t[torch.cat([originals, pool["source"][samples]])][run.mine] for t in (y_src, c_src))
        if M:
            with run.compute.autocast():
                losses["task"] = degia.task_loss(M(x)[0], y).mean()
            run.descend(losses["task"], "M")
        if F:
            u, n = torch.rand(o.batch, *F.shape, **gen), torch.randn(o.batch, NOISE_DIM, **gen)
            with run.compute.autocast():  # the shift is normalised over the whole batch, whoever computes it
                log_p = F.log_prob(degia.flow_view(x, F.shape), c, u[run.mine], F.prior.shift(n)[run.mine])
            losses["bits_per_dim"] = bits_per_dim(log_p, F.dim).mean()
            run.descend((-log_p / F.dim).mean(), "F", clip=10.)
        run.end_step(losses, save=step in rounds)
    if run.rank == 0 and run.step == o.steps:
        run.finish(evaluation.evaluate_degia(run.compute, M, F, domains, run.folder))

def new_samples(o, run, step, M, F, x_src, y_src, c_src):
    """The max phase: K steps of ascent on (7) from each image, class by class, as d compares single classes.
    The classes are shared out among the processes; the sum of what each one filled in joins the results."""
    gen, new = run.random(step, 1), torch.zeros_like(x_src)
    u = torch.rand(len(x_src), *(F.shape if F else (1,)), **gen)
    n = torch.randn(len(x_src), NOISE_DIM, **gen)
    eta = o.eta * torch.rand(len(x_src), 1, 1, 1, **gen)
    for one in c_src.unique()[run.rank::run.world]:
        rows = torch.nonzero(c_src == one)[:, 0]
        for part in rows.tensor_split(-(-len(rows) // 256)):  # P_x of eq. (7) is that of a part
            x, y, c = run.compute.images(x_src[part]), y_src[part], c_src[part]
            with run.compute.autocast(), torch.no_grad():
                feature_src = M(x)[1].float()
                shift = F.prior.shift(n[part]) if F else None
            @run.compute.autocast()
            def objective(x):
                return degia.max_objective(x, y, c, M, F, feature_src, u[part], shift, o.alpha, o.density)
            new[part] = data.to_uint8(degia.ascend(x, objective, o.K, eta[part], o.blur))
    return run.total(new)

# ---------------------------------------------------------------- registration: the dual-flow loop
def train_reg(o, run):
    """Read the pairs (large ones stay memory maps), train the networks of R's teacher, measure R."""
    pairs, reading = data.load_pairs(o, run.folder)
    A, B = (I.to(run.device) if I.numel() < 2 ** 28 else I for I in (pairs["train"].A, pairs["train"].B))
    nets = geomreg.build(o, A.shape[1], B.shape[1])
    extra = {side: torch.tensor(how, dtype=torch.float64) for side, how in reading.items()}
    run.start(nets, dict.fromkeys(nets, o.lr), extra, betas=(.5, .999))
    def watch():  # for the log; the landmarks of training pairs never train
        return {"error": evaluation.landmark_errors(nets["R"], pairs["train"], run.compute, 25)[1]["scene"]}

    for step in range(run.step, run.end):
        gen = run.random(step)
        picked = torch.randint(len(A), (o.batch,), **gen)
        I_a, I_b = (run.compute.images(I[picked.to(I.device)]) * 2 - 1 for I in (A, B))
        I_a, I_b = (I[run.mine] for I in data.augment(I_a, I_b, o.augment, o.augment / 5, gen["generator"]))
        losses = (cycle_step if "S" in nets else dual_flow_step)(o, run, gen, I_a, I_b, **nets)
        if run.rank == 0 and step % max(1, o.steps // 5) == 0:
            evaluation.picture_pairs(nets["R"](I_a, I_b).detach(), I_a, I_b, run.folder / "training.png")
        run.end_step(losses, dict if pairs["train"].points is None else watch)
    if run.rank == 0 and run.step == o.steps:
        run.finish(evaluation.evaluate_reg(run.compute, nets["R"], pairs, run.folder))

def dual_flow_step(o, run, gen, I_a, I_b, R, T, D):
    """One field, two orders, translate-register and register-translate: both must look like I_b, eq. (6)."""
    translation, losses, progress = o.similarity == "translation", {}, run.step / o.steps
    with run.compute.autocast():
        phi = R(I_a, I_b)
        moved, fakes = warp.resample(I_a, phi), ()
        if translation:
            T_a = T(I_a)
            O_TR = T(moved)                 # register first
            O_RT = warp.resample(T_a, phi)  # translate first
            fakes = {"both": (O_RT, O_TR), "translate-first": (O_RT,), "register-first": (O_TR,)}[o.order]

    # ---- (1) max over D of eq. (5): tell I_b from the fakes, given I_a
    if translation and o.adversarial:
        with run.compute.autocast():
            real, *fake = (D(I_a, I.detach()) for I in (I_b, *fakes))
        losses["D"] = geomreg.adversarial(real, True) + geomreg.adversarial(torch.cat(fake), False)
        run.descend(losses["D"], "D")
        with run.compute.autocast():  # the fakes' own wish belongs to (2)
            losses["gan"] = sum(geomreg.adversarial(D(I_a, O), True) for O in fakes)

    # ---- (2) min over R and T of eq. (6): fool D, match I_b in both orders, keep phi smooth
    stiff = o.smooth * min(1., .1 + 3 * progress)  # a field that is stiff at once never begins to move
    losses["smooth"] = warp.smoothness(phi, moved, o.alpha)
    measure, seen = (o.match, fakes) if translation else (o.similarity, (moved,))  # one pulls as hard as two:
    scales = 1 if measure == "l1" else 4 if progress < .2 else 2  # far matches first, then precise ones
    losses["recon"] = 2 / len(seen) * sum(geomreg.distance(measure, I, I_b, o.window, scales) for I in seen)
    if translation and o.practice:  # not in the paper: find a known field between A and T's picture of it
        known = warp.random_field(o.batch, I_a.shape[-2:], *data.MISALIGNED, gen["generator"])[run.mine]
        light = torch.randn(2, o.batch, 1, 1, 1, **gen)[:, run.mine]
        picture = warp.resample(T_a.detach(), known, "border") * (1 + .3 * light[0]) + .2 * light[1]
        with run.compute.autocast():
            losses["practice"] = warp.length(R(I_a, picture) - known).mean() / o.width
    weights = {"gan": o.adversarial, "recon": o.recon, "smooth": stiff, "practice": o.practice}
    terms = {name: weight * losses[name] for name, weight in weights.items() if name in losses}
    nets = "RT" if translation else "R"
    alone = [(terms.pop(k), N) for k, N in (("gan", o.gan), ("recon", o.l1)) if k in terms and N in nets]
    run.descend(sum(terms.values()), *nets, clip=10., alone=alone)  # alone: table 2, a loss to one of the two
    return losses

def cycle_step(o, run, gen, I_a, I_b, R, S, D_b, D_a):
    """CycleGAN: T = R[0] makes B's look of A, S makes A's of B; each fools a D, and each undoes the other."""
    with run.compute.autocast():
        O_b, O_a = R[0](I_a), S(I_b)
        judged = (D_b, I_b, O_b), (D_a, I_a, O_a)
        losses = {"D": sum(geomreg.adversarial(D(I), True) + geomreg.adversarial(D(O.detach()), False)
                           for D, I, O in judged)}
    run.descend(losses["D"], "D_b", "D_a")  # (1) max over both D
    with run.compute.autocast():
        losses["gan"] = sum(geomreg.adversarial(D(O), True) for D, _, O in judged)
        losses["cycle"] = (S(O_b) - I_a).abs().mean() + (R[0](O_a) - I_b).abs().mean()
    run.descend(o.adversarial * losses["gan"] + o.recon * losses["cycle"], "R", "S", clip=10.)  # (2) min
    return losses

# ---------------------------------------------------------------- options
def option(default, text, low=None, high=float("inf"), paper=None, hands=None, paper_hands=None):
    """An option: default, help, allowed range or tuple; defaults of --paper, of --task hands, of both."""
    choices, low = (low, None) if isinstance(low, tuple) else (None, low)
    stated = {"paper": paper, "hands": hands, "paper_hands": paper_hands}
    shown = "".join(f"; {mode} {value}" for mode, value in stated.items() if value is not None)
    return dataclasses.field(default_factory=lambda: default, metadata=stated | {
        "help": f"{text} (default {default}{shown})", "choices": choices, "low": low, "high": high})
@dataclasses.dataclass
class Common:
    out: str = option("", "run folder; if not given, runs/degia or runs/reg")
    seed: int = option(0, "seed of the data, the networks and every step", 0, 400_000)
    dtype: str = option("auto", "auto: bf16 where it is fast", ("auto", "bf16", "f32"))
    stop_after: int = option(0, "stop early on purpose after this many steps; 0: do not", 0)
@dataclasses.dataclass
class Degia(Common):
    task: str = option("digits", "recognise digits, or find the landmarks of hands", ("digits", "hands"))
    backbone: str = option("lenet", "layers of M", ("lenet", "alexnet", "vgg", "resnet", "densenet"))
    M_width: int = option(64, "channels of M", 1, hands=32)
    classes: int = option(8, "hands: clusters of poses, the classes of F", 1)
    method: str = option("degia", "the paper's; a CNN alone; ascent without F; F alone", tuple(degia.TRAINED))
    look: str = option("source", "digits: the look to train on", tuple(data.LOOKS))
    data: str = option("embedded", "'embedded', a folder with MNIST, or hands: images/ and landmarks.csv")
    unseen: list = option([], "folders measured at the end: MNIST-M or photographs; landmarks")
    validate: bool = option(False, "to choose settings: measure held-out images in development looks")
    train: int = option(10_000, "number of training images", 10, hands=3000)
    size: int = option(32, "side of the images", 16, hands=64, paper_hands=256)
    steps: int = option(900, "steps of the min phase", 1, hands=1600)
    batch: int = option(128, "images per step, over all processes", 2, paper=128, hands=64)
    lr: float = option(5e-4, "learning rate of M; linear to 0 over the second half", 0, paper=1e-4)
    flow_lr: float = option(3e-3, "the same for F", 0, paper=1e-4)
    rounds: int = option(5, "max phases, spread over training", 0)
    beta: float = option(.2, "share of the training images that start a max phase", 1e-4, 1, hands=.1667)
    share: float = option(.5, "share of new samples in each batch, once there are any", 0, 1, hands=1 / 16)
    K: int = option(5, "ascent steps of a max phase", 1)
    eta: float = option(.4, "largest root mean square change of an ascent step, of each image", 0, hands=.2)
    blur: int = option(5, "side of the mean that smooths the gradient", (1, 3, 5, 7, 9), hands=9)
    alpha: float = option(1., "weight of the two distances in (7)", 0, paper=1.)
    density: float = option(1., "weight of -log p in (7)", 0)
    lam: float = option(.1, "scale lambda of the noise shift in (8)", 0, paper=.1)
    flow_size: int = option(8, "side of the image that F sees", 4, hands=4)
    flow_channels: int = option(3, "3: F sees colours; 1: their mean", (1, 3))
    flow_steps: int = option(4, "couplings per scale of F", 1)
@dataclasses.dataclass
class Reg(Common):
    data: str = option("embedded", "'embedded' or a folder with pairs: train/A, train/B, test/A, test/B")
    modality: str = option("ir", "B of the embedded plants", ("ir", "depth"))
    train: int = option(3000, "number of embedded training pairs", 1)
    width: int = option(64, "width of the images", 8, paper=256)
    height: int = option(64, "height of the images", 8, paper=256)
    augment: float = option(0., "share of a pair that a crop may cut off; a fifth of it bends A", 0, .9)
    registration: str = option("pyramid", "R: coarse to fine, or paper's", ("pyramid", "unet"), paper="unet")
    similarity: str = option("translation", "what teaches R", ("translation", *geomreg.MEASURES, "cyclegan"))
    order: str = option("both", "which order is trained", ("both", "register-first", "translate-first"))
    steps: int = option(2000, "training steps", 1)
    batch: int = option(16, "pairs per step, over all processes", 1, paper=12)
    lr: float = option(3e-3, "learning rate; linear to 0 over the second half", 0, paper=1e-4)
    gan: str = option("both", "whom the adversarial loss of R + T trains (table 2)", ("both", "R", "T"))
    l1: str = option("both", "whom L_recon of R + T trains (table 2)", ("both", "R", "T"))
    adversarial: float = option(.2, "weight of the adversarial loss; 0: R + T without D", 0, paper=1.)
    recon: float = option(20., "weight of L_recon, of the classical measure, of the cycle", 0, paper=100.)
    smooth: float = option(400., "weight lambda_S of the smoothness", 0, paper=200.)
    alpha: float = option(1., "how much the field may bend at edges, eq. (3)", 0, paper=1.)
    match: str = option("correlation", "what L_recon compares by", tuple(geomreg.MEASURES), paper="l1")
    window: int = option(5, "side of the windows of correlation and SSIM", (5, 7, 9))
    practice: float = option(50., "weight of R's practice on T's pictures moved by known fields", 0, paper=0.)
    R_width: int = option(24, "channels of R", 2, paper=32)
    T_width: int = option(16, "channels of T", 1, paper=64)
    T_blocks: int = option(0, "residual blocks of T, at 1/4 of the size; 0: two convolutions", 0, paper=9)
    D_width: int = option(16, "channels of D", 1, paper=64)
def parse(argv):
    """The options, whether to resume, the options given explicitly. ValueError for one out of range."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    tasks = parser.add_subparsers(dest="command", required=True)
    for name, (kind, _) in TASKS.items():
        sub = tasks.add_parser(name, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        sub.add_argument("--resume", action="store_true", help="go on with the run in --out")
        sub.add_argument("--paper", action="store_true", help="the paper's values, where it states them")
        for f in dataclasses.fields(kind):
            how = {bool: {"action": "store_true"}, list: {"nargs": "+"}}
            how = how.get(f.type, {"type": f.type, "choices": f.metadata["choices"]})
            sub.add_argument(f"--{f.name}".replace("_", "-"), help=f.metadata["help"], **how)
    given = vars(parser.parse_args(argv))
    task, resume, paper = (given.pop(name, False) for name in ("command", "resume", "paper"))
    about = {f.name: f.metadata for f in dataclasses.fields(TASKS[task][0])}
    hands = given.get("task") == "hands"
    wanted = ["hands"] * hands + ["paper"] * paper + ["paper_hands"] * (hands and paper)  # the last one wins
    stated = {name: m[kind] for kind in wanted for name, m in about.items() if m[kind] is not None}
    o = TASKS[task][0](**{"out": f"runs/{task}", **stated, **given})
    for (name, m), value in zip(about.items(), vars(o).values()):
        if m["low"] is not None and not m["low"] <= value <= m["high"]:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be from {m['low']} to {m['high']}")
    return o, resume, given

# ---------------------------------------------------------------- one run: processes, log, checkpoint
class Run:
    """What a run computes on and what it leaves behind: processes, device, log, checkpoint."""
    def __init__(self, o, begun):
        self.o, self.begun, self.folder, self.task = o, begun, Path(o.out), type(o).__name__.lower()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if o.batch % self.world:
            raise ValueError(f"--batch {o.batch}: not a multiple of the {self.world} processes; change it")
        self.mine = slice(self.rank, None, self.world)  # this process's rows of a batch
        self.compute = evaluation.Compute(o.dtype)
        self.device = self.compute.device
        torch.manual_seed(o.seed)  # for the networks' first values
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.step, self.rows, self.history, self.saved = begun["step"], begun["log"], [], time.time()
        self.began, self.end = self.saved - begun["seconds"], min(o.stop_after or o.steps, o.steps)
    def random(self, step, stream=0):
        """For torch.rand and the like in a step; streams: 0 its batch, 1 its max phase, 2 the start."""
        generator = torch.Generator(self.device).manual_seed((self.o.seed * 10 ** 8 + step) * 4 + stream)
        return {"generator": generator, "device": self.device}
    def total(self, t):
        """t, summed in place over the processes."""
        if self.world > 1:
            dist.all_reduce(t)
        return t
    def start(self, nets, rates, extra, betas=(.9, .999)):
        """Place networks, each with an Adam; load what was begun into them and `extra`; make the folder."""
        self.parts, self.extra = dict(nets), extra
        for name, net in nets.items():
            parameters = net.to(self.device, memory_format=torch.channels_last).parameters()
            self.parts[f"opt_{name}"] = torch.optim.Adam(parameters, rates[name], betas, fused=True)
            for t in net.state_dict().values() if self.world > 1 else ():
                dist.broadcast(t, 0)
        for name, state in self.begun["state"].items():
            self.parts[name].load_state_dict(state)
        extra.update({name: t.to(self.device) for name, t in self.begun["extra"].items()})
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(vars(self.o), indent=1) + "\n")
            self.save()
    def descend(self, loss, *nets, clip=None, alone=()):
        """A step of the named networks down loss, of one down more for each (loss, name) in alone. No other
        network receives a gradient; gradients are averaged over the processes."""
        opts = {net: self.parts[f"opt_{net}"] for net in nets}
        moved = {net: opt.param_groups[0]["params"] for net, opt in opts.items()}
        for opt in opts.values():
            opt.zero_grad()
        for term, net in alone:
            (term / self.world).backward(inputs=moved[net], retain_graph=True)
        (loss / self.world).backward(inputs=sum(moved.values(), []))
        for net, opt in opts.items():
            for gradient in (p.grad for p in moved[net] if p.grad is not None):
                self.total(gradient)
            if clip:
                torch.nn.utils.clip_grad_norm_(moved[net], clip)
            opt.param_groups[0]["lr"] = opt.defaults["lr"] * min(1., 2 - 2 * self.step / self.o.steps)
            opt.step()
    def end_step(self, losses, watch=dict, save=False):
        """Log means and what watch() sees, check and save, when it is time."""
        self.step += 1
        self.history.append(torch.stack([value.detach() for value in losses.values()]))
        stop, save = self.step == self.o.stop_after, save or self.step == self.end
        if not save and self.step % max(1, min(50, self.o.steps // 100)):
            return
        values, self.history = self.total(torch.stack(self.history).float()).cpu() / self.world, []
        for i, j in torch.nonzero(~values.isfinite()).tolist():
            raise ValueError(f"step {self.step + i + 1 - len(values)}: {list(losses)[j]} is {values[i, j]}; "
                             "lower its learning rate and start again")
        if self.rank == 0:
            seconds, means = time.time() - self.began, dict(zip(losses, values.mean(0).tolist())) | watch()
            self.rows.append({"step": self.step, **means, "seconds": seconds})
            evaluation.write_csv(self.rows, self.folder / "log.csv")
            shown = "  ".join(f"{name} {mean:8.4f}" for name, mean in means.items())
            ended, left = f"step {self.step:6d}/{self.o.steps}", seconds * (self.o.steps / self.step - 1)
            print(f"{ended}  {shown}  {seconds:6.0f} s  {left:6.0f} s left{', stopped' * stop}", flush=True)
            if save or time.time() - self.saved > 60:
                self.save()
    def save(self):
        """Write the checkpoint under a temporary name, then move it: at any moment there is a whole one."""
        self.saved = time.time()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        for name, part in state.items():
            if not all(t.isfinite().all() for t in filter(torch.is_tensor, part.values())):
                raise ValueError(f"step {self.step}: {name} is not finite; lower its rate and start again")
        torch.save({"format": evaluation.FORMAT, "task": self.task, "step": self.step, "log": self.rows,
                    "seconds": self.saved - self.began, "config": vars(self.o), "extra": self.extra,
                    "state": state}, self.folder / "checkpoint.part")
        os.replace(self.folder / "checkpoint.part", self.folder / "checkpoint.pt")
    def finish(self, measured):
        """Write results.json (the options but `task`, what was measured) and the curves, print the table."""
        results = {**vars(self.o), "task": self.task, "seconds": round(time.time() - self.began), **measured}
        (self.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        evaluation.plot({"": self.folder / "log.csv"}, list(self.rows[0])[1:-1], self.folder / "curves.png")
        evaluation.print_table(results)
        print(f"written: {self.folder}/results.json, log.csv, checkpoint.pt and pictures")

def main(argv):
    o, resume, given = parse(argv)
    task, folder = type(o).__name__.lower(), Path(o.out)
    begun = {"step": 0, "seconds": 0., "log": [], "state": {}, "extra": {}}
    if resume:
        begun = evaluation.load_checkpoint(folder, task)
        config = {**begun["config"], "out": o.out, "stop_after": o.stop_after}
        other = ", ".join(f"--{name}" for name, value in given.items() if config[name] != value)
        if other:
            raise ValueError(f"{folder}: was started with another {other.replace('_', '-')}; leave it out")
        o = type(o)(**config)
    elif (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder}: holds a run already; continue it with --resume or choose another --out")
    TASKS[task][1](o, Run(o, begun))
    if dist.is_initialized():
        dist.barrier()  # gloo now and then aborts a process that leaves while another one works
        dist.destroy_process_group()
TASKS = {"degia": (Degia, train_degia), "reg": (Reg, train_reg)}

if __name__ == "__main__":
    evaluation.exit_on_bad_input(main)
