"""Measure a trained run, draw its pictures, apply it to your own images.

    python eval.py runs/degia                                  its own data: table and pictures again
    python eval.py runs/degia --data mnist --unseen mnist_m    other data
    python eval.py runs/degia --images a.png b.png             the digit on each of your images
    python eval.py runs/reg                                    landmark errors and pictures again
"""
import argparse, os, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
import data, degia, geomreg, warp
from flows import bits_per_dim

FORMAT = "degia and geomreg, 3"

# ---------------------------------------------------------------- pictures
def grid(rows, labels, path, scale=2, captions=None):
    """Write rows of images (C,H,W) in [0,1], a label before each row, captions (text, right) under images."""
    height, width = (side * scale for side in rows[0][0].shape[-2:])
    margin, step = 10 + 8 * max(map(len, labels)), height + (22 if captions else 4)
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (width + 4), len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(14)
    for i, (row, label) in enumerate(zip(rows, labels)):
        pen.text((4, i * step + height // 2 - 8), label, "black")
        for j, image in enumerate(row):
            pixels, x = data.to_uint8(image.expand(3, -1, -1).cpu()), margin + j * (width + 4)
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, i * step))
            if captions:
                word, right = captions[i][j]
                pen.text((x + 2, i * step + height), word, (0, 110, 0) if right else (200, 0, 0))
    sheet.save(path)

