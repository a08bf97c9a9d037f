"""Measure a run, apply it to your own images, or repeat the papers' tables.

    python eval.py runs/degia                              its numbers and pictures once more
    python eval.py runs/mnist --unseen mnist_m             on domains that it has never seen
    python eval.py runs/degia --images a.png b.png         the digit on each image; runs/hands: landmarks
    python eval.py runs/reg --images a.png b.png           A aligned to B
    python eval.py tables reg --seeds 3                    the tables of a paper, row by row
"""
import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import degia
import geomreg
import warp
from data import InputError
from flows import bits_per_dim

FORMAT = "degia and geomreg, version 2"
COLOURS = ("blue", "crimson", "green", "darkorange")

# ---------------------------------------------------------------- what everything computes on
device = torch.device("cpu")
capable = torch.cpu.get_capabilities()
bfloat16 = bool(capable.get("amx_bf16") or capable.get("avx512_bf16"))  # elsewhere a CPU would only emulate it
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)

def autocast():
    """bfloat16 for convolutions and full layers where the hardware multiplies it; all else stays float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

# ---------------------------------------------------------------- pictures
def to_picture(image, scale=1):
    """An image (C, H, W) in [0, 1] as a Pillow picture, its pixels enlarged to squares."""
    pixels = data.to_uint8(image).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels).resize((scale * pixels.shape[1], scale * pixels.shape[0]), Image.Resampling.NEAREST)

def save_grid(rows, path, captions=None):
    """Write rows {label: [Pillow picture, ...]}, all of one size; captions {label: [(text, colour), ...]}."""
    width, height = next(iter(rows.values()))[0].size
    margin = 12 + 8 * max(map(len, rows))
    step = height + (22 if captions else 4)
    sheet = Image.new("RGB", (margin + max(map(len, rows.values())) * (width + 4), len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (label, pictures) in enumerate(rows.items()):
        pen.text((4, i * step + height // 2 - 8), label, "black", font_size=14)
        for j, picture in enumerate(pictures):
            sheet.paste(picture, (margin + j * (width + 4), i * step))
            if captions:
                text, colour = captions[label][j]
                pen.text((margin + j * (width + 4) + 2, i * step + height), text, colour, font_size=14)
    sheet.save(path)

def draw_points(picture, points, colour):
    """Draw points (P, 2), shares of the sides, on a picture."""
    for x, y in points.tolist():
        ImageDraw.Draw(picture).circle((x * picture.width, y * picture.height), max(2, picture.width // 64), colour)

def write_csv(rows, path):
    """Write rows, dicts with the same keys, with a header; numbers to six digits."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})

