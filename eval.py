"""Measure a run, apply it to your own images, or repeat the papers' tables.

    python eval.py runs/degia                            measured again, or on other --data, --unseen
    python eval.py runs/degia --images a.png b.png       a digit, or landmarks, each; runs/reg: A aligned to B
    python eval.py align a.png b.png                     A aligned to B, without a run or any training"""
import csv
import json
import re
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import degia
import geomreg
import warp
from flows import bits_per_dim

FORMAT = "degia and geomreg, version 2.2"
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
bfloat16 = any(torch.cpu.get_capabilities().get(f"{unit}_bf16") for unit in ("amx", "avx512"))
if device.type == "cuda":
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)

def autocast():  # bfloat16 for layers where the hardware itself multiplies it; all else stays float32
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

def save_grid(rows, path, outputs=None):  # {label: images in [0, 1]}; outputs[row][column]: (M(x), y)
    columns = min(8, max(map(len, rows.values())))  # more are left out
    width = min(384, 1536 // columns)
    *_, h, w = next(iter(rows.values())).shape
    height = max(1, width * h // w)
    margin = 12 + 7 * max(map(len, rows))
    sheet = Image.new("RGB", (margin + columns * (width + 4), len(rows) * (height + 4)), "white")
    for i, (label, images) in enumerate(rows.items()):
        top = i * (height + 4)
        ImageDraw.Draw(sheet).text((4, top + height // 2), label, "black", anchor="lm", font_size=14)
        pixels = data.to_uint8(images[:8]).expand(-1, 3, -1, -1).movedim(1, -1).cpu().numpy()
        for j, image in enumerate(pixels):
            picture = Image.fromarray(image).resize((width, height), Image.BOX)
            pen = ImageDraw.Draw(picture)
            out, y = outputs[i][j] if outputs else ((), ())  # (): nothing is drawn
            if len(out) == 10:
                colour = "lime" if out.argmax() == y else "red"
                pen.text((4, 0), f"{out.argmax()}", colour, font_size=36, stroke_width=2, stroke_fill="black")
            elif outputs:  # the landmarks of M over the true ones
                for k, point in enumerate(torch.cat([y, out]).view(34, 2) * width):
                    pen.circle(point.tolist(), width // 60, "lime" if k < 17 else "red")
            sheet.paste(picture, (margin + j * (width + 4), top))
    sheet.save(path)

def write_csv(rows, path):  # dicts with the same keys; numbers to six digits
    lines = [[f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, lineterminator="\n").writerows([rows[0], *lines])

def predict(M, images):  # M's output (N, outputs) for uint8 images (N, 3, S, S)
    with autocast():
        return torch.cat([M(data.to_float(part.to(device)))[0].float().cpu() for part in images.split(64)])

@torch.no_grad()
def evaluate_degia(M, F, domains, folder):  # measures of M; F's bits per dim on the source; pictures of both
    results, rows, outputs = {}, {}, []
    for name, (images, y) in domains.items():
        output = predict(M, images)
        if y.is_floating_point():
            error = (output - y).view(-1, 17, 2).norm(dim=2)  # in shares of the side, as both mean squares
            results[name] = {"mse": (output - y).square().mean().item(),
                             "mean_pose": (M.mean_pose.cpu() - y).square().mean().item(),
                             "pixels": error.mean().item() * images.shape[-1],
                             "pck": 100 * (error < 0.05).float().mean().item()}
        else:
            results[name] = {"accuracy": 100 * (output.argmax(1) == y).float().mean().item()}
        rows[name] = images[:8] / 255
        outputs.append(list(zip(output, y)))
    save_grid(rows, folder / "domains.png", outputs)
    if F is None:
        return {"domains": results}
    classes = torch.arange(F.prior.G_m.num_embeddings, device=device).repeat_interleave(8)
    samples = F.sample(classes, torch.Generator(device).manual_seed(0)).split(8)
    save_grid({f"F, class {c}": images for c, images in enumerate(samples)}, folder / "flow.png")
    x, y = (tensor[:2000].to(device) for tensor in domains["source"])  # more of them could need gigabytes
    u = torch.rand(len(x), *F.shape, generator=torch.Generator(device).manual_seed(0), device=device)
    log_p = F.log_prob(data.to_float(x), degia.classes_of(y, M), u)  # in float32, no noise shift of the prior
    return {"domains": results, "bits_per_dim": bits_per_dim(log_p, F.dim).mean().item()}

@torch.no_grad()
def landmark_errors(register, pairs, n=None):
    """Mean distances (7) in pixels, before and after phi = register(I_a, I_b), of all landmarks and those on
    the plant; percent improved of pairs with landmarks; share folded. Also the last phi, I_a, I_b."""
    distances, folded = [], []
    for i in torch.arange(len(pairs.A))[:n].split(25):
        I_a, I_b = (2 * data.to_float(I[i].to(device)) - 1 for I in pairs[:2])
        phi = autocast()(register)(I_a, I_b)  # register(I_a, I_b), run under autocast
        folded.append((warp.jacobian_determinant(phi) <= 0).float().mean((1, 2)))
        p_a, p_b = pairs.points[i].to(device).split(2, dim=2)
        found = warp.warp_points(p_a, phi)
        moved = found.where(~found.isnan(), p_a)  # what phi has no place for has not moved
        distances.append(torch.stack([p_a - p_b, moved - p_b]).norm(dim=3).cpu())
    errors = {"unregistered": {"scene": None}, "registered": {"scene": None}}  # without landmarks
    distances = torch.cat(distances, dim=1)  # (2, pairs, landmarks)
    if not distances.isnan().all():
        for kinds, d in zip(errors.values(), distances):
            kinds["scene"] = d.nanmean(1).nanmean().item()
            if pairs.salient is not None:
                kinds["salient"] = d.where(pairs.salient[:n], torch.nan).nanmean(1).nanmean().item()
        before, after = distances.nanmean(2)  # NaN for a pair without landmarks
        errors["registered"]["improved"] = 100 * (after < before)[~before.isnan()].float().mean().item()
    return {**errors, "folding": torch.cat(folded).mean().item()}, (phi, I_a, I_b)

def evaluate_reg(R, pairs, folder):  # of the test pairs and of 100 training pairs; pairs.png
    results, fields = landmark_errors(R, pairs["test"])
    picture_pairs(*fields, folder / "pairs.png")
    return results | {"registered_train": landmark_errors(R, pairs["train"], 100)[0]["registered"]}

def picture_pairs(phi, I_a, I_b, path):  # figure 4: a column for each of 8 pairs; of one pair, two rows
    moved = warp.resample(I_a, phi, "border")
    places = warp.pixel_grid(*phi.shape[2:], like=phi) + phi
    lines = (places % max(4, phi.shape[3] // 8) < 1.4).any(1, keepdim=True).float()
    rows = {"A": I_a / 2 + 0.5, "B": I_b / 2 + 0.5, "edges": overlay(I_a, I_b), "registered": moved / 2 + 0.5,
            "field": 1 - lines, "after": overlay(moved, I_b)}
    if len(phi) == 1:
        pictures = [images.expand(-1, 3, -1, -1) for images in rows.values()]
        rows = {"before": torch.cat(pictures[:3]), "after": torch.cat(pictures[3:])}
    save_grid(rows, path)

def overlay(I, J):  # edges, of I in red and of J in cyan: white where they meet
    edge = torch.cat([geomreg.edges(I), geomreg.edges(J)]) + 1
    strong = edge.flatten(1).quantile(0.95, 1).clamp_min(1e-6).view(-1, 1, 1, 1)
    red, cyan = (edge / strong).clamp(0, 1).chunk(2)
    return torch.cat([red, cyan, cyan], 1)

def print_table(results):  # of a results.json: a line per domain or set of pairs
    about = "task method backbone order similarity seed steps seconds bits_per_dim folding folding_refined"
    print("\n" + ", ".join(f"{name} {results[name]}" for name in about.split() if name in results))
    for name, numbers in results.get("domains", results).items():
        if isinstance(numbers, dict):
            print(f"  {name:17s}", *(f"{k} {v:8.5f}" for k, v in numbers.items() if v is not None), sep="  ")

def load_checkpoint(folder, program=None):  # it must be of this version and of this program
    path = Path(folder) / "checkpoint.pt"
    with data.blaming(f"{path}: no such checkpoint of this version", "train first, or name another run"):
        content = torch.load(path, map_location=device, weights_only=True)
        if content["format"] != FORMAT or program not in (None, content["config"]["program"]):
            raise ValueError(f"{content['format']}, train.py {content['config']['program']}")
    return content

def read_files(o, M, files, folder):  # print the digits, or write the landmarks in pixels; draw both
    images, sides = data.read_images(files, (o.size, o.size))
    output = predict(M, images)
    found = output.argmax(1) if o.task == "digits" else output
    name = unused(folder, "images", (".png", "_landmarks.csv"))
    save_grid({f"{8 * i + 1}": part / 255 for i, part in enumerate(images.split(8))}, f"{name}.png",
              [[*zip(*parts)] for parts in zip(output.split(8), found.split(8))])  # eight a row
    if o.task == "digits":
        return print(f"written: {name}.png", *map("{}: {}".format, files, found), sep="\n")
    pixels = (output.view(-1, 17, 2) * torch.tensor(sides)[:, None] - 0.5).flatten(1).tolist()
    rows = [{"name": Path(file).name} | dict(zip(data.HAND_COLUMNS, row)) for file, row in zip(files, pixels)]
    write_csv(rows, f"{name}_landmarks.csv")
    print(f"written: {name}.png, {name}_landmarks.csv")

def align_files(register, pair, folder, modes=(None, None)):
    """Write A, from its full size, at the size of B; the field, in pixels of B; a picture to judge it by."""
    if len(pair) != 2:
        raise data.InputError(f"registration takes two files, A and B of a pair, not {len(pair)}; name two")
    A, B = map(data.open_image, pair, modes)
    size = [max(2, round(256 * side / max(256, *B.size))) for side in B.size[::-1]]  # enough for phi
    small = (data.to_tensor(picture.resize(size[::-1], Image.BILINEAR)) for picture in (A, B))
    I_a, I_b = (2 * data.to_float(I[None].to(device)) - 1 for I in small)
    print(f"aligning {pair[0]} to {pair[1]} at {size[1]} x {size[0]} pixels: some seconds")
    phi = autocast()(register)(I_a, I_b)
    gain = 1 - (geomreg.image_unlikeness(I_a, I_b, phi) / geomreg.image_unlikeness(I_a, I_b, 0 * phi)).item()
    found = geomreg.is_match(I_a, I_b, phi, 0 * phi).item()
    phi = phi * found
    print(f"they match {gain:.0%} better than before" if found else "no better match was found: A stays")

    folder.mkdir(parents=True, exist_ok=True)
    name = unused(folder, Path(pair[0]).stem, ("_aligned.png", "_field.npy", "_overlay.png"))
    picture_pairs(phi, I_a, I_b, f"{name}_overlay.png")
    phi = warp.resize_field(phi, B.size[::-1]).cpu()
    np.save(f"{name}_field.npy", phi[0].numpy())
    shares = warp.scaled(warp.pixel_grid(*phi.shape[2:], like=phi) + phi + 0.5, 1 / B.width, 1 / B.height)
    I = data.to_tensor(A)[None].float()
    parts = []
    for rows in shares.split(256, dim=2):  # all at once would need gigabytes
        inside = ((rows > 0) & (rows < 1)).all(1)  # 0 and 1: the edges of A
        parts.append((warp.sample_at(I, warp.scaled(rows, *A.size) - 0.5, "border") * inside).round().byte())
    aligned = torch.cat(parts, dim=2)[0].movedim(0, -1).squeeze(2)
    Image.fromarray(aligned.numpy()).save(f"{name}_aligned.png")
    print(f"written: {name}_aligned.png, {name}_field.npy, {name}_overlay.png")

def unused(folder, stem, endings):  # folder/stem, or folder/stem_2 ...: nothing that is there is replaced
    names = (folder / (stem if k == 1 else f"{stem}_{k}") for k in range(1, 10 ** 6))
    return next(name for name in names if not any(Path(f"{name}{e}").exists() for e in endings))

def tables(args):  # train what is missing of results/papers.csv; mean and deviation over seeds
    papers, lines = Path(__file__).with_name("results") / "papers.csv", []
    rows = csv.DictReader(papers.read_text(encoding="utf-8").splitlines())
    if args.task == "reg" and "--data" in args.others:
        folder = Path(args.others[args.others.index("--data") + 1])
        if not any(folder.glob("t*/landmarks.csv")):
            raise data.InputError(f"{folder}: no landmarks.csv to measure by; add one")
    for row in (r for r in rows if r["task"] == args.task and r["row"].startswith(tuple(args.rows))):
        runs = [*train_row(args, [args.task, *row["options"].split(), *args.others])]
        for measure in runs[0] if runs else ():
            values = [run[measure] for run in runs if measure in run]  # "refined": perhaps of some runs
            mean, std = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else np.nan
            lines.append(row | {"n": len(values), "measure": measure, "mean": mean, "deviation": std})
            print(f"{row['row']}: {measure} {mean:.4g} ± {std:.2g}, n {len(values)} ({row['paper']})")
    if not lines:
        raise data.InputError(f"--rows {args.rows}, --seeds {args.seeds}: no row has ended; try another")
    write_csv(lines, args.out / f"{args.task}.csv")

def train_row(args, options):  # {measure: number} of each seed; rows with equal options share their runs
    for seed in map(str, range(args.seeds)):
        folder = args.out / re.sub(r"[^\w.]+", "_", " ".join(options)) / seed
        words = [Path(__file__).with_name("train.py"), *options, "--seed", seed, "--out", str(folder)]
        words += ["--resume"] if (folder / "checkpoint.pt").exists() else []
        if not (folder / "results.json").exists():
            print("python train.py", *words[1:], flush=True)
            subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL)
        if (folder / "results.json").exists():  # else train.py said why
            with data.blaming(f"{folder}/results.json: damaged", "remove it"):
                results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            measured = {f"{name} {kind}": number for name, found in results.get("domains", results).items()
                        if isinstance(found, dict) for kind, number in found.items() if number is not None}
            unseen = [[*found.values()][0] for found in results.get("domains", {}).values()][1:]
            yield measured | ({"unseen": np.mean(unseen)} if unseen else {})  # [1:]: all but the source

def exit_on_bad_input(main):  # what a user or the system can mend: one line, exit code 2; not our bugs
    sys.stdout.reconfigure(errors="replace")  # of a terminal without ±
    try:
        main(sys.argv[1:])
    except Exception as error:
        message = " ".join(str(error).splitlines()[:2])
        if re.search("MemoryError|No space left|allocate memory|out of memory", repr(error)):
            message += "; make room on the disk, or choose a smaller size or --batch"
        elif not isinstance(error, (data.InputError, OSError)):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)

def parse(argv):
    parser = ArgumentParser(None, SUPPRESS, __doc__, formatter_class=RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", help="folder of a trained run, or: align A B, tables degia, tables reg")
    if argv[:1] == ["tables"]:
        parser.add_argument("task", choices=("degia", "reg"), help="whose; unknown options go to train.py")
        parser.add_argument("--rows", nargs="+", default=[""], help="how their names begin: 2 for table 2")
        parser.add_argument("--seeds", type=int, default=1, help="runs of each row")
        parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of all these runs")
        args, others = parser.parse_known_args(argv)
        return Namespace(**vars(args), others=others)
    parser.add_argument("--data", help="measure on this data; align: on its test pairs, at 128x96")
    if argv[:1] == ["align"]:
        parser.add_argument("images", nargs="*", help="A and B, without any training")
        parser.add_argument("--out", type=Path, default=Path("runs/align"), help="folder of the results")
    else:
        parser.add_argument("--unseen", nargs="+", help="measure on these unseen domains")
        parser.add_argument("--images", nargs="+", help="apply the run to these image files")
        parser.add_argument("--refine", action="store_true", help="measure phi refined for each pair, too")
    return parser.parse_args(argv)

@torch.no_grad()
def main(argv):
    args = parse(argv)
    if args.run == "tables":
        return tables(args)
    if args.run == "align" and args.data:
        pairs = data.read_pairs(Path(args.data, "test"), (96, 128), {"A": None, "B": None})
        return print_table(landmark_errors(geomreg.optimise, pairs)[0])
    if args.run == "align":
        return align_files(geomreg.optimise, args.images, args.out)
    folder, checkpoint = Path(args.run), load_checkpoint(args.run)
    o = Namespace(**checkpoint["config"] | {name: given for name, given in vars(args).items() if given})
    if o.program == "reg":
        modes = checkpoint["extra"]
        R, *_ = geomreg.build(o, len(modes["A"]), len(modes["B"]))  # "RGB" has three channels, "L" one
        R.to(device, memory_format=torch.channels_last).load_state_dict(checkpoint["state"]["R"])
        def refined(I_a, I_b):  # the better of two: from R's phi, found at the size that R knows; from 0
            small = (torch.nn.functional.adaptive_avg_pool2d(I, (o.height, o.width)) for I in (I_a, I_b))
            start = warp.resize_field(R(*small), I_b.shape[2:])
            fields = [geomreg.optimise(I_a, I_b, start), geomreg.optimise(I_a, I_b)]
            return geomreg.best_of(fields, [geomreg.image_unlikeness(I_a, I_b, phi) for phi in fields])
        if args.images:
            return align_files(refined, args.images, folder, modes.values())
        pairs, _ = data.load_pairs(o, modes)
        measured = evaluate_reg(R, pairs, folder)
        if args.refine:
            errors, _ = landmark_errors(refined, pairs["test"])
            measured |= {"refined": errors["registered"], "folding_refined": errors["folding"]}
            kept = folder / "results.json"  # of a run that has ended
            if kept.exists() and not args.data:
                kept.write_text(json.dumps(json.loads(kept.read_text()) | measured, indent=1) + "\n")
    else:
        M, F = degia.build(o)
        M.to(device, memory_format=torch.channels_last).load_state_dict(checkpoint["state"]["M"])
        if F is not None:
            F.to(device).load_state_dict(checkpoint["state"]["F"])
        if args.images:
            return read_files(o, M, args.images, folder)
        measured = evaluate_degia(M, F, data.LOADERS[o.task](o)[2], folder)
    print_table({**checkpoint["config"], "steps": checkpoint["step"], **measured})

if __name__ == "__main__":
    exit_on_bad_input(main)
