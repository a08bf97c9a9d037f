"""Measure a trained run, draw its pictures, apply it to your own images: `eval.py RUN --images a.png`."""
import argparse, os, sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
import data, degia, geomreg, warp
from flows import bits_per_dim

FORMAT = "degia and geomreg, 4"
ABOUT = ("method", "backbone", "order", "similarity", "seed")  # options that a table of results names

# ---------------------------------------------------------------- pictures
def grid(rows, labels, path, scale=2, captions=None, points=None):
    """Write labelled rows of images (C,H,W) in [0,1], captions (text, right) or green and red points."""
    height, width = (side * scale for side in rows[0][0].shape[-2:])
    margin, step = 10 + 8 * max(map(len, labels)), height + (22 if captions else 4)
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (width + 4), len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(14)
    for i, (row, label) in enumerate(zip(rows, labels)):
        pen.text((4, i * step + height // 2 - 8), label, "black")
        for j, image in enumerate(row):
            x, y = margin + j * (width + 4), i * step
            pixels = data.to_uint8(image).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
            sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y))
            if captions:
                text, right = captions[i][j]
                pen.text((x + 2, y + height), text, (0, 110, 0) if right else (200, 0, 0))
            for colour, dots in zip(((0, 200, 0), (230, 0, 0)), points[i][j] if points else ()):
                for p_x, p_y in dots:
                    pen.circle((x + p_x * width, y + p_y * height), 2, colour)
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
        values = np.array([row[name] for row in rows])
        low, high = values.min(), np.quantile(values, .97)  # a jump may leave the panel
        left, right, top, bottom = i * width + 62, (i + 1) * width - 16, 34, height - 34
        x = left + (right - left) * np.array([row["step"] for row in rows]) / last
        y = bottom - (bottom - top) * (values.clip(max=high) - low) / max(high - low, 1e-9)
        pen.rectangle((left, top, right, bottom), outline=(170, 170, 170))
        pen.line([*zip(x, y)], fill=(31, 119, 180), width=2, joint="curve")
        for x, y, text in ((left, 10, f"{name}   last {values[-1]:.4g}"), (left - 56, top - 6, f"{high:.4g}"),
                           (left - 56, bottom - 10, f"{low:.4g}"), (right - 70, bottom + 6, f"step {last}")):
            pen.text((x, y), text, "black")
    sheet.save(path)