def plot(logs, path, columns=None, width=460, height=280):
    """Write a panel for each column of {label: log.csv} over the steps: a line for each log, its last value."""
    tables = [np.atleast_1d(np.genfromtxt(log, delimiter=",", names=True)) for log in logs.values()]
    names = [name for name in tables[0].dtype.names if name not in ("step", "seconds")]
    names = [name for name in columns or names if name in names]
    sheet = Image.new("RGB", (2 * width, (len(names) + 1) // 2 * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        left, top = i % 2 * width + 16, i // 2 * height + 50
        right, bottom = left + width - 32, top + height - 64
        low = min(table[name].min() for table in tables)
        high = max(np.quantile(table[name], 0.97) for table in tables)  # a jump may leave the panel
        pen.rectangle((left, top, right, bottom), outline="grey")
        pen.text((left, top - 42), f"{name}: axis {low:.4g} to {high:.4g}", "black", font_size=13)
        for k, (label, table, colour) in enumerate(zip(logs, tables, COLOURS)):
            x = left + (right - left) * table["step"] / table["step"][-1]
            y = bottom - (bottom - top) * (table[name].clip(low, high) - low) / max(high - low, 1e-9)
            pen.line([*zip(x, y)], colour, 2)
            pen.text((left + 130 * k, top - 22), f"{label} {table[name][-1]:.4g}", colour, font_size=13)
    sheet.save(path)

# ---------------------------------------------------------------- DeGIA
@torch.no_grad()
def predict(M, images):
    """M's output (N, outputs) for uint8 images (N, 3, S, S)."""
    parts = images.split(max(1, 2 ** 19 // images.shape[-1] ** 2))
    with autocast():
        return torch.cat([M(data.to_float(part.to(device)))[0].float().cpu() for part in parts])

def evaluate_degia(M, F, domains, folder):
    """{"domains": {name: measures}} and the bits per dimension of the source; pictures of what M says and F makes.

    Digits: accuracy in percent. Landmarks: mse of coordinates in shares of the side, and that of the mean training
    pose; mean distance in pixels; pck, the percentage of landmarks within 5 % of the side.
    """
    results, rows, captions = {}, {}, {}
    for name, (images, y) in domains.items():
        output = predict(M, images)
        if y.is_floating_point():
            error = (output - y).view(-1, 17, 2).norm(dim=2)
            results[name] = {
                "mse": (output - y).square().mean().item(),
                "mean_pose": (M.mean_pose.cpu() - y).square().mean().item(),
                "pixels": error.mean().item() * images.shape[-1],
                "pck": 100 * (error < 0.05).float().mean().item()}
            pictures = [to_picture(image / 255, scale=2) for image in images[:12]]
            for picture, true, found in zip(pictures, y.view(-1, 17, 2), output.view(-1, 17, 2)):
                draw_points(picture, true, (0, 200, 0))
                draw_points(picture, found, (230, 0, 0))
            label = f"{name}: {results[name]['pck']:.0f} % PCK"
        else:
            right = output.argmax(1) == y
            results[name] = {"accuracy": 100 * right.float().mean().item()}
            pictures = [to_picture(image / 255, scale=2) for image in images[:12]]
            label = f"{name}: {results[name]['accuracy']:.1f} %"
            captions[label] = [(f"{said.item()}", "green" if true else "red")
                               for said, true in zip(output.argmax(1)[:12], right)]
        rows[label] = pictures
    save_grid(rows, folder / "domains.png", captions)
    if F is None:
        return {"domains": results}
    samples = F.sample(torch.arange(len(F.poses), device=device).repeat_interleave(12)).split(12)
    rows = {f"F, class {c}": [to_picture(x, max(2, 56 // F.shape[1])) for x in row] for c, row in enumerate(samples)}
    save_grid(rows, folder / "flow.png")
    return {"domains": results, "bits_per_dim": density(F, *domains["source"])}

@torch.no_grad()
def density(F, images, y):
    """Mean bits per dimension of images under F: in float32, the prior without noise shift."""
    gen = torch.Generator(device).manual_seed(0)
    bits = []
    for x, c in zip(images.split(500), degia.classes_of(y, F).split(500)):
        u = torch.rand(len(x), *F.shape, generator=gen, device=device)
        x = degia.flow_view(data.to_float(x.to(device)), F.shape)
        bits.append(bits_per_dim(F.log_prob(x, c.to(device), u), F.dim))
    return torch.cat(bits).mean().item()

def picture_new_samples(x_src, pool, per_round, path):
    """Write, for each max round, source images above the new samples that grew from them."""
    rows = {}
    for i in range(0, len(pool["x"]), per_round):
        number = i // per_round + 1
        shown = slice(i, min(i + 12, i + per_round))
        rows[f"source {number}"] = [to_picture(x / 255, 2) for x in x_src[pool["source"][shown]]]
        rows[f"round {number}"] = [to_picture(x / 255, 2) for x in pool["x"][shown]]
    save_grid(rows, path)

# ---------------------------------------------------------------- registration
@torch.no_grad()
def register(R, A, B):
    """phi, I_a and I_b of uint8 images A and B."""
    I_a, I_b = (2 * data.to_float(I.to(device)) - 1 for I in (A, B))
    with autocast():
        return R(I_a, I_b), I_a, I_b

def landmark_errors(R, pairs, most=10 ** 6):
    """Eq. (7): the mean landmark distance in pixels, before and after, of the first pairs; the share of pixels where
    the field folds; the last field and its images. "scene": all landmarks, "salient": those on the plant."""
    before, after, folded = [], [], []
    for i in torch.arange(min(most, len(pairs.A))).split(25):
        phi, I_a, I_b = register(R, pairs.A[i], pairs.B[i])
        folded.append((warp.jacobian_determinant(phi) <= 0).float().mean((1, 2)))
        if pairs.points is not None:
            p_a, p_b = pairs.points[i].to(device).split(2, dim=2)
            moved = warp.warp_points(p_a, phi)
            moved = torch.where(moved.isnan(), p_a, moved)  # what the field has no place for has not moved
            before.append((p_a - p_b).norm(dim=2).cpu())
            after.append((moved - p_b).norm(dim=2).cpu())
    folding = torch.cat(folded).mean().item()
    return mean_errors(before, pairs), mean_errors(after, pairs), folding, (phi, I_a, I_b)

def mean_errors(distances, pairs):
    """The mean over pairs of the mean over the landmarks of each; None where there are none."""
    if not distances:
        return {"scene": None}
    distances = torch.cat(distances)
    errors = {"scene": distances.nanmean(1).nanmean().item()}
    if pairs.salient is not None:
        on_plant = distances.masked_fill(~pairs.salient[:len(distances)], torch.nan)
        errors["salient"] = on_plant.nanmean(1).nanmean().item()
    return errors

def watch(R, pairs):
    """For the log: the landmark error of 25 training pairs, which never trains anything."""
    if pairs.points is None:
        return {}
    return {"error": landmark_errors(R, pairs, 25)[1]["scene"]}

def evaluate_reg(R, pairs, folder):
    """Landmark errors on test pairs and on the first 100 training pairs, folding; pairs.png."""
    before, after, folding, fields = landmark_errors(R, pairs["test"])
    picture_pairs(*fields, folder / "pairs.png")
    _, after_train, _, _ = landmark_errors(R, pairs["train"], 100)
    return {"unregistered": before, "registered": after, "registered_train": after_train, "folding": folding}

def picture_pairs(phi, I_a, I_b, path):
    """Write figure 4, a column for each of up to 8 pairs."""
    phi, I_a, I_b = phi[:8], I_a[:8], I_b[:8]
    moved = warp.resample(I_a, phi)
    longest = warp.norm(phi).max().item()
    rows = {
        "A": I_a / 2 + 0.5,
        "B": I_b / 2 + 0.5,
        "A registered": moved / 2 + 0.5,
        f"field, up to {longest:.1f} px": warp.colour_wheel(phi, longest),
        "B, edges of A": overlay(I_b, I_a),
        "after": overlay(I_b, moved)}
    scale = max(1, (128 if len(phi) > 1 else 384) // phi.shape[3])
    save_grid({label: [to_picture(image, scale) for image in images] for label, images in rows.items()}, path)

def overlay(image, outline):
    """The image in grey with the strongest edges of another one in red."""
    edge = geomreg.edges(outline) + 1
    strong = edge.flatten(1).quantile(0.9, dim=1).clamp_min(1e-6).view(-1, 1, 1, 1)
    red = torch.tensor([1.0, 0.1, 0.1], device=image.device).view(1, 3, 1, 1)
    return torch.lerp(image.mean(1, keepdim=True) / 4 + 0.5, red, (edge / strong - 0.7).clamp(0, 1))

def print_table(results):
    """What results.json says of a run, and its numbers, a line per domain or set of pairs."""
    about = "task method backbone order similarity seed steps seconds bits_per_dim folding".split()
    print("\n" + ", ".join(f"{name} {results[name]}" for name in about if name in results))
    sets = {name: value for name, value in results.items() if isinstance(value, dict)}
    for name, numbers in {**sets.pop("domains", {}), **sets}.items():
        print(f"  {name:17s}", *(f"{k} {v:8.5f}" for k, v in numbers.items() if v is not None), sep="  ")

# ---------------------------------------------------------------- your own images
def load_checkpoint(folder, program=None):
    """The content of folder/checkpoint.pt, on the CPU."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint; name the folder of a run that has been trained")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        known = content["format"] == FORMAT
    except Exception as error:  # what a foreign file makes the unpickler raise depends on its bytes
        raise InputError(f"{path}: not a checkpoint of ours ({type(error).__name__}); name a run") from None
    if not known:
        raise InputError(f"{path}: not a checkpoint of this version; train again")
    if program and content["config"]["program"] != program:
        raise InputError(f"{path}: of `train.py {content['config']['program']}`, not {program}; choose another --out")
    return content

def read_files(o, M, files, folder):
    """Print the digit on each image; of hands write the landmarks, in pixels, to landmarks.csv. images.png."""
    pictures = [data.open_image(file) for file in files]
    output = predict(M, data.read_images(files, (o.size, o.size)))
    shown = [picture.resize((256, 256)) for picture in pictures]
    if o.task == "digits":
        digits = [str(digit) for digit in output.argmax(1).tolist()]
        print(*(f"{file}: {digit}" for file, digit in zip(files, digits)), sep="\n")
        save_grid({"": shown}, folder / "images.png", {"": [(digit, "black") for digit in digits]})
    else:
        table = []
        for file, picture, small, found in zip(files, pictures, shown, output.view(-1, 17, 2)):
            draw_points(small, found, (230, 0, 0))
            pixels = (found * torch.tensor(picture.size) - 0.5).flatten().tolist()
            names = [f"{axis}{i}" for i in range(17) for axis in "xy"]
            table.append({"name": Path(file).name, **dict(zip(names, pixels))})
        write_csv(table, folder / "landmarks.csv")
        save_grid({"": shown}, folder / "images.png")
        print(f"written: {folder}/landmarks.csv")
    print(f"written: {folder}/images.png")

def align_files(o, modes, R, files, folder):
    """Write A aligned to B at B's size, sampled from A as it is stored; the field in pixels of B; overlays."""
    if len(files) != 2:
        raise InputError(f"--images: a registration takes two files, A and B of a pair, not {len(files)}")
    A, B = (data.open_image(file, modes[side]) for file, side in zip(files, "AB"))
    small = [data.read_images([file], (o.height, o.width), modes[side]) for file, side in zip(files, "AB")]
    phi, I_a, I_b = register(R, *small)
    name = str(folder / Path(files[0]).stem)
    picture_pairs(phi, I_a, I_b, f"{name}_overlay.png")

    phi = warp.resize_field(phi, B.size[::-1])
    places = warp.pixel_grid(*phi.shape[2:], like=phi) + phi + 0.5  # in B's pixels, then in A's:
    places = warp.scaled(places, A.width / B.width, A.height / B.height) - 0.5
    aligned = warp.sample_at(data.to_tensor(A)[None].to(phi), places)[0].round().byte().cpu()
    Image.fromarray(aligned.permute(1, 2, 0).squeeze(2).numpy()).save(f"{name}_aligned.png")
    np.save(f"{name}_field.npy", phi[0].cpu().numpy())
    print(f"written: {name}_aligned.png, {name}_field.npy, {name}_overlay.png")

# ---------------------------------------------------------------- the papers' tables
def numbers_of(results):
    """{column: number} of a results.json: accuracy or mse of each domain; landmark errors in pixels."""
    if "domains" in results:
        numbers = {name: list(measures.values())[0] for name, measures in results["domains"].items()}
        unseen = [number for name, number in numbers.items() if name != "source"]
        return {**numbers, "unseen": np.mean(unseen)} if unseen else numbers
    numbers = {}
    for mark, key in (("", "registered"), ("train ", "registered_train"), ("before ", "unregistered")):
        numbers |= {mark + kind: number for kind, number in results[key].items() if number is not None}
    return numbers

def tables(args):
    """Train the rows of results/papers.csv that are not trained yet; rows with the same options share a run. Print and
    write mean and deviation over the seeds there are; figure 5."""
    with open(Path(__file__).parent / "results" / "papers.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == args.task]
    rows = [row for row in rows if row["row"].startswith(tuple(args.rows))]
    if not rows:
        raise InputError(f"--rows: no row of results/papers.csv begins with {' or '.join(args.rows)}")
    lines, logs = [], {}
    for row in rows:
        options = [*row["options"].split(), *args.others]
        name = re.sub(r"[^\w.]+", "_", " ".join([args.task, *options]))
        runs = []
        for seed in range(args.seeds):
            folder = args.out / name / str(seed)
            if not (folder / "results.json").exists():
                words = [args.task, *options, "--seed", str(seed), "--out", str(folder)]
                if (folder / "checkpoint.pt").exists():
                    words.append("--resume")
                print("python train.py", shlex.join(words), flush=True)
                subprocess.run([sys.executable, Path(__file__).with_name("train.py"), *words], stdout=subprocess.DEVNULL)
            if (folder / "results.json").exists():  # else it says why, and the other rows go on
                runs.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
                if row["row"].startswith("5 "):
                    logs.setdefault(row["row"][2:], folder / "log.csv")
        if runs:
            lines += show_row(row, runs)
    if not lines:
        raise InputError("nothing to show: no run ended, for the reasons above")
    write_csv(lines, args.out / f"{args.task}.csv")
    if logs:
        plot(logs, args.out / "figure_5.png", ("error", "recon", "D", "gan"))

def show_row(row, runs):
    """Print a row of a table, and return its lines for the csv, one for each measure."""
    numbers = [numbers_of(run) for run in runs]
    lines, cells = [], []
    for name in numbers[0]:
        values = np.array([run[name] for run in numbers])
        deviation = values.std(ddof=1) if len(runs) > 1 else float("nan")
        cells.append(f"{name} {values.mean():.4g}" + (f" ± {deviation:.2g}" if len(runs) > 1 else ""))
        seconds = float(np.mean([run["seconds"] for run in runs]))
        lines.append({**row, "n": len(runs), "seconds": seconds, "measure": name, "mean": float(values.mean()),
                      "deviation": float(deviation)})
    print(f"{row['row']:36} n {len(runs)}  {',  '.join(cells)}  (paper: {row['paper'] or '-'})")
    return lines

# ---------------------------------------------------------------- the command line
def exit_on_bad_input(main):
    """Run main(argv); what a user can mend becomes one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        os._exit(2) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; train.py goes on with --resume, tables with the same command")

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    if argv[:1] == ["tables"]:
        parser.add_argument("tables")
        parser.add_argument("task", choices=("degia", "reg"), help="whose tables; unknown options go to train.py")
        parser.add_argument("--rows", nargs="+", default=[""], help="how the rows' names begin: 2 for table 2")
        parser.add_argument("--seeds", type=int, default=1, help="runs of each row")
        parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of all these runs")
        args, others = parser.parse_known_args(argv)
        return argparse.Namespace(**vars(args), others=others)
    parser.add_argument("run", help="folder of a trained run, or: tables degia, tables reg")
    parser.add_argument("--data", help="measure on this data")
    parser.add_argument("--unseen", nargs="+", help="measure on these unseen domains")
    parser.add_argument("--images", nargs="+", help="apply the run to these image files")
    return parser.parse_args(argv)

def main(argv):
    args = parse(argv)
    if "tables" in args:
        return tables(args)
    folder, checkpoint = Path(args.run), load_checkpoint(args.run)
    o, state = argparse.Namespace(**checkpoint["config"]), checkpoint["state"]
    o.data = args.data or o.data
    if o.program == "reg":
        modes = {side: checkpoint["extra"][side] for side in "AB"}
        R = geomreg.build(o, len(modes["A"].replace("L", "1")), len(modes["B"].replace("L", "1")))["R"]
        R.to(device, memory_format=torch.channels_last).load_state_dict(state["R"])
        if args.images:
            return align_files(o, modes, R, args.images, folder)
        pairs, _ = data.load_pairs(o, modes)
        measured = evaluate_reg(R, pairs, folder)
    else:
        o.unseen = args.unseen or o.unseen
        M, F = degia.build(o)
        M.to(device, memory_format=torch.channels_last).load_state_dict(state["M"])
        if F is not None:
            F.to(device).load_state_dict(state["F"])
        if args.images:
            return read_files(o, M, args.images, folder)
        load = data.load_digits if o.task == "digits" else data.load_hands
        _, _, domains = load(o)
        measured = evaluate_degia(M, F, domains, folder)
    print_table({**checkpoint["config"], "steps": checkpoint["step"], **measured})

if __name__ == "__main__":
    exit_on_bad_input(main)
