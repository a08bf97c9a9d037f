"""Train DeGIA, or the geometry-preserving registration. The two loops stand first, as in the papers.

    python train.py degia                  embedded digits; --task hands: landmarks of embedded hands
    python train.py reg                    embedded plants, RGB to infrared; --resume goes on with runs/reg"""
import argparse
import functools
import json
import os
import sqlite3
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

import data
import degia
import eval as evaluation
import geomreg
import warp
from eval import autocast, device
from flows import NOISE_DIM, bits_per_dim

rank = int(os.environ.get("RANK", 0))  # set by torchrun: the number of this process (0 without torchrun)
processes = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are; their gradients are averaged
if device.type == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
PICKED, ASCENT, FIRST = 1, 2, 3  # random streams, one for each purpose, the same in all processes;
BATCH = 4 * rank  # that of batches differs by process: 0, 4, 8, ..., none of those above

def generator(o, step, stream):  # by seed, step and stream: a resumed run needs no random state
    seed = np.random.SeedSequence((o.seed, step, stream)).generate_state(1).item()  # mixed well, to 32 bits
    return torch.Generator(device).manual_seed(seed)

def adam(parameters, o, betas=(0.5, 0.999), warm_up=0.05):  # its rate rises, stays, falls from half-way on
    optimizer = torch.optim.Adam(parameters, o.lr, betas, fused=True)
    rise = warm_up * o.steps + 1  # in steps; without, R of one seed in ten was thrown off at once, for good
    return optimizer, LambdaLR(optimizer, lambda step: min((step + 1) / rise, 1.0, 2 - 2 * step / o.steps))

def average_gradients(optimizer):  # over all processes, in one message; so equal networks stay equal
    if processes > 1:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        mean = torch.cat([grad.flatten() for grad in grads]) / processes
        torch.distributed.all_reduce(mean)
        for grad, part in zip(grads, mean.split([grad.numel() for grad in grads])):
            grad.copy_(part.view(grad.shape))