# ---------------------------------------------------------------- measures
class Compute:
    """Device and precision of a run; auto: bf16 on CUDA and on CPUs that multiply it (AMX, AVX512-BF16)."""
    def __init__(self, dtype):
        self.device, can = torch.device("cpu"), torch.cpu.get_capabilities()
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
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
    """M's output (N,outputs) for uint8 images (N,3,S,S)."""
    M.eval()
    parts = images.split(max(1, 2 ** 19 // images.shape[-1] ** 2))
    with compute.autocast():
        return torch.cat([M(compute.images(part))[0].float().cpu() for part in parts])
def scores(output, y, size):
    """Accuracy of digits in percent; of landmarks MSE (of shares), pixels, PCK: percentage within 5 %."""
    if not y.is_floating_point():
        return {"accuracy": 100 * (output.argmax(1) == y).float().mean().item()}
    distance = torch.linalg.vector_norm((output - y).view(-1, 17, 2), dim=2)
    return {"mse": (output - y).square().mean().item(), "pixels": distance.mean().item() * size,
            "pck": 100 * (distance < .05).float().mean().item()}
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
    """`scores` of M per domain, and the MSE of the mean pose; bits per dimension of F on the source."""
    results, rows, labels, captions, points = {"domains": {}}, [], [], [], []
    for name, (images, y) in domains.items() if M else ():
        output = predict(M, images, compute)
        numbers = results["domains"][name] = scores(output, y, images.shape[-1])
        rows.append(images[:16] / 255)
        labels += [f"{name} {value:.1f} {measure}" for measure, value in list(numbers.items())[-1:]]
        if y.is_floating_point():
            numbers["mean pose"] = (M.template.cpu() - y).square().mean().item()
            points.append(torch.stack([y, output], 1)[:16].unflatten(2, (17, 2)).tolist())
        else:
            captions.append([(f"{s} ({t})", s == t) for s, t in zip(output.argmax(1), y[:16])])
    if M:
        grid(rows, labels, folder / "domains.png", captions=captions, points=points)
    if F:
        images, y = domains["source"]
        results["bits_per_dim"] = round(flow_bits(F, images, degia.classes_of(y, F), compute), 4)
        classes = torch.arange(len(F.poses), device=compute.device).repeat_interleave(12)
        rows = F.sample(classes, torch.Generator(compute.device).manual_seed(0)).split(12)
        grid(rows, [f"F, class {c}" for c in range(len(rows))], folder / "flow.png", max(2, 56 // F.shape[1]))
    return results
def picture_new_samples(x_src, pool, per_round, path):
    """Write source images (upper row) above the new samples that each max round made of them (lower row)."""
    first = torch.arange(len(pool["x"])).view(-1, per_round)[:, :12]  # of each round
    rows = torch.stack([x_src[pool["source"][first]], pool["x"][first]], 1).flatten(0, 1) / 255
    grid(rows, [label for i in range(len(first)) for label in ("source", f"round {i + 1}")], path)
@torch.no_grad()
def find_field(R, A, B, compute):
    """phi = R(I_a, I_b) of uint8 images, with I_a and I_b in [-1,1]."""
    I_a, I_b = (compute.images(I) * 2 - 1 for I in (A, B))
    with compute.autocast():
        return R.eval()(I_a, I_b), I_a, I_b
def landmark_errors(R, pairs, compute, most=10 ** 6):
    """Eq. (7): mean landmark distance in pixels before and after, share of folded pixels, last field."""
    distances, folded = [], []
    for part in torch.arange(min(len(pairs.A), most)).split(25):
        phi, I_a, I_b = find_field(R, pairs.A[part], pairs.B[part], compute)
        folded.append((warp.jacobian_determinant(phi) <= 0).float().mean((1, 2)).cpu())
        if pairs.points is not None:
            p_a, p_b = pairs.points[part].to(phi).split(2, -1)
            p = torch.stack([p_a, warp.warp_points(p_a, phi)])  # before and after
            distances.append(torch.linalg.vector_norm(p - p_b, dim=-1).cpu())
    kinds = ({} if pairs.salient is None else {"salient": pairs.salient}) | {"scene": slice(None)}
    before, after = ({kind: d[:, which].nanmean(1).nanmean().item() for kind, which in kinds.items()}
                     for d in torch.cat(distances, 1)) if distances else ({"scene": None}, {"scene": None})
    return before, after, torch.cat(folded).mean().item(), (phi, I_a, I_b)
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
    return {"unregistered": before, **simple, "registered": after, "folding": round(folding, 6),
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
            f"field, up to {longest:.1f} px": warp.colour_wheel(phi, longest),
            "B, edges of A": overlay(I_b, I_a), "after": overlay(I_b, moved)}
    scale = max(1, (128 if len(phi) > 1 else 384) // phi.shape[-1])
    grid([images[:8] for images in rows.values()], list(rows), path, scale)
def print_table(results):
    """The numbers of results.json, a line per domain or set of pairs."""
    tables = {name: value for name, value in results.items() if isinstance(value, dict)}
    print("\n" + ", ".join(f"{name} {value}" for name, value in results.items() if name not in tables))
    for name, numbers in {**tables.pop("domains", {}), **tables}.items():
        known = {measure: value for measure, value in numbers.items() if value is not None}
        print(f"  {name:17s}" + "".join(f"  {measure} {value:8.5f}" for measure, value in known.items()))

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
        raise ValueError(f"{path}: not a checkpoint of ours ({type(error).__name__}); name a run") from None
    if task and content["task"] != task:
        raise ValueError(f"{path}: a checkpoint of `{content['task']}`, not of `{task}`; name another --out")
    return content
def read_files(o, compute, M, files, folder):
    """Print the digit in each file; or write its landmarks, in pixels, and it warped onto the mean pose."""
    pictures = [data.open_image(file, 3, *data.inspect([file])[1][1:]) for file in files]
    output = predict(M, torch.stack([data.as_tensor(p, (o.size, o.size)) for p in pictures]), compute)
    rows, names = [[data.as_tensor(p, (256, 256)) / 255] for p in pictures], [Path(f).name for f in files]
    if o.task == "digits":
        digits = output.argmax(1).tolist()
        print(*(f"{f}: {d}" for f, d in zip(files, digits)), f"written: {folder}/images.png", sep="\n")
        return grid(rows, names, folder / "images.png", 1, [[(str(digit), True)] for digit in digits])
    template, columns = M.template.cpu().view(17, 2), [f"{axis}{i}" for i in range(17) for axis in "xy"]
    dots, table = [[((), found), (template.tolist(), ())] for found in output.view(-1, 17, 2).tolist()], []
    for name, picture, row, found in zip(names, pictures, rows, output.view(-1, 17, 2)):
        p, goal = (pose * torch.tensor(picture.size) for pose in (found, template))
        matrix = similarity(goal, p).flatten().tolist()  # as `transform` asks: from new places to old ones
        aligned = picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        aligned.save(folder / f"{len(table)}_{Path(name).stem}_aligned.png")
        row.append(data.as_tensor(aligned, (256, 256)) / 255)
        table.append({"name": name, **dict(zip(columns, (p - .5).flatten().tolist()))})
    write_csv(table, folder / "landmarks.csv")
    grid(rows, names, folder / "images.png", 1, points=dots)
    print(f"written: {folder}/images.png, landmarks.csv and *_aligned.png")
def similarity(p, q):
    """Matrix (2,3) of the turn, scaling and shift that takes points p (N,2) closest to q in least squares."""
    z, w = (torch.view_as_complex(x - x.mean(0)) for x in (p, q))
    a = (z.conj() * w).sum() / z.abs().square().sum()
    turn = torch.view_as_real(torch.stack([a, 1j * a])).T
    return torch.cat([turn, (q.mean(0) - turn @ p.mean(0))[:, None]], 1)
def align_files(o, compute, R, reading, files, folder):
    """Write A aligned to B at B's size, sampled from A as stored; the field in pixels of B; overlays."""
    if len(files) != 2:
        raise ValueError(f"--images: a registration takes two files, A and B of a pair, not {len(files)}")
    A, B = (data.open_image(file, *reading[side]) for file, side in zip(files, "AB"))
    phi, I_a, I_b = find_field(R, *(data.as_tensor(I, (o.height, o.width))[None] for I in (A, B)), compute)
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
    parser.add_argument("--data", help="measure on this data (of hands on every 10th image; --unseen: all)")
    parser.add_argument("--unseen", nargs="+", help="measure on these unseen domains")
    parser.add_argument("--images", nargs="+", help="apply the run to these image files")
    return parser.parse_args(argv)
def main(argv):
    args = parse(argv)
    folder, checkpoint = Path(args.run), load_checkpoint(args.run)
    o, reading = argparse.Namespace(**checkpoint["config"]), None  # how the files of pairs are read
    compute, about = Compute(o.dtype), {"task": checkpoint["task"], "steps": checkpoint["step"]}
    about |= {name: vars(o)[name] for name in ABOUT if name in vars(o)}
    if checkpoint["task"] == "degia":
        nets = {name: net for name, net in zip("MF", degia.build(o)) if name in degia.TRAINED[o.method]}
    else:
        reading = {side: (int(how[0]), *how[1:].tolist()) for side, how in checkpoint["extra"].items()}
        nets = dict(zip("RTD", geomreg.build(o, (reading["A"][0], reading["B"][0]))))
    for name, net in nets.items():
        compute.place(net).load_state_dict(checkpoint["state"][name])
    M, F, R = map(nets.get, "MFR")
    o.data, o.unseen = args.data or o.data, args.unseen or getattr(o, "unseen", [])
    if args.images and R:
        align_files(o, compute, R, reading, args.images, folder)
    elif args.images and M:
        read_files(o, compute, M, args.images, folder)
    elif args.images or args.unseen and R:
        raise ValueError(f"{folder}: its networks, {', '.join(nets)}, cannot do that; name another run")
    elif R:
        pairs, _ = data.load_pairs(o, folder, reading)
        print_table({**about, **evaluate_reg(compute, R, pairs, folder)})
    else:
        o.validate, o.train = o.validate and not args.unseen, 10  # the training images are not needed
        _, _, domains = data.LOADERS[o.task](o, folder)
        print_table({**about, **evaluate_degia(compute, M, F, domains, folder)})

if __name__ == "__main__":
    exit_on_bad_input(main)
