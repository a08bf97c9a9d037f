"""Measure a run, apply it to your own images, or repeat the papers' tables.

    python eval.py runs/degia                            its numbers and pictures once more
    python eval.py runs/mnist --unseen mnist_m           on domains that it has never seen
    python eval.py runs/degia --images a.png b.png       a digit, or landmarks, each; runs/reg: A aligned to B
    python eval.py tables reg --seeds 3                  the tables of a paper, row by row
"""
import csv
import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

import data
import degia
import geomreg
import warp
from flows import bits_per_dim

FORMAT = "degia and geomreg, version 2"
device = torch.device("cpu")
bfloat16 = any(torch.cpu.get_capabilities().get(f"{unit}_bf16") for unit in ("amx", "avx512"))  # no emulation
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)

def autocast():  # bfloat16 for layers where the hardware multiplies it; all else stays float32
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

def save_grid(rows, path, outputs=None):  # {label: images in [0, 1]}; on them [(M(x), y), ...] of each row
    columns = max(map(len, rows.values()))
    side = max(128, min(384, 1536 // columns))
    margin = 12 + 7 * max(map(len, rows))
    sheet = Image.new("RGB", (margin + columns * (side + 4), len(rows) * (side + 4)), "white")
    for i, (label, images) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((4, i * (side + 4) + side // 2), label, "black", anchor="lm", font_size=14)
        pixels = data.to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        for j, image in enumerate(pixels):
            picture = ImageOps.contain(Image.fromarray(image), (side, side), Image.Resampling.BOX)
            pen = ImageDraw.Draw(picture)
            out, y = outputs[i][j] if outputs else ((), ())
            if len(out) == 10:
                colour = "lime" if out.argmax() == y else "red"
                pen.text((4, 0), f"{out.argmax()}", colour, font_size=36, stroke_width=2, stroke_fill="black")
            elif outputs:  # the landmarks of M over the true ones
                for k, point in enumerate(torch.cat([y, out]).view(34, 2) * picture.width):
                    pen.circle(point.tolist(), picture.width // 60, "lime" if k < 17 else "red")
            sheet.paste(picture, (margin + j * (side + 4), i * (side + 4)))
    sheet.save(path)

def write_csv(rows, path):  # dicts with the same keys; numbers to six digits
    lines = [[f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([rows[0], *lines])

def plot(logs, path):  # of {label: log.csv}: a panel for each column, with a line and the last value of each
    tables = [np.genfromtxt(log, delimiter=",", names=True, ndmin=1) for log in logs.values()]
    names = [name for name in tables[0].dtype.names if name not in ("step", "seconds")]
    sheet = Image.new("RGB", (920, (len(names) + 1) // 2 * 280), "white")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        left, top = i % 2 * 460 + 16, i // 2 * 280 + 50
        low = min(table[name].min() for table in tables)
        high = max(np.quantile(table[name], 0.97) for table in tables)  # a jump may leave the panel
        pen.rectangle((left, top, left + 428, top + 216), outline="grey")
        pen.text((left, top - 42), f"{name}: axis {low:.4g} to {high:.4g}", "black", font_size=13)
        for k, (label, table, colour) in enumerate(zip(logs, tables, ("blue", "crimson", "green"))):
            x = left + 428 * table["step"] / table["step"][-1]
            y = top + 216 * (high - table[name].clip(low, high)) / max(high - low, 1e-9)
            pen.line([*zip(x, y)], colour, 2)
            pen.text((left + 145 * k, top - 22), f"{label} {table[name][-1]:.4g}", colour, font_size=13)
    sheet.save(path)

@torch.no_grad()
def predict(M, images):  # M's output (N, outputs) for uint8 images (N, 3, S, S)
    parts = images.split(max(1, 2 ** 19 // images.shape[-1] ** 2))
    with autocast():
        return torch.cat([M(data.to_float(part.to(device)))[0].float().cpu() for part in parts])

@torch.no_grad()
def evaluate_degia(M, F, domains, folder):  # measures of M; F's bits per dim on the source; pictures of both
    results, rows, outputs = {}, {}, []
    for name, (images, y) in domains.items():
        output = predict(M, images)
        if y.is_floating_point():
            error = (output - y).view(-1, 17, 2).norm(dim=2)
            results[name] = {"mse": (output - y).square().mean().item(),  # in shares of the side
                             "mean_pose": (M.mean_pose.cpu() - y).square().mean().item(),
                             "pixels": error.mean().item() * images.shape[-1],
                             "pck": 100 * (error < 0.05).float().mean().item()}
        else:
            results[name] = {"accuracy": 100 * (output.argmax(1) == y).float().mean().item()}
        measure, number = list(results[name].items())[-1]
        rows[f"{name}: {measure} {number:.1f} %"] = images[:12] / 255
        outputs.append(list(zip(output, y)))
    save_grid(rows, folder / "domains.png", outputs)
    if F is None:
        return {"domains": results}
    classes = torch.arange(len(F.poses), device=device).repeat_interleave(12)
    samples = F.sample(classes, torch.Generator(device).manual_seed(0)).split(12)
    save_grid({f"F, class {c}": images for c, images in enumerate(samples)}, folder / "flow.png")
    bits, gen = [], torch.Generator(device).manual_seed(0)
    for x, y in zip(*(tensor.split(500) for tensor in domains["source"])):  # all at once can need gigabytes
        x = degia.flow_view(data.to_float(x.to(device)), F.shape)
        u = torch.rand(x.shape, generator=gen, device=device)  # now in float32, no noise shift of the prior
        bits.append(bits_per_dim(F.log_prob(x, degia.classes_of(y, F).to(device), u), F.dim))
    return {"domains": results, "bits_per_dim": torch.cat(bits).mean().item()}

def picture_new_samples(x_src, pool, per_round, path):  # of each max round, below what they grew from
    rows = {}
    for k, (x, i) in enumerate(zip(pool["x"].split(per_round), pool["source"].split(per_round)), 1):
        rows |= {f"source {k}": x_src[i[:12]] / 255, f"round {k}": x[:12] / 255}
    save_grid(rows, path)

@torch.no_grad()
def landmark_errors(R, pairs, most=10 ** 6):  # of eq. (7), and folding; phi, I_a, I_b of the last batch
    distances, folded = [], []
    for i in torch.arange(min(most, len(pairs.A))).split(25):
        I_a, I_b = (2 * data.to_float(I[i].to(device)) - 1 for I in (pairs.A, pairs.B))
        with autocast():
            phi = R(I_a, I_b)
        folded.append((warp.jacobian_determinant(phi) <= 0).float().mean((1, 2)))
        if pairs.points is not None:
            p_a, p_b = pairs.points[i].to(device).split(2, dim=2)
            moved = warp.warp_points(p_a, phi)
            moved = torch.where(moved.isnan(), p_a, moved)  # what phi has no place for has not moved
            distances.append(torch.stack([p_a - p_b, moved - p_b]).norm(dim=3).cpu())
    errors = {"unregistered": {"scene": None}, "registered": {"scene": None}}  # without landmarks
    for kinds, d in zip(errors.values(), torch.cat(distances, dim=1) if distances else ()):
        kinds["scene"] = d.nanmean(1).nanmean().item()
        if pairs.salient is not None:  # those on the plant
            kinds["salient"] = d.where(pairs.salient[:len(d)], torch.nan).nanmean(1).nanmean().item()
    return {**errors, "folding": torch.cat(folded).mean().item()}, (phi, I_a, I_b)

def watch(R, pairs):  # for the log: the landmark error of 25 training pairs, which never trains anything
    error = landmark_errors(R, pairs, 25)[0]["registered"]["scene"]
    return {} if error is None else {"error": error}

def evaluate_reg(R, pairs, folder):  # landmark_errors of the test pairs and of 100 training pairs; pairs.png
    test, fields = landmark_errors(R, pairs["test"])
    picture_pairs(*fields, folder / "pairs.png")
    return {**test, "registered_train": landmark_errors(R, pairs["train"], 100)[0]["registered"]}

def picture_pairs(phi, I_a, I_b, path):  # figure 4, a column for each of up to 8 pairs
    phi, I_a, I_b = phi[:8], I_a[:8], I_b[:8]
    moved = warp.resample(I_a, phi)
    longest = warp.norm(phi).max().item()
    save_grid({"A": I_a / 2 + 0.5, "B": I_b / 2 + 0.5, "A registered": moved / 2 + 0.5,
               f"field, up to {longest:.1f} px": warp.colour_wheel(phi, longest),
               "B, edges of A": overlay(I_b, I_a), "after": overlay(I_b, moved)}, path)

def overlay(I, outline):  # I in grey, with the strongest edges of another image in red
    edge = geomreg.edges(outline) + 1
    edge = (edge / edge.flatten(1).quantile(0.9, 1).clamp_min(1e-6).view(-1, 1, 1, 1) - 0.7).clamp(0, 1)
    return I.mean(1, keepdim=True) / 4 + 0.5 + torch.cat([edge, -edge, -edge], dim=1)

def print_table(results):  # of a results.json: a line per domain or set of pairs
    about = "task method backbone order similarity seed steps seconds bits_per_dim folding".split()
    print("\n" + ", ".join(f"{name} {results[name]}" for name in about if name in results))
    for name, numbers in results.get("domains", results).items():
        if isinstance(numbers, dict):
            print(f"  {name:17s}", *(f"{k} {v:8.5f}" for k, v in numbers.items() if v is not None), sep="  ")

def load_checkpoint(folder, program=None):  # on the CPU; it must be of this version and of this program
    path = Path(folder) / "checkpoint.pt"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["config"]["program"]
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
    except Exception as e:  # which one depends on the bytes of a foreign file
        raise data.InputError(f"{path}: no such checkpoint of this version ({e!r:.60}); train again") from e
    if program not in (None, found):
        raise data.InputError(f"{path}: a run of train.py {found}, not {program}; choose another --out")
    return content

def read_files(o, M, files, folder):  # print the digits, or write the landmarks in pixels; draw both
    output = predict(M, data.read_images(files, (o.size, o.size)))
    found = output.argmax(1) if o.task == "digits" else output
    save_grid({"": data.read_images(files, (256, 256)) / 255}, folder / "images.png", [[*zip(output, found)]])
    if o.task == "digits":
        return print(f"written: {folder}/images.png", *map("{}: {}".format, files, found), sep="\n")
    pixels = output.view(-1, 17, 2) * torch.tensor([[data.open_image(file).size] for file in files]) - 0.5
    names = [f"{axis}{i}" for i in range(17) for axis in "xy"]
    rows = [dict(zip(names, row)) for row in pixels.flatten(1).tolist()]
    write_csv([{"name": Path(file).name, **row} for file, row in zip(files, rows)], folder / "landmarks.csv")
    print(f"written: {folder}/images.png, {folder}/landmarks.csv")

def align_files(o, modes, R, pair, folder):  # write A, as stored, at B's size; the field in pixels of B
    if len(pair) != 2:
        raise data.InputError(f"--images: a registration takes two files, A and B of a pair, not {len(pair)}")
    A, B = (data.open_image(file, modes[side]) for file, side in zip(pair, "AB"))
    small = [data.read_images([file], (o.height, o.width), modes[side]) for file, side in zip(pair, "AB")]
    phi, I_a, I_b = landmark_errors(R, data.Pairs(*small, None, None))[1]
    name = folder / Path(pair[0]).stem
    picture_pairs(phi, I_a, I_b, f"{name}_overlay.png")
    phi = warp.resize_field(phi, B.size[::-1])
    places = warp.pixel_grid(B.height, B.width, like=phi) + phi + 0.5  # in B's pixels, then in A's:
    places = warp.scaled(places, A.width / B.width, A.height / B.height) - 0.5
    aligned = warp.sample_at(data.to_tensor(A)[None].to(phi), places)[0].round().byte()
    Image.fromarray(aligned.permute(1, 2, 0).squeeze(2).cpu().numpy()).save(f"{name}_aligned.png")
    np.save(f"{name}_field.npy", phi[0].cpu().numpy())
    print(f"written: {name}_aligned.png, {name}_field.npy, {name}_overlay.png")

def tables(args):  # train what is missing of results/papers.csv; mean and deviation over seeds; figure 5
    lines, logs = [], {}
    papers = Path(__file__).with_name("results") / "papers.csv"
    rows = csv.DictReader(papers.read_text(encoding="utf-8").splitlines())
    for row in (r for r in rows if r["task"] == args.task and r["row"].startswith(tuple(args.rows))):
        runs = train_row(args, [args.task, *row["options"].split(), *args.others])
        n, cells = len(runs), []
        for measure in next(iter(runs.values()), ()):
            values = np.array([run[measure] for run in runs.values()], float)
            deviation = values.std(ddof=1) if n > 1 else np.nan
            lines.append({**row, "n": n, "measure": measure, "mean": values.mean(), "deviation": deviation})
            cells.append(f"{measure} {values.mean():.4g} ± {deviation:.2g}".removesuffix(" ± nan"))
        print(f"{row['row']:36} n {n}  {',  '.join(cells)}  (paper: {row['paper'] or '-'})")
        if row["row"].startswith("5 ") and runs:
            logs[row["row"][2:]] = [*runs][0] / "log.csv"
    if not lines:
        raise data.InputError(f"--rows {args.rows}: no row of {papers} begins so, or none ended; see above")
    write_csv(lines, args.out / f"{args.task}.csv")
    if logs:
        plot(logs, args.out / "figure_5.png")

def train_row(args, options):  # {folder of a seed: {measure: number}}; equal options share their runs
    runs = {}
    for seed in range(args.seeds):
        folder = args.out / re.sub(r"[^\w.]+", "_", " ".join(options)) / str(seed)
        words = [Path(__file__).with_name("train.py"), *options, "--seed", folder.name, "--out", str(folder)]
        words += ["--resume"] if (folder / "checkpoint.pt").exists() else []
        if not (folder / "results.json").exists():
            print("python train.py", *words[1:], flush=True)
            subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL)
        if (folder / "results.json").exists():  # else train.py said why
            results = json.loads((folder / "results.json").read_text())
            numbers = {name: list(found.values())[0] for name, found in results.get("domains", {}).items()}
            if len(numbers) > 1:
                numbers["unseen"] = np.mean(list(numbers.values())[1:])  # the first is the source
            for tag, key in (("", "registered"), ("train ", "registered_train"), ("before ", "unregistered")):
                numbers |= {tag + kind: number for kind, number in results.get(key, {}).items()}
            runs[folder] = numbers | {"seconds": results["seconds"]}
    return runs

def exit_on_bad_input(main):  # what a user can mend becomes one line and exit code 2
    try:
        main(sys.argv[1:])
    except data.InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        os._exit(2) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else sys.exit(2)

def parse(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", help="folder of a trained run, or: tables degia, tables reg")
    if argv[:1] == ["tables"]:
        parser.add_argument("task", choices=("degia", "reg"), help="whose; unknown options go to train.py")
        parser.add_argument("--rows", nargs="+", default=[""], help="how their names begin: 2 for table 2")
        parser.add_argument("--seeds", type=int, default=1, help="runs of each row")
        parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of all these runs")
        args, others = parser.parse_known_args(argv)
        return Namespace(**vars(args), others=others)
    parser.add_argument("--data", help="measure on this data")
    parser.add_argument("--unseen", nargs="+", help="measure on these unseen domains")
    parser.add_argument("--images", nargs="+", help="apply the run to these image files")
    return parser.parse_args(argv)

def main(argv):
    args = parse(argv)
    if args.run == "tables":
        return tables(args)
    folder, checkpoint = Path(args.run), load_checkpoint(args.run)
    o = Namespace(**checkpoint["config"] | {name: given for name, given in vars(args).items() if given})
    if o.program == "reg":
        modes = checkpoint["extra"]
        R, _, _ = geomreg.build(o, len(modes["A"]), len(modes["B"]))  # "RGB" has three channels, "L" one
        R.to(device, memory_format=torch.channels_last).load_state_dict(checkpoint["state"]["R"])
        if args.images:
            return align_files(o, modes, R, args.images, folder)
        measured = evaluate_reg(R, data.load_pairs(o, modes)[0], folder)
    else:
        M, F = degia.build(o)
        M.to(device, memory_format=torch.channels_last).load_state_dict(checkpoint["state"]["M"])
        if F is not None:
            F.to(device).load_state_dict(checkpoint["state"]["F"])
        if args.images:
            return read_files(o, M, args.images, folder)
        load = data.load_digits if o.task == "digits" else data.load_hands
        measured = evaluate_degia(M, F, load(o)[2], folder)
    print_table({**checkpoint["config"], "steps": checkpoint["step"], **measured})

if __name__ == "__main__":
    exit_on_bad_input(main)
