"""Train DeGIA, or the geometry-preserving registration. The two loops come first: read them beside the papers.

    python train.py degia                  embedded digits
    python train.py degia --task hands     landmarks of embedded hands
    python train.py reg                    embedded plants, RGB to infrared
    python train.py reg --resume           go on with runs/reg
    torchrun --nproc_per_node=2 train.py reg --out runs/two

All that is random in step k comes from generators seeded by (seed, k): a resumed run needs no random state.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

import data
import degia
import eval as evaluation
import geomreg
import warp
from data import InputError
from eval import autocast, device
from flows import NOISE_DIM, bits_per_dim

rank = int(os.environ.get("RANK", 0))  # torchrun says which of how many processes this is
world = int(os.environ.get("WORLD_SIZE", 1))
BATCH, PICKED, ASCENT, FIRST = range(4)  # what is random in a step; each has a stream of its own

def generator(o, step, stream, rank=0):
    """SeedSequence mixes the four numbers well; torch's CPU generator keeps no more than 32 bits of a seed."""
    seed = np.random.SeedSequence((o.seed, step, stream, rank)).generate_state(1)
    return torch.Generator(device).manual_seed(int(seed[0]))

def linear_decay(optimizer, steps):
    """The learning rate: constant, then linear to 0 over the second half."""
    return LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))

def average_gradients(optimizer):
    """Average the gradients over all processes, each of which drew a batch of its own."""
    if world > 1:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= world

# ---------------------------------------------------------------- DeGIA: the min/max loop
def train_degia(o, checkpoint):
    """Minimize (5) over M and F on a growing training set; maximize (7) over images, which makes it grow."""
    x_src, y_src, domains = data.load_digits(o) if o.task == "digits" else data.load_hands(o)
    M, F = degia.build(o, y_src)
    x_src, y_src = x_src.to(device), y_src.to(device)
    c_src = degia.classes_of(y_src, F)
    groups = [{"params": list(M.to(device, memory_format=torch.channels_last).parameters()), "lr": o.lr}]
    if F is not None:
        groups.append({"params": list(F.to(device).parameters()), "lr": o.flow_lr})
        first = degia.flow_view(data.to_float(x_src[:512]), F.shape)
        F.initialise(first, torch.rand(first.shape, generator=generator(o, 0, FIRST), device=device))
    optimizer = torch.optim.Adam(groups, fused=True)
    scheduler = linear_decay(optimizer, o.steps)
    pool = {"x": x_src[:0], "source": c_src[:0]}  # new samples; the number of the training image of each
    run = Run(o, checkpoint, pool, M=M, F=F, optimizer=optimizer, scheduler=scheduler)
    max_steps = [o.steps * i // (o.rounds + 2) for i in range(1, o.rounds + 1)]  # the last part only learns

    for step in range(run.step, o.steps):
        # ---- maximization, eq. (7): ORIGINAL images climb to new samples of plausible new domains
        if step in max_steps and o.method != "pure":
            n = max(1, round(o.beta * len(x_src)))
            picked = torch.randperm(len(x_src), generator=generator(o, step, PICKED), device=device)[:n]
            new = new_samples(o, step, M, F, x_src[picked], y_src[picked], c_src[picked])
            pool["x"] = torch.cat([pool["x"], new])
            pool["source"] = torch.cat([pool["source"], picked])
            run.save()
            if rank == 0:
                evaluation.picture_new_samples(x_src, pool, n, run.folder / "new_samples.png")

        # ---- a batch of originals and, once there are any, new samples: these keep the labels of their source
        random = {"generator": generator(o, step, BATCH, rank), "device": device}
        batch = o.batch // world
        n_new = round(o.share * batch) if len(pool["x"]) else 0
        i = torch.randint(len(x_src), (batch - n_new,), **random)
        j = torch.randint(max(1, len(pool["x"])), (n_new,), **random)
        x = data.to_float(torch.cat([x_src[i], pool["x"][j]]))
        source = torch.cat([i, pool["source"][j]])
        y, c = y_src[source], c_src[source]

        # ---- minimization, eq. (5): M and F share no parameter, so that one step moves both
        losses = {}
        with autocast():
            losses["task"] = degia.task_loss(M(x)[0], y).mean()
        loss = losses["task"]
        if F is not None:
            u = torch.rand(batch, *F.shape, **random)
            n = torch.randn(batch, NOISE_DIM, **random)
            with autocast():
                log_p = F.log_prob(degia.flow_view(x, F.shape), c, u, F.prior.shift(n)).mean()
            loss = loss - log_p / F.dim
            losses["bits_per_dim"] = bits_per_dim(log_p, F.dim)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)
        if F is not None:
            clip_grad_norm_(F.parameters(), 10.0)  # log-densities of images never seen have huge gradients
        optimizer.step()
        scheduler.step()
        run.log(losses)

    run.finish(lambda: evaluation.evaluate_degia(M, F, domains, run.folder))

