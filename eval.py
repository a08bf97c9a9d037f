"""Measure a trained run, draw its pictures, apply it to your own images.

    python eval.py runs/degia                                  its own data: table and pictures again
    python eval.py runs/degia --data mnist --unseen mnist_m    other data
    python eval.py runs/degia --images a.png b.png             the digit on each of your images

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
    out = []
    for part in images.split(500):
        with compute.autocast():
            out.append(M(compute.images(part))[0].argmax(1).cpu())
    return torch.cat(out)

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
    results = {"domains": {}}
    rows, labels, captions = [], [], []
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

def print_table(results):
    """The numbers of results.json, a line per domain."""
    print("\n" + ", ".join(f"{key} {results[key]}" for key in ("task", "method", "seed", "steps")))
    for name, numbers in results["domains"].items():
        print(f"  {name:16s}" + "".join(f"  {measure} {value:8.3f}" for measure, value in numbers.items()))
    if "bits_per_dim" in results:
        print(f"  {'flow F, source':16s}  bits per dimension {results['bits_per_dim']:.3f}")

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
    """Options, device, M, F and steps of a trained run, rebuilt from what its checkpoint carries."""
    checkpoint = load_checkpoint(folder, "degia")
    o = SimpleNamespace(**checkpoint["config"])
    compute = Compute(o.dtype)
    M, F = (net.to(compute.device, memory_format=torch.channels_last) for net in degia.build(o))
    M.load_state_dict(checkpoint["state"]["M"])
    F.load_state_dict(checkpoint["state"]["F"])
    return o, compute, M, F, checkpoint["step"]

def judge_samples(F, judge, temperature, per_class=100):
    """Print how many samples of F of class c the digit network of another run takes for c."""
    o, compute, M, _, _ = load_run(judge)
    if o.method == "flow":
        raise ValueError(f"{judge}: was trained with --method flow and reads no digits; name another run")
    c = torch.arange(10, device=compute.device).repeat_interleave(per_class)
    samples = F.sample(c, torch.Generator(compute.device).manual_seed(0), temperature).expand(-1, 3, -1, -1)
    said = predict(M, data.to_uint8(data.resize(samples, o.size)), compute)
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
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.stderr.flush()
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
    o, compute, M, F, step = load_run(args.run)
    o.data, o.unseen, folder = args.data or o.data, args.unseen or o.unseen, Path(args.run)
    if args.images and o.method == "flow" or args.judge and o.method not in ("degia", "flow"):
        raise ValueError(f"{folder}: --method {o.method} trained no network for that; name another run")
    if args.images:
        return read_digits(o, compute, M, args.images, folder)
    if args.judge:
        return judge_samples(F, args.judge, args.temperature)
    o.validate, o.train = o.validate and not args.unseen, 10  # the training images are not needed
    _, _, domains = data.load_digits(o, folder)
    results = {"task": "degia", "method": o.method, "seed": o.seed, "steps": step}
    print_table({**results, **evaluate_degia(o, compute, M, F, domains, folder)})

if __name__ == "__main__":
    exit_on_bad_input(main)