# ---------------------------------------------------------------- DeGIA: the min/max loop
def train_degia(o, checkpoint):
    """Minimize (5) over M and F on a growing training set; maximize (7) over images, which makes it grow."""
    x_src, y_src, domains = data.LOADERS[o.task](o)
    M, F = degia.build(o, y_src)
    x_src, y_src = x_src.to(device), y_src.to(device)
    c_src = degia.classes_of(y_src, M)
    groups = [{"params": M.to(device, memory_format=torch.channels_last).parameters()}]
    if F is not None:
        groups.append({"params": F.to(device).parameters(), "lr": o.flow_lr})
        first = data.to_float(x_src[:512])  # ActNorm sets itself from these
        u = torch.rand(len(first), *F.shape, generator=generator(o, 0, FIRST), device=device)
        F(first, u, initialise=True)
    optimizer, scheduler = adam(groups, o, (0.9, 0.999), warm_up=0)
    pool = {"x": x_src[:0], "source": torch.arange(0, device=device)}  # new samples grown from x_src[source]
    run = Run(o, checkpoint, pool, M=M, F=F, optimizer=optimizer, scheduler=scheduler)
    max_steps = [o.steps * i // (o.rounds + 2) for i in range(1, o.rounds + 1)]  # 1 part before, 2 after

    for step in range(run.step, o.steps):
        # ---- maximization, eq. (7): from ORIGINALS, raise the loss l; alpha limits d and the change of M(x)
        if step in max_steps and o.method != "pure":
            count = max(1, round(o.beta * len(x_src)))
            picked = torch.randperm(len(x_src), generator=generator(o, step, PICKED), device=device)[:count]
            new = new_samples(o, step, M, F, x_src[picked], y_src[picked], c_src[picked])
            pool["x"] = torch.cat([pool["x"], new])
            pool["source"] = torch.cat([pool["source"], picked])
            run.saved = 0  # so `log` saves after this step; a save here would make --resume repeat the phase
            shown = {"source": x_src[picked[:8]] / 255, "new": new[:8] / 255}
            evaluation.save_grid(shown, run.folder / f"new_samples_{step}.png")

        # ---- a batch of originals and, once there are any, new samples, with the labels of their source
        random = {"generator": generator(o, step, BATCH), "device": device}  # each draw moves it on
        n_new = int(np.ceil(o.share * o.batch)) if len(pool["x"]) else 0
        i = torch.randint(len(x_src), (o.batch - n_new,), **random)
        j = torch.randint(max(1, len(pool["x"])), (n_new,), **random)  # randint wants a range, even for no j
        x = data.to_float(torch.cat([x_src[i], pool["x"][j]]))
        source = torch.cat([i, pool["source"][j]])

        # ---- minimization, eq. (5), over M and F. F learns new samples, too: later ascents then avoid them
        with autocast():
            loss = degia.task_loss(M(x)[0], y_src[source]).mean()
            losses = {"task": loss}
            if F is not None:
                u = torch.rand(o.batch, *F.shape, **random)  # dequantizes x, eq. (2)
                n = torch.randn(o.batch, NOISE_DIM, **random)  # shifts the prior, eq. (8)
                log_p = F.log_prob(x, c_src[source], u, F.prior.shift(n)).mean()
                losses["bits_per_dim"] = bits_per_dim(log_p, F.dim)
                loss = loss - log_p / F.dim  # no gradient for M; / F.dim: for clipping, Adam ignores it
        optimizer.zero_grad()
        loss.backward()
        average_gradients(optimizer)
        if F is not None:  # -log p of new samples, far from what F has learned, has huge gradients
            torch.nn.utils.clip_grad_norm_(F.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
        run.log(losses)
    run.finish(lambda: evaluation.evaluate_degia(M, F, domains, run.folder))

def new_samples(o, step, M, F, x_src, y_src, c_src):
    """The max phase: K steps of ascent on (7) from each image; by class, as d is of a class and its prior."""
    random = {"generator": generator(o, step, ASCENT), "device": device}
    eta = o.eta * torch.rand(len(x_src), 1, 1, 1, **random)  # some stay near, some go far
    u = torch.rand(len(x_src), *(F.shape if F is not None else ()), **random)  # not used without F
    n = torch.randn(len(x_src), NOISE_DIM, **random)
    new = torch.zeros_like(x_src)
    for one in c_src.unique():
        for rows in torch.nonzero(c_src == one)[:, 0].split(256):  # P_x: of up to 256 images of the class
            x = data.to_float(x_src[rows])
            with autocast(), torch.no_grad():
                feature_src = M(x)[1].float()
                shift = F.prior.shift(n[rows]) if F is not None else None
            objective = functools.partial(degia.max_objective, y=y_src[rows], c=c_src[rows], M=M, F=F,
                                          feature_src=feature_src, u=u[rows], shift=shift, alpha=o.alpha)
            x = degia.ascend(x, autocast()(objective), o.K, eta[rows], o.blur)  # objective, under autocast
            new[rows] = data.to_uint8(x)
    return new

# ---------------------------------------------------------------- registration: the dual-flow loop
def train_reg(o, checkpoint):
    """Train R and T against D by eq. (6), on unaligned pairs. R alone: T is the identity, one order, no D."""
    pairs, modes = data.load_pairs(o)
    A, B = (images.to(device) for images in pairs["train"][:2])
    R, T, D = geomreg.build(o, A.shape[1], B.shape[1])
    for net in filter(None, (R, T, D)):
        net.to(device, memory_format=torch.channels_last)
    trained = {"R": [*R.parameters()], "T": [*T.parameters()]}
    trained["both"] = trained["R"] + trained["T"]
    opt_RT, lr_RT = adam(trained["both"], o)
    opt_D, lr_D = adam(D.parameters(), o) if D is not None else (None, None)
    run = Run(o, checkpoint, modes, R=R, T=T, D=D, opt_RT=opt_RT, opt_D=opt_D, lr_RT=lr_RT, lr_D=lr_D)

    for step in range(run.step, o.steps):
        losses = {}
        gen = generator(o, step, BATCH)
        i = torch.randint(len(A), (o.batch,), generator=gen, device=device)
        I_a, I_b = (2 * data.to_float(images[i]) - 1 for images in (A, B))

        # ---- one field, two orders
        with autocast():
            phi, T_a = R(I_a, I_b), T(I_a)
            moved = warp.resample(I_a, phi)
            O_RT = warp.resample(T_a, phi)  # translate first
            O_TR = T(moved)                 # register first
        fakes = {"both": [O_RT, O_TR], "translate-first": [O_RT], "register-first": [O_TR]}[o.order]

        # ---- max over D of eq. (5): tell I_b from the fakes, given I_a
        if D is not None:
            with autocast():
                losses["D"] = geomreg.adversarial(D(I_a, I_b), real=True)
                for O in fakes:  # constants here: R and T have their turn below
                    losses["D"] += geomreg.adversarial(D(I_a, O.detach()), real=False)
            opt_D.zero_grad()
            losses["D"].backward()
            average_gradients(opt_D)
            opt_D.step()
            lr_D.step()
            with autocast():
                losses["gan"] = sum(geomreg.adversarial(D(I_a, O), real=True) for O in fakes)

        # ---- min over R and T of eq. (6): fool D, match I_b in both orders, keep phi smooth
        scales = 1 if o.match == "l1" else 4 if step < 0.2 * o.steps else 2  # of (4): 1, 1/2 ...
        losses["recon"] = sum(geomreg.distance(o.match, O, I_b, o.window, scales) for O in fakes)  # (4)
        losses["smooth"] = warp.smoothness(phi, moved, o.alpha)
        if o.practice > 0:  # without practice, a D that is sure early may drive R away for good
            losses["practice"] = practice(R, I_a, T_a, gen)
        lambda_S = o.smooth * min(1.0, 0.1 + 3 * step / o.steps)  # rises: a field stiff at once never moves
        lambda_R = o.recon * 2 / len(fakes)  # (4) has two terms; a single one (--order, R alone) counts twice
        weights = {"gan": o.adversarial, "recon": lambda_R, "smooth": lambda_S, "practice": o.practice}
        terms = {name: weight * losses[name] for name, weight in weights.items() if name in losses}
        opt_RT.zero_grad()
        if o.gan != "both" and "gan" in terms:  # --gan R or T, table 2: only that network gets its gradient
            terms.pop("gan").backward(inputs=trained[o.gan], retain_graph=True)  # the terms share their graph
        if o.l1 != "both":  # --l1 R or T: the same for L_recon
            terms.pop("recon").backward(inputs=trained[o.l1], retain_graph=True)
        sum(terms.values()).backward(inputs=trained["both"])  # what remains: for R and T, not for D
        average_gradients(opt_RT)
        for which in ("R", "T"):
            torch.nn.utils.clip_grad_norm_(trained[which], 10.0)  # a field that jumps has huge gradients
        opt_RT.step()
        lr_RT.step()
        run.log(losses)
        if step % max(1, o.steps // 10) == 0:
            evaluation.picture_pairs(phi.detach(), I_a, I_b, run.folder / "training.png")
    run.finish(lambda: evaluation.evaluate_reg(R, pairs, run.folder))

def practice(R, I_a, T_a, gen):  # not in the paper: R's error on T(A) warped by a known field, in widths
    known = warp.random_field(len(I_a), I_a.shape[2:], data.BEND, data.SHIFT, gen)
    contrast, light = torch.randn(2, len(I_a), 1, 1, 1, generator=gen, device=device)  # not to trust greys
    picture = warp.resample(T_a.detach(), known, "border") * (1 + 0.3 * contrast) + 0.2 * light
    with autocast():
        return warp.norm(R(I_a, picture) - known).mean() / I_a.shape[3]

class Run:  # config.json, log.csv, checkpoint.pt, results.json; parts: all with a state_dict; extra: a dict
    def __init__(self, o, checkpoint, extra, **parts):
        self.o, self.folder, self.extra = o, Path(o.out), extra
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.rows, self.recent = checkpoint["log"], []  # recent: losses of the steps since the last row
        self.step, self.began = checkpoint["step"], time.time() - checkpoint["seconds"]
        with data.blaming(f"{o.out}: no access, or another process works there", "wait, or choose another"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = sqlite3.connect(self.folder / "lock", timeout=0)  # no database: a file lock,
            self.lock.executescript("PRAGMA journal_mode = OFF; BEGIN EXCLUSIVE")  # gone if we are killed
        if o.resume:
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint["state"][name])
            extra.update(checkpoint["extra"])  # in place: the pool, or the modes, of the loop above
        self.save()

    def save(self):  # under a temporary name, then renamed: at any moment there is a whole checkpoint
        self.saved = time.time()
        content = {"format": evaluation.FORMAT, "config": vars(self.o), "step": self.step, "log": self.rows,
                   "seconds": self.saved - self.began, "extra": self.extra,
                   "state": {name: part.state_dict() for name, part in self.parts.items()}}
        temporary = self.folder / "checkpoint.part"
        try:
            with data.blaming(f"{temporary}: cannot be written", "make room, then go on with --resume"):
                (self.folder / "config.json").write_text(json.dumps(vars(self.o), indent=1) + "\n")
                torch.save(content, temporary)
                os.replace(temporary, self.folder / "checkpoint.pt")
        finally:
            temporary.unlink(missing_ok=True)  # left over where the disk was full

    def log(self, losses):
        """End a step. Now and then, after a max phase (saved: 0), at the end: check, log, wait for a GPU."""
        self.step += 1
        self.recent.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        if self.step % max(1, min(50, self.o.steps // 100)) and self.saved and self.step < self.o.steps:
            return
        values, self.recent = torch.stack(self.recent).cpu(), []
        if not values.isfinite().all():
            i, j = torch.nonzero(~values.isfinite())[0].tolist()
            raise data.InputError(f"step {self.step - len(values) + 1 + i}: {list(losses)[j]} is "
                                  f"{values[i, j]}; try again with a lower --lr")
        means = dict(zip(losses, values.mean(0).tolist()))
        seconds = time.time() - self.began
        self.rows.append({"step": self.step, **means, "seconds": seconds})
        evaluation.write_csv(self.rows, self.folder / "log.csv")
        shown = "  ".join(f"{name} {mean:8.4f}" for name, mean in means.items())
        left = seconds * (self.o.steps / self.step - 1)
        print(f"{self.step:6d}/{self.o.steps}  {shown}  {seconds:6.0f} s  {left:6.0f} s left", flush=True)
        if self.step == self.o.steps or time.time() - self.saved > 60:
            self.save()

    def finish(self, measure):
        results = {**vars(self.o), "seconds": round(time.time() - self.began), **measure()}
        (self.folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        evaluation.print_table(results)
        print(f"written: {self.folder}/results.json, log.csv, checkpoint.pt and pictures")
        self.lock.close()
        (self.folder / "lock").unlink()

# ------------------------------ what --task hands changes, and --paper (unstated sizes are ours); options win
HANDS = dict(out="runs/hands", M_width=32, size=64, steps=1600, batch=64, beta=0.1667, share=1 / 8, eta=0.2,
             blur=9, flow_size=4)
PAPER_DEGIA = dict(batch=128, lr=1e-4, flow_lr=1e-4, alpha=1, lam=0.1)
PAPER_REG = dict(registration="unet", width=256, height=256, batch=12, lr=1e-4, match="l1", adversarial=1,
                 alpha=1, recon=100, smooth=200, practice=0, R_width=32, T_width=64, T_blocks=9, D_width=64)
PAPER = {"digits": PAPER_DEGIA, "hands": PAPER_DEGIA | {"size": 256}, "reg": PAPER_REG}

def number(kind, low, high=1e9):  # a type for argparse: int or float, within [low, high]
    def number(text):  # so called for argparse: "invalid number value" where kind(text) fails
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    return number

def parse(argv):  # the options o, and the names of those that were given
    count, weight = number(int, 1), number(float, 0)
    raw, show = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    quiet = argparse.SUPPRESS  # no usage: an error is one line
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, usage=quiet)
    programs = parser.add_subparsers(dest="program", required=True, prog="train.py")
    for name in ("degia", "reg"):
        add = programs.add_parser(name, formatter_class=show, usage=quiet, allow_abbrev=False).add_argument
        add("--out", default=f"runs/{name}", help="run folder; runs/hands for hands")
        add("--data", default="embedded", help="or a folder of files, as the README lays it out")
        add("--train", type=count, help="images or drawn pairs; None: 10,000 digits, 3,000 drawn hands")
        add("--steps", type=count, help="training steps")
        add("--batch", type=count, help="images, or pairs, per step")
        add("--lr", type=weight, help="learning rate; linear to 0 over the second half; reg: after a rise")
        add("--seed", type=number(int, 0), default=0, help="of the data, the networks and every step")
        add("--resume", action="store_true", help="go on with the run in --out, with its options")
        add("--paper", action="store_true", help="the paper's values, where it states them")
    programs.choices["degia"].set_defaults(steps=900, batch=128, lr=5e-4, blur=5)
    add = programs.choices["degia"].add_argument
    add("--task", choices=("digits", "hands"), default="digits", help="what M learns")
    add("--method", choices=("degia", "pure", "ada"), default="degia", help="pure: M alone; ada: no F")
    add("--backbone", choices=tuple(degia.BACKBONES), default="lenet", help="layers of M")
    add("--M-width", type=count, default=64, help="channels of M")
    add("--unseen", nargs="+", default=[], help="folders measured at the end: MNIST-M, hands")
    add("--size", type=number(int, 16), default=32, help="side of the images")
    add("--flow-lr", type=weight, default=3e-3, help="learning rate of F, while --lr is that of M")
    add("--rounds", type=number(int, 0), default=5, help="max phases, spread over training")
    add("--beta", type=number(float, 1e-4, 1), default=0.2, help="share of images in a max phase")
    add("--share", type=number(float, 0, 1), default=0.5, help="share of new samples in a batch")
    add("--K", type=count, default=5, help="ascent steps of a max phase")
    add("--eta", type=weight, default=0.4, help="largest root mean square change of an ascent step")
    add("--alpha", type=weight, default=1.0, help="weight of the two distances in (7)")
    add("--lam", type=weight, default=0.1, help="scale lambda of the noise shift in (8)")
    add("--flow-size", type=int, choices=(4, 8, 16, 28, 32), default=8, help="side of x in F; --size at most")
    programs.choices["reg"].set_defaults(task="reg", unseen=[], train=3000, steps=1600, batch=16, lr=3e-3)
    add = programs.choices["reg"].add_argument
    add("--modality", choices=("ir", "depth"), default="ir", help="B of the embedded plants")
    add("--rig", action="store_true", help="plants seen by two cameras on a rig: mostly one offset")
    for side in ("width", "height"):
        add(f"--{side}", type=number(int, 16), default=64, help="of the images that the networks see")
    add("--registration", choices=("pyramid", "unet"), default="pyramid", help="R; the paper's: unet")
    add("--similarity", choices=("translation", *geomreg.MEASURES), default="translation", help="R's teacher")
    add("--order", choices=("both", "register-first", "translate-first"), default="both", help="of T and phi")
    add("--gan", choices=("both", "R", "T"), default="both", help="whom the adversarial loss trains")
    add("--l1", choices=("both", "R", "T"), default="both", help="whom L_recon trains")
    add("--adversarial", type=weight, default=0.2, help="weight of the adversarial loss; 0: no D")
    add("--recon", type=weight, default=20.0, help="weight of L_recon, or of the classical measure")
    add("--smooth", type=weight, default=400.0, help="weight lambda_S of the smoothness")
    add("--alpha", type=weight, default=1.0, help="how much the field may bend at edges, eq. (3)")
    add("--match", choices=geomreg.MEASURES, default="correlation", help="what L_recon compares by")
    add("--window", type=int, choices=(3, 5, 7, 9), default=5, help="side of the windows of correlation")
    add("--practice", type=weight, default=50.0, help="weight of R's practice on known fields")
    for net, width in (("R", 24), ("T", 16), ("D", 16)):
        add(f"--{net}-width", type=count, default=width, help=f"channels of {net}")
    add("--T-blocks", type=number(int, 0), default=0, help="residual blocks of T; 0: two convolutions")
    o = parser.parse_args(argv)  # a first time for --task and --paper, which change defaults
    changed = (HANDS if o.task == "hands" else {}) | (PAPER[o.task] if o.paper else {})
    programs.choices[o.program].set_defaults(**changed)
    o = parser.parse_args(argv)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    if o.program == "reg" and o.similarity != "translation":  # R alone: no T, no D
        vars(o).update(match=o.similarity, order="register-first", l1="both", adversarial=0, practice=0)
    if o.program == "degia" and o.method != "pure" and o.steps < o.rounds + 2:
        raise data.InputError(f"--rounds {o.rounds}: too many for {o.steps} --steps; ask for fewer")
    return o, given

def check_folder(o):  # new or empty, and never among the data: so nothing can be overwritten
    folder = Path(o.out).resolve()
    with data.blaming(f"--out {o.out!r}: no folder for a new run", "choose another, or --resume a run"):
        for path in (Path(name).resolve() for name in {o.data, *o.unseen} - {"embedded"}):
            if folder.is_relative_to(path) or path.is_relative_to(folder):
                raise ValueError(f"it holds the data {path}, or lies in it")
        if folder.exists() and any(folder.iterdir()):
            raise ValueError("it holds files")

def fingerprint(o):  # of the user's files: how many, and a checksum of their names and sizes
    paths = [path for folder in (o.data, *o.unseen) for path in sorted(Path(folder).rglob("[!.]*"))]
    sizes = [(path.name, path.stat().st_size) for path in paths if path.is_file() and path.suffix != ".db"]
    return [len(sizes), zlib.crc32(str(sizes).encode())]

def main(argv):
    """Begin a run, or go on with one, with its own options; its data may have moved, but not changed."""
    o, given = parse(argv)
    if not o.resume:
        check_folder(o)
        o.files = fingerprint(o)
        checkpoint = {"step": 0, "seconds": 0, "log": []}
    else:
        checkpoint = evaluation.load_checkpoint(o.out, o.program)
        config = {**checkpoint["config"], "out": o.out, "resume": True}
        for k in given - {"data", "unseen"}:
            if config[k] != vars(o)[k]:
                raise data.InputError(f"{o.out}: has another --{k.replace('_', '-')}, {config[k]}; omit it")
        o = argparse.Namespace(**config | {name: vars(o)[name] for name in given})
        if fingerprint(o) != o.files:
            raise data.InputError(f"{o.data}: these files, or --unseen's, are not those of the run")
    torch.manual_seed(o.seed)  # for the first values of the networks
    if processes > 1:  # waits until all have come so far; NCCL wants a GPU for each
        torch.distributed.init_process_group("nccl" if processes <= torch.cuda.device_count() else "gloo")
    if rank > 0:  # as the first, on other batches; silently, and in a folder of its own
        o.out, sys.stdout = f"{o.out}/rank{rank}", open(os.devnull, "w")
    {"degia": train_degia, "reg": train_reg}[o.program](o, checkpoint)
    if processes > 1:
        torch.distributed.barrier()  # none may leave while another still talks to it
        torch.distributed.destroy_process_group()

if __name__ == "__main__":
    evaluation.exit_on_bad_input(main)
