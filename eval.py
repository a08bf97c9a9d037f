"""Measure a trained run, draw its pictures, apply it to your own images.

    python eval.py runs/degia                                  its own data: table and pictures again
    python eval.py runs/degia --data mnist --unseen mnist_m    other data
    python eval.py runs/degia --images a.png b.png             the digit on each of your images
    python eval.py runs/reg                                    landmark errors and pictures again

The networks are rebuilt from the configuration that the checkpoint carries. Pictures are drawn with Pillow:
`grid` puts images side by side, `plot` draws the curves of a log.
"""
import argparse
import csv
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import degia
import geomreg
import warp
from flows import bits_per_dim

FORMAT = "degia and geomreg, 2"
COLOURS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207)]

# ---------------------------------------------------------------- pictures

def text_at(draw, xy, text, size=14, fill=(0, 0, 0)):
    draw.text(xy, text, fill=fill, font=ImageFont.load_default(size))

def grid(rows, labels, path, scale=2, captions=None):
    """Write rows of images (C,H,W) in [0,1], a label before each row, captions (text, right) under images."""
    height, width = (side * scale for side in rows[0][0].shape[-2:])
    margin, step = 10 + 8 * max(map(len, labels)), height + (22 if captions else 4)
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (width + 4), len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, label) in enumerate(zip(rows, labels)):
        text_at(draw, (4, i * step + height // 2 - 8), label)
        for j, image in enumerate(row):
            pixels = data.to_uint8(image.expand(3, -1, -1).cpu()).permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            place = (margin + j * (width + 4), i * step)
            sheet.paste(picture, place)
            if captions:
                word, right = captions[i][j]
                ink = (0, 110, 0) if right else (200, 0, 0)
                text_at(draw, (place[0] + 2, place[1] + height), word, 14, ink)
    sheet.save(path)

def plot(rows, path, width=460, height=260):
    """Write a panel per column of a log, rows {name: number}, over its `step`, with range and last value."""
    columns = [name for name in rows[0] if name not in ("step", "seconds")]
    sheet = Image.new("RGB", (width * len(columns), height), "white")
    draw, last = ImageDraw.Draw(sheet), rows[-1]["step"]
    for i, name in enumerate(columns):
        values = [row[name] for row in rows]
        low, high = min(values), float(np.quantile(values, .97))  # a jump may leave the panel
        left, right, top, bottom = i * width + 62, (i + 1) * width - 16, 34, height - 34
        draw.rectangle((left, top, right, bottom), outline=(170, 170, 170))
        scale_x, scale_y = (right - left) / last, (bottom - top) / max(high - low, 1e-9)
        points = [(left + scale_x * row["step"], max(top, bottom - scale_y * (row[name] - low)))
                  for row in rows]
        draw.line(points, fill=COLOURS[i % len(COLOURS)], width=2, joint="curve")
        for x, y, text in ((left, 10, f"{name}   last {values[-1]:.4g}"), (left - 56, top - 6, f"{high:.4g}"),
                           (left - 56, bottom - 10, f"{low:.4g}"), (right - 70, bottom + 6, f"step {last}")):
            text_at(draw, (x, y), text, 13)
    sheet.save(path)

# ---------------------------------------------------------------- measures

class Compute:
    """Device and precision of a run; auto: bf16 on CUDA and on CPUs that multiply it (AMX, AVX512-BF16)."""
    def __init__(self, dtype):
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        able = torch.cpu.get_capabilities()
        fast = self.device.type == "cuda" or able.get("amx_bf16") or able.get("avx512_bf16")
        self.bf16 = dtype == "bf16" or dtype == "auto" and bool(fast)
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
    def images(self, x):
        """uint8 images as float in [0,1] on the device, channels last."""
        return (x.to(self.device).float() / 255).contiguous(memory_format=torch.channels_last)

@torch.no_grad()
def predict(M, images, compute):
    """Digits (N,) that M sees in uint8 images (N,3,S,S)."""
    M.eval()
    with compute.autocast():
        return torch.cat([M(compute.images(part))[0].argmax(1).cpu() for part in images.split(500)])

@torch.no_grad()
def flow_bits(F, images, labels, compute):
    """Mean bits per dimension of what F sees of uint8 images, its prior without the noise shift; float32."""
    total, g = 0., torch.Generator(compute.device).manual_seed(0)
    for x, c in zip(images.split(500), labels.split(500)):
        u = torch.rand(len(x), *F.shape, generator=g, device=compute.device)
        log_p = F.log_prob(degia.flow_view(compute.images(x), F.shape), c.to(compute.device), u)
        total += bits_per_dim(log_p, F.dim).sum().item()
    return total / len(images)

def evaluate_degia(o, compute, M, F, domains, folder):
    """Accuracy of M in percent per domain, bits per dimension of F on the source; pictures into folder."""
    results, rows, labels, captions = {"domains": {}}, [], [], []
    if o.method != "flow":
        for name, (images, truth) in domains.items():
            said = predict(M, images, compute)
            results["domains"][name] = {"accuracy": 100 * (said == truth).float().mean().item()}
            labels.append(f"{name} {results['domains'][name]['accuracy']:.1f} %")
            rows.append(list(images[:16].float() / 255))
            captions.append([(f"{s} ({t})", s == t) for s, t in zip(said[:16].tolist(), truth[:16].tolist())])
        grid(rows, labels, folder / "domains.png", captions=captions)
    if o.method in ("degia", "flow"):
        results["bits_per_dim"] = flow_bits(F, *domains["source"], compute)
        classes = torch.arange(10, device=compute.device).repeat_interleave(12)
        samples = F.sample(classes, torch.Generator(compute.device).manual_seed(0))
        grid([list(s) for s in samples.split(12)], [f"F, class {c}" for c in range(10)], folder / "flow.png",
             scale=max(2, 56 // F.shape[1]))
    return results

def picture_new_samples(x_src, pool, per_round, path, columns=12):
    """Write source images (upper row) above the new samples that each max round made of them (lower row)."""
    rows, labels = [], []
    for number, first in enumerate(range(0, len(pool["x"]), per_round), 1):
        part = slice(first, first + min(per_round, columns))
        rows += [list(x_src[pool["source"][part]].float() / 255), list(pool["x"][part].float() / 255)]
        labels += ["source", f"round {number}"]
    grid(rows, labels, path)

def landmark_errors(R, pairs, compute):
    """Eq. (7): mean distance of landmarks in pixels before and after, {"salient", "scene"}, mean over pairs;
    the share of pixels where the field folds; the last field with its images."""
    distances, folded = ([], []), []
    for part in torch.arange(len(pairs.A)).split(25):
        I_a, I_b = (compute.images(I[part]) * 2 - 1 for I in (pairs.A, pairs.B))
        with compute.autocast(), torch.no_grad():
            phi = R(I_a, I_b)
        p_a, p_b = pairs.points[part].to(phi).split(2, -1)
        for found, p in zip(distances, (p_a, warp.warp_points(p_a, phi))):
            found.append(torch.linalg.vector_norm(p - p_b, dim=-1).cpu())
        folded.append((warp.jacobian_determinant(phi) <= 0).float().mean((1, 2)).cpu())
    before, after = ({kind: torch.cat(found)[:, which].nanmean(1).nanmean().item() for kind, which in
                      (("salient", pairs.salient), ("scene", slice(None)))} for found in distances)
    return before, after, torch.cat(folded).mean().item(), (phi, I_a, I_b)

def evaluate_reg(compute, R, pairs, folder):
    """Landmark errors of test and (the first 100) training pairs, folding; figure 4 in pairs.png."""
    some = SimpleNamespace(**{**vars(pairs["train"]), "A": pairs["train"].A[:100]})
    before, after, folding, last = landmark_errors(R, pairs["test"], compute)
    picture_pairs(*last, folder / "pairs.png")
    return {"unregistered": before, "registered": after, "folding": folding,
            "registered_train": landmark_errors(R, some, compute)[1]}

def picture_pairs(phi, I_a, I_b, path):
    """Write A, B, A registered, the field, and B with the edges of A before and after: a column per pair."""
    def overlay(image, outline):
        edge = geomreg.edges(outline)
        edge = (3 * edge / edge.amax((2, 3), keepdim=True).clamp_min(1e-6) - .7).clamp(0, 1)
        red = torch.tensor([1., .1, .1]).to(edge).view(1, 3, 1, 1)
        return torch.lerp(image.mean(1, keepdim=True) / 4 + .5, red, edge)

    moved, longest = warp.resample(I_a, phi), torch.linalg.vector_norm(phi, dim=1).max().item()
    rows = {"A": I_a / 2 + .5, "B": I_b / 2 + .5, "A registered": moved / 2 + .5,
            f"field, up to {longest:.0f} px": warp.colour_wheel(phi, longest),
            "B, edges of A": overlay(I_b, I_a), "after": overlay(I_b, moved)}
    grid([list(images[:8]) for images in rows.values()], list(rows), path, max(1, 128 // phi.shape[-1]))

def print_table(results):
    """The numbers of results.json, a line per domain or set of pairs."""
    about = ("task", "method", "order", "similarity", "seed", "steps")
    print("\n" + ", ".join(f"{key} {results[key]}" for key in about if key in results))
    lines = dict(results.get("domains", {}))
    for name in ("unregistered", "registered", "registered_train", "folding", "bits_per_dim"):
        if name in results:
            lines[name] = results[name] if isinstance(results[name], dict) else {"": results[name]}
    for name, numbers in lines.items():
        print(f"  {name:17s}" + "".join(f"  {measure} {value:8.3f}" for measure, value in numbers.items()))

# ---------------------------------------------------------------- a run folder

def load_checkpoint(folder, task=None):
    """The content of folder/checkpoint.pt; ValueError if missing, damaged, foreign or of another task."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; name the folder of a run that has been trained")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a foreign file makes the unpickler raise depends on its bytes
        raise ValueError(f"{path}: not a checkpoint ({type(error).__name__}); name another run") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this program; train a run with train.py")
    if task and content["task"] != task:
        raise ValueError(f"{path}: a checkpoint of `{content['task']}`, not of `{task}`; name another --out")
    return content

def load_run(folder):
    """Options, device, networks by name, steps of a trained run, rebuilt from what its checkpoint carries."""
    checkpoint = load_checkpoint(folder)
    o = SimpleNamespace(**checkpoint["config"])
    compute, digits = Compute(o.dtype), checkpoint["task"] == "degia"
    nets = dict(zip("MF", degia.build(o)) if digits else zip("RTD", geomreg.build(o, (3, 1))))
    for name, net in nets.items():
        net.load_state_dict(checkpoint["state"][name])
        net.to(compute.device, memory_format=torch.channels_last)
    return o, compute, nets, checkpoint["step"]

def judge_samples(F, judge, temperature, per_class=100):
    """Print how many samples of F of class c the digit network of another run takes for c."""
    o, compute, nets, _ = load_run(judge)
    if "M" not in nets or o.method == "flow":
        raise ValueError(f"{judge}: has no network that reads digits; name another run")
    c = torch.arange(10, device=compute.device).repeat_interleave(per_class)
    samples = F.sample(c, torch.Generator(compute.device).manual_seed(0), temperature).expand(-1, 3, -1, -1)
    said = predict(nets["M"], data.to_uint8(data.resize(samples, o.size)), compute)
    print(f"samples of F read as their class: {100 * (said == c.cpu()).float().mean():.1f} %")

def read_digits(o, compute, M, files, folder):
    """Print the digit that M sees in each file, and draw it on each image."""
    images = torch.stack([data.as_tensor(data.open_image(f), o.size) for f in files])
    said = predict(M, images, compute).tolist()
    for file, digit in zip(files, said):
        print(f"{file}: {digit}")
    grid([[image / 255] for image in images], [Path(f).name for f in files], folder / "images.png", 4,
         [[(str(digit), True)] for digit in said])
    print(f"written: {folder / 'images.png'}")

def exit_on_bad_input(main):
    """Run main(argv); a ValueError or OSError becomes one line and exit code 2, Ctrl-C one line and 130."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        os._exit(2) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; train.py goes on from the last checkpoint with --resume", file=sys.stderr)
        sys.exit(130)

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="folder of a trained run")
    parser.add_argument("--data", help="measure on this data instead of the run's own")
    parser.add_argument("--unseen", nargs="+", help="measure on these unseen domains")
    parser.add_argument("--judge", metavar="RUN", help="let that run's digit network read samples of F")
    parser.add_argument("--temperature", type=float, default=1., help="of the samples that --judge reads")
    parser.add_argument("--images", nargs="+", help="apply the run to these image files")
    return parser.parse_args(argv)

def main(argv):
    args = parse(argv)
    o, compute, nets, step = load_run(args.run)
    folder, kind = Path(args.run), getattr(o, "method", "registration")
    if (args.images and kind in ("flow", "registration") or args.judge and kind not in ("degia", "flow")
            or (args.data or args.unseen) and kind == "registration"):
        raise ValueError(f"{folder}: a run of `{kind}`, which cannot do that; name another run")
    if args.images:
        return read_digits(o, compute, nets["M"], args.images, folder)
    if args.judge:
        return judge_samples(nets["F"], args.judge, args.temperature)
    if kind == "registration":
        task, measured = "reg", evaluate_reg(compute, nets["R"], data.load_pairs(o), folder)
    else:
        o.data, o.unseen = args.data or o.data, args.unseen or o.unseen
        o.validate, o.train = o.validate and not args.unseen, 10  # the training images are not needed
        _, _, domains = data.load_digits(o, folder)
        task, measured = "degia", evaluate_degia(o, compute, *nets.values(), domains, folder)
    print_table({"task": task, **vars(o), "steps": step, **measured})

if __name__ == "__main__":
    exit_on_bad_input(main)