def write_csv(rows, path):
    """Write rows, dicts with the same keys, with a header."""
    lines = [",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()) for row in rows]
    path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")

def plot(rows, path, width=460, height=260):
    """Write a panel per column of a log, rows {name: number}, over its `step`, with range and last value."""
    columns = [name for name in rows[0] if name not in ("step", "seconds")]
    sheet, last = Image.new("RGB", (width * len(columns), height), "white"), rows[-1]["step"]
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(13)
    for i, name in enumerate(columns):
        values = [row[name] for row in rows]
        low, high = min(values), float(np.quantile(values, .97))  # a jump may leave the panel
        left, right, top, bottom = i * width + 62, (i + 1) * width - 16, 34, height - 34
        pen.rectangle((left, top, right, bottom), outline=(170, 170, 170))
        points = [(left + (right - left) * row["step"] / last, bottom - (bottom - top) * (value - low)
                   / max(high - low, 1e-9)) for row, value in zip(rows, np.minimum(values, high))]
        pen.line(points, fill=(31, 119, 180), width=2, joint="curve")
        for x, y, text in ((left, 10, f"{name}   last {values[-1]:.4g}"), (left - 56, top - 6, f"{high:.4g}"),
                           (left - 56, bottom - 10, f"{low:.4g}"), (right - 70, bottom + 6, f"step {last}")):
            pen.text((x, y), text, "black")
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
        can = torch.cpu.get_capabilities()
        fast = self.device.type == "cuda" or can.get("amx_bf16") or can.get("avx512_bf16")
        self.bf16 = dtype == "bf16" or dtype == "auto" and bool(fast)
    def place(self, net):
        return net.to(self.device, memory_format=torch.channels_last)
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

def evaluate_degia(compute, M, F, domains, folder):
    """Accuracy of M in percent per domain, bits per dimension of F on the source; either may be None."""
    results, rows, labels, captions = {"domains": {}}, [], [], []
    for name, (images, truth) in domains.items() if M else ():
        said = predict(M, images, compute)
        results["domains"][name] = {"accuracy": 100 * (said == truth).float().mean().item()}
        labels.append(f"{name} {results['domains'][name]['accuracy']:.1f} %")
        rows.append(list(images[:16] / 255))
        captions.append([(f"{s} ({t})", s == t) for s, t in zip(said[:16].tolist(), truth[:16].tolist())])
    if M:
        grid(rows, labels, folder / "domains.png", captions=captions)
    if F:
        results["bits_per_dim"] = flow_bits(F, *domains["source"], compute)
        classes = torch.arange(10, device=compute.device).repeat_interleave(12)
        samples = F.sample(classes, torch.Generator(compute.device).manual_seed(0))
        grid([list(s) for s in samples.split(12)], [f"F, class {c}" for c in range(10)], folder / "flow.png",
             scale=max(2, 56 // F.shape[1]))
    if M and F and F.shape[1] == domains["source"][0].shape[2]:  # are samples read as their class?
        c = torch.arange(10, device=compute.device).repeat_interleave(100)
        for T in (1., .8, .7):
            samples = F.sample(c, torch.Generator(compute.device).manual_seed(0), T).expand(-1, 3, -1, -1)
            right = predict(M, data.to_uint8(samples), compute) == c.cpu()
            results["domains"][f"samples, T = {T}"] = {"accuracy": 100 * right.float().mean().item()}
    return results

def picture_new_samples(x_src, pool, per_round, path, columns=12):
    """Write source images (upper row) above the new samples that each max round made of them (lower row)."""
    rows, labels = [], []
    for number, (x, source) in enumerate(zip(pool["x"].split(per_round), pool["source"].split(per_round)), 1):
        rows += [list(images[:columns] / 255) for images in (x_src[source[:columns]], x)]
        labels += ["source", f"round {number}"]
    grid(rows, labels, path)

@torch.no_grad()
def find_field(R, A, B, compute):
    """phi = R(I_a, I_b) of uint8 images, with I_a and I_b in [-1,1]."""
    I_a, I_b = (compute.images(I) * 2 - 1 for I in (A, B))
    with compute.autocast():
        return R.eval()(I_a, I_b), I_a, I_b

def landmark_errors(R, pairs, compute, most=10 ** 6):
    """Eq. (7): mean distance of landmarks in pixels before and after, {"salient", "scene"} as far as the data
    know them, mean over pairs; the share of pixels where the field folds; the last field with its images."""
    distances, folded, last = ([], []), [], None
    for part in torch.arange(min(len(pairs.A), most)).split(25):
        phi, *images = last = find_field(R, pairs.A[part], pairs.B[part], compute)
        folded.append((warp.jacobian_determinant(phi) <= 0).float().mean((1, 2)).cpu())
        if pairs.points is not None:
            p_a, p_b = pairs.points[part].to(phi).split(2, -1)
            for found, p in zip(distances, (p_a, warp.warp_points(p_a, phi))):
                found.append(torch.linalg.vector_norm(p - p_b, dim=-1).cpu())
    kinds = {} if pairs.salient is None else {"salient": pairs.salient}
    before, after = ({kind: torch.cat(found)[:, which].nanmean(1).nanmean().item() if found else None
                      for kind, which in {**kinds, "scene": slice(None)}.items()} for found in distances)
    return before, after, torch.cat(folded).mean().item(), last

def simple_maps(points):
    """Landmark errors that the mean field, and each pair's best translation and affine map would leave."""
    seen, errors = [p[~p.isnan().any(1)] for p in points], []
    for i, (a, b) in enumerate(p.split(2, 1) for p in seen):
        P_a, P_b = torch.cat(seen[:i] + seen[i + 1:] or seen).split(2, 1)  # of the other pairs
        near = torch.softmax(-torch.cdist(a, P_a).square() / 32, 1)  # the mean field, smoothed
        A = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        guesses = a + near @ (P_b - P_a), a + (b - a).mean(0), A @ (torch.linalg.pinv(A) @ b)
        errors.append(torch.stack([(guess - b).norm(dim=1).mean() for guess in guesses]))
    return dict(zip(("mean field", "translation", "affine"), torch.stack(errors).nanmean(0).tolist()))

def evaluate_reg(compute, R, pairs, folder):
    """Landmark errors of test and (the first 100) training pairs, folding; figure 4 in pairs.png."""
    before, after, folding, last = landmark_errors(R, pairs["test"], compute)
    picture_pairs(*last, folder / "pairs.png")
    simple = {} if pairs["test"].points is None else {"simple_maps": simple_maps(pairs["test"].points)}
    return {"unregistered": before, **simple, "registered": after, "folding": folding,
            "registered_train": landmark_errors(R, pairs["train"], compute, 100)[1]}

def picture_pairs(phi, I_a, I_b, path):
    """Write A, B, A registered, the field, and B with the edges of A before and after: a column per pair."""
    def overlay(image, outline):
        edge = geomreg.edges(outline) + 1
        edge = (edge / edge.flatten(1).quantile(.9, 1).clamp_min(1e-6).view(-1, 1, 1, 1) - .7).clamp(0, 1)
        red = torch.tensor([1., .1, .1]).to(edge).view(3, 1, 1)
        return torch.lerp(image.mean(1, keepdim=True) / 4 + .5, red, edge)

    moved, longest = warp.resample(I_a, phi), torch.linalg.vector_norm(phi, dim=1).max().item()
    rows = {"A": I_a / 2 + .5, "B": I_b / 2 + .5, "A registered": moved / 2 + .5,
            f"field, up to {longest:.0f} px": warp.colour_wheel(phi, longest),
            "B, edges of A": overlay(I_b, I_a), "after": overlay(I_b, moved)}
    scale = max(1, (128 if len(phi) > 1 else 384) // phi.shape[-1])
    grid([list(images[:8]) for images in rows.values()], list(rows), path, scale)

def print_table(results):
    """The numbers of results.json, a line per domain or set of pairs."""
    tables = {name: value for name, value in results.items() if isinstance(value, dict)}
    print("\n" + ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                           for name, value in results.items() if name not in tables))
    for name, numbers in {**tables.pop("domains", {}), **tables}.items():
        known = {measure: value for measure, value in numbers.items() if value is not None}
        print(f"  {name:17s}" + "".join(f"  {measure} {value:8.3f}" for measure, value in known.items()))

# ---------------------------------------------------------------- a run folder
def load_checkpoint(folder, task=None):
    """The content of folder/checkpoint.pt; ValueError if missing, damaged, foreign or of another task."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; name the folder of a run that has been trained")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        assert content["format"] == FORMAT
    except Exception as error:  # what a foreign file makes the unpickler raise depends on its bytes
        raise ValueError(f"{path}: not a checkpoint of ours ({type(error).__name__}); name another") from None
    if task and content["task"] != task:
        raise ValueError(f"{path}: a checkpoint of `{content['task']}`, not of `{task}`; name another --out")
    return content

def load_run(folder):
    """What a checkpoint knows: about the run, options, device, trained networks, how pair files are read."""
    checkpoint = load_checkpoint(folder)
    o, reading = SimpleNamespace(**checkpoint["config"]), None
    compute, about = Compute(o.dtype), {"task": checkpoint["task"], "steps": checkpoint["step"]}
    about |= {name: vars(o)[name] for name in ("method", "order", "similarity", "seed") if name in vars(o)}
    if checkpoint["task"] == "degia":
        nets = {name: net for name, net in zip("MF", degia.build(o)) if name in degia.TRAINED[o.method]}
    else:
        reading = {side: (int(how[0]), *how[1:].tolist()) for side, how in checkpoint["extra"].items()}
        nets = dict(zip("RTD", geomreg.build(o, (reading["A"][0], reading["B"][0]))))
    for name, net in nets.items():
        compute.place(net).load_state_dict(checkpoint["state"][name])
    return about, o, compute, nets, reading

def read_digits(o, compute, M, files, path):
    """Print the digit that M sees in each file, and draw it on each image."""
    images = torch.stack([data.as_tensor(data.open_image(f), (o.size, o.size)) for f in files])
    said = predict(M, images, compute).tolist()
    grid([[image / 255] for image in images], [Path(f).name for f in files], path, 4,
         [[(str(digit), True)] for digit in said])
    print("\n".join(f"{file}: {digit}" for file, digit in zip(files, said)) + f"\nwritten: {path}")

def align_files(o, compute, R, reading, files, folder):
    """Write A aligned to B at B's size, sampled from A as stored; the field in pixels of B; overlays."""
    if len(files) != 2:
        raise ValueError(f"--images: a registration takes two files, A and B of a pair, not {len(files)}")
    A, B = (data.open_image(file, *reading[side]) for file, side in zip(files, "AB"))
    small = [data.as_tensor(image, (o.height, o.width))[None] for image in (A, B)]
    phi, I_a, I_b = find_field(R, *small, compute)
    name = str(folder / Path(files[0]).stem)
    picture_pairs(phi, I_a, I_b, name + "_overlay.png")
    phi = warp.resize_field(phi, B.size[::-1])
    ratio = (torch.tensor(A.size) / torch.tensor(B.size)).to(phi).view(1, 2, 1, 1)
    places = (warp.grid_of(phi) + phi + .5) * ratio - .5  # pixels of B to pixels of A
    aligned = warp.look_up(data.as_tensor(A, A.size[::-1])[None].to(phi), places)[0].round().byte().cpu()
    Image.fromarray(aligned.permute(1, 2, 0).squeeze(-1).numpy()).save(name + "_aligned.png")
    np.save(name + "_field.npy", phi[0].cpu().numpy())
    print(f"written: {name}_aligned.png, {name}_field.npy, {name}_overlay.png")

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
    parser.add_argument("--images", nargs="+", help="apply the run to these image files")
    return parser.parse_args(argv)

def main(argv):
    args = parse(argv)
    folder, (about, o, compute, nets, reading) = Path(args.run), load_run(args.run)
    o.data, o.unseen = args.data or o.data, args.unseen or getattr(o, "unseen", [])
    if args.images and "R" in nets:
        align_files(o, compute, nets["R"], reading, args.images, folder)
    elif args.images and "M" in nets:
        read_digits(o, compute, nets["M"], args.images, folder / "images.png")
    elif args.images or args.unseen and "R" in nets:
        raise ValueError(f"{folder}: its networks, {', '.join(nets)}, cannot do that; name another run")
    elif "R" in nets:
        pairs, _ = data.load_pairs(o, folder, reading)
        print_table({**about, **evaluate_reg(compute, nets["R"], pairs, folder)})
    else:
        o.validate, o.train = o.validate and not args.unseen, 10  # the training images are not needed
        _, _, domains = data.load_digits(o, folder)
        print_table({**about, **evaluate_degia(compute, nets.get("M"), nets.get("F"), domains, folder)})

if __name__ == "__main__":
    exit_on_bad_input(main)
