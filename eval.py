"""Measure a run; `eval.py RUN --images A`: apply it to images; `eval.py tables reg`: the papers' tables."""
import argparse, csv, json, os, re, shlex, subprocess, sys, zlib
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageDraw
import data, degia, flows, geomreg, warp

FORMAT = "degia and geomreg, 6"

# ---------------------------------------------------------------- pictures
def grid(rows, labels, path, scale=2, captions=None, points=None):
    """Write labelled rows of images (C,H,W) in [0,1], captions (text, right) or green and red points."""
    height, width = (side * scale for side in rows[0][0].shape[-2:])
    margin, step = 10 + 8 * max(map(len, labels)), height + (22 if captions else 4)
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (width + 4), len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (row, label) in enumerate(zip(rows, labels)):
        pen.text((4, i * step + height // 2 - 8), label, "black", font_size=14)
        for j, image in enumerate(row):
            x, y = margin + j * (width + 4), i * step
            pixels = data.to_uint8(image).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
            sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y))
            text, right = captions[i][j] if captions else ("", True)
            pen.text((x + 2, y + height), text, (0, 110, 0) if right else (200, 0, 0), font_size=14)
            for colour, dots in zip(((0, 200, 0), (230, 0, 0)), points[i][j] if points else ()):
                for p_x, p_y in dots:
                    pen.circle((x + p_x * width, y + p_y * height), 2, colour)
    sheet.save(path)