def new_samples(o, step, M, F, x_src, y_src, c_src):
    """The max phase: K steps of ascent on (7) from each image, class by class, as d compares single classes.
    Each process makes all of them: the same, as its networks are the same."""
    random = {"generator": generator(o, step, ASCENT), "device": device}
    eta = o.eta * torch.rand(len(x_src), 1, 1, 1, **random)  # some stay near, some go far
    u = torch.rand(len(x_src), *(F.shape if F is not None else ()), **random)
    n = torch.randn(len(x_src), NOISE_DIM, **random)
    new = torch.zeros_like(x_src)
    for one in c_src.unique():
        for rows in torch.nonzero(c_src == one)[:, 0].split(256):  # P_x is that of these images
            x, y, c = data.to_float(x_src[rows]), y_src[rows], c_src[rows]
            with autocast(), torch.no_grad():
                feature_src = M(x)[1].float()
                shift = F.prior.shift(n[rows]) if F is not None else None

            def objective(x, y=y, c=c, feature_src=feature_src, u=u[rows], shift=shift):
                with autocast():
                    return degia.max_objective(x, y, c, M, F, feature_src, u, shift, o.alpha, o.density)

            new[rows] = data.to_uint8(degia.ascend(x, objective, o.K, eta[rows], o.blur))
    return new

# ---------------------------------------------------------------- registration: the dual-flow loop
def start_reg(o):
    """The pairs, {"A": mode, "B": mode}, and the networks of what teaches R."""
    pairs, modes = data.load_pairs(o)
    nets = geomreg.build(o, pairs["train"].A.shape[1], pairs["train"].B.shape[1])
    for net in nets.values():
        net.to(device, memory_format=torch.channels_last)
    return pairs, modes, nets

def draw_pairs(o, A, B, gen):
    """A batch of pairs in [-1, 1], with this process's share of --batch."""
    i = torch.randint(len(A), (o.batch // world,), generator=gen, device=device)
    return data.augment(2 * data.to_float(A[i]) - 1, 2 * data.to_float(B[i]) - 1, o.augment, gen)

def train_reg(o, checkpoint):
    """Train R and T against D by eq. (6), on unaligned pairs."""
    pairs, modes, nets = start_reg(o)
    A, B = pairs["train"].A.to(device), pairs["train"].B.to(device)
    R, T, D = nets["R"], nets["T"], nets["D"]
    trained = {"R": list(R.parameters()), "T": list(T.parameters()), "both": [*R.parameters(), *T.parameters()]}
    opt_RT = torch.optim.Adam(trained["both"], o.lr, betas=(0.5, 0.999), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), o.lr, betas=(0.5, 0.999), fused=True)
    lr_RT, lr_D = linear_decay(opt_RT, o.steps), linear_decay(opt_D, o.steps)
    run = Run(o, checkpoint, modes, **nets, opt_RT=opt_RT, opt_D=opt_D, lr_RT=lr_RT, lr_D=lr_D)

    for step in range(run.step, o.steps):
        gen = generator(o, step, BATCH, rank)
        I_a, I_b = draw_pairs(o, A, B, gen)
        losses = {}

        # ---- one field, two orders
        with autocast():
            phi = R(I_a, I_b)
            T_a = T(I_a)
            O_RT = warp.resample(T_a, phi)  # translate first
            moved = warp.resample(I_a, phi)
            O_TR = T(moved)                 # register first
        fakes = {"both": [O_RT, O_TR], "translate-first": [O_RT], "register-first": [O_TR]}[o.order]

        # ---- (1) max over D of eq. (5): tell I_b from the fakes, given I_a
        if o.adversarial > 0:
            with autocast():
                losses["D"] = geomreg.adversarial(D(I_a, I_b), real=True)
                for O in fakes:
                    losses["D"] = losses["D"] + geomreg.adversarial(D(I_a, O.detach()), real=False)
            opt_D.zero_grad()
            losses["D"].backward()
            average_gradients(opt_D)
            opt_D.step()
            with autocast():
                losses["gan"] = sum(geomreg.adversarial(D(I_a, O), real=True) for O in fakes)

        # ---- (2) min over R and T of eq. (6): fool D, match I_b in both orders, keep phi smooth
        scales = 4 if step < 0.2 * o.steps else 2  # far matches first, then precise ones
        losses["recon"] = sum(geomreg.distance(o.match, O, I_b, o.window, scales) for O in fakes)
        losses["smooth"] = warp.smoothness(phi, moved, o.alpha)
        if o.practice > 0:
            losses["practice"] = practice(R, I_a, T_a, gen)
        stiffness = o.smooth * min(1.0, 0.1 + 3 * step / o.steps)  # a field that is stiff at once never moves
        pull = o.recon * 2 / len(fakes)  # one order alone pulls as hard as two
        weights = {"gan": o.adversarial, "recon": pull, "smooth": stiffness, "practice": o.practice}
        terms = {name: weight * losses[name] for name, weight in weights.items() if name in losses}
        opt_RT.zero_grad()
        if o.gan != "both" and "gan" in terms:  # table 2: the adversarial loss trains one of the two alone
            terms.pop("gan").backward(inputs=trained[o.gan], retain_graph=True)
        if o.l1 != "both":  # or L_recon does
            terms.pop("recon").backward(inputs=trained[o.l1], retain_graph=True)
        sum(terms.values()).backward(inputs=trained["both"])  # not D's parameters
        average_gradients(opt_RT)
        for net in (R, T):
            clip_grad_norm_(net.parameters(), 10.0)  # a field that jumps has huge gradients
        opt_RT.step()
        lr_RT.step()
        lr_D.step()
        run.log(losses, lambda: evaluation.watch(R, pairs["train"]))
        if rank == 0 and step % max(1, o.steps // 10) == 0:
            evaluation.picture_pairs(phi.detach(), I_a, I_b, run.folder / "training.png")

    run.finish(lambda: evaluation.evaluate_reg(R, pairs, run.folder))

def practice(R, I_a, T_a, gen):
    """Not in the paper: R finds a known field between A and T's picture of A, in shares of the width. The picture
    changes in light and contrast, as T is not yet right, and is a constant: T must not make it easier."""
    n, _, height, width = I_a.shape
    known = warp.random_field(n, (height, width), data.BEND, data.SHIFT, gen)
    contrast, light = torch.randn(2, n, 1, 1, 1, generator=gen, device=device)
    picture = warp.resample(T_a.detach(), known, "border") * (1 + 0.3 * contrast) + 0.2 * light
    with autocast():
        return warp.norm(R(I_a, picture) - known).mean() / width

def train_R_alone(o, checkpoint):
    """The baselines of table 1: R learns from a classical measure of how well the warped A matches B."""
    pairs, modes, nets = start_reg(o)
    A, B = pairs["train"].A.to(device), pairs["train"].B.to(device)
    R = nets["R"]
    optimizer = torch.optim.Adam(R.parameters(), o.lr, betas=(0.5, 0.999), fused=True)
    scheduler = linear_decay(optimizer, o.steps)
    run = Run(o, checkpoint, modes, R=R, optimizer=optimizer, scheduler=scheduler)

    for step in range(run.step, o.steps):
        I_a, I_b = draw_pairs(o, A, B, generator(o, step, BATCH, rank))
        with autocast():
            phi = R(I_a, I_b)
        moved = warp.resample(I_a, phi)
        scales = 4 if step < 0.2 * o.steps else 2
        recon = geomreg.distance(o.similarity, moved, I_b, o.window, scales)
        smooth = warp.smoothness(phi, moved, o.alpha)
        stiffness = o.smooth * min(1.0, 0.1 + 3 * step / o.steps)
        optimizer.zero_grad()
        (2 * o.recon * recon + stiffness * smooth).backward()  # twice: as the two orders of R + T
        average_gradients(optimizer)
        clip_grad_norm_(R.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
        run.log({"recon": recon, "smooth": smooth}, lambda: evaluation.watch(R, pairs["train"]))

    run.finish(lambda: evaluation.evaluate_reg(R, pairs, run.folder))

# ---------------------------------------------------------------- the folder of a run
class Run:
    """config.json, log.csv, checkpoint.pt, results.json. `parts`: all that has a state_dict; `extra`: a dict."""

    def __init__(self, o, checkpoint, extra, **parts):
        self.o, self.extra = o, extra
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.folder = Path(o.out)
        self.step, self.rows, self.recent = 0, [], []
        self.began = self.saved = time.time()
        if checkpoint is not None:
            self.step, self.rows = checkpoint["step"], checkpoint["log"]
            self.began -= checkpoint["seconds"]
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint["state"][name])
            for name, value in checkpoint["extra"].items():
                extra[name] = value.to(device) if torch.is_tensor(value) else value
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(vars(o), self.folder / "config.json")
        self.save()

    def save(self):
        """Write under a temporary name, then rename: at any moment there is a whole checkpoint."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if rank == 0:
            content = {"format": evaluation.FORMAT, "config": vars(self.o), "step": self.step, "log": self.rows,
                       "seconds": time.time() - self.began, "state": state, "extra": self.extra}
            torch.save(content, self.folder / "checkpoint.part")
            os.replace(self.folder / "checkpoint.part", self.folder / "checkpoint.pt")
        self.saved = time.time()

    def log(self, losses, watch=dict):
        """End a step. Now and then check, print, and write to log.csv the mean losses since the last time, and
        what watch() sees; once a minute save. Only then does anything wait for a GPU."""
        self.step += 1
        self.recent.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        last = self.step == self.o.steps
        if self.step % max(1, min(50, self.o.steps // 100)) and not last:
            return
        values = torch.stack(self.recent).cpu()
        self.recent = []
        for i, j in torch.nonzero(~values.isfinite()).tolist():
            raise InputError(f"step {self.step - len(values) + i + 1}: {list(losses)[j]} is {values[i, j]}; start "
                             "again with a lower --lr")
        if rank > 0:
            return
        seconds = time.time() - self.began
        means = dict(zip(losses, values.mean(0).tolist())) | watch()
        self.rows.append({"step": self.step, **means, "seconds": seconds})
        evaluation.write_csv(self.rows, self.folder / "log.csv")
        shown = "  ".join(f"{name} {mean:8.4f}" for name, mean in means.items())
        left = seconds * (self.o.steps / self.step - 1)
        print(f"step {self.step:6d}/{self.o.steps}  {shown}  {seconds:6.0f} s  {left:6.0f} s left", flush=True)
        if last or time.time() - self.saved > 60:
            self.save()

    def finish(self, measure):
        """Measure, write results.json and the curves, print a table."""
        if rank == 0:
            results = {**vars(self.o), "seconds": round(time.time() - self.began), **measure()}
            write_json(results, self.folder / "results.json")
            evaluation.plot({"": self.folder / "log.csv"}, self.folder / "curves.png")
            evaluation.print_table(results)
            print(f"written: {self.folder}/results.json, log.csv, checkpoint.pt and pictures")

def write_json(content, path):
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

# ---------------------------------------------------------------- options
# What --task hands changes, and what the papers state (--paper, which wins over it). Explicit options win over both.
HANDS = dict(out="runs/hands", M_width=32, size=64, steps=1600, batch=64, beta=0.1667, share=1 / 16, eta=0.2,
             blur=9, flow_size=4)
PAPER_DEGIA = dict(batch=128, lr=1e-4, flow_lr=1e-4, alpha=1.0, lam=0.1)
PAPER_REG = dict(registration="unet", width=256, height=256, batch=12, lr=1e-4, adversarial=1.0, recon=100.0,
                 smooth=200.0, alpha=1.0, match="l1", practice=0.0, R_width=32, T_width=64, T_blocks=9, D_width=64)

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")

def number(kind, low, high=math.inf):
    """A type for add_argument: a number from low to high."""
    def convert(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    convert.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return convert

def make_parser():
    count, weight, share = number(int, 1), number(float, 0), number(float, 0, 1)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = parser.add_subparsers(dest="program", required=True)
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}

    p = programs.add_parser("degia", **how)
    p.add_argument("--task", choices=("digits", "hands"), default="digits", help="what M learns")
    p.add_argument("--method", choices=("degia", "pure", "ada"), default="degia", help="pure: M alone; ada: no F")
    p.add_argument("--backbone", choices=tuple(degia.BACKBONES), default="lenet", help="layers of M")
    p.add_argument("--M-width", type=count, default=64, help="channels of M")
    p.add_argument("--data", default="embedded", help="or a folder: MNIST; hands: images/ and landmarks.csv")
    p.add_argument("--unseen", nargs="+", default=[], help="folders measured at the end: MNIST-M, hands")
    p.add_argument("--train", type=count, help="training images; embedded 10,000 (hands 3,000), MNIST the first "
                   "10,000, a folder of hands all")
    p.add_argument("--size", type=number(int, 16), default=32, help="side of the images")
    p.add_argument("--steps", type=count, default=900, help="steps of the min phase")
    p.add_argument("--batch", type=count, default=128, help="images per step, over all processes")
    p.add_argument("--lr", type=weight, default=5e-4, help="learning rate of M; linear to 0 over the second half")
    p.add_argument("--flow-lr", type=weight, default=3e-3, help="the same for F")
    p.add_argument("--rounds", type=number(int, 0), default=5, help="max phases, spread over training")
    p.add_argument("--beta", type=number(float, 1e-4, 1), default=0.2, help="share of images in a max phase")
    p.add_argument("--share", type=share, default=0.5, help="share of new samples in a batch")
    p.add_argument("--K", type=count, default=5, help="ascent steps of a max phase")
    p.add_argument("--eta", type=weight, default=0.4, help="largest root mean square change of an ascent step")
    p.add_argument("--blur", type=int, choices=(1, 3, 5, 7, 9), default=5, help="mean that smooths the gradient")
    p.add_argument("--alpha", type=weight, default=1.0, help="weight of the two distances in (7)")
    p.add_argument("--density", type=weight, default=1.0, help="weight of -log p in (7)")
    p.add_argument("--lam", type=weight, default=0.1, help="scale lambda of the noise shift in (8)")
    p.add_argument("--classes", type=count, default=8, help="hands: clusters of poses, the classes of F")
    p.add_argument("--flow-size", type=number(int, 4), default=8, help="side of the image that F sees")
    p.add_argument("--flow-channels", type=int, choices=(1, 3), default=3, help="1: F sees the mean of colours")
    p.add_argument("--flow-steps", type=count, default=4, help="couplings per level of F")

    p = programs.add_parser("reg", **how)
    p.set_defaults(task="reg")
    p.add_argument("--data", default="embedded", help="or a folder with train/A, train/B, test/A, test/B")
    p.add_argument("--modality", choices=("ir", "depth"), default="ir", help="B of the embedded plants")
    p.add_argument("--rig", action="store_true", help="plants seen by two cameras on one rig: always the same offset")
    p.add_argument("--train", type=count, default=3000, help="embedded training pairs")
    p.add_argument("--width", type=number(int, 8), default=64, help="of the images that the networks see")
    p.add_argument("--height", type=number(int, 8), default=64, help="of these images")
    p.add_argument("--augment", type=number(float, 0, 0.9), default=0.0, help="share of a pair that a crop cuts off")
    p.add_argument("--registration", choices=("pyramid", "unet"), default="pyramid", help="R; the paper's is unet")
    p.add_argument("--similarity", choices=("translation", *geomreg.MEASURES), default="translation",
                   help="what teaches R: T and D, or a classical measure alone")
    p.add_argument("--order", choices=("both", "register-first", "translate-first"), default="both",
                   help="which order is trained")
    p.add_argument("--steps", type=count, default=2000, help="training steps")
    p.add_argument("--batch", type=count, default=16, help="pairs per step, over all processes")
    p.add_argument("--lr", type=weight, default=3e-3, help="learning rate; linear to 0 over the second half")
    p.add_argument("--gan", choices=("both", "R", "T"), default="both", help="whom the adversarial loss trains")
    p.add_argument("--l1", choices=("both", "R", "T"), default="both", help="whom L_recon trains")
    p.add_argument("--adversarial", type=weight, default=0.2, help="weight of the adversarial loss; 0: no D")
    p.add_argument("--recon", type=weight, default=20.0, help="weight of L_recon, or of the classical measure")
    p.add_argument("--smooth", type=weight, default=400.0, help="weight lambda_S of the smoothness")
    p.add_argument("--alpha", type=weight, default=1.0, help="how much the field may bend at edges, eq. (3)")
    p.add_argument("--match", choices=geomreg.MEASURES, default="correlation", help="what L_recon compares by")
    p.add_argument("--window", type=int, choices=(3, 5, 7, 9), default=5, help="of correlation and SSIM")
    p.add_argument("--practice", type=weight, default=50.0, help="weight of R's practice on known fields")
    p.add_argument("--R-width", type=count, default=24, help="channels of R")
    p.add_argument("--T-width", type=count, default=16, help="channels of T")
    p.add_argument("--T-blocks", type=number(int, 0), default=0, help="residual blocks of T; 0: two convolutions")
    p.add_argument("--D-width", type=count, default=16, help="channels of D")

    for name, p in programs.choices.items():
        p.add_argument("--out", default=f"runs/{name}", help="run folder; runs/hands for hands")
        p.add_argument("--seed", type=number(int, 0), default=0, help="of the data, the networks and every step")
        p.add_argument("--resume", action="store_true", help="go on with the run in --out, with its options")
        p.add_argument("--paper", action="store_true", help="the paper's values, where it states them")
    return parser, programs.choices

def parse(argv):
    """The options o, and the names of those that were given."""
    parser, programs = make_parser()
    o = parser.parse_args(argv)
    program = programs[o.program]
    if o.task == "hands":
        program.set_defaults(**HANDS)
    if o.paper:
        program.set_defaults(**(PAPER_REG if o.program == "reg" else PAPER_DEGIA))
        if o.task == "hands":
            program.set_defaults(size=256)
    o = parser.parse_args(argv)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    if o.batch % world:
        raise InputError(f"--batch {o.batch}: not a multiple of the {world} processes; change it")
    if o.program == "degia":
        if o.flow_size > o.size or o.flow_size % 4:
            raise InputError(f"--flow-size {o.flow_size}: not a multiple of 4 up to --size; choose another")
        if o.method != "pure" and o.steps < o.rounds + 2:
            raise InputError(f"--rounds {o.rounds}: too many for {o.steps} --steps; ask for fewer")
    return o, given

def resumed(o, given):
    """The options and the checkpoint of the run in --out. What is given once more must be the same."""
    checkpoint = evaluation.load_checkpoint(o.out, o.program)
    config = {**checkpoint["config"], "out": o.out, "resume": True}
    for name in given:
        if config[name] != vars(o)[name]:
            option = name.replace("_", "-")
            raise InputError(f"{o.out}: was started with another --{option}, {config[name]}; leave it out")
    return argparse.Namespace(**config), checkpoint

def main(argv):
    o, given = parse(argv)
    checkpoint = None
    if o.resume:
        o, checkpoint = resumed(o, given)
    elif (Path(o.out) / "checkpoint.pt").exists():
        raise InputError(f"{o.out}: holds a run already; go on with --resume, or choose another --out")
    if world > 1:
        shared = device.type == "cuda" and torch.cuda.device_count() < world
        dist.init_process_group("nccl" if device.type == "cuda" and not shared else "gloo")
    torch.manual_seed(o.seed)  # for the first values of the networks: the same in each process
    if o.program == "degia":
        train_degia(o, checkpoint)
    elif o.similarity == "translation":
        train_reg(o, checkpoint)
    else:
        train_R_alone(o, checkpoint)
    if world > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads abort a process now and then if they outlive it

if __name__ == "__main__":
    evaluation.exit_on_bad_input(main)