def write_csv(rows, path):
    """Write rows, dicts with the same keys, with a header."""
    lines = [",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()) for row in rows]
    path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
def plot(logs, columns, path, width=460, height=280, colours=("blue", "crimson", "green")):
    """Write a panel per column there is, over `step`: a line for each {label: log.csv} and its last value."""
    tables = [np.atleast_1d(np.genfromtxt(log, delimiter=",", names=True)) for log in logs.values()]
    rows = np.concatenate(tables)
    sheet, end = Image.new("RGB", (2 * width, (len(columns) + 1) // 2 * height), "white"), rows["step"].max()
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(name for name in columns if name in rows.dtype.names):
        low, high = rows[name].min(), np.quantile(rows[name], .97)  # a jump may leave the panel
        left, top = i % 2 * width + 16, i // 2 * height + 50
        right, bottom = left + width - 32, top + height - 64
        pen.rectangle((left, top, right, bottom), outline=(170, 170, 170))
        pen.text((left, top - 42), f"{name}: axis {low:.4g} to {high:.4g}, {end:g} steps", 0, font_size=13)
        for k, (label, table) in enumerate(zip(logs, tables)):
            x = left + (right - left) * table["step"] / end
            y = bottom - (bottom - top) * (table[name].clip(max=high) - low) / max(high - low, 1e-9)
            pen.line([*zip(x, y)], fill=colours[k], width=2, joint="curve")
            pen.text((left + 130 * k, top - 22), f"{label} {table[name][-1]:.4g}", colours[k], font_size=13)
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
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
    def images(self, x):
        """uint8 images as float in [0,1] on the device, channels last."""
        return (x.to(self.device).float() / 255).contiguous(memory_format=torch.channels_last)

@torch.no_grad()
def predict(M, images, compute):
    """M's output (N,outputs) for uint8 images (N,3,S,S)."""
    parts = images.split(max(1, 2 ** 19 // images.shape[-1] ** 2))
    with compute.autocast():
        return torch.cat([M.eval()(compute.images(part))[0].float().cpu() for part in parts])

@torch.no_grad()
def evaluate_degia(compute, M, F, domains, folder):
    """Per domain accuracy of digits in percent; MSE of landmarks (shares) and of the mean pose, pixels, PCK:
    percentage within 5 %. Mean bits per dimension of F on the source: float32, prior without noise shift."""
    results, captions, points = {"domains": {}}, [], []
    for name, (images, y) in domains.items() if M else ():
        output = predict(M, images, compute)
        if y.is_floating_point():
            error = torch.linalg.vector_norm((output - y).view(-1, 17, 2), dim=2)
            mse, mean_pose = ((pose - y).square().mean().item() for pose in (output, M.template.cpu()))
            pixels, pck = error.mean().item() * images.shape[-1], 100 * (error < .05).float().mean().item()
            results["domains"][name] = {"mse": mse, "pixels": pixels, "mean pose": mean_pose, "pck": pck}
            points.append(torch.stack([y, output], 1)[:16].unflatten(2, (17, 2)).tolist())
        else:
            accuracy = 100 * (output.argmax(1) == y).float().mean().item()
            results["domains"][name] = {"accuracy": accuracy}
            captions.append([(f"{s} ({t})", s == t) for s, t in zip(output.argmax(1), y[:16])])
    if M:
        labels = [f"{n} {[*row.values()][-1]:.1f} {[*row][-1]}" for n, row in results["domains"].items()]
        grid([x[:16] / 255 for x, _ in domains.values()], labels, folder / "domains.png", 2, captions, points)
    if F:
        images, y = domains["source"]
        total, gen = 0., torch.Generator(compute.device).manual_seed(0)
        for x, c in zip(images.split(500), degia.classes_of(y, F).split(500)):
            u = torch.rand(len(x), *F.shape, generator=gen, device=compute.device)
            log_p = F.log_prob(degia.flow_view(compute.images(x), F.shape), c.to(compute.device), u)
            total += flows.bits_per_dim(log_p, F.dim).sum().item()
        results["bits_per_dim"] = round(total / len(images), 4)
        classes = torch.arange(len(F.poses), device=compute.device).repeat_interleave(12)
        rows = F.sample(classes, gen.manual_seed(0)).split(12)
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
            distances.append((torch.stack([p_a, warp.warp_points(p_a, phi)]) - p_b).norm(dim=-1).cpu())
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
        return torch.lerp(image.mean(1, True) / 4 + .5, edge.new_tensor([[[1.]], [[.1]], [[.1]]]), edge)
    moved, longest = warp.resample(I_a, phi), torch.linalg.vector_norm(phi, dim=1).max().item()
    rows = {"A": I_a / 2 + .5, "B": I_b / 2 + .5, "A registered": moved / 2 + .5,
            f"field, up to {longest:.1f} px": warp.colour_wheel(phi, longest),
            "B, edges of A": overlay(I_b, I_a), "after": overlay(I_b, moved)}
    scale = max(1, (128 if len(phi) > 1 else 384) // phi.shape[-1])
    grid([images[:8] for images in rows.values()], list(rows), path, scale)
def print_table(results):
    """What results.json says of a run, and its numbers, a line per domain or set of pairs."""
    about = "task method backbone order similarity seed steps seconds bits_per_dim folding".split()
    print("\n" + ", ".join(f"{name} {results[name]}" for name in about if name in results))
    sets = {name: value for name, value in results.items() if isinstance(value, dict)}
    for name, numbers in {**sets.pop("domains", {}), **sets}.items():
        print(f"  {name:17s}", *(f"{k} {v:8.5f}" for k, v in numbers.items() if v is not None), sep="  ")

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
    z, w = map(torch.view_as_complex, (p, q))  # w = a z + b: a turns and scales, b shifts
    a, b = torch.linalg.lstsq(torch.stack([z, torch.ones_like(z)], 1), w[:, None]).solution
    return torch.view_as_real(torch.cat([a, 1j * a, b])).T
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

# ---------------------------------------------------------------- the papers' tables
def numbers_of(results):
    """{column: number} of a results.json: accuracy or MSE of each domain; landmark errors in pixels."""
    if "domains" in results:
        numbers = {name: next(iter(values.values())) for name, values in results["domains"].items()}
        return {**numbers, "unseen": np.mean([*numbers.values()][1:] or np.nan)}
    sets = {"": "registered", "train ": "registered_train", "before ": "unregistered"}
    return {mark + kind: v for mark, key in sets.items() for kind, v in results[key].items() if v is not None}
def tables(args):
    """Train the rows of figures/papers.csv that are not trained yet; rows with the same options share a run.
    Print and write mean and deviation over the seeds there are; figure 5. One call at a time."""
    here, others, missing, lines = Path(__file__).parent, shlex.join(args.others), {}, []
    rows = csv.DictReader((here / "figures" / "papers.csv").read_text().splitlines())
    rows = [r for r in rows if r.pop("task") == args.task and r["row"].startswith(tuple(args.rows))]
    for row in rows:
        row["options"] = f"{args.task} {row['options']}".strip()
        name = re.sub(r"[^\w.]+", "_", row["options"]) + f"_{zlib.crc32(others.encode()):x}" * (others != "")
        row |= {"options": f"{row['options']} {others}".strip(), "folder": args.out / name}
        folders = [row["folder"] / str(seed) for seed in range(args.seeds)]
        missing |= {folder: row["options"] for folder in folders if not (folder / "results.json").exists()}
    for i, (folder, words) in enumerate(missing.items(), 1):
        words += f" --seed {folder.name} --out {shlex.quote(str(folder))}"
        words += " --resume" * (folder / "checkpoint.pt").exists()
        print(f"run {i} of {len(missing)}: python train.py {words}", flush=True)
        script = [sys.executable, here / "train.py", *shlex.split(words)]
        if subprocess.run(script, stdout=subprocess.DEVNULL).returncode and not folder.exists():
            raise ValueError(f"{folder}: this run did not even start, for the reason above; correct it")

    rows = [row for row in rows if [*row["folder"].glob("*/results.json")]]
    logs = {row["row"][2:]: min(row["folder"].glob("*/log.csv")) for row in rows if row["row"][:2] == "5 "}
    for row in rows:
        runs = [json.loads(path.read_text()) for path in sorted(row.pop("folder").glob("*/results.json"))]
        row |= {"n": len(runs), "seconds": np.mean([run["seconds"] for run in runs])}
        values = np.array([list(numbers_of(run).values()) for run in runs])
        deviations = values.std(0, ddof=1) if len(runs) > 1 else np.nan * values[0]
        cells = list(zip(numbers_of(runs[0]), values.mean(0), deviations))
        shown = [f"{name} {mean:6.4g}" + f" ± {d:<5.2g}" * (len(runs) > 1) for name, mean, d in cells]
        print(f"{row['row']:36} n {len(runs)}", *shown, f"{row['seconds']:.0f} s, paper {row['paper']}")
        lines += [{**row, **dict(zip(("measure", "mean", "deviation"), cell))} for cell in cells]
    if not lines:
        raise ValueError(f"nothing to show: no row of figures/papers.csv named {args.rows}... has a result")
    write_csv(lines, args.out / f"{args.task}.csv")
    if logs:
        plot(logs, ("error", "recon", "D", "gan"), args.out / "figure_5.png")

def exit_on_bad_input(main):
    """Run main(argv); a ValueError or OSError becomes one line and exit code 2, Ctrl-C one and 1."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        os._exit(2) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; train.py goes on with --resume, tables with the same command")
def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    if argv[:1] == ["tables"]:
        parser.add_argument("tables", help="the papers' tables; options not named here go to train.py")
        parser.add_argument("task", choices=("degia", "reg"))
        parser.add_argument("--rows", nargs="+", default=[""], help="how the rows' names begin; 2: table 2")
        parser.add_argument("--seeds", type=int, default=1, help="runs of each row")
        parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of all these runs")
        args, others = parser.parse_known_args(argv)
        if {"--seed", "--resume", "--stop-after"} & {*others}:
            parser.error("--seed, --resume and --stop-after are chosen here; ask for more --seeds")
        return argparse.Namespace(**vars(args), others=others)
    parser.add_argument("run", help="folder of a trained run, or: tables degia, tables reg")
    parser.add_argument("--data", help="measure on this data (of hands on every 10th image; --unseen: all)")
    parser.add_argument("--unseen", nargs="+", help="measure on these unseen domains")
    parser.add_argument("--images", nargs="+", help="apply the run to these image files")
    return parser.parse_args(argv)
def main(argv):
    args = parse(argv)
    if "tables" in args:
        return tables(args)
    folder, checkpoint = Path(args.run), load_checkpoint(args.run)
    o, compute = argparse.Namespace(**checkpoint["config"]), Compute(checkpoint["config"]["dtype"])
    if checkpoint["task"] == "degia":
        nets = {name: net for name, net in zip("MF", degia.build(o)) if name in degia.TRAINED[o.method]}
    else:
        reading = {side: (int(how[0]), *how[1:].tolist()) for side, how in checkpoint["extra"].items()}
        nets = geomreg.build(o, reading["A"][0], reading["B"][0])
    for name, net in nets.items():
        net.to(compute.device, memory_format=torch.channels_last).load_state_dict(checkpoint["state"][name])
    M, F, R = map(nets.get, "MFR")
    o.data, o.unseen = args.data or o.data, args.unseen or getattr(o, "unseen", [])
    if args.images and R:
        return align_files(o, compute, R, reading, args.images, folder)
    if args.images and M:
        return read_files(o, compute, M, args.images, folder)
    if args.images or args.unseen and R:
        raise ValueError(f"{folder}: its networks, {', '.join(nets)}, cannot do that; name another run")
    if R:
        measured = evaluate_reg(compute, R, data.load_pairs(o, folder, reading)[0], folder)
    else:
        o.validate, o.train = o.validate and not args.unseen, 10  # the training images are not needed
        measured = evaluate_degia(compute, M, F, data.LOADERS[o.task](o, folder)[2], folder)
    print_table({**checkpoint["config"], "task": checkpoint["task"], "steps": checkpoint["step"], **measured})

if __name__ == "__main__":
    exit_on_bad_input(main)
